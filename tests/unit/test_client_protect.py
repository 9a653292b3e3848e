"""What `protect` and `restore` refuse, with which sentence, and that nothing of the guard disturbs a loop."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import snapshotd_client
from snapshotd_client import ConfigError, Guard


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No daemon, no name from the environment, no waiting."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "SNAPSHOTD_JOB", "SNAPSHOTD_CRASH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SNAPSHOTD_SOCKET", str(tmp_path / "door.sock"))
    monkeypatch.setenv("SNAPSHOTD_WAIT", "0")


class Loop:
    """A model, its optimizer and a loop body."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Linear(4, 2)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters())

    def body(self) -> None:
        self.model(torch.randn(3, 4)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def protect(self, **arguments: Any) -> Guard:
        return snapshotd_client.protect(self.model, self.optimizer, **{"job": "test", **arguments})


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def guard(loop: Loop) -> Iterator[Guard]:
    one = loop.protect()
    yield one
    one.close()


@pytest.mark.parametrize("every", [0, -1, 1.0, "2", True, None, 2**41])
def test_every_must_be_a_positive_whole_number(every: Any, loop: Loop) -> None:
    with pytest.raises(ConfigError, match=r"every is .*whole number from 1"):
        loop.protect(every=every)


@pytest.mark.parametrize(("name", "value"), [("parity", -1), ("parity", 255), ("group_size", 0), ("group_size", 256)])
def test_protection_between_nodes_has_its_range(name: str, value: int, loop: Loop) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        loop.protect(**{name: value})


@pytest.mark.parametrize("optimizer", [None, [], "adamw", [1]])
def test_an_optimizer_is_one_or_a_sequence_of_them(optimizer: Any, loop: Loop) -> None:
    with pytest.raises(ConfigError, match="optimizer must be"):
        snapshotd_client.protect(loop.model, optimizer, job="test")


def test_a_job_without_a_name_is_refused_since_it_could_not_be_found_again(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0b1f7a7e-5d4c-4f43-9b43-0c5f0a5f6b11")
    with pytest.raises(ConfigError, match="no name that a restart would carry"):
        loop.protect(job=None)


class Loader:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return {"state": self.state}

    def load_state_dict(self, state: Any) -> None:
        self.state = state["state"]


def test_an_extra_without_a_state_is_refused(loop: Loop) -> None:
    with pytest.raises(ConfigError, match="without state_dict"):
        loop.protect(extra={"thing": object()})


def test_an_extra_that_could_not_be_read_back_is_refused_at_once(loop: Loop) -> None:
    with pytest.raises(ConfigError, match="cannot be stored in a snapshot"):
        loop.protect(extra={"loader": Loader(Loop())})


def test_restore_is_called_once_and_before_training(loop: Loop, guard: Guard) -> None:
    assert guard.restore() == 0
    with pytest.raises(ConfigError, match="called twice"):
        guard.restore()


def test_restore_after_training_began_is_refused(loop: Loop, guard: Guard) -> None:
    loop.body()
    with pytest.raises(ConfigError, match="after training began"):
        guard.restore()


@pytest.mark.parametrize("arguments", [{"on_lost": "ignore"}, {"newer_than": -1}, {"newer_than": 2.5}])
def test_restore_refuses_arguments_that_mean_nothing(arguments: dict[str, Any], guard: Guard) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        guard.restore(**arguments)


def test_a_checkpoint_of_the_users_own_is_where_the_count_goes_on(loop: Loop, guard: Guard) -> None:
    assert guard.restore(newer_than=500) == 500
    loop.body()
    guard.step()
    assert guard.status()["step"] == 501


def test_a_step_is_a_call_whatever_the_optimizer_did(loop: Loop, guard: Guard) -> None:
    guard.restore()
    for _ in range(3):
        guard.step()
    loop.body()
    guard.step()
    assert guard.status()["step"] == 4


def test_nothing_that_fails_in_a_snapshot_reaches_the_loop(
    loop: Loop, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("planted")

    guard.restore()
    monkeypatch.setattr(guard, "_advance", fail)
    for _ in range(12):
        loop.body()
        guard.step()
    status = guard.status()
    assert status["failures"] == 10 and not status["protected"], "it gives up after ten, and says so"


def test_an_optimizer_that_steps_inside_backward_is_refused_once_and_training_goes_on(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in loop.model.parameters()]
    with snapshotd_client.protect(loop.model, optimizers, job="test") as guard:
        guard.restore()
        for parameter, optimizer in zip(loop.model.parameters(), optimizers, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
        for _ in range(3):
            loop.model(torch.randn(3, 4)).sum().backward()
            guard.step()
        assert not guard.status()["protected"]
    assert sum("inside backward" in record.message for record in caplog.records) == 1


def test_an_optimizer_that_was_moved_into_backward_is_refused_at_once(loop: Loop) -> None:
    parameter: Any = next(loop.model.parameters())
    parameter._in_backward_optimizers = [loop.optimizer]
    with pytest.raises(ConfigError, match="steps inside backward"):
        loop.protect()


def test_a_loop_without_a_step_line_is_told_once(loop: Loop, guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
    guard.restore()
    for _ in range(20):
        loop.body()
    told = [record.message for record in caplog.records if "does not call guard.step()" in record.message]
    assert len(told) == 1 and "best effort" in told[0]
    assert guard.status()["mode"] == "hooks" and guard.status()["step"] == 19, (
        "the cut of step 20 is at the next forward"
    )


def test_a_step_line_leaves_no_hook_on_forward(loop: Loop, guard: Guard) -> None:
    guard.restore()
    loop.body()
    guard.step()
    assert not loop.model._forward_pre_hooks


def test_closing_leaves_the_users_objects_as_they_were(loop: Loop) -> None:
    guard = loop.protect()
    guard.restore()
    guard.close()
    guard.close()
    assert not loop.model._forward_pre_hooks
    assert not loop.optimizer._optimizer_step_pre_hooks and not loop.optimizer._optimizer_step_post_hooks


def test_a_copied_or_pickled_model_takes_no_guard_along(loop: Loop, guard: Guard) -> None:
    for other in (copy.deepcopy(loop.model), pickle.loads(pickle.dumps(loop.model))):
        other(torch.randn(1, 4))
        assert all(getattr(hook, "__name__", "") == "_nothing" for hook in other._forward_pre_hooks.values())


def test_a_forked_child_has_no_part_in_its_parents_snapshots(loop: Loop, guard: Guard) -> None:
    guard.restore()
    loop.body()
    guard.step()
    child = os.fork()
    if child == 0:
        guard.step()
        os._exit(0 if guard.status()["step"] == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_tensor_on_another_device_is_refused_with_its_name(loop: Loop) -> None:
    with pytest.raises(ConfigError, match=r"weight is on meta.*disk checkpoints"):
        snapshotd_client.protect(loop.model.to("meta"), loop.optimizer, job="test")


def test_an_impatient_flush_leaves_a_long_copy_alone(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(*_: Any) -> None:
        raise AssertionError("settling a copy that still runs would give it up")

    arena = SimpleNamespace(committed_step=7)
    copier = SimpleNamespace(wait=lambda _: False, settle=settle, arena=arena)
    link = SimpleNamespace(trouble="", waiting=lambda: False, copier=copier)
    with monkeypatch.context() as patched:
        patched.setattr(guard, "_link", link)
        assert guard.flush(0.0) == 7
