"""Daemons that authenticate: a job commits, loses a node and comes back as in the clear; strangers get nothing."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from snapshotd import cli, wire
from snapshotd.errors import DaemonUnavailable, Refused
from snapshotd.keys import Keys, pin
from snapshotd.mesh import ask_over_network
from snapshotd.streams import Stream
from tests.cluster.harness import until
from tests.cluster.nodes import Cast, Nodes, contents, ends_exactly, nodes, pull, steady_port
from tests.cluster.puppet import generation_id

AWAY_S, PATIENCE_S = 1.0, 150.0


@pytest.fixture
def living(shm_dir: Path, tmp_path: Path) -> Iterator[tuple[Nodes, Cast]]:
    """A job on three nodes that authenticate; it has committed once and goes on."""
    with nodes(shm_dir, tmp_path, 3, authenticate=True) as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        yield scene, cast


def goes_on(scene: Nodes, cast: Cast) -> None:
    """It commits as if nothing had happened, and no daemon met an error of its own."""
    cast.save(cast.step + 1)
    assert all(scene.counter(number, "errors") == 0 for number in range(3)), scene.logs()


def keys_of(scene: Nodes, number: int) -> Keys:
    keys = scene.keys(number)
    assert keys is not None
    return keys


def ask(scene: Nodes, number: int, keys: Keys, request: wire.Request, patience_s: float = PATIENCE_S) -> wire.Reply:
    """Ask a node's mesh as whoever has these keys."""
    address = scene.daemons[number].status()["listen"]
    return ask_over_network(address, request, patience_s, keys, keys_of(scene, number).badge.curve)


def say_until_counted(scene: Nodes, number: int, keys: Keys, message: wire.Request, reason: str) -> None:
    """Tell a node's mesh, as whoever has these keys, what is answered by nobody, until it counts that it dropped it."""

    def told() -> bool:
        with contextlib.suppress(DaemonUnavailable):
            ask(scene, number, keys, message, AWAY_S)
        return scene.dropped(number).get(reason, 0) > 0

    until(told, f"{reason} counted")


def test_a_trained_job_that_loses_a_node_comes_back_bit_for_bit_over_encrypted_links(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 3, authenticate=True) as scene:
        committed = scene.dies("ddp", [0, 1, 2], parity=1)
        scene.lose(1)
        scene.replace(1)
        ends_exactly(scene.train("ddp", [0, 1, 2], parity=1), committed)
        assert scene.counter(1, "rebuilt") == 1
        assert all(scene.daemons[number].status()["authenticates"] for number in range(3))


def test_a_daemon_that_is_restarted_is_the_same_to_its_peers_and_still_believes_them(
    living: tuple[Nodes, Cast],
) -> None:
    scene, cast = living
    before = keys_of(scene, 1)
    cast.kill()
    scene.restart(1)
    assert keys_of(scene, 1) == before
    assert isinstance(ask(scene, 1, keys_of(scene, 2), wire.AskInventory("test")), wire.InventoryTaken)
    assert cast.begin() == 1
    goes_on(scene, cast)


def test_a_job_that_moves_reads_from_the_node_that_it_left_which_is_told_of_the_newcomer(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 4, authenticate=True) as scene:
        committed = scene.dies("fsdp", [0, 1, 2], parity=1)
        scene.all_commit(committed, 0, 1, 2)
        again = scene.train("fsdp", [0, 1, 3], parity=1)
        assert ends_exactly(again, committed) == committed
        assert {one.events("restored")[0]["report"]["rebuilt_bytes"] for one in again} == {0}
        assert scene.counter(2, "served_bytes") > 0
        assert all("peer-stranger" not in scene.dropped(number) for number in range(4)), scene.logs()


def test_a_stranger_reads_nothing_is_heard_by_nobody_and_commits_go_on(living: tuple[Nodes, Cast]) -> None:
    scene, cast = living
    stranger = Keys.draw("a stranger")
    there = cast.inventories()[0]
    (shard,) = there.shards
    for request in (wire.Hello("tool", 1), wire.AskStatus(), wire.AskInventory("test")):
        with pytest.raises(DaemonUnavailable):
            ask(scene, 0, stranger, request, AWAY_S)
    with pytest.raises(DaemonUnavailable, match=r"nobody that it was not told of|went away|ended the stream"):
        pull(there, "test", shard, stranger)
    for address in (there.address, there.streams):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), 30.0) as clear:
            answer = bytearray()
            with contextlib.suppress(OSError):  # it may hang up at the first bytes that it does not like
                clear.sendall(wire.pack(wire.Read("test", shard.arena, shard.slot, shard.snapshot, 0, 4096)))
                clear.shutdown(socket.SHUT_WR)
                while part := clear.recv(65536):
                    answer += part
        assert contents(0, 1)[:64].encode() not in answer
    until(lambda: {"listen-stranger", "stream-stranger"} <= scene.dropped(0).keys(), "both kinds of strangers counted")
    goes_on(scene, cast)


def test_who_has_another_key_than_was_told_is_not_spoken_to(living: tuple[Nodes, Cast]) -> None:
    scene, cast = living
    there, other = cast.inventories()[:2]
    (shard,) = there.shards
    assert other.badge is not None
    impostor = msgspec.structs.replace(there, badge=other.badge)
    with pytest.raises(DaemonUnavailable, match="is another than this node was told"):
        pull(impostor, "test", shard, keys_of(scene, 1))
    with pytest.raises(DaemonUnavailable):
        ask_over_network(there.address, wire.Hello("tool", 1), AWAY_S, keys_of(scene, 1), other.badge.curve)
    goes_on(scene, cast)


def test_a_node_speaks_for_itself_alone_and_only_in_its_own_jobs(living: tuple[Nodes, Cast]) -> None:
    scene, cast = living
    with_neighbours_name = wire.Publish(
        "test", generation_id(cast.generation), bytes.fromhex(scene.daemons[2].status()["node"]), 1 << 61, True, False,
        {2: 1 << 40}, [], 0, 0, 0,
    )  # fmt: skip
    say_until_counted(scene, 0, keys_of(scene, 1), with_neighbours_name, "peer-stranger")
    other = Cast(scene, [0, 2], job="another")
    other.begin()
    other.save(1)
    assert isinstance(ask(scene, 0, keys_of(scene, 1), wire.AskInventory("another")), wire.Refusal)
    there = other.inventories()[0]
    (shard,) = there.shards
    with pytest.raises(Refused, match="not told that you take part"):
        pull(there, "another", shard, keys_of(scene, 1))
    goes_on(scene, cast)


def test_what_is_said_of_a_generation_that_has_ended_is_not_heard(living: tuple[Nodes, Cast]) -> None:
    scene, cast = living
    old = generation_id(cast.generation)
    cast.kill()
    cast.knock()
    late = wire.Publish(
        "test", old, bytes.fromhex(scene.daemons[1].status()["node"]), 1 << 61, True, False, {1: 1 << 40}, [], 0, 0, 0
    )
    say_until_counted(scene, 0, keys_of(scene, 1), late, "peer-expired")
    assert cast.begin() == 1
    goes_on(scene, cast)


def test_nodes_that_do_not_agree_on_authenticating_are_refused_with_a_sentence(shm_dir: Path, tmp_path: Path) -> None:
    for name in ("clear", "encrypted"):
        (shm_dir / name).mkdir(mode=0o700)
        (tmp_path / name).mkdir()
    with (
        nodes(shm_dir / "clear", tmp_path / "clear", 1) as clear,
        nodes(shm_dir / "encrypted", tmp_path / "encrypted", 1, authenticate=True) as encrypted,
    ):
        encrypted.daemons += clear.daemons
        with pytest.raises(Refused, match="give `authenticate` the same value"):
            Cast(encrypted, [0, 1]).begin()


def test_the_status_of_a_peer_is_asked_by_way_of_the_own_daemon(
    living: tuple[Nodes, Cast], capsys: pytest.CaptureFixture[str]
) -> None:
    scene, _ = living
    here, there = scene.daemons[0], scene.daemons[1].status()
    asked = ["status", "--json", "--socket", str(here.socket), "--connect"]
    assert cli.main([*asked, f"tcp://{there['listen']}"]) == 0
    assert json.loads(capsys.readouterr().out)["node"] == there["node"]
    assert cli.main([*asked, f"tcp://127.0.0.1:{steady_port()}"]) == 1
    assert "nobody in this node's jobs is there" in capsys.readouterr().err


def test_keys_are_readable_for_their_user_alone(living: tuple[Nodes, Cast]) -> None:
    scene, _ = living
    for number in range(3):
        for name in ("node.keys", "peers.known"):
            assert (scene.daemons[number].shm_dir / name).stat().st_mode & 0o777 == 0o600
    streams = scene.daemons[0].status()["streams"]
    stream = Stream.connect(streams, secure=lambda _: pin(keys_of(scene, 1).pem, keys_of(scene, 0).badge.certificate))
    stream.close()
