"""The module that was built without nvcc: NVRTC compiles the same sources, and the same checks pass.

A short run here; `SNAPSHOTD_TEST_NVRTC=1 make cuda-test` runs the whole suite on it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda import support

RUN_MAX_S = 170.0


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if support.nvcc() is None:
        pytest.skip("nvcc is not here: the simulator cannot be built")  # it needs CUDA's headers
    if importlib.util.find_spec("nvidia") is None or not any(
        Path(folder, "cu13", "lib", "libnvrtc.so.13").exists()
        for folder in importlib.util.find_spec("nvidia").submodule_search_locations or ()  # type: ignore[union-attr]
    ):
        pytest.skip("libnvrtc is not here: pip install nvidia-cuda-nvrtc")
    support.build_simulator()
    out = tmp_path_factory.mktemp("nvrtc") / "_cuda.so"
    support.builder().build_for_nvrtc(out, support.ROOT / "build" / "cuda")
    return out


@pytest.mark.parametrize("checks", ["quick", "quick_client"])
def test_kernels_that_nvrtc_compiled_pass_the_same_checks(module: Path, checks: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.cuda.{checks}", str(module)],
        cwd=support.ROOT, capture_output=True, text=True, timeout=RUN_MAX_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_where_no_runtime_is_installed_the_module_says_what_to_do(module: Path) -> None:
    """It imports, and does not die of the missing library."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _cuda; print(_cuda.device_count(), _cuda.why_no_device())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(module.parent)], capture_output=True, text=True, timeout=60.0,
        env={key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("0 no GPU: "), done.stdout
