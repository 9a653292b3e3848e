"""The one place that asks what time it is.

Everything that needs time takes a `Clock`, so that tests and the simulation hand in their own.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Time, handed in."""

    def monotonic_s(self) -> float:
        """Seconds that only grow, for durations."""

    def wall_s(self) -> float:
        """Seconds since the epoch, for people and for what outlives the process."""


class SystemClock:
    """The machine's own clock."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
