"""One client's conversation with the daemon: each request is checked, done, and answered or refused with a sentence."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from snapshotd import _native, budget, wire
from snapshotd.arena import SLOTS, ArenaFile, Granted, HeldBy
from snapshotd.cohort import Cohort
from snapshotd.config import DaemonConfig
from snapshotd.door import Answer, Connection, Peer
from snapshotd.errors import NoRoom, RankClaimed, Refused
from snapshotd.faults import crash_point
from snapshotd.keeper import Keeper
from snapshotd.metrics import Metrics
from snapshotd.root import Draft


class Rebuilder(Protocol):
    """Who decodes lost shards."""

    def begin_rebuild(self, file: ArenaFile, ask: wire.Rebuild, world_size: int) -> None: ...
    def rebuild_report(self, arena: bytes) -> wire.RebuildReport: ...


class Host(Protocol):
    """What a session needs of its daemon."""

    pid: int
    config: DaemonConfig
    metrics: Metrics
    keeper: Keeper
    drafts: dict[tuple[str, int], tuple[Draft, int]]
    workshop: Rebuilder | None

    async def peer_inventories(self, job: str, *, fresh: bool = False) -> list[wire.Inventory]: ...
    async def introduce(self, ask: wire.Introduce) -> None: ...
    def key_pem(self) -> bytes: ...
    def welcome(self) -> wire.Welcome: ...
    def rooms(self) -> list[budget.Room]: ...
    async def status_of(self, at: str) -> wire.Reply: ...
    def stop(self, why: str) -> None: ...
    def failed(self, what: str, error: BaseException | None) -> None: ...
    def on_change(self) -> None: ...
    async def wait_until_clear(
        self, obstacle: Callable[[], tuple[int, int] | None], given_up: Callable[[], bool]
    ) -> tuple[int, int] | None: ...


class ClientSession:
    """What one connection asked for and still has: pins, and arenas granted but not held yet."""

    def __init__(self, daemon: Host, peer: Peer, number: int, connection: Connection) -> None:
        self._daemon, self._keeper = daemon, daemon.keeper
        self._peer, self._number, self._connection = peer, number, connection
        self._pid = peer.pid
        self.role = ""
        self._pins: Counter[tuple[bytes, int]] = Counter()
        self._pinned_files: dict[bytes, ArenaFile] = {}
        self._granted: dict[bytes, ArenaFile] = {}
        self._keeper.claims.live_sessions.add(number)
        self._handlers: dict[type[Any], Callable[[Any], Awaitable[Answer]]] = {
            wire.TakeInventory: self._take_inventory,
            wire.Introduce: self._introduce,
            wire.AskKey: self._ask_key,
            wire.Attach: self._attach,
            wire.Held: self._held,
            wire.OpenShard: self._open_shard,
            wire.CloseShard: self._close_shard,
            wire.Quarantine: self._quarantine,
            wire.Rebuild: self._rebuild,
            wire.AskRebuild: self._ask_rebuild,
            wire.Close: self._close,
            wire.AskStatus: self._status,
            wire.Collect: self._collect,
            wire.Stop: self._stop,
        }

    async def answer(self, request: wire.Request) -> Answer:
        """Serve one request. What goes wrong in here is ours: it is logged and counted, and the daemon goes on."""
        try:
            if isinstance(request, wire.Hello):
                return self._hello(request)
            if not self.role:
                raise Refused("the first message of a connection must be a Hello; both sides must be of one release")
            handler = self._handlers.get(type(request))
            if handler is None:
                raise Refused(f"{type(request).__name__} is a message between daemons and is not answered here")
            return await handler(request)
        except Refused as error:
            self._daemon.metrics.add("refused", reason=error.kind)
            return Answer(refusal(error))
        except Exception as error:
            self._daemon.failed(f"{type(request).__name__} of pid {self._pid}", error)
            return Answer(
                wire.Refusal("refused", f"the daemon failed over this request ({type(error).__name__}); see its log")
            )

    def ended(self) -> None:
        """Let go of what this connection had."""
        self._keeper.claims.live_sessions.discard(self._number)
        for (arena, slot), count in self._pins.items():
            for _ in range(count):
                self._keeper.unpin(self._pinned_files[arena], slot)
        for file in self._granted.values():
            if isinstance(file.holder, Granted) and file.holder.session == self._number:
                self._keeper.ungrant(file)
        self._daemon.on_change()

    # --- requests ---------------------------------------------------------------------------------

    def _hello(self, ask: wire.Hello) -> Answer:
        self.role = ask.role
        self._pid = self._peer.pid or ask.pid  # in another PID namespace the kernel cannot tell
        return Answer(self._daemon.welcome())

    async def _take_inventory(self, ask: wire.TakeInventory) -> Answer:
        await self._unclaimed(ask.job, None, None)
        peers = await self._daemon.peer_inventories(ask.job, fresh=True)
        if self._connection.over:
            raise Refused("whoever asked is gone")  # a launch that came after it may have begun meanwhile
        await self._unclaimed(ask.job, None, None)
        self._keeper.fence(ask.job)
        return Answer(wire.InventoryTaken(self._keeper.inventory(ask.job), peers))

    async def _introduce(self, ask: wire.Introduce) -> Answer:
        await self._daemon.introduce(ask)
        return Answer(wire.Done())

    async def _ask_key(self, ask: wire.AskKey) -> Answer:
        return Answer(wire.LentKey(self._daemon.key_pem()))

    async def _attach(self, ask: wire.Attach) -> Answer:
        self._keeper.claims.check(ask)
        await self._daemon.introduce(wire.Introduce(ask.job, ask.nodes))
        await self._unclaimed(ask.job, ask.rank, ask.generation)
        self._keeper.claims.check(ask)  # others were served while we waited
        file = self._keeper.claims.own_arena(ask)
        if file is not None:
            self._keeper.rejoin(ask)
        else:
            file = self._keeper.inherit(ask, self._pid) if ask.arena else await self._create(ask)
        if not isinstance(file.holder, HeldBy):
            file.holder = Granted(self._pid, self._number)
        self._granted[file.arena_id] = file
        return Answer(
            wire.Granted(file.arena_id, file.slot_bytes),
            lent=(file.fd, file.lock_fd, file.bell_fd),
            sent=lambda: crash_point("grant.sent"),
        )

    async def _create(self, ask: wire.Attach) -> ArenaFile:
        """A new arena: room first, then pages, then the header. The rank is spoken for meanwhile."""
        if ask.restored is None:
            self._keeper.free_unused(ask)
        needed = _native.Arena.bytes_needed(SLOTS, ask.slot_bytes, ask.block_bytes)
        budget.check(needed + _parity_share(ask, self._keeper.root.node), self._daemon.rooms())
        draft = self._keeper.root.draft(ask.job, ask.local_index, needed)
        self._daemon.drafts[ask.job, ask.rank] = (draft, self._pid)
        try:
            await reserve(draft, ask.numa_node)
            self._keeper.claims.check(ask)
            return self._keeper.install(draft, ask, self._pid)
        except asyncio.CancelledError:
            raise  # the daemon ends while a thread still works on the file: the next daemon removes it
        except BaseException:
            self._keeper.root.discard(draft)
            raise
        finally:
            del self._daemon.drafts[ask.job, ask.rank]
            self._daemon.on_change()

    async def _held(self, ask: wire.Held) -> Answer:
        file = self._granted.get(ask.arena)
        if file is None or file.gone:
            raise Refused("this arena was not granted over this connection; attach first")
        if file.held_by() is None:
            raise Refused("the record lock of this arena is free, so nobody holds it; take it before saying so")
        del self._granted[ask.arena]
        self._keeper.hold(file, self._pid, self._number)
        self._keeper.attached(file)
        return Answer(wire.Done())

    async def _open_shard(self, ask: wire.OpenShard) -> Answer:
        file = self._keeper.pin(ask)
        try:
            fd = file.open_read_only()
        except BaseException:
            self._keeper.unpin(file, ask.slot)
            raise
        self._pins[ask.arena, ask.slot] += 1
        self._pinned_files[ask.arena] = file
        return Answer(wire.ShardOpened(file.native.slot_offset(ask.slot), file.slot_bytes), given=(fd,))

    async def _close_shard(self, ask: wire.CloseShard) -> Answer:
        key = (ask.arena, ask.slot)
        if not self._pins[key]:
            raise Refused("this shard is not open over this connection")
        self._pins[key] -= 1
        self._keeper.unpin(self._pinned_files[ask.arena], ask.slot)
        return Answer(wire.Done())

    async def _quarantine(self, ask: wire.Quarantine) -> Answer:
        self._keeper.quarantine(ask)
        return Answer(wire.Done())

    async def _rebuild(self, ask: wire.Rebuild) -> Answer:
        file = self._keeper.files.get(ask.arena)
        if file is None or not isinstance(file.holder, HeldBy) or file.holder.pid != self._pid:
            raise Refused("only the trainer that holds an arena may have a shard rebuilt into it")
        if self._daemon.workshop is None:
            raise Refused("this daemon has no peers to rebuild from; start it with --listen and restart the job")
        self._daemon.workshop.begin_rebuild(file, ask, file.owner.world_size)
        return Answer(wire.Done())

    async def _ask_rebuild(self, ask: wire.AskRebuild) -> Answer:
        if self._daemon.workshop is None:
            raise Refused("this daemon has no peers to rebuild from; start it with --listen and restart the job")
        return Answer(self._daemon.workshop.rebuild_report(ask.arena))

    async def _close(self, ask: wire.Close) -> Answer:
        file = self._keeper.files.get(ask.arena)
        if file is not None:  # closed twice: the first time may have freed it
            if not isinstance(file.holder, HeldBy) or file.holder.pid != self._pid:
                raise Refused("only the trainer that holds an arena may close its run; see `snapshotd gc` for the rest")
            self._keeper.close_rank(file)
        return Answer(wire.Done())

    async def _status(self, ask: wire.AskStatus) -> Answer:
        return Answer(await self._daemon.status_of(ask.at))

    async def _collect(self, ask: wire.Collect) -> Answer:
        return Answer(self._keeper.collect(ask.job, ask.generation))

    async def _stop(self, ask: wire.Stop) -> Answer:
        return Answer(wire.Done(), sent=lambda: self._daemon.stop(f"pid {self._pid} asked for it"))

    # --- waiting ----------------------------------------------------------------------------------

    async def _unclaimed(self, job: str, rank: int | None, generation: wire.GenerationId | None) -> None:
        """Wait until no living trainer stands in the way. RankClaimed, by rank and pid, if one does for too long."""

        def obstacle() -> tuple[int, int] | None:
            for (name, taken), (_, pid) in self._daemon.drafts.items():
                if name == job and rank in (None, taken):
                    return taken, pid
            file = self._keeper.claims.in_the_way(job, rank, self._pid, generation)
            return (file.owner.rank, getattr(file.holder, "pid", 0)) if file is not None else None

        claim = await self._daemon.wait_until_clear(obstacle, lambda: self._connection.over)
        if claim is not None:
            raise RankClaimed(
                f"rank {claim[0]} of job {job!r} is trained by the living process {claim[1]}, which was not disturbed; "
                f"end it first, or give this run another job name",
                rank=claim[0],
                pid=claim[1],
            )


def _parity_share(ask: wire.Attach, node: bytes) -> int:
    """What the parity of this rank's share of the node will take, if all nodes hold as much; asked for before anything
    is allocated, so that a rank is not let in that could never be protected."""
    cohort = Cohort.of(ask, node)
    if cohort is None or not cohort.parity_here:
        return 0
    return SLOTS * ask.slot_bytes * cohort.parity_here // (len(cohort.group) - cohort.parity_here)


async def reserve(draft: Draft, numa_node: int) -> None:
    """Give a draft its pages, on a thread. NoRoom where the tmpfs filled up since the budget was checked."""
    try:
        await asyncio.get_running_loop().run_in_executor(None, draft.reserve, numa_node)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise
        raise NoRoom(
            f"{budget.shown(draft.total_bytes)} of shared memory could not be reserved ({error.strerror}), so "
            f"this rank is not protected; make the tmpfs larger, or free old runs with `snapshotd gc`",
            needed_bytes=draft.total_bytes,
            setting="the size of the tmpfs",
        ) from None


def refusal(error: Refused) -> wire.Refusal:
    """The message that stands for a refusal, its facts included."""
    facts: dict[str, int | str] = {}
    if isinstance(error, NoRoom):
        facts = {
            "needed_bytes": error.needed_bytes,
            "available_bytes": error.available_bytes,
            "setting": error.setting,
        }
    elif isinstance(error, RankClaimed):
        facts = {"rank": error.rank, "pid": error.pid}
    return wire.Refusal(error.kind, wire.clip(str(error)), facts)
