"""The simulated network: messages between hosts get lost, doubled, garbled, late and out of order; links are cut, also
in one direction only. Bytes of READs come at once or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snapshotd import wire
from snapshotd.errors import ProtocolError
from tests.sim.loop import Life, Loop

if TYPE_CHECKING:
    from tests.sim.machine import Host, SimDaemon
    from tests.sim.world import World


@dataclass
class Weather:
    """How messages fare. Shares of them, and the mean of their delay."""

    lost: float = 0.0
    doubled: float = 0.0
    garbled: float = 0.0
    broken_reads: float = 0.0
    delay_s: float = 0.002
    cuts: set[tuple[str, str]] = field(default_factory=set)  # from, to


def told(frame: bytes) -> str:
    """What a message says, in a few words."""
    for unpack in (wire.unpack_request, wire.unpack_reply):
        with contextlib.suppress(ProtocolError):
            message = unpack(frame)
            if isinstance(message, wire.Publish):
                passed = ", ".join(f"r{rank} {step}" for rank, step in message.passed.items())
                held = ", ".join(f"r{one.rank} {_name(one.snapshot)} {one.progress}" for one in message.held)
                return f"a state: passed {passed or 'nothing'}; holds {held or 'nothing'}"
            if isinstance(message, wire.Decree):
                what = f"COMMIT {message.committed}, ABORT {list(message.aborted)}, next {message.next_step}"
                return f"a decree: {what}"
            return type(message).__name__
    return "what is garbled"


def _name(made: wire.SnapshotId) -> str:
    return f"g{made.generation.number}:{made.step}"


class Post:
    """Between all hosts of a world."""

    def __init__(self, world: World) -> None:
        self._world, self.weather = world, Weather()
        self.counts: Counter[str] = Counter()
        self._loop = Loop(world.queue, Life("the network"), world.delay_s, world.failed)

    def send(self, sender: Host, address: str, frame: bytes, number: int | None = None, reply: bool = False) -> None:
        """A frame leaves. What becomes of it is drawn."""
        receiver = self._world.host_at(address)
        chance, weather = self._world.luck, self.weather
        self.counts["sent"] += 1
        if receiver is None or (sender.label, receiver.label) in weather.cuts:
            self.counts["cut off"] += receiver is not None
            return
        if weather.lost and chance.random() < weather.lost:
            self.counts["lost"] += 1
            return
        if weather.garbled and chance.random() < weather.garbled:
            self.counts["garbled"] += 1
            at = chance.randrange(len(frame))
            frame = frame[:at] + bytes([frame[at] ^ 1 << chance.randrange(8)]) + frame[at + 1 :]
        copies = 1
        if weather.doubled and chance.random() < weather.doubled:
            self.counts["doubled"] += 1
            copies = 2
        for _ in range(copies):
            delay_s = chance.expovariate(1 / weather.delay_s) * max(sender.slow, receiver.slow)
            self._loop.call_later(delay_s, self._arrive, sender, receiver, frame, number, reply)

    def _arrive(self, sender: Host, receiver: Host, frame: bytes, number: int | None, reply: bool) -> None:
        daemon = receiver.daemon
        if daemon is None or daemon.life.dead or not daemon.open:
            return
        if self._world.trace is not None:
            self._world.note(receiver.label, "hears", sender.label, told(frame))
        self._world.run(daemon.loop, asyncio.Handle(daemon.mesh.arrive, (sender, frame, number, reply), daemon.loop))

    def reach(self, sender: Host, address: str) -> SimDaemon:
        """The daemon that serves READs at an address. OSError where it cannot be reached."""
        receiver = self._world.host_at(address)
        down = receiver is None or receiver.daemon is None or receiver.daemon.life.dead or not receiver.daemon.open
        if down or self._cut(sender, receiver) or self._world.luck.random() < self.weather.broken_reads:
            raise ConnectionRefusedError
        assert receiver is not None and receiver.daemon is not None
        return receiver.daemon

    def _cut(self, sender: Host, receiver: Host | None) -> bool:
        assert receiver is not None
        ends = (sender.label, receiver.label)
        return ends in self.weather.cuts or ends[::-1] in self.weather.cuts
