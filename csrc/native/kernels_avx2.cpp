// AVX2. In bytes, a byte shuffle looks up 32 nibbles at once in a table of 16 products (Plank, Greenan, Miller:
// "Screaming Fast Galois Field Arithmetic", FAST 2013).
#if defined(__x86_64__)

#include <immintrin.h>

#define SNAPSHOTD_TARGET __attribute__((target("avx2")))

#include "kernels_bytes.hpp"
#include "kernels_planes.hpp"

namespace snapshotd {

namespace {

struct Avx2 {
    using Vector = __m256i;
    static constexpr size_t kBytes = 32;
    static constexpr unsigned kRowsAtOnce = 1;  // of 16 registers a row's planes take 8

    SNAPSHOTD_INLINE Vector load(const byte* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    SNAPSHOTD_INLINE void store(byte* to, Vector value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
    SNAPSHOTD_INLINE void stream(byte* to, Vector value) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), value); }
    SNAPSHOTD_INLINE Vector zero() { return _mm256_setzero_si256(); }
    SNAPSHOTD_INLINE Vector add(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
    SNAPSHOTD_INLINE Vector add3(Vector a, Vector b, Vector c) { return add(add(a, b), c); }

    struct Operand {
        Vector low, high;
    };
    struct Factor {
        Vector low, high;
    };
    SNAPSHOTD_INLINE Operand operand(Vector value) {
        const Vector nibble = _mm256_set1_epi8(15);
        return {_mm256_and_si256(value, nibble), _mm256_and_si256(_mm256_srli_epi64(value, 4), nibble)};
    }
    SNAPSHOTD_INLINE Vector in_both_lanes(const std::array<byte, 16>& table) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.data())));
    }
    SNAPSHOTD_INLINE Factor factor(byte value) {
        const gf256::Halves& halves = gf256::kHalves[value];
        return {in_both_lanes(halves.low), in_both_lanes(halves.high)};
    }
    SNAPSHOTD_INLINE Vector add_product(Vector sum, Operand operand, Factor factor) {
        return add3(sum, _mm256_shuffle_epi8(factor.low, operand.low), _mm256_shuffle_epi8(factor.high, operand.high));
    }
};

bool supports_avx2() {
    return __builtin_cpu_supports("avx2");
}

}  // namespace

const ErasureTier kErasureAvx2 = {"avx2", supports_avx2, Planes<Avx2>::encode, Planes<Avx2>::combine,
                                  ByteKernels<Avx2>::combine};

}  // namespace snapshotd

#endif
