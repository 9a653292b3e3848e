"""CurveZMQ between daemons: what is said comes from whoever has the key, and strangers are not let in."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq

from snapshotd import mesh, wire
from snapshotd.errors import DaemonUnavailable
from snapshotd.keys import Keys
from snapshotd.mesh import Mesh, ask_over_network
from snapshotd.trust import Trust
from snapshotd.wire import GenerationId, Place

GENERATION = GenerationId(1, bytes(16))
WELCOME = wire.Welcome(bytes(16), "there", 1, 0.0)
HELLO = wire.Hello("tool", 1)
KEYS = [Keys.draw(f"node {number}") for number in range(3)]
PATIENCE_S, IN_VAIN_S = 60.0, 0.3


def decree(serial: int) -> wire.Decree:
    return wire.Decree("job", GENERATION, bytes(16), serial, 0, [], 1, 1, False)


class Peer:
    """A daemon's mesh, its keys, whom it believes, and everything that it heard and dropped."""

    def __init__(self, keys: Keys, address: str = "tcp://127.0.0.1:0") -> None:
        self.keys, self.trust = keys, Trust()
        self.heard: list[tuple[Any, bytes]] = []
        self.dropped: list[str] = []
        self.mesh = Mesh(address, lambda _, who: WELCOME, self._hear, self._drop, keys, self.trust)
        self.address = self.mesh.address

    def _hear(self, message: Any, who: bytes) -> None:
        self.heard.append((message, who))

    def _drop(self, reason: str, sentence: str) -> None:
        self.dropped.append(reason)

    def believe(self, *others: Peer) -> None:
        places = [Place(one.keys.badge.curve[:16], "", one.address, "", [], one.keys.badge) for one in others]
        self.trust.introduce("job", places, 0.0)


@asynccontextmanager
async def peers(count: int) -> AsyncIterator[list[Peer]]:
    made = [Peer(keys) for keys in KEYS[:count]]
    try:
        yield made
    finally:
        for one in made:
            await one.mesh.close()


async def until(done: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        await asyncio.sleep(0.002)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


def test_what_is_heard_comes_with_the_key_of_whoever_said_it_and_requests_are_answered() -> None:
    async def test() -> None:
        async with peers(2) as (one, other):
            one.believe(one, other)
            other.believe(one, other)
            await until(lambda: (one.mesh.send(other.address, decree(7)) and False) or other.heard, "the decree")
            assert other.heard[0] == (decree(7), one.keys.badge.curve)
            assert await one.mesh.ask(other.address, HELLO, PATIENCE_S) == WELCOME
            asked = asyncio.to_thread(
                ask_over_network, other.address, HELLO, PATIENCE_S, one.keys, other.keys.badge.curve
            )
            assert await asked == WELCOME
            assert set(one.dropped + other.dropped) <= {"mesh-unsent"}

    run(test())


def test_a_key_that_nobody_told_is_not_let_in_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "_HANDSHAKE_MS", 200)

    async def test() -> None:
        async with peers(2) as (one, other):
            one.believe(other)
            await until(lambda: one.mesh.send(other.address, decree(1)) or "listen-stranger" in other.dropped, "a no")
            assert other.heard == []
            with pytest.raises(DaemonUnavailable):
                await one.mesh.ask(other.address, HELLO, IN_VAIN_S)
            other.believe(one)
            await until(lambda: one.mesh.send(other.address, decree(2)), "being let in")
            await until(lambda: other.heard, "the decree")
            assert other.heard[0] == (decree(2), one.keys.badge.curve)

    run(test())


def test_nothing_is_said_to_an_address_of_which_no_key_was_told_or_to_another_key_than_that() -> None:
    async def test() -> None:
        async with peers(3) as (one, other, third):
            for peer in (other, third):
                peer.believe(one)
            assert not one.mesh.send(other.address, decree(1))
            assert one.dropped == ["mesh-unsent"]
            with pytest.raises(DaemonUnavailable, match="nobody in this node's jobs is there"):
                await one.mesh.ask(other.address, HELLO, PATIENCE_S)
            place = Place(bytes(16), "", other.address, "", [], third.keys.badge)
            one.trust.introduce("job", [place], 0.0)
            await until(lambda: one.mesh.send(other.address, decree(2)) or "listen-handshake" in other.dropped, "a no")
            assert other.heard == []
            one.believe(other)  # another node is at that address now
            await until(lambda: one.mesh.send(other.address, decree(3)), "the right one to be spoken to")
            await until(lambda: other.heard, "the decree")
            assert other.heard[0][0] == decree(3)

    run(test())


def test_who_speaks_in_the_clear_or_no_zmq_at_all_is_counted_and_disturbs_nobody() -> None:
    async def test() -> None:
        async with peers(2) as (one, other):
            one.believe(other)
            other.believe(one)
            host, _, port = other.address.rpartition(":")
            with zmq.Context() as context, context.socket(zmq.DEALER) as clear:
                clear.setsockopt(zmq.LINGER, 0)
                clear.connect(f"tcp://{other.address}")
                clear.send(wire.pack(decree(1)))
                with socket.create_connection((host, int(port)), PATIENCE_S) as raw:
                    raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
                    await until(lambda: "listen-handshake" in other.dropped, "a stranger counted")
                    assert await one.mesh.ask(other.address, HELLO, PATIENCE_S) == WELCOME
            assert other.heard == []

    run(test())


def test_messages_that_were_altered_or_said_again_on_their_way_are_not_heard() -> None:
    async def test() -> None:
        async with peers(2) as (one, other):
            one.believe(other)
            other.believe(one)
            server, altering = await _between(other.address)
            place = Place(other.keys.badge.curve[:16], "", _address(server), "", [], other.keys.badge)
            one.trust.introduce("job", [place], 0.0)
            await until(lambda: one.mesh.send(_address(server), decree(1)), "the connection")
            await until(lambda: other.heard, "the first message")
            altering.append(lambda data: data[:-1] + bytes([data[-1] ^ 1]))
            assert one.mesh.send(_address(server), decree(2))
            await until(lambda: not altering, "an altered message to have been carried")
            altering.append(lambda data: data * 2)
            await until(lambda: one.mesh.send(_address(server), decree(3)), "the next connection")
            await until(lambda: any(said == decree(3) for said, _ in other.heard) or not altering, "what came after")
            server.close()
            await server.wait_closed()
            assert decree(2) not in [said for said, _ in other.heard]
            assert [said for said, _ in other.heard].count(decree(3)) <= 1

    run(test())


def _address(server: asyncio.Server) -> str:
    return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _between(address: str) -> tuple[asyncio.Server, list[Callable[[bytes], bytes]]]:
    """Somebody who carries connections and alters one stretch of what goes there, as often as the list says."""
    host, _, port = address.rpartition(":")
    changes: list[Callable[[bytes], bytes]] = []

    async def pump(source: asyncio.StreamReader, to: asyncio.StreamWriter, there: bool) -> None:
        try:
            while data := await source.read(65536):
                to.write(changes.pop()(data) if there and changes else data)
                await to.drain()
        except OSError:
            pass
        finally:
            to.close()

    async def carry(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        far_source, far_to = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(source, far_to, True), pump(far_source, to, False))

    return await asyncio.start_server(carry, "127.0.0.1", 0), changes


def test_closing_leaves_no_task_and_gives_the_port_back() -> None:
    async def test() -> None:
        async with peers(1) as [one]:
            pass
        again = Peer(KEYS[0], f"tcp://{one.address}")
        await again.mesh.close()
        assert len(asyncio.all_tasks()) <= 2  # this one, and who waits for it

    run(test())
