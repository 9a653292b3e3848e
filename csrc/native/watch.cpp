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

// -1 where it makes no sense, without an error. Takes the reference.
int64_t version_in(PyObject* value) {
    if (value == nullptr) {
        PyErr_Clear();
        return kNoVersion;
    }
    int64_t version = PyLong_AsLongLong(value);
    Py_DECREF(value);
    if (version == -1 && PyErr_Occurred()) PyErr_Clear();
    return version;
}

// Takes the reference.
bool is_pointer(PyObject* value, uint64_t pointer) {
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

// A member as the type has it, or null without an error.
PyObject* member(PyTypeObject* type, PyObject* name) {
    PyObject* found = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name);
    if (found == nullptr) PyErr_Clear();
    return found;
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

void Watch::add_tensor(PyObject* tensor, uint64_t pointer, bool versioned) {
    tensors_.push_back({kept(tensor), pointer, kNotNoted, kind_of(Py_TYPE(tensor)), versioned});
}

uint32_t Watch::kind_of(PyTypeObject* type) {
    for (size_t i = 0; i < types_.size(); ++i) {
        if (types_[i].type == type) return static_cast<uint32_t>(i);
    }
    Type made{};
    made.type = type;
    Py_INCREF(type);
    made.pointer = member(type, data_ptr_name());
    if (made.pointer != nullptr && Py_IS_TYPE(made.pointer, &PyMethodDescr_Type)) {
        const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(made.pointer)->d_method;
        if (method->ml_flags == METH_NOARGS) made.data_ptr = method->ml_meth;
    }
    made.version = member(type, version_name());
    if (made.version != nullptr && Py_IS_TYPE(made.version, &PyGetSetDescr_Type)) {
        const PyGetSetDef* attribute = reinterpret_cast<PyGetSetDescrObject*>(made.version)->d_getset;
        made.version_of = attribute->get;
        made.closure = attribute->closure;
    }
    types_.push_back(made);
    return static_cast<uint32_t>(types_.size() - 1);
}

// The type is compared each time: an object's may be changed.
bool Watch::lies_at(const Tensor& tensor) const {
    const Type& type = types_[tensor.kind];
    bool direct = type.data_ptr != nullptr && Py_IS_TYPE(tensor.object, type.type);
    return is_pointer(
        direct ? type.data_ptr(tensor.object, nullptr) : PyObject_CallMethodNoArgs(tensor.object, data_ptr_name()),
        tensor.pointer);
}

// Inference tensors have no version and raise.
int64_t Watch::version_of(const Tensor& tensor) const {
    const Type& type = types_[tensor.kind];
    bool direct = type.version_of != nullptr && Py_IS_TYPE(tensor.object, type.type);
    return version_in(direct ? type.version_of(tensor.object, type.closure)
                             : PyObject_GetAttr(tensor.object, version_name()));
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

// One pass for both questions: after a training step no tensor is in a cache, and fetching them is most of the cost.
bool Watch::pointers_changed() {
    for (Tensor& tensor : tensors_) {
        if (!lies_at(tensor)) return true;
        if (tensor.versioned) tensor.version = version_of(tensor);
    }
    return false;
}

Py_ssize_t Watch::versions_moved() const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
        if (tensors_[i].version != kNotNoted && version_of(tensors_[i]) != tensors_[i].version) {
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
    for (const Type& type : types_) {
        Py_VISIT(type.type);
        Py_VISIT(type.pointer);
        Py_VISIT(type.version);
    }
    return 0;
}

// Dropping a reference may run anything, this object included: it is empty before the first one goes.
void Watch::clear() {
    std::vector<Link> links;
    std::vector<Size> sizes;
    std::vector<Tensor> tensors;
    std::vector<Type> types;
    links.swap(links_);
    sizes.swap(sizes_);
    tensors.swap(tensors_);
    types.swap(types_);
    for (Link& link : links) {
        Py_DECREF(link.container);
        Py_DECREF(link.key);
        Py_DECREF(link.expected);
    }
    for (Size& size : sizes) Py_DECREF(size.container);
    for (Tensor& tensor : tensors) Py_DECREF(tensor.object);
    for (Type& type : types) {
        Py_XDECREF(type.pointer);
        Py_XDECREF(type.version);
        Py_DECREF(type.type);
    }
}

}  // namespace snapshotd
