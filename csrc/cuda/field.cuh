// Arithmetic of the `planes` and `bytes` layouts over GF(2^8)/0x11D, on whatever words a thread holds. Integer only, no
// inline PTX, no tables; also compiled for the host, where the tests prove every network below for all its inputs.
//
// Layout `planes`: 512 bytes of a symbol are eight planes of 64 bytes, and plane p holds bit p of 512 field elements.
// A thread holds one column of it: the same bytes of all eight planes. Multiplying by x renames planes and adds the one
// that falls out to three others.
#pragma once

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#ifdef __CUDACC__
#define SNAPSHOTD_FN __host__ __device__ __forceinline__
#else
#define SNAPSHOTD_FN inline __attribute__((always_inline))
#endif

namespace snapshotd::gpu {

constexpr int kPlanes = 8;
constexpr int kPlaneBytes = 64;
constexpr int kSuperblockBytes = kPlanes * kPlaneBytes;
constexpr int kRowsMax = 4;
constexpr int kInputsMax = 255;
constexpr int kSpecialisedMax = 16;

// The exponents of the parity rows: row r takes 2^(kExponents[r] * i) of data symbol i.
constexpr int kExponents[kRowsMax] = {0, 1, -1, 2};

// --- one Horner step, a <- a * 2^(exponent of ROW) + d, of one word of eight planes

template <int ROW, typename Word>
SNAPSHOTD_FN void horner(Word (&a)[kPlanes], const Word (&d)[kPlanes]) {
    static_assert(ROW >= 0 && ROW < kRowsMax, "there are four rows");
    if (ROW == 0) {
        for (int p = 0; p < kPlanes; ++p) a[p] ^= d[p];
    } else if (ROW == 1) {  // x^8 = x^4 + x^3 + x^2 + 1
        const Word top = a[7];
        a[7] = a[6] ^ d[7];
        a[6] = a[5] ^ d[6];
        a[5] = a[4] ^ d[5];
        a[4] = a[3] ^ top ^ d[4];
        a[3] = a[2] ^ top ^ d[3];
        a[2] = a[1] ^ top ^ d[2];
        a[1] = a[0] ^ d[1];
        a[0] = top ^ d[0];
    } else if (ROW == 2) {  // 1/x = x^7 + x^3 + x^2 + x
        const Word low = a[0];
        a[0] = a[1] ^ d[0];
        a[1] = a[2] ^ low ^ d[1];
        a[2] = a[3] ^ low ^ d[2];
        a[3] = a[4] ^ low ^ d[3];
        a[4] = a[5] ^ d[4];
        a[5] = a[6] ^ d[5];
        a[6] = a[7] ^ d[6];
        a[7] = low ^ d[7];
    } else {  // two steps of row 1 in one
        const Word six = a[6], seven = a[7], both = six ^ seven;
        a[7] = a[5] ^ d[7];
        a[6] = a[4] ^ d[6];
        a[5] = a[3] ^ seven ^ d[5];
        a[4] = a[2] ^ both ^ d[4];
        a[3] = a[1] ^ both ^ d[3];
        a[2] = a[0] ^ six ^ d[2];
        a[1] = seven ^ d[1];
        a[0] = six ^ d[0];
    }
}

// a <- a * x
template <typename Word>
SNAPSHOTD_FN void times_x(Word (&a)[kPlanes]) {
    const Word top = a[7];
    a[7] = a[6];
    a[6] = a[5];
    a[5] = a[4];
    a[4] = a[3] ^ top;
    a[3] = a[2] ^ top;
    a[2] = a[1] ^ top;
    a[1] = a[0];
    a[0] = top;
}

// All ones where bit `bit` of the factor is set. The factor is the same for all threads, and so is the mask.
template <typename Word>
SNAPSHOTD_FN Word mask_of(uint32_t factor, int bit) {
    return static_cast<Word>(0u - ((factor >> bit) & 1u));
}

// --- layout `bytes`: four elements in a word

SNAPSHOTD_FN uint32_t bytes_times_x(uint32_t a) {
    const uint32_t carry = (a >> 7) & 0x01010101u;
    return ((a & 0x7F7F7F7Fu) << 1) ^ (carry * 0x1Du);
}

}  // namespace snapshotd::gpu
