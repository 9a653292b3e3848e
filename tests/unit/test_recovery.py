"""The choice of what to restore, against a plain twin and rule by rule."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.recovery import Choice, choose
from snapshotd.wire import ArenaReport, GenerationId, Inventory, Shard, SnapshotId

NODES = [bytes([node]) * 16 for node in range(3)]


def generation(number: int, nonce: int = 0) -> GenerationId:
    return GenerationId(number, bytes([nonce]) * 16)


def snapshot(step: int, number: int = 1) -> SnapshotId:
    return SnapshotId(generation(number), step)


def shard(
    made: SnapshotId, rank: int, world: int = 2, progress: str = "FULL", arena: int | None = None, slot: int = 0
) -> Shard:
    return Shard(made, bytes([rank if arena is None else arena]) * 16, slot, progress, rank, world, bytes(32), 1)


def arena(rank: int, ever_committed: bool, number: int = 1) -> ArenaReport:
    return ArenaReport(bytes([rank]) * 16, rank, generation(number), 1, 1, 0, ever_committed)


def inventory(
    *shards: Shard, node: int = 0, arenas: Sequence[ArenaReport] = (), damaged: Sequence[str] = ()
) -> Inventory:
    return Inventory(NODES[node], f"node{node}", list(shards), list(arenas), list(damaged))


def pair(step: int, progress: str = "FULL", number: int = 1, slot: int = 0) -> list[Shard]:
    return [shard(snapshot(step, number), rank, progress=progress, slot=slot) for rank in (0, 1)]


# --- rule by rule -------------------------------------------------------------------------------------


def test_the_newest_that_is_whole_is_chosen() -> None:
    choice = choose([inventory(*pair(5, "COMMITTED"), *pair(6, slot=1))])
    assert choice.snapshot == snapshot(6) and choice.world_size == 2
    assert "whole, though its commit was not finished" in choice.why


def test_a_newer_generation_wins_whatever_its_step() -> None:
    assert choose([inventory(*pair(900, "COMMITTED"), *pair(3, number=2, slot=1))]).snapshot == snapshot(3, 2)


def test_a_newer_one_that_misses_a_rank_is_passed_over_and_named() -> None:
    choice = choose([inventory(*pair(5, "COMMITTED"), shard(snapshot(6), 0, slot=1))])
    assert choice.snapshot == snapshot(5)
    assert "it is committed" in choice.why and "step 6" in choice.why and "rank 1 of 2 is missing" in choice.why


def test_shards_of_different_steps_never_meet() -> None:
    choice = choose([inventory(shard(snapshot(5), 0), shard(snapshot(6), 1))])
    assert choice.snapshot is None and not choice.sources


def test_shards_of_two_generations_with_the_same_number_never_meet() -> None:
    left, right = SnapshotId(generation(1, 0), 5), SnapshotId(generation(1, 1), 5)
    assert choose([inventory(shard(left, 0), shard(right, 1))]).snapshot is None


def test_half_filled_and_damaged_slots_are_no_source() -> None:
    for progress in ("FILLING", "DAMAGED", "EMPTY", "nonsense"):
        assert choose([inventory(*pair(5, progress))]).snapshot is None


def test_each_rank_is_served_from_where_its_shard_lies() -> None:
    choice = choose([inventory(shard(snapshot(5), 1), node=2), inventory(shard(snapshot(5), 0), node=1)])
    assert {rank: source.node for rank, source in choice.sources.items()} == {0: NODES[1], 1: NODES[2]}
    assert list(choice.sources) == [0, 1]


def test_a_snapshot_that_failed_its_checksum_is_not_chosen_again() -> None:
    both = inventory(*pair(5, "COMMITTED"), *pair(6, slot=1))
    choice = choose([both], excluded=[snapshot(6)])
    assert choice.snapshot == snapshot(5) and "failed their checksum" in choice.why
    assert choose([both], excluded=[snapshot(6), snapshot(5)]).lost


def test_a_checkpoint_of_the_users_own_wins_where_it_is_as_new() -> None:
    both = [inventory(*pair(5, "COMMITTED"))]
    assert choose(both, newer_than=4).snapshot == snapshot(5)
    for own in (5, 6):
        choice = choose(both, newer_than=own)
        assert choice.snapshot is None and not choice.lost and f"step {own}" in choice.why


def test_step_zero_of_the_users_own_is_a_checkpoint_too() -> None:
    assert not choose([inventory(arenas=[arena(0, True)])], newer_than=0).lost
    assert choose([inventory(*pair(1))], newer_than=0).snapshot == snapshot(1)


def test_a_fresh_job_has_nothing_and_lost_nothing() -> None:
    for nothing in ([], [inventory()], [inventory(arenas=[arena(0, False)])]):
        assert choose(nothing) == Choice(None, "nothing was ever committed for this job")


def test_an_attempt_that_was_never_committed_is_no_loss_and_is_named() -> None:
    choice = choose([inventory(shard(snapshot(5), 0))])
    assert choice.snapshot is None and not choice.lost
    assert "rank 1 of 2 is missing: never committed" in choice.why


@pytest.mark.parametrize(
    "left",
    [
        inventory(arenas=[arena(0, True)]),
        inventory(shard(snapshot(5), 0, progress="COMMITTED")),
        inventory(damaged=["the arena of rank 0 is damaged"]),
        inventory(shard(snapshot(5), 0), arenas=[arena(0, False), arena(1, True)]),
    ],
)
def test_what_was_committed_and_is_gone_is_a_loss(left: Inventory) -> None:
    choice = choose([left])
    assert choice.lost and choice.snapshot is None and "nothing older is left" in choice.why
    assert all(sentence in choice.why for sentence in left.damaged)


def test_whole_bytes_that_fail_their_checksum_are_a_loss_even_without_a_commit() -> None:
    assert choose([inventory(*pair(5))], excluded=[snapshot(5)]).lost


def test_a_world_size_that_shards_disagree_about_makes_a_snapshot_useless() -> None:
    choice = choose([inventory(shard(snapshot(5), 0, 2), shard(snapshot(5), 1, 3))])
    assert choice.snapshot is None and "disagree about the world size" in choice.why


def test_a_rank_beyond_the_world_is_no_rank() -> None:
    made = snapshot(5)
    choice = choose([inventory(shard(made, 0, 1), shard(made, 4, 1))])
    assert choice.snapshot is None and "rank 4 and a world size of 1" in choice.why


@pytest.mark.parametrize("world", [0, 2**62])
def test_a_world_size_from_a_damaged_header_neither_is_believed_nor_takes_for_ever(world: int) -> None:
    assert choose([inventory(shard(snapshot(5), 0, world))]).snapshot is None


def test_many_missing_ranks_are_not_all_listed() -> None:
    choice = choose([inventory(shard(snapshot(5), 0, 64))])
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8, … of 64 are missing" in choice.why


def test_two_looks_at_one_node_count_as_one() -> None:
    early, late = inventory(shard(snapshot(5), 0), shard(snapshot(5), 1, progress="FILLING")), inventory(*pair(5))
    assert choose([early, late]) == choose([late, early])
    assert choose([late, early]).snapshot == snapshot(5)


def test_damage_that_one_look_found_counts_for_all() -> None:
    good, bad = inventory(*pair(5)), inventory(shard(snapshot(5), 0), shard(snapshot(5), 1, progress="DAMAGED"))
    assert choose([good, bad]).snapshot is None and choose([bad, good]).snapshot is None


def test_one_rank_is_spoken_of_as_one() -> None:
    assert "its one shard is here" in choose([inventory(shard(snapshot(5), 0, 1))]).why


# --- against a plain twin -----------------------------------------------------------------------------

worlds = st.sampled_from([1, 2, 2, 2, 3])
snapshots = st.builds(SnapshotId, st.builds(generation, st.integers(1, 2), st.integers(0, 1)), st.integers(1, 3))
shards = st.builds(
    shard, snapshots, st.integers(0, 2), worlds, st.sampled_from(["FULL", "FULL", "COMMITTED", "FILLING", "DAMAGED"]),
    st.integers(0, 3), st.integers(0, 1),
)  # fmt: skip
inventories = st.lists(
    st.builds(
        Inventory, st.sampled_from(NODES), st.just("a node"), st.lists(shards, max_size=6),
        st.lists(st.builds(arena, st.integers(0, 2), st.booleans()), max_size=2),
        st.lists(st.sampled_from(["slot 1 is damaged", "an arena is damaged"]), max_size=1),
    ),
    max_size=4,
)  # fmt: skip


def plainly(found: Sequence[Inventory], excluded: Collection[SnapshotId]) -> SnapshotId | None:
    """The newest snapshot of which every rank has a usable shard, said without cleverness."""
    looks = [((one.node, look.arena, look.slot, look.snapshot), look) for one in found for look in one.shards]
    damaged = {place for place, look in looks if look.progress == "DAMAGED"}
    whole: list[tuple[int, int, bytes]] = []
    for made in {look.snapshot for _, look in looks} - set(excluded):
        usable = [
            look
            for place, look in looks
            if look.snapshot == made and place not in damaged and look.progress in ("FULL", "COMMITTED")
        ]
        sizes, ranks = {look.world_size for look in usable}, {look.rank for look in usable}
        if len(sizes) == 1 and ranks == set(range(*sizes)):
            whole.append((made.generation.number, made.step, made.generation.nonce))
    if not whole:
        return None
    number, step, nonce = max(whole)
    return SnapshotId(GenerationId(number, nonce), step)


def one_slot_holds_one_shard(found: Sequence[Inventory]) -> bool:
    """Looks at the same slot may differ in progress and in nothing else."""
    seen: dict[object, object] = {}
    for one in found:
        for look in one.shards:
            facts = look.rank, look.world_size
            if seen.setdefault((one.node, look.arena, look.slot, look.snapshot), facts) != facts:
                return False
    return True


consistent = inventories.filter(one_slot_holds_one_shard)


@settings(max_examples=600)
@given(consistent, st.lists(snapshots, max_size=2))
def test_the_choice_is_that_of_the_plain_twin(found: list[Inventory], excluded: list[SnapshotId]) -> None:
    choice = choose(found, excluded=excluded)
    assert choice.snapshot == plainly(found, excluded)
    assert choice.why and not (choice.lost and choice.snapshot)
    if choice.snapshot is not None:
        assert sorted(choice.sources) == list(range(choice.world_size))
        here = {(one.node, look.arena, look.slot) for one in found for look in one.shards}
        for rank, source in choice.sources.items():
            assert source.shard.snapshot == choice.snapshot and source.shard.rank == rank
            assert source.shard.progress in ("FULL", "COMMITTED")
            assert (source.node, source.shard.arena, source.shard.slot) in here


@settings(max_examples=300)
@given(inventories, st.lists(snapshots, max_size=2), st.none() | st.integers(0, 3), st.integers(0, 99))
def test_every_rank_chooses_alike_in_whatever_order_the_inventories_came(
    found: list[Inventory], excluded: list[SnapshotId], newer_than: int | None, seed: int
) -> None:
    draw = random.Random(seed)
    mixed = []
    for one in draw.sample(found, len(found)):
        shuffled = draw.sample(one.shards, len(one.shards))
        mixed.append(Inventory(one.node, one.label, shuffled, one.arenas, one.damaged))
    first = choose(found, excluded=excluded, newer_than=newer_than)
    assert choose(mixed, excluded=excluded, newer_than=newer_than) == first


@settings(max_examples=300)
@given(consistent, st.integers(0, 4))
def test_what_is_restored_is_newer_than_the_users_own(found: list[Inventory], own: int) -> None:
    choice = choose(found, newer_than=own)
    plain = plainly(found, ())
    assert choice.snapshot == (plain if plain is not None and plain.step > own else None)
    assert not choice.lost


@settings(max_examples=300)
@given(consistent)
def test_a_loss_is_only_what_existed(found: list[Inventory]) -> None:
    choice = choose(found)
    existed = any(
        one.damaged or any(report.ever_committed for report in one.arenas)
        or any(look.progress == "COMMITTED" for look in one.shards)
        for one in found
    )  # fmt: skip
    assert choice.lost == (existed and choice.snapshot is None)
