"""What pulls with READ: a range of a slot in windows, asked for ahead, at no more than the pace that is allowed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from snapshotd import wire
from snapshotd.clock import Clock
from snapshotd.errors import ProtocolError
from snapshotd.streams import CRC_BYTES, Extent, Pool, Resident, Share, Stream, check

READ_BYTES = 64 << 20  # fewer turns than windows: between two answers the connection runs dry
READS_AHEAD = 2
BURST_S = 0.05
_BLOCK_BYTES_MIN = 4096  # of `wire.Blocks`


class Pace:
    """A limit of bandwidth that threads share: by the time t at most (t + 50 ms) · rate bytes were let through.

    `pause` waits for so many seconds; where it returns early, as an event does that was set, the limit is given up.
    """

    def __init__(self, bytes_per_s: float, clock: Clock, pause: Callable[[float], object]) -> None:
        if bytes_per_s < 0:
            raise ValueError(f"{bytes_per_s} bytes per second are no pace; 0 means no limit")
        self._bytes_per_s, self._clock, self._pause = bytes_per_s, clock, pause
        self._lock = threading.Lock()
        self._paid_until_s = clock.monotonic_s()

    def take(self, amount_bytes: int) -> None:
        """Return when that many bytes may be moved."""
        if not self._bytes_per_s:
            return
        with self._lock:
            now_s = self._clock.monotonic_s()
            self._paid_until_s = max(self._paid_until_s, now_s) + amount_bytes / self._bytes_per_s
            wait_s = self._paid_until_s - now_s - BURST_S
        if wait_s > 0:
            self._pause(wait_s)


class Reader:
    """Pulls the bytes [begin, end) of one slot in windows, asking ahead, with the CRC words of exactly their blocks.

    `begin` is a multiple of the slot's blocks, `end` too unless it is the end of the file; both lie within it.
    `window_bytes` is a multiple of the blocks. For one thread; connects with the first window.
    """

    def __init__(
        self,
        pool: Pool,
        address: str,
        job: str,
        arena: bytes,
        slot: int,
        snapshot: wire.SnapshotId,
        begin: int,
        end: int,
        window_bytes: int,
        pace: Pace,
    ) -> None:
        if not 0 <= begin <= end:
            raise ValueError(f"bytes {begin} to {end} are no range")
        if window_bytes <= 0 or window_bytes % _BLOCK_BYTES_MIN:
            raise ValueError(f"windows of {window_bytes} bytes; they must be a multiple of the slot's blocks")
        self._pool, self._address, self._pace = pool, address, pace
        self._job, self._arena, self._slot, self._snapshot = job, arena, slot, snapshot
        self._at, self._end, self._window_bytes = begin, end, window_bytes
        self._ask_at = begin
        self._read_bytes = min(max(READ_BYTES // window_bytes, 1) * window_bytes, wire.READ_BYTES_MAX)
        self._waiting: deque[int] = deque()  # lengths of what was asked for and not answered
        self._stream: Stream | None = None
        self._answer = wire.Reading(0, 0, _BLOCK_BYTES_MIN, b"")
        self._used_bytes = 0

    @property
    def left_bytes(self) -> int:
        """What `next_into` has still to give."""
        return self._end - self._at

    def next_into(self, view: memoryview) -> tuple[bytes, int]:
        """Fill `view`; returns the CRC words of the blocks in it, and their size.

        `view` is whole blocks long or what is left. DaemonUnavailable, ProtocolError or Refused where the bytes are not
        to be had, ValueError for more than is left.
        """
        if len(view) > self.left_bytes:
            raise ValueError(f"{len(view)} bytes are wanted of a range that has {self.left_bytes} left")
        self._pace.take(len(view))
        found, filled = [], 0
        while filled < len(view):
            stream = self._advance()
            count = min(len(view) - filled, self._answer.length - self._used_bytes)
            found.append(self._crcs(count))
            with view[filled : filled + count] as part:
                stream.receive_into(part)
            filled += count
            self.took(count)
        return b"".join(found), self._answer.block_bytes

    def begin(self) -> None:
        """Connect and ask, so that what comes first is on its way. DaemonUnavailable."""
        if self._stream is None:
            self._stream = self._pool.take(self._address)
            self._ask_ahead(self._stream)

    def reach(self) -> int:
        """How many of the next bytes lie in one answer. Waits for its head, and raises as `next_into`."""
        self._advance()
        return self._answer.length - self._used_bytes

    def share(self, length: int, coefficient: int) -> Share:
        """The next `length` bytes, within `reach` and whole blocks, for `gather`; `took` says that it has them."""
        stream = self._advance()
        share = Share(stream, coefficient, length, self._crcs(length), self._answer.block_bytes)
        self._pace.take(length)
        return share

    def took(self, length: int) -> None:
        """What was shared has come."""
        self._used_bytes, self._at = self._used_bytes + length, self._at + length

    def close(self) -> None:
        """Give the connection back if it is in step, else close it. Idempotent."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._pool.give(stream)

    def _advance(self) -> Stream:
        """The stream, in an answer that has bytes left, with more asked ahead."""
        self.begin()
        assert self._stream is not None
        if self._used_bytes == self._answer.length:
            expected, answer = self._waiting.popleft(), self._stream.answer()
            self._used_bytes = 0
            self._check(answer, expected)
            self._answer = answer
            self._ask_ahead(self._stream)
        return self._stream

    def _ask_ahead(self, stream: Stream) -> None:
        while len(self._waiting) < READS_AHEAD and self._ask_at < self._end:
            length = min(self._read_bytes, self._end - self._ask_at)
            stream.ask(wire.Read(self._job, self._arena, self._slot, self._snapshot, self._ask_at, length))
            self._waiting.append(length)
            self._ask_at += length

    def _check(self, answer: wire.Reading, expected: int) -> None:
        block = answer.block_bytes
        if answer.length != expected:
            raise ProtocolError("short", f"{self._address} sent {answer.length} bytes of a slot and {expected} are due")
        if self._answer.crcs and block != self._answer.block_bytes:
            raise ProtocolError("blocks", f"{self._address} changed the blocks of a slot while it was read")
        if self._window_bytes % block or (self._end % block and self._end != answer.file_bytes):
            raise ProtocolError(
                "blocks",
                f"{self._address} checks a slot in blocks of {block} bytes, which windows of {self._window_bytes} and "
                f"an end at {self._end} would cut",
            )

    def _crcs(self, count: int) -> bytes:
        begin, end = self._used_bytes, self._used_bytes + count
        return _words(self._answer.crcs, self._answer.block_bytes, begin, end, self._at + count == self._end)


def _words(crcs: bytes, block: int, begin: int, end: int, is_last: bool) -> bytes:
    """The checksums of the blocks from `begin` to `end`. ValueError where these cut one."""
    if begin % block or (end % block and not is_last):
        raise ValueError(f"a view of bytes {begin} to {end} cuts a block of {block} bytes")
    return crcs[begin // block * CRC_BYTES : -(-end // block) * CRC_BYTES]


class SumReader(Reader):
    """Pulls a sum that a peer makes, window by window; SourceDamaged where bytes that it needs are bad. For one
    thread."""

    def __init__(self, pool: Pool, address: str, ask: wire.Combine, pace: Pace) -> None:
        super().__init__(pool, address, ask.job, b"", 0, ask.snapshot, 0, ask.length, ask.window_bytes, pace)
        self._sum = ask

    def _ask_ahead(self, stream: Stream) -> None:
        if self._ask_at < self._end:
            self._waiting.extend(stream.ask_sum(self._sum))
            self._ask_at = self._end


class OwnReader:
    """What `Reader` is, for bytes of this node's own memory: nothing travels. They stay pinned until `close`."""

    def __init__(self, serve: Callable[[wire.Read], AbstractContextManager[Extent]], read: wire.Read) -> None:
        self._serve, self._read = serve, read
        self._held = ExitStack()
        self._extent: Extent | None = None
        self._used_bytes = 0

    def begin(self) -> None:
        """Pin them. Refused or ProtocolError where they are not here as they should be."""
        if self._extent is None:
            found = self._held.enter_context(self._serve(self._read))
            check(self._read, wire.Reading(len(found.view), found.file_bytes, found.block_bytes, found.crcs))
            if len(found.view) != self._read.length:
                raise ProtocolError("short", f"a slot here ends before the {self._read.length} bytes that are due")
            self._extent, self._resident = found, Resident(found.view)

    def reach(self) -> int:
        """How many of the next bytes lie in one piece: all that are left."""
        return self._read.length - self._used_bytes

    def share(self, length: int, coefficient: int) -> Share:
        """The next `length` bytes, whole blocks, for `gather`; `took` says that it has them."""
        assert self._extent is not None, "begin comes first"
        begin, end, block = self._used_bytes, self._used_bytes + length, self._extent.block_bytes
        words = _words(self._extent.crcs, block, begin, end, end == self._read.length)
        return Share(self._resident, coefficient, length, words, block)

    def took(self, length: int) -> None:
        """What was shared is used."""
        self._used_bytes += length

    def close(self) -> None:
        """Let go. Idempotent."""
        self._held.close()
