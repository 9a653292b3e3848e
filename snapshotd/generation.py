"""One generation of a job on this node: its arenas, its book, its decisions, and the hands that carry them out.

Looks at slots go into the pure `Ledger` and `Coordinator`; what they answer is written into the arenas here, in the
order in which it came, because that order is what makes a crash in between harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from snapshotd import _native
from snapshotd.arena import ArenaFile
from snapshotd.faults import crash_point
from snapshotd.ledger import (
    Action,
    Advance,
    Announce,
    Commit,
    Coordinator,
    Decision,
    Empty,
    Ledger,
    Progress,
    RankView,
    SlotView,
)
from snapshotd.metrics import Metrics, Repeats
from snapshotd.wire import GenerationId, SnapshotId

SLOTS_MAX = 64
ROUNDS_MAX = 8
TAGS = {
    Progress.FILLING: _native.FILLING,
    Progress.FULL: _native.FULL,
    Progress.PROTECTED: _native.PROTECTED,
    Progress.COMMITTED: _native.COMMITTED,
}
PROGRESS = {tag: progress for progress, tag in TAGS.items()}
log = logging.getLogger("snapshotd")


class Generation:
    """Its arenas by rank: one each, two while a rank moves to a larger one (the larger one last)."""

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
        self.ledger = Ledger(identity, frozenset(ranks), restored=restored, fenced=fenced)
        self.coordinator = Coordinator(frozenset([node]), every=every)
        self.attached: set[int] = set()
        self.next_step: int | None = None
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
        """Every arena of the generation, by rank."""
        return [file for _, files in sorted(self.files.items()) for file in files]

    def add(self, file: ArenaFile) -> None:
        """Take an arena in; it counts once its rank is attached."""
        files = self.files.setdefault(file.owner.rank, [])
        files.append(file)
        files.sort(key=lambda one: (one.slot_bytes, one.ordinal))
        self._by_ordinal[file.ordinal] = file

    def remove(self, file: ArenaFile) -> None:
        """Let an arena go: freed, or inherited by another generation."""
        rank = file.owner.rank
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
            fresh = self.coordinator.observe(self._node, self.ledger.state())
            for decision in fresh:
                self._carry_out(decision)
            decisions += fresh
            if not fresh and not changed:
                break
        self._name_next()
        return decisions

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
        if moved:
            crash_point("commit.marked")
            self._metrics.add("committed_bytes", size_bytes)
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
        file.quarantined.pop(index, None)
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
        step = self.coordinator.name_next()
        if step is None:
            return
        crash_point("named.before")
        self.next_step = step
        for file in self.all_files():
            name(file, step)

    def _place(self, combined: int) -> tuple[ArenaFile, int]:
        return self._by_ordinal[combined // SLOTS_MAX], combined % SLOTS_MAX


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
