"""Acts against processes and whole nodes, one by one and all at once."""

from __future__ import annotations

import contextlib

from snapshotd.errors import SnapshotError, SnapshotLost
from tests.chaos.cluster import MOMENTS, WHILE_REBUILDING, WHILE_RESTORING
from tests.chaos.tally import Violation
from tests.chaos.trial import PARITY, Trial
from tests.cluster.harness import until
from tests.cluster.nodes import STEPS, ends_exactly


class AgainstNodes(Trial):
    """What is done to trainers, daemons and machines."""

    # --- processes --------------------------------------------------------------------------------

    def trainers_killed(self) -> None:
        """All ranks die, some with a whole snapshot, some in the middle of a copy."""
        whole = self._some(0, len(self.nodes))
        self._count("kill trainers", f"ranks {whole or 'none'} had published, the others were copying")
        step = self.cast.step + 1
        if whole:
            self.cast.publish(step, *whole)
        for rank in set(self.nodes) - set(whole):
            self.cast.puppets[rank].fill(step)
        self.cast.step = self.promised
        self._relaunched()

    def daemon_killed(self) -> None:
        """A daemon dies with a snapshot under way, and the next one of its node adopts what it left."""
        (node,) = self._some(1, 1)
        self._count("kill daemon", f"node {node}")
        self._publishes()
        self.cluster.kill(node)
        self._daemons_are_back(node)
        self._ends_either_way()

    def all_daemons_killed(self) -> None:
        """Every daemon dies at once."""
        self._count("kill all daemons", "at once")
        self._publishes()
        for node in self.nodes:
            self.cluster.kill(node)
        self._daemons_are_back(*self.nodes)
        self._ends_either_way()

    def daemon_killed_at_a_moment(self) -> None:
        """A daemon dies at a named moment of a commit, and perhaps another node is lost as well."""
        (node,) = self._some(1, 1)
        moment = self.chance.choice(list(MOMENTS))
        self._count("kill daemon at", f"node {node} {moment}")
        self.cluster.kill(node, at=moment)
        with contextlib.suppress(SnapshotError):
            self.cast.reattach(self.cast.ranks_on.index(node))
        self._publishes()
        step = self.cast.step
        until(
            lambda: self.cluster.has_died(node) or all(p.words()["committed_step"] >= step for p in self.cast.puppets),
            f"node {node} dying {moment}, or step {step} committed because another node is the one that passes there",
        )
        if self.chance.random() < 0.5:
            self._daemons_are_back(node)
            self._goes_on()
            return
        self.promised = self._told()
        self.cast.kill()
        self.cluster.restart(node)
        self._cut(*self.chance.sample([one for one in self.nodes if one != node], self.chance.randint(0, PARITY)))
        self._comes_back()

    def daemon_killed_while_restoring(self) -> None:
        """A daemon dies as the next generation takes its inventory or inherits; the one after that finds everything."""
        (node,) = self._some(1, 1)
        moment = self.chance.choice(WHILE_RESTORING)
        self.promised = self._told()
        self.cast.kill()
        self._count("kill daemon at", f"node {node} {moment}")
        self.cluster.kill(node, at=moment)
        with contextlib.suppress(SnapshotError):
            self.cast.begin()
        until(lambda: self.cluster.has_died(node), f"node {node} passing {moment}")
        self.cast.kill()
        self.cluster.restart(node)
        self._cut(*self.chance.sample([one for one in self.nodes if one != node], self.chance.randint(0, PARITY)))
        self._comes_back()

    def daemon_paused(self) -> None:
        """A daemon stands still: nothing commits, and everything does once it moves again."""
        (node,) = self._some(1, 1)
        self._count("pause", f"node {node}")
        self.cluster.pause(node)
        self._publishes()
        self._hold()
        self._nothing_committed()
        self.cluster.resume(node)
        self._ends_either_way()

    # --- whole nodes ------------------------------------------------------------------------------

    def power_cut(self) -> None:
        """As many nodes as parity carries are gone, perhaps with a snapshot under way."""
        lost = self._some(1, PARITY)
        if self.chance.random() < 0.5:
            self._publishes()
        self.promised = self._told()
        self.cast.kill()
        self._cut(*lost)
        self._comes_back()

    def power_cut_while_rebuilding(self) -> None:
        """A newcomer dies in the middle of the rebuild, and is lost or comes back; another node may be lost as well."""
        first, second = self.chance.sample(self.nodes, 2)
        moment = self.chance.choice(WHILE_REBUILDING)
        self.cast.kill()
        self._count("cut power", f"node {first}")
        self.cluster.cut_power(first)
        self.cluster.replace(first, crash=moment)
        self._count("kill newcomer at", f"node {first} {moment}")
        with contextlib.suppress(SnapshotError):
            self.cast.begin()
        until(lambda: self.cluster.has_died(first), f"node {first} passing {moment}")
        self.cast.kill()
        lost = self.chance.choice([[first], [second], [first, second]])
        if first not in lost:
            self.cluster.restart(first)
        self._cut(*lost)
        self._comes_back()

    def ranks_dealt_anew(self) -> None:
        """A relaunch puts the ranks on other nodes, and nodes may be lost meanwhile."""
        self.promised = self._told()
        self.cast.kill()
        self.cast.ranks_on = self.chance.sample(self.nodes, len(self.nodes))
        self._count("deal ranks anew", f"to nodes {self.cast.ranks_on}")
        self._cut(*self._some(0, PARITY))
        self._comes_back()

    def power_cut_beyond_the_parity(self) -> None:
        """More nodes than parity carries are gone: the job is told so by name, and a new one can begin."""
        lost = self._some(PARITY + 1, len(self.nodes))
        self.cast.kill()
        self._cut(*lost)
        if len(lost) < len(self.nodes):
            try:
                step = self.cast.begin()
            except SnapshotLost as refusal:
                assert f"step {self.promised}" in str(refusal), f"the refusal does not name the step: {refusal}"
                self.tally.refusals += 1
            else:
                raise Violation(f"{len(lost)} nodes were lost, parity is {PARITY}, and step {step} was 'restored'")
        self._dismiss(self.cast)
        self.new_job()

    # --- all at once ------------------------------------------------------------------------------

    def storm(self) -> None:
        """One fault after the other while the job saves on, ready or not; then the sky clears, and it commits again."""
        paused: set[int] = set()
        for _ in range(self.chance.randint(3, 7)):
            self._saves_or_skips()
            self._strikes(paused)
        for node in paused:
            self.cluster.resume(node)
        self.cluster.heal()
        cleared = self.cast.step

        def commits_again() -> bool:
            self._saves_or_skips()
            self._hold()
            return self._told() > cleared

        until(commits_again, f"a step after {cleared}, when the storm was over, committed")
        self.tally.commits += 1
        self.promised = self._told()
        self.cast.kill()
        self._cut(*self._some(0, PARITY))
        self._comes_back()

    def _strikes(self, paused: set[int]) -> None:
        """One of the storm's faults."""
        node, other = self.chance.sample(self.nodes, 2)
        kinds = ["kill", "pause", "resume"]
        if self.cluster.fabric is not None:
            kinds += ["part", "heal", *(["deafen", "drop"] if self.cluster.fabric.can_drop else [])]
        kind = self.chance.choice(kinds)
        if node in paused:
            kind = "resume"
        self._count(f"storm: {kind}", f"node {node}, beside node {other}")
        if kind == "kill":
            self.cluster.kill(node)
            self._daemons_are_back(node)
        elif kind == "pause":
            self.cluster.pause(node)
            paused.add(node)
        elif kind == "resume":
            for one in sorted(paused):
                self.cluster.resume(one)
            paused.clear()
        elif kind == "part":
            self.cluster.part([one for one in self.nodes if one != node], [node])
        elif kind == "heal":
            self.cluster.heal()
        elif kind == "deafen":
            self.cluster.deafen(node, other)
        else:
            self.cluster.drop(0.2, node)
        self._hold()

    # --- torch ------------------------------------------------------------------------------------

    def real_training(self) -> None:
        """Real trainers on the same nodes: struck at any moment, they end as the run that nobody disturbed."""
        self.cast.kill()
        self._trainings += 1
        shape = {"job": f"training-{self._trainings}", "parity": PARITY, "environment": {"GLOO_SOCKET_IFNAME": "lo"}}
        group = self.cluster.train("ddp", self.nodes, **shape)
        least = self.chance.randint(1, STEPS - 3)
        until(
            lambda: max((event["step"] or 0 for one in group for event in one.events("committed")), default=0) >= least,
            f"step {least} committed by {[one.events()[-1:] for one in group]}",
        )
        lost = self._some(0, PARITY)
        self._count("kill training", f"ranks 0 to {self.nodes[-1]}, from step {least} on")
        self.cluster.end(group)
        committed = max(event["step"] or 0 for one in group for event in one.events("committed"))
        self._cut(*lost)
        again = self.cluster.train("ddp", self.nodes, **shape)
        step = ends_exactly(again, committed)
        self._say(f"  trained on from step {step} and ended bit for bit as the undisturbed run")
        self.tally.restores += 1
        self._comes_back()
