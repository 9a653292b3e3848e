"""Machines on one machine: each node has its own network namespace, address, link, and size-limited memory.

`enter` puts a whole program into namespaces of its own first: process ids, mounts, network. Everything that it starts,
mounts or plugs in afterwards lies inside them, so that the kernel clears it away when the program ends, however it
ends; the host's network, /dev/shm and process table never see any of it.

A `Machine` is two namespaces that one sleeping process holds open. Its end is a power cut: link and memory go with it.
`Fabric` is the switch: it plugs machines in, parts them, slows them and loses what they send. It needs root, util-linux
and iproute2; `lose` and `deafen` need iptables too, and `can_drop` says whether it is there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

REPOSITORY = Path(__file__).parents[2]
WORKSPACE = Path("/mnt")
MACHINE_MEMORY = Path("/dev/shm/node")
NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--")
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "tc", "mount")
_INSIDE = "SNAPSHOTD_CHAOS_INSIDE"
_PREFIX = 16


def why_not() -> str:
    """Why there can be no machines here, as a sentence; empty where there can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found: install util-linux and iproute2"
    if os.geteuid() != 0:
        return "namespaces with links and memory of their own need root"
    try_it = "ip link add one type veth peer name two && ip link add three type bridge && mount -t tmpfs none /mnt"
    tried = subprocess.run([*NAMESPACES, "sh", "-c", try_it], capture_output=True, text=True, check=False)
    return tried.stderr.strip().replace("\n", "; ") if tried.returncode else ""


def inside() -> bool:
    """This program was started by `enter`."""
    return os.environ.get(_INSIDE) == "1"


def enter(module: str, arguments: Sequence[str]) -> int:
    """Run a module inside namespaces of its own; returns its exit status. Ctrl-C and SIGTERM are handed on to it as
    Ctrl-C, and our own end, even by SIGKILL, is its end."""
    command = ["setpriv", "--pdeathsig", "KILL", *NAMESPACES, sys.executable, "-m", module, *arguments]
    child = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, _INSIDE: "1"})

    def hand_on(number: int, frame: FrameType | None) -> None:
        for one in psutil.Process(child.pid).children():
            one.send_signal(signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)
    status = child.wait()
    return status if status >= 0 else 128 - status


def run(*command: str) -> None:
    """A command that has to succeed. RuntimeError with its own words where it does not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class Machine:
    """One node's namespaces. `within` begins every command that runs on it; `memory` is its tmpfs, seen from outside,
    and lies at MACHINE_MEMORY for those within."""

    def __init__(self, number: int, memory_bytes: int) -> None:
        self.number, self.address = number, f"10.77.{number // 200}.{number % 200 + 1}"
        self.link = f"port{number}"
        begin = (
            f"mount -t tmpfs -o size={memory_bytes},mode=0700 node /dev/shm && mkdir -m 700 {MACHINE_MEMORY} "
            f"&& echo ready && exec sleep infinity"
        )
        self._holder = subprocess.Popen(["unshare", "--net", "--mount", "sh", "-c", begin], stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"machine {number} could not be made")
        self._holder.stdout.close()
        self.within = ("nsenter", "-t", str(self._holder.pid), "-n", "-m", "--", "env", "-C", str(REPOSITORY))
        self.memory = Path(f"/proc/{self._holder.pid}/root{MACHINE_MEMORY}")

    @property
    def pid(self) -> int:
        return self._holder.pid

    def do(self, *command: str) -> None:
        """Run a command on it. RuntimeError where it fails."""
        run(*self.within, *command)

    def free_bytes(self) -> int:
        """What its memory has left."""
        found = os.statvfs(self.memory)
        return found.f_bavail * found.f_frsize

    def end(self) -> None:
        """Let go of its namespaces, which end with the last process in them."""
        self._holder.kill()
        self._holder.wait()


class Fabric:
    """A switch with as many sides as partitions ask for; we ourselves are plugged into side 0."""

    def __init__(self) -> None:
        self._sides: list[str] = []
        self._plugged: list[Machine] = []
        self.can_drop = shutil.which("iptables") is not None
        run("ip", "link", "set", "lo", "up")
        self._side(0)
        run("ip", "address", "add", f"10.77.255.254/{_PREFIX}", "dev", self._sides[0])

    def _side(self, number: int) -> str:
        while len(self._sides) <= number:
            name = f"side{len(self._sides)}"
            run("ip", "link", "add", name, "type", "bridge")
            run("ip", "link", "set", name, "up")
            self._sides.append(name)
        return self._sides[number]

    def plug(self, machine: Machine) -> None:
        """Give a machine its link and its address."""
        run("ip", "link", "add", machine.link, "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid))
        run("ip", "link", "set", machine.link, "master", self._side(0), "up")
        machine.do("ip", "address", "add", f"{machine.address}/{_PREFIX}", "dev", "eth0")
        machine.do("ip", "link", "set", "eth0", "up")
        machine.do("ip", "link", "set", "lo", "up")
        self._plugged.append(machine)

    def unplug(self, machine: Machine) -> None:
        """Forget a machine that has ended; its link went with it."""
        self._plugged.remove(machine)

    def part(self, sides: Sequence[Sequence[Machine]]) -> None:
        """Machines of different sides no longer reach each other: silently, as when a cable is pulled."""
        for number, machines in enumerate(sides, 1):
            for machine in machines:
                run("ip", "link", "set", machine.link, "master", self._side(number))

    def shape(self, machine: Machine, rate: str) -> None:
        """Let a machine send no faster than this, in tc's words ("20mbit")."""
        machine.do(
            "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms"
        )

    def lose(self, machine: Machine, share: float) -> None:
        """Lose this share of the packets that reach a machine."""
        chance = ("-m", "statistic", "--mode", "random", "--probability", str(share))
        machine.do("iptables", "-w", "-A", "INPUT", "-i", "eth0", *chance, "-j", "DROP")

    def deafen(self, machine: Machine, towards: Machine) -> None:
        """A partition in one direction: nothing that `towards` sends is heard."""
        machine.do("iptables", "-w", "-A", "INPUT", "-s", towards.address, "-j", "DROP")

    def heal(self) -> None:
        """No partition, no limit, no loss."""
        for machine in self._plugged:
            run("ip", "link", "set", machine.link, "master", self._side(0))
            subprocess.run([*machine.within, "tc", "qdisc", "delete", "dev", "eth0", "root"], capture_output=True)
            if self.can_drop:
                machine.do("iptables", "-w", "-F", "INPUT")
