"""What the stall benchmark plays on: a daemon, processes of `benchmarks.loop`, and a look at the neighbours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.loop import Spec, ask_status
from snapshotd.door_client import DoorClient

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 300.0


class Bench:
    """A folder in shared memory with a daemon in it; both are gone in the end."""

    def __init__(self) -> None:
        self.folder = Path(f"/dev/shm/snapshotd-stall-{os.getpid()}")
        self.folder.mkdir(mode=0o700)
        self.socket = self.folder / "socket"
        command = [sys.executable, "-m", "snapshotd", "serve", "--socket", str(self.socket)]
        with open(self.folder / "daemon.log", "wb") as log:
            memory = str(self.folder / "memory")
            self.daemon = subprocess.Popen([*command, "--shm-dir", memory], stdout=log, stderr=log)
        self.count = 0

    def wait_for_daemon(self) -> None:
        self.until(self._answers, lambda: self.daemon.poll() is None, "the daemon", self.folder / "daemon.log")

    def _answers(self) -> bool:
        with contextlib.suppress(Exception):
            self.status()
            return True
        return False

    def status(self) -> dict[str, Any]:
        with DoorClient.connect(self.socket) as door:
            return ask_status(door)

    def until(self, done: Callable[[], bool], lives: Callable[[], bool], who: str, log: Path) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > deadline_s or not lives():
                raise SystemExit(f"{who} ended or did not get ready:\n{log.read_text()}")
            time.sleep(0.05)

    def spec(self, contestant: str, *, layers: int, width: int, batch: int, **more: int) -> Spec:
        """What a process is to do, in a folder of its own."""
        self.count += 1
        folder = self.folder / f"run-{self.count}"
        folder.mkdir()
        return Spec(
            contestant, layers, width, batch, folder=str(folder), socket=str(self.socket),
            result=str(folder / "result.json"), **more,
        )  # fmt: skip

    @contextlib.contextmanager
    def start(self, spec: Spec) -> Iterator[subprocess.Popen[bytes]]:
        """A process of `benchmarks.loop`, killed in the end if it still runs; its folder is removed."""
        command = [sys.executable, "-m", "benchmarks.loop", json.dumps(asdict(spec))]
        with open(f"{spec.folder}/log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(spec.folder, ignore_errors=True)

    def run(self, spec: Spec) -> dict[str, Any]:
        """What the process measured; SystemExit with its output where it failed."""
        with self.start(spec) as process:
            if process.wait() != 0:
                raise SystemExit(f"{spec.contestant} failed:\n{Path(spec.folder, 'log').read_text()}")
            result: dict[str, Any] = json.loads(Path(spec.result).read_text())
            return result

    def close(self) -> None:
        self.daemon.terminate()
        try:
            self.daemon.wait(20)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """A bench that is cleared in the end, also where `timeout` or a job's scheduler ends us by SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    one = Bench()
    try:
        one.wait_for_daemon()
        yield one
    finally:
        one.close()


def death_seen_ms(here: Bench, **size: int) -> float:
    """From SIGKILL of a trainer whose forked workers live on until the daemon's status says that it is gone."""
    spec = here.spec("death", **size)
    with here.start(spec) as process:
        result = Path(spec.result)
        here.until(result.exists, lambda: process.poll() is None, "the trainer", Path(spec.folder, "log"))
        facts = json.loads(result.read_text())
        try:
            with DoorClient.connect(here.socket) as door:
                assert facts["pid"] in holders(ask_status(door)), "the trainer holds its arena"
                began_s = time.perf_counter()
                os.kill(facts["pid"], signal.SIGKILL)
                while facts["pid"] in holders(ask_status(door)):
                    if time.perf_counter() - began_s > PATIENCE_S:
                        break
                seen_s = time.perf_counter() - began_s
            assert all(psutil.pid_exists(pid) for pid in facts["workers"]), "the workers outlive their trainer"
        finally:
            for pid in facts["workers"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    return seen_s * 1e3


def holders(status: dict[str, Any]) -> set[int]:
    """Pids of the trainers that hold an arena."""
    generations = [one for job in status["jobs"].values() for one in job["generations"]]
    return {arena["pid"] for one in generations for arena in one["arenas"] if arena["held"]}


class Neighbours:
    """How much of the machine other programs used meanwhile: what a table is worth depends on it."""

    def __init__(self) -> None:
        self._all_s, self._ours_s, self._began_s = self._busy_s(), self._used_s(), time.monotonic()

    def cores(self) -> float:
        spent_s = (self._busy_s() - self._all_s) - (self._used_s() - self._ours_s)
        return round(max(0.0, spent_s / (time.monotonic() - self._began_s)), 2)

    def _busy_s(self) -> float:
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))

    def _used_s(self) -> float:
        """Ours and our children's, those that ended included."""
        return sum(os.times()[:4])
