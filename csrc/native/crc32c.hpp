// CRC32C (Castagnoli): one contract, several implementations, chosen once for this machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace snapshotd {

// `extend` works on the register as it stands inside the computation, neither pre- nor post-inverted.
struct CrcTier {
    const char* name;
    bool (*supported)();
    uint32_t (*extend)(uint32_t state, const void* data, size_t bytes);
};

// The tiers of this machine, fastest first; `table`, the oracle, is always among them.
const std::vector<CrcTier>& crc_tiers();

extern uint32_t (*crc_extend)(uint32_t state, const void* data, size_t bytes);

inline uint32_t crc32c(uint32_t value, const void* data, size_t bytes) {
    return ~crc_extend(~value, data, bytes);
}

}  // namespace snapshotd
