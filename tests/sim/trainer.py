"""A simulated trainer: one rank's process, its arena, and its conversation with the daemon of its host.

Step by step as the client does it: claim, name, `passed`, copy, publish, ring. Each is an event of its own, so that
the daemon may look, and the trainer may die, between any two.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import msgspec

from snapshotd import _native, wire
from snapshotd.errors import DaemonUnavailable, Refused, SnapshotError
from snapshotd.streams import refused_by_peer
from tests.sim.loop import Life, Loop
from tests.sim.machine import Conversation
from tests.sim.memory import Memory

if TYPE_CHECKING:
    from tests.sim.job import Run
    from tests.sim.machine import Host

STEP_S = 0.04
KNOCK_S = 0.1


def content(made: tuple[int, bytes, int], rank: int, length: int) -> bytes:
    """The bytes of a rank at a step: unlike those of any other rank, step or generation, and of any other block."""
    seed = hashlib.blake2b(b"%d %b %d %d" % (made[0], made[1], made[2], rank), digest_size=61).digest()
    return (seed * (length // len(seed) + 1))[:length]


class Door:
    """A connection to the daemon of a host. One request at a time."""

    def __init__(self, host: Host, pid: int) -> None:
        self._world, self._host = host.world, host
        self._daemon = host.living()
        self._there = Conversation(self._daemon, pid, self._world.next_number())
        self._sent_s, self._closed = 0.0, False

    async def ask(self, request: wire.Request) -> tuple[wire.Reply, int]:
        """The reply, and the bell that came with it. DaemonUnavailable, or the typed Refused."""
        if self._daemon.life.dead or self._closed:
            raise DaemonUnavailable("the daemon went away")
        world, caller = self._world, cast(Loop, asyncio.get_running_loop())
        future: asyncio.Future[tuple[wire.Reply, int]] = caller.create_future()

        def replied(raw: bytes, bell: int) -> None:
            if not future.done():
                future.set_result((wire.unpack_reply(raw), bell))

        def send_back(raw: bytes, bell: int) -> None:
            caller.call_later(world.delay_s(), replied, raw, bell)

        self._daemon.loop.call_at(self._in_order(), self._there.ask, wire.pack(request), send_back)
        world.job.waits(self._host, caller, future)
        reply, bell = await future
        if isinstance(reply, wire.Refusal):
            raise refused_by_peer(reply)
        return reply, bell

    @property
    def over(self) -> bool:
        """The daemon is gone."""
        return self._daemon.life.dead

    def close(self) -> None:
        """The process ended, or hung up."""
        if not self._daemon.life.dead and not self._closed:
            self._daemon.loop.call_at(self._in_order(), self._there.hang_up)
        self._closed = True

    def _in_order(self) -> float:
        self._sent_s = max(self._sent_s, self._world.queue.now_s + self._world.delay_s())
        return self._sent_s


class Trainer:
    """One rank's process."""

    def __init__(self, run: Run, host: Host, rank: int) -> None:
        self.run, self.host, self.rank, self.world = run, host, rank, run.world
        self.pid = 1000 + self.world.next_number()
        self.life = Life(f"rank {rank}")
        self.loop = Loop(self.world.queue, self.life, self.world.delay_s, self.world.failed)
        self.door: Door | None = None
        self.memory: Memory | None = None
        self.step = 0
        self.skips = 0
        self.dies_in = 0  # so many of its moves from now
        self.closed = False
        self._bell = -1
        self._slot = -1
        self._served = -1
        self._next: tuple[asyncio.TimerHandle, Callable[[], None]] | None = None
        self._copied: asyncio.TimerHandle | None = None
        self._held: list[Memory] = []

    # --- process ----------------------------------------------------------------------------------

    def die(self) -> None:
        """Killed where it stands: the kernel lets go of its locks, and its connection ends."""
        if self.life.dead:
            return
        self.life.dead = True
        self.world.note(f"rank {self.rank}", "dies")
        for memory in self._held:
            if memory.holder == self.pid:
                memory.holder = 0
                released, memory.watchers = memory.watchers, []
                for one in released:
                    self.world.job.loop.call_later(self.world.delay_s(), self._lock_free, one)
        if self.door is not None:
            self.door.close()

    @staticmethod
    def _lock_free(released: Callable[[], None]) -> None:
        released()

    def lock(self, memory: Memory) -> bool:
        """Take the record lock of an arena."""
        if self.life.dead or memory.holder not in (0, self.pid):
            return False
        memory.holder = self.pid
        self._held.append(memory)
        return True

    # --- the way in -------------------------------------------------------------------------------

    async def knock(self) -> Door:
        """A new connection. DaemonUnavailable."""
        if self.door is not None:
            self.door.close()
        self.door = Door(self.host, self.pid)
        await self.door.ask(wire.Hello("trainer", self.pid))
        return self.door

    async def claim(self, ask: wire.Attach) -> Memory:
        """Attach, lock, and say so. Refused, DaemonUnavailable."""
        assert self.door is not None
        reply, bell = await self.door.ask(ask)
        assert isinstance(reply, wire.Granted)
        memory = self.host.memory.get(reply.arena)
        if memory is None or not self.lock(memory):
            raise Refused("somebody else holds the lock of this arena")
        await self.door.ask(wire.Held(reply.arena))
        self.memory, self._bell = memory, bell
        return memory

    def seek(self) -> None:
        """Its daemon is gone: knock until the next one answers."""
        self.loop.call_later(self.world.delay_s(), lambda: self.loop.create_task(self.come_back()))

    async def come_back(self) -> None:
        """Its daemon is a new one: take up the arena that this process holds. As the client's link does."""
        pauses = 0
        while not self.life.dead and not self.closed:
            try:
                await self.knock()
                await self._take_up()
                return
            except DaemonUnavailable:
                pass
            except SnapshotError as error:
                self.world.note(f"rank {self.rank}", "is refused", str(error))
                pauses += 1
                if pauses > 3:
                    self.run.member_lost(self, "its daemon does not have its arena any more")
                    return
            pause = self.loop.create_future()
            self.loop.call_later(KNOCK_S, pause.set_result, None)
            await pause

    async def _take_up(self) -> None:
        ask = self.run.attach(self.rank, self.step)
        if self.memory is None or self.memory.gone:
            raise Refused("it has no arena")
        ask = msgspec.structs.replace(ask, arena=self.memory.arena_id, slot_bytes=self.memory.slot_bytes)
        await self.claim(ask)
        self.ring()

    # --- the loop ---------------------------------------------------------------------------------

    def go(self) -> None:
        """The next `guard.step()` comes after one step of training."""
        chance = self.world.luck
        self._after(STEP_S * self.host.slow * chance.uniform(0.5, 1.5), self._end_of_body)

    def hurry(self) -> None:
        """What it would do next, now."""
        if self._next is not None and not self.life.dead and self._next[1] != self._end_of_body:
            timer, what = self._next
            timer.cancel()
            self._next = None
            what()

    def _after(self, delay_s: float, what: Callable[[], None]) -> None:
        def do() -> None:
            self._next = None
            self.dies_in -= 1
            if self.dies_in == 0:
                self.run.member_lost(self, f"rank {self.rank} died at a step")
                return
            what()

        self._next = self.loop.call_later(delay_s, do), what

    def _soon(self, what: Callable[[], None]) -> None:
        self._after(self.world.delay_s() / 4, what)

    def _end_of_body(self) -> None:
        memory = self.memory
        self.step += 1
        if memory is None or memory.gone:
            self.run.arrived(self)
            return
        if self._slot >= 0:
            self._copy_ends()  # the optimizer has waited for it
        due = memory.naming != self._served and 0 < memory.next_step <= self.step
        if due and self.skips > 0:
            self.skips -= 1
            self.world.faults["a rank skips a step"] += 1
        elif due:
            self._slot = memory.take()
            if self._slot >= 0:
                self._soon(self._name)
                return
        self._pass()
        if due:
            self.ring()

    def _name(self) -> None:
        memory, identity = self.memory, self.run.identity
        assert memory is not None
        memory.change(
            self._slot, generation=identity.number, nonce=identity.nonce, step=self.step, rank=self.rank,
            world_size=self.run.world_size, fingerprint=self.run.fingerprint(self.rank),
        )  # fmt: skip
        self._served = memory.naming
        self._soon(self._pass)
        self._copied = self.loop.call_later(self.world.luck.uniform(0, STEP_S), self._copy_ends)

    def _pass(self) -> None:
        assert self.memory is not None
        self.memory.passed = self.step
        self.run.arrived(self)

    def _copy_ends(self) -> None:
        memory, index = self.memory, self._slot
        if self._copied is not None:
            self._copied.cancel()
        self._copied, self._slot = None, -1
        if memory is None or index < 0:
            return
        if memory.slots[index].state != _native.FILLING:
            self.world.checker.complain(f"the slot that rank {self.rank} fills was given away")
            return
        if self.world.luck.random() < self.run.giving_up:
            memory.empty(index)
        else:
            made = memory.slots[index].made
            length = self.run.file_bytes(self.rank)
            memory.data[index][:length] = content(made, self.rank, length)
            memory.crcs[index] = _native.ec_crcs(memoryview(memory.data[index])[:length], memory.block_bytes)
            memory.change(index, state=_native.FULL, file_bytes=length, sound=True)
        self.ring()

    async def close(self) -> None:
        """The end of its run: it wants nothing back."""
        self.closed = True
        try:
            if self.door is not None and self.memory is not None:
                await self.door.ask(wire.Close(self.memory.arena_id))
        except (SnapshotError, DaemonUnavailable):
            pass
        self.run.gone(self)

    def ring(self) -> None:
        """Tell the daemon that there is something to see, if the bell is still its."""
        daemon = self.host.daemon
        if daemon is not None and not daemon.life.dead and self._bell in daemon.loop.bells:
            callback, args = daemon.loop.bells[self._bell]
            daemon.loop.call_later(self.world.delay_s() / 2, callback, *args)
