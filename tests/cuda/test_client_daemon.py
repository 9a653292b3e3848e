"""From `protect` to `restore` with a real daemon: a run on the simulated GPU dies, the next one goes on bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness import Daemon
from tests.cuda import sim_trainer, support

RUN_MAX_S = 150.0


@pytest.fixture
def daemon(shm_dir: Path, tmp_path: Path) -> Iterator[Daemon]:
    if support.nvcc() is None:
        pytest.skip("nvcc is not here: the CUDA module can be neither built nor simulated")
    support.build_module()
    one = Daemon(shm_dir, tmp_path)
    one.start()
    yield one
    one.stop()


def run(daemon: Daemon, steps: int, end: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.sim_trainer", str(daemon.socket), str(steps), end],
        cwd=support.ROOT, capture_output=True, text=True, timeout=RUN_MAX_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["findings"] == [], told["findings"]
    return told


def test_a_run_on_a_gpu_that_dies_goes_on_bit_for_bit(daemon: Daemon) -> None:
    before = run(daemon, 4, "die")
    status = before["status"]
    assert before["first"] == 0 and status["gpu"] and status["trouble"] == "" and status["failures"] == 0
    assert before["digest"] == sim_trainer.undisturbed(4)
    after = run(daemon, 7, "close")
    assert after["first"] == before["committed"] and after["first"] > 0
    assert after["restored"] == sim_trainer.undisturbed(after["first"])
    assert after["digest"] == sim_trainer.undisturbed(7)
    assert after["status"]["published"] > 0 and after["status"]["failures"] == 0
