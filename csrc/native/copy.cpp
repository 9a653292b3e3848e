#include "copy.hpp"

#include <algorithm>
#include <cstring>

#include "parallel.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace snapshotd {

namespace {

#if defined(__x86_64__)

constexpr size_t kLine = 64;
constexpr size_t kAhead = 4096;

// Reads are asked for a page ahead: the hardware's own prefetching stops where a page ends.
__attribute__((target("avx512f"))) void stream_lines_avx512(byte* to, const byte* from, size_t bytes) noexcept {
    for (size_t at = 0; at < bytes; at += kLine) {
        _mm_prefetch(reinterpret_cast<const char*>(from + at + kAhead), _MM_HINT_T0);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
    }
}

void stream_lines_sse2(byte* to, const byte* from, size_t bytes) noexcept {
    for (size_t at = 0; at < bytes; at += 16) {
        if (at % kLine == 0) _mm_prefetch(reinterpret_cast<const char*>(from + at + kAhead), _MM_HINT_T0);
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + at),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
    }
}

// Whole lines at a line's start.
void (*const stream_lines)(byte*, const byte*, size_t) noexcept = __builtin_cpu_supports("avx512f")
                                                                      ? stream_lines_avx512
                                                                      : stream_lines_sse2;

void copy_streaming(byte* to, const byte* from, size_t bytes) noexcept {
    size_t head = std::min(bytes, (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine);
    size_t lines = (bytes - head) / kLine * kLine;
    std::memcpy(to, from, head);
    stream_lines(to + head, from + head, lines);
    std::memcpy(to + head + lines, from + head + lines, bytes - head - lines);
}

#endif

// Copies one unit; a constant size becomes one load and one store.
struct FromMemory {
    static void move(byte* memory, byte* flat, size_t bytes) { std::memcpy(flat, memory, bytes); }
};
struct ToMemory {
    static void move(byte* memory, byte* flat, size_t bytes) { std::memcpy(memory, flat, bytes); }
};

template <typename Direction, size_t unit>
void move_row_of(byte* memory, int64_t stride, byte* flat, uint64_t units) {
    for (uint64_t i = 0; i < units; ++i, memory += stride, flat += unit) Direction::move(memory, flat, unit);
}

template <typename Direction>
void move_row(byte* memory, int64_t stride, byte* flat, uint64_t units, uint64_t unit) {
    switch (unit) {
        case 1:
            return move_row_of<Direction, 1>(memory, stride, flat, units);
        case 2:
            return move_row_of<Direction, 2>(memory, stride, flat, units);
        case 4:
            return move_row_of<Direction, 4>(memory, stride, flat, units);
        case 8:
            return move_row_of<Direction, 8>(memory, stride, flat, units);
        case 16:
            return move_row_of<Direction, 16>(memory, stride, flat, units);
        default:
            for (uint64_t i = 0; i < units; ++i, memory += stride, flat += unit) Direction::move(memory, flat, unit);
    }
}

// A place in a strided item: which unit, as an index per dimension, and where that is in memory.
class Cursor {
  public:
    Cursor(const Item& item, const Dimension* dims, uint64_t unit)
        : dims_(dims), count_(item.dimensions), memory_(item.pointer) {
        for (uint32_t d = count_; d-- > 0;) {
            index_[d] = unit % dims[d].count;
            unit /= dims[d].count;
            memory_ += static_cast<int64_t>(index_[d]) * dims[d].stride;
        }
    }
    byte* memory() const { return memory_; }
    int64_t row_stride() const { return dims_[count_ - 1].stride; }
    uint64_t row_left() const { return dims_[count_ - 1].count - index_[count_ - 1]; }

    // `units` stay within the row.
    void advance(uint64_t units) {
        uint32_t d = count_ - 1;
        index_[d] += units;
        memory_ += static_cast<int64_t>(units) * dims_[d].stride;
        for (; d > 0 && index_[d] == dims_[d].count; --d) {
            memory_ -= static_cast<int64_t>(index_[d]) * dims_[d].stride;
            index_[d] = 0;
            ++index_[d - 1];
            memory_ += dims_[d - 1].stride;
        }
    }

  private:
    const Dimension* dims_;
    uint32_t count_;
    byte* memory_;
    uint64_t index_[kDimensionsMax];
};

template <typename Direction>
void move_strided(const Item& item, const Dimension* dims, uint64_t from, uint64_t bytes, byte* flat) {
    const uint64_t unit = item.unit_bytes;
    Cursor cursor(item, dims, from / unit);
    if (uint64_t into = from % unit; into != 0) {
        uint64_t part = std::min(bytes, unit - into);
        Direction::move(cursor.memory() + into, flat, part);
        if (part < unit - into) return;
        cursor.advance(1);
        flat += part;
        bytes -= part;
    }
    while (bytes >= unit) {
        uint64_t units = std::min(cursor.row_left(), bytes / unit);
        move_row<Direction>(cursor.memory(), cursor.row_stride(), flat, units, unit);
        cursor.advance(units);
        flat += units * unit;
        bytes -= units * unit;
    }
    if (bytes > 0) Direction::move(cursor.memory(), flat, bytes);
}

constexpr uint64_t kChunk = 1u << 20;
constexpr uint64_t kTooLargeForCaches = 8u << 20;

void scatter_chunk(const byte* window, uint64_t origin, uint64_t begin, uint64_t end, const ItemTable& table,
                   Stores stores) {
    const std::vector<Item>& items = table.items();
    for (size_t i = table.first_after(begin); i < items.size() && items[i].offset < end; ++i) {
        const Item& item = items[i];
        uint64_t from = std::max(begin, item.offset), to = std::min(end, item.end());
        if (item.dimensions == 0) {
            copy_dense(item.pointer + (from - item.offset), window + (from - origin), to - from, stores);
        } else {
            table.copy_in(item, from - item.offset, to - from, window + (from - origin));
        }
    }
}

}  // namespace

void store_fence() noexcept {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

void copy_dense(byte* to, const byte* from, size_t bytes, Stores stores) noexcept {
#if defined(__x86_64__)
    if (stores == Stores::non_temporal && bytes >= 4 * kLine) return copy_streaming(to, from, bytes);
#else
    (void)stores;
#endif
    std::memcpy(to, from, bytes);
}

void ItemTable::copy_out(const Item& item, uint64_t from, size_t bytes, byte* flat) const noexcept {
    if (item.dimensions == 0) {
        std::memcpy(flat, item.pointer + from, bytes);
    } else {
        move_strided<FromMemory>(item, dimensions_of(item), from, bytes, flat);
    }
}

void ItemTable::copy_in(const Item& item, uint64_t from, size_t bytes, const byte* flat) const noexcept {
    if (item.dimensions == 0) {
        std::memcpy(item.pointer + from, flat, bytes);
    } else {
        move_strided<ToMemory>(item, dimensions_of(item), from, bytes, const_cast<byte*>(flat));
    }
}

void scatter(const byte* window, uint64_t origin, uint64_t bytes, const ItemTable& items, int threads) {
    items.refuse_overlap_with(window, bytes);
    const Stores stores = items.bytes() < kTooLargeForCaches ? Stores::temporal : Stores::non_temporal;
    parallel_for(threads, (bytes + kChunk - 1) / kChunk, [&](uint64_t chunk) {
        scatter_chunk(window, origin, origin + chunk * kChunk, origin + std::min(bytes, (chunk + 1) * kChunk), items,
                      stores);
        store_fence();
    });
}

std::vector<Piece> shares_of(const Piece& whole, int threads) {
    check_threads(threads);
    const uint64_t share = whole.bytes / threads / kPieceBytes * kPieceBytes;
    std::vector<Piece> pieces;
    for (int i = 0; i < threads; ++i) {
        uint64_t begin = i * share, end = i + 1 == threads ? whole.bytes : begin + share;
        pieces.push_back({whole.to + begin, whole.from + begin, end - begin});
    }
    return pieces;
}

void copy_plain(const std::vector<Piece>& pieces, int threads) {
    parallel_for(threads, pieces.size(), [&](uint64_t i) {
        if (pieces[i].bytes > 0) std::memcpy(pieces[i].to, pieces[i].from, pieces[i].bytes);
    });
}

}  // namespace snapshotd
