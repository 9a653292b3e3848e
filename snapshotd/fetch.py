"""A shard that a survivor decoded while the job waited, copied into an arena: cheaper than decoding it once more.

Beside `rebuild`, and with the same promise: a block is believed only if it has the CRC32C that the trainer's copy gave
it, which every parity set carries. What cannot be copied is decoded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from snapshotd import _native, combine, parityset, rebuild
from snapshotd.arena import bad_blocks
from snapshotd.combine import BadBytes, Span, Symbol, Tools
from snapshotd.errors import SnapshotError
from snapshotd.manifest import round_up
from snapshotd.rebuild import Job, NotEnough
from snapshotd.wire import Holding

log = logging.getLogger("snapshotd")


def regain(job: Job, arena: _native.Arena, slot: int, tools: Tools, cancelled: Callable[[], bool]) -> list[Holding]:
    """Fill a claimed slot with the shard and its CRC table; the caller publishes it. Returns sources with bad bytes.

    Raises as `rebuild.decode` does. `job.shards` has the lost rank itself where a survivor keeps its shard.
    """
    doubtful: list[Holding] = []
    whole = job.shards.get(job.rank)
    if whole is not None:
        try:
            _copy(job, whole, arena, slot, tools, cancelled, doubtful)
            return doubtful
        except (SnapshotError, OSError) as error:
            log.warning("%s cannot be copied from %s (%s) and is decoded instead", job.what, whole.label, error)
            doubtful += [whole] if isinstance(error, BadBytes) and whole not in doubtful else []
            job.done_bytes = job.wrong_blocks = 0
    return [*doubtful, *rebuild.decode(job, arena, slot, tools, cancelled)]


def _copy(
    job: Job,
    whole: Holding,
    arena: _native.Arena,
    slot: int,
    tools: Tools,
    cancelled: Callable[[], bool],
    doubtful: list[Holding],
) -> None:
    length, unit = job.shape.file_bytes, job.layout.unit_bytes
    units = round_up(length, unit)
    spans = [Span(whole, 0, length), Span(None, 0, units - length)]
    table = parityset.table_of(rebuild.describe(job, tools, doubtful), job.rank)

    def made(at: int, bytes_: memoryview) -> None:
        block = at // job.shape.block_bytes
        words = table[4 * block : 4 * (block + -(-len(bytes_) // job.shape.block_bytes))]
        job.advance(len(bytes_), len(bad_blocks(bytes_, words, job.shape.block_bytes)))

    view = arena.slot_view(slot)
    try:
        combine.combine(
            view[:length], [Symbol(1, spans)], units, job=job.job, snapshot=job.snapshot, unit_bytes=unit,
            layout="bytes", tools=tools, cancelled=cancelled, advanced=made, point="rebuild.window",
        )  # fmt: skip
        combine.clear(view[length:])
    finally:
        view.release()
    if job.wrong_blocks:
        raise NotEnough(f"{job.wrong_blocks} of its blocks differ from the checksums of the trainer's copy")
    arena.put_block_crcs(slot, length, table)
