// The CUDA runtime: its own header where nvcc builds us; else (SNAPSHOTD_NVRTC) what we use of it, declared here and
// looked up in libcudart when it is first called (runtime_late.cpp). The numbers are part of its ABI.
#pragma once

#ifndef SNAPSHOTD_NVRTC
#include <cuda_runtime_api.h>
#else

#include <cstddef>

#define CUDART_CB

namespace snapshotd::gpu {

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorSharedObjectInitFailed = 303,
    cudaErrorNotReady = 600,
    cudaErrorUnknown = 999
};
enum cudaMemoryType { cudaMemoryTypeHost = 1, cudaMemoryTypeDevice = 2, cudaMemoryTypeManaged = 3 };
constexpr unsigned cudaHostRegisterPortable = 1, cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;
constexpr int cudaDevAttrMultiProcessorCount = 16, cudaMemcpyDefault = 4;

using cudaStream_t = struct RuntimeStream*;
using cudaEvent_t = struct RuntimeEvent*;
using cudaLibrary_t = struct RuntimeLibrary*;
using cudaKernel_t = struct RuntimeKernel*;
using cudaHostFn_t = void (*)(void*);

struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
    void *on_device, *on_host;
    long reserved[8];
};

struct dim3 {
    unsigned x, y, z;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaDeviceGetAttribute(int*, int attribute, int device);
cudaError_t cudaMalloc(void**, size_t);
cudaError_t cudaFree(void*);
cudaError_t cudaHostRegister(void*, size_t, unsigned flags);
cudaError_t cudaHostUnregister(void*);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t);
cudaError_t cudaEventQuery(cudaEvent_t);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaMemcpyAsync(void*, const void*, size_t, int kind, cudaStream_t);
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t, void*);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes*, const void*);
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t);
cudaError_t cudaLibraryLoadData(cudaLibrary_t*, const void* code, void*, void**, unsigned, void*, void**, unsigned);
cudaError_t cudaLibraryGetKernel(cudaKernel_t*, cudaLibrary_t, const char* name);

// A library of this name, loaded already or found in these folders; null where it is nowhere. Kept for ever.
void* load_library(const char* name);

}  // namespace snapshotd::gpu

#endif
