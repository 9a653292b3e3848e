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
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from snapshotd.wire import GenerationId, SnapshotId

LEAD_STEPS_MAX = 64
CALM_COMMITS = 64
LAGS_KEPT = 8
PARITY = -1
"""The pseudo-rank under which a node's parity sets stand in its book: they are freed by the rules of any slot."""


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
    """What a node publishes: per local rank the newest step passed and the steps it holds. `complete`: all attached.

    `heard` is the count of the newest naming that has reached its ranks.
    """

    complete: bool
    passed: Mapping[int, int]
    held: Mapping[int, Mapping[int, Progress]]
    heard: int = 0

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
    of one node, where FULL is all the protection there is; else a slot counts as PROTECTED only while the parity that
    this node owns of its step is whole (`parity_whole`). `fenced`: a newer generation has looked at what is here, and
    no decision of this one is applied any more.
    """

    generation: GenerationId
    ranks: frozenset[int]
    restored: SnapshotId | None = None
    needs_parity: bool = False
    fenced: bool = False
    committed: int | None = None
    _views: dict[int, RankView] = field(default_factory=dict)
    _aborted: set[int] = field(default_factory=set)
    _parity: dict[int, int | None] = field(default_factory=dict)

    def observe(self, rank: int, view: RankView) -> list[Action]:
        """Take note of a rank's arena as it is now. Returns what that look leaves to do: a mark that was missed (a
        daemon that restarted in the middle of a commit), then what became free."""
        self._views[rank] = view
        if rank == PARITY:
            self._count_parity()
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
        self._parity = {step: slot for step, slot in self._parity.items() if step >= decision.step}
        return self._noted([*self._marks(), Announce(decision), *self._frees()])

    def parity_whole(self, step: int, slot: int | None = None) -> list[Action]:
        """The parity that this node owns of this step is complete: what its ranks hold of it counts as PROTECTED, for
        as long as it stands in that slot (None: in any).

        Never written down: a restarted daemon looks at its parity sets again before it says so.
        """
        if self.fenced:
            return []
        self._parity[step] = slot
        return self._noted(
            [
                Advance(rank, slot.index, slot.progress, Progress.PROTECTED)
                for rank, slot in self._seen(None)
                if rank != PARITY and slot.progress is Progress.FULL and self._step_of(slot) == step
            ]
        )

    def parity_gone(self, step: int) -> None:
        """The parity of this step turned out damaged, or was given up: it has to be made again."""
        self._parity.pop(step, None)

    def has_parity(self, step: int) -> bool:
        """The parity that this node owns of this step is complete."""
        return step in self._parity

    def parity_slot(self, step: int) -> int | None:
        """The slot in which the set stands that counts for this step; None where none does, or it may be any."""
        return self._parity.get(step)

    def has_aborted(self, step: int) -> bool:
        """This book has carried out that step's abort (its trainer may still be filling the slot)."""
        return step in self._aborted

    def aborted(self) -> int:
        """The newest step whose abort this book has carried out; 0 where none has."""
        return max(self._aborted, default=0)

    def step_of(self, slot: SlotView) -> int | None:
        """The step of a slot that concerns this generation (the restored snapshot does); None for any other."""
        return self._step_of(slot)

    def standing(self, slot: SlotView) -> Progress:
        """How far a slot is for this generation's vote."""
        return self._standing(slot)

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

    def _count_parity(self) -> None:
        """A set whose description turned out damaged, or that is not there any more, protects nothing."""
        sound = {
            (slot.index, self._step_of(slot)) for slot in self._views[PARITY].slots if slot.progress >= Progress.FULL
        }
        steps = {step for _, step in sound}
        self._parity = {
            step: slot
            for step, slot in self._parity.items()
            if (step in steps if slot is None else (slot, step) in sound)
        }

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
        if progress in (Progress.FULL, Progress.PROTECTED):
            whole = not self.needs_parity or self._step_of(slot) in self._parity
            progress = Progress.PROTECTED if whole else Progress.FULL
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
        if step is not None and step in self._aborted and not self._is_committed(slot, step):
            return None if self._is_last_resort(rank, slot) else f"step {step} was aborted"
        if self.committed is None:
            return self._gives_way(rank, slot)
        if slot.progress is Progress.DAMAGED:
            return f"it is damaged, and step {self.committed} is committed"
        if step is None or step < self.committed:
            return f"step {self.committed} is committed and newer"
        return None

    def _is_committed(self, slot: SlotView, step: int) -> bool:
        """It bears a mark that counts. That of a daemon which died before it told anyone does not, once an older commit
        was decided anew and this step aborted."""
        untold = slot.snapshot != self.restored and self.committed is not None and step > self.committed
        return slot.progress is Progress.COMMITTED and not untold

    def _is_last_resort(self, rank: int, slot: SlotView) -> bool:
        """The slot holds what the generation was restored from, and the rank has nothing older to fall back to.

        It was whole when it was restored; its abort only says that some rank has an arena without it now. So it stays
        until something newer is committed, but where it is one of two old snapshots a slot is needed for new ones.
        """
        if slot.snapshot != self.restored or slot.progress is Progress.DAMAGED:
            return False
        others = (one for one in self._views[rank].slots if one != slot)
        return all(
            one.snapshot in (None, self.restored)
            or one.snapshot.generation == self.generation
            or self._gives_way(rank, one) is not None
            for one in others
        )

    def _gives_way(self, rank: int, slot: SlotView) -> str | None:
        """The reason why something old goes rather than the restored snapshot, which cannot be voted any more.

        What is newer was not whole, or it would have been restored. What is older is of no use where the restored one
        bears a mark of its commit (an older mark stays beside one that is not known to be committed).
        """
        restored = self.restored
        others = (one for one in self._views[rank].slots if one != slot)
        if restored is None or not any(one.snapshot == restored and one.progress >= Progress.FULL for one in others):
            return None
        if restored.step not in self._aborted:
            return None
        if slot.progress is Progress.DAMAGED:
            return f"it is damaged, and {restored} is in the other slot"
        if slot.snapshot is None or slot.snapshot == restored:
            return None
        if slot.snapshot.generation == self.generation or slot.progress is Progress.FILLING:
            return None
        if _age(slot.snapshot) > _age(restored):
            return f"it was not whole when {restored} was restored"
        marked = any(one.snapshot == restored and one.progress is Progress.COMMITTED for _, one in self._seen(None))
        return f"{restored} is committed and newer" if marked else None


def _age(snapshot: SnapshotId) -> tuple[int, int]:
    return snapshot.generation.number, snapshot.step


# --- the generation's decisions -------------------------------------------------------------------


@dataclass
class Coordinator:
    """Decides for a whole generation, and names which step to snapshot next.

    `every` is the fewest steps between two snapshots. `lead` is how far ahead of the newest passed step a name lies, so
    that ranks agree on the step although they hear at different times. It is more than the lag that was observed lately
    (how many steps the fastest rank went on until every node had heard of a name; no clock is needed for that), it
    doubles when ranks did not agree all the same, and shrinks by one after `CALM_COMMITS` commits.

    `announced` is the last commit that an earlier daemon of this node announced, and may have told: it stays decided,
    whatever has become of its mark since (a shard that bore it may be damaged). A newer mark on this node, `me`, was
    never told, and nothing was freed for it: it binds nobody.
    """

    nodes: frozenset[str]
    every: int = 1
    announced: int = 0
    me: str = ""
    committed: int | None = None
    aborts: int = 0
    commits: int = 0
    lead: int = 1
    naming: int = 0
    _states: dict[str, NodeState] = field(default_factory=dict)
    _decisions: dict[int, Decision] = field(default_factory=dict)
    _decided: int = 0
    _named: int | None = None
    _calm: int = 0
    _named_at: int = 0
    _unheard: set[str] = field(default_factory=set)
    _lags: deque[int] = field(default_factory=lambda: deque(maxlen=LAGS_KEPT))

    def observe(self, node: str, state: NodeState) -> list[Decision]:
        """Take note of a node's state; returns the decisions that are new by it, oldest step first.

        The newest step that can be committed is; older ones need no decision then. What bears a COMMITTED mark was
        decided before, perhaps by a coordinator that forgot: nothing older is decided any more, and no abort of it.
        """
        if node not in self.nodes:
            return []
        self._states[node] = state
        self._note_lag(node, state)
        if not self._all_here():
            return []
        steps = sorted(self._steps(Progress.DAMAGED))
        found = {step: decision for step in steps if (decision := decide(step, self._states)) is not None}
        if self.announced and not isinstance(found.get(self.announced), Commit):
            found[self.announced] = Commit(self.announced, f"step {self.announced} was announced before")
        newest = max((step for step, decision in found.items() if isinstance(decision, Commit)), default=0)
        marked = max((step for step in self._steps(Progress.COMMITTED) if self._binds(step)), default=0)
        news = [decision for step, decision in found.items() if self._is_news(decision, newest, marked)]
        for decision in news:
            self._take(decision)
        return news

    def _binds(self, step: int) -> bool:
        """A mark of this step may have been acted upon by somebody."""
        known = max(self.announced, self.committed or 0)
        others = (state for node, state in self._states.items() if node != self.me)
        return step <= known or any(step in state.steps(Progress.COMMITTED) for state in others)

    def _is_news(self, decision: Decision, newest: int, marked: int) -> bool:
        if self.committed is not None and decision.step <= self.committed:
            return False
        if isinstance(decision, Commit):
            return decision.step == newest >= marked
        return decision.step > max(newest, marked) and decision.step not in self._decisions

    def name_next(self) -> int | None:
        """The step to ask for now, or None while one is asked for already or someone is not here yet.

        A name stands until a decision on a step at or after it: a rank without a free slot serves it at its next step.
        It is given up when every rank is well past it and nobody holds anything (all of them skipped that snapshot).
        """
        if not self._all_here() or self._pending() or (self._named is not None and not self._missed(self._named)):
            return None
        passed = max((step for state in self._states.values() for step in state.passed.values()), default=0)
        self.lead = min(LEAD_STEPS_MAX, max(self.lead, max(self._lags, default=0) + 1))
        self._named = max(passed + self.lead, self._floor() + self.every, 1)
        self._lags.append(0)
        self.naming, self._named_at = self.naming + 1, passed
        self._unheard = set(self.nodes) if len(self.nodes) > 1 else set()
        return self._named

    def _note_lag(self, node: str, state: NodeState) -> None:
        """A node has heard of the newest name: its fastest rank went on that many steps meanwhile."""
        if node in self._unheard and state.heard == self.naming:
            self._unheard.discard(node)
            self._lags[-1] = max(self._lags[-1], max(state.passed.values(), default=0) - self._named_at)

    def state_of(self, node: str) -> NodeState | None:
        """What a node published last."""
        return self._states.get(node)

    def aborted(self) -> list[int]:
        """Steps above the last commit that were aborted, oldest first."""
        return sorted(step for step, decision in self._decisions.items() if isinstance(decision, Abort))

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
                lead = max(1, self.lead - 1, max(self._lags, default=0) + 1)
                self.lead, self._calm = min(LEAD_STEPS_MAX, lead), 0
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
