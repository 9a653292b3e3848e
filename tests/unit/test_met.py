"""Whom a daemon can ask while a job waits: remembered over restarts, forgotten with the job, and never trusted to be
sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.met import Met
from snapshotd.root import MET, Root
from snapshotd.wire import Place


def place(node: int, port: int = 1) -> Place:
    return Place(bytes([node]) * 16, f"node {node}", f"10.0.0.{node}:{port}", "", [node])


@pytest.fixture
def root(shm_dir: Path) -> Iterator[Root]:
    found = Root.open(shm_dir / "root")
    yield found
    found.close()


def test_what_was_met_is_known_to_the_next_daemon(root: Root) -> None:
    met = Met(root)
    met.add("a", [place(1)])
    met.add("a", [place(2)])
    met.add("b", [place(3)])
    met.add("a", [place(1, port=9)])
    assert Met(root).of("a") == {bytes([1]) * 16: "10.0.0.1:9", bytes([2]) * 16: "10.0.0.2:1"}
    assert Met(root).of("b") == {bytes([3]) * 16: "10.0.0.3:1"} and Met(root).of("c") == {}


def test_after_a_commit_only_its_nodes_matter_and_after_a_job_nobody(root: Root) -> None:
    met = Met(root)
    met.add("a", [place(1), place(2)])
    met.add("b", [place(3)])
    met.only("a", [place(2)])
    assert list(Met(root).of("a")) == [bytes([2]) * 16]
    met.keep(["b"])
    assert not Met(root).of("a") and Met(root).of("b")


def test_what_did_not_change_is_not_written_again(root: Root) -> None:
    met = Met(root)
    met.add("a", [place(1)])
    root.remember(MET, b"")
    met.add("a", [place(1)])
    met.only("a", [place(1)])
    met.keep(["a"])
    assert root.recall(MET) == b""


@given(st.binary(max_size=60))
def test_bytes_that_nobody_wrote_are_nobody(data: bytes) -> None:
    class Rotten:
        def recall(self, name: str) -> bytes:
            return data

        def remember(self, name: str, data: bytes) -> None:
            raise AssertionError

    assert all(isinstance(node, bytes) for job in ("a", "") for node in Met(Rotten()).of(job))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"a": {b"short": "x:1"}}, {"a": {bytes(16): 5}}, [1], {"a": {bytes(16): "x" * 301}}])
def test_what_is_no_address_book_is_none(root: Root, wrong: object) -> None:
    root.remember(MET, msgspec.msgpack.encode(wrong))
    assert Met(root).of("a") == {}
