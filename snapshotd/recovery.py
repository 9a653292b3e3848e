"""What can be restored, from where, and why that: one pure function that every rank computes alike.

Input are the inventories of all nodes, as the ranks gathered them; the answer names a snapshot and the arena that
serves each rank's shard, or says why there is none. A snapshot is restored whole or not at all: shards of different
steps or generations never meet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from snapshotd.wire import Inventory, Shard, SnapshotId

USABLE = frozenset({"FULL", "PROTECTED", "COMMITTED"})


@dataclass(frozen=True)
class Source:
    """Where a rank's shard lies."""

    node: bytes
    shard: Shard


@dataclass(frozen=True)
class Choice:
    """`snapshot` is None where nothing is restored. `lost`: something was committed once and cannot be rebuilt."""

    snapshot: SnapshotId | None
    why: str
    world_size: int = 0
    sources: Mapping[int, Source] = field(default_factory=dict)
    lost: bool = False


def choose(
    inventories: Iterable[Inventory], *, excluded: Collection[SnapshotId] = (), newer_than: int | None = None
) -> Choice:
    """The newest generation and step that is whole.

    `excluded` are snapshots whose bytes failed their checksums in an earlier attempt. `newer_than` is the step of a
    checkpoint of the user's own: only a newer snapshot is worth restoring then.
    """
    nodes = {inventory.node: inventory for inventory in inventories}
    shards: dict[SnapshotId, list[Source]] = {}
    for node, inventory in sorted(nodes.items()):
        for shard in inventory.shards:
            if shard.progress in USABLE:
                shards.setdefault(shard.snapshot, []).append(Source(node, shard))
    candidates = sorted(shards, key=lambda one: (one.generation.number, one.step, one.generation.nonce), reverse=True)
    reasons = [sentence for inventory in nodes.values() for sentence in inventory.damaged]
    for snapshot in candidates:
        if snapshot in excluded:
            reasons.append(f"{snapshot}: its bytes failed their checksum")
            continue
        sources, missing = _complete(shards[snapshot])
        if missing:
            reasons.append(f"{snapshot}: {missing}")
            continue
        return _chosen(snapshot, sources, reasons, newer_than)
    return _nothing(nodes.values(), reasons, newer_than)


def _complete(found: list[Source]) -> tuple[dict[int, Source], str]:
    """The best source of each rank's shard, and what is missing in words (empty: nothing is)."""
    world_size = found[0].shard.world_size
    if any(source.shard.world_size != world_size for source in found):
        return {}, "its shards disagree about the world size"
    sources: dict[int, Source] = {}
    for source in sorted(found, key=lambda one: (one.node, one.shard.arena)):
        sources.setdefault(source.shard.rank, source)
    absent = [rank for rank in range(world_size) if rank not in sources]
    if absent:
        return sources, f"{_ranks(absent)} of {world_size} {'is' if len(absent) == 1 else 'are'} missing"
    return {rank: sources[rank] for rank in range(world_size)}, ""


def _chosen(snapshot: SnapshotId, sources: dict[int, Source], reasons: list[str], newer_than: int | None) -> Choice:
    if newer_than is not None and snapshot.step <= newer_than:
        return Choice(None, f"your own checkpoint of step {newer_than} is newer than {snapshot}")
    world_size = len(sources)
    states = {source.shard.progress for source in sources.values()}
    how = "committed" if "COMMITTED" in states else "whole, though its commit was not finished"
    why = f"{snapshot} is the newest that is whole: all {world_size} shards are here and it is {how}"
    if reasons:
        why += f"; passed over: {'; '.join(reasons)}"
    return Choice(snapshot, why, world_size, sources)


def _nothing(inventories: Iterable[Inventory], reasons: list[str], newer_than: int | None) -> Choice:
    inventories = list(inventories)
    existed = any(inventory.damaged for inventory in inventories) or any(
        arena.ever_committed for inventory in inventories for arena in inventory.arenas
    )
    if not existed:
        partial = f" ({'; '.join(reasons)}: never committed)" if reasons else ""
        return Choice(None, f"nothing was ever committed for this job{partial}")
    why = f"{'; '.join(reasons) or 'no shard of a committed snapshot is left'}; nothing older is left"
    if newer_than is not None:
        return Choice(None, f"{why}, but your own checkpoint of step {newer_than} stands")
    return Choice(None, why, lost=True)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", …" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
