"""How fast bytes come from another node's memory, and a lost node from several others, against bare TCP loops.

Reading a slot, from one other process:

    stream   one `wire.Read` after the other, two ahead, into a buffer that is there already: frames, CRC words, checks
    reader   the same bytes through `Reader` in windows of 1 MiB, as encoding and rebuilding pull them
    plain    a process that calls `sendall` on the same bytes, and `recv_into` in a loop into the same buffer

Rebuilding a lost node, for several k and m (k + m nodes, a daemon and a rank without torch on each):

    rebuild  m nodes are killed with their memory, empty ones come, and one of them decodes its shard from k pieces of
             each stripe: from `wire.Rebuild` until the daemon says that it is over, which moves k times the shard
    plain    k processes that send as much at once with `sendall` to one that takes it, a thread and a window for each

Other nodes are other processes here; everything goes over loopback, which has the kernel's copies and no network, so it
shows what the protocol costs and not what a network allows. Ways take turns, so that whatever else the machine does
meets all of them; a ratio is taken of neighbours, its median and the middle half of the rounds are shown. What arrived
is compared with what was sent. `--check` exits 1 where a ratio misses its target.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys

# A sibling has the name of a module of the standard library, which must be found first.
sys.path[:] = [os.path.dirname(entry) if os.path.exists(f"{entry}/rebuild.py") else entry for entry in sys.path]

import argparse
import contextlib
import functools
import json
import multiprocessing
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.copy import machine, timed
from benchmarks.holder import Holder, protect_together
from benchmarks.nodes import Nodes, nodes
from snapshotd import _native, recovery, wire
from snapshotd.clock import SystemClock
from snapshotd.reader import READ_BYTES, READS_AHEAD, Pace, Reader
from snapshotd.readserver import Extent, ReadServer
from snapshotd.streams import Pool

SLOT_BYTES, QUICK_BYTES = 256 << 20, 64 << 20
ROUNDS, QUICK_ROUNDS = 15, 7
GROUPS, QUICK_GROUPS = ((2, 1), (4, 1), (6, 1), (4, 2)), ((2, 1), (4, 2))  # k, m
REBUILDS, QUICK_REBUILDS = 7, 3
BLOCK_BYTES = 1 << 20
WINDOW_BYTES = 1 << 20
PATIENCE_S = 60.0
READ_RATIO_MIN = 0.8
REBUILD_RATIO_MIN = 0.6
LOOK_EVERY_S = 0.05  # looking costs the daemon time; what it took, it says itself
JOB, ARENA, SLOT = "benchmark", bytes(16), 0
SNAPSHOT = wire.SnapshotId(wire.GenerationId(1, bytes(16)), 1)


@dataclass(frozen=True)
class Result:
    """One way of moving bytes; rates in GB/s, the ratio of ours to the plain loop's."""

    what: str
    gb_per_s: float
    plain_gb_per_s: float
    ratio: float
    ratio_spread: tuple[float, float]
    target: float

    @property
    def reached(self) -> bool:
        return self.ratio >= self.target


# --- the other process: what a node serves, and the plain loop beside it -----------------------------


def serve(orders: Connection, slot_bytes: int) -> None:
    """Serve a slot both ways until `orders` is closed; tells the two addresses first."""
    slot = memoryview(contents(slot_bytes))
    table = b"".join(_native.crc32c(block).to_bytes(4, "little") for block in blocks_of(slot))

    @contextlib.contextmanager
    def extent(read: wire.Read, who: bytes) -> Iterator[Extent]:
        end = min(read.offset + read.length, len(slot))
        crcs = table[read.offset // BLOCK_BYTES * 4 : -(-end // BLOCK_BYTES) * 4]
        yield Extent(slot[read.offset : end], len(slot), BLOCK_BYTES, crcs)

    server = ReadServer("127.0.0.1", 0, extent, lambda reason, why: print(reason, why, file=sys.stderr), nice=0)
    with socket.create_server(("127.0.0.1", 0)) as plain:
        threading.Thread(target=serve_plain, args=(plain, slot), daemon=True).start()
        orders.send((server.address, plain.getsockname()))
        with contextlib.suppress(EOFError):
            orders.recv()
    server.close()


def serve_plainly(orders: Connection, slot_bytes: int) -> None:
    """The plain loop alone, until `orders` is closed; tells its address first."""
    with socket.create_server(("127.0.0.1", 0)) as plain:
        threading.Thread(target=serve_plain, args=(plain, memoryview(contents(slot_bytes))), daemon=True).start()
        orders.send(plain.getsockname())
        with contextlib.suppress(EOFError):
            orders.recv()


def serve_plain(listener: socket.socket, slot: memoryview) -> None:
    """Everything, for each byte that arrives."""
    connection, _ = listener.accept()
    with connection:
        while connection.recv(1):
            connection.sendall(slot)


def contents(slot_bytes: int) -> bytes:
    """Bytes in which a block in a wrong place shows, the same in both processes."""
    return b"".join(index.to_bytes(8, "little") for index in range(slot_bytes // 8))


def blocks_of(view: memoryview) -> Iterator[memoryview]:
    return (view[at : at + BLOCK_BYTES] for at in range(0, len(view), BLOCK_BYTES))


@contextlib.contextmanager
def another_process(serve: Callable[[Connection, int], None], slot_bytes: int) -> Iterator[Any]:
    """A process that serves a slot; gives the address, or addresses, that it tells."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, slot_bytes), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(PATIENCE_S):
            raise SystemExit("the process that serves did not get ready")
        yield here.recv()
    finally:
        here.close()
        process.join(PATIENCE_S)
        process.kill()
        process.join()


# --- READ of a slot ----------------------------------------------------------------------------------


class ReadBench:
    """A buffer that is there already, and the ways of filling it from the other process."""

    def __init__(self, address: str, plain: tuple[str, int], slot_bytes: int) -> None:
        self.address = address
        self.buffer = bytearray(slot_bytes)
        self.view = memoryview(self.buffer)
        self.pool = Pool()
        self.pace = Pace(0, SystemClock(), time.sleep)
        self.plain_socket = socket.create_connection(plain)

    def stream(self) -> None:
        stream = self.pool.take(self.address)
        reads = [
            wire.Read(JOB, ARENA, SLOT, SNAPSHOT, at, min(READ_BYTES, len(self.view) - at))
            for at in range(0, len(self.view), READ_BYTES)
        ]
        for ahead in reads[:READS_AHEAD]:
            stream.ask(ahead)
        for index, read in enumerate(reads):
            length = stream.answer().length
            if index + READS_AHEAD < len(reads):
                stream.ask(reads[index + READS_AHEAD])
            stream.receive_into(self.view[read.offset : read.offset + length])
        self.pool.give(stream)

    def reader(self) -> None:
        end = len(self.view)
        reader = Reader(self.pool, self.address, JOB, ARENA, SLOT, SNAPSHOT, 0, end, WINDOW_BYTES, self.pace)
        for at in range(0, end, WINDOW_BYTES):
            reader.next_into(self.view[at : at + WINDOW_BYTES])
        reader.close()

    def plain(self) -> None:
        self.plain_socket.sendall(b"!")
        at = 0
        while at < len(self.view):
            count = self.plain_socket.recv_into(self.view[at:])
            if not count:
                raise SystemExit("the plain server ended")
            at += count

    def round(self) -> dict[str, float]:
        """Every way once, each of ours beside a plain one; seconds by name."""
        return {
            "stream": timed(self.stream),
            "stream plain": timed(self.plain),
            "reader": timed(self.reader),
            "reader plain": timed(self.plain),
        }

    def check(self) -> None:
        """SystemExit unless every way brings the right bytes."""
        expected = contents(len(self.buffer))
        for way in (self.stream, self.reader, self.plain):
            self.view[:] = bytes(len(self.view))
            way()
            if self.buffer != expected:
                raise SystemExit(f"what {way.__name__} brought differs from what was sent: the numbers mean nothing")

    def close(self) -> None:
        self.pool.close()
        self.plain_socket.close()


def measure_reads(slot_bytes: int, rounds: int) -> list[Result]:
    """READ of a slot into memory that is there already, against the plain loop."""
    with another_process(serve, slot_bytes) as (address, plain):
        bench = ReadBench(address, plain, slot_bytes)
        try:
            bench.check()
            bench.round()  # warms caches, page tables and the windows of TCP
            times = [bench.round() for _ in range(rounds)]
        finally:
            bench.close()
    return [result_of(what, slot_bytes, times, READ_RATIO_MIN) for what in ("stream", "reader")]


def result_of(what: str, total_bytes: int, rounds: list[dict[str, float]], target: float) -> Result:
    """What so many bytes in those times come to; a round has the seconds of `what` and of its plain twin."""
    ours, plain = (statistics.median(one[f"{what}{side}"] for one in rounds) for side in ("", " plain"))
    low, ratio, high = statistics.quantiles((one[f"{what} plain"] / one[what] for one in rounds), n=4)
    return Result(
        what=what,
        gb_per_s=round(total_bytes / ours / 1e9, 2),
        plain_gb_per_s=round(total_bytes / plain / 1e9, 2),
        ratio=round(ratio, 3),
        ratio_spread=(round(low, 3), round(high, 3)),
        target=target,
    )


# --- a lost node ---------------------------------------------------------------------------------------


class Streams:
    """k plain streams from k processes into this one, all at once; each arrives in a window that is used again."""

    def __init__(self, addresses: Sequence[tuple[str, int]], slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._sockets = [socket.create_connection(address) for address in addresses]
        self._windows = [memoryview(bytearray(WINDOW_BYTES)) for _ in addresses]
        self._threads = ThreadPoolExecutor(len(addresses))

    def run(self) -> None:
        list(self._threads.map(self._take, self._sockets, self._windows))

    def _take(self, stream: socket.socket, window: memoryview) -> None:
        stream.sendall(b"!")
        left = self._slot_bytes
        while left:
            count = stream.recv_into(window[: min(left, len(window))])
            if not count:
                raise SystemExit("a plain server ended")
            left -= count

    def close(self) -> None:
        for stream in self._sockets:
            stream.close()
        self._threads.shutdown()


@functools.lru_cache(maxsize=1)  # the lost one is compared in every round
def shard_of(rank: int, slot_bytes: int) -> bytes:
    """A rank's bytes, the same whenever they are asked for."""
    chance = random.Random(rank)
    return b"".join(chance.randbytes(BLOCK_BYTES) for _ in range(slot_bytes // BLOCK_BYTES))


def protect_nodes(here: Nodes, slot_bytes: int, parity: int) -> None:
    """A rank on each node, one committed snapshot, and the end of all ranks: what is held stays."""
    holders: list[Holder] = []
    try:
        holders += [Holder(node.socket, JOB, rank) for rank, node in enumerate(here)]
        shards = (shard_of(rank, slot_bytes) for rank in range(len(here)))
        protect_together(holders, SNAPSHOT, shards, slot_bytes, parity)
    finally:
        for holder in holders:
            holder.close()


def rebuild_lost(here: Nodes, number: int, slot_bytes: int, parity: int) -> float:
    """The last nodes are lost, as many as parity allows; the seconds in which the first of them has its shard again.

    `number` is that of the generation in which the newcomers attach, higher from time to time. SystemExit where the
    shard cannot be decoded or has other bytes than before.
    """
    lost = range(len(here) - parity, len(here))
    for one in lost:
        here.lose(one)
    holders: list[Holder] = []
    try:
        holders += [Holder(node.socket, JOB, rank) for rank, node in enumerate(here)]
        newcomer = holders[lost[0]]
        ask = what_to_rebuild([holder.inventory for holder in holders], newcomer.rank)
        places = [holder.place for holder in holders]
        newcomer.attach(wire.GenerationId(number, bytes(16)), places, slot_bytes, parity, restored=SNAPSHOT)
        newcomer.door.ask(ask(newcomer.arena_id))
        report = progress(newcomer)
        while not report.over:
            time.sleep(LOOK_EVERY_S)
            report = progress(newcomer)
        if report.failure:
            raise SystemExit(f"the lost shard could not be rebuilt: {report.why}")
        with newcomer.arena.slot_view(report.slot) as view:
            if view[:slot_bytes] != shard_of(newcomer.rank, slot_bytes):
                raise SystemExit("the rebuilt shard differs from the lost one: the numbers mean nothing")
        return report.seconds
    finally:
        for holder in holders:
            holder.close()


def progress(newcomer: Holder) -> wire.RebuildReport:
    reply, _ = newcomer.door.ask(wire.AskRebuild(newcomer.arena_id))
    assert isinstance(reply, wire.RebuildReport)
    return reply


def what_to_rebuild(inventories: Sequence[wire.Inventory], rank: int) -> Callable[[bytes], wire.Rebuild]:
    """The order for this rank's shard, into the arena that it is given: what the ranks of a restarted job compute."""
    choice = recovery.choose(inventories)
    if choice.snapshot != SNAPSHOT or rank not in choice.missing:
        raise SystemExit(f"there is nothing to rebuild for rank {rank}: {choice.why}")
    how, streams = choice.missing[rank], {one.node: one.streams for one in inventories}

    def holding(node: bytes, arena: bytes, slot: int) -> wire.Holding:
        return wire.Holding(streams[node], node.hex()[:6], arena, slot)

    shards = {r: holding(one.node, one.shard.arena, one.shard.slot) for r, one in how.shards.items()}
    parities = {p: holding(one.node, one.report.arena, one.report.slot) for p, one in how.parities.items()}
    return lambda arena: wire.Rebuild(arena, SNAPSHOT, rank, how.layout, shards, parities)


def measure_rebuild(k: int, m: int, slot_bytes: int, rounds: int) -> Result:
    """Rebuilds and plain streams in turns, on k + m nodes."""
    what = f"k={k} m={m}"
    print(f"  rebuild, {what}", file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(another_process(serve_plainly, slot_bytes)) for _ in range(k)]
        streams = Streams(addresses, slot_bytes)
        stack.callback(streams.close)
        here = stack.enter_context(nodes("rebuild", k + m))
        protect_nodes(here, slot_bytes, m)
        streams.run()  # opens the windows of TCP
        times = [
            {what: rebuild_lost(here, 2 + number, slot_bytes, m), f"{what} plain": timed(streams.run)}
            for number in range(rounds)
        ]
    return result_of(what, k * slot_bytes, times, REBUILD_RATIO_MIN)


# --- all of it -----------------------------------------------------------------------------------------


def print_results(results: list[Result]) -> None:
    print("          ours GB/s   plain GB/s   ratio   (middle half)   target")
    for r in results:
        low, high = r.ratio_spread
        print(
            f"{r.what:8}  {r.gb_per_s:9.2f}   {r.plain_gb_per_s:10.2f}   {r.ratio:5.2f}   ({low:.2f} .. {high:.2f})"
            f"    >= {r.target}{'' if r.reached else '   MISSED'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller slot, fewer rounds and groups")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 where a ratio misses its target")
    arguments = parser.parse_args()
    slot_bytes = QUICK_BYTES if arguments.quick else SLOT_BYTES
    rounds, rebuilds = (QUICK_ROUNDS, QUICK_REBUILDS) if arguments.quick else (ROUNDS, REBUILDS)
    groups = QUICK_GROUPS if arguments.quick else GROUPS
    reads = measure_reads(slot_bytes, rounds)
    lost = [measure_rebuild(k, m, slot_bytes, rebuilds) for k, m in groups]
    if arguments.json:
        document: dict[str, Any] = {"machine": machine()}
        for name, results, count in (("read", reads, rounds), ("rebuild", lost, rebuilds)):
            rows = [asdict(r) | {"reached": r.reached} for r in results]
            document[name] = {"bytes": slot_bytes, "rounds": count, "results": rows}
        print(json.dumps(document))
    else:
        print(f"{machine()}\n\nREAD of a slot of {slot_bytes >> 20} MiB, medians of {rounds} rounds taken in turns\n")
        print_results(reads)
        print(f"\nrebuild of a lost shard of {slot_bytes >> 20} MiB from k pieces, medians of {rebuilds} rounds\n")
        print_results(lost)
    return 1 if arguments.check and not all(r.reached for r in [*reads, *lost]) else 0


if __name__ == "__main__":
    sys.exit(main())
