"""SIGKILL of the daemon at each of its named points: the next one adopts what is there and loses no commit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from snapshotd import recovery
from snapshotd.errors import SnapshotError
from snapshotd.faults import DAEMON_POINTS, ON_SEVERAL_NODES
from tests.cluster.daemons import Node, becomes, node, until
from tests.cluster.puppet import Puppet, snapshot_id


class Died(Exception):
    """The daemon reached its crash point."""


class Story:
    """Two ranks train, die, come back, train on and close. Stops with `Died` where the daemon does."""

    def __init__(self, daemon: Node) -> None:
        self.daemon, self.committed, self.closing = daemon, 0, False

    def play(self) -> None:
        try:
            self._play()
        except SnapshotError:
            until(self.daemon.ended, "the daemon's end, which the puppets noticed")
            raise Died from None

    def _play(self) -> None:
        first, second = self.daemon.pair()
        for step in (1, 2):
            self._commit(step, first, second)
        first.kill()
        second.kill()
        third, fourth = self.daemon.puppet(0, 2, 2), self.daemon.puppet(1, 2, 2)
        resume(third, fourth)
        self._commit(3, third, fourth)
        self.closing = True
        for puppet in (third, fourth):
            puppet.order("close", puppet.arena.hex())

    def _commit(self, step: int, *puppets: Puppet) -> None:
        self._wait(lambda: all(puppet.words()["next_step"] == step for puppet in puppets), f"step {step} to be named")
        for puppet in puppets:
            puppet.snapshot(step)
        self._wait(lambda: all(puppet.slots() == {step: "COMMITTED"} for puppet in puppets), f"commit of step {step}")
        self.committed = step

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        until(lambda: condition() or self.daemon.ended(), what)
        if self.daemon.ended():
            raise Died


def resume(*puppets: Puppet) -> int:
    """What a restarted job does: take the inventory, choose, inherit. Returns the step that it goes on from."""
    inventories = []
    for puppet in puppets:
        puppet.connect()
        inventories.append(puppet.inventory())
    choice = recovery.choose(inventories)
    if choice.snapshot is None:
        assert not choice.lost, choice.why
        for puppet in puppets:
            puppet.attach()
        return 0
    step = choice.snapshot.step
    for rank, puppet in enumerate(puppets):
        shard = choice.sources[rank].shard
        made_by = choice.snapshot.generation.number
        text = puppet.order("open_shard", shard.arena.hex(), shard.slot, made_by, step)
        assert text == f"rank {rank} at step {step}"
        puppet.order("close_shard", shard.arena.hex(), shard.slot)
    for rank, puppet in enumerate(puppets):
        puppet.attach(arena=choice.sources[rank].shard.arena, restored=choice.snapshot, passed=step)
    return step


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("point", [point for point in DAEMON_POINTS if not point.startswith(ON_SEVERAL_NODES)])
def test_a_daemon_killed_at_any_point_loses_nothing_that_was_committed(
    point: str, count: int, shm_dir: Path, tmp_path: Path
) -> None:
    with node(shm_dir, tmp_path) as daemon:
        daemon.start("--crash", f"{point}:{count}")
        story = Story(daemon)
        with pytest.raises(Died):
            story.play()
        assert daemon.process.wait() == -signal.SIGKILL
        for puppet in daemon.puppets:
            puppet.kill()
        daemon.start()
        assert daemon.status()["damaged"] == []
        locks = {path.stem for path in daemon.root.glob("*.lock")} - {"daemon"}
        assert locks == {path.stem for path in daemon.arenas()}
        if story.closing:
            assert daemon.arenas() == []
            return
        fifth, sixth = daemon.puppet(0, 2, 3), daemon.puppet(1, 2, 3)
        step = resume(fifth, sixth)
        assert step >= story.committed
        for puppet in (fifth, sixth):
            puppet.snapshot(step + 1)
        for puppet in (fifth, sixth):
            becomes(puppet, {step + 1: "COMMITTED"})
        assert len(daemon.arenas()) == 2
        for puppet in (fifth, sixth):
            puppet.order("close", puppet.arena.hex())
        assert daemon.arenas() == []
        assert daemon.counter("errors") == 0


def test_living_trainers_go_on_with_the_next_daemon(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon:
        first, second = daemon.start().pair()
        for puppet in (first, second):
            puppet.snapshot(1)
        for puppet in (first, second):
            becomes(puppet, {1: "COMMITTED"})
        daemon.kill()
        for puppet in (first, second):
            puppet.snapshot(2)
        daemon.start()
        for puppet in (first, second):
            becomes(puppet, {2: "COMMITTED"})  # adopted, looked at, decided: nobody had to come back for that
            puppet.attach(arena=puppet.arena)
        assert first.words()["passed"] == 2
        for puppet in (first, second):
            puppet.snapshot(3)
        for puppet in (first, second):
            becomes(puppet, {3: "COMMITTED"})
        assert len(daemon.arenas()) == 2


def test_a_trainer_that_dies_while_no_daemon_runs_is_found_dead_by_the_next(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon:
        trainer = daemon.start().puppet()
        trainer.attach()
        trainer.snapshot(1)
        becomes(trainer, {1: "COMMITTED"})
        trainer.fill(2)
        daemon.kill()
        trainer.kill()
        (arena,) = daemon.start().generations()[0]["arenas"]
        assert not arena["held"]
        assert sorted(slot["state"] for slot in arena["slots"]) == ["COMMITTED", "EMPTY"]


def test_a_trainer_that_dies_after_the_restart_is_noticed_too(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon:
        trainer = daemon.start().puppet()
        trainer.attach()
        daemon.kill()
        daemon.start()
        assert not daemon.nobody_holds()
        trainer.kill()
        until(daemon.nobody_holds, "the death to be seen")


def test_an_adopted_trainer_still_owns_its_rank(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path, "--claim-wait", "0.1") as daemon:
        first = daemon.start().puppet()
        first.attach()
        daemon.kill()
        daemon.start()
        second = daemon.puppet(generation=2)
        second.connect()
        with pytest.raises(SnapshotError, match=f"living process {first.pid}"):
            second.inventory()


def test_fencing_is_remembered_by_the_next_daemon(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon:
        daemon.start().commits(1)
        asker = daemon.puppet(generation=2)
        asker.connect()
        asker.inventory()
        daemon.kill()
        daemon.start()
        assert daemon.generations()[0]["fenced"]


def test_sigterm_ends_the_daemon_and_keeps_the_arenas(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon:
        daemon.start().commits(1)
        daemon.process.terminate()
        assert daemon.process.wait() == 0
        assert not daemon.socket.exists()
        assert daemon.start().status()["jobs"]["job"]["recoverable"]["step"] == 1


def test_a_second_daemon_on_the_same_root_is_refused_by_pid(shm_dir: Path, tmp_path: Path) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    with node(shm_dir, tmp_path) as daemon, node(shm_dir, other_folder) as other:
        daemon.start()
        assert other.spawn().wait() == 1
        assert f"the daemon with pid {daemon.process.pid} has {daemon.root} already" in other.words()


def test_a_stopped_daemon_keeps_its_root(shm_dir: Path, tmp_path: Path) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    with node(shm_dir, tmp_path) as daemon, node(shm_dir, other_folder) as other:
        daemon.start()
        psutil.Process(daemon.process.pid).suspend()
        assert other.spawn().wait() == 1


def test_a_second_daemon_on_the_same_socket_is_refused(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon, node(shm_dir / "elsewhere", tmp_path) as other:
        (shm_dir / "elsewhere").mkdir()
        daemon.start()
        assert other.spawn().wait() == 1
        assert f"a daemon listens at {daemon.socket} already" in other.words()
        assert daemon.answers()


def test_the_socket_of_a_killed_daemon_is_replaced(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon:
        daemon.start().kill()
        assert daemon.socket.exists()
        daemon.start()
        assert daemon.answers()


def test_the_first_commit_of_a_resumed_run_survives_a_daemon_that_dies_with_it(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon:
        arena = daemon.start().commits(1)
        second = daemon.puppet(generation=2)
        second.connect()
        second.inventory()
        second.attach(arena=arena, restored=snapshot_id(1, 1), passed=1)
        daemon.kill()
        second.kill()
        assert daemon.start().status()["jobs"]["job"]["recoverable"]["step"] == 1
