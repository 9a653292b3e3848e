"""The whole state of a training run: collected for a snapshot, put back at a restore.

`TrainingState` knows the model, its optimizers and the user's extras. `leaves()` lists the tensors, `host()` the small
rest. Loading assigns directly: tensors that exist are written in place, optimizer state is created as it was (dtype
and shape from the snapshot, never through `load_state_dict`, which casts).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from snapshotd.errors import ConfigError, LayoutChanged
from snapshotd.manifest import Entry
from snapshotd_client import gpu, hoststate, tree
from snapshotd_client.tree import Leaf, Spread, World


class Stateful(Protocol):
    """What may stand in `extra`."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass
class HostCapture:
    """Host state at one cut: the document, and tensors of extras that are too large for it."""

    document: dict[str, Any]
    outside: dict[str, torch.Tensor] = field(default_factory=dict)


class TrainingState:
    """Model, optimizers and extras of one rank."""

    def __init__(
        self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], extra: Mapping[str, Any]
    ) -> None:
        self.model, self.optimizers, self.extra = model, list(optimizers), dict(extra)
        self.world = tree.describe_world(model)
        self.names = tree.ModelNames(model, self.optimizers)
        self._mixed: list[list[str]] = [[] for _ in self.optimizers]
        for name, tensor in self.names.parameters.items():
            refuse_unsupported(name, tree.local_of(tensor))
        gpu.one_device((name, tree.local_of(tensor)) for name, tensor in self.names.parameters.items())

    # --- out --------------------------------------------------------------------------------------

    def leaves(self) -> list[Leaf]:
        """Every tensor of the state as it hangs in the model and the optimizers now."""
        found = [*tree.parameter_leaves(self.names, self.world), *tree.buffer_leaves(self.names, self.world)]
        for index, optimizer in enumerate(self.optimizers):
            leaves, self._mixed[index] = tree.optimizer_leaves(index, optimizer, self.names, self.world)
            found.extend(leaves)
        for name, extra in self.extra.items():
            if isinstance(extra, torch.nn.Module):
                found.extend(self._module_leaves(name, extra))
        return [part for leaf in found for part in plain_parts(leaf, self.world)]

    def sizes(self) -> list[tuple[Any, int]]:
        """Containers whose length says that something was added or removed."""
        sizes: list[tuple[Any, int]] = []
        for optimizer in self.optimizers:
            sizes += [(optimizer.state, len(optimizer.state)), (optimizer.param_groups, len(optimizer.param_groups))]
            sizes += [(state, len(state)) for state in optimizer.state.values()]
            sizes += [(group["params"], len(group["params"])) for group in optimizer.param_groups]
        return sizes

    def groups(self) -> list[list[list[str]]]:
        """Names of the parameters of each group of each optimizer."""
        return [
            [[self.names.of(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
            for optimizer in self.optimizers
        ]

    def random_and_loaders(self) -> dict[str, Any]:
        """What moves on as soon as the next batch is drawn: generators and extras that can be iterated."""
        outside = hoststate.Outside(embed_bytes_max=1 << 62)
        loaders = {
            name: hoststate.encode(_state_of(extra), outside)
            for name, extra in self.extra.items()
            if hasattr(extra, "__iter__") and not isinstance(extra, torch.nn.Module)
        }
        return {"random": hoststate.capture_random(), "loaders": loaders}

    def host(self, step: int, early: Mapping[str, Any] | None = None) -> HostCapture:
        """Host state now; `early` is what `random_and_loaders` took at an earlier moment of the same step."""
        outside = hoststate.Outside()
        extras = {
            name: hoststate.encode(_state_of(extra), outside, f"{self.world.own_prefix}extra/{name}")
            for name, extra in self.extra.items()
            if not isinstance(extra, torch.nn.Module)
        }
        extras.update(early["loaders"] if early else {})
        document = {
            "step": step,
            "random": early["random"] if early else hoststate.capture_random(),
            "groups": [self._hyperparameters(optimizer) for optimizer in self.optimizers],
            "mixed": [self._mixed_values(index) for index in range(len(self.optimizers))],
            "extra": extras,
        }
        return HostCapture(document, outside.tensors)

    def _module_leaves(self, name: str, module: torch.nn.Module) -> Iterable[Leaf]:
        """A module in `extra` (an averaged model, say): parameters like the model's, but each rank's own."""
        prefix, known = f"{self.world.own_prefix}extra/{name}/", {id(p) for p in self.names.parameters.values()}
        seen: set[int] = set()
        for path, child in module.named_modules():
            for store, now in ((child._parameters, False), (child._buffers, True)):
                for key, value in store.items():
                    if value is None or id(value) in known or id(value) in seen:
                        continue
                    seen.add(id(value))
                    facts = {"kind": "extra", "extra": name, "param": f"{path}.{key}" if path else key}
                    yield Leaf(
                        prefix + facts["param"],
                        tree.local_of(value),
                        Spread(self.world.own_prefix),
                        now,
                        facts,
                        ((store, key, value),),
                    )

    def _hyperparameters(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        return [
            hoststate.encode({key: value for key, value in group.items() if key != "params"})
            for group in optimizer.param_groups
        ]

    def _mixed_values(self, index: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in self._mixed[index]:
            state = self.optimizers[index].state[self.names.parameters[name]]
            values[name] = hoststate.encode(dict(state), hoststate.Outside(embed_bytes_max=-1))
        return values

    # --- in ---------------------------------------------------------------------------------------

    def differences(self, entries: Mapping[str, Entry], facts: Mapping[str, Any]) -> list[str]:
        """Where a snapshot's layout is not this run's; empty if it can be restored here."""
        problems: list[str] = []
        mine = {leaf.name: leaf for leaf in self.leaves() if leaf.facts["kind"] != "optim"}
        theirs = {
            name: entry for name, entry in entries.items() if entry.facts.get("kind") in ("param", "buffer", "extra")
        }
        for name in sorted(set(mine) - set(theirs)):
            if mine[name].local.numel():
                problems.append(f"{name} is in the model and not in the snapshot")
        problems += [f"{name} is in the snapshot and not in the model" for name in sorted(set(theirs) - set(mine))]
        for name in sorted(set(mine) & set(theirs)):
            leaf, entry = mine[name], theirs[name]
            theirs_dtype = entry.facts.get("dtype", entry.dtype)
            if leaf.global_shape != tuple(entry.facts.get("shape", entry.global_shape)):
                problems.append(f"{name} has shape {leaf.global_shape} and {entry.global_shape} in the snapshot")
            elif code_of(leaf.local.dtype) != theirs_dtype:
                problems.append(f"{name} is {code_of(leaf.local.dtype)} and {theirs_dtype} in the snapshot")
        if facts.get("groups") != self.groups():
            problems.append("the optimizers' parameter groups are not those of the snapshot")
        return problems

    def check_host(self, document: Mapping[str, Any]) -> list[str]:
        """Extras that the snapshot and this run do not share."""
        stored, mine = set(document["extra"]), {
            name for name, extra in self.extra.items() if not isinstance(extra, torch.nn.Module)
        }  # fmt: skip
        return [f"extra {name!r} is in only one of the snapshot and this run" for name in sorted(stored ^ mine)]

    def create_optimizer_state(self, entries: Iterable[Entry], document: Mapping[str, Any]) -> None:
        """Give every optimizer exactly the state that the snapshot describes, with tensors still to be filled."""
        fresh: list[dict[str, dict[str, torch.Tensor]]] = [{} for _ in self.optimizers]
        for entry in entries:
            if entry.facts.get("kind") == "optim":
                self._create(fresh[entry.facts["optimizer"]], entry)
        for index, optimizer in enumerate(self.optimizers):
            mixed = document["mixed"][index]
            optimizer.state.clear()
            for name in sorted({*fresh[index], *mixed}, key=list(self.names.parameters).index):
                tensors = fresh[index].get(name, {})
                state = hoststate.decode(mixed[name], tensors) if name in mixed else {
                    key.removeprefix("/"): value for key, value in tensors.items()
                }  # fmt: skip
                optimizer.state[self.names.parameters[name]] = state

    def _create(self, fresh: dict[str, dict[str, torch.Tensor]], entry: Entry) -> None:
        facts = entry.facts
        parameter = self.names.parameters[facts["param"]]
        dtype = dtype_of(facts.get("dtype", entry.dtype))
        path = "".join(f"/{key}" for key in facts["path"])
        if path in fresh.setdefault(facts["param"], {}):
            return
        shape = tuple(facts.get("shape", entry.global_shape))
        if facts["dtensor"]:
            fresh[facts["param"]][path] = _empty_dtensor(parameter, dtype)
            return
        # On a GPU some state stays in host memory, Adam's count of steps say: each where it was, beside its parameter.
        local = tree.local_of(parameter)
        in_host = gpu.is_on_gpu(local) and not facts.get("gpu")
        if in_host or shape != tuple(local.shape) or tree.is_dtensor(parameter):
            fresh[facts["param"]][path] = (
                torch.empty(shape, dtype=dtype) if in_host else local.new_empty(shape, dtype=dtype)
            )
        else:
            fresh[facts["param"]][path] = torch.empty_like(local, dtype=dtype)

    def apply_host(self, document: Mapping[str, Any], outside: Mapping[str, torch.Tensor]) -> None:
        """Put hyperparameters, extras and, last, the random generators back."""
        for optimizer, groups in zip(self.optimizers, document["groups"], strict=True):
            for group, stored in zip(optimizer.param_groups, groups, strict=True):
                for key, value in hoststate.decode(stored).items():
                    if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                        group[key].copy_(value)
                    else:
                        group[key] = value
        for name, encoded in document["extra"].items():
            _load(self.extra[name], hoststate.decode(encoded, outside))
        hoststate.restore_random(document["random"])


def plain_parts(leaf: Leaf, world: World) -> list[Leaf]:
    """A leaf as plain strided tensors: a tensor subclass (quantised weights) is taken apart, never dequantised."""
    local = leaf.local
    inner = getattr(local, "__tensor_flatten__", None)
    if inner is None or tree.is_dtensor(local):
        refuse_unsupported(leaf.name, local)
        return [leaf]
    if leaf.facts["kind"] == "optim":
        raise ConfigError(
            f"{leaf.name} is a {type(local).__name__}: optimizer state in tensor subclasses cannot be re-created at a "
            f"restore, so this optimizer cannot be protected"
        )
    parts: list[Leaf] = []
    for attribute in inner()[0]:
        value = getattr(local, attribute)
        facts = {**leaf.facts, "inner": attribute}
        part = Leaf(
            f"{world.own_prefix}{leaf.name}/{attribute}",
            value.detach(),
            Spread(world.own_prefix),
            leaf.now,
            facts,
            (*leaf.links, (local, attribute, value)),
        )
        parts += plain_parts(part, world)
    return parts


def refuse_unsupported(name: str, local: torch.Tensor) -> None:
    """ConfigError for a tensor whose bytes cannot be taken as they are."""
    if local.device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"{name} is on {local.device}: snapshots are copied from host memory and from CUDA devices only, so this "
            f"run cannot be protected; {gpu.ADVICE}"
        )
    if local.layout != torch.strided or local.is_conj() or local.is_neg():
        raise ConfigError(f"{name} is not a plain strided tensor ({local.layout}); make it dense before protect()")


def code_of(dtype: torch.dtype) -> str:
    """The safetensors code of a dtype, or torch's own name where readers of the format lack it."""
    return tree.CODES.get(dtype, str(dtype).removeprefix("torch."))


def dtype_of(code: str) -> torch.dtype:
    """The opposite of `code_of`. LayoutChanged for a dtype that this torch does not have."""
    for dtype, known in tree.CODES.items():
        if known == code:
            return dtype
    named = getattr(torch, code, None)
    if not isinstance(named, torch.dtype):
        raise LayoutChanged(f"the snapshot holds tensors of {code}, which this version of torch does not have")
    return named


def _empty_dtensor(parameter: Any, dtype: torch.dtype) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    local = torch.empty_like(parameter._local_tensor, dtype=dtype, requires_grad=False).detach()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


def _state_of(extra: Any) -> Any:
    return extra.get_state() if isinstance(extra, torch.Generator) else extra.state_dict()


def _load(extra: Any, state: Any) -> None:
    if isinstance(extra, torch.Generator):
        extra.set_state(state)
    else:
        extra.load_state_dict(state)
