// The code in bytes for any kind of vector; included as kernels_planes.hpp is.
//
// `V` has: Vector, kBytes, load, store, add, zero; Operand, a vector made ready for products (`operand`); Factor, a
// coefficient made ready (`factor`); add_product(sum, operand, factor).
#pragma once

#include "gf256.hpp"
#include "kernels.hpp"

#ifndef SNAPSHOTD_INLINE
#define SNAPSHOTD_INLINE SNAPSHOTD_TARGET __attribute__((always_inline)) static inline
#endif

namespace snapshotd {

namespace {

template <typename V>
struct ByteKernels {
    using Vector = typename V::Vector;
    static constexpr unsigned kRows = 4;  // outputs at once: what is read is made ready once for all of them

    // `rows` outputs from `row` on, `width` vectors at `at`.
    template <unsigned rows, unsigned width>
    SNAPSHOTD_INLINE void columns(const Terms& terms, unsigned row, size_t at) {
        Vector sum[rows][width];
#pragma GCC unroll 4
        for (unsigned r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (unsigned w = 0; w < width; ++w) {
                sum[r][w] = terms.add ? V::load(terms.to[row + r] + at + w * V::kBytes) : V::zero();
            }
        }
        const byte* factors = terms.factors + size_t{row} * terms.inputs;
        for (unsigned j = 0; j < terms.inputs; ++j) {
            typename V::Operand operands[width];
#pragma GCC unroll 4
            for (unsigned w = 0; w < width; ++w) {
                operands[w] = V::operand(V::load(terms.from[j] + at + w * V::kBytes));
            }
#pragma GCC unroll 4
            for (unsigned r = 0; r < rows; ++r) {
                const typename V::Factor factor = V::factor(factors[size_t{r} * terms.inputs + j]);
#pragma GCC unroll 4
                for (unsigned w = 0; w < width; ++w) sum[r][w] = V::add_product(sum[r][w], operands[w], factor);
            }
        }
#pragma GCC unroll 4
        for (unsigned r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (unsigned w = 0; w < width; ++w) V::store(terms.to[row + r] + at + w * V::kBytes, sum[r][w]);
        }
    }

    template <unsigned rows>
    SNAPSHOTD_TARGET static void rows_from(const Terms& terms, unsigned row, size_t begin, size_t end) {
        size_t at = begin;
        for (; at + 2 * V::kBytes <= end; at += 2 * V::kBytes) columns<rows, 2>(terms, row, at);
        for (; at + V::kBytes <= end; at += V::kBytes) columns<rows, 1>(terms, row, at);
    }

    // What is left behind the last whole vector goes by the base tier.
    SNAPSHOTD_TARGET static void combine(const Terms& terms, size_t begin, size_t end) {
        const size_t whole = begin + (end - begin) / V::kBytes * V::kBytes;
        unsigned row = 0;
        for (; row + 4 <= terms.outputs; row += 4) rows_from<4>(terms, row, begin, whole);
        for (; row + 2 <= terms.outputs; row += 2) rows_from<2>(terms, row, begin, whole);
        for (; row < terms.outputs; ++row) rows_from<1>(terms, row, begin, whole);
        if (whole < end) kErasureBase.combine_bytes(terms, whole, end);
    }
};

}  // namespace

}  // namespace snapshotd
