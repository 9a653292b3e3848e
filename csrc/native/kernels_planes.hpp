// The code in planes for any kind of vector. A tier's file defines SNAPSHOTD_TARGET, the attribute that lets its
// functions use the instructions, and then includes this; everything here is that file's own.
//
// `V` has: Vector, kBytes (a divisor of 64), kRowsAtOnce (rows whose planes fit into the registers together), load,
// store, stream (a non-temporal store), add (of two), add3.
#pragma once

#include "gf256.hpp"
#include "kernels.hpp"

#define SNAPSHOTD_INLINE SNAPSHOTD_TARGET __attribute__((always_inline)) static inline

namespace snapshotd {

namespace {

constexpr unsigned lowest_bit(unsigned mask) {
    unsigned bit = 0;
    while (((mask >> bit) & 1) == 0) ++bit;
    return bit;
}

template <typename V>
struct Planes {
    using Vector = typename V::Vector;

    SNAPSHOTD_INLINE void load(Vector* planes, const byte* from) {
#pragma GCC unroll 8
        for (unsigned p = 0; p < 8; ++p) planes[p] = V::load(from + p * kPlaneBytes);
    }

    SNAPSHOTD_INLINE void store(byte* to, const Vector* planes, bool stream) {
        if (stream) {
#pragma GCC unroll 8
            for (unsigned p = 0; p < 8; ++p) V::stream(to + p * kPlaneBytes, planes[p]);
        } else {
#pragma GCC unroll 8
            for (unsigned p = 0; p < 8; ++p) V::store(to + p * kPlaneBytes, planes[p]);
        }
    }

    // --- Horner's rule: q = q * 2^exponent + d. Renaming planes costs nothing, so eight XORs do it.

    template <int exponent>
    SNAPSHOTD_INLINE void step(Vector* q, const Vector* d) {
        if constexpr (exponent == 0) {
#pragma GCC unroll 8
            for (unsigned p = 0; p < 8; ++p) q[p] = V::add(q[p], d[p]);
        } else if constexpr (exponent == 1) {
            const Vector top = q[7];
            q[7] = V::add(q[6], d[7]);
            q[6] = V::add(q[5], d[6]);
            q[5] = V::add(q[4], d[5]);
            q[4] = V::add3(q[3], top, d[4]);
            q[3] = V::add3(q[2], top, d[3]);
            q[2] = V::add3(q[1], top, d[2]);
            q[1] = V::add(q[0], d[1]);
            q[0] = V::add(top, d[0]);
        } else if constexpr (exponent == -1) {
            const Vector bottom = q[0];
            q[0] = V::add(q[1], d[0]);
            q[1] = V::add3(q[2], bottom, d[1]);
            q[2] = V::add3(q[3], bottom, d[2]);
            q[3] = V::add3(q[4], bottom, d[3]);
            q[4] = V::add(q[5], d[4]);
            q[5] = V::add(q[6], d[5]);
            q[6] = V::add(q[7], d[6]);
            q[7] = V::add(bottom, d[7]);
        } else {
            static_assert(exponent == 2);
            const Vector a = q[6], b = q[7], both = V::add(a, b);
            q[7] = V::add(q[5], d[7]);
            q[6] = V::add(q[4], d[6]);
            q[5] = V::add3(q[3], b, d[5]);
            q[4] = V::add3(q[2], both, d[4]);
            q[3] = V::add3(q[1], both, d[3]);
            q[2] = V::add3(q[0], a, d[2]);
            q[1] = V::add(b, d[1]);
            q[0] = V::add(a, d[0]);
        }
    }

    // Row 0 alone: two symbols at a time, since an addition takes three.
    SNAPSHOTD_INLINE void encode_xor(const Terms& terms, size_t at) {
        Vector sum[8], one[8], other[8];
        unsigned i = terms.inputs;
        load(sum, terms.from[--i] + at);
        for (; i >= 2; i -= 2) {
            load(one, terms.from[i - 1] + at);
            load(other, terms.from[i - 2] + at);
#pragma GCC unroll 8
            for (unsigned p = 0; p < 8; ++p) sum[p] = V::add3(sum[p], one[p], other[p]);
        }
        if (i == 1) {
            load(one, terms.from[0] + at);
            step<0>(sum, one);
        }
        store(terms.to[0] + at, sum, terms.stream);
    }

    template <unsigned row>
    SNAPSHOTD_INLINE void encode_row(const Terms& terms, size_t at) {
        if constexpr (row == 0) return encode_xor(terms, at);
        Vector sum[8], data[8];
        load(sum, terms.from[terms.inputs - 1] + at);
        for (unsigned i = terms.inputs - 1; i-- > 0;) {
            load(data, terms.from[i] + at);
            step<kRowExponents[row]>(sum, data);
        }
        store(terms.to[row] + at, sum, terms.stream);
    }

    template <unsigned row>
    SNAPSHOTD_INLINE void encode_two_rows(const Terms& terms, size_t at) {
        Vector sum[8], next[8], data[8];
        load(sum, terms.from[terms.inputs - 1] + at);
#pragma GCC unroll 8
        for (unsigned p = 0; p < 8; ++p) next[p] = sum[p];
        for (unsigned i = terms.inputs - 1; i-- > 0;) {
            load(data, terms.from[i] + at);
            step<kRowExponents[row]>(sum, data);
            step<kRowExponents[row + 1]>(next, data);
        }
        store(terms.to[row] + at, sum, terms.stream);
        store(terms.to[row + 1] + at, next, terms.stream);
    }

    // Rows [row, rows) of one vector's width of a superblock; what is read twice is in the L1 cache.
    template <unsigned rows, unsigned row = 0>
    SNAPSHOTD_INLINE void encode_rows(const Terms& terms, size_t at) {
        if constexpr (V::kRowsAtOnce >= 2 && row + 2 <= rows) {
            encode_two_rows<row>(terms, at);
            encode_rows<rows, row + 2>(terms, at);
        } else if constexpr (row < rows) {
            encode_row<row>(terms, at);
            encode_rows<rows, row + 1>(terms, at);
        }
    }

    template <unsigned rows>
    SNAPSHOTD_TARGET static void encode_of(const Terms& terms, size_t begin, size_t end) {
        for (size_t at = begin; at < end; at += kSuperblockBytes) {
            for (size_t part = 0; part < kPlaneBytes; part += V::kBytes) encode_rows<rows>(terms, at + part);
        }
    }

    SNAPSHOTD_TARGET static void encode(const Terms& terms, size_t begin, size_t end) {
        switch (terms.outputs) {
            case 1:
                return encode_of<1>(terms, begin, end);
            case 2:
                return encode_of<2>(terms, begin, end);
            case 3:
                return encode_of<3>(terms, begin, end);
            default:
                return encode_of<4>(terms, begin, end);
        }
    }

    // --- any coefficient: a network of XORs for each of the 256, chosen by a jump that the processor learns, since
    // the same coefficients come in the same order in every superblock

    template <unsigned planes>
    SNAPSHOTD_INLINE Vector add_planes(Vector sum, const Vector* from) {
        if constexpr (planes == 0) {
            return sum;
        } else {
            constexpr unsigned rest = planes & (planes - 1);
            if constexpr (rest == 0) {
                return V::add(sum, from[lowest_bit(planes)]);
            } else {
                return add_planes<rest&(rest - 1)>(V::add3(sum, from[lowest_bit(planes)], from[lowest_bit(rest)]),
                                                   from);
            }
        }
    }

    template <unsigned factor>
    SNAPSHOTD_INLINE void add_product(Vector* sum, const byte* from) {
        if constexpr (factor != 0) {
            Vector d[8];
            load(d, from);
            sum[0] = add_planes<gf256::kBitMatrices[factor][0]>(sum[0], d);
            sum[1] = add_planes<gf256::kBitMatrices[factor][1]>(sum[1], d);
            sum[2] = add_planes<gf256::kBitMatrices[factor][2]>(sum[2], d);
            sum[3] = add_planes<gf256::kBitMatrices[factor][3]>(sum[3], d);
            sum[4] = add_planes<gf256::kBitMatrices[factor][4]>(sum[4], d);
            sum[5] = add_planes<gf256::kBitMatrices[factor][5]>(sum[5], d);
            sum[6] = add_planes<gf256::kBitMatrices[factor][6]>(sum[6], d);
            sum[7] = add_planes<gf256::kBitMatrices[factor][7]>(sum[7], d);
        }
    }

#define SNAPSHOTD_CASE(f)             \
    case f:                           \
        add_product<(f)>(sum, input); \
        break;
#define SNAPSHOTD_CASES_4(f) SNAPSHOTD_CASE(f) SNAPSHOTD_CASE((f) + 1) SNAPSHOTD_CASE((f) + 2) SNAPSHOTD_CASE((f) + 3)
#define SNAPSHOTD_CASES_16(f) \
    SNAPSHOTD_CASES_4(f) SNAPSHOTD_CASES_4((f) + 4) SNAPSHOTD_CASES_4((f) + 8) SNAPSHOTD_CASES_4((f) + 12)
#define SNAPSHOTD_CASES_64(f) \
    SNAPSHOTD_CASES_16(f) SNAPSHOTD_CASES_16((f) + 16) SNAPSHOTD_CASES_16((f) + 32) SNAPSHOTD_CASES_16((f) + 48)

    SNAPSHOTD_TARGET static void combine(const Terms& terms, size_t begin, size_t end) {
        for (size_t at = begin; at < end; at += kSuperblockBytes) {
            for (unsigned i = 0; i < terms.outputs; ++i) {
                const byte* factors = terms.factors + size_t{i} * terms.inputs;
                for (size_t part = at; part < at + kPlaneBytes; part += V::kBytes) {
                    byte* const output = terms.to[i] + part;
                    Vector sum[8];
                    if (terms.add) {
                        load(sum, output);
                    } else {
#pragma GCC unroll 8
                        for (unsigned p = 0; p < 8; ++p) sum[p] = V::zero();
                    }
                    for (unsigned j = 0; j < terms.inputs; ++j) {
                        const byte* const input = terms.from[j] + part;
                        switch (factors[j]) {
                            SNAPSHOTD_CASES_64(0)
                            SNAPSHOTD_CASES_64(64) SNAPSHOTD_CASES_64(128) SNAPSHOTD_CASES_64(192)
                        }
                    }
                    store(output, sum, terms.stream);
                }
            }
        }
    }

#undef SNAPSHOTD_CASES_64
#undef SNAPSHOTD_CASES_16
#undef SNAPSHOTD_CASES_4
#undef SNAPSHOTD_CASE
};

}  // namespace

}  // namespace snapshotd
