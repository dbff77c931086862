"""How long plugins take: measured in some requests and in those that somebody asks about; too long is always noticed.

`exchange.timings` is a list in a request that is measured, else None: all that the others pay is that one look at it.
"""

from __future__ import annotations

import itertools
import re
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gateway.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from gateway.dispatch import Impl
    from gateway.exchange import Event, Exchange, Outcome, Timing
    from gateway.hookspecs import Tap
    from gateway.metrics import Metrics

log = get_logger("gateway.plugins")

ONE_OF = 31  # requests is measured; a prime, so that none of several kinds that take turns is always missed
SLOW_SECONDS = 1.0
# A call is seen at the next turn of the wheel after it began, and last at the one before it ended.
_NOTICED = SLOW_SECONDS - 0.2
# Upper ends of the buckets: a hook takes from microseconds to the time that a store has.
BOUNDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
QUIET_SECONDS = 10.0  # between two lines about the same plugin and hook
MOST_HOOKS = 40  # in the header: proxies and clients take some kilobytes
_UNQUOTABLE = re.compile(r"[^ !#-\[\]-~]")
_requests = itertools.count()


def is_sampled() -> bool:
    """This request is one of those that are measured for the metrics. The first is."""
    return next(_requests) % ONE_OF == 0


def is_handler(hook: str) -> bool:
    """A route's handler (`GET /v1/models`), not a hook: the request's own duration tells of it."""
    return " " in hook


def timed(timings: list[Timing], impl: Impl) -> Callable[..., Awaitable[Any]]:
    """The plugin's call; when it began and ended is noted, however it ends."""

    async def call(*arguments: Any) -> Any:
        began = time.monotonic()
        try:
            return await impl.call(*arguments)
        finally:
            timings.append((*impl.where, began, time.monotonic()))

    return call


def timed_sync(timings: list[Timing], impl: Impl) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        began = time.monotonic()
        try:
            return impl.call(*arguments)
        finally:
            timings.append((*impl.where, began, time.monotonic()))

    return call


def timed_around(timings: list[Timing], impl: Impl) -> Callable[..., Awaitable[Any]]:
    """A layer's own time: before, between and after its calls of `call_next`, each a piece by itself."""

    async def call(exchange: Exchange, attempt: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
        began = time.monotonic()

        async def inner(attempt: Any) -> Any:
            nonlocal began
            timings.append((*impl.where, began, time.monotonic()))
            try:
                return await call_next(attempt)
            finally:
                began = time.monotonic()

        try:
            return await impl.call(exchange, attempt, inner)
        finally:
            timings.append((*impl.where, began, time.monotonic()))

    return call


class TimedTap:
    """A tap whose time is summed over the stream, that of opening it included: one piece, from when it opened."""

    def __init__(self, timings: list[Timing], impl: Impl, tap: Tap, began: float) -> None:
        self._timings = timings
        self._impl = impl
        self._tap = tap
        self._began = began
        self._seconds = time.monotonic() - began

    def event(self, event: Event) -> Any:
        began = time.monotonic()
        try:
            out = self._tap.event(event)
        except BaseException:
            self._note(began)  # it is removed: no end comes
            raise
        self._seconds += time.monotonic() - began
        return out

    def end(self, outcome: Outcome) -> Any:
        began = time.monotonic()
        try:
            return self._tap.end(outcome)
        finally:
            self._note(began)

    def _note(self, began: float) -> None:
        seconds = self._seconds + time.monotonic() - began
        self._timings.append((*self._impl.where, self._began, self._began + seconds))


def summed(timings: Iterable[Timing]) -> dict[tuple[str, str], float]:
    """(plugin, hook) → seconds in this request, in the order in which they began."""
    sums: dict[tuple[str, str], float] = {}
    for plugin, hook, began, ended in timings:
        where = (plugin, hook)
        sums[where] = sums.get(where, 0.0) + ended - began
    return sums


def header(exchange: Exchange, phases: Sequence[tuple[str, float]]) -> str:
    """The value of `Server-Timing` (https://www.w3.org/TR/server-timing/), milliseconds until the reply's head.

    `total`, what of it was `gateway` and what `upstream` (to the first content; a whole reply to its end); each phase;
    each plugin's hook. Where they are many, the shortest hooks are left out.
    """
    now = time.monotonic()
    total = now - exchange.started
    upstream = sum((r.first_content or r.finished or now) - r.started for r in exchange.attempts)
    said = [_entry("total", total), _entry("gateway", total - upstream)]
    said += [_entry("upstream", upstream, _attempts(len(exchange.attempts)))] if exchange.attempts else []
    starts = [("receive", exchange.started), *phases, ("", now)]
    for (phase, began), (_, ended) in pairwise(starts):
        if phase != "upstream":
            said.append(_entry(phase, ended - began))
    hooks = summed(exchange.timings or ())
    shown = sorted(hooks, key=hooks.__getitem__, reverse=True)[:MOST_HOOKS]
    for plugin, hook in (where for where in hooks if where in shown):
        name = "handler" if is_handler(hook) else hook
        said.append(_entry(f"{plugin}.{name}", hooks[plugin, hook], f"{plugin} {hook}"))
    return ", ".join(said)


def _entry(name: str, seconds: float, description: str = "") -> str:
    described = f';desc="{_UNQUOTABLE.sub("_", description)}"' if description else ""
    return f"{name};dur={seconds * 1000:.3f}{described}"


def _attempts(count: int) -> str:
    return f"upstream ({count} attempts)" if count > 1 else ""


class PluginCounts:
    """What is told of each plugin's hooks: times, failures, calls that took a second."""

    def __init__(self, metrics: Metrics) -> None:
        labels = ("plugin", "hook")
        self._seconds = metrics.histogram(
            "xenios_plugin_seconds", f"Time of a plugin's hook in one request, of one in {ONE_OF}.", labels, BOUNDS
        )
        self.slow = metrics.counter("xenios_plugin_slow_total", "Calls of a hook that took a second or more.", labels)
        self.failures = metrics.counter("xenios_plugin_failures_total", "Calls of a hook that failed.", labels)

    def follow(self, impls: Iterable[Impl]) -> None:
        """Each counts from zero on: of a first failure without a zero before it nobody would see that it is new."""
        for impl in impls:
            self.slow.of(*impl.where)
            impl.failures = self.failures.of(*impl.where)

    def observe(self, timings: Iterable[Timing]) -> None:
        for where, seconds in summed(timings).items():
            if not is_handler(where[1]):
                self._seconds.of(*where).observe(seconds)


class SlowCalls:
    """Hooks that have been running for a second: each is counted, not each has a line of its own in the log."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], float] = {}
        self._calls: dict[tuple[str, str], int] = {}

    def seen(self, exchange: Exchange, where: tuple[str, str], since: float, now: float) -> bool:
        """It runs `since` then, as far as we know; True once it was found to be slow."""
        if now - since < _NOTICED:
            return False
        plugin, hook = where
        if is_handler(hook):  # it may call a model
            return True
        exchange.snapshot.plugin_counts.slow.add(1, plugin, hook)
        calls = self._calls[where] = self._calls.get(where, 0) + 1
        if now - self._said.get(where, float("-inf")) >= QUIET_SECONDS:
            self._said[where], self._calls[where] = now, 0
            log.warning(
                "plugin_slow",
                plugin=plugin,
                hook=hook,
                seconds=round(now - since, 1),
                calls=calls,
                request_id=exchange.request_id,
            )
        return True
