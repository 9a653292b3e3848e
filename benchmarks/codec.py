"""How fast the erasure code is, against ISA-L and against the memory, on one core of this machine.

    encode      k data symbols into m parity rows                       against ISA-L's `ec_encode_data`
    decode      m lost symbols, data and parity mixed, from k others    against the same with its own coefficients
    copying     copy + CRC32C of every block + parity, in one pass      against memcpy, `crc32_iscsi`, `ec_encode_data`
    (memcpy)    the same                                                against memcpy alone
    accumulate  verify + multiply and add + CRC32C of the sum           against the three passes of ISA-L
    threads     encode, 256 KiB symbols, two threads with a code word   one thread that does both
                each, as the workers of a daemon have
    (64 MiB)    one call with two threads, from memory                  one with one thread

Loops run in C (benchmarks/codec_shim.cpp, built into a temporary folder), so no Python is in the figures. Sides are
timed in turns and a ratio is taken within each round; its median and the middle half of the rounds are shown. Every
result is verified before it is timed. GB/s count k symbols once. `roof` is the share of our time that a loop takes
which does nothing but read the symbols and write the outputs, in the same cache or, for 64 MiB, what the memory takes
for that, measured in the same run: near 1 there is little left to win. A target that is missed there is missed all the
same, and said to be at the roof. Peers that are not installed are left out.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys

# copy.py beside this file has the name of a module of the standard library, which must not find it first.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != os.path.dirname(os.path.abspath(__file__))]

import argparse
import ctypes
import importlib
import importlib.util
import json
import mmap
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from snapshotd import _native

Bytes = npt.NDArray[np.uint8]

CODES = [(4, 1), (4, 2), (6, 2), (8, 2), (8, 3), (10, 4)]
SIZES = {"16 KiB": 16 << 10, "256 KiB": 256 << 10, "64 MiB": 64 << 20}
LARGE = "64 MiB"
ROOF_SHARE = 0.95
BLOCK_BYTES = 1 << 20
SAMPLE_BYTES = 400 << 20  # so much is encoded in one sample from the caches
SHIM = Path(__file__).with_name("codec_shim.cpp")


def encode_target(size: str, k: int, m: int) -> float:
    if size == "16 KiB":
        return 2.0
    if size == "256 KiB":
        return 1.25
    return {(8, 3): 1.05, (10, 4): 1.15}.get((k, m), 0.97)


def decode_target(size: str) -> float:
    return 1.5 if size == "16 KiB" else 0.95


def memcpy_target(k: int, m: int) -> float | None:
    return 0.93 if m <= 2 else 0.88 if (k, m) == (10, 4) else None


class Job(ctypes.Structure):
    """As in codec_shim.cpp."""

    _fields_ = (
        ("k", ctypes.c_uint),
        ("m", ctypes.c_uint),
        ("outputs", ctypes.c_uint),
        ("threads", ctypes.c_int),
        ("stores", ctypes.c_int),
        ("bytes", ctypes.c_size_t),
        ("block_bytes", ctypes.c_size_t),
        ("from_", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("copies", ctypes.c_void_p),
        ("data_words", ctypes.c_void_p),
        ("parity_words", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("entry", ctypes.c_size_t),
        ("sink", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Side:
    """One way of doing a job: its name in the shim."""

    way: str
    job: Job
    at_once: bool = False


@dataclass(frozen=True)
class Case:
    """What is compared. `reads` and `writes` are bytes for the memory to move where the symbols are in no cache."""

    what: str
    code: tuple[int, int]
    size: str
    against: str
    ours: Side
    peer: Side
    repeat: int
    reads: int
    writes: int
    target: float | None
    roof: Side | None = None


@dataclass(frozen=True)
class Result:
    what: str
    code: tuple[int, int]
    size: str
    against: str
    gb_per_s: float
    peer_gb_per_s: float
    ratio: float
    ratio_spread: tuple[float, float]
    roof_share: float | None
    target: float | None

    @property
    def at_the_roof(self) -> bool:
        return self.roof_share is not None and self.roof_share >= ROOF_SHARE and self.size != LARGE

    @property
    def reached(self) -> bool:
        return self.target is None or self.ratio >= self.target


# --- the shim -------------------------------------------------------------------------------------------------------


def build(folder: str) -> tuple[ctypes.CDLL, str | None]:
    """The shim, with ISA-L where that is installed; else the sentence that says so."""
    out = os.path.join(folder, "shim.so")
    command = ["g++", "-O2", "-fPIC", "-shared", "-pthread", str(SHIM), "-o", out]
    missing = None
    with_isal = subprocess.run([*command, "-DWITH_ISAL", "-lisal"], capture_output=True, text=True)
    if with_isal.returncode != 0:
        missing = "ISA-L is not here (Debian: libisal-dev), so nothing is compared with it"
        subprocess.run(command, check=True)
    shim = ctypes.CDLL(out)
    shim.shim_time.restype = ctypes.c_double
    shim.shim_isal_multiply.restype = ctypes.c_ubyte
    shim.shim_isal_tables.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
    return shim, missing


class Memory:
    """One region for all symbols, in huge pages where the kernel gives them; each begins 8 KiB further than a multiple
    of its length, so that not all of them fall into the same sets of a cache."""

    def __init__(self, total_bytes: int) -> None:
        self._region = mmap.mmap(-1, total_bytes + (2 << 20))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._region.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._region, dtype=np.uint8)
        self._bytes = whole[-whole.ctypes.data % (2 << 20) :]
        self._keep: list[Any] = []

    def symbols(self, count: int, size: int, first: int = 0) -> list[Bytes]:
        stride = size + 8192
        return [self._bytes[i * stride : i * stride + size] for i in range(first, first + count)]

    def pointers(self, arrays: Sequence[Bytes]) -> int:
        """The address of an array of their addresses."""
        made = (ctypes.c_void_p * len(arrays))(*(one.ctypes.data for one in arrays))
        self._keep.append(made)
        return ctypes.addressof(made)

    def held(self, content: bytes) -> int:
        made = ctypes.create_string_buffer(content, len(content))
        self._keep.append(made)
        return ctypes.addressof(made)


def isal_rows(shim: ctypes.CDLL, k: int, m: int, have: Sequence[int], lost: Sequence[int]) -> bytes:
    """ISA-L's coefficients for the lost symbols over those in `have`; for all of its parity where nothing is lost."""
    generator = ctypes.create_string_buffer((k + m) * k)
    shim.shim_isal_generator(generator, k, m)
    rows = [generator.raw[i * k : (i + 1) * k] for i in range(k + m)]
    if not lost:
        return b"".join(rows[k:])
    square, inverse = (
        ctypes.create_string_buffer(b"".join(rows[i] for i in have), k * k),
        ctypes.create_string_buffer(k * k),
    )
    assert shim.shim_isal_invert(square, inverse, k) == 0
    found = b""
    for symbol in lost:
        row = [0] * k
        for i, factor in enumerate(rows[symbol]):
            for j in range(k):
                row[j] ^= shim.shim_isal_multiply(factor, inverse.raw[i * k + j])
        found += bytes(row)
    return found


# --- cases ----------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, shim: ctypes.CDLL, with_isal: bool) -> None:
        self.shim, self.with_isal = shim, with_isal
        k, m = max(k for k, _ in CODES), max(m for _, m in CODES)
        self.memory = Memory((2 * k + 2 * m) * (max(SIZES.values()) + 8192))
        source = np.random.default_rng(1).integers(0, 256, 8 << 20, dtype=np.uint8)
        for one in self.memory.symbols(k, max(SIZES.values())):
            for at in range(0, len(one), len(source)):
                one[at : at + len(source)] = np.roll(source, one.ctypes.data // 64 % 4096 + at)[: len(one) - at]
        self.entries = _native.ec_entry_points()
        self.sink = self.memory.held(bytes(64))

    def job(self, k: int, m: int, size: int, **fields: Any) -> Job:
        usual = {"k": k, "m": m, "outputs": m, "threads": 1, "bytes": size, "block_bytes": BLOCK_BYTES}
        return Job(**{**usual, "sink": self.sink, **fields})

    def tables(self, k: int, rows: bytes) -> int:
        held = self.memory.held(bytes(32 * len(rows)))
        if self.with_isal:
            self.shim.shim_isal_tables(k, len(rows) // k, self.memory.held(rows), held)
        return held

    def run(self, side: Side, repeat: int = 1) -> float:
        took = float(self.shim.shim_time(side.way.encode(), ctypes.byref(side.job), repeat, side.at_once))
        assert took >= 0, f"the shim knows no {side.way}"
        return took

    def words(self, count: int, size: int) -> list[Bytes]:
        made = [np.zeros(max(1, 4 * -(-size // BLOCK_BYTES)), dtype=np.uint8) for _ in range(count)]
        self.memory._keep.append(made)
        return made

    # Each verifies what it is about to time.

    def encode(self, code: tuple[int, int], size: str) -> Case:
        k, m = code
        length, job, fields = SIZES[size], self.encode_job(code, size, 0), self.encode_fields(code, size, 0)
        rows = isal_rows(self.shim, k, m, [], [])
        peer = Side("isal encode", self.job(k, m, length, tables=self.tables(k, rows), **fields))
        return self.case(
            "encode", code, size, "ISA-L", Side("ours encode", job), peer, k * length, m * length,
            encode_target(size, k, m), Side("roof", self.job(k, m, length, **fields)),
        )  # fmt: skip

    def threads(self, code: tuple[int, int], size: str) -> Case:
        k, m = code
        if size == LARGE:
            one, two = self.encode_job(code, size, 0), self.encode_job(code, size, 0, threads=2)
            sides = Side("ours encode", two), Side("ours encode", one)
            return self.case("threads", code, size, "one thread", *sides, k * SIZES[size], m * SIZES[size], 1.8)
        job, other = (self.encode_job(code, size, first) for first in (0, k + m))
        job.other = ctypes.addressof(other)
        self.memory._keep.append(other)
        both, alone = Side("ours encode", job, at_once=True), Side("ours encode", job)
        reads, writes = 2 * k * SIZES[size], 2 * m * SIZES[size]
        return self.case("threads", code, size, "one thread", both, alone, reads, writes, 1.8)

    def encode_fields(self, code: tuple[int, int], size: str, first: int) -> dict[str, int]:
        all_ = self.memory.symbols(sum(code), SIZES[size], first)
        return {"from_": self.memory.pointers(all_[: code[0]]), "to": self.memory.pointers(all_[code[0] :])}

    def encode_job(self, code: tuple[int, int], size: str, first: int, threads: int = 1) -> Job:
        """Symbols from the `first` one on; what it makes of them is verified."""
        k, m = code
        fields = self.encode_fields(code, size, first)
        job = self.job(k, m, SIZES[size], entry=self.entries["encode"], threads=threads, **fields)
        self.run(Side("ours encode", job))
        all_ = self.memory.symbols(k + m, SIZES[size], first)
        check_parity(all_[:k], all_[k:])
        return job

    def decode(self, code: tuple[int, int], size: str) -> Case:
        k, m = code
        length = SIZES[size]
        all_ = self.memory.symbols(k + m, length)
        _native.ec_encode(all_[:k], all_[k:])
        lost = [*range(-(-m // 2)), *range(k, k + m // 2)]
        have = [symbol for symbol in range(k + m) if symbol not in lost]
        want = self.memory.symbols(m, length, first=k + m)
        rows = b"".join(bytes(row) for row in _native.ec_recovery(k, m, have, lost))
        fields = {"from_": self.memory.pointers([all_[i] for i in have]), "to": self.memory.pointers(want)}
        ours = Side(
            "ours decode", self.job(k, m, length, entry=self.entries["decode"], rows=self.memory.held(rows), **fields)
        )
        self.run(ours)
        for symbol, made in zip(lost, want, strict=True):
            require(np.array_equal(made, all_[symbol]), f"decoded symbol {symbol} of {code} differs")
        peer = ours
        if self.with_isal:
            peer = Side(
                "isal encode",
                self.job(k, m, length, tables=self.tables(k, isal_rows(self.shim, k, m, have, lost)), **fields),
            )
            self.check_isal(code, size, have, lost)
        roof = Side("roof", self.job(k, m, length, **fields))
        return self.case("decode", code, size, "ISA-L", ours, peer, k * length, m * length, decode_target(size), roof)

    def check_isal(self, code: tuple[int, int], size: str, have: list[int], lost: list[int]) -> None:
        """That the peer, too, gets back what was lost: with parity of its own, put back afterwards."""
        k, m = code
        length = min(SIZES[size], 1 << 20)
        data = [one[:length] for one in self.memory.symbols(k, SIZES[size])]
        own = [np.empty(length, dtype=np.uint8) for _ in range(m)]
        found = [np.empty(length, dtype=np.uint8) for _ in range(m)]
        symbols = [*data, *own]
        encode = isal_rows(self.shim, k, m, [], [])
        for rows, sources, targets in (
            (encode, data, own),
            (isal_rows(self.shim, k, m, have, lost), [symbols[i] for i in have], found),
        ):
            job = self.job(
                k, m, length, tables=self.tables(k, rows), from_=self.memory.pointers(sources),
                to=self.memory.pointers(targets),
            )  # fmt: skip
            self.run(Side("isal encode", job))
        for symbol, made in zip(lost, found, strict=True):
            require(np.array_equal(made, symbols[symbol]), f"ISA-L's decoded symbol {symbol} of {code} differs")

    def copying(self, code: tuple[int, int]) -> list[Case]:
        k, m = code
        length = SIZES[LARGE]
        all_ = self.memory.symbols(2 * k + m, length)
        data, parity, copies = all_[:k], all_[k : k + m], all_[k + m :]
        words = self.words(k, length)
        fields = {
            "from_": self.memory.pointers(data),
            "to": self.memory.pointers(parity),
            "copies": self.memory.pointers(copies),
            "data_words": self.memory.pointers(words),
        }
        both = [
            Side("ours copying", self.job(k, m, length, entry=self.entries["encode_copying"], stores=stores, **fields))
            for stores in (0, 1)
        ]
        for side in both:
            for one in copies:
                one[::4096] = 0
            self.run(side)
            check_parity(data, parity)
            for one, copied, made in zip(data, copies, words, strict=True):
                require(np.array_equal(one, copied), f"a copy of {code} differs")
                require(made.tobytes() == _native.ec_crcs(one, BLOCK_BYTES), f"a checksum of {code} differs")
        # As at the start of a trainer: the faster kind of stores on this machine.
        ours = min(both, key=lambda side: min(self.run(side) for _ in range(3)))
        memcpy = Side("memcpy", self.job(k, m, length, **fields))
        reads, writes = k * length, (k + m) * length
        cases = []
        if self.with_isal:
            rows = isal_rows(self.shim, k, m, [], [])
            three = Side("isal three passes", self.job(k, m, length, tables=self.tables(k, rows), **fields))
            target = 1.85 if code == (10, 4) else 1.9
            cases.append(self.case("copying", code, LARGE, "3 passes", ours, three, reads, writes, target))
        cases.append(self.case("copying", code, LARGE, "memcpy", ours, memcpy, reads, writes, memcpy_target(k, m)))
        return cases

    def accumulate(self, size: str, length: int) -> Case | None:
        source, sum_ = self.memory.symbols(2, length)
        before = sum_.copy()
        given, made = (self.words(1, length)[0] for _ in range(2))
        made[:] = np.frombuffer(_native.ec_crcs(sum_, BLOCK_BYTES), dtype=np.uint8)
        given[:] = np.frombuffer(_native.ec_crcs(source, BLOCK_BYTES), dtype=np.uint8)
        factor = _native.ec_coefficients(8, 3)[2][3]
        fields = {
            "from_": self.memory.pointers([source]),
            "to": self.memory.pointers([sum_]),
            "data_words": self.memory.pointers([given]),
            "parity_words": self.memory.pointers([made]),
        }
        ours = Side(
            "ours accumulate",
            self.job(1, 1, length, entry=self.entries["accumulate"], rows=self.memory.held(bytes([factor])), **fields),
        )
        self.run(ours)
        expected = before[: 1 << 20].copy()
        _native.ec_accumulate_with("base", expected, source[: 1 << 20], factor, layout="planes")
        require(np.array_equal(expected, sum_[: 1 << 20]), "a sum differs")
        require(made.tobytes() == _native.ec_crcs(sum_, BLOCK_BYTES), "a checksum of a sum differs")
        if not self.with_isal:
            return None
        peer = Side("isal accumulate", self.job(1, 1, length, tables=self.tables(1, bytes([factor])), **fields))
        return self.case("accumulate", (1, 1), size, "3 passes", ours, peer, 2 * length, length, 1.5)

    def case(
        self, what: str, code: tuple[int, int], size: str, against: str, ours: Side, peer: Side, reads: int,
        writes: int, target: float | None, roof: Side | None = None,
    ) -> Case:  # fmt: skip
        repeat = max(1, SAMPLE_BYTES // (1 if what == "threads" else 8) // reads) if size != LARGE else 1
        roof = None if size == LARGE else roof
        return Case(what, code, size, against, ours, peer, repeat, reads, writes, target, roof)


def require(sound: bool, fault: str) -> None:
    if not sound:
        raise SystemExit(f"{fault}: the figures would mean nothing")


def check_parity(data: Sequence[Bytes], parity: Sequence[Bytes]) -> None:
    """Windows of it, among them the first and the last, against the oracle."""
    length, window = len(data[0]), 16 << 10
    starts = {0, length - window, *(length // window * i // 9 * window for i in range(1, 9))}
    for start in starts:
        expected = [np.empty(window, dtype=np.uint8) for _ in parity]
        _native.ec_encode_with("base", [one[start : start + window] for one in data], expected)
        for row, made in enumerate(parity):
            require(np.array_equal(expected[row], made[start : start + window]), f"parity row {row} differs")


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roof:
    """What the memory does by itself, in bytes a second."""

    read: float
    write: float

    def seconds(self, case: Case) -> float:
        return case.reads / self.read + case.writes / self.write


def roof_of(bench: Bench, rounds: int) -> Roof:
    """Of reading many streams, and what a copy takes beyond that."""
    k, length = 8, SIZES[LARGE]
    all_ = bench.memory.symbols(2 * k, length)
    fields = {"from_": bench.memory.pointers(all_[:k]), "copies": bench.memory.pointers(all_[k:])}
    read, copy = (Side(way, bench.job(k, 0, length, **fields)) for way in ("read", "memcpy"))
    reading, copying = zip(*((bench.run(read), bench.run(copy)) for _ in range(rounds)), strict=True)
    once, both = statistics.median(reading), statistics.median(copying)
    return Roof(k * length / once, k * length / max(both - once, both / 10))


def measure(bench: Bench, cases: list[Case], rounds: int, memory: Roof) -> list[Result]:
    times: list[list[tuple[float, ...]]] = [[] for _ in cases]
    for number in range(rounds + 1):
        for i, case in enumerate(cases):
            sides = [side for side in (case.ours, case.peer, case.roof) if side is not None]
            took = tuple(bench.run(side, case.repeat) for side in sides)
            if number > 0:  # the first warms caches and clocks
                times[i].append(took)
    return [result_of(case, taken, memory) for case, taken in zip(cases, times, strict=True)]


def result_of(case: Case, taken: list[tuple[float, ...]], memory: Roof) -> Result:
    low, ratio, high = statistics.quantiles((peer / ours for ours, peer, *_ in taken), n=4)
    ours, peer, *_ = (statistics.median(side) / case.repeat for side in zip(*taken, strict=True))
    roof = None
    if case.roof is not None:
        roof = round(statistics.median(roof / ours for ours, _, roof in taken), 2)
    elif case.size == LARGE and case.what != "threads":
        roof = round(memory.seconds(case) / ours, 2)
    return Result(
        case.what,
        case.code,
        case.size,
        case.against,
        round(case.reads / ours / 1e9, 2),
        round(case.reads / peer / 1e9, 2),
        round(ratio, 3),
        (round(low, 3), round(high, 3)),
        roof,
        case.target,
    )


def cases_of(bench: Bench) -> list[Callable[[], list[Case]]]:
    """Groups of cases: each verifies and measures on memory that the next one overwrites."""
    groups: list[Callable[[], list[Case]]] = []
    for code in CODES:
        if bench.with_isal:
            groups += [lambda c=code, s=size: [bench.encode(c, s)] for size in SIZES]  # type: ignore[misc]
            groups += [lambda c=code, s=size: [bench.decode(c, s)] for size in ("16 KiB", LARGE)]  # type: ignore[misc]
        groups.append(lambda c=code: bench.copying(c))  # type: ignore[misc]
        groups += [lambda c=code, s=size: [bench.threads(c, s)] for size in ("256 KiB", LARGE)]  # type: ignore[misc]
    for size, length in (("1 MiB", 1 << 20), (LARGE, SIZES[LARGE])):
        groups.append(lambda s=size, n=length: [one for one in [bench.accumulate(s, n)] if one])  # type: ignore[misc]
    return groups


# --- peers that are called from Python --------------------------------------------------------------------------------


def from_python() -> list[tuple[str, float]]:
    """GB/s of encoding (8, 2) as a Python program sees it; what is not installed is left out."""
    k, m, length = 8, 2, 1 << 20
    data = [np.random.default_rng(i).integers(0, 256, length, dtype=np.uint8).tobytes() for i in range(k)]
    parity = [bytearray(length) for _ in range(m)]
    found = [("snapshotd", rate_of(lambda: _native.ec_encode(data, parity), k * length))]
    if importlib.util.find_spec("zfec"):
        zfec: Any = importlib.import_module("zfec")
        encoder = zfec.Encoder(k, k + m)
        found.append(("zfec", rate_of(lambda: encoder.encode(data, list(range(k, k + m))), k * length)))
    if importlib.util.find_spec("pyeclib"):
        driver: Any = importlib.import_module("pyeclib.ec_iface")
        coder = driver.ECDriver(k=k, m=m, ec_type="liberasurecode_rs_vand")
        whole = b"".join(data)
        found.append(("pyeclib (liberasurecode_rs_vand)", rate_of(lambda: coder.encode(whole), k * length)))
    if importlib.util.find_spec("reedsolo"):
        reedsolo: Any = importlib.import_module("reedsolo")
        codec, short = reedsolo.RSCodec(m, nsize=k + m), data[0][: 16 << 10]
        found.append(("reedsolo", rate_of(lambda: codec.encode(short), len(short), rounds=1)))
    return found


def rate_of(work: Callable[[], object], count: int, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return count / statistics.median(times) / 1e9


# --- showing ---------------------------------------------------------------------------------------------------------


def machine() -> str:
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    tiers = f"tier {_native.ec_tiers()[0]}, CRC32C by {_native.crc32c_tiers()[0]}"
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, {tiers}"


def print_table(results: list[Result], roof: Roof, rounds: int) -> None:
    print(
        f"from memory: read {roof.read / 1e9:.1f} GB/s, write {roof.write / 1e9:.1f} GB/s; {rounds} rounds in turns\n"
    )
    print("                        against   ours GB/s  peer GB/s  ratio  (middle half)   target    roof")
    for r in results:
        low, high = r.ratio_spread
        target = "   -   " if r.target is None else f">= {r.target:<4}"
        roof_ = "     " if r.roof_share is None else f"{r.roof_share:5.2f}"
        verdict = (
            ""
            if r.target is None or r.ratio >= r.target
            else "   MISSED, AT THE ROOF"
            if r.at_the_roof
            else "   MISSED"
        )
        name = f"{r.what} ({r.code[0]},{r.code[1]}) {r.size}"
        print(
            f"{name:27} {r.against:10} {r.gb_per_s:7.2f}    {r.peer_gb_per_s:7.2f}  {r.ratio:5.2f}"
            f"  ({low:.2f} .. {high:.2f})  {target}  {roof_}{verdict}"
        )


def plot(results: list[Result], file: str) -> None:
    """A bar for each ratio, its target as a mark."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    height = 0.24 * len(results) + 1
    figure, axes = pyplot.subplots(figsize=(9, height))
    names = [f"{r.what} ({r.code[0]},{r.code[1]}) {r.size}, {r.against}" for r in results]
    axes.barh(names, [r.ratio for r in results], color=["#4477aa" if r.reached else "#cc6677" for r in results])
    axes.plot([r.target or 0 for r in results], names, "k|", markersize=10)
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast (marks: targets)")
    axes.set_title(machine(), fontsize=8)
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds that the medians are taken of (15)")
    parser.add_argument("--quick", action="store_true", help="about 20 seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit 1 where a ratio misses its target")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the ratios (needs matplotlib)")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    rounds = 3 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        shim, missing = build(folder)
    bench = Bench(shim, missing is None)
    roof = roof_of(bench, rounds)
    results = [result for group in cases_of(bench) for result in measure(bench, group(), rounds, roof)]
    peers = from_python()
    if arguments.json:
        rows = [asdict(r) | {"reached": r.reached} for r in results]
        print(
            json.dumps({"machine": machine(), "rounds": rounds, "roof": asdict(roof), "results": rows, "python": peers})
        )
    else:
        print(machine())
        if missing:
            print(missing)
        print_table(results, roof, rounds)
        print("\nfrom Python, encode (8,2): " + ", ".join(f"{name} {rate:.3f} GB/s" for name, rate in peers))
    if arguments.plot:
        plot(results, arguments.plot)
    return 1 if arguments.check and not all(r.reached for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
