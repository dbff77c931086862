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
from gateway_plugins.jobs.batches import Batches
from gateway_plugins.jobs.events import Events
from gateway_plugins.jobs.files import Files
from gateway_plugins.jobs.jobs import Jobs
from gateway_plugins.jobs.parts import Shared
from gateway_plugins.jobs.queue import Queue
from gateway_plugins.jobs.responses.part import Responses
from gateway_plugins.jobs.webhooks.part import Webhooks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway import Exchange, Reply, Router, Services
    from gateway_plugins.jobs.parts import Part, Taker

Config = settings.Config


class Plugin:
    """Takes requests as jobs, and runs them in workers."""

    Config: TypeAlias = settings.Config
    reads_settings = ()
    takes_jobs = True
    schema = Schema("jobs", Path(__file__).parent)
    requires_services = ("redis",)
    commands = "`xenios worker`, `jobs`, `queues` and `webhooks` come with the plugin jobs."

    @staticmethod
    def companion(config: Config) -> list[str] | None:
        """What `xenios serve` keeps running beside itself."""
        return ["worker"] if config.worker.embedded else None

    def __init__(self, config: Config, services: Services) -> None:
        self.config = config
        self.services = services
        self.queue = Queue(config, services)
        self.events = Events(services)
        webhooks = Webhooks(config.webhooks, services, self.queue)
        shared = Shared(config, services, self.queue, self.events, webhooks)
        self.takers: list[Taker] = [Responses(shared), Jobs(shared)]  # in the order in which they are asked
        self.parts: list[Part] = [*self.takers, webhooks]
        if config.files.enabled:
            files = Files(config.files, services)
            self.parts.append(files)
            if config.batches.enabled:
                self.parts.append(Batches(shared, files))

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
        for taker in self.takers:
            await taker.prepare(exchange)

    @hookimpl
    async def lookup_response(self, exchange: Exchange) -> Reply | None:
        if exchange.phase != "accept":
            return None
        for taker in self.takers:
            if (taken := await taker.accept(exchange)) is not None:
                return taken
        return None

    @hookimpl
    def register_commands(self, cli: Any) -> None:
        from gateway_plugins.jobs import commands, worker_commands  # noqa: PLC0415 - a command's business

        # the plugin is not constructed, nor are its parts
        commands.add_commands(self, cli)
        worker_commands.add_commands(self, cli)
        if self.config.webhooks.enabled:
            from gateway_plugins.jobs.webhooks import commands as webhooks  # noqa: PLC0415 - as above

            webhooks.add_commands(self, cli)
