// Threads that copy tensors into a slot of the arena and checksum each block in the same pass.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "arena.hpp"
#include "copy.hpp"
#include "futex.hpp"
#include "plan.hpp"

namespace snapshotd {

// One copy at a time. The threads start with the engine and sleep between copies. They know neither Python nor
// signals. In a forked child, where they do not exist, the engine can only be dropped.
class Engine {
  public:
    // The arena must outlive the engine; its mapping counts the engine until close(). OsError without threads.
    Engine(Arena& arena, int threads);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // Measures both kinds of stores, with as many threads, between two EMPTY slots; keeps what it has if there are
    // none.
    Stores calibrate();

    // Copies the plan's `now` items and sets the threads on the rest. std::logic_error while a copy is running or
    // after close(); std::invalid_argument for a plan that does not fit the slot, or a slot that is not FILLING.
    void begin(std::shared_ptr<Plan> plan, uint32_t index, int notify_fd);

    // Copies the plan's `now` items and nothing else: no thread starts, no block is checksummed. For whoever fills the
    // rest of the slot by other means. Throws as begin() does.
    void copy_now(Plan& plan, uint32_t index) const;

    bool running() const noexcept;
    // Sleeps until the copy is over (`changed`), the deadline passed or a signal came.
    Woken wait(Clock::time_point deadline) const;
    // Stops the copy at its next piece. No signal ends this earlier: whoever returns from here may free the tensors.
    void cancel() noexcept;
    double seconds() const noexcept { return seconds_.load(); }

    // Stops the copy, ends the threads, lets go of the mapping.
    void close();

  private:
    enum Phase : uint32_t { idle, running_copy, finishing, closed };

    bool in_this_process() const noexcept { return made_at_ == fork_count(); }
    void start_threads(int threads);
    void end_threads();
    void check_begin(const Plan& plan, uint32_t index) const;
    void work();
    void copy_blocks() noexcept;
    void copy_block(uint64_t block) noexcept;
    bool copy_span(uint64_t& at, uint64_t to, const Item* item, uint32_t& crc) noexcept;
    void finish() noexcept;
    double time_stores(Stores stores, byte* to, const byte* from, uint64_t bytes) const;

    Arena& arena_;
    const Geometry geometry_;
    std::shared_ptr<Mapping> map_;
    const uint32_t made_at_;
    std::vector<pthread_t> threads_;
    std::atomic<Stores> stores_;
    std::atomic<double> seconds_{0};

    mutable Word32 phase_{idle};  // futex of those who wait for the end of a copy
    Word32 starts_{0};            // futex of the threads: grows with every copy, and once more to end
    std::atomic<bool> ending_{false};
    std::atomic<bool> stop_{false};

    // The copy that is running: written by begin() before `starts_` grows, by the last thread after all are done.
    std::shared_ptr<Plan> plan_;
    byte* slot_ = nullptr;
    Word32* crcs_ = nullptr;
    int notify_fd_ = -1;
    Clock::time_point began_;
    std::atomic<uint64_t> next_block_{0};
    std::atomic<int> busy_{0};
};

}  // namespace snapshotd
