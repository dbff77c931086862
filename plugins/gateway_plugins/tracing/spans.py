"""The spans of one request, made when it is over of the times that it recorded.

Names and attributes: OpenTelemetry's semantic conventions for HTTP (stable) and for generative AI (in development, so
their names stand here and are not taken from a library), beside them our own, `xenios.*`.

Most of a span is what was in spans before it: who asks for which model and how that goes. Such parts are made, and
encoded, once for each combination, and kept; only ids, counts and times are the request's own.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gateway import Cause, Outcome, Source
from gateway.kit import clean
from gateway_plugins.tracing.context import new_span_id
from gateway_plugins.tracing.otlp import CLIENT, CONSUMER, INTERNAL, SERVER, Event, Shared, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway import AttemptRecord, Exchange, Target
    from gateway_plugins.tracing.context import Trace
    from gateway_plugins.tracing.otlp import Attributes

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})
_UNMATCHED = "unmatched"
# Nobody's fault: whoever called left, or a rule said no.
_NO_FAILURE = frozenset({Outcome.OK, Outcome.ACCEPTED, Outcome.REFUSED, Outcome.CLIENT_DISCONNECT})
_GIVEN_UP = frozenset({None, Cause.CLIENT_DISCONNECT, Cause.ABANDONED})
_PARAMETERS = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")
_TOKENS = (
    ("input_tokens", "gen_ai.usage.input_tokens"),
    ("output_tokens", "gen_ai.usage.output_tokens"),
    ("cache_read_tokens", "gen_ai.usage.cache_read.input_tokens"),
    ("cache_write_tokens", "gen_ai.usage.cache_creation.input_tokens"),
    ("reasoning_tokens", "gen_ai.usage.reasoning.output_tokens"),
)
_MOST_HOOKS = 256
_KEPT = 1024  # combinations, of about 1 kB each

_kept = functools.lru_cache(maxsize=_KEPT, typed=True)  # typed: a temperature of 1 is none of 1.0


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
        name, shared = _answered(exchange, failed=failed)
        attributes: Attributes = {"xenios.id": exchange.id, "xenios.request_id": exchange.id}
        if exchange.request_id != exchange.id:
            attributes["xenios.request_id"] = clean(exchange.request_id)
        if exchange.route.proxied:
            shared += (_called(exchange),)
            if exchange.cost.usd is not None:
                attributes["xenios.cost_usd"] = exchange.cost.usd
            tries = _tries(exchange)
            if tries:
                attributes["xenios.tries"] = tries
        events: list[Event] = []
        if exchange.skipped:  # when, is not recorded: the first is passed over before the first attempt
            at = self._at(exchange.attempts[0].started if exchange.attempts else self._end)
            events = [Event("xenios.circuit_open", at, _target(target)) for target in exchange.skipped]
        return Span(
            name,
            CONSUMER if exchange.phase == "run" else SERVER,
            trace.trace_id,
            trace.span_id,
            trace.parent_id,
            self._began,
            self._at(self._end),
            attributes,
            shared,
            failed,
            events,
            trace.state,
            trace.remote,
        )

    def _of_attempt(self, index: int, record: AttemptRecord, content: Attributes) -> Span:
        told = self._trace.attempts
        name, shared = _tried(self._exchange, record)
        attributes = _counted(record, stream=self._exchange.stream)
        ended = self._end if record.finished is None else record.finished
        span = self._inner(name, CLIENT, attributes | content, record.started, ended)
        span.shared = shared
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


def _answered(exchange: Exchange, *, failed: bool) -> tuple[str, tuple[Shared, ...]]:
    """The server span's name; what was asked over HTTP and how it ended, and who asked."""
    request, error, principal = exchange.request, exchange.error, exchange.principal
    name, http = _http(
        request.method if request.method in _METHODS else "_OTHER",
        exchange.route.path,
        "https" if request.header("x-forwarded-proto") == "https" else "http",
        request.http_version,
        exchange.outcome or Outcome.ERROR,
        exchange.status,
        None if error is None else clean(error.error_code),
        exchange.error_by,
        failed,
        exchange.phase,
    )
    if principal is None:
        return name, (http,)
    return name, (http, _who(clean(principal.id), clean(principal.tenant), principal.team and clean(principal.team)))


@_kept
def _http(  # noqa: PLR0917 - the cache is asked by position
    method: str,
    path: str,
    scheme: str,
    version: tuple[int, ...],
    outcome: str,
    status: int | None,
    error_code: str | None,
    error_by: str | None,
    failed: bool,
    phase: str,
) -> tuple[str, Shared]:
    attributes: Attributes = {
        "http.request.method": method,
        "url.scheme": scheme,
        "network.protocol.version": ".".join(map(str, version)),
        "xenios.outcome": str(outcome),
        "http.response.status_code": status,
        "xenios.error_code": error_code,
        "xenios.error_by": error_by,
        "error.type": (error_code or str(status or outcome)) if failed else None,
        "http.route": None if path == _UNMATCHED else path,
        "xenios.phase": None if phase == "live" else phase,
    }
    verb = "HTTP" if method == "_OTHER" else method
    return verb if path == _UNMATCHED else f"{verb} {path}", _shared(attributes)


@_kept
def _who(principal: str, tenant: str, team: str | None) -> Shared:
    return _shared({"xenios.principal": principal, "xenios.tenant": tenant, "xenios.team": team or None})


def _called(exchange: Exchange) -> Shared:
    """What became of the model call: what was asked for, who answered, after how many attempts, by which rule."""
    asked, served, decision = exchange.asked_model, exchange.served, exchange.decision
    return _call(
        exchange.endpoint,
        exchange.stream,
        len(exchange.attempts),
        clean(asked) if asked else None,
        None if served is None else clean(served.model),
        None if served is None else served.upstream,
        None if exchange.cost.usd is None else exchange.cost.source,
        None if decision is None or decision.rule is None else clean(decision.rule),
        None if decision is None or decision.task is None else clean(decision.task),
    )


@_kept
def _call(  # noqa: PLR0917 - the cache is asked by position
    endpoint: str,
    stream: bool,
    attempts: int,
    asked: str | None,
    served: str | None,
    upstream: str | None,
    cost_source: str | None,
    rule: str | None,
    task: str | None,
) -> Shared:
    return _shared(
        {
            "xenios.endpoint": endpoint,
            "xenios.stream": stream,
            "xenios.attempts": attempts,
            "xenios.model_asked": asked,
            "xenios.model_served": served,
            "xenios.upstream": upstream,
            "xenios.cost_source": cost_source and str(cost_source),
            "xenios.rule": rule,
            "xenios.task": task,
        }
    )


def _tries(exchange: Exchange) -> list[str]:
    """Each target and what became of it, where not the first one answered."""
    tries = exchange.attempts
    if not exchange.skipped and (not tries or (len(tries) == 1 and tries[0].cause is None)):
        return []
    return [
        *(f"{clean(target.name)} {Cause.CIRCUIT_OPEN}" for target in exchange.skipped),
        *(f"{clean(record.target.name)} {record.cause or 'ok'}" for record in tries),
    ]


def _target(target: Target) -> Attributes:
    return {"gen_ai.request.model": clean(target.model), "xenios.upstream": target.upstream}


def _answering(exchange: Exchange) -> AttemptRecord | None:
    for record in reversed(exchange.attempts):
        if record.first_content is not None:
            return record
    return exchange.attempts[-1] if exchange.attempts else None


def _tried(exchange: Exchange, record: AttemptRecord) -> tuple[str, tuple[Shared, ...]]:
    """The client span's name; what an upstream was asked, and what it answered."""
    dialect, target = exchange.dialect, record.target
    client = exchange.snapshot.upstreams[target.upstream]
    body = target.applied_to(exchange.body)
    choices = _number(body.get("n"))
    name, asked = _asked(
        dialect.operation,
        client.kind,
        clean(target.model),
        client.settings.base_url,
        target.upstream,
        client.simulated,
        exchange.stream,
        record.number,
        _number(dialect.output_cap(body)),
        None if choices == 1 else choices,
        *[_number(body[parameter]) if parameter in body else None for parameter in _PARAMETERS],
    )
    served = None if record.first_content is None else clean(record.served.model)
    cost_source = None if record.cost.usd is None else record.cost.source
    return name, (asked, _answer(record.status, record.cause, served, record.usage.source, cost_source))


@_kept
def _asked(  # noqa: PLR0917 - the cache is asked by position
    operation: str,
    kind: str,
    model: str,
    base_url: str,
    upstream: str,
    simulated: bool,
    stream: bool,
    attempt: int,
    max_tokens: float | None,
    choices: float | None,
    *parameters: float | None,
) -> tuple[str, Shared]:
    url = urlsplit(base_url)
    attributes: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": kind,
        "gen_ai.request.model": model,
        "server.address": url.hostname or "",
        "server.port": url.port or (80 if url.scheme == "http" else 443),
        "xenios.upstream": upstream,
        "xenios.attempt": attempt,
        "xenios.simulated": simulated or None,
        "gen_ai.request.stream": stream or None,
        "gen_ai.request.max_tokens": max_tokens,
        "gen_ai.request.choice.count": choices,
    }
    for parameter, value in zip(_PARAMETERS, parameters, strict=True):
        attributes[f"gen_ai.request.{parameter}"] = value
    return f"{operation} {model}", _shared(attributes)


@_kept
def _answer(
    status: int | None, cause: str | None, model: str | None, usage_source: str, cost_source: str | None
) -> Shared:
    return _shared(
        {
            "http.response.status_code": status,
            "error.type": cause and str(cause),
            "gen_ai.response.model": model,
            "xenios.usage_source": None if usage_source is Source.UNKNOWN else str(usage_source),
            "xenios.cost_source": cost_source and str(cost_source),
        }
    )


def _counted(record: AttemptRecord, *, stream: bool) -> Attributes:
    """What is an attempt's own: the upstream's id of it, its counts, its cost."""
    usage = record.usage
    attributes: Attributes = {}
    if record.generation_id is not None:
        attributes["gen_ai.response.id"] = clean(record.generation_id)
    if stream and record.first_content is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = record.first_content - record.started
    if usage.source is not Source.UNKNOWN:
        for field, attribute in _TOKENS:
            count = getattr(usage, field)
            if count is not None:
                attributes[attribute] = count
    if record.cost.usd is not None:
        attributes["xenios.cost_usd"] = record.cost.usd
    return attributes


def _shared(attributes: Attributes) -> Shared:
    return Shared({name: value for name, value in attributes.items() if value is not None})


def _number(value: object) -> float | None:
    """One that a span can hold: clients may send anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    sound = -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)
    return value if sound else None
