"""Host state: everything of a training run that is small and no tensor of the model.

Random generators, schedulers, scalers, loaders, hyperparameters and Python values of the optimizer become one JSON
document, losslessly: tuples, integer keys, bytes, small tensors and arrays are tagged objects. What JSON cannot say is
stored by `torch.save` inside the document and read back with `weights_only=True`; nothing is ever unpickled freely.

A tensor in an encoded tree is either embedded (small) or left outside under a name, in the slot itself: the `Outside`
collector holds those.
"""

from __future__ import annotations

import base64
import ctypes
import io
import json
import math
import random
import sys
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from snapshotd.errors import ConfigError

EMBED_BYTES_MAX = 4096
TAG = "~"  # key that marks a tagged object; a user's own dict with this key is tagged as well


class NotStorable(ConfigError):
    """A value that can neither be said in JSON nor read back with `weights_only=True`."""


@dataclass
class Outside:
    """Tensors of a tree that are larger than `embed_bytes_max`, by their path in it; -1: all of them."""

    embed_bytes_max: int = EMBED_BYTES_MAX
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def encode(value: Any, outside: Outside | None = None, path: str = "") -> Any:
    """A JSON tree that `decode` turns back into an equal value. NotStorable if there is none."""
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {TAG: "float", "v": value.hex() if value == value else "nan"}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, outside, path)
    if type(value) in (list, tuple, deque, set, frozenset):
        return _encode_sequence(value, outside, path)
    if isinstance(value, Mapping) and type(value) in (dict, OrderedDict, Counter):
        return _encode_mapping(value, outside, path)
    return _encode_rare(value)


def decode(tree: Any, outside: Mapping[str, torch.Tensor] | None = None) -> Any:
    """The value of an encoded tree. ValueError if the tree was not made by `encode`."""
    if isinstance(tree, list):
        return [decode(item, outside) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if TAG not in tree:
        return {key: decode(item, outside) for key, item in tree.items()}
    kind = tree[TAG]
    reader = _READERS.get(kind)
    if reader is None:
        raise ValueError(f"host state has a value of unknown kind {kind!r}")
    return reader(tree, outside or {})


def _encode_tensor(value: torch.Tensor, outside: Outside | None, path: str) -> Any:
    large = outside is not None and value.numel() * value.element_size() > outside.embed_bytes_max
    if outside is not None and large and (outside.embed_bytes_max < 0 or not _unusual(value)):
        outside.tensors[path] = value.detach()
        return {TAG: "outside", "v": path}
    return _encode_rare(value) if _unusual(value) else {
        TAG: "tensor",
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "v": _b64(raw_bytes(value)),
    }  # fmt: skip


def _unusual(value: torch.Tensor) -> bool:
    return type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized


def raw_bytes(value: torch.Tensor) -> bytes:
    """The row-major bytes of a tensor, whatever its dtype."""
    flat = value.detach().cpu().contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()) if flat.numel() else b""


def from_raw(raw: bytes, dtype: str, shape: list[int]) -> torch.Tensor:
    """The opposite of `raw_bytes`. ValueError where bytes, dtype and shape do not fit."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or len(raw) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"host state has a tensor of {len(raw)} bytes for shape {shape} of {dtype}")
    if not raw:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(kind).reshape(shape).clone()


def _encode_sequence(value: Any, outside: Outside | None, path: str) -> Any:
    items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    tree = [encode(item, outside, f"{path}/{index}") for index, item in enumerate(items)]
    if type(value) is list:
        return tree
    tagged: dict[str, Any] = {TAG: type(value).__name__, "v": tree}
    if isinstance(value, deque):
        tagged["maxlen"] = value.maxlen
    return tagged


def _encode_mapping(value: Mapping[Any, Any], outside: Outside | None, path: str) -> Any:
    plain = type(value) is dict and TAG not in value and all(type(key) is str for key in value)
    if plain:
        return {key: encode(item, outside, f"{path}/{key}") for key, item in value.items()}
    pairs = [[encode(key), encode(item, outside, f"{path}/{key}")] for key, item in value.items()]
    return {TAG: type(value).__name__, "v": pairs}


def _encode_rare(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return {TAG: "bytes", "v": _b64(bytes(value))}
    if isinstance(value, complex) and type(value) is complex:
        return {TAG: "complex", "v": [encode(value.real), encode(value.imag)]}
    if isinstance(value, torch.dtype | torch.device):
        return {TAG: type(value).__name__, "v": str(value)}
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and value.dtype.kind in "biufc":
        shape = list(value.shape) if type(value).__name__ == "ndarray" else None
        return {TAG: "numpy", "dtype": value.dtype.str, "shape": shape, "v": _b64(value.tobytes())}
    return _encode_saved(value)


def _encode_saved(value: Any) -> Any:
    """`torch.save` bytes of a value that `weights_only` can read again; checked at once, since later is too late."""
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        torch.load(io.BytesIO(stream.getvalue()), weights_only=True, map_location="cpu")
    except Exception as error:  # any pickling error of a user's own class means the same to us
        raise NotStorable(
            f"a {type(value).__module__}.{type(value).__qualname__} cannot be stored in a snapshot: give its "
            f"state_dict plain values, lists, dicts and tensors instead ({type(error).__name__})"
        ) from None
    return {TAG: "saved", "v": _b64(stream.getvalue())}


def _numpy(tree: Any, _: Any) -> Any:
    import numpy

    flat = numpy.frombuffer(_raw(tree), dtype=numpy.dtype(tree["dtype"])).copy()
    return flat.reshape(tree["shape"]) if tree["shape"] is not None else flat[0]


_READERS: dict[str, Callable[[Any, Mapping[str, torch.Tensor]], Any]] = {
    "float": lambda tree, _: float("nan") if tree["v"] == "nan" else float.fromhex(tree["v"]),
    "outside": lambda tree, outside: outside[tree["v"]],
    "tensor": lambda tree, _: from_raw(_raw(tree), tree["dtype"], tree["shape"]),
    "tuple": lambda tree, outside: tuple(decode(tree["v"], outside)),
    "deque": lambda tree, outside: deque(decode(tree["v"], outside), tree["maxlen"]),
    "set": lambda tree, outside: set(decode(tree["v"], outside)),
    "frozenset": lambda tree, outside: frozenset(decode(tree["v"], outside)),
    "dict": lambda tree, outside: {decode(k): decode(v, outside) for k, v in tree["v"]},
    "OrderedDict": lambda tree, outside: OrderedDict((decode(k), decode(v, outside)) for k, v in tree["v"]),
    "Counter": lambda tree, outside: Counter({decode(k): decode(v, outside) for k, v in tree["v"]}),
    "bytes": lambda tree, _: _raw(tree),
    "complex": lambda tree, _: complex(*decode(tree["v"])),
    "dtype": lambda tree, _: getattr(torch, str(tree["v"]).removeprefix("torch.")),
    "device": lambda tree, _: torch.device(tree["v"]),
    "numpy": _numpy,
    "saved": lambda tree, _: torch.load(io.BytesIO(_raw(tree)), weights_only=True, map_location="cpu"),
}


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _raw(tree: Mapping[str, Any]) -> bytes:
    return base64.b64decode(tree["v"], validate=True)


# --- the document ---------------------------------------------------------------------------------


def pack(document: Mapping[str, Any]) -> bytes:
    """The document as it stands in a slot: 8 bytes of length, then JSON."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    return len(text).to_bytes(8, "little") + text


def unpack(raw: bytes) -> dict[str, Any]:
    """The document of a slot's host tensor. ValueError if it is none."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > len(raw) - 8:
        raise ValueError(f"host state claims {length} bytes in a tensor of {len(raw)}")
    try:
        document = json.loads(raw[8 : 8 + length])
    except RecursionError:
        raise ValueError("host state is nested too deeply to be one of ours") from None
    if not isinstance(document, dict):
        raise ValueError("host state is no JSON object")
    return document


# --- random generators ----------------------------------------------------------------------------


def capture_random() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's global generators (CUDA's where it is in use)."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": _b64(raw_bytes(torch.get_rng_state())),
        "python": [version, _b64(array("Q", words).tobytes()), encode(gauss)],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [_b64(raw_bytes(one)) for one in torch.cuda.get_rng_state_all()]
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, _b64(keys.astype("<u4").tobytes()), int(position), int(has_gauss), float(cached)]
    return state


def restore_random(state: Mapping[str, Any]) -> None:
    """Put the global generators where `capture_random` found them."""
    torch.set_rng_state(_byte_tensor(state["torch"]))
    version, words, gauss = state["python"]
    numbers = array("Q")
    numbers.frombytes(base64.b64decode(words))
    random.setstate((version, tuple(numbers), decode(gauss)))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_byte_tensor(one) for one in state["cuda"]])
    if "numpy" in state:
        import numpy

        name, keys, position, has_gauss, cached = state["numpy"]
        words32 = numpy.frombuffer(base64.b64decode(keys), dtype="<u4").astype(numpy.uint32)
        numpy.random.set_state((name, words32, position, has_gauss, cached))


def _byte_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).clone()
