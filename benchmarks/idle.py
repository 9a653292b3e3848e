"""A trainer that holds a state and snapshots it with the real guard but computes next to nothing.

It stands for a node whose computing would be in the way of what is measured on this machine. The state is that of
`benchmarks.loop`: square layers, AdamW. Each step trains one layer, so that there is something to save.

With `step_s` a step takes so long, asleep, and ends when all ranks ended it (an all-reduce). Without, it ends when a
byte arrives on standard input: whoever writes it sets the pace. All ranks stop together once that is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.nodes import ROOT, pinned_to


@dataclass(frozen=True)
class Spec:
    """What one such trainer does; there is one on each node."""

    job: str
    rank: int
    world_size: int
    socket: str
    rendezvous: str
    layers: int
    width: int
    parity: int
    result: str
    step_s: float = 0.0


@contextlib.contextmanager
def started(spec: Spec, log: Path, cores: Sequence[int] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Such a trainer in a process of its own, killed in the end if it still runs."""
    command = [sys.executable, "-m", "benchmarks.idle", json.dumps(asdict(spec))]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, cwd=ROOT, preexec_fn=pinned_to(cores)
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


# --- the trainer's own side -------------------------------------------------------------------------


class Idle:
    """Model, optimizer and guard."""

    def __init__(self, spec: Spec) -> None:
        import torch

        import snapshotd_client
        from benchmarks.loop import Chain, meet

        torch.manual_seed(spec.rank)
        torch.set_num_threads(1)
        self.spec = spec
        self.model = Chain(spec.layers, spec.width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        meet(spec.rendezvous, spec.rank, spec.world_size)
        self.guard = snapshotd_client.protect(
            self.model, self.optimizer, job=spec.job, socket=spec.socket, parity=spec.parity
        )
        self.guard.restore()
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach().clone()
        self.steps: list[dict[str, Any]] = []
        self.taken = self.published = 0

    def step(self) -> None:
        """The first one makes all optimizer state, later ones train one layer."""
        began_s = time.perf_counter()
        self.optimizer.step()
        call_s = time.perf_counter()
        self.guard.step()
        ended_s, after = time.perf_counter(), self.guard.status()
        if not self.steps:
            for parameter in list(self.model.parameters())[1:]:
                parameter.grad = None
        copied = after["published"] > self.published  # the copy of an earlier step
        self.steps.append(
            {
                "at_s": ended_s,
                "busy_s": ended_s - began_s,
                "call_s": ended_s - call_s,
                "taken": after["taken"] > self.taken,
                "copy_s": after["timings"]["copy_s"] if copied else 0.0,
            }
        )
        self.taken, self.published = after["taken"], after["published"]

    def run_paced(self) -> None:
        while os.read(0, 1):
            self.step()

    def run_in_lockstep(self) -> None:
        import torch
        import torch.distributed as dist

        over = torch.zeros(1)
        due_s = time.perf_counter()
        while not over.item():
            due_s = max(due_s + self.spec.step_s, time.perf_counter())  # what came late is not made up for
            time.sleep(max(0.0, due_s - time.perf_counter()))
            over.fill_(bool(select.select([0], [], [], 0)[0]))
            dist.all_reduce(over, dist.ReduceOp.MAX)
            self.step()

    def close(self) -> None:
        """Tell what was seen, and end the run, which frees what the nodes hold once all ranks have."""
        import torch.distributed as dist

        self.guard.flush(60.0)
        facts = {key: value for key, value in self.guard.status().items() if key != "restore"}
        self.guard.close()
        dist.destroy_process_group()
        Path(self.spec.result).write_text(json.dumps({"steps": self.steps, "end": facts}))


def main() -> None:
    one = Idle(Spec(**json.loads(sys.argv[1])))
    if one.spec.step_s:
        one.run_in_lockstep()
    else:
        one.run_paced()
    one.close()


if __name__ == "__main__":
    main()
