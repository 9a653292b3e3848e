"""Who holds what, what is decided, and what may be freed: pure state machines of one generation.

Three pieces, none of which knows a clock, a socket or a file:

* `Ledger` is a node's own book. Looks at its ranks' slots go in (`observe`), decisions go in (`apply`), actions for
  the arenas come out. It publishes `NodeState`.
* `decide` is the rule: COMMIT when every node protects a step, ABORT when one has passed it without.
* `Coordinator` applies the rule for the whole generation and names the next step to snapshot. It lives in the daemon
  of the generation's first node.

Everything published only grows, so lost, repeated and reordered looks cost time and nothing else; a restarted daemon
rebuilds its books from the slots and decides the same again. Within a generation a step identifies a snapshot: the one
that was restored (made by an older generation) comes before every step made here.

Three things the caller owes: a look reads `passed` before the slots; `died` is called on a look taken after the kernel
released the trainer's lock; and an action is performed only on a slot that is still in the state the action names.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from snapshotd.wire import GenerationId, SnapshotId

LEAD_STEPS_MAX = 64
CALM_COMMITS = 16


class Progress(enum.IntEnum):
    """How far a rank's shard of one snapshot is. DAMAGED: something is in the slot and cannot be trusted."""

    DAMAGED = 0
    FILLING = 1
    FULL = 2
    PROTECTED = 3
    COMMITTED = 4


@dataclass(frozen=True)
class SlotView:
    """One slot that is not empty. `snapshot` is None while a trainer has claimed it and not yet named it."""

    index: int
    progress: Progress
    snapshot: SnapshotId | None


@dataclass(frozen=True)
class RankView:
    """One look at a rank's arena: `passed` was read first, then the slots (that order is what makes it safe)."""

    passed: int
    slots: tuple[SlotView, ...] = ()


@dataclass(frozen=True)
class NodeState:
    """What a node publishes: per local rank the newest step passed and the steps it holds. `complete`: all attached."""

    complete: bool
    passed: Mapping[int, int]
    held: Mapping[int, Mapping[int, Progress]]

    def passed_without(self, step: int) -> int | None:
        """A rank that is past this step without holding it, and so can never hold it again; None where none is."""
        for rank, passed in sorted(self.passed.items()):
            if passed >= step and self.held.get(rank, {}).get(step, Progress.DAMAGED) is Progress.DAMAGED:
                return rank
        return None

    def protects(self, step: int) -> bool:
        """Every rank of the node holds this step and it is protected (or committed already)."""
        return self.complete and all(
            self.held.get(rank, {}).get(step, Progress.DAMAGED) >= Progress.PROTECTED for rank in self.passed
        )

    def steps(self, least: Progress = Progress.FILLING) -> set[int]:
        """Steps that some rank of the node holds, at least this far."""
        return {step for held in self.held.values() for step, how in held.items() if how >= least}


@dataclass(frozen=True)
class Commit:
    """Every node protects this step; older snapshots may go."""

    step: int
    why: str


@dataclass(frozen=True)
class Abort:
    """Some rank is past this step without it; nobody needs to keep it."""

    step: int
    why: str


Decision: TypeAlias = Commit | Abort


def decide(step: int, nodes: Mapping[str, NodeState]) -> Decision | None:
    """COMMIT when every node protects the step, ABORT when one has passed it without; else not yet."""
    for name, state in nodes.items():
        rank = state.passed_without(step)
        if rank is not None:
            return Abort(step, f"rank {rank} on {name} passed step {step} without it")
    if nodes and all(state.protects(step) for state in nodes.values()):
        return Commit(
            step, f"all {len(nodes)} nodes protect step {step}" if len(nodes) > 1 else f"step {step} is whole"
        )
    return None


# --- actions --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advance:
    """Move a slot forward."""

    rank: int
    slot: int
    state: Progress
    to: Progress


@dataclass(frozen=True)
class Empty:
    """Free a slot that is still in `state`: its snapshot is of no use to anyone any more."""

    rank: int
    slot: int
    why: str
    state: Progress


@dataclass(frozen=True)
class Announce:
    """Write a decision into every local arena, so that trainers and a later daemon see it."""

    decision: Decision


@dataclass(frozen=True)
class Name:
    """Ask the local ranks for a snapshot at the first eligible step at or after `step`."""

    step: int


Action: TypeAlias = Advance | Empty | Announce | Name


# --- a node's book --------------------------------------------------------------------------------


@dataclass
class Ledger:
    """The book of one generation on one node.

    `restored` is the snapshot that the generation began from; it is voted anew here. `needs_parity` is False for a job
    of one node, where FULL is all the protection there is. `fenced`: a newer generation has looked at what is here,
    and no decision of this one is applied any more.
    """

    generation: GenerationId
    ranks: frozenset[int]
    restored: SnapshotId | None = None
    needs_parity: bool = False
    fenced: bool = False
    committed: int | None = None
    _views: dict[int, RankView] = field(default_factory=dict)
    _aborted: set[int] = field(default_factory=set)

    def observe(self, rank: int, view: RankView) -> list[Action]:
        """Take note of a rank's arena as it is now. Returns what that look leaves to do: a mark that was missed (a
        daemon that restarted in the middle of a commit), then what became free."""
        self._views[rank] = view
        return [] if self.fenced else self._noted([*self._marks(rank), *self._frees(rank)])

    def apply(self, decision: Decision) -> list[Action]:
        """Carry out a decision: mark first on every rank, announce, and only then free what is older (I1).

        Repeated and outdated decisions do no harm; a fenced book carries out none.
        """
        if self.fenced or (self.committed is not None and decision.step < self.committed):
            return []
        if isinstance(decision, Abort):
            if decision.step == self.committed:
                return []
            self._aborted.add(decision.step)
            return self._noted([Announce(decision), *self._frees()])
        self.committed = decision.step
        self._aborted = {step for step in self._aborted if step > decision.step}
        return self._noted([*self._marks(), Announce(decision), *self._frees()])

    def died(self, rank: int) -> list[Action]:
        """The rank's trainer is gone: what it was still filling will never be whole.

        `observe` a look taken after its death first: in an older one a slot may look half filled that is FULL by now.
        """
        view = self._views.get(rank, RankView(0))
        return self._noted(
            [
                Empty(rank, slot.index, "its trainer died while it was being filled", slot.progress)
                for slot in view.slots
                if slot.progress is Progress.FILLING
            ]
        )

    def state(self) -> NodeState:
        """What this node publishes."""
        known = {rank: self._views[rank] for rank in sorted(self.ranks) if rank in self._views}
        return NodeState(
            complete=len(known) == len(self.ranks),
            passed={rank: view.passed for rank, view in known.items()},
            held={rank: self._held(view) for rank, view in known.items()},
        )

    def _noted(self, actions: list[Action]) -> list[Action]:
        """The actions, written into the last looks as if done. Nothing is asked for twice then: a slot that was freed
        may be in its trainer's hands again before the next look, and that look shows again what was not done."""
        for action in actions:
            if isinstance(action, (Advance, Empty)):
                view = self._views[action.rank]
                slots = [slot for slot in view.slots if slot.index != action.slot]
                if isinstance(action, Advance):
                    (slot,) = (slot for slot in view.slots if slot.index == action.slot)
                    slots.append(replace(slot, progress=action.to))
                self._views[action.rank] = replace(view, slots=tuple(sorted(slots, key=lambda one: one.index)))
        return actions

    def _held(self, view: RankView) -> dict[int, Progress]:
        held: dict[int, Progress] = {}
        for slot in view.slots:
            step = self._step_of(slot)
            if step is not None:
                held[step] = max(self._standing(slot), held.get(step, Progress.DAMAGED))
        return held

    def _standing(self, slot: SlotView) -> Progress:
        """How far a slot is for this generation's vote. A commit by the generation before is none of this one."""
        progress = slot.progress
        voted_before = slot.snapshot == self.restored and self.committed is None
        if progress is Progress.COMMITTED and voted_before:
            progress = Progress.FULL
        if progress is Progress.FULL and not self.needs_parity:
            progress = Progress.PROTECTED
        return progress

    def _step_of(self, slot: SlotView) -> int | None:
        """The step of a slot of this generation (the restored snapshot counts); None for any other."""
        if slot.snapshot is None:
            return None
        if slot.snapshot.generation == self.generation or slot.snapshot == self.restored:
            return slot.snapshot.step
        return None

    def _seen(self, rank: int | None) -> list[tuple[int, SlotView]]:
        """Every slot in the last looks, with its rank; of one rank or of all."""
        return [
            (one, slot)
            for one, view in sorted(self._views.items())
            if rank is None or one == rank
            for slot in view.slots
        ]

    def _marks(self, rank: int | None = None) -> list[Action]:
        return [
            Advance(one, slot.index, slot.progress, Progress.COMMITTED)
            for one, slot in self._seen(rank)
            if slot.progress in (Progress.FULL, Progress.PROTECTED)
            and self._step_of(slot) == self.committed is not None
        ]

    def _frees(self, rank: int | None = None) -> list[Action]:
        return [
            Empty(one, slot.index, why, slot.progress)
            for one, slot in self._seen(rank)
            if (why := self._useless(one, slot)) is not None
        ]

    def _useless(self, rank: int, slot: SlotView) -> str | None:
        """The reason why a slot may go, if there is one. FILLING slots belong to their trainer until it leaves them."""
        if slot.progress is Progress.FILLING:
            return None
        step = self._step_of(slot)
        if step is not None and step in self._aborted and slot.progress is not Progress.COMMITTED:
            return None if self._is_last_resort(rank, slot) else f"step {step} was aborted"
        if self.committed is None:
            return None
        if slot.progress is Progress.DAMAGED:
            return f"it is damaged, and step {self.committed} is committed"
        if step is None or step < self.committed:
            return f"step {self.committed} is committed and newer"
        return None

    def _is_last_resort(self, rank: int, slot: SlotView) -> bool:
        """The slot holds what the generation was restored from, and the rank has nothing older to fall back to.

        It was whole when it was restored; its abort only says that some rank has an arena without it now. So it stays
        until something newer is committed, but where it is one of two old snapshots a slot is needed for new ones.
        """
        if slot.snapshot != self.restored or slot.progress is Progress.DAMAGED:
            return False
        others = (one for one in self._views[rank].slots if one != slot)
        return all(one.snapshot is None or one.snapshot.generation == self.generation for one in others)


# --- the generation's decisions -------------------------------------------------------------------


@dataclass
class Coordinator:
    """Decides for a whole generation, and names which step to snapshot next.

    `every` is the fewest steps between two snapshots. `lead` is how far ahead of the newest passed step a name lies: it
    doubles when ranks did not agree on a named step (one passed it before it heard), and shrinks by one after
    `CALM_COMMITS` commits, so that ranks agree on the step although they hear at different times.
    """

    nodes: frozenset[str]
    every: int = 1
    committed: int | None = None
    aborts: int = 0
    commits: int = 0
    lead: int = 1
    _states: dict[str, NodeState] = field(default_factory=dict)
    _decisions: dict[int, Decision] = field(default_factory=dict)
    _decided: int = 0
    _named: int | None = None
    _calm: int = 0

    def observe(self, node: str, state: NodeState) -> list[Decision]:
        """Take note of a node's state; returns the decisions that are new by it, oldest step first.

        The newest step that can be committed is; older ones need no decision then. What bears a COMMITTED mark was
        decided before, perhaps by a coordinator that forgot: nothing older is decided any more, and no abort of it.
        """
        if node not in self.nodes:
            return []
        self._states[node] = state
        if not self._all_here():
            return []
        steps = sorted(self._steps(Progress.DAMAGED))
        found = {step: decision for step in steps if (decision := decide(step, self._states)) is not None}
        newest = max((step for step, decision in found.items() if isinstance(decision, Commit)), default=0)
        marked = max(self._steps(Progress.COMMITTED), default=0)
        news = [decision for step, decision in found.items() if self._is_news(decision, newest, marked)]
        for decision in news:
            self._take(decision)
        return news

    def _is_news(self, decision: Decision, newest: int, marked: int) -> bool:
        if self.committed is not None and decision.step <= self.committed:
            return False
        if isinstance(decision, Commit):
            return decision.step == newest >= marked
        return decision.step > max(newest, marked) and decision.step not in self._decisions

    def unheard(self, node: str) -> list[Decision]:
        """Decisions that this node's last state does not show yet: what is to be published to it once more."""
        state = self._states.get(node)
        if state is None:
            return []
        waiting = []
        for step, decision in sorted(self._decisions.items()):
            if isinstance(decision, Commit):
                late = any(
                    held_step < step or (held_step == step and how is not Progress.COMMITTED)
                    for held in state.held.values()
                    for held_step, how in held.items()
                )
            else:
                late = step in state.steps(Progress.DAMAGED)
            if late:
                waiting.append(decision)
        return waiting

    def name_next(self) -> int | None:
        """The step to ask for now, or None while one is asked for already or someone is not here yet.

        A name stands until a decision on a step at or after it: a rank without a free slot serves it at its next step.
        It is given up when every rank is well past it and nobody holds anything (all of them skipped that snapshot).
        """
        if not self._all_here() or self._pending() or (self._named is not None and not self._missed(self._named)):
            return None
        passed = max((step for state in self._states.values() for step in state.passed.values()), default=0)
        self._named = max(passed + self.lead, self._floor() + self.every, 1)
        return self._named

    def _all_here(self) -> bool:
        return set(self._states) == set(self.nodes) and all(state.complete for state in self._states.values())

    def _steps(self, least: Progress) -> set[int]:
        return set().union(*(state.steps(least) for state in self._states.values()))

    def _floor(self) -> int:
        """The newest step about which nothing is open any more."""
        return max(self._decided, self.committed or 0)

    def _pending(self) -> bool:
        """Some step newer than the last decision is held by someone."""
        return max(self._steps(Progress.FILLING), default=0) > self._floor()

    def _missed(self, named: int) -> bool:
        return all(step >= named + self.lead for state in self._states.values() for step in state.passed.values())

    def _take(self, decision: Decision) -> None:
        self._decided = max(self._decided, decision.step)
        was_named = self._named is not None and decision.step >= self._named
        if was_named:
            self._named = None
        if isinstance(decision, Commit):
            self._decisions = {step: known for step, known in self._decisions.items() if step > decision.step}
            self.committed, self.commits, self._calm = decision.step, self.commits + 1, self._calm + 1
            if self._calm >= CALM_COMMITS:
                self.lead, self._calm = max(1, self.lead - 1), 0
        else:
            self.aborts, self._calm = self.aborts + 1, 0
            if was_named:  # once for each name, however many steps were taken in its place
                self.lead = min(LEAD_STEPS_MAX, self.lead * 2)
        self._decisions[decision.step] = decision


def superseded(
    generation: GenerationId,
    restored: SnapshotId | None,
    others: Iterable[tuple[GenerationId, SnapshotId | None, bool]],
) -> set[GenerationId]:
    """Older generations that a first commit of `generation` makes useless.

    `others` are `(generation, what it restored, has it ever committed)`. An older generation goes only when this one
    restored its snapshot, directly or through others that restored it in between, or when it began from one of these
    snapshots and never committed anything; a run that started from scratch by mistake makes nothing useless.
    """
    older = [row for row in others if row[0].number < generation.number]
    origins = {other: origin for other, origin, _ in older if origin is not None}
    committers = {other for other, _, has_committed in older if has_committed}
    ancestors: list[SnapshotId] = []
    snapshot = restored
    while snapshot is not None and snapshot not in ancestors:
        ancestors.append(snapshot)
        snapshot = origins.get(snapshot.generation)
    makers = {ancestor.generation for ancestor in ancestors}
    tried_the_same = {other for other, origin in origins.items() if origin in ancestors} - committers
    return {other for other, _, _ in older if other in makers or other in tried_the_same}
