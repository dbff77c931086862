"""Calling a hook's implementations: frozen tuples, a loop, and what happens when one raises.

Nothing here knows pluggy; `plugins.py` compiles the tuples at start-up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from gateway.errors import GatewayError, PluginError, StartError
from gateway.exchange import Finding, Principal
from gateway.logs import get_logger
from gateway.metrics import Cell
from gateway.timing import timed, timed_sync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.exchange import Correction, Exchange
    from gateway.watch import Watch

log = get_logger("gateway.plugins")

FINISH_SECONDS = 5.0

# What runs on the loop right now, for the watchdog: a sync hook can't be interrupted, only named.
running: list[tuple[str, str] | None] = [None]
# What a plugin fails with. `sys.exit()` in a plugin must not end the gateway; a CancelledError may be the plugin's own.
FAILURES = (Exception, SystemExit, asyncio.CancelledError)


def is_cancelled(error: BaseException) -> bool:
    """The request itself is to stop. False: a plugin let out the cancellation of something that it waited for."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


@dataclass(slots=True)
class Impl:
    """One plugin's implementation of one hook."""

    plugin: str
    hook: str
    call: Callable[..., Any]
    on_error: Literal["fail", "ignore"] = "fail"
    # `when:` of the YAML, compiled; None = always.
    when: Callable[[Exchange], bool] | None = None
    index: int = 0
    rewrites: bool = False
    explicit: bool = False  # the YAML or the plugin said `on_error` in so many words
    where: tuple[str, str] = field(init=False)
    failures: Cell = field(default_factory=Cell)

    def __post_init__(self) -> None:
        self.where = (self.plugin, self.hook)

    def applies(self, exchange: Exchange) -> bool:
        """Evaluated once per exchange and plugin, as soon as its fields are known, and kept for later hooks."""
        if self.when is None:
            return True
        memo = exchange.scope_memo.get(self.index)
        if memo is None:
            memo = exchange.scope_memo[self.index] = self.when(exchange)
        return memo

    def failed(self, error: BaseException, exchange: Exchange | None = None) -> None:
        self.failures.value += 1
        log.error(
            "plugin_failed",
            plugin=self.plugin,
            hook=self.hook,
            request_id=exchange.request_id if exchange else None,
            credentials=exchange.credentials if exchange else None,  # the log takes them out of the traceback
            exc_info=error,
        )

    def __repr__(self) -> str:
        return f"{self.plugin}.{self.hook}"


Impls = tuple[Impl, ...]


@dataclass(frozen=True, slots=True)
class CompiledHooks:
    """For each hook its implementations in call order."""

    register_routes: Impls = ()
    register_commands: Impls = ()
    register_upstreams: Impls = ()
    request_received: Impls = ()
    authenticate: Impls = ()
    restore_principal: Impls = ()
    prepare_request: Impls = ()
    choose_targets: Impls = ()
    check_request: Impls = ()
    lookup_response: Impls = ()
    around_upstream: Impls = ()
    attempt_started: Impls = ()
    attempt_finished: Impls = ()
    open_tap: Impls = ()
    transform_response: Impls = ()
    render_error: Impls = ()
    response_started: Impls = ()
    request_finished: Impls = ()
    usage_corrected: Impls = ()
    explain: Impls = ()

    def all(self) -> Iterator[Impl]:
        for f in fields(self):
            yield from getattr(self, f.name)

    def order(self) -> dict[str, list[str]]:
        """Hook → plugins in call order, for `xenios plugins` and for tests."""
        return {f.name: [impl.plugin for impl in getattr(self, f.name)] for f in fields(self)}


async def run_all(exchange: Exchange, impls: Impls, *, ignorable: bool = False) -> None:
    """Each in turn. A refusal goes to the client; a failure is a 503, or ignored where `on_error` may say so."""
    for impl in impls:
        if impl.when is not None and not impl.applies(exchange):
            continue
        exchange.running = impl.where
        try:
            await (impl.call if exchange.timings is None else timed(exchange.timings, impl))(exchange)
        except GatewayError:
            _blame(exchange, impl)
            raise
        except FAILURES as error:
            if is_cancelled(error):
                raise
            impl.failed(error, exchange)
            if not (ignorable and impl.on_error == "ignore"):
                raise _plugin_error(exchange, impl) from error
    exchange.running = None


async def run_first(exchange: Exchange, impls: Impls, *, ignorable: bool = False, returns: type | None = None) -> Any:
    """The first answer that is not None; one of the wrong type is the plugin's failure."""
    for impl in impls:
        if impl.when is not None and not impl.applies(exchange):
            continue
        exchange.running = impl.where
        try:
            answer = await (impl.call if exchange.timings is None else timed(exchange.timings, impl))(exchange)
            if answer is not None:
                if returns is not None and not isinstance(answer, returns):
                    raise _wrong(answer, returns)
                exchange.running = None
                return answer
        except GatewayError:
            _blame(exchange, impl)
            raise
        except FAILURES as error:
            if is_cancelled(error):
                raise
            impl.failed(error, exchange)
            if not (ignorable and impl.on_error == "ignore"):
                raise _plugin_error(exchange, impl) from error
    exchange.running = None
    return None


def run_sync(exchange: Exchange, impls: Impls, *arguments: Any) -> None:
    """Observers: each in turn, a failure is logged and changes nothing."""
    for impl in impls:
        if impl.when is not None and not impl.applies(exchange):
            continue
        running[0] = impl.where
        try:
            (impl.call if exchange.timings is None else timed_sync(exchange.timings, impl))(exchange, *arguments)
        except FAILURES as error:
            impl.failed(error, exchange)
    running[0] = None


def first_sync(exchange: Exchange, impls: Impls, *arguments: Any, returns: type | None = None) -> Any:
    """The first answer of observers that is not None."""
    for impl in impls:
        if impl.when is not None and not impl.applies(exchange):
            continue
        running[0] = impl.where
        try:
            call = impl.call if exchange.timings is None else timed_sync(exchange.timings, impl)
            answer = call(exchange, *arguments)
            if answer is not None:
                if returns is not None and not isinstance(answer, returns):
                    raise _wrong(answer, returns)
                return answer
        except FAILURES as error:
            impl.failed(error, exchange)
        finally:
            running[0] = None
    return None


async def run_finished(exchange: Exchange, impls: Impls, watch: Watch) -> None:
    """`request_finished`: every plugin, each within its own deadline by `watch`, whatever the others do."""
    for impl in impls:
        if impl.when is not None and not impl.applies(exchange):
            continue
        watch.wait("request_finished", FINISH_SECONDS)
        exchange.running = impl.where
        try:
            await (impl.call if exchange.timings is None else timed(exchange.timings, impl))(exchange)
        except FAILURES as error:
            if is_cancelled(error):
                if watch.take() is None:
                    raise
                error = TimeoutError(f"took longer than {FINISH_SECONDS} s")
            impl.failed(error, exchange)
    exchange.running = None
    watch.rest()
    if exchange.timings is not None:
        exchange.snapshot.plugin_counts.observe(exchange.timings)


async def run_corrected(impls: Impls, correction: Correction) -> None:
    for impl in impls:
        try:
            await impl.call(correction)
        except FAILURES as error:
            if is_cancelled(error):
                raise
            impl.failed(error)


async def restore_principal(impls: Impls, reference: str, kept: Principal | None) -> Principal | None:
    """The first answer. A failure must not look like a principal that is gone: GatewayError, for a later try."""
    for impl in impls:
        try:
            principal: Principal | None = await impl.call(reference, kept)
            if principal is not None:
                if not isinstance(principal, Principal):
                    raise _wrong(principal, Principal)
                return principal
        except (GatewayError, StartError):  # the second says what to do about it
            raise
        except FAILURES as error:
            if is_cancelled(error):
                raise
            impl.failed(error)
            raise PluginError from error
    return None


async def run_explain(exchange: Exchange, impls: Impls) -> list[tuple[str, Finding]]:
    """(plugin, finding) of each plugin; a refusal, a failure and each limit that it would hold are findings too."""
    found: list[tuple[str, Finding]] = []
    for impl in impls:
        if not impl.applies(exchange):
            continue
        exchange.running = impl.where
        exchange.held = []
        try:
            said = await impl.call(exchange) or ()
            found += [(impl.plugin, f if isinstance(f, Finding) else Finding(_text(f))) for f in said]
        except GatewayError as error:
            found.append((impl.plugin, Finding(error.message, refuses=error)))
        except Exception as error:  # noqa: BLE001 - reported as a finding
            impl.failed(error, exchange)
            found.append((impl.plugin, Finding(f"explain failed: {type(error).__name__}")))
        found += [
            (impl.plugin, Finding(rule.name or rule.key, rule=rule)) for held in exchange.held for rule in held.rules()
        ]
    exchange.running = exchange.held = None
    return found


def _text(finding: Any) -> str:
    if not isinstance(finding, str):
        raise TypeError(f"returned {type(finding).__name__} where Finding or str is due")
    return finding


def _wrong(answer: Any, returns: type) -> TypeError:
    return TypeError(f"returned {type(answer).__name__} where {returns.__name__} or None is due")


def _blame(exchange: Exchange, impl: Impl) -> None:
    exchange.error_by = exchange.error_by or f"{impl.plugin}.{impl.hook}"
    exchange.running = None


def _plugin_error(exchange: Exchange, impl: Impl) -> PluginError:
    exchange.error_by = f"{impl.plugin}.{impl.hook}"
    exchange.running = None
    return PluginError()
