"""What survivors do about a snapshot whose group lost nodes while its job waits: pure, and the same answer on each of
them.

Nothing is asked or agreed. From the inventories of whoever answers each survivor computes the snapshot that a restart
would choose, which nodes of its own group are gone, and a plan: who keeps the shards of the lost nodes (*fosters*) and
who owns which parity of the new, smaller group. All of it is added to what is there, so who sees other survivors than
the rest (a partition) wastes memory and harms nothing.

1. `assess`     how well the snapshot is protected, and the plan where that can be made better
2. `next_step`  what this node has to do next for a plan, or whom it waits for
3. `outlived`   whether a foster is of no more use
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from snapshotd import geometry, recovery
from snapshotd.manifest import round_up
from snapshotd.recovery import Group, Rebuilding, Source
from snapshotd.wire import GenerationId, GroupLayout, Inventory, ShardShape, SnapshotId


@dataclass(frozen=True)
class Plan:
    """How survivors protect a snapshot anew. `order` are their ids by position in `layout`, `fosters` the lost shards
    that each of them keeps, `missing` how each of these comes back."""

    snapshot: SnapshotId
    committed: bool
    world_size: int
    missing: Mapping[int, Rebuilding]
    order: tuple[bytes, ...]
    fosters: Mapping[bytes, tuple[ShardShape, ...]]
    layout: GroupLayout


@dataclass(frozen=True)
class Finding:
    """How well this node's group of the snapshot that would be restored is protected: `losses_left` more of its nodes
    may be lost. `gone` of them do not answer. `plan` is None where nothing can be made better."""

    why: str
    snapshot: SnapshotId | None = None
    gone: int = 0
    losses_left: int = 0
    whole: bool = False
    plan: Plan | None = None


@dataclass(frozen=True)
class MakeShard:
    """Decode this lost shard."""

    shape: ShardShape


@dataclass(frozen=True)
class MakeSet:
    """Make the parity set of this position; `shards` says where each shard of the new group lies."""

    position: int
    shards: Mapping[int, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class Wait:
    """Others have to do their part first."""

    why: str


Step: TypeAlias = MakeShard | MakeSet | Wait


def assess(inventories: Iterable[Inventory], me: bytes) -> Finding:
    """How what would be restored is protected in the group of this node, as far as these inventories tell."""
    held = {inventory.node: inventory for inventory in inventories}
    hopeless = {one for inventory in held.values() for one in inventory.hopeless}
    choice = recovery.choose(held.values(), excluded=hopeless)
    if choice.snapshot is None:
        return Finding(choice.why)
    by_ranks: dict[tuple[int, ...], list[Group]] = {}
    for group in recovery.groups_of(held.values(), choice.snapshot):
        by_ranks.setdefault(tuple(sorted(_shapes(group.layout))), []).append(group)
    found = [
        _found(choice, groups, survivors, held)
        for _, groups in sorted(by_ranks.items())
        if me in (survivors := owners(groups))
    ]
    if not found:
        return Finding(f"no parity of {choice.snapshot} tells of a group that this node is part of", choice.snapshot)
    return max(found, key=lambda one: (one.losses_left, one.whole))  # it may be protected in two groupings


def _found(
    choice: recovery.Choice,
    groups: Sequence[Group],
    survivors: Mapping[bytes, Sequence[int]],
    held: Mapping[bytes, Inventory],
) -> Finding:
    """Of groupings of the same ranks: the one before the loss, and those that survivors made since."""
    assert choice.snapshot is not None
    snapshot, layouts = choice.snapshot, [group.layout for group in groups]
    margins = [margin(snapshot, layout, held) for layout in layouts]
    left, best = max(margins), layouts[margins.index(max(margins))]
    count, target = max(len(one.positions) for one in layouts), max(one.parity for one in layouts)
    target = geometry.parity_for(target, len(survivors))
    gone = max(0, count - len(survivors))
    more = f"{max(0, left)} more lost {'node' if left == 1 else 'nodes'} can be rebuilt"
    if left >= max(1, target):
        why = f"all {len(best.positions)} nodes of its group protect {snapshot}: {more}"
        return Finding(why, snapshot, gone, left, whole=True)
    what = f"of the {count} nodes of its group {gone} {'is' if gone == 1 else 'are'} gone" if gone else "parity lacks"
    lost = choice.missing.keys() & _shapes(best).keys()
    if not lost:  # the group is as it was, and what it lacks is for the next generation to make
        return Finding(f"{what}: {more}", snapshot, gone, max(0, left))
    if target <= left or not target:
        why = f"{what}, and the others are too few to protect {snapshot} better: {more}"
        return Finding(why, snapshot, gone, max(0, left))
    plan = plan_for(choice, _shapes(best), survivors, target)
    return Finding(f"{what}: {more}", snapshot, gone, max(0, left), plan=plan)


# --- who has what, and what that is worth -----------------------------------------------------------------------------


def _shapes(layout: GroupLayout) -> dict[int, ShardShape]:
    return {shape.rank: shape for shapes in layout.positions for shape in shapes}


def owners(groups: Sequence[Group]) -> dict[bytes, list[int]]:
    """The nodes of a group with the ranks of which they have the shards themselves. Fosters do not make an owner."""
    found: dict[bytes, list[int]] = {}
    for rank in sorted(_shapes(groups[0].layout)):
        sources = [group.shards[rank] for group in groups if rank in group.shards]
        own = [source for source in sources if not source.shard.foster]
        if own:
            found.setdefault(own[0].node, []).append(rank)
    return found


def margin(snapshot: SnapshotId, layout: GroupLayout, held: Mapping[bytes, Inventory]) -> int:
    """How many more nodes a group can lose, counting only positions of which one node has all there is: below 0, some
    bytes hang on parts of positions, and nothing is promised. Whoever else has a part of it too does not matter."""
    intact: dict[bytes, int] = {}
    for position, shapes in enumerate(layout.positions):
        for node, inventory in sorted(held.items()):
            has_all = all(_shard_on(inventory, snapshot, shape) is not None for shape in shapes)
            if node not in intact and has_all and _has_set(inventory, snapshot, layout, position):
                intact[node] = position
                break
    return len(intact) - geometry.stripes(layout).k


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan_for(
    choice: recovery.Choice, shapes: Mapping[int, ShardShape], survivors: Mapping[bytes, Sequence[int]], parity: int
) -> Plan:
    """Lost shards go whole to the survivors, the longest first, each to the one that has the fewest bytes by then; the
    survivors stand in the order of their ids."""
    assert choice.snapshot is not None
    order, unit = tuple(sorted(survivors)), max(shape.block_bytes for shape in shapes.values())
    own = {node: [shapes[rank] for rank in survivors[node]] for node in order}
    lost = [shapes[rank] for rank in sorted(choice.missing.keys() & shapes.keys())]
    fosters: dict[bytes, list[ShardShape]] = {node: [] for node in order}
    for shape in sorted(lost, key=lambda one: (-one.file_bytes, one.rank)):
        node = min(order, key=lambda one: (_bytes(own[one] + fosters[one], unit), one))
        fosters[node].append(shape)
    positions = [sorted(own[node] + fosters[node], key=lambda one: one.rank) for node in order]
    kept = {node: tuple(sorted(some, key=lambda one: one.rank)) for node, some in fosters.items() if some}
    layout = geometry.lay_out(positions, parity)
    return Plan(choice.snapshot, choice.committed, choice.world_size, choice.missing, order, kept, layout)


def _bytes(shapes: Sequence[ShardShape], unit: int) -> int:
    return sum(round_up(shape.file_bytes, unit) for shape in shapes)


# --- step by step -----------------------------------------------------------------------------------------------------


def next_step(plan: Plan, inventories: Iterable[Inventory], me: bytes) -> Step:
    """What this node does next. Parity comes once every survivor has its fosters; whoever has done all waits for
    others."""
    held = {inventory.node: inventory for inventory in inventories}
    for shape in plan.fosters.get(me, ()):
        if _shard_on(held[me], plan.snapshot, shape) is None:
            return MakeShard(shape)
    shards: dict[int, Source] = {}
    for node, shapes in zip(plan.order, plan.layout.positions, strict=True):
        for shape in shapes:
            source = _shard_on(held.get(node), plan.snapshot, shape)
            if source is None:
                return Wait(f"a survivor is still to decode the shard of rank {shape.rank}")
            shards[shape.rank] = source
    position = plan.order.index(me)
    if not _has_set(held[me], plan.snapshot, plan.layout, position):
        return MakeSet(position, shards)
    return Wait("the other survivors make their parity")


def _shard_on(inventory: Inventory | None, snapshot: SnapshotId, shape: ShardShape) -> Source | None:
    for shard in inventory.shards if inventory is not None else []:
        same = (shard.snapshot, shard.rank, shard.file_bytes, shard.fingerprint, shard.block_bytes) == (
            snapshot, shape.rank, shape.file_bytes, shape.fingerprint, shape.block_bytes
        )  # fmt: skip
        if same and shard.progress in recovery.USABLE and inventory is not None:
            return Source(inventory.node, shard)
    return None


def _has_set(inventory: Inventory, snapshot: SnapshotId, layout: GroupLayout, position: int) -> bool:
    return any(
        (one.snapshot, one.position, one.layout) == (snapshot, position, layout) and one.progress in recovery.USABLE
        for one in inventory.parities
    )


# --- the end ----------------------------------------------------------------------------------------------------------


def outlived(
    snapshot: SnapshotId,
    made_in: GenerationId,
    generation: GenerationId,
    restored: SnapshotId | None,
    committed: SnapshotId,
) -> bool:
    """A foster of `snapshot`, made in a generation of that name, is of no more use once `generation`, which began from
    `restored`, has committed `committed`: a newer snapshot of its own line, or the same one, protected anew by all."""
    if snapshot.generation == generation:
        return committed.generation == generation and snapshot.step < committed.step
    return snapshot == restored and (committed != snapshot or made_in != generation)
