"""snapshotd._cuda on a machine without a GPU: it imports, says so, and its host threads do what kernels would do.

What its kernels do is shown by tests/cuda (make cuda-test), on a simulated device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from snapshotd import _native
from tests.cuda import twin
from tests.cuda.support import card, host_memory, random_symbols, same

_cuda: Any = pytest.importorskip("snapshotd._cuda", reason="the CUDA module was not built: there is no nvcc here")


def test_without_a_driver_the_module_says_in_words_that_there_is_no_gpu() -> None:
    if _cuda.device_count() > 0:
        pytest.skip("there is a GPU here")
    assert _cuda.why_no_device().startswith("no GPU: ")
    with pytest.raises(_cuda.CudaError, match="no GPU"):
        _cuda.Device()
    with pytest.raises(ValueError, match="cuda or host"):
        _cuda.Device("tpu")


@pytest.mark.parametrize(("k", "m", "length"), [(1, 1, 1), (4, 2, 2048), (8, 3, 1100), (21, 4, 600), (200, 3, 512)])
def test_host_threads_encode_and_decode_as_the_twin(k: int, m: int, length: int) -> None:
    data = random_symbols(k, length, k)
    parity = twin.encode(data, m)
    with card(_cuda.Device("host")) as on:
        out = [on.room(length) for _ in range(m)]
        at = [on.put(one) for one in data]
        on.device.encode(at, out, length)
        assert same([on.get(one, length) for one in out], parity)
        lost = list(range(min(k, m)))
        wanted = {symbol: on.room(length) for symbol in lost}
        on.device.decode([None if i in lost else one for i, one in enumerate(at)], out, wanted, length)
        assert same([on.get(wanted[i], length) for i in lost], data[: len(lost)])


def test_host_threads_take_a_snapshot_with_its_checksums() -> None:
    sizes, block = [5, 70_000, 4096, 333], 4096
    file_bytes = 100 + sum(sizes)
    _pages, arena = host_memory(128 * 1024)
    slot, crcs = arena[:file_bytes], arena[120_000:]
    with card(_cuda.Device("host")) as on:
        tensors = [random_symbols(1, size, size)[0] for size in sizes]
        pieces, at = [], 100
        for tensor in tensors:
            pieces.append((on.put(tensor), at, len(tensor)))
            at += len(tensor)
        pinned = _cuda.Pinned(on.device, arena.ctypes.data, len(arena))
        copy = _cuda.SideCopy(
            on.device, pinned, file_bytes=file_bytes, block_bytes=block, bucket_bytes=8192, pieces=pieces
        )
        copy.begin(slot.ctypes.data, crcs.ctypes.data)
        copy.wait()
        del copy, pinned
    image = np.concatenate([np.zeros(100, np.uint8), *tensors]).tobytes()
    assert slot.tobytes() == image
    found = crcs.view("<u4")[: -(-file_bytes // block)].tolist()
    assert found == [_native.crc32c(image[start : start + block]) for start in range(0, file_bytes, block)]


def test_host_memory_is_encoded_by_a_pipeline_of_host_threads() -> None:
    data, length = random_symbols(6, 30_001, 1), 30_001
    _pages, memory = host_memory(8 * 32 * 1024)
    places = [memory[i * 32_768 :][:length] for i in range(8)]
    for place, one in zip(places, data, strict=False):
        place[:] = one
    device = _cuda.Device("host")
    codec = _cuda.HostCodec(device, 6, 2, piece_bytes=4096)
    at = [place.ctypes.data for place in places]
    codec.encode(_cuda.Pinned(device, memory.ctypes.data, len(memory)), at[:6], at[6:], length)
    assert same([np.array(place) for place in places[6:]], twin.encode(data, 2))
