"""What disturbs the work on a group: sources that fail in every way, other sizes of work, counters, a meter."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st

from snapshotd import combine, reader, rebuild
from snapshotd.errors import SnapshotGone
from snapshotd.reader import Pace
from tests.unit.native_support import BLOCK

# --- sources that fail: each is called before a read ------------------------------------------------------------------


class BreaksOff(Exception):
    """Half of the answer is sent, then the connection ends."""


class Stalls(Exception):
    """Half of the answer is sent, then nothing until the node closes."""


def refuses(_: object) -> None:
    """Before a read: the daemon says no."""
    raise SnapshotGone("step 840 was replaced by step 850")


def hangs_up(_: object) -> None:
    """Before a read: the connection ends."""
    raise ConnectionAbortedError


def breaks_off(_: object) -> None:
    """Before a read: the connection ends in the middle of the answer."""
    raise BreaksOff


def stalls(_: object) -> None:
    """Before a read: the answer stops in its middle and the connection stays."""
    raise Stalls


# --- when, and in which pieces ----------------------------------------------------------------------------------------


class Nth:
    """Counts calls from any thread. `due` is true from the n-th on, `due_now` for that alone; 0: never."""

    def __init__(self, n: int = 0) -> None:
        self.n, self.count = n, 0
        self._lock = threading.Lock()

    def count_up(self, _: object = None) -> int:
        """One more call; returns its number."""
        with self._lock:
            self.count += 1
            return self.count

    def due(self) -> bool:
        """One more call."""
        return self.count_up() >= self.n > 0

    def due_now(self) -> bool:
        """One more call."""
        return self.n == self.count_up()


def cut(few: pytest.MonkeyPatch, window: int, part: int, segment: int, read: int) -> None:
    """Have the work done in pieces of these sizes, where it is done in such: small ones have more seams."""
    few.setattr(combine, "WINDOW_BYTES", window)
    few.setattr(combine, "STAGING_BYTES", part)
    few.setattr(combine, "PART_BYTES_MIN", min(part, combine.PART_BYTES_MIN))
    few.setattr(rebuild, "SEGMENT_BYTES", segment)
    few.setattr(reader, "READ_BYTES", read)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Arguments for `cut`: the usual sizes, and smaller ones."""
    window = draw(st.sampled_from([BLOCK, 2 * BLOCK, 4 * BLOCK, combine.WINDOW_BYTES]))
    part = draw(st.sampled_from([BLOCK, 2 * BLOCK, 64 * BLOCK]))
    return (
        window,
        part,
        draw(st.sampled_from([1, 4 * BLOCK, 64 << 20])),
        draw(st.sampled_from([1, 8 * BLOCK, 64 << 20])),
    )


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """What is free now is free without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- the pace --------------------------------------------------------------------------------------------------------


class FakeClock:
    """Time that passes only in pauses."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._lock = threading.Lock()

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        with self._lock:
            self.now_s += seconds


class Meter(Pace):
    """A pace that counts."""

    def __init__(self, bytes_per_s: float, clock: FakeClock) -> None:
        super().__init__(bytes_per_s, clock, clock.pause)
        self.taken_bytes, self._counting = 0, threading.Lock()

    def take(self, amount_bytes: int) -> None:
        with self._counting:
            self.taken_bytes += amount_bytes
        super().take(amount_bytes)
