"""What a person reads while a drill is played, or the one JSON object that a program reads."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from snapshotd.aim import Loss, Strike
from snapshotd.stage import Life, Node
from snapshotd.verdict import SPLIT, Played, Report, rebuilt, seconds_to_resume

Show: TypeAlias = Callable[[int], None]
_LABEL_WIDTH = 12


class Transcript:
    """Prints each event once, when it happens. With `as_json` it is silent until `verdict` or `failed`."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console(quiet=as_json, highlight=False, soft_wrap=True)

    def began(self, plan: Played) -> None:
        """What is going to be played."""
        where = "" if plan.nodes == 1 else f" on {plan.nodes} nodes"
        self._console.print(
            f"[bold]A fire drill:[/bold] {_count(plan.ranks, 'trainer')}{where} ({plan.parallel}) teach a small GPT "
            f"Python's own sources for {plan.steps} steps.\n"
        )

    def daemons_answer(self, nodes: Sequence[Node]) -> None:
        """The daemons are there."""
        if len(nodes) == 1:
            self._line("daemon", f"pid {nodes[0].daemon.pid} answers; snapshots go to {nodes[0].memory}")
        else:
            pids = ", ".join(str(node.daemon.pid) for node in nodes)
            place = nodes[0].folder.parent / "node-*" / "memory"
            self._line("nodes", f"{len(nodes)} daemons answer (pids {pids}); snapshots go to {place}")

    @contextlib.contextmanager
    def bar(self, title: str, steps: int) -> Iterator[Show]:
        """A progress bar over `steps`; the function that it gives takes the number done."""
        columns = (TextColumn(" {task.description:<31}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, disable=self._as_json) as progress:
            task = progress.add_task(title, total=steps)
            yield lambda done: progress.update(task, completed=done)

    def killed(self, strike: Strike) -> None:
        """A trainer was killed."""
        doing = f"while its copy of step {strike.step} was in flight" if strike.copy_in_flight else "between two copies"
        self._line("kill", f"rank {strike.rank} (pid {strike.pid}) got SIGKILL {doing}")
        self._line("committed", f"step {strike.committed}, read from the arenas right before the kill")

    def resumed(self, strike: Strike, lives: Sequence[Life]) -> None:
        """The group trains again."""
        self._resumed(strike.at_s, lives, "the kill")
        if not strike.copy_in_flight:
            self._line("", "no copy was torn by that kill: it came after one had been published")

    def destroyed(self, loss: Loss) -> None:
        """Nodes are gone, with all that was on them."""
        many = "s" * (len(loss.nodes) > 1)
        self._line("committed", f"step {loss.committed}, read from the arenas right before the loss")
        self._line(
            "in memory", f"{loss.data_bytes / 1e6:.1f} MB of arenas and {loss.parity_bytes / 1e6:.1f} MB of parity"
        )
        trainers = _count(len(loss.ranks), "trainer")
        self._line("lost", f"{_nodes(loss.nodes)} destroyed: agent{many}, {trainers}, daemon{many} and memory")

    def replaced(self, lost: Sequence[int], newcomers: Sequence[Node]) -> None:
        """Empty nodes stand in for those that were lost, and the job is launched again."""
        pairs = ", ".join(f"{node.name} for node-{index}" for index, node in zip(lost, newcomers, strict=True))
        self._line("replaced", f"by empty nodes ({pairs}); all trainers are launched anew")

    def came_back(self, loss: Loss, lives: Sequence[Life]) -> None:
        """What was lost is there again, and the group trains."""
        length, seconds = rebuilt(lives)
        shards = _count(len(loss.ranks), "shard")
        self._line("rebuilt", f"{shards}, {length / 1e6:.1f} MB, from parity in {seconds:.2f} s")
        self._resumed(loss.at_s, lives, "the loss")

    def _resumed(self, since_s: float, lives: Sequence[Life], event: str) -> None:
        split = seconds_to_resume(since_s, lives)
        step = min(life.first_step for life in lives)
        self._line("resumed", f"after step {step}, {split['total']:.2f} s after {event}")
        parts = ", ".join(f"{name.replace('_', ' ')} {split[name]:.3f}" for name in SPLIT)
        self._line("", f"[dim]in seconds: {parts}[/dim]")

    def verdict(self, report: Report) -> None:
        """How it ended."""
        if self._as_json:
            print(json.dumps(report.as_json(), indent=2))
            return
        self._console.print()
        if report.lost:
            self._console.print(f" [bold red]Lost:[/bold red] {self._what_is_lost(report)}")
            return
        same = report.losses_compared - report.losses_different
        twice = f", {report.steps_computed_twice} of them computed twice" if report.steps_computed_twice else ""
        self._line("losses", f"{same} of {report.losses_compared} equal the undisturbed run's bit for bit{twice}")
        self._line("final state", f"{report.state_bytes / 1e6:.1f} MB on {_count(report.ranks, 'rank')}")
        self._line("interrupted", report.digest_interrupted or "(did not reach the end)")
        self._line("undisturbed", report.digest_undisturbed or "(did not reach the end)")
        self._console.print()
        if report.bit_identical:
            what = "the kill and the loss left no" if report.lost_nodes else "the kill left no"
            self._console.print(f" [bold green]Bit-identical:[/bold green] {what} trace in the training.")
        else:
            self._console.print(f" [bold red]Not bit-identical:[/bold red] {report.why}.")

    @staticmethod
    def _what_is_lost(report: Report) -> str:
        """Committed state is gone: what it was, why, and what it means."""
        what = f"step {report.committed_before_kill} was committed when the trainer was killed"
        if report.lost_nodes:
            what = (
                f"step {report.last_commit_before_loss} was committed when {_nodes(report.lost_nodes)} of "
                f"{report.nodes} {'were' if len(report.lost_nodes) > 1 else 'was'} destroyed, with parity "
                f"{report.parity} in groups of about {report.group_size}"
            )
        return f"{what}, and it cannot be rebuilt: {report.why}. No trainer began anew in silence."

    def failed(self, sentence: str) -> None:
        """The drill could not be played to its end."""
        print(f"snapshotd drill: {sentence}", file=sys.stderr)
        if self._as_json:
            print(json.dumps({"bit_identical": False, "error": sentence}, indent=2))

    def _line(self, label: str, text: str) -> None:
        self._console.print(f" [cyan]{label:<{_LABEL_WIDTH}}[/cyan]{text}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _nodes(numbers: Sequence[int]) -> str:
    """`node 0`, `nodes 0 and 3`, `nodes 0, 2 and 3`."""
    *first, last = [str(number) for number in numbers]
    return f"nodes {', '.join(first)} and {last}" if first else f"node {last}"
