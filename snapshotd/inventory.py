"""What an arena offers to whoever wants to restore, and what it complains about. Looks only."""

from __future__ import annotations

from snapshotd import wire
from snapshotd.arena import ArenaFile
from snapshotd.generation import views
from snapshotd.ledger import Progress
from snapshotd.wire import ArenaReport, Shard


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
                )
            )
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
    return sentences
