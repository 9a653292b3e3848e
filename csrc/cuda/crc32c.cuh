// CRC32C of each block of a buffer, one block of threads for each, in one coalesced pass.
//
// Thread t takes the vectors t, t + T, t + 2T, ... and keeps one remainder for each of their four words: going on to
// the next vector multiplies it by x^(bits in T vectors), four table look-ups. At the end the threads' remainders are
// brought to the block's end and added, pair by pair. Zeros before a message change no remainder, so a first round that
// is not full is padded at its front.
#pragma once

#include "memory.cuh"

namespace snapshotd::gpu {

constexpr int kCrcThreads = 256;
constexpr uint32_t kCrcPolynomial = 0x82F63B78u;  // reflected: bit 31 is x^0

SNAPSHOTD_FN constexpr uint32_t crc_times_x(uint32_t a) {
    return (a >> 1) ^ ((a & 1u) * kCrcPolynomial);
}

// x^bits modulo the polynomial.
SNAPSHOTD_FN constexpr uint32_t crc_power(uint64_t bits) {
    uint32_t a = 0x80000000u;
    for (uint64_t i = 0; i < bits; ++i) a = crc_times_x(a);
    return a;
}

template <uint32_t FACTOR>
SNAPSHOTD_FN uint32_t crc_times(uint32_t a) {
    uint32_t product = 0, power = FACTOR;
#pragma unroll
    for (int bit = 31; bit >= 0; --bit) {
        product ^= power & (0u - ((a >> bit) & 1u));
        power = crc_times_x(power);
    }
    return product;
}

// One byte more, bit by bit: for the few bytes behind the last vector.
SNAPSHOTD_FN uint32_t crc_extend_byte(uint32_t state, uint8_t value) {
    state ^= value;
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) state = crc_times_x(state);
    return state;
}

#ifdef __CUDACC__

constexpr uint32_t kNextVector = crc_power(uint64_t{kCrcThreads} * 16 * 8);
constexpr uint32_t kNextWord = crc_power(32);

template <bool ALIGNED>
__device__ __forceinline__ Wide load_vector(const uint8_t* from) {
    if constexpr (ALIGNED) {
        return load(reinterpret_cast<const Wide*>(from));
    } else {
        Wide v;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            v.word[w] = 0;
#pragma unroll
            for (int b = 0; b < 4; ++b) v.word[w] |= uint32_t{load(from + 4 * w + b)} << (8 * b);
        }
        return v;
    }
}

__device__ __forceinline__ uint32_t next_vector(const uint32_t (&table)[4][256], uint32_t a) {
    return table[0][a & 255u] ^ table[1][(a >> 8) & 255u] ^ table[2][(a >> 16) & 255u] ^ table[3][a >> 24];
}

// The remainder of two neighbours: SPAN vectors lie between the ends of what they hold.
template <int SPAN>
__device__ __forceinline__ uint32_t join(uint32_t mine, int lanes) {
    constexpr uint32_t shift = crc_power(uint64_t{SPAN} * 16 * 8);
    return crc_times<shift>(mine) ^ __shfl_down_sync(0xFFFFFFFFu, mine, lanes);
}

template <bool ALIGNED>
__device__ __forceinline__ void crc32c_of_blocks(const uint8_t* data, uint64_t bytes, uint64_t block_bytes,
                                                 uint32_t* crcs) {
    __shared__ uint32_t table[4][256];
    __shared__ uint32_t partial[kCrcThreads / 32];
    const int t = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int b = 0; b < 4; ++b) table[b][t] = crc_times<kNextVector>(static_cast<uint32_t>(t) << (8 * b));
    __syncthreads();
    for (uint64_t block = blockIdx.x; block * block_bytes < bytes; block += gridDim.x) {
        const uint8_t* from = data + block * block_bytes;
        const uint64_t left = bytes - block * block_bytes;
        const uint64_t length = left < block_bytes ? left : block_bytes;
        const uint64_t vectors = length / 16, rounds = (vectors + kCrcThreads - 1) / kCrcThreads;
        const uint64_t padding = rounds * kCrcThreads - vectors;
        uint32_t sum[4] = {0, 0, 0, 0};
        for (uint64_t at = static_cast<uint64_t>(t); at < rounds * kCrcThreads; at += kCrcThreads) {
            Wide v = {{0, 0, 0, 0}};
            if (at >= padding) v = load_vector<ALIGNED>(from + (at - padding) * 16);
            if (at == padding) v.word[0] ^= 0xFFFFFFFFu;  // the message's first word: a CRC begins with all ones
#pragma unroll
            for (int w = 0; w < 4; ++w) sum[w] = next_vector(table, sum[w]) ^ v.word[w];
        }
        uint32_t mine = crc_times<kNextWord>(sum[0]) ^ sum[1];
        mine = crc_times<kNextWord>(mine) ^ sum[2];
        mine = crc_times<kNextWord>(mine) ^ sum[3];
        mine = crc_times<kNextWord>(mine);
        mine = join<1>(mine, 1);
        mine = join<2>(mine, 2);
        mine = join<4>(mine, 4);
        mine = join<8>(mine, 8);
        mine = join<16>(mine, 16);
        if (t % 32 == 0) partial[t / 32] = mine;
        __syncthreads();
        if (t < 32) {
            mine = t < kCrcThreads / 32 ? partial[t] : 0;
            mine = join<32>(mine, 1);
            mine = join<64>(mine, 2);
            mine = join<128>(mine, 4);
            if (t == 0) {
                uint32_t state = vectors == 0 ? 0xFFFFFFFFu : mine;
                for (uint64_t i = vectors * 16; i < length; ++i) state = crc_extend_byte(state, load(from + i));
                store(crcs + block, ~state);
            }
        }
        __syncthreads();
    }
}

#endif

}  // namespace snapshotd::gpu
