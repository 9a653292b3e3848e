"""Coming back: choose together, verify everything, agree, and only then write into the parameters.

All ranks gather the inventories and compute the same choice. Each maps the shards it needs read-only, checks every
block of its own against its CRC32C and the layout against the live model, and tells the others. No rank's weights are
touched before all ranks have said that their bytes are good; a snapshot that fails is set aside for everyone, and the
next older one is tried.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from snapshotd import _native, manifest, recovery, wire
from snapshotd.clock import Clock
from snapshotd.door_client import DoorClient
from snapshotd.errors import (
    DaemonUnavailable,
    LayoutChanged,
    ProtocolError,
    Refused,
    SnapshotError,
    SnapshotLost,
)
from snapshotd.faults import crash_point
from snapshotd_client import hoststate
from snapshotd_client.agree import Peers, Verdict
from snapshotd_client.layout import Item
from snapshotd_client.state import TrainingState, dtype_of

ATTEMPTS_MAX = 16


@dataclass
class OpenShard:
    """One rank's shard, mapped read-only and pinned by the daemon while the door is open."""

    arena: _native.Arena
    slot: int
    manifest: manifest.Manifest
    view: memoryview


@dataclass
class Restored:
    """What a restore did: `snapshot` is None where nothing was there to restore."""

    snapshot: wire.SnapshotId | None
    choice: recovery.Choice
    verify_s: float = 0.0
    copy_s: float = 0.0
    bytes: int = 0
    passed_over: list[str] = field(default_factory=list)


class _Corrupt(Exception):
    """Bytes of a rank's shard fail their checksum."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(why)
        self.rank = rank


def run(
    state: TrainingState,
    peers: Peers,
    door: DoorClient | None,
    inventories: list[wire.Inventory],
    clock: Clock,
    *,
    newer_than: int | None,
    threads: int,
) -> Restored:
    """Restore the newest snapshot that is whole and verifies on every rank.

    SnapshotLost where something was committed and nothing can be rebuilt, LayoutChanged where the snapshot is of
    another model or world size (it stays untouched), SnapshotError where a rank failed in the middle.
    """
    excluded: list[wire.SnapshotId] = []
    reports: list[str] = []
    for _ in range(ATTEMPTS_MAX):
        choice = recovery.choose(inventories, excluded=excluded, newer_than=newer_than)
        crash_point("restore.chosen")
        if choice.snapshot is None:
            return Restored(None, choice, passed_over=reports)
        if choice.world_size != peers.world_size:
            raise LayoutChanged(
                f"{choice.snapshot} was taken by {choice.world_size} ranks and this job has {peers.world_size}; it was "
                f"left untouched in memory: relaunch with {choice.world_size} ranks, or load a disk checkpoint and "
                f"dismiss it with `snapshotd gc`"
            )
        attempt = _Attempt(state, peers, door, choice, clock, threads)
        done = attempt.run()
        if done is not None:
            done.passed_over = reports
            return done
        excluded.append(choice.snapshot)
        reports += attempt.reports
    raise SnapshotLost(f"{len(excluded)} snapshots in a row failed their checksums")


class _Attempt:
    """One try at one snapshot."""

    def __init__(
        self,
        state: TrainingState,
        peers: Peers,
        door: DoorClient | None,
        choice: recovery.Choice,
        clock: Clock,
        threads: int,
    ) -> None:
        assert choice.snapshot is not None
        self.state, self.peers, self.door, self.choice = state, peers, door, choice
        self.snapshot, self.clock, self.threads = choice.snapshot, clock, threads
        self.reports: list[str] = []
        self.shards: dict[int, OpenShard] = {}

    def run(self) -> Restored | None:
        """None where some rank's bytes are bad."""
        began_s = self.clock.monotonic_s()
        try:
            document = self._agree_that_all_is_good()
            if document is None:
                return None
            verified_s = self.clock.monotonic_s()
            self._copy_together(document)
            copied_s = self.clock.monotonic_s()
            size = self.shards[self.peers.rank].manifest.file_bytes
            return Restored(self.snapshot, self.choice, verified_s - began_s, copied_s - verified_s, size)
        finally:
            self._close()

    def _agree_that_all_is_good(self) -> dict[str, Any] | None:
        document: dict[str, Any] | None = None
        verdict = Verdict(self.snapshot)
        try:
            document = self._verify()
        except _Corrupt as error:
            verdict = Verdict(self.snapshot, "corrupt", str(error))
            self._quarantine(error.rank, str(error))
        except LayoutChanged as error:
            verdict = Verdict(self.snapshot, "layout", str(error))
        except (DaemonUnavailable, ProtocolError, Refused, OSError) as error:
            verdict = Verdict(self.snapshot, "failed", str(error))
        verdicts = self.peers.gather(verdict)
        bad = [(rank, one) for rank, one in enumerate(verdicts) if one.kind]
        for rank, one in bad:
            if one.kind == "layout":
                raise LayoutChanged(
                    f"{self.snapshot} does not fit this run on rank {rank}: {one.why}; it was left untouched in "
                    f"memory: restart with the model and optimizer that made it, or dismiss it with `snapshotd gc`"
                )
        for rank, one in bad:
            if one.kind == "failed":
                raise SnapshotError(
                    f"rank {rank} could not read its part of {self.snapshot}: {one.why}; nothing was "
                    f"changed, restart the job"
                )
        self.reports = [f"{self.snapshot}, rank {rank}: {one.why}" for rank, one in bad]
        return None if bad else document

    def _verify(self) -> dict[str, Any]:
        """Map, check identity, layout and bytes, and decode the host state. Touches nothing of the trainer's."""
        for rank in sorted(self.choice.sources):
            self.shards[rank] = self._open(rank)
        own = self.shards[self.peers.rank]
        broken = own.arena.verify(own.slot, self.threads)
        if broken:
            raise _Corrupt(self.peers.rank, f"{len(broken)} blocks fail their checksum, the first is block {broken[0]}")
        problems = self.state.differences(self._entries(), own.manifest.facts)
        if not problems:
            place, length = own.manifest.span(f"{self.state.world.own_prefix}host")
            try:
                document = hoststate.unpack(bytes(own.view[place : place + length]))
                problems = self.state.check_host(document)
            except (ValueError, KeyError) as error:
                raise _Corrupt(self.peers.rank, f"its host state cannot be read: {error}") from None
        problems = problems or self._misplaced()
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise LayoutChanged("; ".join(problems[:3]) + more)
        crash_point("restore.verified")
        return document

    def _misplaced(self) -> list[str]:
        """Tensors of the model that the shards do not cover exactly, before anything is written."""
        leaves = {leaf.name: leaf for leaf in self.state.leaves() if leaf.facts["kind"] != "optim"}
        filled = dict.fromkeys(leaves, 0)
        for shard in self.shards.values():
            for name in leaves.keys() & shard.manifest.entries.keys():
                leaf = leaves[name]
                filled[name] += _item(leaf.local, leaf.offset, shard.manifest.entries[name], 0)[1]
        return [
            f"{name} has {leaf.local.numel()} elements on this rank and {filled[name]} of them are in the snapshot"
            for name, leaf in leaves.items()
            if filled[name] != leaf.local.numel()
        ]

    def _open(self, rank: int) -> OpenShard:
        shard = self.choice.sources[rank].shard
        if self.door is None:
            raise DaemonUnavailable("there is no daemon to read from")
        reply, fds = self.door.ask(wire.OpenShard(shard.arena, shard.slot, shard.snapshot))
        try:
            if not isinstance(reply, wire.ShardOpened) or len(fds) != 1:
                raise ProtocolError("unexpected", "the daemon answered a read with something else")
            arena = _native.Arena(fds[0], writable=False)
        except _native.ArenaFormatError as error:
            raise _Corrupt(rank, str(error)) from None
        finally:
            for fd in fds:
                os.close(fd)
        info = arena.slot(shard.slot)
        if not info.sound or (info.rank, info.step) != (rank, shard.snapshot.step):
            raise _Corrupt(rank, "its slot's description fails its checksum")
        view = arena.slot_view(shard.slot)
        try:
            found = manifest.read(view, info.file_bytes)
        except ProtocolError as error:
            raise _Corrupt(rank, str(error)) from None
        return OpenShard(arena, shard.slot, found, view)

    def _entries(self) -> dict[str, manifest.Entry]:
        """Entries of all shards that concern this rank, by name."""
        own = self.state.world.own_prefix
        known = {"", own} | {self.state.world.spread(one).prefix for one in self.state.names.parameters.values()}
        found: dict[str, manifest.Entry] = {}
        for shard in self.shards.values():
            for name, entry in shard.manifest.entries.items():
                if entry.facts.get("prefix", own if name.startswith(own) else None) in known:
                    found[name] = entry
        return found

    def _copy_together(self, document: Mapping[str, Any]) -> None:
        """All ranks write now; whether each of them managed to is asked once more."""
        failure = ""
        try:
            self._copy(document)
        except (SnapshotError, ValueError, KeyError, TypeError, RuntimeError) as error:
            failure = f"{type(error).__name__}: {error}"
        crash_point("restore.copied")
        for rank, one in enumerate(self.peers.gather(Verdict(self.snapshot, "failed" if failure else "", failure))):
            if one.kind:
                raise SnapshotError(
                    f"rank {rank} failed while {self.snapshot} was being copied back ({one.why}); the model is not in "
                    f"a state to train from, and the snapshot is still in memory: restart the job"
                )

    def _copy(self, document: Mapping[str, Any]) -> None:
        self.state.create_optimizer_state(self._entries().values(), document)
        leaves = {leaf.name: leaf for leaf in self.state.leaves()}
        filled = dict.fromkeys(leaves, 0)
        for rank, shard in self.shards.items():
            items: list[Item] = []
            for name, entry in shard.manifest.entries.items():
                leaf = leaves.get(name)
                if leaf is not None:
                    item, count = _item(leaf.local, leaf.offset, entry, shard.manifest.places[name])
                    filled[name] += count
                    items += item
            if rank == self.peers.rank:
                crash_point("restore.copying")
            _native.scatter(shard.view, items, self.threads)
        short = [name for name, leaf in leaves.items() if filled[name] != leaf.local.numel()]
        if short:
            raise LayoutChanged(f"optimizer state {short[0]} is not whole in the snapshot")
        self.state.apply_host(document, self._outside())

    def _outside(self) -> dict[str, torch.Tensor]:
        """Large tensors of extras, copied out of this rank's own shard."""
        own = self.shards[self.peers.rank]
        found: dict[str, torch.Tensor] = {}
        for name, entry in own.manifest.entries.items():
            if entry.facts.get("kind") == "outside":
                place, length = own.manifest.span(name)
                dtype = dtype_of(entry.facts.get("dtype", entry.dtype))
                shape = list(entry.facts.get("shape", entry.shape))
                raw = bytes(own.view[place : place + length])
                found[name] = hoststate.from_raw(raw, str(dtype).removeprefix("torch."), shape)
        return found

    def _quarantine(self, rank: int, why: str) -> None:
        source = self.choice.sources[rank]
        if self.door is not None:
            try:
                self.door.ask(wire.Quarantine(source.shard.arena, source.shard.slot, self.snapshot, why))
            except (DaemonUnavailable, ProtocolError, Refused):
                self.reports.append("the daemon could not be told")

    def _close(self) -> None:
        for rank, shard in self.shards.items():
            shard.view.release()
            shard.arena.close()
            source = self.choice.sources[rank].shard
            if self.door is not None:
                try:
                    self.door.ask(wire.CloseShard(source.arena, source.slot))
                except (DaemonUnavailable, ProtocolError, Refused):
                    return
        self.shards = {}


def _item(local: torch.Tensor, offset: tuple[int, ...], entry: manifest.Entry, place: int) -> tuple[list[Item], int]:
    """Where a chunk of a file goes in the local tensor, and how many elements that is.

    A chunk that lies elsewhere in the global tensor is another rank's: no items. LayoutChanged if it lies partly inside
    what this rank holds: that takes resharding.
    """
    width = local.element_size()
    shape, start = entry.shape, entry.offset
    if "dtype" in entry.facts:  # stored as bytes: back to elements
        shape = (*shape[:-1], shape[-1] // width) if entry.facts["shape"] else ()
        start = (*start[:-1], start[-1] // width) if entry.facts["shape"] else ()
    mine = zip(offset, local.shape, start, shape, strict=True)
    if any(first >= low + held or first + length <= low for low, held, first, length in mine):
        return [], 0
    target = local
    for dim, (low, length, first) in enumerate(zip(offset, shape, start, strict=True)):
        if first < low or first + length > low + local.shape[dim]:
            raise LayoutChanged(f"{entry.name} is sharded differently in the snapshot")
        target = target.narrow(dim, first - low, length)
    if target.numel() == 0:
        return [], 0
    strides = tuple(stride * width for stride in target.stride())
    return [(target.data_ptr(), place, width, tuple(target.shape), strides)], target.numel()
