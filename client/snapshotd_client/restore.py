"""Coming back: choose together, rebuild what is lost, verify, agree, and only then write into the parameters.

All ranks gather the inventories and compute the same choice, and from it which arena each takes over. What is missing
is rebuilt first. Then each rank reads the shard in its own arena, every block against its CRC32C, and the layout
against the live model, and tells the others. No rank's weights are touched before all ranks have said that their bytes
are good; a shard that fails counts as lost from then on. Shards on other nodes are read from there, checked as they
arrive.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import msgspec
import torch

from snapshotd import manifest, recovery, wire
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
from snapshotd.geometry import Formation
from snapshotd.keys import Pin, pin
from snapshotd.reader import Pace
from snapshotd.recovery import Assignment, BadPlace, Source
from snapshotd.streams import Pool, Stream
from snapshotd_client import gpu, hoststate, regain
from snapshotd_client.agree import Peers, Rebuilt, Verdict
from snapshotd_client.copier import Grant, Session
from snapshotd_client.layout import Item
from snapshotd_client.shards import Corrupt, LocalShard, OpenShard, RemoteShard
from snapshotd_client.state import TrainingState, dtype_of

ATTEMPTS_MAX = 16


@dataclass
class Restored:
    """What a restore did: `snapshot` is None where nothing was there to restore.

    `own` is the arena that this rank goes on with, `formation` how the snapshot's nodes stood in groups, `grant` the
    arena where it was claimed for a rebuild.
    """

    snapshot: wire.SnapshotId | None
    choice: recovery.Choice
    verify_s: float = 0.0
    copy_s: float = 0.0
    rebuild_s: float = 0.0
    bytes: int = 0
    rebuilt_bytes: int = 0
    passed_over: list[str] = field(default_factory=list)
    own: Assignment = field(default_factory=Assignment)
    formation: Formation | None = None
    grant: Grant | None = None


@dataclass
class Tools:
    """What a restore works with. `claim` attaches an arena in the generation that goes on from a snapshot."""

    state: TrainingState
    peers: Peers
    door: DoorClient | None
    clock: Clock
    session: Session
    here: bytes
    threads: int
    claim: Callable[[Assignment, recovery.Choice, Formation], Grant]

    def __post_init__(self) -> None:
        self.node_of = {r: node for node, ranks in self.session.ranks_by_node(self.here).items() for r in ranks}


def run(tools: Tools, inventories: list[wire.Inventory], *, newer_than: int | None) -> Restored:
    """Restore the newest snapshot that is whole, or can be rebuilt, and verifies on every rank.

    SnapshotLost where something was committed and nothing can be rebuilt, LayoutChanged where the snapshot is of
    another model or world size (it stays untouched), SnapshotError where a rank failed in the middle.
    """
    trail = _Trail(list(inventories), {one for inventory in inventories for one in inventory.hopeless})
    for _ in range(ATTEMPTS_MAX):
        choice = recovery.choose(
            trail.inventories, excluded=trail.excluded, newer_than=newer_than, bad=sorted(trail.bad)
        )
        crash_point("restore.chosen")
        if choice.snapshot is None:
            return Restored(None, choice, passed_over=trail.reports)
        if choice.world_size != tools.peers.world_size:
            raise LayoutChanged(
                f"{choice.snapshot} was taken by {choice.world_size} ranks and this job has {tools.peers.world_size}; "
                f"it was left untouched in memory: relaunch with {choice.world_size} ranks, or load a disk checkpoint "
                f"and dismiss it with `snapshotd gc`"
            )
        trail.stay_with(choice.snapshot)
        choice, own = trail.regain(tools, choice)
        done = _Attempt(tools, choice, own, trail).run()
        if done is not None:
            done.passed_over, done.own, done.formation = trail.reports, own, trail.formation
            done.grant, done.rebuilt_bytes, done.rebuild_s = trail.grant, trail.rebuilt_bytes, trail.rebuild_s
            return done
    raise SnapshotLost(f"{ATTEMPTS_MAX} attempts in a row met bytes that fail their checksums")


@dataclass
class _Trail:
    """What earlier attempts of this restore found out and did. The same on every rank."""

    inventories: list[wire.Inventory]
    excluded: set[wire.SnapshotId]
    bad: set[BadPlace] = field(default_factory=set)
    reports: list[str] = field(default_factory=list)
    formation: Formation | None = None
    grant: Grant | None = None
    regained: wire.SnapshotId | None = None
    rebuilt_bytes: int = 0
    rebuild_s: float = 0.0

    def set_aside(self, snapshot: wire.SnapshotId, verdicts: list[Verdict]) -> None:
        """These bytes count as lost from now on, and their slots as room for what will be rebuilt."""
        self.bad |= {(snapshot, one.rank, one.arena) for one in verdicts}
        arenas = {one.arena for one in verdicts}
        self.inventories = [
            msgspec.structs.replace(
                inventory,
                arenas=[
                    msgspec.structs.replace(one, room=max(1, one.room)) if one.arena in arenas else one
                    for one in inventory.arenas
                ],
            )
            for inventory in self.inventories
        ]

    def stay_with(self, snapshot: wire.SnapshotId) -> None:
        """Arenas that were claimed for a rebuild belong to a generation that goes on from that snapshot."""
        if self.regained not in (None, snapshot):
            raise SnapshotError(
                f"{self.regained} turned out damaged while lost shards of it were being rebuilt ({self.reports[-1]}); "
                f"nothing was changed: restart the job, and it goes on from {snapshot}"
            )

    def regain(self, tools: Tools, choice: recovery.Choice) -> tuple[recovery.Choice, Assignment]:
        """The choice with everything in place, what was missing having been rebuilt, and this rank's arena."""
        assert choice.snapshot is not None
        assignments = recovery.assign(choice, tools.session.ranks_by_node(tools.here), self.inventories)
        crash_point("restore.assigned")
        own = assignments[tools.peers.rank]
        generation = tools.session.generation
        planned = regain.with_rebuilt(self.inventories, choice, assignments, tools.node_of, generation, None)
        self.formation = recovery.previous_places(planned, choice.snapshot)
        if not choice.missing:
            return choice, own
        snapshot, formation = choice.snapshot, self.formation

        def claim(assignment: Assignment) -> Grant:
            self.grant = tools.claim(assignment, choice, formation)
            return self.grant

        self.regained = snapshot
        streams = {one.node: one.streams for one in self.inventories if one.streams}
        rebuilt = regain.together(choice, own, streams, tools.peers, tools.door, claim)
        self._note(choice, rebuilt)
        self.bad -= {(snapshot, one.shard, one.arena) for one in rebuilt}
        self.inventories = regain.with_rebuilt(
            self.inventories, choice, assignments, tools.node_of, generation, rebuilt
        )
        whole = recovery.choose(self.inventories, excluded=self.excluded, bad=sorted(self.bad))
        if whole.snapshot != snapshot or whole.missing:
            raise SnapshotError(f"{snapshot} was rebuilt and is still not whole ({whole.why}); restart the job")
        return replace(whole, why=choice.why), own

    def _note(self, choice: recovery.Choice, rebuilt: list[Rebuilt]) -> None:
        for rank, one in enumerate(rebuilt):
            if one.kind == "corrupt":
                raise SnapshotError(
                    f"the shard of rank {one.shard} of {choice.snapshot} cannot be rebuilt: {one.why}; nothing was "
                    f"changed: restart the job, and it goes on from an older snapshot if there is one"
                )
            if one.kind:
                raise SnapshotError(
                    f"rank {rank} could not have the lost shard of rank {one.shard} rebuilt: {one.why}; nothing was "
                    f"changed, restart the job"
                )
        self.rebuilt_bytes += sum(one.size_bytes for one in rebuilt)
        self.rebuild_s += max(one.seconds for one in rebuilt)


class _Attempt:
    """One try at one snapshot."""

    def __init__(self, tools: Tools, choice: recovery.Choice, own: Assignment, trail: _Trail) -> None:
        assert choice.snapshot is not None
        self.state, self.peers, self.door = tools.state, tools.peers, tools.door
        self.tools, self.choice, self.assigned, self.trail = tools, choice, own, trail
        self.snapshot, self.clock, self.threads = choice.snapshot, tools.clock, tools.threads
        self.shards: dict[int, OpenShard] = {}
        self._streams = {one.node: one.streams for one in trail.inventories if one.streams}
        self._badges = {one.streams: one.badge for one in trail.inventories if one.streams}
        self._pem = b""
        self._pool = Pool(functools.partial(Stream.connect, secure=self._pin))
        self._pace = Pace(0.0, tools.clock, Event().wait)

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
            return Restored(self.snapshot, self.choice, verified_s - began_s, copied_s - verified_s, bytes=size)
        finally:
            self._close()

    def _agree_that_all_is_good(self) -> dict[str, Any] | None:
        document: dict[str, Any] | None = None
        verdict = Verdict(self.snapshot)
        try:
            document = self._verify()
        except Corrupt as error:
            shard = error.source.shard
            verdict = Verdict(self.snapshot, "corrupt", str(error), shard.rank, shard.arena)
            self._quarantine(error.source, str(error))
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
        corrupt = [(rank, one) for rank, one in bad if one.kind == "corrupt"]
        for rank, one in bad:
            if not corrupt:  # else it may only have met what another rank had set aside: the next attempt tells
                raise SnapshotError(
                    f"rank {rank} could not read its part of {self.snapshot}: {one.why}; nothing was "
                    f"changed, restart the job"
                )
        self.trail.reports += [f"{self.snapshot}, rank {one.rank}: {one.why}" for _, one in corrupt]
        self.trail.set_aside(self.snapshot, [one for _, one in corrupt])
        return None if bad else document

    def _verify(self) -> dict[str, Any]:
        """Open, check identity, layout and bytes, and decode the host state. Touches nothing of the trainer's."""
        for rank in sorted(self.choice.sources, key=lambda rank: (rank != self._in_arena, rank)):
            self.shards[rank] = self._open(self.choice.sources[rank])
            if rank == self._in_arena:
                self._verify_arena()  # first of all: what others set aside meanwhile must not hide what is bad here
        own = self.shards[self.peers.rank]
        problems = self.state.differences(self._entries(), own.manifest.facts)
        if not problems:
            place, length = own.manifest.span(f"{self.state.world.own_prefix}host")
            try:
                document = hoststate.unpack(own.read(place, length))
                problems = self.state.check_host(document)
            except (ValueError, KeyError) as error:
                raise Corrupt(own.source, f"its host state cannot be read: {error}") from None
        problems = problems or self._misplaced()
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise LayoutChanged("; ".join(problems[:3]) + more)
        crash_point("restore.verified")
        return document

    @property
    def _in_arena(self) -> int:
        """Whose shard is in this rank's arena: each shard is read in full by one rank, on the node where it lies."""
        return self.assigned.shard if self.assigned.shard is not None else self.peers.rank

    def _verify_arena(self) -> None:
        shard = self.shards[self._in_arena]
        if why := shard.broken(self.threads):
            raise Corrupt(shard.source, why)

    def _misplaced(self) -> list[str]:
        """Tensors of the model that the shards do not cover exactly, before anything is written."""
        leaves = {leaf.name: leaf for leaf in self.state.leaves() if leaf.facts["kind"] != "optim"}
        filled = dict.fromkeys(leaves, 0)
        for shard in self.shards.values():
            for name in leaves.keys() & shard.manifest.entries.keys():
                leaf = leaves[name]
                filled[name] += _part(leaf.local, leaf.offset, shard.manifest.entries[name]).numel()
        return [
            f"{name} has {leaf.local.numel()} elements on this rank and {filled[name]} of them are in the snapshot"
            for name, leaf in leaves.items()
            if filled[name] != leaf.local.numel()
        ]

    def _open(self, source: Source) -> OpenShard:
        if source.node != self.tools.here:
            address = self._streams.get(source.node, "")
            return RemoteShard(self._pool, self._pace, address, self.tools.session.job, source)
        if self.door is None:
            raise DaemonUnavailable("there is no daemon to read from")
        return LocalShard(self.door, source)

    def _pin(self, streams: str) -> Pin | None:
        """How to read from there: with the key of this node, from the node whose badge all ranks gathered."""
        badge = self._badges.get(streams)
        if badge is None or self.door is None:
            return None
        if not self._pem:
            reply, _ = self.door.ask(wire.AskKey())
            self._pem = reply.pem if isinstance(reply, wire.LentKey) else b""
        if not self._pem:
            raise DaemonUnavailable(f"this node's daemon does not authenticate and that at {streams} does; restart it")
        return pin(self._pem, badge.certificate)

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
        except (SnapshotError, Corrupt, ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
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
            targets: list[tuple[torch.Tensor, int]] = []
            for name, entry in shard.manifest.entries.items():
                leaf = leaves.get(name)
                if leaf is not None:
                    part = _part(leaf.local, leaf.offset, entry)
                    filled[name] += part.numel()
                    targets += [(part, shard.manifest.places[name])] if part.numel() else []
            if rank == self.peers.rank:
                crash_point("restore.copying")
            self._copy_shard(shard, targets)
        short = [name for name, leaf in leaves.items() if filled[name] != leaf.local.numel()]
        if short:
            raise LayoutChanged(f"optimizer state {short[0]} is not whole in the snapshot")
        self.state.apply_host(document, self._outside())

    def _copy_shard(self, shard: OpenShard, targets: list[tuple[torch.Tensor, int]]) -> None:
        """Into tensors wherever they are; each with its offset in the file."""
        shard.copy([_item(part, place) for part, place in targets if not gpu.is_on_gpu(part)], self.threads)
        on_gpu = [(part, place) for part, place in targets if gpu.is_on_gpu(part)]
        if on_gpu:
            spans = [(place, part.numel() * part.element_size()) for part, place in on_gpu]
            with contextlib.closing(shard.windows(spans)) as windows:
                gpu.fill(windows, on_gpu)

    def _outside(self) -> dict[str, torch.Tensor]:
        """Large tensors of extras, copied out of this rank's own shard."""
        own = self.shards[self.peers.rank]
        found: dict[str, torch.Tensor] = {}
        for name, entry in own.manifest.entries.items():
            if entry.facts.get("kind") == "outside":
                place, length = own.manifest.span(name)
                dtype = dtype_of(entry.facts.get("dtype", entry.dtype))
                shape = list(entry.facts.get("shape", entry.shape))
                raw = own.read(place, length)
                found[name] = hoststate.from_raw(raw, str(dtype).removeprefix("torch."), shape)
        return found

    def _quarantine(self, source: Source, why: str) -> None:
        if self.door is not None and source.node == self.tools.here:
            try:
                self.door.ask(wire.Quarantine(source.shard.arena, source.shard.slot, self.snapshot, why))
            except (DaemonUnavailable, ProtocolError, Refused):
                self.trail.reports.append("the daemon could not be told")

    def _close(self) -> None:
        for shard in self.shards.values():
            shard.close()
        self.shards = {}
        self._pool.close()


def _part(local: torch.Tensor, offset: tuple[int, ...], entry: manifest.Entry) -> torch.Tensor:
    """Where a chunk of a file goes in the local tensor.

    A chunk that lies elsewhere in the global tensor is another rank's: nothing of it. LayoutChanged if it lies partly
    inside what this rank holds: that takes resharding.
    """
    width = local.element_size()
    shape, start = entry.shape, entry.offset
    if "dtype" in entry.facts:  # stored as bytes: back to elements
        shape = (*shape[:-1], shape[-1] // width) if entry.facts["shape"] else ()
        start = (*start[:-1], start[-1] // width) if entry.facts["shape"] else ()
    mine = zip(offset, local.shape, start, shape, strict=True)
    if any(first >= low + held or first + length <= low for low, held, first, length in mine):
        return local.reshape(-1).narrow(0, 0, 0)
    target = local
    for dim, (low, length, first) in enumerate(zip(offset, shape, start, strict=True)):
        if first < low or first + length > low + local.shape[dim]:
            raise LayoutChanged(f"{entry.name} is sharded differently in the snapshot")
        target = target.narrow(dim, first - low, length)
    return target


def _item(part: torch.Tensor, place: int) -> Item:
    """A tensor in host memory as `_native.scatter` takes it."""
    width = part.element_size()
    strides = tuple(stride * width for stride in part.stride())
    return part.data_ptr(), place, width, tuple(part.shape), strides
