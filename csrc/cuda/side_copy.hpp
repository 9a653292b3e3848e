// From tensors on a device to a slot in host memory, beside the training: the copy engine of the CUDA path.
//
// The order of a snapshot, and who makes each call:
// 1. begin    the trainer at its cut: the side stream waits for all that the compute stream was given until now
// 2. hold     the trainer before its optimizer writes: the compute stream waits for the last read of the tensors; the
//             host does not wait
// 3. done / wait   whoever publishes the slot: every byte and every checksum has arrived in host memory
//
// The slot is moved in buckets of whole blocks. For each, one kernel gathers all its pieces, what no piece covers (the
// header, host state) comes up from the slot, so that the bucket on the device is the slot's image; its blocks are
// checksummed there; then pieces and checksums go down.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "device.hpp"

namespace snapshotd::gpu {

constexpr uint64_t kSegmentBytes = 256ull << 20;  // some drivers refuse to register more in one call

// Host memory that the device copies by itself, registered in segments. No copy may cross from one into the next.
class Pinned {
  public:
    Pinned(Device& device, uint8_t* memory, uint64_t bytes, uint64_t segment_bytes = kSegmentBytes);
    ~Pinned();
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;

    bool holds(const void* at, uint64_t bytes) const;
    // Copies between this memory and the device, as many as there are segments.
    void copy_down(uint8_t* to, const uint8_t* from_device, uint64_t bytes, Stream stream) const;
    void copy_up(uint8_t* to_device, const uint8_t* from, uint64_t bytes, Stream stream) const;

  private:
    template <typename Copy>
    void for_segments(const uint8_t* at, uint64_t bytes, Copy copy) const;

    Device& device_;
    uint8_t* const memory_;
    const uint64_t bytes_, segment_bytes_;
    uint64_t pinned_ = 0;  // bytes registered so far: what failure has to undo
};

// A descriptor of our own for an eventfd of somebody else's, who may close it at any time. -1: there is none.
class Bell {
  public:
    explicit Bell(int fd);
    ~Bell();
    Bell(const Bell&) = delete;
    Bell& operator=(const Bell&) = delete;

    int fd() const { return fd_; }

  private:
    int fd_;
};

// Dense memory of a tensor, and where it goes in the slot.
struct SlotPiece {
    const uint8_t* from;
    uint64_t offset;
    uint64_t bytes;
};

class SideCopy {
  public:
    // std::invalid_argument for pieces that overlap in the slot, end behind it, or are not memory of the device.
    // `bucket_bytes` is rounded up to whole blocks. What is allocated here is all that is ever allocated. `notify_fd`
    // is an eventfd, or -1: it is written to when a copy is over, `done` being true by then.
    SideCopy(Device& device, const Pinned& arena, uint64_t file_bytes, uint64_t block_bytes, uint64_t bucket_bytes,
             std::vector<SlotPiece> pieces, int notify_fd = -1);
    ~SideCopy();

    // begin belongs to one thread, hold to the trainer's, done and wait to any.
    // std::logic_error while a copy runs; std::invalid_argument where slot or crcs are not in the arena.
    void begin(uint8_t* slot, uint32_t* crcs, Stream compute);
    void hold(Stream compute);
    bool done();
    void wait();

  private:
    struct Run {  // bytes of one bucket that lie side by side
        uint64_t at, bytes;
    };
    struct Bucket {
        uint64_t at, bytes;            // in the slot
        uint64_t first_piece, pieces;  // in the table
        uint64_t chunks;
        std::vector<Run> moved, kept;  // down from the device; up from the slot
    };

    void cut(const std::vector<SlotPiece>& pieces);
    void enqueue(const Bucket& bucket, uint8_t* slot, uint32_t* crcs);
    void give_up() noexcept;

    Device& device_;
    const Pinned& arena_;
    const uint64_t file_bytes_, block_bytes_, bucket_bytes_;
    std::vector<Piece> table_;
    std::vector<Bucket> buckets_;
    const Bell bell_;
    std::optional<DeviceMemory> stage_, table_memory_, crc_memory_;
    OwnStream side_;
    OwnEvent ready_, read_, over_;
    std::atomic<bool> running_{false};
};

}  // namespace snapshotd::gpu
