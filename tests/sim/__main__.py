"""`make soak SECONDS=…`: histories until told, and what they saw. `python -m tests.sim --seed 7`: one again."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.sim.history import History, play, report

REACHED = (
    "shard EMPTY -> FILLING", "shard FILLING -> EMPTY", "shard FILLING -> FULL", "shard FULL -> PROTECTED",
    "shard FULL -> COMMITTED", "shard PROTECTED -> COMMITTED", "shard FULL -> EMPTY", "shard PROTECTED -> EMPTY",
    "shard COMMITTED -> EMPTY", "shard rotten FULL -> EMPTY", "shard rotten COMMITTED -> EMPTY",
    "shard FULL -> gone", "shard PROTECTED -> gone", "shard COMMITTED -> gone",
    "parity EMPTY -> FILLING", "parity FILLING -> EMPTY", "parity FILLING -> FULL", "parity FULL -> COMMITTED",
    "parity FULL -> EMPTY", "parity COMMITTED -> EMPTY", "parity rotten FULL -> EMPTY",
    "parity rotten COMMITTED -> EMPTY", "parity COMMITTED -> gone", "parity FULL -> gone",
    "foster EMPTY -> FILLING", "foster FILLING -> EMPTY", "foster FILLING -> FULL", "foster FULL -> gone",
    "foster-parity EMPTY -> FILLING", "foster-parity FILLING -> EMPTY", "foster-parity FILLING -> FULL",
    "foster-parity FULL -> gone",
)  # fmt: skip
"""Every way a slot may go; a long run has to see all of them."""
COUNTED = (
    "protected anew",
    "commits",
    "aborts",
    "naming",
    "restored",
    "rebuilt",
    "lost",
    "rebuild corrupt",
    "rebuild failed",
)


WAITS_EVERY = 3


class Totals:
    """What all histories of a run saw."""

    def __init__(self) -> None:
        self.histories = self.events = 0
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.transitions: Counter[str] = Counter()
        self.deaths: Counter[str] = Counter()

    def add(self, one: History) -> None:
        """One more."""
        self.histories, self.events = self.histories + 1, self.events + one.events
        self.faults += one.kinds
        self.counts += one.counts
        self.transitions += one.transitions
        self.deaths += one.deaths

    def missing(self) -> list[str]:
        """What was never reached."""
        return [name for name in REACHED if not self.transitions[name]] + [
            name for name in COUNTED if not self.counts[name]
        ]

    def told(self, seconds: float) -> str:
        """For people."""
        lines = [
            f"{self.histories} histories, {self.events} events in {seconds:.0f} s, {self.events / seconds:.0f} events/s"
        ]
        for title, counter in (
            ("faults", self.faults), ("daemons that died at", self.deaths), ("counted", self.counts),
            ("transitions of slots", self.transitions),
        ):  # fmt: skip
            lines += [f"{title}:", *(f"  {count:9}  {name}" for name, count in sorted(counter.items()))]
        missing = self.missing()
        reached = len(REACHED) + len(COUNTED) - len(missing)
        lines.append(f"coverage: {reached} of {len(REACHED) + len(COUNTED)} states and transitions were reached")
        lines += [f"  never: {name}" for name in missing]
        return "\n".join(lines)


def main() -> int:
    """0 where all invariants held and everything was reached."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long new seeds are tried")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--size", type=float, default=1.0, help="how long a history is")
    parser.add_argument("--seed", type=int, help="play this one and show its trace")
    parser.add_argument("--only", default="all", help="of its faults, these")
    parser.add_argument("--waits", action="store_true", help="the job waits for machines in it (of many seeds: in all)")
    parser.add_argument(
        "--keep-going", action="store_true", help="a line for each violation instead of the first's end"
    )
    options = parser.parse_args()
    if options.seed is not None:
        only = None if options.only == "all" else [int(n) for n in options.only.split(",") if n.isdigit()]
        one = play(options.seed, options.size, only, trace=True, waits=options.waits)
        print(one.text())
        print(one.broken or "all invariants hold")
        return int(bool(one.broken))
    return _soak(options.first, options.seconds, options.size, options.keep_going, options.waits)


def _soak(first: int, seconds: float, size: float, keep_going: bool, waits: bool) -> int:
    """In every third history the job waits for machines, or in all."""
    began_s, seed, broken, totals = time.monotonic(), first, 0, Totals()
    while time.monotonic() - began_s < seconds:
        one = play(seed, size, waits=waits or seed % WAITS_EVERY == 0)
        totals.add(one)
        if one.broken:
            broken += 1
            print(f"{seed} {one.broken}" if keep_going else report(one), flush=True)
            if not keep_going:
                return 1
        seed += 1
    print(totals.told(time.monotonic() - began_s))
    return int(broken > 0 or bool(totals.missing()))


if __name__ == "__main__":
    sys.exit(main())
