#include "reserve.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
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
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace snapshotd {

namespace {

constexpr uint64_t kPiece = 64ull << 20;  // a signal is served between two pieces
constexpr uint64_t kHugePage = 2ull << 20;
constexpr uint64_t kSmallPage = 4096;
constexpr int kMpolPreferred = 1;
constexpr int kNodesMax = 1024;

// madvise, again when a signal came in between.
int advise(void* base, size_t bytes, int advice) {
    int result;
    do {
        result = madvise(base, bytes, advice);
    } while (result != 0 && errno == EINTR);
    return result;
}

void prefer_node(void* base, size_t bytes, int node) {
    if (node < 0 || node >= kNodesMax) return;
    constexpr int bits = 8 * sizeof(unsigned long);
    unsigned long mask[kNodesMax / bits] = {};
    mask[node / bits] = 1ul << (node % bits);
    syscall(SYS_mbind, base, bytes, kMpolPreferred, mask, kNodesMax + 1, 0);
}

// One small page in each huge one, then the kernel is asked to make each whole: MADV_COLLAPSE does so for a tmpfs that
// was mounted without huge pages too, but not where nothing is yet. Populating reports a full file system; a plain
// store would be a SIGBUS.
bool make_huge_pages(byte* base, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += kHugePage) {
        if (advise(base + at, kSmallPage, MADV_POPULATE_WRITE) != 0) return false;
    }
    return advise(base, bytes, MADV_COLLAPSE) == 0;
}

// The policy of pages is a property of a mapping, so the pages are made through one. Huge ones make everything after
// it cheaper: a trainer maps, fills and leaves 2 GiB in milliseconds instead of half a second. All of this is a
// preference: what it leaves undone, posix_fallocate does.
void make_pages(int fd, uint64_t total_bytes, int node) {
    byte* base;
    try {
        base = map_shared(fd, total_bytes, true);
    } catch (const OsError&) {
        return;
    }
    prefer_node(base, total_bytes, node);
    uint64_t at = 0;
    for (uint64_t piece; total_bytes - at >= kHugePage; at += piece) {
        piece = std::min(kPiece, (total_bytes - at) / kHugePage * kHugePage);
        if (!make_huge_pages(base + at, piece)) break;
    }
    for (uint64_t piece; node >= 0 && at < total_bytes; at += piece) {
        piece = std::min(kPiece, total_bytes - at);
        if (advise(base + at, piece, MADV_POPULATE_WRITE) != 0) break;
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

byte* map_shared(int fd, uint64_t bytes, bool writable) {
    // A wider range first, which nothing can get in between, then the file over its aligned part.
    const uint64_t wide = bytes + kHugePage;
    void* range = mmap(nullptr, wide, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) throw OsError(errno, std::string("the arena cannot be mapped: ") + std::strerror(errno));
    auto* start = static_cast<byte*>(range);
    byte* base = start + (kHugePage - reinterpret_cast<uintptr_t>(range) % kHugePage) % kHugePage;
    int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    if (mmap(base, bytes, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        int error = errno;
        munmap(range, wide);
        throw OsError(error, std::string("the arena cannot be mapped: ") + std::strerror(error));
    }
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    byte* end = base + (bytes + page - 1) / page * page;
    if (base > start) munmap(start, base - start);
    if (end < start + wide) munmap(end, start + wide - end);
    madvise(base, bytes, MADV_HUGEPAGE);
    return base;
}

namespace {

// Asked before the first page is made: filling a file system or a machine to the brim only to give it all back would
// take others' room meanwhile, and past a cgroup's limit the answer is not ENOSPC but SIGKILL.
bool has_room(int fd, uint64_t total_bytes) {
    struct stat file;
    struct statvfs system;
    struct sysinfo machine;
    if (fstat(fd, &file) != 0 || fstatvfs(fd, &system) != 0 || sysinfo(&machine) != 0) return true;
    const uint64_t held = static_cast<uint64_t>(file.st_blocks) * 512;
    const uint64_t wanted = total_bytes > held ? total_bytes - held : 0;
    const bool limited = system.f_blocks > 0;
    if (limited && wanted / system.f_frsize > system.f_bavail) return false;
    return wanted / machine.mem_unit <= machine.totalram + machine.totalswap;
}

int reserve_or_error(int fd, uint64_t total_bytes, int numa_node) {
    if (!has_room(fd, total_bytes)) return ENOSPC;
    if (ftruncate(fd, static_cast<off_t>(total_bytes)) != 0) return errno;
    make_pages(fd, total_bytes, numa_node);
    return allocate(fd, total_bytes);
}

}  // namespace

void reserve(int fd, uint64_t total_bytes, int numa_node) {
    if (total_bytes == 0 || total_bytes > (1ull << 60)) throw std::invalid_argument("total_bytes is out of range");
    int error = reserve_or_error(fd, total_bytes, numa_node);
    if (error == 0) return;
    const std::string why = std::strerror(error);
    if (ftruncate(fd, 0) != 0) error = errno;
    throw OsError(error, "no room for an arena of " + std::to_string(total_bytes) + " bytes: " + why);
}

void populate(void* base, size_t bytes, bool writable) {
    int advice = writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
    auto* start = static_cast<byte*>(base);
    size_t at = 0;
    for (; at < bytes; at += kPiece) {
        if (advise(start + at, std::min<size_t>(kPiece, bytes - at), advice) != 0) break;
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

void prefault(byte* data, size_t bytes) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
    if (bytes != 0) advise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
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
