"""Who makes parity and rebuilds shards in this daemon, and when: the loop's side of `protect` and `rebuild`.

For each generation there is at most one parity set in the making, of the newest snapshot that the whole group holds in
full. A peer that is slow or gone delays the commit and nothing else: the work is given up and tried again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from snapshotd import _native, budget, fetch, geometry, parityset, protect, rebuild, wire
from snapshotd.arena import PARITY_INDEX, SLOTS, ArenaFile
from snapshotd.budget import Room
from snapshotd.combine import BadBytes, Cancelled
from snapshotd.errors import NoRoom, ProtocolError, Refused, SnapshotError, SnapshotGone
from snapshotd.faults import crash_point
from snapshotd.generation import Generation, view_of, views
from snapshotd.ledger import Progress, SlotView
from snapshotd.metrics import Repeats
from snapshotd.peers import Peers
from snapshotd.root import Draft
from snapshotd.session import reserve
from snapshotd.wire import GroupLayout, Holding, SnapshotId

PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
ROOM_PAUSE_S = 5.0
log = logging.getLogger("snapshotd")
_T = TypeVar("_T")


@dataclass
class _Making:
    """A parity set in the making."""

    snapshot: SnapshotId
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Rebuilding:
    """A shard that is being decoded, or was."""

    job: rebuild.Job
    slot: int
    began_s: float
    ended_s: float = 0.0
    over: bool = False
    failure: str = ""
    why: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)


class Workshop:
    """Parity and rebuilds of one daemon. `rooms` says what memory is left, `drafts` what is being reserved."""

    def __init__(self, peers: Peers, repeats: Repeats, rooms: Callable[[], list[Room]], drafts: list[Draft]) -> None:
        self._peers, self._keeper, self._repeats = peers, peers.keeper, repeats
        self._rooms, self._drafts = rooms, drafts
        self._making: dict[int, _Making] = {}
        self._rebuilding: dict[bytes, _Rebuilding] = {}
        self._pause: dict[int, tuple[int, float]] = {}  # failures in a row, and until when to wait
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False

    async def close(self) -> None:
        """Give up what is in the making and wait until no thread touches an arena any more."""
        self._ended = True
        for making in self._making.values():
            making.cancelled.set()
        for rebuilding in self._rebuilding.values():
            rebuilding.cancelled.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=30.0)

    def idle(self) -> bool:
        """No parity is being made and nothing is being rebuilt."""
        return not self._making and all(one.over for one in self._rebuilding.values())

    # --- parity -----------------------------------------------------------------------------------

    def consider(self, generation: Generation) -> None:
        """Start on the parity of the newest snapshot that the group holds, if that is not made yet."""
        cohort, making = generation.cohort, self._making.get(id(generation))
        wanted = self._wanted(generation)
        if making is not None:
            if wanted != making.snapshot:
                making.cancelled.set()
            return
        self._free_twins(generation)
        self._free_outdated(generation)
        if cohort is None or wanted is None or self._ended or self._waits(generation):
            return
        layout = self._layout(generation, wanted)
        if layout is None:
            return
        shards = {
            rank: Holding(cohort.place(node).streams, cohort.name(node), one.arena, one.slot)
            for rank, (node, one) in cohort.holdings(wanted).items()
        }
        self._making[id(generation)] = making = _Making(wanted)
        task = protect.Task(generation.job, wanted, layout, cohort.position, shards)
        self._start(self._protect(generation, task, making))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _layout(self, generation: Generation, snapshot: SnapshotId) -> GroupLayout | None:
        assert generation.cohort is not None
        try:
            return generation.cohort.layout(snapshot)
        except ProtocolError as error:  # what peers said they hold cannot be one snapshot
            self._repeats.warning(f"layout {generation}", f"{generation}: no parity of {snapshot}, since {error}")
            self._put_off(generation)
            return None

    def _wanted(self, generation: Generation) -> SnapshotId | None:
        """The newest snapshot that this node holds in full and has no parity of; None where there is nothing to do."""
        ledger = generation.ledger
        if generation.cohort is None or ledger.fenced or not ledger.needs_parity:
            return None
        state = ledger.state()
        committed = ledger.committed or 0
        for step in sorted(state.steps(Progress.FULL), reverse=True):
            whole = all(state.held.get(r, {}).get(step, Progress.DAMAGED) >= Progress.FULL for r in state.passed)
            if not whole or step < committed or not state.complete or ledger.has_aborted(step):
                continue
            if ledger.has_parity(step) or (step == committed and self._has_set(generation, step)):
                return None
            return self._snapshot(generation, step)
        return None

    def _snapshot(self, generation: Generation, step: int) -> SnapshotId:
        restored = generation.restored
        return restored if restored is not None and restored.step == step else SnapshotId(generation.identity, step)

    def _has_set(self, generation: Generation, step: int) -> bool:
        snapshot = self._snapshot(generation, step)
        return any(
            view.snapshot == snapshot and view.progress >= Progress.FULL
            for file in generation.parity_files()
            for view in views(file)
        )

    def _waits(self, generation: Generation) -> bool:
        return self._peers.clock.monotonic_s() < self._pause.get(id(generation), (0, 0.0))[1]

    async def _protect(self, generation: Generation, task: protect.Task, making: _Making) -> None:
        try:
            done = await self._recognise(generation, task) or await self._make(generation, task, making)
            if not done:
                self._put_off(generation)
            elif not generation.ledger.fenced:
                self._pause.pop(id(generation), None)
                generation.trouble = ""
                generation.parity_whole(task.snapshot.step, *done)
                crash_point("parity.counted")
        except Cancelled:
            pass
        except NoRoom as error:
            generation.trouble = f"there is no memory for parity: {error}"
            self._repeats.warning(f"room {generation}", f"{generation}: {error}")
            self._put_off(generation, ROOM_PAUSE_S)
        except BadBytes as error:
            self._repeats.warning(f"bad {generation}", f"{generation}: no parity of {task.snapshot} yet, since {error}")
            if error.span.holding is not None:
                self._peers.doubt(generation, error.span.holding, task.snapshot, str(error))
            self._put_off(generation)
        except (SnapshotError, OSError) as error:
            self._repeats.warning(
                f"parity {generation}",
                f"{generation}: the parity of {task.snapshot} is put off, since {error}; training goes on, and the "
                f"snapshot before it stays",
            )
            self._put_off(generation)
        finally:
            self._making.pop(id(generation), None)
            if not self._ended and not generation.ledger.fenced:
                self._keeper.look(generation)

    def _put_off(self, generation: Generation, pause_s: float = 0.0) -> None:
        failures, _ = self._pause.get(id(generation), (0, 0.0))
        pause_s = pause_s or PAUSES_S[min(failures, len(PAUSES_S) - 1)]
        self._pause[id(generation)] = (failures + 1, self._peers.clock.monotonic_s() + pause_s)

    async def _recognise(self, generation: Generation, task: protect.Task) -> tuple[ArenaFile, int] | None:
        """A set that is here already (inherited, or of a daemon before this one) counts once every block verifies."""
        digest = geometry.digest(task.layout)
        for file in generation.parity_files():
            for view in views(file):
                info = file.native.slot(view.index)
                same = (view.snapshot, info.rank, info.fingerprint) == (task.snapshot, task.position, digest)
                if not same or view.progress < Progress.FULL:
                    continue
                file.pins[view.index] += 1
                try:
                    broken = await self._run(self._keeper.broken_blocks, file, view.index)
                finally:
                    self._keeper.unpin(file, view.index)
                if not broken:
                    return file, view.index
                why = f"{len(broken)} blocks of the parity set fail their checksum"
                self._keeper.quarantine(wire.Quarantine(file.arena_id, view.index, task.snapshot, why))
        return None

    async def _make(self, generation: Generation, task: protect.Task, making: _Making) -> tuple[ArenaFile, int] | None:
        """A new set in a free slot, and where; None where none is free until something newer is committed."""
        file = await self._arena(generation, task.layout)
        self._free_misfits(generation, task, file)
        if making.cancelled.is_set() or file.gone:
            raise Cancelled
        made_by = task.snapshot.generation
        index = file.native.claim(
            generation=made_by.number,
            nonce=made_by.nonce,
            step=task.snapshot.step,
            rank=task.position,
            world_size=len(task.layout.positions),
            fingerprint=geometry.digest(task.layout),
        )
        if index < 0:
            return None
        file.pins[index] += 1
        published = False
        try:
            began_s = self._peers.clock.monotonic_s()
            length = await self._run(self._fill, file, index, task, making)
            file.native.publish(index, length)
            published = True
            crash_point("parity.published")
            self._peers.metrics.add("parity_made")
            self._peers.metrics.add("parity_bytes", length)
            log.debug(
                "%s: parity of %s made in %.3f s", generation, task.snapshot, self._peers.clock.monotonic_s() - began_s
            )
        finally:
            if not published and not file.gone:
                file.native.empty(index)
            self._keeper.unpin(file, index)
        return file, index

    def _fill(self, file: ArenaFile, index: int, task: protect.Task, making: _Making) -> int:
        """On a worker's thread."""
        with file.native.slot_view(index) as view:
            length = protect.make(
                task, view, self._peers.tools, lambda: making.cancelled.is_set() or self._peers.ended()
            )
        file.native.set_block_crcs(index, length)
        return length

    async def _arena(self, generation: Generation, layout: GroupLayout) -> ArenaFile:
        """The parity arena of a generation that a set of this layout fits; made now where there is none. NoRoom."""
        needed = parityset.file_bytes(layout)
        fitting = [
            file
            for file in generation.parity_files()
            if file.slot_bytes >= needed and file.block_bytes == layout.unit_bytes
        ]
        if fitting:
            return max(reversed(fitting), key=_has_room)
        total = _native.Arena.bytes_needed(SLOTS, needed, layout.unit_bytes)
        budget.check(total, self._rooms())
        draft = self._keeper.root.draft(generation.job, PARITY_INDEX, total)
        self._drafts.append(draft)
        try:
            await reserve(draft, -1)
            if not generation.rank_files():
                raise Cancelled
            return self._keeper.install_parity(draft, generation, needed, layout.unit_bytes)
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._keeper.root.discard(draft)
            raise
        finally:
            self._drafts.remove(draft)

    def _free_misfits(self, generation: Generation, task: protect.Task, file: ArenaFile) -> None:
        """A restored snapshot may come with a set that its new group has no use for. It is all the protection there is
        until every node has the right one, so it stays where there is a slot for both (`_free_outdated`). Where both
        slots of the arena that a new set is to lie in are taken, what is of the least use there goes."""
        if _has_room(file):
            return
        sets = [view for view in views(file) if not file.pins[view.index]]
        whole = [view for view in sets if view.progress is not Progress.FILLING]
        ranked = [(rank, view) for view in whole if (rank := self._use(generation, task, view)) is not None]
        for _, view in sorted(ranked, key=lambda one: one[0])[:1]:
            file.quarantined.pop(view.index, None)
            file.native.empty(view.index)

    def _use(self, generation: Generation, task: protect.Task, view: SlotView) -> int | None:
        """The less the lower, of a set that is no part of what is to be protected now; None for what has to stay.

        What nobody holds; what is newer than the restored snapshot and so was not whole; the snapshot's own set of a
        grouping that did not commit it; what is older, where a mark says that this one is committed; its other sets.
        Of two sets of a restored snapshot that cannot be voted one stays.
        """
        held = {view.snapshot for file in generation.rank_files() for view in views(file)}
        made, wanted = view.snapshot, task.snapshot
        if made not in held or made is None:
            return 0
        if made == wanted:  # the grouping that committed it marked its set
            return 3 if view.progress is Progress.COMMITTED else 1
        if made == generation.restored and generation.ledger.has_aborted(made.step):
            of_both = [one for file in generation.parity_files() for one in views(file) if one.snapshot == made]
            return (3 if view.progress is Progress.COMMITTED else 1) if len(of_both) > 1 else None
        if wanted != generation.restored or made.generation == generation.identity:
            return None
        if (made.generation.number, made.step) > (wanted.generation.number, wanted.step):
            return 1
        marks = [one for file in generation.all_files() for one in views(file) if one.snapshot == wanted]
        return 2 if any(one.progress is Progress.COMMITTED for one in marks) else None

    def _free_twins(self, generation: Generation) -> None:
        """The same set may be there twice: a generation that was fenced while it made one ended that after its arena
        had gone to this generation, which made it anew. One is enough, and without a free slot nothing newer could be
        protected ever. The one that counts is kept, else the one whose mark says most.
        """
        if generation.ledger.fenced:
            return
        found: dict[tuple[SnapshotId | None, int, bytes], list[tuple[ArenaFile, SlotView]]] = {}
        for file in generation.parity_files():
            for view in views(file):
                if view.progress >= Progress.FULL:
                    info = file.native.slot(view.index)
                    found.setdefault((view.snapshot, info.rank, info.fingerprint), []).append((file, view))
        for (snapshot, _, _), twins in found.items():
            counted = None if snapshot is None else generation.parity_place(snapshot)
            twins.sort(key=lambda one: ((one[0], one[1].index) == counted, one[1].progress), reverse=True)
            for file, view in twins[1:]:
                if not file.pins[view.index]:
                    file.quarantined.pop(view.index, None)
                    file.native.empty(view.index)

    def _free_outdated(self, generation: Generation) -> None:
        """Once this generation has committed a snapshot, all nodes have the sets that their groups need: those of its
        groups in an earlier generation go. Until then some node may have none but that."""
        committed = generation.ledger.committed
        if generation.cohort is None or committed is None or generation.ledger.fenced:
            return
        snapshot = self._snapshot(generation, committed)
        sets = [(file, view.index) for file in generation.parity_files() for view in views(file)
                if view.snapshot == snapshot]  # fmt: skip
        layout = self._layout(generation, snapshot) if len(sets) > 1 else None
        if layout is None:
            return
        right = generation.cohort.position, geometry.digest(layout)
        infos = [(file, index, file.native.slot(index)) for file, index in sets]
        outdated = [(file, index) for file, index, info in infos if (info.rank, info.fingerprint) != right]
        for file, index in outdated if len(outdated) < len(sets) else []:
            if not file.pins[index]:
                file.quarantined.pop(index, None)
                file.native.empty(index)

    async def _run(self, do: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._peers.workers, do, *arguments)

    # --- rebuilding -------------------------------------------------------------------------------

    def begin_rebuild(self, file: ArenaFile, ask: wire.Rebuild, world_size: int) -> None:
        """Decode a lost shard into this arena. Refused where it cannot be meant; `rebuild_report` tells the rest."""
        if file.arena_id in self._rebuilding and not self._rebuilding[file.arena_id].over:
            raise Refused("a rebuild of this arena is under way already; ask how far it is")
        if not file.awaits_rebuild:
            raise Refused("this arena was not attached for a rebuild; restart the job")
        try:
            job = rebuild.Job(file.job, ask.snapshot, ask.rank, ask.layout, ask.shards, ask.parities)
        except StopIteration:
            raise Refused(f"rank {ask.rank} is not part of the layout that it is to be rebuilt by") from None
        if job.shape.block_bytes != file.block_bytes:
            raise Refused(
                f"the shard of rank {ask.rank} is checked in blocks of {job.shape.block_bytes} bytes, and this arena "
                f"in blocks of {file.block_bytes}"
            )
        if job.total_bytes > file.slot_bytes:
            raise Refused(f"the shard of rank {ask.rank} has {job.total_bytes} bytes and does not fit this arena")
        index = self._claim(file, ask, job, world_size)
        crash_point("rebuild.claimed")
        state = _Rebuilding(job, index, self._peers.clock.monotonic_s())
        self._rebuilding[file.arena_id] = state
        self._start(self._rebuild(file, index, state))

    def _claim(self, file: ArenaFile, ask: wire.Rebuild, job: rebuild.Job, world_size: int) -> int:
        for index in range(file.native.slots):  # what is damaged, or half of an earlier attempt, makes room
            view = view_of(file, index)
            if view is None or file.pins[index]:
                continue
            if view.progress <= Progress.FILLING or view.snapshot == ask.snapshot:
                file.quarantined.pop(index, None)
                file.native.empty(index)
        made_by = ask.snapshot.generation
        index = file.native.claim(
            generation=made_by.number, nonce=made_by.nonce, step=ask.snapshot.step, rank=ask.rank,
            world_size=world_size, fingerprint=job.shape.fingerprint,
        )  # fmt: skip
        if index < 0:
            raise SnapshotGone("no slot of this arena is free for the shard; restart the job")
        file.pins[index] += 1
        return index

    async def _rebuild(self, file: ArenaFile, index: int, state: _Rebuilding) -> None:
        job, published = state.job, False
        try:
            doubtful = await self._run(
                fetch.regain, job, file.native, index, self._peers.tools,
                lambda: state.cancelled.is_set() or self._peers.ended() or file.gone,
            )  # fmt: skip
            file.native.publish(index, job.shape.file_bytes)
            published, file.missed = True, None
            crash_point("rebuild.published")
            generation = self._keeper.generation_of(file)
            for holding in doubtful:
                self._peers.doubt(generation, holding, job.snapshot, "its bytes failed in a rebuild")
            self._peers.metrics.add("rebuilt")
            self._peers.metrics.add("rebuilt_bytes", job.total_bytes)
        except Cancelled:
            state.failure, state.why = "failed", "the rebuild was given up, since its trainer or this daemon ended"
        except rebuild.NotEnough as error:
            state.failure, state.why = "corrupt", str(error)
            self._keeper.hopeless.setdefault(file.job, []).append(job.snapshot)  # a restart is not to try it again
        except (SnapshotError, OSError) as error:
            state.failure, state.why = "failed", str(error)
        finally:
            self._end_rebuild(file, index, state, published)

    def _end_rebuild(self, file: ArenaFile, index: int, state: _Rebuilding, published: bool) -> None:
        if not published and not file.gone:
            file.native.empty(index)
        file.awaits_rebuild = not published
        state.over, state.ended_s = True, self._peers.clock.monotonic_s()
        self._keeper.unpin(file, index)
        if published and not file.gone:
            log.info(
                "%s: the shard of rank %d of %s was rebuilt, %s in %.3f s", self._keeper.generation_of(file),
                state.job.rank, state.job.snapshot, budget.shown(state.job.total_bytes), state.ended_s - state.began_s,
            )  # fmt: skip
            self._keeper.attached(file)
        elif state.why:
            log.warning("the shard of rank %d could not be rebuilt: %s", state.job.rank, state.why)

    def give_up_rebuild(self, arena: bytes) -> None:
        """Its trainer is gone."""
        if arena in self._rebuilding:
            self._rebuilding[arena].cancelled.set()

    def rebuild_report(self, arena: bytes) -> wire.RebuildReport:
        """How far a rebuild is. SnapshotGone where none was begun."""
        state = self._rebuilding.get(arena)
        if state is None:
            raise SnapshotGone("no rebuild of this arena was begun by this daemon; restart the job")
        end_s = state.ended_s if state.over else self._peers.clock.monotonic_s()
        return wire.RebuildReport(
            state.over,
            state.slot,
            state.job.done_bytes,
            state.job.total_bytes,
            max(0.0, end_s - state.began_s),
            state.failure,
            wire.clip(state.why),
        )


def _has_room(file: ArenaFile) -> bool:
    return any(file.native.slot(index).state == _native.EMPTY for index in range(file.native.slots))
