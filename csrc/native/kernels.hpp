// The loops of the erasure code: one table of tiers, one of which is chosen when the module is imported. A further tier
// is a file of its own with one more such table (docs/codec.md tells how); `base` is the oracle.
#pragma once

#include "layout.hpp"

namespace snapshotd {

// Sums of products: output i = (what stands there, where `add`) + the sum of factors[i * inputs + j] * from[j].
struct Terms {
    const byte* factors;
    const byte* const* from;
    unsigned inputs;
    byte* const* to;
    unsigned outputs;
    bool add;
    bool stream = false;  // in planes: non-temporal stores, for outputs that each begin a cache line
};

// Each works on the bytes [begin, end) of every symbol, takes buffers of any alignment of which no output overlaps
// anything, and touches no byte beyond. For `planes` these are whole superblocks.
struct ErasureTier {
    const char* name;
    bool (*supported)();
    // The first 1 to 4 parity rows of the code in planes, by Horner's rule: without factors, and never with `add`.
    void (*encode_planes)(const Terms& terms, size_t begin, size_t end);
    void (*combine_planes)(const Terms& terms, size_t begin, size_t end);
    void (*combine_bytes)(const Terms& terms, size_t begin, size_t end);
};

extern const ErasureTier kErasureBase;
#if defined(__x86_64__)
extern const ErasureTier kErasureAvx2, kErasureAvx512, kErasureGfniAvx2, kErasureGfniAvx512;
#elif defined(__aarch64__)
extern const ErasureTier kErasureNeon;
#endif

}  // namespace snapshotd
