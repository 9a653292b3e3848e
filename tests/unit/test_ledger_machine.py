"""Several nodes, messages that get lost, doubled and reordered, daemons that die at any moment: hypothesis looks for a
history in which the daemons lose a snapshot or contradict themselves.

The exhaustive exploration covers one node in full; this one covers what it is too small for. What must hold is judged
from the arenas, data and parity, and from what was decided; never from the books.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from snapshotd import geometry
from snapshotd.generation import views
from snapshotd.ledger import LEAD_STEPS_MAX, Abort, Commit, Decision, Progress, SlotView
from snapshotd.wire import Decree, GenerationId, SnapshotId
from tests.scenarios.nodes import Cluster, Died, Letter, crash_at

GENERATION = GenerationId(7, b"g" * 16)
OLDER = GenerationId(6, b"o" * 16)
RESTORED, BEFORE = SnapshotId(OLDER, 20), SnapshotId(OLDER, 10)
LETTERS_MAX = 12
some = st.integers(0, 8)


class SeveralNodes(RuleBasedStateMachine):
    """Nodes of several ranks each; the first node's daemon has the coordinator too."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.post: list[Letter] = []
        self.served: dict[int, int] = {}
        self.last_commit: int | None = None
        self.aborted: set[int] = set()
        self.readers: list[tuple[int, int]] = []

    @initialize(
        sizes=st.sampled_from([[1], [2], [1, 1], [2, 1], [1, 1, 1], [1, 2, 1], [1, 1, 1, 1]]),
        parity=st.integers(0, 2),
        group_size=st.sampled_from([2, 8]),
        every=st.integers(1, 3),
        inherited=st.sampled_from(["", "with parity", "without parity"]),
    )
    def begin(self, sizes: list[int], parity: int, group_size: int, every: int, inherited: str) -> None:
        made, numbers = self.cluster, iter(range(sum(sizes)))
        ranks = {f"n{index}": [next(numbers) for _ in range(size)] for index, size in enumerate(sizes)}
        made.add(*ranks)
        if inherited:
            made.begin(OLDER, ranks, parity=parity, group_size=group_size)
            self._make_whole(BEFORE, committed=True, protected=True)
            self._make_whole(RESTORED, committed=False, protected=inherited == "with parity")
            assert made.take_inventories().snapshot == RESTORED
            made.go_on(7, ranks)
        else:
            made.begin(GENERATION, ranks, parity=parity, group_size=group_size, every=every)
        self.restored = RESTORED if inherited else None
        self.served = {rank: made.arena(rank).native.naming for own in ranks.values() for rank in own}

    def _make_whole(self, snapshot: SnapshotId, *, committed: bool, protected: bool) -> None:
        """All nodes hold a snapshot; with `committed` everyone knows and has marked it."""
        made = self.cluster
        for own in made.ranks.values():
            for rank in own:
                assert made.take(rank, snapshot.step)
                made.finish(rank)
        self._everyone(made.look)
        self._tell_everyone()
        for label in made.ranks if protected else ():
            if made.wanted(label) == snapshot:
                assert made.begin_parity(label, snapshot) == ""
                made.end_parity(label)
        if committed:
            self._everyone(made.look)
            self._tell_everyone()
            assert all(made.generation(label).ledger.committed == snapshot.step for label in made.ranks)
        self.last_commit, self.aborted = None, set()

    @property
    def labels(self) -> list[str]:
        return list(self.cluster.ranks)

    def _node(self, number: int) -> str:
        return self.labels[number % len(self.labels)]

    def _rank(self, number: int) -> int:
        return number % sum(map(len, self.cluster.ranks.values()))

    # --- trainers ---------------------------------------------------------------------------------

    @rule(number=some, wants=st.booleans())
    def end_of_loop_body(self, number: int, wants: bool) -> None:
        """A step ends. A rank may take a snapshot that nobody named: that must be harmless."""
        rank = self._rank(number)
        if self.cluster.filling(rank) is not None:
            self.cluster.finish(rank)  # the optimizer's pre-hook waits for the copy
        words = self.cluster.arena(rank).native
        step = words.passed + 1
        asked = words.naming != self.served[rank] and 0 < words.next_step <= step
        if wants or asked:
            self.served[rank] = words.naming if self.cluster.take(rank, step) else self.served[rank]
        words.passed = step

    @rule(number=some, whole=st.booleans())
    def copy_ends(self, number: int, whole: bool) -> None:
        rank = self._rank(number)
        if self.cluster.filling(rank) is not None:
            (self.cluster.finish if whole else self.cluster.skip)(rank)

    @rule(number=some)
    def trainer_dies_and_its_place_is_taken_again(self, number: int) -> None:
        rank = self._rank(number)
        label = self.cluster.node_of(rank)
        with self._watched(label, may_empty_filling=True):
            self.cluster.generation(label).died(rank)

    # --- daemons ----------------------------------------------------------------------------------

    @rule(number=some)
    def look(self, number: int) -> None:
        label = self._node(number)
        with self._watched(label):
            self.cluster.look(label)

    @rule(number=some)
    def publish(self, number: int) -> None:
        self._send(self.cluster.publish(self._node(number)))

    @rule(number=some)
    def decree(self, number: int) -> None:
        self._send(self.cluster.decree(self._node(number)))

    @precondition(lambda self: self.post)
    @rule(number=st.integers(0, LETTERS_MAX), keep=st.booleans())
    def letter_arrives(self, number: int, keep: bool) -> None:
        """Any message that is on its way, perhaps not for the last time."""
        index = number % len(self.post)
        letter = self.post[index] if keep else self.post.pop(index)
        with self._watched(letter.receiver):
            self._send(self.cluster.deliver(letter)[1])

    def _send(self, letters: Sequence[Letter]) -> None:
        for letter in letters:
            if isinstance(letter.message, Decree) and letter.message.committed:
                made = self.cluster.snapshot(letter.message.committed)
                own = [self.cluster.held(rank, made) for rank in self.cluster.ranks[letter.sender]]
                assert set(own) == {Progress.COMMITTED}, "told before it was marked"
        self.post = [*self.post, *letters][-LETTERS_MAX:]

    @rule(number=some, step=some)
    def parity_is_begun(self, number: int, step: int) -> None:
        """Of what the daemon would choose, or of anything else that it holds."""
        label = self._node(number)
        held = sorted({view.snapshot for view in self._slots(label).values() if view.snapshot}, key=str)
        chosen = self.cluster.wanted(label) if step == 0 or not held else held[step % len(held)]
        known = chosen is not None and chosen in (self.restored, self.cluster.snapshot(chosen.step))
        if chosen is not None and known and not self.cluster.recognise(label, chosen):
            self.cluster.begin_parity(label, chosen)

    @precondition(lambda self: self.cluster.making)
    @rule(number=some, whole=st.booleans(), counted=st.booleans())
    def parity_is_over(self, number: int, whole: bool, counted: bool) -> None:
        making = sorted(self.cluster.making)
        label = making[number % len(making)]
        self.cluster.end_parity(label, whole=whole, counted=counted)
        if whole and not counted:
            self.cluster.restart(label)

    @rule(number=some)
    def daemon_restarts(self, number: int) -> None:
        label = self._node(number)
        with self._watched(label):
            self.cluster.restart(label)

    @rule(number=some)
    def trainers_come_back_to_their_daemon(self, number: int) -> None:
        self.cluster.rejoin(self._node(number))

    @rule(number=some, count=st.integers(1, 6))
    def daemon_dies_while_it_carries_out_a_decision(self, number: int, count: int) -> None:
        label = self._node(number)
        died = False
        with self._watched(label):
            try:
                with crash_at(None, count):
                    self.cluster.look(label)
            except Died:
                died = True
        if died:
            self.daemon_restarts(self.labels.index(label))

    @rule(number=some, slot=st.integers(0, 1))
    def somebody_reads(self, number: int, slot: int) -> None:
        if any(view.index == slot for view in self._data(self._rank(number))):
            self.cluster.arena(self._rank(number)).pins[slot] += 1
            self.readers.append((self._rank(number), slot))

    @precondition(lambda self: self.readers)
    @rule(number=some)
    def a_reader_is_done(self, number: int) -> None:
        rank, slot = self.readers.pop(number % len(self.readers))
        label = self.cluster.node_of(rank)
        file = self.cluster.arena(rank)
        with self._watched(label):
            file.pins[slot] = max(0, file.pins[slot] - 1)  # a daemon that restarted in between knows of no reader
            if not file.pins[slot]:
                self.cluster.generation(label).unpinned(file, slot)

    @rule(rounds=st.integers(1, 3))
    def all_goes_well_for_a_while(self, rounds: int) -> None:
        self._everyone(self.cluster.rejoin)
        for _ in range(rounds):
            self._go_well()

    # --- what must hold ---------------------------------------------------------------------------

    def _slots(self, label: str) -> dict[tuple[int, int], SlotView]:
        return self.cluster.slots(label)

    @contextmanager
    def _watched(self, label: str, may_empty_filling: bool = False) -> Iterator[None]:
        """I1 for what a daemon empties in here, and I2 for what it decides."""
        before, whole = self._slots(label), self.cluster.whole()
        coordinates = self.cluster.generation(label).coordinator is not None
        yield
        if coordinates:
            self._note(label)
        after = self._slots(label)
        for place, view in before.items():
            if place not in after:
                own = {file.ordinal for file in self.cluster.generation(label).parity_files()}
                is_parity = place[0] in own
                if is_parity and any(one[0] in own and after[one].snapshot == view.snapshot for one in after):
                    continue  # of an earlier grouping: the right one is there
                self._judge_empty(label, view, max(whole, default=None), may_empty_filling or is_parity)

    def _note(self, label: str) -> None:
        """I2, and that decisions do not contradict one another, whoever forgot what.

        A commit is one once it is marked: of a daemon that died before, nobody can have heard of it.
        """
        chair = self.cluster.generation(label).coordinator
        if chair is None:
            return
        for step in chair.aborted():
            self._judge(Abort(step, ""))
        if chair.committed is not None:
            made = self.cluster.snapshot(chair.committed)
            if Progress.COMMITTED in [self.cluster.held(rank, made) for rank in self.cluster.ranks[label]]:
                self._judge(Commit(chair.committed, ""))

    def _judge(self, decision: Decision) -> None:
        made = self.cluster.snapshot(decision.step)
        if isinstance(decision, Commit):
            assert decision.step not in self.aborted
            if decision.step == self.last_commit:
                return
            assert self.last_commit is None or decision.step > self.last_commit, "the commits went backwards"
            assert made in self.cluster.whole(), f"{made} was committed and some rank or parity is not whole"
            self.last_commit = decision.step
        elif decision.step not in self.aborted:
            assert self.last_commit is None or decision.step > self.last_commit
            least = [self.cluster.held(rank, made) for own in self.cluster.ranks.values() for rank in own]
            assert Progress.DAMAGED in least, f"{made} was aborted and everyone has it"
            self.aborted.add(decision.step)

    def _judge_empty(self, label: str, view: SlotView, newest: SnapshotId | None, may_empty_filling: bool) -> None:
        if view.progress is Progress.FILLING:
            assert may_empty_filling, "a slot was taken from its trainer"
            return
        made = view.snapshot
        assert made is not None and (made != newest or made.step in self.aborted)
        knows = self.cluster.generation(label).ledger.committed
        committed = knows is not None and self.last_commit is not None and knows <= self.last_commit
        newer = committed and knows is not None and (made.generation == OLDER or made.step < knows)
        assert newer or made.step in self.aborted, f"{label} emptied {made} without a newer commit and without an abort"

    @invariant()
    def something_at_least_as_new_as_the_last_commit_is_whole(self) -> None:
        """I3 while no node is lost; and what was restored stays until something newer is whole."""
        if not self.cluster.ranks:
            return
        if self.last_commit is not None:
            assert any(made.step >= self.last_commit for made in self.cluster.whole())
        if self.restored is not None:
            held = [{view.snapshot for view in self._data(rank)} for rank in self.served]
            assert any(made is not None and made >= self.restored for made in set.intersection(*held))

    def _data(self, rank: int) -> list[SlotView]:
        return [view for view in views(self.cluster.arena(rank)) if view.progress >= Progress.FULL]

    @precondition(lambda self: self.last_commit is not None and len(self.cluster.ranks) > 1)
    @rule(data=st.data())
    def whichever_nodes_are_lost_the_last_commit_or_newer_can_be_restored(self, data: st.DataObject) -> None:
        """I3, by what the survivors would choose."""
        lost: list[str] = []
        for group in self.cluster.groups:
            members = [one for one in self.labels if self.cluster.nodes[one].identity in group]
            bearable = geometry.parity_for(self.cluster.parity, len(group))
            lost += data.draw(st.lists(st.sampled_from(members), max_size=bearable, unique=True))
        choice = self.cluster.choose(without=lost)
        assert self.last_commit is not None
        assert choice.snapshot is not None and choice.snapshot.step >= self.last_commit, choice.why

    @invariant()
    def a_name_lies_ahead_by_a_bounded_lead(self) -> None:
        for label in self.labels:
            chair = self.cluster.generation(label).coordinator
            assert chair is None or 1 <= chair.lead <= LEAD_STEPS_MAX

    def teardown(self) -> None:
        try:
            if self.cluster.ranks:
                self._keep_going()
        finally:
            self.cluster.close()

    def _keep_going(self) -> None:
        """From wherever we got to: nothing is lost any more, everybody keeps going, and something new is committed."""
        before = self.last_commit
        self.post.clear()
        while self.readers:
            self.a_reader_is_done(0)
        for label in sorted(self.cluster.making):
            self.cluster.end_parity(label, whole=False)
        self._everyone(self.cluster.rejoin)
        for _ in range(2 * LEAD_STEPS_MAX):
            self._go_well()
            if self.last_commit is not None and self.last_commit != before:
                return
        raise AssertionError(f"nothing was committed any more after step {before}")

    def _go_well(self) -> None:
        for rank in self.served:
            self.end_of_loop_body(rank, False)
        for rank in self.served:
            self.copy_ends(rank, True)
        self._everyone(self._look_watched)
        self._tell_everyone()
        self._everyone(self._protect)
        self._everyone(self._look_watched)
        self._tell_everyone()

    def _everyone(self, do: Callable[[str], object]) -> None:
        for label in self.labels:
            do(label)

    def _look_watched(self, label: str) -> None:
        self.look(self.labels.index(label))

    def _protect(self, label: str) -> None:
        chosen = self.cluster.wanted(label)
        missing = chosen is not None and not self.cluster.recognise(label, chosen)
        if chosen is not None and missing and not self.cluster.begin_parity(label, chosen):
            self.cluster.end_parity(label)

    def _tell_everyone(self) -> None:
        """All that there is to say arrives."""
        letters = [letter for label in self.labels for letter in self.cluster.publish(label)]
        for letter in letters:
            with self._watched(letter.receiver):
                self.cluster.deliver(letter)
        for letter in [letter for label in self.labels for letter in self.cluster.decree(label)]:
            with self._watched(letter.receiver):
                self.cluster.deliver(letter)


SeveralNodes.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestSeveralNodes = SeveralNodes.TestCase
