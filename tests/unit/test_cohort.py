"""Who is in a generation, and what its members said last."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from snapshotd import wire
from snapshotd.cohort import Cohort, node_state
from snapshotd.errors import Refused
from snapshotd.ledger import Progress
from snapshotd.wire import GenerationId, HeldShard, Place, Publish, ShardShape, SnapshotId

NOW, OLD = GenerationId(2, b"b" * 16), GenerationId(1, b"a" * 16)
IDS = [bytes([number]) * 16 for number in range(4)]


def place(number: int, label: str = "") -> Place:
    return Place(
        IDS[number], label or f"host{number}", f"127.0.0.1:{7000 + number}", f"127.0.0.1:{8000 + number}", [number]
    )


def attach(**changes: Any) -> wire.Attach:
    plain = wire.Attach(
        "job", NOW, 1, 4, 0, [1], 1, 4096, 4096, bytes(32), nodes=[place(number) for number in range(4)],
        groups=[[IDS[3], IDS[1]], [IDS[0], IDS[2]]], parity=2,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def cohort(**changes: Any) -> Cohort:
    found = Cohort.of(attach(**changes), IDS[1])
    assert found is not None
    return found


def said(number: int, serial: int, *steps: tuple[SnapshotId, str], size: int = 5000, passed: int = 9) -> Publish:
    held = [
        HeldShard(number, snapshot, how, b"x" * 16, index, ShardShape(number, size, 4096, bytes(32)))
        for index, (snapshot, how) in enumerate(steps)
    ]
    return Publish("job", NOW, IDS[number], serial, True, False, {number: passed}, held, 3, 0, 0)


def test_a_job_of_one_node_has_no_cohort() -> None:
    assert Cohort.of(attach(nodes=[], groups=[]), IDS[1]) is None


def test_the_node_of_rank_zero_coordinates_and_hears_everybody() -> None:
    found = cohort()
    assert (found.coordinator, found.coordinates, found.position) == (IDS[0], False, 1)
    assert [one.node for one in found.listeners()] == [IDS[0], IDS[3]], "the coordinator and the group"
    assert found.hears([IDS[3], IDS[1]]) and not found.hears([IDS[0], IDS[2]])


def test_parity_is_clipped_to_what_the_group_allows() -> None:
    assert cohort().parity_here == 1


def test_nodes_of_one_label_are_told_apart() -> None:
    found = cohort(nodes=[place(number, "worker") for number in range(4)])
    assert len(found.names()) == 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"nodes": [place(0), place(2)]}, "without this one"),
        ({"local_ranks": [1, 2]}, "without this one"),
        ({"nodes": [place(0), place(1), place(2)], "world_size": 4}, "each of its 4 ranks once"),
        ({"groups": [[IDS[0], IDS[1]]]}, "each of its 4 nodes once"),
        ({"nodes": [place(0), place(1), place(2), Place(IDS[3], "deaf", "", "", [3])]}, "deaf listens nowhere"),
    ],
)
def test_an_attach_whose_nodes_are_no_partition_is_refused_with_a_sentence(changes: Any, why: str) -> None:
    with pytest.raises(Refused, match=why):
        Cohort.of(attach(**changes), IDS[1])


def test_an_older_or_a_strangers_state_is_passed_over() -> None:
    found = cohort()
    assert found.hear(said(3, 5), 1.0)
    assert not found.hear(said(3, 5), 2.0) and not found.hear(said(3, 4), 2.0)
    assert found.hear(said(3, 6), 2.0)
    stranger = msgspec.structs.replace(said(3, 9), node=b"s" * 16)
    assert not found.hear(stranger, 2.0)
    assert found.silent([IDS[3], IDS[1]], 3.0, 5.0) == []
    assert found.silent([IDS[3], IDS[1]], 8.0, 5.0) == [IDS[3]]


def test_a_layout_is_there_once_the_whole_group_holds_the_snapshot_in_full() -> None:
    found, snapshot = cohort(), SnapshotId(NOW, 7)
    found.hear(said(1, 1, (snapshot, "FULL")), 1.0)
    assert found.layout(snapshot) is None
    found.hear(said(3, 1, (snapshot, "FILLING")), 1.0)
    assert found.layout(snapshot) is None
    found.hear(said(3, 2, (snapshot, "FULL")), 1.0)
    layout = found.layout(snapshot)
    assert layout is not None
    assert [[shape.rank for shape in row] for row in layout.positions] == [[3], [1]], "in the order of positions"
    assert set(found.holdings(snapshot)) == {1, 3}


def test_only_snapshots_of_this_generation_and_the_restored_one_have_a_vote() -> None:
    restored = SnapshotId(OLD, 5)
    message = said(3, 1, (restored, "FULL"), (SnapshotId(OLD, 6), "COMMITTED"), (SnapshotId(NOW, 7), "PROTECTED"))
    state = node_state(message, NOW, restored)
    assert state.held == {3: {5: Progress.FULL, 7: Progress.PROTECTED}}
    assert (state.heard, state.passed) == (3, {3: 9})


def test_a_run_is_over_once_every_node_closed() -> None:
    found = cohort()
    for number in range(4):
        assert not found.all_closed()
        found.hear(msgspec.structs.replace(said(number, 1), closed=True), 1.0)
    assert found.all_closed()
