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

// The register `value` after so many zero bytes.
uint32_t crc32c_after_zeros(uint32_t value, uint64_t bytes) noexcept;

// CRC32C of data in planes (layout.hpp), in a way that is linear plane by plane. The state of a message of whole
// superblocks is itself a superblock: each plane folded along the message. So what a code in planes makes of some
// messages, it makes of their states as well, and the checksum of a sum of products costs no pass over its bytes.
struct PlaneCrcTier {
    bool (*supported)();
    // state: 512 bytes, zeros at first. `bytes`: whole superblocks.
    void (*fold)(unsigned char* state, const unsigned char* data, size_t bytes);
    // The same, and a copy; non-temporal stores where asked for and where `to` begins a cache line.
    void (*fold_copying)(unsigned char* state, const unsigned char* from, unsigned char* to, size_t bytes,
                         bool non_temporal);
    // The register after the message, had it been 0 before.
    uint32_t (*finish)(const unsigned char* state);
};

// Null where this machine has none.
const PlaneCrcTier* plane_crc() noexcept;

}  // namespace snapshotd
