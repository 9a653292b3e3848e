"""What survivors plan while a job waits: against a plain twin, and played to its end by nodes that act in any order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import recovery
from snapshotd.manifest import round_up
from snapshotd.reprotect import MakeSet, MakeShard, Plan, Wait, assess, next_step, outlived
from snapshotd.wire import GenerationId, GroupLayout, Inventory, ParityReport, Shard, ShardShape, SnapshotId
from tests.unit.test_recovery import (
    Cluster,
    Ruin,
    bearable,
    cluster,
    comes_back_plainly,
    generation,
    name,
    recoverable_plainly,
    snapshot,
)

MADE = snapshot(7)
replace = msgspec.structs.replace


@dataclass
class Survivors:
    """Nodes that act by the plan, one step at a time. `found` is what each holds, `made` what it made."""

    found: dict[bytes, Inventory]
    made: list[tuple[bytes, Shard | ParityReport]] = field(default_factory=list)

    def inventories(self) -> list[Inventory]:
        return [self.found[node] for node in sorted(self.found)]

    def plan(self, node: bytes) -> Plan | None:
        return assess(self.inventories(), node).plan

    def act(self, node: bytes, unseen: Collection[bytes] = ()) -> bool:
        """One step of a node, to which some do not answer. False where it has nothing to do."""
        seen = [one for one in self.inventories() if one.node not in unseen]
        plan = assess(seen, node).plan
        step = next_step(plan, seen, node) if plan is not None else None
        if plan is None or step is None or isinstance(step, Wait):
            return False
        own, arena = self.found[node], (len(self.made) + 1).to_bytes(16, "big")
        if isinstance(step, MakeShard):
            shape = step.shape
            assert can_be_decoded(plan, shape.rank)
            shard = Shard(plan.snapshot, arena, 0, "FULL", shape.rank, self.world, shape.fingerprint, shape.file_bytes,
                          shape.block_bytes, True)  # fmt: skip
            self.found[node] = replace(own, shards=[*own.shards, shard])
            self.made.append((node, shard))
        else:
            self.check_sources(plan, step)
            report = ParityReport(plan.snapshot, arena, 0, "FULL", step.position, plan.layout, True)
            self.found[node] = replace(own, parities=[*own.parities, report])
            self.made.append((node, report))
        return True

    @property
    def world(self) -> int:
        return next(one.world_size for each in self.found.values() for one in each.shards)

    def check_sources(self, plan: Plan, step: MakeSet) -> None:
        """Every shard of the new group is where its position is."""
        for node, shapes in zip(plan.order, plan.layout.positions, strict=True):
            for shape in shapes:
                source = step.shards[shape.rank]
                assert source.node == node and source.shard in self.found[node].shards

    def finish(self, chance: random.Random) -> None:
        """Until nobody has anything to do."""
        acted = True
        while acted:
            order = chance.sample(sorted(self.found), len(self.found))
            acted = any([self.act(node) for node in order])  # noqa: C419 - each of them acts

    def lose(self, *nodes: bytes) -> None:
        for node in nodes:
            del self.found[node]


def can_be_decoded(plan: Plan, rank: int) -> bool:
    how = plan.missing[rank]
    return rank in how.shards or comes_back_plainly(how.layout, rank, how.shards.keys(), how.parities.keys())


def survivors(ruin: Ruin) -> Survivors:
    return Survivors({one.node: one for one in ruin.found})


def with_survivors(ruin: Ruin) -> bool:
    return bool(ruin.found) and recovery.choose(ruin.found).snapshot is not None


# --- the plan ---------------------------------------------------------------------------------------------------------


def dealt_plainly(
    layout: GroupLayout, stands: Mapping[bytes, int]
) -> tuple[dict[bytes, list[int]], list[list[int]], int]:
    """Who keeps which lost rank, the ranks of each new position, and the parity, told once more in other words."""
    weight = dict.fromkeys(stands, 0)
    for node, place in stands.items():
        for one in layout.positions[place]:
            weight[node] += round_up(one.file_bytes, layout.unit_bytes)
    keeps: dict[bytes, list[int]] = {node: [] for node in stands}
    orphans = [one for place, row in enumerate(layout.positions) if place not in stands.values() for one in row]
    while orphans:
        biggest = max(one.file_bytes for one in orphans)
        orphan = next(one for one in sorted(orphans, key=lambda shape: shape.rank) if one.file_bytes == biggest)
        lightest = min(weight.values())
        keeper = sorted(node for node in weight if weight[node] == lightest)[0]
        keeps[keeper].append(orphan.rank)
        weight[keeper] += round_up(orphan.file_bytes, layout.unit_bytes)
        orphans.remove(orphan)
    rows = [sorted([one.rank for one in layout.positions[stands[node]]] + keeps[node]) for node in sorted(stands)]
    return keeps, rows, min(layout.parity, len(stands) - 1)


@settings(max_examples=200, deadline=None)
@given(bearable())
def test_every_survivor_makes_the_plan_of_the_plain_twin(ruin: Ruin) -> None:
    if not with_survivors(ruin):
        return
    scene = survivors(ruin)
    for node in scene.found:
        plan = scene.plan(node)
        if plan is None:
            continue
        group = next(one for one in ruin.of.groups if node in one)
        stands = {one: position for position, one in enumerate(group) if one in scene.found}
        keeps, rows, parity = dealt_plainly(ruin.of.layout(group), stands)
        assert {one: [shape.rank for shape in shapes] for one, shapes in plan.fosters.items()} == {
            one: sorted(ranks) for one, ranks in keeps.items() if ranks
        }
        assert [[shape.rank for shape in row] for row in plan.layout.positions] == rows
        assert plan.layout.parity == parity and plan.order == tuple(sorted(stands))
        assert all(scene.plan(other) == plan for other in plan.order), "and so does everyone else of its group"


@settings(max_examples=200, deadline=None)
@given(bearable(), st.randoms(use_true_random=False))
def test_the_order_of_inventories_changes_no_plan(ruin: Ruin, chance: random.Random) -> None:
    if with_survivors(ruin):
        mixed = chance.sample(ruin.found, len(ruin.found))
        assert [assess(mixed, one.node) for one in ruin.found] == [assess(ruin.found, one.node) for one in ruin.found]


# --- played -----------------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(bearable(), st.randoms(use_true_random=False))
def test_once_all_have_done_their_part_any_further_losses_within_the_parity_are_borne(
    ruin: Ruin, chance: random.Random
) -> None:
    if not with_survivors(ruin):
        return
    scene = survivors(ruin)
    plans = {node: plan for node in scene.found if (plan := scene.plan(node)) is not None}
    scene.finish(chance)
    assert recovery.choose(scene.inventories()).snapshot == MADE
    for node, plan in plans.items():
        found = assess(scene.inventories(), node)
        assert found.whole and found.losses_left == plan.layout.parity and found.plan is None
        for gone in itertools.islice(itertools.combinations(plan.order, plan.layout.parity), 12):
            left = [one for one in scene.inventories() if one.node not in gone]
            assert recoverable_plainly(left, MADE, [])
            assert recovery.choose(left).snapshot == MADE


@settings(max_examples=120, deadline=None)
@given(bearable(), st.randoms(use_true_random=False))
def test_at_every_instant_a_recovery_finds_what_it_would_have_found_and_bears_no_less(
    ruin: Ruin, chance: random.Random
) -> None:
    if not with_survivors(ruin):
        return
    scene = survivors(ruin)
    before = recovery.choose(scene.inventories())
    places = recovery.previous_places(scene.inventories(), MADE)
    for _ in range(40):
        acted = scene.act(chance.choice(sorted(scene.found)))
        after = recovery.choose(scene.inventories())
        assert (after.snapshot, after.committed) == (before.snapshot, before.committed)
        assert after.sources == before.sources, "its own arena is what a rank goes on with"
        assert after.missing.keys() == before.missing.keys()
        assert recovery.previous_places(scene.inventories(), MADE) == places
        gone = chance.choice(sorted(scene.found))
        without = [one for one in ruin.found if one.node != gone]
        if acted and recoverable_plainly(without, MADE, []):
            assert recovery.choose([one for one in scene.inventories() if one.node != gone]).snapshot == MADE


@settings(max_examples=120, deadline=None)
@given(bearable(), st.randoms(use_true_random=False))
def test_who_saw_others_than_the_rest_for_a_while_has_wasted_memory_and_nothing_else(
    ruin: Ruin, chance: random.Random
) -> None:
    if not with_survivors(ruin):
        return
    scene = survivors(ruin)
    for _ in range(20):
        node = chance.choice(sorted(scene.found))
        scene.act(node, [other for other in scene.found if other != node and chance.random() < 0.3])
    plans = {node: plan for node in scene.found if (plan := scene.plan(node)) is not None}
    scene.finish(chance)
    for node, plan in plans.items():
        found = assess(scene.inventories(), node)
        assert found.whole and found.losses_left >= plan.layout.parity


def test_a_shard_that_two_survivors_keep_counts_where_the_plan_has_it() -> None:
    """It counted for the one that was listed first, and the group never said that it was whole again."""
    five = cluster(1, 1, 1, 1, 1, parity=2)
    five = Cluster(five.ranks, five.groups, 2, {0: 40_000, 1: 60_000, 2: 80_000, 3: 80_000, 4: 30_000})
    scene = Survivors({one.node: one for one in five.inventories(7, without=[name(1)])})
    assert scene.act(name(0), unseen=[name(4)])
    scene.finish(random.Random(0))
    assert [node for node, one in scene.made if isinstance(one, Shard)] == [name(0), name(4)]
    assert all(assess(scene.inventories(), node).whole for node in scene.found)


@settings(max_examples=80, deadline=None)
@given(bearable(), st.randoms(use_true_random=False))
def test_nodes_that_go_one_by_one_with_time_in_between_lose_nothing_until_one_is_left_of_a_group(
    ruin: Ruin, chance: random.Random
) -> None:
    if not with_survivors(ruin):
        return
    scene = survivors(ruin)
    while True:
        scene.finish(chance)
        bearing = [one for one in sorted(scene.found) if assess(scene.inventories(), one).losses_left > 0]
        if not bearing:
            return
        scene.lose(chance.choice(bearing))
        assert recovery.choose(scene.inventories()).snapshot == MADE


def test_a_node_that_returns_leaves_nothing_to_do() -> None:
    four = cluster(1, 1, 1, 1, parity=1)
    scene = Survivors({one.node: one for one in four.inventories(7, without=[name(1)])})
    assert scene.act(name(0))
    scene.found[name(1)] = next(one for one in four.inventories(7) if one.node == name(1))
    assert all(assess(scene.inventories(), node).whole for node in scene.found)
    choice = recovery.choose(scene.inventories())
    assert not choice.missing and choice.sources[1].node == name(1)


def test_a_foster_is_no_arena_for_a_rank_and_is_copied_to_where_the_rank_goes() -> None:
    four = cluster(1, 1, 1, 1, parity=1)
    scene = Survivors({one.node: one for one in four.inventories(7, without=[name(1)])})
    scene.finish(random.Random(0))
    scene.lose(name(2))
    choice = recovery.choose(scene.inventories())
    assert choice.snapshot == MADE and sorted(choice.missing) == [1, 2]
    assert choice.missing[1].shards[1].shard.foster
    assert "1 will be rebuilt from parity, 1 will be copied from nodes that rebuilt it" in choice.why
    ranks = {name(0): [0], name(1): [1], name(2): [2], name(3): [3]}
    assigned = recovery.assign(choice, ranks, scene.inventories())
    assert [assigned[rank].rebuild for rank in range(4)] == [False, True, True, False]
    assert assigned[1].arena is None


def test_where_no_parity_is_left_to_check_it_by_a_foster_is_read_where_it_lies() -> None:
    four = cluster(1, 1, 1, 1, parity=1)
    scene = Survivors({one.node: one for one in four.inventories(7, without=[name(1)])})
    scene.finish(random.Random(0))
    bare = [replace(one, parities=[]) for one in scene.inventories()]
    choice = recovery.choose(bare)
    assert choice.snapshot == MADE and not choice.missing and choice.sources[1].shard.foster
    assigned = recovery.assign(choice, {name(0): [0, 1], name(2): [2], name(3): [3]}, bare)
    assert assigned[1].arena is None and assigned[1].shard is None


def test_too_few_survivors_say_so_and_do_nothing() -> None:
    pair = cluster(1, 1, parity=1)
    found = assess(pair.inventories(7, without=[name(1)]), name(0))
    assert found.plan is None and found.losses_left == 0 and found.gone == 1
    assert "too few" in found.why
    none = cluster(1, 1, parity=0)
    assert assess(none.inventories(7), name(0)).plan is None
    assert assess([], name(0)).snapshot is None


def test_while_all_are_there_nothing_is_to_be_done() -> None:
    four = cluster(1, 1, 1, 1, parity=1)
    found = assess(four.inventories(7), name(0))
    assert found.whole and found.losses_left == 1 and found.plan is None
    inventories = four.inventories(7)
    lacking = [replace(inventories[0], parities=[]), *inventories[1:]]
    assert assess(lacking, name(0)).plan is None, "what a whole group lacks is for the next generation"


# --- the end ----------------------------------------------------------------------------------------------------------


def _ids(*numbers: int) -> Sequence[GenerationId]:
    return [generation(number) for number in numbers]


def test_a_foster_goes_with_a_newer_commit_of_its_line_or_when_all_protect_its_snapshot_anew() -> None:
    first, second, third = _ids(1, 2, 3)
    seven, eight = SnapshotId(first, 7), SnapshotId(first, 8)
    assert outlived(seven, first, first, None, eight), "its own generation went on after all"
    assert not outlived(eight, first, first, None, seven)
    assert not outlived(seven, first, first, None, seven)
    assert outlived(seven, first, second, seven, seven), "voted anew by those who restored it"
    assert outlived(seven, first, second, seven, SnapshotId(second, 9))
    assert not outlived(seven, second, second, seven, seven), "made by those who had committed it before they waited"
    assert outlived(seven, second, third, seven, seven)
    assert not outlived(seven, first, second, None, SnapshotId(second, 9)), "a run that began afresh frees nothing"
    assert not outlived(seven, first, third, SnapshotId(second, 9), SnapshotId(third, 11))


def test_a_shape_says_what_a_shard_has_to_be() -> None:
    four = cluster(1, 1, 1, 1, parity=1)
    scene = Survivors({one.node: one for one in four.inventories(7, without=[name(1)])})
    (keeper,) = [node for node in scene.found if isinstance(_step(scene, node), MakeShard)]
    assert scene.act(keeper)
    own = scene.found[keeper]
    spoiled = [replace(one, file_bytes=one.file_bytes + 1) if one.foster else one for one in own.shards]
    scene.found[keeper] = replace(own, shards=spoiled)
    step = _step(scene, keeper)
    assert isinstance(step, MakeShard) and isinstance(step.shape, ShardShape), (
        "another file is not the one that is lost"
    )


def _step(scene: Survivors, node: bytes) -> object:
    plan = scene.plan(node)
    return next_step(plan, scene.inventories(), node) if plan is not None else None
