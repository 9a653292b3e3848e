"""What an arena offers to whoever wants to restore, and what it complains about. Looks only."""

from __future__ import annotations

from snapshotd import parityset, wire
from snapshotd.arena import ArenaFile
from snapshotd.errors import ProtocolError
from snapshotd.generation import views
from snapshotd.ledger import Progress
from snapshotd.wire import ArenaReport, ParityReport, Shard


def report(file: ArenaFile) -> ArenaReport:
    return ArenaReport(
        arena=file.arena_id,
        rank=file.owner.rank,
        generation=file.generation,
        slot_bytes=file.slot_bytes,
        block_bytes=file.block_bytes,
        last_commit=file.native.committed_step,
        ever_committed=file.native.ever_committed,
        restored=file.restored,
        room=file.native.slots - sum(view.progress is not Progress.DAMAGED for view in views(file)),
        closed=file.owner.closed,
    )


def shards(file: ArenaFile) -> list[Shard]:
    found = []
    for view in views(file):
        if view.progress >= Progress.FULL and view.snapshot is not None:
            info = file.native.slot(view.index)
            found.append(
                Shard(
                    snapshot=view.snapshot,
                    arena=file.arena_id,
                    slot=view.index,
                    progress=view.progress.name,
                    rank=info.rank,
                    world_size=info.world_size,
                    fingerprint=info.fingerprint,
                    file_bytes=info.file_bytes,
                    block_bytes=file.block_bytes,
                    foster=file.is_foster,
                )
            )
    return found


def parities(file: ArenaFile) -> list[ParityReport]:
    """The parity sets of a parity arena that are whole, with what they protect."""
    found = []
    for view in views(file):
        described = described_in(file, view.index) if view.progress >= Progress.FULL else None
        if described is None or described.snapshot != view.snapshot:
            continue
        found.append(
            ParityReport(
                snapshot=described.snapshot,
                arena=file.arena_id,
                slot=view.index,
                progress=view.progress.name,
                position=described.position,
                layout=described.layout,
                foster=file.is_foster,
            )
        )
    return found


def described_in(file: ArenaFile, slot: int) -> parityset.Description | None:
    """The description of a whole parity set; read once, since its bytes do not change. None where it is damaged."""
    info = file.native.slot(slot)
    known = file.described.get(slot)
    if known is not None and known[0] == info.fingerprint and known[1].snapshot.step == info.step:
        return known[1]
    view = file.native.slot_view(slot)
    try:
        found = parityset.read(view)
    except ProtocolError:
        return None
    finally:
        view.release()
    file.described[slot] = (info.fingerprint, found)
    return found


def complaints(file: ArenaFile) -> list[str]:
    """A sentence for each slot that holds something unusable."""
    sentences = []
    for view in views(file):
        if view.progress is Progress.DAMAGED:
            known = file.quarantined.get(view.index)
            why = known[1] if known else "its description fails its checksum"
            what = view.snapshot or "an unknown snapshot"
            sentences.append(wire.clip(f"slot {view.index} of rank {file.owner.rank} ({what}) is damaged: {why}"))
    if file.missed is not None and file.missed[0].step == file.native.committed_step and not file.is_parity:
        snapshot, why = file.missed
        sentences.append(wire.clip(f"the shard of rank {file.owner.rank} of {snapshot} was set aside: {why}"))
    return sentences
