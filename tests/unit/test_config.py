"""Settings: flags win over variables, variables over the file, and what is wrong is refused with the allowed range."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from snapshotd import config as settings
from snapshotd.config import (
    SYSTEM_SOCKET,
    DaemonConfig,
    default_socket,
    find_socket,
    interface_address,
    job_name,
    load_client_config,
    load_daemon_config,
    network_interfaces,
    parse_address,
    parse_bandwidth,
    parse_bytes,
    with_addresses,
)
from snapshotd.errors import ConfigError

HOST = {
    "lo": ["127.0.0.1", "::1"],
    "eth1": ["fe80::1%eth1", "fd00::7", "10.1.2.3", "10.1.2.4"],
    "ib0": ["fe80::2%ib0", "fd00::8"],
    "down": [],
    "half": ["fe80::3%half"],
}


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
        ("listen", "tcp://127.0.0.1:70000", "port below 65536"),
        ("listen", "tcp://*:7780", "name an interface, or advertise one address"),
        ("listen", "tcp://[::]:7780", "name an interface, or advertise one address"),
        ("authenticate", "sometimes", "no yes or no"),
        ("advertise", "nowhere", "write it like 127.0.0.1:7780"),
        ("stream_port", "65536", "stream_port is 65536; it must lie between 0 and 65535"),
        ("stream_port", "any", "no whole number"),
        ("stream_port", "-1", "must lie between"),
        ("domain", "rack\n7", "write it like rack=7, printable"),
        ("domain", "ä" * 101, "at most 200 bytes"),
        ("peer_bandwidth", "25Gbit/s", "no bandwidth; write it like 2GB/s or 500MB/s: bytes, not bits"),
        ("peer_bandwidth", "9999999999TB", "between 0 and"),
        ("scrub_bandwidth", "often", "no bandwidth; write it like"),
        ("scrub_every_s", "0", "between 0.1 and"),
        ("reprotect_after_s", "-1", r"reprotect_after is -1; it must lie between 0 and .*\(0: off\)"),
        ("interface", "none7", "no network interface 'none7' here; there are .*lo"),
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
        ("stream_port = 7781.5", "no whole number"),
        ("stream_port = inf", "no whole number"),
        ("stream_port = true", "no whole number"),
        ("interface = 5", "no network interface '5'"),
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
        "node_id": "n", "interface": "lo", "listen": "tcp://[::1]:7780", "advertise": "localhost:1", "socket": "/s",
        "stream_port": "7781", "domain": "rack=7,switch=2", "peer_bandwidth": "2GB/s", "shm_dir": "/d",
        "memory_limit": "1GiB", "claim_wait_s": "1", "lease_s": "2", "exit_idle": "yes", "authenticate": "no",
        "codec": "cpu", "scrub_bandwidth": "1GB/s", "scrub_every_s": "60", "reprotect_after_s": "5",
        "crash": "grant.sent", "rebuild_spread": "yes",
    }  # fmt: skip
    environment = {f"SNAPSHOTD_{name.removesuffix('_s').upper()}": value for name, value in values.items()}
    config = load_daemon_config({}, environment)
    assert set(values) == {one.name for one in fields(DaemonConfig)}
    assert all(getattr(config, one.name) != getattr(DaemonConfig(), one.name) for one in fields(DaemonConfig))


@pytest.mark.parametrize(
    ("text", "amount"), [("0", 0), ("2GB", 2 * 10**9), ("2GB/s", 2 * 10**9), (" 1.5 GiB/s ", 3 << 29), ("7/s", 7)]
)
def test_bandwidths_are_read(text: str, amount: int) -> None:
    assert parse_bandwidth(text) == amount


@pytest.mark.parametrize("text", ["", "/s", "fast", "2GB/min", "2GBps", "-1"])
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no bandwidth"):
        parse_bandwidth(text)


def test_a_bandwidth_may_be_a_number_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("peer_bandwidth = 500_000_000\nstream_port = 7781\n")
    config = load_daemon_config({}, {}, file)
    assert (config.peer_bandwidth, config.stream_port) == (500_000_000, 7781)


# --- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "address"), [("lo", "127.0.0.1"), ("eth1", "10.1.2.3"), ("ib0", "fd00::8")])
def test_an_interface_stands_for_its_first_ipv4_address_else_one_of_ipv6_that_others_can_reach(
    name: str, address: str
) -> None:
    assert interface_address(name, HOST) == address


@pytest.mark.parametrize("name", ["down", "half"])
def test_an_interface_without_an_address_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"interface {name} has no address that peers could use"):
        interface_address(name, HOST)


def test_an_interface_that_is_not_here_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="'eth0' here; there are down, eth1, half, ib0, lo"):
        interface_address("eth0", HOST)


@pytest.mark.parametrize(
    ("given", "listen", "advertise"),
    [
        ({}, "", ""),
        ({"listen": "tcp://127.0.0.1:*"}, "tcp://127.0.0.1:0", ""),
        ({"listen": "tcp://127.0.0.1:0"}, "tcp://127.0.0.1:0", ""),
        ({"interface": "eth1"}, "tcp://10.1.2.3:7780", "10.1.2.3:7780"),
        ({"interface": "ib0"}, "tcp://[fd00::8]:7780", "[fd00::8]:7780"),
        ({"interface": "eth1", "listen": "tcp://*:*"}, "tcp://10.1.2.3:0", "10.1.2.3:0"),
        ({"interface": "eth1", "listen": "tcp://*:9"}, "tcp://10.1.2.3:9", "10.1.2.3:9"),
        ({"interface": "eth1", "listen": "tcp://10.1.2.4:9"}, "tcp://10.1.2.4:9", "10.1.2.3:9"),
        ({"interface": "eth1", "advertise": "nat:8"}, "tcp://10.1.2.3:7780", "nat:8"),
        ({"interface": "eth1", "advertise": "*:8"}, "tcp://10.1.2.3:7780", "10.1.2.3:8"),
        ({"listen": "tcp://[::1]:9", "advertise": "localhost:*"}, "tcp://[::1]:9", "localhost:9"),
        ({"listen": "tcp://127.0.0.1:*", "advertise": "localhost:*"}, "tcp://127.0.0.1:0", "localhost:0"),
        ({"listen": "tcp://*:9"}, "tcp://*:9", ""),
    ],
)
def test_an_interface_gives_listen_and_advertise_the_host_that_they_lack(
    given: dict[str, Any], listen: str, advertise: str
) -> None:
    config = with_addresses(DaemonConfig(**given), HOST)
    assert (config.listen, config.advertise) == (listen, advertise)
    assert with_addresses(config, HOST) == config


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"interface": "eth1"}, "advertise is '10.1.2.3:7780', which is not loopback, and authenticate is off"),
        ({"interface": "lo", "listen": "tcp://10.1.2.3:1"}, "listen is 'tcp://10.1.2.3:1', which is not loopback"),
        ({"interface": "lo", "advertise": "10.1.2.3:1"}, "advertise is '10.1.2.3:1', which is not loopback"),
        ({"listen": "tcp://127.evil.example:9"}, "not loopback.*training state; leave authenticate on"),
        ({"listen": "tcp://*:9", "advertise": "127.0.0.1:1"}, "listen is 'tcp://.:9', which is not loopback"),
        ({"listen": "tcp://127.0.0.1:9", "advertise": "host:1"}, "advertise is 'host:1', which is not loopback"),
        ({"advertise": "127.0.0.1:9"}, "listen is not set, so peers would find nobody there"),
        ({"listen": "tcp://127.0.0.1:9", "stream_port": "9"}, "listen and stream_port are both 9"),
    ],
)
def test_what_others_could_reach_is_refused_where_peers_do_not_authenticate(
    given: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "network_interfaces", lambda: HOST)
    with pytest.raises(ConfigError, match=sentence):
        load_daemon_config({**given, "authenticate": "no"}, {})


@pytest.mark.parametrize(
    "given",
    [
        {"interface": "eth1"},
        {"listen": "tcp://10.1.2.3:1"},
        {"listen": "tcp://*:9", "advertise": "10.1.2.3:0"},
        {"listen": "tcp://127.0.0.1:9", "advertise": "host:1"},
    ],
)
def test_peers_that_authenticate_listen_on_any_network(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "network_interfaces", lambda: HOST)
    assert load_daemon_config(given, {}).authenticate


def test_the_interface_of_this_machine_is_looked_up_when_the_settings_are_read() -> None:
    assert "127.0.0.1" in network_interfaces()["lo"]
    config = load_daemon_config({"interface": "lo", "listen": "tcp://*:*"}, {})
    assert (config.listen, config.advertise) == ("tcp://127.0.0.1:0", "127.0.0.1:0")


def test_no_interface_is_looked_up_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "network_interfaces", None)
    assert load_daemon_config({"listen": "tcp://127.0.0.1:0"}, {}).listen == "tcp://127.0.0.1:0"


# --- where trainers look, and names ----------------------------------------------------------------


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
    assert parse_address("listen", "*:*") == ("*", 0)
