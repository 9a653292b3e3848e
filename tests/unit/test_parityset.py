"""A parity set's description: what is packed comes back, and what was touched is refused."""

from __future__ import annotations

import re
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd import geometry, parityset
from snapshotd.errors import ProtocolError
from snapshotd.wire import GenerationId, ShardShape, SnapshotId

SNAPSHOT = SnapshotId(GenerationId(3, b"n" * 16), 840)


def description(sizes: list[int], position: int = 0, parity: int = 1) -> parityset.Description:
    """One shard of each size on a node of its own."""
    shapes = [[ShardShape(rank, size, 4096, bytes([rank]) * 32)] for rank, size in enumerate(sizes)]
    layout = geometry.lay_out(shapes, parity)
    tables = [[bytes([rank]) * parityset.table_bytes(row[0])] for rank, row in enumerate(layout.positions)]
    return parityset.Description(SNAPSHOT, position, layout, tables)


def region(found: parityset.Description) -> bytes:
    return parityset.pack(found).ljust(parityset.meta_bytes(found.layout), b"\0")


@given(st.lists(st.integers(1, 1 << 20), min_size=2, max_size=9), st.data())
def test_a_description_comes_back_equal_and_fits_its_region(sizes: list[int], data: st.DataObject) -> None:
    packed = description(sizes, data.draw(st.integers(0, len(sizes) - 1)), data.draw(st.integers(1, len(sizes) - 1)))
    assert len(parityset.pack(packed)) <= parityset.meta_bytes(packed.layout)
    assert parityset.meta_bytes(packed.layout) % packed.layout.unit_bytes == 0
    assert parityset.read(region(packed)) == packed
    for rank in range(len(sizes)):
        assert parityset.table_of(packed, rank) == packed.tables[rank][0]


def test_pieces_follow_the_description_one_for_each_row() -> None:
    layout = description([5 << 20] * 4, parity=2).layout
    meta = parityset.meta_bytes(layout)
    assert [parityset.piece_offset(layout, row) for row in (0, 1)] == [meta, meta + layout.piece_bytes]
    assert parityset.file_bytes(layout) == meta + 2 * layout.piece_bytes


def test_the_largest_group_fits_too() -> None:
    packed = description([4096] * 255)
    assert parityset.read(region(packed)) == packed


@given(st.integers(0, 15), st.integers(0, 7))
def test_a_flipped_bit_in_the_head_is_refused_or_changes_nothing(byte: int, bit: int) -> None:
    packed = description([70_000, 9000])
    damaged = bytearray(region(packed))
    damaged[byte] ^= 1 << bit
    with pytest.raises(ProtocolError):
        parityset.read(bytes(damaged))


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        parityset.read(noise)


def test_tables_of_another_length_are_refused() -> None:
    packed = description([70_000, 9000])
    shorter = parityset.Description(SNAPSHOT, 0, packed.layout, [[b""], packed.tables[1]])
    with pytest.raises(ProtocolError, match="tables"):
        parityset.read(region(shorter))


def repacked(sound: parityset.Description, code: parityset.Code, version: int = parityset.VERSION) -> bytes:
    """The region as a release with another code would have made it."""
    body = msgspec.msgpack.encode((code, sound))
    return (struct.pack("<8sII", parityset.MAGIC, version, len(body)) + body).ljust(parityset.meta_bytes(sound.layout))


@pytest.mark.parametrize(
    "code",
    [
        parityset.Code("bytes", 0x11D, [0]),
        parityset.Code("planes", 0x11B, [0]),
        parityset.Code("planes", 0x11D, [1]),
        parityset.Code("planes", 0x11D, [0, 1]),
        parityset.Code("stripes", 0x11D, []),
    ],
)
def test_parity_by_another_code_is_refused_by_its_name(code: parityset.Code) -> None:
    sound = description([70_000, 9000])
    assert parityset.read(repacked(sound, parityset.code_of(sound.layout))) == sound
    with pytest.raises(ProtocolError, match=re.escape(f"made by {code}")):
        parityset.read(repacked(sound, code))


def test_the_code_of_a_group_is_named_by_layout_polynomial_and_exponents() -> None:
    assert parityset.code_of(description([4096] * 9, parity=3).layout) == parityset.Code("planes", 0x11D, [0, 1, -1])
    assert parityset.code_of(description([4096] * 9, parity=5).layout) == parityset.Code("bytes", 0x11D, [])


def test_a_set_of_the_version_before_is_refused_with_a_sentence() -> None:
    sound = description([70_000, 9000])
    with pytest.raises(ProtocolError, match="version 1, and this release reads version 2 only: nothing is decoded"):
        parityset.read(repacked(sound, parityset.code_of(sound.layout), version=1))


def test_a_rank_that_is_not_in_the_group_has_no_table() -> None:
    with pytest.raises(KeyError):
        parityset.table_of(description([4096, 4096]), 7)
