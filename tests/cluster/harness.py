"""Real daemons and real trainers for tests: processes that can be killed at any point and started again quickly.

Trainers are forked from a server that has torch loaded already, so that a test with a dozen deaths takes seconds. What
a trainer saw stands in a journal, a line for each event, written at once: that outlives a SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from snapshotd import wire
from snapshotd.door_client import DoorClient

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.cluster.trainer"])
WAIT_MAX_S = 150.0


def until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_MAX_S) -> Any:
    """The condition's first true value; AssertionError says what did not come."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"this did not happen within {timeout_s:g} s: {what}"
        time.sleep(0.005)
    return value


@dataclass(frozen=True)
class Spec:
    """What a trainer does. `die`: "" (trains to the end), "now", "raise", or "after_commit" (SIGKILL after one)."""

    recipe: str
    socket: str
    journal: str
    steps: int = 14
    job: str = "test"
    guard: bool = True
    hooks_only: bool = False
    flush: bool = True
    every: int = 1
    parity: int = 2
    group_size: int = 8
    die: str = ""
    die_step: int = 0
    crash: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    rank: int = 0
    world_size: int = 1
    rendezvous: str = ""
    restore: dict[str, Any] = field(default_factory=dict)
    close: bool = True
    dump: str = ""
    flush_s: float = 10.0
    gates: dict[int, str] = field(default_factory=dict)


class Trainer:
    """One trainer process."""

    def __init__(self, spec: Spec) -> None:
        from tests.cluster import trainer

        self.spec = spec
        self.process = FORK.Process(target=trainer.main, args=(spec,), daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def join(self, timeout_s: float = WAIT_MAX_S) -> int:
        """Exit code (negative: the signal that ended it)."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"the trainer still runs after {timeout_s:g} s: {self.events()[-3:]}"
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.join()

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """What it wrote so far."""
        path = Path(self.spec.journal)
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in found if not name or event["event"] == name]

    def losses(self) -> dict[int, str]:
        """Each step's loss, exactly."""
        return {event["step"]: event["loss"] for event in self.events("step")}


class Daemon:
    """One daemon with its own socket and its own directory in shared memory.

    `within` begins its command where it runs inside namespaces of its own, and `shm_flag` is what it is told there.
    """

    def __init__(self, shm_dir: Path, folder: Path, *flags: str) -> None:
        self.shm_dir, self.folder, self.flags = shm_dir, folder, flags
        self.within: tuple[str, ...] = ()
        self.shm_flag = shm_dir
        self.socket = folder / "door.sock"
        self.log = folder / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, environment: dict[str, str] | None = None) -> None:
        """Start it and wait until it answers, or until it ended by itself where it was told to crash."""
        serve = (sys.executable, "-m", "snapshotd", "serve")
        command = [*self.within, *serve, "--socket", str(self.socket), "--shm-dir", str(self.shm_flag)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.flags], stdout=log, stderr=log, env={**os.environ, **(environment or {})}
            )
        process = self.process
        until(lambda: self.answers() or process.poll() is not None, f"an answer of the daemon, see {self.log}")
        assert process.poll() is None or environment, f"the daemon ended by itself: {self.log.read_text()[-2000:]}"

    def answers(self) -> bool:
        with contextlib.suppress(Exception):
            self.status()
            return True
        return False

    def status(self) -> dict[str, Any]:
        """The document of `snapshotd status`."""
        with DoorClient.connect(self.socket) as door:
            door.ask(wire.Hello("tool", os.getpid()))
            reply, _ = door.ask(wire.AskStatus())
        assert isinstance(reply, wire.StatusReport)
        document: dict[str, Any] = json.loads(reply.document)
        return document

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_MAX_S)

    def stop(self) -> None:
        """SIGTERM (after SIGCONT, in case a test had stopped it), then SIGKILL."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.kill()

    def arenas(self) -> list[Path]:
        return sorted(self.shm_dir.glob("*.arena"))


class Stage:
    """What a test plays on: one daemon, any number of trainers, all ended in the end."""

    def __init__(self, shm_dir: Path, folder: Path, *flags: str) -> None:
        self.folder, self._count = folder, 0
        self.trainers: list[Trainer] = []
        self.daemon = Daemon(shm_dir, folder, *flags)

    def spec(self, recipe: str, **changes: Any) -> Spec:
        self._count += 1
        journal = self.folder / f"journal-{self._count}.jsonl"
        return replace(Spec(recipe, str(self.daemon.socket), str(journal)), **changes)

    def start(self, recipe: str, **changes: Any) -> Trainer:
        trainer = Trainer(self.spec(recipe, **changes))
        self.trainers.append(trainer)
        return trainer

    def run(self, recipe: str, **changes: Any) -> Trainer:
        """Start a trainer and wait for its end."""
        trainer = self.start(recipe, **changes)
        trainer.join()
        return trainer

    def start_group(self, recipe: str, world_size: int, **changes: Any) -> list[Trainer]:
        """A job of several ranks. `changes` may map a rank to its own ones under `by_rank`."""
        self._count += 1
        by_rank: dict[int, dict[str, Any]] = changes.pop("by_rank", {})
        rendezvous = str(self.folder / f"rendezvous-{self._count}")
        group = []
        for rank in range(world_size):
            own = {"recipe": recipe, **changes, **by_rank.get(rank, {})}
            group.append(self.start(own.pop("recipe"), rank=rank, world_size=world_size, rendezvous=rendezvous, **own))
        return group

    def close(self) -> None:
        for trainer in self.trainers:
            if trainer.process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trainer.pid, signal.SIGCONT)
                trainer.kill()
            trainer.process.close()
        self.daemon.stop()


@contextlib.contextmanager
def stage(shm_dir: Path, folder: Path, *flags: str, environment: dict[str, str] | None = None) -> Iterator[Stage]:
    """A stage that is cleared in the end."""
    one = Stage(shm_dir, folder, *flags)
    try:
        one.daemon.start(environment)
        yield one
    finally:
        one.close()


def free_port() -> int:
    """A TCP port of loopback that nobody has right now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(psutil.Process(pid).memory_info().rss)
