#include "erasure.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>

#include "crc32c.hpp"
#include "parallel.hpp"

namespace snapshotd {

namespace {

// What a thread takes at a time of every symbol.
constexpr size_t kChunkBytes = 256 << 10;
// Together, the inputs' pieces of a chunk stay in the L2 cache from one group of outputs to the next.
constexpr size_t kTileBytes = 128 << 10;
// Outputs of so many bytes together, or more, do not stay in a cache.
constexpr size_t kLargeBytes = 32 << 20;
// What is checksummed is in the L1 cache when it is added, and what was added when that is checksummed.
constexpr size_t kStepBytes = 4096;
// The same of every symbol in turn, where that is k times as much.
constexpr size_t kCopyBytes = 1024;

std::vector<const ErasureTier*> supported_tiers() {
    const ErasureTier* known[] = {
#if defined(__x86_64__)
        &kErasureGfniAvx512, &kErasureAvx512, &kErasureGfniAvx2, &kErasureAvx2,
#elif defined(__aarch64__)
        &kErasureNeon,
#endif
        &kErasureBase,
    };
    std::vector<const ErasureTier*> found;
    for (const ErasureTier* tier : known) {
        if (tier->supported()) found.push_back(tier);
    }
    return found;
}

std::vector<const ErasureTier*>& tiers() {
    static std::vector<const ErasureTier*> found = supported_tiers();
    return found;
}

uint32_t load_word(const byte* word) {
    return BlockCrcs{word, 0}.word(0);
}

void store_word(byte* word, uint32_t value) {
    for (int i = 0; i < 4; ++i) word[i] = static_cast<byte>(value >> (8 * i));
}

size_t round_down(size_t bytes) {
    return bytes / kSuperblockBytes * kSuperblockBytes;
}

// Checksums of blocks, step by step in order.
class Blocks {
  public:
    Blocks() {}  // to be assigned
    Blocks(const byte* data, size_t bytes, size_t block_bytes)
        : data_(data), bytes_(bytes), block_(block_bytes), at_(0), index_(0), state_(~uint32_t{0}) {}

    // `ended(block, crc)` for each block that ends at or before `end`; false as soon as that says so.
    template <typename Ended>
    bool advance(size_t end, Ended ended) {
        while (at_ < end) {
            const size_t block_end = std::min(bytes_, (index_ + 1) * block_);
            const size_t stop = std::min(end, block_end);
            state_ = crc_extend(state_, data_ + at_, stop - at_);
            at_ = stop;
            if (stop < block_end) continue;
            if (!ended(index_, ~state_)) return false;
            ++index_;
            state_ = ~uint32_t{0};
        }
        return true;
    }

  private:
    const byte* data_;
    size_t bytes_, block_, at_, index_;
    uint32_t state_;
};

void encode_range(const ErasureTier& tier, Layout layout, const Terms& terms, size_t begin, size_t end) {
    const size_t planes_end = layout == Layout::planes ? begin + round_down(end - begin) : begin;
    if (begin < planes_end) tier.encode_planes(terms, begin, planes_end);
    if (planes_end < end) tier.combine_bytes(terms, planes_end, end);
}

void combine_range(const ErasureTier& tier, Layout layout, const Terms& terms, size_t begin, size_t end) {
    const size_t planes_end = layout == Layout::planes ? begin + round_down(end - begin) : begin;
    if (begin < planes_end) tier.combine_planes(terms, begin, planes_end);
    if (planes_end < end) tier.combine_bytes(terms, planes_end, end);
}

// Begins of pieces are multiples of superblocks, so only the last one has an odd end.
template <typename Range>
void in_pieces(const Terms& terms, size_t bytes, size_t tile, int threads, Range range) {
    if (terms.outputs == 0) return;
    parallel_for(threads, (bytes + kChunkBytes - 1) / kChunkBytes, [&](uint64_t chunk) {
        const size_t end = std::min<size_t>(bytes, (chunk + 1) * kChunkBytes);
        for (size_t at = chunk * kChunkBytes; at < end; at += tile) range(at, std::min(end, at + tile));
    });
}

// In planes all outputs of a superblock are made at once; in bytes, a few of a piece at a time.
size_t tile_of(Layout layout, size_t inputs) {
    return layout == Layout::planes ? kChunkBytes : std::max(kSuperblockBytes, round_down(kTileBytes / inputs));
}

// Outputs that may be stored past the caches.
bool begin_lines(const Terms& terms) {
    for (unsigned i = 0; i < terms.outputs; ++i) {
        if (reinterpret_cast<uintptr_t>(terms.to[i]) % 64 != 0) return false;
    }
    return true;
}

// Whether large outputs are stored past the caches: on some machines that saves a read of every line, on others it
// costs a tenth. Measured once in a process, on the first large job itself: some of its pieces go one way, some the
// other.
class LargeStores {
  public:
    template <typename Range>
    Stores choose(size_t piece, size_t pieces, Range range) {
        int known = known_.load(std::memory_order_relaxed);
        if (known >= 0) return static_cast<Stores>(known);
        double seconds[2] = {};
        for (size_t i = 0; i < std::min(pieces, kTrials); ++i) {
            const int way = static_cast<int>(i % 2);
            const auto began = std::chrono::steady_clock::now();
            range(i * piece, static_cast<Stores>(way));
            if (i >= 2) seconds[way] += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        }
        const Stores found = seconds[0] <= seconds[1] ? Stores::temporal : Stores::non_temporal;
        known_.store(static_cast<int>(found), std::memory_order_relaxed);
        return found;
    }

  private:
    static constexpr size_t kTrials = 34;
    std::atomic<int> known_{-1};
};

LargeStores large_stores;

// The kind of stores for a job: where its outputs are too large for the caches, what this machine prefers.
template <typename Encode>
Stores stores_for(const Terms& terms, size_t bytes, Encode encode) {
    if (bytes * terms.outputs < kLargeBytes || !begin_lines(terms)) return Stores::temporal;
    return large_stores.choose(kChunkBytes, bytes / kChunkBytes, [&](size_t at, Stores stores) {
        Terms way = terms;
        way.stream = stores == Stores::non_temporal;
        encode(way, at, at + kChunkBytes);
        if (way.stream) store_fence();
    });
}

Terms terms_of(const byte* rows, const Symbols& symbols) {
    return {rows, symbols.from, symbols.inputs, symbols.to, symbols.outputs, false};
}

// Where an addend's loops turn from what is added as it is to a last superblock that it fills only in part.
struct Cut {
    size_t plain;   // whole superblocks or, as bytes, all of it
    size_t padded;  // the end of that superblock; else `plain`
};

Cut cut(Layout layout, const Addend& addend) {
    if (layout == Layout::bytes) return {addend.from_bytes, addend.from_bytes};
    const size_t planes = round_down(addend.to_bytes), whole = round_down(addend.from_bytes);
    if (whole >= planes) return {planes, planes};
    return {whole, whole < addend.from_bytes ? whole + kSuperblockBytes : whole};
}

// What comes behind `cut.plain`.
void add_rest(const ErasureTier& tier, const Addend& addend, const Cut& cut) {
    size_t reached = cut.padded;
    if (cut.padded > cut.plain) {
        alignas(kPlaneBytes) byte superblock[kSuperblockBytes] = {};
        const byte* from = superblock;
        std::memcpy(superblock, addend.from + cut.plain, addend.from_bytes - cut.plain);
        for (unsigned i = 0; i < addend.outputs; ++i) {
            byte* to = addend.to[i] + cut.plain;
            tier.combine_planes({addend.factors + i, &from, 1, &to, 1, !addend.first}, 0, kSuperblockBytes);
        }
    } else if (cut.plain < addend.from_bytes) {
        tier.combine_bytes({addend.factors, &addend.from, 1, addend.to, addend.outputs, !addend.first}, cut.plain,
                           addend.from_bytes);
        reached = addend.from_bytes;
    }
    if (!addend.first || reached == addend.to_bytes) return;
    for (unsigned i = 0; i < addend.outputs; ++i) std::memset(addend.to[i] + reached, 0, addend.to_bytes - reached);
}

// The checksums of an addend's outputs, made as they grow.
class Makers {
  public:
    Makers(const Addend& addend, const MadeCrcs* made) : made_(made), count_(made == nullptr ? 0 : addend.outputs) {
        for (unsigned i = 0; i < count_; ++i) blocks_[i] = {addend.to[i], addend.to_bytes, made[i].block_bytes};
    }

    bool any() const { return count_ > 0; }

    void advance(size_t end) {
        for (unsigned i = 0; i < count_; ++i) {
            byte* words = made_[i].words;
            if (words == nullptr) continue;
            blocks_[i].advance(end, [&](size_t block, uint32_t crc) {
                store_word(words + 4 * block, crc);
                return true;
            });
        }
    }

  private:
    const MadeCrcs* made_;
    unsigned count_;
    std::array<Blocks, kSymbolsMax> blocks_;
};

// Step by step, with the checksums of what comes and of what it makes taken from their bytes.
int64_t accumulate_any(const ErasureTier& tier, Layout layout, const Addend& addend, BlockCrcs crcs,
                       const MadeCrcs* made) noexcept {
    const Cut where = cut(layout, addend);
    const Terms terms{addend.factors, &addend.from, 1, addend.to, addend.outputs, !addend.first};
    Makers makers(addend, made);
    const bool checked = crcs.words != nullptr;
    int64_t bad = -1;
    Blocks given(addend.from, addend.from_bytes, crcs.block_bytes);
    auto check = [&](size_t block, uint32_t crc) {
        if (crc != crcs.word(static_cast<int64_t>(block))) bad = static_cast<int64_t>(block);
        return bad < 0;
    };
    const size_t step = checked || makers.any() ? kStepBytes : where.plain;
    for (size_t at = 0, end; at < where.plain; at = end) {
        end = std::min(where.plain, at + step);
        if (checked && !given.advance(end, check)) {
            // Adding the same once more takes it back.
            if (!addend.first && at > 0) combine_range(tier, layout, terms, 0, at);
            return bad;
        }
        combine_range(tier, layout, terms, at, end);
        makers.advance(end);
    }
    if (checked && !given.advance(addend.from_bytes, check)) {
        if (!addend.first && where.plain > 0) combine_range(tier, layout, terms, 0, where.plain);
        return bad;
    }
    add_rest(tier, addend, where);
    makers.advance(addend.to_bytes);
    return -1;
}

// The checksum of a block in planes, as it grows: of whole superblocks, and then of what lies behind the last.
class FoldedBlock {
  public:
    // `whole_bytes` in superblocks. The object begins with no state: clear() or times() gives it one.
    explicit FoldedBlock(size_t whole_bytes) : before_(crc32c_after_zeros(~uint32_t{0}, whole_bytes)) {}

    void clear() { std::memset(state_, 0, sizeof state_); }
    void fold(const byte* data, size_t bytes) { plane_crc()->fold(state_, data, bytes); }

    // What a coefficient makes of the block, it makes of the state.
    FoldedBlock times(const ErasureTier& tier, byte factor) const {
        FoldedBlock made = *this;
        if (factor == 1) return made;
        const byte* from = state_;
        byte* to = made.state_;
        tier.combine_planes({&factor, &from, 1, &to, 1, false}, 0, kSuperblockBytes);
        return made;
    }

    uint32_t linear() const { return plane_crc()->finish(state_); }
    uint32_t crc() const { return ~(before_ ^ linear()); }

  private:
    uint32_t before_;  // what the inverted register at the beginning has become at the end
    alignas(kPlaneBytes) byte state_[kSuperblockBytes];
};

// A block of every symbol: each step is copied, checksummed and added up while it is in the nearest cache.
class CopiedBlock {
  public:
    CopiedBlock(const ErasureTier& tier, Code code, const Terms& terms, const Copies& copies, size_t block)
        : tier_(tier), code_(code), terms_(terms), copies_(copies), block_(block) {
        std::fill_n(data_, code.k, ~uint32_t{0});
        std::fill_n(parity_, code.m, ~uint32_t{0});
    }

    void run(size_t begin, size_t end) {
        for (size_t at = begin; at < end; at += kStepBytes) step(at, std::min(end, at + kStepBytes));
        store(copies_.data_words, data_);
        store(copies_.parity_words, parity_);
    }

  private:
    void step(size_t at, size_t end) {
        for (unsigned i = 0; i < code_.k; ++i) {
            const byte* from = terms_.from[i] + at;
            if (!copies_.data_words.empty()) data_[i] = crc_extend(data_[i], from, end - at);
            if (!copies_.to.empty()) copy_dense(copies_.to[i] + at, from, end - at, copies_.stores);
        }
        if (code_.m > 0) encode_range(tier_, code_.layout, terms_, at, end);
        if (copies_.parity_words.empty()) return;
        for (unsigned i = 0; i < code_.m; ++i) parity_[i] = crc_extend(parity_[i], terms_.to[i] + at, end - at);
    }

    void store(const std::vector<byte*>& words, const uint32_t* registers) const {
        for (size_t i = 0; i < words.size(); ++i) store_word(words[i] + 4 * block_, ~registers[i]);
    }

    const ErasureTier& tier_;
    Code code_;
    const Terms& terms_;
    const Copies& copies_;
    size_t block_;
    uint32_t data_[kSymbolsMax], parity_[kSymbolsMax];
};

// The same in planes, where checksums are folded while bytes are copied, and those of the parity are made from the
// data's states by the code itself.
class FoldedBlocks {
  public:
    FoldedBlocks(const ErasureTier& tier, Code code, const Terms& terms, const Copies& copies, size_t block)
        : tier_(tier), code_(code), terms_(terms), parity_terms_(terms), copies_(copies), block_(block) {
        parity_terms_.stream = copies.stores == Stores::non_temporal && begin_lines(terms);
        std::memset(states_, 0, size_t{code.k} * kSuperblockBytes);
    }

    void run(size_t begin, size_t end) {
        const size_t whole = begin + round_down(end - begin);
        for (size_t at = begin; at < whole; at += kCopyBytes) step(at, std::min(whole, at + kCopyBytes));
        if (whole < end) {
            for (size_t i = 0; i < copies_.to.size(); ++i) {
                std::memcpy(copies_.to[i] + whole, terms_.from[i] + whole, end - whole);
            }
            if (code_.m > 0) tier_.combine_bytes(terms_, whole, end);
        }
        const uint32_t before = crc32c_after_zeros(~uint32_t{0}, whole - begin);
        auto store = [&](byte* words, const byte* state, const byte* tail) {
            const uint32_t at_whole = before ^ plane_crc()->finish(state);
            store_word(words + 4 * block_, ~crc_extend(at_whole, tail, end - whole));
        };
        for (size_t i = 0; i < copies_.data_words.size(); ++i) {
            store(copies_.data_words[i], state(i), terms_.from[i] + whole);
        }
        if (copies_.parity_words.empty() || code_.m == 0) return;
        encode_states();
        for (size_t i = 0; i < code_.m; ++i) {
            store(copies_.parity_words[i], state(code_.k + i), terms_.to[i] + whole);
        }
    }

  private:
    byte* state(size_t symbol) { return states_ + symbol * kSuperblockBytes; }

    void step(size_t at, size_t end) {
        const bool non_temporal = copies_.stores == Stores::non_temporal;
        for (unsigned i = 0; i < code_.k; ++i) {
            const byte* from = terms_.from[i] + at;
            if (copies_.to.empty()) {
                plane_crc()->fold(state(i), from, end - at);
            } else {
                plane_crc()->fold_copying(state(i), from, copies_.to[i] + at, end - at, non_temporal);
            }
        }
        if (code_.m > 0) tier_.encode_planes(parity_terms_, at, end);
    }

    void encode_states() {
        const byte* from[kSymbolsMax];
        byte* to[kSymbolsMax];
        for (unsigned i = 0; i < code_.k; ++i) from[i] = state(i);
        for (unsigned i = 0; i < code_.m; ++i) to[i] = state(code_.k + i);
        tier_.encode_planes({nullptr, from, code_.k, to, code_.m, false}, 0, kSuperblockBytes);
    }

    const ErasureTier& tier_;
    Code code_;
    const Terms& terms_;
    Terms parity_terms_;
    const Copies& copies_;
    size_t block_;
    alignas(kPlaneBytes) byte states_[kSymbolsMax * kSuperblockBytes];
};

}  // namespace

const std::vector<const ErasureTier*>& erasure_tiers() {
    return tiers();
}

void force_erasure_tier(const std::string& name) {
    std::string known;
    for (auto at = tiers().begin(); at != tiers().end(); ++at) {
        if (name == (*at)->name) {
            std::rotate(tiers().begin(), at, at + 1);
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string((*at)->name);
    }
    throw std::invalid_argument("SNAPSHOTD_TIER is '" + name + "', which this machine cannot run: it is one of " +
                                known + ", or unset it to take the fastest");
}

uint32_t BlockCrcs::word(int64_t block) const noexcept {
    const byte* at = words + 4 * block;
    return uint32_t{at[0]} | uint32_t{at[1]} << 8 | uint32_t{at[2]} << 16 | uint32_t{at[3]} << 24;
}

int64_t first_bad_block(const byte* data, size_t bytes, BlockCrcs crcs) noexcept {
    int64_t bad = -1;
    Blocks(data, bytes, crcs.block_bytes).advance(bytes, [&](size_t block, uint32_t crc) {
        if (crc != crcs.word(static_cast<int64_t>(block))) bad = static_cast<int64_t>(block);
        return bad < 0;
    });
    return bad;
}

void make_crcs(const byte* data, size_t bytes, MadeCrcs made) noexcept {
    Blocks(data, bytes, made.block_bytes).advance(bytes, [&](size_t block, uint32_t crc) {
        store_word(made.words + 4 * block, crc);
        return true;
    });
}

int64_t accumulate(const ErasureTier& tier, Layout layout, const Addend& addend, BlockCrcs crcs,
                   const MadeCrcs* made) noexcept {
    const bool checked = crcs.words != nullptr;
    const size_t block_bytes = checked ? crcs.block_bytes : made != nullptr ? made->block_bytes : 0;
    const bool folds = plane_crc() != nullptr && layout == Layout::planes && block_bytes % kSuperblockBytes == 0;
    if (block_bytes == 0 || !folds) return accumulate_any(tier, layout, addend, crcs, made);

    const size_t blocks = cut(layout, addend).plain / block_bytes, done = blocks * block_bytes;
    const Terms terms{addend.factors, &addend.from, 1, addend.to, addend.outputs, !addend.first};
    auto take_back = [&](size_t bytes) {
        if (!addend.first && bytes > 0) tier.combine_planes(terms, 0, bytes);
    };
    FoldedBlock folded(block_bytes);
    for (size_t block = 0; block < blocks; ++block) {
        folded.clear();
        for (size_t at = block * block_bytes, end = at + block_bytes; at < end; at += kStepBytes) {
            const size_t stop = std::min(end, at + kStepBytes);
            folded.fold(addend.from + at, stop - at);
            tier.combine_planes(terms, at, stop);
        }
        if (checked && folded.crc() != crcs.word(static_cast<int64_t>(block))) {
            take_back((block + 1) * block_bytes);
            return static_cast<int64_t>(block);
        }
        for (unsigned i = 0; made != nullptr && i < addend.outputs; ++i) {
            if (made[i].words == nullptr) continue;
            byte* word = made[i].words + 4 * block;
            const FoldedBlock product = folded.times(tier, addend.factors[i]);
            store_word(word, addend.first ? product.crc() : load_word(word) ^ product.linear());
        }
    }
    if (done == addend.to_bytes) return -1;

    // The rest, which is no whole block.
    byte* to[kSymbolsMax];
    MadeCrcs rest_made[kSymbolsMax];
    for (unsigned i = 0; i < addend.outputs; ++i) {
        to[i] = addend.to[i] + done;
        if (made != nullptr)
            rest_made[i] = {made[i].words == nullptr ? nullptr : made[i].words + 4 * blocks, block_bytes};
    }
    const Addend rest{addend.from + done,     addend.from_bytes - done, addend.factors, to,
                      addend.to_bytes - done, addend.outputs,           addend.first};
    const BlockCrcs rest_crcs{checked ? crcs.words + 4 * blocks : nullptr, block_bytes};
    const int64_t bad = accumulate_any(tier, layout, rest, rest_crcs, made == nullptr ? nullptr : rest_made);
    if (bad < 0) return -1;
    take_back(done);
    return bad + static_cast<int64_t>(blocks);
}

void encode(const ErasureTier& tier, Code code, const Symbols& symbols, int threads) {
    // Horner's rule needs no coefficients, only what lies behind the last superblock does.
    const bool planes_only = code.layout == Layout::planes && symbols.bytes % kSuperblockBytes == 0;
    const Matrix rows = planes_only ? Matrix(0, 0) : coefficients(code);
    Terms terms = terms_of(planes_only ? nullptr : rows[0], symbols);
    if (planes_only) {
        terms.stream = Stores::non_temporal == stores_for(terms, symbols.bytes, tier.encode_planes);
    }
    in_pieces(terms, symbols.bytes, tile_of(code.layout, code.k), threads, [&](size_t begin, size_t end) {
        encode_range(tier, code.layout, terms, begin, end);
        if (terms.stream) store_fence();
    });
}

void combine(const ErasureTier& tier, Layout layout, const byte* rows, const Symbols& symbols, int threads) {
    Terms terms = terms_of(rows, symbols);
    if (layout == Layout::planes) {
        terms.stream = Stores::non_temporal == stores_for(terms, symbols.bytes, tier.combine_planes);
    }
    in_pieces(terms, symbols.bytes, tile_of(layout, symbols.inputs), threads, [&](size_t begin, size_t end) {
        combine_range(tier, layout, terms, begin, end);
        if (terms.stream) store_fence();
    });
}

void combine_piece(const ErasureTier& tier, Layout layout, const Terms& terms, size_t bytes) noexcept {
    combine_range(tier, layout, terms, 0, bytes);
}

void encode_copying(const ErasureTier& tier, Code code, const Symbols& symbols, const Copies& copies, int threads) {
    const Matrix rows = coefficients(code);
    const Terms terms = terms_of(code.m == 0 ? nullptr : rows[0], symbols);
    const size_t block_bytes = copies.block_bytes;
    const bool summed = !copies.data_words.empty() || !copies.parity_words.empty();
    const bool folds = summed && plane_crc() != nullptr && code.layout == Layout::planes;
    parallel_for(threads, (symbols.bytes + block_bytes - 1) / block_bytes, [&](uint64_t index) {
        const size_t begin = index * block_bytes, end = std::min<size_t>(symbols.bytes, begin + block_bytes);
        if (folds) {
            FoldedBlocks(tier, code, terms, copies, index).run(begin, end);
        } else {
            CopiedBlock(tier, code, terms, copies, index).run(begin, end);
        }
        if (copies.stores == Stores::non_temporal) store_fence();
    });
}

}  // namespace snapshotd
