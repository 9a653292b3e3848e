#include "owner.hpp"

#include <array>
#include <atomic>

#include "crc32c.hpp"

namespace snapshotd {

namespace {

using OwnerWords = std::array<uint64_t, kOwnerWords + 1>;  // the last one is the serial

OwnerWords pack_owner(const Owner& o, uint64_t serial) {
    return {o.generation,
            o.nonce[0],
            o.nonce[1],
            two(o.rank, o.world_size),
            two(o.local_world, o.every),
            two(o.pid, (o.fenced ? 1u : 0u) | (o.closed ? 2u : 0u)),
            o.released_at_s,
            o.restored_generation,
            o.restored_nonce[0],
            o.restored_nonce[1],
            o.restored_step,
            0,
            0,
            0,
            serial};
}

Owner unpack_owner(const OwnerWords& w) {
    Owner o;
    o.generation = w[0];
    o.nonce = {w[1], w[2]};
    o.rank = low(w[3]);
    o.world_size = high(w[3]);
    o.local_world = low(w[4]);
    o.every = high(w[4]);
    o.pid = low(w[5]);
    o.fenced = (high(w[5]) & 1) != 0;
    o.closed = (high(w[5]) & 2) != 0;
    o.released_at_s = w[6];
    o.restored_generation = w[7];
    o.restored_nonce = {w[8], w[9]};
    o.restored_step = w[10];
    return o;
}

uint32_t crc_of(const OwnerWords& words) {
    return crc32c(0, words.data(), sizeof words);
}

uint64_t with_complement(uint32_t serial) {
    return two(serial, ~serial);
}

// One look at the record that counts; false where a writer was at it meanwhile.
bool look_at_owner(const Header& header, OwnerWords& words, bool& sound) {
    uint64_t mark = header.owner_serial.load(std::memory_order_acquire);
    const OwnerRecord& record = header.owner[low(mark) & 1];
    for (size_t i = 0; i < kOwnerWords; ++i) words[i] = record.words[i].load(std::memory_order_relaxed);
    words[kOwnerWords] = record.serial.load(std::memory_order_relaxed);
    uint64_t crc = record.crc.load(std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_acquire);
    sound = mark == with_complement(low(mark)) && words[kOwnerWords] == low(mark) && crc == crc_of(words);
    return header.owner_serial.load(std::memory_order_relaxed) == mark;
}

}  // namespace

std::optional<Owner> read_owner(const Header& header) {
    if (header.owner_serial.load(std::memory_order_acquire) == 0) return std::nullopt;
    OwnerWords words;
    bool sound = false;
    // A writer needs two whole writes within one look to disturb it; nobody does that a thousand times in a row.
    for (int look = 0; look < 1000; ++look) {
        if (look_at_owner(header, words, sound)) break;
    }
    if (!sound) throw FormatError("the arena's owner record is damaged: it does not match its checksum");
    return unpack_owner(words);
}

void write_owner(Header& header, const Owner& owner) {
    uint32_t serial = low(header.owner_serial.load(std::memory_order_relaxed)) + 1;
    OwnerRecord& record = header.owner[serial & 1];
    OwnerWords words = pack_owner(owner, serial);
    std::atomic_thread_fence(std::memory_order_release);
    for (size_t i = 0; i < kOwnerWords; ++i) record.words[i].store(words[i], std::memory_order_relaxed);
    record.serial.store(serial, std::memory_order_relaxed);
    record.crc.store(crc_of(words), std::memory_order_relaxed);
    header.owner_serial.store(with_complement(serial), std::memory_order_release);
}

}  // namespace snapshotd
