#include <cstdio>
#include <cstdlib>
#include <map>
#include <optional>

#include "bindings.hpp"
#include "entry.hpp"

namespace snapshotd {

namespace {

uint64_t to_block_bytes(py::handle given) {
    uint64_t block_bytes = to_unsigned(given, "block_bytes");
    if (block_bytes == 0) throw std::invalid_argument("block_bytes must be at least 1 where there are checksums");
    return block_bytes;
}

void check_words(const Bytes& words, uint64_t data_bytes, uint64_t block_bytes) {
    uint64_t blocks = data_bytes / block_bytes + (data_bytes % block_bytes != 0);
    if (words.size() % 4 == 0 && words.size() / 4 == blocks) return;
    throw std::invalid_argument(std::to_string(data_bytes) + " bytes in blocks of " + std::to_string(block_bytes) +
                                " have " + std::to_string(blocks) + " checksums of 4 bytes each, not " +
                                std::to_string(words.size()) + " bytes of them");
}

}  // namespace

bool overlap(const Bytes& one, const Bytes& other) {
    auto begin = [](const Bytes& bytes) { return reinterpret_cast<uintptr_t>(bytes.data()); };
    if (one.size() == 0 || other.size() == 0) return false;
    return begin(one) < begin(other) + other.size() && begin(other) < begin(one) + one.size();
}

BlockCrcs to_crcs(const Bytes& crcs, py::handle block_bytes_given, uint64_t data_bytes) {
    const uint64_t block_bytes = to_block_bytes(block_bytes_given);
    check_words(crcs, data_bytes, block_bytes);
    return {crcs.data(), block_bytes};
}

Layout to_layout(const std::string& name) {
    if (name == "planes") return Layout::planes;
    if (name == "bytes") return Layout::bytes;
    throw std::invalid_argument("there is no layout '" + name + "', only 'planes' and 'bytes'");
}

namespace {

const ErasureTier& tier_named(const std::string& name) {
    for (const ErasureTier* tier : erasure_tiers()) {
        if (name == tier->name) return *tier;
    }
    throw std::invalid_argument("this machine cannot run the erasure tier '" + name + "'; ec_tiers() lists its own");
}

const ErasureTier& in_use() {
    return *erasure_tiers().front();
}

const char* name_of(Layout layout) {
    return layout == Layout::planes ? "planes" : "bytes";
}

Code to_code(py::handle k, py::handle m, py::handle layout = py::none()) {
    const uint64_t data = to_unsigned(k, "k"), parity = to_unsigned(m, "m");
    return layout.is_none() ? Code(data, parity) : Code(data, parity, to_layout(py::cast<std::string>(layout)));
}

std::vector<std::vector<int>> to_lists(const Matrix& matrix) {
    std::vector<std::vector<int>> lists;
    for (unsigned i = 0; i < matrix.rows(); ++i) lists.emplace_back(matrix[i], matrix[i] + matrix.columns());
    return lists;
}

std::vector<uint64_t> to_symbols(const py::sequence& sequence, const char* what) {
    std::vector<uint64_t> symbols;
    for (py::handle item : sequence) symbols.push_back(to_unsigned(item, std::string("a symbol in ") + what));
    return symbols;
}

// --- buffers of one call

// Bytes of the host, and what the caller calls them.
struct Named {
    Named(py::handle object, std::string called, bool writable) : name(std::move(called)) {
        refuse_device(object);
        bytes.emplace(object, writable);
    }

    void refuse_device(py::handle object) const {
        if (PyObject_CheckBuffer(object.ptr())) return;
        if (!py::hasattr(object, "__cuda_array_interface__")) return;
        std::string type = py::str(py::type::handle_of(object).attr("__name__"));
        throw py::type_error(name + " is a " + type + " in the memory of a device, which the CPU codec cannot reach: " +
                             "give it a buffer of the host");
    }

    std::string described() const {
        char where[32];
        std::snprintf(where, sizeof where, " at %p", static_cast<void*>(bytes->data()));
        return name + where + " of " + std::to_string(bytes->size()) + " bytes";
    }

    std::optional<Bytes> bytes;
    std::string name;
};

void refuse_overlap(const Named& one, const Named& other) {
    if (overlap(*one.bytes, *other.bytes)) {
        throw std::invalid_argument(one.described() + " overlaps " + other.described());
    }
}

// All buffers of a call. What is written overlaps nothing else.
class Buffers {
  public:
    const Bytes& input(py::handle object, std::string name) { return hold(object, std::move(name), false); }

    // Outputs come after all inputs.
    const Bytes& output(py::handle object, std::string name) {
        const Bytes& bytes = hold(object, std::move(name), true);
        for (size_t i = 0; i + 1 < held_.size(); ++i) refuse_overlap(*held_.back(), *held_[i]);
        return bytes;
    }

    // The last one has the length of the symbols.
    void check_symbol() {
        const Named& last = *held_.back();
        if (!first_) first_ = &last;
        if (first_->bytes->size() == 0) throw std::invalid_argument("symbols must not be empty: " + last.described());
        if (last.bytes->size() != first_->bytes->size()) {
            throw std::invalid_argument(
                "symbols must have the same length, not " + std::to_string(first_->bytes->size()) + " and " +
                std::to_string(last.bytes->size()) + " bytes as " + first_->name + " and " + last.name);
        }
    }

    uint64_t symbol_bytes() const { return first_ == nullptr ? 0 : first_->bytes->size(); }

  private:
    const Bytes& hold(py::handle object, std::string name, bool writable) {
        return *held_.emplace_back(std::make_unique<Named>(object, std::move(name), writable))->bytes;
    }

    std::vector<std::unique_ptr<Named>> held_;
    const Named* first_ = nullptr;
};

std::string numbered(const char* what, size_t index) {
    return std::string(what) + " " + std::to_string(index);
}

// --- checksums of blocks

int64_t check(py::handle data_given, py::handle crcs_given, py::handle block_bytes_given) {
    Buffers buffers;
    const Bytes& data = buffers.input(data_given, "data");
    const Bytes& words = buffers.input(crcs_given, "crcs");
    const BlockCrcs crcs = to_crcs(words, block_bytes_given, data.size());
    NoGil release;
    return first_bad_block(data.data(), data.size(), crcs);
}

py::bytes block_crcs(py::handle data_given, py::handle block_bytes_given) {
    Buffers buffers;
    const Bytes& data = buffers.input(data_given, "data");
    const uint64_t block_bytes = to_block_bytes(block_bytes_given);
    std::string words(4 * (data.size() / block_bytes + (data.size() % block_bytes != 0)), '\0');
    {
        NoGil release;
        make_crcs(data.data(), data.size(), {reinterpret_cast<byte*>(words.data()), block_bytes});
    }
    return py::bytes(words);
}

// --- multiply and add

bool is_one_buffer(py::handle object) {
    return PyObject_CheckBuffer(object.ptr()) || !py::isinstance<py::sequence>(object);
}

// One thing or several: what is given, as a list.
std::vector<py::object> listed(py::handle given, bool single) {
    if (single) return {py::reinterpret_borrow<py::object>(given)};
    return py::cast<std::vector<py::object>>(given);
}

byte to_coefficient(py::handle given) {
    uint64_t factor = to_unsigned(given, "coefficient");
    if (factor > 255) throw std::invalid_argument("coefficient must be at most 255, not " + std::to_string(factor));
    return static_cast<byte>(factor);
}

struct AccumulateOptions {
    bool first;
    py::handle crcs, block_bytes;
    std::string layout;
    py::handle dst_crcs;
};

int64_t accumulate_checked(const ErasureTier& tier, py::handle dst, py::handle src, py::handle coefficient,
                           const AccumulateOptions& options) {
    const bool single = is_one_buffer(dst);
    const std::vector<py::object> outputs = listed(dst, single), factors_given = listed(coefficient, single);
    const std::vector<py::object> made_given =
        options.dst_crcs.is_none() ? std::vector<py::object>{} : listed(options.dst_crcs, single);
    if (outputs.empty() || outputs.size() > kSymbolsMax || factors_given.size() != outputs.size() ||
        (!made_given.empty() && made_given.size() != outputs.size())) {
        throw std::invalid_argument("dst, coefficient and dst_crcs must be as many, 1 to " +
                                    std::to_string(kSymbolsMax) + ", not " + std::to_string(outputs.size()) + ", " +
                                    std::to_string(factors_given.size()) + " and " + std::to_string(made_given.size()));
    }
    byte factors[kSymbolsMax];
    for (size_t i = 0; i < outputs.size(); ++i) factors[i] = to_coefficient(factors_given[i]);
    const Layout layout = to_layout(options.layout);

    Buffers buffers;
    const Bytes& from = buffers.input(src, "src");
    const Bytes& words = buffers.input(options.crcs, "crcs");
    const bool unchecked = words.size() == 0 && to_unsigned(options.block_bytes, "block_bytes") == 0;
    const BlockCrcs crcs = unchecked ? BlockCrcs{} : to_crcs(words, options.block_bytes, from.size());
    byte* to[kSymbolsMax];
    MadeCrcs made[kSymbolsMax];
    uint64_t to_bytes = 0;
    for (size_t i = 0; i < outputs.size(); ++i) {
        const Bytes& one = buffers.output(outputs[i], single ? "dst" : numbered("dst", i));
        if (i == 0) to_bytes = one.size();
        if (one.size() != to_bytes) {
            throw std::invalid_argument("all of dst must have the same length, not " + std::to_string(to_bytes) +
                                        " and " + std::to_string(one.size()) + " bytes");
        }
        to[i] = one.data();
    }
    if (to_bytes < from.size()) {
        throw std::invalid_argument("dst has " + std::to_string(to_bytes) + " bytes, fewer than the " +
                                    std::to_string(from.size()) + " of src");
    }
    for (size_t i = 0; i < made_given.size(); ++i) {
        const Bytes& room = buffers.output(made_given[i], single ? "dst_crcs" : numbered("dst_crcs", i));
        const uint64_t block_bytes = to_block_bytes(options.block_bytes);
        check_words(room, to_bytes, block_bytes);
        made[i] = {room.data(), block_bytes};
    }
    const Addend addend{from.data(),  from.size(), factors, to, to_bytes, static_cast<unsigned>(outputs.size()),
                        options.first};
    NoGil release;
    return accumulate(tier, layout, addend, crcs, made_given.empty() ? nullptr : made);
}

// --- encode and decode

// The symbols of one call: all of one length, and no output overlaps anything.
struct SymbolBuffers {
    void add_input(py::handle object, const std::string& name, bool used = true) {
        const Bytes& bytes = buffers.input(object, name);
        buffers.check_symbol();
        if (used) from.push_back(bytes.data());
    }

    void add_output(py::handle object, const std::string& name) {
        const Bytes& bytes = buffers.output(object, name);
        buffers.check_symbol();
        to.push_back(bytes.data());
    }

    Symbols symbols() const {
        return {from.data(), static_cast<unsigned>(from.size()), to.data(), static_cast<unsigned>(to.size()),
                buffers.symbol_bytes()};
    }

    Buffers buffers;
    std::vector<const byte*> from;
    std::vector<byte*> to;
};

Code code_of(const py::sequence& data, const py::sequence& parity, py::handle layout) {
    if (layout.is_none()) return {data.size(), parity.size()};
    return {data.size(), parity.size(), to_layout(py::cast<std::string>(layout))};
}

void fill(SymbolBuffers& symbols, const py::sequence& data, const py::sequence& parity) {
    size_t index = 0;
    for (py::handle one : data) symbols.add_input(one, numbered("data symbol", index++));
    index = 0;
    for (py::handle one : parity) symbols.add_output(one, numbered("parity row", index++));
}

void encode_checked(const ErasureTier& tier, const py::sequence& data, const py::sequence& parity, int threads,
                    py::handle layout) {
    Code code = code_of(data, parity, layout);
    SymbolBuffers buffers;
    fill(buffers, data, parity);
    NoGil release;
    encode(tier, code, buffers.symbols(), threads);
}

// A buffer for each of `count` symbols, or none.
std::vector<byte*> outputs_of(Buffers& buffers, py::handle given, const char* what, size_t count, uint64_t bytes) {
    if (given.is_none()) return {};
    const auto sequence = py::cast<std::vector<py::object>>(given);
    if (sequence.size() != count) {
        throw std::invalid_argument(std::string(what) + " must be " + std::to_string(count) + " buffers, not " +
                                    std::to_string(sequence.size()));
    }
    std::vector<byte*> found;
    for (size_t i = 0; i < count; ++i) {
        const Bytes& one = buffers.output(sequence[i], numbered(what, i));
        if (one.size() != bytes) {
            throw std::invalid_argument(numbered(what, i) + " must have " + std::to_string(bytes) + " bytes, not " +
                                        std::to_string(one.size()));
        }
        found.push_back(one.data());
    }
    return found;
}

struct CopyOptions {
    py::handle block_bytes, copies, data_crcs, parity_crcs;
    std::string stores;
};

Stores to_stores(const std::string& name) {
    if (name == "temporal") return Stores::temporal;
    if (name == "non-temporal") return Stores::non_temporal;
    throw std::invalid_argument("there are no stores '" + name + "', only 'temporal' and 'non-temporal'");
}

void encode_copying_checked(const ErasureTier& tier, const py::sequence& data, const py::sequence& parity,
                            const CopyOptions& options, int threads, py::handle layout) {
    Code code = code_of(data, parity, layout);
    SymbolBuffers buffers;
    fill(buffers, data, parity);
    Copies copies;
    copies.block_bytes = to_block_bytes(options.block_bytes);
    copies.stores = to_stores(options.stores);
    const uint64_t bytes = buffers.buffers.symbol_bytes();
    if (copies.block_bytes % kSuperblockBytes != 0) {
        throw std::invalid_argument("block_bytes must be a multiple of " + std::to_string(kSuperblockBytes) + ", not " +
                                    std::to_string(copies.block_bytes));
    }
    const uint64_t words = 4 * (bytes / copies.block_bytes + (bytes % copies.block_bytes != 0));
    copies.to = outputs_of(buffers.buffers, options.copies, "copy", code.k, bytes);
    copies.data_words = outputs_of(buffers.buffers, options.data_crcs, "data_crcs", code.k, words);
    copies.parity_words = outputs_of(buffers.buffers, options.parity_crcs, "parity_crcs", code.m, words);
    NoGil release;
    encode_copying(tier, code, buffers.symbols(), copies, threads);
}

// The buffers of a mapping by their symbols, lowest first: data symbols, which cost the least, before parity.
std::map<uint64_t, py::object> to_map(py::handle mapping, const char* what) {
    PyObject* items = PyMapping_Items(mapping.ptr());
    if (items == nullptr) throw py::error_already_set();
    std::map<uint64_t, py::object> buffers;
    for (py::handle item : py::reinterpret_steal<py::list>(items)) {
        auto [symbol, buffer] = py::cast<std::pair<py::object, py::object>>(item);
        buffers.emplace(to_unsigned(symbol, std::string("a symbol in ") + what), buffer);
    }
    return buffers;
}

void decode_checked(const ErasureTier& tier, Code code, py::handle have_given, py::handle want_given, int threads) {
    auto have = to_map(have_given, "have"), want = to_map(want_given, "want");
    std::vector<uint64_t> used, wanted;
    SymbolBuffers buffers;
    for (const auto& [symbol, buffer] : have) {
        const bool needed = used.size() < code.k;
        if (symbol >= code.k + code.m) {
            throw std::invalid_argument("have: there is no symbol " + std::to_string(symbol) + " in this code");
        }
        if (want.count(symbol) != 0) {
            throw std::invalid_argument("symbol " + std::to_string(symbol) + " is both given and wanted");
        }
        if (needed) used.push_back(symbol);
        buffers.add_input(buffer, numbered("symbol", symbol), needed);
    }
    for (const auto& [symbol, buffer] : want) wanted.push_back(symbol);
    Matrix rows = recovery(code, used, wanted);
    for (const auto& [symbol, buffer] : want) buffers.add_output(buffer, numbered("wanted symbol", symbol));
    NoGil release;
    combine(tier, code.layout, rows.rows() == 0 ? nullptr : rows[0], buffers.symbols(), threads);
}

// --- each call by the tier in use and, under the name with `_with`, by a named one

using Tier = const std::string&;

// By name, as integers: for callers that are not Python.
std::map<std::string, uintptr_t> entry_addresses() {
    const EntryPoints entries = entry_points();
    return {{"encode", reinterpret_cast<uintptr_t>(entries.encode)},
            {"decode", reinterpret_cast<uintptr_t>(entries.decode)},
            {"accumulate", reinterpret_cast<uintptr_t>(entries.accumulate)},
            {"encode_copying", reinterpret_cast<uintptr_t>(entries.encode_copying)}};
}

void bind_codes(py::module_& m) {
    m.def("ec_entry_points", entry_addresses);
    m.def("ec_tiers", [] {
        std::vector<std::string> names;
        for (const ErasureTier* tier : erasure_tiers()) names.emplace_back(tier->name);
        return names;
    });
    m.def(
        "ec_layout", [](py::handle k, py::handle parity) { return name_of(to_code(k, parity).layout); }, "k"_a, "m"_a);
    m.def(
        "ec_coefficients",
        [](py::handle k, py::handle parity, py::handle layout) {
            return to_lists(coefficients(to_code(k, parity, layout)));
        },
        "k"_a, "m"_a, "layout"_a = py::none());
    m.def(
        "ec_recovery",
        [](py::handle k, py::handle parity, const py::sequence& have, const py::sequence& want, py::handle layout) {
            return to_lists(recovery(to_code(k, parity, layout), to_symbols(have, "have"), to_symbols(want, "want")));
        },
        "k"_a, "m"_a, "have"_a, "want"_a, "layout"_a = py::none());
    m.def("ec_check", check, "data"_a, "crcs"_a, "block_bytes"_a);
    m.def("ec_crcs", block_crcs, "data"_a, "block_bytes"_a);
}

void bind_accumulate(py::module_& m) {
    m.def(
        "ec_accumulate",
        [](py::handle dst, py::handle src, py::handle coefficient, bool first, py::handle crcs, py::handle block_bytes,
           const std::string& layout, py::handle dst_crcs) {
            return accumulate_checked(in_use(), dst, src, coefficient, {first, crcs, block_bytes, layout, dst_crcs});
        },
        "dst"_a, "src"_a, "coefficient"_a, py::kw_only(), "first"_a = false, "crcs"_a = py::bytes(),
        "block_bytes"_a = 0, "layout"_a = "bytes", "dst_crcs"_a = py::none());
    m.def(
        "ec_accumulate_with",
        [](Tier tier, py::handle dst, py::handle src, py::handle coefficient, bool first, py::handle crcs,
           py::handle block_bytes, const std::string& layout, py::handle dst_crcs) {
            return accumulate_checked(tier_named(tier), dst, src, coefficient,
                                      {first, crcs, block_bytes, layout, dst_crcs});
        },
        "tier"_a, "dst"_a, "src"_a, "coefficient"_a, py::kw_only(), "first"_a = false, "crcs"_a = py::bytes(),
        "block_bytes"_a = 0, "layout"_a = "bytes", "dst_crcs"_a = py::none());
}

void bind_encode(py::module_& m) {
    m.def(
        "ec_encode",
        [](const py::sequence& data, const py::sequence& parity, int threads, py::handle layout) {
            encode_checked(in_use(), data, parity, threads, layout);
        },
        "data"_a, "parity"_a, "threads"_a = 1, "layout"_a = py::none());
    m.def(
        "ec_encode_with",
        [](Tier tier, const py::sequence& data, const py::sequence& parity, int threads, py::handle layout) {
            encode_checked(tier_named(tier), data, parity, threads, layout);
        },
        "tier"_a, "data"_a, "parity"_a, "threads"_a = 1, "layout"_a = py::none());
    m.def(
        "ec_encode_copying",
        [](const py::sequence& data, const py::sequence& parity, int threads, py::handle layout, py::handle block_bytes,
           py::handle copies, py::handle data_crcs, py::handle parity_crcs, const std::string& stores) {
            encode_copying_checked(in_use(), data, parity, {block_bytes, copies, data_crcs, parity_crcs, stores},
                                   threads, layout);
        },
        "data"_a, "parity"_a, "threads"_a = 1, "layout"_a = py::none(), py::kw_only(), "block_bytes"_a,
        "copies"_a = py::none(), "data_crcs"_a = py::none(), "parity_crcs"_a = py::none(), "stores"_a = "temporal");
    m.def(
        "ec_encode_copying_with",
        [](Tier tier, const py::sequence& data, const py::sequence& parity, int threads, py::handle layout,
           py::handle block_bytes, py::handle copies, py::handle data_crcs, py::handle parity_crcs,
           const std::string& stores) {
            encode_copying_checked(tier_named(tier), data, parity,
                                   {block_bytes, copies, data_crcs, parity_crcs, stores}, threads, layout);
        },
        "tier"_a, "data"_a, "parity"_a, "threads"_a = 1, "layout"_a = py::none(), py::kw_only(), "block_bytes"_a,
        "copies"_a = py::none(), "data_crcs"_a = py::none(), "parity_crcs"_a = py::none(), "stores"_a = "temporal");
}

void bind_decode(py::module_& m) {
    m.def(
        "ec_decode",
        [](py::handle k, py::handle parity, py::handle have, py::handle want, int threads, py::handle layout) {
            decode_checked(in_use(), to_code(k, parity, layout), have, want, threads);
        },
        "k"_a, "m"_a, "have"_a, "want"_a, "threads"_a = 1, "layout"_a = py::none());
    m.def(
        "ec_decode_with",
        [](Tier tier, py::handle k, py::handle parity, py::handle have, py::handle want, int threads,
           py::handle layout) { decode_checked(tier_named(tier), to_code(k, parity, layout), have, want, threads); },
        "tier"_a, "k"_a, "m"_a, "have"_a, "want"_a, "threads"_a = 1, "layout"_a = py::none());
}

}  // namespace

void bind_erasure(py::module_& m) {
    if (const char* name = std::getenv("SNAPSHOTD_TIER"); name != nullptr && *name != '\0') force_erasure_tier(name);
    bind_codes(m);
    bind_accumulate(m);
    bind_encode(m);
    bind_decode(m);
}

}  // namespace snapshotd
