"""The drill's parts without a daemon: what it judges, where it aims and what its stage leaves behind."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from snapshotd import _native, aim
from snapshotd.aim import Loss, Strike, nodes_to_lose
from snapshotd.drill import DrillOptions, add_arguments, run_drill
from snapshotd.errors import ConfigError
from snapshotd.stage import MARK, DrillFailed, Life, Node, Process, Stage, read_lives
from snapshotd.transcript import Transcript
from snapshotd.verdict import Played, Report, judge, memory_of

SLOT_BYTES = 4 << 20
BLOCK_BYTES = 64 << 10


def life(rank: int, first: int, last: int, *, started_s: float = 0.0, digest: str | None = None) -> Life:
    """A rank that trained the steps `first` up to, not including, `last`."""
    losses = {step: f"loss {rank} {step}" for step in range(first, last)}
    restore = {"attach_s": 0.5, "verify_s": 0.25, "copy_s": 0.125}
    return Life(rank, 100 + rank, started_s, started_s + 2.0, started_s + 4.0, first, restore, losses, digest, 10)


def played(**changes: object) -> Played:
    """Two ranks and ten steps, killed with step 4 committed, unless `changes` say otherwise."""
    facts: dict[str, object] = {
        "strikes": [Strike(1, 101, 50.0, 5, 4, True)],
        "resumed": [[life(rank, 4, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]],
        "before": [life(rank, 0, 5) for rank in (0, 1)],
        "undisturbed": [life(rank, 0, 10, digest=f"end {rank}") for rank in (0, 1)],
    }
    facts |= changes
    before, resumed = facts.pop("before"), facts["resumed"]
    facts.setdefault("interrupted", [*before, *(one for lives in resumed for one in lives)])  # type: ignore
    return dataclasses.replace(Played("ddp", 10, 2, 2, 1, 8), **facts)  # type: ignore[arg-type]


def report_on(**changes: object) -> Report:
    return judge(played(**changes))


def played_with_loss(**changes: object) -> Played:
    """As `played`, and then node 0 was lost with step 6 committed; its shard of 900 bytes was rebuilt."""
    resumed = [life(rank, 4, 8, started_s=51.0) for rank in (0, 1)]
    back = [life(rank, 6, 10, started_s=71.0, digest=f"end {rank}") for rank in (0, 1)]
    for one in back:
        one.restore |= {"rebuilt_bytes": 900, "rebuild_s": 0.25 + one.rank}
    loss = Loss((0,), (0,), 70.0, 6, data_bytes=4000, parity_bytes=2000)
    facts: dict[str, object] = {"resumed": [resumed], "loss": loss, "rebuilt": back}
    facts |= changes
    before = [life(rank, 0, 5) for rank in (0, 1)]
    facts.setdefault("interrupted", [*before, *resumed, *facts["rebuilt"]])  # type: ignore[misc]
    return played(**facts)


def test_a_run_that_came_back_whole_is_bit_identical() -> None:
    report = report_on()
    assert report.bit_identical and report.why == "" and not report.lost
    assert (report.committed_before_kill, report.resumed_after_kill_step) == (4, 4)
    assert (report.losses_compared, report.losses_different, report.steps_computed_twice) == (22, 0, 2)
    assert report.digest_interrupted == report.digest_undisturbed != ""


def test_the_seconds_to_resume_add_up_to_their_total() -> None:
    split = dict(report_on().seconds_to_resume_kill)
    assert split.pop("total") == pytest.approx(5.0)
    assert sum(split.values()) == pytest.approx(5.0)
    assert (split["process_start"], split["imports"], split["attach"]) == (1.0, 2.0, 0.5)


def test_resuming_before_the_last_commit_is_not_bit_identical_whatever_the_bits_say() -> None:
    resumed = [[life(rank, 3, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]]
    assert not report_on(resumed=resumed).bit_identical


def test_resuming_from_nothing_is_not_bit_identical_whatever_the_bits_say() -> None:
    resumed = [[life(rank, 0, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]]
    strikes = [Strike(1, 101, 50.0, 1, 0, True)]
    assert not report_on(resumed=resumed, strikes=strikes).bit_identical


def test_ranks_that_resume_at_different_steps_are_not_bit_identical() -> None:
    resumed = [[life(rank, 4 + rank, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]]
    assert not report_on(resumed=resumed).bit_identical


@pytest.mark.parametrize("step", [0, 4, 9])
def test_one_loss_that_differs_is_found_also_in_a_step_that_was_computed_twice(step: int) -> None:
    before = [life(0, 0, 5), life(1, 0, 5)]
    resumed = [[life(rank, 4, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]]
    wrong = before[1] if step < 5 else resumed[0][1]
    wrong.losses[step] = "another"
    report = report_on(before=before, resumed=resumed)
    assert report.losses_different == 1 and not report.bit_identical


def test_a_step_that_nobody_computed_is_noticed() -> None:
    before = [life(0, 0, 5), life(1, 0, 5)]
    del before[0].losses[2]
    assert not report_on(before=before).bit_identical


@pytest.mark.parametrize("digest", ["something else", None])
def test_another_final_state_is_not_bit_identical(digest: str | None) -> None:
    resumed = [[life(0, 4, 10, digest="end 0"), life(1, 4, 10, digest=digest)]]
    assert not report_on(resumed=resumed).bit_identical


def test_nobody_killed_is_not_bit_identical() -> None:
    before = [life(rank, 0, 10, digest=f"end {rank}") for rank in (0, 1)]
    assert not report_on(strikes=[], resumed=[], before=before).bit_identical


def test_a_run_that_came_back_from_a_kill_and_a_loss_is_bit_identical() -> None:
    report = judge(played_with_loss())
    assert report.bit_identical and report.why == ""
    assert (report.lost_nodes, report.last_commit_before_loss, report.resumed_after_loss_step) == ([0], 6, 6)
    assert (report.bytes_rebuilt, report.seconds_to_rebuild) == (900, 1.25)
    assert (report.data_bytes, report.parity_bytes) == (4000, 2000)
    assert report.seconds_to_resume_loss["total"] == pytest.approx(5.0)
    assert report.resumed_after_kill_step == 4


def test_without_a_loss_the_report_says_so() -> None:
    report = report_on()
    assert (report.lost_nodes, report.bytes_rebuilt, report.seconds_to_resume_loss) == ([], 0, {})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss": Loss((0,), (0,), 70.0, 7, 1, 1)}, "step 7 was committed when the nodes were lost.*after step 6"),
        ({"loss": Loss((0,), (0,), 70.0, 0, 1, 1)}, "nothing was committed when the nodes were lost"),
        ({"rebuilt": [life(rank, 6, 10, digest=f"end {rank}") for rank in (0, 1)]}, "no byte .* was rebuilt"),
        ({"rebuilt": []}, "not every rank came back after the nodes were lost"),
    ],
)
def test_a_loss_that_was_not_made_up_for_is_not_bit_identical_whatever_the_bits_say(
    changes: dict[str, object], sentence: str
) -> None:
    whole = played_with_loss().interrupted
    report = judge(played_with_loss(**changes, interrupted=whole))
    assert not report.bit_identical
    assert re.search(sentence, report.why)


def test_state_that_is_lost_for_good_is_reported_with_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    report = judge(played_with_loss(rebuilt=[], undisturbed=[], lost="step 6: group 0 kept 1 of the 2 pieces it needs"))
    assert report.lost and not report.bit_identical
    assert (report.losses_compared, report.losses_different) == (0, 0)
    Transcript(as_json=True).verdict(report)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["lost"], shown["bit_identical"], shown["last_commit_before_loss"]) == (True, False, 6)
    assert "kept 1 of the 2 pieces" in shown["why"]
    Transcript(as_json=False).verdict(report)
    text = capsys.readouterr().out
    assert "step 6 was committed when node 0 of 2 were destroyed" not in text
    assert "step 6 was committed when node 0 of 2 was destroyed" in text and "kept 1 of the 2 pieces" in text


def test_memory_is_summed_over_nodes_and_generations_and_needs_no_parity() -> None:
    one = {"arenas": [{"total_bytes": 100}, {"total_bytes": 20}], "parity": {"total_bytes": 30}}
    documents: list[dict[str, Any]] = [
        {"jobs": {"drill": {"generations": [one, {"arenas": [{"total_bytes": 3}], "parity": None}]}}},
        {"jobs": {"other": {"generations": [one]}}},
        {"jobs": {"drill": {"generations": [{"arenas": []}]}}},
        {},
    ]
    assert memory_of("drill", documents) == (123, 30)


def write_journal(folder: Path, node: int, lines: list[dict[str, object]], torn: str = "") -> None:
    (folder / f"node{node}").mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + torn
    (folder / f"node{node}" / f"rank{lines[0]['rank']}-{lines[0]['pid']}.jsonl").write_text(text)


def test_a_journal_whose_last_line_was_torn_is_read_up_to_there(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"event": "start", "at_s": 3.0, "rank": 1, "pid": 7, "started_s": 1.0, "imported_s": 2.0},
        {"event": "restored", "at_s": 4.0, "step": 3, "restore": {"copy_s": 0.5}},
        {"event": "step", "at_s": 5.0, "step": 3, "loss": "0x1p+0", "seconds": 1.0},
    ]
    write_journal(tmp_path, 2, lines, torn='{"event": "step", "st')
    assert read_lives(tmp_path) == [Life(1, 7, 1.0, 2.0, 4.0, 3, {"copy_s": 0.5}, {3: "0x1p+0"}, node=2)]


def test_journals_of_all_nodes_are_read_in_the_order_of_starts_with_what_the_trainers_lost(tmp_path: Path) -> None:
    start: dict[str, object] = {"event": "start", "at_s": 3.0, "imported_s": 2.0}
    write_journal(tmp_path, 10, [{**start, "rank": 0, "pid": 8, "started_s": 1.5}])
    write_journal(
        tmp_path, 1, [{**start, "rank": 1, "pid": 7, "started_s": 1.0}, {"event": "lost", "at_s": 4.0, "why": "gone"}]
    )
    lives = read_lives(tmp_path)
    assert [(life.rank, life.node, life.lost) for life in lives] == [(1, 1, "gone"), (0, 10, None)]


# --- where it aims --------------------------------------------------------------------------------


@pytest.fixture
def arena(shm_dir: Path) -> Iterator[_native.Arena]:
    """A writable arena of two slots in a file that ends in `.arena`."""
    fd = os.open(shm_dir / "one.arena", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _native.reserve(fd, _native.Arena.bytes_needed(2, SLOT_BYTES, BLOCK_BYTES))
        _native.Arena.format(
            fd, arena_id=b"a" * 16, job="drill", local_index=0, slots=2, slot_bytes=SLOT_BYTES, block_bytes=BLOCK_BYTES
        )
        arena = _native.Arena(fd, writable=True)
    finally:
        os.close(fd)
    yield arena
    arena.close()


def own(arena: _native.Arena, pid: int) -> None:
    arena.set_owner(generation=1, nonce=b"n" * 16, rank=0, world_size=1, local_world=1, every=1, pid=pid)


def claim(arena: _native.Arena, step: int) -> int:
    facts = {"rank": 0, "world_size": 1, "fingerprint": b"f" * 32}
    return arena.claim(generation=1, nonce=b"n" * 16, step=step, **facts)  # type: ignore[arg-type]


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_only_arenas_that_these_trainers_hold_are_seen(arena: _native.Arena, shm_dir: Path) -> None:
    (shm_dir / "being-made.arena").write_bytes(b"")
    own(arena, pid=4321)
    arena.committed_step = 8
    with aim.owned_arenas([shm_dir], {0: 4321}) as arenas:
        assert list(arenas) == [0] and aim.committed_step(arenas) == 8
    with aim.owned_arenas([shm_dir], {0: 1234}) as arenas:
        assert arenas == {} and aim.committed_step(arenas) == 0


def test_arenas_are_found_on_every_node(arena: _native.Arena, shm_dir: Path, tmp_path: Path) -> None:
    own(arena, pid=4321)
    with aim.owned_arenas([tmp_path / "destroyed", tmp_path, shm_dir], {0: 4321}) as arenas:
        assert list(arenas) == [0]


@pytest.mark.parametrize(
    ("node_of_rank", "count", "lost"),
    [
        ({0: 0, 1: 1, 2: 2, 3: 3}, 1, (0,)),
        ({0: 0, 1: 1, 2: 2, 3: 3}, 2, (0, 3)),
        ({0: 2, 1: 0, 2: 1, 3: 3}, 2, (2, 3)),
        ({0: 3, 1: 3, 2: 0, 3: 0, 4: 1, 5: 1}, 2, (1, 3)),
        ({0: 0, 1: 1, 2: 2, 3: 3}, 3, (0, 2, 3)),
    ],
)
def test_the_coordinators_node_is_always_among_the_lost(
    node_of_rank: dict[int, int], count: int, lost: tuple[int, ...]
) -> None:
    assert nodes_to_lose(node_of_rank, count) == lost


def test_a_trainer_is_killed_while_its_copy_runs_and_not_before(
    arena: _native.Arena, shm_dir: Path, victim: subprocess.Popen[bytes]
) -> None:
    own(arena, victim.pid)
    struck: list[Strike | None] = []

    def drill() -> None:
        with aim.owned_arenas([shm_dir], {0: victim.pid}) as arenas:
            struck.append(aim.strike(arenas, 0, victim.pid, timeout_s=60.0, latest=100))

    thread = threading.Thread(target=drill)
    thread.start()
    claimed = claim(arena, step=1)  # claimed and published without a byte: no copy to be killed in
    arena.publish(claimed, file_bytes=4096)
    assert victim.poll() is None
    index = claim(arena, step=2)
    view = arena.slot_view(index)
    writes = 0
    while victim.poll() is None:  # what a copy does: bytes change while the slot is FILLING
        writes += 1
        view[:] = bytes([writes % 251 + 1]) * SLOT_BYTES
    view.release()
    thread.join()
    assert victim.returncode == -signal.SIGKILL
    assert struck[0] is not None
    assert dataclasses.replace(struck[0], at_s=0.0) == Strike(0, victim.pid, 0.0, 2, 0, True)


def test_a_copy_that_is_published_before_the_kill_takes_effect_does_not_count(
    arena: _native.Arena, victim: subprocess.Popen[bytes]
) -> None:
    index = claim(arena, step=3)
    arena.publish(index, file_bytes=4096)
    assert not aim._was_torn(arena, index, victim.pid)


def test_without_a_copy_nobody_is_killed(arena: _native.Arena, shm_dir: Path, victim: subprocess.Popen[bytes]) -> None:
    own(arena, victim.pid)
    claim(arena, step=1)
    with aim.owned_arenas([shm_dir], {0: victim.pid}) as arenas:
        assert aim.strike(arenas, 0, victim.pid, timeout_s=0.2, latest=100) is None
    assert victim.poll() is None


def test_a_trainer_whose_copies_are_never_seen_is_killed_at_the_latest_step_all_the_same(
    arena: _native.Arena, shm_dir: Path, victim: subprocess.Popen[bytes]
) -> None:
    own(arena, victim.pid)
    arena.committed_step, arena.passed = 6, 8
    with aim.owned_arenas([shm_dir], {0: victim.pid}) as arenas:
        assert aim.passed_step(arenas) == 8
        struck = aim.strike(arenas, 0, victim.pid, timeout_s=60.0, latest=8)
    assert victim.wait() == -signal.SIGKILL
    assert struck is not None
    assert dataclasses.replace(struck, at_s=0.0) == Strike(0, victim.pid, 0.0, 8, 6, False)


# --- what the stage leaves ------------------------------------------------------------------------


def test_the_stage_ends_what_its_processes_started_and_let_go_of(shm_dir: Path) -> None:
    orphaning = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
        "print(child.pid, flush=True)"
    )
    with Stage(shm_dir, dict(os.environ)) as stage:
        launcher = stage._start([sys.executable, "-c", orphaning], "log", stage._environment)
        launcher.wait()
        orphan = psutil.Process(int((stage.top / "log").read_text()))
        assert orphan.environ()[MARK] == str(stage.top)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert list(shm_dir.iterdir()) == []


def test_a_process_that_ends_early_is_reported_with_its_last_words(shm_dir: Path) -> None:
    with Stage(shm_dir, dict(os.environ)) as stage:
        process = stage._start([sys.executable, "-c", "print('no more tape'); exit(3)"], "log", stage._environment)
        with pytest.raises(DrillFailed, match=r"waiting for rain.*status 3(?s:.*)no more tape"):
            stage.wait(lambda: None, [process], 60.0, "rain")


def test_one_of_several_processes_that_fails_ends_the_waiting_and_is_the_one_that_is_quoted(shm_dir: Path) -> None:
    with Stage(shm_dir, dict(os.environ)) as stage:
        lasting = stage._start([sys.executable, "-c", "import time; time.sleep(600)"], "lasting", stage._environment)
        well = stage._start([sys.executable, "-c", "print('all is well')"], "well", stage._environment)
        failing = stage._start([sys.executable, "-c", "print('no more tape'); exit(3)"], "log", stage._environment)
        with pytest.raises(DrillFailed, match=r"waiting for rain.*status 3(?s:.*)no more tape"):
            stage.wait(lambda: None, [lasting, well, failing], 60.0, "rain")


def test_processes_that_ended_well_do_not_end_the_waiting_for_the_others(shm_dir: Path) -> None:
    with Stage(shm_dir, dict(os.environ)) as stage:
        first = stage._start([sys.executable, "-c", ""], "first", stage._environment)
        first.wait()
        last = stage._start([sys.executable, "-c", "input()"], "last", stage._environment)

        def look() -> str | None:
            return "rain" if last.poll() is not None else None

        assert stage.wait(look, [first, last], 60.0, "rain") == "rain"


def sleeper(stage: Stage, folder: Path, name: str) -> Process:
    """A process that belongs to a node, in whose memory there is a file."""
    (folder / "memory").mkdir(parents=True, exist_ok=True)
    (folder / "memory" / "one.arena").write_bytes(b"bytes")
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    return stage._start(sleep, name, stage._environment | {MARK: str(folder)})


def test_a_node_that_is_destroyed_takes_its_processes_and_memory_along_and_no_other_nodes(shm_dir: Path) -> None:
    with Stage(shm_dir, dict(os.environ)) as stage:
        nodes = []
        trainers = []
        for name in ("node-1", "node-2", "node-10"):
            folder = stage.top / name
            nodes.append(Node(name, folder, sleeper(stage, folder, f"{name}-daemon")))
            trainers.append(sleeper(stage, folder, f"{name}-trainer"))
        stage.destroy(nodes[:1])
        assert [node.daemon.poll() for node in nodes] == [-signal.SIGKILL, None, None]
        assert [trainer.poll() for trainer in trainers] == [-signal.SIGKILL, None, None]
        assert [node.folder.exists() for node in nodes] == [False, True, True]
        stage.end_training(nodes[1:2])
        assert [node.daemon.poll() for node in nodes] == [-signal.SIGKILL, None, None]
        assert [trainer.poll() for trainer in trainers] == [-signal.SIGKILL, -signal.SIGKILL, None]
        assert nodes[1].memory.exists()
    assert list(shm_dir.iterdir()) == []


def test_a_folder_of_another_drill_is_left_alone(shm_dir: Path) -> None:
    stage = Stage(shm_dir, dict(os.environ))
    stage.top.mkdir()
    (stage.top / "something").write_bytes(b"")
    with pytest.raises(DrillFailed, match="--shm-root"), stage:
        pass
    assert (stage.top / "something").exists()


def test_settings_of_the_user_do_not_reach_the_drill(shm_dir: Path) -> None:
    stage = Stage(shm_dir, {"PATH": "/bin", "SNAPSHOTD_CRASH": "commit.marked", "SNAPSHOTD_SOCKET": "/run/other"})
    assert [name for name in stage._environment if name.startswith("SNAPSHOTD_")] == [MARK]


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nodes": 0}, "--nodes is 0; it must lie between 1"),
        ({"nodes": 17}, "--nodes is 17"),
        ({"ranks_per_node": 0}, "--ranks-per-node is 0"),
        ({"parity": 255}, "--parity is 255"),
        ({"group_size": 0}, "--group-size is 0"),
        ({"lose": 4}, "--lose is 4, of 4 nodes; .* between 0 and 3"),
        ({"nodes": 1, "lose": 1}, "--lose is 1, of 1 node; .* between 0 and 0"),
        ({"lose": -1}, "--lose is -1"),
        ({"steps": 11}, "--steps is 11; at least 12"),
        ({"nodes": 1, "lose": 0, "steps": 3}, "--steps is 3; at least 10"),
        ({"parallel": "tensor"}, "--parallel is 'tensor'"),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_range(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DrillOptions(**changes).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("", DrillOptions(4, 1, 2, 8, 2, "fsdp", 24)),
        ("--nodes 1", DrillOptions(1, 2, 2, 8, 0, "fsdp", 40)),
        ("--nodes 2", DrillOptions(2, 1, 2, 8, 1, "fsdp", 24)),
        ("--nodes 1 --ranks-per-node 3 --steps 15", DrillOptions(1, 3, 2, 8, 0, "fsdp", 15)),
        ("--nodes 5 --group-size 3 --parity 1 --lose 1", DrillOptions(5, 1, 1, 3, 1, "fsdp", 24)),
        ("--lose 3 --ranks-per-node 2 --parallel ddp", DrillOptions(4, 2, 2, 8, 3, "ddp", 24)),
    ],
)
def test_what_is_not_given_suits_the_number_of_nodes(line: str, options: DrillOptions) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = DrillOptions.of(parser.parse_args(line.split()))
    assert given == options and given.check() == options


def test_wrong_options_are_an_exit_code_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_drill(DrillOptions(nodes=3, lose=3)) == 2
    assert "--lose is 3" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_drill(DrillOptions(shm_root=tmp_path / "nowhere", json=True)) == 1
    shown = capsys.readouterr()
    assert "--shm-root" in shown.err
    assert json.loads(shown.out)["bit_identical"] is False
