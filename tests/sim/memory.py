"""Simulated shared memory: arenas as the native ones behave, in plain Python, with true bytes and checksums.

`Arena` is what a process has mapped, with the interface of `snapshotd._native.Arena` (a test compares the two call by
call). Two things are the simulation's own: a process that died writes nothing any more, and whoever watches is told of
every slot that changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from snapshotd import _native
from tests.sim.loop import Life

NAMES = {
    _native.EMPTY: "EMPTY", _native.FILLING: "FILLING", _native.FULL: "FULL", _native.PROTECTED: "PROTECTED",
    _native.COMMITTED: "COMMITTED",
}  # fmt: skip
WHOLE = frozenset({_native.FULL, _native.PROTECTED, _native.COMMITTED})
_CRC_BYTES = 4
_SAID = frozenset({"committed_step", "aborted_step", "naming"})


class SlotInfo(NamedTuple):  # its `index` takes the place of the tuple's method
    """What stands in a slot, as `_native.SlotInfo` says it. `sound` until a bit of its description turns over."""

    index: int  # type: ignore[assignment]
    state: int = _native.EMPTY
    generation: int = 0
    nonce: bytes = bytes(16)
    step: int = 0
    rank: int = 0
    world_size: int = 0
    fingerprint: bytes = bytes(32)
    file_bytes: int = 0
    sound: bool = False

    @property
    def made(self) -> tuple[int, bytes, int]:
        """The name of the snapshot: its generation's number and nonce, and the step."""
        return self.generation, self.nonce, self.step


class Owner(NamedTuple):
    """The owner record."""

    generation: int
    nonce: bytes
    rank: int
    world_size: int
    local_world: int
    every: int
    pid: int
    fenced: bool = False
    closed: bool = False
    released_at_s: int = 0
    restored_generation: int = 0
    restored_nonce: bytes = bytes(16)
    restored_step: int = 0


@dataclass
class Memory:
    """One arena file, whoever maps it. `rotten` are slots of which the world turned over bits."""

    arena_id: bytes
    job: str
    local_index: int
    slot_bytes: int
    block_bytes: int
    told: Callable[[Memory, int, SlotInfo, SlotInfo], None]
    said: Callable[[Memory, str, int], None] = lambda *_: None
    slots: list[SlotInfo] = field(default_factory=lambda: [SlotInfo(0), SlotInfo(1)])
    owner: Owner | None = None
    rotten: set[int] = field(default_factory=set)
    holder: int = 0  # the pid that has the record lock
    watchers: list[Callable[[], None]] = field(default_factory=list)
    gone: bool = False
    passed: int = 0
    next_step: int = 0
    naming: int = 0
    committed_step: int = 0
    ever_committed: bool = False
    aborted_step: int = 0

    def __post_init__(self) -> None:
        self.data = [bytearray(self.slot_bytes) for _ in self.slots]
        self.crcs = [b"" for _ in self.slots]

    def change(self, index: int, **fields: Any) -> None:
        """A slot's description becomes another one."""
        before = self.slots[index]
        self.slots[index] = after = before._replace(**fields)
        self.told(self, index, before, after)

    def empty(self, index: int) -> None:
        before = self.slots[index]
        self.slots[index] = after = SlotInfo(index)
        self.told(self, index, before, after)
        self.rotten.discard(index)

    def take(self) -> int:
        """EMPTY -> FILLING without a name, as the first half of a claim; -1 where no slot is free."""
        for index, slot in enumerate(self.slots):
            if slot.state == _native.EMPTY:
                self.change(index, state=_native.FILLING)
                return index
        return -1

    def file(self, index: int) -> bytes:
        """The bytes of the file in a slot."""
        return bytes(self.data[index][: self.slots[index].file_bytes])

    def flip(self, index: int, bit: int) -> None:
        """A bit of the file in a slot turns over."""
        self.rotten.add(index)
        self.data[index][bit // 8 % max(1, self.slots[index].file_bytes)] ^= 1 << bit % 8

    def flip_description(self, index: int) -> None:
        """A bit of a slot's identity or table turns over: its seal does not match any more."""
        self.rotten.add(index)
        self.change(index, sound=False)

    def broken_blocks(self, index: int) -> list[int]:
        """Blocks that differ from their checksum."""
        found, data, words, block, at = [], self.file(index), self.crcs[index], self.block_bytes, 0
        while at < len(data):
            bad = _native.ec_check(data[at:], words[at // block * _CRC_BYTES :], block)
            if bad < 0:
                break
            found.append(at // block + bad)
            at += (bad + 1) * block
        return found


class Arena:
    """A process's mapping of an arena."""

    def __init__(self, memory: Memory, life: Life, between: Callable[[Memory], None] | None = None) -> None:
        self.memory, self._life, self._between = memory, life, between
        self.arena_id, self.job, self.local_index = memory.arena_id, memory.job, memory.local_index
        self.slot_bytes, self.block_bytes = memory.slot_bytes, memory.block_bytes
        self.slots = len(memory.slots)
        self.total_bytes = _native.Arena.bytes_needed(self.slots, memory.slot_bytes, memory.block_bytes)

    def owner(self) -> Owner | None:
        return self.memory.owner

    def set_owner(self, **fields: Any) -> None:
        if not self._life.dead:
            self.memory.owner = Owner(**fields)

    @property
    def passed(self) -> int:
        """Read first; what the trainer does right after that comes before the look at the slots."""
        passed = self.memory.passed
        if self._between is not None:
            self._between(self.memory)
        return passed

    @passed.setter
    def passed(self, step: int) -> None:
        self._put("passed", step)

    def _put(self, word: str, value: int) -> None:
        if not self._life.dead:
            setattr(self.memory, word, value)
            if word in _SAID:
                self.memory.said(self.memory, word, value)

    next_step = property(lambda self: self.memory.next_step, lambda self, value: self._put("next_step", value))
    naming = property(lambda self: self.memory.naming, lambda self, value: self._put("naming", value))
    committed_step = property(
        lambda self: self.memory.committed_step, lambda self, value: self._put("committed_step", value)
    )
    ever_committed = property(
        lambda self: self.memory.ever_committed, lambda self, value: self._put("ever_committed", value)
    )
    aborted_step = property(lambda self: self.memory.aborted_step, lambda self, value: self._put("aborted_step", value))

    def wake(self) -> None:
        pass

    def slot(self, index: int) -> SlotInfo:
        return self.memory.slots[index]

    def claim(self, *, generation: int, nonce: bytes, step: int, rank: int, world_size: int, fingerprint: bytes) -> int:
        if step == 0:
            raise ValueError("step must be at least 1: 0 means that a slot has no name")
        index = -1 if self._life.dead else self.memory.take()
        if index >= 0:
            self.memory.change(
                index, generation=generation, nonce=nonce, step=step, rank=rank, world_size=world_size,
                fingerprint=fingerprint,
            )  # fmt: skip
        return index

    def publish(self, index: int, file_bytes: int) -> None:
        slot = self.memory.slots[index]
        if self._life.dead:
            return
        if slot.state != _native.FILLING or not slot.step:
            raise ValueError(f"slot {index} is not being filled by anyone: claim it first")
        self.memory.change(index, state=_native.FULL, file_bytes=file_bytes, sound=True)

    def advance(self, index: int, state: int, to: int) -> bool:
        if self._life.dead or self.memory.slots[index].state != state:
            return False
        if state not in WHOLE or to not in WHOLE:
            raise ValueError("advance() moves between FULL, PROTECTED and COMMITTED only")
        self.memory.change(index, state=to)
        return True

    def empty(self, index: int) -> None:
        if not self._life.dead:
            self.memory.empty(index)

    def slot_view(self, index: int) -> memoryview:
        return memoryview(self.memory.data[index])

    def slot_offset(self, index: int) -> int:
        return 4096 * (index + 1)

    def set_block_crcs(self, index: int, file_bytes: int) -> bytes:
        words = _native.ec_crcs(memoryview(self.memory.data[index])[:file_bytes], self.block_bytes)
        if not self._life.dead:
            self.memory.crcs[index] = words
        return words

    def put_block_crcs(self, index: int, file_bytes: int, words: bytes) -> None:
        if len(words) != -(-file_bytes // self.block_bytes) * _CRC_BYTES:
            raise ValueError(f"a file of {file_bytes} bytes has another number of checksums")
        if not self._life.dead:
            self.memory.crcs[index] = words

    def crc_words(self, index: int, first: int = 0, count: int | None = None) -> bytes:
        blocks = -(-self.memory.slots[index].file_bytes // self.block_bytes)
        count = blocks - first if count is None else count
        if first + count > blocks:
            raise ValueError("the file ends before these blocks")
        return self.memory.crcs[index][first * _CRC_BYTES : (first + count) * _CRC_BYTES]

    def verify(self, index: int, threads: int = 1) -> list[int]:
        return self.memory.broken_blocks(index)

    def close(self) -> None:
        pass
