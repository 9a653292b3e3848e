"""The static gate: what ptxas made of every kernel, for every architecture, read from its machine code.

    python -m tests.cuda.gate [ARCH …]

Refuses spills, local memory, generic addresses, narrow accesses in bulk kernels, and more instructions for a byte than
leave the memory the bottleneck by a factor of two (1.5 where a reason says so). Prints a table. Its speeds are
predictions from data sheets by a roofline: nothing of it was measured.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.cuda import support

HEADROOM_MIN = 2.0
# Kernels for which twice the speed of memory cannot be had, what is asked of them instead, and why.
_BYTES = (
    "a product of bytes takes 8 doublings and 8 masked sums, 4 bytes at a time: 12 instructions for each byte and row, "
    "however it is written; for codes in `bytes` and tails only"
)
_TABLES = (
    "four table look-ups and their XORs for each 4 bytes that are read, and nothing written; it sees only what then "
    "crosses the bus, which is 30 to 80 times slower than this"
)
LESS = {"bytes_combine_1": (1.5, _BYTES), "bytes_combine_2": (1.5, _BYTES), "crc32c_blocks": (1.5, _TABLES)}
REGISTERS_MAX = 255
FILES = ("encode.cu", "kernels.cu")
SHOWN = (
    "planes_encode_4_1", "planes_encode_4_2", "planes_encode_6_2", "planes_encode_8_2", "planes_encode_8_3",
    "planes_encode_10_4", "planes_encode_16_4", "planes_encode_any_2", "planes_encode_any_4", "planes_decode_1",
    "planes_decode_3", "planes_decode_7", "planes_decode_15", "planes_combine_1", "planes_combine_4",
    "bytes_combine_1", "bytes_combine_4", "crc32c_blocks", "copy_pieces",
)  # fmt: skip
_PTXAS = re.compile(
    r"Compiling entry function '(\S+)' for '\S+'\n.*?\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\n.*?Used (\d+) registers"
)
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)\s*(.*?);")
# Integer pipe, 64 lanes a clock on each multiprocessor of all these.
_ALU = re.compile(r"(LOP3|PLOP3|SHF|IADD|LEA|PRMT|ISETP|SEL|IMNMX|VIMNMX|MOV|SGXT|IABS|P2R|R2P|BREV)")


@dataclass(frozen=True)
class Card:
    """A card by its data sheet."""

    name: str
    arch: str
    multiprocessors: int
    clock_ghz: float
    memory_tb_s: float


CARDS = (Card("A100 80GB SXM", "80", 108, 1.41, 2.039), Card("H100 SXM", "90", 132, 1.755, 3.35))


@dataclass
class Code:
    """One kernel of one architecture."""

    name: str
    arch: str
    registers: int
    stack: int
    spilled: int
    lines: list[tuple[str, str]] = field(default_factory=list)  # opcode and operands; ("label", name)

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode, _ in self.lines)

    def loop(self) -> list[str]:
        """The opcodes of the innermost loop that loads most."""
        place = {name: i for i, (opcode, name) in enumerate(self.lines) if opcode == "label"}
        best: list[str] = []
        spans = []
        for i, (opcode, operands) in enumerate(self.lines):
            target = re.search(r"\.L_x_\d+", operands)
            if opcode.startswith("BRA") and target and place.get(target[0], i) < i:
                spans.append((place[target[0]], i))
        for begin, end in spans:
            body = [opcode for opcode, _ in self.lines[begin : end + 1] if opcode != "label"]
            inner = any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
            if _loaded(body) and (not inner or self.name.startswith("planes_encode")) and _loaded(body) > _loaded(best):
                best = body
        return best


def _width(opcode: str) -> int:
    found = re.search(r"\.(U8|S8|U16|S16|64|128)\b", opcode)
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[found[1]] if found else 4


def _loaded(body: Sequence[str]) -> int:
    return sum(_width(opcode) for opcode in body if opcode.startswith("LDG"))


def nvdisasm() -> str | None:
    """The disassembler from the toolkit or from PyPI."""
    places = [Path(str(support.nvcc())).parent / "nvdisasm", Path("/usr/local/cuda/bin/nvdisasm")]
    places += Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvdisasm")
    return next((str(place) for place in places if place.is_file()), None)


def compiled(arch: str, source: str, folder: Path) -> list[Code]:
    """What ptxas says and what it wrote."""
    out = folder / f"{source}.{arch}.cubin"
    command = [str(support.nvcc()), "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
    done = subprocess.run(
        [*command, "-Xptxas=-v", str(support.CUDA / source), "-o", str(out)], capture_output=True, text=True, check=True
    )
    codes = {
        name: Code(name, arch, int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in _PTXAS.findall(done.stderr)
    }
    text = subprocess.run([str(nvdisasm()), "-c", str(out)], capture_output=True, text=True, check=True).stdout
    current: Code | None = None
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            current = codes[section[1]]
        elif current is None:
            continue
        elif label := re.match(r"(\.L_x_\d+):", line):
            current.lines.append(("label", label[1]))
        elif instruction := _INSTRUCTION.match(line):
            current.lines.append((instruction[1], instruction[2]))
    return list(codes.values())


def bulk_width(name: str) -> int | None:
    """The only width of access that a kernel may have; None for kernels with tails."""
    encode = re.match(r"planes_encode_(\w+)_(\d)$", name)
    if encode:
        few = encode[1] in ("1", "2")
        return 8 if encode[2] == "4" and not few else 16
    if re.match(r"planes_(decode|combine)_\d+$", name):
        return 16
    return None


def traffic(name: str) -> float:
    """Bytes of memory moved for each byte of source that the loop loads, at k = 8 where k is not in the name."""
    if encode := re.match(r"planes_encode_(\d+)_(\d)$", name):
        return 1 + int(encode[2]) / int(encode[1])
    if many := re.match(r"planes_encode_any_(\d)$", name):
        return 1 + int(many[1]) / 8
    if combine := re.match(r"(?:planes|bytes)_combine_(\d)$", name):
        return 1 + 2 * int(combine[1])  # one piece arrives, every row is read and written
    return 2 if name == "copy_pieces" else 1


@dataclass(frozen=True)
class Prediction:
    """How one kernel would run on one card, if only data sheets counted."""

    instructions_per_byte: float
    headroom: float  # how much faster than memory its instructions are issued and executed
    source_tb_s: float


def predicted(code: Code, card: Card) -> Prediction | None:
    body = code.loop()
    loaded = _loaded(body)
    if not loaded:
        return None
    lanes = card.multiprocessors * card.clock_ghz * 1e9
    issue_s = len(body) / loaded / (lanes * 128)
    alu_s = sum(bool(_ALU.match(opcode)) for opcode in body) / loaded / (lanes * 64)
    memory_s = traffic(code.name) / (card.memory_tb_s * 1e12)
    slowest_s = max(issue_s, alu_s, memory_s)
    return Prediction(len(body) / loaded, memory_s / max(issue_s, alu_s), 1 / slowest_s / 1e12)


def headroom_min(name: str) -> float:
    """How much faster than memory a kernel has to be; 0 for what is bound by neither."""
    if name in LESS:
        return LESS[name][0]
    bulk = re.match(r"planes_(encode|decode|combine)_\w*\d$|bytes_combine_\d$|copy_pieces$", name)
    return HEADROOM_MIN if bulk and "unaligned" not in name else 0.0


def refusals(code: Code) -> Iterator[str]:
    """What the gate does not let through."""
    if code.spilled or code.stack or code.count(r"(LDL|STL)\b"):
        yield f"{code.spilled} bytes are spilled, {code.stack} bytes of local memory"
    if code.registers > REGISTERS_MAX:
        yield f"{code.registers} registers"
    if generic := code.count(r"(LD|ST)(\.|$)"):
        yield f"{generic} generic accesses"
    accesses = [opcode for opcode, _ in code.lines if re.match(r"(LDG|STG)\b", opcode)]
    width = bulk_width(code.name)
    narrow = [opcode for opcode in accesses if width and _width(opcode) != width]
    if narrow:
        yield f"{narrow[0]} where every access has {width} bytes"
    if width is None and "unaligned" not in code.name and not any(_width(opcode) == 16 for opcode in accesses):
        yield "no access of 16 bytes"
    for card in CARDS:
        found = predicted(code, card) if card.arch == code.arch else None
        if found and found.headroom < headroom_min(code.name):
            yield f"on {card.name} only {found.headroom:.1f} times as fast as memory"


def table(codes: Sequence[Code]) -> Iterator[str]:
    """The rows that docs/cuda.md holds."""
    by = {(code.name, code.arch): code for code in codes}
    heads = (f"{card.name + ': instr/B':>26}{'headroom':>10}{'TB/s':>7}" for card in CARDS)
    yield f"{'kernel':22}{'registers':>10}" + "".join(heads)
    for name in SHOWN:
        registers = "-".join(
            str(edge(by[name, code_arch].registers for code_arch in support.builder().ARCHS if (name, code_arch) in by))
            for edge in (min, max)
        )
        row = f"{name:22}{registers:>10}"
        for card in CARDS:
            found = predicted(by[name, card.arch], card) if (name, card.arch) in by else None
            row += f"{found.instructions_per_byte:26.2f}{found.headroom:9.1f}x{found.source_tb_s:7.2f}" if found else ""
        yield row


def main(archs: Sequence[str]) -> int:
    if nvdisasm() is None:
        print("the gate needs nvdisasm: pip install nvidia-cuda-nvdisasm")
        return 1
    with tempfile.TemporaryDirectory(prefix="snapshotd-gate-") as name, ThreadPoolExecutor(2) as pool:
        jobs = [(arch, source) for arch in archs for source in FILES]
        codes = [code for some in pool.map(lambda job: compiled(job[0], job[1], Path(name)), jobs) for code in some]
    refused = [f"sm_{code.arch} {code.name}: {why}" for code in codes for why in refusals(code)]
    print("\n".join(table(codes)))
    for kernel, (least, why) in LESS.items():
        print(f"{kernel}: {least} times is asked, not {HEADROOM_MIN}: {why}")
    print("(predictions by roofline from data sheets, nothing was measured; source TB/s; headroom is over memory)")
    print("\n".join(refused))
    kernels = len({code.name for code in codes})
    print(f"gate: {kernels} kernels x {len(archs)} architectures, {len(refused)} refused")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or support.builder().ARCHS))
