"""What must hold after every event, judged by code that knows the arenas and nothing of the books.

The checker sees what stands in simulated memory and what the world itself did: which bytes every rank copied, who was
launched where, which machine was lost, which bit turned over. From that it knows, naively, what has to be recoverable:

* I1  a shard is emptied only after a newer one was committed, or its own step aborted;
* I2  a commit means that every rank's shard is there in full, and every node's parity;
* I3  since the last commit no part of it is lost but by a fault of the world's: as long as no group lost more positions
      than its parity, it can be restored;
* I4  what is restored is what all ranks had at one and the same step, and as new as it has to be;
* I5  bytes that turned over are never restored, nor decoded from, nor made parity of.

And while the job waits, of what survivors make (*fosters*):

* R1  nothing that stood there before goes for it (I1 and I3 hold), and once a group is protected anew, that stays (I3);
* R2  no published state names a foster;
* R3  a foster that is whole has the bytes that its rank copied, or is the parity of the new group by the definition;
* R4, R5  a recovery that begins at any time restores what it has to (I4), a job protected anew counting as such.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from snapshotd import _native, parityset
from snapshotd.arena import FOSTER_INDEX, FOSTER_PARITY_INDEX, PARITY_INDEX, PLACES
from snapshotd.wire import Publish, SnapshotId
from tests.sim.memory import NAMES, WHOLE, Memory, SlotInfo
from tests.sim.trainer import content
from tests.sim.twin import parity_of

if TYPE_CHECKING:
    from tests.sim.machine import Host
    from tests.sim.world import World

Made: TypeAlias = tuple[int, bytes, int]
Gen: TypeAlias = tuple[int, bytes]
Place: TypeAlias = tuple[bytes, int]
Shape: TypeAlias = tuple[tuple[int, ...], ...]


class Violation(AssertionError):
    """An invariant does not hold."""


class Group(NamedTuple):
    """How a snapshot lies in a group: the shards of each position, and the parity."""

    shape: Shape
    parity: int


class Part(NamedTuple):
    """Something of a group that can be lost."""

    group: int
    kind: str
    position: int


@dataclass
class Generation:
    """What was launched: who protects whom, and what it began from."""

    groups: list[list[bytes]]
    ranks: dict[bytes, list[int]]
    shards: dict[bytes, list[int]]
    parity: int
    restored: Made | None
    committed: int = 0
    over: bool = False

    def made(self, gen: Gen, step: int) -> Made:
        return self.restored if self.restored is not None and self.restored[2] == step else (*gen, step)

    def formation(self, made: Made) -> tuple[Group, ...]:
        held = self.shards if made == self.restored else self.ranks
        return tuple(
            Group(tuple(tuple(sorted(held.get(node, ()))) for node in group), max(0, min(self.parity, len(group) - 1)))
            for group in self.groups
        )


@dataclass
class Duty:
    """The last commit: what has to stay, and what of it the world has taken. `voted` is the grouping that committed
    it."""

    made: Made
    formation: tuple[Group, ...]
    hit: set[Part] = field(default_factory=set)
    voted: tuple[Group, ...] = ()

    def beyond(self, lost: Collection[Part]) -> bool:
        """Some group lost more positions than it has parity."""
        return any(
            len({part.position for part in lost if part.group == number}) > group.parity
            for number, group in enumerate(self.formation)
        )

    def bears(self, lost: Collection[Part]) -> bool:
        """With so much gone, it can still be restored after the loss of as many positions of each group as the world
        has not yet taken of its parity."""
        for number, group in enumerate(self.formation):
            struck = {part.position for part in self.hit if part.group == number}
            gone = {part.position for part in lost if part.group == number}
            left = max(0, group.parity - len(struck))
            data_is_there = not any(part.kind == "data" for part in lost if part.group == number)
            if len(gone) + left > group.parity and (left or not data_is_there):
                return False
        return True


class Checker:
    """Follows every change of memory. `check` is called after every event."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.transitions: Counter[str] = Counter()
        self.generations: dict[Gen, Generation] = {}
        self.formations: dict[Made, list[tuple[Group, ...]]] = {}
        self.decided: list[Made] = []
        self.aborted: set[Made] = set()
        self.duty: Duty | None = None
        self.counts: Counter[str] = Counter()
        self._memory: dict[bytes, tuple[Memory, Host]] = {}
        self._shards: dict[tuple[Made, int], dict[Place, Memory]] = {}
        self._sets: dict[tuple[Made, Shape, int], dict[Place, Memory]] = {}
        self._shape_of: dict[Place, Shape] = {}
        self._parity_of_shape: dict[Shape, int] = {}  # of groups that survivors made
        self._changed = self._in_fault = False
        self._taken: list[tuple[bytes, int]] = []
        self._decisions: set[tuple[Gen, Made]] = set()
        self._aborts: set[tuple[Gen, Made]] = set()

    def where(self, memory: Memory) -> str:
        """A machine and an arena on it, for people."""
        owner = memory.owner
        _, host = self._memory.get(memory.arena_id, (None, None))
        label = host.label if host is not None else "?"
        if memory.local_index in PLACES or owner is None:
            return f"{label}, its {_kind(memory)} {memory.arena_id.hex()[:4]}:"
        return f"{label}, arena {memory.arena_id.hex()[:4]} of rank {owner.rank}:"

    def groups(self) -> list[list[bytes]]:
        """Who protects whom, as launched last."""
        return list(self.generations.values())[-1].groups if self.generations else []

    def rotted(self, node: bytes) -> None:
        """The world took something of this machine."""
        self._taken.append((node, len(self.decided)))

    def lost_since(self, group: Collection[bytes]) -> int:
        """How many machines of a group the world has hit since the last commit."""
        return len({node for node, when in self._taken if node in group and when >= len(self.decided)})

    def complain(self, what: str) -> None:
        """Something does not hold: this history ends."""
        self._world.failed("", Violation(what))

    # --- what the world tells ---------------------------------------------------------------------

    def know(self, host: Host, memory: Memory) -> None:
        """A new arena."""
        self._memory[memory.arena_id] = memory, host

    @contextlib.contextmanager
    def fault(self) -> Iterator[None]:
        """What is lost in here was taken by the world."""
        self._in_fault = True
        try:
            yield
        finally:
            self._in_fault = False
            if self.duty is not None:
                self.duty.hit |= self.lost(self.duty.made, self.duty.formation)

    def flipped(self) -> None:
        """Bits turned over; to be called within `fault`."""
        self._changed = True

    def forget(self, memory: Memory) -> None:
        """An arena is gone with its machine."""
        for index, slot in enumerate(memory.slots):
            self._drop(memory, index, slot)
        self._memory.pop(memory.arena_id, None)
        self._changed = True

    def freed(self, host: Host, memory: Memory) -> None:
        """The daemon gave an arena's memory back."""
        for index, slot in enumerate(memory.slots):
            if slot.state in WHOLE:
                self._judge_empty(memory, index, slot)
                self.transitions[f"{_kind(memory)} {NAMES[slot.state]} -> gone"] += 1
        self.forget(memory)

    def generation(
        self,
        gen: Gen,
        groups: list[list[bytes]],
        ranks: dict[bytes, list[int]],
        shards: dict[bytes, list[int]],
        parity: int,
        restored: Made | None,
    ) -> None:
        """The job was launched."""
        told = self.generations.get(gen, Generation([], {}, {}, 0, None))
        one = Generation(groups, ranks, shards, parity, restored, told.committed, told.over)
        self.generations[gen] = one
        if restored is not None:
            known = self.formations.setdefault(restored, [])
            whole = sum(map(len, shards.values())) == sum(map(len, ranks.values()))
            if whole and one.formation(restored) not in known:
                known.append(one.formation(restored))

    def closed(self, gen: Gen) -> None:
        """All ranks of a generation end their run: nothing of it is wanted back."""
        self.duty = None
        self.decided.clear()
        self.generations[gen].over = True

    # --- what happens in memory -------------------------------------------------------------------

    def changed(self, memory: Memory, index: int, before: SlotInfo, after: SlotInfo) -> None:
        """A slot's description became another one."""
        if before.state != after.state:
            kind = _kind(memory)
            if not self._in_fault:
                rotten = "rotten " * (before.state in WHOLE and not before.sound)
                self.transitions[f"{kind} {rotten}{NAMES.get(before.state)} -> {NAMES.get(after.state)}"] += 1
            if before.state in WHOLE and after.state not in WHOLE:
                if not self._in_fault:
                    self._judge_empty(memory, index, before)
                self._drop(memory, index, before)
                self._changed = True
            elif after.state in WHOLE and before.state not in WHOLE:
                self._appears(memory, index, after)
                self._changed = True

    def _appears(self, memory: Memory, index: int, slot: SlotInfo) -> None:
        place = memory.arena_id, index
        if memory.local_index in (PARITY_INDEX, FOSTER_PARITY_INDEX):
            if memory.local_index == PARITY_INDEX:
                self._judge_parity(memory, index, slot)
            else:
                self._judge_foster_parity(memory, index, slot)
            shape = self._shape_of.get(place)
            if shape is not None:
                self._sets.setdefault((slot.made, shape, slot.rank), {})[place] = memory
                self._protected_anew(slot.made, shape)
            return
        self._shards.setdefault((slot.made, slot.rank), {})[place] = memory
        if memory.file(index) != content(slot.made, slot.rank, slot.file_bytes):
            self.complain(f"I4: {_name(slot.made)} of rank {slot.rank} is FULL and its bytes are not what it copied")
        self.counts["shards checked"] += 1

    def _drop(self, memory: Memory, index: int, slot: SlotInfo) -> None:
        place = memory.arena_id, index
        self._shards.get((slot.made, slot.rank), {}).pop(place, None)
        shape = self._shape_of.pop(place, None)
        if shape is not None:
            self._sets.get((slot.made, shape, slot.rank), {}).pop(place, None)

    def _judge_parity(self, memory: Memory, index: int, slot: SlotInfo) -> None:
        """A parity set is whole: its bytes are what the definition of the code says of what the ranks copied."""
        owner = memory.owner
        found = self.generations.get((owner.generation, owner.nonce)) if owner is not None else None
        _, host = self._memory[memory.arena_id]
        if found is None:
            return
        for members, group in zip(found.groups, found.formation(slot.made), strict=True):
            if host.node in members:
                if members.index(host.node) != slot.rank:
                    self.complain(f"I2: {host.label} made the parity of another position of {_name(slot.made)}")
                self._shape_of[memory.arena_id, index] = group.shape
                sizes = {rank: self._world.job.file_bytes(rank) for row in group.shape for rank in row}
                files = {rank: content(slot.made, rank, size) for rank, size in sizes.items()}
                expected = parity_of(group.shape, group.parity, slot.rank, files, memory.block_bytes)
                if memory.file(index)[-len(expected) :] != expected:
                    self.complain(f"I5: the parity of {_name(slot.made)} on {host.label} is not that of its shards")
                self.counts["sets checked"] += 1

    def _judge_foster_parity(self, memory: Memory, index: int, slot: SlotInfo) -> None:
        """R3. Of the product's description of a set only the grouping is believed, and held against the bytes."""
        layout = parityset.read(memory.file(index)).layout
        shape = tuple(tuple(one.rank for one in row) for row in layout.positions)
        _, host = self._memory[memory.arena_id]
        for rank in shape[slot.rank]:
            places = self._shards.get((slot.made, rank), {})
            if not any(self._memory[arena][1] is host for arena, _ in places):
                self.complain(f"R3: {host.label} protects {_name(slot.made)} anew and lacks the shard of rank {rank}")
        files = {rank: content(slot.made, rank, self._world.job.file_bytes(rank)) for row in shape for rank in row}
        expected = parity_of(shape, layout.parity, slot.rank, files, memory.block_bytes)
        if memory.file(index)[-len(expected) :] != expected:
            self.complain(f"R3: the new parity of {_name(slot.made)} on {host.label} is not that of its shards")
        self._shape_of[memory.arena_id, index] = shape
        self._parity_of_shape[shape] = layout.parity
        self.counts["foster sets checked"] += 1

    def _protected_anew(self, made: Made, shape: Shape) -> None:
        """Once every part of a new group is there, so many losses must be borne again."""
        parity = self._parity_of_shape.get(shape)
        ranks = sorted(rank for row in shape for rank in row)
        for formation in list(self.formations.get(made, ())) if parity is not None else []:
            for number, group in enumerate(formation):
                if sorted(rank for row in group.shape for rank in row) != ranks or group.shape == shape:
                    continue
                anew = (*formation[:number], Group(shape, parity or 0), *formation[number + 1 :])
                lost = self.lost(made, anew)
                if any(part.group == number for part in lost):
                    continue
                if anew not in self.formations[made]:
                    self.formations[made].append(anew)
                self.counts["protected anew"] += 1
                if self.duty is not None and (self.duty.made, self.duty.formation) == (made, formation):
                    hit = {part for part in self.duty.hit if part.group != number}
                    self.duty = Duty(made, anew, hit, self.duty.voted)

    def published(self, said: Publish) -> None:
        """R2."""
        for one in said.held:
            memory, _ = self._memory.get(one.arena, (None, None))
            if memory is not None and memory.local_index in (FOSTER_INDEX, FOSTER_PARITY_INDEX):
                self.complain(f"R2: a foster of step {one.snapshot.step} is published")

    def said(self, memory: Memory, word: str, value: int) -> None:
        """The daemon wrote a word for trainers and for later daemons."""
        owner = memory.owner
        if owner is None or not value:
            return
        self.counts[word] += 1
        gen = owner.generation, owner.nonce
        found = self.generations.get(gen)
        _, host = self._memory.get(memory.arena_id, (None, None))
        if found is None or host is None:
            return
        if found.over:
            self.aborted.add(found.made(gen, value))
            self._decisions.add((gen, found.made(gen, value)))
            return
        made = found.made(gen, value)
        coordinates = 0 in found.ranks.get(host.node, ())
        if word == "committed_step":
            if coordinates and value != found.committed:
                self._commit(gen, found, made, value, host)
            elif not coordinates and value > found.committed:
                self.complain(f"{host.label} carries out the commit of {_name(made)}, which was not decided")
        elif word == "aborted_step" and coordinates and made not in self.aborted:
            self._aborts.add((gen, made))
            self._abort(found, made, value, host)

    # --- what is decided --------------------------------------------------------------------------

    def _commit(self, gen: Gen, found: Generation, made: Made, step: int, host: Host) -> None:
        if step < found.committed:
            self.complain(f"the commits go backwards: {_name(made)} after step {found.committed}")
        if (gen, made) in self._aborts and made != found.restored:
            self.complain(f"{_name(made)} was aborted and is committed")
        found.committed = step
        launched = list(self.generations)
        if any(launched.index(by) > launched.index(gen) for by, _ in self._decisions):
            self._decisions.add((gen, made))  # nobody told it that a newer generation has gone on without it
            return
        formation = found.formation(made)
        living = {one.node for one in self._world.living()}
        missing = {
            part for part in self._missing(made, formation) if found.groups[part.group][part.position] in living
        }  # who voted and was lost since is none of the coordinator's doing
        if missing:
            self.complain(f"I2: {host.label} commits {_name(made)} without {_parts(missing)}")
        for rank in found.ranks[host.node]:
            held = [memory.slots[index].state for index, memory in self._of(host, rank, made, found)]
            if held and _native.COMMITTED not in held:
                self.complain(f"{host.label} tells of the commit of {_name(made)} before it is marked on rank {rank}")
        self.decided.append(made)
        self._decisions.add((gen, made))
        known = self.formations.setdefault(made, [])
        if formation not in known:
            known.append(formation)
        self.duty = Duty(made, formation, self.lost(made, formation), formation)
        self.counts["commits"] += 1

    def _of(self, host: Host, rank: int, made: Made, found: Generation) -> Iterator[tuple[int, Memory]]:
        for memory in host.memory.values():
            if memory.owner is not None and memory.owner.rank == rank:
                yield from ((index, memory) for index, slot in enumerate(memory.slots) if slot.made == made)

    def _abort(self, found: Generation, made: Made, step: int, host: Host) -> None:
        if found.committed >= step:
            self.complain(f"{_name(made)} is aborted, and step {found.committed} is committed")
        self.aborted.add(made)
        self.counts["aborts"] += 1
        if not any(self._is_past_without(node, rank, made, step) for node, own in found.ranks.items() for rank in own):
            self.complain(f"{host.label} aborts {_name(made)}, and every rank may still hold it")

    def _is_past_without(self, node: bytes, rank: int, made: Made, step: int) -> bool:
        for memory, host in self._memory.values():
            owner = memory.owner
            if host.node != node or owner is None or owner.rank != rank or memory.local_index in PLACES:
                continue
            if memory.passed >= step and not any(
                slot.made == made and (slot.state == _native.FILLING or self._is_good(memory, index))
                for index, slot in enumerate(memory.slots)
            ):
                return True
        return not any(host.node == node and not host.lost for _, host in self._memory.values())

    def _judge_empty(self, memory: Memory, index: int, slot: SlotInfo) -> None:
        """I1: why may this shard go?"""
        if memory.local_index == PARITY_INDEX:
            self._judge_old_parity(memory, index, slot)
        if memory.local_index in (PARITY_INDEX, FOSTER_PARITY_INDEX) or not self._is_good_slot(memory, index, slot):
            return
        owner = memory.owner
        newer = any(
            _order(one) > _order(slot.made) or by[0] > slot.generation for by, one in self._decisions
        )  # a newer generation went on from something else: this is not what it began from, nor came after
        over = owner is not None and owner.closed
        unused = not memory.ever_committed and self._world.job.fresh
        again = len(self._shards.get((slot.made, slot.rank), {})) > 1
        aborted = slot.made in self.aborted or self._cannot_be_whole(memory, slot.made)
        if not (newer or over or unused or again or aborted or self._is_stray(memory, slot.made)):
            _, host = self._memory[memory.arena_id]
            self.complain(
                f"I1: {host.label} empties {_name(slot.made)} of rank {slot.rank}, and nothing newer is committed, nor "
                f"was it aborted"
            )

    def _judge_old_parity(self, memory: Memory, index: int, slot: SlotInfo) -> None:
        """R1: while nobody trains, no parity that the last commit was voted with goes, whatever else there is by
        now."""
        duty, shape = self.duty, self._shape_of.get((memory.arena_id, index))
        nobody = self._world.job.run is None and duty is not None and slot.made == duty.made
        voted = duty is not None and any(group.shape == shape for group in duty.voted)
        twin = shape is not None and len(self._sets.get((slot.made, shape, slot.rank), {})) > 1
        if nobody and voted and not twin and self._is_good_slot(memory, index, slot):
            _, host = self._memory[memory.arena_id]
            self.complain(f"R1: {host.label} gives parity of {_name(slot.made)} up while the job waits")

    def _cannot_be_whole(self, memory: Memory, made: Made) -> bool:
        """Some rank is past it without it: what an abort says (a word in an arena tells of the newest abort only)."""
        owner = memory.owner
        found = self.generations.get((owner.generation, owner.nonce)) if owner is not None else None
        if found is None or made == found.restored or made[:2] not in self.generations:
            return False
        return any(
            self._is_past_without(node, rank, made, made[2]) for node, own in found.ranks.items() for rank in own
        )

    def _is_stray(self, memory: Memory, made: Made) -> bool:
        """Never committed, and newer than what the arena's generation began from: it was not whole then."""
        owner = memory.owner
        found = self.generations.get((owner.generation, owner.nonce)) if owner is not None else None
        restored = found.restored if found is not None else None
        return restored is not None and _order(made) > _order(restored) and made not in self.decided

    # --- what is there ----------------------------------------------------------------------------

    def _is_good(self, memory: Memory, index: int) -> bool:
        return self._is_good_slot(memory, index, memory.slots[index])

    def _is_good_slot(self, memory: Memory, index: int, slot: SlotInfo) -> bool:
        return slot.state in WHOLE and slot.sound and index not in memory.rotten

    def lost(self, made: Made, formation: Sequence[Group], seen: Collection[bytes] | None = None) -> set[Part]:
        """Parts of a snapshot of which no good copy is left, on the machines that are seen."""
        found = set()
        for number, group in enumerate(formation):
            for position, ranks in enumerate(group.shape):
                if not all(self._any_good(self._shards.get((made, rank)), seen) for rank in ranks):
                    found.add(Part(number, "data", position))
                if group.parity and not self._any_good(self._sets.get((made, group.shape, position)), seen):
                    found.add(Part(number, "parity", position))
        return found

    def _any_good(self, places: Mapping[Place, Memory] | None, seen: Collection[bytes] | None) -> bool:
        if not places:
            return False
        for (arena, index), memory in places.items():
            slot = memory.slots[index]
            if slot.sound and index not in memory.rotten and (seen is None or self._memory[arena][1].node in seen):
                return True
        return False

    def _missing(self, made: Made, formation: Sequence[Group]) -> set[Part]:
        """Parts that are not there at all, good or bad."""
        found = set()
        for number, group in enumerate(formation):
            for position, ranks in enumerate(group.shape):
                if not all(self._shards.get((made, rank)) for rank in ranks):
                    found.add(Part(number, "data", position))
                if group.parity and not self._sets.get((made, group.shape, position)):
                    found.add(Part(number, "parity", position))
        return found

    # --- after every event ------------------------------------------------------------------------

    def check(self) -> None:
        """I3."""
        duty = self.duty
        if not self._changed or duty is None:
            return
        self._changed = False
        lost = self.lost(duty.made, duty.formation)
        if lost <= duty.hit:
            return
        for formation in self.formations.get(duty.made, ()):
            if not self.lost(duty.made, formation):
                self.duty = Duty(duty.made, formation, voted=duty.voted)
                return
        if not duty.beyond(duty.hit) and not duty.bears(lost):
            self.complain(f"I3: of the committed {_name(duty.made)} the daemons lost {_parts(lost - duty.hit)}")
        duty.hit |= lost

    def to_be_protected_anew(self, lose: Callable[[int], bool], who: int) -> bool:
        """Have a machine lost that can be borne; True where the others can, and must, make that good: nothing is newer
        than the last commit, and of some group all parts but that machine's stand where they belong, at least two of
        data."""
        duty = self.duty
        whole = duty is not None and not self.lost(duty.made, duty.formation)
        if duty is None or not lose(who):
            return False
        newest = all(_order(made) <= _order(duty.made) for (made, _), places in self._shards.items() if places)
        lost = self.lost(duty.made, duty.formation)
        hit = {part.group for part in lost if part.kind == "parity"}
        groups = [(len(duty.formation[number].shape), duty.formation[number].parity) for number in hit]
        return whole and newest and bool(groups) and all(nodes - parity >= 2 for nodes, parity in groups)

    def is_protected(self) -> bool:
        """Of the last commit every part of some grouping is there."""
        duty = self.duty
        known = self.formations.get(duty.made, ()) if duty is not None else ()
        return duty is not None and any(not self.lost(duty.made, formation) for formation in known)

    # --- what is restored -------------------------------------------------------------------------

    def bearable(self, seen: Collection[bytes], excluded: Collection[Made]) -> Made | None:
        """The newest committed snapshot that has to be recoverable from these machines."""
        best: Made | None = None
        for made in {one for one in self.decided[-8:] if one not in excluded}:
            if best is not None and _order(made) <= _order(best):
                continue
            for formation in self.formations[made]:
                if not Duty(made, formation).beyond(self.lost(made, formation, seen)):
                    best = made
        return best

    def chosen(
        self, snapshot: SnapshotId | None, lost: bool, seen: Collection[bytes], excluded: Collection[SnapshotId]
    ) -> None:
        """The ranks chose what to restore: as new as it has to be."""
        must = self.bearable(seen, {_made(one) for one in excluded})
        self.counts["choices"] += 1
        if must is not None and (snapshot is None or _order(_made(snapshot)) < _order(must)):
            what = "lost" if lost else "nothing" if snapshot is None else _name(_made(snapshot))
            self.complain(f"I4: {_name(must)} was committed and can be restored; the ranks chose {what}")

    def restored(self, snapshot: SnapshotId, world_size: int, found: Mapping[int, bytes]) -> None:
        """Every rank has its bytes back."""
        made = _made(snapshot)
        self.counts["restored"] += 1
        for rank in range(world_size):
            if found.get(rank) != content(made, rank, self._world.job.file_bytes(rank)):
                self.complain(f"I5: rank {rank} restored other bytes than it had at {_name(made)}")


def _made(snapshot: SnapshotId) -> Made:
    return snapshot.generation.number, snapshot.generation.nonce, snapshot.step


def _order(made: Made) -> tuple[int, int]:
    return made[0], made[2]


def _name(made: Made) -> str:
    return f"g{made[0]}:{made[2]}"


def _kind(memory: Memory) -> str:
    return PLACES.get(memory.local_index, "shard")


def _parts(parts: Collection[Part]) -> str:
    return ", ".join(f"{kind} of position {place} of group {group}" for group, kind, place in sorted(parts))
