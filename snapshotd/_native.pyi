"""Types of the native module (csrc/native): shared memory, the copy engine, the erasure code, checksums.

Everything here deals in bytes and lengths. No call holds the GIL while bytes move, and none
allocates once a `Plan` exists. Buffers are anything with the buffer protocol.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, final

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

def prefault(buffer: _Bytes) -> None:
    """Have the kernel map the pages of a buffer that is about to be written, all at once: a fault for each costs
    several times as much. Kernels before 5.14 do nothing here. Holds no GIL."""

def crc32c(data: _Bytes, value: int = 0) -> int:
    """CRC32C (Castagnoli, RFC 3720 B.4) of `data`, continued from `value`."""

def crc32c_tiers() -> list[str]:
    """Names of the checksum implementations that this machine can run, the one in use first."""

def crc32c_with(tier: str, data: _Bytes, value: int = 0) -> int:
    """`crc32c` by the named tier (`table` is the oracle). ValueError where this machine cannot run it."""

# --- the erasure code ----------------------------------------------------------------------------
#
# Systematic and MDS over GF(2^8) with the polynomial 0x11D, for k >= 1, m >= 0, k + m <= 255. Symbols are numbered:
# 0 .. k-1 are data, k .. k+m-1 parity rows. Row 0 is plain XOR, every row of k = 1 is a replica, and a coefficient
# depends on its layout, row and column only.
#
# A layout says how bytes are read as elements of the field: `planes` (superblocks of 512 bytes in eight planes of bits;
# what lies behind a symbol's last whole one is read as bytes) or `bytes`. A code has one of its own, `ec_layout`; where
# a call takes `layout`, None means that one. docs/codec.md defines both.
#
# No output may overlap anything else that a call is given, and memory of a device is refused: ValueError, TypeError.
# Calls with `_with` at their end do the same by the named tier; ValueError where this machine cannot run it.

def ec_tiers() -> list[str]:
    """Names of the implementations that this machine can run, the one in use first; `base` is the oracle.

    The environment variable SNAPSHOTD_TIER, read when the module is imported, puts one in use (ImportError where this
    machine cannot run it); else it is the fastest."""

def ec_entry_points() -> dict[str, int]:
    """Addresses of C functions for callers without Python between two calls (benchmarks): csrc/native/entry.hpp."""

def ec_layout(k: int, m: int) -> Literal["planes", "bytes"]:
    """The layout of a code: `planes` for m <= 3, and m = 4 with k <= 21. ValueError where there is no such code."""

def ec_coefficients(k: int, m: int, layout: str | None = None) -> list[list[int]]:
    """m rows of k: what each parity row takes of each data symbol. ValueError where there is no such code."""

def ec_recovery(k: int, m: int, have: Sequence[int], want: Sequence[int], layout: str | None = None) -> list[list[int]]:
    """For each wanted symbol its k coefficients over the symbols in `have`, in that order.

    `have` are exactly k symbols; a wanted one may be among them. ValueError, with the values, for another count and
    for symbols that do not exist or are repeated."""

def ec_gather(
    dst: _Bytes,
    sources: Sequence[tuple[int | _Bytes, int, int, _Bytes, int]],
    staging: _Bytes,
    *,
    layout: str,
    timeout_s: float,
) -> tuple[int, int, int] | None:
    """`dst` = the sum of coefficient * source, received part by part and added up in a core's cache.

    A source is (connected socket, or bytes that have come already; coefficient; length; CRC32C words, little-endian;
    the bytes of a block). It has at most the length of `dst`, and zeros behind its own. `staging` takes a part of each,
    best half of an L2 cache, in planes 512 bytes a source at least; blocks are whole superblocks there.
    None where all is well. Else the first source that failed, which of its blocks differs from its checksum or -1, and
    the errno of its socket (EAGAIN: its own timeout, or all of it takes longer than `timeout_s`), where both -1 and 0
    mean that the other side ended; then `dst` is to be made again and no socket is in step any more. Holds no GIL.
    ValueError for what makes no sense.
    """

def ec_accumulate(
    dst: _Bytes | Sequence[_Bytes],
    src: _Bytes,
    coefficient: int | Sequence[int],
    *,
    first: bool = False,
    crcs: _Bytes = b"",
    block_bytes: int = 0,
    layout: str = "bytes",
    dst_crcs: _Bytes | Sequence[_Bytes] | None = None,
) -> int:
    """`dst = coefficient * src` where `first`, else `dst ^= coefficient * src`, in one pass over the bytes. Several
    `dst` of one length with as many coefficients are several parity rows. Holds no GIL, allocates nothing for bytes.

    `src` may be shorter: what it lacks is zero, so a `first` call zeroes the rest of `dst` and others leave it. In
    `planes` both begin at a superblock, and `dst` reaches to the end of the one in which `src` ends, unless that is the
    symbol's last and not whole. With `crcs` (little-endian CRC32C words of src's blocks of `block_bytes`, the last of
    which may be short) each block is checked: the answer is the index of the first bad one, and `dst` is what it was,
    or where `first` nothing of use; else -1. `dst_crcs` are the CRC32C words of dst's blocks: given as they
    are, unless `first`, and brought up to date with the sum; after a bad block they hold nothing of use.
    ValueError for a `src` longer than `dst`, another number of checksums, a coefficient beyond 255."""

def ec_accumulate_with(
    tier: str,
    dst: _Bytes | Sequence[_Bytes],
    src: _Bytes,
    coefficient: int | Sequence[int],
    *,
    first: bool = False,
    crcs: _Bytes = b"",
    block_bytes: int = 0,
    layout: str = "bytes",
    dst_crcs: _Bytes | Sequence[_Bytes] | None = None,
) -> int: ...
def ec_check(data: _Bytes, crcs: _Bytes, block_bytes: int) -> int:
    """Index of the first block of `data` that differs from its checksum (as in `ec_accumulate`), else -1."""

def ec_crcs(data: _Bytes, block_bytes: int) -> bytes:
    """CRC32C words of the blocks of `data`, little-endian; the last block may be short. Holds no GIL."""

def ec_encode(data: Sequence[_Bytes], parity: Sequence[_Bytes], threads: int = 1, layout: str | None = None) -> None:
    """Compute the parity rows of `data`; k and m are the counts. Holds no GIL.

    ValueError for lengths that differ or are 0, BufferError for parity that cannot be written."""

def ec_encode_with(
    tier: str, data: Sequence[_Bytes], parity: Sequence[_Bytes], threads: int = 1, layout: str | None = None
) -> None: ...
def ec_encode_copying(
    data: Sequence[_Bytes],
    parity: Sequence[_Bytes],
    threads: int = 1,
    layout: str | None = None,
    *,
    block_bytes: int,
    copies: Sequence[_Bytes] | None = None,
    data_crcs: Sequence[_Bytes] | None = None,
    parity_crcs: Sequence[_Bytes] | None = None,
    stores: str = "temporal",
) -> None:
    """`ec_encode` and, in the same pass over the bytes, what is given room for: a copy of each data symbol, the CRC32C
    words of the blocks of each data symbol and of each parity row. Holds no GIL.

    Blocks are whole superblocks. `stores` are those of the copies, `temporal` or `non-temporal`. ValueError and
    BufferError as in `ec_encode`, and for room of another length."""

def ec_encode_copying_with(
    tier: str,
    data: Sequence[_Bytes],
    parity: Sequence[_Bytes],
    threads: int = 1,
    layout: str | None = None,
    *,
    block_bytes: int,
    copies: Sequence[_Bytes] | None = None,
    data_crcs: Sequence[_Bytes] | None = None,
    parity_crcs: Sequence[_Bytes] | None = None,
    stores: str = "temporal",
) -> None: ...
def ec_decode(
    k: int,
    m: int,
    have: Mapping[int, _Bytes],
    want: Mapping[int, _Bytes],
    threads: int = 1,
    layout: str | None = None,
) -> None:
    """Fill the wanted symbols, data and parity alike, from those in `have`, which are only read. Holds no GIL.

    More than k may be given; the k lowest are used. ValueError for fewer, for symbols that do not exist or are both
    given and wanted, for lengths that differ or are 0; BufferError for a wanted buffer that cannot be written."""

def ec_decode_with(
    tier: str,
    k: int,
    m: int,
    have: Mapping[int, _Bytes],
    want: Mapping[int, _Bytes],
    threads: int = 1,
    layout: str | None = None,
) -> None: ...

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
    @property
    def address(self) -> int:
        """Where this process has the file mapped, for a device that copies into it by itself; the mapping must stay."""
    def crcs_offset(self, index: int) -> int:
        """Offset of the slot's table of CRC32C words in the file."""
    def set_block_crcs(self, index: int, file_bytes: int) -> bytes:
        """Compute and store the CRC32C of every block of a slot that was filled by other means. Returns these words."""
    def put_block_crcs(self, index: int, file_bytes: int, words: bytes) -> None:
        """Store the CRC32C words (little-endian, 4 bytes a block) of a slot whose blocks the caller compared with them.
        ValueError unless they are as many as a file of that length has blocks."""
    def block_crcs(self, index: int) -> list[int]: ...
    def crc_words(self, index: int, first: int = 0, count: int | None = None) -> bytes:
        """CRC32C of `count` blocks of the file from block `first` on (default: all), as little-endian 32-bit words.
        ValueError for blocks beyond the file, ArenaFormatError where its length is damaged."""
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
    def copy_now(self, plan: Plan, index: int) -> None:
        """Copy the `now` items and nothing else: no thread starts, nothing is checksummed. Errors as in `begin`."""
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
    view: _Bytes,
    items: Sequence[tuple[int, int, int, tuple[int, ...], tuple[int, ...]]],
    threads: int = 1,
    *,
    origin: int = 0,
    file_bytes: int | None = None,
) -> None:
    """The way back: copy from a slot into tensors. Items as in `Plan`, pointers are destinations. Holds no GIL.

    `view` may be a window, the bytes from `origin` on of a file of `file_bytes`: of each item the part in it is
    copied. ValueError for a window beyond the file."""

def copy(dst: _Bytes | Sequence[_Bytes], src: _Bytes | Sequence[_Bytes], threads: int = 1) -> None:
    """A plain multi-threaded memcpy (benchmarks), of one buffer or of each of many to its own. ValueError for unequal
    lengths. Holds no GIL."""

@final
class Watch:
    """Checks, without a Python loop, that what was planned is still what the trainer trains.

    `links` are `(container, key, expected)`: `container[key] is expected` for dicts and lists (without calling
    `__missing__`), or the attribute `key` for any other container. `sizes` are `(container, length)`. `tensors` are
    `(tensor, pointer, versioned)`: `tensor.data_ptr() == pointer`, and whether its `_version` is to be noted.
    """

    def __init__(
        self,
        *,
        links: Sequence[tuple[Any, Any, Any]],
        sizes: Sequence[tuple[Any, int]],
        tensors: Sequence[tuple[Any, int, bool]],
    ) -> None: ...
    def structure_changed(self) -> bool:
        """True when a container's length or a link is not as planned."""
    def pointers_changed(self) -> bool:
        """True when a tensor lies elsewhere than planned. Where none does, the `_version` of every tensor that is
        `versioned` is noted in the same pass (-1 where it has none)."""
    def versions_moved(self) -> int:
        """Index in `tensors` of the first whose `_version` differs from the one noted; -1 where none does."""
