#include "encode.cuh"
#include "launch.hpp"

namespace snapshotd::gpu {

namespace {

using Encode = void (*)(Symbols, uint64_t);
using EncodeAny = void (*)(ManySymbols, uint64_t);

Encode encode_of(int k, int m) {
#define SNAPSHOTD_PICK(K, M) \
    if (k == K && m == M) return planes_encode_##K##_##M;
    SNAPSHOTD_EACH_K_M(SNAPSHOTD_PICK)
#undef SNAPSHOTD_PICK
    return nullptr;
}

constexpr EncodeAny kEncodeAny[kRowsMax] = {planes_encode_any_1, planes_encode_any_2, planes_encode_any_3,
                                            planes_encode_any_4};

uint64_t columns_of(int k, int m, uint64_t superblocks) {
    return m == 4 && k > 2 ? columns_in<Half>(superblocks) : columns_in<Wide>(superblocks);
}

}  // namespace

cudaError_t launch_encode(const Symbols& symbols, int k, int m, uint64_t superblocks, Grid grid) {
    Encode kernel = encode_of(k, m);
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    kernel<<<grid.blocks(columns_of(k, m, superblocks)), kThreads, 0, grid.stream>>>(symbols, superblocks);
    return cudaGetLastError();
}

cudaError_t launch_encode_any(const ManySymbols& symbols, int m, uint64_t superblocks, Grid grid) {
    EncodeAny kernel = kEncodeAny[m - 1];
    kernel<<<grid.blocks(columns_of(kInputsMax, m, superblocks)), kThreads, 0, grid.stream>>>(symbols, superblocks);
    return cudaGetLastError();
}

}  // namespace snapshotd::gpu
