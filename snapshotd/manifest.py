"""A slot's content is a safetensors file: this page lays one out, writes its header and reads one without trust.

`lay_out` gives every tensor its place; the header is padded with spaces to whole pages, so that data starts aligned
and never shifts. Every key carries `DCP_SHARDING_INFO`, which `torch.distributed.checkpoint.HuggingFaceStorageReader`
needs for the whole directory. Our own facts about a tensor (what it is, its true dtype, its global shape) stand in
`__metadata__["snapshotd"]`, so any reader of the format opens the file.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON, data without holes).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from snapshotd.errors import ProtocolError

PAGE_BYTES = 4096
HEADER_BYTES_MAX = 100_000_000  # the limit of the safetensors library
HOST_ALIGN_BYTES = 4096
DIMENSIONS_MAX = 64  # torch's own limit
SIZE_MAX = 2**62
BLOCK_BYTES_MIN, BLOCK_BYTES_MAX = 4096, 1 << 20

ELEMENT_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `dtype` is a safetensors code, `offset` its place in a global tensor of `global_shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]

    def check(self) -> Entry:
        """Self, if it can stand in a file. ValueError says what is wrong."""
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"tensor {self.name!r} has dtype {self.dtype!r}, which the format does not know")
        if self.name.encode() == b"__metadata__":
            raise ValueError("`__metadata__` cannot be a tensor's name")
        if not len(self.shape) == len(self.offset) == len(self.global_shape) <= DIMENSIONS_MAX:
            raise ValueError(f"tensor {self.name!r} has a shape, an offset and a global shape of different lengths")
        if not all(0 <= size <= SIZE_MAX for size in (*self.shape, *self.offset, *self.global_shape)):
            raise ValueError(f"tensor {self.name!r} has a size out of range")
        if self.size_bytes > SIZE_MAX:
            raise ValueError(f"tensor {self.name!r} is larger than any memory")
        reach = zip(self.offset, self.shape, self.global_shape, strict=True)
        if any(begin + length > whole for begin, length, whole in reach):
            raise ValueError(f"tensor {self.name!r} reaches beyond its global shape")
        return self


@dataclass(frozen=True)
class Manifest:
    """A file's layout. `places` are offsets from the file's first byte; `header` is what stands before the data."""

    header: bytes
    entries: Mapping[str, Entry]
    places: Mapping[str, int]
    file_bytes: int
    facts: Mapping[str, Any]

    def span(self, name: str) -> tuple[int, int]:
        """First byte and length of a tensor in the file."""
        return self.places[name], self.entries[name].size_bytes

    @cached_property  # asked for at every cut, and the header of 10,000 tensors is a few megabytes
    def fingerprint(self) -> bytes:
        """32 bytes that are equal for two files of the same layout."""
        return hashlib.sha256(self.header).digest()


def lay_out(entries: Iterable[Entry], facts: Mapping[str, Any]) -> Manifest:
    """Give each tensor its place. Larger elements come first, so that all are aligned and no hole is left.

    An entry with the fact `host` comes before all others; its size is a multiple of `HOST_ALIGN_BYTES`. `facts` is JSON
    that belongs to the whole file. ValueError for a name that comes twice, an unknown dtype or a shape that cannot be.
    """
    ordered = sorted((entry.check() for entry in entries), key=_order)
    for before, after in itertools.pairwise(sorted(entry.name for entry in ordered)):
        if before == after:
            raise ValueError(f"two tensors are named {before!r}")
    if "tensors" in facts or any("global_shape" in entry.facts for entry in ordered):
        raise ValueError("the facts `tensors` (of a file) and `global_shape` (of a tensor) are the manifest's own")
    table: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": _json({entry.name: {"saved_offsets": list(entry.offset)} for entry in ordered}),
            "snapshotd": _json(
                {
                    **facts,
                    "tensors": {e.name: {**e.facts, "global_shape": list(e.global_shape)} for e in ordered},
                }
            ),
        }
    }
    ends, end = {}, 0
    for entry in ordered:
        start, end = end, end + entry.size_bytes
        if start % (HOST_ALIGN_BYTES if entry.facts.get("host") else ELEMENT_BYTES[entry.dtype]):
            raise ValueError(f"tensor {entry.name!r} follows host state that fills no whole {HOST_ALIGN_BYTES} bytes")
        ends[entry.name] = start
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = _json(table).encode()
    capacity = round_up(8 + len(text), PAGE_BYTES)
    if capacity > HEADER_BYTES_MAX:
        raise ValueError(f"{len(ordered)} tensors need a header of {capacity} bytes, above {HEADER_BYTES_MAX}")
    header = (capacity - 8).to_bytes(8, "little") + text.ljust(capacity - 8)
    return Manifest(
        header=header,
        entries={entry.name: entry for entry in ordered},
        places={name: capacity + start for name, start in ends.items()},
        file_bytes=capacity + end,
        facts=dict(facts),
    )


def _order(entry: Entry) -> tuple[bool, int, str]:
    return not entry.facts.get("host"), -ELEMENT_BYTES[entry.dtype], entry.name


def block_bytes_for(file_bytes: int) -> int:
    """Checksum block for a state of this size: 1 MiB, smaller for small states so that padding stays under 2 %."""
    block = BLOCK_BYTES_MAX
    while block > BLOCK_BYTES_MIN and block * 64 > file_bytes:
        block //= 2
    return block


def round_up(length: int, unit: int) -> int:
    """The next multiple of `unit` at or above `length`."""
    return -(-length // unit) * unit


def read(view: memoryview, file_bytes: int) -> Manifest:
    """The manifest of a file in memory. ProtocolError if it is not one that `lay_out` could have written."""
    if not 8 <= file_bytes <= len(view):
        raise ProtocolError("manifest", f"a snapshot claims {file_bytes} bytes in a slot of {len(view)}")
    length = int.from_bytes(view[:8], "little")
    if length > min(HEADER_BYTES_MAX, file_bytes - 8):
        raise ProtocolError("manifest", f"a snapshot's header claims {length} bytes in a file of {file_bytes}")
    return read_header(bytes(view[: 8 + length]), file_bytes)


def read_header(header: bytes, file_bytes: int) -> Manifest:
    """The manifest of a file of which only the header (its length included) is here. ProtocolError as `read`."""
    length = int.from_bytes(header[:8], "little")
    if length > min(HEADER_BYTES_MAX, file_bytes - 8) or len(header) != 8 + length:
        raise ProtocolError("manifest", f"a snapshot's header claims {length} bytes and has {len(header) - 8}")
    try:
        return _read_table(header, json.loads(header[8:].decode(), object_pairs_hook=_once_each), file_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(
            "manifest", f"a snapshot's header cannot be read ({type(error).__name__}: {error})"
        ) from None


def _read_table(header: bytes, table: dict[str, Any], file_bytes: int) -> Manifest:
    metadata = table.pop("__metadata__")
    facts = json.loads(metadata["snapshotd"], object_pairs_hook=_once_each)
    tensors = facts.pop("tensors")
    offsets = json.loads(metadata["DCP_SHARDING_INFO"], object_pairs_hook=_once_each)
    if not table.keys() == tensors.keys() == offsets.keys():
        raise ValueError("its lists of tensors differ")
    entries = {name: _entry(name, row, tensors[name], offsets[name]) for name, row in table.items()}
    spans = {name: _shape(row["data_offsets"]) for name, row in table.items()}
    end = _read_spans(entries, spans)
    if len(header) + end != file_bytes:
        raise ValueError(f"its tensors end at byte {len(header) + end} of {file_bytes}")
    places = {name: len(header) + span[0] for name, span in spans.items()}
    return Manifest(header=header, entries=entries, places=places, file_bytes=file_bytes, facts=facts)


def _entry(name: str, row: dict[str, Any], facts: dict[str, Any], offset: dict[str, Any]) -> Entry:
    return Entry(
        name=name,
        dtype=str(row["dtype"]),
        shape=_shape(row["shape"]),
        offset=_shape(offset["saved_offsets"]),
        global_shape=_shape(facts["global_shape"]),
        facts={key: value for key, value in facts.items() if key != "global_shape"},
    ).check()


def _read_spans(entries: Mapping[str, Entry], spans: Mapping[str, tuple[int, ...]]) -> int:
    """The end of the last tensor. ValueError for a hole, an overlap, or a length that is not the tensor's."""
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end or stop - start != entries[name].size_bytes:
            raise ValueError(f"tensor {name!r} has bytes {start} to {stop}, and the one before it ends at {end}")
        if start % ELEMENT_BYTES[entries[name].dtype]:
            raise ValueError(f"tensor {name!r} is not aligned to its elements")
        end = stop
    return end


def _shape(numbers: Any) -> tuple[int, ...]:
    if type(numbers) is not list or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{str(numbers)[:60]} is no list of sizes")
    return tuple(numbers)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON leaves open which of two equal keys counts, so neither does."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return table


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
