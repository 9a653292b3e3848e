"""The `snapshotd` command. Exit status: 0 done, 1 it could not be done, 2 wrong usage or settings."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from snapshotd import faults, wire
from snapshotd.budget import shown
from snapshotd.clock import SystemClock
from snapshotd.config import DaemonConfig, find_socket, load_client_config, load_daemon_config
from snapshotd.door_client import DoorClient
from snapshotd.errors import ConfigError, DaemonUnavailable, ProtocolError, SnapshotError

SETTINGS: Mapping[str, tuple[str, str]] = {
    "node_id": ("LABEL", "what people call this node (default: the host's name)"),
    "interface": (
        "NAME",
        "the network interface that peers use, like eth1 or ib0: the host of listen and advertise where they have none "
        "or *; the wrong one costs minutes at every recovery (torchft #329: 800 s, on the right one 20 s)",
    ),
    "listen": (
        "tcp://HOST:PORT",
        "answer peers and status questions here; port 0 or *: any free one (default: off, with an interface port 7780 "
        "of its address)",
    ),
    "advertise": (
        "HOST:PORT",
        "the address that peers are given; port 0: that of listen (default: as listen)",
    ),
    "stream_port": ("PORT", "TCP port from which peers read the bytes of snapshots (default: 0, any free one)"),
    "domain": (
        "LABEL",
        "what fails together with this node, in free text, the widest first, like rack=7 or rack=7,switch=2: the nodes "
        "of a group are spread over different ones where they can be (default: none)",
    ),
    "peer_bandwidth": (
        "BYTES",
        "most bytes a second that this node pulls from peers, like 2GB/s (default: 0, no limit)",
    ),
    "scrub_bandwidth": (
        "BYTES",
        "most bytes a second that are read again to find and repair what rotted in memory, like 1GB/s; 0: none "
        "(default: 200MB/s)",
    ),
    "scrub_every_s": (
        "SECONDS",
        "how long after its commit, and after each reading, a snapshot that is still the newest is read again "
        "(default: 300)",
    ),
    "reprotect_after_s": (
        "SECONDS",
        "how long a node of a job that waits is missed until the others rebuild what it held and protect it anew among "
        "themselves, in memory of their own; longer than a restart usually takes; 0: never (default: 120)",
    ),
    "codec": (
        "auto|cpu|cuda",
        "what makes parity and rebuilds: auto measures both where there is a CUDA device and takes the faster "
        "(default: auto)",
    ),
    "rebuild_spread": (
        "auto|yes|no",
        "have the other nodes decode a lost shard and forward it, so that this node receives what it lost once and not "
        "once for every piece: auto does where some of them are on other hosts (default: auto)",
    ),
    "authenticate": (
        "yes|no",
        "peers prove who they are, and what they say and send is encrypted; no is for loopback alone, where every user "
        "of the machine could then read training state (default: yes)",
    ),
    "socket": ("PATH", "where trainers and tools knock (default: $XDG_RUNTIME_DIR/snapshotd.sock, else /run/…)"),
    "shm_dir": ("DIR", "the directory on tmpfs that holds the arenas (default: /dev/shm/snapshotd/<uid>)"),
    "memory_limit": ("BYTES", "most memory for arenas, like 64GiB (default: what tmpfs and cgroups allow)"),
    "claim_wait_s": ("SECONDS", "how long a claim waits for a rank's last trainer to end (default: 10)"),
    "lease_s": ("SECONDS", "arenas that no trainer comes back for are freed after this (default: 86400)"),
    "exit_idle": ("yes|no", "end once nobody is connected and no arena is left (default: no)"),
    "crash": ("POINT[:N]", "die by SIGKILL at this point, for tests of recovery (default: off)"),
}
ASK_S = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(given).parse_args(given)
    try:
        return int(options.do(options))
    except SnapshotError as error:
        print(f"snapshotd: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `snapshotd status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The whole command line. The drill's part, which imports much, is laid out in full only where it is `given`."""
    parser = argparse.ArgumentParser(
        prog="snapshotd", description="Keeps the state of PyTorch training in host memory, outside the trainer."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    stop = _add(commands, "stop", "end the daemon; what it keeps stays in memory for the next one", _stop)
    status = _add(commands, "status", "what is kept, and what could be restored and why; changes nothing", _status)
    status.add_argument("--json", action="store_true", help="the whole document, as docs/status.md describes it")
    status.add_argument("--connect", metavar="tcp://HOST:PORT", help="ask a daemon that listens there")
    collect = _add(commands, "gc", "dismiss what is kept for jobs that no living trainer holds", _collect)
    collect.add_argument("--job", help="only of this job")
    collect.add_argument("--generation", type=int, help="only of this generation number")
    run = _add(commands, "run", "run a command beside a daemon, which is started if none answers", _run)
    run.add_argument("--job", help="the job's name (SNAPSHOTD_JOB for the command)")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …", help="for example: -- torchrun …")
    for one in (stop, status, collect, run):
        one.add_argument("--socket", type=Path, metavar="PATH", help="the daemon's socket (SNAPSHOTD_SOCKET)")
    drill = _add(commands, "drill", "kill a real training run here and show that it comes back bit for bit", _drill)
    if "drill" in given[:1]:
        from snapshotd.drill import add_arguments

        add_arguments(drill)
    return parser


def _add(commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, do: object) -> (
    argparse.ArgumentParser
):  # fmt: skip
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(do=do)
    return parser


# --- serve ---------------------------------------------------------------------------------------


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = _add(commands, "serve", "be this node's daemon", _serve)
    serve.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with any of the settings below")
    serve.add_argument("--verbose", action="store_true", help="log every commit and freed slot too")
    settings = serve.add_argument_group(
        "settings", "each is a flag, a key of the TOML file, or an environment variable; the first of flag, variable, "
        "file that has it wins"
    )  # fmt: skip
    for one in fields(DaemonConfig):
        public = one.name.removesuffix("_s")
        placeholder, text = SETTINGS[one.name]
        settings.add_argument(
            f"--{public.replace('_', '-')}",
            dest=one.name,
            metavar=placeholder,
            nargs="?" if isinstance(one.default, bool) else None,
            const="yes" if isinstance(one.default, bool) else None,
            help=f"{text} [{public} = …, SNAPSHOTD_{public.upper()}]",
        )


def _serve(options: argparse.Namespace) -> int:
    flags = {one.name: getattr(options, one.name) for one in fields(DaemonConfig)}
    config = load_daemon_config(flags, os.environ, options.config)
    try:
        faults.arm(config.crash)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    from snapshotd.daemon import serve

    serve(config, SystemClock())
    return 0


# --- tools ---------------------------------------------------------------------------------------


def _stop(options: argparse.Namespace) -> int:
    _ask(_socket(options), wire.Stop())
    return 0


def _status(options: argparse.Namespace) -> int:
    reply = _status_elsewhere(options) if options.connect else _ask(_socket(options), wire.AskStatus())
    if not isinstance(reply, wire.StatusReport):
        raise ProtocolError("unexpected", "the daemon answered with something else; install the same release")
    document = json.loads(reply.document)
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        from snapshotd import status

        print(status.text(document))
    return 0


def _status_elsewhere(options: argparse.Namespace) -> wire.Reply:
    """By way of our own daemon, which its peers believe; in the clear where there is none, or it has no peers."""
    with contextlib.suppress(DaemonUnavailable):
        reply = _ask(_socket(options), wire.AskStatus(options.connect))
        if isinstance(reply, wire.StatusReport):
            return reply
    from snapshotd.mesh import ask_over_network

    return ask_over_network(options.connect, wire.AskStatus(), ASK_S)


def _collect(options: argparse.Namespace) -> int:
    if options.generation is not None and options.generation < 0:
        raise ConfigError(f"--generation is {options.generation}; generations count from 1")
    reply = _ask(_socket(options), wire.Collect(options.job, options.generation))
    if not isinstance(reply, wire.Collected):
        raise ProtocolError("unexpected", "the daemon answered with something else; install the same release")
    print(f"freed {reply.arenas} arenas, {shown(reply.freed_bytes)}")
    for sentence in reply.kept:
        print(f"kept: {sentence}")
    return 0


def _socket(options: argparse.Namespace) -> Path:
    """The daemon that a tool means: flag, SNAPSHOTD_SOCKET, the user's own, the system's."""
    return Path(options.socket) if options.socket else load_client_config(os.environ).socket


def _ask(socket: Path, request: wire.Request) -> wire.Reply:
    with DoorClient.connect(socket, timeout_s=5.0) as door:
        door.ask(wire.Hello("tool", os.getpid()), timeout_s=ASK_S)
        reply, _ = door.ask(request, timeout_s=ASK_S)
        return reply


# --- run and drill -------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from snapshotd.launch import run

    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise ConfigError("there is no command to run; write it after --, like `snapshotd run -- torchrun train.py`")
    given = options.socket or os.environ.get("SNAPSHOTD_SOCKET")
    socket = Path(given).expanduser().absolute() if given else find_socket(os.environ)
    return run(command, socket, options.job, dict(os.environ))


def _drill(options: argparse.Namespace) -> int:
    from snapshotd import drill

    return drill.run_drill(drill.DrillOptions.of(options))
