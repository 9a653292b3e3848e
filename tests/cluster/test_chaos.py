"""A few declared faults of network, power and memory on real machines, and what `make chaos` promises of itself.

The acts run as `make chaos` runs them: in a program of their own, whose namespaces end with it. Where there can be no
namespaces, those acts that need none are played over loopback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from snapshotd.errors import SnapshotError, SnapshotLost
from tests.chaos import fabric
from tests.chaos.nemesis import ACTS, NEED_IPTABLES, NEED_MACHINES, Nemesis
from tests.chaos.tally import Tally, Violation
from tests.cluster.harness import until

BEYOND = ["power cut beyond the parity"]
STOPPED = 130
PATIENCE_S = 500.0
pytestmark = pytest.mark.timeout(900)  # programs that start programs, on a machine that may be very busy
MARK = "TEST_SESSION_OF_SNAPSHOTD"  # as in conftest.py, which must not be imported twice


def chaos(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.chaos", "--seed", "7", "--nodes", "4", *arguments]
    return subprocess.Popen(command, cwd=fabric.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_partitions_and_full_memory_cost_nothing_and_a_loss_beyond_the_parity_is_said_by_name() -> None:
    acts = BEYOND if fabric.why_not() else ["partition", "memory full", *BEYOND]
    with chaos("--acts", ",".join(acts)) as playing:
        said, _ = playing.communicate(timeout=PATIENCE_S)
    assert playing.returncode == 0, said
    assert all(f": {act}\n" in said for act in acts), said


def test_chaos_that_is_stopped_or_killed_leaves_no_process_and_no_file() -> None:
    ends = [signal.SIGINT] if fabric.why_not() else [signal.SIGINT, signal.SIGKILL]
    before = others()
    with contextlib.ExitStack() as stack:
        playing = [stack.enter_context(chaos("--seconds", "600")) for _ in ends]
        for one in playing:
            assert one.stdout is not None
            assert any("daemons answer" in line for line in one.stdout), "it ended before it began"
        assert len(others() - before) > 2 * 4, "there are daemons"
        for one, end in zip(playing, ends, strict=True):
            one.send_signal(end)
        said = [one.communicate(timeout=PATIENCE_S)[0] for one in playing]
    assert [one.returncode for one in playing] == [STOPPED, -signal.SIGKILL][: len(ends)], said
    until(lambda: others() <= before, f"the end of {others() - before}", PATIENCE_S)


def others() -> set[int]:
    """Every process that this test session has started, by whatever way."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found - {os.getpid()}


# --- the nemesis itself -----------------------------------------------------------------------------------------------


class Job:
    """A job that was told of step 5, and whose next generation answers as it is made to."""

    puppets: tuple[Any, ...] = ()
    step = 5

    def __init__(self, answer: int | SnapshotError) -> None:
        self.answer = answer

    def begin(self) -> int:
        if isinstance(self.answer, SnapshotError):
            raise self.answer
        return self.answer

    def commits(self, step: int) -> None:
        pass

    def publish(self, step: int) -> None:
        self.step = step


def nemesis(answer: int | SnapshotError, drops: bool = True) -> Nemesis:
    cluster = SimpleNamespace(daemons=[], fabric=SimpleNamespace(can_drop=drops))
    one = Nemesis(cast(Any, cluster), 7, Tally(), lambda line: None)
    one.cast, one.promised = cast(Any, Job(answer)), 5
    return one


@pytest.mark.parametrize("answer", [4, 0, SnapshotLost("step 5: too few pieces")], ids=["older", "none", "lost"])
def test_a_job_that_comes_back_without_what_was_promised_is_a_loss(answer: int | SnapshotError) -> None:
    one = nemesis(answer)
    with pytest.raises(Violation, match="step 5"):
        one._comes_back()
    assert one.tally.losses == 1 and one.tally.restores == 0


def test_a_job_that_comes_back_with_what_was_promised_is_none() -> None:
    one = nemesis(5)
    one._comes_back()
    assert one.tally.losses == 0 and one.tally.restores == 1


def test_a_step_that_commits_while_a_node_cannot_speak_is_a_violation() -> None:
    one = nemesis(5)
    one.promised = one.cast.step
    with pytest.raises(Violation, match="could not speak"):
        one._nothing_committed()


def test_the_same_seed_draws_the_same_acts_and_each_of_them_before_any_comes_again() -> None:
    drawn = [nemesis(5).drawn(number) for number in range(2 * len(ACTS))]
    assert drawn == [nemesis(5).drawn(number) for number in range(2 * len(ACTS))]
    assert set(drawn[: len(ACTS)]) == set(drawn[len(ACTS) :]) == set(ACTS)


def test_what_needs_a_tool_that_is_missing_is_left_out() -> None:
    assert set(nemesis(5, drops=False).acts()) == set(ACTS) - NEED_IPTABLES
    alone = nemesis(5)
    cast(Any, alone.cluster).fabric = None
    assert set(alone.acts()) == set(ACTS) - NEED_IPTABLES - NEED_MACHINES
