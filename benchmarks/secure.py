"""What it costs that peers authenticate and encrypt: READ over mutual TLS 1.3 against READ in the clear, side by side.

    restore  a slot through `Reader` in windows of 4 MiB, each block checked, as a trainer reads another node's shard
    rebuild  the same bytes multiplied over GF(2^8), checked and added up, as parity is made and lost shards are decoded

The other node is another process here, with the keys that a daemon draws; everything goes over loopback, which has the
kernel's copies and no network: it shows what encryption costs the CPU, and a slower network hides some of that. The two
ways take turns, a ratio is taken of neighbours, its median and the middle half of the rounds are shown. Both must bring
the same bytes. `--check` exits 1 where a ratio misses its target.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys

# A sibling has the name of a module of the standard library, which must be found first.
sys.path[:] = [os.path.dirname(entry) if os.path.exists(f"{entry}/secure.py") else entry for entry in sys.path]

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection

from benchmarks.copy import machine, timed
from benchmarks.rebuild import (
    ARENA,
    BLOCK_BYTES,
    JOB,
    SLOT,
    SNAPSHOT,
    Result,
    another_process,
    blocks_of,
    contents,
    print_results,
    result_of,
)
from snapshotd import _native, wire
from snapshotd.clock import SystemClock
from snapshotd.keys import Keys, pin, serving
from snapshotd.reader import Pace, Reader
from snapshotd.readserver import Extent, ReadServer
from snapshotd.streams import Pool, Stream, gather

SLOT_BYTES, QUICK_BYTES = 256 << 20, 64 << 20
ROUNDS, QUICK_ROUNDS = 15, 7
WINDOW_BYTES, STAGING_BYTES = 4 << 20, 1 << 20
RATIO_MIN = 0.45
COEFFICIENT = 7


def serve(orders: Connection, slot_bytes: int) -> None:
    """Serve a slot both ways until `orders` is closed; tells both addresses and a reader's keys first."""
    slot = memoryview(contents(slot_bytes))
    table = b"".join(_native.crc32c(block).to_bytes(4, "little") for block in blocks_of(slot))
    own, readers = Keys.draw("the one that serves"), Keys.draw("the one that reads")
    context = serving(own.pem, [readers.badge.certificate])

    @contextlib.contextmanager
    def extent(read: wire.Read, who: bytes) -> Iterator[Extent]:
        end = min(read.offset + read.length, len(slot))
        crcs = table[read.offset // BLOCK_BYTES * 4 : -(-end // BLOCK_BYTES) * 4]
        yield Extent(slot[read.offset : end], len(slot), BLOCK_BYTES, crcs)

    def dropped(reason: str, why: str) -> None:
        print(reason, why, file=sys.stderr)

    secure = ReadServer("127.0.0.1", 0, extent, dropped, nice=0, secure=lambda: context)
    plain = ReadServer("127.0.0.1", 0, extent, dropped, nice=0)
    orders.send((secure.address, plain.address, own.badge.certificate, readers.pem))
    with contextlib.suppress(EOFError):
        orders.recv()
    secure.close()
    plain.close()


class Bench:
    """Buffers that are there already, and the ways of reading into them."""

    def __init__(self, secure: str, plain: str, certificate: bytes, pem: bytes, slot_bytes: int) -> None:
        self.secure, self.plain, self.slot_bytes = secure, plain, slot_bytes
        expected = pin(pem, certificate)
        connect = functools.partial(Stream.connect, secure=lambda where: expected if where == secure else None)
        self.pool = Pool(connect)
        self.pace = Pace(0, SystemClock(), time.sleep)
        self.view = memoryview(bytearray(slot_bytes))
        self.staging = memoryview(bytearray(STAGING_BYTES))

    def restore(self, address: str) -> None:
        with contextlib.closing(self._reader(address)) as reader:
            for at in range(0, self.slot_bytes, WINDOW_BYTES):
                window = self.view[at : at + WINDOW_BYTES]
                crcs, block_bytes = reader.next_into(window)
                if _native.ec_check(window, crcs, block_bytes) >= 0:
                    raise SystemExit("a block failed its checksum: the numbers mean nothing")

    def rebuild(self, address: str) -> None:
        with contextlib.closing(self._reader(address)) as reader:
            for at in range(0, self.slot_bytes, WINDOW_BYTES):
                end = min(at + WINDOW_BYTES, self.slot_bytes)
                while at < end:
                    count = min(end - at, reader.reach())
                    share = reader.share(count, COEFFICIENT)
                    if gather(self.view[at : at + count], [share], self.staging, "planes") is not None:
                        raise SystemExit("a block failed its checksum: the numbers mean nothing")
                    reader.took(count)
                    at += count

    def _reader(self, address: str) -> Reader:
        end = self.slot_bytes
        return Reader(self.pool, address, JOB, ARENA, SLOT, SNAPSHOT, 0, end, WINDOW_BYTES, self.pace)

    def round(self) -> dict[str, float]:
        """Every way once, the encrypted one beside the plain one; seconds by name."""
        return {
            f"{way.__name__}{side}": timed(functools.partial(way, address))
            for way in (self.restore, self.rebuild)
            for side, address in (("", self.secure), (" plain", self.plain))
        }

    def check(self) -> None:
        """SystemExit unless both sides of every way bring the same bytes."""
        for way in (self.restore, self.rebuild):
            way(self.plain)
            expected = bytes(self.view)
            self.view[:] = bytes(self.slot_bytes)
            way(self.secure)
            if self.view != expected:
                raise SystemExit(f"what {way.__name__} brought encrypted differs: the numbers mean nothing")


def measure(slot_bytes: int, rounds: int) -> list[Result]:
    """Both ways, encrypted against plain."""
    with another_process(serve, slot_bytes) as (secure, plain, certificate, pem):
        bench = Bench(secure, plain, certificate, pem, slot_bytes)
        try:
            bench.check()
            bench.round()  # warms caches, page tables and the windows of TCP
            times = [bench.round() for _ in range(rounds)]
        finally:
            bench.pool.close()
    return [result_of(what, slot_bytes, times, RATIO_MIN) for what in ("restore", "rebuild")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller slot and fewer rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 where a ratio misses its target")
    arguments = parser.parse_args()
    slot_bytes = QUICK_BYTES if arguments.quick else SLOT_BYTES
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    results = measure(slot_bytes, rounds)
    if arguments.json:
        rows = [asdict(one) | {"reached": one.reached} for one in results]
        print(json.dumps({"machine": machine(), "bytes": slot_bytes, "rounds": rounds, "results": rows}))
    else:
        print(f"{machine()}\n\nREAD of {slot_bytes >> 20} MiB over TLS, medians of {rounds} rounds taken in turns\n")
        print_results(results)
    return 1 if arguments.check and not all(one.reached for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
