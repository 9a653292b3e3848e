"""Bugs that are planted in the protocol on purpose, and who finds them: the state machine, or a scenario.

A test that cannot fail proves nothing. Each bug here is one that somebody could write; what looks for it is named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from snapshotd import generation, ledger, recovery
from snapshotd.cohort import Cohort, node_state
from snapshotd.ledger import (
    Action,
    Announce,
    Commit,
    Coordinator,
    Decision,
    Empty,
    Ledger,
    NodeState,
    Progress,
    SlotView,
)
from snapshotd.recovery import Choice
from snapshotd.wire import Decree, GenerationId, Inventory, Publish, Shard, SnapshotId
from tests.scenarios import nodes
from tests.scenarios.cluster_play import Unplayable, replayed
from tests.unit.test_ledger_machine import SeveralNodes

SAME_EVERY_TIME = settings(
    max_examples=1000,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
SCENARIOS = Path(__file__).parent.parent / "sim" / "scripts"
Plant = Callable[[pytest.MonkeyPatch], None]
Others = Iterable[tuple[GenerationId, SnapshotId | None, bool]]


# --- the bugs -------------------------------------------------------------------------------------


def frees_the_older_when_a_newer_is_aborted(patch: pytest.MonkeyPatch) -> None:
    real = Ledger._useless

    def wrong(self: Ledger, rank: int, slot: SlotView) -> str | None:
        step = self.step_of(slot)
        outdated = step is not None and slot.progress >= Progress.FULL and any(one > step for one in self._aborted)
        return "a newer step was decided" if outdated else real(self, rank, slot)

    patch.setattr(Ledger, "_useless", wrong)


def frees_the_older_before_the_newer_is_committed(patch: pytest.MonkeyPatch) -> None:
    real = Ledger._useless

    def wrong(self: Ledger, rank: int, slot: SlotView) -> str | None:
        step, newest = self.step_of(slot), max(self._parity, default=0)
        outdated = step is not None and slot.progress >= Progress.FULL and step < newest
        return f"step {newest} is protected here" if outdated else real(self, rank, slot)

    patch.setattr(Ledger, "_useless", wrong)


def frees_before_it_marks(patch: pytest.MonkeyPatch) -> None:
    real = Ledger.apply

    def wrong(self: Ledger, decision: Decision) -> list[Action]:
        return sorted(real(self, decision), key=lambda one: not isinstance(one, Empty))

    patch.setattr(Ledger, "apply", wrong)


def announces_before_it_marks(patch: pytest.MonkeyPatch) -> None:
    real = Ledger.apply

    def wrong(self: Ledger, decision: Decision) -> list[Action]:
        return sorted(real(self, decision), key=lambda one: not isinstance(one, Announce))

    patch.setattr(Ledger, "apply", wrong)


def votes_before_its_parity_is_whole(patch: pytest.MonkeyPatch) -> None:
    real = Ledger._standing

    def wrong(self: Ledger, slot: SlotView) -> Progress:
        progress = real(self, slot)
        return Progress.PROTECTED if progress is Progress.FULL else progress

    patch.setattr(Ledger, "_standing", wrong)


def counts_a_slot_that_is_being_filled(patch: pytest.MonkeyPatch) -> None:
    real = Ledger._standing

    def wrong(self: Ledger, slot: SlotView) -> Progress:
        progress = real(self, slot)
        return Progress.PROTECTED if progress is Progress.FILLING else progress

    patch.setattr(Ledger, "_standing", wrong)


def counts_the_commit_of_the_generation_before(patch: pytest.MonkeyPatch) -> None:
    real = Ledger._standing

    def wrong(self: Ledger, slot: SlotView) -> Progress:
        return slot.progress if slot.progress is Progress.COMMITTED else real(self, slot)

    patch.setattr(Ledger, "_standing", wrong)


def commits_without_one_vote(patch: pytest.MonkeyPatch) -> None:
    real = ledger.decide

    def wrong(step: int, nodes: dict[str, NodeState]) -> Decision | None:
        found = real(step, nodes)
        votes = sum(state.protects(step) for state in nodes.values())
        return Commit(step, "nearly all protect it") if found is None and 0 < votes >= len(nodes) - 1 else found

    patch.setattr(ledger, "decide", wrong)


def aborts_what_somebody_only_has_not_finished(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: NodeState, step: int) -> int | None:
        held = self.held
        late = (rank for rank, passed in sorted(self.passed.items()) if passed > step)
        return next((rank for rank in late if held.get(rank, {}).get(step, Progress.DAMAGED) < Progress.FULL), None)

    patch.setattr(NodeState, "passed_without", wrong)


def compares_steps_of_different_generations(patch: pytest.MonkeyPatch) -> None:
    def wrong(said: Publish, generation: GenerationId, restored: SnapshotId | None) -> NodeState:
        right = node_state(said, generation, restored)
        held = {rank: dict(steps) for rank, steps in right.held.items()}
        for one in said.held:
            held.setdefault(one.rank, {}).setdefault(one.snapshot.step, Progress[one.progress])
        return NodeState(right.complete, right.passed, held, right.heard)

    patch.setattr(generation, "node_state", wrong)


def frees_whatever_was_aborted_under_the_same_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "_step_of", lambda self, slot: slot.snapshot.step if slot.snapshot is not None else None)


def takes_a_number_for_a_generation(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Ledger, slot: SlotView) -> int | None:
        made = slot.snapshot
        own = made is not None and (made.generation.number == self.generation.number or made == self.restored)
        return made.step if made is not None and own else None

    patch.setattr(Ledger, "_step_of", wrong)


def believes_a_late_state(patch: pytest.MonkeyPatch) -> None:
    real = Cohort.hear

    def wrong(self: Cohort, said: Publish, now_s: float = 0.0) -> bool:
        self.states.pop(said.node, None)
        return real(self, said, now_s)

    patch.setattr(Cohort, "hear", wrong)


def obeys_a_late_decree(patch: pytest.MonkeyPatch) -> None:
    real = generation.Generation.obey

    def wrong(self: generation.Generation, decree: Decree) -> list[Decision]:
        self._obeyed = 0
        return real(self, decree)

    patch.setattr(generation.Generation, "obey", wrong)


def goes_on_behind_the_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generation.Generation, "fence", lambda self: None)


def aborts_older_steps_when_it_forgot(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Coordinator, decision: Decision, newest: int, marked: int) -> bool:
        if self.committed is not None and decision.step <= self.committed:
            return False
        if isinstance(decision, Commit):
            return decision.step == newest >= marked
        return decision.step not in self._decisions

    patch.setattr(Coordinator, "_is_news", wrong)


def forgets_what_it_announced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generation, "Coordinator", lambda names, every, announced=0, me="": Coordinator(names, every=every))


def counts_nodes_whose_ranks_are_not_all_here(patch: pytest.MonkeyPatch) -> None:
    real = Ledger.state

    def wrong(self: Ledger) -> NodeState:
        return replace(real(self), complete=True)

    patch.setattr(Ledger, "state", wrong)


def frees_every_older_generation(patch: pytest.MonkeyPatch) -> None:
    def wrong(identity: GenerationId, restored: SnapshotId | None, others: Others) -> set[GenerationId]:
        return {other for other, _, _ in others if other.number < identity.number}

    patch.setattr(nodes, "superseded", wrong)


def takes_shards_of_two_snapshots_for_one(patch: pytest.MonkeyPatch) -> None:
    real = recovery.choose

    def wrong(inventories: Iterable[Inventory]) -> Choice:
        def without_nonce(shard: Shard) -> Shard:
            made = GenerationId(shard.snapshot.generation.number, bytes(16))
            return msgspec.structs.replace(shard, snapshot=SnapshotId(made, shard.snapshot.step))

        return real(msgspec.structs.replace(one, shards=list(map(without_nonce, one.shards))) for one in inventories)

    patch.setattr(recovery, "choose", wrong)


# --- who finds them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plant",
    [
        frees_the_older_when_a_newer_is_aborted,
        frees_the_older_before_the_newer_is_committed,
        votes_before_its_parity_is_whole,
        counts_a_slot_that_is_being_filled,
        commits_without_one_vote,
    ],
)
def test_the_machine_finds_a_daemon_that(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(SeveralNodes, settings=SAME_EVERY_TIME)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (frees_the_older_when_a_newer_is_aborted, "abort"),
        (frees_the_older_before_the_newer_is_committed, "older_stays"),
        (frees_before_it_marks, "coordinator_dies_between_two_marks"),
        (announces_before_it_marks, "coordinator_dies_before_it_tells"),
        (votes_before_its_parity_is_whole, "commit"),
        (counts_a_slot_that_is_being_filled, "no_parity"),
        (counts_the_commit_of_the_generation_before, "inherit_committed"),
        (commits_without_one_vote, "commit_needs_every_group"),
        (aborts_what_somebody_only_has_not_finished, "abort_while_filling"),
        (compares_steps_of_different_generations, "inherit_the_older"),
        (frees_whatever_was_aborted_under_the_same_step, "another_nonce_votes_nothing"),
        (takes_a_number_for_a_generation, "another_nonce_votes_nothing"),
        (believes_a_late_state, "late_state"),
        (obeys_a_late_decree, "late_decree"),
        (goes_on_behind_the_fence, "fence"),
        (aborts_older_steps_when_it_forgot, "coordinator_forgets_and_no_vote_is_left"),
        (forgets_what_it_announced, "coordinator_forgets_what_is_damaged"),
        (forgets_what_it_announced, "coordinator_forgets_and_its_mark_is_damaged"),
        (counts_nodes_whose_ranks_are_not_all_here, "lost_node"),
        (frees_every_older_generation, "fresh_run"),
        (takes_shards_of_two_snapshots_for_one, "two_halves_and_one_shard_of_each"),
    ],
)
def test_a_scenario_tells_of_a_daemon_that(plant: Plant, scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    text = (SCENARIOS / f"{scenario}.txt").read_text()
    with contextlib.suppress(Unplayable):  # what the scenario does next may not be possible any more
        assert replayed(text) != text


@pytest.mark.parametrize("count", range(1, 6))
def test_the_machine_suspects_no_daemon_that_dies_in_the_middle_of_a_commit(count: int) -> None:
    """It dies after it decided, at each of its two marks, after all was carried out, and before it names a step."""
    machine = SeveralNodes()
    try:
        machine.begin([1, 1], 1, 8, 1, "")
        machine._go_well()
        for rank in (0, 1):
            assert machine.cluster.take(rank, 5)
            machine.cluster.finish(rank)
        machine._everyone(machine._look_watched)
        machine._tell_everyone()
        machine._protect("n1")
        machine._look_watched("n1")
        machine._tell_everyone()
        machine._protect("n0")
        machine.daemon_dies_while_it_carries_out_a_decision(0, count)
        machine._keep_going()
    finally:
        machine.cluster.close()
