"""Settings, read once from flags, environment and a TOML file, in that order of precedence.

`DaemonConfig` is the daemon's; `ClientConfig` is what a trainer reads. Wrong values are refused with the allowed range;
nothing else in the project looks at the environment for a setting. The addresses of a network interface are looked up
here too, so that who reads a config finds addresses that are final but for ports that the kernel chooses.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket as sockets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from snapshotd.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "kib": 2**10, "m": 10**6, "mb": 10**6, "mib": 2**20,
         "g": 10**9, "gb": 10**9, "gib": 2**30, "t": 10**12, "tb": 10**12, "tib": 2**40}  # fmt: skip
SYSTEM_SOCKET = Path("/run/snapshotd.sock")
LISTEN_PORT = 7780
CODECS = ("auto", "cpu", "cuda")
SPREADS = ("auto", "yes", "no")
Interfaces: TypeAlias = Mapping[str, Sequence[str]]
"""The IPv4 and IPv6 addresses of each network interface, in the kernel's order."""
_T = TypeVar("_T", "DaemonConfig", "ClientConfig")


def parse_bytes(text: str) -> int:
    """`64GiB`, `512 MB` or a plain number of bytes. ConfigError for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise ConfigError(f"{text!r} is no amount of memory; write it like 64GiB, 512MB or 1000000")
    return int(Decimal(match[1]) * UNITS[match[2].lower()])


def parse_bandwidth(text: str) -> int:
    """`2GB/s`, `2GB` or a plain number: bytes per second. ConfigError for anything else."""
    try:
        return parse_bytes(text.strip().removesuffix("/s"))
    except ConfigError:
        raise ConfigError(f"{text!r} is no bandwidth; write it like 2GB/s or 500MB/s: bytes, not bits") from None


def default_socket(environment: Mapping[str, str]) -> Path:
    """Where a daemon listens if nobody says: the user's runtime directory, else /run."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "snapshotd.sock" if runtime else SYSTEM_SOCKET


def find_socket(environment: Mapping[str, str]) -> Path:
    """Where a trainer or tool looks if nobody says: the user's own daemon where it has a socket, else the system's."""
    own = default_socket(environment)
    return SYSTEM_SOCKET if not own.exists() and SYSTEM_SOCKET.exists() else own


@dataclass(frozen=True)
class DaemonConfig:
    """What `snapshotd serve` is told; each field is a flag, a key of the TOML file and SNAPSHOTD_<NAME>.

    As `load_daemon_config` returns it, `listen` is empty (no network) or tcp://HOST:PORT, and `advertise` is empty (as
    `listen`) or HOST:PORT. Port 0 stands for one that is known only once it is bound: any free one for `listen` and
    `stream_port`, the one that `listen` got for `advertise`.
    """

    node_id: str = ""
    interface: str = ""
    listen: str = ""
    advertise: str = ""
    stream_port: int = 0
    domain: str = ""
    peer_bandwidth: int = 0
    scrub_bandwidth: int = 200 * 10**6
    scrub_every_s: float = 300.0
    reprotect_after_s: float = 120.0
    codec: str = "auto"
    rebuild_spread: str = "auto"
    authenticate: bool = True
    socket: Path = Path("/run/snapshotd.sock")
    shm_dir: Path = Path("/dev/shm/snapshotd")
    memory_limit: int = 0
    claim_wait_s: float = 10.0
    lease_s: float = 24 * 3600.0
    exit_idle: bool = False
    crash: str = ""

    def check(self) -> DaemonConfig:
        """Self, if every value is allowed. ConfigError names the first that is not, and the range."""
        _within("claim_wait", self.claim_wait_s, 0.0, 600.0, "seconds")
        _within("lease", self.lease_s, 1.0, 90 * 24 * 3600.0, "seconds")
        _within("memory_limit", self.memory_limit, 0, 2**62, "bytes (0: no limit of our own)")
        _within("stream_port", self.stream_port, 0, 65535, "(0: any free port)")
        _within("peer_bandwidth", self.peer_bandwidth, 0, 2**62, "bytes per second (0: no limit)")
        _within("scrub_bandwidth", self.scrub_bandwidth, 0, 2**62, "bytes per second (0: off)")
        _within("scrub_every", self.scrub_every_s, 0.1, 30 * 24 * 3600.0, "seconds")
        _within("reprotect_after", self.reprotect_after_s, 0.0, 30 * 24 * 3600.0, "seconds (0: off)")
        if self.codec not in CODECS:
            raise ConfigError(f"codec is {self.codec!r}; it must be one of {', '.join(CODECS)}")
        if self.rebuild_spread not in SPREADS:
            raise ConfigError(f"rebuild_spread is {self.rebuild_spread!r}; it must be one of {', '.join(SPREADS)}")
        if not _is_label(self.node_id):
            raise ConfigError(f"node_id is {self.node_id!r}; it is a label for people, printable and at most 200 bytes")
        if not _is_label(self.domain):
            raise ConfigError(f"domain is {self.domain!r}; write it like rack=7, printable and at most 200 bytes")
        self._check_addresses()
        if len(os.fsencode(self.socket)) > 100:
            raise ConfigError(f"the socket's path {self.socket} is longer than the 100 bytes that Unix sockets allow")
        return self

    def _check_addresses(self) -> None:
        """Peers are sent to an address that is one; nobody beyond this machine reaches a daemon that believes all."""
        if self.advertise:
            host, _ = parse_address("advertise", self.advertise)
            if not self.listen:
                raise ConfigError(
                    f"advertise is {self.advertise!r} but listen is not set, so peers would find nobody there; set both"
                )
            self._refuse_network("advertise", self.advertise, host)
        if self.listen:
            host, port = _parse_listen(self.listen)
            self._refuse_network("listen", self.listen, host)
            if not self.advertise and _is_wildcard(host):
                raise ConfigError(
                    f"listen is {self.listen!r}, which is every address of this machine, so peers would not know where "
                    f"to find it; name an interface, or advertise one address"
                )
            if port and port == self.stream_port:
                raise ConfigError(f"listen and stream_port are both {port}; each needs a port of its own (0: any free)")

    def _refuse_network(self, name: str, value: str, host: str) -> None:
        if not self.authenticate and not _is_loopback(host):
            raise ConfigError(
                f"{name} is {value!r}, which is not loopback, and authenticate is off: anyone who reaches this port "
                f"could read training state; leave authenticate on"
            )


@dataclass(frozen=True)
class ClientConfig:
    """What a trainer reads from the environment (SNAPSHOTD_<NAME>); arguments of `protect` win over it."""

    socket: Path = Path("/run/snapshotd.sock")
    job: str = ""
    wait_s: float = 10.0
    gather_s: float = 120.0
    copy_threads: int = 0
    crash: str = ""

    def check(self) -> ClientConfig:
        """Self, if every value is allowed. ConfigError names the first that is not, and the range."""
        _within("wait", self.wait_s, 0.0, 3600.0, "seconds")
        _within("gather", self.gather_s, 1.0, 86400.0, "seconds")
        _within("copy_threads", self.copy_threads, 0, 64, "threads (0: chosen from the cores)")
        return self


def load_daemon_config(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> DaemonConfig:
    """The daemon's settings: flags that are not None, then SNAPSHOTD_…, then the file, then defaults.

    Where an interface is named, its address is filled in.
    """
    settings = _from_file(file, DaemonConfig)
    settings.update(_from_environment(environment, DaemonConfig))
    settings.update({name: value for name, value in flags.items() if value is not None})
    defaults = DaemonConfig(socket=default_socket(environment), shm_dir=Path(f"/dev/shm/snapshotd/{os.getuid()}"))
    config = _build(defaults, settings)
    return with_addresses(config, network_interfaces() if config.interface else {}).check()


def load_client_config(environment: Mapping[str, str]) -> ClientConfig:
    """A trainer's settings from the environment."""
    settings = _from_environment(environment, ClientConfig)
    return _build(ClientConfig(socket=find_socket(environment)), settings).check()


def job_name(explicit: str | None, environment: Mapping[str, str]) -> str:
    """The job's name: `job=`, SNAPSHOTD_JOB, SLURM_JOB_ID, or an explicit rendezvous id of torchrun.

    ConfigError where there is none, since a restarted job finds its snapshots by its name alone.
    """
    slurm = environment.get("SLURM_JOB_ID")
    rendezvous = environment.get("TORCHELASTIC_RUN_ID", "")
    random_id = re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", rendezvous)
    known = "" if rendezvous == "none" or random_id else rendezvous
    name = explicit or environment.get("SNAPSHOTD_JOB") or (f"slurm-{slurm}" if slurm else known)
    if not name:
        raise ConfigError(
            "this job has no name that a restart would carry again (torchrun's own run id is `none` or random), so its "
            'snapshots could not be found; pass job="..." to protect(), set SNAPSHOTD_JOB, or give torchrun --rdzv-id'
        )
    if not _is_label(name):
        raise ConfigError(f"the job's name is {name[:40]!r}; it must be printable and at most 200 bytes long")
    return name


def parse_address(name: str, text: str) -> tuple[str, int]:
    """`HOST:PORT` (`[::1]:PORT` for IPv6; port `*` is 0). ConfigError otherwise."""
    host, colon, port = text.rpartition(":")
    port = "0" if port == "*" else port
    valid = re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[^\s/\[\]:]+", host) and re.fullmatch(r"[0-9]{1,5}", port)
    if not colon or not valid or int(port) > 65535:
        raise ConfigError(f"{name} is {text!r}; write it like 127.0.0.1:7780, with a port below 65536")
    return host.strip("[]"), int(port)


def network_interfaces() -> Interfaces:
    """What this machine has now."""
    import psutil  # takes time that a trainer and a daemon without a named interface need not spend

    families = (sockets.AF_INET, sockets.AF_INET6)
    table = psutil.net_if_addrs()
    return {name: [one.address for one in rows if one.family in families] for name, rows in table.items()}


def interface_address(name: str, interfaces: Interfaces) -> str:
    """The first IPv4 address of an interface, else its first IPv6 address that is not link-local. ConfigError if there
    is none, or no such interface."""
    if name not in interfaces:
        raise ConfigError(f"there is no network interface {name!r} here; there are {', '.join(sorted(interfaces))}")
    found = [ipaddress.ip_address(text) for text in interfaces[name]]
    for version in (4, 6):
        for address in found:
            if address.version == version and (version == 4 or not address.is_link_local):
                return str(address)
    raise ConfigError(f"the network interface {name} has no address that peers could use; bring it up, or name another")


def with_addresses(config: DaemonConfig, interfaces: Interfaces) -> DaemonConfig:
    """The config with the address of its interface as the host of `listen` and `advertise`, where these are not given
    or have the host `*`; ports `*` become 0, and an advertised port 0 becomes that of `listen`. ConfigError for what
    cannot be read or found."""
    own = interface_address(config.interface, interfaces) if config.interface else ""
    listen = config.listen or (f"tcp://*:{LISTEN_PORT}" if own else "")
    if not listen:
        return config
    host, port = _parse_listen(listen)
    advertise = config.advertise or ("*:0" if own else "")
    if advertise:
        known_as, known_port = parse_address("advertise", advertise)
        advertise = _joined(known_as, known_port or port, own)
    return replace(config, listen=f"tcp://{_joined(host, port, own)}", advertise=advertise)


def _parse_listen(listen: str) -> tuple[str, int]:
    if not listen.startswith("tcp://"):
        raise ConfigError(f"listen is {listen!r}; write it like tcp://127.0.0.1:{LISTEN_PORT}")
    return parse_address("listen", listen.removeprefix("tcp://"))


def _joined(host: str, port: int, own: str) -> str:
    host = own if own and host == "*" else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_label(text: str) -> bool:
    """Text that can be printed, sent and stored: surrogates, which bad bytes in the environment become, are neither."""
    return text.isprintable() and len(text.encode()) <= 200


def _is_loopback(host: str) -> bool:
    """An address of this machine that no other can reach. A name that merely begins like one is none."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_wildcard(host: str) -> bool:
    """All addresses at once: good to listen on, and none that a peer could use."""
    try:
        return host == "*" or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _from_file(file: Path | None, kind: type[_T]) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {file} is not valid TOML: {error}") from None
    known = {_public(one.name) for one in fields(kind)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigError(
            f"{file} sets {unknown[0]!r}, which is no setting; the settings are {', '.join(sorted(known))}"
        )
    return {one.name: table[_public(one.name)] for one in fields(kind) if _public(one.name) in table}


def _from_environment(environment: Mapping[str, str], kind: type[_T]) -> dict[str, Any]:
    names = {one.name: f"SNAPSHOTD_{_public(one.name).upper()}" for one in fields(kind)}
    return {name: environment[variable] for name, variable in names.items() if environment.get(variable)}


def _build(defaults: _T, settings: Mapping[str, Any]) -> _T:
    return replace(defaults, **{name: _convert(defaults, name, value) for name, value in settings.items()})


def _convert(defaults: DaemonConfig | ClientConfig, name: str, value: Any) -> Any:
    default = getattr(defaults, name)
    public = _public(name)
    try:
        if not isinstance(value, (str, int, float, Path)) or (
            isinstance(value, bool) and not isinstance(default, bool)
        ):
            raise TypeError(name)
        if name == "memory_limit":
            return parse_bytes(str(value))
        if name in ("peer_bandwidth", "scrub_bandwidth"):
            return parse_bandwidth(str(value))
        if isinstance(default, bool):
            return _boolean(value)
        if isinstance(default, int) and isinstance(value, float):
            raise TypeError(name)
        if isinstance(default, Path):
            return Path(str(value)).expanduser().absolute()
        return type(default)(value)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a home directory that does not exist
        raise ConfigError(f"{public} is {value!r}, which is no {_kind(default)}") from None


def _kind(default: Any) -> str:
    kinds = {bool: "yes or no", int: "whole number", float: "number", str: "text"}
    return kinds.get(type(default), "path")


def _boolean(value: Any) -> bool:
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


def _public(name: str) -> str:
    """A field's name for users: its unit is in the documentation, not in the flag."""
    return name.removesuffix("_s")


def _within(name: str, value: float, low: float, high: float, unit: str) -> None:
    if not low <= value <= high:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        raise ConfigError(f"{name} is {shown}; it must lie between {low:g} and {high:g} {unit}")
