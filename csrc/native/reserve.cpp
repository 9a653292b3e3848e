#include "reserve.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

#include "common.hpp"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

namespace snapshotd {

namespace {

constexpr uint64_t kPiece = 256ull << 20;  // a signal is served between two pieces
constexpr int kMpolPreferred = 1;
constexpr int kNodesMax = 1024;

void prefer_node(void* base, size_t bytes, int node) {
    if (node < 0 || node >= kNodesMax) return;
    constexpr int bits = 8 * sizeof(unsigned long);
    unsigned long mask[kNodesMax / bits] = {};
    mask[node / bits] = 1ul << (node % bits);
    syscall(SYS_mbind, base, bytes, kMpolPreferred, mask, kNodesMax + 1, 0);
}

// The page policy is a property of a mapping, so the pages are made through one. All of this is a preference: what
// it leaves undone, posix_fallocate does.
void place(int fd, uint64_t total_bytes, int node) {
    if (node < 0) return;
    void* base = mmap(nullptr, total_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) return;
    madvise(base, total_bytes, MADV_HUGEPAGE);
    prefer_node(base, total_bytes, node);
    for (uint64_t at = 0; at < total_bytes; at += kPiece) {
        auto* from = static_cast<byte*>(base) + at;
        if (madvise(from, std::min(kPiece, total_bytes - at), MADV_POPULATE_WRITE) != 0) break;
    }
    munmap(base, total_bytes);
}

int allocate(int fd, uint64_t total_bytes) {
    for (uint64_t at = 0; at < total_bytes; at += kPiece) {
        int error;
        do {
            error = posix_fallocate(fd, static_cast<off_t>(at), static_cast<off_t>(std::min(kPiece, total_bytes - at)));
        } while (error == EINTR);
        if (error != 0) return error;
    }
    return 0;
}

}  // namespace

void reserve(int fd, uint64_t total_bytes, int numa_node) {
    if (total_bytes == 0 || total_bytes > (1ull << 60)) throw std::invalid_argument("total_bytes is out of range");
    if (ftruncate(fd, static_cast<off_t>(total_bytes)) != 0) {
        throw OsError(errno, std::string("the arena file cannot be given its length: ") + std::strerror(errno));
    }
    place(fd, total_bytes, numa_node);
    int error = allocate(fd, total_bytes);
    if (error == 0) return;
    if (ftruncate(fd, 0) != 0) error = errno;
    throw OsError(error, "no room for an arena of " + std::to_string(total_bytes) +
                             " bytes: " + std::strerror(error));
}

void populate(void* base, size_t bytes, bool writable) {
    int advice = writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
    auto* start = static_cast<byte*>(base);
    size_t at = 0;
    for (; at < bytes; at += kPiece) {
        size_t piece = std::min<size_t>(kPiece, bytes - at);
        int result;
        do {
            result = madvise(start + at, piece, advice);
        } while (result != 0 && errno == EINTR);
        if (result != 0) break;
    }
    // Kernels before 5.14: touch each page, atomically, since another process may be writing there.
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (; at < bytes; at += page) {
        if (writable) {
            __atomic_fetch_or(start + at, static_cast<byte>(0), __ATOMIC_RELAXED);
        } else {
            (void)__atomic_load_n(start + at, __ATOMIC_RELAXED);
        }
    }
}

uint64_t rss_anon_bytes() {
    std::unique_ptr<FILE, int (*)(FILE*)> status(fopen("/proc/self/status", "re"), fclose);
    if (!status) throw OsError(errno, "/proc/self/status cannot be read");
    char line[256];
    while (fgets(line, sizeof line, status.get())) {
        unsigned long long kib;
        if (sscanf(line, "RssAnon: %llu kB", &kib) == 1) return kib * 1024;
    }
    throw OsError(ENOENT, "/proc/self/status has no RssAnon line");
}

}  // namespace snapshotd
