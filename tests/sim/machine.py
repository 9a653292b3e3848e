"""A simulated host: its memory, its network card, and the product's daemon on it.

`Daemon` is the product's, with its keeper, sessions, peers and workshop; what it does not do here is to open sockets,
files and threads. Those are handed in: `Root` instead of a directory, `Mesh` and `Server` instead of sockets.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from snapshotd import _native, wire
from snapshotd.arena import PLACES, SLOTS, ArenaFile, read_owner
from snapshotd.budget import Room
from snapshotd.conduit import Conduit
from snapshotd.config import DaemonConfig
from snapshotd.daemon import HOUSEKEEPING_S, Daemon
from snapshotd.door import Connection, Door, Peer
from snapshotd.errors import DaemonUnavailable, NoRoom, ProtocolError
from snapshotd.faults import crash_point
from snapshotd.keeper import Keeper
from snapshotd.mesh import OneWay
from snapshotd.peers import Means, Peers
from snapshotd.readserver import Extent, answer
from snapshotd.root import Damaged, Draft, LastDaemon, Root
from snapshotd.session import ClientSession
from snapshotd.streams import Stream, refused_by_peer
from tests.sim.loop import Died, Life, Loop
from tests.sim.memory import Arena, Memory, Owner, SlotInfo

if TYPE_CHECKING:
    from tests.sim.world import World

_T = TypeVar("_T")
ROOM_BYTES = 1 << 40
REPROTECT_AFTER_S = 0.5  # in histories of a job that waits


class Host:
    """A machine. What lies in `memory` outlives every process on it, and goes with the machine."""

    def __init__(self, world: World, label: str, domain: str = "") -> None:
        self.world, self.label, self.domain = world, label, domain
        self.node = world.chance.randbytes(16)
        self.address, self.streams = f"{label}:1", f"{label}:2"
        self.memory: dict[bytes, Memory] = {}
        self.remembered: dict[str, bytes] = {}
        self.last = LastDaemon()
        self.daemon: SimDaemon | None = None
        self.lost = self.full = False
        self.slow = 1.0
        self.armed = 0  # so many crash points from now the daemon dies

    @property
    def up(self) -> bool:
        """A daemon runs here."""
        return self.daemon is not None and not self.daemon.life.dead

    def start(self) -> None:
        """A daemon starts, and adopts what it finds."""
        assert not self.up and not self.lost
        life = Life(self.label)
        life.slow = self.slow
        loop = Loop(self.world.queue, life, lambda: self.world.delay_s() * life.slow, self.world.failed)
        self.daemon = daemon = SimDaemon(self, life, loop)
        loop.call_later(self.world.delay_s(), daemon.begin)

    def kill(self) -> None:
        """The daemon is killed, if there is one."""
        if self.daemon is not None and not self.daemon.life.dead:
            self.daemon.end()
            self.world.note(self.label, "its daemon dies")
            self.armed = 0
            self.world.daemon_died(self)

    def living(self) -> SimDaemon:
        """The daemon. DaemonUnavailable where none runs."""
        if self.daemon is None or self.daemon.life.dead or not self.daemon.open:
            raise DaemonUnavailable(f"no daemon answers on {self.label}")
        return self.daemon


class SimFile(ArenaFile):
    """An arena that a simulated daemon has mapped."""

    host: Host
    life: Life
    memory: Memory

    def held_by(self) -> int | None:
        return self.memory.holder or None

    def watch(self, released: Callable[[], None]) -> None:
        """As a thread that waits for the lock: gone with its process."""
        life = self.life
        self.memory.watchers.append(lambda: None if life.dead else released())

    def silence_bell(self) -> None:
        pass

    def broken_blocks(self, slot: int, threads: int) -> list[int]:
        return self.memory.broken_blocks(slot)

    def open_read_only(self) -> int:
        return -1

    def free(self) -> None:
        """Whoever maps it keeps it, and no daemon finds it again."""
        crash_point("free.before")
        if not self.life.dead and self.host.memory.pop(self.arena_id, None) is not None:
            self.memory.gone = True
            self.host.world.arena_gone(self.host, self.memory)
        crash_point("free.after")
        self.close()

    def close(self) -> None:
        self.gone = True


class SimDraft(Draft):
    """An arena under construction."""

    def reserve(self, numa_node: int) -> None:
        pass

    def outstanding_bytes(self) -> int:
        return 0


class SimRoot(Root):
    """The daemon's directory, in the host's memory."""

    def __init__(self, host: Host, life: Life) -> None:
        super().__init__(Path("/simulated"), -1, -1, host.node)
        self._host, self._life = host, life

    def close(self) -> None:
        pass

    def last_daemon(self) -> LastDaemon:
        return self._host.last

    def write_down(self, me: LastDaemon) -> None:
        self._host.last = me

    def recall(self, name: str) -> bytes:
        return self._host.remembered.get(name, b"")

    def remember(self, name: str, data: bytes) -> None:
        """What a daemon does for jobs that wait; else it is as where the tmpfs has no room for it."""
        if self._host.world.waits and not self._life.dead:
            self._host.remembered[name] = data

    def draft(self, job: str, local_index: int, total_bytes: int) -> Draft:
        if self._host.full:
            raise NoRoom("the simulated memory is full", setting="the simulated memory")
        return SimDraft("arena", -1, -1, self._host.world.chance.randbytes(16), total_bytes)

    def discard(self, draft: Draft) -> None:
        pass

    def finish(
        self,
        draft: Draft,
        *,
        job: str,
        local_index: int,
        slot_bytes: int,
        block_bytes: int,
        owner: dict[str, Any],
        slots: int = SLOTS,
    ) -> ArenaFile:
        world = self._host.world
        memory = Memory(
            draft.arena_id, job, local_index, slot_bytes, block_bytes, world.slot_changed, world.word_said,
            [SlotInfo(index) for index in range(slots)], owner=Owner(**owner),
        )  # fmt: skip
        if not self._life.dead:
            self._host.memory[draft.arena_id] = memory
            world.arena_made(self._host, memory)
        return self._file(memory)

    def scan(self) -> tuple[list[ArenaFile], list[Damaged]]:
        return [self._file(memory) for _, memory in sorted(self._host.memory.items())], []

    def _file(self, memory: Memory) -> ArenaFile:
        self._ordinal += 1
        world = self._host.world
        between = None if memory.local_index in PLACES else world.between_two_reads
        native = cast(_native.Arena, Arena(memory, self._life, between))
        file = SimFile(
            memory.arena_id.hex(), -1, -1, -1, native, read_owner(native), self._ordinal, bell_fd=world.next_number()
        )
        file.host, file.life, file.memory = self._host, self._life, memory
        return file


# --- messages and bytes ---------------------------------------------------------------------------


class SimMesh:
    """Messages between daemons, packed and unpacked as on the wire."""

    def __init__(
        self,
        host: Host,
        life: Life,
        answer: Any,
        heard: Callable[[OneWay, bytes], object],
        dropped: Callable[[str, str], None],
    ) -> None:
        self.host, self.life = host, life
        self._answer, self._heard, self._dropped = answer, heard, dropped
        self._numbers: dict[int, Any] = {}
        self.address = host.address

    def send(self, address: str, message: OneWay) -> bool:
        if self.life.dead:
            return False
        if isinstance(message, wire.Publish):
            self.host.world.checker.published(message)
        self.host.world.post.send(self.host, address, wire.pack(message))
        return True

    async def ask(self, address: str, request: wire.Request, timeout_s: float) -> wire.Reply:
        """One try: a question and an answer that may each get lost."""
        loop = self.host.world.loop_of(self.host)
        future = loop.create_future()
        number = self.host.world.next_number()
        self._numbers[number] = future
        self.host.world.post.send(self.host, address, wire.pack(request), number)
        timer = loop.call_later(timeout_s, self._give_up, number)
        try:
            reply = wire.unpack_reply(await future)
        finally:
            timer.cancel()
        if isinstance(reply, wire.Refusal):
            raise refused_by_peer(reply)
        return reply

    def _give_up(self, number: int) -> None:
        future = self._numbers.pop(number, None)
        if future is not None and not future.done():
            future.set_exception(DaemonUnavailable("nobody answers"))

    def arrive(self, sender: Host, frame: bytes, number: int | None, reply: bool) -> None:
        """A frame is here."""
        if reply:
            future = self._numbers.pop(number or 0, None)
            if future is not None and not future.done():
                future.set_result(frame)
            return
        try:
            message = wire.unpack_request(frame)
        except ProtocolError as error:
            self._dropped("mesh-checksum", str(error))
            return
        if number is None:
            self._heard(cast(OneWay, message), b"")
            return
        made = self._answer(message, b"")
        if isinstance(made, wire.InventoryTaken):
            self.host.world.post.send(self.host, sender.address, wire.pack(made), number, reply=True)

    async def close(self) -> None:
        pass


class SimServer:
    """Serves READ; who asks is served at once."""

    def __init__(self, host: Host, serve: Callable[[wire.Read, bytes], AbstractContextManager[Extent]]) -> None:
        self.address, self.serve = host.streams, serve

    def close(self) -> None:
        pass


class SimConduit:
    """A connection to a server of READ, as `Conduit` is one. It has no socket, so bytes are taken out of it in turn."""

    def __init__(self, host: Host, address: str) -> None:
        self._host, self._address = host, address
        self._coming = bytearray()
        self._daemon = self._serving()

    def _serving(self) -> SimDaemon:
        return self._host.world.post.reach(self._host, self._address)

    def send(self, data: bytes | memoryview, more: bool = False) -> None:
        """A request: answered as the server does."""
        daemon = self._serving()
        if daemon is not self._daemon:
            raise ConnectionResetError
        read = wire.unpack_request(bytes(data))
        assert isinstance(read, wire.Read)
        with self._host.world.acting(daemon.host):
            try:
                answer(_Into(self._coming), read, b"", daemon.server.serve)
            except Died:
                if self._host.daemon is not None and self._host.daemon.life.dead:
                    raise
                raise ConnectionResetError from None

    def frame(self, patient: bool = False) -> bytes | None:
        if len(self._coming) < wire.HEADER_BYTES:
            return None
        length = wire.HEADER_BYTES + wire.body_length(bytes(self._coming[: wire.HEADER_BYTES]))
        return self._take(length)

    def _take(self, length: int) -> bytes:
        taken = bytes(self._coming[:length])
        del self._coming[:length]
        return taken

    def fill(self, view: memoryview, patient: bool = False, deadline_s: float | None = None) -> int:
        taken = self._take(len(view))
        view[: len(taken)] = taken
        return len(taken)

    def deadline_s(self, length: int) -> float:
        return 0.0

    def is_quiet(self) -> bool:
        with contextlib.suppress(DaemonUnavailable, OSError):
            return not self._coming and self._serving() is self._daemon
        return False

    def close(self) -> None:
        pass


class _Into:
    def __init__(self, coming: bytearray) -> None:
        self._coming = coming

    def send(self, data: bytes | memoryview, more: bool = False) -> None:
        self._coming += data

    def has_ended(self) -> bool:
        return False


class SimStream(Stream):
    """The product's stream over a simulated connection."""

    def __init__(self, host: Host, address: str) -> None:
        try:
            super().__init__(cast(Conduit, SimConduit(host, address)), address)
        except OSError:
            raise DaemonUnavailable(f"no daemon serves snapshots at {address}") from None

    @property
    def is_encrypted(self) -> bool:
        """There is no socket to lend."""
        return True


class Inline(Executor):
    """Threads that are done at once, one after the other."""

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class Later(Executor):
    """A thread that works at some time later."""

    def __init__(self, loop: Loop, delay_s: Callable[[], float]) -> None:
        self._loop, self._delay_s = loop, delay_s

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        future: Future[_T] = Future()

        def work() -> None:
            try:
                result = fn(*args, **kwargs)
            except Died:
                raise
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._loop.call_later(self._delay_s(), work)
        return future


# --- the daemon -----------------------------------------------------------------------------------


class SimPeers(Peers):
    """The product's, whose READs are served on the loop's own thread."""

    def on_loop(self, do: Callable[[], _T]) -> _T:
        return do()


class Conversation:
    """A connection of a trainer, as `Door` serves it: one request after the other, and then its end."""

    def __init__(self, daemon: SimDaemon, pid: int, number: int) -> None:
        self.over = False
        self._daemon = daemon
        self._session = ClientSession(daemon, Peer(pid, 0), number, cast(Connection, self))
        self._asked: deque[tuple[bytes, Callable[[bytes, int], object]]] = deque()
        self._busy = False

    def ask(self, frame: bytes, reply: Callable[[bytes, int], object]) -> None:
        """A request arrived; its reply goes there, with the bell that comes with it."""
        self._asked.append((frame, reply))
        if not self._busy:
            self._busy = True
            self._daemon.loop.create_task(self._serve())

    async def _serve(self) -> None:
        while self._asked:
            frame, reply = self._asked.popleft()
            found = await self._session.answer(wire.unpack_request(frame))
            reply(wire.pack(found.reply), found.lent[2] if found.lent else -1)
            if found.sent is not None:
                found.sent()
        self._busy = False
        if self.over:
            self._session.ended()

    def hang_up(self) -> None:
        """The process ended; what it had sent is still served."""
        over, self.over = self.over, True
        if not self._busy and not over:
            self._session.ended()


class SimDaemon(Daemon):
    """The product's daemon on a simulated host."""

    def __init__(self, host: Host, life: Life, loop: Loop) -> None:
        label, domain = host.label, host.domain
        config = DaemonConfig(
            node_id=label, listen=f"tcp://{label}:1", domain=domain, claim_wait_s=2.0, lease_s=10_000.0,
            shm_dir=Path("/simulated"), authenticate=False, rebuild_spread="no",
            reprotect_after_s=REPROTECT_AFTER_S * host.world.waits,
        )  # fmt: skip
        super().__init__(config, host.world.clock)
        self.host, self.life, self.loop, self.open = host, life, loop, False
        self.mesh: SimMesh
        self.server: SimServer

    def begin(self) -> None:
        """What `run` does before it serves."""
        self.keeper = Keeper(
            SimRoot(self.host, self.life), self.config, self.metrics, self.clock, self.loop, self.on_change
        )
        self.keeper.adopt()
        self._door = cast(Door, _NoDoor())
        self._meet_peers()
        self.loop.call_later(HOUSEKEEPING_S, self._keep_house)
        self.open = True
        self.host.world.note(self.host.label, "its daemon serves")

    def _new_peers(self, kind: type[Peers]) -> Peers:
        means = Means(self._mesh, self._server, self._connect, lambda _: Inline(), self._workers)  # type: ignore[arg-type]
        answer = self._answer_network
        return SimPeers(self.config, self.keeper, self.metrics, self.clock, answer, self.dropped, means)

    def _mesh(self, address: str, answer: Any, heard: Any, dropped: Any, keys: None, known: None) -> SimMesh:
        self.mesh = SimMesh(self.host, self.life, answer, heard, dropped)
        return self.mesh

    def _server(self, host: str, port: int, serve: Any, dropped: Any, assist: Any, secure: None) -> SimServer:
        self.server = SimServer(self.host, serve)
        return self.server

    def _connect(self, address: str, interface_address: str = "") -> SimStream:
        return SimStream(self.host, address)

    def _workers(self) -> Later:
        return Later(self.loop, self.host.world.delay_s)

    def rooms(self) -> list[Room]:
        return [Room("the simulated memory", 0 if self.host.full else ROOM_BYTES, "the simulated memory")]

    def failed(self, what: str, error: BaseException | None) -> None:
        super().failed(what, error)
        self.host.world.failed(what, error)

    def end(self) -> None:
        """It is dead: what its objects still do when they are collected is nothing."""
        self.life.dead = True
        if self._workshop is not None:
            self._workshop._ended = True


class _NoDoor:
    connections = 1
