"""What the stall benchmark plays on: nodes, processes of `benchmarks.loop`, and a look at the neighbours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import idle
from benchmarks.loop import JOB, PARITY, Spec
from benchmarks.nodes import PATIENCE_S, ROOT, Nodes, ask_status, nodes, until
from snapshotd.door_client import DoorClient


class Bench:
    """Nodes, and loops on the first of them. What runs on the others keeps to the cores `others_on`."""

    def __init__(self, made: Nodes, others_on: Sequence[int] | None) -> None:
        self.nodes, self.others_on = made, others_on
        self.socket = made[0].socket
        self.count = 0

    def spec(self, contestant: str, *, layers: int, width: int, batch: int, **more: int) -> Spec:
        """What a process is to do, in a folder of its own."""
        self.count += 1
        folder = self.nodes.folder / f"run-{self.count}"
        folder.mkdir()
        return Spec(
            contestant, layers, width, batch, folder=str(folder), socket=str(self.socket),
            result=str(folder / "result.json"), rendezvous=str(folder / "rendezvous"), pace=(), **more,
        )  # fmt: skip

    @contextlib.contextmanager
    def start(self, spec: Spec, pace: Sequence[int] = ()) -> Iterator[subprocess.Popen[bytes]]:
        """A process of `benchmarks.loop`, killed in the end if it still runs; its folder is removed."""
        command = [sys.executable, "-m", "benchmarks.loop", json.dumps(asdict(replace(spec, pace=tuple(pace))))]
        with open(f"{spec.folder}/log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, pass_fds=pace)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(spec.folder, ignore_errors=True)

    def run(self, spec: Spec) -> dict[str, Any]:
        """What the process measured; SystemExit with its output where it or a trainer of another node failed."""
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(self._another(spec, rank)) for rank in range(1, spec.nodes)]
            pace = [one.stdin.fileno() for one in others if one.stdin is not None]
            process = stack.enter_context(self.start(spec, pace))
            for one in others:
                assert one.stdin is not None
                one.stdin.close()  # only the loop has it now: its end is theirs
            if any(one.wait() for one in (process, *others)):
                raise SystemExit(f"{spec.contestant} failed:\n{_logs(spec.folder)}")
            result: dict[str, Any] = json.loads(Path(spec.result).read_text())
        if spec.nodes > 1:
            self.nodes.wait_until_bare(JOB)
        return result

    def _another(self, spec: Spec, rank: int) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        """A trainer on another node that holds as much and is paced by the loop."""
        socket, log = str(self.nodes[rank].socket), f"{spec.folder}/log-{rank}"
        more = idle.Spec(
            JOB, rank, spec.nodes, socket, spec.rendezvous, spec.layers, spec.width, PARITY, result=f"{log}.json"
        )
        return idle.started(more, Path(log), self.others_on)


def _logs(folder: str) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(Path(folder).glob("log*")))


@contextlib.contextmanager
def bench(count: int, cores: Sequence[int]) -> Iterator[Bench]:
    """A bench of so many nodes that is cleared in the end. What is not on the first node has the last core only."""
    others_on = cores[-1:] if count > 1 else None
    with nodes("stall", count, others_on=others_on) as made:
        yield Bench(made, others_on)


def death_seen_ms(here: Bench, **size: int) -> float:
    """From SIGKILL of a trainer whose forked workers live on until the daemon's status says that it is gone."""
    spec = here.spec("death", **size)
    with here.start(spec) as process:
        result = Path(spec.result)
        until(result.exists, "a commit of the trainer", lambda: process.poll() is None, Path(spec.folder, "log"))
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
