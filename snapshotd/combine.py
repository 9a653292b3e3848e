"""Bytes of several nodes added up over GF(2^8): the one loop behind making parity and decoding what was lost.

The symbols of a stripe come as streams side by side, in parts that are checksummed and added up while they are in the
core's cache, so the sum is written once; a block that fails its CRC32C at its end spoils the window, which nobody has
used by then. Memory is one part of each, and the kernel's socket buffers hold what the peers send ahead. Runs
on a thread of its own; the GIL is free while bytes move.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from snapshotd import _native
from snapshotd.accelerator import Accelerator, Bench
from snapshotd.errors import SnapshotError
from snapshotd.faults import crash_point
from snapshotd.nice import be_nice
from snapshotd.reader import OwnReader, Pace, Reader
from snapshotd.streams import Extent, Pool, Share, gather
from snapshotd.wire import Holding, Read, SnapshotId

WINDOW_BYTES = 4 << 20  # fewer turns between streams; a row of them lies in an L3 cache
STAGING_BYTES = 1 << 20  # what arrived of all symbols together: an L2 cache; smaller parts cost more calls
PART_BYTES_MIN = 16 << 10  # of one of many symbols
_ZEROS = bytes(1 << 20)


def decoders(count: int) -> Executor:
    """Threads of low priority for the parts of one shard."""
    return ThreadPoolExecutor(count, "snapshotd-decoder", be_nice)


class Cancelled(Exception):
    """Nobody wants the result any more."""


class BadBytes(SnapshotError):
    """A block of a source fails its checksum. `symbol` is its place in the list, `at` the window where it happened."""

    def __init__(self, symbol: int, at: int, span: Span) -> None:
        where = f"slot {span.holding.slot} of {span.holding.label}" if span.holding else "zeros"
        super().__init__(f"a block in {where} fails its checksum")
        self.symbol, self.at, self.span = symbol, at, span


@dataclass(frozen=True)
class Span:
    """`length` bytes from `offset` of a slot; zeros where there is no holding."""

    holding: Holding | None
    offset: int
    length: int


@dataclass(frozen=True)
class Symbol:
    """One symbol of a stripe: its coefficient and where its bytes are, in order."""

    coefficient: int
    spans: Sequence[Span]


@dataclass(frozen=True)
class Own:
    """This node's own memory: the address at which others read it, and what serves it here."""

    streams: str
    serve: Callable[[Read], AbstractContextManager[Extent]]


def nobody(holdings: Iterable[Holding], pieces: int) -> list[str]:
    """No peer makes sums for us."""
    return []


@dataclass
class Tools:
    """What the workers of a daemon share: connections to peers, the limit of bandwidth, where they find threads.

    `helpers` says which peers are to decode what is to be decoded from so many pieces that lie there; `own` is what
    need not travel.
    """

    pool: Pool
    pace: Pace
    threads: Callable[[int], Executor] = decoders
    accelerator: Accelerator | None = None
    helpers: Callable[[Iterable[Holding], int], list[str]] = nobody
    own: Own | None = None
    _own: threading.local = field(default_factory=threading.local)

    def window(self, name: str, length: int) -> memoryview:
        """A buffer of this thread, of at least `length` bytes. Made once a thread."""
        held = getattr(self._own, name, None)
        if held is None or len(held) < length:
            held = memoryview(bytearray(length))
            setattr(self._own, name, held)
        return held

    def bench(self, k: int, m: int, unit_bytes: int, layout: str) -> Bench | None:
        """A device's pipeline for sums of this code; None where the processor adds them up."""
        if self.accelerator is None:
            return None
        return self.accelerator.bench(k, m, unit_bytes, window_for(unit_bytes), layout)


def window_for(unit_bytes: int) -> int:
    """Length of a window: whole units, so that no block lies in two."""
    return max(WINDOW_BYTES, unit_bytes)


def combine(
    destination: memoryview | None,
    symbols: Sequence[Symbol],
    length: int,
    *,
    job: str,
    snapshot: SnapshotId,
    unit_bytes: int,
    layout: str,
    tools: Tools,
    cancelled: Callable[[], bool],
    advanced: Callable[[int, memoryview], object] = lambda at, made: None,
    point: str = "accumulate.window",
    bench: Bench | None = None,
    window_bytes: int = 0,
) -> None:
    """destination = the sum of coefficient · symbol, over `length` bytes, whole units of which the last may reach
    beyond the destination. `advanced` is told of each window, from where it is in the destination, while the bytes that
    were made are still in the cache; without a destination it alone gets them. `layout` is that of the code. With a
    `bench` a device adds up. Windows have whole units, `window_bytes` of them or what is usual.

    BadBytes for a block that fails its checksum (its window may be half added up: begin again there), Cancelled, and
    DaemonUnavailable, ProtocolError or Refused where a source cannot be read.
    """
    window = window_bytes or window_for(unit_bytes)
    staging = tools.window("staging", max(STAGING_BYTES, len(symbols) * PART_BYTES_MIN))
    # A device multiplies what it gets: it is given the bytes as they are.
    feeds = [
        _Feed(symbol if bench is None else Symbol(1, symbol.spans), job, snapshot, window, unit_bytes, tools)
        for symbol in symbols
    ]
    try:
        for at in range(0, length, window):
            if cancelled():
                raise Cancelled
            width = min(window, length - at)
            target = memoryview(b"") if destination is None else destination[at : at + width]
            if len(target) < width:
                target = tools.window("scratch", window)[:width]
            _native.prefault(target)
            if bench is not None and symbols:
                bad = _receive(bench.rooms, feeds, width, staging, layout)
                if bad is None:
                    bench.add_up(target, [symbol.coefficient for symbol in symbols], layout)
            else:
                bad = _add_up(target, feeds, staging, layout)
            if bad is not None:
                raise BadBytes(bad, at, feeds[bad].span)
            made = target if destination is None else destination[at : at + width]
            if len(made) < width:
                made[:] = target[: len(made)]
            crash_point(point)
            advanced(at, made)
    finally:
        for feed in feeds:
            feed.close()


def _add_up(target: memoryview, feeds: Sequence[_Feed], staging: memoryview, layout: str) -> int | None:
    """`target` = the sum of every feed's next bytes; else the feed of which a block fails its checksum."""
    done = 0
    while done < len(target):
        for feed in feeds:
            feed.begin()
        count = len(target) - done
        for feed in feeds:
            count = feed.reach(count)
        shares = {index: share for index, feed in enumerate(feeds) if (share := feed.share(count)) is not None}
        with target[done : done + count] as part:
            bad = gather(part, list(shares.values()), staging, layout)
        if bad is not None:
            return next(index for index, share in shares.items() if share is bad)
        for feed in feeds:
            feed.advance(count)
        done += count
    return None


def _receive(
    rooms: Sequence[memoryview], feeds: Sequence[_Feed], width: int, staging: memoryview, layout: str
) -> int | None:
    """A window of every feed, as it is, in the room from which a device takes it; else the feed with a bad block."""
    for feed in feeds:
        feed.begin()
    for index, feed in enumerate(feeds):
        if _add_up(rooms[index][:width], [feed], staging, layout) is not None:
            return index
    return None


def clear(view: memoryview) -> None:
    """Zeros, without a buffer of that size."""
    for start in range(0, len(view), len(_ZEROS)):
        count = min(len(_ZEROS), len(view) - start)
        view[start : start + count] = _ZEROS[:count]


class _Feed:
    """One symbol's spans, read one after the other; the next one's connection is opened when it is its turn.

    A file ends within a unit, whose rest is zeros: the whole unit takes part, since the code mixes bits of all its
    superblock's bytes, and what follows begins with the next unit.
    """

    def __init__(
        self, symbol: Symbol, job: str, snapshot: SnapshotId, window: int, unit_bytes: int, tools: Tools
    ) -> None:
        self._spans, self._coefficient = [span for span in symbol.spans if span.length], symbol.coefficient
        self._job, self._snapshot, self._window, self._unit, self._tools = job, snapshot, window, unit_bytes, tools
        self._current, self._used = 0, 0
        self._reader: Reader | OwnReader | None = None

    @property
    def span(self) -> Span:
        """Where the next bytes are."""
        return self._spans[self._current]

    def begin(self) -> None:
        """Have the next bytes sent."""
        span = self.span
        if self._reader is None and span.holding is not None:
            self._reader = self._opened(span.holding, span)
            self._reader.begin()

    def _opened(self, holding: Holding, span: Span) -> Reader | OwnReader:
        tools, begin, end = self._tools, span.offset, span.offset + span.length
        if tools.own is not None and holding.streams == tools.own.streams:
            read = Read(self._job, holding.arena, holding.slot, self._snapshot, begin, span.length)
            return OwnReader(tools.own.serve, read)
        return Reader(
            tools.pool, holding.streams, self._job, holding.arena, holding.slot, self._snapshot, begin, end,
            self._window, tools.pace,
        )  # fmt: skip

    def reach(self, limit: int) -> int:
        """How many bytes, `limit` at most and else whole units, come from one place; what a file lacks of its last unit
        is counted."""
        left = self.span.length - self._used if self._reader is None else self._reader.reach()
        return min(limit, -(-left // self._unit) * self._unit)

    def share(self, count: int) -> Share | None:
        """The next `count` bytes, within `reach`; None where they are zeros."""
        if self._reader is None:
            return None
        return self._reader.share(min(count, self.span.length - self._used), self._coefficient)

    def advance(self, count: int) -> None:
        """So many bytes are added up."""
        while count:
            part = min(count, self.span.length - self._used)
            if self._reader is not None:
                self._reader.took(part)
            count, self._used = count - part, self._used + part
            if self._used == self.span.length:
                self.close()
                self._current, self._used = self._current + 1, 0

    def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
