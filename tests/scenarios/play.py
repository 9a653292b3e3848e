"""Plays a text scenario: commands to trainers and to the daemon, and below each what the ledger made of it.

A file is blocks of one command, `----` and the expected answer; `#` begins a comment. Snapshots are written `g1:40`
(generation 1, step 40), `r0` is rank 0. The commands:

    begin ranks=2 [generation=1] [every=1] [restored=g1:40]    a generation whose arenas are empty
    r0 takes 5           claims a slot, names it, passes the step; the copy runs      r0 finishes    it is FULL
    r0 skips             the copy is given up, its slot is EMPTY again                r0 passes 5    without a snapshot
    r0 dies              the daemon sees it, looks once more and empties what is half filled
    damage r0 g1:5       bytes of a slot are no longer to be trusted
    look [r0]            the daemon looks at every rank (or at one), decides, acts; prints what it did
    act 2                like look, but the daemon dies after so many actions
    restart              a new daemon, which knows only what the arenas hold
    fence                a newer generation takes the inventory
    choose               what a restart would restore, and why
    inherit 2 g1:5       generation 2 goes on from a snapshot in the same arenas
    slots                what the arenas hold
    superseded g3 restored=g2:9 g1=nothing,committed g2=g1:5   older generations that the first commit of g3 frees
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from snapshotd import recovery
from snapshotd.ledger import (
    Action,
    Advance,
    Announce,
    Commit,
    Coordinator,
    Decision,
    Empty,
    Ledger,
    Progress,
    RankView,
    SlotView,
    superseded,
)
from snapshotd.wire import ArenaReport, GenerationId, Inventory, Shard, SnapshotId

SLOTS = 2


class Block(NamedTuple):
    """One command of a scenario with the comment above it, and the answer that the file expects."""

    comment: str
    command: str
    expected: str


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a scenario. ValueError for text that is none."""
    for chunk in text.strip().split("\n\n"):
        question, mark, answer = chunk.partition("\n----\n")
        if not mark:
            if all(line.startswith("#") for line in chunk.splitlines()):
                yield Block(chunk + "\n", "", "")
                continue
            raise ValueError(f"no ---- below {chunk!r}")
        *comment, command = question.splitlines()
        yield Block("".join(line + "\n" for line in comment), command, answer)


def render(played: list[Block]) -> str:
    """The file again."""
    return "\n".join(
        f"{one.comment}{one.command}\n----\n{one.expected}\n" if one.command else one.comment for one in played
    )


class Player:
    """One node with a ledger and a coordinator, and trainers that do as they are told."""

    def __init__(self) -> None:
        self.generation, self.every = 1, 1
        self.restored: SnapshotId | None = None
        self.slots: dict[int, list[tuple[Progress, SnapshotId] | None]] = {}
        self.passed: dict[int, int] = {}
        self.fenced = self.ever_committed = False

    def play(self, command: str) -> str:
        """The answer to one command, without the last line's end."""
        name, *words = command.split()
        if name.startswith("r") and name[1:].isdigit():
            return "\n".join(self._trainer(int(name[1:]), *words)) or "ok"
        return "\n".join(getattr(self, f"_{name}")(*words)) or "ok"

    def _begin(self, *words: str) -> Iterator[str]:
        given = dict(word.split("=") for word in words)
        ranks = range(int(given["ranks"]))
        self.generation, self.every = int(given.get("generation", 1)), int(given.get("every", 1))
        self.restored = _snapshot(given["restored"]) if "restored" in given else None
        self.slots = {rank: [None] * SLOTS for rank in ranks}
        self.passed = dict.fromkeys(ranks, 0)
        yield from self._restart()

    # --- trainers ---------------------------------------------------------------------------------

    def _trainer(self, rank: int, verb: str, step: str = "0") -> Iterator[str]:
        row = self.slots[rank]
        filling = next((index for index, slot in enumerate(row) if slot and slot[0] is Progress.FILLING), None)
        if verb == "takes":
            if None not in row:
                yield "no slot is free"
            else:
                row[row.index(None)] = Progress.FILLING, SnapshotId(_generation(self.generation), int(step))
            self.passed[rank] = int(step)
        elif verb == "passes":
            self.passed[rank] = int(step)
        elif verb == "dies":
            yield from self._perform(self.ledger.observe(rank, self._view(rank)))
            yield from self._perform(self.ledger.died(rank))
        else:
            assert filling is not None, f"rank {rank} copies nothing"
            slot = row[filling]
            assert slot is not None
            row[filling] = {"finishes": (Progress.FULL, slot[1]), "skips": None}[verb]

    def _damage(self, rank: str, name: str) -> Iterator[str]:
        row = self.slots[int(rank[1:])]
        index = next(index for index, slot in enumerate(row) if slot and slot[1] == _snapshot(name))
        row[index] = Progress.DAMAGED, _snapshot(name)
        yield from ()

    # --- the daemon -------------------------------------------------------------------------------

    def _restart(self) -> Iterator[str]:
        ranks = frozenset(self.slots)
        self.ledger = Ledger(_generation(self.generation), ranks, restored=self.restored, fenced=self.fenced)
        self.coordinator = Coordinator(frozenset(["node"]), every=self.every)
        yield from ()

    def _look(self, *ranks: str) -> Iterator[str]:
        for rank in [int(one[1:]) for one in ranks] or sorted(self.slots):
            yield from self._perform(self.ledger.observe(rank, self._view(rank)))
        if self.fenced:
            return
        for decision in self.coordinator.observe("node", self.ledger.state()):
            yield f"decided: {_decision(decision)}, since {decision.why}"
            yield from self._perform(self.ledger.apply(decision))
        step = self.coordinator.name_next()
        if step is not None:
            yield f"named: step {step}"

    def _act(self, count: str) -> Iterator[str]:
        actions: list[Action] = []
        for rank in sorted(self.slots):
            actions += self.ledger.observe(rank, self._view(rank))
        for decision in self.coordinator.observe("node", self.ledger.state()):
            actions += self.ledger.apply(decision)
        yield from self._perform(actions[: int(count)])
        yield f"the daemon dies before {len(actions) - int(count)} more"
        yield from self._restart()

    def _fence(self) -> Iterator[str]:
        self.fenced = self.ledger.fenced = True
        yield from ()

    def _perform(self, actions: list[Action]) -> Iterator[str]:
        for action in actions:
            if isinstance(action, Advance):
                slot = self.slots[action.rank][action.slot]
                assert slot is not None and slot[0] is action.state
                self.slots[action.rank][action.slot] = action.to, slot[1]
                yield f"r{action.rank}: {_name(slot[1])} {action.state.name} -> {action.to.name}"
            elif isinstance(action, Empty):
                slot = self.slots[action.rank][action.slot]
                assert slot is not None and slot[0] is action.state
                self.slots[action.rank][action.slot] = None
                yield f"r{action.rank}: {_name(slot[1])} {slot[0].name} -> EMPTY, {action.why}"
            elif isinstance(action, Announce):
                self.ever_committed |= isinstance(action.decision, Commit)
                yield f"announced: {_decision(action.decision)}"

    # --- recovery ---------------------------------------------------------------------------------

    def _choose(self) -> Iterator[str]:
        choice = recovery.choose([self._inventory()])
        yield f"{'lost' if choice.lost else _name(choice.snapshot) if choice.snapshot else 'nothing'}: {choice.why}"

    def _inherit(self, number: str, restored: str) -> Iterator[str]:
        chosen = _snapshot(restored)
        self.generation, self.restored, self.fenced = int(number), chosen, False
        self.passed = dict.fromkeys(self.slots, chosen.step)
        yield from self._restart()

    def _superseded(self, number: str, *words: str) -> Iterator[str]:
        given = dict(word.split("=") for word in words)
        restored = _snapshot(given.pop("restored")) if "restored" in given else None
        others = []
        for name, facts in given.items():
            origin, _, committed = facts.partition(",")
            others.append(
                (_generation(int(name[1:])), None if origin == "nothing" else _snapshot(origin), bool(committed))
            )
        gone = superseded(_generation(int(number[1:])), restored, others)
        yield ", ".join(f"g{one.number}" for one in sorted(gone)) or "none"

    def _slots(self) -> Iterator[str]:
        for rank, row in sorted(self.slots.items()):
            shown = [f"{_name(slot[1])} {slot[0].name}" if slot else "EMPTY" for slot in row]
            yield f"r{rank} passed {self.passed[rank]}: {', '.join(shown)}"

    # --- helpers ----------------------------------------------------------------------------------

    def _view(self, rank: int) -> RankView:
        slots = [SlotView(index, *slot) for index, slot in enumerate(self.slots[rank]) if slot]
        return RankView(self.passed[rank], tuple(slots))

    def _inventory(self) -> Inventory:
        shards, damaged = [], []
        for rank, row in sorted(self.slots.items()):
            for index, slot in enumerate(row):
                if slot and slot[0] is Progress.DAMAGED:
                    damaged.append(f"{slot[1]}: the shard of rank {rank} is damaged")
                elif slot:
                    arena = bytes([rank]) * 16
                    shards.append(Shard(slot[1], arena, index, slot[0].name, rank, len(self.slots), bytes(32), 1))
        generation = _generation(self.generation)
        arenas = [
            ArenaReport(bytes([rank]) * 16, rank, generation, 1, 1, 0, self.ever_committed) for rank in self.slots
        ]
        return Inventory(bytes(16), "node", shards, arenas, damaged)


def _generation(number: int) -> GenerationId:
    return GenerationId(number, bytes([number]) * 16)


def _snapshot(name: str) -> SnapshotId:
    generation, step = name.removeprefix("g").split(":")
    return SnapshotId(_generation(int(generation)), int(step))


def _name(made: SnapshotId) -> str:
    return f"g{made.generation.number}:{made.step}"


def _decision(decision: Decision) -> str:
    return f"{'COMMIT' if isinstance(decision, Commit) else 'ABORT'} {decision.step}"
