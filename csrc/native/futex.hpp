// Sleeping on a word of memory. Chosen over condition variables because it works between processes, returns on
// signals (so that Ctrl-C reaches Python) and leaves no lock behind in a forked child.
#pragma once

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>

namespace snapshotd {

using Clock = std::chrono::steady_clock;

enum class Sharing { between_processes, within_process };
enum class Woken { changed, timeout, signal };

inline int futex_operation(int operation, Sharing sharing) {
    return sharing == Sharing::within_process ? operation | FUTEX_PRIVATE_FLAG : operation;
}

inline void futex_wake_all(std::atomic<uint32_t>& word, Sharing sharing) noexcept {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), futex_operation(FUTEX_WAKE, sharing), INT_MAX, nullptr,
            nullptr, 0);
}

// When a wait of `seconds` ends. NaN and negative waits end at once; none is longer than about three years.
inline Clock::time_point deadline_after(double seconds) {
    double bounded = seconds > 0 ? std::fmin(seconds, 1e8) : 0;
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded));
}

// Sleep once while `word` holds `seen`; the caller looks again whatever comes back.
inline Woken futex_wait(std::atomic<uint32_t>& word, uint32_t seen, Clock::time_point deadline, Sharing sharing) {
    auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - Clock::now()).count();
    if (left <= 0) return Woken::timeout;
    timespec timeout{static_cast<time_t>(left / 1000000000), static_cast<long>(left % 1000000000)};
    long result = syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), futex_operation(FUTEX_WAIT, sharing), seen,
                          &timeout, nullptr, 0);
    if (result == 0 || errno == EAGAIN) return Woken::changed;
    return errno == EINTR ? Woken::signal : Woken::timeout;
}

}  // namespace snapshotd
