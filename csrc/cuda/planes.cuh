// Erasure code in the layout `planes`: what one thread does for its columns. The same code runs on the host, in
// device_host.cpp.
#pragma once

#include "memory.cuh"

namespace snapshotd::gpu {

// Symbols of a specialised encode: k inputs, m outputs, by value in the launch.
struct Symbols {
    const uint8_t* in[kSpecialisedMax];
    uint8_t* out[kRowsMax];
};

// Any number of inputs. For a decode, in[i] is null where data symbol i is lost.
struct ManySymbols {
    const uint8_t* in[kInputsMax];
    uint8_t* out[kRowsMax];
    uint32_t inputs;
};

// out[r] = (add ? out[r] : 0) + sum of factor[r][i] * in[i]
struct Combination {
    const uint8_t* in[kInputsMax];
    uint8_t* out[kRowsMax];
    uint8_t factor[kRowsMax][kInputsMax];
    uint32_t inputs;
    uint32_t add;
};

// What is lost of k data symbols, from those left and some parity rows. undo[l][j] is the factor of the j-th used row's
// syndrome in the l-th wanted symbol; wanted ones are not more than used rows.
struct Decoding {
    const uint8_t* in[kInputsMax];
    const uint8_t* parity[kRowsMax];  // of the used rows, lowest first
    uint8_t* out[kRowsMax];
    uint8_t undo[kRowsMax][kRowsMax];
    uint32_t inputs;
    uint32_t wanted;
};

// One column of a superblock: word[w][p] is word w of plane p.
template <typename Vector>
struct Column {
    typename Vector::Word word[Vector::words][kPlanes];
};

template <typename Vector>
SNAPSHOTD_FN uint64_t columns_in(uint64_t superblocks) {
    return superblocks * (kPlaneBytes / sizeof(Vector));
}

// Where a column's first plane begins.
template <typename Vector>
SNAPSHOTD_FN uint64_t offset_of(uint64_t column) {
    constexpr uint64_t per_superblock = kPlaneBytes / sizeof(Vector);
    return column / per_superblock * kSuperblockBytes + column % per_superblock * sizeof(Vector);
}

template <typename Vector>
SNAPSHOTD_FN void load_column(Column<Vector>& column, const uint8_t* at) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
        const Vector v = load(reinterpret_cast<const Vector*>(at + p * kPlaneBytes));
#pragma unroll
        for (int w = 0; w < Vector::words; ++w) column.word[w][p] = v.word[w];
    }
}

template <typename Vector>
SNAPSHOTD_FN void store_column(uint8_t* at, const Column<Vector>& column) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
        Vector v;
#pragma unroll
        for (int w = 0; w < Vector::words; ++w) v.word[w] = column.word[w][p];
        store(reinterpret_cast<Vector*>(at + p * kPlaneBytes), v);
    }
}

template <int ROW, typename Vector>
SNAPSHOTD_FN void horner_column(Column<Vector>& a, const Column<Vector>& d) {
#pragma unroll
    for (int w = 0; w < Vector::words; ++w) horner<ROW>(a.word[w], d.word[w]);
}

template <typename Vector>
SNAPSHOTD_FN void clear(Column<Vector>& a) {
#pragma unroll
    for (int w = 0; w < Vector::words; ++w) {
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) a.word[w][p] = 0;
    }
}

// One Horner step of every row in the set ROWS (bit r: row r); sums stand side by side, lowest row first.
template <unsigned ROWS>
SNAPSHOTD_FN constexpr int rows_in() {
    return (ROWS & 1) + (ROWS >> 1 & 1) + (ROWS >> 2 & 1) + (ROWS >> 3 & 1);
}

template <unsigned ROWS, typename Vector>
SNAPSHOTD_FN void horner_rows(Column<Vector> (&sums)[rows_in<ROWS>()], const Column<Vector>& d) {
    constexpr int last = rows_in<ROWS>() - 1;
    constexpr int second = ROWS & 1, third = second + (ROWS >> 1 & 1), fourth = third + (ROWS >> 2 & 1);
    if (ROWS & 1) horner_column<0>(sums[0], d);
    if (ROWS & 2) horner_column<1>(sums[second <= last ? second : 0], d);
    if (ROWS & 4) horner_column<2>(sums[third <= last ? third : 0], d);
    if (ROWS & 8) horner_column<3>(sums[fourth <= last ? fourth : 0], d);
}

// What a thread that keeps the sums of M rows holds of each symbol; ptxas decided where four rows fit.
template <int M, bool LONG = true>
struct VectorFor {
    using Type = Wide;
};
template <>
struct VectorFor<4, true> {
    using Type = Half;
};

// --- encode, k and m known to the compiler: renaming planes costs nothing in an unrolled loop

template <int K, int M>
SNAPSHOTD_FN void encode_columns(const Symbols& symbols, uint64_t superblocks, Share share) {
    using Vector = typename VectorFor<M, (K > 2)>::Type;
    constexpr unsigned rows = (1u << M) - 1;
    for (uint64_t c = share.first; c < columns_in<Vector>(superblocks); c += share.step) {
        const uint64_t at = offset_of<Vector>(c);
        Column<Vector> sums[M];
        load_column(sums[0], symbols.in[K - 1] + at);
#pragma unroll
        for (int r = 1; r < M; ++r) sums[r] = sums[0];
#pragma unroll
        for (int i = K - 2; i >= 0; --i) {
            Column<Vector> d;
            load_column(d, symbols.in[i] + at);
            horner_rows<rows>(sums, d);
        }
#pragma unroll
        for (int r = 0; r < M; ++r) store_column(symbols.out[r] + at, sums[r]);
    }
}

// --- encode of any k

template <int M>
SNAPSHOTD_FN void encode_any_columns(const ManySymbols& symbols, uint64_t superblocks, Share share) {
    using Vector = typename VectorFor<M>::Type;
    constexpr unsigned rows = (1u << M) - 1;
    for (uint64_t c = share.first; c < columns_in<Vector>(superblocks); c += share.step) {
        const uint64_t at = offset_of<Vector>(c);
        Column<Vector> sums[M];
#pragma unroll
        for (int r = 0; r < M; ++r) clear(sums[r]);
#pragma unroll 4
        for (int i = static_cast<int>(symbols.inputs) - 1; i >= 0; --i) {
            Column<Vector> d;
            load_column(d, symbols.in[i] + at);
            horner_rows<rows>(sums, d);
        }
#pragma unroll
        for (int r = 0; r < M; ++r) store_column(symbols.out[r] + at, sums[r]);
    }
}

// --- to += factor * d, for several rows with one doubling of d

template <int ROWS, typename Vector>
SNAPSHOTD_FN void multiply_add(Column<Vector> (&to)[ROWS], Column<Vector> d, const uint32_t (&factor)[ROWS]) {
    using Word = typename Vector::Word;
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Word mask = mask_of<Word>(factor[r], bit);
#pragma unroll
            for (int w = 0; w < Vector::words; ++w) {
#pragma unroll
                for (int p = 0; p < kPlanes; ++p) to[r].word[w][p] ^= d.word[w][p] & mask;
            }
        }
        if (bit < 7) {
#pragma unroll
            for (int w = 0; w < Vector::words; ++w) times_x(d.word[w]);
        }
    }
}

// --- any coefficients: multiply-accumulate, and whatever has no kernel of its own

template <int ROWS, typename Vector>
SNAPSHOTD_FN void combine_columns(const Combination& job, uint64_t superblocks, Share share) {
    for (uint64_t c = share.first; c < columns_in<Vector>(superblocks); c += share.step) {
        const uint64_t at = offset_of<Vector>(c);
        Column<Vector> sums[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (job.add) {
                load_column(sums[r], job.out[r] + at);
            } else {
                clear(sums[r]);
            }
        }
#pragma unroll 1
        for (uint32_t i = 0; i < job.inputs; ++i) {
            Column<Vector> d;
            load_column(d, job.in[i] + at);
            uint32_t factor[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) factor[r] = job.factor[r][i];
            multiply_add<ROWS>(sums, d, factor);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) store_column(job.out[r] + at, sums[r]);
    }
}

// --- decode: syndromes by Horner, as cheap as encoding, and only then the few general products

template <unsigned ROWS>
SNAPSHOTD_FN void decode_columns(const Decoding& job, uint64_t superblocks, Share share) {
    constexpr int used = rows_in<ROWS>();
    for (uint64_t c = share.first; c < columns_in<Wide>(superblocks); c += share.step) {
        const uint64_t at = offset_of<Wide>(c);
        Column<Wide> syndromes[used];
#pragma unroll
        for (int j = 0; j < used; ++j) clear(syndromes[j]);
#pragma unroll 2
        for (int i = static_cast<int>(job.inputs) - 1; i >= 0; --i) {
            Column<Wide> d;
            const uint8_t* from = job.in[i];
            if (from != nullptr) {
                load_column(d, from + at);
            } else {
                clear(d);
            }
            horner_rows<ROWS>(syndromes, d);
        }
#pragma unroll
        for (int j = 0; j < used; ++j) {
            Column<Wide> parity;
            load_column(parity, job.parity[j] + at);
            horner_column<0>(syndromes[j], parity);
        }
#pragma unroll 1
        for (uint32_t l = 0; l < job.wanted; ++l) {
            Column<Wide> sum[1];
            clear(sum[0]);
#pragma unroll
            for (int j = 0; j < used; ++j) {
                const uint32_t factor[1] = {job.undo[l][j]};
                multiply_add<1>(sum, syndromes[j], factor);
            }
            store_column(job.out[l] + at, sum[0]);
        }
    }
}

}  // namespace snapshotd::gpu
