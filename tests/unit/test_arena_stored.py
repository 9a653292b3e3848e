"""An arena as this release wrote it once, kept as a file: a later release reads it, or refuses it by its version.

`data/arena-v1.bin.gz` holds, in memory order, what a daemon of the next release may adopt. Whoever changes the layout
finds out here: either the stored file is still read to the last byte, or `ARENA_VERSION` was raised and it is refused.
"""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from snapshotd import _native
from tests.unit.native_support import ARENA_ID, BLOCK, FINGERPRINT, NONCE, slot_contents

STORED = gzip.decompress((Path(__file__).parent / "data" / "arena-v1.bin.gz").read_bytes())
STORED_VERSION = 1
VERSION_AT = 8
SHARDS = {5: (2 * BLOCK + 123, _native.COMMITTED), 8: (3 * BLOCK, _native.FULL)}


def in_memory(data: bytes) -> int:
    fd = os.memfd_create("snapshotd-test-stored")
    os.write(fd, data)
    return fd


@pytest.fixture
def stored() -> Iterator[int]:
    fd = in_memory(STORED)
    yield fd
    os.close(fd)


@pytest.mark.skipif(_native.ARENA_VERSION != STORED_VERSION, reason="this release refuses that version: see below")
def test_an_arena_that_an_earlier_build_wrote_is_read_to_the_last_byte(stored: int) -> None:
    arena = _native.Arena(stored, writable=False)
    assert (arena.arena_id, arena.job, arena.local_index) == (ARENA_ID, "llama-7b", 3)
    assert (arena.slots, arena.slot_bytes, arena.block_bytes) == (2, 3 * BLOCK, BLOCK)
    owner = arena.owner()
    assert owner is not None
    assert (owner.generation, owner.nonce, owner.rank, owner.world_size) == (2, NONCE, 1, 4)
    assert (owner.local_world, owner.every, owner.pid, owner.fenced) == (2, 3, 1234, True)
    slots = {arena.slot(index).step: index for index in range(2)}
    assert slots.keys() == SHARDS.keys()
    for step, (file_bytes, state) in SHARDS.items():
        info = arena.slot(slots[step])
        assert (info.state, info.file_bytes, info.fingerprint, info.sound) == (state, file_bytes, FINGERPRINT, True)
        assert arena.verify(slots[step]) == []
        assert slot_contents(arena, slots[step], file_bytes) == np.random.default_rng(step).bytes(file_bytes)
    arena.close()


def test_a_stored_arena_of_another_version_is_refused_with_both_named_and_left_as_it_is(stored: int) -> None:
    other = STORED_VERSION if _native.ARENA_VERSION != STORED_VERSION else STORED_VERSION + 1
    os.pwrite(stored, struct.pack("<I", other), VERSION_AT)
    before = os.pread(stored, len(STORED), 0)
    with pytest.raises(_native.ArenaFormatError, match=rf"version {other}\b.*version {_native.ARENA_VERSION}\b"):
        _native.Arena(stored, writable=True)
    assert os.pread(stored, len(STORED), 0) == before
