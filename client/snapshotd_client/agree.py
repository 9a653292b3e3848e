"""What ranks tell one another, over a gloo group of their own: small messages, gathered by all, bounded in time.

The training job's rendezvous already knows who is in the job; nothing here elects or discovers. Every rank gathers the
same list and computes the same answer from it. Messages are msgspec bytes in uint8 tensors: `all_gather_object` would
unpickle what arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from msgspec import Meta, Struct

from snapshotd import geometry
from snapshotd.errors import SnapshotError
from snapshotd.geometry import Formation, Member
from snapshotd.wire import GenerationId, Inventory, Place, SnapshotId

_T = TypeVar("_T", bound=Struct)


class Card(Struct, frozen=True):
    """How each rank introduces itself when a generation begins."""

    rank: int
    world_size: int
    job: str
    every: int
    parity: int
    group_size: int
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    inventory: Inventory | None  # None: no daemon answered this rank
    place: str = ""  # host and socket: tells which ranks share a node where no daemon answered
    refusal_kind: str = ""
    refusal: str = ""


class Introduced(Struct, frozen=True):
    """What a rank's daemon says to being told who is in the job; empty where it believes them now."""

    refusal: str = ""


class Elsewhere(Struct, frozen=True):
    """What nodes that are not part of the job any more still hold of it, as a daemon that knew them was told."""

    inventories: list[Inventory] = []


class Rebuilt(Struct, frozen=True):
    """How far a rank is with the shard that was lost. `shard` is -1 where it has none to rebuild."""

    over: bool = True
    shard: int = -1
    arena: bytes = b""
    slot: int = 0
    slot_bytes: int = 0
    block_bytes: int = 0
    kind: str = ""  # "" good, "corrupt", "failed"
    why: str = ""
    size_bytes: int = 0
    seconds: float = 0.0


class Verdict(Struct, frozen=True):
    """What a rank found about the snapshot that all are about to restore."""

    snapshot: SnapshotId | None
    kind: str = ""  # "" good, "corrupt", "layout", "failed"
    why: str = ""
    rank: int = -1  # whose shard it is about
    arena: bytes = b""  # where that lies


class Peers:
    """The job's ranks. A single process is a job of one and needs no group."""

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.world_size = 0, 1
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(self, message: _T) -> list[_T]:
        """Everyone's message, by rank. SnapshotError if a rank did not take part in time."""
        kind = type(message)
        if self._group is None:
            return [message]
        raw = msgspec.msgpack.encode(message)
        try:
            return [msgspec.msgpack.decode(one, type=kind) for one in self._gather_bytes(raw)]
        except msgspec.DecodeError as error:
            raise SnapshotError(f"another rank runs a different version of snapshotd ({error}); install one") from None
        except RuntimeError as error:
            raise SnapshotError(
                f"a rank did not answer while the job agreed on its snapshots ({_first_line(error)}); the launcher "
                f"should restart the group, since torch.distributed cannot go on without it"
            ) from error

    def _gather_bytes(self, raw: bytes) -> list[bytes]:
        length = torch.tensor([len(raw)], dtype=torch.int64)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, length, group=self._group)
        longest = max(int(one) for one in lengths)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        everyone = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self._group)
        return [bytes(one[: int(size)].tolist()) for one, size in zip(everyone, lengths, strict=True)]

    def close(self) -> None:
        """Let go of the group."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


def disagreement(cards: list[Card]) -> str:
    """A sentence about the first setting in which ranks differ; empty where they agree."""
    first = cards[0]
    for card in cards[1:]:
        for name in ("job", "world_size", "every", "parity", "group_size"):
            if getattr(card, name) != getattr(first, name):
                return (
                    f"rank {first.rank} has {name}={getattr(first, name)!r} and rank {card.rank} has "
                    f"{getattr(card, name)!r}; protect() needs the same on every rank"
                )
    return ""


def on_one_node(one: Card, other: Card) -> bool:
    """Whether two ranks share a daemon: by its node's id where it answered both, else by host and socket."""
    if one.inventory is not None and other.inventory is not None:
        return one.inventory.node == other.inventory.node
    return one.place == other.place


def places(cards: list[Card]) -> list[Place]:
    """The nodes of the job by their smallest rank; none where all ranks share one node, or some node has no daemon."""
    ranks: dict[bytes, list[int]] = {}
    for card in cards:
        if card.inventory is None:
            return []
        ranks.setdefault(card.inventory.node, []).append(card.rank)
    if len(ranks) < 2:
        return []
    found = {card.inventory.node: card.inventory for card in cards if card.inventory is not None}
    return [place(found[node], own) for node, own in sorted(ranks.items(), key=lambda item: item[1])]


def place(told: Inventory, ranks: list[int]) -> Place:
    """Where a node that told its inventory is reached, and how it is recognised."""
    return Place(told.node, told.label, told.address, told.streams, ranks, told.badge)


def grouping(
    nodes: Sequence[Place], inventories: Sequence[Inventory], group_size: int, previous: Formation | None
) -> tuple[tuple[bytes, ...], ...]:
    """Who protects whom, in the order of positions. Every rank computes the same."""
    domains = {inventory.node: inventory.domain for inventory in inventories}
    members = [Member(place.node, domains.get(place.node, "")) for place in nodes]
    return tuple(tuple(group) for group in geometry.plan(members, group_size, previous))


def next_generation(cards: list[Card], wall_s: float) -> GenerationId:
    """A number above all that any node knows, with rank 0's nonce.

    Where a node could not be asked, the number starts from the clock, so that it is above what that node may know.
    """
    held = [arena for card in cards if card.inventory for arena in card.inventory.arenas]
    made = [one.snapshot for card in cards if card.inventory for one in card.inventory.shards]
    made += [one.snapshot for card in cards if card.inventory for one in card.inventory.parities]
    numbers = [one.generation.number for one in held] + [one.generation.number for one in made]
    unknown = [int(wall_s)] if any(card.inventory is None for card in cards) else []
    return GenerationId(max([*numbers, *unknown], default=0) + 1, cards[0].nonce)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
