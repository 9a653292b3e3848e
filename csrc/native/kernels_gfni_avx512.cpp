#if defined(__x86_64__)

#include <immintrin.h>

#define SNAPSHOTD_TARGET __attribute__((target("avx512f,avx512bw,gfni")))

#include "kernels_bytes.hpp"
#include "kernels_gfni.hpp"

namespace snapshotd {

namespace {

struct GfniAvx512 {
    using Vector = __m512i;
    using Operand = __m512i;
    using Factor = __m512i;
    static constexpr size_t kBytes = 64;

    SNAPSHOTD_INLINE Vector load(const byte* from) { return _mm512_loadu_si512(from); }
    SNAPSHOTD_INLINE void store(byte* to, Vector value) { _mm512_storeu_si512(to, value); }
    SNAPSHOTD_INLINE Vector zero() { return _mm512_setzero_si512(); }
    SNAPSHOTD_INLINE Operand operand(Vector value) { return value; }
    SNAPSHOTD_INLINE Factor factor(byte value) { return _mm512_set1_epi64(static_cast<long long>(kAffine[value])); }
    SNAPSHOTD_INLINE Vector add_product(Vector sum, Operand operand, Factor factor) {
        return _mm512_xor_si512(sum, _mm512_gf2p8affine_epi64_epi8(operand, factor, 0));
    }
};

bool supports_gfni_avx512() {
    return kErasureAvx512.supported() && __builtin_cpu_supports("gfni");
}

void encode_planes(const Terms& terms, size_t begin, size_t end) {
    kErasureAvx512.encode_planes(terms, begin, end);
}

void combine_planes(const Terms& terms, size_t begin, size_t end) {
    kErasureAvx512.combine_planes(terms, begin, end);
}

}  // namespace

const ErasureTier kErasureGfniAvx512 = {"gfni-avx512", supports_gfni_avx512, encode_planes, combine_planes,
                                        ByteKernels<GfniAvx512>::combine};

}  // namespace snapshotd

#endif
