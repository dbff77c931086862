"""The spans of one request, made when it is over of the times that it recorded.

Names and attributes: OpenTelemetry's semantic conventions for HTTP (stable) and for generative AI (in development, so
their names stand here and are not taken from a library), beside them our own, `xenios.*`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gateway import Cause, Outcome, Source
from gateway.kit import clean
from gateway_plugins.tracing.context import new_span_id
from gateway_plugins.tracing.otlp import CLIENT, INTERNAL, SERVER, Event, Span

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway import AttemptRecord, Exchange, Target
    from gateway_plugins.tracing.context import Trace
    from gateway_plugins.tracing.otlp import Attributes

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})
_UNMATCHED = "unmatched"
# Nobody's fault: whoever called left, or a rule said no.
_NO_FAILURE = frozenset({Outcome.OK, Outcome.REFUSED, Outcome.CLIENT_DISCONNECT})
_GIVEN_UP = frozenset({None, Cause.CLIENT_DISCONNECT, Cause.ABANDONED})
_PARAMETERS = (
    ("temperature", "gen_ai.request.temperature"),
    ("top_p", "gen_ai.request.top_p"),
    ("top_k", "gen_ai.request.top_k"),
    ("frequency_penalty", "gen_ai.request.frequency_penalty"),
    ("presence_penalty", "gen_ai.request.presence_penalty"),
    ("seed", "gen_ai.request.seed"),
)
_TOKENS = (
    ("input_tokens", "gen_ai.usage.input_tokens"),
    ("output_tokens", "gen_ai.usage.output_tokens"),
    ("cache_read_tokens", "gen_ai.usage.cache_read.input_tokens"),
    ("cache_write_tokens", "gen_ai.usage.cache_creation.input_tokens"),
    ("reasoning_tokens", "gen_ai.usage.reasoning.output_tokens"),
)
_MOST_HOOKS = 256


class Spans:
    """Makes those of one request."""

    def __init__(self, exchange: Exchange, trace: Trace) -> None:
        self._exchange = exchange
        self._trace = trace
        self._began = int(exchange.started_at * 1e9)
        self._end = exchange.started if exchange.finished is None else exchange.finished

    def all(self, content: Attributes, timings: Sequence[tuple[str, str, float, float]]) -> list[Span]:
        """The server span, one for each attempt, and one for each hook of `timings` (plugin, hook, start, end).

        `content`: attributes for the attempt that answered, or else the last one.
        """
        shown = _answering(self._exchange) if content else None
        spans = [self._of_server()]
        for index, record in enumerate(self._exchange.attempts):
            spans.append(self._of_attempt(index, record, content if record is shown else {}))
        for plugin, hook, started, ended in timings[:_MOST_HOOKS]:
            about = {"xenios.plugin": plugin, "xenios.hook": hook}
            spans.append(self._inner(f"{plugin}.{hook}", INTERNAL, about, started, ended))
        return spans

    def _of_server(self) -> Span:
        exchange, trace = self._exchange, self._trace
        failed = _failed(exchange)
        name, attributes = _server(exchange, failed=failed)
        events: list[Event] = []
        if exchange.skipped:  # when, is not recorded: the first is passed over before the first attempt
            at = self._at(exchange.attempts[0].started if exchange.attempts else self._end)
            events = [Event("xenios.circuit_open", at, _target(target)) for target in exchange.skipped]
        return Span(
            name,
            SERVER,
            trace.trace_id,
            trace.span_id,
            trace.parent_id,
            self._began,
            self._at(self._end),
            attributes,
            failed,
            events,
            trace.state,
            trace.remote,
        )

    def _of_attempt(self, index: int, record: AttemptRecord, content: Attributes) -> Span:
        told = self._trace.attempts
        name, attributes = _attempt(self._exchange, record)
        ended = self._end if record.finished is None else record.finished
        span = self._inner(name, CLIENT, attributes | content if content else attributes, record.started, ended)
        if index < len(told):
            span.span_id = told[index]
        span.failed = record.cause not in _GIVEN_UP
        if self._exchange.stream and record.first_content is not None:
            span.events = [Event("xenios.first_token", self._at(record.first_content), {})]
        return span

    def _inner(self, name: str, kind: int, attributes: Attributes, started: float, ended: float) -> Span:
        trace = self._trace
        return Span(
            name,
            kind,
            trace.trace_id,
            new_span_id(),
            trace.span_id,
            self._at(started),
            self._at(ended),
            attributes,
            state=trace.state,
        )

    def _at(self, moment: float) -> int:
        """Nanoseconds since 1970 of a moment of the monotonic clock."""
        return self._began + int((moment - self._exchange.started) * 1e9)


def _failed(exchange: Exchange) -> bool:
    """By HTTP's conventions 4xx is no failure of a server; after a stream has begun the outcome tells."""
    status = exchange.status
    if status is not None and status >= 400:
        return status >= 500
    return exchange.outcome not in _NO_FAILURE


def _server(exchange: Exchange, *, failed: bool) -> tuple[str, Attributes]:
    request, route, principal, decision = exchange.request, exchange.route, exchange.principal, exchange.decision
    method = request.method if request.method in _METHODS else "_OTHER"
    scheme = request.header("x-forwarded-proto")
    attributes: Attributes = {
        "http.request.method": method,
        "url.scheme": "https" if scheme == "https" else "http",
        "network.protocol.version": ".".join(map(str, request.http_version)),
        "xenios.id": exchange.id,
        "xenios.request_id": exchange.id,
        "xenios.outcome": str(exchange.outcome or Outcome.ERROR),
    }
    if exchange.request_id != exchange.id:
        attributes["xenios.request_id"] = clean(exchange.request_id)
    if exchange.status is not None:
        attributes["http.response.status_code"] = exchange.status
    if exchange.error is not None:
        attributes["xenios.error_code"] = clean(exchange.error.error_code)
    if exchange.error_by is not None:
        attributes["xenios.error_by"] = exchange.error_by
    if failed:
        attributes["error.type"] = attributes.get("xenios.error_code") or str(exchange.status or exchange.outcome)
    if principal is not None:
        attributes["xenios.principal"] = clean(principal.id)
        attributes["xenios.tenant"] = clean(principal.tenant)
        if principal.team:
            attributes["xenios.team"] = clean(principal.team)
    if route.proxied:
        _proxied(exchange, attributes)
    if decision is not None:
        if decision.rule is not None:
            attributes["xenios.rule"] = clean(decision.rule)
        if decision.task is not None:
            attributes["xenios.task"] = clean(decision.task)
    verb = "HTTP" if method == "_OTHER" else method
    if route.path == _UNMATCHED:
        return verb, attributes
    attributes["http.route"] = route.path
    return f"{verb} {route.path}", attributes


def _proxied(exchange: Exchange, attributes: Attributes) -> None:
    """What became of the model call: who was asked, who answered, after what, at what cost."""
    attributes["xenios.endpoint"] = exchange.endpoint
    attributes["xenios.stream"] = exchange.stream
    attributes["xenios.attempts"] = len(exchange.attempts)
    asked = exchange.asked_model
    if asked:
        attributes["xenios.model_asked"] = clean(asked)
    served = exchange.served
    if served is not None:
        attributes["xenios.model_served"] = clean(served.model)
        attributes["xenios.upstream"] = served.upstream
    tries = exchange.attempts
    if exchange.skipped or len(tries) > 1 or (tries and tries[0].cause is not None):
        attributes["xenios.tries"] = [
            *(f"{clean(target.name)} {Cause.CIRCUIT_OPEN}" for target in exchange.skipped),
            *(f"{clean(record.target.name)} {record.cause or 'ok'}" for record in tries),
        ]
    if exchange.cost.usd is not None:
        attributes["xenios.cost_usd"] = exchange.cost.usd
        attributes["xenios.cost_source"] = str(exchange.cost.source)


def _target(target: Target) -> Attributes:
    return {"gen_ai.request.model": clean(target.model), "xenios.upstream": target.upstream}


def _answering(exchange: Exchange) -> AttemptRecord | None:
    for record in reversed(exchange.attempts):
        if record.first_content is not None:
            return record
    return exchange.attempts[-1] if exchange.attempts else None


def _attempt(exchange: Exchange, record: AttemptRecord) -> tuple[str, Attributes]:
    dialect, target, usage = exchange.dialect, record.target, record.usage
    client = exchange.snapshot.upstreams[target.upstream]
    model = clean(target.model)
    attributes: Attributes = {
        "gen_ai.operation.name": dialect.operation,
        "gen_ai.provider.name": client.kind,
        "gen_ai.request.model": model,
        **_address(client.settings.base_url),
        "xenios.upstream": target.upstream,
        "xenios.attempt": record.number,
    }
    if client.simulated:
        attributes["xenios.simulated"] = True
    body = target.applied_to(exchange.body)
    if exchange.stream:
        attributes["gen_ai.request.stream"] = True
    cap = dialect.output_cap(body)
    if cap is not None and _is_number(cap):
        attributes["gen_ai.request.max_tokens"] = cap
    for name, attribute in _PARAMETERS:
        if name in body and _is_number(body[name]):
            attributes[attribute] = body[name]
    choices = body.get("n")
    if choices is not None and choices != 1 and _is_number(choices):
        attributes["gen_ai.request.choice.count"] = choices
    if record.status is not None:
        attributes["http.response.status_code"] = record.status
    if record.cause is not None:
        attributes["error.type"] = str(record.cause)
    if record.generation_id is not None:
        attributes["gen_ai.response.id"] = clean(record.generation_id)
    if record.first_content is not None:
        attributes["gen_ai.response.model"] = clean(record.served.model)
        if exchange.stream:
            attributes["gen_ai.response.time_to_first_chunk"] = record.first_content - record.started
    if usage.source is not Source.UNKNOWN:
        for field, attribute in _TOKENS:
            count = getattr(usage, field)
            if count is not None:
                attributes[attribute] = count
        attributes["xenios.usage_source"] = str(usage.source)
    if record.cost.usd is not None:
        attributes["xenios.cost_usd"] = record.cost.usd
        attributes["xenios.cost_source"] = str(record.cost.source)
    return f"{dialect.operation} {model}", attributes


@functools.lru_cache(maxsize=64)
def _address(base_url: str) -> Mapping[str, Any]:
    url = urlsplit(base_url)
    return {"server.address": url.hostname or "", "server.port": url.port or (80 if url.scheme == "http" else 443)}


def _is_number(value: object) -> bool:
    """One that a span can hold: clients may send anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)
