// The tier that runs everywhere, straight from the tables: the oracle of all others.
#include <cstring>

#include "gf256.hpp"
#include "kernels.hpp"

namespace snapshotd {

namespace {

bool always() {
    return true;
}

void add_plane(byte* to, const byte* from) {
    for (size_t i = 0; i < kPlaneBytes; ++i) to[i] ^= from[i];
}

void add_product_in_planes(byte* to, const byte* from, byte factor) {
    for (unsigned plane = 0; plane < 8; ++plane) {
        const unsigned planes = gf256::kBitMatrices[factor][plane];
        for (unsigned source = 0; source < 8; ++source) {
            if ((planes >> source) & 1) add_plane(to + plane * kPlaneBytes, from + source * kPlaneBytes);
        }
    }
}

void combine_planes(const Terms& terms, size_t begin, size_t end) {
    for (size_t at = begin; at < end; at += kSuperblockBytes) {
        for (unsigned i = 0; i < terms.outputs; ++i) {
            if (!terms.add) std::memset(terms.to[i] + at, 0, kSuperblockBytes);
            for (unsigned j = 0; j < terms.inputs; ++j) {
                add_product_in_planes(terms.to[i] + at, terms.from[j] + at, terms.factors[i * terms.inputs + j]);
            }
        }
    }
}

// By the coefficients, so that it checks Horner's rule in the other tiers.
void encode_planes(const Terms& terms, size_t begin, size_t end) {
    byte factors[kPlaneRowsMax * 255];
    for (unsigned i = 0; i < terms.outputs; ++i) {
        for (unsigned j = 0; j < terms.inputs; ++j) {
            factors[i * terms.inputs + j] = gf256::power_of_two(kRowExponents[i] * static_cast<int>(j));
        }
    }
    combine_planes({factors, terms.from, terms.inputs, terms.to, terms.outputs, false}, begin, end);
}

void combine_bytes(const Terms& terms, size_t begin, size_t end) {
    for (unsigned i = 0; i < terms.outputs; ++i) {
        byte* to = terms.to[i];
        if (!terms.add) std::memset(to + begin, 0, end - begin);
        for (unsigned j = 0; j < terms.inputs; ++j) {
            const gf256::Halves& halves = gf256::kHalves[terms.factors[i * terms.inputs + j]];
            const byte* from = terms.from[j];
            for (size_t at = begin; at < end; ++at) to[at] ^= halves.low[from[at] & 15] ^ halves.high[from[at] >> 4];
        }
    }
}

}  // namespace

const ErasureTier kErasureBase = {"base", always, encode_planes, combine_planes, combine_bytes};

}  // namespace snapshotd
