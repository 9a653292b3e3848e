"""Histories of whole clusters, each from one seed: no fault of the world's makes the daemons lose what was committed.

A failure prints the command that plays it again and the end of its shortened trace.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim import planted
from tests.sim.history import play, report
from tests.unit import test_ledger_machine_bites as bites
from tests.unit.test_ledger_machine_bites import Plant

ROOT = Path(__file__).parent.parent.parent
SEEDS, AT_ONCE, SIZE = 500, 50, 0.3
WAITING_SEEDS = 120
PLANTED_SIZE, TRIES_MAX = 0.6, 150


@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_every_invariant_holds_after_every_event_of_every_history(first: int) -> None:
    for seed in range(first, first + AT_ONCE):
        history = play(seed, SIZE)
        assert not history.broken, report(history)


@pytest.mark.parametrize("first", range(0, WAITING_SEEDS, AT_ONCE // 2))
def test_every_invariant_holds_while_a_job_waits_and_its_survivors_protect_it_anew(first: int) -> None:
    anew = 0
    for seed in range(first, min(first + AT_ONCE // 2, WAITING_SEEDS)):
        history = play(seed, SIZE, waits=True)
        assert not history.broken, report(history)
        anew += history.counts["protected anew"]
    assert anew, "nothing of what this is about happened"


@pytest.mark.parametrize(
    ("seed", "only"),
    [
        (20, [0, 3]),  # parity of an old grouping was freed while other nodes had no new one
        (57, None),  # the last commit was freed on a rank that had a newer stray beside it
        (200, None),  # the inventory of a launch that was over fenced the one after it
        (308, [0, 3]),  # a parity set whose description had rotted went on counting
        (371, [3, 4]),  # a node that held the only copy was forgotten by a launch that failed
        (241, None),  # a job that moved to one node was refused the arena that it needed
        (376, [2, 3, 4, 6, 8]),  # of two sets of one snapshot the one that was whole everywhere gave way
    ],
)
def test_what_the_simulation_found_stays_mended(seed: int, only: list[int] | None) -> None:
    history = play(seed, 1.0, only)
    assert not history.broken, report(history)
    if seed == 371:
        assert not history.counts["lost"], "every shard lies on a machine that runs"


def test_a_slot_in_an_arena_that_is_too_small_does_not_keep_newer_parity_out() -> None:
    """The one that fits had two groupings' sets of the restored snapshot, and neither gave way (seed 1221)."""
    history = play(1221, 1.0, [0, 1, 4, 5, 6, 7, 9, 10, 11, 14, 16, 17, 19], waits=True)
    assert not history.broken, report(history)


def test_a_seed_is_the_same_history_byte_for_byte_in_any_process() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "11"], cwd=ROOT, capture_output=True, check=True,
            env=os.environ | {"PYTHONHASHSEED": salt}, timeout=480,
        ).stdout
        for salt in ("1", "2")
    ]  # fmt: skip
    assert len(told[0]) > 10_000
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("plant", "seed"),
    [
        (planted.adopts_parity_that_is_half_made, 3),
        (planted.chooses_the_older, 8),
        (planted.empties_what_its_trainer_fills, 11),
        (planted.frees_parity_of_the_old_grouping_at_once, 97),
        (planted.frees_the_committed_for_what_was_never_whole, 44),
        (planted.marks_one_rank_only, 0),
        (planted.takes_the_wrong_position, 0),
        (bites.aborts_older_steps_when_it_forgot, 43),
        (bites.announces_before_it_marks, 0),
        (bites.commits_without_one_vote, 0),
        (bites.counts_a_slot_that_is_being_filled, 7),
        (bites.counts_nodes_whose_ranks_are_not_all_here, 11),
        (bites.counts_the_commit_of_the_generation_before, 16),
        (bites.frees_before_it_marks, 0),
        (bites.frees_the_older_before_the_newer_is_committed, 0),
        (bites.frees_the_older_when_a_newer_is_aborted, 4),
        (bites.frees_whatever_was_aborted_under_the_same_step, 84),
        (bites.goes_on_behind_the_fence, 0),
        (bites.votes_before_its_parity_is_whole, 0),
    ],
)
def test_the_simulation_finds_a_daemon_that(plant: Plant, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed that found it first, then others: a bound, not a place."""
    plant(monkeypatch)
    assert any(play(one, PLANTED_SIZE).broken for one in itertools.chain([seed], range(TRIES_MAX)))


@pytest.mark.parametrize(
    ("plant", "seed"),
    [(planted.counts_parity_that_is_damaged, 308), (planted.fences_for_whoever_is_gone, 200)],
)
def test_a_long_history_finds_a_daemon_that(plant: Plant, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert any(play(one, 1.0).broken for one in itertools.chain([seed], range(TRIES_MAX)))


@pytest.mark.parametrize(
    ("plant", "seed"),
    [
        (planted.adopts_a_foster_that_is_half_made, 30),
        (planted.frees_what_it_made_when_a_recovery_begins, 14),
        (planted.plans_by_whoever_looks, 14),
        (planted.gives_old_parity_up_for_the_new, 14),
        (planted.publishes_fosters, 14),
    ],
)
def test_a_history_of_a_job_that_waits_finds_a_daemon_that(
    plant: Plant, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert any(play(one, SIZE, waits=True).broken for one in itertools.chain([seed], range(TRIES_MAX)))


def test_a_failure_comes_with_a_command_and_fewer_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    bites.frees_the_older_when_a_newer_is_aborted(monkeypatch)
    broken = next(one for seed in range(TRIES_MAX) if (one := play(seed, PLANTED_SIZE)).broken)
    told = report(broken)
    assert f"replay: .venv/bin/python -m tests.sim --seed {broken.seed} --size 0.6 --only" in told
    assert "without its inner moves" in told
