// GFNI: one instruction multiplies every byte by a matrix of 8 x 8 bits, which is any coefficient of any field of 256
// elements (its own multiplication knows only the field of AES). In planes there is nothing to multiply, so there these
// tiers use the loops of those without it.
#pragma once

#include "gf256.hpp"

namespace snapshotd {

// The instruction reads a matrix from its last row: byte 7 - i says which bits add up to bit i.
constexpr std::array<uint64_t, 256> make_affine() {
    std::array<uint64_t, 256> made{};
    for (unsigned factor = 0; factor < 256; ++factor) {
        for (unsigned bit = 0; bit < 8; ++bit) {
            made[factor] |= uint64_t{gf256::kBitMatrices[factor][bit]} << (8 * (7 - bit));
        }
    }
    return made;
}

inline constexpr std::array<uint64_t, 256> kAffine = make_affine();

}  // namespace snapshotd
