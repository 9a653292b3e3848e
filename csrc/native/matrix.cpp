#include "matrix.hpp"

#include <algorithm>

#include "gf256.hpp"

namespace snapshotd {

namespace {

using gf256::inverse;
using gf256::multiply;

void multiply_row(byte* row, unsigned columns, byte factor) {
    for (unsigned i = 0; i < columns; ++i) row[i] = multiply(row[i], factor);
}

void add_multiple(byte* to, const byte* from, unsigned columns, byte factor) {
    if (factor == 0) return;
    for (unsigned i = 0; i < columns; ++i) to[i] ^= multiply(from[i], factor);
}

// Of a part of the coefficients. Every square part of them is regular, so no pivot ever is 0 and no rows are swapped.
Matrix inverted(Matrix square) {
    const unsigned n = square.rows();
    Matrix result(n, n);
    for (unsigned i = 0; i < n; ++i) result[i][i] = 1;
    for (unsigned pivot = 0; pivot < n; ++pivot) {
        if (square[pivot][pivot] == 0) {
            throw std::logic_error("a square part of the code's coefficients is singular at pivot " +
                                   std::to_string(pivot) + ": these symbols do not give the others");
        }
        byte scale = inverse(square[pivot][pivot]);
        multiply_row(square[pivot], n, scale);
        multiply_row(result[pivot], n, scale);
        for (unsigned row = 0; row < n; ++row) {
            if (row == pivot) continue;
            byte factor = square[row][pivot];
            add_multiple(square[row], square[pivot], n, factor);
            add_multiple(result[row], result[pivot], n, factor);
        }
    }
    return result;
}

// Row i of the Cauchy matrix stands for the element 255 - i, column j for j: disjoint as long as i + j < 255. An
// element of it is 1 / (their sum).
byte cauchy(unsigned row, unsigned column) {
    auto sum = [](unsigned i, unsigned j) { return static_cast<byte>((255 - i) ^ j); };
    byte by_column = multiply(sum(0, column), inverse(sum(row, column)));
    byte by_row = multiply(sum(row, 0), inverse(sum(0, 0)));
    return multiply(by_column, by_row);
}

std::string listed(const std::vector<uint64_t>& symbols) {
    std::string text;
    for (uint64_t symbol : symbols) text += (text.empty() ? "" : ", ") + std::to_string(symbol);
    return "[" + text + "]";
}

std::string named(Code code) {
    return "k=" + std::to_string(code.k) + ", m=" + std::to_string(code.m);
}

void check_symbols(Code code, const std::vector<uint64_t>& symbols, const char* what) {
    std::vector<bool> seen(code.k + code.m);
    for (uint64_t symbol : symbols) {
        if (symbol >= seen.size()) {
            throw std::invalid_argument(std::string(what) + " " + listed(symbols) + ": there is no symbol " +
                                        std::to_string(symbol) + " in a code of " + named(code));
        }
        if (seen[symbol]) {
            throw std::invalid_argument(std::string(what) + " " + listed(symbols) + ": symbol " +
                                        std::to_string(symbol) + " is repeated");
        }
        seen[symbol] = true;
    }
}

struct Part {
    unsigned symbol, position;  // its place in `have`
};

// Every data symbol over those in `have`. What is lost of the data follows from as many parity rows: take from each
// what the data that is there gave to it, then undo the square of coefficients that is left.
Matrix data_over(Code code, const std::vector<uint64_t>& have) {
    std::vector<Part> present, parity;
    std::vector<bool> there(code.k);
    for (unsigned i = 0; i < code.k; ++i) {
        auto symbol = static_cast<unsigned>(have[i]);
        (symbol < code.k ? present : parity).push_back({symbol, i});
        if (symbol < code.k) there[symbol] = true;
    }
    std::vector<unsigned> lost;
    for (unsigned symbol = 0; symbol < code.k; ++symbol) {
        if (!there[symbol]) lost.push_back(symbol);
    }
    const auto losses = static_cast<unsigned>(lost.size());  // as many as parity rows, since k symbols are there
    Matrix square(losses, losses);
    for (unsigned i = 0; i < losses; ++i) {
        for (unsigned j = 0; j < losses; ++j)
            square[i][j] = coefficient(code.layout, parity[i].symbol - code.k, lost[j]);
    }
    const Matrix undo = inverted(std::move(square));

    Matrix over(code.k, code.k);
    for (const Part& data : present) over[data.symbol][data.position] = 1;
    for (unsigned i = 0; i < losses; ++i) {
        byte* row = over[lost[i]];
        for (unsigned j = 0; j < losses; ++j) {
            row[parity[j].position] = undo[i][j];
            for (const Part& data : present) {
                byte taken = coefficient(code.layout, parity[j].symbol - code.k, data.symbol);
                row[data.position] ^= multiply(undo[i][j], taken);
            }
        }
    }
    return over;
}

}  // namespace

Code::Code(uint64_t data_symbols, uint64_t parity_rows) {
    if (data_symbols < 1 || data_symbols > kSymbolsMax || parity_rows > kSymbolsMax - data_symbols) {
        throw std::invalid_argument("there is no code of k=" + std::to_string(data_symbols) +
                                    ", m=" + std::to_string(parity_rows) + ": k is at least 1 and k + m at most " +
                                    std::to_string(kSymbolsMax));
    }
    k = static_cast<unsigned>(data_symbols);
    m = static_cast<unsigned>(parity_rows);
    layout = planes_can(k, m) ? Layout::planes : Layout::bytes;
}

Code::Code(uint64_t data_symbols, uint64_t parity_rows, Layout wanted) : Code(data_symbols, parity_rows) {
    if (wanted == Layout::planes && !planes_can(k, m)) {
        throw std::invalid_argument("there is no code of " + named(*this) +
                                    " in planes: these have at most 3 parity rows, or 4 over at most " +
                                    std::to_string(kFourRowsColumnsMax) + " data symbols");
    }
    layout = wanted;
}

byte coefficient(Layout layout, unsigned row, unsigned column) {
    return layout == Layout::planes ? gf256::power_of_two(kRowExponents[row] * static_cast<int>(column))
                                    : cauchy(row, column);
}

Matrix coefficients(Code code) {
    Matrix rows(code.m, code.k);
    for (unsigned row = 0; row < code.m; ++row) {
        for (unsigned column = 0; column < code.k; ++column) rows[row][column] = coefficient(code.layout, row, column);
    }
    return rows;
}

Matrix recovery(Code code, const std::vector<uint64_t>& have, const std::vector<uint64_t>& want) {
    check_symbols(code, have, "have");
    check_symbols(code, want, "want");
    if (have.size() != code.k) {
        throw std::invalid_argument("have " + listed(have) + ": a code of " + named(code) + " is recovered from " +
                                    std::to_string(code.k) + " symbols, not " + std::to_string(have.size()));
    }
    const Matrix data = data_over(code, have);
    Matrix rows(static_cast<unsigned>(want.size()), code.k);
    for (unsigned i = 0; i < rows.rows(); ++i) {
        auto symbol = static_cast<unsigned>(want[i]);
        if (symbol < code.k) {
            std::copy_n(data[symbol], code.k, rows[i]);
            continue;
        }
        for (unsigned column = 0; column < code.k; ++column) {
            add_multiple(rows[i], data[column], code.k, coefficient(code.layout, symbol - code.k, column));
        }
    }
    return rows;
}

}  // namespace snapshotd
