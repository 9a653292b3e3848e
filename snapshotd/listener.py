"""The daemon's ear on the network: a zmq ROUTER that says who we are and how we are, and drops everything else.

Peers come with a later release; until then this is loopback only and changes nothing. Frames are those of `wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import zmq
import zmq.asyncio

from snapshotd import wire
from snapshotd.errors import ConfigError, DaemonUnavailable, ProtocolError

_QUEUE_MAX = 256


class Listener:
    """Answers `Hello` and `AskStatus` on `address` until it is closed.

    `answer` makes the reply to a request, or None for one that is not served here; `dropped` hears what was dropped.
    ConfigError if the address cannot be had.
    """

    def __init__(
        self,
        address: str,
        answer: Callable[[wire.Request], wire.Reply | None],
        dropped: Callable[[str, str], None],
    ) -> None:
        self._answer, self._dropped = answer, dropped
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, wire.FRAME_BYTES_MAX + wire.HEADER_BYTES),
            (zmq.RCVHWM, _QUEUE_MAX),
            (zmq.SNDHWM, _QUEUE_MAX),
            (zmq.IPV6, int("[" in address)),
        ):
            self._socket.setsockopt(option, value)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy()
            raise ConfigError(f"{address} cannot be listened on: {error.strerror}; choose another --listen") from None
        self._task = asyncio.create_task(self._serve())

    async def close(self) -> None:
        """Stop answering and give the port back."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._context.destroy()

    async def _serve(self) -> None:
        while True:
            parts = await self._socket.recv_multipart()
            try:
                await self._serve_one(parts)
            except ProtocolError as error:
                self._dropped(f"listen-{error.reason}", f"a message from the network was dropped: {error}")
            except zmq.Again:
                self._dropped("listen-unread", "a reply to the network was dropped, since nobody reads it")

    async def _serve_one(self, parts: list[bytes]) -> None:
        if len(parts) != 2:
            raise ProtocolError("parts", f"it has {len(parts)} parts where one is expected")
        request = wire.unpack_request(parts[1])
        reply = self._answer(request)
        if reply is None:
            raise ProtocolError("unserved", f"{type(request).__name__} is answered on the Unix socket only")
        await self._socket.send_multipart([parts[0], wire.pack(reply)], zmq.NOBLOCK)


def ask_over_network(address: str, request: wire.Request, timeout_s: float) -> wire.Reply:
    """A tool's question to a daemon's listener. DaemonUnavailable if no answer comes in time."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, int("[" in address))
        socket.connect(address)
        socket.send(wire.pack(request))
        if not socket.poll(int(timeout_s * 1000)):
            raise DaemonUnavailable(f"no daemon answers at {address}; does `snapshotd serve --listen` run there?")
        return wire.unpack_reply(socket.recv())
    except zmq.ZMQError as error:
        raise DaemonUnavailable(f"{address} cannot be reached: {error.strerror}") from None
    finally:
        socket.close()
        context.term()
