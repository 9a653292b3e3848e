"""Whether peers decode a lost shard for the node that lost it, which of them, and in which parts.

Decoded by the newcomer alone, k pieces go through its link for each one that it lost. Spread over the survivors, each
decodes parts and forwards them, and nobody receives or sends more than about the shard. On one machine nothing is
gained: there the sums are the limit, and a detour costs copies.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from snapshotd.wire import Holding

SUMS_EACH = 2  # of one helper at a time: while one is sent, the bytes of the other come
SUMS_MAX = 64
WINDOW_BYTES = 1 << 20  # small: the newcomer's link is idle until the first of them are made
PART_WINDOWS_MAX = 16
PARTS_EACH = 2  # of a thread at least, where there are enough: so all end at about the same time
_Part = TypeVar("_Part")


def helpers(mode: str, own: str, holdings: Iterable[Holding], pieces: int) -> list[str]:
    """The peers that are to decode, by the addresses of their streams; none where this node does it alone.

    `mode` is the setting `rebuild_spread`, `own` the address of this node's streams, `pieces` the number of pieces that
    make one up. With `auto` the network has to be in between: some of the peers are on other hosts.
    """
    peers = sorted({one.streams for one in holdings} - {own, ""})
    if mode == "no" or pieces < 2 or len(peers) < 2:
        return []
    return peers if mode == "yes" or any(_host(peer) != _host(own) for peer in peers) else []


def sums_each(count: int) -> int:
    """How many sums each of so many helpers makes at a time."""
    return max(1, min(SUMS_EACH, SUMS_MAX // max(1, count)))


def window_for(unit_bytes: int) -> int:
    """The length of a window: whole units."""
    return max(WINDOW_BYTES, unit_bytes)


def part_for(total_bytes: int, threads: int, unit_bytes: int) -> int:
    """The length of a part: whole windows, so many that every one of these threads gets several of them."""
    window = window_for(unit_bytes)
    return window * max(1, min(PART_WINDOWS_MAX, total_bytes // (window * threads * PARTS_EACH)))


def turned(row: Sequence[_Part], first: int) -> list[_Part]:
    """The same in a ring, from another one on. Symbols arrive in turn: helpers that all began with the same one would
    wait for its node together while the other nodes' links are idle."""
    return [*row[first:], *row[:first]]


class Parts(Generic[_Part]):
    """Parts of some work, given to whichever thread asks next; what it did not do comes back."""

    def __init__(self, parts: Iterable[_Part]) -> None:
        self._parts, self._undone = deque(parts), deque[_Part]()
        self._lock = threading.Lock()

    def take(self) -> _Part | None:
        """One that nobody was given yet."""
        with self._lock:
            return self._parts.popleft() if self._parts else None

    def put_back(self, part: _Part) -> None:
        """This is not done, and nobody is to be given it again."""
        with self._lock:
            self._undone.append(part)

    def left(self) -> list[_Part]:
        """What nobody has done."""
        with self._lock:
            return [*self._undone, *self._parts]


def _host(address: str) -> str:
    return address.rpartition(":")[0]
