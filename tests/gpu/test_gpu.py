"""On a real GPU: correctness, order and speed of the installed snapshotd._cuda. `pytest -m gpu`

Without a device nothing of it runs, and the summary says so. It needs no torch and no cupy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from snapshotd import _native
from tests.cuda import twin
from tests.cuda.support import card, host_memory, random_symbols, same

_cuda: Any = pytest.importorskip("snapshotd._cuda", reason="NOT RUN: snapshotd._cuda was not built here (no nvcc)")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_cuda.device_count() == 0, reason=f"NOT RUN on a device: {_cuda.why_no_device()}"),
]
MIB = 1 << 20


@pytest.mark.parametrize("m", range(1, 5))
def test_every_specialised_encode_gives_the_twins_parity(m: int) -> None:
    with card(_cuda.Device()) as on:
        for k in range(1, 17):
            data = random_symbols(k, 512 * 100 + 77, k)
            out = [on.room(len(data[0])) for _ in range(m)]
            on.device.encode([on.put(one) for one in data], out, len(data[0]))
            assert same([on.get(one, len(data[0])) for one in out], twin.encode(data, m)), f"k={k}"


@pytest.mark.parametrize(("k", "lost", "rows"), [(8, (1, 5), (0, 1)), (8, (0, 3, 7), (0, 1, 2)), (10, (2, 4), (1, 3))])
def test_lost_symbols_come_back(k: int, lost: tuple[int, ...], rows: tuple[int, ...]) -> None:
    data = random_symbols(k, 512 * 33 + 5, k)
    parity = twin.encode(data, 4)
    with card(_cuda.Device()) as on:
        have = [None if i in lost else on.put(one) for i, one in enumerate(data)]
        there = [on.put(parity[row]) if row in rows else None for row in range(4)]
        out = {symbol: on.room(len(data[0])) for symbol in lost}
        on.device.decode(have, there, out, len(data[0]))
        assert same([on.get(out[i], len(data[0])) for i in lost], [data[i] for i in lost])


def test_checksums_are_those_of_the_native_module() -> None:
    data = random_symbols(1, 5 * MIB + 123, 1)[0]
    with card(_cuda.Device()) as on:
        out = on.room(24)
        on.device.crc32c(on.put(data), out, block_bytes=MIB, bytes=len(data))
        found = on.get(out, 24).view("<u4").tolist()
    assert found == [_native.crc32c(data[at : at + MIB].tobytes()) for at in range(0, len(data), MIB)]


def test_a_snapshot_holds_what_the_tensors_were_at_the_cut() -> None:
    """The compute stream overwrites the tensors as soon as `hold` lets it; 40 rounds over 64 MiB."""
    count, size = 64, MIB
    _pages, arena = host_memory(count * size + MIB)
    with card(_cuda.Device()) as on:
        device = on.device
        compute = device.make_stream()
        places = [on.room(size) for _ in range(count)]
        colours = [on.put(np.full(size, value, np.uint8)) for value in range(2)]
        pinned = _cuda.Pinned(device, arena.ctypes.data, len(arena))
        pieces = [(place, i * size, size) for i, place in enumerate(places)]
        copy = _cuda.SideCopy(
            device, pinned, file_bytes=count * size, block_bytes=MIB, bucket_bytes=8 * MIB, pieces=pieces
        )
        for step in range(40):
            for place in places:
                device.copy(place, colours[step % 2], size, compute)
            copy.begin(arena.ctypes.data, arena[count * size :].ctypes.data, compute)
            copy.hold(compute)
            for place in places:
                device.copy(place, colours[1 - step % 2], size, compute)
            copy.wait()
            assert np.all(arena[: count * size] == step % 2), f"step {step}"
        device.finish(compute)
        device.end_stream(compute)
        del copy, pinned


def seconds(device: Any, work: Callable[[], None], rounds: int = 10) -> float:
    work()
    device.finish()
    began = time.perf_counter()
    for _ in range(rounds):
        work()
    device.finish()
    return (time.perf_counter() - began) / rounds


@pytest.mark.parametrize(("k", "m"), [(4, 2), (8, 2), (8, 3), (10, 4)])
def test_encode_keeps_up_with_a_copy_on_the_device(k: int, m: int, capsys: pytest.CaptureFixture[str]) -> None:
    """At least half as many bytes a second, read and written, as the driver's own copy: see the gate's prediction."""
    size = 64 * MIB
    with card(_cuda.Device()) as on:
        device = on.device
        data, parity = [on.room(size) for _ in range(k)], [on.room(size) for _ in range(m)]
        copy_s = seconds(device, lambda: device.copy(parity[0], data[0], size))
        encode_s = seconds(device, lambda: device.encode(data, parity, size))
    copied, encoded = 2 * size / copy_s / 1e9, (k + m) * size / encode_s / 1e9
    with capsys.disabled():
        print(f"\n({k},{m}): {encoded:.0f} GB/s of memory moved by encode, {copied:.0f} by a copy on the device")
    assert encoded > 0.5 * copied
