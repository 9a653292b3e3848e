// Where each tensor's bytes go: validated once, looked up by offset while bytes move, without allocation.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common.hpp"

namespace snapshotd {

constexpr size_t kDimensionsMax = 16;

// One item as the caller states it; strides in bytes.
struct ItemSpec {
    uint64_t pointer = 0;
    uint64_t offset = 0;
    uint64_t element_bytes = 0;
    std::vector<uint64_t> shape;
    std::vector<int64_t> strides;
};

// A dimension that is left once everything that lies side by side in memory has become one unit.
struct Dimension {
    uint64_t count;
    int64_t stride;
};

// `bytes` bytes at `offset` of the slot, in row-major order; in memory they are units of `unit_bytes` at `pointer`
// plus the strides of `dimensions` (none: the item is one piece of memory).
struct Item {
    byte* pointer;
    uint64_t offset;
    uint64_t bytes;
    uint64_t unit_bytes;
    uint32_t first_dimension;
    uint32_t dimensions;
    int64_t reach_low;  // memory that is touched: [pointer + reach_low, pointer + reach_high)
    int64_t reach_high;

    uint64_t end() const { return offset + bytes; }
};

// Items in the order of their offsets. Throws std::invalid_argument naming the first spec that does not fit:
// outside of [0, file_bytes), a null or overflowing pointer, more than 16 dimensions, or overlapping another one.
class ItemTable {
  public:
    ItemTable(const char* what, const std::vector<ItemSpec>& specs, uint64_t file_bytes);

    const std::vector<Item>& items() const { return items_; }
    const Dimension* dimensions_of(const Item& item) const { return dimensions_.data() + item.first_dimension; }
    size_t given() const { return sorted_.size(); }
    uint64_t bytes() const { return bytes_; }

    // New pointers in the order of the specs. Nothing changes where one of them does not fit.
    void repoint(const std::vector<uint64_t>& pointers);

    // The first item that ends behind `offset`.
    size_t first_after(uint64_t offset) const;

    // The bytes [from, from + bytes) of an item in row-major order, to and from `flat`.
    void copy_out(const Item& item, uint64_t from, size_t bytes, byte* flat) const noexcept;
    void copy_in(const Item& item, uint64_t from, size_t bytes, const byte* flat) const noexcept;

    // Throws where an item's memory meets [base, base + bytes).
    void refuse_overlap_with(const byte* base, uint64_t bytes) const;

  private:
    static constexpr size_t kNowhere = ~size_t{0};

    Item normalised(const ItemSpec& spec, const std::string& name, uint64_t file_bytes);
    std::string name_of(size_t given) const { return std::string(what_) + " item " + std::to_string(given); }

    const char* what_;
    std::vector<Item> items_;  // without the empty ones
    std::vector<Dimension> dimensions_;
    std::vector<size_t> sorted_;  // by given index: place in items_, or kNowhere for an empty item
    std::vector<size_t> given_;   // and back
    uint64_t bytes_ = 0;
};

// Throws std::invalid_argument where an item of one table overlaps an item of the other in the slot.
void refuse_overlap(const ItemTable& a, const ItemTable& b);

// The plan of a snapshot: some bytes now, before anyone may change them, the rest later.
struct Plan {
    Plan(uint64_t file_bytes, const std::vector<ItemSpec>& now, const std::vector<ItemSpec>& later);

    // std::logic_error while an engine copies by this plan.
    void repoint(const std::vector<uint64_t>& now_pointers, const std::vector<uint64_t>& later_pointers);

    const uint64_t file_bytes;
    ItemTable now, later;
    std::atomic<int> copying{0};  // engines that read it right now
};

}  // namespace snapshotd
