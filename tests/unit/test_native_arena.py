"""The arena file: its sizes, its header that trusts nothing, its words, its owner record, its mapping."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import _native
from tests.unit.native_support import (
    ARENA_ID,
    BLOCK,
    NONCE,
    SLOT,
    arena_file,
    claim,
    open_arena,
    run_child,
    run_until_killed,
)

HEADER = 12288
MIB = 1 << 20
SIZE_FIELDS = {
    "slots": (12, "I"),
    "total_bytes": (16, "Q"),
    "header_bytes": (24, "Q"),
    "slot_bytes": (32, "Q"),
    "block_bytes": (40, "I"),
}


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = arena_file()
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def arena(fd: int) -> Iterator[_native.Arena]:
    with open_arena(fd) as opened:
        yield opened


def set_owner(arena: _native.Arena, generation: int = 5) -> None:
    arena.set_owner(
        generation=generation, nonce=NONCE, rank=1, world_size=4, local_world=2, every=3, pid=1234, fenced=True
    )


def patch(fd: int, offset: int, data: bytes, *, reseal: bool) -> None:
    """Overwrite bytes of the static part; `reseal` makes its checksum right again."""
    os.pwrite(fd, data, offset)
    if reseal:
        os.pwrite(fd, struct.pack("<I", _native.crc32c(os.pread(fd, 508, 0))), 508)


# --- sizes and format


def test_an_arena_is_its_header_and_its_slots() -> None:
    total = _native.Arena.bytes_needed(2, 512 * MIB, MIB)
    assert 0 < total - 2 * 512 * MIB < 64 * 1024


@pytest.mark.parametrize(
    ("slots", "slot_bytes", "block_bytes"),
    [
        (0, SLOT, BLOCK),
        (65, SLOT, BLOCK),
        (2, SLOT, 2048),
        (2, SLOT, 12288),
        (2, 64 * MIB, 32 * MIB),
        (2, SLOT + 1, BLOCK),
        (2, 0, BLOCK),
        (2, 2**45, BLOCK),
        (2, -BLOCK, BLOCK),
        (2, 2**64, BLOCK),
    ],
)
def test_sizes_outside_of_the_ranges_are_refused(slots: int, slot_bytes: int, block_bytes: int) -> None:
    with pytest.raises(ValueError):
        _native.Arena.bytes_needed(slots, slot_bytes, block_bytes)


def test_what_was_formatted_is_what_is_opened(arena: _native.Arena) -> None:
    assert (arena.arena_id, arena.job, arena.local_index) == (ARENA_ID, "llama-7b", 3)
    assert (arena.slots, arena.slot_bytes, arena.block_bytes) == (2, SLOT, BLOCK)
    assert arena.total_bytes == _native.Arena.bytes_needed(2, SLOT, BLOCK)
    assert all(arena.slot_offset(i) % 4096 == 0 for i in range(2))
    assert arena.slot_offset(1) == arena.slot_offset(0) + SLOT
    assert arena.owner() is None and arena.passed == 0 and not arena.ever_committed
    assert [arena.slot(i).state for i in range(2)] == [_native.EMPTY] * 2


@pytest.mark.parametrize("job", ["", "j" * 201, "ü" * 101])
def test_a_job_name_of_no_bytes_or_too_many_is_refused(job: str) -> None:
    with pytest.raises(ValueError, match="200 bytes"):
        arena_file(job=job)


def test_a_job_name_may_be_any_text(fd: int) -> None:
    other = arena_file(job="größte 実験")
    with open_arena(other) as arena:
        assert arena.job == "größte 実験"
    os.close(other)


def test_the_states_differ_from_one_another_and_from_zero_in_many_bits() -> None:
    tags = [0, _native.EMPTY, _native.FILLING, _native.FULL, _native.PROTECTED, _native.COMMITTED]
    assert all((a ^ b).bit_count() >= 8 for i, a in enumerate(tags) for b in tags[:i])


# --- a header that trusts nothing


def test_a_foreign_file_is_refused() -> None:
    fd = os.memfd_create("foreign")
    os.write(fd, b"PK\x03\x04" * 20_000)
    with pytest.raises(_native.ArenaFormatError, match="foreign"):
        _native.Arena(fd, writable=False)
    os.close(fd)


def test_another_version_is_refused_with_both_versions_named(fd: int) -> None:
    patch(fd, 8, struct.pack("<I", 77), reseal=True)
    with pytest.raises(_native.ArenaFormatError, match=rf"version 77.*version {_native.ARENA_VERSION}"):
        _native.Arena(fd, writable=False)


def test_any_flipped_bit_in_the_static_part_is_noticed(fd: int) -> None:
    before = os.pread(fd, 512, 0)
    for bit in range(0, 512 * 8, 7):
        damaged = bytearray(before)
        damaged[bit // 8] ^= 1 << bit % 8
        os.pwrite(fd, damaged, 0)
        with pytest.raises(_native.ArenaFormatError):
            _native.Arena(fd, writable=False)
    os.pwrite(fd, before, 0)
    _native.Arena(fd, writable=False).close()


@pytest.mark.parametrize("length", [0, 1, 511, 512, HEADER - 1, HEADER, HEADER + 5000])
def test_a_truncated_file_is_refused(fd: int, length: int) -> None:
    os.ftruncate(fd, length)
    with pytest.raises(_native.ArenaFormatError):
        _native.Arena(fd, writable=True)


def test_a_file_that_grew_is_refused(fd: int) -> None:
    os.ftruncate(fd, _native.Arena.bytes_needed(2, SLOT, BLOCK) + 4096)
    with pytest.raises(_native.ArenaFormatError, match="truncated or grown"):
        _native.Arena(fd, writable=False)


@pytest.mark.parametrize("field", SIZE_FIELDS)
@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1, 2**44, 2**63, 2**64 - 1])
def test_impossible_sizes_are_refused_though_their_checksum_is_right(fd: int, field: str, value: int) -> None:
    offset, form = SIZE_FIELDS[field]
    patch(fd, offset, struct.pack("<Q", value)[: struct.calcsize(form)], reseal=True)
    with pytest.raises(_native.ArenaFormatError):
        _native.Arena(fd, writable=False)


def test_a_job_name_longer_than_its_room_is_refused_though_its_checksum_is_right(fd: int) -> None:
    patch(fd, 64, struct.pack("<I", 201), reseal=True)
    with pytest.raises(_native.ArenaFormatError):
        _native.Arena(fd, writable=False)


@settings(max_examples=200, deadline=None)
@given(head=st.binary(max_size=600), length=st.integers(0, 3 * SLOT), keep_magic=st.booleans(), reseal=st.booleans())
def test_random_bytes_are_never_an_arena(head: bytes, length: int, keep_magic: bool, reseal: bool) -> None:
    fd = os.memfd_create("random")
    os.ftruncate(fd, length)
    prefix = b"SNAPARNA" + struct.pack("<I", _native.ARENA_VERSION) if keep_magic else b""
    os.pwrite(fd, (prefix + head)[:length], 0)
    if reseal and length >= 512:
        patch(fd, 0, b"", reseal=True)
    with pytest.raises(_native.ArenaFormatError):
        _native.Arena(fd, writable=False)
    os.close(fd)


def test_what_is_no_regular_file_is_refused() -> None:
    reader, writer = os.pipe()
    with pytest.raises(_native.ArenaFormatError, match="regular"):
        _native.Arena(reader, writable=False)
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError) as failed:
        _native.Arena(reader, writable=False)
    assert failed.value.errno == errno.EBADF


def test_random_bytes_behind_the_static_part_are_reported_and_never_a_crash(fd: int) -> None:
    for seed in range(50):
        os.pwrite(fd, random.Random(seed).randbytes(HEADER - 512), 512)
        with open_arena(fd) as arena:
            for index in range(2):
                info = arena.slot(index)
                assert not info.sound
                with pytest.raises(_native.ArenaFormatError):
                    arena.verify(index)
                with pytest.raises(_native.ArenaFormatError):
                    arena.block_crcs(index)
            with pytest.raises(_native.ArenaFormatError, match="owner record is damaged"):
                arena.owner()


# --- the owner record


def test_the_owner_record_says_what_was_written(arena: _native.Arena) -> None:
    arena.set_owner(
        generation=9,
        nonce=NONCE,
        rank=6,
        world_size=8,
        local_world=4,
        every=10,
        pid=4321,
        closed=True,
        released_at_s=1_700_000_000,
        restored_generation=8,
        restored_nonce=ARENA_ID,
        restored_step=120,
    )
    owner = arena.owner()
    assert owner is not None
    assert (owner.generation, owner.nonce, owner.rank, owner.world_size) == (9, NONCE, 6, 8)
    assert (owner.local_world, owner.every, owner.pid) == (4, 10, 4321)
    assert (owner.fenced, owner.closed, owner.released_at_s) == (False, True, 1_700_000_000)
    assert (owner.restored_generation, owner.restored_nonce, owner.restored_step) == (8, ARENA_ID, 120)


def test_a_flipped_bit_in_the_owner_record_is_noticed(fd: int, arena: _native.Arena) -> None:
    set_owner(arena)
    for byte in (*range(640, 768), *range(768, 776)):  # the first record lies at 640, its serial at 768
        before = os.pread(fd, 1, byte)
        os.pwrite(fd, bytes([before[0] ^ 0x10]), byte)
        with pytest.raises(_native.ArenaFormatError, match="owner record is damaged"):
            arena.owner()
        os.pwrite(fd, before, byte)
    assert arena.owner() is not None


def test_a_reader_never_sees_half_an_owner_record(fd: int, arena: _native.Arena) -> None:
    """Another process writes as fast as it can; each record that is seen carries one number in all its fields."""
    writer = """
arena = opened()
i = 0
while arena.committed_step == 0:
    i += 1
    arena.set_owner(generation=i, nonce=i.to_bytes(16, "little"), rank=i, world_size=i, local_world=i, every=i, pid=i,
                    released_at_s=i, restored_generation=i, restored_nonce=i.to_bytes(16, "little"), restored_step=i)
"""
    thread = threading.Thread(target=run_child, args=(writer, fd))
    thread.start()
    seen: set[int] = set()
    try:
        while len(seen) < 1000 and thread.is_alive():
            owner = arena.owner()
            if owner is None:
                continue
            i = owner.generation
            number = i.to_bytes(16, "little")
            assert (owner.nonce, owner.rank, owner.world_size, owner.every, owner.pid) == (number, i, i, i, i)
            assert (owner.released_at_s, owner.restored_nonce, owner.restored_step) == (i, number, i)
            seen.add(i)
    finally:
        arena.committed_step = 1
        thread.join()
    assert len(seen) == 1000


@pytest.mark.parametrize("nonce", [b"", b"x" * 15, b"x" * 17])
def test_a_nonce_of_another_length_is_refused(arena: _native.Arena, nonce: bytes) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        arena.set_owner(generation=1, nonce=nonce, rank=0, world_size=1, local_world=1, every=1, pid=1)


@pytest.mark.parametrize("rank", [-1, 2**32, 2**64])
def test_numbers_that_do_not_fit_are_refused(arena: _native.Arena, rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        arena.set_owner(generation=1, nonce=NONCE, rank=rank, world_size=1, local_world=1, every=1, pid=1)


# --- words and waiting


@pytest.mark.parametrize("word", ["passed", "next_step", "naming", "committed_step", "aborted_step"])
def test_a_word_is_seen_by_the_other_process(fd: int, arena: _native.Arena, word: str) -> None:
    setattr(arena, word, 2**63 + 5)
    assert run_child(f"a = opened(); print(a.{word}); a.{word} = 11", fd) == str(2**63 + 5)
    assert getattr(arena, word) == 11
    with pytest.raises(ValueError):
        setattr(arena, word, -1)


def test_ever_committed_is_a_truth_value(arena: _native.Arena) -> None:
    arena.ever_committed = True
    assert arena.ever_committed is True


def test_waiting_ends_at_once_when_the_change_is_already_there(arena: _native.Arena) -> None:
    seen = arena.changes()
    arena.wake()
    assert arena.wait_change(seen, 60) == seen + 1


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), 0.01])
def test_waiting_is_over_when_its_time_is(arena: _native.Arena, timeout_s: float) -> None:
    assert arena.wait_change(arena.changes(), timeout_s) == arena.changes()


def test_another_process_wakes_who_waits(fd: int, arena: _native.Arena) -> None:
    seen = arena.changes()
    child = threading.Thread(target=run_child, args=("opened().wake()", fd))
    child.start()
    assert arena.wait_change(seen, 100) == seen + 1
    child.join()


def test_a_reader_without_the_right_to_write_can_wait_too(fd: int) -> None:
    with open_arena(fd, writable=False) as reader:
        seen = reader.changes()
        child = threading.Thread(target=run_child, args=("opened().wake()", fd))
        child.start()
        assert reader.wait_change(seen, 100) == seen + 1
        child.join()


def test_a_signal_reaches_python_while_it_waits(fd: int, arena: _native.Arena) -> None:
    """The child's handler raises: the wait of a minute must end by it, not by its time."""
    out = run_child(
        """
import signal, threading
class Rang(Exception): pass
def ring(*_): raise Rang
signal.signal(signal.SIGUSR1, ring)
arena = opened()
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
try:
    arena.wait_change(arena.changes(), 60)
except Rang:
    print("rang")
""",
        fd,
    )
    assert out == "rang"


# --- the mapping


def test_a_read_only_arena_refuses_every_change(fd: int) -> None:
    with open_arena(fd, writable=False) as arena:
        for change in (
            lambda: claim(arena),
            lambda: arena.publish(0, 1),
            lambda: arena.empty(0),
            lambda: arena.advance(0, _native.FULL, _native.COMMITTED),
            lambda: arena.set_block_crcs(0, 1),
            lambda: arena.put_block_crcs(0, 1, bytes(4)),
            lambda: arena.wake(),
            lambda: set_owner(arena),
            lambda: setattr(arena, "passed", 1),
            lambda: _native.Engine(arena, 1),
        ):
            with pytest.raises(ValueError, match="read-only"):
                change()
        with arena.slot_view(0) as view:
            assert view.readonly


def test_a_view_keeps_the_mapping_and_an_arena_with_views_stays_open(fd: int) -> None:
    arena = _native.Arena(fd, writable=True)
    view = arena.slot_view(1)
    part = view[100:200]
    view.release()
    with pytest.raises(BufferError, match="views"):
        arena.close()
    part[:4] = b"safe"
    assert bytes(arena.slot_view(1)[100:104]) == b"safe"
    part.release()
    arena.close()


def test_a_view_outlives_the_object_that_made_it(fd: int) -> None:
    view = _native.Arena(fd, writable=True).slot_view(0)
    view[-4:] = b"tail"
    assert bytes(view[-4:]) == b"tail" and len(view) == SLOT
    view.release()


def test_a_closed_arena_answers_every_call_with_an_error(fd: int) -> None:
    arena = _native.Arena(fd, writable=True)
    arena.close()
    arena.close()
    for call in (
        arena.owner,
        arena.changes,
        arena.wake,
        lambda: arena.passed,
        lambda: arena.slot(0),
        lambda: arena.slot_view(0),
        lambda: arena.verify(0),
        lambda: arena.block_crcs(0),
        lambda: arena.wait_change(0, 1),
        lambda: claim(arena),
        lambda: set_owner(arena),
        lambda: _native.Engine(arena, 1),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


@pytest.mark.parametrize("index", [2, 64, 2**31])
def test_a_slot_that_does_not_exist_is_an_index_error(arena: _native.Arena, index: int) -> None:
    for call in (arena.slot, arena.slot_view, arena.slot_offset, arena.block_crcs, arena.verify, arena.empty):
        with pytest.raises(IndexError, match="no slot"):
            call(index)


def test_a_forked_child_inherits_no_excluded_mapping_and_is_told_so(fd: int) -> None:
    out = run_child(
        """
arena = opened(populate=True, exclude_from_fork=True)
shared = opened()
shared.passed = 41
pid = os.fork()
if pid == 0:
    try:
        arena.passed
    except ValueError as error:
        shared.passed = 42 if "kept out of forks" in str(error) else 0
    arena.close()
    del arena
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(arena.passed)
""",
        fd,
    )
    assert out == "42"


# --- reserving memory


def test_reserved_memory_is_real(fd: int) -> None:
    assert os.fstat(fd).st_blocks * 512 >= _native.Arena.bytes_needed(2, SLOT, BLOCK)


# A file size limit of 64 MiB in the child: should the check that is tested here fail, nothing fills the machine.
RESERVE_TOO_MUCH = """
import errno, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
try:
    _native.reserve(fd, {total})
except OSError as error:
    print(errno.errorcode[error.errno], "no room" in str(error), os.fstat(fd).st_size, os.fstat(fd).st_blocks)
"""


def test_more_than_the_file_system_has_is_refused_before_a_page_is_made(shm_dir: Path) -> None:
    system = os.statvfs(shm_dir)
    total = (system.f_bavail + (1 << 20)) * system.f_frsize
    fd = os.open(shm_dir / "arena", os.O_RDWR | os.O_CREAT)
    assert run_child(RESERVE_TOO_MUCH.format(total=total), fd) == "ENOSPC True 0 0"
    os.close(fd)


def test_more_than_the_machine_has_is_refused_where_the_file_system_has_no_limit() -> None:
    fd = os.memfd_create("too-large")
    assert run_child(RESERVE_TOO_MUCH.format(total=1 << 50), fd) == "ENOSPC True 0 0"
    os.close(fd)


def test_pages_that_cannot_be_had_in_the_end_leave_an_empty_file() -> None:
    """The file size limit stands in for a file system that others fill in the middle of it."""
    fd = os.memfd_create("limited")
    assert run_child(RESERVE_TOO_MUCH.format(total=65 << 20), fd) == "EFBIG True 0 0"
    os.close(fd)


@pytest.mark.parametrize("node", [-1, 0, 1023, 5000])
def test_a_numa_node_that_does_not_exist_is_only_a_wish(node: int) -> None:
    fd = os.memfd_create("numa")
    _native.reserve(fd, 5 * MIB + 4096, node)
    assert os.fstat(fd).st_size == 5 * MIB + 4096
    assert os.fstat(fd).st_blocks * 512 >= 5 * MIB + 4096
    os.close(fd)


@pytest.mark.parametrize("total", [0, -1, 2**63])
def test_reserving_an_impossible_size_is_refused(total: int) -> None:
    fd = os.memfd_create("impossible")
    with pytest.raises(ValueError):
        _native.reserve(fd, total)
    os.close(fd)


def test_populating_changes_nothing_and_costs_no_private_memory() -> None:
    fd = arena_file(slot_bytes=8 * MIB, block_bytes=MIB)
    with open_arena(fd) as first, first.slot_view(0) as view:
        view[:] = bytes(range(256)) * (len(view) // 256)
        before = _native.process_rss_anon_bytes()
        second = _native.Arena(fd, writable=True, populate=True)
        assert _native.process_rss_anon_bytes() - before < 4 * MIB
        with second.slot_view(0) as same:
            assert same == view
        second.close()
    os.close(fd)


# --- crash points


def test_the_crash_points_are_the_documented_ones() -> None:
    assert _native.crash_points() == [
        "claim.taken",
        "claim.named",
        "copy.block",
        "copy.done",
        "publish.before",
        "publish.after",
    ]


def test_an_unknown_crash_point_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        _native.arm_crash("nowhere")
    with pytest.raises(ValueError, match="countdown"):
        _native.arm_crash("claim.taken", 0)


def test_a_crash_point_strikes_at_its_countdown_and_not_before(fd: int) -> None:
    run_until_killed(
        """
arena = opened()
_native.arm_crash("claim.taken", 3)
for step in (1, 2, 3):
    arena.passed = step
    arena.empty(claim(arena, step))
arena.passed = 99
""",
        fd,
    )
    with open_arena(fd, writable=False) as arena:
        assert arena.passed == 3


def test_a_disarmed_crash_point_is_passed(fd: int) -> None:
    assert run_child('_native.arm_crash("claim.taken"); _native.arm_crash(""); print(claim(opened()))', fd) == "0"


def test_sigkill_is_what_a_crash_point_is(fd: int) -> None:
    run_child('_native.arm_crash("claim.named"); claim(opened())', fd, expect=-signal.SIGKILL)
