"""The distribution: what it is called, what it carries and what it needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_one_distribution_holds_both_packages() -> None:
    for package in ("snapshotd", "snapshotd_client"):
        assert "snapshotd" in importlib.metadata.packages_distributions().get(package, ["snapshotd"])
        assert importlib.util.find_spec(package) is not None


def test_the_client_lies_in_a_source_root_that_is_no_package() -> None:
    spec = importlib.util.find_spec("snapshotd_client")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin) == ROOT / "client" / "snapshotd_client" / "__init__.py"
    assert not (ROOT / "client" / "__init__.py").exists()


def test_the_console_script_is_the_cli() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="snapshotd")
    assert [script.value for script in scripts] == ["snapshotd.cli:main"]


@pytest.mark.parametrize("module", ["snapshotd.cli", "snapshotd.daemon", "snapshotd.drill"])
def test_the_daemons_side_loads_neither_torch_nor_numpy(module: str) -> None:
    program = f"import sys, {module}; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240)
    assert shown.stdout.strip() == "[]"


def test_the_module_runs_as_a_program_from_another_folder(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "snapshotd", "--help"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert shown.returncode == 0, shown.stderr
    assert "serve" in shown.stdout and "drill" in shown.stdout


def test_both_packages_are_typed() -> None:
    assert (ROOT / "snapshotd" / "py.typed").exists()
    assert (ROOT / "client" / "snapshotd_client" / "py.typed").exists()
