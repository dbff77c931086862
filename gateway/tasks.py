"""Background tasks that nobody loses: a reference is kept, a failure is logged, the drain awaits them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gateway.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Coroutine

log = get_logger("gateway.tasks")


class Tasks:
    """A group of tasks that ends together."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task_failed", task=task.get_name(), exc_info=error)

    async def drain(self, timeout: float) -> int:  # noqa: ASYNC109 - waits, then cancels: not asyncio.timeout's meaning
        """Wait up to `timeout` seconds, cancel what is left and return how many that were."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout)
        left = set(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=5)
        return len(left)
