"""Bugs that are planted in the product on purpose, each one that somebody could write, or that somebody wrote.

The simulation has to notice each of them. Those of `tests/unit/test_ledger_machine_bites.py` are used too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from snapshotd import geometry, recovery, reprotect, wire
from snapshotd.arena import ArenaFile
from snapshotd.caretaker import Caretaker
from snapshotd.door import Answer
from snapshotd.generation import Generation, views
from snapshotd.keeper import Keeper
from snapshotd.ledger import Action, Ledger, Progress, SlotView
from snapshotd.protect import Task
from snapshotd.recovery import Choice
from snapshotd.reprotect import MakeSet, Plan
from snapshotd.session import ClientSession
from snapshotd.wire import Inventory
from snapshotd.workshop import Workshop


def adopts_parity_that_is_half_made(patch: pytest.MonkeyPatch) -> None:
    real = Keeper._adopt

    def wrong(self: Keeper, file: ArenaFile, found: list[int]) -> None:
        for view in views(file) if file.is_parity else []:
            if view.progress is Progress.FILLING:
                file.native.set_block_crcs(view.index, file.slot_bytes)
                file.native.publish(view.index, file.slot_bytes)
        real(self, file, found)

    patch.setattr(Keeper, "_adopt", wrong)


def counts_parity_that_is_damaged(patch: pytest.MonkeyPatch) -> None:
    """It was so: a set whose description had rotted was emptied, and went on counting."""
    patch.setattr(Ledger, "_count_parity", lambda self: None)


def frees_parity_of_the_old_grouping_at_once(patch: pytest.MonkeyPatch) -> None:
    """It was so: each node freed its old set when its own new one was whole, while others had none."""
    real = Workshop._make

    async def wrong(self: Workshop, generation: Generation, task: Task, making: Any) -> Any:
        made = await real(self, generation, task, making)
        for file in generation.parity_files():
            for view in views(file):
                if made and view.snapshot == task.snapshot and (file, view.index) != made and not file.pins[view.index]:
                    file.native.empty(view.index)
        return made

    patch.setattr(Workshop, "_make", wrong)


def frees_the_committed_for_what_was_never_whole(patch: pytest.MonkeyPatch) -> None:
    """It was so: where a restored snapshot could not be voted, it went, and a newer stray stayed."""
    patch.setattr(Ledger, "_gives_way", lambda self, rank, slot: None)


def fences_for_whoever_is_gone(patch: pytest.MonkeyPatch) -> None:
    """It was so: a launch that was over fenced the one that came after it."""

    async def wrong(self: ClientSession, ask: wire.TakeInventory) -> Answer:
        await self._unclaimed(ask.job, None, None)
        peers = await self._daemon.peer_inventories(ask.job, fresh=True)
        self._keeper.fence(ask.job)
        return Answer(wire.InventoryTaken(self._keeper.inventory(ask.job), peers))

    patch.setattr(ClientSession, "_take_inventory", wrong)


def marks_one_rank_only(patch: pytest.MonkeyPatch) -> None:
    real = Ledger._marks

    def wrong(self: Ledger, rank: int | None = None) -> list[Action]:
        return real(self, rank)[:1]

    patch.setattr(Ledger, "_marks", wrong)


def chooses_the_older(patch: pytest.MonkeyPatch) -> None:
    real = recovery.choose

    def wrong(inventories: Iterable[Inventory], **how: Any) -> Choice:
        gathered = list(inventories)
        newest = real(gathered, **how).snapshot
        older = real(gathered, **(how | {"excluded": {*how.get("excluded", ()), newest}})) if newest else None
        return older if older is not None and older.snapshot is not None else real(gathered, **how)

    patch.setattr(recovery, "choose", wrong)


def empties_what_its_trainer_fills(patch: pytest.MonkeyPatch) -> None:
    real = Ledger._useless

    def wrong(self: Ledger, rank: int, slot: SlotView) -> str | None:
        step = self.step_of(slot)
        aborted = slot.progress is Progress.FILLING and step is not None and self.has_aborted(step)
        return "its step was aborted" if aborted else real(self, rank, slot)

    patch.setattr(Ledger, "_useless", wrong)


def takes_the_wrong_position(patch: pytest.MonkeyPatch) -> None:
    real = geometry.Stripes.owned

    def wrong(self: geometry.Stripes, position: int) -> list[tuple[int, int]]:
        return real(self, (position + 1) % self.n)

    patch.setattr(geometry.Stripes, "owned", wrong)


# --- survivors of a job that waits ------------------------------------------------------------------------------------


def gives_old_parity_up_for_the_new(patch: pytest.MonkeyPatch) -> None:
    """Once its own set of the new group is whole, others may still have none."""
    real = Caretaker._make

    async def wrong(self: Caretaker, job: str, care: Any, plan: Plan, step: Any, *rest: Any) -> None:
        await real(self, job, care, plan, step, *rest)
        for generation in self._keeper.of_job(job) if isinstance(step, MakeSet) else []:
            for file in generation.parity_files():
                for view in views(file):
                    if view.snapshot == plan.snapshot and not file.pins[view.index]:
                        file.native.empty(view.index)

    patch.setattr(Caretaker, "_make", wrong)


def frees_what_it_made_when_a_recovery_begins(patch: pytest.MonkeyPatch) -> None:
    """What is whole is the only protection there is after a second loss."""
    real = Caretaker.give_up

    def wrong(self: Caretaker, job: str) -> None:
        real(self, job)
        for file in self._fosters(job):
            if not file.pinned:
                self._keeper.free(file, "a recovery began")

    patch.setattr(Caretaker, "give_up", wrong)


def plans_by_whoever_looks(patch: pytest.MonkeyPatch) -> None:
    """Each survivor puts itself first, and no two agree on a group."""
    real = reprotect.plan_for

    def wrong(choice: Choice, shapes: Any, survivors: Any, parity: int) -> Plan:
        made = real(choice, shapes, survivors, parity)
        return replace(made, order=(*made.order[-1:], *made.order[:-1]))

    patch.setattr(reprotect, "plan_for", wrong)


def adopts_a_foster_that_is_half_made(patch: pytest.MonkeyPatch) -> None:
    real = Keeper._adopt

    def wrong(self: Keeper, file: ArenaFile, found: list[int]) -> None:
        for view in views(file) if file.is_foster else []:
            if view.progress is Progress.FILLING and not file.is_parity:
                file.native.set_block_crcs(view.index, file.slot_bytes)
                file.native.publish(view.index, file.slot_bytes)
        real(self, file, found)

    patch.setattr(Keeper, "_adopt", wrong)


def publishes_fosters(patch: pytest.MonkeyPatch) -> None:
    real = Generation.publication

    def wrong(self: Generation, serial: int) -> wire.Publish:
        held = [one for file in self.foster_files() if not file.is_parity for one in self._held(file.owner.rank, file)]
        said = real(self, serial)
        return wire.Publish(
            **{**{name: getattr(said, name) for name in said.__struct_fields__}, "held": said.held + held}
        )

    patch.setattr(Generation, "publication", wrong)
