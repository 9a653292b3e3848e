#include "crash.hpp"

#include <signal.h>
#include <unistd.h>

#include <array>
#include <stdexcept>

namespace snapshotd {

namespace {

constexpr std::array<const char*, 7> kNames = {"",          "claim.taken",    "claim.named",  "copy.block",
                                               "copy.done", "publish.before", "publish.after"};

std::atomic<int> remaining{0};

}  // namespace

std::atomic<int> armed_crash_point{static_cast<int>(CrashPoint::none)};

void count_down_and_crash() noexcept {
    if (remaining.fetch_sub(1) != 1) return;
    kill(getpid(), SIGKILL);
    for (;;) pause();  // the signal may reach another thread first: nothing may happen here after the point
}

void arm_crash(const std::string& name, int countdown) {
    if (countdown < 1) throw std::invalid_argument("countdown must be at least 1");
    for (size_t i = 0; i < kNames.size(); ++i) {
        if (name != kNames[i]) continue;
        armed_crash_point.store(static_cast<int>(CrashPoint::none));
        remaining.store(countdown);
        armed_crash_point.store(static_cast<int>(i));
        return;
    }
    throw std::invalid_argument("'" + name + "' is no crash point; crash_points() lists them");
}

std::vector<std::string> crash_point_names() {
    return {kNames.begin() + 1, kNames.end()};
}

}  // namespace snapshotd
