// Python buffers and integers on their way into C++.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common.hpp"
#include "plan.hpp"

namespace snapshotd {

namespace py = pybind11;

// A contiguous view of anything with the buffer protocol, held as long as this object lives (needs the GIL at both
// ends). BufferError where it is not contiguous or, for a writable one, read-only.
class Bytes {
  public:
    explicit Bytes(py::handle object, bool writable = false) {
        int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
    }
    ~Bytes() { PyBuffer_Release(&view_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    byte* data() const { return static_cast<byte*>(view_.buf); }
    uint64_t size() const { return static_cast<uint64_t>(view_.len); }

  private:
    Py_buffer view_{};
};

// ValueError, not OverflowError, for integers that do not fit: `what` is named.
uint64_t to_unsigned(py::handle value, const std::string& what);
uint32_t to_u32(py::handle value, const char* what);
std::vector<ItemSpec> to_items(py::handle sequence, const char* what);
std::vector<uint64_t> to_pointers(py::handle sequence, const char* what);

}  // namespace snapshotd
