"""The near side of the door: how a trainer or a tool asks its node's daemon, one request at a time.

Synchronous and small, since it also lives in trainers: no asyncio, nothing of the daemon. The caller serialises its
threads. A reply that is late or that cannot be trusted closes the connection, because the stream may be out of step.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
from pathlib import Path
from types import TracebackType

from snapshotd import wire
from snapshotd.clock import SystemClock
from snapshotd.errors import REFUSALS, DaemonUnavailable, NoRoom, ProtocolError, RankClaimed, Refused, SourceDamaged

FDS_MAX = 8
_CHUNK_BYTES = 64 << 10
_CLOCK = SystemClock()


class DoorClient:
    """A connection to the daemon of this node. `connect` makes one; `Hello` is the caller's first request."""

    def __init__(self, connection: socket.socket, path: Path) -> None:
        self._socket = connection
        self._path = path
        self._received = bytearray()

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout_s: float = 5.0) -> DoorClient:
        """Knock once. DaemonUnavailable if nobody listens there, or answers within `timeout_s`."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(max(timeout_s, 0.001))
            connection.connect(os.fspath(path))
            connection.setblocking(False)
        except OSError as error:
            connection.close()
            raise DaemonUnavailable(f"no daemon answers at {path} ({_reason(error)}); {_ADVICE}") from None
        return cls(connection, Path(path))

    def ask(self, request: wire.Request, timeout_s: float = 30.0) -> tuple[wire.Reply, list[int]]:
        """The daemon's answer, and the descriptors that came with it, which are the caller's to close.

        `timeout_s` is for the whole exchange. DaemonUnavailable if the daemon went away or stayed silent,
        ProtocolError if its answer is none, and the typed `Refused` if it said no.
        """
        deadline_s = _CLOCK.monotonic_s() + timeout_s
        fds: list[int] = []
        try:
            self._send(wire.pack(request), deadline_s)
            reply = self._reply(fds, deadline_s)
        except BaseException as error:
            _close_all(fds)
            self.close()
            if isinstance(error, OSError):
                raise DaemonUnavailable(f"the daemon at {self._path} went away ({_reason(error)}); {_ADVICE}") from None
            raise
        if isinstance(reply, wire.Refusal):
            _close_all(fds)
            raise refused(reply)
        return reply, fds

    def fileno(self) -> int:
        """The socket's descriptor, readable when the daemon went away; -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the connection; what it had pinned is let go by the daemon. Idempotent."""
        self._socket.close()

    def __enter__(self) -> DoorClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, frame: bytes, deadline_s: float) -> None:
        if self._socket.fileno() < 0:
            raise DaemonUnavailable(f"the connection to the daemon at {self._path} is closed; connect again")
        rest = memoryview(frame)
        while rest:
            try:
                rest = rest[self._socket.send(rest, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline_s)

    def _reply(self, fds: list[int], deadline_s: float) -> wire.Reply:
        self._receive(wire.HEADER_BYTES, fds, deadline_s)
        length = wire.HEADER_BYTES + wire.body_length(bytes(self._received[: wire.HEADER_BYTES]))
        self._receive(length, fds, deadline_s)
        frame = bytes(self._received[:length])
        del self._received[:length]
        if self._received:
            raise ProtocolError("unasked", f"the daemon at {self._path} sent more than was asked for")
        return wire.unpack_reply(frame)

    def _receive(self, length: int, fds: list[int], deadline_s: float) -> None:
        """Read until `length` bytes are here. Bytes and descriptors that come along are kept."""
        space = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
        while len(self._received) < length:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(_CHUNK_BYTES, space, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline_s)
                continue
            fds.extend(_descriptors(ancillary))
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError(
                    "descriptors", "descriptors got lost on the way; is the limit of open files reached?"
                )
            if not data:
                raise DaemonUnavailable(f"the daemon at {self._path} closed the connection; {_ADVICE}")
            self._received += data

    def _wait(self, events: int, deadline_s: float) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        left_s = deadline_s - _CLOCK.monotonic_s()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise DaemonUnavailable(f"the daemon at {self._path} does not answer in time; {_ADVICE}")


_ADVICE = "see `snapshotd status`, or start one with `snapshotd serve`"


def refused(reply: wire.Refusal) -> Refused:
    """The exception that a refusal stands for, with its facts as fields."""
    facts = reply.facts
    kind = REFUSALS.get(reply.kind, Refused)
    if kind is NoRoom:
        return NoRoom(
            reply.sentence,
            needed_bytes=int(facts.get("needed_bytes", 0)),
            available_bytes=int(facts.get("available_bytes", 0)),
            setting=str(facts.get("setting", "")),
        )
    if kind is RankClaimed:
        return RankClaimed(reply.sentence, rank=int(facts.get("rank", -1)), pid=int(facts.get("pid", 0)))
    if kind is SourceDamaged:
        return SourceDamaged(reply.sentence, term=int(facts.get("term", -1)))
    return kind(reply.sentence)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
