"""The erasure code as the rest of the daemon sees it: coefficients to multiply and add by, nothing about bytes.

Symbols of a stripe are numbered: 0 .. k-1 are its data pieces, k .. k+m-1 its parity rows. Any k of them give all the
others. Row 0 is plain XOR and every row of k = 1 a replica. Whoever encodes or rebuilds hands the coefficients and the
layout from here to `_native.ec_accumulate`, piece by piece, in any order. docs/codec.md tells what a layout is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from snapshotd import _native
from snapshotd.errors import ConfigError

SYMBOLS_MAX = 255
POLYNOMIAL = 0x11D
ROW_EXPONENTS = (0, 1, -1, 2)  # in planes, parity row r takes 2^(exponent · i) of data symbol i


@dataclass(frozen=True)
class Codec:
    """A code of `k` data symbols and `m` parity rows. ConfigError (a ValueError) where there is none."""

    k: int
    m: int

    def __post_init__(self) -> None:
        if self.k < 1 or self.m < 0 or self.k + self.m > SYMBOLS_MAX:
            raise ConfigError(
                f"there is no erasure code of k={self.k} data and m={self.m} parity symbols, so nothing can be "
                f"protected by it: choose k of at least 1, m of at least 0 and k + m of at most {SYMBOLS_MAX}"
            )

    @property
    def layout(self) -> str:
        """How bytes are read as elements: `planes` for up to 3 rows, and 4 over up to 21 symbols, else `bytes`."""
        return _native.ec_layout(self.k, self.m)

    @property
    def exponents(self) -> list[int]:
        """Of the parity rows in planes; none in bytes, whose rows are those of a Cauchy matrix."""
        return list(ROW_EXPONENTS[: self.m]) if self.layout == "planes" else []

    def row(self, row: int) -> list[int]:
        """Coefficients of parity row `row` (0 .. m-1) over the k data symbols. ValueError for another row."""
        if not 0 <= row < self.m:
            raise ValueError(f"a code of k={self.k}, m={self.m} has no parity row {row}")
        return list(_coefficients(self.k, self.m)[row])

    def recover(self, have: Sequence[int], want: int) -> list[int]:
        """Coefficients of the symbol `want` over the k symbols in `have`, in that order.

        ValueError unless `have` are exactly k different symbols and all of them and `want` exist.
        """
        if not 0 <= want < self.k + self.m:
            raise ValueError(f"a code of k={self.k}, m={self.m} has no symbol {want}")
        return list(_recovery(self.k, self.m, tuple(have))[want])


# Rows are kept as bytes: a cached matrix of the largest code has 64 KiB.


@lru_cache(maxsize=64)
def _coefficients(k: int, m: int) -> list[bytes]:
    return [bytes(row) for row in _native.ec_coefficients(k, m)]


@lru_cache(maxsize=64)
def _recovery(k: int, m: int, have: tuple[int, ...]) -> list[bytes]:
    """Of every symbol, since whoever asks for one asks for the others that are lost next."""
    return [bytes(row) for row in _native.ec_recovery(k, m, have, range(k + m))]
