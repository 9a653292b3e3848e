"""Does the simulator bite? Bugs are planted into kernels and host code, one at a time; every one has to be caught.

    python -m tests.cuda.mutants [NAME …]

Each mutant is one edit of one source, built by nvcc (few kernels, PTX of one architecture) and run through
`tests.cuda.quick` in a process of its own; the client's, in Python, through `tests.cuda.quick_client` with the unchanged
module. What is unchanged has to pass. Ends with status 1 where one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.cuda import support

JOBS = 2
RUN_MAX_S = 170.0
FLAGS = ["-DSNAPSHOTD_FEW", "-gencode=arch=compute_80,code=compute_80"]


@dataclass(frozen=True)
class Mutant:
    """`before` stands in `source`, at least `nth` times; the nth is replaced."""

    name: str
    source: str
    before: str
    after: str
    nth: int = 1


KERNELS = (
    Mutant("a wrong polynomial", "field.cuh", "a[2] = a[1] ^ top ^ d[2];", "a[2] = a[1] ^ d[2];"),
    Mutant("a wrong inverse of x", "field.cuh", "a[3] = a[4] ^ low ^ d[3];", "a[3] = a[4] ^ d[3];"),
    Mutant("a wrong square of x", "field.cuh", "both = six ^ seven", "both = six"),
    Mutant("doubling without a carry", "field.cuh", "a[4] = a[3] ^ top;", "a[4] = a[3];"),
    Mutant("a wrong polynomial in bytes", "field.cuh", "carry * 0x1Du", "carry * 0x1Bu"),
    Mutant("carries into the next byte", "field.cuh", "(a & 0x7F7F7F7Fu) << 1", "a << 1"),
    Mutant("one bit of a factor is forgotten", "planes.cuh", "bit < 8; ++bit", "bit < 7; ++bit"),
    Mutant("planes of 32 bytes", "planes.cuh", "at + p * kPlaneBytes));\n#pragma", "at + p * 32));\n#pragma"),
    Mutant("one column too many", "planes.cuh", "c < columns_in<Vector>(superblocks)", "c <= columns_in<Vector>(superblocks)"),
    Mutant("every block does all the work", "memory.cuh", "{uint64_t{blockIdx.x} * blockDim.x + threadIdx.x,", "{threadIdx.x,"),
    Mutant("the grid does not go round", "memory.cuh", "uint64_t{gridDim.x} * blockDim.x}", "~0ull >> 1}"),
    Mutant("the last symbol is left out", "planes.cuh", "for (int i = K - 2; i >= 0; --i)", "for (int i = K - 2; i > 0; --i)"),
    Mutant("symbols in the wrong order", "planes.cuh", "load_column(sums[0], symbols.in[K - 1] + at)", "load_column(sums[0], symbols.in[0] + at)"),
    Mutant("parity is not read in a decode", "planes.cuh", "horner_column<0>(syndromes[j], parity);", ""),
    Mutant("a lost symbol is not zero", "planes.cuh", "} else {\n                clear(d);", "} else {\n                load_column(d, job.in[1] + at);"),
    Mutant("adding to what was never written", "planes.cuh", "if (job.add) {", "if (true) {"),
    Mutant("the tail starts too late", "bytes.cuh", "from + wide * sizeof(Wide) + share.first", "from + wide * sizeof(Wide) + 1 + share.first"),
    Mutant("the tail runs over", "bytes.cuh", "at < to; at += share.step", "at <= to; at += share.step"),
    Mutant("unaligned pointers in wide loads", "bytes.cuh", "aligned ? (to - from) / sizeof(Wide) : 0", "(to - from) / sizeof(Wide)"),
    Mutant("no barrier behind the tables", "crc32c.cuh", "    __syncthreads();\n    for (uint64_t block", "    for (uint64_t block"),
    Mutant("no barrier before partial sums are read", "crc32c.cuh", "partial[t / 32] = mine;\n        __syncthreads();", "partial[t / 32] = mine;"),
    Mutant("no barrier before the next block", "crc32c.cuh", "        __syncthreads();\n    }\n}", "    }\n}"),
    Mutant("a barrier for half of the threads", "crc32c.cuh", "partial[t / 32] = mine;\n        __syncthreads();", "partial[t / 32] = mine;\n        if (t & 1) __syncthreads();"),
    Mutant("a table entry is never written", "crc32c.cuh", "for (int b = 0; b < 4; ++b) table[b][t]", "for (int b = 0; b < 3; ++b) table[b][t]"),
    Mutant("partial sums of too few warps", "crc32c.cuh", "if (t % 32 == 0) partial[t / 32] = mine;", "if (t % 64 == 0) partial[t / 32] = mine;"),
    Mutant("a shuffle with a mask too small", "crc32c.cuh", "__shfl_down_sync(0xFFFFFFFFu", "__shfl_down_sync(0x0000FFFFu"),
    Mutant("threads that end before a barrier", "crc32c.cuh", "    const int t = static_cast<int>(threadIdx.x);", "    const int t = static_cast<int>(threadIdx.x);\n    if (t > 250) return;"),
    Mutant("a wrong distance between neighbours", "crc32c.cuh", "join<4>(mine, 4)", "join<8>(mine, 4)"),
    Mutant("a CRC that begins with zeros", "crc32c.cuh", "if (at == padding) v.word[0] ^= 0xFFFFFFFFu;", ""),
    Mutant("the wrong piece at a border", "pieces.cuh", "first_chunk) <= chunk", "first_chunk) < chunk"),
    Mutant("a piece's tail is lost", "pieces.cuh", "i < bytes; i += share.step) {", "i + 1 < bytes; i += share.step) {"),
    Mutant("a piece runs over its end", "pieces.cuh", "left < kChunkBytes ? left : kChunkBytes", "kChunkBytes"),
    Mutant("wide copies of what is not aligned", "pieces.cuh", "if (apart % 16 == 0)", "if (apart % 4 == 0)"),
)  # fmt: skip

HOST = (
    Mutant("the side stream does not wait for the compute stream", "side_copy.cpp", "    device_.wait(side_, ready_);\n", ""),
    Mutant("the event is recorded on the wrong stream", "side_copy.cpp", "device_.record(ready_, compute);", "device_.record(ready_, side_);"),
    Mutant("the compute stream is not held", "side_copy.cpp", "if (running_) device_.wait(compute, read_);", "(void)compute;"),
    Mutant("the tensors count as read too early", "side_copy.cpp", "if (last) device_.record(read_, side_);", "if (bucket.at == 0) device_.record(read_, side_);"),
    Mutant("the end is recorded before the last copy", "side_copy.cpp", "        for (const Bucket& bucket : buckets_) enqueue(bucket, slot, crcs);\n        device_.record(over_, side_);", "        device_.record(over_, side_);\n        for (const Bucket& bucket : buckets_) enqueue(bucket, slot, crcs);"),
    Mutant("nobody waits for the end", "side_copy.cpp", "    device_.reach(over_);\n", ""),
    Mutant("the compute stream's event is waited for instead", "side_copy.cpp", "device_.reach(over_);", "device_.reach(read_);"),
    Mutant("checksums before the host's bytes are up", "side_copy.cpp", "const bool last = &bucket == &buckets_.back();", "const bool last = &bucket == &buckets_.back();\n    device_.crc32c(stage_->at(), bucket.bytes, block_bytes_, reinterpret_cast<uint32_t*>(crc_memory_->at()), side_);"),
    Mutant("the gather runs on the default stream", "side_copy.cpp", "bucket.pieces, bucket.chunks, side_)", "bucket.pieces, bucket.chunks, 0)"),
    Mutant("copies go to the default stream", "side_copy.cpp", "device_.copy(to + at, from_device + at, length, stream);", "device_.copy(to + at, from_device + at, length, Stream{0});"),
    Mutant("copies cross the border of two segments", "side_copy.cpp", "std::min(segment_bytes_ - (from + done) % segment_bytes_, bytes - done)", "bytes - done"),
    Mutant("segments of any size", "side_copy.cpp", "std::min(segment_bytes_, bytes_ - pinned_)", "bytes_ - pinned_"),
    Mutant("a segment stays registered", "side_copy.cpp", "Pinned::~Pinned() {\n    for (uint64_t at = 0;", "Pinned::~Pinned() {\n    for (uint64_t at = segment_bytes_;"),
    Mutant("the table of pieces stays on the host", "side_copy.cpp", "device.copy(table_memory_->at(), table_.data(), table_.size() * sizeof(Piece), side_);", "(void)0;"),
    Mutant("lanes share one room", "host_codec.cpp", "uint8_t* room = lane.room.at();", "uint8_t* room = lanes_.front()->room.at();"),
    Mutant("parity goes down on another stream", "host_codec.cpp", "memory.copy_down(parity[r] + at, out[r], bytes, lane.stream);", "memory.copy_down(parity[r] + at, out[r], bytes, lanes_.front()->stream);"),
    Mutant("the kernel runs on another stream", "host_codec.cpp", "kernel(in, out, bytes, lane.stream);", "kernel(in, out, bytes, lanes_.front()->stream);"),
    Mutant("the pipeline is not waited for", "host_codec.cpp", "        throw;\n    }\n    finish_all();", "        throw;\n    }"),
    Mutant("only the first lane is waited for", "host_codec.cpp", "for (auto& lane : lanes_) device_.finish(lane->stream);", "device_.finish(lanes_.front()->stream);"),
    Mutant("a stream is never ended", "device.hpp", "~OwnStream() { device_.end_stream(stream_); }", "~OwnStream() {}"),
    Mutant("memory is let go of twice", "device.hpp", "~DeviceMemory() { device_.release(at_); }", "~DeviceMemory() {\n        device_.release(at_);\n        device_.release(at_);\n    }"),
    Mutant("a tail is never coded", "codec.cpp", "    if (whole < bytes) {", "    if (whole > bytes) {"),
    Mutant("the caller's device is not chosen", "device_cuda.cpp", "if (before_ != kNone) check(cudaSetDevice(ordinal)", "if (before_ == kNone) check(cudaSetDevice(ordinal)"),
    Mutant("unaligned symbols go to aligned kernels", "codec.cpp", "    if (!extents.aligned()) {", "    if (bytes == 0) {"),
)  # fmt: skip


CLIENT = (
    Mutant("the optimizer's stream is not held", "gpu.py", "self._copy.hold(SEAM.stream(self._planned.ordinal))", "pass"),
    Mutant("another stream is held", "gpu.py", "self._copy.hold(SEAM.stream(self._planned.ordinal))", "self._copy.hold(0)"),
    Mutant("the host waits in the hook", "gpu.py", "self._copy.hold(SEAM.stream(self._planned.ordinal))", "self._copy.wait()"),
    Mutant("the copy follows another stream", "gpu.py", "self._copy.begin(slot, crcs, SEAM.stream(plan.ordinal))", "self._copy.begin(slot, crcs, 0)"),
    Mutant("the checksums go to the other slot", "gpu.py", "arena.crcs_offset(index)", "arena.crcs_offset(1 - index)"),
    Mutant("mirrors are never brought up to date", "gpu.py", "            plan.reflect()\n", ""),
    Mutant("mirrors are brought up to date behind the copy", "gpu.py", "            self.trouble = \"\"\n            return True", "            plan.reflect()\n            self.trouble = \"\"\n            return True"),
    Mutant("buffers are read when forward writes them", "layout.py", "mirrored=part.leaf.now", "mirrored=False"),
    Mutant("strided tensors are taken as they lie", "gpu.py", "if mirrored or not tensor.is_contiguous():", "if mirrored:"),
    Mutant("a new plan is copied by the old one", "gpu.py", "if self._planned is plan:", "if self._planned is not None:"),
    Mutant("nobody is told", "gpu.py", "notify_fd=wake_fd", "notify_fd=-1"),
    Mutant("what a device refuses is raised", "gpu.py", "except (RuntimeError, ValueError, ImportError) as error:", "except ImportError as error:"),
    Mutant("bytes come back to the wrong place", "gpu.py", "begin - place, end - begin", "0, end - begin"),
    Mutant("a strided tensor does not come back", "gpu.py", "if room is not target:", "if room is target:"),
    Mutant("published while the device writes", "copier.py", "            if over is False:\n                return None\n", ""),
    Mutant("a lost copy is published", "copier.py", 'reason = self._side.trouble or "the GPU lost the copy"', 'reason = ""'),
    Mutant("tensors in host memory are not copied", "copier.py", "        self.engine.copy_now(layout.plan, index)\n", ""),
    Mutant("tensors in host memory are copied too late", "copier.py", "        self.engine.copy_now(layout.plan, index)\n        return self._side.begin(index)", "        begun = self._side.begin(index)\n        self.engine.copy_now(layout.plan, index)\n        return begun"),
    Mutant("tensors in host memory are left to the engine", "layout.py", "if part.leaf.now or on_gpu is not None]", "if part.leaf.now]"),
    Mutant("the user's writes are not noticed", "copier.py", "                    running.spoiled = self._written(running)", "                    pass"),
    Mutant("the optimizer's writes spoil", "copier.py", "                running.held = True\n", ""),
    Mutant("a stream that could not be held is forgotten", "copier.py", "running.spoiled = running.spoiled or self._side.trouble", "pass"),
    Mutant("a copy begins while one runs", "copier.py", "        if self._running is not None:\n            return STILL_RUNNING\n", ""),
    Mutant("a refused slot stays claimed", "copier.py", "                self.arena.empty(index)\n                return GPU_REFUSED", "                return GPU_REFUSED"),
)  # fmt: skip


def planted(mutant: Mutant, text: str) -> str:
    """The source with the bug in it. ValueError where it has no such place any more."""
    at = -1
    for _ in range(mutant.nth):
        at = text.find(mutant.before, at + 1)
        if at < 0:
            raise ValueError(f"{mutant.source} has no {mutant.before!r}: the mutant '{mutant.name}' is out of date")
    return text[:at] + mutant.after + text[at + len(mutant.before) :]


def build(folder: Path, mutant: Mutant | None) -> Path:
    """The module from a copy of the sources. What the edit cannot have changed comes from earlier builds."""
    builder = support.builder()
    copy = folder / "csrc" / "cuda"
    shutil.copytree(support.CUDA, copy)
    (folder / "csrc" / "native").symlink_to(support.ROOT / "csrc" / "native")
    sources = [support.CUDA / source.name for source in builder.sources(copy)]
    if mutant is not None:
        path = copy / mutant.source
        path.write_text(planted(mutant, path.read_text()))
        # A kernel's bug is in the kernels alone; the host's side does not look into them.
        kinds = (".cu",) if mutant.source.endswith(".cuh") else (".cpp",)
        changed = [source for source in builder.sources(copy) if source.suffix in kinds and uses(builder, source, path)]
        names = {source.name for source in changed}
        sources = [*changed, *(source for source in sources if source.name not in names)]
    kept = support.ROOT / "build" / "cuda"
    kept.mkdir(parents=True, exist_ok=True)
    made = []
    for source in sources:
        ours = copy in source.parents  # a bug may well be one that a compiler warns of
        strict = not ours and builder.is_strict()
        made.append(builder.compile_one(builder.find_nvcc(), source, folder if ours else kept, FLAGS, strict=strict))
    out = folder / "_cuda.so"
    builder.link(builder.find_nvcc(), made, out, "shared")
    return out


def uses(builder: object, source: Path, header: Path) -> bool:
    texts: dict[Path, bytes] = builder._texts(source, {})  # type: ignore[attr-defined]
    return header.resolve() in texts


def verdict(mutant: Mutant) -> str:
    """How it was caught; "" where it was not."""
    with tempfile.TemporaryDirectory(prefix="snapshotd-mutant-") as name:
        folder = Path(name)
        try:
            module = build(folder, mutant)
        except subprocess.CalledProcessError:
            return "does not build"
        return outcome("tests.cuda.quick", module)


def outcome(checks: str, module: Path, environment: dict[str, str] | None = None) -> str:
    """The first thing that a run of these checks found wrong; "" where nothing was."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", checks, str(module)],
            cwd=support.ROOT, capture_output=True, text=True, timeout=RUN_MAX_S, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "never ends"
    if done.returncode == 0:
        return ""
    lines = done.stdout.splitlines()
    return lines[0] if lines else f"ended with status {done.returncode}: {done.stderr.strip()[-200:]}"


def client_verdict(mutant: Mutant | None, module: Path) -> str:
    """How a bug in the client was caught; "" where it was not."""
    with tempfile.TemporaryDirectory(prefix="snapshotd-mutant-") as name:
        copy = Path(name) / "snapshotd_client"
        shutil.copytree(
            support.ROOT / "client" / "snapshotd_client", copy, ignore=shutil.ignore_patterns("__pycache__")
        )
        if mutant is not None:
            (copy / mutant.source).write_text(planted(mutant, (copy / mutant.source).read_text()))
        return outcome("tests.cuda.quick_client", module, {**os.environ, "PYTHONPATH": name})


def main(names: Sequence[str]) -> int:
    support.build_simulator()
    with tempfile.TemporaryDirectory(prefix="snapshotd-mutant-") as name:
        module = build(Path(name), None)
        unchanged = outcome("tests.cuda.quick", module) or client_verdict(None, module)
        if unchanged:
            print(f"what is unchanged does not pass: {unchanged}")
            return 1
        return run_all(names, module)


def run_all(names: Sequence[str], module: Path) -> int:
    """1 where one survives."""
    survived = 0
    for kind, mutants in (("kernel", KERNELS), ("host", HOST), ("client", CLIENT)):
        chosen = [mutant for mutant in mutants if not names or mutant.name in names]
        with ThreadPoolExecutor(JOBS) as pool:
            judge = verdict if kind != "client" else partial(client_verdict, module=module)
            verdicts = list(pool.map(judge, chosen))
        for mutant, how in zip(chosen, verdicts, strict=True):
            missed = how in ("", "does not build")
            survived += missed
            print(f"{'SURVIVED' if missed else 'caught':9}{kind:7}{mutant.name:56}{how[:120]}")
        caught = sum(how not in ("", "does not build") for how in verdicts)
        print(f"{kind} mutants: {caught} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
