"""One training loop that saves in one way, measured from inside: what `benchmarks/stall.py` starts in fresh processes.

The loop is a real one: a chain of linear layers, autograd, AdamW, one thread of compute. Blocks of steps that save take
turns with blocks that do not, in the same process, so that whatever else the machine does meets both. The first step of
a block is not counted: the one before it belongs to the other kind, and its copy may still run.

With `nodes` above 1 this trainer is rank 0 of a job with a rank on each node. The others (`benchmarks/idle.py`) take
their snapshots in step: a byte to each of the pipes in `pace` says that a step is over, outside of what is measured.

A saver's four calls, in order, all from the loop: `save` at the end of the body, `before_optimizer` (from the
optimizer's own pre-hook), `facts` once the optimizer stepped, `drain` before a block that does not save.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from benchmarks.nodes import ask_status
from snapshotd.door_client import DoorClient

WARM_STEPS_MAX = 60
RENDEZVOUS_S = 60.0
JOB = "stall"
PARITY = 1  # of no effect on one node


@dataclass(frozen=True)
class Spec:
    """What one process does. `pairs` blocks of `steps` with saves, each between two blocks of as many without.

    With no pairs it only warms up, which has a first save and two later ones.
    """

    contestant: str
    layers: int
    width: int
    batch: int
    folder: str
    socket: str
    result: str
    pairs: int = 1
    steps: int = 1
    workers: int = 0  # forked before it waits to be killed (contestant "death")
    nodes: int = 1
    rendezvous: str = ""
    pace: tuple[int, ...] = ()


@dataclass
class Step:
    """One step, in seconds. `copy_s` and `wait_s` are of the copy that ran in this step, if one did."""

    block: int  # -1: warming up
    saving: bool
    counted: bool
    step_s: float = 0.0
    cpu_s: float = 0.0  # of the training thread, and so without what other programs took from it
    call_s: float = 0.0
    wait_s: float = 0.0
    host_s: float = 0.0
    copy_s: float = 0.0
    saved: bool = False


def meet(rendezvous: str, rank: int, world_size: int) -> None:
    """The process group of a job with a rank on each node. `rendezvous` is a file that does not exist yet."""
    import torch.distributed as dist

    where, patience = f"file://{rendezvous}", timedelta(seconds=RENDEZVOUS_S)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size, timeout=patience)


class Nothing:
    """No guard, no save: the control, whose blocks differ by nothing but noise."""

    def __init__(self, spec: Spec, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.spec, self.model, self.optimizer = spec, model, optimizer
        self.wait_s, self.number = 0.0, 0
        optimizer.register_step_pre_hook(self._hook)

    def _hook(self, *_: Any) -> None:
        began_s = time.perf_counter()
        self.before_optimizer()
        self.wait_s = time.perf_counter() - began_s

    def before_optimizer(self) -> None: ...

    def save(self) -> bool:
        return True

    def facts(self, step: Step) -> None:
        step.wait_s = self.wait_s

    def drain(self) -> None: ...

    def close(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def path(self) -> str:
        """Two places that take turns, since the newest whole checkpoint must outlive the next save."""
        self.number += 1
        return f"{self.spec.folder}/checkpoint-{self.number % 2}"


class Guarded(Nothing):
    """snapshotd, at every step."""

    def __init__(self, spec: Spec, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import snapshotd_client

        self.spec = spec
        self.socket = spec.socket
        if spec.nodes > 1:
            meet(spec.rendezvous, 0, spec.nodes)
        self.guard = snapshotd_client.protect(model, optimizer, job=JOB, socket=spec.socket, parity=PARITY)
        self.guard.restore()
        self.taken = 0

    def save(self) -> bool:
        self.guard.step()
        return True

    def facts(self, step: Step) -> None:
        timings = self.guard.status()["timings"]
        step.wait_s, step.copy_s = timings["settle_s"], timings["copy_s"]

    def after_save(self, step: Step) -> None:
        """Which snapshots were taken, and the part of the call that captured host state."""
        status = self.guard.status()
        step.saved, self.taken = status["taken"] > self.taken, status["taken"]
        step.host_s = status["timings"]["host_s"] if step.saved else 0.0
        for pipe in self.spec.pace:
            os.write(pipe, b"!")

    def drain(self) -> None:
        self.guard.flush(60.0)

    def close(self) -> dict[str, Any]:
        self.guard.flush(60.0)
        mine = self.guard.status()
        with DoorClient.connect(Path(self.socket)) as door:
            job = ask_status(door)["jobs"][JOB]
        self.guard.close()
        if self.spec.nodes > 1:
            torch.distributed.destroy_process_group()
        commits = next(
            one["commits"] for one in job["generations"] if mine["generation"].startswith(str(one["number"]))
        )
        return {**{key: mine[key] for key in ("taken", "skipped", "failures", "committed_step")}, "commits": commits}


class TorchSave(Nothing):
    """`torch.save` of the whole state into shared memory."""

    def save(self) -> bool:
        torch.save(self.state(), self.path())
        return True


class Dcp(Nothing):
    """`dcp.async_save` with nothing configured; a step that finds the last save running goes without one."""

    checkpointer = "THREAD"

    def __init__(self, spec: Spec, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(spec, model, optimizer)
        import torch.distributed as dist
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        os.environ["MASTER_ADDR"] = "127.0.0.1"  # where the checkpoint process of dcp meets this one
        dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        self.options: dict[str, Any] = {"async_checkpointer_type": AsyncCheckpointerType[self.checkpointer]}
        self.saving: Future[Any] | None = None
        self.staging: Future[Any] | None = None

    def save(self) -> bool:
        from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

        if self.saving is not None and not self.saving.done():
            return False
        begun = async_save(self.state(), checkpoint_id=self.path(), **self.options)
        if isinstance(begun, AsyncSaveResponse):
            self.staging, self.saving = begun.staging_completion, begun.upload_completion
        else:
            self.saving = begun
        return True

    def drain(self) -> None:
        if self.saving is not None:
            self.saving.result()

    def close(self) -> dict[str, Any]:
        import torch.distributed as dist

        self.drain()
        dist.destroy_process_group()
        return {}


class DcpProcess(Dcp):
    """The same with the checkpoint written by another process."""

    checkpointer = "PROCESS"


class DcpStaged(Dcp):
    """`dcp.async_save` at its best: one stager kept for all saves, copying in a thread beside forward and backward."""

    def __init__(self, spec: Spec, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(spec, model, optimizer)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
            )
        )
        self.options["async_stager"] = self.stager

    def before_optimizer(self) -> None:
        if self.staging is not None:
            self.staging.result()

    def close(self) -> dict[str, Any]:
        facts = super().close()
        self.stager.close()
        return facts


SAVERS: dict[str, Callable[[Spec, torch.nn.Module, torch.optim.Optimizer], Nothing]] = {
    "no guard": Nothing,
    "snapshotd": Guarded,
    "torch.save": TorchSave,
    "dcp thread": Dcp,
    "dcp process": DcpProcess,
    "dcp staged": DcpStaged,
}


class Chain(torch.nn.Module):
    """Square layers in a row, with residuals so that numbers stay tame however many there are."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + 0.05 * torch.tanh(layer(x))
        return x


class Loop:
    """Model, optimizer and saver, and a step that is measured."""

    def __init__(self, spec: Spec) -> None:
        torch.manual_seed(1)
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # arithmetic on them is slow and has nothing to do with saving
        self.model = Chain(spec.layers, spec.width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(spec.batch, spec.width)
        self.saver = SAVERS[spec.contestant](spec, self.model, self.optimizer)
        self.steps: list[Step] = []

    def step(self, block: int, *, saving: bool, counted: bool) -> Step:
        one = Step(block, saving, counted)
        began_s, cpu_s = time.perf_counter(), time.thread_time()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # the faults of a fresh 300 MB would scatter steps by 5 %
        trained_s, one.cpu_s = time.perf_counter(), time.thread_time() - cpu_s
        self.saver.facts(one)  # of the copy that ran until now; not part of the step's time
        call_s, cpu_s = time.perf_counter(), time.thread_time()
        if saving:
            one.saved = self.saver.save()
        ended_s = time.perf_counter()
        one.cpu_s += time.thread_time() - cpu_s
        one.call_s = ended_s - call_s
        one.step_s = trained_s - began_s + one.call_s
        if saving and isinstance(self.saver, Guarded):
            self.saver.after_save(one)
        self.steps.append(one)
        return one

    def warm_up(self) -> None:
        """Until three saves were made: the first steps make optimizer state, the arena comes while they run."""
        saved = 0
        for _ in range(WARM_STEPS_MAX):
            saved += self.step(-1, saving=True, counted=False).saved
            if saved >= 3:
                return
        raise SystemExit(f"no three saves within {WARM_STEPS_MAX} steps: {self.saver.close()}")

    def run(self, pairs: int, steps: int) -> None:
        self.warm_up()
        for block in range(2 * pairs + 1):
            saving = block % 2 == 1
            if not saving:
                self.saver.drain()
            for number in range(steps + 1):
                self.step(block, saving=saving, counted=number > 0)


def wait_to_be_killed(spec: Spec) -> None:
    """Commit once, fork workers as a DataLoader does, tell their pids, and wait."""
    loop = Loop(Spec(**{**asdict(spec), "contestant": "snapshotd"}))
    loop.warm_up()
    loop.saver.drain()
    workers = []
    for _ in range(spec.workers):
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        workers.append(pid)
    _write(spec.result, {"pid": os.getpid(), "workers": workers})
    signal.pause()


def _write(path: str, document: dict[str, Any]) -> None:
    """Whole or not at all, since somebody waits for it."""
    Path(f"{path}.part").write_text(json.dumps(document))
    os.replace(f"{path}.part", path)


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    if spec.contestant == "death":
        wait_to_be_killed(spec)
        return
    loop = Loop(spec)
    loop.run(spec.pairs, spec.steps)
    steps = [asdict(step) for step in loop.steps]
    _write(spec.result, {"steps": steps, "end": loop.saver.close()})


if __name__ == "__main__":
    main()
