// Gather of thousands of tensors into one buffer, and scatter back: a list of pieces of raw bytes, whatever their
// dtype.
#pragma once

#include "memory.cuh"

namespace snapshotd::gpu {

constexpr uint64_t kChunkBytes = 16384;

// `first_chunk` is how many chunks all pieces before this one have. No piece is empty.
struct Piece {
    const uint8_t* from;
    uint8_t* to;
    uint64_t bytes;
    uint64_t first_chunk;
};

// The piece that holds this chunk: the last one that begins at or before it.
SNAPSHOTD_FN uint64_t piece_of(const Piece* pieces, uint64_t count, uint64_t chunk) {
    uint64_t low = 0, high = count - 1;
    while (low < high) {
        const uint64_t middle = (low + high + 1) / 2;
        if (load(&pieces[middle].first_chunk) <= chunk) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Bytes [0, bytes) by elements of one width, from where `to` is aligned on; the rest byte by byte.
template <typename Element>
SNAPSHOTD_FN void copy_by(uint8_t* to, const uint8_t* from, uint64_t bytes, Share share) {
    const uint64_t skew = reinterpret_cast<uint64_t>(to) % sizeof(Element);
    uint64_t head = skew == 0 ? 0 : sizeof(Element) - skew;
    if (head > bytes) head = bytes;
    const uint64_t whole = (bytes - head) / sizeof(Element);
    for (uint64_t i = share.first; i < whole; i += share.step) {
        store(reinterpret_cast<Element*>(to + head) + i, load(reinterpret_cast<const Element*>(from + head) + i));
    }
    for (uint64_t i = share.first; i < head; i += share.step) store(to + i, load(from + i));
    for (uint64_t i = head + whole * sizeof(Element) + share.first; i < bytes; i += share.step) {
        store(to + i, load(from + i));
    }
}

// The widest element that suits source and destination alike.
SNAPSHOTD_FN void copy_bytes(uint8_t* to, const uint8_t* from, uint64_t bytes, Share share) {
    const uint64_t apart = reinterpret_cast<uint64_t>(to) ^ reinterpret_cast<uint64_t>(from);
    if (apart % 16 == 0) {
        copy_by<Wide>(to, from, bytes, share);
    } else if (apart % 8 == 0) {
        copy_by<unsigned long long>(to, from, bytes, share);
    } else if (apart % 4 == 0) {
        copy_by<uint32_t>(to, from, bytes, share);
    } else if (apart % 2 == 0) {
        copy_by<unsigned short>(to, from, bytes, share);
    } else {
        copy_by<uint8_t>(to, from, bytes, share);
    }
}

// One chunk, by all threads of a block.
SNAPSHOTD_FN void copy_chunk(const Piece* pieces, uint64_t count, uint64_t chunk, Share share) {
    const Piece* piece = pieces + piece_of(pieces, count, chunk);
    const uint64_t at = (chunk - load(&piece->first_chunk)) * kChunkBytes;
    const uint64_t left = load(&piece->bytes) - at;
    auto* to = reinterpret_cast<uint8_t*>(load(reinterpret_cast<const uint64_t*>(&piece->to)));
    auto* from = reinterpret_cast<const uint8_t*>(load(reinterpret_cast<const uint64_t*>(&piece->from)));
    copy_bytes(to + at, from + at, left < kChunkBytes ? left : kChunkBytes, share);
}

}  // namespace snapshotd::gpu
