"""What a request is counted for: rules, what they say of it, and those that requests hold together again and again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.errors import GatewayError
    from gateway.exchange import Exchange


class State(msgspec.Struct, frozen=True, gc=False):
    """One rule after the request was judged. Seconds; `retry_after` is None if waiting does not help."""

    allowed: bool
    remaining: int
    reset: float = 0.0
    retry_after: float | None = None
    granted: int = 0  # budget: what was reserved for the request
    reserved: int = 0  # budget: what others hold


class Rule(msgspec.Struct, eq=False):
    """One limit that one request falls under."""

    key: str  # what is counted together: plugin, rule and subject, such as `rate_limit:per-key:alice:requests`
    kind: Literal["rate", "slots", "budget"]
    limit: int  # rate: units per `per`; slots: how many at once; budget: micro-USD
    refuse: Callable[[Rule, State], GatewayError]  # what the client is told
    per: float = 60.0  # rate: seconds
    burst: int = 0  # rate: the bucket; 0: as large as `limit`
    amount: int = 1  # what the request takes, by estimate where it isn't known yet; budget: its upper bound
    least: int | None = None  # budget: takes what is left if that is at least so much; None: all of `amount`
    until: float | None = None  # budget: when the count may be forgotten, in seconds since 1970
    actual: Callable[[Exchange], int | None] | None = None  # what it took, when it is over; None: as estimated
    # Called when all rules had room, once with all of the request's that name it: what each held before, and what was
    # granted of its budgets.
    admitted: Callable[[Exchange, Sequence[Rule], Sequence[Level], int], None] | None = None
    # Called with its state when the request is refused: does the client hear of this rule, or of another?
    refused: Callable[[Rule, State, bool], None] | None = None
    again: Callable[[Exchange], int] | None = None  # budget: what a further attempt may cost on top, 0 for nothing
    on_store_error: Literal["allow", "deny"] = "deny"
    about: Any = None  # what else its plugin has to know of it; nobody else looks. No subclasses: they cost speed
    name: str = ""  # for people who ask what limits there are: the limit in words
    lease: bool = False  # on Redis: a worker may hold some of it ahead of its requests
    varies: bool = False  # in a RuleSet: the amount is the request's own, as `hold_set` is told
    # What follows from these.
    size: int = 0  # rate: units that the bucket holds
    unit: float = 0.0  # rate: microseconds until one unit has come back
    room: float = 0.0  # rate: the whole bucket, in microseconds

    def __post_init__(self) -> None:
        if self.kind == "rate":
            self.size = self.burst or self.limit
            self.unit = self.per * 1e6 / self.limit
            # half a microsecond: what floats lose must not refuse the bucket's last unit
            self.room = self.size * self.unit + 0.5

    def copy(self) -> Rule:
        """For a request whose amount is its own: a fifth of what making one costs."""
        made: Rule = self.__copy__()  # type: ignore[attr-defined]  # msgspec's
        return made


Level: TypeAlias = "float | tuple[float, float]"  # µs of a bucket, places taken, or (spent, reserved)


class Verdict(Sequence[State]):
    """What the rules of one request say: for each a state, worked out when somebody asks for it."""

    __slots__ = ("_rules", "allowed", "granted", "levels")

    def __init__(self, rules: Sequence[Rule], levels: Sequence[Level], *, allowed: bool, granted: int = 0) -> None:
        """`levels`: what each rule held before. `allowed`: all had room, and it was taken."""
        self._rules = rules
        self.levels = levels
        self.allowed = allowed
        self.granted = granted  # reserved for the request in each of its budgets

    def __len__(self) -> int:
        return len(self._rules)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rule, level = self._rules[index], self.levels[index]
        if isinstance(level, tuple):
            return self._of_budget(rule, self.granted if rule.amount else 0, *level)
        if rule.kind == "slots":
            left = int(rule.limit - level)
            return State(True, left - self.allowed) if left > 0 else State(False, 0, 0.0, 1.0)
        return self._of_rate(rule, level)

    def _of_rate(self, rule: Rule, level: float) -> State:
        unit, amount, room = rule.unit, rule.amount, rule.room - level
        if self.allowed:
            return State(True, int(room / unit) - amount, (level + amount * unit) / 1e6)
        short = amount * unit - room
        if short <= 0:
            return State(True, int(room / unit), level / 1e6)
        wait = (short + 0.5) / 1e6 if amount <= rule.size else None
        return State(False, max(0, int(room / unit)), level / 1e6, wait)

    def _of_budget(self, rule: Rule, granted: int, spent: float, reserved: float) -> State:
        left = int(rule.limit - spent - reserved)
        if self.allowed:
            return State(True, left - granted, 0.0, None, granted, int(reserved))
        least = rule.amount if rule.least is None else rule.least
        return State(least <= left, max(0, left), 0.0, None, 0, int(reserved))


def weighed(rules: Sequence[Rule], levels: Sequence[Level]) -> Verdict:
    """As if it was taken, if all have room."""
    states: Sequence[State] = Verdict(rules, levels, allowed=False)
    allowed = all(state.allowed for state in states)
    grants = [min(r.amount, s.remaining) for r, s in zip(rules, states, strict=True) if r.kind == "budget" and r.amount]
    return Verdict(rules, levels, allowed=allowed, granted=min(grants, default=0))


class RuleSet:
    """Rules that many requests hold together, such as one caller's: made once, they are judged in one pass.

    Of those that are `varies`, each request takes an amount of its own, the same of all.
    """

    __slots__ = ("__weakref__", "_plans", "about", "rules", "varies")

    def __init__(self, rules: Sequence[Rule], about: Any = None) -> None:
        """`about` is its plugin's own."""
        self.rules = tuple(rules)
        self.about = about
        self.varies = any(rule.varies for rule in rules)
        self._plans = _Plans()

    def plan(self, held: Sequence[Held]) -> Plan:
        """Of these, the first of which is this set's."""
        plans = self._plans
        for number in range(1, len(held)):
            other = held[number].set
            with_it = plans.together.get(other)
            if with_it is None:
                with_it = plans.together[other] = _Plans()
            plans = with_it
        plan = plans.plan
        if plan is None:
            plan = plans.plan = Plan([one.set for one in held])
        return plan


class _Plans:
    """Of some sets together: their plan, and those with one set more. A plan goes when one of its sets does: a caller's
    budgets are other ones each hour, and those of an end user may be one request's.
    """

    __slots__ = ("plan", "together")

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.together: weakref.WeakKeyDictionary[RuleSet, _Plans] = weakref.WeakKeyDictionary()


class Held(msgspec.Struct, eq=False):
    """What one plugin holds for one request."""

    set: RuleSet
    amount: int = 0
    least: int | None = None

    def rules(self) -> list[Rule]:
        """Each with what the request takes of it."""
        out = []
        for rule in self.set.rules:
            if rule.varies:
                rule = rule.copy()  # noqa: PLW2901 - the request's own
                rule.amount, rule.least = self.amount, self.least
            out.append(rule)
        return out


class Plan:
    """What judging these sets comes to, worked out once."""

    __slots__ = ("actual", "admitted", "budgets", "compiled", "leases", "quick", "rules")

    def __init__(self, sets: Sequence[RuleSet]) -> None:
        self.rules = [(number, rule) for number, one in enumerate(sets) for rule in one.rules]
        rules = [rule for _, rule in self.rules]
        # What tells what was used: each is asked once for a request.
        self.actual = tuple(dict.fromkeys(rule.actual for rule in rules if rule.actual is not None))
        # (what is called, the rules that name it, their places among all)
        self.admitted = [
            (
                call,
                [rule for rule in rules if rule.admitted == call],
                [i for i, r in enumerate(rules) if r.admitted == call],
            )
            for call in dict.fromkeys(rule.admitted for rule in rules if rule.admitted is not None)
        ]
        self.budgets = any(rule.kind == "budget" for rule in rules)
        # May it be judged in one pass? Rare kinds of rules are not worth code of their own.
        self.quick = len({rule.key for rule in rules}) == len(rules) and all(
            rule.varies or (rule.kind != "budget" and rule.actual is None) for rule in rules
        )
        self.leases = self.quick and all(rule.lease for rule in rules)
        self.compiled: Any = None  # the ledger's

    def told(self, rule: Rule) -> int | None:
        """Which of `actual` says what was used of this rule; None: it was as reserved."""
        return None if rule.actual is None else self.actual.index(rule.actual)


class Admission(msgspec.Struct, eq=False):
    """The rules of one admitted request, and what they held before; `levels` is None if the store was away."""

    op: str
    held: Sequence[Held]
    levels: Sequence[Level] | None = None
    granted: int = 0
    plan: Plan | None = None  # how it was judged, if it was in one pass
    noted: bool = True  # False: the store is about to be told of it; see `Ledger.noted`
    made: Sequence[Rule] | None = None

    @property
    def rules(self) -> Sequence[Rule]:
        """Each with what the request takes of it."""
        if self.made is None:
            self.made = [rule for held in self.held for rule in held.rules()]
        return self.made

    @property
    def states(self) -> Sequence[State]:
        """What each rule said; empty if the store was away."""
        return () if self.levels is None else Verdict(self.rules, self.levels, allowed=True, granted=self.granted)
