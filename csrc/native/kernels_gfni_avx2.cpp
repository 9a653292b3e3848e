#if defined(__x86_64__)

#include <immintrin.h>

#define SNAPSHOTD_TARGET __attribute__((target("avx2,gfni")))

#include "kernels_bytes.hpp"
#include "kernels_gfni.hpp"

namespace snapshotd {

namespace {

struct GfniAvx2 {
    using Vector = __m256i;
    using Operand = __m256i;
    using Factor = __m256i;
    static constexpr size_t kBytes = 32;

    SNAPSHOTD_INLINE Vector load(const byte* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    SNAPSHOTD_INLINE void store(byte* to, Vector value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
    SNAPSHOTD_INLINE Vector zero() { return _mm256_setzero_si256(); }
    SNAPSHOTD_INLINE Operand operand(Vector value) { return value; }
    SNAPSHOTD_INLINE Factor factor(byte value) { return _mm256_set1_epi64x(static_cast<long long>(kAffine[value])); }
    SNAPSHOTD_INLINE Vector add_product(Vector sum, Operand operand, Factor factor) {
        return _mm256_xor_si256(sum, _mm256_gf2p8affine_epi64_epi8(operand, factor, 0));
    }
};

bool supports_gfni_avx2() {
    return kErasureAvx2.supported() && __builtin_cpu_supports("gfni");
}

void encode_planes(const Terms& terms, size_t begin, size_t end) {
    kErasureAvx2.encode_planes(terms, begin, end);
}

void combine_planes(const Terms& terms, size_t begin, size_t end) {
    kErasureAvx2.combine_planes(terms, begin, end);
}

}  // namespace

const ErasureTier kErasureGfniAvx2 = {"gfni-avx2", supports_gfni_avx2, encode_planes, combine_planes,
                                      ByteKernels<GfniAvx2>::combine};

}  // namespace snapshotd

#endif
