"""The nodes of one generation as one of them sees them: who coordinates, who protects whom, what each published last.

Pure: messages go in, messages and answers come out. Everything that is published only grows or is repeated, so a lost,
repeated or late message costs time and nothing else; `serial` keeps an older state from taking a newer one's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from snapshotd import geometry
from snapshotd.errors import Refused
from snapshotd.ledger import NodeState, Progress
from snapshotd.wire import Attach, GenerationId, GroupLayout, HeldShard, Place, Publish, ShardShape, SnapshotId

PROGRESS = {one.name: one for one in Progress}


@dataclass
class Cohort:
    """Membership of a generation on several nodes, and the last word of each.

    `groups` are node ids in the order of their positions, `parity` what the user asked for.
    """

    me: bytes
    nodes: Sequence[Place]
    groups: Sequence[Sequence[bytes]]
    parity: int
    states: dict[bytes, Publish] = field(default_factory=dict)
    heard_s: dict[bytes, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = {place.node: place for place in self.nodes}
        (self.group,) = (group for group in self.groups if self.me in group)
        self.position = list(self.group).index(self.me)
        self.coordinator = next(place.node for place in self.nodes if 0 in place.ranks)
        labels = [place.label for place in self.nodes]
        self._names = {
            place.node: place.label if labels.count(place.label) == 1 else f"{place.label} ({place.node.hex()})"
            for place in self.nodes
        }

    @classmethod
    def of(cls, ask: Attach, me: bytes) -> Cohort | None:
        """The cohort that an attach names; None for a job of one node. Refused where it cannot be meant."""
        if len(ask.nodes) < 2:
            return None
        _check(ask, me)
        return cls(me, tuple(ask.nodes), [list(group) for group in ask.groups], ask.parity)

    @property
    def parity_here(self) -> int:
        """Parity of this node's group: what was asked for, clipped to what the group's size allows."""
        return geometry.parity_for(self.parity, len(self.group))

    @property
    def coordinates(self) -> bool:
        """This node decides for the generation."""
        return self.coordinator == self.me

    def same_as(self, other: Cohort | None) -> bool:
        """Both name the same nodes, ranks and groups (addresses may have changed with a restarted daemon)."""
        if other is None:
            return False
        mine = [(place.node, list(place.ranks)) for place in self.nodes]
        theirs = [(place.node, list(place.ranks)) for place in other.nodes]
        return mine == theirs and [list(g) for g in self.groups] == [list(g) for g in other.groups]

    def place(self, node: bytes) -> Place:
        """Where a member is reached."""
        return self._places[node]

    def name(self, node: bytes) -> str:
        """What people call a member; unlike that of any other."""
        return self._names[node]

    def names(self) -> frozenset[str]:
        """Every member's name."""
        return frozenset(self._names.values())

    def others(self) -> list[Place]:
        """Every member but this one."""
        return [place for place in self.nodes if place.node != self.me]

    def listeners(self) -> list[Place]:
        """Who has to know this node's state: the coordinator and the group."""
        wanted = {self.coordinator, *self.group} - {self.me}
        return [place for place in self.nodes if place.node in wanted]

    def knows(self, node: bytes) -> bool:
        """A member of this generation."""
        return node in self._places

    def hear(self, said: Publish, now_s: float = 0.0) -> bool:
        """Take note of a member's state; False for one that is older than what it said last."""
        last = self.states.get(said.node)
        if not self.knows(said.node) or (last is not None and said.serial <= last.serial):
            return False
        self.states[said.node], self.heard_s[said.node] = said, now_s
        return True

    def silent(self, group: Sequence[bytes], now_s: float, patience_s: float) -> list[bytes]:
        """Members of a group that were not heard of for so long."""
        return [node for node in group if node != self.me and now_s - self.heard_s.get(node, -patience_s) >= patience_s]

    def hears(self, group: Sequence[bytes]) -> bool:
        """This node is told the states of that group."""
        return self.coordinates or self.me in group

    # --- what the group holds ---------------------------------------------------------------------

    def layout(self, snapshot: SnapshotId) -> GroupLayout | None:
        """How this snapshot lies in the group's stripes; None while some member does not hold all of it in full."""
        positions: list[list[ShardShape]] = []
        for node in self.group:
            found = self.shards_on(node, snapshot)
            if len({one.rank for one in found}) != len(self._places[node].ranks):
                return None
            positions.append(sorted((one.shape for one in found), key=lambda shape: shape.rank))
        return geometry.lay_out(positions, self.parity_here)

    def shards_on(self, node: bytes, snapshot: SnapshotId) -> list[HeldShard]:
        """What a member said that it holds of this snapshot in full, one for each of its ranks."""
        said = self.states.get(node)
        if said is None or not said.complete:
            return []
        found = {
            one.rank: one
            for one in said.held
            if one.snapshot == snapshot and PROGRESS.get(one.progress, Progress.DAMAGED) >= Progress.FULL
        }
        return [found[rank] for rank in sorted(found)]

    def holdings(self, snapshot: SnapshotId) -> dict[int, tuple[bytes, HeldShard]]:
        """Where each shard of this snapshot lies in the group, by the shard's rank."""
        return {one.shape.rank: (node, one) for node in self.group for one in self.shards_on(node, snapshot)}

    def all_closed(self) -> bool:
        """Every rank of every node has said that its run is over."""
        return all(node in self.states and self.states[node].closed for node in self._places)


def node_state(said: Publish, generation: GenerationId, restored: SnapshotId | None) -> NodeState:
    """What a published state means for the vote. Snapshots of other generations have none."""
    held: dict[int, dict[int, Progress]] = {rank: {} for rank in said.passed}
    for one in said.held:
        if one.rank in held and (one.snapshot.generation == generation or one.snapshot == restored):
            how = PROGRESS.get(one.progress, Progress.DAMAGED)
            held[one.rank][one.snapshot.step] = max(how, held[one.rank].get(one.snapshot.step, Progress.DAMAGED))
    return NodeState(said.complete, dict(said.passed), held, said.naming)


def _check(ask: Attach, me: bytes) -> None:
    """Refused, with a sentence, where the nodes and groups of an attach are no partition of the job."""
    places: Mapping[bytes, Place] = {place.node: place for place in ask.nodes}
    ranks = sorted(rank for place in ask.nodes for rank in place.ranks)
    members = sorted(node for group in ask.groups for node in group)
    mine = places.get(me)
    silent = [place.label for place in ask.nodes if not place.address or not place.streams]
    if mine is None or list(mine.ranks) != list(ask.local_ranks):
        raise Refused(
            f"rank {ask.rank} names the nodes of job {ask.job!r} without this one as it is (its daemon was restarted "
            f"with empty memory, or another one answers here now); restart the job so that its ranks ask again"
        )
    if len(places) != len(ask.nodes) or ranks != list(range(ask.world_size)):
        raise Refused(f"the nodes of job {ask.job!r} do not have each of its {ask.world_size} ranks once")
    if members != sorted(places) or any(len(group) > 255 for group in ask.groups):
        raise Refused(f"the groups of job {ask.job!r} do not have each of its {len(places)} nodes once")
    if silent:
        raise Refused(
            f"the daemon of node {silent[0]} listens nowhere, so its peers cannot reach it and this run trains "
            f"unprotected; start every node's daemon with --listen (see docs/deploy.md) and restart the job"
        )
