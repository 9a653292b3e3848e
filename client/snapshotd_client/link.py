"""The thread between a trainer and its daemon: whatever takes time happens here and not in the training loop.

It plans the first layout, asks for an arena and maps it, publishes a copy as soon as the engine is done, notices that
the daemon went away (one warning), knocks until one answers, and then takes up the same arena again. The loop looks at
`ready` and goes on; nothing here ever makes it wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from snapshotd import wire
from snapshotd.clock import Clock
from snapshotd.door_client import DoorClient
from snapshotd.errors import DaemonUnavailable, ProtocolError, Refused, SnapshotError
from snapshotd.manifest import block_bytes_for, round_up
from snapshotd_client.copier import Copier, Session, claim
from snapshotd_client.layout import Layout

log = logging.getLogger("snapshotd")
PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Link:
    """One rank's connection, kept up by a thread of its own. `on_done` is called there when a copy is over."""

    def __init__(
        self,
        socket: Path,
        session: Session,
        clock: Clock,
        threads: int,
        *,
        plan: Callable[[], Layout],
        on_done: Callable[[], None],
        passed: Callable[[], int],
    ) -> None:
        self.socket, self.session, self.clock, self.threads = socket, session, clock, threads
        self._plan, self._on_done, self._passed = plan, on_done, passed
        self._door: DoorClient | None = None
        self._wanted: Layout | None = None
        self._want_plan = False
        self._warned: set[str] = set()
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._attempt = 0
        self._inherit: tuple[bytes, int, int] | None = None
        self._refused = ""
        self._lost = False
        self.copier: Copier | None = None
        self.layout: Layout | None = None
        self.done_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poke_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="snapshotd-link", daemon=True)

    # --- the loop's side --------------------------------------------------------------------------

    def start(self, door: DoorClient | None) -> None:
        """Begin, with a connection that is already up, if there is one."""
        self._door = door
        self._lost = door is None
        self._thread.start()

    def adopt(self, copier: Copier, layout: Layout) -> None:
        """Take an arena that a restore mapped already (before `start`)."""
        self.copier, self.layout = copier, layout
        self._ready.set()

    def inherit(self, layout: Layout, arena_id: bytes, slot_bytes: int, block_bytes: int) -> None:
        """Take over this arena as soon as a daemon answers (before `start`): the restore itself could not."""
        self._wanted, self._inherit = layout, (arena_id, slot_bytes, block_bytes)

    def request_plan(self) -> None:
        """Ask for a first layout and an arena; returns at once and may be repeated."""
        if not self._want_plan and self._wanted is None and self.copier is None:
            self._want_plan = True
            self._poke()

    def request_layout(self, layout: Layout) -> None:
        """The layout changed: use it from the next cut on, in a larger arena where it does not fit this one."""
        copier = self.copier
        if copier is not None and layout.manifest.file_bytes <= copier.arena.slot_bytes:
            self.layout = layout
            return
        self.layout, self._wanted = None, layout
        self._ready.clear()
        self._poke()

    def ready(self) -> tuple[Copier, Layout] | None:
        """What a cut needs, once it is there."""
        copier, layout = self.copier, self.layout
        return (copier, layout) if copier is not None and layout is not None else None

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until an arena is mapped (only `flush` and `close` do)."""
        return self._ready.wait(timeout_s)

    def waiting(self) -> bool:
        """A layout is on its way to an arena."""
        return self._want_plan or self._wanted is not None

    def started(self) -> bool:
        """The thread runs."""
        return self._thread.ident is not None

    def connected(self) -> bool:
        """A daemon answered last time."""
        return self._door is not None

    @property
    def trouble(self) -> str:
        """Why there is no arena, where the daemon refused one."""
        return self._refused

    def stop(self) -> DoorClient | None:
        """End the thread and hand its connection back."""
        self._stop.set()
        self._poke()
        if self._thread.is_alive():
            self._thread.join(timeout=30.0)
        for fd in (self.done_fd, self._poke_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        door, self._door = self._door, None
        return door

    def _poke(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._poke_fd, (1).to_bytes(8, "little"))

    # --- the thread's side ------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._work()
                self._sleep()
            except Exception:  # the thread must outlive whatever happens: training does not depend on it
                log.exception(
                    "snapshotd: unexpected failure beside the training loop; snapshots may stop, training not"
                )
                self._stop.wait(PAUSES_S[-1])

    def _work(self) -> None:
        if self._want_plan:
            self._first_plan()
        if self._door is None:
            self._knock()
        if self._door is None:
            return
        if self._wanted is not None:
            self._attach(self._wanted)
        elif self._lost and self.copier is not None:
            self._reattach(self.copier)
        self._lost = self._lost and self._door is None

    def _first_plan(self) -> None:
        try:
            self._wanted = self._plan()
        except RuntimeError as error:  # the loop changed a dict while it was read: look again after the next step
            log.debug("snapshotd: planning the layout is put off: %s", error)
        except SnapshotError as error:
            self._refused = str(error)
            self._warn("plan", f"snapshots of this run are off: {error}; training goes on unprotected")
        self._want_plan = False

    def _knock(self) -> None:
        try:
            door = DoorClient.connect(self.socket, timeout_s=2.0)
            door.ask(wire.Hello("trainer", os.getpid()), timeout_s=5.0)
        except (DaemonUnavailable, ProtocolError, Refused) as error:
            if not isinstance(error, DaemonUnavailable):
                self._warn("knock", f"{error}; training goes on without snapshots")
            self._attempt += 1
            return
        self._attempt, self._door = 0, door
        if self._lost:
            log.info("snapshotd: a daemon answers at %s again", self.socket)
        self._warned.discard("lost")

    def _attach(self, layout: Layout) -> None:
        """Ask for an arena that holds this layout, beside the present one where that is too small."""
        old = self.copier
        size = layout.manifest.file_bytes if old is None else layout.manifest.file_bytes * 5 // 4
        request = attach_request(self.session, layout, self._passed(), size)
        if old is not None:
            request = changed(request, replaces=old.arena.arena_id)
        elif self._inherit is not None:
            arena_id, slot_bytes, block_bytes = self._inherit
            request = changed(request, arena=arena_id, slot_bytes=slot_bytes, block_bytes=block_bytes)
        copier = self._claim(request)
        if copier is None:
            return
        copier.prepare(layout, self.done_fd)
        self.copier, self.layout, self._wanted = copier, layout, None
        if old is not None:
            old.close()
        self._ready.set()

    def _reattach(self, copier: Copier) -> None:
        """The daemon is a new one: take up the arena that this process holds already."""
        layout = self.layout
        if layout is None:
            return
        request = attach_request(self.session, layout, self._passed(), copier.arena.slot_bytes)
        request = changed(request, arena=copier.arena.arena_id, block_bytes=copier.arena.block_bytes)
        assert self._door is not None
        try:
            grant = claim(self._door, request, self.clock, self._stop.wait)
        except Refused as error:
            self._warn(
                "reattach", f"the restarted daemon does not have this rank's arena ({error}); asking for another"
            )
            self.layout, self._wanted = None, layout
            return
        except (DaemonUnavailable, ProtocolError, SnapshotError):
            self._drop()
            return
        os.close(grant.arena_fd)
        copier.new_bell(grant.bell_fd)
        copier.ring()

    def _claim(self, request: wire.Attach) -> Copier | None:
        assert self._door is not None
        try:
            copier = claim(self._door, request, self.clock, self._stop.wait).map(self.threads)
        except Refused as error:
            self._refused = str(error)
            self._warn("refused", f"this rank has no snapshots: {error}; training goes on unprotected")
            self._attempt += 1
            self._inherit = None
            return None
        except (DaemonUnavailable, ProtocolError, SnapshotError, OSError) as error:
            log.debug("snapshotd: a claim failed: %s", error)
            self._drop()
            return None
        self._refused, self._attempt = "", 0
        return copier

    def _sleep(self) -> None:
        """Until a copy is over, the daemon hangs up, somebody pokes, or it is time to knock again."""
        fds = [self.done_fd, self._poke_fd]
        door = self._door
        if door is not None:
            fds.append(door.fileno())
        waiting = door is None or (self._wanted is not None)
        pause_s = PAUSES_S[min(self._attempt, len(PAUSES_S) - 1)] if waiting else None
        poll = select.poll()  # select() fails for descriptors above 1023, which a trainer with many workers has
        for fd in fds:
            poll.register(fd, select.POLLIN)
        readable = {fd for fd, _ in poll.poll(None if pause_s is None else pause_s * 1000)}
        if self._stop.is_set():
            return
        for fd in (self.done_fd, self._poke_fd):
            if fd in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 8)
        if self.done_fd in readable:
            self._on_done()
        if door is not None and door.fileno() in readable:
            self._drop()

    def _drop(self) -> None:
        """The daemon is gone (it never speaks unasked)."""
        if self._door is not None:
            self._door.close()
        self._door, self._lost = None, True
        self._warn(
            "lost",
            f"the daemon at {self.socket} went away: training goes on, committed snapshots stay in memory, and new "
            f"ones resume when a daemon answers again (start one with `snapshotd serve` if nothing restarts it)",
        )

    def _warn(self, topic: str, sentence: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning("snapshotd: %s", sentence)


def attach_request(session: Session, layout: Layout, passed: int, file_bytes: int) -> wire.Attach:
    """What a rank asks for: slots of whole blocks that hold its layout."""
    return changed(bare_request(session, file_bytes, passed), fingerprint=layout.manifest.fingerprint)


def bare_request(session: Session, file_bytes: int, passed: int) -> wire.Attach:
    """What a rank asks for whose layout is not known yet: slots of whole blocks that hold so many bytes."""
    block = block_bytes_for(file_bytes)
    return wire.Attach(
        job=session.job,
        generation=session.generation,
        rank=session.rank,
        world_size=session.world_size,
        local_index=session.local_ranks.index(session.rank),
        local_ranks=list(session.local_ranks),
        every=session.every,
        slot_bytes=round_up(file_bytes, block),
        block_bytes=block,
        fingerprint=bytes(32),
        parity=session.parity,
        group_size=session.group_size,
        numa_node=numa_node_here(),
        passed=passed,
        restored=session.restored,
        committed=session.committed,
        nodes=list(session.nodes),
        groups=[list(group) for group in session.groups],
    )


def changed(request: wire.Attach, **changes: object) -> wire.Attach:
    """The request with some fields changed."""
    return msgspec.structs.replace(request, **changes)


def numa_node_here() -> int:
    """The NUMA node of the CPUs that this process may use; -1 where that is more than one node or unknown."""
    cpus = os.sched_getaffinity(0)
    nodes = set()
    with contextlib.suppress(OSError, ValueError):
        for node in Path("/sys/devices/system/node").glob("node[0-9]*"):
            if any((node / f"cpu{cpu}").exists() for cpu in cpus):
                nodes.add(int(node.name.removeprefix("node")))
    return nodes.pop() if len(nodes) == 1 else -1
