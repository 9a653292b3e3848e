"""The simulator and the module it runs: built once, loaded once, reset for each test.

`snapshotd._cuda` is built here from the very sources of the release, by the same script, with one difference: it is
linked to the shared CUDA runtime, for which `sim/` stands in. Code and PTX in it are the release's.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import mmap
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.cuda.twin import Bytes

ROOT = Path(__file__).resolve().parents[2]
SIM = Path(__file__).resolve().parent / "sim"
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda-tests"
ARCHS = (80, 90, 120)  # whose PTX is run
EAGER, LAZY = -2, -1  # schedules; others are seeds


def load(path: Path, name: str) -> ModuleType:
    """A module from a file, Python or not."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path)) if path.suffix == ".so" else None
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache
def builder() -> ModuleType:
    return load(CUDA / "build.py", "snapshotd_cuda_build")


def nvcc() -> str | None:
    found: str | None = builder().find_nvcc()
    return found


def runtime_headers() -> Path:
    """Where nvcc keeps cuda_runtime_api.h."""
    done = subprocess.run([str(nvcc()), "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    tops = [line.split("=", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]) / "include"


@lru_cache
def build_simulator() -> Path:
    """The library that stands in for the CUDA runtime."""
    parts = [*sorted(SIM.glob("*.cpp")), *sorted(SIM.glob("*.hpp")), SIM / "exports.map"]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]
    out = BUILD / f"sim-{digest}" / "libcudart.so.13"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{runtime_headers()}",
             *(str(part) for part in parts if part.suffix == ".cpp"), "-o", str(partial),
             "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={SIM / 'exports.map'}", "-ldl"],
            check=True,
        )  # fmt: skip
        partial.rename(out)
    return out


@lru_cache
def build_module() -> Path:
    """snapshotd._cuda with the PTX of all ARCHS, linked to the shared runtime; SNAPSHOTD_TEST_NVRTC=1: without nvcc."""
    if os.environ.get("SNAPSHOTD_TEST_NVRTC") == "1":
        out = BUILD / "nvrtc" / "_cuda.so"
        builder().build_for_nvrtc(out, ROOT / "build" / "cuda")
        return out
    out = BUILD / "module" / "_cuda.so"
    builder().build(out, (), [str(arch) for arch in ARCHS], "shared", ROOT / "build" / "cuda")
    return out


class Simulator:
    """The fake device in this process."""

    def __init__(self, module: Path | None = None) -> None:
        self._library = ctypes.CDLL(str(build_simulator()), mode=ctypes.RTLD_GLOBAL)
        self._library.sim_findings.restype = ctypes.c_char_p
        self._library.sim_totals.restype = ctypes.c_char_p
        self._library.sim_calls.restype = ctypes.c_int64
        self._library.sim_waits.restype = ctypes.c_int64
        self.cuda: Any = load(module or build_module(), "_cuda")

    def reset(self, schedule: int = LAZY, arch: int = 0, device_bytes: int = 1 << 40) -> None:
        """A device that has just been switched on; nothing of the last one may still be held."""
        self._library.sim_reset(ctypes.c_int64(schedule), arch, ctypes.c_uint64(device_bytes))

    def fail_at(self, call: int, error: int = 999) -> None:
        """The n-th call of the runtime from now on fails; 0: none."""
        self._library.sim_fail_at(ctypes.c_int64(call), error)

    def current_device(self) -> int:
        """The one that this thread has chosen."""
        return int(self._library.sim_current_device())

    def calls(self) -> int:
        return int(self._library.sim_calls())

    def waits(self) -> int:
        """How often the host waited for a stream."""
        return int(self._library.sim_waits())

    def findings(self, *, leaks: bool = False) -> list[str]:
        """What the simulator saw that a program may not do."""
        text: bytes = self._library.sim_findings(int(leaks))
        return text.decode().splitlines()

    def totals(self) -> dict[str, int]:
        """How often each kernel ran, and launches and instructions in all."""
        text: bytes = self._library.sim_totals()
        return {name: int(count) for name, count in (line.rsplit(" ", 1) for line in text.decode().splitlines())}


class Card:
    """A device with arrays on it, as the tests use it: up, call, down. Closes itself."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self._held: list[int] = []

    def room(self, count: int, skew: int = 0) -> int:
        """Uninitialised memory; `skew` bytes behind an aligned address, and its end is the end of the allocation."""
        at: int = self.device.allocate(count + skew)
        self._held.append(at)
        return at + skew

    def put(self, data: Bytes, skew: int = 0) -> int:
        at = self.room(len(data), skew)
        source = np.ascontiguousarray(data)
        self.device.copy(at, source.ctypes.data, len(source))
        self.device.finish()
        return at

    def get(self, at: int, count: int) -> Bytes:
        self.device.finish()
        data = np.zeros(count, np.uint8)
        self.device.copy(data.ctypes.data, at, count)
        self.device.finish()
        return data

    def close(self) -> None:
        for at in self._held:
            self.device.release(at)
        self._held = []


@contextmanager
def card(device: Any) -> Iterator[Card]:
    made = Card(device)
    try:
        yield made
    finally:
        made.close()


def host_memory(count: int) -> tuple[mmap.mmap, Bytes]:
    """Memory on pages of its own, as an arena's is, and a view of it."""
    pages = mmap.mmap(-1, count)
    return pages, np.frombuffer(pages, np.uint8)


def random_symbols(count: int, length: int, seed: int) -> list[Bytes]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, length), np.uint8))


def same(found: Sequence[Bytes], expected: Sequence[Bytes]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
