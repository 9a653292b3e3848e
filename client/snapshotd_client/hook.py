"""The guard: where a training loop meets its snapshots.

`guard.step()` at the end of the loop body is the cut. It captures what is small and changes soon, claims a slot, starts
the copy and returns; the optimizer's own pre-hook waits for what is left of that copy before weights may change. Calls,
in order, and who makes them:

1. `protect()`            the user, once, on every rank: hooks, agreement on the generation
2. `Guard.restore()`      the user, once, before the loop
3. `Guard.step()`         the loop, at the end of its body      -> `_cut`
4. `_before_optimizer`    the optimizer, before it writes       -> the copy is over after it
5. `_after_optimizer`     the optimizer, after it wrote         -> the next cut has something to take
6. `_copy_done`           the link's thread, when the engine is done -> publish
7. `Guard.close()`        the user, at the end

Without 3 the guard works from the hooks alone, best effort (docs/guide.md lists the limits). Nothing in 3 to 6 raises.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from snapshotd import faults, wire
from snapshotd.clock import Clock
from snapshotd.config import ClientConfig
from snapshotd.door_client import DoorClient
from snapshotd.errors import (
    ConfigError,
    DaemonUnavailable,
    ProtocolError,
    Refused,
    SnapshotError,
    SnapshotLost,
)
from snapshotd.geometry import Formation
from snapshotd.recovery import Assignment, Choice
from snapshotd_client import gpu, hooks, hoststate, tree
from snapshotd_client import restore as restoring
from snapshotd_client.agree import Peers, grouping
from snapshotd_client.copier import GPU_REFUSED, STILL_RUNNING, Copier, Grant, Session, Settled, claim
from snapshotd_client.hooks import Weak
from snapshotd_client.layout import Layout
from snapshotd_client.link import Link, attach_request, bare_request, changed
from snapshotd_client.planner import Planner
from snapshotd_client.state import TrainingState

log = logging.getLogger("snapshotd")
HOOK_ONLY_AFTER = 8  # optimizer steps without a guard.step() that say the loop has none
CLOSE_WAIT_S = 30.0


class Guard:
    """Protects one training run on one rank. Made by `protect`; also a context manager that closes itself."""

    def __init__(
        self,
        state: TrainingState,
        peers: Peers,
        session: Session,
        config: ClientConfig,
        inventories: list[wire.Inventory],
        door: DoorClient | None,
        clock: Clock,
        threads: int,
    ) -> None:
        self._state, self._peers, self._config, self._clock, self._threads = state, peers, config, clock, threads
        self._inventories, self._door, self._session = inventories, door, session
        self._planner = Planner(state)
        self._link: Link | None = None
        self._base = self._step = 0
        self._stepped = self._iterated = False
        self._optimizer_steps = 0
        self._trouble = ""  # why the layout of the last cut could not be copied
        self._on_gpu = any(gpu.is_on_gpu(tree.local_of(one)) for one in state.names.parameters.values())
        self._mode = "unknown"  # then "exact" or "hooks"
        self._early: Mapping[str, Any] | None = None
        self._served_naming = -1
        self._restore_report: dict[str, Any] | None = None
        self._restored_called = self._closed = self._off = False
        self._taken = self._published = self._failures = 0
        self._last_published: int | None = None
        self._published_in: Copier | None = None
        self._skips: dict[str, int] = {}
        self._timings = {"step_s": 0.0, "host_s": 0.0, "settle_s": 0.0, "copy_s": 0.0}
        self._hooks = hooks.install(self, state)
        os.register_at_fork(after_in_child=Weak(self, "_forked"))
        atexit.register(Weak(self, "_at_exit"))

    # --- before training --------------------------------------------------------------------------

    def restore(self, newer_than: int | None = None, on_lost: str = "raise") -> int:
        """Bring the newest whole snapshot back and return the step to go on from: 0 where nothing ever existed.

        A collective: every rank calls it, once, before training. `newer_than` is the step of a checkpoint of your own;
        it is returned where memory has nothing newer. `on_lost="fresh"` returns 0 instead of raising SnapshotLost.
        LayoutChanged where the snapshot does not fit this model, optimizer or world size; it stays untouched.
        """
        self._check_restore_arguments(newer_than, on_lost)
        self._restored_called = True
        began_s = self._clock.monotonic_s()
        done = restoring.run(self._restore_tools(), self._inventories, newer_than=newer_than)
        if done.choice.lost and on_lost == "raise":
            self._start_link()
            raise SnapshotLost(done.choice.why)
        for report in done.passed_over:
            log.warning("snapshotd: set aside: %s", report)
        self._base = self._step = done.snapshot.step if done.snapshot else (newer_than or 0)
        verified_s = self._clock.monotonic_s()
        if done.snapshot is not None:
            self._inherit(done)
        faults.crash_point("restore.attached")
        if self._door is None and done.snapshot is None:
            log.warning(
                "snapshotd: no daemon answers at %s, so nothing could be restored: training starts at step %d and is "
                "unprotected until one is started with `snapshotd serve`", self._config.socket, self._step,
            )  # fmt: skip
        elif done.choice.snapshot is None and done.choice.lost:
            log.warning("snapshotd: starting afresh although state was lost: %s", done.choice.why)
        self._restore_report = {
            "step": self._step if done.snapshot else 0,
            "snapshot": str(done.snapshot) if done.snapshot else None,
            "why": done.choice.why,
            "passed_over": done.passed_over,
            "bytes": done.bytes,
            "rebuilt_bytes": done.rebuilt_bytes,
            "rebuild_s": done.rebuild_s,
            "verify_s": done.verify_s,
            "copy_s": done.copy_s,
            "attach_s": self._clock.monotonic_s() - verified_s,
            "total_s": self._clock.monotonic_s() - began_s,
        }
        self._start_link()
        return self._step

    def _restore_tools(self) -> restoring.Tools:
        own = next((place.node for place in self._session.nodes if self._peers.rank in place.ranks), b"")
        here = own or next((one.node for one in self._inventories), b"")
        return restoring.Tools(
            self._state, self._peers, self._door, self._clock, self._session, here, self._restore_threads(),
            claim=self._claim_for_rebuild,
        )  # fmt: skip

    def _claim_for_rebuild(self, own: Assignment, choice: Choice, formation: Formation) -> Grant:
        """Attach the arena into which the daemon is to decode a lost shard, before anything is restored."""
        assert self._door is not None and choice.snapshot is not None
        self._session = self._going_on_from(choice, formation)
        request = bare_request(self._session, own.slot_bytes, choice.snapshot.step)
        request = changed(request, arena=own.arena, rebuild=True)
        report = self._report_of(own.arena)
        if report is not None:
            request = changed(request, slot_bytes=report.slot_bytes, block_bytes=report.block_bytes)
        return claim(self._door, request, self._clock, lambda _s: None)

    def _report_of(self, arena: bytes | None) -> wire.ArenaReport | None:
        return next((one for i in self._inventories for one in i.arenas if one.arena == arena), None)

    def _going_on_from(self, choice: Choice, formation: Formation | None) -> Session:
        """The session of the generation that restored this snapshot: its nodes keep their places in groups."""
        groups = grouping(self._session.nodes, self._inventories, self._session.group_size, formation)
        return replace(self._session, restored=choice.snapshot, committed=choice.committed, groups=groups)

    def _restore_threads(self) -> int:
        """Nothing trains during a restore: the cores are shared by this node's ranks alone."""
        return max(1, min(16, len(os.sched_getaffinity(0)) // len(self._session.local_ranks)))

    def _check_restore_arguments(self, newer_than: int | None, on_lost: str) -> None:
        if self._closed:
            raise ConfigError("restore() after close(): make a new guard with protect()")
        if self._restored_called:
            raise ConfigError("restore() was called twice: the first call returned the step to go on from, use that")
        if self._step or self._optimizer_steps:
            raise ConfigError("restore() came after training began; call it once, before the first optimizer step")
        if on_lost not in ("raise", "fresh"):
            raise ConfigError(f'on_lost is {on_lost!r}; it must be "raise" or "fresh"')
        if newer_than is not None and (type(newer_than) is not int or newer_than < 0):
            raise ConfigError(f"newer_than is {newer_than!r}; it must be a step, 0 or more")

    def _inherit(self, done: restoring.Restored) -> None:
        """Take over the arena that the shard came from, so that no second one is needed."""
        assert done.snapshot is not None and self._door is not None
        self._session = session = self._going_on_from(done.choice, done.formation)
        report = self._report_of(done.own.arena)
        if done.grant is None and report is None:
            return  # node counts changed: this rank has a new arena coming, and the snapshot stays where it is
        planned = self._plan()
        try:
            if done.grant is not None:
                copier = done.grant.map(self._threads)
            else:
                assert report is not None
                request = attach_request(session, planned, self._step, report.slot_bytes)
                request = changed(request, arena=report.arena, block_bytes=report.block_bytes)
                copier = claim(self._door, request, self._clock, lambda _s: None).map(self._threads)
        except (Refused, DaemonUnavailable, ProtocolError, OSError) as error:
            log.warning(
                "snapshotd: restored, but the arena could not be taken over (%s); asking again meanwhile", error
            )
            self._link = self._make_link()
            if report is not None:
                self._link.inherit(planned, report.arena, report.slot_bytes, report.block_bytes)
            return
        self._link = self._make_link()
        if planned.manifest.file_bytes <= copier.arena.slot_bytes:
            self._link.adopt(copier, planned)
            copier.prepare(planned, self._link.done_fd)
            copier.ring()
        else:
            self._link.adopt(copier, planned)
            self._link.request_layout(planned)

    def _start_link(self) -> Link:
        if self._link is None:
            self._link = self._make_link()
        if not self._link.started():
            door, self._door = self._door, None
            self._link.start(door)
        return self._link

    def _make_link(self) -> Link:
        return Link(
            self._config.socket,
            self._session,
            self._clock,
            self._threads,
            plan=Weak(self, "_plan"),
            on_done=Weak(self, "_copy_done"),
            passed=Weak(self, "_passed"),
        )

    # --- the loop ---------------------------------------------------------------------------------

    def step(self) -> None:
        """The end of the loop body: the snapshot holds the state as it is here. Never raises, never waits for long."""
        if self._off or self._closed:
            return
        began_s = self._clock.monotonic_s()
        try:
            if self._mode != "exact":
                self._enter_exact_mode()
            self._advance()
        except Exception:  # training must never die of us
            self._failed("guard.step()")
        self._timings["step_s"] = self._clock.monotonic_s() - began_s

    def _advance(self) -> None:
        link = self._link or self._start_link()
        self._step += 1
        stepped, self._stepped, self._iterated = self._stepped, False, False
        ready = link.ready()
        if ready is None:
            if stepped:
                link.request_plan()
                self._note_skip("no arena yet" if not link.trouble else "refused")
            return
        copier, planned = ready
        self._note(copier, copier.settle())
        due = self._due(copier)
        taken = stepped and due and self._cut(copier, planned, link)
        copier.arena.passed = self._step  # after FILLING: who reads this first and then the slots cannot be misled
        if due and not taken:
            copier.ring()

    def _due(self, copier: Copier) -> bool:
        """The daemon named a step, this is the first one at or after it with something new, and it was not served."""
        naming = copier.arena.naming
        return naming != self._served_naming and 0 < copier.arena.next_step <= self._step

    def _asked(self, copier: Copier) -> int | None:
        """The step at or after which the daemon wants the next snapshot; None while it has not said."""
        arena = copier.arena
        return arena.next_step if arena.naming != self._served_naming and arena.next_step else None

    def _cut(self, copier: Copier, planned: Layout, link: Link) -> bool:
        """Capture host state and start the copy; False where this step goes without a snapshot."""
        if copier.busy():  # a GPU's copy may take longer than a step: nobody waits for it
            self._note_skip(STILL_RUNNING)
            return False
        naming = copier.arena.naming
        began_s = self._clock.monotonic_s()
        captured = self._state.host(self._step, self._early)
        raw = hoststate.pack(captured.document)
        self._timings["host_s"] = self._clock.monotonic_s() - began_s
        try:
            fitting = self._planner.still_fits(planned, captured, raw)
            another = self._planner.plan_for(captured, raw) if fitting is None else None
        except SnapshotError as error:  # a tensor that came later is where it cannot be copied from
            self._note_skip("unsupported")
            self._once("unsupported", f"no snapshot of step {self._step}: {error}")
            self._trouble = str(error)
            return False
        self._trouble = ""
        if fitting is None:
            assert another is not None
            self._note_skip("the layout changed")
            link.request_layout(another)
            return False
        if fitting is not planned:
            link.layout = fitting
        reason = copier.begin(fitting, self._session, self._step, raw, link.done_fd)
        if reason:
            self._note_skip(reason)
            if reason == GPU_REFUSED:
                self._once(reason, f"no snapshot of step {self._step}: {copier.trouble}")
            return False
        self._served_naming, self._taken = naming, self._taken + 1
        return True

    def _plan(self) -> Layout:
        return self._planner.plan(self._step)

    # --- hooks ------------------------------------------------------------------------------------

    def _before_optimizer(self) -> None:
        """The optimizer is about to write: the copy must be over."""
        if self._off or self._closed:
            return
        try:
            if torch._C._current_graph_task_id() != -1:
                self._refuse_in_backward()
                return
            if self._on_gpu and gpu.SEAM.capturing():
                self._refuse_in_graph()
                return
            if self._mode == "hooks" and self._iterated:
                self._advance()
            copier = self._link.copier if self._link else None  # also one whose layout is just being replaced
            if copier is not None:
                began_s = self._clock.monotonic_s()
                self._note(copier, copier.hold())
                self._timings["settle_s"] = self._clock.monotonic_s() - began_s
        except Exception:
            self._failed("the optimizer's pre-hook")

    def _after_optimizer(self) -> None:
        """An optimizer wrote: the next cut has something to take."""
        if not (self._off or self._closed):
            self._stepped = True

    def _after_last_optimizer(self) -> None:
        """The last of the optimizers wrote: without a guard.step() in the loop, this is what counts as a step."""
        if self._off or self._closed:
            return
        self._stepped = self._iterated = True
        self._optimizer_steps += 1
        if self._mode == "exact":
            return
        try:
            self._early = self._state.random_and_loaders()
            if self._mode == "unknown" and self._optimizer_steps >= HOOK_ONLY_AFTER:
                self._enter_hook_mode()
        except Exception:
            self._failed("the optimizer's post-hook")

    def _before_forward(self) -> None:
        """Hook-only: the first forward after an optimizer step is the latest moment before which all is consistent."""
        if self._off or self._closed or self._mode != "hooks" or not self._iterated or not torch.is_grad_enabled():
            return
        try:
            self._advance()
        except Exception:
            self._failed("the model's forward pre-hook")

    def _enter_exact_mode(self) -> None:
        if self._mode == "hooks":
            log.warning(
                "snapshotd: guard.step() was first called after %d optimizer steps; steps are counted by the optimizer "
                "until the next restart, and snapshots are taken at guard.step() from now on", self._optimizer_steps,
            )  # fmt: skip
        else:
            self._step = self._base
        self._mode, self._early = "exact", None
        self._hooks.drop_forward()

    def _enter_hook_mode(self) -> None:
        self._mode, self._step = "hooks", self._base + self._optimizer_steps - 1
        several = (
            " With several optimizers the cut may fall between two of them." if len(self._state.optimizers) > 1 else ""
        )
        log.warning(
            "snapshotd: the loop does not call guard.step(), so snapshots are taken from the optimizer's hooks, best "
            "effort: random numbers or weights touched after optimizer.step() may not be in them.%s One line, "
            "guard.step() at the end of the loop body, makes them exact (docs/guide.md)", several,
        )  # fmt: skip

    def _refuse_in_backward(self) -> None:
        self._off = True
        log.error(
            "snapshotd: an optimizer steps inside backward, where no moment exists at which weights and optimizer "
            "state belong together: this run is not protected; call optimizer.step() after backward() instead"
        )

    def _refuse_in_graph(self) -> None:
        self._off = True
        log.error(
            "snapshotd: an optimizer step is recorded into a CUDA graph, whose replays run no hooks and would write "
            "under a running copy: this run is not protected; call optimizer.step() outside of the graph instead"
        )

    def _copy_done(self) -> None:
        """The copy is over (link's thread)."""
        copier = self._link.copier if self._link else None
        if copier is not None and not self._closed:
            self._note(copier, copier.settle())

    # --- what became of it ------------------------------------------------------------------------

    def flush(self, timeout_s: float = 60.0) -> int | None:
        """Wait until the last snapshot taken is decided; returns the newest committed step, None if there is none."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        link = self._link
        if link is None or self._off:
            return None
        if not link.trouble and link.waiting():
            link.wait_ready(timeout_s)
        copier = link.copier
        if copier is None:
            return None
        if not copier.wait(max(0.0, deadline_s - self._clock.monotonic_s())):
            return copier.arena.committed_step or None  # patience is over, the copy is not: it goes on by itself
        self._note(copier, copier.settle())
        while not self._decided(copier):
            seen, left_s = copier.arena.changes(), deadline_s - self._clock.monotonic_s()
            if left_s <= 0 or self._decided(copier):
                break
            copier.arena.wait_change(seen, min(left_s, 0.25))
        return copier.arena.committed_step or None

    def _decided(self, copier: Copier) -> bool:
        last, arena = self._last_published, copier.arena
        if copier is not self._published_in:  # it was in an arena that became too small; its decision is told there
            return True
        return last is None or arena.committed_step >= last or arena.aborted_step >= last

    def status(self) -> dict[str, Any]:
        """Where this rank stands, for logs and people."""
        link = self._link
        copier = link.copier if link else None
        return {
            "job": self._session.job,
            "generation": str(self._session.generation),
            "rank": self._session.rank,
            "world_size": self._session.world_size,
            "mode": self._mode,
            "step": self._step,
            "committed_step": (copier.arena.committed_step or None) if copier else None,
            "asked_step": self._asked(copier) if copier else None,
            "protected": copier is not None and not self._off,
            "connected": bool(link and link.connected()),
            "trouble": (link.trouble if link else "") or self._trouble or (copier.trouble if copier else ""),
            "gpu": bool(link and link.layout and link.layout.gpu is not None),
            "taken": self._taken,
            "published": self._published,
            "skipped": dict(self._skips),
            "failures": self._failures,
            "arena_bytes": copier.arena.total_bytes if copier else 0,
            "file_bytes": link.layout.manifest.file_bytes if link and link.layout else 0,
            "stores": copier.stores if copier else "",
            "timings": dict(self._timings),
            "restore": self._restore_report,
        }

    def _passed(self) -> int:
        return self._step

    def _note(self, copier: Copier, settled: Settled | None) -> None:
        if settled is None:
            return
        self._timings["copy_s"] = settled.copy_s
        if settled.skipped:
            self._served_naming = -1
            self._note_skip(settled.kind)
            self._once(settled.kind, f"the snapshot of step {settled.step} was dropped: {settled.skipped}")
        else:
            self._published += 1
            self._last_published, self._published_in = settled.step, copier

    def _note_skip(self, reason: str) -> None:
        self._skips[reason] = self._skips.get(reason, 0) + 1

    def _once(self, topic: str, sentence: str) -> None:
        if self._skips.get(topic, 0) <= 1:
            log.warning("snapshotd: %s; training goes on, and the next snapshot is tried as usual", sentence)

    def _failed(self, where: str) -> None:
        self._failures += 1
        if self._failures <= 3:
            log.exception("snapshotd: unexpected failure in %s; training goes on, this step has no snapshot", where)
        if self._failures == 10:
            self._off = True
            log.error("snapshotd: ten failures: snapshots of this run are off, training goes on unprotected")

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """End of the run: wait for the last snapshot, then let the node free this rank's memory. Never raises.

        While an exception is on its way out nothing is freed: the job will want to resume.
        """
        self._close(failed=sys.exc_info()[0] is not None)

    def _close(self, *, failed: bool) -> None:
        if self._closed:
            return
        for part in (self._last_cut, self._last_flush, self._let_go):
            try:
                part(failed)
            except Exception:  # the next part must come, whatever this one met
                self._failed("close()")
        self._closed = True
        self._hooks.remove()

    def _at_exit(self) -> None:
        """The script ends without close(): wait for the last snapshot, which stays in memory for a restart."""
        if not self._closed:
            self._last_flush(failed=True)

    def _last_cut(self, failed: bool) -> None:
        if not failed and not self._off and self._mode == "hooks" and self._iterated:
            self._advance()

    def _last_flush(self, failed: bool) -> None:
        link = self._link
        if link is not None and (link.connected() or link.copier is not None):
            self.flush(CLOSE_WAIT_S if link.connected() else 1.0)

    def _let_go(self, failed: bool) -> None:
        link, self._closed = self._link, True
        door = link.stop() if link is not None and link.started() else self._door
        copier = link.copier if link is not None else None
        if copier is not None and door is not None and not failed:
            try:
                door.ask(wire.Close(copier.arena.arena_id), timeout_s=10.0)
                faults.crash_point("close.released")
            except (DaemonUnavailable, ProtocolError, Refused) as error:
                log.warning(
                    "snapshotd: the daemon was not told that this run is over (%s); `snapshotd gc` frees it", error
                )
        if copier is not None:
            copier.close()
        if door is not None:
            door.close()
        self._peers.close()

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(failed=kind is not None)

    def _forked(self) -> None:
        """In a child (a DataLoader worker): the arena is not mapped here, and nothing of this guard is the child's."""
        self._off = self._closed = True
