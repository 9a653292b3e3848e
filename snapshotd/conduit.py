"""A connected socket on which every wait is bounded: what READ's two sides speak over.

It promises that a call returns within its silence plus its bytes at the slowest rate, that the GIL is free while bytes
move, and that whoever waits in it is woken by `hang_up`. What the bytes mean is for `streams` and `readserver`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct

from snapshotd import wire
from snapshotd.clock import SystemClock

RATE_MIN_BYTES_PER_S = 64 << 10  # a side that moves, but slower than this, has gone as well
_SEND_BYTES = 4 << 20  # between two looks at the clock
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
_CLOCK = SystemClock()


class Stalled(Exception):
    """The other side neither went away nor went on."""


class Conduit:
    """A connected socket on which every wait is bounded: by `silence_max_s` without a byte, and by a slowest rate."""

    def __init__(self, connection: socket.socket, silence_max_s: float) -> None:
        self._socket = connection
        connection.settimeout(None)  # the kernel keeps the time, so that a call moves many bytes without the GIL
        self.bear_silence(silence_max_s)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def bear_silence(self, silence_max_s: float) -> None:
        """From now on."""
        self._silence_max_s = silence_max_s
        timeval = struct.pack("@ll", int(silence_max_s), max(1, int(silence_max_s % 1 * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def greet(self) -> bytes:
        """The other side's certificate; nothing where none is shown. Comes first, and once."""
        return b""

    def send(self, data: bytes | memoryview, more: bool = False) -> None:
        """Everything, and no reference to it stays. Stalled or OSError where it cannot be; `more` follows at once."""
        flags = socket.MSG_NOSIGNAL | (socket.MSG_MORE if more else 0)
        at, deadline_s = 0, self.deadline_s(len(data))
        with memoryview(data) as whole:
            while at < len(whole):
                with whole[at : at + _SEND_BYTES] as part:
                    try:
                        at += self._socket.send(part, flags)
                    except BlockingIOError:
                        raise Stalled from None
                if at < len(whole) and _CLOCK.monotonic_s() > deadline_s:
                    raise Stalled

    def fill(self, view: memoryview, patient: bool = False, deadline_s: float | None = None) -> int:
        """How much of `view` was filled: less than all only where the other side ended.

        Stalled where nothing comes; `patient` waits for the first byte for ever, or until the connection ends. After
        the first byte `deadline_s` holds, or what the bytes take at the slowest rate.
        """
        at, deadline_s = 0, deadline_s if patient or deadline_s else self.deadline_s(len(view))
        while at < len(view):
            with view[at:] as rest:
                try:
                    count = self._socket.recv_into(rest, 0, socket.MSG_WAITALL)
                except BlockingIOError:
                    if patient and not at:
                        continue
                    raise Stalled from None
            if not count:
                break
            at += count
            if deadline_s is None:
                deadline_s = self.deadline_s(len(view))
            elif at < len(view) and _CLOCK.monotonic_s() > deadline_s:
                raise Stalled
        return at

    def frame(self, patient: bool = False) -> bytes | None:
        """The next whole frame; None at the end. EOFError if that comes in the middle of one, Stalled, ProtocolError
        as soon as the bytes cannot become a frame."""
        header = bytearray(wire.HEADER_BYTES)
        count = self.fill(memoryview(header), patient)
        if count == 0:
            return None
        if count == len(header):
            frame = header + bytes(wire.body_length(bytes(header)))
            if self.fill(memoryview(frame)[len(header) :]) == len(frame) - len(header):
                return bytes(frame)
        raise EOFError

    def fileno(self) -> int:
        return self._socket.fileno()

    def is_quiet(self) -> bool:
        """True while the other side neither ended nor sent anything."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def has_ended(self) -> bool:
        """True once either side has ended it; what the other one sent before may still lie here."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def hang_up(self) -> None:
        """End it for both sides; whoever waits in it is woken. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._socket.close()

    def deadline_s(self, length: int) -> float:
        """When so many bytes must have come that are expected from now on."""
        return _CLOCK.monotonic_s() + self.patience_s(length)

    def patience_s(self, length: int) -> float:
        """How long that many bytes may take."""
        return self._silence_max_s + length / RATE_MIN_BYTES_PER_S


def joined(place: tuple[object, ...]) -> str:
    host, port = place[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def reason_of(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
