"""Everything that this node keeps: which arenas there are, to whom they belong, and when they are freed.

Synchronous and without sockets: the daemon's loop calls in with what happened. The only thing that comes from outside
on its own is the end of a trainer, which a watch thread hands to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable

from snapshotd import _native, wire
from snapshotd.arena import ArenaFile, Free, Granted, HeldBy, slug
from snapshotd.claims import Claims, ownership
from snapshotd.clock import Clock
from snapshotd.config import DaemonConfig
from snapshotd.errors import Refused, SnapshotGone
from snapshotd.faults import crash_point
from snapshotd.generation import Generation, name, snapshot_in, views
from snapshotd.inventory import complaints, report, shards
from snapshotd.ledger import Commit, Progress, superseded
from snapshotd.liveness import Watch, holder_pid
from snapshotd.metrics import Metrics, Repeats
from snapshotd.root import Damaged, Draft, Root
from snapshotd.wire import ArenaReport, GenerationId, Inventory, Shard, SnapshotId

VERIFY_THREADS = 2
log = logging.getLogger("snapshotd")


class Keeper:
    """The arenas of one root and the generations that they belong to.

    `on_change` is called whenever an arena may have become available to somebody who waits for it.
    """

    def __init__(
        self,
        root: Root,
        config: DaemonConfig,
        metrics: Metrics,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
        on_change: Callable[[], None],
    ) -> None:
        self.root, self.config, self.metrics, self.clock = root, config, metrics, clock
        self.files: dict[bytes, ArenaFile] = {}
        self.generations: dict[tuple[str, GenerationId], Generation] = {}
        self.damaged: list[Damaged] = []
        self.claims = Claims(self.files, self.generations)
        self._loop, self._on_change = loop, on_change
        self._repeats = Repeats(log, clock)

    # --- starting and ending ----------------------------------------------------------------------

    def adopt(self) -> None:
        """Take over what earlier daemons left; decisions that they did not finish follow by themselves."""
        files, self.damaged = self.root.scan()
        for one in self.damaged:
            log.warning("%s", one.sentence)
        for file in files:
            self._adopt(file)
        for generation in list(self.generations.values()):
            if any(file.owner.fenced for file in generation.all_files()):
                generation.fence()
            self.look(generation)
            self._free_if_closed(generation, begun=not any(one.job == slug(generation.job) for one in self.damaged))
        if files:
            log.info("adopted %d arenas of %d generations", len(files), len(self.generations))

    def close(self) -> None:
        """Let go of everything; the arenas stay in memory."""
        for file in self.files.values():
            self._loop.remove_reader(file.bell_fd)
            file.close()
        self.root.close()

    def _adopt(self, file: ArenaFile) -> None:
        owner = file.owner
        generation = self._generation(
            file.job, file.generation, range(owner.local_world), owner.world_size, owner.every, file.restored
        )
        self._add(file, generation)
        self._verify_undecided(file)
        generation.attached.add(owner.rank)
        pid = holder_pid(file.lock_fd)
        if pid is not None:
            self.hold(file, pid or owner.pid, session=0)
            return
        generation.died(owner.rank)
        if not owner.released_at_s:
            file.amend(released_at_s=int(self.clock.wall_s()))

    def _verify_undecided(self, file: ArenaFile) -> None:
        """Read what an earlier daemon left undecided before this one commits it and frees what is older.

        Nobody watched these bytes between the two daemons; a committed snapshot has nothing older to fall back on.
        """
        for view in views(file):
            if view.progress not in (Progress.FULL, Progress.PROTECTED) or view.snapshot is None:
                continue
            broken = self._broken_blocks(file, view.index)
            if broken:
                why = f"{len(broken)} blocks fail their checksum, the first is block {broken[0]}"
                file.quarantined[view.index] = (view.snapshot, why)
                self.metrics.add("quarantined")
                log.warning("job %r: %s of rank %d is set aside: %s", file.job, view.snapshot, file.owner.rank, why)

    def _broken_blocks(self, file: ArenaFile, slot: int) -> list[int]:
        """Through a mapping of its own: the pages that were read would else count as this daemon's memory for good."""
        mapping = _native.Arena(file.fd, writable=False)
        try:
            return mapping.verify(slot, VERIFY_THREADS)
        finally:
            mapping.close()

    # --- generations ------------------------------------------------------------------------------

    def look(self, generation: Generation) -> None:
        """Something happened in this generation's arenas: decide, and free what a commit made useless."""
        if any(isinstance(decision, Commit) for decision in generation.look()):
            self._free_superseded(generation)
        self._free_outgrown(generation)

    def ring(self, file: ArenaFile) -> None:
        """A trainer rang: something in its arena changed."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(file.bell_fd)
        self.look(self.generation_of(file))

    def look_everywhere(self) -> None:
        """For the timer: a look at every generation that somebody trains, in case a ring got lost."""
        for generation in list(self.generations.values()):
            if any(isinstance(file.holder, HeldBy) for file in generation.all_files()):
                self.look(generation)

    def generation_of(self, file: ArenaFile) -> Generation:
        """The generation that an arena belongs to."""
        return self.generations[file.job, file.generation]

    def of_job(self, job: str) -> list[Generation]:
        """All generations of a job."""
        return [generation for (name, _), generation in self.generations.items() if name == job]

    def fence(self, job: str) -> None:
        """Somebody looks at what is left of this job: nothing of it may change any more."""
        for generation in self.of_job(job):
            if not generation.ledger.fenced:
                generation.fence()
                log.info("%s: fenced, since a newer generation took the inventory", generation)

    def _generation(
        self,
        job: str,
        identity: GenerationId,
        ranks: Iterable[int],
        world_size: int,
        every: int,
        restored: SnapshotId | None,
    ) -> Generation:
        key = (job, identity)
        if key not in self.generations:
            self.generations[key] = Generation(
                job,
                identity,
                node=self.label,
                ranks=ranks,
                world_size=world_size,
                every=every,
                restored=restored,
                metrics=self.metrics,
                repeats=self._repeats,
            )
        return self.generations[key]

    @property
    def label(self) -> str:
        """What people call this node."""
        return self.config.node_id or os.uname().nodename

    # --- attaching --------------------------------------------------------------------------------

    def inherit(self, ask: wire.Attach, pid: int) -> ArenaFile:
        """Hand an older generation's arena on. Its snapshots stay what they are; everything else begins anew."""
        file = self.files.get(ask.arena or b"")
        if file is None or file.job != ask.job:
            raise SnapshotGone(f"the arena that rank {ask.rank} asks for is not here any more; restart the job")
        if not file.owner.fenced or isinstance(file.holder, Granted):
            raise Refused(f"the arena that rank {ask.rank} asks for is in use by generation {file.generation}")
        if file.slot_bytes < ask.slot_bytes:
            raise Refused(
                f"rank {ask.rank} needs slots of {ask.slot_bytes} bytes and the arena that it asks for has slots of "
                f"{file.slot_bytes}; ask for a new one"
            )
        if ask.restored is not None and not any(one.snapshot == ask.restored for one in shards(file)):
            raise SnapshotGone(f"the arena that rank {ask.rank} asks for does not hold {ask.restored}; restart the job")
        previous = self.generation_of(file)
        for view in views(file):
            if view.progress is Progress.FILLING:
                file.native.empty(view.index)
        previous.remove(file)
        crash_point("inherit.before")
        native = file.native
        native.passed, native.next_step, native.committed_step, native.aborted_step = ask.passed, 0, 0, 0
        file.amend(**ownership(ask, pid, self.clock.wall_s()))
        crash_point("inherit.after")
        self._forget_if_bare(previous)
        self._add(file, self._join(ask))
        self.metrics.add("arenas_inherited")
        return file

    def free_unused(self, ask: wire.Attach) -> None:
        """A run starts afresh: what earlier generations left without ever committing it is of no use to anyone."""
        for file in list(self.files.values()):
            unused = file.job == ask.job and file.generation != ask.generation and not file.native.ever_committed
            if unused and isinstance(file.holder, Free) and not file.pinned:
                self.free(file, "it was never committed and its job began anew")

    def install(self, draft: Draft, ask: wire.Attach, pid: int) -> ArenaFile:
        """Make a reserved draft an arena of the generation that asked for it."""
        file = self.root.finish(
            draft,
            job=ask.job,
            local_index=ask.local_index,
            slot_bytes=ask.slot_bytes,
            block_bytes=ask.block_bytes,
            owner=ownership(ask, pid, self.clock.wall_s()),
        )
        file.native.passed = ask.passed
        file.fresh = True
        self._add(file, self._join(ask))
        self.metrics.add("arenas_created")
        return file

    def hold(self, file: ArenaFile, pid: int, session: int) -> None:
        """A trainer holds this arena: watch it."""
        file.holder, file.fresh = HeldBy(pid, session), False
        file.amend(pid=pid, released_at_s=0)
        if not file.watched:
            file.watched = True
            Watch(file.lock_fd, lambda: self._hand_over(file))

    def attached(self, file: ArenaFile) -> None:
        """The rank of this arena counts from now on; it hears what was decided and named before it came."""
        generation = self.generation_of(file)
        generation.attached.add(file.owner.rank)
        committed = generation.ledger.committed
        if committed is not None and file.native.committed_step < committed:
            file.native.committed_step = committed
        if generation.next_step is not None and file.native.next_step != generation.next_step:
            name(file, generation.next_step)
        self.look(generation)

    def ungrant(self, file: ArenaFile) -> None:
        """The connection ended between the grant and the word that the lock is held: ask the lock itself."""
        holder = file.holder
        if not isinstance(holder, Granted) or file.gone:
            return
        if holder_pid(file.lock_fd) is not None:
            self.hold(file, holder.pid, session=0)
            self.attached(file)
            return
        file.holder = Free()
        if file.fresh:
            self.free(file, "its trainer ended before it held it")
        self._on_change()

    def _join(self, ask: wire.Attach) -> Generation:
        return self._generation(ask.job, ask.generation, ask.local_ranks, ask.world_size, ask.every, ask.restored)

    def _add(self, file: ArenaFile, generation: Generation) -> None:
        if file.arena_id not in self.files:
            self.files[file.arena_id] = file
            self._loop.add_reader(file.bell_fd, self.ring, file)
        generation.add(file)

    # --- the end of trainers ----------------------------------------------------------------------

    def _hand_over(self, file: ArenaFile) -> None:
        """On the watch's thread: pass the news to the loop, if there still is one."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.released, file)

    def released(self, file: ArenaFile) -> None:
        """Nobody holds this arena any more."""
        file.watched = False
        if file.gone:
            return
        holder, file.holder = file.holder, Free()
        generation = self.generation_of(file)
        emptied = generation.died(file.owner.rank)
        file.amend(released_at_s=int(self.clock.wall_s()))
        if not file.owner.closed:
            self.metrics.add("deaths")
            self.metrics.add("slots_emptied_after_death", emptied)
            pid = holder.pid if isinstance(holder, HeldBy) else file.owner.pid
            log.info("%s: the trainer of rank %d (pid %d) is gone", generation, file.owner.rank, pid)
        self.look(generation)
        self._on_change()

    def close_rank(self, file: ArenaFile) -> None:
        """This rank's run is over and wants nothing back."""
        generation = self.generation_of(file)
        for one in generation.files[file.owner.rank]:
            one.amend(closed=True)
        self._free_if_closed(generation)

    # --- freeing ----------------------------------------------------------------------------------

    def free(self, file: ArenaFile, why: str) -> None:
        """Give an arena's memory back."""
        generation = self.generation_of(file)
        log.info("%s: arena of rank %d freed: %s", generation, file.owner.rank, why)
        generation.remove(file)
        del self.files[file.arena_id]
        self._loop.remove_reader(file.bell_fd)
        file.free()
        self.metrics.add("arenas_freed")
        self._forget_if_bare(generation)
        self._on_change()

    def _forget_if_bare(self, generation: Generation) -> None:
        if not generation.files:
            self.generations.pop((generation.job, generation.identity), None)

    def _free_if_closed(self, generation: Generation, begun: bool = False) -> None:
        """`begun`: arenas of closed ranks may be gone already (a daemon died while it freed them)."""
        files = generation.all_files()
        closed = {rank for rank, own in generation.files.items() if all(file.owner.closed for file in own)}
        everyone = set(generation.files) if begun else set(generation.ledger.ranks)
        if not files or closed != everyone or any(file.pinned for file in files):
            return
        self._free_superseded(generation)
        for file in files:
            self.free(file, "every rank closed its run")

    def _free_superseded(self, generation: Generation) -> None:
        others = [(one.identity, one.restored, one.ever_committed) for one in self.of_job(generation.job)]
        for identity in superseded(generation.identity, generation.restored, others):
            for file in self.generations[generation.job, identity].all_files():
                if isinstance(file.holder, Free) and not file.pinned:
                    self.free(file, f"generation {generation.identity} went on from it and has committed")

    def _free_outgrown(self, generation: Generation) -> None:
        """A rank moved to a larger arena, and something newer is committed there: the smaller one may go."""
        for files in list(generation.files.values()):
            newest = files[-1]
            moved = any(
                view.progress is Progress.COMMITTED
                and view.snapshot == SnapshotId(generation.identity, generation.ledger.committed or 0)
                for view in (views(newest) if len(files) > 1 else [])
            )
            for file in files[:-1]:
                if moved and not file.pinned:
                    self.free(file, "its rank moved to a larger arena")

    def expire(self) -> None:
        """Free what no trainer came back for within the lease."""
        now_s = self.clock.wall_s()
        for generation in list(self.generations.values()):
            files = generation.all_files()
            left_alone = all(isinstance(file.holder, Free) and not file.pinned for file in files)
            if left_alone and min(self.lease_left_s(file, now_s) for file in files) <= 0:
                for file in files:
                    self.free(file, f"no trainer came back for it within {self.config.lease_s:g} s")

    def lease_left_s(self, file: ArenaFile, now_s: float) -> float:
        """Seconds until an arena without a trainer is freed; the whole lease while one holds it."""
        if not isinstance(file.holder, Free) or not file.owner.released_at_s:
            return self.config.lease_s
        return min(self.config.lease_s, file.owner.released_at_s + self.config.lease_s - now_s)

    def collect(self, job: str | None, number: int | None) -> wire.Collected:
        """Dismiss what no living trainer holds."""
        freed, freed_bytes, kept = 0, 0, []
        for file in list(self.files.values()):
            if job not in (None, file.job) or number not in (None, file.owner.generation):
                continue
            what = f"job {file.job!r}, generation {file.generation}, rank {file.owner.rank}"
            if not isinstance(file.holder, Free):
                kept.append(wire.clip(f"{what} is held by pid {file.holder.pid}"))
            elif file.pinned:
                kept.append(wire.clip(f"{what} is being read"))
            else:
                freed, freed_bytes = freed + 1, freed_bytes + file.total_bytes
                self.free(file, "a person dismissed it")
        return wire.Collected(freed, freed_bytes, kept)

    # --- reading ----------------------------------------------------------------------------------

    def inventory(self, job: str) -> Inventory:
        """What this node holds of a job. Changes nothing."""
        offered: list[Shard] = []
        arenas: list[ArenaReport] = []
        damaged = [wire.clip(one.sentence) for one in self.damaged if one.job == slug(job)]
        for file in self.files.values():
            if file.job == job:
                arenas.append(report(file))
                offered += shards(file)
                damaged += complaints(file)
        return Inventory(self.root.node, self.label, offered, arenas, damaged)

    def pin(self, ask: wire.OpenShard) -> ArenaFile:
        """Keep a shard as it is while somebody reads it. SnapshotGone if it is not there (any more)."""
        file = self.files.get(ask.arena)
        offered = shards(file) if file is not None else []
        if file is None or not any((one.slot, one.snapshot) == (ask.slot, ask.snapshot) for one in offered):
            raise SnapshotGone(f"{ask.snapshot} is not in that slot any more; take the inventory again")
        file.pins[ask.slot] += 1
        return file

    def unpin(self, file: ArenaFile, slot: int) -> None:
        """The end of one `pin`."""
        file.pins[slot] -= 1
        if file.gone or file.pins[slot] > 0:
            return
        generation = self.generation_of(file)
        generation.unpinned(file, slot)
        self.look(generation)
        self._free_if_closed(generation)

    def quarantine(self, ask: wire.Quarantine) -> None:
        """Never offer this shard again."""
        file = self.files.get(ask.arena)
        if file is None or ask.slot >= file.native.slots:
            return
        if snapshot_in(file.native.slot(ask.slot)) == ask.snapshot and ask.slot not in file.quarantined:
            file.quarantined[ask.slot] = (ask.snapshot, ask.why)
            self.metrics.add("quarantined")
            log.warning(
                "job %r: the shard of rank %d of %s is set aside: %s", file.job, file.owner.rank, ask.snapshot, ask.why
            )
