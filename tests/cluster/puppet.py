"""A trainer without torch, on strings: a real process that attaches, locks, fills, publishes and dies when told to.

As a program it obeys one JSON order a line and answers each with a JSON line; `Puppet` is the test's end of it.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from snapshotd import _native, wire
from snapshotd.door_client import DoorClient
from snapshotd.errors import REFUSALS, Refused, SnapshotError
from snapshotd.wire import GenerationId, SnapshotId

_Reply = TypeVar("_Reply", bound=msgspec.Struct)
BLOCK_BYTES = 4096
SLOT_BYTES = 4 * BLOCK_BYTES
STATES = {
    _native.EMPTY: "EMPTY",
    _native.FILLING: "FILLING",
    _native.FULL: "FULL",
    _native.PROTECTED: "PROTECTED",
    _native.COMMITTED: "COMMITTED",
}


def generation_id(number: int, nonce: int | None = None) -> GenerationId:
    """A generation whose nonce follows from its number, unless one is given."""
    return GenerationId(number, bytes([number if nonce is None else nonce]) * 16)


def snapshot_id(generation: int, step: int) -> SnapshotId:
    """A snapshot of such a generation."""
    return SnapshotId(generation_id(generation), step)


def attach_request(job: str, rank: int, world_size: int, generation: int, **changes: Any) -> wire.Attach:
    """What a rank asks for, with the usual sizes."""
    plain = wire.Attach(
        job=job,
        generation=generation_id(generation),
        rank=rank,
        world_size=world_size,
        local_index=rank,
        local_ranks=list(range(world_size)),
        every=1,
        slot_bytes=SLOT_BYTES,
        block_bytes=BLOCK_BYTES,
        fingerprint=bytes(32),
    )
    return msgspec.structs.replace(plain, **changes)


class Puppet:
    """The test's end: every method is an order, and what the puppet raised is raised here."""

    def __init__(
        self,
        socket: Path,
        rank: int = 0,
        world_size: int = 1,
        generation: int = 1,
        job: str = "job",
        within: tuple[str, ...] = (),
    ) -> None:
        self.rank, self.world_size, self.generation, self.job = rank, world_size, generation, job
        self.within = within
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", "tests.cluster.puppet", str(socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.arena = b""
        self.orphans: list[int] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def order(self, name: str, *arguments: Any) -> Any:
        """Give an order and wait for its answer."""
        self.begin(name, *arguments)
        return self.finish()

    def begin(self, name: str, *arguments: Any) -> None:
        """Give an order whose answer is fetched later."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, list(arguments)]) + "\n")
        self._process.stdin.flush()

    def finish(self) -> Any:
        """The answer of the oldest order that was begun."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the puppet ended with status {self._process.wait()}"
        answer = json.loads(line)
        if "raised" in answer:
            kind = REFUSALS.get(answer["raised"])
            if kind is None:
                raise SnapshotError(f"{answer['raised']}: {answer['sentence']}")
            error = kind(answer["sentence"])
            error.__dict__.update(answer["facts"])
            raise error
        return answer["value"]

    def connect(self) -> None:
        """Knock and say hello."""
        self.order("connect")

    def inventory(self, job: str | None = None) -> wire.Inventory:
        """Take the inventory."""
        self.begin("inventory", job or self.job)
        return self.finish_inventory()

    def finish_inventory(self) -> wire.Inventory:
        """The answer to an order for it that was begun."""
        return msgspec.msgpack.decode(base64.b64decode(self.finish()), type=wire.Inventory)

    def grant(self, **changes: Any) -> bytes:
        """Attach, without taking the lock yet. Returns the arena's id."""
        request = attach_request(self.job, self.rank, self.world_size, self.generation, **changes)
        self.arena = bytes.fromhex(self.order("grant", base64.b64encode(msgspec.msgpack.encode(request)).decode()))
        return self.arena

    def ask(self, request: wire.Request, kind: type[_Reply]) -> _Reply:
        """Ask anything at all over the puppet's own connection."""
        answer = self.order("ask", base64.b64encode(msgspec.msgpack.encode(request)).decode())
        return msgspec.msgpack.decode(base64.b64decode(answer), type=kind)

    def attach(self, **changes: Any) -> bytes:
        """Connect if need be, attach, take the lock and say so."""
        self.connect()
        self.grant(**changes)
        self.order("lock")
        self.order("held")
        return self.arena

    def snapshot(self, step: int, text: str = "") -> int:
        """Take a whole snapshot of `step`; returns its slot."""
        slot = self.fill(step)
        self.order("publish", slot, text or f"rank {self.rank} at step {step}")
        self.order("ring")
        return slot

    def fill(self, step: int) -> int:
        """Claim a slot for `step` and leave it half filled; -1 where none is free."""
        return int(self.order("fill", step, self.generation, self.rank, self.world_size))

    def slots(self) -> dict[int, str]:
        """Steps in this arena, and how far each is."""
        return {int(step): state for step, state in self.order("slots").items()}

    def words(self) -> dict[str, int]:
        """The arena's words."""
        found: dict[str, int] = self.order("words")
        return found

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def fork(self) -> int:
        """Make it fork a child that only waits, as a DataLoader worker does; returns the child's pid."""
        self.orphans.append(int(self.order("fork")))
        return self.orphans[-1]

    def close(self) -> None:
        """End it and what it forked."""
        for pid in [self.pid, *self.orphans]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


# --- the puppet's own side ------------------------------------------------------------------------


class Orders:
    """What a puppet can do."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._door: DoorClient
        self._fds: dict[str, tuple[int, int, int]] = {}
        self._arena_id = ""
        self._arena: _native.Arena
        self._shards: list[int] = []

    def connect(self) -> None:
        self._door = DoorClient.connect(self._socket)
        self._door.ask(wire.Hello("trainer", os.getpid()))

    def disconnect(self) -> None:
        self._door.close()

    def inventory(self, job: str) -> str:
        reply, _ = self._door.ask(wire.TakeInventory(job))
        assert isinstance(reply, wire.InventoryTaken)
        return base64.b64encode(msgspec.msgpack.encode(reply.inventory)).decode()

    def ask(self, request: str) -> str:
        reply, _ = self._door.ask(msgspec.msgpack.decode(base64.b64decode(request), type=wire.Request))
        return base64.b64encode(msgspec.msgpack.encode(reply)).decode()

    def grant(self, request: str) -> str:
        reply, fds = self._door.ask(msgspec.msgpack.decode(base64.b64decode(request), type=wire.Attach))
        assert isinstance(reply, wire.Granted)
        self._arena_id = reply.arena.hex()
        arena_fd, lock_fd, bell_fd = fds
        self._fds[self._arena_id] = (arena_fd, lock_fd, bell_fd)
        self._arena = _native.Arena(arena_fd, writable=True, exclude_from_fork=True)
        return self._arena_id

    def lock(self) -> None:
        fcntl.lockf(self._fds[self._arena_id][1], fcntl.LOCK_EX | fcntl.LOCK_NB)

    def held(self) -> None:
        self._door.ask(wire.Held(bytes.fromhex(self._arena_id)))

    def fill(self, step: int, generation: int, rank: int, world_size: int) -> int:
        identity = generation_id(generation)
        slot = self._arena.claim(
            generation=identity.number,
            nonce=identity.nonce,
            step=step,
            rank=rank,
            world_size=world_size,
            fingerprint=bytes(32),
        )
        self._arena.passed = step
        return slot

    def publish(self, slot: int, text: str) -> None:
        data = text.encode()
        with self._arena.slot_view(slot) as view:
            view[: len(data)] = data
        self._arena.set_block_crcs(slot, len(data))
        self._arena.publish(slot, len(data))

    def passed(self, step: int) -> None:
        self._arena.passed = step
        self.ring()

    def ring(self) -> None:
        os.eventfd_write(self._fds[self._arena_id][2], 1)

    def slots(self) -> dict[int, str]:
        infos = [self._arena.slot(index) for index in range(self._arena.slots)]
        return {info.step: STATES.get(info.state, "?") for info in infos if info.state != _native.EMPTY}

    def words(self) -> dict[str, int]:
        names = ("passed", "next_step", "naming", "committed_step", "aborted_step")
        return {name: getattr(self._arena, name) for name in names} | {"ever": int(self._arena.ever_committed)}

    def damage(self, slot: int, offset: int) -> None:
        """Flip a bit of a slot's description in the header."""
        fd = self._fds[self._arena_id][0]
        place = 4096 + 128 * slot + offset
        (byte,) = os.pread(fd, 1, place)
        os.pwrite(fd, bytes([byte ^ 1]), place)

    def open_shard(self, arena: str, slot: int, generation: int, step: int) -> str:
        reply, fds = self._door.ask(wire.OpenShard(bytes.fromhex(arena), slot, snapshot_id(generation, step)))
        assert isinstance(reply, wire.ShardOpened)
        (fd,) = fds
        with contextlib.suppress(OSError):
            os.pwrite(fd, b"x", reply.slot_offset)
            raise AssertionError("a reader could write")
        self._shards.append(fd)
        return os.pread(fd, 64, reply.slot_offset).rstrip(b"\0").decode()

    def close_shard(self, arena: str, slot: int) -> None:
        self._door.ask(wire.CloseShard(bytes.fromhex(arena), slot))

    def quarantine(self, arena: str, slot: int, generation: int, step: int, why: str) -> None:
        self._door.ask(wire.Quarantine(bytes.fromhex(arena), slot, snapshot_id(generation, step), why))

    def close(self, arena: str) -> None:
        self._door.ask(wire.Close(bytes.fromhex(arena)))

    def touch(self) -> None:
        """Have every page of the arena in this process, as a trainer does."""
        self._arena = _native.Arena(self._fds[self._arena_id][0], writable=True, populate=True, exclude_from_fork=True)

    def fork(self) -> int:
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        return pid


def main() -> None:
    orders = Orders(sys.argv[1])
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": getattr(orders, name)(*arguments)}
        except Refused as error:
            answer = {"raised": error.kind, "sentence": str(error), "facts": error.__dict__}
        except Exception as error:
            answer = {"raised": type(error).__name__, "sentence": str(error), "facts": {}}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
