"""Re-protection: what becomes of a job's snapshot while nobody trains, because a node is gone and the job waits for
another.

`consider` is called once a second. A job that no trainer of this node holds is looked at every few seconds: what do the
other nodes answer, and what does `reprotect` make of it? Once the same nodes have been gone for `reprotect_after`, this
node does its part of the plan, a shard or a parity set at a time, in arenas of its own (*fosters*): nothing that stood
before is touched, and nothing is told to anybody but in inventories. Everything else goes first: a recovery that
begins, or an attach, ends what is in the making and frees it, and work of the workshop is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from snapshotd import _native, budget, fetch, geometry, parityset, protect, rebuild, reprotect
from snapshotd.arena import FOSTER_INDEX, FOSTER_PARITY_INDEX, PARITY_INDEX, ArenaFile, Free
from snapshotd.budget import Room, shown
from snapshotd.clock import Clock
from snapshotd.combine import BadBytes, Cancelled
from snapshotd.config import DaemonConfig
from snapshotd.errors import NoRoom, SnapshotError
from snapshotd.faults import crash_point
from snapshotd.generation import Generation, views
from snapshotd.ledger import Progress
from snapshotd.metrics import Repeats
from snapshotd.peers import Peers
from snapshotd.recovery import ParitySource, Source
from snapshotd.reprotect import Finding, MakeSet, MakeShard, Plan, Wait
from snapshotd.root import Draft
from snapshotd.session import reserve
from snapshotd.wire import Holding, Inventory, SnapshotId

LOOK_S = 10.0  # between two looks at a job that waits
LOOKS_MIN = 2  # so often the same nodes are missed before anything is done
PAUSES_S = (1.0, 2.0, 5.0, 10.0)  # after failures in a row
ROOM_PAUSE_S = 30.0
log = logging.getLogger("snapshotd")


@dataclass
class _Care:
    """A job that waits, as it was seen last. `missed` says which survivors of which snapshot, and since when."""

    found: Finding | None = None
    missed: tuple[SnapshotId, frozenset[bytes]] | None = None
    since_s: float = 0.0
    looks: int = 0
    look_at_s: float = 0.0
    failures: int = 0
    trouble: str = ""
    going_on: bool = False
    made_bytes: int = 0
    making: rebuild.Job | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def miss(self, plan: Plan, now_s: float) -> None:
        """The survivors are these: since now, if they were others before."""
        missed = plan.snapshot, frozenset(plan.order)
        if missed != self.missed:
            self.missed, self.since_s, self.looks, self.made_bytes = missed, now_s, 0, 0
        self.looks += 1


class Caretaker:
    """Over the peers of a daemon. `idle` says that no other work waits for this node's cores and network, `claimed`
    that an arena of a job is being made; `rooms` and `drafts` as for the workshop; `failed` is told of an exception of
    ours."""

    def __init__(
        self,
        peers: Peers,
        config: DaemonConfig,
        clock: Clock,
        rooms: Callable[[], list[Room]],
        drafts: list[Draft],
        failed: Callable[[str, BaseException | None], None],
    ) -> None:
        self._peers, self._keeper, self._config, self._clock = peers, peers.keeper, config, clock
        self._rooms, self._drafts, self._failed = rooms, drafts, failed
        self._repeats = Repeats(log, clock)
        self.idle: Callable[[], bool] = lambda: True
        self.claimed: Callable[[str], bool] = lambda _: False
        self._cares: dict[str, _Care] = {}
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    def consider(self) -> None:
        """Look at the job whose turn it is, and do what is due for it. What is in the making gives way to other
        work."""
        if not self._config.reprotect_after_s or self._ended:
            return
        waiting = self._waiting()
        for job in sorted(self._cares.keys() - waiting):
            self.give_up(job)
        if self._task is not None:
            if not self.idle():
                self._interrupt()
            return
        now_s = self._clock.monotonic_s()
        due = [job for job in sorted(waiting) if self._care_of(job).look_at_s <= now_s]
        if due and self.idle():
            job = min(due, key=lambda one: self._cares[one].look_at_s)
            self._task = asyncio.get_running_loop().create_task(self._tend(job, self._cares[job]))
            self._task.add_done_callback(self._over)

    def give_up(self, job: str) -> None:
        """Somebody comes for this job: nothing more is made, and what is half made goes. What is whole stays."""
        care = self._cares.pop(job, None)
        if care is not None:
            care.cancelled.set()

    async def close(self) -> None:
        """End, and wait until no thread touches an arena any more."""
        self._ended = True
        self._interrupt()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=30.0)

    def facts(self, job: str) -> dict[str, Any] | None:
        """For the status; None where the job does not wait, or nobody cares."""
        care = self._cares.get(job)
        if care is None or care.found is None:
            return None
        found, files = care.found, self._fosters(job)
        return {
            "state": _state(care),
            "why": _sentence(care, self._config.reprotect_after_s, self._clock.monotonic_s()),
            "step": found.snapshot.step if found.snapshot is not None else None,
            "losses_left": found.losses_left,
            "made_bytes": care.made_bytes + (care.making.done_bytes if care.making is not None else 0),
            "foster_bytes": sum(file.total_bytes for file in files),
        }

    def _interrupt(self) -> None:
        """What is in the making goes; the next look begins it anew."""
        for care in self._cares.values():
            care.cancelled.set()
            if not self._ended:
                care.cancelled = threading.Event()

    def _over(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and task.exception() is not None:
            self._failed("protecting a waiting job anew", task.exception())

    # --- which jobs wait --------------------------------------------------------------------------

    def _care_of(self, job: str) -> _Care:
        return self._cares.setdefault(job, _Care())

    def _waiting(self) -> set[str]:
        """Jobs with peers of which this node keeps something, and that no trainer of this node holds or has closed."""
        own: dict[str, list[ArenaFile]] = {}
        for file in self._keeper.files.values():
            if not (file.is_parity or file.is_foster):
                own.setdefault(file.job, []).append(file)
        return {
            job
            for job, files in own.items()
            if self._keeper.met.of(job)
            and not self.claimed(job)
            and all(isinstance(file.holder, Free) for file in files)
            and not all(file.owner.closed for file in files)
        }

    def _fosters(self, job: str) -> list[ArenaFile]:
        return [file for generation in self._keeper.of_job(job) for file in generation.foster_files()]

    # --- one job ----------------------------------------------------------------------------------

    async def _tend(self, job: str, care: _Care) -> None:
        """Look at a job, and go on for as long as there is something to do for this node."""
        cancelled, me = care.cancelled, self._keeper.root.node
        try:
            while not cancelled.is_set() and self.idle():
                answers = await self._peers.inventories(job, fresh=True)
                inventories = [self._keeper.inventory(job), *answers]
                if cancelled.is_set():
                    return
                self._note(job, care, reprotect.assess(inventories, me))
                plan = care.found.plan if care.found is not None else None
                if plan is None or not self._is_due(care):
                    return
                step = reprotect.next_step(plan, inventories, me)
                care.going_on = True
                if isinstance(step, Wait):
                    care.trouble = step.why
                    return
                await self._make(job, care, plan, step, inventories, cancelled)
                care.failures, care.trouble = 0, ""
        except Cancelled:
            pass
        except NoRoom as error:
            self._put_off(job, care, _lacking(error), ROOM_PAUSE_S)
        except (SnapshotError, OSError) as error:
            self._put_off(job, care, str(error), PAUSES_S[min(care.failures, len(PAUSES_S) - 1)])
        finally:
            pause_s = min(LOOK_S, self._config.reprotect_after_s / 2)
            care.look_at_s = max(care.look_at_s, self._clock.monotonic_s() + pause_s)

    def _note(self, job: str, care: _Care, found: Finding) -> None:
        before, care.found = care.found, found
        if found.plan is None:
            if found.whole and before is not None and before.plan is not None:
                log.info("job %r: protected again: %s", job, found.why)
            elif found.gone and (before is None or before.why != found.why):
                log.warning("job %r waits: %s", job, found.why)
            care.missed, care.going_on, care.trouble = None, False, ""
            return
        missed = care.missed
        care.miss(found.plan, self._clock.monotonic_s())
        if missed != care.missed:
            care.going_on, care.trouble = False, ""
            log.warning(
                "job %r waits: %s; if they stay away for %g s, the survivors protect it anew among themselves",
                job, found.why, self._config.reprotect_after_s,
            )  # fmt: skip

    def _is_due(self, care: _Care) -> bool:
        waited_s = self._clock.monotonic_s() - care.since_s
        return care.looks >= LOOKS_MIN and waited_s >= self._config.reprotect_after_s

    def _put_off(self, job: str, care: _Care, why: str, pause_s: float) -> None:
        care.failures, care.trouble = care.failures + 1, why
        care.look_at_s = self._clock.monotonic_s() + pause_s
        self._repeats.warning(
            f"reprotect {job}",
            f"job {job!r} is not protected anew yet, since {why}; what it had stays, and it is tried again in "
            f"{pause_s:g} s",
        )

    # --- making -----------------------------------------------------------------------------------

    async def _make(
        self,
        job: str,
        care: _Care,
        plan: Plan,
        step: MakeShard | MakeSet,
        inventories: Sequence[Inventory],
        cancelled: threading.Event,
    ) -> None:
        """A shard or a parity set in an arena of its own; whole, or gone again."""
        streams = {one.node: Holding(one.streams, one.label, bytes(16), 0) for one in inventories}
        file = await self._arena(job, plan, step, cancelled)
        file.native.ever_committed = plan.committed  # a run that begins afresh frees what never was
        index = _claim(file, plan, step)
        file.pins[index] += 1
        published, began_s = False, self._clock.monotonic_s()
        try:
            if isinstance(step, MakeShard):
                fill = partial(self._fill_shard, care, file, index, plan, step, streams, cancelled)
            else:
                fill = partial(self._fill_set, file, index, plan, step, streams, cancelled)
            length = await self._run(fill)
            if cancelled.is_set():
                raise Cancelled
            crash_point("reprotect.made")
            file.native.publish(index, length)
            published = True
            crash_point("reprotect.published")
        except BadBytes as error:
            if error.span.holding is not None:
                self._peers.doubt(self._keeper.generation_of(file), error.span.holding, plan.snapshot, str(error))
            raise
        finally:
            care.making = None
            self._keeper.unpin(file, index)
            if not published and not file.gone:
                self._keeper.free(file, "it did not become whole")
        self._count(job, care, step, file, length, began_s)

    async def _run(self, fill: Callable[[], int]) -> int:
        """On a worker. An expected failure comes back without the frames that it passed: they hold views of the slot,
        and the arena is to be given back at once."""
        length, failure = await asyncio.get_running_loop().run_in_executor(self._peers.workers, _outcome, fill)
        if failure is not None:
            raise failure
        return length

    def _count(
        self, job: str, care: _Care, step: MakeShard | MakeSet, file: ArenaFile, length: int, began_s: float
    ) -> None:
        care.made_bytes += length
        self._peers.metrics.add("reprotected")
        self._peers.metrics.add("reprotected_bytes", length)
        what = (
            f"the shard of rank {step.shape.rank}" if isinstance(step, MakeShard) else "parity for the other survivors"
        )
        log.info(
            "job %r: keeps %s, %s made in %.3f s while the job waits",
            job, what, shown(length), self._clock.monotonic_s() - began_s,
        )  # fmt: skip

    async def _arena(self, job: str, plan: Plan, step: MakeShard | MakeSet, cancelled: threading.Event) -> ArenaFile:
        """A new arena with one slot for what is to be made. NoRoom where not as much again would be left beside it:
        what a recovery needs comes first."""
        place, rank, needed, block = _sizes(plan, step)
        self._free_damaged(job, plan, place, rank)
        total = _native.Arena.bytes_needed(1, needed, block)
        budget.check(2 * total, self._rooms())
        draft = self._keeper.root.draft(job, place, total)
        self._drafts.append(draft)
        try:
            await reserve(draft, -1)
            generation = self._generation(job, plan.snapshot)
            if cancelled.is_set() or generation is None:
                raise Cancelled
            return self._keeper.install_foster(draft, generation, place, needed, block, rank)
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._keeper.root.discard(draft)
            raise
        finally:
            self._drafts.remove(draft)

    def _generation(self, job: str, snapshot: SnapshotId) -> Generation | None:
        """Where the snapshot lies here now: its fosters go when that goes."""
        for generation in sorted(self._keeper.of_job(job), key=lambda one: one.identity, reverse=True):
            files = [*generation.rank_files(), *generation.parity_files()]
            if any(view.snapshot == snapshot for file in files for view in views(file)):
                return generation
        return None

    def _free_damaged(self, job: str, plan: Plan, place: int, rank: int) -> None:
        """What went bad is made anew, not beside itself."""
        for file in self._fosters(job):
            same = (file.local_index, file.owner.rank) == (place, rank) and not file.pinned
            if same and all(view.progress is Progress.DAMAGED for view in views(file)):
                self._keeper.free(file, "its bytes went bad, and it is made anew")

    def _fill_shard(
        self,
        care: _Care,
        file: ArenaFile,
        index: int,
        plan: Plan,
        step: MakeShard,
        streams: Mapping[bytes, Holding],
        cancelled: threading.Event,
    ) -> int:
        """On a worker's thread."""
        how = plan.missing[step.shape.rank]
        shards = {rank: _holding(streams, source) for rank, source in how.shards.items()}
        parities = {at: _holding(streams, source) for at, source in how.parities.items()}
        job = rebuild.Job(file.job, plan.snapshot, step.shape.rank, how.layout, shards, parities)
        care.making = job
        fetch.regain(job, file.native, index, self._peers.tools, self._is_over(cancelled))
        return step.shape.file_bytes

    def _fill_set(
        self,
        file: ArenaFile,
        index: int,
        plan: Plan,
        step: MakeSet,
        streams: Mapping[bytes, Holding],
        cancelled: threading.Event,
    ) -> int:
        """On a worker's thread."""
        shards = {rank: _holding(streams, source) for rank, source in step.shards.items()}
        task = protect.Task(file.job, plan.snapshot, plan.layout, step.position, shards)
        with file.native.slot_view(index) as view:
            length = protect.make(task, view, self._peers.tools, self._is_over(cancelled))
        file.native.set_block_crcs(index, length)
        return length

    def _is_over(self, cancelled: threading.Event) -> Callable[[], bool]:
        return lambda: cancelled.is_set() or self._peers.ended()


def _sizes(plan: Plan, step: MakeShard | MakeSet) -> tuple[int, int, int, int]:
    """Local index and owner's rank of the arena, the bytes of its slot, its blocks."""
    if isinstance(step, MakeSet):
        return FOSTER_PARITY_INDEX, PARITY_INDEX, parityset.file_bytes(plan.layout), plan.layout.unit_bytes
    block = step.shape.block_bytes
    return FOSTER_INDEX, step.shape.rank, max(1, -(-step.shape.file_bytes // block)) * block, block


def _outcome(fill: Callable[[], int]) -> tuple[int, Exception | None]:
    try:
        return fill(), None
    except (Cancelled, SnapshotError, OSError) as error:
        error.__cause__ = error.__context__ = None
        return 0, error.with_traceback(None)


def _claim(file: ArenaFile, plan: Plan, step: MakeShard | MakeSet) -> int:
    made_by = plan.snapshot.generation
    if isinstance(step, MakeSet):
        rank, world, fingerprint = step.position, len(plan.layout.positions), geometry.digest(plan.layout)
    else:
        rank, world, fingerprint = step.shape.rank, plan.world_size, step.shape.fingerprint
    return file.native.claim(
        generation=made_by.number, nonce=made_by.nonce, step=plan.snapshot.step, rank=rank, world_size=world,
        fingerprint=fingerprint,
    )  # fmt: skip


def _holding(streams: Mapping[bytes, Holding], source: Source | ParitySource) -> Holding:
    one = source.shard if isinstance(source, Source) else source.report
    there = streams[source.node]
    return Holding(there.streams, there.label, one.arena, one.slot)


def _lacking(error: NoRoom) -> str:
    if not error.needed_bytes:
        return f"there is no memory for it: {error}"
    return (
        f"there is no memory for it: {shown(error.needed_bytes)} have to be free, half of them for a recovery, and "
        f"{shown(error.available_bytes)} are; raise {error.setting}, or free what older runs left with `snapshotd gc`"
    )


def _state(care: _Care) -> str:
    found = care.found
    if found is None or found.snapshot is None:
        return "nothing"
    if found.whole:
        return "protected"
    return "re-protecting" if care.going_on else "degraded"


def _sentence(care: _Care, after_s: float, now_s: float) -> str:
    found = care.found
    assert found is not None
    if found.plan is None:
        return found.why
    if not care.going_on:
        left_s = max(0.0, care.since_s + after_s - now_s)
        return f"{found.why}; the survivors protect it anew in {left_s:.0f} s"
    return f"{found.why}; the survivors protect it anew" + (f": {care.trouble}" if care.trouble else "")
