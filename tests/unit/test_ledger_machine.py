"""Several nodes, messages that get lost, doubled and reordered, daemons that restart: hypothesis looks for a history
in which the ledgers and the coordinator lose a snapshot or contradict themselves.

The exhaustive exploration covers one node in full; this one covers what it is too small for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from snapshotd.ledger import (
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
from snapshotd.wire import GenerationId, SnapshotId

GENERATION = GenerationId(7, b"g" * 16)
OLDER = GenerationId(6, b"o" * 16)
RESTORED, BEFORE = SnapshotId(OLDER, 20), SnapshotId(OLDER, 10)
MESSAGES_MAX = 8


@dataclass
class Arena:
    """One rank's arena and its trainer."""

    step: int
    slots: dict[int, tuple[Progress, SnapshotId]] = field(default_factory=dict)
    filling: int | None = None
    asked: int = 0

    def free(self) -> int | None:
        return next((index for index in (0, 1) if index not in self.slots), None)

    def view(self) -> RankView:
        found = (SlotView(index, progress, made) for index, (progress, made) in sorted(self.slots.items()))
        return RankView(self.step, tuple(found))

    def holds(self, least: Progress) -> set[SnapshotId]:
        return {made for progress, made in self.slots.values() if progress >= least}


class SeveralNodes(RuleBasedStateMachine):
    """Nodes of several ranks each; the first node's daemon has the coordinator too."""

    @initialize(
        sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), inherited=st.booleans(), every=st.integers(1, 3)
    )
    def begin(self, sizes: list[int], inherited: bool, every: int) -> None:
        self.every = every
        self.restored = RESTORED if inherited else None
        self.needs_parity = len(sizes) > 1
        ranks = iter(range(sum(sizes)))
        self.nodes = {f"n{index}": [next(ranks) for _ in range(size)] for index, size in enumerate(sizes)}
        self.arenas = {rank: Arena(RESTORED.step if inherited else 0) for rank in range(sum(sizes))}
        if inherited:
            for arena in self.arenas.values():
                arena.slots = {0: (Progress.FULL, RESTORED), 1: (Progress.COMMITTED, BEFORE)}
        self.ledgers = {node: self._fresh_ledger(node) for node in self.nodes}
        self.to_coordinator: list[tuple[str, NodeState]] = []
        self.to_nodes: list[tuple[str, Decision]] = []
        self.last_commit: int | None = None
        self.aborted: set[int] = set()
        self.coordinator = self._fresh_coordinator()

    def _fresh_ledger(self, node: str) -> Ledger:
        ranks = frozenset(self.nodes[node])
        return Ledger(GENERATION, ranks, restored=self.restored, needs_parity=self.needs_parity)

    def _fresh_coordinator(self) -> Coordinator:
        return Coordinator(frozenset(self.nodes), every=self.every)

    def _pick(self, number: int) -> tuple[int, Arena]:
        rank = number % len(self.arenas)
        return rank, self.arenas[rank]

    # --- trainers ---------------------------------------------------------------------------------

    @rule(number=st.integers(0, 8), wants=st.booleans())
    def end_of_loop_body(self, number: int, wants: bool) -> None:
        """A step ends. A rank may take a snapshot that nobody named: that must be harmless."""
        _, arena = self._pick(number)
        if arena.filling is not None:
            self._publish(arena)  # the optimizer's pre-hook waits for the copy
        step = arena.step + 1
        index = arena.free()
        if index is not None and (wants or 0 < arena.asked <= step):
            arena.slots[index] = Progress.FILLING, SnapshotId(GENERATION, step)
            arena.filling, arena.asked = index, 0
        arena.step = step

    @rule(number=st.integers(0, 8), whole=st.booleans())
    def copy_ends(self, number: int, whole: bool) -> None:
        _, arena = self._pick(number)
        if arena.filling is not None and whole:
            self._publish(arena)
        elif arena.filling is not None:
            del arena.slots[arena.filling]
            arena.filling = None

    def _publish(self, arena: Arena) -> None:
        assert arena.filling is not None
        arena.slots[arena.filling] = Progress.FULL, arena.slots[arena.filling][1]
        arena.filling = None

    # --- daemons ----------------------------------------------------------------------------------

    @rule(number=st.integers(0, 2))
    def protect(self, number: int) -> None:
        """Parity of every FULL slot of a node is complete now."""
        node = sorted(self.nodes)[number % len(self.nodes)]
        for rank in self.nodes[node] if self.needs_parity else []:
            slots = self.arenas[rank].slots
            for index, (progress, made) in slots.items():
                if progress is Progress.FULL:
                    slots[index] = Progress.PROTECTED, made

    @rule(number=st.integers(0, 2), rank=st.integers(0, 2))
    def look_and_publish(self, number: int, rank: int) -> None:
        node = sorted(self.nodes)[number % len(self.nodes)]
        one = self.nodes[node][rank % len(self.nodes[node])]
        self._carry_out(self.ledgers[node].observe(one, self.arenas[one].view()))
        self.to_coordinator = [*self.to_coordinator, (node, self.ledgers[node].state())][-MESSAGES_MAX:]

    @precondition(lambda self: self.to_coordinator)
    @rule(number=st.integers(0, MESSAGES_MAX), keep=st.booleans())
    def state_arrives(self, number: int, keep: bool) -> None:
        """Any message that is on its way, perhaps not for the last time; and what the node has not heard goes out."""
        index = number % len(self.to_coordinator)
        node, state = self.to_coordinator[index] if keep else self.to_coordinator.pop(index)
        decisions = self.coordinator.observe(node, state)
        for decision in decisions:
            self._note(decision)
        everyone = [(name, decision) for name in self.nodes for decision in decisions]
        again = [(node, decision) for decision in self.coordinator.unheard(node)]
        self.to_nodes = [*self.to_nodes, *everyone, *again][-2 * MESSAGES_MAX :]
        step = self.coordinator.name_next()
        if step is not None:
            for arena in self.arenas.values():
                arena.asked = step

    @precondition(lambda self: self.to_nodes)
    @rule(number=st.integers(0, 2 * MESSAGES_MAX), keep=st.booleans())
    def decision_arrives(self, number: int, keep: bool) -> None:
        index = number % len(self.to_nodes)
        node, decision = self.to_nodes[index] if keep else self.to_nodes.pop(index)
        self._carry_out(self.ledgers[node].apply(decision))

    @rule(number=st.integers(0, 2))
    def daemon_restarts(self, number: int) -> None:
        node = sorted(self.nodes)[number % len(self.nodes)]
        self.ledgers[node] = self._fresh_ledger(node)
        for rank in self.nodes[node]:
            self._carry_out(self.ledgers[node].observe(rank, self.arenas[rank].view()))

    @rule()
    def coordinator_forgets(self) -> None:
        self.coordinator = self._fresh_coordinator()

    # --- what must hold ---------------------------------------------------------------------------

    def _whole(self, least: Progress) -> set[SnapshotId]:
        return set.intersection(*(arena.holds(least) for arena in self.arenas.values()))

    def _note(self, decision: Decision) -> None:
        """I2, and that decisions do not contradict one another, whoever forgot what."""
        made = self.restored if self.restored and decision.step == self.restored.step else None
        made = made or SnapshotId(GENERATION, decision.step)
        if isinstance(decision, Commit):
            assert decision.step not in self.aborted
            if self.last_commit is not None and decision.step < self.last_commit:
                return  # a coordinator that forgot heard an old message first; whoever is further does not listen
            least = Progress.PROTECTED if self.needs_parity else Progress.FULL
            assert made in self._whole(least), f"{made} was committed and some rank does not hold it"
            self.last_commit = decision.step
        else:
            assert self.last_commit is None or decision.step > self.last_commit
            holding = [made in arena.holds(Progress.FILLING) for arena in self.arenas.values()]
            assert not all(holding), f"{made} was aborted and everyone has it"
            self.aborted.add(decision.step)

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Advance):
                progress, made = self.arenas[action.rank].slots[action.slot]
                if progress is action.state:
                    self.arenas[action.rank].slots[action.slot] = action.to, made
            elif isinstance(action, Empty):
                self._empty(action)
            else:
                assert isinstance(action, Announce)

    def _empty(self, action: Empty) -> None:
        arena = self.arenas[action.rank]
        if action.slot not in arena.slots:
            return
        progress, made = arena.slots[action.slot]
        assert progress is not Progress.FILLING, "a slot was taken from its trainer"
        newest = max(self._whole(Progress.FULL), default=None)
        del arena.slots[action.slot]
        assert made != newest, f"{made} was the newest that was whole"
        committed = self.last_commit is not None and (made.generation == OLDER or made.step < self.last_commit)
        aborted = made.generation == GENERATION and made.step in self.aborted
        assert committed or aborted, f"{made} was emptied without a newer commit and without an abort"

    @invariant()
    def something_at_least_as_new_as_the_last_commit_is_whole(self) -> None:
        """I3, as far as no node is lost; and what was restored stays until something newer is whole."""
        if not hasattr(self, "arenas"):
            return
        whole = self._whole(Progress.FULL)
        if self.last_commit is not None:
            assert any(made.step >= self.last_commit for made in whole)
        if self.restored is not None:
            assert any(made >= self.restored for made in whole)

    @invariant()
    def a_name_lies_ahead_by_a_bounded_lead(self) -> None:
        if hasattr(self, "arenas"):
            assert 1 <= self.coordinator.lead <= 64

    def teardown(self) -> None:
        """From wherever we got to: nothing is lost any more, everybody keeps going, and something new is committed."""
        if not hasattr(self, "arenas"):
            return
        before = self.last_commit
        self.to_coordinator, self.to_nodes = [], []
        for _ in range(400):
            for rank in range(len(self.arenas)):
                self.end_of_loop_body(rank, False)
            for rank in range(len(self.arenas)):
                self.copy_ends(rank, True)
            for number in range(len(self.nodes)):
                self.protect(number)
                for rank in range(3):
                    self.look_and_publish(number, rank)
            while self.to_coordinator:
                self.state_arrives(0, False)
            while self.to_nodes:
                self.decision_arrives(0, False)
            if self.last_commit is not None and self.last_commit != before:
                return
        raise AssertionError(f"nothing was committed any more after step {before}: {self.arenas}")


SeveralNodes.TestCase.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)
TestSeveralNodes = SeveralNodes.TestCase
