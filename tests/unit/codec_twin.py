"""The slow twin of the erasure code: the definition in plain Python, from the polynomial to the decoder.

Shares nothing with the native module, not even its way of computing: products come bit by bit, and what is lost is
found by solving all k equations at once. Bytes in planes are laid out anew as one element a byte, and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

SUPERBLOCK = 512
EXPONENTS = (0, 1, -1, 2)

Rows = list[list[int]]


def multiply(a: int, b: int) -> int:
    """Product in GF(2^8) with the polynomial 0x11D, one bit of `b` after the other."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a & 0x100:
            a ^= 0x11D
        b >>= 1
    return product


PRODUCTS = [bytes(multiply(a, b) for b in range(256)) for a in range(256)]
INVERSES = [0, *(PRODUCTS[a].index(1) for a in range(1, 256))]


def divide(a: int, b: int) -> int:
    return PRODUCTS[a][INVERSES[b]]


def cauchy(row: int, column: int) -> int:
    return INVERSES[(255 - row) ^ column]


def layout_of(k: int, m: int) -> str:
    return "planes" if m <= 3 or (m == 4 and k <= 21) else "bytes"


def power_of_two(exponent: int) -> int:
    value = 1
    for _ in range(exponent % 255):
        value = PRODUCTS[value][2]
    return value


def coefficients(k: int, m: int, layout: str | None = None) -> Rows:
    """Powers of two in planes. In bytes, the Cauchy matrix, its columns and then its rows divided by their firsts."""
    if (layout or layout_of(k, m)) == "planes":
        return [[power_of_two(exponent * column) for column in range(k)] for exponent in EXPONENTS[:m]]
    by_column = [[divide(cauchy(row, column), cauchy(0, column)) for column in range(k)] for row in range(m)]
    return [[divide(value, row[0]) for value in row] for row in by_column]


def generator(k: int, m: int, layout: str | None = None) -> Rows:
    """Every symbol over the data: the identity, then the coefficients."""
    return [[int(i == j) for j in range(k)] for i in range(k)] + coefficients(k, m, layout)


def inverted(square: Rows) -> Rows | None:
    """By Gauss and Jordan; None for a singular matrix."""
    n = len(square)
    work = [bytes(row) + bytes(int(i == j) for j in range(n)) for i, row in enumerate(square)]
    for column in range(n):
        pivot = next((i for i in range(column, n) if work[i][column]), None)
        if pivot is None:
            return None
        work[column], work[pivot] = work[pivot], work[column]
        work[column] = scaled(INVERSES[work[column][column]], work[column])
        for i in range(n):
            if i != column and work[i][column]:
                work[i] = added(work[i], scaled(work[i][column], work[column]))
    return [list(row[n:]) for row in work]


def recovery(k: int, m: int, have: Sequence[int], want: Sequence[int], layout: str | None = None) -> Rows:
    symbols = generator(k, m, layout)
    inverse = inverted([symbols[symbol] for symbol in have])
    assert inverse is not None, f"k={k}, m={m}: {have} do not decode"
    return [list(combined(symbols[symbol], [bytes(row) for row in inverse])) for symbol in want]


# --- over bytes


def scaled(factor: int, data: bytes) -> bytes:
    return data.translate(PRODUCTS[factor])


def added(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


def combined(factors: Sequence[int], parts: Sequence[bytes]) -> bytes:
    """The sum of all parts, each times its factor."""
    total = bytes(len(parts[0]))
    for factor, part in zip(factors, parts, strict=True):
        if factor:
            total = added(total, scaled(factor, part))
    return total


def relaid(data: bytes, back: bool = False) -> bytes:
    """Bytes in planes as one element a byte, and back. What lies behind the last whole superblock stays as it is."""
    whole = len(data) // SUPERBLOCK * SUPERBLOCK
    shape = (-1, 512, 8) if back else (-1, 8, 512)
    bits = np.unpackbits(np.frombuffer(data[:whole], dtype=np.uint8), bitorder="little").reshape(shape)
    return np.packbits(bits.transpose(0, 2, 1).reshape(-1), bitorder="little").tobytes() + data[whole:]


def combined_in(layout: str, factors: Sequence[int], parts: Sequence[bytes]) -> bytes:
    if layout == "bytes":
        return combined(factors, parts)
    return relaid(combined(factors, [relaid(part) for part in parts]), back=True)


def encode(data: Sequence[bytes], m: int, layout: str | None = None) -> list[bytes]:
    layout = layout or layout_of(len(data), m)
    return [combined_in(layout, row, data) for row in coefficients(len(data), m, layout)]


def decode(k: int, m: int, have: Mapping[int, bytes], want: Sequence[int], layout: str | None = None) -> list[bytes]:
    """The wanted symbols from exactly k others."""
    layout = layout or layout_of(k, m)
    return [combined_in(layout, row, list(have.values())) for row in recovery(k, m, list(have), want, layout)]
