"""An arena file: memory that outlives both the trainer and the daemon.

`ArenaFile` is one of them, mapped, with what the daemon knows about it. It owns its descriptors and closes them.

An arena is two files, `<job>.<local index>.<arena id>.arena` (`parity` in place of the index where it holds a node's
parity sets, `foster` and `foster-parity` where it holds what survivors made while the job waits) and, beside it,
`.lock`. The lock file is made first and removed last, so one without an arena is a leftover and an arena without its
lock is not to be trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from snapshotd import _native, parityset
from snapshotd.faults import crash_point
from snapshotd.liveness import Watch, holder_pid
from snapshotd.wire import GenerationId, SnapshotId

SLOTS = 2
PARITY_INDEX = 0xFFFFFFFF
"""Local index of the arena that holds a node's parity sets."""
FOSTER_INDEX, FOSTER_PARITY_INDEX = 0xFFFFFFFE, 0xFFFFFFFD
"""Local indices of arenas with one slot each: a lost node's shard that a survivor decoded, and the parity set that it
owns among the survivors."""
PLACES = {PARITY_INDEX: "parity", FOSTER_INDEX: "foster", FOSTER_PARITY_INDEX: "foster-parity"}
"""What stands for these in an arena's name."""
OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
OWNER_FIELDS = (
    "generation", "nonce", "rank", "world_size", "local_world", "every", "pid", "fenced", "closed", "released_at_s",
    "restored_generation", "restored_nonce", "restored_step",
)  # fmt: skip


# --- who has it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Free:
    """Nobody has the arena."""


@dataclass(frozen=True)
class Granted:
    """A trainer was given the arena and has not said yet that it holds the lock."""

    pid: int
    session: int


@dataclass(frozen=True)
class HeldBy:
    """A living trainer holds the lock. `session` is the connection over which it said so; 0 after adoption."""

    pid: int
    session: int = 0


Holder: TypeAlias = Free | Granted | HeldBy


# --- one arena -----------------------------------------------------------------------------------


@dataclass
class ArenaFile:
    """One arena that this daemon has mapped. The owner record is kept here too; only we write it."""

    name: str
    directory_fd: int
    fd: int
    lock_fd: int
    native: _native.Arena
    owner: _native.Owner
    ordinal: int
    holder: Holder = field(default_factory=Free)
    fresh: bool = False
    watched: bool = False
    pins: Counter[int] = field(default_factory=Counter)
    doomed: dict[int, SnapshotId] = field(default_factory=dict)
    quarantined: dict[int, tuple[SnapshotId, str]] = field(default_factory=dict)
    missed: tuple[SnapshotId, str] | None = None  # the committed shard that was set aside, its slot being free again
    bell_fd: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    gone: bool = False
    checking: bool = False  # somebody doubted its bytes, and a thread reads them
    awaits_rebuild: bool = False  # its shard of the restored snapshot is still to be decoded into it
    described: dict[int, tuple[bytes, parityset.Description]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The geometry never changes: remembered, since it is asked for after `free` too.
        self.arena_id, self.job, self.local_index = self.native.arena_id, self.native.job, self.native.local_index
        self.total_bytes, self.slot_bytes = self.native.total_bytes, self.native.slot_bytes
        self.block_bytes = self.native.block_bytes

    @property
    def generation(self) -> GenerationId:
        """The generation that the arena belongs to now."""
        return GenerationId(self.owner.generation, self.owner.nonce)

    @property
    def restored(self) -> SnapshotId | None:
        """What that generation began from."""
        if not self.owner.restored_step:
            return None
        made_by = GenerationId(self.owner.restored_generation, self.owner.restored_nonce)
        return SnapshotId(made_by, self.owner.restored_step)

    @property
    def is_parity(self) -> bool:
        """It holds parity sets of this node and no rank's shards; no trainer ever has it."""
        return self.local_index in (PARITY_INDEX, FOSTER_PARITY_INDEX)

    @property
    def is_foster(self) -> bool:
        """This daemon made it while the job waits, beside all that stood before: no trainer ever has it, and it has no
        part in any vote."""
        return self.local_index in (FOSTER_INDEX, FOSTER_PARITY_INDEX)

    @property
    def pinned(self) -> bool:
        """Somebody reads from it."""
        return any(self.pins.values())

    def amend(self, **changes: Any) -> None:
        """Write the owner record anew with these fields changed."""
        fields = {name: getattr(self.owner, name) for name in OWNER_FIELDS}
        self.native.set_owner(**(fields | changes))
        self.owner = read_owner(self.native)

    def held_by(self) -> int | None:
        """The pid of the process that holds the arena's lock; 0 if it is not visible from here; None if nobody does."""
        return holder_pid(self.lock_fd)

    def watch(self, released: Callable[[], None]) -> None:
        """Have `released` called, on a thread of its own, once nobody holds the lock any more."""
        Watch(self.lock_fd, released)

    def silence_bell(self) -> None:
        """The bell was heard."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.bell_fd)

    def broken_blocks(self, slot: int, threads: int) -> list[int]:
        """Blocks of a slot that fail their checksum.

        Through a mapping of its own: the pages that were read would else count as this daemon's memory for good.
        """
        mapping = _native.Arena(self.fd, writable=False)
        try:
            return mapping.verify(slot, threads)
        finally:
            mapping.close()

    def bad_blocks(self, slot: int, first: int, count: int) -> list[int]:
        """The same of `count` blocks from block `first` on."""
        mapping = _native.Arena(self.fd, writable=False)
        try:
            begin = first * self.block_bytes
            end = min(begin + count * self.block_bytes, mapping.slot(slot).file_bytes)
            words = mapping.crc_words(slot, first, count)
            with mapping.slot_view(slot) as whole, whole[begin:end] as view:
                return [first + block for block in bad_blocks(view, words, self.block_bytes)]
        finally:
            mapping.close()

    def open_read_only(self) -> int:
        """A fresh descriptor through which nothing can be written; the caller's to close."""
        return os.open(self.name, os.O_RDONLY | OPEN_FLAGS, dir_fd=self.directory_fd)

    def free(self) -> None:
        """Remove both files. A trainer that still maps them keeps its memory until it ends."""
        crash_point("free.before")
        remove(self.name, self.directory_fd)
        crash_point("free.after")
        remove(lock_name(self.name), self.directory_fd)
        self.close()

    def close(self) -> None:
        """Let go of mapping and descriptors; the files stay. Idempotent."""
        if not self.gone:
            self.gone = True
            self.native.close()
            for fd in (self.fd, self.lock_fd, self.bell_fd):
                os.close(fd)


def bad_blocks(data: memoryview, words: bytes, block_bytes: int) -> list[int]:
    """Which blocks of `data` differ from their checksums."""
    found, at = [], 0
    while at < len(data) and (bad := _native.ec_check(data[at:], words[4 * (at // block_bytes) :], block_bytes)) >= 0:
        found.append(at // block_bytes + bad)
        at = (found[-1] + 1) * block_bytes
    return found


def slug(job: str) -> str:
    """A job's part of a file name: readable, and unlike that of any other job."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", job)[:64]
    return f"{readable}-{hashlib.sha256(job.encode()).hexdigest()[:8]}"


def read_owner(native: _native.Arena) -> _native.Owner:
    """The owner record. ArenaFormatError where there is none or it is damaged."""
    owner = native.owner()
    if owner is None:
        raise _native.ArenaFormatError("it has no owner record")
    return owner


def remove(name: str, directory_fd: int) -> None:
    """Remove a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory_fd)


def lock_name(name: str) -> str:
    """The lock file's name of an arena's name."""
    return name.removesuffix(".arena") + ".lock"
