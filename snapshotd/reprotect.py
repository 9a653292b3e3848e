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
from snapshotd.recovery import Group, Source
from snapshotd.wire import GenerationId, GroupLayout, Inventory, ShardShape, SnapshotId


@dataclass(frozen=True)
class Plan:
    """How survivors protect a snapshot anew. `order` are their ids by position in `layout`, `fosters` the lost shards
    that each of them keeps, `base` the group that these are decoded from."""

    snapshot: SnapshotId
    committed: bool
    base: Group
    order: tuple[bytes, ...]
    fosters: Mapping[bytes, tuple[ShardShape, ...]]
    layout: GroupLayout


@dataclass(frozen=True)
class Finding:
    """How well this node's group of the snapshot that would be restored is protected: `losses_left` more of its nodes
    may be lost. `gone` of its positions have no node that answers. `plan` is None where nothing can be made better."""

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
    gathered = list(inventories)
    hopeless = {one for inventory in gathered for one in inventory.hopeless}
    choice = recovery.choose(gathered, excluded=hopeless)
    if choice.snapshot is None:
        return Finding(choice.why)
    groups = [(group, standing(group)) for group in recovery.groups_of(gathered, choice.snapshot)]
    groups = [(group, stands) for group, stands in groups if me in stands and _recoverable(group, stands)]
    if not groups:
        return Finding(f"no parity of {choice.snapshot} tells of a group that this node is part of", choice.snapshot)
    held = {inventory.node: inventory for inventory in gathered}
    margins = [margin(choice.snapshot, group.layout, stands, held) for group, stands in groups]
    left = max(margins)
    group, stands = groups[margins.index(left)]  # of equals the first, by its digest
    return _found(choice, group, stands, left)


def _found(choice: recovery.Choice, group: Group, stands: Mapping[bytes, int], left: int) -> Finding:
    assert choice.snapshot is not None
    count = len(group.layout.positions)
    gone = count - len(stands)
    # Where nobody is gone the group is as it was, and what it lacks is for the next generation to make.
    lost = gone > 0 or group.is_foster
    again = plan_for(choice.snapshot, choice.committed, group, stands) if lost else None
    target = again.layout.parity if again is not None else 0
    more = f"{max(0, left)} more lost {'node' if left == 1 else 'nodes'} can be rebuilt"
    if not gone and left >= group.layout.parity:
        return Finding(
            f"all {count} nodes of its group protect {choice.snapshot}: {more}", choice.snapshot, 0, left, True
        )
    what = (
        f"of the {count} nodes of its group {gone} {'is' if gone == 1 else 'are'} gone" if gone else "some parity lacks"
    )
    if not lost:
        return Finding(f"{what}: {more}", choice.snapshot, 0, max(0, left))
    if again is None or target <= left:
        why = f"{what}, and the others are too few to protect {choice.snapshot} better: {more}"
        return Finding(why, choice.snapshot, gone, max(0, left))
    return Finding(f"{what}: {more}", choice.snapshot, gone, max(0, left), plan=again)


# --- who stands where, and what that is worth -------------------------------------------------------------------------


def standing(group: Group) -> dict[bytes, int]:
    """The position of each node that has a part of this group: that of its parity set, else that of its ranks' own
    shards.

    A foster shard says nothing, since whoever keeps it stands elsewhere; a node stands once, and so does a position.
    """
    places: dict[bytes, int] = {}
    for position, parity in sorted(group.parities.items()):
        places.setdefault(parity.node, position)
    by_shards: dict[bytes, set[int]] = {}
    for position, shapes in enumerate(group.layout.positions):
        for shape in shapes:
            source = group.shards.get(shape.rank)
            if source is not None and not source.shard.foster:
                by_shards.setdefault(source.node, set()).add(position)
    for node, stands in sorted(by_shards.items()):
        if node not in places and len(stands) == 1 and not stands & set(places.values()):
            (places[node],) = stands
    return places


def margin(
    snapshot: SnapshotId, layout: GroupLayout, stands: Mapping[bytes, int], held: Mapping[bytes, Inventory]
) -> int:
    """How many more nodes the group can lose, counting only positions of which one node has all there is: below 0, some
    bytes hang on parts of positions, and nothing is promised. Whoever else has a part of it too does not matter."""
    intact = sum(
        _has_set(held[node], snapshot, layout, position)
        and all(_shard_on(held[node], snapshot, shape) is not None for shape in layout.positions[position])
        for node, position in stands.items()
    )
    return intact - geometry.stripes(layout).k


def _recoverable(group: Group, stands: Mapping[bytes, int]) -> bool:
    """Every shard of a position without a node can be decoded from this group, or is there."""
    k, taken = geometry.stripes(group.layout).k, set(stands.values())
    return all(
        shape.rank in group.shards or group.left_for(position, index) >= k
        for position, shapes in enumerate(group.layout.positions)
        if position not in taken
        for index, shape in enumerate(shapes)
    )


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan_for(snapshot: SnapshotId, committed: bool, base: Group, stands: Mapping[bytes, int]) -> Plan | None:
    """Lost shards go whole to the survivors, the longest first, each to the one that has the fewest bytes by then; the
    survivors stand in the order of their ids and keep as much parity as before, or what their number allows.

    None where that leaves no parity at all.
    """
    layout, order = base.layout, tuple(sorted(stands))
    parity = geometry.parity_for(layout.parity, len(order))
    if not parity:
        return None
    own = {node: list(layout.positions[stands[node]]) for node in order}
    lost = [shape for at, shapes in enumerate(layout.positions) if at not in stands.values() for shape in shapes]
    fosters: dict[bytes, list[ShardShape]] = {node: [] for node in order}
    for shape in sorted(lost, key=lambda one: (-one.file_bytes, one.rank)):
        node = min(order, key=lambda one: (_bytes(own[one] + fosters[one], layout.unit_bytes), one))
        fosters[node].append(shape)
    positions = [sorted(own[node] + fosters[node], key=lambda one: one.rank) for node in order]
    kept = {node: tuple(sorted(shapes, key=lambda one: one.rank)) for node, shapes in fosters.items() if shapes}
    return Plan(snapshot, committed, base, order, kept, geometry.lay_out(positions, parity))


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
