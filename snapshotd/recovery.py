"""What can be restored, from where, and why that: pure functions that every rank computes alike.

Input are the inventories of all nodes, as the ranks gathered them; the answer names a snapshot and the arena that
serves each rank's shard, or how a missing shard is rebuilt from the rest of its group, or says why there is none. A
snapshot is restored whole or not at all: shards of different steps or generations never meet.

1. `choose`            which snapshot, and what serves or brings back each shard of it
2. `previous_places`   how its nodes stood in groups, for `geometry.plan`
3. `assign`            which arena each rank of the new generation takes over or fills

`margins` is for people: how much more a snapshot can lose. Who decodes, and where the bytes go, is for others.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

import msgspec

from snapshotd import geometry
from snapshotd.errors import ProtocolError
from snapshotd.geometry import Formation
from snapshotd.manifest import round_up
from snapshotd.wire import ArenaReport, GroupLayout, Inventory, ParityReport, Shard, ShardShape, SnapshotId

PROGRESS = ("FILLING", "FULL", "PROTECTED", "COMMITTED")
USABLE = frozenset(PROGRESS[1:])
PARITY = -1
"""Stands for the rank where a `BadPlace` is a parity set."""

BadPlace: TypeAlias = tuple[SnapshotId, int, bytes]
"""Snapshot, rank (or `PARITY`) and arena of bytes that failed their checksum in an earlier attempt."""


@dataclass(frozen=True)
class Source:
    """Where a rank's shard lies."""

    node: bytes
    shard: Shard


@dataclass(frozen=True)
class ParitySource:
    """Where the parity that a position owns lies."""

    node: bytes
    report: ParityReport


@dataclass(frozen=True)
class Rebuilding:
    """What a missing shard of `position` is decoded from: the group's other shards by rank, its parity by position."""

    layout: GroupLayout
    position: int
    shards: Mapping[int, Source]
    parities: Mapping[int, ParitySource]


@dataclass(frozen=True)
class Choice:
    """`snapshot` is None where nothing is restored. `lost`: something was committed once and cannot be rebuilt.

    `sources` has the shards that are there, `missing` those to rebuild; together they have every rank once.
    `committed`: some mark says so.
    """

    snapshot: SnapshotId | None
    why: str
    world_size: int = 0
    sources: Mapping[int, Source] = field(default_factory=dict)
    lost: bool = False
    missing: Mapping[int, Rebuilding] = field(default_factory=dict)
    committed: bool = False


def choose(
    inventories: Iterable[Inventory],
    *,
    excluded: Collection[SnapshotId] = (),
    newer_than: int | None = None,
    bad: Collection[BadPlace] = (),
) -> Choice:
    """The newest generation and step that is whole or can be rebuilt from parity.

    `excluded` are snapshots that failed an earlier attempt as a whole; what is at a `bad` place counts as lost.
    `newer_than` is the step of a checkpoint of the user's own: only a newer snapshot is worth restoring then.
    """
    gathered = list(inventories)
    remains = _remains(gathered, bad)
    # By number first; groups that were cut off from one another may have picked the same, then the longer run wins.
    candidates = sorted(remains, key=lambda one: (one.generation.number, one.step, one.generation.nonce), reverse=True)
    reasons = sorted({sentence for inventory in gathered for sentence in inventory.damaged})
    for snapshot in candidates:
        if snapshot in excluded:
            reasons.append(f"{snapshot}: its bytes failed their checksum")
            continue
        found = _complete(remains[snapshot])
        if found.fault:
            reasons.append(f"{snapshot}: {found.fault}")
            continue
        return _chosen(snapshot, found, remains[snapshot].committed, reasons, newer_than)
    existed = any(one.damaged for one in gathered) or any(
        snapshot in excluded or left.spoiled for snapshot, left in remains.items()
    )
    return _nothing(existed or _was_committed(gathered), reasons, newer_than)


# --- what is left -----------------------------------------------------------------------------------------------------


@dataclass
class _Remains:
    """Of one snapshot: what is usable, the best first, and what is set aside because its bytes were bad."""

    shards: list[Source] = field(default_factory=list)
    parities: list[ParitySource] = field(default_factory=list)
    spoiled: list[Source | ParitySource] = field(default_factory=list)

    @property
    def committed(self) -> bool:
        progress = {source.shard.progress for source in self.shards} | {one.report.progress for one in self.parities}
        return "COMMITTED" in progress

    def world_sizes(self) -> set[int]:
        """What its shards say; bad ones are asked only where no other is left."""
        spoiled = [source for source in self.spoiled if isinstance(source, Source)]
        return {source.shard.world_size for source in self.shards or spoiled}

    def spoiled_ranks(self) -> set[int]:
        return {source.shard.rank for source in self.spoiled if isinstance(source, Source)}


def _remains(inventories: Sequence[Inventory], bad: Collection[BadPlace] = ()) -> dict[SnapshotId, _Remains]:
    """What is left of each snapshot of which anything is."""
    places = frozenset(bad)
    found: dict[SnapshotId, _Remains] = {}
    for node, shard in _merged((one.node, shard) for one in inventories for shard in one.shards):
        left = found.setdefault(shard.snapshot, _Remains())
        source = Source(node, shard)
        (left.spoiled if (shard.snapshot, shard.rank, shard.arena) in places else left.shards).append(source)
    for node, report in _merged((one.node, report) for one in inventories for report in one.parities):
        left = found.setdefault(report.snapshot, _Remains())
        parity = ParitySource(node, report)
        (left.spoiled if (report.snapshot, PARITY, report.arena) in places else left.parities).append(parity)
    return found


_Look = TypeVar("_Look", Shard, ParityReport)


def _merged(looks: Iterable[tuple[bytes, _Look]]) -> list[tuple[bytes, _Look]]:
    """What is usable, once each with its node: the most advanced first, then by where it lies; fosters last of all.

    Several ranks of a node ask at slightly different times, so two looks at one slot may differ. Whoever found damage
    is right; else the later look, in which the slot is further, is.
    """
    seen: dict[tuple[bytes, bytes, int, SnapshotId], _Look] = {}
    for node, look in looks:
        place = (node, look.arena, look.slot, look.snapshot)
        other = seen.get(place)
        seen[place] = look if other is None or other == look else max(look, other, key=_weight)
    usable = [(place, look) for place, look in seen.items() if look.progress in USABLE]
    usable.sort(key=lambda item: (item[1].foster, -PROGRESS.index(item[1].progress), item[0]))
    return [(place[0], look) for place, look in usable]


def _weight(look: Shard | ParityReport) -> tuple[int, bytes]:
    progress = PROGRESS.index(look.progress) if look.progress in PROGRESS else len(PROGRESS)
    return progress, msgspec.msgpack.encode(look)


def _was_committed(inventories: Iterable[Inventory]) -> bool:
    """Something of this job was committed once, whatever became of it."""
    return any(
        any(arena.ever_committed for arena in inventory.arenas)
        or any(shard.progress == "COMMITTED" for shard in inventory.shards)
        or any(report.progress == "COMMITTED" for report in inventory.parities)
        for inventory in inventories
    )


# --- what the groups can bring back -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """What is left of one group's part of a snapshot. `available` counts the symbols of each stripe."""

    layout: GroupLayout
    shards: Mapping[int, Source]
    parities: Mapping[int, ParitySource]
    available: tuple[int, ...]

    @property
    def margin(self) -> int:
        """How many more symbols each stripe can lose; below 0, bytes are lost."""
        return min(self.available) - geometry.stripes(self.layout).k

    @property
    def is_foster(self) -> bool:
        """Survivors made it among themselves."""
        return any(source.report.foster for source in self.parities.values())

    def left_for(self, position: int, index: int) -> int:
        """The fewest symbols that a stripe with bytes of this shard has left."""
        stripes = geometry.stripes(self.layout)
        over = geometry.pieces_over(self.layout, position, index)
        return min((self.available[stripes.stripe_of(position, piece)] for piece, _, _ in over), default=stripes.n)

    def rebuilding(self, position: int) -> Rebuilding:
        return Rebuilding(self.layout, position, self.shards, self.parities)


def groups_of(inventories: Iterable[Inventory], snapshot: SnapshotId, bad: Collection[BadPlace] = ()) -> list[Group]:
    """The groups that parity of this snapshot tells of, in the order of their layouts' digests.

    A snapshot that was protected anew in another generation may have two groups for one shard.
    """
    left = _remains(list(inventories), bad).get(snapshot, _Remains())
    worlds = left.world_sizes()
    return _groups(left, *worlds) if len(worlds) == 1 else []


class Margin(NamedTuple):
    """How much more one group can lose: `margin` further positions, of what the nodes in `holders` have of it."""

    layout: GroupLayout
    holders: tuple[bytes, ...]
    margin: int


def margins(inventories: Iterable[Inventory], snapshot: SnapshotId, bad: Collection[BadPlace] = ()) -> list[Margin]:
    """The margin of each group of a snapshot, in the order of `groups_of`.

    As many nodes may still be lost, where each holds one position's part (after an odd relaunch one may hold two).
    """
    found = []
    for group in groups_of(inventories, snapshot, bad):
        holders = {shard.node for shard in group.shards.values()} | {one.node for one in group.parities.values()}
        found.append(Margin(group.layout, tuple(sorted(holders)), group.margin))
    return found


def _groups(left: _Remains, world_size: int) -> list[Group]:
    told: dict[bytes, list[ParitySource]] = {}
    for source in left.parities:
        told.setdefault(geometry.digest(source.report.layout), []).append(source)
    found = []
    for _, sources in sorted(told.items()):
        layout = sources[0].report.layout
        if not _sound(layout, world_size):
            continue
        parities: dict[int, ParitySource] = {}
        for source in sources:
            if source.report.position < len(layout.positions):
                parities.setdefault(source.report.position, source)
        if parities:
            found.append(_group(layout, left.shards, dict(sorted(parities.items()))))
    return found


def _sound(layout: GroupLayout, world_size: int) -> bool:
    try:
        geometry.check(layout)
    except ProtocolError:
        return False
    return all(shape.rank < world_size for _, _, shape in _shapes(layout))


def _group(layout: GroupLayout, sources: Iterable[Source], parities: Mapping[int, ParitySource]) -> Group:
    wanted = {shape.rank: (shape.file_bytes, shape.fingerprint) for _, _, shape in _shapes(layout)}
    shards: dict[int, Source] = {}
    for source in sources:
        shard = source.shard
        if wanted.get(shard.rank) == (shard.file_bytes, shard.fingerprint):
            shards.setdefault(shard.rank, source)
    gaps = {
        (position, piece)
        for position, index, shape in _shapes(layout)
        if shape.rank not in shards
        for piece, _, _ in geometry.pieces_over(layout, position, index)
    }
    stripes = geometry.stripes(layout)

    def is_there(stripe: int, position: int) -> bool:
        piece = stripes.piece_of(stripe, position)
        return position in parities if piece is None else (position, piece) not in gaps

    nodes = range(stripes.n)
    available = tuple(sum(is_there(stripe, position) for position in nodes) for stripe in nodes)
    return Group(layout, dict(sorted(shards.items())), parities, available)


def _shapes(layout: GroupLayout) -> Iterator[tuple[int, int, ShardShape]]:
    """Each shard of a layout with its position and its index there."""
    for position, shapes in enumerate(layout.positions):
        for index, shape in enumerate(shapes):
            yield position, index, shape


# --- is it whole? -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What serves and what brings back each rank's shard; or the `fault`, in words, for which that cannot be."""

    fault: str
    world_size: int = 0
    sources: Mapping[int, Source] = field(default_factory=dict)
    missing: Mapping[int, Rebuilding] = field(default_factory=dict)


def _complete(left: _Remains) -> _Found:
    worlds = left.world_sizes()
    if len(worlds) != 1:
        return _Found("its shards disagree about the world size" if worlds else "parity is all that is left of it")
    (world_size,) = worlds
    sources: dict[int, Source] = {}
    for source in left.shards:
        sources.setdefault(source.shard.rank, source)
    highest = max(sources, default=0)
    if world_size < 1 or highest >= world_size:
        return _Found(f"it has a shard of rank {highest} and a world size of {world_size}")
    # A foster is no arena to go on with: its shard is brought back like a lost one, by a copy. Where no parity tells
    # how it can be checked, it is read where it lies.
    fosters = {rank: sources.pop(rank) for rank, source in list(sources.items()) if source.shard.foster}
    groups = _groups(left, world_size) if len(sources) < world_size else []
    missing, faults = _rebuildable(groups, sources)
    sources |= {rank: source for rank, source in fosters.items() if rank not in missing}
    known = {*sources, *missing, *(rank for _, ranks in faults for rank in ranks)}
    sentences = [_beyond_help(known, world_size, bool(left.parities))] if len(known) < world_size else []
    sentences += [
        f"{_ranks(ranks)} {_are(len(ranks))} missing and {'its' if len(ranks) == 1 else 'their'} {fault}"
        for fault, ranks in faults
    ]
    if not sentences:
        return _Found("", world_size, dict(sorted(sources.items())), missing)
    spoiled = sorted(left.spoiled_ranks() - sources.keys())
    if spoiled:
        sentences.append(f"the bytes of {_ranks(spoiled)} failed their checksum")
    return _Found("; ".join(sentences))


def _rebuildable(
    groups: Sequence[Group], sources: Mapping[int, Source]
) -> tuple[dict[int, Rebuilding], list[tuple[str, list[int]]]]:
    """How each shard that is not there comes back (a foster of it is in the group's shards); and of those that do not,
    why not, for each group its ranks."""
    lost: dict[int, list[tuple[Group, int, int]]] = {}
    for group in groups:
        for position, index, shape in _shapes(group.layout):
            if shape.rank not in sources:
                lost.setdefault(shape.rank, []).append((group, position, index))
    missing: dict[int, Rebuilding] = {}
    failing: dict[int, tuple[Group, int, list[int]]] = {}
    for rank, places in sorted(lost.items()):
        for group, position, index in places:
            if rank in group.shards or group.left_for(position, index) >= geometry.stripes(group.layout).k:
                missing[rank] = group.rebuilding(position)
                break
        else:
            group, position, index = places[0]
            kept = group.left_for(position, index)
            _, fewest, ranks = failing.get(id(group), (group, kept, []))
            failing[id(group)] = (group, min(fewest, kept), [*ranks, rank])
    return missing, [(_shortage(group, fewest), ranks) for group, fewest, ranks in failing.values()]


def _shortage(group: Group, kept: int) -> str:
    stripes = geometry.stripes(group.layout)
    return f"group of {stripes.n} nodes kept {kept} of the {stripes.k} pieces it needs"


def _beyond_help(known: Collection[int], world_size: int, has_parity: bool) -> str:
    """The ranks of which there is neither a shard nor any parity; few are named where a header claims very many."""
    absent = world_size - len(known)
    first = list(itertools.islice((rank for rank in itertools.count() if rank not in known), min(absent, 8)))
    which = f"{'rank' if absent == 1 else 'ranks'} {', '.join(map(str, first))}{', …' if absent > len(first) else ''}"
    more = f" and no parity of {'it' if absent == 1 else 'them'} is left" if has_parity else ""
    return f"{which} of {world_size} {_are(absent)} missing{more}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = [str(rank) for rank in ranks[:8]] + ["…"] * (len(ranks) > 8)
    return f"rank {shown[0]}" if len(shown) == 1 else f"ranks {', '.join(shown[:-1])} and {shown[-1]}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


# --- the answer -------------------------------------------------------------------------------------------------------


def _chosen(
    snapshot: SnapshotId, found: _Found, committed: bool, reasons: Sequence[str], newer_than: int | None
) -> Choice:
    if newer_than is not None and snapshot.step <= newer_than:
        return Choice(None, f"your own checkpoint of step {newer_than} is as new as {snapshot} or newer")
    here, world_size = len(found.sources), found.world_size
    if found.missing:
        how = "and it is committed" if committed else "though its commit was not finished"
        copied = sum(rank in how_it_comes.shards for rank, how_it_comes in found.missing.items())
        ways = [f"{len(found.missing) - copied} will be rebuilt from parity"] if len(found.missing) > copied else []
        ways += [f"{copied} will be copied from nodes that rebuilt {'it' if copied == 1 else 'them'}"] if copied else []
        why = (
            f"{snapshot} is the newest that is whole or can be rebuilt: {here} of {world_size} shards "
            f"{_are(here)} here, {', '.join(ways)}, {how}"
        )
    else:
        how = "committed" if committed else "whole, though its commit was not finished"
        shards = f"all {world_size} shards are" if world_size > 1 else "its one shard is"
        why = f"{snapshot} is the newest that is whole: {shards} here and it is {how}"
    if reasons:
        why += f"; passed over: {'; '.join(reasons)}"
    return Choice(snapshot, why, world_size, found.sources, missing=found.missing, committed=committed)


def _nothing(existed: bool, reasons: Sequence[str], newer_than: int | None) -> Choice:
    if not existed:
        partial = f" ({'; '.join(reasons)}: never committed)" if reasons else ""
        return Choice(None, f"nothing was ever committed for this job{partial}")
    why = f"{'; '.join(reasons) or 'no shard of a committed snapshot is left'}; nothing older is left"
    if newer_than is not None:
        return Choice(None, f"{why}, but your own checkpoint of step {newer_than} stands")
    return Choice(None, why, lost=True)


# --- who stands where in the next generation --------------------------------------------------------------------------


def previous_places(inventories: Iterable[Inventory], snapshot: SnapshotId) -> Formation:
    """How the nodes that protect a snapshot stand in its groups, which are numbered by their smallest rank.

    A node's parity set says where it stands; one without stands where all its shards belong. Where parity of several
    layouts is left, those with the most sets count, as long as they share no rank; one that survivors made while the
    job waited counts only where nothing is left of the grouping before it.
    """
    gathered = list(inventories)
    groups = _standing(groups_of(gathered, snapshot))
    by_parity: dict[bytes, set[tuple[int, int]]] = {}
    by_shards: dict[bytes, set[tuple[int, int]]] = {}
    for number, group in enumerate(groups):
        for position, parity in group.parities.items():
            by_parity.setdefault(parity.node, set()).add((number, position))
        for position, _, shape in _shapes(group.layout):
            if shape.rank in group.shards and not group.shards[shape.rank].shard.foster:
                by_shards.setdefault(group.shards[shape.rank].node, set()).add((number, position))
    places: dict[bytes, tuple[int, int]] = {}
    for told in (by_parity, by_shards):
        for node, stands in sorted(told.items()):
            if len(stands) == 1 and node not in places and not stands <= set(places.values()):
                (places[node],) = stands
    return Formation(tuple(len(group.layout.positions) for group in groups), places)


def _standing(groups: Sequence[Group]) -> list[Group]:
    """Groups that share no rank, those with the most parity sets first served, in the order of their smallest ranks."""
    taken: dict[int, Group] = {}
    for group in sorted(groups, key=lambda one: (one.is_foster, -len(one.parities))):
        ranks = {shape.rank for _, _, shape in _shapes(group.layout)}
        if ranks.isdisjoint(taken):
            taken.update(dict.fromkeys(ranks, group))
    return list({id(group): group for _, group in sorted(taken.items(), key=lambda item: item[0])}.values())


@dataclass(frozen=True)
class Assignment:
    """The arena that a rank of the new generation begins with. `arena` None: a new one.

    `shard` is the rank whose bytes of the restored snapshot are in it, or are to be decoded into it (`rebuild`); None:
    it has no part of that snapshot. `slot_bytes` is what a slot must hold at least for that.
    """

    arena: bytes | None = None
    shard: int | None = None
    rebuild: bool = False
    slot_bytes: int = 0


def assign(
    choice: Choice, ranks_by_node: Mapping[bytes, Sequence[int]], inventories: Iterable[Inventory]
) -> dict[int, Assignment]:
    """What every rank of the new generation begins with, by rank.

    Shards stay where they are: a rank takes the arena with its own, then the ranks that are left take what else their
    node holds. Missing shards go to ranks that still have none, so that each is protected again; those of a lost node
    stay together where there is room, on a node that holds nothing yet, best where they will be read.
    """
    free = {node: sorted(ranks) for node, ranks in sorted(ranks_by_node.items())}
    done = _taken_over(choice, free)
    holding = {source.node for source in choice.sources.values()}
    rooms = _rooms(list(inventories), choice)
    for node, shards in _placed(choice, free, holding):
        ranks = sorted(free[node], key=lambda rank: (rank not in shards, rank))[: len(shards)]
        free[node] = [rank for rank in free[node] if rank not in ranks]
        own = [rank for rank in ranks if rank in shards]
        others = [shard for shard in shards if shard not in own]
        for rank, shard in zip(ranks, [*own, *others], strict=True):
            done[rank] = _rebuilt(choice, shard, rooms.setdefault(node, []))
    left_over = {rank: Assignment() for ranks in free.values() for rank in ranks}
    return dict(sorted((done | left_over).items()))


def _taken_over(choice: Choice, free: dict[bytes, list[int]]) -> dict[int, Assignment]:
    """Ranks that take an arena with a shard of the snapshot; they are struck from `free`."""
    done: dict[int, Assignment] = {}
    taken: set[bytes] = set()

    def take(rank: int, source: Source) -> None:
        shard = source.shard
        done[rank] = Assignment(shard.arena, shard.rank, False, round_up(shard.file_bytes, shard.block_bytes))
        taken.add(shard.arena)
        free[source.node].remove(rank)

    sources = {rank: source for rank, source in choice.sources.items() if not source.shard.foster}
    for rank, source in sorted(sources.items()):
        if rank in free.get(source.node, ()) and source.shard.arena not in taken:
            take(rank, source)
    for _, source in sorted(sources.items()):
        # Who misses its own shard waits, since it may be the one to get it rebuilt.
        ranks = sorted(free.get(source.node, ()), key=lambda rank: (rank in choice.missing, rank))
        if ranks and source.shard.arena not in taken:
            take(ranks[0], source)
    return done


def _placed(
    choice: Choice, free: Mapping[bytes, Sequence[int]], holding: Collection[bytes]
) -> Iterator[tuple[bytes, list[int]]]:
    """Nodes and the missing shards that each takes; the caller strikes the ranks from `free` before it goes on."""
    lay_together: dict[tuple[bytes, int], list[int]] = {}
    for shard, how in sorted(choice.missing.items()):
        lay_together.setdefault((geometry.digest(how.layout), how.position), []).append(shard)
    for shards in sorted(lay_together.values(), key=lambda one: (-len(one), one)):
        while shards:
            wanted = frozenset(shards)
            node = min(
                (node for node, ranks in free.items() if ranks),
                key=lambda node: (
                    node in holding,
                    -min(len(free[node]), len(wanted)),
                    -len(wanted.intersection(free[node])),
                    node,
                ),
                default=None,
            )
            if node is None:
                return
            taken = sorted(shards, key=lambda shard: (shard not in free[node], shard))[: len(free[node])]
            shards = [shard for shard in shards if shard not in taken]
            yield node, sorted(taken)


def _rooms(inventories: Sequence[Inventory], choice: Choice) -> dict[bytes, list[ArenaReport]]:
    """Per node the arenas into which a shard can be rebuilt: none that has another shard of the snapshot already.

    A missing rank's shard that is listed all the same is one whose bytes are bad; its slot is room, or soon will be.
    """
    occupied = {
        shard.arena
        for inventory in inventories
        for shard in inventory.shards
        if shard.snapshot == choice.snapshot and shard.rank not in choice.missing
    }
    seen: dict[tuple[bytes, bytes], ArenaReport] = {}
    for inventory in inventories:
        for arena in inventory.arenas:
            place = (inventory.node, arena.arena)
            # Of two looks the one that saw less room: it is no error to make a new arena, and one to overfill this.
            seen[place] = min(arena, seen.get(place, arena), key=lambda one: (one.room, msgspec.msgpack.encode(one)))
    found: dict[bytes, list[ArenaReport]] = {}
    for (node, _), arena in sorted(seen.items(), key=lambda item: item[0]):
        if arena.room >= 1 and arena.arena not in occupied:
            found.setdefault(node, []).append(arena)
    return found


def _rebuilt(choice: Choice, shard: int, rooms: list[ArenaReport]) -> Assignment:
    """A missing shard goes to the arena of its rank if that is there, else the smallest that fits, else a new one."""
    shape = next(shape for _, _, shape in _shapes(choice.missing[shard].layout) if shape.rank == shard)
    needed = round_up(shape.file_bytes, shape.block_bytes)
    fitting = [one for one in rooms if one.slot_bytes >= needed and one.block_bytes == shape.block_bytes]
    if not fitting:
        return Assignment(None, shard, True, needed)
    best = min(fitting, key=lambda one: (one.rank != shard, one.slot_bytes, one.arena))
    rooms.remove(best)
    return Assignment(best.arena, shard, True, needed)
