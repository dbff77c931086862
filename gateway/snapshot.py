"""One frozen configuration in force. An exchange keeps the one it began with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from multidict import istr

from gateway import outgoing
from gateway.dialects import COMMON_HEADERS, DIALECTS, PLAIN_DIALECT
from gateway.exchange import Limits
from gateway.forwarded import TrustedProxies
from gateway.incoming import closed_fields
from gateway.plugins import PluginStartError, compile_hooks, construct
from gateway.routes import Router
from gateway.scoping import headers_in
from gateway.timing import PluginCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gateway.dispatch import CompiledHooks, Impl
    from gateway.exchange import Attempt, Exchange, Target
    from gateway.plugins import Blueprint, Instance
    from gateway.routes import RouteTable
    from gateway.services import Services
    from gateway.settings import Loaded, Settings, Source, Upstream
    from gateway.upstream import UpstreamClient


@dataclass(frozen=True, slots=True)
class Derived:
    """What would otherwise be worked out for each request."""

    limits: Limits
    closed_fields: frozenset[str]  # body fields that are taken out
    forwarded: Mapping[str, tuple[istr, ...]]  # endpoint → request headers that may pass
    served_by: Mapping[str, str]  # model → upstream, where that is not the default
    takes_jobs: bool  # some plugin does
    kept: tuple[str, ...]  # request headers beside those that a job must keep: a `when:` or a plugin reads them
    proxies: TrustedProxies | None

    @classmethod
    def of(cls, settings: Settings, instances: Sequence[Instance]) -> Derived:
        policy = settings.upstream
        limits = Limits(policy.first_event_timeout, policy.stall_timeout, policy.attempt_timeout)
        return cls(
            limits=limits,
            closed_fields=closed_fields(policy.client_may),
            forwarded={
                d.endpoint: tuple(map(istr, (*COMMON_HEADERS, *d.headers, *policy.forward_headers)))
                for d in DIALECTS.values()
            },
            served_by={model: o.upstream for model, o in settings.catalogue.overrides.items() if o.upstream},
            takes_jobs=any(getattr(i.plugin, "takes_jobs", False) for i in instances),
            kept=tuple({name.lower() for i in instances for name in _headers_read(i)}),
            proxies=TrustedProxies(trusted) if (trusted := settings.server.trusted_proxies) else None,
        )


def _headers_read(instance: Instance) -> Iterator[str]:
    yield from getattr(instance.plugin, "reads_headers", ())
    yield from headers_in(instance.blueprint.entry.when)
    yield from headers_in(instance.blueprint.config)


class Users:
    """What goes on with a snapshot: requests, what runs after them, look-ups of costs. Each enters, and leaves once."""

    __slots__ = ("_when_over", "count")

    def __init__(self) -> None:
        self.count = 0
        self._when_over: Callable[[], object] | None = None

    def enter(self) -> None:
        self.count += 1

    def leave(self) -> None:
        self.count -= 1
        if self.count == 0 and self._when_over is not None:
            call, self._when_over = self._when_over, None
            call()

    def call_when_over(self, call: Callable[[], object]) -> None:
        """Nobody new comes: `call` once the last one has left, now if there is none."""
        if self.count == 0:
            call()
        else:
            self._when_over = call


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Settings, plugin instances, compiled hooks, routes and upstreams that belong together."""

    settings: Settings
    source: Source
    instances: tuple[Instance, ...]
    hooks: CompiledHooks
    routes: RouteTable
    upstreams: Mapping[str, UpstreamClient]
    services: Services
    hash: str
    loopback: bool
    derived: Derived
    plugin_counts: PluginCounts
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    users: Users = field(default_factory=Users)

    def attempt_for(self, exchange: Exchange, target: Target) -> Attempt:
        return outgoing.attempt_for(exchange, target)

    def instance(self, plugin: str) -> Instance | None:
        """The plugin with this id."""
        return next((instance for instance in self.instances if instance.id == plugin), None)

    def names(self) -> tuple[str, ...]:
        """Names that plugins answer to beside the upstreams' models: aliases, tasks."""
        return tuple(n for i in self.instances for n in getattr(i.plugin, "listed_models", ()))

    def named_models(self) -> set[str]:
        """`upstream/model` of all that the configuration names."""
        default = self.settings.upstream.default
        overrides = {f"{o.upstream or default}/{model}" for model, o in self.settings.catalogue.overrides.items()}
        return overrides.union(*(getattr(i.plugin, "named_models", ()) for i in self.instances))


def config_hash(settings: Settings, blueprints: Sequence[Blueprint]) -> str:
    """Equal for equal configurations, on every worker. Secrets count, but can't be read from it."""
    data = [
        settings.model_dump(mode="python"),
        [(b.id, b.use, b.version, repr(b.config)) for b in blueprints],
    ]
    return hashlib.sha256(msgspec.json.encode(data, enc_hook=_plain)).hexdigest()[:16]


def _plain(value: Any) -> Any:
    reveal = getattr(value, "get_secret_value", None)
    return hashlib.sha256(reveal().encode()).hexdigest() if reveal else str(value)


def build(
    loaded: Loaded,
    blueprints: Sequence[Blueprint],
    services: Services,
    make_upstream: Callable[[str, Upstream], UpstreamClient],
    add_core_routes: Callable[[Router], None],
    *,
    carry: Sequence[Instance] = (),
) -> Snapshot:
    """Construct and compile; nothing is opened yet. Raises PluginStartError."""
    settings = loaded.settings
    instances = construct(blueprints, services, carry)
    hooks = compile_hooks(instances)
    counts = PluginCounts(services.metrics)
    counts.follow(hooks.all())
    configured = dict(settings.upstreams)
    for impl in hooks.register_upstreams:
        _start(impl, _registrar(configured))
    router = Router(DIALECTS, PLAIN_DIALECT)
    add_core_routes(router)
    for impl in hooks.register_routes:
        router.plugin = impl.plugin
        _start(impl, router)
    return Snapshot(
        settings=settings,
        source=loaded.source,
        instances=tuple(instances),
        hooks=hooks,
        routes=router.table(),
        upstreams={name: make_upstream(name, upstream) for name, upstream in configured.items()},
        services=services,
        hash=config_hash(settings, blueprints),
        loopback=settings.server.is_local,
        derived=Derived.of(settings, instances),
        plugin_counts=counts,
    )


def _registrar(configured: dict[str, Upstream]) -> Callable[[str, Upstream], None]:
    def register(name: str, upstream: Upstream) -> None:
        if name in configured:
            raise ValueError(f"The upstream {name!r} exists already.")
        configured[name] = upstream

    return register


def _start(impl: Impl, argument: Any) -> None:
    try:
        impl.call(argument)
    except Exception as error:
        raise PluginStartError(impl.plugin, impl.hook, error) from error
