// Real pages for a file in tmpfs, and what Linux says about this process's memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.hpp"

namespace snapshotd {

// Maps a file, shared, at an address where its huge pages can be mapped as such. OsError where that fails.
byte* map_shared(int fd, uint64_t bytes, bool writable);

// Gives the file `total_bytes` of pages. Throws OsError(ENOSPC) where there is no room; the file is empty then.
void reserve(int fd, uint64_t total_bytes, int numa_node);

// Touches every page of a mapping, for writing where it is writable, so that later accesses take no faults.
void populate(void* base, size_t bytes, bool writable);

// The same for memory that is about to be written, of which this thread has no need to know whether it worked.
void prefault(byte* data, size_t bytes);

// RssAnon of this process in bytes.
uint64_t rss_anon_bytes();

}  // namespace snapshotd
