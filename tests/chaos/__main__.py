"""`make chaos SECONDS=…`: random faults against a cluster of real daemons until the time is over; then a summary.

Exit status: 0 when every promise was kept, 1 when one was not (with the command that plays that round again and what
the daemons said), 2 for wrong options, 130 when stopped. Nothing is left behind, however it ends: see `fabric.enter`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tests.chaos import fabric
from tests.chaos.cluster import Cluster, workspace
from tests.chaos.nemesis import ACTS, Nemesis
from tests.chaos.tally import Tally, Violation
from tests.chaos.trial import PARITY

NODES_MIN, NODES_MAX = PARITY + 2, 16
LOG_LINES = 60


def options(arguments: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="begin no round later than this (default: 60)")
    add("--seed", type=int, help="draw what this seed draws (default: one that is printed)")
    add("--round", type=int, help="play this round of the seed only")
    add("--acts", type=lambda text: text.split(","), default=[], help="play these acts, once each, and nothing else")
    add("--nodes", type=int, default=5, help=f"machines, {NODES_MIN} to {NODES_MAX} (default: 5)")
    add("--loopback", action="store_true", help="one network and memory for all, as where there can be no namespaces")
    found = parser.parse_args(arguments)
    if not NODES_MIN <= found.nodes <= NODES_MAX:
        parser.error(f"--nodes is {found.nodes}; it must lie between {NODES_MIN} and {NODES_MAX}")
    if unknown := sorted(set(found.acts) - ACTS.keys()):
        parser.error(f"there is no act {unknown[0]!r}; the acts are {', '.join(ACTS)}")
    return found


def main(arguments: list[str]) -> int:
    given = options(arguments)
    if given.seed is None:
        given.seed = random.SystemRandom().randrange(1 << 32)
        arguments = [*arguments, "--seed", str(given.seed)]
    os.environ |= {
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # of the trainers: what torch says at length
    if fabric.inside():
        for place in (fabric.WORKSPACE, Path("/dev/shm"), Path(tempfile.gettempdir())):
            if not fabric.REPOSITORY.is_relative_to(place):
                fabric.run("mount", "-t", "tmpfs", "-o", "mode=1777", "chaos", str(place))
        return play(given, fabric.WORKSPACE, fabric.Fabric())
    why = "--loopback was given" if given.loopback else fabric.why_not()
    if not why:
        return fabric.enter("tests.chaos", arguments)
    print(f"no machines of their own: {why}. Nodes share loopback and /dev/shm; network and full memory are left out")
    with tempfile.TemporaryDirectory(prefix="snapshotd-chaos-", dir="/dev/shm") as top:
        return play(given, Path(top), None)


def play(given: argparse.Namespace, top: Path, switch: fabric.Fabric | None) -> int:
    """All rounds, and the summary."""
    print(f"seed {given.seed}, {given.nodes} nodes, parity {PARITY}", flush=True)
    tally, stopped = Tally(), False
    cluster = Cluster(*workspace(top), given.nodes, switch)
    try:
        with _stoppable():
            _rounds(given, cluster, tally)
    except KeyboardInterrupt:
        stopped = True
    except Violation as violation:
        tally.violations.append(str(violation))
        print(_last_words(cluster), flush=True)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C shall not stop the tidying
        cluster.close()
    print(tally.text(), flush=True)
    if tally.violations:
        which = f"--acts '{','.join(given.acts)}'" if given.acts else f"--round {tally.last_round}"
        print(f"again: {sys.executable} -m tests.chaos --seed {given.seed} --nodes {given.nodes} {which}")
        return 1
    return 130 if stopped else 0


def _rounds(given: argparse.Namespace, cluster: Cluster, tally: Tally) -> None:
    began_s = time.monotonic()
    cluster.start()
    print(f"{given.nodes} daemons answer", flush=True)
    nemesis = Nemesis(cluster, given.seed, tally, lambda line: print(line, flush=True))
    nemesis.new_job()
    if given.round is not None:
        nemesis.play(given.round, nemesis.drawn(given.round))
        return
    for number, act in enumerate(given.acts):
        nemesis.play(number, act)
    number = 0
    while not given.acts and time.monotonic() - began_s < given.seconds:
        nemesis.play(number, nemesis.drawn(number))
        number += 1


def _last_words(cluster: Cluster) -> str:
    lines = cluster.logs().splitlines()
    return "\n".join(["what the daemons said last:", *lines[-LOG_LINES:]])


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does: with tidying. As the first process of its namespace we would not hear either."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
