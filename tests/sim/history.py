"""One seed, one history: a world is set up, faults happen, all is healed, and the job has to go on. What fails is made
shorter: faults that are not needed for it are left out."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.sim.faults import Fault, Nemesis, drawn
from tests.sim.invariants import Violation
from tests.sim.job import dealt
from tests.sim.world import World

HEALING_S = 30.0
EVENTS_MAX = 400_000
TRACE_LINES = 60
SHRINK_RUNS_MAX = 60
WAITS = "the job waits"


@dataclass
class History:
    """What became of a seed. `broken` says what does not hold. `waits`: the job waits for machines in it."""

    seed: int
    size: float
    waits: bool = False
    broken: str = ""
    faults: list[Fault] = field(default_factory=list)
    events: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    transitions: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    trace: list[tuple[Any, ...]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Of the trace, byte for byte."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def text(self) -> str:
        """The trace."""
        return "\n".join(" ".join(map(str, line)) for line in self.trace)


def play(
    seed: int, size: float = 1.0, only: Sequence[int] | None = None, *, trace: bool = False, waits: bool = False
) -> History:
    """The history of a seed. `only` are the numbers of the faults that happen; all of them by default."""
    chance, horizon_s, faults = _drawn(seed, size, waits)
    if only is not None:
        faults = [faults[number] for number in only if number < len(faults)]
    history = History(seed, size, waits, faults=faults)
    world = World(seed, keep_trace=trace, waits=waits)
    quiet = logging.getLogger("snapshotd")
    disabled, quiet.disabled = quiet.disabled, True
    try:
        with world.watched():
            _set_up(world, chance)
            nemesis = Nemesis(world)
            nemesis.plan([fault for fault in faults if fault.kind != WAITS])
            for fault in faults:
                if fault.kind == WAITS:
                    world.job.loop.call_later(fault.at_s, nemesis.job_waits, fault)
            _until(world, lambda: world.queue.now_s >= horizon_s)
            nemesis.heal()
            _goes_on(world)
            _comes_back(world, nemesis, chance)
            if waits:
                _goes_on(world)
                _is_protected_anew(world, nemesis, chance)
    except Violation as error:
        history.broken = str(error)
        if error.__cause__ is not None and not isinstance(error.__cause__, Violation):
            history.broken += f" ({type(error.__cause__).__name__})"
    finally:
        world.end()
        quiet.disabled = disabled
    history.events, history.kinds, history.deaths = world.events, world.faults, world.deaths
    history.counts = world.checker.counts + world.job.counts
    history.transitions, history.trace = world.checker.transitions, world.trace or []
    for what, count in world.post.counts.items():
        if what != "sent":
            history.kinds[f"messages {what}"] += count
    return history


def _set_up(world: World, chance: random.Random) -> None:
    ranks = chance.randint(1, 6)
    wanted = dealt(chance, ranks)
    parity = chance.choice([0, 1, 1, 1, 2, 2])
    group_size = chance.choice([2, 3, 8, 8])
    sizes = [chance.randint(1, 9000) for _ in range(chance.randint(1, 3))]
    world.job.set_up(parity, group_size, chance.choice([1, 1, 2]), sizes, wanted)
    for _ in wanted:
        world.add_host()
    world.job.loop.call_later(0.02, world.job.launch)


def _until(world: World, done: Any) -> None:
    while not done():
        if not world.step() or world.events > EVENTS_MAX:
            raise Violation("time stands still: nothing is left to happen")


def _goes_on(world: World) -> None:
    """Nothing is wrong any more: something new is committed before long."""
    commits, until_s = world.checker.counts["commits"], world.queue.now_s + HEALING_S
    _until(world, lambda: world.checker.counts["commits"] > commits or world.queue.now_s > until_s)
    if world.checker.counts["commits"] <= commits:
        raise Violation(f"liveness: nothing was committed for {HEALING_S:g} s in which nothing was wrong")


def _comes_back(world: World, nemesis: Nemesis, chance: random.Random) -> None:
    """In the end as many machines are lost as can be borne, and the job is launched again: it has to restore."""
    nemesis.lose(Fault(0.0, "", chance.randrange(1 << 16), 0.0, (0.0, chance.random(), 0.0, 1.0)), 0)
    if world.job.run is not None:
        world.job.stop("the last launch")
    runs, until_s = world.job.counts["runs"], world.queue.now_s + HEALING_S
    _until(world, lambda: world.job.counts["runs"] > runs or world.queue.now_s > until_s)
    if world.job.counts["runs"] <= runs:
        raise Violation(f"liveness: the job was not launched again within {HEALING_S:g} s in which nothing was wrong")


def _is_protected_anew(world: World, nemesis: Nemesis, chance: random.Random) -> None:
    """Machines are lost, and none come in their place: where the others can, they make that good before long, bear
    another loss, and the job goes on."""
    job, checker = world.job, world.checker
    expected = checker.to_be_protected_anew(nemesis.lose_another, chance.randrange(1 << 16))
    job.held_until_s = world.queue.now_s + HEALING_S
    job.stop("no machines are left for it")
    until_s = world.queue.now_s + HEALING_S
    _until(world, lambda: checker.is_protected() or world.queue.now_s > until_s)
    if expected and not checker.is_protected():
        raise Violation(f"liveness: a job that waits was not protected anew within {HEALING_S:g} s")
    nemesis.lose_another(chance.randrange(1 << 16))
    job.held_until_s = 0.0
    runs, until_s = job.counts["runs"], world.queue.now_s + HEALING_S
    _until(world, lambda: job.counts["runs"] > runs or world.queue.now_s > until_s)
    if job.counts["runs"] <= runs:
        raise Violation(f"liveness: a job that waited was not launched again within {HEALING_S:g} s")
    _goes_on(world)


def shrunk(history: History) -> History:
    """The same violation with fewer faults, as far as a bounded number of tries finds one."""
    count = len(_drawn(history.seed, history.size, history.waits)[2])
    kept, tries = list(range(count)), 0
    kind = history.broken[:3]
    chunk = max(1, count // 2)
    while chunk and tries < SHRINK_RUNS_MAX:
        for first in range(0, len(kept), chunk):
            fewer = kept[:first] + kept[first + chunk :]
            tries += 1
            found = play(history.seed, history.size, fewer, waits=history.waits)
            if found.broken[:3] == kind:
                kept = fewer
                break
            if tries >= SHRINK_RUNS_MAX:
                break
        else:
            chunk //= 2
    best = play(history.seed, history.size, kept, trace=True, waits=history.waits)
    best.kept = kept
    return best


def _drawn(seed: int, size: float, waits: bool) -> tuple[random.Random, float, list[Fault]]:
    chance = random.Random(f"{seed} size")
    horizon_s = size * chance.uniform(1.0, 3.0)
    faults = drawn(seed, horizon_s, chance.uniform(0.5, 4.0))
    if not waits:
        return chance, horizon_s, faults
    waiting = random.Random(f"{seed} waits")
    begins_s, lasts_s = waiting.uniform(0.3, 1.0) * horizon_s, waiting.uniform(4.0, 12.0)
    wait = Fault(begins_s, WAITS, waiting.randrange(1 << 16), lasts_s, tuple(waiting.random() for _ in range(4)))
    meanwhile = drawn(seed, lasts_s, waiting.uniform(0.1, 1.0), "meanwhile")
    later = [fault._replace(at_s=fault.at_s + begins_s) for fault in meanwhile]
    return chance, begins_s + lasts_s + horizon_s, [*faults, wait, *later]


def report(history: History) -> str:
    """What failed, how to see it again, and the end of the shortened trace."""
    short = shrunk(history)
    only = ",".join(map(str, short.kept)) or "none"
    waits = " --waits" if history.waits else ""
    lines = [
        f"seed {history.seed}: {history.broken}",
        f"replay: .venv/bin/python -m tests.sim --seed {history.seed} --size {history.size:g}{waits} --only {only}",
        "faults:",
        *(f"  {fault}" for fault in short.faults),
        f"the last {TRACE_LINES} lines of the trace, without its inner moves:",
        *("  " + " ".join(map(str, line)) for line in [one for one in short.trace if one[1] != "·"][-TRACE_LINES:]),
    ]
    return "\n".join(lines)
