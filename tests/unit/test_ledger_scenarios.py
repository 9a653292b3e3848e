"""Each rule of commit and recovery on one node as a scenario that can be read: tests/scenarios/*.txt.

After a change that is meant, `REWRITE=1 pytest tests/unit/test_ledger_scenarios.py` writes the answers anew; read the
difference before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.scenarios.play import Player, blocks, render

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios").glob("*.txt"))


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 10


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_scenario_goes_as_written(path: Path) -> None:
    text = path.read_text()
    player = Player()
    played = [one._replace(expected=player.play(one.command)) if one.command else one for one in blocks(text)]
    if os.environ.get("REWRITE"):
        path.write_text(render(played))
    else:
        assert render(played) == text
