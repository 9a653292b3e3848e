"""Who protects whom, and which byte lies in which stripe: groups, positions, pieces, symbols.

A group has n nodes at positions 0 … n-1; m is its parity and k = n - m. The shards of a position, each padded with
zeros to whole units, are strung together, and that string is cut in k pieces of the same length for the whole group;
what a string lacks is zero. Stripe j has n symbols, one on each position: parity row r on position j + r, and data
symbol c, a piece, on position j + m + c (both modulo n). So every position owns m pieces of parity and gives one piece
to each of the k stripes in which it owns none.

Pure, and the same answer for everyone: nothing here depends on the order in which nodes or messages came. A layout that
came over the network is believed only after `check`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from snapshotd.errors import ProtocolError
from snapshotd.manifest import round_up
from snapshotd.wire import GROUP_NODES_MAX, GroupLayout, ShardShape

UNIT_BYTES_MIN, UNIT_BYTES_MAX = 4096, 16 << 20
STRING_BYTES_MAX = 2**62


# --- who protects whom ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A node to be put in a group. `domain` is what it shares with others that fail together (rack, switch, power)."""

    node: bytes
    domain: str = ""


@dataclass(frozen=True)
class Formation:
    """How nodes stood in groups before: each group's size, and (group, position) of the nodes that are known."""

    sizes: tuple[int, ...] = ()
    places: Mapping[bytes, tuple[int, int]] = field(default_factory=dict)


def plan(members: Iterable[Member], group_size: int, previous: Formation | None = None) -> list[list[bytes]]:
    """The groups, each with its nodes in the order of their positions.

    There are max(1, N / group_size) groups, half rounded up (and never so few that one exceeds what the code can do).
    Their sizes differ by at most one, and no group has more nodes of a domain than it must; positions go by node id.

    Where `previous` has as many places in groups of the same sizes, its nodes keep theirs and newcomers take the others
    in the order of their ids: what survived of the parity stays valid, which is worth more than a perfect spread.
    """
    ordered = sorted(members, key=lambda member: (member.domain, member.node))
    nodes = sorted(member.node for member in ordered)
    assert group_size >= 1 and len(set(nodes)) == len(nodes), "a node is a member once"
    if not nodes:
        return []
    count = max(1, (2 * len(nodes) + group_size) // (2 * group_size), -(-len(nodes) // GROUP_NODES_MAX))
    # Dealt like cards with each domain's nodes in a row: sizes and every domain's share come out even at once.
    groups = [sorted(member.node for member in ordered[first::count]) for first in range(count)]
    sizes = sorted(len(group) for group in groups)
    if previous is not None and sorted(previous.sizes) == sizes:
        return _refilled(nodes, previous) or groups
    return groups


def _refilled(nodes: Sequence[bytes], previous: Formation) -> list[list[bytes]] | None:
    """The former groups with newcomers where nodes are gone; None where nobody stayed or the places make no sense."""
    vacant = {(group, position) for group, size in enumerate(previous.sizes) for position in range(size)}
    taken: dict[tuple[int, int], bytes] = {}
    for node in nodes:
        place = previous.places.get(node)
        if place is None:
            continue
        if place not in vacant:
            return None
        vacant.remove(place)
        taken[place] = node
    if not taken:
        return None
    newcomers = [node for node in nodes if node not in previous.places]
    taken.update(zip(sorted(vacant), newcomers, strict=True))
    return [[taken[group, position] for position in range(size)] for group, size in enumerate(previous.sizes)]


def parity_for(parity: int, nodes: int) -> int:
    """Parity of a group of so many nodes: what was asked for, clipped to what leaves one piece of data."""
    return max(0, min(parity, nodes - 1))


# --- which symbol lies where ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stripes:
    """The stripes of a group of `n` nodes with parity `m`. Symbols 0 … k-1 are data, k + r is parity row r."""

    n: int
    m: int

    @property
    def k(self) -> int:
        """Pieces of data in a stripe; so many of its symbols, whichever, bring back the others."""
        return self.n - self.m

    def stripe_of(self, position: int, piece: int) -> int:
        """The stripe to which a position gives this piece of its string."""
        return (position + 1 + piece) % self.n

    def piece_of(self, stripe: int, position: int) -> int | None:
        """Which piece of its string a position gives to a stripe; None where it owns parity of it instead."""
        piece = (stripe - position - 1) % self.n
        return piece if piece < self.k else None

    def symbol_of(self, stripe: int, position: int) -> int:
        """The one symbol of a stripe that lies on a position."""
        step = (position - stripe) % self.n
        return self.k + step if step < self.m else step - self.m

    def position_of(self, stripe: int, symbol: int) -> int:
        """Where a symbol of a stripe lies."""
        return (stripe + (self.m + symbol if symbol < self.k else symbol - self.k)) % self.n

    def owned(self, position: int) -> list[tuple[int, int]]:
        """(stripe, row) of the parity that a position owns, row by row: the order of the pieces in its parity set."""
        return [((position - row) % self.n, row) for row in range(self.m)]


def stripes(layout: GroupLayout) -> Stripes:
    """The stripes of a layout's group."""
    return Stripes(len(layout.positions), layout.parity)


# --- which byte lies where --------------------------------------------------------------------------------------------


def lay_out(positions: Sequence[Sequence[ShardShape]], parity: int) -> GroupLayout:
    """How these shards, by position, lie in the stripes of their group.

    The unit is the largest block of all shards; the pieces are the fewest units that hold the longest string. So a
    node's parity takes m / k of the longest string and at most a unit more for each of its m pieces. ProtocolError
    where the shards, which other nodes tell of, are none that can be laid out.
    """
    _require(1 <= len(positions) <= GROUP_NODES_MAX, f"it has {len(positions)} nodes")
    _require(0 <= parity < len(positions), f"it has {len(positions)} nodes and a parity of {parity}")
    shapes = [shape for position in positions for shape in position]
    ranks = [shape.rank for shape in shapes]
    _require(len(set(ranks)) == len(ranks), "a rank is in it twice")
    for shape in shapes:
        block = shape.block_bytes
        sound = UNIT_BYTES_MIN <= block <= UNIT_BYTES_MAX and block & (block - 1) == 0 and shape.file_bytes >= 0
        _require(sound, f"rank {shape.rank} has {shape.file_bytes} bytes in blocks of {block}")
    unit = max((shape.block_bytes for shape in shapes), default=UNIT_BYTES_MIN)
    longest = max(sum(round_up(shape.file_bytes, unit) for shape in position) for position in positions)
    _require(longest > 0, "none of its shards has a byte")
    piece = round_up(-(-longest // (len(positions) - parity)), unit)
    _require(piece * len(positions) <= STRING_BYTES_MAX, f"a node has {longest} bytes")
    return GroupLayout(parity, unit, piece, [list(position) for position in positions])


def check(layout: GroupLayout) -> GroupLayout:
    """The same layout, if it is one that `lay_out` makes. ProtocolError where it is not: nobody may act on it."""
    made = lay_out(layout.positions, layout.parity)
    _require(
        (layout.unit_bytes, layout.piece_bytes) == (made.unit_bytes, made.piece_bytes),
        f"its units and pieces of {layout.unit_bytes} and {layout.piece_bytes} bytes would have to be of "
        f"{made.unit_bytes} and {made.piece_bytes}",
    )
    return layout


def _require(sound: bool, fault: str) -> None:
    if not sound:
        raise ProtocolError(
            "layout",
            f"a group's layout is impossible: {fault}; nothing is encoded or rebuilt by it, so look whether all nodes "
            f"run the same release",
        )


def digest(layout: GroupLayout) -> bytes:
    """32 bytes that two layouts share only if they are equal."""
    return hashlib.sha256(msgspec.msgpack.encode(layout)).digest()


def parity_bytes(layout: GroupLayout) -> int:
    """What the parity that one position owns takes."""
    return layout.parity * layout.piece_bytes


@dataclass(frozen=True)
class Segment:
    """A part of a position's string: bytes of a shard's file (by its index at the position), or zeros (None)."""

    shard: int | None
    offset: int
    length: int


def segments(layout: GroupLayout, position: int, begin: int, end: int) -> list[Segment]:
    """Where the bytes [begin, end) of a position's string come from; the lengths add up to end - begin.

    What lies behind the end of a file or of the string is zeros.
    """
    assert 0 <= begin <= end
    found: list[Segment] = []
    reached = begin
    for index, (start, shape) in enumerate(_starts(layout, position)):
        first, last = max(start, begin), min(start + shape.file_bytes, end)
        if first < last:
            if reached < first:
                found.append(Segment(None, 0, first - reached))
            found.append(Segment(index, first - start, last - first))
            reached = last
    if reached < end:
        found.append(Segment(None, 0, end - reached))
    return found


def start_of(layout: GroupLayout, position: int, shard_index: int) -> int:
    """Where a shard begins in its position's string."""
    shapes = layout.positions[position]
    return sum(round_up(shape.file_bytes, layout.unit_bytes) for shape in shapes[:shard_index])


def pieces_over(layout: GroupLayout, position: int, shard_index: int) -> list[tuple[int, int, int]]:
    """(piece, begin, end) for each piece that holds bytes of a shard or of its padding: [begin, end) in the piece."""
    size = layout.piece_bytes
    start = start_of(layout, position, shard_index)
    end = start + round_up(layout.positions[position][shard_index].file_bytes, layout.unit_bytes)
    if start == end:
        return []
    return [
        (piece, max(start - piece * size, 0), min(end - piece * size, size))
        for piece in range(start // size, -(-end // size))
    ]


def _starts(layout: GroupLayout, position: int) -> Iterator[tuple[int, ShardShape]]:
    start = 0
    for shape in layout.positions[position]:
        yield start, shape
        start += round_up(shape.file_bytes, layout.unit_bytes)
