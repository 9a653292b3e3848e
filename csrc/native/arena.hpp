// The arena: a shared-memory file with a header and slots, mapped by a daemon and a trainer that may die at any time.
//
// Who writes what: the daemon the static part, the owner record and its words; the trainer `passed` and the slots up
// to FULL; the daemon the slots from there on. Nobody trusts the file: its sizes are read once, checked against the
// file's real length and kept in this process.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

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
// They are the rows of a Hadamard-like code repeated; zero (a file that was never formatted) is none of them.
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

// --- what a process makes of it --------------------------------------------------------------------------------------

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

struct Identity {
    uint64_t generation = 0;
    Id16 nonce{};
    uint64_t step = 0;
    uint32_t rank = 0, world_size = 0;
    Id32 fingerprint{};
};

struct SlotInfo {
    uint32_t index = 0, state = 0;
    Identity identity;
    uint64_t file_bytes = 0;
    bool sound = false;
};

struct Owner {
    uint64_t generation = 0;
    Id16 nonce{};
    uint32_t rank = 0, world_size = 0, local_world = 0, every = 0, pid = 0;
    bool fenced = false, closed = false;
    uint64_t released_at_s = 0;
    uint64_t restored_generation = 0;
    Id16 restored_nonce{};
    uint64_t restored_step = 0;
};

// One mmap. Views and engines that stand on it are counted, so that an arena knows when it may be closed.
class Mapping {
  public:
    Mapping(int fd, uint64_t bytes, bool writable, bool exclude_from_fork);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    bool in_this_process() const noexcept { return !excluded_from_fork_ || made_at_ == fork_count(); }

    byte* const base;
    const uint64_t bytes;
    const bool writable;
    std::atomic<int> views{0}, engines{0};

  private:
    const bool excluded_from_fork_;
    const uint32_t made_at_;
};

class Arena {
  public:
    static void format(int fd, const std::string& arena_id, const std::string& job, uint32_t local_index,
                       const Geometry& geometry);
    Arena(int fd, bool writable, bool populate_now, bool exclude_from_fork);

    const Geometry& geometry() const { return geometry_; }
    const std::string& arena_id() const { return arena_id_; }
    const std::string& job() const { return job_; }
    uint32_t local_index() const { return local_index_; }

    // The mapping, for work that outlives the GIL. std::invalid_argument once closed, or read-only where that matters.
    std::shared_ptr<Mapping> mapped() const;
    std::shared_ptr<Mapping> mapped_for_writing() const;
    void close();  // InUseError while views or engines stand on it

    static Header& header_of(const Mapping& map) { return *reinterpret_cast<Header*>(map.base); }
    uint64_t slot_offset(uint32_t index) const;
    byte* slot_bytes_at(const Mapping& map, uint32_t index) const { return map.base + slot_offset(index); }
    Word32* crc_table(const Mapping& map, uint32_t index) const;

    std::optional<Owner> owner() const;
    void set_owner(const Owner& owner);

    SlotInfo slot(uint32_t index) const;
    int claim(const Identity& identity);
    void publish(uint32_t index, uint64_t file_bytes);
    bool advance(uint32_t index, uint32_t state, uint32_t to);
    void empty(uint32_t index);
    bool take(uint32_t index);  // EMPTY -> FILLING without a name; publish() refuses such a slot

    std::vector<uint32_t> block_crcs(uint32_t index) const;
    void set_block_crcs(const Mapping& map, uint32_t index, uint64_t file_bytes) const;
    std::vector<uint64_t> verify(const Mapping& map, uint32_t index, int threads) const;

  private:
    void check_index(uint32_t index) const;
    void check_file_bytes(uint64_t file_bytes) const;
    uint32_t seal_of(const Mapping& map, uint32_t index, uint64_t file_bytes) const;

    std::shared_ptr<Mapping> map_;
    Geometry geometry_{};
    std::string arena_id_, job_;
    uint32_t local_index_ = 0;
};

}  // namespace snapshotd
