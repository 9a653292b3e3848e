#include "side_copy.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

namespace snapshotd::gpu {

// --- registered memory

Pinned::Pinned(Device& device, uint8_t* memory, uint64_t bytes, uint64_t segment_bytes)
    : device_(device), memory_(memory), bytes_(bytes), segment_bytes_(segment_bytes) {
    if (memory == nullptr || bytes == 0 || segment_bytes == 0) throw std::invalid_argument("there is nothing to pin");
    try {
        while (pinned_ < bytes_) {
            const uint64_t length = std::min(segment_bytes_, bytes_ - pinned_);
            device_.pin(memory_ + pinned_, length);
            pinned_ += length;
        }
    } catch (...) {
        for (uint64_t at = 0; at < pinned_; at += segment_bytes_) device_.unpin(memory_ + at);
        throw;
    }
}

Pinned::~Pinned() {
    for (uint64_t at = 0; at < pinned_; at += segment_bytes_) device_.unpin(memory_ + at);
}

bool Pinned::holds(const void* at, uint64_t bytes) const {
    const auto begin = reinterpret_cast<uint64_t>(at), first = reinterpret_cast<uint64_t>(memory_);
    return begin >= first && bytes <= bytes_ && begin - first <= bytes_ - bytes;
}

template <typename Copy>
void Pinned::for_segments(const uint8_t* at, uint64_t bytes, Copy copy) const {
    uint64_t from = static_cast<uint64_t>(at - memory_), done = 0;
    while (done < bytes) {
        const uint64_t length = std::min(segment_bytes_ - (from + done) % segment_bytes_, bytes - done);
        copy(done, length);
        done += length;
    }
}

void Pinned::copy_down(uint8_t* to, const uint8_t* from_device, uint64_t bytes, Stream stream) const {
    for_segments(to, bytes,
                 [&](uint64_t at, uint64_t length) { device_.copy(to + at, from_device + at, length, stream); });
}

void Pinned::copy_up(uint8_t* to_device, const uint8_t* from, uint64_t bytes, Stream stream) const {
    for_segments(from, bytes,
                 [&](uint64_t at, uint64_t length) { device_.copy(to_device + at, from + at, length, stream); });
}

// --- the bell

Bell::Bell(int fd) : fd_(fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3)) {
    if (fd >= 0 && fd_ < 0) throw std::invalid_argument("descriptor " + std::to_string(fd) + " is not open");
}

Bell::~Bell() {
    if (fd_ >= 0) close(fd_);
}

// --- the plan

SideCopy::SideCopy(Device& device, const Pinned& arena, uint64_t file_bytes, uint64_t block_bytes,
                   uint64_t bucket_bytes, std::vector<SlotPiece> pieces, int notify_fd)
    : device_(device),
      arena_(arena),
      file_bytes_(file_bytes),
      block_bytes_(block_bytes),
      bucket_bytes_(
          block_bytes == 0 ? 0 : std::max<uint64_t>(1, (bucket_bytes + block_bytes - 1) / block_bytes) * block_bytes),
      bell_(notify_fd),
      side_(device),
      ready_(device),
      read_(device),
      over_(device) {
    if (file_bytes == 0 || block_bytes == 0)
        throw std::invalid_argument("a slot has bytes, and blocks of at least one");
    std::sort(pieces.begin(), pieces.end(), [](auto& a, auto& b) { return a.offset < b.offset; });
    uint64_t end = 0;
    for (const SlotPiece& piece : pieces) {
        const std::string name = "the piece at offset " + std::to_string(piece.offset);
        if (piece.bytes == 0) throw std::invalid_argument(name + " is empty");
        if (piece.offset < end) throw std::invalid_argument(name + " overlaps the one before it");
        if (piece.offset > file_bytes || piece.bytes > file_bytes - piece.offset) {
            throw std::invalid_argument(name + " ends behind the file's " + std::to_string(file_bytes) + " bytes");
        }
        device.check_memory(piece.from, piece.bytes, name);
        end = piece.offset + piece.bytes;
    }
    device.prepare_copies();
    stage_.emplace(device, std::min(bucket_bytes_, (file_bytes + 15) / 16 * 16));
    crc_memory_.emplace(device, (bucket_bytes_ / block_bytes_) * sizeof(uint32_t));
    cut(pieces);
    if (table_.empty()) return;
    table_memory_.emplace(device, table_.size() * sizeof(Piece));
    device.copy(table_memory_->at(), table_.data(), table_.size() * sizeof(Piece), side_);
    device.finish(side_);
}

SideCopy::~SideCopy() {
    give_up();
}

// What was enqueued still reads tensors and writes the slot: nobody may let go of them before it is over.
void SideCopy::give_up() noexcept {
    try {
        device_.finish(side_);
    } catch (const DeviceError&) {
        // The device is lost: nothing of it runs any more.
    }
    running_ = false;
}

void SideCopy::cut(const std::vector<SlotPiece>& pieces) {
    size_t next = 0;
    for (uint64_t at = 0; at < file_bytes_; at += bucket_bytes_) {
        Bucket bucket{at, std::min(bucket_bytes_, file_bytes_ - at), table_.size(), 0, 0, {}, {}};
        const uint64_t end = at + bucket.bytes;
        uint64_t covered = at;
        for (size_t i = next; i < pieces.size() && pieces[i].offset < end; ++i) {
            const uint64_t from = std::max(at, pieces[i].offset);
            const uint64_t to = std::min(end, pieces[i].offset + pieces[i].bytes);
            if (from > covered) bucket.kept.push_back({covered, from - covered});
            if (!bucket.moved.empty() && bucket.moved.back().at + bucket.moved.back().bytes == from) {
                bucket.moved.back().bytes += to - from;
            } else {
                bucket.moved.push_back({from, to - from});
            }
            table_.push_back(
                {pieces[i].from + (from - pieces[i].offset), stage_->at() + (from - at), to - from, bucket.chunks});
            bucket.chunks += (to - from + kChunkBytes - 1) / kChunkBytes;
            ++bucket.pieces;
            covered = to;
            if (pieces[i].offset + pieces[i].bytes <= end) next = i + 1;
        }
        if (covered < end) bucket.kept.push_back({covered, end - covered});
        buckets_.push_back(std::move(bucket));
    }
}

// --- one copy

void SideCopy::begin(uint8_t* slot, uint32_t* crcs, Stream compute) {
    if (running_) throw std::logic_error("a copy is running: wait for it first");
    const uint64_t blocks = (file_bytes_ + block_bytes_ - 1) / block_bytes_;
    if (!arena_.holds(slot, file_bytes_) || !arena_.holds(crcs, blocks * sizeof(uint32_t))) {
        throw std::invalid_argument("the slot and its checksums must lie in the arena's pinned memory");
    }
    device_.record(ready_, compute);
    device_.wait(side_, ready_);
    running_ = true;
    try {
        for (const Bucket& bucket : buckets_) enqueue(bucket, slot, crcs);
        device_.record(over_, side_);
        if (bell_.fd() >= 0) device_.notify(bell_.fd(), side_);
    } catch (...) {
        give_up();
        throw;
    }
}

void SideCopy::enqueue(const Bucket& bucket, uint8_t* slot, uint32_t* crcs) {
    const bool last = &bucket == &buckets_.back();
    uint8_t* stage = stage_->at();
    if (bucket.pieces > 0) {
        const auto* table = reinterpret_cast<const Piece*>(table_memory_->at());
        device_.copy_pieces(table + bucket.first_piece, bucket.pieces, bucket.chunks, side_);
    }
    if (last) device_.record(read_, side_);  // from here on the tensors are free
    for (const Run& run : bucket.kept) {
        arena_.copy_up(stage + (run.at - bucket.at), slot + run.at, run.bytes, side_);
    }
    auto* sums = reinterpret_cast<uint32_t*>(crc_memory_->at());
    const uint64_t blocks = (bucket.bytes + block_bytes_ - 1) / block_bytes_;
    device_.crc32c(stage, bucket.bytes, block_bytes_, sums, side_);
    for (const Run& run : bucket.moved) {
        arena_.copy_down(slot + run.at, stage + (run.at - bucket.at), run.bytes, side_);
    }
    arena_.copy_down(reinterpret_cast<uint8_t*>(crcs + bucket.at / block_bytes_), crc_memory_->at(),
                     blocks * sizeof(uint32_t), side_);
}

void SideCopy::hold(Stream compute) {
    if (running_) device_.wait(compute, read_);
}

bool SideCopy::done() {
    if (running_ && device_.done(over_)) running_ = false;
    return !running_;
}

void SideCopy::wait() {
    if (!running_) return;
    device_.reach(over_);
    running_ = false;
}

}  // namespace snapshotd::gpu
