"""How long a node is without its daemon: one that was killed is started again, over 4 GiB of arenas that it adopts.

    adopted  from the start of the process until it answers that the job's last commit is there, a trainer holding it
    bare     from the start of the process until it answers, with nothing to adopt: Python and its imports, mostly

The two take turns on one machine; medians and the middle half of the rounds are shown. `--check` exits 1 where adoption
misses its target, which is a time: a node whose daemon is away takes no snapshots meanwhile.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys

# A sibling has the name of a module of the standard library, which must be found first.
sys.path[:] = [os.path.dirname(entry) if os.path.exists(f"{entry}/adopt.py") else entry for entry in sys.path]

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from benchmarks.copy import machine
from benchmarks.holder import Holder, protect_together
from benchmarks.nodes import Node, nodes, until
from snapshotd import wire
from snapshotd.errors import DaemonUnavailable

SLOT_BYTES, QUICK_BYTES = 2 << 30, 256 << 20  # an arena has two slots
ROUNDS, QUICK_ROUNDS = 7, 3
ADOPTED_S_MAX = 2.0
PATIENCE_S = 60.0
LOOK_EVERY_S = 0.005
JOB = "benchmark"
SNAPSHOTS = [wire.SnapshotId(wire.GenerationId(1, bytes(16)), step) for step in (1, 2)]


@dataclass(frozen=True)
class Result:
    """Seconds, their median and middle half, and what adoption takes of a bare start."""

    adopted_s: float
    adopted_s_spread: tuple[float, float]
    bare_s: float
    ratio: float
    target_s: float

    @property
    def reached(self) -> bool:
        return self.adopted_s <= self.target_s


def started_s(node: Node, is_there: Callable[[Node], bool]) -> float:
    """Kill a node's daemon and start it; the seconds until what is asked for is there. SystemExit if it never is."""
    node.restart()
    began_s = time.perf_counter()
    while time.perf_counter() < began_s + PATIENCE_S:
        with contextlib.suppress(DaemonUnavailable):
            if is_there(node):
                return time.perf_counter() - began_s
        time.sleep(LOOK_EVERY_S)
    raise SystemExit(f"the daemon did not come back, see:{os.linesep}{node.log.read_text()}")


def has_commit(node: Node) -> bool:
    """It answers, and has the last commit. SystemExit where it answers without: adoption comes before the first answer,
    so it would never have it."""
    generation = node.generation(JOB)
    if generation is None or generation["committed_step"] != SNAPSHOTS[-1].step:
        raise SystemExit(f"the daemon came back without the last commit: {generation}")
    return True


def answers(node: Node) -> bool:
    return bool(node.status())


def measure(slot_bytes: int, rounds: int) -> Result:
    """Both starts in turns."""
    data = os.urandom(1 << 20) * (slot_bytes >> 20)
    with nodes("adopt", 1) as full, nodes("adopt-bare", 1) as bare:
        holder = Holder(full[0].socket, JOB, 0)
        try:
            protect_together([holder], SNAPSHOTS[0], [data], slot_bytes, 0)
            holder.take(SNAPSHOTS[1], 1, data)
            until(lambda: holder.arena.committed_step == SNAPSHOTS[1].step, f"the commit of {SNAPSHOTS[1]}")
            holder.door.close()
            times = [(started_s(full[0], has_commit), started_s(bare[0], answers)) for _ in range(rounds)]
        finally:
            holder.close()
    low, median, high = statistics.quantiles((adopted for adopted, _ in times), n=4)
    return Result(
        adopted_s=round(median, 3),
        adopted_s_spread=(round(low, 3), round(high, 3)),
        bare_s=round(statistics.median(plain for _, plain in times), 3),
        ratio=round(statistics.median(adopted / plain for adopted, plain in times), 3),
        target_s=ADOPTED_S_MAX,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller arena and fewer rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 where adoption misses its target")
    arguments = parser.parse_args()
    slot_bytes, rounds = (QUICK_BYTES, QUICK_ROUNDS) if arguments.quick else (SLOT_BYTES, ROUNDS)
    result = measure(slot_bytes, rounds)
    if arguments.json:
        found = asdict(result) | {"reached": result.reached, "arena_bytes": 2 * slot_bytes, "rounds": rounds}
        print(json.dumps({"machine": machine(), "adopt": found}))
    else:
        low, high = result.adopted_s_spread
        print(f"{machine()}\n")
        print(f"a daemon over an arena of {2 * slot_bytes >> 20} MiB, medians of {rounds} rounds in turns\n")
        print(f"adopted  {result.adopted_s:.3f} s   ({low:.3f} .. {high:.3f})   at most {result.target_s} s", end="")
        print("" if result.reached else "   MISSED")
        print(f"bare     {result.bare_s:.3f} s   adopted over bare: {result.ratio:.2f}")
    return 1 if arguments.check and not result.reached else 0


if __name__ == "__main__":
    sys.exit(main())
