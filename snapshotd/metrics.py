"""What is counted, and how often a repeated complaint is worth a line in the log."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

from snapshotd.clock import Clock

COUNTERS: Final = {
    "commits": "snapshots committed",
    "aborts": "snapshots given up because a rank passed their step without them",
    "committed_bytes": "bytes of the shards in committed snapshots",
    "deaths": "trainers seen dead while they held an arena",
    "slots_emptied_after_death": "half-filled slots that dead trainers left",
    "arenas_created": "arenas created",
    "arenas_inherited": "arenas handed on to a later generation",
    "arenas_freed": "arenas freed",
    "refused": "requests answered with a refusal, by kind",
    "dropped": "frames and connections dropped, by reason",
    "quarantined": "shards that failed their checksums",
    "parity_made": "parity sets made whole",
    "parity_bytes": "bytes of the parity sets made",
    "served_bytes": "bytes sent to readers on other nodes",
    "assisted_bytes": "bytes decoded here for nodes that lost them, and sent to them",
    "rebuilt": "lost shards decoded here",
    "rebuilt_bytes": "bytes of the shards decoded here",
    "reprotected": "shards and parity sets that this node made for a job that waits",
    "reprotected_bytes": "bytes of these",
    "scrub_checked": "blocks of committed shards and parity that were read again",
    "scrub_found": "blocks among them that had rotted in memory",
    "scrub_repaired": "blocks among those that were repaired from the rest of their group",
    "errors": "events that ended in an exception of our own; the log has the traceback",
}
_REASONS_MAX = 64
_OTHERS = "others"


class Metrics:
    """Counters of this daemon's life. `add` knows no other names than those of `COUNTERS`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._by_reason: dict[str, Counter[str]] = {}

    def add(self, name: str, amount: int = 1, reason: str = "") -> None:
        """Count. Reasons come from outside, so there is a bound on how many are told apart."""
        if name not in COUNTERS:
            raise KeyError(name)
        self._counts[name] += amount
        if reason:
            reasons = self._by_reason.setdefault(name, Counter())
            reasons[reason if reason in reasons or len(reasons) < _REASONS_MAX else "other"] += amount

    def count(self, name: str) -> int:
        """How often, or how much, so far."""
        return self._counts[name]

    def document(self) -> dict[str, int | dict[str, int]]:
        """All counters for the status document; those with reasons as one object by reason."""
        flat: dict[str, int | dict[str, int]] = {f"{name}_total": count for name, count in self._counts.items()}
        return flat | {f"{name}_by_reason": dict(reasons) for name, reasons in self._by_reason.items()}


class Repeats:
    """Logs the first line of each kind at once, and its repetitions at most once per `pause_s`, with their number.

    Kinds come from outside as well: `_REASONS_MAX` of a pause are told apart and the rest are one kind, so that there
    are never more lines in a pause than that and one.
    """

    def __init__(self, log: logging.Logger, clock: Clock, pause_s: float = 60.0) -> None:
        self._log, self._clock, self._pause_s = log, clock, pause_s
        self._last: dict[str, tuple[float, int]] = {}

    def warning(self, kind: str, sentence: str) -> None:
        """Log `sentence`, unless this kind was logged within the pause."""
        self._say(logging.WARNING, kind, sentence, None)

    def error(self, kind: str, sentence: str, why: BaseException | None) -> None:
        """The same with a traceback."""
        self._say(logging.ERROR, kind, sentence, why)

    def _say(self, level: int, kind: str, sentence: str, why: BaseException | None) -> None:
        now_s = self._clock.monotonic_s()
        if kind not in self._last and len(self._last) >= _REASONS_MAX:
            self._last = {old: at for old, at in self._last.items() if now_s - at[0] < self._pause_s}
            kind = kind if len(self._last) < _REASONS_MAX else _OTHERS
        last_s, held_back = self._last.get(kind, (-self._pause_s, 0))
        if now_s - last_s < self._pause_s:
            self._last[kind] = (last_s, held_back + 1)
            return
        self._last[kind] = (now_s, 0)
        more = f" ({held_back} more like this since)" if held_back else ""
        self._log.log(level, "%s%s", sentence, more, exc_info=why)
