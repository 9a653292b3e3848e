"""The daemon and trainers that live, die and come back: commit, liveness, fencing, inheritance, freeing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from snapshotd import recovery, wire
from snapshotd.door_client import DoorClient
from snapshotd.errors import RankClaimed, Refused, SnapshotError, SnapshotGone
from tests.cluster.daemons import Node, becomes, node, until
from tests.cluster.puppet import SLOT_BYTES, Puppet, snapshot_id


@pytest.fixture
def daemon(shm_dir: Path, tmp_path: Path) -> Iterator[Node]:
    with node(shm_dir, tmp_path, "--claim-wait", "0.3") as one:
        yield one.start()


# --- commit --------------------------------------------------------------------------------------


def test_a_full_snapshot_of_every_rank_is_committed_and_frees_the_older_one(daemon: Node) -> None:
    first, second = daemon.pair()
    for step in (1, 2, 3):
        first.snapshot(step)
        second.snapshot(step)
        for puppet in (first, second):
            becomes(puppet, {step: "COMMITTED"})
    assert first.words()["committed_step"] == 3
    assert first.words()["ever"] == 1


def test_a_snapshot_that_one_rank_lacks_is_not_committed(daemon: Node) -> None:
    first, second = daemon.pair()
    first.snapshot(1)
    second.order("passed", 1)
    until(lambda: first.words()["aborted_step"] == 1, "the abort")
    becomes(first, {})
    assert first.words()["committed_step"] == 0


def test_a_step_to_snapshot_is_named_once_all_ranks_are_attached(daemon: Node) -> None:
    first, second = daemon.puppet(0, 2), daemon.puppet(1, 2)
    first.attach()
    assert first.words()["naming"] == 0
    second.attach()
    until(lambda: first.words()["next_step"] == second.words()["next_step"] == 1, "a named step")
    assert first.words()["naming"] == second.words()["naming"] == 1


def test_the_next_step_is_named_after_the_commit_and_respects_every(daemon: Node) -> None:
    trainer = daemon.puppet()
    trainer.attach(every=5)
    until(lambda: trainer.words()["next_step"] == 5, "the first name")
    trainer.snapshot(5)
    until(lambda: trainer.words()["next_step"] == 10, "a name five steps after the last commit")


def test_a_slot_whose_description_was_damaged_is_not_committed_and_reported(daemon: Node) -> None:
    first, second = daemon.pair()
    first.snapshot(1)
    first.order("damage", first_slot(first), 80)
    second.snapshot(1)
    until(lambda: second.words()["aborted_step"] == 1, "the abort")
    first.kill()
    second.kill()
    until(lambda: daemon.nobody_holds(), "both deaths")
    third = daemon.puppet(0, 2, 2)
    third.connect()
    inventory = third.inventory()
    assert [shard.rank for shard in inventory.shards] == []


def first_slot(puppet: Puppet) -> int:
    """The slot that was filled first."""
    assert puppet.slots()
    return 0


# --- death ---------------------------------------------------------------------------------------


def test_a_killed_trainer_leaves_no_filling_slot_and_its_whole_snapshot(daemon: Node) -> None:
    trainer = daemon.puppet()
    trainer.attach()
    trainer.snapshot(1)
    becomes(trainer, {1: "COMMITTED"})
    trainer.fill(2)
    trainer.kill()
    until(lambda: daemon.counter("deaths") == 1, "the death to be seen")
    (arena,) = daemon.generations()[0]["arenas"]
    assert sorted((slot["state"], slot["step"]) for slot in arena["slots"]) == [("COMMITTED", 1), ("EMPTY", None)]
    assert daemon.counter("slots_emptied_after_death") == 1


def test_a_worker_that_outlives_its_trainer_does_not_keep_the_lock(daemon: Node) -> None:
    trainer = daemon.puppet()
    trainer.attach()
    worker = trainer.fork()
    trainer.kill()
    until(lambda: daemon.counter("deaths") == 1, "the death to be seen although a worker lives")
    assert psutil.pid_exists(worker)


def test_a_worker_that_outlives_its_trainer_does_not_keep_its_pins(daemon: Node) -> None:
    arena = daemon.commits(1)
    reader = daemon.puppet(0, 1, 2)
    reader.connect()
    reader.inventory()
    reader.order("open_shard", arena.hex(), 0, 1, 1)
    reader.fork()
    reader.kill()
    until(lambda: pins(daemon) == 0, "the pin to be let go")


def pins(daemon: Node) -> int:
    return sum(slot["pins"] for one in daemon.generations() for arena in one["arenas"] for slot in arena["slots"])


def test_a_trainer_that_dies_before_it_holds_its_new_arena_leaves_nothing(daemon: Node) -> None:
    trainer = daemon.puppet()
    trainer.connect()
    trainer.grant()
    trainer.kill()
    until(lambda: not daemon.arenas(), "the arena to be freed")
    assert daemon.status()["jobs"] == {}


def test_a_trainer_whose_connection_ends_before_it_says_held_is_held_by_its_lock(daemon: Node) -> None:
    trainer = daemon.puppet()
    trainer.connect()
    trainer.grant()
    trainer.order("lock")
    trainer.order("disconnect")
    until(lambda: not daemon.nobody_holds(), "the daemon to find the lock held")
    trainer.snapshot(1)
    becomes(trainer, {1: "COMMITTED"})


def test_saying_held_without_holding_is_refused(daemon: Node) -> None:
    trainer = daemon.puppet()
    trainer.connect()
    trainer.grant()
    with pytest.raises(Refused, match="record lock of this arena is free"):
        trainer.order("held")


# --- two of one ----------------------------------------------------------------------------------


def test_a_second_trainer_of_a_rank_is_refused_by_rank_and_pid(daemon: Node) -> None:
    first, second = daemon.puppet(), daemon.puppet()
    first.attach()
    second.connect()
    with pytest.raises(RankClaimed) as refused:
        second.grant()
    assert (refused.value.rank, refused.value.pid) == (0, first.pid)


def test_a_second_launch_of_a_running_job_does_not_fence_it(daemon: Node) -> None:
    first, second = daemon.puppet(), daemon.puppet(generation=2)
    first.attach()
    second.connect()
    with pytest.raises(RankClaimed, match=f"living process {first.pid}"):
        second.inventory()
    first.snapshot(1)
    becomes(first, {1: "COMMITTED"})


def test_a_stopped_trainer_keeps_its_rank(daemon: Node) -> None:
    first, second = daemon.puppet(), daemon.puppet()
    first.attach()
    first.pause()
    second.connect()
    with pytest.raises(RankClaimed):
        second.inventory()


def test_an_inventory_waits_for_a_trainer_that_is_about_to_end(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path, "--claim-wait", "60") as daemon:
        daemon.start()
        first, second = daemon.puppet(), daemon.puppet(generation=2)
        first.attach()
        second.connect()
        second.begin("inventory", "job")
        until(lambda: daemon.status()["connections"] >= 3, "the question to be asked")
        first.kill()
        assert second.finish()


# --- coming back ---------------------------------------------------------------------------------


def test_the_inventory_offers_what_was_committed_and_fences(daemon: Node) -> None:
    arena = daemon.commits(1)
    second = daemon.puppet(0, 1, 2)
    second.connect()
    inventory = second.inventory()
    assert [(shard.snapshot, shard.progress, shard.arena) for shard in inventory.shards] == [
        (snapshot_id(1, 1), "COMMITTED", arena)
    ]
    assert recovery.choose([inventory]).snapshot == snapshot_id(1, 1)
    assert daemon.generations()[0]["fenced"]


def test_status_does_not_fence(daemon: Node) -> None:
    daemon.commits(1)
    document = daemon.status()
    assert document["jobs"]["job"]["recoverable"]["step"] == 1
    assert not document["jobs"]["job"]["generations"][0]["fenced"]


def test_a_fenced_generation_cannot_attach_again(daemon: Node) -> None:
    daemon.commits(1)
    asker, late = daemon.puppet(0, 1, 2), daemon.puppet(0, 1, 1)
    asker.connect()
    asker.inventory()
    late.connect()
    with pytest.raises(Refused, match="is over: a newer one has begun"):
        late.grant()


def test_an_inherited_arena_keeps_its_snapshot_until_a_newer_one_is_committed(daemon: Node) -> None:
    arena = daemon.commits(1, 2)
    second = daemon.puppet(0, 1, 2)
    second.connect()
    second.inventory()
    assert second.attach(arena=arena, restored=snapshot_id(1, 2), passed=2) == arena
    assert second.slots() == {2: "COMMITTED"}
    until(lambda: second.words()["committed_step"] == 2, "the restored snapshot to be voted anew")
    assert second.words()["passed"] == 2
    second.snapshot(3)
    becomes(second, {3: "COMMITTED"})
    assert len(daemon.arenas()) == 1
    assert [one["number"] for one in daemon.generations()] == [2]


def test_naming_goes_on_counting_in_an_inherited_arena(daemon: Node) -> None:
    arena = daemon.commits(1)
    second = daemon.puppet(0, 1, 2)
    second.connect()
    second.inventory()
    second.attach(arena=arena, restored=snapshot_id(1, 1), passed=1)
    until(lambda: second.words()["next_step"] == 2, "the next name")
    assert second.words()["naming"] >= 3


def test_an_arena_that_does_not_hold_what_was_restored_is_not_inherited(daemon: Node) -> None:
    arena = daemon.commits(1)
    second = daemon.puppet(0, 1, 2)
    second.connect()
    second.inventory()
    with pytest.raises(SnapshotGone, match="does not hold step 9"):
        second.grant(arena=arena, restored=snapshot_id(1, 9), passed=9)


def test_attaching_beside_a_living_generation_without_an_inventory_is_refused(daemon: Node) -> None:
    daemon.pair()
    second = daemon.puppet(0, 2, 2)
    second.connect()
    with pytest.raises(Refused, match="take the inventory before attaching"):
        second.grant()
    assert not daemon.generations()[0]["fenced"]


def test_attaching_after_a_dead_generation_fences_it(daemon: Node) -> None:
    """The new generation began while this daemon was down, so nobody could take the inventory here."""
    daemon.commits(1)
    daemon.puppet(0, 1, 2).attach()
    assert [one["fenced"] for one in daemon.generations()] == [True, False]


def test_a_run_that_begins_afresh_frees_only_what_was_never_committed(daemon: Node) -> None:
    first, second = daemon.pair()
    first.snapshot(1)
    first.kill()
    second.kill()
    until(lambda: daemon.nobody_holds(), "both deaths")
    third = daemon.puppet(0, 1, 2)
    third.connect()
    third.inventory()
    third.attach()
    assert [one["number"] for one in daemon.generations()] == [2]
    third.snapshot(1)
    becomes(third, {1: "COMMITTED"})
    third.kill()
    until(lambda: daemon.nobody_holds(), "the death")
    mistaken = daemon.puppet(0, 1, 3)
    mistaken.connect()
    mistaken.inventory()
    mistaken.attach()
    mistaken.snapshot(1)
    becomes(mistaken, {1: "COMMITTED"})
    assert [one["number"] for one in daemon.generations()] == [2, 3]


def test_a_rank_that_outgrew_its_arena_moves_and_the_old_one_goes_after_the_next_commit(daemon: Node) -> None:
    trainer = daemon.puppet()
    old = trainer.attach()
    trainer.snapshot(1)
    becomes(trainer, {1: "COMMITTED"})
    new = trainer.grant(replaces=old, slot_bytes=4 * SLOT_BYTES, passed=1)
    trainer.order("lock")
    trainer.order("held")
    assert new != old
    assert len(daemon.arenas()) == 2
    trainer.snapshot(2)
    becomes(trainer, {2: "COMMITTED"})
    until(lambda: len(daemon.arenas()) == 1, "the smaller arena to be freed")
    assert new.hex() in daemon.arenas()[0].name


# --- reading -------------------------------------------------------------------------------------


def test_a_shard_is_read_through_a_descriptor_that_cannot_write(daemon: Node) -> None:
    arena = daemon.commits(1)
    reader = daemon.puppet(0, 1, 2)
    reader.connect()
    assert reader.order("open_shard", arena.hex(), 0, 1, 1) == "rank 0 at step 1"


def test_a_pinned_slot_is_kept_until_its_reader_lets_go(daemon: Node) -> None:
    trainer, reader = daemon.puppet(), daemon.puppet()
    arena = trainer.attach()
    slot = trainer.snapshot(1)
    becomes(trainer, {1: "COMMITTED"})
    reader.connect()
    reader.order("open_shard", arena.hex(), slot, 1, 1)
    trainer.snapshot(2)
    becomes(trainer, {1: "COMMITTED", 2: "COMMITTED"})
    reader.order("close_shard", arena.hex(), slot)
    becomes(trainer, {2: "COMMITTED"})


def test_a_reader_that_dies_lets_go(daemon: Node) -> None:
    trainer, reader = daemon.puppet(), daemon.puppet()
    arena = trainer.attach()
    slot = trainer.snapshot(1)
    becomes(trainer, {1: "COMMITTED"})
    reader.connect()
    reader.order("open_shard", arena.hex(), slot, 1, 1)
    trainer.snapshot(2)
    until(lambda: trainer.slots().get(2) == "COMMITTED", "the next commit")
    reader.kill()
    becomes(trainer, {2: "COMMITTED"})


def test_a_shard_that_is_gone_is_an_answer(daemon: Node) -> None:
    trainer, reader = daemon.puppet(), daemon.puppet()
    arena = trainer.attach()
    slot = trainer.snapshot(1)
    trainer.snapshot(2)
    becomes(trainer, {2: "COMMITTED"})
    reader.connect()
    with pytest.raises(SnapshotGone, match="is not in that slot any more"):
        reader.order("open_shard", arena.hex(), slot, 1, 1)


def test_a_quarantined_shard_is_never_offered_again(daemon: Node) -> None:
    arena = daemon.commits(1)
    reader = daemon.puppet(0, 1, 2)
    reader.connect()
    reader.order("quarantine", arena.hex(), 0, 1, 1, "block 3 fails its checksum")
    inventory = reader.inventory()
    assert inventory.shards == []
    assert "block 3 fails its checksum" in inventory.damaged[0]
    assert recovery.choose([inventory]).lost
    slots = daemon.generations()[0]["arenas"][0]["slots"]
    assert slots[0]["quarantine"] == "block 3 fails its checksum"
    with pytest.raises(SnapshotGone):
        reader.order("open_shard", arena.hex(), 0, 1, 1)


@pytest.mark.parametrize("newer", [False, True])
def test_why_a_committed_shard_was_set_aside_is_told_until_something_newer_is_committed(
    newer: bool, daemon: Node
) -> None:
    trainer, reader = daemon.puppet(), daemon.puppet()
    arena = trainer.attach()
    slot = trainer.snapshot(1)
    becomes(trainer, {1: "COMMITTED"})
    reader.connect()
    reader.order("quarantine", arena.hex(), slot, 1, 1, "block 3 fails its checksum")
    trainer.order("ring")
    until(lambda: trainer.slots() == {}, "the end of what is damaged")
    if newer:
        trainer.snapshot(2)
        becomes(trainer, {2: "COMMITTED"})
    trainer.kill()
    until(lambda: daemon.counter("deaths"), "its death")
    inventory = reader.inventory()
    told = f"the shard of rank 0 of {snapshot_id(1, 1)} was set aside: block 3 fails its checksum"
    assert inventory.damaged == ([] if newer else [told])
    choice = recovery.choose([inventory])
    assert choice.lost is not newer and (told in choice.why) is not newer


# --- freeing -------------------------------------------------------------------------------------


def test_the_memory_is_freed_once_every_rank_closed_its_run(daemon: Node) -> None:
    first, second = daemon.pair()
    first.order("close", first.arena.hex())
    assert len(daemon.arenas()) == 2
    second.order("close", second.arena.hex())
    assert daemon.arenas() == []
    assert daemon.status()["jobs"] == {}
    first.kill()
    until(lambda: daemon.status()["connections"] <= 2, "the end of the first")
    assert daemon.counter("deaths") == 0


def test_only_the_holder_closes_a_run(daemon: Node) -> None:
    trainer, stranger = daemon.puppet(), daemon.puppet(job="other")
    trainer.attach()
    stranger.connect()
    with pytest.raises(Refused, match="only the trainer that holds"):
        stranger.order("close", trainer.arena.hex())


def test_gc_frees_what_nobody_holds_and_names_what_is_held(daemon: Node) -> None:
    daemon.commits(1)
    other = daemon.puppet(job="other")
    other.attach()
    reply = daemon.ask(wire.Collect(job="nothing of that name"))
    assert isinstance(reply, wire.Collected)
    assert reply.arenas == 0
    reply = daemon.ask(wire.Collect())
    assert isinstance(reply, wire.Collected)
    assert reply.arenas == 1
    assert reply.freed_bytes > 2 * SLOT_BYTES
    assert reply.kept == [f"job 'other', generation 1-010101, rank 0 is held by pid {other.pid}"]
    assert list(daemon.status()["jobs"]) == ["other"]


def test_an_arena_that_nobody_comes_back_for_is_freed_after_the_lease(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path, "--lease", "1") as daemon:
        daemon.start().commits(1)
        until(lambda: not daemon.arenas(), "the lease to end")


# --- the daemon itself ---------------------------------------------------------------------------


def test_a_job_that_spans_nodes_is_refused_with_a_sentence(daemon: Node) -> None:
    trainer = daemon.puppet(0, 4)
    trainer.connect()
    with pytest.raises(Refused, match="the others' nodes were not named, so this run trains unprotected"):
        trainer.grant(local_ranks=[0, 1])


def test_ranks_that_disagree_are_refused(daemon: Node) -> None:
    first, second = daemon.puppet(0, 2), daemon.puppet(1, 2)
    first.attach()
    second.connect()
    with pytest.raises(Refused, match="disagrees with its peers"):
        second.grant(every=7)


def test_an_impossible_size_is_refused(daemon: Node) -> None:
    trainer = daemon.puppet()
    trainer.connect()
    with pytest.raises(Refused, match="an arena that cannot be"):
        trainer.grant(block_bytes=4095)


def test_nothing_is_served_before_hello(daemon: Node) -> None:
    with DoorClient.connect(daemon.socket) as door, pytest.raises(Refused, match="must be a Hello"):
        door.ask(wire.AskStatus())


def test_an_idle_daemon_is_small(daemon: Node) -> None:
    assert psutil.Process(daemon.process.pid).memory_info().rss < 60e6


def test_a_daemon_that_keeps_a_large_arena_is_small(daemon: Node) -> None:
    trainer = daemon.puppet()
    trainer.attach(slot_bytes=64 << 20, block_bytes=1 << 20)
    assert daemon.status()["memory"]["arenas_bytes"] > 128 << 20
    assert psutil.Process(daemon.process.pid).memory_info().rss < 60e6


def test_a_stopped_daemon_says_nothing_and_its_clients_give_up(daemon: Node) -> None:
    psutil.Process(daemon.process.pid).suspend()
    with DoorClient.connect(daemon.socket) as door, pytest.raises(SnapshotError, match="does not answer in time"):
        door.ask(wire.Hello("tool", 0), timeout_s=0.05)


# --- coming back within one process ----------------------------------------------------------------


def test_a_trainer_whose_connection_broke_takes_up_the_same_arena(daemon: Node) -> None:
    trainer = daemon.puppet()
    arena = trainer.attach()
    trainer.snapshot(1)
    becomes(trainer, {1: "COMMITTED"})
    trainer.order("disconnect")
    assert trainer.attach(arena=arena) == arena
    assert trainer.slots() == {1: "COMMITTED"}
    assert trainer.words()["committed_step"] == 1
    trainer.snapshot(2)
    becomes(trainer, {2: "COMMITTED"})
    assert len(daemon.arenas()) == 1


def test_a_process_that_gave_up_one_run_may_begin_the_next(daemon: Node) -> None:
    trainer = daemon.puppet()
    arena = trainer.attach()
    trainer.snapshot(1)
    becomes(trainer, {1: "COMMITTED"})
    trainer.order("disconnect")
    until(lambda: daemon.status()["connections"] == 1, "the end of the first connection")
    trainer.connect()
    trainer.generation = 2
    assert [shard.snapshot for shard in trainer.inventory().shards] == [snapshot_id(1, 1)]
    trainer.attach(arena=arena, restored=snapshot_id(1, 1), passed=1)
    trainer.snapshot(2)
    becomes(trainer, {2: "COMMITTED"})


def test_a_process_does_not_begin_a_second_run_of_a_job_beside_its_first(daemon: Node) -> None:
    trainer = daemon.puppet()
    trainer.attach()
    with pytest.raises(RankClaimed, match=f"living process {trainer.pid}"):
        trainer.inventory()


def test_what_a_resumed_run_left_behind_goes_with_its_first_commit(daemon: Node) -> None:
    trainer = daemon.puppet()
    old = trainer.attach()
    trainer.snapshot(1)
    becomes(trainer, {1: "COMMITTED"})
    trainer.grant(replaces=old, slot_bytes=4 * SLOT_BYTES, passed=1)
    trainer.order("lock")
    trainer.order("held")
    trainer.kill()
    until(daemon.nobody_holds, "the death to be seen")
    second = daemon.puppet(generation=2)
    second.connect()
    second.inventory()
    second.attach(arena=old, restored=snapshot_id(1, 1), passed=1)
    second.snapshot(2)
    becomes(second, {2: "COMMITTED"})
    until(lambda: len(daemon.arenas()) == 1, "the arena that the first run had just begun to use to be freed")
    assert old.hex() in daemon.arenas()[0].name
