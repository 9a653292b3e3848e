"""A lost shard, decoded from what the rest of its group holds: the mirror of `protect`.

`decode` works on a thread. For every column of the shard it takes any k symbols that are there, data before parity; a
block that fails its checksum counts as lost, and its column is decoded from others. The decoded bytes are believed only
if each block has the CRC32C that the trainer's copy gave it, which every parity set carries. The shard is cut in
segments that a few threads decode side by side: while one adds up, another receives.

Where the network is the limit (`spread`) peers decode the segments and forward them, a helper's threads one after the
other. Whatever a helper fails to bring, for whatever reason, is decoded here afterwards, as if there were no helpers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from snapshotd import _native, assist, combine, geometry, parityset, spread
from snapshotd.arena import bad_blocks
from snapshotd.codec import Codec
from snapshotd.combine import BadBytes, Cancelled, Span, Symbol, Tools
from snapshotd.errors import DaemonUnavailable, ProtocolError, Refused, SnapshotError, SourceDamaged
from snapshotd.faults import crash_point
from snapshotd.protect import data_spans, read_table
from snapshotd.reader import SumReader
from snapshotd.wire import GroupLayout, Holding, SnapshotId

DECODERS = 6
SEGMENT_BYTES = 64 << 20


class NotEnough(SnapshotError):
    """Too few sources have good bytes for some part of the shard: it is lost."""


class Lost(Protocol):
    """Bytes of the node at `position`, and where the rest of its group is: shards by rank, parity sets by position.
    `what` is for people; `suspects` are (stripe, symbol) of which some bytes failed."""

    @property
    def job(self) -> str: ...
    @property
    def snapshot(self) -> SnapshotId: ...
    @property
    def layout(self) -> GroupLayout: ...
    @property
    def position(self) -> int: ...
    @property
    def shards(self) -> Mapping[int, Holding]: ...
    @property
    def parities(self) -> Mapping[int, Holding]: ...
    @property
    def suspects(self) -> set[tuple[int, int]]: ...
    @property
    def what(self) -> str: ...


@dataclass
class Job:
    """What is to be decoded, and how far it is."""

    job: str
    snapshot: SnapshotId
    rank: int
    layout: GroupLayout
    shards: Mapping[int, Holding]
    parities: Mapping[int, Holding]
    total_bytes: int = 0
    done_bytes: int = 0
    suspects: set[tuple[int, int]] = field(default_factory=set)  # (stripe, symbol) of which some bytes failed
    wrong_blocks: int = 0

    def __post_init__(self) -> None:
        geometry.check(self.layout)
        self._lock = threading.Lock()
        self.position, self.index = next(
            (position, index)
            for position, shapes in enumerate(self.layout.positions)
            for index, shape in enumerate(shapes)
            if shape.rank == self.rank
        )
        self.shape = self.layout.positions[self.position][self.index]
        self.total_bytes = self.shape.file_bytes

    @property
    def what(self) -> str:
        """What is decoded, for people."""
        return f"rank {self.rank}'s shard"

    def advance(self, count: int, wrong: int) -> None:
        """So many more bytes are decoded, with so many blocks that are not what the trainer copied."""
        with self._lock:
            self.done_bytes = min(self.total_bytes, self.done_bytes + count)
            self.wrong_blocks += wrong


@dataclass(frozen=True)
class _Segment:
    """Columns [begin, end) of a piece; `place` is where column 0 is, in the slot."""

    stripe: int
    place: int
    begin: int
    end: int


@dataclass(frozen=True)
class _Work:
    """What the threads of one decode share."""

    job: Job
    view: memoryview
    table: bytes
    tools: Tools
    cancelled: Callable[[], bool]
    doubtful: list[Holding]


def decode(job: Job, arena: _native.Arena, slot: int, tools: Tools, cancelled: Callable[[], bool]) -> list[Holding]:
    """Fill a claimed slot with the shard and its CRC table; the caller publishes it. Returns sources with bad bytes.

    NotEnough where it cannot be decoded or does not verify; DaemonUnavailable, ProtocolError or Refused where a source
    cannot be read; Cancelled.
    """
    crash_point("rebuild.begun")
    doubtful: list[Holding] = []
    table = parityset.table_of(describe(job, tools, doubtful), job.rank)
    stop = threading.Event()
    view = arena.slot_view(slot)
    work = _Work(job, view, table, tools, lambda: stop.is_set() or cancelled(), doubtful)
    try:
        _decode_all(work, stop)
        combine.clear(view[job.shape.file_bytes :])
    finally:
        view.release()
    crash_point("rebuild.decoded")
    if job.wrong_blocks:
        raise NotEnough(
            f"{job.wrong_blocks} of {len(table) // 4} decoded blocks of rank {job.rank}'s shard differ from their "
            f"checksums"
        )
    arena.put_block_crcs(slot, job.shape.file_bytes, table)
    return doubtful


def _decode_all(work: _Work, stop: threading.Event) -> None:
    """Every segment: by helpers where there are some, and what they leave on a few threads here."""
    job = work.job
    holdings = [*job.shards.values(), *job.parities.values()]
    helpers = work.tools.helpers(holdings, geometry.stripes(job.layout).k)
    window = combine.window_for(job.layout.unit_bytes)
    length = max(SEGMENT_BYTES // window, 1) * window
    segments = _spread(work, stop, helpers) if helpers else list(_segments(job, length))
    if segments:
        _side_by_side(work, stop, DECODERS, [partial(_decode_segment, work, one) for one in segments])


def _side_by_side(work: _Work, stop: threading.Event, count: int, tasks: Sequence[Callable[[], None]]) -> None:
    """All of them, on so many threads; the first failure stops them all and is raised."""
    with work.tools.threads(count) as threads:
        futures = [threads.submit(task) for task in tasks]
        failure = _failure_of(futures, stop)
    try:
        if failure is not None:
            raise failure
    finally:
        del futures, failure  # their tracebacks hold views of the slot, and would hold this frame


def _spread(work: _Work, stop: threading.Event, helpers: Sequence[str]) -> list[_Segment]:
    """Have peers decode; returns what they did not bring."""
    count = spread.sums_each(len(helpers)) * len(helpers)
    length = spread.part_for(work.job.total_bytes, count, work.job.layout.unit_bytes)
    parts = spread.Parts(_segments(work.job, length))
    each = [partial(_have_decoded, work, parts, helpers[number % len(helpers)]) for number in range(count)]
    _side_by_side(work, stop, count, each)
    return parts.left()


def _have_decoded(work: _Work, parts: spread.Parts[_Segment], helper: str) -> None:
    """Parts of the shard, one after the other, decoded by a peer. It is asked for nothing more once it fails, unless
    the bytes that it was to add up are to blame."""
    while (part := parts.take()) is not None:
        brought, goes_on = _bring(work, part, helper)
        if part.begin + brought < part.end:
            parts.put_back(replace(part, begin=part.begin + brought))
        if not goes_on:
            return


def _bring(work: _Work, part: _Segment, helper: str) -> tuple[int, bool]:
    """How many bytes of a part came, and whether its helper is good for more."""
    job, unit, length = work.job, work.job.layout.unit_bytes, part.end - part.begin
    symbols, order = choose(job, part.stripe, part.begin, _whole(part.end, job.layout), set(), near=helper)
    first = next((index for index, one in enumerate(symbols) if _is_at(helper, one.spans)), 0)
    symbols, order = spread.turned(symbols, first), spread.turned(order, first)
    ask = assist.ask_for(
        symbols, length, job=job.job, snapshot=job.snapshot, code=code_of(job.layout).layout, unit_bytes=unit,
        window_bytes=spread.window_for(unit),
    )  # fmt: skip
    reader = SumReader(work.tools.pool, helper, ask, work.tools.pace)
    try:
        while reader.left_bytes:
            if work.cancelled():
                raise Cancelled
            at = length - reader.left_bytes
            place = part.place + part.begin + at
            with work.view[place : place + min(ask.window_bytes, reader.left_bytes)] as window:
                reader.next_into(window)
                if _wrong_blocks(work, place, window):
                    return at, False
                crash_point("rebuild.window")
                job.advance(len(window), 0)
    except SourceDamaged as error:
        if 0 <= error.term < len(order):  # its word is enough to look elsewhere, and for its owner to look there
            job.suspects.add((part.stripe, order[error.term]))
            work.doubtful.extend(span.holding for span in symbols[error.term].spans if span.holding is not None)
        return length - reader.left_bytes, True
    except (DaemonUnavailable, ProtocolError, Refused):
        return length - reader.left_bytes, False
    finally:
        reader.close()
    return length, True


def _failure_of(tasks: Sequence[Future[None]], stop: threading.Event) -> BaseException | None:
    """Wait for all of them. A failure stops the others, which say no more than that they were stopped; of several the
    first in the order of the shard's bytes is the one."""
    wait(tasks, return_when=FIRST_EXCEPTION)
    if any(task.done() and not task.cancelled() and task.exception() is not None for task in tasks):
        stop.set()
        for task in tasks:
            task.cancel()
    wait(tasks)
    failures = [failure for task in tasks if not task.cancelled() and (failure := task.exception()) is not None]
    try:
        return min(failures, key=lambda failure: isinstance(failure, Cancelled), default=None)
    finally:
        del failures  # their tracebacks hold views of the slot, and would hold this frame


def _segments(job: Job, length: int) -> Iterator[_Segment]:
    """The shard's bytes as parts of pieces, at most `length` long, which is whole windows; what lies behind the file's
    end is zero by definition."""
    layout = job.layout
    stripes = geometry.Stripes(len(layout.positions), layout.parity)
    for piece, begin, end in geometry.pieces_over(layout, job.position, job.index):
        place = piece * layout.piece_bytes - geometry.start_of(layout, job.position, job.index)
        last = min(end, job.shape.file_bytes - place)
        for at in range(begin, last, length):
            yield _Segment(stripes.stripe_of(job.position, piece), place, at, min(last, at + length))


def describe(lost: Lost, tools: Tools, doubtful: list[Holding]) -> parityset.Description:
    """What the first parity set with a sound description says of the group. NotEnough where there is none."""
    reasons = []
    for position, holding in sorted(lost.parities.items()):
        try:
            described = read_description(lost, holding, tools)
        except (BadBytes, DaemonUnavailable, ProtocolError, Refused) as error:
            reasons.append(f"{holding.label}: {error}")
            if isinstance(error, BadBytes):
                doubtful.append(holding)
            continue
        if (described.snapshot, described.position, described.layout) == (lost.snapshot, position, lost.layout):
            return described
        reasons.append(f"{holding.label}: its parity set is of something else")
    raise NotEnough(f"no parity set tells the checksums of {lost.what} ({'; '.join(reasons)})")


def read_description(job: Lost, holding: Holding, tools: Tools) -> parityset.Description:
    """The description of a parity set, every block of it checked."""
    length = parityset.meta_bytes(job.layout)
    buffer = memoryview(bytearray(length))
    crcs = read_table(tools, job.job, holding, job.snapshot)
    one = Symbol(1, [Span(holding, 0, length)])
    if len(crcs) * job.layout.unit_bytes // 4 < length:
        raise ProtocolError("parity", "a parity set is shorter than its description")
    combine.combine(
        buffer, [one], length, job=job.job, snapshot=job.snapshot, unit_bytes=job.layout.unit_bytes,
        layout="bytes", tools=tools, cancelled=lambda: False,
    )  # fmt: skip
    return parityset.read(buffer)


def _decode_segment(work: _Work, segment: _Segment) -> None:
    """One segment. A window in which a source turns out bad is decoded from other symbols, as is what comes after it
    where there are enough of them."""
    job, layout = work.job, work.job.layout
    code = code_of(job.layout)
    begin, unit = segment.begin, layout.unit_bytes
    window = combine.window_for(unit)
    bench = work.tools.bench(code.k, code.m, unit, code.layout)
    failed: dict[int, set[int]] = {}  # by the column where a window begins

    def made(at: int, bytes_: memoryview) -> None:
        job.advance(len(bytes_), _wrong_blocks(work, segment.place + begin + at, bytes_))

    while begin < segment.end:
        until = min(begin + window, segment.end) if begin in failed else segment.end
        end = _whole(until, layout)
        symbols, order = choose(job, segment.stripe, begin, end, failed.get(begin, set()))
        try:
            combine.combine(
                work.view[segment.place + begin : segment.place + until],
                symbols,
                end - begin,
                job=job.job,
                snapshot=job.snapshot,
                unit_bytes=unit,
                layout=code.layout,
                tools=work.tools,
                cancelled=work.cancelled,
                advanced=made,
                point="rebuild.window",
                bench=bench,
            )
            begin = until
        except BadBytes as error:
            job.suspects.add((segment.stripe, order[error.symbol]))
            if error.span.holding is not None:
                work.doubtful.append(error.span.holding)
            begin += error.at // window * window
            failed.setdefault(begin, set()).add(order[error.symbol])


def _wrong_blocks(work: _Work, place: int, bytes_: memoryview) -> int:
    """How many blocks that were decoded for this place of the slot are not what the trainer copied."""
    block_bytes = work.job.shape.block_bytes
    block = place // block_bytes
    words = work.table[4 * block : 4 * (block + -(-len(bytes_) // block_bytes))]
    return len(bad_blocks(bytes_, words, block_bytes))


def code_of(layout: GroupLayout) -> Codec:
    """The code of a group."""
    return Codec(len(layout.positions) - layout.parity, layout.parity)


def choose(
    job: Lost, stripe: int, begin: int, end: int, failed: Set[int], near: str = ""
) -> tuple[list[Symbol], list[int]]:
    """Symbols that add up to the lost one over these columns, and which symbols of the stripe they are: any but those
    in `failed`, preferably none that failed elsewhere, and what is read at the address `near`. NotEnough."""
    stripes = geometry.stripes(job.layout)
    have: dict[int, list[Span]] = {}
    for position in range(len(job.layout.positions)):
        if position == job.position:
            continue
        symbol = stripes.symbol_of(stripe, position)
        spans = _spans(job, stripes, stripe, symbol, position, begin, end)
        if spans is not None and symbol not in failed:
            have[symbol] = spans
    if len(have) < stripes.k:
        raise NotEnough(
            f"of the {stripes.k} pieces that decode a part of {job.what} only {len(have)} are left with good bytes"
        )
    preferred = sorted(have, key=lambda one: ((stripe, one) in job.suspects, not _is_at(near, have[one]), one))
    chosen = sorted(preferred[: stripes.k])
    wanted = stripes.symbol_of(stripe, job.position)
    coefficients = code_of(job.layout).recover(chosen, wanted)
    kept = [(c, symbol) for c, symbol in zip(coefficients, chosen, strict=True) if c]
    return [Symbol(c, have[symbol]) for c, symbol in kept], [symbol for _, symbol in kept]


def _is_at(address: str, spans: Sequence[Span]) -> bool:
    return any(span.holding is not None and span.holding.streams == address for span in spans)


def _spans(
    job: Lost, stripes: geometry.Stripes, stripe: int, symbol: int, position: int, begin: int, end: int
) -> list[Span] | None:
    """Where the columns of a symbol are; None where nobody holds them."""
    layout = job.layout
    if symbol >= stripes.k:
        holding = job.parities.get(position)
        offset = parityset.piece_offset(layout, symbol - stripes.k) + begin
        return None if holding is None else [Span(holding, offset, end - begin)]
    piece = stripes.piece_of(stripe, position)
    assert piece is not None
    first = piece * layout.piece_bytes
    try:
        return data_spans(layout, job.shards, position, first + begin, first + end)
    except KeyError:
        return None


def _whole(end: int, layout: GroupLayout) -> int:
    """Blocks are checked whole, so whole units are read; a piece is a multiple of them."""
    return min(layout.piece_bytes, -(-end // layout.unit_bytes) * layout.unit_bytes)
