"""Where a drill strikes: a trainer while its arena shows a copy in flight, and whole nodes.

A drill that killed at any moment would mostly hit compute. This one reads the arenas as the daemon does, from
outside: it waits until a slot of the victim is FILLING, kills, and then watches what becomes of that slot. A copy
that was torn is never published; only then the kill counts as having come in the middle.

Nodes are chosen so that the loss hurts: the one that coordinates the commits is always among them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from snapshotd import _native
from snapshotd.clock import SystemClock

_CLOCK = SystemClock()
# Shorter than any copy, and a pause all the same: on a busy machine a sleeper is woken before a spinner gets its turn.
_LOOK_EVERY_S = 0.0001
_DEATH_MAX_S = 10.0
_SAMPLES = 64


@dataclass(frozen=True)
class Strike:
    """One kill: whom, when, and what was seen."""

    rank: int
    pid: int
    at_s: float
    step: int  # the step whose copy was running; where none was, the newest that the victim had passed
    committed: int  # the newest step that every rank had committed, read right before the kill
    copy_in_flight: bool


@dataclass(frozen=True)
class Loss:
    """Nodes that were destroyed at once, and what the daemons and the arenas said right before."""

    nodes: tuple[int, ...]  # by their place in the order of launch
    ranks: tuple[int, ...]  # whose shards went with them
    at_s: float
    committed: int  # the newest step that every rank had committed
    data_bytes: int  # memory of all arenas of the job, on all nodes
    parity_bytes: int  # memory of all its parity, on all nodes


def nodes_to_lose(node_of_rank: Mapping[int, int], count: int) -> tuple[int, ...]:
    """The node of rank 0, whose daemon decides what is committed, and the last ones of the rest: `count` in all."""
    coordinator = node_of_rank[0]
    others = sorted(set(node_of_rank.values()) - {coordinator}, reverse=True)
    return tuple(sorted([coordinator, *others][:count]))


@contextlib.contextmanager
def owned_arenas(folders: Iterable[Path], pids: Mapping[int, int]) -> Iterator[dict[int, _native.Arena]]:
    """Read-only mappings of the arenas in `folders` that the trainers `pids` (by rank) hold now, by rank."""
    arenas: dict[int, _native.Arena] = {}
    try:
        for path in (path for folder in folders for path in folder.glob("*.arena")):
            if (arena := _open(path)) is None:
                continue
            owner = _owner(arena)
            if owner is not None and pids.get(owner.rank) == owner.pid and not owner.fenced:
                arenas[owner.rank] = arena
            else:
                arena.close()
        yield arenas
    finally:
        for arena in arenas.values():
            arena.close()


def committed_step(arenas: Mapping[int, _native.Arena]) -> int:
    """The newest step that is committed in each of these arenas; 0 where there is none."""
    return min((arena.committed_step for arena in arenas.values()), default=0)


def passed_step(arenas: Mapping[int, _native.Arena]) -> int:
    """The newest step that the fastest of these trainers is through with."""
    return max((arena.passed for arena in arenas.values()), default=0)


def strike(arenas: Mapping[int, _native.Arena], rank: int, pid: int, timeout_s: float, latest: int) -> Strike | None:
    """SIGKILL the trainer `pid` of `rank` as soon as a copy into its arena runs. None if none did for `timeout_s`.

    Copies are short and a busy machine looks away for longer: a trainer that has passed the step `latest` before one
    was seen is killed without.
    """
    victim = arenas[rank]
    deadline_s = _CLOCK.monotonic_s() + timeout_s
    with _Samples(victim) as samples:
        while _CLOCK.monotonic_s() < deadline_s:
            index, passed = samples.slot_being_copied(), victim.passed
            if index is None and passed < latest:
                time.sleep(_LOOK_EVERY_S)
                continue
            committed, at_s = committed_step(arenas), _CLOCK.monotonic_s()
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return None
            if index is None:
                return Strike(rank, pid, at_s, passed, committed, False)
            step = victim.slot(index).step or committed + 1
            return Strike(rank, pid, at_s, step, committed, _was_torn(victim, index, pid))
    return None


class _Samples:
    """A few words of each slot, to tell a slot that was only claimed from one whose bytes are being replaced."""

    def __init__(self, arena: _native.Arena) -> None:
        self._arena = arena
        self._views = [arena.slot_view(index) for index in range(arena.slots)]
        # Header and host state, which lie at the ends, are written before the copy starts.
        span = arena.slot_bytes // 10, arena.slot_bytes * 8 // 10
        self._offsets = range(*span, max(1, (span[1] - span[0]) // _SAMPLES))
        self._before = [self._words(index) for index in range(arena.slots)]

    def __enter__(self) -> _Samples:
        return self

    def __exit__(self, *_: object) -> None:
        for view in self._views:
            view.release()

    def slot_being_copied(self) -> int | None:
        """A slot that is FILLING and whose words differ from what they were before it was claimed."""
        for index, before in enumerate(self._before):
            filling = self._arena.slot(index).state == _native.FILLING
            words = self._words(index)
            if not filling:
                self._before[index] = words
            elif words != before:
                return index
        return None

    def _words(self, index: int) -> bytes:
        return b"".join(self._views[index][offset : offset + 8] for offset in self._offsets)


def _was_torn(arena: _native.Arena, index: int, pid: int) -> bool:
    """Whether the copy was never published: the slot was FILLING when the process was gone, or was emptied from there.

    A signal takes effect a little after it is sent: until the process is gone its threads may still publish.
    """
    deadline_s = _CLOCK.monotonic_s() + _DEATH_MAX_S
    while (state := arena.slot(index).state) == _native.FILLING and _CLOCK.monotonic_s() < deadline_s:
        if _is_gone(pid):
            return arena.slot(index).state in (_native.FILLING, _native.EMPTY)
        time.sleep(_LOOK_EVERY_S)
    return state == _native.EMPTY


def _is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def _open(path: Path) -> _native.Arena | None:
    """The arena in this file; None while it is being made or when it has just been freed."""
    with contextlib.suppress(OSError, _native.ArenaFormatError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _native.Arena(fd, writable=False)
        finally:
            os.close(fd)
    return None


def _owner(arena: _native.Arena) -> _native.Owner | None:
    with contextlib.suppress(_native.ArenaFormatError):
        return arena.owner()
    return None
