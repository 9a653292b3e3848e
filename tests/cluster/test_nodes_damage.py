"""A flipped bit on one of several nodes: found, said, decoded from the others or passed over; never restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotd import parityset
from tests.cluster.harness import until
from tests.cluster.nodes import Arena, Cast, ends_exactly, errors_of, nodes

DAMAGED = 1
IN_A_SHARD: dict[str, Callable[[Arena], None]] = {
    "its tensors": lambda arena: arena.flip(arena.newest.file_bytes - 100),
    "its safetensors header": lambda arena: arena.flip(40),
    "the length of its header": lambda arena: arena.flip(1),
    "its table of checksums": lambda arena: arena.flip_table(2),
}


@pytest.mark.parametrize("flip", IN_A_SHARD.values(), ids=IN_A_SHARD)
def test_a_flipped_bit_in_a_committed_shard_is_decoded_from_the_other_nodes_and_reported(
    flip: Callable[[Arena], None], shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        committed = scene.dies("ddp", [0, 1, 2], parity=1)
        scene.all_commit(committed)
        flip(scene.arena(DAMAGED))
        again = scene.train("ddp", [0, 1, 2], parity=1)
        assert ends_exactly(again, committed) == committed
        report = again[0].events("restored")[0]["report"]
        assert report["rebuilt_bytes"] > 0
        told = report["why"] + " ".join(report["passed_over"])
        assert f"rank {DAMAGED}" in told and ("checksum" in told or "header" in told), told


def test_damage_beyond_the_parity_is_said_to_be_lost_on_every_rank(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        committed = scene.dies("ddp", [0, 1, 2], parity=1)
        scene.all_commit(committed)
        for number in (0, DAMAGED):
            scene.arena(number).flip(20_000)
        errors = errors_of(scene.train("ddp", [0, 1, 2], parity=1))
        assert {error["kind"] for error in errors} == {"SnapshotLost"}
        assert all("checksum" in error["message"] for error in errors)


# --- parity -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_parity_set_is_found_before_the_set_counts_and_made_good(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        cast.kill()
        damaged = scene.arena(DAMAGED, parity=True)
        damaged.flip(damaged.newest.file_bytes - 1)
        cast.begin()
        cast.commits(1)
        assert scene.counter(DAMAGED, "quarantined") == 1
        assert scene.counter(DAMAGED, "parity_made") == 2
        cast.kill()
        scene.lose(0)
        scene.replace(0)
        assert cast.begin() == 1


@pytest.mark.parametrize("where", ["its pieces", "its description"])
def test_a_lost_shard_is_decoded_past_a_flipped_bit_in_a_parity_set(where: str, shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 4) as scene:
        cast = Cast(scene, [0, 1, 2, 3], parity=2)
        cast.begin()
        cast.save(1)
        cast.kill()
        scene.lose(3)
        scene.replace(3)
        damaged = scene.arena(DAMAGED, parity=True)
        damaged.flip(parityset.HEAD_BYTES + 30 if where == "its description" else damaged.newest.file_bytes - 1)
        assert cast.begin() == 1
        cast.commits(1)
        cast.save(2)
        assert scene.counter(DAMAGED, "quarantined") == 1


def test_a_lost_shard_is_decoded_past_flipped_bits_in_another_shard_whose_node_is_told(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 4) as scene:
        cast = Cast(scene, [0, 1, 2, 3], parity=2)
        cast.begin()
        cast.save(1)
        cast.kill()
        scene.lose(3)
        scene.replace(3)
        damaged = scene.arena(2)
        for place in (100, 9000):  # one in each of its two pieces: whoever stands where, the newcomer meets one
            damaged.flip(place)
        # The puppets' own look at what is there meets the damage, or comes after the node has set that shard aside.
        with pytest.raises(AssertionError, match=r"checksum|3 of 4 shards are here, 1 will be rebuilt"):
            cast.begin()
        assert scene.counter(3, "rebuilt") == 1
        until(lambda: scene.counter(2, "quarantined") == 1, "the damaged shard set aside on its own node")


# --- the scrubber -----------------------------------------------------------------------------------------------------


def test_what_rots_in_memory_is_found_by_the_scrubber_and_repaired_from_the_group_or_told(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 3, "--scrub-every", "0.1", "--scrub-bandwidth", "1GB/s") as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        places = {0: scene.arena(0), DAMAGED: scene.arena(DAMAGED), 2: scene.arena(2, parity=True)}
        were = {number: arena.contents() for number, arena in places.items()}
        places[DAMAGED].flip(100)  # in a first column and in a last one: neither is needed to repair the other
        places[2].flip(places[2].newest.file_bytes - 1)
        for number in (DAMAGED, 2):
            until(lambda number=number: scene.counter(number, "scrub_repaired"), f"a repair on node {number}")  # type: ignore[misc]
            assert (scene.counter(number, "scrub_found"), scene.counter(number, "scrub_repaired")) == (1, 1)
            assert places[number].contents() == were[number]
        assert [scene.counter(number, "quarantined") for number in range(3)] == [0, 0, 0]
        assert scene.counter(0, "scrub_found") == 0

        scene.lose(2)
        places[0].flip(100)
        (told,) = until(lambda: scene.daemons[0].status()["scrub"]["rotten"], "a sentence about what is rotten")
        assert "rank 0's shard has 1 block whose checksum fails, not repaired" in told
        assert (scene.counter(0, "scrub_repaired"), scene.counter(0, "quarantined")) == (0, 0)
