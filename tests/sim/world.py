"""The world of one history: time, chance, hosts, network, the job that trains, and whoever judges.

Everything comes from one seed. What the world does and what the processes draw come from different streams of it, so
that a history with one fault less is still like the other up to there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from snapshotd import faults
from tests.sim.invariants import Checker, Violation
from tests.sim.job import Job
from tests.sim.loop import Died, Loop, Queue, SimClock
from tests.sim.machine import Host
from tests.sim.memory import NAMES, Memory, SlotInfo
from tests.sim.network import Post, Weather

BETWEEN = 0.03
PAUSE_S = 0.002


def _told(callback: Any) -> str:
    return str(getattr(callback, "__qualname__", "works")).replace(".<locals>", "")


class World:
    """One history. `step` makes one event happen and has it judged."""

    def __init__(self, seed: int, keep_trace: bool = False, waits: bool = False) -> None:
        self.seed, self.waits = seed, waits
        self.chance, self.luck = random.Random(f"{seed} world"), random.Random(f"{seed} luck")
        self.queue = Queue()
        self.clock = SimClock(self.queue)
        self.hosts: dict[str, Host] = {}
        self.trace: list[tuple[Any, ...]] | None = [] if keep_trace else None
        self.events = 0
        self.faults: Counter[str] = Counter()
        self.deaths: Counter[str] = Counter()
        self.post = Post(self)
        self.checker = Checker(self)
        self.job = Job(self)
        self.actor: Host | None = None
        self._numbers = 0
        self._failure: Violation | None = None
        self._loops: dict[int, Host] = {}

    # --- what happens -----------------------------------------------------------------------------

    def step(self) -> bool:
        """The next event, judged. False where nothing is left to happen. Violation."""
        found = self.queue.next()
        if found is None:
            return False
        loop, handle = found
        self.events += 1
        if self.trace is not None:
            self.note("·", loop.life.name, _told(handle._callback))  # type: ignore[attr-defined]
        self.run(loop, handle)
        self.checker.check()
        if self._failure is not None:
            raise self._failure
        return True

    def run(self, loop: Loop, handle: asyncio.Handle) -> None:
        """A process acts."""
        before, self.actor = self.actor, self.hosts.get(loop.life.name)
        try:
            loop.run(handle)
        finally:
            self.actor = before

    @contextlib.contextmanager
    def acting(self, host: Host) -> Iterator[None]:
        """A server serves, called by another host's process."""
        before, self.actor = self.actor, host
        try:
            yield
        finally:
            self.actor = before

    @contextlib.contextmanager
    def watched(self) -> Iterator[World]:
        """The product's crash points lead here."""
        faults.watch(self._passed)
        try:
            yield self
        finally:
            faults.watch(None)

    def end(self) -> None:
        """The history is over."""
        for host in self.hosts.values():
            if host.daemon is not None:
                host.daemon.end()
        for loop in self.queue.loops:
            loop.end()

    def _passed(self, point: str) -> None:
        host = self.actor
        if host is None or host.armed <= 0:
            return
        host.armed -= 1
        if host.armed == 0:
            self.deaths[point] += 1
            host.kill()
            raise Died(point)

    def failed(self, what: str, error: BaseException | None) -> None:
        """An exception of the product's or of ours: nobody is to see one."""
        if self._failure is None and not isinstance(error, Died):
            self._failure = error if isinstance(error, Violation) else Violation(f"{what} failed: {error!r}")
            self._failure.__cause__ = error

    def note(self, *what: Any) -> None:
        """One line of the trace."""
        if self.trace is not None:
            self.trace.append((round(self.queue.now_s, 6), *what))

    # --- chance -----------------------------------------------------------------------------------

    def delay_s(self) -> float:
        """How long something short takes: mostly little, sometimes long."""
        draw = self.luck.random()
        return PAUSE_S * draw if draw < 0.95 else PAUSE_S * 20 * (draw - 0.9) * 10

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def between_two_reads(self, memory: Memory) -> None:
        """A trainer writes while the daemon reads: sometimes it acts between two of the daemon's reads."""
        if self.luck.random() < BETWEEN:
            trainer = self.job.trainer_of(memory)
            if trainer is not None:
                trainer.hurry()

    # --- hosts ------------------------------------------------------------------------------------

    def add_host(self, domain: str = "") -> Host:
        """A new machine with empty memory, and a daemon on it."""
        host = Host(self, f"n{len(self.hosts)}", domain)
        self.hosts[host.label] = host
        host.start()
        return host

    def living(self) -> list[Host]:
        """Machines that are there."""
        return [host for host in self.hosts.values() if not host.lost]

    def host_at(self, address: str) -> Host | None:
        host = self.hosts.get(address.partition(":")[0])
        return None if host is None or host.lost else host

    def loop_of(self, host: Host) -> Loop:
        assert host.daemon is not None
        return host.daemon.loop

    def lose(self, host: Host) -> None:
        """A machine is gone with its memory and everything that ran on it."""
        self.note(host.label, "is lost")
        host.lost = True
        host.kill()
        self.checker.rotted(host.node)
        self.job.host_lost(host)
        with self.checker.fault():
            for memory in list(host.memory.values()):
                self.checker.forget(memory)
            host.memory.clear()

    def daemon_died(self, host: Host) -> None:
        """Whoever runs the machines starts the next one before long."""
        self.job.daemon_died(host)
        self.job.loop.call_later(self.luck.uniform(0.02, 0.5), self._start_again, host)

    def _start_again(self, host: Host) -> None:
        if not host.lost and not host.up:
            host.start()

    def calm(self) -> None:
        """The network is as it should be."""
        self.post.weather.cuts.clear()
        self.post.weather = Weather()

    def arena_made(self, host: Host, memory: Memory) -> None:
        self.checker.know(host, memory)

    def arena_gone(self, host: Host, memory: Memory) -> None:
        self.note(host.label, "frees", memory.arena_id.hex()[:6])
        self.checker.freed(host, memory)

    def slot_changed(self, memory: Memory, index: int, before: SlotInfo, after: SlotInfo) -> None:
        if self.trace is not None:
            name = after if after.step else before
            what = f"g{name.generation}:{name.step} of rank {name.rank}"
            states = f"{NAMES.get(before.state, '?')} -> {NAMES.get(after.state, '?')}"
            self.note(self.checker.where(memory), f"slot {index}", what, states)
        self.checker.changed(memory, index, before, after)

    def word_said(self, memory: Memory, word: str, value: int) -> None:
        if self.trace is not None:
            self.note(self.checker.where(memory), word, value)
        self.checker.said(memory, word, value)
