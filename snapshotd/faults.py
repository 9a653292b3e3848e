"""Named places where a test or a drill may kill this process.

A crash point is a line that says `crash_point("commit.marked")`. Nothing is armed unless `SNAPSHOTD_CRASH` names the
point, and then the process dies there by SIGKILL, as it would by the OOM killer: no handler, no flush, no farewell.
`SNAPSHOTD_CRASH=point`, or `point:3` for the third time it is passed. The copy engine has its own points in C++
(`_native.crash_points()`), armed through the same variable.
"""

from __future__ import annotations

import os
import signal

from snapshotd import _native

TRAINER_POINTS = (
    "claim.granted",
    "claim.locked",
    "claim.mapped",
    "cut.hosted",
    "restore.inventory",
    "restore.chosen",
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
)

_armed: dict[str, int] = {}


def points() -> list[str]:
    """Every name that `arm` knows."""
    return [*TRAINER_POINTS, *DAEMON_POINTS, *_native.crash_points()]


def arm(spec: str) -> None:
    """Arm one point from its `name[:count]`; an empty spec disarms all. ValueError for a name that does not exist."""
    _armed.clear()
    _native.arm_crash("")
    if not spec:
        return
    name, _, count = spec.partition(":")
    if name in _native.crash_points():
        _native.arm_crash(name, int(count or 1))
    elif name in TRAINER_POINTS or name in DAEMON_POINTS:
        _armed[name] = int(count or 1)
    else:
        raise ValueError(f"there is no crash point {name!r}; the points are {', '.join(points())}")


def crash_point(name: str) -> None:
    """Die here if this point is armed and its count is used up."""
    if _armed and name in _armed:
        _armed[name] -= 1
        if _armed[name] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
