"""Budgets: how many dollars a key, team, user, model … or everyone may spend in an hour, day, week, month, or ever.

Before a request goes out, the most that it can cost is reserved in each budget that it falls under: a bound of its
input tokens and its output limit, at the dearest price of the models that may answer it. When it is over, the
reservation becomes what it really cost. So spent and reserved never exceed a hard limit at any admission, whatever the
number of requests, workers and gateways. A request whose cost stays unknown is charged what was reserved.

What has no known limit of cost is refused (`unknown_price`), by whichever field or spelling it is asked for. Prices
are the catalogue's: a provider that the client prefers is held to them; where it names none, an OpenRouter may balance
to a dearer one, and such a reply overshoots its reservation. So does an image of more than `image_tokens`.

Counts live where `services.redis` says: in the process, which forgets at its end, or in a Redis, which must keep its
data (`appendonly yes`).
"""

from __future__ import annotations

import functools
import operator
import time
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias
from zoneinfo import ZoneInfo

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gateway import (
    Cause,
    Cost,
    RateLimited,
    Refused,
    Source,
    When,
    compile_when,
    hookimpl,
)
from gateway.kit import (
    NO_MEDIA,
    By,
    Media,
    OwnLimits,
    Period,
    Rule,
    State,
    choices,
    input_bound,
    media,
    output_cap,
    own_limits,
    subjects,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gateway import AttemptRecord, Correction, Exchange, GatewayError, Services

_SUBJECTS = 10_000  # whose rules are kept
# Fields that make no request cost more than its bytes and its output limit; `_extra` has those that do.
_SIMPLE = frozenset(
    {
        "frequency_penalty", "input", "instructions", "logit_bias", "max_completion_tokens", "max_output_tokens",
        "max_tokens", "messages", "metadata", "model", "presence_penalty", "response_format", "seed", "stop",
        "stop_sequences", "stream", "stream_options", "system", "temperature", "top_k", "top_p", "user",
    }
)  # fmt: skip
# An attempt that failed like this may have been billed all the same.
_PERHAPS_BILLED = frozenset({Cause.TIMEOUT, Cause.TRUNCATED, Cause.BAD_REPLY, Cause.CLIENT_DISCONNECT, Cause.ABANDONED})
_TOLD = frozenset({Source.UPSTREAM, Source.CATALOGUE})
_ENDLESS = 10**15  # micro-USD: what a soft budget "allows"
_REMEMBERED = 10_000  # operations whose true cost may still become known
_LONG_CACHE = 2  # Anthropic's price of what it keeps for an hour, in times of plain input
_SEARCHED = 100  # documents that one price per request of rerank is for; a longer one counts as several
_SEARCHED_TOKENS = 500
# Variants of a model's name that cost what the model costs; `exacto` and what a client says in `provider` at the price
# that is asked for by `max_price`.
_SAME_PRICE = frozenset({"floor", "thinking", "exacto"})


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone; names are such as UTC or Europe/Berlin") from None
    return name


class Budget(BaseModel):
    """One limit of spending."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        min_length=1, max_length=50, pattern=r"^[A-Za-z0-9_.-]+$", description="Name in errors and logs; unique."
    )
    by: By = Field(
        ("key",),
        description="What has a sum of its own: key (the caller), tenant, team, role, user (the body's `user`, which "
        "clients choose), model (the first target), endpoint; several: one per combination; []: one for all.",
    )
    when: When | None = Field(None, description="The requests that it holds for, as a plugin's `when:`. Default all.")
    usd: Decimal = Field(gt=0, le=10**8, decimal_places=6, description="The limit, in USD.")
    per: Period = Field("month", description="When it starts anew; `total`: never. Default month.")
    time_zone: Annotated[str, AfterValidator(_zone)] = Field(
        "UTC", description="Whose days, weeks (from Monday) and months these are. Default UTC."
    )
    warn_at: float = Field(
        0.8, gt=0, le=1, description="Share of the limit from which replies carry a warning, logged once. Default 0.8."
    )
    hard: bool = Field(True, description="Refuse what doesn't fit; false only warns. Default true.")


class Assume(BaseModel):
    """What a request without an output limit is taken to use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    assume: int = Field(ge=1, le=10**7, description="Output tokens. A longer answer overshoots the budget by the rest.")


class Config(BaseModel):
    """The budgets; a request must fit in all that it falls under."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budgets: tuple[Budget, ...] = Field((), description="The budgets, each with its own sums. Default none.")
    own_limits: bool = Field(
        True, description="Hold the `usd` that a key or a token brings along (`limits` of api_keys) too. Default true."
    )
    no_max_tokens: Literal["clamp"] | Assume = Field(
        "clamp",
        description="A request without an output limit: `clamp` gives it what the model and the budget allow; "
        "`assume: N` reserves for N tokens and sets no limit. Default clamp.",
    )
    least_tokens: int = Field(
        256, ge=1, description="Output tokens that must be affordable for a request to be clamped. Default 256."
    )
    image_tokens: int = Field(5000, ge=0, description="The most input tokens that one image takes. Default 5000.")
    unknown_price: Literal["deny", "allow"] = Field(
        "deny",
        description="Requests whose cost has no known bound (no price, auto-routers, web search, dearer service tiers):"
        " deny, or allow, reserving nothing for them. Default deny.",
    )
    cost_per_request: dict[str, Decimal] = Field(
        default_factory=dict,
        description="USD to reserve per request of endpoints that have no price per token, such as images/generations "
        "or audio/speech. Default none.",
    )
    on_store_error: Literal["allow", "deny"] = Field(
        "deny", description="While Redis is away: allow requests, booked later, or deny them with 503. Default deny."
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        names = [budget.name for budget in self.budgets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several budgets are named {', '.join(twice)}")
        if not names and not self.own_limits:
            raise ValueError("limits nothing: list budgets, or say own_limits: true")
        return self


class _Bound(msgspec.Struct, frozen=True):
    """The most that a request may cost, in pico-USD. `clamps`: (fixed part, per output token, the most output tokens
    that it can give) of each target.
    """

    most: int
    least: int  # with the fewest output tokens that are worth it
    clamps: tuple[tuple[int, int, int], ...] = ()
    ceiling: tuple[int, int] | None = None  # list prices of input and output that the client's `provider` must keep to


_FREE = _Bound(0, 0)


class _Held(Rule, eq=False):
    """A rule of this plugin, with what its errors and corrections say."""

    owner: Plugin | None = None
    budget: Budget | None = None
    bound: _Bound | None = None
    warn_from: int = 0  # micro-USD
    # micro-USD; one for each attempt that was reserved for, shared by their rules
    granted: list[int] = msgspec.field(default_factory=list)


class _Window:
    """The period that is now: its name in keys, and when it ends (seconds since 1970; None: never)."""

    def __init__(self, budget: Budget) -> None:
        self._per = budget.per
        self._zone = ZoneInfo(budget.time_zone)
        self.name = "total"
        self.end: float | None = None
        self._until = 0.0

    def now(self) -> tuple[str, float | None]:
        now = time.time()
        if self._per != "total" and now >= self._until:
            self.name, self._until = _period(datetime.fromtimestamp(now, self._zone), self._per)
            self.end = self._until
        return self.name, self.end


def _period(now: datetime, per: Period) -> tuple[str, float]:
    """Name and end of the period around this moment, in the moment's time zone."""
    if per == "hour":
        start = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        return start.strftime("%Y-%m-%dT%HZ"), (start + timedelta(hours=1)).timestamp()
    day = now.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    if per == "day":
        return day.strftime("%Y-%m-%d"), (day + timedelta(days=1)).timestamp()
    if per == "week":
        monday = day - timedelta(days=day.weekday())
        return monday.strftime("week-%Y-%m-%d"), (monday + timedelta(days=7)).timestamp()
    first = day.replace(day=1)
    return first.strftime("%Y-%m"), (first + timedelta(days=32)).replace(day=1).timestamp()


class _Compiled:
    """A budget, and its rule per subject: what is the same for every request of its period is made once."""

    def __init__(self, budget: Budget, owner: Plugin, prefix: str) -> None:
        self.budget = budget
        self.applies = compile_when(budget.when)
        self._owner = owner
        self._window = _Window(budget)
        self._limit = int(budget.usd * 10**6) if budget.hard else _ENDLESS
        self._warn_from = int(float(budget.usd) * 1e6 * budget.warn_at)
        self._prefix = f"{prefix}:{budget.name}:"
        self._period = ""
        self._known: dict[str, _Held] = {}

    def rule(self, subject: str, most: int, least: int | None, bound: _Bound) -> _Held:
        """`most` and `least` to reserve, in micro-USD."""
        period, end = self._window.now()
        if period != self._period or len(self._known) >= _SUBJECTS:
            self._period = period
            self._known.clear()
        known = self._known.get(subject)
        if known is None:
            known = self._known[subject] = self._made(f"{self._prefix}{period}:{subject}", end)
        rule: _Held = known.__copy__()  # type: ignore[attr-defined]  # msgspec's, at half the cost of `copy.copy`
        rule.amount, rule.least, rule.bound, rule.granted = most, least, bound, []
        return rule

    def _made(self, key: str, end: float | None) -> _Held:
        return _Held(
            key=key,
            kind="budget",
            limit=self._limit,
            refuse=_refuse,
            # corrections come within minutes, requests last for hours at most
            until=None if end is None else end + 2 * 86400,
            actual=_actual,
            admitted=_admitted,
            again=_again,
            on_store_error=self._owner.on_store_error,
            owner=self._owner,
            budget=self.budget,
            warn_from=self._warn_from,
        )


class Plugin:
    """Refuses requests that could spend more than a budget has left."""

    Config: TypeAlias = Config

    def __init__(self, config: Config, services: Services) -> None:
        self._config = config
        self._services = services
        self.on_store_error: Literal["allow", "deny"] = config.on_store_error
        self._plain: dict[tuple[str, str, str], _Plain] = {}
        self._budgets = [self._compiled(budget) for budget in config.budgets]
        self._own = functools.lru_cache(maxsize=4096)(self._compiled_own)
        self._warned: OrderedDict[str, None] = OrderedDict()
        self._correctable: OrderedDict[str, tuple[Sequence[_Held], dict[int, int]]] = OrderedDict()

    def _compiled(self, budget: Budget) -> _Compiled:
        return _Compiled(budget, self, self._services.plugin_id)

    def _compiled_own(self, own: OwnLimits) -> _Compiled:
        """The caller's own spending limit as one of ours; no name that the YAML can give."""
        usd = own.usd or Decimal(0)
        return self._compiled(Budget.model_construct(name="own limits", by=("key",), usd=usd, per=own.usd_per))

    async def ping(self) -> None:
        await self._services.ledger.ping()

    @hookimpl
    async def check_request(self, exchange: Exchange) -> None:
        bound: _Bound | None = None
        most, least = 0, None
        budgets = self._budgets
        if self._config.own_limits and (own := own_limits(exchange)) is not None and own.usd is not None:
            budgets = [self._own(own), *budgets]
        for budget in budgets:
            if budget.applies is not None and not budget.applies(exchange):
                continue
            if bound is None:
                bound = self._simple_bound(exchange) or self._bound(exchange)
                most, least = _micro(bound.most), _micro(bound.least) if bound.clamps else None
            if bound.ceiling is not None and budget.budget.hard:
                _keep_to(bound.ceiling, exchange.body)
            for subject in subjects(budget.budget.by, exchange):
                exchange.hold(budget.rule(subject, most, least, bound))

    @hookimpl
    async def request_finished(self, exchange: Exchange) -> None:
        if exchange.cost.source not in {Source.ESTIMATE, Source.RESERVED} or exchange.admission is None:
            return
        rules = [rule for rule in exchange.admission.rules if isinstance(rule, _Held) and rule.owner is self]
        if rules:
            charged = {a.number: a.cost.micro_usd or 0 for a in exchange.attempts if a.generation_id is not None}
            self._correctable[exchange.id] = rules, charged
            if len(self._correctable) > _REMEMBERED:
                self._correctable.popitem(last=False)

    @hookimpl
    async def usage_corrected(self, correction: Correction) -> None:
        rules, charged = self._correctable.get(correction.exchange_id, ((), {}))
        number = int(correction.operation_id.rpartition("/")[2])
        true = correction.cost.micro_usd
        before = charged.pop(number, None)
        if true is None or before is None or true == before:
            return
        for rule in rules:
            self._services.ledger.adjust(correction.operation_id, rule, true - before)

    def warn(self, rule: _Held, spent: int, exchange: Exchange) -> None:
        """The reply says so; the log once."""
        if rule.budget is None:  # pragma: no cover - made by this plugin alone
            return
        warning = f"{rule.budget.name}; spent {_usd(spent)} of {_usd(int(rule.budget.usd * 10**6))} USD"
        before = exchange.reply_headers.get("x-xenios-budget-warning")
        exchange.reply_headers["x-xenios-budget-warning"] = f"{before}, {warning}" if before else warning
        if rule.key in self._warned:
            return
        self._warned[rule.key] = None
        if len(self._warned) > _REMEMBERED:
            self._warned.popitem(last=False)
        self._services.log.warning(
            "budget_warning",
            budget=rule.budget.name,
            spent_usd=spent / 1e6,
            limit_usd=float(rule.budget.usd),
            principal=exchange.principal.reference if exchange.principal else None,
            request_id=exchange.request_id,
        )

    # --- the most that a request may cost ---------------------------------------------------------------------------

    def _simple_bound(self, exchange: Exchange) -> _Bound | None:
        """As `_bound`, for one model and a body of text that has nothing special: most requests. None for others."""
        body, raw, decision = exchange.body, exchange.raw_body, exchange.decision
        if (
            decision is None
            or len(decision.targets) != 1
            or not body.keys() <= _SIMPLE
            or self._config.cost_per_request
        ):
            return None
        target = decision.targets[0]
        if target.overrides or target.strip or exchange.snapshot.hooks.prepare_request:
            return None
        if b'"type"' in raw or b'"ttl"' in raw or b"\\u" in raw:
            return None
        name = (target.upstream, target.model, exchange.endpoint)
        plain = self._plain.get(name)
        model = self._services.catalogue.model(target.upstream, target.model)
        if plain is None or plain.model is not model:
            if len(self._plain) >= _SUBJECTS:
                self._plain.clear()
            plain = self._plain[name] = self._made_plain(exchange, target.upstream, target.model, model)
        size = len(raw)
        if size > plain.most_input:
            return None
        cap = 0
        for field in plain.caps:
            value = body.get(field)
            if value is None:
                continue
            if type(value) is not int or value <= 0:
                return None
            cap = max(cap, value)
        entry = plain.entry * size + plain.request
        if cap:
            most = entry + cap * plain.each
            return _Bound(most, most)
        if self._config.no_max_tokens != "clamp":
            return None
        least = min(self._config.least_tokens, plain.longest)
        clamps = ((entry, plain.each, plain.longest),)
        return _Bound(entry + plain.longest * plain.each, entry + least * plain.each, clamps)

    def _made_plain(self, exchange: Exchange, upstream: str, model_id: str, model: Any) -> _Plain:
        """What `_target_bound` would find of the model, where that is the same for all simple requests."""
        nothing = _Plain(model)
        if model is None or model.id != model_id or exchange.dialect.grammar is None:
            return nothing
        asked = _Asked(upstream, model_id, {}, (), self._services.settings.upstreams[upstream].kind == "openrouter", 0)
        longest = model.max_output or model.context_length
        try:
            self._prices(exchange, asked, model, NO_MEDIA)
        except _Unbounded:
            return nothing
        entry, each = model.price.dearest(0)
        if entry is None or each is None or longest is None:
            return nothing
        ends = [tier.min_input_tokens for tier in model.price.tiers]
        ends += [model.context_length] if model.context_length is not None else []
        return _Plain(
            model,
            entry,
            each,
            model.price.request or 0,
            min(ends, default=10**9),
            longest,
            exchange.dialect.output_caps,
        )

    def _bound(self, exchange: Exchange) -> _Bound:
        """Raises Refused if it has none, and the settings want one."""
        fixed = self._config.cost_per_request.get(exchange.endpoint)
        if fixed is not None:
            most = int(fixed * 10**12) * choices(exchange.body)
            return _Bound(most, most)
        found = media(exchange)
        try:
            bounds = [self._target_bound(exchange, target, found) for target in self._targets(exchange)]
        except _Unbounded as why:
            if self._config.unknown_price == "allow":
                return _FREE
            raise Refused(
                f"This request's cost has no known limit ({why}), which its budget needs. Use another model or leave "
                "that out, or ask the operator for a price (`catalogue.overrides`) or `unknown_price: allow`.",
                code="unknown_price",
            ) from None
        ceilings = [bound.ceiling for bound in bounds if bound.ceiling is not None]
        return _Bound(
            max(bound.most for bound in bounds),
            max(bound.least for bound in bounds),
            tuple(clamp for bound in bounds for clamp in bound.clamps),
            (max(c[0] for c in ceilings), max(c[1] for c in ceilings)) if ceilings else None,
        )

    def _targets(self, exchange: Exchange) -> Iterator[_Asked]:
        """All that may answer: ours, and those that an OpenRouter may take by `models` or `fallbacks` in the body."""
        for target in exchange.decision.targets if exchange.decision else ():
            body = exchange.body
            if target.overrides or target.strip:
                body = {n: v for n, v in {**body, **target.overrides}.items() if n not in target.strip}
            openrouter = self._services.settings.upstreams[target.upstream].kind == "openrouter"
            added = len(msgspec.json.encode(target.overrides)) if target.overrides else 0
            yield _Asked(target.upstream, target.model, body, target.strip, openrouter, added)
            for named in (*(body.get("models") or ()), *(body.get("fallbacks") or ())) if openrouter else ():
                further = {**body, **named} if isinstance(named, dict) else body
                model = str(named.get("model") if isinstance(named, dict) else named)
                yield _Asked(target.upstream, model, further, target.strip, openrouter, added)

    def _target_bound(self, exchange: Exchange, asked: _Asked, found: Media) -> _Bound:
        """Raises _Unbounded."""
        body = asked.body
        extra = _extra(body)
        if extra is not None:
            raise _Unbounded(extra)
        model = self._services.catalogue.model(asked.upstream, asked.model)
        if model is None:
            raise _Unbounded("a model has no known price")
        if asked.openrouter and (variants := _unlisted_variants(asked.model, model.id)):
            if variants == ["free"]:
                return _FREE
            wrong = [name for name in variants if name not in _SAME_PRICE]
            if wrong:
                raise _Unbounded(f"`:{wrong[0][:50]}` may cost extra")
        entry, each = self._prices(exchange, asked, model, found)
        ceiling = None
        if asked.openrouter and (asked.model != model.id or body.get("provider") is not None):
            ceiling = (model.price.input or 0, model.price.output or 0)
        if exchange.dialect.grammar is None:
            return _Bound(entry, entry, ceiling=ceiling)
        each *= choices(body)
        prediction = body.get("prediction")
        if prediction is not None:  # what it got wrong is billed as output, beside the limit
            entry += len(msgspec.json.encode(prediction)) * each
        cap, thought = output_cap(body, exchange.dialect.output_caps), _thinking(body)
        if cap is not None:
            # a thinking budget is part of the limit, but for upstreams that raise the limit to fit it
            most = entry + (cap if thought < cap else cap + thought) * each
            return _Bound(most, most, ceiling=ceiling)
        if isinstance(self._config.no_max_tokens, Assume):
            most = entry + self._config.no_max_tokens.assume * each
            return _Bound(most, most, ceiling=ceiling)
        longest = model.max_output or model.context_length
        if longest is None:
            raise _Unbounded("a model has no known limit of output; set one in the request")
        if thought or self.cap_field(exchange) in asked.strip:  # a limit that we set would not hold
            most = entry + (longest + thought) * each
            return _Bound(most, most, ceiling=ceiling)
        least = min(self._config.least_tokens, longest)
        return _Bound(entry + longest * each, entry + least * each, ((entry, each, longest),), ceiling)

    def _prices(self, exchange: Exchange, asked: _Asked, model: Any, found: Media) -> tuple[int, int]:
        """(all input, one output token), at the dearest. Raises _Unbounded."""
        endpoint, price = exchange.endpoint, model.price
        modalities = model.raw.get("architecture")
        takes, gives = (
            (modalities.get(name) if isinstance(modalities, dict) and asked.openrouter else None)
            for name in ("input_modalities", "output_modalities")
        )
        tokens = input_bound(exchange, model.context_length, self._config.image_tokens, found)
        if tokens is None:
            raise _Unbounded("nothing says how much a file, audio or video of a model without context length may be")
        if found.files and isinstance(takes, list) and "file" not in takes:
            raise _Unbounded("reading files for a model that can't costs extra")
        tokens += asked.added
        entry, each = price.dearest(tokens)
        if entry is None:
            raise _Unbounded("a model has no known price")
        if found.others:
            entry = max(entry, price.audio or 0)
        if _kept_for_long(exchange, asked.body):
            entry *= _LONG_CACHE
        requests = 1
        if endpoint == "rerank":
            documents = asked.body.get("documents")
            count = len(documents) if isinstance(documents, list) else 1
            requests = -(-(count + len(exchange.raw_body) // _SEARCHED_TOKENS) // _SEARCHED)
        entry = entry * tokens + (price.request or 0) * requests + (price.image or 0) * found.images
        if exchange.dialect.grammar is None and endpoint != "audio/speech":  # embeddings, rerank: no output is billed
            return entry, 0
        if each is None or endpoint in {"images/generations", "audio/transcriptions"}:
            raise _Unbounded("a model has no known price of output")
        if endpoint == "audio/speech" and each:
            raise _Unbounded("nothing limits the speech that a text becomes")
        if exchange.dialect.grammar is not None and isinstance(gives, list) and set(gives) - {"text"}:
            raise _Unbounded("a model answers with more than text")
        return entry, each

    def cap_field(self, exchange: Exchange) -> str:
        """What sets the output limit in this dialect, for the upstream that is asked first."""
        names = exchange.dialect.output_caps
        decision = exchange.decision
        if len(names) > 1 and decision is not None:
            upstream = self._services.settings.upstreams[decision.targets[0].upstream]
            return names[0] if upstream.kind == "openai" else names[-1]
        return names[0]


class _Plain(msgspec.Struct, frozen=True):
    """A model's prices for simple requests of up to `most_input` bytes; -1: none is simple."""

    model: Any
    entry: int = 0
    each: int = 0
    request: int = 0
    most_input: int = -1
    longest: int = 0
    caps: Sequence[str] = ()


class _Unbounded(Exception):
    """Why the price list is no bound, in words."""


class _Asked(msgspec.Struct, frozen=True):
    """One model that may answer, and the body that it would be asked with."""

    upstream: str
    model: str
    body: dict[str, Any]
    strip: Sequence[str]
    openrouter: bool
    added: int  # bytes that the target's own fields add to the body


# Fields that make a request cost more than its tokens: searches, tools and models that run at the upstream.
_EXTRAS = ("plugins", "web_search_options", "preset", "mcp_servers", "container")
_PLAIN_VALUES: dict[str, tuple[object, ...]] = {
    "service_tier": (None, "auto", "default", "flex", "standard_only", "standard"),
    "speed": (None, "standard"),
    "inference_geo": (None, "global", "not_available"),
    "modalities": (None, ["text"], []),
}


def _extra(body: dict[str, Any]) -> str | None:
    """What costs more than tokens, in words; None if nothing does."""
    for name in _EXTRAS:
        if body.get(name):
            return f"`{name}` may cost extra"
    for name, plain in _PLAIN_VALUES.items():
        if name in body and body[name] not in plain:
            return f"this `{name}` costs extra"
    for name in ("tools", "deferred_tools"):
        tools = body.get(name)
        for tool in tools if isinstance(tools, list) else [tools] if tools else ():
            kind = tool.get("type") if isinstance(tool, dict) else str(tool)
            # a function of the client's own, which runs there; in Anthropic's dialect it has no type
            if kind not in (None, "function", "custom"):
                return f"the tool {str(kind)[:50]!r} costs extra"
    provider = body.get("provider")
    if isinstance(provider, dict) and provider.get("options"):
        return "`provider.options` may cost extra"
    if body.get("context_management") and b"compact" in msgspec.json.encode(body["context_management"]):
        return "compaction costs extra"
    return None


def _unlisted_variants(asked: str, listed: str) -> list[str]:
    """`:nitro` … of a name that the price list has without it, or with another."""
    variants = asked.split(":")[1:]
    return variants if variants != listed.split(":")[1:] else []


def _thinking(body: dict[str, Any]) -> int:
    """Tokens that the model may think, where the request says how many."""
    given = [
        part.get(name)
        for field, name in (("reasoning", "max_tokens"), ("thinking", "budget_tokens"))
        if isinstance(part := body.get(field), dict)
    ]
    return max((int(n) for n in given if isinstance(n, int | float) and 0 < n < 10**9), default=0)


def _kept_for_long(exchange: Exchange, body: dict[str, Any]) -> bool:
    """`cache_control: {ttl: 1h}` anywhere."""
    raw = exchange.raw_body
    if (
        b'"ttl"' not in raw
        and b"\\u" not in raw
        and body is exchange.body
        and not exchange.snapshot.hooks.prepare_request
    ):
        return False
    return _has_ttl(body)


def _has_ttl(value: Any) -> bool:
    if isinstance(value, dict):
        ttl = value.get("ttl")
        return (isinstance(ttl, str) and ttl != "5m") or any(_has_ttl(v) for v in value.values())
    return isinstance(value, list) and any(_has_ttl(v) for v in value)


def _keep_to(ceiling: tuple[int, int], body: dict[str, Any]) -> None:
    """Whichever provider the client prefers, it may cost the list price at most."""
    asked = body.get("provider")
    provider = dict(asked) if isinstance(asked, dict) else {}
    theirs = provider.get("max_price")
    limits = dict(theirs) if isinstance(theirs, dict) else {}
    for name, pico in zip(("prompt", "completion"), ceiling, strict=True):
        ours = float(Decimal(pico).scaleb(-6))  # pico-USD a token are micro-USD a million: USD a million
        try:
            limits[name] = min(ours, float(limits[name]))
        except (KeyError, TypeError, ValueError):
            limits[name] = ours
    body["provider"] = {**provider, "max_price": limits}


def _micro(pico: int) -> int:
    return -(-pico // 10**6)


def _usd(micro: int) -> str:
    """Dollars and cents, and more digits where it is less."""
    return f"{micro / 1e6:,.2f}" if micro >= 10**4 or micro == 0 else f"{micro / 1e6:.6f}"


def _admitted(exchange: Exchange, rule: Rule, state: State) -> None:
    """Warns near the limit; cuts the request's output to what was reserved for it, where it set no limit itself."""
    if not isinstance(rule, _Held) or rule.bound is None or rule.owner is None:
        return
    rule.granted.append(state.granted)
    # what was spent when the request was admitted
    spent = rule.limit - state.remaining - state.granted - state.reserved
    if spent >= rule.warn_from and len(rule.granted) == 1:
        rule.owner.warn(rule, spent, exchange)
    if state.granted >= rule.amount or not rule.bound.clamps:
        return
    money = state.granted * 10**6
    # no more than each of them takes: an upstream refuses a limit above its own
    tokens = min(
        min(longest, (money - entry) // each if each else longest) for entry, each, longest in rule.bound.clamps
    )
    name = rule.owner.cap_field(exchange)
    for other in exchange.dialect.output_caps:  # -1, "100" or whatever was no limit for us may be one for the upstream
        if output_cap(exchange.body, (other,)) is None:
            exchange.body.pop(other, None)
    exchange.body[name] = min(tokens, exchange.body.get(name, tokens))
    exchange.reply_headers["x-xenios-clamped"] = f"{name}={exchange.body[name]}"


def _actual(exchange: Exchange) -> int | None:
    """What it cost, in micro-USD. An attempt whose cost is unknown is charged what was reserved for it, and says so.

    For a hard budget an estimate is no knowledge: an upstream may bill all of an answer that was broken off. The true
    cost, asked for at OpenRouter, puts it right (`usage_corrected`).
    """
    attempts = exchange.attempts
    if len(attempts) == 1 and attempts[0].cost.pico_usd is not None and attempts[0].cost.source in _TOLD:
        return exchange.cost.micro_usd or 0
    granted, hard = _granted(exchange)
    number = 0  # of the reservation that the attempt uses
    charged = False
    for record in exchange.attempts:
        cost = record.cost
        if (hard and cost.source is Source.ESTIMATE) or _perhaps_billed(record):
            reserved = granted[min(number, len(granted) - 1)] * 10**6
            if reserved > (cost.pico_usd or 0):
                record.cost = Cost(reserved, Source.RESERVED)
                charged = True
        number += bool(record.cost.pico_usd)
    if charged:
        costs = [record.cost for record in exchange.attempts if record.cost.pico_usd is not None]
        exchange.cost = functools.reduce(operator.add, costs)
    return exchange.cost.micro_usd or 0


def _granted(exchange: Exchange) -> tuple[Sequence[int], bool]:
    """(micro-USD that were reserved for the first attempt and for each after one that may have been billed, is there a
    hard budget).
    """
    rules = [rule for rule in exchange.admission.rules if isinstance(rule, _Held)] if exchange.admission else []
    # nothing was, where the store was away: then what it would have been
    granted = max((rule.granted or [rule.amount] for rule in rules), key=sum, default=[0])
    return granted, any(rule.budget is not None and rule.budget.hard for rule in rules)


def _perhaps_billed(record: AttemptRecord) -> bool:
    """May it have cost something, though nobody told what?"""
    if record.cost.pico_usd is not None:
        return False
    return record.first_content is not None or record.cause in _PERHAPS_BILLED


def _again(exchange: Exchange) -> int:
    """Before a further attempt: as much again, if the last one may have used up what was reserved."""
    last = exchange.attempts[-1]
    if not last.cost.pico_usd and not _perhaps_billed(last):
        return 0
    return _granted(exchange)[0][0]


def _refuse(rule: Rule, state: State) -> GatewayError:
    budget = rule.budget if isinstance(rule, _Held) else None
    if budget is None:  # pragma: no cover - made by this plugin alone
        raise TypeError(type(rule).__name__)
    left = state.remaining
    spent = rule.limit - left - state.reserved
    period = "" if budget.per == "total" else f" this {budget.per}"
    if rule.limit - spent >= rule.amount:
        detail = f"{_usd(state.reserved)} USD are reserved by requests under way"
    elif left > 0:
        detail = f"this request may cost up to {_usd(rule.amount)} USD; set a lower output limit"
    else:
        detail = "nothing is left"
    return RateLimited(
        f"Budget reached ({budget.name}): {_usd(spent)} of {_usd(rule.limit)} USD are spent{period}, and {detail}.",
        type="insufficient_quota",
        code="insufficient_quota",
        should_retry=False,
    )
