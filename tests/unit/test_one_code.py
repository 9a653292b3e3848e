"""CPU and CUDA make the same parity: the twin that the kernels are held to (tests/cuda) against the native codec."""

from __future__ import annotations

import numpy as np
import pytest

from snapshotd import _native, codec
from tests.cuda import twin

CODES = [(1, 1), (2, 1), (4, 2), (6, 2), (8, 3), (10, 4), (21, 4), (100, 3)]
LENGTHS = [1, 511, 512, 4096, 1700]


def symbols(k: int, length: int) -> list[twin.Bytes]:
    chance = np.random.default_rng(1000 * k + length)
    return [chance.integers(0, 256, length, np.uint8) for _ in range(k)]


def test_both_mean_the_same_code_and_name_it_alike() -> None:
    assert twin.EXPONENTS == codec.ROW_EXPONENTS
    for k, m in CODES:
        assert codec.Codec(k, m).layout == "planes"
        assert [[twin.coefficient(row, i) for i in range(k)] for row in range(m)] == _native.ec_coefficients(k, m)


@pytest.mark.parametrize("tier", _native.ec_tiers())
@pytest.mark.parametrize(("k", "m"), CODES)
def test_every_tier_encodes_as_the_twin_of_the_kernels(k: int, m: int, tier: str) -> None:
    for length in LENGTHS:
        data = symbols(k, length)
        parity = [bytearray(length) for _ in range(m)]
        _native.ec_encode_with(tier, data, parity)
        assert parity == [one.tobytes() for one in twin.encode(data, m)], f"{length} bytes"


@pytest.mark.parametrize(("k", "m"), CODES)
def test_what_the_twin_encoded_is_decoded_here(k: int, m: int) -> None:
    for length in LENGTHS:
        data = symbols(k, length)
        everything = [*data, *twin.encode(data, m)]
        lost = list(range(min(k, m)))
        have = {symbol: everything[symbol] for symbol in range(k + m) if symbol not in lost}
        want = {symbol: bytearray(length) for symbol in lost}
        _native.ec_decode(k, m, have, want)
        assert want == {symbol: data[symbol].tobytes() for symbol in lost}, f"{length} bytes"
