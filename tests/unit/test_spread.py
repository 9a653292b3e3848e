"""A lost shard whose decode is spread over the others: the same bytes, whoever helps, fails or lies."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import _native, assist, combine, geometry, parityset, rebuild, spread, wire
from snapshotd.combine import Cancelled, Span, Symbol, Tools
from snapshotd.errors import DaemonUnavailable, NoRoom, ProtocolError, Refused, SourceDamaged
from snapshotd.reader import SumReader
from snapshotd.readserver import Extent
from snapshotd.rebuild import NotEnough, choose, code_of
from snapshotd.streams import Stream
from snapshotd.wire import Holding, ShardShape
from tests.unit.group_faults import Nth, no_collection
from tests.unit.groups import JOB, SNAPSHOT, Group, Host, losses, others, piece_of, protected
from tests.unit.native_support import BLOCK

UNEVEN = [[5 * BLOCK + 3, 77], [9 * BLOCK], [1, 2 * BLOCK - 1, BLOCK], [7 * BLOCK + 1]]
MIB = 1 << 20
PATIENCE_S = 60.0


@contextlib.contextmanager
def spread_group(
    sizes: list[list[int]], parity: int, window: int = BLOCK, *, blocks: tuple[int, ...] = (BLOCK,)
) -> Iterator[Group]:
    """A protected group whose newcomers have others decode, in small windows: those have more seams."""
    with pytest.MonkeyPatch.context() as small, protected(sizes, parity, blocks=blocks) as one:
        small.setattr(spread, "WINDOW_BYTES", window)
        small.setattr(rebuild, "SumReader", Counting)
        one.spread = "yes"
        yield one


class Counting(SumReader):
    """Counts what others decoded."""

    came_bytes = 0
    _lock = threading.Lock()

    def next_into(self, view: memoryview) -> tuple[bytes, int]:
        found = super().next_into(view)
        with self._lock:
            Counting.came_bytes += len(view)
        return found


def until(done: Callable[[], bool], what: str) -> None:
    """Wait for a condition, within a bound."""
    deadline_s, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not done():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        pause.wait(0.005)


def helped(one: Group, rank: int, *lost: int) -> int:
    """The shard comes back byte for byte and nothing is doubtful; returns how much of it others decoded."""
    before = Counting.came_bytes
    assert one.comes_back(one.without(rank, *lost)) == []
    return Counting.came_bytes - before


# --- who helps --------------------------------------------------------------------------------------------------------


def at(*addresses: str) -> list[Holding]:
    return [Holding(address, "node", bytes(16), 0) for address in addresses]


@pytest.mark.parametrize(
    ("mode", "own", "holders", "pieces", "expected"),
    [
        ("auto", "10.0.0.1:1", ["10.0.0.2:1", "10.0.0.3:1", "10.0.0.2:1"], 2, ["10.0.0.2:1", "10.0.0.3:1"]),
        ("auto", "127.0.0.1:1", ["127.0.0.1:2", "127.0.0.1:3"], 2, []),
        ("auto", "[::1]:1", ["[::1]:2", "[::1]:3"], 2, []),
        ("auto", "10.0.0.1:1", ["10.0.0.1:2", "10.0.0.2:2"], 2, ["10.0.0.1:2", "10.0.0.2:2"]),
        ("auto", "10.0.0.1:1", ["10.0.0.1:1", "10.0.0.2:1"], 2, []),
        ("auto", "10.0.0.1:1", ["10.0.0.2:1", "10.0.0.3:1"], 1, []),
        ("yes", "127.0.0.1:1", ["127.0.0.1:3", "127.0.0.1:2", ""], 2, ["127.0.0.1:2", "127.0.0.1:3"]),
        ("yes", "10.0.0.1:1", ["10.0.0.2:1", "10.0.0.3:1"], 1, []),
        ("no", "10.0.0.1:1", ["10.0.0.2:1", "10.0.0.3:1"], 2, []),
    ],
)
def test_others_decode_where_there_are_several_pieces_and_peers_and_a_network_or_where_it_is_wanted(
    mode: str, own: str, holders: list[str], pieces: int, expected: list[str]
) -> None:
    assert spread.helpers(mode, own, at(*holders), pieces) == expected


@given(st.integers(0, 1 << 45), st.integers(1, 300), st.sampled_from([4096, MIB, 16 * MIB]))
def test_parts_are_whole_windows_that_one_sum_may_have_and_helpers_have_a_bounded_number_of_threads(
    total_bytes: int, count: int, unit: int
) -> None:
    threads = spread.sums_each(count) * count
    assert count <= threads <= max(count, spread.SUMS_MAX)
    part, window = spread.part_for(total_bytes, threads, unit), spread.window_for(unit)
    assert part % window == window % unit == 0
    assert window <= part <= spread.PART_WINDOWS_MAX * window <= wire.READ_BYTES_MAX


def test_a_part_is_given_once_and_what_was_not_done_is_left() -> None:
    parts = spread.Parts("abc")
    assert [parts.take(), parts.take()] == ["a", "b"]
    parts.put_back("b")
    assert parts.left() == ["b", "c"]
    assert [parts.take(), parts.take()] == ["c", None]
    assert parts.left() == ["b"]


# --- all goes well ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "parity"), [(3, 1), (4, 1), (4, 2), (5, 2), (6, 3)])
def test_every_shard_of_every_lost_node_is_decoded_by_others_whichever_nodes_are_lost(count: int, parity: int) -> None:
    sizes = [[(3 + 5 * position) * BLOCK // 2 + position, 60 + position] for position in range(count)]
    with spread_group(sizes, parity) as one:
        for lost in losses(count, parity):
            for rank in (rank for position in lost for rank in one.ranks_at(position)):
                assert helped(one, rank, *lost) == len(one.contents[rank])


@pytest.mark.parametrize("blocks", [(BLOCK,), (MIB,), (2 * MIB, BLOCK, MIB // 2)], ids=["4 KiB", "1 MiB", "mixed"])
def test_shards_of_many_windows_and_of_blocks_of_any_size_are_decoded_by_others(blocks: tuple[int, ...]) -> None:
    sizes = [[3 * MIB + 4097 - position, MIB + position] for position in range(5)]
    with spread_group(sizes, 2, spread.WINDOW_BYTES, blocks=blocks) as one:
        for rank in one.ranks_at(1):
            assert helped(one, rank, 1, 2) == len(one.contents[rank])


def test_the_newcomer_receives_its_shard_once_and_everybody_else_sends_as_much() -> None:
    """With k = 6. What the newcomer pulls itself are checksums: pulled directly it would be six times the shard."""
    size = 6 * 8 * BLOCK
    with spread_group([[size]] * 7, 1) as one:
        (rank,) = one.ranks_at(6)
        sent = [0] * 7

        def count(number: int, count_bytes: int) -> None:
            with lock:
                sent[number] += count_bytes

        lock = threading.Lock()
        for number, host in enumerate(one.hosts):
            host.sent = functools.partial(count, number)
            host.before = lambda read, number=number: count(number, pieces_in(one, read))  # type: ignore[misc]
        assert helped(one, rank, 6) == size
        until(lambda: sent == [size] * 6 + [0], "everybody having counted what they sent")


def pieces_in(one: Group, read: wire.Read) -> int:
    """The length of a read, if it is not one of a parity set's description."""
    sets = {stored.holding.arena for stored in one.parities.values()}
    described = read.arena in sets and read.offset < parityset.meta_bytes(one.layout)
    return 0 if described else read.length


def test_what_a_sum_costs_does_not_depend_on_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[tuple[str, int]] = []
    window = Tools.window

    def watched(tools: Tools, name: str, length: int) -> memoryview:
        if tools.own is not None:
            rooms.append((name, length))
        return window(tools, name, length)

    monkeypatch.setattr(Tools, "window", watched)
    monkeypatch.setattr(spread, "part_for", lambda *_: 16 * BLOCK)
    with spread_group([[64 * BLOCK]] * 3, 1) as one:
        assert helped(one, one.ranks_at(2)[0], 2) == 64 * BLOCK
    assert {name for name, _ in rooms} == {"staging", "scratch"}
    assert max(length for name, length in rooms if name == "scratch") == BLOCK
    assert max(length for name, length in rooms if name == "staging") <= combine.STAGING_BYTES


# --- helpers that fail ------------------------------------------------------------------------------------------------


def refuses(_: object) -> None:
    """The helper says no."""
    raise NoRoom("no")


def hangs_up(_: object) -> None:
    """The helper goes away."""
    raise ConnectionAbortedError


def fails_by_itself(_: object) -> None:
    """The helper finds something that it cannot add up."""
    raise ValueError("these blocks are not to be cut")


@contextlib.contextmanager
def other_bytes(host: Host, read: wire.Read) -> Iterator[Extent]:
    """Bytes that are not those of the snapshot, with checksums that agree."""
    with host.extent(read) as found:
        view = bytearray(found.view)
        view[len(view) // 2] ^= 1
        crcs = _native.ec_crcs(view, found.block_bytes)
        yield Extent(memoryview(view), found.file_bytes, found.block_bytes, crcs)


def disturb_before(host: Host, trouble: Callable[[object], None]) -> None:
    host.before_sum = trouble


def disturb_between(host: Host, trouble: Callable[[object], None]) -> None:
    """After the first window that it sent, and each that follows."""
    host.sent = trouble


TROUBLE = pytest.mark.parametrize(
    ("disturb", "trouble"),
    [
        pytest.param(disturb_before, refuses, id="refuses"),
        pytest.param(disturb_before, hangs_up, id="hangs up"),
        pytest.param(disturb_before, fails_by_itself, id="fails by itself"),
        pytest.param(disturb_between, refuses, id="refuses in the middle"),
        pytest.param(disturb_between, hangs_up, id="hangs up in the middle"),
    ],
)


@TROUBLE
def test_what_a_helper_does_not_bring_comes_back_all_the_same(
    disturb: Callable[[Host, Callable[[object], None]], None],
    trouble: Callable[[object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spread, "part_for", lambda *_: 4 * BLOCK)
    with spread_group([[64 * BLOCK]] * 4, 1) as one:
        (rank,) = one.ranks_at(0)
        asked = threading.Event()

        def once_asked(it: object) -> None:
            asked.set()
            trouble(it)

        for host in one.hosts:
            host.before_sum = lambda _: asked.wait(PATIENCE_S)
        one.hosts[1].before_sum = lambda _: asked.set()
        disturb(one.hosts[1], once_asked)
        assert 0 < helped(one, rank, 0) < 64 * BLOCK, "what the others brought counts, and they waited for the one"
        disturb(one.hosts[1], trouble)
        for host in one.hosts[2:]:
            disturb(host, trouble)
        assert helped(one, rank, 0) <= 6 * BLOCK, "two threads a helper, and a window each at most"


def test_a_helper_that_was_refused_once_is_asked_again_in_the_next_rebuild() -> None:
    with spread_group([[16 * BLOCK]] * 4, 1) as one:
        (rank,) = one.ranks_at(0)
        for host in one.hosts:
            host.before_sum = refuses
        assert helped(one, rank, 0) == 0
        for host in one.hosts:
            host.before_sum = lambda _: None
        assert helped(one, rank, 0) == 16 * BLOCK


def test_bytes_that_a_helper_made_up_are_not_believed() -> None:
    """They are checked by the checksums of what was lost, whatever came with them."""
    with spread_group([[16 * BLOCK]] * 4, 1) as one:
        (rank,) = one.ranks_at(0)
        one.hosts[1].own = functools.partial(other_bytes, one.hosts[1])
        helped(one, rank, 0)
        for host in one.hosts:
            host.own = functools.partial(other_bytes, host)
        helped(one, rank, 0)


def test_as_many_sums_as_a_node_makes_at_a_time_and_one_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assist, "SUMS_MAX", 1)
    with spread_group([[16 * BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        busy, free = threading.Event(), threading.Event()

        def holds_it(_: object) -> None:
            busy.set()
            assert free.wait(60)

        one.hosts[1].before_sum = holds_it
        ask, address = sum_of_all(one, rank), one.hosts[1].address
        with contextlib.closing(SumReader(one.tools.pool, address, ask, one.tools.pace)) as first:
            first.begin()
            assert busy.wait(60)
            with contextlib.closing(SumReader(one.tools.pool, address, ask, one.tools.pace)) as second:
                with pytest.raises(Refused, match="makes 1 sums for its peers already"):
                    second.reach()
            free.set()
            assert first.reach() == BLOCK, "the one that came first is made"


def sum_of_all(one: Group, rank: int) -> wire.Combine:
    """The first eight windows of a lost shard, as a newcomer asks for them."""
    job = one.without(rank, 0)
    symbols, _ = choose(job, one.stripes.stripe_of(0, 0), 0, 8 * BLOCK, set())
    return assist.ask_for(
        symbols, 8 * BLOCK, job=JOB, snapshot=SNAPSHOT, code=code_of(one.layout).layout, unit_bytes=BLOCK,
        window_bytes=BLOCK,
    )  # fmt: skip


def test_a_sum_that_nobody_takes_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assist, "SUMS_MAX", 1)
    with spread_group([[16 * BLOCK]] * 3, 1) as one:
        (rank,) = one.ranks_at(0)
        under_way, gone = threading.Event(), threading.Event()

        def waits(_: object) -> None:
            under_way.set()
            assert gone.wait(60)

        one.hosts[1].sent = waits
        ask, address = sum_of_all(one, rank), one.hosts[1].address
        first = SumReader(one.tools.pool, address, ask, one.tools.pace)
        first.begin()
        assert under_way.wait(60)
        first.close()
        gone.set()
        one.hosts[1].sent = lambda _: None

        def has_room() -> bool:
            with contextlib.closing(SumReader(one.tools.pool, address, ask, one.tools.pace)) as second:
                with contextlib.suppress(Refused):
                    return second.reach() == BLOCK
            return False

        until(has_room, "room for another sum")
        assert one.hosts[1].assisted_bytes < 2 * ask.length


# --- bytes that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_table", [False, True], ids=["a byte", "a checksum"])
@pytest.mark.parametrize("symbol", [0, 1, 2], ids=["data", "more data", "parity"])
def test_a_bad_block_is_decoded_around_and_its_source_is_doubtful(symbol: int, in_table: bool) -> None:
    with spread_group([[24 * BLOCK]] * 5, 2) as one:
        (rank,) = one.ranks_at(0)
        stripe = one.stripes.stripe_of(0, 1)
        bad, begin = piece_of(one, others(one, stripe, 0)[symbol], stripe)
        if in_table:
            bad.flip_table(begin // BLOCK + 1)
        else:
            bad.flip(begin + BLOCK + 17)
        before = Counting.came_bytes
        assert set(one.comes_back(one.without(rank, 0))) <= {bad.holding}
        assert Counting.came_bytes - before >= 16 * BLOCK, "what is good of it was decoded by others"


def test_a_bad_block_that_no_helper_can_do_without_is_found_told_and_passed_on_as_doubtful() -> None:
    with spread_group([[16 * BLOCK]] * 4, 2) as one:
        (rank,) = one.ranks_at(0)
        stripe = one.stripes.stripe_of(0, 0)
        bad, begin = piece_of(one, others(one, stripe, 0)[0], stripe)
        bad.flip(begin)
        told: list[str] = []
        for host in one.hosts:
            host.before_sum = lambda ask: told.append(ask.job)
        assert set(one.comes_back(one.without(rank, 0))) <= {bad.holding}
        assert told


def test_a_helper_says_which_term_of_a_sum_is_bad() -> None:
    with spread_group([[16 * BLOCK]] * 4, 2) as one:
        (rank,) = one.ranks_at(0)
        ask = sum_of_all(one, rank)
        for number, term in enumerate(ask.terms):
            holding = ask.holdings[term.spans[0].holding or 0]
            everything = [*one.shards.values(), *one.parities.values()]
            (stored,) = (stored for stored in everything if stored.holding == holding)
            stored.flip(term.spans[0].offset + 3 * BLOCK)
            for host in one.hosts[1:]:
                with contextlib.closing(SumReader(one.tools.pool, host.address, ask, one.tools.pace)) as reader:
                    reader.next_into(memoryview(bytearray(3 * BLOCK)))
                    with pytest.raises(SourceDamaged) as error:
                        reader.reach()
                    assert error.value.term == number
                    assert reader.left_bytes == 5 * BLOCK, "what came before it counts"
            stored.flip(term.spans[0].offset + 3 * BLOCK)


def test_bad_blocks_beyond_the_parity_lose_the_shard_as_they_do_without_helpers() -> None:
    with spread_group([[16 * BLOCK]] * 4, 1) as one:
        (rank,) = one.ranks_at(0)
        one.shards[one.ranks_at(1)[0]].flip(0)
        with pytest.raises(NotEnough, match="only 2 are left with good bytes"):
            one.comes_back(one.without(rank, 0))


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_whatever_is_damaged_and_whoever_fails_the_shard_comes_back_or_is_said_to_be_lost(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 5))
    parity = data.draw(st.integers(1, count - 2))
    sizes = [[data.draw(st.integers(1, 12 * BLOCK))] for _ in range(count)]
    with spread_group(sizes, parity, data.draw(st.sampled_from([BLOCK, 2 * BLOCK, 64 * BLOCK]))) as one:
        (rank,) = one.ranks_at(0)
        damaged = {data.draw(st.integers(1, count - 1)) for _ in range(data.draw(st.integers(0, 2)))}
        for position in damaged:
            stored = data.draw(st.sampled_from([one.shards[one.ranks_at(position)[0]], one.parities[position]]))
            stored.flip(data.draw(st.integers(0, stored.file_bytes - 1)), data.draw(st.integers(0, 7)))
        for host in one.hosts:
            if data.draw(st.booleans()):
                host.before_sum = data.draw(st.sampled_from([refuses, hangs_up]))
        if len(damaged) < parity:
            one.comes_back(one.without(rank, 0))
        else:
            with contextlib.suppress(NotEnough):
                one.comes_back(one.without(rank, 0))


# --- giving up --------------------------------------------------------------------------------------------------------


def test_whenever_it_is_not_wanted_any_more_it_is_given_up_and_nothing_holds_on_to_the_slot() -> None:
    with spread_group(UNEVEN, 1) as one, no_collection():
        rank = one.ranks_at(0)[0]
        for number in range(1, 5):  # it looks once a window at least, and has six
            with pytest.raises(Cancelled):
                one.comes_back(one.without(rank, 0), Nth(number).due)
            assert one.newcomer.is_free()
        one.comes_back(one.without(rank, 0))


# --- what is asked for ------------------------------------------------------------------------------------------------


SUM = wire.Combine(
    "job", SNAPSHOT, "planes", 4096, 8192, 9000, at("127.0.0.1:1", "127.0.0.1:2"),
    [
        wire.SumTerm(1, [wire.SumSpan(0, 0, 5000), wire.SumSpan(None, 0, 3192), wire.SumSpan(0, 8192, 4096)]),
        wire.SumTerm(255, [wire.SumSpan(1, 4096, 12288)]),
    ],
)  # fmt: skip


def changed(**changes: Any) -> wire.Combine:
    return msgspec.structs.replace(SUM, **changes)


def with_spans(*spans: wire.SumSpan) -> wire.Combine:
    return changed(terms=[SUM.terms[1], wire.SumTerm(1, list(spans))])


def test_a_sum_that_can_be_is_what_it_says() -> None:
    first, second = at("127.0.0.1:1", "127.0.0.1:2")
    assert assist.symbols_of(SUM) == [
        Symbol(1, [Span(first, 0, 5000), Span(None, 0, 3192), Span(first, 8192, 4096)]),
        Symbol(255, [Span(second, 4096, 12288)]),
    ]


@pytest.mark.parametrize(
    ("ask", "fault"),
    [
        (changed(code="words"), "no code 'words'"),
        (changed(unit_bytes=5000), "units of 5000"),
        (changed(window_bytes=8192 + 4096, unit_bytes=8192), "windows of 12288 bytes and units of 8192"),
        (changed(length=65 * 8192), "more than 64 windows"),
        (changed(length=8000), "has 12288 bytes for a sum of 8000"),
        (changed(length=12289), "has 12288 bytes for a sum of 12289"),
        (changed(holdings=[]), "0 slots are named and number 0 is wanted"),
        (with_spans(wire.SumSpan(2, 0, 12288)), "2 slots are named and number 2"),
        (with_spans(wire.SumSpan(0, 0, 100), wire.SumSpan(0, 4096, 12188)), "100 to 12288 of a term cut a unit"),
        (with_spans(wire.SumSpan(None, 0, 100), wire.SumSpan(0, 0, 12188)), "0 to 100 of a term cut a unit"),
        (with_spans(wire.SumSpan(0, 0, 100), wire.SumSpan(None, 0, 100), wire.SumSpan(0, 0, 12088)), "100 to 200"),
        (with_spans(wire.SumSpan(0, 0, 12000)), "12000 bytes for a sum of 9000"),
    ],
)
def test_a_sum_that_cannot_be_is_no_message_of_ours(ask: wire.Combine, fault: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(fault)) as error:
        assist.symbols_of(ask)
    assert error.value.reason == "sum"


def test_who_asks_for_a_sum_that_cannot_be_is_hung_up_on_and_others_are_served() -> None:
    host = Host("node")
    try:
        stream = Stream.connect(host.address)
        with contextlib.closing(stream), pytest.raises(DaemonUnavailable):
            stream.ask_sum(changed(code="words"))
            stream.answer()
        until(lambda: bool(host.dropped), "the stream being dropped")
        assert [reason for reason, _ in host.dropped] == ["stream-sum"]
        stream = Stream.connect(host.address)
        with contextlib.closing(stream), pytest.raises(Refused):
            stream.ask_sum(SUM)
            stream.answer()
        assert len(host.dropped) == 1
    finally:
        host.close()


def test_slots_in_other_blocks_than_were_thought_are_refused_and_not_added_up_wrong() -> None:
    """Nobody who follows the protocol asks so; the one who is asked survives it and says no."""
    with protected([[4 * MIB]] * 3, 1, blocks=(MIB,)) as one:
        (rank,) = one.ranks_at(0)
        symbols, _ = choose(one.without(rank, 0), one.stripes.stripe_of(0, 0), 0, MIB, set())
        for cut in (BLOCK, MIB // 2):
            halves = [
                Symbol(1, [Span(symbol.spans[0].holding, symbol.spans[0].offset, cut), Span(None, 0, cut)])
                for symbol in symbols
            ]
            ask = assist.ask_for(
                halves, 2 * cut, job=JOB, snapshot=SNAPSHOT, code="planes", unit_bytes=cut, window_bytes=2 * cut
            )
            for host in one.hosts[1:]:
                with contextlib.closing(SumReader(one.tools.pool, host.address, ask, one.tools.pace)) as reader:
                    with pytest.raises(Refused):
                        reader.reach()


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_what_a_newcomer_asks_for_is_a_sum_that_can_be_and_arrives_as_it_was_meant(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6))
    parity = data.draw(st.integers(1, count - 1))
    sizes = st.integers(1, 9 * BLOCK)
    shapes = [
        [ShardShape(10 * position + index, data.draw(sizes), BLOCK, bytes(32)) for index in range(2)]
        for position in range(count)
    ]
    layout = geometry.lay_out(shapes, parity)
    holdings = {shape.rank: Holding("h:1", "h", bytes(16), shape.rank) for row in shapes for shape in row}
    parities = {position: Holding("p:1", "p", bytes(16), position) for position in range(count)}
    left = {rank: one for rank, one in holdings.items() if rank >= 10}
    job = rebuild.Job(JOB, SNAPSHOT, data.draw(st.integers(0, 1)), layout, left, parities)
    for piece, begin, end in geometry.pieces_over(layout, 0, job.index):
        symbols, _ = choose(job, one_stripe(layout, piece), begin, end, set())
        length = data.draw(st.integers(end - begin - BLOCK + 1, end - begin))
        ask = assist.ask_for(
            symbols, length, job=JOB, snapshot=SNAPSHOT, code=code_of(layout).layout, unit_bytes=layout.unit_bytes,
            window_bytes=spread.window_for(layout.unit_bytes),
        )  # fmt: skip
        said = wire.unpack_request(wire.pack(ask))
        assert isinstance(said, wire.Combine)
        nothing_empty = [Symbol(one.coefficient, [span for span in one.spans if span.length]) for one in symbols]
        assert assist.symbols_of(said) == nothing_empty


def one_stripe(layout: wire.GroupLayout, piece: int) -> int:
    return geometry.stripes(layout).stripe_of(0, piece)
