// What stands in an arena file, byte for byte, and the part of it that never changes.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "common.hpp"

namespace snapshotd {

constexpr uint32_t kArenaVersion = 1;
constexpr uint32_t kBlockBytes = 1u << 20;
constexpr uint32_t kBlockBytesMin = 4096, kBlockBytesMax = 16u << 20;
constexpr uint32_t kSlotsMax = 64;
constexpr uint64_t kSlotBytesMax = 1ull << 44;
constexpr size_t kJobBytesMax = 200;
constexpr uint64_t kPage = 4096;

// Slot states: any two differ in at least eight bits, so damage makes an unknown state, never another valid one.
// Zero (a file that was never formatted) is as far from all of them.
constexpr uint32_t kEmpty = 0x0F1E2D3C;
constexpr uint32_t kFilling = 0x335A66C3;
constexpr uint32_t kFull = 0x5566AA99;
constexpr uint32_t kProtected = 0x963C5AF0;
constexpr uint32_t kCommitted = 0xE8D3B447;

constexpr int distance(uint32_t a, uint32_t b) {
    return __builtin_popcount(a ^ b);
}
constexpr bool tags_are_far_apart() {
    constexpr uint32_t tags[] = {0, kEmpty, kFilling, kFull, kProtected, kCommitted};
    for (int i = 0; i < 6; ++i) {
        for (int j = 0; j < i; ++j) {
            if (distance(tags[i], tags[j]) < 8) return false;
        }
    }
    return true;
}
static_assert(tags_are_far_apart());

// --- what stands in the file, byte for byte (little endian, no pointers) -------------------------------------------

using Word32 = std::atomic<uint32_t>;
using Word64 = std::atomic<uint64_t>;
static_assert(Word32::is_always_lock_free && Word64::is_always_lock_free, "a lock would live in one process only");
static_assert(sizeof(Word32) == 4 && sizeof(Word64) == 8);
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "arena files are little endian"
#endif

struct StaticPart {          // 0: written once by format(), never changed
    char magic[8];           // 0: "SNAPARNA"
    uint32_t version;        // 8
    uint32_t slots;          // 12
    uint64_t total_bytes;    // 16: of the whole file
    uint64_t header_bytes;   // 24: offset of slot 0
    uint64_t slot_bytes;     // 32
    uint32_t block_bytes;    // 40
    uint32_t local_index;    // 44
    byte arena_id[16];       // 48
    uint32_t job_bytes;      // 64: length of `job`
    char job[kJobBytesMax];  // 68: UTF-8, padded with zeros
    byte reserved[240];      // 268
    uint32_t crc;            // 508: CRC32C of the 508 bytes before it
};
static_assert(sizeof(StaticPart) == 512);
static_assert(offsetof(StaticPart, version) == 8 && offsetof(StaticPart, slots) == 12);
static_assert(offsetof(StaticPart, total_bytes) == 16 && offsetof(StaticPart, header_bytes) == 24);
static_assert(offsetof(StaticPart, slot_bytes) == 32 && offsetof(StaticPart, block_bytes) == 40);
static_assert(offsetof(StaticPart, local_index) == 44 && offsetof(StaticPart, arena_id) == 48);
static_assert(offsetof(StaticPart, job_bytes) == 64 && offsetof(StaticPart, job) == 68);
static_assert(offsetof(StaticPart, reserved) == 268 && offsetof(StaticPart, crc) == 508);

constexpr size_t kOwnerWords = 14;
struct OwnerRecord {            // the words of `Owner`, in the order of pack_owner(); the two last:
    Word64 words[kOwnerWords];  // 0
    Word64 serial;              // 112: the write that made this record; odd ones lie in record 1
    Word64 crc;                 // 120: CRC32C of the 120 bytes before it
};
static_assert(sizeof(OwnerRecord) == 128 && offsetof(OwnerRecord, serial) == 112 && offsetof(OwnerRecord, crc) == 120);

struct SlotEntry {          // 128 bytes, on cache lines of its own
    Word32 state;           // 0: one of the tags above
    Word32 sealed;          // 4: kSealed while `seal` counts
    Word64 step;            // 8: 0 = not named yet; written after the identity, with release
    Word64 generation;      // 16
    Word64 nonce[2];        // 24
    Word64 rank_world;      // 40: rank in the low half, world size in the high one
    Word64 fingerprint[4];  // 48
    Word64 file_bytes;      // 80: written by publish()
    Word64 looks;           // 88: grows before every change, so that a reader knows it has seen two lives
    Word32 seal;            // 96: CRC32C of arena id, slot index, identity, file_bytes and CRC table
    byte reserved[28];      // 100
};
static_assert(sizeof(SlotEntry) == 128);
static_assert(offsetof(SlotEntry, sealed) == 4 && offsetof(SlotEntry, step) == 8);
static_assert(offsetof(SlotEntry, generation) == 16 && offsetof(SlotEntry, nonce) == 24);
static_assert(offsetof(SlotEntry, rank_world) == 40 && offsetof(SlotEntry, fingerprint) == 48);
static_assert(offsetof(SlotEntry, file_bytes) == 80 && offsetof(SlotEntry, looks) == 88);
static_assert(offsetof(SlotEntry, seal) == 96);

struct Header {
    StaticPart fixed;           // 0
    OwnerRecord owner[2];       // 512: written in turn, so that a writer killed half way leaves the older one
    Word64 owner_serial;        // 768: serial | ~serial << 32 of the record that counts; 0 = none was written
    byte reserved_a[248];       // 776
    Word64 passed;              // 1024: the trainer's line
    byte reserved_b[120];       // 1032
    Word64 next_step;           // 1152: the daemon's line
    Word64 naming;              // 1160
    Word64 committed_step;      // 1168
    Word64 aborted_step;        // 1176
    Word64 ever_committed;      // 1184
    byte reserved_c[88];        // 1192
    Word32 changes;             // 1280: futex, both sides
    byte reserved_d[2812];      // 1284
    SlotEntry slot[kSlotsMax];  // 4096
};  // 12288: CRC tables, one u32 a block, each slot's table padded to 64 bytes;
    // then, at header_bytes (a multiple of 4096), the slots
static_assert(sizeof(Header) == 12288);
static_assert(offsetof(Header, owner) == 512 && offsetof(Header, owner_serial) == 768);
static_assert(offsetof(Header, passed) == 1024 && offsetof(Header, next_step) == 1152);
static_assert(offsetof(Header, naming) == 1160 && offsetof(Header, committed_step) == 1168);
static_assert(offsetof(Header, aborted_step) == 1176 && offsetof(Header, ever_committed) == 1184);
static_assert(offsetof(Header, changes) == 1280 && offsetof(Header, slot) == 4096);

// The sizes of an arena, within their documented ranges: 1 to 64 slots; blocks a power of two from 4 KiB to 16 MiB;
// slots a multiple of the block, at most 16 TiB.
struct Geometry {
    uint32_t slots, block_bytes;
    uint64_t slot_bytes;

    static Geometry checked(uint64_t slots, uint64_t slot_bytes, uint64_t block_bytes);  // std::invalid_argument
    uint64_t blocks_in_slot() const { return slot_bytes / block_bytes; }
    uint64_t blocks_in_file(uint64_t file_bytes) const { return (file_bytes + block_bytes - 1) / block_bytes; }
    uint64_t table_bytes() const { return (blocks_in_slot() * 4 + 63) / 64 * 64; }
    uint64_t header_bytes() const { return (sizeof(Header) + slots * table_bytes() + kPage - 1) / kPage * kPage; }
    uint64_t total_bytes() const { return header_bytes() + slots * slot_bytes; }
};

using Id16 = std::array<uint64_t, 2>;
using Id32 = std::array<uint64_t, 4>;

// The static part of a fresh arena; everything was checked before.
StaticPart make_static_part(const std::string& arena_id, const std::string& job, uint32_t local_index,
                            const Geometry& geometry);

// Length of the file behind `fd`. FormatError for what is no regular file, OsError where it cannot be asked.
uint64_t length_of(int fd);

// The static part of a file of that length, not yet checked.
StaticPart read_static_part(int fd, uint64_t real_bytes);

// FormatError for everything that a foreign, older, truncated or damaged file can have wrong.
Geometry check_static_part(const StaticPart& part, uint64_t real_bytes);

extern const char kMagic[8];

inline uint64_t two(uint32_t low, uint32_t high) {
    return low | static_cast<uint64_t>(high) << 32;
}
inline uint32_t low(uint64_t word) {
    return static_cast<uint32_t>(word);
}
inline uint32_t high(uint64_t word) {
    return static_cast<uint32_t>(word >> 32);
}

}  // namespace snapshotd
