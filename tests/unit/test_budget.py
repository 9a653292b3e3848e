"""How much memory may be taken: every limit that could stop an allocation is read, and the tightest one is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotd import budget
from snapshotd.budget import MARGIN_BYTES, Room, Sources
from snapshotd.errors import NoRoom

GIB = 1 << 30
Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def one(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return one


@pytest.fixture
def sources(tmp_path: Path, write: Write) -> Sources:
    """A machine with plenty of memory and no cgroups, until a test writes some."""
    write("meminfo", f"MemTotal: 1 kB\nMemAvailable: {1024 * GIB // 1024} kB\n")
    write("cgroup", "")
    write("mountinfo", "")
    return Sources(tmp_path / "cgroup", tmp_path / "mountinfo", tmp_path / "meminfo")


def tightest(sources: Sources, *, used: int = 0, limit: int = 0, promised: int = 0) -> Room:
    return budget.rooms(
        sources.meminfo.parent, used_bytes=used, limit_bytes=limit, promised_bytes=promised, sources=sources
    )[0]


def use_v2(write: Write, tmp_path: Path, path: str = "/job/step") -> None:
    write("cgroup", f"0::{path}\n")
    write("mountinfo", f"31 23 0:28 / {tmp_path}/v2 rw shared:9 - cgroup2 cgroup2 rw\n")


def use_v1(write: Write, tmp_path: Path, path: str = "/job/step", root: str = "/") -> None:
    write("cgroup", f"5:cpu:/elsewhere\n4:memory:{path}\n0::/\n")
    write("mountinfo", f"32 31 0:32 {root} {tmp_path}/v1 rw - cgroup cgroup rw,memory\n")


def group(write: Write, path: str, limit: str, used: int, cache: int = 0) -> None:
    version = path.split("/")[0]
    names = ("memory.max", "memory.current") if version == "v2" else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write(f"{path}/{names[0]}", f"{limit}\n")
    write(f"{path}/{names[1]}", f"{used}\n")
    prefix = "" if version == "v2" else "total_"
    write(f"{path}/memory.stat", f"anon 1\n{prefix}inactive_file {cache}\n{prefix}active_file 0\nshmem 77\n")


def test_an_ancestors_limit_counts_in_cgroup_v2(sources: Sources, write: Write, tmp_path: Path) -> None:
    use_v2(write, tmp_path)
    group(write, "v2/job/step", "max", 0)
    group(write, "v2/job", str(4 * GIB), 3 * GIB)
    room = tightest(sources)
    assert room.available_bytes == GIB - MARGIN_BYTES
    assert str(tmp_path / "v2/job") in room.name
    assert "memory.max" in room.setting


def test_an_ancestors_limit_counts_in_cgroup_v1(sources: Sources, write: Write, tmp_path: Path) -> None:
    use_v1(write, tmp_path)
    group(write, "v1/job/step", "9223372036854771712", 0)
    group(write, "v1/job", str(4 * GIB), 3 * GIB)
    room = tightest(sources)
    assert room.available_bytes == GIB - MARGIN_BYTES
    assert "memory.limit_in_bytes" in room.setting


def test_the_tightest_of_several_limits_is_named(sources: Sources, write: Write, tmp_path: Path) -> None:
    use_v2(write, tmp_path)
    group(write, "v2/job/step", str(8 * GIB), 0)
    group(write, "v2/job", str(4 * GIB), GIB)
    group(write, "v2", str(64 * GIB), 62 * GIB)
    assert tightest(sources).available_bytes == 2 * GIB - MARGIN_BYTES


def test_page_cache_counts_as_free_and_shared_memory_does_not(sources: Sources, write: Write, tmp_path: Path) -> None:
    use_v2(write, tmp_path, "/job")
    group(write, "v2/job", str(4 * GIB), 4 * GIB, cache=GIB)
    assert tightest(sources).available_bytes == GIB - MARGIN_BYTES


def test_a_container_that_does_not_see_its_own_path_uses_the_top(
    sources: Sources, write: Write, tmp_path: Path
) -> None:
    use_v1(write, tmp_path, path="/docker/0123", root="/docker/0123")
    group(write, "v1", str(GIB), 0)
    assert tightest(sources).available_bytes == GIB - MARGIN_BYTES
    use_v1(write, tmp_path, path="/../../outside")
    assert tightest(sources).available_bytes == GIB - MARGIN_BYTES


def test_a_mount_point_with_a_space_is_found(sources: Sources, write: Write, tmp_path: Path) -> None:
    write("cgroup", "0::/\n")
    write("mountinfo", f"31 23 0:28 / {tmp_path}/v2\\040odd rw - cgroup2 cgroup2 rw\n")
    write("v2 odd/memory.max", str(GIB))
    write("v2 odd/memory.current", "0")
    assert tightest(sources).available_bytes == GIB - MARGIN_BYTES


def test_unreadable_numbers_are_no_limit(sources: Sources, write: Write, tmp_path: Path) -> None:
    use_v2(write, tmp_path, "/job")
    write("v2/job/memory.max", "nonsense")
    assert "cgroup" not in tightest(sources).name


def test_the_machines_free_memory_counts(sources: Sources, write: Write) -> None:
    write("meminfo", f"MemAvailable: {GIB // 1024} kB\n")
    assert tightest(sources) == Room("this machine", GIB - MARGIN_BYTES, "the memory of the machine")


def test_our_own_limit_counts_what_arenas_take(sources: Sources) -> None:
    room = tightest(sources, used=3 << 20, limit=4 << 20)
    assert room.available_bytes == 1 << 20
    assert "--memory-limit" in room.setting


def test_what_is_being_reserved_is_spoken_for(sources: Sources) -> None:
    assert tightest(sources, limit=8 << 20, promised=6 << 20).available_bytes == 2 << 20
    assert tightest(sources, limit=8 << 20, promised=60 << 20).available_bytes == 0


def test_this_machines_own_limits_can_be_read() -> None:
    names = [room.name for room in budget.rooms(Path("/dev/shm"), used_bytes=0, limit_bytes=0)]
    assert "the file system of /dev/shm" in names
    assert "this machine" in names


def test_too_little_is_refused_with_the_numbers_and_the_setting() -> None:
    rooms = [Room("the cgroup /x", 5 * GIB, "memory.max of that cgroup"), Room("this machine", 9 * GIB, "")]
    budget.check(5 * GIB, rooms)
    with pytest.raises(NoRoom) as refused:
        budget.check(5 * GIB + 1, rooms)
    assert str(refused.value) == (
        "5.0 GiB of memory are needed and the cgroup /x leaves 5.0 GiB, so nothing was allocated and this rank is not "
        "protected; raise memory.max of that cgroup, or free what older runs left with `snapshotd gc`"
    )
    assert refused.value.needed_bytes == 5 * GIB + 1
    assert refused.value.available_bytes == 5 * GIB
    assert refused.value.setting == "memory.max of that cgroup"


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_amounts_read_well(amount: int, text: str) -> None:
    assert budget.shown(amount) == text
