// The owner record: which generation an arena belongs to. Written by the daemon, read by anyone at any time.
#pragma once

#include <cstdint>
#include <optional>

#include "header.hpp"

namespace snapshotd {

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

// Nothing where no record was ever written. FormatError where it is damaged.
std::optional<Owner> read_owner(const Header& header);

// One writer at a time; one that is killed half way leaves the record before.
void write_owner(Header& header, const Owner& owner);

}  // namespace snapshotd
