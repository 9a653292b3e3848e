// The launches of launch.hpp where no nvcc compiled the kernels: NVRTC does, from the same sources, which are in this
// module as text. Each kernel that is needed is compiled once in a process, in a second or two, and kept.
#ifdef SNAPSHOTD_NVRTC

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "bytes.cuh"
#include "crc32c.cuh"
#include "device.hpp"
#include "launch.hpp"
#include "pieces.cuh"

namespace snapshotd::gpu {

namespace {

struct Source {
    const char *name, *text;
};

constexpr Source kSources[] = {
#include "kernel_sources.inc"
};

// --- NVRTC, whose numbers are part of its ABI

struct Nvrtc {
    using Program = void*;
    int (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*);
    int (*compile)(Program, int, const char* const*);
    int (*ptx_size)(Program, size_t*);
    int (*ptx)(Program, char*);
    int (*log_size)(Program, size_t*);
    int (*log)(Program, char*);
    int (*destroy)(Program*);

    Nvrtc() {
        void* library = load_library("libnvrtc");
        if (library == nullptr) {
            throw DeviceError(cudaErrorSharedObjectInitFailed,
                              "libnvrtc, which compiles the kernels, is not installed here: pip install "
                              "'snapshotd[cuda]'");
        }
        auto find = [&](auto& call, const char* name) {
            call = reinterpret_cast<std::remove_reference_t<decltype(call)>>(dlsym(library, name));
            if (call == nullptr)
                throw DeviceError(cudaErrorSharedObjectInitFailed, std::string("libnvrtc lacks ") + name);
        };
        find(create, "nvrtcCreateProgram");
        find(compile, "nvrtcCompileProgram");
        find(ptx_size, "nvrtcGetPTXSize");
        find(ptx, "nvrtcGetPTX");
        find(log_size, "nvrtcGetProgramLogSize");
        find(log, "nvrtcGetProgramLog");
        find(destroy, "nvrtcDestroyProgram");
    }
};

// PTX that every device since the A100 takes: its driver compiles it.
std::string ptx_of(const std::string& unit) {
    static const Nvrtc nvrtc;
    std::vector<const char*> names, texts;
    for (const Source& source : kSources) {
        names.push_back(source.name);
        texts.push_back(source.text);
    }
    Nvrtc::Program program = nullptr;
    const char* options[] = {"--gpu-architecture=compute_80", "--std=c++17"};
    int error =
        nvrtc.create(&program, unit.c_str(), "unit.cu", static_cast<int>(names.size()), texts.data(), names.data());
    std::string text;
    size_t size = 0;
    if (error == 0) {
        error = nvrtc.compile(program, 2, options);
        if (error == 0) {
            nvrtc.ptx_size(program, &size);
            text.resize(size);
            error = nvrtc.ptx(program, text.data());
        } else {
            nvrtc.log_size(program, &size);
            text.resize(size);
            nvrtc.log(program, text.data());
        }
        nvrtc.destroy(&program);
    }
    if (error != 0) throw DeviceError(cudaErrorUnknown, "NVRTC does not compile the kernels: " + text);
    return text;
}

// --- kernels by name

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw DeviceError(error, std::string(what) + " failed: " + cudaGetErrorString(error));
}

// `unit` has all kernels of its family that go together.
cudaKernel_t kernel_of(const std::string& name, const std::string& unit) {
    static std::mutex mutex;
    static std::map<std::string, cudaLibrary_t> libraries;
    static std::map<std::string, cudaKernel_t> kernels;
    std::lock_guard<std::mutex> lock(mutex);
    if (auto found = kernels.find(name); found != kernels.end()) return found->second;
    auto library = libraries.find(unit);
    if (library == libraries.end()) {
        const std::string ptx = ptx_of(unit);
        cudaLibrary_t loaded;
        check(cudaLibraryLoadData(&loaded, ptx.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0), "loading a kernel");
        library = libraries.emplace(unit, loaded).first;
    }
    cudaKernel_t kernel;
    check(cudaLibraryGetKernel(&kernel, library->second, name.c_str()), "finding a kernel");
    return kernels[name] = kernel;
}

template <typename... Arguments>
cudaError_t start(cudaKernel_t kernel, unsigned blocks, unsigned threads, Grid grid, Arguments... arguments) {
    void* pointers[] = {&arguments...};
    return cudaLaunchKernel(kernel, {blocks, 1, 1}, {threads, 1, 1}, pointers, 0, grid.stream);
}

const std::string kCopies =
    "#define SNAPSHOTD_EACH_SET(DO)\n#define SNAPSHOTD_EACH_COUNT(DO)\n#include \"kernels.cuh\"\n";

std::string text(int number) {
    return std::to_string(number);
}

cudaKernel_t combine_kernel(const std::string& family, int rows) {
    return kernel_of(family + text(rows),
                     "#define SNAPSHOTD_NO_COPIES\n#define SNAPSHOTD_EACH_SET(DO)\n#define "
                     "SNAPSHOTD_EACH_COUNT(DO) DO(" +
                         text(rows) + ")\n#include \"kernels.cuh\"\n");
}

uint64_t columns_of(int k, int m, uint64_t superblocks) {
    return m == 4 && k > 2 ? columns_in<Half>(superblocks) : columns_in<Wide>(superblocks);
}

}  // namespace

cudaError_t prepare_copies() {
    kernel_of("copy_pieces", kCopies);
    kernel_of("crc32c_blocks", kCopies);
    return cudaSuccess;
}

cudaError_t launch_encode(const Symbols& symbols, int k, int m, uint64_t superblocks, Grid grid) {
    const std::string name = "planes_encode_" + text(k) + "_" + text(m);
    const cudaKernel_t kernel = kernel_of(name, "#define SNAPSHOTD_EACH_K_M(DO) DO(" + text(k) + ", " + text(m) +
                                                    ")\n#define SNAPSHOTD_EACH_ANY(DO)\n#include \"encode.cuh\"\n");
    return start(kernel, grid.blocks(columns_of(k, m, superblocks)), kThreads, grid, symbols, superblocks);
}

cudaError_t launch_encode_any(const ManySymbols& symbols, int m, uint64_t superblocks, Grid grid) {
    const cudaKernel_t kernel =
        kernel_of("planes_encode_any_" + text(m), "#define SNAPSHOTD_EACH_K_M(DO)\n#define SNAPSHOTD_EACH_ANY(DO) DO(" +
                                                      text(m) + ")\n#include \"encode.cuh\"\n");
    return start(kernel, grid.blocks(columns_of(kInputsMax, m, superblocks)), kThreads, grid, symbols, superblocks);
}

cudaError_t launch_decode(const Decoding& job, unsigned rows, uint64_t superblocks, Grid grid) {
    const std::string number = text(static_cast<int>(rows));
    const cudaKernel_t kernel = kernel_of("planes_decode_" + number,
                                          "#define SNAPSHOTD_NO_COPIES\n#define SNAPSHOTD_EACH_COUNT(DO)\n#define "
                                          "SNAPSHOTD_EACH_SET(DO) DO(" +
                                              number + ")\n#include \"kernels.cuh\"\n");
    return start(kernel, grid.blocks(columns_in<Wide>(superblocks)), kThreads, grid, job, superblocks);
}

cudaError_t launch_combine(const Combination& job, int rows, uint64_t superblocks, bool aligned, Grid grid) {
    const cudaKernel_t kernel = combine_kernel(aligned ? "planes_combine_" : "planes_combine_unaligned_", rows);
    const uint64_t columns = aligned ? columns_in<Wide>(superblocks) : columns_in<Narrow>(superblocks);
    return start(kernel, grid.blocks(columns), kThreads, grid, job, superblocks);
}

cudaError_t launch_combine_bytes(const Combination& job, int rows, uint64_t from, uint64_t to, bool aligned,
                                 Grid grid) {
    const uint64_t items = aligned ? (to - from + sizeof(Wide) - 1) / sizeof(Wide) : to - from;
    return start(combine_kernel("bytes_combine_", rows), grid.blocks(items), kThreads, grid, job, from, to,
                 uint32_t{aligned});
}

cudaError_t launch_crc32c(const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs, Grid grid) {
    const uint64_t blocks = bytes / block_bytes + (bytes % block_bytes != 0);
    const bool aligned = (reinterpret_cast<uint64_t>(data) | block_bytes) % sizeof(Wide) == 0;
    const cudaKernel_t kernel = kernel_of(aligned ? "crc32c_blocks" : "crc32c_blocks_unaligned", kCopies);
    return start(kernel, grid.blocks(blocks * kCrcThreads, kCrcThreads), kCrcThreads, grid, data, bytes, block_bytes,
                 crcs);
}

cudaError_t launch_copy_pieces(const Piece* pieces, uint64_t count, uint64_t chunks, Grid grid) {
    return start(kernel_of("copy_pieces", kCopies), grid.blocks(chunks * 256, 256), 256, grid, pieces, count, chunks);
}

}  // namespace snapshotd::gpu

#endif
