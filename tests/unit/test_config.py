"""Settings: flags win over variables, variables over the file, and what is wrong is refused with the allowed range."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from snapshotd.config import (
    SYSTEM_SOCKET,
    DaemonConfig,
    default_socket,
    find_socket,
    job_name,
    load_client_config,
    load_daemon_config,
    parse_address,
    parse_bytes,
)
from snapshotd.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "amount"),
    [("0", 0), ("64GiB", 64 << 30), ("512 MB", 512 * 10**6), ("1.5k", 1500), (" 7 b ", 7), ("0.1GB", 10**8)],
)
def test_amounts_of_memory_are_read(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 GiB more", "1e9", "٣", "1,5k", "9" * 30])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_bytes(text)


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('node_id = "file"\nlease = 7\nmemory_limit = "1MiB"\nclaim_wait = 3\n')
    environment = {"SNAPSHOTD_NODE_ID": "variable", "SNAPSHOTD_LEASE": "8", "SNAPSHOTD_CLAIM_WAIT": ""}
    config = load_daemon_config({"node_id": "flag", "lease_s": None}, environment, file)
    assert (config.node_id, config.lease_s, config.memory_limit, config.claim_wait_s) == ("flag", 8.0, 1 << 20, 3.0)


def test_without_any_setting_the_defaults_hold() -> None:
    config = load_daemon_config({}, {"XDG_RUNTIME_DIR": "/run/user/7"})
    assert config.socket == Path("/run/user/7/snapshotd.sock")
    assert config.shm_dir == Path(f"/dev/shm/snapshotd/{os.getuid()}")
    assert config.lease_s == 86400


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("lease_s", "0.5", "lease is 0.5; it must lie between 1 and"),
        ("lease_s", "soon", "lease is 'soon', which is no number"),
        ("lease_s", "nan", "must lie between"),
        ("claim_wait_s", "601", "between 0 and 600 seconds"),
        ("memory_limit", "-5", "no amount of memory"),
        ("listen", "127.0.0.1:1", "write it like tcp://"),
        ("listen", "tcp://10.0.0.1:1", "not loopback"),
        ("listen", "tcp://127.evil.example:1", "not loopback"),
        ("listen", "tcp://127.0.0.1:70000", "port below 65536"),
        ("advertise", "nowhere", "write it like 127.0.0.1:7780"),
        ("exit_idle", "perhaps", "no yes or no"),
        ("node_id", "x" * 201, "at most 200 bytes"),
        ("socket", "/" + "x" * 100, "longer than the 100 bytes"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(setting: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_daemon_config({setting: value}, {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lease = ", "not valid TOML"),
        ("leese = 5", "sets 'leese', which is no setting; the settings are"),
        ("lease = [5]", "no number"),
        ("lease = true", "no number"),
        ("exit_idle = 7", "no yes or no"),
    ],
)
def test_a_wrong_file_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_daemon_config({}, {}, file)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_daemon_config({}, {}, tmp_path / "none.toml")


def test_every_setting_can_come_from_a_variable() -> None:
    values: dict[str, Any] = {
        "node_id": "n", "listen": "tcp://[::1]:7780", "advertise": "host:1", "socket": "/s", "shm_dir": "/d",
        "memory_limit": "1GiB", "claim_wait_s": "1", "lease_s": "2", "exit_idle": "yes", "crash": "grant.sent",
    }  # fmt: skip
    environment = {f"SNAPSHOTD_{name.removesuffix('_s').upper()}": value for name, value in values.items()}
    config = load_daemon_config({}, environment)
    assert set(values) == {one.name for one in fields(DaemonConfig)}
    assert all(getattr(config, one.name) != getattr(DaemonConfig(), one.name) for one in fields(DaemonConfig))


def test_a_trainer_finds_the_users_socket_else_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    own = tmp_path / "snapshotd.sock"
    monkeypatch.setattr("snapshotd.config.SYSTEM_SOCKET", tmp_path / "system.sock")
    assert find_socket(environment) == own
    (tmp_path / "system.sock").touch()
    assert find_socket(environment) == tmp_path / "system.sock"
    own.touch()
    assert find_socket(environment) == own
    assert load_client_config({**environment, "SNAPSHOTD_SOCKET": "/x"}).socket == Path("/x")
    assert default_socket(environment) == own


def test_without_a_runtime_directory_the_systems_socket_is_used() -> None:
    assert default_socket({}) == SYSTEM_SOCKET == Path("/run/snapshotd.sock")


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"SNAPSHOTD_JOB": "a", "SLURM_JOB_ID": "7"}, "a"),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "b"}, "slurm-7"),
        ({"TORCHELASTIC_RUN_ID": "llama"}, "llama"),
    ],
)
def test_a_job_is_named_by_whoever_names_it_first(environment: dict[str, str], name: str) -> None:
    assert job_name(None, environment) == name
    assert job_name("explicit", environment) == "explicit"


@pytest.mark.parametrize("run_id", ["", "none", "0f8fad5b-d9cb-469f-a165-70867728950e"])
def test_a_run_id_that_a_restart_would_not_carry_names_no_job(run_id: str) -> None:
    with pytest.raises(ConfigError, match="no name that a restart would carry"):
        job_name(None, {"TORCHELASTIC_RUN_ID": run_id})


@pytest.mark.parametrize("name", ["x" * 201, "ä" * 101, "a\nb"])
def test_a_name_that_cannot_be_stored_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="at most 200 bytes"):
        job_name(name, {})


@pytest.mark.parametrize("text", ["", ":1", "host", "host:", "host:port", "a b:1", "::1:5", "host:99999", "host:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like"):
        parse_address("advertise", text)


def test_addresses_are_read() -> None:
    assert parse_address("listen", "[::1]:80") == ("::1", 80)
    assert parse_address("listen", "host:0") == ("host", 0)
