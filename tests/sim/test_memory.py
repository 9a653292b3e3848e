"""The simulated arena against the native one, call by call."""

from __future__ import annotations

import os
import random

import pytest

from snapshotd import _native
from tests.sim.loop import Life
from tests.sim.memory import Arena, Memory

BLOCK = 4096
NONCE = bytes(range(16))
STATES = (_native.FULL, _native.PROTECTED, _native.COMMITTED)
FIELDS = ("index", "state", "generation", "nonce", "step", "rank", "world_size", "fingerprint", "file_bytes", "sound")


def _native_arena() -> tuple[int, _native.Arena]:
    fd = os.memfd_create("snapshotd-test-twin")
    os.posix_fallocate(fd, 0, _native.Arena.bytes_needed(2, 2 * BLOCK, BLOCK))
    _native.Arena.format(
        fd, arena_id=bytes(16), job="job", local_index=0, slots=2, slot_bytes=2 * BLOCK, block_bytes=BLOCK
    )
    return fd, _native.Arena(fd, writable=True)


def _do(arena: _native.Arena | Arena, chance: random.Random) -> object:
    """One call, drawn; what it answers, or that it refuses."""
    index, length = chance.randrange(2), chance.randint(1, 2 * BLOCK)
    what = chance.choice(["claim", "fill", "publish", "advance", "advance", "empty", "verify", "words"])
    state, to = chance.choice(STATES), chance.choice(STATES)
    data = chance.randbytes(length)
    try:
        if what == "claim":
            return arena.claim(generation=3, nonce=NONCE, step=length, rank=1, world_size=2, fingerprint=bytes(32))
        if what == "fill":
            view = arena.slot_view(index)
            if arena.slot(index).state == _native.FILLING:
                view[:length] = data
            view.release()
            return arena.set_block_crcs(index, length) if arena.slot(index).state == _native.FILLING else None
        if what == "publish":
            arena.publish(index, length)
        elif what == "advance":
            return arena.advance(index, state, to)
        elif what == "empty":
            arena.empty(index)
        elif what == "verify":
            sound = arena.slot(index).sound
            return None if not sound else bytes(arena.slot_view(index)[: arena.slot(index).file_bytes])
        else:
            arena.passed, arena.next_step = length, state
            return arena.passed, arena.next_step, arena.committed_step
    except ValueError:
        return ValueError
    return None


@pytest.mark.parametrize("seed", range(20))
def test_it_answers_as_the_native_arena_does(seed: int) -> None:
    fd, native = _native_arena()
    twin = Arena(Memory(bytes(16), "job", 0, 2 * BLOCK, BLOCK, lambda *_: None), Life("twin"))
    try:
        for turn in range(60):
            assert _do(native, random.Random(f"{seed} {turn}")) == _do(twin, random.Random(f"{seed} {turn}"))
            for index in (0, 1):
                one, other = native.slot(index), twin.slot(index)
                assert [getattr(one, name) for name in FIELDS] == [getattr(other, name) for name in FIELDS], turn
    finally:
        os.close(fd)


def test_who_is_dead_writes_nothing_any_more() -> None:
    memory, life = Memory(bytes(16), "job", 0, BLOCK, BLOCK, lambda *_: None), Life("daemon")
    arena = Arena(memory, life)
    index = arena.claim(generation=1, nonce=NONCE, step=1, rank=0, world_size=1, fingerprint=bytes(32))
    life.dead = True
    arena.empty(index)
    arena.passed = 5
    assert (memory.slots[index].state, memory.passed) == (_native.FILLING, 0)
