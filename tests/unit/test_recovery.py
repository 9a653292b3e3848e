"""The choice of what to restore, on one node and on several, against plain twins and rule by rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import geometry
from snapshotd.recovery import (
    PARITY,
    Assignment,
    BadPlace,
    Choice,
    Rebuilding,
    assign,
    choose,
    groups_of,
    margins,
    previous_places,
)
from snapshotd.wire import (
    ArenaReport,
    GenerationId,
    GroupLayout,
    Inventory,
    ParityReport,
    Shard,
    ShardShape,
    SnapshotId,
)

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


# --- several nodes: rule by rule ----------------------------------------------------------------------

BLOCK = 4096
replace = msgspec.structs.replace


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def fingerprint(rank: int) -> bytes:
    return bytes([rank]) * 32


@dataclass(frozen=True)
class Cluster:
    """Nodes of a job, the ranks of each by node, their groups, and how large each rank's shard is."""

    ranks: Mapping[bytes, Sequence[int]]
    groups: Sequence[Sequence[bytes]]
    parity: int
    sizes: Mapping[int, int]

    @property
    def world(self) -> int:
        return sum(len(ranks) for ranks in self.ranks.values())

    def group_of(self, node: bytes) -> Sequence[bytes]:
        return next(group for group in self.groups if node in group)

    def layout(self, group: Sequence[bytes]) -> GroupLayout:
        rows = [
            [ShardShape(rank, self.sizes[rank], BLOCK, fingerprint(rank)) for rank in self.ranks[node]]
            for node in group
        ]
        return geometry.lay_out(rows, geometry.parity_for(self.parity, len(group)))

    def shards(self, node: bytes, made: SnapshotId, progress: str = "PROTECTED") -> list[Shard]:
        return [
            Shard(made, self.arena_of(rank), made.step % 2, progress, rank, self.world, fingerprint(rank),
                  self.sizes[rank], BLOCK)
            for rank in self.ranks[node]
        ]  # fmt: skip

    def parities(self, node: bytes, made: SnapshotId, progress: str = "FULL") -> list[ParityReport]:
        group = self.group_of(node)
        if geometry.parity_for(self.parity, len(group)) == 0 or not any(self.ranks[one] for one in group):
            return []
        position = list(group).index(node)
        parity_arena = bytes([255]) + node[1:]
        return [ParityReport(made, parity_arena, made.step % 2, progress, position, self.layout(group))]

    def arena_of(self, rank: int) -> bytes:
        return bytes([1]) * 15 + bytes([rank])

    def arenas(self, node: bytes, ever_committed: bool = True, room: int = 0) -> list[ArenaReport]:
        return [
            ArenaReport(self.arena_of(rank), rank, generation(1), 64 * BLOCK, BLOCK, 0, ever_committed, None, room)
            for rank in self.ranks[node]
        ]

    def inventory(self, node: bytes, made: Sequence[SnapshotId], progress: str = "PROTECTED") -> Inventory:
        shards = [one for each in made for one in self.shards(node, each, progress)]
        parities = [one for each in made for one in self.parities(node, each)]
        return Inventory(node, f"node {node[-1]}", shards, self.arenas(node), [], parities)

    def inventories(self, *steps: int, without: Collection[bytes] = (), progress: str = "PROTECTED") -> list[Inventory]:
        made = [snapshot(step) for step in steps]
        return [self.inventory(node, made, progress) for node in self.ranks if node not in without]


def cluster(*ranks_per_node: int, group_size: int = 8, parity: int = 1, size: int = 50_000) -> Cluster:
    """Ranks are dealt in the order of the nodes, whose groups come one after another."""
    nodes, ranks, dealt = [name(number) for number in range(len(ranks_per_node))], {}, 0
    for node, count in zip(nodes, ranks_per_node, strict=True):
        ranks[node] = list(range(dealt, dealt + count))
        dealt += count
    groups = [nodes[first : first + group_size] for first in range(0, len(nodes), group_size)]
    return Cluster(ranks, groups, parity, dict.fromkeys(range(dealt), size))


FOUR = cluster(1, 1, 1, 1, parity=1)


def test_what_is_on_a_lost_node_is_rebuilt_from_the_rest_of_its_group() -> None:
    choice = choose(FOUR.inventories(12, without=[name(2)], progress="COMMITTED"))
    assert choice.why == (
        "step 12 (generation 1-000000) is the newest that is whole or can be rebuilt: 3 of 4 shards are here, 1 will "
        "be rebuilt from parity, and it is committed"
    )
    assert (choice.snapshot, choice.world_size, list(choice.sources)) == (snapshot(12), 4, [0, 1, 3])
    how = choice.missing[2]
    assert list(choice.missing) == [2] and how.position == 2 and how.layout == FOUR.layout(FOUR.groups[0])
    assert list(how.shards) == [0, 1, 3] and list(how.parities) == [0, 1, 3]
    assert {position: one.node for position, one in how.parities.items()} == {0: name(0), 1: name(1), 3: name(3)}


def test_what_was_not_committed_yet_is_rebuilt_too_and_says_so() -> None:
    choice = choose(FOUR.inventories(12, without=[name(2)]))
    assert choice.snapshot == snapshot(12)
    assert "1 will be rebuilt from parity, though its commit was not finished" in choice.why


def test_a_group_that_lost_too_much_says_how_much_it_kept() -> None:
    gone = [name(2), name(3)]
    choice = choose(FOUR.inventories(840, without=gone))
    assert choice.lost and choice.snapshot is None and not choice.sources and not choice.missing
    assert choice.why == (
        "step 840 (generation 1-000000): ranks 2 and 3 are missing and their group of 4 nodes kept 2 of the 3 pieces "
        "it needs; nothing older is left"
    )


def test_a_newest_attempt_that_cannot_be_rebuilt_gives_way_to_an_older_one() -> None:
    inventories = FOUR.inventories(5, without=[name(1)], progress="COMMITTED")
    newer = [replace(one, shards=[*one.shards, *FOUR.shards(one.node, snapshot(6), "FULL")]) for one in inventories]
    choice = choose(newer)
    assert choice.snapshot == snapshot(5) and list(choice.missing) == [1]
    assert choice.why.endswith("passed over: step 6 (generation 1-000000): rank 1 of 4 is missing")


def test_a_rank_whose_group_left_nothing_is_told_from_one_whose_group_left_too_little() -> None:
    pairs = cluster(1, 1, 1, 1, group_size=2)
    choice = choose(pairs.inventories(5, without=[name(2), name(3)]))
    assert "ranks 2, 3 of 4 are missing and no parity of them is left" in choice.why
    inventories = FOUR.inventories(5, without=[name(1)])
    inventories[0] = replace(inventories[0], parities=[])
    inventories[2] = replace(inventories[2], parities=[])
    why = choose(inventories).why
    assert "rank 1 is missing and its group of 4 nodes kept 2 of the 3 pieces it needs" in why


def test_bytes_that_failed_their_checksum_count_as_lost_and_are_rebuilt() -> None:
    whole = FOUR.inventories(5)
    spoiled: list[BadPlace] = [(snapshot(5), 1, FOUR.arena_of(1))]
    choice = choose(whole, bad=spoiled)
    assert list(choice.missing) == [1] and list(choice.sources) == [0, 2, 3]
    parity_too = [*spoiled, (snapshot(5), PARITY, whole[0].parities[0].arena)]
    choice = choose(whole, bad=parity_too)
    assert choice.lost and choice.snapshot is None
    assert "kept 2 of the 3 pieces it needs; the bytes of rank 1 failed their checksum" in choice.why
    assert choose(whole, bad=[(snapshot(5), PARITY, one.parities[0].arena) for one in whole]).missing == {}
    assert choose(whole, bad=[(snapshot(4), 1, FOUR.arena_of(1)), (snapshot(5), 1, bytes(16))]).missing == {}


def test_bad_bytes_are_a_loss_even_without_a_commit() -> None:
    assert choose([inventory(*pair(5))], bad=[(snapshot(5), 1, bytes([1]) * 16)]).lost


def test_a_good_copy_elsewhere_is_read_where_one_is_bad() -> None:
    copy = replace(FOUR.shards(name(1), snapshot(5))[0], arena=bytes([9]) * 16)
    inventories = [*FOUR.inventories(5), Inventory(name(77), "a spare", [copy], [])]
    choice = choose(inventories, bad=[(snapshot(5), 1, FOUR.arena_of(1))])
    assert not choice.missing and choice.sources[1].node == name(77)
    assert choose(inventories).sources[1].node == name(1)


def test_of_several_copies_the_most_advanced_is_read() -> None:
    copy = replace(FOUR.shards(name(1), snapshot(5), "COMMITTED")[0], arena=bytes([9]) * 16)
    choice = choose([*FOUR.inventories(5), Inventory(name(77), "a spare", [copy], [])])
    assert choice.sources[1].node == name(77)


@pytest.mark.parametrize("progress", ["FILLING", "DAMAGED", "EMPTY", "nonsense"])
def test_parity_that_is_not_complete_rebuilds_nothing(progress: str) -> None:
    inventories = [
        replace(one, parities=[replace(report, progress=progress) for report in one.parities])
        for one in FOUR.inventories(5, without=[name(1)])
    ]
    choice = choose(inventories)
    assert choice.lost and "rank 1 of 4 is missing; nothing older" in choice.why


def test_parity_that_one_look_found_damaged_is_damaged() -> None:
    good = FOUR.inventories(5, without=[name(1)])
    worse = replace(good[0], parities=[replace(good[0].parities[0], progress="DAMAGED")])
    assert choose([*good, worse]).lost and choose([worse, *good]).lost


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: replace(report, layout=replace(report.layout, piece_bytes=report.layout.piece_bytes + BLOCK)),
        lambda report: replace(report, layout=replace(report.layout, parity=200)),
        lambda report: replace(report, position=4),
        lambda report: replace(
            report,
            layout=geometry.lay_out([*report.layout.positions[:3], [ShardShape(4, 50_000, BLOCK, fingerprint(4))]], 1),
        ),
    ],
)
def test_parity_that_makes_no_sense_is_no_parity(spoil: Callable[[ParityReport], ParityReport]) -> None:
    inventories = [
        replace(one, parities=[spoil(report) for report in one.parities])
        for one in FOUR.inventories(5, without=[name(1)])
    ]
    assert choose(inventories).lost


def test_a_shard_that_is_not_the_one_that_was_protected_helps_nobody() -> None:
    inventories = FOUR.inventories(5, without=[name(1)])
    for facts in ({"fingerprint": b"x" * 32}, {"file_bytes": 49_999}):
        other = replace(inventories[0], shards=[replace(inventories[0].shards[0], **facts)])
        assert choose([other, *inventories[1:]]).lost


def test_parity_alone_restores_nothing_since_it_does_not_say_how_many_ranks_there_were() -> None:
    inventories = [replace(one, shards=[]) for one in cluster(1, 1).inventories(5)]
    choice = choose(inventories)
    assert choice.lost and "parity is all that is left of it" in choice.why


def test_a_commit_that_only_parity_remembers_is_remembered() -> None:
    one = FOUR.inventory(name(0), [snapshot(5)])
    report = replace(one.parities[0], progress="COMMITTED")
    assert choose([replace(one, shards=[], arenas=[], parities=[report])]).lost
    assert not choose([replace(one, shards=[], arenas=[])]).lost


def test_one_rank_of_a_node_is_rebuilt_where_the_others_are_there() -> None:
    shared = cluster(3, 3, 3)
    inventories = shared.inventories(5)
    inventories[1] = replace(inventories[1], shards=inventories[1].shards[:1])
    choice = choose(inventories)
    assert list(choice.missing) == [4, 5] and list(choice.sources) == [0, 1, 2, 3, 6, 7, 8]


def test_of_two_layouts_that_protect_a_shard_the_one_that_works_is_taken() -> None:
    small = Cluster(FOUR.ranks, [[name(0), name(1)], [name(2), name(3)]], 1, FOUR.sizes)
    inventories = FOUR.inventories(5, without=[name(1), name(2)])
    again = [
        replace(one, parities=[*one.parities, *(replace(new, slot=9) for new in small.parities(one.node, snapshot(5)))])
        for one in inventories
    ]
    choice = choose(again)
    assert sorted(choice.missing) == [1, 2]
    assert choice.missing[1].layout == small.layout(small.groups[0])
    assert choice.missing[2].layout == small.layout(small.groups[1])
    assert len(groups_of(again, snapshot(5))) == 3


# --- several nodes: against a plain twin --------------------------------------------------------------


def symbols_plainly(
    layout: GroupLayout, there: Collection[int], owners: Collection[int]
) -> dict[int, tuple[set[int], int]]:
    """Per stripe the ranks with bytes in it, and how many of its symbols are there: unit by unit, by the definition.

    `there` are the ranks whose shards can be read, `owners` the positions whose parity can.
    """
    n, m = len(layout.positions), layout.parity
    k, units = n - m, layout.piece_bytes // layout.unit_bytes
    strings: list[list[int | None]] = []
    for row in layout.positions:
        string: list[int | None] = []
        for one in row:
            string += [one.rank] * -(-one.file_bytes // layout.unit_bytes)
        strings.append(string + [None] * (k * units - len(string)))
    found = {}
    for stripe in range(n):
        count, ranks = 0, set[int]()
        for parity_row in range(m):
            count += (stripe + parity_row) % n in owners
        for c in range(k):
            position = (stripe + m + c) % n
            piece = next(t for t in range(k) if (position + 1 + t) % n == stripe)
            inside = {rank for rank in strings[position][piece * units : (piece + 1) * units] if rank is not None}
            count += inside <= set(there)
            ranks |= inside
        found[stripe] = (ranks, count)
    return found


def comes_back_plainly(layout: GroupLayout, rank: int, there: Collection[int], owners: Collection[int]) -> bool:
    k = len(layout.positions) - layout.parity
    return all(count >= k for ranks, count in symbols_plainly(layout, there, owners).values() if rank in ranks)


def recoverable_plainly(found: Sequence[Inventory], made: SnapshotId, bad: Collection[BadPlace]) -> bool:
    """Every rank's shard is there, or some layout brings it back."""
    good = ("FULL", "PROTECTED", "COMMITTED")
    shards = [one for each in found for one in each.shards if one.snapshot == made and one.progress in good]
    usable = [one for one in shards if (made, one.rank, one.arena) not in bad]
    reports = [
        one for each in found for one in each.parities
        if one.snapshot == made and one.progress in good and (made, PARITY, one.arena) not in bad
    ]  # fmt: skip
    worlds = {one.world_size for one in usable or shards}
    if len(worlds) != 1:
        return False
    (world,) = worlds

    def comes_back(rank: int) -> bool:
        for report in reports:
            layout = report.layout
            shapes = {one.rank: one for row in layout.positions for one in row}
            if rank not in shapes or layout != geometry.lay_out(layout.positions, layout.parity):
                continue
            owners = {one.position for one in reports if one.layout == layout}
            there = {
                one.rank for one in usable
                if one.rank in shapes
                and (one.file_bytes, one.fingerprint) == (shapes[one.rank].file_bytes, shapes[one.rank].fingerprint)
            }  # fmt: skip
            if comes_back_plainly(layout, rank, there, owners):
                return True
        return False

    return all(any(one.rank == rank for one in usable) or comes_back(rank) for rank in range(world))


@st.composite
def clusters(draw: st.DrawFn, ranks_min: int = 0, bytes_min: int = 0) -> Cluster:
    counts = draw(st.lists(st.integers(ranks_min, 2), min_size=1, max_size=6).filter(any))
    nodes = draw(st.permutations([name(number) for number in range(len(counts))]))
    ranks, dealt = {}, 0
    for node, count in zip(nodes, counts, strict=True):
        ranks[node] = list(range(dealt, dealt + count))
        dealt += count
    groups = geometry.plan([geometry.Member(node) for node in nodes], draw(st.integers(2, 6)))
    sizes = draw(st.lists(st.sampled_from([bytes_min, 1, 4096, 9000, 30_000]), min_size=dealt, max_size=dealt))
    made = Cluster(ranks, groups, draw(st.integers(0, 3)), {**dict(enumerate(sizes))})
    return Cluster(ranks, groups, made.parity, {**made.sizes, **_some_byte_in_each_group(made)})


def _some_byte_in_each_group(made: Cluster) -> dict[int, int]:
    firsts = [[rank for node in group for rank in made.ranks[node]][:1] for group in made.groups]
    return {rank: 5000 for first in firsts for rank in first}


@dataclass(frozen=True)
class Ruin:
    """What is left of a cluster after things went wrong."""

    of: Cluster
    found: list[Inventory]
    bad: list[BadPlace]
    gone: frozenset[bytes]


FATES = ["kept"] * 9 + ["gone", "DAMAGED", "bad", "alien", "elsewhere"]


@st.composite
def ruins(draw: st.DrawFn, fates: Sequence[str] = FATES) -> Ruin:
    """Up to two snapshots, some of them protected twice, after losses of every kind."""
    of = draw(clusters())
    made = [snapshot(step) for step in draw(st.sampled_from([[1], [1, 2]]))]
    regrouped = draw(st.none() | st.integers(1, 4))
    gone = frozenset(draw(st.sets(st.sampled_from(sorted(of.ranks)), max_size=3)))
    bad: list[BadPlace] = []
    spare: list[Shard] = []
    found = []
    for node in sorted(of.ranks.keys() - gone):
        shards: list[Shard] = []
        parities: list[ParityReport] = []
        whole = of.inventory(node, made)
        for one in whole.shards:
            fate = draw(st.sampled_from(fates))
            if fate == "DAMAGED":
                one = replace(one, progress=fate)
            elif fate == "alien":
                one = replace(one, fingerprint=b"x" * 32)
            elif fate == "bad":
                bad.append((one.snapshot, one.rank, one.arena))
            (spare if fate == "elsewhere" else shards if fate != "gone" else []).append(one)
        reports = list(whole.parities)
        if regrouped is not None:
            groups = geometry.plan([geometry.Member(each) for each in of.ranks], regrouped)
            other = Cluster(of.ranks, groups, of.parity, of.sizes)
            if all(any(other.sizes[rank] for one in group for rank in other.ranks[one]) for group in groups):
                more = other.parities(node, made[0])
                reports += [replace(one, arena=bytes([254]) + one.arena[1:]) for one in more]
        for report in reports:
            fate = draw(st.sampled_from(fates))
            if fate == "DAMAGED":
                report = replace(report, progress="FILLING")
            elif fate == "alien":
                report = replace(report, layout=replace(report.layout, piece_bytes=report.layout.piece_bytes + 1))
            elif fate == "bad":
                bad.append((report.snapshot, PARITY, report.arena))
            if fate != "gone":
                parities.append(report)
        found.append(replace(whole, shards=shards, parities=parities))
    return Ruin(of, [*found, Inventory(name(99), "a spare", spare, [])], bad, gone)


def alien_layouts_are_skipped(found: Sequence[Inventory]) -> list[Inventory]:
    """For the twin, which asks nothing of a layout but that it is one."""
    return [
        replace(one, parities=[each for each in one.parities if each.layout.piece_bytes % BLOCK == 0]) for one in found
    ]


@settings(max_examples=250, deadline=None)
@given(ruins())
def test_a_snapshot_is_found_exactly_where_the_plain_twin_can_bring_back_every_rank(ruin: Ruin) -> None:
    choice = choose(ruin.found, bad=ruin.bad)
    sound = alien_layouts_are_skipped(ruin.found)
    expected = [made for made in (snapshot(2), snapshot(1)) if recoverable_plainly(sound, made, ruin.bad)]
    assert choice.snapshot == (expected[0] if expected else None)
    if choice.snapshot is None:
        assert not choice.sources and not choice.missing
        return
    assert sorted([*choice.sources, *choice.missing]) == list(range(ruin.of.world))
    for rank, source in choice.sources.items():
        assert source.shard.rank == rank and (choice.snapshot, rank, source.shard.arena) not in ruin.bad
    for rank, how in choice.missing.items():
        check_that_it_suffices(choice.snapshot, rank, how, ruin)


def check_that_it_suffices(made: SnapshotId, rank: int, how: Rebuilding, ruin: Ruin) -> None:
    assert rank in [one.rank for one in how.layout.positions[how.position]]
    assert rank not in how.shards
    assert comes_back_plainly(how.layout, rank, how.shards.keys(), how.parities.keys())
    by_node = {one.node: one for one in ruin.found}
    for position, parity in how.parities.items():
        assert parity.report in by_node[parity.node].parities and parity.report.position == position
        assert parity.report.layout == how.layout and parity.report.snapshot == made
        assert (made, PARITY, parity.report.arena) not in ruin.bad
    for other, source in how.shards.items():
        assert source.shard in by_node[source.node].shards and source.shard.rank == other
        assert source.shard.snapshot == made and (made, other, source.shard.arena) not in ruin.bad


@settings(max_examples=200, deadline=None)
@given(ruins(), st.randoms(use_true_random=False))
def test_every_rank_makes_the_same_choice_of_several_nodes(ruin: Ruin, draw: random.Random) -> None:
    mixed = [
        replace(
            one, shards=draw.sample(one.shards, len(one.shards)), parities=draw.sample(one.parities, len(one.parities))
        )
        for one in draw.sample(ruin.found, len(ruin.found))
    ]
    twice = [*mixed, *draw.sample(mixed, len(mixed) // 2)]
    first = choose(ruin.found, bad=ruin.bad)
    assert choose(twice, bad=draw.sample(ruin.bad, len(ruin.bad))) == first
    assert groups_of(twice, snapshot(1)) == groups_of(ruin.found, snapshot(1))
    assert previous_places(twice, snapshot(1)) == previous_places(ruin.found, snapshot(1))


@st.composite
def bearable(draw: st.DrawFn) -> Ruin:
    """A cluster that lost as many nodes of each group as its parity bears, or fewer; every node had ranks."""
    of = draw(clusters(ranks_min=1, bytes_min=1))
    gone: set[bytes] = set()
    for group in of.groups:
        most = geometry.parity_for(of.parity, len(group))
        gone |= draw(st.sets(st.sampled_from(group), max_size=most))
    return Ruin(of, of.inventories(7, without=gone), [], frozenset(gone))


@settings(max_examples=150, deadline=None)
@given(bearable())
def test_as_many_lost_nodes_of_each_group_as_it_has_parity_can_always_be_borne(ruin: Ruin) -> None:
    choice = choose(ruin.found)
    assert choice.snapshot == snapshot(7)
    assert list(choice.missing) == sorted(rank for node in ruin.gone for rank in ruin.of.ranks[node])
    assert all(one.margin >= 0 for one in margins(ruin.found, snapshot(7)))


# --- how much more can be lost ------------------------------------------------------------------------


def test_the_margin_of_a_group_is_its_parity_less_what_it_lost() -> None:
    six = cluster(1, 1, 1, 1, 1, 1, group_size=3, parity=2, size=100_000)
    both = margins(six.inventories(5, without=[name(0)]), snapshot(5))
    by_group = {holders: (layout, margin) for layout, holders, margin in both}
    assert by_group == {
        (name(1), name(2)): (six.layout(six.groups[0]), 1),
        (name(3), name(4), name(5)): (six.layout(six.groups[1]), 2),
    }
    (one, _) = sorted(margins(six.inventories(5, without=[name(0)]), snapshot(5)), key=lambda each: each.margin)
    assert one.margin == 1
    assert [one.margin for one in margins(FOUR.inventories(5, without=[name(0), name(1)]), snapshot(5))] == [-1]
    assert margins(FOUR.inventories(5), snapshot(6)) == [] == groups_of([], snapshot(5))


def test_bytes_that_are_bad_take_from_the_margin() -> None:
    bad: list[BadPlace] = [(snapshot(5), 1, FOUR.arena_of(1))]
    assert [one.margin for one in margins(FOUR.inventories(5), snapshot(5), bad)] == [0]


# --- who stands where ---------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(bearable(), st.data())
def test_after_a_replacement_every_survivor_stands_where_its_parity_is_still_right(
    ruin: Ruin, data: st.DataObject
) -> None:
    before = previous_places(ruin.found, snapshot(7))
    of = ruin.of
    if of.parity == 0 or any(len(group) == 1 for group in of.groups):
        return  # groups without parity leave no trace
    numbered = sorted(of.groups, key=lambda group: min(rank for node in group for rank in of.ranks[node]))
    assert before.sizes == tuple(len(group) for group in numbered)
    assert before.places == {
        node: (number, position)
        for number, group in enumerate(numbered)
        for position, node in enumerate(group)
        if node not in ruin.gone
    }
    newcomers = [name(200 + number) for number in range(len(ruin.gone))]
    members = [geometry.Member(node) for node in [*before.places, *newcomers]]
    size = max(len(group) for group in of.groups)
    if sorted(before.sizes) != sorted(len(group) for group in geometry.plan(members, size)):
        return
    after = geometry.plan(data.draw(st.permutations(members)), size, before)
    ranks = {**of.ranks}
    for old_group, new_group in zip(numbered, after, strict=True):
        ranks |= {new: of.ranks[old] for old, new in zip(old_group, new_group, strict=True)}
    again = Cluster(ranks, after, of.parity, of.sizes)
    assert [again.layout(group) for group in after] == [of.layout(group) for group in numbered]


def test_a_node_without_parity_stands_where_all_its_shards_belong() -> None:
    inventories = FOUR.inventories(5)
    inventories[2] = replace(inventories[2], parities=[])
    assert previous_places(inventories, snapshot(5)) == geometry.Formation((4,), {name(p): (0, p) for p in range(4)})
    stray = replace(inventories[2], shards=[*inventories[2].shards, *FOUR.shards(name(3), snapshot(5), "COMMITTED")])
    inventories = [*inventories[:2], stray, replace(inventories[3], shards=[])]
    assert name(2) not in previous_places(inventories, snapshot(5)).places


def test_a_place_that_a_parity_set_claims_is_not_given_to_whoever_has_the_shards() -> None:
    inventories = FOUR.inventories(5)
    elsewhere = Inventory(name(88), "another", [], [], [], inventories[2].parities)
    inventories[2] = replace(inventories[2], parities=[])
    places = previous_places([*inventories, elsewhere], snapshot(5)).places
    assert places == {name(0): (0, 0), name(1): (0, 1), name(3): (0, 3), name(88): (0, 2)}


def test_without_parity_there_is_no_former_formation() -> None:
    assert previous_places(cluster(1, 1, parity=0).inventories(5), snapshot(5)) == geometry.Formation((), {})
    assert previous_places([], snapshot(5)) == geometry.Formation((), {})


def test_of_layouts_that_contradict_each_other_the_one_with_more_parity_counts() -> None:
    small = Cluster(FOUR.ranks, [[name(0), name(1)], [name(2), name(3)]], 1, FOUR.sizes)
    inventories = FOUR.inventories(5)
    stale = [replace(one, slot=9) for one in small.parities(name(0), snapshot(5))]
    inventories[0] = replace(inventories[0], parities=[*inventories[0].parities, *stale])
    assert previous_places(inventories, snapshot(5)).sizes == (4,)


# --- which arena a rank begins with -------------------------------------------------------------------


def takes(found: Mapping[int, Assignment]) -> dict[int, tuple[bytes | None, int | None, bool]]:
    return {rank: (one.arena, one.shard, one.rebuild) for rank, one in found.items()}


def test_everyone_who_comes_back_to_its_node_takes_its_own_arena() -> None:
    inventories = FOUR.inventories(5)
    found = assign(choose(inventories), FOUR.ranks, inventories)
    assert takes(found) == {rank: (FOUR.arena_of(rank), rank, False) for rank in range(4)}
    assert {one.slot_bytes for one in found.values()} == {13 * BLOCK}


def test_ranks_that_were_dealt_to_other_nodes_take_what_their_node_holds() -> None:
    shared = cluster(2, 2)
    inventories = shared.inventories(5)
    found = assign(choose(inventories), {name(0): [2, 1], name(1): [3, 0]}, inventories)
    arena_of = shared.arena_of
    assert takes(found) == {
        0: (arena_of(2), 2, False), 1: (arena_of(1), 1, False), 2: (arena_of(0), 0, False), 3: (arena_of(3), 3, False)
    }  # fmt: skip


def test_what_a_lost_node_held_is_rebuilt_together_on_the_newcomer() -> None:
    shared = cluster(2, 2, 2)
    inventories = shared.inventories(5, without=[name(1)])
    ranks = {name(0): [0, 1], name(9): [2, 3], name(2): [4, 5]}
    found = assign(choose(inventories), ranks, inventories)
    assert found[2] == Assignment(None, 2, True, 13 * BLOCK) and found[3] == Assignment(None, 3, True, 13 * BLOCK)
    assert [found[rank].rebuild for rank in (0, 1, 4, 5)] == [False] * 4


def test_of_two_newcomers_each_gets_the_shards_that_its_ranks_will_read() -> None:
    shared = cluster(2, 2, 2, 2, parity=2)
    inventories = shared.inventories(5, without=[name(1), name(2)])
    ranks = {name(0): [0, 1], name(8): [4, 5], name(9): [2, 3], name(3): [6, 7]}
    found = assign(choose(inventories), ranks, inventories)
    assert [found[rank].shard for rank in range(8)] == list(range(8))


def test_ranks_whose_own_shards_are_missing_leave_the_arenas_of_others_to_others() -> None:
    shared = cluster(2, 2, 2)
    inventories = shared.inventories(5, without=[name(1)])
    found = assign(choose(inventories), {name(0): [2, 3, 4, 5], name(2): [0, 1]}, inventories)
    assert [found[rank].shard for rank in range(6)] == [4, 5, 2, 3, 0, 1]
    assert [rank for rank, one in found.items() if one.rebuild] == [2, 3]


def test_a_bad_shard_is_rebuilt_into_the_arena_of_its_rank() -> None:
    inventories = [replace(one, arenas=FOUR.arenas(one.node, room=1)) for one in FOUR.inventories(5)]
    choice = choose(inventories, bad=[(snapshot(5), 1, FOUR.arena_of(1))])
    assert takes(assign(choice, FOUR.ranks, inventories))[1] == (FOUR.arena_of(1), 1, True)


@pytest.mark.parametrize(
    ("facts", "fits"),
    [
        ({}, True),
        ({"room": 0}, False),
        ({"slot_bytes": 13 * BLOCK}, True),
        ({"slot_bytes": 12 * BLOCK}, False),
        ({"block_bytes": 2 * BLOCK}, False),
    ],
)
def test_a_shard_is_rebuilt_into_an_arena_that_is_there_only_if_it_fits(facts: dict[str, int], fits: bool) -> None:
    idle = replace(ArenaReport(bytes([7]) * 16, 50, generation(1), 64 * BLOCK, BLOCK, 0, False, None, 1), **facts)
    inventories = [*FOUR.inventories(5, without=[name(1)]), Inventory(name(9), "a spare", [], [idle])]
    ranks = {name(0): [0], name(9): [1], name(2): [2], name(3): [3]}
    found = assign(choose(inventories), ranks, inventories)
    assert found[1] == Assignment(idle.arena if fits else None, 1, True, 13 * BLOCK)
    fuller = replace(inventories[-1], arenas=[replace(idle, room=0)])
    assert assign(choose(inventories), ranks, [fuller, *inventories])[1].arena is None


def test_where_nothing_is_restored_everyone_begins_with_an_arena_of_its_own() -> None:
    assert assign(choose([]), FOUR.ranks, []) == {rank: Assignment() for rank in range(4)}


@st.composite
def relaunches(draw: st.DrawFn) -> tuple[Ruin, dict[bytes, list[int]]]:
    """A ruin that has something to restore, mostly, and the nodes and ranks of the next generation."""
    ruin = draw(bearable() | ruins([*FATES[:9], "gone", "elsewhere"]))
    found = []
    for one in ruin.found:
        arenas = [replace(arena, room=draw(st.integers(0, 1)), slot_bytes=draw(st.sampled_from([4096, 65536])))
                  for arena in one.arenas]  # fmt: skip
        idle = ArenaReport(bytes([6]) * 14 + one.node[-2:], 77, generation(1), 65536, BLOCK, 0, False, None, 1)
        found.append(replace(one, arenas=[*arenas, *draw(st.sampled_from([[], [idle]]))]))
    survivors = sorted(ruin.of.ranks.keys() - ruin.gone)
    nodes = draw(st.permutations([*survivors, name(99), *(name(150 + number) for number in range(3))]))
    nodes = nodes[: draw(st.integers(1, len(nodes)))]
    world = draw(st.sampled_from([ruin.of.world, ruin.of.world, ruin.of.world + 1, max(1, ruin.of.world - 1)]))
    ranks: dict[bytes, list[int]] = {node: [] for node in nodes}
    for rank in range(world):
        ranks[draw(st.sampled_from(nodes))].append(rank)
    if draw(st.booleans()):  # most ranks come back to where they were
        home = {rank: node for node, each in ruin.of.ranks.items() for rank in each if node in ranks}
        ranks = {node: [rank for rank in each if rank not in home] for node, each in ranks.items()}
        for rank in range(world):
            if rank in home:
                ranks[home[rank]].append(rank)
    return Ruin(ruin.of, found, ruin.bad, ruin.gone), ranks


@settings(max_examples=250, deadline=None)
@given(relaunches(), st.randoms(use_true_random=False))
def test_every_missing_shard_gets_one_arena_if_ranks_are_left_and_no_arena_serves_two(
    relaunch: tuple[Ruin, dict[bytes, list[int]]], draw: random.Random
) -> None:
    ruin, ranks = relaunch
    choice = choose(ruin.found, bad=ruin.bad)
    found = assign(choice, ranks, ruin.found)
    node_of = {rank: node for node, each in ranks.items() for rank in each}
    assert list(found) == sorted(node_of)
    arenas = [one.arena for one in found.values() if one.arena is not None]
    shards = [one.shard for one in found.values() if one.shard is not None]
    assert len(set(arenas)) == len(arenas) and len(set(shards)) == len(shards)

    rebuilt = {one.shard: rank for rank, one in found.items() if one.rebuild}
    free = [rank for rank, one in found.items() if one.rebuild or one.shard is None]
    assert rebuilt.keys() <= choice.missing.keys()
    assert len(rebuilt) == min(len(choice.missing), len(free))

    for rank, one in found.items():
        source = choice.sources.get(rank)
        if source is not None and source.node == node_of[rank]:
            assert (one.arena, one.shard, one.rebuild) == (source.shard.arena, rank, False)
        if one.shard is not None and not one.rebuild:
            taken = choice.sources[one.shard]
            assert (taken.node, taken.shard.arena) == (node_of[rank], one.arena)
        if one.shard is None:
            assert one == Assignment()
    for source in choice.sources.values():  # nobody begins anew beside an arena that waits for an heir
        idle = [rank for rank in ranks.get(source.node, []) if rank in free]
        assert source.shard.arena in arenas or not idle

    reports = {(each.node, one.arena): one for each in ruin.found for one in each.arenas}
    for shard, rank in rebuilt.items():
        assert shard is not None
        one = found[rank]
        assert one.slot_bytes == -(-ruin.of.sizes[shard] // BLOCK) * BLOCK
        if one.arena is not None:
            report = reports[node_of[rank], one.arena]
            assert report.room >= 1 and report.slot_bytes >= one.slot_bytes
            assert one.arena not in [source.shard.arena for source in choice.sources.values()]
    holding = {source.node for source in choice.sources.values()}
    if any(node_of[rank] in holding for rank in rebuilt.values()):
        assert all(node_of[rank] in holding for rank in free if not found[rank].rebuild), "the empty-handed come first"

    shuffled = {node: draw.sample(ranks[node], len(ranks[node])) for node in draw.sample(sorted(ranks), len(ranks))}
    assert assign(choice, shuffled, draw.sample(ruin.found, len(ruin.found))) == found
