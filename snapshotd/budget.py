"""How much memory may still be taken: asked before anything is allocated.

A tmpfs that is full answers ENOSPC, but a cgroup that is full answers with SIGKILL, and so does the machine. So every
limit that could stop an allocation is read first: our own `memory_limit`, the tmpfs, every cgroup from ours up to the
root (v1 and v2), and the machine's available memory. Page cache that the kernel would give back counts as free.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from snapshotd.errors import NoRoom

MARGIN_BYTES = 32 << 20
"""Left free below a limit that kills: the kernel charges in batches and others allocate too."""
_NO_LIMIT_BYTES = 1 << 60  # v1 says "no limit" with the largest multiple of a page


@dataclass(frozen=True)
class Room:
    """What one limit leaves. `setting` says in words what a person changes to have more."""

    name: str
    available_bytes: int
    setting: str


@dataclass(frozen=True)
class Sources:
    """Where the kernel tells its limits; tests hand in trees of their own."""

    cgroup: Path = Path("/proc/self/cgroup")
    mountinfo: Path = Path("/proc/self/mountinfo")
    meminfo: Path = Path("/proc/meminfo")


def rooms(
    directory: Path, *, used_bytes: int, limit_bytes: int, promised_bytes: int = 0, sources: Sources | None = None
) -> list[Room]:
    """Every limit that applies to files in `directory`, the tightest first.

    `used_bytes` is what our arenas take, `limit_bytes` our own limit (0: none), `promised_bytes` what reservations
    that are under way will still take.
    """
    sources = sources or Sources()
    found = [_tmpfs(directory), *_cgroups(sources), *_machine(sources.meminfo)]
    if limit_bytes:
        own = f"memory_limit of this daemon ({shown(limit_bytes)})"
        found.append(Room(own, limit_bytes - used_bytes, "--memory-limit of `snapshotd serve`"))
    left = [Room(one.name, max(0, one.available_bytes - promised_bytes), one.setting) for one in found]
    return sorted(left, key=lambda room: room.available_bytes)


def check(needed_bytes: int, tightest_first: list[Room]) -> None:
    """NoRoom, with a sentence that names the limit and the setting, if the tightest limit does not suffice."""
    tightest = tightest_first[0]
    if needed_bytes > tightest.available_bytes:
        raise NoRoom(
            f"{shown(needed_bytes)} of memory are needed and {tightest.name} leaves {shown(tightest.available_bytes)}, "
            f"so nothing was allocated and this rank is not protected; raise {tightest.setting}, "
            f"or free what older runs left with `snapshotd gc`",
            needed_bytes=needed_bytes,
            available_bytes=tightest.available_bytes,
            setting=tightest.setting,
        )


def shown(amount_bytes: int) -> str:
    """An amount of memory as people read it."""
    amount = float(amount_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _tmpfs(directory: Path) -> Room:
    statistics = os.statvfs(directory)
    return Room(
        f"the file system of {directory}",
        statistics.f_bavail * statistics.f_frsize,
        f"its size (`mount -o remount,size=… {_mount_point(directory)}`)",
    )


def _mount_point(directory: Path) -> Path:
    return next((path for path in (directory, *directory.parents) if path.is_mount()), directory)


def _machine(meminfo: Path) -> Iterator[Room]:
    with contextlib.suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if match:
            yield Room("this machine", int(match[1]) * 1024 - MARGIN_BYTES, "the memory of the machine")


def _cgroups(sources: Sources) -> Iterator[Room]:
    """The room in our memory cgroup and each of its ancestors, of whichever version is mounted."""
    with contextlib.suppress(OSError):
        for line in sources.cgroup.read_text().splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if "memory" in controllers.split(","):
                yield from _ancestors(_mounts(sources.mountinfo, "cgroup", "memory"), path, _FilesV1)
            elif number == "0" and not controllers:
                yield from _ancestors(_mounts(sources.mountinfo, "cgroup2", ""), path, _FilesV2)


def _mounts(mountinfo: Path, kind: str, option: str) -> list[tuple[str, Path]]:
    """(root within the hierarchy, mount point) of each mount of this kind of file system."""
    found = []
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields, (file_system, _, *options) = before.split(), after.split()
        if file_system == kind and (not option or option in " ".join(options).split(",")):
            found.append((_unescaped(fields[3]), Path(_unescaped(fields[4]))))
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _ancestors(mounts: list[tuple[str, Path]], path: str, room: type[_Files]) -> Iterator[Room]:
    for root, mount_point in mounts:
        inside = path[len(root.rstrip("/")) :] if (path + "/").startswith(root.rstrip("/") + "/") else path
        group = mount_point / inside.strip("/")
        if ".." in group.parts or not group.is_dir():
            group = mount_point  # a container that does not see its own path sees its limit at the top
        for directory in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                found = room(directory).room()
                if found is not None:
                    yield found
            if directory == mount_point:
                break


class _Files:
    """The files of one cgroup; the subclasses know their names."""

    limit = usage = ""
    cache: tuple[str, ...] = ()

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def room(self) -> Room | None:
        text = (self.directory / self.limit).read_text().strip()
        if text == "max" or int(text) >= _NO_LIMIT_BYTES:
            return None
        used = int((self.directory / self.usage).read_text()) - self._reclaimable()
        return Room(
            f"the cgroup {self.directory} (limit {shown(int(text))})",
            int(text) - used - MARGIN_BYTES,
            f"{self.limit} of that cgroup (in a container or a Slurm job: its memory request)",
        )

    def _reclaimable(self) -> int:
        """Page cache: the kernel frees it rather than kill. Shared memory is not among it."""
        with contextlib.suppress(OSError, ValueError):
            rows = (line.split() for line in (self.directory / "memory.stat").read_text().splitlines())
            return sum(int(row[1]) for row in rows if row[0] in self.cache)
        return 0


class _FilesV1(_Files):
    limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
    cache = ("total_inactive_file", "total_active_file")


class _FilesV2(_Files):
    limit, usage = "memory.max", "memory.current"
    cache = ("inactive_file", "active_file")
