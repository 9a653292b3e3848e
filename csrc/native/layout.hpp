// How the bytes of a symbol are read as elements of the field.
//
// `planes`: a superblock of 512 bytes is eight planes of 64 bytes, and plane p holds bit p of 512 elements. No byte is
// moved for it, any data is valid; multiplying by a constant becomes a few XORs of planes. What lies behind the last
// whole superblock of a symbol is read as `bytes`.
// `bytes`: each byte is an element.
#pragma once

#include "common.hpp"

namespace snapshotd {

enum class Layout { planes, bytes };

constexpr size_t kPlaneBytes = 64;
constexpr size_t kSuperblockBytes = 8 * kPlaneBytes;

// Row r of the code in planes takes 2^(kRowExponents[r] * i) of data symbol i. Any square part of these rows is regular
// for three of them and all 255 powers of two, and for all four up to column 20 (tests/unit/test_codec.py: every part).
constexpr int kRowExponents[] = {0, 1, -1, 2};
constexpr unsigned kPlaneRowsMax = 4;
constexpr unsigned kFourRowsColumnsMax = 21;

constexpr bool planes_can(uint64_t k, uint64_t m) {
    return m < kPlaneRowsMax || (m == kPlaneRowsMax && k <= kFourRowsColumnsMax);
}

}  // namespace snapshotd
