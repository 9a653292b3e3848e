"""Killed at every named point: whatever was committed is there afterwards, and the run goes on exactly.

Every point in turn, not the ones that somebody thought of. The undisturbed run is the oracle of each loss.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from snapshotd import _native, faults
from tests.cluster.harness import Spec, Stage, Trainer, stage, until

RECIPE, STEPS = "one_cycle", 12
HERE = [point for point in faults.TRAINER_POINTS if not point.startswith(faults.ON_SEVERAL_NODES)]
ELSEWHERE = ("fence", "inherit", "free", *faults.ON_SEVERAL_NODES)
TRAINER_POINTS = [*HERE, *_native.crash_points()]


@functools.cache
def undisturbed() -> tuple[dict[int, str], str]:
    """Losses and final state of the run that nobody disturbed."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Spec(RECIPE, "", f"{folder}/journal", guard=False, steps=STEPS))
        assert trainer.join() == 0
        return trainer.losses(), trainer.events("end")[0]["digest"]


def newest_commit(*trainers: Trainer) -> int:
    """The newest step that any of these saw committed."""
    return max((event["step"] or 0 for one in trainers for event in one.events("committed")), default=0)


def finishes_exactly(scene: Stage, at_least: int) -> None:
    """A fresh trainer restores at or after `at_least` and ends as the undisturbed run does."""
    losses, digest = undisturbed()
    last = scene.run(RECIPE, steps=STEPS)
    assert last.process.exitcode == 0, last.events("error")
    first = last.events("restored")[0]["step"]
    assert first >= at_least
    assert last.losses() == {step: losses[step] for step in range(first, STEPS)}
    assert last.events("end")[0]["digest"] == digest


@pytest.mark.parametrize("point", TRAINER_POINTS)
def test_a_trainer_killed_at_any_point_loses_nothing_committed(point: str, shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        before = scene.run(RECIPE, steps=STEPS, die="after_commit", die_step=4)
        killed = scene.run(RECIPE, steps=STEPS, crash=point)
        assert killed.process.exitcode == -9, f"the trainer never passed {point}: {killed.events()[-2:]}"
        over = point == "close.released"  # the run had ended and wanted nothing back
        finishes_exactly(scene, 0 if over else newest_commit(before, killed))


@pytest.mark.parametrize(
    "point", ["copy.block:2", "copy.done:3", "publish.before:2", "publish.after:4", "claim.named:3"]
)
def test_a_trainer_killed_in_a_later_copy_loses_nothing_committed(point: str, shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        killed = scene.run(RECIPE, steps=STEPS, crash=point)
        assert killed.process.exitcode == -9
        finishes_exactly(scene, newest_commit(killed))


@pytest.mark.parametrize("trainer_too", [False, True], ids=["trainer lives", "trainer dies too"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("point", [point for point in faults.DAEMON_POINTS if not point.startswith(ELSEWHERE)])
def test_a_daemon_killed_at_any_point_of_saving_loses_nothing_committed(
    point: str, count: int, trainer_too: bool, shm_dir: Path, tmp_path: Path
) -> None:
    losses, digest = undisturbed()
    gate = tmp_path / "gate"
    with stage(shm_dir, tmp_path, environment={"SNAPSHOTD_CRASH": f"{point}:{count}"}) as scene:
        trainer = scene.start(RECIPE, steps=STEPS, flush_s=0.5, gates={6: str(gate)})
        until(lambda: trainer.events("at gate"), "the trainer at its gate")
        died = scene.daemon.process is not None and scene.daemon.process.poll() is not None
        if not died:
            assert count > 1, f"the daemon never passed {point}"
            scene.daemon.kill()
        if trainer_too:
            trainer.kill()
        scene.daemon.start()
        gate.touch()
        if not trainer_too:
            assert trainer.join() == 0, trainer.events("error")
            assert trainer.losses() == losses
            assert trainer.events("end")[0]["digest"] == digest
            return
        finishes_exactly(scene, newest_commit(trainer))


@pytest.mark.parametrize("point", ["fence.before", "fence.after", "inherit.before", "inherit.after"])
def test_a_daemon_killed_at_any_point_of_a_restore_loses_nothing(point: str, shm_dir: Path, tmp_path: Path) -> None:
    losses, digest = undisturbed()
    with stage(shm_dir, tmp_path) as scene:
        before = scene.run(RECIPE, steps=STEPS, die="after_commit", die_step=5)
        scene.daemon.kill()
        scene.daemon.start({"SNAPSHOTD_CRASH": point})
        process = scene.daemon.process
        assert process is not None
        trainer = scene.start(RECIPE, steps=STEPS)
        until(lambda: process.poll() is not None, f"the daemon's death at {point}")
        scene.daemon.start()
        assert trainer.join() == 0, trainer.events("error")
        first = trainer.events("restored")[0]["step"]
        assert first >= newest_commit(before) > 0
        assert trainer.losses() == {step: losses[step] for step in range(first, STEPS)}
        assert trainer.events("end")[0]["digest"] == digest


@pytest.mark.parametrize("point", ["free.before", "free.after"])
def test_a_daemon_killed_while_it_frees_a_run_that_is_over_leaks_nothing(
    point: str, shm_dir: Path, tmp_path: Path
) -> None:
    with stage(shm_dir, tmp_path, environment={"SNAPSHOTD_CRASH": point}) as scene:
        process = scene.daemon.process
        assert process is not None
        trainer = scene.run(RECIPE, steps=STEPS)
        assert trainer.process.exitcode == 0, trainer.events("error")
        until(lambda: process.poll() is not None, f"the daemon's death at {point}")
        scene.daemon.start()
        until(lambda: not list(shm_dir.glob("*.arena*")), "the arenas' removal by the next daemon")
