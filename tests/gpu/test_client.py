"""On a real GPU, with a torch that knows it: the client's path into an arena and back. `pytest -m gpu`"""

from __future__ import annotations

import os

import pytest
import torch

from snapshotd import _native
from snapshotd_client import gpu
from snapshotd_client.copier import Copier
from snapshotd_client.hoststate import pack
from snapshotd_client.planner import Planner
from snapshotd_client.state import TrainingState
from tests.cuda.client_rig import SESSION

_cuda = pytest.importorskip("snapshotd._cuda", reason="NOT RUN: snapshotd._cuda was not built here (no nvcc)")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN on a device: this torch has no CUDA device"),
    pytest.mark.skipif(_cuda.device_count() == 0, reason=f"NOT RUN on a device: {_cuda.why_no_device()}"),
]
BLOCK = 1 << 20


def test_a_slot_holds_the_state_at_the_cut_and_gives_it_back() -> None:
    """Twenty rounds over 100 MB in which forward, backward and the optimizer follow the cut at once."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(2048, 2048), torch.nn.BatchNorm1d(2048), torch.nn.Linear(2048, 2048)
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainingState(model, [optimizer], {})

    def train() -> None:
        model(torch.randn(64, 2048, device="cuda")).square().mean().backward()
        copier.hold()
        optimizer.step()
        optimizer.zero_grad()

    copier: Copier = None  # type: ignore[assignment]
    model(torch.randn(64, 2048, device="cuda")).sum().backward()
    optimizer.step()
    layout = Planner(state).plan(1)
    slot_bytes = -(-layout.manifest.file_bytes // BLOCK) * BLOCK
    fd = os.memfd_create("arena")
    _native.reserve(fd, _native.Arena.bytes_needed(2, slot_bytes, BLOCK))
    _native.Arena.format(
        fd, arena_id=b"a" * 16, job="test", local_index=0, slots=2, slot_bytes=slot_bytes, block_bytes=BLOCK
    )
    copier = Copier(_native.Arena(fd, writable=True), os.eventfd(0), threads=1)
    os.close(fd)
    for step in range(20):
        expected = {leaf.name: leaf.local.clone() for leaf in state.leaves()}
        assert not layout.watch.pointers_changed()  # as at every cut, which notes the versions
        assert copier.begin(layout, SESSION, step + 1, pack(state.host(step).document), -1) == "", copier.trouble
        train()
        assert copier.wait(60.0)
        settled = copier.settle()
        assert settled is not None and not settled.skipped, settled
        assert copier.arena.verify(0) == []
        leaves = [leaf for leaf in state.leaves() if gpu.is_on_gpu(leaf.local)]
        with copier.arena.slot_view(0) as view:
            gpu.fill([(0, view)], [(leaf.local, layout.manifest.places[leaf.name]) for leaf in leaves])
        assert all(torch.equal(leaf.local, expected[leaf.name]) for leaf in leaves), f"step {step}"
        copier.arena.empty(0)
    copier.close()
