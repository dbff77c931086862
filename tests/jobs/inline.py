"""The whole plugin in the gateway's own process: what is put into its queue runs there, as a worker would run it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from gateway import Tasks, hookimpl
from gateway_plugins.jobs import Plugin
from gateway_plugins.jobs.parts import Again


class InlineQueue:
    """Runs each work once, again where it asks for that; `held` keeps what is put until `go`."""

    def __init__(self, queues: Any) -> None:
        self.queues = queues
        self.handlers: dict[str, Any] = {}
        self.running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.reasons: dict[asyncio.Task[Any], str] = {}
        self.tasks = Tasks()
        self.held: list[tuple[str, str]] | None = None
        self.done: list[tuple[str, str]] = []

    def serve(self, name: str, queue: Any) -> None:
        self.queues.setdefault(name, queue)

    def settings_of(self, queue: str) -> Any:
        return self.queues.get(queue, self.queues["default"])

    async def put(self, kind: str, work: str, **_: Any) -> None:
        if self.held is not None:
            if (kind, work) not in self.held:
                self.held.append((kind, work))
        elif (kind, work) not in self.running:
            self.running[kind, work] = self.tasks.spawn(self._run(kind, work), f"{kind} {work}")

    async def drop(self, kind: str, work: str) -> None:
        self.cancel((kind, work), "stop")

    async def unknown(self, kind: str, works: Any, **_: Any) -> set[str]:
        known = {*self.running, *(self.held or ())}
        return {work for work in works if (kind, work) not in known}

    async def position(self, *_: Any, **__: Any) -> None:
        return None

    def why(self) -> str:
        return self.reasons.get(asyncio.current_task(), "")

    # --- for tests ---

    def cancel(self, which: tuple[str, str], why: str) -> None:
        if (task := self.running.get(which)) is not None:
            self.reasons[task] = why
            task.cancel()

    async def go(self) -> None:
        """What was held runs."""
        held, self.held = self.held or [], None
        for kind, work in held:
            await self.put(kind, work)

    async def _run(self, kind: str, work: str) -> None:
        try:
            while True:
                try:
                    await self.handlers[kind](work)
                except Again as again:
                    await asyncio.sleep(again.after)
                else:
                    return
        finally:
            del self.running[kind, work]
            self.done.append((kind, work))


class Inline(Plugin):
    """`jobs` without Redis."""

    requires_services = ("database",)

    def __init__(self, config: Any, services: Any) -> None:
        super().__init__(config, services)
        queue = self.queue
        self.inline = InlineQueue(queue.queues)
        # the parts have the queue already: it does what the other says
        for name in ("put", "drop", "unknown", "position", "why"):
            setattr(queue, name, getattr(self.inline, name))
        for part in self.parts:
            self.inline.handlers.update(part.handlers)
        queue.lifespan = self._lifespan

    @contextlib.asynccontextmanager
    async def _lifespan(self) -> Any:
        try:
            yield
        finally:
            for which in [*self.inline.running]:
                self.inline.cancel(which, "requeue")
            await self.inline.tasks.drain(1.0)

    @hookimpl
    async def prepare_request(self, exchange: Any) -> None:
        """Nothing becomes a job."""

    @hookimpl
    async def lookup_response(self, exchange: Any) -> None:
        """Nothing becomes a job."""

    def part(self, kind: str) -> Any:
        return next(part for part in self.parts if type(part).__name__ == kind)
