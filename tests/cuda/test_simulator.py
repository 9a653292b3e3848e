"""The simulator itself: what it has to find, and that it computes what nvcc's and the host's compilers mean.

Expressions are drawn by chance, compiled once by nvcc for the device and once by g++ for the host, and have to agree on
all their inputs. Operations that nvcc seldom writes stand as single instructions of PTX beside their definition in C++.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cuda import support
from tests.cuda.conftest import Running
from tests.cuda.support import BUILD

HERE = Path(__file__).resolve().parent
FINDINGS = {
    "reads_behind_its_end": "BOUNDS: read of 4 bytes",
    "writes_behind_its_end": "BOUNDS: write of 4 bytes",
    "reads_far_away": "BOUNDS: read of 4 bytes where there is no memory",
    "is_not_aligned": "ALIGNMENT: read of 4 bytes",
    "reads_what_nobody_wrote": "UNINITIALISED memory is read",
    "reads_shared_that_nobody_wrote": "UNINITIALISED shared memory is read",
    "runs_over_shared": "BOUNDS: shared read",
    "races_in_shared": "RACE .* in shared memory",
    "races_in_global": "RACE write-write in global memory with thread .* of block 0",
    "races_across_blocks": "RACE write-write in global memory with thread .* of block",
    "adds_without_atomics": "RACE",
    "waits_in_a_branch": "BARRIER: threads of a block wait at different barriers",
    "leaves_before_a_barrier": "BARRIER: some threads of the block have ended",
    "shuffles_outside_its_mask": "WARP: a shuffle reads a lane outside of its mask",
    "waits_for_lanes_that_left": "WARP: the mask names lane 16, which has ended",
    "divides_by_zero": "DIVISION by zero",
    "computes_with_floats": "is not known",
    "traps": "TRAP",
    "is_right": "",
    "counts_with_atomics": "",
}


def built(source: Path) -> Any:
    """A program of one .cu file, linked to the simulator."""
    out = BUILD / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "-shared", "-cudart=shared", "-Xcompiler=-fPIC", "-w"]
        code = "-gencode=arch=compute_80,code=compute_80"
        subprocess.run([str(support.nvcc()), *flags, code, str(source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


@pytest.mark.parametrize("which", range(len(FINDINGS)), ids=list(FINDINGS))
def test_each_bug_is_found_and_what_is_right_is_not_blamed(simulator: support.Simulator, which: int) -> None:
    expected = list(FINDINGS.values())[which]
    library = built(HERE / "bad.cu")
    given = np.arange(1, 65, dtype=np.uint32)
    out = np.zeros(128, np.uint32)
    for schedule in (support.LAZY, 5):
        simulator.reset(schedule)
        library.run(which, given.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p))
        found = simulator.findings()
        if not expected:
            assert not [one for one in found if "UNINITIALISED device" not in one]
        else:
            assert any(re.search(expected, one) for one in found), found
    simulator.reset()


# --- what it computes

TYPES = {"u32": "uint32_t", "s32": "int32_t", "u64": "uint64_t", "s64": "int64_t", "u16": "uint16_t", "u8": "uint8_t"}
PROGRAMS = 40  # expressions for each type
INPUTS = 64

PRELUDE = """
#include <cuda_runtime.h>
#include <cstdint>
#define FN __host__ __device__ static inline
template <typename T> FN T plus(T a, T b) { return T(uint64_t(a) + uint64_t(b)); }
template <typename T> FN T minus(T a, T b) { return T(uint64_t(a) - uint64_t(b)); }
template <typename T> FN T times(T a, T b) { return T(uint64_t(a) * uint64_t(b)); }
template <typename T> FN T over(T a, T b) { return T(a / T((b & 0x7F) | 1)); }
template <typename T> FN T rest(T a, T b) { return T(a % T((b & 0x7F) | 1)); }
template <typename T> FN T left(T a, T b) { return T(uint64_t(a) << (b & (8 * sizeof(T) - 1))); }
template <typename T> FN T right(T a, T b) { return T(a >> (b & (8 * sizeof(T) - 1))); }
template <typename T> FN T least(T a, T b) { return a < b ? a : b; }
template <typename T> FN T most(T a, T b) { return a < b ? b : a; }
template <typename T> FN T pick(T a, T b, T c) { return a > b ? c : T(a ^ b); }
template <typename T> FN T same(T a, T b) { return T(a == b ? 17 : 3); }
template <typename T> FN T narrow(T a) { return T(int8_t(a)) ^ T(uint16_t(a)); }
FN uint64_t high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return uint64_t((unsigned __int128)a * b >> 64);
#endif
}
FN int popcount(uint64_t a) {
#ifdef __CUDA_ARCH__
    return __popcll(a);
#else
    return __builtin_popcountll(a);
#endif
}
FN int zeros(uint32_t a) {
#ifdef __CUDA_ARCH__
    return __clz(a);
#else
    return a == 0 ? 32 : __builtin_clz(a);
#endif
}
"""


def expression(rng: random.Random, ctype: str, depth: int) -> str:
    """A random expression over a, b and c."""
    if depth == 0:
        return rng.choice(["a", "b", "c", f"{ctype}({rng.getrandbits(16)}ull)", f"{ctype}({rng.getrandbits(64)}ull)"])
    part = [expression(rng, ctype, depth - 1 - rng.randrange(2) * (depth > 1)) for _ in range(3)]
    two = ["plus", "minus", "times", "over", "rest", "left", "right", "least", "most", "same"]
    kind = rng.randrange(16)
    if kind < len(two):
        return f"{two[kind]}<{ctype}>({part[0]}, {part[1]})"
    if kind == 10:
        return f"pick<{ctype}>({part[0]}, {part[1]}, {part[2]})"
    if kind == 11:
        return f"narrow<{ctype}>({part[0]})"
    if kind == 12:
        return f"{ctype}(high({part[0]}, {part[1]}))"
    if kind == 13:
        return f"{ctype}(popcount({part[0]}) + zeros({part[1]}))"
    return f"{ctype}({part[0]} {rng.choice('&|^')} ~{part[1]})"


def random_program(seed: int) -> str:
    """One function for each type, with all its expressions; called by a kernel and by the host."""
    rng = random.Random(seed)
    text = [PRELUDE]
    for name, ctype in TYPES.items():
        lines = [f"    out[{i}] = uint64_t({expression(rng, ctype, 3)});" for i in range(PROGRAMS)]
        text += [f"FN void all_{name}({ctype} a, {ctype} b, {ctype} c, uint64_t* out) {{", *lines, "}"]
        text += [
            f"__global__ void kernel_{name}(const uint64_t* in, uint64_t* out) {{",
            "    const uint64_t* my = in + 3 * threadIdx.x;",
            f"    all_{name}({ctype}(my[0]), {ctype}(my[1]), {ctype}(my[2]), out + {PROGRAMS} * threadIdx.x);",
            "}",
            f'extern "C" void host_{name}(const uint64_t* in, uint64_t* out) {{',
            f"    for (int i = 0; i < {INPUTS}; ++i)",
            f"        all_{name}({ctype}(in[3 * i]), {ctype}(in[3 * i + 1]), {ctype}(in[3 * i + 2]),",
            f"                   out + {PROGRAMS} * i);",
            "}",
            device_call(name, 3 * INPUTS, PROGRAMS * INPUTS),
        ]
    return "\n".join(text)


def device_call(name: str, words_in: int, words_out: int) -> str:
    return f"""extern "C" void device_{name}(const uint64_t* in, uint64_t* out) {{
    uint64_t *from, *to;
    cudaMalloc(&from, {words_in} * 8);
    cudaMalloc(&to, {words_out} * 8);
    cudaMemcpyAsync(from, in, {words_in} * 8, cudaMemcpyHostToDevice, 0);
    kernel_{name}<<<1, {INPUTS}>>>(from, to);
    cudaMemcpyAsync(out, to, {words_out} * 8, cudaMemcpyDeviceToHost, 0);
    cudaStreamSynchronize(0);
    cudaFree(from);
    cudaFree(to);
}}"""


def inputs(seed: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Random words, and the corners of every width."""
    rng = np.random.default_rng(seed)
    corners = [
        0,
        1,
        2,
        31,
        32,
        33,
        63,
        64,
        127,
        128,
        255,
        256,
        2**15,
        2**16 - 1,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**63,
        2**64 - 1,
    ]
    words = rng.integers(0, 2**64, 3 * INPUTS, np.uint64)
    at = rng.permutation(3 * INPUTS)[: 2 * INPUTS]
    words[at] = np.array(corners, np.uint64)[rng.integers(0, len(corners), len(at))]
    return words


def agree(sim: Running, library: Any, name: str, words_out: int, seed: int) -> None:
    given = inputs(seed)
    found, expected = np.zeros(words_out, np.uint64), np.ones(words_out, np.uint64)
    for call, out in ((f"device_{name}", found), (f"host_{name}", expected)):
        pointers = (one.ctypes.data_as(ctypes.c_void_p) for one in (given, out))
        getattr(library, call)(*pointers)
    assert not sim.simulator.findings(), sim.simulator.findings()
    differs = np.nonzero(found != expected)[0]
    assert len(differs) == 0, f"{name}: output {differs[0]}: {found[differs[0]]:#x}, not {expected[differs[0]]:#x}"


def compiled(name: str, text: str) -> Any:
    source = BUILD / f"{name}.cu"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text)
    return built(source)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_expressions_mean_to_nvcc_what_they_mean_to_the_host(sim: Running, seed: int) -> None:
    library = compiled(f"random-{seed}", random_program(seed))
    for name in TYPES:
        for draw in range(4):
            agree(sim, library, name, PROGRAMS * INPUTS, draw)


# A single instruction of PTX, and what it means. Operands: %0 is the result, %1 … %3 are x, y, z.
M32 = "0xFFFFFFFFull"
SINGLE: dict[str, tuple[str, str, str]] = {
    # name: (operands' width, instruction, definition)
    "lop3_96": ("r", "lop3.b32 %0, %1, %2, %3, 0x96;", "x ^ y ^ z"),
    "lop3_e8": ("r", "lop3.b32 %0, %1, %2, %3, 0xE8;", "(x & y) | (x & z) | (y & z)"),
    "lop3_1b": ("r", "lop3.b32 %0, %1, %2, %3, 0x1B;", "(~x & ~y & ~z) | (~x & ~y & z) | (~x & y & z) | (x & ~y & ~z)"),
    "prmt": ("r", "prmt.b32 %0, %1, %2, %3;", "permute(x, y, z)"),
    "shf_l_wrap": ("r", "shf.l.wrap.b32 %0, %1, %2, %3;", "uint32_t((((uint64_t(y) << 32) | x) << (z & 31)) >> 32)"),
    "shf_r_wrap": ("r", "shf.r.wrap.b32 %0, %1, %2, %3;", "uint32_t(((uint64_t(y) << 32) | x) >> (z & 31))"),
    "shf_r_clamp": ("r", "shf.r.clamp.b32 %0, %1, %2, %3;", "uint32_t(((uint64_t(y) << 32) | x) >> (z > 32 ? 32 : z))"),
    "shf_l_clamp": ("r", "shf.l.clamp.b32 %0, %1, %2, %3;",
                    "z >= 32 ? x : uint32_t((((uint64_t(y) << 32) | x) << z) >> 32)"),
    "bfe_u32": ("r", "bfe.u32 %0, %1, %2, %3;", "extract(x, y & 255, z & 255)"),
    "bfi_b32": ("r", "bfi.b32 %0, %1, %2, 5, 9;", "(y & ~(511u << 5)) | ((x & 511u) << 5)"),
    "bfind_u32": ("r", "bfind.u32 %0, %1;", "x == 0 ? 0xFFFFFFFFu : 31 - __builtin_clz(x)"),
    "brev_b32": ("r", "brev.b32 %0, %1;", "reverse(x)"),
    "mad_hi_u32": ("r", "mad.hi.u32 %0, %1, %2, %3;", "uint32_t((uint64_t(x) * y) >> 32) + z"),
    "mad_lo_s32": ("r", "mad.lo.s32 %0, %1, %2, %3;", "x * y + z"),
    "mul_hi_s32": ("r", "mul.hi.s32 %0, %1, %2;", "uint32_t((int64_t(int32_t(x)) * int32_t(y)) >> 32)"),
    "shl_far": ("r", "shl.b32 %0, %1, %2;", "y >= 32 ? 0 : x << y"),
    "shr_s_far": ("r", "shr.s32 %0, %1, %2;", "uint32_t(int32_t(x) >> (y > 31 ? 31 : y))"),
    "abs_s32": ("r", "abs.s32 %0, %1;", "int32_t(x) < 0 ? 0u - x : x"),
    "cnot_b32": ("r", "cnot.b32 %0, %1;", "x == 0"),
    "neg_s32": ("r", "neg.s32 %0, %1;", "0u - x"),
    "min_s32": ("r", "min.s32 %0, %1, %2;", "uint32_t(int32_t(x) < int32_t(y) ? x : y)"),
    "max_u32": ("r", "max.u32 %0, %1, %2;", "x > y ? x : y"),
    "setp_and": ("r", "{ .reg .pred p, q; setp.ne.u32 q, %3, 0; setp.lt.and.s32 p, %1, %2, q; selp.b32 %0, 1, 2, p; }",
                 "int32_t(x) < int32_t(y) && z != 0 ? 1 : 2"),
    "setp_pair": ("r", "{ .reg .pred p, q; setp.hs.u32 p|q, %1, %2; selp.b32 %0, %1, %2, q; }", "x >= y ? y : x"),
    "mul_wide": ("l", "{ .reg .u32 a, b; cvt.u32.u64 a, %1; cvt.u32.u64 b, %2; mul.wide.u32 %0, a, b; }",
                 f"(x & {M32}) * (y & {M32})"),
    "mad_wide_s": ("l", "{ .reg .s32 a, b; cvt.u32.u64 a, %1; cvt.u32.u64 b, %2; mad.wide.s32 %0, a, b, %3; }",
                   "uint64_t(int64_t(int32_t(x)) * int32_t(y)) + z"),
    "mul_hi_s64": ("l", "mul.hi.s64 %0, %1, %2;", "uint64_t((__int128(int64_t(x)) * int64_t(y)) >> 64)"),
    "clz_b64": ("l", "{ .reg .u32 a; clz.b64 a, %1; cvt.u64.u32 %0, a; }", "x == 0 ? 64 : __builtin_clzll(x)"),
    "popc_b64": ("l", "{ .reg .u32 a; popc.b64 a, %1; cvt.u64.u32 %0, a; }", "__builtin_popcountll(x)"),
    "cvt_s8": ("l", "cvt.s64.s8 %0, %1;", "uint64_t(int64_t(int8_t(x)))"),
    "cvt_u16": ("l", "cvt.u64.u16 %0, %1;", "x & 0xFFFF"),
    "shr_u64": ("l", "{ .reg .u32 a; cvt.u32.u64 a, %2; shr.u64 %0, %1, a; }",
                f"(y & {M32}) >= 64 ? 0 : x >> (y & 63)"),
    "mov_pair": ("l", "{ .reg .u32 a, b; mov.b64 {a, b}, %1; mov.b64 %0, {b, a}; }", "(x << 32) | (x >> 32)"),
}  # fmt: skip

SINGLE_PRELUDE = """
static inline uint32_t permute(uint32_t x, uint32_t y, uint32_t z) {
    uint8_t all[8];
    for (int i = 0; i < 4; ++i) all[i] = uint8_t(x >> 8 * i), all[4 + i] = uint8_t(y >> 8 * i);
    uint32_t made = 0;
    for (int i = 0; i < 4; ++i) {
        int pick = z >> 4 * i & 15, byte = all[pick & 7];
        made |= uint32_t(pick & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return made;
}
static inline uint32_t extract(uint32_t x, uint32_t from, uint32_t length) {
    uint64_t mask = length >= 32 ? 0xFFFFFFFFull : (1ull << length) - 1;
    return from >= 32 ? 0 : uint32_t((x >> from) & mask);
}
static inline uint32_t reverse(uint32_t x) {
    uint32_t made = 0;
    for (int i = 0; i < 32; ++i) made |= (x >> i & 1) << (31 - i);
    return made;
}
"""


def single_program() -> str:
    device, host = [], []
    for i, (width, instruction, meaning) in enumerate(SINGLE.values()):
        ctype = "uint32_t" if width == "r" else "uint64_t"
        names = f"{ctype} x = {ctype}(my[0]), y = {ctype}(my[1]), z = {ctype}(my[2]), got = 0;"
        operands = f'"={width}"(got) : "{width}"(x), "{width}"(y), "{width}"(z)'
        device.append(f'    {{ {names} asm volatile("{instruction}" : {operands}); out[{i}] = got; }}')
        host.append(f"    {{ {names} got = {ctype}({meaning}); out[{i}] = got; (void)x; (void)y; (void)z; }}")
    count = len(SINGLE)
    return "\n".join(
        [
            PRELUDE, SINGLE_PRELUDE,
            "__global__ void kernel_single(const uint64_t* in, uint64_t* all) {",
            f"    const uint64_t* my = in + 3 * threadIdx.x; uint64_t* out = all + {count} * threadIdx.x;",
            *device, "}",
            'extern "C" void host_single(const uint64_t* in, uint64_t* all) {',
            f"  for (int i = 0; i < {INPUTS}; ++i) {{",
            f"    const uint64_t* my = in + 3 * i; uint64_t* out = all + {count} * i;",
            *host, "  }", "}",
            device_call("single", 3 * INPUTS, count * INPUTS),
        ]
    )  # fmt: skip


def test_single_instructions_do_what_their_definition_says(sim: Running) -> None:
    library = compiled("single", single_program())
    for draw in range(8):
        agree(sim, library, "single", len(SINGLE) * INPUTS, draw)
