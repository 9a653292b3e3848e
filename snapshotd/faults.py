"""Named places where a test or a drill may kill this process.

A crash point is a line that says `crash_point("commit.marked")`. Nothing is armed unless `SNAPSHOTD_CRASH` names the
point, and then the process dies there by SIGKILL, as it would by the OOM killer: no handler, no flush, no farewell.
`SNAPSHOTD_CRASH=point`, or `point:3` for the third time it is passed. The copy engine has its own points in C++
(`_native.crash_points()`), armed through the same variable.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from snapshotd import _native

TRAINER_POINTS = (
    "claim.granted",
    "claim.locked",
    "claim.mapped",
    "cut.hosted",
    "restore.inventory",
    "restore.chosen",
    "restore.assigned",
    "rebuild.asked",
    "rebuild.over",
    "restore.attached",
    "restore.verified",
    "restore.copying",
    "restore.copied",
    "close.released",
)
DAEMON_POINTS = (
    "reserve.created",
    "reserve.formatted",
    "grant.sent",
    "fence.before",
    "fence.after",
    "inherit.before",
    "inherit.after",
    "commit.decided",
    "commit.marked",
    "commit.applied",
    "free.before",
    "free.after",
    "named.before",
    "state.before",
    "state.after",
    "decree.before",
    "decree.after",
    "obey.before",
    "obey.after",
    "read.pinned",
    "read.sent",
    "accumulate.begun",
    "accumulate.window",
    "accumulate.done",
    "parity.published",
    "parity.counted",
    "rebuild.claimed",
    "rebuild.begun",
    "rebuild.window",
    "rebuild.decoded",
    "rebuild.published",
    "assist.window",
    "reprotect.made",
    "reprotect.published",
)

ON_SEVERAL_NODES = ("state", "decree", "obey", "read", "accumulate", "parity", "rebuild", "assist", "reprotect")
"""What stands before the dot of points that only a job on several nodes passes."""

_armed: dict[str, int] = {}
_passed: Callable[[str], None] | None = None


def points() -> list[str]:
    """Every name that `arm` knows."""
    return [*TRAINER_POINTS, *DAEMON_POINTS, *_native.crash_points()]


def arm(spec: str) -> None:
    """Arm one point from its `name[:count]`; an empty spec disarms all. ValueError for a name that does not exist."""
    _armed.clear()
    _native.arm_crash("")
    watch(None)
    if not spec:
        return
    name, _, count = spec.partition(":")
    if name in _native.crash_points():
        _native.arm_crash(name, int(count or 1))
    elif name in TRAINER_POINTS or name in DAEMON_POINTS:
        _armed[name] = int(count or 1)
        watch(_count_down)
    else:
        raise ValueError(f"there is no crash point {name!r}; the points are {', '.join(points())}")


def watch(passed: Callable[[str], None] | None) -> None:
    """Have each point call this with its name as it is passed: a simulated daemon dies by what it raises. None: no
    longer, and nothing is armed."""
    global _passed
    _passed = passed


def crash_point(name: str) -> None:
    """Die here if this point is armed and its count is used up."""
    if _passed is not None:
        _passed(name)


def _count_down(name: str) -> None:
    if name in _armed:
        _armed[name] -= 1
        if _armed[name] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
