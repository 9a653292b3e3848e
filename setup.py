"""Builds the native module; everything else about the package stands in pyproject.toml.

`SNAPSHOTD_SANITIZE=address,undefined` builds with those sanitizers, for a CI stage that runs the native
tests against a second build folder. `CI=true` or `SNAPSHOTD_WERROR=1` turns warnings into errors.

`SNAPSHOTD_CUDA=0|1|nvrtc|auto` builds snapshotd._cuda never, with nvcc, without it (NVRTC compiles the kernels at run
time), or (auto, the default) with nvcc where it is found, else without; with auto it never fails the installation.
`SNAPSHOTD_CUDA_ARCHS` names what it gets machine code for (`80,90`, or `all`); without,
it has PTX alone, which takes seconds to build, and which the driver compiles when a device first loads it.
"""

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sanitizers = os.environ.get("SNAPSHOTD_SANITIZE", "")
strict = os.environ.get("CI") == "true" or os.environ.get("SNAPSHOTD_WERROR") == "1"

compile_args = ["-O1", "-g", "-fno-omit-frame-pointer"] if sanitizers else ["-O3"]
compile_args += ["-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]
link_args = ["-pthread"]
if sanitizers:
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    compile_args += flags
    link_args += flags
if strict:
    compile_args.append("-Werror")
if "thread" in sanitizers:  # gcc says of each fence that this sanitizer does not see it
    compile_args.append("-Wno-error=tsan")


class BuildPython(build_py):
    """Takes the example trainer into the wheel, since `snapshotd drill` runs it from there."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "snapshotd_client" / "examples"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy("examples/gpt.py", folder)


CUDA = "snapshotd._cuda"
cuda_wanted = os.environ.get("SNAPSHOTD_CUDA", "auto")
if cuda_wanted not in ("0", "1", "nvrtc", "auto"):
    sys.exit(f"SNAPSHOTD_CUDA is {cuda_wanted!r}; it must be 0, 1, nvrtc or auto")


class BuildExtensions(build_ext):
    """Leaves the CUDA module to csrc/cuda/build.py, since nvcc is no compiler that setuptools knows."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA:
            super().build_extension(ext)
            return
        command = [sys.executable, "csrc/cuda/build.py", self.get_ext_fullpath(ext.name)]
        if cuda_wanted == "nvrtc" or (cuda_wanted == "auto" and not has_nvcc()):
            command.append("--nvrtc")
        else:
            command += ["--archs", os.environ.get("SNAPSHOTD_CUDA_ARCHS", "")]
        done = subprocess.run(command)
        if done.returncode != 0 and cuda_wanted != "auto":
            sys.exit(f"{CUDA} was not built although SNAPSHOTD_CUDA={cuda_wanted} asks for it: the reason stands above")
        if done.returncode != 0:
            print(f"{CUDA} was not built: this installation works without CUDA", file=sys.stderr)


def has_nvcc() -> bool:
    return bool(shutil.which("nvcc") or os.environ.get("CUDA_HOME") or Path("/usr/local/cuda/bin/nvcc").exists())


def cuda_extensions() -> list[Extension]:
    if cuda_wanted == "0" or sanitizers:
        return []
    return [Extension(CUDA, ["csrc/cuda/module.cpp"], depends=sorted(glob.glob("csrc/cuda/*")), optional=True)]


setup(
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
    ext_modules=[
        Pybind11Extension(
            "snapshotd._native",
            sorted(glob.glob("csrc/native/*.cpp")),
            depends=sorted(glob.glob("csrc/native/*.hpp")),
            cxx_std=17,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        ),
        *cuda_extensions(),
    ],
)
