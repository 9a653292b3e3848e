"""One generation of a job on this node: its arenas, its book, its decisions, and the hands that carry them out.

Looks at slots go into the pure `Ledger` and `Coordinator`; what they answer is written into the arenas here, in the
order in which it came, because that order is what makes a crash in between harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from snapshotd import _native, wire
from snapshotd.arena import ArenaFile
from snapshotd.cohort import Cohort, node_state
from snapshotd.faults import crash_point
from snapshotd.ledger import (
    PARITY,
    Abort,
    Action,
    Advance,
    Announce,
    Commit,
    Coordinator,
    Decision,
    Empty,
    Ledger,
    NodeState,
    Progress,
    RankView,
    SlotView,
)
from snapshotd.metrics import Metrics, Repeats
from snapshotd.wire import GenerationId, SnapshotId

FOSTER = -2
"""Stands for the rank of arenas that were made while the job waits; no book ever looks at them."""
SLOTS_MAX = 64
ROUNDS_MAX = 8
ABORTS_TOLD_MAX = 64
TAGS = {
    Progress.FILLING: _native.FILLING,
    Progress.FULL: _native.FULL,
    Progress.PROTECTED: _native.PROTECTED,
    Progress.COMMITTED: _native.COMMITTED,
}
PROGRESS = {tag: progress for progress, tag in TAGS.items()}
log = logging.getLogger("snapshotd")


class Generation:
    """Its arenas by rank: one each, two while a rank moves to a larger one (the larger one last).

    Parity sets stand under the pseudo-rank `PARITY`, what was made while the job waits under `FOSTER`. On several nodes
    `cohort` knows the others; it is None for a job of one node, and after an adoption until a trainer has named them
    again. Then nothing is decided here.
    """

    def __init__(
        self,
        job: str,
        identity: GenerationId,
        *,
        node: str,
        ranks: Iterable[int],
        world_size: int,
        every: int,
        restored: SnapshotId | None,
        metrics: Metrics,
        repeats: Repeats,
        fenced: bool = False,
    ) -> None:
        self.job, self.identity, self.world_size, self.every = job, identity, world_size, every
        self.files: dict[int, list[ArenaFile]] = {}
        ranks = frozenset(ranks)
        alone = len(ranks) == world_size
        self.ledger = Ledger(identity, ranks, restored=restored, needs_parity=not alone, fenced=fenced)
        self.cohort: Cohort | None = None
        self.coordinator = Coordinator(frozenset([node]), every=every) if alone else None
        self.attached: set[int] = {PARITY}
        self.next_step: int | None = None
        self.heard = 0
        self.over = False  # every rank of every node closed its run: nothing of it is wanted back
        self.trouble = ""  # why nothing is protected here, for people
        self._obeyed = 0
        self._aborts_told: Sequence[int] = ()
        self.told = (0, 0)  # commits and aborts, as a coordinator elsewhere counts them
        self._node, self._metrics, self._repeats = node, metrics, repeats
        self._by_ordinal: dict[int, ArenaFile] = {}

    def __str__(self) -> str:
        return f"job {self.job!r}, generation {self.identity}"

    @property
    def restored(self) -> SnapshotId | None:
        """What this generation began from."""
        return self.ledger.restored

    @property
    def ever_committed(self) -> bool:
        """It committed something itself (arenas that it inherited may have been committed before)."""
        return self.ledger.committed is not None or any(file.native.committed_step for file in self.all_files())

    def all_files(self) -> list[ArenaFile]:
        """Every arena of the generation, by rank; fosters and parity first."""
        return [file for _, files in sorted(self.files.items()) for file in files]

    @property
    def spans_nodes(self) -> bool:
        """Other nodes have ranks of it too."""
        return self.coordinator is None or self.cohort is not None

    @property
    def counts(self) -> tuple[int, int]:
        """Commits and aborts of the whole generation."""
        return (self.coordinator.commits, self.coordinator.aborts) if self.coordinator is not None else self.told

    def rank_files(self) -> list[ArenaFile]:
        """The arenas of ranks."""
        return [file for rank in sorted(self.files) if rank >= 0 for file in self.files[rank]]

    def parity_files(self) -> list[ArenaFile]:
        """The arenas that hold this node's parity sets, the largest last."""
        return self.files.get(PARITY, [])

    def foster_files(self) -> list[ArenaFile]:
        """The arenas that this daemon made while the job waits."""
        return self.files.get(FOSTER, [])

    @property
    def committed(self) -> SnapshotId | None:
        """What is committed here; a restored snapshot that was voted anew keeps its name."""
        step = self.ledger.committed
        if step is None:
            return None
        restored = self.restored
        return restored if restored is not None and restored.step == step else SnapshotId(self.identity, step)

    def join(self, cohort: Cohort, ranks: Iterable[int]) -> None:
        """The nodes of this generation, as a trainer named them. A daemon that adopted it learns of them again."""
        self.ledger.ranks = frozenset(ranks)
        if cohort.same_as(self.cohort):
            assert self.cohort is not None
            cohort.states, cohort.heard_s = self.cohort.states, self.cohort.heard_s
        elif cohort.coordinates:
            announced = max((file.native.committed_step for file in self.all_files()), default=0)
            me = cohort.name(cohort.me)
            self.coordinator = Coordinator(cohort.names(), every=self.every, announced=announced, me=me)
        self.cohort = cohort
        self.ledger.needs_parity = cohort.parity_here > 0

    def add(self, file: ArenaFile) -> None:
        """Take an arena in; it counts once its rank is attached."""
        files = self.files.setdefault(_place_of(file), [])
        files.append(file)
        files.sort(key=lambda one: (one.slot_bytes, one.ordinal))
        self._by_ordinal[file.ordinal] = file

    def remove(self, file: ArenaFile) -> None:
        """Let an arena go: freed, or inherited by another generation."""
        rank = _place_of(file)
        self._by_ordinal.pop(file.ordinal, None)
        self.files[rank].remove(file)
        if not self.files[rank]:
            del self.files[rank]

    def fence(self) -> None:
        """No decision of this generation is applied any more; written down, so that the next daemon knows it too."""
        self.ledger.fenced = True
        for file in self.all_files():
            crash_point("fence.before")
            if not file.owner.fenced:
                file.amend(fenced=True)
            crash_point("fence.after")

    # --- looking and acting -----------------------------------------------------------------------

    def look(self) -> list[Decision]:
        """Read every attached arena, decide, carry out, and look again until nothing changes."""
        if self.ledger.fenced:
            return []
        decisions: list[Decision] = []
        for _ in range(ROUNDS_MAX):
            changed = self._observe()
            fresh = self._decide(self._name(), self.node_state()) + self._abort_as_told()
            decisions += fresh
            if not fresh and not changed:
                break
        self._name_next()
        return decisions

    def _decide(self, node: str, state: NodeState) -> list[Decision]:
        """What the coordinator makes of a node's state, carried out here. Nothing where another node coordinates."""
        fresh = self.coordinator.observe(node, state) if self.coordinator is not None else []
        for decision in fresh:
            self._carry_out(decision)
        return fresh

    def _name(self) -> str:
        return self.cohort.name(self.cohort.me) if self.cohort is not None else self._node

    # --- several nodes ----------------------------------------------------------------------------

    def node_state(self) -> NodeState:
        """What this node publishes, as far as the vote goes."""
        state = self.ledger.state()
        return NodeState(state.complete, state.passed, state.held, self.heard)

    def publication(self, serial: int) -> wire.Publish:
        """What this node tells the coordinator and its group."""
        assert self.cohort is not None
        state = self.ledger.state()
        held: list[wire.HeldShard] = []
        for rank in sorted(self.attached & self.files.keys() - {PARITY, FOSTER}):
            for file in self.files[rank]:
                held += self._held(rank, file)
        return wire.Publish(
            job=self.job,
            generation=self.identity,
            node=self.cohort.me,
            serial=serial,
            complete=state.complete,
            closed=self.closed(),
            passed=dict(state.passed),
            held=held,
            naming=self.heard,
            committed=self.ledger.committed or 0,
            aborted=self.ledger.aborted(),
            trouble=wire.clip(self.trouble),
        )

    def _held(self, rank: int, file: ArenaFile) -> list[wire.HeldShard]:
        found = []
        for view in views(file):
            if view.snapshot is None or view.progress is Progress.DAMAGED:
                continue
            info = file.native.slot(view.index)
            shape = wire.ShardShape(info.rank, info.file_bytes, file.block_bytes, info.fingerprint)
            standing = self.ledger.standing(view) if view.progress >= Progress.FULL else view.progress
            found.append(wire.HeldShard(rank, view.snapshot, standing.name, file.arena_id, view.index, shape))
        return found

    def closed(self) -> bool:
        """Every rank of this node has closed its run."""
        own = {rank: files for rank, files in self.files.items() if rank >= 0}
        return set(own) == set(self.ledger.ranks) and all(one.owner.closed for files in own.values() for one in files)

    def hear(self, said: wire.Publish, now_s: float) -> list[Decision]:
        """A peer's state. Returns what was decided by it, where this node coordinates."""
        if self.cohort is None or self.ledger.fenced or not self.cohort.hear(said, now_s):
            return []
        name = self.cohort.name(said.node)
        decisions = self._decide(name, node_state(said, self.identity, self.restored))
        self._name_next()
        return decisions

    def obey(self, decree: wire.Decree) -> list[Decision]:
        """The coordinator's word. Repeating it does no harm."""
        cohort = self.cohort
        if cohort is None or self.ledger.fenced or cohort.coordinates or decree.node != cohort.coordinator:
            return []
        if decree.serial <= self._obeyed:
            return []  # an older one that came late: what it asks for is over
        self._obeyed = decree.serial
        decisions: list[Decision] = []
        committed = self.ledger.committed or 0
        if decree.committed > committed:
            decisions.append(Commit(decree.committed, f"{cohort.name(decree.node)} said so"))
        for decision in decisions:
            self._carry_out(decision)
        self._aborts_told = decree.aborted
        decisions += self._abort_as_told()
        self.told = decree.commits, decree.aborts
        if decree.naming and (decree.naming, decree.next_step) != (self.heard, self.next_step):
            self.heard, self.next_step = decree.naming, decree.next_step
            for file in self.rank_files():
                name(file, decree.next_step)
        return decisions

    def _abort_as_told(self) -> list[Decision]:
        """Carry out what the coordinator aborted of what is held here. Not only when it is heard: a rank may have begun
        such a step since the last look, or begins it yet, and would keep its slot from the next."""
        cohort, committed = self.cohort, self.ledger.committed or 0
        if cohort is None or not self._aborts_told:
            return []
        held = self.ledger.state().steps(Progress.DAMAGED)
        decisions: list[Decision] = [
            Abort(step, f"{cohort.name(cohort.coordinator)} said so")
            for step in self._aborts_told
            if step > committed and step in held and not self.ledger.has_aborted(step)
        ]
        for decision in decisions:
            self._carry_out(decision)
        return decisions

    def decree(self, serial: int, closed: bool) -> wire.Decree:
        """What the coordinator tells every node."""
        assert self.cohort is not None and self.coordinator is not None
        return wire.Decree(
            job=self.job,
            generation=self.identity,
            node=self.cohort.me,
            serial=serial,
            committed=self.coordinator.committed or 0,
            aborted=self.coordinator.aborted()[-ABORTS_TOLD_MAX:],
            next_step=self.next_step or 0,
            naming=self.heard,
            closed=closed,
            commits=self.coordinator.commits,
            aborts=self.coordinator.aborts,
        )

    def is_behind(self, said: wire.Publish) -> bool:
        """A node's state does not show yet all that the coordinator decided."""
        assert self.coordinator is not None
        held = {one.snapshot.step for one in said.held if one.snapshot.generation == self.identity}
        return (
            said.committed < (self.coordinator.committed or 0)
            or said.naming != self.heard
            or bool(held & set(self.coordinator.aborted()))
        )

    def parity_whole(self, step: int, file: ArenaFile | None = None, index: int = 0) -> None:
        """The parity that this node owns of this step is complete, and stands there."""
        slot = None if file is None else file.ordinal * SLOTS_MAX + index
        self._perform(self.ledger.parity_whole(step, slot))

    def parity_place(self, snapshot: SnapshotId) -> tuple[ArenaFile, int] | None:
        """Where the set stands that counts as this node's parity of a snapshot; None where none does."""
        ours = snapshot == self.restored or snapshot.generation == self.identity
        slot = self.ledger.parity_slot(snapshot.step) if ours else None
        return self._place(slot) if slot is not None and slot // SLOTS_MAX in self._by_ordinal else None

    def died(self, rank: int) -> int:
        """The rank's trainer is gone: empty what it was filling. Returns how many slots that were."""
        self.ledger.observe(rank, self._view(rank))
        actions = self.ledger.died(rank)
        self._perform(actions)
        return len(actions)

    def unpinned(self, file: ArenaFile, index: int) -> None:
        """The last reader let go of a slot: empty it if that was put off, and if it still holds the same."""
        snapshot = file.doomed.pop(index, None)
        if snapshot is not None and not self.ledger.fenced and snapshot_in(file.native.slot(index)) == snapshot:
            self._clear(file, index)

    def _observe(self) -> bool:
        changed = False
        for rank in sorted(self.attached & self.files.keys()):
            changed |= self._perform(self.ledger.observe(rank, self._view(rank)))
        return changed

    def _view(self, rank: int) -> RankView:
        """One look at a rank: `passed` first, then the slots. A trainer writes them the other way."""
        files = self.files.get(rank, [])
        passed = max((file.native.passed for file in files), default=0)
        slots = [
            SlotView(file.ordinal * SLOTS_MAX + view.index, view.progress, view.snapshot)
            for file in files
            for view in views(file)
        ]
        return RankView(passed, tuple(slots))

    def _carry_out(self, decision: Decision) -> None:
        first = isinstance(decision, Commit) and self.ledger.committed is None
        if isinstance(decision, Commit):
            crash_point("commit.decided")
        self._perform(self.ledger.apply(decision))
        if isinstance(decision, Commit):
            crash_point("commit.applied")
            self._metrics.add("commits")
            log.log(logging.INFO if first else logging.DEBUG, "%s: committed, %s", self, decision.why)
        else:
            self._metrics.add("aborts")
            self._repeats.warning(
                f"abort {self}", f"{self}: no snapshot of step {decision.step}, since {decision.why}; the next is tried"
            )

    def _perform(self, actions: list[Action]) -> bool:
        """Carry actions out in their order. True if a slot changed by it."""
        changed = False
        for action in actions:
            if isinstance(action, Advance):
                changed |= self._advance(action)
            elif isinstance(action, Empty):
                changed |= self._empty(action)
            elif isinstance(action, Announce):
                self._announce(action.decision)
        return changed

    def _advance(self, action: Advance) -> bool:
        file, index = self._place(action.slot)
        size_bytes = file.native.slot(index).file_bytes
        moved = file.native.advance(index, TAGS[action.state], TAGS[action.to])
        if moved and action.to is Progress.COMMITTED:
            crash_point("commit.marked")
            self._metrics.add("committed_bytes", 0 if file.is_parity else size_bytes)
        return moved

    def _empty(self, action: Empty) -> bool:
        file, index = self._place(action.slot)
        view = view_of(file, index)
        if view is None or view.progress is not action.state:
            return False  # it moved on since the look
        if file.pins[index]:
            if view.snapshot is not None:
                file.doomed[index] = view.snapshot
            return False
        self._clear(file, index)
        log.debug("%s: slot %d of rank %d is free: %s", self, index, action.rank, action.why)
        return True

    def _clear(self, file: ArenaFile, index: int) -> None:
        bad = file.quarantined.pop(index, None)
        if bad is not None and bad[0].step == self.ledger.committed:
            file.missed = bad  # whoever restores asks why it is not here
        file.native.empty(index)

    def _announce(self, decision: Decision) -> None:
        for file in self.all_files():
            if isinstance(decision, Commit):
                file.native.ever_committed = True
                file.native.committed_step = decision.step
            else:
                file.native.aborted_step = max(decision.step, file.native.aborted_step)
            file.native.wake()

    def _name_next(self) -> None:
        step = self.coordinator.name_next() if self.coordinator is not None else None
        if step is None or self.coordinator is None:
            return
        crash_point("named.before")
        self.next_step, self.heard = step, self.coordinator.naming
        for file in self.rank_files():
            name(file, step)
        # This node has heard at once: without its word the name would seem to lag until its next look.
        self.coordinator.observe(self._name(), self.node_state())

    def _place(self, combined: int) -> tuple[ArenaFile, int]:
        return self._by_ordinal[combined // SLOTS_MAX], combined % SLOTS_MAX


def _place_of(file: ArenaFile) -> int:
    if file.is_foster:
        return FOSTER
    return PARITY if file.is_parity else file.owner.rank


def name(file: ArenaFile, step: int) -> None:
    """Ask a trainer for a snapshot at `step`: the step first, then the count that makes it valid."""
    file.native.next_step = step
    file.native.naming = file.native.naming + 1
    file.native.wake()


def views(file: ArenaFile) -> list[SlotView]:
    """An arena's slots that are not empty."""
    looks = (view_of(file, index) for index in range(file.native.slots))
    return [view for view in looks if view is not None]


def view_of(file: ArenaFile, index: int) -> SlotView | None:
    """One slot, read without trust; None if it is empty."""
    info = file.native.slot(index)
    if info.state == _native.EMPTY:
        return None
    progress = PROGRESS.get(info.state, Progress.DAMAGED)
    snapshot = snapshot_in(info)
    bad = file.quarantined.get(index)
    if progress > Progress.FILLING and (not info.sound or (bad is not None and bad[0] == snapshot)):
        progress = Progress.DAMAGED
    return SlotView(index, progress, snapshot)


def snapshot_in(info: _native.SlotInfo) -> SnapshotId | None:
    """What a slot says that it holds; None while nobody has named it or its state is damaged."""
    if not info.step or info.state not in PROGRESS:
        return None
    return SnapshotId(GenerationId(info.generation, info.nonce), info.step)
