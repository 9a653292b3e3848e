// Kernels that are wrong on purpose, one bug each, and two that are not: what the simulator has to say of them stands
// in test_simulator.py.
#include <cuda_runtime.h>

#include <cstdint>

__global__ void reads_behind_its_end(const uint32_t* in, uint32_t* out) {
    out[threadIdx.x] = in[threadIdx.x + 1];
}
__global__ void writes_behind_its_end(const uint32_t* in, uint32_t* out) {
    out[threadIdx.x + 1] = in[threadIdx.x];
}
__global__ void reads_far_away(const uint32_t* in, uint32_t* out) {
    out[threadIdx.x] = in[threadIdx.x + (1 << 24)];
}
__global__ void is_not_aligned(const uint32_t* in, uint32_t* out) {
    out[threadIdx.x] = *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(in) + 2);
}
__global__ void reads_what_nobody_wrote(const uint32_t* in, uint32_t* out) {
    out[0] = in[0] + out[1];
}
__global__ void reads_shared_that_nobody_wrote(const uint32_t* in, uint32_t* out) {
    __shared__ uint32_t room[64];
    if (threadIdx.x < 32) room[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = room[threadIdx.x];
}
__global__ void runs_over_shared(const uint32_t* in, uint32_t* out) {
    __shared__ uint32_t room[64];
    room[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = room[threadIdx.x + in[0] % 2 + 1];
}
__global__ void races_in_shared(const uint32_t* in, uint32_t* out) {
    __shared__ uint32_t room[64];
    room[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = room[63 - threadIdx.x];
}
__global__ void races_in_global(const uint32_t* in, uint32_t* out) {
    out[0] = in[threadIdx.x];
}
__global__ void races_across_blocks(const uint32_t* in, uint32_t* out) {
    out[threadIdx.x] = in[blockIdx.x];
}
__global__ void adds_without_atomics(const uint32_t* in, uint32_t* out) {
    if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = 0;
    out[0] += in[threadIdx.x];
}
__global__ void waits_in_a_branch(const uint32_t* in, uint32_t* out) {
    if (threadIdx.x % 2 == 0) {
        __syncthreads();
        out[threadIdx.x] = in[0];
    } else {
        out[threadIdx.x] = in[1];
        __syncthreads();
    }
}
__global__ void leaves_before_a_barrier(const uint32_t* in, uint32_t* out) {
    if (threadIdx.x == 3) return;
    __syncthreads();
    out[threadIdx.x] = in[0];
}
__global__ void shuffles_outside_its_mask(const uint32_t* in, uint32_t* out) {
    if (threadIdx.x < 8) out[threadIdx.x] = __shfl_down_sync(0xFFu, in[threadIdx.x], 4, 32);
}
__global__ void waits_for_lanes_that_left(const uint32_t* in, uint32_t* out) {
    if (threadIdx.x >= 16) return;
    out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, in[threadIdx.x], 1);
}
__global__ void divides_by_zero(const uint32_t* in, uint32_t* out) {
    out[threadIdx.x] = in[0] / (in[1] - 2);
}
__global__ void computes_with_floats(const uint32_t* in, uint32_t* out) {
    out[threadIdx.x] = static_cast<uint32_t>(static_cast<float>(in[threadIdx.x]) * 1.5f);
}
__global__ void traps(const uint32_t* in, uint32_t* out) {
    if (in[0] == 1) __trap();
    out[threadIdx.x + 64 * blockIdx.x] = 0;
}
__global__ void is_right(const uint32_t* in, uint32_t* out) {
    __shared__ uint32_t room[64];
    room[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    uint32_t sum = room[63 - threadIdx.x];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    const uint32_t votes = __ballot_sync(0xFFFFFFFFu, in[threadIdx.x] & 1);
    out[threadIdx.x + 64 * blockIdx.x] = sum + votes;
}
__global__ void counts_with_atomics(const uint32_t* in, uint32_t* out) {
    __shared__ uint32_t sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, in[threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

using Kernel = void (*)(const uint32_t*, uint32_t*);
constexpr Kernel kKernels[] = {reads_behind_its_end,
                               writes_behind_its_end,
                               reads_far_away,
                               is_not_aligned,
                               reads_what_nobody_wrote,
                               reads_shared_that_nobody_wrote,
                               runs_over_shared,
                               races_in_shared,
                               races_in_global,
                               races_across_blocks,
                               adds_without_atomics,
                               waits_in_a_branch,
                               leaves_before_a_barrier,
                               shuffles_outside_its_mask,
                               waits_for_lanes_that_left,
                               divides_by_zero,
                               computes_with_floats,
                               traps,
                               is_right,
                               counts_with_atomics};

// Two blocks of 64 threads over 64 words; 128 words come back.
extern "C" __attribute__((visibility("default"))) int run(int which, const uint32_t* in, uint32_t* out) {
    uint32_t *from, *to;
    cudaMalloc(&from, 64 * sizeof(uint32_t));
    cudaMalloc(&to, 128 * sizeof(uint32_t));
    cudaMemcpyAsync(from, in, 64 * sizeof(uint32_t), cudaMemcpyHostToDevice, 0);
    kKernels[which]<<<2, 64>>>(from, which == 1 ? to + 64 : to);
    cudaMemcpyAsync(out, to, 128 * sizeof(uint32_t), cudaMemcpyDeviceToHost, 0);
    const int error = cudaStreamSynchronize(0);
    cudaFree(from);
    cudaFree(to);
    return error;
}
