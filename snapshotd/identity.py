"""Who this daemon is and whom it believes, kept in its directory so that the next daemon of the node is the same.

Whoever is in a job is trusted in that job, and nobody else: trainers gather their daemons' badges through the process
group that torch.distributed gave them and hand them to their own daemon, which only its own user can reach.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterable

from snapshotd.clock import Clock
from snapshotd.errors import DaemonUnavailable
from snapshotd.keys import Keys, Pin, pin, serving
from snapshotd.root import KEYS, KNOWN, Root
from snapshotd.trust import Trust
from snapshotd.wire import Place


class Identity:
    """One daemon's keys and acquaintances. Changed on the loop; threads may ask at any time."""

    def __init__(self, root: Root, clock: Clock) -> None:
        self._root, self._clock = root, clock
        self.keys = Keys.unpacked(root.recall(KEYS)) or self._drawn()
        self.trust = Trust.unpacked(root.recall(KNOWN), clock.monotonic_s())
        self._lock = threading.Lock()
        self._serving: tuple[frozenset[bytes], ssl.SSLContext] | None = None

    def _drawn(self) -> Keys:
        keys = Keys.draw(f"snapshotd {self._root.node.hex()}")
        self._root.remember(KEYS, keys.packed())
        return keys

    def introduce(self, job: str, places: Iterable[Place]) -> None:
        """Believe these nodes in this job, also after a restart."""
        if self.trust.introduce(job, places, self._clock.monotonic_s()):
            self._root.remember(KNOWN, self.trust.packed())

    def forget(self, kept: Iterable[str]) -> None:
        """Believe nobody any more because of jobs that are over."""
        if self.trust.forget(kept, self._clock.monotonic_s()):
            self._root.remember(KNOWN, self.trust.packed())

    def serving(self) -> ssl.SSLContext:
        """The context that lets in whoever is believed now."""
        with self._lock:
            believed = self.trust.certificates
            if self._serving is None or self._serving[0] != believed:
                self._serving = believed, serving(self.keys.pem, believed)
            return self._serving[1]

    def pin(self, streams: str) -> Pin:
        """How to read from the node whose streams are there. DaemonUnavailable for one that nobody introduced."""
        certificate = self.trust.certificate_of(streams)
        if certificate is None:
            raise DaemonUnavailable(
                f"nobody in this node's jobs said who serves snapshots at {streams}, so nothing is read from there; "
                f"restart the job, which introduces its nodes to each other"
            )
        try:
            return pin(self.keys.pem, certificate)
        except ssl.SSLError:
            raise DaemonUnavailable(
                f"what was said to be the certificate of {streams} is none, so nothing is read from there; restart the "
                f"job, which introduces its nodes to each other"
            ) from None
