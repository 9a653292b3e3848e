"""Blocks that rotted in a shard or a parity set come back from the rest of the group, and nothing else is written."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import parityset
from snapshotd.combine import Cancelled
from snapshotd.repair import Repaired, Target, repair
from tests.unit.groups import JOB, SNAPSHOT, Group, Stored, protected
from tests.unit.native_support import BLOCK


def target(one: Group, position: int, rank: int | None) -> Target:
    """A slot at this position, and everything that the group has."""
    return Target(
        JOB, SNAPSHOT, one.layout, position, rank,
        {rank: stored.holding for rank, stored in one.shards.items()},
        {other: stored.holding for other, stored in one.parities.items() if rank is not None or other != position},
    )  # fmt: skip


def bad_blocks(stored: Stored) -> list[int]:
    return stored.native.verify(0)


def mend(one: Group, position: int, rank: int | None) -> Repaired:
    """Repair whatever is bad in a slot."""
    stored = one.parities[position] if rank is None else one.shards[rank]
    return repair(target(one, position, rank), stored.native, 0, bad_blocks(stored), one.tools, lambda: False)


def looks(stored: Stored) -> tuple[bytes, bytes]:
    """Every byte of the slot and of its table."""
    return stored.slot, stored.native.crc_words(0)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_whatever_rots_on_one_node_is_put_back_byte_for_byte(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 4), "nodes")
    parity = data.draw(st.integers(1, n - 1), "parity")
    sizes = [[data.draw(st.integers(1, 4 * BLOCK)) for _ in range(data.draw(st.integers(1, 2)))] for _ in range(n)]
    with protected(sizes, parity, blocks=(BLOCK, 2 * BLOCK)) as one:
        position = data.draw(st.integers(0, n - 1), "position")
        rank = data.draw(st.sampled_from([None, *one.ranks_at(position)]), "rank")
        stored = one.parities[position] if rank is None else one.shards[rank]
        was = looks(stored)
        blocks = len(stored.native.block_crcs(0))
        for block in data.draw(st.sets(st.integers(0, blocks - 1), min_size=1, max_size=4), "blocks"):
            if data.draw(st.booleans(), "in the table"):
                stored.flip_table(block, data.draw(st.integers(0, 7)))
            else:
                stored.flip(min(block * stored.native.block_bytes, stored.file_bytes - 1), data.draw(st.integers(0, 7)))
        bad = bad_blocks(stored)
        assert bad
        assert mend(one, position, rank) == Repaired(bad)
        assert looks(stored) == was


def test_a_block_that_rotted_with_its_checksum_comes_back_in_a_shard_whose_checksums_others_know() -> None:
    with protected([[3 * BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        was = looks(one.shards[rank])
        one.shards[rank].flip(BLOCK + 5)
        one.shards[rank].flip_table(1)
        assert mend(one, 0, rank) == Repaired([1])
        assert looks(one.shards[rank]) == was


def test_a_block_of_parity_that_rotted_with_its_checksum_is_left_as_it_is_since_nothing_bears_it_out() -> None:
    with protected([[3 * BLOCK]] * 3, 1) as one:
        stored = one.parities[0]
        last = len(stored.native.block_crcs(0)) - 1
        stored.flip(stored.file_bytes - 1)
        stored.flip_table(last)
        was = looks(stored)
        done = mend(one, 0, None)
        assert (done.blocks, done.beyond_help) == ([], True)
        assert done.why == f"block {last} of a parity set was made anew and neither its bytes nor its checksum agree"
        assert looks(stored) == was


def test_bad_bytes_in_another_shard_are_passed_over_and_named() -> None:
    with protected([[2 * BLOCK]] * 4, 2) as one:
        (rank,), (other,) = one.ranks_at(0), one.ranks_at(1)
        was = looks(one.shards[rank])
        for block in (0, 1):
            one.shards[other].flip(block * BLOCK)
            one.shards[rank].flip(block * BLOCK)
        wanted = target(one, 0, rank)
        done = repair(wanted, one.shards[rank].native, 0, [0, 1], one.tools, lambda: False)
        assert done == Repaired([0, 1])
        assert looks(one.shards[rank]) == was
        assert {one.shards[other].holding} == set(wanted.doubtful)


def test_what_the_rest_of_the_group_cannot_tell_is_left_as_it_is_and_said_to_be_beyond_help() -> None:
    with protected([[2 * BLOCK]] * 3, 1) as one:
        ranks = [one.ranks_at(position)[0] for position in range(3)]
        for rank in ranks:
            one.shards[rank].flip(0)
            one.shards[rank].flip(BLOCK)
        was = looks(one.shards[ranks[0]])
        done = mend(one, 0, ranks[0])
        assert done.beyond_help and not done.blocks
        assert "only 1 are left with good bytes" in done.why
        assert looks(one.shards[ranks[0]]) == was


def test_a_peer_that_cannot_be_read_is_no_reason_to_give_a_block_up() -> None:
    with protected([[2 * BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        one.shards[rank].flip(0)
        for host in one.hosts[1:]:
            host.server.close()
        done = mend(one, 0, rank)
        assert (done.blocks, done.beyond_help) == ([], False)
        assert done.why


def test_only_what_is_wrong_is_written() -> None:
    """Readers read a slot while it is repaired: nobody may see other bytes than the right ones in a good block."""
    with protected([[3 * BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        stored = one.shards[rank]
        stored.flip(BLOCK)
        good = os.pread(stored.fd, 2 * BLOCK, stored.native.slot_offset(0) + BLOCK)
        seen: list[bytes] = []
        one.before_each_read(
            lambda _: seen.append(os.pread(stored.fd, 2 * BLOCK, stored.native.slot_offset(0) + BLOCK))
        )
        assert mend(one, 0, rank) == Repaired([1])
        assert seen and all(look == good for look in seen), "until the block is known nothing is touched"


def test_a_repair_that_nobody_wants_any_more_ends() -> None:
    with protected([[2 * BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        one.shards[rank].flip(0)
        with pytest.raises(Cancelled):
            repair(target(one, 0, rank), one.shards[rank].native, 0, [0], one.tools, lambda: True)


@pytest.mark.parametrize("place", [0, 14, parityset.HEAD_BYTES + 40])
def test_a_parity_sets_description_is_written_anew_from_anothers(place: int) -> None:
    with protected([[2 * BLOCK]] * 3, 1) as one:
        stored = one.parities[2]
        was = looks(stored)
        stored.flip(place)
        assert mend(one, 2, None) == Repaired([0])
        assert looks(stored) == was
