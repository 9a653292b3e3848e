"""Life of a slot: claimed, filled, published, advanced, emptied, and what a killed trainer leaves at each point."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator

import pytest

from snapshotd import _native
from tests.unit.native_support import (
    BLOCK,
    FINGERPRINT,
    NONCE,
    SLOT,
    arena_file,
    claim,
    crc32c_twin,
    fill,
    open_arena,
    run_child,
    run_until_killed,
    slot_contents,
)

ENTRY = 4096  # the first slot's entry in the header
TABLE = 12288  # the first slot's CRC table

FILL_BY_ENGINE = """
import ctypes
arena = opened()
source = (ctypes.c_char * (9 * 4096 + 17)).from_buffer_copy(bytes(range(256)) * 144 + b"x" * 17)
size = ctypes.sizeof(source)
plan = _native.Plan(file_bytes=size, now=[], later=[(ctypes.addressof(source), 0, 1, (size,), (1,))])
engine = _native.Engine(arena, 2)
index = claim(arena)
engine.begin(plan, index)
assert engine.wait(60)
arena.publish(index, size)
"""


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = arena_file()
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def arena(fd: int) -> Iterator[_native.Arena]:
    with open_arena(fd) as opened:
        yield opened


def flip(fd: int, offset: int, mask: int = 1) -> None:
    os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ mask]), offset)


def test_a_claim_takes_the_first_free_slot_and_names_it(arena: _native.Arena) -> None:
    assert [claim(arena, 7), claim(arena, 8), claim(arena, 9)] == [0, 1, -1]
    info = arena.slot(1)
    assert (info.index, info.state, info.generation, info.nonce) == (1, _native.FILLING, 2, NONCE)
    assert (info.step, info.rank, info.world_size, info.fingerprint) == (8, 1, 4, FINGERPRINT)
    assert (info.file_bytes, info.sound) == (0, False)


def test_a_claim_needs_a_step(arena: _native.Arena) -> None:
    with pytest.raises(ValueError, match="step"):
        claim(arena, 0)
    assert arena.slot(0).state == _native.EMPTY


def test_two_processes_that_claim_at_once_never_get_the_same_slot() -> None:
    fd = arena_file(slots=64, slot_bytes=BLOCK)
    claims = "a = opened(); print(*iter(lambda: claim(a), -1))"
    taken: list[str] = []
    threads = [threading.Thread(target=lambda: taken.extend(run_child(claims, fd).split())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, taken)) == list(range(64))
    os.close(fd)


def test_a_published_slot_is_full_sound_and_verifies(arena: _native.Arena) -> None:
    index = fill(arena, 3 * BLOCK + 5)
    info = arena.slot(index)
    assert (info.state, info.sound, info.file_bytes) == (_native.FULL, True, 3 * BLOCK + 5)
    data = slot_contents(arena, index, info.file_bytes)
    assert arena.block_crcs(index) == [crc32c_twin(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
    assert arena.verify(index) == arena.verify(index, threads=4) == []


def test_publishing_what_nobody_fills_is_refused(arena: _native.Arena) -> None:
    with pytest.raises(ValueError, match="not being filled"):
        arena.publish(0, SLOT)
    index = fill(arena)
    with pytest.raises(ValueError, match="not being filled"):
        arena.publish(index, SLOT)


@pytest.mark.parametrize("file_bytes", [0, SLOT + 1])
def test_a_file_that_does_not_fit_the_slot_is_not_published(arena: _native.Arena, file_bytes: int) -> None:
    index = claim(arena)
    with pytest.raises(ValueError, match="file_bytes"):
        arena.publish(index, file_bytes)
    with pytest.raises(ValueError, match="file_bytes"):
        arena.set_block_crcs(index, file_bytes)
    with pytest.raises(ValueError, match="file_bytes"):
        arena.put_block_crcs(index, file_bytes, bytes(4))
    assert arena.slot(index).state == _native.FILLING


def test_checksums_that_are_known_already_are_stored_as_they_are(arena: _native.Arena) -> None:
    index = claim(arena)
    with arena.slot_view(index) as view:
        view[:] = random.Random(3).randbytes(len(view))
        words = b"".join(
            _native.crc32c(view[at : at + BLOCK]).to_bytes(4, "little") for at in range(0, SLOT - 100, BLOCK)
        )
        last = _native.crc32c(view[(SLOT - 100) // BLOCK * BLOCK : SLOT - 100]).to_bytes(4, "little")
    arena.put_block_crcs(index, SLOT - 100, words[:-4] + last)
    arena.publish(index, SLOT - 100)
    assert arena.verify(index) == []
    assert arena.crc_words(index) == words[:-4] + last
    for wrong in (words[:-4], words + bytes(4), words[:-1]):
        with pytest.raises(ValueError, match=r"checksums|4 bytes"):
            arena.put_block_crcs(index, SLOT - 100, wrong)
    assert arena.verify(index) == []


def test_every_flipped_byte_is_found_in_its_block(fd: int, arena: _native.Arena) -> None:
    index = fill(arena, SLOT - 100)
    for at in (0, BLOCK - 1, BLOCK, 7 * BLOCK + 9, SLOT - 101):
        flip(fd, arena.slot_offset(index) + at, 0x40)
        assert arena.verify(index) == arena.verify(index, threads=3) == [at // BLOCK]
        flip(fd, arena.slot_offset(index) + at, 0x40)
    flip(fd, arena.slot_offset(index) + SLOT - 100)  # behind the file: nobody's
    assert arena.verify(index) == []


def test_a_flipped_bit_in_a_slots_identity_makes_it_unsound(fd: int, arena: _native.Arena) -> None:
    fill(arena)
    for byte in (*range(4, 88), *range(96, 100)):
        flip(fd, ENTRY + byte, 0x04)
        assert not arena.slot(0).sound, f"byte {byte} of the entry"
        flip(fd, ENTRY + byte, 0x04)
    for byte in range(4 * SLOT // BLOCK):
        flip(fd, TABLE + byte, 0x80)
        assert not arena.slot(0).sound, f"byte {byte} of the CRC table"
        flip(fd, TABLE + byte, 0x80)
    assert arena.slot(0).sound


def test_a_damaged_state_is_reported_as_it_is_and_is_not_sound(fd: int, arena: _native.Arena) -> None:
    fill(arena)
    for bit in range(32):
        flip(fd, ENTRY + bit // 8, 1 << bit % 8)
        info = arena.slot(0)
        assert info.state == _native.FULL ^ (1 << bit) and not info.sound
        assert not arena.advance(0, _native.FULL, _native.COMMITTED)
        flip(fd, ENTRY + bit // 8, 1 << bit % 8)
    assert claim(arena, 8) == 1 and claim(arena, 9) == -1


def test_a_slot_of_one_arena_is_not_sound_in_another(fd: int, arena: _native.Arena) -> None:
    """Identity includes the arena and the slot: a header pasted elsewhere does not count."""
    fill(arena)
    fill(arena, step=8)
    first, second = os.pread(fd, 128, ENTRY), os.pread(fd, 128, ENTRY + 128)
    os.pwrite(fd, second + first, ENTRY)
    assert not arena.slot(0).sound and not arena.slot(1).sound


def test_advance_moves_only_from_the_state_it_was_told(arena: _native.Arena) -> None:
    fill(arena)
    assert not arena.advance(0, _native.PROTECTED, _native.COMMITTED)
    assert arena.advance(0, _native.FULL, _native.PROTECTED)
    assert arena.advance(0, _native.PROTECTED, _native.COMMITTED)
    assert arena.slot(0).state == _native.COMMITTED and arena.slot(0).sound
    assert arena.advance(0, _native.COMMITTED, _native.FULL)


@pytest.mark.parametrize("states", [(_native.EMPTY, _native.FULL), (_native.FULL, _native.EMPTY), (_native.FULL, 5)])
def test_advance_knows_only_the_states_past_filling(arena: _native.Arena, states: tuple[int, int]) -> None:
    fill(arena)
    with pytest.raises(ValueError, match="FULL, PROTECTED and COMMITTED"):
        arena.advance(0, *states)
    assert arena.slot(0).state == _native.FULL


@pytest.mark.parametrize("tag", ["FILLING", "FULL", "PROTECTED", "COMMITTED", "damaged"])
def test_empty_forgets_a_slot_whatever_it_was(fd: int, arena: _native.Arena, tag: str) -> None:
    if tag == "FILLING":
        claim(arena)
    else:
        fill(arena)
        if tag == "damaged":
            flip(fd, ENTRY)
        else:
            arena.advance(0, _native.FULL, getattr(_native, tag))
    arena.empty(0)
    info = arena.slot(0)
    assert (info.state, info.step, info.generation, info.nonce) == (_native.EMPTY, 0, 0, bytes(16))
    assert (info.file_bytes, info.sound, info.fingerprint) == (0, False, bytes(32))
    assert arena.block_crcs(0) == arena.verify(0) == []
    assert claim(arena, 8) == 0


def test_a_reader_sees_a_slots_identity_whole_or_not_at_all(fd: int, arena: _native.Arena) -> None:
    """Another process lives through snapshot after snapshot; each look belongs to one of them."""
    writer = """
arena = opened()
i = 0
while arena.committed_step == 0:
    i += 1
    index = arena.claim(generation=i, nonce=i.to_bytes(16, "little"), step=i, rank=i, world_size=i,
                        fingerprint=i.to_bytes(32, "little"))
    arena.publish(index, 1 + i % 4096)
    arena.empty(index)
"""
    thread = threading.Thread(target=run_child, args=(writer, fd))
    thread.start()
    steps: set[int] = set()
    try:
        while len(steps) < 1000 and thread.is_alive():
            info = arena.slot(0)
            i = info.step
            assert (info.generation, info.rank, info.world_size) == (i, i, i)
            assert (info.nonce, info.fingerprint) == (i.to_bytes(16, "little"), i.to_bytes(32, "little"))
            assert info.state in (_native.EMPTY, _native.FILLING, _native.FULL)
            if info.state == _native.FULL:
                assert info.sound == (i > 0)  # without a step it is on its way to EMPTY
                assert info.file_bytes == (1 + i % 4096 if i else 0)
            steps.add(i)
    finally:
        arena.committed_step = 1
        thread.join()
    assert len(steps) == 1000


# --- a trainer that is killed, and what the survivor finds


def test_a_trainer_killed_as_it_claims_leaves_a_filling_slot_without_a_name(fd: int, arena: _native.Arena) -> None:
    run_until_killed('_native.arm_crash("claim.taken"); claim(opened())', fd)
    info = arena.slot(0)
    assert (info.state, info.step, info.nonce, info.sound) == (_native.FILLING, 0, bytes(16), False)
    assert claim(arena, 8) == 1


def test_a_trainer_killed_after_it_claimed_leaves_a_filling_slot_with_its_name(fd: int, arena: _native.Arena) -> None:
    run_until_killed('_native.arm_crash("claim.named"); claim(opened())', fd)
    info = arena.slot(0)
    assert (info.state, info.step, info.nonce, info.fingerprint) == (_native.FILLING, 7, NONCE, FINGERPRINT)


@pytest.mark.parametrize(
    "point", ['"copy.block"', '"copy.block", 3', '"copy.block", 10', '"copy.done"', '"publish.before"']
)
def test_a_killed_trainer_leaves_a_filling_slot(fd: int, arena: _native.Arena, point: str) -> None:
    run_until_killed(f"_native.arm_crash({point})\n" + FILL_BY_ENGINE, fd)
    info = arena.slot(0)
    assert (info.state, info.step, info.sound) == (_native.FILLING, 7, False)
    arena.empty(0)
    assert run_child(FILL_BY_ENGINE + "print(arena.slot(index).sound, arena.verify(index))", fd) == "True []"


def test_a_trainer_killed_after_publishing_leaves_a_whole_snapshot(fd: int, arena: _native.Arena) -> None:
    run_until_killed('_native.arm_crash("publish.after")\n' + FILL_BY_ENGINE, fd)
    info = arena.slot(0)
    assert (info.state, info.step, info.sound, info.file_bytes) == (_native.FULL, 7, True, 9 * 4096 + 17)
    assert slot_contents(arena, 0, info.file_bytes) == bytes(range(256)) * 144 + b"x" * 17
    assert arena.verify(0) == []


def test_a_copy_passes_its_crash_point_once_for_each_block(fd: int) -> None:
    run_child('_native.arm_crash("copy.block", 11)\n' + FILL_BY_ENGINE, fd)  # ten blocks: never struck


def test_the_older_snapshot_survives_a_kill_in_the_middle_of_the_next_one(fd: int, arena: _native.Arena) -> None:
    fill(arena, step=6, seed=3)
    arena.advance(0, _native.FULL, _native.COMMITTED)
    before = slot_contents(arena, 0, SLOT)
    run_until_killed('_native.arm_crash("copy.block", 5)\n' + FILL_BY_ENGINE, fd)
    assert arena.slot(1).state == _native.FILLING
    assert (arena.slot(0).state, arena.slot(0).sound, arena.verify(0)) == (_native.COMMITTED, True, [])
    assert slot_contents(arena, 0, SLOT) == before
