"""One process: settings → services → snapshot → server, and everything closed again in reverse.

Without a server it is the process of a plugin's command (`headless.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import sys
import threading
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs
from multidict import istr

from gateway import dispatch, logs, vitals, watch
from gateway.admin import add_admin_routes
from gateway.begin import GC_SERVING
from gateway.catalogue import Catalogue
from gateway.core_routes import add_core_routes
from gateway.corrections import Corrections
from gateway.errors import StartError, StoreUnavailable
from gateway.finisher import Finisher
from gateway.health import Health
from gateway.inner import InnerCalls
from gateway.kit.ledger import MemoryLedger
from gateway.kit.ledger_redis import RedisLedger
from gateway.listening import Certificates, close, open_sockets, port_of, tls_context
from gateway.metric_files import start_anew
from gateway.metrics import Metrics
from gateway.plugins import close_all, needs_database, open_all, read_plugins, schemas
from gateway.server import Server
from gateway.services import Services
from gateway.settings import secrets_of
from gateway.snapshot import build
from gateway.stores import open_database, open_redis
from gateway.tasks import Tasks
from gateway.timing import SLOW_SECONDS
from gateway.transport import open_transport
from gateway.upstream import UpstreamClient, fetch_models

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
    from pathlib import Path

    from gateway.plugins import Blueprint, Instance
    from gateway.reload import Reloading
    from gateway.routes import Router
    from gateway.settings import Loaded, Settings
    from gateway.settings import Upstream as UpstreamSettings
    from gateway.simulator import Simulator
    from gateway.snapshot import Snapshot
    from gateway.stores.database import Database
    from gateway.stores.redis import RedisStore
    from gateway.supervisor import Identity
    from gateway.upstream import Transport

log = logs.get_logger("gateway.worker")

STALL_SECONDS = 0.2
CLOSE_SECONDS = 10.0  # for old configurations that are being closed when the process ends


class Worker:
    """Holds the snapshot in force, and those before it while requests go on with them."""

    def __init__(
        self,
        loaded: Loaded,
        identity: Identity,
        data_dir: Path | None,
        blueprints: list[Blueprint] | None = None,
        *,
        sockets: Sequence[socket.socket] = (),
        alone: bool = True,
        number: int = 1,
        serves: bool = True,
    ) -> None:
        """`blueprints`: plugins that are given as they are (a test's own classes), instead of the YAML's. `sockets`:
        that listen already, instead of what the settings say; `alone=False`: one of several, `number` of them.
        `serves=False`: beside a gateway, whose stores it uses; without a server.
        """
        self.number = number
        self.serves = serves
        self._sockets = list(sockets)
        self._loaded = loaded
        self._blueprints = blueprints
        self._identity = identity
        self._data_dir = data_dir
        self._tasks = Tasks()
        self._finisher = Finisher(self._tasks)
        self._simulator: Simulator | None = None
        self._transports: dict[Any, Transport] = {}
        self._snapshot: Snapshot | None = None
        self._open: list[Snapshot] = []  # those whose plugins are open
        self._prepared: tuple[Snapshot, list[Callable[[], None]]] | None = None
        self._preparing = False
        self._closing = Tasks()
        self._alone = serves and alone
        self.metrics = Metrics(data_dir / "metrics" if data_dir is not None else None, number, alone=self._alone)
        self._lag = vitals.Lag()
        self._health = Health(lambda: self.server.draining)
        self.reloader: Reloading | None = None  # who reloads, where there is a file to read again
        self.corrections = Corrections(lambda: self.snapshot)
        self.server = Server(lambda: self.snapshot, self._tasks, self._finisher, self.corrections)
        self.port = 0  # stays 0 with a Unix socket
        self._certificates: Certificates | None = None
        # Awaited when it has drained, while its stores are open.
        self.companions_ended: Callable[[], Awaitable[None]] | None = None

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
        if self._alone and self._data_dir is not None:
            start_anew(self._data_dir / "metrics")
        settings = self._loaded.settings
        blueprints = self._blueprints
        logs.hide(self._loaded.secrets())
        logs.hide(secrets_of(settings), everywhere=True)
        if blueprints is None:
            blueprints = read_plugins(settings, self._loaded.source)
        logs.hide((secret for b in blueprints for secret in secrets_of(b.config)), everywhere=True)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._close_simulator)
            await self._simulate(settings)
            redis = await stack.enter_async_context(
                open_redis(settings, self._data_dir, self.metrics, beside=not self.serves)
            )
            database = await stack.enter_async_context(
                open_database(
                    settings,
                    self._data_dir,
                    schemas(blueprints),
                    needed=needs_database(blueprints),
                    metrics=self.metrics,
                )
            )
            services = self._services(settings, redis, database)
            stack.push_async_callback(self._close_transports)
            self._snapshot = self._build(self._loaded, blueprints, services)
            if self.serves:
                _refuse_open_door(self._snapshot)
            self._count()
            await stack.enter_async_context(self.metrics.lifespan())
            await stack.enter_async_context(services.catalogue.lifespan())
            await stack.enter_async_context(services.ledger.lifespan())
            await open_all(self._snapshot.instances)
            self._open.append(self._snapshot)
            stack.push_async_callback(self._close_all_plugins)
            await stack.enter_async_context(self.corrections.lifespan())
            stack.push_async_callback(self._finish_all)
            if self.serves:
                self._certificates = Certificates(tls_context(settings.server.tls)) if settings.server.tls else None
                self._sockets = self._sockets or open_sockets(settings.server)
                stack.callback(close, self._sockets, settings.server)
                self.port = port_of(self._sockets)
                await self.server.start(self._sockets, self._certificates.context if self._certificates else None)
                stack.push_async_callback(self._drain)
            # Not after a reload: it would stop all streams for a while, and what is frozen is never collected.
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_SERVING)
            stack.enter_context(watchdog(asyncio.get_running_loop(), self._count_slow, self._lag))
            yield self

    # --- another configuration, while this one serves ----------------------------------------------------------------

    async def prepare(self, loaded: Loaded, blueprints: list[Blueprint] | None = None) -> Snapshot:
        """Open all that another configuration needs, beside the one in force, for `commit` or `abort`.

        Raises ConfigError, StartError, PluginStartError; then nothing is left open, and nothing has changed.
        """
        await self.abort()
        now, settings = self.snapshot, loaded.settings
        seconds = now.settings.server.reload_timeout
        logs.hide(loaded.secrets())
        logs.hide(secrets_of(settings), everywhere=True)
        self._preparing = True
        try:
            if blueprints is None:
                blueprints = await asyncio.to_thread(read_plugins, settings, loaded.source)
            logs.hide((secret for b in blueprints for secret in secrets_of(b.config)), everywhere=True)
            await self._simulate(settings)
            await self._admit_tables(now.services.database, blueprints, seconds)
            changes = [
                await asyncio.to_thread(self._follow, settings),
                await asyncio.to_thread(self._read_certificate, settings),
            ]
            await asyncio.to_thread(self._make_transports, settings)  # a certificate store takes a tenth of a second
            services = replace(now.services, settings=settings)
            snapshot = self._build(loaded, blueprints, services, now.instances)
            if self.serves:
                _refuse_open_door(snapshot)
            self._open.append(snapshot)
            try:
                await open_all(snapshot.instances, seconds)
            except BaseException:
                self._open.remove(snapshot)
                raise
        except BaseException:
            self._preparing = False
            await self._close_unused()
            raise
        self._preparing = False
        self._prepared = snapshot, changes
        return snapshot

    def commit(self) -> Snapshot:
        """Requests that come from now on begin with what was prepared; the old closes after its last one."""
        if self._prepared is None:
            raise RuntimeError("Nothing is prepared.")
        (snapshot, changes), self._prepared = self._prepared, None
        old, self._snapshot = self.snapshot, snapshot
        for put_in_force in changes:
            put_in_force()
        self._follow_models()
        snapshot.services.database.schemas = schemas([instance.blueprint for instance in snapshot.instances])
        if snapshot.settings.log != old.settings.log:
            logs.setup(snapshot.settings.log)
        old.users.call_when_over(lambda: self._closing.spawn(self._close(old), "an old configuration"))
        return snapshot

    async def abort(self) -> None:
        """Close what was prepared, if anything was."""
        if self._prepared is not None:
            (snapshot, _), self._prepared = self._prepared, None
            await self._close(snapshot)

    async def put_in_force(self, loaded: Loaded) -> None:
        """Both, where there is no other worker. Raises as `prepare`."""
        await self.prepare(loaded)
        self.commit()

    async def _admit_tables(self, database: Database, blueprints: Sequence[Blueprint], seconds: float) -> None:
        if not needs_database(blueprints):
            return
        wanted = schemas(blueprints)
        try:
            async with asyncio.timeout(seconds):
                await database.admit(wanted)
        except (StoreUnavailable, TimeoutError):
            names = ", ".join(schema.name for schema in wanted)
            raise StartError(
                f"The database does not answer, so that nobody knows whether it has the tables of {names}."
            ) from None

    def _follow(self, settings: Settings) -> Callable[[], None]:
        """What the catalogue makes of these settings, to be put in force."""
        now = self.snapshot.settings
        if (now.upstreams, now.catalogue, now.upstream.default) == (
            settings.upstreams,
            settings.catalogue,
            settings.upstream.default,
        ):
            return lambda: None
        return self.snapshot.services.catalogue.follow(
            _kinds(settings), settings.catalogue, default=settings.upstream.default
        )

    def _read_certificate(self, settings: Settings) -> Callable[[], None]:
        """Once more: it is renewed every few weeks. Raises StartError."""
        certificates, tls = self._certificates, settings.server.tls
        if certificates is None or tls is None:
            return lambda: None
        context = tls_context(tls)
        return lambda: certificates.put_in_force(context)

    # --- opening and closing -----------------------------------------------------------------------------------------

    def _build(
        self, loaded: Loaded, blueprints: Sequence[Blueprint], services: Services, carry: Sequence[Instance] = ()
    ) -> Snapshot:
        def make_upstream(name: str, upstream: UpstreamSettings) -> UpstreamClient:
            return self._upstream(loaded.settings, name, upstream)

        def add_routes(router: Router) -> None:
            add_core_routes(router, self._health)
            add_admin_routes(router, lambda: self.reloader, self.number)

        return build(loaded, blueprints, services, make_upstream, add_routes, carry=carry)

    async def _simulate(self, settings: Settings) -> None:
        if self._simulator is None and any(_simulates(u) for u in settings.upstreams.values()):
            from gateway.simulator import Simulator  # noqa: PLC0415 - who has keys needs none

            simulator = Simulator(remembered=0)
            await simulator.start()
            self._simulator = simulator

    async def _close_simulator(self) -> None:
        if self._simulator is not None:
            await self._simulator.close()

    async def _finish_all(self) -> None:
        """Every `request_finished` that is due has run, or had its time."""
        self._finisher.drain()
        await self._tasks.drain(dispatch.FINISH_SECONDS + 1)

    async def _drain(self) -> None:
        settings = self.snapshot.settings.server
        cut = await self.server.drain(settings.drain_delay, settings.drain_timeout)
        if cut:
            log.warning("drain_cut_requests", requests=cut)
        if self.companions_ended is not None:
            await self.companions_ended()

    async def _close(self, snapshot: Snapshot) -> None:
        await self._close_plugins(snapshot)
        await self._close_unused()

    async def _close_plugins(self, snapshot: Snapshot) -> None:
        if snapshot not in self._open:
            return
        self._open.remove(snapshot)
        for plugin, error in await close_all(snapshot.instances):
            log.error("plugin_close_failed", plugin=plugin, exc_info=error)

    async def _close_all_plugins(self) -> None:
        await self.abort()
        await self._closing.drain(CLOSE_SECONDS)
        for snapshot in self._open[::-1]:
            await self._close_plugins(snapshot)

    async def _close_unused(self) -> None:
        """Upstreams that no configuration uses any more, nor one that is being prepared."""
        if self._preparing:
            return  # it does so when it is done, or is closed itself
        clients = [client for snapshot in self._open for client in snapshot.upstreams.values()]
        self.snapshot.services.catalogue.forget_others({client.name for client in clients})
        await self._close_transports({id(client.transport) for client in clients})

    async def _close_transports(self, used: Collection[int] = ()) -> None:
        gone = [key for key, transport in self._transports.items() if id(transport) not in used]
        for transport in [self._transports.pop(key) for key in gone]:
            await transport.close()

    def _services(self, settings: Settings, redis: RedisStore | None, database: Database) -> Services:
        cache = self._data_dir / "catalogue" if self._data_dir else None
        return Services(
            settings=settings,
            catalogue=Catalogue(
                _kinds(settings), settings.catalogue, cache, self._fetch_models, default=settings.upstream.default
            ),
            tasks=self._tasks,
            data_dir=self._data_dir,
            pepper=self._identity.pepper,
            bootstrap_key_hash=self._identity.bootstrap_key_hash,
            metrics=self.metrics,
            ledger=MemoryLedger() if redis is None else RedisLedger(redis),
            redis=redis,
            opened_database=database,
            inner=InnerCalls(lambda: self.snapshot, self._tasks, self._finisher, self.corrections),
            serves=self.serves,
        )

    def _follow_models(self) -> None:
        catalogue = self.snapshot.services.catalogue

        def known(upstream: str, model: str) -> str | None:
            found = catalogue.model(upstream, model)
            return found.id if found is not None else None

        self.metrics.follow(known, self.snapshot.named_models())

    def _count_slow(self, where: tuple[str, str]) -> None:
        self.snapshot.plugin_counts.slow.add(1, *where)

    def _count(self) -> None:
        """What the process itself is, and how it fares."""
        self._follow_models()
        vitals.count(self.metrics, self, self._lag)

    def _make_transports(self, settings: Settings) -> None:
        for name, upstream in settings.upstreams.items():
            self._transport(settings, name, upstream)

    def _transport(self, settings: Settings, name: str, upstream: UpstreamSettings) -> Transport:
        """The one that is there already, with its connections, if it would be the same. Raises StartError."""
        policy = settings.upstream
        base = self._simulator.url if _simulates(upstream) and self._simulator else upstream.base_url
        try:
            authorities = hashlib.sha256(upstream.ca_file.read_bytes()).digest() if upstream.ca_file else None
            proxy = upstream.proxy.get_secret_value() if upstream.proxy and not _simulates(upstream) else None
            limits = policy.connect_timeout, policy.max_connections, policy.max_reply
            key = (name, base, upstream.transport, proxy, *limits, authorities)
            transport = self._transports.get(key)
            if transport is None:
                transport = self._transports[key] = open_transport(
                    upstream.transport,
                    base,
                    connect_timeout=policy.connect_timeout,
                    max_connections=policy.max_connections,
                    max_reply=policy.max_reply,
                    ca_file=upstream.ca_file,
                    proxy=proxy,
                )
        except OSError as error:
            raise StartError(f"upstreams.{name}.ca_file: {upstream.ca_file} can't be used: {error}.") from error
        except ValueError:  # its text may hold the proxy's password
            raise StartError(f"upstreams.{name}: its base_url or proxy is no address.") from None
        return transport

    def _upstream(self, settings: Settings, name: str, upstream: UpstreamSettings) -> UpstreamClient:
        simulated = _simulates(upstream)
        secret = upstream.api_key.get_secret_value() if upstream.api_key else ""
        logs.hide((secret, self._identity.pepper), everywhere=True)
        headers: dict[str, str] = {
            **{istr(name): value for name, value in upstream.headers.items()},
            hdrs.CONTENT_TYPE: "application/json",
            hdrs.ACCEPT: "*/*",
            hdrs.ACCEPT_ENCODING: "identity",
            hdrs.USER_AGENT: "xenios",
        }
        if secret or simulated:
            headers[hdrs.AUTHORIZATION] = f"Bearer {secret or 'simulated'}"
        return UpstreamClient(name, upstream, self._transport(settings, name, upstream), simulated, headers, secret)

    async def _fetch_models(self, name: str) -> bytes:
        """For the catalogue."""
        snapshot = self.snapshot
        snapshot.users.enter()
        try:
            return await fetch_models(snapshot.upstreams[name], snapshot.settings.upstream.max_reply)
        finally:
            snapshot.users.leave()


def _kinds(settings: Settings) -> dict[str, str]:
    return {name: upstream.kind for name, upstream in settings.upstreams.items()}


def _simulates(upstream: UpstreamSettings) -> bool:
    return upstream.api_key is None and upstream.without_key == "simulate"


def _refuse_open_door(snapshot: Snapshot) -> None:
    """Nobody serves the world without a key by mistake."""
    server = snapshot.settings.server
    if snapshot.hooks.authenticate or server.allow_anonymous or server.is_local:
        return
    raise StartError(
        f"No plugin authenticates and {server.host} can be reached from outside: add a plugin such as api_keys, "
        "bind 127.0.0.1, or set server.allow_anonymous: true."
    )


@contextlib.contextmanager
def watchdog(
    loop: asyncio.AbstractEventLoop,
    slow: Callable[[tuple[str, str]], None],
    lag: vitals.Lag,
    seconds: float = STALL_SECONDS,
) -> Any:
    """A thread that says who holds the event loop up: a sync hook, or anything else, for more than `seconds`.

    `slow` is called, in that thread, with plugin and hook of one that does it for longer than any hook should take;
    `lag` is told how late the loop is.
    """
    stop = threading.Event()
    beat = [time.monotonic()]
    loop_thread = threading.get_ident()

    def tick() -> None:
        now = time.monotonic()
        lag.note(now, now - beat[0] - seconds / 4)
        beat[0] = now
        if not stop.is_set():
            handles[0] = loop.call_later(seconds / 4, tick)

    handles = [loop.call_later(seconds / 4, tick)]

    def blocking() -> tuple[str, str] | None:
        return dispatch.running[0] or watch.running(loop)

    def look() -> None:
        said = counted = 0.0
        while not stop.wait(seconds / 2):
            late = time.monotonic() - beat[0]
            if late > seconds and said != beat[0]:
                said = beat[0]
                plugin, hook = blocking() or (None, None)
                frame = sys._current_frames().get(loop_thread)  # noqa: SLF001 - the documented way to see it
                where = traceback.format_stack(frame)[-3:] if frame else []
                log.warning("event_loop_stalled", seconds=round(late, 3), plugin=plugin, hook=hook, frames=where)
            if late > SLOW_SECONDS and counted != beat[0]:
                counted = beat[0]
                if (held := blocking()) is not None:
                    slow(held)

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        handles[0].cancel()
        thread.join(timeout=1)
