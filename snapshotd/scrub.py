"""The scrubber: reads again what lies committed in memory, before somebody needs it.

`consider` is called once a second. What has been committed for `scrub_every` is read in parts, at `scrub_bandwidth`, on
one thread of low priority, while nothing is encoded or rebuilt. A slot is held for one part at a time, so that it is
given away as soon as it is of no use. Bad blocks go to `repair` at once, those that a peer came upon too (`mend`). What
that cannot repair is said in `status` and tried again with every reading; what nobody can ever repair is set aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from snapshotd import wire
from snapshotd.arena import ArenaFile
from snapshotd.clock import Clock
from snapshotd.config import DaemonConfig
from snapshotd.generation import views
from snapshotd.keeper import Keeper
from snapshotd.ledger import Progress
from snapshotd.metrics import Repeats
from snapshotd.nice import be_nice
from snapshotd.wire import SnapshotId

PART_BYTES_MAX = 8 << 20  # a few milliseconds of a core
PART_S = 0.25
log = logging.getLogger("snapshotd")


class Outcome(Protocol):
    """What became of a repair, as `repair.Repaired` has it."""

    blocks: list[int]
    why: str
    beyond_help: bool


Repair = Callable[[ArenaFile, int, SnapshotId, list[int], Callable[[], bool]], Awaitable[Outcome]]


@dataclass
class _Spot:
    """A slot that holds something committed, and how far it is read. `fenced`: a recovery has begun."""

    file: ArenaFile
    slot: int
    snapshot: SnapshotId
    fenced: bool
    due_s: float
    block: int = 0
    bad: set[int] = field(default_factory=set)
    why: str = ""

    def __str__(self) -> str:
        whose = "this node's parity" if self.file.is_parity else f"rank {self.file.owner.rank}'s shard"
        return f"job {self.file.job!r}, {self.snapshot}: {whose}"


def one_nice_thread() -> Executor:
    """Where blocks are read."""
    return ThreadPoolExecutor(1, "snapshotd-scrubber", be_nice)


def _counted(blocks: Collection[int]) -> str:
    return "1 block" if len(blocks) == 1 else f"{len(blocks)} blocks"


class Scrubber:
    """Over the arenas of the keeper. `idle` says that no work waits for this node's cores and network; `failed` is told
    of an exception of our own. `repair` is None where there are no peers to repair from."""

    def __init__(
        self,
        keeper: Keeper,
        config: DaemonConfig,
        clock: Clock,
        failed: Callable[[str, BaseException | None], None],
        threads: Callable[[], Executor] = one_nice_thread,
    ) -> None:
        self._keeper, self._config, self._clock, self._failed = keeper, config, clock, failed
        self._threads = threads
        self._executor: Executor | None = None
        self.idle: Callable[[], bool] = lambda: True
        self.repair: Repair | None = None
        self._repeats = Repeats(log, clock)
        self._spots: dict[tuple[bytes, int], _Spot] = {}
        self._lost: dict[bytes, tuple[int, str]] = {}  # by arena: its last commit, and what was set aside then
        self._task: asyncio.Task[None] | None = None
        self._mending: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # a repair of a checksum writes the whole table
        self._ended = asyncio.Event()

    def consider(self) -> asyncio.Task[None] | None:
        """Begin to read if something is due. Returns the task that does, if it was begun now."""
        if not self._config.scrub_bandwidth or self._ended.is_set() or self._task is not None:
            return None
        if self._due() is not None and self.idle():
            self._task = asyncio.get_running_loop().create_task(self._read_what_is_due())
            self._task.add_done_callback(self._over)
        return self._task

    def mend(self, file: ArenaFile, slot: int, snapshot: SnapshotId, bad: list[int]) -> asyncio.Task[None] | None:
        """Repair blocks now that a peer came upon and that fail here too. None where they are to be set aside: nobody
        can repair them, or they are not of what this generation has committed. What a recovery chose from, or restores,
        is left as it was found."""
        self._look()
        spot = self._spots.get((file.arena_id, slot))
        if self._ended.is_set() or self.repair is None or not self._config.scrub_bandwidth:
            return None
        if spot is None or spot.snapshot != snapshot or spot.fenced or snapshot.generation != file.generation:
            return None
        file.pins[slot] += 1  # before anything else can give it away
        task = asyncio.get_running_loop().create_task(self._mend(spot, bad))
        self._mending.add(task)
        task.add_done_callback(self._mended)
        return task

    async def _mend(self, spot: _Spot, bad: list[int]) -> None:
        try:
            await self._settle(spot, range(0), bad)
        finally:
            self._keeper.unpin(spot.file, spot.slot)

    def _mended(self, task: asyncio.Task[None]) -> None:
        self._mending.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed("repairing what a peer found damaged", task.exception())

    async def close(self) -> None:
        """End, and wait until no thread touches an arena any more."""
        self._ended.set()
        tasks = [*self._mending, *([self._task] if self._task is not None else [])]
        if tasks:
            await asyncio.wait(tasks, timeout=30.0)
        if self._executor is not None:
            self._executor.shutdown()

    def facts(self) -> dict[str, Any]:
        """For the status: the settings, and a sentence for each slot with blocks that could not be repaired."""
        self._look()
        rotten = [
            wire.clip(f"{spot} has {_counted(spot.bad)} whose checksum fails, not repaired: {spot.why}")
            for spot in self._spots.values()
            if spot.bad
        ]
        files = self._keeper.files
        self._lost = {
            arena: lost for arena, lost in self._lost.items()
            if arena in files and files[arena].native.committed_step == lost[0]
        }  # fmt: skip
        rotten += [sentence for _, sentence in self._lost.values()]
        return {"bandwidth": self._config.scrub_bandwidth, "every_s": self._config.scrub_every_s, "rotten": rotten}

    def _over(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and task.exception() is not None:
            self._failed("reading what is committed again", task.exception())

    # --- what is to be read -----------------------------------------------------------------------

    def _due(self) -> _Spot | None:
        """What to go on with: a slot that is half read, else the one that waits longest."""
        self._look()
        now_s = self._clock.monotonic_s()
        due = [spot for spot in self._spots.values() if spot.due_s <= now_s]
        return min(due, key=lambda spot: (not spot.block, spot.due_s), default=None)

    def _look(self) -> None:
        """What is committed now. Everything waits its time anew once a recovery begins or ends: hands off meanwhile."""
        known, self._spots = self._spots, {}
        later_s = self._clock.monotonic_s() + self._config.scrub_every_s
        for file in self._keeper.files.values():
            for view in views(file) if not file.awaits_rebuild else []:
                kept = Progress.FULL if file.is_foster else Progress.COMMITTED  # nobody votes on a foster
                if view.progress is not kept or view.snapshot is None:
                    continue
                spot = _Spot(file, view.index, view.snapshot, file.owner.fenced, later_s)
                last = known.get((file.arena_id, view.index))
                same = last is not None and (last.snapshot, last.fenced) == (spot.snapshot, spot.fenced)
                self._spots[file.arena_id, view.index] = last if same and last is not None else spot

    # --- reading ----------------------------------------------------------------------------------

    async def _read_what_is_due(self) -> None:
        while not self._ended.is_set() and self.idle() and (spot := self._due()) is not None:
            count = await self._read_part(spot)
            pause_s = count * spot.file.block_bytes / self._config.scrub_bandwidth
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), pause_s)

    async def _read_part(self, spot: _Spot) -> int:
        """The next blocks of a slot; returns how many. It is held meanwhile, and while they are repaired."""
        file, slot = spot.file, spot.slot
        blocks = -(-file.native.slot(slot).file_bytes // file.block_bytes)
        part_bytes = min(PART_BYTES_MAX, self._config.scrub_bandwidth * PART_S)
        count = min(max(1, int(part_bytes // file.block_bytes)), blocks - spot.block)
        file.pins[slot] += 1
        try:
            bad = await self._run(file, slot, spot.block, count)
            self._keeper.metrics.add("scrub_checked", count)
            await self._settle(spot, range(spot.block, spot.block + count), bad)
        finally:
            self._keeper.unpin(file, slot)
        spot.block += count
        if spot.block >= blocks:
            spot.block, spot.due_s = 0, self._clock.monotonic_s() + self._config.scrub_every_s
        return count

    async def _run(self, file: ArenaFile, slot: int, first: int, count: int) -> list[int]:
        if self._executor is None:
            self._executor = self._threads()
        return await asyncio.get_running_loop().run_in_executor(self._executor, file.bad_blocks, slot, first, count)

    async def _settle(self, spot: _Spot, read: range, bad: list[int]) -> None:
        """These blocks were read, and those of them are bad."""
        left = set(bad)
        self._keeper.metrics.add("scrub_found", len(left - spot.bad))
        spot.bad = {block for block in spot.bad if block not in read} | left
        if not left:
            return
        if self.repair is None:
            mended, spot.why, hopeless = [], "no other node protects it", True
        else:
            async with self._turn:
                outcome = await self.repair(spot.file, spot.slot, spot.snapshot, bad, self._ended.is_set)
            mended, spot.why, hopeless = outcome.blocks, outcome.why, outcome.beyond_help
        self._keeper.metrics.add("scrub_repaired", len(mended))
        spot.bad -= set(mended)
        if mended:
            self._repeats.warning(
                f"repaired {spot}",
                f"{spot} had {_counted(mended)} that rotted in memory, repaired from its group, so nothing "
                f"is lost; if it happens again on this node, have its memory tested",
            )
        if spot.bad and hopeless:
            self._set_aside(spot)
        elif spot.bad:
            self._repeats.warning(
                f"rotten {spot}",
                f"{spot} has {_counted(spot.bad)} whose checksum fails and which could not be repaired yet, since "
                f"{spot.why}; it is tried again in {self._config.scrub_every_s:g} s",
            )

    def _set_aside(self, spot: _Spot) -> None:
        why = f"{_counted(spot.bad)} with a checksum that fails cannot be repaired: {spot.why}"
        self._lost[spot.file.arena_id] = spot.file.native.committed_step, wire.clip(f"{spot} is set aside: {why}")
        self._keeper.quarantine(wire.Quarantine(spot.file.arena_id, spot.slot, spot.snapshot, wire.clip(why)))
