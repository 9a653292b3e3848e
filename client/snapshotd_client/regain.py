"""Lost shards come back: the ranks on newcomers have their daemons decode them, and everybody waits together.

Each rank that is to host a lost shard attaches its arena first and asks its daemon for the rebuild. All ranks gather
how far it is until all are over, so that no gather lasts longer than its bound however large the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Event

import msgspec

from snapshotd import wire
from snapshotd.door_client import DoorClient
from snapshotd.errors import DaemonUnavailable, ProtocolError, Refused, SnapshotError
from snapshotd.faults import crash_point
from snapshotd.recovery import Assignment, Choice
from snapshotd.wire import ArenaReport, Holding, Inventory, Shard
from snapshotd_client.agree import Peers, Rebuilt
from snapshotd_client.copier import Grant

PAUSES_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

Claim = Callable[[Assignment], Grant]
"""Attaches the arena of an assignment. Refused, DaemonUnavailable, ProtocolError or OSError where it cannot be had."""


def together(
    choice: Choice, own: Assignment, streams: Mapping[bytes, str], peers: Peers, door: DoorClient | None, claim: Claim
) -> list[Rebuilt]:
    """Rebuild what is missing; what became of it, by rank. Every rank calls it, also those with nothing to rebuild."""
    state, pause, tries = Rebuilt(), Event(), 0
    if own.rebuild:
        state = _begin(choice, own, streams, door, claim)
    while True:
        gathered = peers.gather(state)
        if all(one.over for one in gathered):
            crash_point("rebuild.over")
            return gathered
        pause.wait(PAUSES_S[min(tries, len(PAUSES_S) - 1)])
        tries += 1
        if not state.over:
            state = _look(state, door)


def _begin(
    choice: Choice, own: Assignment, streams: Mapping[bytes, str], door: DoorClient | None, claim: Claim
) -> Rebuilt:
    assert choice.snapshot is not None and own.shard is not None
    how = choice.missing[own.shard]
    try:
        if door is None:
            raise DaemonUnavailable("there is no daemon to rebuild with")
        grant = claim(own)
        door.ask(
            wire.Rebuild(
                arena=grant.arena_id,
                snapshot=choice.snapshot,
                rank=own.shard,
                layout=how.layout,
                shards={
                    rank: Holding(streams.get(s.node, ""), s.node.hex()[:6], s.shard.arena, s.shard.slot)
                    for rank, s in how.shards.items()
                },
                parities={
                    position: Holding(streams.get(p.node, ""), p.node.hex()[:6], p.report.arena, p.report.slot)
                    for position, p in how.parities.items()
                },
            )
        )
        crash_point("rebuild.asked")
    except (Refused, DaemonUnavailable, ProtocolError, SnapshotError, OSError) as error:
        return Rebuilt(True, own.shard, kind="failed", why=str(error))
    return Rebuilt(False, own.shard, arena=grant.arena_id, slot_bytes=grant.slot_bytes, block_bytes=grant.block_bytes)


def _look(state: Rebuilt, door: DoorClient | None) -> Rebuilt:
    try:
        reply, _ = door.ask(wire.AskRebuild(state.arena)) if door is not None else (None, [])
    except (Refused, DaemonUnavailable, ProtocolError) as error:
        return Rebuilt(True, state.shard, kind="failed", why=str(error))
    if not isinstance(reply, wire.RebuildReport):
        return Rebuilt(True, state.shard, kind="failed", why="the daemon answered with something else")
    return Rebuilt(
        reply.over, state.shard, state.arena, reply.slot, state.slot_bytes, state.block_bytes, reply.failure, reply.why,
        reply.total_bytes if reply.over else reply.done_bytes, reply.seconds,
    )  # fmt: skip


def with_rebuilt(
    inventories: list[Inventory],
    choice: Choice,
    assignments: Mapping[int, Assignment],
    node_of: Mapping[int, bytes],
    generation: wire.GenerationId,
    rebuilt: list[Rebuilt] | None,
) -> list[Inventory]:
    """The inventories with what was rebuilt (None: with what is going to be) as if its nodes had reported it."""
    assert choice.snapshot is not None
    anew = {one.arena for one in rebuilt or () if one.arena}
    kept = [
        msgspec.structs.replace(
            inventory,
            # What was reported there was bad, and the decoded shard may lie in the other slot.
            shards=[s for s in inventory.shards if s.arena not in anew or s.snapshot != choice.snapshot],
        )
        for inventory in inventories
    ]
    added = []
    for rank, one in assignments.items():
        if not one.rebuild or one.shard is None:
            continue
        shape = next(s for row in choice.missing[one.shard].layout.positions for s in row if s.rank == one.shard)
        arena = rebuilt[rank].arena if rebuilt is not None else one.arena or bytes(16)
        slot_bytes = rebuilt[rank].slot_bytes if rebuilt is not None else one.slot_bytes
        slot = rebuilt[rank].slot if rebuilt is not None else 0
        shard = Shard(
            choice.snapshot, arena, slot, "FULL", one.shard, choice.world_size, shape.fingerprint, shape.file_bytes,
            shape.block_bytes,
        )  # fmt: skip
        report = ArenaReport(arena, rank, generation, slot_bytes, shape.block_bytes, 0, False, choice.snapshot)
        added.append(Inventory(node_of[rank], "", [shard], [report]))
    return [*kept, *added]
