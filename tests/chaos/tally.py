"""What a nemesis did and what survived, counted and told."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

COUNTED = ("rebuilt_bytes", "served_bytes", "quarantined")


class Violation(Exception):
    """A promise was not kept; the message says which."""


@dataclass
class Tally:
    """What was done and what survived."""

    faults: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    last_round: int = 0
    commits: int = 0
    restores: int = 0
    refusals: int = 0
    losses: int = 0
    resume_s: list[float] = field(default_factory=list)
    counters: dict[tuple[int, str], int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def total(self, name: str) -> int:
        """A counter over all daemons that ever lived."""
        return sum(value for (_, one), value in self.counters.items() if one == name)

    def text(self) -> str:
        """The summary."""
        resumed = (
            f"median {statistics.median(self.resume_s):.2f}, worst {max(self.resume_s):.2f}" if self.resume_s else "-"
        )
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        rows = {
            "rounds": f"{self.rounds}",
            "faults": f"{self.faults.total()}: {kinds}",
            "snapshots committed": f"{self.commits}",
            "restores": f"{self.restores}, every byte of every rank compared",
            "bytes rebuilt": f"{self.total('rebuilt_bytes'):,} (and {self.total('served_bytes'):,} sent between nodes)",
            "set aside as damaged": f"{self.total('quarantined')} shards and parity sets",
            "clear refusals": f"{self.refusals}, each beyond the tolerance or for want of memory",
            "time to resume (s)": resumed,
            "losses within tolerance": f"{self.losses}",
            "violations": "; ".join(self.violations) or "0",
        }
        return "\n".join(f"{name:<24} {value}" for name, value in rows.items())
