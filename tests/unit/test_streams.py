"""READ over TCP: the right bytes in the right order, pins that are let go of, and strangers who achieve nothing."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import conduit, streams, wire
from snapshotd import reader as reading_ahead
from snapshotd.clock import SystemClock
from snapshotd.errors import ConfigError, DaemonUnavailable, NoRoom, ProtocolError, Refused, SnapshotGone
from snapshotd.reader import Pace, Reader
from snapshotd.readserver import Extent, ReadServer
from snapshotd.streams import Pool, Stream, check

BLOCK = 4096
SNAPSHOT = wire.SnapshotId(wire.GenerationId(1, bytes(16)), 7)
FILE_BYTES = 600 * BLOCK + 123
BYTES = random.Random(1).randbytes(FILE_BYTES)
WORDS = [zlib.crc32(BYTES[at : at + BLOCK]) for at in range(0, FILE_BYTES, BLOCK)]
TABLE = struct.pack(f"<{len(WORDS)}I", *WORDS)  # any words will do: what moves them does not look at them
NO_LIMIT = Pace(0, SystemClock(), lambda _: None)
PATIENCE_S = 120.0


def until(done: Callable[[], bool], what: str) -> None:
    """Wait for a condition, within a bound."""
    deadline_s, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not done():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        pause.wait(0.002)


def read(offset: int, length: int, slot: int = 0) -> wire.Read:
    return wire.Read("job", bytes(16), slot, SNAPSHOT, offset, length)


def words(offset: int, length: int) -> bytes:
    return TABLE[offset // BLOCK * 4 : -(-(offset + length) // BLOCK) * 4]


class Node:
    """A server of one file in slot 0; slot 1 is gone, slot 2 fails over `trouble`, slot 3 has 64 MiB of zeros."""

    def __init__(self) -> None:
        self.pins, self.served = 0, 0
        self.dropped: list[tuple[str, str]] = []
        self.trouble: Exception = NoRoom("no", needed_bytes=1)
        self.priorities: set[int] = set()
        self.lock = threading.Lock()
        self.large = memoryview(bytes(64 << 20))

    @contextmanager
    def serve(self, wanted: wire.Read, who: bytes) -> Iterator[Extent]:
        if wanted.slot == 1:
            raise SnapshotGone("step 7 was replaced by step 8")
        if wanted.slot == 2:
            raise self.trouble
        with self.lock:
            self.pins, self.served = self.pins + 1, self.served + 1
            self.priorities.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        try:
            yield self.extent(wanted)
        finally:
            with self.lock:
                self.pins -= 1

    def extent(self, wanted: wire.Read) -> Extent:
        if wanted.slot == 3:
            view = self.large[wanted.offset : wanted.offset + wanted.length]
            return Extent(view, len(self.large), 1 << 20, bytes(4 * -(-len(view) >> 20)))
        view = memoryview(BYTES)[wanted.offset : wanted.offset + wanted.length]
        crcs = words(wanted.offset, len(view)) if wanted.length or wanted.offset else TABLE
        return Extent(view, FILE_BYTES, BLOCK, crcs)

    def drop(self, reason: str, sentence: str) -> None:
        self.dropped.append((reason, sentence))

    def reasons(self, count: int = 1) -> list[str]:
        until(lambda: len(self.dropped) >= count, f"{count} dropped streams")
        return [reason for reason, _ in self.dropped]

    @contextmanager
    def server(self, **options: float) -> Iterator[ReadServer]:
        one = ReadServer("127.0.0.1", 0, self.serve, self.drop, **options)  # type: ignore[arg-type]
        try:
            yield one
        finally:
            one.close()


@contextmanager
def connected(address: str, silence_max_s: float = PATIENCE_S) -> Iterator[Stream]:
    stream = Stream.connect(address, silence_max_s=silence_max_s)
    try:
        yield stream
    finally:
        stream.close()


@contextmanager
def stranger(address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as one:
        yield one


def everything(one: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    data = b""
    try:
        while more := one.recv(65536):
            data += more
    except ConnectionResetError:
        pass
    return data


def say_all(one: socket.socket, data: bytes) -> None:
    """Send and say that it was all. The server may hang up before the end: at nonsense it does so at once."""
    with contextlib.suppress(OSError):
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)


def taken(stream: Stream) -> tuple[wire.Reading, bytes]:
    """The next answer and its bytes."""
    reading = stream.answer()
    into = bytearray(reading.length)
    stream.receive_into(memoryview(into))
    return reading, bytes(into)


@pytest.fixture(scope="module")
def node() -> Node:
    return Node()


@pytest.fixture(scope="module")
def address(node: Node) -> Iterator[str]:
    """Of a server for the tests that leave it as it was."""
    with node.server() as server:
        yield server.address


# --- bytes -----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, FILE_BYTES // BLOCK), st.integers(0, 40 * BLOCK)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_reads_that_are_sent_ahead_are_answered_in_order_with_their_bytes(
    address: str, places: list[tuple[int, int]]
) -> None:
    with connected(address) as stream:
        for block, length in places:
            stream.ask(read(block * BLOCK, length))
        for block, length in places:
            reading, data = taken(stream)
            assert data == BYTES[block * BLOCK : block * BLOCK + length]
            assert reading.crcs == (words(block * BLOCK, len(data)) if length or block else TABLE)
            assert (reading.file_bytes, reading.block_bytes) == (FILE_BYTES, BLOCK)
        assert stream.is_usable()


def test_an_answer_may_be_taken_in_parts(address: str) -> None:
    with connected(address) as stream:
        stream.ask(read(BLOCK, 3 * BLOCK))
        assert stream.answer().length == 3 * BLOCK
        into = bytearray(3 * BLOCK)
        for at, end in ((0, 1), (1, 5000), (5000, 3 * BLOCK)):
            stream.receive_into(memoryview(into)[at:end])
        assert into == BYTES[BLOCK : 4 * BLOCK]


def test_several_connections_are_served_at_once(address: str) -> None:
    results: list[bool] = []

    def pull() -> None:
        with connected(address) as stream:
            for _ in range(20):
                stream.ask(read(0, FILE_BYTES))
                results.append(taken(stream)[1] == BYTES)

    threads = [threading.Thread(target=pull) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert results == [True] * 120


def test_the_same_read_twice_is_harmless(address: str) -> None:
    with stranger(address) as one:
        frame = wire.pack(read(0, BLOCK))
        one.sendall(frame * 2)
        one.shutdown(socket.SHUT_WR)
        answer = everything(one)
        assert len(answer) % 2 == 0
        assert answer[: len(answer) // 2] == answer[len(answer) // 2 :]
        assert answer.endswith(BYTES[:BLOCK])


def test_the_checksums_of_a_whole_file_come_with_a_read_of_nothing(address: str) -> None:
    with connected(address) as stream:
        stream.ask(read(0, 0))
        assert taken(stream) == (wire.Reading(0, FILE_BYTES, BLOCK, TABLE), b"")


def test_streams_serve_at_a_low_priority() -> None:
    node = Node()
    with node.server(nice=7) as server, connected(server.address) as stream:
        stream.ask(read(0, 1))
        taken(stream)
        assert node.priorities <= {7, os.getpriority(os.PRIO_PROCESS, 0)}  # the latter where a sandbox allows none


def test_streams_work_over_ipv6() -> None:
    node = Node()
    try:
        server = ReadServer("::1", 0, node.serve, node.drop)
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    try:
        assert server.address.startswith("[::1]:")
        with connected(server.address) as stream:
            stream.ask(read(0, 10))
            assert taken(stream)[1] == BYTES[:10]
    finally:
        server.close()


def test_a_stream_leaves_from_the_address_it_was_told(address: str) -> None:
    stream = Stream.connect(address, interface_address="127.0.0.3")
    try:
        assert stream._conduit._socket.getsockname()[0] == "127.0.0.3"
        stream.ask(read(0, 10))
        assert taken(stream)[1] == BYTES[:10]
    finally:
        stream.close()


# --- no --------------------------------------------------------------------------------------------


def test_a_snapshot_that_is_gone_is_an_answer_and_the_stream_goes_on(address: str) -> None:
    with connected(address) as stream:
        for slot in (0, 1, 0):
            stream.ask(read(0, BLOCK, slot))
        assert taken(stream)[1] == BYTES[:BLOCK]
        with pytest.raises(SnapshotGone, match="replaced by step 8"):
            stream.answer()
        assert taken(stream)[1] == BYTES[:BLOCK]
        assert stream.in_step


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [(NoRoom("no"), NoRoom), (Refused("no"), Refused), (DaemonUnavailable("it stops"), Refused)],
)
def test_what_stands_in_the_way_of_a_read_is_told(trouble: Exception, kind: type[Exception]) -> None:
    node = Node()
    node.trouble = trouble
    with node.server() as server, connected(server.address) as stream:
        stream.ask(read(0, 1, slot=2))
        with pytest.raises(kind):
            stream.answer()
        assert stream.is_usable()


def test_a_slot_that_cannot_be_described_is_refused_before_a_byte_of_it_is_sent() -> None:
    node = Node()
    node.extent = lambda wanted: Extent(memoryview(BYTES), FILE_BYTES, 1, b"")  # type: ignore[method-assign]
    with node.server() as server, connected(server.address) as stream:
        stream.ask(read(0, 1))
        with pytest.raises(Refused, match="cannot be sent"):
            stream.answer()
        assert node.pins == 0


# --- strangers and bad peers -----------------------------------------------------------------------

GOOD = wire.pack(read(0, BLOCK))
NONSENSE = [
    ("stream-magic", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("stream-version", struct.pack("<4sHHII", wire.MAGIC, wire.WIRE_VERSION + 1, 0, 0, 0)),
    ("stream-oversized", struct.pack("<4sHHII", wire.MAGIC, wire.WIRE_VERSION, 0, wire.FRAME_BYTES_MAX + 1, 0)),
    ("stream-checksum", GOOD[:-1] + bytes([GOOD[-1] ^ 1])),
    ("stream-content", struct.pack("<4sHHII", wire.MAGIC, wire.WIRE_VERSION, 0, 1, zlib.crc32(b"\xc1")) + b"\xc1"),
    ("stream-unserved", wire.pack(wire.Stop())),
    ("stream-content", wire.pack(wire.Done())),
    ("stream-truncated", GOOD[:7]),
    ("stream-truncated", GOOD[:-1]),
]


@pytest.mark.parametrize(("reason", "data"), NONSENSE)
def test_nonsense_ends_its_stream_with_a_counted_reason_and_the_others_go_on(reason: str, data: bytes) -> None:
    node = Node()
    with node.server() as server, connected(server.address) as bystander:
        with stranger(server.address) as one:
            say_all(one, GOOD + data)
            assert everything(one).endswith(BYTES[:BLOCK])
        assert node.reasons() == [reason]
        assert "the stream of 127.0.0.1:" in node.dropped[0][1]
        bystander.ask(read(BLOCK, 5))
        assert taken(bystander)[1] == BYTES[BLOCK : BLOCK + 5]
        until(lambda: node.pins == 0 and server.connections == 1, "the stranger's thread to end")


@given(st.one_of(st.binary(max_size=200), st.builds(lambda cut, tail: GOOD[:cut] + tail, st.integers(0, len(GOOD)),
                                                    st.binary(max_size=60))))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_random_bytes_never_disturb_the_server(address: str, data: bytes) -> None:
    with stranger(address) as one:
        say_all(one, data)
        everything(one)
    with connected(address) as stream:
        stream.ask(read(0, 100))
        assert taken(stream)[1] == BYTES[:100]


def test_a_message_that_stops_half_way_is_hung_up_on_and_an_idle_stream_is_not() -> None:
    node = Node()
    with node.server(send_max_s=0.05) as server, connected(server.address) as idle:
        with stranger(server.address) as one:
            one.sendall(GOOD[:20])
            assert everything(one) == b""
        assert node.reasons() == ["stream-stalled"]
        idle.ask(read(0, 100))
        assert taken(idle)[1] == BYTES[:100]


def test_a_peer_that_stops_reading_is_hung_up_on_and_its_pin_released() -> None:
    node = Node()
    with node.server(send_max_s=0.05) as server, stranger(server.address) as one:
        one.sendall(wire.pack(read(0, 64 << 20, slot=3)))
        assert node.reasons() == ["stream-unread"]
        until(lambda: node.served == 1 and node.pins == 0, "the pin to be released")
        until(lambda: server.connections == 0, "the thread to end")


def test_a_peer_that_goes_away_in_the_middle_releases_its_pin() -> None:
    node = Node()
    with node.server() as server:
        with stranger(server.address) as one:
            one.sendall(wire.pack(read(0, 64 << 20, slot=3)))
            assert one.recv(10)
        until(lambda: node.served == 1 and node.pins == 0, "the pin to be released")
        assert node.dropped == []


def test_streams_are_bounded_and_room_comes_back() -> None:
    node = Node()
    with node.server(connections_max=2) as server:
        with connected(server.address) as first, connected(server.address) as second:
            for stream in (first, second):
                stream.ask(read(0, 1))
                taken(stream)
            with stranger(server.address) as third:
                assert everything(third) == b""
            assert node.reasons() == ["stream-connections"]
        until(lambda: server.connections == 0, "both to end")
        with connected(server.address) as fourth:
            fourth.ask(read(0, 1))
            assert taken(fourth)[1] == BYTES[:1]


def test_a_port_that_is_taken_is_a_sentence(address: str, node: Node) -> None:
    host, _, port = address.rpartition(":")
    with pytest.raises(ConfigError, match="choose another --stream-port"):
        ReadServer(host, int(port), node.serve, node.drop)


# --- the end of a server ---------------------------------------------------------------------------


def test_a_server_that_closes_in_the_middle_ends_its_clients_by_name() -> None:
    node = Node()
    with node.server() as server, connected(server.address) as busy, connected(server.address) as idle:
        busy.ask(read(0, 64 << 20, slot=3))
        assert busy.answer().length == 64 << 20
        server.close()
        assert (node.pins, server.connections) == (0, 0)
        with pytest.raises(DaemonUnavailable, match=f"at {server.address} ended the stream"):
            busy.receive_into(memoryview(bytearray(64 << 20)))
        with pytest.raises(DaemonUnavailable):
            idle.ask(read(0, 1))
            idle.answer()
        with pytest.raises(DaemonUnavailable, match="no daemon serves snapshots at"):
            Stream.connect(server.address)
        assert node.dropped == []


def test_a_port_is_free_again_after_its_server() -> None:
    node = Node()
    with node.server() as first, connected(first.address) as stream:
        stream.ask(read(0, 1))
        taken(stream)
        first.close()
        host, _, port = first.address.rpartition(":")
        ReadServer(host, int(port), node.serve, node.drop).close()


# --- the client does not believe everything --------------------------------------------------------


@contextmanager
def impostor(answer: bytes, then: Callable[[socket.socket], object] = lambda _: None) -> Iterator[str]:
    """A server that says the same to whoever comes first, whatever is asked."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)
            then(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield "{}:{}".format(*listener.getsockname())
        thread.join(PATIENCE_S)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", DaemonUnavailable),
        (wire.pack(wire.Reading(BLOCK, BLOCK, BLOCK, bytes(4)))[:-1], DaemonUnavailable),
        (wire.pack(wire.Reading(BLOCK, BLOCK, BLOCK, bytes(4))) + b"too little", DaemonUnavailable),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
        (wire.pack(wire.Done()), ProtocolError),
        (wire.pack(wire.Stop()), ProtocolError),
        (wire.pack(wire.Refusal("no-room", "no", {"needed_bytes": "many"})), ProtocolError),
        (wire.pack(wire.Reading(BLOCK, BLOCK, BLOCK, bytes(8))), ProtocolError),
        (wire.pack(wire.Reading(2 * BLOCK, 2 * BLOCK, BLOCK, bytes(8))), ProtocolError),
    ],
)
def test_an_answer_that_is_none_is_not_believed_and_the_stream_is_over(answer: bytes, kind: type[Exception]) -> None:
    with impostor(answer) as address, connected(address) as stream:
        stream.ask(read(0, BLOCK))
        with pytest.raises(kind):
            stream.receive_into(memoryview(bytearray(stream.answer().length)))
        assert not stream.in_step
        with pytest.raises(DaemonUnavailable):
            stream.ask(read(0, BLOCK))


def test_a_silent_server_is_given_up_in_time() -> None:
    over = threading.Event()
    with impostor(GOOD[:3], lambda _: over.wait(PATIENCE_S)) as address:
        with connected(address, silence_max_s=0.02) as stream:
            stream.ask(read(0, BLOCK))
            with pytest.raises(DaemonUnavailable, match="stalls"):
                stream.answer()
        over.set()


def test_a_server_that_drips_is_given_up_while_it_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte that comes gives the kernel's own patience a new start."""
    monkeypatch.setattr(conduit, "RATE_MIN_BYTES_PER_S", 1 << 40)
    dripped, over = [0], threading.Event()

    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.002) and dripped[0] < BLOCK:
                dripped[0] += connection.send(b"x")

    with impostor(wire.pack(wire.Reading(BLOCK, BLOCK, BLOCK, bytes(4))), drip) as address:
        with connected(address, silence_max_s=0.05) as stream:
            stream.ask(read(0, BLOCK))
            stream.answer()
            sink, staging = memoryview(bytearray(BLOCK)), memoryview(bytearray(BLOCK))
            with pytest.raises(DaemonUnavailable, match="stalls"):
                streams.gather(sink, [streams.Share(stream, 2, BLOCK, bytes(4), BLOCK)], staging, "bytes")
            assert 0 < dripped[0] < BLOCK, "it was given up long before all of it had come"
        over.set()


@pytest.mark.parametrize(
    ("asked", "reading", "reason"),
    [
        (read(0, 5000), wire.Reading(5000, 9000, 4096, bytes(8)), None),
        (read(8192, 5000), wire.Reading(808, 9000, 4096, bytes(4)), None),
        (read(0, 0), wire.Reading(0, 9000, 4096, bytes(12)), None),
        (read(4096, 0), wire.Reading(0, 9000, 4096, b""), None),
        (read(16384, 5), wire.Reading(0, 9000, 4096, b""), None),
        (read(0, 5000), wire.Reading(5001, 9000, 4096, bytes(8)), "length"),
        (read(8192, 5000), wire.Reading(809, 9000, 4096, bytes(4)), "length"),
        (read(0, 5000), wire.Reading(5000, 9000, 4096, bytes(4)), "checksums"),
        (read(0, 5000), wire.Reading(5000, 9000, 4096, bytes(9)), "checksums"),
        (read(0, 0), wire.Reading(0, 9000, 4096, bytes(8)), "checksums"),
        (read(0, 5000), wire.Reading(5000, 9000, 5000, bytes(4)), "blocks"),
        (read(4096, 10), wire.Reading(10, 9000, 8192, bytes(4)), "blocks"),
    ],
)
def test_an_answer_must_fit_its_read(asked: wire.Read, reading: wire.Reading, reason: str | None) -> None:
    if reason is None:
        check(asked, reading)
    else:
        with pytest.raises(ProtocolError) as error:
            check(asked, reading)
        assert error.value.reason == reason


def test_answers_are_taken_whole_and_in_step(address: str) -> None:
    with connected(address) as stream:
        with pytest.raises(ProtocolError, match="0 answers are to come"):
            stream.answer()
        stream.ask(read(0, 100))
        with pytest.raises(ProtocolError, match="0 left"):
            stream.receive_into(memoryview(bytearray(1)))
        stream.answer()
        with pytest.raises(ProtocolError, match="100 bytes"):
            stream.answer()
        with pytest.raises(ProtocolError, match="100 left"):
            stream.receive_into(memoryview(bytearray(101)))
        assert not stream.in_step
        stream.receive_into(memoryview(bytearray(100)))
        assert stream.in_step
        for _ in range(streams.ASKED_MAX):
            stream.ask(read(0, 1))
        with pytest.raises(ProtocolError, match="take one first"):
            stream.ask(read(0, 1))


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:port", "127.0.0.1:99999", "tcp://127.0.0.1:1"])
def test_an_address_that_is_none_is_a_daemon_out_of_reach(address: str) -> None:
    with pytest.raises(DaemonUnavailable, match="write it like"):
        Stream.connect(address)


# --- the pool --------------------------------------------------------------------------------------


@contextmanager
def pooled(per_address_max: int = 16, streams_max: int = 256) -> Iterator[Pool]:
    pool = Pool(per_address_max=per_address_max, streams_max=streams_max)
    try:
        yield pool
    finally:
        pool.close()


def test_a_stream_that_was_given_back_is_used_again(address: str) -> None:
    with pooled() as pool:
        first = pool.take(address)
        first.ask(read(0, 10))
        taken(first)
        pool.give(first)
        assert pool.take(address) is first
        second = pool.take(address)
        assert second is not first
        pool.give(first)
        pool.give(second)


def test_a_stream_out_of_step_or_closed_is_not_used_again(address: str) -> None:
    with pooled() as pool:
        asked, closed = pool.take(address), pool.take(address)
        asked.ask(read(0, 10))
        closed.close()
        pool.give(asked)
        pool.give(closed)
        assert pool._idle == []


def test_a_stream_whose_server_was_replaced_is_not_used_again() -> None:
    node = Node()
    with pooled() as pool, node.server() as server:
        pool.give(pool.take(server.address))
        server.close()
        host, _, port = server.address.rpartition(":")
        after = ReadServer(host, int(port), node.serve, node.drop)
        try:
            stream = pool.take(server.address)
            stream.ask(read(0, 10))
            assert taken(stream)[1] == BYTES[:10]
            pool.give(stream)
        finally:
            after.close()


def test_a_pool_is_bounded_by_address_and_in_all(address: str) -> None:
    node = Node()
    with node.server() as other, pooled(per_address_max=2, streams_max=3) as pool:
        mine = [pool.take(address) for _ in range(3)]
        others = [pool.take(other.address) for _ in range(2)]
        for stream in mine:
            pool.give(stream)
        assert pool._idle == mine[1:]
        for stream in others:
            pool.give(stream)
        assert pool._idle == [mine[2], *others]
        assert not mine[0].in_step


def test_a_closed_pool_keeps_and_gives_nothing(address: str) -> None:
    pool = Pool()
    idle, used = pool.take(address), pool.take(address)
    pool.give(idle)
    pool.close()
    pool.give(used)
    assert not idle.in_step
    assert not used.in_step
    with pytest.raises(DaemonUnavailable, match="this daemon stops"):
        pool.take(address)


# --- the pace --------------------------------------------------------------------------------------


class FakeClock:
    """Time that passes only in pauses."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.paused: list[float] = []

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.paused.append(seconds)
        self.now_s += seconds


@given(st.lists(st.tuples(st.integers(0, 3_000_000), st.floats(0, 3)), max_size=30), st.floats(1e3, 1e9))
def test_no_more_passes_than_the_rate_and_a_burst_of_50_ms_and_no_less_than_the_rate(
    amounts: list[tuple[int, float]], rate: float
) -> None:
    clock = FakeClock()
    pace, passed, idle_s = Pace(rate, clock, clock.pause), 0, 0.0
    for amount, idle in amounts:
        clock.now_s += idle
        idle_s += idle
        pace.take(amount)
        passed += amount
        took_s = clock.now_s - 100.0
        assert passed <= rate * (took_s + 0.05) * (1 + 1e-6) + 1
        assert took_s <= (passed / rate + idle_s) * (1 + 1e-6) + 1e-6


def test_threads_share_one_pace() -> None:
    """Each is told to wait for those before it too; the clock stands still, so nobody's pause shortens another's."""
    clock, lock, waits = FakeClock(), threading.Lock(), list[float]()

    def pause(seconds: float) -> None:
        with lock:
            waits.append(seconds)

    pace = Pace(1000.0, clock, pause)
    threads = [threading.Thread(target=pace.take, args=(1000,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(waits) == pytest.approx([0.95, 1.95, 2.95, 3.95, 4.95])


def test_a_pace_of_zero_never_pauses_and_a_negative_one_is_none() -> None:
    clock = FakeClock()
    Pace(0, clock, clock.pause).take(1 << 60)
    assert clock.paused == []
    with pytest.raises(ValueError, match="are no pace"):
        Pace(-1, clock, clock.pause)


# --- the reader ------------------------------------------------------------------------------------


def reader(pool: Pool, address: str, begin: int, end: int, window: int, pace: Pace = NO_LIMIT, slot: int = 0) -> Reader:
    return Reader(pool, address, "job", bytes(16), slot, SNAPSHOT, begin, end, window, pace)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_windows_have_their_bytes_and_exactly_their_checksums(address: str, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, FILE_BYTES // BLOCK)) * BLOCK
    ends = st.integers(begin // BLOCK, FILE_BYTES // BLOCK).map(lambda block: block * BLOCK)
    end = data.draw(st.one_of(st.just(FILE_BYTES), ends))
    window, ahead = data.draw(st.integers(1, 40)) * BLOCK, data.draw(st.integers(1, 100)) * BLOCK
    with pooled() as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_ahead, "READ_BYTES", ahead)
        one = reader(pool, address, begin, end, window)
        at = begin
        while one.left_bytes:
            into = bytearray(min(data.draw(st.integers(1, 3)) * window, one.left_bytes))
            crcs, block_bytes = one.next_into(memoryview(into))
            assert block_bytes == BLOCK
            assert into == BYTES[at : at + len(into)]
            assert crcs == words(at, len(into))
            at += len(into)
        assert at == end
        one.close()
        one.close()
        assert len(pool._idle) == (1 if end > begin else 0), "the stream was given back in step"


def test_a_reader_asks_ahead(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_ahead, "READ_BYTES", 2 * BLOCK)
    with pooled() as pool:
        one = reader(pool, address, 0, 100 * BLOCK, BLOCK)
        into = memoryview(bytearray(BLOCK))
        for _ in range(10):
            one.next_into(into)
            assert one._stream is not None
            assert len(one._stream._asked) == reading_ahead.READS_AHEAD == 2
        one.close()
        assert pool._idle == [], "what was asked for and not taken spoils a stream"


def test_a_reader_keeps_the_pace(address: str) -> None:
    clock = FakeClock()
    with pooled() as pool:
        one = reader(pool, address, 0, 20 * BLOCK, 10 * BLOCK, Pace(10 * BLOCK, clock, clock.pause))
        for _ in range(2):
            one.next_into(memoryview(bytearray(10 * BLOCK)))
        one.close()
    assert clock.paused == pytest.approx([0.95, 1.0])


def test_a_snapshot_that_is_gone_ends_its_reader_alone(address: str) -> None:
    with pooled() as pool:
        one = reader(pool, address, 0, BLOCK, BLOCK, slot=1)
        with pytest.raises(SnapshotGone):
            one.next_into(memoryview(bytearray(BLOCK)))
        one.close()
        assert len(pool._idle) == 1
        after = reader(pool, address, 0, BLOCK, BLOCK)
        after.next_into(memoryview(bytearray(BLOCK)))
        after.close()


def test_a_range_that_the_file_does_not_have_is_short(address: str) -> None:
    with pooled() as pool:
        one = reader(pool, address, 590 * BLOCK, FILE_BYTES + 1, BLOCK)
        with pytest.raises(ProtocolError) as error:
            one.next_into(memoryview(bytearray(BLOCK)))
        assert error.value.reason == "short"
        one.close()
        assert pool._idle == []


@pytest.mark.parametrize(("window", "end"), [(1 << 20 | BLOCK, 4 << 20), (1 << 20, (3 << 20) + BLOCK)])
def test_a_window_or_an_end_that_cuts_a_block_is_refused(address: str, window: int, end: int) -> None:
    with pooled() as pool:
        one = reader(pool, address, 0, end, window, slot=3)
        with pytest.raises(ProtocolError) as error:
            one.next_into(memoryview(bytearray(BLOCK)))
        assert error.value.reason == "blocks"
        one.close()


def test_a_reader_is_not_asked_for_what_makes_no_sense(address: str) -> None:
    with pooled() as pool:
        for begin, end, window in ((-BLOCK, 0, BLOCK), (BLOCK, 0, BLOCK), (0, BLOCK, 0), (0, BLOCK, 1000)):
            with pytest.raises(ValueError, match=r"range|windows"):
                reader(pool, address, begin, end, window)
        one = reader(pool, address, 0, 2 * BLOCK, BLOCK)
        with pytest.raises(ValueError, match="has 8192 left"):
            one.next_into(memoryview(bytearray(2 * BLOCK + 1)))
        with pytest.raises(ValueError, match="cuts a block"):
            one.next_into(memoryview(bytearray(1000)))
        one.close()
