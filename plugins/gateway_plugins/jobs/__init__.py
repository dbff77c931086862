"""Jobs: work that is done later, by workers on RQ: single requests, background responses, batches; and webhooks.

The database knows every job, so that nothing is lost with Redis, which only says who works on what now.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gateway import hookimpl
from gateway.kit import Schema
from gateway_plugins.jobs import settings
from gateway_plugins.jobs.events import Events
from gateway_plugins.jobs.jobs import Jobs
from gateway_plugins.jobs.parts import NoWebhooks, Shared
from gateway_plugins.jobs.queue import Queue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway import Exchange, Reply, Router, Services
    from gateway_plugins.jobs.parts import Part

Config = settings.Config


class Plugin:
    """Takes requests as jobs, and runs them in workers."""

    Config: TypeAlias = settings.Config
    reads_settings = ()
    schema = Schema("jobs", Path(__file__).parent)
    commands = "`xenios worker`, `jobs`, `queues` and `webhooks` come with the plugin jobs."

    def __init__(self, config: Config, services: Services) -> None:
        self.config = config
        self.services = services
        self.queue = Queue(config, services)
        self.events = Events(services)
        shared = Shared(config, services, self.queue, self.events, NoWebhooks())
        self.parts: list[Part] = [Jobs(shared)]

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.queue.lifespan())
            stack.push_async_callback(self.events.close)
            for part in self.parts:
                await stack.enter_async_context(part.lifespan())
            yield

    @hookimpl
    def register_routes(self, router: Router) -> None:
        for part in self.parts:
            part.register_routes(router)

    @hookimpl
    async def prepare_request(self, exchange: Exchange) -> None:
        if exchange.phase == "live":
            for part in self.parts:
                part.prepare(exchange)

    @hookimpl
    async def lookup_response(self, exchange: Exchange) -> Reply | None:
        if exchange.phase != "accept":
            return None
        for part in self.parts:
            if (taken := await part.accept(exchange)) is not None:
                return taken
        return None

    @hookimpl
    def register_commands(self, cli: Any) -> None:
        for part in self.parts:
            part.add_commands(cli)
