"""Who may have which arena: the rules that a trainer's request is held against, before anything is done for it."""

from __future__ import annotations

from collections.abc import Mapping

from snapshotd import _native, wire
from snapshotd.arena import SLOTS, ArenaFile, Free, Granted, HeldBy
from snapshotd.cohort import Cohort
from snapshotd.errors import Refused
from snapshotd.generation import Generation
from snapshotd.inventory import shards
from snapshotd.wire import GenerationId


class Claims:
    """The rules, over the arenas and generations of the keeper. `live_sessions` are the connections that are open."""

    def __init__(
        self, files: Mapping[bytes, ArenaFile], generations: Mapping[tuple[str, GenerationId], Generation], node: bytes
    ) -> None:
        self._files, self._generations, self._node = files, generations, node
        self.live_sessions: set[int] = set()

    def in_the_way(self, job: str, rank: int | None, pid: int, generation: GenerationId | None) -> ArenaFile | None:
        """An arena of this job (and rank) that a living trainer has, other than the one who asks.

        The same process may come back to its own arena in its own generation (its daemon was restarted), and to any
        of them once the connection over which it held it has ended (it protects a second run).
        """
        for file in self._files.values():
            holder = file.holder
            if file.job != job or isinstance(holder, Free) or (rank is not None and file.owner.rank != rank):
                continue
            own = holder.pid == pid and pid > 0
            if own and (file.generation == generation or holder.session not in self.live_sessions):
                continue
            return file
        return None

    def check(self, ask: wire.Attach) -> None:
        """Refused, with a sentence, if this request cannot be meant or comes too late."""
        if ask.rank not in ask.local_ranks or ask.rank >= ask.world_size:
            raise Refused(f"rank {ask.rank} is not among the ranks {ask.local_ranks} of {ask.world_size} that it names")
        cohort = Cohort.of(ask, self._node)
        if cohort is None and sorted(ask.local_ranks) != list(range(ask.world_size)):
            raise Refused(
                f"job {ask.job!r} has {ask.world_size} ranks, only {len(ask.local_ranks)} of them are on this node, "
                f"and the others' nodes were not named, so this run trains unprotected; restart it with the client of "
                f"this release and a daemon with --listen on every node"
            )
        _check_sizes(ask)
        known = self._generations.get((ask.job, ask.generation))
        bare = ask.arena is None and not self._of_rank(ask)
        needless = ask.rebuild or cohort is not None or not self._is_here(ask)  # others hold the snapshot
        if ask.restored is not None and bare and not needless and (known is None or not known.ever_committed):
            raise Refused(
                f"rank {ask.rank} restored {ask.restored} and asks for an arena without it, so the only snapshot would "
                f"be given up before there is a newer one; ask for the arena that holds it"
            )
        if known is None:
            self._check_not_outdated(ask)
        elif known.ledger.fenced:
            raise Refused(
                f"generation {ask.generation} of job {ask.job!r} is over: a newer one has begun; end this process"
            )
        elif (known.world_size, known.every, known.restored) != (ask.world_size, ask.every, ask.restored):
            raise Refused(
                f"rank {ask.rank} disagrees with its peers of generation {ask.generation} about world size, `every` or "
                f"what was restored; give all ranks the same arguments"
            )
        elif known.cohort is not None and not known.cohort.same_as(cohort):
            raise Refused(
                f"rank {ask.rank} disagrees with its peers of generation {ask.generation} about the nodes and groups "
                f"of the job; restart the job so that all ranks agree"
            )

    def _check_not_outdated(self, ask: wire.Attach) -> None:
        for other in self._of_job(ask.job):
            if ask.generation.number <= other.identity.number:
                raise Refused(
                    f"generation {ask.generation} of job {ask.job!r} is not newer than {other.identity}, which this "
                    f"node has already; restart the job so that it takes the inventory first"
                )
            if other.ledger.fenced:
                continue
            if not any(isinstance(file.holder, (HeldBy, Granted)) for file in other.all_files()):
                other.fence()  # this node was down when the new generation began; nobody trains the old one any more
                continue
            raise Refused(
                f"generation {other.identity} of job {ask.job!r} has not ended for this daemon; take the inventory "
                f"before attaching (a restart of the job does so)"
            )

    def own_arena(self, ask: wire.Attach) -> ArenaFile | None:
        """The arena that this rank has in this generation already, when it comes back for it."""
        for file in reversed(self._of_rank(ask)):
            wanted = file.arena_id != ask.replaces and ask.arena in (None, file.arena_id)
            if wanted and file.slot_bytes >= ask.slot_bytes:
                return file
        return None

    def _is_here(self, ask: wire.Attach) -> bool:
        """The shard that this rank restored lies on this node; a job that moved to one node read it from another."""
        files = (one for one in self._files.values() if one.job == ask.job and not (one.is_parity or one.is_foster))
        found = (one for file in files for one in shards(file))
        return any(one.snapshot == ask.restored and one.rank == ask.rank for one in found)

    def _of_rank(self, ask: wire.Attach) -> list[ArenaFile]:
        generation = self._generations.get((ask.job, ask.generation))
        return generation.files.get(ask.rank, []) if generation else []

    def _of_job(self, job: str) -> list[Generation]:
        return [generation for (name, _), generation in self._generations.items() if name == job]


def ownership(ask: wire.Attach, pid: int, now_s: float) -> dict[str, object]:
    """The owner record of an arena that is granted for this request."""
    owner: dict[str, object] = {
        "generation": ask.generation.number,
        "nonce": ask.generation.nonce,
        "rank": ask.rank,
        "world_size": ask.world_size,
        "local_world": len(ask.local_ranks),
        "every": ask.every,
        "pid": pid,
        "fenced": False,
        "closed": False,
        "released_at_s": int(now_s),
        "restored_generation": 0,
        "restored_nonce": bytes(16),
        "restored_step": 0,
    }
    if ask.restored is not None:
        made_by = ask.restored.generation
        owner["restored_generation"], owner["restored_nonce"] = made_by.number, made_by.nonce
        owner["restored_step"] = ask.restored.step
    return owner


def _check_sizes(ask: wire.Attach) -> None:
    try:
        _native.Arena.bytes_needed(SLOTS, ask.slot_bytes, ask.block_bytes)
    except ValueError as error:
        raise Refused(f"rank {ask.rank} asks for an arena that cannot be: {error}") from None
    if not ask.slot_bytes:
        raise Refused(f"rank {ask.rank} asks for slots of no bytes")
