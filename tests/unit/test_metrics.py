"""Complaints that repeat are logged at a bounded rate."""

from __future__ import annotations

import logging

import pytest

from snapshotd.config import DaemonConfig
from snapshotd.daemon import Daemon
from snapshotd.metrics import Repeats


class Hand:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


def test_repetitions_are_held_back_and_their_number_is_told(caplog: pytest.LogCaptureFixture) -> None:
    clock = Hand()
    repeats = Repeats(logging.getLogger("test"), clock, pause_s=60)
    for _ in range(5):
        repeats.warning("magic", "bad bytes")
    repeats.warning("other", "something else")
    clock.now_s = 61
    repeats.warning("magic", "bad bytes")
    assert caplog.messages == ["bad bytes", "something else", "bad bytes (4 more like this since)"]


def test_many_kinds_take_bounded_memory_and_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = Hand()
    repeats = Repeats(logging.getLogger("test"), clock, pause_s=60)
    for number in range(1000):
        repeats.warning(f"kind {number}", "x")
    assert len(repeats._last) <= 65
    assert len(caplog.messages) == 65
    clock.now_s = 61
    repeats.warning("kind 999", "after a while")
    assert caplog.messages[-1] == "after a while"


def test_a_failure_that_repeats_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    daemon = Daemon(DaemonConfig(), Hand())
    for number in range(100):
        try:
            raise RuntimeError(f"a mistake of ours, {number}")
        except RuntimeError as error:
            daemon.failed(f"Publish of pid {number}", error)
    daemon.failed("something", ValueError("another"))
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "a mistake of ours, 0" in caplog.text
    assert daemon.metrics.count("errors") == 101
