"""Receivers of webhooks on real sockets, and a plugin that has webhooks and nothing else of `jobs`."""

import asyncio
import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

import gateway_plugins.jobs
from gateway import StoreUnavailable, hookimpl
from gateway.kit import Schema
from gateway_plugins.jobs import settings
from gateway_plugins.jobs.parts import Again
from gateway_plugins.jobs.webhooks.part import Webhooks

LOCAL = {"allow_http": True, "allow_addresses": ["127.0.0.0/8"], "ports": "any"}


@dataclass
class Message:
    """As it came in."""

    path: str
    headers: dict
    body: bytes

    @property
    def event(self):
        return json.loads(self.body)


@dataclass
class Receiver:
    """Answers each message by the next of `script` (statuses, or coroutines of a request); then with 204."""

    url: str = ""
    seen: list = field(default_factory=list)
    script: list = field(default_factory=list)


@contextlib.asynccontextmanager
async def receiver(*script, tls=None):
    """One that listens on a port of 127.0.0.1."""
    made = Receiver(script=list(script))

    async def answer(request):
        made.seen.append(Message(request.path, dict(request.headers), await request.read()))
        what = made.script.pop(0) if made.script else 204
        return web.Response(status=what) if isinstance(what, int) else await what(request)

    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    made.url = f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}/hook"
    try:
        yield made
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def raw_receiver(serve):
    """`serve(reader, writer)` for each connection; yields the port."""
    open_ones = set()

    async def connected(reader, writer):
        open_ones.add(asyncio.current_task())
        try:
            with contextlib.suppress(ConnectionError):
                await serve(reader, writer)
        finally:
            writer.transport.abort()
            open_ones.discard(asyncio.current_task())

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in open_ones:
            task.cancel()
        await asyncio.gather(*open_ones, return_exceptions=True)


class Kept:
    """The queue as its list: what was put, in order."""

    def __init__(self):
        self.ids = []
        self.later = set()  # those that RQ is to run, some day
        self.away = False

    def serve(self, name, queue):
        assert name == "webhooks"

    async def put(self, kind, work, *, queue):
        assert (kind, queue) == ("delivery", "webhooks")
        if self.away:
            raise StoreUnavailable
        if work not in self.ids:
            self.ids.append(work)

    async def unknown(self, kind, works, *, within=math.inf):
        return set(works) - set(self.ids) - (self.later if within == math.inf else set())


class Hooked:
    """A plugin with the tables of `jobs` and its part for webhooks."""

    Config = settings.Webhooks
    schema = Schema("jobs", Path(gateway_plugins.jobs.__file__).parent)

    def __init__(self, config, services):
        self.queue = Kept()
        self.database = services.database
        self.part = Webhooks(config, services, self.queue)

    @contextlib.asynccontextmanager
    async def lifespan(self):
        async with self.part.lifespan():
            yield

    @hookimpl
    def register_routes(self, router):
        self.part.register_routes(router)

    async def send(self, event_type="job.succeeded", *, tenant="default", target=None, thing="job_1"):
        """As another part does; the messages' ids."""
        before = {*self.queue.ids}
        async with self.database.transaction() as statements:
            await self.part.send(statements, tenant, event_type, {"id": thing}, target=target)
        await self.part.wake()
        return [key for key in self.queue.ids if key not in before]

    async def work(self):
        """One try of each message in the queue; how long each is to wait that goes back."""
        waits = []
        while self.queue.ids:
            try:
                await self.part.deliver(self.queue.ids.pop(0))
            except Again as again:
                waits.append(again.after)
        return waits

    async def row(self, delivery_id):
        return await self.database.fetch_one("SELECT * FROM jobs_webhook_deliveries WHERE id = $1", delivery_id)

    async def make_due(self):
        """All waits are over."""
        await self.database.execute("UPDATE jobs_webhook_deliveries SET next_at = 1 WHERE status = 'waiting'")
        await self.part.tidy()
