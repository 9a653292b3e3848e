"""What a training loop feels of being saved: snapshotd against no guard, `torch.save` and `dcp.async_save`.

    python benchmarks/stall.py [--quick] [--json] [--check] [--nodes N]

A real loop (`benchmarks/loop.py`: linear layers, autograd, AdamW, one thread of compute, two cores) runs in a fresh
process for each way of saving, the ways taking turns in every round. Each process alternates blocks of steps that save
with blocks that do not; a block's cost is its mean step over the mean of the two blocks around it, so that slow drift
of the machine cancels. The first step of a block is not counted, since the last copy may still run in it.

    call     time inside `guard.step()`, `torch.save(...)` or `async_save(...)`, state_dict() included
    host     the part of guard.step() that captures host state (random generators, hyperparameters, ...)
    wait     time in the optimizer's pre-hook until the copy is over
    stall    call + wait: what the loop stands still for
    step     a whole step, and its ratio to one without a save: the stall, and what the copy beside it costs
    cpu      the same ratio in CPU time of the training thread, which other programs on the machine disturb less

With `--nodes N` the loop is one rank of a job of N nodes with one parity: the other nodes run beside it on the second
core, each with its daemon and a trainer that holds as much and computes next to nothing (`benchmarks/idle.py`), and the
question is what encoding adds to one node without it and to a loop without a guard.

Everything is written to shared memory. `--check` exits 1 and names each target that was missed. docs/benchmarks.md says
what the numbers mean.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys

# A sibling has the name of a module of the standard library, which must be found first.
sys.path[:] = [os.path.dirname(entry) if os.path.exists(f"{entry}/stall.py") else entry for entry in sys.path]

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.copy import machine
from benchmarks.loop import SAVERS, Spec
from benchmarks.support import Bench, Neighbours, bench, death_seen_ms

STEP_1K_MAX_MS, STEP_10K_MAX_MS = 2.0, 10.0
LOOP_RATIO_MAX = 1.02
STALL_RATIO_MAX = 1 / 20
FIRST_RATIO_MAX = 1.25
DEATH_MAX_MS = 100.0
NODES_LOOP_RATIO_MAX = 1.05
CORES = 2
BLOCK_STEPS = 3
NODES_BLOCK_STEPS = 8  # a block has several snapshots, though encoding lasts longer than a step where all share a core
NODES_MAX = 8

HEAD = (
    "            saves/of                       call   host    wait    stall  (first)    copy (first)    step"
    "       with / without saves    cpu"
)

Steps = list[dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """A state: `layers` square weights with two moments and a step count each, so four tensors a layer."""

    name: str
    layers: int
    width: int
    batch: int

    @property
    def bytes(self) -> int:
        return self.layers * (3 * self.width**2 + 1) * 4

    @property
    def tensors(self) -> int:
        return 4 * self.layers

    @property
    def shape(self) -> dict[str, int]:
        return {"layers": self.layers, "width": self.width, "batch": self.batch}


SMALL = Size("200 MB", 250, 258, 128)
LARGE = Size("1 GB", 250, 577, 128)
MANY = Size("1 GB in 10,000", 2500, 183, 48)


@dataclass(frozen=True)
class Spread:
    """A median and the middle half around it."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> Spread:
        scaled = sorted(value * scale for value in values)
        low, _, high = statistics.quantiles(scaled, n=4) if len(scaled) > 1 else (scaled[0],) * 3
        return cls(round(statistics.median(scaled), 4), round(low, 4), round(high, 4), len(scaled))


@dataclass(frozen=True)
class Row:
    """One way of saving one state. Times in ms; the first save's next to those of the later ones."""

    size: str
    contestant: str
    step: Spread
    ratio: Spread
    cpu_ratio: Spread
    call: Spread
    call_without_host: Spread
    host: Spread
    wait: Spread
    stall: Spread
    copy: Spread | None
    first_stall: Spread
    first_copy: Spread | None
    first_over_later: Spread | None
    saves: int
    steps: int
    commits: int | None


@dataclass(frozen=True)
class Save:
    """One save: the call, the part of it that captured host state, what the optimizer waited, and the copy itself."""

    call_s: float
    host_s: float
    wait_s: float
    copy_s: float


@dataclass(frozen=True)
class Target:
    """What must be reached, and whether it was."""

    name: str
    value: float
    limit: float

    @property
    def reached(self) -> bool:
        return self.value <= self.limit


# --- measuring ------------------------------------------------------------------------------------


def measure_nodes(here: Bench, rounds: int, quick: bool) -> list[Row]:
    """The loop without a guard, on one node, and as one of several nodes that encode."""
    count = len(here.nodes)
    pairs = dict.fromkeys(("no guard", "snapshotd", nodes_name(count)), 2 if quick else 5)
    return measure(here, SMALL, pairs, rounds, steps=NODES_BLOCK_STEPS)


def nodes_name(count: int) -> str:
    """The contestant that is one of several nodes."""
    return f"{count} nodes"


def measure_all(here: Bench, rounds: int, quick: bool) -> list[Row]:
    """Every table. What a target asks of snapshotd to the percent gets more blocks than what is ten times slower."""
    if quick:
        small = {"no guard": 3, "snapshotd": 3, "dcp thread": 1, "dcp process": 1}
        rows = measure(here, SMALL, small, rounds)
        return rows + measure(here, LARGE, {"snapshotd": 3}, rounds) + measure(here, MANY, {"snapshotd": 1}, rounds)
    ours, rivals = ["no guard", "snapshotd"], [name for name in SAVERS if name not in ("no guard", "snapshotd")]
    rows = measure(here, SMALL, dict.fromkeys(ours, 8) | dict.fromkeys(rivals, 2), rounds, firsts=3)
    rows += measure(here, LARGE, dict.fromkeys(ours, 5), rounds, firsts=3)
    rows += measure(here, LARGE, dict.fromkeys(rivals, 2), 1)
    return rows + measure(here, MANY, {"snapshotd": 2}, rounds)


def measure(
    here: Bench, size: Size, pairs: Mapping[str, int], rounds: int, firsts: int = 0, steps: int = BLOCK_STEPS
) -> list[Row]:
    """Every contestant in every round, in an order that turns. `pairs`: how many blocks of each save.

    A process has one first copy: `firsts` more processes of snapshotd say what is usual.
    """
    contestants = list(pairs)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for number in range(rounds):
        for place in range(len(contestants)):
            name = contestants[(place + number) % len(contestants)]
            print(f"  {size.name}: {name}, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            runs[name].append(here.run(spec_of(here, size, name, pairs=pairs[name], steps=steps)))
    for _ in range(firsts):
        runs["snapshotd"].append(here.run(here.spec("snapshotd", **size.shape, pairs=0)))
    return [row_of(size, name, found) for name, found in runs.items()]


def spec_of(here: Bench, size: Size, name: str, **more: int) -> Spec:
    if name == nodes_name(len(here.nodes)):
        return here.spec("snapshotd", **size.shape, nodes=len(here.nodes), **more)
    return here.spec(name, **size.shape, **more)


def row_of(size: Size, contestant: str, runs: Sequence[dict[str, Any]]) -> Row:
    saving = [step for run in runs for step in run["steps"] if step["counted"] and step["saving"]]
    firsts, later = [], []
    for run in runs:
        first, *others = saves_in(run["steps"])
        firsts.append(first)
        later += others
    copies = any(save.copy_s for save in later)
    return Row(
        size=size.name,
        contestant=contestant,
        step=Spread.of([step["step_s"] for step in saving], 1e3),
        ratio=Spread.of([ratio for run in runs for ratio in ratios(run["steps"], "step_s")]),
        cpu_ratio=Spread.of([ratio for run in runs for ratio in ratios(run["steps"], "cpu_s")]),
        call=Spread.of([save.call_s for save in later], 1e3),
        call_without_host=Spread.of([save.call_s - save.host_s for save in later], 1e3),
        host=Spread.of([save.host_s for save in later], 1e3),
        wait=Spread.of([save.wait_s for save in later], 1e3),
        stall=Spread.of([save.call_s + save.wait_s for save in later], 1e3),
        copy=Spread.of([save.copy_s for save in later], 1e3) if copies else None,
        first_stall=Spread.of([save.call_s + save.wait_s for save in firsts], 1e3),
        first_copy=Spread.of([save.copy_s for save in firsts], 1e3) if copies else None,
        first_over_later=Spread.of([first_over_later(run["steps"]) for run in runs]) if copies else None,
        saves=sum(step["saved"] for step in saving),
        steps=len(saving),
        commits=sum(run["end"]["commits"] for run in runs) if all("commits" in run["end"] for run in runs) else None,
    )


def saves_in(steps: Steps) -> list[Save]:
    """Every save, in order. How long its copy took and was waited for is seen in the step after the call."""
    pairs = itertools.pairwise(steps)
    return [Save(a["call_s"], a["host_s"], b["wait_s"], b["copy_s"]) for a, b in pairs if a["saved"]]


def first_over_later(steps: Steps) -> float:
    """Duration of a process's first copy over that of its later ones."""
    first, *later = (save.copy_s for save in saves_in(steps))
    return first / statistics.median(later)


def ratios(steps: Steps, what: str) -> list[float]:
    """Mean of each block that saves over the mean of the blocks before and after it."""
    blocks: dict[int, list[float]] = {}
    for step in steps:
        if step["counted"]:
            blocks.setdefault(step["block"], []).append(step[what])
    means = {block: statistics.fmean(found) for block, found in blocks.items()}
    return [means[b] / statistics.fmean((means[b - 1], means[b + 1])) for b in sorted(means) if b % 2 == 1]


# --- judging --------------------------------------------------------------------------------------


def targets_of(rows: Sequence[Row], deaths_ms: Sequence[float]) -> list[Target]:
    """The targets that these measurements can tell about."""
    found = {(row.size, row.contestant): row for row in rows}
    targets = []
    for size, limit_ms in ((LARGE, STEP_1K_MAX_MS), (MANY, STEP_10K_MAX_MS)):
        if row := found.get((size.name, "snapshotd")):
            name = f"guard.step() without host state, ms, 1 GB in {size.tensors} tensors"
            targets.append(Target(name, row.call_without_host.median, limit_ms))
    for size in (SMALL, LARGE):
        if row := found.get((size.name, "snapshotd")):
            assert row.copy is not None and row.first_over_later is not None
            targets.append(Target(f"copy over step, {size.name}", row.copy.median / row.step.median, 0.8))
            targets.append(
                Target(f"step with over step without a guard, {size.name}", row.ratio.median, LOOP_RATIO_MAX)
            )
            first = row.first_over_later.median
            targets.append(Target(f"first copy over later ones, {size.name}", first, FIRST_RATIO_MAX))
    rivals = [
        row.stall.median for row in rows if row.size == SMALL.name and row.contestant in ("dcp thread", "dcp process")
    ]
    if rivals:
        ours = found[SMALL.name, "snapshotd"].stall.median
        targets.append(Target(f"stall over dcp.async_save's, {SMALL.name}", ours / min(rivals), STALL_RATIO_MAX))
    if deaths_ms:
        targets.append(Target("death seen, ms", statistics.median(deaths_ms), DEATH_MAX_MS))
    return [replace(target, value=round(target.value, 4)) for target in targets]


def nodes_targets(rows: Sequence[Row], count: int) -> list[Target]:
    """What encoding beside a loop may cost it: nothing in the call, and little in the step."""
    row = next(row for row in rows if row.contestant == nodes_name(count))
    return [
        Target(
            f"guard.step() without host state, ms, {row.size}, {count} nodes",
            row.call_without_host.median,
            STEP_1K_MAX_MS,
        ),
        Target(
            f"step with over step without a guard, {row.size}, {count} nodes", row.ratio.median, NODES_LOOP_RATIO_MAX
        ),
    ]


# --- telling --------------------------------------------------------------------------------------


def print_tables(rows: Sequence[Row]) -> None:
    for size in (SMALL, LARGE, MANY):
        found = [row for row in rows if row.size == size.name]
        if found:
            print(f"\n{size.bytes / 1e6:.0f} MB in {size.tensors} tensors (AdamW): medians (middle half), times in ms")
            print(HEAD)
        for row in found:
            copy, first = (f"{one.median:.1f}" if one else "-" for one in (row.copy, row.first_copy))
            print(
                f"{row.contestant:12}{f'{row.saves}/{row.steps}':>8}  {shown(row.call):>27}{row.host.median:7.2f}"
                f"{row.wait.median:8.2f}{row.stall.median:9.2f}{row.first_stall.median:9.2f}{copy:>8}{first:>8}"
                f"{row.step.median:8.0f}  {shown(row.ratio, 3):>23}{row.cpu_ratio.median:7.3f}"
            )


def shown(spread: Spread, digits: int = 2) -> str:
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f} .. {spread.high:.{digits}f})"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--quick", action="store_true", help="one short round, fewer ways of saving")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the job (1); more: what encoding costs a loop")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way of saving (2)")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.nodes <= NODES_MAX:
        parser.error(f"--nodes is {arguments.nodes}; it must lie between 1 and {NODES_MAX}, all on this machine")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    rounds = 1 if arguments.quick else max(1, arguments.rounds)
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    neighbours = Neighbours()
    with bench(arguments.nodes, cores) as here:
        if arguments.nodes > 1:
            rows, deaths_ms = measure_nodes(here, rounds, arguments.quick), []
        else:
            rows = measure_all(here, rounds, arguments.quick)
            deaths_ms = [round(death_seen_ms(here, **LARGE.shape, workers=2), 2) for _ in range(rounds)]
    targets = nodes_targets(rows, arguments.nodes) if arguments.nodes > 1 else targets_of(rows, deaths_ms)
    others = neighbours.cores()
    if arguments.json:
        document = {
            "machine": machine(),
            "cores": CORES,
            "nodes": arguments.nodes,
            "rounds": rounds,
            "others_used_cores": others,
            "rows": [asdict(row) for row in rows],
            "death_seen_ms": deaths_ms,
            "targets": [asdict(target) | {"reached": target.reached} for target in targets],
        }
        print(json.dumps(document))
    else:
        print(f"{machine()}; {CORES} cores, one thread of compute, {rounds} rounds of fresh processes that take turns")
        print(f"other programs used {others} cores meanwhile")
        print_tables(rows)
        print()
        if deaths_ms:
            seen = ", ".join(f"{ms:.1f}" for ms in deaths_ms)
            print(f"death of a trainer of 1 GB, seen by the daemon after {seen} ms\n")
        for target in targets:
            print(
                f"{'ok' if target.reached else 'MISSED':6}  {target.name}: {target.value:g} (at most {target.limit:g})"
            )
    return 1 if arguments.check and not all(target.reached for target in targets) else 0


if __name__ == "__main__":
    sys.exit(main())
