"""The drill's parts without a daemon: what it judges, where it aims and what its stage leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from snapshotd import _native, aim
from snapshotd.aim import Strike
from snapshotd.drill import DrillOptions, run_drill
from snapshotd.errors import ConfigError
from snapshotd.stage import MARK, DrillFailed, Life, Stage, read_lives
from snapshotd.verdict import Report, judge

SLOT_BYTES = 4 << 20
BLOCK_BYTES = 64 << 10


def life(rank: int, first: int, last: int, *, started_s: float = 0.0, digest: str | None = None) -> Life:
    """A rank that trained the steps `first` up to, not including, `last`."""
    losses = {step: f"loss {rank} {step}" for step in range(first, last)}
    restore = {"attach_s": 0.5, "verify_s": 0.25, "copy_s": 0.125}
    return Life(rank, 100 + rank, started_s, started_s + 2.0, started_s + 4.0, first, restore, losses, digest, 10)


def played(**changes: object) -> Report:
    """The report on two ranks and ten steps, killed with step 4 committed, unless `changes` say otherwise."""
    facts: dict[str, object] = {
        "strikes": [Strike(1, 101, 50.0, 5, 4, True)],
        "resumed": [[life(rank, 4, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]],
        "before": [life(rank, 0, 5) for rank in (0, 1)],
        "undisturbed": [life(rank, 0, 10, digest=f"end {rank}") for rank in (0, 1)],
    }
    facts |= changes
    interrupted = [*facts["before"], *facts["resumed"][-1]] if facts["resumed"] else facts["before"]  # type: ignore
    return judge("ddp", 10, facts["strikes"], facts["resumed"], interrupted, facts["undisturbed"])  # type: ignore


def test_a_run_that_came_back_whole_is_bit_identical() -> None:
    report = played()
    assert report.bit_identical
    assert (report.committed_before_kill, report.resumed_after_kill_step) == (4, 4)
    assert (report.losses_compared, report.losses_different, report.steps_computed_twice) == (22, 0, 2)
    assert report.digest_interrupted == report.digest_undisturbed != ""


def test_the_seconds_to_resume_add_up_to_their_total() -> None:
    split = dict(played().seconds_to_resume_kill)
    assert split.pop("total") == pytest.approx(5.0)
    assert sum(split.values()) == pytest.approx(5.0)
    assert (split["process_start"], split["imports"], split["attach"]) == (1.0, 2.0, 0.5)


def test_resuming_before_the_last_commit_is_not_bit_identical_whatever_the_bits_say() -> None:
    resumed = [[life(rank, 3, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]]
    assert not played(resumed=resumed).bit_identical


def test_resuming_from_nothing_is_not_bit_identical_whatever_the_bits_say() -> None:
    resumed = [[life(rank, 0, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]]
    strikes = [Strike(1, 101, 50.0, 1, 0, True)]
    assert not played(resumed=resumed, strikes=strikes).bit_identical


def test_ranks_that_resume_at_different_steps_are_not_bit_identical() -> None:
    resumed = [[life(rank, 4 + rank, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]]
    assert not played(resumed=resumed).bit_identical


@pytest.mark.parametrize("step", [0, 4, 9])
def test_one_loss_that_differs_is_found_also_in_a_step_that_was_computed_twice(step: int) -> None:
    before = [life(0, 0, 5), life(1, 0, 5)]
    resumed = [[life(rank, 4, 10, started_s=51.0, digest=f"end {rank}") for rank in (0, 1)]]
    wrong = before[1] if step < 5 else resumed[0][1]
    wrong.losses[step] = "another"
    report = played(before=before, resumed=resumed)
    assert report.losses_different == 1 and not report.bit_identical


def test_a_step_that_nobody_computed_is_noticed() -> None:
    before = [life(0, 0, 5), life(1, 0, 5)]
    del before[0].losses[2]
    assert not played(before=before).bit_identical


@pytest.mark.parametrize("digest", ["something else", None])
def test_another_final_state_is_not_bit_identical(digest: str | None) -> None:
    resumed = [[life(0, 4, 10, digest="end 0"), life(1, 4, 10, digest=digest)]]
    assert not played(resumed=resumed).bit_identical


def test_nobody_killed_is_not_bit_identical() -> None:
    before = [life(rank, 0, 10, digest=f"end {rank}") for rank in (0, 1)]
    assert not played(strikes=[], resumed=[], before=before).bit_identical


def test_a_journal_whose_last_line_was_torn_is_read_up_to_there(tmp_path: Path) -> None:
    lines = [
        {"event": "start", "at_s": 3.0, "rank": 1, "pid": 7, "started_s": 1.0, "imported_s": 2.0},
        {"event": "restored", "at_s": 4.0, "step": 3, "restore": {"copy_s": 0.5}},
        {"event": "step", "at_s": 5.0, "step": 3, "loss": "0x1p+0", "seconds": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "step", "st'
    (tmp_path / "rank1-7.jsonl").write_text(text)
    assert read_lives(tmp_path) == [Life(1, 7, 1.0, 2.0, 4.0, 3, {"copy_s": 0.5}, {3: "0x1p+0"})]


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
    with aim.owned_arenas(shm_dir, {0: 4321}) as arenas:
        assert list(arenas) == [0] and aim.committed_step(arenas) == 8
    with aim.owned_arenas(shm_dir, {0: 1234}) as arenas:
        assert arenas == {} and aim.committed_step(arenas) == 0


def test_a_trainer_is_killed_while_its_copy_runs_and_not_before(
    arena: _native.Arena, shm_dir: Path, victim: subprocess.Popen[bytes]
) -> None:
    own(arena, victim.pid)
    struck: list[Strike | None] = []

    def drill() -> None:
        with aim.owned_arenas(shm_dir, {0: victim.pid}) as arenas:
            struck.append(aim.strike(arenas, 0, victim.pid, timeout_s=60.0))

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
    with aim.owned_arenas(shm_dir, {0: victim.pid}) as arenas:
        assert aim.strike(arenas, 0, victim.pid, timeout_s=0.2) is None
    assert victim.poll() is None


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
            stage.wait(lambda: None, process, 60.0, "rain")


def test_settings_of_the_user_do_not_reach_the_drill(shm_dir: Path) -> None:
    stage = Stage(shm_dir, {"PATH": "/bin", "SNAPSHOTD_CRASH": "commit.marked", "SNAPSHOTD_SOCKET": "/run/other"})
    assert [name for name in stage._environment if name.startswith("SNAPSHOTD_")] == [MARK]


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nodes": 2}, "--nodes is 2.*one node"),
        ({"ranks_per_node": 0}, "--ranks-per-node is 0"),
        ({"steps": 3}, "--steps is 3; at least"),
        ({"parallel": "tensor"}, "--parallel is 'tensor'"),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_range(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DrillOptions(**changes).check()  # type: ignore[arg-type]


def test_wrong_options_are_an_exit_code_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_drill(DrillOptions(nodes=3)) == 2
    assert "one node" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_drill(DrillOptions(shm_root=tmp_path / "nowhere", json=True)) == 1
    shown = capsys.readouterr()
    assert "--shm-root" in shown.err
    assert json.loads(shown.out)["bit_identical"] is False
