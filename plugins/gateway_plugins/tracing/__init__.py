"""Tracing: OpenTelemetry spans of each request, to a collector by OTLP over HTTP, or to the console.

A request is one server span; each attempt at an upstream is a client span within it, from its start to the last byte,
with the attributes of the conventions for generative AI. Spans are made when a request is over, of the times that it
recorded, and sent in the background: a collector that is down, slow or gone costs a count of dropped spans. Neither
prompts nor answers are in them unless `capture_content` says so.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from gateway import ContextKey, hookimpl
from gateway_plugins.tracing import settings
from gateway_plugins.tracing.content import Content, Listener
from gateway_plugins.tracing.context import Trace, new_span_id, new_trace, parsed, trace_of
from gateway_plugins.tracing.export import Exporter
from gateway_plugins.tracing.spans import Spans

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway import AttemptRecord, Exchange, Services, Tap

Config = settings.Config


class Plugin:
    """Traces requests."""

    Config: TypeAlias = settings.Config
    reads_settings = ()

    def __init__(self, config: Config, services: Services) -> None:
        self._config = config
        self._services = services
        self._key: ContextKey[Trace] = ContextKey("trace")
        self._heard: ContextKey[Listener] = ContextKey("heard")
        self._content = Content(config.max_content, config.redact) if config.capture_content else None
        self._exporter: Exporter | None = None
        self._dropped = services.metrics.dropped("spans")

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        self._exporter = exporter = Exporter(self._config, self._services.log, self._dropped)
        try:
            async with exporter.running():
                yield
        finally:
            self._exporter = None

    # --- a request ---------------------------------------------------------------------------------------------------

    @hookimpl
    async def request_received(self, exchange: Exchange) -> None:
        trace = self._begin(exchange)
        if trace.sampled and self._config.plugin_spans and exchange.timings is None:
            exchange.timings = []

    def _begin(self, exchange: Exchange) -> Trace:
        outer = exchange.parent.get(self._key) if exchange.parent is not None else None
        if outer is not None:
            trace = outer.child_of()
        else:
            trace = self._continued(exchange) or new_trace(
                self._config.sample_ratio, int(exchange.trace_id, 16) if exchange.trace_id else None
            )
        exchange.set(self._key, trace)
        place = trace.traceparent(trace.span_id)
        if trace.sampled or trace.parent_id or self._config.propagate:
            exchange.trace_id = place[3:35]
        if exchange.traceparent is None:
            exchange.traceparent = place  # a job of it is not sampled anew either
        return trace

    def _continued(self, exchange: Exchange) -> Trace | None:
        """A job goes on with the trace in which it was taken: that one is our own, whoever else is believed."""
        if exchange.phase == "run":
            return None if exchange.traceparent is None else parsed(exchange.traceparent)
        return trace_of(exchange) if self._config.parent_based else None

    @hookimpl
    def attempt_started(self, exchange: Exchange, attempt: AttemptRecord) -> None:
        if not self._config.propagate:
            return
        trace = exchange.get(self._key)
        if trace is None:
            return
        trace.attempts.append(new_span_id())
        headers = {**attempt.attempt.headers, "traceparent": trace.traceparent(trace.attempts[-1])}
        if trace.state:
            headers["tracestate"] = trace.state
        attempt.attempt = attempt.attempt.replace(headers=headers)

    @hookimpl
    def open_tap(self, exchange: Exchange) -> Tap | None:
        if self._content is None:
            return None
        trace = exchange.get(self._key)
        if trace is None or not trace.sampled:
            return None
        return exchange.set(self._heard, Listener(self._config.max_content))

    @hookimpl
    async def request_finished(self, exchange: Exchange) -> None:
        trace = exchange.get(self._key) or self._begin(exchange)  # a plugin outside may have refused before
        if not trace.sampled or self._exporter is None:
            return
        content = {}
        if self._content is not None and exchange.attempts:
            content = self._content.attributes(exchange, exchange.get(self._heard))
        timings = (exchange.timings or ()) if self._config.plugin_spans else ()
        self._exporter.put(Spans(exchange, trace).all(content, timings))
