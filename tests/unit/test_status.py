"""The status document and its text: pure functions of plain data."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from snapshotd import status
from snapshotd.budget import Room
from snapshotd.metrics import COUNTERS, Metrics
from snapshotd.status import ArenaFacts, CohortFacts, GenerationFacts, GroupFacts, NodeFacts, ParityFacts, SlotFacts
from snapshotd.wire import ArenaReport, GenerationId, Inventory, Shard, SnapshotId

GENERATION = GenerationId(3, b"\xab" * 16)
ARENA = b"a" * 16


def node() -> NodeFacts:
    return NodeFacts(
        node="00ff" * 8,
        label="host-1",
        version="1.2.3",
        pid=77,
        uptime_s=3700.0,
        socket="/run/snapshotd.sock",
        shm_dir="/dev/shm/snapshotd/0",
        listen="",
        advertise="10.0.0.1:7780",
        streams="10.0.0.1:7781",
        authenticates=True,
        domain="rack=7",
        connections=2,
        memory_limit_bytes=0,
        used_bytes=3 << 30,
    )


def cohort() -> CohortFacts:
    groups = [
        GroupFacts(["host-1", "host-2", "host-3"], 1, ["host-3"], 0, True),
        GroupFacts(["host-4", "host-5", "host-6"], 1, [], None, False),
    ]
    return CohortFacts(
        "host-1", "host-2", [{"node": "00", "name": f"host-{n}"} for n in range(1, 7)], groups, "no room"
    )


def generation(held: bool = True, peers: CohortFacts | None = None) -> GenerationFacts:
    slots = [
        SlotFacts(0, "COMMITTED", 41, "step 41", 1 << 20, 1, ""),
        SlotFacts(1, "DAMAGED", 42, "step 42", 1 << 20, 0, "block 7 is bad"),
    ]
    arena = ArenaFacts(ARENA.hex(), 0, held, 99 if held else 0, 42, False, 3 << 30, 7200.0, slots)
    sets = [asdict(ParityFacts(ARENA.hex(), 0, "COMMITTED", 41, "step 41", 2, 1 << 20, ""))] if peers else []
    parity = {"total_bytes": 2 << 30 if peers else 0, "sets": sets}
    return GenerationFacts(3, "ab" * 16, 1, 1, False, "step 30", True, 41, 43, 12, 1, 1 / 13, [arena], parity, peers)


def inventory(ever_committed: bool = True, shards: bool = True) -> Inventory:
    shard = Shard(SnapshotId(GENERATION, 41), ARENA, 0, "COMMITTED", 0, 1, bytes(32), 1 << 20)
    report = ArenaReport(ARENA, 0, GENERATION, 1 << 20, 4096, 41, ever_committed)
    return Inventory(b"n" * 16, "host-1", [shard] if shards else [], [report])


def document(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "node": node(),
        "rooms": [Room("the cgroup /x", 5 << 30, "memory.max"), Room("this machine", 9 << 30, "")],
        "jobs": {"llama": [generation()]},
        "inventories": {"llama": [inventory()]},
        "damaged": ["/dev/shm/x cannot be used"],
        "counters": Metrics().document(),
    }
    return status.document(**(given | changes))


def test_the_document_says_what_can_be_recovered_and_why() -> None:
    found = document()["jobs"]["llama"]["recoverable"]
    assert (found["step"], found["generation"], found["lost"]) == (41, 3, False)
    assert "step 41" in found["why"]
    assert "it is committed" in found["why"]


def test_groups_are_shown_with_who_protects_whom_and_how_many_more_may_be_lost() -> None:
    one = document(jobs={"llama": [generation(peers=cohort())]})
    assert one["jobs"]["llama"]["generations"][0]["cohort"]["groups"][0]["losses_left"] == 0
    text = status.text(one)
    assert "host-1 coordinates, this is host-2" in text
    assert "group 0 (ours): host-1, host-2, host-3; parity 1, 0 more lost nodes can be rebuilt; silent: host-3" in text
    assert "group 1: host-4, host-5, host-6; parity 1, not heard from here" in text
    assert "parity: 2.0 GiB for others; COMMITTED step 41" in text
    assert "! no room" in text


def test_what_was_committed_and_is_gone_is_called_lost() -> None:
    one = document(inventories={"llama": [inventory(shards=False)]})
    assert one["jobs"]["llama"]["recoverable"]["lost"]
    assert "job llama: LOST" in status.text(one)


def test_the_document_is_json_and_names_the_tightest_limit() -> None:
    found = json.loads(json.dumps(document()))
    assert found["memory"]["available_bytes"] == 5 << 30
    assert found["memory"]["limits"][0]["name"] == "the cgroup /x"
    assert found["status_version"] == status.VERSION


def test_the_text_has_what_a_person_looks_for() -> None:
    text = status.text(document())
    for part in (
        "snapshotd 1.2.3 on host-1: pid 77, up 1 h 1 min",
        "3.0 GiB in arenas, 5.0 GiB more before the cgroup /x is full",
        "job llama: step 41 can be restored",
        "generation 3-ababab, 1 ranks, committed step 41 (12 commits, 1 aborts), went on from step 30",
        "rank 0: pid 99, at step 42; COMMITTED step 41, DAMAGED step 42 (set aside: block 7 is bad)",
        "! /dev/shm/x cannot be used",
        "scrubber: off",
    ):
        assert part in text


def test_an_arena_without_a_trainer_says_how_long_it_stays() -> None:
    text = status.text(document(jobs={"llama": [generation(held=False)]}))
    assert "no trainer, freed in 2 h 0 min" in text


def test_what_the_scrubber_did_and_what_it_could_not_repair_is_told() -> None:
    scrub = {"bandwidth": 1, "every_s": 300.0, "rotten": ["rank 0's shard has 2 blocks that fail"]}
    counters = dict.fromkeys((f"{name}_total" for name in COUNTERS), 0) | {
        "scrub_checked_total": 90, "scrub_found_total": 5, "scrub_repaired_total": 3,
    }  # fmt: skip
    text = status.text({**document(), "scrub": scrub, "counters": counters})
    assert "scrubber: 90 blocks read again, 5 had rotted, 3 were repaired" in text
    assert "! rank 0's shard has 2 blocks that fail" in text


def test_an_empty_node_reads_well() -> None:
    text = status.text(document(jobs={}, inventories={}, rooms=[]))
    assert "no job has anything in memory" in text
    assert "no limit known" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (59.9, "59 s"), (61, "1 min"), (3700, "1 h 1 min"), (9 * 86400, "9 days")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text


def test_every_counter_is_in_the_document_from_the_start() -> None:
    assert set(document()["counters"]) == {f"{name}_total" for name in COUNTERS}


def test_counters_of_reasons_are_bounded() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.add("dropped", reason=f"reason {number}")
    reasons = metrics.document()["dropped_by_reason"]
    assert isinstance(reasons, dict)
    assert len(reasons) <= 65
    assert sum(reasons.values()) == metrics.count("dropped") == 1000


def test_an_unknown_counter_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        Metrics().add("typo")


def test_a_job_that_waits_says_how_it_is_protected_and_what_becomes_of_that() -> None:
    waits: dict[str, Any] = {
        "state": "re-protecting", "why": "of the 4 nodes of its group 1 is gone", "step": 41, "losses_left": 0,
        "made_bytes": 0, "foster_bytes": 3 << 20,
    }  # fmt: skip
    rooms, counters = [Room("this machine", 1 << 30, "the memory of the machine")], Metrics().document()
    jobs, held = {"test": [generation(held=False)]}, {"test": list[Inventory]()}
    document = status.document(node(), rooms, jobs, held, [], counters, {"test": waits})
    assert document["jobs"]["test"]["protection"] == waits
    told = status.text(json.loads(json.dumps(document)))
    assert "it waits, re-protecting: of the 4 nodes of its group 1 is gone (3.0 MiB here for that)" in told
    quiet = status.document(node(), rooms, jobs, held, [], counters)
    assert quiet["jobs"]["test"]["protection"] is None and "it waits" not in status.text(quiet)
