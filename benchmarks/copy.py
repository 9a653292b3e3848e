"""How fast a snapshot is copied into the arena, and back, against a plain memcpy of the same bytes.

    copy     Engine.begin .. wait: 1,000 tensors into a slot, CRC32C of every block included
    restore  Arena.verify of every block, then scatter into the tensors: no tensor is touched before all are verified
    memcpy   `_native.copy` of each tensor between the same places, with as many threads
    (flat)   for comparison, `_native.copy` between two contiguous buffers: no tensors, no slot to fill exactly

Everything is measured in one process in turns (copy, memcpy, flat, restore, memcpy, flat, copy, ...), so that whatever
else the machine does meets all of them. A rate is the median's; a ratio is taken within each round, its median and the
middle half of the rounds are shown.
`--check` exits 1 where a ratio against memcpy misses its target. Restore reads every byte twice and writes it once, so
2/3 of the flat memcpy is its bound where the memory is the limit and not the core.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys

# This file has the name of a module of the standard library, which must not find it first.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != os.path.dirname(os.path.abspath(__file__))]

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from snapshotd import _native

Tensor = np.ndarray[Any, np.dtype[np.float32]]
Item = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]

TENSORS = 1000
COPY_RATIO_MIN = 0.8
RESTORE_RATIO_MIN = 0.7


@dataclass(frozen=True)
class Result:
    """One direction with one count of threads; rates in GB/s, ratios of ours to memcpy's."""

    what: str
    threads: int
    gb_per_s: float
    memcpy_gb_per_s: float
    flat_gb_per_s: float
    ratio: float
    ratio_spread: tuple[float, float]
    flat_ratio: float
    target: float

    @property
    def reached(self) -> bool:
        return self.ratio >= self.target


def allocate(sizes: list[int]) -> list[Tensor]:
    """Tensors of these byte sizes, each an allocation of its own, at 64 bytes as torch aligns them."""
    tensors = []
    for size in sizes:
        raw = np.zeros(size + 64, dtype=np.uint8)
        at = -raw.ctypes.data % 64
        tensors.append(raw[at : at + size].view(np.float32))
    return tensors


def state_of(total_bytes: int) -> list[Tensor]:
    """1,000 tensors of uneven sizes with random content."""
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.25, 1.75, TENSORS)
    sizes = [int(size) // 4096 * 4096 for size in weights / weights.sum() * total_bytes]
    sizes[-1] += total_bytes - sum(sizes)
    tensors = allocate(sizes)
    for tensor in tensors:
        tensor[:] = rng.random(tensor.shape, dtype=np.float32)
    return tensors


def items_of(tensors: list[Tensor]) -> list[Item]:
    items, offset = [], 0
    for tensor in tensors:
        items.append((tensor.ctypes.data, offset, tensor.itemsize, tensor.shape, tensor.strides))
        offset += tensor.nbytes
    return items


@contextmanager
def arena_of(file_bytes: int) -> Iterator[_native.Arena]:
    block = _native.BLOCK_BYTES
    slot_bytes = (file_bytes + block - 1) // block * block
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        fd = file.fileno()
        sizes = {"slots": 2, "slot_bytes": slot_bytes, "block_bytes": block}
        _native.reserve(fd, _native.Arena.bytes_needed(**sizes))
        _native.Arena.format(fd, arena_id=os.urandom(16), job="benchmark", local_index=0, **sizes)
        arena = _native.Arena(fd, writable=True, populate=True, exclude_from_fork=True)
        try:
            yield arena
        finally:
            arena.close()


class Bench:
    """The state, its slot (0), a spare slot (1), and the ways of moving bytes between them."""

    def __init__(self, arena: _native.Arena, total_bytes: int, threads: int) -> None:
        self.arena, self.bytes, self.threads = arena, total_bytes, threads
        self.tensors = state_of(total_bytes)
        self.restored = allocate([tensor.nbytes for tensor in self.tensors])
        self.plan = _native.Plan(file_bytes=total_bytes, now=[], later=items_of(self.tensors))
        self.targets = items_of(self.restored)
        self.flat = np.ones(total_bytes, dtype=np.uint8)
        self.slot, self.spare = arena.slot_view(0)[:total_bytes], arena.slot_view(1)[:total_bytes]
        self.spare_parts = [
            self.spare[item[1] : item[1] + t.nbytes] for t, item in zip(self.tensors, self.targets, strict=True)
        ]
        self.engine = _native.Engine(arena, threads)
        self.engine.calibrate()

    def claim(self) -> None:
        index = self.arena.claim(generation=1, nonce=bytes(16), step=1, rank=0, world_size=1, fingerprint=bytes(32))
        assert index == 0, "the first slot is free between two rounds"

    def snapshot(self) -> None:
        self.engine.begin(self.plan, 0)
        assert self.engine.wait(600), "a copy takes less than ten minutes"

    def restore(self) -> None:
        damaged = self.arena.verify(0, self.threads)
        assert not damaged, f"blocks {damaged} differ from their checksums"
        _native.scatter(self.slot, self.targets, self.threads)

    def round(self) -> dict[str, float]:
        """Every way once; seconds by name."""
        self.claim()
        times = {
            "copy": timed(self.snapshot),
            "copy memcpy": timed(lambda: _native.copy(self.spare_parts, self.tensors, self.threads)),
            "copy flat": timed(lambda: _native.copy(self.spare, self.flat, self.threads)),
        }
        self.arena.publish(0, self.bytes)
        times |= {
            "restore": timed(self.restore),
            "restore memcpy": timed(lambda: _native.copy(self.restored, self.spare_parts, self.threads)),
            "restore flat": timed(lambda: _native.copy(self.flat, self.spare, self.threads)),
        }
        self.arena.empty(0)
        return times

    def check_restored(self) -> None:
        self.claim()
        self.snapshot()
        self.arena.publish(0, self.bytes)
        self.restore()
        self.arena.empty(0)
        if any(not np.array_equal(a, b) for a, b in zip(self.tensors, self.restored, strict=True)):
            raise SystemExit("what was restored differs from what was copied: the numbers mean nothing")

    def close(self) -> None:
        self.engine.close()
        for part in self.spare_parts:
            part.release()
        self.slot.release()
        self.spare.release()


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def result_of(what: str, bench: Bench, rounds: list[dict[str, float]], target: float) -> Result:
    ours, memcpy, flat = (statistics.median(r[f"{what}{side}"] for r in rounds) for side in ("", " memcpy", " flat"))
    low, ratio, high = statistics.quantiles((r[f"{what} memcpy"] / r[what] for r in rounds), n=4)
    return Result(
        what=what,
        threads=bench.threads,
        gb_per_s=round(bench.bytes / ours / 1e9, 2),
        memcpy_gb_per_s=round(bench.bytes / memcpy / 1e9, 2),
        flat_gb_per_s=round(bench.bytes / flat / 1e9, 2),
        ratio=round(ratio, 3),
        ratio_spread=(round(low, 3), round(high, 3)),
        flat_ratio=round(statistics.median(r[f"{what} flat"] / r[what] for r in rounds), 3),
        target=target,
    )


def measure(arena: _native.Arena, total_bytes: int, threads: int, rounds: int) -> list[Result]:
    bench = Bench(arena, total_bytes, threads)
    try:
        bench.round()  # warms caches, page tables and clocks
        times = [bench.round() for _ in range(rounds)]
        bench.check_restored()
        return [
            result_of("copy", bench, times, COPY_RATIO_MIN),
            result_of("restore", bench, times, RESTORE_RATIO_MIN),
        ]
    finally:
        bench.close()


def machine() -> str:
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, CRC32C by {_native.crc32c_tiers()[0]}"


def print_table(results: list[Result], total_bytes: int, rounds: int) -> None:
    print(machine())
    print(f"{total_bytes / 2**30:.2f} GiB in {TENSORS} tensors, medians of {rounds} rounds taken in turns\n")
    print("          threads   ours GB/s   memcpy GB/s   ratio   (middle half)   target   of a flat memcpy")
    for r in results:
        low, high = r.ratio_spread
        print(
            f"{r.what:8}  {r.threads:7}   {r.gb_per_s:9.2f}   {r.memcpy_gb_per_s:11.2f}   {r.ratio:5.2f}"
            f"   ({low:.2f} .. {high:.2f})    >= {r.target}   {r.flat_ratio:.2f} of {r.flat_gb_per_s:.2f} GB/s"
            f"{'' if r.reached else '   MISSED'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1 << 30, help="size of the state (1 GiB)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that the medians are taken of (9)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 where a ratio misses its target")
    arguments = parser.parse_args()
    if arguments.bytes < TENSORS * 16384 or arguments.rounds < 2:
        parser.error(f"--bytes must be at least {TENSORS * 16384} and --rounds at least 2")
    total_bytes = arguments.bytes // 4096 * 4096
    with arena_of(total_bytes) as arena:
        results = [r for threads in (1, 2) for r in measure(arena, total_bytes, threads, arguments.rounds)]
    if arguments.json:
        rows = [asdict(r) | {"reached": r.reached} for r in results]
        print(json.dumps({"machine": machine(), "bytes": total_bytes, "rounds": arguments.rounds, "results": rows}))
    else:
        print_table(results, total_bytes, arguments.rounds)
    return 1 if arguments.check and not all(r.reached for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
