"""A byte that fails its checksum counts as lost: the shard is decoded from others, or it is lost, and never wrong."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import geometry, parityset
from snapshotd.rebuild import NotEnough
from snapshotd.wire import SnapshotId
from tests.unit.group_faults import cut, cuts
from tests.unit.groups import SNAPSHOT, Group, others, piece_of, protected
from tests.unit.native_support import BLOCK

MIB = 1 << 20
EVEN = [[6 * BLOCK]] * 5  # with m = 2 pieces of two blocks, so a shard has three


# --- in data and parity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_table", [False, True], ids=["a byte", "a checksum"])
@pytest.mark.parametrize("piece", [0, 1, 2])
def test_a_bad_block_in_data_is_decoded_around_and_its_source_is_doubtful(piece: int, in_table: bool) -> None:
    with protected(EVEN, 2) as one:
        (rank,) = one.ranks_at(0)
        stripe = one.stripes.stripe_of(0, piece)
        bad, begin = piece_of(one, others(one, stripe, 0)[0], stripe)
        if in_table:
            bad.flip_table(begin // BLOCK + 1)
        else:
            bad.flip(begin + BLOCK + 17)
        assert set(one.comes_back(one.without(rank, 0))) == {bad.holding}


@pytest.mark.parametrize("in_table", [False, True], ids=["a byte", "a checksum"])
def test_a_bad_block_in_parity_is_decoded_around_and_its_source_is_doubtful(in_table: bool) -> None:
    with protected(EVEN, 2) as one:
        (rank,) = one.ranks_at(0)
        stripe = one.stripes.stripe_of(0, 0)
        first_parity = next(p for p in others(one, stripe, 0) if one.stripes.symbol_of(stripe, p) == one.stripes.k)
        bad, begin = piece_of(one, first_parity, stripe)
        if in_table:
            bad.flip_table(begin // BLOCK)
        else:
            bad.flip(begin)
        assert set(one.comes_back(one.without(rank, 0))) == {bad.holding}


def test_as_many_bad_sources_as_there_is_parity_to_spare_are_all_found_and_one_more_loses_the_shard() -> None:
    with protected([[4 * BLOCK]] * 5, 3) as one:
        (rank,) = one.ranks_at(0)
        stripe = one.stripes.stripe_of(0, 0)
        places = [piece_of(one, position, stripe) for position in others(one, stripe, 0)]
        for stored, begin in places[:2]:
            stored.flip(begin)
        assert set(one.comes_back(one.without(rank, 0))) == {stored.holding for stored, _ in places[:2]}
        stored, begin = places[2]
        stored.flip(begin)
        with pytest.raises(NotEnough) as error:
            one.comes_back(one.without(rank, 0))
        assert str(error.value) == (
            f"of the 2 pieces that decode a part of rank {rank}'s shard only 1 are left with good bytes"
        )


def test_a_lost_node_and_a_bad_block_beside_it_are_too_much_for_one_parity() -> None:
    with protected([[4 * BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        one.shards[one.ranks_at(1)[0]].flip(0)
        with pytest.raises(NotEnough, match="only 1 are left with good bytes"):
            one.comes_back(one.without(rank, 0))


@pytest.mark.parametrize("in_table", [False, True], ids=["a byte", "a checksum"])
@pytest.mark.parametrize("block", [BLOCK, MIB // 2, 2 * MIB])
@pytest.mark.parametrize("place", [0, 2 * MIB + 5, 4 * MIB - 1])
def test_a_bad_block_in_the_middle_of_a_large_piece_is_decoded_around(place: int, block: int, in_table: bool) -> None:
    with protected([[8 * MIB]] * 4, 2, blocks=(block,)) as one:
        (rank,) = one.ranks_at(0)
        stripe = one.stripes.stripe_of(0, 0)
        bad, begin = piece_of(one, others(one, stripe, 0)[0], stripe)
        if in_table:
            bad.flip_table((begin + place) // block)
        else:
            bad.flip(begin + place)
        assert set(one.comes_back(one.without(rank, 0))) == {bad.holding}


def good_symbols(one: Group, window: int) -> int:
    """The fewest that any window of the first node's shard has left, as far as the arenas' own checksums tell."""
    size, left = one.layout.piece_bytes, []
    for piece, begin, end in geometry.pieces_over(one.layout, 0, 0):
        stripe = one.stripes.stripe_of(0, piece)
        bad = []
        for position in range(1, one.stripes.n):
            stored, first = piece_of(one, position, stripe)
            places = (block * BLOCK - first for block in stored.native.verify(0))
            bad.append([place for place in places if 0 <= place < size])
        for at in range(begin, end, window):
            reached = min(at + window, end)
            left.append(sum(not any(at <= place < reached for place in places) for places in bad))
    return min(left)


def sound_descriptions(one: Group) -> int:
    """How many of the other nodes tell the checksums."""
    blocks = parityset.meta_bytes(one.layout) // BLOCK
    return sum(min(one.parities[p].native.verify(0), default=blocks) >= blocks for p in range(1, one.stripes.n))


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_whatever_is_damaged_each_window_comes_back_from_any_k_good_symbols_and_is_never_wrong(
    data: st.DataObject,
) -> None:
    count = data.draw(st.integers(3, 5))
    parity = data.draw(st.integers(1, count - 1))
    sizes = [[data.draw(st.integers(1, 8 * BLOCK))] for _ in range(count)]
    with protected(sizes, parity) as one, pytest.MonkeyPatch.context() as few:
        window, part, segment, read = data.draw(cuts())
        cut(few, window, part, segment, read)
        (rank,) = one.ranks_at(0)
        for _ in range(data.draw(st.integers(1, 8))):
            position = data.draw(st.integers(1, count - 1))
            stored = data.draw(st.sampled_from([one.shards[one.ranks_at(position)[0]], one.parities[position]]))
            place = data.draw(st.integers(0, stored.file_bytes - 1))
            if data.draw(st.booleans()):
                stored.flip_table(place // BLOCK, data.draw(st.integers(0, 7)))
            else:
                stored.flip(place, data.draw(st.integers(0, 7)))
        everything = [*one.shards.values(), *one.parities.values()]
        damaged = {stored.holding for stored in everything if stored.native.verify(0)}
        described = sound_descriptions(one)
        if described and good_symbols(one, window) >= one.stripes.k:
            assert set(one.comes_back(one.without(rank, 0))) <= damaged
        elif not described or good_symbols(one, BLOCK) < one.stripes.k:
            with pytest.raises(NotEnough):
                one.comes_back(one.without(rank, 0))
        else:  # enough good blocks are left in every column, and not in every window
            with contextlib.suppress(NotEnough):
                one.comes_back(one.without(rank, 0))


def test_bad_blocks_of_different_windows_do_not_add_up() -> None:
    """Each column has the two good symbols that it needs, though no two symbols are good from end to end."""
    with protected([[8 * BLOCK]] * 4, 2) as one, pytest.MonkeyPatch.context() as few:
        cut(few, BLOCK, BLOCK, 64 * BLOCK, 64 * BLOCK)
        (rank,) = one.ranks_at(0)
        stripe = one.stripes.stripe_of(0, 0)
        first, second, _ = (piece_of(one, position, stripe) for position in others(one, stripe, 0))
        first[0].flip(first[1])
        second[0].flip(second[1] + 3 * BLOCK)
        assert set(one.comes_back(one.without(rank, 0))) == {first[0].holding, second[0].holding}


# --- in descriptions --------------------------------------------------------------------------------------------------


def rewrite(one: Group, position: int, described: parityset.Description) -> None:
    """A parity set that says this, with checksums that agree."""
    native = one.parities[position].native
    packed = parityset.pack(described).ljust(parityset.meta_bytes(one.layout), b"\0")
    with native.slot_view(0) as view:
        view[: len(packed)] = packed
    native.set_block_crcs(0, parityset.file_bytes(one.layout))


def description(one: Group, position: int) -> parityset.Description:
    """What a parity set says."""
    return parityset.read(one.parities[position].slot)


@pytest.mark.parametrize("place", [0, 14, 300, BLOCK - 1])
def test_a_flipped_bit_in_a_description_has_another_sets_description_used(place: int) -> None:
    with protected([[2 * BLOCK]] * 4, 2) as one:
        (rank,) = one.ranks_at(0)
        bad = one.parities[1]
        bad.flip(place)
        assert set(one.comes_back(one.without(rank, 0))) <= {bad.holding}
        for position in (2, 3):
            one.parities[position].flip(place)
        with pytest.raises(NotEnough) as error:
            one.comes_back(one.without(rank, 0))
        assert f"no parity set tells the checksums of rank {rank}'s shard" in str(error.value)
        assert str(error.value).count("a block in slot 0 of node") == 3, "each says why"


def test_a_parity_set_whose_description_is_damaged_is_doubtful() -> None:
    with protected([[2 * BLOCK]] * 4, 2) as one:
        (rank,) = one.ranks_at(0)
        one.parities[1].flip(20)
        assert one.comes_back(one.without(rank, 0)) == [one.parities[1].holding]


@pytest.mark.parametrize("what", ["snapshot", "position", "layout"])
def test_a_description_of_something_else_is_not_believed(what: str) -> None:
    with protected([[2 * BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        shapes = [[msgspec.structs.replace(row[0], fingerprint=bytes(32))] for row in one.layout.positions]
        changes = {
            "snapshot": SnapshotId(SNAPSHOT.generation, SNAPSHOT.step + 1),
            "position": 0,
            "layout": geometry.lay_out(shapes, 1),
        }
        amiss = {what: changes[what]}
        rewrite(one, 1, msgspec.structs.replace(description(one, 1), **amiss))
        one.comes_back(one.without(rank, 0))
        rewrite(one, 2, msgspec.structs.replace(description(one, 2), **amiss))
        with pytest.raises(NotEnough) as error:
            one.comes_back(one.without(rank, 0))
        assert str(error.value).count("its parity set is of something else") == 2


def test_bytes_that_a_description_does_not_bear_out_are_not_believed() -> None:
    with protected([[3 * BLOCK + 5]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        told = description(one, 1)
        table = told.tables[0][0]
        wrong = bytes([table[0] ^ 1]) + table[1:8] + bytes([table[8] ^ 1]) + table[9:]
        rewrite(one, 1, msgspec.structs.replace(told, tables=[[wrong], *told.tables[1:]]))
        with pytest.raises(NotEnough) as error:
            one.comes_back(one.without(rank, 0))
        assert str(error.value) == f"2 of 4 decoded blocks of rank {rank}'s shard differ from their checksums"


@given(st.binary(min_size=1, max_size=200))
@settings(deadline=None, max_examples=30)
def test_noise_in_the_place_of_a_description_is_not_believed(noise: bytes) -> None:
    with protected([[2 * BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        native = one.parities[1].native
        with native.slot_view(0) as view:
            view[: len(noise)] = noise
        native.set_block_crcs(0, parityset.file_bytes(one.layout))
        one.comes_back(one.without(rank, 0))
