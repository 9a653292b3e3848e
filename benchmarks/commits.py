"""How many steps commit when several nodes protect each other, and how many attempts are given up.

    python benchmarks/commits.py [--quick] [--json] [--check]

Four nodes on this machine, parity 2, a rank each with the real guard, in lockstep by an all-reduce: a step takes
100 ms, nearly all of it asleep, so the cores are free for copying and encoding. Once with a state that is encoded well
within a step, and once with one whose encoding takes longer.

    share    commits over steps
    aborts   attempts that were given up, over all that were decided, as `snapshotd status` of the coordinator counts
    step     from one guard.step() to the next
    copy     of the trainer's state into its arena, beside the loop
    commit   from the moment a rank's copy is published until its own arena says that the step is committed

What happens in the arenas is seen from outside, once a millisecond. `--check` exits 1 and names each target that was
missed. docs/benchmarks.md says what the numbers mean.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys

# A sibling has the name of a module of the standard library, which must be found first.
sys.path[:] = [os.path.dirname(entry) if os.path.exists(f"{entry}/commits.py") else entry for entry in sys.path]

import argparse
import contextlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import idle
from benchmarks.copy import machine
from benchmarks.nodes import PATIENCE_S, Nodes, nodes, until
from snapshotd import _native
from snapshotd.arena import PARITY_INDEX

NODES, PARITY = 4, 2
STEP_S = 0.1
STEPS, QUICK_STEPS = 200, 40
LOOK_EVERY_S = 0.001
PUBLISHED = (_native.FULL, _native.PROTECTED, _native.COMMITTED)
SHARE_MIN, ABORT_RATIO_MAX = 0.5, 0.05


@dataclass(frozen=True)
class Size:
    """A state of `layers` square weights with two moments each. `target` is the one that it is measured for."""

    name: str
    layers: int
    target: str
    width: int = 258

    @property
    def bytes(self) -> int:
        return self.layers * 3 * self.width**2 * 4


SIZES = (Size("16 MB", 20, "share"), Size("64 MB", 80, "aborts"))


@dataclass(frozen=True)
class Times:
    """Median and 95th percentile, in ms."""

    median: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times | None:
        """None where there is nothing to tell."""
        if not seconds:
            return None
        last = sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
        return cls(round(statistics.median(seconds) * 1e3, 2), round(last * 1e3, 2))


@dataclass(frozen=True)
class Row:
    """What became of the steps of one state."""

    size: str
    bytes: int
    steps: int
    commits: int
    aborts: int
    share: float
    abort_ratio: float
    step_ms: Times | None
    call_ms: Times | None
    copy_ms: Times | None
    commit_ms: Times | None
    failures: int


@dataclass(frozen=True)
class Target:
    """What must be reached, and whether it was."""

    name: str
    value: float
    limit: float
    least: bool

    @property
    def reached(self) -> bool:
        return self.value >= self.limit if self.least else self.value < self.limit


# --- what the arenas show ---------------------------------------------------------------------------


class Watched:
    """A rank's arena, looked at from outside: when each step was published there, and when it was committed."""

    def __init__(self, arena: _native.Arena) -> None:
        self.arena = arena
        self.newest = arena.committed_step
        self.latencies_s: list[float] = []
        self._published_s: dict[int, float] = {}
        self._met = {slot.step for slot in self._slots()}  # nobody saw when these were published

    def _slots(self) -> list[_native.SlotInfo]:
        return [self.arena.slot(index) for index in range(self.arena.slots)]

    def look(self) -> None:
        now_s = time.perf_counter()
        for slot in self._slots():
            if slot.state in PUBLISHED and slot.step not in self._met:
                self._met.add(slot.step)
                self._published_s[slot.step] = now_s
        committed = self.arena.committed_step
        if committed > self.newest:
            self.newest = committed
            if committed in self._published_s:
                self.latencies_s.append(now_s - self._published_s[committed])


def arena_in(memory: Path) -> _native.Arena | None:
    """The arena of the one rank of a node, mapped for reading; None while there is none."""
    for path in memory.glob("*.arena"):
        with contextlib.suppress(OSError, _native.ArenaFormatError):  # it is being made, or has just been freed
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                arena = _native.Arena(fd, writable=False)
            finally:
                os.close(fd)
            if arena.local_index != PARITY_INDEX:
                return arena
            arena.close()
    return None


def watched(here: Nodes) -> list[Watched]:
    """The arenas of all ranks, once each has committed: by then it has its final size."""
    found: list[Watched] = []
    for node in here:
        arena = arena_in(node.memory)
        if arena is None or not arena.committed_step:
            return []
        found.append(Watched(arena))
    return found


# --- measuring --------------------------------------------------------------------------------------


def measure(here: Nodes, size: Size, steps: int) -> Row:
    """A run of its own, from fresh trainers to freed memory."""
    print(f"  {size.name}, {steps} steps", file=sys.stderr, flush=True)
    job = f"commits-{size.layers}"
    folder = here.folder / job
    folder.mkdir()
    specs = [
        idle.Spec(
            job, rank, NODES, str(node.socket), str(folder / "rendezvous"), size.layers, size.width, PARITY,
            result=str(folder / f"result-{rank}.json"), step_s=STEP_S,
        )
        for rank, node in enumerate(here)
    ]  # fmt: skip
    logs = [folder / f"log-{rank}" for rank in range(NODES)]
    with contextlib.ExitStack() as stack:
        trainers = [stack.enter_context(idle.started(spec, log)) for spec, log in zip(specs, logs, strict=True)]

        def alive() -> bool:
            return all(one.poll() is None for one in trainers)

        until(lambda: bool(watched(here)), "a first commit on every node", alive, logs[0])
        watches = watched(here)
        before, first, began_s = here[0].generation(job), watches[0].arena.passed, time.perf_counter()
        watch(watches, first + steps)
        after, last, ended_s = here[0].generation(job), watches[0].arena.passed, time.perf_counter()
        for one in watches:
            one.arena.close()
        for trainer in trainers:
            assert trainer.stdin is not None
            trainer.stdin.close()
        if any(trainer.wait() for trainer in trainers):
            raise SystemExit("a trainer failed:\n" + "\n".join(log.read_text() for log in logs))
    here.wait_until_bare(job)
    assert before is not None and after is not None
    results = [json.loads(Path(spec.result).read_text()) for spec in specs]
    return row_of(size, last - first, before, after, watches, results, (began_s, ended_s))


def watch(watches: Sequence[Watched], last: int) -> None:
    """Look at all arenas until their ranks are past this step."""
    deadline_s = time.monotonic() + PATIENCE_S
    while watches[0].arena.passed < last:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"the ranks did not get past step {last}: they stand at {watches[0].arena.passed}")
        for one in watches:
            one.look()
        time.sleep(LOOK_EVERY_S)


def row_of(
    size: Size,
    steps: int,
    before: dict[str, Any],
    after: dict[str, Any],
    watches: Sequence[Watched],
    results: Sequence[dict[str, Any]],
    window_s: tuple[float, float],
) -> Row:
    """`before` and `after` are what the coordinator's status said at the ends of the window."""
    commits, aborts = (after[what] - before[what] for what in ("commits", "aborts"))
    inside = [[one for one in result["steps"] if window_s[0] <= one["at_s"] <= window_s[1]] for result in results]
    return Row(
        size=size.name,
        bytes=size.bytes,
        steps=steps,
        commits=commits,
        aborts=aborts,
        share=round(commits / steps, 3),
        abort_ratio=round(aborts / max(1, commits + aborts), 4),
        step_ms=Times.of([b["at_s"] - a["at_s"] for own in inside for a, b in itertools.pairwise(own)]),
        call_ms=Times.of([one["call_s"] for own in inside for one in own if one["taken"]]),
        copy_ms=Times.of([one["copy_s"] for own in inside for one in own if one["copy_s"]]),
        commit_ms=Times.of([latency_s for one in watches for latency_s in one.latencies_s]),
        failures=sum(result["end"]["failures"] for result in results),
    )


# --- judging and telling ----------------------------------------------------------------------------


def targets_of(rows: Sequence[Row]) -> list[Target]:
    share, aborts = ({size.name for size in SIZES if size.target == what} for what in ("share", "aborts"))
    return [Target(f"commits over steps, {r.size}", r.share, SHARE_MIN, True) for r in rows if r.size in share] + [
        Target(f"aborts over attempts, {r.size}", r.abort_ratio, ABORT_RATIO_MAX, False)
        for r in rows
        if r.size in aborts
    ]


def print_rows(rows: Sequence[Row]) -> None:
    print("          steps  commits  aborts  share  aborts/tried        step        call        copy        commit")
    for row in rows:
        times = "".join(
            f"{f'{one.median:.1f} ({one.p95:.1f})' if one else '-':>{width}}"
            for one, width in ((row.step_ms, 15), (row.call_ms, 12), (row.copy_ms, 12), (row.commit_ms, 16))
        )
        print(
            f"{row.size:8}{row.steps:7}{row.commits:9}{row.aborts:8}{row.share:7.2f}{row.abort_ratio:14.3f}{times}"
            f"{f'   {row.failures} FAILURES' if row.failures else ''}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    arguments = parser.parse_args(argv)
    steps = QUICK_STEPS if arguments.quick else STEPS
    with nodes("commits", NODES) as here:
        rows = [measure(here, size, steps) for size in SIZES]
    targets = targets_of(rows)
    if arguments.json:
        document = {
            "machine": machine(),
            "nodes": NODES,
            "parity": PARITY,
            "step_s": STEP_S,
            "rows": [asdict(row) for row in rows],
            "targets": [asdict(target) | {"reached": target.reached} for target in targets],
        }
        print(json.dumps(document))
    else:
        print(f"{machine()}\n\n{NODES} nodes on it, parity {PARITY}; times in ms: median (95th percentile)\n")
        print_rows(rows)
        print()
        for one in targets:
            word, limit = "ok" if one.reached else "MISSED", "at least" if one.least else "below"
            print(f"{word:6}  {one.name}: {one.value:g} ({limit} {one.limit:g})")
    return 1 if arguments.check and not all(target.reached for target in targets) else 0


if __name__ == "__main__":
    sys.exit(main())
