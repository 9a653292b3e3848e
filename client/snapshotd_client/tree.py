"""The training state as a list of named tensors: what there is, and which part of each this rank stores.

Nothing here steps, casts or re-creates anything: it only looks at live parameters, buffers and `optimizer.state`, so a
protected run computes what an unprotected one does. A `Leaf` is one tensor under one name; its replicas (DDP, Replicate
placements) share the work of storing it, rows split over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from snapshotd.errors import ConfigError

CODES: Mapping[torch.dtype, str] = {
    dtype: code
    for name, code in {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
        "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
        "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
        "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    }.items()
    if (dtype := getattr(torch, name, None)) is not None
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Where a local tensor lies in its global one, and who else holds the same bytes.

    `replica` of `replicas` is this rank's place among those. `prefix` keeps apart what different ranks (or different
    process groups) hold under one name.
    """

    prefix: str = ""
    offset: tuple[int, ...] | None = None  # None: the local tensor is the whole
    global_shape: tuple[int, ...] | None = None
    replicas: int = 1
    replica: int = 0


@dataclass(frozen=True)
class Leaf:
    """One tensor of the training state. `links` are `(container, key, object)` that say where it hangs."""

    name: str
    local: torch.Tensor
    spread: Spread
    now: bool = False  # copied inside the cut: it may change before the next optimizer step
    facts: Mapping[str, Any] = field(default_factory=dict)
    links: tuple[tuple[Any, Any, Any], ...] = ()

    @property
    def offset(self) -> tuple[int, ...]:
        return self.spread.offset if self.spread.offset is not None else (0,) * self.local.dim()

    @property
    def global_shape(self) -> tuple[int, ...]:
        return self.spread.global_shape if self.spread.global_shape is not None else tuple(self.local.shape)


def is_dtensor(value: object) -> bool:
    """Whether a tensor is a DTensor, without importing that module where nobody uses it."""
    return isinstance(value, torch.Tensor) and hasattr(value, "_local_tensor") and hasattr(value, "placements")


def local_of(value: torch.Tensor) -> torch.Tensor:
    """The plain tensor that this rank holds of a parameter or state."""
    return value._local_tensor if is_dtensor(value) else value.detach()  # type: ignore[attr-defined]


def spread_of_dtensor(value: Any, world_size: int) -> Spread:
    """Place of a DTensor's local part. ConfigError for placements that hold partial sums."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = value.device_mesh, value.placements
    if any(placement.is_partial() for placement in placements):
        raise ConfigError(
            "a parameter or optimizer state is a DTensor with a Partial placement, whose value no rank holds; "
            "reduce it (redistribute to Shard or Replicate) before protect()"
        )
    _, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ConfigError("this rank is not part of the device mesh of a parameter that it trains")
    replicas, replica = 1, 0
    for dim, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            replicas, replica = replicas * mesh.size(dim), replica * mesh.size(dim) + coordinate[dim]
    whole = mesh.mesh.numel() == world_size
    prefix = "" if whole else f"mesh{int(mesh.mesh.min())}/"
    return Spread(prefix, tuple(offset), tuple(value.shape), replicas, replica)


@dataclass(frozen=True)
class World:
    """Who this rank is, and which plain tensors it shares with others."""

    rank: int = 0
    world_size: int = 1
    replica_ranks: tuple[int, ...] = ()  # ranks of a DDP group; empty where nothing is known to be replicated

    @property
    def own_prefix(self) -> str:
        return f"rank{self.rank}/"

    def spread(self, value: torch.Tensor, *, private: bool = False) -> Spread:
        """How a tensor lies over the ranks; plain tensors that nobody vouches for belong to their rank alone."""
        if is_dtensor(value):
            return spread_of_dtensor(value, self.world_size)
        if self.world_size == 1 and not private:
            return Spread()
        if private or not self.replica_ranks:
            return Spread(self.own_prefix)
        prefix = "" if len(self.replica_ranks) == self.world_size else f"replicas{self.replica_ranks[0]}/"
        return Spread(prefix, replicas=len(self.replica_ranks), replica=self.replica_ranks.index(self.rank))


def describe_world(model: torch.nn.Module) -> World:
    """This rank's world, from torch.distributed and the kind of wrapper around the model."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    replicas: tuple[int, ...] = ()
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        replicas = tuple(dist.get_process_group_ranks(model.process_group))
    return World(dist.get_rank(), dist.get_world_size(), replicas)


def clean_name(name: str) -> str:
    """A fully qualified name without the wrappers' own parts."""
    return name.removeprefix("module.").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


class ModelNames:
    """Names of all parameters, taken once while FSDP has them sharded (later it swaps them during forward)."""

    def __init__(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.model = model
        ddp = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        self.root: torch.nn.Module = model.module if ddp else model  # type: ignore[assignment]
        self.homes: dict[str, tuple[Any, str]] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._by_id: dict[int, str] = {}
        for path, module in self.root.named_modules(remove_duplicate=False):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._add(clean_name(f"{path}.{key}" if path else key), parameter, (module._parameters, key))
        for index, optimizer in enumerate(optimizers):
            for number, group in enumerate(optimizer.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if id(parameter) not in self._by_id:
                        self._add(f"optim{index}/params/{number}.{place}", parameter, (group["params"], place))

    def _add(self, name: str, parameter: torch.Tensor, home: tuple[Any, str | int]) -> None:
        first = self._by_id.setdefault(id(parameter), name)
        if first != name:
            self.aliases[name] = first
            return
        self.parameters[name] = parameter
        self.homes[name] = home  # type: ignore[assignment]

    def of(self, parameter: torch.Tensor) -> str:
        """The name of a parameter that an optimizer trains. ConfigError for one that came after `protect`."""
        try:
            return self._by_id[id(parameter)]
        except KeyError:
            raise ConfigError(
                "an optimizer trains a parameter that it did not have when protect() was called; call protect() "
                "after all parameter groups are added"
            ) from None


def parameter_leaves(names: ModelNames, world: World) -> Iterator[Leaf]:
    """Every parameter once; tied ones are aliases in `names`."""
    for name, parameter in names.parameters.items():
        container, key = names.homes[name]
        spread = world.spread(parameter)
        facts = {"kind": "param", "param": name}
        if is_dtensor(parameter):  # FSDP swaps what the module holds, but never the sharded parameter itself
            local = local_of(parameter)
            links: tuple[tuple[Any, Any, Any], ...] = ((parameter, "_local_tensor", local),)
            yield Leaf(spread.prefix + name, local, spread, facts=facts, links=links)
        else:
            yield Leaf(
                spread.prefix + name, parameter.detach(), spread, facts=facts, links=((container, key, parameter),)
            )


def buffer_leaves(names: ModelNames, world: World) -> Iterator[Leaf]:
    """Every buffer, persistent or not: replicas differ in them, and forward writes them, so each rank keeps its own."""
    seen: set[int] = set()
    for path, module in names.root.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            name = clean_name(f"{path}.{key}" if path else key)
            yield Leaf(
                f"{world.own_prefix}buffers/{name}",
                local_of(buffer),
                Spread(world.own_prefix),
                now=True,
                facts={"kind": "buffer", "buffer": name},
                links=((module._buffers, key, buffer),),
            )


def optimizer_leaves(
    index: int, optimizer: torch.optim.Optimizer, names: ModelNames, world: World
) -> tuple[list[Leaf], list[str]]:
    """Tensors of an optimizer's state, and the parameters whose state holds anything that is no tensor."""
    leaves: list[Leaf] = []
    mixed: list[str] = []
    sharded_by_optimizer = type(optimizer).__name__ == "ZeroRedundancyOptimizer"
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, torch.Tensor):
            raise ConfigError(f"optimizer {index} keeps state under {parameter!r}, which is no parameter")
        name = names.of(parameter)
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            mixed.append(name)
        for path, value, container, key in walk(state):
            private = sharded_by_optimizer or (is_dtensor(parameter) and not is_dtensor(value))
            spread = world.spread(value, private=private)
            local = local_of(value)
            links = [(container, key, value)]
            if is_dtensor(value):
                links.append((value, "_local_tensor", local))
            facts = {"kind": "optim", "optimizer": index, "param": name, "path": path, "dtensor": is_dtensor(value)}
            if local.device.type == "cuda":
                facts["gpu"] = True
            full = f"{spread.prefix}optim{index}/{name}/{'/'.join(map(str, path))}"
            leaves.append(Leaf(full, local, spread, facts=facts, links=tuple(links)))
    return leaves, mixed


def walk(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[list[Any], torch.Tensor, Any, Any]]:
    """Tensors of a nested state with their path, container and key."""
    pairs = state.items() if isinstance(state, Mapping) else enumerate(state)
    for key, value in pairs:
        if isinstance(value, torch.Tensor):
            yield [*path, key], value, state, key
        elif isinstance(value, Mapping | list | tuple):
            yield from walk(value, (*path, key))


def share_of(leaf: Leaf) -> tuple[torch.Tensor, tuple[int, ...]] | None:
    """What this rank stores of a leaf: a part of the local tensor and its global offset; None if others store it all.

    Rows are dealt over the replicas; a tensor with fewer rows than replicas goes whole to one of them, by its name.
    """
    local, spread = leaf.local, leaf.spread
    if local.numel() == 0 and 0 not in leaf.global_shape:
        return None  # an uneven shard: other ranks hold the rows
    if spread.replicas == 1:
        return local, leaf.offset
    rows = local.shape[0] if local.dim() else 0
    if rows < spread.replicas or local.numel() == 0:
        owner = sum(leaf.name.encode()) % spread.replicas
        return (local, leaf.offset) if owner == spread.replica else None
    first = rows * spread.replica // spread.replicas
    last = rows * (spread.replica + 1) // spread.replicas
    return local.narrow(0, first, last - first), (leaf.offset[0] + first, *leaf.offset[1:])
