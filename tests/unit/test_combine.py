"""The loop that adds symbols up: its sum is that of the twin, and nothing bad is ever in what it says is good."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import combine, reader
from snapshotd.combine import BadBytes, Cancelled, Span, Symbol, Tools
from snapshotd.errors import DaemonUnavailable, ProtocolError, SnapshotGone
from snapshotd.manifest import round_up
from snapshotd.streams import Pool, Stream
from tests.unit import codec_twin
from tests.unit.group_faults import FakeClock, Meter, breaks_off, cut, cuts, hangs_up, refuses, stalls
from tests.unit.groups import JOB, SNAPSHOT, Group, group
from tests.unit.native_support import BLOCK

MIB = 1 << 20


def spans_of(one: Group, position: int, length: int) -> list[Span]:
    """A position's shards one after the other, each padded with zeros to whole units, and zeros up to `length`."""
    spans: list[Span] = []
    for rank in one.ranks_at(position):
        size = len(one.contents[rank])
        spans.append(Span(one.shards[rank].holding, 0, size))
        spans.append(Span(None, 0, round_up(size, one.layout.unit_bytes) - size))
    return [*spans, Span(None, 0, length - sum(span.length for span in spans))]


def bytes_of(one: Group, position: int, length: int) -> bytes:
    """The same, as bytes."""
    unit = one.layout.unit_bytes
    padded = (one.contents[rank] for rank in one.ranks_at(position))
    return b"".join(data.ljust(round_up(len(data), unit), b"\0") for data in padded).ljust(length, b"\0")


def length_of(one: Group) -> int:
    """Whole units that hold every position's shards."""
    return max(
        sum(round_up(len(one.contents[rank]), one.layout.unit_bytes) for rank in one.ranks_at(position))
        for position in range(len(one.hosts))
    )


def symbols_of(one: Group, coefficients: list[int]) -> list[Symbol]:
    """All positions, each with its coefficient."""
    length = length_of(one)
    return [Symbol(factor, spans_of(one, position, length)) for position, factor in enumerate(coefficients)]


def add(one: Group, into: bytearray, symbols: list[Symbol], length: int, **changes: Any) -> None:
    """`combine.combine` with what is the same for all of these tests."""
    usual: dict[str, Any] = {
        "unit_bytes": one.layout.unit_bytes,
        "layout": "planes",
        "tools": one.tools,
        "cancelled": lambda: False,
    }
    combine.combine(memoryview(into), symbols, length, job=JOB, snapshot=SNAPSHOT, **{**usual, **changes})


def added_up(one: Group, coefficients: list[int], room: int | None = None, **changes: Any) -> bytes:
    """All positions, each times its coefficient, over what lay in the destination before."""
    length = length_of(one)
    into = bytearray(b"\xa5" * (length if room is None else room))
    add(one, into, symbols_of(one, coefficients), length, **changes)
    return bytes(into)


def twin(one: Group, coefficients: list[int]) -> bytes:
    """What that has to be."""
    length = length_of(one)
    parts = [bytes_of(one, position, length) for position in range(len(one.hosts))]
    return codec_twin.combined_in("planes", coefficients, parts)


sizes = st.lists(st.lists(st.integers(1, 12 * BLOCK), min_size=1, max_size=3), min_size=2, max_size=4)


@given(sizes, st.data())
@settings(deadline=None, max_examples=40)
def test_the_sum_is_that_of_the_twin_for_any_shards_blocks_coefficients_and_windows(
    sizes: list[list[int]], data: st.DataObject
) -> None:
    coefficients = data.draw(st.lists(st.integers(0, 255), min_size=len(sizes), max_size=len(sizes)))
    blocks = data.draw(st.lists(st.sampled_from([BLOCK, 2 * BLOCK, 4 * BLOCK]), min_size=1, max_size=3))
    with group(sizes, 1, blocks=blocks, seed=data.draw(st.integers(0, 99))) as one, pytest.MonkeyPatch.context() as few:
        cut(few, *data.draw(cuts()))
        expected = twin(one, coefficients)
        assert added_up(one, coefficients) == expected
        room = data.draw(st.integers(max(0, len(expected) - one.layout.unit_bytes + 1), len(expected)))
        assert added_up(one, coefficients, room) == expected[:room], "the last unit may reach beyond the destination"


@pytest.mark.parametrize("blocks", [(BLOCK,), (MIB,), (2 * MIB, BLOCK, MIB // 2)], ids=["4 KiB", "1 MiB", "mixed"])
def test_shards_of_several_windows_are_added_up_whole_and_each_window_is_told_once_it_is_made(
    blocks: tuple[int, ...],
) -> None:
    with group([[3 * MIB + 4097], [5000, 2 * MIB - 1]], 1, blocks=blocks) as one:
        told: list[tuple[int, bytes]] = []
        room = length_of(one) - 77
        made = added_up(one, [7, 91], room, advanced=lambda at, window: told.append((at, bytes(window))))
        assert made == twin(one, [7, 91])[:room] == b"".join(window for _, window in told)
        assert [at for at, _ in told] == [sum(len(window) for _, window in told[:n]) for n in range(len(told))]


def test_no_symbols_are_zeros() -> None:
    with group([[3 * MIB], [1]], 1) as one:
        assert not any(added_up(one, []))


def test_a_symbol_of_zeros_alone_asks_nobody() -> None:
    with group([[1], [1]], 1) as one:
        into = bytearray(b"\xa5" * (2 * MIB))
        add(one, into, [Symbol(5, [Span(None, 0, len(into))])], len(into))
        assert not any(into)
        assert one.served_bytes() == 0


# --- what goes wrong --------------------------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_flipped_bit_anywhere_is_found_and_what_lies_before_its_window_is_right(data: st.DataObject) -> None:
    blocks = data.draw(st.lists(st.sampled_from([BLOCK, 4 * BLOCK]), min_size=1, max_size=3))
    with group([[9 * BLOCK + 5, 3000], [12 * BLOCK]], 1, blocks=blocks) as one, pytest.MonkeyPatch.context() as few:
        cut(few, *data.draw(cuts()))
        expected = twin(one, [3, 200])
        rank = data.draw(st.sampled_from(sorted(one.contents)))
        place = data.draw(st.integers(0, len(one.contents[rank]) - 1))
        if data.draw(st.booleans()):
            one.shards[rank].flip(place, data.draw(st.integers(0, 7)))
        else:
            one.shards[rank].flip_table(place // one.shards[rank].native.block_bytes, data.draw(st.integers(0, 7)))
        into = bytearray(len(expected))
        with pytest.raises(BadBytes) as error:
            add(one, into, symbols_of(one, [3, 200]), len(into))
        found = error.value
        assert found.span.holding == one.shards[rank].holding
        assert str(found) == f"a block in slot 0 of {found.span.holding.label} fails its checksum"
        assert rank in one.ranks_at(found.symbol)
        assert 0 <= found.at < len(into)
        assert into[: found.at] == expected[: found.at]


def test_a_checksum_that_is_wrong_is_no_better_than_a_byte_that_is() -> None:
    with group([[3 * BLOCK], [BLOCK]], 1) as one:
        one.shards[one.ranks_at(0)[0]].flip_table(2)
        with pytest.raises(BadBytes) as error:
            added_up(one, [1, 1])
        assert error.value.symbol == 0


@pytest.mark.parametrize(
    ("trouble", "kind"), [(refuses, SnapshotGone), (hangs_up, DaemonUnavailable), (breaks_off, DaemonUnavailable)]
)
def test_a_source_that_says_no_or_hangs_up_is_named_by_its_error(
    trouble: Callable[[object], None], kind: type[Exception]
) -> None:
    with group([[3 * BLOCK], [BLOCK]], 1) as one:
        one.hosts[1].before = trouble
        with pytest.raises(kind):
            added_up(one, [1, 1])
        one.hosts[1].before = lambda _: None
        assert added_up(one, [1, 1]) == twin(one, [1, 1]), "the same connections or new ones serve the next attempt"


def test_a_source_that_stops_in_the_middle_of_its_bytes_is_given_up_after_a_bound() -> None:
    with group([[3 * BLOCK], [BLOCK]], 1) as one:
        impatient = functools.partial(Stream.connect, silence_max_s=0.2)
        one.tools = Tools(Pool(impatient), one.tools.pace)
        one.hosts[0].before = stalls
        with pytest.raises(DaemonUnavailable, match=f"{one.hosts[0].address} stalls"):
            added_up(one, [1, 1])
        one.hosts[0].before = lambda _: None
        assert added_up(one, [1, 1]) == twin(one, [1, 1])
        one.tools.pool.close()


def test_a_source_that_nobody_serves_any_more_is_unavailable() -> None:
    with group([[3 * BLOCK], [BLOCK]], 1) as one:
        one.hosts[0].server.close()
        with pytest.raises(DaemonUnavailable, match=one.hosts[0].address):
            added_up(one, [1, 1])


@pytest.mark.parametrize("amiss", [-1, 1, BLOCK])
def test_a_file_of_another_length_than_was_announced_is_refused(amiss: int) -> None:
    with group([[2 * BLOCK + 100], [4 * BLOCK]], 1) as one:
        announced = Span(one.shards[one.ranks_at(0)[0]].holding, 0, 2 * BLOCK + 100 + amiss)
        symbol = Symbol(1, [announced, Span(None, 0, 4 * BLOCK - announced.length)])
        with pytest.raises(ProtocolError):
            add(one, bytearray(4 * BLOCK), [symbol], 4 * BLOCK)


def test_what_is_not_wanted_any_more_is_given_up_before_a_byte_of_it_is_added() -> None:
    with group([[3 * MIB], [MIB]], 1) as one:
        into = bytearray(b"\xa5" * length_of(one))
        with pytest.raises(Cancelled):
            add(one, into, symbols_of(one, [1, 1]), len(into), cancelled=lambda: True)
        assert into == b"\xa5" * len(into)


# --- the pace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e5, 1e7])
def test_every_byte_that_is_pulled_is_paid_for_once_and_no_faster_than_the_rate(rate: float) -> None:
    with group([[3 * MIB + 17, 9], [MIB]], 1) as one:
        clock = FakeClock()
        meter = Meter(rate, clock)
        one.tools = Tools(Pool(), meter)
        assert added_up(one, [2, 3]) == twin(one, [2, 3])
        pulled = sum(map(len, one.contents.values()))
        assert meter.taken_bytes == one.served_bytes() == pulled, "zeros are nobody's and cost nothing"
        assert pulled / rate - reader.BURST_S <= clock.now_s - 100.0 + 1e-6
