// A loop over numbered pieces of work, shared by a few threads that live as long as the loop.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

namespace snapshotd {

constexpr int kThreadsMax = 256;

inline void check_threads(int threads) {
    if (threads < 1 || threads > kThreadsMax) throw std::invalid_argument("threads must be between 1 and 256");
}

// Calls work(i) once for each i in [0, count), from `threads` threads, this one included. `work` must not throw.
template <typename Work>
void parallel_for(int threads, uint64_t count, Work work) {
    check_threads(threads);
    std::atomic<uint64_t> next{0};
    auto loop = [&] {
        for (uint64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
             i = next.fetch_add(1, std::memory_order_relaxed)) {
            work(i);
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve(threads - 1);
    try {
        for (int i = 1; i < threads && static_cast<uint64_t>(i) < count; ++i) helpers.emplace_back(loop);
    } catch (const std::system_error&) {
        // No thread to be had: the ones that started, and this one, do all of it.
    }
    loop();
    for (auto& helper : helpers) helper.join();
}

}  // namespace snapshotd
