"""Rate limits: requests, tokens and concurrent requests, per key, team, user, model … or together.

Each limit has a bucket that holds `burst` units (default: as many as the limit) and refills steadily by the limit in
`per`. Tokens are taken by estimate when a request comes (its input, and the output that it may ask for) and put right
when it is over: what it used beyond is a debt that later requests wait for. A request that has no room in one limit is
refused with 429, and counts for none.

A job counts for `requests` when it is taken, for `tokens` and `concurrent` while it runs: it is one request, whenever
and however often it is tried, and takes no place while it waits.

Counts live where `services.redis` says: in the process, or in a Redis that all workers and gateways share.
"""

from __future__ import annotations

import functools
import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from multidict import istr
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway import Duration, RateLimited, compile_when, format_duration, hookimpl
from gateway.kit import (
    OF_CALLERS,
    NamedLimit,
    OwnLimits,
    PerCaller,
    Rule,
    State,
    check_limits,
    choices,
    input_estimate,
    output_cap,
    own_limits,
    subjects,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway import Cell, Exchange, GatewayError, Services

_SUBJECTS = 4096  # whose rules are kept ready
_OWN = "own limits"  # no name that the YAML can give
_UNITS = ("requests", "tokens", "concurrent")
_LATE = {"accept": frozenset({"requests"}), "run": frozenset({"tokens", "concurrent"})}  # what counts; live: all


class Limit(NamedLimit):
    """One limit. Of `requests`, `tokens` and `concurrent` those given hold, each by itself."""

    requests: int | None = Field(None, ge=1, le=10**9, description="Requests per `per`. Default no limit.")
    tokens: int | None = Field(
        None, ge=1, le=10**12, description="Input and output tokens per `per`. Default no limit."
    )
    concurrent: int | None = Field(None, ge=1, le=10**6, description="Requests at the same time. Default no limit.")
    per: Duration = Field(60.0, gt=0, le=31 * 86400, description="The time that the limits are for. Default 1m.")
    burst_requests: int | None = Field(
        None, ge=1, description="Requests that may come at once after a pause. Default: as many as `requests`."
    )
    burst_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens that may be taken at once; a larger request is always refused. Default: `tokens`.",
    )

    @model_validator(mode="after")
    def _limits_something(self) -> Limit:
        if self.requests is None and self.tokens is None and self.concurrent is None:
            raise ValueError("limits nothing: give requests, tokens or concurrent")
        if self.burst_requests is not None and self.requests is None:
            raise ValueError("burst_requests stands without requests")
        if self.burst_tokens is not None and self.tokens is None:
            raise ValueError("burst_tokens stands without tokens")
        phases = self.when.phase if self.when is not None else None
        if phases is not None and "live" not in phases:
            counted = frozenset().union(*(_LATE[phase] for phase in phases))
            if useless := [unit for unit in _UNITS if getattr(self, unit) is not None and unit not in counted]:
                raise ValueError(
                    f"{useless[0]} don't count in phase {' or '.join(phases)}: a job counts for requests when it is "
                    "taken (accept), for tokens and concurrent while it runs (run)"
                )
        return self


class Config(BaseModel):
    """The limits; a request must have room in all that it falls under."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limits: tuple[Limit, ...] = Field((), description="The limits, each with its own buckets. Default none.")
    own_limits: bool = Field(
        True, description="Hold the limits that a key or a token brings along (`limits` of api_keys) too. Default true."
    )
    output_estimate: int = Field(
        1000, ge=0, description="Output tokens assumed for a request that sets no maximum of its own. Default 1000."
    )
    on_store_error: Literal["allow", "deny"] = Field(
        "allow", description="While Redis is away: allow requests unlimited, or deny them with 503. Default allow."
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        check_limits(self.limits, "limits", own_limits=self.own_limits)
        return self


class _About(NamedTuple):
    """What the headers and errors of a rule say."""

    owner: Plugin
    name: str
    unit: str
    refusals: Cell


class _Plan(NamedTuple):
    """One caller's rules: those of the limits that hold for each of its requests, and the limits that may."""

    fixed: tuple[Rule, ...]
    counted: tuple[Rule, ...]  # of each request a copy, with the tokens that it takes
    others: tuple[_Compiled, ...]


class _Compiled:
    """A limit, and its rules per subject, which are made once."""

    def __init__(self, limit: Limit, owner: Plugin, prefix: str) -> None:
        self.limit = limit
        self.applies = compile_when(limit.when)
        self.of_caller = limit.when is None and OF_CALLERS.issuperset(limit.by)
        self._owner = owner
        self._prefix = f"{prefix}:{limit.name}:"
        self._known: dict[str, tuple[tuple[Rule, ...], Rule | None]] = {}
        label = "own" if limit.name == _OWN else limit.name
        self._refusals = {unit: owner.refusals.of(label, unit) for unit in _UNITS if getattr(limit, unit) is not None}

    def rules(self, exchange: Exchange) -> Iterator[tuple[tuple[Rule, ...], Rule | None]]:
        """For each subject: (rules that are the same for every request, the one whose amount is the request's own)."""
        for subject in subjects(self.limit.by, exchange):
            known = self._known.get(subject)
            if known is None:
                if len(self._known) >= _SUBJECTS:
                    self._known.clear()
                known = self._known[subject] = self._template(f"{self._prefix}{subject}")
            yield known

    def _template(self, key: str) -> tuple[tuple[Rule, ...], Rule | None]:
        limit = self.limit
        counted = None
        if limit.tokens is not None:
            counted = self._rule(f"{key}:tokens", "tokens", limit.tokens, limit.burst_tokens)
        return tuple(self._made(key)), counted

    def _made(self, key: str) -> Iterator[Rule]:
        limit = self.limit
        if limit.requests is not None:
            yield self._rule(f"{key}:requests", "requests", limit.requests, limit.burst_requests)
        if limit.concurrent is not None:
            yield self._rule(f"{key}:concurrent", "concurrent", limit.concurrent)

    def _rule(self, key: str, unit: str, count: int, burst: int | None = None) -> Rule:
        return Rule(
            key=key,
            kind="slots" if unit == "concurrent" else "rate",
            limit=count,
            refuse=_refuse,
            per=self.limit.per,
            burst=burst or 0,
            actual=_used if unit == "tokens" else None,
            on_store_error=self._owner.on_store_error,
            refused=_refused,
            about=_About(self._owner, self.limit.name, unit, self._refusals[unit]),
            name=f"{self.limit.name}: {_in_words(unit, count, self.limit.per)}",
        )


class Plugin:
    """Refuses callers that have used up their requests, tokens or concurrent requests."""

    Config: TypeAlias = Config
    reads_settings = ()

    def __init__(self, config: Config, services: Services) -> None:
        self._config = config
        self._services = services
        self.on_store_error: Literal["allow", "deny"] = config.on_store_error
        self.refusals = services.metrics.counter(
            "xenios_limit_refusals_total",
            "Requests that a rate limit refused, by its name (`own`: the key's or token's own) and what it limits: "
            "requests, tokens, concurrent. Of several limits the one that the client was told of.",
            ("limit", "kind"),
        )
        self._limits = [self._compiled(limit) for limit in config.limits]
        self._own = functools.lru_cache(maxsize=4096)(self._compiled_own)
        self._plans = PerCaller(self._plan)

    def _compiled(self, limit: Limit) -> _Compiled:
        return _Compiled(limit, self, self._services.plugin_id)

    def _compiled_own(self, own: OwnLimits) -> _Compiled | None:
        """The caller's own limits as one of ours."""
        if own.requests is None and own.tokens is None and own.concurrent is None:
            return None
        return self._compiled(
            Limit.model_construct(
                name=_OWN,
                by=("key",),
                per=own.per,
                requests=own.requests,
                tokens=own.tokens,
                concurrent=own.concurrent,
            )
        )

    async def ping(self) -> None:
        await self._services.ledger.ping()

    @hookimpl
    async def check_request(self, exchange: Exchange) -> None:
        fixed, counted, others = self._plans.of(exchange)
        for limit in others:
            if limit.applies is None or limit.applies(exchange):
                for more, of_tokens in limit.rules(exchange):
                    fixed += more
                    counted += (of_tokens,) if of_tokens else ()
        if exchange.phase != "live":
            units = _LATE[exchange.phase]
            fixed = tuple(rule for rule in fixed if rule.about.unit in units)
            counted = counted if "tokens" in units else ()
        if fixed:
            exchange.hold(*fixed)
        if counted:
            tokens = self._estimate(exchange)
            for template in counted:
                rule = template.copy()
                rule.amount = tokens
                exchange.hold(rule)

    def _plan(self, exchange: Exchange) -> _Plan:
        limits = list(self._limits)
        if self._config.own_limits and (own := own_limits(exchange)) is not None and (limit := self._own(own)):
            limits.insert(0, limit)
        known = [rules for limit in limits if limit.of_caller for rules in limit.rules(exchange)]
        return _Plan(
            tuple(rule for fixed, _ in known for rule in fixed),
            tuple(counted for _, counted in known if counted is not None),
            tuple(limit for limit in limits if not limit.of_caller),
        )

    @hookimpl
    async def explain(self, exchange: Exchange) -> None:
        if exchange.decision is not None:
            await self.check_request(exchange)  # it holds limits and does nothing else

    @hookimpl
    def response_started(self, exchange: Exchange) -> None:
        admission = exchange.admission
        if admission is None or not admission.states:
            return
        tightest: dict[str, tuple[Rule, State]] = {}
        for i, rule in enumerate(admission.rules):
            if rule.kind == "rate" and isinstance(about := rule.about, _About) and about.owner is self:
                state: State = admission.states[i]
                known = tightest.get(about.unit)
                if known is None or state.remaining < known[1].remaining:
                    tightest[about.unit] = (rule, state)
        for rule, state in tightest.values():
            for name, value in _headers(rule, state, anthropic=exchange.dialect.anthropic):
                exchange.reply_headers[name] = value

    def _estimate(self, exchange: Exchange) -> int:
        """Input by its length, output by what the request allows itself."""
        output = 0
        if exchange.dialect.grammar is not None:
            cap = output_cap(exchange.body, exchange.dialect.output_caps)
            output = (self._config.output_estimate if cap is None else cap) * choices(exchange.body)
        return input_estimate(exchange) + output


def _in_words(unit: str, count: int, per: float) -> str:
    return f"{count:,} at the same time" if unit == "concurrent" else f"{count:,} {unit} per {format_duration(per)}"


def _used(exchange: Exchange) -> int | None:
    """Tokens that the request took; nothing if no upstream answered; None if nobody can tell."""
    usage = exchange.usage
    if usage.input_tokens is not None or usage.output_tokens is not None:
        return (usage.input_tokens or 0) + (usage.output_tokens or 0)
    return None if any(attempt.first_content is not None for attempt in exchange.attempts) else 0


def _refused(rule: Rule, _: State, told: bool) -> None:
    if told:
        rule.about.refusals.value += 1


def _refuse(rule: Rule, state: State) -> GatewayError:
    about: _About = rule.about
    if rule.kind == "slots":
        return RateLimited(
            f"Too many requests at the same time: {rule.limit} are allowed ({about.name}). Wait for one to end.",
            type="requests",
            retry_after=state.retry_after,
        )
    limit = _in_words(about.unit, rule.limit, rule.per)
    if state.retry_after is None:
        return RateLimited(
            f"The request is too large for its rate limit ({about.name}): it may take up to {rule.amount:,} tokens, "
            f"and {rule.size:,} may be taken at once ({limit}). Shorten it, or ask for less output.",
            type=about.unit,
            should_retry=False,
            headers=dict(_headers(rule, state)),
        )
    return RateLimited(
        f"Rate limit reached ({about.name}): {limit}. Try again in {go_duration(state.retry_after)}.",
        type=about.unit,
        retry_after=state.retry_after,
        headers=dict(_headers(rule, state)),
    )


def _headers(rule: Rule, state: State, *, anthropic: bool = False) -> tuple[tuple[str, str], ...]:
    unit = rule.about.unit
    if anthropic:
        reset = datetime.now(UTC) + timedelta(seconds=state.reset)
        return (
            (f"anthropic-ratelimit-{unit}-limit", str(rule.limit)),
            (f"anthropic-ratelimit-{unit}-remaining", str(state.remaining)),
            (f"anthropic-ratelimit-{unit}-reset", reset.strftime("%Y-%m-%dT%H:%M:%SZ")),
        )
    limit, remaining, reset_in = _HEADERS[unit]
    return (limit, str(rule.limit)), (remaining, str(state.remaining)), (reset_in, go_duration(state.reset))


_HEADERS = {
    unit: tuple(istr(f"x-ratelimit-{what}-{unit}") for what in ("limit", "remaining", "reset"))
    for unit in ("requests", "tokens")
}


def go_duration(seconds: float) -> str:
    """As OpenAI writes it: `12ms`, `1.5s`, `6m0s`, `1h0m0s`. Rounded up: what is waited for is there then."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 1000) / 1000:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
