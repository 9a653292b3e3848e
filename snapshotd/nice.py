"""The priority of what this daemon does beside training."""

from __future__ import annotations

import contextlib
import os
import threading

NICE = 19  # beside training on a core that is not free: 1.5 % of it, where 10 would take 10 %


def be_nice(nice: int = NICE) -> None:
    """Give this thread a low CPU priority: training comes first.

    A sandbox that allows no priorities leaves it at the usual one."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
