"""The side of READ that has the bytes, and of sums that are made for peers: a TCP port, one thread a connection.

A server promises: a slot stays pinned until the last byte of an answer has left; nobody holds a pin by not reading; a
stranger costs one thread of at most `CONNECTIONS_MAX` and nothing that grows. Where peers authenticate, who has not
done so within a bound is hung up on, and of those who have not yet there are at most `GREETING_MAX`: the next one takes
the place of the oldest, so that strangers do not keep peers out.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from snapshotd import wire
from snapshotd.clock import SystemClock
from snapshotd.conduit import Conduit, Stalled, joined, reason_of
from snapshotd.errors import ConfigError, ProtocolError, Refused, SnapshotError
from snapshotd.nice import NICE, be_nice
from snapshotd.streams import Extent as Extent
from snapshotd.tls import SecureConduit

CONNECTIONS_MAX = 256
GREETING_MAX = 32
SEND_MAX_S = 30.0
_BACKLOG = 128
_CLOSE_MAX_S = 5.0
_REST_S = 0.5
_CLOCK = SystemClock()


class Wire(Protocol):
    """Where an answer goes: bytes that leave in the order in which they are sent."""

    def send(self, data: bytes | memoryview, more: bool = False) -> None: ...

    def has_ended(self) -> bool: ...


Serve: TypeAlias = Callable[[wire.Read, bytes], AbstractContextManager[Extent]]
Assist: TypeAlias = Callable[[wire.Combine, bytes, Wire], None]


class ReadServer:
    """Serves READ on a TCP port until it is closed; one thread a connection.

    `secure` makes the TLS context for a connection that begins; without it peers read in the clear. `serve` says what
    answers a read, given the certificate of whoever asks (nothing in the clear). Its context is entered on a
    connection's thread and left once the last byte has been handed to the kernel; a SnapshotError raised in entering it
    is told to the peer, and the connection goes on. `assist` answers a `wire.Combine`, all of it, refusals included.
    `dropped` is called with a reason and a sentence, on one of these threads, whenever a connection is ended from here.
    ConfigError if the address cannot be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        serve: Serve,
        dropped: Callable[[str, str], None],
        *,
        assist: Assist | None = None,
        secure: Callable[[], ssl.SSLContext] | None = None,
        nice: int = NICE,
        send_max_s: float = SEND_MAX_S,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self._serve, self._dropped, self._nice, self._secure = serve, dropped, nice, secure
        self._assist = assist
        self._send_max_s, self._connections_max = send_max_s, connections_max
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._conduits: dict[threading.Thread, Conduit] = {}
        self._greeting: dict[threading.Thread, Conduit] = {}
        self._socket = _listen(host, port)
        self.address = joined(self._socket.getsockname())
        self._acceptor = threading.Thread(target=self._accept, name="snapshotd-streams", daemon=True)
        self._acceptor.start()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._conduits)

    def close(self) -> None:
        """Give the port back and end every connection, within a bound.

        Waits for threads that may be in `serve`, so it is not to be called on a thread that `serve` waits for.
        """
        with self._lock:
            self._closing.set()
            threads = [self._acceptor, *self._conduits]
            for conduit in self._conduits.values():
                conduit.hang_up()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        deadline_s = _CLOCK.monotonic_s() + _CLOSE_MAX_S
        for thread in threads:
            thread.join(max(0.0, deadline_s - _CLOCK.monotonic_s()))
        self._socket.close()

    def _accept(self) -> None:
        be_nice(self._nice)
        while not self._closing.is_set():
            try:
                connection, peer = self._socket.accept()
            except OSError as error:
                if not self._closing.is_set():
                    self._dropped("stream-accept", f"a stream could not be accepted ({reason_of(error)})")
                    self._closing.wait(_REST_S)  # out of descriptors, most likely: do not spin on it
                continue
            self._let_in(connection, joined(peer))

    def _let_in(self, connection: socket.socket, peer: str) -> None:
        with self._lock:
            closing, begun = self._closing.is_set(), False
            if not closing and len(self._conduits) < self._connections_max:
                begun = self._begin(connection, peer)
        if not begun:
            connection.close()
        if not begun and not closing:
            self._dropped("stream-connections", f"{peer} was hung up on: no room beside {len(self._conduits)} streams")

    def _begin(self, connection: socket.socket, peer: str) -> bool:
        try:
            conduit = self._conduit(connection)
            thread = threading.Thread(target=self._converse, args=(conduit, peer), name="snapshotd-stream", daemon=True)
            thread.start()  # it ends by taking itself off the table, and waits for our lock to do so
        except (OSError, RuntimeError):  # out of threads, most likely
            return False
        self._conduits[thread] = self._greeting[thread] = conduit
        for oldest in list(self._greeting)[:-GREETING_MAX]:
            self._greeting.pop(oldest).hang_up()
        return True

    def _conduit(self, connection: socket.socket) -> Conduit:
        if self._secure is None:
            return Conduit(connection, self._send_max_s)
        return SecureConduit(connection, self._send_max_s, self._secure(), server=True)

    def _converse(self, conduit: Conduit, peer: str) -> None:
        be_nice(self._nice)
        try:
            who = self._greeted(conduit)
            while (request := _request(conduit)) is not None:
                self._respond(conduit, request, who)
        except ProtocolError as error:
            self._dropped(f"stream-{error.reason}", f"the stream of {peer} was closed: {error}")
        except Stalled:
            self._dropped("stream-unread", f"the stream of {peer} was closed: it does not read what it asked for")
        except OSError:
            pass  # the peer went away: nobody is left to be told
        finally:
            with self._lock:
                self._conduits.pop(threading.current_thread(), None)
                self._greeting.pop(threading.current_thread(), None)
            conduit.close()

    def _respond(self, conduit: Conduit, request: wire.Request, who: bytes) -> None:
        if isinstance(request, wire.Read):
            answer(conduit, request, who, self._serve)
        elif isinstance(request, wire.Combine) and self._assist is not None:
            self._assist(request, who, conduit)
        else:
            raise ProtocolError("unserved", f"{type(request).__name__} is not answered on streams")

    def _greeted(self, conduit: Conduit) -> bytes:
        """Who is there."""
        try:
            who = conduit.greet()
        except (EOFError, Stalled):
            raise ProtocolError("stranger", "it said nothing that proves who it is") from None
        with self._lock:
            self._greeting.pop(threading.current_thread(), None)
        return who


def answer(conduit: Wire, read: wire.Read, who: bytes, serve: Serve) -> None:
    """Send what `serve` says to a read of whoever has that certificate, bytes from where they lie; or its refusal."""
    try:
        with serve(read, who) as found:
            # Before the first byte, so that what cannot be said can still be refused.
            frame = wire.pack(wire.Reading(len(found.view), found.file_bytes, found.block_bytes, found.crcs))
            conduit.send(frame, more=len(found.view) > 0)
            conduit.send(found.view)
    except SnapshotError as error:
        kind = error.kind if isinstance(error, Refused) else Refused.kind
        conduit.send(wire.pack(wire.Refusal(kind, wire.clip(str(error)))))


def _request(conduit: Conduit) -> wire.Request | None:
    try:
        frame = conduit.frame(patient=True)
    except EOFError:
        raise ProtocolError("truncated", "it ended in the middle of a message") from None
    except Stalled:
        raise ProtocolError("stalled", "it stopped in the middle of a message") from None
    return None if frame is None else wire.unpack_request(frame)


def _listen(host: str, port: int) -> socket.socket:
    try:
        place = socket.getaddrinfo(
            None if host in ("", "*") else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(place[4][:2], family=place[0], backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on for streams: {reason_of(error)}; choose another --stream-port"
        ) from None
