"""Background tasks that nobody loses: a reference is kept, a failure is logged, the drain awaits them."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

log = structlog.get_logger("gateway.tasks")


KEPT = 16  # tasks of `defer` that wait for more


class Tasks:
    """A group of tasks that ends together."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._deferred: deque[tuple[Callable[..., Coroutine[Any, Any, Any]], tuple[Any, ...]]] = deque()
        self._waiting: list[asyncio.Future[None]] = []
        self._draining = False

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def defer(self, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> None:
        """Await `work(*arguments)` soon, in a task that stays for the next: half the price of a task of its own.

        One that takes long holds nobody up: each call wakes another task or makes one.
        """
        self._deferred.append((work, arguments))
        if self._waiting:
            self._waiting.pop().set_result(None)
        else:
            self.spawn(self._serve_deferred(), "deferred")

    async def _serve_deferred(self) -> None:
        deferred, waiting = self._deferred, self._waiting
        loop = asyncio.get_running_loop()
        while True:
            while deferred:
                work, arguments = deferred.popleft()
                await work(*arguments)
            if self._draining or len(waiting) >= KEPT:
                return
            turn = loop.create_future()
            waiting.append(turn)
            await turn

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task_failed", task=task.get_name(), exc_info=error)

    async def drain(self, timeout: float) -> int:  # noqa: ASYNC109 - waits, then cancels: not asyncio.timeout's meaning
        """Wait up to `timeout` seconds, cancel what is left and return how many that were."""
        self._draining = True
        while self._waiting:
            self._waiting.pop().set_result(None)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout)
        left = set(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=5)
        return len(left)
