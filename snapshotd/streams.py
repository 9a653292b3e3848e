"""READ over TCP, the one verb that moves bytes between nodes, as the side sees it that wants them.

A request is a frame with `wire.Read`; the answer is a frame with `wire.Reading` and then the raw bytes, sent from the
arena and received straight into their destination with the GIL released. Requests may be sent ahead and are answered
in their order. Snapshot data never changes, so a read may be repeated at will.

A client promises: what does not follow the protocol is refused before a byte of it is used, and no wait is without a
bound. Whether the bytes are right is for whoever checks them against the CRCs that came with them. `readserver` is the
other side, `reader` pulls with streams.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from snapshotd import _native, wire
from snapshotd.conduit import Conduit, Stalled, reason_of
from snapshotd.config import parse_address
from snapshotd.door_client import refused
from snapshotd.errors import ConfigError, DaemonUnavailable, ProtocolError, Refused
from snapshotd.keys import Pin
from snapshotd.tls import SecureConduit

SILENCE_MAX_S = 30.0
ASKED_MAX = 64
CRC_BYTES = 4


@dataclass(frozen=True)
class Extent:
    """What answers a `wire.Read`: `view` is sent from where it lies, `crcs` are those of its blocks."""

    view: memoryview
    file_bytes: int
    block_bytes: int
    crcs: bytes


@dataclass(frozen=True)
class Share:
    """What one stream brings to a sum: its next `length` bytes, whole blocks with these checksums, times a coefficient
    over GF(2^8)."""

    stream: Stream | Resident
    coefficient: int
    length: int
    crcs: bytes
    block_bytes: int


@dataclass(frozen=True)
class SumWindow:
    """A part of a sum that was asked for, and is answered as a READ of these bytes would be."""

    offset: int
    length: int


class Stream:
    """One connection to a READ server, for one thread at a time.

    Calls come in this order: `ask` any number of times; for each, `answer`, then `receive_into` until every byte of it
    was taken. After any error but Refused the stream is of no use and is only to be closed.
    """

    def __init__(self, conduit: Conduit, address: str) -> None:
        self.address, self._conduit = address, conduit
        self._asked: deque[wire.Read | SumWindow] = deque()
        self._left_bytes = 0
        self._broken = False

    @classmethod
    def connect(
        cls,
        address: str,
        timeout_s: float = 5.0,
        interface_address: str = "",
        silence_max_s: float = SILENCE_MAX_S,
        secure: Callable[[str], Pin | None] = lambda _: None,
    ) -> Stream:
        """Connect to HOST:PORT, from `interface_address` if given, and to nobody else than `secure` says, if it does.

        DaemonUnavailable where nobody answers in time, or another than was to be there.
        """
        expected = secure(address)
        try:
            place, source = parse_address("a peer's address", address), (interface_address, 0)
            connection = socket.create_connection(place, max(timeout_s, 0.001), source if interface_address else None)
        except ConfigError as error:
            raise DaemonUnavailable(f"no snapshot can be read from there: {error}") from None
        except OSError as error:
            raise DaemonUnavailable(
                f"no daemon serves snapshots at {address} ({reason_of(error)}); {_ADVICE}"
            ) from None
        try:
            return cls(_greeted(connection, silence_max_s, expected), address)
        except (OSError, EOFError, Stalled) as error:
            connection.close()
            why = reason_of(error) if isinstance(error, OSError) else "it did not answer the greeting"
            raise _gone(address, f"went away ({why})") from None
        except ProtocolError as error:
            connection.close()
            raise _gone(address, f"is another than this node was told ({error})") from None

    @property
    def is_encrypted(self) -> bool:
        """What the socket has is not what the answer has."""
        return isinstance(self._conduit, SecureConduit)

    def deadline_s(self, length: int) -> float:
        """When so many bytes must have come that are expected from now on."""
        return self._conduit.deadline_s(length)

    @property
    def in_step(self) -> bool:
        """True where everything that was asked for was taken, so that whoever asks next gets what they asked for."""
        return not (self._broken or self._asked or self._left_bytes)

    def is_usable(self) -> bool:
        """In step, and the other side has not ended it meanwhile."""
        return self.in_step and self._conduit.is_quiet()

    def ask(self, read: wire.Read) -> None:
        """Send a request; at most `ASKED_MAX` may wait for their answers. DaemonUnavailable."""
        if len(self._asked) >= ASKED_MAX:
            raise ProtocolError("step", f"{ASKED_MAX} reads wait for their answers already: take one first")
        frame = wire.pack(read)
        with self._guarded():
            self._conduit.send(frame)
        self._asked.append(read)

    def ask_sum(self, ask: wire.Combine) -> list[int]:
        """Ask a peer to add up; returns the lengths of the answers, which come as those of so many READs of the sum.
        Nothing else is to be asked before the last of them. DaemonUnavailable."""
        frame, windows = wire.pack(ask), _windows_of(ask)
        if self._asked or len(windows) > ASKED_MAX:
            raise ProtocolError("step", f"a sum of {len(windows)} windows is asked for behind {len(self._asked)} reads")
        with self._guarded():
            self._conduit.send(frame)
        self._asked.extend(windows)
        return [window.length for window in windows]

    def answer(self) -> wire.Reading:
        """The head of the next answer; its `length` bytes follow.

        The typed Refused if the daemon said no, DaemonUnavailable if it ended or stalls, ProtocolError for anything
        that does not answer what was asked, and if bytes of the answer before are still to be taken.
        """
        if self._left_bytes or not self._asked:
            raise ProtocolError("step", f"{self._left_bytes} bytes and {len(self._asked)} answers are to come")
        read = self._asked.popleft()
        with self._guarded():
            frame = self._conduit.frame()
            if frame is None:
                raise EOFError
            reply = wire.unpack_reply(frame)
            if isinstance(reply, wire.Refusal):
                no = refused_by_peer(reply)
                if isinstance(read, SumWindow):
                    self._asked.clear()  # nor does the rest of the sum come
            elif isinstance(reply, wire.Reading):
                check(read, reply)
                self._left_bytes = reply.length
                return reply
            else:
                raise ProtocolError("unexpected", f"{self.address} answered a read with {type(reply).__name__}")
        try:
            raise no
        finally:
            del no  # or its traceback holds this frame, which holds it, and with both of them every caller's views

    def receive_into(self, view: memoryview, deadline_s: float | None = None) -> None:
        """Fill `view` with the answer's next bytes. DaemonUnavailable if they do not come, by `deadline_s` if given,
        ProtocolError if they are more than the answer has."""
        if len(view) > self._left_bytes:
            raise ProtocolError("step", f"{len(view)} bytes are wanted of an answer that has {self._left_bytes} left")
        with self._guarded():
            if self._conduit.fill(view, deadline_s=deadline_s) < len(view):
                raise EOFError
        self._left_bytes -= len(view)

    def lend(self, length: int) -> tuple[int, float]:
        """The socket, for one who takes the answer's next `length` bytes from it and says `took` then, and the seconds
        that this may take. Of no use if he does not. Raises as `receive_into`."""
        if length > self._left_bytes:
            raise ProtocolError("step", f"{length} bytes are wanted of an answer that has {self._left_bytes} left")
        if self._broken:
            raise self.gone(0)
        self._broken = True
        return self._conduit.fileno(), self._conduit.patience_s(length)

    def took(self, length: int) -> None:
        """Everything that was lent was taken, and no byte more."""
        self._broken = False
        self._left_bytes -= length

    def gone(self, error: int) -> DaemonUnavailable:
        """What to raise where the socket failed with this errno; 0: the other side ended."""
        if error in (errno.EAGAIN, errno.EWOULDBLOCK):
            return _gone(self.address, "stalls")
        return _gone(self.address, f"went away ({os.strerror(error)})" if error else "ended the stream")

    def close(self) -> None:
        """End the connection; a thread that waits in it is woken. Idempotent."""
        self._broken = True
        self._conduit.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What goes wrong inside ends this stream and says so with a sentence."""
        broken, self._broken = self._broken, True
        try:
            if broken:
                raise EOFError
            yield
            self._broken = False
        except Stalled:
            raise _gone(self.address, "stalls") from None
        except EOFError:
            raise _gone(self.address, "ended the stream") from None
        except ProtocolError as error:
            if error.reason != "stranger":
                raise
            raise _gone(self.address, f"serves nobody that it was not told of ({error})") from None
        except OSError as error:
            raise _gone(self.address, f"went away ({reason_of(error)})") from None


class Resident:
    """Bytes of this node's own memory, brought to a sum as a stream brings those of a peer."""

    is_encrypted = False

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def deadline_s(self, length: int) -> float:
        """They are here."""
        return 0.0

    def receive_into(self, view: memoryview, deadline_s: float | None = None) -> None:
        """Copy the next bytes."""
        view[:] = self._view[self._at : self._at + len(view)]
        self._at += len(view)

    def lend(self, length: int) -> tuple[memoryview, float]:
        """The next bytes where they lie."""
        return self._view[self._at : self._at + length], 0.0

    def took(self, length: int) -> None:
        """So many of them were used."""
        self._at += length

    def gone(self, error: int) -> DaemonUnavailable:
        """Memory does not go away."""
        return DaemonUnavailable(f"bytes of this node's own memory could not be used ({os.strerror(error)})")


def _windows_of(ask: wire.Combine) -> list[SumWindow]:
    starts = range(0, ask.length, ask.window_bytes)
    return [SumWindow(at, min(ask.window_bytes, ask.length - at)) for at in starts]


def gather(view: memoryview, shares: Sequence[Share], staging: memoryview, layout: str) -> Share | None:
    """`view` = the sum of what the shares bring, received side by side in parts of `staging`; what one has less than
    `view` is zero. `layout` is that of the code.

    Returns the first share of which a block differs from its checksum, None where all are sound. After anything else
    than None `view` is to be made again, and the streams are only to be closed. DaemonUnavailable, ProtocolError.
    """
    if any(share.stream.is_encrypted for share in shares):
        return _gather_in_turn(view, shares, staging, layout)
    sources: list[tuple[int | memoryview, int, int, bytes, int]] = []
    patience_s = 0.0
    for share in shares:
        lent, seconds = share.stream.lend(share.length)
        sources.append((lent, share.coefficient, share.length, share.crcs, share.block_bytes))
        patience_s += seconds
    failure = _native.ec_gather(view, sources, staging, layout=layout, timeout_s=patience_s)
    if failure is None:
        for share in shares:
            share.stream.took(share.length)
        return None
    index, bad_block, error = failure
    if bad_block >= 0:
        return shares[index]
    raise shares[index].stream.gone(error)


def _gather_in_turn(view: memoryview, shares: Sequence[Share], staging: memoryview, layout: str) -> Share | None:
    """The same where bytes are to be decrypted first: block by block, one share after the other. The GIL is free while
    a block is received, decrypted, checked and added."""
    for index, share in enumerate(shares):
        deadline_s, block = share.stream.deadline_s(share.length), share.block_bytes
        room = staging if len(staging) >= block else memoryview(bytearray(block))
        for at in range(0, max(1, share.length), block):
            end = min(at + block, share.length)
            with view[at : end if end < share.length else len(view)] as into, room[: end - at] as arriving:
                share.stream.receive_into(arriving, deadline_s)
                crc = share.crcs[at // block * CRC_BYTES :][:CRC_BYTES]
                if not _takes(into, arriving, share, crc, layout, first=index == 0):
                    return share
    return None


def _takes(into: memoryview, arrived: memoryview, share: Share, crc: bytes, layout: str, *, first: bool) -> bool:
    """Add a block to a sum, or begin it with that; False if the block differs from its checksum."""
    if not len(arrived):
        into[:] = bytes(len(into)) if first else into
        return True
    bad = _native.ec_accumulate(
        into, arrived, share.coefficient, first=first, crcs=crc, block_bytes=share.block_bytes, layout=layout
    )
    return bad == -1


def _greeted(connection: socket.socket, silence_max_s: float, expected: Pin | None) -> Conduit:
    """The connection, once the other side has proven that it is the one that was meant."""
    if expected is None:
        return Conduit(connection, silence_max_s)
    conduit = SecureConduit(connection, silence_max_s, expected.context)
    if conduit.greet() != expected.certificate:
        raise ProtocolError("stranger", "it showed another certificate")
    return conduit


_ADVICE = "that node's copy is out of reach now; see `snapshotd status` there"


def _gone(address: str, what: str) -> DaemonUnavailable:
    return DaemonUnavailable(f"the daemon that serves snapshots at {address} {what}; {_ADVICE}")


def refused_by_peer(reply: wire.Refusal) -> Refused:
    """The exception that a peer's refusal stands for. ProtocolError for one whose facts are none."""
    try:
        return refused(reply)
    except ValueError:
        raise ProtocolError("content", f"a refusal states facts that are none: {reply.sentence}") from None


def check(read: wire.Read | SumWindow, reading: wire.Reading) -> None:
    """ProtocolError unless `reading` can be an answer to `read`."""
    block, end = reading.block_bytes, read.offset + reading.length
    if block & (block - 1) or read.offset % block:
        raise ProtocolError("blocks", f"a slot is said to have blocks of {block} bytes, and one at {read.offset}")
    if reading.length > read.length or (reading.length and end > reading.file_bytes):
        raise ProtocolError(
            "length",
            f"{read.length} bytes from {read.offset} were asked for and {reading.length} of {reading.file_bytes} came",
        )
    covered = reading.file_bytes if not read.length and not read.offset else reading.length
    blocks = -(-covered // block)
    if len(reading.crcs) != CRC_BYTES * blocks:
        raise ProtocolError("checksums", f"{blocks} blocks came with {len(reading.crcs)} bytes of checksums")


class Pool:
    """Idle streams by address, for the threads of a process. The oldest is closed where there would be too many."""

    def __init__(
        self,
        connect: Callable[[str], Stream] = Stream.connect,
        per_address_max: int = 16,
        streams_max: int = 256,
    ) -> None:
        self._connect, self._per_address_max, self._streams_max = connect, per_address_max, streams_max
        self._lock = threading.Lock()
        self._idle: list[Stream] = []
        self._closed = False

    def take(self, address: str) -> Stream:
        """A stream to this address, the caller's until it is given back or closed. DaemonUnavailable."""
        while (stream := self._taken(address)) is not None:
            if stream.is_usable():
                return stream
            stream.close()
        return self._connect(address)

    def give(self, stream: Stream) -> None:
        """Take a stream back; one that is out of step is closed."""
        surplus = [stream]
        if stream.in_step:
            with self._lock:
                surplus = [stream] if self._closed else self._kept(stream)
        for one in surplus:
            one.close()

    def close(self) -> None:
        """Close what is idle now and what is given back from now on."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for stream in idle:
            stream.close()

    def _taken(self, address: str) -> Stream | None:
        with self._lock:
            if self._closed:
                raise DaemonUnavailable(f"nothing is read from {address} any more, since this daemon stops")
            for index in reversed(range(len(self._idle))):  # the one used last is the least likely to have ended
                if self._idle[index].address == address:
                    return self._idle.pop(index)
            return None

    def _kept(self, stream: Stream) -> list[Stream]:
        """Keep it; returns what is too much then."""
        self._idle.append(stream)
        same = [one for one in self._idle if one.address == stream.address]
        surplus = same[: max(0, len(same) - self._per_address_max)]
        surplus = surplus or self._idle[: max(0, len(self._idle) - self._streams_max)]
        self._idle = [one for one in self._idle if one not in surplus]
        return surplus
