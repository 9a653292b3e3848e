"""What can go wrong, named for what the caller can do about it.

    SnapshotError
    ├── ConfigError            a setting or argument is wrong: correct it (also a ValueError)
    ├── DaemonUnavailable      no daemon answers: start one, or look why it went away
    ├── ProtocolError          bytes arrived that are no message of ours: versions differ, or a stranger speaks
    ├── Refused                the daemon understood and said no; `kind` says which of these it is
    │   ├── NoRoom             memory would not suffice: `needed_bytes`, `available_bytes`, `setting`
    │   ├── RankClaimed        a living process holds this rank: `rank`, `pid`
    │   ├── SnapshotGone       the snapshot asked for is not there any more
    │   └── SourceDamaged      bytes that are to be added up fail their checksum: `term` says which
    ├── LayoutChanged          the snapshot is of another model, optimizer or world size; it was left untouched
    └── SnapshotLost           a snapshot existed and cannot be rebuilt: `why` says what is missing and where

Every message is one sentence or two: what happened, what it means for the training run, what to do.
"""

from __future__ import annotations


class SnapshotError(Exception):
    """Base of everything this project raises on purpose."""


class ConfigError(SnapshotError, ValueError):
    """A setting or an argument is wrong."""


class DaemonUnavailable(SnapshotError):
    """No daemon answers on the socket."""


class ProtocolError(SnapshotError):
    """Bytes arrived that are no valid message; `reason` is a short word to count it under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ProtocolError], tuple[str, str]]:
        return type(self), (self.reason, str(self))  # launchers pickle what a worker raised


class Refused(SnapshotError):
    """The daemon said no."""

    kind = "refused"


class NoRoom(Refused):
    """Memory would not suffice; nothing was allocated."""

    kind = "no-room"

    def __init__(self, message: str, needed_bytes: int = 0, available_bytes: int = 0, setting: str = "") -> None:
        super().__init__(message)
        self.needed_bytes, self.available_bytes, self.setting = needed_bytes, available_bytes, setting


class RankClaimed(Refused):
    """A living process already trains this rank of the job."""

    kind = "rank-claimed"

    def __init__(self, message: str, rank: int = -1, pid: int = 0) -> None:
        super().__init__(message)
        self.rank, self.pid = rank, pid


class SnapshotGone(Refused):
    """The snapshot asked for was replaced by a newer one; an answer, not corruption."""

    kind = "gone"


class SourceDamaged(Refused):
    """A block that a sum is made of fails its checksum; `term` is its place among the terms, -1 where nobody said."""

    kind = "damaged"

    def __init__(self, message: str, term: int = -1) -> None:
        super().__init__(message)
        self.term = term


class LayoutChanged(SnapshotError):
    """The snapshot in memory is of another model, optimizer or world size."""


class SnapshotLost(SnapshotError):
    """Something was committed once and cannot be restored from memory any more."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the committed state of this job cannot be rebuilt from memory: {why}; training has not started, so "
            f'resume from your disk checkpoint, or pass on_lost="fresh" to restore() to begin anew'
        )
        self.why = why

    def __reduce__(self) -> tuple[type[SnapshotLost], tuple[str]]:
        return type(self), (self.why,)


REFUSALS: dict[str, type[Refused]] = {
    kind.kind: kind for kind in (Refused, NoRoom, RankClaimed, SnapshotGone, SourceDamaged)
}
