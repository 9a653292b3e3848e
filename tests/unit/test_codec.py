"""The code's coefficients against their slow twin, the twin's field against reedsolo, and what makes it an MDS code."""

from __future__ import annotations

import hashlib
import itertools
import random

import numpy as np
import numpy.typing as npt
import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd import _native
from snapshotd.codec import Codec
from snapshotd.errors import ConfigError
from tests.unit import codec_twin

SMALL = [(k, m) for k in range(1, 8) for m in range(8 - k)]  # k + m <= 7
LARGE = [(1, 254), (254, 1), (255, 0), (128, 127), (200, 55), (17, 3)]


@st.composite
def codes(draw: st.DrawFn, symbols_max: int = 40) -> tuple[int, int]:
    k = draw(st.integers(1, symbols_max))
    return k, draw(st.integers(0, symbols_max - k))


def test_reedsolo_confirms_every_product_of_the_twin() -> None:
    reedsolo.init_tables(prim=0x11D)
    for a in range(256):
        assert bytes(reedsolo.gf_mul(a, b) for b in range(256)) == codec_twin.PRODUCTS[a]


def test_reedsolo_confirms_every_inverse_of_the_twin() -> None:
    reedsolo.init_tables(prim=0x11D)
    assert [reedsolo.gf_inverse(a) for a in range(1, 256)] == codec_twin.INVERSES[1:]


# --- coefficients


@pytest.mark.parametrize(("k", "m"), SMALL + LARGE)
def test_the_coefficients_are_those_of_the_twin(k: int, m: int) -> None:
    assert _native.ec_coefficients(k, m) == codec_twin.coefficients(k, m)
    assert [Codec(k, m).row(row) for row in range(m)] == codec_twin.coefficients(k, m)


@pytest.mark.parametrize(("k", "m"), [(k, m) for k, m in SMALL + LARGE if codec_twin.layout_of(k, m) == "planes"])
def test_a_code_in_planes_can_be_had_in_bytes_too(k: int, m: int) -> None:
    assert _native.ec_layout(k, m) == "planes"
    assert _native.ec_coefficients(k, m, "bytes") == codec_twin.coefficients(k, m, "bytes")


def test_the_coefficients_in_planes_stay_what_they_were_in_the_first_version() -> None:
    assert _native.ec_coefficients(6, 4) == [
        [1, 1, 1, 1, 1, 1],
        [1, 2, 4, 8, 16, 32],
        [1, 142, 71, 173, 216, 108],
        [1, 4, 16, 64, 29, 116],
    ]
    digest = hashlib.sha256(b"".join(bytes(row) for row in _native.ec_coefficients(252, 3))).hexdigest()
    assert digest == "7d8d9b5ee061b4176ff6f33430a63e2dc5c60d6f82a59036b3727973f7f354cf"


def test_the_coefficients_in_bytes_stay_what_they_were_in_the_first_version() -> None:
    assert _native.ec_coefficients(6, 4, "bytes") == [
        [1, 1, 1, 1, 1, 1],
        [1, 231, 253, 2, 183, 171],
        [1, 253, 190, 44, 150, 39],
        [1, 2, 44, 88, 206, 201],
    ]
    digest = hashlib.sha256(b"".join(bytes(row) for row in _native.ec_coefficients(128, 127))).hexdigest()
    assert digest == "e6e54feaa4600b29249a69d6d140bfdd8e7bf3ceaa475d0c4e7a05cd186904de"


@pytest.mark.parametrize(("k", "m"), [code for code in SMALL + LARGE if code[1] > 0])
def test_parity_row_0_is_plain_xor(k: int, m: int) -> None:
    assert Codec(k, m).row(0) == [1] * k


def test_every_row_of_a_single_data_symbol_is_a_replica() -> None:
    assert all(Codec(1, 254).row(row) == [1] for row in range(254))


@given(codes())
def test_a_coefficient_depends_on_its_layout_row_and_column_only(code: tuple[int, int]) -> None:
    k, m = code
    assert _native.ec_coefficients(k, m, "bytes") == [row[:k] for row in _native.ec_coefficients(128, 127)[:m]]
    if m <= 3:
        assert _native.ec_coefficients(k, m) == [row[:k] for row in _native.ec_coefficients(252, 3)[:m]]


# --- layouts


@given(codes(255))
def test_up_to_three_rows_and_four_of_up_to_21_are_in_planes(code: tuple[int, int]) -> None:
    k, m = code
    assert _native.ec_layout(k, m) == ("planes" if m <= 3 or (m == 4 and k <= 21) else "bytes")
    assert Codec(k, m).layout == _native.ec_layout(k, m)


@pytest.mark.parametrize(("k", "m"), [(22, 4), (1, 5), (251, 4), (128, 127)])
def test_planes_are_refused_for_a_code_that_they_cannot_be(k: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}, m={m} in planes: .* 4 over at most 21"):
        _native.ec_coefficients(k, m, "planes")


def test_a_layout_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no layout 'stripes', only 'planes' and 'bytes'"):
        _native.ec_coefficients(4, 2, "stripes")


def test_the_field_in_which_rows_are_powers_is_that_of_reedsolo() -> None:
    reedsolo.init_tables(prim=0x11D)
    rows = [[reedsolo.gf_pow(2, exponent * column) for column in range(252)] for exponent in (0, 1, -1)]
    assert _native.ec_coefficients(252, 3) == rows
    assert _native.ec_coefficients(21, 4)[3] == [reedsolo.gf_pow(2, 2 * column) for column in range(21)]


# --- any k symbols give all others


@pytest.mark.parametrize("layout", ["planes", "bytes"])
def test_every_square_part_of_a_small_code_is_regular(layout: str) -> None:
    rows = _native.ec_coefficients(7, 4, layout)
    for size in range(1, 5):
        for chosen in itertools.combinations(rows, size):
            for columns in itertools.combinations(range(7), size):
                part = [[row[column] for column in columns] for row in chosen]
                assert codec_twin.inverted(part) is not None, f"{part} is singular"


POWERS = np.array([codec_twin.power_of_two(i) for i in range(255)] * 2, dtype=np.uint8)
LOGARITHMS = np.argsort(POWERS[:255]).astype(np.int64)  # of 1 .. 255


def times(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Products of many pairs."""
    return np.where((a == 0) | (b == 0), 0, POWERS[LOGARITHMS[a.astype(int) - 1] + LOGARITHMS[b.astype(int) - 1]])


def determinants(rows: npt.NDArray[np.uint8], columns: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Of the square parts over each row of `columns`, by expansion: subtracting is adding here."""
    if len(rows) == 1:
        return rows[0][columns[:, 0]]
    total = np.zeros(len(columns), dtype=np.uint8)
    for left_out in range(len(rows)):
        others = np.delete(columns, left_out, axis=1)
        total ^= times(rows[0][columns[:, left_out]], determinants(rows[1:], others))
    return total


@pytest.mark.parametrize(("k", "m"), [(252, 3), (21, 4)])
def test_every_square_part_of_the_largest_codes_in_planes_is_regular(k: int, m: int) -> None:
    """All of them, so every smaller code's too: any k symbols give the others."""
    rows = np.array(_native.ec_coefficients(k, m), dtype=np.uint8)
    for size in range(1, m + 1):
        columns = np.array(list(itertools.combinations(range(k), size)), dtype=np.int64)
        for chosen in itertools.combinations(range(m), size):
            singular = np.flatnonzero(determinants(rows[list(chosen)], columns) == 0)
            assert not len(singular), f"rows {chosen}, columns {columns[singular[0]]}"


def test_a_fourth_row_over_22_columns_is_why_the_limit_is_21() -> None:
    exponents = (0, 1, -1, 2)
    rows = np.array([[POWERS[e * i % 255] for i in range(22)] for e in exponents], dtype=np.uint8)
    sizes = [(size, chosen) for size in range(1, 5) for chosen in itertools.combinations(range(4), size)]
    singular = [
        int((determinants(rows[list(chosen)], np.array(list(itertools.combinations(range(22), size)))) == 0).sum())
        for size, chosen in sizes
    ]
    assert any(singular)


@given(st.integers(1, 60), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_square_parts_of_the_largest_code_are_regular(size: int, chance: random.Random) -> None:
    rows, columns = chance.sample(range(127), size), chance.sample(range(128), size)
    matrix = _native.ec_coefficients(128, 127)
    assert codec_twin.inverted([[matrix[row][column] for column in columns] for row in rows]) is not None


@pytest.mark.parametrize(("k", "m"), SMALL)
def test_every_choice_of_k_symbols_recovers_all(k: int, m: int) -> None:
    everything = list(range(k + m))
    for have in itertools.combinations(everything, k):
        assert _native.ec_recovery(k, m, have, everything) == codec_twin.recovery(k, m, have, everything)


@given(codes(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_recovery_is_that_of_the_twin_in_any_order(code: tuple[int, int], chance: random.Random) -> None:
    k, m = code
    have = chance.sample(range(k + m), k)
    want = chance.sample(range(k + m), chance.randint(0, k + m))
    expected = codec_twin.recovery(k, m, have, want)
    assert _native.ec_recovery(k, m, have, want) == expected
    assert [Codec(k, m).recover(have, one) for one in want] == expected


@pytest.mark.parametrize(("k", "m"), LARGE)
def test_the_largest_codes_recover_from_the_symbols_that_are_worst(k: int, m: int) -> None:
    have, want = list(range(m, k + m)), list(range(0, k + m, 16))  # as many lost data symbols as there can be
    assert _native.ec_recovery(k, m, have, want) == codec_twin.recovery(k, m, have, want)


def test_what_is_there_is_taken_as_it_is() -> None:
    assert Codec(3, 2).recover([4, 0, 1], 0) == [0, 1, 0]
    assert Codec(3, 2).recover([4, 0, 1], 4) == [1, 0, 0]


def test_a_caller_cannot_spoil_the_coefficients_of_the_next_one() -> None:
    codec = Codec(4, 2)
    row, recovered = codec.row(1), codec.recover([1, 2, 3, 4], 0)
    codec.row(1)[:] = codec.recover([1, 2, 3, 4], 0)[:] = [0, 0, 0, 0]
    assert (codec.row(1), codec.recover([1, 2, 3, 4], 0)) == (row, recovered)


# --- what is refused


@pytest.mark.parametrize(("k", "m"), [(0, 0), (0, 3), (-1, 2), (4, -1), (256, 0), (200, 56), (1, 255), (2**40, 1)])
def test_a_code_that_cannot_be_is_refused(k: int, m: int) -> None:
    with pytest.raises(ConfigError, match=f"k={k} data and m={m} parity"):
        Codec(k, m)
    with pytest.raises(ValueError, match=r"k|m"):
        _native.ec_coefficients(k, m)
    with pytest.raises(ValueError):
        _native.ec_recovery(k, m, [0], [0])


def test_a_refused_code_is_named() -> None:
    with pytest.raises(ValueError, match="k=200, m=56"):
        _native.ec_coefficients(200, 56)


@pytest.mark.parametrize("row", [-1, 2, 100])
def test_a_parity_row_that_is_not_there_is_refused(row: int) -> None:
    with pytest.raises(ValueError, match=f"no parity row {row}"):
        Codec(4, 2).row(row)


@pytest.mark.parametrize("want", [-1, 6])
def test_a_wanted_symbol_that_is_not_there_is_refused(want: int) -> None:
    with pytest.raises(ValueError, match=f"no symbol {want}"):
        Codec(4, 2).recover([0, 1, 2, 3], want)


@pytest.mark.parametrize(
    ("have", "want", "complaint"),
    [
        ([0, 1, 2], [3], r"have \[0, 1, 2\]: .* from 4 symbols, not 3"),
        ([0, 1, 2, 4, 5], [3], "from 4 symbols, not 5"),
        ([], [], "from 4 symbols, not 0"),
        ([0, 1, 1, 4], [3], r"have \[0, 1, 1, 4\]: symbol 1 is repeated"),
        ([0, 1, 2, 6], [3], "no symbol 6 in a code of k=4, m=2"),
        ([0, 1, 2, 2**63], [3], "no symbol 9223372036854775808"),
        ([0, 1, 2, 4], [3, 3], r"want \[3, 3\]: symbol 3 is repeated"),
        ([0, 1, 2, 4], [6], "no symbol 6"),
        ([0, 1, 2, -4], [3], "a symbol in have is negative"),
        ([0, 1, 2, 4], [-1], "a symbol in want is negative"),
        ([0, 1, 2, 2**64], [3], "does not fit into 64 bits"),
    ],
)
def test_symbols_that_do_not_fit_the_code_are_refused_by_name(have: list[int], want: list[int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        _native.ec_recovery(4, 2, have, want)
