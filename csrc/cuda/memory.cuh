// How a thread loads and stores: streams that are read or written once, past the caches that others need.
#pragma once

#include "field.cuh"

namespace snapshotd::gpu {

// What a thread moves at once: 16 bytes where every pointer allows it (8 where four rows of 16 would not fit into its
// registers), else one.
struct alignas(16) Wide {
    using Word = uint32_t;
    static constexpr int words = 4;
    uint32_t word[4];
};

struct alignas(8) Half {
    using Word = uint32_t;
    static constexpr int words = 2;
    uint32_t word[2];
};

struct Narrow {
    using Word = uint8_t;
    static constexpr int words = 1;
    uint8_t word[1];
};

SNAPSHOTD_FN Wide load(const Wide* from) {
#ifdef __CUDA_ARCH__
    const uint4 v = __ldcs(reinterpret_cast<const uint4*>(from));
    return {{v.x, v.y, v.z, v.w}};
#else
    return *from;
#endif
}

SNAPSHOTD_FN void store(Wide* to, const Wide& v) {
#ifdef __CUDA_ARCH__
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
#else
    *to = v;
#endif
}

SNAPSHOTD_FN Half load(const Half* from) {
#ifdef __CUDA_ARCH__
    const uint2 v = __ldcs(reinterpret_cast<const uint2*>(from));
    return {{v.x, v.y}};
#else
    return *from;
#endif
}

SNAPSHOTD_FN void store(Half* to, const Half& v) {
#ifdef __CUDA_ARCH__
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(v.word[0], v.word[1]));
#else
    *to = v;
#endif
}

// A scalar of 1, 2, 4 or 8 bytes.
template <typename Scalar>
SNAPSHOTD_FN Scalar load(const Scalar* from) {
#ifdef __CUDA_ARCH__
    return __ldcs(from);
#else
    return *from;
#endif
}

template <typename Scalar>
SNAPSHOTD_FN void store(Scalar* to, Scalar v) {
#ifdef __CUDA_ARCH__
    __stcs(to, v);
#else
    *to = v;
#endif
}

SNAPSHOTD_FN Narrow load(const Narrow* from) {
    return {{load(from->word)}};
}

SNAPSHOTD_FN void store(Narrow* to, const Narrow& v) {
    store(to->word, v.word[0]);
}

// The share of one thread in a loop: first, first + step, first + 2 * step, ...
struct Share {
    uint64_t first, step;
};

#ifdef __CUDACC__
__device__ __forceinline__ Share share_of_thread() {
    return {uint64_t{blockIdx.x} * blockDim.x + threadIdx.x, uint64_t{gridDim.x} * blockDim.x};
}
#endif

}  // namespace snapshotd::gpu
