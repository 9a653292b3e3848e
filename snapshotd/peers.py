"""This daemon among its peers: it tells what it holds, hears what others hold, and serves and pulls the bytes.

States and decisions are told when they change and repeated on a timer until the other side's state shows that they
arrived, so nothing here waits for a message. Bytes move on threads (`streams`); everything else happens on the loop.

Where peers authenticate, a node may speak for itself in jobs that it takes part in, and read what is kept of those.
Nobody is heard any more about a generation that was fenced.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitedLongEnough
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from snapshotd import spread, wire
from snapshotd.accelerator import Accelerator
from snapshotd.arena import ArenaFile
from snapshotd.assist import Assistant
from snapshotd.clock import Clock
from snapshotd.combine import Own, Tools, decoders
from snapshotd.config import DaemonConfig, parse_address
from snapshotd.errors import ConfigError, DaemonUnavailable, Refused, SnapshotGone
from snapshotd.faults import crash_point
from snapshotd.generation import Generation, views
from snapshotd.identity import Identity
from snapshotd.keeper import Keeper
from snapshotd.ledger import Progress
from snapshotd.mesh import Mesh, OneWay
from snapshotd.metrics import Metrics
from snapshotd.nice import be_nice
from snapshotd.reader import Pace
from snapshotd.readserver import Extent, ReadServer
from snapshotd.root import LastDaemon
from snapshotd.streams import Pool, Stream

TICK_S = 0.2
REPEAT_S = 1.0
RETELL_S = 0.2
ASK_PEERS_S = 0.7
ASKED_AGAIN_S = 1.0
PIN_MAX_S = 10.0
CLOSING_S = 5.0
DOUBTS_MAX = 25  # nobody repeats a doubt
FIRST_TRIES = 3  # within the second after which it is repeated anyway
SERIALS = 1 << 40
WORKERS = 2
log = logging.getLogger("snapshotd")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Means:
    """What carries messages and bytes, and what works beside the loop; a simulation hands in its own."""

    mesh: Callable[..., Mesh] = Mesh
    server: Callable[..., ReadServer] = ReadServer
    connect: Callable[..., Stream] = Stream.connect
    threads: Callable[[int], Executor] = decoders
    workers: Callable[[], Executor] = lambda: ThreadPoolExecutor(WORKERS, "snapshotd-worker", be_nice)


class Peers:
    """Mesh and streams of one daemon. `on_heard` is called after a generation's knowledge of others has changed, `mend`
    with blocks of ours that a peer came upon and that are bad; it gives None where it leaves them alone."""

    def __init__(
        self,
        config: DaemonConfig,
        keeper: Keeper,
        metrics: Metrics,
        clock: Clock,
        answer: Callable[[wire.Request], Any],
        dropped: Callable[[str, str], None],
        means: Means = Means(),
        accelerator: Accelerator | None = None,
    ) -> None:
        self.keeper, self.metrics, self.clock = keeper, metrics, clock
        self._means = means
        self.identity = Identity(keeper.root, clock) if config.authenticate else None
        self.on_heard: Callable[[Generation], None] = lambda _: None
        self.mend: Callable[[ArenaFile, int, wire.SnapshotId, list[int]], asyncio.Task[None] | None]
        self.mend = lambda *_: None
        self._loop = asyncio.get_running_loop()
        self._answer, self._dropped = answer, dropped
        last = keeper.root.last_daemon()
        self._serial = first_serial(clock, last)
        self._told: dict[int, tuple[bytes, float]] = {}  # by generation object: what was published last, and when
        self._decreed: dict[int, tuple[bytes, float]] = {}
        self._retold_s: dict[tuple[int, bytes], float] = {}
        self._closing: dict[int, tuple[Generation, float]] = {}
        self._known: dict[str, tuple[float, list[wire.Inventory]]] = {}
        self._ended = threading.Event()
        self._assistant = Assistant(
            self._tools_for, self.ended, lambda sent_bytes: self.metrics.add("assisted_bytes", sent_bytes)
        )
        self.mesh, self.streams = self._bound(config, last)
        source = parse_address("listen", self.mesh.address)[0] if config.interface else ""
        connect = functools.partial(means.connect, interface_address=source)
        if self.identity is not None:
            connect = functools.partial(connect, secure=self.identity.pin)
            keeper.badge = self.identity.keys.badge
        pace = Pace(float(config.peer_bandwidth), clock, self._ended.wait)
        keeper.reached_at = self._reached_at(config)
        helpers = functools.partial(spread.helpers, config.rebuild_spread, keeper.reached_at[1])
        self.tools = Tools(Pool(connect), pace, means.threads, accelerator, helpers)
        self.workers = means.workers()
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def _bound(self, config: DaemonConfig, last: LastDaemon) -> tuple[Mesh, ReadServer]:
        """Listening where the settings say; ports that are free to choose are those of the last daemon here, if they
        can be had, since peers and trainers know this node by them."""
        host, port = parse_address("listen", config.listen.removeprefix("tcp://"))
        shown = f"[{host}]" if ":" in host else host
        identity = self.identity
        keys, known = (identity.keys, identity.trust) if identity is not None else (None, None)
        mesh = _first_that_binds(
            [port] if port else [last.port, 0],
            lambda one: self._means.mesh(f"tcp://{shown}:{one}", self._asked, self.heard, self._dropped, keys, known),
        )
        secure = identity.serving if identity is not None else None
        try:
            streams = _first_that_binds(
                [config.stream_port] if config.stream_port else [last.stream_port, 0],
                lambda one: self._means.server(
                    host, one, self._serve, self._dropped_elsewhere, assist=self._assistant.answer, secure=secure
                ),
            )
        except BaseException:
            self._closing_mesh = self._loop.create_task(mesh.close())
            raise
        port, stream_port = (int(address.rpartition(":")[2]) for address in (mesh.address, streams.address))
        self.keeper.root.write_down(LastDaemon(port, stream_port, self._serial))
        return mesh, streams

    def _reached_at(self, config: DaemonConfig) -> tuple[str, str]:
        """The addresses that peers are given: as bound, or with the host that is to be advertised."""
        if not config.advertise:
            return self.mesh.address, self.streams.address
        host, port = parse_address("advertise", config.advertise)
        shown = f"[{host}]" if ":" in host else host
        own_port = self.mesh.address.rpartition(":")[2]
        return f"{shown}:{port or own_port}", f"{shown}:{self.streams.address.rpartition(':')[2]}"

    async def close(self) -> None:
        """End threads and sockets; pins are released."""
        self._timer.cancel()
        self._ended.set()
        await self._loop.run_in_executor(None, self.streams.close)
        self.tools.pool.close()
        await self._loop.run_in_executor(None, functools.partial(self.workers.shutdown, cancel_futures=True))
        await self.mesh.close()

    def ended(self) -> bool:
        """The daemon stops: workers give up."""
        return self._ended.is_set()

    # --- telling ----------------------------------------------------------------------------------

    def changed(self, generation: Generation) -> None:
        """Tell the peers of this generation what is new, if anything is."""
        if generation.cohort is None or generation.ledger.fenced:
            return
        self._publish(generation, again=False)
        if generation.cohort.coordinates:
            self._decree_all(generation, again=False)
            if generation.cohort.all_closed() and not generation.over:
                self._begin_closing(generation)

    def _publish(self, generation: Generation, *, again: bool) -> None:
        cohort = generation.cohort
        assert cohort is not None
        said = generation.publication(0)
        now_s, key = self.clock.monotonic_s(), id(generation)
        content = msgspec.msgpack.encode(said)
        last, at_s = self._told.get(key, (b"", 0.0))
        if content == last and not (again and now_s - at_s >= REPEAT_S):
            return
        said = msgspec.structs.replace(said, serial=self._next_serial())
        cohort.hear(said, now_s)
        crash_point("state.before")
        self._told[key] = (content, now_s)
        for place in cohort.listeners():
            self._insist(place.address, said, FIRST_TRIES)
        crash_point("state.after")

    def _decree_all(self, generation: Generation, *, again: bool) -> None:
        assert generation.cohort is not None
        now_s, key = self.clock.monotonic_s(), id(generation)
        content = msgspec.msgpack.encode(generation.decree(0, key in self._closing))
        last, at_s = self._decreed.get(key, (b"", 0.0))
        if content == last and not (again and now_s - at_s >= REPEAT_S):
            return
        decree = generation.decree(self._next_serial(), key in self._closing)
        crash_point("decree.before")
        self._decreed[key] = (content, now_s)
        for place in generation.cohort.others():
            self._insist(place.address, decree, FIRST_TRIES)
        crash_point("decree.after")

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick)
        living = set()
        for generation in list(self.keeper.generations.values()):
            if generation.cohort is None or generation.ledger.fenced:
                continue
            living.add(id(generation))
            self._publish(generation, again=True)
            if generation.cohort.coordinates:
                self._decree_all(generation, again=True)
            self.on_heard(generation)
        for table in (self._told, self._decreed):
            for key in table.keys() - living:
                del table[key]
        self._retold_s = {key: at for key, at in self._retold_s.items() if key[0] in living}
        for key, (generation, until_s) in list(self._closing.items()):
            if self.clock.monotonic_s() > until_s:
                del self._closing[key]
                self.keeper.run_over(generation)
        if self.identity is not None:
            self.identity.forget(file.job for file in self.keeper.files.values())

    # --- hearing ----------------------------------------------------------------------------------

    def heard(self, message: wire.Request, who: bytes) -> None:
        """A one-way message from a peer. What concerns nothing here, or is not for that peer to say, is dropped and
        counted."""
        if isinstance(message, wire.Publish | wire.Decree | wire.Doubt):
            generation = self.keeper.generations.get((message.job, message.generation))
            if not self._may_say(message, who):
                self._dropped("peer-stranger", f"a {type(message).__name__} came from a node that may not say it")
            elif generation is None or generation.cohort is None:
                self.metrics.add("dropped", reason="peer-unknown")  # it began earlier than here, or is over
            elif generation.ledger.fenced and not (isinstance(message, wire.Decree) and message.closed):
                self._dropped("peer-expired", f"a {type(message).__name__} was about {generation}, which has ended")
            elif isinstance(message, wire.Publish):
                self._heard_state(generation, message)
            elif isinstance(message, wire.Decree):
                self._heard_decree(generation, message)
            else:
                self._heard_doubt(message)

    def _may_say(self, message: wire.Publish | wire.Decree | wire.Doubt, who: bytes) -> bool:
        """It takes part in the job, and speaks of itself."""
        if self.identity is None:
            return True
        node = self.identity.trust.node(message.job, who)
        return node is not None and (isinstance(message, wire.Doubt) or message.node == node)

    def _heard_state(self, generation: Generation, said: wire.Publish) -> None:
        cohort = generation.cohort
        assert cohort is not None
        if not cohort.knows(said.node) or said.node == cohort.me:
            self._dropped("peer-stranger", f"a state of {generation} came from a node that is not part of it")
            return
        decisions = generation.hear(said, self.clock.monotonic_s())
        if cohort.coordinates and generation.coordinator is not None and generation.is_behind(said):
            self._retell(generation, said.node)
        if decisions:
            self.keeper.after(generation, decisions)
            self.keeper.look(generation)
        else:
            self.changed(generation)
            self.on_heard(generation)

    def _retell(self, generation: Generation, node: bytes) -> None:
        """This node does not show yet what was decided: say it once more, at a bounded rate."""
        now_s, key = self.clock.monotonic_s(), (id(generation), node)
        if now_s - self._retold_s.get(key, 0.0) < RETELL_S:
            return
        self._retold_s[key] = now_s
        assert generation.cohort is not None
        decree = generation.decree(self._next_serial(), id(generation) in self._closing)
        self.mesh.send(generation.cohort.place(node).address, decree)

    def _heard_decree(self, generation: Generation, decree: wire.Decree) -> None:
        assert generation.cohort is not None
        if decree.node != generation.cohort.coordinator:
            self._dropped("peer-stranger", f"a decree for {generation} came from a node that does not decide for it")
            return
        crash_point("obey.before")
        decisions = generation.obey(decree)
        crash_point("obey.after")
        self.keeper.after(generation, decisions)
        if decisions:
            self.keeper.look(generation)
        if decree.closed and generation.closed():
            self.keeper.run_over(generation)

    def _heard_doubt(self, doubt: wire.Doubt) -> None:
        """A reader says that our bytes are bad: look ourselves before anything is set aside."""
        file = self.keeper.files.get(doubt.arena)
        if file is None or file.checking or file.job != doubt.job:
            return
        with contextlib.suppress(SnapshotGone):
            self.keeper.pin(wire.OpenShard(doubt.arena, doubt.slot, doubt.snapshot))
            file.checking = True
            future = self.workers.submit(self.keeper.broken_blocks, file, doubt.slot)
            future.add_done_callback(functools.partial(self._doubt_settled, file, doubt))

    def _doubt_settled(self, file: ArenaFile, doubt: wire.Doubt, future: Future[list[int]]) -> None:
        def over(_: object = None) -> None:
            file.checking = False

        def settle() -> None:
            self.keeper.unpin(file, doubt.slot)
            bad = [] if future.cancelled() or future.exception() is not None else future.result()
            mending = self.mend(file, doubt.slot, doubt.snapshot, bad) if bad else None
            if mending is not None:
                mending.add_done_callback(over)  # no other doubt is looked into before, so no repairs pile up
                return
            over()
            if bad:
                why = f"a peer found it damaged, and {len(bad)} blocks fail their checksum here too"
                self.keeper.quarantine(wire.Quarantine(doubt.arena, doubt.slot, doubt.snapshot, why))
                self.keeper.look(self.keeper.generation_of(file))

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(settle)

    def doubt(self, generation: Generation, holding: wire.Holding, snapshot: wire.SnapshotId, why: str) -> None:
        """Tell the owner of a slot that its bytes failed here."""
        if generation.cohort is None:
            return
        for place in generation.cohort.nodes:
            if place.streams == holding.streams:
                message = wire.Doubt(
                    generation.job, generation.identity, holding.arena, holding.slot, snapshot, wire.clip(why)
                )
                self._insist(place.address, message, DOUBTS_MAX)

    def _insist(self, address: str, message: OneWay, tries: int) -> None:
        """The first message to a peer finds no connection yet: send until it leaves. A state or a
        decree that comes late bears its number, and a doubt is looked into before it counts."""
        if tries and not self.ended() and not self.mesh.send(address, message):
            self._loop.call_later(TICK_S, self._insist, address, message, tries - 1)

    # --- the end of a run -------------------------------------------------------------------------

    def _begin_closing(self, generation: Generation) -> None:
        """All nodes closed: say so for a while, then free here too (the coordinator goes last)."""
        if id(generation) not in self._closing:
            self._closing[id(generation)] = (generation, self.clock.monotonic_s() + CLOSING_S)
            self._decree_all(generation, again=False)

    # --- asking and answering ---------------------------------------------------------------------

    def _asked(self, request: wire.Request, who: bytes) -> Any:
        if isinstance(request, wire.AskInventory | wire.Introduce) and not self._takes_part(request.job, who):
            return wire.Refusal("refused", "this node was not told that you take part in that job")
        if isinstance(request, wire.Introduce):
            return self._introduced(request) if self.identity is not None else None
        if isinstance(request, wire.AskInventory):
            return wire.InventoryTaken(self.keeper.inventory(request.job))
        return self._answer(request)

    def _takes_part(self, job: str, who: bytes) -> bool:
        return self.identity is None or self.identity.trust.node(job, who) is not None

    def _introduced(self, ask: wire.Introduce) -> wire.Done:
        assert self.identity is not None
        self.identity.introduce(ask.job, [*ask.places, *ask.elsewhere])
        return wire.Done()

    async def introduce(self, ask: wire.Introduce) -> None:
        """Believe the nodes of a job, and have those believe them that hold some of it and are not part of it any more.

        Refused where some authenticate and others do not.
        """
        for place in (*ask.places, *ask.elsewhere):
            if (place.badge is None) != (self.identity is None):
                does, not_ = ("this node", place.label) if place.badge is None else (place.label, "this node")
                raise Refused(
                    f"{does} authenticates and {not_} does not, so they cannot protect each other and the job would "
                    f"train unprotected; give `authenticate` the same value on every node"
                )
        if self.identity is not None:
            self._introduced(ask)
            asked = [self.mesh.ask(one.address, ask, ASK_PEERS_S) for one in ask.elsewhere]
            await asyncio.gather(*asked, return_exceptions=True)  # who does not know us is told by another of us

    async def inventories(self, job: str, *, fresh: bool) -> list[wire.Inventory]:
        """What the nodes that this one knew hold of a job. Those that do not answer in time are left out.

        Without `fresh` an answer of a moment ago will do: status is asked often.
        """
        asked_s, known = self._known.get(job, (-ASKED_AGAIN_S, []))
        if not fresh and self.clock.monotonic_s() - asked_s < ASKED_AGAIN_S:
            return known
        addresses = set(self.keeper.met.of(job).values())
        asked = [self.mesh.ask(one, wire.AskInventory(job), ASK_PEERS_S) for one in sorted(addresses)]
        replies = await asyncio.gather(*asked, return_exceptions=True)
        known = [reply.inventory for reply in replies if isinstance(reply, wire.InventoryTaken)]
        self._known = {**self._known, job: (self.clock.monotonic_s(), known)} if addresses else {}
        return known

    # --- READ -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _serve(self, read: wire.Read, who: bytes) -> Iterator[Extent]:
        """On a stream's thread: the bytes that a peer asks for, pinned until they have left."""
        self._check_reader(read.job, read.snapshot, who)
        with self._extent(read) as found:
            crash_point("read.pinned")
            yield found
            self.metrics.add("served_bytes", len(found.view))
            crash_point("read.sent")

    def _check_reader(self, job: str, snapshot: wire.SnapshotId, who: bytes) -> None:
        if self.identity is not None and not self.identity.trust.may_read(job, who):
            self._dropped_elsewhere("peer-stranger", f"{snapshot} was asked for by a node that is not of its job")
            raise Refused("this node was not told that you take part in that job; restart it, which introduces you")

    @contextlib.contextmanager
    def _extent(self, read: wire.Read) -> Iterator[Extent]:
        """Bytes of our own, pinned for so long."""
        file = self.on_loop(lambda: self._pin(read))
        try:
            native = file.native
            info = native.slot(read.slot)
            if read.offset % file.block_bytes or read.offset > info.file_bytes:
                raise SnapshotGone(f"byte {read.offset} of {read.snapshot} is no beginning of a block in its file")
            length = min(read.length, info.file_bytes - read.offset)
            first = read.offset // file.block_bytes
            count = None if not read.length and not read.offset else -(-length // file.block_bytes)
            crcs = native.crc_words(read.slot, first, count)
            with native.slot_view(read.slot) as whole, whole[read.offset : read.offset + length] as view:
                yield Extent(view, info.file_bytes, file.block_bytes, crcs)
        finally:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.keeper.unpin, file, read.slot)

    def _tools_for(self, ask: wire.Combine, who: bytes) -> Tools:
        """On a stream's thread: with what a peer's sum is made. Buffers are its own, and go with it."""
        self._check_reader(ask.job, ask.snapshot, who)
        if not self.on_loop(lambda: self._holds(ask.job, ask.snapshot)):
            raise SnapshotGone(f"nothing of {ask.snapshot} is here any more, so this node adds up none of it")
        own = Own(self.keeper.reached_at[1], self._extent)
        return Tools(self.tools.pool, self.tools.pace, self.tools.threads, own=own)

    def _holds(self, job: str, snapshot: wire.SnapshotId) -> bool:
        files = [file for file in self.keeper.files.values() if file.job == job]
        return any(one.snapshot == snapshot and one.progress >= Progress.FULL for file in files for one in views(file))

    def _pin(self, read: wire.Read) -> ArenaFile:
        file = self.keeper.files.get(read.arena)
        if file is None or file.job != read.job:
            raise SnapshotGone(f"the arena with {read.snapshot} is not here any more")
        return self.keeper.pin(wire.OpenShard(read.arena, read.slot, read.snapshot))

    def on_loop(self, do: Callable[[], _T]) -> _T:
        """Call something on the loop's thread and wait for it. DaemonUnavailable if the daemon is ending."""
        answer: Future[_T] = Future()

        def run() -> None:
            try:
                answer.set_result(do())
            except BaseException as error:
                answer.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(run)
            return answer.result(PIN_MAX_S)
        except (RuntimeError, WaitedLongEnough) as error:
            raise DaemonUnavailable(f"this daemon is ending or too busy to serve ({error})") from None

    def _dropped_elsewhere(self, reason: str, sentence: str) -> None:
        """What a stream's thread dropped, counted on the loop."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._dropped, reason, sentence)


def _first_that_binds(ports: list[int], bind: Callable[[int], _T]) -> _T:
    for port in ports[:-1]:
        with contextlib.suppress(ConfigError):
            return bind(port)
    return bind(ports[-1])


def first_serial(clock: Clock, last: LastDaemon) -> int:
    """A number above all that an earlier daemon of this node has used, also where the clock was set back meanwhile."""
    return max(int(clock.wall_s() * 1000) << 20, last.serial + SERIALS)
