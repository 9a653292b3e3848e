// The field GF(2^8) with the polynomial x^8 + x^4 + x^3 + x^2 + 1 (0x11D), all of it computed by the compiler. Adding
// is XOR. Needs nothing of the host, so that device code can include it.
#pragma once

#include <array>

#include "common.hpp"

namespace snapshotd::gf256 {

constexpr unsigned kPolynomial = 0x11D;

struct Logarithms {
    std::array<byte, 510> power;  // power[i] is 2^i; twice round, so that a sum of two logarithms needs no remainder
    std::array<byte, 256> log;    // log[0] means nothing
};

constexpr Logarithms make_logarithms() {
    Logarithms made{};
    unsigned value = 1;
    for (unsigned i = 0; i < 255; ++i) {
        made.power[i] = made.power[i + 255] = static_cast<byte>(value);
        made.log[value] = static_cast<byte>(i);
        value <<= 1;
        if (value > 0xFF) value ^= kPolynomial;
    }
    return made;
}

inline constexpr Logarithms kLogarithms = make_logarithms();

constexpr byte multiply(byte a, byte b) {
    if (a == 0 || b == 0) return 0;
    return kLogarithms.power[unsigned{kLogarithms.log[a]} + kLogarithms.log[b]];
}

// Of anything but 0.
constexpr byte inverse(byte a) {
    return kLogarithms.power[255u - kLogarithms.log[a]];
}

// c * b = low[b & 15] ^ high[b >> 4]: two tables small enough for a byte shuffle.
struct alignas(32) Halves {
    std::array<byte, 16> low, high;
};

constexpr std::array<Halves, 256> make_halves() {
    std::array<Halves, 256> made{};
    for (unsigned c = 0; c < 256; ++c) {
        for (unsigned nibble = 0; nibble < 16; ++nibble) {
            made[c].low[nibble] = multiply(static_cast<byte>(c), static_cast<byte>(nibble));
            made[c].high[nibble] = multiply(static_cast<byte>(c), static_cast<byte>(nibble << 4));
        }
    }
    return made;
}

inline constexpr std::array<Halves, 256> kHalves = make_halves();

constexpr bool every_inverse_holds() {
    for (unsigned a = 1; a < 256; ++a) {
        if (multiply(static_cast<byte>(a), inverse(static_cast<byte>(a))) != 1) return false;
    }
    return true;
}

// Multiplying by a constant is linear over bits: which bits of the factor's partner add up to bit `bit` of the product.
// In planes, one bit of many elements each, these are the planes to add.
constexpr byte bits_into(byte factor, unsigned bit) {
    unsigned mask = 0;
    for (unsigned from = 0; from < 8; ++from) {
        mask |= ((multiply(factor, static_cast<byte>(1u << from)) >> bit) & 1u) << from;
    }
    return static_cast<byte>(mask);
}

using BitMatrix = std::array<byte, 8>;  // bits_into(factor, 0 .. 7)

constexpr std::array<BitMatrix, 256> make_bit_matrices() {
    std::array<BitMatrix, 256> made{};
    for (unsigned factor = 0; factor < 256; ++factor) {
        for (unsigned bit = 0; bit < 8; ++bit) made[factor][bit] = bits_into(static_cast<byte>(factor), bit);
    }
    return made;
}

inline constexpr std::array<BitMatrix, 256> kBitMatrices = make_bit_matrices();

// 2 to any power.
constexpr byte power_of_two(int exponent) {
    return kLogarithms.power[static_cast<unsigned>((exponent % 255 + 255) % 255)];
}

static_assert(multiply(0x80, 2) == (kPolynomial & 0xFF), "x^8 is reduced by the polynomial");
static_assert(kLogarithms.power[255] == 1 && every_inverse_holds(), "2 generates the field, which has inverses");

}  // namespace snapshotd::gf256
