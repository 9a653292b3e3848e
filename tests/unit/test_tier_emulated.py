"""The NEON tier, compiled for 64-bit ARM and run by an emulator: right or wrong, though not how fast."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs Debian's g++-aarch64-linux-gnu and qemu-user")
def test_neon_makes_the_bytes_of_the_oracle(tmp_path: Path) -> None:
    native, program = ROOT / "csrc" / "native", tmp_path / "tier_check"
    sources = [ROOT / "tests" / "native" / "tier_check.cpp", native / "kernels_neon.cpp", native / "kernels_base.cpp"]
    command = [str(COMPILER), "-std=c++17", "-O1", "-static", f"-I{native}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True, timeout=150)
    said = subprocess.run([str(EMULATOR), str(program)], capture_output=True, text=True, timeout=240)
    assert (said.returncode, said.stdout) == (0, "neon: 1688 cases, 0 differ from base\n")
