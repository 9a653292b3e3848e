"""A slot's content is a safetensors file: this page lays one out, writes its header and reads one without trust.

`lay_out` gives every tensor its place; the header is padded with spaces to whole pages, so that data starts aligned
and never shifts. Every key carries `DCP_SHARDING_INFO`, which `torch.distributed.checkpoint.HuggingFaceStorageReader`
needs for the whole directory. Our own facts about a tensor (what it is, its true dtype, its global shape) stand in
`__metadata__["snapshotd"]`, so any reader of the format opens the file.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON, data without holes).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from snapshotd.errors import ProtocolError

PAGE_BYTES = 4096
HEADER_BYTES_MAX = 100 << 20  # the limit of the safetensors library
HOST_ALIGN_BYTES = 4096
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

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that are equal for two files of the same layout."""
        return hashlib.sha256(self.header).digest()


def lay_out(entries: Iterable[Entry], facts: Mapping[str, Any]) -> Manifest:
    """Give each tensor its place. Larger elements come first, so that all are aligned and no hole is left.

    `facts` is JSON that belongs to the whole file. ValueError for a name that comes twice.
    """
    ordered = sorted(entries, key=lambda entry: (not entry.facts.get("host"), -ELEMENT_BYTES[entry.dtype], entry.name))
    if len({entry.name for entry in ordered}) != len(ordered):
        names = [entry.name for entry in ordered]
        raise ValueError(f"two tensors are named {next(name for name in names if names.count(name) > 1)!r}")
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
        ends[entry.name] = start
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = _json(table).encode()
    capacity = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES
    header = (capacity - 8).to_bytes(8, "little") + text.ljust(capacity - 8)
    return Manifest(
        header=header,
        entries={entry.name: entry for entry in ordered},
        places={name: capacity + start for name, start in ends.items()},
        file_bytes=capacity + end,
        facts=dict(facts),
    )


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
    header = bytes(view[: 8 + length])
    try:
        return _read_table(header, json.loads(header[8:]), file_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ProtocolError(
            "manifest", f"a snapshot's header cannot be read ({type(error).__name__}: {error})"
        ) from None


def _read_table(header: bytes, table: dict[str, Any], file_bytes: int) -> Manifest:
    metadata = table.pop("__metadata__")
    facts = json.loads(metadata["snapshotd"])
    tensors = facts.pop("tensors")
    offsets = json.loads(metadata["DCP_SHARDING_INFO"])
    entries: dict[str, Entry] = {}
    places: dict[str, int] = {}
    for name, row in table.items():
        own = dict(tensors[name])
        entry = Entry(
            name=name,
            dtype=str(row["dtype"]),
            shape=_shape(row["shape"]),
            offset=_shape(offsets[name]["saved_offsets"]),
            global_shape=_shape(own.pop("global_shape")),
            facts=own,
        )
        start, end = _shape(row["data_offsets"])
        if end - start != entry.size_bytes or len(header) + end > file_bytes or start > end:
            raise ValueError(f"tensor {name!r} has bytes {start} to {end} for shape {entry.shape} of {entry.dtype}")
        if not len(entry.shape) == len(entry.offset) == len(entry.global_shape):
            raise ValueError(f"tensor {name!r} has a shape, an offset and a global shape of different lengths")
        if any(o + n > g for o, n, g in zip(entry.offset, entry.shape, entry.global_shape)):
            raise ValueError(f"tensor {name!r} reaches beyond its global shape")
        entries[name], places[name] = entry, len(header) + start
    return Manifest(header=header, entries=entries, places=places, file_bytes=file_bytes, facts=facts)


def _shape(numbers: Any) -> tuple[int, ...]:
    shape = tuple(numbers)
    if any(type(number) is not int or number < 0 for number in shape):
        raise ValueError(f"{numbers!r} is no list of sizes")
    return shape


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
