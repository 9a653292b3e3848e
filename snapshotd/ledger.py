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
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
            if passed >= step and self.held[rank].get(step, Progress.DAMAGED) is Progress.DAMAGED:
                return rank
        return None

    def protects(self, step: int) -> bool:
        """Every rank of the node holds this step and it is protected (or committed already)."""
        return self.complete and all(
            held.get(step, Progress.DAMAGED) >= Progress.PROTECTED for held in self.held.values()
        )

    def steps(self) -> set[int]:
        """Steps that some rank of the node holds in any usable way."""
        return {step for held in self.held.values() for step, how in held.items() if how is not Progress.DAMAGED}


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
    """Free a slot: its snapshot is of no use to anyone any more."""

    rank: int
    slot: int
    why: str


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
        """Take note of a rank's arena as it is now. Returns what became free by it."""
        self._views[rank] = view
        if self.fenced:
            return []
        return [Empty(rank, slot.index, why) for slot in view.slots for why in self._useless(slot)]

    def apply(self, decision: Decision) -> list[Action]:
        """Carry out a decision: mark first on every rank, announce, and only then free what is older (I1)."""
        if self.fenced or (self.committed is not None and decision.step < self.committed):
            return []
        if isinstance(decision, Abort):
            if decision.step == self.committed:
                return []
            self._aborted.add(decision.step)
            return [Announce(decision), *self._sweep()]
        marks: list[Action] = []
        for rank, view in sorted(self._views.items()):
            for slot in view.slots:
                if self._step_of(slot) == decision.step and slot.progress in (Progress.FULL, Progress.PROTECTED):
                    marks.append(Advance(rank, slot.index, slot.progress, Progress.COMMITTED))
        self.committed = decision.step
        self._aborted = {step for step in self._aborted if step > decision.step}
        return [*marks, Announce(decision), *self._sweep()]

    def died(self, rank: int) -> list[Action]:
        """The rank's trainer is gone: what it was still filling will never be whole."""
        view = self._views.get(rank, RankView(0))
        return [
            Empty(rank, slot.index, "its trainer died while it was being filled")
            for slot in view.slots
            if slot.progress is Progress.FILLING
        ]

    def state(self) -> NodeState:
        """What this node publishes."""
        known = {rank: self._views[rank] for rank in self.ranks if rank in self._views}
        return NodeState(
            complete=len(known) == len(self.ranks),
            passed={rank: view.passed for rank, view in known.items()},
            held={rank: self._held(view) for rank, view in known.items()},
        )

    def _held(self, view: RankView) -> dict[int, Progress]:
        held: dict[int, Progress] = {}
        for slot in view.slots:
            step = self._step_of(slot)
            if step is None:
                continue
            whole = slot.progress is Progress.FULL and not self.needs_parity
            held[step] = Progress.PROTECTED if whole else slot.progress
        return held

    def _step_of(self, slot: SlotView) -> int | None:
        """The step of a slot of this generation (the restored snapshot counts); None for any other."""
        if slot.snapshot is None:
            return None
        if slot.snapshot.generation == self.generation or slot.snapshot == self.restored:
            return slot.snapshot.step
        return None

    def _sweep(self) -> list[Action]:
        return [
            Empty(rank, slot.index, why)
            for rank, view in sorted(self._views.items())
            for slot in view.slots
            for why in self._useless(slot)
        ]

    def _useless(self, slot: SlotView) -> list[str]:
        """The reason why a slot may go, if there is one. FILLING slots belong to their trainer until it leaves them."""
        if slot.progress is Progress.FILLING:
            return []
        step = self._step_of(slot)
        if step is not None and step in self._aborted and slot.progress is not Progress.COMMITTED:
            return [f"step {step} was aborted"]
        if self.committed is None:
            return []
        if step is None or step < self.committed or slot.progress is Progress.DAMAGED:
            return [f"step {self.committed} is committed and newer"]
        return []


# --- the generation's decisions -------------------------------------------------------------------


@dataclass
class Coordinator:
    """Decides for a whole generation, and names which step to snapshot next.

    `every` is the fewest steps between two snapshots. `lead` is how far ahead of the newest passed step a name lies:
    it doubles when a rank passed a named step before it heard of it, and shrinks by one after `CALM_COMMITS` commits,
    so that ranks agree on the step although they hear at different times.
    """

    nodes: frozenset[str]
    every: int = 1
    committed: int | None = None
    aborts: int = 0
    commits: int = 0
    lead: int = 1
    _states: dict[str, NodeState] = field(default_factory=dict)
    _decided: int = 0
    _named: int | None = None
    _calm: int = 0

    def observe(self, node: str, state: NodeState) -> list[Decision]:
        """Take note of a node's state; returns the decisions that follow from it, oldest step first."""
        self._states[node] = state
        decisions: list[Decision] = []
        if not self._all_here():
            return decisions
        for step in sorted(set().union(*(known.steps() for known in self._states.values()))):
            if self.committed is not None and step <= self.committed:
                continue
            decision = decide(step, self._states)
            if decision is not None and (step > self._decided or isinstance(decision, Commit)):
                self._take(decision)
                decisions.append(decision)
        return decisions

    def name_next(self) -> int | None:
        """The step to ask for now, or None while one is asked for already or someone is not here yet.

        A name stands until a decision on a step at or after it: a rank without a free slot serves it at its next step.
        """
        if self._named is not None or not self._all_here() or self._pending():
            return None
        passed = max((step for state in self._states.values() for step in state.passed.values()), default=0)
        self._named = max(passed + self.lead, self._decided + self.every, 1)
        return self._named

    def _all_here(self) -> bool:
        return set(self._states) == set(self.nodes) and all(state.complete for state in self._states.values())

    def _pending(self) -> bool:
        """Some step newer than the last decision is held by someone."""
        newest = max((step for state in self._states.values() for step in state.steps()), default=0)
        floor = self._decided if self.committed is None else max(self._decided, self.committed)
        return newest > floor

    def _take(self, decision: Decision) -> None:
        self._decided = max(self._decided, decision.step)
        if self._named is not None and decision.step >= self._named:
            self._named = None
        if isinstance(decision, Commit):
            self.committed, self.commits, self._calm = decision.step, self.commits + 1, self._calm + 1
            if self._calm >= CALM_COMMITS:
                self.lead, self._calm = max(1, self.lead - 1), 0
        else:
            self.aborts, self._calm = self.aborts + 1, 0
            self.lead = min(LEAD_STEPS_MAX, self.lead * 2)


def superseded(
    generation: GenerationId,
    restored: SnapshotId | None,
    others: Iterable[tuple[GenerationId, SnapshotId | None, bool]],
) -> set[GenerationId]:
    """Older generations that a first commit of `generation` makes useless.

    `others` are `(generation, what it restored, has it ever committed)`. An older generation goes only when this one
    restored its snapshot, or when it began from the same snapshot and never committed anything; a run that started from
    scratch by mistake makes nothing useless.
    """
    if restored is None:
        return set()
    gone = set()
    for other, origin, has_committed in others:
        tried_the_same = origin == restored and not has_committed
        if other != generation and (other == restored.generation or tried_the_same):
            gone.add(other)
    return gone
