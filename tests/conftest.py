"""Nothing is left behind: what a test starts or creates, it ends and removes.

Two fixtures look without being asked: after every test, and once more after the last one. They fail what leaves a
file in shared memory, a process, a thread or a socket. Processes inherit a mark in their environment, so that
those which nobody's child list shows any more (a daemon whose starter has gone) are found too.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import psutil
import pytest

SHM = Path("/dev/shm")
MARK = "TEST_SESSION_OF_SNAPSHOTD"
PATIENCE_MAX_S = 10.0
# Helpers of the multiprocessing module: they end with the process that they help.
HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")

_mark = uuid.uuid4().hex
os.environ[MARK] = _mark
# Before torch is imported. Threads that wait for one another by spinning, on cores that other processes need, made a
# step of a model of a few kilobytes take 130 ms.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asserts a time; hypothesis would, 200 ms for an example, which a busy machine takes now and then.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
_counter = itertools.count()


class Belongings(NamedTuple):
    """What this session holds at one moment, as sentences can name it."""

    files: frozenset[str]
    processes: frozenset[tuple[int, str]]
    threads: frozenset[str]
    sockets: frozenset[str]

    def beyond(self, before: Belongings) -> list[str]:
        """One entry for each thing that `before` did not have."""
        return [
            *(f"file /dev/shm/{name}" for name in sorted(_not_in_use_by_others(self.files - before.files))),
            *(f"process {pid} ({command})" for pid, command in sorted(self.processes - before.processes)),
            *(f"thread {name}" for name in sorted(self.threads - before.threads)),
            *(f"socket {name}" for name in sorted(self.sockets - before.sockets)),
        ]


def shared_memory_files(prefix: str) -> frozenset[str]:
    """Everything below /dev/shm/`prefix`*, except what carries the pid of a living process outside this session."""
    found = (path for top in SHM.glob(f"{prefix}*") if not _is_anothers(top) for path in (top, *_below(top)))
    return frozenset(str(path.relative_to(SHM)) for path in found)


def _below(top: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):  # somebody tidies up while we look
        return list(top.rglob("*"))
    return []


def _is_anothers(path: Path) -> bool:
    """True for what another user or another running program, named by a pid in the file's name, has put there."""
    try:
        if path.stat().st_uid != os.getuid():
            return True
    except FileNotFoundError:
        return True
    pids = [int(digits) for digits in re.findall(r"\d{2,7}", path.name)]
    return any(psutil.pid_exists(pid) and pid != os.getpid() and not _carries_mark(pid) for pid in pids)


def _not_in_use_by_others(names: frozenset[str]) -> frozenset[str]:
    """Without what lies where a process outside this session has a file open: somebody else's daemon, say."""
    if not names:
        return names
    tops = {name.split("/")[0] for name in names}
    others = (process for process in psutil.process_iter() if process.pid != os.getpid())
    for process in others:
        with contextlib.suppress(OSError):
            links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{process.pid}/fd")]
            used = {link.split("/")[3] for link in links if link.startswith(f"{SHM}/")} & tops
            if used and not _carries_mark(process.pid):
                tops -= used
    return frozenset(name for name in names if name.split("/")[0] in tops)


def _carries_mark(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).environ().get(MARK) == _mark
    return False


def _named(process: psutil.Process) -> tuple[int, str] | None:
    """Pid and command of a running process; None for zombies and for our own helpers (not for what they fork)."""
    with contextlib.suppress(psutil.Error):
        command = " ".join(process.cmdline())
        helps_us = process.ppid() == os.getpid() and any(helper in command for helper in HELPERS)
        if process.status() != psutil.STATUS_ZOMBIE and not helps_us:
            return process.pid, command[:160]
    return None


def children() -> frozenset[tuple[int, str]]:
    """Our children that run, and theirs."""
    return frozenset(named for child in psutil.Process().children(recursive=True) if (named := _named(child)))


def marked_processes() -> frozenset[tuple[int, str]]:
    """Every process of this session, whoever its parent is now."""
    others = (process for process in psutil.process_iter() if process.pid != os.getpid())
    return frozenset(named for process in others if _carries_mark(process.pid) and (named := _named(process)))


def _threads() -> frozenset[str]:
    return frozenset(f"{thread.name}#{thread.ident}" for thread in threading.enumerate())


def _sockets() -> frozenset[str]:
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return frozenset(link for link in links if link.startswith("socket:"))


def _belongings() -> Belongings:
    return Belongings(shared_memory_files("snapshotd"), children(), _threads(), _sockets())


def _left_after_patience(look: Callable[[], list[str]]) -> list[str]:
    """What is left once everything had time to end; returns at once when nothing is."""
    deadline_s = time.monotonic() + PATIENCE_MAX_S
    while left := look():
        if time.monotonic() > deadline_s:
            return left
        gc.collect()  # sockets and threads that only wait for their last reference
        time.sleep(0.02)
    return []


def _end(processes: frozenset[tuple[int, str]]) -> None:
    """Kill what a test left running, so that it does not disturb the next one."""
    for pid, _ in processes:
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_at_the_end() -> Iterator[None]:
    """Looks after the last test, from the outside: shared memory and the process table."""
    before = shared_memory_files("")
    yield

    def left() -> list[str]:
        files = _not_in_use_by_others(shared_memory_files("") - before)
        processes = sorted(marked_processes())
        return [
            *(f"file /dev/shm/{name}" for name in sorted(files)),
            *(f"process {pid} ({what})" for pid, what in processes),
        ]

    remaining = _left_after_patience(left)
    _end(marked_processes())
    assert not remaining, "the tests left behind: " + "; ".join(remaining)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(nothing_is_left_at_the_end: None) -> Iterator[None]:
    """Fails the test that leaves a file in shared memory, a process, a thread or a socket."""
    before = _belongings()
    yield
    remaining = _left_after_patience(lambda: _belongings().beyond(before))
    _end(children() - before.processes)
    assert not remaining, "this test left behind: " + "; ".join(remaining)


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    """A fresh directory in shared memory, mode 0700, that is removed with all it holds."""
    path = SHM / f"snapshotd-test-{os.getpid()}-{next(_counter)}"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
