"""The command: what it prints, and with which status it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from snapshotd import cli
from snapshotd.config import DaemonConfig


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snapshotd", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )


def test_the_help_of_serve_documents_flag_key_and_variable_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for one in fields(DaemonConfig):
        public = one.name.removesuffix("_s")
        assert f"--{public.replace('_', '-')}" in text
        assert f"[{public} = …, SNAPSHOTD_{public.upper()}]" in text


def test_every_setting_has_a_text() -> None:
    assert set(cli.SETTINGS) == {one.name for one in fields(DaemonConfig)}


@pytest.mark.parametrize(
    "arguments",
    [[], ["dance"], ["status", "--nonsense"], ["serve", "--socket"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--memory-limit", "lots"], "'lots' is no amount of memory"),
        (["serve", "--listen", "tcp://0.0.0.0:7780"], "name an interface, or advertise one address"),
        (["serve", "--authenticate", "no", "--listen", "tcp://10.0.0.1:0"], "not loopback"),
        (["serve", "--interface", "none7"], "there is no network interface 'none7' here"),
        (["serve", "--peer-bandwidth", "fast"], "'fast' is no bandwidth"),
        (["serve", "--lease", "0"], "must lie between"),
        (["serve", "--crash", "nowhere"], "there is no crash point 'nowhere'"),
        (["serve", "--config", "/nonexistent.toml"], "cannot be read"),
        (["run"], "there is no command to run"),
        (["gc", "--generation", "-1"], "generations count from 1"),
    ],
)
def test_wrong_settings_end_with_2_and_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.startswith("snapshotd: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("command", [["status"], ["stop"], ["gc"], ["status", "--json"]])
def test_tools_without_a_daemon_end_with_1_and_say_what_to_do(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--socket", str(tmp_path / "none.sock")]) == 1
    printed = capsys.readouterr()
    assert "no daemon answers at" in printed.err
    assert "snapshotd serve" in printed.err


def test_a_daemon_is_served_asked_and_stopped(shm_dir: Path, tmp_path: Path) -> None:
    socket = str(tmp_path / "s")
    with subprocess.Popen(
        [sys.executable, "-m", "snapshotd", "serve", "--socket", socket, "--shm-dir", str(shm_dir / "r")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SNAPSHOTD_NODE_ID": "told by a variable"},
    ) as daemon:
        assert daemon.stderr is not None
        assert "serving" in daemon.stderr.readline()
        shown = run("status", SNAPSHOTD_SOCKET=socket)
        assert shown.returncode == 0
        assert "on told by a variable" in shown.stdout
        document = json.loads(run("status", "--json", "--socket", socket).stdout)
        assert document["pid"] == daemon.pid
        assert document["shm_dir"] == str(shm_dir / "r")
        assert run("gc", "--socket", socket).stdout == "freed 0 arenas, 0 bytes\n"
        assert run("stop", "--socket", socket).returncode == 0
        assert daemon.wait() == 0


def test_a_configuration_file_is_read(shm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f'shm_dir = "{shm_dir}/missing/r"\nmemory_limit = "1GiB"\n')
    ended = run("serve", "--config", str(tmp_path / "c.toml"), "--socket", str(tmp_path / "s"))
    assert ended.returncode == 2
    assert f"{shm_dir}/missing/r cannot hold arenas" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_daemon_imports_neither_torch_nor_numpy_nor_zmq_nor_rich() -> None:
    code = (
        "import sys, snapshotd.cli, snapshotd.daemon\n"
        "snapshotd.cli._parser(['serve'])\n"
        "print([name for name in ('torch', 'numpy', 'zmq', 'rich', 'psutil') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_the_trainers_door_needs_no_asyncio_and_no_daemon() -> None:
    code = (
        "import sys, snapshotd.door_client\n"
        "print([name for name in sys.modules if name == 'asyncio' or name.startswith('snapshotd.')])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "asyncio" not in ended.stdout
    assert "snapshotd.daemon" not in ended.stdout
