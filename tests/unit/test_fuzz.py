"""Every parser holds its promise (tests/fuzz/targets.py) for mutated inputs and for all that were findings once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import wire
from snapshotd.errors import ProtocolError
from tests.fuzz import __main__ as driver
from tests.fuzz import targets, worker
from tests.fuzz.targets import TARGETS, Target

EVERY = pytest.mark.parametrize("name", sorted(TARGETS))


@EVERY
def test_sound_inputs_and_all_that_were_findings_once_are_dealt_with(name: str) -> None:
    for data in [*TARGETS[name].seeds(), *(path.read_bytes() for path in TARGETS[name].kept())]:
        TARGETS[name].run(data)


@EVERY
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_mutated_inputs_are_dealt_with(name: str, seed: int) -> None:
    target = TARGETS[name]
    TARGETS[name].run(next(targets.mutations(target.seeds(), random.Random(seed).randrange)))


def test_findings_are_kept_under_targets_that_exist() -> None:
    assert {path.name for path in targets.CORPUS.iterdir() if path.is_dir()} <= TARGETS.keys()


def test_every_message_is_among_those_that_are_mutated() -> None:
    names = set()
    for frame in targets.messages():
        for unpack in (wire.unpack_request, wire.unpack_reply):
            try:
                names.add(type(unpack(frame)).__name__)
            except ProtocolError:
                continue
    assert names == {kind.__name__ for kind in get_args(wire.Message)}


def test_a_parser_that_fails_ends_the_fuzzing_and_its_input_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(data: bytes) -> None:
        if data != b"good":
            raise KeyError(data)

    monkeypatch.setitem(TARGETS, "fragile", Target("fragile", fragile, lambda: [b"good"]))
    monkeypatch.setattr(driver, "CORPUS", tmp_path / "corpus")
    with pytest.raises(KeyError) as failed:
        worker.by_mutation("fragile", 600, 1, tmp_path)
    (found,) = tmp_path.glob("finding-*")
    assert found.read_bytes() == failed.value.args[0]
    assert driver.keep("fragile", found.read_bytes()).read_bytes() == found.read_bytes()
