#include "pull.hpp"

#include <errno.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "crc32c.hpp"

namespace snapshotd {

namespace {

using Clock = std::chrono::steady_clock;

// The bytes of one source as they come, and the checksum of the block that they are in.
class Arrival {
  public:
    void begin(const Source& source) { source_ = &source; }

    size_t left() const { return source_->bytes - at_; }

    // Fills `part`, of at most as many bytes as are left, and checks what it ends; false where `pulled` says why not.
    bool take(byte* part, size_t bytes, Clock::time_point deadline, Pulled& pulled) noexcept {
        if (source_->there != nullptr) {
            std::memcpy(part, source_->there + at_, bytes);
        } else if (!receive(part, bytes, deadline, pulled)) {
            return false;
        }
        return check(part, bytes, pulled);
    }

  private:
    bool receive(byte* part, size_t bytes, Clock::time_point deadline, Pulled& pulled) noexcept {
        for (size_t at = 0; at < bytes;) {
            if (Clock::now() > deadline) {
                pulled.error = EAGAIN;
                return false;
            }
            const ssize_t count = recv(source_->socket, part + at, bytes - at, MSG_WAITALL);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) pulled.error = errno;
            if (count <= 0) return false;
            at += static_cast<size_t>(count);
        }
        return true;
    }

    bool check(const byte* part, size_t bytes, Pulled& pulled) noexcept {
        for (size_t done = 0; done < bytes;) {
            const size_t block_end = std::min(source_->bytes, (block_ + 1) * source_->crcs.block_bytes);
            const size_t count = std::min(bytes - done, block_end - at_);
            crc_ = crc32c(crc_, part + done, count);
            done += count;
            at_ += count;
            if (at_ < block_end) continue;
            if (crc_ != source_->crcs.word(static_cast<int64_t>(block_))) {
                pulled.bad_block = static_cast<int64_t>(block_);
                return false;
            }
            ++block_;
            crc_ = 0;
        }
        return true;
    }

    const Source* source_ = nullptr;
    size_t at_ = 0, block_ = 0;
    uint32_t crc_ = 0;
};

size_t part_for(const Sum& sum, size_t count) {
    const size_t share = sum.staging_bytes / std::max<size_t>(count, 1);
    return share < kSuperblockBytes ? share : share / kSuperblockBytes * kSuperblockBytes;
}

}  // namespace

Pulled pull(const ErasureTier& tier, const Source* sources, size_t count, const Sum& sum, Patience patience) noexcept {
    const Clock::time_point deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(patience);
    const size_t part = part_for(sum, count);
    Arrival arrivals[kSymbolsMax];
    for (size_t i = 0; i < count; ++i) arrivals[i].begin(sources[i]);
    Pulled pulled;
    for (size_t at = 0; at < sum.bytes; at += part) {
        const size_t room = std::min(part, sum.bytes - at);
        byte factors[kSymbolsMax];
        const byte* from[kSymbolsMax];
        unsigned inputs = 0;
        for (size_t i = 0; i < count; ++i) {
            const size_t come = std::min(arrivals[i].left(), room);
            if (come == 0) continue;
            byte* staged = sum.staging + inputs * part;
            if (!arrivals[i].take(staged, come, deadline, pulled)) {
                pulled.source = static_cast<int64_t>(i);
                return pulled;
            }
            std::memset(staged + come, 0, room - come);
            from[inputs] = staged;
            factors[inputs++] = sources[i].factor;
        }
        byte* to = sum.to + at;
        if (inputs == 0) {
            std::memset(to, 0, room);
        } else {
            combine_piece(tier, sum.layout, {factors, from, inputs, &to, 1, false}, room);
        }
    }
    return pulled;
}

}  // namespace snapshotd
