"""Sums that peers ask for: the survivors' side of a rebuild that is spread over them.

A newcomer that pulls all k pieces itself receives k times what it lost. So it asks each survivor for a part of the sum
(`wire.Combine`). The survivor takes its own bytes from its memory and the others with READ, checks every block, and
sends each window as soon as it is made: the newcomer receives about what it lost, and everybody sends about as much.

A node that assists promises: what is asked for is checked before a byte is read; a sum costs two windows and a staging
area, and there are `SUMS_MAX` of them at most; it runs at the priority of READs, within `peer_bandwidth`, and ends with
the connection. Whether the sum is right is for whoever asked: it knows the checksums of what it lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future

from snapshotd import _native, combine, wire
from snapshotd.combine import BadBytes, Cancelled, Span, Symbol, Tools
from snapshotd.errors import ProtocolError, Refused, SnapshotError, SourceDamaged
from snapshotd.manifest import round_up
from snapshotd.readserver import Wire
from snapshotd.streams import ASKED_MAX

SUMS_MAX = 8
CODES = ("planes", "bytes")


def ask_for(
    symbols: list[Symbol], length: int, *, job: str, snapshot: wire.SnapshotId, code: str, unit_bytes: int,
    window_bytes: int,
) -> wire.Combine:  # fmt: skip
    """The message that asks for the first `length` bytes of the sum of these symbols, which are whole units long."""
    places: dict[wire.Holding, int] = {}
    terms = []
    for symbol in symbols:
        spans = [
            wire.SumSpan(None, 0, span.length)
            if span.holding is None
            else wire.SumSpan(places.setdefault(span.holding, len(places)), span.offset, span.length)
            for span in symbol.spans
            if span.length
        ]
        terms.append(wire.SumTerm(symbol.coefficient, spans))
    return wire.Combine(job, snapshot, code, unit_bytes, window_bytes, length, list(places), terms)


def symbols_of(ask: wire.Combine) -> list[Symbol]:
    """What is to be added up. ProtocolError where that makes no sense: nobody is to read anything by it."""
    unit, window = ask.unit_bytes, ask.window_bytes
    _require(ask.code in CODES, f"there is no code {ask.code!r}")
    _require(unit & (unit - 1) == 0 and window % unit == 0, f"windows of {window} bytes and units of {unit}")
    _require(ask.length <= ASKED_MAX * window, f"{ask.length} bytes are more than {ASKED_MAX} windows of {window}")
    return [Symbol(term.coefficient, _spans_of(ask, term)) for term in ask.terms]


def _spans_of(ask: wire.Combine, term: wire.SumTerm) -> list[Span]:
    """A file may end within a unit, and zeros fill that up; everything else begins and ends with units."""
    unit, at, spans = ask.unit_bytes, 0, []
    for span in term.spans:
        end = at + span.length
        known = span.holding is None or span.holding < len(ask.holdings)
        _require(known, f"{len(ask.holdings)} slots are named and number {span.holding} is wanted")
        whole = end % unit == 0 if span.holding is None else at % unit == 0
        _require(whole, f"bytes {at} to {end} of a term cut a unit of {unit}")
        if span.holding is None:
            spans.append(Span(None, 0, span.length))
        else:
            spans.append(Span(ask.holdings[span.holding], span.offset, span.length))
        at = end
    _require(at == round_up(ask.length, unit), f"a term has {at} bytes for a sum of {ask.length}")
    return spans


def _require(sound: bool, fault: str) -> None:
    if not sound:
        raise ProtocolError("sum", f"a sum is asked for that cannot be: {fault}")


class Assistant:
    """Adds up for peers. `tools_for` says with what, for whoever has that certificate (nothing in the clear), and
    raises Refused where it is nobody's business; `ended` that this daemon stops; `made` hears how many bytes were sent.
    """

    def __init__(
        self,
        tools_for: Callable[[wire.Combine, bytes], Tools],
        ended: Callable[[], bool],
        made: Callable[[int], object],
    ) -> None:
        self._tools_for, self._ended, self._made = tools_for, ended, made
        self._rooms = threading.BoundedSemaphore(SUMS_MAX)

    def answer(self, ask: wire.Combine, who: bytes, conduit: Wire) -> None:
        """Send the sum window by window, or the windows up to where it fails and then a refusal.

        ProtocolError for what is no sum; whatever `send` raises.
        """
        symbols = symbols_of(ask)
        try:
            self._add_up(ask, symbols, who, conduit)
        except Cancelled:
            conduit.send(wire.pack(_refusal(Refused("this node stops; what it was to add up is to be had elsewhere"))))
        except SnapshotError as error:
            conduit.send(wire.pack(_refusal(error)))

    def _add_up(self, ask: wire.Combine, symbols: list[Symbol], who: bytes, conduit: Wire) -> None:
        if not self._rooms.acquire(blocking=False):
            raise Refused(f"this node makes {SUMS_MAX} sums for its peers already; make this one yourself")
        try:
            self._send(ask, symbols, self._tools_for(ask, who), conduit)
        except BadBytes as error:
            raise SourceDamaged(str(error), error.symbol) from None
        except ValueError as error:  # slots in other blocks than the ask has units for: the loop does not cut them
            raise Refused(f"these bytes cannot be added up as it was asked ({error}); do it yourself") from None
        finally:
            self._rooms.release()

    def _send(self, ask: wire.Combine, symbols: list[Symbol], tools: Tools, conduit: Wire) -> None:
        with tools.threads(1) as sender:
            outbox = _Outbox(ask, conduit, sender, self._made)
            try:
                combine.combine(
                    None,
                    symbols,
                    round_up(ask.length, ask.unit_bytes),
                    job=ask.job,
                    snapshot=ask.snapshot,
                    unit_bytes=ask.unit_bytes,
                    layout=ask.code,
                    tools=tools,
                    cancelled=lambda: self._ended() or conduit.has_ended(),
                    advanced=outbox.put,
                    point="assist.window",
                    window_bytes=ask.window_bytes,
                )
            finally:
                outbox.wait()  # or a refusal would come between a head and its bytes


class _Outbox:
    """Sends a window while the next one is made: a thread that waits for its turn on the link takes none of the bytes
    that come meanwhile. There is one on its way at most."""

    def __init__(self, ask: wire.Combine, conduit: Wire, sender: Executor, made: Callable[[int], object]) -> None:
        self._ask, self._conduit, self._sender, self._made = ask, conduit, sender, made
        self._under_way: Future[None] | None = None

    def put(self, at: int, made: memoryview) -> None:
        """The window from `at` on is made. Raises what happened to the one before."""
        self.wait()
        self._under_way = self._sender.submit(self._send, bytes(made[: self._ask.length - at]))

    def wait(self) -> None:
        """Until everything has left, or could not."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _send(self, window: bytes) -> None:
        crcs = _native.ec_crcs(window, self._ask.unit_bytes)
        head = wire.Reading(len(window), self._ask.length, self._ask.unit_bytes, crcs)
        self._conduit.send(wire.pack(head), more=True)
        self._conduit.send(window)
        self._made(len(window))


def _refusal(error: SnapshotError) -> wire.Refusal:
    facts: dict[str, int | str] = {"term": error.term} if isinstance(error, SourceDamaged) else {}
    kind = error.kind if isinstance(error, Refused) else Refused.kind
    return wire.Refusal(kind, wire.clip(str(error)), facts)
