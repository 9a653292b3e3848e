#include "plan.hpp"

#include <algorithm>
#include <stdexcept>

namespace snapshotd {

namespace {

constexpr uint64_t kElementBytesMax = 4096;
constexpr uint64_t kFileBytesMax = 1ull << 44;

[[noreturn]] void refuse(const std::string& name, const std::string& why) {
    throw std::invalid_argument(name + " " + why);
}

// Keeps what is longer than 1 and merges dimensions that one stride can walk.
std::vector<Dimension> coalesced(const ItemSpec& spec) {
    std::vector<Dimension> kept;
    for (size_t d = 0; d < spec.shape.size(); ++d) {
        if (spec.shape[d] == 1) continue;
        Dimension inner{spec.shape[d], spec.strides[d]};
        int64_t whole;
        bool fits = !__builtin_mul_overflow(inner.stride, static_cast<int64_t>(inner.count), &whole);
        if (!kept.empty() && fits && kept.back().stride == whole) {
            kept.back() = {kept.back().count * inner.count, inner.stride};
        } else {
            kept.push_back(inner);
        }
    }
    return kept;
}

void check_address(const Item& item, uint64_t pointer, const std::string& name) {
    if (pointer == 0) refuse(name, "has bytes but a null pointer");
    // User addresses end far below 2^63 on every 64-bit Linux.
    constexpr uint64_t top = 1ull << 63;
    int64_t low, high;
    if (pointer >= top || __builtin_add_overflow(static_cast<int64_t>(pointer), item.reach_low, &low) ||
        __builtin_add_overflow(static_cast<int64_t>(pointer), item.reach_high, &high) || low <= 0) {
        refuse(name, "reaches outside of the address space: its pointer or strides are wrong");
    }
}

}  // namespace

Item ItemTable::normalised(const ItemSpec& spec, const std::string& name, uint64_t file_bytes) {
    if (spec.shape.size() != spec.strides.size()) refuse(name, "has a stride count that differs from its dimensions");
    if (spec.shape.size() > kDimensionsMax) refuse(name, "has more than 16 dimensions");
    if (spec.element_bytes < 1 || spec.element_bytes > kElementBytesMax) {
        refuse(name, "has an element size outside of 1 to 4096 bytes");
    }
    Item item{};
    item.offset = spec.offset;
    item.bytes = spec.element_bytes;
    bool has_elements = std::find(spec.shape.begin(), spec.shape.end(), 0u) == spec.shape.end();
    if (!has_elements) item.bytes = 0;
    for (uint64_t count : spec.shape) {
        if (has_elements && __builtin_mul_overflow(item.bytes, count, &item.bytes))
            refuse(name, "is larger than memory");
    }
    if (item.offset > file_bytes || item.bytes > file_bytes - item.offset) {
        refuse(name, "ends behind the file's " + std::to_string(file_bytes) + " bytes");
    }
    if (item.bytes == 0) return item;

    std::vector<Dimension> dims = coalesced(spec);
    item.unit_bytes = spec.element_bytes;
    if (!dims.empty() && dims.back().stride == static_cast<int64_t>(spec.element_bytes)) {
        item.unit_bytes *= dims.back().count;
        dims.pop_back();
    }
    item.reach_high = static_cast<int64_t>(item.unit_bytes);
    for (const Dimension& dim : dims) {
        int64_t span;
        int64_t& end = dim.stride < 0 ? item.reach_low : item.reach_high;
        if (__builtin_mul_overflow(dim.stride, static_cast<int64_t>(dim.count - 1), &span) ||
            __builtin_add_overflow(end, span, &end)) {
            refuse(name, "reaches outside of the address space: its pointer or strides are wrong");
        }
    }
    check_address(item, spec.pointer, name);
    item.pointer = reinterpret_cast<byte*>(spec.pointer);
    item.first_dimension = static_cast<uint32_t>(dimensions_.size());
    item.dimensions = static_cast<uint32_t>(dims.size());
    dimensions_.insert(dimensions_.end(), dims.begin(), dims.end());
    return item;
}

ItemTable::ItemTable(const char* what, const std::vector<ItemSpec>& specs, uint64_t file_bytes)
    : what_(what), sorted_(specs.size(), kNowhere) {
    std::vector<Item> all;
    all.reserve(specs.size());
    for (size_t i = 0; i < specs.size(); ++i) {
        all.push_back(normalised(specs[i], name_of(i), file_bytes));
        if (all[i].bytes > 0) given_.push_back(i);
    }
    std::sort(given_.begin(), given_.end(), [&](size_t a, size_t b) { return all[a].offset < all[b].offset; });
    items_.reserve(given_.size());
    for (size_t i : given_) {
        if (!items_.empty() && all[i].offset < items_.back().end()) {
            refuse(name_of(i), "overlaps " + name_of(given_[items_.size() - 1]) + " in the slot");
        }
        sorted_[i] = items_.size();
        items_.push_back(all[i]);
        bytes_ += all[i].bytes;
    }
}

void ItemTable::repoint(const std::vector<uint64_t>& pointers) {
    if (pointers.size() != sorted_.size()) {
        throw std::invalid_argument("there are " + std::to_string(sorted_.size()) + " " + what_ + " items, not " +
                                    std::to_string(pointers.size()));
    }
    for (size_t i = 0; i < pointers.size(); ++i) {
        if (sorted_[i] != kNowhere) check_address(items_[sorted_[i]], pointers[i], name_of(i));
    }
    for (size_t i = 0; i < pointers.size(); ++i) {
        if (sorted_[i] != kNowhere) items_[sorted_[i]].pointer = reinterpret_cast<byte*>(pointers[i]);
    }
}

size_t ItemTable::first_after(uint64_t offset) const {
    auto found = std::partition_point(items_.begin(), items_.end(), [&](const Item& i) { return i.end() <= offset; });
    return static_cast<size_t>(found - items_.begin());
}

void ItemTable::refuse_overlap_with(const byte* base, uint64_t bytes) const {
    auto low = reinterpret_cast<int64_t>(base);
    int64_t high = low + static_cast<int64_t>(bytes);
    for (size_t i = 0; i < items_.size(); ++i) {
        auto at = reinterpret_cast<int64_t>(items_[i].pointer);
        if (at + items_[i].reach_low < high && at + items_[i].reach_high > low) {
            refuse(name_of(given_[i]), "has its memory inside of the arena itself");
        }
    }
}

void refuse_overlap(const ItemTable& a, const ItemTable& b) {
    size_t j = 0;
    for (const Item& item : a.items()) {
        while (j < b.items().size() && b.items()[j].end() <= item.offset) ++j;
        if (j < b.items().size() && b.items()[j].offset < item.end()) {
            throw std::invalid_argument("a now item overlaps a later item at offset " +
                                        std::to_string(std::max(item.offset, b.items()[j].offset)) + " of the slot");
        }
    }
}

namespace {

uint64_t checked_file_bytes(uint64_t file_bytes) {
    if (file_bytes < 1 || file_bytes > kFileBytesMax) {
        throw std::invalid_argument("file_bytes must be between 1 and 16 TiB");
    }
    return file_bytes;
}

}  // namespace

Plan::Plan(uint64_t file_bytes, const std::vector<ItemSpec>& now, const std::vector<ItemSpec>& later)
    : file_bytes(checked_file_bytes(file_bytes)), now("now", now, file_bytes), later("later", later, file_bytes) {
    refuse_overlap(this->now, this->later);
}

void Plan::repoint(const std::vector<uint64_t>& now_pointers, const std::vector<uint64_t>& later_pointers) {
    if (copying.load() > 0) throw std::logic_error("a copy by this plan is running: wait for it first");
    ItemTable checked = now;
    checked.repoint(now_pointers);
    later.repoint(later_pointers);
    now = std::move(checked);
}

}  // namespace snapshotd
