"""A rank without torch: attaches, holds bytes in its arena as a snapshot of some step, and sees it committed.

What `snapshotd_client` does in a trainer, without a model: a benchmark of what happens between nodes needs no more.
One process may play ranks of several nodes, a `Holder` each.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.nodes import until
from snapshotd import _native, geometry, wire
from snapshotd.door_client import DoorClient
from snapshotd.geometry import Member
from snapshotd.wire import GenerationId, Place, SnapshotId

BLOCK_BYTES = 1 << 20


class Holder:
    """One rank's side of its daemon's door. The inventory is taken at once, which fences what was before."""

    def __init__(self, socket: Path, job: str, rank: int) -> None:
        self.job, self.rank = job, rank
        self.door = DoorClient.connect(socket)
        self.door.ask(wire.Hello("trainer", os.getpid()))
        reply, _ = self.door.ask(wire.TakeInventory(job))
        assert isinstance(reply, wire.InventoryTaken)
        self.inventory = reply.inventory
        self.arena_id = b""
        self._fds: Sequence[int] = ()
        self._arena: _native.Arena | None = None

    @property
    def place(self) -> Place:
        """This node, for the others."""
        told = self.inventory
        return Place(told.node, told.label, told.address, told.streams, [self.rank], told.badge)

    @property
    def arena(self) -> _native.Arena:
        """What was attached."""
        assert self._arena is not None
        return self._arena

    def attach(
        self,
        generation: GenerationId,
        places: Sequence[Place],
        slot_bytes: int,
        parity: int,
        restored: SnapshotId | None = None,
    ) -> None:
        """Join a generation of one rank a node, in one group; with `restored`, to have this rank's shard rebuilt."""
        reply, self._fds = self.door.ask(
            wire.Attach(
                job=self.job,
                generation=generation,
                rank=self.rank,
                world_size=len(places),
                local_index=0,
                local_ranks=[self.rank],
                every=1,
                slot_bytes=slot_bytes,
                block_bytes=BLOCK_BYTES,
                fingerprint=bytes(32),
                parity=parity,
                group_size=len(places),
                passed=restored.step if restored else 0,
                restored=restored,
                nodes=list(places),
                groups=geometry.plan([Member(place.node) for place in places], len(places)),
                rebuild=restored is not None,
            )
        )
        assert isinstance(reply, wire.Granted)
        self.arena_id = reply.arena
        arena_fd, lock_fd, _ = self._fds
        self._arena = _native.Arena(arena_fd, writable=True, exclude_from_fork=True)
        fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.door.ask(wire.Held(self.arena_id))

    def take(self, snapshot: SnapshotId, world_size: int, data: bytes) -> None:
        """A whole snapshot: claimed, filled, checksummed and published."""
        arena, made_by = self.arena, snapshot.generation
        slot = arena.claim(
            generation=made_by.number,
            nonce=made_by.nonce,
            step=snapshot.step,
            rank=self.rank,
            world_size=world_size,
            fingerprint=bytes(32),
        )
        arena.passed = snapshot.step
        with arena.slot_view(slot) as view:
            view[: len(data)] = data
        arena.set_block_crcs(slot, len(data))
        arena.publish(slot, len(data))
        os.eventfd_write(self._fds[2], 1)

    def close(self) -> None:
        """Let go, as a trainer that dies does: what it held stays with its node."""
        self.door.close()
        if self._arena is not None:
            self._arena.close()
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds, self._arena = (), None


def protect_together(
    holders: Sequence[Holder], snapshot: SnapshotId, contents: Iterable[bytes], slot_bytes: int, parity: int
) -> None:
    """All ranks attach and take a snapshot of their contents, by rank; over once every node has committed it."""
    places = [holder.place for holder in holders]
    for holder in holders:
        holder.attach(snapshot.generation, places, slot_bytes, parity)
    for holder, data in zip(holders, contents, strict=True):
        holder.take(snapshot, len(holders), data)
    until(
        lambda: all(holder.arena.committed_step >= snapshot.step for holder in holders),
        f"the commit of {snapshot} on every node",
    )
