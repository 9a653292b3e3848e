"""What arrives at a living job and is not its own is dropped under a counted reason, and commits go on."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from snapshotd import wire
from snapshotd.errors import ProtocolError, Refused, SnapshotGone
from snapshotd.streams import Stream
from snapshotd.wire import GenerationId, SnapshotId
from tests.cluster.harness import until
from tests.cluster.nodes import Cast, Nodes, nodes
from tests.cluster.puppet import generation_id, snapshot_id

STRANGER = bytes(16)
OTHER_GENERATION = GenerationId(1, b"another run here")


@pytest.fixture
def living(shm_dir: Path, tmp_path: Path) -> Iterator[tuple[Nodes, Cast]]:
    """A job on three nodes that has committed once and goes on."""
    with nodes(shm_dir, tmp_path, 3) as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        yield scene, cast


def goes_on(scene: Nodes, cast: Cast) -> None:
    """It commits as if nothing had happened, and no daemon met an error of its own."""
    cast.save(cast.step + 1)
    assert all(scene.counter(number, "errors") == 0 for number in range(3)), scene.logs()


class Peer:
    """Somebody who speaks to a daemon's mesh port."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.connect(f"tcp://{address}")

    def say(self, *parts: bytes) -> None:
        self._socket.send_multipart(parts)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@contextlib.contextmanager
def peer(scene: Nodes, number: int) -> Iterator[Peer]:
    """A stranger at a node's port."""
    one = Peer(scene.daemons[number].status()["listen"])
    try:
        yield one
    finally:
        one.close()


def publish(cast: Cast, node: bytes, job: str = "test", generation: GenerationId | None = None) -> wire.Publish:
    """A state as a node might tell it that lags behind: it holds nothing and has passed nothing."""
    return wire.Publish(
        job, generation or generation_id(cast.generation), node, 1, True, False, {1: 0}, [], 0, 0, 0
    )  # fmt: skip


def decree(cast: Cast, node: bytes, job: str = "test") -> wire.Decree:
    """A decision as a coordinator might have told it long ago."""
    return wire.Decree(job, generation_id(cast.generation), node, 1, 0, [1], 1, 1, False)


def of_another_version(frame: bytes) -> bytes:
    """The same frame, as a later release would begin it."""
    magic, version, reserved, length, crc = struct.unpack_from("<4sHHII", frame)
    return struct.pack("<4sHHII", magic, version + 1, reserved, length, crc) + frame[wire.HEADER_BYTES :]


def unknown_message() -> bytes:
    """A frame that is whole and says nothing that we know."""
    body = msgspec.msgpack.encode({"type": "Overthrow", "job": "test"})
    return struct.pack("<4sHHII", wire.MAGIC, wire.WIRE_VERSION, 0, len(body), zlib.crc32(body)) + body


def bad_frames(cast: Cast) -> list[bytes]:
    """Frames that are none: each is refused by the decoder for a reason of its own."""
    good = wire.pack(publish(cast, STRANGER))
    noise = random.Random(7)
    oversized = struct.pack("<4sHHII", wire.MAGIC, wire.WIRE_VERSION, 0, wire.FRAME_BYTES_MAX + 1, 0)
    return [
        *(noise.randbytes(length) for length in (0, 1, 15, 16, 200, 5000)),
        good[:10], good[:-1], oversized, of_another_version(good), good[:-1] + b"\x00", unknown_message(),
    ]  # fmt: skip


def reason_of(frame: bytes) -> str:
    """Why the decoder refuses a frame."""
    with pytest.raises(ProtocolError) as refusal:
        wire.unpack_request(frame)
    return str(refusal.value.reason)


def test_frames_that_are_none_are_dropped_by_their_reason_and_commits_go_on(living: tuple[Nodes, Cast]) -> None:
    scene, cast = living
    frames = bad_frames(cast)
    reasons = {f"listen-{reason_of(frame)}" for frame in frames}
    assert {f"listen-{one}" for one in ("magic", "version", "oversized", "truncated", "checksum", "content")} <= reasons
    for number in (0, 1):
        with peer(scene, number) as stranger:
            for frame in frames:
                stranger.say(frame)
            stranger.say(frames[0], frames[1], frames[2])
            stranger.say(wire.pack(wire.Attach("test", OTHER_GENERATION, 0, 1, 0, [0], 1, 4096, 4096, bytes(32))))
            until(
                lambda number=number: reasons | {"listen-parts", "listen-unserved"} <= scene.dropped(number).keys(),  # type: ignore[misc]
                f"every reason counted by node {number}",
            )
    goes_on(scene, cast)


def test_what_is_too_long_to_be_a_message_is_not_even_read(living: tuple[Nodes, Cast]) -> None:
    scene, cast = living
    with peer(scene, 0) as stranger:
        stranger.say(bytes(wire.FRAME_BYTES_MAX + wire.HEADER_BYTES + 1))
        stranger.say(b"")
        goes_on(scene, cast)


def test_messages_of_another_job_generation_or_node_are_dropped_by_their_reason_and_commits_go_on(
    living: tuple[Nodes, Cast],
) -> None:
    scene, cast = living
    follower = bytes.fromhex(scene.daemons[1].status()["node"])
    elsewhere = SnapshotId(OTHER_GENERATION, 1)
    with peer(scene, 0) as stranger:
        for message in (
            publish(cast, follower, job="another"),
            publish(cast, follower, generation=OTHER_GENERATION),
            decree(cast, follower, job="another"),
            wire.Doubt("another", OTHER_GENERATION, STRANGER, 0, elsewhere, "so they say"),
            publish(cast, STRANGER),
        ):
            stranger.say(wire.pack(message))
        until(lambda: scene.dropped(0).get("peer-unknown", 0) >= 4, "what concerns another job or generation counted")
        until(lambda: scene.dropped(0).get("peer-stranger", 0) >= 1, "what came from no node of the job counted")
        goes_on(scene, cast)


def test_old_states_and_decisions_that_are_replayed_change_nothing(living: tuple[Nodes, Cast]) -> None:
    scene, cast = living
    coordinator, follower = (bytes.fromhex(scene.daemons[number].status()["node"]) for number in (0, 1))
    cast.save(2)
    with peer(scene, 0) as to_coordinator, peer(scene, 1) as to_follower:
        for _ in range(20):
            to_coordinator.say(wire.pack(publish(cast, follower)))
            to_follower.say(wire.pack(decree(cast, coordinator)))
        cast.save(3)
        goes_on(scene, cast)
    assert all(scene.generations(number)[-1]["aborts"] == 0 for number in range(3))
    assert all(puppet.slots() == {4: "COMMITTED"} for puppet in cast.puppets)


def test_a_doubt_about_bytes_that_are_good_sets_nothing_aside(living: tuple[Nodes, Cast]) -> None:
    scene, cast = living
    shard = next(one for inventory in cast.inventories() for one in inventory.shards if one.rank == 1)
    doubt = wire.Doubt("test", generation_id(cast.generation), shard.arena, shard.slot, shard.snapshot, "they say so")
    with peer(scene, 1) as stranger:
        for _ in range(5):
            stranger.say(wire.pack(doubt))
        goes_on(scene, cast)
    assert scene.counter(1, "quarantined") == 0


def test_a_doubt_that_holds_has_the_bytes_repaired_from_the_group_and_sets_nothing_aside(
    living: tuple[Nodes, Cast],
) -> None:
    scene, cast = living
    shard = next(one for inventory in cast.inventories() for one in inventory.shards if one.rank == 1)
    arena = scene.arena(1)
    was = arena.contents()
    arena.flip(100)
    doubt = wire.Doubt("test", generation_id(cast.generation), shard.arena, shard.slot, shard.snapshot, "they rotted")
    with peer(scene, 1) as another:
        another.say(wire.pack(doubt))
        until(lambda: scene.counter(1, "scrub_repaired") == 1, "a repair of the block")
    assert arena.contents() == was
    assert scene.counter(1, "quarantined") == 0
    goes_on(scene, cast)


# --- byte streams -----------------------------------------------------------------------------------------------------


def spoken(address: str, data: bytes) -> bytes:
    """What a byte stream answers to this, until it hangs up."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10.0) as one:
        answer = bytearray()
        with contextlib.suppress(OSError):  # it may hang up at the first bytes that it does not like
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while part := one.recv(4096):
                answer += part
        return bytes(answer)


def test_what_is_no_read_hangs_up_a_stream_by_its_reason_and_commits_go_on(living: tuple[Nodes, Cast]) -> None:
    scene, cast = living
    frames = [frame for frame in bad_frames(cast) if frame]
    for number in (0, 1):
        address = scene.daemons[number].status()["streams"]
        for frame in [*frames, wire.pack(publish(cast, STRANGER))]:
            assert spoken(address, frame) == b""
        wanted = {f"stream-{reason}" for reason in ("magic", "version", "oversized", "truncated", "checksum")}
        until(
            lambda number=number, wanted=wanted: wanted | {"stream-unserved"} <= scene.dropped(number).keys(),  # type: ignore[misc]
            f"every reason counted by node {number}",
        )
    goes_on(scene, cast)


def test_a_read_of_what_is_not_there_or_of_another_job_is_refused_and_gets_no_byte(
    living: tuple[Nodes, Cast],
) -> None:
    scene, cast = living
    inventory = cast.inventories()[0]
    (shard,) = inventory.shards
    good = wire.Read("test", shard.arena, shard.slot, shard.snapshot, 0, 4096)
    changes: list[dict[str, object]] = [
        {"job": "another"},
        {"arena": STRANGER},
        {"slot": 1 - shard.slot},
        {"snapshot": snapshot_id(cast.generation, 77)},
        {"snapshot": SnapshotId(OTHER_GENERATION, shard.snapshot.step)},
        {"offset": 3},
        {"offset": 1 << 40},
    ]
    stream = Stream.connect(inventory.streams)
    try:
        for change in changes:
            stream.ask(msgspec.structs.replace(good, **change))
            with pytest.raises(SnapshotGone):
                stream.answer()
        stream.ask(good)
        assert stream.answer().length == 4096, "the same connection serves what is right"
    finally:
        stream.close()
    goes_on(scene, cast)


# --- trainers that do not agree ---------------------------------------------------------------------------------------


def test_a_rank_that_names_other_nodes_or_groups_than_its_peers_is_refused_with_a_sentence(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 2) as scene:
        cast = Cast(scene, [0, 0, 1])
        cast.begin()
        cast.save(1)
        cast.puppets[1].kill()
        again = type(cast.puppets[1])(scene.daemons[0].socket, 1, 3, cast.generation, "test")
        scene.puppets.append(again)
        cast.puppets[1] = again
        places, groups = cast.changes["nodes"], cast.changes["groups"]
        for changes, sentence in (
            ({"groups": [list(reversed(groups[0]))]}, "disagrees with its peers"),
            ({"groups": [groups[0][:1]]}, "once"),
            ({"nodes": places[:1]}, "named"),
            ({"nodes": [places[1], *places[1:]]}, "without this one"),
            ({"nodes": [places[0], msgspec.structs.replace(places[1], address="")]}, "listens nowhere"),
        ):
            with pytest.raises(Refused, match=sentence):
                cast.attach(1, **changes)
        cast.attach(1)
        cast.save(2)


def test_two_jobs_on_the_same_nodes_do_not_disturb_each_other(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        one, other = Cast(scene, [0, 1, 2]), Cast(scene, [2, 1, 0], job="another")
        for cast in (one, other):
            cast.begin()
        for step, cast in itertools.product((1, 2), (one, other)):
            cast.save(step)
        for cast in (one, other):
            cast.kill()
        scene.lose(1)
        scene.replace(1)
        assert one.begin() == other.begin() == 2
        one.close_runs(0, 1, 2)
        other.save(3)
        until(lambda: len(scene.arenas()) == 6, "the closed job's arenas freed, and no others")
