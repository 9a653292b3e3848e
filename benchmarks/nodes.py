"""Nodes on one machine for the benchmarks: a daemon each with memory and a socket of its own, all cleared in the end.

Several of them reach each other over loopback, so what runs between them shares the cores and the memory of this one
machine. A benchmark that is ended by Ctrl-C, SIGTERM or a failure leaves no process and no file in shared memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from snapshotd import wire
from snapshotd.door_client import DoorClient
from snapshotd.errors import DaemonUnavailable

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 300.0
LOOK_EVERY_S = 0.05
IN_THE_CLEAR = ("--authenticate", "no")  # what encryption costs is for secure.py


def until(
    done: Callable[[], bool], what: str, lives: Callable[[], bool] = lambda: True, log: Path | None = None
) -> None:
    """Wait for a condition. SystemExit, with what the log says, if its process ends before or patience does."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > deadline_s or not lives():
            raise SystemExit(f"{what} did not come{f', see:{os.linesep}{log.read_text()}' if log else ''}")
        time.sleep(LOOK_EVERY_S)


def ask_status(door: DoorClient) -> dict[str, Any]:
    """The daemon's status, over a door that may be asked again."""
    door.ask(wire.Hello("tool", os.getpid()))
    reply, _ = door.ask(wire.AskStatus())
    assert isinstance(reply, wire.StatusReport)
    document: dict[str, Any] = json.loads(reply.document)
    return document


class Node:
    """One daemon. `cores` are those that it and its threads may run on (None: as this process). `within` begins its
    command where it runs in namespaces of its own, and `memory` is what it is told there (None: in its folder)."""

    def __init__(
        self,
        folder: Path,
        label: str,
        *flags: str,
        cores: Sequence[int] | None = None,
        within: Sequence[str] = (),
        memory: Path | None = None,
    ) -> None:
        folder.mkdir(mode=0o700)
        self.folder, self.memory, self.cores = folder, memory or folder / "memory", cores
        self.socket, self.log = folder / "socket", folder / "daemon.log"
        self._command = [*within, sys.executable, "-m", "snapshotd", "serve", "--socket", str(self.socket)]
        self._command += ["--shm-dir", str(self.memory), "--node-id", label, *flags]
        self.process = self._launch()

    def _launch(self) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, preexec_fn=pinned_to(self.cores), cwd=ROOT)

    def restart(self) -> None:
        """The daemon is killed, and another one started over what it left; `wait` waits for that."""
        self.process.kill()
        self.process.wait()
        self.process = self._launch()

    def wait(self) -> None:
        """Until it answers."""
        until(self._answers, f"an answer of the daemon in {self.folder}", lambda: self.process.poll() is None, self.log)

    def _answers(self) -> bool:
        with contextlib.suppress(DaemonUnavailable):
            self.status()
            return True
        return False

    def status(self) -> dict[str, Any]:
        """The document of `snapshotd status`."""
        with DoorClient.connect(self.socket) as door:
            return ask_status(door)

    def generation(self, job: str) -> dict[str, Any] | None:
        """What that tells of a job's newest generation; None where there is none."""
        generations = self.status()["jobs"].get(job, {"generations": []})["generations"]
        return generations[-1] if generations else None

    def lose(self) -> None:
        """The node is gone with its memory."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """End it in good order, or by force after a while."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.process.wait()


class Nodes:
    """Nodes 0 … n-1, replaced by empty ones at will. `nodes` makes them and clears them away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Node] = []
        self._lives = 0

    def __getitem__(self, number: int) -> Node:
        return self.all[number]

    def __len__(self) -> int:
        return len(self.all)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.all)

    def _start(self, number: int, *flags: str, cores: Sequence[int] | None = None) -> Node:
        self._lives += 1
        return Node(self.folder / f"life-{self._lives}", f"node{number}", *flags, cores=cores)

    def start(self, count: int, others_on: Sequence[int] | None) -> None:
        """Start them. Only several listen to each other. All but the first run on the cores `others_on`."""
        flags = ("--listen", "tcp://127.0.0.1:0", *IN_THE_CLEAR) if count > 1 else ()
        for number in range(count):
            self.all.append(self._start(number, *flags, cores=others_on if number else None))
        for node in self.all:
            node.wait()

    def lose(self, number: int) -> None:
        """This node is gone, and an empty one takes its place."""
        cores = self.all[number].cores
        self.all[number].lose()
        self.all[number] = self._start(number, "--listen", "tcp://127.0.0.1:0", *IN_THE_CLEAR, cores=cores)
        self.all[number].wait()

    def wait_until_bare(self, job: str) -> None:
        """Until every rank closed its run and its memory was freed on every node."""
        until(lambda: all(node.generation(job) is None for node in self.all), f"the end of job {job} on every node")


@contextlib.contextmanager
def nodes(name: str, count: int = 1, *, others_on: Sequence[int] | None = None) -> Iterator[Nodes]:
    """Nodes that serve, cleared away in the end, also where `timeout` or a job's scheduler ends us by SIGTERM."""
    signal.signal(signal.SIGTERM, _end)
    folder = Path(f"/dev/shm/snapshotd-{name}-{os.getpid()}")
    folder.mkdir(mode=0o700)
    made = Nodes(folder)
    try:
        made.start(count, others_on)
        yield made
    finally:
        for node in made:
            node.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _end(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once: what clears up must not be interrupted itself
    sys.exit(128 + number)


def pinned_to(cores: Sequence[int] | None) -> Callable[[], None] | None:
    """What a child does before it becomes another program, so that all its threads stay on these cores."""
    return None if cores is None else lambda: os.sched_setaffinity(0, cores)
