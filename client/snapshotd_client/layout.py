"""From live tensors to a plan: the file's manifest, the copy's items, and the watch that says if it still holds.

Built from the leaves once per layout. Between two cuts nothing is planned anew: the watch compares containers, objects
and pointers in C++, and only where one moved do the leaves get collected again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from snapshotd import _native
from snapshotd.manifest import HOST_ALIGN_BYTES, Entry, Manifest, lay_out, round_up
from snapshotd_client import gpu, tree
from snapshotd_client.gpu import OnDevice
from snapshotd_client.state import code_of
from snapshotd_client.tree import Leaf, World

Item = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """What this rank stores of a leaf: a view of its memory and that view's global offset."""

    leaf: Leaf
    tensor: torch.Tensor
    offset: tuple[int, ...]

    def entry(self) -> Entry:
        """The part as the file describes it; dtypes that readers of the format lack are stored as bytes."""
        leaf, code = self.leaf, code_of(self.tensor.dtype)
        facts = {**leaf.facts, "prefix": leaf.spread.prefix}
        shape, offset, whole = tuple(self.tensor.shape), self.offset, leaf.global_shape
        if self.tensor.dtype not in tree.CODES:
            facts |= {"dtype": code, "shape": list(whole)}
            width = self.tensor.element_size()
            shape, offset, whole = _widen(shape, width, width), _widen(offset, width, 0), _widen(whole, width, width)
            code = "U8"
        return Entry(leaf.name, code, shape, offset, whole, facts)

    def item(self, place: int) -> Item:
        """The part as the copy engine takes it."""
        width = self.tensor.element_size()
        strides = tuple(stride * width for stride in self.tensor.stride())
        return self.tensor.data_ptr(), place, width, tuple(self.tensor.shape), strides


def _widen(shape: tuple[int, ...], width: int, scalar: int) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] * width) if shape else (scalar,)


@dataclass
class Layout:
    """One layout of this rank's state. `signature` is equal for leaves that fit the same file.

    `gpu` is what a device copies. Beside it tensors in host memory are small: the plan takes all of them in the cut.
    """

    world: World
    manifest: Manifest
    parts: list[Part]
    outside: list[str]
    plan: _native.Plan
    watch: _native.Watch
    signature: tuple[Any, ...]
    gpu: OnDevice | None = None
    _outside_pointers: list[int] = field(default_factory=list)
    _outside_on_gpu: list[str] = field(default_factory=list)
    _held: list[torch.Tensor] = field(default_factory=list)
    _now: list[Part] = field(default_factory=list)
    _later: list[Part] = field(default_factory=list)
    _watched: list[str] = field(default_factory=list)

    @property
    def host_place(self) -> tuple[int, int]:
        """First byte and capacity of the host tensor in the file."""
        return self.manifest.span(f"{self.world.own_prefix}host")

    def watched_name(self, index: int) -> str:
        """The name of a tensor by its place in `watch`."""
        return self._watched[index]

    def point_outside(self, outside: Mapping[str, torch.Tensor]) -> bool:
        """Take the tensors that extras returned at this cut; False where they are not those of the layout."""
        if list(outside) != self.outside:
            return False
        on_gpu = [name for name, tensor in outside.items() if gpu.is_on_gpu(tensor)]
        for name, tensor in outside.items():
            if self.manifest.entries[name].shape != tuple(tensor.shape) or _code(tensor) != _code_in(self, name):
                return False
        if on_gpu != self._outside_on_gpu:
            return False
        if self.gpu is not None:
            self.gpu.point_last([outside[name] for name in on_gpu])
        self._held = [tensor.contiguous() for name, tensor in outside.items() if name not in on_gpu]
        pointers = [tensor.data_ptr() for tensor in self._held]  # read before `begin` returns
        if pointers != self._outside_pointers:
            self._outside_pointers = pointers
            now = [part.tensor.data_ptr() for part in self._now] + pointers
            self.plan.repoint(now, [part.tensor.data_ptr() for part in self._later])
        return True


def _code(tensor: torch.Tensor) -> str:
    return code_of(tensor.dtype)


def _code_in(layout: Layout, name: str) -> str:
    entry = layout.manifest.entries[name]
    return str(entry.facts.get("dtype", entry.dtype))


def signature_of(leaves: Sequence[Leaf], groups: Any) -> tuple[Any, ...]:
    """What must be equal for two collections of leaves to share a layout."""
    rows = tuple(
        (
            leaf.name,
            tuple(leaf.local.shape),
            leaf.local.dtype,
            leaf.offset,
            leaf.global_shape,
            leaf.now,
            leaf.local.device,
        )
        for leaf in leaves
    )
    return rows, repr(groups)


def build(
    leaves: Sequence[Leaf],
    *,
    world: World,
    groups: Any,
    aliases: Mapping[str, str],
    sizes: Sequence[tuple[Any, int]],
    outside: Mapping[str, torch.Tensor],
    host_bytes: int,
    manifest: Manifest | None = None,
) -> Layout:
    """Plan a layout. `manifest` is that of an earlier layout with the same signature, whose file stays as it is.

    `host_bytes` is the length of the host document now; twice that is reserved, at least 16 KiB. ConfigError where
    tensors lie on several devices.
    """
    parts = [Part(leaf, *share) for leaf in leaves if (share := tree.share_of(leaf)) is not None]
    outside = {n: t if gpu.is_on_gpu(t) else t.contiguous() for n, t in outside.items()}
    if manifest is None:
        capacity = round_up(max(2 * host_bytes, 16 << 10), HOST_ALIGN_BYTES)
        manifest = lay_out(_entries(parts, outside, world, capacity), _facts(world, groups, aliases))
    extra_items = [
        Part(_outside_leaf(name, tensor, world), tensor, (0,) * tensor.dim()) for name, tensor in outside.items()
    ]
    on_gpu = _on_device([*parts, *extra_items], manifest)
    in_host = [part for part in parts if not gpu.is_on_gpu(part.tensor)]
    now = [part for part in in_host if part.leaf.now or on_gpu is not None]
    later = [part for part in in_host if not part.leaf.now and on_gpu is None]
    beside = later if on_gpu is None else [part for part in parts if gpu.is_on_gpu(part.tensor) and not part.leaf.now]
    copied_later = {part.leaf.name for part in beside}  # a write before the copy is over must be seen
    extra_in_host = [part for part in extra_items if not gpu.is_on_gpu(part.tensor)]
    links = [link for leaf in leaves for link in leaf.links]
    tensors = [_watched(leaf, leaf.name in copied_later) for leaf in leaves]
    watch = _native.Watch(links=links, sizes=list(sizes), tensors=tensors)
    watch.pointers_changed()  # notes the versions
    return Layout(
        world=world,
        manifest=manifest,
        parts=parts,
        outside=list(outside),
        plan=_native.Plan(
            file_bytes=manifest.file_bytes,
            now=[part.item(manifest.places[part.leaf.name]) for part in (*now, *extra_in_host)],
            later=[part.item(manifest.places[part.leaf.name]) for part in later],
        ),
        watch=watch,
        signature=signature_of(leaves, groups),
        gpu=on_gpu,
        _outside_pointers=[part.tensor.data_ptr() for part in extra_in_host],
        _outside_on_gpu=[part.leaf.name for part in extra_items if gpu.is_on_gpu(part.tensor)],
        _now=now,
        _later=later,
        _watched=[leaf.name for leaf in leaves],
    )


def _on_device(parts: Sequence[Part], manifest: Manifest) -> OnDevice | None:
    """What the device copies, extras' tensors last; None where nothing is on one."""
    ordinal = gpu.one_device((part.leaf.name, part.tensor) for part in parts)
    if ordinal is None:
        return None
    made = OnDevice(ordinal)
    for part in parts:
        if gpu.is_on_gpu(part.tensor):
            made.add(part.tensor, manifest.places[part.leaf.name], mirrored=part.leaf.now)
    made.planned()
    return made


def _watched(leaf: Leaf, versioned: bool) -> tuple[torch.Tensor, int, bool]:
    """The user's own tensor, for the watch; a detached alias would stay behind at `parameter.data = ...`."""
    found = leaf.links[-1][2] if leaf.links else leaf.local
    tensor = leaf.local if tree.is_dtensor(found) else found
    return tensor, leaf.local.data_ptr(), versioned


def _outside_leaf(name: str, tensor: torch.Tensor, world: World) -> Leaf:
    return Leaf(name, tensor, tree.Spread(world.own_prefix), now=True, facts={"kind": "outside"})


def _entries(parts: Sequence[Part], outside: Mapping[str, torch.Tensor], world: World, host_bytes: int) -> list[Entry]:
    host = Entry(f"{world.own_prefix}host", "U8", (host_bytes,), (0,), (host_bytes,), {"kind": "host", "host": True})
    rest = [
        Part(_outside_leaf(name, tensor, world), tensor, (0,) * tensor.dim()).entry()
        for name, tensor in outside.items()
    ]
    return [host, *(part.entry() for part in parts), *rest]


def _facts(world: World, groups: Any, aliases: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": 1,
        "rank": world.rank,
        "world_size": world.world_size,
        "groups": groups,
        "aliases": dict(aliases),
    }
