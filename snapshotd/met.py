"""Which nodes may hold some of a job, and where they are reached: kept in the daemon's directory, so that the next
daemon of this node can ask them while the job waits and no trainer names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from snapshotd.root import MET, Root
from snapshotd.wire import Address, Id16, Place


class Met:
    """Addresses of other nodes by job and node. Every change is written down; what cannot be read was never met."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._jobs = _unpacked(root.recall(MET))

    def of(self, job: str) -> Mapping[bytes, str]:
        """The nodes of a job."""
        return self._jobs.get(job, {})

    def add(self, job: str, places: Iterable[Place]) -> None:
        """These may hold some of it too."""
        self._put(job, {**self.of(job), **_addresses(places)})

    def only(self, job: str, places: Iterable[Place]) -> None:
        """Nobody but these holds anything that is wanted."""
        self._put(job, _addresses(places))

    def keep(self, jobs: Iterable[str]) -> None:
        """Every other job is over."""
        kept = set(jobs)
        left = {job: nodes for job, nodes in self._jobs.items() if job in kept}
        if left != self._jobs:
            self._jobs = left
            self._write()

    def _put(self, job: str, nodes: dict[bytes, str]) -> None:
        if nodes != self.of(job):
            self._jobs = {**self._jobs, job: nodes}
            self._write()

    def _write(self) -> None:
        self._root.remember(MET, msgspec.msgpack.encode(self._jobs))


def _addresses(places: Iterable[Place]) -> dict[bytes, str]:
    return {place.node: place.address for place in places}


def _unpacked(data: bytes) -> dict[str, dict[bytes, str]]:
    try:
        return dict(msgspec.msgpack.decode(data, type=dict[str, dict[Id16, Address]])) if data else {}
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
