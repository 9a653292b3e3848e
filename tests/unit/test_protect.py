"""Parity of a group, made from shards that lie on real nodes: what it has to be, and what stops it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import _native, geometry, parityset, reader
from snapshotd.combine import BadBytes, Cancelled, Tools
from snapshotd.errors import DaemonUnavailable, ProtocolError, SnapshotError, SnapshotGone
from snapshotd.streams import Pool
from snapshotd.wire import ShardShape
from tests.unit.group_faults import FakeClock, Meter, Nth, breaks_off, cut, cuts, hangs_up, no_collection, refuses
from tests.unit.groups import SNAPSHOT, Group, group, parity_twin, table_twin
from tests.unit.native_support import BLOCK

MIB = 1 << 20
UNEVEN = [[5 * BLOCK + 3, 77], [9 * BLOCK], [1, 2 * BLOCK - 1, BLOCK]]


def is_whole(one: Group, position: int) -> None:
    """A published set has the twin's pieces, the description of all it protects, zeros between, and checksums."""
    layout, stored = one.layout, one.parities[position]
    found, meta = stored.slot, parityset.meta_bytes(layout)
    assert stored.file_bytes == parityset.file_bytes(layout)
    tables = [
        [table_twin(one.contents[shape.rank], shape.block_bytes) for shape in shapes] for shapes in layout.positions
    ]
    described = parityset.Description(SNAPSHOT, position, layout, tables)
    packed = parityset.pack(described)
    assert parityset.read(found[:meta]) == described
    assert found[:meta] == packed.ljust(meta, b"\0")
    for row, piece in enumerate(parity_twin(one, position)):
        begin = parityset.piece_offset(layout, row)
        assert found[begin : begin + layout.piece_bytes] == piece, f"row {row} at position {position}"
    assert stored.native.verify(0) == []


# --- what it has to be ------------------------------------------------------------------------------------------------


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[list[int]], int, list[int], int]:
    """Shards on two to six nodes, parity, blocks in turn, seed."""
    sizes = st.lists(st.lists(st.integers(1, 8 * BLOCK), min_size=1, max_size=3), min_size=2, max_size=6)
    drawn = draw(sizes)
    blocks = draw(st.lists(st.sampled_from([BLOCK, 2 * BLOCK, 4 * BLOCK]), min_size=1, max_size=3))
    return drawn, draw(st.integers(1, len(drawn) - 1)), blocks, draw(st.integers(0, 99))


@given(groups(), cuts())
@settings(deadline=None, max_examples=40)
def test_every_nodes_parity_is_that_of_the_twin_whatever_lies_in_the_group(
    drawn: tuple[list[list[int]], int, list[int], int], sizes_of_work: tuple[int, int, int, int]
) -> None:
    sizes, parity, blocks, seed = drawn
    with group(sizes, parity, blocks=blocks, seed=seed) as one, pytest.MonkeyPatch.context() as few:
        cut(few, *sizes_of_work)
        one.protect()
        for position in range(len(sizes)):
            is_whole(one, position)


@pytest.mark.parametrize(
    ("sizes", "parity"),
    [
        ([[3 * MIB + 4097], [MIB]], 1),
        ([[2 * MIB, 5], [3 * MIB], [MIB + 1, MIB - 1]], 1),
        ([[2 * MIB, 5], [3 * MIB], [MIB + 1, MIB - 1]], 2),
        ([[4 * MIB + 1]] * 5, 2),
    ],
    ids=["k=1, m=1", "k=2, m=1", "k=1, m=2", "k=3, m=2"],
)
@pytest.mark.parametrize("blocks", [(BLOCK,), (MIB,), (2 * MIB, BLOCK, MIB // 2)], ids=["4 KiB", "1 MiB", "mixed"])
def test_parity_of_shards_of_many_windows_is_that_of_the_twin(
    sizes: list[list[int]], parity: int, blocks: tuple[int, ...]
) -> None:
    with group(sizes, parity, blocks=blocks) as one:
        one.protect()
        for position in range(len(sizes)):
            is_whole(one, position)


def test_one_parity_is_plain_xor_and_the_only_piece_of_two_nodes_is_a_replica() -> None:
    with group([[3 * BLOCK - 1], [2 * BLOCK]], 1) as one:
        one.protect()
        (mine,), (other,) = (one.ranks_at(position) for position in (0, 1))
        at = parityset.piece_offset(one.layout, 0)
        assert one.parities[0].slot[at : at + 3 * BLOCK] == one.contents[other].ljust(3 * BLOCK, b"\0")
        assert one.parities[1].slot[at : at + 3 * BLOCK] == one.contents[mine].ljust(3 * BLOCK, b"\0")


def test_every_byte_is_pulled_once_for_each_set_that_needs_it_and_paid_for() -> None:
    with group([[2 * MIB + 9], [3 * MIB, 70], [MIB]], 1) as one:
        clock = FakeClock()
        meter = Meter(1e6, clock)
        one.tools = Tools(Pool(), meter)
        one.protect()
        state = sum(map(len, one.contents.values()))
        assert one.served_bytes() == meter.taken_bytes == state, "with m = 1 each byte is in one stripe of one set"
        assert state / 1e6 - reader.BURST_S <= clock.now_s - 100.0 + 1e-6
        one.tools.pool.close()


# --- what stops it ----------------------------------------------------------------------------------------------------


def recovers(one: Group) -> None:
    """After whatever went wrong the slot is as it was claimed, and the next attempt makes the set as it has to be."""
    assert one.parities[0].state == _native.FILLING
    one.before_each_read(lambda _: None)
    one.protect(0)
    is_whole(one, 0)


@given(st.integers(1, 2), st.data())
@settings(deadline=None, max_examples=30)
def test_a_flipped_bit_in_a_shard_or_in_its_table_stops_every_set_that_needs_it_and_its_place_is_named(
    parity: int, data: st.DataObject
) -> None:
    with group(UNEVEN, parity, seed=data.draw(st.integers(0, 9))) as one:
        rank = data.draw(st.sampled_from(sorted(one.contents)))
        place, bit = data.draw(st.integers(0, len(one.contents[rank]) - 1)), data.draw(st.integers(0, 7))
        if data.draw(st.booleans()):
            one.shards[rank].flip(place, bit)
        else:
            one.shards[rank].flip_table(place // BLOCK, bit)
        failed = 0
        for position in range(3):
            try:
                one.protect(position)
            except BadBytes as error:
                assert error.span.holding == one.shards[rank].holding
                assert one.parities[position].state == _native.FILLING
                failed += 1
        assert failed == parity, "each byte is in so many sets, so the group is not protected before somebody looks"


@pytest.mark.parametrize(
    ("trouble", "kind"), [(refuses, SnapshotGone), (hangs_up, DaemonUnavailable), (breaks_off, DaemonUnavailable)]
)
def test_whichever_read_fails_there_is_no_set_and_the_next_attempt_makes_it(
    trouble: Callable[[object], None], kind: type[SnapshotError], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, BLOCK, BLOCK, BLOCK, 2 * BLOCK)
    with group(UNEVEN, 2) as one:
        reads = Nth()
        one.before_each_read(reads.count_up)
        one.protect(0)
        one.parities.clear()
        assert reads.count > 6, "six tables, and pieces"
        for number in range(1, reads.count + 1):
            due = Nth(number)
            one.before_each_read(lambda read, due=due: trouble(read) if due.due_now() else None)  # type: ignore[misc]
            with pytest.raises(kind):
                one.protect(0)
            assert one.parities[0].state == _native.FILLING, f"read {number} failed"
        recovers(one)


def test_a_source_that_is_not_there_is_unavailable() -> None:
    with group(UNEVEN, 1) as one:
        one.hosts[2].server.close()
        with pytest.raises(DaemonUnavailable, match=one.hosts[2].address):
            one.protect(0)
        assert one.parities[0].state == _native.FILLING


def test_a_source_that_went_on_to_another_snapshot_says_so() -> None:
    with group(UNEVEN, 1) as one:
        rank = one.ranks_at(1)[0]
        one.shards[rank].native.empty(0)
        with pytest.raises(SnapshotGone, match="holds step 840"):
            one.protect(0)
        one.shards[rank].store(rank, one.contents[rank])
        recovers(one)


@pytest.mark.parametrize(
    ("amiss", "why"),
    [(-BLOCK, "than was announced"), (-1, "an end at 12387 would cut"), (1, "sent"), (BLOCK, "than was announced")],
)
def test_a_shard_of_another_length_than_was_announced_is_refused(amiss: int, why: str) -> None:
    with group([[3 * BLOCK + 100], [4 * BLOCK], [BLOCK]], 1) as one:
        true = one.layout
        (shape,) = true.positions[0]
        announced = ShardShape(shape.rank, shape.file_bytes + amiss, shape.block_bytes, shape.fingerprint)
        one.layout = geometry.lay_out([[announced], *true.positions[1:]], 1)
        with pytest.raises(ProtocolError, match=why):
            for position in range(3):
                one.protect(position)


def test_whenever_it_is_not_wanted_any_more_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 2 * BLOCK, BLOCK, BLOCK, 8 * BLOCK)
    with group(UNEVEN, 2) as one:
        looks = Nth()
        one.protect(0, cancelled=looks.due)
        one.parities.clear()
        assert looks.count > 6, "it asks before each table and between windows"
        for number in range(1, looks.count + 1):
            due = Nth(number)
            with pytest.raises(Cancelled):
                one.protect(0, cancelled=due.due)
        recovers(one)


def test_given_up_at_once_it_pulls_nothing() -> None:
    with group(UNEVEN, 1) as one:
        with pytest.raises(Cancelled):
            one.protect(0, cancelled=lambda: True)
        assert one.served_bytes() == 0
        recovers(one)


@pytest.mark.parametrize("trouble", [refuses, hangs_up, breaks_off])
def test_whatever_stops_it_nothing_holds_on_to_the_slot_afterwards(trouble: Callable[[object], None]) -> None:
    """So an arena that is of no use any more can be freed at once, and not at some garbage collection."""
    with group(UNEVEN, 2) as one, no_collection():
        with pytest.raises(Cancelled):
            one.protect(0, cancelled=Nth(8).due)
        assert one.parities[0].is_free(), "cancelled"
        one.hosts[1].before = lambda read: trouble(read) if read.length else None
        with pytest.raises(SnapshotError):
            one.protect(0)
        assert one.parities[0].is_free()
