"""Too little memory, wrong places, strangers on the network, and `snapshotd run`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from snapshotd import wire
from snapshotd.errors import NoRoom
from snapshotd.mesh import ask_over_network
from snapshotd.root import Root
from snapshotd.session import reserve
from tests.cluster.daemons import Node, becomes, node, until

MIB = 1 << 20


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_tmpfs_that_is_too_small_is_refused_before_anything_is_allocated(small_tmpfs: Path, tmp_path: Path) -> None:
    with node(small_tmpfs, tmp_path) as daemon:
        trainer = daemon.start().puppet()
        trainer.connect()
        with pytest.raises(NoRoom, match=r"the file system of .* leaves \d+\.\d MiB.*mount -o remount") as refused:
            trainer.grant(slot_bytes=8 * MIB, block_bytes=MIB)
        assert refused.value.needed_bytes > 16 * MIB
        assert refused.value.available_bytes < 8 * MIB
        assert daemon.arenas() == []
        trainer.attach(slot_bytes=2 * MIB, block_bytes=MIB)  # what fits is served
        trainer.snapshot(1)
        becomes(trainer, {1: "COMMITTED"})


def test_a_tmpfs_that_filled_up_since_the_budget_was_checked_is_an_answer_and_stays_as_it_was(
    small_tmpfs: Path,
) -> None:
    root = Root.open(small_tmpfs / "root")
    try:
        before = os.statvfs(small_tmpfs).f_bfree
        draft = root.draft("job", 0, 64 * MIB)
        with pytest.raises(NoRoom, match=r"64\.0 MiB of shared memory could not be reserved"):
            asyncio.run(reserve(draft, -1))
        root.discard(draft)
        assert os.statvfs(small_tmpfs).f_bfree == before
    finally:
        root.close()


def test_our_own_limit_is_kept_and_named(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path, "--memory-limit", "5MiB") as daemon:
        first, second = daemon.start().puppet(), daemon.puppet(job="other")
        first.attach(slot_bytes=2 * MIB, block_bytes=MIB)
        second.connect()
        with pytest.raises(NoRoom, match="memory_limit of this daemon") as refused:
            second.grant(slot_bytes=MIB, block_bytes=MIB)
        assert refused.value.setting == "--memory-limit of `snapshotd serve`"
        first.order("close", first.arena.hex())
        second.grant(slot_bytes=MIB, block_bytes=MIB)


def test_adopted_arenas_count_against_the_limit(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path, "--memory-limit", "5MiB") as daemon:
        first = daemon.start().puppet()
        first.attach(slot_bytes=2 * MIB, block_bytes=MIB)
        daemon.kill()
        second = daemon.start().puppet(job="other")
        second.connect()
        with pytest.raises(NoRoom):
            second.grant(slot_bytes=MIB, block_bytes=MIB)


@pytest.mark.parametrize("kind", ["symlink", "open to others"])
def test_an_unfit_root_ends_the_daemon_with_a_sentence(kind: str, shm_dir: Path, tmp_path: Path) -> None:
    if kind == "symlink":
        (shm_dir / "real").mkdir(mode=0o700)
        (shm_dir / "root").symlink_to(shm_dir / "real")
    else:
        (shm_dir / "root").mkdir()
        (shm_dir / "root").chmod(0o777)
    with node(shm_dir, tmp_path) as daemon:
        assert daemon.spawn().wait() == 2
        assert "cannot hold arenas" in daemon.words()
        assert "Traceback" not in daemon.words()


def test_damaged_files_are_reported_to_the_job_and_in_status(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon:
        daemon.start().commits(1)
        daemon.kill()
        (path,) = daemon.arenas()
        os.truncate(path, path.stat().st_size // 2)
        (sentence,) = daemon.start().status()["damaged"]
        assert str(path) in sentence
        trainer = daemon.puppet(generation=2)
        trainer.connect()
        assert trainer.inventory().damaged == [sentence]
        assert trainer.inventory("another job").damaged == []
        assert path.exists()


def test_bytes_that_rotted_while_no_daemon_looked_are_not_committed(shm_dir: Path, tmp_path: Path) -> None:
    with node(shm_dir, tmp_path) as daemon:
        first, second = daemon.start().pair()
        for puppet in (first, second):
            puppet.snapshot(1)
        for puppet in (first, second):
            becomes(puppet, {1: "COMMITTED"})
        daemon.kill()
        for puppet in (first, second):
            puppet.snapshot(2)
            puppet.kill()
        for path in daemon.arenas():
            with path.open("r+b") as file:
                data = file.read()
                place = data.index(b"at step 2")
                file.seek(place)
                file.write(b"A")
        document = daemon.start().status()
        assert document["jobs"]["job"]["recoverable"]["step"] == 1
        assert document["counters"]["quarantined_total"] == 2


# --- the network -----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_the_listener_tells_the_status_and_drops_everything_else(shm_dir: Path, tmp_path: Path) -> None:
    import zmq

    address = f"tcp://127.0.0.1:{free_port()}"
    flags = ("--listen", address, "--advertise", "localhost:7780", "--authenticate", "no")
    with node(shm_dir, tmp_path, *flags) as daemon:
        daemon.start()
        welcome = ask_over_network(address, wire.Hello("tool", 1), 30)
        assert isinstance(welcome, wire.Welcome)
        assert welcome.pid == daemon.process.pid
        shown = subprocess.run(
            [sys.executable, "-m", "snapshotd", "status", "--json", "--connect", address],
            capture_output=True,
            text=True,
            check=True,
        )
        document = json.loads(shown.stdout)
        assert f"tcp://{document['listen']}" == address
        assert document["advertise"] == "localhost:7780"
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(address)
            stranger.send(b"nonsense of more than sixteen bytes")
            stranger.send(wire.pack(wire.Stop()))
            stranger.send_multipart([b"two", b"parts"])
            reasons = {"listen-magic": 1, "listen-unserved": 1, "listen-parts": 1}
            until(lambda: daemon.dropped() == reasons, f"{reasons}, and not {daemon.dropped()}")
        assert daemon.answers()


def test_a_port_that_is_taken_ends_the_daemon_with_a_sentence(shm_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with node(shm_dir, tmp_path, "--listen", f"tcp://127.0.0.1:{taken.getsockname()[1]}") as daemon:
            assert daemon.spawn().wait() == 2
            assert "cannot be listened on" in daemon.words()


# --- run -------------------------------------------------------------------------------------------


@pytest.fixture
def runner(shm_dir: Path, tmp_path: Path) -> Iterator[Node]:
    """Where `snapshotd run` starts its daemon; that is stopped with the test."""
    one = Node(shm_dir, tmp_path)
    yield one
    subprocess.run([sys.executable, "-m", "snapshotd", "stop", "--socket", str(one.socket)], capture_output=True)
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
        pid = int((one.root / "daemon.lock").read_text())
        psutil.Process(pid).wait(30)


def start_run(where: Node, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "snapshotd", "run", "--job", "j", "--socket", str(where.socket), "--", *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SNAPSHOTD_SHM_DIR": str(where.root)},
    )


def test_run_starts_a_daemon_that_outlives_the_command(runner: Node) -> None:
    names = "('SNAPSHOTD_SOCKET', 'SNAPSHOTD_JOB', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE')"
    run = start_run(runner, sys.executable, "-c", f"import os; print([os.environ[name] for name in {names}]); exit(7)")
    out, _ = run.communicate(timeout=240)
    assert out == f"{[str(runner.socket), 'j', '1']}\n"
    assert run.returncode == 7
    assert runner.status()["shm_dir"] == str(runner.root)
    pid = runner.status()["pid"]
    assert start_run(runner, "true").wait() == 0
    assert runner.status()["pid"] == pid
    assert "serving" in runner.socket.with_suffix(".log").read_text()


def test_run_hands_signals_on_and_tells_by_which_the_command_ended(runner: Node) -> None:
    run = start_run(runner, sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)")
    assert run.stdout is not None
    assert run.stdout.readline() == "here\n"
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM
    run.stdout.close()


def test_run_says_when_the_command_does_not_exist(runner: Node) -> None:
    run = start_run(runner, "/nonexistent/command")
    run.communicate()
    assert run.returncode == 127


def test_run_ends_with_a_sentence_where_no_daemon_can_be_started(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "snapshotd", "run", "--socket", str(tmp_path / "s"), "--", "true"],
        capture_output=True,
        text=True,
        env={**os.environ, "SNAPSHOTD_SHM_DIR": str(tmp_path / "missing" / "root")},
    )
    assert ended.returncode == 1
    assert "no daemon could be started" in ended.stderr
    assert "cannot hold arenas" in ended.stderr
