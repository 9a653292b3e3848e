"""What the tests of the native module share: arenas in memory, tensors, second processes, and slow twins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from snapshotd import _native

BLOCK = 4096
SLOT = 16 * BLOCK
ARENA_ID = bytes(range(16))
NONCE = bytes(range(100, 116))
FINGERPRINT = bytes(range(200, 232))

Item = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
Array = npt.NDArray[Any]


def arena_file(*, slots: int = 2, slot_bytes: int = SLOT, block_bytes: int = BLOCK, job: str = "llama-7b") -> int:
    """A descriptor of a formatted arena in anonymous shared memory; the caller closes it."""
    fd = os.memfd_create("snapshotd-test-arena")
    _native.reserve(fd, _native.Arena.bytes_needed(slots, slot_bytes, block_bytes))
    _native.Arena.format(
        fd, arena_id=ARENA_ID, job=job, local_index=3, slots=slots, slot_bytes=slot_bytes, block_bytes=block_bytes
    )
    return fd


@contextmanager
def open_arena(fd: int, *, writable: bool = True) -> Iterator[_native.Arena]:
    arena = _native.Arena(fd, writable=writable)
    try:
        yield arena
    finally:
        arena.close()


def claim(arena: _native.Arena, step: int = 7) -> int:
    return arena.claim(generation=2, nonce=NONCE, step=step, rank=1, world_size=4, fingerprint=FINGERPRINT)


def fill(arena: _native.Arena, file_bytes: int = SLOT, step: int = 7, seed: int = 0) -> int:
    """Claim a slot, fill it with random bytes by other means than the engine, publish it."""
    index = claim(arena, step)
    with arena.slot_view(index) as view:
        view[:file_bytes] = np.random.default_rng(seed).bytes(file_bytes)
    arena.set_block_crcs(index, file_bytes)
    arena.publish(index, file_bytes)
    return index


def slot_contents(arena: _native.Arena, index: int, file_bytes: int) -> bytes:
    with arena.slot_view(index) as view:
        return bytes(view[:file_bytes])


def item_of(array: Array, offset: int) -> Item:
    return (array.ctypes.data, offset, array.itemsize, array.shape, array.strides)


def packed(arrays: Sequence[Array], start: int = 0) -> tuple[list[Item], int]:
    """Items of arrays that lie one behind the other, and where the last one ends."""
    items = []
    for array in arrays:
        items.append(item_of(array, start))
        start += array.nbytes
    return items, start


def bytes_of(arrays: Sequence[Array]) -> bytes:
    """The twin of the copy engine: row-major bytes, by numpy."""
    return b"".join(array.tobytes() for array in arrays)


def crc32c_twin(data: bytes, value: int = 0) -> int:
    """CRC32C bit by bit, straight from the definition."""
    state = ~value & 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return ~state & 0xFFFFFFFF


PROLOGUE = """
import os, sys
from snapshotd import _native
fd = int(sys.argv[1])
def opened(**options):
    return _native.Arena(fd, writable=True, **options)
def claim(arena, step=7):
    return arena.claim(generation=2, nonce=bytes(range(100, 116)), step=step, rank=1, world_size=4,
                       fingerprint=bytes(range(200, 232)))
"""


def run_child(code: str, fd: int, *, expect: int = 0) -> str:
    """Run `code` in a process of its own that inherits `fd`; its output. Fails on another exit status."""
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, str(fd)],
        pass_fds=(fd,),
        cwd=Path(_native.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expect, f"exit status {done.returncode}, expected {expect}:\n{done.stderr}"
    return done.stdout.strip()


def run_until_killed(code: str, fd: int) -> None:
    """Run `code`, which has to die of SIGKILL at a crash point that it arms."""
    run_child(code, fd, expect=-signal.SIGKILL)
