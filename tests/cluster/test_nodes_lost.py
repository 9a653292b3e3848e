"""Lost nodes come back bit for bit, within the parity; beyond it every rank is told so, and nothing is mixed.

Real trainers on real daemons. The undisturbed run is the oracle of every loss and of the final state.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotd.errors import SnapshotLost
from tests.cluster.harness import until
from tests.cluster.nodes import STEPS, Cast, Nodes, ends_exactly, errors_of, nodes


def one_of_each_group(scene: Nodes) -> list[int]:
    """Numbers of nodes, the last of each group."""
    groups = scene.generations(0)[-1]["cohort"]["groups"]
    assert sorted(len(group["nodes"]) for group in groups) == [2, 3]
    return [int(group["nodes"][-1].removeprefix("node")) for group in groups]


@pytest.mark.parametrize(
    ("recipe", "ranks_on", "parity", "group_size", "lost"),
    [
        pytest.param("fsdp", [0, 1, 2, 3], 2, 8, [0, 2], id="4 nodes, parity 2, the coordinator and another"),
        pytest.param("ddp", [0, 1, 2], 1, 8, [1], id="3 nodes, parity 1, one"),
        pytest.param("fsdp", [0, 1, 2, 3, 4], 1, 3, [], id="5 nodes in groups of 3 and 2, one of each"),
        pytest.param("fsdp", [0, 0, 1, 1, 2], 1, 8, [1], id="two ranks a node"),
    ],
)
def test_lost_nodes_come_back_bit_for_bit(
    recipe: str, ranks_on: list[int], parity: int, group_size: int, lost: list[int], shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, max(ranks_on) + 1) as scene:
        shape = {"parity": parity, "group_size": group_size}
        committed = scene.dies(recipe, ranks_on, **shape)
        scene.all_commit(committed)
        lost = lost or one_of_each_group(scene)
        scene.lose(*lost)
        scene.replace(*lost)
        again = scene.train(recipe, ranks_on, **shape)
        assert ends_exactly(again, committed) == committed
        for rank, one in enumerate(again):
            report = one.events("restored")[0]["report"]
            assert report["rebuilt_bytes"] > 0, f"rank {rank} was told of a rebuild"
            assert f"{sum(node in lost for node in ranks_on)} will be rebuilt from parity" in report["why"]


@pytest.mark.parametrize(
    ("count", "parity", "lost"), [(3, 1, [0, 1]), (2, 0, [1])], ids=["two of parity one", "one of no parity"]
)
def test_beyond_the_parity_every_rank_is_told_that_the_snapshot_is_lost(
    count: int, parity: int, lost: list[int], shm_dir: Path, tmp_path: Path
) -> None:
    ranks_on = list(range(count))
    with nodes(shm_dir, tmp_path, count) as scene:
        committed = scene.dies("ddp", ranks_on, parity=parity)
        scene.all_commit(committed)
        scene.lose(*lost)
        scene.replace(*lost)
        errors = errors_of(scene.train("ddp", ranks_on, parity=parity))
        assert {error["kind"] for error in errors} == {"SnapshotLost"}
        (sentence,) = {error["message"] for error in errors}
        assert f"step {committed}" in sentence and 'on_lost="fresh"' in sentence and "missing" in sentence
        fresh = scene.train("ddp", ranks_on, parity=parity, restore={"on_lost": "fresh"})
        assert ends_exactly(fresh, 0) == 0


@pytest.mark.parametrize("lost", [[], [1]], ids=["nothing lost", "one lost"])
def test_ranks_that_a_relaunch_deals_to_other_nodes_find_their_shards(
    lost: list[int], shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        committed = scene.dies("fsdp", [0, 1, 2], parity=1)
        scene.all_commit(committed)
        scene.lose(*lost)
        if lost:
            scene.replace(*lost)
        gate = tmp_path / "gate"
        moved = scene.train(
            "fsdp", [2, 0, 1], parity=1, gates={committed: str(gate)}, die="after_commit", die_step=STEPS - 1
        )
        until(lambda: all(one.events("at gate") for one in moved), "every rank at its gate, having restored")
        scene.all_commit(committed)
        gate.touch()
        assert [one.join() for one in moved] == [-9, -9, -9], [one.events("error") for one in moved]
        assert {one.events("restored")[0]["step"] for one in moved} == {committed}
        later = max(one.events("dying")[0]["committed"] for one in moved)
        assert later > committed, scene.logs()
        assert ends_exactly(scene.train("fsdp", [1, 2, 0], parity=1), later) >= later


def test_the_shard_of_a_node_that_left_the_job_while_its_daemon_lives_is_read_from_there(
    shm_dir: Path, tmp_path: Path
) -> None:
    with nodes(shm_dir, tmp_path, 4) as scene:
        committed = scene.dies("fsdp", [0, 1, 2], parity=1)
        scene.all_commit(committed, 0, 1, 2)
        again = scene.train("fsdp", [0, 1, 3], parity=1)
        assert ends_exactly(again, committed) == committed
        assert {one.events("restored")[0]["report"]["rebuilt_bytes"] for one in again} == {0}
        assert scene.counter(2, "served_bytes") > 0


def test_more_parity_than_the_groups_allow_is_clipped_and_said(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 2) as scene:
        first = scene.train("ddp", [0, 1], parity=5, die="after_commit", die_step=5)
        assert [one.join() for one in first] == [-9, -9], [one.events("error") for one in first]
        warnings = [event["message"] for event in first[0].events("log") if event["level"] == "WARNING"]
        assert any("parity=5" in one and "there it is 1" in one for one in warnings), warnings
        committed = first[0].events("dying")[0]["committed"]
        scene.lose(1)
        scene.replace(1)
        assert ends_exactly(scene.train("ddp", [0, 1], parity=5), committed) >= committed


# --- what survivors keep ----------------------------------------------------------------------------------------------


def test_only_the_parity_that_was_lost_is_encoded_again(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 4) as scene:
        cast = Cast(scene, [0, 1, 2, 3], parity=2)
        cast.begin()
        cast.save(1)
        cast.kill()
        scene.lose(1)
        scene.replace(1)
        before = [scene.counter(number, "parity_made") for number in range(4)]
        assert cast.begin() == 1
        cast.commits(1)
        after = [scene.counter(number, "parity_made") for number in range(4)]
        assert [b - a for a, b in zip(before, after, strict=True)] == [0, 1, 0, 0]
        cast.save(2)


def test_a_newcomer_is_protected_itself_before_the_next_loss(shm_dir: Path, tmp_path: Path) -> None:
    """Losses one after the other, each within the parity, add up to more than it: each was made good in between."""
    with nodes(shm_dir, tmp_path, 3) as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        for lost in (1, 0, 2, 1):
            cast.kill()
            scene.lose(lost)
            scene.replace(lost)
            assert cast.begin() == 1
            cast.commits(1)
        cast.save(2)


def test_without_parity_a_job_on_several_nodes_commits_and_a_lost_node_is_lost(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 2) as scene:
        cast = Cast(scene, [0, 1], parity=0)
        cast.begin()
        cast.save(1)
        cast.save(2)
        assert scene.counter(0, "parity_made") == scene.counter(1, "parity_made") == 0
        cast.kill()
        assert cast.begin() == 2
        cast.kill()
        scene.lose(0)
        scene.replace(0)
        with pytest.raises(SnapshotLost, match="rank 0 of 2 is missing"):
            cast.begin()


# --- the end of a run -------------------------------------------------------------------------------------------------


def test_a_run_that_every_rank_closed_is_freed_on_every_node(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        cast.close_runs(0, 1)
        assert len(scene.arenas()) == 6, "a rank that goes on may still need what the others hold"
        cast.close_runs(2)
        until(lambda: not scene.arenas(), "the removal of every arena")
        assert cast.begin() == 0, "nothing is left of a run that was closed"


def test_a_rank_that_died_before_it_closed_keeps_everything(shm_dir: Path, tmp_path: Path) -> None:
    with nodes(shm_dir, tmp_path, 3) as scene:
        cast = Cast(scene, [0, 1, 2])
        cast.begin()
        cast.save(1)
        cast.close_runs(0, 1)
        cast.kill()
        scene.lose(1)
        scene.replace(1)
        assert cast.begin() == 1
        cast.save(2)
