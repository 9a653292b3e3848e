// What benchmarks/codec.py times: loops in C, so that no Python is in the figures. Ours are reached by the addresses
// that `_native.ec_entry_points()` gives; ISA-L's, and memcpy, by their names.
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>

#ifdef WITH_ISAL
#include <isa-l.h>
#endif

using byte = unsigned char;

// One case: what each way of doing it needs.
struct Job {
    unsigned k, m, outputs;
    int threads, stores;
    size_t bytes, block_bytes;
    byte** from;    // k symbols
    byte** to;      // the outputs
    byte** copies;  // k
    byte** data_words;
    byte** parity_words;
    byte* rows;    // ours: outputs x k coefficients
    byte* tables;  // ISA-L's, expanded
    uintptr_t entry;
    uint32_t* sink;  // results that nobody reads
    Job* other;      // a second one, of the same way
};

static void ours_encode(Job& j) {
    reinterpret_cast<void (*)(unsigned, unsigned, byte**, byte**, size_t, int)>(j.entry)(j.k, j.m, j.from, j.to,
                                                                                         j.bytes, j.threads);
}

static void ours_decode(Job& j) {
    reinterpret_cast<void (*)(unsigned, unsigned, unsigned, byte*, byte**, byte**, size_t, int)>(j.entry)(
        j.k, j.m, j.outputs, j.rows, j.from, j.to, j.bytes, j.threads);
}

static void ours_copying(Job& j) {
    reinterpret_cast<void (*)(unsigned, unsigned, byte**, byte**, byte**, byte**, byte**, size_t, size_t, int, int)>(
        j.entry)(j.k, j.m, j.from, j.to, j.copies, j.data_words, nullptr, j.bytes, j.block_bytes, j.stores, j.threads);
}

// The last of k symbols: checked, added, and the sum checksummed.
static void ours_accumulate(Job& j) {
    auto entry = reinterpret_cast<int64_t (*)(byte*, byte*, size_t, byte, int, byte*, byte*, size_t)>(j.entry);
    j.sink[0] = static_cast<uint32_t>(
        entry(j.to[0], j.from[0], j.bytes, j.rows[0], 0, j.data_words[0], j.parity_words[0], j.block_bytes));
}

static void plain_memcpy(Job& j) {
    for (unsigned i = 0; i < j.k; ++i) std::memcpy(j.copies[i], j.from[i], j.bytes);
}

static void plain_read(Job& j) {
    uint64_t sum[8] = {};
    for (unsigned i = 0; i < j.k; ++i) {
        for (size_t at = 0; at < j.bytes; at += 64) {
            uint64_t words[8];
            std::memcpy(words, j.from[i] + at, 64);
            for (int w = 0; w < 8; ++w) sum[w] ^= words[w];
        }
    }
    for (int w = 0; w < 8; ++w) j.sink[w] = static_cast<uint32_t>(sum[w] ^ (sum[w] >> 32));
}

// What no code can beat in a cache: every symbol is read and every output written, with the least that can be done to
// bytes in between, in lines as wide as this machine has them.
#if defined(__x86_64__)
template <typename V>
static inline __attribute__((always_inline)) void roof_of(Job& j) {
    for (size_t at = 0; at + sizeof(V) <= j.bytes; at += sizeof(V)) {
        V sum, next;
        std::memcpy(&sum, j.from[0] + at, sizeof sum);
        for (unsigned i = 1; i < j.k; ++i) {
            std::memcpy(&next, j.from[i] + at, sizeof next);
            sum ^= next;
        }
        for (unsigned i = 0; i < j.m; ++i) std::memcpy(j.to[i] + at, &sum, sizeof sum);
    }
}

typedef long long Line __attribute__((vector_size(64)));
typedef long long HalfLine __attribute__((vector_size(32)));

__attribute__((target("avx512f"))) static void roof_avx512(Job& j) {
    roof_of<Line>(j);
}

__attribute__((target("avx2"))) static void roof_avx2(Job& j) {
    roof_of<HalfLine>(j);
}

static void roof(Job& j) {
    __builtin_cpu_supports("avx512f") ? roof_avx512(j) : roof_avx2(j);
}
#else
static void roof(Job& j) {
    for (size_t at = 0; at + 8 <= j.bytes; at += 8) {
        uint64_t sum = 0, next;
        for (unsigned i = 0; i < j.k; ++i) {
            std::memcpy(&next, j.from[i] + at, sizeof next);
            sum ^= next;
        }
        for (unsigned i = 0; i < j.m; ++i) std::memcpy(j.to[i] + at, &sum, sizeof sum);
    }
}
#endif

#ifdef WITH_ISAL
static void isal_encode(Job& j) {
    ec_encode_data(static_cast<int>(j.bytes), static_cast<int>(j.k), static_cast<int>(j.outputs), j.tables, j.from,
                   j.to);
}

static void isal_three_passes(Job& j) {
    for (unsigned i = 0; i < j.k; ++i) std::memcpy(j.copies[i], j.from[i], j.bytes);
    for (unsigned i = 0; i < j.k; ++i) {
        for (size_t at = 0; at < j.bytes; at += j.block_bytes) {
            j.sink[0] ^= crc32_iscsi(j.copies[i] + at, static_cast<int>(j.block_bytes), 0xFFFFFFFF);
        }
    }
    ec_encode_data(static_cast<int>(j.bytes), static_cast<int>(j.k), static_cast<int>(j.outputs), j.tables, j.copies,
                   j.to);
}

static void isal_accumulate(Job& j) {
    for (size_t at = 0; at < j.bytes; at += j.block_bytes) {
        uint32_t stored;
        std::memcpy(&stored, j.data_words[0] + 4 * (at / j.block_bytes), 4);
        j.sink[0] |= ~crc32_iscsi(j.from[0] + at, static_cast<int>(j.block_bytes), 0xFFFFFFFF) ^ stored;
    }
    ec_encode_data_update(static_cast<int>(j.bytes), 1, 1, 0, j.tables, j.from[0], j.to);
    for (size_t at = 0; at < j.bytes; at += j.block_bytes) {
        uint32_t made = ~crc32_iscsi(j.to[0] + at, static_cast<int>(j.block_bytes), 0xFFFFFFFF);
        std::memcpy(j.parity_words[0] + 4 * (at / j.block_bytes), &made, 4);
    }
}
#endif

extern "C" {

// Rows of ISA-L's own code: m of k (cauchy), and their expanded tables.
int shim_isal() {
#ifdef WITH_ISAL
    return 1;
#else
    return 0;
#endif
}

// `generator` takes (k + m) * k bytes.
int shim_isal_generator(byte* generator, unsigned k, unsigned m) {
#ifdef WITH_ISAL
    gf_gen_cauchy1_matrix(generator, static_cast<int>(k + m), static_cast<int>(k));
    return 0;
#else
    (void)generator, (void)k, (void)m;
    return -1;
#endif
}

int shim_isal_invert(byte* square, byte* inverse, unsigned k) {
#ifdef WITH_ISAL
    return gf_invert_matrix(square, inverse, static_cast<int>(k));
#else
    (void)square, (void)inverse, (void)k;
    return -1;
#endif
}

byte shim_isal_multiply(byte a, byte b) {
#ifdef WITH_ISAL
    return gf_mul(a, b);
#else
    return static_cast<byte>(a ^ b);
#endif
}

void shim_isal_tables(unsigned k, unsigned rows, byte* coefficients, byte* tables) {
#ifdef WITH_ISAL
    ec_init_tables(static_cast<int>(k), static_cast<int>(rows), coefficients, tables);
#else
    (void)k, (void)rows, (void)coefficients, (void)tables;
#endif
}

using Way = void (*)(Job&);

static Way way_named(const char* name) {
    struct {
        const char* name;
        Way run;
    } const ways[] = {
        {"ours encode", ours_encode},
        {"ours decode", ours_decode},
        {"ours copying", ours_copying},
        {"ours accumulate", ours_accumulate},
        {"memcpy", plain_memcpy},
        {"read", plain_read},
        {"roof", roof},
#ifdef WITH_ISAL
        {"isal encode", isal_encode},
        {"isal three passes", isal_three_passes},
        {"isal accumulate", isal_accumulate},
#endif
    };
    for (const auto& way : ways) {
        if (std::strcmp(way.name, name) == 0) return way.run;
    }
    return nullptr;
}

static double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

static void loop(Way way, Job* job, unsigned repeat) {
    for (unsigned i = 0; i < repeat; ++i) way(*job);
}

// Keeps the calling thread on one of the processors that it may use: the first, or the second where there is one.
class Pinned {
  public:
    explicit Pinned(int which) {
        pthread_getaffinity_np(pthread_self(), sizeof before_, &before_);
        const int count = CPU_COUNT(&before_);
        cpu_set_t one;
        CPU_ZERO(&one);
        for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &before_) && seen++ == which % count) CPU_SET(cpu, &one);
        }
        pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    }
    ~Pinned() { pthread_setaffinity_np(pthread_self(), sizeof before_, &before_); }

  private:
    cpu_set_t before_;
};

// Seconds for `repeat` times, or -1 for a name that is none. A job that has another is done beside it where `at_once`,
// by a thread each on a processor of its own, else both are done by this one.
double shim_time(const char* name, Job* job, unsigned repeat, int at_once) {
    const Way way = way_named(name);
    if (way == nullptr) return -1;
    if (job->other == nullptr) {
        const double began = now();
        loop(way, job, repeat);
        return now() - began;
    }
    const Pinned here(0);
    if (at_once == 0) {
        const double began = now();
        loop(way, job, repeat);
        loop(way, job->other, repeat);
        return now() - began;
    }
    std::atomic<int> ready{0};
    auto meet = [&] {
        ++ready;
        while (ready < 2) sched_yield();
    };
    std::thread beside([&] {
        const Pinned there(1);
        meet();
        loop(way, job->other, repeat);
    });
    meet();
    const double began = now();
    loop(way, job, repeat);
    beside.join();
    return now() - began;
}
}
