"""A short run through the whole module in the simulator, for mutants: `python -m tests.cuda.quick MODULE.so`.

Knows the few kernels that a module built with SNAPSHOTD_FEW has. Prints the first thing that is wrong, status 1, or 0
where nothing was. A crash is a catch too: the caller sees the status.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from snapshotd import _native
from tests.cuda import twin
from tests.cuda.conftest import Running
from tests.cuda.support import EAGER, LAZY, Simulator, card, random_symbols, same
from tests.cuda.test_copies import encode_on_host, take_snapshot
from tests.cuda.test_kernels import decode, encode


def _codec(sim: Running) -> Iterator[str]:
    for m, k, length, skew in (
        *((m, k, 1024, 0) for m in range(1, 5) for k in (1, 3, 6)),
        (3, 20, 512, 0), (4, 18, 1024, 0), (2, 17, 512, 0), (2, 3, 700, 0), (2, 3, 600, 1), (1, 3, 17, 0),
    ):  # fmt: skip
        data = random_symbols(k, length, k)
        if not same(encode(sim, data, m, skew), twin.encode(data, m)):
            yield f"encode k={k}, m={m}, {length} bytes differs from the twin"
    data = random_symbols(1, 300 * 1024, 1)
    if not same(encode(sim, data, 1), twin.encode(data, 1)):
        yield "a large encode differs from the twin"
    for lost, rows in (((1,), (0,)), ((2,), (1,)), ((0, 3), (1, 2)), ((0, 1, 4), (0, 1, 2))):
        decode(sim, random_symbols(5, 1024 + 9, 1), 3, lost, rows)


def _combine(sim: Running) -> Iterator[str]:
    for layout, rows, length, skew, add in (
        ("planes", 4, 1100, 0, True),
        ("planes", 6, 600, 0, False),
        ("bytes", 3, 345, 0, True),
        ("bytes", 2, 99, 2, False),
    ):
        rng = np.random.default_rng(rows)
        data, before = random_symbols(3, length, rows), random_symbols(rows, length, 50)
        factors = [rng.integers(1, 256, 3, np.uint8) for _ in range(rows)]
        with card(sim.cuda.Device()) as on:
            at = [on.put(one, skew) for one in data]
            out = [on.put(one, skew) if add else on.room(length, skew) for one in before]
            on.device.combine(at, out, [row.tobytes() for row in factors], layout=layout, add=add, bytes=length)
            found = [on.get(one, length) for one in out]
        expected = [twin.combined(row.tolist(), data, layout) for row in factors]
        if add:
            expected = [row ^ was for row, was in zip(expected, before, strict=True)]
        if not same(found, expected):
            yield f"combine of {rows} rows, layout {layout}, differs from the twin"


def _checksums(sim: Running) -> Iterator[str]:
    for length, block, skew in ((20_000, 4096, 0), (9000, 4096, 3), (40 * 64, 64, 0), (15, 4096, 0)):
        data = random_symbols(1, length, length)[0]
        blocks = -(-length // block)
        with card(sim.cuda.Device()) as on:
            out = on.room(4 * blocks)
            on.device.crc32c(on.put(data, skew), out, block_bytes=block, bytes=length)
            found = on.get(out, 4 * blocks).view("<u4").tolist()
        if found != [_native.crc32c(data[at : at + block].tobytes()) for at in range(0, length, block)]:
            yield f"the checksums of {length} bytes in blocks of {block} are wrong"


def problems(simulator: Simulator) -> Iterator[str]:
    """Everything that is wrong, one sentence each."""
    for schedule in (LAZY, 3, EAGER, 8):
        sim = Running(simulator)
        simulator.reset(schedule)
        try:
            if schedule in (LAZY, 3):  # streams are the host's affair: kernels see two orders of their threads
                yield from _codec(sim)
                yield from _combine(sim)
                yield from _checksums(sim)
            take_snapshot(sim, steps=2)
            encode_on_host(sim, 3, 2, 20_000 + 13, 3)
            large_segments(sim)
            second_device(sim)
        except (AssertionError, RuntimeError, ValueError) as error:
            yield from simulator.findings()
            yield f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'a check failed'}"
        yield from simulator.findings(leaks=True)


def large_segments(sim: Running) -> None:
    """More than 256 MiB are never registered in one call: the memory is only reserved, nobody touches it."""
    pages = mmap.mmap(-1, 300 << 20)
    view = np.frombuffer(pages, np.uint8)
    device = sim.cuda.Device()
    sim.cuda.Pinned(device, view.ctypes.data, len(view))


def second_device(sim: Running) -> None:
    """A device that the caller has not chosen is chosen for each call, and only for it."""
    data = random_symbols(3, 512, 1)
    with card(sim.cuda.Device(ordinal=1)) as on:
        out = on.room(512)
        on.device.encode([on.put(one) for one in data], [out], 512)
        assert np.array_equal(on.get(out, 512), data[0] ^ data[1] ^ data[2])
        assert sim.simulator.current_device() == 0


def main() -> None:
    found = next(problems(Simulator(Path(sys.argv[1]))), "")
    print(found, flush=True)
    os._exit(1 if found else 0)  # a module with a bug is not asked to tidy up


if __name__ == "__main__":
    main()
