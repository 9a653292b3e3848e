#include "host_codec.hpp"

#include <algorithm>

namespace snapshotd::gpu {

HostCodec::HostCodec(Device& device, int k, int m, uint64_t piece_bytes, int lanes)
    : device_(device),
      k_(k),
      m_(m),
      piece_bytes_((piece_bytes + kSuperblockBytes - 1) / kSuperblockBytes * kSuperblockBytes) {
    if (k < 1 || m < 1 || k + m > kInputsMax || piece_bytes == 0 || lanes < 1 || lanes > 64) {
        throw std::invalid_argument("a pipeline needs k, m and bytes of at least 1, and 1 to 64 lanes");
    }
    const auto symbols = static_cast<uint64_t>(k + m);
    for (int i = 0; i < lanes; ++i) lanes_.push_back(std::make_unique<Lane>(device, symbols * piece_bytes_));
}

HostCodec::~HostCodec() {
    try {
        finish_all();
    } catch (const DeviceError&) {
        // The device is lost: nothing of it runs any more.
    }
}

void HostCodec::finish_all() {
    for (auto& lane : lanes_) device_.finish(lane->stream);
}

void HostCodec::encode(const Pinned& memory, const std::vector<const uint8_t*>& data,
                       const std::vector<uint8_t*>& parity, uint64_t bytes) {
    run(memory, data, parity, bytes, [&](const Inputs& in, const Outputs& out, uint64_t length, Stream stream) {
        gpu::encode(device_, in, out, length, stream);
    });
}

void HostCodec::combine(const Pinned& memory, Layout layout, const std::vector<const uint8_t*>& data,
                        const std::vector<uint8_t*>& sums, const Factors& factors, uint64_t bytes) {
    run(memory, data, sums, bytes, [&](const Inputs& in, const Outputs& out, uint64_t length, Stream stream) {
        gpu::combine(device_, layout, in, out, factors, length, false, stream);
    });
}

void HostCodec::run(const Pinned& memory, const Inputs& data, const Outputs& parity, uint64_t bytes,
                    const Kernel& kernel) {
    if (data.empty() || data.size() > static_cast<size_t>(k_) || parity.size() != static_cast<size_t>(m_) ||
        bytes == 0) {
        throw std::invalid_argument("this pipeline takes up to " + std::to_string(k_) + " data symbols and " +
                                    std::to_string(m_) + " parity rows, which are not empty");
    }
    auto check = [&](const uint8_t* at) {
        if (!memory.holds(at, bytes)) throw std::invalid_argument("a symbol does not lie in the pinned memory");
    };
    std::for_each(data.begin(), data.end(), check);
    std::for_each(parity.begin(), parity.end(), check);
    try {
        size_t turn = 0;
        for (uint64_t at = 0; at < bytes; at += piece_bytes_) {
            Lane& lane = *lanes_[turn++ % lanes_.size()];
            enqueue(lane, memory, data, parity, at, std::min(piece_bytes_, bytes - at), kernel);
        }
    } catch (...) {
        for (auto& lane : lanes_) {
            try {
                device_.finish(lane->stream);  // what was enqueued still writes into the caller's memory
            } catch (const DeviceError&) {
                continue;
            }
        }
        throw;
    }
    finish_all();
}

// What one lane did before with its room is over by the order of its stream.
void HostCodec::enqueue(Lane& lane, const Pinned& memory, const Inputs& data, const Outputs& parity, uint64_t at,
                        uint64_t bytes, const Kernel& kernel) {
    Inputs in;
    Outputs out;
    uint8_t* room = lane.room.at();
    for (const uint8_t* symbol : data) {
        memory.copy_up(room, symbol + at, bytes, lane.stream);
        in.push_back(room);
        room += piece_bytes_;
    }
    for (size_t r = 0; r < parity.size(); ++r, room += piece_bytes_) out.push_back(room);
    kernel(in, out, bytes, lane.stream);
    for (size_t r = 0; r < parity.size(); ++r) memory.copy_down(parity[r] + at, out[r], bytes, lane.stream);
}

}  // namespace snapshotd::gpu
