"""Frames: what is packed comes back equal, and whatever else arrives is a ProtocolError and nothing but that."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import wire
from snapshotd.errors import REFUSALS, ProtocolError

UNPACKERS: list[Callable[[bytes], Any]] = [wire.unpack_request, wire.unpack_reply]
REQUESTS, REPLIES = get_args(wire.Request), get_args(wire.Reply)


def frame(body: bytes, version: int = wire.WIRE_VERSION) -> bytes:
    return struct.pack("<4sHHII", b"SNPD", version, 0, len(body), zlib.crc32(body)) + body


# --- strategies that follow the messages' own types -------------------------------------------------

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
texts = st.text(st.characters(codec="utf-8"), max_size=60)
id16 = st.binary(min_size=16, max_size=16)
counts = st.integers(0, 2**62)
ranks = st.integers(0, 2**20 - 1)
generations = st.builds(wire.GenerationId, counts, id16)
snapshots = st.builds(wire.SnapshotId, generations, counts)
slots = st.integers(0, 63)
shards = st.builds(
    wire.Shard, snapshots, id16, slots, st.sampled_from(["FULL", "COMMITTED"]), ranks, st.integers(1, 2**20 - 1),
    st.binary(min_size=32, max_size=32), counts,
)  # fmt: skip
arenas = st.builds(
    wire.ArenaReport, id16, ranks, generations, counts, counts, counts, st.booleans(), st.none() | snapshots
)
badges = st.builds(wire.Badge, st.binary(min_size=32, max_size=32), st.binary(min_size=1, max_size=400))
places = st.builds(wire.Place, id16, texts, texts, texts, st.lists(ranks, max_size=2), st.none() | badges)
inventories = st.builds(
    wire.Inventory, id16, texts, st.lists(shards, max_size=3), st.lists(arenas, max_size=3),
    st.lists(texts, max_size=3), badge=st.none() | badges,
)  # fmt: skip
blocks = st.integers(4096, 16 << 20)
states = st.sampled_from(["FILLING", "FULL", "PROTECTED", "COMMITTED"])
shapes = st.builds(wire.ShardShape, ranks, counts, blocks, st.binary(min_size=32, max_size=32))
layouts = st.builds(
    wire.GroupLayout, st.integers(0, 254), blocks, counts, st.lists(st.lists(shapes, max_size=2), max_size=3)
)
holdings = st.builds(wire.Holding, texts, texts, id16, slots)
held = st.builds(wire.HeldShard, ranks, snapshots, states, id16, slots, shapes)
sum_lengths = st.integers(1, wire.READ_BYTES_MAX)
sum_spans = st.builds(wire.SumSpan, st.none() | st.integers(0, wire.SPANS_MAX - 1), counts, sum_lengths)
sum_terms = st.builds(wire.SumTerm, st.integers(1, 255), st.lists(sum_spans, min_size=1, max_size=2))
combines = st.builds(
    wire.Combine, names, snapshots, st.sampled_from(["planes", "bytes"]), blocks, blocks, sum_lengths,
    st.lists(holdings, max_size=2), st.lists(sum_terms, min_size=1, max_size=3),
)  # fmt: skip
peer_messages: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        wire.Publish, names, generations, id16, counts, st.booleans(), st.booleans(),
        st.dictionaries(ranks, counts, max_size=3), st.lists(held, max_size=2), counts, counts, counts, texts,
    ),
    st.builds(
        wire.Decree, names, generations, id16, counts, counts, st.lists(counts, max_size=4), counts, counts,
        st.booleans(), counts, counts,
    ),
    st.builds(wire.Doubt, names, generations, id16, slots, snapshots, texts),
    st.builds(wire.AskInventory, names),
    st.builds(wire.Read, names, id16, slots, snapshots, counts, st.integers(0, wire.READ_BYTES_MAX)),
    combines,
    st.builds(
        wire.Rebuild, id16, snapshots, ranks, layouts, st.dictionaries(ranks, holdings, max_size=2),
        st.dictionaries(st.integers(0, 254), holdings, max_size=2),
    ),
    st.builds(wire.AskRebuild, id16),
)  # fmt: skip
requests: st.SearchStrategy[Any] = st.one_of(
    peer_messages,
    st.builds(wire.Hello, st.sampled_from(["trainer", "tool"]), counts),
    st.builds(wire.TakeInventory, names),
    st.builds(
        wire.Attach, names, generations, ranks, st.integers(1, 2**20 - 1), ranks, st.lists(ranks, max_size=8),
        st.integers(1, 2**40 - 1), counts, counts, st.binary(min_size=32, max_size=32), parity=st.integers(0, 254),
        group_size=st.integers(1, 255), numa_node=st.integers(-1, 4095), passed=counts, arena=st.none() | id16,
        replaces=st.none() | id16, restored=st.none() | snapshots,
    ),
    st.builds(wire.Introduce, names, st.lists(places, max_size=2), st.lists(places, max_size=2)),
    st.just(wire.AskKey()),
    st.builds(wire.Held, id16),
    st.builds(wire.OpenShard, id16, slots, snapshots),
    st.builds(wire.CloseShard, id16, slots),
    st.builds(wire.Quarantine, id16, slots, snapshots, texts),
    st.builds(wire.Close, id16),
    st.just(wire.AskStatus()),
    st.builds(wire.Collect, st.none() | names, st.none() | counts),
    st.just(wire.Stop()),
)  # fmt: skip
replies: st.SearchStrategy[Any] = st.one_of(
    st.builds(wire.Welcome, id16, texts, counts, st.floats(0, 600)),
    st.builds(wire.InventoryTaken, inventories),
    st.builds(wire.Granted, id16, counts),
    st.builds(
        wire.RebuildReport, st.booleans(), slots, counts, counts, st.floats(0, 600),
        st.sampled_from(["", "corrupt", "failed"]), texts,
    ),
    st.builds(wire.Reading, st.integers(0, wire.READ_BYTES_MAX), counts, blocks, st.binary(max_size=64)),
    st.builds(wire.LentKey, st.binary(max_size=600)),
    st.builds(wire.ShardOpened, counts, counts),
    st.builds(wire.StatusReport, st.binary(max_size=200)),
    st.builds(wire.Collected, counts, counts, st.lists(texts, max_size=3)),
    st.just(wire.Done()),
    st.builds(
        wire.Refusal, st.sampled_from(sorted(REFUSALS)), texts,
        st.dictionaries(names, st.integers(-(2**63), 2**64 - 1) | texts, max_size=3),
    ),
)  # fmt: skip
ATTACH = wire.Attach(
    "llama", wire.GenerationId(3, b"n" * 16), 1, 2, 1, [0, 1], 1, 1 << 30, 1 << 20, bytes(32), arena=b"a" * 16,
    restored=wire.SnapshotId(wire.GenerationId(2, b"m" * 16), 840),
)  # fmt: skip


# --- the way there and back ---------------------------------------------------------------------------


def test_every_message_of_the_protocol_is_tried_here() -> None:
    drawn: set[type] = set()

    @settings(max_examples=1200, database=None)
    @given(requests | replies)
    def draw(message: Any) -> None:
        drawn.add(type(message))

    draw()
    assert drawn == {*REQUESTS, *REPLIES}


@given(requests)
def test_a_request_comes_back_equal(message: Any) -> None:
    assert wire.unpack_request(wire.pack(message)) == message


@given(replies)
def test_a_reply_comes_back_equal(message: Any) -> None:
    assert wire.unpack_reply(wire.pack(message)) == message


@given(requests, replies)
def test_a_request_is_no_reply_and_a_reply_is_no_request(request: Any, reply: Any) -> None:
    with pytest.raises(ProtocolError):
        wire.unpack_reply(wire.pack(request))
    with pytest.raises(ProtocolError):
        wire.unpack_request(wire.pack(reply))


def test_a_field_that_a_later_release_adds_is_passed_over() -> None:
    body = msgspec.msgpack.encode({"type": "TakeInventory", "job": "llama", "colour": ["red"]})
    assert wire.unpack_request(frame(body)) == wire.TakeInventory("llama")


# --- what must not come through -----------------------------------------------------------------------


def test_every_truncation_of_a_frame_is_refused() -> None:
    whole = wire.pack(ATTACH)
    for length in range(len(whole)):
        with pytest.raises(ProtocolError) as caught:
            wire.unpack_request(whole[:length])
        assert caught.value.reason == "truncated"


def test_every_flipped_bit_of_a_frame_is_refused_or_changes_nothing() -> None:
    whole = wire.pack(ATTACH)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert wire.unpack_request(bytes(damaged)) == ATTACH, f"bit {bit}"
            assert bit // 8 in (6, 7), "only the reserved bytes mean nothing"
        except ProtocolError:
            pass


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(ProtocolError):
        wire.unpack_request(wire.pack(ATTACH) + b"\0")
    with pytest.raises(ProtocolError):
        wire.unpack_request(frame(msgspec.msgpack.encode(wire.Stop()) + b"\0"))


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from(UNPACKERS))
def test_random_bytes_are_refused(noise: bytes, unpack: Callable[[bytes], Any]) -> None:
    with pytest.raises(ProtocolError):
        unpack(noise)


# Pieces from which something close to a message may come about.
msgpack_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400)
@given(
    st.sampled_from([kind.__name__ for kind in (*REQUESTS, *REPLIES)]),
    st.dictionaries(st.sampled_from(["job", "arena", "rank", "slot", "pid", "role", "snapshot"]), msgpack_values),
    st.sampled_from(UNPACKERS),
)
def test_wrong_fields_in_a_sound_frame_are_refused_or_a_message(
    tag: str, fields: dict[str, Any], unpack: Callable[[bytes], Any]
) -> None:
    try:
        message = unpack(frame(msgspec.msgpack.encode({"type": tag, **fields})))
    except ProtocolError as error:
        assert error.reason == "content"
    else:
        assert unpack(wire.pack(message)) == message


@settings(max_examples=400)
@given(st.binary(max_size=120), st.sampled_from(UNPACKERS))
def test_random_bytes_in_a_sound_frame_are_refused(body: bytes, unpack: Callable[[bytes], Any]) -> None:
    with pytest.raises(ProtocolError):
        unpack(frame(body))


@settings(max_examples=400)
@given(st.data(), requests)
def test_a_body_that_was_tampered_with_raises_nothing_but_a_protocol_error(data: st.DataObject, message: Any) -> None:
    body = bytearray(msgspec.msgpack.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = wire.unpack_request(frame(bytes(body)))
    except ProtocolError:
        return
    assert wire.unpack_request(wire.pack(again)) == again


@pytest.mark.parametrize("unpack", UNPACKERS)
@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 1_000_000,
        b"\x81\xa1a" * 1_000_000,
        b"\x84\xa4type\xa5Hello\xa4role\xa1x\xa3pid\x01\xa1x" + b"\x91" * 2_000_000 + b"\x01",
        b"\x82\xa4type\xa6Attach\xablocal_ranks\xdd\xff\xff\xff\xff",
        b"\x83\xa4type\xa7Refusal\xa5facts\xdf\xff\xff\xff\xff",
        b"\x82\xa4type\xa5Close\xa5arena\xc6\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
    ],
    ids=["lists", "maps", "an unknown field", "a list's length", "a map's length", "a string's length", "a length"],
)
def test_bombs_are_refused(body: bytes, unpack: Callable[[bytes], Any]) -> None:
    with pytest.raises(ProtocolError):
        unpack(frame(body))


@pytest.mark.parametrize("unpack", UNPACKERS)
@pytest.mark.parametrize("key", ["type", "role"])
def test_text_that_is_no_utf_8_is_refused(key: str, unpack: Callable[[bytes], Any]) -> None:
    body = msgspec.msgpack.encode({"type": "Hello", "role": "XX", "pid": 1} | {key: "XX"}).replace(b"XX", b"\xff\xfe")
    with pytest.raises(ProtocolError):
        unpack(frame(body))


def test_a_longer_frame_than_allowed_is_refused_by_its_header_alone() -> None:
    header = struct.pack("<4sHHII", b"SNPD", wire.WIRE_VERSION, 0, wire.FRAME_BYTES_MAX + 1, 0)
    with pytest.raises(ProtocolError) as caught:
        wire.body_length(header)
    assert caught.value.reason == "oversized"
    assert wire.body_length(struct.pack("<4sHHII", b"SNPD", wire.WIRE_VERSION, 0, wire.FRAME_BYTES_MAX, 0)) > 0


def test_another_version_is_refused_with_both_versions_named() -> None:
    with pytest.raises(ProtocolError, match=rf"version 9\b.* this one {wire.WIRE_VERSION}\b") as caught:
        wire.unpack_request(frame(b"\xc0", version=9))
    assert caught.value.reason == "version"


def test_a_stranger_is_told_from_another_version() -> None:
    with pytest.raises(ProtocolError) as caught:
        wire.body_length(b"GET / HTTP/1.1\r\n")
    assert caught.value.reason == "magic"


# --- what we send ourselves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        wire.Hello("x" * 17, 1),
        wire.Hello("tool", -1),
        wire.Hello("tool", 2**70),
        wire.Hello("\ud800", 1),
        wire.Refusal("refused", "x" * 5000),
        wire.Welcome(bytes(16), "", 1, float("nan")),
        wire.Close(b"short"),
    ],
)
def test_what_the_other_side_would_refuse_does_not_leave(message: Any) -> None:
    with pytest.raises(ProtocolError):
        wire.pack(message)


def test_a_message_longer_than_a_frame_does_not_leave() -> None:
    with pytest.raises(ProtocolError) as caught:
        wire.pack(wire.StatusReport(bytes(wire.FRAME_BYTES_MAX)))
    assert caught.value.reason == "oversized"


@given(st.text(max_size=50), st.integers(0, 9000))
def test_any_sentence_can_be_sent_once_it_is_clipped(text: str, length: int) -> None:
    sentence = wire.clip(text + "x" * length + "\udcff")
    wire.pack(wire.Refusal("refused", sentence))
    assert len(sentence) <= wire.TEXT_LENGTH_MAX


def test_a_sentence_that_fits_is_left_as_it_is() -> None:
    assert wire.clip("größer als erlaubt") == "größer als erlaubt"
