"""Who holds an arena, and the moment at which nobody does any more.

A trainer holds its arena by a POSIX record lock on a lock file. The kernel lets go of it when that process ends, and
only then: neither forked DataLoader workers nor a passed descriptor keep it. The daemon asks for the same lock in a
thread per held arena; getting it is the news. Two traps of these locks: any `close()` of any descriptor of the file in
a process drops that process's lock (harmless in the daemon, which never wants to keep it), and they are per process,
so the threads here never stand in each other's way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from collections.abc import Callable

_FLOCK = struct.Struct("@hhqqi0q")  # struct flock: type, whence, start, length, pid
_RETRY_S = 0.05


def holder_pid(lock_fd: int) -> int | None:
    """The pid of the other process that holds the lock; 0 if it is not visible from here; None if nobody does."""
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(lock_fd, fcntl.F_GETLK, question))
    if kind == fcntl.F_UNLCK:
        return None
    return max(0, int(pid))


class Watch:
    """One thread that waits for one lock and calls `released()`, on itself, once it was free.

    It works on a descriptor of its own, so the arena may be closed meanwhile. It cannot be called off: it ends with
    the holder, or with the daemon.
    """

    def __init__(self, lock_fd: int, released: Callable[[], None]) -> None:
        self._fd = os.dup(lock_fd)
        self._released = released
        threading.Thread(target=self._wait, name="snapshotd-liveness", daemon=True).start()

    def _wait(self) -> None:
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX)
                break
            except OSError:  # the kernel is out of locks: ask again, there is no other way to learn it
                threading.Event().wait(_RETRY_S)
        with contextlib.suppress(OSError):
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        self._released()
