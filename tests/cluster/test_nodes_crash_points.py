"""Killed at every named point of saving, restoring and rebuilding over several nodes: what was committed comes back.

The daemons' points are tried with puppets, and after each death another node is lost as well: with a parity of one that
is what must still be survived. The trainers' points are tried with torch, one after the other in one job.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from snapshotd import faults
from snapshotd.errors import SnapshotError, SnapshotLost
from tests.cluster.harness import until
from tests.cluster.nodes import Cast, Nodes, ends_exactly, nodes, side_by_side
from tests.cluster.test_nodes_reprotect import POINTS as REPROTECTING


def on(node: int, *points: str) -> list[tuple[str, int]]:
    """These points in the daemon of one node."""
    return [(point, node) for point in points]


COORDINATOR, FOLLOWER = 0, 1
NEWCOMER, SURVIVOR = 1, 2
COMMITTING = ("commit.decided", "commit.marked", "commit.applied")
TELLING = ("state.before", "state.after")
SAVING = {
    "the coordinator decides": on(COORDINATOR, "named.before", "decree.before", "decree.after", *COMMITTING, *TELLING),
    "a follower obeys": on(FOLLOWER, "obey.before", "obey.after", *COMMITTING, *TELLING),
    "parity is made": on(
        FOLLOWER, "read.pinned", "read.sent", "accumulate.begun", "accumulate.window", "accumulate.done",
        "parity.published", "parity.counted",
    ),
}  # fmt: skip
ROOM = ("reserve.created", "reserve.formatted", "grant.sent")
RESTORING = {
    "on a survivor": on(
        SURVIVOR, "fence.before", "fence.after", "inherit.before", "inherit.after", "read.pinned", "read.sent"
    ),
    "on the newcomer": on(NEWCOMER, *(point for point in faults.DAEMON_POINTS if point.startswith("rebuild")), *ROOM),
}
FREEING = ("free.before", "free.after")
IN_TEST_NODES_SPREAD = ("assist.window",)


def test_every_point_of_a_daemon_is_tried_in_here_or_where_it_is_said() -> None:
    tried = {point for family in (*SAVING.values(), *RESTORING.values()) for point, _ in family}
    tried |= {*ROOM, *FREEING, *IN_TEST_NODES_SPREAD, *REPROTECTING}
    assert tried == set(faults.DAEMON_POINTS)


def dies(scene: Nodes, number: int, point: str) -> None:
    """Wait until a daemon has died at its point."""
    until(lambda: scene.has_died(number), f"node {number} passing {point}")


def comes_back(scene: Nodes, cast: Cast, at_least: int, *lost: int) -> None:
    """These nodes are lost as well: the job goes on from what was committed, byte for byte, and commits again."""
    if lost:
        scene.lose(*lost)
        scene.replace(*lost)
    step = cast.begin()
    assert step >= at_least, f"it went on from step {step} and step {at_least} was committed"
    cast.save(step + 1)
    assert all(scene.counter(number, "errors") == 0 for number in range(len(scene.daemons))), scene.logs()


@pytest.mark.parametrize("family", SAVING.values(), ids=SAVING)
def test_a_daemon_killed_at_any_point_of_saving_and_another_node_lost_cost_nothing_committed(
    family: list[tuple[str, int]], shm_dir: Path, tmp_path: Path
) -> None:
    def play(shm: Path, folder: Path, case: tuple[str, int]) -> None:
        point, victim = case
        with nodes(shm, folder, 3) as scene:
            cast = Cast(scene, [0, 1, 2])
            cast.begin()
            cast.save(1)
            dies_while_saving(scene, cast, victim, point)
            committed = max(puppet.words()["committed_step"] for puppet in cast.puppets)
            cast.kill()
            scene.restart(victim)
            comes_back(scene, cast, committed, (victim + 1) % 3)

    side_by_side(play, family, shm_dir, tmp_path)


def dies_while_saving(scene: Nodes, cast: Cast, victim: int, point: str) -> None:
    """The next daemon of a node dies at a point, over the second snapshot or before it gets there."""
    scene.restart(victim, crash=point)
    with contextlib.suppress(SnapshotError):
        cast.attach(victim)
    cast.publish(2)
    dies(scene, victim, point)


@pytest.mark.parametrize("victim", [COORDINATOR, FOLLOWER], ids=["coordinator", "follower"])
def test_a_daemon_killed_in_a_commit_whose_trainers_live_on_takes_it_up_again(
    victim: int, shm_dir: Path, tmp_path: Path
) -> None:
    def play(shm: Path, folder: Path, point: str) -> None:
        with nodes(shm, folder, 3) as scene:
            cast = Cast(scene, [0, 1, 2])
            cast.begin()
            cast.save(1)
            dies_while_saving(scene, cast, victim, point)
            scene.restart(victim)
            cast.attach(victim)
            cast.commits(2)
            cast.save(3)

    points = ["commit.decided", "commit.marked", "commit.applied", "parity.published"]
    side_by_side(play, points, shm_dir, tmp_path)


def test_a_daemon_killed_while_it_makes_room_for_a_rank_or_for_parity_leaves_nothing_in_the_way(
    shm_dir: Path, tmp_path: Path
) -> None:
    def play(shm: Path, folder: Path, point: str) -> None:
        with nodes(shm, folder, 2, crash={FOLLOWER: point}) as scene:
            cast = Cast(scene, [0, 1])
            with contextlib.suppress(SnapshotError):
                cast.begin()
                cast.publish(1)
            dies(scene, FOLLOWER, point)
            cast.kill()
            scene.restart(FOLLOWER)
            cast.begin()
            cast.save(2)
            assert len(scene.arenas()) == 4, "a rank's arena and one for parity on each node, and nothing else"

    side_by_side(play, [*ROOM, "reserve.created:2", "reserve.formatted:2"], shm_dir, tmp_path)


def test_a_parity_set_that_is_there_twice_does_not_keep_newer_ones_out(shm_dir: Path, tmp_path: Path) -> None:
    """A generation that is fenced while it makes one may publish it after the next has made the same: this took every
    slot for good, and nothing was committed any more."""
    with nodes(shm_dir, tmp_path, 2) as scene:
        cast = Cast(scene, [0, 1])
        cast.begin()
        cast.save(1)
        scene.arena(COORDINATOR, parity=True).repeat(0)
        cast.save(2)
        cast.save(3)
        cast.kill()
        comes_back(scene, cast, 3, FOLLOWER)


@pytest.mark.parametrize("family", RESTORING.values(), ids=RESTORING)
def test_a_daemon_killed_at_any_point_of_a_restore_loses_nothing(
    family: list[tuple[str, int]], shm_dir: Path, tmp_path: Path
) -> None:
    def play(shm: Path, folder: Path, case: tuple[str, int]) -> None:
        point, victim = case
        with nodes(shm, folder, 3) as scene:
            cast = Cast(scene, [0, 1, 2])
            cast.begin()
            cast.save(1)
            cast.save(2)
            cast.kill()
            scene.lose(NEWCOMER)
            scene.replace(NEWCOMER, crash=point if victim == NEWCOMER else "")
            if victim != NEWCOMER:
                scene.restart(victim, crash=point)
            with contextlib.suppress(SnapshotError):
                cast.begin()
            dies(scene, victim, point)
            cast.kill()
            scene.restart(victim)
            comes_back(scene, cast, 2)

    side_by_side(play, family, shm_dir, tmp_path)


def test_a_daemon_killed_while_it_frees_a_run_that_is_over_leaks_nothing(shm_dir: Path, tmp_path: Path) -> None:
    def play(shm: Path, folder: Path, case: tuple[str, int]) -> None:
        point, victim = case
        with nodes(shm, folder, 2, crash={victim: point}) as scene:
            cast = Cast(scene, [0, 1])
            cast.begin()
            cast.save(1)
            cast.close_runs(0, 1)
            cast.kill()
            dies(scene, victim, point)
            scene.restart(victim)
            until(lambda: not scene.arenas(), "the removal of every arena")

    cases = [(point, victim) for point in FREEING for victim in (COORDINATOR, FOLLOWER)]
    side_by_side(play, cases, shm_dir, tmp_path)


# --- more than one loss -----------------------------------------------------------------------------------------------


def test_a_second_loss_while_the_first_is_rebuilt_is_survived_within_the_parity(shm_dir: Path, tmp_path: Path) -> None:
    def play(shm: Path, folder: Path, point: str) -> None:
        with nodes(shm, folder, 4) as scene:
            cast = Cast(scene, [0, 1, 2, 3], parity=2)
            cast.begin()
            cast.save(1)
            cast.kill()
            scene.lose(1)
            scene.replace(1, crash=point)
            with contextlib.suppress(SnapshotError):
                cast.begin()
            dies(scene, 1, point)
            cast.kill()
            comes_back(scene, cast, 1, 1, 0)

    side_by_side(play, ["rebuild.begun", "rebuild.window", "rebuild.published"], shm_dir, tmp_path)


def test_a_second_loss_while_the_first_is_rebuilt_is_said_to_be_lost_beyond_the_parity(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        cast.kill()
        scene.lose(1)
        scene.replace(1, crash="rebuild.window")
        with contextlib.suppress(SnapshotError):
            cast.begin()
        dies(scene, 1, "rebuild.window")
        cast.kill()
        scene.lose(1, 2)
        scene.replace(1, 2)
        with pytest.raises(SnapshotLost, match=r"kept . of the 2 pieces"):
            cast.begin()


@pytest.mark.parametrize(
    ("point", "newest"), [("commit.decided:2", 1), ("commit.applied:2", 2)], ids=["before it decided", "before it told"]
)
def test_the_coordinators_node_lost_around_a_decision_costs_nothing_that_was_decided(
    point: str, newest: int, shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        scene.restart(0, crash=point)
        cast.attach(0)
        scene.all_commit(1, 0)  # it derives its last decision anew, which is the first time that it passes the point
        cast.publish(2)
        dies(scene, 0, point)
        assert cast.puppets[0].words()["committed_step"] == newest
        cast.kill()
        comes_back(scene, cast, newest, 0)


# --- trainers ---------------------------------------------------------------------------------------------------------


def loses_one(scene: Nodes, recipe: str, number: int) -> int:
    """A job that died after a commit, and a node of it that is gone; returns what was committed."""
    committed = scene.dies(recipe, range(len(scene.daemons)), parity=1)
    scene.all_commit(committed)
    scene.lose(number)
    scene.replace(number)
    return committed


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(
            ["restore.inventory", "restore.chosen", "restore.assigned", "rebuild.asked"], id="before the rebuild"
        ),
        pytest.param(
            ["claim.granted", "claim.locked", "rebuild.over", "restore.verified", "restore.copying", "restore.copied",
             "claim.mapped", "restore.attached"],
            id="after it was asked for",
        ),
    ],
)  # fmt: skip
def test_a_trainer_killed_at_any_point_of_a_restore_loses_nothing_and_the_next_one_goes_on(
    points: list[str], shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        committed = loses_one(scene, "fsdp", 1)
        for point in points:
            group = scene.train("fsdp", [0, 1, 2], parity=1, by_rank={1: {"crash": point}})
            assert group[1].join() == -9, f"the trainer never passed {point}: {group[1].events()[-2:]}"
            scene.end(group)
        assert ends_exactly(scene.train("fsdp", [0, 1, 2], parity=1), committed) == committed
