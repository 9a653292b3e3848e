"""The watch over the trainer's own objects: it sees every change, asks little of them, and keeps no cycle alive."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict, defaultdict
from typing import Any

import pytest

from snapshotd import _native


class Tensor:
    """What the watch needs of a tensor."""

    def __init__(self, pointer: int = 0x1000, version: int = 0) -> None:
        self.pointer = pointer
        self._version = version

    def data_ptr(self) -> int:
        return self.pointer


class InferenceTensor(Tensor):
    """Raises when it is asked for its version, as torch's do."""

    @property
    def _version(self) -> int:
        raise RuntimeError("Inference tensors do not track version counter.")

    @_version.setter
    def _version(self, value: int) -> None:
        pass


def watch(
    links: list[tuple[Any, Any, Any]] | None = None,
    sizes: list[tuple[Any, int]] | None = None,
    tensors: list[tuple[Any, int]] | None = None,
) -> _native.Watch:
    return _native.Watch(links=links or [], sizes=sizes or [], tensors=[(*one, True) for one in tensors or []])


# --- structure


@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda: defaultdict(Tensor)])
def test_another_object_under_the_same_key_is_seen(kind: Any) -> None:
    container, tensor = kind(), Tensor()
    container["weight"] = tensor
    w = watch([(container, "weight", tensor)])
    assert not w.structure_changed()
    container["weight"] = Tensor()
    assert w.structure_changed()
    container["weight"] = tensor
    assert not w.structure_changed()
    del container["weight"]
    assert w.structure_changed()


def test_a_missing_key_is_not_made() -> None:
    """`defaultdict` (the optimizer's state) would create what it is asked for."""
    state: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    entry = state["a"]
    w = watch([(state, "a", entry)])
    del state["a"]
    assert w.structure_changed() and "a" not in state


def test_keys_are_found_by_identity_without_asking_them_again() -> None:
    """Parameters are keys whose hash costs a call into Python, and whose == compares tensors."""

    class Parameter:
        asked = 0

        def __hash__(self) -> int:
            Parameter.asked += 1
            return 7

        def __eq__(self, other: object) -> bool:
            raise AssertionError("a tensor's == is no truth value")

    parameter, entry = Parameter(), object()
    w = watch([({parameter: entry}, parameter, entry)])
    Parameter.asked = 0
    assert not w.structure_changed()
    if sys.version_info < (3, 13):
        assert Parameter.asked == 0


def test_an_equal_object_that_is_another_one_is_a_change() -> None:
    container = {"lr": [1.0]}
    w = watch([(container, "lr", container["lr"])])
    container["lr"] = [1.0]
    assert w.structure_changed()


def test_lists_are_looked_up_by_position() -> None:
    a, b = Tensor(), Tensor()
    container = [a, b]
    w = watch([(container, 0, a), (container, 1, b)])
    assert not w.structure_changed()
    container.reverse()
    assert w.structure_changed()
    container.reverse()
    container.pop()
    assert w.structure_changed()


def test_other_containers_are_asked_for_an_attribute() -> None:
    class Module:
        pass

    module, tensor = Module(), Tensor()
    module.weight = tensor  # type: ignore[attr-defined]
    w = watch([(module, "weight", tensor)])
    assert not w.structure_changed()
    module.weight = Tensor()  # type: ignore[attr-defined]
    assert w.structure_changed()
    del module.weight  # type: ignore[attr-defined]
    assert w.structure_changed()


def test_a_container_that_grows_or_shrinks_is_a_change() -> None:
    class Sized:
        length = 3

        def __len__(self) -> int:
            if self.length < 0:
                raise RuntimeError("no length today")
            return self.length

    containers: list[Any] = [{1: 1}, [1, 2], Sized()]
    w = watch(sizes=[(container, len(container)) for container in containers])
    assert not w.structure_changed()
    containers[0][2] = 2
    assert w.structure_changed()
    del containers[0][2]
    containers[1].append(3)
    assert w.structure_changed()
    containers[1].pop()
    assert not w.structure_changed()
    containers[2].length = -1
    assert w.structure_changed()  # and the error was cleared


def test_what_cannot_be_watched_is_refused() -> None:
    with pytest.raises(TypeError):
        watch([({}, [], None)])
    with pytest.raises(TypeError):
        watch([([], "0", None)])
    with pytest.raises(ValueError, match="0 or more"):
        watch([([1], -1, 1)])
    with pytest.raises(TypeError, match="attribute"):
        watch([(object(), 3, None)])
    with pytest.raises(ValueError, match="link"):
        _native.Watch(links=[({}, "a")], sizes=[], tensors=[])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="pointer"):
        watch(tensors=[(Tensor(), -1)])


# --- pointers and versions


def test_a_tensor_that_moved_is_seen() -> None:
    tensors = [Tensor(0x1000), Tensor(2**64 - 64)]
    w = watch(tensors=[(tensor, tensor.pointer) for tensor in tensors])
    assert not w.pointers_changed()
    tensors[1].pointer = 0x2000
    assert w.pointers_changed()


@pytest.mark.parametrize("answer", [-1, 2**64, "0x1000", None])
def test_a_pointer_that_makes_no_sense_is_a_change_and_no_error(answer: Any) -> None:
    tensor = Tensor()
    w = watch(tensors=[(tensor, tensor.pointer)])
    tensor.pointer = answer
    assert w.pointers_changed()
    assert watch(tensors=[(object(), 1)]).pointers_changed()


def test_the_first_tensor_whose_version_moved_is_named() -> None:
    tensors = [Tensor(version=i) for i in range(5)]
    w = watch(tensors=[(tensor, tensor.pointer) for tensor in tensors])
    assert w.versions_moved() == -1  # nothing was noted yet
    assert not w.pointers_changed()
    assert w.versions_moved() == -1
    tensors[4]._version += 1
    tensors[3]._version += 1
    assert w.versions_moved() == 3
    assert not w.pointers_changed()
    assert w.versions_moved() == -1


def test_the_version_of_a_tensor_that_is_copied_at_once_is_not_watched() -> None:
    tensors = [Tensor(), Tensor()]
    w = _native.Watch(links=[], sizes=[], tensors=[(tensors[0], 0x1000, False), (tensors[1], 0x1000, True)])
    assert not w.pointers_changed()
    tensors[0]._version += 1
    assert w.versions_moved() == -1
    tensors[1]._version += 1
    assert w.versions_moved() == 1


def test_a_tensor_whose_class_was_changed_is_asked_as_what_it_is_now() -> None:
    """Built-in members are called the short way, which is right for objects of their own type alone."""
    torch = pytest.importorskip("torch")
    tensor = torch.ones(3)

    class Elsewhere(torch.Tensor):  # type: ignore[misc, name-defined]
        def data_ptr(self) -> int:
            return 0

        @property
        def _version(self) -> int:
            return 77

    w = watch(tensors=[(tensor, tensor.data_ptr())])
    assert not w.pointers_changed() and w.versions_moved() == -1
    tensor.__class__ = Elsewhere
    assert w.versions_moved() == 0
    assert w.pointers_changed()


def test_tensors_without_a_version_do_not_raise() -> None:
    w = watch(tensors=[(InferenceTensor(), 0x1000)])
    assert not w.pointers_changed()
    assert w.versions_moved() == -1


# --- references


def test_a_watch_keeps_what_it_watches() -> None:
    tensor, container = Tensor(), {}
    container["a"] = tensor
    alive = weakref.ref(tensor)
    w = watch([(container, "a", tensor)], tensors=[(tensor, tensor.pointer)])
    del tensor, container
    gc.collect()
    assert alive() is not None and not w.structure_changed()
    del w
    gc.collect()
    assert alive() is None


def test_a_cycle_through_a_watch_is_collected() -> None:
    class Guard:
        pass

    guard = Guard()
    container = {"guard": guard}
    guard.watch = watch([(container, "guard", guard)], [(container, 1)], [(guard, 0)])  # type: ignore[attr-defined]
    alive = weakref.ref(guard)
    del guard, container
    gc.collect()
    assert alive() is None


def test_references_are_balanced() -> None:
    key, tensor = "a key of its own", Tensor()
    container = {key: tensor}
    before = [sys.getrefcount(o) for o in (key, tensor, container)]
    for _ in range(100):
        w = watch([(container, key, tensor)], [(container, 1)], [(tensor, tensor.pointer)])
        w.structure_changed()
        w.pointers_changed()
        w.versions_moved()
    del w
    assert [sys.getrefcount(o) for o in (key, tensor, container)] == before


# --- the real thing


def test_a_real_model_and_its_optimizer_are_watched() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    links = [(model._parameters, name, parameter) for name, parameter in model.named_parameters()]
    links += [(optimizer.state, parameter, optimizer.state[parameter]) for parameter in parameters]
    w = watch(links, [(optimizer.state, 2)], [(parameter, parameter.data_ptr()) for parameter in parameters])
    assert not w.structure_changed() and not w.pointers_changed() and w.versions_moved() == -1
    with torch.no_grad():
        model.bias.add_(1)
    assert w.versions_moved() == 1
    model.weight.data = model.weight.data.clone()
    assert w.pointers_changed()
    model.weight = torch.nn.Parameter(model.weight.data)
    assert w.structure_changed()


def test_an_inference_tensor_of_torch_has_no_version() -> None:
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        tensor = torch.ones(3)
    w = watch(tensors=[(tensor, tensor.data_ptr())])
    assert not w.pointers_changed() and w.versions_moved() == -1
