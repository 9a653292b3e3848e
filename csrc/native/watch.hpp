// Asks Python objects, without a Python loop, whether they are still what was planned.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace snapshotd {

// Holds references to the user's containers and tensors, and takes part in garbage collection. Every call needs the
// GIL. Speaks the C-API of CPython only, never torch's: it works with whatever torch is installed.
class Watch {
  public:
    Watch() = default;
    ~Watch() { clear(); }
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;

    // Each may fail with a Python error set and false.
    bool add_link(PyObject* container, PyObject* key, PyObject* expected);
    void add_size(PyObject* container, Py_ssize_t length);
    void add_tensor(PyObject* tensor, uint64_t pointer, bool versioned);

    bool structure_changed() const;
    // Also notes the version of every tensor that has one to be noted, up to the first that moved.
    bool pointers_changed();
    // Place of the first tensor whose version is no longer what was noted, -1 if there is none.
    Py_ssize_t versions_moved() const;

    int traverse(visitproc visit, void* arg) const;
    void clear();

  private:
    enum class Kind : uint8_t { dict, list, attribute };
    struct Link {
        PyObject *container, *key, *expected;
        Py_hash_t hash;       // of a dict's key: a tensor's costs a call into Python
        Py_ssize_t position;  // in a list
        Kind kind;
    };
    struct Size {
        PyObject* container;
        Py_ssize_t length;
    };
    struct Tensor {
        PyObject* object;
        uint64_t pointer;
        int64_t version;
        uint32_t kind;  // place in `types_`
        bool versioned;
    };
    // How tensors of one type are asked. Where a member of the type is no built-in one, its function is null and the
    // tensor is asked by name. `pointer` and `version` keep what the functions belong to alive.
    struct Type {
        PyTypeObject* type;
        PyObject *pointer, *version;
        PyCFunction data_ptr;
        getter version_of;
        void* closure;
    };
    static bool holds(const Link& link);
    uint32_t kind_of(PyTypeObject* type);
    bool lies_at(const Tensor& tensor) const;
    int64_t version_of(const Tensor& tensor) const;

    std::vector<Link> links_;
    std::vector<Size> sizes_;
    std::vector<Tensor> tensors_;
    std::vector<Type> types_;  // a few
};

}  // namespace snapshotd
