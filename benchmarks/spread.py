"""A lost shard over slow links: rebuilt with its decode spread over the survivors, against one READ of as many bytes.

Seven nodes, k = 6 and m = 1, each with a daemon, an address and a link of its own that is shaped both ways (tc's tbf),
so that the network is the limit and not the cores, which all of them share. Peers authenticate and encrypt. The last
node is lost with its memory, an empty one takes its place, and has the lost shard again:

    spread  every survivor adds up parts and forwards them (`--rebuild-spread yes`)
    direct  the newcomer pulls all six pieces itself (`no`): six times its shard goes through its link
    read    instead of it, one READ stream from another node brings a shard of the same size, through `Reader`: what the
            newcomer's link allows

`spread` and `read` take turns, a ratio is taken of neighbours, its median and the middle half of the rounds are shown;
what was rebuilt is compared with what was lost, the daemon says how long it took. `--check` exits 1 where the ratio
misses its target. Needs root, util-linux and iproute2 (tests/chaos/fabric.py); everything lies in namespaces that end
with it.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys

# A sibling has the name of a module of the standard library, which must be found first.
sys.path[:] = [os.path.dirname(entry) if os.path.exists(f"{entry}/spread.py") else entry for entry in sys.path]

import argparse
import base64
import contextlib
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.copy import machine, timed
from benchmarks.holder import Holder, protect_together
from benchmarks.nodes import Node
from benchmarks.rebuild import JOB, SNAPSHOT, progress, shard_of, what_to_rebuild
from snapshotd import _native, wire
from snapshotd.clock import SystemClock
from snapshotd.keys import pin
from snapshotd.reader import Pace, Reader
from snapshotd.streams import Pool, Stream
from tests.chaos import fabric

K, M = 6, 1
SHARD_BYTES, QUICK_BYTES = 256 << 20, 64 << 20
RATE_MB_PER_S = 50
ROUNDS, QUICK_ROUNDS = 5, 3
RATIO_MIN = 0.8
LISTEN_PORT, STREAM_PORT = 7780, 7781
WINDOW_BYTES = 4 << 20
QUEUE = ("burst", "256kb", "latency", "25ms")  # a switch has little more
LOOK_EVERY_S = 0.05  # what it took, the daemon says itself
PATIENCE_S = 170.0


@dataclass(frozen=True)
class Result:
    """One way of having the shard again; seconds and MB/s are medians, the ratio is that of `read` to it."""

    what: str
    rounds: int
    seconds: float
    mb_per_s: float
    ratio: float
    ratio_spread: tuple[float, float]
    target: float | None

    @property
    def reached(self) -> bool:
        return self.target is None or self.ratio >= self.target


class Network:
    """Nodes on machines of their own behind one switch. Lies in namespaces, which clear it away."""

    def __init__(self, folder: Path, shard_bytes: int, rate: str) -> None:
        self._folder, self._memory_bytes, self._rate = folder, 4 * shard_bytes, rate
        self._fabric, self._lives, self._shaped = fabric.Fabric(), 0, False
        self.machines: list[fabric.Machine] = []
        self.nodes: list[Node] = []
        for number in range(K + M):
            self._plug(number, "auto")

    def _plug(self, number: int, spread: str) -> None:
        self._lives += 1
        one = fabric.Machine(self._lives, self._memory_bytes)
        self.machines[number : number + 1] = [one]
        self._fabric.plug(one)
        if self._shaped:
            self._shape(one)
        flags = ("--listen", f"tcp://{one.address}:{LISTEN_PORT}", "--stream-port", str(STREAM_PORT))
        folder = self._folder / f"life-{self._lives}"
        node = Node(
            folder, f"node{number}", *flags, "--rebuild-spread", spread, within=one.within, memory=fabric.MACHINE_MEMORY
        )
        self.nodes[number : number + 1] = [node]
        node.wait()

    def shape(self) -> None:
        """From now on links are slow, both ways."""
        self._shaped = True
        for one in self.machines:
            self._shape(one)

    def _shape(self, one: fabric.Machine) -> None:
        limit = ("root", "tbf", "rate", self._rate, *QUEUE)
        one.do("tc", "qdisc", "replace", "dev", "eth0", *limit)
        fabric.run("tc", "qdisc", "replace", "dev", one.link, *limit)

    def lose(self, number: int, spread: str) -> None:
        """A node is gone with its memory, and an empty one is there, whose setting is this."""
        self.nodes[number].lose()
        self.machines[number].end()
        self._fabric.unplug(self.machines[number])
        self._plug(number, spread)

    def close(self) -> None:
        for node in self.nodes:
            node.stop()
        for one in self.machines:
            one.end()


@contextlib.contextmanager
def network(shard_bytes: int, rate: str) -> Iterator[Network]:
    """Nodes with one committed snapshot, and slow links between them."""
    fabric.run("mount", "-t", "tmpfs", "-o", "mode=700", "spread", str(fabric.WORKSPACE))
    made = Network(fabric.WORKSPACE, shard_bytes, rate)
    try:
        with holders(made) as ranks:
            shards = (shard_of(rank, shard_bytes) for rank in range(len(ranks)))
            protect_together(ranks, SNAPSHOT, shards, shard_bytes, M)
        made.shape()
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def holders(made: Network) -> Iterator[list[Holder]]:
    """A rank on each node, introduced to each other."""
    ranks: list[Holder] = []
    try:
        for rank, node in enumerate(made.nodes):
            ranks.append(Holder(node.socket, JOB, rank))
        for one in ranks:
            one.door.ask(wire.Introduce(JOB, [other.place for other in ranks]))
        yield ranks
    finally:
        for one in ranks:
            one.close()


# --- the ways ----------------------------------------------------------------------------------------


def measure(made: Network, number: int, shard_bytes: int, spread: str) -> dict[str, float]:
    """The last node is lost and its shard is rebuilt, then one like it is read; the seconds of both.

    `number` is that of the generation in which the newcomer attaches, higher from time to time.
    """
    made.lose(K + M - 1, spread)
    with holders(made) as ranks:
        newcomer = ranks[-1]
        rebuilt_s = rebuild(ranks, number, shard_bytes)
        there = ranks[0].inventory
        read_s = read(made.machines[-1], newcomer, there, shard_bytes)
        print(f"  {spread}: {rebuilt_s:.2f} s, read: {read_s:.2f} s", file=sys.stderr, flush=True)
        return {"rebuilt": rebuilt_s, "read": read_s}


def rebuild(ranks: list[Holder], number: int, shard_bytes: int) -> float:
    """The seconds until the last rank has its shard again. SystemExit where it cannot be had, or differs."""
    newcomer = ranks[-1]
    ask = what_to_rebuild([one.inventory for one in ranks], newcomer.rank)
    places = [one.place for one in ranks]
    newcomer.attach(wire.GenerationId(number, bytes(16)), places, shard_bytes, M, restored=SNAPSHOT)
    newcomer.door.ask(ask(newcomer.arena_id))
    deadline_s = time.monotonic() + PATIENCE_S
    while not (report := progress(newcomer)).over:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"the rebuild is at {report.done_bytes} of {report.total_bytes} bytes, and time is up")
        time.sleep(LOOK_EVERY_S)
    if report.failure:
        raise SystemExit(f"the lost shard could not be rebuilt: {report.why}")
    with newcomer.arena.slot_view(report.slot) as view:
        if view[:shard_bytes] != shard_of(newcomer.rank, shard_bytes):
            raise SystemExit("the rebuilt shard differs from the lost one: the numbers mean nothing")
    return report.seconds


def read(where: fabric.Machine, newcomer: Holder, there: wire.Inventory, shard_bytes: int) -> float:
    """The seconds in which a process on a machine reads another node's shard, with the keys of its own daemon."""
    lent, _ = newcomer.door.ask(wire.AskKey())
    assert isinstance(lent, wire.LentKey) and there.badge is not None
    shard = next(one for one in there.shards if one.snapshot == SNAPSHOT)
    order = {
        "streams": there.streams, "arena": shard.arena.hex(), "slot": shard.slot, "bytes": shard_bytes,
        "pem": lent.pem.decode(), "certificate": base64.b64encode(there.badge.certificate).decode(),
    }  # fmt: skip
    command = [*where.within, sys.executable, "-m", "benchmarks.spread", "--pull"]
    done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        raise SystemExit(f"the READ failed:\n{done.stderr}")
    return float(done.stdout)


def pull(order: dict[str, Any]) -> float:
    """What that process does: connect, read, check every block; returns the seconds."""
    expected = pin(order["pem"].encode(), base64.b64decode(order["certificate"]))
    pool = Pool(lambda address: Stream.connect(address, secure=lambda _: expected))
    view = memoryview(bytearray(order["bytes"]))
    _native.prefault(view)

    def pulled() -> None:
        reader = Reader(
            pool, order["streams"], JOB, bytes.fromhex(order["arena"]), order["slot"], SNAPSHOT, 0, len(view),
            WINDOW_BYTES, Pace(0, SystemClock(), time.sleep),
        )  # fmt: skip
        for at in range(0, len(view), WINDOW_BYTES):
            window = view[at : at + WINDOW_BYTES]
            if _native.ec_check(window, *reader.next_into(window)) >= 0:
                raise SystemExit("a block failed its checksum: the numbers mean nothing")
        reader.close()

    try:
        return timed(pulled)
    finally:
        pool.close()


# --- all of it ---------------------------------------------------------------------------------------


def result_of(what: str, shard_bytes: int, rounds: list[dict[str, float]], target: float | None) -> Result:
    seconds = statistics.median(one["rebuilt"] for one in rounds)
    ratios = [one["read"] / one["rebuilt"] for one in rounds]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Result(
        what, len(rounds), round(seconds, 2), round(shard_bytes / seconds / 1e6, 1), round(ratio, 3),
        (round(low, 3), round(high, 3)), target,
    )  # fmt: skip


def play(given: argparse.Namespace) -> int:
    """Inside the namespaces."""
    shard_bytes = (given.shard_mib << 20) if given.shard_mib else QUICK_BYTES if given.quick else SHARD_BYTES
    rounds = QUICK_ROUNDS if given.quick else ROUNDS
    with network(shard_bytes, f"{given.rate * 8}mbit") as made:
        times = [measure(made, 2 + number, shard_bytes, "yes") for number in range(rounds)]
        direct = [measure(made, 2 + rounds, shard_bytes, "no")]
    results = [
        result_of("spread", shard_bytes, times, RATIO_MIN),
        result_of("direct", shard_bytes, direct, None),
    ]
    read_s = statistics.median(one["read"] for one in times)
    read_mb_per_s = round(shard_bytes / read_s / 1e6, 1)
    if given.json:
        facts = {"machine": machine(), "bytes": shard_bytes, "mb_per_s": given.rate, "read_mb_per_s": read_mb_per_s}
        print(json.dumps(facts | {"results": [asdict(one) | {"reached": one.reached} for one in results]}))
    else:
        print(
            f"{machine()}\n\na lost shard of {shard_bytes >> 20} MiB on k = {K}, m = {M}, links of {given.rate} MB/s; "
            f"one READ stream: {read_s:.2f} s, {read_mb_per_s} MB/s\n"
        )
        print("        rounds   seconds    MB/s   of READ   (middle half)   target")
        for one in results:
            low, high = one.ratio_spread
            print(
                f"{one.what:6}  {one.rounds:6}   {one.seconds:7.2f}  {one.mb_per_s:6.1f}   {one.ratio:7.2f}"
                f"   ({low:.2f} .. {high:.2f})    {f'>= {one.target}' if one.target else ''}"
                f"{'' if one.reached else '   MISSED'}"
            )
    return 1 if given.check and not all(one.reached for one in results) else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller shard and fewer rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 where the ratio misses its target")
    parser.add_argument("--rate", type=int, default=RATE_MB_PER_S, help=f"of the links, in MB/s ({RATE_MB_PER_S})")
    parser.add_argument("--shard-mib", type=int, default=0, help="size of a shard (256; 64 with --quick)")
    parser.add_argument("--pull", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.pull:
        print(pull(json.load(sys.stdin)))
        return 0
    if fabric.inside():
        return play(given)
    if why := fabric.why_not():
        raise SystemExit(f"there can be no links of their own here: {why}")
    return fabric.enter("benchmarks.spread", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
