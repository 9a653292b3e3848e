"""Whom a node believes: who takes part in a job, in that job and no other, within bounds and over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd import trust as book
from snapshotd.clock import SystemClock
from snapshotd.errors import DaemonUnavailable
from snapshotd.identity import Identity
from snapshotd.keys import Keys
from snapshotd.root import KEYS, KNOWN, Root
from snapshotd.trust import FORGET_S, Trust
from snapshotd.wire import Badge, Place

DRAWN = Keys.draw("drawn once")


def place(number: int, at: int | None = None, badge: bool = True) -> Place:
    """A node with a badge of its own; `at` is whose address it has."""
    where = number if at is None else at
    shown = Badge(number.to_bytes(32, "big"), b"certificate %d" % number) if badge else None
    return Place(number.to_bytes(16, "big"), f"node{number}", f"h:{where}", f"s:{where}", [], shown)


def curve(number: int) -> bytes:
    return number.to_bytes(32, "big")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), max_size=5)), max_size=12))
def test_nodes_are_believed_in_the_jobs_in_which_they_were_introduced_and_in_no_other(
    told: list[tuple[str, list[int]]],
) -> None:
    trust, twin = Trust(), set()
    for job, numbers in told:
        trust.introduce(job, [place(number) for number in numbers], 0.0)
        twin |= {(job, number) for number in numbers}
    for one in (trust, Trust.unpacked(trust.packed(), 0.0)):
        for job in "abc":
            for number in range(10):
                known = (job, number) in twin
                assert (one.node(job, curve(number)) is not None) == known
                assert one.may_read(job, b"certificate %d" % number) == known
        for number in range(10):
            known = any(number == other for _, other in twin)
            assert one.believes(curve(number)) == known
            assert (one.curve_of(f"h:{number}") == curve(number)) == known
            assert (one.certificate_of(f"s:{number}") is not None) == known


def test_of_two_nodes_at_one_address_the_one_named_last_is_there() -> None:
    trust = Trust()
    trust.introduce("a", [place(1)], 0.0)
    trust.introduce("b", [place(2, at=1)], 0.0)
    assert trust.curve_of("h:1") == curve(2)
    trust.introduce("a", [place(3, at=1)], 0.0)
    assert trust.curve_of("h:1") == curve(3)
    assert trust.certificate_of("s:1") == b"certificate 3"


def test_who_has_no_badge_is_not_believed() -> None:
    trust = Trust()
    assert not trust.introduce("a", [place(1, badge=False)], 0.0)
    assert trust.curve_of("h:1") is None
    assert trust.certificates == frozenset()


def test_jobs_of_which_nothing_is_kept_are_forgotten_after_a_while() -> None:
    trust = Trust()
    trust.introduce("kept", [place(1)], 0.0)
    trust.introduce("over", [place(2)], 0.0)
    assert not trust.forget(["kept"], FORGET_S)
    assert trust.forget(["kept"], FORGET_S + 1)
    assert trust.node("kept", curve(1)) is not None
    assert not trust.believes(curve(2))
    assert not trust.forget(["kept"], 10 * FORGET_S)


def test_what_is_known_is_bounded_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "PLACES_MAX", 3)
    monkeypatch.setattr(book, "JOBS_MAX", 2)
    trust = Trust()
    for number in range(5):
        trust.introduce("a", [place(number)], 0.0)
    assert [trust.believes(curve(number)) for number in range(5)] == [False, False, True, True, True]
    for number, job in enumerate("bcd"):
        trust.introduce(job, [place(10 + number)], 0.0)
    assert [trust.believes(curve(10 + number)) for number in range(3)] == [False, True, True]
    assert not trust.believes(curve(4))


@given(st.binary(max_size=100))
def test_what_cannot_be_read_is_nobody_and_no_keys(data: bytes) -> None:
    assert Trust.unpacked(data, 0.0).certificates == frozenset()
    assert Keys.unpacked(data) is None


@given(st.data())
def test_keys_of_which_a_bit_flipped_are_no_keys(data: st.DataObject) -> None:
    packed = bytearray(DRAWN.packed())
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert Keys.unpacked(bytes(packed)) is None
    assert Keys.unpacked(DRAWN.packed()) == DRAWN


def test_a_certificate_that_is_none_keeps_nobody_else_out(shm_dir: Path) -> None:
    root = Root.open(shm_dir / "root")
    one = Identity(root, SystemClock())
    one.introduce("a", [place(1), Place(bytes(16), "other", "h:9", "s:9", [], DRAWN.badge)])
    assert one.serving().cert_store_stats()["x509"] == 1
    assert one.pin("s:9").certificate == DRAWN.badge.certificate
    with pytest.raises(DaemonUnavailable, match="is none"):
        one.pin("s:1")
    root.close()


# --- over restarts ----------------------------------------------------------------------------------------------------


def test_the_next_daemon_of_a_node_has_its_keys_and_believes_whom_it_believed(shm_dir: Path) -> None:
    root = Root.open(shm_dir / "root")
    first = Identity(root, SystemClock())
    first.introduce("a", [place(1)])
    again = Identity(root, SystemClock())
    assert again.keys == first.keys
    assert again.trust.node("a", curve(1)) == place(1).node
    root.remember(KEYS, b"damaged")
    root.remember(KNOWN, b"damaged")
    other = Identity(root, SystemClock())
    assert other.keys != first.keys
    assert not other.trust.believes(curve(1))
    root.close()


def test_the_context_that_lets_in_is_made_anew_for_new_acquaintances_only(shm_dir: Path) -> None:
    root = Root.open(shm_dir / "root")
    one = Identity(root, SystemClock())
    keys = Keys.draw("other")
    known = Place(bytes(16), "other", "h:1", "s:1", [], keys.badge)
    before = one.serving()
    assert one.serving() is before
    with pytest.raises(DaemonUnavailable, match="restart the job"):
        one.pin("s:1")
    one.introduce("a", [known])
    assert one.serving() is not before
    assert one.pin("s:1").certificate == keys.badge.certificate
    one.forget(["a"])
    assert one.trust.may_read("a", keys.badge.certificate)
    root.close()
