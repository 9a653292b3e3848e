"""Record locks: who holds one, and the news that nobody does any more."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotd.liveness import Watch, holder_pid

HOLDER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX)
child = os.fork() if sys.argv[2] == "fork" else None
if child == 0:
    os.close(1)
    sys.stdin.read()
    os._exit(0)
print(child or 0, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "lock"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    yield path, fd
    os.close(fd)


def hold(path: Path, how: str = "alone") -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


def test_a_free_lock_has_no_holder(lock: tuple[Path, int]) -> None:
    assert holder_pid(lock[1]) is None


def test_the_holder_is_named_by_pid(lock: tuple[Path, int]) -> None:
    holder = hold(lock[0])
    assert holder_pid(lock[1]) == holder.pid
    end(holder)
    assert holder_pid(lock[1]) is None


def test_asking_does_not_take_the_lock(lock: tuple[Path, int]) -> None:
    holder_pid(lock[1])
    holder = hold(lock[0])
    end(holder)


def test_the_watch_calls_when_the_holder_is_killed_and_keeps_nothing(lock: tuple[Path, int]) -> None:
    holder = hold(lock[0])
    released = threading.Event()
    Watch(lock[1], released.set)
    assert not released.is_set()
    end(holder)
    assert released.wait(30)
    second = hold(lock[0])  # would hang if the watch kept the lock
    end(second)


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(lock: tuple[Path, int]) -> None:
    holder = hold(lock[0], "fork")
    released = threading.Event()
    Watch(lock[1], released.set)
    holder.kill()
    holder.wait()
    assert released.wait(30)
    holder.communicate()  # closes the child's stdin, which ends it


def test_the_watch_outlives_the_arenas_own_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    holder = hold(path)
    released = threading.Event()
    Watch(fd, released.set)
    os.close(fd)
    end(holder)
    assert released.wait(30)


def test_our_own_locks_do_not_count(lock: tuple[Path, int]) -> None:
    fcntl.lockf(lock[1], fcntl.LOCK_EX)
    assert holder_pid(lock[1]) is None
