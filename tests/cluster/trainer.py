"""The trainer that the tests start and kill: one recipe, a guard, a journal."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any

import torch
import torch._dynamo  # optimizers import it when first used, which takes a second: once, in the fork server
import torch.distributed as dist

import snapshotd_client
from tests import recipes

if TYPE_CHECKING:
    from tests.cluster.harness import Spec

UNDISTURBED_SEED = 7


class Journal:
    """One JSON object per event, written at once."""

    def __init__(self, path: str) -> None:
        self._file: IO[str] = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the process lives

    def write(self, event: str, **facts: Any) -> None:
        self._file.write(json.dumps({"event": event, **facts}) + "\n")


class _ToJournal(logging.Handler):
    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.INFO)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self._journal.write("log", level=record.levelname, message=record.getMessage())


def main(spec: Spec) -> None:
    """Train as the spec says; exceptions go to the journal and end the process with code 3."""
    journal = Journal(spec.journal)
    logger = logging.getLogger("snapshotd")
    logger.addHandler(_ToJournal(journal))
    logger.setLevel(logging.INFO)
    os.environ.update(spec.environment)
    os.environ.setdefault("SNAPSHOTD_WAIT", "60")  # a busy machine takes its time to restart a daemon
    if spec.crash:
        os.environ["SNAPSHOTD_CRASH"] = spec.crash
    torch.set_num_threads(1)
    journal.write("start", pid=os.getpid())
    try:
        train(spec, journal)
    except BaseException as error:
        journal.write("error", kind=type(error).__name__, message=str(error))
        os._exit(3)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def build(spec: Spec) -> recipes.Run:
    """The recipe from fixed seeds; ranks draw different data and dropout."""
    if spec.world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{spec.rendezvous}", rank=spec.rank, world_size=spec.world_size,
            timeout=timedelta(seconds=30),
        )  # fmt: skip
    torch.manual_seed(UNDISTURBED_SEED)
    run = {**recipes.RECIPES, **recipes.PARALLEL}[spec.recipe]()
    torch.manual_seed(UNDISTURBED_SEED + 1 + spec.rank)
    return run


def train(spec: Spec, journal: Journal) -> None:
    run = build(spec)
    guard, first = None, 0
    if spec.guard:
        optimizer: Any = run.optimizers if len(run.optimizers) > 1 else run.optimizers[0]
        guard = snapshotd_client.protect(
            run.model, optimizer, job=spec.job, every=spec.every, extra=run.extra, socket=spec.socket,
            parity=spec.parity, group_size=spec.group_size,
        )  # fmt: skip
        first = guard.restore(**spec.restore)
        journal.write("restored", step=first, report=guard.status()["restore"])
    for step in range(first, spec.steps):
        wait_at_gate(spec, step, journal)
        loss = run.body(step)
        journal.write("step", step=step, loss=float(loss.detach()).hex())
        if guard is not None:
            if not spec.hooks_only:
                guard.step()
            if spec.flush:
                journal.write("committed", step=guard.flush(spec.flush_s))
                wait_until_asked(guard)
            elif spec.die == "after_commit" and guard.status()["committed_step"] is None:
                wait_until_asked(guard, also_for_a_daemon=True)
        if spec.die and step + 1 == spec.die_step:
            dump(spec, run)
            die(spec, guard, journal)
    journal.write("end", digest=recipes.digest(run), status=guard.status() if guard else None)
    if guard is not None and spec.close:
        guard.close()


def wait_until_asked(guard: snapshotd_client.Guard, *, also_for_a_daemon: bool = False) -> None:
    """Until the daemon has asked for the next snapshot (for a moment only): these steps are far too short, and what one
    rank hears before this step and another behind it is a snapshot that never becomes whole."""
    for _ in range(2000 if also_for_a_daemon else 200):
        status = guard.status()
        if status["asked_step"] is not None or not (also_for_a_daemon or status["connected"]):
            return
        time.sleep(0.001)


def wait_at_gate(spec: Spec, step: int, journal: Journal) -> None:
    """Hold before this step until the test opens the gate (creates the file)."""
    gate = spec.gates.get(step)
    if gate:
        journal.write("at gate", step=step)
        while not os.path.exists(gate):
            time.sleep(0.005)


def dump(spec: Spec, run: recipes.Run) -> None:
    """Whole parameters and moments by name, as torch itself sees them, for tests that read slots as files."""
    if not spec.dump:
        return
    whole = {name: _whole(parameter) for name, parameter in run.model.named_parameters()}
    names = {id(parameter): name.removeprefix("module.") for name, parameter in run.model.named_parameters()}
    for parameter, state in run.optimizers[0].state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                whole[f"optim0/{names[id(parameter)]}/{key}"] = _whole(value)
    torch.save({name.removeprefix("module."): value for name, value in whole.items()}, f"{spec.dump}.{spec.rank}")


def _whole(value: Any) -> torch.Tensor:
    found = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found.detach().clone()


def die(spec: Spec, guard: snapshotd_client.Guard | None, journal: Journal) -> None:
    """End as the spec says: killed at once, killed after a commit is there, or by an exception."""
    if guard is not None:
        committed = guard.flush(20.0) if spec.die == "after_commit" else guard.status()["committed_step"]
        journal.write("dying", committed=committed)
    if spec.die == "raise":
        raise RuntimeError("the training loop failed by itself")
    os.kill(os.getpid(), signal.SIGKILL)
