"""The door: who may come in, what a bad client can do to us (nothing), and descriptors that come with an answer."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd import door, wire
from snapshotd.door import Answer, Connection, Door, Peer, listen
from snapshotd.door_client import DoorClient, refused
from snapshotd.errors import ConfigError, DaemonUnavailable, NoRoom, ProtocolError, RankClaimed, Refused, SnapshotError

HELLO = wire.Hello("tool", 1)


class Host:
    """A door on a thread of its own, with a session that answers from a table."""

    def __init__(self, path: Path, answers: Mapping[Any, Callable[[Any], Answer]], may_enter: Any = None) -> None:
        self.path, self.answers, self.may_enter = path, answers, may_enter
        self.dropped: list[tuple[str, str]] = []
        self.ended = threading.Semaphore(0)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Host:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        one = Door(self.path, self._welcome, lambda *why: self.dropped.append(why), self.may_enter)
        self._ready.set()
        await self._stop.wait()
        await one.close()

    def _welcome(self, peer: Peer, number: int, connection: Connection) -> _Session:
        return _Session(self)

    def reasons(self, count: int = 1) -> list[str]:
        """Why connections were dropped, once `count` of them were."""
        deadline = threading.Event()
        while len(self.dropped) < count:
            assert not deadline.wait(0.002)
        return [reason for reason, _ in self.dropped]


class _Session:
    def __init__(self, host: Host) -> None:
        self._host = host

    async def answer(self, request: wire.Request) -> Answer:
        return self._host.answers.get(type(request), lambda _: Answer(wire.Done()))(request)

    def ended(self) -> None:
        self._host.ended.release()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "door.sock"


@contextmanager
def stranger(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.settimeout(30)
        one.connect(str(path))
        yield one


def read_all(one: socket.socket) -> bytes:
    """Everything until the other side hangs up."""
    data = b""
    try:
        while more := one.recv(65536):
            data += more
    except ConnectionResetError:
        pass
    return data


def open_descriptors() -> int:
    """Of this process, host and client together."""
    return len(os.listdir("/proc/self/fd"))


# --- good clients ----------------------------------------------------------------------------------


def test_requests_are_answered_in_order_over_one_connection(path: Path) -> None:
    with Host(path, {}) as host, DoorClient.connect(path) as client:
        for _ in range(100):
            assert client.ask(HELLO) == (wire.Done(), [])
        assert host.dropped == []


def test_descriptors_come_with_the_answer_and_given_ones_are_closed_here(path: Path) -> None:
    reader, writer = os.pipe()
    answers = {wire.Hello: lambda _: Answer(wire.Done(), lent=(reader,), given=(os.dup(reader),))}
    with Host(path, answers), DoorClient.connect(path) as client:
        client.ask(wire.Stop())
        before = open_descriptors()
        _, fds = client.ask(HELLO)
        assert len(fds) == 2
        assert not any(os.get_inheritable(fd) for fd in fds)
        os.write(writer, b"ab")
        assert os.read(fds[0], 1) + os.read(fds[1], 1) == b"ab"
        for fd in fds:
            os.close(fd)
        _, fds = client.ask(HELLO)
        for fd in fds:
            os.close(fd)
        client.ask(wire.Stop())  # served after the given ones were closed
        assert open_descriptors() == before
    os.close(reader)
    os.close(writer)


def test_an_answer_larger_than_the_sockets_buffer_arrives_whole(path: Path) -> None:
    document = os.urandom(3 << 20)
    answers = {wire.AskStatus: lambda _: Answer(wire.StatusReport(document))}
    with Host(path, answers), DoorClient.connect(path) as client:
        assert client.ask(wire.AskStatus())[0] == wire.StatusReport(document)


def test_a_request_larger_than_the_sockets_buffer_arrives_whole(path: Path) -> None:
    ask = wire.Attach("job", wire.GenerationId(1, bytes(16)), 0, 1, 0, list(range(2**19)), 1, 1, 1, bytes(32))
    with Host(path, {}), DoorClient.connect(path) as client:
        assert client.ask(ask)[0] == wire.Done()


def test_refusals_come_back_as_their_own_kind_with_their_facts(path: Path) -> None:
    room = wire.Refusal("no-room", "too little", {"needed_bytes": 5, "available_bytes": 3, "setting": "x"})
    claimed = wire.Refusal("rank-claimed", "taken", {"rank": 2, "pid": 77})
    answers = {wire.Hello: lambda _: Answer(room), wire.Stop: lambda _: Answer(claimed)}
    with Host(path, answers), DoorClient.connect(path) as client:
        with pytest.raises(NoRoom, match="too little") as no_room:
            client.ask(HELLO)
        assert (no_room.value.needed_bytes, no_room.value.available_bytes, no_room.value.setting) == (5, 3, "x")
        with pytest.raises(RankClaimed) as rank_claimed:
            client.ask(wire.Stop())
        assert (rank_claimed.value.rank, rank_claimed.value.pid) == (2, 77)
        assert client.fileno() >= 0  # a refusal is an answer: the connection goes on
    assert type(refused(wire.Refusal("from the future", "no"))) is Refused


def test_pipelined_requests_are_all_answered(path: Path) -> None:
    with Host(path, {}), stranger(path) as one:
        one.sendall(wire.pack(HELLO) * 500)
        one.shutdown(socket.SHUT_WR)
        assert read_all(one) == wire.pack(wire.Done()) * 500


def test_a_request_may_arrive_byte_by_byte(path: Path) -> None:
    with Host(path, {}), stranger(path) as one:
        for byte in wire.pack(HELLO):
            one.send(bytes([byte]))
        one.shutdown(socket.SHUT_WR)
        assert read_all(one) == wire.pack(wire.Done())


def test_descriptors_that_a_client_sends_are_not_kept(path: Path) -> None:
    with Host(path, {}), stranger(path) as one:
        one.sendall(wire.pack(HELLO))
        assert one.recv(65536) == wire.pack(wire.Done())
        before = open_descriptors()
        with open(os.devnull) as gift:
            socket.send_fds(one, [wire.pack(HELLO)], [gift.fileno()] * 5)
        assert one.recv(65536) == wire.pack(wire.Done())
        assert open_descriptors() == before


# --- bad clients -----------------------------------------------------------------------------------


def frame(body: bytes, magic: bytes = b"SNPD", version: int = wire.WIRE_VERSION, length: int | None = None) -> bytes:
    return struct.pack("<4sHHII", magic, version, 0, len(body) if length is None else length, 0) + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "magic"),
        (frame(b"", version=99), "version"),
        (frame(b"", length=wire.FRAME_BYTES_MAX + 1), "oversized"),
        (frame(b"abc"), "checksum"),
        (wire.pack(HELLO)[:-1], "truncated"),
        (wire.pack(HELLO)[:5], "truncated"),
        (wire.pack(wire.Done()), "content"),
    ],
)
def test_a_bad_frame_ends_the_connection_and_is_counted_by_reason(path: Path, data: bytes, reason: str) -> None:
    with Host(path, {}) as host:
        with stranger(path) as one:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            assert read_all(one) == b""
            assert host.reasons() == [reason]
        with DoorClient.connect(path) as client:
            assert client.ask(HELLO)[0] == wire.Done()  # others are served as before


def test_an_oversized_frame_is_refused_by_its_header_alone(path: Path) -> None:
    with Host(path, {}) as host, stranger(path) as one:
        one.sendall(frame(b"", length=2**32 - 1))
        assert read_all(one) == b""  # and not once four gigabytes have arrived
        assert host.reasons() == ["oversized"]


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_on_the_socket_do_no_harm(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    good = wire.pack(wire.TakeInventory("job"))
    data = bytearray(good * 3 if seed % 2 else chance.randbytes(chance.randrange(1, 5000)))
    if seed % 2:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    with Host(path, {}) as host:
        with stranger(path) as one:
            try:
                one.sendall(data)
                one.shutdown(socket.SHUT_WR)
            except OSError:  # it hung up before the end
                pass
            answered = read_all(one)
        host.ended.acquire(timeout=120)
        assert len(answered) % len(wire.pack(wire.Done())) == 0
        assert len(host.dropped) <= 1


@given(st.binary(max_size=200))
def test_no_bytes_make_the_parser_do_anything_but_refuse(data: bytes) -> None:
    for unpack in (wire.unpack_request, wire.unpack_reply):
        try:
            unpack(data)
        except ProtocolError as error:
            assert error.reason


@given(st.binary(max_size=200))
def test_no_body_makes_the_parser_do_anything_but_refuse(body: bytes) -> None:
    import zlib

    whole = struct.pack("<4sHHII", b"SNPD", wire.WIRE_VERSION, 0, len(body), zlib.crc32(body)) + body
    try:
        wire.unpack_request(whole)
    except ProtocolError as error:
        assert error.reason == "content"


def test_a_client_that_does_not_read_is_hung_up_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "SEND_MAX_S", 0.05)
    document = bytes(3 << 20)
    with Host(path, {wire.AskStatus: lambda _: Answer(wire.StatusReport(document))}) as host, stranger(path) as one:
        one.sendall(wire.pack(wire.AskStatus()))
        assert host.reasons() == ["unread"]
        assert len(read_all(one)) < len(document)


def test_requests_that_wait_are_not_read_without_bound(path: Path) -> None:
    """A client that asks faster than it is answered fills the kernel's buffers and then itself waits."""
    hold = asyncio.Event()

    class Slow(_Session):
        async def answer(self, request: wire.Request) -> Answer:
            await hold.wait()
            return Answer(wire.Done())

    host = Host(path, {})
    host._welcome = lambda *_: Slow(host)  # type: ignore[method-assign]
    ask = wire.pack(wire.Quarantine(bytes(16), 0, wire.SnapshotId(wire.GenerationId(1, bytes(16)), 1), "x" * 3900))
    with host, stranger(path) as one:
        one.setblocking(False)
        sent = 0
        pause = threading.Event()
        idle = 0
        while idle < 50:
            try:
                sent += one.send(ask * 16)
                idle = 0
            except BlockingIOError:
                idle += 1
                pause.wait(0.002)
        assert sent < 2 * wire.FRAME_BYTES_MAX
        host._loop.call_soon_threadsafe(hold.set)


def test_another_user_is_turned_away(path: Path) -> None:
    with Host(path, {}, may_enter=lambda peer: peer.uid == 4711) as host, stranger(path) as one:
        assert read_all(one) == b""
        assert host.reasons() == ["uid"]
        assert f"user {os.getuid()} (pid {os.getpid()}) was turned away" in host.dropped[0][1]


def test_our_own_user_and_root_come_in_and_nobody_else(path: Path) -> None:
    async def look() -> list[bool]:
        one = Door(path, lambda *_: None, lambda *_: None)  # type: ignore[arg-type]
        try:
            return [one._may_enter(Peer(1, uid)) for uid in (os.getuid(), 0, os.getuid() + 1)]
        finally:
            await one.close()

    assert asyncio.run(look()) == [True, True, False]


def test_connections_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "CONNECTIONS_MAX", 2)
    with Host(path, {}) as host:
        with DoorClient.connect(path) as first, DoorClient.connect(path) as second:
            first.ask(HELLO)
            second.ask(HELLO)
            with DoorClient.connect(path) as third, pytest.raises(DaemonUnavailable):
                third.ask(HELLO)
            assert host.reasons() == ["connections"]
        host.ended.acquire(timeout=120)
        host.ended.acquire(timeout=120)
        with DoorClient.connect(path) as fourth:
            assert fourth.ask(HELLO)[0] == wire.Done()


# --- the socket file -------------------------------------------------------------------------------


def test_the_socket_is_private_and_removed_at_the_end(path: Path) -> None:
    with Host(path, {}):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with Host(path, {}), DoorClient.connect(path) as client:
        assert client.ask(HELLO)[0] == wire.Done()


def test_a_socket_that_answers_is_not_replaced(path: Path) -> None:
    with Host(path, {}), pytest.raises(SnapshotError, match="a daemon listens at"):
        listen(path)


def test_a_file_in_the_sockets_place_is_left_alone(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no socket"):
        listen(path)
    assert path.read_text() == "mine"


def test_a_socket_in_a_missing_folder_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="choose another --socket"):
        listen(path.parent / "missing" / "door.sock")


def test_another_daemons_socket_is_not_removed_at_the_end(path: Path) -> None:
    with Host(path, {}):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


# --- the client ------------------------------------------------------------------------------------


def test_nobody_home_is_a_sentence(path: Path) -> None:
    with pytest.raises(DaemonUnavailable, match=r"no daemon answers at .* \(No such file or directory\)"):
        DoorClient.connect(path)


def test_a_silent_daemon_is_given_up_in_time_and_the_connection_with_it(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(path))
        silent.listen()
        with DoorClient.connect(path) as client:
            with pytest.raises(DaemonUnavailable, match="does not answer in time"):
                client.ask(HELLO, timeout_s=0.01)
            with pytest.raises(DaemonUnavailable, match="is closed"):
                client.ask(HELLO)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", DaemonUnavailable),
        (wire.pack(wire.Done())[:-1], DaemonUnavailable),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
        (wire.pack(wire.Done()) * 2, ProtocolError),
        (wire.pack(HELLO), ProtocolError),
    ],
)
def test_a_daemon_that_answers_nonsense_is_not_believed(path: Path, answer: bytes, kind: type[Exception]) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        with DoorClient.connect(path) as client, pytest.raises(kind):
            client.ask(HELLO)
        thread.join()
