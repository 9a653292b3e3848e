// The coefficients of the erasure code: what a parity row takes of each data symbol, and how what is lost follows from
// what is left.
//
// Symbols are numbered: 0 .. k-1 are data, k .. k+m-1 parity rows. Up to three parity rows, and four over at most 21
// data symbols, are powers of two (layout.hpp); every other code is a Cauchy matrix (Bloemer et al. 1995, Plank 2006),
// its columns and then its rows scaled so that the first row and the first column are all ones, which keeps every
// square part regular. So in all codes parity row 0 is plain XOR, every row of k = 1 is a replica, and any k symbols
// give all the others (MDS). A coefficient depends on the layout, its row and its column only: data symbols that are
// all zero, left away, change no parity.
#pragma once

#include <vector>

#include "layout.hpp"

namespace snapshotd {

constexpr unsigned kSymbolsMax = 255;

class Matrix {
  public:
    Matrix(unsigned rows, unsigned columns) : rows_(rows), columns_(columns), values_(size_t{rows} * columns) {}

    unsigned rows() const { return rows_; }
    unsigned columns() const { return columns_; }
    byte* operator[](unsigned row) { return values_.data() + size_t{row} * columns_; }
    const byte* operator[](unsigned row) const { return values_.data() + size_t{row} * columns_; }

  private:
    unsigned rows_, columns_;
    std::vector<byte> values_;
};

// A code that exists. std::invalid_argument, with the values, unless k >= 1 and k + m <= kSymbolsMax.
struct Code {
    Code(uint64_t data_symbols, uint64_t parity_rows);
    // In a layout other than the code's own: `bytes` knows every code, `planes` those that planes_can() names.
    Code(uint64_t data_symbols, uint64_t parity_rows, Layout layout);

    unsigned k, m;
    Layout layout;
};

// What a parity row takes of a data symbol.
byte coefficient(Layout layout, unsigned row, unsigned column);

// m rows of k.
Matrix coefficients(Code code);

// For each wanted symbol its k coefficients over the symbols in `have`, in that order; a wanted one may stand there.
// std::invalid_argument unless `have` are exactly k symbols, and in each list all exist and none is repeated.
Matrix recovery(Code code, const std::vector<uint64_t>& have, const std::vector<uint64_t>& want);

}  // namespace snapshotd
