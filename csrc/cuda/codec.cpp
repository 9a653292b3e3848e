#include "codec.hpp"

#include <algorithm>

#include "../native/gf256.hpp"

namespace snapshotd::gpu {

namespace {

using gf256::inverse;
using gf256::multiply;

constexpr int kSymbolsMax = 255;
constexpr int kFourRowsInputsMax = 21;  // with more, four rows of powers of 2 are no longer MDS

[[noreturn]] void refuse(const std::string& why) {
    throw std::invalid_argument(why);
}

std::string count_of(size_t n, const char* what) {
    return std::to_string(n) + " " + what;
}

void check_code(size_t k, size_t m) {
    if (k < 1 || m < 1 || k + m > kSymbolsMax) {
        refuse("there is no code of k=" + std::to_string(k) + ", m=" + std::to_string(m) +
               ": both are at least 1 and k + m at most 255");
    }
    if (m > kRowsMax || (m == kRowsMax && k > kFourRowsInputsMax)) {
        refuse("the layout `planes` has no code of k=" + std::to_string(k) + ", m=" + std::to_string(m) +
               ": up to 3 rows, or 4 with k of at most 21; use the layout `bytes` and its coefficients");
    }
}

// The symbols of one call: looked at before anything is enqueued.
class Extents {
  public:
    Extents(const Device& device, uint64_t bytes) : device_(device), bytes_(bytes) {
        if (bytes == 0) refuse("symbols must not be empty");
    }

    void add_input(const uint8_t* at, const std::string& name) {
        look_at(at, name);
        begins_.push_back(reinterpret_cast<uint64_t>(at));
    }

    // Outputs come after the inputs.
    void add_output(const uint8_t* at, const std::string& name) {
        look_at(at, name);
        const auto begin = reinterpret_cast<uint64_t>(at);
        for (uint64_t other : begins_) {
            if (begin < other + bytes_ && other < begin + bytes_) {
                refuse(name + " (" + std::to_string(begin) + ", " + std::to_string(bytes_) +
                       " bytes) overlaps another symbol at " + std::to_string(other));
            }
        }
        begins_.push_back(begin);
    }

    bool aligned() const { return (all_ & 15) == 0; }

  private:
    void look_at(const uint8_t* at, const std::string& name) {
        if (at == nullptr) refuse(name + " is a null pointer");
        device_.check_memory(at, bytes_, name);
        all_ |= reinterpret_cast<uint64_t>(at);
    }

    const Device& device_;
    const uint64_t bytes_;
    uint64_t all_ = 0;
    std::vector<uint64_t> begins_;
};

std::string named(const char* what, size_t i) {
    return std::string(what) + " " + std::to_string(i);
}

// Whole superblocks by the layout's kernel, the rest by the one of `bytes`; four rows at a time.
void combine_checked(Device& device, Layout layout, const std::vector<const uint8_t*>& in,
                     const std::vector<uint8_t*>& out, const Factors& factors, uint64_t from, uint64_t bytes, bool add,
                     bool aligned, Stream stream) {
    Combination job{};
    std::copy(in.begin(), in.end(), job.in);
    job.inputs = static_cast<uint32_t>(in.size());
    job.add = add ? 1 : 0;
    for (size_t first = 0; first < out.size(); first += kRowsMax) {
        const auto rows = static_cast<int>(std::min<size_t>(kRowsMax, out.size() - first));
        for (int r = 0; r < rows; ++r) {
            job.out[r] = out[first + r];
            std::copy(factors[first + r].begin(), factors[first + r].end(), job.factor[r]);
        }
        const uint64_t superblocks = layout == Layout::planes && from == 0 ? bytes / kSuperblockBytes : 0;
        const uint64_t begin = from + superblocks * kSuperblockBytes;
        if (superblocks > 0) device.combine(job, rows, superblocks, aligned, stream);
        if (begin < bytes) device.combine_bytes(job, rows, begin, bytes, aligned, stream);
    }
}

Factors planes_factors(size_t k, size_t m) {
    Factors rows(m, std::vector<uint8_t>(k));
    for (size_t r = 0; r < m; ++r) {
        for (size_t i = 0; i < k; ++i) rows[r][i] = planes_coefficient(static_cast<int>(r), static_cast<int>(i));
    }
    return rows;
}

// Undoes a square of coefficients; every one that is asked for is regular, since the code is MDS.
Factors inverted(Factors square) {
    const size_t n = square.size();
    Factors result(n, std::vector<uint8_t>(n));
    for (size_t i = 0; i < n; ++i) result[i][i] = 1;
    for (size_t pivot = 0; pivot < n; ++pivot) {
        size_t found = pivot;
        while (found < n && square[found][pivot] == 0) ++found;
        if (found == n) refuse("these symbols do not determine what is wanted: the choice is singular");
        std::swap(square[found], square[pivot]);
        std::swap(result[found], result[pivot]);
        const uint8_t scale = inverse(square[pivot][pivot]);
        for (size_t j = 0; j < n; ++j) {
            square[pivot][j] = multiply(square[pivot][j], scale);
            result[pivot][j] = multiply(result[pivot][j], scale);
        }
        for (size_t row = 0; row < n; ++row) {
            const uint8_t factor = square[row][pivot];
            if (row == pivot || factor == 0) continue;
            for (size_t j = 0; j < n; ++j) {
                square[row][j] ^= multiply(factor, square[pivot][j]);
                result[row][j] ^= multiply(factor, result[pivot][j]);
            }
        }
    }
    return result;
}

}  // namespace

uint8_t planes_coefficient(int row, int symbol) {
    const int power = kExponents[row] * symbol % 255;
    return gf256::kLogarithms.power[power < 0 ? power + 255 : power];
}

void encode(Device& device, const std::vector<const uint8_t*>& data, const std::vector<uint8_t*>& parity,
            uint64_t bytes, Stream stream) {
    check_code(data.size(), parity.size());
    Extents extents(device, bytes);
    for (size_t i = 0; i < data.size(); ++i) extents.add_input(data[i], named("data symbol", i));
    for (size_t r = 0; r < parity.size(); ++r) extents.add_output(parity[r], named("parity row", r));
    const uint64_t superblocks = bytes / kSuperblockBytes;
    const auto k = static_cast<int>(data.size()), m = static_cast<int>(parity.size());
    if (!extents.aligned()) {
        const Factors factors = planes_factors(data.size(), parity.size());
        combine_checked(device, Layout::planes, data, parity, factors, 0, bytes, false, false, stream);
        return;
    }
    if (superblocks > 0 && k <= kSpecialisedMax) {
        Symbols symbols{};
        std::copy(data.begin(), data.end(), symbols.in);
        std::copy(parity.begin(), parity.end(), symbols.out);
        device.encode(symbols, k, m, superblocks, stream);
    } else if (superblocks > 0) {
        ManySymbols symbols{};
        std::copy(data.begin(), data.end(), symbols.in);
        std::copy(parity.begin(), parity.end(), symbols.out);
        symbols.inputs = static_cast<uint32_t>(k);
        device.encode_any(symbols, m, superblocks, stream);
    }
    const uint64_t whole = superblocks * kSuperblockBytes;
    if (whole < bytes) {
        combine_checked(device, Layout::bytes, data, parity, planes_factors(data.size(), parity.size()), whole, bytes,
                        false, true, stream);
    }
}

void combine(Device& device, Layout layout, const std::vector<const uint8_t*>& in, const std::vector<uint8_t*>& out,
             const Factors& factors, uint64_t bytes, bool add, Stream stream) {
    if (in.empty() || in.size() > kInputsMax || out.empty() || out.size() > kSymbolsMax) {
        refuse("1 to 255 symbols are combined into 1 to 255, not " + count_of(in.size(), "into ") +
               std::to_string(out.size()));
    }
    if (factors.size() != out.size()) {
        refuse("there must be one row of factors for each of the " + count_of(out.size(), "outputs, not ") +
               std::to_string(factors.size()));
    }
    for (const auto& row : factors) {
        if (row.size() != in.size()) {
            refuse("a row must have one factor for each of the " + count_of(in.size(), "inputs, not ") +
                   std::to_string(row.size()));
        }
    }
    Extents extents(device, bytes);
    for (size_t i = 0; i < in.size(); ++i) extents.add_input(in[i], named("input", i));
    for (size_t r = 0; r < out.size(); ++r) extents.add_output(out[r], named("output", r));
    combine_checked(device, layout, in, out, factors, 0, bytes, add, extents.aligned(), stream);
}

void decode(Device& device, const std::vector<const uint8_t*>& data, const std::vector<const uint8_t*>& parity,
            const std::vector<Wanted>& wanted, uint64_t bytes, Stream stream) {
    check_code(data.size(), parity.size());
    std::vector<int> lost, used;
    Extents extents(device, bytes);
    for (size_t i = 0; i < data.size(); ++i) {
        if (data[i] == nullptr) {
            lost.push_back(static_cast<int>(i));
        } else {
            extents.add_input(data[i], named("data symbol", i));
        }
    }
    for (size_t r = 0; r < parity.size(); ++r) {
        if (parity[r] != nullptr && used.size() < lost.size()) {
            used.push_back(static_cast<int>(r));
            extents.add_input(parity[r], named("parity row", r));
        }
    }
    if (lost.size() > used.size()) {
        refuse(count_of(lost.size(), "data symbols are lost, but only ") +
               count_of(used.size(), "parity rows are there"));
    }
    if (wanted.empty()) return;
    Decoding job{};
    Factors square;
    for (int row : used) {
        std::vector<uint8_t>& line = square.emplace_back();
        for (int symbol : lost) line.push_back(planes_coefficient(row, symbol));
    }
    const Factors undo = inverted(square);
    std::vector<uint8_t*> out;
    Factors undo_wanted;
    for (const Wanted& one : wanted) {
        const auto found = std::find(lost.begin(), lost.end(), one.symbol);
        if (found == lost.end()) refuse("data symbol " + std::to_string(one.symbol) + " is wanted but not lost");
        if (out.size() == lost.size()) refuse("a data symbol is wanted twice");
        extents.add_output(one.to, named("wanted symbol", static_cast<size_t>(one.symbol)));
        undo_wanted.push_back(undo[static_cast<size_t>(found - lost.begin())]);
        out.push_back(one.to);
    }
    const uint64_t superblocks = extents.aligned() ? bytes / kSuperblockBytes : 0;
    if (superblocks > 0) {
        unsigned rows = 0;
        std::copy(data.begin(), data.end(), job.in);
        std::copy(out.begin(), out.end(), job.out);
        for (size_t j = 0; j < used.size(); ++j) {
            rows |= 1u << used[j];
            job.parity[j] = parity[static_cast<size_t>(used[j])];
        }
        for (size_t l = 0; l < out.size(); ++l) std::copy(undo_wanted[l].begin(), undo_wanted[l].end(), job.undo[l]);
        job.inputs = static_cast<uint32_t>(data.size());
        job.wanted = static_cast<uint32_t>(out.size());
        device.decode(job, rows, superblocks, stream);
    }
    if (superblocks * kSuperblockBytes == bytes) return;
    // What the kernel does not take: as one combination of the symbols that are there.
    std::vector<const uint8_t*> in;
    std::vector<int> present;
    for (size_t i = 0; i < data.size(); ++i) {
        if (data[i] == nullptr) continue;
        in.push_back(data[i]);
        present.push_back(static_cast<int>(i));
    }
    for (int row : used) in.push_back(parity[static_cast<size_t>(row)]);
    Factors factors;
    for (const auto& row : undo_wanted) {
        std::vector<uint8_t>& line = factors.emplace_back(in.size());
        for (size_t j = 0; j < used.size(); ++j) {
            line[present.size() + j] = row[j];
            for (size_t i = 0; i < present.size(); ++i) {
                line[i] ^= multiply(row[j], planes_coefficient(used[j], present[i]));
            }
        }
    }
    combine_checked(device, superblocks > 0 ? Layout::bytes : Layout::planes, in, out, factors,
                    superblocks * kSuperblockBytes, bytes, false, extents.aligned(), stream);
}

void crc32c(Device& device, const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs, Stream stream) {
    if (bytes == 0 || block_bytes == 0) refuse("a checksum needs bytes, and blocks of at least one");
    const uint64_t blocks = bytes / block_bytes + (bytes % block_bytes != 0);
    device.check_memory(data, bytes, "data");
    device.check_memory(crcs, blocks * sizeof(uint32_t), "crcs");
    if (reinterpret_cast<uint64_t>(crcs) % sizeof(uint32_t) != 0) refuse("crcs must be aligned to 4 bytes");
    device.crc32c(data, bytes, block_bytes, crcs, stream);
}

}  // namespace snapshotd::gpu
