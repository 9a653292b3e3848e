// What the .cu files offer the C++ around them: one function for each family of kernels. A launch only enqueues; its
// error, if any, is the return value (a cudaError_t).
#pragma once

#include "bytes.cuh"
#include "crc32c.cuh"
#include "pieces.cuh"
#include "runtime.hpp"

namespace snapshotd::gpu {

constexpr int kThreads = 128;  // for each block of the codec's kernels: they keep up to 200 registers each

struct Grid {
    int multiprocessors;
    cudaStream_t stream;

    // Enough blocks for `items` threads, but no more than fill the device: the kernels loop over what is left.
    unsigned blocks(uint64_t items, int threads = kThreads) const {
        const uint64_t wanted = (items + threads - 1) / threads;
        const uint64_t most = static_cast<uint64_t>(multiprocessors) * 8;
        return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
    }
};

// Have the kernels of a snapshot's copy ready: nothing to do where nvcc compiled them.
cudaError_t prepare_copies();
// Pointers are multiples of 16, 1 <= k <= 16, 1 <= m <= 4.
cudaError_t launch_encode(const Symbols& symbols, int k, int m, uint64_t superblocks, Grid grid);
// The same for any k.
cudaError_t launch_encode_any(const ManySymbols& symbols, int m, uint64_t superblocks, Grid grid);
// `rows` is the set of used parity rows, bit r for row r; pointers are multiples of 16.
cudaError_t launch_decode(const Decoding& job, unsigned rows, uint64_t superblocks, Grid grid);
// 1 to 4 output rows.
cudaError_t launch_combine(const Combination& job, int rows, uint64_t superblocks, bool aligned, Grid grid);
cudaError_t launch_combine_bytes(const Combination& job, int rows, uint64_t from, uint64_t to, bool aligned, Grid grid);
cudaError_t launch_crc32c(const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs, Grid grid);
// `pieces` lies in device memory; `chunks` is the number of chunks of all of them.
cudaError_t launch_copy_pieces(const Piece* pieces, uint64_t count, uint64_t chunks, Grid grid);

}  // namespace snapshotd::gpu
