"""Whom a node believes: the nodes that it was introduced to, by job.

Pure. Somebody who takes part in a job, or did so while this node still keeps something of it, may read what is kept of
that job and be heard about it, and of no other job. Tables are replaced and never changed, so that threads may look at
any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from snapshotd.wire import PLACES_MAX, Place

JOBS_MAX = 256
FORGET_S = 900.0  # between an introduction and the first arena lie gathers of many ranks


class Trust:
    """Nodes by job, and what shows that they are who they say they are.

    Bounded: of a job `PLACES_MAX` nodes are known, of which those that were not named for longest go first; and
    `JOBS_MAX` jobs likewise.
    """

    def __init__(self, jobs: Mapping[str, Sequence[Place]] | None = None, now_s: float = 0.0) -> None:
        self._jobs: dict[str, dict[bytes, Place]] = {}
        self._met_s: dict[str, float] = {}
        self.certificates: frozenset[bytes] = frozenset()
        for job, places in (jobs or {}).items():
            self._add(job, places, now_s)
        self._index()

    def introduce(self, job: str, places: Iterable[Place], now_s: float) -> bool:
        """Believe these from now on, in this job. False where all of that was known."""
        known = self._jobs.get(job, {})
        news = [place for place in places if place.badge is not None and known.get(place.node) != place]
        self._met_s[job] = now_s
        if news:
            self._add(job, news, now_s)
            self._index()
        return bool(news)

    def forget(self, kept: Iterable[str], now_s: float) -> bool:
        """Jobs of which nothing is kept, and nobody was introduced lately, are over. True where there were some."""
        over = [job for job, met_s in self._met_s.items() if now_s - met_s > FORGET_S]
        over = [job for job in over if job not in set(kept)]
        for job in over:
            del self._met_s[job]
            self._jobs.pop(job, None)
        if over:
            self._index()
        return bool(over)

    def packed(self) -> bytes:
        """For the next daemon of this node."""
        return msgspec.msgpack.encode({job: list(places.values()) for job, places in self._jobs.items()})

    @classmethod
    def unpacked(cls, data: bytes, now_s: float) -> Trust:
        """What `packed` wrote; nobody is known where it cannot be read."""
        try:
            return cls(msgspec.msgpack.decode(data, type=dict[str, list[Place]]) if data else {}, now_s)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return cls()

    # --- questions --------------------------------------------------------------------------------

    def curve_of(self, address: str) -> bytes | None:
        """The public key of whoever listens for messages there."""
        return self._curve_at.get(address)

    def certificate_of(self, streams: str) -> bytes | None:
        """The certificate of whoever serves byte streams there."""
        return self._certificate_at.get(streams)

    def believes(self, curve: bytes) -> bool:
        """Whether this is the key of a node of any job."""
        return curve in self._curves

    def node(self, job: str, curve: bytes) -> bytes | None:
        """Which node of the job has this key."""
        return self._nodes.get((job, curve))

    def may_read(self, job: str, certificate: bytes) -> bool:
        """Whether a node of the job has this certificate."""
        return (job, certificate) in self._readers

    # --- tables -----------------------------------------------------------------------------------

    def _add(self, job: str, places: Iterable[Place], now_s: float) -> None:
        known = dict(self._jobs.pop(job, {}))  # the job named last stands last
        for place in places:
            known.pop(place.node, None)
            known[place.node] = place
        self._jobs[job] = dict(list(known.items())[-PLACES_MAX:])
        self._met_s[job] = now_s
        for old in list(self._jobs)[:-JOBS_MAX]:
            del self._jobs[old], self._met_s[old]

    def _index(self) -> None:
        """Of two nodes at one address the one named last is there now."""
        told = [(job, place, place.badge) for job, places in self._jobs.items() for place in places.values()]
        rows = [(job, place, badge) for job, place, badge in told if badge is not None]
        self._curve_at = {place.address: badge.curve for _, place, badge in rows}
        self._certificate_at = {place.streams: badge.certificate for _, place, badge in rows}
        self._nodes = {(job, badge.curve): place.node for job, place, badge in rows}
        self._readers = frozenset((job, badge.certificate) for job, _, badge in rows)
        self._curves = frozenset(badge.curve for _, _, badge in rows)
        self.certificates = frozenset(badge.certificate for _, _, badge in rows)
