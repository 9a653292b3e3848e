"""What a snapshot costs the trainer again and again must not add up: no objects, descriptors, threads, no planning."""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import snapshotd_client
from snapshotd import _native
from snapshotd_client import layout
from snapshotd_client.state import TrainingState
from tests.cluster.harness import Daemon, until

WARM, MORE = 12, 40
LONG = 3 * MORE  # what a busy machine leaves once, a skipped step's reason, is little beside that


class Run:
    """A small training run in this process, protected by a daemon of its own."""

    def __init__(self, daemon: Daemon) -> None:
        torch.manual_seed(3)
        self.first = torch.nn.Linear(32, 32)
        self.model = torch.nn.Sequential(self.first, torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.999)
        self.guard = snapshotd_client.protect(
            self.model, self.optimizer, job="hot", extra={"scheduler": self.scheduler}, socket=daemon.socket
        )
        self.guard.restore()

    def train(self) -> None:
        """The loop's body without its last line."""
        self.model(torch.randn(16, 32)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def snapshots(self, count: int, between: Callable[[], object] = lambda: None) -> None:
        """Train until so many more snapshots are committed."""
        wanted = self.guard.status()["taken"] + count

        def another() -> bool:
            self.train()
            between()
            self.guard.step()
            self.guard.flush(20.0)
            return self.guard.status()["taken"] >= wanted

        until(another, f"{count} more snapshots ({self.guard.status()})")
        assert self.guard.status()["failures"] == 0


@pytest.fixture
def daemon(shm_dir: Path, tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(shm_dir, tmp_path)
    try:
        one.start()
        yield one
    finally:
        one.stop()


@pytest.fixture
def run(daemon: Daemon) -> Iterator[Run]:
    one = Run(daemon)
    with one.guard:
        one.snapshots(WARM)
        yield one


def newest(run: Run, daemon: Daemon) -> dict[str, torch.Tensor]:
    """The newest committed snapshot as any reader of the format sees it."""
    from safetensors.torch import load

    committed = run.guard.flush(20.0)
    (path,) = daemon.arenas()
    fd = os.open(path, os.O_RDONLY)
    arena = _native.Arena(fd, writable=False)
    os.close(fd)
    (slot,) = [one for one in map(arena.slot, range(arena.slots)) if one.step == committed]
    view = arena.slot_view(slot.index)
    tensors = load(bytes(view[: slot.file_bytes]))
    view.release()
    arena.close()
    return tensors


def living_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def test_snapshots_leave_no_objects_behind(run: Run) -> None:
    before = living_objects()
    run.snapshots(LONG)
    grown = living_objects() - before
    assert grown < MORE // 4, f"{grown} objects stayed after {LONG} snapshots"


def test_snapshots_leave_no_memory_behind_in_the_clients_code(run: Run) -> None:
    place = os.path.dirname(snapshotd_client.__file__)
    tracemalloc.start(1)
    try:
        run.snapshots(WARM)  # what is allocated before it was traced is replaced by what is
        before = tracemalloc.take_snapshot()
        run.snapshots(LONG)
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    rows = [row for row in after.compare_to(before, "filename") if row.traceback[0].filename.startswith(place)]
    grown = sum(row.size_diff for row in rows)
    assert rows, "the client's files are where they are looked for"
    assert grown < LONG * 16, f"{grown} bytes stayed after {LONG} snapshots"


def test_snapshots_open_no_descriptor_and_start_no_thread(run: Run) -> None:
    before = sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/proc/self/task"))
    run.snapshots(MORE)
    assert (sorted(os.listdir("/proc/self/fd")), sorted(os.listdir("/proc/self/task"))) == before


def test_a_snapshot_plans_pickles_and_hashes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this has no place between two cuts")

    for owner, name in (
        (layout, "build"), (layout, "signature_of"), (TrainingState, "leaves"), (torch, "save"), (pickle, "dumps"),
        (hashlib, "sha256"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    run.snapshots(MORE)  # fails on any exception that the guard caught


def test_a_step_without_a_snapshot_captures_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    host = TrainingState.host

    def noted(self: TrainingState, step: int, *rest: Any) -> Any:
        captured.append(step)
        return host(self, step, *rest)

    monkeypatch.setattr(TrainingState, "host", noted)
    for _ in range(MORE):
        run.guard.step()  # no optimizer stepped in between, so there is nothing new
    assert not captured
    run.snapshots(1)
    assert len(captured) == 1


def test_capturing_random_states_moves_none_of_them(run: Run) -> None:
    run.train()
    until(lambda: run.guard.status()["asked_step"] is not None, "the daemon's request for the next snapshot")
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(numpy.random.get_state())
    taken = run.guard.status()["taken"]
    run.guard.step()
    assert run.guard.status()["taken"] == taken + 1
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert pickle.dumps(numpy.random.get_state()) == before[2]


def test_a_parameter_whose_data_was_replaced_is_stored_from_its_new_place(run: Run, daemon: Daemon) -> None:
    weight = run.first.weight

    def replace() -> None:
        weight.data = torch.full_like(weight, 3.0)

    run.snapshots(2, between=replace)
    assert torch.equal(newest(run, daemon)["0.weight"], torch.full((32, 32), 3.0))


def test_optimizer_state_that_was_replaced_is_stored_from_its_new_place(run: Run, daemon: Daemon) -> None:
    state = run.optimizer.state[run.first.weight]
    values = iter(range(1, 1000))

    def replace() -> None:
        state["exp_avg"] = torch.full_like(state["exp_avg"], float(next(values)))
        state["exp_avg_sq"].data = state["exp_avg_sq"] + 1.0

    run.snapshots(2, between=replace)
    stored = newest(run, daemon)
    assert torch.equal(stored["optim0/0.weight/exp_avg"], state["exp_avg"])
    assert torch.equal(stored["optim0/0.weight/exp_avg_sq"], state["exp_avg_sq"])


def test_tensors_that_move_at_every_step_leave_nothing_behind(run: Run) -> None:
    weight = run.first.weight

    def move() -> None:
        weight.data = weight.data.clone()

    run.snapshots(WARM, between=move)
    before = living_objects()
    run.snapshots(MORE, between=move)
    grown = living_objects() - before
    assert grown < MORE // 4, f"{grown} objects stayed after {MORE} snapshots with a new layout each"


def test_copy_threads_never_take_the_core_of_who_woke_them(run: Run) -> None:
    policies: dict[str, set[int]] = {}
    for task in os.listdir("/proc/self/task"):
        name = Path(f"/proc/self/task/{task}/comm").read_text().strip()
        policies.setdefault(name, set()).add(os.sched_getscheduler(int(task)))
    assert policies["snapshotd-copy"] == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
