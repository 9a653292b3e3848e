"""A trainer with a state of a given size and next to no computing, which writes down what memory it takes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass

import torch

import snapshotd_client
from snapshotd import _native

ROW = 1 << 20  # bytes of one parameter


@dataclass(frozen=True)
class Measured:
    """`state_bytes` are half parameters, half momentum. Afterwards it forks `workers` and waits to be killed."""

    socket: str
    result: str
    state_bytes: int
    snapshots: int
    workers: int = 0


def main(spec: Measured) -> None:
    """Train, protect, take so many snapshots, and write the result as one JSON object."""
    torch.set_num_threads(1)
    model = torch.nn.ParameterList(torch.zeros(ROW // 4) for _ in range(spec.state_bytes // 2 // ROW))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones(()).expand_as(parameter)  # gradients of no size: they are not what is measured
    optimizer.step()  # momentum is there before anything is protected
    before = _native.process_rss_anon_bytes()
    guard = snapshotd_client.protect(model, optimizer, job="measured", socket=spec.socket)
    guard.restore()
    peak, seen = before, []
    while guard.status()["taken"] < spec.snapshots:
        optimizer.step()
        guard.step()
        guard.flush(30.0)
        seen.append(_native.process_rss_anon_bytes())
        peak = max(peak, seen[-1])
    workers = [_worker() for _ in range(spec.workers)]
    facts = {"before": before, "peak": peak, "seen": seen, "workers": workers, "status": guard.status()}
    with open(f"{spec.result}.part", "w") as file:
        json.dump({"pid": os.getpid(), **facts}, file)
    os.replace(f"{spec.result}.part", spec.result)
    signal.pause()


def _worker() -> int:
    """A child that outlives this process, as a DataLoader's may: it inherits every descriptor."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    return pid
