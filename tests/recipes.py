"""Small training loops, each with something that weights alone do not bring back.

A recipe builds a run from fixed seeds and yields control at the end of every loop body, where `guard.step()` stands.
The same code runs without a guard (the undisturbed run), with one, and with one in a process that is killed.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Run:
    """One recipe, built: `body(step)` is a loop body without its guard.step() and returns the loss."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    body: Callable[[int], torch.Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


def mlp(dropout: float = 0.1) -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4)
    )


def batch(rows: int = 8) -> torch.Tensor:
    """A batch drawn from torch's own generator: resuming elsewhere in its stream would show at once."""
    return torch.randn(rows, 16)


def plain_step(run: Run, x: torch.Tensor) -> torch.Tensor:
    loss = run.model(x).square().mean()
    run.optimizers[0].zero_grad()
    loss.backward()
    run.optimizers[0].step()
    return loss


def _simple(model: nn.Module, optimizer: torch.optim.Optimizer, **extra: Any) -> Run:
    run = Run(model, [optimizer], lambda step: plain_step(run, batch()), dict(extra))
    return run


def adamw() -> Run:
    model = mlp()
    return _simple(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def sgd_momentum() -> Run:
    model = mlp()
    return _simple(model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True))


class Factored(torch.optim.Optimizer):
    """In Adafactor's manner: row and column statistics instead of a full second moment, and a Python integer step."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["step"] = 0
                    state["row"] = torch.zeros(gradient.shape[:-1] or (1,))
                    state["column"] = torch.zeros(gradient.shape[-1:])
                state["step"] += 1
                keep = 1 - state["step"] ** -0.8
                square = gradient.square() + 1e-12
                state["row"].mul_(keep).add_(square.mean(-1).reshape(state["row"].shape), alpha=1 - keep)
                state["column"].mul_(keep).add_(square.reshape(-1, square.shape[-1]).mean(0), alpha=1 - keep)
                scale = (state["row"].unsqueeze(-1) * state["column"] / state["row"].mean()).reshape(gradient.shape)
                parameter.sub_(gradient * scale.rsqrt() * group["lr"])


def adafactor_like() -> Run:
    model = mlp()
    return _simple(model, Factored(model.parameters()))


def one_cycle() -> Run:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
    run = _simple(model, optimizer, scheduler=scheduler)

    def body(step: int) -> torch.Tensor:
        loss = plain_step(run, batch())
        scheduler.step()
        return loss

    run.body = body
    return run


def plateau_after_validation() -> Run:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.7)
    run = _simple(model, optimizer, scheduler=scheduler)

    def body(step: int) -> torch.Tensor:
        loss = plain_step(run, batch())
        model.eval()
        with torch.no_grad():
            scheduler.step(model(batch(16)).square().mean().item())
        model.train()
        return loss

    run.body = body
    return run


def _scaled(fused: bool) -> Run:
    model = mlp(0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=3)
    run = Run(model, [optimizer], lambda step: torch.zeros(()), {"scaler": scaler})

    def body(step: int) -> torch.Tensor:
        loss = model(batch()).square().mean()
        optimizer.zero_grad()
        factor = float("inf") if step % 5 == 3 else 1.0  # every fifth step overflows and is skipped
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    run.body = body
    return run


def grad_scaler() -> Run:
    return _scaled(fused=False)


def grad_scaler_fused() -> Run:
    return _scaled(fused=True)


class Noisy(nn.Module):
    """Buffers that forward writes, one of them not persistent, and one that is an expanded view."""

    calls: torch.Tensor
    memory: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.inner = mlp()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("memory", torch.zeros(4), persistent=False)
        self.register_buffer("places", torch.arange(4).expand(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(self.norm(x)) + self.memory * 0.1
        with torch.no_grad():
            self.calls += 1
            self.memory.mul_(0.9).add_(out.mean(0), alpha=0.1)
        return out


def batchnorm_and_buffers() -> Run:
    model = Noisy()
    return _simple(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def gradient_accumulation() -> Run:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = Run(model, [optimizer], lambda step: torch.zeros(()))

    def body(step: int) -> torch.Tensor:
        loss = model(batch()).square().mean()
        (loss / 3).backward()
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    run.body = body
    return run


def clipping_and_averaging() -> Run:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    run = _simple(model, optimizer, average=average)

    def body(step: int) -> torch.Tensor:
        loss = plain_step(run, batch())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.3, 0.3)
        average.update_parameters(model)
        return loss + average(batch()).mean() * 0

    run.body = body
    return run


def two_optimizers() -> Run:
    model = nn.ModuleDict({"left": mlp(), "right": nn.Linear(4, 4)})
    left = torch.optim.AdamW(model["left"].parameters(), lr=1e-2)
    right = torch.optim.SGD(model["right"].parameters(), lr=1e-2, momentum=0.5)
    run = Run(model, [left, right], lambda step: torch.zeros(()))

    def body(step: int) -> torch.Tensor:
        loss = model["right"](model["left"](batch())).square().mean()
        left.zero_grad()
        right.zero_grad()
        loss.backward()
        left.step()
        right.step()
        return loss

    run.body = body
    return run


def closure() -> Run:
    model = mlp(0.0)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=3)
    run = Run(model, [optimizer], lambda step: torch.zeros(()))

    def body(step: int) -> torch.Tensor:
        x = batch()

        def evaluate() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean() + 0.01 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        return optimizer.step(evaluate)

    run.body = body
    return run


class Experts(nn.Module):
    """A second expert that no batch reaches during the first steps, so its optimizer state appears late."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(), mlp()
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.first(x)
        return out + self.second(x) if self.step >= 6 else out


def late_expert() -> Run:
    model = Experts()
    run = _simple(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def body(step: int) -> torch.Tensor:
        model.step = step
        return plain_step(run, batch())

    run.body = body
    return run


class Mixed(nn.Module):
    """Several dtypes and shapes: tied, 0-d, empty, transposed, channels-last, frozen bf16 and float8."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.out = nn.Linear(16, 32, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.crossed = nn.Parameter(torch.randn(16, 24).t())
        self.conv: nn.Module = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.narrow = nn.Parameter(torch.randn(8).bfloat16())
        self.frozen = nn.Parameter(torch.randn(8).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("spin", torch.randn(3, dtype=torch.complex128))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.out(self.embed(tokens)) * self.scale
        image = self.conv(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).mean()
        return x.square().mean() + self.crossed.square().mean() + image.square() + self.narrow.float().square().mean()


def many_dtypes() -> Run:
    model = Mixed()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = Run(model, [optimizer], lambda step: torch.zeros(()))

    def body(step: int) -> torch.Tensor:
        loss = model(torch.randint(0, 32, (4, 5)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    run.body = body
    return run


def own_generator() -> Run:
    model = mlp(0.0)
    generator = torch.Generator().manual_seed(5)
    run = _simple(model, torch.optim.AdamW(model.parameters(), lr=1e-2), generator=generator)
    run.body = lambda step: plain_step(run, torch.randn(8, 16, generator=generator))
    return run


def no_optimizer_state() -> Run:
    model = mlp()
    return _simple(model, torch.optim.SGD(model.parameters(), lr=1e-2))


RECIPES: dict[str, Callable[[], Run]] = {
    one.__name__: one
    for one in (
        adamw, sgd_momentum, adafactor_like, one_cycle, plateau_after_validation, grad_scaler, grad_scaler_fused,
        batchnorm_and_buffers, gradient_accumulation, clipping_and_averaging, two_optimizers, closure, late_expert,
        many_dtypes, own_generator, no_optimizer_state,
    )
}  # fmt: skip


def tensors_of(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested state, in a fixed order."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors_of(value[key], f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{name}/{index}")
    else:
        yield name, value


def digest(run: Run) -> str:
    """SHA-256 of all that decides how training would go on."""
    total = hashlib.sha256()
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    state: dict[str, Any] = {"model": dict(run.model.state_dict())}
    state["buffers"] = dict(run.model.named_buffers())
    for index, optimizer in enumerate(run.optimizers):
        state[f"optim{index}"] = {names[id(p)]: copy.copy(s) for p, s in optimizer.state.items()}
        state[f"groups{index}"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    for name, extra in run.extra.items():
        state[name] = extra.get_state() if isinstance(extra, torch.Generator) else extra.state_dict()
    state["random"] = torch.get_rng_state()
    for name, value in tensors_of(state, ""):
        total.update(name.encode())
        if isinstance(value, torch.Tensor):
            local = value.to_local() if hasattr(value, "to_local") else value
            total.update(str((local.dtype, tuple(local.shape))).encode())
            total.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(repr(value).encode())
    return total.hexdigest()


def ddp() -> Run:
    """Replicated over the ranks; BatchNorm keeps different statistics on each."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(16, 33), nn.BatchNorm1d(33), nn.Dropout(0.1), nn.Linear(33, 4)),
        broadcast_buffers=False,
        find_unused_parameters=True,  # or buckets are laid anew in a first step, and three ranks add in another order
    )
    return _simple(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def fsdp() -> Run:
    """Sharded over the ranks, unevenly; the root's parameters stay gathered after a forward without backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.Dropout(0.1), nn.Linear(33, 3))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    run = _simple(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def body(step: int) -> torch.Tensor:
        loss = plain_step(run, batch())
        model.eval()
        with torch.no_grad():
            model(batch(2))
        model.train()
        return loss

    run.body = body
    return run


PARALLEL: dict[str, Callable[[], Run]] = {"ddp": ddp, "fsdp": fsdp}
