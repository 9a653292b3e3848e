"""docs/protocol.md says what the code says: every message with its fields, every crash point, versions and tags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from msgspec import Struct

from snapshotd import _native, errors, faults, parityset, wire

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
STRUCTS = {name: one for name, one in vars(wire).items() if isinstance(one, type) and issubclass(one, Struct)}
STRUCTS.pop("Struct")
DESCRIBED = dict(re.findall(r"^\* \*\*(\w+)\*\* \(([^)]*)\)", PAGE, re.MULTILINE))
ROWS = re.findall(r"^\| `([a-z]+\.[a-z]+)` \| (trainer|daemon) \|", PAGE, re.MULTILINE)


def test_every_message_is_described_with_its_fields_in_their_order() -> None:
    described = {name: re.findall(r"`(\w+)`", fields) for name, fields in DESCRIBED.items()}
    assert described == {name: list(one.__struct_fields__) for name, one in STRUCTS.items()}


def test_what_is_an_array_is_called_one() -> None:
    said = {name for name in DESCRIBED if re.search(rf"^\* \*\*{name}\*\* \([^)]*\), \*array\*", PAGE, re.MULTILINE)}
    assert said == {name for name, one in STRUCTS.items() if one.__struct_config__.array_like}


def test_every_request_is_described_with_the_answer_or_as_one_way() -> None:
    answered = set(re.findall(r"^\* \*\*(\w+)\*\* \([^)]*\) →", PAGE, re.MULTILINE))
    one_way = {"Publish", "Decree", "Doubt"}
    assert answered == {one.__name__ for one in get_args(wire.Request)} - one_way


def test_every_crash_point_has_one_row_with_the_process_that_dies_there() -> None:
    trainers = {*faults.TRAINER_POINTS, *_native.crash_points()}
    assert sorted(ROWS) == sorted((one, "trainer" if one in trainers else "daemon") for one in faults.points())


def test_no_name_of_a_crash_point_is_made_up() -> None:
    families = "|".join(sorted({one.partition(".")[0] for one in faults.points()}))
    named = set(re.findall(rf"`((?:{families})\.[a-z]+)`", PAGE))
    assert named == set(faults.points())


def test_versions_limits_and_tags_are_those_of_the_code() -> None:
    assert f"wire version (u16) = {wire.WIRE_VERSION} " in PAGE
    assert f'"{parityset.MAGIC.decode()}", version u32 = {parityset.VERSION}' in PAGE
    assert f'magic "{wire.MAGIC.decode()}"' in PAGE
    assert wire.FRAME_BYTES_MAX == 4 << 20 and "4 MiB (`oversized`" in PAGE
    for name in ("EMPTY", "FILLING", "FULL", "PROTECTED", "COMMITTED"):
        assert f"| {name} | `0x{getattr(_native, name):08X}` |" in PAGE


def test_every_kind_of_refusal_is_named() -> None:
    text = PAGE.partition("* **Refusal**")[2].partition("###")[0]
    assert set(errors.REFUSALS) <= set(re.findall(r"`([\w-]+)`", text))
