"""A training state on the simulated device, its plan and an arena: the client's CUDA path without a daemon.

For the tests in `test_client.py` and for the mutants' `quick_client.py`.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from snapshotd import _native, manifest, wire
from snapshotd.manifest import round_up
from snapshotd_client import gpu
from snapshotd_client.copier import Copier, Session, Settled
from snapshotd_client.hoststate import pack
from snapshotd_client.planner import Planner
from snapshotd_client.state import TrainingState
from tests.cuda import simtorch
from tests.cuda.simtorch import OnCard, World, bits

SESSION = Session("test", wire.GenerationId(1, b"n" * 16), 0, 1, (0,), 1, 0, 1)
BLOCK = 4096
PATIENCE = 10_000  # questions whether a copy is over: in the simulator a few do


class Net(torch.nn.Module):
    """Tensors of all kinds that the path must take: dense, strided, tiny, of two bytes, in host memory, a buffer."""

    def __init__(self, *, strided: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = torch.nn.Parameter(torch.randn(31, 33))
        self.small = torch.nn.Parameter(torch.randn(301).to(torch.bfloat16))
        self.one = torch.nn.Parameter(torch.randn(()))
        self.stays = torch.nn.Parameter(torch.randn(900))
        if strided:
            self.strided = torch.nn.Parameter(torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last))
        self.register_buffer("counts", torch.arange(500))


class Rig:
    """One optimizer step was done, a layout is planned, two slots are empty."""

    def __init__(self, sim: Any, *, strided: bool = True, wake_fd: int = -1) -> None:
        self.simulator = sim.simulator
        self.world, self.wake_fd, self.steps = World(sim.cuda), wake_fd, 0
        gpu.SEAM = simtorch.Seam(self.world)
        self.model = Net(strided=strided)
        simtorch.move(self.model, self.world, keep=(".stays",))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.train()
        self.state = TrainingState(self.model, [self.optimizer], {})
        self.planner = Planner(self.state)
        self.layout = self.planner.plan(1)
        slot_bytes = round_up(self.layout.manifest.file_bytes, BLOCK) + BLOCK
        fd = os.memfd_create("arena")
        _native.reserve(fd, _native.Arena.bytes_needed(2, slot_bytes, BLOCK))
        _native.Arena.format(
            fd, arena_id=b"a" * 16, job="test", local_index=0, slots=2, slot_bytes=slot_bytes, block_bytes=BLOCK
        )
        arena = _native.Arena(fd, writable=True)
        os.close(fd)
        self.copier = Copier(arena, os.eventfd(0), threads=1)

    def train(self) -> None:
        """An optimizer step with made-up gradients."""
        self.steps += 1
        train(self.model, self.optimizer, self.steps, self.world)

    def forward(self) -> None:
        """What a forward pass writes: the buffer."""
        self.model.counts.add_(1)  # type: ignore[operator]

    def begin(self, step: int) -> str:
        host = pack(self.state.host(step).document)
        assert not self.layout.watch.pointers_changed()  # as at every cut, which notes the versions
        return self.copier.begin(self.layout, SESSION, step, host, self.wake_fd)

    def settled(self) -> Settled:
        """Ask until the copy is over."""
        for _ in range(PATIENCE):
            if (found := self.copier.settle()) is not None:
                return found
        raise AssertionError("the copy is never over")

    def image(self) -> dict[str, bytes]:
        """The bytes of every tensor of the state now, by its name in the file."""
        return {leaf.name: bits(leaf.local) for leaf in self.state.leaves()}

    def in_slot(self, index: int) -> dict[str, bytes]:
        """The same as a slot holds it. AssertionError where its file does not verify."""
        arena = self.copier.arena
        info = arena.slot(index)
        assert info.state == _native.FULL and info.sound, "the slot is not FULL"
        assert arena.verify(index) == [], "blocks differ from their checksums"
        with arena.slot_view(index) as view:
            read = manifest.read(view, info.file_bytes)
            return {
                name: bytes(view[place : place + length])
                for name in read.entries
                for place, length in [read.span(name)]
                if not name.endswith("host")
            }

    def states(self) -> list[int]:
        return [self.copier.arena.slot(index).state for index in range(2)]

    def close(self) -> None:
        """Let go of everything on the device."""
        self.copier.close()
        world = self.world
        self.__dict__.clear()
        gpu.SEAM = gpu.Torch()
        world.close()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int, world: World | None) -> None:
    """An optimizer step with gradients made up from a seed: the same bits on the device and without one."""
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        on_card = isinstance(parameter, OnCard)
        parameter.grad = world.put(gradient) if on_card and world is not None else gradient
    optimizer.step()
    optimizer.zero_grad()


def take(rig: Rig, step: int) -> None:
    """A snapshot around which training goes on. AssertionError where it does not hold the state at the cut."""
    expected = rig.image()
    assert rig.begin(step) == "", rig.copier.trouble
    rig.forward()
    assert rig.copier.hold() is None
    rig.train()
    settled = rig.settled()
    assert not settled.skipped, settled.skipped
    index = rig.states().index(_native.FULL)
    assert rig.in_slot(index) == expected, "the slot does not hold what the tensors were at the cut"
    rig.copier.arena.empty(index)
