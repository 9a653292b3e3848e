"""Every checksum tier of this machine against its slow twin, at every edge that the fast paths have."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest

from snapshotd import _native
from tests.unit.native_support import crc32c_twin

TIERS = _native.crc32c_tiers()
RFC_3720 = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
    (
        bytes.fromhex(
            "01c0" + 28 * "0" + "14000000" + "00000400" + "00000014" + "00000018" + "28" + 14 * "0" + "02" + 14 * "0"
        ),
        0xD9963A56,
    ),
    (b"123456789", 0xE3069283),
]
DATA = np.random.default_rng(3720).integers(0, 256, 70_000, dtype=np.uint8)


def test_the_table_is_always_there_and_the_tier_in_use_stands_first() -> None:
    assert "table" in TIERS
    assert _native.crc32c(DATA) == _native.crc32c_with(TIERS[0], DATA)


@pytest.mark.parametrize(("data", "expected"), RFC_3720)
@pytest.mark.parametrize("tier", TIERS)
def test_each_tier_gives_the_published_values(tier: str, data: bytes, expected: int) -> None:
    assert _native.crc32c_with(tier, data) == expected


def test_the_table_agrees_with_the_definition_bit_by_bit() -> None:
    for length in (*range(40), 255, 1000):
        data = DATA[:length].tobytes()
        assert _native.crc32c_with("table", data, 0x1234) == crc32c_twin(data, 0x1234)


@pytest.mark.parametrize("tier", TIERS)
def test_each_tier_agrees_with_the_table_at_every_length(tier: str) -> None:
    for length in [*range(1101), 4079, 4080, 4081, 4096, 4607, 4608, 4609, 8192, 65_536]:
        data = DATA[:length]
        assert _native.crc32c_with(tier, data) == _native.crc32c_with("table", data), f"{length} bytes"


@pytest.mark.parametrize("tier", TIERS)
def test_each_tier_agrees_with_the_table_at_every_alignment(tier: str) -> None:
    for start in range(65):
        for length in (1, 7, 8, 63, 64, 511, 512, 513, 1024, 5000):
            data = DATA[start : start + length]
            assert _native.crc32c_with(tier, data, 99) == _native.crc32c_with("table", data, 99), f"{start}, {length}"


@pytest.mark.parametrize("tier", TIERS)
def test_a_checksum_continues_over_any_split(tier: str) -> None:
    whole = _native.crc32c_with(tier, DATA[:6000])
    for split in (*range(70), 503, 504, 511, 512, 4079, 4080, 4081, 5999, 6000):
        assert _native.crc32c_with(tier, DATA[split:6000], _native.crc32c_with(tier, DATA[:split])) == whole


@pytest.mark.parametrize("tier", TIERS)
def test_no_tier_reads_behind_the_end_of_a_buffer(tier: str) -> None:
    """The page behind the buffer cannot be read: one byte too far would be a crash."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(base + 2 * page), ctypes.c_size_t(page), 0) == 0
    ctypes.memmove(base, DATA[: 2 * page].tobytes(), 2 * page)
    for length in (*range(1, 600), 4080, 4096, 5000, 2 * page):
        at_the_end = (ctypes.c_char * length).from_address(base + 2 * page - length)
        expected = _native.crc32c_with("table", DATA[2 * page - length : 2 * page])
        assert _native.crc32c_with(tier, at_the_end) == expected
    assert libc.mprotect(ctypes.c_void_p(base + 2 * page), ctypes.c_size_t(page), 3) == 0


def test_a_tier_that_this_machine_lacks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="quantum"):
        _native.crc32c_with("quantum", b"")


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_start_value_beyond_32_bits_is_refused(value: int) -> None:
    with pytest.raises(ValueError):
        _native.crc32c(b"x", value)


def test_memory_with_holes_is_refused() -> None:
    with pytest.raises((BufferError, ValueError)):
        _native.crc32c(DATA[::2])
