// The device as the CUDA runtime knows it. Linked statically, so that the module imports where there is no driver.
#include <unistd.h>

#include "device.hpp"
#include "launch.hpp"
#include "runtime.hpp"

namespace snapshotd::gpu {

namespace {

cudaStream_t handle_of(Stream stream) {
    return reinterpret_cast<cudaStream_t>(stream);
}

cudaEvent_t event_of(Event event) {
    return reinterpret_cast<cudaEvent_t>(event);
}

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // what is reported here is not to be found again by somebody else's next call
    const std::string text =
        std::string(what) + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
    if (error == cudaErrorMemoryAllocation) throw DeviceMemoryError(error, text);
    throw DeviceError(error, text);
}

// Runs on a thread of the driver's, where no call of the runtime is allowed.
void CUDART_CB ring(void* fd) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(static_cast<int>(reinterpret_cast<intptr_t>(fd)), &one, sizeof one);
}

// The calling thread's device while one call lasts; then it is again the one that its owner, torch say, chose.
class Chosen {
  public:
    explicit Chosen(int ordinal) {
        check(cudaGetDevice(&before_), "asking for the device");
        if (before_ == ordinal) before_ = kNone;
        if (before_ != kNone) check(cudaSetDevice(ordinal), "choosing the device");
    }
    ~Chosen() {
        if (before_ != kNone) cudaSetDevice(before_);
    }
    Chosen(const Chosen&) = delete;
    Chosen& operator=(const Chosen&) = delete;

  private:
    static constexpr int kNone = -1;
    int before_ = kNone;
};

class CudaDevice final : public Device {
  public:
    explicit CudaDevice(int ordinal) : ordinal_(ordinal) {
        std::string why;
        const int count = cuda_device_count(why);
        if (count == 0) throw DeviceError(cudaErrorNoDevice, why);
        if (ordinal < 0 || ordinal >= count) {
            throw std::invalid_argument("there is no device " + std::to_string(ordinal) + ": this machine has " +
                                        std::to_string(count));
        }
        check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, ordinal),
              "reading the device's properties");
    }

    std::string name() const override { return "cuda:" + std::to_string(ordinal_); }

    void check_memory(const void* at, uint64_t bytes, const std::string& what) const override {
        check_end(at, what);
        if (bytes > 1) check_end(static_cast<const uint8_t*>(at) + bytes - 1, what);
    }

    void* allocate(uint64_t bytes) override {
        const Chosen chosen(ordinal_);
        void* memory = nullptr;
        check(cudaMalloc(&memory, bytes), "allocating device memory");
        return memory;
    }

    void release(void* memory) noexcept override { cudaFree(memory); }  // an address says whose it is

    void pin(void* memory, uint64_t bytes) override {
        const Chosen chosen(ordinal_);
        check(cudaHostRegister(memory, bytes, cudaHostRegisterPortable), "registering host memory");
    }

    void unpin(void* memory) noexcept override {
        if (cudaHostUnregister(memory) != cudaSuccess) cudaGetLastError();
    }

    Stream make_stream() override {
        const Chosen chosen(ordinal_);
        cudaStream_t stream;
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
        return reinterpret_cast<Stream>(stream);
    }

    void end_stream(Stream stream) noexcept override { cudaStreamDestroy(handle_of(stream)); }

    Event make_event() override {
        const Chosen chosen(ordinal_);
        cudaEvent_t event;
        check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
        return reinterpret_cast<Event>(event);
    }

    void end_event(Event event) noexcept override { cudaEventDestroy(event_of(event)); }

    void record(Event event, Stream stream) override {
        check(cudaEventRecord(event_of(event), handle_of(stream)), "recording an event");
    }

    void wait(Stream stream, Event event) override {
        check(cudaStreamWaitEvent(handle_of(stream), event_of(event), 0), "making a stream wait");
    }

    bool done(Event event) override {
        const cudaError_t state = cudaEventQuery(event_of(event));
        if (state == cudaErrorNotReady) return false;
        check(state, "asking for an event");
        return true;
    }

    void reach(Event event) override { check(cudaEventSynchronize(event_of(event)), "waiting for an event"); }
    void finish(Stream stream) override { check(cudaStreamSynchronize(handle_of(stream)), "waiting for a stream"); }

    void copy(void* to, const void* from, uint64_t bytes, Stream stream) override {
        const Chosen chosen(ordinal_);
        check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, handle_of(stream)), "starting a copy");
    }

    void notify(int fd, Stream stream) override {
        check(cudaLaunchHostFunc(handle_of(stream), ring, reinterpret_cast<void*>(static_cast<intptr_t>(fd))),
              "asking to be told");
    }

    void encode(const Symbols& symbols, int k, int m, uint64_t superblocks, Stream stream) override {
        const Chosen chosen(ordinal_);
        check(launch_encode(symbols, k, m, superblocks, grid(stream)), "starting an encode");
    }

    void encode_any(const ManySymbols& symbols, int m, uint64_t superblocks, Stream stream) override {
        const Chosen chosen(ordinal_);
        check(launch_encode_any(symbols, m, superblocks, grid(stream)), "starting an encode");
    }

    void decode(const Decoding& job, unsigned rows, uint64_t superblocks, Stream stream) override {
        const Chosen chosen(ordinal_);
        check(launch_decode(job, rows, superblocks, grid(stream)), "starting a decode");
    }

    void combine(const Combination& job, int rows, uint64_t superblocks, bool aligned, Stream stream) override {
        const Chosen chosen(ordinal_);
        check(launch_combine(job, rows, superblocks, aligned, grid(stream)), "starting a combination");
    }

    void combine_bytes(const Combination& job, int rows, uint64_t from, uint64_t to, bool aligned,
                       Stream stream) override {
        const Chosen chosen(ordinal_);
        check(launch_combine_bytes(job, rows, from, to, aligned, grid(stream)), "starting a combination");
    }

    void crc32c(const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs, Stream stream) override {
        const Chosen chosen(ordinal_);
        check(launch_crc32c(data, bytes, block_bytes, crcs, grid(stream)), "starting a checksum");
    }

    void prepare_copies() override {
        const Chosen chosen(ordinal_);
        check(gpu::prepare_copies(), "preparing the kernels of a copy");
    }

    void copy_pieces(const Piece* pieces, uint64_t count, uint64_t chunks, Stream stream) override {
        const Chosen chosen(ordinal_);
        check(launch_copy_pieces(pieces, count, chunks, grid(stream)), "starting a gather");
    }

  private:
    Grid grid(Stream stream) const { return {multiprocessors_, handle_of(stream)}; }

    void check_end(const void* at, const std::string& what) const {
        cudaPointerAttributes found{};
        check(cudaPointerGetAttributes(&found, at), "looking at a pointer");
        const bool here = found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged;
        if (here && found.device == ordinal_) return;
        const char* where = found.type == cudaMemoryTypeHost ? "pinned host memory" : "no memory of any device";
        throw std::invalid_argument(what + " (" + std::to_string(reinterpret_cast<uint64_t>(at)) + ") is " +
                                    (here ? "on device " + std::to_string(found.device) : where) + ", not on " +
                                    name());
    }

    int ordinal_;
    int multiprocessors_ = 0;
};

}  // namespace

int cuda_device_count(std::string& why) noexcept {
    int count = 0;  // the runtime leaves it alone where it fails
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) return count;
    cudaGetLastError();
    if (error == cudaSuccess || error == cudaErrorNoDevice) {
        why = "no GPU: there is a driver, but it knows no device";
    } else if (error == cudaErrorInsufficientDriver) {
        why = "no GPU: there is no NVIDIA driver, or one that is older than this module";
    } else {
        why = std::string("no GPU: ") + cudaGetErrorString(error);
    }
    return 0;
}

std::unique_ptr<Device> make_cuda_device(int ordinal) {
    return std::make_unique<CudaDevice>(ordinal);
}

}  // namespace snapshotd::gpu
