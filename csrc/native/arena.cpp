#include "arena.hpp"

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "copy.hpp"
#include "crash.hpp"
#include "crc32c.hpp"
#include "parallel.hpp"
#include "reserve.hpp"

namespace snapshotd {

namespace {

constexpr char kMagic[8] = {'S', 'N', 'A', 'P', 'A', 'R', 'N', 'A'};
constexpr uint32_t kSealed = 0xC35AA53C;

std::atomic<uint32_t> forks{0};
const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });

bool is_past_filling(uint32_t state) {
    return state == kFull || state == kProtected || state == kCommitted;
}

std::string describe(int error) {
    return std::strerror(error);
}

// --- the static part

StaticPart make_static_part(const std::string& arena_id, const std::string& job, uint32_t local_index,
                            const Geometry& geometry) {
    StaticPart part{};
    std::memcpy(part.magic, kMagic, sizeof kMagic);
    part.version = kArenaVersion;
    part.slots = geometry.slots;
    part.total_bytes = geometry.total_bytes();
    part.header_bytes = geometry.header_bytes();
    part.slot_bytes = geometry.slot_bytes;
    part.block_bytes = geometry.block_bytes;
    part.local_index = local_index;
    std::memcpy(part.arena_id, arena_id.data(), sizeof part.arena_id);
    part.job_bytes = static_cast<uint32_t>(job.size());
    std::memcpy(part.job, job.data(), job.size());
    part.crc = crc32c(0, &part, offsetof(StaticPart, crc));
    return part;
}

// Everything that a foreign, older, truncated or damaged file can have wrong.
Geometry check_static_part(const StaticPart& part, uint64_t real_bytes) {
    if (std::memcmp(part.magic, kMagic, sizeof kMagic) != 0) {
        throw FormatError("this is not an arena of snapshotd: its first bytes are foreign; nothing in it was touched");
    }
    if (part.version != kArenaVersion) {
        throw FormatError("the arena has version " + std::to_string(part.version) + ", this snapshotd reads version " +
                          std::to_string(kArenaVersion) +
                          ": restore with the release that wrote it, or remove it with `snapshotd gc`");
    }
    if (part.crc != crc32c(0, &part, offsetof(StaticPart, crc))) {
        throw FormatError(
            "the arena's header is damaged: it does not match its checksum, so its snapshots count as lost");
    }
    Geometry geometry{};
    try {
        geometry = Geometry::checked(part.slots, part.slot_bytes, part.block_bytes);
    } catch (const std::invalid_argument& error) {
        throw FormatError(std::string("the arena's header states impossible sizes: ") + error.what());
    }
    if (part.total_bytes != geometry.total_bytes() || part.header_bytes != geometry.header_bytes() ||
        part.job_bytes > kJobBytesMax) {
        throw FormatError("the arena's header contradicts itself: its sizes do not add up");
    }
    if (real_bytes != part.total_bytes) {
        throw FormatError("the arena is truncated or grown: the file has " + std::to_string(real_bytes) +
                          " bytes, its header says " + std::to_string(part.total_bytes));
    }
    return geometry;
}

uint64_t length_of(int fd) {
    struct stat status;
    if (fstat(fd, &status) != 0) throw OsError(errno, "the arena file cannot be looked at: " + describe(errno));
    if (!S_ISREG(status.st_mode)) throw FormatError("this is not an arena of snapshotd: it is not a regular file");
    return static_cast<uint64_t>(status.st_size);
}

StaticPart read_static_part(int fd, uint64_t real_bytes) {
    if (real_bytes < sizeof(Header)) {
        throw FormatError("this is not an arena of snapshotd, or a truncated one: it has " +
                          std::to_string(real_bytes) + " bytes, less than a header");
    }
    StaticPart part;
    ssize_t got = pread(fd, &part, sizeof part, 0);
    if (got < 0) throw OsError(errno, "the arena's header cannot be read: " + describe(errno));
    if (got != static_cast<ssize_t>(sizeof part)) throw FormatError("the arena shrank while its header was read");
    return part;
}

// --- the owner record

using OwnerWords = std::array<uint64_t, kOwnerWords + 1>;  // the last one is the serial

uint64_t two(uint32_t low, uint32_t high) {
    return low | static_cast<uint64_t>(high) << 32;
}
uint32_t low(uint64_t word) {
    return static_cast<uint32_t>(word);
}
uint32_t high(uint64_t word) {
    return static_cast<uint32_t>(word >> 32);
}

OwnerWords pack_owner(const Owner& o, uint64_t serial) {
    return {o.generation,
            o.nonce[0],
            o.nonce[1],
            two(o.rank, o.world_size),
            two(o.local_world, o.every),
            two(o.pid, (o.fenced ? 1u : 0u) | (o.closed ? 2u : 0u)),
            o.released_at_s,
            o.restored_generation,
            o.restored_nonce[0],
            o.restored_nonce[1],
            o.restored_step,
            0,
            0,
            0,
            serial};
}

Owner unpack_owner(const OwnerWords& w) {
    Owner o;
    o.generation = w[0];
    o.nonce = {w[1], w[2]};
    o.rank = low(w[3]);
    o.world_size = high(w[3]);
    o.local_world = low(w[4]);
    o.every = high(w[4]);
    o.pid = low(w[5]);
    o.fenced = (high(w[5]) & 1) != 0;
    o.closed = (high(w[5]) & 2) != 0;
    o.released_at_s = w[6];
    o.restored_generation = w[7];
    o.restored_nonce = {w[8], w[9]};
    o.restored_step = w[10];
    return o;
}

uint32_t crc_of(const OwnerWords& words) {
    return crc32c(0, words.data(), sizeof words);
}

uint64_t with_complement(uint32_t serial) {
    return two(serial, ~serial);
}

// One look at the record that counts; false where a writer was at it meanwhile.
bool look_at_owner(const Header& header, OwnerWords& words, bool& sound) {
    uint64_t mark = header.owner_serial.load(std::memory_order_acquire);
    const OwnerRecord& record = header.owner[low(mark) & 1];
    for (size_t i = 0; i < kOwnerWords; ++i) words[i] = record.words[i].load(std::memory_order_relaxed);
    words[kOwnerWords] = record.serial.load(std::memory_order_relaxed);
    uint64_t crc = record.crc.load(std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_acquire);
    sound = mark == with_complement(low(mark)) && words[kOwnerWords] == low(mark) && crc == crc_of(words);
    return header.owner_serial.load(std::memory_order_relaxed) == mark;
}

// --- slots

// Announces a change of the slot's identity: what a reader collected before and after it belongs to two lives.
void begin_change(SlotEntry& entry) {
    entry.looks.fetch_add(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
}

Identity identity_of(const SlotEntry& entry, uint64_t step) {
    Identity id;
    id.step = step;
    id.generation = entry.generation.load(std::memory_order_relaxed);
    for (size_t i = 0; i < 2; ++i) id.nonce[i] = entry.nonce[i].load(std::memory_order_relaxed);
    uint64_t rank_world = entry.rank_world.load(std::memory_order_relaxed);
    id.rank = low(rank_world);
    id.world_size = high(rank_world);
    for (size_t i = 0; i < 4; ++i) id.fingerprint[i] = entry.fingerprint[i].load(std::memory_order_relaxed);
    return id;
}

void write_identity(SlotEntry& entry, const Identity& id) {
    entry.file_bytes.store(0, std::memory_order_relaxed);
    entry.generation.store(id.generation, std::memory_order_relaxed);
    for (size_t i = 0; i < 2; ++i) entry.nonce[i].store(id.nonce[i], std::memory_order_relaxed);
    entry.rank_world.store(two(id.rank, id.world_size), std::memory_order_relaxed);
    for (size_t i = 0; i < 4; ++i) entry.fingerprint[i].store(id.fingerprint[i], std::memory_order_relaxed);
    entry.step.store(id.step, std::memory_order_release);
}

uint64_t block_length(const Geometry& geometry, uint64_t block, uint64_t file_bytes) {
    return std::min<uint64_t>(geometry.block_bytes, file_bytes - block * geometry.block_bytes);
}

}  // namespace

uint32_t fork_count() noexcept {
    return forks.load(std::memory_order_relaxed);
}

Geometry Geometry::checked(uint64_t slots, uint64_t slot_bytes, uint64_t block_bytes) {
    if (slots < 1 || slots > kSlotsMax) throw std::invalid_argument("slots must be between 1 and 64");
    if (block_bytes < kBlockBytesMin || block_bytes > kBlockBytesMax || (block_bytes & (block_bytes - 1)) != 0) {
        throw std::invalid_argument("block_bytes must be a power of two from 4096 to 16777216");
    }
    if (slot_bytes < block_bytes || slot_bytes > kSlotBytesMax || slot_bytes % block_bytes != 0) {
        throw std::invalid_argument("slot_bytes must be a multiple of block_bytes, above 0 and at most 16 TiB");
    }
    return {static_cast<uint32_t>(slots), static_cast<uint32_t>(block_bytes), slot_bytes};
}

// --- mapping

Mapping::Mapping(int fd, uint64_t bytes, bool writable, bool exclude_from_fork)
    : base(map_shared(fd, bytes, writable)),
      bytes(bytes),
      writable(writable),
      excluded_from_fork_(exclude_from_fork),
      made_at_(fork_count()) {
    if (exclude_from_fork && madvise(base, bytes, MADV_DONTFORK) != 0) {
        int error = errno;
        munmap(base, bytes);
        throw OsError(error, "the arena cannot be kept out of forks: " + describe(error));
    }
}

// In a forked child the addresses of an excluded mapping may already belong to something else.
Mapping::~Mapping() {
    if (in_this_process()) munmap(base, bytes);
}

// --- the arena

void Arena::format(int fd, const std::string& arena_id, const std::string& job, uint32_t local_index,
                   const Geometry& geometry) {
    if (arena_id.size() != sizeof(StaticPart::arena_id)) throw std::invalid_argument("arena_id must have 16 bytes");
    if (job.empty() || job.size() > kJobBytesMax) throw std::invalid_argument("job must have 1 to 200 bytes of UTF-8");
    if (length_of(fd) != geometry.total_bytes()) {
        throw std::invalid_argument("the file does not have the length that bytes_needed() says; reserve() it first");
    }
    Mapping map(fd, geometry.total_bytes(), true, false);
    // Unnamed until it is whole: the magic is the last thing that is written.
    std::memset(map.base, 0, geometry.header_bytes());
    Header& header = header_of(map);
    for (SlotEntry& entry : header.slot) entry.state.store(kEmpty, std::memory_order_relaxed);
    StaticPart part = make_static_part(arena_id, job, local_index, geometry);
    std::memcpy(map.base + sizeof kMagic, reinterpret_cast<byte*>(&part) + sizeof kMagic, sizeof part - sizeof kMagic);
    std::atomic_thread_fence(std::memory_order_release);
    std::memcpy(map.base, kMagic, sizeof kMagic);
}

Arena::Arena(int fd, bool writable, bool populate_now, bool exclude_from_fork) {
    uint64_t real_bytes = length_of(fd);
    StaticPart part = read_static_part(fd, real_bytes);
    geometry_ = check_static_part(part, real_bytes);
    arena_id_.assign(reinterpret_cast<const char*>(part.arena_id), sizeof part.arena_id);
    job_.assign(part.job, part.job_bytes);
    local_index_ = part.local_index;
    map_ = std::make_shared<Mapping>(fd, part.total_bytes, writable, exclude_from_fork);
    if (populate_now) populate(map_->base, map_->bytes, writable);
}

std::shared_ptr<Mapping> Arena::mapped() const {
    if (!map_) throw std::invalid_argument("the arena is closed");
    if (!map_->in_this_process()) {
        throw std::invalid_argument("the arena was mapped by the parent of this process and is kept out of forks");
    }
    return map_;
}

std::shared_ptr<Mapping> Arena::mapped_for_writing() const {
    std::shared_ptr<Mapping> map = mapped();
    if (!map->writable) throw std::invalid_argument("the arena is mapped read-only");
    return map;
}

void Arena::close() {
    if (!map_) return;
    if (map_->in_this_process()) {
        if (map_->engines.load() > 0) throw InUseError("the arena has an engine that is not closed: close it first");
        if (map_->views.load() > 0) throw InUseError("the arena has views that are still in use: release them first");
    }
    map_.reset();
}

void Arena::check_index(uint32_t index) const {
    if (index >= geometry_.slots) {
        throw std::out_of_range("there is no slot " + std::to_string(index) + ": the arena has " +
                                std::to_string(geometry_.slots));
    }
}

void Arena::check_file_bytes(uint64_t file_bytes) const {
    if (file_bytes < 1 || file_bytes > geometry_.slot_bytes) {
        throw std::invalid_argument("file_bytes must be between 1 and the slot's " +
                                    std::to_string(geometry_.slot_bytes) + ", not " + std::to_string(file_bytes));
    }
}

uint64_t Arena::slot_offset(uint32_t index) const {
    check_index(index);
    return geometry_.header_bytes() + index * geometry_.slot_bytes;
}

Word32* Arena::crc_table(const Mapping& map, uint32_t index) const {
    check_index(index);
    return reinterpret_cast<Word32*>(map.base + sizeof(Header) + index * geometry_.table_bytes());
}

// --- owner

std::optional<Owner> Arena::owner() const {
    std::shared_ptr<Mapping> map = mapped();
    const Header& header = header_of(*map);
    if (header.owner_serial.load(std::memory_order_acquire) == 0) return std::nullopt;
    OwnerWords words;
    bool sound = false;
    // A writer needs two whole writes within one look to disturb it; nobody does that a thousand times in a row.
    for (int look = 0; look < 1000; ++look) {
        if (look_at_owner(header, words, sound)) break;
    }
    if (!sound) throw FormatError("the arena's owner record is damaged: it does not match its checksum");
    return unpack_owner(words);
}

void Arena::set_owner(const Owner& owner) {
    std::shared_ptr<Mapping> map = mapped_for_writing();
    Header& header = header_of(*map);
    uint32_t serial = low(header.owner_serial.load(std::memory_order_relaxed)) + 1;
    OwnerRecord& record = header.owner[serial & 1];
    OwnerWords words = pack_owner(owner, serial);
    std::atomic_thread_fence(std::memory_order_release);
    for (size_t i = 0; i < kOwnerWords; ++i) record.words[i].store(words[i], std::memory_order_relaxed);
    record.serial.store(serial, std::memory_order_relaxed);
    record.crc.store(crc_of(words), std::memory_order_relaxed);
    header.owner_serial.store(with_complement(serial), std::memory_order_release);
}

// --- slots

SlotInfo Arena::slot(uint32_t index) const {
    check_index(index);
    std::shared_ptr<Mapping> map = mapped();
    const SlotEntry& entry = header_of(*map).slot[index];
    SlotInfo info;
    info.index = index;
    for (int look = 0; look < 1000; ++look) {
        uint64_t life = entry.looks.load(std::memory_order_acquire);
        info.state = entry.state.load(std::memory_order_acquire);
        uint64_t step = entry.step.load(std::memory_order_acquire);
        info.identity = step == 0 ? Identity{} : identity_of(entry, step);
        info.file_bytes = step == 0 ? 0 : entry.file_bytes.load(std::memory_order_relaxed);
        info.sound = is_past_filling(info.state) && step != 0 && info.file_bytes >= 1 &&
                     info.file_bytes <= geometry_.slot_bytes &&
                     entry.sealed.load(std::memory_order_relaxed) == kSealed &&
                     entry.seal.load(std::memory_order_relaxed) == seal_of(*map, index, info.file_bytes);
        std::atomic_thread_fence(std::memory_order_acquire);
        if (entry.looks.load(std::memory_order_relaxed) == life &&
            entry.state.load(std::memory_order_relaxed) == info.state &&
            entry.step.load(std::memory_order_relaxed) == step) {
            return info;
        }
    }
    info.sound = false;
    return info;
}

// `file_bytes` was checked against the slot before.
uint32_t Arena::seal_of(const Mapping& map, uint32_t index, uint64_t file_bytes) const {
    const SlotEntry& entry = header_of(map).slot[index];
    Identity id = identity_of(entry, entry.step.load(std::memory_order_relaxed));
    const uint64_t words[] = {index,
                              id.step,
                              id.generation,
                              id.nonce[0],
                              id.nonce[1],
                              two(id.rank, id.world_size),
                              id.fingerprint[0],
                              id.fingerprint[1],
                              id.fingerprint[2],
                              id.fingerprint[3],
                              file_bytes};
    uint32_t crc = crc32c(0, arena_id_.data(), arena_id_.size());
    crc = crc32c(crc, words, sizeof words);
    return crc32c(crc, crc_table(map, index), geometry_.blocks_in_file(file_bytes) * sizeof(Word32));
}

bool Arena::take(uint32_t index) {
    check_index(index);
    std::shared_ptr<Mapping> map = mapped_for_writing();
    uint32_t expected = kEmpty;
    return header_of(*map).slot[index].state.compare_exchange_strong(expected, kFilling);
}

int Arena::claim(const Identity& identity) {
    if (identity.step == 0) throw std::invalid_argument("step must be at least 1: 0 means that a slot has no name");
    std::shared_ptr<Mapping> map = mapped_for_writing();
    for (uint32_t index = 0; index < geometry_.slots; ++index) {
        if (!take(index)) continue;
        crash_point(CrashPoint::claim_taken);
        SlotEntry& entry = header_of(*map).slot[index];
        begin_change(entry);
        write_identity(entry, identity);
        crash_point(CrashPoint::claim_named);
        return static_cast<int>(index);
    }
    return -1;
}

void Arena::publish(uint32_t index, uint64_t file_bytes) {
    check_index(index);
    check_file_bytes(file_bytes);
    std::shared_ptr<Mapping> map = mapped_for_writing();
    SlotEntry& entry = header_of(*map).slot[index];
    if (entry.state.load(std::memory_order_acquire) != kFilling || entry.step.load(std::memory_order_relaxed) == 0) {
        throw std::invalid_argument("slot " + std::to_string(index) + " is not being filled by anyone: claim it first");
    }
    begin_change(entry);
    entry.file_bytes.store(file_bytes, std::memory_order_relaxed);
    entry.seal.store(seal_of(*map, index, file_bytes), std::memory_order_relaxed);
    entry.sealed.store(kSealed, std::memory_order_relaxed);
    crash_point(CrashPoint::publish_before);
    store_fence();  // release alone does not order this thread's non-temporal stores
    uint32_t expected = kFilling;
    if (!entry.state.compare_exchange_strong(expected, kFull, std::memory_order_release)) {
        throw std::invalid_argument("slot " + std::to_string(index) + " was taken away while it was published");
    }
    crash_point(CrashPoint::publish_after);
}

bool Arena::advance(uint32_t index, uint32_t state, uint32_t to) {
    check_index(index);
    if (!is_past_filling(state) || !is_past_filling(to)) {
        throw std::invalid_argument("advance() moves between FULL, PROTECTED and COMMITTED only");
    }
    std::shared_ptr<Mapping> map = mapped_for_writing();
    return header_of(*map).slot[index].state.compare_exchange_strong(state, to, std::memory_order_acq_rel);
}

void Arena::empty(uint32_t index) {
    check_index(index);
    std::shared_ptr<Mapping> map = mapped_for_writing();
    SlotEntry& entry = header_of(*map).slot[index];
    begin_change(entry);
    entry.step.store(0, std::memory_order_release);
    entry.sealed.store(0, std::memory_order_relaxed);
    entry.seal.store(0, std::memory_order_relaxed);
    entry.file_bytes.store(0, std::memory_order_relaxed);
    entry.state.store(kEmpty, std::memory_order_release);
}

// --- checksums of a slot

std::vector<uint32_t> Arena::block_crcs(uint32_t index) const {
    check_index(index);
    std::shared_ptr<Mapping> map = mapped();
    uint64_t file_bytes = header_of(*map).slot[index].file_bytes.load(std::memory_order_acquire);
    if (file_bytes > geometry_.slot_bytes) throw FormatError("the slot's length is damaged: it exceeds the slot");
    std::vector<uint32_t> crcs(geometry_.blocks_in_file(file_bytes));
    const Word32* table = crc_table(*map, index);
    for (size_t i = 0; i < crcs.size(); ++i) crcs[i] = table[i].load(std::memory_order_relaxed);
    return crcs;
}

void Arena::set_block_crcs(const Mapping& map, uint32_t index, uint64_t file_bytes) const {
    check_index(index);
    check_file_bytes(file_bytes);
    Word32* table = crc_table(map, index);
    const byte* data = slot_bytes_at(map, index);
    for (uint64_t block = 0; block < geometry_.blocks_in_file(file_bytes); ++block) {
        uint64_t at = block * geometry_.block_bytes;
        table[block].store(crc32c(0, data + at, block_length(geometry_, block, file_bytes)), std::memory_order_relaxed);
    }
}

std::vector<uint64_t> Arena::verify(const Mapping& map, uint32_t index, int threads) const {
    check_index(index);
    check_threads(threads);
    uint64_t file_bytes = header_of(map).slot[index].file_bytes.load(std::memory_order_acquire);
    if (file_bytes > geometry_.slot_bytes) throw FormatError("the slot's length is damaged: it exceeds the slot");
    uint64_t blocks = geometry_.blocks_in_file(file_bytes);
    std::vector<byte> bad(blocks, 0);
    const Word32* table = crc_table(map, index);
    const byte* data = slot_bytes_at(map, index);
    parallel_for(threads, blocks, [&](uint64_t block) {
        uint32_t crc = crc32c(0, data + block * geometry_.block_bytes, block_length(geometry_, block, file_bytes));
        bad[block] = crc != table[block].load(std::memory_order_relaxed);
    });
    std::vector<uint64_t> found;
    for (uint64_t block = 0; block < blocks; ++block) {
        if (bad[block]) found.push_back(block);
    }
    return found;
}

}  // namespace snapshotd
