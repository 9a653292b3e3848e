"""A conduit that nobody else reads or alters: mutual TLS 1.3, each side pinned to the certificates that it was told.

It keeps what `Conduit` promises. TLS works on memory here and the socket stays as it was: so the kernel keeps the time,
large chunks cross the socket where `ssl` alone would take two system calls for each 16 KiB, and what a connection holds
is bounded by two chunks and one block. The GIL is free while bytes are received and decrypted.
"""

from __future__ import annotations

import socket
import ssl

from snapshotd.clock import SystemClock
from snapshotd.conduit import Conduit, Stalled
from snapshotd.errors import ProtocolError

GREETING_MAX_S = 10.0
_CHUNK_BYTES, _REQUEST_BYTES = 256 << 10, 16 << 10
_CLOCK = SystemClock()


class SecureConduit(Conduit):
    """`greet` comes first, and once; after it everything is as in `Conduit`.

    Bytes that were altered, repeated or left out on their way are ProtocolError("altered"), and not one of them is
    given out.
    """

    def __init__(
        self, connection: socket.socket, silence_max_s: float, context: ssl.SSLContext, *, server: bool = False
    ) -> None:
        super().__init__(connection, min(silence_max_s, GREETING_MAX_S))
        self._silence_then_max_s = silence_max_s
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=server)
        self._chunk = memoryview(bytearray(_REQUEST_BYTES if server else _CHUNK_BYTES))

    def greet(self) -> bytes:
        """Prove to each other who we are; returns the other side's certificate.

        ProtocolError("stranger") if it has none that is believed here, Stalled or EOFError if it does not go through
        with it.
        """
        deadline_s = _CLOCK.monotonic_s() + GREETING_MAX_S
        try:
            while not self._has_greeted():
                self._flush()
                if not self._pull():
                    raise EOFError
                if _CLOCK.monotonic_s() > deadline_s:
                    raise Stalled
        except ssl.SSLError as error:
            self._say_why()
            raise ProtocolError("stranger", f"it did not prove to be part of a job here ({_reason(error)})") from None
        self._flush()
        self.bear_silence(self._silence_then_max_s)
        return self._tls.getpeercert(binary_form=True) or b""

    def send(self, data: bytes | memoryview, more: bool = False) -> None:
        with memoryview(data) as whole:
            at = 0
            while at < len(whole):
                end = min(at + _CHUNK_BYTES, len(whole))
                while at < end:
                    with whole[at:end] as part:
                        at += self._tls.write(part)
                if at < len(whole) or not more:
                    self._flush()

    def fill(self, view: memoryview, patient: bool = False, deadline_s: float | None = None) -> int:
        at, deadline_s = 0, deadline_s if patient or deadline_s else self.deadline_s(len(view))
        while at < len(view):
            try:
                with view[at:] as rest:
                    at += int(self._tls.read(len(rest), rest))
            except ssl.SSLWantReadError:
                if deadline_s is not None and _CLOCK.monotonic_s() > deadline_s:
                    raise Stalled from None
                if not self._pull(patient and deadline_s is None):
                    break
                deadline_s = deadline_s or self.deadline_s(len(view))
            except ssl.SSLZeroReturnError:
                break
            except ssl.SSLError as error:
                raise _distrust(error) from None
        return at

    def is_quiet(self) -> bool:
        return not self._arrived.pending and not self._tls.pending() and super().is_quiet()

    def _has_greeted(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def _say_why(self) -> None:
        """The alert that says why, if the other side still listens."""
        try:
            self._flush()
        except (OSError, Stalled):
            return

    def _flush(self) -> None:
        if self._leaving.pending:
            super().send(self._leaving.read())

    def _pull(self, patient: bool = False) -> bool:
        """Some of what the other side sent; False if it ended. Stalled if nothing comes, unless `patient`."""
        while True:
            try:
                count = self._socket.recv_into(self._chunk)
            except BlockingIOError:
                if patient:
                    continue
                raise Stalled from None
            with self._chunk[:count] as part:
                self._arrived.write(part)
            return count > 0


def _distrust(error: ssl.SSLError) -> ProtocolError:
    """What the end of an established connection means. With TLS 1.3 a client learns only then that it is a stranger."""
    if "ALERT" in (error.reason or ""):
        return ProtocolError("stranger", f"the other side does not believe us ({_reason(error)})")
    return ProtocolError("altered", f"bytes arrived that the other side did not send so ({_reason(error)})")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or type(error).__name__).replace("_", " ").lower()
