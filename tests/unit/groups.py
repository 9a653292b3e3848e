"""A group of nodes in one process, and what its bytes have to be.

Shards and parity sets lie in real arenas in anonymous memory, and every node serves its own over loopback. What a
daemon's loop does about `protect` and `rebuild` (claim a slot, publish it) is repeated here in a line each. Every slot
is full of rubbish before it is claimed, so that zeros are there only where somebody wrote them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from snapshotd import _native, geometry, parityset, protect, rebuild, spread, wire
from snapshotd.assist import Assistant
from snapshotd.clock import SystemClock
from snapshotd.combine import Own, Tools
from snapshotd.errors import SnapshotGone
from snapshotd.manifest import round_up
from snapshotd.reader import Pace
from snapshotd.readserver import Extent, ReadServer
from snapshotd.streams import Pool
from snapshotd.wire import GenerationId, Holding, ShardShape, SnapshotId
from tests.unit import codec_twin
from tests.unit.group_faults import BreaksOff, Stalls
from tests.unit.native_support import BLOCK

JOB = "job"
SNAPSHOT = SnapshotId(GenerationId(3, bytes(range(16))), 840)
PATIENCE_S = 120.0
_RUBBISH = bytes([0xA5])
_ids = itertools.count(1)


class Stored:
    """An arena with one file in its first slot, and where others read that."""

    def __init__(self, slot_bytes: int, block_bytes: int, address: str = "", label: str = "") -> None:
        arena_id = next(_ids).to_bytes(16, "big")
        self.fd = os.memfd_create("snapshotd-test-group")
        _native.reserve(self.fd, _native.Arena.bytes_needed(2, slot_bytes, block_bytes))
        _native.Arena.format(
            self.fd, arena_id=arena_id, job=JOB, local_index=0, slots=2, slot_bytes=slot_bytes, block_bytes=block_bytes
        )
        self.native = _native.Arena(self.fd, writable=True)
        self.holding = Holding(address, label, arena_id, 0)
        with self.native.slot_view(0) as view:
            view[:] = _RUBBISH * slot_bytes

    def claim(self, rank: int, fingerprint: bytes = bytes(32)) -> int:
        """Begin to fill the slot."""
        made_by = SNAPSHOT.generation
        return self.native.claim(
            generation=made_by.number, nonce=made_by.nonce, step=SNAPSHOT.step, rank=rank, world_size=999,
            fingerprint=fingerprint,
        )  # fmt: skip

    def store(self, rank: int, data: bytes) -> None:
        """Fill the slot with a file."""
        self.claim(rank)
        with self.native.slot_view(0) as view:
            view[: len(data)] = data
        self.native.set_block_crcs(0, len(data))
        self.native.publish(0, len(data))

    @property
    def slot(self) -> bytes:
        """All bytes of the slot."""
        with self.native.slot_view(0) as view:
            return bytes(view)

    @property
    def state(self) -> int:
        """The slot's."""
        return self.native.slot(0).state

    @property
    def file_bytes(self) -> int:
        """Length of what was published."""
        return self.native.slot(0).file_bytes

    def flip(self, place: int, bit: int = 0) -> None:
        """Turn a bit of the file over."""
        self._flip(self.native.slot_offset(0) + place, bit)

    def flip_table(self, block: int, bit: int = 0) -> None:
        """Turn a bit of a block's checksum over, where it stands in the arena's header."""
        header = os.pread(self.fd, self.native.slot_offset(0), 0)
        self._flip(header.index(self.native.crc_words(0)) + 4 * block, bit)

    def _flip(self, offset: int, bit: int) -> None:
        (byte,) = os.pread(self.fd, 1, offset)
        os.pwrite(self.fd, bytes([byte ^ 1 << bit]), offset)

    def is_free(self) -> bool:
        """Nobody holds a view of the slot."""
        try:
            self.native.close()
        except BufferError:
            return False
        self.native = _native.Arena(self.fd, writable=True)
        return True

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # an exception that a test still looks at: the mapping goes with it
            self.native.close()
        os.close(self.fd)


class _Short(bytes):
    """Bytes that claim to be more than they are."""

    claimed = 0

    def __len__(self) -> int:
        return self.claimed


class Host:
    """A node's memory, and its server of READ and of sums. `before` is called with each read, `before_sum` with each
    sum and `sent` with the length of each window of one; all of them may raise. `own` is what a sum takes from here."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.arenas: dict[bytes, Stored] = {}
        self.before: Callable[[wire.Read], object] = lambda _: None
        self.before_sum: Callable[[wire.Combine], object] = lambda _: None
        self.sent: Callable[[int], object] = lambda _: None
        self.own: Callable[[wire.Read], AbstractContextManager[Extent]] = self.extent
        self.served_bytes = self.assisted_bytes = 0
        self.dropped: list[tuple[str, str]] = []
        self._lock, self._closing = threading.Lock(), threading.Event()
        self.pool = Pool()
        assistant = Assistant(self._tools_for, self._closing.is_set, self._sent)
        self.server = ReadServer(
            "127.0.0.1", 0, self._serve, lambda *why: self.dropped.append(why), assist=assistant.answer
        )
        self.address = self.server.address

    def room(self, slot_bytes: int, block_bytes: int) -> Stored:
        """A new arena of this node."""
        stored = Stored(slot_bytes, block_bytes, self.address, self.label)
        self.arenas[stored.holding.arena] = stored
        return stored

    @contextlib.contextmanager
    def _serve(self, read: wire.Read, who: bytes) -> Iterator[Extent]:
        """As a daemon does. It does not look whether bytes are what they were: that is for whoever reads."""
        try:
            self.before(read)
        except (BreaksOff, Stalls) as trouble:
            if read.length:
                with self.extent(read) as found:
                    half = _Short(found.view[: len(found.view) // 2])
                    half.claimed = len(found.view)
                    yield Extent(half, found.file_bytes, found.block_bytes, found.crcs)  # type: ignore[arg-type]
            if isinstance(trouble, Stalls):
                self._closing.wait(PATIENCE_S)
            raise ConnectionAbortedError from None
        with self.extent(read) as found:
            with self._lock:
                self.served_bytes += len(found.view)
            yield found

    def _tools_for(self, ask: wire.Combine, who: bytes) -> Tools:
        self.before_sum(ask)
        return Tools(self.pool, Pace(0, SystemClock(), lambda _: None), own=Own(self.address, self.own))

    def _sent(self, count: int) -> None:
        with self._lock:
            self.assisted_bytes += count
        self.sent(count)

    @contextlib.contextmanager
    def extent(self, read: wire.Read) -> Iterator[Extent]:
        """The bytes that are asked for, as they are."""
        native = self.arenas[read.arena].native
        info = native.slot(read.slot)
        made = SnapshotId(GenerationId(info.generation, info.nonce), info.step)
        if made != read.snapshot or info.state not in (_native.FULL, _native.PROTECTED, _native.COMMITTED):
            raise SnapshotGone(f"slot {read.slot} holds {read.snapshot} no more")
        length = min(read.length, info.file_bytes - read.offset)
        first = read.offset // native.block_bytes
        count = None if not read.length and not read.offset else -(-length // native.block_bytes)
        crcs = native.crc_words(read.slot, first, count)
        with native.slot_view(read.slot) as whole, whole[read.offset : read.offset + length] as view:
            yield Extent(view, info.file_bytes, native.block_bytes, crcs)

    def close(self) -> None:
        self._closing.set()
        self.server.close()
        self.pool.close()
        for stored in self.arenas.values():
            stored.close()


@dataclass(frozen=True)
class Decoded:
    """What became of a rebuild: the whole slot, its table of checksums, the sources that were found to be bad."""

    slot: bytes
    table: bytes
    doubtful: list[Holding]


class Group:
    """Nodes at positions 0 … n-1 with shards of these sizes on each. Ranks lie on them in no order.

    `blocks` are dealt to the shards in turn. Parity is made by `protect`, or at once by `protected`.
    """

    def __init__(
        self, sizes: Sequence[Sequence[int]], parity: int, *, blocks: Sequence[int] = (BLOCK,), seed: int = 0
    ) -> None:
        chance = random.Random(seed)
        ranks = list(range(sum(map(len, sizes))))
        chance.shuffle(ranks)
        self.hosts = [Host(f"node{position}") for position in range(len(sizes))]
        self.contents = dict.fromkeys(sorted(ranks), b"")
        self.shards: dict[int, Stored] = {}
        self.parities: dict[int, Stored] = {}
        self.newcomer = Stored(BLOCK, BLOCK)
        self.spread = "no"  # whether a newcomer has others decode
        self.tools = Tools(Pool(), Pace(0, SystemClock(), lambda _: None), helpers=self._helpers)
        shapes: list[list[ShardShape]] = []
        block = itertools.cycle(blocks)
        for host, own in zip(self.hosts, sizes, strict=True):
            shapes.append([ShardShape(ranks.pop(), size, next(block), chance.randbytes(32)) for size in own])
            for shape in shapes[-1]:
                self.contents[shape.rank] = chance.randbytes(shape.file_bytes)
                room = host.room(round_up(shape.file_bytes, shape.block_bytes), shape.block_bytes)
                room.store(shape.rank, self.contents[shape.rank])
                self.shards[shape.rank] = room
        self.layout = geometry.lay_out(shapes, parity)
        self.stripes = geometry.stripes(self.layout)

    def _helpers(self, holdings: Iterable[Holding], pieces: int) -> list[str]:
        return spread.helpers(self.spread, "newcomer:1", holdings, pieces)

    # --- protecting -------------------------------------------------------------------------------

    def task(self, position: int) -> protect.Task:
        """What the node at this position is to make."""
        holdings = {rank: stored.holding for rank, stored in self.shards.items()}
        return protect.Task(JOB, SNAPSHOT, self.layout, position, holdings)

    def protect(self, *positions: int, cancelled: Callable[[], bool] = lambda: False) -> None:
        """These positions' parity (or all), published; what `make` raises leaves the slot as it was claimed."""
        for position in positions or range(len(self.hosts)):
            if position not in self.parities:
                length = parityset.file_bytes(self.layout)
                self.parities[position] = self.hosts[position].room(length, self.layout.unit_bytes)
                self.parities[position].claim(position, geometry.digest(self.layout))
            native = self.parities[position].native
            with native.slot_view(0) as view:
                length = protect.make(self.task(position), view, self.tools, cancelled)
            native.set_block_crcs(0, length)
            native.publish(0, length)

    # --- rebuilding -------------------------------------------------------------------------------

    def job(self, rank: int, shards: Collection[int], parities: Collection[int]) -> rebuild.Job:
        """A shard to be decoded from these ranks' shards and these positions' parity."""
        return rebuild.Job(
            JOB, SNAPSHOT, rank, self.layout,
            {one: self.shards[one].holding for one in shards},
            {position: self.parities[position].holding for position in parities},
        )  # fmt: skip

    def without(self, rank: int, *lost: int) -> rebuild.Job:
        """A shard to be decoded once the nodes at these positions are lost with all they hold."""
        left = [position for position in range(len(self.hosts)) if position not in lost]
        return self.job(rank, [one for position in left for one in self.ranks_at(position)], left)

    def decode(self, job: rebuild.Job, cancelled: Callable[[], bool] = lambda: False) -> Decoded:
        """Decode into a new arena of a newcomer and publish; a failure leaves `newcomer` as it was claimed."""
        size, block = job.shape.file_bytes, job.shape.block_bytes
        self.newcomer.close()
        self.newcomer = Stored(round_up(size, block) + 2 * block, block)
        self.newcomer.claim(job.rank, job.shape.fingerprint)
        native = self.newcomer.native
        doubtful = rebuild.decode(job, native, 0, self.tools, cancelled)
        assert self.newcomer.state == _native.FILLING, "publishing is the caller's"
        native.publish(0, size)
        return Decoded(self.newcomer.slot, native.crc_words(0), doubtful)

    def comes_back(self, job: rebuild.Job, cancelled: Callable[[], bool] = lambda: False) -> list[Holding]:
        """The shard is decoded, byte for byte and with its table; returns the sources that are doubtful."""
        found, expected = self.decode(job, cancelled), self.contents[job.rank]
        assert found.slot[: len(expected)] == expected, f"rank {job.rank} has other bytes"
        assert not any(found.slot[len(expected) :]), "behind the end of the file are zeros"
        assert found.table == table_twin(expected, job.shape.block_bytes)
        return found.doubtful

    # --- looking ----------------------------------------------------------------------------------

    def ranks_at(self, position: int) -> list[int]:
        """The ranks at a position."""
        return [shape.rank for shape in self.layout.positions[position]]

    def served_bytes(self) -> int:
        """What all nodes sent so far."""
        return sum(host.served_bytes for host in self.hosts)

    def assisted_bytes(self) -> int:
        """What all nodes sent of sums so far."""
        return sum(host.assisted_bytes for host in self.hosts)

    def before_each_read(self, do: Callable[[wire.Read], object]) -> None:
        """Have something called for every read at every node; what it raises ends that read."""
        for host in self.hosts:
            host.before = do

    def close(self) -> None:
        self.tools.pool.close()
        self.newcomer.close()
        for host in self.hosts:
            host.close()


@contextlib.contextmanager
def group(
    sizes: Sequence[Sequence[int]], parity: int, *, blocks: Sequence[int] = (BLOCK,), seed: int = 0
) -> Iterator[Group]:
    """A group without parity as yet, given back in the end."""
    one = Group(sizes, parity, blocks=blocks, seed=seed)
    try:
        yield one
        assert [host.dropped for host in one.hosts] == [[] for _ in one.hosts], "every read follows the protocol"
    finally:
        one.close()


@contextlib.contextmanager
def protected(
    sizes: Sequence[Sequence[int]], parity: int, *, blocks: Sequence[int] = (BLOCK,), seed: int = 0
) -> Iterator[Group]:
    """A group whose parity is whole on every node."""
    with group(sizes, parity, blocks=blocks, seed=seed) as one:
        one.protect()
        yield one


# --- what is lost and damaged -----------------------------------------------------------------------------------------


def losses(count: int, parity: int) -> Iterator[tuple[int, ...]]:
    """Every choice of at most `parity` of so many nodes."""
    for number in range(1, parity + 1):
        yield from itertools.combinations(range(count), number)


def piece_of(one: Group, position: int, stripe: int) -> tuple[Stored, int]:
    """What a position gives to a stripe: the arena, and where it begins there."""
    piece = one.stripes.piece_of(stripe, position)
    if piece is not None:
        return one.shards[one.ranks_at(position)[0]], piece * one.layout.piece_bytes
    row = next(row for owned, row in one.stripes.owned(position) if owned == stripe)
    return one.parities[position], parityset.piece_offset(one.layout, row)


def others(one: Group, stripe: int, lost: int) -> list[int]:
    """The positions that are left, in the order of their symbols of a stripe: data before parity."""
    left = [position for position in range(len(one.hosts)) if position != lost]
    return sorted(left, key=lambda position: one.stripes.symbol_of(stripe, position))


# --- twins ------------------------------------------------------------------------------------------------------------


def table_twin(data: bytes, block_bytes: int) -> bytes:
    """The checksums of a file's blocks, the last of which may be short."""
    blocks = (data[at : at + block_bytes] for at in range(0, len(data), block_bytes))
    return b"".join(_native.crc32c(block).to_bytes(4, "little") for block in blocks)


def string_twin(one: Group, position: int) -> bytes:
    """A position's shards, each padded with zeros to whole units, and zeros up to its last piece's end."""
    layout, string = one.layout, b""
    for rank in one.ranks_at(position):
        string += one.contents[rank].ljust(round_up(len(one.contents[rank]), layout.unit_bytes), b"\0")
    return string.ljust(one.stripes.k * layout.piece_bytes, b"\0")


def parity_twin(one: Group, position: int) -> list[bytes]:
    """The pieces of parity that a position owns, by the definition of the code."""
    stripes, size = one.stripes, one.layout.piece_bytes
    strings = [string_twin(one, other) for other in range(stripes.n)]
    rows = codec_twin.coefficients(stripes.k, stripes.m)
    made = []
    for row in range(stripes.m):
        stripe = (position - row) % stripes.n
        data = []
        for symbol in range(stripes.k):
            holder = (stripe + stripes.m + symbol) % stripes.n
            piece = (stripe - holder - 1) % stripes.n
            data.append(strings[holder][piece * size : (piece + 1) * size])
        made.append(codec_twin.combined_in(codec_twin.layout_of(stripes.k, stripes.m), rows[row], data))
    return made
