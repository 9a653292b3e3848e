"""The daemon: one event loop in which trainers ring, knock and die, and memory is kept for whoever comes after them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from snapshotd import budget, status, wire
from snapshotd.arena import ArenaFile, HeldBy
from snapshotd.clock import Clock
from snapshotd.config import DaemonConfig
from snapshotd.door import Connection, Door, Peer
from snapshotd.generation import Generation
from snapshotd.generation import views as views_of
from snapshotd.keeper import Keeper
from snapshotd.metrics import Metrics, Repeats
from snapshotd.root import Draft, Root
from snapshotd.session import ClientSession

if TYPE_CHECKING:
    from snapshotd.listener import Listener

HOUSEKEEPING_S = 1.0
IDLE_BEFORE_FIRST_S, IDLE_S = 300.0, 20.0
log = logging.getLogger("snapshotd")


class Daemon:
    """Everything together. `run` serves until it is told to stop; arenas outlive it."""

    def __init__(self, config: DaemonConfig, clock: Clock) -> None:
        self.config, self.clock, self.metrics = config, clock, Metrics()
        self.pid = os.getpid()
        self.drafts: dict[tuple[str, int], tuple[Draft, int]] = {}
        self.keeper: Keeper
        self._door: Door
        self._listener: Listener | None = None
        self._version = _installed_version()
        self._repeats = Repeats(log, clock)
        self._waiting: set[asyncio.Future[None]] = set()
        self._started_s = clock.monotonic_s()
        self._busy_s, self._had_visitors = self._started_s, False
        self._stopped: asyncio.Event

    async def run(self) -> None:
        """Serve until `stop`. ConfigError or SnapshotError if another daemon is in the way, or the place is unfit."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_exception)
        self._stopped = asyncio.Event()
        self.keeper = Keeper(
            Root.open(self.config.shm_dir), self.config, self.metrics, self.clock, loop, self.on_change
        )
        try:
            self.keeper.adopt()
            self._door = Door(self.config.socket, self._welcome, self.dropped)
            try:
                await self._serve(loop)
            finally:
                loop.call_soon(self.on_change)  # who waits for a claim sees then that its connection is over
                await self._door.close()
        finally:
            self.keeper.close()

    async def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.config.listen:
            from snapshotd.listener import Listener  # zmq takes memory that a daemon of one node does without

            self._listener = Listener(self.config.listen, self._answer_network, self.dropped)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, f"signal {number.name}")
        log.info("serving %s, arenas in %s, node %s", self.config.socket, self.config.shm_dir, self.keeper.label)
        timer = loop.call_later(HOUSEKEEPING_S, self._keep_house)
        try:
            await self._stopped.wait()
        finally:
            timer.cancel()
            if self._listener is not None:
                await self._listener.close()

    def stop(self, why: str) -> None:
        """End orderly; the arenas stay in memory for the next daemon."""
        log.info("stopping: %s", why)
        self._stopped.set()

    # --- what happens -----------------------------------------------------------------------------

    def failed(self, what: str, error: BaseException | None) -> None:
        """An event ended in an exception of ours: say so, count it, go on."""
        self.metrics.add("errors")
        log.error("%s failed; the daemon goes on, please report this", what, exc_info=error)

    def on_change(self) -> None:
        """An arena may have become available: everyone who waits looks again."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait_until_clear(
        self, obstacle: Callable[[], tuple[int, int] | None], given_up: Callable[[], bool]
    ) -> tuple[int, int] | None:
        """Wait at most `claim_wait_s` until nothing stands in the way; returns what still does."""
        deadline_s = self.clock.monotonic_s() + self.config.claim_wait_s
        while (found := obstacle()) is not None:
            left_s = deadline_s - self.clock.monotonic_s()
            if left_s <= 0 or given_up():
                return found
            changed = asyncio.get_running_loop().create_future()
            self._waiting.add(changed)
            try:
                await asyncio.wait([changed], timeout=left_s)
            finally:
                self._waiting.discard(changed)
        return None

    def _welcome(self, peer: Peer, number: int, connection: Connection) -> ClientSession:
        return ClientSession(self, peer, number, connection)

    def dropped(self, reason: str, sentence: str) -> None:
        """A connection or a message was dropped: count it, and say so at a bounded rate."""
        self.metrics.add("dropped", reason=reason)
        self._repeats.warning(f"dropped {reason}", sentence)

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failed(str(context.get("message", "an event")), context.get("exception"))

    def _keep_house(self) -> None:
        """Once a second: the lease, rings that got lost, and whether anybody still needs us."""
        asyncio.get_running_loop().call_later(HOUSEKEEPING_S, self._keep_house)
        self.keeper.look_everywhere()
        self.keeper.expire()
        if self._door.connections or self.keeper.files or self.drafts:
            self._busy_s = self.clock.monotonic_s()
            self._had_visitors = True
        elif self.config.exit_idle:
            patience_s = IDLE_S if self._had_visitors else IDLE_BEFORE_FIRST_S
            if self.clock.monotonic_s() - self._busy_s > patience_s:
                self.stop("nobody needs this daemon any more")

    def _answer_network(self, request: wire.Request) -> wire.Reply | None:
        """What anybody on this machine may know; everything else takes the Unix socket."""
        if isinstance(request, wire.Hello):
            return self.welcome()
        return wire.StatusReport(self.status_document()) if isinstance(request, wire.AskStatus) else None

    # --- what is told -----------------------------------------------------------------------------

    def welcome(self) -> wire.Welcome:
        """Who we are."""
        return wire.Welcome(self.keeper.root.node, self.keeper.label, self.pid, self.config.claim_wait_s)

    def rooms(self) -> list[budget.Room]:
        """What every limit leaves for new arenas, the tightest first."""
        promised = sum(draft.outstanding_bytes() for draft, _ in self.drafts.values())
        return budget.rooms(
            self.config.shm_dir,
            used_bytes=self._used_bytes() + sum(draft.total_bytes for draft, _ in self.drafts.values()) - promised,
            limit_bytes=self.config.memory_limit,
            promised_bytes=promised,
        )

    def _used_bytes(self) -> int:
        return sum(file.total_bytes for file in self.keeper.files.values())

    def status_document(self) -> bytes:
        """The status as JSON. Changes nothing."""
        jobs: dict[str, list[status.GenerationFacts]] = {}
        for generation in sorted(self.keeper.generations.values(), key=lambda one: one.identity):
            jobs.setdefault(generation.job, []).append(self._generation_facts(generation))
        found = status.document(
            self._node_facts(),
            self.rooms(),
            jobs,
            {job: self.keeper.inventory(job) for job in jobs},
            [one.sentence for one in self.keeper.damaged],
            self.metrics.document(),
        )
        return json.dumps(found).encode()

    def _node_facts(self) -> status.NodeFacts:
        return status.NodeFacts(
            node=self.keeper.root.node.hex(),
            label=self.keeper.label,
            version=self._version,
            pid=self.pid,
            uptime_s=round(self.clock.monotonic_s() - self._started_s, 1),
            socket=str(self.config.socket),
            shm_dir=str(self.config.shm_dir),
            listen=self.config.listen,
            advertise=self.config.advertise,
            connections=self._door.connections,
            memory_limit_bytes=self.config.memory_limit,
            used_bytes=self._used_bytes(),
        )

    def _generation_facts(self, generation: Generation) -> status.GenerationFacts:
        return status.GenerationFacts(
            number=generation.identity.number,
            nonce=generation.identity.nonce.hex(),
            world_size=generation.world_size,
            every=generation.every,
            fenced=generation.ledger.fenced,
            restored=str(generation.restored or ""),
            complete=generation.ledger.state().complete,
            committed_step=generation.ledger.committed,
            next_step=generation.next_step,
            commits=generation.coordinator.commits,
            aborts=generation.coordinator.aborts,
            arenas=[self._arena_facts(file) for file in generation.all_files()],
        )

    def _arena_facts(self, file: ArenaFile) -> status.ArenaFacts:
        held = isinstance(file.holder, HeldBy)
        return status.ArenaFacts(
            arena=file.arena_id.hex(),
            rank=file.owner.rank,
            held=held,
            pid=getattr(file.holder, "pid", 0),
            passed=file.native.passed,
            closed=file.owner.closed,
            total_bytes=file.total_bytes,
            lease_left_s=round(self.keeper.lease_left_s(file, self.clock.wall_s()), 1),
            slots=_slot_facts(file),
        )


def _slot_facts(file: ArenaFile) -> list[status.SlotFacts]:
    views = {view.index: view for view in views_of(file)}
    facts = []
    for index in range(file.native.slots):
        view = views.get(index)
        snapshot = view.snapshot if view else None
        facts.append(
            status.SlotFacts(
                index=index,
                state=view.progress.name if view else "EMPTY",
                step=snapshot.step if snapshot else None,
                snapshot=str(snapshot or ""),
                file_bytes=file.native.slot(index).file_bytes if view else 0,
                pins=file.pins[index],
                quarantine=file.quarantined[index][1] if index in file.quarantined else "",
            )
        )
    return facts


def _installed_version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("snapshotd")
    return "unknown"


def serve(config: DaemonConfig, clock: Clock) -> None:
    """Run a daemon in this process until it is stopped."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(Daemon(config, clock).run())
