"""Plays a text scenario over several nodes: commands to trainers, daemons and the network, and below each what came of
it. The nodes are those of `nodes.Cluster`, so what decides, marks, obeys and chooses is the product's.

A file has the format of `play`: one command, `----`, the expected answer; `#` begins a comment. Snapshots are written
`g1:40` (generation 1, step 40; `g1b` is another generation of the same number), `n0` is a node, `r0` a rank. A line of
an answer begins with the node that does it, in the order in which it is done. The commands:

    begin g1 on n0 n1=1,2 [parity=1] [group=8] [every=1]    new arenas; without `=` each node has one rank
    n0|r0|everyone takes 5      claims a slot, names it, passes the step            passes 5    without a snapshot
    n0|r0|everyone finishes     the copy is whole                                   skips       it is given up
    r0 dies                     its trainer is gone, and the daemon sees it
    everyone commits 5          step 5 is taken and all goes well; a shortcut to where the story begins

    n0|everyone looks           the daemon looks at its arenas, and decides where it coordinates; it also looks before
                                it tells its state or makes parity, and after that
    n0|everyone protects        it makes (or recognises) the parity that it would make now
    n0 begins g1:5, n0 ends     the making of a parity set, in two parts            n0 gives up
    n0 dies, n0 restarts        the daemon; the next one knows what is in memory
    n0|everyone rejoins         the trainers come back to it, and it learns of its peers again
    n0 is lost                  the host with its memory      n0 is cut off, n0 is back     nobody sees it meanwhile
    damage r0 g1:5, damage n0 g1:5      bytes of a shard, of a parity set

    n0|everyone tells           a state goes on its way to the coordinator and the group
    n0 decrees                  the coordinator says again what was decided (what is new it says by itself)
    deliver, lose [newest] [states|decrees] [n0 -> n1]      messages that are on their way
    repeat [states|decrees] n0 -> n1                        the last one that arrived, once more
    settle                      looks, parity and messages until there is nothing left to do

    n0|everyone fences          a newer generation takes the inventory
    choose                      what would be restored from the nodes that can be seen, and from where
    go on as g2 with n0 n3=1    the next generation, from what was chosen (new arenas where nothing was)
    r1 rebuilds                 a lost shard is there again
    turn to g1                  the commands concern this generation again
    n0|everyone closes          the end of a run                  n0 ends the run     the coordinator frees as the last
    slots [n0], knows [n0]      what the arenas hold; what the books say

`… and dies at commit.marked 2` behind a command: the daemon that acts dies where it passes that crash point for the
second time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from snapshotd import geometry, recovery
from snapshotd.arena import ArenaFile
from snapshotd.generation import Generation, view_of, views
from snapshotd.ledger import PARITY, Advance, Commit, Decision, Empty, Progress, SlotView
from snapshotd.recovery import Assignment
from snapshotd.wire import Decree, GenerationId, Publish, SnapshotId
from tests.scenarios.nodes import JOB, Cluster, Died, Letter, crash_at
from tests.scenarios.play import blocks, render

ROUNDS = 3
WORLD = ("identity", "ranks", "restored", "parity", "every", "groups", "assignments", "group_size")


class Unplayable(Exception):
    """A command asks for what cannot be."""


class Told(Generation):
    """A generation that says what it does, in the order in which it does it."""

    said: list[str]

    def _say(self, what: str) -> None:
        self.said.append(f"{self._node}: {what}")

    def _carry_out(self, decision: Decision) -> None:
        self._say(f"{_decision(decision)}, since {decision.why}")
        super()._carry_out(decision)

    def _announce(self, decision: Decision) -> None:
        super()._announce(decision)
        self._say(f"announced {_decision(decision)}")

    def _advance(self, action: Advance) -> bool:
        with self._shown(action):
            return super()._advance(action)

    def _empty(self, action: Empty) -> bool:
        with self._shown(action, f", {action.why}"):
            return super()._empty(action)

    @contextlib.contextmanager
    def _shown(self, action: Advance | Empty, why: str = "") -> Iterator[None]:
        file, index = self._place(action.slot)
        before = view_of(file, index)
        try:
            yield
        finally:
            after = view_of(file, index)
            if before is not None and after != before:
                to = after.progress.name if after is not None else "EMPTY"
                whose = "parity" if action.rank == PARITY else f"r{action.rank}"
                self._say(f"{whose} {_content(before)} -> {to}{why}")

    def _name_next(self) -> None:
        before = self.next_step, self.heard
        super()._name_next()
        if (self.next_step, self.heard) != before:
            self._say(f"named step {self.next_step}")

    def fence(self) -> None:
        """As it is; said where it is news."""
        if not self.ledger.fenced:
            self._say(f"{_generation(self.identity)} is fenced")
        super().fence()


class ToldCluster(Cluster):
    """Nodes that say what they do."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said, self.group_size = said, 8

    def _fresh(
        self, label: str, identity: GenerationId, ranks: Sequence[int], restored: SnapshotId | None
    ) -> Generation:
        world = sum(map(len, self.ranks.values()))
        made = Told(
            JOB, identity, node=label, ranks=ranks, world_size=world, every=self.every, restored=restored,
            metrics=self._metrics, repeats=self._repeats,
        )  # fmt: skip
        made.said = self.said
        return made

    def _after(self, label: str, decisions: list[Decision]) -> list[Decision]:
        before = list(self.nodes[label].files)
        super()._after(label, decisions)
        for file in before:
            if file not in self.nodes[label].files:
                self.said.append(f"{label}: {_arena(file)} of {_generation(file.generation)} is freed")
        return decisions


class Player:
    """Several nodes, one generation that trains (or two that do not know of each other), and the post between them."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.cluster = ToldCluster(self.said)
        self.post: list[Letter] = []
        self.decreed: dict[str, Decree] = {}
        self.arrived: list[Letter] = []
        self.dead: set[str] = set()
        self.away: dict[str, Any] = {}
        self.worlds: dict[GenerationId, dict[str, Any]] = {}
        self.acting = ""

    def close(self) -> None:
        """Give all memory back."""
        self.cluster.nodes.update(self.away)
        self.cluster.close()

    def play(self, command: str) -> str:
        """The answer to one command, without the last line's end."""
        self.said.clear()
        what, _, where = command.partition(" and dies at ")
        point, _, count = where.partition(" ")
        try:
            with crash_at(point, int(count or 1)) if point else contextlib.nullcontext():
                self._do(*what.split())
            if point:
                raise Unplayable(f"nobody came to {point}")
        except Died:
            self.dead.add(self.acting)
            self.said.append(f"{self.acting}: its daemon dies")
        return "\n".join(self.said) or "ok"

    def _do(self, subject: str, *words: str) -> None:
        ranks = [rank for own in self.cluster.ranks.values() for rank in own]
        verb, rest = (words[0], words[1:]) if words else ("", ())
        if subject[0] == "r" and subject[1:].isdigit():
            getattr(self, f"_rank_{verb}")(int(subject[1:]), *rest)
        elif subject != "everyone" and subject not in self._all_nodes():
            getattr(self, f"_{subject}")(*words)
        elif hasattr(self, f"_rank_{verb}") and verb != "dies":
            for rank in ranks if subject == "everyone" else self.cluster.ranks[subject]:
                if verb != "finishes" or self.cluster.filling(rank) is not None:
                    getattr(self, f"_rank_{verb}")(rank, *rest)
        elif hasattr(self, f"_everyone_{verb}") and subject == "everyone":
            getattr(self, f"_everyone_{verb}")(*rest)
        else:
            for label in self._living() if subject == "everyone" else [subject]:
                self.acting = label
                getattr(self, f"_node_{verb}")(label, *rest)

    def _all_nodes(self) -> set[str]:
        return {*self.cluster.nodes, *self.away}

    def _living(self) -> list[str]:
        """Nodes of this generation with a daemon that can be seen."""
        return [one for one in self.cluster.ranks if one in self.cluster.nodes and one not in self.dead]

    def _say(self, who: str, what: str) -> None:
        self.said.append(f"{who}: {what}")

    # --- generations ------------------------------------------------------------------------------

    def _begin(self, name: str, on: str, *words: str) -> None:
        assert on == "on"
        places, given = self._places(words)
        self._start(
            _identity(name), places, {}, None,
            parity=int(given.get("parity", 1)), group_size=int(given.get("group", 8)), every=int(given.get("every", 1)),
        )  # fmt: skip

    def _go(self, _on: str, _as: str, name: str, _with: str, *words: str) -> None:
        made, choice = self.cluster, self.cluster.choice
        places, _ = self._places(words)
        by_node = {made.nodes[label].identity: own for label, own in places.items()}
        inventories = [node.inventory() for node in made.nodes.values()]
        assignments = recovery.assign(choice, by_node, inventories) if choice.snapshot is not None else {}
        self._start(
            _identity(name), places, assignments, choice.snapshot,
            parity=made.parity, group_size=made.group_size, every=made.every,
        )  # fmt: skip

    def _places(self, words: Sequence[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
        """Nodes with their ranks, and what else is given. A node that nobody knows yet is made."""
        places: dict[str, list[int]] = {}
        given: dict[str, str] = {}
        count = 0
        for word in words:
            key, _, value = word.partition("=")
            if key[0] == "n" and key[1:].isdigit():
                places[key] = [int(rank) for rank in value.split(",")] if value else [count]
                count += len(places[key])
            else:
                given[key] = value
        self.cluster.add(*(label for label in places if label not in self._all_nodes()))
        return places, given

    def _start(
        self,
        identity: GenerationId,
        places: Mapping[str, list[int]],
        assignments: Mapping[int, Assignment],
        restored: SnapshotId | None,
        **how: int,
    ) -> None:
        made = self.cluster
        self._keep()
        made.group_size = how["group_size"]
        made.begin(identity, places, assignments=assignments, restored=restored, **how)
        names = {node.identity: label for label, node in made.nodes.items()}
        for group in made.groups:
            parity = geometry.parity_for(made.parity, len(group))
            shape = f"k = {len(group) - parity}, m = {parity}" if parity else "no parity"
            self.said.append(f"group of {', '.join(names[node] for node in group)}: {shape}")
        for rank, how_begun in sorted(assignments.items()):
            self._say(made.node_of(rank), f"r{rank} {_beginning(rank, how_begun)}")

    def _keep(self) -> None:
        """What a turn to another generation must not forget."""
        if self.cluster.ranks:
            self.worlds[self.cluster.identity] = {name: getattr(self.cluster, name) for name in WORLD}

    def _turn(self, _to: str, name: str) -> None:
        self._turn_to(_identity(name))

    def _turn_to(self, identity: GenerationId) -> None:
        self._keep()
        for field, value in self.worlds[identity].items():
            setattr(self.cluster, field, value)

    # --- trainers ---------------------------------------------------------------------------------

    def _rank_takes(self, rank: int, step: str) -> None:
        if not self.cluster.take(rank, int(step)):
            self._say(self.cluster.node_of(rank), f"r{rank} has no slot free and passes step {step} without")

    def _rank_finishes(self, rank: int) -> None:
        self.cluster.finish(rank)

    def _rank_skips(self, rank: int) -> None:
        self.cluster.skip(rank)

    def _rank_passes(self, rank: int, step: str) -> None:
        self.cluster.arena(rank).native.passed = int(step)

    def _rank_dies(self, rank: int) -> None:
        self.acting = self.cluster.node_of(rank)
        self.cluster.generation(self.acting).died(rank)
        self._look_and_say(self.acting)

    def _rank_closes(self, rank: int) -> None:
        self.cluster.arena(rank).amend(closed=True)

    def _rank_rebuilds(self, rank: int) -> None:
        label = self.cluster.node_of(rank)
        done = self.cluster.rebuild(rank)
        self._say(label, f"r{rank} {f'has {_name(self._restored())} again' if done else 'has no slot free for it'}")

    def _restored(self) -> SnapshotId:
        assert self.cluster.restored is not None
        return self.cluster.restored

    def _everyone_commits(self, step: str) -> None:
        for verb in ("takes", "finishes"):
            self._do("everyone", verb, *[step] * (verb == "takes"))
        self._settle()
        made = self.cluster.snapshot(int(step))
        done = all(self.cluster.held(r, made) is Progress.COMMITTED for own in self.cluster.ranks.values() for r in own)
        if not done or len(self._living()) < len(self.cluster.ranks):
            raise Unplayable(f"step {step} was not committed: {self.said}")
        self.said[:] = [f"{_name(made)} is COMMITTED on {', '.join(self.cluster.ranks)}"]

    # --- daemons ----------------------------------------------------------------------------------

    def _node_looks(self, label: str) -> None:
        self._look_and_say(label)

    def _look_and_say(self, label: str) -> None:
        """Whoever coordinates tells at once what is new."""
        self.cluster.look(label)
        self._decree_news(label)

    def _node_protects(self, label: str) -> None:
        self._look_and_say(label)
        made = self.cluster.wanted(label)
        if made is None:
            self._say(label, "has no parity to make")
        elif self.cluster.recognise(label, made):
            self._say(label, f"its parity of {_name(made)} is here already and counts")
            self._look_and_say(label)
        else:
            self._node_begins(label, _name(made))
            if label in self.cluster.making:
                self._node_ends(label)

    def _node_begins(self, label: str, name: str) -> None:
        why = self.cluster.begin_parity(label, _snapshot(name))
        if why:
            self._say(label, f"makes no parity of {name}: {why}")

    def _node_ends(self, label: str, *what: str) -> None:
        if what:
            self._run_over(label)
            return
        made = self.cluster.making[label].task.snapshot
        self._say(label, f"its parity of {_name(made)} is whole")
        self.cluster.end_parity(label)
        self._look_and_say(label)

    def _node_gives(self, label: str, _up: str) -> None:
        self.cluster.end_parity(label, whole=False)

    def _node_dies(self, label: str) -> None:
        self.dead.add(label)

    def _node_restarts(self, label: str) -> None:
        self.dead.discard(label)
        self.decreed.pop(label, None)
        self.cluster.restart(label)

    def _node_rejoins(self, label: str) -> None:
        self.cluster.rejoin(label)
        self._look_and_say(label)

    def _node_is(self, label: str, *how: str) -> None:
        if how == ("lost",):
            self.cluster.lose(label)
        elif how == ("back",):
            self.cluster.nodes[label] = self.away.pop(label)
        else:
            assert how == ("cut", "off")
            self.away[label] = self.cluster.nodes.pop(label)

    def _node_fences(self, label: str) -> None:
        for one in self.cluster.nodes[label].generations.values():
            one.fence()

    def _damage(self, where: str, name: str) -> None:
        made = _snapshot(name)
        files = [self.cluster.arena(int(where[1:]))] if where[0] == "r" else self._parity_of(where)
        for file in files:
            for view in views(file):
                if view.snapshot == made:
                    self.cluster.damage(file, view.index, "its bytes fail their checksum")

    def _parity_of(self, label: str) -> list[ArenaFile]:
        return self.cluster.generation(label).parity_files()

    # --- the post ---------------------------------------------------------------------------------

    def _node_tells(self, label: str) -> None:
        self._look_and_say(label)
        self._send(label, self.cluster.publish(label))

    def _node_decrees(self, label: str) -> None:
        self._send(label, self._decree(label))

    def _decree(self, label: str) -> list[Letter]:
        cohort = self.cluster.generation(label).cohort
        closed = cohort is not None and cohort.all_closed()
        letters = self.cluster.decree(label)
        return [one._replace(message=msgspec.structs.replace(one.message, closed=closed)) for one in letters]

    def _decree_news(self, label: str, *, silently: bool = False) -> None:
        """The coordinator's decisions go to all others where they are not what it said last."""
        current = self._generation(label)
        if current.cohort is None or current.ledger.fenced or not current.cohort.coordinates:
            return
        news = current.decree(0, current.cohort.all_closed())
        if news != self.decreed.get(label):
            self.decreed[label] = news
            if silently:
                return
            if news.naming or news.committed or news.aborted or news.closed:
                self._send(label, self._decree(label))

    def _send(self, label: str, letters: Sequence[Letter]) -> None:
        self.post += letters
        if not letters:
            self._say(label, "has nobody to tell anything")
            return
        receivers = ", ".join(one.receiver for one in letters)
        self.said.append(f"{label} -> {receivers}: {self._content_of(letters[0].message)}")

    def _content_of(self, message: Publish | Decree) -> str:
        if isinstance(message, Decree):
            parts = [f"COMMIT {message.committed}"] if message.committed else []
            parts += [f"ABORT {step}" for step in message.aborted]
            parts += [f"next step {message.next_step}"] if message.naming else []
            return ", ".join(parts + ["the run is over"] * message.closed) or "nothing is decided"
        ranks = []
        for rank, passed in sorted(message.passed.items()):
            held = [f"{_name(one.snapshot)} {one.progress}" for one in message.held if one.rank == rank]
            ranks.append(f"r{rank} passed {passed}: {', '.join(held) or 'nothing'}")
        absent = [] if message.complete else ["not all of its ranks are here"]
        return "; ".join(ranks + absent + ["closed"] * message.closed)

    def _deliver(self, *words: str) -> None:
        for letter in self._letters(self.post, words):
            self.post.remove(letter)
            self.arrived.append(letter)
            self._arrives(letter)

    def _lose(self, *words: str) -> None:
        for letter in self._letters(self.post, words):
            self.post.remove(letter)

    def _repeat(self, *words: str) -> None:
        *_, letter = self._letters(self.arrived, words)
        self._arrives(letter)

    def _letters(self, among: Iterable[Letter], words: Sequence[str]) -> list[Letter]:
        kinds = {"states": Publish, "decrees": Decree}
        kind = next((kinds[word] for word in words if word in kinds), object)
        ends = [word for word in words if word in self._all_nodes()]
        found = [one for one in among if isinstance(one.message, kind) and ends in ([], [one.sender, one.receiver])]
        if not found:
            raise Unplayable(f"no such message is on its way: {' '.join(words)}")
        return found[-1:] if "newest" in words else found

    def _arrives(self, letter: Letter) -> None:
        self.acting = receiver = letter.receiver
        node = self.cluster.nodes.get(receiver)
        if node is None or receiver in self.dead:
            self._say(receiver, f"cannot hear {letter.sender}")
            return
        if letter.message.generation not in node.generations:
            self._say(receiver, f"knows no {_generation(letter.message.generation)}, of which {letter.sender} speaks")
            return
        here = self.cluster.identity
        self._turn_to(letter.message.generation)
        ignored = self._ignores(letter)
        if ignored:
            self._say(receiver, f"{ignored} {letter.sender}")
        decrees = len(self.post)
        again = self.cluster.deliver(letter)[1]
        self._decree_news(receiver)
        if again and len(self.post) == decrees:
            self._send(receiver, [one for one in self._decree(receiver) if one.receiver == letter.sender])
        if isinstance(letter.message, Decree) and letter.message.closed and self._generation(receiver).closed():
            self._run_over(receiver)
        self._turn_to(here)

    def _ignores(self, letter: Letter) -> str:
        """Why nothing will come of a message, where that can be told."""
        current = self._generation(letter.receiver)
        if current.cohort is None:
            return "has no peers yet and passes over"
        if current.ledger.fenced:
            return "is fenced and passes over"
        if isinstance(letter.message, Decree):
            return "passes over this late decree of" if letter.message.serial <= current._obeyed else ""
        last = current.cohort.states.get(letter.message.node)
        return "passes over this late state of" if last and letter.message.serial <= last.serial else ""

    def _generation(self, label: str) -> Generation:
        return self.cluster.generation(label)

    def _settle(self) -> None:
        self.post.clear()
        for _ in range(ROUNDS):
            for label in self._living():
                self.cluster.look(label)
            self._exchange()
            for label in self._living():
                self._protect_what_is_open(label)
            self._exchange()

    def _protect_what_is_open(self, label: str) -> None:
        made = self.cluster.wanted(label)
        if made is None or self.cluster.recognise(label, made) or self.cluster.begin_parity(label, made):
            return
        self._say(label, f"its parity of {_name(made)} is whole")
        self.cluster.end_parity(label)

    def _exchange(self) -> None:
        """All that there is to say arrives; only what comes of it is shown."""
        for send in (self.cluster.publish, self._decree):
            for letter in [letter for label in self._living() for letter in send(label)]:
                if letter.receiver in self._living():
                    self.cluster.deliver(letter)
        for label in self._living():
            self._decree_news(label, silently=True)

    # --- the end of a run -------------------------------------------------------------------------

    def _run_over(self, label: str) -> None:
        """What the keeper does once every rank of every node has closed."""
        node, current = self.cluster.nodes[label], self._generation(label)
        assert current.closed()
        for file in current.all_files():
            self._say(label, f"{_arena(file)} of {_generation(file.generation)} is freed, every rank closed its run")
            node.files.remove(file)
            file.close()
        del node.generations[current.identity]

    # --- recovery ---------------------------------------------------------------------------------

    def _choose(self) -> None:
        choice = self.cluster.choose()
        names = {node.identity: label for label, node in self.cluster.nodes.items()}
        what = "lost" if choice.lost else _name(choice.snapshot) if choice.snapshot else "nothing"
        self.said.append(f"{what}: {choice.why}")
        for rank in range(choice.world_size):
            source = choice.sources.get(rank)
            where = f"is on {names[source.node]}" if source is not None else "is rebuilt"
            self.said.append(f"shard {rank} {where}")

    # --- looking ----------------------------------------------------------------------------------

    def _slots(self, *labels: str) -> None:
        for label in labels or tuple(self.cluster.nodes):
            parts = [
                f"{_owner(file, self.cluster.identity)}: {', '.join(_slot(file, index) for index in range(2))}"
                for file in sorted(self.cluster.nodes[label].files, key=_order)
            ]
            self._say(label, "; ".join(parts) or "nothing")

    def _knows(self, *labels: str) -> None:
        for label in labels or tuple(self._living()):
            current = self._generation(label)
            committed = current.ledger.committed
            known = f"COMMIT {committed}" if committed else "no commit"
            aborted = [f"ABORT {current.ledger.aborted()}"] if current.ledger.aborted() else []
            named = [f"next step {current.next_step}"] if current.next_step else []
            self._say(label, ", ".join([known, *aborted, *named]))


def replayed(text: str) -> str:
    """The scenario with the answers that are given now."""
    player = Player()
    try:
        played = [one._replace(expected=player.play(one.command)) if one.command else one for one in blocks(text)]
    finally:
        player.close()
    return render(played)


# --- names ----------------------------------------------------------------------------------------


def _identity(name: str) -> GenerationId:
    """`g2`, or `g2b` for one with the same number and another nonce."""
    digits = name.strip("gabcdef")
    other = name.removeprefix("g").removeprefix(digits)
    return GenerationId(int(digits), (other.encode() or bytes([int(digits)])) * 16)


def _generation(identity: GenerationId) -> str:
    first = identity.nonce[:1]
    return f"g{identity.number}{'' if first == bytes([identity.number]) else first.decode()}"


def _snapshot(name: str) -> SnapshotId:
    generation, _, step = name.partition(":")
    return SnapshotId(_identity(generation), int(step))


def _name(made: SnapshotId) -> str:
    return f"{_generation(made.generation)}:{made.step}"


def _decision(decision: Decision) -> str:
    return f"{'COMMIT' if isinstance(decision, Commit) else 'ABORT'} {decision.step}"


def _content(view: SlotView) -> str:
    return f"{_name(view.snapshot) if view.snapshot else 'unnamed'} {view.progress.name}"


def _slot(file: ArenaFile, index: int) -> str:
    view = view_of(file, index)
    if view is None:
        return "EMPTY"
    whose = file.native.slot(index).rank
    moved = f" of rank {whose}" if not file.is_parity and whose != file.owner.rank else ""
    return f"{_content(view)}{moved}"


def _arena(file: ArenaFile) -> str:
    return "the parity" if file.is_parity else f"the arena of r{file.owner.rank}"


def _order(file: ArenaFile) -> tuple[GenerationId, bool, int]:
    return file.generation, file.is_parity, file.owner.rank


def _owner(file: ArenaFile, current: GenerationId) -> str:
    whose = "parity" if file.is_parity else f"r{file.owner.rank} passed {file.native.passed}"
    return whose if file.generation == current else f"({_generation(file.generation)}) {whose}"


def _beginning(rank: int, how: Assignment) -> str:
    if how.shard is None:
        return "begins with an empty arena"
    shard = "its shard" if how.shard == rank else f"the shard of rank {how.shard}"
    if not how.rebuild:
        return f"keeps {shard}"
    return f"waits for {shard} to be rebuilt, in {'a new arena' if how.arena is None else 'its arena'}"
