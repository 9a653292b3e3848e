"""Bugs that are planted in the product on purpose, each one that somebody could write, or that somebody wrote.

The simulation has to notice each of them. Those of `tests/unit/test_ledger_machine_bites.py` are used too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from snapshotd import geometry, recovery, wire
from snapshotd.arena import ArenaFile
from snapshotd.door import Answer
from snapshotd.generation import Generation, views
from snapshotd.keeper import Keeper
from snapshotd.ledger import Action, Ledger, Progress, SlotView
from snapshotd.protect import Task
from snapshotd.recovery import Choice
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
