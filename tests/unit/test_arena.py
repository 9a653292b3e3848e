"""The daemon's directory and its files: what it makes, finds again, refuses and never touches."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from snapshotd import _native, arena
from snapshotd import root as root_module
from snapshotd.arena import ArenaFile, slug
from snapshotd.clock import Clock
from snapshotd.errors import ConfigError, SnapshotError
from snapshotd.peers import SERIALS, first_serial
from snapshotd.root import KEYS, KNOWN, LastDaemon, Root

BLOCK = SLOT = 4096
OWNER: dict[str, Any] = {
    "generation": 3,
    "nonce": b"n" * 16,
    "rank": 1,
    "world_size": 2,
    "local_world": 2,
    "every": 1,
    "pid": 42,
}


@pytest.fixture
def root(shm_dir: Path) -> Iterator[Root]:
    one = Root.open(shm_dir / "root")
    yield one
    one.close()


def create(root: Root, job: str = "llama") -> ArenaFile:
    total = _native.Arena.bytes_needed(arena.SLOTS, SLOT, BLOCK)
    draft = root.draft(job, 1, total)
    _native.reserve(draft.fd, total)
    return root.finish(draft, job=job, local_index=1, slot_bytes=SLOT, block_bytes=BLOCK, owner=OWNER)


def left_over(root: Root) -> Path:
    """An arena file that some daemon left."""
    one = create(root)
    one.close()
    return root.path / one.name


def test_an_arena_is_found_again_with_its_owner(root: Root) -> None:
    made = create(root)
    made.amend(fenced=True, restored_generation=2, restored_nonce=b"r" * 16, restored_step=9)
    made.close()
    (found,), damaged = root.scan()
    try:
        assert damaged == []
        assert (found.arena_id, found.job, found.generation, found.total_bytes) == (
            made.arena_id,
            "llama",
            made.generation,
            made.total_bytes,
        )
        assert found.owner.fenced
        assert found.restored is not None
        assert found.restored.step == 9
    finally:
        found.close()


def test_files_are_private_and_named_after_job_index_and_arena(root: Root) -> None:
    path = left_over(root)
    assert path.name.startswith(slug("llama") + ".1.")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.with_suffix(".lock").stat().st_mode & 0o777 == 0o600
    assert root.path.stat().st_mode & 0o777 == 0o700


def test_an_arena_is_fully_reserved(root: Root) -> None:
    path = left_over(root)
    assert path.stat().st_blocks * 512 >= path.stat().st_size == _native.Arena.bytes_needed(2, SLOT, BLOCK)


def test_freeing_removes_both_files(root: Root) -> None:
    one = create(root)
    one.free()
    assert {path.name for path in root.path.iterdir()} == {"daemon.lock", "node.id"}


def test_jobs_whose_names_read_alike_have_different_files() -> None:
    assert slug("a/b") != slug("a_b")
    assert "/" not in slug("../../etc/passwd")
    assert len(slug("x" * 200)) < 100


def test_the_node_keeps_its_identity_as_long_as_its_memory(shm_dir: Path) -> None:
    nodes = []
    for name in ("a", "a", "b"):
        root = Root.open(shm_dir / name)
        nodes.append(root.node)
        root.close()
    assert nodes[0] == nodes[1] != nodes[2]


def test_a_damaged_node_id_is_drawn_anew(shm_dir: Path) -> None:
    root = Root.open(shm_dir / "a")
    root.close()
    (shm_dir / "a" / "node.id").write_bytes(b"short")
    root = Root.open(shm_dir / "a")
    assert len(root.node) == 16
    root.close()


# --- leftovers of an interrupted creation ----------------------------------------------------------


def test_a_draft_whose_maker_is_gone_is_removed(root: Root) -> None:
    draft = root.draft("llama", 0, 1 << 20)
    _native.reserve(draft.fd, 1 << 20)
    os.close(draft.fd)
    os.close(draft.lock_fd)
    assert root.scan() == ([], [])
    assert {path.name for path in root.path.iterdir()} == {"daemon.lock", "node.id"}


def test_an_arena_without_an_owner_is_removed(root: Root) -> None:
    total = _native.Arena.bytes_needed(arena.SLOTS, SLOT, BLOCK)
    draft = root.draft("llama", 0, total)
    _native.reserve(draft.fd, total)
    _native.Arena.format(
        draft.fd, arena_id=draft.arena_id, job="llama", local_index=0, slots=2, slot_bytes=SLOT, block_bytes=BLOCK
    )
    os.close(draft.fd)
    os.close(draft.lock_fd)
    assert root.scan() == ([], [])
    assert not list(root.path.glob("*.arena"))


def test_a_lock_file_without_an_arena_is_removed(root: Root) -> None:
    left_over(root).unlink()
    assert root.scan() == ([], [])
    assert not list(root.path.glob("*-*.lock"))


# --- what is never touched -------------------------------------------------------------------------


def assert_untouched_and_reported(root: Root, path: Path, why: str) -> None:
    before = path.read_bytes()
    files, damaged = root.scan()
    assert files == []
    (one,) = damaged
    assert why in one.sentence
    assert str(path) in one.sentence
    assert one.job == slug("llama")
    assert path.read_bytes() == before


def test_a_truncated_arena_is_reported_and_left_alone(root: Root) -> None:
    path = left_over(root)
    os.truncate(path, path.stat().st_size - 4096)
    assert_untouched_and_reported(root, path, "cannot be used")


def test_an_arena_of_an_older_version_is_reported_and_left_alone(root: Root) -> None:
    path = left_over(root)
    with path.open("r+b") as file:
        file.seek(8)
        file.write((_native.ARENA_VERSION + 1).to_bytes(4, "little"))
    assert_untouched_and_reported(root, path, "version")


def test_a_foreign_file_is_reported_and_left_alone(root: Root) -> None:
    path = left_over(root)
    path.write_bytes(b"\x7fELF" + random.Random(7).randbytes(20000))
    assert_untouched_and_reported(root, path, "cannot be used")


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_the_fixed_header_is_reported_and_left_alone(root: Root, seed: int) -> None:
    path = left_over(root)
    place = random.Random(seed).randrange(512 * 8)
    with path.open("r+b") as file:
        file.seek(place // 8)
        (byte,) = file.read(1)
        file.seek(place // 8)
        file.write(bytes([byte ^ (1 << place % 8)]))
    assert_untouched_and_reported(root, path, "cannot be used")


def test_an_arena_without_its_lock_file_is_reported(root: Root) -> None:
    path = left_over(root)
    path.with_suffix(".lock").unlink()
    assert_untouched_and_reported(root, path, "its lock file is missing")


def test_an_arena_that_others_may_read_is_reported(root: Root) -> None:
    path = left_over(root)
    path.chmod(0o644)
    assert_untouched_and_reported(root, path, "permissions 644 let others in")


def test_a_copied_arena_is_reported(root: Root) -> None:
    path = left_over(root)
    fresh = path.with_name(path.name.replace(path.name.split(".")[2], "0" * 32))
    path.rename(fresh)
    path.with_suffix(".lock").rename(fresh.with_suffix(".lock"))
    assert_untouched_and_reported(root, fresh, "copied or renamed")


def test_a_symlink_is_not_followed(root: Root, shm_dir: Path) -> None:
    path = left_over(root)
    path.rename(shm_dir / "elsewhere")
    path.symlink_to(shm_dir / "elsewhere")
    files, (damaged,) = root.scan()
    assert files == []
    assert "cannot be used" in damaged.sentence
    assert path.is_symlink()


def test_somebody_elses_arena_is_reported(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    path = left_over(root)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert_untouched_and_reported(root, path, "belongs to user")


def test_a_file_that_is_none_of_ours_is_left_alone(root: Root) -> None:
    stranger = root.path / "notes.txt"
    stranger.write_text("mine")
    files, (damaged,) = root.scan()
    assert files == []
    assert damaged.job == ""
    assert stranger.read_text() == "mine"


# --- the directory ---------------------------------------------------------------------------------


def test_a_second_daemon_on_one_root_is_refused_by_pid(root: Root) -> None:
    with pytest.raises(SnapshotError, match=f"the daemon with pid {os.getpid()} has"):
        Root.open(root.path)


def test_a_root_that_others_may_enter_is_refused(shm_dir: Path) -> None:
    (shm_dir / "open").mkdir()
    (shm_dir / "open").chmod(0o755)
    with pytest.raises(ConfigError, match="permissions 755 let others in"):
        Root.open(shm_dir / "open")


def test_a_root_that_is_a_symlink_is_refused(shm_dir: Path) -> None:
    (shm_dir / "real").mkdir(mode=0o700)
    (shm_dir / "link").symlink_to(shm_dir / "real")
    with pytest.raises(ConfigError, match="no directory of its own"):
        Root.open(shm_dir / "link")


def test_a_root_that_is_a_file_is_refused(shm_dir: Path) -> None:
    (shm_dir / "file").write_text("")
    with pytest.raises(ConfigError, match="no directory of its own"):
        Root.open(shm_dir / "file")


def test_a_root_of_another_user_is_refused(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shm_dir / "theirs").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(ConfigError, match=r"belongs to user \d+ and not to us"):
        Root.open(shm_dir / "theirs")


def test_a_root_without_a_parent_is_refused(shm_dir: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Root.open(shm_dir / "missing" / "root")


def test_the_shared_parent_is_made_like_tmp(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_module, "SHARED_PARENT", shm_dir / "shared")
    root = Root.open(shm_dir / "shared" / "0")
    root.close()
    assert (shm_dir / "shared").stat().st_mode & 0o7777 == 0o1777


def test_a_shared_parent_without_the_sticky_bit_is_refused(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_module, "SHARED_PARENT", shm_dir / "shared")
    (shm_dir / "shared").mkdir()
    (shm_dir / "shared").chmod(0o777)
    with pytest.raises(ConfigError, match="cannot hold arenas"):
        Root.open(shm_dir / "shared" / "0")


def test_what_a_daemon_wrote_down_is_there_for_the_next_one_whatever_was_there_before(shm_dir: Path) -> None:
    root = Root.open(shm_dir / "root")
    try:
        assert root.last_daemon() == LastDaemon(0, 0, 0)
        for me in (LastDaemon(29650, 29651, 1 << 61), LastDaemon(1, 65535, 7)):
            root.write_down(me)
            assert root.last_daemon() == me
        for rubbish in (b"1", b"1 2 x", b"70000 1 1", b"1 -2 3", b"1 2 -3", b"x y z", b"\xff" * 64, b"9" * 64):
            (shm_dir / "root" / "daemon.last").write_bytes(rubbish)
            assert root.last_daemon() == LastDaemon(0, 0, 0)
        assert not root.scan()[1], "it is no damaged arena"
    finally:
        root.close()


@pytest.mark.parametrize("name", [KEYS, KNOWN])
def test_what_a_daemon_remembers_and_half_of_what_it_was_writing_are_no_damaged_arenas(root: Root, name: str) -> None:
    root.remember(name, b"a secret")
    (root.path / f"{name}.new").write_bytes(b"half a sec")
    assert root.recall(name) == b"a secret"
    assert root.scan() == ([], [])


@pytest.mark.parametrize("wall_s", [0.0, 1.7e9, 4e9])
def test_a_daemon_counts_what_it_says_from_above_all_that_the_last_one_said_whatever_the_clock_says(
    wall_s: float,
) -> None:
    clock = cast(Clock, SimpleNamespace(wall_s=lambda: wall_s))
    before = 1_800_000_000_000 << 20
    assert first_serial(clock, LastDaemon(serial=before)) >= before + SERIALS
    assert first_serial(clock, LastDaemon()) >= int(wall_s * 1000) << 20
