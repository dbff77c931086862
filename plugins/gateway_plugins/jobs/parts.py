"""What the parts of this plugin have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import contextlib

    from gateway import Exchange, Reply, Router, Services
    from gateway_plugins.jobs.events import Events
    from gateway_plugins.jobs.queue import Queue
    from gateway_plugins.jobs.settings import Config
    from gateway_plugins.jobs.webhooks.part import Webhooks

# Does the work with this id, in a worker process. It may raise Again. One that is cancelled asks the queue why.
Handler: TypeAlias = Callable[[str], Awaitable[None]]


class Again(Exception):
    """Not now: the work is put back, and done in so many seconds."""

    def __init__(self, after: float) -> None:
        super().__init__(f"again in {after:g} s")
        self.after = after


@dataclass(frozen=True)
class Shared:
    """What the parts are made with."""

    config: Config
    services: Services
    queue: Queue
    events: Events
    webhooks: Webhooks


class Part(Protocol):
    """Single jobs, background responses, files, batches, webhooks: each its routes, its work, its tidying."""

    handlers: Mapping[str, Handler]  # by kind of work

    def register_routes(self, router: Router) -> None: ...

    def lifespan(self) -> contextlib.AbstractAsyncContextManager[None]:
        """In every process: those that serve, and workers."""

    async def tidy(self) -> None:
        """About every ten seconds, in one worker: what is old goes, what Redis forgot is enqueued again."""


class Taker(Part, Protocol):
    """A part that takes requests, to be answered later."""

    async def prepare(self, exchange: Exchange) -> None:
        """In `prepare_request`, of every proxied request: a live one that is to be done later gets phase `accept`."""

    async def accept(self, exchange: Exchange) -> Reply | None:
        """In `lookup_response`, of a request in phase `accept`: taken, and how its client is told. The first counts."""
