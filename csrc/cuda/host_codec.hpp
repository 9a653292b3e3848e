// The code over symbols that lie in host memory: up, kernel, down, in pieces that take turns on several streams, so
// that the directions of the bus and the kernels work at once.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "codec.hpp"
#include "side_copy.hpp"

namespace snapshotd::gpu {

class HostCodec {
  public:
    // `lanes` streams, each with room for `piece_bytes` (rounded up to 512) of every symbol.
    HostCodec(Device& device, int k, int m, uint64_t piece_bytes, int lanes);
    ~HostCodec();

    // Returns when the parity is there. All pointers lie in `memory`, which is pinned.
    void encode(const Pinned& memory, const std::vector<const uint8_t*>& data, const std::vector<uint8_t*>& parity,
                uint64_t bytes);
    // The same for any sums: gpu::combine, without adding to what is there.
    void combine(const Pinned& memory, Layout layout, const std::vector<const uint8_t*>& data,
                 const std::vector<uint8_t*>& sums, const Factors& factors, uint64_t bytes);

  private:
    using Inputs = std::vector<const uint8_t*>;
    using Outputs = std::vector<uint8_t*>;
    using Kernel = std::function<void(const Inputs&, const Outputs&, uint64_t bytes, Stream)>;

    struct Lane {
        Lane(Device& device, uint64_t bytes) : room(device, bytes), stream(device) {}
        DeviceMemory room;
        OwnStream stream;
    };

    void run(const Pinned& memory, const Inputs& data, const Outputs& parity, uint64_t bytes, const Kernel& kernel);
    void enqueue(Lane& lane, const Pinned& memory, const Inputs& data, const Outputs& parity, uint64_t at,
                 uint64_t bytes, const Kernel& kernel);
    void finish_all();

    Device& device_;
    const int k_, m_;
    const uint64_t piece_bytes_;
    std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace snapshotd::gpu
