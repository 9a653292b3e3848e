"""Torch tensors whose bytes are in the simulator's device memory, though this torch was built without CUDA.

`OnCard` says that it is on cuda:0, has an address of the simulator and is written and read on a stream of its own, the
one that stands in for torch's current stream. Views share its memory; whatever else computes, computes on the host: the
operands come down, the result goes up. So an optimizer of torch's trains "on the GPU", in the simulator's order of
things, and the client's code meets what it would meet on a machine that has one. `Seam` is what the client asks.

There is no autograd: this torch cannot make a node for a CUDA tensor. Gradients are made up.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map


class World:
    """One simulated device as torch would see it."""

    def __init__(self, cuda: Any, ordinal: int = 0) -> None:
        self.cuda, self.ordinal = cuda, ordinal
        self.device = cuda.Device("cuda", ordinal)
        self.stream: int = self.device.make_stream()
        self.is_capturing = False
        self.is_missing = False

    def put(self, tensor: torch.Tensor) -> OnCard:
        """A copy of a host tensor on the device, with its strides."""
        made = self.room(torch.empty_like(tensor, device="meta"))
        made.write(tensor)
        return made

    def room(self, meta: torch.Tensor) -> OnCard:
        """Memory for such a tensor, never written."""
        return OnCard(meta, Memory(self, max(1, meta.untyped_storage().nbytes())))

    def close(self) -> None:
        """Wait for the stream and end it. A device that was lost is not waited for."""
        with contextlib.suppress(self.cuda.CudaError):
            self.device.finish(self.stream)
        self.device.end_stream(self.stream)


class Memory:
    """One allocation; given back with the last tensor on it."""

    def __init__(self, world: World, count: int) -> None:
        self.world, self.at = world, 0
        self.at = world.device.allocate(count)

    def __del__(self) -> None:
        if self.at:
            self.world.device.release(self.at)


class OnCard(torch.Tensor):
    """A strided tensor on the simulated device; `meta` is its shape without bytes."""

    meta: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, meta: torch.Tensor, memory: Memory) -> OnCard:
        made: OnCard = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype,
            device=torch.device("cuda", memory.world.ordinal),
        )  # fmt: skip
        made.meta, made.memory = meta, memory
        return made

    def data_ptr(self) -> int:
        return self.memory.at + int(self.storage_offset()) * self.element_size()

    def reach(self) -> int:
        """Bytes from its first element to behind its last."""
        if not self.numel():
            return 0
        last: Any = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride(), strict=True))
        return int(last + 1) * self.element_size()

    def read(self) -> torch.Tensor:
        """Its values in host memory, with its strides."""
        world, raw = self.memory.world, torch.zeros(max(1, self.reach()), dtype=torch.uint8)
        if self.reach():
            world.device.copy(raw.data_ptr(), self.data_ptr(), self.reach(), world.stream)
        return raw[: self.reach()].view(self.dtype).as_strided(self.shape, self.stride()) if self.numel() else (
            torch.empty(self.shape, dtype=self.dtype)
        )  # fmt: skip

    def write(self, values: torch.Tensor) -> None:
        """New values, on the stream; what lies between its elements is kept."""
        if not self.numel():
            return
        dense = self.reach() == self.numel() * self.element_size()
        held = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype) if dense else self.read()
        held.copy_(values)
        world = self.memory.world
        world.device.copy(self.data_ptr(), held.data_ptr(), self.reach(), world.stream)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCard({tuple(self.shape)}, {self.dtype}, {self.data_ptr():#x})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_ and isinstance(args[0], OnCard):  # torch asks its device before it dispatches
            return _compute(torch.ops.aten.copy_.default, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, schema = func._schema.name.removeprefix("aten::"), func._schema
        if name in ("empty_like", "new_empty"):
            return _empty(func, args, kwargs)
        if name == "_to_copy" and kwargs.get("device", torch.device("cpu")).type == "cpu":
            return func(args[0].read(), *args[1:], **kwargs)
        aliases = [returned.alias_info for returned in schema.returns]
        if aliases and all(info is not None and not info.is_write for info in aliases):
            return _view(func, args, kwargs)
        return _compute(func, args, kwargs)


def _first(args: Any) -> OnCard:
    return next(one for one in tree_flatten(args)[0] if isinstance(one, OnCard))


def _empty(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    device = kwargs.pop("device", None)
    if device is not None and torch.device(device).type == "cpu":
        return func(args[0].meta, *args[1:], **kwargs, device="cpu")
    return args[0].memory.world.room(func(args[0].meta, *args[1:], **kwargs))


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    memory = _first(args).memory
    metas = tree_map(lambda one: one.meta if isinstance(one, OnCard) else one, args)
    return tree_map(lambda one: OnCard(one, memory) if isinstance(one, torch.Tensor) else one, func(*metas, **kwargs))


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On the host. What the operator writes is written back, what it makes is put on the device."""
    read: dict[int, torch.Tensor] = {}

    def down(one: Any) -> Any:
        if isinstance(one, OnCard):
            return read.setdefault(id(one), one.read())
        return one

    if func._schema.name == "aten::copy_" and isinstance(args[0], OnCard):
        args[0].write(down(args[1]))  # nothing of the target is read: it may never have been written
        return args[0]
    if func._schema.name == "aten::_foreach_copy_":
        for target, source in zip(args[0], args[1], strict=True):
            if target.is_contiguous() and source.is_contiguous():
                device, stream = target.memory.world.device, target.memory.world.stream
                device.copy(target.data_ptr(), source.data_ptr(), source.reach(), stream)
            else:
                target.write(down(source))
        return None
    result = func(*tree_map(down, args), **tree_map(down, kwargs))
    written: dict[int, OnCard] = {}
    for argument, given in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, OnCard):
            given.write(read[id(given)])
            written[id(read[id(given)])] = given
    world = _first((args, kwargs)).memory.world

    def up(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return written[id(one)] if id(one) in written else world.put(one)

    return tree_map(up, result)


class Seam:
    """What the client would ask torch.cuda, answered by a world."""

    def __init__(self, world: World) -> None:
        self.world = world

    def module(self) -> Any:
        if self.world.is_missing:
            raise ImportError("No module named 'snapshotd._cuda'")
        return self.world.cuda

    def stream(self, ordinal: int) -> int:
        return self.world.stream

    def capturing(self) -> bool:
        return self.world.is_capturing

    def synchronize(self, ordinal: int) -> None:
        self.world.device.finish(self.world.stream)


def move(model: torch.nn.Module, world: World, keep: tuple[str, ...] = ()) -> None:
    """Put parameters and buffers on the device, but those that are named."""
    for path, module in model.named_modules():
        for key, value in list(module._parameters.items()):
            if value is not None and f"{path}.{key}" not in keep:
                module._parameters[key] = torch.nn.Parameter(world.put(value.detach()))
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = world.put(buffer)


def bits(tensor: torch.Tensor) -> bytes:
    """The row-major bytes, wherever they are."""
    found = tensor.detach()
    found = (found.read() if isinstance(found, OnCard) else found).contiguous()
    return found.reshape(-1).view(torch.uint8).numpy().tobytes()
