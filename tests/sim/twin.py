"""The naive twin of striping: the parity that a position owns, by the definition, of what the ranks copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from tests.unit import codec_twin


def parity_of(
    shape: Sequence[Sequence[int]], parity: int, position: int, files: Mapping[int, bytes], unit: int
) -> bytes:
    """The pieces that a position owns, row by row. `shape` has the ranks of each position."""
    n, k = len(shape), len(shape) - parity
    strings = [b"".join(_padded(files[rank], unit) for rank in ranks) for ranks in shape]
    piece = -(-max(map(len, strings)) // k)
    piece = -(-piece // unit) * unit
    strings = [string.ljust(k * piece, b"\0") for string in strings]
    rows = _rows(k, parity)
    made = []
    for row in range(parity):
        stripe = (position - row) % n
        data = []
        for symbol in range(k):
            holder = (stripe + parity + symbol) % n
            which = (stripe - holder - 1) % n
            data.append(strings[holder][which * piece : (which + 1) * piece])
        made.append(codec_twin.combined_in(codec_twin.layout_of(k, parity), rows[row], data))
    return b"".join(made)


@lru_cache(maxsize=64)
def _rows(k: int, m: int) -> list[list[int]]:
    return codec_twin.coefficients(k, m)


def _padded(data: bytes, unit: int) -> bytes:
    return data.ljust(-(-len(data) // unit) * unit, b"\0")
