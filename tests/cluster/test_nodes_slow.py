"""Daemons that stop, die and come back under a running job: snapshots wait for them, and training does not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.harness import until
from tests.cluster.nodes import Cast, ends_exactly, nodes


@pytest.mark.parametrize("number", [0, 2], ids=["the coordinator's", "another"])
def test_while_a_daemon_is_stopped_nothing_commits_and_training_goes_on_and_afterwards_both_do(
    number: int, shm_dir: Path, tmp_path: Path
) -> None:
    gates = {9: str(tmp_path / "gate-9"), 12: str(tmp_path / "gate-12")}
    with nodes(shm_dir, tmp_path, 3) as scene:
        group = scene.train("ddp", [0, 1, 2], parity=1, steps=16, gates=gates, flush_s=0.3)
        until(lambda: all(one.events("at gate") for one in group), "every rank at the first gate")
        scene.all_commit(1)
        before = scene.committed(1)
        os.kill(scene.daemons[number].pid, signal.SIGSTOP)
        Path(gates[9]).touch()
        until(lambda: all(len(one.events("at gate")) == 2 for one in group), "training going on to the second gate")
        assert scene.committed(1) == before, "no snapshot commits without every node's word"
        os.kill(scene.daemons[number].pid, signal.SIGCONT)
        Path(gates[12]).touch()
        assert ends_exactly(group, 0) == 0
        assert max(event["step"] or 0 for one in group for event in one.events("committed")) > before
        assert {one.events("end")[0]["status"]["failures"] for one in group} == {0}


@pytest.mark.parametrize("number", [0, 2], ids=["the coordinator's", "another"])
def test_after_a_daemon_was_killed_and_restarted_trainers_reconnect_and_commits_resume(
    number: int, shm_dir: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with nodes(shm_dir, tmp_path, 3) as scene:
        group = scene.train("ddp", [0, 1, 2], parity=1, steps=16, gates={9: str(gate)}, flush_s=3.0)
        until(lambda: all(one.events("at gate") for one in group), "every rank at the gate")
        scene.all_commit(1)
        before = scene.committed(1)
        scene.restart(number)
        messages = lambda: [event["message"] for event in group[number].events("log")]  # noqa: E731
        until(lambda: any("answers" in one for one in messages()), "the trainer's reconnection")
        gate.touch()
        assert ends_exactly(group, 0) == 0
        assert max(event["step"] or 0 for one in group for event in one.events("committed")) > before


def test_all_daemons_killed_at_once_and_restarted_lose_no_commit_and_take_the_job_up_again(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        cast.publish(2, 0, 1)
        for daemon in scene.daemons:
            daemon.kill()
        for number in range(3):
            scene.restart(number)
            cast.reattach(number)
        cast.publish(2, 2)
        cast.commits(2)
        cast.save(3)
        assert {scene.committed(number) for number in range(3)} == {3}


def test_a_restarted_daemon_with_ports_that_the_kernel_chooses_is_found_again(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 3, "--listen", "tcp://127.0.0.1:0", "--stream-port", "0") as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        before = scene.daemons[1].status()["listen"]
        scene.restart(1)
        cast.reattach(1)
        assert scene.daemons[1].status()["listen"] == before
        cast.save(2)
