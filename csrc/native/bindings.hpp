// What the files of bindings share. The rule for all of them: check sizes, release the GIL, call one function. What
// each call is for stands in snapshotd/_native.pyi.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "buffers.hpp"
#include "erasure.hpp"
#include "futex.hpp"

namespace snapshotd {

using namespace pybind11::literals;
using NoGil = py::gil_scoped_release;

void bind_arena(py::module_& m);
void bind_engine(py::module_& m);
void bind_erasure(py::module_& m);
void bind_pull(py::module_& m);

// Whether two buffers share a byte.
bool overlap(const Bytes& one, const Bytes& other);

// The checksums of so many bytes, one for each block. ValueError unless they are that.
BlockCrcs to_crcs(const Bytes& crcs, py::handle block_bytes, uint64_t data_bytes);

// ValueError for a layout that is none.
Layout to_layout(const std::string& name);

// Waits without the GIL, but not deaf to signals: `wait_once` says what ended it.
template <typename WaitOnce>
void wait_for(double timeout_s, WaitOnce wait_once) {
    Clock::time_point deadline = deadline_after(timeout_s);
    for (;;) {
        Woken woken;
        {
            NoGil release;
            woken = wait_once(deadline);
        }
        if (woken != Woken::signal) return;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
}

}  // namespace snapshotd
