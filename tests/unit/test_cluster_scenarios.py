"""Each rule of commit and recovery over several nodes as a scenario that can be read: tests/sim/scripts/*.txt.

After a change that is meant, `REWRITE=1 pytest tests/unit/test_cluster_scenarios.py` writes the answers anew; read the
difference before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.scenarios.cluster_play import Player, replayed
from tests.scenarios.play import blocks

SCENARIOS = sorted((Path(__file__).parent.parent / "sim" / "scripts").glob("*.txt"))


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 40


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_begins_with_the_rule_that_it_shows(path: Path) -> None:
    assert next(blocks(path.read_text())).comment.startswith("# ")


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_scenario_goes_as_written(path: Path) -> None:
    text = path.read_text()
    played = replayed(text)
    if os.environ.get("REWRITE"):
        path.write_text(played)
    else:
        assert played == text


def test_a_step_that_is_damaged_between_two_marks_does_not_stop_all_commits() -> None:
    history = """
        begin g1 on n0=0,1 n1=2 n2=3 parity=1
        everyone commits 1
        everyone takes 2
        everyone finishes
        everyone tells
        deliver
        everyone protects
        n1 tells
        n2 tells
        deliver n1 -> n0
        deliver n2 -> n0 and dies at commit.marked 2
        n0 restarts
        damage r1 g1:2
        n0 rejoins
        settle
        everyone commits 5
    """
    player = Player()
    try:
        for command in history.strip().splitlines():
            player.play(command.strip())
    finally:
        player.close()
