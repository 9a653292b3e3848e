"""Every history of a small job, with every invariant after every event; and bugs planted to see that this notices."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from snapshotd import ledger
from tests.scenarios.explore import Broken, Limits, World, check_liveness, explore

SIZES = {
    "three_steps": Limits(steps=3, deaths=False, restarts=0, skips=0),
    "skipped_copies": Limits(steps=2, deaths=False, restarts=0, skips=1),
    "everyone_skips": Limits(steps=1, deaths=False, restarts=0, skips=3),
    "a_daemon_that_restarts_at_any_moment": Limits(steps=2, deaths=False, restarts=1, skips=0),
    "ranks_two_steps_apart": Limits(steps=2, deaths=False, restarts=0, skips=0, skew=2),
    "three_ranks": Limits(ranks=3, steps=1, deaths=False, restarts=0, skips=0),
    "trainers_that_die": Limits(steps=2, restarts=0, skips=0, generations=1),
    "trainers_that_die_and_a_restart": Limits(steps=1, restarts=1, skips=0, generations=1),
    "a_generation_that_inherits": Limits(steps=1, restarts=0, skips=0),
    "a_generation_that_inherits_and_a_restart": Limits(steps=1, restarts=1, skips=0),
    "two_full_slots_inherited": Limits(steps=1, deaths=False, restarts=1, skips=1, inherited=True),
}
# From one state in so many it is also seen that something new is committed once everybody keeps going.
GO_ON_FROM_EVERY = 200


@pytest.mark.parametrize("size", SIZES)
def test_no_history_loses_the_newest_snapshot_or_commits_what_is_not_whole_or_comes_to_a_stop(size: str) -> None:
    limits = SIZES[size]
    seen = explore(limits, keep_every=GO_ON_FROM_EVERY)
    assert seen.states > 1000 and seen.commits and seen.aborts, "the model has become too small to prove anything"
    assert bool(seen.inherited) == (limits.inherited or (limits.deaths and limits.generations > 1))
    assert len(seen.worlds) > 5
    check_liveness(seen.worlds)


# --- planted bugs -----------------------------------------------------------------------------------

# name of the bug: (what stands in ledger.py, what it becomes, the sizes in which to look for it)
MUTANTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "a slot still being filled counts as passed without": (
        "if passed >= step and self.held.get(rank, {}).get(step, Progress.DAMAGED) is Progress.DAMAGED:",
        "if passed >= step and self.held.get(rank, {}).get(step, Progress.DAMAGED) <= Progress.FILLING:",
        ("three_steps",),
    ),
    "one rank is enough to protect a step": (
        "return self.complete and all(\n",
        "return self.complete and any(\n",
        ("three_steps",),
    ),
    "a slot being filled counts as protected": (
        "self.held.get(rank, {}).get(step, Progress.DAMAGED) >= Progress.PROTECTED for",
        "self.held.get(rank, {}).get(step, Progress.DAMAGED) >= Progress.FILLING for",
        ("three_steps",),
    ),
    "ranks that nobody looked at do not count": (
        "complete=len(known) == len(self.ranks),",
        "complete=True,",
        ("three_steps",),
    ),
    "freed before marked": (
        "return self._noted([*self._marks(), Announce(decision), *self._frees()])",
        "return self._noted([*self._frees(), *self._marks(), Announce(decision)])",
        ("three_steps",),
    ),
    "told before marked": (
        "return self._noted([*self._marks(), Announce(decision), *self._frees()])",
        "return self._noted([Announce(decision), *self._marks(), *self._frees()])",
        ("three_steps",),
    ),
    "a slot that was freed is freed again from an old look": (
        "            if isinstance(action, (Advance, Empty)):\n",
        "            if isinstance(action, Advance):\n",
        ("three_steps", "skipped_copies"),
    ),
    "an aborted slot is taken from its trainer": (
        "        if slot.progress is Progress.FILLING:\n            return None\n        step =",
        "        step =",
        ("three_steps", "ranks_two_steps_apart"),
    ),
    "the committed step goes with the older ones": (
        "if step is None or step < self.committed:",
        "if step is None or step <= self.committed:",
        ("three_steps",),
    ),
    "nothing is waited for before older slots go": (
        "            return self._gives_way(rank, slot)\n",
        "            return None if step else 'old'\n",
        ("two_full_slots_inherited",),
    ),
    "a dead trainer's full slot is emptied": (
        "                if slot.progress is Progress.FILLING\n            ]\n        )",
        "                if slot.progress <= Progress.FULL\n            ]\n        )",
        ("trainers_that_die",),
    ),
    "a fenced book still applies decisions": (
        "if self.fenced or (self.committed is not None and decision.step < self.committed):",
        "if self.committed is not None and decision.step < self.committed:",
        ("trainers_that_die",),
    ),
    "a fenced book still frees": (
        "return [] if self.fenced else self._noted([*self._marks(rank), *self._frees(rank)])",
        "return self._noted([*self._marks(rank), *self._frees(rank)])",
        ("trainers_that_die", "a_generation_that_inherits"),
    ),
    "a coordinator that forgot aborts what is older than a commit": (
        "return decision.step > max(newest, marked) and decision.step not in self._decisions",
        "return decision.step not in self._decisions",
        ("a_daemon_that_restarts_at_any_moment",),
    ),
    "an abort is forgotten by the book": (
        "            self._aborted.add(decision.step)\n",
        "            self._aborted.clear()\n",
        ("skipped_copies", "a_daemon_that_restarts_at_any_moment"),
    ),
    "a name that everybody skipped stands for ever": (
        "(self._named is not None and not self._missed(self._named))",
        "self._named is not None",
        ("everyone_skips",),
    ),
    "the restored snapshot is not voted anew": (
        "if slot.snapshot.generation == self.generation or slot.snapshot == self.restored:",
        "if slot.snapshot.generation == self.generation:",
        ("two_full_slots_inherited",),
    ),
}


@pytest.fixture
def mutant(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The ledger module with one line changed."""
    source = Path(ledger.__file__).read_text()
    before, after, _ = MUTANTS[request.param]
    assert source.count(before) == 1, f"{before!r} stands {source.count(before)} times in ledger.py: mend this list"
    module = ModuleType("snapshotd_ledger_mutant")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source.replace(before, after), "mutant", "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("mutant", MUTANTS, indirect=True, ids=lambda name: name.replace(" ", "_"))
def test_a_planted_bug_is_caught(mutant: ModuleType, request: pytest.FixtureRequest) -> None:
    _, _, sizes = MUTANTS[request.node.callspec.params["mutant"]]
    with pytest.raises(Broken):
        for size in sizes:
            check_liveness(explore(SIZES[size], mutant, keep_every=GO_ON_FROM_EVERY // 10).worlds)


class SlotsBeforePassed(World):
    """A daemon that reads a rank's slots first and `passed` afterwards."""

    def _look_at_passed(self, rank: int) -> None:
        self.half_look = rank, self._view(rank, 0).slots

    def _look_at_slots(self) -> None:
        assert self.half_look is not None
        rank, slots = self.half_look
        self.half_look = None
        self._observe(rank, self.core.RankView(self.trainers[rank].passed, slots))


class OldLookAtTheDead(World):
    """A daemon that empties what a dead trainer was filling when it was last looked at, without looking again."""

    def _notice(self, rank: int) -> None:
        self.trainers[rank] = self.trainers[rank]._replace(noticed=True)
        self.queue += self.ledger.died(rank)


@pytest.mark.parametrize(
    ("kind", "size"), [(SlotsBeforePassed, "three_steps"), (OldLookAtTheDead, "trainers_that_die")]
)
def test_a_caller_that_does_not_keep_the_order_is_caught(kind: type[World], size: str) -> None:
    with pytest.raises(Broken):
        explore(SIZES[size], world=kind)
