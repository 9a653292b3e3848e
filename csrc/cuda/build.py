"""Builds snapshotd._cuda: with nvcc, linked with the CUDA runtime, or with g++ alone (`--nvrtc`).

    python csrc/cuda/build.py OUT.so [--archs 80,90,120] [--ptx 80] [--runtime static] [--objects FOLDER] [--nvrtc]

Without nvcc the kernels' sources go into the module as text, NVRTC compiles what is needed at run time, and libcudart
is looked for then: both come with torch's CUDA builds or with `pip install 'snapshotd[cuda]'`.

`setup.py` runs it; the tests build the same sources against the shared runtime, which their simulator stands in for.
An object is kept in FOLDER under a name made of its sources' and flags' digest, so that nothing is compiled twice.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHS = ("80", "86", "89", "90", "100", "120")
_INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH or of the usual place."""
    places = [os.environ.get("CUDA_HOME", "") + "/bin/nvcc", shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if os.path.isfile(place)), None)


def sources(folder: Path = HERE) -> list[Path]:
    """All that is compiled: kernels first, since they take longest."""
    return [*sorted(folder.glob("*.cu")), *sorted(folder.glob("*.cpp"))]


def _texts(source: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """A source and what it includes of ours."""
    source = source.resolve()
    if source not in seen:
        seen[source] = source.read_bytes()
        for name in _INCLUDE.findall(seen[source].decode()):
            if (source.parent / name).is_file():
                _texts(source.parent / name, seen)
    return seen


def code_flags(archs: Sequence[str], ptx: Sequence[str]) -> list[str]:
    """Machine code for `archs`, PTX for `ptx`."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return flags + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ptx]


def is_strict() -> bool:
    """Warnings are errors."""
    return os.environ.get("CI") == "true" or os.environ.get("SNAPSHOTD_WERROR") == "1"


def compile_one(nvcc: str, source: Path, objects: Path, flags: Sequence[str], *, strict: bool) -> Path:
    """The object of one source, maybe from an earlier build. subprocess.CalledProcessError where nvcc refuses."""
    import pybind11  # here, since only the one who builds has it

    command = [
        nvcc,
        "-c",
        "-std=c++17",
        "-O3",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
    ]
    if source.suffix == ".cu":
        command += flags
    else:
        command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    if strict:
        command += ["-Werror", "all-warnings", "-Xcompiler=-Werror"]
    return _compile(command, source, objects)


def _compile(command: Sequence[str], source: Path, objects: Path) -> Path:
    digest = hashlib.sha256(repr(command).encode())
    for _, text in sorted(_texts(source, {}).items()):
        digest.update(text)
    target = objects / f"{source.name}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        subprocess.run([*command, str(source), "-o", str(partial)], check=True)
        partial.replace(target)
    return target


def link(nvcc: str, objects: Sequence[Path], out: Path, runtime: str) -> None:
    """One extension module of these objects, with the static or the shared CUDA runtime."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-shared", f"-cudart={runtime}", "-gencode=arch=compute_80,code=compute_80"]
    subprocess.run([*command, *map(str, objects), "-o", str(out)], check=True)


def build(out: Path, archs: Sequence[str], ptx: Sequence[str], runtime: str, objects: Path, jobs: int = 2) -> None:
    """The whole module. FileNotFoundError without nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not in CUDA_HOME, in PATH or in /usr/local/cuda: install the CUDA toolkit")
    objects.mkdir(parents=True, exist_ok=True)
    flags = code_flags(archs, ptx)
    with ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(lambda source: compile_one(nvcc, source, objects, flags, strict=is_strict()), sources()))
    link(nvcc, made, out, runtime)


def kernel_sources(folder: Path = HERE) -> str:
    """The kernels as C++ literals."""
    texts = ((path.name, path.read_text()) for path in sorted(folder.glob("*.cuh")))
    return "".join(f'{{"{name}", R"kernel({text})kernel"}},\n' for name, text in texts)


def build_for_nvrtc(out: Path, objects: Path, jobs: int = 2) -> None:
    """The module without nvcc, by g++ (or CXX)."""
    import pybind11

    folder = objects / f"nvrtc-{hashlib.sha256(kernel_sources().encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel_sources.inc").write_text(kernel_sources())
    compiler = os.environ.get("CXX", "g++")
    command = [
        compiler, "-c", "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
        "-DSNAPSHOTD_NVRTC", f"-I{folder}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
        *(["-Werror"] if is_strict() else []),
    ]  # fmt: skip
    with ThreadPoolExecutor(jobs) as pool:
        host = sorted(HERE.glob("*.cpp"))
        made = list(pool.map(lambda source: _compile(command, source, folder), host))
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, "-shared", "-pthread", *map(str, made), "-o", str(out), "-ldl"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--archs", default="", help=f"machine code for these, e.g. 80,90; `all` is {','.join(ARCHS)}")
    parser.add_argument("--ptx", default="80", help="PTX for these, which the driver compiles where it has no code")
    parser.add_argument("--runtime", choices=("static", "shared"), default="static")
    parser.add_argument("--objects", type=Path, default=Path("build/cuda"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--nvrtc", action="store_true", help="build without nvcc; NVRTC compiles the kernels later")
    given = parser.parse_args()
    if given.nvrtc:
        build_for_nvrtc(given.out, given.objects, given.jobs)
        return
    archs = ARCHS if given.archs == "all" else tuple(filter(None, given.archs.split(",")))
    build(given.out, archs, tuple(filter(None, given.ptx.split(","))), given.runtime, given.objects, given.jobs)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"snapshotd._cuda was not built: {error}")
