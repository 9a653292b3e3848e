"""Blocks that rotted in memory, decoded from the rest of the group and put back: what the scrubber finds, made good.

Works on a thread, block by block, with the machinery of `rebuild`. A slot's bytes never change, so a repair writes what
stood there before and readers may read meanwhile. Nothing is written that is not borne out: a shard's block has the
CRC32C that the trainer's copy gave it and every parity set carries; a parity set's block, which no other node knows,
agrees with its own checksum or, where that is what rotted, with the bytes that stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from snapshotd import _native, combine, geometry, parityset, rebuild
from snapshotd.combine import BadBytes, Tools
from snapshotd.errors import SnapshotError
from snapshotd.rebuild import NotEnough
from snapshotd.wire import GroupLayout, Holding, SnapshotId


@dataclass
class Target:
    """A slot at `position` with bad blocks, and where the rest of its group is. `rank` is that of its shard; None: it
    holds the position's parity set."""

    job: str
    snapshot: SnapshotId
    layout: GroupLayout
    position: int
    rank: int | None
    shards: Mapping[int, Holding]
    parities: Mapping[int, Holding]
    suspects: set[tuple[int, int]] = field(default_factory=set)
    doubtful: list[Holding] = field(default_factory=list)

    @property
    def what(self) -> str:
        """What is repaired, for people."""
        return "a parity set" if self.rank is None else f"rank {self.rank}'s shard"


@dataclass
class Repaired:
    """What became of it: blocks that are good now, and why the others are not. `beyond_help`: the group answered, and
    has too little."""

    blocks: list[int] = field(default_factory=list)
    why: str = ""
    beyond_help: bool = False


@dataclass(frozen=True)
class _Place:
    """Where a block's bytes are decoded: these columns of the stripe's symbol at the target's position."""

    stripe: int
    column: int


def repair(
    target: Target, arena: _native.Arena, slot: int, blocks: Sequence[int], tools: Tools, cancelled: Callable[[], bool]
) -> Repaired:
    """Put these blocks of a slot right, each for itself; the caller holds the slot for so long.

    Nothing is raised for what the world does: `why` tells. Cancelled.
    """
    done = Repaired()
    try:
        described = rebuild.describe(target, tools, target.doubtful)
    except NotEnough as error:
        return Repaired(why=str(error), beyond_help=len(target.doubtful) == len(target.parities))
    except (SnapshotError, OSError) as error:
        return Repaired(why=str(error))
    page = _Page(arena, slot)
    for block in blocks:
        try:
            _repair(target, described, page, block, tools, cancelled)
        except NotEnough as error:
            done.why, done.beyond_help = str(error), True
        except (SnapshotError, OSError) as error:
            done.why = str(error)
        else:
            done.blocks.append(block)
    return done


class _Page:
    """A slot's blocks and their checksums."""

    def __init__(self, arena: _native.Arena, slot: int) -> None:
        self._arena, self._slot = arena, slot
        self.file_bytes, self.block_bytes = arena.slot(slot).file_bytes, arena.block_bytes

    def span(self, block: int) -> tuple[int, int]:
        """First byte and end of a block."""
        return block * self.block_bytes, min((block + 1) * self.block_bytes, self.file_bytes)

    def stands(self, block: int) -> bytes:
        """The bytes that stand there."""
        begin, end = self.span(block)
        with self._arena.slot_view(self._slot) as view:
            return bytes(view[begin:end])

    def word(self, block: int) -> bytes:
        """The checksum that stands there."""
        return self._arena.crc_words(self._slot, block, 1)

    def put(self, block: int, data: bytes | memoryview, word: bytes) -> None:
        """Write what is wrong of the two, and nothing else."""
        begin, end = self.span(block)
        if self.stands(block) != data:
            with self._arena.slot_view(self._slot) as view:
                view[begin:end] = data
        if self.word(block) != word:
            words = self._arena.crc_words(self._slot)
            words = words[: 4 * block] + word + words[4 * block + 4 :]
            self._arena.put_block_crcs(self._slot, self.file_bytes, words)


def _repair(
    target: Target,
    described: parityset.Description,
    page: _Page,
    block: int,
    tools: Tools,
    cancelled: Callable[[], bool],
) -> None:
    """One block. NotEnough where the group cannot tell what stood there."""
    if target.rank is not None:
        known = parityset.table_of(described, target.rank)[4 * block : 4 * block + 4]
        stands = page.stands(block)
        if _word_of(stands, page) == known:  # the checksum rotted, and not what it is of
            page.put(block, stands, known)
            return
        made = _decoded(target, _place_in_shard(target, page.span(block)[0]), page, block, tools, cancelled)
        if _word_of(made, page) != known:
            raise NotEnough(f"block {block} of {target.what} was decoded and differs from the checksum of its copy")
        page.put(block, made, known)
        return
    place = _place_in_set(target, page.span(block)[0])
    if place is None:
        made = _description_block(target, described, page, block)
    else:
        made = _decoded(target, place, page, block, tools, cancelled)
    if _word_of(made, page) != page.word(block) and made != page.stands(block):
        raise NotEnough(f"block {block} of {target.what} was made anew and neither its bytes nor its checksum agree")
    page.put(block, made, _word_of(made, page))


def _word_of(data: bytes, page: _Page) -> bytes:
    return _native.ec_crcs(data, page.block_bytes)


def _place_in_shard(target: Target, at: int) -> _Place:
    layout = target.layout
    (index,) = (i for i, shape in enumerate(layout.positions[target.position]) if shape.rank == target.rank)
    piece, column = divmod(geometry.start_of(layout, target.position, index) + at, layout.piece_bytes)
    return _Place(geometry.stripes(layout).stripe_of(target.position, piece), column)


def _place_in_set(target: Target, at: int) -> _Place | None:
    """None for the description."""
    layout = target.layout
    if at < parityset.meta_bytes(layout):
        return None
    row, column = divmod(at - parityset.meta_bytes(layout), layout.piece_bytes)
    stripe, _ = geometry.stripes(layout).owned(target.position)[row]
    return _Place(stripe, column)


def _description_block(target: Target, described: parityset.Description, page: _Page, block: int) -> bytes:
    """The sets of a group say the same, but for whose they are."""
    own = msgspec.structs.replace(described, position=target.position)
    begin, end = page.span(block)
    return parityset.pack(own).ljust(parityset.meta_bytes(target.layout), b"\0")[begin:end]


def _decoded(
    target: Target, place: _Place, page: _Page, block: int, tools: Tools, cancelled: Callable[[], bool]
) -> bytes:
    """The bytes of a block, from any symbols whose blocks are good. Blocks are summed up in whole units."""
    unit = target.layout.unit_bytes
    code = rebuild.code_of(target.layout)
    begin = place.column // unit * unit
    buffer = tools.window("repair", unit)[:unit]
    failed: set[int] = set()
    while True:  # `choose` gives up when too few are left
        symbols, order = rebuild.choose(target, place.stripe, begin, begin + unit, failed)
        try:
            combine.combine(
                buffer, symbols, unit, job=target.job, snapshot=target.snapshot, unit_bytes=unit, layout=code.layout,
                tools=tools, cancelled=cancelled,
            )  # fmt: skip
            break
        except BadBytes as error:
            failed.add(order[error.symbol])
            target.suspects.add((place.stripe, order[error.symbol]))
            if error.span.holding is not None:
                target.doubtful.append(error.span.holding)
    first, last = page.span(block)
    at = place.column - begin
    return bytes(buffer[at : at + last - first])
