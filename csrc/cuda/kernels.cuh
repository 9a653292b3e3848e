// All other kernels as the device knows them. Names say family, then rows: planes_decode_R has the set of used parity
// rows as a number (bit r: row r), the others have a count.
#pragma once

#include "bytes.cuh"
#include "crc32c.cuh"
#include "pieces.cuh"

// NVRTC compiles one family at a time, by other lists of its own.
#ifndef SNAPSHOTD_EACH_SET
#ifdef SNAPSHOTD_FEW
#define SNAPSHOTD_EACH_SET(DO) DO(1) DO(2) DO(6) DO(7)
#else
#define SNAPSHOTD_EACH_SET(DO) \
    DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
#endif
#endif
#ifndef SNAPSHOTD_EACH_COUNT
#define SNAPSHOTD_EACH_COUNT(DO) DO(1) DO(2) DO(3) DO(4)
#endif

#define SNAPSHOTD_DECODE(ROWS)                                                                             \
    extern "C" __global__ void __launch_bounds__(128)                                                      \
        planes_decode_##ROWS(const __grid_constant__ snapshotd::gpu::Decoding job, uint64_t superblocks) { \
        snapshotd::gpu::decode_columns<ROWS>(job, superblocks, snapshotd::gpu::share_of_thread());         \
    }
SNAPSHOTD_EACH_SET(SNAPSHOTD_DECODE)
#undef SNAPSHOTD_DECODE

#define SNAPSHOTD_COMBINE(ROWS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(128)                                                            \
        planes_combine_##ROWS(const __grid_constant__ snapshotd::gpu::Combination job, uint64_t superblocks) {   \
        snapshotd::gpu::combine_columns<ROWS, snapshotd::gpu::Wide>(job, superblocks,                            \
                                                                    snapshotd::gpu::share_of_thread());          \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128) planes_combine_unaligned_##ROWS(                           \
        const __grid_constant__ snapshotd::gpu::Combination job, uint64_t superblocks) {                         \
        snapshotd::gpu::combine_columns<ROWS, snapshotd::gpu::Narrow>(job, superblocks,                          \
                                                                      snapshotd::gpu::share_of_thread());        \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128) bytes_combine_##ROWS(                                      \
        const __grid_constant__ snapshotd::gpu::Combination job, uint64_t from, uint64_t to, uint32_t aligned) { \
        snapshotd::gpu::combine_bytes<ROWS>(job, from, to, aligned != 0, snapshotd::gpu::share_of_thread());     \
    }
SNAPSHOTD_EACH_COUNT(SNAPSHOTD_COMBINE)
#undef SNAPSHOTD_COMBINE

#ifndef SNAPSHOTD_NO_COPIES
extern "C" __global__ void __launch_bounds__(256)
    crc32c_blocks(const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs) {
    snapshotd::gpu::crc32c_of_blocks<true>(data, bytes, block_bytes, crcs);
}

extern "C" __global__ void __launch_bounds__(256)
    crc32c_blocks_unaligned(const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs) {
    snapshotd::gpu::crc32c_of_blocks<false>(data, bytes, block_bytes, crcs);
}

extern "C" __global__ void __launch_bounds__(256)
    copy_pieces(const snapshotd::gpu::Piece* pieces, uint64_t count, uint64_t chunks) {
    for (uint64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        snapshotd::gpu::copy_chunk(pieces, count, chunk, {threadIdx.x, blockDim.x});
    }
}
#endif
