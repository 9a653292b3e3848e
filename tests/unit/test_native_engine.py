"""The copy engine and the way back, against numpy: every layout of memory, every boundary, every way to be refused."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import _native
from tests.unit.native_support import (
    BLOCK,
    SLOT,
    Array,
    Item,
    arena_file,
    bytes_of,
    claim,
    item_of,
    open_arena,
    packed,
    run_child,
    slot_contents,
)

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[_native.Arena]:
    fd = arena_file()
    with open_arena(fd) as opened:
        yield opened
    os.close(fd)


@pytest.fixture
def engine(arena: _native.Arena) -> Iterator[_native.Engine]:
    made = _native.Engine(arena, 2)
    yield made
    made.close()


@pytest.fixture
def large() -> Iterator[_native.Arena]:
    fd = arena_file(slot_bytes=64 * MIB, block_bytes=MIB)
    with open_arena(fd) as opened:
        yield opened
    os.close(fd)


def copied(arena: _native.Arena, engine: _native.Engine, plan: _native.Plan) -> bytes:
    """One snapshot by this plan; its bytes, after every block matched its checksum."""
    index = claim(arena)
    engine.begin(plan, index)
    assert engine.wait(60) and not engine.running()
    arena.publish(index, plan.file_bytes)
    assert arena.slot(index).sound and arena.verify(index) == []
    data = slot_contents(arena, index, plan.file_bytes)
    arena.empty(index)
    return data


def random_arrays(count: int, seed: int = 0, length_max: int = 3000) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(0, length_max), dtype=np.uint8) for _ in range(count)]


# --- what is copied


def test_tensors_land_one_behind_the_other_with_a_checksum_for_each_block(
    arena: _native.Arena, engine: _native.Engine
) -> None:
    arrays = random_arrays(40)
    items, end = packed(arrays)
    assert copied(arena, engine, _native.Plan(file_bytes=end, now=[], later=items)) == bytes_of(arrays)


def test_bytes_that_no_item_covers_are_kept_and_checksummed(arena: _native.Arena, engine: _native.Engine) -> None:
    arrays = random_arrays(8)
    items, offset = [], 1000
    for array in arrays:
        items.append(item_of(array, offset))
        offset += array.nbytes + 321
    index = claim(arena)
    assert index == 0
    with arena.slot_view(0) as view:
        view[:] = b"host" * (SLOT // 4)
    arena.empty(0)
    expected = bytearray(b"host" * (SLOT // 4))
    for array, item in zip(arrays, items, strict=True):
        expected[item[1] : item[1] + array.nbytes] = array.tobytes()
    assert copied(arena, engine, _native.Plan(file_bytes=SLOT, now=[], later=items)) == bytes(expected)


def test_now_items_are_in_the_slot_when_begin_returns(arena: _native.Arena, engine: _native.Engine) -> None:
    """The caller may change them at once; the later ones are still his promise."""
    now, later = random_arrays(5, seed=1), random_arrays(5, seed=2)
    now_items, middle = packed(now)
    later_items, end = packed(later, middle)
    expected = bytes_of(now) + bytes_of(later)
    index = claim(arena)
    engine.begin(_native.Plan(file_bytes=end, now=now_items, later=later_items), index)
    for array in now:
        array[:] = 0xEE
    assert engine.wait(60)
    arena.publish(index, end)
    assert arena.verify(index) == []
    assert slot_contents(arena, index, end) == expected


def test_ten_thousand_small_tensors_are_one_copy(large: _native.Arena) -> None:
    arrays = random_arrays(10_000, length_max=400)
    items, end = packed(arrays, 77)
    engine = _native.Engine(large, 2)
    shuffled = [items[i] for i in np.random.default_rng(5).permutation(len(items))]
    assert copied(large, engine, _native.Plan(file_bytes=end, now=[], later=shuffled))[77:] == bytes_of(arrays)
    engine.close()


def test_both_kinds_of_stores_write_the_same(large: _native.Arena) -> None:
    """`calibrate` measures in the slots themselves and leaves them EMPTY, and whatever wins, the bytes are right."""
    engine = _native.Engine(large, 2)
    assert engine.calibrate() in ("temporal", "non-temporal")
    assert [large.slot(i).state for i in range(2)] == [_native.EMPTY] * 2
    array = np.random.default_rng(9).integers(0, 256, 20 * MIB + 13, dtype=np.uint8)
    plan = _native.Plan(file_bytes=array.nbytes + 5, now=[], later=[item_of(array, 5)])
    assert copied(large, engine, plan)[5:] == array.tobytes()
    engine.close()


def test_calibrating_leaves_slots_in_use_alone(large: _native.Arena) -> None:
    claim(large)
    with large.slot_view(0) as view, large.slot_view(1) as other:
        view[:5], other[:5] = b"mine!", b"spare"
        engine = _native.Engine(large, 1)
        engine.calibrate()
        assert (bytes(view[:5]), bytes(other[:5])) == (b"mine!", b"spare")
        engine.close()


@st.composite
def strided(draw: st.DrawFn) -> Array:
    """An array of any element size, shape and strides: transposed, sliced, reversed, broadcast, expanded."""
    size = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 24]))
    shape = draw(st.lists(st.integers(0, 7), min_size=0, max_size=5))
    base = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (*shape, size), dtype=np.uint8)
    array = base.view(np.dtype((np.void, size)))[..., 0]
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    for axis in range(array.ndim):
        step = draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2]))
        array = array[(slice(None),) * axis + (slice(None, None, step),)]
    if draw(st.booleans()):
        array = np.broadcast_to(array, (draw(st.integers(1, 3)), *array.shape))
    return array


@settings(max_examples=150, deadline=None)
@given(arrays=st.lists(strided(), max_size=6), start=st.integers(0, 2 * BLOCK), now=st.booleans())
def test_any_strides_are_copied_as_numpy_would(arrays: list[Array], start: int, now: bool) -> None:
    items, end = packed(arrays, start)
    size = max(end, 1)
    fd = arena_file(slot_bytes=-(-size // BLOCK) * BLOCK)
    with open_arena(fd) as arena:
        engine = _native.Engine(arena, 2)
        plan = _native.Plan(file_bytes=size, now=items if now else [], later=[] if now else items)
        assert copied(arena, engine, plan)[start:end] == bytes_of(arrays)
        engine.close()
    os.close(fd)


@settings(max_examples=150, deadline=None)
@given(arrays=st.lists(strided(), max_size=6), start=st.integers(0, 5000), threads=st.integers(1, 3))
def test_what_was_copied_is_scattered_back_to_any_strides(arrays: list[Array], start: int, threads: int) -> None:
    slot = bytes(start) + bytes_of(arrays)
    targets = [target_like(array) for array in arrays]
    items, _end = packed(targets, start)
    _native.scatter(slot, items, threads)
    for array, target in zip(arrays, targets, strict=True):
        assert target.tobytes() == array.tobytes()


def target_like(array: Array) -> Array:
    """An array of zeros with the same shape and, where memory does not repeat, strides of the same kind."""
    if array.ndim == 0 or array.size == 0 or 0 in array.strides:
        return np.zeros(array.shape, array.dtype)
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    spread = np.zeros([2 * array.shape[axis] for axis in order], array.dtype)
    sliced = spread[tuple(slice(None, None, -2 if array.strides[axis] < 0 else 2) for axis in order)]
    return sliced.transpose([order.index(axis) for axis in range(array.ndim)])


@pytest.mark.parametrize("itemsize", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_transposed_matrices_larger_than_a_block_come_out_right(
    large: _native.Arena, itemsize: int, threads: int
) -> None:
    base = np.random.default_rng(2).integers(0, 256, (1111, 777, itemsize), dtype=np.uint8)
    matrix = base.view(np.dtype((np.void, itemsize)))[..., 0].T
    engine = _native.Engine(large, threads)
    plan = _native.Plan(file_bytes=matrix.nbytes + 3, now=[], later=[item_of(matrix, 3)])
    data = copied(large, engine, plan)
    assert data[3:] == matrix.tobytes()
    engine.close()
    back = np.zeros((1111, 777), base.view(np.dtype((np.void, itemsize)))[..., 0].dtype).T
    _native.scatter(data, [item_of(back, 3)], threads)
    assert back.tobytes() == matrix.tobytes()


def test_large_tensors_are_scattered_to_any_alignment() -> None:
    source = np.random.default_rng(4).integers(0, 256, 20 * MIB, dtype=np.uint8)
    for shift in (0, 1, 63):
        memory = np.zeros(source.size + 64, dtype=np.uint8)
        target = memory[shift : shift + source.size]
        _native.scatter(source, [item_of(target, 0)], 2)
        assert (target == source).all() and not memory[:shift].any() and not memory[shift + source.size :].any()


# --- what a plan refuses


def dense(pointer: int, offset: int, size: int) -> Item:
    return (pointer, offset, 1, (size,), (1,))


@pytest.mark.parametrize(
    ("items", "complaint"),
    [
        ([dense(0, 0, 1)], "item 0.*null pointer"),
        ([dense(4096, 0, 5), dense(2**63, 5, 1)], "item 1.*address space"),
        ([dense(2**64 - 8, 0, 64)], "item 0.*address space"),
        ([(4096, 0, 8, (2, 2), (2**62, 2**62))], "item 0.*address space"),
        ([(4096, 0, 1, (2,), (-5000,))], "item 0.*address space"),
        ([(4096, 0, 1, (3,), (-(2**63),))], "item 0.*address space"),
        ([dense(4096, 999, 2)], "item 0.*ends behind"),
        ([dense(4096, 2**64 - 1, 2)], "item 0.*ends behind"),
        ([(4096, 0, 2, (2**62, 2**62), (0, 0))], "item 0.*larger than memory"),
        ([(4096, 0, 0, (1,), (1,))], "item 0.*element size"),
        ([(4096, 0, 1, (1,) * 17, (1,) * 17)], "item 0.*16 dimensions"),
        ([(4096, 0, 1, (1, 1), (1,))], "item 0.*stride"),
        ([dense(-1, 0, 1)], "item 0.*negative"),
        ([dense(2**64, 0, 1)], "item 0.*64 bits"),
        ([(4096, 0, 1, (1,), (2**63,))], "item 0.*64 bits"),
        ([dense(4096, 0, 10), dense(8192, 20, 10), dense(8192, 9, 5)], "item 2 overlaps .*item 0"),
    ],
)
def test_an_item_that_does_not_fit_is_named(items: list[Item], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"later {complaint}"):
        _native.Plan(file_bytes=1000, now=[], later=items)
    with pytest.raises(ValueError, match=complaint):
        _native.scatter(bytes(1000), items)


def test_a_now_item_must_not_overlap_a_later_one() -> None:
    with pytest.raises(ValueError, match="overlaps"):
        _native.Plan(file_bytes=100, now=[dense(4096, 10, 10)], later=[dense(4096, 0, 11)])


def test_items_without_bytes_may_point_nowhere() -> None:
    plan = _native.Plan(file_bytes=4, now=[], later=[(0, 4, 4, (0,), (4,)), (0, 2, 1, (3, 0, 2), (1, 1, 1))])
    plan.repoint([], [0, 0])


@settings(max_examples=300, deadline=None)
@given(
    items=st.lists(
        st.tuples(
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**64 - 1) | st.integers(0, 300),
            st.integers(0, 20),
            st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=4).map(tuple),
            st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9), max_size=4).map(tuple),
        ),
        max_size=4,
    )
)
def test_no_numbers_crash_the_validation(items: list[Item]) -> None:
    """Nothing is dereferenced: what is accepted lies inside of the file, whatever its pointers are."""
    try:
        plan = _native.Plan(file_bytes=256, now=[], later=items)
    except ValueError:
        return
    assert plan.file_bytes == 256


def test_file_sizes_outside_of_the_ranges_are_refused() -> None:
    for size in (0, -1, 2**45, 2**64):
        with pytest.raises(ValueError):
            _native.Plan(file_bytes=size, now=[], later=[])


def test_repointed_items_are_read_from_their_new_places(arena: _native.Arena, engine: _native.Engine) -> None:
    old = random_arrays(6, seed=1)
    items, end = packed(old)
    order = [3, 1, 5, 0, 2, 4]
    plan = _native.Plan(file_bytes=end, now=[items[0]], later=[items[i] for i in order if i != 0])
    new = [array[::-1].copy() for array in old]
    plan.repoint([new[0].ctypes.data], [new[i].ctypes.data for i in order if i != 0])
    for array in old:
        array[:] = 0
    assert copied(arena, engine, plan) == bytes_of(new)


def test_repointing_to_a_wrong_place_changes_nothing(arena: _native.Arena, engine: _native.Engine) -> None:
    arrays = random_arrays(3, seed=8)
    items, end = packed(arrays)
    plan = _native.Plan(file_bytes=end, now=items[:1], later=items[1:])
    good = arrays[0].ctypes.data
    for now, later in (([good], [good]), ([good, good], [good, good]), ([good], [good, 0]), ([0], [good, good])):
        with pytest.raises(ValueError):
            plan.repoint(now, later)
    assert copied(arena, engine, plan) == bytes_of(arrays)


# --- what begin refuses


def test_a_slot_that_nobody_claimed_is_not_written(arena: _native.Arena, engine: _native.Engine) -> None:
    plan = _native.Plan(file_bytes=10, now=[], later=[])
    with pytest.raises(ValueError, match="claim"):
        engine.begin(plan, 0)
    index = claim(arena)
    engine.begin(plan, index)
    assert engine.wait(60)
    arena.publish(index, 10)
    with pytest.raises(ValueError, match="claim"):
        engine.begin(plan, index)
    with pytest.raises(IndexError):
        engine.begin(plan, 2)


def test_a_plan_larger_than_the_slot_is_refused(arena: _native.Arena, engine: _native.Engine) -> None:
    with pytest.raises(ValueError, match="slot only"):
        engine.begin(_native.Plan(file_bytes=SLOT + 1, now=[], later=[]), claim(arena))


@pytest.mark.parametrize("when", ["now", "later"])
def test_tensors_inside_of_the_arena_are_refused(arena: _native.Arena, engine: _native.Engine, when: str) -> None:
    index = claim(arena)
    with arena.slot_view(1) as view:
        items = [item_of(np.frombuffer(view, np.uint8)[:100], 0)]
        plan = _native.Plan(file_bytes=100, now=items if when == "now" else [], later=items if when == "later" else [])
        with pytest.raises(ValueError, match=f"{when} item 0.*inside of the arena"):
            engine.begin(plan, index)
        del items, plan
        gc.collect()
    assert not engine.running()


def test_scattering_into_the_slot_itself_is_refused() -> None:
    slot = np.zeros(1000, np.uint8)
    with pytest.raises(ValueError, match="inside of the arena"):
        _native.scatter(slot, [item_of(slot[500:], 0)])


# --- running, waiting, stopping


def endless(arena: _native.Arena) -> tuple[_native.Plan, Array]:
    """A plan whose copy takes seconds: single bytes, each a page from the last, as often as the slot has room."""
    page = np.zeros((16, 4096), np.uint8)
    size = arena.slot_bytes
    return _native.Plan(file_bytes=size, now=[], later=[(page.ctypes.data, 0, 1, (size // 16, 16), (0, 4096))]), page


def test_one_copy_at_a_time(large: _native.Arena) -> None:
    engine = _native.Engine(large, 1)
    plan, page = endless(large)
    engine.begin(plan, claim(large))
    with pytest.raises(RuntimeError, match="running"):
        engine.begin(plan, claim(large))
    with pytest.raises(RuntimeError, match="running"):
        plan.repoint([], [page.ctypes.data])
    with pytest.raises(BufferError, match="engine"):
        large.close()
    engine.cancel()
    plan.repoint([], [page.ctypes.data])
    engine.close()


def test_a_wait_that_is_too_short_says_so(large: _native.Arena) -> None:
    engine = _native.Engine(large, 1)
    plan, _page = endless(large)
    assert engine.wait(0)  # nothing is running
    engine.begin(plan, claim(large))
    assert not engine.wait(0) and not engine.wait(-1) and not engine.wait(float("nan")) and engine.running()
    engine.close()


def test_after_cancel_nobody_touches_tensors_or_slot(large: _native.Arena) -> None:
    engine = _native.Engine(large, 2)
    plan, page = endless(large)
    index = claim(large)
    engine.begin(plan, index)
    engine.cancel()
    assert not engine.running() and engine.wait(0)
    page[:] = 0xFF  # would be seen in the slot if somebody still read it
    with large.slot_view(index) as view:
        before = bytes(view[:: 4096 // 8])
        assert engine.wait(0.05)
        assert bytes(view[:: 4096 // 8]) == before
    assert large.slot(index).state == _native.FILLING
    engine.close()


def test_cancelled_engines_copy_again(arena: _native.Arena, engine: _native.Engine) -> None:
    for seed in range(50):
        arrays = random_arrays(20, seed=seed)
        items, end = packed(arrays)
        plan = _native.Plan(file_bytes=end, now=[], later=items)
        index = claim(arena)
        engine.begin(plan, index)
        engine.cancel()
        arena.empty(index)
        assert copied(arena, engine, plan) == bytes_of(arrays)


def test_the_end_of_a_copy_rings_an_eventfd(arena: _native.Arena, engine: _native.Engine) -> None:
    bell = os.eventfd(0)
    array = random_arrays(1, length_max=SLOT)[0]
    for _ in range(20):
        index = claim(arena)
        plan = _native.Plan(file_bytes=array.nbytes + 1, now=[], later=[item_of(array, 0)])
        engine.begin(plan, index, bell)
        assert os.eventfd_read(bell) == 1
        assert not engine.running() and engine.wait(10)
        arena.publish(index, plan.file_bytes)
        assert arena.verify(index) == [] and engine.seconds() > 0
        arena.empty(index)
    os.close(bell)


def test_a_signal_reaches_python_while_it_waits_for_a_copy() -> None:
    fd = arena_file(slot_bytes=64 * MIB, block_bytes=MIB)
    out = run_child(
        """
import ctypes, signal, threading
class Rang(Exception): pass
def ring(*_): raise Rang
signal.signal(signal.SIGUSR1, ring)
arena = opened()
engine = _native.Engine(arena, 1)
page = (ctypes.c_char * 65536)()
plan = _native.Plan(file_bytes=64 << 20, now=[],
                    later=[(ctypes.addressof(page), 0, 1, (4 << 20, 16), (0, 4096))])
index = claim(arena)
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
try:
    while True:
        engine.begin(plan, index)
        engine.wait(60)
except Rang:
    print("rang")
engine.close()
""",
        fd,
    )
    os.close(fd)
    assert out == "rang"


def test_closing_in_the_middle_of_a_copy_ends_it(large: _native.Arena) -> None:
    engine = _native.Engine(large, 2)
    plan, _page = endless(large)
    index = claim(large)
    engine.begin(plan, index)
    engine.close()
    engine.close()
    assert not engine.running() and engine.wait(0)
    with pytest.raises(RuntimeError, match="closed"):
        engine.begin(plan, index)


def test_several_threads_may_wait_for_one_copy(large: _native.Arena) -> None:
    engine = _native.Engine(large, 1)
    plan, _page = endless(large)
    engine.begin(plan, claim(large))
    over: list[bool] = []
    waiters = [threading.Thread(target=lambda: over.append(engine.wait(60))) for _ in range(4)]
    for waiter in waiters:
        waiter.start()
    engine.cancel()
    for waiter in waiters:
        waiter.join()
    assert over == [True] * 4
    engine.close()


def test_an_engine_keeps_its_arena(large: _native.Arena) -> None:
    fd = arena_file()
    engine = _native.Engine(_native.Arena(fd, writable=True), 1)
    gc.collect()
    with open_arena(fd) as other:
        index = claim(other)
        engine.begin(_native.Plan(file_bytes=100, now=[], later=[]), index)
        assert engine.wait(60)
        other.publish(index, 100)
        assert other.verify(index) == []
    engine.close()
    os.close(fd)


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_an_impossible_count_of_threads_is_refused(arena: _native.Arena, threads: int) -> None:
    for call in (
        lambda: _native.Engine(arena, threads),
        lambda: arena.verify(0, threads),
        lambda: _native.scatter(b"", [], threads),
        lambda: _native.copy(bytearray(4), b"abcd", threads),
    ):
        with pytest.raises(ValueError, match="threads"):
            call()
    arena.slot(0)


def test_a_process_that_ends_with_a_running_engine_does_not_hang() -> None:
    fd = arena_file(slot_bytes=64 * MIB, block_bytes=MIB)
    run_child(
        """
import ctypes
arena = opened(exclude_from_fork=True)
engine = _native.Engine(arena, 2)
page = (ctypes.c_char * 65536)()
plan = _native.Plan(file_bytes=64 << 20, now=[],
                    later=[(ctypes.addressof(page), 0, 1, (4 << 20, 16), (0, 4096))])
engine.begin(plan, claim(arena))
""",
        fd,
    )
    os.close(fd)


def test_a_forked_child_drops_the_engine_without_hanging() -> None:
    """The threads stayed in the parent, in the middle of a copy: the child can neither use nor await them."""
    fd = arena_file(slot_bytes=64 * MIB, block_bytes=MIB)
    out = run_child(
        """
import ctypes, gc
arena = opened(exclude_from_fork=True)
engine = _native.Engine(arena, 2)
page = (ctypes.c_char * 65536)()
plan = _native.Plan(file_bytes=64 << 20, now=[],
                    later=[(ctypes.addressof(page), 0, 1, (4 << 20, 16), (0, 4096))])
engine.begin(plan, claim(arena))
pid = os.fork()
if pid == 0:
    told = not engine.running() and engine.wait(60)
    try:
        engine.begin(plan, 0)
        told = False
    except RuntimeError as error:
        told = told and "parent" in str(error)
    engine.cancel()
    engine.close()
    del engine
    arena.close()
    del arena
    gc.collect()
    os._exit(0 if told else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), engine.wait(60))
""",
        fd,
    )
    os.close(fd)
    assert out == "0 True"


# --- the plain copy of the benchmarks


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 100_001])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_plain_copy_copies(size: int, threads: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros(size, np.uint8)
    _native.copy(target, source, threads)
    assert (target == source).all()


def test_many_buffers_are_copied_each_to_its_own() -> None:
    sources = random_arrays(30)
    targets = [np.zeros_like(source) for source in sources]
    _native.copy(targets, sources, 3)
    assert bytes_of(targets) == bytes_of(sources)


def test_a_plain_copy_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        _native.copy(bytearray(4), b"abc")
    with pytest.raises(ValueError, match="length"):
        _native.copy([bytearray(4)], [b"abc"])
    with pytest.raises(ValueError, match="count"):
        _native.copy([bytearray(4)], [])
    with pytest.raises(BufferError):
        _native.copy(b"abcd", b"abcd")


def test_the_items_of_now_alone_are_copied_where_others_fill_the_rest(
    arena: _native.Arena, engine: _native.Engine
) -> None:
    first, second = random_arrays(2)
    plan = _native.Plan(
        file_bytes=SLOT, now=[item_of(first, 8)], later=[item_of(second, SLOT // 2)]
    )  # `later` belongs to whoever fills the rest
    with pytest.raises(ValueError, match="claim it first"):
        engine.copy_now(plan, 0)
    index = claim(arena)
    before = slot_contents(arena, index, SLOT)
    engine.copy_now(plan, index)
    after = slot_contents(arena, index, SLOT)
    assert after == before[:8] + bytes_of([first]) + before[8 + first.nbytes :]
    assert arena.address % 4096 == 0 and arena.crcs_offset(1) - arena.crcs_offset(0) >= 4 * (SLOT // BLOCK)
    engine.close()
    with pytest.raises(RuntimeError, match="engine is closed"):
        engine.copy_now(plan, index)
