"""What a person reads while a drill is played, or the one JSON object that a program reads."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from snapshotd.aim import Strike
from snapshotd.stage import Life
from snapshotd.verdict import SPLIT, Report, seconds_to_resume

Show: TypeAlias = Callable[[int], None]
_LABEL_WIDTH = 12


class Transcript:
    """Prints each event once, when it happens. With `as_json` it is silent until `verdict` or `failed`."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console(quiet=as_json, highlight=False, soft_wrap=True)

    def began(self, ranks: int, parallel: str, steps: int) -> None:
        """What is going to be played."""
        self._console.print(
            f"[bold]A fire drill:[/bold] {ranks} trainer{'s' * (ranks > 1)} ({parallel}) teach a small GPT "
            f"Python's own sources for {steps} steps.\n"
        )

    def daemon_answers(self, pid: int, memory: Path) -> None:
        """The daemon is there."""
        self._line("daemon", f"pid {pid} answers; snapshots go to {memory}")

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
        split = seconds_to_resume(strike, lives)
        step = min(life.first_step for life in lives)
        self._line("resumed", f"after step {step}, {split['total']:.2f} s after the kill")
        parts = ", ".join(f"{name.replace('_', ' ')} {split[name]:.3f}" for name in SPLIT)
        self._line("", f"[dim]in seconds: {parts}[/dim]")
        if not strike.copy_in_flight:
            self._line("", "that copy had already been published when the signal arrived")

    def verdict(self, report: Report) -> None:
        """How it ended."""
        if self._as_json:
            print(json.dumps(report.as_json(), indent=2))
            return
        same = report.losses_compared - report.losses_different
        twice = f", {report.steps_computed_twice} of them computed twice" if report.steps_computed_twice else ""
        self._console.print()
        self._line("losses", f"{same} of {report.losses_compared} equal the undisturbed run's bit for bit{twice}")
        self._line("final state", f"{report.state_bytes / 1e6:.1f} MB on {report.ranks} rank{'s' * (report.ranks > 1)}")
        self._line("interrupted", report.digest_interrupted or "(did not reach the end)")
        self._line("undisturbed", report.digest_undisturbed or "(did not reach the end)")
        self._console.print()
        if report.bit_identical:
            self._console.print(" [bold green]Bit-identical:[/bold green] the kill left no trace in the training.")
        else:
            self._console.print(f" [bold red]Not bit-identical:[/bold red] {self._why(report)}")

    def failed(self, sentence: str) -> None:
        """The drill could not be played to its end."""
        print(f"snapshotd drill: {sentence}", file=sys.stderr)
        if self._as_json:
            print(json.dumps({"bit_identical": False, "error": sentence}, indent=2))

    @staticmethod
    def _why(report: Report) -> str:
        if report.committed_before_kill < 1:
            return "nothing was committed when the trainer was killed."
        if report.resumed_after_kill_step < report.committed_before_kill:
            return (
                f"step {report.committed_before_kill} was committed, but training resumed after step "
                f"{report.resumed_after_kill_step}."
            )
        if report.losses_different:
            return f"{report.losses_different} losses differ from the undisturbed run's."
        return "the losses agree, but the runs did not end in the same state."

    def _line(self, label: str, text: str) -> None:
        self._console.print(f" [cyan]{label:<{_LABEL_WIDTH}}[/cyan]{text}")
