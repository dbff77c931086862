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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from multidict import istr
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway import Duration, RateLimited, compile_when, format_duration, hookimpl
from gateway.kit import (
    OF_CALLERS,
    NamedLimit,
    OwnLimits,
    PerCaller,
    Rule,
    RuleSet,
    State,
    check_limits,
    choices,
    input_estimate,
    output_cap,
    own_limits,
    subjects,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    lease: bool = Field(
        True,
        description="On Redis: each worker holds some of a limit ahead for two seconds, so that most requests need not "
        "ask; nothing of its last tenth. No limit is passed for it. Default true.",
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

    rules: tuple[Rule, ...]
    others: tuple[_Compiled, ...]
    all: RuleSet | None  # of a live request, if no other may hold for it


class _Rate(NamedTuple):
    """A rate, as the headers need it. µs, as the levels."""

    place: int
    room: float
    unit: float
    takes: float | None  # None: the request's tokens
    rule: Rule


class _Shown(NamedTuple):
    """What the headers tell of a set of rules: by unit its rates."""

    owner: Plugin
    units: tuple[tuple[_Rate, ...], ...]


class _Compiled:
    """A limit, and its rules per subject, which are made once."""

    def __init__(self, limit: Limit, owner: Plugin, prefix: str) -> None:
        self.limit = limit
        self.applies = compile_when(limit.when)
        self.of_caller = limit.when is None and OF_CALLERS.issuperset(limit.by)
        self._owner = owner
        self._prefix = f"{prefix}:{limit.name}:"
        self._known: dict[str, tuple[Rule, ...]] = {}
        label = "own" if limit.name == _OWN else limit.name
        self._refusals = {unit: owner.refusals.of(label, unit) for unit in _UNITS if getattr(limit, unit) is not None}

    def rules(self, exchange: Exchange) -> Iterator[Rule]:
        """For each subject."""
        for subject in subjects(self.limit.by, exchange):
            known = self._known.get(subject)
            if known is None:
                if len(self._known) >= _SUBJECTS:
                    self._known.clear()
                known = self._known[subject] = tuple(self._made(f"{self._prefix}{subject}"))
            yield from known

    def _made(self, key: str) -> Iterator[Rule]:
        limit = self.limit
        if limit.requests is not None:
            yield self._rule(f"{key}:requests", "requests", limit.requests, limit.burst_requests)
        if limit.concurrent is not None:
            yield self._rule(f"{key}:concurrent", "concurrent", limit.concurrent)
        if limit.tokens is not None:
            yield self._rule(f"{key}:tokens", "tokens", limit.tokens, limit.burst_tokens)

    def _rule(self, key: str, unit: str, count: int, burst: int | None = None) -> Rule:
        return Rule(
            key=key,
            kind="slots" if unit == "concurrent" else "rate",
            limit=count,
            refuse=_refuse,
            per=self.limit.per,
            burst=burst or 0,
            lease=self._owner.lease,
            varies=unit == "tokens",
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
        self.lease = config.lease
        self.refusals = services.metrics.counter(
            "xenios_limit_refusals_total",
            "Requests that a rate limit refused, by its name (`own`: the key's or token's own) and what it limits: "
            "requests, tokens, concurrent. Of several limits the one that the client was told of.",
            ("limit", "kind"),
        )
        self._limits = [self._compiled(limit) for limit in config.limits]
        self._own = functools.lru_cache(maxsize=4096)(self._compiled_own)
        self._plans = PerCaller(self._plan)
        self._set = functools.lru_cache(maxsize=_SUBJECTS)(self._set_of)

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
        plan = self._plans.of(exchange)
        held = plan.all if plan.all is not None and exchange.phase == "live" else self._matched(exchange, plan)
        if held.rules:
            exchange.hold_set(held, self._estimate(exchange) if held.varies else 0)

    def _matched(self, exchange: Exchange, plan: _Plan) -> RuleSet:
        rules = list(plan.rules)
        for limit in plan.others:
            if limit.applies is None or limit.applies(exchange):
                rules += limit.rules(exchange)
        if exchange.phase != "live":
            rules = [rule for rule in rules if rule.about.unit in _LATE[exchange.phase]]
        return self._set(tuple(rules))

    def _set_of(self, rules: tuple[Rule, ...]) -> RuleSet:
        """One for all requests that fall under these rules."""
        in_order = tuple(sorted(rules, key=lambda rule: rule.varies))  # tokens last, as clients are told of them
        return RuleSet(in_order, self._shown(in_order))

    def _shown(self, rules: tuple[Rule, ...]) -> _Shown:
        units: dict[str, list[_Rate]] = {}
        for place, rule in enumerate(rules):
            if rule.kind == "rate":
                takes = None if rule.varies else rule.amount * rule.unit
                units.setdefault(rule.about.unit, []).append(_Rate(place, rule.room, rule.unit, takes, rule))
        return _Shown(self, tuple(map(tuple, units.values())))

    def _plan(self, exchange: Exchange) -> _Plan:
        limits = list(self._limits)
        if self._config.own_limits and (own := own_limits(exchange)) is not None and (limit := self._own(own)):
            limits.insert(0, limit)
        rules = tuple(rule for limit in limits if limit.of_caller for rule in limit.rules(exchange))
        others = tuple(limit for limit in limits if not limit.of_caller)
        return _Plan(rules, others, None if others else self._set(rules))

    @hookimpl
    async def explain(self, exchange: Exchange) -> None:
        if exchange.decision is not None:
            await self.check_request(exchange)  # it holds limits and does nothing else

    @hookimpl
    def response_started(self, exchange: Exchange) -> None:
        admission = exchange.admission
        if admission is None or admission.levels is None:
            return
        first = 0  # place of a set's first rule
        for held in admission.held:
            shown = held.set.about
            if type(shown) is _Shown and shown.owner is self:
                _show(exchange, shown, admission.levels, first, held.amount)
            first += len(held.set.rules)

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
            headers=dict(_headers(rule, state.remaining, state.reset)),
        )
    return RateLimited(
        f"Rate limit reached ({about.name}): {limit}. Try again in {go_duration(state.retry_after)}.",
        type=about.unit,
        retry_after=state.retry_after,
        headers=dict(_headers(rule, state.remaining, state.reset)),
    )


def _show(exchange: Exchange, shown: _Shown, levels: Sequence[Any], first: int, tokens: int) -> None:
    """Of each unit the rule that has the least left."""
    headers = exchange.reply_headers
    for rates in shown.units:
        least = None
        for place, room, one, takes, of in rates:
            level = levels[first + place] + (tokens * one if takes is None else takes)
            left = int((room - level) / one)
            if least is None or left < least:
                least, rule, ahead = left, of, level
        headers.update(_headers(rule, least or 0, ahead / 1e6, anthropic=exchange.dialect.anthropic))


def _headers(rule: Rule, left: int, reset: float, *, anthropic: bool = False) -> tuple[tuple[str, str], ...]:
    unit = rule.about.unit
    if anthropic:
        at = datetime.now(UTC) + timedelta(seconds=reset)
        return (
            (f"anthropic-ratelimit-{unit}-limit", str(rule.limit)),
            (f"anthropic-ratelimit-{unit}-remaining", str(left)),
            (f"anthropic-ratelimit-{unit}-reset", at.strftime("%Y-%m-%dT%H:%M:%SZ")),
        )
    limit, remaining, reset_in = _HEADERS[unit]
    return (limit, str(rule.limit)), (remaining, str(left)), (reset_in, go_duration(reset))


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
