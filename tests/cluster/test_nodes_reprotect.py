"""A node is gone and the job waits: the survivors protect its snapshot anew among themselves, so that the next loss can
be borne too. Whoever dies, returns or has no memory in the middle of it, nothing that stood before is lost.

Nothing here depends on when something happens: every wait is for a state, and whatever instant a scene strikes is
allowed.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from snapshotd import wire
from snapshotd.door_client import DoorClient
from snapshotd.errors import SnapshotLost
from tests.cluster.harness import until
from tests.cluster.nodes import Cast, Nodes, ends_exactly, nodes, side_by_side

SOON = ("--reprotect-after", "0.5")
PATIENCE_S = 90.0
POINTS = ("reserve.created", "reserve.formatted", "accumulate.window", "reprotect.made", "reprotect.published")


def protection(scene: Nodes, number: int, job: str = "test") -> dict[str, Any]:
    """What a node's status says of a job that waits; nothing where it does not."""
    found: dict[str, Any] | None = scene.daemons[number].status()["jobs"].get(job, {}).get("protection")
    return found or {"state": "", "why": "", "losses_left": 0}


def becomes(scene: Nodes, state: str, *numbers: int) -> None:
    """Wait until these nodes say so."""
    for number in numbers:
        until(lambda number=number: protection(scene, number)["state"] == state,  # type: ignore[misc]
              f"node {number} being {state}", PATIENCE_S)  # fmt: skip


def protected_by(scene: Nodes, *members: int, losses: int = 1) -> None:
    """Wait until each of these nodes says that they, or some of them (who did not see the rest for a while), protect
    the job's snapshot from so many losses, and that nobody else is counted on any more."""

    def says_so(number: int) -> bool:
        found = protection(scene, number)
        counted_on = re.match(r"all (\d+) nodes of its group", found["why"])
        by_these = counted_on is not None and int(counted_on[1]) <= len(members)
        return found["state"] == "protected" and by_these and found["losses_left"] == losses

    for number in members:
        until(partial(says_so, number), f"node {number} protecting it with {len(members) - 1} others", PATIENCE_S)


def fosters(scene: Nodes, *numbers: int) -> list[Path]:
    """Arenas that survivors made while the job waits."""
    return [one for number in numbers for one in scene.daemons[number].arenas() if ".foster" in one.name]


def goes_on(scene: Nodes, cast: Cast, step: int) -> None:
    """The job comes back with the bytes of that step, which all protect anew; then nothing of what was made is left."""
    assert cast.begin() == step
    cast.commits(step)
    cast.save(step + 1)
    everyone = range(len(scene.daemons))
    until(lambda: not fosters(scene, *everyone), "every foster being freed", PATIENCE_S)
    assert all(scene.counter(number, "errors") == 0 for number in everyone), scene.logs()


def waits(scene: Nodes, *, parity: int = 1) -> Cast:
    """A job that has committed step 1 and then died."""
    cast = Cast(scene, range(len(scene.daemons)), parity=parity)
    cast.begin()
    cast.save(1)
    cast.kill()
    return cast


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authenticate", [False, True], ids=["in the clear", "encrypted"])
def test_after_one_loss_and_the_grace_time_a_second_one_is_borne(
    authenticate: bool, shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 4, *SOON, authenticate=authenticate) as scene:
        cast = waits(scene)
        scene.lose(1)
        protected_by(scene, 0, 2, 3)
        scene.lose(2)
        scene.replace(1, 2)
        goes_on(scene, cast, 1)


def test_without_it_the_second_loss_is_one_too_many(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 4, "--reprotect-after", "0") as scene:
        cast = waits(scene)
        scene.lose(1)
        assert not protection(scene, 0)["state"], "switched off, nobody cares"
        scene.lose(2)
        scene.replace(1, 2)
        with pytest.raises(SnapshotLost):
            cast.begin()


def test_one_node_after_the_other_may_go_as_long_as_the_survivors_have_time(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 4, *SOON) as scene:
        cast = waits(scene)
        scene.lose(3)
        protected_by(scene, 0, 1, 2)
        scene.lose(0)
        protected_by(scene, 1, 2)
        scene.lose(2)
        scene.replace(0, 2, 3)
        goes_on(scene, cast, 1)


def test_two_of_five_at_once_are_made_good_where_parity_bears_both(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 5, *SOON) as scene:
        cast = waits(scene, parity=2)
        scene.lose(1, 4)
        protected_by(scene, 0, 2, 3, losses=2)
        scene.lose(0, 3)
        scene.replace(0, 1, 3, 4)
        goes_on(scene, cast, 1)


def test_a_job_of_real_trainers_goes_on_bit_for_bit_after_two_losses_one_after_the_other(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 4, *SOON) as scene:
        committed = scene.dies("fsdp", [0, 1, 2, 3], parity=1)
        scene.all_commit(committed)
        scene.lose(1)
        protected_by(scene, 0, 2, 3)
        scene.lose(3)
        scene.replace(1, 3)
        assert ends_exactly(scene.train("fsdp", [0, 1, 2, 3], parity=1), committed) == committed


def test_survivors_whose_daemons_were_restarted_know_each_other_and_go_on(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 4, *SOON) as scene:
        cast = waits(scene)
        scene.lose(2)
        for number in (0, 1, 3):
            scene.restart(number)
        protected_by(scene, 0, 1, 3)
        for number in (0, 1, 3):
            scene.restart(number)
        protected_by(scene, 0, 1, 3)
        scene.lose(0)
        scene.replace(0, 2)
        goes_on(scene, cast, 1)


# --- what comes in between --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [0, 2])
def test_trainers_that_return_in_the_middle_find_what_they_would_have_found(
    made: int, shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 4, *SOON, "--peer-bandwidth", "60KB/s") as scene:
        cast = waits(scene)
        scene.lose(1)
        becomes(scene, "re-protecting", 0)
        until(lambda: len(fosters(scene, 0, 2, 3)) >= made, f"{made} fosters, whole or not", PATIENCE_S)
        scene.replace(1)
        goes_on(scene, cast, 1)


def test_a_node_that_returns_with_its_memory_is_used_and_not_what_was_made_in_its_place(
    shm_dir: Path, tmp_path: Path
) -> None:
    def play(shm: Path, folder: Path, late: bool) -> None:
        with nodes(shm, folder, 4, *SOON) as scene:
            cast = waits(scene)
            scene.daemons[1].kill()
            if late:
                protected_by(scene, 0, 2, 3)
            else:
                becomes(scene, "re-protecting", 0)
            scene.restart(1)
            protected_by(scene, 0, 1, 2, 3)
            assert cast.begin() == 1
            assert not cast.choice.missing, cast.choice.why
            goes_on(scene, cast, 1)

    side_by_side(play, [False, True], shm_dir, tmp_path)


def test_a_survivor_killed_at_any_point_of_it_costs_nothing_and_its_next_daemon_goes_on(
    shm_dir: Path, tmp_path: Path
) -> None:
    def play(shm: Path, folder: Path, case: tuple[int, str]) -> None:
        victim, point = case
        with nodes(shm, folder, 4, *SOON) as scene:
            cast = waits(scene)
            scene.restart(victim, crash=point)
            scene.lose(1)
            until(lambda: scene.has_died(victim), f"node {victim} passing {point}", PATIENCE_S)
            scene.restart(victim)
            protected_by(scene, 0, 2, 3)
            scene.lose(3)
            scene.replace(1, 3)
            goes_on(scene, cast, 1)

    side_by_side(play, [(victim, point) for victim in (0, 2) for point in POINTS], shm_dir, tmp_path)


def test_a_survivor_killed_in_the_middle_and_then_lost_leaves_what_was_there_before(
    shm_dir: Path, tmp_path: Path
) -> None:
    def play(shm: Path, folder: Path, point: str) -> None:
        with nodes(shm, folder, 4, *SOON) as scene:
            cast = waits(scene, parity=2)
            scene.restart(2, crash=point)
            scene.lose(1)
            until(lambda: scene.has_died(2), f"node 2 passing {point}", PATIENCE_S)
            scene.lose(2)
            scene.replace(1, 2)
            goes_on(scene, cast, 1)

    side_by_side(play, ["reprotect.made", "reprotect.published"], shm_dir, tmp_path)


def test_where_there_is_no_memory_for_it_status_says_so_and_nothing_is_lost(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 3, *SOON) as scene:
        cast = waits(scene)
        for number, daemon in enumerate(scene.daemons):
            full = daemon.status()["memory"]["arenas_bytes"] + 4096
            daemon.flags = (*daemon.flags, "--memory-limit", str(full))
            scene.restart(number)
        scene.lose(1)

        def says_why(number: int) -> bool:
            """One has no memory for the lost shard, and the other waits for it."""
            why = protection(scene, number)["why"]
            return "no memory for it" in why or "still to decode" in why

        for number in (0, 2):
            until(partial(says_why, number), "a word about memory", PATIENCE_S)
        assert any("no memory for it" in protection(scene, number)["why"] for number in (0, 2))
        assert not fosters(scene, 0, 2)
        scene.replace(1)
        goes_on(scene, cast, 1)


def test_what_was_made_goes_when_a_person_dismisses_the_job(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 3, *SOON) as scene:
        cast = waits(scene)
        scene.lose(1)
        protected_by(scene, 0, 2)
        assert fosters(scene, 0, 2)
        for number in (0, 2):
            with DoorClient.connect(scene.daemons[number].socket) as door:
                door.ask(wire.Hello("tool", os.getpid()))
                door.ask(wire.Collect(cast.job))
        assert not scene.daemons[0].arenas() + scene.daemons[2].arenas()
