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
from snapshotd.arena import OWNER_FIELDS, PARITY_INDEX, SLOTS, ArenaFile, Free, Granted, HeldBy, slug
from snapshotd.claims import Claims, ownership
from snapshotd.clock import Clock
from snapshotd.cohort import Cohort
from snapshotd.config import DaemonConfig
from snapshotd.errors import Refused, SnapshotGone
from snapshotd.faults import crash_point
from snapshotd.generation import FOSTER, Generation, name, snapshot_in, views
from snapshotd.inventory import complaints, parities, report, shards
from snapshotd.ledger import Commit, Decision, Progress, superseded
from snapshotd.met import Met
from snapshotd.metrics import Metrics, Repeats
from snapshotd.reprotect import outlived
from snapshotd.root import Damaged, Draft, Root
from snapshotd.wire import ArenaReport, GenerationId, Inventory, ParityReport, Shard, SnapshotId

VERIFY_THREADS = 2
OVER_AT_S = 1
"""Stands for the time of release of an arena whose run is over on every node: its lease has run out."""
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
        self.claims = Claims(self.files, self.generations, root.node)
        self.on_look: Callable[[Generation], None] = lambda _: None
        self.hopeless: dict[str, list[SnapshotId]] = {}
        self.on_orphan: Callable[[ArenaFile], None] = lambda _: None
        self._loop, self._on_change = loop, on_change
        self.met = Met(root)  # nodes that may hold some of a job
        self.on_recovery: Callable[[str], None] = lambda _: None
        self.reached_at = ("", "")  # where peers reach this daemon: its messages, its byte streams
        self.badge: wire.Badge | None = None  # by which they know that it is this one
        self._repeats = Repeats(log, clock)

    # --- starting and ending ----------------------------------------------------------------------

    def adopt(self) -> None:
        """Take over what earlier daemons left; decisions that they did not finish follow by themselves."""
        files, self.damaged = self.root.scan()
        for one in self.damaged:
            log.warning("%s", one.sentence)
        for file in sorted(files, key=lambda one: (one.is_foster, one.is_parity)):
            self._adopt(file, [one.owner.rank for one in files if _same_generation(one, file)])
        for generation in list(self.generations.values()):
            if any(file.owner.fenced for file in generation.all_files()):
                generation.fence()
            self.look(generation)
            self._free_if_closed(generation, begun=not any(one.job == slug(generation.job) for one in self.damaged))
        for file in [one for one in files if one.is_foster and not one.gone and not views(one)]:
            self.free(file, "it was not whole when the daemon before this one ended")
        self.met.keep(generation.job for generation in self.generations.values())
        if files:
            log.info("adopted %d arenas of %d generations", len(files), len(self.generations))

    def close(self) -> None:
        """Let go of everything; the arenas stay in memory."""
        for file in self.files.values():
            self._loop.remove_reader(file.bell_fd)
            file.close()
        self.root.close()

    def _adopt(self, file: ArenaFile, found: list[int]) -> None:
        """`found` are the ranks whose arenas were found. On several nodes a trainer names all of them again."""
        owner = file.owner
        ranks = range(owner.world_size) if owner.local_world == owner.world_size else found
        generation = self._generation(file.job, file.generation, ranks, owner.world_size, owner.every, file.restored)
        self._add(file, generation)
        if file.is_parity or file.is_foster:
            for view in views(file):
                if view.progress is Progress.FILLING:  # nobody goes on with what is half added up
                    file.native.empty(view.index)
        if file.is_foster:
            self._verify_undecided(file)
        if file.is_parity or file.is_foster:
            return
        self._verify_undecided(file)
        generation.attached.add(owner.rank)
        generation.over |= owner.closed and owner.released_at_s == OVER_AT_S
        pid = file.held_by()
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
            broken = self.broken_blocks(file, view.index)
            if broken:
                why = f"{len(broken)} blocks fail their checksum, the first is block {broken[0]}"
                file.quarantined[view.index] = (view.snapshot, why)
                self.metrics.add("quarantined")
                log.warning("job %r: %s of rank %d is set aside: %s", file.job, view.snapshot, file.owner.rank, why)

    def broken_blocks(self, file: ArenaFile, slot: int) -> list[int]:
        """Blocks of a slot that fail their checksum."""
        return file.broken_blocks(slot, VERIFY_THREADS)

    # --- generations ------------------------------------------------------------------------------

    def look(self, generation: Generation) -> None:
        """Something happened in this generation's arenas: decide, and free what a commit made useless."""
        self.after(generation, generation.look())

    def after(self, generation: Generation, decisions: Iterable[Decision]) -> None:
        """Decisions were carried out in a generation: free what they made useless, and tell whoever wants to know."""
        if any(isinstance(decision, Commit) for decision in decisions):
            self._free_superseded(generation)
            self._free_fosters(generation)
            if generation.cohort is not None:  # what its nodes hold is all that is wanted from now on
                self.met.only(generation.job, generation.cohort.others())
        self._free_outgrown(generation)
        self.on_look(generation)

    def ring(self, file: ArenaFile) -> None:
        """A trainer rang: something in its arena changed."""
        if file.gone:
            return  # freed while the ring was on its way
        file.silence_bell()
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
        self.on_recovery(job)
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
        if file is None or file.job != ask.job or file.is_foster:
            raise SnapshotGone(f"the arena that rank {ask.rank} asks for is not here any more; restart the job")
        if not file.owner.fenced or isinstance(file.holder, Granted):
            raise Refused(f"the arena that rank {ask.rank} asks for is in use by generation {file.generation}")
        previous = self.generation_of(file)
        if file.slot_bytes < ask.slot_bytes:
            raise Refused(
                f"rank {ask.rank} needs slots of {ask.slot_bytes} bytes and the arena that it asks for has slots of "
                f"{file.slot_bytes}; ask for a new one"
            )
        holds = any(one.snapshot == ask.restored for one in shards(file))
        if ask.restored is not None and not holds and not ask.rebuild:
            raise SnapshotGone(f"the arena that rank {ask.rank} asks for does not hold {ask.restored}; restart the job")
        for view in views(file):
            if view.progress is Progress.FILLING and not file.pins[view.index]:  # pinned: a thread decodes into it
                file.native.empty(view.index)
        previous.remove(file)
        crash_point("inherit.before")
        generation = self._join(ask)
        # The arena first: whoever comes after a crash between the two finds parity without ranks, which it takes too.
        for one in [file, *self._parity_to_inherit(ask, previous)]:
            native = one.native
            native.passed, native.next_step, native.committed_step, native.aborted_step = ask.passed, 0, 0, 0
            rank = one.owner.rank if one.is_parity else ask.rank
            if one is not file:
                old = self.generation_of(one)
                old.remove(one)
                self._forget_if_bare(old)
            one.amend(**(ownership(ask, pid, self.clock.wall_s()) | {"rank": rank}))
            self._add(one, generation)
        if ask.committed:
            self._mark_committed(ask.restored, generation)
        crash_point("inherit.after")
        self._forget_if_bare(previous)
        file.awaits_rebuild = ask.rebuild
        self.metrics.add("arenas_inherited")
        return file

    def _mark_committed(self, restored: SnapshotId | None, generation: Generation) -> None:
        """Others had heard of its commit: what is older gives way to it here too, if a slot is needed."""

        def of(files: Iterable[ArenaFile]) -> list[tuple[ArenaFile, int]]:
            return [(file, view.index) for file in files for view in views(file)
                    if view.snapshot == restored and view.progress >= Progress.FULL]  # fmt: skip

        sets = of(generation.parity_files())
        for file, index in [*of(generation.rank_files()), *(sets if len(sets) == 1 else [])]:
            file.native.advance(index, file.native.slot(index).state, _native.COMMITTED)

    def _parity_to_inherit(self, ask: wire.Attach, previous: Generation) -> list[ArenaFile]:
        """Parity arenas that come along with a first inherited arena."""
        if ask.restored is None:
            return []
        return [
            file
            for generation in self.of_job(ask.job)
            if generation.identity != ask.generation and (generation is previous or not generation.rank_files())
            for file in generation.parity_files()
        ]

    def free_unused(self, ask: wire.Attach) -> None:
        """A run starts afresh: what earlier generations left without ever committing it is of no use to anyone."""
        for file in list(self.files.values()):
            if file.gone or file.job != ask.job or file.generation == ask.generation:
                continue
            unused = not file.native.ever_committed
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
        file.awaits_rebuild = ask.rebuild
        self._add(file, self._join(ask))
        self.metrics.add("arenas_created")
        return file

    def install_parity(self, draft: Draft, generation: Generation, slot_bytes: int, block_bytes: int) -> ArenaFile:
        """Make a reserved draft the parity arena of a generation."""
        owner = {"rank": PARITY_INDEX}
        return self._install(draft, generation, PARITY_INDEX, slot_bytes, block_bytes, SLOTS, owner)

    def install_foster(
        self, draft: Draft, generation: Generation, local_index: int, slot_bytes: int, block_bytes: int, rank: int
    ) -> ArenaFile:
        """Make a reserved draft an arena for one shard or parity set that survivors make while the job waits."""
        owner = {"rank": rank, "closed": False, "released_at_s": int(self.clock.wall_s())}
        return self._install(draft, generation, local_index, slot_bytes, block_bytes, 1, owner)

    def _install(
        self,
        draft: Draft,
        generation: Generation,
        local_index: int,
        slot_bytes: int,
        block_bytes: int,
        slots: int,
        owner: dict[str, int],
    ) -> ArenaFile:
        like = (generation.rank_files() or generation.all_files())[0].owner
        file = self.root.finish(
            draft,
            job=generation.job,
            local_index=local_index,
            slot_bytes=slot_bytes,
            block_bytes=block_bytes,
            owner={name: getattr(like, name) for name in OWNER_FIELDS} | {"pid": 0} | owner,
            slots=slots,
        )
        self._add(file, generation)
        self.metrics.add("arenas_created")
        return file

    def hold(self, file: ArenaFile, pid: int, session: int) -> None:
        """A trainer holds this arena: watch it."""
        file.holder, file.fresh = HeldBy(pid, session), False
        file.amend(pid=pid, released_at_s=0)
        if not file.watched:
            file.watched = True
            file.watch(lambda: self._hand_over(file))

    def attached(self, file: ArenaFile) -> None:
        """The rank of this arena counts from now on; it hears what was decided and named before it came.

        One that waits for a rebuild counts once that is over: until then it would seem to be past the step without it.
        """
        if file.awaits_rebuild:
            return
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
        if file.held_by() is not None:
            self.hold(file, holder.pid, session=0)
            self.attached(file)
            return
        file.holder = Free()
        if file.fresh:
            self.free(file, "its trainer ended before it held it")
        self._on_change()

    def _join(self, ask: wire.Attach) -> Generation:
        generation = self._generation(ask.job, ask.generation, ask.local_ranks, ask.world_size, ask.every, ask.restored)
        cohort = Cohort.of(ask, self.root.node)
        self.on_recovery(ask.job)
        if cohort is not None:
            generation.join(cohort, ask.local_ranks)
            self.met.add(ask.job, cohort.others())
        return generation

    def rejoin(self, ask: wire.Attach) -> None:
        """A trainer came back to its own arena: where this daemon is a new one, it learns of the peers again."""
        self._join(ask)

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
        emptied = 0 if file.awaits_rebuild else generation.died(file.owner.rank)  # its rebuild empties the slot itself
        file.amend(released_at_s=int(self.clock.wall_s()))
        if file.awaits_rebuild:
            self.on_orphan(file)
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
        if not (file.is_parity or file.is_foster) and not generation.rank_files():
            for other in [one for one in generation.all_files() if not one.pinned]:
                self.free(other, "it protects nothing of this node any more")
        self._forget_if_bare(generation)
        self._on_change()

    def _forget_if_bare(self, generation: Generation) -> None:
        if not generation.files:
            self.generations.pop((generation.job, generation.identity), None)
            self.met.keep(one.job for one in self.generations.values())

    def _free_if_closed(self, generation: Generation, begun: bool = False) -> None:
        """`begun`: arenas of closed ranks may be gone already (a daemon died while it freed them).

        On several nodes a node that has closed may still be needed: nothing goes before all nodes have (`over`).
        """
        files = generation.all_files()
        own = {rank: held for rank, held in generation.files.items() if rank >= 0}
        closed = {rank for rank, held in own.items() if all(file.owner.closed for file in held)}
        everyone = set(own) if begun else set(generation.ledger.ranks)
        if not own or closed != everyone or any(file.pinned for file in files):
            return
        if generation.spans_nodes and not generation.over:
            self.on_look(generation)
            return
        self._free_superseded(generation)
        for file in files:
            if not file.gone:
                self.free(file, "every rank closed its run")

    def run_over(self, generation: Generation) -> None:
        """Every rank of every node closed its run. Written down first: who dies while freeing has nobody to ask."""
        generation.over = True
        for file in generation.all_files():
            file.amend(released_at_s=OVER_AT_S)
        self._free_if_closed(generation)

    def _free_superseded(self, generation: Generation) -> None:
        others = [(one.identity, one.restored, one.ever_committed) for one in self.of_job(generation.job)]
        for identity in superseded(generation.identity, generation.restored, others):
            for file in self.generations[generation.job, identity].all_files():
                if isinstance(file.holder, Free) and not file.pinned and not file.gone:
                    self.free(file, f"generation {generation.identity} went on from it and has committed")

    def _free_fosters(self, generation: Generation) -> None:
        """What survivors made while the job waited, once a commit of this generation has made it useless."""
        committed = generation.committed
        for file in [one for other in self.of_job(generation.job) for one in other.foster_files()]:
            made = {view.snapshot for view in views(file) if view.snapshot is not None}
            useless = committed is not None and all(
                outlived(snapshot, file.generation, generation.identity, generation.restored, committed)
                for snapshot in made
            )
            if useless and not file.pinned:
                self.free(file, f"{committed} is committed, and every node protects it")

    def _free_outgrown(self, generation: Generation) -> None:
        """A rank moved to a larger arena, and something newer is committed there: the smaller one may go."""
        for files in [files for place, files in generation.files.items() if place != FOSTER]:
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
            files = generation.rank_files()
            for foster in list(generation.foster_files()):
                if self.lease_left_s(foster, now_s) <= 0 and not foster.pinned:
                    self.free(foster, f"no trainer came back for it within {self.config.lease_s:g} s")
            if not files:
                self._free_stray_parity(generation)
                continue
            left_alone = all(isinstance(file.holder, Free) and not file.pinned for file in files)
            if left_alone and min(self.lease_left_s(file, now_s) for file in files) <= 0:
                for file in files:
                    if not file.gone:
                        self.free(file, f"no trainer came back for it within {self.config.lease_s:g} s")

    def _free_stray_parity(self, generation: Generation) -> None:
        """Parity without a rank's arena (a crash in the middle of an inheritance) stays while its job has others; so
        does what was made while the job waited, once the ranks' arenas were handed on."""
        if any(one.rank_files() for one in self.of_job(generation.job)):
            return
        for file in generation.all_files():
            if not file.pinned:
                self.free(file, "it protects nothing of this node any more")

    def lease_left_s(self, file: ArenaFile, now_s: float) -> float:
        """Seconds until an arena without a trainer is freed; the whole lease while one holds it."""
        if not isinstance(file.holder, Free) or not file.owner.released_at_s:
            return self.config.lease_s
        return min(self.config.lease_s, file.owner.released_at_s + self.config.lease_s - now_s)

    def collect(self, job: str | None, number: int | None) -> wire.Collected:
        """Dismiss what no living trainer holds."""
        freed, kept = 0, []
        before = self.total_bytes()
        for file in list(self.files.values()):
            if file.gone or (file.is_parity and not file.is_foster):
                continue  # what protects goes with what it protects
            if job not in (None, file.job) or number not in (None, file.owner.generation):
                continue
            what = f"job {file.job!r}, generation {file.generation}, rank {file.owner.rank}"
            if not isinstance(file.holder, Free):
                kept.append(wire.clip(f"{what} is held by pid {file.holder.pid}"))
            elif file.pinned:
                kept.append(wire.clip(f"{what} is being read"))
            else:
                freed += 1
                self.free(file, "a person dismissed it")
        return wire.Collected(freed, before - self.total_bytes(), kept)

    def total_bytes(self) -> int:
        """Memory of all arenas, parity included."""
        return sum(file.total_bytes for file in self.files.values())

    # --- reading ----------------------------------------------------------------------------------

    def inventory(self, job: str) -> Inventory:
        """What this node holds of a job. Changes nothing."""
        offered: list[Shard] = []
        arenas: list[ArenaReport] = []
        sets: list[ParityReport] = []
        damaged = [wire.clip(one.sentence) for one in self.damaged if one.job == slug(job)]
        for file in self.files.values():
            if file.job != job or self.generation_of(file).over:
                continue
            damaged += [] if file.is_foster else complaints(file)
            if file.is_parity:
                sets += parities(file)
                continue
            if not file.is_foster:
                arenas.append(report(file))
            offered += shards(file)
        return Inventory(
            self.root.node,
            self.label,
            offered,
            arenas,
            damaged,
            sets,
            self.hopeless.get(job, []),
            *self.reached_at,
            self.config.domain,
            self.badge,
        )

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
            if file.is_parity and not file.is_foster:
                self.generation_of(file).ledger.parity_gone(ask.snapshot.step)
            self.metrics.add("quarantined")
            log.warning(
                "job %r: the shard of rank %d of %s is set aside: %s", file.job, file.owner.rank, ask.snapshot, ask.why
            )


def _same_generation(one: ArenaFile, other: ArenaFile) -> bool:
    return not (one.is_parity or one.is_foster) and (one.job, one.generation) == (other.job, other.generation)
