"""Settings: who wins over whom, and what is refused with which sentence."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd import config
from snapshotd.config import (
    UNITS,
    ClientConfig,
    DaemonConfig,
    find_socket,
    job_name,
    load_client_config,
    load_daemon_config,
    parse_address,
    parse_bytes,
)
from snapshotd.errors import ConfigError


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "snapshotd.toml"
    path.write_text(text)
    return path


# --- precedence -------------------------------------------------------------------------------------


def test_flags_win_over_the_environment_and_that_over_the_file_and_that_over_defaults(tmp_path: Path) -> None:
    file = toml(tmp_path, 'node_id = "file"\nlease = 100\nmemory_limit = "1GiB"\nclaim_wait = 1')
    environment = {"SNAPSHOTD_NODE_ID": "environment", "SNAPSHOTD_LEASE": "200"}
    settings = load_daemon_config({"node_id": "flag", "lease_s": None, "listen": None}, environment, file)
    assert (settings.node_id, settings.lease_s, settings.memory_limit) == ("flag", 200.0, 1 << 30)
    assert (settings.claim_wait_s, settings.listen) == (1.0, "")


@pytest.mark.parametrize("name", [field.name for field in fields(DaemonConfig)])
def test_every_setting_can_come_from_each_place(name: str, tmp_path: Path) -> None:
    given = {
        "node_id": "rack3", "listen": "tcp://127.0.0.1:7780", "advertise": "127.0.0.1:7780", "socket": "/tmp/x.sock",
        "shm_dir": "/dev/shm/x", "memory_limit": "64GiB", "claim_wait_s": "3", "lease_s": "30", "exit_idle": "yes",
        "crash": "commit.marked",
    }[name]  # fmt: skip
    public = name.removesuffix("_s")
    flag = load_daemon_config({name: given}, {})
    assert getattr(flag, name) != getattr(load_daemon_config({}, {}), name)
    assert load_daemon_config({}, {f"SNAPSHOTD_{public.upper()}": given}) == flag
    assert load_daemon_config({}, {}, toml(tmp_path, f'{public} = "{given}"')) == flag


def test_toml_may_use_its_own_types(tmp_path: Path) -> None:
    settings = load_daemon_config({}, {}, toml(tmp_path, "memory_limit = 4096\nexit_idle = true\nlease = 1.5"))
    assert (settings.memory_limit, settings.exit_idle, settings.lease_s) == (4096, True, 1.5)


def test_an_empty_variable_is_as_none_at_all() -> None:
    assert load_daemon_config({}, {"SNAPSHOTD_LEASE": ""}) == load_daemon_config({}, {})


def test_arenas_of_different_users_lie_apart() -> None:
    assert load_daemon_config({}, {}).shm_dir == Path(f"/dev/shm/snapshotd/{os.getuid()}")


def test_a_trainer_reads_its_settings_from_the_environment() -> None:
    environment = {"SNAPSHOTD_SOCKET": "/tmp/x.sock", "SNAPSHOTD_JOB": "llama", "SNAPSHOTD_COPY_THREADS": "3"}
    settings = load_client_config(environment)
    assert (settings.socket, settings.job, settings.copy_threads) == (Path("/tmp/x.sock"), "llama", 3)
    assert settings.wait_s == ClientConfig().wait_s


# --- the socket ---------------------------------------------------------------------------------------


def test_a_daemon_listens_in_the_users_runtime_directory_if_there_is_one() -> None:
    assert load_daemon_config({}, {"XDG_RUNTIME_DIR": "/run/user/7"}).socket == Path("/run/user/7/snapshotd.sock")
    assert load_daemon_config({}, {}).socket == Path("/run/snapshotd.sock")


def test_a_trainer_finds_the_systems_daemon_where_the_user_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, own = tmp_path / "system.sock", tmp_path / "snapshotd.sock"
    monkeypatch.setattr(config, "SYSTEM_SOCKET", system)
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert find_socket(environment) == own, "no daemon yet: the user's own is the one that will be started"
    system.touch()
    assert find_socket(environment) == system == load_client_config(environment).socket
    own.touch()
    assert find_socket(environment) == own
    assert load_client_config({**environment, "SNAPSHOTD_SOCKET": "/tmp/y"}).socket == Path("/tmp/y")


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("lease_s", "0", "between 1 and"),
        ("lease_s", "nan", "between 1 and"),
        ("lease_s", "inf", "between 1 and"),
        ("lease_s", "soon", "which is no number"),
        ("lease_s", True, "which is no number"),
        ("claim_wait_s", "-1", "between 0 and 600"),
        ("memory_limit", "64 GiBi", "write it like 64GiB"),
        ("memory_limit", "-1", "write it like 64GiB"),
        ("memory_limit", "9" * 20 + "TiB", "between 0 and"),
        ("memory_limit", "9" * 400, "write it like 64GiB"),
        ("exit_idle", "perhaps", "which is no yes or no"),
        ("node_id", "x" * 201, "at most 200 bytes"),
        ("node_id", "ü" * 101, "at most 200 bytes"),
        ("node_id", "a\nb", "printable"),
        ("node_id", "\udcff", "printable"),
        ("node_id", ["a"], "which is no text"),
        ("socket", "/" + "x" * 120, "longer than the 100 bytes"),
        ("socket", "~nobody-of-this-name/x", "which is no path"),
        ("listen", "127.0.0.1:7780", "write it like tcp://"),
        ("listen", "tcp://127.0.0.1", "write it like 127.0.0.1:7780"),
        ("listen", "tcp://127.0.0.1:65536", "below 65536"),
        ("listen", "tcp://127.0.0.1:²", "write it like"),
        ("listen", "tcp://", "write it like"),
        ("advertise", "tcp://127.0.0.1:1", "write it like"),
        ("advertise", "node 7:1", "write it like"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_daemon_config({name: value}, {})
    if name != "memory_limit":
        assert name.removesuffix("_s") in str(caught.value) or name == "socket"


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "10.1.2.3", "[::]", "example.org", "127.evil.example", "localhost.example", "[2001:db8::1]"]
)
def test_a_listener_that_others_could_reach_is_refused_as_long_as_nobody_authenticates(host: str) -> None:
    with pytest.raises(ConfigError, match="not loopback"):
        load_daemon_config({"listen": f"tcp://{host}:7780"}, {})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "[::1]"])
def test_loopback_is_allowed(host: str) -> None:
    assert load_daemon_config({"listen": f"tcp://{host}:0"}, {}).listen.endswith(":0")


@pytest.mark.parametrize(
    ("name", "value"),
    [("COPY_THREADS", "65"), ("COPY_THREADS", "1.5"), ("WAIT", "-1"), ("GATHER", "0"), ("COPY_THREADS", "9" * 4000)],
)
def test_a_trainers_wrong_value_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name.lower()):
        load_client_config({f"SNAPSHOTD_{name}": value})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("colour = 1", "'colour', which is no setting; the settings are .*memory_limit"),
        ("[snapshotd]\nlease = 1", "'snapshotd', which is no setting"),
        ("lease_s = 10", "'lease_s', which is no setting"),
        ("lease = [10]", "lease is .*, which is no number"),
        ("lease = ", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_what_would_be_right(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_daemon_config({}, {}, toml(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "absent.toml", tmp_path, tmp_path / "binary.toml"):
        with pytest.raises(ConfigError, match=str(path)):
            load_daemon_config({}, {}, path)


def test_a_wrong_setting_is_a_value_error_too() -> None:
    with pytest.raises(ValueError):
        load_daemon_config({"lease_s": 0}, {})


# --- units, addresses, names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("4096", 4096), ("64GiB", 64 << 30), ("64 gib", 64 << 30), (" 1.5k ", 1500), ("2TB", 2 * 10**12),
     ("0.5MiB", 1 << 19), ("9007199254740993", 9007199254740993)],
)  # fmt: skip
def test_amounts_of_memory(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@given(st.integers(0, 10**15), st.sampled_from(sorted(UNITS)))
def test_an_amount_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_bytes(f"{number}{unit.upper()}") == parse_bytes(f"{number} {unit}") == number * UNITS[unit]


@given(st.text(max_size=12))
def test_any_other_text_is_a_config_error_and_nothing_else(text: str) -> None:
    for parse in (parse_bytes, lambda text: parse_address("listen", text)):
        try:
            parse(text)
        except ConfigError as error:
            assert repr(text) in str(error)


def test_an_address_of_ip_version_6_stands_in_brackets() -> None:
    assert parse_address("advertise", "[::1]:7780") == ("::1", 7780)


@pytest.mark.parametrize(
    ("explicit", "environment", "name"),
    [
        ("llama", {"SNAPSHOTD_JOB": "other"}, "llama"),
        (None, {"SNAPSHOTD_JOB": "other", "SLURM_JOB_ID": "7"}, "other"),
        (None, {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "run"}, "slurm-7"),
        (None, {"TORCHELASTIC_RUN_ID": "run"}, "run"),
    ],
)
def test_where_a_jobs_name_comes_from(explicit: str | None, environment: dict[str, str], name: str) -> None:
    assert job_name(explicit, environment) == name


@pytest.mark.parametrize("run_id", ["", "none", "0a4f1d5e-94c5-4a5b-8bd0-6a0a1f6d3c11"])
def test_a_name_that_no_restart_would_carry_is_refused(run_id: str) -> None:
    with pytest.raises(ConfigError, match="SNAPSHOTD_JOB"):
        job_name(None, {"TORCHELASTIC_RUN_ID": run_id})


@pytest.mark.parametrize("name", ["x" * 201, "a\nb", "\udcff"])
def test_a_name_that_cannot_be_stored_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="at most 200 bytes"):
        job_name(name, {})
