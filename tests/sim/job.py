"""The job that trains in a simulated world: it is launched, chooses what to restore, trains, fails, and so on.

What the client's ranks compute together is computed by the client's own functions; what they say to their daemons goes
through their sessions.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from snapshotd import recovery, wire
from snapshotd.errors import DaemonUnavailable, ProtocolError, SnapshotError
from snapshotd.geometry import Formation
from snapshotd.recovery import Assignment, BadPlace, Choice
from snapshotd.wire import GenerationId, Holding, Inventory, Place, SnapshotId
from snapshotd_client import agree, regain
from snapshotd_client.agree import Card, Rebuilt
from tests.sim.loop import Life, Loop
from tests.sim.memory import Memory
from tests.sim.trainer import Trainer

if TYPE_CHECKING:
    from tests.sim.machine import Host
    from tests.sim.world import World

JOB = "job"
BLOCK = 4096
ATTEMPTS_MAX = 16
POLL_S = 0.02
PATIENCE_S = 20.0


class Failed(Exception):
    """A launch ends: its processes exit, and the job is launched again."""


class Run:
    """One launch: its processes, and the generation that they agree on."""

    def __init__(self, world: World, places: Mapping[Host, Sequence[int]], parity: int, group_size: int) -> None:
        self.world, self.parity, self.group_size = world, parity, group_size
        self.world_size = sum(map(len, places.values()))
        self.ended = self.trains = False
        self.life = Life("the launch")
        self.loop = Loop(world.queue, self.life, world.delay_s, world.failed)
        self.trainers = {
            rank: Trainer(self, host, rank) for host, own in places.items() for rank in own if not host.lost
        }
        self.identity = GenerationId(0, bytes(16))
        self.nonce = world.chance.randbytes(16)
        self.nodes: list[Place] = []
        self.groups: tuple[tuple[bytes, ...], ...] = ()
        self.restored: SnapshotId | None = None
        self.committed = False
        self.assignments: dict[int, Assignment] = {}
        self.giving_up = 0.0
        self._waiting: set[int] = set()
        self._left: set[int] = set()

    # --- what its ranks have ----------------------------------------------------------------------

    def file_bytes(self, rank: int) -> int:
        return self.world.job.file_bytes(rank)

    def fingerprint(self, rank: int) -> bytes:
        return bytes([rank + 1]) * 32

    def local(self, rank: int) -> list[int]:
        here = self.trainers[rank].host
        return [one for one, trainer in sorted(self.trainers.items()) if trainer.host is here]

    def attach(self, rank: int, passed: int) -> wire.Attach:
        own = self.local(rank)
        size = -(-self.world.job.slot_bytes // BLOCK) * BLOCK
        return wire.Attach(
            JOB, self.identity, rank, self.world_size, own.index(rank), own, self.world.job.every, size, BLOCK,
            self.fingerprint(rank), parity=self.parity, group_size=self.group_size, passed=passed,
            restored=self.restored, committed=self.committed, nodes=self.nodes,
            groups=[list(group) for group in self.groups],
        )  # fmt: skip

    # --- its end ----------------------------------------------------------------------------------

    def member_lost(self, trainer: Trainer, why: str) -> None:
        """One process is gone: the launcher ends the others before long."""
        trainer.die()
        if not self.ended:
            self.ended = True
            self.world.note("the launch", "ends, since", why)
            self.world.job.loop.call_later(self.world.luck.uniform(0.0, 0.1), self.end)

    def end(self) -> None:
        """Every process of it is killed, and the job is launched again."""
        self.ended = True
        for trainer in self.trainers.values():
            trainer.die()
        self.life.dead = True
        self.world.job.over(self)

    def close(self) -> None:
        """Every rank ends its run."""
        self.trains, self.ended, self._left = False, True, set(self.trainers)
        self.world.job.loop.call_later(10.0, self._end_late)
        self.world.checker.closed((self.identity.number, self.identity.nonce))
        for trainer in self.trainers.values():
            trainer.loop.call_later(self.world.delay_s(), lambda one=trainer: one.loop.create_task(one.close()))

    def _end_late(self) -> None:
        if self.world.job.run is self:
            self.end()

    def gone(self, trainer: Trainer) -> None:
        """It has closed its run; its process ends."""
        self._left.discard(trainer.rank)
        if not self._left:
            self.world.job.loop.call_later(self.world.luck.uniform(0.0, 8.0), self.end)

    # --- the loop ---------------------------------------------------------------------------------

    def arrived(self, trainer: Trainer) -> None:
        """A rank has ended its loop body; once all have, the next step of training begins."""
        self._waiting.discard(trainer.rank)
        if not self._waiting and not self.ended:
            self._begin_step()

    def _begin_step(self) -> None:
        if any(trainer.life.dead for trainer in self.trainers.values()):
            return
        self._waiting = set(self.trainers)
        for trainer in self.trainers.values():
            trainer.go()

    # --- the way in -------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Agree, restore, attach, train. What goes wrong ends the launch."""
        try:
            inventories = await self._inventories()
            await self._restore(inventories)
            await self._attach_all()
        except (SnapshotError, ProtocolError, Failed) as error:
            self.world.note("the launch", "fails", str(error))
            if not self.ended:
                self.end()
            return
        if not self.ended:
            self.world.note("the launch", "trains", str(self.identity), str(self.restored))
            self.trains = True
            self.world.job.goes_well(self)
            for trainer in self.trainers.values():
                if trainer.door is not None and trainer.door.over:
                    trainer.seek()
            self._begin_step()

    async def _all(self, do: Any) -> list[Any]:
        """Every rank does something at the same time; what one fails at, all fail at."""
        return list(await asyncio.gather(*(do(trainer) for _, trainer in sorted(self.trainers.items()))))

    async def _inventories(self) -> list[Inventory]:
        async def one(trainer: Trainer) -> wire.InventoryTaken:
            door = await trainer.knock()
            reply, _ = await door.ask(wire.TakeInventory(JOB))
            assert isinstance(reply, wire.InventoryTaken)
            return reply

        taken = await self._all(one)
        cards = [
            Card(rank, self.world_size, JOB, self.world.job.every, self.parity, self.group_size, self.nonce,
                 reply.inventory, "", "", "")
            for rank, reply in zip(sorted(self.trainers), taken, strict=True)
        ]  # fmt: skip
        self.nodes = agree.places(cards)
        self.identity = agree.next_generation(cards, self.world.clock.wall_s())
        known = [reply.inventory for reply in taken]
        members = {inventory.node for inventory in known}
        elsewhere = {one.node: one for reply in taken for one in reply.peers if one.node not in members}
        found = [*known, *elsewhere.values()]
        self.groups = agree.grouping(self.nodes, found, self.group_size, None)
        return found

    async def _restore(self, inventories: list[Inventory]) -> None:
        excluded = {one for inventory in inventories for one in inventory.hopeless}
        bad: set[BadPlace] = set()
        seen = {inventory.node for inventory in inventories}
        for attempt in range(ATTEMPTS_MAX):
            choice = recovery.choose(inventories, excluded=excluded, bad=sorted(bad))
            self.world.note("the launch", "chooses", choice.why)
            if not attempt:
                self.world.checker.chosen(choice.snapshot, choice.lost, seen, excluded)
            if choice.snapshot is None:
                # As in the client: what an earlier attempt would have gone on from gives nobody an arena.
                self.assignments, self.groups = {}, agree.grouping(self.nodes, inventories, self.group_size, None)
                self.world.job.begins_afresh(choice.lost)
                return
            if choice.world_size != self.world_size:
                self.world.job.has_ranks(choice.world_size)
                raise Failed("the layout changed")
            choice, inventories, rebuilt = await self._regain(choice, inventories, excluded, bad)
            self.restored = choice.snapshot
            corrupt = await self._verify(choice)
            if not corrupt:
                self.world.checker.chosen(choice.snapshot, False, seen, excluded)
                return
            if rebuilt:
                raise Failed("it turned out damaged while lost shards of it were being rebuilt")
            bad |= corrupt
            self.restored = None
            arenas = {arena for _, _, arena in corrupt}
            inventories = [_with_room(one, arenas) for one in inventories]
        raise Failed("too many attempts")

    async def _regain(
        self, choice: Choice, inventories: list[Inventory], excluded: set[SnapshotId], bad: set[BadPlace]
    ) -> tuple[Choice, list[Inventory], bool]:
        assert choice.snapshot is not None
        by_node: dict[bytes, list[int]] = {}
        for rank, trainer in sorted(self.trainers.items()):
            by_node.setdefault(trainer.host.node, []).append(rank)
        node_of = {rank: trainer.host.node for rank, trainer in self.trainers.items()}
        self.assignments = recovery.assign(choice, by_node, inventories)
        planned = regain.with_rebuilt(inventories, choice, self.assignments, node_of, self.identity, None)
        formation = recovery.previous_places(planned, choice.snapshot)
        self.committed = choice.committed
        self._go_on_from(choice.snapshot, inventories, formation)
        if not choice.missing:
            return choice, inventories, False
        streams = {one.node: one.streams for one in inventories if one.streams}

        async def one(trainer: Trainer) -> Rebuilt:
            own = self.assignments[trainer.rank]
            return await self._rebuild(trainer, own, choice, streams) if own.rebuild else Rebuilt()

        rebuilt = await self._all(one)
        bad -= {(choice.snapshot, one.shard, one.arena) for one in rebuilt}
        inventories = regain.with_rebuilt(inventories, choice, self.assignments, node_of, self.identity, rebuilt)
        whole = recovery.choose(inventories, excluded=excluded, bad=sorted(bad))
        if whole.snapshot != choice.snapshot or whole.missing:
            raise Failed(f"it was rebuilt and is still not whole: {whole.why}")
        return whole, inventories, True

    def _go_on_from(self, snapshot: SnapshotId, inventories: list[Inventory], formation: Formation) -> None:
        self.restored = snapshot
        self.groups = agree.grouping(self.nodes, inventories, self.group_size, formation)
        self._tell_the_checker()  # parity may be made while others still rebuild

    async def _rebuild(
        self, trainer: Trainer, own: Assignment, choice: Choice, streams: Mapping[bytes, str]
    ) -> Rebuilt:
        assert choice.snapshot is not None and own.shard is not None
        how = choice.missing[own.shard]
        ask = self.attach(trainer.rank, choice.snapshot.step)
        size = self._slot_bytes(own, trainer)
        ask = msgspec.structs.replace(ask, arena=own.arena, rebuild=True, slot_bytes=size)
        memory = await trainer.claim(ask)
        assert trainer.door is not None
        await trainer.door.ask(wire.Rebuild(
            memory.arena_id, choice.snapshot, own.shard, how.layout,
            {r: Holding(streams.get(s.node, ""), "", s.shard.arena, s.shard.slot) for r, s in how.shards.items()},
            {p: Holding(streams.get(s.node, ""), "", s.report.arena, s.report.slot) for p, s in how.parities.items()},
        ))  # fmt: skip
        began_s = self.world.queue.now_s
        while self.world.queue.now_s < began_s + PATIENCE_S:
            await self.pause(POLL_S)
            report, _ = await trainer.door.ask(wire.AskRebuild(memory.arena_id))
            assert isinstance(report, wire.RebuildReport)
            if report.over:
                if report.failure:
                    self.world.job.counts[f"rebuild {report.failure}"] += 1
                    raise Failed(f"the rebuild failed: {report.why}")
                self.world.job.counts["rebuilt"] += 1
                return Rebuilt(True, own.shard, memory.arena_id, report.slot, memory.slot_bytes, memory.block_bytes)
        raise Failed("the rebuild lasts too long")

    def _slot_bytes(self, own: Assignment, trainer: Trainer) -> int:
        held = trainer.host.memory.get(own.arena or b"")
        return held.slot_bytes if held is not None else max(own.slot_bytes, self.world.job.slot_bytes)

    async def pause(self, seconds: float) -> None:
        """Wait a while."""
        future = self.loop.create_future()
        self.loop.call_later(seconds, future.set_result, None)
        await future

    async def _verify(self, choice: Choice) -> set[BadPlace]:
        """Every rank reads the shard in its arena, and its own wherever it lies; places that turned out bad."""
        assert choice.snapshot is not None
        found: dict[int, bytes] = {}
        bad: set[BadPlace] = set()
        made = choice.snapshot

        async def one(trainer: Trainer) -> None:
            assigned = self.assignments[trainer.rank].shard
            wanted = {trainer.rank, *([assigned] if assigned is not None else [])}
            for rank in sorted(wanted):
                source = choice.sources[rank]
                if source.node != trainer.host.node:
                    continue
                shard = source.shard
                door = trainer.door
                assert door is not None
                await door.ask(wire.OpenShard(shard.arena, shard.slot, made))
                await self.pause(self.world.delay_s())
                memory = trainer.host.memory.get(shard.arena)
                if memory is None:
                    raise DaemonUnavailable("the arena is gone")
                broken = memory.broken_blocks(shard.slot) or not memory.slots[shard.slot].sound
                if broken:
                    bad.add((made, rank, shard.arena))
                    await door.ask(wire.Quarantine(shard.arena, shard.slot, made, "blocks fail their checksum"))
                found[rank] = memory.file(shard.slot)
                await door.ask(wire.CloseShard(shard.arena, shard.slot))

        await self._all(one)
        for rank, source in choice.sources.items():
            if rank not in found:
                found[rank] = self._read_from_afar(rank, source)
        if not bad:
            self.world.checker.restored(made, self.world_size, found)
        return bad

    def _read_from_afar(self, rank: int, source: recovery.Source) -> bytes:
        host = next((one for one in self.world.living() if one.node == source.node and one.up), None)
        memory = host.memory.get(source.shard.arena) if host is not None else None
        if memory is None or memory.slots[source.shard.slot].made != _made(source.shard.snapshot):
            raise DaemonUnavailable("that node is out of reach")
        if memory.broken_blocks(source.shard.slot):
            raise Failed(f"the shard of rank {rank} is damaged where it lies")
        return memory.file(source.shard.slot)

    async def _attach_all(self) -> None:
        base = self.restored.step if self.restored is not None else 0

        async def one(trainer: Trainer) -> None:
            trainer.step = base
            own = self.assignments.get(trainer.rank, Assignment())
            if own.rebuild and trainer.memory is not None:
                return
            ask = self.attach(trainer.rank, base)
            if own.arena is not None:
                memory = trainer.host.memory.get(own.arena)
                if memory is None:
                    raise Failed("the arena is gone")
                ask = msgspec.structs.replace(ask, arena=own.arena, slot_bytes=memory.slot_bytes)
            await trainer.claim(ask)
            trainer.ring()

        self._tell_the_checker()
        await self._all(one)

    def _tell_the_checker(self) -> None:
        ranks: dict[bytes, list[int]] = {}
        for trainer in self.trainers.values():
            ranks.setdefault(trainer.host.node, self.local(trainer.rank))
        groups = [list(group) for group in self.groups] or [[node] for node in ranks]
        shards = {
            node: [own for rank in held if (own := self.assignments.get(rank, Assignment()).shard) is not None]
            for node, held in ranks.items()
        }
        self.world.checker.generation(
            (self.identity.number, self.identity.nonce), groups, ranks, shards,
            self.parity if self.nodes else 0, _made(self.restored) if self.restored is not None else None,
        )  # fmt: skip


def dealt(chance: random.Random, count: int) -> list[int]:
    """So many ranks on some machines."""
    left, found = count, []
    while left:
        found.append(chance.randint(1, min(2, left)))
        left -= found[-1]
    return found


def _made(snapshot: SnapshotId) -> tuple[int, bytes, int]:
    return snapshot.generation.number, snapshot.generation.nonce, snapshot.step


def _with_room(inventory: Inventory, arenas: set[bytes]) -> Inventory:
    return msgspec.structs.replace(
        inventory,
        arenas=[
            msgspec.structs.replace(one, room=max(1, one.room)) if one.arena in arenas else one
            for one in inventory.arenas
        ],
    )


class Job:
    """What is launched again and again, on whatever machines there are."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.parity, self.group_size, self.every = 1, 8, 1
        self.sizes = [5000]
        self.slot_bytes = 8192
        self.wanted: list[int] = [1, 1, 1]  # ranks of each node
        self.run: Run | None = None
        self.counts: Counter[str] = Counter()
        self.waiting: list[tuple[Host, Loop, asyncio.Future[Any]]] = []
        self.fresh = False
        self.held_until_s = 0.0  # no machines can be had for it before
        self._failed = 0
        self.loop = Loop(world.queue, Life("the launcher"), world.delay_s, world.failed)

    def set_up(self, parity: int, group_size: int, every: int, sizes: list[int], wanted: list[int]) -> None:
        self.parity, self.group_size, self.every, self.sizes, self.wanted = parity, group_size, every, sizes, wanted
        self.slot_bytes = -(-max(sizes) // BLOCK) * BLOCK

    def file_bytes(self, rank: int) -> int:
        return self.sizes[rank % len(self.sizes)]

    def launch(self) -> None:
        """Start the processes on the machines that are there; missing ones are replaced by new machines."""
        if self.run is not None:
            return
        if self.world.queue.now_s < self.held_until_s:
            self.loop.call_later(0.1, self.launch)
            return
        if any(not host.up for host in self.world.living()) and self.world.chance.random() < 0.95:
            self.loop.call_later(0.1, self.launch)  # whoever launches it waits for its machines, mostly
            return
        living = [host for host in self.world.living() if host.up]
        while len(living) < len(self.wanted):
            living.append(self.world.add_host())
        held = sorted(living, key=lambda host: (not host.memory, int(host.label[1:])))
        chosen = held[: len(self.wanted)]
        if self.world.chance.random() < 0.2:
            self.world.chance.shuffle(chosen)  # a relaunch deals the ranks anew
        places, first = {}, 0
        for host, count in zip(chosen, self.wanted, strict=True):
            places[host] = list(range(first, first + count))
            first += count
        self.run = run = Run(self.world, places, self.parity, self.group_size)
        self.counts["launches"] += 1
        self.world.note("the launcher", "launches on", *(host.label for host in chosen))
        run.loop.call_later(0.0, lambda: run.loop.create_task(run.begin()))

    def has_ranks(self, count: int) -> None:
        """So many, since what is in memory is of so many."""
        self.wanted = dealt(self.world.chance, count)

    def stop(self, why: str) -> bool:
        """Whoever launched it ends it; it is launched again."""
        run = self.run
        if run is None or run.ended:
            return False
        self.world.note("the launcher", "stops it:", why)
        run.end()
        return True

    def close_run(self) -> bool:
        """The run is at its end."""
        run = self.run
        if run is None or run.ended or not run.trains:
            return False
        run.close()
        return True

    def over(self, run: Run) -> None:
        """A launch ended."""
        if self.run is run:
            self.run = None
            self._failed = 0 if run.trains else self._failed + 1
            if self._failed > 5:  # a person tries it on other machines
                self._failed, self.wanted = 0, dealt(self.world.chance, sum(self.wanted))
            self.loop.call_later(self.world.luck.uniform(0.05, 0.3), self.launch)

    def goes_well(self, run: Run) -> None:
        self.counts["runs"] += 1
        self.counts["restored"] += run.restored is not None
        self.fresh = False

    def begins_afresh(self, lost: bool) -> None:
        self.counts["lost" if lost else "begun"] += 1
        self.fresh = True

    def trainer_of(self, memory: Memory) -> Trainer | None:
        if self.run is None:
            return None
        return next((one for one in self.run.trainers.values() if one.memory is memory and not one.life.dead), None)

    def waits(self, host: Host, loop: Loop, future: asyncio.Future[Any]) -> None:
        """Somebody asked the daemon of this host something."""
        if len(self.waiting) > 64:
            self.waiting = [one for one in self.waiting if not one[2].done()]
        self.waiting.append((host, loop, future))

    def daemon_died(self, host: Host) -> None:
        """Whoever asked it something hears that the connection ended; trainers come back to the next one."""
        left = []
        for one in self.waiting:
            owner, loop, future = one
            if future.done():
                continue
            if owner is host:
                loop.call_later(self.world.delay_s(), _break, future)
            else:
                left.append(one)
        self.waiting = left
        run = self.run
        if run is not None and run.trains:
            for trainer in run.trainers.values():
                if trainer.host is host and not trainer.life.dead:
                    trainer.seek()

    def host_lost(self, host: Host) -> None:
        if self.run is not None:
            for trainer in list(self.run.trainers.values()):
                if trainer.host is host:
                    self.run.member_lost(trainer, f"{host.label} is lost")


def _break(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(DaemonUnavailable("the daemon went away"))
