// The device made of host threads: a stream is a thread that takes its orders one by one, an event is a number that it
// has reached. The kernels are the bodies of the .cuh files, run by one thread for all columns.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "crc32c.cuh"
#include "device.hpp"

namespace snapshotd::gpu {

namespace {

constexpr int kOutOfMemory = 2;  // the numbers of cudaError_t
constexpr int kInvalidHandle = 400;
constexpr Share kAll{0, 1};

// A thread and its orders. All of it is guarded by the device's one lock; orders run without it.
struct Lane {
    std::deque<std::function<void()>> orders;
    std::thread thread;
    uint64_t taken = 0;  // orders given
    uint64_t over = 0;   // orders done
    bool ending = false;
};

struct Mark {
    Stream stream = 0;
    uint64_t count = 0;  // of the stream's orders that come before it
};

uint32_t crc_of(const uint8_t* data, uint64_t bytes) {
    static const auto table = [] {
        std::array<uint32_t, 256> made{};
        for (uint32_t i = 0; i < 256; ++i) made[i] = crc_extend_byte(0, static_cast<uint8_t>(i));
        return made;
    }();
    uint32_t state = 0xFFFFFFFFu;
    for (uint64_t i = 0; i < bytes; ++i) state = table[(state ^ data[i]) & 255u] ^ (state >> 8);
    return ~state;
}

template <typename Call>
void for_rows(int rows, Call call) {
    switch (rows) {
        case 1:
            return call(std::integral_constant<int, 1>());
        case 2:
            return call(std::integral_constant<int, 2>());
        case 3:
            return call(std::integral_constant<int, 3>());
        default:
            return call(std::integral_constant<int, 4>());
    }
}

template <unsigned ROWS = 1>
void decode_with(unsigned rows, const Decoding& job, uint64_t superblocks) {
    if (rows == ROWS) {
        decode_columns<ROWS>(job, superblocks, kAll);
    } else if constexpr (ROWS < 15) {
        decode_with<ROWS + 1>(rows, job, superblocks);
    }
}

class HostDevice final : public Device {
  public:
    HostDevice() { start(0); }

    ~HostDevice() override {
        std::unique_lock<std::mutex> lock(mutex_);
        for (auto& [id, lane] : lanes_) lane.ending = true;
        changed_.notify_all();
        lock.unlock();
        for (auto& [id, lane] : lanes_) lane.thread.join();
    }

    std::string name() const override { return "host"; }
    void check_memory(const void*, uint64_t, const std::string&) const override {}

    void* allocate(uint64_t bytes) override {
        void* memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
        if (memory == nullptr) throw DeviceMemoryError(kOutOfMemory, "allocating device memory failed");
        return memory;
    }

    // As CUDA does: what was enqueued may still use it.
    void release(void* memory) noexcept override {
        std::unique_lock<std::mutex> lock(mutex_);
        std::vector<Mark> given;
        for (auto& [id, lane] : lanes_) given.push_back({id, lane.taken});
        for (const Mark& mark : given) wait_for(lock, mark.stream, mark.count);
        std::free(memory);
    }

    void pin(void*, uint64_t) override {}
    void unpin(void*) noexcept override {}

    Stream make_stream() override { return start(next_stream_++); }

    void end_stream(Stream stream) noexcept override {
        std::unique_lock<std::mutex> lock(mutex_);
        auto found = lanes_.find(stream);
        if (stream == 0 || found == lanes_.end()) return;
        found->second.ending = true;
        changed_.notify_all();
        std::thread thread = std::move(found->second.thread);
        lock.unlock();
        thread.join();
        lock.lock();
        lanes_.erase(stream);
    }

    Event make_event() override {
        std::lock_guard<std::mutex> lock(mutex_);
        marks_[next_event_] = {};
        return next_event_++;
    }

    void end_event(Event event) noexcept override {
        std::lock_guard<std::mutex> lock(mutex_);
        marks_.erase(event);
    }

    void record(Event event, Stream stream) override {
        std::lock_guard<std::mutex> lock(mutex_);
        marks_.at(event) = {stream, lane(stream).taken};
    }

    void wait(Stream stream, Event event) override {
        std::lock_guard<std::mutex> lock(mutex_);
        const Mark mark = marks_.at(event);
        give(stream, [this, mark] {
            std::unique_lock<std::mutex> inner(mutex_);
            wait_for(inner, mark.stream, mark.count);
        });
    }

    bool done(Event event) override {
        std::lock_guard<std::mutex> lock(mutex_);
        return reached(marks_.at(event));
    }

    void reach(Event event) override {
        std::unique_lock<std::mutex> lock(mutex_);
        const Mark mark = marks_.at(event);
        wait_for(lock, mark.stream, mark.count);
    }

    void finish(Stream stream) override {
        std::unique_lock<std::mutex> lock(mutex_);
        wait_for(lock, stream, lane(stream).taken);
    }

    void copy(void* to, const void* from, uint64_t bytes, Stream stream) override {
        order(stream, [=] { std::memcpy(to, from, bytes); });
    }

    void notify(int fd, Stream stream) override {
        order(stream, [=] {
            const uint64_t one = 1;
            [[maybe_unused]] const ssize_t written = write(fd, &one, sizeof one);
        });
    }

    void encode(const Symbols& symbols, int k, int m, uint64_t superblocks, Stream stream) override {
        ManySymbols many{};
        std::copy_n(symbols.in, k, many.in);
        std::copy_n(symbols.out, m, many.out);
        many.inputs = static_cast<uint32_t>(k);
        encode_any(many, m, superblocks, stream);
    }

    void encode_any(const ManySymbols& symbols, int m, uint64_t superblocks, Stream stream) override {
        order(stream, [=] {
            for_rows(m, [&](auto rows) { encode_any_columns<decltype(rows)::value>(symbols, superblocks, kAll); });
        });
    }

    void decode(const Decoding& job, unsigned rows, uint64_t superblocks, Stream stream) override {
        order(stream, [=] { decode_with(rows, job, superblocks); });
    }

    void combine(const Combination& job, int rows, uint64_t superblocks, bool aligned, Stream stream) override {
        order(stream, [=] {
            for_rows(rows, [&](auto count) {
                if (aligned) {
                    combine_columns<decltype(count)::value, Wide>(job, superblocks, kAll);
                } else {
                    combine_columns<decltype(count)::value, Narrow>(job, superblocks, kAll);
                }
            });
        });
    }

    void combine_bytes(const Combination& job, int rows, uint64_t from, uint64_t to, bool aligned,
                       Stream stream) override {
        order(stream, [=] {
            for_rows(rows,
                     [&](auto count) { gpu::combine_bytes<decltype(count)::value>(job, from, to, aligned, kAll); });
        });
    }

    void crc32c(const uint8_t* data, uint64_t bytes, uint64_t block_bytes, uint32_t* crcs, Stream stream) override {
        order(stream, [=] {
            for (uint64_t at = 0; at < bytes; at += block_bytes) {
                crcs[at / block_bytes] = crc_of(data + at, std::min(block_bytes, bytes - at));
            }
        });
    }

    void prepare_copies() override {}

    void copy_pieces(const Piece* pieces, uint64_t count, uint64_t, Stream stream) override {
        order(stream, [=] {
            for (const Piece* piece = pieces; piece < pieces + count; ++piece) {
                std::memcpy(piece->to, piece->from, piece->bytes);
            }
        });
    }

  private:
    Stream start(Stream stream) {
        std::lock_guard<std::mutex> lock(mutex_);
        Lane& lane = lanes_[stream];
        lane.thread = std::thread([this, &lane] { work(lane); });
        return stream;
    }

    void work(Lane& lane) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            changed_.wait(lock, [&] { return lane.ending || !lane.orders.empty(); });
            if (lane.orders.empty()) return;
            std::function<void()> order = std::move(lane.orders.front());
            lane.orders.pop_front();
            lock.unlock();
            order();
            lock.lock();
            ++lane.over;
            changed_.notify_all();
        }
    }

    Lane& lane(Stream stream) {
        auto found = lanes_.find(stream);
        if (found == lanes_.end() || found->second.ending) {
            throw DeviceError(kInvalidHandle, "there is no stream " + std::to_string(stream) + ": it was ended");
        }
        return found->second;
    }

    void order(Stream stream, std::function<void()> what) {
        std::lock_guard<std::mutex> lock(mutex_);
        give(stream, std::move(what));
    }

    void give(Stream stream, std::function<void()> what) {
        Lane& to = lane(stream);
        to.orders.push_back(std::move(what));
        ++to.taken;
        changed_.notify_all();
    }

    bool reached(const Mark& mark) const {
        auto found = lanes_.find(mark.stream);
        return found == lanes_.end() || found->second.over >= mark.count;
    }

    void wait_for(std::unique_lock<std::mutex>& lock, Stream stream, uint64_t count) {
        changed_.wait(lock, [&] { return reached({stream, count}); });
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::map<Stream, Lane> lanes_;
    std::map<Event, Mark> marks_;
    Stream next_stream_ = 1;
    Event next_event_ = 1;
};

}  // namespace

std::unique_ptr<Device> make_host_device() {
    return std::make_unique<HostDevice>();
}

}  // namespace snapshotd::gpu
