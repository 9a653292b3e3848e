"""What is fuzzed: each parser of bytes from outside, with what must hold of it whatever the bytes are.

A target takes bytes and returns; whatever it raises is a finding. It says no by the one error that its callers expect,
and what it believes must stand up to a second look: it can be said again, and other readers agree. `seeds` are sound
inputs to begin from; those that once were findings are kept in `corpus/`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors
from msgspec import inspect

from snapshotd import _native, assist, config, geometry, keys, manifest, parityset, wire
from snapshotd.errors import ConfigError, ProtocolError
from snapshotd.trust import Trust
from snapshotd.wire import GenerationId, GroupLayout, ShardShape, SnapshotId

CORPUS = Path(__file__).parent / "corpus"
SLOT_BYTES, BLOCK_BYTES, FIXED_BYTES = 8192, 4096, 512


@dataclass(frozen=True)
class Target:
    """One parser: its name, what is run on bytes, and sound inputs."""

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]

    def kept(self) -> list[Path]:
        """Inputs that were findings once."""
        return sorted((CORPUS / self.name).glob("*"))


# --- messages ---------------------------------------------------------------------------------------------------------


def sample(kind: inspect.Type) -> Any:
    """A small value of a type of messages, in plain values."""
    if isinstance(kind, inspect.StructType):
        tag = {kind.cls.__struct_config__.tag_field or "type": kind.tag} if kind.tag else {}
        fields = {field.encode_name: sample(field.type) for field in kind.fields}
        return list(fields.values()) if kind.array_like else tag | fields
    if isinstance(kind, inspect.IntType):
        return kind.ge or 0
    if isinstance(kind, inspect.FloatType):
        return 1.5
    if isinstance(kind, inspect.StrType):
        return "a" * max(1, kind.min_length or 0)
    if isinstance(kind, inspect.BytesType):
        return b"b" * max(1, kind.min_length or 0)
    if isinstance(kind, inspect.ListType):
        return [sample(kind.item_type)]
    if isinstance(kind, inspect.DictType):
        return {sample(kind.key_type): sample(kind.value_type)}
    if isinstance(kind, inspect.UnionType):
        return sample(next(one for one in kind.types if not isinstance(one, inspect.NoneType)))
    return False


def sealed(body: bytes) -> bytes:
    """A sound frame around any body."""
    return struct.pack("<4sHHII", wire.MAGIC, wire.WIRE_VERSION, 0, len(body), zlib.crc32(body)) + body


def read_messages(data: bytes) -> None:
    for unpack in (wire.unpack_request, wire.unpack_reply):
        for frame in (data, sealed(data)):
            with contextlib.suppress(ProtocolError):
                message = unpack(frame)
                said_again = wire.pack(message)
                assert wire.pack(unpack(said_again)) == said_again
                if isinstance(message, wire.Rebuild):
                    geometry.check(message.layout)
                if isinstance(message, wire.Combine):
                    _add_up(message)


def _add_up(ask: wire.Combine) -> None:
    """What is believed is whole: each term has bytes for every unit of the sum, and can be asked for again."""
    whole = manifest.round_up(ask.length, ask.unit_bytes)
    symbols = assist.symbols_of(ask)
    assert all(sum(span.length for span in symbol.spans) == whole for symbol in symbols)
    again = assist.ask_for(
        symbols, ask.length, job=ask.job, snapshot=ask.snapshot, code=ask.code, unit_bytes=ask.unit_bytes,
        window_bytes=ask.window_bytes,
    )  # fmt: skip
    assert assist.symbols_of(again) == symbols


def sums() -> list[bytes]:
    """Sums that make sense: a file that ends within a unit and zeros behind it, a slot named twice, one window and a
    part of another."""
    holdings = [wire.Holding("127.0.0.1:1", "node", b"a" * 16, 0), wire.Holding("127.0.0.1:2", "other", b"b" * 16, 1)]
    made = wire.SnapshotId(wire.GenerationId(1, b"n" * 16), 7)
    spans = [wire.SumSpan(0, 0, 5000), wire.SumSpan(None, 0, 3192), wire.SumSpan(0, 8192, 4096)]
    terms = [wire.SumTerm(1, spans), wire.SumTerm(255, [wire.SumSpan(1, 4096, 12288)])]
    ask = wire.Combine("job", made, "planes", 4096, 8192, 9000, holdings, terms)
    return [msgspec.msgpack.encode(ask)]


def messages() -> list[bytes]:
    kinds = inspect.type_info(wire.Message)
    assert isinstance(kinds, inspect.UnionType)
    bodies = [msgspec.msgpack.encode(sample(kind)) for kind in kinds.types]
    bodies += sums()
    return [*bodies, *map(sealed, bodies)]


# --- arenas -----------------------------------------------------------------------------------------------------------


@functools.cache
def whole_arena() -> bytes:
    """An arena with one published slot, as a file."""
    fd = os.memfd_create("fuzz")
    try:
        os.ftruncate(fd, _native.Arena.bytes_needed(2, SLOT_BYTES, BLOCK_BYTES))
        _native.Arena.format(
            fd, arena_id=b"a" * 16, job="fuzz", local_index=0, slots=2, slot_bytes=SLOT_BYTES, block_bytes=BLOCK_BYTES
        )
        arena = _native.Arena(fd, writable=True)
        slot = arena.claim(generation=1, nonce=b"n" * 16, step=1, rank=0, world_size=1, fingerprint=b"f" * 32)
        arena.set_block_crcs(slot, 5000)
        arena.publish(slot, 5000)
        arena.close()
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def patched(data: bytes) -> bytes:
    """The whole arena with patches: a byte of flags (1: the fixed part is sealed again; 2: another length), then any
    number of offset (u16), length (u8) and bytes."""
    blob, rest = bytearray(whole_arena()), memoryview(data)[1:]
    while len(rest) > 3:
        offset, length = struct.unpack_from("<HB", rest)
        blob[offset : offset + len(rest[3 : 3 + length])] = rest[3 : 3 + length]
        rest = rest[3 + length :]
    if data[:1] and data[0] & 1:
        blob[FIXED_BYTES - 4 : FIXED_BYTES] = struct.pack("<I", _native.crc32c(bytes(blob[: FIXED_BYTES - 4])))
    if data[:1] and data[0] & 2:
        del blob[data[0] * 100 :]
    return bytes(blob)


def read_arena(data: bytes) -> None:
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, patched(data))
        with contextlib.suppress(_native.ArenaFormatError):
            arena = _native.Arena(fd, writable=True)
            try:
                _look_through(arena)
            finally:
                arena.close()
    finally:
        os.close(fd)


def _look_through(arena: _native.Arena) -> None:
    with contextlib.suppress(_native.ArenaFormatError):
        arena.owner()
    for index in range(arena.slots):
        info = arena.slot(index)
        with contextlib.suppress(_native.ArenaFormatError):
            arena.block_crcs(index)
            arena.verify(index)
            arena.crc_words(index)
        if info.sound:
            assert 1 <= info.file_bytes <= arena.slot_bytes
            with arena.slot_view(index) as view, contextlib.suppress(ProtocolError):
                manifest.read(view, info.file_bytes)
            with arena.slot_view(index) as view, contextlib.suppress(ProtocolError):
                parityset.read(view)
        arena.advance(index, _native.FULL, _native.COMMITTED)
        arena.empty(index)
        assert arena.slot(index).state == _native.EMPTY


def arenas() -> list[bytes]:
    # Where each thing stands: csrc/native/header.hpp.
    places = (0, 8, 12, 16, 24, 32, 40, 64, 512, 768, 1024, 4096, 4104, 4136, 4176, 4184, 12288)
    return [b"\0", b"\1", *(struct.pack("<BHB", 1, place, 8) + bytes(8) for place in places)]


# --- what lies in slots -----------------------------------------------------------------------------------------------


def read_manifest(data: bytes) -> None:
    """A file that is believed is one for the safetensors library too, and holds what it says."""
    for text in (data, len(data).to_bytes(8, "little") + data):
        try:
            found = manifest.read(memoryview(text), len(text))
        except ProtocolError:
            continue
        assert {name for name, _ in safetensors.deserialize(text)} == set(found.entries)
        assert all(place + found.span(name)[1] <= len(text) for name, place in found.places.items())
        json.dumps(found.facts)


def manifests() -> list[bytes]:
    entries = [
        manifest.Entry("rank0/host", "U8", (4096,), (0,), (4096,), {"host": True}),
        manifest.Entry("weight", "BF16", (2, 3), (2, 0), (4, 3), {"kind": "model"}),
    ]
    made = manifest.lay_out(entries, {"rank": 0})
    whole = made.header.rstrip()[8:] + b" " * 8
    # Without the padding to a page, so that most of what is mutated means something.
    return [len(whole).to_bytes(8, "little") + whole + bytes(4096 + 12), made.header + bytes(4096 + 12)]


def read_parity(data: bytes) -> None:
    """With the head that belongs to it, so that most of what is tried reaches the description."""
    head = struct.pack("<8sII", parityset.MAGIC, parityset.VERSION, len(data))
    for text in (data, head + data):
        with contextlib.suppress(ProtocolError):
            found = parityset.read(text)
            assert parityset.read(parityset.pack(found)) == found


def parity_sets() -> list[bytes]:
    shapes = [[ShardShape(rank, 5000, 4096, b"f" * 32)] for rank in range(3)]
    layout: GroupLayout = geometry.lay_out(shapes, 1)
    snapshot = SnapshotId(GenerationId(1, b"n" * 16), 7)
    packed = parityset.pack(parityset.Description(snapshot, 1, layout, [[b"c" * 8]] * 3))
    return [packed, packed[parityset.HEAD_BYTES :]]


# --- files of the daemon ----------------------------------------------------------------------------------------------


def read_settings(data: bytes) -> None:
    """As a file, and each line as a value of every kind."""
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        with contextlib.suppress(ConfigError):
            config.load_daemon_config({}, {}, Path(f"/proc/self/fd/{fd}")).check()
    finally:
        os.close(fd)
    text = data.decode(errors="surrogateescape").replace("\0", "")
    for line in text.splitlines()[:8]:
        name, _, value = line.partition("=")
        for parse in (config.parse_bytes, config.parse_bandwidth, functools.partial(config.parse_address, "listen")):
            with contextlib.suppress(ConfigError):
                parse(value or name)
        with contextlib.suppress(ConfigError):
            config.load_daemon_config({}, {f"SNAPSHOTD_{name.strip().upper()}": value}).check()
        with contextlib.suppress(ConfigError):
            config.load_client_config({f"SNAPSHOTD_{name.strip().upper()}": value})


def settings() -> list[bytes]:
    example = Path(__file__).parents[2] / "deploy" / "snapshotd.toml"
    lines = [line.lstrip("#") for line in example.read_text().splitlines() if " = " in line]
    return ["\n".join(lines).encode(), *(line.encode() for line in lines)]


@functools.cache
def drawn() -> keys.Keys:
    return keys.Keys.draw("fuzz")


def read_trust(data: bytes) -> None:
    """Whom an earlier daemon believed: nothing in it keeps the next one from serving the others."""
    believed = Trust.unpacked(data, 0.0)
    assert Trust.unpacked(believed.packed(), 0.0).certificates == believed.certificates
    keys.serving(drawn().pem, believed.certificates)


def trusts() -> list[bytes]:
    place = wire.Place(b"n" * 16, "node", "127.0.0.1:1", "127.0.0.1:2", [0], drawn().badge)
    book = Trust({"job": [place]})
    return [book.packed(), b""]


def read_keys(data: bytes) -> None:
    """Keys of an earlier daemon are keys, or none: then new ones are drawn. Also where the checksum is right."""
    for text in (data, keys.sealed(data)):
        found = keys.Keys.unpacked(text)
        if found is not None:
            keys.serving(found.pem, [found.badge.certificate])
            keys.pin(found.pem, found.badge.certificate)
            assert keys.Keys.unpacked(found.packed()) == found


def key_files() -> list[bytes]:
    return [drawn().packed(), drawn().packed()[4:]]


TARGETS = {
    one.name: one
    for one in (
        Target("wire", read_messages, messages),
        Target("arena", read_arena, arenas),
        Target("manifest", read_manifest, manifests),
        Target("parityset", read_parity, parity_sets),
        Target("config", read_settings, settings),
        Target("trust", read_trust, trusts),
        Target("keys", read_keys, key_files),
    )
}


def mutations(seeds: list[bytes], draw: Callable[[int], int]) -> Iterator[bytes]:
    """Inputs without end, made of others; `draw(n)` gives a number below n. Nothing is learned on the way."""
    numbers = (0, 1, 0x7F, 0x80, 0xFF, 0xC0, 0xDC, 0xDF, 0xCA)  # also kinds of msgpack
    while True:
        data = bytearray(seeds[draw(len(seeds))])
        for _ in range(1 + draw(6)):
            at, kind = draw(len(data) + 1), draw(6)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << draw(8)
            elif kind == 1 and at < len(data):
                data[at] = numbers[draw(len(numbers))]
            elif kind == 2:
                del data[at : at + 1 + draw(16)]
            elif kind == 3:
                data[at:at] = bytes(draw(256) for _ in range(1 + draw(8)))
            elif kind == 4:
                other = seeds[draw(len(seeds))]
                begin = draw(len(other) + 1)
                data[at:at] = other[begin : begin + draw(64)]
            elif data:
                data[at:at] = bytes([data[at - 1]]) * (1 + draw(64))
        yield bytes(data)
