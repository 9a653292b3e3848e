"""Every tier of the erasure code against its slow twin: all coefficients, lengths, alignments and exact buffer ends."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import _native
from tests.unit import codec_twin

Bytes = npt.NDArray[np.uint8]
TIERS = _native.ec_tiers()
PAGE = mmap.PAGESIZE
# Every remainder of a vector, and of several, then whole pieces of the block loop.
LENGTHS = [*range(1, 140), 255, 256, 257, 511, 512, 513, 1023, 1024, 1100, 4095, 4096, 4097, 8193, 20_000]
LAYOUTS = ["planes", "bytes"]
SMALL = [(k, m) for k in range(1, 8) for m in range(8 - k)]  # k + m <= 7
DATA = np.random.default_rng(0x11D).integers(0, 256, 1 << 16, dtype=np.uint8)

tiers, layouts = st.sampled_from(TIERS), st.sampled_from(LAYOUTS)
blocks = st.sampled_from([512, 1024, 4096, 1536]) | st.integers(1, 6000)
factors = st.sampled_from([0, 1, 2, 3, 0x1D, 0x80, 0xFF]) | st.integers(0, 255)


def random_bytes(length: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def symbols_of(k: int, length: int, seed: int = 0) -> list[Bytes]:
    return [random_bytes(length, 1000 * seed + i) for i in range(k)]


def crcs_of(data: Bytes, block_bytes: int) -> bytes:
    starts = range(0, len(data), block_bytes)
    return b"".join(struct.pack("<I", _native.crc32c(data[start : start + block_bytes])) for start in starts)


def fenced(content: Bytes, *, at_the_end: bool) -> Bytes:
    """A copy of `content` that begins or ends where memory begins or ends: one byte too far would be a crash."""
    pages = -(-len(content) // PAGE)
    memory = np.frombuffer(mmap.mmap(-1, (pages + 2) * PAGE), dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for fence in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + fence * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    start = PAGE + (pages * PAGE - len(content) if at_the_end else 0)
    inside = memory[start : start + len(content)]
    inside[:] = content
    return inside


def accumulated(dst: Bytes, src: Bytes, factor: int, first: bool, layout: str = "bytes") -> bytes:
    """The twin of `ec_accumulate`."""
    product = codec_twin.combined_in(layout, [factor], [src.tobytes() + bytes(len(dst) - len(src))])
    return product if first else codec_twin.added(dst.tobytes(), product)


# --- tiers


def in_another_process(code: str, tier: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SNAPSHOTD_TIER": tier}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)


def test_the_oracle_is_always_there() -> None:
    assert "base" in TIERS
    assert len(set(TIERS)) == len(TIERS)


@pytest.mark.parametrize("tier", TIERS)
def test_the_environment_chooses_the_tier_in_use(tier: str) -> None:
    said = in_another_process("from snapshotd import _native; print(_native.ec_tiers()[0])", tier)
    assert (said.stdout.strip(), said.stderr) == (tier, "")


def test_a_tier_in_the_environment_that_is_none_is_refused_with_those_there_are() -> None:
    said = in_another_process("from snapshotd import _native", "quantum")
    assert said.returncode != 0
    assert "ImportError: SNAPSHOTD_TIER is 'quantum', which this machine cannot run: it is one of " in said.stderr
    assert all(tier in said.stderr for tier in TIERS)


def test_a_tier_that_this_machine_lacks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="quantum"):
        _native.ec_accumulate_with("quantum", bytearray(1), b"a", 1)
    with pytest.raises(ValueError, match="quantum"):
        _native.ec_encode_with("quantum", [b"a"], [bytearray(1)])


# --- multiply and add


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tier", TIERS)
def test_each_tier_multiplies_every_element_by_every_coefficient(tier: str, layout: str, first: bool) -> None:
    elements = codec_twin.relaid(2 * bytes(range(256)), back=layout == "planes")  # either way, all of them
    src, before = np.frombuffer(elements, dtype=np.uint8), random_bytes(512, 1)
    for factor in range(256):
        dst = before.copy()
        assert _native.ec_accumulate_with(tier, dst, src, factor, first=first, layout=layout) == -1
        assert dst.tobytes() == accumulated(before, src, factor, first, layout), f"coefficient {factor}"


@pytest.mark.parametrize("factor", [0, 1, 0x53])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tier", TIERS)
def test_no_tier_touches_a_byte_beyond_the_ends_of_its_buffers(tier: str, layout: str, factor: int) -> None:
    for length, at_the_end in itertools.product(LENGTHS, (True, False)):
        src, before = DATA[:length], DATA[-length:]
        for first in (True, False):
            dst = fenced(before, at_the_end=at_the_end)
            from_ = fenced(src, at_the_end=at_the_end)
            _native.ec_accumulate_with(tier, dst, from_, factor, first=first, layout=layout)
            assert dst.tobytes() == accumulated(before, src, factor, first, layout), f"{length} bytes"


@given(tiers, layouts, factors, st.integers(0, 3000), st.integers(0, 70), st.integers(0, 70), st.booleans())
@settings(deadline=None, max_examples=300)
def test_each_tier_agrees_with_the_twin_at_every_alignment(
    tier: str, layout: str, factor: int, length: int, src_start: int, dst_start: int, first: bool
) -> None:
    src, room = DATA[src_start : src_start + length], random_bytes(dst_start + length + 70, 2)
    around = room.copy()
    dst = room[dst_start : dst_start + length]
    around[dst_start : dst_start + length] = np.frombuffer(accumulated(dst, src, factor, first, layout), dtype=np.uint8)
    assert _native.ec_accumulate_with(tier, dst, src, factor, first=first, layout=layout) == -1
    assert room.tobytes() == around.tobytes()


@given(tiers, layouts, factors, st.integers(0, 2000), st.integers(0, 2000), st.booleans())
@settings(deadline=None)
def test_what_a_shorter_source_lacks_is_zero(
    tier: str, layout: str, factor: int, length: int, beyond: int, first: bool
) -> None:
    src, before = DATA[:length], random_bytes(length + beyond, 3)
    dst = before.copy()
    assert _native.ec_accumulate_with(tier, dst, src, factor, first=first, layout=layout) == -1
    assert dst.tobytes() == accumulated(before, src, factor, first, layout)


@given(tiers, layouts, st.lists(factors, min_size=1, max_size=9), st.integers(0, 2000), st.booleans())
@settings(deadline=None)
def test_a_piece_goes_into_several_rows_at_once(
    tier: str, layout: str, row_factors: list[int], length: int, first: bool
) -> None:
    src, before = DATA[:length], [random_bytes(length + 30, i) for i in range(len(row_factors))]
    rows = [one.copy() for one in before]
    assert _native.ec_accumulate_with(tier, rows, src, row_factors, first=first, layout=layout) == -1
    for row, one, factor in zip(rows, before, row_factors, strict=True):
        assert row.tobytes() == accumulated(one, src, factor, first, layout)


@pytest.mark.parametrize(("k", "m"), [(5, 3), (5, 4), (5, 6)])
def test_parity_is_accumulated_in_any_order(k: int, m: int) -> None:
    data, rows, layout = symbols_of(k, 1300), _native.ec_coefficients(k, m), _native.ec_layout(k, m)
    for row, expected in zip(rows, codec_twin.encode([one.tobytes() for one in data], m), strict=True):
        parity = bytearray(1300)
        for place, column in enumerate([3, 0, 4, 2, 1]):
            _native.ec_accumulate(parity, data[column], row[column], first=place == 0, layout=layout)
        assert parity == expected


@given(layouts, st.integers(1, 8), st.integers(0, 700), factors)
@settings(deadline=None)
def test_windows_of_whole_superblocks_add_up_to_the_whole(layout: str, window: int, tail: int, factor: int) -> None:
    length = 5 * 512 + tail
    whole, parts = DATA[-length:].copy(), DATA[-length:].copy()
    _native.ec_accumulate(whole, DATA[:length], factor, layout=layout)
    for at in range(0, length, 512 * window):
        end = min(length, at + 512 * window)
        _native.ec_accumulate(parts[at:end], DATA[at:end], factor, layout=layout)
    assert whole.tobytes() == parts.tobytes()


def test_accumulating_twice_takes_it_back() -> None:
    dst = DATA[:5000].copy()
    for _ in range(2):
        _native.ec_accumulate(dst, DATA[5000:10_000], 77)
    assert dst.tobytes() == DATA[:5000].tobytes()


@pytest.mark.parametrize(
    ("dst", "src", "coefficient", "complaint"),
    [
        (bytearray(3), b"four", 1, "3 bytes, fewer than the 4"),
        (bytearray(4), b"four", 256, "at most 255, not 256"),
        (bytearray(4), b"four", -1, "coefficient is negative"),
        (bytearray(4), b"four", 2**70, "coefficient .* does not fit"),
        (b"four", b"four", 1, "writable|read-only"),
        ([bytearray(4), bytearray(4)], b"four", [1], "as many, 1 to 255, not 2, 1 and 0"),
        ([], b"four", [], "not 0, 0 and 0"),
        ([bytearray(4), bytearray(5)], b"four", [1, 2], "not 4 and 5 bytes"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(dst: Any, src: bytes, coefficient: Any, complaint: str) -> None:
    with pytest.raises((ValueError, BufferError), match=complaint):
        _native.ec_accumulate(dst, src, coefficient)


@pytest.mark.parametrize("shift", [-99, -1, 0, 1, 99])
def test_a_source_that_overlaps_its_destination_is_refused(shift: int) -> None:
    memory = DATA[:400].copy()
    with pytest.raises(ValueError, match="overlap"):
        _native.ec_accumulate(memory[150:250], memory[150 + shift : 250 + shift], 2)
    assert memory.tobytes() == DATA[:400].tobytes()


def test_neighbours_do_not_overlap() -> None:
    memory = DATA[:200].copy()
    assert _native.ec_accumulate(memory[100:], memory[:100], 1, first=True) == -1
    assert memory.tobytes() == 2 * DATA[:100].tobytes()


def test_checksums_in_the_destination_are_refused() -> None:
    memory = bytearray(8)
    memory[4:] = crcs_of(DATA[:4], 4)
    with pytest.raises(ValueError, match="overlap"):
        _native.ec_accumulate(memory, DATA[:4], 1, crcs=memoryview(memory)[4:], block_bytes=4)


# --- checksums


@given(tiers, layouts, st.integers(1, 9000), blocks, factors, st.booleans(), st.data())
@settings(deadline=None)
def test_a_damaged_block_is_named_and_what_was_added_before_it_is_taken_back(
    tier: str, layout: str, length: int, block_bytes: int, factor: int, first: bool, choice: st.DataObject
) -> None:
    src = DATA[:length].copy()
    crcs = crcs_of(src, block_bytes)
    damaged = choice.draw(st.integers(0, length - 1), label="damaged byte")
    src[damaged] ^= 1 << choice.draw(st.integers(0, 7), label="flipped bit")
    before = random_bytes(length + 10, 4)
    dst = before.copy()
    options: Any = {"first": first, "crcs": crcs, "block_bytes": block_bytes, "layout": layout}
    assert _native.ec_accumulate_with(tier, dst, src, factor, **options) == damaged // block_bytes
    if not first:
        assert dst.tobytes() == before.tobytes()
    assert _native.ec_check(src, crcs, block_bytes) == damaged // block_bytes


@given(tiers, layouts, st.integers(0, 9000), blocks, factors, st.booleans(), st.integers(0, 2000))
@settings(deadline=None)
def test_sound_blocks_are_checked_and_used_and_the_sum_gets_its_own_checksums(
    tier: str, layout: str, length: int, block_bytes: int, factor: int, first: bool, beyond: int
) -> None:
    src, before = DATA[:length], random_bytes(length + beyond, 5)
    crcs, dst = crcs_of(src, block_bytes), before.copy()
    made = bytearray(crcs_of(before, block_bytes))
    assert _native.ec_check(src, crcs, block_bytes) == -1
    options: Any = {"first": first, "block_bytes": block_bytes, "layout": layout}
    assert _native.ec_accumulate_with(tier, dst, src, factor, crcs=crcs, dst_crcs=made, **options) == -1
    assert dst.tobytes() == accumulated(before, src, factor, first, layout)
    assert made == crcs_of(dst, block_bytes) == _native.ec_crcs(dst, block_bytes)


def test_each_of_several_rows_gets_its_own_checksums() -> None:
    rows, made = [bytearray(9000) for _ in range(3)], [bytearray(12) for _ in range(3)]
    crcs = crcs_of(DATA[:8192], 4096)
    for layout in LAYOUTS:
        options: Any = {"first": True, "crcs": crcs, "block_bytes": 4096, "layout": layout}
        assert _native.ec_accumulate(rows, DATA[:8192], [1, 2, 3], dst_crcs=made, **options) == -1
        assert made == [_native.ec_crcs(row, 4096) for row in rows]


def test_checksums_of_another_length_than_the_sum_has_are_refused() -> None:
    with pytest.raises(ValueError, match="have 3 checksums of 4 bytes each, not 8 bytes"):
        _native.ec_accumulate(bytearray(9000), b"", 1, first=True, crcs=b"", block_bytes=4096, dst_crcs=bytearray(8))


def test_of_several_damaged_blocks_the_first_is_named() -> None:
    src = DATA[:4096].copy()
    crcs = crcs_of(src, 512)
    src[[1100, 3000]] ^= 0xFF
    assert _native.ec_check(src, crcs, 512) == 2


def test_checksums_may_end_where_memory_ends() -> None:
    for length in (1, 512, 513, 5000):
        src = fenced(DATA[:length], at_the_end=True)
        crcs = fenced(np.frombuffer(crcs_of(src, 512), dtype=np.uint8), at_the_end=True)
        assert _native.ec_check(src, crcs, 512) == -1
        assert _native.ec_accumulate(bytearray(length), src, 3, crcs=crcs, block_bytes=512) == -1


@pytest.mark.parametrize(
    ("crcs_bytes", "block_bytes"),
    [(4, 512), (12, 512), (7, 512), (9, 512), (0, 512), (8, 0), (8, -1), (8, 1024), (8, 2**64 - 1), (8, 2**64)],
)
def test_another_number_of_checksums_than_blocks_is_refused(crcs_bytes: int, block_bytes: int) -> None:
    dst = bytearray(1000)
    with pytest.raises(ValueError, match=r"checksums|block_bytes"):
        _native.ec_accumulate(dst, DATA[:1000], 1, crcs=bytes(crcs_bytes), block_bytes=block_bytes)
    with pytest.raises(ValueError, match=r"checksums|block_bytes"):
        _native.ec_check(DATA[:1000], bytes(crcs_bytes), block_bytes)
    assert not any(dst)


# --- what arrives


Source = tuple[Any, int, int, bytes, int]


@given(st.data())
@settings(deadline=None)
def test_what_arrives_from_several_sides_is_added_up_in_one_pass(choice: st.DataObject) -> None:
    layout = choice.draw(layouts)
    dst = random_bytes(choice.draw(st.integers(1, 9000), label="length of the sum"), 6)
    count = choice.draw(st.integers(0, 5), label="sources")
    staging = bytearray(max(1, count) * choice.draw(st.sampled_from([512, 700, 4096])))
    expected = bytes(len(dst))
    with contextlib.ExitStack() as stack:
        sources: list[Source] = []
        for number in range(count):
            length = choice.draw(st.integers(0, len(dst)), label="length of a source")
            factor, block_bytes = choice.draw(factors), choice.draw(st.sampled_from([512, 1024, 4096]))
            data = random_bytes(length, 10 + number).tobytes()
            crcs = crcs_of(np.frombuffer(data, dtype=np.uint8), block_bytes)
            place = data if choice.draw(st.booleans(), label="is there") else arriving(stack, data)
            sources.append((place, factor, length, crcs, block_bytes))
            padded = np.frombuffer(data.ljust(len(dst), b"\0"), dtype=np.uint8)
            expected = accumulated(np.frombuffer(expected, dtype=np.uint8), padded, factor, False, layout)
        assert _native.ec_gather(dst, sources, staging, layout=layout, timeout_s=30.0) is None
    assert dst.tobytes() == expected


def arriving(stack: contextlib.ExitStack, data: bytes, ends: bool = False) -> int:
    """A socket on which these bytes come."""
    here, there = socket.socketpair()
    stack.enter_context(here)
    stack.enter_context(there)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    here.sendall(data)
    if ends:
        here.shutdown(socket.SHUT_WR)
    return there.fileno()


@pytest.mark.parametrize("staging", [512 * 3, 1 << 14])
def test_the_source_of_which_a_block_is_bad_is_named_with_the_block(staging: int) -> None:
    good, bad = DATA[:4096].tobytes(), bytearray(DATA[:4096].tobytes())
    crcs = crcs_of(DATA[:4096], 1024)
    bad[2100] ^= 4
    for place in (0, 1, 2):
        with contextlib.ExitStack() as stack:
            parts = [bytes(bad) if index == place else good for index in range(3)]
            sources: list[Source] = [(arriving(stack, part), 3, 4096, crcs, 1024) for part in parts]
            failure = _native.ec_gather(bytearray(4096), sources, bytearray(staging), layout="planes", timeout_s=30.0)
            assert failure == (place, 2, 0)


def test_the_source_that_ends_or_fails_or_says_nothing_is_named_with_the_reason() -> None:
    crcs = crcs_of(DATA[:4096], 4096)

    def failure(second: int, timeout_s: float = 30.0) -> tuple[int, int, int] | None:
        sources: list[Source] = [(DATA[:4096].tobytes(), 1, 4096, crcs, 4096), (second, 1, 4096, crcs, 4096)]
        return _native.ec_gather(bytearray(4096), sources, bytearray(8192), layout="bytes", timeout_s=timeout_s)

    with contextlib.ExitStack() as stack:
        assert failure(arriving(stack, bytes(4095), ends=True)) == (1, -1, 0)
        assert failure(-1) == (1, -1, errno.EBADF)
        assert failure(arriving(stack, bytes(4096)), timeout_s=0.0) == (1, -1, errno.EAGAIN)


@pytest.mark.parametrize(
    ("staging", "source", "options", "complaint"),
    [
        (511, (-1, 2, 1000, bytes(8), 512), {}, "1 sources need 512 each"),
        (512, (-1, 2, 1000, bytes(4), 1000), {}, "must be a multiple of 512, not 1000"),
        (512, (-1, 2, 1001, bytes(8), 512), {}, "1000 bytes, fewer than the length of 1001"),
        (512, (-1, 256, 1000, bytes(8), 512), {}, "coefficient must be at most 255, not 256"),
        (512, (-1, 2, 1000, bytes(4), 512), {}, "have 2 checksums"),
        (512, (-1, 2, 1000, bytes(8), 0), {}, "block_bytes must be at least 1"),
        (512, (bytes(999), 2, 1000, bytes(8), 512), {}, "a source of 1000 bytes has 999"),
        (512, (-1, 2, 1000), {}, "a source is"),
        (512, (-1, 2, 1000, bytes(8), 512), {"layout": "stripes"}, "no layout 'stripes'"),
        (512, (-1, 2, 1000, bytes(8), 512), {"timeout_s": float("nan")}, "timeout_s must lie between"),
        (512, (-1, 2, 1000, bytes(8), 512), {"timeout_s": -1.0}, "timeout_s must lie between"),
    ],
)
def test_what_cannot_be_gathered_is_refused(staging: int, source: Any, options: dict[str, Any], complaint: str) -> None:
    dst = bytearray(b"\xa5" * 1000)
    with pytest.raises(ValueError, match=complaint):
        _native.ec_gather(dst, [source], bytearray(staging), **{"layout": "planes", "timeout_s": 1.0, **options})
    assert dst == b"\xa5" * 1000


def test_a_sum_over_its_own_sources_and_too_many_of_them_are_refused() -> None:
    memory = bytearray(2048)
    crcs = _native.ec_crcs(bytes(1024), 512)
    with pytest.raises(ValueError, match="overlap"):
        _native.ec_gather(
            memoryview(memory)[:1024], [(memoryview(memory)[512:1536], 1, 1024, crcs, 512)], bytearray(512),
            layout="planes", timeout_s=1.0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="255 sources at most, not 256"):
        _native.ec_gather(memory, [(-1, 1, 0, b"", 512)] * 256, bytearray(1 << 20), layout="planes", timeout_s=1.0)


# --- encode


def fixed_bytes(k: int, length: int) -> list[bytes]:
    return [bytes((37 * i + 11 * j * j + j) % 256 for j in range(length)) for i in range(k)]


# The bytes of the code, for ever: CRC32C of each parity row over `fixed_bytes`, 1,100 of them (two superblocks and a
# tail). A version that makes others cannot read the parity of this one.
GOLDEN = {
    ("planes", 1, 3): [0x6BCDAC0E, 0x6BCDAC0E, 0x6BCDAC0E],
    ("planes", 4, 1): [0xD2ED0108],
    ("planes", 4, 2): [0xD2ED0108, 0x0BCD55E2],
    ("planes", 6, 2): [0x9EED98F2, 0x30200445],
    ("planes", 8, 2): [0x8D6CD292, 0x3167A878],
    ("planes", 8, 3): [0x8D6CD292, 0x3167A878, 0xA4F5D996],
    ("planes", 10, 4): [0x658A94E3, 0x119904A9, 0x3B51523C, 0xB39F32A5],
    ("planes", 21, 4): [0xE68DF888, 0x53C85F9F, 0xA1D93149, 0x1EA51E5D],
    ("planes", 252, 3): [0x9F19E30B, 0x413E37A7, 0x993255D7],
    ("bytes", 4, 2): [0xD2ED0108, 0x6171CCCE],
    ("bytes", 22, 4): [0x30EC9514, 0xCFC7D795, 0x305862F8, 0x399160C2],
    ("bytes", 10, 5): [0x658A94E3, 0x16216BE0, 0x79764543, 0x2B2BDA5C, 0xC7F3418B],
    ("bytes", 128, 6): [0x64A09782, 0x26908043, 0x4BBF8D49, 0x31789A09, 0x765EB4D7, 0x128D7BF6],
}


@pytest.mark.parametrize(("layout", "k", "m"), GOLDEN)
@pytest.mark.parametrize("tier", TIERS)
def test_the_parity_of_fixed_bytes_stays_what_it_was_in_the_first_version(
    tier: str, layout: str, k: int, m: int
) -> None:
    parity = [bytearray(1100) for _ in range(m)]
    _native.ec_encode_with(tier, fixed_bytes(k, 1100), parity, layout=layout)
    assert [_native.crc32c(one) for one in parity] == GOLDEN[layout, k, m]


@pytest.mark.parametrize("tier", TIERS)
def test_the_first_bytes_of_each_plane_stay_what_they_were_in_the_first_version(tier: str) -> None:
    parity = [bytearray(512) for _ in range(4)]
    _native.ec_encode_with(tier, fixed_bytes(3, 512), parity)
    assert [b"".join(one[64 * p : 64 * p + 2] for p in range(8)).hex() for one in parity] == [
        "6f6baf2befeb2fab6f6baf2befeb2fab",
        "2fab6f6b808ccada0a9a65fdaf2befeb",
        "e57d0a9acadac04caf2befeb2fab6f6b",
        "efeb2fab808c2faba5bd808caf2ba5bd",
    ]


@pytest.mark.parametrize("tier", TIERS)
def test_the_parity_of_fixed_bytes_in_bytes_stays_what_it_was_in_the_first_version(tier: str) -> None:
    parity = [bytearray(9) for _ in range(3)]
    _native.ec_encode_with(tier, fixed_bytes(5, 9), parity, layout="bytes")
    assert [one.hex() for one in parity] == ["94b05a72f86cde2e5c", "1666079bc21ebd3a63", "0842a163f2b97c9b81"]


def test_reedsolo_confirms_the_parity_of_two_rows() -> None:
    """Its code has other rows, but its field's arithmetic gives ours, element by element."""
    reedsolo.init_tables(prim=0x11D)
    data = fixed_bytes(4, 512)
    parity = [bytearray(512) for _ in range(3)]
    _native.ec_encode(data, parity)
    elements = [codec_twin.relaid(one) for one in data]
    for row, exponent in zip(parity, (0, 1, -1), strict=True):
        expected = bytearray(512)
        for i, one in enumerate(elements):
            factor = reedsolo.gf_pow(2, exponent * i)
            for j in range(512):
                expected[j] ^= reedsolo.gf_mul(factor, one[j])
        assert codec_twin.relaid(bytes(row)) == expected


@given(tiers, st.integers(1, 25), st.integers(0, 6), st.integers(1, 3000), st.integers(0, 40), st.integers(1, 3))
@settings(deadline=None, max_examples=200)
def test_each_tier_encodes_as_the_twin_does(tier: str, k: int, m: int, length: int, start: int, threads: int) -> None:
    data = [DATA[start + 997 * i : start + 997 * i + length] for i in range(k)]
    parity = [np.empty(length + 64, dtype=np.uint8)[i : i + length] for i in range(m)]
    _native.ec_encode_with(tier, data, parity, threads)
    assert [one.tobytes() for one in parity] == codec_twin.encode([one.tobytes() for one in data], m)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_no_tier_encodes_or_decodes_beyond_the_ends_of_its_buffers(tier: str, m: int) -> None:
    lengths = [1, 31, 32, 33, 63, 65, 511, 512, 513, 577, 4096, 4097]
    for length, at_the_end in itertools.product(lengths, (True, False)):
        data = [fenced(DATA[i : i + length], at_the_end=at_the_end) for i in range(3)]
        parity = [fenced(DATA[:length], at_the_end=at_the_end) for _ in range(m)]
        _native.ec_encode_with(tier, data, parity)
        assert [one.tobytes() for one in parity] == codec_twin.encode([one.tobytes() for one in data], m)
        have = dict(enumerate([*data, *parity][m:], start=m)) if m <= 3 else dict(enumerate(parity, start=3))
        want = {i: fenced(DATA[:length], at_the_end=at_the_end) for i in range(3) if i not in have}
        _native.ec_decode_with(tier, 3, m, have, want)
        assert all(one.tobytes() == data[i].tobytes() for i, one in want.items())


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tier", TIERS)
def test_several_threads_encode_what_one_does(tier: str, threads: int) -> None:
    data = symbols_of(3, 1_000_001)
    parity = [np.empty(1_000_001, dtype=np.uint8) for _ in range(2)]
    _native.ec_encode_with(tier, data, parity, threads)
    assert [one.tobytes() for one in parity] == codec_twin.encode([one.tobytes() for one in data], 2)


@pytest.mark.parametrize(("k", "m"), [(128, 127), (1, 254), (254, 1), (255, 0), (252, 3), (21, 4), (22, 4)])
@pytest.mark.parametrize("tier", TIERS)
def test_each_tier_encodes_the_largest_codes(tier: str, k: int, m: int) -> None:
    data, parity = symbols_of(k, 613), [bytearray(613) for _ in range(m)]
    _native.ec_encode_with(tier, data, parity)
    assert parity == codec_twin.encode([one.tobytes() for one in data], m)


@given(
    tiers, layouts, st.integers(1, 9), st.integers(0, 4), st.integers(1, 9000), st.sampled_from([512, 1024, 4096]),
    st.sampled_from(["temporal", "non-temporal"]), st.integers(1, 3),
)  # fmt: skip
@settings(deadline=None)
def test_copies_checksums_and_parity_are_made_in_one_pass(
    tier: str, layout: str, k: int, m: int, length: int, block_bytes: int, stores: str, threads: int
) -> None:
    data = [DATA[997 * i : 997 * i + length] for i in range(k)]
    copies, parity = ([np.zeros(length, dtype=np.uint8) for _ in range(count)] for count in (k, m))
    blocks = -(-length // block_bytes)
    data_crcs, parity_crcs = ([bytearray(4 * blocks) for _ in range(count)] for count in (k, m))
    options: Any = {"block_bytes": block_bytes, "copies": copies, "data_crcs": data_crcs, "parity_crcs": parity_crcs}
    _native.ec_encode_copying_with(tier, data, parity, threads, layout, stores=stores, **options)
    assert [one.tobytes() for one in copies] == [one.tobytes() for one in data]
    assert [one.tobytes() for one in parity] == codec_twin.encode([one.tobytes() for one in data], m, layout)
    assert data_crcs == [crcs_of(one, block_bytes) for one in data]
    assert parity_crcs == [crcs_of(one, block_bytes) for one in parity]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"block_bytes": 4000}, "multiple of 512, not 4000"),
        ({"block_bytes": 0}, "block_bytes must be at least 1"),
        ({"block_bytes": 512, "copies": [bytearray(600)]}, "copy must be 2 buffers, not 1"),
        ({"block_bytes": 512, "copies": [bytearray(600), bytearray(5)]}, "copy 1 must have 600 bytes, not 5"),
        ({"block_bytes": 512, "data_crcs": [bytearray(8), bytearray(4)]}, "data_crcs 1 must have 8 bytes, not 4"),
        ({"block_bytes": 512, "parity_crcs": [bytes(8)]}, "writable|read-only"),
        ({"block_bytes": 512, "stores": "fast"}, "no stores 'fast'"),
    ],
)
def test_what_cannot_be_copied_and_encoded_is_refused(options: Any, complaint: str) -> None:
    with pytest.raises((ValueError, BufferError), match=complaint):
        _native.ec_encode_copying([bytes(600), bytes(600)], [bytearray(600)], **options)


# --- decode


def encoded(k: int, m: int, length: int, layout: str | None = None) -> list[Bytes]:
    """All symbols of a code, data first."""
    data, parity = symbols_of(k, length, seed=k), [np.empty(length, dtype=np.uint8) for _ in range(m)]
    _native.ec_encode(data, parity, layout=layout)
    return data + parity


def assert_recovered(
    symbols: Sequence[Bytes],
    k: int,
    lost: Sequence[int],
    threads: int = 1,
    tier: str = TIERS[0],
    layout: str | None = None,
) -> None:
    """Lose these, take them from all the others, and nothing else has changed."""
    have = {i: one.copy() for i, one in enumerate(symbols) if i not in lost}
    want = {i: np.empty_like(symbols[i]) for i in lost}
    _native.ec_decode_with(tier, k, len(symbols) - k, have, want, threads, layout)
    for i, one in enumerate(symbols):
        assert (want if i in lost else have)[i].tobytes() == one.tobytes(), f"k={k}, lost {lost}: symbol {i}"


@pytest.mark.parametrize(("k", "m"), SMALL)
def test_every_choice_of_up_to_m_lost_symbols_comes_back(k: int, m: int) -> None:
    symbols = encoded(k, m, 579)
    for count in range(m + 1):
        for lost in itertools.combinations(range(k + m), count):
            assert_recovered(symbols, k, lost)


@given(tiers, st.integers(1, 60), st.integers(0, 20), st.integers(1, 1700), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=200)
def test_symbols_lost_by_chance_come_back_in_every_tier(
    tier: str, k: int, m: int, length: int, chance: random.Random
) -> None:
    lost = chance.sample(range(k + m), chance.randint(0, m))
    assert_recovered(encoded(k, m, length), k, lost, tier=tier)


@given(tiers, st.integers(1, 21), st.integers(1, 4), st.integers(1, 1700), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=200)
def test_data_and_parity_lost_together_come_back_from_planes(
    tier: str, k: int, m: int, length: int, chance: random.Random
) -> None:
    assert_recovered(encoded(k, m, length), k, chance.sample(range(k + m), m), tier=tier)


def test_a_share_of_a_decode_is_made_by_each_survivor() -> None:
    """Each multiplies what it has by its coefficients; the shares add up to what was lost."""
    symbols = encoded(6, 3, 1500)
    have, lost = [0, 2, 3, 5, 6, 8], [1, 4, 7]
    rows = _native.ec_recovery(6, 3, have, lost)
    shares = [[np.zeros(1500, dtype=np.uint8) for _ in lost] for _ in range(2)]
    for place, symbol in enumerate(have):
        factors = [row[place] for row in rows]
        _native.ec_accumulate(shares[place % 2], symbols[symbol], factors, layout="planes")
    for i, symbol in enumerate(lost):
        assert (shares[0][i] ^ shares[1][i]).tobytes() == symbols[symbol].tobytes()


@pytest.mark.parametrize(("k", "m"), [(128, 127), (200, 55), (1, 254), (254, 1), (17, 3), (252, 3), (21, 4), (22, 4)])
def test_the_largest_codes_lose_all_that_they_may(k: int, m: int) -> None:
    symbols = encoded(k, m, 589)
    for lost in (range(m), range(k, k + m), random.Random(k).sample(range(k + m), m)):
        assert_recovered(symbols, k, [*lost])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_several_threads_decode_what_one_does(threads: int) -> None:
    assert_recovered(encoded(4, 2, 700_001), 4, [1, 4], threads)


def test_only_what_is_wanted_is_written() -> None:
    symbols = encoded(4, 3, 50)
    lost = bytearray(50)
    _native.ec_decode(4, 3, {6: symbols[6], 1: symbols[1], 2: symbols[2], 4: symbols[4]}, {3: lost})  # 0, 5: not there
    assert lost == symbols[3].tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_agrees_with_the_twin(layout: str) -> None:
    symbols = encoded(5, 3, 1099, layout)
    have = {i: symbols[i].tobytes() for i in (7, 1, 5, 3, 6)}
    want = {i: bytearray(1099) for i in (0, 2, 4)}
    _native.ec_decode(5, 3, have, want, layout=layout)
    assert list(want.values()) == codec_twin.decode(5, 3, have, [0, 2, 4], layout)


# --- what is refused


def room(length: int = 8) -> bytearray:
    return bytearray(length)


ONE = bytes(8)
SHARED = np.zeros(64, dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "parity", "complaint"),
    [
        ([], [room()], "k=0, m=1"),
        ([], [], "k=0, m=0"),
        ([ONE] * 200, [room() for _ in range(56)], "k=200, m=56"),
        ([ONE, bytes(9)], [room()], "8 and 9 bytes"),
        ([ONE, ONE], [room(7)], "8 and 7 bytes"),
        ([ONE, ONE], [room(), room(0)], "8 and 0 bytes"),
        ([b"", b""], [room(0)], "must not be empty"),
        ([ONE, ONE], [ONE], "writable|read-only"),
        ([SHARED[:8], SHARED[8:16]], [SHARED[15:23]], "overlaps"),
        ([SHARED[:8], ONE], [SHARED[:8]], "overlaps"),
        ([ONE, ONE], [SHARED[:8], SHARED[7:15]], "overlaps"),
    ],
)
def test_what_cannot_be_encoded_is_refused(data: list[Any], parity: list[Any], complaint: str) -> None:
    with pytest.raises((ValueError, BufferError), match=complaint):
        _native.ec_encode(data, parity)


@pytest.mark.parametrize(
    ("have", "want", "complaint"),
    [
        ({0: ONE, 1: ONE}, {2: room()}, "from 3 symbols, not 2"),
        ({}, {0: room()}, "from 3 symbols, not 0"),
        ({1: ONE, 4: ONE}, {0: room(), 2: room(), 3: room()}, "from 3 symbols, not 2"),
        ({0: ONE, 1: ONE, 5: ONE}, {2: room()}, "no symbol 5"),
        ({0: ONE, 1: ONE, 2: ONE, 5: ONE}, {3: room()}, "no symbol 5"),
        ({0: ONE, 1: ONE, 2: ONE}, {5: room()}, "no symbol 5"),
        ({0: ONE, 1: ONE, -1: ONE}, {2: room()}, "symbol in have is negative"),
        ({0: ONE, 1: ONE, 3: ONE}, {-2: room()}, "symbol in want is negative"),
        ({0: ONE, 1: ONE, 3: ONE}, {1: room()}, "symbol 1 is both given and wanted"),
        ({0: ONE, 1: bytes(9), 3: ONE}, {2: room()}, "8 and 9 bytes"),
        ({0: ONE, 1: ONE, 2: ONE, 3: bytes(9)}, {4: room()}, "8 and 9 bytes"),
        ({0: ONE, 1: ONE, 3: ONE}, {2: room(9)}, "8 and 9 bytes"),
        ({0: b"", 1: b"", 3: b""}, {2: room(0)}, "must not be empty"),
        ({0: ONE, 1: ONE, 3: ONE}, {2: ONE}, "writable|read-only"),
        ({0: SHARED[:8], 1: ONE, 3: ONE}, {2: SHARED[1:9]}, "overlaps"),
        ({0: ONE, 1: ONE, 2: ONE, 3: SHARED[:8]}, {4: SHARED[:8]}, "overlaps"),  # also what is not used
        ({0: ONE, 3: ONE, 4: ONE}, {1: SHARED[:8], 2: SHARED[4:12]}, "overlaps"),
    ],
)
def test_what_cannot_be_decoded_is_refused(have: dict[int, Any], want: dict[int, Any], complaint: str) -> None:
    with pytest.raises((ValueError, BufferError), match=complaint):
        _native.ec_decode(3, 2, have, want)
    assert not SHARED.any()


def test_an_overlap_is_named_by_its_buffers() -> None:
    with pytest.raises(ValueError, match=r"parity row 0 at 0x[0-9a-f]+ of 8 bytes overlaps data symbol 1 at 0x"):
        _native.ec_encode([ONE, SHARED[:8]], [SHARED[4:12]])


class OnDevice:
    """Looks like an array in the memory of a GPU."""

    __cuda_array_interface__: ClassVar[dict[str, Any]] = {"data": (0x7F00, False), "shape": (8,), "typestr": "|u1"}


def test_memory_of_a_device_is_refused_by_name() -> None:
    there: Any = OnDevice()
    with pytest.raises(TypeError, match="data symbol 1 is a OnDevice in the memory of a device"):
        _native.ec_encode([ONE, there], [room()])
    with pytest.raises(TypeError, match="parity row 0 is a OnDevice"):
        _native.ec_encode([ONE, ONE], [there])
    with pytest.raises(TypeError, match="src is a OnDevice"):
        _native.ec_accumulate(room(), there, 1)
    with pytest.raises(TypeError, match="dst is a OnDevice"):
        _native.ec_accumulate(there, ONE, 1)
    with pytest.raises(TypeError, match="wanted symbol 0 is a OnDevice"):
        _native.ec_decode(1, 1, {1: ONE}, {0: there})


@pytest.mark.parametrize(("k", "m"), [(0, 2), (-1, 2), (3, -1), (200, 56)])
def test_decoding_by_a_code_that_cannot_be_is_refused(k: int, m: int) -> None:
    with pytest.raises(ValueError, match=r"k|m"):
        _native.ec_decode(k, m, {0: ONE}, {1: room()})


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_a_number_of_threads_that_cannot_be_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        _native.ec_encode([ONE], [room()], threads)
    with pytest.raises(ValueError, match="threads"):
        _native.ec_decode(1, 1, {0: ONE}, {1: room()}, threads)


# --- threads


BIG = np.zeros((4, 1 << 20), dtype=np.uint8)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: _native.ec_accumulate(BIG[0], BIG[1], 3), id="accumulate"),
        pytest.param(lambda: _native.ec_check(BIG[0], bytes(4), 1 << 20), id="check"),
        pytest.param(lambda: _native.ec_encode([BIG[0], BIG[1]], [BIG[2], BIG[3]]), id="encode"),
        pytest.param(lambda: _native.ec_decode(2, 2, {1: BIG[0], 3: BIG[1]}, {0: BIG[2], 2: BIG[3]}), id="decode"),
    ],
)
def test_others_run_while_bytes_move(call: Callable[[], object]) -> None:
    """Nobody is made to let go of the GIL here: the other thread runs only if the call does so by itself."""
    start, ran = threading.Lock(), threading.Event()
    start.acquire()

    def other() -> None:
        with start:
            ran.set()

    thread = threading.Thread(target=other)
    thread.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        start.release()
        calls = 0
        while not ran.is_set() and calls < 10_000:
            call()
            calls += 1
        assert ran.is_set()
    finally:
        sys.setswitchinterval(before)
        thread.join()
