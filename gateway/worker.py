"""One process that serves: settings → services → snapshot → server, and everything closed again in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy, istr

from gateway import dispatch
from gateway.catalogue import Catalogue
from gateway.core_routes import add_core_routes
from gateway.corrections import Corrections
from gateway.dialects import DIALECTS
from gateway.errors import BadRequest, StartError
from gateway.exchange import Exchange, Reply, RequestView, new_id
from gateway.finisher import Finisher
from gateway.health import Health
from gateway.kit.ledger import MemoryLedger, RedisLedger
from gateway.logs import hide
from gateway.pipeline import Run
from gateway.plugins import close_all, needs_database, open_all, read_plugins, schemas
from gateway.server import Server
from gateway.services import Services
from gateway.simulator import Simulator
from gateway.snapshot import build, is_loopback
from gateway.stores import open_database, open_redis
from gateway.tasks import Tasks
from gateway.transport.aiohttp_client import AiohttpTransport
from gateway.upstream import UpstreamClient, fetch_models

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from gateway.exchange import JsonObject, Principal
    from gateway.plugins import Blueprint
    from gateway.settings import Loaded, Settings
    from gateway.settings import Upstream as UpstreamSettings
    from gateway.snapshot import Snapshot
    from gateway.stores.database import Database
    from gateway.stores.redis import RedisStore
    from gateway.supervisor import Identity

log = structlog.get_logger("gateway.worker")

STALL_SECONDS = 0.2
# Requests make few cycles: collecting after each 700 new objects costs more than it frees.
GC_THRESHOLD = (20_000, 20, 50)


class Worker:
    """Holds the snapshot in force."""

    def __init__(
        self,
        loaded: Loaded,
        identity: Identity,
        data_dir: Path | None,
        blueprints: list[Blueprint] | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        """`blueprints`: plugins that are given as they are (a test's own classes), instead of the YAML's. `sockets`:
        those of a parent of several workers, instead of the settings' host and port.
        """
        self._shared_sockets = sockets
        self._loaded = loaded
        self._blueprints = blueprints
        self._identity = identity
        self._data_dir = data_dir
        self._tasks = Tasks()
        self._finisher = Finisher(self._tasks)
        self._simulator: Simulator | None = None
        self._snapshot: Snapshot | None = None
        self.corrections = Corrections(lambda: self.snapshot)
        self.server = Server(lambda: self.snapshot, self._tasks, self._finisher, self.corrections)
        self.port = 0

    @property
    def snapshot(self) -> Snapshot:
        if self._snapshot is None:
            raise RuntimeError("The worker has not started.")
        return self._snapshot

    @property
    def simulated(self) -> bool:
        return self._simulator is not None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Worker]:
        """Serve while the context lasts, then drain. Raises ConfigError, StartError, PluginStartError, OSError."""
        settings = self._loaded.settings
        blueprints = self._blueprints
        if blueprints is None:
            blueprints = read_plugins(settings, self._loaded.source)
        async with contextlib.AsyncExitStack() as stack:
            if any(_simulates(u) for u in settings.upstreams.values()):
                self._simulator = await stack.enter_async_context(Simulator())
            redis = await stack.enter_async_context(open_redis(settings, self._data_dir))
            database = await stack.enter_async_context(
                open_database(settings, self._data_dir, schemas(blueprints), needed=needs_database(blueprints))
            )
            services = self._services(settings, redis, database)
            health = Health(lambda: self.server.draining)
            snapshot = build(
                settings, blueprints, services, self._upstream, lambda router: add_core_routes(router, health)
            )
            self._snapshot = snapshot
            stack.push_async_callback(self._close_transports, snapshot)
            _refuse_open_door(snapshot)
            await stack.enter_async_context(services.catalogue.lifespan())
            await stack.enter_async_context(services.ledger.lifespan())
            await open_all(snapshot.instances)
            stack.push_async_callback(self._close_plugins, snapshot)
            await stack.enter_async_context(self.corrections.lifespan())
            stack.push_async_callback(self._finish_all)
            self.port = await self.server.start(settings.server.host, settings.server.port, self._shared_sockets)
            stack.push_async_callback(self._drain, settings)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLD)
            stack.enter_context(watchdog(asyncio.get_running_loop()))
            yield self

    async def _finish_all(self) -> None:
        """Every `request_finished` that is due has run, or had its time."""
        self._finisher.drain()
        await self._tasks.drain(dispatch.FINISH_SECONDS + 1)

    async def _drain(self, settings: Settings) -> None:
        cut = await self.server.drain(settings.server.drain_delay, settings.server.drain_timeout)
        if cut:
            log.warning("drain_cut_requests", requests=cut)

    async def _close_plugins(self, snapshot: Snapshot) -> None:
        for plugin, error in await close_all(snapshot.instances):
            log.error("plugin_close_failed", plugin=plugin, exc_info=error)

    async def _close_transports(self, snapshot: Snapshot) -> None:
        for upstream in snapshot.upstreams.values():
            await upstream.transport.close()

    def _services(self, settings: Settings, redis: RedisStore | None, database: Database) -> Services:
        cache = self._data_dir / "catalogue" if self._data_dir else None
        return Services(
            settings=settings,
            catalogue=Catalogue(
                {name: u.kind for name, u in settings.upstreams.items()},
                settings.catalogue,
                cache,
                self._fetch_models,
                default=settings.upstream.default,
            ),
            tasks=self._tasks,
            data_dir=self._data_dir,
            pepper=self._identity.pepper,
            bootstrap_key_hash=self._identity.bootstrap_key_hash,
            ledger=MemoryLedger() if redis is None else RedisLedger(redis),
            redis=redis,
            opened_database=database,
            submitter=self._submit,
        )

    def _upstream(self, name: str, settings: UpstreamSettings) -> UpstreamClient:
        policy = self._loaded.settings.upstream
        simulated = _simulates(settings)
        secret = settings.api_key.get_secret_value() if settings.api_key else ""
        hide((secret, self._identity.pepper))
        base = self._simulator.url if simulated and self._simulator else settings.base_url
        headers: dict[str, str] = {
            **{istr(name): value for name, value in settings.headers.items()},
            hdrs.CONTENT_TYPE: "application/json",
            hdrs.ACCEPT: "*/*",
            hdrs.ACCEPT_ENCODING: "identity",
            hdrs.USER_AGENT: "xenios",
        }
        if secret or simulated:
            headers[hdrs.AUTHORIZATION] = f"Bearer {secret or 'simulated'}"
        try:
            transport = AiohttpTransport(
                base,
                connect_timeout=policy.connect_timeout,
                max_connections=policy.max_connections,
                max_reply=policy.max_reply,
                ca_file=settings.ca_file,
            )
        except OSError as error:
            raise StartError(f"upstreams.{name}.ca_file: {settings.ca_file} can't be used: {error}.") from error
        return UpstreamClient(name, settings, transport, simulated, headers, secret)

    async def _fetch_models(self, name: str) -> bytes:
        """For the catalogue."""
        return await fetch_models(self.snapshot.upstreams[name], self._loaded.settings.upstream.max_reply)

    async def _submit(self, parent: Exchange, endpoint: str, body: JsonObject, principal: Principal | None) -> Reply:
        """A plugin's own model call, through the pipeline as a client's would be."""
        if endpoint not in DIALECTS:
            raise ValueError(f"There is no proxied endpoint {endpoint!r}.")
        if body.get("stream"):
            raise BadRequest("A submitted call can't stream.", param="stream")
        raw = msgspec.json.encode(body)
        route, _ = parent.snapshot.routes.match("POST", f"/v1/{endpoint}")
        empty: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())
        view = RequestView("POST", route.path, empty, remote=parent.request.remote)
        exchange = Exchange(new_id(), view, parent.snapshot, route)
        exchange.request_id = parent.request_id
        exchange.principal = principal
        client = _Collected()
        run = Run(
            exchange, client, _Submitted(raw), tasks=self._tasks, finisher=self._finisher, correct=self.corrections
        )
        await run.run()
        return client.reply()


class _Submitted:
    content_type = "application/json"

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    async def read(self, limit: int) -> bytes:
        del limit  # made by a plugin of ours, not by a client
        return self._raw


class _Collected:
    """A `Client` that keeps what it is sent."""

    def __init__(self) -> None:
        self._status = 500
        self._headers: CIMultiDict[str] = CIMultiDict()
        self._parts: list[bytes] = []

    async def send(self, status: int, headers: CIMultiDict[str], body: bytes, progress: Callable[[], None]) -> None:
        del progress
        self._status, self._headers, self._parts = status, headers, [body]

    async def start(self, status: int, headers: CIMultiDict[str]) -> None:
        self._status, self._headers = status, headers

    async def write(self, data: bytes) -> None:
        self._parts.append(data)

    async def end(self) -> None: ...

    def abort(self) -> None:
        self._status = 502

    def reply(self) -> Reply:
        return Reply(self._status, b"".join(self._parts), self._headers)


def _simulates(upstream: UpstreamSettings) -> bool:
    return upstream.api_key is None and upstream.without_key == "simulate"


def _refuse_open_door(snapshot: Snapshot) -> None:
    """Nobody serves the world without a key by mistake."""
    server = snapshot.settings.server
    if snapshot.hooks.authenticate or server.allow_anonymous or is_loopback(server.host):
        return
    raise StartError(
        f"No plugin authenticates and {server.host} can be reached from outside: add a plugin such as api_keys, "
        "bind 127.0.0.1, or set server.allow_anonymous: true."
    )


@contextlib.contextmanager
def watchdog(loop: asyncio.AbstractEventLoop, seconds: float = STALL_SECONDS) -> Any:
    """A thread that says who holds the event loop up: a sync hook, or anything else, for more than `seconds`."""
    stop = threading.Event()
    beat = [time.monotonic()]
    loop_thread = threading.get_ident()

    def tick() -> None:
        beat[0] = time.monotonic()
        if not stop.is_set():
            handles[0] = loop.call_later(seconds / 4, tick)

    handles = [loop.call_later(seconds / 4, tick)]

    def watch() -> None:
        said = 0.0
        while not stop.wait(seconds / 2):
            late = time.monotonic() - beat[0]
            if late > seconds and said != beat[0]:
                said = beat[0]
                plugin, hook = dispatch.running[0] or (None, None)
                frame = sys._current_frames().get(loop_thread)  # noqa: SLF001 - the documented way to see it
                where = traceback.format_stack(frame)[-3:] if frame else []
                log.warning("event_loop_stalled", seconds=round(late, 3), plugin=plugin, hook=hook, frames=where)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        handles[0].cancel()
        thread.join(timeout=1)
