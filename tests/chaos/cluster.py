"""A cluster whose faults are declared: `kill(2, at="after FULL")`, `part([0, 1], [2, 3])`, `cut_power(3)`.

`Cluster` is `Nodes` on machines of `fabric`: daemons and puppets run inside them, authenticate, and reach each other by
the machines' addresses only. Where there can be no machines, `nodes` on loopback ports with processes and memory alone
take their place, and the faults of network and memory size do not exist: `machines` says which it is.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from snapshotd import wire
from snapshotd.door_client import DoorClient
from tests.chaos.fabric import MACHINE_MEMORY, Fabric, Machine
from tests.cluster.harness import Daemon, until
from tests.cluster.nodes import Nodes

MEMORY_BYTES = 24 << 20
LISTEN_PORT, STREAM_PORT = 7780, 7781
MOMENTS = {
    "after FULL": "accumulate.begun",
    "during parity": "accumulate.window",
    "after parity": "parity.counted",
    "before the decision": "named.before",
    "after the decision": "commit.decided",
    "after the mark": "commit.marked",
    "after COMMIT": "commit.applied",
    "while telling": "state.before",
    "while serving": "read.pinned",
}
"""When a daemon can be killed, and the crash point that is this moment."""
WHILE_REBUILDING = ("rebuild.claimed", "rebuild.begun", "rebuild.window", "rebuild.decoded", "rebuild.published")
WHILE_RESTORING = ("fence.before", "fence.after", "inherit.before", "inherit.after")


class Cluster(Nodes):
    """Nodes on machines of their own, or on loopback where `fabric` is None."""

    def __init__(self, shm_dir: Path, folder: Path, count: int, fabric: Fabric | None) -> None:
        self.fabric = fabric
        self.machines: list[Machine] = []
        super().__init__(shm_dir, folder, count, authenticate=True)

    def _new(self, number: int) -> Daemon:
        """A daemon on a new, empty machine, with an address that nobody had before."""
        if self.fabric is None:
            return super()._new(number)
        self._lives += 1
        machine = Machine(self._lives, MEMORY_BYTES)
        self.machines[number : number + 1] = [machine]
        self.fabric.plug(machine)
        folder = self._folder / f"life-{self._lives}"
        folder.mkdir(mode=0o700)
        ports = ("--listen", f"tcp://{machine.address}:{LISTEN_PORT}", "--stream-port", str(STREAM_PORT))
        daemon = Daemon(machine.memory, folder, *ports, "--node-id", f"node{number}", *self._flags)
        daemon.within, daemon.shm_flag = machine.within, MACHINE_MEMORY
        self._all.append(daemon)
        return daemon

    # --- faults, declared -------------------------------------------------------------------------

    def kill(self, node: int, at: str = "") -> None:
        """The daemon is killed: at once, or at a moment of MOMENTS (or a crash point) that it is yet to reach.

        A point is armed at a daemon's start, so the one that runs is replaced, which is a death of its own.
        """
        if at:
            self.restart(node, crash=MOMENTS.get(at, at))
        else:
            self.daemons[node].kill()

    def pause(self, node: int) -> None:
        """The daemon stands still, and its connections stay open."""
        os.kill(self.daemons[node].pid, signal.SIGSTOP)

    def resume(self, node: int) -> None:
        os.kill(self.daemons[node].pid, signal.SIGCONT)

    def cut_power(self, *nodes: int) -> None:
        """Machines are gone: daemon, puppets, link and memory. `replace` puts empty ones in their places."""
        if self.fabric is None:
            self.lose(*nodes)
            return
        for node in nodes:
            for puppet in self.puppets:
                if puppet.within == self.daemons[node].within:
                    puppet.kill()
            self.daemons[node].kill()
            self.machines[node].end()
            self.fabric.unplug(self.machines[node])

    def part(self, *sides: list[int]) -> None:
        """Nodes of different sides do not reach each other."""
        self._fabric.part([[self.machines[node] for node in side] for side in sides])

    def deafen(self, node: int, towards: int) -> None:
        """`node` hears nothing of `towards`, which hears it well."""
        self._fabric.deafen(self.machines[node], self.machines[towards])

    def shape(self, rate: str, *nodes: int) -> None:
        """These nodes send no faster than this ("20mbit")."""
        for node in nodes:
            self._fabric.shape(self.machines[node], rate)

    def drop(self, share: float, *nodes: int) -> None:
        """These nodes lose this share of the packets that reach them."""
        for node in nodes:
            self._fabric.lose(self.machines[node], share)

    def fill_shm(self, node: int) -> None:
        """Somebody else takes all that is left of a node's memory."""
        ballast = self.machines[node].memory.parent / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(self.machines[node].free_bytes(), 4096))

    def drain_shm(self, node: int) -> None:
        """They let go of it."""
        (self.machines[node].memory.parent / "ballast").unlink(missing_ok=True)

    def flip(self, node: int, region: str, offset: int) -> None:
        """A bit turns over in the newest committed "data" or "parity", or in the "table" of the data's checksums."""
        arena = self.arena(node, parity=region == "parity")
        if region == "table":
            arena.flip_table(offset % 2)
        else:
            arena.flip(offset % arena.newest.file_bytes)

    def heal(self) -> None:
        """The network is whole again, and nobody is paused."""
        if self.fabric is not None:
            self.fabric.heal()

    @property
    def _fabric(self) -> Fabric:
        assert self.fabric is not None, "faults of the network need machines"
        return self.fabric

    def dismiss(self, node: int, job: str) -> None:
        """What `snapshotd gc --job` does, once the node has seen that nobody holds anything of the job."""

        def gone() -> bool:
            with DoorClient.connect(self.daemons[node].socket) as door:
                door.ask(wire.Hello("tool", os.getpid()))
                door.ask(wire.Collect(job, None))
            return not self.generations(node, job)

        until(gone, f"node {node} having dismissed {job}")

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        super().close()
        for machine in self.machines:
            machine.end()


def workspace(top: Path) -> tuple[Path, Path]:
    """Where a cluster has its memory and its sockets and logs."""
    shm, folder = top / "shm", top / "run"
    for one in (shm, folder):
        shutil.rmtree(one, ignore_errors=True)
        one.mkdir(mode=0o700)
    return shm, folder
