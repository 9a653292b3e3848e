"""The ledger's and the coordinator's rules one by one, where a scenario or the exploration would hide them."""

from __future__ import annotations

from collections.abc import Sequence

from snapshotd.ledger import (
    CALM_COMMITS,
    LEAD_STEPS_MAX,
    PARITY,
    Abort,
    Action,
    Advance,
    Announce,
    Commit,
    Coordinator,
    Empty,
    Ledger,
    NodeState,
    Progress,
    RankView,
    SlotView,
    decide,
)
from snapshotd.wire import GenerationId, SnapshotId

OLD, NOW = GenerationId(1, b"o" * 16), GenerationId(2, b"n" * 16)
FILLING, FULL, COMMITTED, DAMAGED = Progress.FILLING, Progress.FULL, Progress.COMMITTED, Progress.DAMAGED


def view(passed: int, *slots: tuple[Progress, int], generation: GenerationId = NOW) -> RankView:
    found = [SlotView(index, progress, SnapshotId(generation, step)) for index, (progress, step) in enumerate(slots)]
    return RankView(passed, tuple(found))


def state(passed: int, held: dict[int, Progress], *, complete: bool = True) -> NodeState:
    return NodeState(complete, {0: passed}, {0: held})


def emptied(actions: Sequence[Action]) -> list[int]:
    return [action.slot for action in actions if isinstance(action, Empty)]


# --- decide -----------------------------------------------------------------------------------------


def test_a_rank_that_is_filling_may_still_hold_the_step() -> None:
    assert decide(5, {"a": state(5, {5: FULL}), "b": state(5, {5: FILLING})}) is None


def test_an_abort_names_the_rank_and_the_node_that_went_past_the_step() -> None:
    decision = decide(5, {"a": state(5, {5: FULL}), "b": state(6, {})})
    assert decision == Abort(5, "rank 0 on b passed step 5 without it")


def test_a_node_whose_ranks_are_not_all_here_commits_nothing() -> None:
    assert decide(5, {"a": state(5, {5: COMMITTED}, complete=False)}) is None


def test_nobody_at_all_commits_nothing() -> None:
    assert decide(5, {}) is None


def test_a_state_that_names_a_rank_without_its_slots_counts_as_holding_nothing() -> None:
    assert isinstance(decide(5, {"a": NodeState(True, {0: 5, 1: 5}, {0: {5: FULL}})}), Abort)


# --- the book ---------------------------------------------------------------------------------------


def test_a_commit_marks_then_tells_then_frees() -> None:
    book = Ledger(NOW, frozenset([0]))
    book.observe(0, view(5, (COMMITTED, 4), (FULL, 5)))
    commit = Commit(5, "")
    kinds = [type(action) for action in book.apply(commit)]
    assert kinds == [Advance, Announce, Empty]


def test_what_was_freed_is_not_freed_again_before_the_next_look() -> None:
    book = Ledger(NOW, frozenset([0]))
    book.observe(0, view(5, (COMMITTED, 4), (FULL, 5)))
    assert emptied(book.apply(Commit(5, ""))) == [0]
    # The trainer may have claimed slot 0 again by now; nothing that is decided in between may touch it.
    assert emptied(book.apply(Commit(5, ""))) == []
    assert emptied(book.apply(Abort(6, ""))) == []


def test_what_could_not_be_freed_is_asked_for_again_at_the_next_look() -> None:
    """A reader has pinned the slot: the daemon did not empty it, and the next look shows that."""
    book = Ledger(NOW, frozenset([0]))
    book.observe(0, view(5, (COMMITTED, 4), (FULL, 5)))
    book.apply(Commit(5, ""))
    assert emptied(book.observe(0, view(5, (COMMITTED, 4), (COMMITTED, 5)))) == [0]


def test_an_action_names_the_state_in_which_the_slot_must_still_be() -> None:
    book = Ledger(NOW, frozenset([0]))
    book.observe(0, view(5, (FULL, 5)))
    (action,) = (action for action in book.apply(Abort(5, "")) if isinstance(action, Empty))
    assert action.state is FULL


def test_a_mark_that_a_dying_daemon_missed_is_made_at_the_next_look() -> None:
    book = Ledger(NOW, frozenset([0, 1]), committed=5)
    assert book.observe(0, view(5, (FULL, 5))) == [Advance(0, 0, FULL, COMMITTED)]


def test_a_late_abort_of_the_committed_step_does_nothing() -> None:
    book = Ledger(NOW, frozenset([0]), committed=5)
    book.observe(0, view(5, (COMMITTED, 5)))
    assert book.apply(Abort(5, "")) == []


def test_decisions_older_than_the_last_commit_do_nothing() -> None:
    book = Ledger(NOW, frozenset([0]), committed=5)
    book.observe(0, view(6, (COMMITTED, 5), (FULL, 6)))
    assert book.apply(Commit(4, "")) == [] and book.apply(Abort(4, "")) == []


def test_an_abort_while_filling_is_carried_out_once_the_trainer_has_left_the_slot() -> None:
    book = Ledger(NOW, frozenset([0]))
    book.observe(0, view(5, (FILLING, 5)))
    assert emptied(book.apply(Abort(5, ""))) == []
    assert emptied(book.observe(0, view(5, (FILLING, 5)))) == []
    assert emptied(book.observe(0, view(5, (FULL, 5)))) == [0]


def test_a_fenced_book_changes_nothing_but_what_a_dead_trainer_left_half_filled() -> None:
    book = Ledger(NOW, frozenset([0]), fenced=True)
    assert book.observe(0, view(6, (FULL, 5), (FILLING, 6))) == []
    assert book.apply(Commit(5, "")) == [] and book.apply(Abort(5, "")) == []
    assert emptied(book.died(0)) == [1]


def test_with_parity_to_come_a_full_slot_protects_nothing_yet() -> None:
    book = Ledger(NOW, frozenset([0]), needs_parity=True)
    book.observe(0, view(5, (FULL, 5)))
    assert not book.state().protects(5)
    assert book.parity_whole(5) == [Advance(0, 0, FULL, Progress.PROTECTED)]
    assert book.state().protects(5)


def test_a_mark_of_an_earlier_daemon_protects_nothing_until_parity_was_seen_again() -> None:
    book = Ledger(NOW, frozenset([0]), needs_parity=True)
    book.observe(0, view(5, (Progress.PROTECTED, 5)))
    assert not book.state().protects(5)
    book.parity_whole(5)
    assert book.state().protects(5)
    book.parity_gone(5)
    assert not book.state().protects(5), "it turned out damaged"


def test_a_name_is_further_ahead_than_the_lag_that_was_seen() -> None:
    def said(passed: int, heard: int, held: Progress | None = None) -> NodeState:
        return NodeState(True, {0: passed}, {0: {} if held is None else {passed: held}}, heard)

    coordinator = Coordinator(frozenset(["a", "b"]))
    for name in ("a", "b"):
        coordinator.observe(name, said(10, 0))
    assert coordinator.name_next() == 11
    coordinator.observe("a", said(10, 1))
    coordinator.observe("b", said(13, 1))  # it went on three steps before it heard
    for name in ("a", "b"):
        coordinator.observe(name, NodeState(True, {0: 14}, {0: {14: COMMITTED}}, 1))
    assert coordinator.committed == 14
    assert coordinator.name_next() == 18


def test_a_commit_of_the_generation_before_is_no_vote_in_this_one() -> None:
    restored = SnapshotId(OLD, 40)
    book = Ledger(NOW, frozenset([0]), restored=restored, needs_parity=True)
    book.observe(0, view(40, (COMMITTED, 40), generation=OLD))
    assert not book.state().protects(40), "its parity may have been lost with a node"
    alone = Ledger(NOW, frozenset([0]), restored=restored)
    alone.observe(0, view(40, (COMMITTED, 40), generation=OLD))
    assert alone.state().protects(40) and not alone.state().steps(COMMITTED)


def test_of_the_parity_of_a_restored_snapshot_that_is_there_twice_an_abort_frees_none() -> None:
    restored = SnapshotId(OLD, 40)
    book = Ledger(NOW, frozenset([0]), restored=restored, needs_parity=True)
    book.observe(0, RankView(40, (SlotView(0, Progress.FULL, restored),)))
    book.observe(PARITY, RankView(0, tuple(SlotView(index, Progress.FULL, restored) for index in (0, 1))))
    assert not [one for one in book.apply(Abort(40, "a rank has none")) if isinstance(one, Empty)]


def test_a_rank_that_is_not_of_this_generation_is_not_published() -> None:
    book = Ledger(NOW, frozenset([0]))
    book.observe(0, view(1))
    book.observe(9, view(1, (FULL, 1)))
    assert set(book.state().passed) == {0}


def test_an_unnamed_slot_belongs_to_its_trainer() -> None:
    book = Ledger(NOW, frozenset([0]), committed=5)
    assert book.observe(0, RankView(6, (SlotView(0, FILLING, None),))) == []


# --- the coordinator --------------------------------------------------------------------------------


def alone(every: int = 1, committed: int | None = None, lead: int = 1) -> Coordinator:
    return Coordinator(frozenset(["a"]), every=every, committed=committed, lead=lead)


def test_of_two_steps_that_are_whole_the_newer_is_committed() -> None:
    protected = Progress.PROTECTED
    assert [one.step for one in alone().observe("a", state(6, {5: protected, 6: protected}))] == [6]


def test_a_coordinator_that_forgot_aborts_nothing_below_a_commit() -> None:
    """Rank 0 has freed step 5 already, rank 1 has not: seen alone, step 5 looks like one that somebody missed."""
    chair = Coordinator(frozenset(["a"]))
    known = NodeState(True, {0: 6, 1: 6}, {0: {6: COMMITTED}, 1: {5: COMMITTED, 6: COMMITTED}})
    assert [type(one) for one in chair.observe("a", known)] == [Commit]


def test_a_coordinator_that_forgot_does_not_abort_what_bears_the_mark_of_a_commit() -> None:
    chair = Coordinator(frozenset(["a"]))
    known = NodeState(True, {0: 6, 1: 6}, {0: {5: COMMITTED, 6: COMMITTED}, 1: {5: COMMITTED, 6: DAMAGED}})
    assert chair.observe("a", known) == []


def test_every_abort_is_decided_whatever_was_decided_before_it() -> None:
    chair = alone()
    chair.observe("a", NodeState(True, {0: 6, 1: 6}, {0: {5: FULL, 6: FULL}, 1: {5: FILLING}}))
    late = chair.observe("a", NodeState(True, {0: 6, 1: 6}, {0: {5: FULL}, 1: {}}))
    assert [(type(one), one.step) for one in late] == [(Abort, 5)]


def test_a_stranger_is_not_heard() -> None:
    chair = alone()
    assert chair.observe("b", state(5, {5: COMMITTED})) == []
    assert [one.step for one in chair.observe("a", state(5, {5: Progress.PROTECTED}))] == [5]


def test_nothing_is_named_before_everyone_is_here() -> None:
    chair = Coordinator(frozenset(["a", "b"]))
    chair.observe("a", state(0, {}))
    assert chair.name_next() is None
    chair.observe("b", state(0, {}, complete=False))
    assert chair.name_next() is None
    chair.observe("b", state(3, {}))
    assert chair.name_next() == 4


def test_a_name_stands_while_somebody_works_on_it() -> None:
    chair = alone()
    chair.observe("a", state(0, {}))
    assert chair.name_next() == 1
    chair.observe("a", state(7, {7: FILLING}))
    assert chair.name_next() is None


def test_a_name_that_everyone_passed_with_nothing_in_hand_is_given_up() -> None:
    chair = alone()
    chair.observe("a", state(0, {}))
    assert chair.name_next() == 1
    chair.observe("a", state(1, {}))
    assert chair.name_next() is None, "it may still be taken at the next eligible step"
    chair.observe("a", state(2, {}))
    assert chair.name_next() == 3


def test_every_counts_from_a_commit_that_an_earlier_daemon_made() -> None:
    chair = alone(every=10, committed=40)
    chair.observe("a", state(41, {40: COMMITTED}))
    assert chair.name_next() == 50


def test_the_lead_doubles_once_for_a_name_up_to_its_bound() -> None:
    chair = alone()
    step = 0
    for _ in range(10):
        chair.observe("a", state(step, {}))
        step = chair.name_next() or 0
        late = NodeState(True, {0: step + 1, 1: step + 1}, {0: {step: FULL}, 1: {step + 1: FULL}})
        assert [type(one) for one in chair.observe("a", late)] == [Abort, Abort]
        step += 1
    assert chair.lead == LEAD_STEPS_MAX


def test_the_lead_shrinks_when_ranks_agree_for_long() -> None:
    chair = alone(lead=8)
    for step in range(1, CALM_COMMITS + 1):
        chair.observe("a", state(step, {step: Progress.PROTECTED}))
    assert chair.lead == 7


def test_damage_that_nobody_can_name_does_not_keep_the_next_step_from_being_named() -> None:
    chair = alone()
    chair.observe("a", state(1, {10**15: DAMAGED}))
    assert chair.name_next() == 2
