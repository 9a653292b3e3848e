"""A run that was killed goes on exactly as if it had not been: for everything that a training loop keeps.

Three runs of each recipe: without a guard, with a guard that is killed in the middle, and its resumption.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.harness import Stage, stage
from tests.recipes import RECIPES

STEPS, DEATH = 14, 9


def resumed_exactly(scene: Stage, recipe: str, **changes: object) -> None:
    """Kill at step DEATH, resume, and compare every loss and the final state with the undisturbed run."""
    undisturbed = scene.run(recipe, guard=False, steps=STEPS)
    killed = scene.run(recipe, steps=STEPS, die="after_commit", die_step=DEATH, **changes)
    assert killed.process.exitcode == -9, killed.events("error")
    committed = killed.events("dying")[0]["committed"]
    resumed = scene.run(recipe, steps=STEPS, **changes)
    assert resumed.process.exitcode == 0, resumed.events("error")
    first = resumed.events("restored")[0]["step"]
    assert 0 < committed <= first <= DEATH
    expected = undisturbed.losses()
    assert killed.losses() == {step: expected[step] for step in range(DEATH)}, "the guard changed what was computed"
    assert resumed.losses() == {step: expected[step] for step in range(first, STEPS)}
    assert resumed.events("end")[0]["digest"] == undisturbed.events("end")[0]["digest"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_resumes_bit_for_bit(recipe: str, shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        resumed_exactly(scene, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_protected_run_computes_what_an_unprotected_one_does(recipe: str, shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        plain = scene.run(recipe, guard=False, steps=STEPS)
        guarded = scene.run(recipe, steps=STEPS, flush=False)
        assert guarded.process.exitcode == 0, guarded.events("error")
        assert guarded.losses() == plain.losses()
        assert guarded.events("end")[0]["digest"] == plain.events("end")[0]["digest"]
        assert guarded.events("end")[0]["status"]["failures"] == 0


@pytest.mark.parametrize("recipe", ["ddp", "fsdp"])
def test_a_killed_group_resumes_bit_for_bit(recipe: str, shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        undisturbed = scene.start_group(recipe, 2, guard=False, steps=STEPS)
        assert [one.join() for one in undisturbed] == [0, 0], undisturbed[0].events("error")
        killed = scene.start_group(recipe, 2, steps=STEPS, die="after_commit", die_step=DEATH)
        assert [one.join() for one in killed] == [-9, -9], [one.events("error") for one in killed]
        resumed = scene.start_group(recipe, 2, steps=STEPS)
        assert [one.join() for one in resumed] == [0, 0], [one.events("error") for one in resumed]
        for plain, dead, alive in zip(undisturbed, killed, resumed, strict=True):
            first = alive.events("restored")[0]["step"]
            assert 0 < dead.events("dying")[0]["committed"] <= first <= DEATH
            expected = plain.losses()
            assert dead.losses() == {step: expected[step] for step in range(DEATH)}
            assert alive.losses() == {step: expected[step] for step in range(first, STEPS)}
            assert alive.events("end")[0]["digest"] == plain.events("end")[0]["digest"]


@pytest.mark.parametrize("recipe", ["adamw", "one_cycle", "batchnorm_and_buffers", "sgd_momentum", "grad_scaler_fused"])
def test_a_loop_without_a_step_line_resumes_exactly_where_hooks_can_serve_it(
    recipe: str, shm_dir: Path, tmp_path: Path
) -> None:
    steps, death = 24, 17
    with stage(shm_dir, tmp_path) as scene:
        undisturbed = scene.run(recipe, guard=False, steps=steps)
        killed = scene.run(recipe, steps=steps, hooks_only=True, die="after_commit", die_step=death)
        assert killed.process.exitcode == -9, killed.events("error")
        resumed = scene.run(recipe, steps=steps, hooks_only=True)
        assert resumed.process.exitcode == 0, resumed.events("error")
        first = resumed.events("restored")[0]["step"]
        assert 0 < killed.events("dying")[0]["committed"] <= first < death
        expected = undisturbed.losses()
        assert resumed.losses() == {step: expected[step] for step in range(first, steps)}
        assert resumed.events("end")[0]["digest"] == undisturbed.events("end")[0]["digest"]
