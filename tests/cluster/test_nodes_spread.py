"""A lost shard that the survivors' daemons decode and forward: the same bytes, and nothing else that could be wrong.

`Cast.begin` compares every shard with what its puppet wrote. On loopback the decode is spread only where that is asked
for.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from snapshotd.errors import SnapshotError
from tests.cluster.harness import until
from tests.cluster.nodes import Cast, Nodes, nodes
from tests.cluster.puppet import BLOCK_BYTES

SPREAD = ("--rebuild-spread", "yes")
LOST, HELPER = 3, 2


def saved(scene: Nodes, count: int, parity: int) -> Cast:
    """A job of a rank on each node that committed a step and died."""
    cast = Cast(scene, list(range(count)), parity=parity)
    cast.begin()
    cast.save(1)
    cast.kill()
    return cast


def assisted(scene: Nodes) -> list[int]:
    return [scene.counter(number, "assisted_bytes") for number in range(len(scene.daemons))]


@pytest.mark.parametrize("authenticate", [False, True], ids=["in the clear", "encrypted"])
def test_lost_shards_are_decoded_by_the_survivors_bit_for_bit(
    authenticate: bool, shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 4, *SPREAD, authenticate=authenticate) as scene:
        cast = saved(scene, 4, parity=2)
        scene.lose(1, LOST)
        scene.replace(1, LOST)
        assert cast.begin() == 1
        rebuilt = sum(scene.counter(number, "rebuilt_bytes") for number in (1, LOST))
        until(lambda: sum(assisted(scene)) == rebuilt > 0, "all of it having been decoded by others")
        cast.commits(1)
        cast.save(2)
        assert all(scene.counter(number, "errors") == 0 for number in range(4)), scene.logs()


def test_on_one_machine_the_newcomer_decodes_by_itself_unless_it_is_told_otherwise(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 4) as scene:
        cast = saved(scene, 4, parity=1)
        scene.lose(LOST)
        scene.replace(LOST)
        assert cast.begin() == 1
        assert assisted(scene) == [0, 0, 0, 0]


@pytest.mark.parametrize("for_good", [False, True], ids=["and comes back", "and is lost for good"])
def test_a_survivor_killed_in_the_middle_of_its_part_costs_nothing_within_the_parity(
    for_good: bool, shm_dir: Path, tmp_path: Path
) -> None:
    """Whoever is asked dies; one of them may be lost with its memory, and the next attempt does without it."""
    with nodes(shm_dir, tmp_path, 4, *SPREAD) as scene:
        cast = saved(scene, 4, parity=2)
        scene.lose(LOST)
        scene.replace(LOST)
        for survivor in range(LOST):
            scene.restart(survivor, crash="assist.window")
        with contextlib.suppress(SnapshotError):
            cast.begin()
        until(lambda: any(map(scene.has_died, range(LOST))), "a survivor dying over a window")
        cast.kill()
        died = [survivor for survivor in range(LOST) if scene.has_died(survivor)]
        if for_good:
            scene.lose(died[0])
            scene.replace(died[0])
        for survivor in range(LOST):
            if not (for_good and survivor == died[0]):
                scene.restart(survivor)
        assert cast.begin() == 1
        cast.commits(1)
        cast.save(2)


@pytest.mark.parametrize("parity", [False, True], ids=["in data", "in parity"])
def test_a_lost_shard_is_decoded_past_a_flipped_bit_on_a_survivor_which_is_told(
    parity: bool, shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 4, *SPREAD) as scene:
        cast = saved(scene, 4, parity=2)
        scene.lose(LOST)
        scene.replace(LOST)
        damaged = scene.arena(HELPER, parity=parity)
        for place in [damaged.newest.file_bytes - 1] if parity else [100, 9000]:
            damaged.flip(place)
        if parity:
            assert cast.begin() == 1
            cast.commits(1)
        else:
            with pytest.raises(AssertionError, match="checksum"):  # the puppets' own look at what is there
                cast.begin()
        assert scene.counter(LOST, "rebuilt") == 1
        until(lambda: scene.counter(HELPER, "quarantined") == 1, "what is damaged set aside on its own node")


def test_damage_beyond_the_parity_is_told_and_nothing_is_made_of_it(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 4, *SPREAD) as scene:
        cast = saved(scene, 4, parity=1)
        scene.lose(LOST)
        scene.replace(LOST)
        # Whichever of its pieces the newcomer needs. The parity's description stays, or nobody would try.
        for damaged, first in ((scene.arena(HELPER), 0), (scene.arena(HELPER, parity=True), BLOCK_BYTES)):
            for place in range(damaged.newest.file_bytes - 1, first, -BLOCK_BYTES):
                damaged.flip(place)
        with pytest.raises(SnapshotError, match=r"corrupt: of the 3 pieces .* only 2 are left"):
            cast.begin()
        assert (scene.counter(LOST, "rebuilt"), scene.counter(LOST, "errors")) == (0, 0)
