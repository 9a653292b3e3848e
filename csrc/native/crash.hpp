// Crash points: places where a test may have this process killed, to look at what it leaves in shared memory.
#pragma once

#include <atomic>
#include <string>
#include <vector>

namespace snapshotd {

enum class CrashPoint : int { none, claim_taken, claim_named, copy_block, copy_done, publish_before, publish_after };

extern std::atomic<int> armed_crash_point;
void count_down_and_crash() noexcept;

// One relaxed load while nothing is armed.
inline void crash_point(CrashPoint here) noexcept {
    if (__builtin_expect(armed_crash_point.load(std::memory_order_relaxed) == static_cast<int>(here), 0)) {
        count_down_and_crash();
    }
}

// Throws std::invalid_argument for an unknown name; the empty name disarms.
void arm_crash(const std::string& name, int countdown);
std::vector<std::string> crash_point_names();

}  // namespace snapshotd
