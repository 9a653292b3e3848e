#include "kernels.cuh"
#include "launch.hpp"

namespace snapshotd::gpu {

namespace {

using Decode = void (*)(Decoding, uint64_t);
using Combine = void (*)(Combination, uint64_t);
using CombineBytes = void (*)(Combination, uint64_t, uint64_t, uint32_t);

Decode decode_of(unsigned rows) {
#define SNAPSHOTD_PICK(ROWS) \
    if (rows == ROWS) return planes_decode_##ROWS;
    SNAPSHOTD_EACH_SET(SNAPSHOTD_PICK)
#undef SNAPSHOTD_PICK
    return nullptr;
}

constexpr Combine kCombine[kRowsMax] = {planes_combine_1, planes_combine_2, planes_combine_3, planes_combine_4};
constexpr Combine kCombineUnaligned[kRowsMax] = {planes_combine_unaligned_1, planes_combine_unaligned_2,
                                                 planes_combine_unaligned_3, planes_combine_unaligned_4};
constexpr CombineBytes kCombineBytes[kRowsMax] = {bytes_combine_1, bytes_combine_2, bytes_combine_3, bytes_combine_4};

}  // namespace

cudaError_t prepare_copies() {
    return cudaSuccess;
}

cudaError_t launch_decode(const Decoding& job, unsigned rows, uint64_t superblocks, Grid grid) {
    Decode kernel = decode_of(rows);
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    kernel<<<grid.blocks(columns_in<Wide>(superblocks)), kThreads, 0, grid.stream>>>(job, superblocks);
    return cudaGetLastError();
}

cudaError_t launch_combine(const Combination& job, int rows, uint64_t superblocks, bool aligned, Grid grid) {
    Combine kernel = (aligned ? kCombine : kCombineUnaligned)[rows - 1];
    const uint64_t columns = aligned ? columns_in<Wide>(superblocks) : columns_in<Narrow>(superblocks);
    kernel<<<grid.blocks(columns), kThreads, 0, grid.stream>>>(job, superblocks);
    return cudaGetLastError();
}

cudaError_t launch_combine_bytes(const Combination& job, int rows, uint64_t from, uint64_t to, bool aligned,
                                 Grid grid) {
    CombineBytes kernel = kCombineBytes[rows - 1];
    const uint64_t items = aligned ? (to - from + sizeof(Wide) - 1) / sizeof(Wide) : to - from;
    kernel<<<grid.blocks(items), kThreads, 0, grid.stream>>>(job, from, to, aligned ? 1 : 0);
    return cudaGetLastError();
}

cudaError_t launch_crc32c(const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs, Grid grid) {
    const uint64_t blocks = bytes / block_bytes + (bytes % block_bytes != 0);
    const bool aligned = (reinterpret_cast<uint64_t>(data) | block_bytes) % sizeof(Wide) == 0;
    auto kernel = aligned ? crc32c_blocks : crc32c_blocks_unaligned;
    kernel<<<grid.blocks(blocks * kCrcThreads, kCrcThreads), kCrcThreads, 0, grid.stream>>>(data, bytes, block_bytes,
                                                                                            crcs);
    return cudaGetLastError();
}

cudaError_t launch_copy_pieces(const Piece* pieces, uint64_t count, uint64_t chunks, Grid grid) {
    copy_pieces<<<grid.blocks(chunks * 256, 256), 256, 0, grid.stream>>>(pieces, count, chunks);
    return cudaGetLastError();
}

}  // namespace snapshotd::gpu
