// The CUDA runtime where no nvcc linked it in: found when it is first called, in what torch or pip brought along.
#ifdef SNAPSHOTD_NVRTC

#include <dlfcn.h>

#include <mutex>
#include <string>
#include <vector>

#include "folders.hpp"
#include "runtime.hpp"

namespace snapshotd::gpu {

std::vector<std::string>& library_folders() {
    static std::vector<std::string> folders;
    return folders;
}

void* load_library(const char* name) {
    for (const char* major : {"13", "12"}) {
        const std::string file = std::string(name) + ".so." + major;
        if (void* found = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) return found;
        for (const std::string& folder : library_folders()) {
            if (void* found = dlopen((folder + "/" + file).c_str(), RTLD_NOW | RTLD_LOCAL)) return found;
        }
    }
    return nullptr;
}

namespace {

void* find(const char* name) {
    static void* library = load_library("libcudart");
    return library == nullptr ? nullptr : dlsym(library, name);
}

}  // namespace

// What the library lacks, or where there is none, is an error as if the runtime had said it.
#define SNAPSHOTD_LATE(NAME, PARAMETERS, ARGUMENTS)                                   \
    cudaError_t NAME PARAMETERS {                                                     \
        static auto* call = reinterpret_cast<cudaError_t(*) PARAMETERS>(find(#NAME)); \
        return call == nullptr ? cudaErrorSharedObjectInitFailed : call ARGUMENTS;    \
    }

SNAPSHOTD_LATE(cudaGetDevice, (int* a), (a))
SNAPSHOTD_LATE(cudaSetDevice, (int a), (a))
SNAPSHOTD_LATE(cudaDeviceGetAttribute, (int* a, int b, int c), (a, b, c))
SNAPSHOTD_LATE(cudaGetDeviceCount, (int* a), (a))
SNAPSHOTD_LATE(cudaMalloc, (void** a, size_t b), (a, b))
SNAPSHOTD_LATE(cudaFree, (void* a), (a))
SNAPSHOTD_LATE(cudaHostRegister, (void* a, size_t b, unsigned c), (a, b, c))
SNAPSHOTD_LATE(cudaHostUnregister, (void* a), (a))
SNAPSHOTD_LATE(cudaStreamCreateWithFlags, (cudaStream_t * a, unsigned b), (a, b))
SNAPSHOTD_LATE(cudaStreamDestroy, (cudaStream_t a), (a))
SNAPSHOTD_LATE(cudaStreamSynchronize, (cudaStream_t a), (a))
SNAPSHOTD_LATE(cudaStreamWaitEvent, (cudaStream_t a, cudaEvent_t b, unsigned c), (a, b, c))
SNAPSHOTD_LATE(cudaEventCreateWithFlags, (cudaEvent_t * a, unsigned b), (a, b))
SNAPSHOTD_LATE(cudaEventDestroy, (cudaEvent_t a), (a))
SNAPSHOTD_LATE(cudaEventRecord, (cudaEvent_t a, cudaStream_t b), (a, b))
SNAPSHOTD_LATE(cudaEventQuery, (cudaEvent_t a), (a))
SNAPSHOTD_LATE(cudaEventSynchronize, (cudaEvent_t a), (a))
SNAPSHOTD_LATE(cudaMemcpyAsync, (void* a, const void* b, size_t c, int d, cudaStream_t e), (a, b, c, d, e))
SNAPSHOTD_LATE(cudaLaunchHostFunc, (cudaStream_t a, cudaHostFn_t b, void* c), (a, b, c))
SNAPSHOTD_LATE(cudaPointerGetAttributes, (cudaPointerAttributes * a, const void* b), (a, b))
SNAPSHOTD_LATE(cudaLaunchKernel, (const void* a, dim3 b, dim3 c, void** d, size_t e, cudaStream_t f),
               (a, b, c, d, e, f))
SNAPSHOTD_LATE(cudaLibraryLoadData,
               (cudaLibrary_t * a, const void* b, void* c, void** d, unsigned e, void* f, void** g, unsigned h),
               (a, b, c, d, e, f, g, h))
SNAPSHOTD_LATE(cudaLibraryGetKernel, (cudaKernel_t * a, cudaLibrary_t b, const char* c), (a, b, c))
SNAPSHOTD_LATE(cudaGetLastError, (), ())

#undef SNAPSHOTD_LATE

const char* cudaGetErrorName(cudaError_t error) {
    static auto* call = reinterpret_cast<const char* (*)(cudaError_t)>(find("cudaGetErrorName"));
    return call == nullptr ? "cudaErrorSharedObjectInitFailed" : call(error);
}

const char* cudaGetErrorString(cudaError_t error) {
    static auto* call = reinterpret_cast<const char* (*)(cudaError_t)>(find("cudaGetErrorString"));
    if (call != nullptr && error != cudaErrorSharedObjectInitFailed) return call(error);
    return "the CUDA runtime (libcudart of CUDA 12.8 or later) is not installed here: pip install 'snapshotd[cuda]'";
}

}  // namespace snapshotd::gpu

#endif
