"""docs/guarantees.md names an assumption and tests for each promise, and every test that it names exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
PROMISES = dict(re.findall(r"^### (.+)\n((?:(?!^##).*\n)*)", PAGE, re.MULTILINE))


@functools.cache
def collected_from(path: str) -> set[str]:
    """Names at the top of a file that pytest would collect."""
    found: set[str] = set()
    for node in ast.parse((REPOSITORY / path).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if name.lower().startswith("test")}


def test_every_test_that_the_page_names_exists() -> None:
    assert NAMED
    assert [f"{path}::{name}" for path, name in NAMED if name not in collected_from(path)] == []


def test_every_promise_has_an_assumption_and_a_test() -> None:
    shown = re.compile(r"^\* `tests/[\w/]+\.py::\w+`", re.MULTILINE)
    assert [one for one, text in PROMISES.items() if "\nRests on: " not in text or not shown.search(text)] == []


def test_each_invariant_is_a_promise_of_the_page() -> None:
    assert [name.partition(":")[0] for name in PROMISES if re.match(r"I\d:", name)] == ["I1", "I2", "I3", "I4", "I5"]


def test_every_reference_to_a_test_is_one_that_is_checked() -> None:
    assert len(re.findall(r"::", PAGE.replace("PATH::NAME", ""))) == len(re.findall(r"`tests/[\w/]+\.py::\w+`", PAGE))
