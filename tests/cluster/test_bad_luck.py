"""What users do by mistake and what machines do by themselves: each with its sentence, and nothing lost."""

from __future__ import annotations

import itertools
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from snapshotd import _native
from tests.cluster.harness import Stage, Trainer, stage, until
from tests.cluster.test_crash_points import RECIPE, STEPS, finishes_exactly, newest_commit, undisturbed


def error_of(trainer: Trainer) -> dict[str, Any]:
    """The exception that ended a trainer."""
    assert trainer.join() == 3, trainer.events()[-2:]
    return trainer.events("error")[0]


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Turn one bit of a file over."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def two_snapshots(scene: Stage, folder: Path) -> tuple[Trainer, _native.SlotInfo, _native.SlotInfo]:
    """A dead trainer and a dead daemon that left a committed snapshot and a newer one, whole and not committed."""
    gate = folder / "gate"
    trainer = scene.start(RECIPE, steps=STEPS, flush_s=1.0, gates={5: str(gate)}, die="now", die_step=6)
    until(lambda: trainer.events("at gate"), "the trainer at its gate")
    os.kill(scene.daemon.pid, signal.SIGSTOP)
    gate.touch()
    assert trainer.join() == -9
    scene.daemon.kill()
    fd = os.open(scene.daemon.arenas()[0], os.O_RDONLY)
    arena = _native.Arena(fd, writable=False)
    os.close(fd)
    slots = sorted((arena.slot(index) for index in range(2)), key=lambda one: one.step)
    arena.close()
    assert [one.state for one in slots] == [_native.COMMITTED, _native.FULL]
    return trainer, slots[0], slots[1]


def slot_place(path: Path, index: int) -> int:
    fd = os.open(path, os.O_RDONLY)
    arena = _native.Arena(fd, writable=False)
    os.close(fd)
    place = arena.slot_offset(index)
    arena.close()
    return place


def test_a_whole_snapshot_that_nobody_committed_is_used(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        _, _, newer = two_snapshots(scene, tmp_path)
        scene.daemon.start()
        finishes_exactly(scene, newer.step)


def test_a_flipped_byte_in_the_newer_snapshot_is_reported_and_the_older_one_is_used(
    shm_dir: Path, tmp_path: Path
) -> None:
    losses, digest = undisturbed()
    with stage(shm_dir, tmp_path) as scene:
        _, older, newer = two_snapshots(scene, tmp_path)
        path = scene.daemon.arenas()[0]
        flip(path, slot_place(path, newer.index) + newer.file_bytes // 2)
        scene.daemon.start()
        resumed = scene.run(RECIPE, steps=STEPS)
        assert resumed.process.exitcode == 0, resumed.events("error")
        assert resumed.events("restored")[0]["step"] == older.step
        assert resumed.losses() == {step: losses[step] for step in range(older.step, STEPS)}
        assert resumed.events("end")[0]["digest"] == digest
        told = resumed.events("restored")[0]["report"]["why"] + scene.daemon.log.read_text()
        assert f"step {newer.step}" in told and "checksum" in told


def test_a_flipped_byte_in_the_only_snapshot_is_said_to_be_lost(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        scene.run(RECIPE, steps=STEPS, die="after_commit", die_step=5)
        path = scene.daemon.arenas()[0]
        for index in range(2):
            flip(path, slot_place(path, index) + 20_000)
        error = error_of(scene.start(RECIPE, steps=STEPS))
        assert error["kind"] == "SnapshotLost" and "checksum" in error["message"]
        assert 'on_lost="fresh"' in error["message"]
        afresh = scene.run(RECIPE, steps=STEPS, restore={"on_lost": "fresh"})
        assert afresh.process.exitcode == 0 and afresh.events("restored")[0]["step"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_no_single_flipped_bit_anywhere_is_ever_restored(seed: int, shm_dir: Path, tmp_path: Path) -> None:
    """Header, tables, host state, tensors: the run ends as it should, or it says that state is lost."""
    chance = random.Random(seed)
    _, digest = undisturbed()
    with stage(shm_dir, tmp_path) as scene:
        for _ in range(5):
            dead = scene.run(RECIPE, steps=STEPS, die="after_commit", die_step=5)
            assert dead.process.exitcode == -9, dead.events("error")
            scene.daemon.kill()
            path = scene.daemon.arenas()[0]
            places = [chance.randrange(slot_place(path, 0)), chance.randrange(path.stat().st_size)]
            place, bit = chance.choice(places), chance.randrange(8)
            flip(path, place, bit)
            scene.daemon.start()
            resumed = scene.run(RECIPE, steps=STEPS, restore={"on_lost": "fresh"}, close=False)
            assert resumed.process.exitcode == 0, (seed, place, bit, resumed.events("error"))
            assert resumed.events("end")[0]["digest"] == digest, (seed, place, bit)
            scene.daemon.kill()
            for left in shm_dir.iterdir():
                left.unlink()
            scene.daemon.start()


def test_a_second_trainer_of_a_running_rank_is_refused_by_pid_and_disturbs_nothing(
    shm_dir: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with stage(shm_dir, tmp_path, "--claim-wait", "0.3") as scene:
        first = scene.start(RECIPE, steps=STEPS, gates={6: str(gate)})
        until(lambda: first.events("at gate"), "the first trainer at its gate")
        error = error_of(scene.start(RECIPE, steps=STEPS))
        assert error["kind"] == "RankClaimed" and str(first.pid) in error["message"]
        gate.touch()
        assert first.join() == 0
        assert first.events("end")[0]["digest"] == undisturbed()[1]
        assert newest_commit(first) > 6, "the first one's snapshots went on"


def test_a_stopped_trainer_keeps_its_rank(shm_dir: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with stage(shm_dir, tmp_path, "--claim-wait", "0.3") as scene:
        stopped = scene.start(RECIPE, steps=STEPS, gates={6: str(gate)})
        until(lambda: stopped.events("at gate"), "the trainer at its gate")
        os.kill(stopped.pid, signal.SIGSTOP)
        error = error_of(scene.start(RECIPE, steps=STEPS))
        assert error["kind"] == "RankClaimed" and str(stopped.pid) in error["message"]


def test_training_goes_on_without_a_daemon_and_snapshots_begin_when_one_comes(shm_dir: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with stage(shm_dir, tmp_path) as scene:
        scene.daemon.kill()
        (scene.daemon.socket).unlink()
        trainer = scene.start(
            RECIPE, steps=STEPS, gates={5: str(gate)}, environment={"SNAPSHOTD_WAIT": "0.1"}, flush_s=0.3
        )
        until(lambda: trainer.events("at gate"), "the trainer at its gate")
        scene.daemon.start()
        gate.touch()
        assert trainer.join() == 0, trainer.events("error")
        warnings = [event["message"] for event in trainer.events("log") if event["level"] == "WARNING"]
        assert len(warnings) == 1 and "no daemon answers" in warnings[0]
        assert trainer.events("end")[0]["digest"] == undisturbed()[1]


def test_a_daemon_that_dies_costs_one_warning_and_the_next_one_takes_over(shm_dir: Path, tmp_path: Path) -> None:
    gates = {5: str(tmp_path / "gate5"), 8: str(tmp_path / "gate8")}
    with stage(shm_dir, tmp_path) as scene:
        trainer = scene.start(RECIPE, steps=STEPS, flush_s=2.0, gates=gates)
        until(lambda: trainer.events("at gate"), "the trainer at its first gate")
        scene.daemon.kill()
        until(lambda: any("went away" in event["message"] for event in trainer.events("log")), "the warning")
        Path(gates[5]).touch()
        until(lambda: len(trainer.events("at gate")) == 2, "the trainer at its second gate")
        scene.daemon.start()
        until(lambda: any("answers" in event["message"] for event in trainer.events("log")), "the reconnection")
        Path(gates[8]).touch()
        assert trainer.join() == 0, trainer.events("error")
        warnings = [event for event in trainer.events("log") if event["level"] == "WARNING"]
        assert len(warnings) == 1 and "went away" in warnings[0]["message"]
        assert newest_commit(trainer) > 8, "snapshots resumed"
        assert trainer.events("end")[0]["digest"] == undisturbed()[1]


def test_another_model_is_a_clear_error_and_the_snapshot_stays(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        dead = scene.run(RECIPE, steps=STEPS, die="after_commit", die_step=5)
        error = error_of(scene.start("batchnorm_and_buffers", steps=STEPS))
        assert error["kind"] == "LayoutChanged" and "left untouched" in error["message"]
        finishes_exactly(scene, newest_commit(dead))


def test_another_world_size_is_a_clear_error_and_the_snapshot_stays(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        group = scene.start_group("ddp", 2, steps=STEPS, die="after_commit", die_step=5)
        assert [one.join() for one in group] == [-9, -9]
        error = error_of(scene.start(RECIPE, steps=STEPS))
        assert error["kind"] == "LayoutChanged" and "2 ranks" in error["message"]
        again = scene.start_group("ddp", 2, steps=STEPS)
        assert [one.join() for one in again] == [0, 0], again[0].events("error")
        assert again[0].events("restored")[0]["step"] >= newest_commit(*group) > 0


def test_a_rank_that_differs_from_its_peers_is_named_on_every_rank(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        group = scene.start_group("ddp", 2, steps=STEPS, by_rank={1: {"every": 3}})
        for one in group:
            error = error_of(one)
            assert error["kind"] == "ConfigError" and "every" in error["message"] and "rank 1" in error["message"]


def test_one_rank_with_another_model_stops_every_rank_before_any_weight_is_touched(
    shm_dir: Path, tmp_path: Path
) -> None:
    with stage(shm_dir, tmp_path) as scene:
        before = scene.start_group("adamw", 2, steps=STEPS, die="after_commit", die_step=5)
        assert [one.join() for one in before] == [-9, -9]
        for one in scene.start_group("adamw", 2, steps=STEPS, by_rank={1: {"recipe": "late_expert"}}):
            error = error_of(one)
            assert error["kind"] == "LayoutChanged" and "on rank 1" in error["message"]
        again = scene.start_group("adamw", 2, steps=STEPS)
        assert [one.join() for one in again] == [0, 0], again[0].events("error")
        assert again[0].events("restored")[0]["step"] >= newest_commit(*before) > 0


def test_one_of_several_ranks_killed_alone_brings_the_group_back_together(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        group = scene.start_group("fsdp", 2, steps=STEPS, by_rank={1: {"die": "after_commit", "die_step": 6}})
        assert group[1].join() == -9
        group[0].kill()
        again = scene.start_group("fsdp", 2, steps=STEPS)
        assert [one.join() for one in again] == [0, 0], again[0].events("error")
        steps = {one.events("restored")[0]["step"] for one in again}
        assert len(steps) == 1 and steps.pop() >= newest_commit(*group) > 0


def test_a_loop_that_fails_by_itself_keeps_its_snapshots(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        failed = scene.start(RECIPE, steps=STEPS, die="raise", die_step=6)
        assert error_of(failed)["kind"] == "RuntimeError"
        finishes_exactly(scene, newest_commit(failed))


def test_a_run_that_closed_leaves_nothing(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        done = scene.run(RECIPE, steps=STEPS)
        assert done.process.exitcode == 0, done.events("error")
        until(lambda: not scene.daemon.arenas(), "the arenas' removal")


def test_every_third_step_means_at_least_three_between_snapshots(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        done = scene.run(RECIPE, steps=STEPS, every=3)
        commits = sorted({event["step"] for event in done.events("committed") if event["step"]})
        assert len(commits) >= 2
        assert all(later - sooner >= 3 for sooner, later in itertools.pairwise(commits))


def test_a_newer_checkpoint_of_the_users_own_wins(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        scene.run(RECIPE, steps=STEPS, die="after_commit", die_step=5)
        own = scene.run(RECIPE, steps=STEPS, restore={"newer_than": 9}, die="raise", die_step=STEPS)
        assert own.events("restored")[0]["step"] == 9


@pytest.mark.parametrize("recipe", ["ddp", "fsdp"])
def test_a_group_that_began_without_a_daemon_is_protected_once_one_comes_and_what_was_kept_stays(
    recipe: str, shm_dir: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with stage(shm_dir, tmp_path) as scene:
        before = scene.start_group(recipe, 2, steps=STEPS, die="after_commit", die_step=4)
        assert [one.join() for one in before] == [-9, -9]
        kept = set(scene.daemon.arenas())
        scene.daemon.kill()
        scene.daemon.socket.unlink()
        group = scene.start_group(
            recipe, 2, steps=20, gates={5: str(gate)}, environment={"SNAPSHOTD_WAIT": "0.1"}, flush_s=0.3
        )
        until(lambda: all(one.events("at gate") for one in group), "both trainers at their gates")
        scene.daemon.start()
        until(lambda: len(scene.daemon.arenas()) == 4, "two more arenas")
        gate.touch()
        assert [one.join() for one in group] == [0, 0], [one.events("error") for one in group]
        assert newest_commit(*group) > 5, scene.daemon.log.read_text()
        assert kept <= set(scene.daemon.arenas()), "a run that started from scratch frees nothing"
