"""The daemon's sums on the simulated device: parity and rebuilt shards as by the processor, whatever call fails."""

from __future__ import annotations

import gc
import itertools

import pytest

from snapshotd import accelerator
from snapshotd.accelerator import Accelerator
from tests.cuda.conftest import Running
from tests.cuda.support import EAGER, LAZY
from tests.unit.groups import group
from tests.unit.native_support import BLOCK
from tests.unit.test_protect import is_whole

SIZES = [[2 * BLOCK + 3, 77], [BLOCK], [1, BLOCK - 1], [2 * BLOCK]]


def parity_and_a_shard(sim: Running, chooser: Accelerator, parity: int) -> None:
    with group(SIZES, parity) as one:
        one.tools.accelerator = chooser
        one.protect(0, 1)
        for position in (0, 1):
            is_whole(one, position)
        rank = one.ranks_at(2)[0]
        left = [other for position in (0, 1, 3) for other in one.ranks_at(position)]
        one.comes_back(one.job(rank, left, [0, 1]))
        one.tools.accelerator = None
        one.tools._own.__dict__.clear()


@pytest.mark.parametrize("schedule", [EAGER, LAZY, 41])
@pytest.mark.parametrize("parity", [2])
def test_parity_and_shards_are_those_of_the_processor(
    sim: Running, monkeypatch: pytest.MonkeyPatch, schedule: int, parity: int
) -> None:
    sim.on(schedule)
    monkeypatch.setattr(accelerator, "load", lambda: sim.cuda)
    chooser = Accelerator("cuda", itertools.count().__next__, sim.cuda.Device())
    parity_and_a_shard(sim, chooser, parity)
    assert chooser.facts()["chosen"][0]["codec"] == "cuda"
    chooser._own.__dict__.clear()
    gc.collect()


def test_whatever_call_fails_the_window_is_right(sim: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "load", lambda: sim.cuda)
    n, failed = 0, True
    while failed:
        n += 1
        sim.on(LAZY)
        chooser = Accelerator("cuda", itertools.count().__next__, sim.cuda.Device())
        sim.simulator.fail_at(n)
        bench = chooser.bench(3, 2, BLOCK, 3 * BLOCK, "planes")
        target, data = memoryview(bytearray(BLOCK + 12)), [bytes([i + 1]) * (BLOCK + 12) for i in range(3)]
        if bench is not None:
            for room, one in zip(bench.rooms, data, strict=True):
                room[: len(one)] = one
            bench.add_up(target, [1, 1, 1], "planes")
            assert bytes(target) == bytes([1 ^ 2 ^ 3]) * (BLOCK + 12)
        failed = sim.simulator.calls() >= n
        sim.simulator.fail_at(0)
        assert bool(chooser.facts()["why"].startswith("the GPU failed")) == failed, f"call {n}"
        del bench
        chooser._own.__dict__.clear()
        gc.collect()
    assert n > 20
