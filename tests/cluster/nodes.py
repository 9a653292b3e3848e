"""Several nodes on one machine: a daemon each, with its own memory, socket and ports, and trainers spread over them.

`Nodes` starts, loses, replaces and restarts nodes and has jobs of real trainers on them. `Cast` is a job of puppets: it
begins, saves, dies and comes back as trainers do, by the same pure functions, and takes a tenth of the time.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import random
import shutil
import signal
import socket
import string
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from snapshotd import _native, geometry, parityset, recovery, wire
from snapshotd.arena import SLOTS
from snapshotd.door_client import DoorClient
from snapshotd.errors import SnapshotError, SnapshotLost
from snapshotd.keys import Keys, pin
from snapshotd.mesh import ask_over_network
from snapshotd.recovery import Assignment, Choice
from snapshotd.streams import Stream
from snapshotd.wire import Holding, Inventory, Place, SnapshotId
from snapshotd_client import agree
from snapshotd_client.regain import with_rebuilt
from tests.cluster.harness import Daemon, Spec, Trainer, until
from tests.cluster.puppet import BLOCK_BYTES, SLOT_BYTES, Puppet, generation_id

STEPS, DEATH = 10, 6
SCENES_AT_ONCE = 6
_Case = TypeVar("_Case")
PORTS, SLICE, SLICES = 12000, 1000, 20


@functools.cache
def _ports() -> Iterator[int]:
    """A slice of ports that is this process's while it lives, by a lock that it holds: no other run of these tests, in
    this checkout or another, takes the port of a daemon that is about to come back."""
    for number in range(SLICES):
        lock = (Path(tempfile.gettempdir()) / f"snapshotd-test-ports-{number}.lock").open("w")
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _held.append(lock)
            return itertools.cycle(range(PORTS + number * SLICE, PORTS + (number + 1) * SLICE))
        lock.close()
    raise AssertionError(f"{SLICES} runs of these tests go on already")


_held: list[IO[str]] = []


def steady_port() -> int:
    """A port that a daemon finds free again when it is restarted: none that the kernel gives to others meanwhile."""
    for port in itertools.islice(_ports(), SLICE):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port is left below those that the kernel gives away")


class Nodes:
    """Nodes 0 … n-1, replaced by empty ones at will. Everything that was started is ended in the end.

    `flags` go to every daemon, `crash` arms a crash point in the daemons of these nodes.
    """

    def __init__(
        self,
        shm_dir: Path,
        folder: Path,
        count: int,
        *flags: str,
        crash: dict[int, str] | None = None,
        authenticate: bool = False,
    ) -> None:
        self._shm, self._folder = shm_dir, folder
        self._flags = (*flags, "--authenticate", "yes" if authenticate else "no")
        self.authenticate = authenticate
        self._crash = crash or {}
        self._lives = 0
        self._journals = 0
        self.trainers: list[Trainer] = []
        self.puppets: list[Puppet] = []
        self.daemons: list[Daemon] = []
        self._all: list[Daemon] = []
        for number in range(count):
            self.daemons.append(self._new(number))

    def _new(self, number: int) -> Daemon:
        self._lives += 1
        folder = self._folder / f"life-{self._lives}"
        memory = self._shm / f"life-{self._lives}"
        for one in (folder, memory):
            one.mkdir(mode=0o700)
        ports = ("--listen", f"tcp://127.0.0.1:{steady_port()}", "--stream-port", str(steady_port()))
        daemon = Daemon(memory, folder, *ports, "--node-id", f"node{number}", *self._flags)
        self._all.append(daemon)
        return daemon

    def start(self) -> Nodes:
        self._start(dict(enumerate(self.daemons)), self._crash)
        return self

    def _start(self, daemons: dict[int, Daemon], crash: dict[int, str]) -> None:
        """All at once: a machine with several cores has them up sooner."""

        def one(number: int) -> None:
            daemons[number].start({"SNAPSHOTD_CRASH": crash[number]} if number in crash else None)

        with ThreadPoolExecutor(len(daemons)) as pool:
            list(pool.map(one, daemons))

    # --- trainers ---------------------------------------------------------------------------------

    def train(self, recipe: str, ranks_on: Sequence[int], **changes: Any) -> list[Trainer]:
        """A job; `ranks_on[r]` is the node of rank r. `by_rank` maps a rank to changes of its own."""
        self._journals += 1
        by_rank: dict[int, dict[str, Any]] = changes.pop("by_rank", {})
        rendezvous = str(self._folder / f"rendezvous-{self._journals}")
        changes = {"steps": STEPS, **changes}
        group = []
        for rank, node in enumerate(ranks_on):
            journal = self._folder / f"journal-{self._journals}-{rank}.jsonl"
            spec = Spec(recipe, str(self.daemons[node].socket), str(journal), rank=rank, world_size=len(ranks_on))
            spec = replace(spec, rendezvous=rendezvous, **{**changes, **by_rank.get(rank, {})})
            group.append(Trainer(spec))
        self.trainers += group
        return group

    def dies(self, recipe: str, ranks_on: Sequence[int], **changes: Any) -> int:
        """A job that is killed after a commit; returns the newest step that a rank saw committed."""
        group = self.train(recipe, ranks_on, **{"die": "after_commit", "die_step": DEATH, **changes})
        codes = [one.join() for one in group]
        assert codes == [-9] * len(group), [one.events("error") for one in group]
        committed = max(event["committed"] or 0 for one in group for event in one.events("dying"))
        assert committed, "it died before anything was committed"
        return committed

    # --- faults -----------------------------------------------------------------------------------

    def lose(self, *numbers: int) -> None:
        """These nodes are gone with their memory: daemon and trainers are killed, shared memory is removed."""
        for number in numbers:
            daemon = self.daemons[number]
            for trainer in self.trainers:
                if trainer.spec.socket == str(daemon.socket) and trainer.process.is_alive():
                    trainer.kill()
            daemon.kill()
            shutil.rmtree(daemon.shm_dir)

    def replace(self, *numbers: int, crash: str = "") -> None:
        """Empty nodes in the places of lost ones."""
        for number in numbers:
            self.daemons[number] = self._new(number)
        armed = dict.fromkeys(numbers, crash) if crash else {}
        self._start({number: self.daemons[number] for number in numbers}, armed)

    def restart(self, number: int, crash: str = "") -> None:
        """The same node's next daemon, which finds what the last one left."""
        self.daemons[number].kill()
        self._start({number: self.daemons[number]}, {number: crash} if crash else {})

    def end(self, trainers: Sequence[Trainer]) -> None:
        """Kill what still trains."""
        for trainer in trainers:
            if trainer.process.is_alive():
                trainer.kill()

    # --- looking ----------------------------------------------------------------------------------

    def has_died(self, number: int) -> bool:
        """A node's daemon ended by itself."""
        process = self.daemons[number].process
        return process is not None and process.poll() is not None

    def generations(self, number: int, job: str = "test") -> list[dict[str, Any]]:
        """A job's generations as a node's status shows them."""
        found: list[dict[str, Any]] = self.daemons[number].status()["jobs"].get(job, {"generations": []})["generations"]
        return found

    def committed(self, number: int, job: str = "test") -> int:
        """The newest committed step that a node knows of in its newest generation."""
        generations = self.generations(number, job)
        return int(generations[-1]["committed_step"] or 0) if generations else 0

    def all_commit(self, step: int, *numbers: int, job: str = "test") -> None:
        """Wait until every node (or these) has committed this step or a newer one."""
        for number in numbers or range(len(self.daemons)):
            until(
                lambda number=number: self.committed(number, job) >= step,  # type: ignore[misc]
                f"step {step} committed on node {number}",
            )

    def counter(self, number: int, name: str) -> int:
        """One of a daemon's counters."""
        return int(self.daemons[number].status()["counters"][f"{name}_total"])

    def dropped(self, number: int) -> dict[str, int]:
        """What a daemon dropped, by reason."""
        found: dict[str, int] = self.daemons[number].status()["counters"].get("dropped_by_reason", {})
        return found

    def keys(self, number: int) -> Keys | None:
        """Those of a node; None where nodes speak in the clear."""
        path = self.daemons[number].shm_dir / "node.keys"
        return Keys.unpacked(path.read_bytes()) if self.authenticate else None

    def arenas(self) -> list[Path]:
        """Every arena of every node that is there now."""
        return [path for daemon in self.daemons for path in daemon.arenas()]

    def arena(self, number: int, *, parity: bool = False) -> Arena:
        """The only arena of a rank, or that with parity, on a node."""
        (found,) = (one for one in map(Arena, self.daemons[number].arenas()) if one.is_parity == parity)
        return found

    def logs(self) -> str:
        """What all daemons said."""
        return "\n".join(daemon.log.read_text() for daemon in self._all)

    def close(self) -> None:
        for puppet in self.puppets:
            puppet.close()
        for trainer in self.trainers:
            if trainer.process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trainer.pid, signal.SIGCONT)
                trainer.kill()
            trainer.process.close()
        for daemon in self._all:
            daemon.stop()


@contextlib.contextmanager
def nodes(
    shm_dir: Path,
    folder: Path,
    count: int,
    *flags: str,
    crash: dict[int, str] | None = None,
    authenticate: bool = False,
) -> Iterator[Nodes]:
    """Nodes that serve, cleared away in the end. Most tests have them speak in the clear, which takes less time."""
    made = Nodes(shm_dir, folder, count, *flags, crash=crash, authenticate=authenticate)
    try:
        yield made.start()
    except BaseException:
        print(made.logs())  # pytest shows it beside the failure
        raise
    finally:
        made.close()


def side_by_side(
    play: Callable[[Path, Path, _Case], None], cases: Sequence[_Case], shm_dir: Path, folder: Path
) -> None:
    """Play scenes that mostly wait, several at once, each with memory and folder of its own; every failure is told."""

    def one(number: int) -> str:
        memory, own = shm_dir / str(number), folder / str(number)
        for place in (memory, own):
            place.mkdir(mode=0o700)
        try:
            play(memory, own, cases[number])
        except BaseException:
            return f"{cases[number]}:\n{traceback.format_exc()}"
        return ""

    with ThreadPoolExecutor(SCENES_AT_ONCE) as pool:
        failures = [failure for failure in pool.map(one, range(len(cases))) if failure]
    assert not failures, "\n".join(failures)


# --- runs that nobody disturbs ----------------------------------------------------------------------------------------


@functools.cache
def undisturbed(recipe: str, world_size: int, steps: int = STEPS) -> list[tuple[dict[int, str], str]]:
    """Losses and final state of each rank of a run without snapshots."""
    with tempfile.TemporaryDirectory() as folder:
        group = [
            Trainer(
                Spec(
                    recipe, "", f"{folder}/journal-{rank}", guard=False, steps=steps, rank=rank, world_size=world_size,
                    rendezvous=f"{folder}/rendezvous",
                )
            )
            for rank in range(world_size)
        ]  # fmt: skip
        assert [one.join() for one in group] == [0] * world_size, [one.events("error") for one in group]
        found = [(one.losses(), one.events("end")[0]["digest"]) for one in group]
        for one in group:
            one.process.close()
        return found


def ends_exactly(group: Sequence[Trainer], at_least: int) -> int:
    """The job ends as the undisturbed one does, having gone on from one step for all; returns that step."""
    recipe, steps = group[0].spec.recipe, group[0].spec.steps
    codes = [one.join() for one in group]
    assert codes == [0] * len(group), [one.events("error") for one in group]
    (first,) = {one.events("restored")[0]["step"] for one in group}
    assert first >= at_least, f"it went on from step {first} and step {at_least} was committed"
    for one, (losses, digest) in zip(group, undisturbed(recipe, len(group), steps), strict=True):
        assert one.losses() == {step: losses[step] for step in range(first, steps)}
        assert one.events("end")[0]["digest"] == digest
    return int(first)


def errors_of(group: Sequence[Trainer]) -> list[dict[str, Any]]:
    """The exception that ended each trainer."""
    codes = [one.join() for one in group]
    assert codes == [3] * len(group), [one.events()[-1:] for one in group]
    return [one.events("error")[0] for one in group]


# --- damage -----------------------------------------------------------------------------------------------------------


class Arena:
    """A killed job's arena file, to be looked at and damaged between two runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDONLY)
        try:
            native = _native.Arena(fd, writable=False)
        finally:
            os.close(fd)
        self.slots = [native.slot(index) for index in range(native.slots)]
        self._places = [native.slot_offset(index) for index in range(native.slots)]
        self._tables = [12288 + index * -(-native.slot_bytes // native.block_bytes * 4 // 64) * 64 for index in (0, 1)]
        native.close()

    def repeat(self, index: int) -> None:
        """Put what is in this slot into a free one as well, published whole."""
        fd, one = os.open(self.path, os.O_RDWR), self.slots[index]
        try:
            native = _native.Arena(fd, writable=True)
        finally:
            os.close(fd)
        twin = native.claim(
            generation=one.generation, nonce=one.nonce, step=one.step, rank=one.rank, world_size=one.world_size,
            fingerprint=one.fingerprint,
        )  # fmt: skip
        with native.slot_view(twin) as to, native.slot_view(index) as what:
            to[:] = what
        native.set_block_crcs(twin, one.file_bytes)
        native.publish(twin, one.file_bytes)
        native.close()

    @property
    def is_parity(self) -> bool:
        """It holds parity sets, and not a rank's shards."""
        with self.path.open("rb") as file:
            file.seek(self._places[self.newest.index])
            return file.read(len(parityset.MAGIC)) == parityset.MAGIC

    @property
    def newest(self) -> _native.SlotInfo:
        """The newest slot that holds something whole."""
        whole = (_native.FULL, _native.PROTECTED, _native.COMMITTED)
        return max((one for one in self.slots if one.state in whole), key=lambda one: one.step)

    def contents(self) -> bytes:
        """All bytes of the newest snapshot's file."""
        with self.path.open("rb") as file:
            file.seek(self._places[self.newest.index])
            return file.read(self.newest.file_bytes)

    def flip(self, place: int) -> None:
        """Turn a bit of the newest snapshot over, `place` bytes from its beginning."""
        self._flip(self._places[self.newest.index] + place)

    def flip_table(self, block: int) -> None:
        """Turn a bit of the newest snapshot's checksum of a block over."""
        self._flip(self._tables[self.newest.index] + 4 * block)

    def _flip(self, offset: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))


# --- puppets ----------------------------------------------------------------------------------------------------------


def contents(rank: int, step: int) -> str:
    """What a puppet of this rank has in its snapshot of this step; lengths differ by rank and are no whole blocks."""
    chance = random.Random(f"rank {rank}, step {step}")
    return "".join(chance.choices(string.printable, k=BLOCK_BYTES + 1 + (rank * 3301) % (SLOT_BYTES - BLOCK_BYTES)))


class Cast:
    """A job of puppets; `ranks_on[r]` is the node of rank r. Its calls come in this order, again after every `kill`.

    1. `begin`    take the inventory, choose, rebuild what is lost, attach: what `protect` and `restore` do
    2. `save`     a snapshot on every rank, committed everywhere
    3. `kill`     every puppet dies
    """

    def __init__(
        self, nodes: Nodes, ranks_on: Sequence[int], *, job: str = "test", parity: int = 1, group_size: int = 8
    ) -> None:
        self.nodes, self.ranks_on, self.job, self.parity, self.group_size = nodes, ranks_on, job, parity, group_size
        self.puppets: list[Puppet] = []
        self.generation = 0
        self.choice: Choice
        self.changes: dict[str, Any] = {}
        self.step = 0

    # --- beginning --------------------------------------------------------------------------------

    def begin(self) -> int:
        """Attach a new generation of this job and return the step that it goes on from, whose bytes were compared.

        SnapshotLost where something was committed and cannot be had; SnapshotError where a daemon dies meanwhile.
        """
        inventories = self.knock()
        choice = self.choice = recovery.choose(inventories)
        if choice.lost:
            raise SnapshotLost(choice.why)
        places = self._places(inventories)
        self._introduce(places)
        self.changes = {"nodes": places, "parity": self.parity, "group_size": self.group_size}
        if choice.snapshot is None:
            self._attach_all(self._groups(places, None), {})
            return 0
        ranks_by_node = {place.node: tuple(place.ranks) for place in places}
        assignments = recovery.assign(choice, ranks_by_node, inventories)
        node_of = {rank: place.node for place in places for rank in place.ranks}
        planned = with_rebuilt(inventories, choice, assignments, node_of, generation_id(self.generation), None)
        formation = recovery.previous_places(planned, choice.snapshot)
        self.changes |= {"restored": choice.snapshot, "passed": choice.snapshot.step}
        self.step = choice.snapshot.step
        self._attach_all(self._groups(places, formation), assignments)
        self.holds(choice.snapshot)
        return self.step

    def knock(self) -> list[Inventory]:
        """New puppets, and what their nodes hold; nothing is attached yet."""
        self.kill()
        on = [self.nodes.daemons[node] for node in self.ranks_on]
        self.puppets = [
            Puppet(one.socket, rank, len(on), job=self.job, within=one.within) for rank, one in enumerate(on)
        ]
        self.nodes.puppets += self.puppets
        for name, arguments in (("connect", ()), ("inventory", (self.job,))):
            for puppet in self.puppets:
                puppet.begin(name, *arguments)
            if name == "connect":
                for puppet in self.puppets:
                    puppet.finish()
        inventories = [puppet.finish_inventory() for puppet in self.puppets]
        made = [one.snapshot for inventory in inventories for one in inventory.shards]
        made += [one.snapshot for inventory in inventories for one in inventory.parities]
        known = [one.generation.number for one in made]
        known += [one.generation.number for inventory in inventories for one in inventory.arenas]
        self.generation = max([*known, self.generation]) + 1
        for puppet in self.puppets:
            puppet.generation = self.generation
        return inventories

    def _places(self, inventories: Sequence[Inventory]) -> list[Place]:
        found: dict[bytes, tuple[Inventory, list[int]]] = {}
        for rank, inventory in enumerate(inventories):
            found.setdefault(inventory.node, (inventory, []))[1].append(rank)
        return [agree.place(one, ranks) for one, ranks in found.values()]

    def _introduce(self, places: list[Place]) -> None:
        """What `protect` does before anything is read: every daemon is told who is in the job."""
        for number in sorted(set(self.ranks_on)):
            with DoorClient.connect(self.nodes.daemons[number].socket) as door:
                door.ask(wire.Hello("trainer", os.getpid()))
                door.ask(wire.Introduce(self.job, places))

    def _groups(self, places: Sequence[Place], formation: geometry.Formation | None) -> list[list[bytes]]:
        return geometry.plan([geometry.Member(place.node) for place in places], self.group_size, formation)

    def _attach_all(self, groups: list[list[bytes]], assignments: dict[int, Assignment]) -> None:
        self.changes["groups"] = groups
        lost = [rank for rank, own in assignments.items() if own.rebuild]
        for rank in lost:
            self.attach(rank, arena=assignments[rank].arena, rebuild=True)
            self._begin_rebuild(rank, assignments[rank])
        for rank in lost:
            self._finish_rebuild(rank)
        for rank in range(len(self.puppets)):
            if rank not in lost:
                self.attach(rank, arena=assignments[rank].arena if rank in assignments else None)

    def attach(self, rank: int, **changes: Any) -> None:
        """Have a rank's arena, again where its daemon was restarted."""
        node = next(place for place in self.changes["nodes"] if rank in place.ranks)
        self.puppets[rank].attach(**{**self.changes, "local_ranks": list(node.ranks), **changes})

    def reattach(self, rank: int) -> None:
        """What a living trainer does once its daemon was restarted: it asks for the arena that it holds already."""
        puppet = self.puppets[rank]
        self.attach(rank, arena=puppet.arena, passed=puppet.words()["passed"])

    def _begin_rebuild(self, rank: int, own: Assignment) -> None:
        assert own.shard is not None and self.choice.snapshot is not None
        how = self.choice.missing[own.shard]
        streams = {place.node: place.streams for place in self.changes["nodes"]}

        def holding(node: bytes, one: wire.Shard | wire.ParityReport) -> Holding:
            return Holding(streams[node], node.hex()[:6], one.arena, one.slot)

        ask = wire.Rebuild(
            self.puppets[rank].arena, self.choice.snapshot, own.shard, how.layout,
            {shard: holding(source.node, source.shard) for shard, source in how.shards.items()},
            {position: holding(source.node, source.report) for position, source in how.parities.items()},
        )  # fmt: skip
        self.puppets[rank].ask(ask, wire.Done)

    def _finish_rebuild(self, rank: int) -> None:
        puppet = self.puppets[rank]

        def over() -> wire.RebuildReport | None:
            report = puppet.ask(wire.AskRebuild(puppet.arena), wire.RebuildReport)
            return report if report.over else None

        report = until(over, f"the end of the rebuild for rank {rank}")
        if report.failure:
            raise SnapshotError(f"{report.failure}: {report.why}")

    # --- saving -----------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """A snapshot of this step on every rank, committed everywhere."""
        self.publish(step)
        self.commits(step)

    def publish(self, step: int, *ranks: int) -> None:
        """A whole snapshot on every rank (or these); what becomes of it is for the daemons.

        As trainers do, it waits until what was restored is committed anew: no slot is free before that.
        """
        if 0 < self.step < step:
            self.commits(self.step)
        self.step = step
        for rank in ranks or range(len(self.puppets)):
            puppet = self.puppets[rank]
            # A rank that finds no slot is past this step without it, and the step is aborted: that is not meant here.
            until(lambda puppet=puppet: len(puppet.slots()) < SLOTS, f"a free slot of rank {rank}")  # type: ignore[misc]
            slot = puppet.fill(step)
            puppet.order("publish", slot, contents(rank, step))
            puppet.order("ring")

    def commits(self, step: int) -> None:
        """Wait until every rank has been told that this step or a newer one is committed."""
        for puppet in self.puppets:
            until(
                lambda puppet=puppet: puppet.words()["committed_step"] >= step,  # type: ignore[misc]
                f"step {step} committed for rank {puppet.rank}",
            )

    def close_runs(self, *ranks: int) -> None:
        """These ranks' runs are over and want nothing back."""
        for rank in ranks:
            self.puppets[rank].order("close", self.puppets[rank].arena.hex())

    def kill(self) -> None:
        """Every puppet dies, and whatever the daemons do about that is done."""
        for puppet in self.puppets:
            puppet.kill()

    # --- looking ----------------------------------------------------------------------------------

    def inventories(self) -> list[Inventory]:
        """What the nodes of this job hold now; fences nothing."""
        found = []
        for number in sorted(set(self.ranks_on)):
            keys = self.nodes.keys(number)
            address, key = self.nodes.daemons[number].status()["listen"], keys.badge.curve if keys else b""
            reply = ask_over_network(address, wire.AskInventory(self.job), 10.0, keys, key)
            assert isinstance(reply, wire.InventoryTaken)
            found.append(reply.inventory)
        return found

    def holds(self, snapshot: SnapshotId) -> None:
        """Every rank's shard of this snapshot can be read from somewhere and is what its puppet wrote."""
        inventories = {one.node: one for one in self.inventories()}
        choice = recovery.choose(inventories.values())
        assert choice.snapshot == snapshot and not choice.missing, choice.why
        for rank, source in choice.sources.items():
            there = inventories[source.node]
            found = pull(there, self.job, source.shard, self.nodes.keys(self.ranks_on[rank]))
            assert found.decode() == contents(rank, snapshot.step), f"rank {rank} has other bytes than it saved"


def pull(there: Inventory, job: str, shard: wire.Shard, keys: Keys | None = None) -> bytes:
    """A shard's bytes, read as a peer with these keys reads them, each block checked."""
    buffer = bytearray(shard.file_bytes)
    badge = there.badge if keys is not None else None
    expected = pin(keys.pem, badge.certificate) if keys is not None and badge is not None else None
    stream = Stream.connect(there.streams, secure=lambda _: expected)
    try:
        stream.ask(wire.Read(job, shard.arena, shard.slot, shard.snapshot, 0, shard.file_bytes))
        answer = stream.answer()
        stream.receive_into(memoryview(buffer))
    finally:
        stream.close()
    assert answer.length == shard.file_bytes
    assert _native.ec_check(buffer, answer.crcs, answer.block_bytes) == -1, "a block fails its checksum"
    return bytes(buffer)
