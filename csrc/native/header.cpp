#include "header.hpp"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "crc32c.hpp"

namespace snapshotd {

const char kMagic[8] = {'S', 'N', 'A', 'P', 'A', 'R', 'N', 'A'};

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
    if (fstat(fd, &status) != 0)
        throw OsError(errno, std::string("the arena file cannot be looked at: ") + std::strerror(errno));
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
    if (got < 0) throw OsError(errno, std::string("the arena's header cannot be read: ") + std::strerror(errno));
    if (got != static_cast<ssize_t>(sizeof part)) throw FormatError("the arena shrank while its header was read");
    return part;
}

}  // namespace snapshotd
