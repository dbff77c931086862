"""Rules, tasks and aliases, compiled: which of them a request meets, and the decision that it makes.

A request is reduced to what the rules read of it: the name asked for, the caller's team, one header, the minute … Which
rule such a request meets is found out once and remembered, and so is its decision where nothing else of the request
makes it another one. A hundred rules then cost what one does.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import msgspec

from gateway import BadRequest, ContextKey, Decision, Forbidden, Limits, Target, conditions
from gateway.kit import clean, end_user, input_estimate
from gateway_plugins.routing import native
from gateway_plugins.routing.cost import worst_case
from gateway_plugins.routing.settings import HEADER, PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from gateway import Cause, Condition, Exchange, Services
    from gateway_plugins.routing import settings

_REMEMBERED = 1000
_LONGEST_REMEMBERED = 1000  # characters
_PICO = 10**12


# --- what is asked for ------------------------------------------------------------------------------------------------


class Asked(msgspec.Struct, frozen=True):
    """`name` is what rules compare with `models`: a task asked for by header is the same as by name."""

    model: str
    task: str
    name: str


_ASKED: ContextKey[Asked] = ContextKey("asked")


def ask(exchange: Exchange) -> Asked:
    """What the request asks for as its body stands now; kept for the conditions, which each want it."""
    body, header = exchange.body, exchange.request.header(HEADER)
    # OpenRouter's clients may send a list of models instead: its first
    model = str(body.get("model") or next(iter(body.get("models") or ()), ""))
    task = header.strip() if header else model[len(PREFIX) :] if model.startswith(PREFIX) else ""
    return exchange.set(_ASKED, Asked(model, task, PREFIX + task if task else model))


def _asked(exchange: Exchange) -> Asked:
    return exchange.get(_ASKED) or ask(exchange)


# --- compiled ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A target; without a model it stands for what would answer without its rule. `most`: pico-USD, None: no limit."""

    target: Target
    most: int | None = None

    def over(self, base: Entry) -> Entry:
        """`base` with what this one changes of it."""
        mine, theirs = self.target, base.target
        overrides = {**theirs.overrides, **mine.overrides}
        if "provider" in mine.overrides and "provider" in theirs.overrides:
            overrides["provider"] = {**theirs.overrides["provider"], **mine.overrides["provider"]}
        target = Target(
            theirs.model,
            mine.upstream or theirs.upstream,
            overrides,
            (*theirs.strip, *mine.strip),
            filled(mine.limits, theirs.limits),
        )
        return Entry(target, base.most if self.most is None else self.most)


class Route:
    """A rule's, task's or alias' `use` or `split`, and its limits."""

    def __init__(
        self,
        name: str,
        sides: Sequence[tuple[float, tuple[Entry, ...]]],
        way: settings.Rule | settings.Task | None = None,
    ) -> None:
        self.name = name
        weights = list(accumulate(weight for weight, _ in sides))
        self._ends = [weight / weights[-1] for weight in weights]
        self._sides = [entries for _, entries in sides]
        self._sticky = way.sticky if way else None
        self.timeout = way.timeout if way else None
        self.fallback_on: frozenset[Cause] | None = (
            None if way is None or way.fallback_on is None else frozenset(way.fallback_on)
        )
        others = bool(way and way.others_follow)
        self.orders = [
            (*side, *(e for other in self._sides if other is not side for e in other if others)) for side in self._sides
        ]
        self.shares = [f"{weight:g} of {weights[-1]:g}" for weight, _ in sides]
        self.keeps_name = any(not entry.target.model for side in self._sides for entry in side)

    @property
    def is_split(self) -> bool:
        return len(self._sides) > 1

    def side(self, exchange: Exchange, draw: Callable[[Exchange], float]) -> int:
        """The same for the same user, session or key on every worker, and whatever else the rules are."""
        if len(self._sides) == 1:
            return 0
        subject = self._subject(exchange)
        share = fraction(f"{self.name}\0{subject}") if subject else draw(exchange)
        return min(bisect_right(self._ends, share), len(self._sides) - 1)

    def _subject(self, exchange: Exchange) -> str:
        """Whose side it is; empty: nobody's. Users and sessions are their tenant's own."""
        who = exchange.principal
        if self._sticky is None or (self._sticky == "key" and who is None):
            return ""
        if self._sticky == "key":
            return who.reference if who else ""
        if self._sticky == "user":
            named = end_user(exchange.body)
        else:
            session = exchange.body.get("session_id") or exchange.request.header("x-session-id")
            named = session if isinstance(session, str) else ""
        return f"{who.tenant if who else ''}\0{named}" if named else ""


def fraction(text: str) -> float:
    """0 ≤ x < 1, the same for the same text, evenly spread over texts."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()) / 2**48


class Rule(NamedTuple):
    """A rule of the list."""

    name: str
    conditions: tuple[Condition, ...]
    route: Route | None
    refuse: str | None
    offload: bool = False


class Task(NamedTuple):
    """What a task adds to every target, whichever rule chose it."""

    name: str
    route: Route | None
    rule: str | None  # that it names
    limits: Limits | None
    timeout: float | None
    fallback_on: frozenset[Cause] | None
    most: int | None
    defaults: Mapping[str, Any]
    schema: settings.AnswerSchema | None


@dataclass(slots=True, eq=False)
class Way:
    """What becomes of requests that are alike to the rules. `rule` None: they meet none."""

    asked: str
    rule: Rule | None
    task: Task | None
    route: Route | None
    base: Route | None  # what would answer without the rule
    alias: str | None
    touchy: frozenset[str]  # body fields that make the decision another one
    plain: dict[int, Decision] = field(default_factory=dict)  # by side, without those fields

    @property
    def rule_name(self) -> str | None:
        return self.rule.name if self.rule else self.task.rule if self.task else None


class Table:
    """All that the configuration says, ready to be asked."""

    def __init__(self, config: settings.Config, services: Services) -> None:
        self._services = services
        upstreams = services.settings.upstreams
        self._kinds = {name: upstream.kind for name, upstream in upstreams.items()}
        self._default = services.settings.upstream.default
        self._served_by = {m: o.upstream for m, o in services.settings.catalogue.overrides.items() if o.upstream}
        self._native = config.native_fallback == "openrouter"
        self.rules = [self._rule(rule) for rule in config.rules]
        routes = {rule.name: rule.route for rule in self.rules}
        self.tasks = {name: self._task(name, task, routes) for name, task in config.tasks.items()}
        self.aliases = {
            name: Route(f"alias {name}", [(1, tuple(self._entry(e) for e in use))])
            for name, use in config.aliases.items()
        }
        self._refuses = any(rule.refuse is not None for rule in self.rules)
        self._reads = _reads(config, self.rules)
        self._kept: dict[tuple[Hashable, ...], Way] = {}

    # --- at start-up ---

    def _rule(self, rule: settings.Rule) -> Rule:
        found = conditions(rule.conditions, model=lambda ex: _asked(ex).name, task=lambda ex: _asked(ex).task or None)
        route = Route(f"rule {rule.name}", self._sides(rule), rule) if rule.sides else None
        return Rule(rule.name, found, route, rule.refuse, rule.offload)

    def _task(self, name: str, task: settings.Task, routes: Mapping[str, Route | None]) -> Task:
        route = routes.get(task.rule) if task.rule else None
        if task.sides:
            route = Route(f"task {name}", self._sides(task), task)
        causes = None if task.fallback_on is None else frozenset(task.fallback_on)
        return Task(
            name,
            route,
            task.rule,
            _limits(task.timeouts),
            task.timeout,
            causes,
            _pico(task.max_usd),
            task.defaults,
            task.response_format,
        )

    def _sides(self, way: settings.Rule | settings.Task) -> list[tuple[float, tuple[Entry, ...]]]:
        limits, most = _limits(way.timeouts), _pico(way.max_usd)
        return [(side.weight, tuple(self._entry(e, limits, most) for e in side.use)) for side in way.sides]

    def _entry(self, entry: settings.TargetEntry, limits: Limits | None = None, most: int | None = None) -> Entry:
        overrides = dict(entry.set)
        if entry.provider is not None:
            overrides["provider"] = entry.provider.model_dump(mode="json", exclude_none=True)
        upstream = self.upstream_of(entry)
        own = filled(_limits(entry.timeouts), limits)
        target = Target(entry.model or "", upstream, overrides, entry.strip, own)
        return Entry(target, most if entry.max_usd is None else _pico(entry.max_usd))

    def upstream_of(self, entry: settings.TargetEntry) -> str:
        """Where its model is served; "" where it has none of its own."""
        return entry.upstream or (self._place(entry.model) if entry.model else "")

    def _place(self, model: str) -> str:
        return self._served_by.get(model, self._default)

    # --- each request ---

    def decide(self, exchange: Exchange, draw: Callable[[Exchange], float]) -> Decision | None:
        """None: the asked model where the settings place it. Raises BadRequest or Forbidden."""
        asked = ask(exchange)
        model, task = asked.model, asked.task
        key: tuple[Hashable, ...] = (model, task, exchange.route.endpoint)
        if self._reads:
            key += tuple([read(exchange) for read in self._reads])
        way = self._kept.get(key)
        if way is None:
            way = self._way(exchange, model, task)
            # clients choose names and headers: what is remembered is bounded
            if len(repr(key)) <= _LONGEST_REMEMBERED:
                if len(self._kept) >= _REMEMBERED:
                    self._kept.clear()
                self._kept[key] = way
        return self._decided(way, exchange, draw)

    def _way(self, exchange: Exchange, asked: str, name: str) -> Way:
        task = self._known_task(exchange, name) if name else None
        alias = None if task else self.aliases.get(asked)
        own = base = task.route if task else alias
        if own is None and task is None:
            base = Route("asked", [(1, (Entry(Target(asked, self._place(asked))),))])
        touchy = frozenset({*native.LISTS, *(task.defaults if task else ())})
        if task and task.schema and exchange.dialect.schema_at:
            touchy |= {exchange.dialect.schema_at[0]}
        rule = self._met(exchange)
        if rule is None:
            return Way(asked, None, task, own, base, asked if alias else None, touchy)
        # an alias of its own; but whoever may ask for any alias may not ask for any model by a rule that keeps its name
        keeps_name = alias is None and rule.route is not None and rule.route.keeps_name
        return Way(asked, rule, task, rule.route, base, None if task or keeps_name else asked, touchy)

    def _met(self, exchange: Exchange) -> Rule | None:
        for rule in self.rules:
            for condition in rule.conditions:
                if not condition.test(exchange):
                    break
            else:
                return rule
        return None

    def _known_task(self, exchange: Exchange, name: str) -> Task:
        task = self.tasks.get(name)
        if task is None:
            scopes = exchange.principal.scopes if exchange.principal else None
            known = ", ".join(n for n in self.tasks if scopes is None or scopes.allows("tasks", n))
            raise BadRequest(
                f"There is no task {name[:100]!r}. {f'Known: {known}.' if known else 'None is known.'}",
                param=HEADER if exchange.request.header(HEADER) else "model",
                code="unknown_task",
            )
        return task

    def _decided(self, way: Way, exchange: Exchange, draw: Callable[[Exchange], float]) -> Decision | None:
        if way.rule is not None and way.rule.refuse is not None:
            raise Forbidden(way.rule.refuse, code="refused_by_rule", should_retry=False, headers=_named(way.rule.name))
        is_plain = way.touchy.isdisjoint(exchange.body)
        if way.route is None:
            if way.task is not None:
                raise _no_models(way.task)
            if is_plain:
                return None
        side = way.route.side(exchange, draw) if way.route is not None else 0
        known = way.plain.get(side) if is_plain else None
        if known is not None:
            return known
        entries, depends = self._entries(way, exchange, side, draw)
        decision = self._made(way, exchange, side, entries)
        if is_plain and not depends:
            way.plain[side] = decision
        return decision

    def _entries(
        self, way: Way, exchange: Exchange, side: int, draw: Callable[[Exchange], float]
    ) -> tuple[list[Entry], bool]:
        """The way's targets in order, before anything is left out. And: does that depend on more than its side?"""
        most = way.task.most if way.task else None
        route, base = way.route or way.base, way.base
        depends = False
        out: list[Entry] = []
        for entry in route.orders[side] if route else ():
            found: Sequence[Entry] = (entry,)
            if not entry.target.model:
                if base is None:
                    raise _no_models(way.task)
                depends = depends or base.is_split
                found = [entry.over(other) for other in base.orders[base.side(exchange, draw)]]
            out += [replace(e, most=most) if e.most is None and most is not None else e for e in found]
        return out, depends or any(entry.most is not None for entry in out)

    def _made(self, way: Way, exchange: Exchange, side: int, entries: Sequence[Entry]) -> Decision:
        route, task = way.route, way.task
        reasons = [_why(way)]
        if route is not None and route.is_split:
            reasons.append(f"split: {route.shares[side]}")
        lists = not exchange.body.keys().isdisjoint(native.LISTS)
        everything = [*entries, *self._further(exchange, entries)] if lists else entries
        added = self._added(task, exchange) if task else {}
        limits = task.limits if task else None
        targets: list[Target] = []
        for entry in everything:
            target = entry.target
            if added or limits:
                overrides = {**added, **target.overrides}
                target = replace(target, overrides=overrides, limits=filled(target.limits, limits))
            if entry.most is not None:
                reason = self._too_dear(exchange, target, entry.most)
                if reason:
                    reasons.append(f"{target.name} left out: {reason}")
                    continue
            targets.append(native.consumed(target) if lists else target)
        if not targets:
            raise BadRequest(
                f"This request may cost more than is allowed for it ({'; '.join(reasons[1:])}). "
                "Send less, or set a smaller output limit.",
                code="cost_ceiling",
                should_retry=False,
                headers=_named(way.rule_name),
            )
        offload = way.rule is not None and way.rule.offload
        if offload:
            reasons.append("it becomes a job")
        # the nearest that says something: the rule, what it only changes, the task
        said = [w for w in (route, way.base if route and route.keeps_name else None, task) if w is not None]
        causes = next((w.fallback_on for w in said if w.fallback_on is not None), None)
        if self._native and causes is None:  # OpenRouter goes by causes of its own
            targets = native.grouped(targets, lambda name: self._kinds.get(name) == "openrouter")
            if lists:
                targets = [_lists_none(t) for t in targets]
        return Decision(
            way.asked,
            tuple(targets),
            task=task.name if task else None,
            alias=way.alias,
            rule=way.rule_name,
            offload=offload,
            reasons=tuple(reasons),
            fallback_on=causes,
            timeout=next((w.timeout for w in said if w.timeout is not None), None),
        )

    def _added(self, task: Task, exchange: Exchange) -> dict[str, Any]:
        """The task's defaults that the client did not send."""
        body = exchange.body
        added = {name: value for name, value in task.defaults.items() if name not in body}
        schema = task.schema
        if schema is not None and exchange.dialect.answer_form(body) is None:
            name = schema.name or task.name.replace(".", "_")
            added |= exchange.dialect.with_schema(body, name, schema.json_schema, strict=schema.strict)
        return added

    def _further(self, exchange: Exchange, entries: Sequence[Entry]) -> Iterator[Entry]:
        """What the client lists besides: models and aliases, each once, within the limit of what it asked for first."""
        seen = {(e.target.model, e.target.upstream) for e in entries}
        most = next((e.most for e in entries if e.most is not None), None)
        for name, fields in native.listed(exchange):
            self._refuse_listed(exchange, name)
            alias = self.aliases.get(name)
            found = alias.orders[0] if alias else (Entry(Target(name, self._place(name))),)
            for entry in found:
                target = replace(entry.target, overrides={**fields, **entry.target.overrides})
                if (target.model, target.upstream) not in seen:
                    seen.add((target.model, target.upstream))
                    yield Entry(target, most)

    def _refuse_listed(self, exchange: Exchange, name: str) -> None:
        """A rule that refuses a model refuses it further on in a request too."""
        if not self._refuses:
            return
        asked = _asked(exchange)
        exchange.set(_ASKED, Asked(name, "", name))
        rule = self._met(exchange)
        exchange.set(_ASKED, asked)
        if rule is not None and rule.refuse is not None:
            raise Forbidden(rule.refuse, code="refused_by_rule", should_retry=False)

    def _too_dear(self, exchange: Exchange, target: Target, most: int) -> str | None:
        cost = worst_case(exchange, target, self._services)
        if cost is None:
            return "its price is not known"
        return f"up to ${cost / _PICO:.4f}, allowed are ${most / _PICO:g}" if cost > most else None

    # --- for people ---

    def tried(self, exchange: Exchange) -> Iterator[str]:
        """Each rule up to the one that decides, and why it does or does not. Raises BadRequest for an unknown task."""
        task = ask(exchange).task
        if task:
            self._known_task(exchange, task)
        for rule in self.rules:
            failed = next((c for c in rule.conditions if not c.test(exchange)), None)
            yield f"rule {rule.name}: {'matches' if failed is None else f'no, {failed.found(exchange)}'}"
            if failed is None:
                return


def _reads(config: settings.Config, rules: Sequence[Rule]) -> tuple[Callable[[Exchange], Hashable], ...]:
    """All that the rules read of a request beside its name, task and endpoint."""
    found = {(c.field, c.of): c.reads for rule in rules for c in rule.conditions}
    sizes = [rule.conditions.input_tokens for rule in config.rules if rule.conditions and rule.conditions.input_tokens]
    if sizes:  # between two ends that rules name, all sizes are alike
        ends = sorted({end for size in sizes for end in (size.min, size.max and size.max + 1) if end is not None})
        found["input_tokens", ""] = lambda ex: bisect_right(ends, input_estimate(ex))
    return tuple(read for (field, _), read in found.items() if field not in {"models", "tasks", "endpoint"})


def _why(way: Way) -> str:
    of_task = f"task {way.task.name}" if way.task else ""
    if way.rule_name:
        return f"rule {way.rule_name}{f' for {of_task}' if of_task else ''}"
    return of_task or (f"alias {clean(way.asked)}" if way.alias else "the models that the request names")


def _named(rule: str | None) -> dict[str, str]:
    """The header that names the rule where no decision does, written as the core writes it."""
    if not rule:
        return {}
    return {"x-xenios-rule": rule if rule.isascii() and rule.isprintable() else quote(rule, safe="/:@ ")}


def _no_models(task: Task | None) -> BadRequest:
    name = task.name if task else ""
    return BadRequest(f"No rule says which model this request's task {name!r} is for.", code="no_route")


def _lists_none(target: Target) -> Target:
    """A group's own `models` must not be stripped with the client's."""
    if "models" not in target.overrides:
        return target
    return replace(target, strip=tuple(name for name in target.strip if name != "models"))


def filled(limits: Limits | None, others: Limits | None) -> Limits | None:
    """`limits`, and those of `others` where it says nothing."""
    if limits is None or others is None:
        return limits or others
    return limits.over(others)


def _limits(timeouts: settings.Timeouts | None) -> Limits | None:
    return Limits(timeouts.first_event, timeouts.stall, timeouts.total) if timeouts else None


def _pico(usd: float | None) -> int | None:
    return None if usd is None else round(usd * _PICO)
