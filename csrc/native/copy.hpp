// Moving bytes between tensors and a slot: dense pieces with a choice of stores, strided ones by their dimensions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common.hpp"
#include "plan.hpp"

namespace snapshotd {

// Copies stay in pieces of this size, so that a piece is still in the L1 cache when it is checksummed, and a
// cancelled copy stops soon.
constexpr size_t kPieceBytes = 4096;

// Non-temporal stores go past the caches: no line is read before it is overwritten. Follow them with store_fence().
enum class Stores : int { temporal, non_temporal };

void copy_dense(byte* to, const byte* from, size_t bytes, Stores stores) noexcept;

// Orders non-temporal stores of this thread before whatever it stores next.
void store_fence() noexcept;

// Copies into the items' memory what they hold of a window: the bytes [origin, origin + bytes) of a slot.
void scatter(const byte* window, uint64_t origin, uint64_t bytes, const ItemTable& items, int threads);

// A plain memcpy by several threads, the yardstick of the benchmarks: one call of memcpy for each piece.
struct Piece {
    byte* to;
    const byte* from;
    uint64_t bytes;
};
void copy_plain(const std::vector<Piece>& pieces, int threads);

// One piece for each thread.
std::vector<Piece> shares_of(const Piece& whole, int threads);

}  // namespace snapshotd
