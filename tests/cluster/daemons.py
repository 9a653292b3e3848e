"""A real daemon for tests: started, asked, killed, started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snapshotd import wire
from snapshotd.door_client import DoorClient
from snapshotd.errors import DaemonUnavailable
from tests.cluster.puppet import Puppet

WAIT_MAX_S = 150.0


def until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_MAX_S) -> Any:
    """The condition's first true value; AssertionError says what did not come."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"this did not happen within {timeout_s:g} s: {what}"
        time.sleep(0.005)
    return value


class Node:
    """A daemon with a socket, a log and a directory in shared memory of its own, and the puppets that it serves."""

    def __init__(self, shm_dir: Path, folder: Path, *flags: str) -> None:
        self.root, self.socket, self.log = shm_dir / "root", folder / "door.sock", folder / "daemon.log"
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self.puppets: list[Puppet] = []

    def start(self, *flags: str) -> Node:
        """Start it and wait until it answers."""
        self.spawn(*flags)
        until(lambda: self.answers() or self.ended(), "an answer of the daemon")
        assert not self.ended(), self.words()
        return self

    def spawn(self, *flags: str) -> subprocess.Popen[bytes]:
        """Start it and wait for nothing."""
        command = [sys.executable, "-m", "snapshotd", "serve", "--socket", str(self.socket)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--shm-dir", str(self.root), *self._flags, *flags], stdout=log, stderr=log
            )
        return self._process

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def ended(self) -> bool:
        return self.process.poll() is not None

    def words(self) -> str:
        """What it logged so far."""
        return self.log.read_text()

    def answers(self) -> bool:
        with contextlib.suppress(DaemonUnavailable):
            self.status()
            return True
        return False

    def ask(self, request: wire.Request) -> wire.Reply:
        """Ask as a tool does."""
        with DoorClient.connect(self.socket) as door:
            door.ask(wire.Hello("tool", os.getpid()))
            return door.ask(request)[0]

    def status(self) -> dict[str, Any]:
        """The status document."""
        reply = self.ask(wire.AskStatus())
        assert isinstance(reply, wire.StatusReport)
        document: dict[str, Any] = json.loads(reply.document)
        return document

    def generations(self, job: str = "job") -> list[dict[str, Any]]:
        """A job's generations, as status shows them."""
        found: list[dict[str, Any]] = self.status()["jobs"].get(job, {"generations": []})["generations"]
        return found

    def counter(self, name: str) -> int:
        return int(self.status()["counters"][f"{name}_total"])

    def dropped(self) -> dict[str, int]:
        """Dropped connections by reason."""
        found: dict[str, int] = self.status()["counters"].get("dropped_by_reason", {})
        return found

    def nobody_holds(self) -> bool:
        return not any(arena["held"] for generation in self.generations() for arena in generation["arenas"])

    def arenas(self) -> list[Path]:
        return sorted(self.root.glob("*.arena"))

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(WAIT_MAX_S)

    def puppet(self, rank: int = 0, world_size: int = 1, generation: int = 1, job: str = "job") -> Puppet:
        """A trainer on strings, that ends with the node."""
        self.puppets.append(Puppet(self.socket, rank, world_size, generation, job))
        return self.puppets[-1]

    def pair(self, generation: int = 1) -> tuple[Puppet, Puppet]:
        """Two attached ranks of one job."""
        puppets = self.puppet(0, 2, generation), self.puppet(1, 2, generation)
        for puppet in puppets:
            puppet.attach()
        return puppets

    def commits(self, *steps: int, generation: int = 1) -> bytes:
        """A trainer of one rank commits these steps and dies. Returns its arena."""
        trainer = self.puppet(0, 1, generation)
        arena = trainer.attach()
        for step in steps:
            trainer.snapshot(step)
            becomes(trainer, {step: "COMMITTED"})
        trainer.kill()
        until(self.nobody_holds, "the death to be seen")
        return arena

    def close(self) -> None:
        for puppet in self.puppets:
            puppet.close()
        if self._process is not None and not self.ended():
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.kill()


def becomes(puppet: Puppet, slots: dict[int, str]) -> None:
    """Wait until the puppet's arena holds exactly this."""
    until(lambda: puppet.slots() == slots, f"{slots} in rank {puppet.rank}'s arena, which holds {puppet.slots()}")


@contextlib.contextmanager
def node(shm_dir: Path, folder: Path, *flags: str) -> Iterator[Node]:
    """A node whose processes end with the block; `start` begins it."""
    one = Node(shm_dir, folder, *flags)
    try:
        yield one
    finally:
        one.close()
