#include "crc32c.hpp"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#endif

namespace snapshotd {

namespace {

// A register of 32 bits is a polynomial in reflected order: bit 31 stands for x^0, bit 0 for x^31.
constexpr uint32_t kPolynomial = 0x82F63B78;

constexpr uint32_t times_x(uint32_t value) {
    return (value >> 1) ^ ((value & 1) ? kPolynomial : 0);
}

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: what byte b does to the register when k more zero bytes follow it.
constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t b = 0; b < 256; ++b) {
        uint32_t value = b;
        for (int bit = 0; bit < 8; ++bit) value = times_x(value);
        tables[0][b] = value;
    }
    for (size_t k = 1; k < 8; ++k) {
        for (uint32_t b = 0; b < 256; ++b) {
            tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xFF];
        }
    }
    return tables;
}

constexpr Tables kTables = make_tables();

uint32_t extend_table(uint32_t state, const void* data, size_t bytes) {
    auto* p = static_cast<const unsigned char*>(data);
    for (; bytes >= 8; p += 8, bytes -= 8) {
        state ^= uint32_t{p[0]} | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
        state = kTables[7][state & 0xFF] ^ kTables[6][(state >> 8) & 0xFF] ^ kTables[5][(state >> 16) & 0xFF] ^
                kTables[4][state >> 24] ^ kTables[3][p[4]] ^ kTables[2][p[5]] ^ kTables[1][p[6]] ^ kTables[0][p[7]];
    }
    for (; bytes > 0; ++p, --bytes) state = (state >> 8) ^ kTables[0][(state ^ *p) & 0xFF];
    return state;
}

bool always() {
    return true;
}

// Product of two polynomials, modulo the CRC's.
constexpr uint32_t product(uint32_t a, uint32_t b) {
    uint32_t sum = 0;
    for (; a != 0; a <<= 1) {
        if (a & 0x80000000) sum ^= b;
        b = times_x(b);
    }
    return sum;
}

// x^8, x^16, x^32 ...: what a number of zero bytes multiplies by, for each bit of the number.
constexpr std::array<uint32_t, 64> make_zeros() {
    std::array<uint32_t, 64> made{};
    made[0] = 0x00800000;
    for (size_t i = 1; i < made.size(); ++i) made[i] = product(made[i - 1], made[i - 1]);
    return made;
}

constexpr std::array<uint32_t, 64> kZeros = make_zeros();

#if defined(__x86_64__)

constexpr uint32_t x_to_the(unsigned power) {
    uint32_t value = 0x80000000;
    for (unsigned i = 0; i < power; ++i) value = times_x(value);
    return value;
}

inline uint64_t load64(const unsigned char* p) {
    uint64_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// A page ahead, since the hardware's own prefetching stops where a page ends: on memory that is in no cache a tenth
// faster, and twice as fast where several places of a page are read side by side. Prefetching faults nowhere.
constexpr size_t kAhead = 4096;

template <size_t bytes>
inline void prefetch_lines(const unsigned char* p) {
    for (size_t at = 0; at < bytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(p + at), _MM_HINT_T0);
}

#define SNAPSHOTD_SSE42 __attribute__((target("sse4.2,pclmul")))

SNAPSHOTD_SSE42 inline uint32_t extend_words(uint32_t state, const unsigned char* p, size_t bytes) {
    uint64_t wide = state;
    for (; bytes >= 8; p += 8, bytes -= 8) wide = _mm_crc32_u64(wide, load64(p));
    state = static_cast<uint32_t>(wide);
    for (; bytes > 0; ++p, --bytes) state = _mm_crc32_u8(state, *p);
    return state;
}

// The register after `factor`'s number of zero bytes. A carry-less product of two reflected 32-bit values, read as
// a 64-bit message, stands for product * x; the crc instruction multiplies by x^32: so the factor for n zero bytes
// is x^(8n - 33).
SNAPSHOTD_SSE42 inline uint32_t shift(uint32_t state, uint32_t factor) {
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(state)),
                                           _mm_cvtsi32_si128(static_cast<int>(factor)), 0x00);
    return static_cast<uint32_t>(_mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(product))));
}

// The instruction takes three cycles and one can start in each: three independent thirds keep it busy.
template <size_t third, bool far>
SNAPSHOTD_SSE42 inline uint32_t extend_three(uint32_t state, const unsigned char* p) {
    constexpr uint32_t over_one = x_to_the(8 * third - 33);
    constexpr uint32_t over_two = x_to_the(16 * third - 33);
    uint64_t a = state, b = 0, c = 0;
    for (size_t i = 0; i < third; i += 8) {
        if (far && i % 64 == 0) prefetch_lines<192>(p + kAhead + 3 * i);
        a = _mm_crc32_u64(a, load64(p + i));
        b = _mm_crc32_u64(b, load64(p + third + i));
        c = _mm_crc32_u64(c, load64(p + 2 * third + i));
    }
    return shift(static_cast<uint32_t>(a), over_two) ^ shift(static_cast<uint32_t>(b), over_one) ^
           static_cast<uint32_t>(c);
}

SNAPSHOTD_SSE42 uint32_t extend_sse42(uint32_t state, const void* data, size_t bytes) {
    constexpr size_t large = 1360, small = 168;  // three large ones just fit into the copy engine's 4 KiB piece
    auto* p = static_cast<const unsigned char*>(data);
    for (; bytes >= 3 * large; p += 3 * large, bytes -= 3 * large) state = extend_three<large, true>(state, p);
    for (; bytes >= 3 * small; p += 3 * small, bytes -= 3 * small) state = extend_three<small, false>(state, p);
    return extend_words(state, p, bytes);
}

bool supports_sse42() {
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

// Folding moves each 128-bit lane `bits` further along the message, modulo the polynomial. In reflected order the
// low quadword is the high-degree half, and a carry-less product of 64-bit values comes out multiplied by x.
#define SNAPSHOTD_FOLD_LOW(bits) static_cast<long long>(uint64_t{x_to_the((bits) + 63)} << 32)
#define SNAPSHOTD_FOLD_HIGH(bits) static_cast<long long>(uint64_t{x_to_the((bits) - 1)} << 32)

template <unsigned bits>
SNAPSHOTD_SSE42 inline __m128i fold_lane(__m128i value, __m128i onto) {
    constexpr long long low = SNAPSHOTD_FOLD_LOW(bits), high = SNAPSHOTD_FOLD_HIGH(bits);
    const __m128i k = _mm_set_epi64x(high, low);
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(value, k, 0x00), _mm_clmulepi64_si128(value, k, 0x11)),
                         onto);
}

// The register after the 16 bytes of `lane`, with an empty one before them.
SNAPSHOTD_SSE42 inline uint32_t reduce_lane(__m128i lane) {
    uint64_t wide = _mm_crc32_u64(0, static_cast<uint64_t>(_mm_extract_epi64(lane, 0)));
    return static_cast<uint32_t>(_mm_crc32_u64(wide, static_cast<uint64_t>(_mm_extract_epi64(lane, 1))));
}

// --- a page at a time: its first half is folded in vectors while three chains of the instruction take the other

#define SNAPSHOTD_AVX2 __attribute__((target("sse4.2,pclmul,avx2,vpclmulqdq")))

template <unsigned bits>
SNAPSHOTD_AVX2 inline __m256i fold(__m256i value, const unsigned char* next) {
    constexpr long long low = SNAPSHOTD_FOLD_LOW(bits), high = SNAPSHOTD_FOLD_HIGH(bits);
    const __m256i k = _mm256_set_epi64x(high, low, high, low);
    return _mm256_xor_si256(
        _mm256_xor_si256(_mm256_clmulepi64_epi128(value, k, 0x00), _mm256_clmulepi64_epi128(value, k, 0x11)),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)));
}

// Both units take 128 bytes in 16 cycles, about: 17 rows of four vectors, and beside all but the first of them five
// words of each chain, are a page.
constexpr size_t kPage = 4096, kRow = 128, kRows = 17, kWords = 5, kChain = 8 * kWords * (kRows - 1);
static_assert(kRow * kRows + 3 * kChain == kPage && kPage == kAhead);

SNAPSHOTD_AVX2 inline uint32_t extend_page(uint32_t state, const unsigned char* p) {
    const unsigned char *q = p + kRow * kRows, *ahead = p + kAhead;
    const __m256i* first = reinterpret_cast<const __m256i*>(p);
    __m256i a =
        _mm256_xor_si256(_mm256_loadu_si256(first), _mm256_zextsi128_si256(_mm_cvtsi32_si128(static_cast<int>(state))));
    __m256i b = _mm256_loadu_si256(first + 1), c = _mm256_loadu_si256(first + 2), d = _mm256_loadu_si256(first + 3);
    uint64_t x = 0, y = 0, z = 0;
    for (size_t row = 1; row < kRows; ++row, q += 8 * kWords, ahead += kPage / (kRows - 1)) {
        prefetch_lines<kPage / (kRows - 1)>(ahead);
        p += kRow;
        a = fold<8 * kRow>(a, p);
        b = fold<8 * kRow>(b, p + 32);
        c = fold<8 * kRow>(c, p + 64);
        d = fold<8 * kRow>(d, p + 96);
#pragma GCC unroll 5
        for (size_t word = 0; word < kWords; ++word) {
            x = _mm_crc32_u64(x, load64(q + 8 * word));
            y = _mm_crc32_u64(y, load64(q + 8 * word + kChain));
            z = _mm_crc32_u64(z, load64(q + 8 * word + 2 * kChain));
        }
    }
    const __m256i rows[] = {a, b, c, d};
    __m128i lane = _mm256_castsi256_si128(a);
    for (unsigned half = 1; half < 8; ++half) {
        lane = fold_lane<128>(
            lane, half % 2 ? _mm256_extracti128_si256(rows[half / 2], 1) : _mm256_castsi256_si128(rows[half / 2]));
    }
    constexpr uint32_t over_one = x_to_the(8 * kChain - 33), over_two = x_to_the(8 * 2 * kChain - 33),
                       over_three = x_to_the(8 * 3 * kChain - 33);
    return shift(reduce_lane(lane), over_three) ^ shift(static_cast<uint32_t>(x), over_two) ^
           shift(static_cast<uint32_t>(y), over_one) ^ static_cast<uint32_t>(z);
}

SNAPSHOTD_AVX2 uint32_t extend_avx2(uint32_t state, const void* data, size_t bytes) {
    auto* p = static_cast<const unsigned char*>(data);
    for (; bytes >= kPage; p += kPage, bytes -= kPage) state = extend_page(state, p);
    return extend_sse42(state, p, bytes);
}

bool supports_avx2() {
    return supports_sse42() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq");
}

// --- with AVX-512

#define SNAPSHOTD_VPCLMUL __attribute__((target("sse4.2,pclmul,avx512f,avx512vl,vpclmulqdq")))

template <unsigned bits>
SNAPSHOTD_VPCLMUL inline __m512i fold(__m512i value, __m512i onto) {
    constexpr long long low = SNAPSHOTD_FOLD_LOW(bits), high = SNAPSHOTD_FOLD_HIGH(bits);
    const __m512i k = _mm512_set_epi64(high, low, high, low, high, low, high, low);
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, k, 0x00), _mm512_clmulepi64_epi128(value, k, 0x11),
                                     onto, 0x96);
}

// The register after the 64 bytes of `a`, with an empty one before them.
SNAPSHOTD_VPCLMUL inline uint32_t reduce(__m512i a) {
    alignas(64) __m128i lanes[4];
    _mm512_store_si512(lanes, a);
    return reduce_lane(fold_lane<128>(fold_lane<128>(fold_lane<128>(lanes[0], lanes[1]), lanes[2]), lanes[3]));
}

SNAPSHOTD_VPCLMUL uint32_t extend_vpclmul(uint32_t state, const void* data, size_t bytes) {
    auto* p = static_cast<const unsigned char*>(data);
    if (bytes < 512) return extend_sse42(state, data, bytes);
    __m512i a =
        _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
    __m512i b = _mm512_loadu_si512(p + 64), c = _mm512_loadu_si512(p + 128), d = _mm512_loadu_si512(p + 192);
    for (p += 256, bytes -= 256; bytes >= 256; p += 256, bytes -= 256) {
        if (bytes >= 256 + kAhead) prefetch_lines<256>(p + kAhead);
        a = fold<2048>(a, _mm512_loadu_si512(p));
        b = fold<2048>(b, _mm512_loadu_si512(p + 64));
        c = fold<2048>(c, _mm512_loadu_si512(p + 128));
        d = fold<2048>(d, _mm512_loadu_si512(p + 192));
    }
    a = fold<512>(fold<512>(fold<512>(a, b), c), d);
    for (; bytes >= 64; p += 64, bytes -= 64) a = fold<512>(a, _mm512_loadu_si512(p));
    return extend_words(reduce(a), p, bytes);  // what is left of the message so far is in `a`
}

// --- in planes: a register of 64 bytes for each, folded over a whole superblock

constexpr unsigned kSuperblock = 512;

enum class Copying { no, temporal, non_temporal };

template <Copying copying>
SNAPSHOTD_VPCLMUL inline void fold_planes(unsigned char* state, const unsigned char* from, unsigned char* to,
                                          size_t bytes) {
    __m512i a[8];
#pragma GCC unroll 8
    for (unsigned p = 0; p < 8; ++p) a[p] = _mm512_loadu_si512(state + 64 * p);
    for (size_t at = 0; at < bytes; at += kSuperblock) {
#pragma GCC unroll 8
        for (unsigned p = 0; p < 8; ++p) {
            const __m512i data = _mm512_loadu_si512(from + at + 64 * p);
            if constexpr (copying == Copying::no) {
                _mm_prefetch(reinterpret_cast<const char*>(from + at + 64 * p + kAhead), _MM_HINT_T0);
            } else {  // of many symbols in turn: into L2, nearer, or the L1 cache overflows
                _mm_prefetch(reinterpret_cast<const char*>(from + at + 64 * p + kAhead / 2), _MM_HINT_T1);
            }
            if constexpr (copying == Copying::temporal) {
                __builtin_prefetch(to + at + 64 * p + kSuperblock, 1);
                _mm512_storeu_si512(to + at + 64 * p, data);
            }
            if constexpr (copying == Copying::non_temporal) {
                _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at + 64 * p), data);
            }
            a[p] = fold<8 * kSuperblock>(a[p], data);
        }
    }
#pragma GCC unroll 8
    for (unsigned p = 0; p < 8; ++p) _mm512_storeu_si512(state + 64 * p, a[p]);
}

SNAPSHOTD_VPCLMUL void fold_only(unsigned char* state, const unsigned char* data, size_t bytes) {
    fold_planes<Copying::no>(state, data, nullptr, bytes);
}

SNAPSHOTD_VPCLMUL void fold_copying(unsigned char* state, const unsigned char* from, unsigned char* to, size_t bytes,
                                    bool non_temporal) {
    if (non_temporal && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        fold_planes<Copying::non_temporal>(state, from, to, bytes);
    } else {
        fold_planes<Copying::temporal>(state, from, to, bytes);
    }
}

SNAPSHOTD_VPCLMUL uint32_t finish_planes(const unsigned char* state) {
    __m512i a = _mm512_loadu_si512(state);
    for (unsigned p = 1; p < 8; ++p) a = fold<512>(a, _mm512_loadu_si512(state + 64 * p));
    return reduce(a);
}

bool supports_vpclmul() {
    return supports_sse42() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("vpclmulqdq");
}

constexpr PlaneCrcTier kPlaneCrc = {supports_vpclmul, fold_only, fold_copying, finish_planes};

#elif defined(__aarch64__) && defined(__linux__)

__attribute__((target("+crc"))) uint32_t extend_arm(uint32_t state, const void* data, size_t bytes) {
    auto* p = static_cast<const unsigned char*>(data);
    for (; bytes >= 8; p += 8, bytes -= 8) {
        uint64_t word;
        std::memcpy(&word, p, sizeof word);
        state = __crc32cd(state, word);
    }
    for (; bytes > 0; ++p, --bytes) state = __crc32cb(state, *p);
    return state;
}

bool supports_arm() {
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
}

#endif

constexpr CrcTier kTiers[] = {
#if defined(__x86_64__)
    {"vpclmul", supports_vpclmul, extend_vpclmul},
    {"avx2", supports_avx2, extend_avx2},
    {"sse42", supports_sse42, extend_sse42},
#elif defined(__aarch64__) && defined(__linux__)
    {"arm", supports_arm, extend_arm},
#endif
    {"table", always, extend_table},
};

std::vector<CrcTier> supported_tiers() {
    std::vector<CrcTier> found;
    for (const CrcTier& tier : kTiers) {
        if (tier.supported()) found.push_back(tier);
    }
    return found;
}

}  // namespace

const std::vector<CrcTier>& crc_tiers() {
    static const std::vector<CrcTier> tiers = supported_tiers();
    return tiers;
}

uint32_t crc32c_after_zeros(uint32_t value, uint64_t bytes) noexcept {
    for (size_t bit = 0; bytes != 0; bytes >>= 1, ++bit) {
        if (bytes & 1) value = product(kZeros[bit], value);
    }
    return value;
}

const PlaneCrcTier* plane_crc() noexcept {
#if defined(__x86_64__)
    static const PlaneCrcTier* const found = kPlaneCrc.supported() ? &kPlaneCrc : nullptr;
    return found;
#else
    return nullptr;
#endif
}

uint32_t (*crc_extend)(uint32_t, const void*, size_t) = crc_tiers().front().extend;

}  // namespace snapshotd
