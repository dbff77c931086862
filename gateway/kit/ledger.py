"""What is counted and held for requests, admitted all or none: rate limits, concurrent requests, money, plugins' own.

A plugin's `check_request` names its rules by `exchange.hold(rule, …)`. After all plugins have spoken the core admits
them together: in Redis by ONE Lua call, whatever their number, else in this process. A rule that has no room refuses
the request, and then nothing was taken for any rule. When the request is over, what it really used is settled.

- `rate` is GCRA: a bucket of `burst` units that refills by `limit` in `per` seconds. So in any span of t seconds at
  most burst + limit · t / per units are admitted. What a request uses beyond its estimate is a debt: the bucket goes
  below empty, and later requests wait.
- `slots` are leases of places: one that its worker no longer renews ends by itself.
- `budget` is money (micro-USD): admission reserves, settlement spends. A reservation that its worker no longer renews
  is spent as reserved, and leaves a row. spent + reserved never exceeds the limit at an admission.

Settlement is by operation id, the exchange's: doing it twice, or after the lease ended, ends in the same sums.

Late work (phase `run`) always leaves its operation's row behind, whatever limits there are; and where the operator pays
for what a dead worker had under way, its reservations are given back instead of spent.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from gateway.errors import StoreUnavailable
from gateway.kit.passes import passes
from gateway.limits import Admission, Held, Level, Plan, Rule, State, Verdict, weighed
from gateway.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from gateway.errors import GatewayError
    from gateway.exchange import Exchange

log = get_logger("gateway.ledger")

ENDLESS = 10**15  # micro-USD: the limit of a budget that refuses nobody
PENDING_LIMIT = 100_000  # settlements kept while Redis is away
ROWS_LIMIT = 100_000  # rows that nobody has taken yet
MOVER_SECONDS = 10.0  # a worker that takes rows and isn't heard of for so long has died
SWEEP_EVERY = 10_000


class Row(NamedTuple):
    """What was recorded of an operation: `payload` as given. `abandoned`: reserved, and then never settled."""

    id: str  # for `drop_rows`
    op: str
    payload: bytes
    abandoned: int | None = None  # micro-USD that were reserved


class Ledger(Protocol):
    """In memory and on Redis: the same answers."""

    async def judge(self, op: str, rules: Sequence[Rule], row: bytes = b"", *, give_back: bool = False) -> Verdict:
        """Take for all rules, or for none if one has no room. Raises StoreUnavailable.

        `row` is recorded if the operation is never settled; what was reserved is spent then, or `give_back`. A second
        call for the same operation takes more. A budget's rule of amount 0 takes nothing, and has the operation known.
        """

    def take(self, op: str, plan: Plan, held: Sequence[Held], row: bytes = b"") -> Admission | None:
        """As `judge`, in one pass, if it is known here that all have room. None: nothing was taken, ask `judge`.

        Where the admission is not `noted` yet, await `noted` before the request costs anything.
        """

    async def noted(self, op: str) -> None:
        """Whatever becomes of this process, what was taken is not forgotten. Raises StoreUnavailable."""

    async def peek(self, rules: Sequence[Rule]) -> Verdict:
        """What `judge` would say now of one more operation; nothing is taken. Raises StoreUnavailable."""

    def settle(
        self, op: str, actual: Sequence[tuple[Rule, int | None]], row: bytes = b"", *, admitted: bool = True
    ) -> None:
        """The operation is over: put right what each rule took, and record `row`, both or neither. Does not wait.

        `admitted=False`: the store did not answer at admission. What it spent is booked now; what it took of a rate
        is not: the debt would refuse others once the store is back.
        """

    def give(self, admission: Admission, plan: Plan, used: Sequence[int | None], row: bytes = b"") -> None:
        """As `settle`, in one pass, what was admitted by this plan: `used` is what each of `plan.actual` says."""

    def adjust(self, op: str, rule: Rule, delta: int) -> None:
        """The true cost of a settled operation became known: once per operation and budget. Does not wait."""

    async def rows(self, most: int) -> list[Row]:
        """Rows that are to be stored elsewhere, oldest first; they stay until dropped. Raises StoreUnavailable.

        One worker at a time gets any, so that they are stored in order: it keeps the right while it asks again within
        `MOVER_SECONDS`. Store by `op`: after a failure of the store one may come twice, and an abandoned operation's
        real row later.
        """

    async def drop_rows(self, ids: Sequence[str]) -> None:
        """These rows are stored. Raises StoreUnavailable."""

    async def leave_rows(self) -> None:
        """Another worker may have them now. Raises StoreUnavailable."""

    def take_dropped_rows(self) -> int:
        """How many rows were lost since somebody asked this: they found no place because nobody stored those before, or
        the store was away too long. As far as is known here; each is told once, to one of all workers.
        """

    @property
    def waiting_rows(self) -> int:
        """How many rows nobody has stored yet: those under way from here, and if this worker stores them all others'.
        As of the last `rows`, and about: a settlement without a row counts too.
        """

    async def flush(self) -> bool:
        """What is settled is in the store. False: that can't be reached, and has it later if this process lives on."""

    async def budgets(self, keys: Sequence[str]) -> list[tuple[int, int]]:
        """(spent, reserved) in micro-USD for each budget's key. Raises StoreUnavailable."""

    async def ping(self) -> None:
        """Raises StoreUnavailable."""

    def lifespan(self) -> contextlib.AbstractAsyncContextManager[None]: ...


def _never(rule: Rule, state: State) -> GatewayError:
    raise AssertionError(f"{rule.key} has room for everybody: {state}")


# Held for late work: its operation is known, so that its row is there whatever becomes of its worker.
UNDER_WAY = Rule("core:run", "budget", ENDLESS, _never, amount=0)


def admit_at_once(ledger: Ledger, exchange: Exchange, held: Sequence[Held]) -> bool:
    """Where this process knows that there is room. False: await `admit`."""
    plan = held[0].set.plan(held)
    if not plan.quick or exchange.late is not None:
        return False
    row = exchange.record(exchange) if exchange.record is not None and plan.budgets else b""
    admission = exchange.admission = ledger.take(exchange.id, plan, held, row)  # whatever comes next, it is settled
    if admission is None:
        return False
    levels: Sequence[Level] = admission.levels or ()
    for admitted, rules, places in plan.admitted:
        admitted(exchange, rules, [levels[i] for i in places], admission.granted)
    return admission.noted


async def admit(ledger: Ledger, exchange: Exchange, held: Sequence[Held]) -> None:
    """What `admit_at_once` left to do. Raises what a rule without room says; StoreUnavailable if a rule wants that."""
    if exchange.admission is not None:
        await _noted(ledger, exchange.admission)
        return
    op, row = exchange.id, b""
    if exchange.record is not None and any(rule.kind == "budget" for one in held for rule in one.set.rules):
        row = exchange.record(exchange)
    admission = Admission(op, held)
    rules = admission.rules
    give_back = exchange.late is not None and exchange.charge_abandoned == "operator"
    try:
        verdict = await ledger.judge(op, rules, row, give_back=give_back)
    except StoreUnavailable:
        if any(rule.on_store_error == "deny" for rule in rules):
            raise
        exchange.admission = admission
        return
    if verdict.allowed:
        admission.levels, admission.granted = verdict.levels, verdict.granted
        exchange.admission = admission  # whatever comes next, it is settled
    _take(exchange, rules, verdict)


async def _noted(ledger: Ledger, admission: Admission) -> None:
    try:
        await ledger.noted(admission.op)
    except StoreUnavailable:
        if any(rule.on_store_error == "deny" for rule in admission.rules):
            raise


async def admit_again(ledger: Ledger, exchange: Exchange, admission: Admission) -> None:
    """Before a further attempt: reserve for it too if an earlier one may have cost something. Raises as `admit`."""
    more = [
        msgspec.structs.replace(rule, amount=amount, least=None)
        for rule in admission.rules
        if rule.again is not None and (amount := rule.again(exchange)) > 0
    ]
    if not more or admission.levels is None:
        return
    try:
        verdict = await ledger.judge(admission.op, more)
    except StoreUnavailable:
        if any(rule.on_store_error == "deny" for rule in more):
            raise
        return
    _take(exchange, more, verdict)


def _take(exchange: Exchange, rules: Sequence[Rule], verdict: Verdict) -> None:
    if not verdict.allowed:
        worst, said = refusing(rules, verdict)
        for rule, state in zip(rules, verdict, strict=True):
            if rule.refused is not None:
                rule.refused(rule, state, rule is worst)
        plugin = worst.key.partition(":")[0]
        if any(instance.id == plugin for instance in exchange.snapshot.instances):
            exchange.error_by = f"{plugin}.check_request"
        raise worst.refuse(worst, said)
    for admitted in dict.fromkeys(rule.admitted for rule in rules if rule.admitted is not None):
        of = [(rule, level) for rule, level in zip(rules, verdict.levels, strict=True) if rule.admitted == admitted]
        admitted(exchange, [rule for rule, _ in of], [level for _, level in of], verdict.granted)


def refusing(rules: Sequence[Rule], verdict: Verdict) -> tuple[Rule, State]:
    """Of a verdict that does not allow it: the rule that takes longest to have room again; less would be in vain."""
    judged = list(zip(rules, verdict, strict=True))
    refused = [(rule, state) for rule, state in judged if not state.allowed] or judged
    return max(refused, key=lambda r: float("inf") if r[1].retry_after is None else r[1].retry_after)


def settle(ledger: Ledger, exchange: Exchange) -> None:
    """When a request is over; also if it was admitted without the store, which may be back by now."""
    admission = exchange.admission
    if admission is not None and admission.plan is not None:
        plan = admission.plan
        ledger.give(admission, plan, [_told(exchange, actual) for actual in plan.actual], recorded(exchange))
        return
    actual, row = used(exchange), recorded(exchange)
    if actual or row:
        ledger.settle(exchange.id, actual, row, admitted=admission is None or admission.levels is not None)


def used(exchange: Exchange) -> list[tuple[Rule, int | None]]:
    """What a request that is over took of each rule; None: as reserved."""
    admission = exchange.admission
    actual: list[tuple[Rule, int | None]] = []
    for rule in admission.rules if admission is not None else ():
        if rule.actual is None:
            if rule.kind != "rate":  # what it took stays taken
                actual.append((rule, None))
            continue
        actual.append((rule, _told(exchange, rule.actual)))
    return actual


def _told(exchange: Exchange, actual: Callable[[Exchange], int | None]) -> int | None:
    try:
        return actual(exchange)
    except Exception:
        log.exception("ledger_actual_failed", actual=repr(actual), request_id=exchange.request_id)
        return None


def recorded(exchange: Exchange) -> bytes:
    """Its row; empty if nobody keeps one, or that failed."""
    if exchange.record is None:
        return b""
    try:
        return exchange.record(exchange)
    except Exception:
        log.exception("ledger_record_failed", request_id=exchange.request_id)
        return b""


class _Budget:
    """In memory: micro-USD."""

    __slots__ = ("held", "reserved", "spent", "until")

    def __init__(self, until: float | None) -> None:
        self.spent = 0
        self.reserved = 0  # the sum of `held`
        self.held: dict[str, int] = {}  # by operation
        self.until = until


class MemoryLedger:
    """For one process: counts end with it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}  # rate: when the bucket will be full, in µs (GCRA's TAT)
        self._slots: dict[str, set[str]] = {}
        self._budgets: dict[str, _Budget] = {}
        self._adjusted: dict[tuple[str, str], None] = {}
        self._rows: deque[Row] = deque()
        self._dropped_rows = 0
        self._numbers = 0
        self._calls = 0

    def take(self, op: str, plan: Plan, held: Sequence[Held], row: bytes = b"") -> Admission | None:
        del row
        if plan.compiled is None:
            plan.compiled = passes(plan)
        taking, _, numbers = plan.compiled
        took = taking(op, held, self._now(), self._full_at, self._slots, self._budgets, self._budget, numbers)
        return None if took is None else Admission(op, held, took[0], took[1], plan)

    async def judge(self, op: str, rules: Sequence[Rule], row: bytes = b"", *, give_back: bool = False) -> Verdict:
        del row, give_back  # who would do it, dies with the operation
        now = self._now()
        full_at, slots = self._full_at, self._slots
        levels: list[Any] = []
        budgets: list[tuple[_Budget, int]] = []
        allowed, grant = True, -1
        for rule in rules:
            kind = rule.kind
            if kind == "rate":
                level: Any = full_at.get(rule.key, now) - now
                if level < 0:
                    level = 0.0
                if level + rule.amount * rule.unit > rule.room:
                    allowed = False
            elif kind == "slots":
                level = len(slots.get(rule.key, ()))
                if level >= rule.limit:
                    allowed = False
            else:
                budget = self._budget(rule)
                level = (budget.spent, budget.reserved)
                left, amount = rule.limit - budget.spent - budget.reserved, rule.amount
                budgets.append((budget, amount))
                if left < (amount if rule.least is None else rule.least):
                    allowed = False
                if amount:
                    amount = min(amount, left)
                    if grant < 0 or amount < grant:
                        grant = amount
            levels.append(level)
        if not allowed:
            return Verdict(rules, levels, allowed=False)
        for rule, level in zip(rules, levels, strict=True):
            kind = rule.kind
            if kind == "rate":
                full_at[rule.key] = now + level + rule.amount * rule.unit
            elif kind == "slots":
                slots.setdefault(rule.key, set()).add(op)
        for budget, amount in budgets:
            taken = grant if amount else 0
            budget.held[op] = budget.held.get(op, 0) + taken
            budget.reserved += taken
        return Verdict(rules, levels, allowed=True, granted=max(0, grant))

    def _now(self) -> float:
        """In µs. From time to time what has ended is forgotten."""
        now = self._clock() * 1e6
        self._calls += 1
        if self._calls % SWEEP_EVERY == 0:
            self._sweep(now)
        return now

    async def noted(self, op: str) -> None:
        del op  # it ends with this process

    async def peek(self, rules: Sequence[Rule]) -> Verdict:
        now = self._clock() * 1e6
        return weighed(rules, [self._level(rule, now) for rule in rules])

    def _level(self, rule: Rule, now: float) -> Level:
        if rule.kind == "rate":
            return max(0.0, self._full_at.get(rule.key, now) - now)
        if rule.kind == "slots":
            return len(self._slots.get(rule.key, ()))
        budget = self._budgets.get(rule.key)
        return (budget.spent, budget.reserved) if budget is not None else (0, 0)

    def settle(
        self, op: str, actual: Sequence[tuple[Rule, int | None]], row: bytes = b"", *, admitted: bool = True
    ) -> None:
        del admitted  # this store is never away
        for rule, used in actual:
            if rule.kind == "slots":
                held = self._slots.get(rule.key)
                if held is not None:
                    held.discard(op)
                    if not held:
                        del self._slots[rule.key]
            elif rule.kind == "budget":
                budget = self._budget(rule)
                reserved = budget.held.pop(op, None)
                if reserved is not None:
                    budget.reserved -= reserved
                    budget.spent += reserved if used is None else used
            elif used is not None and used != rule.amount:
                self._move(rule.key, (used - rule.amount) * rule.unit)
        if row:
            self._record(op, row)

    def give(self, admission: Admission, plan: Plan, used: Sequence[int | None], row: bytes = b"") -> None:
        op = admission.op
        _, giving, numbers = plan.compiled
        giving(op, admission.held, used, self._slots, self._budgets, self._budget, self._move, numbers)
        if row:
            self._record(op, row)

    def adjust(self, op: str, rule: Rule, delta: int) -> None:
        if (op, rule.key) not in self._adjusted:
            self._adjusted[op, rule.key] = None
            if len(self._adjusted) > PENDING_LIMIT:
                del self._adjusted[next(iter(self._adjusted))]
            self._budget(rule).spent += delta

    async def rows(self, most: int) -> list[Row]:
        return [self._rows[i] for i in range(min(most, len(self._rows)))]

    async def drop_rows(self, ids: Sequence[str]) -> None:
        gone = set(ids)
        while self._rows and self._rows[0].id in gone:
            self._rows.popleft()

    async def leave_rows(self) -> None: ...

    def take_dropped_rows(self) -> int:
        taken, self._dropped_rows = self._dropped_rows, 0
        return taken

    @property
    def waiting_rows(self) -> int:
        return len(self._rows)

    async def flush(self) -> bool:
        return True

    async def budgets(self, keys: Sequence[str]) -> list[tuple[int, int]]:
        found = (self._budgets.get(key) for key in keys)
        return [(b.spent, b.reserved) if b is not None else (0, 0) for b in found]

    async def ping(self) -> None: ...

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        yield

    def _budget(self, rule: Rule) -> _Budget:
        budget = self._budgets.get(rule.key)
        if budget is None:
            budget = self._budgets[rule.key] = _Budget(rule.until)
        return budget

    def _move(self, key: str, micros: float) -> None:
        now = self._clock() * 1e6
        at = max(now, self._full_at.get(key, 0.0)) + micros
        if at > now:
            self._full_at[key] = at
        else:
            self._full_at.pop(key, None)

    def _record(self, op: str, row: bytes) -> None:
        if len(self._rows) >= ROWS_LIMIT:
            self._dropped_rows += 1
            return
        self._numbers += 1
        self._rows.append(Row(str(self._numbers), op, row))

    def _sweep(self, now: float) -> None:
        self._full_at = {key: at for key, at in self._full_at.items() if at > now}
        date = time.time()
        self._budgets = {
            key: b
            for key, b in self._budgets.items()
            if b.held or (b.spent and (b.until is None or b.until > date))  # who spent nothing may be an invented name
        }
