"""One target, fuzzed for some time in a process of its own: with atheris where it is installed, else by mutation alone.

    python -m tests.fuzz.worker TARGET SECONDS SEED FOLDER

`FOLDER/last` is what was run last (so a crash of native code has its input), `FOLDER/finding-…` what was a finding.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from snapshotd.clock import SystemClock

TIMEOUT_S, MEMORY_MIB = 20, 2048
LENGTH_MAX = 16384


def with_atheris(name: str, seconds: int, seed: int, folder: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["snapshotd", "tests.fuzz.targets"]):
        from tests.fuzz.targets import TARGETS

    target, grown = TARGETS[name], folder / "grown"
    grown.mkdir(exist_ok=True)
    for data in [*target.seeds(), *(path.read_bytes() for path in target.kept())]:
        (grown / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    options = [
        f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={folder}/finding-", f"-timeout={TIMEOUT_S}",
        f"-rss_limit_mb={MEMORY_MIB}", f"-max_len={LENGTH_MAX}", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(grown)], target.run)
    atheris.Fuzz()


def by_mutation(name: str, seconds: int, seed: int, folder: Path) -> int:
    """Runs; the first finding is raised, its input kept."""
    from tests.fuzz.targets import TARGETS, mutations

    clock, draw = SystemClock(), random.Random(seed).randrange
    target = TARGETS[name]
    seeds = [*target.seeds(), *(path.read_bytes() for path in target.kept())]
    until_s = clock.monotonic_s() + seconds
    for count, data in zip(itertools.count(1), mutations(seeds, draw), strict=False):
        (folder / "last").write_bytes(data[:LENGTH_MAX])
        _run(target.run, data[:LENGTH_MAX], folder)
        if clock.monotonic_s() > until_s:
            return count
    raise AssertionError("mutations have no end")


def _run(run: Callable[[bytes], object], data: bytes, folder: Path) -> None:
    try:
        run(data)
    except BaseException:
        (folder / f"finding-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
        raise


def main(name: str, seconds: str, seed: str, folder: str) -> int:
    try:
        import atheris  # noqa: F401
    except ImportError:
        try:
            print(f"stat::number_of_executed_units: {by_mutation(name, int(seconds), int(seed), Path(folder))}")
        except Exception:
            traceback.print_exc()
            return 77
        return 0
    with_atheris(name, int(seconds), int(seed), Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
