// The erasure code over bytes: what is checked, multiplied and added, in pieces that stay in the caches. Outputs
// overlap nothing (the bindings see to it); no call allocates for the bytes it moves.
#pragma once

#include <vector>

#include "copy.hpp"
#include "kernels.hpp"
#include "matrix.hpp"

namespace snapshotd {

// The tiers of this machine, the one in use first, then fastest first; `base` is always among them.
const std::vector<const ErasureTier*>& erasure_tiers();

// Called once, when the module is imported: takes the named tier instead of the fastest. std::invalid_argument where
// this machine cannot run it.
void force_erasure_tier(const std::string& name);

// Little-endian CRC32C words of blocks that lie one behind the other; the last block may be short. None: 0 bytes each.
struct BlockCrcs {
    const byte* words = nullptr;
    size_t block_bytes = 0;

    uint32_t word(int64_t block) const noexcept;
};
struct MadeCrcs {
    byte* words = nullptr;
    size_t block_bytes = 0;
};

// Index of the first block that differs from its checksum, -1 where none does.
int64_t first_bad_block(const byte* data, size_t bytes, BlockCrcs crcs) noexcept;

// The checksums of all blocks.
void make_crcs(const byte* data, size_t bytes, MadeCrcs made) noexcept;

// One symbol, or a part of it that begins with a superblock, on its way into some outputs of `to_bytes` each.
struct Addend {
    const byte* from;
    size_t from_bytes;  // at most to_bytes; what it lacks is zero
    const byte* factors;
    byte* const* to;
    size_t to_bytes;
    unsigned outputs;
    bool first;  // to = factor * from, else to += factor * from
};

// In one pass: each output takes its multiple, each block of `from` is checked where there are checksums for it, and
// each output's own are brought up to date where there is room for them (made[i].words may be null): in, those of the
// output as it is, unless `first`; out, those of the sum. The index of the first bad block, else -1. After a bad block
// the outputs are what they were, or nothing of use where `first`, and made checksums are nothing of use.
int64_t accumulate(const ErasureTier& tier, Layout layout, const Addend& addend, BlockCrcs crcs,
                   const MadeCrcs* made) noexcept;

// The symbols of one call, of `bytes` bytes each; the caller holds the lists.
struct Symbols {
    const byte* const* from;
    unsigned inputs;
    byte* const* to;
    unsigned outputs;
    size_t bytes;
};

// The code.m parity rows of code.k data symbols.
void encode(const ErasureTier& tier, Code code, const Symbols& symbols, int threads);

// to[i] = the sum of rows[i * inputs + j] * from[j]: decoding by `recovery`, in the code's layout.
void combine(const ErasureTier& tier, Layout layout, const byte* rows, const Symbols& symbols, int threads);

// The same for one piece that stays in the caches: nothing is allocated, no thread begins.
void combine_piece(const ErasureTier& tier, Layout layout, const Terms& terms, size_t bytes) noexcept;

// What a copy makes besides: each data symbol at another place, and checksums of its blocks and of the parity's.
struct Copies {
    std::vector<byte*> to;            // one for each data symbol, or none at all
    std::vector<byte*> data_words;    // CRC32C words of each data symbol, or none at all
    std::vector<byte*> parity_words;  // of each parity row, or none at all
    size_t block_bytes;               // whole superblocks
    Stores stores;
};

// In one pass over the data: copy, checksums and parity.
void encode_copying(const ErasureTier& tier, Code code, const Symbols& symbols, const Copies& copies, int threads);

}  // namespace snapshotd
