"""A small GPT that learns Python's own sources byte by byte, and survives being killed.

    snapshotd run -- torchrun --nproc-per-node 2 --max-restarts 3 examples/gpt.py --parallel fsdp --job my-first-gpt

Kill one of the two trainers while it runs: torchrun starts both again, and they go on with the step after the
newest one that was committed in memory. The lines that make it so are marked `guard:`. Over several nodes, lost nodes
come back too: their shards are rebuilt from parity that the others keep. `snapshotd drill` runs this file over nodes
that it kills and destroys, and compares the outcome with a run that nobody disturbed.

Everything here is plain PyTorch. Dropout and batches draw from torch's generator and the learning rate follows a
schedule, so weights alone would not bring back the same run: the guard keeps those states too.
"""

from __future__ import annotations

import time

STARTED_S = time.monotonic()  # before torch is imported, which takes seconds

import argparse
import ctypes
import hashlib
import json
import math
import os
import sysconfig
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import snapshotd_client  # guard: 1 of 4

IMPORTED_S = time.monotonic()

BYTES = 256  # the vocabulary
CONTEXT = 64
WIDTH = 224
HEADS = 4
DEPTH = 4
BATCH = 6
TEXT_BYTES_MAX = 4 << 20


class Block(nn.Module):
    """Attention and a two-layer perceptron, each beside a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.before_perceptron = nn.LayerNorm(WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        packed = self.query_key_value(self.before_attention(x))
        query, key, value = packed.view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.project(seen.transpose(1, 2).reshape(batch, length, WIDTH)))
        x = x + self.dropout(self.perceptron(self.before_perceptron(x)))
        return x


class GPT(nn.Module):
    """About 2.6 million parameters; with AdamW's two moments a state of 31 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.last_norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES)

    def forward(self, text: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of predicting `targets`, the byte that follows each byte of `text`."""
        x = self.bytes(text) + self.places(torch.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        loss: Tensor = cross_entropy(self.head(self.last_norm(x)).flatten(0, 1), targets.flatten())
        return loss


def read_text() -> Tensor:
    """The standard library's modules, one after the other: text that every machine with Python has."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= TEXT_BYTES_MAX:
            break
    return torch.frombuffer(text[:TEXT_BYTES_MAX], dtype=torch.uint8)


def draw_batch(text: Tensor) -> tuple[Tensor, Tensor]:
    """Windows at places drawn from torch's generator, and the same windows one byte further on."""
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1))
    windows = text[starts + torch.arange(CONTEXT + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def warm_up_then_cosine(steps: int) -> Any:
    """Factor of the learning rate for each step of a run of `steps`."""
    warm_up = max(1, steps // 10)
    return lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def parallelize(model: nn.Module, how: str) -> nn.Module:
    """The model as each rank trains it: whole, replicated, or with every block's parameters sharded."""
    if how == "ddp":
        # DDP lays its buckets anew after the first step, unless it looks for unused parameters; with three ranks or
        # more that changes the order in which gradients are added, and so the last bits of a run that was restarted.
        return DistributedDataParallel(model, find_unused_parameters=True)
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(options: argparse.Namespace, rank: int, journal: Journal) -> None:
    """Train to the end, from wherever the last run of this job was committed."""
    torch.manual_seed(options.seed)  # the same weights on every rank
    model = parallelize(GPT(), options.parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, warm_up_then_cosine(options.steps))
    torch.manual_seed(options.seed + 1 + rank)  # other batches and other dropout on every rank
    text = read_text()

    guard = None
    if not options.no_guard:
        extra = {"scheduler": scheduler}
        spread = {"parity": options.parity, "group_size": options.group_size}  # how lost nodes are made up for
        guard = snapshotd_client.protect(  # guard: 2 of 4
            model, optimizer, job=options.job, every=options.every, extra=extra, **spread
        )
    first = guard.restore() if guard else 0  # guard: 3 of 4; 0 where there is nothing to restore
    journal.write("restored", step=first, restore=guard.status()["restore"] if guard else None)

    for step in range(first, options.steps):
        began_s = time.monotonic()
        loss = model(*draw_batch(text))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if guard:
            guard.step()  # guard: 4 of 4; what the snapshot holds is the state here
        journal.write("step", step=step, loss=loss.item().hex(), seconds=time.monotonic() - began_s)

    tensors, digest = digest_state(model, optimizer, scheduler)
    journal.write("end", digest=digest, state_bytes=tensors)
    if guard:
        guard.close()  # the run is over: its snapshots may be freed


def digest_state(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> tuple[int, str]:
    """Length of this rank's tensors in bytes, and the SHA-256 of all that decides how training would go on."""
    digest, length = hashlib.sha256(), 0

    def add(name: str, value: Any) -> None:
        nonlocal length
        digest.update(name.encode())
        if not isinstance(value, Tensor):
            digest.update(repr(value).encode())
            return
        local = (value.to_local() if isinstance(value, DTensor) else value).detach().contiguous()
        length += local.nbytes
        if local.nbytes:
            digest.update((ctypes.c_char * local.nbytes).from_address(local.data_ptr()))

    for name, tensor in model.state_dict().items():
        add(name, tensor)
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            for name, value in sorted(optimizer.state[parameter].items()):
                add(f"{index}.{name}", value)
    add("learning rates", [float(rate).hex() for rate in scheduler.get_last_lr()])
    add("generator", torch.get_rng_state())
    return length, digest.hexdigest()


class Journal:
    """One JSON object per line and event, written at once, in a file for each time that a rank is started."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        self._rank = rank
        self._file: IO[str] | None = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"rank{rank}-{os.getpid()}.jsonl").open("a")

    def write(self, event: str, **facts: Any) -> None:
        """Append `facts` under the monotonic clock, which all processes of a machine share."""
        if self._file:
            self._file.write(json.dumps({"event": event, "at_s": time.monotonic(), **facts}) + "\n")
            self._file.flush()
        elif self._rank == 0 and event == "step":
            print(f"step {facts['step']:5d}  loss {float.fromhex(facts['loss']):.4f}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parallel", choices=["none", "ddp", "fsdp"], default="none")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job", help="name of the run, for the guard; SNAPSHOTD_JOB does as well")
    parser.add_argument("--every", type=int, default=1, help="take a snapshot every that many steps")
    parser.add_argument("--parity", type=int, default=2, help="nodes of a group that may be lost at once (default: 2)")
    parser.add_argument("--group-size", type=int, default=8, help="nodes that protect each other (default: 8)")
    parser.add_argument("--no-guard", action="store_true", help="train without snapshots")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON lines to DIR/rank<n>-<pid>.jsonl")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    journal = Journal(options.out, rank)
    journal.write("start", rank=rank, pid=os.getpid(), started_s=STARTED_S, imported_s=IMPORTED_S)
    if options.parallel != "none":
        dist.init_process_group("gloo")
    try:
        train(options, rank, journal)
    except snapshotd_client.SnapshotLost as lost:
        journal.write("lost", why=lost.why)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
