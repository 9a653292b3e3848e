// The bindings: check sizes, release the GIL, call one function. What each call is for stands in snapshotd/_native.pyi.
#include "arena.hpp"
#include "bindings.hpp"
#include "crash.hpp"
#include "crc32c.hpp"
#include "reserve.hpp"
#include "watch.hpp"

namespace snapshotd {

namespace {

// --- checksums, crash points, memory

const CrcTier& tier_named(const std::string& name) {
    for (const CrcTier& tier : crc_tiers()) {
        if (name == tier.name) return tier;
    }
    throw std::invalid_argument("this machine cannot run the checksum tier '" + name +
                                "'; crc32c_tiers() lists its own");
}

uint32_t checksum(const CrcTier& tier, py::handle data, py::handle value) {
    uint32_t start = to_u32(value, "value");
    Bytes bytes(data);
    NoGil release;
    return ~tier.extend(~start, bytes.data(), bytes.size());
}

void bind_tools(py::module_& m) {
    m.def(
        "crc32c", [](py::handle data, py::handle value) { return checksum(crc_tiers().front(), data, value); },
        "data"_a, "value"_a = 0);
    m.def(
        "crc32c_with",
        [](const std::string& tier, py::handle data, py::handle value) {
            return checksum(tier_named(tier), data, value);
        },
        "tier"_a, "data"_a, "value"_a = 0);
    m.def("crc32c_tiers", [] {
        std::vector<std::string> names;
        for (const CrcTier& tier : crc_tiers()) names.emplace_back(tier.name);
        return names;
    });
    m.def("arm_crash", arm_crash, "point"_a, "countdown"_a = 1);
    m.def("crash_points", crash_point_names);
    m.def(
        "reserve",
        [](int fd, py::handle total_bytes, int numa_node) {
            uint64_t bytes = to_unsigned(total_bytes, "total_bytes");
            NoGil release;
            reserve(fd, bytes, numa_node);
        },
        "fd"_a, "total_bytes"_a, "numa_node"_a = -1);
    m.def("process_rss_anon_bytes", rss_anon_bytes);
}

// --- watching the trainer's objects

// Lets the garbage collector see the user's objects behind a Watch, so that a cycle through it is collected.
void join_garbage_collection(PyHeapTypeObject* heap_type) {
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(Py_TYPE(self));
        if (!py::detail::is_holder_constructed(self)) return 0;
        return py::cast<const Watch&>(py::handle(self)).traverse(visit, arg);
    };
    type.tp_clear = [](PyObject* self) {
        if (py::detail::is_holder_constructed(self)) py::cast<Watch&>(py::handle(self)).clear();
        return 0;
    };
}

std::unique_ptr<Watch> make_watch(const py::sequence& links, const py::sequence& sizes, const py::sequence& tensors) {
    auto watch = std::make_unique<Watch>();
    for (py::handle item : links) {
        auto link = py::cast<py::tuple>(item);
        if (link.size() != 3) throw std::invalid_argument("a link must be (container, key, expected)");
        py::object container = link[0], key = link[1], expected = link[2];
        if (!watch->add_link(container.ptr(), key.ptr(), expected.ptr())) throw py::error_already_set();
    }
    for (py::handle item : sizes) {
        auto [container, length] = py::cast<std::pair<py::object, Py_ssize_t>>(item);
        watch->add_size(container.ptr(), length);
    }
    for (py::handle item : tensors) {
        auto tensor = py::cast<py::tuple>(item);
        if (tensor.size() != 3) throw std::invalid_argument("a tensor must be (tensor, pointer, versioned)");
        py::object object = tensor[0], pointer = tensor[1];
        watch->add_tensor(object.ptr(), to_unsigned(pointer, "a tensor's pointer"), py::cast<bool>(tensor[2]));
    }
    return watch;
}

void bind_watch(py::module_& m) {
    py::class_<Watch>(m, "Watch", py::is_final(), py::custom_type_setup(join_garbage_collection))
        .def(py::init(&make_watch), py::kw_only(), "links"_a, "sizes"_a, "tensors"_a)
        .def("structure_changed", &Watch::structure_changed)
        .def("pointers_changed", &Watch::pointers_changed)
        .def("versions_moved", &Watch::versions_moved);
}

// --- errors

void translate_os_errors() {
    py::register_exception_translator([](std::exception_ptr pending) {
        try {
            if (pending) std::rethrow_exception(pending);
        } catch (const OsError& error) {
            py::object made =
                py::reinterpret_steal<py::object>(PyObject_CallFunction(PyExc_OSError, "is", error.code, error.what()));
            if (made) PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
        } catch (const InUseError& error) {
            PyErr_SetString(PyExc_BufferError, error.what());
        } catch (const std::logic_error& error) {
            // Only what is no subclass that pybind11 has a better name for.
            if (typeid(error) != typeid(std::logic_error)) throw;
            PyErr_SetString(PyExc_RuntimeError, error.what());
        }
    });
}

}  // namespace

}  // namespace snapshotd

PYBIND11_MODULE(_native, m) {
    using namespace snapshotd;
    m.doc() = "Shared memory, the copy engine, the erasure code and checksums of snapshotd.";
    translate_os_errors();
    py::register_exception<FormatError>(m, "ArenaFormatError", PyExc_ValueError);
    m.attr("ARENA_VERSION") = kArenaVersion;
    m.attr("BLOCK_BYTES") = kBlockBytes;
    m.attr("EMPTY") = kEmpty;
    m.attr("FILLING") = kFilling;
    m.attr("FULL") = kFull;
    m.attr("PROTECTED") = kProtected;
    m.attr("COMMITTED") = kCommitted;
    bind_tools(m);
    bind_arena(m);
    bind_engine(m);
    bind_erasure(m);
    bind_pull(m);
    bind_watch(m);
}
