"""Messages between daemons, and from tools that ask over the network: zmq, with frames of `wire`.

One ROUTER hears everybody; to each peer goes a DEALER of its own. What is sent one way (`Publish`, `Decree`, `Doubt`)
is state that its sender repeats until it sees that it arrived, so nothing waits here for a peer that is away: what
cannot leave now is dropped and counted. Requests (`Hello`, `AskStatus`, `AskInventory`) are answered to whoever asked;
everything else is dropped and counted under a reason. Nothing here blocks the loop, and nothing grows with what
strangers send.

Where daemons authenticate, all of it is CurveZMQ: a message arrives from whoever has the key that comes with it, whole,
in order and once, or it does not arrive. Who has a key that nobody told us is not let in, whose key is not the one that
was told for an address is not spoken to.

Imported only where a daemon has peers, since zmq takes memory that a daemon of one node does without.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from snapshotd import wire
from snapshotd.errors import ConfigError, DaemonUnavailable, ProtocolError
from snapshotd.keys import Keys
from snapshotd.streams import refused_by_peer

PEERS_MAX = 4096
ANSWERS_MAX = 64
QUEUE_MAX = 64
RECONNECT_MS = (100, 2000)
_HEARTBEAT_MS, _SILENCE_MS = 5_000, 15_000
_HANDSHAKE_MS = 3_000  # who is not let in hears nothing; after this it tries again

_ZAP = "inproc://zeromq.zap.01"
_ZAP_PARTS = 7  # version, request, domain, address, identity, mechanism, key
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_SOCKETS_OF_OUR_OWN = 4  # the ROUTER, its monitor's two ends, who lets in

Answer: TypeAlias = Callable[[wire.Request, bytes], "wire.Reply | Awaitable[wire.Reply | None] | None"]
OneWay: TypeAlias = wire.Publish | wire.Decree | wire.Doubt


class Acquaintances(Protocol):
    """Whom a mesh believes."""

    def curve_of(self, address: str) -> bytes | None: ...
    def believes(self, curve: bytes) -> bool: ...


class Mesh:
    """Hears and answers on `address` (tcp://HOST:PORT; port 0 or `*` for any) until it is closed.

    `answer` makes the reply to a request, at once or as an awaitable, or None for one that is not served here. `heard`
    is told what comes one way; without it that is not served. Both are told the key of whoever says it, which is empty
    without `keys`: then all of it goes in the clear. `dropped` hears a reason and a sentence for each message
    that was dropped. What these raise goes to the loop's exception handler, and the mesh goes on. All on the loop's
    thread. ConfigError if the address cannot be had.
    """

    def __init__(
        self,
        address: str,
        answer: Answer,
        heard: Callable[[OneWay, bytes], object] | None,
        dropped: Callable[[str, str], None],
        keys: Keys | None = None,
        known: Acquaintances | None = None,
    ) -> None:
        self._answer, self._heard, self._dropped = answer, heard, dropped
        self._keys, self._known = keys, known
        self._loop = asyncio.get_running_loop()
        self._context = zmq.asyncio.Context()
        self._context.set(zmq.MAX_SOCKETS, PEERS_MAX + ANSWERS_MAX + _SOCKETS_OF_OUR_OWN)
        # For sockets that never wait, and so need no futures.
        self._plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context)
        self._peers: OrderedDict[str, tuple[bytes, zmq.Socket[bytes]]] = OrderedDict()
        self._answers: set[asyncio.Task[None]] = set()
        self._guards: list[asyncio.Task[None]] = []
        self._socket = self._context.socket(zmq.ROUTER)
        _prepare(self._socket, address)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply that cannot leave is an error, not a silence
        try:
            if keys is not None:
                self._guard(keys)
            self._socket.bind(address)
        except zmq.ZMQError as error:
            for task in self._guards:
                task.cancel()
            self._context.destroy(linger=0)
            raise ConfigError(f"{address} cannot be listened on: {error.strerror}; choose another --listen") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        self._task = asyncio.create_task(self._serve())

    def send(self, address: str, message: OneWay) -> bool:
        """Hand a message to the peer at HOST:PORT if it can leave now; else it is dropped, which False says.

        Never blocks. The first one to a peer finds no connection yet, so it is dropped as well, and counted.
        ProtocolError for a message that the peer would refuse.
        """
        frame = wire.pack(message)
        try:
            socket = self._peer(address)
            _drain(socket)
            socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            why = "is not connected, or does not read" if isinstance(error, zmq.Again) else error.strerror
            self._dropped("mesh-unsent", f"a {type(message).__name__} was not sent, since {address} {why}")
            return False
        return True

    async def ask(self, address: str, request: wire.Request, timeout_s: float) -> wire.Reply:
        """The reply of the daemon at HOST:PORT. DaemonUnavailable if none comes in time, the typed Refused if it says
        no, ProtocolError for what is no reply."""
        frame = wire.pack(request)
        try:
            with self._context.socket(zmq.DEALER) as socket:  # LINGER is 0 from the first line on
                _prepare(socket, address)
                _speak_as(socket, self._keys, self._key_of(address))
                socket.connect(_endpoint(address))
                await socket.send(frame)
                reply = wire.unpack_reply(await asyncio.wait_for(socket.recv(), timeout_s))
        except (TimeoutError, asyncio.TimeoutError):
            raise DaemonUnavailable(_nobody(address)) from None
        except zmq.ZMQError as error:
            raise DaemonUnavailable(f"{address} cannot be reached: {error.strerror}") from None
        if isinstance(reply, wire.Refusal):
            raise refused_by_peer(reply)
        return reply

    def forget(self, address: str) -> None:
        """Knock no longer on the door of a peer that nothing will be sent to."""
        if (peer := self._peers.pop(address, None)) is not None:
            peer[1].close(linger=0)

    async def close(self) -> None:
        """Stop hearing and answering, give the port back. Whoever is in `ask` is cancelled."""
        tasks = (self._task, *self._guards, *self._answers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for address in list(self._peers):
            self.forget(address)
        self._context.destroy(linger=0)

    # --- out ---------------------------------------------------------------------------------------

    def _peer(self, address: str) -> zmq.Socket[bytes]:
        key = self._key_of(address)
        if address in self._peers and self._peers[address][0] != key:
            self.forget(address)  # another node is there now
        if address not in self._peers:
            while len(self._peers) >= PEERS_MAX:
                self.forget(next(iter(self._peers)))  # the one that was not used for longest
            socket = self._plain.socket(zmq.DEALER)
            self._connect(socket, address, key)
            self._peers[address] = key, socket
        self._peers.move_to_end(address)
        return self._peers[address][1]

    def _key_of(self, address: str) -> bytes:
        """Whose key whoever is there must have. A ZMQError, as for any address that nobody can be reached at, where
        that was never said."""
        if self._keys is None or self._known is None:
            return b""
        key = self._known.curve_of(address.removeprefix("tcp://"))
        if key is None:
            raise zmq.ZMQError(errno.EACCES, "nobody in this node's jobs is there")
        return key

    def _connect(self, socket: zmq.Socket[bytes], address: str, key: bytes) -> None:
        try:
            _prepare(socket, address)
            _speak_as(socket, self._keys, key)
            socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a peer that is away: it would be old news
            socket.connect(_endpoint(address))
        except BaseException:
            socket.close(linger=0)
            raise

    # --- in ----------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            parts = await self._socket.recv_multipart(copy=False)
            self._loop.call_soon(self._take, parts)
            await asyncio.sleep(0)  # a queue that is never empty would keep the loop for itself

    def _take(self, parts: list[zmq.Frame]) -> None:
        try:
            self._take_one(parts)
        except ProtocolError as error:
            self._drop(error)

    def _take_one(self, parts: list[zmq.Frame]) -> None:
        if len(parts) != 2:
            raise ProtocolError("parts", f"it has {len(parts)} parts where one is expected")
        who = bytes.fromhex(str(parts[1].get("User-Id"))) if self._keys is not None else b""
        peer, frame = (part.bytes for part in parts)
        message = wire.unpack_request(frame)
        if isinstance(message, wire.Publish | wire.Decree | wire.Doubt):
            if self._heard is None:
                raise _unserved(message)
            self._heard(message, who)
        elif isinstance(message, wire.Hello | wire.AskStatus | wire.AskInventory | wire.Introduce):
            self._reply(peer, message, self._answer(message, who))
        else:
            raise _unserved(message)

    def _reply(
        self, who: bytes, request: wire.Request, reply: wire.Reply | Awaitable[wire.Reply | None] | None
    ) -> None:
        if inspect.isawaitable(reply):
            if len(self._answers) >= ANSWERS_MAX:
                _dismiss(reply)
                raise ProtocolError("busy", f"{ANSWERS_MAX} requests are being answered already")
            task = self._loop.create_task(self._reply_later(who, request, reply))
            self._answers.add(task)
            task.add_done_callback(self._answered)
        elif reply is None:
            raise _unserved(request)
        else:
            self._send_reply(who, wire.pack(reply))

    async def _reply_later(self, who: bytes, request: wire.Request, reply: Awaitable[wire.Reply | None]) -> None:
        try:
            self._reply(who, request, await reply)
        except ProtocolError as error:
            self._drop(error)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answers.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "a request from the network", "exception": error})

    def _send_reply(self, who: bytes, frame: bytes) -> None:
        sent = asyncio.ensure_future(self._socket.send_multipart([who, frame], zmq.NOBLOCK))  # done: it never waits
        if isinstance(sent.exception(), zmq.ZMQError):
            self._dropped("listen-unread", "a reply to the network was dropped, since nobody reads it")

    # --- who is let in ------------------------------------------------------------------------------

    def _guard(self, keys: Keys) -> None:
        """Let nobody in whose key is unknown (ZAP, RFC 27), and count who fails before that."""
        self._socket.curve_server = True
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.curve_secret)
        self._socket.setsockopt(zmq.ZAP_DOMAIN, b"peers")
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody asked means nobody let in
        asked = self._context.socket(zmq.REP)
        asked.bind(_ZAP)
        failing = self._socket.get_monitor_socket(_FAILED)
        self._guards = [asyncio.create_task(self._let_in(asked)), asyncio.create_task(self._count_failing(failing))]

    async def _let_in(self, asked: zmq.asyncio.Socket) -> None:
        """Temporarily not (300) rather than never (400), since who is a stranger may be introduced in a moment."""
        while True:
            parts = await asked.recv_multipart()
            version, number, key = parts[0], parts[1], parts[-1] if len(parts) == _ZAP_PARTS else b""
            if self._known is not None and self._known.believes(key):
                status, user = b"200", key.hex().encode()
            else:
                status, user = b"300", b""
                where = parts[3].decode(errors="replace") if len(parts) > 3 else "somebody"
                self._dropped("listen-stranger", f"{where} was not let in: no job here has a node with its key")
            await asked.send_multipart([version, number, status, b"", user, b""])

    async def _count_failing(self, failing: zmq.asyncio.Socket) -> None:
        while True:
            parse_monitor_message(await failing.recv_multipart())
            self._dropped("listen-handshake", "somebody was not let in: they do not speak CurveZMQ, or not to our key")

    # --- dropping -----------------------------------------------------------------------------------

    def _drop(self, error: ProtocolError) -> None:
        self._dropped(f"listen-{error.reason}", f"a message from the network was dropped: {error}")


def ask_over_network(
    address: str, request: wire.Request, timeout_s: float, keys: Keys | None = None, key: bytes = b""
) -> wire.Reply:
    """A tool's question to a daemon that listens at tcp://HOST:PORT. DaemonUnavailable if no answer comes in time.

    With `keys` it asks as the node whose keys they are, and nobody else than who has this `key`.
    """
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, int("[" in address))
        _speak_as(socket, keys, key)
        socket.connect(_endpoint(address))
        socket.send(wire.pack(request))
        if not socket.poll(int(timeout_s * 1000)):
            raise DaemonUnavailable(_nobody(address))
        return wire.unpack_reply(socket.recv())
    except zmq.ZMQError as error:
        raise DaemonUnavailable(f"{address} cannot be reached: {error.strerror}") from None
    finally:
        socket.close()
        context.term()


def _prepare(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, address: str) -> None:
    """What every socket has: bounds on a message, a queue and a silence, and nothing that outlives it."""
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.MAXMSGSIZE, wire.FRAME_BYTES_MAX + wire.HEADER_BYTES),
        (zmq.RCVHWM, QUEUE_MAX),
        (zmq.SNDHWM, QUEUE_MAX),
        (zmq.IPV6, int("[" in address)),
        (zmq.RECONNECT_IVL, RECONNECT_MS[0]),
        (zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1]),
        (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
        (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS),
        (zmq.HEARTBEAT_TTL, _SILENCE_MS),
    ):
        socket.setsockopt(option, value)


def _speak_as(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, keys: Keys | None, key: bytes) -> None:
    """Encrypt for whoever has this key; in the clear without keys."""
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.curve_secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.badge.curve)
        socket.setsockopt(zmq.CURVE_SERVERKEY, key)


def _drain(socket: zmq.Socket[bytes]) -> None:
    """Nobody asked for an answer here: what came anyway must not fill the queue, or heartbeats would not be seen."""
    with contextlib.suppress(zmq.Again):
        for _ in range(QUEUE_MAX):
            socket.recv_multipart(zmq.NOBLOCK)


def _dismiss(reply: Awaitable[object]) -> None:
    if inspect.iscoroutine(reply):
        reply.close()
    elif isinstance(reply, asyncio.Future):
        reply.cancel()


def _unserved(message: wire.Request) -> ProtocolError:
    return ProtocolError("unserved", f"{type(message).__name__} is not served on the network")


def _nobody(address: str) -> str:
    return f"no daemon answers at {address}; does `snapshotd serve --listen` run there?"


def _endpoint(address: str) -> str:
    return address if "://" in address else f"tcp://{address}"
