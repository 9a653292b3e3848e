"""Repairs for the scrubber, on the loop: where the rest of a slot's group is now, and a thread to repair from it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from snapshotd import geometry, recovery
from snapshotd.arena import ArenaFile
from snapshotd.combine import Cancelled
from snapshotd.peers import Peers
from snapshotd.recovery import Group, ParitySource, Source
from snapshotd.repair import Repaired, Target, repair
from snapshotd.wire import Holding, Inventory, SnapshotId


class Mender:
    """Over the peers of a daemon. Reads only: what the group holds is theirs."""

    def __init__(self, peers: Peers) -> None:
        self._peers, self._keeper = peers, peers.keeper

    async def repair(
        self, file: ArenaFile, slot: int, snapshot: SnapshotId, blocks: list[int], cancelled: Callable[[], bool]
    ) -> Repaired:
        """Repair blocks of a slot that the caller holds."""
        generation = self._keeper.generation_of(file)
        if not generation.spans_nodes:
            return Repaired(why="its job has one node, and no other protects it", beyond_help=True)
        inventories = [self._keeper.inventory(file.job), *await self._peers.inventories(file.job, fresh=True)]
        target = target_of(file, slot, snapshot, inventories)
        if target is None:
            return Repaired(why="no node that answers has parity of it")
        try:
            done = await asyncio.get_running_loop().run_in_executor(
                self._peers.workers, repair, target, file.native, slot, blocks, self._peers.tools, cancelled
            )
        except Cancelled:
            return Repaired(why="this daemon ended")
        generation = self._keeper.generation_of(file)
        for holding in target.doubtful:
            if holding.arena not in self._keeper.files:
                self._peers.doubt(generation, holding, snapshot, "its bytes failed in a repair")
        if done.beyond_help and len(inventories) < len(target.layout.positions):
            done.beyond_help = False  # a node of the group that does not answer now may come back
        return done


def target_of(file: ArenaFile, slot: int, snapshot: SnapshotId, inventories: Sequence[Inventory]) -> Target | None:
    """What a slot is in its group, and where the others are. None where no parity tells."""
    info = file.native.slot(slot)
    streams = {one.node: one.streams for one in inventories}
    labels = {one.node: one.label for one in inventories}

    def holding(source: Source | ParitySource) -> Holding:
        one = source.shard if isinstance(source, Source) else source.report
        return Holding(streams[source.node], labels[source.node], one.arena, one.slot)

    for group in recovery.groups_of(inventories, snapshot):
        position = info.rank if file.is_parity else _position_of(group, info.rank, info.fingerprint)
        if position is None or (file.is_parity and geometry.digest(group.layout) != info.fingerprint):
            continue
        shards = {rank: holding(one) for rank, one in group.shards.items()}
        parities = {at: holding(one) for at, one in group.parities.items() if not file.is_parity or at != position}
        rank = None if file.is_parity else info.rank
        return Target(file.job, snapshot, group.layout, position, rank, shards, parities)
    return None


def _position_of(group: Group, rank: int, fingerprint: bytes) -> int | None:
    for position, shapes in enumerate(group.layout.positions):
        if any((shape.rank, shape.fingerprint) == (rank, fingerprint) for shape in shapes):
            return position
    return None
