"""Tensors on a GPU: which can be taken, and their way into the arena beside the training and back.

At the cut the side stream of `snapshotd._cuda` is given the whole copy, behind what the trainer's own stream was given
until then; before the optimizer writes, that stream waits for the last read of the tensors. The host waits for neither:
whoever publishes the slot asks whether the copy is over. What goes wrong here is a reason in words, never an exception:
the step goes without a snapshot, and training goes on.

What torch knows of a GPU is asked through `SEAM` alone, so that all of this runs where there is none (tests/cuda).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from snapshotd import _native
from snapshotd.errors import ConfigError

BUCKET_BYTES = 64 << 20
ADVICE = "train on the CPU, or keep your disk checkpoints"


class Seam(Protocol):
    """What torch.cuda and the CUDA module give."""

    def module(self) -> Any:
        """`snapshotd._cuda`. ImportError where it is not there."""

    def stream(self, ordinal: int) -> int:
        """The handle of the calling thread's current stream on a device."""

    def capturing(self) -> bool:
        """That stream records a graph: nothing may be waited for on it."""

    def synchronize(self, ordinal: int) -> None:
        """Wait for that stream."""


class Torch:
    """The seam where torch was built with CUDA."""

    def module(self) -> Any:
        from snapshotd import _cuda  # here, since most installations do without

        return _cuda

    def stream(self, ordinal: int) -> int:
        return int(torch.cuda.current_stream(ordinal).cuda_stream)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def synchronize(self, ordinal: int) -> None:
        torch.cuda.current_stream(ordinal).synchronize()


SEAM: Seam = Torch()


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether its bytes are in the memory of a CUDA device."""
    return tensor.device.type == "cuda"


def one_device(named: Iterable[tuple[str, torch.Tensor]]) -> int | None:
    """The device that all those tensors share which are on one; None where none is.

    ConfigError where they lie on several, or where this installation cannot copy from it, with what to do about it.
    """
    first: tuple[str, int] | None = None
    for name, tensor in named:
        if not is_on_gpu(tensor):
            continue
        ordinal = tensor.device.index or 0
        if first is None:
            first = name, ordinal
        elif first[1] != ordinal:
            raise ConfigError(
                f"{first[0]} is on cuda:{first[1]} and {name} on cuda:{ordinal}: a rank's state is copied from one GPU,"
                f" so this run cannot be protected; run one rank for each GPU"
            )
    if first is not None:
        _refuse_without_module(*first)
    return first[1] if first is not None else None


def _refuse_without_module(name: str, ordinal: int) -> None:
    try:
        module = SEAM.module()
    except ImportError as error:
        raise ConfigError(
            f"{name} is on cuda:{ordinal}, and this installation has no CUDA part ({error}), so it cannot be "
            f"protected; install snapshotd anew with SNAPSHOTD_CUDA=nvrtc, which needs no nvcc and says why where it "
            f"cannot be built; or {ADVICE}"
        ) from None
    if why := module.why_no_device():
        raise ConfigError(
            f"{name} is on cuda:{ordinal}, but snapshotd's CUDA part says {why!r}, so it cannot be protected; update "
            f"the driver, or `pip install 'snapshotd[cuda]'` where the CUDA runtime is what lacks; or {ADVICE}"
        )


@dataclass
class OnDevice:
    """The part of a layout that is copied by the device.

    `pieces` are (address, offset in the file, bytes). Mirrors stand in for tensors that are not dense, or may change
    before the next optimizer step: the trainer's own stream brings them up to date at the cut.
    """

    ordinal: int
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    _mirrors: list[torch.Tensor] = field(default_factory=list)
    _sources: list[torch.Tensor] = field(default_factory=list)

    def add(self, tensor: torch.Tensor, place: int, *, mirrored: bool) -> None:
        """Plan one tensor."""
        if mirrored or not tensor.is_contiguous():
            source, tensor = tensor, torch.empty_like(tensor, memory_format=torch.contiguous_format)
            self._mirrors.append(tensor)
            self._sources.append(source)
        if size := tensor.numel() * tensor.element_size():
            self.pieces.append((tensor.data_ptr(), place, size))

    def planned(self) -> None:
        """All is planned. The mirrors' memory may have been somebody's until now, on the stream that they came from."""
        if self._mirrors:
            SEAM.synchronize(self.ordinal)

    def point_last(self, sources: Sequence[torch.Tensor]) -> None:
        """New tensors for the mirrors that were added last."""
        if sources:
            self._sources[-len(sources) :] = sources

    def reflect(self) -> None:
        """Bring the mirrors up to date, on the calling thread's stream."""
        if self._mirrors:
            with torch.no_grad():
                torch._foreach_copy_(self._mirrors, self._sources)


class Side:
    """The device's hands on one arena: registered memory, the copy of one layout, and what went wrong last."""

    def __init__(self, arena: _native.Arena) -> None:
        self._arena = arena
        self._device: Any = None
        self._pinned: Any = None
        self._copy: Any = None
        self._planned: OnDevice | None = None
        self.trouble = ""

    def ready(self, plan: OnDevice, file_bytes: int, wake_fd: int) -> bool:
        """Make what a copy by this plan needs and is not there yet; False where the device refuses (see `trouble`)."""
        if self._planned is plan:
            return True
        with self._noting("preparing the copy"):
            self._drop()
            module, arena = SEAM.module(), self._arena
            if self._device is None:
                self._device = module.Device("cuda", plan.ordinal)
            if self._pinned is None:
                self._pinned = module.Pinned(self._device, arena.address, arena.total_bytes)
            self._copy = module.SideCopy(
                self._device, self._pinned, file_bytes=file_bytes, block_bytes=arena.block_bytes,
                bucket_bytes=min(BUCKET_BYTES, arena.slot_bytes), pieces=plan.pieces, notify_fd=wake_fd,
            )  # fmt: skip
            self._planned = plan
        return self._planned is plan

    def begin(self, index: int) -> bool:
        """Give the device the copy into a slot whose other bytes are there; False where it refuses. Never waits."""
        plan, arena = self._planned, self._arena
        assert plan is not None
        with self._noting("starting the copy"):
            plan.reflect()
            slot, crcs = arena.address + arena.slot_offset(index), arena.address + arena.crcs_offset(index)
            self._copy.begin(slot, crcs, SEAM.stream(plan.ordinal))
            self.trouble = ""
            return True
        self._drop()
        return False

    def hold(self) -> bool:
        """Let the calling thread's stream wait until the tensors were read; False where it cannot be made to."""
        if self._planned is None:
            return False
        with self._noting("making the optimizer wait"):
            self._copy.hold(SEAM.stream(self._planned.ordinal))
            return True
        return False

    def over(self) -> bool | None:
        """Whether everything has arrived in the slot; None where it never will, and nothing touches it any more."""
        if self._planned is None:
            return None
        with self._noting("the copy"):
            return bool(self._copy.done())
        self._drop()
        return None

    def close(self) -> None:
        """Wait for what runs, and let go of the arena's memory. Idempotent."""
        self._drop()
        self._pinned = self._device = None

    def _drop(self) -> None:
        copy, self._copy, self._planned = self._copy, None, None
        if copy is not None:
            with contextlib.suppress(RuntimeError):  # a device that is lost does nothing any more
                copy.wait()  # without the GIL, as its destructor would not

    @contextlib.contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """A device that refuses is a sentence: CudaError and torch's own errors are RuntimeErrors."""
        try:
            yield
        except (RuntimeError, ValueError, ImportError) as error:
            self.trouble = f"{what} failed: {error}"


def fill(windows: Iterable[tuple[int, memoryview]], targets: Sequence[tuple[torch.Tensor, int]]) -> None:
    """The way back: bytes of a file into tensors on a device, each from its place on, in place.

    `windows` are (offset in the file, bytes) and may take one another's room. RuntimeError where the device refuses.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # it is only read
        rooms = [target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
                 for target, _ in targets]  # fmt: skip
        flat = [(room.reshape(-1).view(torch.uint8), place) for room, (_, place) in zip(rooms, targets, strict=True)]
        for at, window in windows:
            for to, place in flat:
                begin, end = max(at, place), min(at + len(window), place + to.numel())
                if begin < end:
                    found = torch.frombuffer(window, dtype=torch.uint8, offset=begin - at, count=end - begin)
                    to.narrow(0, begin - place, end - begin).copy_(found)
                    del found  # it holds the window
        for room, (target, _) in zip(rooms, targets, strict=True):
            if room is not target:
                target.copy_(room)
