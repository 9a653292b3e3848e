"""Messages between daemons: what is repeated arrives, nothing waits for who is away, strangers achieve nothing."""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import mesh, wire
from snapshotd.errors import ConfigError, DaemonUnavailable, ProtocolError, SnapshotGone
from snapshotd.mesh import Mesh, ask_over_network

ANY = "tcp://127.0.0.1:*"
PATIENCE_S = 120.0
GENERATION = wire.GenerationId(1, bytes(16))
HELLO = wire.Hello("tool", 1)
WELCOME = wire.Welcome(bytes(16), "node", 1, 10.0)
DOUBT = wire.Doubt("job", GENERATION, bytes(16), 0, wire.SnapshotId(GENERATION, 7), "why")


def decree(serial: int, padding: int = 0) -> wire.Decree:
    return wire.Decree("job", GENERATION, bytes(16), serial, 0, [2**40] * padding, 1, 1, False)


PUBLISH = wire.Publish("job", GENERATION, bytes(16), 1, True, False, {0: 3}, [], 0, 0, 0)


class Peer:
    """A mesh and everything that it told us."""

    def __init__(self, address: str = ANY, **answers: Any) -> None:
        self.answers: dict[str, Callable[[], wire.Reply | Awaitable[wire.Reply | None] | None]] = answers
        self.heard: list[Any] = []
        self.dropped: list[tuple[str, str]] = []
        self.mesh = Mesh(address, self._answer, self._hear, lambda *why: self.dropped.append(why))
        self.address = self.mesh.address

    def _hear(self, message: wire.Request, who: bytes) -> None:
        self.heard.append(message)

    def _answer(self, request: wire.Request, who: bytes) -> wire.Reply | Awaitable[wire.Reply | None] | None:
        return self.answers.get(type(request).__name__, lambda: WELCOME)()

    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.dropped]


@asynccontextmanager
async def peers(count: int = 1, address: str = ANY, **answers: Any) -> AsyncIterator[list[Peer]]:
    made = [Peer(address, **answers) for _ in range(count)]
    try:
        yield made
    finally:
        for one in made:
            await one.mesh.close()


async def until(done: Callable[[], object], what: str) -> None:
    """Wait for a condition, within a bound."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        await asyncio.sleep(0.002)


async def repeated(sender: Peer, receiver: Peer, message: mesh.OneWay) -> None:
    """What daemons do: send a state until it is seen to have arrived."""

    def again() -> bool:
        return message in receiver.heard or (sender.mesh.send(receiver.address, message) and False)

    await until(again, f"{message} to arrive")


@contextmanager
def stranger(address: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as one:
        one.setsockopt(zmq.LINGER, 0)
        one.connect(f"tcp://{address}")
        yield one


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


# --- messages that go one way ----------------------------------------------------------------------


def test_states_and_decisions_arrive_in_both_directions() -> None:
    async def test() -> None:
        async with peers(2) as (one, other):
            for message in (PUBLISH, decree(1), DOUBT):
                await repeated(one, other, message)
                await repeated(other, one, message)
            assert set(one.reasons() + other.reasons()) <= {"mesh-unsent"}

    run(test())


def test_messages_of_one_sender_keep_their_order() -> None:
    async def test() -> None:
        async with peers(2) as (one, other):
            await repeated(one, other, decree(0))
            for serial in range(1, 200):
                await until(functools.partial(one.mesh.send, other.address, decree(serial)), "room in the queue")
            await until(lambda: other.heard[-1].serial == 199, "the last one")
            serials = [message.serial for message in other.heard]
            assert serials == sorted(serials)

    run(test())


def test_a_send_to_a_peer_that_is_away_is_dropped_at_once_and_leaves_nothing_behind() -> None:
    async def test() -> None:
        async with peers() as [one]:
            with socket.socket() as taken:  # bound and not listening: nobody can be there
                taken.bind(("127.0.0.1", 0))
                away = f"127.0.0.1:{taken.getsockname()[1]}"
                assert not any(one.mesh.send(away, decree(serial)) for serial in range(1000))
                assert one.reasons() == ["mesh-unsent"] * 1000
                assert "a Decree was not sent" in one.dropped[0][1]
            async with peers(address=f"tcp://{away}") as [back]:
                await repeated(one, back, decree(5000))
                assert {message.serial for message in back.heard} == {5000}, "nothing old was kept for it"

    run(test())


def test_a_peer_that_does_not_read_is_not_waited_for() -> None:
    async def test() -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as deaf:
            deaf.setsockopt(zmq.RCVHWM, 1)
            address = f"127.0.0.1:{deaf.bind_to_random_port('tcp://127.0.0.1')}"
            async with peers() as [one]:
                await until(lambda: one.mesh.send(address, decree(0, 4000)), "the connection")
                sent = 0
                while one.mesh.send(address, decree(1, 4000)):
                    sent += 1
                    assert sent < 10_000, "a queue without a bound"
                assert one.reasons()[-1] == "mesh-unsent"

    run(test())


def test_a_mesh_finds_a_peer_again_that_was_restarted() -> None:
    async def test() -> None:
        async with peers() as [one]:
            address = ANY
            for serial in range(3):
                async with peers(address=address) as [other]:
                    address = f"tcp://{other.address}"
                    await repeated(one, other, decree(serial))
                    assert other.heard[0] == decree(serial)

    run(test())


def test_what_answers_a_message_that_wants_no_answer_fills_no_queue() -> None:
    async def test() -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as chatty:
            address = f"127.0.0.1:{chatty.bind_to_random_port('tcp://127.0.0.1')}"
            async with peers() as [one]:
                await until(lambda: one.mesh.send(address, decree(0)), "the connection")
                await until(lambda: chatty.poll(0), "the first message")
                who, _ = chatty.recv_multipart()
                chatty.send_multipart([who, wire.pack(wire.Done())])
                _, unread = one.mesh._peers[address]
                await until(lambda: unread.poll(0), "the answer")
                assert one.mesh.send(address, decree(1))
                assert not unread.poll(0)
                assert set(one.reasons()) <= {"mesh-unsent"}

    run(test())


def test_peers_are_bounded_and_the_one_used_least_recently_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "PEERS_MAX", 2)

    async def test() -> None:
        async with peers() as [one]:
            for port in (1, 2, 1, 3):
                one.mesh.send(f"127.0.0.1:{port}", decree(0))
            assert list(one.mesh._peers) == ["127.0.0.1:1", "127.0.0.1:3"]
            one.mesh.forget("127.0.0.1:1")
            one.mesh.forget("127.0.0.1:1")
            assert list(one.mesh._peers) == ["127.0.0.1:3"]

    run(test())


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:port", "ftp://127.0.0.1:1"])
def test_an_address_that_is_none_is_a_message_unsent(address: str) -> None:
    async def test() -> None:
        async with peers() as [one]:
            assert not one.mesh.send(address, decree(0))
            assert one.reasons() == ["mesh-unsent"]
            assert list(one.mesh._peers) == []
            with pytest.raises(DaemonUnavailable, match="cannot be reached"):
                await one.mesh.ask(address, HELLO, PATIENCE_S)

    run(test())


def test_a_message_that_nobody_could_read_is_refused_here() -> None:
    async def test() -> None:
        async with peers() as [one]:
            with pytest.raises(ProtocolError, match="cannot be sent"):
                one.mesh.send("127.0.0.1:1", decree(-1))

    run(test())


# --- requests --------------------------------------------------------------------------------------


def test_requests_are_answered_at_once_or_later() -> None:
    async def later() -> wire.Reply:
        await asyncio.sleep(0)
        return wire.StatusReport(b"{}")

    async def test() -> None:
        async with peers(2, AskStatus=later) as (one, other):
            assert await one.mesh.ask(other.address, HELLO, PATIENCE_S) == WELCOME
            assert await one.mesh.ask(other.address, wire.AskStatus(), PATIENCE_S) == wire.StatusReport(b"{}")
            assert await one.mesh.ask(one.address, HELLO, PATIENCE_S) == WELCOME, "also oneself"

    run(test())


def test_a_tool_asks_from_a_process_without_a_loop() -> None:
    async def test() -> None:
        async with peers() as [one]:
            for address in (one.address, f"tcp://{one.address}"):
                assert await asyncio.to_thread(ask_over_network, address, HELLO, PATIENCE_S) == WELCOME

    run(test())


def test_nobody_there_is_a_sentence() -> None:
    async def test() -> None:
        async with peers() as [one]:
            with pytest.raises(DaemonUnavailable, match=r"no daemon answers at 127\.0\.0\.1:1"):
                await one.mesh.ask("127.0.0.1:1", HELLO, 0.01)
            with pytest.raises(DaemonUnavailable, match="no daemon answers at"):
                ask_over_network("tcp://127.0.0.1:1", HELLO, 0.01)

    run(test())


def test_a_no_is_a_typed_error_and_nonsense_is_not_believed() -> None:
    async def test() -> None:
        gone = wire.Refusal("gone", "it was replaced")
        odd = wire.Refusal("no-room", "no", {"needed_bytes": "many"})
        async with peers(Hello=lambda: gone, AskStatus=lambda: HELLO, AskInventory=lambda: odd) as [one]:
            with pytest.raises(SnapshotGone, match="it was replaced"):
                await one.mesh.ask(one.address, HELLO, PATIENCE_S)
            with pytest.raises(ProtocolError):
                await one.mesh.ask(one.address, wire.AskStatus(), PATIENCE_S)
            with pytest.raises(ProtocolError, match="facts that are none"):
                await one.mesh.ask(one.address, wire.AskInventory("job"), PATIENCE_S)

    run(test())


@pytest.mark.parametrize("later", [False, True])
def test_a_failure_of_ours_goes_to_the_loops_handler_and_the_mesh_goes_on(later: bool) -> None:
    failures: list[BaseException | None] = []

    def fail() -> wire.Reply:
        raise RuntimeError("a mistake of ours")

    async def fail_later() -> wire.Reply:
        return fail()

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what.get("exception")))
        async with peers(AskStatus=fail_later if later else fail) as [one]:
            with stranger(one.address) as asks:
                asks.send(wire.pack(wire.AskStatus()))
                await until(lambda: failures, "the failure")
            assert await one.mesh.ask(one.address, HELLO, PATIENCE_S) == WELCOME
            assert [str(error) for error in failures] == ["a mistake of ours"]

    run(test())


def test_answers_that_take_long_are_bounded_and_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "ANSWERS_MAX", 2)

    async def test() -> None:
        never = asyncio.Event()

        async def slow() -> wire.Reply | None:
            await never.wait()
            return None

        async with peers(AskStatus=slow) as [one]:
            with stranger(one.address) as asks:
                for _ in range(3):
                    asks.send(wire.pack(wire.AskStatus()))
                await until(lambda: one.reasons() == ["listen-busy"], "one too many")
            assert await one.mesh.ask(one.address, HELLO, PATIENCE_S) == WELCOME
            never.set()
            await until(lambda: one.reasons() == ["listen-busy", *["listen-unserved"] * 2], "what came to nothing")

    run(test())


def test_a_reply_to_somebody_who_has_gone_is_dropped_and_counted() -> None:
    async def test() -> None:
        asked = asyncio.Event()

        def answer() -> wire.Reply:
            asked.set()
            return WELCOME

        async with peers(Hello=answer) as [one]:
            with zmq.Context() as context, context.socket(zmq.DEALER) as asks:
                asks.setsockopt(zmq.IDENTITY, b"who")
                asks.connect(f"tcp://{one.address}")
                asks.send(wire.pack(HELLO))
                await until(asked.is_set, "the question")

            def told() -> bool:
                one.mesh._send_reply(b"who", wire.pack(WELCOME))
                return one.reasons() == ["listen-unread"]

            await until(told, "our side to see that nobody is there")

    run(test())


# --- strangers -------------------------------------------------------------------------------------


def test_nonsense_is_dropped_with_counted_reasons() -> None:
    good = wire.pack(HELLO)

    async def test() -> None:
        async with peers(AskInventory=lambda: None) as [one]:
            with stranger(one.address) as speaks:
                speaks.send(b"nonsense of more than sixteen bytes")
                speaks.send(b"short")
                speaks.send(good[:-1] + bytes([good[-1] ^ 1]))
                speaks.send(good[:-1])
                speaks.send(wire.pack(wire.Stop()))
                speaks.send(wire.pack(wire.Done()))
                speaks.send(wire.pack(wire.AskInventory("job")))
                speaks.send_multipart([b"two", b"parts"])
                kinds = ["magic", "truncated", "checksum", "truncated", "unserved", "content", "unserved", "parts"]
                await until(lambda: one.reasons() == [f"listen-{kind}" for kind in kinds], f"{kinds}")
            assert one.heard == []
            assert await one.mesh.ask(one.address, HELLO, PATIENCE_S) == WELCOME

    run(test())


@given(st.lists(st.lists(st.binary(max_size=80), min_size=1, max_size=3), max_size=20))
@settings(deadline=None, max_examples=15)
def test_random_parts_never_disturb_the_mesh(messages: list[list[bytes]]) -> None:
    async def test() -> None:
        async with peers() as [one]:
            with stranger(one.address) as speaks:
                for parts in messages:
                    speaks.send_multipart(parts)
                await until(lambda: len(one.dropped) == len(messages), "all to be dropped")
            assert await one.mesh.ask(one.address, HELLO, PATIENCE_S) == WELCOME

    run(test())


def test_bytes_that_are_no_zmq_and_messages_that_are_too_long_never_disturb_the_mesh() -> None:
    async def test() -> None:
        async with peers() as [one]:
            host, _, port = one.address.rpartition(":")
            with socket.create_connection((host, int(port)), PATIENCE_S) as raw, stranger(one.address) as speaks:
                raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
                speaks.send(bytes(wire.FRAME_BYTES_MAX + wire.HEADER_BYTES + 1))
                assert await one.mesh.ask(one.address, HELLO, PATIENCE_S) == WELCOME
            assert (one.heard, one.dropped) == ([], [])

    run(test())


def test_a_flood_does_not_keep_the_loop_for_itself() -> None:
    async def test() -> None:
        async with peers() as [one]:
            with stranger(one.address) as floods:
                ticks, sent = 0, 500
                for _ in range(sent):
                    floods.send(b"nonsense")
                while len(one.dropped) < sent:
                    before = len(one.dropped)
                    await asyncio.sleep(0)
                    ticks += 1
                    assert len(one.dropped) - before <= 2, "one message a turn of the loop, or about that"

    run(test())


# --- begin and end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "tcp://[::1]:*"])
def test_any_port_becomes_a_real_one(address: str) -> None:
    async def test() -> None:
        try:
            one = Peer(address)
        except ConfigError:
            pytest.skip("this machine has no IPv6")
        try:
            host, _, port = one.address.rpartition(":")
            assert host == address[len("tcp://") : -len(":0")]
            assert int(port) > 0
            assert await one.mesh.ask(one.address, HELLO, PATIENCE_S) == WELCOME
        finally:
            await one.mesh.close()

    run(test())


def test_a_port_that_is_taken_is_a_sentence_and_one_that_was_closed_is_free() -> None:
    async def test() -> None:
        async with peers() as [one]:
            with pytest.raises(ConfigError, match="choose another --listen"):
                Peer(f"tcp://{one.address}")
        async with peers(address=f"tcp://{one.address}"):
            pass

    run(test())


def test_closing_cancels_whoever_still_asks() -> None:
    async def test() -> None:
        one = Peer()
        asking = asyncio.create_task(one.mesh.ask("127.0.0.1:1", HELLO, PATIENCE_S))
        await asyncio.sleep(0)
        await one.mesh.close()
        with pytest.raises(asyncio.CancelledError):
            await asking

    run(test())
