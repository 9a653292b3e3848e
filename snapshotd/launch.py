"""`snapshotd run`: a daemon for one machine without anybody having to think of it, and the command beside it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from snapshotd import wire
from snapshotd.clock import SystemClock
from snapshotd.door_client import DoorClient
from snapshotd.errors import ConfigError, DaemonUnavailable, SnapshotError

START_MAX_S = 20.0
_LOOK_EVERY_S = 0.05
_LOG_LINES = 5
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_CLOCK = SystemClock()


def run(command: Sequence[str], socket: Path, job: str | None, environment: dict[str, str]) -> int:
    """Run `command` to its end and return its exit status (128 + n where signal n ended it).

    The connection that is held meanwhile keeps a daemon that was started here from ending before the command does.
    """
    environment = environment | {"SNAPSHOTD_SOCKET": str(socket), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if job:
        environment["SNAPSHOTD_JOB"] = job
    with _daemon(socket, environment):
        return _supervise(command, environment)


def _daemon(socket: Path, environment: dict[str, str]) -> DoorClient:
    """A connection to this node's daemon, started now if none answers."""
    with contextlib.suppress(DaemonUnavailable):
        return _greet(socket)
    log = socket.with_suffix(".log")
    daemon = _start(socket, log, environment)
    deadline_s = _CLOCK.monotonic_s() + START_MAX_S
    while True:
        with contextlib.suppress(DaemonUnavailable):
            return _greet(socket)
        if daemon.poll() is not None or _CLOCK.monotonic_s() > deadline_s:
            with contextlib.suppress(DaemonUnavailable):  # another `run` may have been faster
                return _greet(socket)
            raise SnapshotError(f"no daemon could be started, so the command was not run; {_last_words(log)}")
        threading.Event().wait(_LOOK_EVERY_S)


def _greet(socket: Path) -> DoorClient:
    door = DoorClient.connect(socket, timeout_s=1.0)
    try:
        door.ask(wire.Hello("tool", os.getpid()), timeout_s=5.0)
    except BaseException:
        door.close()
        raise
    return door


def _start(socket: Path, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A daemon in a session of its own: it outlives us and our terminal."""
    command = [sys.executable, "-m", "snapshotd", "serve", "--socket", str(socket), "--exit-idle"]
    try:
        fd = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the daemon's log {log} cannot be written ({error.strerror}); choose another --socket"
        ) from None
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, env=environment, start_new_session=True
        )
    finally:
        os.close(fd)


def _last_words(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
        return f"the end of {log} says: " + " / ".join(lines)
    return f"{log} has nothing to say"


def _supervise(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run the command and hand on the signals that were sent to us; those of a terminal reach it anyway."""
    watched = {*_FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        child = subprocess.Popen(
            command, env=environment, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before) and None
        )
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        print(f"snapshotd run: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return 127
    try:
        while child.poll() is None:
            news = signal.sigtimedwait(watched, 1.0)
            if news is not None and news.si_signo in _FORWARDED and news.si_code <= 0:  # from a process, not a terminal
                child.send_signal(news.si_signo)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
