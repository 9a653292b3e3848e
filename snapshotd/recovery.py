"""What can be restored, from where, and why that: one pure function that every rank computes alike.

Input are the inventories of all nodes, as the ranks gathered them; the answer names a snapshot and the arena that
serves each rank's shard, or says why there is none. A snapshot is restored whole or not at all: shards of different
steps or generations never meet.
"""

from __future__ import annotations

import itertools
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
    gathered = list(inventories)
    shards: dict[SnapshotId, list[Source]] = {}
    for source in _merged(gathered):
        if source.shard.progress in USABLE:
            shards.setdefault(source.shard.snapshot, []).append(source)
    # By number first; groups that were cut off from one another may have picked the same, then the longer run wins.
    candidates = sorted(shards, key=lambda one: (one.generation.number, one.step, one.generation.nonce), reverse=True)
    reasons = sorted({sentence for inventory in gathered for sentence in inventory.damaged})
    for snapshot in candidates:
        if snapshot in excluded:
            reasons.append(f"{snapshot}: its bytes failed their checksum")
            continue
        sources, missing = _complete(shards[snapshot])
        if missing:
            reasons.append(f"{snapshot}: {missing}")
            continue
        return _chosen(snapshot, sources, reasons, newer_than)
    damaged = any(inventory.damaged for inventory in gathered) or any(snapshot in excluded for snapshot in shards)
    return _nothing(damaged or _was_committed(gathered), reasons, newer_than)


def _merged(inventories: Iterable[Inventory]) -> list[Source]:
    """Every shard once, sorted by where it lies.

    Several ranks of a node ask at slightly different times, so two looks at one slot may differ. Whoever found damage
    is right; else the later look, in which the slot is further, is.
    """
    seen: dict[tuple[bytes, bytes, int, SnapshotId], Shard] = {}
    for inventory in inventories:
        for shard in inventory.shards:
            place = (inventory.node, shard.arena, shard.slot, shard.snapshot)
            seen[place] = max(shard, seen.get(place, shard), key=_weight)
    return [Source(place[0], shard) for place, shard in sorted(seen.items(), key=lambda item: item[0])]


def _weight(shard: Shard) -> tuple[int, int, int, bytes, int]:
    known = ("FILLING", "FULL", "PROTECTED", "COMMITTED")
    progress = known.index(shard.progress) if shard.progress in known else len(known)
    return progress, shard.rank, shard.world_size, shard.fingerprint, shard.file_bytes


def _was_committed(inventories: Iterable[Inventory]) -> bool:
    """Something of this job was committed once, whatever became of it."""
    return any(
        any(arena.ever_committed for arena in inventory.arenas)
        or any(shard.progress == "COMMITTED" for shard in inventory.shards)
        for inventory in inventories
    )


def _complete(found: list[Source]) -> tuple[dict[int, Source], str]:
    """The best source of each rank's shard, and what is missing in words (empty: nothing is)."""
    world_size = found[0].shard.world_size
    if any(source.shard.world_size != world_size for source in found):
        return {}, "its shards disagree about the world size"
    sources: dict[int, Source] = {}
    for source in found:
        sources.setdefault(source.shard.rank, source)
    if world_size < 1 or max(sources) >= world_size:
        return {}, f"it has a shard of rank {max(sources)} and a world size of {world_size}"
    absent = world_size - len(sources)
    if absent:
        first = list(itertools.islice((rank for rank in itertools.count() if rank not in sources), min(absent, 8)))
        return sources, f"{_ranks(first, absent)} of {world_size} {'is' if absent == 1 else 'are'} missing"
    return dict(sorted(sources.items())), ""


def _chosen(snapshot: SnapshotId, sources: dict[int, Source], reasons: list[str], newer_than: int | None) -> Choice:
    if newer_than is not None and snapshot.step <= newer_than:
        return Choice(None, f"your own checkpoint of step {newer_than} is as new as {snapshot} or newer")
    world_size = len(sources)
    states = {source.shard.progress for source in sources.values()}
    how = "committed" if "COMMITTED" in states else "whole, though its commit was not finished"
    shards = f"all {world_size} shards are" if world_size > 1 else "its one shard is"
    why = f"{snapshot} is the newest that is whole: {shards} here and it is {how}"
    if reasons:
        why += f"; passed over: {'; '.join(reasons)}"
    return Choice(snapshot, why, world_size, sources)


def _nothing(existed: bool, reasons: list[str], newer_than: int | None) -> Choice:
    if not existed:
        partial = f" ({'; '.join(reasons)}: never committed)" if reasons else ""
        return Choice(None, f"nothing was ever committed for this job{partial}")
    why = f"{'; '.join(reasons) or 'no shard of a committed snapshot is left'}; nothing older is left"
    if newer_than is not None:
        return Choice(None, f"{why}, but your own checkpoint of step {newer_than} stands")
    return Choice(None, why, lost=True)


def _ranks(first: list[int], count: int) -> str:
    shown = ", ".join(str(rank) for rank in first) + (", …" if count > len(first) else "")
    return f"{'rank' if count == 1 else 'ranks'} {shown}"
