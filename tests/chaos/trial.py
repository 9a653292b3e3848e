"""A job on a cluster that is being tried: how it saves, what it was told, and the two ways in which a fault may end.

`promised` is the newest step that any rank was told to be committed. Whatever was done, the job *goes on* with the same
trainers or *comes back* as a new generation, and a `Violation` says what it had not kept.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from snapshotd.errors import SnapshotLost
from tests.chaos.cluster import Cluster
from tests.chaos.tally import COUNTED, Tally, Violation
from tests.cluster.nodes import Cast, contents

PARITY = 2
HELD_MAX_S = 1.5


class Trial:
    """One cluster and the job on it."""

    def __init__(self, cluster: Cluster, seed: int, tally: Tally, say: Callable[[str], None]) -> None:
        self.cluster, self.seed, self.tally, self._say = cluster, seed, tally, say
        self.nodes = list(range(len(cluster.daemons)))
        self._jobs = self._trainings = 0
        self.chance = random.Random(seed)
        self.cast: Cast
        self.promised = 0

    # --- the job ----------------------------------------------------------------------------------

    def new_job(self) -> None:
        """A job that has committed once, under a name of its own."""
        self._jobs += 1
        self.cast = Cast(self.cluster, self.nodes, job=f"chaos-{self._jobs}", parity=PARITY)
        self.promised = 0
        self.cast.begin()
        self._saves()

    def _saves(self) -> None:
        self._publishes()
        self._commits()

    def _publishes(self) -> None:
        self.cast.publish(self.cast.step + 1)

    def _commits(self) -> None:
        self.cast.commits(self.cast.step)
        self.promised = self.cast.step
        self.tally.commits += 1

    def _saves_or_skips(self) -> None:
        """A step that each rank saves if it has room, as trainers do that wait for nobody; some skip it."""
        self.cast.step += 1
        for puppet in self.cast.puppets:
            slot = puppet.fill(self.cast.step)
            if slot >= 0:
                puppet.order("publish", slot, contents(puppet.rank, self.cast.step))
            puppet.order("ring")

    def _told(self) -> int:
        """The newest step that a rank was told to be committed."""
        return max([self.promised, *(puppet.words()["committed_step"] for puppet in self.cast.puppets)])

    def _nothing_committed(self) -> None:
        if self._told() >= self.cast.step:
            raise Violation(f"step {self.cast.step} was committed while a node could not speak")

    def _dismiss(self, cast: Cast) -> None:
        """End a job and have the nodes forget it."""
        cast.kill()
        for node in self.nodes:
            self.cluster.dismiss(node, cast.job)

    # --- endings ----------------------------------------------------------------------------------

    def _goes_on(self) -> None:
        """The job lives: what it has published commits, and so does the next."""
        self._commits()
        self._saves()

    def _relaunched(self) -> None:
        """The job's puppets die, as an agent kills its group, and the next generation has what was promised."""
        self.promised = self._told()
        self.cast.kill()
        self._comes_back()

    def _comes_back(self) -> None:
        """The next generation has what was promised, byte for byte, and commits."""
        began_s = time.monotonic()
        try:
            step = self.cast.begin()
        except SnapshotLost as lost:
            self.tally.losses += 1
            raise Violation(f"step {self.promised} was committed and is said to be lost: {lost}") from lost
        self.tally.resume_s.append(time.monotonic() - began_s)
        if step < self.promised:
            self.tally.losses += 1
            raise Violation(f"step {self.promised} was committed and the job went on from step {step}")
        self.tally.restores += 1
        self._say(f"  resumed from step {step} in {self.tally.resume_s[-1]:.2f} s")
        self._commits()
        self._saves()

    def _ends_either_way(self) -> None:
        """The fault is over: the same trainers go on, or a new generation does."""
        if self.chance.random() < 0.5:
            self._goes_on()
        else:
            self._relaunched()

    def _no_daemon_erred(self) -> None:
        for number in self.nodes:
            document = self.cluster.daemons[number].status()
            counters = document["counters"]
            if document["damaged"]:
                raise Violation(f"node {number}'s daemon found files that it cannot use: {document['damaged']}")
            pid = self.cluster.daemons[number].pid
            self.tally.counters |= {(pid, name): counters[f"{name}_total"] for name in COUNTED}
            if counters["errors_total"]:
                raise Violation(f"node {number}'s daemon met {counters['errors_total']} exceptions of its own")

    # --- striking ---------------------------------------------------------------------------------

    def _count(self, kind: str, detail: str) -> None:
        self.tally.faults[kind] += 1
        self._say(f"  {kind}: {detail}")

    def _some(self, least: int, most: int) -> list[int]:
        return sorted(self.chance.sample(self.nodes, self.chance.randint(least, most)))

    def _hold(self) -> None:
        """Leave a fault in force for a while: that is what is being tried, and nothing is waited for."""
        time.sleep(self.chance.uniform(0.1, HELD_MAX_S))

    def _cut(self, *nodes: int) -> None:
        if nodes:
            self._count("cut power", f"nodes {list(nodes)}")
            self.cluster.cut_power(*nodes)
            self.cluster.replace(*nodes)

    def _daemons_are_back(self, *nodes: int) -> None:
        for node in nodes:
            self.cluster.restart(node)
        for node in nodes:
            self.cast.reattach(self.cast.ranks_on.index(node))
