"""Types of the native module (csrc/native): shared memory, the copy engine and checksums.

Everything here deals in bytes and lengths. No call holds the GIL while bytes move, and none
allocates once a `Plan` exists. Buffers are anything with the buffer protocol.
"""

from collections.abc import Sequence
from typing import Any, Protocol, final

from typing_extensions import Buffer

class _Array(Protocol):
    """A numpy array or tensor: its stubs call it a buffer only from Python 3.12 on."""

    @property
    def __array_interface__(self) -> Any: ...

_Bytes = Buffer | _Array

ARENA_VERSION: int
BLOCK_BYTES: int
"""Default size of a checksum block: 1 MiB."""

EMPTY: int
FILLING: int
FULL: int
PROTECTED: int
COMMITTED: int
"""Slot states as they stand in shared memory: 32-bit tags with a large Hamming distance, so that
a flipped bit makes an unknown state and never another valid one."""

class ArenaFormatError(ValueError):
    """The file is not an arena of this version: foreign, older, truncated or damaged. `str()` names which."""

# --- checksums -----------------------------------------------------------------------------------

def crc32c(data: _Bytes, value: int = 0) -> int:
    """CRC32C (Castagnoli, RFC 3720 B.4) of `data`, continued from `value`."""

def crc32c_tiers() -> list[str]:
    """Names of the checksum implementations that this machine can run, the one in use first."""

def crc32c_with(tier: str, data: _Bytes, value: int = 0) -> int:
    """`crc32c` by the named tier (`table` is the oracle). ValueError where this machine cannot run it."""

# --- crash points (tests and drills) -------------------------------------------------------------

def arm_crash(point: str, countdown: int = 1) -> None:
    """SIGKILL this process the `countdown`-th time it passes `point`. An empty point disarms.

    Native points: `claim.taken`, `claim.named`, `copy.block`, `copy.done`, `publish.before`,
    `publish.after`. ValueError for other names."""

def crash_points() -> list[str]: ...

# --- memory --------------------------------------------------------------------------------------

def reserve(fd: int, total_bytes: int, numa_node: int = -1) -> None:
    """Give the file `total_bytes` of real pages, on `numa_node` where >= 0, huge ones where the kernel makes them.

    OSError(ENOSPC) when the file system or the machine has less free, known before a page is made where it can be;
    the file is empty then. Control groups are not asked: the caller checks their limits first."""

def process_rss_anon_bytes() -> int:
    """Anonymous resident memory of this process in bytes (RssAnon)."""

# --- the arena -----------------------------------------------------------------------------------

@final
class SlotInfo:
    """One consistent look at a slot. Identity fields are 0 while nobody has named the slot, and while it is emptied."""

    index: int
    state: int  # one of the tags above; any other value means that the word is damaged
    generation: int
    nonce: bytes  # 16 bytes
    step: int
    rank: int
    world_size: int
    fingerprint: bytes  # 32 bytes: the layout's
    file_bytes: int  # length of the safetensors file in the slot
    sound: bool  # the slot's identity and CRC table match their own checksum (FULL and later)

@final
class Owner:
    """The generation that an arena belongs to now."""

    generation: int
    nonce: bytes
    rank: int
    world_size: int
    local_world: int
    every: int
    pid: int
    fenced: bool
    closed: bool
    released_at_s: int  # wall clock when its last trainer let go; 0 while one holds it
    restored_generation: int  # identity of the snapshot that this generation restored; all 0 where none
    restored_nonce: bytes
    restored_step: int

@final
class Arena:
    """A mapped arena file. Raises ArenaFormatError when the file is not one, OSError when it cannot be mapped.

    Later: ValueError from a closed arena, from a change through a read-only one, and in a forked child that the mapping
    was kept out of; IndexError for a slot that does not exist."""

    @staticmethod
    def bytes_needed(slots: int, slot_bytes: int, block_bytes: int) -> int:
        """Length of the file, header included. ValueError for sizes outside of the documented ranges."""

    @staticmethod
    def format(
        fd: int, *, arena_id: bytes, job: str, local_index: int, slots: int, slot_bytes: int, block_bytes: int
    ) -> None:
        """Write a fresh header into a reserved file. `arena_id` has 16 bytes, `job` 1 to 200 bytes of UTF-8."""

    def __init__(self, fd: int, *, writable: bool, populate: bool = False, exclude_from_fork: bool = False) -> None:
        """Map the file behind `fd` (which stays the caller's) and validate its header.

        `populate` touches every page for writing now (MADV_POPULATE_WRITE), so that the first copy takes no faults;
        `exclude_from_fork` keeps the mapping out of children (MADV_DONTFORK)."""

    @property
    def arena_id(self) -> bytes: ...
    @property
    def job(self) -> str: ...
    @property
    def local_index(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...

    # the owner record: written by the daemon, read by anyone, guarded by a checksum
    def owner(self) -> Owner | None:
        """None where the record was never written. ArenaFormatError where it is damaged."""

    def set_owner(
        self,
        *,
        generation: int,
        nonce: bytes,
        rank: int,
        world_size: int,
        local_world: int,
        every: int,
        pid: int,
        fenced: bool = False,
        closed: bool = False,
        released_at_s: int = 0,
        restored_generation: int = 0,
        restored_nonce: bytes = ...,
        restored_step: int = 0,
    ) -> None: ...

    # words that change while training runs (atomics; release on write, acquire on read)
    passed: int
    """Trainer writes: the newest step whose `guard.step()` is over. Only grows within a generation."""
    next_step: int
    """Daemon writes: take the snapshot at the first eligible step at or after this one; 0: none is asked for."""
    naming: int
    """Daemon writes: count of namings; a trainer serves each naming once. Write `next_step` first, then `naming`."""
    committed_step: int
    """Daemon writes: newest committed step of the owner's generation; 0 where none."""
    ever_committed: bool
    """Daemon writes: some snapshot in this arena was committed once, whatever became of it."""
    aborted_step: int
    """Daemon writes: newest step that was aborted."""

    def wake(self) -> None:
        """Wake whoever waits in `wait_change` (a shared futex)."""
    def changes(self) -> int: ...
    def wait_change(self, seen: int, timeout_s: float) -> int:
        """Return the change count once it differs from `seen`, at the latest after `timeout_s`. Holds no GIL."""

    # slots
    def slot(self, index: int) -> SlotInfo: ...
    def claim(self, *, generation: int, nonce: bytes, step: int, rank: int, world_size: int, fingerprint: bytes) -> int:
        """Trainer: EMPTY -> FILLING for the first free slot and write its identity; -1 where none is free."""
    def publish(self, index: int, file_bytes: int) -> None:
        """Trainer: seal identity and CRC table with a checksum, then FILLING -> FULL with release order.
        ValueError if the slot is not FILLING."""
    def advance(self, index: int, state: int, to: int) -> bool:
        """Daemon: compare-and-swap between FULL, PROTECTED and COMMITTED. False if the slot was not in `state`."""
    def empty(self, index: int) -> None:
        """Whoever owns the slot now: forget its identity, then -> EMPTY, whatever it was."""
    def slot_view(self, index: int) -> memoryview:
        """The slot's bytes, writable as the mapping is. The view keeps the mapping alive."""
    def slot_offset(self, index: int) -> int:
        """Offset of the slot's first byte in the file (a multiple of 4096)."""
    def set_block_crcs(self, index: int, file_bytes: int) -> None:
        """Compute and store the CRC32C of every block of a slot that was filled by other means."""
    def block_crcs(self, index: int) -> list[int]: ...
    def verify(self, index: int, threads: int = 1) -> list[int]:
        """Indices of the blocks whose bytes differ from their CRC32C, of the `file_bytes` published. Holds no GIL.
        ArenaFormatError where that length itself is damaged (the slot is not `sound` then)."""
    def close(self) -> None:
        """Unmap. BufferError while views or open engines are left; the arena stays usable then. Idempotent."""

# --- the copy engine -----------------------------------------------------------------------------

@final
class Plan:
    """Where each tensor's bytes go in a slot.

    An item is `(pointer, slot_offset, element_bytes, shape, strides)` with the strides in bytes; its row-major bytes
    land at `slot_offset`. `now` items are copied by `Engine.begin` before it returns, `later` items by the engine's
    threads. Items must lie inside `file_bytes`, not overlap one another there, have at most 16 dimensions and be
    sorted by nothing in particular; ValueError names the first that does not fit.
    """

    def __init__(
        self,
        *,
        file_bytes: int,
        now: Sequence[tuple[int, int, int, tuple[int, ...], tuple[int, ...]]],
        later: Sequence[tuple[int, int, int, tuple[int, ...], tuple[int, ...]]],
    ) -> None: ...
    @property
    def file_bytes(self) -> int: ...
    def repoint(self, now: Sequence[int], later: Sequence[int]) -> None:
        """New source pointers for the same items, in the same order. ValueError for another count or a pointer that
        does not fit (nothing changes then); RuntimeError while a copy by this plan is running."""

@final
class Engine:
    """Threads that copy tensors into a slot, block by block, and checksum each block in the same pass.

    Bytes of a block that no item covers (the file's header, host state, alignment) are already in the slot when
    `begin` is called and are only checksummed. The engine is idle, running or done; one copy at a time.
    """

    def __init__(self, arena: Arena, threads: int) -> None: ...
    def calibrate(self) -> str:
        """Measure temporal against non-temporal stores, in the arena's own slots if both are EMPTY; name the winner."""
    def begin(self, plan: Plan, index: int, notify_fd: int = -1) -> None:
        """Copy the `now` items, start the threads on the rest, return. When the copy is over the engine writes 8
        bytes (an eventfd's increment) to `notify_fd` where >= 0; after `wait` it is not touched any more.
        RuntimeError while a copy is running or once closed; ValueError for a slot that is not FILLING, a plan larger
        than it, or a tensor that lies in the arena."""
    def running(self) -> bool: ...
    def wait(self, timeout_s: float) -> bool:
        """True once the copy is over (or none is running); False after `timeout_s`. Holds no GIL."""
    def cancel(self) -> None:
        """Stop the copy at the next 4 KiB; returns when no thread touches tensors or slot any more."""
    def seconds(self) -> float:
        """Duration of the last copy."""
    def close(self) -> None:
        """Cancel, then end the threads. Idempotent."""

def scatter(
    view: _Bytes, items: Sequence[tuple[int, int, int, tuple[int, ...], tuple[int, ...]]], threads: int = 1
) -> None:
    """The way back: copy from a slot into tensors. Items as in `Plan`, pointers are destinations. Holds no GIL."""

def copy(dst: _Bytes | Sequence[_Bytes], src: _Bytes | Sequence[_Bytes], threads: int = 1) -> None:
    """A plain multi-threaded memcpy (benchmarks), of one buffer or of each of many to its own. ValueError for unequal
    lengths. Holds no GIL."""

@final
class Watch:
    """Checks, without a Python loop, that what was planned is still what the trainer trains.

    `links` are `(container, key, expected)`: `container[key] is expected` for dicts and lists (without calling
    `__missing__`), or the attribute `key` for any other container. `sizes` are `(container, length)`. `tensors` are
    `(tensor, pointer)`: `tensor.data_ptr() == pointer`.
    """

    def __init__(
        self,
        *,
        links: Sequence[tuple[Any, Any, Any]],
        sizes: Sequence[tuple[Any, int]],
        tensors: Sequence[tuple[Any, int]],
    ) -> None: ...
    def structure_changed(self) -> bool:
        """True when a container's length or a link is not as planned."""
    def pointers_changed(self) -> bool:
        """True when a tensor lies elsewhere than planned."""
    def note_versions(self) -> None:
        """Remember every tensor's `_version` (-1 where it has none)."""
    def versions_moved(self) -> int:
        """Index of the first tensor whose `_version` differs from the one noted; -1 where none does."""
