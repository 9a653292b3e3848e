"""Hooks on the user's own objects, which hold the guard weakly and never travel with a copy of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from snapshotd_client.state import TrainingState


class Weak:
    """Calls a guard's method as long as the guard lives: neither hooks, threads nor copies of a model may keep it."""

    def __init__(self, guard: object, method: str) -> None:
        self._guard, self._method = weakref.ref(guard), method

    def __call__(self, *_: Any) -> Any:
        guard = self._guard()
        return getattr(guard, self._method)() if guard is not None else None

    def __deepcopy__(self, _: Any) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _forget, ()


def _nothing(*_: Any) -> None:
    """What a copied model's hook does."""


def _forget() -> Callable[..., None]:
    return _nothing


class Hooks:
    """Handles of what was registered on the user's objects."""

    def __init__(self, optimizer_handles: list[Any], forward_handle: Any) -> None:
        self._handles, self._forward = optimizer_handles, forward_handle

    def drop_forward(self) -> None:
        """The loop calls guard.step(): forward needs no hook."""
        self._forward.remove()

    def remove(self) -> None:
        """Leave the user's objects as they were."""
        for handle in [*self._handles, self._forward]:
            handle.remove()


def install(guard: object, state: TrainingState) -> Hooks:
    handles = []
    for optimizer in state.optimizers:
        handles.append(optimizer.register_step_pre_hook(Weak(guard, "_before_optimizer")))
        last = optimizer is state.optimizers[-1]
        after = Weak(guard, "_after_last_optimizer" if last else "_after_optimizer")
        handles.append(optimizer.register_step_post_hook(after))
    return Hooks(handles, state.model.register_forward_pre_hook(Weak(guard, "_before_forward")))
