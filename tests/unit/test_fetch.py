"""A shard that a survivor keeps is copied to where its rank goes on, and decoded where the copy cannot be had or
believed."""

from __future__ import annotations

import pytest

from snapshotd import _native, fetch, rebuild
from snapshotd.combine import Cancelled
from snapshotd.manifest import round_up
from snapshotd.wire import Holding
from tests.unit.groups import Group, Stored, protected, table_twin
from tests.unit.native_support import BLOCK

SIZES = [[3 * BLOCK + 17], [5 * BLOCK, 100], [2 * BLOCK - 1], [4 * BLOCK]]
LOST, KEEPER = 1, 3


def foster(one: Group, rank: int, data: bytes | None = None) -> Stored:
    """The shard of a lost node, as a survivor keeps it."""
    kept = one.contents[rank] if data is None else data
    room = one.hosts[KEEPER].room(max(BLOCK, round_up(len(kept), BLOCK)), BLOCK)
    room.store(rank, kept)
    return room


def job_with(one: Group, rank: int, kept: Stored) -> rebuild.Job:
    """To be regained from what the survivors hold, the foster among it."""
    job = one.without(rank, LOST)
    job.shards = {**job.shards, rank: kept.holding}
    return job


def regained(one: Group, job: rebuild.Job) -> list[Holding]:
    """The shard in a newcomer's arena, byte for byte and with its table; returns what is doubtful."""
    expected = one.contents[job.rank]
    one.newcomer.close()
    one.newcomer = Stored(round_up(len(expected), BLOCK) + 2 * BLOCK, BLOCK)
    one.newcomer.claim(job.rank, job.shape.fingerprint)
    doubtful = fetch.regain(job, one.newcomer.native, 0, one.tools, lambda: False)
    assert one.newcomer.state == _native.FILLING, "publishing is the caller's"
    one.newcomer.native.publish(0, job.shape.file_bytes)
    assert one.newcomer.slot[: len(expected)] == expected
    assert not any(one.newcomer.slot[len(expected) :]), "behind the end of the file are zeros"
    assert one.newcomer.native.crc_words(0) == table_twin(expected, job.shape.block_bytes)
    assert job.done_bytes == job.total_bytes and job.wrong_blocks == 0
    return doubtful


def test_every_shard_is_copied_from_its_keeper_and_nothing_but_descriptions_is_read_elsewhere() -> None:
    with protected(SIZES, 1) as one:
        for rank in one.ranks_at(LOST):
            job = job_with(one, rank, foster(one, rank))
            before = [host.served_bytes for host in one.hosts]
            assert regained(one, job) == []
            served = [host.served_bytes - was for host, was in zip(one.hosts, before, strict=True)]
            assert served[KEEPER] == len(one.contents[rank])
            assert served[2] == 0 and served[LOST] == 0


@pytest.mark.parametrize("place", [0, BLOCK + 5, 5 * BLOCK - 1])
def test_a_bit_that_turned_over_at_the_keeper_is_never_copied(place: int) -> None:
    with protected(SIZES, 1) as one:
        rank = one.ranks_at(LOST)[0]
        kept = foster(one, rank)
        kept.flip(place, bit=3)
        assert regained(one, job_with(one, rank, kept)) == [kept.holding]


def test_other_bytes_with_right_checksums_are_not_believed() -> None:
    with protected(SIZES, 1) as one:
        rank = one.ranks_at(LOST)[0]
        other = bytes(len(one.contents[rank]))
        assert regained(one, job_with(one, rank, foster(one, rank, other))) == []


def test_where_the_keeper_has_it_no_more_it_is_decoded() -> None:
    with protected(SIZES, 1) as one:
        rank = one.ranks_at(LOST)[1]
        kept = foster(one, rank)
        job = job_with(one, rank, kept)
        kept.native.empty(0)
        assert regained(one, job) == []


def test_whoever_gives_it_up_ends_it() -> None:
    with protected(SIZES, 1) as one:
        rank = one.ranks_at(LOST)[0]
        job = job_with(one, rank, foster(one, rank))
        one.newcomer.close()
        one.newcomer = Stored(round_up(job.total_bytes, BLOCK), BLOCK)
        one.newcomer.claim(rank)
        with pytest.raises(Cancelled):
            fetch.regain(job, one.newcomer.native, 0, one.tools, lambda: True)
