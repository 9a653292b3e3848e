"""Which codec adds up the windows of a sum: the processor's, or that of a CUDA device (the setting `codec`).

What the daemon codes lies in host memory, so a device gets it over the bus and sends it back: on many machines the
processor wins, and then that is right. `auto` measures both, once for each code and block size that a job brings, and
takes the faster; where there is no device it costs nothing. A device that fails in the middle is not used any more: the
window that it left is added up by the processor, and no parity is lost.

`combine` asks for a `Bench`: pinned room for one window of every symbol and of the sum, and the pipeline behind it.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any

from snapshotd import _native
from snapshotd.errors import ConfigError

PIECE_BYTES = 512 << 10
PINNED_BYTES_MAX = 256 << 20  # of one thread: a code whose windows take more is left to the processor
ROUNDS = 3
log = logging.getLogger("snapshotd")


class Accelerator:
    """The choice of one daemon. `bench` and `give_up` may be called by any thread."""

    def __init__(self, setting: str, monotonic_s: Callable[[], float], device: Any = None) -> None:
        self.setting, self._monotonic_s, self._device = setting, monotonic_s, device
        self._asked = setting == "cpu" or device is not None
        self._why = "as configured" if self._asked else "nothing was coded yet"
        self._chosen: dict[tuple[int, int, int], tuple[bool, str]] = {}
        self._own = threading.local()
        self._lock = threading.Lock()

    def bench(self, k: int, m: int, unit_bytes: int, window_bytes: int, layout: str) -> Bench | None:
        """A device's pipeline for this thread; None where the processor is to do it. The first call measures."""
        key = (k, m, unit_bytes)
        with self._lock:
            if not self._asked:
                self._ask()
            if self._device is None:
                return None
            if key not in self._chosen:
                self._chosen[key] = taken, why = self._choose(k, window_bytes, layout)
                log.info("codec for k=%d, m=%d in blocks of %d bytes: %s", k, m, unit_bytes, why)
            taken, _ = self._chosen[key]
        return self._bench_of_thread(k, window_bytes) if taken else None

    def facts(self) -> dict[str, Any]:
        """For status: the setting, and what was chosen why."""
        chosen = [
            {"k": k, "m": m, "block_bytes": unit, "codec": "cuda" if taken and self._device is not None else "cpu",
             "why": why}
            for (k, m, unit), (taken, why) in sorted(self._chosen.items())
        ]  # fmt: skip
        return {"setting": self.setting, "why": self._why, "chosen": chosen}

    def give_up(self, error: Exception) -> None:
        """The device failed: the processor does everything from now on."""
        if self._device is not None:
            self._device, self._why = None, f"the GPU failed ({error}), so the processor codes until a restart"
            log.warning("%s; parity is made as before, only not by the device", self._why)

    def _ask(self) -> None:
        """Is there a device? Asked when the first sum is to be made, so that a daemon alone does without."""
        self._device, why = find_device()
        self._asked = True
        self._why = why or f"a device is there: {self._device.name}"

    def _choose(self, k: int, window_bytes: int, layout: str) -> tuple[bool, str]:
        if (k + 1) * window_bytes > PINNED_BYTES_MAX:
            return False, f"cpu, since {k + 1} windows of {window_bytes} bytes are more than is pinned for a device"
        if self.setting == "cuda":
            return True, f"cuda on {self._device.name}, as configured"
        try:
            bench = self._bench_of_thread(k, window_bytes)
            if bench is None:
                return False, "cpu, since the device failed"
            device_s = self._best_s(lambda: bench.combine(bench.sum, [3] * k, layout))
        except RuntimeError as error:
            return False, f"cpu, since the device failed to be measured ({error})"
        cpu_s = self._best_s(lambda: bench.combine_on_cpu(bench.sum, [3] * k, layout))
        cuda, cpu = (f"{k * window_bytes / max(s, 1e-9) / 1e9:.1f} GB/s" for s in (device_s, cpu_s))
        name = "cuda" if device_s < cpu_s else "cpu"
        return name == "cuda", f"{name}, measured: cuda {cuda} on {self._device.name} over the bus, cpu {cpu}"

    def _best_s(self, work: Callable[[], object]) -> float:
        """The shortest of a few rounds: of a window each, so milliseconds."""
        times = []
        for _ in range(ROUNDS):
            began_s = self._monotonic_s()
            work()
            times.append(self._monotonic_s() - began_s)
        return min(times)

    def _bench_of_thread(self, k: int, window_bytes: int) -> Bench | None:
        """None where the device gave up, or refuses: it is not asked again."""
        device, held = self._device, getattr(self._own, "bench", None)
        if device is None:
            return None
        if held is None or (held.k, held.window_bytes) != (k, window_bytes):
            self._own.bench = None  # its memory goes before the next is taken
            try:
                self._own.bench = held = Bench(self, device, k, window_bytes)
            except RuntimeError as error:
                self.give_up(error)
                return None
        return held


class Bench:
    """One thread's room for a window of k symbols and their sum, registered with the device."""

    def __init__(self, owner: Accelerator, device: Any, k: int, window_bytes: int) -> None:
        self.k, self.window_bytes, self._owner = k, window_bytes, owner
        pages = mmap.mmap(-1, (k + 1) * window_bytes)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        view, module = memoryview(pages), load()
        self._codec = module.HostCodec(device, k, 1, piece_bytes=PIECE_BYTES)  # gone before its memory is
        self._pinned = module.Pinned(device, self._at, len(pages))
        self.rooms = [view[i * window_bytes : (i + 1) * window_bytes] for i in range(k)]
        self.sum = view[k * window_bytes :]

    def combine(self, target: memoryview, coefficients: Sequence[int], layout: str) -> None:
        """target = the sum of coefficient · room, over the target's length. RuntimeError where the device fails."""
        width, count = len(target), len(coefficients)
        at = [self._at + i * self.window_bytes for i in range(count)]
        out = self._at + self.k * self.window_bytes
        self._codec.combine(self._pinned, at, [out], [bytes(coefficients)], layout=layout, bytes=width)
        if target is not self.sum:
            target[:] = self.sum[:width]

    def combine_on_cpu(self, target: memoryview, coefficients: Sequence[int], layout: str) -> None:
        """The same by the processor."""
        for index, coefficient in enumerate(coefficients):
            room = self.rooms[index][: len(target)]
            _native.ec_accumulate(target, room, coefficient, first=index == 0, layout=layout)

    def add_up(self, target: memoryview, coefficients: Sequence[int], layout: str) -> None:
        """`combine`, by the processor where the device fails."""
        try:
            self.combine(target, coefficients, layout)
        except RuntimeError as error:
            self._owner.give_up(error)
            self.combine_on_cpu(target, coefficients, layout)


def open_for(setting: str, monotonic_s: Callable[[], float]) -> Accelerator:
    """The accelerator of a daemon with this setting. ConfigError for `cuda` where there is no device."""
    if setting != "cuda":
        return Accelerator(setting, monotonic_s)
    device, why = find_device()
    if device is None:
        raise ConfigError(
            f"codec is 'cuda', but there is {why}, so parity could not be made as asked; set codec to auto or cpu, or "
            f"install the driver and `pip install 'snapshotd[cuda]'`"
        )
    return Accelerator(setting, monotonic_s, device)


def find_device() -> tuple[Any, str]:
    """The first CUDA device, or None and why in words that begin with "no GPU"."""
    try:
        module = load()
        why: str = module.why_no_device()
        return (None, why) if why else (module.Device("cuda", 0), "")
    except ImportError:
        return None, "no GPU that this installation could use: snapshotd._cuda was not built"
    except RuntimeError as error:
        return None, f"no GPU that works: {error}"


def load() -> Any:
    """`snapshotd._cuda`. ImportError where it was not built."""
    from snapshotd import _cuda  # here, since most daemons do without

    return _cuda
