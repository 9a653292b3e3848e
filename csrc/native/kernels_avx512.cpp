// AVX-512: one instruction adds three planes of 64 bytes, and 32 registers hold two parity rows.
#if defined(__x86_64__)

// GCC's own headers hand an undefined vector to masked forms that ignore it, and warn of it when inlined here.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>

#define SNAPSHOTD_TARGET __attribute__((target("avx512f,avx512bw")))

#include "kernels_bytes.hpp"
#include "kernels_planes.hpp"

namespace snapshotd {

namespace {

struct Avx512 {
    using Vector = __m512i;
    static constexpr size_t kBytes = 64;
    static constexpr unsigned kRowsAtOnce = 2;

    SNAPSHOTD_INLINE Vector load(const byte* from) { return _mm512_loadu_si512(from); }
    SNAPSHOTD_INLINE void store(byte* to, Vector value) { _mm512_storeu_si512(to, value); }
    SNAPSHOTD_INLINE void stream(byte* to, Vector value) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value); }
    SNAPSHOTD_INLINE Vector zero() { return _mm512_setzero_si512(); }
    SNAPSHOTD_INLINE Vector add(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
    SNAPSHOTD_INLINE Vector add3(Vector a, Vector b, Vector c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

    struct Operand {
        Vector low, high;
    };
    struct Factor {
        Vector low, high;
    };
    SNAPSHOTD_INLINE Operand operand(Vector value) {
        const Vector nibble = _mm512_set1_epi8(15);
        return {_mm512_and_si512(value, nibble), _mm512_and_si512(_mm512_srli_epi64(value, 4), nibble)};
    }
    SNAPSHOTD_INLINE Vector in_all_lanes(const std::array<byte, 16>& table) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table.data())));
    }
    SNAPSHOTD_INLINE Factor factor(byte value) {
        const gf256::Halves& halves = gf256::kHalves[value];
        return {in_all_lanes(halves.low), in_all_lanes(halves.high)};
    }
    SNAPSHOTD_INLINE Vector add_product(Vector sum, Operand operand, Factor factor) {
        return add3(sum, _mm512_shuffle_epi8(factor.low, operand.low), _mm512_shuffle_epi8(factor.high, operand.high));
    }
};

bool supports_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}

}  // namespace

const ErasureTier kErasureAvx512 = {"avx512", supports_avx512, Planes<Avx512>::encode, Planes<Avx512>::combine,
                                    ByteKernels<Avx512>::combine};

}  // namespace snapshotd

#endif
