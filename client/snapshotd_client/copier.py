"""A rank's arena in its trainer's hands: claim a slot, let the engine fill it, publish it or give it up.

One copy at a time. `begin` belongs to the training loop, as does `hold`, before the optimizer writes; `settle` may come
from the loop or from the link's thread (when the copy is done), whichever is first. From host memory the engine copies,
and `hold` waits for it; from a GPU the device does (`gpu`), and only the optimizer's stream waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from snapshotd import _native, wire
from snapshotd.clock import Clock, SystemClock
from snapshotd.door_client import DoorClient
from snapshotd.errors import RankClaimed, SnapshotError
from snapshotd.faults import crash_point
from snapshotd_client.gpu import Side
from snapshotd_client.layout import Layout

COPY_MAX_S = 120.0
LOCK_WAIT_S = 5.0
RESERVE_MAX_S = 600.0  # memory that a machine never touched before comes at a few hundred MB/s
POLL_S = 0.002
STILL_RUNNING = "the last copy was still running"
GPU_REFUSED = "the GPU refused"
_ZEROS = bytes(1 << 20)
_lock_fds: list[int] = []  # never closed: closing any descriptor of a lock file would let go of its record lock


@dataclass(frozen=True)
class Session:
    """Who this rank is in which generation of which job."""

    job: str
    generation: wire.GenerationId
    rank: int
    world_size: int
    local_ranks: tuple[int, ...]
    every: int
    parity: int
    group_size: int
    restored: wire.SnapshotId | None = None
    committed: bool = False  # what was restored
    nodes: tuple[wire.Place, ...] = ()  # of a job on several nodes
    groups: tuple[tuple[bytes, ...], ...] = ()

    def ranks_by_node(self, here: bytes) -> dict[bytes, tuple[int, ...]]:
        """Which ranks each node serves; `here` is this node."""
        return {place.node: tuple(place.ranks) for place in self.nodes} or {here: self.local_ranks}


@dataclass(frozen=True)
class Settled:
    """How a copy ended: `skipped` has the reason where nothing was published, `kind` the name to count it by."""

    step: int
    skipped: str = ""
    kind: str = "spoiled"
    copy_s: float = 0.0


@dataclass
class _Running:
    slot: int
    step: int
    layout: Layout
    began_s: float
    held: bool = False  # the optimizer was let go on: what it writes from now on spoils nothing
    spoiled: str = ""


class Copier:
    """The arena, its engine and the bell of the daemon."""

    def __init__(self, arena: _native.Arena, bell_fd: int, threads: int, clock: Clock | None = None) -> None:
        self.arena, self.bell_fd, self._clock = arena, bell_fd, clock or SystemClock()
        self._side = Side(arena)
        self.engine = _native.Engine(arena, threads)
        self.stores = self.engine.calibrate()
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._pause = threading.Event()
        self._closed = False
        self._prepared: dict[int, bytes] = {}
        self._host_lengths: dict[int, int] = {}
        self._views = [arena.slot_view(index) for index in range(arena.slots)]

    def prepare(self, layout: Layout, wake_fd: int = -1) -> None:
        """Write the file's header into every empty slot, and have the device ready, ahead of time."""
        if layout.gpu is not None:
            self._side.ready(layout.gpu, layout.manifest.file_bytes, wake_fd)
        for index in range(self.arena.slots):
            if self.arena.slot(index).state == _native.EMPTY:
                self._write_header(index, layout)

    def _write_header(self, index: int, layout: Layout) -> None:
        manifest = layout.manifest
        if self._prepared.get(index) == manifest.fingerprint:
            return
        view = self._views[index]
        view[: len(manifest.header)] = manifest.header
        for start in range(manifest.file_bytes, self.arena.slot_bytes, len(_ZEROS)):
            length = min(len(_ZEROS), self.arena.slot_bytes - start)
            view[start : start + length] = _ZEROS[:length]
        self._prepared[index] = manifest.fingerprint
        self._host_lengths[index] = layout.host_place[1]

    def begin(self, layout: Layout, session: Session, step: int, host: bytes, wake_fd: int) -> str:
        """Claim a slot and start the copy; the reason in words if this step goes without.

        What is written after the layout's watch was asked last spoils the snapshot.
        `wake_fd` is an eventfd that grows when the copy is over, -1: none.
        """
        with self._lock:
            return self._begin(layout, session, step, host, wake_fd)

    def _begin(self, layout: Layout, session: Session, step: int, host: bytes, wake_fd: int) -> str:
        generation = session.generation
        if self._running is not None:
            return STILL_RUNNING
        if layout.gpu is not None and not self._side.ready(layout.gpu, layout.manifest.file_bytes, wake_fd):
            return GPU_REFUSED
        index = self.arena.claim(
            generation=generation.number,
            nonce=generation.nonce,
            step=step,
            rank=session.rank,
            world_size=session.world_size,
            fingerprint=layout.manifest.fingerprint,
        )
        if index < 0:
            return "no slot was free"
        try:
            self._write_header(index, layout)
            self._write_host(index, layout, host)
            crash_point("cut.hosted")
            began_s = self._clock.monotonic_s()
            if layout.gpu is None:
                self.engine.begin(layout.plan, index, wake_fd)
            elif not self._begin_beside(layout, index):
                self.arena.empty(index)
                return GPU_REFUSED
        except BaseException:
            self.arena.empty(index)
            raise
        self._running = _Running(index, step, layout, began_s)
        return ""

    def _begin_beside(self, layout: Layout, index: int) -> bool:
        """What the device does not copy must be in the slot first: it checksums whole blocks."""
        self.engine.copy_now(layout.plan, index)
        return self._side.begin(index)

    def _write_host(self, index: int, layout: Layout, host: bytes) -> None:
        place, _ = layout.host_place
        view, before = self._views[index], self._host_lengths[index]
        view[place : place + len(host)] = host
        if before > len(host):
            view[place + len(host) : place + before] = bytes(before - len(host))
        self._host_lengths[index] = len(host)

    def busy(self) -> bool:
        """A copy was begun and is not settled."""
        return self._running is not None

    def hold(self) -> Settled | None:
        """The optimizer is about to write. From host memory: as `settle`. From a GPU the optimizer's stream waits, not
        the host; where it cannot be made to, the snapshot is given up once it is over.
        """
        with self._lock:
            running = self._running
            if running is not None and running.layout.gpu is not None:
                if not running.held:
                    running.spoiled = self._written(running)
                if not self._side.hold():
                    running.spoiled = running.spoiled or self._side.trouble
                running.held = True
                return None
        return self.settle()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the copy is over, if one runs; False where it takes longer."""
        running, deadline_s = self._running, self._clock.monotonic_s() + timeout_s
        if running is None or running.layout.gpu is None:
            return self.engine.wait(timeout_s)
        while self._still_beside(running):
            if self._clock.monotonic_s() >= deadline_s:
                return False
            self._pause.wait(POLL_S)
        return True

    def _still_beside(self, running: _Running) -> bool:
        with self._lock:
            return self._running is running and self._side.over() is False

    def settle(self, timeout_s: float = COPY_MAX_S) -> Settled | None:
        """Wait for the copy, then publish it, unless a tensor was written meanwhile. None where nothing was begun, and
        where a device is still at it: that is not waited for.
        """
        with self._lock:
            running = self._running
        if running is None:
            return None
        if running.layout.gpu is not None:
            return self._settle_beside(running)
        done = self.engine.wait(timeout_s)
        with self._lock:
            running = self._running
            if running is None:
                return None
            reason = "" if done else f"the copy took longer than {timeout_s:g} s"
            if not done:
                self.engine.cancel()
            reason = reason or self._written(running)
            self._end(running, reason)
        self.ring()
        return Settled(running.step, reason, copy_s=self.engine.seconds())

    def _settle_beside(self, running: _Running) -> Settled | None:
        with self._lock:
            over = self._side.over() if self._running is running else False
            if over is False:
                return None
            reason = running.spoiled or ("" if running.held else self._written(running))
            if over is None:
                reason = self._side.trouble or "the GPU lost the copy"
            self._end(running, reason)
        self.ring()
        seconds = self._clock.monotonic_s() - running.began_s
        return Settled(running.step, reason, "spoiled" if over else GPU_REFUSED, seconds)

    def _written(self, running: _Running) -> str:
        """Which tensor was written since the copy began, in words."""
        moved = running.layout.watch.versions_moved()
        if moved < 0:
            return ""
        name = running.layout.watched_name(moved)
        return f"{name} was written between guard.step() and the next optimizer step"

    def _end(self, running: _Running, reason: str) -> None:
        if reason:
            self.arena.empty(running.slot)
        else:
            self.arena.publish(running.slot, running.layout.manifest.file_bytes)
        self._running = None

    @property
    def trouble(self) -> str:
        """What a GPU refused last; empty since it did as it was told again."""
        return self._side.trouble

    def ring(self) -> None:
        """Tell the daemon to look. A bell that is gone is a daemon that is gone: the link sees that by itself."""
        with contextlib.suppress(OSError):
            os.write(self.bell_fd, (1).to_bytes(8, "little"))

    def new_bell(self, fd: int) -> None:
        """A restarted daemon listens to another descriptor."""
        old, self.bell_fd = self.bell_fd, fd
        with contextlib.suppress(OSError):
            os.close(old)

    def close(self) -> None:
        """Cancel what runs, end the threads, unmap. The record lock stays until the process ends. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            running, self._running = self._running, None
            self._side.close()
            self.engine.close()
            if running is not None:
                self.arena.empty(running.slot)
            for view in self._views:
                view.release()
            self._views = []
            with contextlib.suppress(BufferError):
                self.arena.close()
            with contextlib.suppress(OSError):
                os.close(self.bell_fd)


@dataclass(frozen=True)
class Grant:
    """An arena that this process holds: its mapping is still to be made."""

    arena_id: bytes
    arena_fd: int
    bell_fd: int
    slot_bytes: int
    block_bytes: int

    def map(self, threads: int) -> Copier:
        """Map, touch every page now rather than in the first copy, and start the engine."""
        try:
            arena = _native.Arena(self.arena_fd, writable=True, populate=True, exclude_from_fork=True)
        finally:
            os.close(self.arena_fd)
        crash_point("claim.mapped")
        return Copier(arena, self.bell_fd, threads)


def claim(door: DoorClient, request: wire.Attach, clock: Clock, pause: Callable[[float], object]) -> Grant:
    """Ask for an arena and hold it by its record lock. Refused, DaemonUnavailable or ProtocolError as the door says."""
    reply, fds = door.ask(request, timeout_s=RESERVE_MAX_S)
    if not isinstance(reply, wire.Granted) or len(fds) != 3:
        for fd in fds:
            os.close(fd)
        raise SnapshotError("the daemon answered a claim with something else; install the same release on both sides")
    arena_fd, lock_fd, bell_fd = fds
    crash_point("claim.granted")
    _lock_fds.append(lock_fd)
    _take_lock(lock_fd, request.rank, clock, pause)
    crash_point("claim.locked")
    door.ask(wire.Held(reply.arena))
    return Grant(reply.arena, arena_fd, bell_fd, reply.slot_bytes, request.block_bytes)


def _take_lock(fd: int, rank: int, clock: Clock, pause: Callable[[float], object]) -> None:
    deadline_s = clock.monotonic_s() + LOCK_WAIT_S
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if clock.monotonic_s() > deadline_s:
                raise RankClaimed(
                    f"rank {rank} is held by another process that does not let go; end it before this one trains",
                    rank=rank,
                ) from None
            pause(0.002)
