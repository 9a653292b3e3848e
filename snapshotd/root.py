"""The daemon's directory on tmpfs: it makes sure that nobody else has it, creates arenas, and finds them again.

What it cannot read it never touches. Removed are only the leftovers of an interrupted creation.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from snapshotd import _native
from snapshotd.arena import OPEN_FLAGS, PLACES, SLOTS, ArenaFile, lock_name, read_owner, remove, slug
from snapshotd.errors import ConfigError, NoRoom, SnapshotError
from snapshotd.faults import crash_point

SHARED_PARENT = Path("/dev/shm/snapshotd")
_NAME = re.compile(r"(?P<job>[A-Za-z0-9_-]+)\.(?P<index>\d+|parity|foster|foster-parity)\.(?P<id>[0-9a-f]{32})\.arena")
_REMEMBERED_BYTES_MAX = 256 << 20
_LOCK, _NODE, _NODE_DRAFT, _LAST = "daemon.lock", "node.id", "node.id.new", "daemon.last"
KEYS, KNOWN, MET = "node.keys", "peers.known", "peers.met"
_OWN = {_LOCK, _NODE, _NODE_DRAFT, _LAST, *(f"{name}{draft}" for name in (KEYS, KNOWN, MET) for draft in ("", ".new"))}


@dataclass(frozen=True)
class Damaged:
    """A file that cannot be used. `job` is the job's part of its name, empty where the name says nothing."""

    name: str
    job: str
    sentence: str


class LastDaemon(NamedTuple):
    """What peers know of a node's daemon as long as a generation lasts, so that the next one is recognised: the ports
    of its messages and its streams, and the number above which it counts what it says."""

    port: int = 0
    stream_port: int = 0
    serial: int = 0


@dataclass(frozen=True)
class Draft:
    """An arena under construction: its files exist, its pages not yet."""

    name: str
    fd: int
    lock_fd: int
    arena_id: bytes
    total_bytes: int

    def reserve(self, numa_node: int) -> None:
        """Give it its pages, on that NUMA node where >= 0. OSError where the machine or the tmpfs has less left."""
        _native.reserve(self.fd, self.total_bytes, numa_node)

    def outstanding_bytes(self) -> int:
        """What its reservation will still take."""
        return max(0, self.total_bytes - os.fstat(self.fd).st_blocks * 512)


class Root:
    """The daemon's directory on tmpfs. `open` makes or checks it and locks out every other daemon."""

    def __init__(self, path: Path, fd: int, lock_fd: int, node: bytes) -> None:
        self.path, self.node = path, node
        self._fd, self._lock_fd = fd, lock_fd
        self._ordinal = 0

    @classmethod
    def open(cls, path: Path) -> Root:
        """ConfigError if the directory is not ours alone, SnapshotError if another daemon has it."""
        fd = _open_directory(path)
        try:
            lock_fd = _lock_directory(path, fd)
            return cls(path, fd, lock_fd, _node_id(fd))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Give the directory up; arenas stay."""
        os.close(self._lock_fd)
        os.close(self._fd)

    def last_daemon(self) -> LastDaemon:
        """What the daemon before this one wrote down; zeros where that is unknown."""
        with contextlib.suppress(OSError, ValueError):
            fd = os.open(_LAST, os.O_RDONLY | OPEN_FLAGS, dir_fd=self._fd)
            try:
                port, stream_port, serial = (int(word) for word in os.read(fd, 64).split())
            finally:
                os.close(fd)
            if 0 <= port <= 65535 and 0 <= stream_port <= 65535 and 0 <= serial < 1 << 62:
                return LastDaemon(port, stream_port, serial)
        return LastDaemon()

    def write_down(self, me: LastDaemon) -> None:
        """For the next daemon here."""
        with contextlib.suppress(OSError):  # it is a convenience: a full tmpfs must not end a daemon
            fd = os.open(_LAST, os.O_CREAT | os.O_WRONLY | OPEN_FLAGS, 0o600, dir_fd=self._fd)
            try:  # of one length and at once, so that whoever is killed here leaves one or the other
                os.pwrite(fd, f"{me.port:5} {me.stream_port:5} {me.serial:20}\n".encode(), 0)
            finally:
                os.close(fd)

    def recall(self, name: str) -> bytes:
        """What `remember` put there; nothing where that cannot be read."""
        with contextlib.suppress(OSError):
            fd = os.open(name, os.O_RDONLY | OPEN_FLAGS, dir_fd=self._fd)
            with open(fd, "rb") as file:
                return file.read(_REMEMBERED_BYTES_MAX)
        return b""

    def remember(self, name: str, data: bytes) -> None:
        """Keep a few bytes for the next daemon here, all of them or those before. Only our user can read them."""
        assert name in _OWN, f"{name} would be taken for somebody else's file"
        with contextlib.suppress(OSError):  # as above: a full tmpfs must not end a daemon
            flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | OPEN_FLAGS
            with open(os.open(f"{name}.new", flags, 0o600, dir_fd=self._fd), "wb") as file:
                file.write(data)
            os.rename(f"{name}.new", name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def draft(self, job: str, local_index: int, total_bytes: int) -> Draft:
        """Make the two files of a new arena, still empty."""
        arena_id = secrets.token_bytes(16)
        name = f"{slug(job)}.{PLACES.get(local_index, local_index)}.{arena_id.hex()}.arena"
        lock_fd = self._create(lock_name(name))
        try:
            fd = self._create(name)
        except BaseException:
            os.close(lock_fd)
            remove(lock_name(name), self._fd)
            raise
        crash_point("reserve.created")
        return Draft(name, fd, lock_fd, arena_id, total_bytes)

    def discard(self, draft: Draft) -> None:
        """Take back what `draft` made."""
        remove(draft.name, self._fd)
        remove(lock_name(draft.name), self._fd)
        os.close(draft.fd)
        os.close(draft.lock_fd)

    def finish(
        self,
        draft: Draft,
        *,
        job: str,
        local_index: int,
        slot_bytes: int,
        block_bytes: int,
        owner: dict[str, Any],
        slots: int = SLOTS,
    ) -> ArenaFile:
        """Format and map a draft whose pages are reserved."""
        _native.Arena.format(
            draft.fd,
            arena_id=draft.arena_id,
            job=job,
            local_index=local_index,
            slots=slots,
            slot_bytes=slot_bytes,
            block_bytes=block_bytes,
        )
        crash_point("reserve.formatted")
        native = _native.Arena(draft.fd, writable=True)
        native.set_owner(**owner)
        return self._arena(draft.name, draft.fd, draft.lock_fd, native, read_owner(native))

    def scan(self) -> tuple[list[ArenaFile], list[Damaged]]:
        """Everything that earlier daemons left here. Removes only what an interrupted creation left behind."""
        files: list[ArenaFile] = []
        damaged: list[Damaged] = []
        names = sorted(os.listdir(self._fd))
        for name in names:
            if name in _OWN:
                continue
            if name.endswith(".lock") and _NAME.fullmatch(name[: -len(".lock")] + ".arena"):
                if name[: -len(".lock")] + ".arena" not in names:
                    remove(name, self._fd)
                continue
            try:
                files.extend(self._adopt(name))
            except (OSError, _native.ArenaFormatError) as error:
                damaged.append(self._unusable(name, error))
        return files, damaged

    def _adopt(self, name: str) -> list[ArenaFile]:
        """The arena of this name; none if it was a leftover, which is removed."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise _native.ArenaFormatError("it is no file of snapshotd")
        fd = os.open(name, os.O_RDWR | OPEN_FLAGS, dir_fd=self._fd)
        lock_fd = -1
        try:
            _check_private(os.fstat(fd), stat.S_ISREG)
            if _is_unformatted(fd):
                return self._remove_leftover(name, fd)
            lock_fd = self._open_lock(name)
            native = _native.Arena(fd, writable=True)
            if native.arena_id.hex() != match["id"] or slug(native.job) != match["job"]:
                raise _native.ArenaFormatError("its name and its header say different things; it was copied or renamed")
            if native.owner() is None:
                native.close()
                os.close(lock_fd)
                return self._remove_leftover(name, fd)
            return [self._arena(name, fd, lock_fd, native, read_owner(native))]
        except BaseException:
            os.close(fd)
            if lock_fd >= 0:
                os.close(lock_fd)
            raise

    def _remove_leftover(self, name: str, fd: int) -> list[ArenaFile]:
        remove(name, self._fd)
        remove(lock_name(name), self._fd)
        os.close(fd)
        return []

    def _open_lock(self, name: str) -> int:
        try:
            lock_fd = os.open(lock_name(name), os.O_RDWR | OPEN_FLAGS, dir_fd=self._fd)
        except FileNotFoundError:
            raise _native.ArenaFormatError("its lock file is missing, so a trainer might still write to it") from None
        try:
            _check_private(os.fstat(lock_fd), stat.S_ISREG)
        except BaseException:
            os.close(lock_fd)
            raise
        return lock_fd

    def _arena(self, name: str, fd: int, lock_fd: int, native: _native.Arena, owner: _native.Owner) -> ArenaFile:
        self._ordinal += 1
        return ArenaFile(name, self._fd, fd, lock_fd, native, owner, self._ordinal)

    def _unusable(self, name: str, error: Exception) -> Damaged:
        match = _NAME.fullmatch(name)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Damaged(
            name,
            match["job"] if match else "",
            f"{self.path / name} cannot be used ({reason}); it was left as it is, remove it by hand to have its memory",
        )

    def _create(self, name: str) -> int:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | OPEN_FLAGS
        try:
            return os.open(name, flags, 0o600, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
                raise NoRoom(
                    f"{self.path} has no room for another file, so this rank is not protected; enlarge its tmpfs",
                    setting="the size of the tmpfs",
                ) from None
            raise


# --- helpers -------------------------------------------------------------------------------------


def _open_directory(path: Path) -> int:
    try:
        if path.parent == SHARED_PARENT:
            _make_shared_parent()
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | OPEN_FLAGS)
    except OSError as error:
        reason = "it is no directory of its own" if error.errno in (errno.ENOTDIR, errno.ELOOP) else error.strerror
        raise ConfigError(f"{path} cannot hold arenas: {reason}; choose another --shm-dir") from None
    try:
        _check_private(os.fstat(fd), stat.S_ISDIR)
    except _native.ArenaFormatError as error:
        os.close(fd)
        raise ConfigError(
            f"{path} cannot hold arenas: {error}, so others could read or replace training state; make it "
            f"`chmod 700` and yours, or choose another --shm-dir"
        ) from None
    return fd


def _make_shared_parent() -> None:
    """The directory that all users of a machine share, like /tmp: everyone may add, nobody may remove another's."""
    with contextlib.suppress(FileExistsError):
        SHARED_PARENT.mkdir()
        SHARED_PARENT.chmod(0o1777)
    status = SHARED_PARENT.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "its parent is no directory", str(SHARED_PARENT))
    shared = bool(status.st_mode & 0o022)
    if status.st_uid not in (0, os.getuid()) and not (status.st_mode & stat.S_ISVTX):
        raise PermissionError(errno.EPERM, f"its parent belongs to user {status.st_uid}", str(SHARED_PARENT))
    if shared and not status.st_mode & stat.S_ISVTX:
        raise PermissionError(errno.EPERM, "its parent is writable for everyone without the sticky bit")


def _check_private(status: os.stat_result, kind: Any) -> None:
    if not kind(status.st_mode):
        raise _native.ArenaFormatError("it is of another kind of file")
    if status.st_uid != os.getuid():
        raise _native.ArenaFormatError(f"it belongs to user {status.st_uid} and not to us ({os.getuid()})")
    if status.st_mode & 0o077:
        raise _native.ArenaFormatError(f"its permissions {stat.S_IMODE(status.st_mode):o} let others in")


def _lock_directory(path: Path, directory_fd: int) -> int:
    fd = os.open(_LOCK, os.O_CREAT | os.O_RDWR | OPEN_FLAGS, 0o600, dir_fd=directory_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise SnapshotError(
            f"the daemon with pid {pid} has {path} already; stop it first (`snapshotd stop`), or choose another "
            f"--shm-dir"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _node_id(directory_fd: int) -> bytes:
    """The node's identity, which lives as long as its memory: read it, or draw it now."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(_NODE, os.O_RDONLY | OPEN_FLAGS, dir_fd=directory_fd)
        try:
            known = os.read(fd, 64)
        finally:
            os.close(fd)
        if len(known) == 16:
            return known
    drawn = secrets.token_bytes(16)
    fd = os.open(_NODE_DRAFT, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | OPEN_FLAGS, 0o600, dir_fd=directory_fd)
    try:
        os.write(fd, drawn)
    finally:
        os.close(fd)
    os.rename(_NODE_DRAFT, _NODE, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    return drawn


def _is_unformatted(fd: int) -> bool:
    """Nothing was written yet: creation writes the header last."""
    return not any(os.pread(fd, 512, 0))
