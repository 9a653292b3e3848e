"""A rank's copy in its trainer's hands: what is published, what is given up, and what a layout notices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load

from snapshotd import _native, wire
from snapshotd.manifest import round_up
from snapshotd_client.copier import Copier, Session
from snapshotd_client.hoststate import pack
from snapshotd_client.layout import Layout
from snapshotd_client.planner import Planner
from snapshotd_client.state import TrainingState

SESSION = Session("test", wire.GenerationId(1, b"n" * 16), 0, 1, (0,), 1, 0, 1)
BLOCK = 4096


@dataclass
class Rig:
    """A model that trained one step, its plan, and an arena without a daemon."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    state: TrainingState
    planner: Planner
    layout: Layout
    copier: Copier
    onlooker: _native.Arena

    def begin(self, step: int, layout: Layout | None = None) -> str:
        host = pack(self.state.host(step).document)
        layout = layout or self.layout
        assert not layout.watch.pointers_changed()  # as at every cut, which notes the versions
        return self.copier.begin(layout, SESSION, step, host, -1)

    def train(self) -> None:
        self.model(torch.randn(3, 8)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def states(self) -> list[int]:
        return [self.copier.arena.slot(index).state for index in range(2)]


@pytest.fixture
def rig() -> Iterator[Rig]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainingState(model, [optimizer], {})
    rig = Rig(model, optimizer, state, Planner(state), None, None, None)  # type: ignore[arg-type]
    rig.train()
    rig.layout = rig.planner.plan(1)
    slot_bytes = round_up(rig.layout.manifest.file_bytes, BLOCK) + BLOCK
    fd = os.memfd_create("arena")
    _native.reserve(fd, _native.Arena.bytes_needed(2, slot_bytes, BLOCK))
    _native.Arena.format(
        fd, arena_id=b"a" * 16, job="test", local_index=0, slots=2, slot_bytes=slot_bytes, block_bytes=BLOCK
    )
    arena, rig.onlooker = _native.Arena(fd, writable=True), _native.Arena(fd, writable=False)
    os.close(fd)
    rig.copier = Copier(arena, os.eventfd(0), threads=1)
    yield rig
    rig.copier.close()


def test_a_copy_becomes_a_full_slot_that_verifies_and_opens(rig: Rig) -> None:
    assert rig.begin(1) == ""
    settled = rig.copier.settle()
    assert settled is not None and settled.step == 1 and not settled.skipped
    arena = rig.copier.arena
    info = arena.slot(0)
    assert info.state == _native.FULL and info.sound and info.step == 1 and arena.verify(0) == []
    view = arena.slot_view(0)
    opened = load(bytes(view[: info.file_bytes]))
    assert not any(view[info.file_bytes :]), "what follows the file is zero"
    view.release()
    for name, parameter in rig.model.named_parameters():
        assert torch.equal(opened[name], parameter)
        assert torch.equal(opened[f"optim0/{name}/exp_avg"], rig.optimizer.state[parameter]["exp_avg"])


def test_a_tensor_written_before_the_copy_was_over_spoils_that_snapshot_and_is_named(rig: Rig) -> None:
    rig.begin(1)
    with torch.no_grad():
        rig.model[1].weight.add_(1)  # type: ignore[index]
    settled = rig.copier.settle()
    assert settled is not None and "1.weight was written" in settled.skipped
    assert rig.states() == [_native.EMPTY, _native.EMPTY]
    assert rig.begin(2) == "" and rig.copier.settle() is not None, "the next one is taken as usual"
    assert rig.states()[0] == _native.FULL


def test_what_is_settled_once_stays_settled(rig: Rig) -> None:
    rig.begin(1)
    assert rig.copier.settle() is not None
    assert rig.copier.settle() is None and not rig.copier.busy()


def test_without_a_free_slot_a_step_goes_without(rig: Rig) -> None:
    for step in (1, 2):
        assert rig.begin(step) == ""
        rig.copier.settle()
    assert rig.begin(3) == "no slot was free"
    assert rig.states() == [_native.FULL, _native.FULL]


def test_a_slot_that_held_a_longer_host_state_shows_nothing_of_it(rig: Rig) -> None:
    place, length = rig.layout.host_place
    for step, host in ((1, pack({"long": "x" * 3000})), (2, pack({}))):
        assert rig.copier.begin(rig.layout, SESSION, step, host, -1) == ""
        rig.copier.settle()
        view = rig.copier.arena.slot_view(0)
        assert bytes(view[place : place + length]) == host.ljust(length, b"\0")
        view.release()
        rig.copier.arena.empty(0)


def test_the_plan_holds_while_training_goes_on(rig: Rig) -> None:
    for step in (2, 3):
        rig.train()
        captured = rig.state.host(step)
        assert rig.planner.still_fits(rig.layout, captured, pack(captured.document)) is rig.layout


def test_tensors_that_moved_are_found_again_under_the_same_file(rig: Rig) -> None:
    parameter = rig.model[0].weight  # type: ignore[index]
    parameter.data = parameter.data.clone()
    rig.optimizer.state[parameter]["exp_avg"] = rig.optimizer.state[parameter]["exp_avg"].clone()
    captured = rig.state.host(2)
    moved = rig.planner.still_fits(rig.layout, captured, pack(captured.document))
    assert moved is not None and moved is not rig.layout
    assert moved.manifest.fingerprint == rig.layout.manifest.fingerprint
    assert rig.begin(2, moved) == "" and rig.copier.settle() is not None
    view = rig.copier.arena.slot_view(0)
    assert torch.equal(load(bytes(view[: moved.manifest.file_bytes]))["0.weight"], parameter)
    view.release()


def test_state_that_appears_or_goes_is_another_layout(rig: Rig) -> None:
    captured = rig.state.host(2)
    host = pack(captured.document)
    rig.optimizer.state[rig.model[0].weight]["late"] = torch.zeros(3)  # type: ignore[index]
    assert rig.planner.still_fits(rig.layout, captured, host) is None
    wider = rig.planner.plan_for(captured, host)
    assert "optim0/0.weight/late" in wider.manifest.entries
    del rig.optimizer.state[rig.model[0].weight]["late"]  # type: ignore[index]
    assert rig.planner.still_fits(wider, captured, host) is None


def test_a_host_state_that_outgrew_its_place_is_another_layout(rig: Rig) -> None:
    captured = rig.state.host(2)
    assert rig.planner.still_fits(rig.layout, captured, b"x" * (rig.layout.host_place[1] + 1)) is None


def test_closing_in_the_middle_of_a_copy_gives_the_slot_up(rig: Rig) -> None:
    rig.begin(1)
    rig.copier.close()
    rig.copier.close()
    assert [rig.onlooker.slot(index).state for index in range(2)] == [_native.EMPTY, _native.EMPTY]
