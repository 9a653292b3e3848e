"""The scrubber over a real keeper and real arenas: what it reads, when, and what becomes of what it finds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from snapshotd import _native, scrub, wire
from snapshotd.arena import SLOTS, ArenaFile
from snapshotd.config import DaemonConfig
from snapshotd.keeper import Keeper
from snapshotd.metrics import Metrics
from snapshotd.peers import Peers
from snapshotd.root import Root
from snapshotd.scrub import Scrubber
from snapshotd.wire import SnapshotId

BLOCK, BLOCKS, STEP, EVERY_S = 4096, 4, 7, 300.0
CONFIG = DaemonConfig(scrub_bandwidth=1 << 40, scrub_every_s=EVERY_S)


class Hands:
    """A clock that is set by hand."""

    now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


class AtOnce(Executor):
    """Does what it is given where it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@dataclass
class Done:
    """What a repair says of itself."""

    blocks: list[int] = field(default_factory=list)
    why: str = ""
    beyond_help: bool = False


class Scene:
    """A root with one committed shard, a keeper that adopted it, and a scrubber."""

    def __init__(self, path: Path, config: DaemonConfig, loop: asyncio.AbstractEventLoop) -> None:
        root = Root.open(path)
        total = _native.Arena.bytes_needed(SLOTS, BLOCK * BLOCKS, BLOCK)
        draft = root.draft("job", 0, total)
        _native.reserve(draft.fd, total)
        owner = {
            "generation": 1,
            "nonce": b"n" * 16,
            "rank": 0,
            "world_size": 1,
            "local_world": 1,
            "every": 1,
            "pid": 0,
        }
        made = root.finish(draft, job="job", local_index=0, slot_bytes=BLOCK * BLOCKS, block_bytes=BLOCK, owner=owner)
        self.commit(made, STEP)
        made.close()
        self.clock, self.metrics, self.failures = Hands(), Metrics(), list[object]()
        self.keeper = Keeper(root, config, self.metrics, self.clock, loop, lambda: None)
        self.keeper.adopt()
        (self.file,) = self.keeper.files.values()
        self.scrubber = Scrubber(
            self.keeper, config, self.clock, lambda *failure: self.failures.append(failure), AtOnce
        )

    @staticmethod
    def commit(file: ArenaFile, step: int) -> int:
        """A committed snapshot in a free slot."""
        native = file.native
        slot = native.claim(generation=1, nonce=b"n" * 16, step=step, rank=0, world_size=1, fingerprint=bytes(32))
        native.set_block_crcs(slot, BLOCK * BLOCKS - 9)
        native.publish(slot, BLOCK * BLOCKS - 9)
        assert native.advance(slot, _native.FULL, _native.COMMITTED)
        native.committed_step = step
        return slot

    def flip(self, block: int, slot: int = 0) -> None:
        with self.file.native.slot_view(slot) as view:
            view[block * BLOCK] ^= 1

    async def scrub(self, later_s: float = EVERY_S) -> None:
        """So much later, the timer's call, and everything that it begins."""
        self.clock.now_s += later_s
        task = self.scrubber.consider()
        if task is not None:
            await task
        assert not self.failures

    def counts(self) -> tuple[int, int, int]:
        """Blocks checked, found, repaired."""
        checked, found, repaired = (self.metrics.count(f"scrub_{one}") for one in ("checked", "found", "repaired"))
        return checked, found, repaired

    @property
    def snapshot(self) -> SnapshotId:
        """What is committed in the first slot."""
        return SnapshotId(self.file.generation, STEP)

    @property
    def rotten(self) -> list[str]:
        told: list[str] = self.scrubber.facts()["rotten"]
        return told


Play = Callable[[Scene], Awaitable[None]]


@pytest.fixture
def play(shm_dir: Path) -> Iterator[Callable[..., None]]:
    def run(do: Play, config: DaemonConfig = CONFIG) -> None:
        async def whole() -> None:
            scene = Scene(shm_dir / "root", config, asyncio.get_running_loop())
            try:
                await scene.scrub(0.0)  # sees what is there; its time begins
                await do(scene)
                await scene.scrubber.close()
                assert not any(scene.file.pins.values()), "nothing is held in the end"
            finally:
                scene.keeper.close()

        asyncio.run(whole())

    yield run


@pytest.fixture
def one_block_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "PART_BYTES_MAX", BLOCK)


def mending(scene: Scene, outcome: Callable[[list[int]], Done]) -> list[list[int]]:
    """Have a repair that answers so, and puts right what it says; returns the list of what it is asked for."""
    asked: list[list[int]] = []

    async def repair(
        file: ArenaFile, slot: int, snapshot: SnapshotId, bad: list[int], cancelled: Callable[[], bool]
    ) -> Done:
        assert file.pins[slot] == 1, "nobody may give the slot away meanwhile"
        assert snapshot.step == STEP and not cancelled()
        asked.append(bad)
        done = outcome(bad)
        for block in done.blocks:
            scene.flip(block, slot)
        return done

    scene.scrubber.repair = repair
    return asked


def test_what_is_committed_is_read_once_its_time_has_come_and_again_after_as_long(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        assert scene.counts() == (0, 0, 0)
        await scene.scrub(EVERY_S - 1)
        assert scene.counts() == (0, 0, 0)
        await scene.scrub(1)
        assert scene.counts() == (BLOCKS, 0, 0)
        await scene.scrub(EVERY_S - 1)
        assert scene.counts() == (BLOCKS, 0, 0)
        await scene.scrub(1)
        assert scene.counts() == (2 * BLOCKS, 0, 0)
        assert scene.rotten == []

    play(do)


def test_bad_blocks_are_repaired_and_counted(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        asked = mending(scene, Done)
        scene.flip(1)
        scene.flip(3)
        await scene.scrub()
        assert (asked, scene.counts(), scene.rotten) == ([[1, 3]], (BLOCKS, 2, 2), [])
        await scene.scrub()
        assert (asked, scene.counts()) == ([[1, 3]], (2 * BLOCKS, 2, 2)), "they are good now"
        assert not scene.file.quarantined

    play(do)


def test_what_cannot_be_repaired_now_is_told_kept_and_tried_again(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        asked = mending(scene, lambda bad: Done(why="nobody answers"))
        scene.flip(2)
        for round_ in (1, 2):
            await scene.scrub()
            assert (asked, scene.counts()) == ([[2]] * round_, (round_ * BLOCKS, 1, 0)), "found once"
            (told,) = scene.rotten
            assert "rank 0's shard has 1 block whose checksum fails, not repaired: nobody answers" in told
            assert not scene.file.quarantined
        mending(scene, Done)
        await scene.scrub()
        assert (scene.counts(), scene.rotten) == ((3 * BLOCKS, 1, 1), [])

    play(do)


def test_what_can_never_be_repaired_is_set_aside_and_told_until_something_newer_is_committed(
    play: Callable[..., None],
) -> None:
    async def do(scene: Scene) -> None:
        mending(scene, lambda bad: Done(why="too few are left", beyond_help=True))
        scene.flip(2)
        await scene.scrub()
        assert scene.metrics.count("quarantined") == 1
        (told,) = scene.rotten
        assert "set aside: 1 block with a checksum that fails cannot be repaired: too few are left" in told
        scene.commit(scene.file, STEP + 1)
        assert scene.rotten == []

    play(do)


def test_without_peers_a_bad_block_is_set_aside(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        scene.flip(0)
        await scene.scrub()
        assert scene.metrics.count("quarantined") == 1
        assert "no other node protects it" in scene.rotten[0]

    play(do)


def test_nothing_is_read_while_there_is_other_work_nor_where_it_is_off(play: Callable[..., None]) -> None:
    async def busy(scene: Scene) -> None:
        scene.scrubber.idle = lambda: False
        await scene.scrub()
        assert scene.counts() == (0, 0, 0)
        scene.scrubber.idle = lambda: True
        await scene.scrub(0)
        assert scene.counts() == (BLOCKS, 0, 0)

    play(busy)


def test_it_can_be_switched_off(play: Callable[..., None]) -> None:
    async def off(scene: Scene) -> None:
        await scene.scrub()
        assert scene.counts() == (0, 0, 0)

    play(off, replace(CONFIG, scrub_bandwidth=0))


def test_a_slot_is_held_for_a_part_at_a_time_and_work_that_comes_up_goes_first(
    play: Callable[..., None], one_block_a_part: None
) -> None:
    async def do(scene: Scene) -> None:
        looks = iter([True, True, False])
        held: list[int] = []

        def idle() -> bool:
            held.append(scene.file.pins[0])
            return next(looks, False)

        scene.scrubber.idle = idle
        await scene.scrub()
        assert (scene.counts(), set(held)) == ((1, 0, 0), {0})
        scene.scrubber.idle = lambda: True
        await scene.scrub(0)
        assert scene.counts() == (BLOCKS, 0, 0), "it goes on where it was"

    play(do)


@pytest.mark.parametrize("what", ["another snapshot", "a recovery"])
def test_what_changed_between_two_parts_waits_its_time_anew(
    what: str, play: Callable[..., None], one_block_a_part: None
) -> None:
    async def do(scene: Scene) -> None:
        looks = iter([True, True, False])
        scene.scrubber.idle = lambda: next(looks, False)
        await scene.scrub()
        assert scene.counts() == (1, 0, 0)
        scene.scrubber.idle = lambda: True
        if what == "a recovery":
            scene.keeper.fence("job")
        else:
            scene.file.native.empty(0)
            assert scene.commit(scene.file, STEP + 1) == 0
        await scene.scrub(EVERY_S - 1)
        assert scene.counts() == (1, 0, 0)
        await scene.scrub(1)
        assert scene.counts() == (1, 0, 0), "its time began with the first look after the change"
        await scene.scrub(EVERY_S)
        assert scene.counts() == (1 + BLOCKS, 0, 0)

    play(do)


def test_the_end_of_the_daemon_ends_a_slow_reading(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        scene.clock.now_s += EVERY_S
        task = scene.scrubber.consider()
        await scene.scrubber.close()
        assert task is not None and task.done() and scene.counts()[0] <= 1
        assert scene.scrubber.consider() is None

    play(do, replace(CONFIG, scrub_bandwidth=1))


# --- what a peer came upon


async def mended(scene: Scene, bad: list[int], snapshot: SnapshotId | None = None) -> bool:
    """A peer came upon these blocks: whether the scrubber took them, once it is done with them."""
    task = scene.scrubber.mend(scene.file, 0, snapshot or scene.snapshot, bad)
    if task is not None:
        assert scene.file.pins[0] == 1, "held from now on, and not only from when the repair begins"
        await task
    assert not scene.failures
    return task is not None


def test_what_a_peer_found_is_repaired_at_once_and_besides_other_work(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        scene.scrubber.idle = lambda: False
        asked = mending(scene, Done)
        scene.flip(1)
        scene.flip(3)
        assert await mended(scene, [1, 3])
        assert (asked, scene.counts(), scene.rotten) == ([[1, 3]], (0, 2, 2), [])
        assert not scene.file.quarantined

    play(do)


def test_what_a_peer_found_and_nobody_can_repair_now_is_told_and_tried_again_with_the_next_reading(
    play: Callable[..., None],
) -> None:
    async def do(scene: Scene) -> None:
        mending(scene, lambda bad: Done(why="nobody answers"))
        scene.flip(2)
        assert await mended(scene, [2])
        assert "1 block whose checksum fails, not repaired: nobody answers" in scene.rotten[0]
        assert not scene.file.quarantined
        mending(scene, Done)
        await scene.scrub()
        assert (scene.counts(), scene.rotten) == ((BLOCKS, 1, 1), [])

    play(do)


def test_what_a_peer_found_and_nobody_can_ever_repair_is_set_aside(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        mending(scene, lambda bad: Done(why="too few are left", beyond_help=True))
        scene.flip(2)
        assert await mended(scene, [2])
        assert scene.metrics.count("quarantined") == 1 and "set aside" in scene.rotten[0]

    play(do)


@pytest.mark.parametrize("what", ["another snapshot", "an earlier generation", "a recovery", "no peers", "the end"])
def test_what_is_not_the_scrubbers_to_repair_is_left_to_be_set_aside(what: str, play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        asked = mending(scene, Done)
        snapshot = scene.snapshot
        if what == "another snapshot":
            snapshot = SnapshotId(snapshot.generation, STEP + 1)
        elif what == "an earlier generation":
            scene.file.amend(generation=2)
        elif what == "a recovery":
            scene.keeper.fence("job")
        elif what == "no peers":
            scene.scrubber.repair = None
        else:
            await scene.scrubber.close()
        assert not await mended(scene, [1], snapshot)
        assert asked == []

    play(do)


def test_nothing_is_repaired_for_a_peer_where_the_scrubber_is_off(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        asked = mending(scene, Done)
        assert not await mended(scene, [1])
        assert asked == []

    play(do, replace(CONFIG, scrub_bandwidth=0))


def test_the_end_of_the_daemon_waits_for_a_repair(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        begun, goes_on = asyncio.Event(), asyncio.Event()
        told: list[bool] = []

        async def repair(
            file: ArenaFile, slot: int, snapshot: SnapshotId, bad: list[int], cancelled: Callable[[], bool]
        ) -> Done:
            begun.set()
            await goes_on.wait()
            told.append(cancelled())
            return Done(why="this daemon ended")

        scene.scrubber.repair = repair
        assert scene.scrubber.mend(scene.file, 0, scene.snapshot, [1]) is not None
        await begun.wait()
        end = asyncio.ensure_future(scene.scrubber.close())
        await asyncio.sleep(0)
        assert not end.done()
        goes_on.set()
        await end
        assert told == [True], "it is told that the daemon ends"

    play(do)


def test_no_other_doubt_about_an_arena_is_looked_into_before_the_repair_is_over(play: Callable[..., None]) -> None:
    async def do(scene: Scene) -> None:
        begun, goes_on = asyncio.Event(), asyncio.Event()

        async def repair(
            file: ArenaFile, slot: int, snapshot: SnapshotId, bad: list[int], cancelled: Callable[[], bool]
        ) -> Done:
            begun.set()
            await goes_on.wait()
            return Done(bad)

        scene.scrubber.repair = repair
        peers = SimpleNamespace(keeper=scene.keeper, mend=scene.scrubber.mend, _loop=asyncio.get_running_loop())
        found: Future[list[int]] = Future()
        found.set_result([1])
        scene.file.pins[0] += 1
        scene.file.checking = True
        doubt = wire.Doubt("job", scene.file.generation, scene.file.arena_id, 0, scene.snapshot, "it rotted")
        Peers._doubt_settled(cast(Peers, peers), scene.file, doubt, found)
        await begun.wait()
        assert scene.file.checking
        goes_on.set()
        await scene.scrubber.close()
        assert not scene.file.checking and not scene.file.quarantined

    play(do)
