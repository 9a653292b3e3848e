"""Proofs, not samples: every network of XORs equals the field's multiplication for all inputs.

1. The steps in field.cuh, run on the host for every pair of field elements.
2. Every specialised encode, as nvcc compiled it. Its PTX lets data from memory flow through XOR, moves and stores only
   (so the kernel is linear over GF(2)), and one run gives the right parity for every basis vector of its 8k inputs:
   both together are a proof for all data. 512 elements of a superblock have room for all 8k <= 128 basis vectors.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import lru_cache

import numpy as np
import pytest

from tests.cuda import support, twin
from tests.cuda.conftest import Running
from tests.cuda.support import ARCHS, BUILD, CUDA, card
from tests.cuda.twin import Bytes

STEPS = r"""
#include "field.cuh"
using namespace snapshotd::gpu;
static void spread(uint8_t value, uint8_t (&planes)[8]) {
    for (int p = 0; p < 8; ++p) planes[p] = uint8_t(value >> p & 1);
}
static uint8_t gather(const uint8_t (&planes)[8]) {
    uint8_t value = 0;
    for (int p = 0; p < 8; ++p) value |= uint8_t((planes[p] & 1) << p);
    return value;
}
template <int ROW> static uint8_t step(int a, int d) {
    uint8_t sums[8], data[8];
    spread(uint8_t(a), sums), spread(uint8_t(d), data);
    horner<ROW>(sums, data);
    return gather(sums);
}
extern "C" void steps(uint8_t* out) {
    for (int a = 0; a < 256; ++a)
        for (int d = 0; d < 256; ++d) {
            uint8_t* at = out + 4 * (256 * a + d);
            at[0] = step<0>(a, d), at[1] = step<1>(a, d), at[2] = step<2>(a, d), at[3] = step<3>(a, d);
        }
}
// multiply_add's way: bits of the factor, doublings of the data.
extern "C" void products(uint8_t* planes_out, uint8_t* bytes_out) {
    for (int factor = 0; factor < 256; ++factor)
        for (int value = 0; value < 256; ++value) {
            uint8_t data[8], sum[8] = {};
            spread(uint8_t(value), data);
            uint32_t word = 0x01010101u * uint32_t(value), total = 0;
            for (int bit = 0; bit < 8; ++bit) {
                for (int p = 0; p < 8; ++p) sum[p] ^= data[p] & mask_of<uint8_t>(uint32_t(factor), bit);
                total ^= word & mask_of<uint32_t>(uint32_t(factor), bit);
                times_x(data);
                word = bytes_times_x(word);
            }
            planes_out[256 * factor + value] = gather(sum);
            uint8_t* lanes = bytes_out + 4 * (256 * factor + value);
            for (int lane = 0; lane < 4; ++lane) lanes[lane] = uint8_t(total >> 8 * lane);
        }
}
// Neighbours in a word do not touch each other: every value beside every other.
extern "C" int lanes_are_apart() {
    for (uint32_t a = 0; a < 65536; ++a)
        for (int shift = 0; shift <= 16; shift += 8) {
            uint32_t both = bytes_times_x(a << shift), low = bytes_times_x((a & 255) << shift);
            if (both != (low ^ bytes_times_x((a >> 8) << (shift + 8)))) return 0;
        }
    return 1;
}
"""


@lru_cache
def steps() -> ctypes.CDLL:
    BUILD.mkdir(parents=True, exist_ok=True)
    source, out = BUILD / "steps.cpp", BUILD / "steps.so"
    source.write_text(STEPS)
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", f"-I{CUDA}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def _room(count: int) -> tuple[Bytes, ctypes.c_void_p]:
    room = np.zeros(count, np.uint8)
    return room, room.ctypes.data_as(ctypes.c_void_p)


def test_each_step_is_its_multiplication_for_every_pair_of_elements() -> None:
    found, at = _room(4 * 65536)
    steps().steps(at)
    a, d = np.divmod(np.arange(65536), 256)
    for row in range(4):
        expected = twin.PRODUCTS[twin.coefficient(row, 1)][a] ^ d
        assert np.array_equal(found.reshape(-1, 4)[:, row], expected), f"row {row}"


def test_products_by_bits_of_the_factor_are_the_fields_for_every_pair() -> None:
    in_planes, at = _room(65536)
    in_bytes, beside = _room(4 * 65536)
    steps().products(at, beside)
    assert np.array_equal(in_planes.reshape(256, 256), twin.PRODUCTS)
    for lane in range(4):
        assert np.array_equal(in_bytes.reshape(256, 256, 4)[:, :, lane], twin.PRODUCTS)
    assert steps().lanes_are_apart()


@lru_cache
def ptx_of(arch: int) -> dict[str, str]:
    """The body of each encode kernel, by name, as nvcc writes it into the module."""
    out = BUILD / f"encode.{arch}.ptx"
    BUILD.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", f"-arch=compute_{arch}", "-ptx"]
    subprocess.run([str(support.nvcc()), *flags, str(CUDA / "encode.cu"), "-o", str(out)], check=True)
    return dict(re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", out.read_text(), re.DOTALL))


def not_linear(body: str) -> str:
    """The first instruction that does something else than XOR with what came from memory; "" if there is none."""
    data: set[str] = set()
    lines = [line.strip() for line in body.splitlines()]
    code = [line for line in lines if re.match(r"(@|[a-z])", line)]
    while True:  # until no more registers are found to hold data: loops carry none round, but who knows
        before = len(data)
        for line in code:
            guarded = line.split(" ", 1)[1] if line.startswith("@") else line
            opcode, operands = re.split(r"\s+", guarded + " ", maxsplit=1)
            registers = re.findall(r"%\w+", operands)
            if opcode.startswith("ld.global"):
                data.update(registers[:-1])
                if registers[-1] in data:
                    return line
            elif opcode.startswith("st.global"):
                if registers[0] in data or not set(registers[1:]) <= data:
                    return line
            elif opcode in ("xor.b32", "mov.b32", "mov.u32") and set(registers[1:]) & data:
                if not set(registers[1:]) <= data or len(registers) != operands.count(",") + 1:
                    return line
                data.add(registers[0])
            elif set(registers) & data:
                return line
        if len(data) == before:
            return ""


@pytest.mark.parametrize("arch", ARCHS)
def test_every_specialised_encode_is_proven_for_all_inputs(sim: Running, arch: int) -> None:
    bodies = ptx_of(arch)
    for k in range(1, 17):
        basis = np.zeros((k, 512), np.uint8)  # element e of the superblock: bit e % 8 of symbol e // 8
        for e in range(8 * k):
            basis[e // 8, e] = 1 << (e % 8)
        symbols = [twin.planes(one[None, :]) for one in basis]
        for m in range(1, 5):
            name = f"planes_encode_{k}_{m}"
            assert not_linear(bodies[name]) == "", name
            sim.on(support.LAZY, arch)
            with card(sim.cuda.Device()) as on:
                out = [on.room(512) for _ in range(m)]
                on.device.encode([on.put(one) for one in symbols], out, 512)
                for row in range(m):
                    found = twin.elements(on.get(out[row], 512))[0]
                    for e in range(8 * k):
                        expected = twin.PRODUCTS[twin.coefficient(row, e // 8)][1 << (e % 8)]
                        assert found[e] == expected, f"{name}: row {row}, symbol {e // 8}, bit {e % 8}"


def test_the_proof_of_linearity_refuses_what_is_not_linear() -> None:
    load = "ld.global.cs.v4.u32 {%r1,%r2,%r3,%r4}, [%rd1];\n"
    assert not_linear(load + "xor.b32 %r5, %r1, %r2;\nst.global.cs.u32 [%rd2], %r5;") == ""
    for line in (
        "and.b32 %r5, %r1, %r2;", "xor.b32 %r5, %r1, 1;", "xor.b32 %r5, %r1, %r9;", "add.s32 %r5, %r1, %r2;",
        "setp.eq.s32 %p1, %r1, 0;", "st.global.cs.u32 [%rd2], %r9;", "cvt.u64.u32 %rd5, %r1;",
    ):  # fmt: skip
        assert not_linear(load + line) == line
