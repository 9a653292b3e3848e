"""The slow twin of the `planes` layout: bits are gathered into field elements, multiplied by a table, spread again.

Shares nothing with the kernels, not even their way of computing: they never build an element. The tail of a symbol, its
last `length % 512` bytes, is in the layout `bytes`. reedsolo confirms the table (test_kernels.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tests.unit import codec_twin

Bytes = npt.NDArray[np.uint8]
SUPERBLOCK = 512
EXPONENTS = (0, 1, -1, 2)
PRODUCTS = np.frombuffer(b"".join(codec_twin.PRODUCTS), np.uint8).reshape(256, 256)
POWERS = [1]
for _ in range(254):
    POWERS.append(codec_twin.multiply(POWERS[-1], 2))


def coefficient(row: int, symbol: int) -> int:
    """What parity row `row` takes of data symbol `symbol`."""
    return POWERS[EXPONENTS[row] * symbol % 255]


def elements(planes: Bytes) -> Bytes:
    """Field elements of whole superblocks: bit j of byte b of plane p is bit p of element 8 * b + j."""
    bits = np.unpackbits(planes.reshape(-1, 8, 64), axis=2, bitorder="little")
    weights = (1 << np.arange(8, dtype=np.uint16))[None, :, None]
    return (bits * weights).sum(axis=1).astype(np.uint8)


def planes(of: Bytes) -> Bytes:
    """The bytes of superblocks with these elements."""
    bits = (of[:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return np.packbits(bits, axis=2, bitorder="little").reshape(-1)


def combined(factors: Sequence[int], symbols: Sequence[Bytes], layout: str = "planes") -> Bytes:
    """The sum of all symbols, each times its factor."""
    length = len(symbols[0])
    whole = length // SUPERBLOCK * SUPERBLOCK if layout == "planes" else 0
    body = np.zeros((whole // SUPERBLOCK, SUPERBLOCK), np.uint8)
    tail = np.zeros(length - whole, np.uint8)
    for factor, symbol in zip(factors, symbols, strict=True):
        if whole:
            body ^= PRODUCTS[factor][elements(symbol[:whole])]
        tail ^= PRODUCTS[factor][symbol[whole:]]
    return np.concatenate([planes(body), tail]) if whole else tail


def encode(data: Sequence[Bytes], m: int) -> list[Bytes]:
    """The parity rows of `data`."""
    return [combined([coefficient(row, i) for i in range(len(data))], data) for row in range(m)]


def recovery(k: int, have: Sequence[int], want: Sequence[int]) -> list[list[int]]:
    """Factors of each wanted data symbol over k symbols; k + r is parity row r."""
    rows = [[int(s == i) if s < k else coefficient(s - k, i) for i in range(k)] for s in have]
    inverse = codec_twin.inverted(rows)
    assert inverse is not None, f"k={k}: {have} do not decode"
    return [inverse[symbol] for symbol in want]


def decode(k: int, have: Mapping[int, Bytes], want: Sequence[int]) -> list[Bytes]:
    """The wanted data symbols from exactly k others."""
    return [combined(row, list(have.values())) for row in recovery(k, list(have), want)]
