"""The door: a Unix socket where this node's trainers and tools are served.

Whoever knocks must be our own user or root (`SO_PEERCRED`); then frames are read with a bound and answered one after
the other, with descriptors where the answer has some (`SCM_RIGHTS`). Nobody can make us grow: a connection holds at
most one frame that is being read and one reply that is being sent, and a client that does not read is hung up on.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import itertools
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from snapshotd import wire
from snapshotd.errors import ConfigError, ProtocolError, SnapshotError

CONNECTIONS_MAX = 1024
SEND_MAX_S = 30.0
_BACKLOG = 128
_CHUNK_BYTES = 64 << 10
_BUFFER_BYTES_MAX = wire.FRAME_BYTES_MAX + wire.HEADER_BYTES
_UCRED = struct.Struct("3i")
log = logging.getLogger("snapshotd")


@dataclass(frozen=True)
class Answer:
    """A reply and the descriptors that go with it: `lent` stay ours, `given` are closed once they were sent."""

    reply: wire.Reply
    lent: tuple[int, ...] = ()
    given: tuple[int, ...] = ()
    sent: Callable[[], None] | None = None


class Session(Protocol):
    """What the daemon does with one connection. Its calls come in this order: `answer` any number of times, `ended`."""

    async def answer(self, request: wire.Request) -> Answer:
        """Serve one request."""

    def ended(self) -> None:
        """The connection is over; nothing else will come from it."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, as the kernel says. `pid` is 0 where it is not visible from here."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel who opened a connection."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid)


class Connection:
    """One client. Reads ahead at most one frame; ends by itself when its process does."""

    def __init__(self, connection: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._socket, self._loop = connection, loop
        self._received = bytearray()
        self._arrived = asyncio.Event()
        self._reading = False
        self._pid_fd = -1
        self.over = False

    def begin(self, pid: int) -> None:
        """Start reading, and watch the process: workers that it forked would keep the connection open after it."""
        self._resume()
        with contextlib.suppress(OSError):
            if pid > 0:
                self._pid_fd = os.pidfd_open(pid)
                self._loop.add_reader(self._pid_fd, self._process_ended)

    async def frame(self) -> bytes | None:
        """The next whole frame; None at the end. ProtocolError as soon as the bytes cannot become one."""
        while True:
            length = wire.HEADER_BYTES
            if len(self._received) >= length:
                length += wire.body_length(bytes(self._received[:length]))
                if len(self._received) >= length:
                    frame = bytes(self._received[:length])
                    del self._received[:length]
                    self._resume()
                    return frame
            if self.over:
                if self._received:
                    raise ProtocolError("truncated", "a connection ended in the middle of a message")
                return None
            self._arrived.clear()
            self._resume()
            await self._arrived.wait()

    async def send(self, frame: bytes, fds: tuple[int, ...]) -> None:
        """Send everything; the descriptors go with the first byte. OSError if the client is gone or does not read."""
        rest = memoryview(frame)
        deadline_s = self._loop.time() + SEND_MAX_S
        while rest:
            try:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._socket.sendmsg([rest], rights, socket.MSG_NOSIGNAL)
                rest, fds = rest[sent:], ()
            except BlockingIOError:
                await self._writable(deadline_s)

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.over = True
        self._pause()
        self._forget_process()
        if self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket)
            self._socket.close()
        self._arrived.set()

    async def _writable(self, deadline_s: float) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(self._socket, _resolve, ready)
        try:
            done, _ = await asyncio.wait([ready], timeout=max(0.0, deadline_s - self._loop.time()))
        finally:
            if self._socket.fileno() >= 0:
                self._loop.remove_writer(self._socket)
        if not done or self._socket.fileno() < 0:
            raise OSError(errno.ETIMEDOUT, "the client does not read its reply")

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(_CHUNK_BYTES)  # a plain recv drops descriptors that nobody asked for
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        self._received += data
        if not data:
            self.over = True
        if self.over or len(self._received) >= _BUFFER_BYTES_MAX:
            self._pause()
        self._arrived.set()

    def _process_ended(self) -> None:
        self._forget_process()
        self._on_readable_rest()
        self.over = True
        self._pause()
        self._arrived.set()

    def _on_readable_rest(self) -> None:
        """What the process had still sent is served."""
        with contextlib.suppress(OSError):
            while len(self._received) < _BUFFER_BYTES_MAX and (data := self._socket.recv(_CHUNK_BYTES)):
                self._received += data

    def _resume(self) -> None:
        if not self._reading and not self.over and len(self._received) < _BUFFER_BYTES_MAX:
            self._reading = True
            self._loop.add_reader(self._socket, self._on_readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._socket)

    def _forget_process(self) -> None:
        if self._pid_fd >= 0:
            self._loop.remove_reader(self._pid_fd)
            os.close(self._pid_fd)
            self._pid_fd = -1


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Door:
    """The listening socket and its connections.

    `welcome` makes a session for each client that may come in, given its number; `dropped` is told the reason and a
    sentence whenever a connection is ended from here.
    """

    def __init__(
        self,
        path: Path,
        welcome: Callable[[Peer, int, Connection], Session],
        dropped: Callable[[str, str], None],
        may_enter: Callable[[Peer], bool] | None = None,
    ) -> None:
        self._path, self._welcome, self._dropped = path, welcome, dropped
        self._may_enter = may_enter or (lambda peer: peer.uid in (0, os.getuid()))
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._tasks: dict[asyncio.Task[None], Connection] = {}
        self._socket = listen(path)
        self._inode = os.stat(path).st_ino
        self._loop.add_reader(self._socket, self._on_knock)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._tasks)

    async def close(self) -> None:
        """Let nobody in any more, remove the socket, end every connection."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:  # another daemon's socket is not ours to remove
                os.unlink(self._path)
        for connection in self._tasks.values():
            connection.close()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=5.0)
        for task in list(self._tasks):
            task.cancel()

    def _on_knock(self) -> None:
        for _ in range(_BACKLOG):
            try:
                client, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._dropped("accept", f"a connection could not be accepted ({error.strerror})")
                self._rest()
                return
            self._let_in(client)

    def _rest(self) -> None:
        """Out of descriptors, most likely: a listening socket stays readable, so do not spin on it."""
        self._loop.remove_reader(self._socket)
        self._loop.call_later(0.5, self._listen_again)

    def _listen_again(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._on_knock)

    def _let_in(self, client: socket.socket) -> None:
        client.setblocking(False)
        peer = peer_of(client)
        if not self._may_enter(peer):
            client.close()
            self._dropped("uid", f"user {peer.uid} (pid {peer.pid}) was turned away; this daemon serves {os.getuid()}")
        elif len(self._tasks) >= CONNECTIONS_MAX:
            client.close()
            self._dropped("connections", f"more than {CONNECTIONS_MAX} connections at once; pid {peer.pid} must wait")
        else:
            connection = Connection(client, self._loop)
            session = self._welcome(peer, next(self._numbers), connection)
            connection.begin(peer.pid)
            task = self._loop.create_task(self._serve(connection, session, peer))
            self._tasks[task] = connection
            task.add_done_callback(lambda done: self._tasks.pop(done, None) and None)

    async def _serve(self, connection: Connection, session: Session, peer: Peer) -> None:
        try:
            while (frame := await connection.frame()) is not None:
                await self._serve_one(connection, session, frame)
        except ProtocolError as error:
            self._dropped(error.reason, f"the connection of pid {peer.pid} was closed: {error}")
        except OSError as error:
            if error.errno == errno.ETIMEDOUT:
                self._dropped("unread", f"the connection of pid {peer.pid} was closed: {error.strerror}")
        finally:
            connection.close()
            session.ended()

    async def _serve_one(self, connection: Connection, session: Session, frame: bytes) -> None:
        answer = await session.answer(wire.unpack_request(frame))
        try:
            await connection.send(wire.pack(answer.reply), answer.lent + answer.given)
        finally:
            for fd in answer.given:
                os.close(fd)
        if answer.sent is not None:
            answer.sent()


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600, in the place of a stale one. ConfigError where that cannot be,
    SnapshotError if a daemon answers there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path)
        listener.bind(os.fspath(path))
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"{path} cannot be the daemon's socket: {reason}; choose another --socket") from None
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} exists and is no socket; it was left as it is, choose another --socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2.0)
            try:
                probe.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink()  # nobody listens: what a killed daemon left
                return
            except OSError:
                pass  # somebody listens and is busy
        raise SnapshotError(f"a daemon listens at {path} already; stop it first (`snapshotd stop`)")
