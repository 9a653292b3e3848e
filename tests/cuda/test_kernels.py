"""Every kernel gives the bytes of the twin, on every architecture and schedule, and touches nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reedsolo

from snapshotd import _native
from tests.cuda import twin
from tests.cuda.conftest import Running
from tests.cuda.support import ARCHS, EAGER, LAZY, card, random_symbols, same
from tests.cuda.twin import Bytes
from tests.unit import codec_twin

SCHEDULES = (EAGER, LAZY, 1, 2, 3)


def encode(sim: Running, data: list[Bytes], m: int, skew: int = 0) -> list[Bytes]:
    length = len(data[0])
    with card(sim.cuda.Device()) as on:
        at = [on.put(one, skew) for one in data]
        out = [on.room(length, skew) for _ in range(m)]
        on.device.encode(at, out, length)
        return [on.get(one, length) for one in out]


def test_the_twins_field_is_the_one_of_reedsolo() -> None:
    reedsolo.init_tables(0x11D)
    for a, b in itertools.product(range(256), repeat=2):
        assert twin.PRODUCTS[a][b] == reedsolo.gf_mul(a, b)
    for row, symbol in itertools.product(range(4), range(255)):
        assert twin.coefficient(row, symbol) == reedsolo.gf_pow(2, twin.EXPONENTS[row] * symbol % 255)


def test_the_module_has_the_twins_coefficients(sim: Running) -> None:
    for row, symbol in itertools.product(range(4), range(255)):
        assert sim.cuda.planes_coefficient(row, symbol) == twin.coefficient(row, symbol)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("m", range(1, 5))
def test_every_specialised_encode_gives_the_twins_parity(sim: Running, m: int, arch: int) -> None:
    for k in range(1, 17):
        data = random_symbols(k, 1024, k)
        expected = twin.encode(data, m)
        for schedule in SCHEDULES:
            sim.on(schedule, arch)
            assert same(encode(sim, data, m), expected), f"k={k}, m={m}, schedule {schedule}, sm_{arch}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("k", "m"), [(17, 1), (21, 4), (40, 2), (252, 3), (254, 1)])
def test_codes_of_many_symbols_give_the_twins_parity(sim: Running, k: int, m: int, arch: int) -> None:
    data = random_symbols(k, 512 + 3, k)
    sim.on(1, arch)
    assert same(encode(sim, data, m), twin.encode(data, m))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 511, 512, 513, 1023, 1536 + 48, 2048 + 77])
@pytest.mark.parametrize("skew", [0, 1, 4, 16])
def test_lengths_and_addresses_of_any_kind_give_the_twins_parity(sim: Running, length: int, skew: int) -> None:
    for k, m in ((3, 2), (5, 4), (18, 3)):
        data = random_symbols(k, length, length)
        sim.on(length, ARCHS[length % 3])
        assert same(encode(sim, data, m, skew), twin.encode(data, m)), f"k={k}, m={m}"


def test_a_grid_smaller_than_the_work_goes_round(sim: Running) -> None:
    data = random_symbols(2, 300 * 1024, 1)
    assert same(encode(sim, data, 1), twin.encode(data, 1))


def decode(
    sim: Running, data: list[Bytes], m: int, lost: tuple[int, ...], rows: tuple[int, ...], skew: int = 0
) -> None:
    length = len(data[0])
    parity = twin.encode(data, m)
    with card(sim.cuda.Device()) as on:
        have = [None if i in lost else on.put(one, skew) for i, one in enumerate(data)]
        there = [on.put(parity[row], skew) if row in rows else None for row in range(m)]
        out = {symbol: on.room(length, skew) for symbol in lost}
        on.device.decode(have, there, out, length)
        for symbol in lost:
            assert np.array_equal(on.get(out[symbol], length), data[symbol]), f"lost {lost}, rows {rows}"


@pytest.mark.parametrize("arch", ARCHS)
def test_every_set_of_parity_rows_brings_back_as_many_lost_symbols(sim: Running, arch: int) -> None:
    rng = np.random.default_rng(arch)
    for rows in (rows for n in range(1, 5) for rows in itertools.combinations(range(4), n)):
        for k in (len(rows), 9, 21):
            lost = tuple(sorted(rng.choice(k, len(rows), replace=False).tolist()))
            sim.on(int(rng.integers(100)), arch)
            decode(sim, random_symbols(k, 1024, k), 4, lost, rows)


@pytest.mark.parametrize(("length", "skew"), [(700, 0), (512, 1), (77, 0), (1500, 8)])
def test_tails_and_unaligned_symbols_are_decoded_too(sim: Running, length: int, skew: int) -> None:
    decode(sim, random_symbols(6, length, 1), 3, (0, 4), (1, 2), skew)
    sim.on(5)
    decode(sim, random_symbols(40, length, 2), 3, (0, 17, 39), (0, 1, 2), skew)


def test_a_survivor_that_is_asked_for_one_symbol_of_three_gives_that_one(sim: Running) -> None:
    data = random_symbols(5, 1024, 1)
    parity = twin.encode(data, 3)
    with card(sim.cuda.Device()) as on:
        have = [None if i < 3 else on.put(one) for i, one in enumerate(data)]
        out = on.room(1024)
        on.device.decode(have, [on.put(row) for row in parity], {1: out}, 1024)
        assert np.array_equal(on.get(out, 1024), data[1])


@pytest.mark.parametrize("layout", ["planes", "bytes"])
@pytest.mark.parametrize("arch", ARCHS)
def test_any_factors_combine_as_the_twin_says(sim: Running, layout: str, arch: int) -> None:
    rng = np.random.default_rng(arch)
    for rows, inputs, length, skew, add in (
        (1, 1, 1024, 0, True),
        (2, 1, 512, 0, True),
        (3, 4, 1100, 0, False),
        (4, 2, 700, 3, True),
        (1, 2, 600, 1, True),
        (6, 30, 600, 0, False),
        (1, 255, 512, 0, False),
        (2, 3, 5, 0, False),
    ):
        data = random_symbols(inputs, length, rows)
        before = random_symbols(rows, length, rows + 100)
        factors = [rng.integers(0, 256, inputs, np.uint8) for _ in range(rows)]
        sim.on(int(rng.integers(100)), arch)
        with card(sim.cuda.Device()) as on:
            at = [on.put(one, skew) for one in data]
            out = [on.put(one, skew) if add else on.room(length, skew) for one in before]
            given = [row.tobytes() for row in factors]
            on.device.combine(at, out, given, layout=layout, add=add, bytes=length)
            for row, was, found in zip(factors, before, [on.get(one, length) for one in out], strict=True):
                expected = twin.combined(row.tolist(), data, layout) ^ (was if add else 0)
                assert np.array_equal(found, expected), f"{rows} rows of {inputs} inputs, {length} bytes"


def test_accumulating_pieces_in_any_order_gives_the_encoded_parity(sim: Running) -> None:
    k, m, length = 6, 4, 1024 + 40
    data = random_symbols(k, length, 3)
    with card(sim.cuda.Device()) as on:
        out = [on.put(np.zeros(length, np.uint8)) for _ in range(m)]
        for i in (3, 0, 5, 1, 4, 2):
            factors = [bytes([twin.coefficient(row, i)]) for row in range(m)]
            on.device.combine([on.put(data[i])], out, factors, layout="planes", add=True, bytes=length)
        assert same([on.get(one, length) for one in out], twin.encode(data, m))


def test_the_bytes_layout_carries_the_native_cauchy_code(sim: Running) -> None:
    k, m, length = 10, 6, 333
    data = random_symbols(k, length, 9)
    rows = codec_twin.coefficients(k, m)
    with card(sim.cuda.Device()) as on:
        out = [on.room(length) for _ in range(m)]
        factors = [bytes(row) for row in rows]
        on.device.combine([on.put(one) for one in data], out, factors, layout="bytes", bytes=length)
        found = [on.get(one, length).tobytes() for one in out]
    assert found == codec_twin.encode([one.tobytes() for one in data], m)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("length", "block", "skew"),
    [(1, 4096, 0), (15, 4096, 0), (16, 16, 0), (4096, 4096, 0), (8192, 4096, 0), (20000, 4096, 0), (9000, 4096, 3),
     (5000, 1000, 0), (40, 7, 0), (70000, 65536, 0)],
)  # fmt: skip
def test_checksums_of_blocks_are_those_of_the_native_module(
    sim: Running, length: int, block: int, skew: int, arch: int
) -> None:
    data = random_symbols(1, length, length)[0]
    blocks = -(-length // block)
    for schedule in (LAZY, 7):
        sim.on(schedule, arch)
        with card(sim.cuda.Device()) as on:
            out = on.room(4 * blocks)
            on.device.crc32c(on.put(data, skew), out, block_bytes=block, bytes=length)
            found = on.get(out, 4 * blocks).view("<u4").tolist()
        assert found == [_native.crc32c(data[at : at + block].tobytes()) for at in range(0, length, block)]


def test_checksums_of_more_blocks_than_the_grid_has_go_round(sim: Running) -> None:
    data = random_symbols(1, 64 * 40, 1)[0]
    with card(sim.cuda.Device()) as on:
        out = on.room(4 * 40)
        on.device.crc32c(on.put(data), out, block_bytes=64, bytes=len(data))
        found = on.get(out, 4 * 40).view("<u4").tolist()
    assert found == [_native.crc32c(data[at : at + 64].tobytes()) for at in range(0, len(data), 64)]


# --- what is no code, or no memory


def test_what_is_no_code_is_refused_with_its_values_before_anything_runs(sim: Running) -> None:
    with card(sim.cuda.Device()) as on:
        a, b, c = (on.room(1024) for _ in range(3))
        launches = sim.simulator.totals()["launches"]
        device = on.device
        for call, words in (
            (lambda: device.encode([], [a], 512), "k=0, m=1"),
            (lambda: device.encode([a], [], 512), "k=1, m=0"),
            (lambda: device.encode([a] * 253, [b] * 3, 512), "k=253, m=3"),
            (lambda: device.encode([a] * 22, [b] * 4, 512), "k=22, m=4"),
            (lambda: device.encode([a], [b], 0), "must not be empty"),
            (lambda: device.encode([a], [a + 256], 512), "overlaps"),
            (lambda: device.encode([a], [b], 2048), "not on cuda:0"),
            (lambda: device.encode([a], [0], 512), "null"),
            (lambda: device.encode([a], [b]), "bytes must be given"),
            (lambda: device.decode([None, None], [a], {0: b}, 512), "2 data symbols are lost, but only 1"),
            (lambda: device.decode([a, None], [b], {0: c}, 512), "0 is wanted but not lost"),
            (lambda: device.combine([a], [b], [b"\x01\x02"], layout="planes", bytes=512), "1 inputs, not 2"),
            (lambda: device.combine([a], [b], [b"\x01"], layout="rows", bytes=512), "no layout 'rows'"),
            (lambda: device.crc32c(a, b, block_bytes=0, bytes=512), "at least one"),
        ):
            with pytest.raises(ValueError, match=words):
                call()
        host = np.zeros(512, np.uint8)
        with pytest.raises(ValueError, match="no memory of any device"):
            device.encode([host.ctypes.data], [b], 512)
        assert sim.simulator.totals()["launches"] == launches


def test_a_tensor_on_another_device_is_refused_and_that_device_works_by_itself(sim: Running) -> None:
    data = random_symbols(2, 1024, 1)
    with card(sim.cuda.Device(ordinal=1)) as other, card(sim.cuda.Device()) as on:
        here, there = on.put(data[0]), other.put(data[1])
        with pytest.raises(ValueError, match=r"data symbol 1 .* is on device 1, not on cuda:0"):
            on.device.encode([here, there], [on.room(1024)], 1024)
        out = other.room(1024)
        other.device.encode([there, other.put(data[0])], [out], 1024)
        assert np.array_equal(other.get(out, 1024), data[0] ^ data[1])
        assert sim.simulator.current_device() == 0  # what the caller chose is left to it
    with pytest.raises(ValueError, match="there is no device 2: this machine has 2"):
        sim.cuda.Device(ordinal=2)


def test_a_stream_that_is_gone_is_an_error_of_the_device(sim: Running) -> None:
    with card(sim.cuda.Device()) as on:
        a, b = on.put(np.zeros(512, np.uint8)), on.room(512)
        stream = on.device.make_stream()
        on.device.end_stream(stream)
        with pytest.raises(sim.cuda.CudaError, match="starting an encode failed"):
            on.device.encode([a], [b], 512, stream)


def test_no_room_on_the_device_is_an_error_of_its_own(sim: Running) -> None:
    sim.on(LAZY, device_bytes=4096)
    with card(sim.cuda.Device()) as on:
        on.room(4000)
        with pytest.raises(sim.cuda.CudaMemoryError) as caught:
            on.room(4000)
        assert caught.value.code == 2


class Array:
    """An array as cupy would hand it over."""

    def __init__(self, at: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, read_only: bool) -> None:
        self.__cuda_array_interface__ = {
            "data": (at, read_only), "shape": shape, "strides": strides, "typestr": "<f4", "version": 3,
        }  # fmt: skip


def test_arrays_with_the_cuda_array_interface_are_taken_and_bad_ones_refused(sim: Running) -> None:
    data = random_symbols(2, 1024, 4)
    with card(sim.cuda.Device()) as on:
        at, out = [on.put(one) for one in data], on.room(1024)
        arrays = [Array(one, (16, 16), (64, 4), True) for one in at]
        on.device.encode(arrays, [Array(out, (256,), None, False)])
        assert np.array_equal(on.get(out, 1024), data[0] ^ data[1])
        with pytest.raises(ValueError, match="read-only"):
            on.device.encode(arrays, [Array(out, (256,), None, True)])
        with pytest.raises(ValueError, match="not contiguous"):
            on.device.encode([Array(at[0], (16, 16), (4, 64), True)], [out])
        with pytest.raises(ValueError, match="same length"):
            on.device.encode([*arrays, Array(at[0], (8,), None, True)], [out])
        with pytest.raises(TypeError, match="integer address"):
            on.device.encode(["x"], [out], 512)
