"""A short run through the client's CUDA path in the simulator, for mutants: `python -m tests.cuda.quick_client MODULE`.

Prints the first thing that is wrong, status 1, or 0 where nothing was.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from snapshotd import _native
from snapshotd_client import gpu
from snapshotd_client.copier import GPU_REFUSED, STILL_RUNNING
from snapshotd_client.hoststate import pack
from tests.cuda.client_rig import Rig, take
from tests.cuda.conftest import Running
from tests.cuda.simtorch import bits
from tests.cuda.support import EAGER, LAZY, Simulator


def snapshots(rig: Rig) -> None:
    """Two in a row; then tensors that moved."""
    take(rig, 1)
    take(rig, 2)
    state = rig.optimizer.state[rig.model.dense]
    state["exp_avg"] = state["exp_avg"] * 1
    captured = rig.state.host(3)
    moved = rig.planner.still_fits(rig.layout, captured, pack(captured.document))
    assert moved is not None and moved is not rig.layout
    rig.layout = moved
    take(rig, 3)


def nobody_waits(rig: Rig) -> None:
    """Neither for the cut nor in the hook; and whoever waits for the end is told."""
    rig.copier.prepare(rig.layout, rig.wake_fd)
    before = rig.simulator.waits()
    assert rig.begin(1) == ""
    assert rig.begin(2) == STILL_RUNNING
    rig.copier.hold()
    assert rig.simulator.waits() == before, "the host waited"
    assert not rig.settled().skipped
    rig.copier.close()  # a lazy device has not come to it before
    assert os.eventfd_read(rig.wake_fd) == 1


def spoiled(rig: Rig) -> None:
    """What the user writes is told from what the optimizer writes. The copy is over: the write's order is no matter."""
    assert rig.begin(1) == ""
    rig.copier.wait(60.0)
    with torch.no_grad():
        rig.model.small.add_(0)
    rig.copier.hold()
    assert "small was written" in rig.settled().skipped


def refused(rig: Rig) -> None:
    """A device that fails at any moment costs that snapshot, and says so."""
    rig.copier.prepare(rig.layout, rig.wake_fd)
    rig.simulator.fail_at(3)
    assert rig.begin(1) == GPU_REFUSED and rig.copier.trouble
    rig.simulator.fail_at(0)
    assert rig.begin(2) == ""
    rig.simulator.fail_at(1)
    rig.copier.hold()
    rig.simulator.fail_at(0)
    assert rig.settled().skipped, "the optimizer did not wait, and the snapshot was published"
    assert rig.begin(3) == ""
    rig.simulator.fail_at(1)
    settled = rig.copier.settle()
    assert settled is not None and settled.skipped, "the device was lost, and the snapshot was published"
    assert rig.states() == [_native.EMPTY, _native.EMPTY]


def brought_back(rig: Rig) -> None:
    """From the slot into the same tensors."""
    expected = rig.image()
    leaves = [leaf for leaf in rig.state.leaves() if gpu.is_on_gpu(leaf.local)]
    assert rig.begin(1) == "" and not rig.settled().skipped
    rig.train()
    with rig.copier.arena.slot_view(0) as view:
        half = rig.layout.manifest.places["dense"] + 1001
        places = [(leaf.local, rig.layout.manifest.places[leaf.name]) for leaf in leaves]
        gpu.fill([(0, view[:half]), (half, view[half:])], places)
    assert all(bits(leaf.local) == expected[leaf.name] for leaf in leaves), "other bytes came back"


CHECKS: tuple[Callable[[Rig], None], ...] = (snapshots, nobody_waits, spoiled, refused, brought_back)


def problems(simulator: Simulator) -> Iterator[str]:
    """Everything that is wrong, one sentence each."""
    sim = Running(simulator)
    for schedule, checks in ((LAZY, CHECKS), (3, (snapshots,)), (EAGER, (snapshots, brought_back))):
        for check in checks:
            simulator.reset(schedule)
            fd = os.eventfd(0, os.EFD_NONBLOCK)
            try:
                rig = Rig(sim, strided=check is not nobody_waits, wake_fd=fd)  # simulated torch waits for those
                check(rig)
                rig.close()
                del rig
            except (AssertionError, OSError, RuntimeError, ValueError, KeyError) as error:
                yield from simulator.findings()
                yield f"{check.__name__}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            yield from simulator.findings(leaks=True)
            os.close(fd)


def main() -> None:
    found = next(problems(Simulator(Path(sys.argv[1]))), "")
    print(found, flush=True)
    os._exit(1 if found else 0)  # a client with a bug is not asked to tidy up


if __name__ == "__main__":
    main()
