"""From a finished exchange to numbers. One look-up finds all series of a kind of request."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from gateway import Cause, Outcome, Source, UpstreamError

if TYPE_CHECKING:
    from gateway import AttemptRecord, Cell, Exchange, Metrics, Spread

MOST_KINDS = 5000  # of requests whose series are kept at hand: clients can invent names
TOKENS = tuple(4.0**n for n in range(14))  # GenAI's buckets
_Kind = tuple[str, bool, Outcome, int | None, str, str, str | None, str | None]


class _Series:
    """Those of one kind of request."""

    __slots__ = ("answer", "duration", "overhead", "requests")

    def __init__(self, of: Recorder, kind: _Kind, model: str) -> None:
        endpoint, stream, outcome, status, upstream, _, task, rule = kind
        said, streamed = "none" if status is None else str(status), "true" if stream else "false"
        self.requests = of.requests.of(endpoint, model, task or "", rule or "", outcome, said, streamed)
        self.duration = of.durations.of(endpoint, model, upstream, outcome, streamed)
        self.overhead = of.overhead.of(endpoint)
        self.answer: _Answer | None = None


class _Answer:
    """Those of a kind of request that was answered."""

    __slots__ = ("cached", "first", "input", "input_size", "output", "output_size", "pace", "reasoning", "written")

    def __init__(self, of: Recorder, endpoint: str, model: str, upstream: str, *, stream: bool) -> None:
        self.first = of.first.of(endpoint, model, upstream) if stream else None
        self.pace = of.pace.of(endpoint, model, upstream) if stream else None
        self.input, self.output = of.tokens.of(model, "input"), of.tokens.of(model, "output")
        self.cached, self.written = of.tokens.of(model, "cache_read"), of.tokens.of(model, "cache_write")
        self.reasoning = of.tokens.of(model, "reasoning")
        self.input_size = of.sizes.of(endpoint, model, upstream, "input")
        self.output_size = of.sizes.of(endpoint, model, upstream, "output")


class Recorder:
    """Adds each exchange to the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._kinds: dict[_Kind, _Series] = {}
        self._tries: dict[tuple[str, str, str, Cause | None], tuple[Cell, Spread]] = {}
        self._costs: dict[tuple[str, str, Source], Cell] = {}
        counter, histogram = metrics.counter, metrics.histogram
        self.requests = counter(
            "xenios_requests_total",
            "Requests that have ended.",
            ("endpoint", "model", "task", "rule", "outcome", "status", "stream"),
        )
        self.durations = histogram(
            "xenios_request_duration_seconds",
            "From a request's arrival to the last byte of its answer.",
            ("endpoint", "model", "upstream", "outcome", "stream"),
        )
        self.first = histogram(
            "xenios_time_to_first_token_seconds",
            "Of streams: from the request's arrival to the first content.",
            ("endpoint", "model", "upstream"),
        )
        self.pace = histogram(
            "xenios_time_per_output_token_seconds",
            "Of streams: the time after the first content, by output tokens after the first.",
            ("endpoint", "model", "upstream"),
            (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 10.0),
        )
        self.overhead = histogram(
            "xenios_gateway_overhead_seconds",
            "A request's duration without that of its attempts at upstreams.",
            ("endpoint",),
            (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0),
        )
        self._errors = counter(
            "xenios_errors_total",
            "Requests that ended in an error, by its code, or of an upstream's its cause; `by`: which plugin and hook, "
            "the upstream or the gateway.",
            ("endpoint", "code", "by"),
        )
        self._refusals = counter(
            "xenios_refusals_total", "Requests that a plugin refused: limits, budgets, keys, rules.", ("plugin", "code")
        )
        self.tokens = counter("xenios_tokens_total", "Tokens.", ("model", "kind"))
        self.sizes = histogram(
            "xenios_request_tokens", "Tokens of a request.", ("endpoint", "model", "upstream", "kind"), TOKENS
        )
        self._cost = counter(
            "xenios_cost_usd_total",
            "What requests cost in US dollars, and where from that is known.",
            ("model", "source"),
        )
        self._unknown = counter(
            "xenios_usage_unknown_total", "Answers whose tokens the upstream did not tell, or told wrongly.", ("model",)
        )
        self._attempts = counter(
            "xenios_attempts_total",
            "Attempts at upstreams, by the cause why they failed, else `ok`.",
            ("endpoint", "upstream", "model", "cause"),
        )
        self._attempt_durations = histogram(
            "xenios_attempt_duration_seconds",
            "From the start of an attempt to the upstream's last byte, or its failure.",
            ("endpoint", "upstream", "model", "cause"),
        )
        self._fallbacks = counter(
            "xenios_fallbacks_total", "Another target was tried since this one failed.", ("model", "to", "cause")
        )
        self._retries = counter("xenios_retries_total", "The same target was tried once more.", ("model", "cause"))
        self._skips = counter(
            "xenios_circuit_skips_total", "Targets that were passed over since their circuit is open.", ("model",)
        )

    def record(self, exchange: Exchange) -> None:
        tries, decision, started = exchange.attempts, exchange.decision, exchange.started
        finished = exchange.finished or started
        upstream = 0.0
        for one in tries:
            upstream += (one.finished or finished) - one.started
            self._attempt(exchange.route.endpoint, one)
        # A dry run by its header: no model was asked.
        endpoint = "/admin/explain" if exchange.explained else exchange.route.endpoint
        target = exchange.served
        if target is None and not exchange.explained and (tries or (decision is not None and decision.targets)):
            target = tries[-1].target if tries else decision.targets[0] if decision else None
        at, model = (target.upstream, target.model) if target is not None else ("", "")
        task, rule = (decision.task, decision.rule) if decision is not None else (None, None)
        outcome = exchange.outcome or Outcome.ERROR
        kind = (endpoint, exchange.stream, outcome, exchange.status, at, model, task, rule)
        series = self._kinds.get(kind) or self._of(kind)
        series.requests.value += 1
        duration = finished - started
        series.duration.observe(duration)
        series.overhead.observe(max(0.0, duration - upstream))
        if exchange.first_content is not None:
            answer = series.answer
            if answer is None:
                label = self.metrics.model(at, model)
                answer = series.answer = _Answer(self, exchange.endpoint, label, at, stream=exchange.stream)
            self._answered(exchange, answer, exchange.first_content, finished)
            self._spent(exchange, at, model)
        if len(tries) > 1:
            self._moves(tries)
        if exchange.skipped:
            for skipped in exchange.skipped:
                self._skips.add(1, self.metrics.model(skipped.upstream, skipped.model))
        if exchange.error is not None:
            self._failed(exchange, endpoint, outcome)

    def _of(self, kind: _Kind) -> _Series:
        if len(self._kinds) >= MOST_KINDS:
            self._kinds.clear()
        upstream, model = kind[4], kind[5]
        found = self._kinds[kind] = _Series(self, kind, self.metrics.model(upstream, model) if model else "")
        return found

    def _answered(self, exchange: Exchange, answer: _Answer, first: float, finished: float) -> None:
        usage = exchange.usage
        sent, made = usage.input_tokens, usage.output_tokens
        if answer.first is not None and answer.pace is not None:
            answer.first.observe(first - exchange.started)
            if made is not None and made > 1:
                answer.pace.observe((finished - first) / (made - 1))
        if sent is not None:
            answer.input.value += sent
            answer.input_size.observe(sent)
        if made is not None:
            answer.output.value += made
            answer.output_size.observe(made)
        if usage.cache_read_tokens:
            answer.cached.value += usage.cache_read_tokens
        if usage.cache_write_tokens:
            answer.written.value += usage.cache_write_tokens
        if usage.reasoning_tokens:
            answer.reasoning.value += usage.reasoning_tokens

    def _spent(self, exchange: Exchange, upstream: str, model: str) -> None:
        cost = exchange.cost
        if cost.pico_usd is not None:
            key = (upstream, model, cost.source)
            cell = self._costs.get(key)
            if cell is None:
                if len(self._costs) >= MOST_KINDS:
                    self._costs.clear()
                cell = self._costs[key] = self._cost.of(self.metrics.model(upstream, model), cost.source)
            cell.value += cost.pico_usd / 1e12
        if exchange.usage.source is Source.UNKNOWN:
            self._unknown.add(1, self.metrics.model(upstream, model))

    def _attempt(self, endpoint: str, one: AttemptRecord) -> None:
        target = one.attempt.target
        key = (endpoint, target.upstream, target.model, one.cause)
        found = self._tries.get(key)
        if found is None:
            if len(self._tries) >= MOST_KINDS:
                self._tries.clear()
            labels = (endpoint, target.upstream, self.metrics.model(target.upstream, target.model), one.cause or "ok")
            found = self._tries[key] = self._attempts.of(*labels), self._attempt_durations.of(*labels)
        found[0].value += 1
        if one.finished is not None:
            found[1].observe(one.finished - one.started)

    def _moves(self, tries: list[AttemptRecord]) -> None:
        for before, after in pairwise(tries):
            name = self.metrics.model(before.target.upstream, before.target.model)
            cause = before.cause or Cause.ABANDONED
            if before.target.name == after.target.name:
                self._retries.add(1, name, cause)
            else:
                self._fallbacks.add(1, name, self.metrics.model(after.target.upstream, after.target.model), cause)

    def _failed(self, exchange: Exchange, endpoint: str, outcome: Outcome) -> None:
        error = exchange.error
        if error is None:
            return
        # What an upstream calls its errors is its own choice, causes are a fixed list.
        of_upstream = isinstance(error, UpstreamError)
        code = error.cause if isinstance(error, UpstreamError) else error.error_code
        by = exchange.error_by or ("upstream" if of_upstream else "gateway")
        self._errors.add(1, endpoint, code, by)
        if outcome is Outcome.REFUSED:
            self._refusals.add(1, by.partition(".")[0], code)
