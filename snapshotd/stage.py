"""Where a drill plays: nodes with their daemons, memory and trainers, and what the trainers report.

A node here is a folder of shared memory, a daemon with a socket and a port of its own, and a torchrun agent with its
trainers. The stage owns all of it. Whatever happens, `close` leaves no process and no file: processes are found by the
mark that they inherit in their environment, since torchrun gives each trainer a session of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import psutil

from snapshotd import wire
from snapshotd.clock import SystemClock
from snapshotd.door_client import DoorClient
from snapshotd.errors import DaemonUnavailable, ProtocolError, Refused, SnapshotError

CLOCK = SystemClock()
MARK = "SNAPSHOTD_DRILL"
JOB = "drill"
KILLS_MAX = 3
# One kill can cost an agent two: its own trainer failed, then a neighbour's made the group form once more.
RESTARTS_MAX = 2 * KILLS_MAX
DAEMON_START_MAX_S = 30.0
END_MAX_S = 20.0
# Below the ports that Linux deals out by itself, so that nobody is given ours before the rendezvous has it.
PORTS = range(20000, 32000)
_LOOK_EVERY_S = 0.03
_LOG_LINES = 12
_Found = TypeVar("_Found")
Process: TypeAlias = "subprocess.Popen[bytes]"


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
    lost: str | None = None  # why nothing could be restored, where something had been committed
    node: int = 0  # by its place in the order of launch

    def hear(self, event: dict[str, Any]) -> None:
        """Take in one line of the journal."""
        if event["event"] == "restored":
            self.restored_s, self.first_step = event["at_s"], event["step"]
            self.restore = event["restore"] or {}
        elif event["event"] == "step":
            self.losses[event["step"]] = event["loss"]
        elif event["event"] == "end":
            self.digest, self.state_bytes = event["digest"], event["state_bytes"]
        elif event["event"] == "lost":
            self.lost = event["why"]


def read_lives(folder: Path) -> list[Life]:
    """Every life that the journals in `folder`, of each node in node<n>/, tell of, in the order of their starts."""
    lives = []
    for path in folder.glob("node*/rank*.jsonl"):
        # The last line may be half written; what came before it is whole.
        events = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if events:
            start, node = events[0], int(path.parent.name.removeprefix("node"))
            life = Life(start["rank"], start["pid"], start["started_s"], start["imported_s"], node=node)
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


@dataclass
class Node:
    """One machine of the drill: all that a power failure would take with it."""

    name: str
    folder: Path
    daemon: Process

    @property
    def memory(self) -> Path:
        """The directory of its arenas."""
        return self.folder / "memory"

    @property
    def socket(self) -> Path:
        """Where its daemon listens."""
        return self.folder / "socket"


class Stage:
    """A folder of shared memory and the processes that belong to it. Use as a context manager."""

    def __init__(self, shm_root: Path, environment: Mapping[str, str]) -> None:
        self.top = shm_root / f"snapshotd-drill-{os.getpid()}"
        kept = {name: value for name, value in environment.items() if not name.startswith("SNAPSHOTD_")}
        self._environment = kept | {
            MARK: str(self.top),
            "TMPDIR": str(self.top),  # temporary files of torchrun and torch go when the stage goes
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a group that was killed does not form again
        }
        self._processes: list[Process] = []
        self._logs: dict[int, Path] = {}
        self._launches = 0

    def __enter__(self) -> Stage:
        try:
            self.top.mkdir(mode=0o700)
        except OSError as error:
            raise DrillFailed(
                f"the drill cannot make its folder {self.top} ({error.strerror}); name another place with --shm-root"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- nodes ------------------------------------------------------------------------------------

    def start_nodes(self, names: Iterable[str], peers: bool) -> list[Node]:
        """Empty nodes, whose daemons answer, also one another where they have `peers`. DrillFailed quotes one that
        does not."""
        nodes = [self._start_node(name, peers) for name in names]
        for node in nodes:
            self.wait(partial(_answers, node), [node.daemon], DAEMON_START_MAX_S, "the daemon to answer")
        return nodes

    def _start_node(self, name: str, peers: bool) -> Node:
        folder = self.top / name
        try:
            folder.mkdir(mode=0o700)
            (folder / "memory").mkdir(mode=0o700)
        except OSError as error:
            raise DrillFailed(
                f"the drill cannot make {folder} ({error.strerror}); is {self.top.parent} full?"
            ) from None
        command = [sys.executable, "-m", "snapshotd", "serve", "--node-id", name]
        command += ["--socket", str(folder / "socket"), "--shm-dir", str(folder / "memory")]
        command += ["--listen", "tcp://127.0.0.1:0"] if peers else []
        return Node(name, folder, self._start(command, f"{name}.log", self._environment | {MARK: str(folder)}))

    def status(self, node: Node) -> dict[str, Any]:
        """The status document of a node's daemon. DrillFailed if it gives none."""
        try:
            with DoorClient.connect(node.socket, timeout_s=5.0) as door:
                door.ask(wire.Hello(role="tool", pid=os.getpid()), timeout_s=10.0)
                reply, _ = door.ask(wire.AskStatus(), timeout_s=10.0)
        except (DaemonUnavailable, ProtocolError, Refused) as error:
            raise DrillFailed(f"the daemon of {node.name} gives no status: {error}") from None
        return dict(json.loads(reply.document)) if isinstance(reply, wire.StatusReport) else {}

    def destroy(self, nodes: Sequence[Node]) -> None:
        """What a power failure does to these nodes at once: every process gone, and the memory with it."""
        self._kill([node.folder for node in nodes])
        for node in nodes:
            shutil.rmtree(node.folder, ignore_errors=True)

    def end_training(self, nodes: Sequence[Node]) -> None:
        """Kill agents and trainers of these nodes; their daemons stay."""
        self._kill([node.folder for node in nodes], spared={node.daemon.pid for node in nodes})

    # --- trainers ---------------------------------------------------------------------------------

    def start_training(
        self, nodes: Sequence[Node], ranks_per_node: int, arguments: Sequence[str], out: Path, restarts: int
    ) -> list[Process]:
        """A torchrun agent of the example on each node; the first hosts their rendezvous. Journals: `out`/node<n>."""
        self._launches += 1
        endpoint = f"127.0.0.1:{self._free_port()}"
        agents = []
        for index, node in enumerate(nodes):
            launch = self._torchrun(len(nodes), ranks_per_node, restarts, endpoint, hosts=index == 0)
            environment = {MARK: str(node.folder), "SNAPSHOTD_SOCKET": str(node.socket), "SNAPSHOTD_JOB": JOB}
            script = [str(example_path()), *arguments, "--out", str(out / f"node{index}")]
            log = f"{out.name}-{self._launches}-{node.name}.log"
            agents.append(self._start([*launch, *script], log, self._environment | environment))
        return agents

    def start_unguarded(self, ranks: int, arguments: Sequence[str], out: Path) -> list[Process]:
        """The same training under one agent and without a guard; journals go to `out`/node0."""
        self._launches += 1
        launch = self._torchrun(1, ranks, 0, f"127.0.0.1:{self._free_port()}", hosts=True)
        script = [str(example_path()), *arguments, "--no-guard", "--out", str(out / "node0")]
        return [self._start([*launch, *script], f"{out.name}.log", self._environment)]

    def _torchrun(self, nodes: int, ranks_per_node: int, restarts: int, endpoint: str, hosts: bool) -> list[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)]
        launch += ["--nproc-per-node", str(ranks_per_node), "--max-restarts", str(restarts)]
        launch += ["--monitor-interval", "0.1", "--local-addr", "127.0.0.1"]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", f"is_host={int(hosts)}"]
        return [*launch, "--rdzv-id", f"{JOB}-{os.getpid()}-{self._launches}"]

    def _free_port(self) -> int:
        """A port of this machine that nobody listens on, another one for each launch."""
        first = (os.getpid() * 8 + self._launches) % len(PORTS)
        for port in itertools.chain(PORTS[first:], PORTS[:first]):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
        raise DrillFailed(f"no port from {PORTS.start} to {PORTS.stop - 1} is free for torchrun's rendezvous")

    # --- processes --------------------------------------------------------------------------------

    def wait(
        self, look: Callable[[], _Found | None], while_run: Sequence[Process], timeout_s: float, what: str
    ) -> _Found:
        """The first thing that `look` finds. DrillFailed after `timeout_s`, or if before one of the processes failed
        or all of them ended."""
        deadline_s = CLOCK.monotonic_s() + timeout_s
        while True:
            running = [process for process in while_run if process.poll() is None]
            failed = [process for process in while_run if process.returncode]
            if (found := look()) is not None:
                return found
            if failed or not running:
                ended = (failed or while_run)[0]
                raise DrillFailed(
                    f"waiting for {what}, but the process ended with status {ended.returncode}; "
                    f"{self.last_words(ended)}"
                )
            if CLOCK.monotonic_s() > deadline_s:
                raise DrillFailed(
                    f"waited {timeout_s:.0f} s for {what}, which did not come; {self.last_words(running[0])}"
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[0].wait(_LOOK_EVERY_S)

    def last_words(self, process: Process) -> str:
        """The end of a process's log, for a person."""
        lines = self._logs[process.pid].read_text(errors="replace").strip().splitlines()
        tail = "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])
        return f"the end of its log says:\n{tail}" if tail else "it wrote no log"

    def stop(self, nodes: Sequence[Node]) -> None:
        """Ask the daemons of these nodes to end, and insist after a while."""
        for node in nodes:
            node.daemon.terminate()
        for node in nodes:
            try:
                node.daemon.wait(END_MAX_S)
            except subprocess.TimeoutExpired:
                node.daemon.kill()
                node.daemon.wait()

    def close(self) -> None:
        """Kill what still runs, then remove the folder. Bounded, and safe to call again."""
        for process in self._processes:
            process.kill()  # launchers first: they would start trainers anew
        for process in self._processes:
            process.wait()
        self._kill([self.top])
        shutil.rmtree(self.top, ignore_errors=True)

    def _kill(self, folders: Sequence[Path], spared: Iterable[int] = ()) -> None:
        """SIGKILL every process that belongs to one of these folders, until none is left or the time is up."""
        deadline_s = CLOCK.monotonic_s() + END_MAX_S
        while (left := self._marked(folders, set(spared))) and CLOCK.monotonic_s() < deadline_s:
            for one in left:
                with contextlib.suppress(psutil.Error):
                    one.kill()
            for process in self._processes:
                process.poll()  # our children: psutil would take their exit status away from us
            own = {process.pid for process in self._processes}
            psutil.wait_procs([one for one in left if one.pid not in own], timeout=0.1)

    def _start(self, command: list[str], log: str, environment: dict[str, str]) -> Process:
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

    @staticmethod
    def _marked(folders: Sequence[Path], spared: set[int]) -> list[psutil.Process]:
        """Running processes that were started, directly or not, by this stage for one of these folders."""
        marked = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid == os.getpid() or process.pid in spared:
                    continue
                place = Path(process.environ().get(MARK, "/"))
                belongs = any(place.is_relative_to(folder) for folder in folders)
                if belongs and process.status() != psutil.STATUS_ZOMBIE:
                    marked.append(process)
        return marked


def _answers(node: Node) -> bool | None:
    with contextlib.suppress(DaemonUnavailable), DoorClient.connect(node.socket, timeout_s=1.0) as door:
        door.ask(wire.Hello(role="tool", pid=os.getpid()), timeout_s=5.0)
        return True
    return None
