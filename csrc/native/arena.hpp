// The arena: a shared-memory file with a header and slots, mapped by a daemon and a trainer that may die at any time.
//
// Who writes what: the daemon the static part, the owner record and its words; the trainer `passed` and the slots up
// to FULL; the daemon the slots from there on. Nobody trusts the file: its sizes are read once, checked against the
// file's real length and kept in this process.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "header.hpp"
#include "owner.hpp"

namespace snapshotd {

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
    std::vector<uint32_t> set_block_crcs(const Mapping& map, uint32_t index, uint64_t file_bytes) const;
    void put_block_crcs(const Mapping& map, uint32_t index, uint64_t file_bytes,
                        const std::vector<uint32_t>& crcs) const;
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
