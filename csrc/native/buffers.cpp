#include "buffers.hpp"

#include <stdexcept>

namespace snapshotd {

namespace {

py::object fast_sequence(py::handle object, const std::string& what) {
    std::string complaint = what + " must be a sequence";
    PyObject* fast = PySequence_Fast(object.ptr(), complaint.c_str());
    if (fast == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(fast);
}

Py_ssize_t length(const py::object& fast) {
    return PySequence_Fast_GET_SIZE(fast.ptr());
}
py::handle at(const py::object& fast, Py_ssize_t i) {
    return PySequence_Fast_GET_ITEM(fast.ptr(), i);
}

int64_t to_signed(py::handle value, const std::string& what) {
    int overflow = 0;
    long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow != 0) throw std::invalid_argument(what + " does not fit into 64 bits");
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    return number;
}

ItemSpec to_item(py::handle value, const std::string& name) {
    py::object parts = fast_sequence(value, name);
    if (length(parts) != 5) {
        throw std::invalid_argument(name + " must be (pointer, slot_offset, element_bytes, shape, strides)");
    }
    ItemSpec spec;
    spec.pointer = to_unsigned(at(parts, 0), name + "'s pointer");
    spec.offset = to_unsigned(at(parts, 1), name + "'s slot_offset");
    spec.element_bytes = to_unsigned(at(parts, 2), name + "'s element_bytes");
    py::object shape = fast_sequence(at(parts, 3), name + "'s shape");
    py::object strides = fast_sequence(at(parts, 4), name + "'s strides");
    for (Py_ssize_t d = 0; d < length(shape); ++d) spec.shape.push_back(to_unsigned(at(shape, d), name + "'s shape"));
    for (Py_ssize_t d = 0; d < length(strides); ++d) {
        spec.strides.push_back(to_signed(at(strides, d), name + "'s stride"));
    }
    return spec;
}

}  // namespace

uint64_t to_unsigned(py::handle value, const std::string& what) {
    PyObject* index = PyNumber_Index(value.ptr());
    if (index == nullptr) throw py::error_already_set();
    uint64_t number = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    if (number == ~uint64_t{0} && PyErr_Occurred()) {
        PyErr_Clear();
        throw std::invalid_argument(what + " is negative or does not fit into 64 bits");
    }
    return number;
}

uint32_t to_u32(py::handle value, const char* what) {
    uint64_t number = to_unsigned(value, what);
    if (number > UINT32_MAX) throw std::invalid_argument(std::string(what) + " does not fit into 32 bits");
    return static_cast<uint32_t>(number);
}

std::vector<ItemSpec> to_items(py::handle sequence, const char* what) {
    py::object fast = fast_sequence(sequence, std::string(what) + " items");
    std::vector<ItemSpec> specs;
    specs.reserve(length(fast));
    for (Py_ssize_t i = 0; i < length(fast); ++i) {
        specs.push_back(to_item(at(fast, i), std::string(what) + " item " + std::to_string(i)));
    }
    return specs;
}

std::vector<uint64_t> to_pointers(py::handle sequence, const char* what) {
    py::object fast = fast_sequence(sequence, std::string(what) + " pointers");
    std::vector<uint64_t> pointers(length(fast));
    for (Py_ssize_t i = 0; i < length(fast); ++i) pointers[i] = to_unsigned(at(fast, i), "a pointer");
    return pointers;
}

}  // namespace snapshotd
