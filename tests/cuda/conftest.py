"""Every test here runs with nvcc only, is marked `cuda`, and fails for whatever the simulator found meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda import support

HERE = Path(__file__).resolve().parent
_seen: dict[str, set[int]] = {"schedules": set(), "archs": set()}
_counts = {"runs": 0, "findings": 0}
_simulators: list[support.Simulator] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(scope="session")
def simulator() -> support.Simulator:
    if support.nvcc() is None:
        pytest.skip("nvcc is not here: the CUDA module can be neither built nor simulated")
    made = support.Simulator()
    _simulators.append(made)
    return made


@pytest.fixture
def sim(simulator: support.Simulator) -> Iterator[Running]:
    """The simulator, for tests that say themselves which schedule and architecture they want."""
    running = Running(simulator)
    running.on(support.LAZY)
    yield running
    running.settle()


class Running:
    """One test's use of the simulator."""

    def __init__(self, simulator: support.Simulator) -> None:
        self.simulator, self.cuda = simulator, simulator.cuda
        self._fresh = True

    def on(self, schedule: int, arch: int = 0, device_bytes: int = 1 << 40) -> None:
        """Go on with a fresh device."""
        if not self._fresh:
            self.settle()
        self.simulator.reset(schedule, arch, device_bytes)
        self._fresh = False
        _seen["schedules"].add(schedule)
        if arch:
            _seen["archs"].add(arch)
        _counts["runs"] += 1

    def settle(self) -> None:
        """Nothing may have been found, and everything must have been given back."""
        found = self.simulator.findings(leaks=True)
        _counts["findings"] += len(found)
        self.simulator.reset()
        assert not found, "the simulator found: " + "; ".join(found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _simulators:
        return
    totals = _simulators[0].totals()
    launches, instructions = totals.pop("launches"), totals.pop("instructions")
    counts = [count for name, count in totals.items() if not name.startswith("_Z")]  # those are the tests' own
    terminalreporter.write_line(
        f"CUDA without a GPU: {sum(count > 0 for count in counts)} of {len(counts)} kernels x "
        f"{len(_seen['schedules'])} schedules x {len(_seen['archs'])} architectures; "
        f"{_counts['runs']} fresh devices, {launches} launches, "
        f"{instructions / 1e6:.0f} M instructions of PTX; findings: {_counts['findings']}"
    )
