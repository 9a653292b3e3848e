"""The fire drill: kill a real trainer in the middle of a copy, and see whether training comes back bit for bit.

One act after the other: a daemon and a torchrun train a small GPT; the trainer of the last rank is killed from
outside while its arena shows a slot that is being filled; torchrun starts the group again, which resumes from memory
and trains to the end; the same training runs once more without any guard; losses and final state are compared.

This module tells the story and judges it. `stage` owns processes and files, `transcript` shows what happens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from snapshotd.aim import Strike, committed_step, owned_arenas, strike
from snapshotd.errors import ConfigError
from snapshotd.stage import RESTARTS_MAX, DrillFailed, Life, Stage, read_lives
from snapshotd.transcript import Show, Transcript
from snapshotd.verdict import Report, judge

STEPS_MIN = 10
RANKS_MAX = 64
PHASE_MAX_S = 180.0
STEP_MAX_S = 5.0


@dataclass(frozen=True)
class DrillOptions:
    """What a drill is told on the command line."""

    nodes: int = 1
    ranks_per_node: int = 2
    parallel: str = "fsdp"
    steps: int = 40
    json: bool = False
    shm_root: Path = Path("/dev/shm")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> DrillOptions:
        """The options that `add_arguments` put into a parsed command line."""
        return cls(
            nodes=arguments.nodes,
            ranks_per_node=arguments.ranks_per_node,
            parallel=arguments.parallel,
            steps=arguments.steps,
            json=arguments.json,
            shm_root=arguments.shm_root,
        )

    def check(self) -> DrillOptions:
        """Self, if it can be played. ConfigError names the first value that is not allowed, and the range."""
        if self.nodes != 1:
            raise ConfigError(
                f"--nodes is {self.nodes}, but this version protects the trainers of one node only; use --nodes 1"
            )
        if not 1 <= self.ranks_per_node <= RANKS_MAX:
            raise ConfigError(f"--ranks-per-node is {self.ranks_per_node}; it must lie between 1 and {RANKS_MAX}")
        if self.steps < STEPS_MIN:
            raise ConfigError(
                f"--steps is {self.steps}; at least {STEPS_MIN} are needed to commit, kill and resume before the end"
            )
        if self.parallel not in ("ddp", "fsdp"):
            raise ConfigError(f"--parallel is {self.parallel!r}; it is ddp or fsdp")
        return self


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The drill's own flags."""
    usual = DrillOptions()
    parser.add_argument("--nodes", type=int, default=usual.nodes, help="machines that take part; 1 for now")
    parser.add_argument("--ranks-per-node", type=int, default=usual.ranks_per_node, help="trainers (default: 2)")
    parser.add_argument(
        "--parallel", choices=["fsdp", "ddp"], default=usual.parallel, help="how the model is spread (default: fsdp)"
    )
    parser.add_argument("--steps", type=int, default=usual.steps, help="length of the training (default: 40)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--shm-root", type=Path, default=usual.shm_root, metavar="DIR", help="a tmpfs with room (default: /dev/shm)"
    )


def run_drill(options: DrillOptions) -> int:
    """Play the drill and show it.

    Returns 0 if it was bit-identical, 1 if not or if it could not be played, 2 for wrong options, 130 if stopped.
    """
    transcript = Transcript(options.json)
    try:
        options.check()
        with _stoppable(), Stage(options.shm_root, os.environ) as stage:
            try:
                report = _play(options, stage, transcript)
            finally:
                _ignore_signals()  # a second Ctrl-C shall not stop the tidying
    except ConfigError as error:
        print(f"snapshotd drill: {error}", file=sys.stderr)
        return 2
    except DrillFailed as error:
        transcript.failed(str(error))
        return 1
    except KeyboardInterrupt:
        print("snapshotd drill: stopped; its processes and its memory are gone", file=sys.stderr)
        return 130
    transcript.verdict(report)
    return 0 if report.bit_identical else 1


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and a closed terminal end the drill as Ctrl-C does: with tidying."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = [(number, signal.signal(number, stop)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _play(options: DrillOptions, stage: Stage, transcript: Transcript) -> Report:
    transcript.began(options.ranks_per_node, options.parallel, options.steps)
    daemon = stage.start_daemon()
    transcript.daemon_answers(daemon.pid, stage.memory)
    strikes, resumed, interrupted = _train_with_a_kill(options, stage, transcript)
    stage.stop(daemon)
    undisturbed = _train_undisturbed(options, stage, transcript)
    return judge(options.parallel, options.steps, strikes, resumed, interrupted, undisturbed)


def _train_with_a_kill(
    options: DrillOptions, stage: Stage, transcript: Transcript
) -> tuple[list[Strike], list[list[Life]], list[Life]]:
    """The kills, the lives of all ranks that followed each, and every life in the order of their starts."""
    out = stage.top / "interrupted"
    strikes: list[Strike] = []
    resumed: list[list[Life]] = []
    aim, last_aim = options.steps // 3, options.steps * 2 // 3
    with transcript.bar("training, with a kill", options.steps) as show:
        training = stage.start_training(options.ranks_per_node, _arguments(options), out, guarded=True)
        while aim <= last_aim and len(strikes) < RESTARTS_MAX:
            _await_commit(options, stage, training, out, aim, show)
            strikes.append(_kill_in_flight(options, stage, training, out))
            transcript.killed(strikes[-1])
            resumed.append(_await_resume(options, stage, training, out, strikes[-1]))
            transcript.resumed(strikes[-1], resumed[-1])
            if strikes[-1].copy_in_flight:
                break
            aim = max(life.first_step for life in resumed[-1]) + 1
        _await_end(options, stage, training, out, show)
    return strikes, resumed, read_lives(out)


def _train_undisturbed(options: DrillOptions, stage: Stage, transcript: Transcript) -> list[Life]:
    out = stage.top / "undisturbed"
    with transcript.bar("the same, without guard or kill", options.steps) as show:
        training = stage.start_training(options.ranks_per_node, _arguments(options), out, guarded=False)
        _await_end(options, stage, training, out, show)
    return read_lives(out)


def _arguments(options: DrillOptions) -> list[str]:
    return ["--parallel", options.parallel, "--steps", str(options.steps)]


def _await_commit(
    options: DrillOptions, stage: Stage, training: subprocess.Popen[bytes], out: Path, step: int, show: Show
) -> None:
    """Wait until every rank of the group that runs now has committed `step`."""

    def look() -> bool | None:
        show(_progress(out))
        with owned_arenas(stage.memory, _newest_pids(out)) as arenas:
            enough = len(arenas) == options.ranks_per_node and committed_step(arenas) >= step
        return True if enough else None

    stage.wait(look, training, _patience_s(step), f"step {step} to be committed on every rank")


def _kill_in_flight(options: DrillOptions, stage: Stage, training: subprocess.Popen[bytes], out: Path) -> Strike:
    """Kill the trainer of the last rank in the middle of a copy."""
    pids, victim = _newest_pids(out), options.ranks_per_node - 1
    with owned_arenas(stage.memory, pids) as arenas:
        struck = strike(arenas, victim, pids[victim], PHASE_MAX_S) if len(arenas) == len(pids) else None
    if struck is None:
        raise DrillFailed(
            f"no copy of rank {victim} was seen in flight, so nobody was killed; {stage.last_words(training)}"
        )
    return struck


def _await_resume(
    options: DrillOptions, stage: Stage, training: subprocess.Popen[bytes], out: Path, after: Strike
) -> list[Life]:
    """The lives of all ranks that began after the kill, once each of them has restored."""

    def look() -> list[Life] | None:
        lives = [life for life in read_lives(out) if life.started_s > after.at_s and life.restored_s is not None]
        return lives if len({life.rank for life in lives}) == options.ranks_per_node else None

    return stage.wait(look, training, PHASE_MAX_S, "the restarted trainers to resume")


def _await_end(options: DrillOptions, stage: Stage, training: subprocess.Popen[bytes], out: Path, show: Show) -> None:
    """Wait until torchrun has ended well."""

    def look() -> bool | None:
        show(_progress(out))
        return True if training.poll() == 0 else None

    stage.wait(look, training, _patience_s(options.steps), "the training to end")
    show(_progress(out))


def _patience_s(steps: int) -> float:
    return PHASE_MAX_S + steps * STEP_MAX_S


def _newest_pids(out: Path) -> dict[int, int]:
    """Process id of each rank's newest life."""
    return {life.rank: life.pid for life in read_lives(out)}


def _progress(out: Path) -> int:
    """Steps that the slowest rank's newest life is through with."""
    newest = {life.rank: max(life.losses, default=life.first_step - 1) + 1 for life in read_lives(out)}
    return min(newest.values(), default=0)
