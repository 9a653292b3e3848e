// Bytes that arrive on several sockets, checksummed and added up while they are in a core's cache.
#pragma once

#include <chrono>

#include "erasure.hpp"

namespace snapshotd {

// What comes from one side: `bytes` bytes that begin with a block and end with one, times `factor`. What they lack of
// the sum's length is zero. They arrive on `socket`, or have arrived at `there` already.
struct Source {
    int socket;
    const byte* there;
    byte factor;
    size_t bytes;
    BlockCrcs crcs;
};

// Where they are added up. `staging` holds the same part of every source side by side, so that the sum is written once;
// in planes its share for a source is a superblock at least.
struct Sum {
    byte* to;
    size_t bytes;
    Layout layout;
    byte* staging;
    size_t staging_bytes;
};

// Which source failed, -1 where none did: a block of it differs from its checksum (`bad_block`, else -1), its socket
// failed (`error` is an errno; EAGAIN: the socket's own patience is over, or `patience` with all of it), or neither,
// and the other side has ended.
struct Pulled {
    int64_t source = -1;
    int64_t bad_block = -1;
    int error = 0;
};

// How long all of it may take: a socket's own timeout begins anew with every byte that drips in.
using Patience = std::chrono::duration<double>;

// to = the sum of factor * source. A part is added before its block's checksum is known at the block's end: where
// something fails, all of `to` is to be made again, and the sockets are somewhere in the middle.
Pulled pull(const ErasureTier& tier, const Source* sources, size_t count, const Sum& sum, Patience patience) noexcept;

}  // namespace snapshotd
