"""The gate refuses what it says it refuses, in machine code made up for it."""

from __future__ import annotations

import pytest

from tests.cuda.gate import CARDS, Code, predicted, refusals

LOOP = [("label", ".L_x_1"), *[("LDG.E.EF.128", "R4, [R2]")] * 8, *[("LOP3.LUT", "R4, R5, R6")] * 40,
        ("STG.E.EF.128", "[R8], R4"), ("BRA", "`(.L_x_1)")]  # fmt: skip


def code(name: str = "planes_encode_8_2", lines: list[tuple[str, str]] | None = None, spilled: int = 0) -> Code:
    return Code(name, "90", 100, 0, spilled, LOOP if lines is None else lines)


def test_a_clean_kernel_passes_with_its_instructions_counted() -> None:
    assert list(refusals(code())) == []
    found = predicted(code(), CARDS[1])
    assert found is not None and found.instructions_per_byte == pytest.approx(50 / 128)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (code(spilled=4), "4 bytes are spilled"),
        (code(lines=[*LOOP, ("LDL.64", "R1, [R1]")]), "local memory"),
        (code(lines=[*LOOP, ("LD.E.64", "R1, [R2]")]), "1 generic"),
        (code(lines=[*LOOP, ("STG.E.64", "[R1], R2")]), "STG.E.64 where every access has 16 bytes"),
        (code(lines=[LOOP[0], *[("LOP3.LUT", "R4")] * 4000, *LOOP[1:]]), "times as fast as memory"),
        (code("copy_pieces", [("LDG.E.U8", "R1, [R2]")]), "no access of 16 bytes"),
        (code("crc32c_blocks", [LOOP[0], *[("LOP3.LUT", "R4")] * 900, *LOOP[1:]]), "times as fast as memory"),
        (code("bytes_combine_3", [LOOP[0], *[("LOP3.LUT", "R4")] * 5000, *LOOP[1:]]), "times as fast as memory"),
    ],
)
def test_what_is_wrong_is_named(wrong: Code, words: str) -> None:
    assert any(words in one for one in refusals(wrong)), list(refusals(wrong))
