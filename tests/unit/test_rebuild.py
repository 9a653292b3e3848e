"""Lost shards, decoded from what real nodes still hold: whenever enough is left, and never other bytes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import _native, geometry, parityset, reader
from snapshotd.combine import Cancelled, Tools
from snapshotd.errors import DaemonUnavailable, Refused, SnapshotError, SnapshotGone
from snapshotd.rebuild import NotEnough
from snapshotd.streams import Pool
from tests.unit.group_faults import FakeClock, Meter, Nth, breaks_off, cut, cuts, hangs_up, no_collection, refuses
from tests.unit.groups import Group, losses, protected
from tests.unit.native_support import BLOCK

MIB = 1 << 20
UNEVEN = [[5 * BLOCK + 3, 77], [9 * BLOCK], [1, 2 * BLOCK - 1, BLOCK], [7 * BLOCK + 1]]


# --- every loss that parity is for ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "parity"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3), (5, 2), (6, 3)])
def test_every_shard_of_every_lost_node_comes_back_whichever_nodes_are_lost(count: int, parity: int) -> None:
    sizes = [[(3 + 5 * position) * BLOCK // 2 + position, 60 + position] for position in range(count)]
    with protected(sizes, parity, seed=count) as one:
        for lost in losses(count, parity):
            for rank in (rank for position in lost for rank in one.ranks_at(position)):
                assert one.comes_back(one.without(rank, *lost)) == [], f"nothing is doubtful, {lost} were lost"


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("blocks", [(BLOCK,), (MIB,), (2 * MIB, BLOCK, MIB // 2)], ids=["4 KiB", "1 MiB", "mixed"])
def test_shards_of_many_windows_come_back_although_as_many_nodes_are_lost_as_can_be(
    k: int, m: int, blocks: tuple[int, ...]
) -> None:
    sizes = [[3 * MIB + 4097 - position, MIB + position] for position in range(k + m)]
    with protected(sizes, m, blocks=blocks) as one:
        for rank in one.ranks_at(1):
            one.comes_back(one.without(rank, *range(1, m + 1)))


def test_shards_checked_in_blocks_of_different_sizes_come_back() -> None:
    with protected(UNEVEN, 2, blocks=(BLOCK, 4 * BLOCK, 2 * BLOCK)) as one:
        for position in range(4):
            for rank in one.ranks_at(position):
                one.comes_back(one.without(rank, position, (position + 1) % 4))


# --- whatever is left -------------------------------------------------------------------------------------------------


def counts(one: Group, rank: int, shards: Collection[int], parities: Collection[int]) -> tuple[int, int]:
    """The fewest symbols that are left: of any piece, where none counts that a missing shard reaches into, and of any
    unit of one, where a symbol counts unless a missing shard has bytes right there."""
    stripes, size, unit = one.stripes, one.layout.piece_bytes, one.layout.unit_bytes
    own = next(position for position in range(stripes.n) if rank in one.ranks_at(position))

    def is_there(position: int, stripe: int, begin: int, end: int) -> bool:
        piece = stripes.piece_of(stripe, position)
        if position == own or piece is None:
            return position != own and position in parities
        parts = geometry.segments(one.layout, position, piece * size + begin, piece * size + end)
        return all(part.shard is None or one.ranks_at(position)[part.shard] in shards for part in parts)

    by_piece, by_unit = stripes.n, stripes.n
    for piece, begin, end in geometry.pieces_over(one.layout, own, one.ranks_at(own).index(rank)):
        stripe = stripes.stripe_of(own, piece)
        by_piece = min(by_piece, sum(is_there(position, stripe, 0, size) for position in range(stripes.n)))
        for at in range(begin, end, unit):
            by_unit = min(by_unit, sum(is_there(position, stripe, at, at + unit) for position in range(stripes.n)))
    return by_piece, by_unit


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_a_shard_comes_back_from_any_k_symbols_of_each_stripe_and_from_fewer_it_is_lost(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 5))
    sizes = data.draw(
        st.lists(st.lists(st.integers(1, 6 * BLOCK), min_size=1, max_size=3), min_size=count, max_size=count)
    )
    parity = data.draw(st.integers(1, count - 1))
    blocks = data.draw(st.lists(st.sampled_from([BLOCK, 2 * BLOCK, 4 * BLOCK]), min_size=1, max_size=3))
    with (
        protected(sizes, parity, blocks=blocks, seed=data.draw(st.integers(0, 99))) as one,
        pytest.MonkeyPatch.context() as few,
    ):
        cut(few, *data.draw(cuts()))
        rank = data.draw(st.sampled_from(sorted(one.contents)))
        missing = data.draw(st.sets(st.sampled_from(sorted(one.contents)), max_size=parity + 1)) | {rank}
        unmade = data.draw(st.sets(st.integers(0, count - 1), max_size=parity))
        shards, parities = one.contents.keys() - missing, set(range(count)) - unmade
        by_piece, by_unit = counts(one, rank, shards, parities)
        job = one.job(rank, shards, parities)
        if parities and by_piece >= one.stripes.k:
            assert one.comes_back(job) == []
        elif not parities or by_unit < one.stripes.k:
            with pytest.raises(NotEnough):
                one.comes_back(job)
        else:  # enough of each unit is left, not of each piece: it may come back, but only as it was
            with contextlib.suppress(NotEnough):
                one.comes_back(job)


def test_too_few_pieces_are_said_to_be_too_few() -> None:
    with protected([[2 * BLOCK]] * 4, 1) as one:
        (rank,) = one.ranks_at(0)
        with pytest.raises(NotEnough) as error:
            one.comes_back(one.without(rank, 0, 2))
        assert str(error.value) == (
            f"of the 3 pieces that decode a part of rank {rank}'s shard only 2 are left with good bytes"
        )


def test_without_any_parity_set_nobody_knows_the_checksums() -> None:
    with protected([[BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        with pytest.raises(NotEnough, match=f"no parity set tells the checksums of rank {rank}'s shard"):
            one.comes_back(one.job(rank, one.contents.keys() - {rank}, []))


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_no_more_is_pulled_than_k_times_the_shard_and_a_description_and_all_of_it_is_paid_for() -> None:
    with protected([[3 * MIB + 5]] * 5, 2) as one:
        (rank,) = one.ranks_at(3)
        clock, before = FakeClock(), one.served_bytes()
        meter = Meter(1e6, clock)
        one.tools = Tools(Pool(), meter)
        one.comes_back(one.without(rank, 3, 4))
        pulled = one.served_bytes() - before
        assert pulled == meter.taken_bytes
        assert pulled <= one.stripes.k * (len(one.contents[rank]) + BLOCK) + parityset.meta_bytes(one.layout)
        assert pulled / 1e6 - reader.BURST_S <= clock.now_s - 100.0 + 1e-6
        one.tools.pool.close()


def test_how_far_it_is_only_grows_and_ends_at_the_shards_length(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, BLOCK, BLOCK, 2 * BLOCK, 8 * BLOCK)
    with protected(UNEVEN, 2) as one:
        one.shards[one.ranks_at(3)[0]].flip(0)
        job = one.without(one.ranks_at(0)[0], 0)
        seen, lock = [0], threading.Lock()

        def look() -> bool:
            with lock:
                seen.append(job.done_bytes)
            return False

        one.comes_back(job, look)
        assert seen == sorted(seen)
        assert (seen[1], job.done_bytes, job.total_bytes) == (0, 5 * BLOCK + 3, 5 * BLOCK + 3)


# --- what stops it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "kind"), [(refuses, SnapshotGone), (hangs_up, DaemonUnavailable), (breaks_off, DaemonUnavailable)]
)
def test_whichever_read_fails_the_slot_stays_unpublished_or_the_shard_comes_back_without_it(
    trouble: Callable[[object], None], kind: type[SnapshotError], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, BLOCK, BLOCK, 64 * BLOCK, 2 * BLOCK)
    with protected(UNEVEN, 1) as one:
        rank, reads = one.ranks_at(0)[0], Nth()
        one.before_each_read(reads.count_up)
        one.comes_back(one.without(rank, 0))
        failed = 0
        for number in range(1, reads.count + 1):
            due = Nth(number)
            one.before_each_read(lambda read, due=due: trouble(read) if due.due_now() else None)  # type: ignore[misc]
            try:
                one.comes_back(one.without(rank, 0))
            except (Refused, DaemonUnavailable) as error:
                assert isinstance(error, kind)
                assert one.newcomer.state == _native.FILLING
                failed += 1
        assert failed > 2, "only a description can be had from elsewhere, since k nodes are left"
        one.before_each_read(lambda _: None)
        one.comes_back(one.without(rank, 0))


def test_a_source_that_is_not_there_is_unavailable() -> None:
    with protected(UNEVEN, 1) as one:
        one.hosts[2].server.close()
        with pytest.raises(DaemonUnavailable, match=one.hosts[2].address):
            one.comes_back(one.without(one.ranks_at(0)[0], 0))


def test_a_parity_set_that_is_not_needed_need_not_be_there_unless_all_are_gone() -> None:
    with protected([[2 * BLOCK]] * 4, 2) as one:
        (rank,) = one.ranks_at(1)
        one.parities[0].native.empty(0)  # the first to be asked for the checksums, and no piece of it is needed
        assert one.comes_back(one.without(rank, 1)) == []
        for position in (2, 3):
            one.parities[position].native.empty(0)
        with pytest.raises(NotEnough) as error:
            one.comes_back(one.without(rank, 1))
        for position in (0, 2, 3):
            assert f"node{position}: slot 0 holds step 840" in str(error.value), "each says why it tells nothing"


def test_whenever_it_is_not_wanted_any_more_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, BLOCK, BLOCK, 2 * BLOCK, 8 * BLOCK)
    with protected(UNEVEN, 1) as one:
        rank, looks = one.ranks_at(0)[0], Nth()
        one.comes_back(one.without(rank, 0), looks.due)
        assert looks.count > 1
        for number in range(1, looks.count + 1):
            due = Nth(number)
            with pytest.raises(Cancelled):
                one.comes_back(one.without(rank, 0), due.due)
        one.comes_back(one.without(rank, 0))


@pytest.mark.parametrize("trouble", [refuses, hangs_up, breaks_off])
def test_whatever_stops_it_nothing_holds_on_to_the_slot_afterwards(trouble: Callable[[object], None]) -> None:
    """So the arena of a rebuild that failed can be freed at once, and not at some garbage collection."""
    with protected(UNEVEN, 1) as one, no_collection():
        rank = one.ranks_at(0)[0]
        with pytest.raises(Cancelled):
            one.comes_back(one.without(rank, 0), Nth(1).due)
        assert one.newcomer.is_free(), "cancelled"
        one.hosts[1].before = lambda read: trouble(read) if read.length else None
        with pytest.raises(SnapshotError):
            one.comes_back(one.without(rank, 0))
        assert one.newcomer.is_free()
        one.hosts[1].before = lambda _: None
        one.shards[one.ranks_at(2)[0]].flip(0)
        with pytest.raises(NotEnough):
            one.comes_back(one.without(rank, 0, 1))
        assert one.newcomer.is_free(), "not enough"
