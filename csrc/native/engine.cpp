#include "engine.hpp"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "crash.hpp"
#include "crc32c.hpp"
#include "parallel.hpp"

namespace snapshotd {

namespace {

constexpr double kForever_s = 1e8;
constexpr uint64_t kCalibrationBytes = 64ull << 20;  // beyond most last-level caches

#if defined(__x86_64__)
constexpr Stores kStoresByDefault = Stores::non_temporal;
#else
constexpr Stores kStoresByDefault = Stores::temporal;
#endif

// Copies and checksums `bytes` in the same pass, in pieces that end where a page of `to` ends.
uint32_t copy_and_extend(byte* to, const byte* from, size_t bytes, Stores stores, uint32_t crc) noexcept {
    copy_dense(to, from, bytes, stores);
    return crc_extend(crc, from, bytes);
}

void copy_items(const ItemTable& table, byte* slot) noexcept {
    for (const Item& item : table.items()) table.copy_out(item, 0, item.bytes, slot + item.offset);
}

// A woken thread of SCHED_OTHER takes the core from whoever woke it, for a whole slice: the training thread would stand
// still inside `begin`. One of SCHED_BATCH waits for a core of its own, or for the tick. Only a wish: errors do not
// matter.
void yield_to_trainer(pthread_t thread) {
    int policy = 0;
    sched_param priority{};
    if (pthread_getschedparam(thread, &policy, &priority) == 0 && policy == SCHED_OTHER) {
        pthread_setschedparam(thread, SCHED_BATCH, &priority);
    }
}

}  // namespace

Engine::Engine(Arena& arena, int threads)
    : arena_(arena),
      geometry_(arena.geometry()),
      map_(arena.mapped_for_writing()),
      made_at_(fork_count()),
      stores_(kStoresByDefault) {
    check_threads(threads);
    start_threads(threads);
    map_->engines.fetch_add(1);
}

Engine::~Engine() {
    close();
}

// The threads block every signal, so that Ctrl-C and the trainer's own handlers stay with the trainer's threads.
void Engine::start_threads(int threads) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    threads_.reserve(threads);
    for (int i = 0; i < threads && error == 0; ++i) {
        pthread_t thread;
        error = pthread_create(
            &thread, nullptr,
            [](void* engine) -> void* {
                static_cast<Engine*>(engine)->work();
                return nullptr;
            },
            this);
        if (error != 0) break;
        pthread_setname_np(thread, "snapshotd-copy");
        yield_to_trainer(thread);
        threads_.push_back(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (error == 0) return;
    end_threads();
    throw OsError(error, std::string("the copy threads cannot be started: ") + std::strerror(error));
}

void Engine::end_threads() {
    ending_.store(true);
    starts_.fetch_add(1, std::memory_order_release);
    futex_wake_all(starts_, Sharing::within_process);
    for (pthread_t thread : threads_) pthread_join(thread, nullptr);
    threads_.clear();
}

void Engine::close() {
    if (!in_this_process()) {
        if (phase_.exchange(closed) != closed) {
            map_->engines.fetch_sub(1);
            map_.reset();
        }
        return;
    }
    for (;;) {
        uint32_t expected = idle;
        if (phase_.compare_exchange_strong(expected, closed)) break;
        if (expected == closed) return;
        cancel();
    }
    end_threads();
    map_->engines.fetch_sub(1);
    map_.reset();
}

bool Engine::running() const noexcept {
    return in_this_process() && phase_.load(std::memory_order_acquire) == running_copy;
}

Woken Engine::wait(Clock::time_point deadline) const {
    for (;;) {
        uint32_t phase = phase_.load(std::memory_order_acquire);
        if (phase == idle || phase == closed || !in_this_process()) return Woken::changed;
        Woken woken = futex_wait(phase_, phase, deadline, Sharing::within_process);
        if (woken != Woken::changed) return woken;
    }
}

void Engine::cancel() noexcept {
    if (running()) stop_.store(true, std::memory_order_relaxed);
    while (wait(deadline_after(kForever_s)) != Woken::changed) continue;
}

// --- one copy, seen from the caller

void Engine::check_begin(const Plan& plan, uint32_t index) const {
    std::shared_ptr<Mapping> map = arena_.mapped_for_writing();
    if (plan.file_bytes > geometry_.slot_bytes) {
        throw std::invalid_argument("the plan has " + std::to_string(plan.file_bytes) + " bytes, the slot only " +
                                    std::to_string(geometry_.slot_bytes));
    }
    arena_.slot_offset(index);  // checks the index
    if (Arena::header_of(*map).slot[index].state.load(std::memory_order_acquire) != kFilling) {
        throw std::invalid_argument("slot " + std::to_string(index) + " is not being filled by anyone: claim it first");
    }
    plan.now.refuse_overlap_with(map->base, map->bytes);
    plan.later.refuse_overlap_with(map->base, map->bytes);
}

void Engine::begin(std::shared_ptr<Plan> plan, uint32_t index, int notify_fd) {
    if (!in_this_process()) throw std::logic_error("the engine's threads stayed in the parent of this process");
    Clock::time_point began = Clock::now();
    uint32_t expected = idle;
    // The end of the last copy may still be announcing itself: that takes microseconds.
    while (!phase_.compare_exchange_strong(expected, running_copy)) {
        if (expected == running_copy) throw std::logic_error("a copy is running: wait for it first");
        if (expected == closed) throw std::logic_error("the engine is closed");
        wait(deadline_after(kForever_s));
        expected = idle;
    }
    try {
        check_begin(*plan, index);
    } catch (...) {
        phase_.store(idle, std::memory_order_release);
        futex_wake_all(phase_, Sharing::within_process);
        throw;
    }
    plan_ = std::move(plan);
    plan_->copying.fetch_add(1);
    slot_ = arena_.slot_bytes_at(*map_, index);
    crcs_ = arena_.crc_table(*map_, index);
    notify_fd_ = notify_fd;
    began_ = began;
    copy_items(plan_->now, slot_);
    next_block_.store(0, std::memory_order_relaxed);
    stop_.store(false, std::memory_order_relaxed);
    busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    starts_.fetch_add(1, std::memory_order_release);
    futex_wake_all(starts_, Sharing::within_process);
}

void Engine::copy_now(Plan& plan, uint32_t index) const {
    if (!in_this_process() || phase_.load(std::memory_order_acquire) == closed) {
        throw std::logic_error("the engine is closed");
    }
    check_begin(plan, index);
    plan.copying.fetch_add(1);
    copy_items(plan.now, arena_.slot_bytes_at(*map_, index));
    plan.copying.fetch_sub(1);
}

// --- one copy, seen from a thread

void Engine::work() {
    uint32_t seen = 0;
    for (;;) {
        uint32_t start = starts_.load(std::memory_order_acquire);
        if (start == seen) {
            futex_wait(starts_, seen, deadline_after(kForever_s), Sharing::within_process);
            continue;
        }
        seen = start;
        if (ending_.load()) return;
        copy_blocks();
        store_fence();
        if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) finish();
    }
}

void Engine::copy_blocks() noexcept {
    const uint64_t blocks = geometry_.blocks_in_file(plan_->file_bytes);
    for (;;) {
        uint64_t block = next_block_.fetch_add(1, std::memory_order_relaxed);
        if (block >= blocks || stop_.load(std::memory_order_relaxed)) return;
        crash_point(CrashPoint::copy_block);
        copy_block(block);
    }
}

void Engine::copy_block(uint64_t block) noexcept {
    const std::vector<Item>& items = plan_->later.items();
    uint64_t at = block * geometry_.block_bytes;
    const uint64_t end = std::min(at + geometry_.block_bytes, plan_->file_bytes);
    uint32_t crc = ~0u;
    for (size_t i = plan_->later.first_after(at); at < end; ++i) {
        uint64_t gap_end = i < items.size() ? std::min(end, items[i].offset) : end;
        if (at < gap_end && !copy_span(at, gap_end, nullptr, crc)) return;
        if (at < end && !copy_span(at, std::min(end, items[i].end()), &items[i], crc)) return;
    }
    crcs_[block].store(~crc, std::memory_order_relaxed);
}

// Moves `at` to `to`, which lies in one item, or in none (those bytes are in the slot already). False once stopped.
bool Engine::copy_span(uint64_t& at, uint64_t to, const Item* item, uint32_t& crc) noexcept {
    alignas(64) byte stage[kPieceBytes];
    const Stores stores = stores_.load(std::memory_order_relaxed);
    while (at < to) {
        if (stop_.load(std::memory_order_relaxed)) return false;
        size_t bytes = std::min<uint64_t>(kPieceBytes - at % kPieceBytes, to - at);
        if (item == nullptr) {
            crc = crc_extend(crc, slot_ + at, bytes);
        } else if (item->dimensions == 0) {
            crc = copy_and_extend(slot_ + at, item->pointer + (at - item->offset), bytes, stores, crc);
        } else {
            plan_->later.copy_out(*item, at - item->offset, bytes, stage);
            crc = copy_and_extend(slot_ + at, stage, bytes, stores, crc);
        }
        at += bytes;
    }
    return true;
}

// By the last thread. The descriptor is written to before the engine counts as idle: whoever waited may close it.
void Engine::finish() noexcept {
    seconds_.store(std::chrono::duration<double>(Clock::now() - began_).count());
    crash_point(CrashPoint::copy_done);
    plan_->copying.fetch_sub(1);
    phase_.store(finishing, std::memory_order_release);
    if (notify_fd_ >= 0) {
        const uint64_t one = 1;
        [[maybe_unused]] ssize_t written = ::write(notify_fd_, &one, sizeof one);
    }
    phase_.store(idle, std::memory_order_release);
    futex_wake_all(phase_, Sharing::within_process);
}

// --- calibration

double Engine::time_stores(Stores stores, byte* to, const byte* from, uint64_t bytes) const {
    Clock::time_point began = Clock::now();
    parallel_for(static_cast<int>(threads_.size()), bytes / geometry_.block_bytes, [&](uint64_t block) {
        uint32_t crc = ~0u;
        uint64_t first = block * geometry_.block_bytes;
        for (uint64_t at = first; at < first + geometry_.block_bytes; at += kPieceBytes) {
            crc = copy_and_extend(to + at, from + at, kPieceBytes, stores, crc);
        }
        store_fence();
        std::atomic_signal_fence(std::memory_order_seq_cst);
        (void)crc;
    });
    return std::chrono::duration<double>(Clock::now() - began).count();
}

Stores Engine::calibrate() {
    std::shared_ptr<Mapping> map = arena_.mapped_for_writing();
    if (!in_this_process() || phase_.load() != idle) throw std::logic_error("the engine is busy or closed");
    if (geometry_.slots < 2 || !arena_.take(0)) return stores_.load();
    if (arena_.take(1)) {
        const uint64_t bytes = std::min(kCalibrationBytes, geometry_.slot_bytes);
        double best[2] = {1e9, 1e9};
        for (int round = 0; round < 3; ++round) {
            for (Stores stores : {Stores::temporal, Stores::non_temporal}) {
                double& least = best[static_cast<int>(stores)];
                least = std::min(
                    least, time_stores(stores, arena_.slot_bytes_at(*map, 1), arena_.slot_bytes_at(*map, 0), bytes));
            }
        }
        stores_.store(best[0] < best[1] ? Stores::temporal : Stores::non_temporal);
        arena_.empty(1);
    }
    arena_.empty(0);
    return stores_.load();
}

}  // namespace snapshotd
