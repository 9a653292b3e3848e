"""`snapshotd drill`, played for real: daemons, torchrun, a kill in the middle of a copy, nodes that are destroyed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from snapshotd.stage import MARK

ROOT = Path(__file__).parents[2]
WAIT_MAX_S = 250.0


def start(shm_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "snapshotd", "drill", "--shm-root", str(shm_dir), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], drill: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + WAIT_MAX_S
    while not condition():
        assert drill.poll() is None, f"the drill ended early: {drill.communicate()}"
        assert time.monotonic() < deadline_s, "the drill did not get that far"
        time.sleep(0.02)


def processes_of_drills_in(shm_dir: Path) -> list[str]:
    """Commands of running processes that a drill below `shm_dir` started, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(str(shm_dir)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def text_of(shm_dir: Path, pattern: str) -> str:
    return "".join(path.read_text() for path in shm_dir.glob(f"snapshotd-drill-*/{pattern}"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_trainer_killed_in_the_middle_of_a_copy_comes_back_bit_for_bit(parallel: str, shm_dir: Path) -> None:
    drill = start(shm_dir, "--nodes", "1", "--parallel", parallel, "--steps", "15", "--json")
    out, err = drill.communicate(timeout=500)
    assert drill.returncode == 0, err
    report = json.loads(out)  # one object and nothing else
    assert report["bit_identical"] is True
    assert report["copy_in_flight"] is True
    assert 0 < report["committed_before_kill"] <= report["resumed_after_kill_step"] < 15
    assert report["digest_interrupted"] == report["digest_undisturbed"]
    assert len(report["digest_interrupted"]) == 64
    assert report["losses_compared"] >= 2 * 15
    split = report["seconds_to_resume_kill"]
    assert set(split) == {"total", "process_start", "imports", "set_up", "attach", "verify", "copy"}
    assert split["total"] == pytest.approx(sum(split.values()) - split["total"], abs=0.01)
    assert min(split.values()) >= 0 and split["verify"] > 0
    assert list(shm_dir.iterdir()) == []
    assert processes_of_drills_in(shm_dir) == []


@pytest.mark.parametrize(
    ("arguments", "lost"),
    [
        (["--nodes", "3", "--parity", "1", "--lose", "1", "--parallel", "fsdp", "--steps", "14"], [0]),
        pytest.param(
            ["--nodes", "4", "--parity", "2", "--lose", "2", "--parallel", "fsdp"], [0, 3], marks=pytest.mark.drill
        ),
        pytest.param(
            ["--nodes", "5", "--group-size", "3", "--parity", "1", "--lose", "1", "--parallel", "ddp"],
            [0],
            marks=pytest.mark.drill,
        ),
    ],
    ids=["one-of-three", "two-of-four", "one-of-a-group-of-five"],
)
def test_nodes_that_are_destroyed_are_rebuilt_bit_for_bit(arguments: list[str], lost: list[int], shm_dir: Path) -> None:
    drill = start(shm_dir, *arguments, "--json")
    out, err = drill.communicate(timeout=380)
    assert drill.returncode == 0, (out, err)
    report = json.loads(out)
    assert report["bit_identical"] is True and report["lost"] is False and report["why"] == ""
    assert len(report["lost_nodes"]) == len(lost)
    assert 0 < report["committed_before_kill"] <= report["resumed_after_kill_step"]
    assert report["resumed_after_kill_step"] < report["last_commit_before_loss"]
    assert report["last_commit_before_loss"] <= report["resumed_after_loss_step"] < report["steps"]
    assert report["bytes_rebuilt"] > 0 and report["seconds_to_rebuild"] > 0
    assert report["data_bytes"] > 0 and report["parity_bytes"] > 0
    assert report["digest_interrupted"] == report["digest_undisturbed"] != ""
    assert report["losses_different"] == 0 and report["losses_compared"] >= report["ranks"] * report["steps"]
    assert list(shm_dir.iterdir()) == []
    assert processes_of_drills_in(shm_dir) == []


def test_more_nodes_than_parity_carries_end_in_a_sentence_that_says_what_is_lost(shm_dir: Path) -> None:
    drill = start(shm_dir, "--nodes", "2", "--parity", "0", "--lose", "1", "--json")
    out, err = drill.communicate(timeout=500)
    assert drill.returncode == 1, (out, err)
    report = json.loads(out)
    assert report["bit_identical"] is False and report.get("lost") is True, (report, err)
    assert f"step {report['last_commit_before_loss']} " in report["why"] and "missing" in report["why"]
    assert (report["nodes"], report["parity"], len(report["lost_nodes"])) == (2, 0, 1)
    assert list(shm_dir.iterdir()) == []
    assert processes_of_drills_in(shm_dir) == []


@pytest.mark.parametrize(
    ("number", "nodes", "processes"),
    [
        (signal.SIGINT, 1, 4),  # daemon, agent and two trainers
        (signal.SIGTERM, 2, 6),  # two daemons, two agents and a trainer each
    ],
)
def test_a_drill_that_is_stopped_in_the_middle_leaves_no_process_and_no_file(
    number: int, nodes: int, processes: int, shm_dir: Path
) -> None:
    drill = start(shm_dir, "--nodes", str(nodes), "--parallel", "ddp", "--steps", "500")
    wait_until(lambda: '"event": "step"' in text_of(shm_dir, "interrupted/node*/rank1-*.jsonl"), drill)
    assert len(processes_of_drills_in(shm_dir)) >= processes
    drill.send_signal(number)
    _, err = drill.communicate(timeout=240)
    assert drill.returncode == 130
    assert "stopped" in err
    assert list(shm_dir.iterdir()) == []
    assert processes_of_drills_in(shm_dir) == []


def test_a_drill_that_is_stopped_while_its_daemon_starts_leaves_nothing(shm_dir: Path) -> None:
    drill = start(shm_dir)
    wait_until(lambda: any(shm_dir.glob("snapshotd-drill-*/node-3.log")), drill)
    drill.send_signal(signal.SIGINT)
    drill.communicate(timeout=240)
    assert drill.returncode == 130
    assert list(shm_dir.iterdir()) == []
    assert processes_of_drills_in(shm_dir) == []


def test_a_daemon_that_refuses_to_start_is_quoted(shm_dir: Path) -> None:
    too_deep = shm_dir / ("a" * 100)
    too_deep.mkdir()
    drill = start(too_deep, "--nodes", "1", "--json")
    out, err = drill.communicate(timeout=240)
    assert drill.returncode == 1
    assert "longer than the 100 bytes that Unix sockets allow" in err
    assert json.loads(out)["bit_identical"] is False
    assert list(too_deep.iterdir()) == []


def test_the_example_trainer_computes_the_same_twice_without_a_guard(tmp_path: Path) -> None:
    ends = []
    for out in (tmp_path / "once", tmp_path / "again"):
        command = [sys.executable, str(ROOT / "examples" / "gpt.py"), "--no-guard", "--steps", "3", "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
        (journal,) = out.glob("rank0-*.jsonl")
        events = [json.loads(line) for line in journal.read_text().splitlines()]
        assert [event["event"] for event in events] == ["start", "restored", "step", "step", "step", "end"]
        ends.append([event.get("loss", event.get("digest")) for event in events])
    assert ends[0] == ends[1]
