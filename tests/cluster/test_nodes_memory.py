"""What several nodes take from their memory: data twice, parity twice, and next to nothing beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.holder import BLOCK_BYTES, Holder, protect_together
from snapshotd import status
from snapshotd.arena import SLOTS
from snapshotd.budget import shown
from snapshotd.manifest import round_up
from snapshotd.wire import GenerationId, SnapshotId
from tests.cluster.harness import Daemon
from tests.cluster.nodes import Nodes, nodes
from tests.cluster.test_resources import own_bytes

MIB = 1 << 20
STATE_BYTES = 512 * MIB
HEADER_BYTES = 100_003  # of the file that the state is saved in, and what else of it is no tensor
GENERATION = GenerationId(1, bytes(16))


def allocated(daemon: Daemon) -> int:
    """Memory behind every file of a daemon's directory."""
    return sum(path.stat().st_blocks * 512 for path in daemon.shm_dir.rglob("*") if path.is_file())


@contextmanager
def ranks(scene: Nodes, count: int) -> Iterator[list[Holder]]:
    """A rank without torch on each node, whose arenas and checksums are real."""
    with ExitStack() as stack:
        holders = []
        for rank in range(count):
            holders.append(Holder(scene.daemons[rank].socket, "test", rank))
            stack.callback(holders[-1].close)
        yield holders


def slot_of(holder: Holder, step: int) -> int:
    """The slot of a rank's arena that holds a step."""
    return next(index for index in range(SLOTS) if holder.arena.slot(index).step == step)


def generation_of(daemon: Daemon) -> dict[str, Any]:
    """The only generation, as a node's status shows it."""
    (job,) = daemon.status()["jobs"].values()
    (generation,) = job["generations"]
    assert isinstance(generation, dict)
    return generation


def parity_slot_of(daemon: Daemon, step: int) -> int:
    """The slot that holds a node's parity of a step."""
    return next(int(one["index"]) for one in generation_of(daemon)["parity"]["sets"] if one["step"] == step)


def test_data_and_parity_take_what_the_promise_says_and_status_says_what_they_take(
    shm_dir: Path, tmp_path: Path
) -> None:
    (k, m), file_bytes = (2, 1), STATE_BYTES + HEADER_BYTES
    count = k + m
    slot_bytes, data = round_up(file_bytes, BLOCK_BYTES), b"\xa5" * file_bytes
    with nodes(shm_dir, tmp_path, count) as scene, ranks(scene, count) as holders:
        used: list[set[tuple[int, int]]] = [set() for _ in holders]
        for step in (1, 2):
            snapshot = SnapshotId(GENERATION, step)
            if step == 1:
                protect_together(holders, snapshot, [data] * count, slot_bytes, m)
            else:
                for holder in holders:
                    holder.take(snapshot, count, data)
            scene.all_commit(step)
            for daemon, holder, slots in zip(scene.daemons, holders, used, strict=True):
                slots.add((slot_of(holder, step), parity_slot_of(daemon, step)))
        assert used == [{(0, 0), (1, 1)}] * count, "both slots of data and of parity were filled"
        data_promised, parity_promised = 2 * STATE_BYTES, 2 * m / k * STATE_BYTES
        for daemon in scene.daemons:
            taken, generation = allocated(daemon), generation_of(daemon)
            promised = data_promised + parity_promised
            assert promised <= taken <= promised * 1.05, (
                f"{daemon.folder} takes {taken / STATE_BYTES:.3f} times the state"
            )
            of_ranks = sum(arena["total_bytes"] for arena in generation["arenas"])
            of_parity = generation["parity"]["total_bytes"]
            assert data_promised <= of_ranks <= data_promised * 1.05
            assert parity_promised <= of_parity <= parity_promised * 1.05
            document = daemon.status()
            assert document["memory"]["arenas_bytes"] == of_ranks + of_parity
            assert abs(of_ranks + of_parity - taken) < MIB, "status tells what is allocated"
            assert f"memory: {shown(taken)} in arenas" in status.text(document)
            assert own_bytes(daemon.pid) < 60_000_000, "nor does a daemon keep copies of its own"
