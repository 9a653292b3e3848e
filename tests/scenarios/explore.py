"""Every history of a small job on one node, with what must hold after each event.

The real `Ledger` and `Coordinator` run against a model of the rest: trainers that claim, name, pass, publish, skip and
die; arenas as plain tuples; a daemon that reads a rank's `passed` and its slots at two different moments, carries out
one action at a time, and restarts at any moment with nothing but what the arenas hold. What must hold is judged from
the arenas and from what was announced, never from the books.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import snapshotd.ledger
from snapshotd import recovery
from snapshotd.wire import ArenaReport, GenerationId, Inventory, Shard, SnapshotId

EMPTY, FILLING, FULL, COMMITTED = "EMPTY", "FILLING", "FULL", "COMMITTED"
NODE = "node"
Event = tuple[Any, ...]


class Slot(NamedTuple):
    """What stands in an arena. `made` is (generation, step), None while nobody has named it."""

    state: str = EMPTY
    made: tuple[int, int] | None = None


class Trainer(NamedTuple):
    """One rank: its process, and the words of its arena that are not slots."""

    alive: bool = True
    doing: str = "idle"  # idle, claimed, copying
    step: int = 0
    passed: int = 0
    asked: int = 0  # the step that the daemon named and that was not served yet; 0: none
    noticed: bool = False  # the daemon saw its death


class Broken(AssertionError):
    """An invariant does not hold; `history` leads there."""


@dataclass(frozen=True)
class Limits:
    """How large the model is."""

    ranks: int = 2
    slots: int = 2
    steps: int = 3  # for each generation
    generations: int = 2
    restarts: int = 1
    skips: int = 1
    deaths: bool = True
    inherited: bool = False  # begin with a second generation and both slots full: (1, 1) committed, (1, 2) whole
    skew: int = 1  # how many steps ranks may be apart: a training step is a collective


def generation(number: int) -> GenerationId:
    """The identity of a numbered generation."""
    return GenerationId(number, bytes([number]) * 16)


def snapshot(made: tuple[int, int] | None) -> SnapshotId | None:
    """A model's name of a snapshot as the product says it."""
    return None if made is None else SnapshotId(generation(made[0]), made[1])


@dataclass
class World:
    """One state of everything. `core` is the module under test."""

    limits: Limits
    core: ModuleType = snapshotd.ledger
    number: int = 1
    base: int = 0
    restored: tuple[int, int] | None = None
    trainers: list[Trainer] = field(default_factory=list)
    slots: list[tuple[Slot, ...]] = field(default_factory=list)
    half_look: tuple[int, int] | None = None
    queue: list[Any] = field(default_factory=list)
    fenced: bool = False
    choice: tuple[int, int] | None = None
    restarts: int = 0
    skips: int = 0
    last_commit: tuple[int, int] | None = None
    aborted: frozenset[int] = frozenset()
    ledger: Any = None
    coordinator: Any = None

    @classmethod
    def begin(cls, limits: Limits, core: ModuleType = snapshotd.ledger) -> World:
        world = cls(limits, core)
        world.trainers = [Trainer() for _ in range(limits.ranks)]
        world.slots = [(Slot(),) * limits.slots for _ in range(limits.ranks)]
        if limits.inherited:
            world.slots = [(Slot(COMMITTED, (1, 1)), Slot(FULL, (1, 2))) for _ in range(limits.ranks)]
            world.choice = (1, 2)
            world._inherit()
        world._open_books()
        return world

    def clone(self) -> World:
        other = copy.copy(self)
        other.trainers, other.slots, other.queue = list(self.trainers), list(self.slots), list(self.queue)
        other.ledger = copy.copy(self.ledger)
        other.ledger._views, other.ledger._aborted = dict(self.ledger._views), set(self.ledger._aborted)
        other.coordinator = copy.copy(self.coordinator)
        other.coordinator._states = dict(self.coordinator._states)
        other.coordinator._decisions = dict(self.coordinator._decisions)
        return other

    def key(self) -> int:
        """Equal for two states from which the same can follow."""
        book, chair = self.ledger, self.coordinator
        states = tuple(_frozen(state) for state in chair._states.values())
        decisions = tuple((step, type(decision).__name__) for step, decision in sorted(chair._decisions.items()))
        return hash((
            self.number, self.base, self.restored, tuple(self.trainers), tuple(self.slots), self.half_look,
            tuple(self.queue), self.fenced, self.choice, self.restarts, self.skips, self.last_commit,
            self.aborted, book.committed, tuple(sorted(book._views.items())), frozenset(book._aborted),
            states, decisions, chair.committed, chair.lead, chair._decided, chair._named,
        ))  # fmt: skip

    def _open_books(self) -> None:
        """What a daemon knows that starts now: nothing but whose arenas these are."""
        self.ledger = self.core.Ledger(
            generation(self.number),
            frozenset(range(self.limits.ranks)),
            restored=snapshot(self.restored),
            fenced=self.fenced,
        )
        self.coordinator = self.core.Coordinator(frozenset([NODE]))
        self.half_look, self.queue = None, []
        self.trainers = [one._replace(noticed=False) for one in self.trainers]

    # --- what can happen next ---------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """Every event that is possible now."""
        for rank in self._ranks_that_matter():
            if self.trainers[rank].alive:
                yield from self._trainer_events(rank, self.trainers[rank])
        yield from self._daemon_events()

    def _ranks_that_matter(self) -> tuple[int, ...] | range:
        """While the daemon is at one arena, moves of other ranks lead to the same as if they came later."""
        if self.half_look is not None:
            return (self.half_look[0],)
        if self.queue:
            head = self.queue[0]
            if isinstance(head, tuple):
                return (head[1],)
            return () if isinstance(head, self.core.Announce) else (head.rank,)
        return range(self.limits.ranks)

    def _trainer_events(self, rank: int, trainer: Trainer) -> Iterator[Event]:
        if trainer.doing == "idle":
            slowest = min(one.step for one in self.trainers)  # a dead one counts: its peers wait for it
            if trainer.step < min(self.base + self.limits.steps, slowest + self.limits.skew):
                yield "step", rank
        else:
            yield "go on", rank
            if trainer.doing == "copying" and self.skips < self.limits.skips:
                yield "skip", rank
        if self.limits.deaths and self.number <= self.limits.generations:
            yield "die", rank

    def _daemon_events(self) -> Iterator[Event]:
        anything_to_forget = self.queue or self.aborted or self.last_commit
        if self.restarts < self.limits.restarts and anything_to_forget:
            yield ("restart",)
        if self.queue:
            yield ("act",)
            return
        if self.half_look is not None:
            yield ("look at slots",)
            return
        for rank, trainer in enumerate(self.trainers):
            if trainer.alive or not trainer.noticed:
                yield ("look at passed", rank) if trainer.alive else ("notice", rank)
        dead = [not trainer.alive for trainer in self.trainers]
        if any(dead) and not self.fenced and self.number < self.limits.generations + 1:
            yield ("fence",)
        everyone_seen_dead = all(trainer.noticed for trainer in self.trainers)
        if self.choice is not None and everyone_seen_dead and self.number < self.limits.generations:
            yield ("inherit",)

    # --- events -----------------------------------------------------------------------------------

    def do(self, event: Event) -> None:
        """Carry one event out. Broken where something that must hold does not."""
        getattr(self, "_" + event[0].replace(" ", "_"))(*event[1:])
        self._check()

    def _step(self, rank: int) -> None:
        trainer = self.trainers[rank]
        step = trainer.step + 1
        free = self._free_slot(rank)
        if trainer.asked and trainer.asked <= step and free is not None:
            self._write(rank, free, Slot(FILLING))
            self.trainers[rank] = trainer._replace(doing="claimed", asked=0)
        else:
            self.trainers[rank] = trainer._replace(step=step, passed=step)

    def _go_on(self, rank: int) -> None:
        trainer = self.trainers[rank]
        if trainer.doing == "claimed":
            step = trainer.step + 1
            self._write(rank, self._filling_slot(rank), Slot(FILLING, (self.number, step)))
            self.trainers[rank] = trainer._replace(doing="copying", step=step, passed=step)
        else:
            index = self._filling_slot(rank)
            self._write(rank, index, self.slots[rank][index]._replace(state=FULL))
            self.trainers[rank] = trainer._replace(doing="idle")

    def _skip(self, rank: int) -> None:
        self._write(rank, self._filling_slot(rank), Slot())
        self.trainers[rank] = self.trainers[rank]._replace(doing="idle")
        self.skips += 1

    def _die(self, rank: int) -> None:
        self.trainers[rank] = self.trainers[rank]._replace(alive=False, noticed=False)

    def _look_at_passed(self, rank: int) -> None:
        self.half_look = rank, self.trainers[rank].passed

    def _look_at_slots(self) -> None:
        assert self.half_look is not None
        rank, passed = self.half_look
        self.half_look = None
        self._observe(rank, self._view(rank, passed))

    def _notice(self, rank: int) -> None:
        self.trainers[rank] = self.trainers[rank]._replace(noticed=True)
        self.queue += self.ledger.observe(rank, self._view(rank, self.trainers[rank].passed))
        self.queue += self.ledger.died(rank)

    def _observe(self, rank: int, view: Any) -> None:
        """As the daemon does: what the look leaves to do, then decisions, then the next name."""
        self.queue += self.ledger.observe(rank, view)
        for decision in self.coordinator.observe(NODE, self.ledger.state()):
            self.queue += self.ledger.apply(decision)
        step = self.coordinator.name_next()
        if step is not None and not self.fenced:
            self.queue += [("name", rank, step) for rank in range(self.limits.ranks)]

    def _act(self) -> None:
        action = self.queue.pop(0)
        if isinstance(action, tuple):
            _, rank, step = action
            self.trainers[rank] = self.trainers[rank]._replace(asked=step)
        elif isinstance(action, self.core.Advance):
            slot = self.slots[action.rank][action.slot]
            if slot.state == action.state.name:
                self._write(action.rank, action.slot, slot._replace(state=action.to.name))
        elif isinstance(action, self.core.Empty):
            self._judge_empty(action.rank, self.slots[action.rank][action.slot])
            self._write(action.rank, action.slot, Slot())
        else:
            self._judge_decision(action.decision)

    def _restart(self) -> None:
        self.restarts += 1
        self._open_books()

    def _fence(self) -> None:
        self.fenced = self.ledger.fenced = True
        chosen = recovery.choose([self._inventory()]).snapshot
        self.choice = None if chosen is None else (chosen.generation.number, chosen.step)
        if self.last_commit is not None and (self.choice is None or self.choice < self.last_commit):
            raise Broken(f"{self.last_commit} was committed and {self.choice} would be restored")

    def _inherit(self) -> None:
        assert self.choice is not None
        self.number, self.restored, self.base, self.choice = self.number + 1, self.choice, self.choice[1], None
        self.fenced, self.aborted, self.last_commit = False, frozenset(), None
        self.trainers = [Trainer(step=self.base, passed=self.base) for _ in self.trainers]
        self._open_books()

    # --- what must hold ---------------------------------------------------------------------------

    def _whole(self, least: str = FULL) -> set[tuple[int, int]]:
        """Snapshots of this generation, or what it was restored from, that every rank holds."""
        states = (FULL, COMMITTED) if least == FULL else (COMMITTED,)
        held = [{slot.made for slot in row if slot.state in states} for row in self.slots]
        common = set.intersection(*held)
        return {made for made in common if made is not None and (made[0] == self.number or made == self.restored)}

    def _check(self) -> None:
        whole = self._whole()
        if self.restored is not None and not any(made >= self.restored for made in whole):
            raise Broken(f"the restored {self.restored} is gone and nothing newer is whole")
        if self.last_commit is not None and not any(made >= self.last_commit for made in whole):
            raise Broken(f"{self.last_commit} was committed and nothing as new is whole")

    def _judge_empty(self, rank: int, slot: Slot) -> None:
        if slot.state == EMPTY:
            return
        if slot.state == FILLING:
            if self.trainers[rank].alive:
                raise Broken(f"a slot of rank {rank} was emptied while its trainer fills it")
            return
        if self.fenced:
            raise Broken(f"{slot.made} of rank {rank} was emptied although a newer generation looked at it")
        if slot.made is not None and slot.made == max(self._whole(), default=None):
            raise Broken(f"{slot.made} of rank {rank} was emptied although it is the newest that is whole")
        stray = slot.made is None or (slot.made[0] != self.number and slot.made != self.restored)
        newer = [made for made in self._whole(COMMITTED) if stray or slot.made is None or made > slot.made]
        if slot.state == COMMITTED and not newer:
            raise Broken(f"{slot.made} of rank {rank} was committed and emptied before a newer one was, on all ranks")
        if not newer and slot.made is not None and slot.made[1] not in self.aborted:
            raise Broken(f"{slot.made} of rank {rank} was emptied without a newer commit and without an abort")

    def _judge_decision(self, decision: Any) -> None:
        made = self.restored if self.restored and decision.step == self.restored[1] else (self.number, decision.step)
        if self.fenced:
            raise Broken(f"{decision} was announced although a newer generation looked")
        if isinstance(decision, self.core.Commit):
            if made not in self._whole(COMMITTED):
                raise Broken(f"{made} was announced as committed and not every rank holds it marked so")
            if decision.step in self.aborted or (self.last_commit is not None and made < self.last_commit):
                raise Broken(f"{made} was committed after {self.last_commit} was, or after its own abort")
            self.last_commit = made
            return
        if self.last_commit is not None and made <= self.last_commit:
            raise Broken(f"{made} was aborted although {self.last_commit} is committed")
        usable = (FILLING, FULL, COMMITTED)
        if not any(
            trainer.passed >= decision.step and all(slot.made != made for slot in row if slot.state in usable)
            for trainer, row in zip(self.trainers, self.slots, strict=True)
        ):
            raise Broken(f"{made} was aborted and every rank may still hold it")
        self.aborted |= {decision.step}

    # --- helpers ----------------------------------------------------------------------------------

    def _free_slot(self, rank: int) -> int | None:
        return next((index for index, slot in enumerate(self.slots[rank]) if slot.state == EMPTY), None)

    def _filling_slot(self, rank: int) -> int:
        """Where this rank's trainer copies to. A trainer whose slot was taken away would write on: that is Broken."""
        for index, slot in enumerate(self.slots[rank]):
            if slot.state == FILLING:
                return index
        raise Broken(f"the slot that rank {rank} is filling was given away")

    def _write(self, rank: int, index: int, slot: Slot) -> None:
        row = list(self.slots[rank])
        row[index] = slot
        self.slots[rank] = tuple(row)

    def _view(self, rank: int, passed: int) -> Any:
        progress = self.core.Progress
        return self.core.RankView(
            passed,
            tuple(
                self.core.SlotView(index, progress[slot.state], snapshot(slot.made))
                for index, slot in enumerate(self.slots[rank])
                if slot.state != EMPTY
            ),
        )

    def _inventory(self) -> Inventory:
        world = self.limits.ranks
        shards = [
            Shard(made, bytes([rank]) * 16, index, slot.state, rank, world, bytes(32), 1)
            for rank, row in enumerate(self.slots)
            for index, slot in enumerate(row)
            if slot.state in (FULL, COMMITTED) and (made := snapshot(slot.made)) is not None
        ]
        committed = self.last_commit is not None
        arenas = [
            ArenaReport(bytes([rank]) * 16, rank, generation(self.number), 1, 1, 0, committed) for rank in range(world)
        ]
        return Inventory(bytes(16), NODE, shards, arenas)


def _frozen(state: Any) -> Any:
    held = tuple((rank, tuple(sorted(steps.items()))) for rank, steps in sorted(state.held.items()))
    return state.complete, tuple(sorted(state.passed.items())), held


@dataclass
class Explored:
    """What an exploration saw."""

    states: int = 0
    commits: int = 0
    aborts: int = 0
    inherited: int = 0
    worlds: list[World] = field(default_factory=list)


def explore(
    limits: Limits, core: ModuleType = snapshotd.ledger, *, keep_every: int = 0, world: type[World] = World
) -> Explored:
    """Walk through every state once, and keep some of them. Broken, with the events that lead there, where an invariant
    does not hold."""
    first = world.begin(limits, core)
    came_from: dict[int, tuple[int, Event] | None] = {first.key(): None}
    todo = [(first, first.key())]
    seen = Explored()
    while todo:
        before, key = todo.pop()
        seen.states += 1
        seen.commits += before.last_commit is not None
        seen.aborts += bool(before.aborted)
        seen.inherited += before.number > 1
        if keep_every and seen.states % keep_every == 0:
            seen.worlds.append(before)
        for event in list(before.events()):
            after = before.clone()
            try:
                after.do(event)
            except Broken as error:
                raise Broken(f"{error}\n" + _history(came_from, key, event)) from None
            if (then := after.key()) not in came_from:
                came_from[then] = key, event
                todo.append((after, then))
    return seen


def _history(came_from: dict[int, tuple[int, Event] | None], key: int, last: Event) -> str:
    events = [last]
    while (step := came_from[key]) is not None:
        key, event = step
        events.append(event)
    return "\n".join("  " + " ".join(map(str, event)) for event in reversed(events))


def keep_going(world: World, rounds: int) -> bool:
    """Nobody dies or skips and everybody gets a turn, again and again: is something new committed within `rounds`?"""
    world = world.clone()
    before = world.last_commit
    for _ in range(rounds):
        for rank, trainer in enumerate(world.trainers):
            world.do(("step" if trainer.doing == "idle" else "go on", rank))
        for rank in range(world.limits.ranks):
            _finish(world)
            world.do(("look at passed", rank))
            _finish(world)
        if world.last_commit is not None and world.last_commit != before:
            return True
    return False


def _finish(world: World) -> None:
    if world.half_look is not None and not world.queue:
        world.do(("look at slots",))
    while world.queue:
        world.do(("act",))
    if world.half_look is not None:
        world.do(("look at slots",))
        while world.queue:
            world.do(("act",))


def check_liveness(worlds: list[World], rounds: int = 60) -> None:
    """Broken if from one of these states nothing new is ever committed although everybody keeps going."""
    for world in worlds:
        alive = all(trainer.alive for trainer in world.trainers)
        if alive and not world.fenced and not keep_going(world, rounds):
            raise Broken(f"nothing is committed any more: {world.slots}, named {world.coordinator._named}")
