"""What the world does to the processes: drawn from the seed before a history begins, so that any of it can be left out.

A fault names what it hits by number, and whoever is there at that time is hit; where nobody fits, nothing happens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from snapshotd import geometry
from tests.sim.job import dealt
from tests.sim.memory import WHOLE, Memory
from tests.sim.network import Weather

if TYPE_CHECKING:
    from tests.sim.machine import Host
    from tests.sim.trainer import Trainer
    from tests.sim.world import World

KINDS = {
    "a daemon dies": 6,
    "a daemon dies at a crash point": 16,
    "a trainer dies": 8,
    "a trainer dies at a step": 6,
    "machines are lost": 8,
    "too many machines are lost": 1,
    "bits turn over": 6,
    "a partition": 4,
    "a one-way partition": 4,
    "bad weather": 8,
    "a slow machine": 3,
    "ranks skip": 4,
    "copies are given up": 3,
    "the job is moved": 6,
    "another world size": 1,
    "memory is full": 2,
    "the clock is set": 1,
    "the run is closed": 1,
}


class Fault(NamedTuple):
    """When, what, to whom, for how long. `draws` are numbers from 0 to 1 for whatever else there is to choose."""

    at_s: float
    kind: str
    who: int
    lasts_s: float
    draws: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.at_s:6.3f} s: {self.kind} (number {self.who}, for {self.lasts_s:.2f} s)"


def drawn(seed: int, horizon_s: float, rate: float, stream: str = "faults") -> list[Fault]:
    """The faults of a history, in order."""
    chance = random.Random(f"{seed} {stream}")
    found, at_s = [], chance.expovariate(rate)
    while at_s < horizon_s:
        (kind,) = chance.choices(list(KINDS), list(KINDS.values()))
        draws = tuple(chance.random() for _ in range(4))
        found.append(Fault(at_s, kind, chance.randrange(1 << 16), chance.uniform(0.05, 0.8), draws))
        at_s += chance.expovariate(rate) if chance.random() > 0.2 else 0.0
    return found


class Nemesis:
    """Carries faults out."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._deeds: dict[str, Callable[[Fault], bool]] = {
            "a daemon dies": self._daemon_dies,
            "a daemon dies at a crash point": self._daemon_dies_at,
            "a trainer dies": self._trainer_dies,
            "a trainer dies at a step": self._trainer_dies_at,
            "machines are lost": lambda fault: self.lose(fault, 0),
            "too many machines are lost": lambda fault: self.lose(fault, 1),
            "bits turn over": self._flip,
            "a partition": lambda fault: self._cut(fault, both=True),
            "a one-way partition": lambda fault: self._cut(fault, both=False),
            "bad weather": self._weather,
            "a slow machine": self._slow,
            "ranks skip": self._skip,
            "copies are given up": self._give_up,
            "the job is moved": self._move,
            "another world size": self._resize,
            "memory is full": self._fill,
            "the clock is set": self._set_clock,
            "the run is closed": self._close,
        }
        assert self._deeds.keys() == KINDS.keys()

    def plan(self, faults: Sequence[Fault]) -> None:
        """All of these will happen."""
        for fault in faults:
            self._world.job.loop.call_later(fault.at_s, self._do, fault)

    def _do(self, fault: Fault) -> None:
        self._world.note("FAULT", fault.kind, fault.who)
        if self._deeds[fault.kind](fault):
            self._world.faults[fault.kind] += 1

    def _later(self, fault: Fault, undo: Callable[[], object]) -> None:
        self._world.job.loop.call_later(fault.lasts_s, undo)

    def heal(self) -> None:
        """Nothing is wrong any more, but for what is lost."""
        world = self._world
        world.calm()
        for host in world.living():
            host.armed, host.full = 0, False
            self._set_slow(host, 1.0)
        if world.job.run is not None:
            world.job.run.giving_up = 0.0
            for trainer in world.job.run.trainers.values():
                trainer.skips, trainer.dies_in = 0, 0

    # --- who --------------------------------------------------------------------------------------

    def _host(self, fault: Fault) -> Host | None:
        hosts = [host for host in self._world.living() if host.up]
        return hosts[fault.who % len(hosts)] if hosts else None

    def _trainer(self, fault: Fault) -> Trainer | None:
        run = self._world.job.run
        living = [one for one in run.trainers.values() if not one.life.dead] if run is not None else []
        return living[fault.who % len(living)] if living else None

    # --- what -------------------------------------------------------------------------------------

    def _daemon_dies(self, fault: Fault) -> bool:
        host = self._host(fault)
        if host is not None:
            host.kill()
        return host is not None

    def _daemon_dies_at(self, fault: Fault) -> bool:
        host = self._host(fault)
        if host is not None:
            host.armed = 1 + int(fault.draws[0] ** 3 * 60)
        return host is not None

    def _trainer_dies(self, fault: Fault) -> bool:
        trainer = self._trainer(fault)
        if trainer is not None:
            trainer.run.member_lost(trainer, f"rank {trainer.rank} died")
        return trainer is not None

    def _trainer_dies_at(self, fault: Fault) -> bool:
        trainer = self._trainer(fault)
        if trainer is not None:
            trainer.dies_in = 1 + int(fault.draws[0] * 12)
        return trainer is not None

    def lose(self, fault: Fault, more: int) -> bool:
        """As many of a group as its parity bears, counted with what is lost already; or `more`."""
        world, duty = self._world, self._world.checker.duty
        members = {host.node: host for host in world.living() if host.memory}
        groups = world.checker.groups() or [sorted(members)]
        lost = False
        for number, group in enumerate(groups):
            parity = geometry.parity_for(world.job.parity, len(group))
            hit = len({part.position for part in duty.hit if part.group == number}) if duty is not None else 0
            left = max(0, parity - hit - world.checker.lost_since(group)) + more
            here = [members[node] for node in group if node in members]
            wanted = min(left, 1 + int(fault.draws[1] * left)) if left else 0
            if number and fault.draws[3] < 0.5:
                break
            for host in random.Random(fault.who + number).sample(here, min(wanted, len(here))):
                world.lose(host)
                lost = True
        return lost

    def job_waits(self, fault: Fault) -> None:
        """Machines are lost, and there are none in their place: the job is not launched before that time is over.
        Whatever can still be borne by then is lost too, once or twice."""
        world = self._world
        world.faults["the job waits"] += 1
        world.job.held_until_s = world.queue.now_s + fault.lasts_s
        world.job.stop("its machines are gone")
        self.lose(fault, 0)
        for share in (0.5 + 0.3 * fault.draws[2], 0.9)[: 1 + (fault.draws[3] < 0.5)]:
            world.job.loop.call_later(share * fault.lasts_s, self.lose_another, fault.who)

    def lose_another(self, who: int) -> bool:
        """A machine without which the judge still has all that it needs, by what stands in memory now."""
        world, duty = self._world, self._world.checker.duty
        hosts = [host for host in world.living() if host.memory]
        for host in random.Random(who).sample(hosts, len(hosts)) if duty is not None else []:
            seen = {one.node for one in hosts if one is not host}
            if duty is not None and world.checker.bearable(seen, ()) == duty.made:
                world.lose(host)
                world.faults["another machine is lost"] += 1
                return True
        return False

    def _flip(self, fault: Fault) -> bool:
        """In a slot of one machine: at most as much as one lost machine would take."""
        world, duty = self._world, self._world.checker.duty
        host = self._host(fault)
        places = _whole(host) if host is not None else []
        if duty is None or host is None or not places:
            return False
        group = next((one for one in world.checker.groups() if host.node in one), [])
        parity = geometry.parity_for(world.job.parity, len(group)) if group else 0
        taken = len({(part.group, part.position) for part in duty.hit}) + world.checker.lost_since(group)
        if taken >= parity and fault.draws[0] > 0.1:
            return False
        memory, index = places[int(fault.draws[1] * len(places))]
        with world.checker.fault():
            if fault.draws[2] < 0.25:
                memory.flip_description(index)
            else:
                memory.flip(index, int(fault.draws[2] * 1e9))
            world.checker.flipped()
        world.checker.rotted(host.node)
        return True

    def _cut(self, fault: Fault, *, both: bool) -> bool:
        hosts = [host.label for host in self._world.living()]
        chance = random.Random(fault.who)
        one = {label for label in hosts if chance.random() < 0.5} or set(hosts[:1])
        ends = {(a, b) for a in one for b in hosts if b not in one}
        if both:
            ends |= {(b, a) for a, b in ends}
        cuts = self._world.post.weather.cuts
        cuts |= ends
        self._later(fault, lambda: cuts.difference_update(ends))
        return bool(ends)

    def _weather(self, fault: Fault) -> bool:
        weather = self._world.post.weather
        weather.lost, weather.doubled = fault.draws[0] ** 2, fault.draws[1] ** 2
        weather.garbled, weather.broken_reads = fault.draws[2] ** 4, fault.draws[3] ** 4
        weather.delay_s = 0.002 + 0.2 * fault.draws[2] ** 3
        self._later(fault, self._clear_up)
        return True

    def _clear_up(self) -> None:
        weather = self._world.post.weather
        self._world.post.weather = Weather(cuts=weather.cuts)

    def _slow(self, fault: Fault) -> bool:
        host = self._host(fault)
        if host is None:
            return False
        self._set_slow(host, 1 + 30 * fault.draws[0] ** 2)
        self._later(fault, lambda: self._set_slow(host, 1.0))
        return True

    def _set_slow(self, host: Host, slow: float) -> None:
        host.slow = slow
        if host.daemon is not None:
            host.daemon.life.slow = slow

    def _skip(self, fault: Fault) -> bool:
        trainer = self._trainer(fault)
        if trainer is not None:
            trainer.skips = 1 + int(fault.draws[0] * 4)
        return trainer is not None

    def _give_up(self, fault: Fault) -> bool:
        run = self._world.job.run
        if run is None:
            return False
        run.giving_up = fault.draws[0]
        self._later(fault, lambda: setattr(run, "giving_up", 0.0))
        return True

    def _move(self, fault: Fault) -> bool:
        """The same ranks on another number of machines, or dealt anew."""
        job = self._world.job
        count = sum(job.wanted)
        job.wanted = dealt(random.Random(fault.who), count)
        return job.stop("the job is moved")

    def _resize(self, fault: Fault) -> bool:
        job = self._world.job
        job.wanted = dealt(random.Random(fault.who), sum(job.wanted) + 1)
        return job.stop("another world size is tried")

    def _fill(self, fault: Fault) -> bool:
        host = self._host(fault)
        if host is None:
            return False
        host.full = True
        self._later(fault, lambda: setattr(host, "full", False))
        return True

    def _set_clock(self, fault: Fault) -> bool:
        self._world.clock.set_by_s += 2000 * (fault.draws[0] - 0.5)
        return True

    def _close(self, fault: Fault) -> bool:
        return self._world.job.close_run()


def _whole(host: Host) -> list[tuple[Memory, int]]:
    return [
        (memory, index)
        for _, memory in sorted(host.memory.items())
        for index, slot in enumerate(memory.slots)
        if slot.state in WHOLE and slot.file_bytes
    ]
