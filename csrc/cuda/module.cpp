// The bindings of snapshotd._cuda: take pointers and lengths from whatever Python has, release the GIL, call one
// function. What each call is for stands in snapshotd/_cuda.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "folders.hpp"
#include "host_codec.hpp"
#include "side_copy.hpp"

namespace snapshotd::gpu {

namespace {

namespace py = pybind11;
using namespace pybind11::literals;
using NoGil = py::gil_scoped_release;

// --- memory, as Python names it: an integer, or an array of some library

struct Memory {
    uint8_t* at = nullptr;
    std::optional<uint64_t> bytes;  // an integer alone has no length
};

// The part of DLPack (dmlc/dlpack, version 0.x and 1.x without versioned capsules) that is read here.
struct DlTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dimensions;
    uint8_t type_code, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
constexpr int kDlCuda = 2, kDlCudaManaged = 13;

template <typename Integer>
uint64_t dense_bytes(const std::vector<Integer>& shape, const std::vector<Integer>& strides, uint64_t width) {
    Integer expected = 1;
    for (size_t i = shape.size(); i-- > 0;) {
        if (!strides.empty() && shape[i] > 1 && strides[i] != expected) {
            throw std::invalid_argument("the array is not contiguous");
        }
        expected *= shape[i];
    }
    return static_cast<uint64_t>(expected) * width;
}

Memory from_interface(const py::dict& facts, bool writable) {
    auto [at, read_only] = py::cast<std::pair<uint64_t, bool>>(facts["data"]);
    if (writable && read_only) throw std::invalid_argument("an output is read-only");
    const auto type = py::cast<std::string>(facts["typestr"]);
    const uint64_t width = std::stoull(type.substr(2));
    auto shape = py::cast<std::vector<int64_t>>(facts["shape"]);
    std::vector<int64_t> strides;
    if (facts.contains("strides") && !facts["strides"].is_none()) {
        for (int64_t stride : py::cast<std::vector<int64_t>>(facts["strides"])) {
            strides.push_back(stride / static_cast<int64_t>(width));
        }
    }
    return {reinterpret_cast<uint8_t*>(at), dense_bytes(shape, strides, width)};
}

Memory from_dlpack(py::handle object) {
    const int type = py::cast<std::pair<int, int>>(object.attr("__dlpack_device__")()).first;
    if (type != kDlCuda && type != kDlCudaManaged) {
        throw std::invalid_argument("an array lies in memory of DLPack's device type " + std::to_string(type) +
                                    ", not on a CUDA device");
    }
    py::object capsule = object.attr("__dlpack__")("stream"_a = -1);
    auto* tensor = static_cast<DlTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (tensor == nullptr) throw py::error_already_set();
    std::vector<int64_t> shape(tensor->shape, tensor->shape + tensor->dimensions), strides;
    if (tensor->strides != nullptr) strides.assign(tensor->strides, tensor->strides + tensor->dimensions);
    const uint64_t width = (uint64_t{tensor->bits} * tensor->lanes + 7) / 8;
    return {static_cast<uint8_t*>(tensor->data) + tensor->byte_offset, dense_bytes(shape, strides, width)};
}

Memory to_memory(py::handle object, bool writable) {
    if (PyLong_Check(object.ptr())) return {reinterpret_cast<uint8_t*>(py::cast<uint64_t>(object)), {}};
    if (py::hasattr(object, "__cuda_array_interface__")) {
        return from_interface(py::cast<py::dict>(object.attr("__cuda_array_interface__")), writable);
    }
    if (py::hasattr(object, "__dlpack__")) return from_dlpack(object);
    throw py::type_error("memory is an integer address, or has __cuda_array_interface__ or __dlpack__");
}

// The symbols of one call, all of one length.
class Lengths {
  public:
    explicit Lengths(std::optional<uint64_t> bytes) : bytes_(bytes) {}

    uint8_t* take(py::handle object, bool writable) {
        const Memory memory = to_memory(object, writable);
        if (memory.bytes && !bytes_) bytes_ = memory.bytes;
        if (memory.bytes && *memory.bytes != *bytes_) {
            throw std::invalid_argument("symbols must have the same length, not " + std::to_string(*bytes_) + " and " +
                                        std::to_string(*memory.bytes) + " bytes");
        }
        return memory.at;
    }

    std::vector<const uint8_t*> inputs(const py::sequence& objects) {
        std::vector<const uint8_t*> all;
        for (py::handle one : objects) all.push_back(one.is_none() ? nullptr : take(one, false));
        return all;
    }

    std::vector<uint8_t*> outputs(const py::sequence& objects) {
        std::vector<uint8_t*> all;
        for (py::handle one : objects) all.push_back(take(one, true));
        return all;
    }

    uint64_t bytes() const {
        if (!bytes_) throw std::invalid_argument("bytes must be given where memory is given as integers");
        return *bytes_;
    }

  private:
    std::optional<uint64_t> bytes_;
};

Layout to_layout(const std::string& name) {
    if (name == "planes") return Layout::planes;
    if (name == "bytes") return Layout::bytes;
    throw std::invalid_argument("there is no layout '" + name + "': planes or bytes");
}

Factors to_factors(const py::sequence& given) {
    Factors rows;
    for (py::handle row : given) {
        const auto text = py::cast<std::string>(py::bytes(py::reinterpret_borrow<py::object>(row)));
        rows.emplace_back(text.begin(), text.end());
    }
    return rows;
}

std::unique_ptr<Device> make_device(const std::string& kind, int ordinal) {
    if (kind == "cuda") return make_cuda_device(ordinal);
    if (kind == "host") return make_host_device();
    throw std::invalid_argument("there is no kind of device '" + kind + "': cuda or host");
}

uint8_t* to_pointer(uint64_t at) {
    return reinterpret_cast<uint8_t*>(at);
}

void bind_device(py::module_& m) {
    using Bytes = std::optional<uint64_t>;
    py::class_<Device>(m, "Device", py::is_final())
        .def(py::init(&make_device), "kind"_a = "cuda", "ordinal"_a = 0)
        .def_property_readonly("name", &Device::name)
        .def(
            "allocate", [](Device& d, uint64_t bytes) { return reinterpret_cast<uint64_t>(d.allocate(bytes)); },
            "bytes"_a)
        .def(
            "release", [](Device& d, uint64_t at) { d.release(to_pointer(at)); }, "memory"_a, py::call_guard<NoGil>())
        .def("make_stream", &Device::make_stream)
        .def("end_stream", &Device::end_stream, "stream"_a, py::call_guard<NoGil>())
        .def("finish", &Device::finish, "stream"_a = 0, py::call_guard<NoGil>())
        .def(
            "copy",
            [](Device& d, uint64_t to, uint64_t from, uint64_t bytes, Stream stream) {
                d.copy(to_pointer(to), to_pointer(from), bytes, stream);
            },
            "to"_a, "from_"_a, "bytes"_a, "stream"_a = 0, py::call_guard<NoGil>())
        .def(
            "encode",
            [](Device& d, const py::sequence& data, const py::sequence& parity, Bytes bytes, Stream stream) {
                Lengths lengths(bytes);
                auto in = lengths.inputs(data);
                auto out = lengths.outputs(parity);
                const uint64_t length = lengths.bytes();
                NoGil release;
                encode(d, in, out, length, stream);
            },
            "data"_a, "parity"_a, "bytes"_a = py::none(), "stream"_a = 0)
        .def(
            "combine",
            [](Device& d, const py::sequence& inputs, const py::sequence& outputs, const py::sequence& factors,
               const std::string& layout, bool add, Bytes bytes, Stream stream) {
                Lengths lengths(bytes);
                auto in = lengths.inputs(inputs);
                auto out = lengths.outputs(outputs);
                const Factors rows = to_factors(factors);
                const uint64_t length = lengths.bytes();
                const Layout of = to_layout(layout);
                NoGil release;
                combine(d, of, in, out, rows, length, add, stream);
            },
            "inputs"_a, "outputs"_a, "factors"_a, py::kw_only(), "layout"_a, "add"_a = false, "bytes"_a = py::none(),
            "stream"_a = 0)
        .def(
            "decode",
            [](Device& d, const py::sequence& data, const py::sequence& parity, const py::dict& wanted, Bytes bytes,
               Stream stream) {
                Lengths lengths(bytes);
                auto in = lengths.inputs(data);
                auto rows = lengths.inputs(parity);
                std::vector<Wanted> out;
                for (auto [symbol, memory] : wanted) out.push_back({py::cast<int>(symbol), lengths.take(memory, true)});
                const uint64_t length = lengths.bytes();
                NoGil release;
                decode(d, in, rows, out, length, stream);
            },
            "data"_a, "parity"_a, "wanted"_a, "bytes"_a = py::none(), "stream"_a = 0)
        .def(
            "crc32c",
            [](Device& d, py::handle data, py::handle crcs, uint64_t block_bytes, Bytes bytes, Stream stream) {
                Lengths lengths(bytes);
                const uint8_t* from = lengths.take(data, false);
                auto* to = reinterpret_cast<uint32_t*>(to_memory(crcs, true).at);
                const uint64_t length = lengths.bytes();
                NoGil release;
                crc32c(d, from, length, block_bytes, to, stream);
            },
            "data"_a, "crcs"_a, py::kw_only(), "block_bytes"_a, "bytes"_a = py::none(), "stream"_a = 0);
}

std::vector<SlotPiece> to_pieces(const py::sequence& given) {
    std::vector<SlotPiece> pieces;
    for (py::handle item : given) {
        auto [at, offset, bytes] = py::cast<std::tuple<uint64_t, uint64_t, uint64_t>>(item);
        pieces.push_back({to_pointer(at), offset, bytes});
    }
    return pieces;
}

void bind_copies(py::module_& m) {
    py::class_<Pinned>(m, "Pinned", py::is_final())
        .def(py::init([](Device& d, uint64_t memory, uint64_t bytes, uint64_t segment_bytes) {
                 NoGil release;
                 return std::make_unique<Pinned>(d, to_pointer(memory), bytes, segment_bytes);
             }),
             "device"_a, "memory"_a, "bytes"_a, "segment_bytes"_a = kSegmentBytes, py::keep_alive<1, 2>());
    py::class_<SideCopy>(m, "SideCopy", py::is_final())
        .def(py::init([](Device& d, const Pinned& arena, uint64_t file_bytes, uint64_t block_bytes,
                         uint64_t bucket_bytes, const py::sequence& pieces, int notify_fd) {
                 auto table = to_pieces(pieces);
                 NoGil release;
                 return std::make_unique<SideCopy>(d, arena, file_bytes, block_bytes, bucket_bytes, std::move(table),
                                                   notify_fd);
             }),
             "device"_a, "arena"_a, py::kw_only(), "file_bytes"_a, "block_bytes"_a, "bucket_bytes"_a, "pieces"_a,
             "notify_fd"_a = -1, py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def(
            "begin",
            [](SideCopy& copy, uint64_t slot, uint64_t crcs, Stream compute) {
                copy.begin(to_pointer(slot), reinterpret_cast<uint32_t*>(crcs), compute);
            },
            "slot"_a, "crcs"_a, "compute"_a = 0, py::call_guard<NoGil>())
        .def("hold", &SideCopy::hold, "compute"_a = 0)
        .def("done", &SideCopy::done)
        .def("wait", &SideCopy::wait, py::call_guard<NoGil>());
    py::class_<HostCodec>(m, "HostCodec", py::is_final())
        .def(py::init<Device&, int, int, uint64_t, int>(), "device"_a, "k"_a, "m"_a, py::kw_only(), "piece_bytes"_a,
             "lanes"_a = 3, py::keep_alive<1, 2>())
        .def(
            "encode",
            [](HostCodec& codec, const Pinned& memory, const std::vector<uint64_t>& data,
               const std::vector<uint64_t>& parity, uint64_t bytes) {
                std::vector<const uint8_t*> in;
                std::vector<uint8_t*> out;
                for (uint64_t at : data) in.push_back(to_pointer(at));
                for (uint64_t at : parity) out.push_back(to_pointer(at));
                NoGil release;
                codec.encode(memory, in, out, bytes);
            },
            "memory"_a, "data"_a, "parity"_a, "bytes"_a)
        .def(
            "combine",
            [](HostCodec& codec, const Pinned& memory, const std::vector<uint64_t>& data,
               const std::vector<uint64_t>& sums, const py::sequence& factors, const std::string& layout,
               uint64_t bytes) {
                std::vector<const uint8_t*> in;
                std::vector<uint8_t*> out;
                for (uint64_t at : data) in.push_back(to_pointer(at));
                for (uint64_t at : sums) out.push_back(to_pointer(at));
                const Factors rows = to_factors(factors);
                const Layout of = to_layout(layout);
                NoGil release;
                codec.combine(memory, of, in, out, rows, bytes);
            },
            "memory"_a, "data"_a, "sums"_a, "factors"_a, py::kw_only(), "layout"_a, "bytes"_a);
}

}  // namespace

}  // namespace snapshotd::gpu

PYBIND11_MODULE(_cuda, m) {
    using namespace snapshotd::gpu;
    m.doc() = "The erasure code, checksums and copies of snapshotd on a CUDA device.";
    static py::exception<DeviceError> device_error(m, "CudaError", PyExc_RuntimeError);
    static py::exception<DeviceMemoryError> memory_error(m, "CudaMemoryError", device_error.ptr());
    py::register_exception_translator([](std::exception_ptr pending) {
        auto raise = [](py::handle type, const DeviceError& error) {
            py::object made = type(error.what());
            made.attr("code") = error.code;
            PyErr_SetObject(type.ptr(), made.ptr());
        };
        try {
            if (pending) std::rethrow_exception(pending);
        } catch (const DeviceMemoryError& error) {
            raise(memory_error, error);
        } catch (const DeviceError& error) {
            raise(device_error, error);
        } catch (const std::logic_error& error) {
            // Only what is no subclass that pybind11 has a better name for.
            if (typeid(error) != typeid(std::logic_error)) throw;
            PyErr_SetString(PyExc_RuntimeError, error.what());
        }
    });
#ifdef SNAPSHOTD_NVRTC
    m.attr("built_by") = "g++, kernels by NVRTC at run time";
    const auto site = py::cast<std::string>(py::module_::import("sysconfig").attr("get_path")("purelib"));
    for (const char* folder : {"cu13/lib", "cuda_runtime/lib", "cuda_nvrtc/lib"}) {
        library_folders().push_back(site + "/nvidia/" + folder);
    }
#else
    m.attr("built_by") = "nvcc";
#endif
    m.def("device_count", [] {
        std::string why;
        return cuda_device_count(why);
    });
    m.def("why_no_device", [] {
        std::string why;
        cuda_device_count(why);
        return why;
    });
    m.def("planes_coefficient", &planes_coefficient, "row"_a, "symbol"_a);
    bind_device(m);
    bind_copies(m);
}
