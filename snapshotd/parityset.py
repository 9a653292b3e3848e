"""What stands in a slot of a parity arena: a description of all it protects, then the pieces of parity.

    0           "SNPARITY" version(4) length(4), then `length` bytes of msgpack (`Description`), zeros to whole units
    meta_bytes  the pieces of rows 0 … m-1 that this position owns (`Stripes.owned`), `piece_bytes` each

The description carries the identity, length and table of block CRCs of every shard of the group, so that a decoded
shard can be verified by it and by nothing else. Before it stands the code by which the pieces were made, so that a
release with another code refuses them instead of decoding noise. Pure; whoever reads one trusts nothing.
"""

from __future__ import annotations

import struct

import msgspec
from msgspec import Struct

from snapshotd import codec, geometry
from snapshotd.errors import ProtocolError
from snapshotd.manifest import round_up
from snapshotd.wire import GroupLayout, ShardShape, SnapshotId

MAGIC = b"SNPARITY"
VERSION = 2  # 1 had no `Code`, and the coefficients of a Cauchy matrix in bytes for every group
_HEAD = struct.Struct("<8sII")
HEAD_BYTES = _HEAD.size
CRC_BYTES = 4


class Description(Struct, frozen=True, array_like=True):
    """`tables[p][i]` are the CRC32C words of the i-th shard of position p, little endian."""

    snapshot: SnapshotId
    position: int
    layout: GroupLayout
    tables: list[list[bytes]]


class Code(Struct, frozen=True, array_like=True):
    """How the pieces were made: layout of the elements, polynomial of their field, exponents of the parity rows in
    planes (none in bytes: those rows are the Cauchy matrix of docs/codec.md)."""

    layout: str
    polynomial: int
    exponents: list[int]


class _Packed(Struct, frozen=True, array_like=True):
    code: Code
    description: Description


def code_of(layout: GroupLayout) -> Code:
    """The code that this release makes a group's parity by."""
    made = codec.Codec(len(layout.positions) - layout.parity, layout.parity)
    return Code(made.layout, codec.POLYNOMIAL, made.exponents)


def table_bytes(shape: ShardShape) -> int:
    """Length of a shard's table of CRCs."""
    return -(-shape.file_bytes // shape.block_bytes) * CRC_BYTES


def meta_bytes(layout: GroupLayout) -> int:
    """Length of the description's region: whole units, the same for every position."""
    tables = sum(table_bytes(shape) + 16 for shapes in layout.positions for shape in shapes)
    rows = 8 * len(layout.positions)  # each row's own length
    return round_up(HEAD_BYTES + 256 + rows + len(msgspec.msgpack.encode(layout)) + tables, layout.unit_bytes)


def file_bytes(layout: GroupLayout) -> int:
    """Length of a whole parity set."""
    return meta_bytes(layout) + layout.parity * layout.piece_bytes


def piece_offset(layout: GroupLayout, row: int) -> int:
    """Where the piece of this parity row begins in the set."""
    return meta_bytes(layout) + row * layout.piece_bytes


def pack(description: Description) -> bytes:
    """The description's region, without the zeros behind it. ValueError if it does not fit (it always does)."""
    body = msgspec.msgpack.encode(_Packed(code_of(description.layout), description))
    packed = _HEAD.pack(MAGIC, VERSION, len(body)) + body
    if len(packed) > meta_bytes(description.layout):
        raise ValueError(f"a description of {len(packed)} bytes exceeds its region")
    return packed


def body_bytes(head: bytes, room_bytes: int) -> int:
    """Length of what follows the head. ProtocolError if this is no parity set, or claims more than its room."""
    if len(head) < HEAD_BYTES:
        raise ProtocolError("parity", "a parity set is too short to have a description")
    magic, version, length = _HEAD.unpack_from(head)
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(
            "parity",
            f"a parity set begins with {magic!r}, version {version}, and this release reads version {VERSION} only: "
            f"nothing is decoded from it; the next snapshot makes a new one",
        )
    if length > room_bytes - HEAD_BYTES:
        raise ProtocolError("parity", f"a parity set's description claims {length} bytes in a room of {room_bytes}")
    return int(length)


def read(view: bytes | memoryview) -> Description:
    """The description at the beginning of a parity set. ProtocolError if it is not one that `pack` could have made."""
    length = body_bytes(bytes(view[:HEAD_BYTES]), len(view))
    try:
        packed = msgspec.msgpack.decode(bytes(view[HEAD_BYTES : HEAD_BYTES + length]), type=_Packed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("parity", f"a parity set's description cannot be read: {error}") from None
    found = packed.description
    layout = geometry.check(found.layout)
    if packed.code != code_of(layout):
        raise ProtocolError(
            "parity",
            f"a parity set was made by {packed.code}, and this release decodes its group by {code_of(layout)}: nothing "
            f"is decoded from it, so run the release that made it, or lose the snapshot",
        )
    shapes = [[table_bytes(shape) for shape in row] for row in layout.positions]
    if not 0 <= found.position < len(layout.positions) or [[len(t) for t in row] for row in found.tables] != shapes:
        raise ProtocolError("parity", "a parity set's tables are not those of its layout")
    return found


def table_of(description: Description, rank: int) -> bytes:
    """The CRC words of one shard. KeyError for a rank that is not in the group."""
    for row, tables in zip(description.layout.positions, description.tables, strict=True):
        for shape, table in zip(row, tables, strict=True):
            if shape.rank == rank:
                return table
    raise KeyError(rank)
