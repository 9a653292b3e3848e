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
    void add_tensor(PyObject* tensor, uint64_t pointer);

    bool structure_changed() const;
    bool pointers_changed() const;
    void note_versions();
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
    };
    static bool holds(const Link& link);

    std::vector<Link> links_;
    std::vector<Size> sizes_;
    std::vector<Tensor> tensors_;
};

}  // namespace snapshotd
