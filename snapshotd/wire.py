"""Messages: what trainers, daemons and tools say to one another, and the frame that carries each.

A frame is `magic(4) version(2) reserved(2) length(4) crc32(4)` in little endian, then `length` bytes of msgpack, one
tagged message. Whoever reads trusts nothing: wrong magic, another version, a length above `FRAME_BYTES_MAX`, a wrong
checksum, an unknown tag or a field out of range each raise `ProtocolError` with a short `reason` to count it under.
After a bad frame the stream cannot be trusted to be in step, so its reader closes the connection.

What is packed here is checked by the same rules, so a message that leaves can be read on the other side; sentences
that may become long (paths, reasons told by others) go through `clip` first.

Version rule: a field may be added with a default; anything else raises `WIRE_VERSION`.
"""

from __future__ import annotations

import struct
import zlib
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from snapshotd.errors import ProtocolError

MAGIC = b"SNPD"
WIRE_VERSION = 4
FRAME_BYTES_MAX = 4 << 20
TEXT_LENGTH_MAX = 4000
READ_BYTES_MAX = 1 << 30
SPANS_MAX = 4096
GROUP_NODES_MAX = 255
PLACES_MAX = 8192
_HEADER = struct.Struct("<4sHHII")
HEADER_BYTES = _HEADER.size

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]
Text: TypeAlias = Annotated[str, Meta(max_length=TEXT_LENGTH_MAX)]
Id16: TypeAlias = Annotated[bytes, Meta(min_length=16, max_length=16)]
Digest32: TypeAlias = Annotated[bytes, Meta(min_length=32, max_length=32)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Rank: TypeAlias = Annotated[int, Meta(ge=0, lt=2**20)]
WorldSize: TypeAlias = Annotated[int, Meta(ge=1, lt=2**20)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=10**9)]
Slot: TypeAlias = Annotated[int, Meta(ge=0, lt=64)]
Progress: TypeAlias = Annotated[str, Meta(max_length=16)]
Address: TypeAlias = Annotated[str, Meta(max_length=300)]  # HOST:PORT; empty where a daemon listens nowhere
Blocks: TypeAlias = Annotated[int, Meta(ge=4096, le=16 << 20)]
Parity: TypeAlias = Annotated[int, Meta(ge=0, lt=255)]


class GenerationId(Struct, frozen=True, order=True, array_like=True):
    """One fixed membership of a job. The nonce, drawn by rank 0, tells apart two that picked the same number."""

    number: Count
    nonce: Id16

    def __str__(self) -> str:
        return f"{self.number}-{self.nonce[:3].hex()}"


class SnapshotId(Struct, frozen=True, order=True, array_like=True):
    """All shards of one step, named by the generation that made them, also after another inherited them."""

    generation: GenerationId
    step: Count

    def __str__(self) -> str:
        return f"step {self.step} (generation {self.generation})"


# --- what a node holds ----------------------------------------------------------------------------


class Shard(Struct, frozen=True):
    """One rank's bytes of one snapshot, as a node reports them. `progress` is the name of a slot state."""

    snapshot: SnapshotId
    arena: Id16
    slot: Slot
    progress: Progress
    rank: Rank
    world_size: WorldSize
    fingerprint: Digest32
    file_bytes: Count
    block_bytes: Blocks = 1 << 20
    foster: bool = False  # decoded by a survivor that keeps it until the job goes on; its rank's own arena is gone


class ShardShape(Struct, frozen=True, array_like=True):
    """What parity must know of a shard: whose it is, how long, in which blocks it is checked, and its layout."""

    rank: Rank
    file_bytes: Count
    block_bytes: Blocks
    fingerprint: Digest32


class GroupLayout(Struct, frozen=True):
    """How the shards of one snapshot lie in the stripes of one group; `geometry` computes and checks it.

    `positions[p]` are the shards of the node at position p, in the order in which they are strung together, each padded
    with zeros to whole units; that string is cut in k = n - parity pieces of `piece_bytes`.
    """

    parity: Parity
    unit_bytes: Blocks
    piece_bytes: Count
    positions: Annotated[list[list[ShardShape]], Meta(max_length=GROUP_NODES_MAX)]


class ParityReport(Struct, frozen=True):
    """One parity set of a node: the parity of one snapshot that `position` of a group owns."""

    snapshot: SnapshotId
    arena: Id16
    slot: Slot
    progress: Progress
    position: Annotated[int, Meta(ge=0, lt=GROUP_NODES_MAX)]
    layout: GroupLayout
    foster: bool = False  # made by survivors among themselves while the job waits


class ArenaReport(Struct, frozen=True):
    """One arena of a job: whose it is, and what became of it."""

    arena: Id16
    rank: Rank
    generation: GenerationId
    slot_bytes: Count
    block_bytes: Count
    last_commit: Count
    ever_committed: bool
    restored: SnapshotId | None = None
    room: Annotated[int, Meta(ge=0, le=64)] = 0  # slots into which a shard could be rebuilt: empty or damaged ones
    closed: bool = False  # its rank ended its run and wants nothing back


class Badge(Struct, frozen=True, array_like=True):
    """How others recognise a node's daemon: the public key of its messages, the X.509 certificate of its streams."""

    curve: Digest32
    certificate: Annotated[bytes, Meta(min_length=1, max_length=2048)]


class Inventory(Struct, frozen=True):
    """What one node holds of one job. `damaged` has a sentence for each thing that was there and cannot be used."""

    node: Id16
    label: Text
    shards: list[Shard]
    arenas: list[ArenaReport]
    damaged: list[Text] = []
    parities: list[ParityReport] = []
    hopeless: list[SnapshotId] = []  # a rebuild showed that they cannot be decoded
    address: Address = ""
    streams: Address = ""
    domain: Text = ""
    badge: Badge | None = None  # None: this daemon does not authenticate


class Place(Struct, frozen=True):
    """One node of a generation: how its daemon is reached, and the ranks that it serves by local index."""

    node: Id16
    label: Text
    address: Address
    streams: Address
    ranks: list[Rank]
    badge: Badge | None = None


# --- trainer or tool to daemon --------------------------------------------------------------------


class Hello(Struct, frozen=True, tag=True):
    """First message of a connection."""

    role: Annotated[str, Meta(max_length=16)]  # "trainer" or "tool"
    pid: Count


class TakeInventory(Struct, frozen=True, tag=True):
    """What is left of this job? Fences the generations that the daemon knows of it."""

    job: Name


class Introduce(Struct, frozen=True, tag=True):
    """These nodes take part in this job: believe them. From a trainer before anything is read.

    `elsewhere` hold some of it and take part no more: believe them too, and tell them the same.
    """

    job: Name
    places: Annotated[list[Place], Meta(max_length=PLACES_MAX)]
    elsewhere: Annotated[list[Place], Meta(max_length=PLACES_MAX)] = []


class AskKey(Struct, frozen=True, tag=True):
    """With which key does a trainer of this node read from other nodes?"""


class Attach(Struct, frozen=True, tag=True):
    """Give this rank an arena in this generation: a new one, or an inherited one by id.

    `replaces` names the arena that this rank holds already and that became too small for its layout. `nodes` are all
    nodes of a generation on several (the one of rank 0 coordinates), `groups` who protects whom, in position order.
    `rebuild`: the restored snapshot's shard is not in this arena yet; a `Rebuild` follows.
    """

    job: Name
    generation: GenerationId
    rank: Rank
    world_size: WorldSize
    local_index: Rank
    local_ranks: list[Rank]
    every: Annotated[int, Meta(ge=1, lt=2**40)]
    slot_bytes: Count
    block_bytes: Count
    fingerprint: Digest32
    parity: Parity = 2
    group_size: Annotated[int, Meta(ge=1, lt=256)] = 8
    numa_node: Annotated[int, Meta(ge=-1, lt=4096)] = -1
    passed: Count = 0
    arena: Id16 | None = None
    replaces: Id16 | None = None
    restored: SnapshotId | None = None
    nodes: list[Place] = []
    groups: list[list[Id16]] = []
    rebuild: bool = False
    committed: bool = False  # the restored snapshot was, wherever a mark of that was seen


class Held(Struct, frozen=True, tag=True):
    """The trainer has the record lock of this arena."""

    arena: Id16


class OpenShard(Struct, frozen=True, tag=True):
    """Let me read this shard; it stays pinned until `CloseShard` or the end of the connection."""

    arena: Id16
    slot: Slot
    snapshot: SnapshotId


class CloseShard(Struct, frozen=True, tag=True):
    """The end of `OpenShard`."""

    arena: Id16
    slot: Slot


class Quarantine(Struct, frozen=True, tag=True):
    """A reader found bytes that fail their checksum: never offer this shard again."""

    arena: Id16
    slot: Slot
    snapshot: SnapshotId
    why: Text


class Holding(Struct, frozen=True):
    """Where a rank's shard, or a position's parity set, of a snapshot can be read."""

    streams: Address
    label: Text
    arena: Id16
    slot: Slot


class Rebuild(Struct, frozen=True, tag=True):
    """Decode a lost shard from what the others hold into this arena, which came with `Attach.rebuild`.

    `shards` (by rank) and `parities` (by position) say where the rest of the group's snapshot lies. The answer comes at
    once; `AskRebuild` tells how far it is.
    """

    arena: Id16
    snapshot: SnapshotId
    rank: Rank
    layout: GroupLayout
    shards: dict[int, Holding]
    parities: dict[int, Holding]


class AskRebuild(Struct, frozen=True, tag=True):
    """How far is the rebuild of this arena?"""

    arena: Id16


class Close(Struct, frozen=True, tag=True):
    """This rank's run is over and wants nothing back: once every rank of the node said so, its memory is freed."""

    arena: Id16


class AskStatus(Struct, frozen=True, tag=True):
    """What a person wants to know, of this daemon or of the peer that listens `at`. Never fences, changes nothing."""

    at: Address = ""


class Collect(Struct, frozen=True, tag=True):
    """Dismiss what is kept for jobs that no trainer holds: of one job, of one generation, or all of it."""

    job: Name | None = None
    generation: Count | None = None


class Stop(Struct, frozen=True, tag=True):
    """End the daemon; arenas stay in memory for the next one."""


# --- daemon to daemon, over the network: states and decisions are repeated until they are seen to have arrived --------


class HeldShard(Struct, frozen=True):
    """One named slot of a rank's arena. `rank` holds it now, `shape.rank` says whose bytes it has."""

    rank: Rank
    snapshot: SnapshotId
    progress: Progress
    arena: Id16
    slot: Slot
    shape: ShardShape


class Publish(Struct, frozen=True, tag=True):
    """A node's state, to the coordinator and to its group. One with a lower `serial` is older and is passed over."""

    job: Name
    generation: GenerationId
    node: Id16
    serial: Count
    complete: bool
    closed: bool
    passed: dict[int, Count]
    held: list[HeldShard]
    naming: Count
    committed: Count
    aborted: Count
    trouble: Text = ""


class Decree(Struct, frozen=True, tag=True):
    """The coordinator's decisions and what it asks for. `aborted` are steps above `committed`."""

    job: Name
    generation: GenerationId
    node: Id16
    serial: Count
    committed: Count
    aborted: Annotated[list[Count], Meta(max_length=4096)]
    next_step: Count
    naming: Count
    closed: bool
    commits: Count = 0
    aborts: Count = 0


class Doubt(Struct, frozen=True, tag=True):
    """A reader found bytes of yours that fail their checksum: look at that slot."""

    job: Name
    generation: GenerationId
    arena: Id16
    slot: Slot
    snapshot: SnapshotId
    why: Text


class AskInventory(Struct, frozen=True, tag=True):
    """What do you hold of this job? Fences nothing."""

    job: Name


# --- READ: the verb that moves bytes, on TCP streams ------------------------------------------------------------------


class Read(Struct, frozen=True, tag=True):
    """Send bytes of a slot. `offset` is a multiple of the arena's block; the answer ends with the file at the latest.

    Requests may be sent ahead; they are answered in their order.
    """

    job: Name
    arena: Id16
    slot: Slot
    snapshot: SnapshotId
    offset: Count
    length: Annotated[int, Meta(ge=0, le=READ_BYTES_MAX)]


class Reading(Struct, frozen=True, tag=True):
    """Answer to `Read` and `Combine`; `length` raw bytes follow. `crcs` has the CRC32C of each block of them, as
    little-endian words (for a `Read` of no bytes at offset 0: of every block of the file)."""

    length: Annotated[int, Meta(ge=0, le=READ_BYTES_MAX)]
    file_bytes: Count
    block_bytes: Blocks
    crcs: bytes


class SumSpan(Struct, frozen=True, array_like=True):
    """`length` bytes of a term, from `offset` of the slot at this index of `Combine.holdings`; zeros where that is
    None."""

    holding: Annotated[int, Meta(ge=0, lt=SPANS_MAX)] | None
    offset: Count
    length: Annotated[int, Meta(ge=1, le=READ_BYTES_MAX)]


class SumTerm(Struct, frozen=True, array_like=True):
    """One symbol of a stripe: its coefficient, and where its bytes are, in order."""

    coefficient: Annotated[int, Meta(ge=1, le=255)]
    spans: Annotated[list[SumSpan], Meta(min_length=1, max_length=SPANS_MAX)]


class Combine(Struct, frozen=True, tag=True):
    """Add up bytes of this snapshot over GF(2^8), yours and those of your peers, and send me the sum.

    Answered with a `Reading` and its bytes for each window, as for READs of a file that holds the sum, whose blocks
    have `unit_bytes`. Terms are whole units long, `length` need not be. `code` is the layout of the code.
    """

    job: Name
    snapshot: SnapshotId
    code: Annotated[str, Meta(max_length=16)]
    unit_bytes: Blocks
    window_bytes: Blocks
    length: Annotated[int, Meta(ge=1, le=READ_BYTES_MAX)]
    holdings: Annotated[list[Holding], Meta(max_length=SPANS_MAX)]
    terms: Annotated[list[SumTerm], Meta(min_length=1, max_length=GROUP_NODES_MAX)]


# --- daemon's answers -----------------------------------------------------------------------------


class Welcome(Struct, frozen=True, tag=True):
    """Answer to `Hello`."""

    node: Id16
    label: Text
    pid: Count
    claim_wait_s: Seconds


class InventoryTaken(Struct, frozen=True, tag=True):
    """Answer to `TakeInventory` and `AskInventory`. `peers` is what nodes that this one knew hold of the job."""

    inventory: Inventory
    peers: list[Inventory] = []


class RebuildReport(Struct, frozen=True, tag=True):
    """Answer to `AskRebuild`. `failure` is "" while all is well, "corrupt" where too few sources hold good bytes,
    "failed" where a source could not be read; `rebuilt_bytes` is the length of the shard once it is `over`."""

    over: bool
    slot: Slot
    done_bytes: Count
    total_bytes: Count
    seconds: Seconds = 0.0
    failure: Annotated[str, Meta(max_length=16)] = ""
    why: Text = ""


class Granted(Struct, frozen=True, tag=True):
    """Answer to `Attach`; three descriptors come with it: the arena, its lock file, an eventfd to ring."""

    arena: Id16
    slot_bytes: Count


class ShardOpened(Struct, frozen=True, tag=True):
    """Answer to `OpenShard`; one read-only descriptor of the arena comes with it."""

    slot_offset: Count
    slot_bytes: Count


class LentKey(Struct, frozen=True, tag=True):
    """Answer to `AskKey`: certificate and private key of the node's streams, PEM; empty where all is in the clear."""

    pem: Annotated[bytes, Meta(max_length=8192)]


class StatusReport(Struct, frozen=True, tag=True):
    """Answer to `AskStatus`: a JSON document, described in docs/status.md."""

    document: bytes


class Collected(Struct, frozen=True, tag=True):
    """Answer to `Collect`."""

    arenas: Count
    freed_bytes: Count
    kept: list[Text]


class Done(Struct, frozen=True, tag=True):
    """Answer to what has nothing else to say."""


class Refusal(Struct, frozen=True, tag=True):
    """The daemon understood and says no; `kind` is one of `errors.REFUSALS`."""

    kind: Annotated[str, Meta(max_length=32)]
    sentence: Text
    facts: dict[str, int | str] = {}


Request: TypeAlias = (
    Hello
    | TakeInventory
    | Introduce
    | AskKey
    | Attach
    | Held
    | OpenShard
    | CloseShard
    | Quarantine
    | Rebuild
    | AskRebuild
    | Close
    | AskStatus
    | Collect
    | Stop
    | Publish
    | Decree
    | Doubt
    | AskInventory
    | Read
    | Combine
)
Reply: TypeAlias = (
    Welcome
    | InventoryTaken
    | LentKey
    | Granted
    | ShardOpened
    | RebuildReport
    | StatusReport
    | Collected
    | Done
    | Refusal
    | Reading
)
Message: TypeAlias = Request | Reply

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_any_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def clip(sentence: str) -> str:
    """The sentence as a `Text` that can be sent: no longer than allowed, without what UTF-8 cannot say (file names)."""
    clean = sentence.encode(errors="backslashreplace").decode()
    return clean if len(clean) <= TEXT_LENGTH_MAX else clean[: TEXT_LENGTH_MAX - 1] + "…"


def pack(message: Message) -> bytes:
    """The frame of a message. ProtocolError if the other side would refuse it: a field out of range, or too long."""
    try:
        body = _encoder.encode(message)
        if len(body) <= FRAME_BYTES_MAX:
            _any_decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, OverflowError, TypeError) as error:
        raise ProtocolError("content", f"a {type(message).__name__} message cannot be sent: {error}") from None
    if len(body) > FRAME_BYTES_MAX:
        raise ProtocolError("oversized", f"a message of {len(body)} bytes exceeds the limit of {FRAME_BYTES_MAX}")
    return _HEADER.pack(MAGIC, WIRE_VERSION, 0, len(body), zlib.crc32(body)) + body


def body_length(header: bytes) -> int:
    """Length of the body that a frame's first `HEADER_BYTES` bytes announce. ProtocolError if they are no header."""
    if len(header) < HEADER_BYTES:
        raise ProtocolError("truncated", f"a frame's header has {HEADER_BYTES} bytes, not {len(header)}")
    magic, version, _, length, _ = _HEADER.unpack_from(header)
    if magic != MAGIC:
        raise ProtocolError("magic", f"the bytes {magic!r} begin no message of snapshotd")
    if version != WIRE_VERSION:
        raise ProtocolError(
            "version",
            f"the other side speaks wire version {version} and this one {WIRE_VERSION}: install the same release",
        )
    if length > FRAME_BYTES_MAX:
        raise ProtocolError("oversized", f"a message announces {length} bytes; the limit is {FRAME_BYTES_MAX}")
    return int(length)


def unpack_request(frame: bytes) -> Request:
    """The request in a whole frame. ProtocolError if it is not exactly one valid request."""
    return _decode(_request_decoder, frame)


def unpack_reply(frame: bytes) -> Reply:
    """The reply in a whole frame. ProtocolError if it is not exactly one valid reply."""
    return _decode(_reply_decoder, frame)


_T = TypeVar("_T")


def _decode(decoder: msgspec.msgpack.Decoder[_T], frame: bytes) -> _T:
    length = body_length(frame)
    body = memoryview(frame)[HEADER_BYTES:]
    if len(body) != length:
        raise ProtocolError("truncated", f"a message announces {length} bytes and has {len(body)}")
    if zlib.crc32(body) != _HEADER.unpack_from(frame)[4]:
        raise ProtocolError("checksum", "a message arrived with a wrong checksum")
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("content", f"a message does not follow the protocol: {error}") from None
