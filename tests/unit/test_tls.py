"""Streams over mutual TLS: the same bytes as in the clear, and nothing for strangers or from whoever alters them."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import _native, readserver, tls, wire
from snapshotd.clock import SystemClock
from snapshotd.errors import DaemonUnavailable, ProtocolError
from snapshotd.keys import Keys, Pin, pin, serving
from snapshotd.reader import Pace, Reader
from snapshotd.readserver import Extent, ReadServer
from snapshotd.streams import Pool, Stream, gather

BLOCK = 4096
FILE_BYTES = 300 * BLOCK + 123
BYTES = random.Random(1).randbytes(FILE_BYTES)
TABLE = _native.ec_crcs(BYTES, BLOCK)
SNAPSHOT = wire.SnapshotId(wire.GenerationId(1, bytes(16)), 7)
SERVER, READER, STRANGER = Keys.draw("server"), Keys.draw("reader"), Keys.draw("stranger")
NO_LIMIT = Pace(0, SystemClock(), lambda _: None)
PATIENCE_S = 120.0


def until(done: Callable[[], bool], what: str) -> None:
    """Wait for a condition, within a bound."""
    deadline_s, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not done():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        pause.wait(0.002)


class Node:
    """Serves one file, in the clear and encrypted, to whoever has the reader's key."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.dropped: list[str] = []
        context = serving(SERVER.pem, [READER.badge.certificate])
        self.secure = ReadServer("127.0.0.1", 0, self.serve, self.drop, secure=lambda: context)
        self.clear = ReadServer("127.0.0.1", 0, self.serve, self.drop)

    @contextlib.contextmanager
    def serve(self, read: wire.Read, who: bytes) -> Iterator[Extent]:
        self.asked.append(who)
        view = memoryview(BYTES)[read.offset : read.offset + read.length]
        first = read.offset // BLOCK
        yield Extent(view, FILE_BYTES, BLOCK, TABLE[4 * first : 4 * (first + -(-len(view) // BLOCK))])

    def drop(self, reason: str, sentence: str) -> None:
        self.dropped.append(reason)

    def close(self) -> None:
        self.secure.close()
        self.clear.close()


@pytest.fixture
def node() -> Iterator[Node]:
    one = Node()
    yield one
    one.close()


@pytest.fixture(scope="module")
def bystander() -> Iterator[Node]:
    """For tests that leave it as it was."""
    one = Node()
    yield one
    one.close()


def pinned(keys: Keys = READER, to: Keys = SERVER) -> Pin:
    return pin(keys.pem, to.badge.certificate)


def connect(address: str, expected: Pin | None = None) -> Stream:
    return Stream.connect(address, silence_max_s=PATIENCE_S, secure=lambda _: expected or pinned())


def read(offset: int, length: int) -> wire.Read:
    return wire.Read("job", bytes(16), 0, SNAPSHOT, offset, length)


def take(stream: Stream, offset: int, length: int) -> bytes:
    stream.ask(read(offset, length))
    into = bytearray(stream.answer().length)
    stream.receive_into(memoryview(into))
    return bytes(into)


@contextlib.contextmanager
def pool(address: str) -> Iterator[Pool]:
    expected = pinned()
    one = Pool(functools.partial(Stream.connect, secure=lambda where: expected if where == address else None))
    try:
        yield one
    finally:
        one.close()


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_who_reads_is_told_to_the_server_and_gets_the_bytes_and_the_stream_is_used_again(node: Node) -> None:
    with pool(node.secure.address) as streams:
        stream = streams.take(node.secure.address)
        assert take(stream, 0, FILE_BYTES) == BYTES
        streams.give(stream)
        again = streams.take(node.secure.address)
        assert again is stream
        assert take(again, BLOCK, 10) == BYTES[BLOCK : BLOCK + 10]
        streams.give(again)
    assert node.asked == [READER.badge.certificate] * 2
    assert node.dropped == []


def reader(streams: Pool, address: str, begin: int, length: int) -> Reader:
    end = begin + length
    return Reader(streams, address, "job", bytes(16), 0, SNAPSHOT, begin, end, 100 * BLOCK, NO_LIMIT)


@given(
    begins=st.lists(st.integers(0, FILE_BYTES // BLOCK), min_size=1, max_size=3),
    window=st.integers(1, 70),
    coefficient=st.integers(1, 255),
    slack=st.integers(0, 3 * BLOCK),
    staging=st.integers(BLOCK, 4 * BLOCK),
)
@settings(deadline=None, max_examples=15)
def test_sums_over_tls_are_those_in_the_clear(
    bystander: Node, begins: list[int], window: int, coefficient: int, slack: int, staging: int
) -> None:
    found = []
    lengths = [min(window * BLOCK, FILE_BYTES - begin * BLOCK) for begin in begins]
    for addresses in ([bystander.clear.address] * 3, [bystander.clear.address, *[bystander.secure.address] * 2][::-1]):
        with pool(bystander.secure.address) as streams:
            readers = [
                reader(streams, *one)
                for one in zip(addresses, [begin * BLOCK for begin in begins], lengths, strict=False)
            ]
            shares = [one.share(length, coefficient) for one, length in zip(readers, lengths, strict=True)]
            into = bytearray(b"\x5a" * (max(lengths) + slack))
            assert gather(memoryview(into), shares, memoryview(bytearray(staging)), "bytes") is None
            for one, length in zip(readers, lengths, strict=True):
                one.took(length)
                one.close()
            found.append(bytes(into))
    assert found[0] == found[1]


@pytest.mark.parametrize("coefficient", [1, 7])
def test_a_block_that_fails_its_checksum_is_found_over_tls_as_well(
    coefficient: int, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = bytearray(TABLE)
    spoilt[4 * 5] ^= 1
    monkeypatch.setitem(globals(), "TABLE", bytes(spoilt))
    with pool(node.secure.address) as streams:
        one = reader(streams, node.secure.address, 0, 16 * BLOCK)
        share = one.share(16 * BLOCK, coefficient)
        into, staging = memoryview(bytearray(16 * BLOCK)), memoryview(bytearray(BLOCK))
        assert gather(into, [share], staging, "bytes") is share
        one.close()
        assert streams._idle == [], "what is out of step is not used again"


# --- strangers --------------------------------------------------------------------------------------------------------


def test_a_reader_whose_certificate_nobody_told_us_gets_nothing_and_is_counted(node: Node) -> None:
    with pytest.raises(DaemonUnavailable, match=r"nobody that it was not told of|went away|ended the stream"):
        take(connect(node.secure.address, pinned(STRANGER)), 0, 1)
    until(lambda: node.dropped == ["stream-stranger"], "the stranger counted")
    assert node.asked == []


def test_a_server_that_shows_another_certificate_than_was_told_is_not_read_from(node: Node) -> None:
    with pytest.raises(DaemonUnavailable, match="is another than this node was told"):
        connect(node.secure.address, pinned(to=STRANGER))


def test_a_reader_without_a_certificate_gets_nothing(node: Node) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(DaemonUnavailable):
        take(connect(node.secure.address, Pin(context, SERVER.badge.certificate)), 0, 1)
    assert node.asked == []


def test_an_older_tls_is_not_spoken(node: Node) -> None:
    expected = pinned()
    expected.context.minimum_version = ssl.TLSVersion.TLSv1_2
    expected.context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(DaemonUnavailable):
        connect(node.secure.address, expected)
    until(lambda: node.dropped == ["stream-stranger"], "it counted")


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=30)
def test_random_bytes_in_the_place_of_a_greeting_never_disturb_the_server(bystander: Node, data: bytes) -> None:
    host, _, port = bystander.secure.address.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as stranger:
        with contextlib.suppress(OSError):
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    stream = connect(bystander.secure.address)
    assert take(stream, 0, 100) == BYTES[:100]
    stream.close()


def test_strangers_that_say_nothing_take_no_place_from_peers(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readserver, "GREETING_MAX", 2)
    host, _, port = node.secure.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection((host, int(port)), PATIENCE_S))
        until(lambda: len(node.dropped) >= 3, "the oldest ones hung up on")
        assert set(node.dropped) == {"stream-stranger"}
        stream = connect(node.secure.address)
        assert take(stream, 0, 100) == BYTES[:100]
        stream.close()
    until(lambda: node.secure.connections == 0, "every thread to end")


def test_a_greeting_that_stops_half_way_is_given_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "GREETING_MAX_S", 0.05)
    host, _, port = node.secure.address.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as stranger:
        stranger.sendall(b"\x16\x03\x01")
        assert stranger.recv(1) == b""
    assert node.dropped == ["stream-stranger"]


# --- between the two --------------------------------------------------------------------------------------------------


class Wire:
    """Carries a connection to a node, and does to each stretch of bytes what `change` says, by direction and number."""

    def __init__(self, address: str, change: Callable[[str, int, bytes], bytes]) -> None:
        host, _, port = address.rpartition(":")
        self._to, self._change = (host, int(port)), change
        self.seen: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._carry)]
        self._threads[0].start()

    def _carry(self) -> None:
        near, _ = self._listener.accept()
        with near, socket.create_connection(self._to, PATIENCE_S) as far:
            back = threading.Thread(target=self._pump, args=(far, near, "back"))
            back.start()
            self._pump(near, far, "there")
            back.join(PATIENCE_S)

    def _pump(self, source: socket.socket, to: socket.socket, way: str) -> None:
        number = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if way == "there":
                    self.seen.append(data)
                to.sendall(self._change(way, number, data))
                number += 1
        for one in (source, to):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self._threads[0].join(PATIENCE_S)


@contextlib.contextmanager
def carried(address: str, change: Callable[[str, int, bytes], bytes]) -> Iterator[Wire]:
    one = Wire(address, change)
    try:
        yield one
    finally:
        one.close()


def test_an_answer_that_was_altered_on_its_way_is_refused_before_a_byte_of_it_is_used(node: Node) -> None:
    altering = threading.Event()

    def change(way: str, number: int, data: bytes) -> bytes:
        if way == "there" or not altering.is_set():
            return data
        return data[:-1] + bytes([data[-1] ^ 1])

    with carried(node.secure.address, change) as between:
        stream = connect(between.address)
        assert take(stream, 0, BLOCK) == BYTES[:BLOCK]
        altering.set()
        with pytest.raises(ProtocolError) as refusal:
            take(stream, BLOCK, BLOCK)
        assert refusal.value.reason == "altered"
        stream.close()


def test_a_request_that_was_altered_on_its_way_ends_the_stream_and_is_counted(node: Node) -> None:
    altering = threading.Event()

    def change(way: str, number: int, data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1]) if way == "there" and altering.is_set() else data

    with carried(node.secure.address, change) as between:
        stream = connect(between.address)
        assert take(stream, 0, BLOCK) == BYTES[:BLOCK]
        altering.set()
        with pytest.raises((DaemonUnavailable, ProtocolError)):
            take(stream, 0, BLOCK)
        until(lambda: node.dropped == ["stream-altered"], "it counted")
        stream.close()
    assert len(node.asked) == 1


def test_a_conversation_that_somebody_kept_and_says_again_gets_nothing(node: Node) -> None:
    with carried(node.secure.address, lambda way, number, data: data) as between:
        stream = connect(between.address)
        assert take(stream, 0, BLOCK) == BYTES[:BLOCK]
        stream.close()
    host, _, port = node.secure.address.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as again:
        with contextlib.suppress(OSError):
            for data in between.seen:
                again.sendall(data)
            again.shutdown(socket.SHUT_WR)
            while again.recv(65536):
                pass
    until(lambda: bool(node.dropped), "it counted")
    assert set(node.dropped) <= {"stream-stranger", "stream-altered"}
    assert len(node.asked) == 1


def test_a_request_said_twice_by_whoever_is_between_is_not_answered_twice(node: Node) -> None:
    doubling = threading.Event()

    def change(way: str, number: int, data: bytes) -> bytes:
        return data * 2 if way == "there" and doubling.is_set() else data

    with carried(node.secure.address, change) as between:
        stream = connect(between.address)
        assert take(stream, 0, BLOCK) == BYTES[:BLOCK]
        doubling.set()
        with contextlib.suppress(DaemonUnavailable, ProtocolError):
            take(stream, 0, BLOCK)
        until(lambda: node.dropped == ["stream-altered"], "it counted")
        stream.close()
    assert len(node.asked) == 2


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_a_server_that_stops_in_the_middle_is_given_up_within_the_bound(node: Node) -> None:
    stopped = threading.Event()

    def change(way: str, number: int, data: bytes) -> bytes:
        return b"" if way == "back" and stopped.is_set() else data

    with carried(node.secure.address, change) as between:
        stream = connect(between.address)
        stream._conduit.bear_silence(0.05)
        stopped.set()
        with pytest.raises(DaemonUnavailable, match="stalls"):
            take(stream, 0, FILE_BYTES)
        stream.close()


def test_an_idle_stream_over_tls_is_kept_and_what_a_connection_holds_is_bounded(node: Node) -> None:
    stream = connect(node.secure.address)
    assert take(stream, 0, FILE_BYTES) == BYTES
    conduit = stream._conduit
    assert isinstance(conduit, tls.SecureConduit)
    assert stream.is_usable()
    assert conduit._arrived.pending == 0
    assert len(conduit._chunk) <= 1 << 20
    node.secure.close()
    until(lambda: not stream.is_usable(), "the end to be seen")
    stream.close()
