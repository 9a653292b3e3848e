// Erasure code in the layout `bytes`: every byte is a field element. The layout of codes beyond `planes`, and of the
// last bytes of a symbol whose length is no multiple of 512.
#pragma once

#include "planes.cuh"

namespace snapshotd::gpu {

template <int ROWS, typename Vector>
SNAPSHOTD_FN void combine_bytes_at(const Combination& job, uint64_t at) {
    Vector sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (job.add) {
            sums[r] = load(reinterpret_cast<const Vector*>(job.out[r] + at));
        } else {
#pragma unroll
            for (int w = 0; w < Vector::words; ++w) sums[r].word[w] = 0;
        }
    }
#pragma unroll 1
    for (uint32_t i = 0; i < job.inputs; ++i) {
        Vector d = load(reinterpret_cast<const Vector*>(job.in[i] + at));
#pragma unroll
        for (int bit = 0; bit < 8; ++bit) {
#pragma unroll
            for (int w = 0; w < Vector::words; ++w) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    sums[r].word[w] ^= d.word[w] & mask_of<typename Vector::Word>(job.factor[r][i], bit);
                }
                if (bit < 7) d.word[w] = static_cast<typename Vector::Word>(bytes_times_x(d.word[w]));
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) store(reinterpret_cast<Vector*>(job.out[r] + at), sums[r]);
}

// The bytes [from, to) of every symbol; `aligned`: all pointers, and `from`, are multiples of 16.
template <int ROWS>
SNAPSHOTD_FN void combine_bytes(const Combination& job, uint64_t from, uint64_t to, bool aligned, Share share) {
    const uint64_t wide = aligned ? (to - from) / sizeof(Wide) : 0;
    for (uint64_t v = share.first; v < wide; v += share.step) {
        combine_bytes_at<ROWS, Wide>(job, from + v * sizeof(Wide));
    }
    for (uint64_t at = from + wide * sizeof(Wide) + share.first; at < to; at += share.step) {
        combine_bytes_at<ROWS, Narrow>(job, at);
    }
}

}  // namespace snapshotd::gpu
