// The erasure code on a device: symbols of any length at any address, cut into what the kernels take. The definition of
// the code stands in docs/codec.md: `planes` for whole superblocks, the last bytes % 512 in the layout `bytes` with the
// same coefficients.
//
// All pointers are memory of the device. Everything is enqueued on `stream`; std::invalid_argument, before anything is
// enqueued, for what is no code: k or m of 0, k + m > 255, a layout without such a code, no bytes, an output that
// overlaps something, memory that is not this device's.
#pragma once

#include <vector>

#include "device.hpp"

namespace snapshotd::gpu {

enum class Layout { planes, bytes };

using Factors = std::vector<std::vector<uint8_t>>;  // rows of coefficients

// What parity row `row` takes of data symbol `symbol` in the layout `planes`.
uint8_t planes_coefficient(int row, int symbol);

// parity[r] = sum of planes_coefficient(r, i) * data[i]. A code of k data symbols and m <= 4 rows; with 4, k <= 21.
void encode(Device& device, const std::vector<const uint8_t*>& data, const std::vector<uint8_t*>& parity,
            uint64_t bytes, Stream stream);

// out[r] = (add ? out[r] : 0) + sum of factors[r][i] * in[i]; any number of outputs, up to 255 inputs.
void combine(Device& device, Layout layout, const std::vector<const uint8_t*>& in, const std::vector<uint8_t*>& out,
             const Factors& factors, uint64_t bytes, bool add, Stream stream);

struct Wanted {
    int symbol;
    uint8_t* to;
};

// Data symbols that are lost (null in `data`) from the others and as many parity rows (null in `parity` where a row is
// not there; the lowest that are there are used). Layout `planes`. Fewer may be wanted than are lost.
void decode(Device& device, const std::vector<const uint8_t*>& data, const std::vector<const uint8_t*>& parity,
            const std::vector<Wanted>& wanted, uint64_t bytes, Stream stream);

// One CRC32C for each block of `data`, the last one maybe shorter; `crcs` is memory of the device.
void crc32c(Device& device, const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs, Stream stream);

}  // namespace snapshotd::gpu
