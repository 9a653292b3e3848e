// The encode kernels as the device knows them: planes_encode_K_M for k <= 16, planes_encode_any_M beyond.
#pragma once

#include "planes.cuh"

// SNAPSHOTD_FEW builds a few of each family only: for mutants, of which many are built.
#ifdef SNAPSHOTD_FEW
#define SNAPSHOTD_EACH_K(DO, M) DO(1, M) DO(3, M) DO(6, M)
#else
#define SNAPSHOTD_EACH_K(DO, M) \
    DO(1, M)                    \
    DO(2, M)                    \
    DO(3, M)                    \
    DO(4, M)                    \
    DO(5, M)                    \
    DO(6, M) DO(7, M) DO(8, M) DO(9, M) DO(10, M) DO(11, M) DO(12, M) DO(13, M) DO(14, M) DO(15, M) DO(16, M)
#endif
#ifndef SNAPSHOTD_EACH_K_M  // NVRTC compiles one at a time
#define SNAPSHOTD_EACH_K_M(DO) \
    SNAPSHOTD_EACH_K(DO, 1) SNAPSHOTD_EACH_K(DO, 2) SNAPSHOTD_EACH_K(DO, 3) SNAPSHOTD_EACH_K(DO, 4)
#endif
#ifndef SNAPSHOTD_EACH_ANY
#define SNAPSHOTD_EACH_ANY(DO) DO(1) DO(2) DO(3) DO(4)
#endif

#define SNAPSHOTD_ENCODE(K, M)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128)                                                            \
        planes_encode_##K##_##M(const __grid_constant__ snapshotd::gpu::Symbols symbols, uint64_t superblocks) { \
        snapshotd::gpu::encode_columns<K, M>(symbols, superblocks, snapshotd::gpu::share_of_thread());           \
    }
SNAPSHOTD_EACH_K_M(SNAPSHOTD_ENCODE)
#undef SNAPSHOTD_ENCODE

#define SNAPSHOTD_ENCODE_ANY(M)                                                                                    \
    extern "C" __global__ void __launch_bounds__(128)                                                              \
        planes_encode_any_##M(const __grid_constant__ snapshotd::gpu::ManySymbols symbols, uint64_t superblocks) { \
        snapshotd::gpu::encode_any_columns<M>(symbols, superblocks, snapshotd::gpu::share_of_thread());            \
    }
SNAPSHOTD_EACH_ANY(SNAPSHOTD_ENCODE_ANY)
#undef SNAPSHOTD_ENCODE_ANY
