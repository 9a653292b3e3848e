#include "arena.hpp"

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
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

constexpr uint32_t kSealed = 0xC35AA53C;

std::atomic<uint32_t> forks{0};
const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });

bool is_past_filling(uint32_t state) {
    return state == kFull || state == kProtected || state == kCommitted;
}

std::string describe(int error) {
    return std::strerror(error);
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
    return read_owner(header_of(*mapped()));
}

void Arena::set_owner(const Owner& owner) {
    write_owner(header_of(*mapped_for_writing()), owner);
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

std::vector<uint32_t> Arena::set_block_crcs(const Mapping& map, uint32_t index, uint64_t file_bytes) const {
    check_index(index);
    check_file_bytes(file_bytes);
    Word32* table = crc_table(map, index);
    const byte* data = slot_bytes_at(map, index);
    std::vector<uint32_t> made(geometry_.blocks_in_file(file_bytes));
    for (uint64_t block = 0; block < made.size(); ++block) {
        uint64_t at = block * geometry_.block_bytes;
        made[block] = crc32c(0, data + at, block_length(geometry_, block, file_bytes));
        table[block].store(made[block], std::memory_order_relaxed);
    }
    return made;
}

void Arena::put_block_crcs(const Mapping& map, uint32_t index, uint64_t file_bytes,
                           const std::vector<uint32_t>& crcs) const {
    check_index(index);
    check_file_bytes(file_bytes);
    if (crcs.size() != geometry_.blocks_in_file(file_bytes)) {
        throw std::invalid_argument("a file of " + std::to_string(file_bytes) + " bytes has " +
                                    std::to_string(geometry_.blocks_in_file(file_bytes)) + " checksums here, not " +
                                    std::to_string(crcs.size()));
    }
    Word32* table = crc_table(map, index);
    for (size_t block = 0; block < crcs.size(); ++block) table[block].store(crcs[block], std::memory_order_relaxed);
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
