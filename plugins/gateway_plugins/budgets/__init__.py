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
import math
import operator
import time
from collections import OrderedDict
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

import msgspec

from gateway import Cause, ContextKey, Cost, Outcome, RateLimited, Source, StoreUnavailable, compile_when, hookimpl
from gateway.kit import (
    ENDLESS,
    OF_CALLERS,
    OwnLimits,
    PerCaller,
    Period,
    Rule,
    RuleSet,
    State,
    output_cap,
    own_limits,
    subjects,
)
from gateway_plugins.budgets.bounds import Bound, Pricing, keep_to
from gateway_plugins.budgets.settings import Budget, Config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from gateway import AttemptRecord, Cell, Correction, Exchange, GatewayError, Services

_SUBJECTS = 4096  # whose rules are kept ready: about 9 KB each
# An attempt that failed like this may have been billed all the same.
_PERHAPS_BILLED = frozenset({Cause.TIMEOUT, Cause.TRUNCATED, Cause.BAD_REPLY, Cause.CLIENT_DISCONNECT, Cause.ABANDONED})
_TOLD = frozenset({Source.UPSTREAM, Source.CATALOGUE})
_OWN = "own limits"  # no name that the YAML can give
_SEEN_MINUTES = 5  # how long what a request saw of a budget is told
_REMEMBERED = 10_000  # operations whose true cost may still become known


_SPANS = {"total": " in all", **{per: f" per {per}" for per in ("hour", "day", "week", "month")}}


class _Reserved(msgspec.Struct, eq=False):
    """What one request may cost, and what its budgets granted it."""

    bound: Bound
    granted: list[int]  # micro-USD; one for each attempt that was reserved for


class _Plan(NamedTuple):
    """One caller's rules: those of the budgets that hold for each of its requests, and the budgets that may."""

    rules: tuple[Rule, ...]
    others: tuple[_Compiled, ...]
    all: RuleSet | None  # if no other may hold
    until: float  # when the first of the periods ends, in seconds since 1970


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


class _Seen:
    """What is told of the budgets of one name: the fullest that requests saw in the last minutes, and refusals."""

    def __init__(self, refusals: Cell) -> None:
        self.refusals = refusals
        self._fullest: dict[float, float] = {}  # by minute

    def note(self, share: float, at: float) -> None:
        """`at`: as time.monotonic() counts."""
        minute = at // 60
        before = self._fullest.get(minute)
        if before is None:
            self._fullest = {at: known for at, known in self._fullest.items() if at > minute - _SEEN_MINUTES}
        if before is None or share > before:
            self._fullest[minute] = share

    def fullest(self) -> float | None:
        oldest = time.monotonic() // 60 - _SEEN_MINUTES
        return max((share for minute, share in self._fullest.items() if minute > oldest), default=None)


class _Compiled:
    """A budget, and its rule per subject: what is the same for every request of its period is made once."""

    def __init__(self, budget: Budget, owner: Plugin, prefix: str) -> None:
        self.budget = budget
        self.applies = compile_when(budget.when)
        self.owner = owner
        self.of_caller = budget.when is None and OF_CALLERS.issuperset(budget.by)
        self._window = _Window(budget)
        self._limit = int(budget.usd * 10**6) if budget.hard else ENDLESS
        self.micro_usd = float(budget.usd) * 1e6
        self.warn_from = int(self.micro_usd * budget.warn_at)
        self.seen = owner.seen("own" if budget.name == _OWN else budget.name)
        self._prefix = f"{prefix}:{budget.name}:"
        self._period = ""
        self._known: dict[str, Rule] = {}

    def rules(self, exchange: Exchange) -> Iterator[Rule]:
        """One for each subject."""
        period, end = self._window.now()
        for subject in subjects(self.budget.by, exchange):
            if period != self._period or len(self._known) >= _SUBJECTS:
                if self._period and not self.of_caller:  # of callers' each plan says when it ends
                    self.owner.forget()
                self._period = period
                self._known.clear()
            known = self._known.get(subject)
            if known is None:
                known = self._known[subject] = self._made(f"{self._prefix}{period}:{subject}", end)
            yield known

    @property
    def ends(self) -> float:
        """When the period that is now does."""
        return self._window.now()[1] or math.inf

    def _made(self, key: str, end: float | None) -> Rule:
        return Rule(
            key=key,
            kind="budget",
            limit=self._limit,
            refuse=_refuse,
            # corrections come within minutes, requests last for hours at most
            until=None if end is None else end + 2 * 86400,
            lease=self.owner.lease,
            varies=True,
            actual=_actual,
            admitted=self.owner.admitted,
            refused=_refused,
            again=_again,
            on_store_error=self.owner.on_store_error,
            about=self,
            name=f"{self.budget.name}: {self.budget.usd:f} USD{_SPANS[self.budget.per]}"
            + ("" if self.budget.hard else ", only warns"),
        )


class Plugin:
    """Refuses requests that could spend more than a budget has left."""

    Config: TypeAlias = Config
    reads_settings = ("upstreams",)

    def __init__(self, config: Config, services: Services) -> None:
        self._config = config
        self._services = services
        self.on_store_error: Literal["allow", "deny"] = config.on_store_error
        self.lease = config.lease
        self.pricing = Pricing(config, services)
        self._refusals = services.metrics.counter(
            "xenios_budget_refusals_total",
            "Requests, or further attempts of theirs, that a budget refused, by its name (`own`: the key's or token's "
            "own). Of several budgets the one that the client was told of.",
            ("budget",),
        )
        self._used = services.metrics.gauge(
            "xenios_budget_used_ratio",
            "How much of a budget is spent, 1 is all: of the fullest (whichever key, team, …) that requests met in the "
            "last five minutes. Absent if none did.",
            ("budget",),
            merge="max",
        )
        self._seen: dict[str, _Seen] = {}
        self._budgets = [self._compiled(budget) for budget in config.budgets]
        self._own = functools.lru_cache(maxsize=4096)(self._compiled_own)
        self._plans = PerCaller(self._plan)
        self._set = functools.lru_cache(maxsize=_SUBJECTS)(_set_of)
        self.reserved: ContextKey[_Reserved] = ContextKey("reserved")
        self._warned: OrderedDict[str, None] = OrderedDict()
        self._correctable: OrderedDict[str, tuple[Sequence[Rule], dict[int, int]]] = OrderedDict()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        no_longer_shown = self._used.read_from(self._fullest)
        try:
            yield
        finally:
            no_longer_shown()

    def seen(self, label: str) -> _Seen:
        """By what a budget is called in metrics."""
        found = self._seen.get(label)
        if found is None:
            found = self._seen[label] = _Seen(self._refusals.of(label))
        return found

    def _fullest(self) -> dict[tuple[str, ...], float]:
        return {(label,): share for label, seen in self._seen.items() if (share := seen.fullest()) is not None}

    def _compiled(self, budget: Budget) -> _Compiled:
        return _Compiled(budget, self, self._services.plugin_id)

    def _compiled_own(self, own: OwnLimits) -> _Compiled:
        """The caller's own spending limit as one of ours."""
        usd = own.usd or Decimal(0)
        return self._compiled(Budget.model_construct(name=_OWN, by=("key",), usd=usd, per=own.usd_per))

    async def ping(self) -> None:
        await self._services.ledger.ping()

    @hookimpl
    async def check_request(self, exchange: Exchange) -> None:
        if exchange.phase == "accept":
            await self._look(exchange)
        else:
            self._hold(exchange)

    def forget(self) -> None:
        """Sets of rules, of which some have ended."""
        self._plans.clear()
        self._set.cache_clear()

    def _rules(self, exchange: Exchange) -> RuleSet:
        """Of the budgets that it falls under; `about`: is one of them hard?"""
        plan = self._plans.of(exchange)
        if time.time() >= plan.until:
            self.forget()
            plan = self._plans.of(exchange)
        if plan.all is not None:
            return plan.all
        rules = list(plan.rules)
        for budget in plan.others:
            if budget.applies is None or budget.applies(exchange):
                rules += budget.rules(exchange)
        return self._set(tuple(rules))

    async def _look(self, exchange: Exchange) -> None:
        """A job is taken: reserved is when it runs. Refused is now what can't be paid then, as far as that is known."""
        rules = [rule for rule in self._rules(exchange).rules if rule.about.budget.hard]
        if not rules:
            return
        self.pricing.bound(exchange)
        try:
            sums = await self._services.ledger.budgets([rule.key for rule in rules])
        except StoreUnavailable:
            if self.on_store_error == "deny":
                raise
            return
        for rule, (spent, reserved) in zip(rules, sums, strict=True):
            if spent >= rule.limit:
                state = State(allowed=False, remaining=rule.limit - spent - reserved, reserved=reserved)
                _refused(rule, state, told=True)
                raise _refuse(rule, state)

    def _hold(self, exchange: Exchange) -> None:
        rules = self._rules(exchange)
        if not rules.rules:
            return
        bound = self.pricing.bound(exchange)
        if bound.ceiling is not None and rules.about:
            keep_to(bound.ceiling, exchange.body)
        exchange.set(self.reserved, _Reserved(bound, []))
        exchange.hold_set(rules, _micro(bound.most), _micro(bound.least) if bound.clamps else None)

    @hookimpl
    async def explain(self, exchange: Exchange) -> list[str]:
        if exchange.decision is None:
            return []
        if exchange.phase == "accept":
            await self._look(exchange)
            return ["reserves what it may cost when the job runs; until then only what is spent counts"]
        self._hold(exchange)  # it reserves nothing by itself, and edits only what is not sent
        reserved = exchange.get(self.reserved)
        if reserved is None or not reserved.bound.clamps or not exchange.held:
            return []
        held = exchange.held[-1].rules()
        try:
            granted = (await self._services.ledger.peek(held)).granted
        except StoreUnavailable:  # the core says so
            return []
        if not 0 < granted < held[0].amount:
            return []
        tokens = reserved.bound.tokens(granted * 10**6)
        return [
            f"clamps {self.pricing.cap_field(exchange)} to {tokens}: the budgets have {_usd(granted)} USD left for it"
        ]

    def _plan(self, exchange: Exchange) -> _Plan:
        budgets = list(self._budgets)
        if self._config.own_limits and (own := own_limits(exchange)) is not None and own.usd is not None:
            budgets.insert(0, self._own(own))
        always = [budget for budget in budgets if budget.of_caller]
        return _Plan(
            rules := tuple(rule for budget in always for rule in budget.rules(exchange)),
            others := tuple(budget for budget in budgets if not budget.of_caller),
            None if others else self._set(rules),
            min((budget.ends for budget in always), default=math.inf),
        )

    @hookimpl
    async def request_finished(self, exchange: Exchange) -> None:
        if exchange.outcome is Outcome.OK and len(exchange.attempts) == 1:
            return
        # a broken-off attempt, whatever was known of its cost: the true one may be asked for
        charged = {
            a.number: a.cost.micro_usd or 0
            for a in exchange.attempts
            if a.cause is not None and a.generation_id is not None
        }
        if not charged or exchange.admission is None:
            return
        rules = [r for r in exchange.admission.rules if isinstance(r.about, _Compiled) and r.about.owner is self]
        if rules:
            self._correctable[exchange.id] = rules, charged
            if len(self._correctable) > _REMEMBERED:
                self._correctable.popitem(last=False)

    @hookimpl
    async def usage_corrected(self, correction: Correction) -> None:
        rules, charged = self._correctable.get(correction.exchange_id, ((), {}))
        number = int(correction.operation_id.rpartition("/")[2])
        true = correction.cost.micro_usd
        before = charged.pop(number, None)
        if not charged:
            self._correctable.pop(correction.exchange_id, None)
        if true is None or before is None or true == before:
            return
        for rule in rules:
            self._services.ledger.adjust(correction.operation_id, rule, true - before)

    def admitted(self, exchange: Exchange, rules: Sequence[Rule], levels: Sequence[Any], granted: int) -> None:
        """Warns near the limit; cuts the request's output to what was reserved for it, where it set no limit itself."""
        reserved = exchange.get(self.reserved)
        if reserved is None:  # pragma: no cover - set with the rules
            return
        reserved.granted.append(granted)
        for rule, (spent, _) in zip(rules, levels, strict=True):
            compiled: _Compiled = rule.about
            compiled.seen.note(spent / compiled.micro_usd, exchange.started)
            if spent >= compiled.warn_from and len(reserved.granted) == 1:
                self._warn(rule, spent, exchange)
        bound = reserved.bound
        if not bound.clamps or granted >= _micro(bound.most) or len(reserved.granted) > 1:
            return
        tokens = bound.tokens(granted * 10**6)
        name = self.pricing.cap_field(exchange)
        for other in exchange.dialect.output_caps:  # -1, "100" or whatever was no limit for us may be one upstream
            if output_cap(exchange.body, (other,)) is None:
                exchange.body.pop(other, None)
        exchange.body[name] = min(tokens, exchange.body.get(name, tokens))
        exchange.reply_headers["x-xenios-clamped"] = f"{name}={exchange.body[name]}"

    def _warn(self, rule: Rule, spent: int, exchange: Exchange) -> None:
        """The reply says so; the log once."""
        budget: Budget = rule.about.budget
        warning = f"{budget.name}; spent {_usd(spent)} of {_usd(int(budget.usd * 10**6))} USD"
        before = exchange.reply_headers.get("x-xenios-budget-warning")
        exchange.reply_headers["x-xenios-budget-warning"] = f"{before}, {warning}" if before else warning
        if rule.key in self._warned:
            return
        self._warned[rule.key] = None
        if len(self._warned) > _REMEMBERED:
            self._warned.popitem(last=False)
        self._services.log.warning(
            "budget_warning",
            budget=budget.name,
            spent_usd=spent / 1e6,
            limit_usd=float(budget.usd),
            principal=exchange.principal.reference if exchange.principal else None,
            request_id=exchange.request_id,
        )


def _micro(pico: int) -> int:
    return -(-pico // 10**6)


def _usd(micro: int) -> str:
    """Dollars and cents, and more digits where it is less."""
    return f"{micro / 1e6:,.2f}" if micro >= 10**4 or micro == 0 else f"{micro / 1e6:.6f}"


def _set_of(rules: tuple[Rule, ...]) -> RuleSet:
    """One for all requests that fall under these budgets."""
    return RuleSet(rules, any(rule.about.budget.hard for rule in rules))


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
    rules = [r for r in exchange.admission.rules if isinstance(r.about, _Compiled)] if exchange.admission else []
    held = [(rule, exchange.get(rule.about.owner.reserved)) for rule in rules]
    # nothing was, where the store was away: then what it would have been
    granted = max(((of and of.granted) or [rule.amount] for rule, of in held), key=sum, default=[0])
    return granted, any(rule.about.budget.hard for rule in rules)


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


def _refused(rule: Rule, state: State, told: bool) -> None:
    compiled: _Compiled = rule.about
    compiled.seen.note((rule.limit - state.remaining - state.reserved) / compiled.micro_usd, time.monotonic())
    if told:
        compiled.seen.refusals.value += 1


def _refuse(rule: Rule, state: State) -> GatewayError:
    budget: Budget = rule.about.budget
    left = state.remaining
    spent = rule.limit - left - state.reserved
    period = {"total": "", "day": " today"}.get(budget.per, f" this {budget.per}")
    waits = state.reserved > 0 and rule.limit - spent >= max(rule.amount, 1)
    if waits:
        detail = f"{_usd(state.reserved)} USD are reserved by requests under way; try again when they are over"
    elif left > 0:
        detail = f"this request may cost up to {_usd(rule.amount)} USD; set a lower output limit"
    else:
        detail = "nothing is left"
    return RateLimited(
        f"Budget reached ({budget.name}): {_usd(spent)} of {_usd(rule.limit)} USD are spent{period}, and {detail}.",
        type="insufficient_quota",
        code="insufficient_quota",
        # what is only reserved may be there again in a moment, for a job that waits too; what is spent is gone
        should_retry=None if waits else False,
        retry_after=1.0 if waits else None,
    )
