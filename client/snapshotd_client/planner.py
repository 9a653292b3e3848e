"""Plans the layout of a rank's state, and says at each cut whether the plan still holds."""

from __future__ import annotations

from snapshotd_client import hoststate, layout
from snapshotd_client.layout import Layout
from snapshotd_client.state import HostCapture, TrainingState
from snapshotd_client.tree import Leaf


class Planner:
    """The way from a training state to its layout. Looks only: nothing is stepped, cast or created."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state

    def plan(self, step: int) -> Layout:
        """A layout of the state as it is now."""
        captured = self._state.host(step)
        return self.plan_for(captured, hoststate.pack(captured.document))

    def plan_for(self, captured: HostCapture, host: bytes) -> Layout:
        """A layout of the state with this host state."""
        return self._build(self._state.leaves(), captured, host, None)

    def still_fits(self, planned: Layout, captured: HostCapture, host: bytes) -> Layout | None:
        """The layout to copy with: the planned one, the same with new pointers, or None where it is another.

        The watch compares containers, objects and pointers in C++; the leaves are collected only if one moved.
        """
        if len(host) > planned.host_place[1]:
            return None
        current = planned
        if planned.watch.structure_changed() or planned.watch.pointers_changed():
            leaves = self._state.leaves()
            if layout.signature_of(leaves, self._state.groups()) != planned.signature:
                return None
            current = self._build(leaves, captured, host, planned)
        return current if current.point_outside(captured.outside) else None

    def _build(self, leaves: list[Leaf], captured: HostCapture, host: bytes, same: Layout | None) -> Layout:
        return layout.build(
            leaves,
            world=self._state.world,
            groups=self._state.groups(),
            aliases=self._state.names.aliases,
            sizes=self._state.sizes(),
            outside=captured.outside,
            host_bytes=len(host),
            manifest=same.manifest if same is not None else None,
        )
