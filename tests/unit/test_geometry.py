"""Groups and stripes: what is promised of them, checked over all small groups."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import reduce

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import geometry
from snapshotd.errors import ProtocolError
from snapshotd.geometry import Formation, Member, Segment, Stripes, plan
from snapshotd.wire import GroupLayout, ShardShape

KIB, MIB = 1 << 10, 1 << 20
GROUPS = [(n, m) for n in range(1, 8) for m in range(n)]


def node(number: int) -> bytes:
    return number.to_bytes(16, "big")


def shape(rank: int, file_bytes: int, block_bytes: int = 4096) -> ShardShape:
    return ShardShape(rank, file_bytes, block_bytes, bytes(32))


def shapes(sizes: Sequence[Sequence[int]], block_bytes: int = 4096) -> list[list[ShardShape]]:
    ranks = itertools.count()
    return [[shape(next(ranks), size, block_bytes) for size in row] for row in sizes]


def uneven(n: int, seed: int = 0) -> list[list[int]]:
    """Sizes of each position's shards: some odd, some empty, some nodes without any, one node surely with some."""
    draw = random.Random(seed * 100 + n)
    sizes = [[draw.choice([0, 1, 4095, 4096, 4097, 9000, 50_001]) for _ in range(draw.randrange(4))] for _ in range(n)]
    sizes[draw.randrange(n)].append(30_000)
    return sizes


# --- stripes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), GROUPS)
def test_every_position_has_one_symbol_of_every_stripe_and_no_symbol_lies_twice(n: int, m: int) -> None:
    stripes = Stripes(n, m)
    assert stripes.k == n - m
    for stripe in range(n):
        symbols = [stripes.symbol_of(stripe, position) for position in range(n)]
        assert sorted(symbols) == list(range(n))
        assert [stripes.position_of(stripe, symbol) for symbol in symbols] == list(range(n))
        assert [stripes.position_of(stripe, stripes.k + r) for r in range(m)] == [(stripe + r) % n for r in range(m)]
        assert [stripes.position_of(stripe, c) for c in range(n - m)] == [(stripe + m + c) % n for c in range(n - m)]


@pytest.mark.parametrize(("n", "m"), GROUPS)
def test_a_position_gives_each_piece_to_one_stripe_and_owns_parity_of_the_others(n: int, m: int) -> None:
    stripes = Stripes(n, m)
    for position in range(n):
        given_to = [stripes.stripe_of(position, piece) for piece in range(stripes.k)]
        owned = stripes.owned(position)
        assert sorted([*given_to, *(stripe for stripe, _ in owned)]) == list(range(n))
        assert [row for _, row in owned] == list(range(m))
        for piece, stripe in enumerate(given_to):
            assert stripes.piece_of(stripe, position) == piece
            assert stripes.symbol_of(stripe, position) < stripes.k
        for stripe, row in owned:
            assert stripes.piece_of(stripe, position) is None
            assert stripes.symbol_of(stripe, position) == stripes.k + row


@pytest.mark.parametrize(("n", "m"), GROUPS)
def test_whichever_m_nodes_are_lost_every_stripe_keeps_k_symbols(n: int, m: int) -> None:
    stripes = Stripes(n, m)
    for lost in itertools.combinations(range(n), m):
        for stripe in range(n):
            kept = {stripes.symbol_of(stripe, position) for position in range(n) if position not in lost}
            assert len(kept) >= stripes.k


# --- bytes ------------------------------------------------------------------------------------------------------------


def files_of(layout: GroupLayout, seed: int) -> dict[int, bytes]:
    draw = random.Random(seed)
    return {one.rank: draw.randbytes(one.file_bytes) for row in layout.positions for one in row}


def string_by_segments(layout: GroupLayout, position: int, begin: int, end: int, files: dict[int, bytes]) -> bytes:
    parts = []
    for part in geometry.segments(layout, position, begin, end):
        assert part.length > 0
        if part.shard is None:
            parts.append(bytes(part.length))
            continue
        data = files[layout.positions[position][part.shard].rank][part.offset : part.offset + part.length]
        assert len(data) == part.length, "a segment never reaches behind the end of its file"
        parts.append(data)
    return b"".join(parts)


def string_plainly(layout: GroupLayout, position: int, files: dict[int, bytes], length: int) -> bytes:
    unit = layout.unit_bytes
    padded = b"".join(files[one.rank] + bytes(-one.file_bytes % unit) for one in layout.positions[position])
    return padded + bytes(length - len(padded))


@pytest.mark.parametrize(("n", "m"), GROUPS)
@pytest.mark.parametrize("seed", range(3))
def test_segments_string_the_padded_shards_together_and_end_in_zeros(n: int, m: int, seed: int) -> None:
    layout = geometry.lay_out(shapes(uneven(n, seed)), m)
    files, draw = files_of(layout, seed), random.Random(seed)
    length = (n - m) * layout.piece_bytes
    for position in range(n):
        whole = string_plainly(layout, position, files, length + 5000)
        for _ in range(10):
            begin, end = sorted(draw.choices(range(length + 5000), k=2))
            assert string_by_segments(layout, position, begin, end, files) == whole[begin:end]
        assert string_by_segments(layout, position, 0, length, files) == whole[:length]


@pytest.mark.parametrize(("n", "m"), GROUPS)
@pytest.mark.parametrize("seed", range(3))
def test_the_pieces_over_a_shard_hold_its_padded_bytes_and_no_others(n: int, m: int, seed: int) -> None:
    layout = geometry.lay_out(shapes(uneven(n, seed)), m)
    for position, row in enumerate(layout.positions):
        for index, one in enumerate(row):
            ranges = [
                (piece * layout.piece_bytes + begin, piece * layout.piece_bytes + end)
                for piece, begin, end in geometry.pieces_over(layout, position, index)
            ]
            assert all(0 <= begin < end for begin, end in ranges)
            assert all(piece < n - m for piece, _, _ in geometry.pieces_over(layout, position, index))
            start = geometry.start_of(layout, position, index)
            padded = -(-one.file_bytes // layout.unit_bytes) * layout.unit_bytes
            joined = [byte for bounds in ranges for byte in bounds]
            assert joined[1:-1:2] == joined[2::2], "what one piece ends the next begins"
            assert (joined[:1], joined[-1:]) == (([start], [start + padded]) if padded else ([], []))
            assert not one.file_bytes or geometry.segments(layout, position, start, start + one.file_bytes) == [
                Segment(index, 0, one.file_bytes)
            ]


@pytest.mark.parametrize("n", range(2, 6))
def test_the_bytes_of_a_lost_node_come_back_from_the_others_pieces_and_plain_parity(n: int) -> None:
    """Parity row 0 is plain XOR: enough to carry real bytes through every index for m = 1."""
    layout = geometry.lay_out(shapes(uneven(n, 7)), 1)
    stripes, files, size = geometry.stripes(layout), files_of(layout, 7), layout.piece_bytes

    def piece(position: int, number: int) -> int:
        data = string_by_segments(layout, position, number * size, (number + 1) * size, files)
        return int.from_bytes(data, "big")

    symbols: dict[tuple[int, int], int] = {}  # by stripe and position
    for stripe in range(n):
        data = {position: stripes.piece_of(stripe, position) for position in range(n)}
        pieces = {position: piece(position, number) for position, number in data.items() if number is not None}
        (owner,) = data.keys() - pieces.keys()
        assert stripes.owned(owner) == [(stripe, 0)]
        symbols |= {(stripe, position): value for position, value in pieces.items()}
        symbols[stripe, owner] = reduce(lambda left, right: left ^ right, pieces.values())
    for lost in range(n):
        string = b""
        for number in range(stripes.k):
            stripe = stripes.stripe_of(lost, number)
            others = [symbols[stripe, position] for position in range(n) if position != lost]
            string += reduce(lambda left, right: left ^ right, others).to_bytes(size, "big")
        assert string == string_plainly(layout, lost, files, len(string))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), GROUPS)
@pytest.mark.parametrize("block", [4096, 16 * KIB])
def test_parity_takes_m_of_k_of_the_longest_node_and_at_most_a_unit_more_for_each_piece(
    n: int, m: int, block: int
) -> None:
    for seed in range(5):
        layout = geometry.lay_out(shapes(uneven(n, seed), block), m)
        strings = [sum(-(-one.file_bytes // block) * block for one in row) for row in layout.positions]
        promised = m * max(strings) / (n - m)
        assert promised <= geometry.parity_bytes(layout) <= promised + m * layout.unit_bytes
        assert layout.unit_bytes == block and layout.piece_bytes % block == 0
        assert (n - m) * (layout.piece_bytes - block) < max(strings) <= (n - m) * layout.piece_bytes


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 2), (8, 2), (8, 3), (10, 4), (14, 2)])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_two_slots_and_two_parity_sets_take_what_was_promised_of_a_large_state(k: int, m: int, ranks: int) -> None:
    sizes = [[512 * MIB - 12_345] * ranks] * (k + m)
    layout = geometry.lay_out(shapes(sizes, MIB), m)
    state = sum(sizes[0])
    taken = 2 * ranks * 512 * MIB + 2 * geometry.parity_bytes(layout)
    assert taken <= (2 + 2 * m / k) * state * 1.05


def test_the_unit_is_the_largest_block_of_all_shards() -> None:
    layout = geometry.lay_out([[shape(0, 5000, 4096)], [shape(1, 100, 64 * KIB), shape(2, 70_000, 8192)]], 1)
    assert (layout.unit_bytes, layout.piece_bytes) == (64 * KIB, 192 * KIB)
    assert geometry.start_of(layout, 1, 1) == 64 * KIB


def test_parity_is_clipped_to_what_leaves_one_piece_of_data() -> None:
    assert [geometry.parity_for(2, nodes) for nodes in (1, 2, 3, 8)] == [0, 1, 2, 2]
    assert geometry.parity_for(0, 8) == 0


# --- what others tell -------------------------------------------------------------------------------------------------

GOOD = geometry.lay_out(shapes([[5000, 0], [9000], [], [4096]]), 2)


@pytest.mark.parametrize(("n", "m"), GROUPS)
def test_a_layout_that_was_made_here_is_believed(n: int, m: int) -> None:
    layout = geometry.lay_out(shapes(uneven(n)), m)
    assert geometry.check(layout) is layout
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=GroupLayout)
    assert geometry.check(sent) == layout and geometry.digest(sent) == geometry.digest(layout)


def changes() -> Iterator[GroupLayout]:
    replace = msgspec.structs.replace
    yield replace(GOOD, parity=4)
    yield replace(GOOD, parity=1)
    yield replace(GOOD, parity=-1)
    yield replace(GOOD, unit_bytes=8192)
    yield replace(GOOD, piece_bytes=GOOD.piece_bytes + GOOD.unit_bytes)
    yield replace(GOOD, piece_bytes=GOOD.piece_bytes - 1)
    yield replace(GOOD, piece_bytes=0)
    yield replace(GOOD, positions=[])
    yield replace(GOOD, positions=[[], [], []], parity=1, piece_bytes=0)
    yield replace(GOOD, positions=[*GOOD.positions[:3], [shape(0, 4096)]])
    yield replace(GOOD, positions=[*GOOD.positions[:3], [shape(9, 4096, 8192)]])
    yield replace(GOOD, positions=[*GOOD.positions[:3], [shape(9, 4096, 5000)]], unit_bytes=5000)
    yield replace(GOOD, positions=[*GOOD.positions[:3], [shape(9, 4096, 32 * MIB)]], unit_bytes=32 * MIB)
    yield replace(GOOD, positions=[*GOOD.positions[:3], [shape(9, 4096, 2048)]])
    yield replace(GOOD, positions=[*GOOD.positions[:3], [shape(9, -1)]])
    yield replace(GOOD, positions=[*GOOD.positions[:3], [shape(9, 2**62)]])
    yield GroupLayout(0, 4096, 4096, [[shape(0, 1)]] * 256)


@pytest.mark.parametrize("layout", list(changes()))
def test_a_layout_that_cannot_be_is_refused(layout: GroupLayout) -> None:
    with pytest.raises(ProtocolError, match="nothing is encoded or rebuilt by it") as caught:
        geometry.check(layout)
    assert caught.value.reason == "layout"


def test_a_layout_of_which_no_shard_has_a_byte_is_an_error() -> None:
    nothing: list[list[list[ShardShape]]] = [[[]], [[], []], shapes([[0], [0, 0]])]
    for empty in nothing:
        with pytest.raises(ProtocolError, match="none of its shards has a byte"):
            geometry.lay_out(empty, 0)


def test_layouts_that_differ_in_anything_have_different_digests() -> None:
    different = [GOOD, geometry.lay_out(GOOD.positions, 1), geometry.lay_out(GOOD.positions[::-1], 2)]
    for fact, value in (("rank", 9), ("file_bytes", 4095), ("block_bytes", 8192), ("fingerprint", b"x" * 32)):
        one = msgspec.structs.replace(GOOD.positions[3][0], **{fact: value})
        different.append(geometry.lay_out([*GOOD.positions[:3], [one]], 2))
    digests = {geometry.digest(layout) for layout in different}
    assert len(digests) == len(different) and {len(one) for one in digests} == {32}


# --- groups -----------------------------------------------------------------------------------------------------------

clusters = st.lists(st.integers(0, 10**6), max_size=60, unique=True).flatmap(
    lambda ids: st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=len(ids), max_size=len(ids)).map(
        lambda domains: [Member(node(one), domain) for one, domain in zip(ids, domains, strict=True)]
    )
)


@given(clusters, st.integers(1, 12), st.randoms(use_true_random=False))
def test_every_node_is_in_one_group_and_sizes_and_domains_are_even(
    members: list[Member], group_size: int, draw: random.Random
) -> None:
    groups = plan(members, group_size)
    nodes = sorted(member.node for member in members)
    assert sorted(one for group in groups for one in group) == nodes
    assert all(group == sorted(group) and group for group in groups)
    if members:
        assert len(groups) == max(1, int(len(members) / group_size + 0.5))
        sizes = [len(group) for group in groups]
        assert max(sizes) - min(sizes) <= 1
    domains = {member.node: member.domain for member in members}
    for domain, count in Counter(domains.values()).items():
        shares = [sum(domains[one] == domain for one in group) for group in groups]
        assert max(shares) <= -(-count // len(groups)), "no group has more of a domain than it must"
    assert plan(draw.sample(members, len(members)), group_size) == groups


@pytest.mark.parametrize(
    ("nodes", "group_size", "sizes"),
    [(1, 8, [1]), (4, 8, [4]), (11, 8, [11]), (12, 8, [6, 6]), (13, 8, [7, 6]), (20, 8, [7, 7, 6]), (5, 1, [1] * 5)],
)
def test_the_number_of_groups_is_rounded_half_up(nodes: int, group_size: int, sizes: list[int]) -> None:
    assert [len(group) for group in plan([Member(node(one)) for one in range(nodes)], group_size)] == sizes


def test_no_group_has_more_nodes_than_the_code_can_serve() -> None:
    assert [len(group) for group in plan([Member(node(one)) for one in range(300)], 255)] == [150, 150]


def formation(groups: list[list[bytes]]) -> Formation:
    places = {one: (number, place) for number, group in enumerate(groups) for place, one in enumerate(group)}
    return Formation(tuple(len(group) for group in groups), places)


@settings(max_examples=200)
@given(clusters.filter(lambda members: len(members) >= 2), st.integers(1, 12), st.data())
def test_where_nodes_are_replaced_the_others_keep_their_places(
    members: list[Member], group_size: int, data: st.DataObject
) -> None:
    groups = plan(members, group_size)
    lost = data.draw(st.sets(st.sampled_from([member.node for member in members]), max_size=len(members) - 1))
    newcomers = [Member(node(10**7 - number), "z") for number in range(len(lost))]
    now = [member for member in members if member.node not in lost] + newcomers
    before = formation(data.draw(st.permutations(groups)))  # whatever the order in which the groups are counted
    if data.draw(st.booleans()):  # a lost node is not always known any more
        before = Formation(before.sizes, {one: place for one, place in before.places.items() if one not in lost})
    after = plan(data.draw(st.permutations(now)), group_size, before)
    assert tuple(len(group) for group in after) == before.sizes
    kept = {one: place for one, place in before.places.items() if one not in lost}
    assert kept.items() <= formation(after).places.items()
    arrived = [one for group in after for one in group if one not in kept]
    assert arrived == sorted(member.node for member in newcomers), "newcomers in the order of their ids"


@pytest.mark.parametrize(
    "before",
    [
        Formation(),
        Formation((4,), {}),
        Formation((3, 1), {node(0): (0, 1)}),
        Formation((5,), {node(0): (0, 4)}),
        Formation((4,), {node(0): (0, 4)}),
        Formation((4,), {node(0): (1, 0)}),
        Formation((4,), {node(0): (0, 2), node(1): (0, 2)}),
        Formation((4,), {node(9): (0, 2)}),
    ],
)
def test_a_former_formation_that_does_not_fit_is_passed_over(before: Formation) -> None:
    members = [Member(node(one)) for one in range(4)]
    assert plan(members, 4, before) == plan(members, 4)
