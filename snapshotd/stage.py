"""Where a drill plays: its folder in shared memory, its daemon, its trainers, and what the trainers report.

The stage owns all of it. Whatever happens, `close` leaves no process and no file: processes are found by the mark
that they inherit in their environment, since torchrun gives each trainer a session of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from snapshotd import wire
from snapshotd.clock import SystemClock
from snapshotd.door_client import DoorClient
from snapshotd.errors import DaemonUnavailable, SnapshotError

CLOCK = SystemClock()
MARK = "SNAPSHOTD_DRILL"
JOB = "drill"
RESTARTS_MAX = 3
DAEMON_START_MAX_S = 30.0
END_MAX_S = 20.0
_LOOK_EVERY_S = 0.03
_LOG_LINES = 12
_Found = TypeVar("_Found")


class DrillFailed(SnapshotError):
    """The drill could not be played to its end; the sentence says at which point, and what the log says."""


@dataclass
class Life:
    """One process of one rank, from its start to its end or its death, as it reported itself."""

    rank: int
    pid: int
    started_s: float
    imported_s: float
    restored_s: float | None = None
    first_step: int = 0
    restore: dict[str, Any] = field(default_factory=dict)
    losses: dict[int, str] = field(default_factory=dict)
    digest: str | None = None
    state_bytes: int = 0

    def hear(self, event: dict[str, Any]) -> None:
        """Take in one line of the journal."""
        if event["event"] == "restored":
            self.restored_s, self.first_step = event["at_s"], event["step"]
            self.restore = event["restore"] or {}
        elif event["event"] == "step":
            self.losses[event["step"]] = event["loss"]
        elif event["event"] == "end":
            self.digest, self.state_bytes = event["digest"], event["state_bytes"]


def read_lives(folder: Path) -> list[Life]:
    """Every life that the journals in `folder` tell of, in the order of their starts."""
    lives = []
    for path in folder.glob("rank*.jsonl"):
        # The last line may be half written; what came before it is whole.
        events = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if events:
            start = events[0]
            life = Life(start["rank"], start["pid"], start["started_s"], start["imported_s"])
            for event in events[1:]:
                life.hear(event)
            lives.append(life)
    return sorted(lives, key=lambda life: life.started_s)


def example_path() -> Path:
    """The example trainer: inside the installed package, or `examples/` of a source tree."""
    spec = importlib.util.find_spec("snapshotd_client")
    if spec is None or spec.origin is None or importlib.util.find_spec("torch") is None:
        raise DrillFailed(
            "the drill trains a real model with PyTorch, which is not installed here; `pip install 'snapshotd[client]'`"
        )
    installed = Path(spec.origin).parent / "examples" / "gpt.py"
    in_tree = Path(__file__).parents[1] / "examples" / "gpt.py"
    for path in (installed, in_tree):
        if path.exists():
            return path
    raise DrillFailed(f"the drill's example trainer is missing: there is neither {installed} nor {in_tree}")


class Stage:
    """A folder of shared memory and the processes that belong to it. Use as a context manager."""

    def __init__(self, shm_root: Path, environment: Mapping[str, str]) -> None:
        self.top = shm_root / f"snapshotd-drill-{os.getpid()}"
        self.memory = self.top / "memory"
        self.socket = self.top / "socket"
        kept = {name: value for name, value in environment.items() if not name.startswith("SNAPSHOTD_")}
        # Where torchrun and torch put their temporary files, so that they go when the stage goes.
        self._environment = kept | {MARK: str(self.top), "TMPDIR": str(self.top), "OMP_NUM_THREADS": "1"}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: dict[int, Path] = {}

    def __enter__(self) -> Stage:
        try:
            self.top.mkdir(mode=0o700)
            self.memory.mkdir(mode=0o700)
        except OSError as error:
            shutil.rmtree(self.top, ignore_errors=True)
            raise DrillFailed(
                f"the drill cannot make its folder {self.top} ({error.strerror}); name another place with --shm-root"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_daemon(self) -> subprocess.Popen[bytes]:
        """A daemon of this node; returns once it answers. DrillFailed with its own words if it does not."""
        command = [sys.executable, "-m", "snapshotd", "serve"]
        daemon = self._start(
            [*command, "--socket", str(self.socket), "--shm-dir", str(self.memory)], "daemon.log", self._environment
        )
        self.wait(self._daemon_answers, daemon, DAEMON_START_MAX_S, "the daemon to answer")
        return daemon

    def start_training(self, ranks: int, arguments: list[str], out: Path, guarded: bool) -> subprocess.Popen[bytes]:
        """A torchrun of the example over `ranks` trainers, which write their journals to `out`."""
        environment = {**self._environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if guarded:
            environment |= {"SNAPSHOTD_SOCKET": str(self.socket), "SNAPSHOTD_JOB": JOB}
        launch = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
        launch += ["--max-restarts", str(RESTARTS_MAX), "--monitor-interval", "0.1"]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        script = [str(example_path()), *arguments, "--out", str(out), *([] if guarded else ["--no-guard"])]
        return self._start([sys.executable, *launch, *script], f"{out.name}.log", environment)

    def wait(
        self, look: Callable[[], _Found | None], while_runs: subprocess.Popen[bytes], timeout_s: float, what: str
    ) -> _Found:
        """The first thing that `look` finds. DrillFailed if the process ends before, or after `timeout_s`."""
        deadline_s = CLOCK.monotonic_s() + timeout_s
        while True:
            ended = while_runs.poll() is not None
            if (found := look()) is not None:
                return found
            if ended:
                raise DrillFailed(
                    f"waiting for {what}, but the process ended with status {while_runs.returncode}; "
                    f"{self.last_words(while_runs)}"
                )
            if CLOCK.monotonic_s() > deadline_s:
                raise DrillFailed(
                    f"waited {timeout_s:.0f} s for {what}, which did not come; {self.last_words(while_runs)}"
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                while_runs.wait(_LOOK_EVERY_S)

    def last_words(self, process: subprocess.Popen[bytes]) -> str:
        """The end of a process's log, for a person."""
        lines = self._logs[process.pid].read_text(errors="replace").strip().splitlines()
        tail = "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])
        return f"the end of its log says:\n{tail}" if tail else "it wrote no log"

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ask a process to end, and insist after a while."""
        process.terminate()
        try:
            process.wait(END_MAX_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        """Kill what still runs, then remove the folder. Bounded, and safe to call again."""
        for process in self._processes:
            process.kill()  # launchers first: they would start trainers anew
        for process in self._processes:
            process.wait()
        deadline_s = CLOCK.monotonic_s() + END_MAX_S
        while (left := self._marked()) and CLOCK.monotonic_s() < deadline_s:
            for one in left:
                with contextlib.suppress(psutil.Error):
                    one.kill()
            psutil.wait_procs(left, timeout=0.1)
        shutil.rmtree(self.top, ignore_errors=True)

    def _start(self, command: list[str], log: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start in a session of its own, so that Ctrl-C reaches the drill alone and the drill decides."""
        path = self.top / log
        with path.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._processes.append(process)
        self._logs[process.pid] = path
        return process

    def _daemon_answers(self) -> bool | None:
        with contextlib.suppress(DaemonUnavailable), DoorClient.connect(self.socket, timeout_s=1.0) as door:
            door.ask(wire.Hello(role="tool", pid=os.getpid()), timeout_s=5.0)
            return True
        return None

    def _marked(self) -> list[psutil.Process]:
        """Running processes that were started, directly or not, by this stage."""
        marked = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                inherited = process.pid != os.getpid() and process.environ().get(MARK) == str(self.top)
                if inherited and process.status() != psutil.STATUS_ZOMBIE:
                    marked.append(process)
        return marked
