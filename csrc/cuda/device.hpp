// What the rest of this folder needs of a device: memory, streams, events, and the kernels. Two implementations: CUDA,
// and host threads (each stream is a thread that takes one order after the other).
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "bytes.cuh"
#include "pieces.cuh"

namespace snapshotd::gpu {

using Stream = uint64_t;  // a cudaStream_t as an integer; 0 is the default stream
using Event = uint64_t;

// The device refused. `code` is a cudaError_t.
struct DeviceError : std::runtime_error {
    DeviceError(int code, const std::string& what) : std::runtime_error(what), code(code) {}
    int code;
};

struct DeviceMemoryError : DeviceError {
    using DeviceError::DeviceError;
};

// Launches and copies only enqueue; what they point at must stay until the stream has come to their end. Every call
// throws DeviceError, except those that end something: they are called while errors pass by.
class Device {
  public:
    virtual ~Device() = default;
    Device() = default;
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    virtual std::string name() const = 0;
    // std::invalid_argument unless these bytes are memory of this device.
    virtual void check_memory(const void* at, uint64_t bytes, const std::string& what) const = 0;

    virtual void* allocate(uint64_t bytes) = 0;
    virtual void release(void* memory) noexcept = 0;
    // Host memory that the device may copy from and to by itself.
    virtual void pin(void* memory, uint64_t bytes) = 0;
    virtual void unpin(void* memory) noexcept = 0;

    virtual Stream make_stream() = 0;
    virtual void end_stream(Stream stream) noexcept = 0;
    virtual Event make_event() = 0;
    virtual void end_event(Event event) noexcept = 0;

    virtual void record(Event event, Stream stream) = 0;
    virtual void wait(Stream stream, Event event) = 0;  // the stream waits, the host does not
    virtual bool done(Event event) = 0;
    virtual void reach(Event event) = 0;     // the host waits
    virtual void finish(Stream stream) = 0;  // the host waits
    virtual void copy(void* to, const void* from, uint64_t bytes, Stream stream) = 0;
    // Adds 1 to an eventfd once the stream has come so far. It may never happen where the device is lost.
    virtual void notify(int fd, Stream stream) = 0;

    // The kernels: launch.hpp says what each takes.
    virtual void encode(const Symbols& symbols, int k, int m, uint64_t superblocks, Stream stream) = 0;
    virtual void encode_any(const ManySymbols& symbols, int m, uint64_t superblocks, Stream stream) = 0;
    virtual void decode(const Decoding& job, unsigned rows, uint64_t superblocks, Stream stream) = 0;
    virtual void combine(const Combination& job, int rows, uint64_t superblocks, bool aligned, Stream stream) = 0;
    virtual void combine_bytes(const Combination& job, int rows, uint64_t from, uint64_t to, bool aligned,
                               Stream stream) = 0;
    virtual void crc32c(const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs, Stream stream) = 0;
    // Whatever takes time before the first crc32c and copy_pieces, so that they do not.
    virtual void prepare_copies() = 0;
    virtual void copy_pieces(const Piece* pieces, uint64_t count, uint64_t chunks, Stream stream) = 0;
};

// How many devices there are; 0 where there is no driver, no card or one that does not answer, and why in words.
int cuda_device_count(std::string& why) noexcept;
std::unique_ptr<Device> make_cuda_device(int ordinal);
std::unique_ptr<Device> make_host_device();

// --- owners: what they hold is let go of also in failure

class DeviceMemory {
  public:
    DeviceMemory(Device& device, uint64_t bytes) : device_(device), at_(device.allocate(bytes)) {}
    ~DeviceMemory() { device_.release(at_); }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    uint8_t* at() const { return static_cast<uint8_t*>(at_); }

  private:
    Device& device_;
    void* at_;
};

class OwnStream {
  public:
    explicit OwnStream(Device& device) : device_(device), stream_(device.make_stream()) {}
    ~OwnStream() { device_.end_stream(stream_); }
    OwnStream(const OwnStream&) = delete;
    OwnStream& operator=(const OwnStream&) = delete;

    operator Stream() const { return stream_; }

  private:
    Device& device_;
    Stream stream_;
};

class OwnEvent {
  public:
    explicit OwnEvent(Device& device) : device_(device), event_(device.make_event()) {}
    ~OwnEvent() { device_.end_event(event_); }
    OwnEvent(const OwnEvent&) = delete;
    OwnEvent& operator=(const OwnEvent&) = delete;

    operator Event() const { return event_; }

  private:
    Device& device_;
    Event event_;
};

}  // namespace snapshotd::gpu
