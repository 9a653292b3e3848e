"""Shards to restore from: in an arena of this node, or on another node and read from there.

Both give a manifest, single tensors and a copy into parameters. A local shard is mapped and pinned; of a remote one
only what is needed is pulled, window by window, each block checked against its CRC32C before a byte of it is used.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

from snapshotd import _native, manifest, wire
from snapshotd.door_client import DoorClient
from snapshotd.errors import DaemonUnavailable, ProtocolError, Refused
from snapshotd.manifest import Manifest, round_up
from snapshotd.reader import Pace, Reader
from snapshotd.recovery import Source
from snapshotd.streams import Pool
from snapshotd_client.layout import Item

WINDOW_BYTES = 8 << 20


class Corrupt(Exception):
    """Bytes of a rank's shard fail their checksum."""

    def __init__(self, source: Source, why: str) -> None:
        super().__init__(why)
        self.source = source


class OpenShard(Protocol):
    """One rank's shard, until `close`."""

    source: Source
    manifest: Manifest

    def broken(self, threads: int) -> str:
        """What is wrong with its bytes, read in full; empty where every block has its CRC32C."""

    def read(self, place: int, length: int) -> bytes:
        """Bytes of the file. Corrupt where a remote block fails its checksum."""

    def copy(self, items: Sequence[Item], threads: int) -> None:
        """Into tensors in host memory; items as in `_native.scatter`."""

    def windows(self, spans: Sequence[tuple[int, int]]) -> Generator[tuple[int, memoryview], None, None]:
        """(offset, bytes) of the file that cover these (offset, length), checked, in order. A window is valid until the
        next. Corrupt as in `read`.
        """

    def close(self) -> None: ...


class LocalShard:
    """Mapped read-only, and pinned by the daemon while it is open."""

    def __init__(self, door: DoorClient, source: Source) -> None:
        self.source, self._door, self._slot = source, door, source.shard.slot
        shard = source.shard
        reply, fds = door.ask(wire.OpenShard(shard.arena, shard.slot, shard.snapshot))
        try:
            if not isinstance(reply, wire.ShardOpened) or len(fds) != 1:
                raise ProtocolError("unexpected", "the daemon answered a read with something else")
            self._arena = _native.Arena(fds[0], writable=False)
        except _native.ArenaFormatError as error:
            raise Corrupt(source, str(error)) from None
        finally:
            for fd in fds:
                os.close(fd)
        info = self._arena.slot(shard.slot)
        if not info.sound or (info.rank, info.step) != (shard.rank, shard.snapshot.step):
            raise Corrupt(source, "its slot's description fails its checksum")
        self._view = self._arena.slot_view(shard.slot)
        try:
            self.manifest = manifest.read(self._view, info.file_bytes)
        except ProtocolError as error:
            raise Corrupt(source, str(error)) from None

    def broken(self, threads: int) -> str:
        bad = self._arena.verify(self._slot, threads)
        return f"{len(bad)} blocks fail their checksum, the first is block {bad[0]}" if bad else ""

    def read(self, place: int, length: int) -> bytes:
        return bytes(self._view[place : place + length])

    def copy(self, items: Sequence[Item], threads: int) -> None:
        _native.scatter(self._view, items, threads)

    def windows(self, spans: Sequence[tuple[int, int]]) -> Generator[tuple[int, memoryview], None, None]:
        with self._view[:] as whole:
            yield 0, whole

    def close(self) -> None:
        """Let go of the mapping and of the pin. A daemon that is gone pins nothing any more."""
        self._view.release()
        self._arena.close()
        try:
            self._door.ask(wire.CloseShard(self.source.shard.arena, self._slot))
        except (DaemonUnavailable, ProtocolError, Refused):
            return


class RemoteShard:
    """Read from the node that holds it, over its byte streams. Its header is fetched at once."""

    def __init__(self, pool: Pool, pace: Pace, address: str, job: str, source: Source) -> None:
        self.source, self._pool, self._pace, self._address, self._job = source, pool, pace, address, job
        shard = source.shard
        if not address:
            raise DaemonUnavailable(
                f"the shard of rank {shard.rank} lies on a node whose daemon listens nowhere; start it with --listen"
            )
        self._block, self._file_bytes = shard.block_bytes, shard.file_bytes
        length = int.from_bytes(self.read(0, 8), "little")
        if length > self._file_bytes - 8:
            raise Corrupt(source, f"its header claims {length} bytes in a file of {self._file_bytes}")
        header = self.read(0, 8 + length)
        try:
            self.manifest = manifest.read_header(header, self._file_bytes)
        except ProtocolError as error:
            raise Corrupt(source, str(error)) from None

    def broken(self, threads: int) -> str:
        """Its own node reads it; here every block is checked when it arrives."""
        return ""

    def read(self, place: int, length: int) -> bytes:
        begin, end = self._whole(place, place + length)
        buffer = memoryview(bytearray(end - begin))
        for _ in self._windows(begin, end, buffer):
            pass
        return bytes(buffer[place - begin : place - begin + length])

    def copy(self, items: Sequence[Item], threads: int) -> None:
        for at, window in self.windows([(item[1], _bytes(item)) for item in items]):
            inside = [item for item in items if item[1] < at + len(window) and item[1] + _bytes(item) > at]
            _native.scatter(window, inside, threads, origin=at, file_bytes=self._file_bytes)

    def windows(self, spans: Sequence[tuple[int, int]]) -> Generator[tuple[int, memoryview], None, None]:
        size = min(round_up(WINDOW_BYTES, self._block), round_up(self._file_bytes, self._block))
        buffer = memoryview(bytearray(size))
        for begin, end in self._ranges(sorted(spans)):
            yield from self._windows(begin, end, buffer, reuse=True)

    def close(self) -> None: ...

    def _whole(self, begin: int, end: int) -> tuple[int, int]:
        """The blocks that these bytes lie in."""
        return begin // self._block * self._block, min(self._file_bytes, round_up(end, self._block))

    def _ranges(self, ordered: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Stretches of whole blocks that hold these (offset, length)."""
        found: list[tuple[int, int]] = []
        for place, length in ordered:
            begin, end = self._whole(place, place + length)
            if found and begin <= found[-1][1]:
                found[-1] = found[-1][0], max(end, found[-1][1])
            elif end > begin:
                found.append((begin, end))
        return found

    def _windows(
        self, begin: int, end: int, buffer: memoryview, *, reuse: bool = False
    ) -> Iterator[tuple[int, memoryview]]:
        """(offset, bytes) of each window of [begin, end), verified. With `reuse` each takes the place of the last."""
        shard = self.source.shard
        size = round_up(WINDOW_BYTES, self._block)
        reader = Reader(
            self._pool, self._address, self._job, shard.arena, shard.slot, shard.snapshot, begin, end, size, self._pace
        )
        try:
            for at in range(begin, end, size):
                start = 0 if reuse else at - begin
                window = buffer[start : start + min(size, end - at)]
                crcs, block = reader.next_into(window)
                bad = _native.ec_check(window, crcs, block)
                if bad >= 0:
                    raise Corrupt(self.source, f"block {at // block + bad} fails its checksum")
                yield at, window
        finally:
            reader.close()


def _bytes(item: Item) -> int:
    length = item[2]
    for size in item[3]:
        length *= size
    return length
