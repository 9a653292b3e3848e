"""The client's whole CUDA path: plan, gather, into the registered arena, wait, FULL; and back into tensors.

Torch here knows no CUDA: `simtorch` gives it tensors in the simulator's memory, and the client's code does the rest.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import snapshotd_client
from snapshotd import _native
from snapshotd.errors import ConfigError
from snapshotd_client import Guard, gpu
from snapshotd_client.copier import GPU_REFUSED, STILL_RUNNING
from snapshotd_client.state import TrainingState
from tests.cuda import simtorch
from tests.cuda.client_rig import Net, Rig, take
from tests.cuda.conftest import Running
from tests.cuda.simtorch import World, bits
from tests.cuda.support import ARCHS, EAGER, LAZY

SCHEDULES = (EAGER, LAZY, 21, 22, 23, 24)


@pytest.fixture(autouse=True)
def torchs_own_seam() -> Iterator[None]:
    yield
    gpu.SEAM = gpu.Torch()
    gc.collect()


@pytest.fixture
def rig(sim: Running) -> Iterator[Rig]:
    made = Rig(sim)
    yield made
    made.close()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_slot_holds_the_state_at_the_cut_while_training_goes_on(sim: Running, schedule: int, arch: int) -> None:
    sim.on(schedule, arch)
    rig = Rig(sim)
    take(rig, 1)
    take(rig, 2)
    rig.close()


def test_neither_the_cut_nor_the_hook_waits_for_the_device(sim: Running) -> None:
    rig = Rig(sim, strided=False)
    rig.copier.prepare(rig.layout)
    before = sim.simulator.waits()
    assert rig.begin(1) == "" and rig.copier.hold() is None
    assert sim.simulator.waits() == before
    assert rig.settled().skipped == ""
    rig.close()


def test_what_is_written_between_cut_and_optimizer_spoils_the_snapshot_and_is_named(sim: Running) -> None:
    rig = Rig(sim)
    assert rig.begin(1) == ""
    with torch.no_grad():
        rig.model.dense.add_(1)
    rig.copier.hold()
    rig.train()
    settled = rig.settled()
    assert settled.kind == "spoiled" and "dense was written between guard.step()" in settled.skipped
    assert rig.states() == [_native.EMPTY, _native.EMPTY]
    take(rig, 2)
    rig.close()
    found = sim.simulator.findings(leaks=True)
    assert len(found) == 1 and found[0].startswith("STREAMS"), "the simulator sees that write too, and nothing else"
    sim.simulator.reset()


def test_a_copy_that_is_over_before_the_optimizer_comes_is_published_at_once(rig: Rig) -> None:
    assert rig.begin(1) == ""
    assert rig.settled().skipped == ""
    assert rig.copier.hold() is None and rig.copier.settle() is None


def test_a_copy_that_takes_longer_than_a_step_is_not_waited_for(rig: Rig) -> None:
    assert rig.begin(1) == "" and rig.begin(2) == STILL_RUNNING
    rig.copier.hold()
    assert rig.settled().step == 1


def test_a_flush_waits_until_the_copy_is_over(rig: Rig) -> None:
    assert rig.begin(1) == "" and rig.copier.wait(60.0)
    settled = rig.copier.settle()
    assert settled is not None and not settled.skipped


def test_whoever_waits_is_told_by_a_descriptor_when_the_copy_is_over(sim: Running) -> None:
    sim.on(EAGER)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    rig = Rig(sim, wake_fd=fd)
    assert rig.begin(1) == ""
    assert os.eventfd_read(fd) == 1 and rig.copier.settle() is not None
    os.close(fd)
    rig.close()


def test_closing_in_the_middle_of_a_copy_leaves_an_empty_slot_and_nothing_on_the_device(sim: Running) -> None:
    rig = Rig(sim)
    assert rig.begin(1) == ""
    rig.close()


# --- what is refused


def test_tensors_on_two_devices_are_refused_by_name(sim: Running) -> None:
    first, second = World(sim.cuda, 0), World(sim.cuda, 1)
    gpu.SEAM = simtorch.Seam(first)
    model = Net()
    simtorch.move(model, first)
    model.small = torch.nn.Parameter(second.put(torch.ones(301)))
    with pytest.raises(ConfigError, match=r"dense is on cuda:0 and small on cuda:1.*one rank for each GPU"):
        TrainingState(model, [torch.optim.SGD(model.parameters())], {})
    del model
    first.close()
    second.close()


def test_without_the_module_or_a_driver_the_refusal_says_what_to_do(
    sim: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(sim.cuda)
    gpu.SEAM = simtorch.Seam(world)
    model = Net()
    simtorch.move(model, world)
    optimizer = torch.optim.SGD(model.parameters())
    world.is_missing = True
    with pytest.raises(ConfigError, match=r"dense is on cuda:0.*no CUDA part.*SNAPSHOTD_CUDA=nvrtc"):
        TrainingState(model, [optimizer], {})
    world.is_missing = False
    monkeypatch.setattr(sim.cuda, "why_no_device", lambda: "no GPU: there is no NVIDIA driver")
    with pytest.raises(ConfigError, match=r"'no GPU: there is no NVIDIA driver'.*update the driver.*snapshotd\[cuda\]"):
        TrainingState(model, [optimizer], {})
    del model, optimizer
    world.close()


def test_state_that_appears_on_another_device_later_is_a_refusal_and_no_copy(sim: Running) -> None:
    rig, other = Rig(sim), World(sim.cuda, 1)
    parameter = rig.model.dense
    rig.optimizer.state[parameter]["exp_avg"] = other.put(torch.zeros(31, 33))
    captured = rig.state.host(2)
    assert rig.planner.still_fits(rig.layout, captured, b"") is None
    with pytest.raises(ConfigError, match=r"dense is on cuda:0 and optim0/dense/exp_avg on cuda:1"):
        rig.planner.plan_for(captured, b"")
    rig.optimizer.state.clear()
    del parameter
    rig.close()
    other.close()


def test_a_device_without_memory_costs_snapshots_and_nothing_else(sim: Running) -> None:
    sim.on(LAZY, device_bytes=1 << 20)
    rig = Rig(sim)
    filler: list[torch.Tensor] = []
    with contextlib.suppress(sim.cuda.CudaMemoryError):
        while True:
            filler.append(rig.world.put(torch.ones(4096, dtype=torch.uint8)))
    assert rig.begin(1) == GPU_REFUSED and "cudaErrorMemoryAllocation" in rig.copier.trouble
    assert rig.states() == [_native.EMPTY, _native.EMPTY]
    filler.clear()
    take(rig, 2)
    assert rig.copier.trouble == ""
    rig.close()


def test_a_stream_that_is_gone_costs_that_snapshot_alone(rig: Rig) -> None:
    alive, rig.world.stream = rig.world.stream, rig.world.device.make_stream()
    rig.world.device.end_stream(rig.world.stream)
    rig.copier.prepare(rig.layout)
    rig.layout.gpu.reflect = lambda: None  # type: ignore[union-attr, method-assign]
    assert rig.begin(1) == GPU_REFUSED and "recording an event" in rig.copier.trouble
    rig.world.stream = alive
    assert rig.states() == [_native.EMPTY, _native.EMPTY]
    rig.layout = rig.planner.plan(2)
    take(rig, 2)


# --- the guard


@pytest.fixture
def guard(rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Guard]:
    """Of the rig's run, without a daemon: its link gives it the rig's arena, and a snapshot is asked for."""
    monkeypatch.setenv("SNAPSHOTD_SOCKET", str(tmp_path / "door.sock"))
    monkeypatch.setenv("SNAPSHOTD_WAIT", "0")
    one = snapshotd_client.protect(rig.model, rig.optimizer, job="test")
    one.restore()
    assert one._link is not None
    one._link.adopt(rig.copier, rig.layout)
    rig.copier.arena.next_step, rig.copier.arena.naming = 1, 1
    yield one
    one.close()
    for name in ("_state", "_planner", "_link", "_published_in", "_early"):  # pytest keeps the guard, not the device
        setattr(one, name, None)
    gc.collect()


def test_the_hooks_of_a_guard_take_a_snapshot_and_its_status_says_so(rig: Rig, guard: Guard) -> None:
    rig.train()
    expected = rig.image()
    guard.step()
    rig.train()
    assert guard.status()["taken"] == 1 and guard.status()["gpu"]
    assert rig.copier.wait(60.0)
    guard.step()
    assert guard.status()["published"] == 1 and rig.in_slot(0) == expected


def test_a_step_that_is_recorded_into_a_graph_is_refused_once_and_training_goes_on(
    rig: Rig, guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    rig.world.is_capturing = True
    for _ in range(3):
        rig.train()
        guard.step()
    assert not guard.status()["protected"]
    assert sum("recorded into a CUDA graph" in record.message for record in caplog.records) == 1


def test_what_a_device_refuses_is_counted_and_explained_and_training_goes_on(
    sim: Running, rig: Rig, guard: Guard
) -> None:
    rig.train()
    rig.copier.prepare(rig.layout)
    reflect = rig.layout.gpu.reflect  # type: ignore[union-attr]

    def then_fail() -> None:
        """Behind what the simulated torch does: the failure is meant for us."""
        reflect()
        sim.simulator.fail_at(2)

    rig.layout.gpu.reflect = then_fail  # type: ignore[union-attr, method-assign]
    guard.step()
    del rig.layout.gpu.reflect  # type: ignore[union-attr]
    sim.simulator.fail_at(0)
    status = guard.status()
    assert status["skipped"] == {GPU_REFUSED: 1} and "starting the copy failed" in status["trouble"]
    assert status["failures"] == 0
    rig.train()
    guard.step()
    assert guard.status()["taken"] == 1 and guard.status()["trouble"] == ""


def test_state_on_another_device_costs_snapshots_as_long_as_it_is_there(sim: Running, rig: Rig, guard: Guard) -> None:
    other = World(sim.cuda, 1)
    rig.train()
    state = rig.optimizer.state[rig.model.dense]
    held, state["exp_avg"] = state["exp_avg"], other.put(torch.zeros(31, 33))
    guard.step()
    status = guard.status()
    assert status["skipped"] == {"unsupported": 1} and "exp_avg on cuda:1" in status["trouble"]
    state["exp_avg"] = held
    rig.train()
    guard.step()
    assert guard.status()["taken"] == 1 and guard.status()["trouble"] == ""
    other.close()


# --- every call fails

PHASES: dict[str, Callable[[Rig], object]] = {
    "prepare": lambda rig: rig.copier.prepare(rig.layout),
    "begin": lambda rig: rig.begin(1),
    "hold": lambda rig: rig.copier.hold(),
    "settle": lambda rig: rig.copier.settle(),
}


@pytest.mark.parametrize("phase", PHASES)
def test_every_call_of_each_phase_fails_in_turn_and_training_hears_nothing(sim: Running, phase: str) -> None:
    n, failed = 0, True
    while failed:
        n += 1
        error = (999, 2)[n % 2]
        sim.on(LAZY)
        rig = Rig(sim, strided=False)
        expected = rig.image()
        for name, work in PHASES.items():
            sim.simulator.fail_at(n if name == phase else 0, error)
            work(rig)
            if name == phase:
                failed = sim.simulator.calls() >= n
        sim.simulator.fail_at(0)
        if rig.copier.busy():
            rig.settled()
        if rig.states() == [_native.EMPTY, _native.EMPTY]:
            assert failed and rig.copier.trouble, f"call {n} of {phase}: no snapshot, and nobody says why"
        else:
            assert rig.in_slot(0) == expected, f"call {n} of {phase}: the slot holds something else"
        assert _native.FILLING not in rig.states()
        rig.close()
        gc.collect()
        assert not sim.simulator.findings(leaks=True), f"call {n} of {phase}"
    assert n > 1, "no call was made to fail"


def test_after_a_failure_the_next_snapshot_is_taken_as_usual(sim: Running) -> None:
    for n in range(1, 40, 4):
        sim.on(LAZY)
        rig = Rig(sim, strided=False)
        rig.copier.prepare(rig.layout)
        sim.simulator.fail_at(n)
        refused = rig.begin(1) != ""
        sim.simulator.fail_at(0)
        if not refused:
            rig.settled()
            rig.copier.arena.empty(0)
        take(rig, 2)
        rig.close()
        gc.collect()


# --- the way back


@pytest.mark.parametrize("schedule", [EAGER, LAZY, 25])
def test_a_file_comes_back_into_the_tensors_in_place_window_by_window(sim: Running, schedule: int) -> None:
    sim.on(schedule)
    rig = Rig(sim)
    expected, leaves = rig.image(), rig.state.leaves()
    assert rig.begin(1) == "" and rig.settled().skipped == ""
    places = rig.layout.manifest.places
    targets = [(leaf.local, places[leaf.name]) for leaf in leaves if gpu.is_on_gpu(leaf.local)]
    before = [leaf.local.data_ptr() for leaf in leaves]
    rig.train()
    rig.forward()
    with rig.copier.arena.slot_view(0) as view:
        size = len(view)
        edges = [0, 5000, 5001, 9000, size // 2, size]
        gpu.fill(((a, view[a:b]) for a, b in itertools.pairwise(edges)), targets)
    after = rig.state.leaves()
    assert [leaf.local.data_ptr() for leaf in after] == before
    for leaf in after:
        if gpu.is_on_gpu(leaf.local):
            assert bits(leaf.local) == expected[leaf.name], leaf.name
    del leaves, after, targets
    rig.close()
