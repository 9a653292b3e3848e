"""A laid-out file opens in any safetensors reader with the right bytes, and a damaged header is never believed."""

from __future__ import annotations

import itertools
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from snapshotd import manifest
from snapshotd.errors import ProtocolError
from snapshotd.manifest import ELEMENT_BYTES, HOST_ALIGN_BYTES, PAGE_BYTES, Entry, Manifest, lay_out, read

TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
}  # fmt: skip


def whole(name: str, dtype: str, *shape: int, **facts: Any) -> Entry:
    """A tensor that no other rank has a part of."""
    return Entry(name, dtype, shape, (0,) * len(shape), shape, facts)


def host(size_bytes: int) -> Entry:
    return whole("rank0/host", "U8", size_bytes, host=True)


def contents(laid: Manifest, seed: int = 0) -> dict[str, bytes]:
    """Different bytes for each tensor (0 and 1, so that they are valid booleans too)."""
    draw = random.Random(seed)
    return {name: bytes(draw.getrandbits(1) for _ in range(entry.size_bytes)) for name, entry in laid.entries.items()}


def file_of(laid: Manifest, bytes_of: dict[str, bytes]) -> bytes:
    """The whole file, written as the copy engine does: each tensor at its place."""
    data = bytearray(laid.file_bytes)
    data[: len(laid.header)] = laid.header
    for name, raw in bytes_of.items():
        start, length = laid.span(name)
        assert length == len(raw)
        data[start : start + length] = raw
    return bytes(data)


def read_file(data: bytes) -> Manifest:
    return read(memoryview(data), len(data))


# --- what is laid out -------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    """Tensors of a rank: shards of larger ones, empty ones, scalars, host state in front."""
    found = []
    for name in draw(st.lists(names, max_size=7, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        offset = tuple(draw(st.integers(0, 4)) for _ in shape)
        beyond = tuple(draw(st.integers(0, 4)) for _ in shape)
        size = tuple(map(sum, zip(shape, offset, beyond, strict=True)))
        facts = draw(st.dictionaries(st.sampled_from(["kind", "alias"]), st.integers(0, 9) | st.text(max_size=4)))
        found.append(Entry(name, draw(st.sampled_from(sorted(ELEMENT_BYTES))), shape, offset, size, facts))
    if draw(st.booleans()):
        found.insert(draw(st.integers(0, len(found))), whole("\0host", "U8", HOST_ALIGN_BYTES, host=True))
    return found


facts = st.dictionaries(st.sampled_from(["rank", "world_size", "groups"]), st.integers(0, 99) | st.text(max_size=6))


@settings(max_examples=200)
@given(entries(), facts)
def test_what_is_read_is_what_was_laid_out(tensors: list[Entry], about: dict[str, Any]) -> None:
    laid = lay_out(tensors, about)
    again = read_file(file_of(laid, contents(laid)))
    assert again == laid and again.fingerprint == laid.fingerprint


@settings(max_examples=200)
@given(entries())
def test_tensors_are_aligned_and_leave_no_hole_and_no_trailing_byte(tensors: list[Entry]) -> None:
    laid = lay_out(tensors, {})
    assert len(laid.header) % PAGE_BYTES == 0
    end = len(laid.header)
    for start, length, name in sorted((*laid.span(name), name) for name in laid.entries):
        assert start == end
        assert start % ELEMENT_BYTES[laid.entries[name].dtype] == 0
        end = start + length
    assert end == laid.file_bytes


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries())
def test_any_safetensors_reader_opens_the_file_with_the_right_bytes(tmp_path: Path, tensors: list[Entry]) -> None:
    laid = lay_out(tensors, {})
    expected = contents(laid)
    path = tmp_path / "rank0.safetensors"
    path.write_bytes(file_of(laid, expected))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(laid.entries)
        for name, entry in laid.entries.items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == TORCH_TYPES[entry.dtype]
            assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == expected[name]


def test_every_dtype_of_the_format_is_known_to_torch() -> None:
    assert ELEMENT_BYTES.keys() == TORCH_TYPES.keys()
    assert all(torch.empty((), dtype=TORCH_TYPES[code]).element_size() == size for code, size in ELEMENT_BYTES.items())


def test_host_state_comes_first_and_the_tensors_after_it_are_aligned() -> None:
    laid = lay_out([whole("w", "F64", 3), host(HOST_ALIGN_BYTES)], {})
    assert laid.span("rank0/host") == (len(laid.header), HOST_ALIGN_BYTES)
    assert laid.places["w"] % HOST_ALIGN_BYTES == 0


def test_the_header_is_padded_with_spaces_so_that_data_begins_on_a_page() -> None:
    laid = lay_out([whole(f"layer.{index}.weight", "BF16", 4, 4) for index in range(100)], {})
    (length,) = struct.unpack("<Q", laid.header[:8])
    assert length == len(laid.header) - 8 and len(laid.header) > PAGE_BYTES
    assert laid.header.endswith(b"  ") and json.loads(laid.header[8:])


def test_the_fingerprint_tells_layouts_apart() -> None:
    prints = {
        lay_out([whole("w", "F32", 4)], {}).fingerprint,
        lay_out([whole("w", "F32", 2, 2)], {}).fingerprint,
        lay_out([whole("w", "I32", 4)], {}).fingerprint,
        lay_out([whole("v", "F32", 4)], {}).fingerprint,
        lay_out([whole("w", "F32", 4, kind="param")], {}).fingerprint,
        lay_out([Entry("w", "F32", (4,), (0,), (8,))], {}).fingerprint,
        lay_out([Entry("w", "F32", (4,), (4,), (8,))], {}).fingerprint,
        lay_out([whole("w", "F32", 4)], {"rank": 1}).fingerprint,
    }
    assert len(prints) == 8
    assert lay_out([whole("w", "F32", 4)], {}).fingerprint in prints


@pytest.mark.parametrize(
    ("tensors", "about", "sentence"),
    [
        ([whole("w", "F32", 1), whole("w", "I8", 2)], {}, "two tensors are named 'w'"),
        ([whole("w", "F4", 2)], {}, "dtype 'F4'"),
        ([whole("__metadata__", "U8", 2)], {}, "__metadata__"),
        ([whole("\ud800", "U8", 2)], {}, "surrogates"),
        ([Entry("w", "F32", (2,), (0, 0), (2,))], {}, "different lengths"),
        ([Entry("w", "F32", (2,), (3,), (4,))], {}, "beyond its global shape"),
        ([Entry("w", "F32", (-2,), (0,), (4,))], {}, "out of range"),
        ([host(99), whole("w", "F32", 1)], {}, "no whole 4096 bytes"),
        ([whole("w", "F32", 1, global_shape=1)], {}, "manifest's own"),
        ([whole("w", "F32", 1)], {"tensors": 1}, "manifest's own"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(tensors: list[Entry], about: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        lay_out(tensors, about)


def test_a_header_beyond_the_limit_of_the_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "HEADER_BYTES_MAX", 2 * PAGE_BYTES)
    with pytest.raises(ValueError, match="above 8192"):
        lay_out([whole(f"layer.{index}", "F32", 1) for index in range(200)], {})


@given(st.integers(0, 1 << 34))
def test_padding_to_whole_blocks_stays_small(file_bytes: int) -> None:
    block = manifest.block_bytes_for(file_bytes)
    assert manifest.BLOCK_BYTES_MIN <= block <= manifest.BLOCK_BYTES_MAX and block % 512 == 0
    padded = manifest.round_up(file_bytes, block)
    assert 0 <= padded - file_bytes < block
    assert block == manifest.BLOCK_BYTES_MIN or padded <= file_bytes * 1.02


# --- what must not be believed ------------------------------------------------------------------------


def sample() -> tuple[Manifest, bytes]:
    tensors = [host(HOST_ALIGN_BYTES), whole("w", "F32", 3, 2), Entry("b", "BF16", (2,), (4,), (8,), {"kind": "param"})]
    laid = lay_out([*tensors, whole("n", "I64"), whole("e", "F32", 0)], {"rank": 0})
    return laid, file_of(laid, contents(laid))


def with_table(change: Any) -> bytes:
    """The sample file with its header's JSON changed, at the same length."""
    laid, data = sample()
    table = json.loads(laid.header[8:])
    text = json.dumps(change(table) or table).encode()
    assert len(text) <= len(laid.header) - 8
    return data[:8] + text.ljust(len(laid.header) - 8) + data[len(laid.header) :]


def own(table: dict[str, Any], change: Any) -> None:
    """Change the part of the header that only we read."""
    inner = json.loads(table["__metadata__"]["snapshotd"])
    change(inner)
    table["__metadata__"]["snapshotd"] = json.dumps(inner)


def drop(table: dict[str, Any], name: str) -> None:
    """Take a tensor out everywhere, so that only its bytes are left."""
    del table[name]
    own(table, lambda inner: inner["tensors"].pop(name))
    offsets = json.loads(table["__metadata__"]["DCP_SHARDING_INFO"])
    del offsets[name]
    table["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)


def set_row(name: str, **row: Any) -> Any:
    return lambda table: table[name].update(row)


BAD_TABLES: dict[str, Any] = {
    "a hole": lambda table: table["w"].update(data_offsets=[table["w"]["data_offsets"][0] + 8] * 2, shape=[0, 2]),
    "an overlap": lambda table: table["w"].update(data_offsets=table["n"]["data_offsets"], shape=[2, 1]),
    "trailing bytes": lambda table: drop(table, "b"),
    "beyond the end": set_row("b", data_offsets=[1 << 40, (1 << 40) + 4]),
    "an unknown dtype": set_row("w", dtype="F7"),
    "a dtype that is no text": set_row("w", dtype={}),
    "another size": set_row("w", shape=[3, 3]),
    "a negative size": set_row("w", shape=[-3, -2]),
    "a fraction of a size": set_row("w", shape=[3.0, 2]),
    "a truth value for a size": set_row("w", shape=[True, 6]),
    "a shape that is text": set_row("e", shape=""),
    "a shape that is an object": set_row("e", shape={}),
    "sizes whose product is huge": set_row("w", shape=[1 << 60] * 64),
    "a thousand dimensions": set_row("e", shape=[0] * 1000),
    "three offsets": set_row("w", data_offsets=[0, 1, 2]),
    "backward offsets": lambda table: table["w"].update(data_offsets=table["w"]["data_offsets"][::-1]),
    "no metadata": lambda table: table.pop("__metadata__"),
    "no facts": lambda table: table["__metadata__"].pop("snapshotd"),
    "facts that are a list": lambda table: table["__metadata__"].update(snapshotd="[]"),
    "facts that nest": lambda table: table["__metadata__"].update(snapshotd="[" * 3000),
    "no sharding": lambda table: table["__metadata__"].pop("DCP_SHARDING_INFO"),
    "sharding of others": lambda table: table["__metadata__"].update(DCP_SHARDING_INFO='{"x":{"saved_offsets":[0]}}'),
    "sharding that is null": lambda table: table["__metadata__"].update(DCP_SHARDING_INFO="null"),
    "a tensor without facts": lambda table: own(table, lambda inner: inner["tensors"].pop("w")),
    "facts without a tensor": lambda table: own(table, lambda inner: inner["tensors"].update(x={"global_shape": []})),
    "a global shape too small": lambda table: own(table, lambda i: i["tensors"]["w"].update(global_shape=[1, 1])),
    "a global shape of other length": lambda table: own(table, lambda i: i["tensors"]["w"].update(global_shape=[9])),
    "no global shape": lambda table: own(table, lambda inner: inner["tensors"]["w"].pop("global_shape")),
    "a row that is text": lambda table: table.update(w="row"),
    "a list": lambda table: [table],
}


@pytest.mark.parametrize("change", BAD_TABLES.values(), ids=[name.replace(" ", "_") for name in BAD_TABLES])
def test_a_header_that_lies_is_refused(change: Any) -> None:
    with pytest.raises(ProtocolError) as caught:
        read_file(with_table(lambda table: out if isinstance(out := change(table), list) else None))
    assert caught.value.reason == "manifest"


def test_the_sample_itself_is_fine() -> None:
    laid, data = sample()
    assert read_file(data) == laid
    assert read_file(with_table(lambda table: None)).entries == laid.entries


def test_a_name_that_stands_twice_is_refused() -> None:
    """JSON leaves open which one counts, and another reader may take the other."""
    laid, data = sample()
    text = laid.header[8:].decode().rstrip().removesuffix("}")
    row = {**json.loads(laid.header[8:])["w"], "shape": [2, 3]}
    text += f',"w":{json.dumps(row)}}}'
    with pytest.raises(ProtocolError, match="twice"):
        read_file(data[:8] + text.encode().ljust(len(laid.header) - 8) + data[len(laid.header) :])


def test_a_header_in_another_encoding_is_refused() -> None:
    laid, data = sample()
    text = json.dumps(json.loads(laid.header[8:])).encode("utf-16")
    header = struct.pack("<Q", len(text)) + text
    with pytest.raises(ProtocolError):
        read_file(header + data[len(laid.header) :])


@pytest.mark.parametrize("file_bytes", [0, 7, 8, 100, 1 << 40])
def test_a_length_that_cannot_be_is_refused(file_bytes: int) -> None:
    _, data = sample()
    with pytest.raises(ProtocolError):
        read(memoryview(data), file_bytes)


def test_a_slot_may_be_longer_than_its_file() -> None:
    laid, data = sample()
    assert read(memoryview(data + bytes(5000)), len(data)) == laid


def test_every_truncation_of_the_header_is_refused() -> None:
    laid, data = sample()
    for length in range(0, len(laid.header), 7):
        with pytest.raises(ProtocolError):
            read_file(data[:length])


@settings(max_examples=300)
@given(st.binary(max_size=300), st.none() | st.integers(0, 2**64 - 1))
def test_random_bytes_are_refused(noise: bytes, length: int | None) -> None:
    data = (struct.pack("<Q", length) if length is not None else struct.pack("<Q", len(noise))) + noise
    with pytest.raises(ProtocolError):
        read_file(data)


@settings(max_examples=500)
@given(st.data())
def test_a_header_with_changed_bytes_is_refused_or_still_a_sound_file(data: st.DataObject) -> None:
    laid, whole_file = sample()
    text_bytes = 8 + len(laid.header[8:].rstrip())
    damaged = bytearray(whole_file)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, text_bytes - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_file(bytes(damaged))
    except ProtocolError:
        return
    spans = sorted(found.span(name) for name in found.entries)
    assert [start for start, _ in spans] == list(
        itertools.accumulate((length for _, length in spans[:-1]), initial=len(found.header))
    )
    assert sum(spans[-1]) == len(damaged)
    assert all(
        entry.size_bytes == math.prod(entry.shape) * ELEMENT_BYTES[entry.dtype] for entry in found.entries.values()
    )


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_what_we_believe_other_readers_believe_too(tmp_path: Path, data: st.DataObject) -> None:
    laid, whole_file = sample()
    place = data.draw(st.integers(0, len(laid.header[8:].rstrip()) + 7))
    damaged = bytearray(whole_file)
    damaged[place] = data.draw(st.sampled_from(b'"{}[]0129,: \\ax'))
    try:
        found = read_file(bytes(damaged))
    except ProtocolError:
        return
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(found.entries)
    except SafetensorError as error:
        pytest.fail(f"byte {place}: {error}")


# --- the directory of all ranks -----------------------------------------------------------------------


def test_the_files_of_all_ranks_load_with_the_reader_of_torch(tmp_path: Path) -> None:
    """Shards with offsets, an uneven and an empty one, scalars, host state and every dtype, in one directory."""
    rows = {0: (0, 3), 1: (3, 2), 2: (5, 0)}
    generator = torch.Generator().manual_seed(7)
    expected = {
        f"sharded.{code}": torch.randint(0, 2, (5, 4), generator=generator).to(dtype)
        for code, dtype in TORCH_TYPES.items()
    }
    expected["moment"] = torch.randn(5, 2, 2, generator=generator)
    for rank, (first, count) in rows.items():
        expected[f"rank{rank}/step"] = torch.tensor(float(100 + rank))
        expected[f"rank{rank}/host"] = torch.full((HOST_ALIGN_BYTES,), rank, dtype=torch.uint8)
        tensors, raw = [], {}
        for name, tensor in expected.items():
            if name.startswith("rank") and not name.startswith(f"rank{rank}/"):
                continue
            code = next(code for code, dtype in TORCH_TYPES.items() if dtype == tensor.dtype)
            part, offset = tensor, (0,) * tensor.dim()
            if not name.startswith("rank"):
                part, offset = tensor[first : first + count], (first, *(0 for _ in tensor.shape[1:]))
            is_host = {"host": True} if name.endswith("host") else {}
            tensors.append(Entry(name, code, tuple(part.shape), offset, tuple(tensor.shape), is_host))
            raw[name] = bytes(part.contiguous().reshape(-1).view(torch.uint8).tolist())
        laid = lay_out(tensors, {"rank": rank})
        (tmp_path / f"rank{rank}.safetensors").write_bytes(file_of(laid, raw))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in expected.items():
        left, right = (one.reshape(-1).view(torch.uint8) for one in (tensor, loaded[name]))
        assert torch.equal(left, right), name
