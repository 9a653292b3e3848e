// The simulated address space: which bytes exist, whose they are, and which of them were ever written.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace sim {

using u8 = uint8_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;

// Something that a real device would not survive, or that a program may not do.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Kind { device, pinned, freed };

struct Allocation {
    u64 base = 0;
    u64 bytes = 0;
    u8* host = nullptr;  // where the bytes really are
    Kind kind = Kind::device;
    int device = 0;
    std::vector<bool> written;  // empty where the host wrote what it liked

    bool holds(u64 at, u64 count) const { return at >= base && count <= bytes && at - base <= bytes - count; }
};

class AddressSpace {
  public:
    Allocation& add(u64 base, u64 bytes, u8* host, Kind kind) {
        Allocation& made = all_[base];
        made = {base, bytes, host, kind, 0, {}};
        if (kind == Kind::device) made.written.assign(bytes, false);
        return made;
    }

    void forget(u64 base) { all_.erase(base); }

    Allocation* find(u64 at) {
        auto next = all_.upper_bound(at);
        if (next == all_.begin()) return nullptr;
        Allocation& found = (--next)->second;
        return at < found.base + found.bytes ? &found : nullptr;
    }

    bool meets(u64 at, u64 bytes) const {
        auto next = all_.upper_bound(at);
        if (next != all_.end() && next->first < at + bytes) return true;
        return next != all_.begin() && (--next, at < next->first + next->second.bytes);
    }

    const std::map<u64, Allocation>& all() const { return all_; }

  private:
    std::map<u64, Allocation> all_;
};

}  // namespace sim
