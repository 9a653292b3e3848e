"""Several nodes in one process: the product's `Generation`, `Cohort` and `Workshop` over real arenas in anonymous
memory, with the network, the trainers and the deaths of daemons in the hands of whoever plays.

What decides is the product's. What a daemon does on its loop and on its threads is repeated here in a few lines each:
who is told, what an adoption looks at, which set of parity is made. No data is moved; a slot's blocks are zeros.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple, cast
from unittest import mock

from snapshotd import _native, generation, geometry, inventory, parityset, protect, recovery
from snapshotd.arena import OWNER_FIELDS, PARITY_INDEX, ArenaFile, read_owner
from snapshotd.claims import ownership
from snapshotd.cohort import Cohort
from snapshotd.generation import Generation, name, view_of, views
from snapshotd.ledger import Commit, Decision, Progress, SlotView, superseded
from snapshotd.metrics import Metrics, Repeats
from snapshotd.peers import Peers
from snapshotd.recovery import Assignment, Choice
from snapshotd.wire import Attach, Decree, GenerationId, GroupLayout, Inventory, Place, Publish, SnapshotId
from snapshotd.workshop import Workshop

BLOCK = 4096
SLOTS = 2
JOB = "job"
SILENT = logging.getLogger("snapshotd.tests.silent")
SILENT.disabled = True


class Died(Exception):
    """A daemon died at a crash point, which is what this says."""


class NoClock:
    """Time stands still."""

    def monotonic_s(self) -> float:
        return 0.0

    def wall_s(self) -> float:
        return 0.0


class Letter(NamedTuple):
    """A message on its way, by the nodes' names."""

    sender: str
    receiver: str
    message: Publish | Decree


@contextlib.contextmanager
def crash_at(point: str | None, count: int = 1) -> Iterator[None]:
    """Died is raised where a daemon passes this crash point (None: any) for the `count`-th time."""
    left = itertools.count(count - 1, -1)

    def passed(where: str) -> None:
        if point in (None, where) and next(left) == 0:
            raise Died(where)

    with mock.patch.object(generation, "crash_point", passed):
        yield


def fingerprint(rank: int) -> bytes:
    """The layout of a rank's shards."""
    return bytes([rank + 1]) * 32


@dataclass
class Node:
    """A host: what its memory holds, and what its daemon has in mind."""

    label: str
    identity: bytes
    files: list[ArenaFile] = field(default_factory=list)
    generations: dict[GenerationId, Generation] = field(default_factory=dict)
    serial: int = 0

    def next_serial(self) -> int:
        self.serial += 1
        return self.serial

    def inventory(self) -> Inventory:
        """What a daemon tells of its memory."""
        ranks = [file for file in self.files if not file.is_parity]
        return Inventory(
            self.identity,
            self.label,
            [shard for file in ranks for shard in inventory.shards(file)],
            [inventory.report(file) for file in ranks],
            [sentence for file in self.files for sentence in inventory.complaints(file)],
            [one for file in self.files if file.is_parity for one in inventory.parities(file)],
        )


class Making(NamedTuple):
    """A parity set that is being filled."""

    task: protect.Task
    file: ArenaFile
    slot: int


class Cluster:
    """Nodes by name, and the generation that trains on them."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.ranks: dict[str, list[int]] = {}
        self.identity = GenerationId(0, bytes(16))
        self.restored: SnapshotId | None = None
        self.parity, self.every = 0, 1
        self.groups: list[list[bytes]] = []
        self.making: dict[str, Making] = {}
        self.choice = Choice(None, "")
        self.assignments: dict[int, Assignment] = {}
        self._numbers = itertools.count(1)
        self._metrics, self._repeats = Metrics(), Repeats(SILENT, NoClock())
        stub = cast(Peers, SimpleNamespace(keeper=None))
        self.workshop = Workshop(stub, self._repeats, list, [])

    def close(self) -> None:
        """Give all memory back."""
        for node in list(self.nodes):
            self.lose(node)

    # --- a generation begins ----------------------------------------------------------------------

    def add(self, *labels: str) -> None:
        """New nodes with empty memory."""
        for label in labels:
            self.nodes[label] = Node(label, next(self._numbers).to_bytes(16, "big"))

    def lose(self, label: str) -> None:
        """A node is gone with its memory."""
        for file in self.nodes.pop(label).files:
            file.close()
        self.making.pop(label, None)

    def begin(
        self,
        identity: GenerationId,
        ranks: Mapping[str, Sequence[int]],
        *,
        parity: int = 1,
        group_size: int = 8,
        every: int = 1,
        restored: SnapshotId | None = None,
        assignments: Mapping[int, Assignment] | None = None,
    ) -> None:
        """A generation on these nodes. Without `assignments` every rank begins with a new arena."""
        self.identity, self.restored, self.parity, self.every = identity, restored, parity, every
        self.ranks = {label: list(own) for label, own in ranks.items()}
        members = [geometry.Member(self.nodes[label].identity) for label in ranks]
        inventories = [node.inventory() for node in self.nodes.values()]
        formation = recovery.previous_places(inventories, restored) if restored is not None else None
        self.assignments = dict(assignments or {})
        self.groups = geometry.plan(members, group_size, formation)
        for label, own in self.ranks.items():
            for rank in own:
                self._attach(label, rank, self.assignments.get(rank, Assignment()))

    def go_on(self, number: int, ranks: Mapping[str, Sequence[int]]) -> None:
        """The next generation, from what `choice` chose; lost shards are still to be rebuilt."""
        assert self.choice.snapshot is not None
        by_node = {self.nodes[label].identity: list(own) for label, own in ranks.items()}
        inventories = [node.inventory() for node in self.nodes.values()]
        assignments = recovery.assign(self.choice, by_node, inventories)
        parity, every, made = self.parity, self.every, self.choice.snapshot
        identity = GenerationId(number, bytes([number]) * 16)
        self.begin(identity, ranks, parity=parity, every=every, restored=made, assignments=assignments)

    def take_inventories(self, *, without: Sequence[str] = ()) -> Choice:
        """A new generation looks at what is left: this fences the old one and chooses."""
        for label, node in self.nodes.items():
            if label not in without:
                for one in node.generations.values():
                    one.fence()
        return self.choose(without=without)

    def choose(self, *, without: Sequence[str] = ()) -> Choice:
        """What would be restored; changes nothing."""
        left = [node.inventory() for label, node in self.nodes.items() if label not in without]
        self.choice = recovery.choose(left)
        return self.choice

    def _attach(self, label: str, rank: int, assignment: Assignment) -> None:
        node, ask = self.nodes[label], self._ask(label, rank)
        owner = ownership(ask, 1, 0.0)
        file = next((one for one in node.files if one.arena_id == assignment.arena), None)
        passed = 0 if self.restored is None else self.restored.step
        current = self._generation(label)
        if file is None:
            file = self._new_file(node, ask.local_index, BLOCK, owner)
            current.add(file)
        else:
            previous = node.generations[file.generation]
            for view in views(file):
                if view.progress is Progress.FILLING:
                    file.native.empty(view.index)
            for one in [file, *previous.parity_files()] if self.restored is not None else [file]:
                previous.remove(one)
                words = one.native
                words.passed, words.next_step, words.committed_step, words.aborted_step = passed, 0, 0, 0
                one.amend(**(owner | {"rank": one.owner.rank if one.is_parity else rank}))
                current.add(one)
            if not previous.files:
                del node.generations[previous.identity]
        file.native.passed = passed
        file.awaits_rebuild = assignment.rebuild
        if len(self.ranks) > 1:
            current.join(self._cohort(label), self.ranks[label])
        if not file.awaits_rebuild:
            self._count(label, file)

    def _ask(self, label: str, rank: int) -> Attach:
        own = self.ranks[label]
        world = sum(map(len, self.ranks.values()))
        return Attach(
            JOB, self.identity, rank, world, own.index(rank), own, self.every, BLOCK, BLOCK, fingerprint(rank),
            parity=self.parity, restored=self.restored,
        )  # fmt: skip

    def _cohort(self, label: str) -> Cohort:
        places = [
            Place(self.nodes[one].identity, one, f"{one}:1", f"{one}:2", list(own)) for one, own in self.ranks.items()
        ]
        return Cohort(self.nodes[label].identity, places, self.groups, self.parity)

    def _generation(self, label: str) -> Generation:
        node = self.nodes[label]
        if self.identity not in node.generations:
            node.generations[self.identity] = self._fresh(label, self.identity, self.ranks[label], self.restored)
        return node.generations[self.identity]

    def _fresh(
        self, label: str, identity: GenerationId, ranks: Sequence[int], restored: SnapshotId | None
    ) -> Generation:
        world = sum(map(len, self.ranks.values()))
        return Generation(
            JOB, identity, node=label, ranks=ranks, world_size=world, every=self.every, restored=restored,
            metrics=self._metrics, repeats=self._repeats,
        )  # fmt: skip

    def _new_file(self, node: Node, local_index: int, slot_bytes: int, owner: Mapping[str, object]) -> ArenaFile:
        number = next(self._numbers)
        fd = os.memfd_create("snapshotd-test-node")
        os.posix_fallocate(fd, 0, _native.Arena.bytes_needed(SLOTS, slot_bytes, BLOCK))
        _native.Arena.format(
            fd, arena_id=number.to_bytes(16, "big"), job=JOB, local_index=local_index, slots=SLOTS,
            slot_bytes=slot_bytes, block_bytes=BLOCK,
        )  # fmt: skip
        native = _native.Arena(fd, writable=True)
        native.set_owner(**owner)  # type: ignore[arg-type]
        file = ArenaFile(f"{number}.arena", -1, fd, os.dup(fd), native, read_owner(native), number)
        node.files.append(file)
        return file

    def _count(self, label: str, file: ArenaFile) -> None:
        """A rank counts from now on, and hears what was decided and named before it came."""
        current = self.generation(label)
        current.attached.add(file.owner.rank)
        committed = current.ledger.committed
        if committed is not None and file.native.committed_step < committed:
            file.native.committed_step = committed
        if current.next_step is not None and file.native.next_step != current.next_step:
            name(file, current.next_step)

    # --- who is who -------------------------------------------------------------------------------

    def generation(self, label: str) -> Generation:
        """What a node's daemon knows of the generation that trains."""
        return self.nodes[label].generations[self.identity]

    @property
    def coordinator(self) -> str:
        """The node that decides."""
        return next(label for label, own in self.ranks.items() if 0 in own)

    def node_of(self, rank: int) -> str:
        """Where a rank trains."""
        return next(label for label, own in self.ranks.items() if rank in own)

    def arena(self, rank: int) -> ArenaFile:
        """A rank's arena."""
        return self.generation(self.node_of(rank)).files[rank][-1]

    def snapshot(self, step: int) -> SnapshotId:
        """The snapshot that a step means in this generation."""
        if self.restored is not None and self.restored.step == step:
            return self.restored
        return SnapshotId(self.identity, step)

    # --- trainers ---------------------------------------------------------------------------------

    def take(self, rank: int, step: int) -> bool:
        """A rank passes a step and begins to copy it; False where no slot is free."""
        file = self.arena(rank)
        index = self._claim(file, SnapshotId(self.identity, step), rank)
        file.native.passed = step
        return index >= 0

    def _claim(self, file: ArenaFile, made: SnapshotId, rank: int) -> int:
        return file.native.claim(
            generation=made.generation.number, nonce=made.generation.nonce, step=made.step, rank=rank,
            world_size=sum(map(len, self.ranks.values())), fingerprint=fingerprint(rank),
        )  # fmt: skip

    def filling(self, rank: int) -> int | None:
        """The slot that a rank copies to."""
        return next((view.index for view in views(self.arena(rank)) if view.progress is Progress.FILLING), None)

    def finish(self, rank: int) -> None:
        """A rank's copy is whole."""
        index = self.filling(rank)
        assert index is not None, f"rank {rank} copies nothing"
        self._publish(self.arena(rank), index, BLOCK)

    def skip(self, rank: int) -> None:
        """A rank gives its copy up."""
        index = self.filling(rank)
        assert index is not None, f"rank {rank} copies nothing"
        self.arena(rank).native.empty(index)

    def _publish(self, file: ArenaFile, index: int, length: int) -> None:
        file.native.set_block_crcs(index, length)
        file.native.publish(index, length)

    def rebuild(self, rank: int) -> bool:
        """The shard that a rank's arena waits for is decoded into it; the rank counts from now on."""
        file, made = self.arena(rank), self.restored
        assert made is not None and file.awaits_rebuild
        shard = self.assignments[rank].shard
        assert shard is not None
        index = self._claim(file, made, shard)
        if index < 0:
            return False
        self._publish(file, index, BLOCK)
        file.awaits_rebuild = False
        self._count(self.node_of(rank), file)
        return True

    def damage(self, file: ArenaFile, index: int, why: str) -> None:
        """Somebody found out that a slot's bytes are bad."""
        view = view_of(file, index)
        assert view is not None and view.snapshot is not None
        file.quarantined[index] = view.snapshot, why
        if file.is_parity:
            owner = next(node for node in self.nodes.values() if file in node.files)
            owner.generations[file.generation].ledger.parity_gone(view.snapshot.step)

    # --- daemons ----------------------------------------------------------------------------------

    def look(self, label: str) -> list[Decision]:
        """A node's daemon looks at its arenas and decides what is its own to decide."""
        return self._after(label, self.generation(label).look())

    def _after(self, label: str, decisions: list[Decision]) -> list[Decision]:
        """A commit frees what older generations left here, where this one went on from them."""
        node, current = self.nodes[label], self.generation(label)
        if any(isinstance(one, Commit) for one in decisions):
            others = [(one.identity, one.restored, one.ever_committed) for one in node.generations.values()]
            for identity in superseded(current.identity, current.restored, others):
                for file in node.generations.pop(identity).all_files():
                    node.files.remove(file)
                    file.close()
        self.workshop._free_outdated(current)
        return decisions

    def publish(self, label: str) -> list[Letter]:
        """A node tells its state to the coordinator and to its group."""
        current, node = self.generation(label), self.nodes[label]
        if current.cohort is None or current.ledger.fenced:
            return []
        said = current.publication(node.next_serial())
        current.cohort.hear(said, 0.0)
        return [Letter(label, place.label, said) for place in current.cohort.listeners()]

    def decree(self, label: str) -> list[Letter]:
        """The coordinator tells its decisions to all others."""
        current, node = self.generation(label), self.nodes[label]
        if current.cohort is None or current.ledger.fenced or not current.cohort.coordinates:
            return []
        decree = current.decree(node.next_serial(), False)
        return [Letter(label, place.label, decree) for place in current.cohort.others()]

    def deliver(self, letter: Letter) -> tuple[list[Decision], list[Letter]]:
        """A message arrives: what is decided by it, and what its sender is to be told once more."""
        node = self.nodes.get(letter.receiver)
        current = node.generations.get(letter.message.generation) if node else None
        if current is None or current.cohort is None:
            return [], []
        decisions: list[Decision] = []
        again: list[Letter] = []
        if isinstance(letter.message, Decree):
            decisions = current.obey(letter.message)
        elif current.cohort.knows(letter.message.node):
            decisions = current.hear(letter.message, 0.0)
            if current.cohort.coordinates and current.coordinator is not None and current.is_behind(letter.message):
                again = [one for one in self.decree(letter.receiver) if one.receiver == letter.sender]
        self._after(letter.receiver, decisions)
        return decisions + (self.look(letter.receiver) if decisions else []), again

    def restart(self, label: str) -> None:
        """The daemon is killed; the next one knows what the arenas hold. Until a trainer has asked, it has no peers."""
        node = self.nodes[label]
        node.generations, _ = {}, self.making.pop(label, None)
        for file in sorted(node.files, key=lambda one: one.is_parity):
            file.pins.clear()
            file.doomed.clear()
            ranks = [one.owner.rank for one in node.files if one.generation == file.generation and not one.is_parity]
            if file.generation not in node.generations:
                alone = file.owner.local_world == file.owner.world_size
                own = list(range(file.owner.world_size)) if alone else ranks
                node.generations[file.generation] = self._fresh(label, file.generation, own, file.restored)
            current = node.generations[file.generation]
            current.add(file)
            if file.is_parity:
                for view in views(file):
                    if view.progress is Progress.FILLING:
                        file.native.empty(view.index)
            else:
                current.attached.add(file.owner.rank)
        for current in node.generations.values():
            if any(file.owner.fenced for file in current.all_files()):
                current.fence()
            current.look()

    def rejoin(self, label: str) -> None:
        """A node's trainers come back to its daemon, which learns of the peers by it."""
        current = self.generation(label)
        if len(self.ranks) > 1:
            current.join(self._cohort(label), self.ranks[label])
        for rank in self.ranks[label]:
            if not current.files[rank][-1].awaits_rebuild:
                self._count(label, current.files[rank][-1])

    # --- parity -----------------------------------------------------------------------------------

    def wanted(self, label: str) -> SnapshotId | None:
        """The snapshot whose parity a node would make now."""
        return self.workshop._wanted(self.generation(label))

    def recognise(self, label: str, made: SnapshotId) -> bool:
        """A set that is here already counts again. False where none is, or it is of another group."""
        current = self.generation(label)
        layout = self.layout(label, made)
        if current.cohort is None or layout is None:
            return False
        for file in current.parity_files():
            for view in views(file):
                info = file.native.slot(view.index)
                same = (info.rank, info.fingerprint) == (current.cohort.position, geometry.digest(layout))
                if view.snapshot == made and view.progress >= Progress.FULL and same:
                    current.parity_whole(made.step)
                    return True
        return False

    def layout(self, label: str, made: SnapshotId) -> GroupLayout | None:
        """How a snapshot lies in a node's group, as far as the node knows."""
        cohort = self.generation(label).cohort
        return None if cohort is None else cohort.layout(made)

    def begin_parity(self, label: str, made: SnapshotId) -> str:
        """A node claims a slot for a parity set and pulls the pieces. Says why that cannot be, else nothing."""
        current, layout = self.generation(label), self.layout(label, made)
        if current.ledger.fenced or current.cohort is None:
            return "nobody protects anything here"
        if label in self.making:
            return "another set is being made"
        if layout is None:
            return f"the group does not hold {_short(made)} in full, as far as {label} knows"
        if not self._group_holds(label, made):
            return f"{_short(made)} is not there any more"
        task = protect.Task(JOB, made, layout, current.cohort.position, {})
        file = self._parity_file(label, parityset.file_bytes(layout))
        self.workshop._free_misfits(current, task, file)
        index = file.native.claim(
            generation=made.generation.number, nonce=made.generation.nonce, step=made.step, rank=task.position,
            world_size=len(layout.positions), fingerprint=geometry.digest(layout),
        )  # fmt: skip
        if index < 0:
            return "no slot is free for it"
        file.pins[index] += 1
        self.making[label] = Making(task, file, index)
        return ""

    def end_parity(self, label: str, *, whole: bool = True, counted: bool = True) -> None:
        """The set is whole (and counts, unless the daemon is to be killed in between), or is given up."""
        task, file, index = self.making.pop(label)
        current = self.generation(label)
        file.pins[index] -= 1
        if not whole:
            file.native.empty(index)
            return
        self._publish(file, index, parityset.file_bytes(task.layout))
        told = parityset.Description(task.snapshot, task.position, task.layout, [])
        file.described[index] = geometry.digest(task.layout), told
        if counted and not current.ledger.fenced:
            current.parity_whole(task.snapshot.step)

    def _group_holds(self, label: str, made: SnapshotId) -> bool:
        """What READs would find."""
        cohort = self.generation(label).cohort
        assert cohort is not None
        members = [one for one in self.ranks if self.nodes[one].identity in cohort.group]
        return all(self.held(rank, made) >= Progress.FULL for one in members for rank in self.ranks[one])

    def _parity_file(self, label: str, needed_bytes: int) -> ArenaFile:
        current = self.generation(label)
        for file in reversed(current.parity_files()):
            if file.slot_bytes >= needed_bytes:
                return file
        like = current.rank_files()[0].owner
        owner = {key: getattr(like, key) for key in OWNER_FIELDS} | {"rank": PARITY_INDEX, "pid": 0}
        file = self._new_file(self.nodes[label], PARITY_INDEX, needed_bytes, owner)
        current.add(file)
        return file

    # --- what is there ----------------------------------------------------------------------------

    def held(self, rank: int, made: SnapshotId) -> Progress:
        """How far a rank's arena is with a snapshot; DAMAGED where it has nothing of it."""
        found = [view.progress for view in views(self.arena(rank)) if view.snapshot == made]
        return max(found, default=Progress.DAMAGED)

    def has_set(self, label: str, made: SnapshotId) -> bool:
        """A node's memory has a whole parity set of a snapshot, for the place where the node stands now."""
        cohort = self.generation(label).cohort
        group = next(group for group in self.groups if self.nodes[label].identity in group)
        position = group.index(self.nodes[label].identity) if cohort is None else cohort.position
        return any(
            one.snapshot == made and one.position == position and len(one.layout.positions) == len(group)
            for one in self.nodes[label].inventory().parities
        )

    def whole(self) -> set[SnapshotId]:
        """Snapshots of which every rank holds its shard in full, and every node the parity that it owns."""
        held = [
            {view.snapshot for view in views(self.arena(rank)) if view.progress >= Progress.FULL}
            for own in self.ranks.values()
            for rank in own
        ]
        protects = [
            label
            for label in self.ranks
            if any(self.nodes[label].identity in group and len(group) > 1 for group in self.groups) and self.parity
        ]
        common = set.intersection(*held)
        return {made for made in common if made is not None and all(self.has_set(one, made) for one in protects)}

    def slots(self, label: str) -> dict[tuple[int, int], SlotView]:
        """Every slot of a node that is not empty, by arena number and index."""
        return {(file.ordinal, view.index): view for file in self.nodes[label].files for view in views(file)}


def _short(made: SnapshotId) -> str:
    return f"g{made.generation.number}:{made.step}"
