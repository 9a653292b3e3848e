"""The daemon: one event loop in which trainers ring, knock and die, and memory is kept for whoever comes after them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from snapshotd import accelerator, budget, geometry, status, wire
from snapshotd.arena import ArenaFile, HeldBy
from snapshotd.clock import Clock
from snapshotd.config import DaemonConfig
from snapshotd.door import Connection, Door, Peer
from snapshotd.errors import DaemonUnavailable, ProtocolError, Refused
from snapshotd.generation import Generation
from snapshotd.generation import views as views_of
from snapshotd.keeper import Keeper
from snapshotd.metrics import Metrics, Repeats
from snapshotd.root import Draft, Root
from snapshotd.scrub import Scrubber
from snapshotd.session import ClientSession, Rebuilder

if TYPE_CHECKING:
    from snapshotd.caretaker import Caretaker
    from snapshotd.peers import Peers
    from snapshotd.workshop import Workshop

HOUSEKEEPING_S = 1.0
SILENT_S = 5.0
STATUS_S = 10.0
IDLE_BEFORE_FIRST_S, IDLE_S = 300.0, 20.0
log = logging.getLogger("snapshotd")


class Daemon:
    """Everything together. `run` serves until it is told to stop; arenas outlive it."""

    def __init__(self, config: DaemonConfig, clock: Clock) -> None:
        self.config, self.clock, self.metrics = config, clock, Metrics()
        self.pid = os.getpid()
        self.accelerator = accelerator.open_for(config.codec, clock.monotonic_s)
        self.drafts: dict[tuple[str, int], tuple[Draft, int]] = {}
        self.keeper: Keeper
        self._door: Door
        self.peers: Peers | None = None
        self.workshop: Rebuilder | None = None
        self._workshop: Workshop | None = None
        self._scrubber: Scrubber | None = None
        self._caretaker: Caretaker | None = None
        self.parity_drafts: list[Draft] = []
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
        self._scrubber = Scrubber(self.keeper, self.config, self.clock, self.failed)
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
            self._meet_peers()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, f"signal {number.name}")
        log.info("serving %s, arenas in %s, node %s", self.config.socket, self.config.shm_dir, self.keeper.label)
        timer = loop.call_later(HOUSEKEEPING_S, self._keep_house)
        try:
            await self._stopped.wait()
        finally:
            timer.cancel()
            if self._scrubber is not None:
                await self._scrubber.close()
            if self._caretaker is not None:
                await self._caretaker.close()
            if self._workshop is not None:
                await self._workshop.close()
            if self.peers is not None:
                await self.peers.close()

    def _meet_peers(self) -> None:
        from snapshotd.caretaker import Caretaker
        from snapshotd.mend import Mender
        from snapshotd.peers import Peers  # zmq takes memory that a daemon of one node does without
        from snapshotd.workshop import Workshop

        self.peers = peers = self._new_peers(Peers)
        self.workshop = self._workshop = workshop = Workshop(peers, self._repeats, self.rooms, self.parity_drafts)
        peers.on_heard = workshop.consider
        self.keeper.on_look = self._looked
        if self._scrubber is not None:
            self._scrubber.idle, self._scrubber.repair = workshop.idle, Mender(peers).repair
            peers.mend = self._scrubber.mend
        self.keeper.on_orphan = lambda file: workshop.give_up_rebuild(file.arena_id)
        self._caretaker = Caretaker(peers, self.config, self.clock, self.rooms, self.parity_drafts, self.failed)
        self._caretaker.idle, self.keeper.on_recovery = workshop.idle, self._caretaker.give_up
        self._caretaker.claimed = lambda job: any(name == job for name, _ in self.drafts)
        log.info("peers reach this node at %s, its streams at %s", *self.keeper.reached_at)

    def _new_peers(self, kind: type[Peers]) -> Peers:
        answer, accelerator = self._answer_network, self.accelerator
        return kind(self.config, self.keeper, self.metrics, self.clock, answer, self.dropped, accelerator=accelerator)

    def _looked(self, generation: Generation) -> None:
        assert self.peers is not None and self._workshop is not None
        self._workshop.consider(generation)
        self.peers.changed(generation)

    async def peer_inventories(self, job: str, *, fresh: bool = False) -> list[wire.Inventory]:
        """What other nodes hold of a job, as far as this daemon knew them and they answer."""
        return await self.peers.inventories(job, fresh=fresh) if self.peers is not None else []

    async def introduce(self, ask: wire.Introduce) -> None:
        """These nodes are of this job. Refused where some authenticate and others do not."""
        if self.peers is not None:
            await self.peers.introduce(ask)

    def key_pem(self) -> bytes:
        """With what trainers of this node read from others; nothing where that goes in the clear."""
        identity = self.peers.identity if self.peers is not None else None
        return identity.keys.pem if identity is not None else b""

    def stop(self, why: str) -> None:
        """End orderly; the arenas stay in memory for the next daemon."""
        log.info("stopping: %s", why)
        self._stopped.set()

    # --- what happens -----------------------------------------------------------------------------

    def failed(self, what: str, error: BaseException | None) -> None:
        """An event ended in an exception of ours: say so, count it, go on. Who makes it happen again fills no log."""
        self.metrics.add("errors")
        sentence = f"{what} failed; the daemon goes on, please report this"
        self._repeats.error(f"failed {type(error).__name__} {_line_of(error)}", sentence, error)

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
        if reason == "mesh-unsent":  # said again within a second; who stays silent is shown in status
            log.debug("%s", sentence)
            return
        self._repeats.warning(f"dropped {reason}", sentence)

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failed(str(context.get("message", "an event")), context.get("exception"))

    def _keep_house(self) -> None:
        """Once a second: the lease, rings that got lost, and whether anybody still needs us."""
        asyncio.get_running_loop().call_later(HOUSEKEEPING_S, self._keep_house)
        self.keeper.look_everywhere()
        self.keeper.expire()
        if self._scrubber is not None:
            self._scrubber.consider()
        if self._caretaker is not None:
            self._caretaker.consider()
        if self._door.connections or self.keeper.files or self.drafts:
            self._busy_s = self.clock.monotonic_s()
            self._had_visitors = True
        elif self.config.exit_idle:
            patience_s = IDLE_S if self._had_visitors else IDLE_BEFORE_FIRST_S
            if self.clock.monotonic_s() - self._busy_s > patience_s:
                self.stop("nobody needs this daemon any more")

    async def _answer_network(self, request: wire.Request) -> wire.Reply | None:
        """What every peer may know, or anybody here where they do not authenticate; the rest takes the Unix socket."""
        if isinstance(request, wire.Hello):
            return self.welcome()
        return wire.StatusReport(await self.status_document()) if isinstance(request, wire.AskStatus) else None

    # --- what is told -----------------------------------------------------------------------------

    def welcome(self) -> wire.Welcome:
        """Who we are."""
        return wire.Welcome(self.keeper.root.node, self.keeper.label, self.pid, self.config.claim_wait_s)

    def rooms(self) -> list[budget.Room]:
        """What every limit leaves for new arenas, the tightest first."""
        drafts = [*(draft for draft, _ in self.drafts.values()), *self.parity_drafts]
        promised = sum(draft.outstanding_bytes() for draft in drafts)
        return budget.rooms(
            self.config.shm_dir,
            used_bytes=self._used_bytes() + sum(draft.total_bytes for draft in drafts) - promised,
            limit_bytes=self.config.memory_limit,
            promised_bytes=promised,
        )

    def _used_bytes(self) -> int:
        return self.keeper.total_bytes()

    async def status_of(self, at: str) -> wire.Reply:
        """Our own status, or that of a peer that believes us and not the tool. Done where this daemon has no peers."""
        if not at:
            return wire.StatusReport(await self.status_document())
        if self.peers is None:
            return wire.Done()
        try:
            return await self.peers.mesh.ask(at.removeprefix("tcp://"), wire.AskStatus(), STATUS_S)
        except (DaemonUnavailable, ProtocolError) as error:
            raise Refused(f"that daemon's status cannot be had from here: {error}") from None

    async def status_document(self) -> bytes:
        """The status as JSON. Changes nothing. What peers hold counts too, as far as they answer."""
        held: dict[str, list[wire.Inventory]] = {}
        for job in {generation.job for generation in self.keeper.generations.values()}:
            held[job] = await self.peer_inventories(job)
        jobs: dict[str, list[status.GenerationFacts]] = {}
        for generation in sorted(self.keeper.generations.values(), key=lambda one: one.identity):
            jobs.setdefault(generation.job, []).append(self._generation_facts(generation))
        found = status.document(
            self._node_facts(),
            self.rooms(),
            jobs,
            {job: [self.keeper.inventory(job), *held.get(job, [])] for job in jobs},
            [one.sentence for one in self.keeper.damaged],
            self.metrics.document(),
            {job: self._caretaker.facts(job) if self._caretaker is not None else None for job in jobs},
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
            listen=self.peers.mesh.address if self.peers is not None else "",
            advertise=self.keeper.reached_at[0],
            streams=self.keeper.reached_at[1],
            authenticates=self.keeper.badge is not None,
            domain=self.config.domain,
            connections=self._door.connections,
            memory_limit_bytes=self.config.memory_limit,
            used_bytes=self._used_bytes(),
            codec=self.accelerator.facts(),
            scrub=self._scrubber.facts() if self._scrubber is not None else {},
        )

    def _generation_facts(self, generation: Generation) -> status.GenerationFacts:
        commits, aborts = generation.counts
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
            commits=commits,
            aborts=aborts,
            abort_ratio=round(aborts / max(1, commits + aborts), 4),
            arenas=[self._arena_facts(file) for file in generation.rank_files()],
            parity={
                "total_bytes": sum(file.total_bytes for file in generation.parity_files()),
                "sets": [asdict(one) for file in generation.parity_files() for one in _parity_facts(file)],
            },
            cohort=self._cohort_facts(generation),
        )

    def _cohort_facts(self, generation: Generation) -> status.CohortFacts | None:
        cohort, now_s = generation.cohort, self.clock.monotonic_s()
        if cohort is None:
            return None
        groups = []
        for group in cohort.groups:
            parity, silent = geometry.parity_for(cohort.parity, len(group)), cohort.silent(group, now_s, SILENT_S)
            left = max(0, parity - len(silent)) if generation.ledger.committed is not None else 0
            groups.append(
                status.GroupFacts(
                    nodes=[cohort.name(node) for node in group],
                    parity=parity,
                    silent=[cohort.name(node) for node in silent] if cohort.hears(group) else [],
                    losses_left=left if cohort.hears(group) else None,
                    own=cohort.me in group,
                )
            )
        return status.CohortFacts(
            coordinator=cohort.name(cohort.coordinator),
            me=cohort.name(cohort.me),
            nodes=[
                {"node": place.node.hex(), "name": cohort.name(place.node), "address": place.address,
                 "streams": place.streams, "ranks": list(place.ranks)}
                for place in cohort.nodes
            ],
            groups=groups,
            trouble=generation.trouble,
        )  # fmt: skip

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


def _parity_facts(file: ArenaFile) -> list[status.ParityFacts]:
    facts = []
    for view in views_of(file):
        info = file.native.slot(view.index)
        facts.append(
            status.ParityFacts(
                arena=file.arena_id.hex(),
                index=view.index,
                state=view.progress.name,
                step=view.snapshot.step if view.snapshot else None,
                snapshot=str(view.snapshot or ""),
                position=info.rank if view.snapshot else None,
                bytes=info.file_bytes,
                quarantine=file.quarantined[view.index][1] if view.index in file.quarantined else "",
            )
        )
    return facts


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


def _line_of(error: BaseException | None) -> str:
    """Where an exception was raised."""
    traceback = error.__traceback__ if error is not None else None
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}" if traceback is not None else ""


def _installed_version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("snapshotd")
    return "unknown"


def serve(config: DaemonConfig, clock: Clock) -> None:
    """Run a daemon in this process until it is stopped."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(Daemon(config, clock).run())
