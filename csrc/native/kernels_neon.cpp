// NEON, which every 64-bit ARM has: vectors of 16 bytes, 32 registers, table look-ups of 16 bytes.
#if defined(__aarch64__)

#include <arm_neon.h>

#define SNAPSHOTD_TARGET

#include "kernels_bytes.hpp"
#include "kernels_planes.hpp"

namespace snapshotd {

namespace {

struct Neon {
    using Vector = uint8x16_t;
    static constexpr size_t kBytes = 16;
    static constexpr unsigned kRowsAtOnce = 2;

    SNAPSHOTD_INLINE Vector load(const byte* from) { return vld1q_u8(from); }
    SNAPSHOTD_INLINE void store(byte* to, Vector value) { vst1q_u8(to, value); }
    SNAPSHOTD_INLINE void stream(byte* to, Vector value) { store(to, value); }  // it has none that is faster
    SNAPSHOTD_INLINE Vector zero() { return vdupq_n_u8(0); }
    SNAPSHOTD_INLINE Vector add(Vector a, Vector b) { return veorq_u8(a, b); }
    SNAPSHOTD_INLINE Vector add3(Vector a, Vector b, Vector c) { return veorq_u8(veorq_u8(a, b), c); }

    struct Operand {
        Vector low, high;
    };
    struct Factor {
        Vector low, high;
    };
    SNAPSHOTD_INLINE Operand operand(Vector value) { return {vandq_u8(value, vdupq_n_u8(15)), vshrq_n_u8(value, 4)}; }
    SNAPSHOTD_INLINE Factor factor(byte value) {
        const gf256::Halves& halves = gf256::kHalves[value];
        return {vld1q_u8(halves.low.data()), vld1q_u8(halves.high.data())};
    }
    SNAPSHOTD_INLINE Vector add_product(Vector sum, Operand operand, Factor factor) {
        return add3(sum, vqtbl1q_u8(factor.low, operand.low), vqtbl1q_u8(factor.high, operand.high));
    }
};

bool supports_neon() {
    return true;
}

}  // namespace

const ErasureTier kErasureNeon = {"neon", supports_neon, Planes<Neon>::encode, Planes<Neon>::combine,
                                  ByteKernels<Neon>::combine};

}  // namespace snapshotd

#endif
