"""The fire drill: kill a real trainer in the middle of a copy, destroy nodes, and see whether training comes back bit
for bit.

One act after the other, over nodes that each have a daemon, a torchrun agent, trainers and memory of their own. The
trainer of the last rank is killed from outside while its arena shows a slot that is being filled; torchrun starts the
group again, which resumes from memory. Then whole nodes are destroyed at once, the one that coordinates among them;
empty ones take their places, all agents are launched again as a scheduler would, and the job rebuilds what was lost
and trains to the end. The same training runs once more without any guard; losses and final state are compared.

This module tells the story. `stage` owns processes and files, `aim` strikes, `verdict` judges, `transcript` shows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from snapshotd import _native
from snapshotd.aim import Loss, Strike, committed_step, nodes_to_lose, owned_arenas, passed_step, strike
from snapshotd.clock import SystemClock
from snapshotd.errors import ConfigError
from snapshotd.stage import JOB, KILLS_MAX, RESTARTS_MAX, DrillFailed, Life, Node, Process, Stage, read_lives
from snapshotd.transcript import Show, Transcript
from snapshotd.verdict import Played, Report, judge, memory_of

STEPS_MIN = 10
STEPS_WITH_LOSS_MIN = 12
NODES_MAX = 16
RANKS_MAX = 64
PHASE_MAX_S = 180.0
STEP_MAX_S = 5.0
_CLOCK = SystemClock()


@dataclass(frozen=True)
class DrillOptions:
    """What a drill is told on the command line."""

    nodes: int = 4
    ranks_per_node: int = 1
    parity: int = 2
    group_size: int = 8
    lose: int = 2
    parallel: str = "fsdp"
    steps: int = 24
    json: bool = False
    shm_root: Path = Path("/dev/shm")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> DrillOptions:
        """The options that `add_arguments` put into a parsed command line; what was not given suits the nodes."""
        alone = arguments.nodes == 1
        usual = cls(ranks_per_node=2, lose=0, steps=40) if alone else cls(lose=min(2, max(0, arguments.nodes - 1)))
        return cls(
            nodes=arguments.nodes,
            ranks_per_node=_given(arguments.ranks_per_node, usual.ranks_per_node),
            parity=arguments.parity,
            group_size=arguments.group_size,
            lose=_given(arguments.lose, usual.lose),
            parallel=arguments.parallel,
            steps=_given(arguments.steps, usual.steps),
            json=arguments.json,
            shm_root=arguments.shm_root,
        )

    @property
    def ranks(self) -> int:
        """Trainers on all nodes."""
        return self.nodes * self.ranks_per_node

    def check(self) -> DrillOptions:
        """Self, if it can be played. ConfigError names the first value that is not allowed, and the range."""
        for flag, value, low, high in (
            ("--nodes", self.nodes, 1, NODES_MAX),
            ("--ranks-per-node", self.ranks_per_node, 1, RANKS_MAX),
            ("--parity", self.parity, 0, 254),
            ("--group-size", self.group_size, 1, 255),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{flag} is {value}; it must lie between {low} and {high}")
        if not 0 <= self.lose < self.nodes:
            raise ConfigError(
                f"--lose is {self.lose}, of {self.nodes} node{'s' * (self.nodes > 1)}; it must lie between 0 and "
                f"{self.nodes - 1}, since somebody has to be left to rebuild from"
            )
        least = STEPS_WITH_LOSS_MIN if self.lose else STEPS_MIN
        if self.steps < least:
            raise ConfigError(
                f"--steps is {self.steps}; at least {least} are needed to commit, strike and resume before the end"
            )
        if self.parallel not in ("ddp", "fsdp"):
            raise ConfigError(f"--parallel is {self.parallel!r}; it is ddp or fsdp")
        return self


def _given(value: int | None, usual: int) -> int:
    return usual if value is None else value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The drill's own flags."""
    usual = DrillOptions()
    add = parser.add_argument
    add("--nodes", type=int, default=usual.nodes, help="machines, played by this one (default: 4)")
    add("--ranks-per-node", type=int, help="trainers on each (default: 1; 2 with --nodes 1)")
    add("--parity", type=int, default=usual.parity, help="nodes of a group that may be lost at once (default: 2)")
    add("--group-size", type=int, default=usual.group_size, help="nodes that protect each other (default: 8)")
    add("--lose", type=int, help="nodes to destroy at once; more than parity carries shows what is lost (default: 2)")
    add("--parallel", choices=["fsdp", "ddp"], default=usual.parallel, help="how the model is spread (default: fsdp)")
    add("--steps", type=int, help="length of the training (default: 24; 40 with --nodes 1)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--shm-root", type=Path, default=usual.shm_root, metavar="DIR", help="a tmpfs with room (default: /dev/shm)")


def run_drill(options: DrillOptions) -> int:
    """Play the drill and show it.

    Returns 0 if it was bit-identical, 1 if not or if it could not be played, 2 for wrong options, 130 if stopped.
    """
    transcript = Transcript(options.json)
    try:
        options.check()
        with _stoppable(), Stage(options.shm_root, os.environ) as stage:
            try:
                report = _Drill(options, stage, transcript).play()
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


class _Lost(Exception):
    """The trainers say that what was committed cannot be restored; the message is why."""


@dataclass
class _Drill:
    """One drill while it is played: its nodes and agents as they are now, and what was seen so far."""

    options: DrillOptions
    stage: Stage
    transcript: Transcript
    nodes: list[Node] = field(default_factory=list)
    agents: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = self.options
        self.played = Played(
            given.parallel, given.steps, given.nodes, given.ranks, given.parity, given.group_size
        )  # fmt: skip
        self.out = self.stage.top / "interrupted"

    def play(self) -> Report:
        """All acts. DrillFailed where one cannot be played."""
        played, names = self.played, [f"node-{index}" for index in range(self.options.nodes)]
        self.transcript.began(played)
        self.nodes = self.stage.start_nodes(names, peers=self.options.nodes > 1)
        self.transcript.daemons_answer(self.nodes)
        try:
            self._train_and_strike()
        except _Lost as lost:
            played.lost, played.interrupted = str(lost), read_lives(self.out)
            return judge(played)
        self.stage.stop(self.nodes)
        played.undisturbed = self._train_undisturbed()
        return judge(played)

    # --- the acts ---------------------------------------------------------------------------------

    def _train_and_strike(self) -> None:
        """Train to the end through kills and a loss."""
        title = "training, with a kill and a loss" if self.options.lose else "training, with a kill"
        with self.transcript.bar(title, self.options.steps) as show:
            self._launch(RESTARTS_MAX)
            self._kill_until_one_tears_a_copy(show)
            if self.options.lose:
                self._lose_nodes(show)
            self._await_end(self.agents, self.out, show)
        self.played.interrupted = read_lives(self.out)

    def _launch(self, restarts: int) -> None:
        given = self.options
        arguments = [*self._arguments(), "--parity", str(given.parity), "--group-size", str(given.group_size)]
        self.agents = self.stage.start_training(self.nodes, given.ranks_per_node, arguments, self.out, restarts)

    def _kill_until_one_tears_a_copy(self, show: Show) -> None:
        played, steps = self.played, self.options.steps
        # A loss comes after the kill and needs steps of its own.
        aim, last_aim = (steps // 4, steps // 2) if self.options.lose else (steps // 3, steps * 2 // 3)
        while aim <= last_aim and len(played.strikes) < KILLS_MAX:
            self._await_commit(aim, show)
            struck = self._kill_in_flight((last_aim + steps) // 2)
            played.strikes.append(struck)
            self.transcript.killed(struck)
            played.resumed.append(self._await_return(struck.at_s, "the restarted trainers to resume"))
            self.transcript.resumed(struck, played.resumed[-1])
            if struck.copy_in_flight:
                break
            aim = _first_step(played.resumed[-1]) + 1

    def _lose_nodes(self, show: Show) -> None:
        """Destroy nodes once more was committed, put empty ones in their places and launch the job again."""
        self._await_commit(max(self.options.steps // 2, _first_step(self.played.resumed[-1]) + 1), show)
        loss = self.played.loss = self._destroy()
        self.transcript.destroyed(loss)
        names = [f"node-{self.options.nodes + nth}" for nth in range(len(loss.nodes))]
        newcomers = self.stage.start_nodes(names, peers=True)
        for index, newcomer in zip(loss.nodes, newcomers, strict=True):
            self.nodes[index] = newcomer
        self.transcript.replaced(loss.nodes, newcomers)
        self._launch(restarts=0)  # nobody is killed any more: trainers that fail have something to say
        self.played.rebuilt = self._await_return(loss.at_s, "the relaunched trainers to resume")
        self.transcript.came_back(loss, self.played.rebuilt)

    def _train_undisturbed(self) -> list[Life]:
        out = self.stage.top / "undisturbed"
        with self.transcript.bar("the same, without guard or kill", self.options.steps) as show:
            agents = self.stage.start_unguarded(self.options.ranks, self._arguments(), out)
            self._await_end(agents, out, show)
        return read_lives(out)

    def _arguments(self) -> list[str]:
        return ["--parallel", self.options.parallel, "--steps", str(self.options.steps)]

    # --- strikes ----------------------------------------------------------------------------------

    def _kill_in_flight(self, latest: int) -> Strike:
        """Kill the trainer of the last rank in the middle of a copy, or when it has passed the step `latest`."""
        pids, victim = self._pids(), self.options.ranks - 1
        with owned_arenas(self._memories(), pids) as arenas:
            self._check_that_training_goes_on(arenas, "killed")
            struck = strike(arenas, victim, pids[victim], PHASE_MAX_S, latest)
        if struck is None:
            raise DrillFailed(
                f"no copy of rank {victim} was seen in flight, so nobody was killed; "
                f"{self.stage.last_words(self.agents[-1])}"
            )
        return struck

    def _destroy(self) -> Loss:
        """Destroy nodes all at once, and end what is left of the training on the others."""
        lives = self._newest()
        lost = nodes_to_lose({rank: life.node for rank, life in lives.items()}, self.options.lose)
        data_bytes, parity_bytes = memory_of(JOB, [self.stage.status(node) for node in self.nodes])
        with owned_arenas(self._memories(), self._pids()) as arenas:
            self._check_that_training_goes_on(arenas, "destroyed")
            committed, at_s = committed_step(arenas), _CLOCK.monotonic_s()
            self.stage.destroy([self.nodes[index] for index in lost])
        self.stage.end_training([node for index, node in enumerate(self.nodes) if index not in lost])
        ranks = tuple(rank for rank, life in sorted(lives.items()) if life.node in lost)
        return Loss(lost, ranks, at_s, committed, data_bytes, parity_bytes)

    def _check_that_training_goes_on(self, arenas: Mapping[int, _native.Arena], what: str) -> None:
        """A rank that has ended is not started again by its agent, and the others would wait for it."""
        if len(arenas) < self.options.ranks:
            raise DrillFailed(
                f"{len(arenas)} of {self.options.ranks} trainers hold an arena, so nothing was {what}; "
                f"{self.stage.last_words(self.agents[0])}"
            )
        if passed_step(arenas) >= self.options.steps - 1:
            raise DrillFailed(
                f"the training was at its end before anything was {what}: this machine is too busy, or trains too "
                f"fast, for {self.options.steps} steps; give it more with --steps"
            )

    # --- waiting ----------------------------------------------------------------------------------

    def _await_commit(self, step: int, show: Show) -> None:
        """Wait until every rank of the group that runs now has committed `step`."""

        def look() -> bool | None:
            show(_progress(self.out))
            with owned_arenas(self._memories(), self._pids()) as arenas:
                enough = len(arenas) == self.options.ranks and committed_step(arenas) >= step
            return True if enough else None

        self.stage.wait(look, self.agents, _patience_s(step), f"step {step} to be committed on every rank")

    def _await_return(self, after_s: float, what: str) -> list[Life]:
        """The lives of all ranks that began after that moment, once the newest of each rank has restored.

        _Lost if they say that nothing can be restored.
        """

        def look() -> list[Life] | None:
            newest = {life.rank: life for life in read_lives(self.out) if life.started_s > after_s}
            if why := next((life.lost for life in newest.values() if life.lost is not None), None):
                raise _Lost(why)
            back = [life for _, life in sorted(newest.items()) if life.restored_s is not None]
            return back if len(back) == self.options.ranks else None

        return self.stage.wait(look, self.agents, PHASE_MAX_S, what)

    def _await_end(self, agents: Sequence[Process], out: Path, show: Show) -> None:
        """Wait until every agent has ended well."""

        def look() -> bool | None:
            show(_progress(out))
            return True if all(agent.poll() == 0 for agent in agents) else None

        self.stage.wait(look, agents, _patience_s(self.options.steps), "the training to end")
        show(_progress(out))

    # --- what is there now ------------------------------------------------------------------------

    def _memories(self) -> list[Path]:
        return [node.memory for node in self.nodes]

    def _newest(self) -> dict[int, Life]:
        """Each rank's newest life."""
        return {life.rank: life for life in read_lives(self.out)}

    def _pids(self) -> dict[int, int]:
        return {rank: life.pid for rank, life in self._newest().items()}


def _first_step(lives: Sequence[Life]) -> int:
    return min(life.first_step for life in lives)


def _patience_s(steps: int) -> float:
    return PHASE_MAX_S + steps * STEP_MAX_S


def _progress(out: Path) -> int:
    """Steps that the slowest rank's newest life is through with."""
    newest = {life.rank: max(life.losses, default=life.first_step - 1) + 1 for life in read_lives(out)}
    return min(newest.values(), default=0)
