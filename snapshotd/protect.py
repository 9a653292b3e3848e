"""Parity of one snapshot, made by the node that owns it: pull the pieces, check every block, add them up.

`make` works on a thread: `rebuild.decode` is its mirror. It fills a slot that was claimed for it and leaves publishing
to the caller, so a set that is not whole is never anything but FILLING.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from snapshotd import combine, geometry, parityset
from snapshotd.codec import Codec
from snapshotd.combine import Cancelled, Span, Symbol, Tools
from snapshotd.errors import ProtocolError
from snapshotd.faults import crash_point
from snapshotd.wire import GroupLayout, Holding, Read, SnapshotId


@dataclass(frozen=True)
class Task:
    """Which parity is to be made, and where the shards of the group lie, by rank."""

    job: str
    snapshot: SnapshotId
    layout: GroupLayout
    position: int
    shards: Mapping[int, Holding]


def make(task: Task, view: memoryview, tools: Tools, cancelled: Callable[[], bool]) -> int:
    """Fill `view`, a slot of a parity arena, with the set that `position` owns; returns the set's length.

    BadBytes where a source's block fails its checksum; DaemonUnavailable, ProtocolError or Refused where one cannot be
    read; Cancelled. The slot holds nothing of use then.
    """
    crash_point("accumulate.begun")
    layout = task.layout
    packed = parityset.pack(
        parityset.Description(task.snapshot, task.position, layout, _tables(task, tools, cancelled))
    )
    view[: len(packed)] = packed
    combine.clear(view[len(packed) : parityset.meta_bytes(layout)])
    stripes = geometry.Stripes(len(layout.positions), layout.parity)
    codec = Codec(stripes.k, layout.parity)
    bench = tools.bench(stripes.k, layout.parity, layout.unit_bytes, codec.layout)
    for stripe, row in stripes.owned(task.position):
        coefficients = codec.row(row)
        symbols = [Symbol(coefficients[symbol], _spans(task, stripes, stripe, symbol)) for symbol in range(stripes.k)]
        begin = parityset.piece_offset(layout, row)
        combine.combine(
            view[begin : begin + layout.piece_bytes],
            symbols,
            layout.piece_bytes,
            job=task.job,
            snapshot=task.snapshot,
            unit_bytes=layout.unit_bytes,
            layout=codec.layout,
            tools=tools,
            cancelled=cancelled,
            bench=bench,
        )
    crash_point("accumulate.done")
    return parityset.file_bytes(layout)


def _tables(task: Task, tools: Tools, cancelled: Callable[[], bool]) -> list[list[bytes]]:
    """The table of CRCs of every shard of the group."""
    tables = []
    for shapes in task.layout.positions:
        row = []
        for shape in shapes:
            if cancelled():
                raise Cancelled
            table = read_table(tools, task.job, task.shards[shape.rank], task.snapshot)
            if len(table) != parityset.table_bytes(shape):
                raise ProtocolError("table", f"the shard of rank {shape.rank} has another length than was announced")
            row.append(table)
        tables.append(row)
    return tables


def read_table(tools: Tools, job: str, holding: Holding, snapshot: SnapshotId) -> bytes:
    """The CRC words of every block of a slot's file."""
    stream = tools.pool.take(holding.streams)
    try:
        stream.ask(Read(job, holding.arena, holding.slot, snapshot, 0, 0))
        crcs = stream.answer().crcs
    except BaseException:
        stream.close()
        raise
    tools.pool.give(stream)
    return crcs


def _spans(task: Task, stripes: geometry.Stripes, stripe: int, symbol: int) -> list[Span]:
    position = stripes.position_of(stripe, symbol)
    piece = stripes.piece_of(stripe, position)
    assert piece is not None
    begin = piece * task.layout.piece_bytes
    return data_spans(task.layout, task.shards, position, begin, begin + task.layout.piece_bytes)


def data_spans(layout: GroupLayout, shards: Mapping[int, Holding], position: int, begin: int, end: int) -> list[Span]:
    """Where the bytes [begin, end) of a position's string are. KeyError for a shard that nobody holds."""
    shapes = layout.positions[position]
    return [
        Span(None if one.shard is None else shards[shapes[one.shard].rank], one.offset, one.length)
        for one in geometry.segments(layout, position, begin, end)
    ]
