"""Fuzz every parser: `python -m tests.fuzz --seconds 300`, or `make fuzz SECONDS=300`.

Each target runs in a process of its own, as many at once as there are cores, and gets its share of the time. Prints a
line for each; what was found is kept in tests/fuzz/corpus, where `make test` tries it from then on. Exit status 1 then.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.targets import CORPUS, TARGETS

GROWN = Path(__file__).parents[2] / "build" / "fuzz"
START_MAX_S, TOLD_LINES = 120, 30


@dataclass(frozen=True)
class Outcome:
    """What came of one target. `words` are the end of its output, where it found something or could not run."""

    name: str
    runs: int
    findings: tuple[Path, ...]
    status: int
    words: str


def fuzz(name: str, seconds: int, seed: int) -> Outcome:
    """One target for so long."""
    grown = GROWN / name
    grown.mkdir(parents=True, exist_ok=True)  # what reached something new is where the next run begins
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "grown").symlink_to(grown.resolve())
        command = [sys.executable, "-m", "tests.fuzz.worker", name, str(seconds), str(seed), scratch]
        try:
            done = subprocess.run(command, capture_output=True, timeout=seconds + START_MAX_S)
            status, output = done.returncode, (done.stderr + done.stdout).decode(errors="replace")
        except subprocess.TimeoutExpired:
            status, output = -1, f"it did not end within {seconds + START_MAX_S} s"
        found = [path.read_bytes() for path in folder.glob("finding-*")]
        if status < 0 and not found and (folder / "last").exists():
            found = [(folder / "last").read_bytes()]
        runs = re.search(r"number_of_executed_units: (\d+)", output)
        words = "" if status == 0 and not found else "\n".join(output.strip().splitlines()[-TOLD_LINES:])
        return Outcome(name, int(runs[1]) if runs else 0, tuple(keep(name, data) for data in found), status, words)


def keep(name: str, data: bytes) -> Path:
    """Put a finding where `make test` tries it."""
    path = CORPUS / name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big") + 1)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    cores = min(os.cpu_count() or 1, len(names))
    share = max(1, options.seconds * cores // len(names))
    how = "atheris, guided by coverage" if importlib.util.find_spec("atheris") else "mutation without coverage"
    print(f"{len(names)} targets for {share} s each, {cores} at once, seed {options.seed}: {how}", flush=True)
    with ThreadPoolExecutor(cores) as threads:
        outcomes = list(threads.map(lambda name: fuzz(name, share, options.seed), names))
    for one in outcomes:
        print(
            f"{one.name:10} {one.runs:>10} runs  {len(one.findings)} new findings  {len(TARGETS[one.name].kept())} kept"
        )
    bad = [one for one in outcomes if one.status or one.findings]
    for one in bad:
        print(f"\n{one.name} ended with status {one.status}; kept: {', '.join(map(str, one.findings)) or 'nothing'}")
        print(one.words)
    found = sum(len(one.findings) for one in outcomes)
    print(f"{sum(one.runs for one in outcomes)} runs, {found} new findings")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
