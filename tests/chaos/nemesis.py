"""The nemesis: faults drawn from a seed against a job that saves, dies and comes back, and what became of its word.

A round begins with a job that has committed and ends with one that commits again. In between stands one act: a fault,
or several at once, at a drawn moment. What must hold, whatever is drawn:

* a step that any rank was told to be committed, or a newer one, comes back after every fault within the tolerance,
  every rank's bytes as they were at that one step;
* beyond the tolerance the job is told `SnapshotLost` and which step it is, and nothing is restored;
* a step commits nowhere while any node cannot speak;
* the job always commits again once the fault is over, and no daemon meets an exception of its own.

`Violation` says which of these did not. Rounds draw from the seed and their number alone, so that one can be replayed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

from snapshotd.errors import SnapshotError
from tests.chaos.against_nodes import AgainstNodes
from tests.chaos.tally import Violation
from tests.chaos.trial import PARITY
from tests.cluster.nodes import Cast, pull


class Nemesis(AgainstNodes):
    """Draws acts and plays them; those against links and memory stand here."""

    def acts(self) -> list[str]:
        """The acts that this cluster can play."""
        fabric = self.cluster.fabric
        without = set() if fabric is not None else NEED_MACHINES
        if fabric is None or not fabric.can_drop:
            without = without | NEED_IPTABLES
        return [name for name in ACTS if name not in without]

    def drawn(self, number: int) -> str:
        """The act of a round: every one comes once before any comes again."""
        acts = self.acts()
        turn, place = divmod(number, len(acts))
        return random.Random(f"{self.seed}/turn {turn}").sample(acts, len(acts))[place]

    def play(self, number: int, act: str) -> None:
        """One round. Violation where a promise was not kept."""
        self.chance = random.Random(f"{self.seed}/{number}")
        self.tally.last_round = number
        self._say(f"round {number}: {act}")
        try:
            ACTS[act](self)
            self._no_daemon_erred()
        except (AssertionError, SnapshotError) as error:
            raise Violation(f"round {number} ({act}): {type(error).__name__}: {error}") from error
        self.tally.rounds += 1

    # --- network ----------------------------------------------------------------------------------

    def partition(self) -> None:
        """Two sides do not reach each other: no step commits on either, and it does once they do."""
        one = self._some(1, len(self.nodes) - 1)
        other = [node for node in self.nodes if node not in one]
        self._count("partition", f"{one} from {other}")
        self.cluster.part(one, other)
        self._publishes()
        self._hold()
        self._nothing_committed()
        self.cluster.heal()
        self._ends_either_way()

    def relaunch_in_a_partition(self) -> None:
        """A generation that forms while its nodes do not reach each other commits nothing and costs nothing."""
        one = self._some(1, len(self.nodes) - 1)
        other = [node for node in self.nodes if node not in one]
        self.promised = self._told()
        self.cast.kill()
        self._count("partition", f"{one} from {other}, and a relaunch")
        self.cluster.part(one, other)
        with contextlib.suppress(SnapshotError):
            self.cast.begin()
        self.cluster.heal()
        self.cast.kill()
        self._comes_back()

    def one_way_partition(self) -> None:
        """A node hears nothing of another, which hears it."""
        deaf, towards = self.chance.sample(self.nodes, 2)
        self._count("one-way partition", f"node {deaf} does not hear node {towards}")
        self.cluster.deafen(deaf, towards)
        self._publishes()
        self._hold()
        self.cluster.heal()
        self._ends_either_way()

    def lossy_links(self) -> None:
        """Packets are lost while the job saves, and while lost nodes are rebuilt."""
        share = self.chance.uniform(0.01, 0.1)
        self._count("lose packets", f"{share:.0%} on every node")
        self.cluster.drop(share, *self.nodes)
        self._through_bad_links()

    def slow_links(self) -> None:
        """Every node's link is slow."""
        rate = self.chance.choice([2, 10, 50])
        self._count("shape", f"{rate} Mbit/s on every node")
        self.cluster.shape(f"{rate}mbit", *self.nodes)
        self._through_bad_links()

    def _through_bad_links(self) -> None:
        self._saves()
        if self.chance.random() < 0.5:
            self.power_cut()
        self.cluster.heal()
        self._saves()

    # --- memory -----------------------------------------------------------------------------------

    def memory_full(self) -> None:
        """A node's memory is full: the job that has its room goes on and comes back, and another is refused by name."""
        (node,) = self._some(1, 1)
        self._count("fill memory", f"node {node}")
        self.cluster.fill_shm(node)
        self._saves()
        self._relaunched()
        other = Cast(self.cluster, self.nodes, job=f"beside-{self._jobs}", parity=PARITY)
        try:
            other.begin()
        except SnapshotError as refusal:
            assert "shm" in str(refusal) or "memory" in str(refusal), f"the refusal does not say why: {refusal}"
            self.tally.refusals += 1
        else:
            raise Violation(f"node {node} has no memory left and took another job")
        finally:
            self.cluster.drain_shm(node)
            self._dismiss(other)
        self._saves()

    def bits_flipped(self) -> None:
        """Bits turn over in the memory of as many nodes as parity carries, and are found before they are used."""
        damaged = self._some(1, PARITY)
        self.promised = self._told()
        self.cast.kill()
        for node in damaged:
            region, offset = self.chance.choice(["data", "parity", "table"]), self.chance.randrange(1 << 20)
            self._count("flip a bit", f"node {node}, {region}, {offset}")
            self.cluster.flip(node, region, offset)
        self._set_aside()
        self._comes_back()

    def _set_aside(self) -> None:
        """What a client does that finds a checksum wrong as it restores: it says so to the shard's daemon."""
        inventories = self.cast.knock()
        for rank, inventory in enumerate(inventories):
            for shard in inventory.shards:
                try:
                    pull(inventory, self.cast.job, shard, self.cluster.keys(self.cast.ranks_on[rank]))
                except AssertionError as error:
                    generation, step = shard.snapshot.generation.number, shard.snapshot.step
                    order = ("quarantine", shard.arena.hex(), shard.slot, generation, step, str(error))
                    self.cast.puppets[rank].order(*order)


ACTS: dict[str, Callable[[Nemesis], None]] = {
    "trainers killed": Nemesis.trainers_killed,
    "daemon killed": Nemesis.daemon_killed,
    "daemon killed at a moment": Nemesis.daemon_killed_at_a_moment,
    "all daemons killed": Nemesis.all_daemons_killed,
    "daemon paused": Nemesis.daemon_paused,
    "power cut": Nemesis.power_cut,
    "power cut while rebuilding": Nemesis.power_cut_while_rebuilding,
    "daemon killed while restoring": Nemesis.daemon_killed_while_restoring,
    "ranks dealt anew": Nemesis.ranks_dealt_anew,
    "power cut beyond the parity": Nemesis.power_cut_beyond_the_parity,
    "storm": Nemesis.storm,
    "bits flipped": Nemesis.bits_flipped,
    "real training": Nemesis.real_training,
    "partition": Nemesis.partition,
    "relaunch in a partition": Nemesis.relaunch_in_a_partition,
    "one-way partition": Nemesis.one_way_partition,
    "slow links": Nemesis.slow_links,
    "lossy links": Nemesis.lossy_links,
    "memory full": Nemesis.memory_full,
}
NEED_MACHINES = {"partition", "relaunch in a partition", "slow links", "memory full"}
NEED_IPTABLES = {"one-way partition", "lossy links"}
