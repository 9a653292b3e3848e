"""A training process on the simulated device, under `protect`: `python -m tests.cuda.sim_trainer SOCKET STEPS END`.

Trains up to STEPS steps from wherever its snapshot says, then prints one line of JSON: the step it began at, a digest
of its whole state, the guard's status and what the simulator found. END is `die` (no goodbye, as if it were killed,
once the last step is committed) or `close`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import torch

import snapshotd_client
from snapshotd_client import gpu
from tests.cuda import simtorch, support
from tests.cuda.client_rig import Net, train

FLUSH_S = 60.0


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every parameter, buffer and tensor of the optimizer."""
    total = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        total.update(simtorch.bits(tensor))
    for parameter in model.parameters():
        for name, value in sorted(optimizer.state[parameter].items()):
            total.update(name.encode() + simtorch.bits(value))
    return total.hexdigest()


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, world: simtorch.World | None) -> None:
    """The loop body: forward writes the buffer, the optimizer the rest."""
    model.counts.add_(step)  # type: ignore[operator]
    train(model, optimizer, step, world)


def undisturbed(steps: int) -> str:
    """The digest after so many steps in host memory, without a guard."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        step_of(model, optimizer, step, None)
    return digest(model, optimizer)


def main(socket: str, steps: int, end: str) -> None:
    simulator = support.Simulator()
    simulator.reset(31)
    world = simtorch.World(simulator.cuda)
    gpu.SEAM = simtorch.Seam(world)
    model = Net()
    simtorch.move(model, world, keep=(".stays",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    guard = snapshotd_client.protect(model, optimizer, job="sim", socket=socket)
    first = guard.restore()
    restored = digest(model, optimizer) if first else ""
    for step in range(first, steps):
        step_of(model, optimizer, step, world)
        guard.step()
        committed = guard.flush(FLUSH_S)
    told = {
        "first": first, "restored": restored, "digest": digest(model, optimizer), "committed": committed,
        "status": guard.status(), "findings": simulator.findings(),
    }  # fmt: skip
    print(json.dumps(told, default=str), flush=True)
    if end == "die":
        os._exit(0)
    guard.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
