"""The codec that a daemon uses: which one is chosen and why, and that a device makes the same bytes or none.

The device here is the module's host threads, which do what the kernels would; tests/cuda has a simulated one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from snapshotd import accelerator, cli
from snapshotd.accelerator import Accelerator
from snapshotd.errors import ConfigError
from tests.unit.groups import group, protected
from tests.unit.native_support import BLOCK
from tests.unit.test_protect import UNEVEN, is_whole


def ticks() -> Any:
    """A clock that goes on by a second at each look."""
    return itertools.count().__next__


class Broken:
    """A device that is there, and fails at whatever it is asked."""

    name = "broken:0"


class Refusing:
    """A module whose every object refuses."""

    def __getattr__(self, _: str) -> Any:
        def refuse(*_: Any, **__: Any) -> Any:
            raise RuntimeError("planted")

        return refuse


@pytest.fixture
def host() -> Any:
    cuda = pytest.importorskip("snapshotd._cuda", reason="the CUDA module was not built: there is no nvcc here")
    return cuda.Device("host")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    monkeypatch.setattr(accelerator, "load", Refusing)
    yield Accelerator("cuda", ticks(), Broken())


@pytest.mark.parametrize("parity", [1, 2])
def test_a_device_makes_the_same_parity_and_shards(host: Any, parity: int) -> None:
    with group(UNEVEN, parity, blocks=(BLOCK, 2 * BLOCK)) as one:
        one.tools.accelerator = Accelerator("cuda", ticks(), host)
        one.protect()
        for position in range(len(UNEVEN)):
            is_whole(one, position)
        for rank in one.ranks_at(0):
            assert one.comes_back(one.without(rank, 0)) == []
        assert {fact["codec"] for fact in one.tools.accelerator.facts()["chosen"]} == {"cuda"}
        one.tools.accelerator = None


def test_auto_measures_both_once_takes_one_and_says_so(host: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "snapshotd")
    chooser = Accelerator("auto", ticks(), host)
    with group(UNEVEN, 1) as one:
        one.tools.accelerator = chooser
        one.protect()
        for position in range(len(UNEVEN)):
            is_whole(one, position)
        one.tools.accelerator = None
    (fact,) = chooser.facts()["chosen"]
    assert (fact["k"], fact["m"], fact["block_bytes"]) == (2, 1, BLOCK)
    assert "measured: cuda" in fact["why"] and "over the bus, cpu" in fact["why"]
    assert sum("codec for k=2, m=1" in record.message for record in caplog.records) == 1


def test_a_device_that_fails_leaves_its_window_to_the_processor_and_is_not_asked_again(
    host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chooser = Accelerator("cuda", ticks(), host)

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(accelerator.Bench, "combine", fail)
    with group(UNEVEN, 2) as one:
        one.tools.accelerator = chooser
        one.protect()
        for position in range(len(UNEVEN)):
            is_whole(one, position)
        one.tools.accelerator = None
    assert "the GPU failed (planted)" in chooser.facts()["why"]
    assert sum("parity is made as before" in record.message for record in caplog.records) == 1


def test_a_device_that_cannot_even_be_prepared_costs_nothing(broken: Accelerator) -> None:
    with protected(UNEVEN, 1) as one:
        one.tools.accelerator = broken
        one.comes_back(one.without(one.ranks_at(1)[0], 1))
        one.tools.accelerator = None
    assert "the GPU failed (planted)" in broken.facts()["why"]


def test_windows_of_too_many_symbols_are_left_to_the_processor(host: Any) -> None:
    chooser = Accelerator("cuda", ticks(), host)
    assert chooser.bench(200, 2, BLOCK, 4 << 20, "planes") is None
    assert "more than is pinned" in chooser.facts()["chosen"][0]["why"]


def test_without_a_device_auto_is_the_processor_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "find_device", lambda: (None, "no GPU: there is no NVIDIA driver"))
    chooser = accelerator.open_for("auto", ticks())
    assert chooser.bench(6, 2, BLOCK, 4 << 20, "planes") is None and "no GPU" in chooser.facts()["why"]
    with pytest.raises(ConfigError, match=r"codec is 'cuda', but there is no GPU.*set codec to auto or cpu"):
        accelerator.open_for("cuda", ticks())


def test_a_daemon_alone_never_looks_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> Any:
        raise AssertionError("it was asked")

    monkeypatch.setattr(accelerator, "find_device", look)
    for setting in ("auto", "cpu"):
        assert accelerator.open_for(setting, ticks()).facts()["chosen"] == []


def test_serve_refuses_a_codec_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerator, "find_device", lambda: (None, "no GPU: there is no NVIDIA driver"))
    assert cli.main(["serve", "--codec", "cuda"]) == 2
    assert "codec is 'cuda', but there is no GPU" in capsys.readouterr().err
    assert cli.main(["serve", "--codec", "gpu"]) == 2
    assert "it must be one of auto, cpu, cuda" in capsys.readouterr().err
