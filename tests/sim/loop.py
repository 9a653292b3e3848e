"""Simulated time: one queue of events for everybody, and an asyncio loop per process that lives on it.

The product's coroutines, timers and callbacks run on these loops unchanged. An event is one callback of one process,
and then everything that this process has ready; nothing of another process runs in between. A process that died runs
nothing any more, whatever it had planned.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any

from snapshotd.clock import Clock

EPOCH_S = 1_700_000_000.0


class Died(BaseException):
    """This process was killed where it stood. Whoever catches it changes nothing: a dead process writes nowhere."""


class Life:
    """One process, from its start to its death."""

    __slots__ = ("dead", "name", "slow")

    def __init__(self, name: str) -> None:
        self.name, self.dead, self.slow = name, False, 1.0


class Queue:
    """Everything that is still to happen, by time; of the same time in the order in which it was planned."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.loops: list[Loop] = []
        self._heap: list[tuple[float, int, Loop, asyncio.Handle]] = []
        self._planned = 0

    def plan(self, at_s: float, loop: Loop, handle: asyncio.Handle) -> None:
        """This is to happen then."""
        self._planned += 1
        heapq.heappush(self._heap, (at_s, self._planned, loop, handle))

    def next(self) -> tuple[Loop, asyncio.Handle] | None:
        """What happens now, of a process that lives; time has moved on to it. None where nothing will ever happen."""
        while self._heap:
            at_s, _, loop, handle = heapq.heappop(self._heap)
            if not loop.life.dead and not handle.cancelled():
                self.now_s = max(self.now_s, at_s)
                return loop, handle
        return None


_Base: Any = asyncio.AbstractEventLoop  # it has many methods that the product does not use


class Loop(_Base):  # type: ignore[misc]
    """The loop of one process. `delay` draws how long work on a thread, or news from one, takes."""

    def __init__(
        self,
        queue: Queue,
        life: Life,
        delay_s: Callable[[], float],
        failed: Callable[[str, BaseException | None], None],
    ) -> None:
        self.queue, self.life = queue, life
        queue.loops.append(self)
        self.bells: dict[int, tuple[Callable[..., object], tuple[Any, ...]]] = {}
        self._delay_s, self._failed = delay_s, failed
        self._ready: deque[asyncio.Handle] = deque()
        self.tasks: list[asyncio.Task[Any]] = []  # kept: a coroutine that is collected would run on, at any time

    def run(self, handle: asyncio.Handle) -> None:
        """One event, and all that it made ready."""
        asyncio._set_running_loop(self)
        try:
            self._call(handle)
            while self._ready and not self.life.dead:
                self._call(self._ready.popleft())
        finally:
            asyncio._set_running_loop(None)
        if self.life.dead:
            self._ready.clear()

    def _call(self, handle: asyncio.Handle) -> None:
        if handle.cancelled():
            return
        try:
            handle._callback(*handle._args)  # type: ignore[attr-defined]
        except Died:
            pass
        except BaseException as error:
            self._failed(f"a callback of {self.life.name}", error)

    # --- what asyncio and the product ask of a loop -----------------------------------------------

    def time(self) -> float:
        return self.queue.now_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.queue.plan(when, self, handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.queue.now_s + delay * self.life.slow, callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_later(self._delay_s() / 20, callback, *args)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> asyncio.Task[Any]:
        if len(self.tasks) > 256:
            self.tasks = [one for one in self.tasks if not one.done()]
        self.tasks.append(asyncio.Task(coro, loop=self, name="task"))  # else its name would be a count of the process
        return self.tasks[-1]

    def end(self) -> None:
        """The history is over: nothing of it runs on."""
        self.life.dead = True
        for task in self.tasks:
            coroutine = task.get_coro()
            if not task.done() and coroutine is not None:
                coroutine.close()
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.tasks.clear()
        self._ready.clear()

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Threads work at some time later, and what they found is known some time after that."""
        future = self.create_future()

        def work() -> None:
            result, error = None, None
            try:
                result = func(*args)
            except Died:
                raise
            except BaseException as found:
                error = found
            self.call_later(self._delay_s(), done, result, error)

        def done(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_later(self._delay_s(), work)
        return future

    def add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:
        self.bells[fd] = callback, args

    def remove_reader(self, fd: Any) -> bool:
        return self.bells.pop(fd, None) is not None

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self.life.dead and not isinstance(error, Died):
            self._failed(str(context.get("message")), error)

    def set_exception_handler(self, handler: Any) -> None:
        pass

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass


class SimClock(Clock):
    """The queue's time. A machine's wall clock may be set; its monotonic one goes on."""

    def __init__(self, queue: Queue) -> None:
        self._queue, self.set_by_s = queue, 0.0

    def monotonic_s(self) -> float:
        return self._queue.now_s

    def wall_s(self) -> float:
        return EPOCH_S + self._queue.now_s + self.set_by_s
