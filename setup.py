"""Builds the native module; everything else about the package stands in pyproject.toml.

`SNAPSHOTD_SANITIZE=address,undefined` builds with those sanitizers, for a CI stage that runs the native
tests against a second build folder. `CI=true` or `SNAPSHOTD_WERROR=1` turns warnings into errors.
"""

import glob
import os
import shutil
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
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


class BuildPython(build_py):
    """Takes the example trainer into the wheel, since `snapshotd drill` runs it from there."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "snapshotd_client" / "examples"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy("examples/gpt.py", folder)


setup(
    cmdclass={"build_py": BuildPython},
    ext_modules=[
        Pybind11Extension(
            "snapshotd._native",
            sorted(glob.glob("csrc/native/*.cpp")),
            depends=sorted(glob.glob("csrc/native/*.hpp")),
            cxx_std=17,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
)
