#include "watch.hpp"

namespace snapshotd {

namespace {

constexpr int64_t kNoVersion = -1;
constexpr int64_t kNotNoted = -2;

PyObject* interned(const char* name) {
    PyObject* made = PyUnicode_InternFromString(name);
    if (made == nullptr) PyErr_Clear();
    return made;
}

PyObject* data_ptr_name() {
    static PyObject* const name = interned("data_ptr");
    return name;
}

PyObject* version_name() {
    static PyObject* const name = interned("_version");
    return name;
}

// Borrowed, or null without an error. Unlike `container[key]` it never calls `__missing__`.
PyObject* look_up(PyObject* dict, PyObject* key, [[maybe_unused]] Py_hash_t hash) {
#if PY_VERSION_HEX < 0x030D0000
    PyObject* found = _PyDict_GetItem_KnownHash(dict, key, hash);
#else
    PyObject* found = PyDict_GetItemWithError(dict, key);
#endif
    if (found == nullptr) PyErr_Clear();
    return found;
}

// Inference tensors have no version and raise.
int64_t version_of(PyObject* tensor) {
    PyObject* value = PyObject_GetAttr(tensor, version_name());
    if (value == nullptr) {
        PyErr_Clear();
        return kNoVersion;
    }
    int64_t version = PyLong_AsLongLong(value);
    Py_DECREF(value);
    if (version == -1 && PyErr_Occurred()) PyErr_Clear();
    return version;
}

bool lies_at(PyObject* tensor, uint64_t pointer) {
    PyObject* value = PyObject_CallMethodNoArgs(tensor, data_ptr_name());
    if (value == nullptr) {
        PyErr_Clear();
        return false;
    }
    uint64_t found = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    if (found == ~uint64_t{0} && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return found == pointer;
}

PyObject* kept(PyObject* object) {
    Py_INCREF(object);
    return object;
}

}  // namespace

bool Watch::add_link(PyObject* container, PyObject* key, PyObject* expected) {
    Link link{};
    if (PyDict_Check(container)) {
        link.kind = Kind::dict;
        link.hash = PyObject_Hash(key);
        if (link.hash == -1) return false;
    } else if (PyList_Check(container)) {
        link.kind = Kind::list;
        link.position = PyLong_AsSsize_t(key);
        if (link.position == -1 && PyErr_Occurred()) return false;
        if (link.position < 0) {
            PyErr_SetString(PyExc_ValueError, "the key of a list must be 0 or more");
            return false;
        }
    } else {
        link.kind = Kind::attribute;
        if (!PyUnicode_Check(key)) {
            PyErr_SetString(PyExc_TypeError,
                            "the key of a container that is no dict or list must be an attribute's name");
            return false;
        }
    }
    link.container = kept(container);
    link.key = kept(key);
    link.expected = kept(expected);
    links_.push_back(link);
    return true;
}

void Watch::add_size(PyObject* container, Py_ssize_t length) {
    sizes_.push_back({kept(container), length});
}

void Watch::add_tensor(PyObject* tensor, uint64_t pointer) {
    tensors_.push_back({kept(tensor), pointer, kNotNoted});
}

bool Watch::holds(const Link& link) {
    switch (link.kind) {
        case Kind::dict:
            return look_up(link.container, link.key, link.hash) == link.expected;
        case Kind::list:
            return link.position < PyList_GET_SIZE(link.container) &&
                   PyList_GET_ITEM(link.container, link.position) == link.expected;
        case Kind::attribute: {
            PyObject* found = PyObject_GetAttr(link.container, link.key);
            if (found == nullptr) PyErr_Clear();
            Py_XDECREF(found);
            return found == link.expected;
        }
    }
    return false;
}

bool Watch::structure_changed() const {
    for (const Size& size : sizes_) {
        Py_ssize_t length =
            PyDict_Check(size.container) ? PyDict_GET_SIZE(size.container) : PyObject_Size(size.container);
        if (length < 0) PyErr_Clear();
        if (length != size.length) return true;
    }
    for (const Link& link : links_) {
        if (!holds(link)) return true;
    }
    return false;
}

bool Watch::pointers_changed() const {
    for (const Tensor& tensor : tensors_) {
        if (!lies_at(tensor.object, tensor.pointer)) return true;
    }
    return false;
}

void Watch::note_versions() {
    for (Tensor& tensor : tensors_) tensor.version = version_of(tensor.object);
}

Py_ssize_t Watch::versions_moved() const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
        if (tensors_[i].version != kNotNoted && version_of(tensors_[i].object) != tensors_[i].version) {
            return static_cast<Py_ssize_t>(i);
        }
    }
    return -1;
}

int Watch::traverse(visitproc visit, void* arg) const {
    for (const Link& link : links_) {
        Py_VISIT(link.container);
        Py_VISIT(link.key);
        Py_VISIT(link.expected);
    }
    for (const Size& size : sizes_) Py_VISIT(size.container);
    for (const Tensor& tensor : tensors_) Py_VISIT(tensor.object);
    return 0;
}

// Dropping a reference may run anything, this object included: it is empty before the first one goes.
void Watch::clear() {
    std::vector<Link> links;
    std::vector<Size> sizes;
    std::vector<Tensor> tensors;
    links.swap(links_);
    sizes.swap(sizes_);
    tensors.swap(tensors_);
    for (Link& link : links) {
        Py_DECREF(link.container);
        Py_DECREF(link.key);
        Py_DECREF(link.expected);
    }
    for (Size& size : sizes) Py_DECREF(size.container);
    for (Tensor& tensor : tensors) Py_DECREF(tensor.object);
}

}  // namespace snapshotd
