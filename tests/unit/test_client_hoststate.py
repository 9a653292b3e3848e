"""Host state goes through JSON and comes back equal, or is refused at once."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snapshotd_client import hoststate


def through_json(value: Any, outside: hoststate.Outside | None = None) -> Any:
    tree = json.loads(json.dumps(hoststate.encode(value, outside), allow_nan=False))
    return hoststate.decode(tree, outside.tensors if outside else None)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
keys = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
        | st.lists(inner, max_size=3).map(lambda items: deque(items, maxlen=5))
    ),
    max_leaves=20,
)


@given(trees)
def test_every_plain_value_comes_back_equal_and_of_its_own_type(value: Any) -> None:
    back = through_json(value)
    assert back == value and repr(back) == repr(value)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 0.1, 5e-324, -0.0])
def test_floats_keep_every_bit(value: float) -> None:
    assert through_json(value).hex() == value.hex()


def test_not_a_number_stays_one() -> None:
    assert math.isnan(through_json({"a": [float("nan")]})["a"][0])


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64, torch.uint16],
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (5, 7)])
def test_tensors_come_back_byte_for_byte(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    for outside in (None, hoststate.Outside(), hoststate.Outside(embed_bytes_max=-1)):
        back = through_json({"x": tensor}, outside)["x"]
        assert back.dtype == dtype and back.shape == tensor.shape
        assert hoststate.raw_bytes(back) == hoststate.raw_bytes(tensor)


def test_a_transposed_tensor_is_stored_row_by_row() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()
    assert torch.equal(through_json(tensor), tensor)


def test_large_tensors_of_an_extra_stay_outside_under_their_path() -> None:
    outside = hoststate.Outside()
    tree = hoststate.encode({"a": [torch.zeros(2000)], "b": torch.zeros(2)}, outside, "rank0/extra/x")
    assert list(outside.tensors) == ["rank0/extra/x/a/0"] and len(json.dumps(tree)) < 400


@pytest.mark.parametrize(
    "value",
    [numpy.arange(5), numpy.float64(0.1), numpy.zeros((2, 3), dtype="f4"), Counter({3: 2}), torch.float16, {1, 2}],
)
def test_what_schedulers_and_loaders_keep_comes_back(value: Any) -> None:
    back = through_json({"x": value})["x"]
    assert type(back) is type(value)
    assert bool(numpy.all(back == value)) if type(value).__module__ == "numpy" else back == value


class Own:
    """A user's class, which no reader with `weights_only` would make again."""


def test_what_could_not_be_read_back_is_refused_by_name() -> None:
    with pytest.raises(hoststate.NotStorable, match=r"Own cannot be stored in a snapshot"):
        hoststate.encode({"deep": [Own()]})


def test_random_generators_go_on_where_they_were() -> None:
    def draw() -> tuple[Any, ...]:
        normal = torch.randn(3).tolist()  # twice an odd count: the generators keep a half of a pair
        return normal, random.random(), random.gauss(0, 1), numpy.random.rand(2).tolist(), numpy.random.randn()

    draw()
    state = json.loads(json.dumps(hoststate.capture_random()))
    expected = [draw(), draw()]
    hoststate.restore_random(state)
    assert [draw(), draw()] == expected


@given(st.binary(max_size=200))
def test_random_bytes_are_no_host_state(raw: bytes) -> None:
    with pytest.raises(ValueError):
        hoststate.unpack(raw)


def test_a_document_that_is_nested_without_end_is_no_host_state() -> None:
    text = b"[" * 200_000
    with pytest.raises(ValueError, match="nested"):
        hoststate.unpack(len(text).to_bytes(8, "little") + text)


def test_a_document_comes_back_and_what_follows_it_does_not_matter() -> None:
    raw = hoststate.pack({"step": 3})
    assert hoststate.unpack(raw + b"\0" * 100) == {"step": 3}
    with pytest.raises(ValueError, match="claims"):
        hoststate.unpack(raw[:-1])
