"""A daemon that `snapshotd run` started ends once nobody needs it, and no sooner."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from snapshotd import daemon as daemon_module
from snapshotd import wire
from snapshotd.clock import SystemClock
from snapshotd.config import DaemonConfig
from snapshotd.daemon import Daemon
from snapshotd.door_client import DoorClient


@pytest.fixture
def config(shm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DaemonConfig:
    monkeypatch.setattr(daemon_module, "HOUSEKEEPING_S", 0.005)
    monkeypatch.setattr(daemon_module, "IDLE_S", 0.01)
    monkeypatch.setattr(daemon_module, "IDLE_BEFORE_FIRST_S", 0.02)
    return DaemonConfig(socket=tmp_path / "s", shm_dir=shm_dir / "root", exit_idle=True)


def test_a_daemon_that_nobody_visits_ends_by_itself(config: DaemonConfig) -> None:
    asyncio.run(Daemon(config, SystemClock()).run())
    assert not config.socket.exists()


def test_a_visitor_keeps_it_until_he_leaves(config: DaemonConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "IDLE_BEFORE_FIRST_S", 600.0)
    answered: list[wire.Reply] = []

    def visit() -> None:
        while not config.socket.exists():
            threading.Event().wait(0.002)
        with DoorClient.connect(config.socket) as door:
            for _ in range(3):
                answered.append(door.ask(wire.Hello("tool", 1))[0])
                threading.Event().wait(0.05)  # longer than an idle daemon would live

    visitor = threading.Thread(target=visit)
    visitor.start()
    asyncio.run(Daemon(config, SystemClock()).run())
    visitor.join()
    assert len(answered) == 3
