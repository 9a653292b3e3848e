"""What a drill found out, from what was seen and what the trainers reported. Pure: no process, no file.

Bit-identical means all of it: the run resumed at or after the step that was committed when the trainer died, and
that was a step above 0; every loss that any life computed equals the undisturbed one, step by step and rank by rank;
and so does the digest of parameters, optimizer, schedule and generator at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from snapshotd.aim import Strike
from snapshotd.stage import Life

SPLIT = ("process_start", "imports", "set_up", "attach", "verify", "copy")


@dataclass(frozen=True)
class Report:
    """The outcome, in the order in which it is printed as JSON. Steps are counts of steps done; times are seconds."""

    parallel: str
    ranks: int
    steps: int
    state_bytes: int
    kills: int
    killed_rank: int
    killed_while_copying_step: int
    copy_in_flight: bool
    committed_before_kill: int
    resumed_after_kill_step: int
    seconds_to_resume_kill: dict[str, float]
    losses_compared: int
    losses_different: int
    steps_computed_twice: int
    digest_interrupted: str
    digest_undisturbed: str
    bit_identical: bool

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def judge(
    parallel: str,
    steps: int,
    strikes: Sequence[Strike],
    resumed: Sequence[Sequence[Life]],
    interrupted: Sequence[Life],
    undisturbed: Sequence[Life],
) -> Report:
    """Compare the interrupted run with the undisturbed one. `resumed` are the lives that followed each strike."""
    ranks = len({life.rank for life in undisturbed})
    truth = {(life.rank, step): loss for life in undisturbed for step, loss in life.losses.items()}
    computed = [((life.rank, step), loss) for life in interrupted for step, loss in life.losses.items()]
    different = sum(truth.get(place) != loss for place, loss in computed)
    whole = set(truth) == {place for place, _ in computed} == {(r, s) for r in range(ranks) for s in range(steps)}
    digests = combined_digest(interrupted), combined_digest(undisturbed)
    came_back = bool(strikes) and all(
        0 < strike.committed <= min(life.first_step for life in lives)
        and len({life.first_step for life in lives}) == 1
        and len(lives) == ranks
        for strike, lives in zip(strikes, resumed, strict=True)
    )
    last = strikes[-1] if strikes else Strike(-1, 0, 0.0, 0, 0, False)
    survivors = resumed[-1] if resumed else []
    return Report(
        parallel=parallel,
        ranks=ranks,
        steps=steps,
        state_bytes=sum(life.state_bytes for life in undisturbed),
        kills=len(strikes),
        killed_rank=last.rank,
        killed_while_copying_step=last.step,
        copy_in_flight=last.copy_in_flight,
        committed_before_kill=last.committed,
        resumed_after_kill_step=min((life.first_step for life in survivors), default=0),
        seconds_to_resume_kill=seconds_to_resume(last, survivors),
        losses_compared=len(computed),
        losses_different=different,
        steps_computed_twice=len(computed) - len({place for place, _ in computed}),
        digest_interrupted=digests[0],
        digest_undisturbed=digests[1],
        bit_identical=came_back and whole and different == 0 and digests[0] == digests[1] != "",
    )


def combined_digest(lives: Iterable[Life]) -> str:
    """One digest for the final states of all ranks, in their order; empty where a rank did not reach the end."""
    ends = {life.rank: life.digest for life in lives}
    if not ends or not all(ends.values()):
        return ""
    return hashlib.sha256("\n".join(f"{rank} {ends[rank]}" for rank in sorted(ends)).encode()).hexdigest()


def seconds_to_resume(strike: Strike, lives: Sequence[Life]) -> dict[str, float]:
    """Seconds from the kill until the slowest rank could train again, in all and by what they went to."""
    if not lives:
        return {}
    slowest = max(lives, key=lambda life: life.restored_s or 0.0)
    restored_s = slowest.restored_s or 0.0
    parts = {name: float(slowest.restore.get(f"{name}_s", 0.0)) for name in ("attach", "verify", "copy")}
    split = {
        "total": restored_s - strike.at_s,
        "process_start": slowest.started_s - strike.at_s,
        "imports": slowest.imported_s - slowest.started_s,
        # What is left: process group, model, planning, and agreeing with the other ranks.
        "set_up": restored_s - slowest.imported_s - sum(parts.values()),
        **parts,
    }
    return {name: round(seconds, 4) for name, seconds in split.items()}
