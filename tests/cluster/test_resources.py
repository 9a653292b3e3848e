"""What protection takes from the machine: shared memory, the trainer's own, the daemon's, and its time at rest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest

from tests.cluster import measured
from tests.cluster.harness import FORK, Daemon, until

MIB = 1 << 20
Start = Callable[..., dict[str, Any]]


@pytest.fixture
def daemon(shm_dir: Path, tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(shm_dir, tmp_path)
    try:
        one.start()
        yield one
    finally:
        one.stop()


@pytest.fixture
def start(daemon: Daemon, tmp_path: Path) -> Iterator[Start]:
    """Starts a measured trainer and returns what it wrote; it and its workers are ended afterwards."""
    processes: list[ForkServerProcess] = []
    pids: list[int] = []

    def one(**spec: int) -> dict[str, Any]:
        result = tmp_path / f"result-{len(processes)}.json"
        process = FORK.Process(
            target=measured.main, args=(measured.Measured(str(daemon.socket), str(result), **spec),), daemon=True
        )
        process.start()
        processes.append(process)
        until(lambda: result.exists() or process.exitcode is not None, f"the trainer's result in {result}")
        assert process.exitcode is None, f"the trainer ended with {process.exitcode}"
        facts: dict[str, Any] = json.loads(result.read_text())
        pids.extend(facts["workers"])
        return facts

    yield one
    for process in processes:
        process.kill()
        process.join()
        process.close()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def arena_of(daemon: Daemon, pid: int) -> dict[str, Any]:
    """The arena of this trainer, as the daemon's status tells it (whether or not the trainer lives)."""
    (job,) = daemon.status()["jobs"].values()
    (arena,) = (arena for one in job["generations"] for arena in one["arenas"])
    assert not arena["held"] or arena["pid"] == pid
    found: dict[str, Any] = arena
    return found


def own_bytes(pid: int) -> int:
    """Resident memory of a process that is not shared: what stays if every arena is taken away."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel tells RssAnon")


def ran_s(pid: int) -> float:
    """Seconds that all threads of a process ran, to the nanosecond (psutil's clock ticks 100 times a second)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def test_arenas_take_twice_the_state_and_the_trainer_nothing(daemon: Daemon, start: Start) -> None:
    state_bytes = 512 * MIB
    facts = start(state_bytes=state_bytes, snapshots=20)
    taken = sum(path.stat().st_blocks * 512 for path in daemon.arenas())
    assert 2 * state_bytes <= taken <= 2 * state_bytes * 1.05
    assert facts["status"]["arena_bytes"] <= 2 * state_bytes * 1.05
    grown = facts["peak"] - facts["before"]
    assert grown < 64 * MIB, f"the trainer's own memory grew by {grown / MIB:.1f} MiB in {len(facts['seen'])} steps"
    assert own_bytes(daemon.pid) < 60_000_000


def test_many_snapshots_take_no_more_memory_than_few(daemon: Daemon, start: Start) -> None:
    before = own_bytes(daemon.pid)
    facts = start(state_bytes=4 * MIB, snapshots=400)
    early, late = facts["seen"][len(facts["seen"]) // 4], facts["seen"][-1]
    assert late - early < MIB, f"the trainer grew by {(late - early) / MIB:.2f} MiB in 300 snapshots"
    assert own_bytes(daemon.pid) - before < 8 * MIB


def test_an_idle_daemon_takes_under_sixty_megabytes_and_one_percent_of_a_core(daemon: Daemon, start: Start) -> None:
    assert psutil.Process(daemon.pid).memory_info().rss < 60_000_000, "before anybody came"
    start(state_bytes=64 * MIB, snapshots=3)  # and waits: its arena is held, and nothing happens
    assert own_bytes(daemon.pid) < 60_000_000
    pause, window_s = Event(), 2.0
    before = ran_s(daemon.pid)
    pause.wait(window_s)
    share = (ran_s(daemon.pid) - before) / window_s
    assert share < 0.01, f"an idle daemon used {share:.2%} of a core"


def test_a_large_trainer_is_seen_dead_although_its_workers_live_on(daemon: Daemon, start: Start) -> None:
    facts = start(state_bytes=1024 * MIB, snapshots=2, workers=2)
    assert arena_of(daemon, facts["pid"])["held"]
    os.kill(facts["pid"], signal.SIGKILL)
    until(lambda: not arena_of(daemon, facts["pid"])["held"], "the daemon sees the death")
    assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in facts["workers"])
    (job,) = daemon.status()["jobs"].values()
    assert job["recoverable"]["step"] == facts["status"]["committed_step"], "what was committed stays"
