"""The erasure code, checksums and copies on a CUDA device. Built where nvcc is; imports where no driver is.

Memory is an integer address, with `bytes` beside it, or anything contiguous with `__cuda_array_interface__` or
`__dlpack__` (cupy arrays, torch tensors). A stream is its handle as an integer (`torch.cuda.Stream.cuda_stream`); 0 is
the default stream. Calls enqueue and return, unless they say otherwise; their memory must stay until the stream has
come to its end. They release the GIL.

ValueError, before anything is enqueued, for what is no code, for symbols of different or no length, outputs that
overlap something or are read-only, and memory that is not this device's. CudaError, with `code` (a cudaError_t), where
the device refuses; CudaMemoryError, one of those, where it has no memory left.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

class CudaError(RuntimeError):
    code: int

class CudaMemoryError(CudaError): ...

built_by: str
"""Who compiled the kernels: nvcc, or NVRTC when they are first needed."""

def device_count() -> int:
    """Devices that can be used; 0 without a driver. Never raises."""

def why_no_device() -> str:
    """A sentence that begins with "no GPU", or "" where there is one."""

def planes_coefficient(row: int, symbol: int) -> int:
    """What parity row 0 … 3 takes of a data symbol in the layout `planes`: 2 to the power of (0, 1, -1, 2) * symbol."""

@final
class Device:
    """A CUDA device, or ("host") threads that do the same to host memory."""

    def __init__(self, kind: Literal["cuda", "host"] = "cuda", ordinal: int = 0) -> None: ...
    @property
    def name(self) -> str: ...
    def allocate(self, bytes: int) -> int: ...
    def release(self, memory: int) -> None:
        """Waits for what was enqueued."""

    def make_stream(self) -> int:
        """One that does not wait for the default stream."""

    def end_stream(self, stream: int) -> None: ...
    def finish(self, stream: int = 0) -> None:
        """Waits until the stream has come to its end."""

    def copy(self, to: int, from_: int, bytes: int, stream: int = 0) -> None:
        """Up, down or on the device. Host memory that is not pinned is copied before this returns."""

    def encode(self, data: Sequence[Any], parity: Sequence[Any], bytes: int | None = None, stream: int = 0) -> None:
        """Parity of the layout `planes`: up to 3 rows, or 4 of at most 21 data symbols."""

    def combine(
        self,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        factors: Sequence[bytes],
        *,
        layout: Literal["planes", "bytes"],
        add: bool = False,
        bytes: int | None = None,
        stream: int = 0,
    ) -> None:
        """outputs[r] = (outputs[r] if add else 0) + sum of factors[r][i] * inputs[i]."""

    def decode(
        self,
        data: Sequence[Any],
        parity: Sequence[Any],
        wanted: Mapping[int, Any],
        bytes: int | None = None,
        stream: int = 0,
    ) -> None:
        """Lost data symbols (None in `data`) of the layout `planes`; a parity row that is not there is None too."""

    def crc32c(self, data: Any, crcs: Any, *, block_bytes: int, bytes: int | None = None, stream: int = 0) -> None:
        """One CRC32C, four bytes little endian, for each block of `data`; the last block may be shorter."""

@final
class Pinned:
    """Host memory registered with the driver, in segments of at most 256 MiB, as long as this object lives."""

    def __init__(self, device: Device, memory: int, bytes: int, segment_bytes: int = ...) -> None: ...

@final
class SideCopy:
    """Copies device memory into a slot of an arena on a stream of its own; checksums every block on the way."""

    def __init__(
        self,
        device: Device,
        arena: Pinned,
        *,
        file_bytes: int,
        block_bytes: int,
        bucket_bytes: int,
        pieces: Sequence[tuple[int, int, int]],
        notify_fd: int = -1,
    ) -> None:
        """`pieces` are (address, offset in the slot, bytes). All device memory is allocated here: about a bucket.

        `notify_fd` is an eventfd that grows by one when a copy is over; it is duplicated here."""

    def begin(self, slot: int, crcs: int, compute: int = 0) -> None:
        """Start, after all that the stream `compute` was given until now. RuntimeError while a copy runs."""

    def hold(self, compute: int = 0) -> None:
        """Make the stream `compute` wait until the tensors have been read; the host does not wait."""

    def done(self) -> bool:
        """Everything has arrived in the slot."""

    def wait(self) -> None:
        """Wait until everything has arrived in the slot."""

@final
class HostCodec:
    """The code over symbols in pinned host memory: pieces take turns on `lanes` streams, up, through a kernel, down."""

    def __init__(self, device: Device, k: int, m: int, *, piece_bytes: int, lanes: int = 3) -> None: ...
    def encode(self, memory: Pinned, data: Sequence[int], parity: Sequence[int], bytes: int) -> None:
        """Returns when the parity is there."""

    def combine(
        self,
        memory: Pinned,
        data: Sequence[int],
        sums: Sequence[int],
        factors: Sequence[bytes],
        *,
        layout: Literal["planes", "bytes"],
        bytes: int,
    ) -> None:
        """sums[r] = sum of factors[r][i] * data[i], of up to k data symbols and m sums. Returns when they are there."""
