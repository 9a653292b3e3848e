"""What a drill found out, from what was seen and what the trainers reported. Pure: no process, no file.

Bit-identical means all of it: after the kill, and after the loss of nodes where some were lost, the run resumed at or
after the step that was committed then, and that was a step above 0; what the lost nodes held was rebuilt; every loss
that any life computed equals the undisturbed one, step by step and rank by rank; and so does the digest of parameters,
optimizer, schedule and generator at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from snapshotd.aim import Loss, Strike
from snapshotd.stage import Life

SPLIT = ("process_start", "imports", "set_up", "attach", "verify", "copy")


@dataclass
class Played:
    """What was played: the plan first, then what came, filled in while the drill goes on."""

    parallel: str
    steps: int
    nodes: int
    ranks: int
    parity: int
    group_size: int
    strikes: list[Strike] = field(default_factory=list)
    resumed: list[list[Life]] = field(default_factory=list)  # the lives of all ranks that followed each strike
    loss: Loss | None = None
    rebuilt: list[Life] = field(default_factory=list)  # the lives of all ranks that followed the loss
    lost: str = ""  # why nothing could be restored, where something had been committed
    interrupted: list[Life] = field(default_factory=list)
    undisturbed: list[Life] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The outcome, in the order in which it is printed as JSON. Steps are counts of steps done; times are seconds.

    `lost` says that committed state could not be rebuilt; `why` is empty where the outcome is bit-identical.
    """

    parallel: str
    nodes: int
    ranks: int
    steps: int
    parity: int
    group_size: int
    state_bytes: int
    kills: int
    killed_rank: int
    killed_while_copying_step: int
    copy_in_flight: bool
    committed_before_kill: int
    resumed_after_kill_step: int
    seconds_to_resume_kill: dict[str, float]
    lost_nodes: list[int]
    last_commit_before_loss: int
    resumed_after_loss_step: int
    seconds_to_resume_loss: dict[str, float]
    bytes_rebuilt: int
    seconds_to_rebuild: float
    parity_bytes: int
    data_bytes: int
    losses_compared: int
    losses_different: int
    steps_computed_twice: int
    digest_interrupted: str
    digest_undisturbed: str
    lost: bool
    why: str
    bit_identical: bool

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def judge(played: Played) -> Report:
    """Compare the interrupted run with the undisturbed one, and every return with what was committed before it."""
    truth = {(life.rank, step): loss for life in played.undisturbed for step, loss in life.losses.items()}
    computed = [((life.rank, step), loss) for life in played.interrupted for step, loss in life.losses.items()]
    compared = computed if played.undisturbed else []
    places = {place for place, _ in computed}
    last = played.strikes[-1] if played.strikes else Strike(-1, 0, 0.0, 0, 0, False)
    survivors = played.resumed[-1] if played.resumed else []
    loss = played.loss or Loss((), (), 0.0, 0, 0, 0)
    report = Report(
        parallel=played.parallel,
        nodes=played.nodes,
        ranks=played.ranks,
        steps=played.steps,
        parity=played.parity,
        group_size=played.group_size,
        state_bytes=sum(life.state_bytes for life in played.undisturbed),
        kills=len(played.strikes),
        killed_rank=last.rank,
        killed_while_copying_step=last.step,
        copy_in_flight=last.copy_in_flight,
        committed_before_kill=last.committed,
        resumed_after_kill_step=_first_step(survivors),
        seconds_to_resume_kill=seconds_to_resume(last.at_s, survivors),
        lost_nodes=list(loss.nodes),
        last_commit_before_loss=loss.committed,
        resumed_after_loss_step=_first_step(played.rebuilt),
        seconds_to_resume_loss=seconds_to_resume(loss.at_s, played.rebuilt),
        bytes_rebuilt=rebuilt(played.rebuilt)[0],
        seconds_to_rebuild=rebuilt(played.rebuilt)[1],
        parity_bytes=loss.parity_bytes,
        data_bytes=loss.data_bytes,
        losses_compared=len(compared),
        losses_different=sum(truth.get(place) != loss for place, loss in compared),
        steps_computed_twice=len(computed) - len(places),
        digest_interrupted=combined_digest(played.interrupted),
        digest_undisturbed=combined_digest(played.undisturbed),
        lost=bool(played.lost),
        why="",
        bit_identical=False,
    )
    expected = {(rank, step) for rank in range(played.ranks) for step in range(played.steps)}
    why = _why(played, report, whole=set(truth) == places == expected)
    return replace(report, why=why, bit_identical=not why)


def _why(played: Played, report: Report, whole: bool) -> str:
    """What keeps the outcome from being bit-identical, in words without a full stop; empty where nothing does."""
    if played.lost:
        return played.lost
    if not played.strikes:
        return "nobody was killed"
    returns = [
        (strike.committed, lives, "the trainer was killed")
        for strike, lives in zip(played.strikes, played.resumed, strict=True)
    ]
    if played.loss is not None:
        returns.append((played.loss.committed, played.rebuilt, "the nodes were lost"))
    for committed, lives, event in returns:
        if why := _why_not_back(committed, lives, played.ranks, event):
            return why
    if played.loss is not None and report.bytes_rebuilt < 1:
        return "training came back after the loss, but no byte of what the lost nodes held was rebuilt"
    if report.losses_different:
        return f"{report.losses_different} losses differ from the undisturbed run's"
    if not whole:
        return "the runs did not compute the same steps"
    if not report.digest_interrupted == report.digest_undisturbed != "":
        return "the losses agree, but the runs did not end in the same state"
    return ""


def _why_not_back(committed: int, lives: Sequence[Life], ranks: int, event: str) -> str:
    steps = sorted({life.first_step for life in lives})
    if committed < 1:
        return f"nothing was committed when {event}"
    if {life.rank for life in lives} != set(range(ranks)) or len(lives) != ranks:
        return f"not every rank came back after {event}"
    if len(steps) > 1:
        return f"after {event} the ranks resumed at different steps: {steps}"
    if steps[0] < committed:
        return f"step {committed} was committed when {event}, but training resumed after step {steps[0]}"
    return ""


def _first_step(lives: Iterable[Life]) -> int:
    return min((life.first_step for life in lives), default=0)


def rebuilt(lives: Iterable[Life]) -> tuple[int, float]:
    """Bytes that were decoded for all ranks of the job, and the seconds that the slowest waited for it."""
    reports = [life.restore for life in lives]
    length = max((int(report.get("rebuilt_bytes") or 0) for report in reports), default=0)
    seconds = max((float(report.get("rebuild_s") or 0.0) for report in reports), default=0.0)
    return length, round(seconds, 4)


def memory_of(job: str, documents: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Bytes that a job's arenas take, and its parity, from the status documents of all its daemons."""
    generations = [
        generation
        for document in documents
        for generation in document.get("jobs", {}).get(job, {}).get("generations", [])
    ]
    data = sum(arena.get("total_bytes", 0) for one in generations for arena in one.get("arenas", []))
    return data, sum((one.get("parity") or {}).get("total_bytes", 0) for one in generations)


def combined_digest(lives: Iterable[Life]) -> str:
    """One digest for the final states of all ranks, in their order; empty where a rank did not reach the end."""
    ends = {life.rank: life.digest for life in lives}
    if not ends or not all(ends.values()):
        return ""
    return hashlib.sha256("\n".join(f"{rank} {ends[rank]}" for rank in sorted(ends)).encode()).hexdigest()


def seconds_to_resume(since_s: float, lives: Sequence[Life]) -> dict[str, float]:
    """Seconds from `since_s` until the slowest rank could train again, in all and by what they went to."""
    if not lives:
        return {}
    slowest = max(lives, key=lambda life: life.restored_s or 0.0)
    restored_s = slowest.restored_s or 0.0
    parts = {name: float(slowest.restore.get(f"{name}_s", 0.0)) for name in ("attach", "verify", "copy")}
    split = {
        "total": restored_s - since_s,
        "process_start": slowest.started_s - since_s,
        "imports": slowest.imported_s - slowest.started_s,
        # What is left: process group, model, planning, and agreeing with the other ranks.
        "set_up": restored_s - slowest.imported_s - sum(parts.values()),
        **parts,
    }
    return {name: round(seconds, 4) for name, seconds in split.items()}
