"""The host's side: tensors to a slot beside the training, and encode of what lies in host memory, in every schedule.

The whole path of a snapshot runs as the client would run it: the compute stream writes tensors, the cut begins, the
optimizer writes them again behind `hold`, the slot is read after `wait`. Then every call of the runtime fails in turn.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from snapshotd import _native
from tests.cuda import twin
from tests.cuda.conftest import Running
from tests.cuda.support import ARCHS, EAGER, LAZY, Card, card, host_memory, random_symbols, same
from tests.cuda.twin import Bytes

SCHEDULES = (EAGER, LAZY, 11, 12, 13, 14)
PAGE = 4096
BLOCK = 4096


class Snapshot:
    """An arena in host memory with one slot and its checksums, and tensors on the device that go into it."""

    def __init__(self, sim: Running, on: Card, sizes: Sequence[int], file_bytes: int, head: int, skew: int = 0) -> None:
        self.on, self.file_bytes = on, file_bytes
        slot_bytes = -(-file_bytes // PAGE) * PAGE
        self.pages, self.arena = host_memory(slot_bytes + PAGE)
        self.slot, self.crcs = self.arena[:file_bytes], self.arena[slot_bytes:]
        self.image = random_symbols(1, file_bytes, 5)[0]  # what the slot has to be in the end
        self.slot[:] = self.image  # header, host state and gaps are written by the host
        pieces, at = [], head
        self.tensors: list[tuple[int, Bytes]] = []
        for i, size in enumerate(sizes):
            data = random_symbols(1, size, i + 10)[0]
            place = on.room(size, skew * (i % 5))
            self.tensors.append((place, data))
            self.slot[at : at + size] = 0
            self.image[at : at + size] = data
            pieces.append((place, at, size))
            at += size + (i % 3) * 7
        self.pinned = sim.cuda.Pinned(on.device, self.arena.ctypes.data, len(self.arena), 3 * PAGE)
        self.copy = sim.cuda.SideCopy(
            on.device, self.pinned, file_bytes=file_bytes, block_bytes=BLOCK, bucket_bytes=2 * BLOCK, pieces=pieces
        )

    def begin(self, compute: int) -> None:
        self.copy.begin(self.slot.ctypes.data, self.crcs.ctypes.data, compute)

    def write_tensors(self, compute: int, sources: Sequence[int]) -> None:
        for (place, data), source in zip(self.tensors, sources, strict=True):
            self.on.device.copy(place, source, len(data), compute)

    def check(self) -> None:
        assert np.array_equal(self.slot, self.image)
        found = self.crcs.view("<u4")[: -(-self.file_bytes // BLOCK)].tolist()
        image = self.image.tobytes()
        assert found == [_native.crc32c(image[at : at + BLOCK]) for at in range(0, len(image), BLOCK)]


def take_snapshot(sim: Running, *, steps: int = 1, poll: bool = False, skew: int = 1) -> None:
    """Two optimizer steps around each snapshot, on a compute stream of their own."""
    sizes = [1, 4096, 17, 5000, 16384 + 33, 8, 300]
    with card(sim.cuda.Device()) as on:
        compute = on.device.make_stream()
        try:
            first = Snapshot(sim, on, sizes, 33_000, 100, skew)
            fresh = [on.put(data) for _, data in first.tensors]
            next_ones = [on.put(np.bitwise_not(data)) for _, data in first.tensors]
            for _ in range(steps):
                first.write_tensors(compute, fresh)
                first.begin(compute)
                first.copy.hold(compute)
                first.write_tensors(compute, next_ones)
                if poll:
                    while not first.copy.done():
                        pass
                else:
                    first.copy.wait()
                first.check()
            on.device.finish(compute)
        finally:
            on.device.end_stream(compute)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_snapshot_holds_what_the_tensors_were_at_the_cut(sim: Running, schedule: int, arch: int) -> None:
    sim.on(schedule, arch)
    take_snapshot(sim)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_next_snapshot_uses_the_same_rooms_again(sim: Running, schedule: int) -> None:
    sim.on(schedule)
    take_snapshot(sim, steps=3, poll=True)


def test_a_slot_of_host_bytes_alone_gets_its_checksums(sim: Running) -> None:
    with card(sim.cuda.Device()) as on:
        snapshot = Snapshot(sim, on, [], 10_000, 0)
        snapshot.begin(0)
        snapshot.copy.wait()
        snapshot.check()


def test_thousands_of_tensors_are_gathered_by_one_kernel_for_each_bucket(sim: Running) -> None:
    with card(sim.cuda.Device()) as on:
        before = sim.simulator.totals().get("copy_pieces", 0)
        snapshot = Snapshot(sim, on, [3] * 2000, 24_000, 0)
        snapshot.write_tensors(0, [on.put(data) for _, data in snapshot.tensors])
        snapshot.begin(0)
        snapshot.copy.wait()
        snapshot.check()
        assert sim.simulator.totals()["copy_pieces"] - before == 3


def test_a_copy_that_runs_is_not_begun_again_and_bad_plans_are_refused(sim: Running) -> None:
    with card(sim.cuda.Device()) as on:
        snapshot = Snapshot(sim, on, [], 5000, 0)
        snapshot.begin(0)
        with pytest.raises(RuntimeError, match="a copy is running"):
            snapshot.begin(0)
        snapshot.copy.wait()
        with pytest.raises(ValueError, match="pinned memory"):
            snapshot.copy.begin(snapshot.slot.ctypes.data + 10_000, snapshot.crcs.ctypes.data)
        at = on.room(64)
        for pieces, words in (
            ([(at, 0, 0)], "is empty"),
            ([(at, 4990, 64)], "ends behind"),
            ([(at, 0, 64), (at, 32, 32)], "overlaps"),
            ([(at, 0, 65)], "not on cuda:0"),
            ([(snapshot.slot.ctypes.data, 0, 64)], "pinned host memory"),
        ):
            with pytest.raises(ValueError, match=words):
                sim.cuda.SideCopy(
                    on.device, snapshot.pinned, file_bytes=5000, block_bytes=BLOCK, bucket_bytes=1, pieces=pieces
                )


def encode_on_host(sim: Running, k: int, m: int, length: int, lanes: int) -> None:
    data = random_symbols(k, length, 1)
    room = -(-length // PAGE) * PAGE
    _pages, memory = host_memory((k + m) * room)
    places = [memory[i * room : i * room + length] for i in range(k + m)]
    for place, one in zip(places, data, strict=False):
        place[:] = one
    device = sim.cuda.Device()
    pinned = sim.cuda.Pinned(device, memory.ctypes.data, len(memory), 5 * PAGE)
    codec = sim.cuda.HostCodec(device, k, m, piece_bytes=1500, lanes=lanes)
    at = [place.ctypes.data for place in places]
    codec.encode(pinned, at[:k], at[k:], length)
    assert same([np.array(place) for place in places[k:]], twin.encode(data, m))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_lies_in_host_memory_is_encoded_by_a_pipeline(sim: Running, schedule: int) -> None:
    sim.on(schedule)
    encode_on_host(sim, 4, 2, 20_000 + 13, 3)


def each_call_fails(sim: Running, work: Callable[[], Any], error: int) -> int:
    """Let every call of the runtime fail in turn: an error that is ours, and nothing found. Their number."""
    sim.on(LAZY)
    work()
    calls = sim.simulator.calls()
    for n in range(1, calls + 1):
        sim.on(LAZY)
        sim.simulator.fail_at(n, error)
        # No error where the call is the choice of a device before something is let go of.
        with contextlib.suppress(sim.cuda.CudaError):
            work()
        gc.collect()
        sim.simulator.fail_at(0)
        assert not sim.simulator.findings(leaks=True), f"call {n} of {calls}"
    return calls


@pytest.mark.parametrize("error", [999, 2])
def test_every_call_of_a_snapshot_fails_in_turn_and_nothing_leaks(sim: Running, error: int) -> None:
    assert each_call_fails(sim, lambda: take_snapshot(sim), error) > 100


@pytest.mark.parametrize("error", [999, 2])
def test_every_call_of_the_pipeline_fails_in_turn_and_nothing_leaks(sim: Running, error: int) -> None:
    assert each_call_fails(sim, lambda: encode_on_host(sim, 3, 1, 5000, 2), error) > 50
