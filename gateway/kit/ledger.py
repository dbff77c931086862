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

import asyncio
import contextlib
import secrets
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from gateway.errors import StatementError, StoreUnavailable
from gateway.kit.passes import passes
from gateway.limits import Admission, Held, Level, Plan, Rule, State, Verdict, weighed
from gateway.logs import get_logger, worth_a_line
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from gateway.errors import GatewayError
    from gateway.exchange import Exchange
    from gateway.stores.redis import RedisStore

log = get_logger("gateway.ledger")

ENDLESS = 10**15  # micro-USD: the limit of a budget that refuses nobody
LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
SETTLE_SECONDS = 0.02
PENDING_LIMIT = 100_000  # settlements kept while Redis is away
ROWS_LIMIT = 100_000  # rows that nobody has taken yet
MOVER_SECONDS = 10.0  # a worker that takes rows and isn't heard of for so long has died
RETRY_SECONDS = 0.5
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
        """As `judge`, in one pass, if it is known here that all have room. None: nothing was taken, ask `judge`."""

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


def admit_at_once(ledger: Ledger, exchange: Exchange, held: Sequence[Held]) -> Admission | None:
    """Where this process knows that there is room. None: ask `admit`."""
    plan = held[0].set.plan(held)
    if not plan.quick or exchange.late is not None:
        return None
    row = exchange.record(exchange) if exchange.record is not None and plan.budgets else b""
    admission = ledger.take(exchange.id, plan, held, row)
    if admission is not None and plan.admitted:
        levels: Sequence[Level] = admission.levels or ()
        for admitted, rules, places in plan.admitted:
            admitted(exchange, rules, [levels[i] for i in places], admission.granted)
    return admission


async def admit(ledger: Ledger, exchange: Exchange, held: Sequence[Held]) -> Admission:
    """Raises what the rule without room says, or StoreUnavailable if a rule wants that."""
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
        return admission
    _take(exchange, rules, verdict)
    admission.levels, admission.granted = verdict.levels, verdict.granted
    return admission


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
        self._budgets = {key: b for key, b in self._budgets.items() if b.held or b.until is None or b.until > date}


# All keys of the ledger carry one hash tag: a Cluster keeps them on one node, as one call on several keys needs.
PREFIX = "{xenios}:ledger:"
LEASES = PREFIX + "leases"  # sorted set: operation → when its reservations are spent as reserved
# Hash of one operation: budget's key → reserved; `~row`; `~back` if it is to be given back, not spent; `~gone` once it
# was reaped: then budget's key → what was spent.
OPERATION = PREFIX + "op:"
ADJUSTED = PREFIX + "adjusted:"  # operation and budget that were charged without a reservation
ROWS = PREFIX + "rows"  # stream
DROPPED = PREFIX + "dropped"  # how many rows found no place in it
MOVER = PREFIX + "mover"  # the worker that takes rows

_TIME = """
local now = tonumber(ARGV[1])
if now == 0 then local t = redis.call('TIME'); now = t[1] * 1000000 + t[2] end
local lease = tonumber(ARGV[2])
local function text(n) return string.format('%.0f', n) end
"""

# KEYS: one per rule, then the operation's and the leases. ARGV: the time in µs (0: Redis's own), the lease in µs, the
# operation, its row, '1' if it is to be given back, then four per rule:
#   'r', the bucket's size in µs, what the request takes in µs, '';
#   's', the number of slots, operations that are over but whose slots may not have been freed yet, '';
#   'b', the limit, the least and the most to reserve as 'least most', when the count may be forgotten in ms or ''.
# Returns 1 or 0, then each rule's level before, as text.
_JUDGE = (
    _TIME
    + """
local op, n = ARGV[3], #KEYS - 2
local out, ok, grant, budgets = {1}, true, nil, false
for i = 1, n do
  local key, p = KEYS[i], 4 * i + 2
  local kind, room, level = ARGV[p], tonumber(ARGV[p + 1]), nil
  if kind == 's' then
    for over in string.gmatch(ARGV[p + 2], '%S+') do redis.call('ZREM', key, over) end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    level = redis.call('ZCARD', key)
    if level >= room then ok = false end
  elseif kind == 'b' then
    local held = redis.call('HMGET', key, 'spent', 'reserved')
    local spent, reserved = tonumber(held[1] or 0), tonumber(held[2] or 0)
    local least, most = string.match(ARGV[p + 2], '(%d+) (%d+)')
    local left = room - spent - reserved
    if left < tonumber(least) then ok = false end
    if most ~= '0' then grant = math.min(grant or left, left, tonumber(most)) end
    budgets = true
    level = text(spent) .. ' ' .. text(reserved)
  else
    level = math.max(0, tonumber(redis.call('GET', key) or 0) - now)
    if level + tonumber(ARGV[p + 2]) > room + 0.5 then ok = false end
    level = string.format('%.3f', level)
  end
  out[i + 1] = tostring(level)
end
if not ok then out[1] = 0; return out end
local gone = budgets and redis.call('HEXISTS', KEYS[n + 1], '~gone')
for i = 1, n do
  local key, p = KEYS[i], 4 * i + 2
  local kind = ARGV[p]
  if kind == 's' then
    redis.call('ZADD', key, now + lease, op)
    redis.call('PEXPIRE', key, math.ceil(lease / 1000) * 2)
  elseif kind == 'b' then
    -- an operation whose lease ended was charged what it had reserved: what it takes on top is charged too
    local taken = string.sub(ARGV[p + 2], -2) == ' 0' and 0 or grant
    redis.call('HINCRBY', key, gone == 1 and 'spent' or 'reserved', text(taken))
    if ARGV[p + 3] ~= '' then redis.call('PEXPIREAT', key, ARGV[p + 3]) end
    redis.call('HINCRBY', KEYS[n + 1], key, text(taken))
  else
    local ahead = tonumber(out[i + 1]) + tonumber(ARGV[p + 2])
    redis.call('SET', key, string.format('%.3f', now + ahead), 'PX', math.ceil(ahead / 1000) + 1)
  end
end
if budgets then
  if ARGV[4] ~= '' then redis.call('HSET', KEYS[n + 1], '~row', ARGV[4]) end
  if ARGV[5] ~= '' then redis.call('HSET', KEYS[n + 1], '~back', '1') end
  if gone == 0 then redis.call('ZADD', KEYS[n + 2], now + lease, op) end
end
return out
"""
)

# KEYS: one per rule. ARGV: the time, the lease, then each rule's kind. Returns each rule's level, as text.
_PEEK = (
    _TIME
    + """
local out = {}
for i, key in ipairs(KEYS) do
  local kind = ARGV[i + 2]
  if kind == 'slots' then
    out[i] = text(redis.call('ZCOUNT', key, '(' .. text(now), '+inf'))
  elseif kind == 'budget' then
    local held = redis.call('HMGET', key, 'spent', 'reserved')
    out[i] = text(tonumber(held[1] or 0)) .. ' ' .. text(tonumber(held[2] or 0))
  else
    out[i] = string.format('%.3f', math.max(0, tonumber(redis.call('GET', key) or 0) - now))
  end
end
return out
"""
)

# KEYS: one per change. ARGV: the time, the lease, then four per change: its kind, operation, value, and more.
#   'r' moves a bucket by µs; 's' frees a slot; 'l' renews a slot's lease; 'k' a reservation's.
#   'b' spends the value of what an operation reserved ('' all). More is 'charge' if it is to be spent also without a
#   reservation, and how many seconds this is remembered.
#   'w' records the value as a row.
_SETTLE = (
    _TIME
    + f"""
local leases, operation, adjusted, rows, dropped =
  '{LEASES}', '{OPERATION}', '{ADJUSTED}', '{ROWS}', '{DROPPED}'
"""
    + f"""
for i, key in ipairs(KEYS) do
  local p = 4 * i - 1
  local kind, op, value, more = ARGV[p], ARGV[p + 1], ARGV[p + 2], ARGV[p + 3]
  if kind == 'r' then
    local ahead = math.max(0, tonumber(redis.call('GET', key) or 0) - now) + tonumber(value)
    if ahead > 0 then
      redis.call('SET', key, string.format('%.3f', now + ahead), 'PX', math.ceil(ahead / 1000) + 1)
    else
      redis.call('DEL', key)
    end
  elseif kind == 's' then
    redis.call('ZREM', key, op)
  elseif kind == 'l' then
    redis.call('ZADD', key, now + lease, op)
    redis.call('PEXPIRE', key, math.ceil(lease / 1000) * 2)
  elseif kind == 'k' then
    redis.call('ZADD', key, 'XX', now + lease, op)
  elseif kind == 'w' then
    if redis.call('XLEN', rows) >= {ROWS_LIMIT} then
      redis.call('INCR', dropped)
    else
      redis.call('XADD', rows, '*', 'op', op, 'row', value)
    end
  else
    local held = operation .. op
    local amount = redis.call('HGET', held, key)
    if amount then
      local spent = value == '' and amount or value
      if redis.call('HEXISTS', held, '~gone') == 1 then
        spent = tonumber(spent) - tonumber(amount)
      else
        redis.call('HINCRBY', key, 'reserved', text(0 - amount))
      end
      redis.call('HINCRBY', key, 'spent', text(tonumber(spent)))
      redis.call('HDEL', held, key)
      local rest = redis.call('HLEN', held)
      for _, own in ipairs({{'~gone', '~row', '~back'}}) do rest = rest - redis.call('HEXISTS', held, own) end
      if rest == 0 then
        redis.call('DEL', held)
        redis.call('ZREM', leases, op)
      end
    elseif string.sub(more, 1, 6) == 'charge' then
      local mark = adjusted .. op .. ':' .. key
      if redis.call('EXISTS', mark) == 0 then
        redis.call('HINCRBY', key, 'spent', text(tonumber(value)))
        redis.call('SET', mark, '1', 'EX', 86400)
      end
    end
  end
end
return 1
"""
)

# KEYS: the leases. Spends what dead workers had reserved, or gives it back, and records it. Returns how many operations
# it found.
_REAP = (
    _TIME
    + f"""
local ended = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 100)
for _, op in ipairs(ended) do
  redis.call('ZREM', KEYS[1], op)
  local held = '{OPERATION}' .. op
  local fields, most, row = redis.call('HGETALL', held), '0', nil
  local back = redis.call('HEXISTS', held, '~back') == 1
  for i = 1, #fields, 2 do
    local key, amount = fields[i], fields[i + 1]
    if key == '~row' then
      row = amount
    elseif key ~= '~gone' and key ~= '~back' then
      redis.call('HINCRBY', key, 'reserved', text(0 - amount))
      if back then
        redis.call('HSET', held, key, '0')
      else
        redis.call('HINCRBY', key, 'spent', amount)
      end
      if tonumber(amount) > tonumber(most) then most = amount end
    end
  end
  if #fields > 0 then
    redis.call('HSET', held, '~gone', '1')
    redis.call('EXPIRE', held, 86400)
    if row then redis.call('XADD', '{ROWS}', '*', 'op', op, 'row', row, 'abandoned', most) end
  end
end
return #ended
"""
)

# KEYS: the mover, the rows, the count of those dropped. ARGV: the asker, how long it may, how many rows.
# Returns, if the asker may have them: that count, which then begins anew, how many rows there are, and the rows.
_TAKE_ROWS = """
local mover = redis.call('GET', KEYS[1])
if mover and mover ~= ARGV[1] then return {'0', 0, {}} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local dropped = redis.call('GET', KEYS[3]) or '0'
redis.call('DEL', KEYS[3])
return {dropped, redis.call('XLEN', KEYS[2]), redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', ARGV[3])}
"""

# KEYS: the mover. ARGV: who leaves.
_LEAVE_ROWS = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 1"

_REPEATABLE = frozenset("sbw")  # settling these twice does no harm


class _Change(NamedTuple):
    key: str
    kind: str
    op: str
    value: str | bytes = ""
    more: str = ""


class RedisLedger:
    """Exact over all workers and gateways that share the Redis."""

    def __init__(self, store: RedisStore, clock: Callable[[], float] | None = None) -> None:
        """`clock` (seconds) replaces Redis's own time, for tests."""
        self._store = store
        self._clock = clock
        # One tuple per operation: what belongs together goes in one call.
        self._pending: deque[tuple[_Change, ...]] = deque()
        self._held: dict[tuple[str, str, str], None] = {}  # (key, kind of renewal, operation), until settled
        # Slots freed here, but perhaps not yet in Redis: a client that sends one request after the other must not
        # meet its own last one.
        self._freed: dict[str, list[str]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._flushing = asyncio.Lock()
        self._tasks = Tasks()
        self._name = secrets.token_hex(8)
        self._returned = float("-inf")
        self.lost = 0  # settlements that never reached Redis
        self._dropped_rows = 0
        self._in_stream = 0  # rows, as the worker that takes them last saw it
        store.on_return.append(self._on_return)

    async def judge(self, op: str, rules: Sequence[Rule], row: bytes = b"", *, give_back: bool = False) -> Verdict:
        verdict = await self._judge(op, rules, row, give_back)
        if not verdict.allowed and any(
            not s.allowed and (r.kind == "slots" or s.reserved) for r, s in zip(rules, verdict, strict=True)
        ):
            # What stands in the way may be over already, and its settlement under way here or in another worker.
            await asyncio.sleep(SETTLE_SECONDS * 1.5)
            verdict = await self._judge(op, rules, row, give_back)
        return verdict

    async def _judge(self, op: str, rules: Sequence[Rule], row: bytes, give_back: bool) -> Verdict:
        if self._store.is_open:
            raise StoreUnavailable
        keys, taken = [], []
        arguments = [self._now(), int(LEASE_SECONDS * 1e6), op, row, "1" if give_back else ""]
        for rule in rules:
            key = PREFIX + rule.key
            keys.append(key)
            if rule.kind == "slots":
                arguments += ("s", rule.limit, " ".join(self._freed.get(key, ())), "")
                taken.append((key, "l", op))
            elif rule.kind == "budget":
                least = rule.amount if rule.least is None else rule.least
                until = "" if rule.until is None else int(rule.until * 1000)
                arguments += ("b", rule.limit, f"{least} {rule.amount}", until)
                taken.append((LEASES, "k", op))
            else:
                arguments += ("r", rule.size * rule.unit, rule.amount * rule.unit, "")
        keys += (OPERATION + op, LEASES)
        try:
            answer = await self._store.script(_JUDGE, keys, arguments)
        except BaseException as error:
            # Whether Redis took it is unknown: give it back, which harms nothing if it didn't. What was taken for
            # an earlier attempt stays: its settlement ends both.
            undo = [_Change(PREFIX + r.key, "s", op) for r in rules if r.kind == "slots"]
            if (LEASES, "k", op) not in self._held:
                undo += [_Change(PREFIX + r.key, "b", op, "0") for r in rules if r.kind == "budget"]
            if undo:
                self._put(tuple(undo))
            if isinstance(error, StatementError):
                log.error("ledger_refused", message=str(error), keys=[r.key for r in rules])  # noqa: TRY400 - it says it all
                raise StoreUnavailable from error
            raise
        allowed = answer[0] == 1
        if allowed:
            self._held.update(dict.fromkeys(taken))
        levels: list[Level] = []
        grants: list[int] = []
        for rule, text in zip(rules, answer[1:], strict=True):
            if rule.kind != "budget":
                levels.append(float(text))
                continue
            spent, _, reserved = text.partition(b" ")
            levels.append((int(spent), int(reserved)))
            if rule.amount:
                grants.append(min(rule.amount, rule.limit - int(spent) - int(reserved)))
        return Verdict(rules, levels, allowed=allowed, granted=min(grants, default=0))

    def take(self, op: str, plan: Plan, held: Sequence[Held], row: bytes = b"") -> Admission | None:
        del op, plan, held, row
        return None

    def give(self, admission: Admission, plan: Plan, used: Sequence[int | None], row: bytes = b"") -> None:
        raise NotImplementedError

    async def peek(self, rules: Sequence[Rule]) -> Verdict:
        await self.flush()  # what is over here must not stand in the way
        keys, kinds = [PREFIX + rule.key for rule in rules], [rule.kind for rule in rules]
        answer = await self._store.script(_PEEK, keys, (self._now(), 0, *kinds))
        levels: list[Level] = []
        for rule, text in zip(rules, answer, strict=True):
            level, _, reserved = text.partition(b" ")
            levels.append((int(level), int(reserved)) if rule.kind == "budget" else float(level))
        return weighed(rules, levels)

    def settle(
        self, op: str, actual: Sequence[tuple[Rule, int | None]], row: bytes = b"", *, admitted: bool = True
    ) -> None:
        changes = []
        for rule, used in actual:
            key = PREFIX + rule.key
            if rule.kind == "slots":
                if not admitted:
                    continue
                self._held.pop((key, "l", op), None)
                changes.append(_Change(key, "s", op))
                self._freed.setdefault(key, []).append(op)
            elif rule.kind == "budget":
                self._held.pop((LEASES, "k", op), None)
                if admitted:
                    changes.append(_Change(key, "b", op, "" if used is None else str(used)))
                else:
                    changes.append(_Change(key, "b", op, str(rule.amount if used is None else used), "charge"))
            elif admitted and used is not None and used != rule.amount:
                changes.append(_Change(key, "r", op, repr((used - rule.amount) * rule.unit)))
        if row:
            changes.append(_Change(ROWS, "w", op, row))
        if changes:
            self._put(tuple(changes))

    def adjust(self, op: str, rule: Rule, delta: int) -> None:
        # An operation of its own: the settled one's reservation is gone, or was spent as reserved and stays so.
        self._put((_Change(PREFIX + rule.key, "b", op + "/corrected", str(delta), "charge"),))

    async def rows(self, most: int) -> list[Row]:
        arguments = (self._name, int(MOVER_SECONDS * 1000), most)
        dropped, self._in_stream, found = await self._store.script(_TAKE_ROWS, (MOVER, ROWS, DROPPED), arguments)
        self._dropped_rows += int(dropped)
        out = []
        for number, pairs in found:
            fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
            abandoned = fields.get(b"abandoned")
            row = Row(number.decode(), fields[b"op"].decode(), fields[b"row"], abandoned and int(abandoned))
            out.append(row)
        return out

    async def drop_rows(self, ids: Sequence[str]) -> None:
        if ids:
            await self._store.call(lambda: self._store.client.xdel(ROWS, *ids))
            self._in_stream = max(0, self._in_stream - len(ids))

    async def leave_rows(self) -> None:
        await self._store.script(_LEAVE_ROWS, (MOVER,), (self._name,))
        self._in_stream = 0

    def take_dropped_rows(self) -> int:
        taken, self._dropped_rows = self._dropped_rows, 0
        return taken

    @property
    def waiting_rows(self) -> int:
        return self._in_stream + len(self._pending)

    async def budgets(self, keys: Sequence[str]) -> list[tuple[int, int]]:
        async def ask() -> list[list[bytes | None]]:
            pipe = self._store.client.pipeline(transaction=False)
            for key in keys:
                pipe.hmget(PREFIX + key, "spent", "reserved")
            return await pipe.execute()

        return [(int(spent or 0), int(reserved or 0)) for spent, reserved in await self._store.call(ask)]

    async def ping(self) -> None:
        await self._store.ping()

    async def renew(self) -> None:
        """What this worker holds stays held for another lease, or is held again. Raises StoreUnavailable."""
        # Not while something is settled: it would be held again.
        async with self._flushing:
            held = list(self._held)
            for start in range(0, len(held), 500):
                await self._settle([_Change(*what) for what in held[start : start + 500] if what in self._held])

    async def reap(self) -> int:
        """Spend what dead workers had reserved; how many operations that were. Raises StoreUnavailable."""
        return int(await self._store.script(_REAP, [LEASES], [self._now(), 0]))

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        renewing = self._tasks.spawn(self._renew(), "ledger: renew")
        try:
            yield
        finally:
            renewing.cancel()
            self._cancel_timer()
            await self._tasks.drain(1.0)
            await self.flush()
            self._cancel_timer()
            if self._pending:
                log.error("ledger_settlements_lost", settlements=len(self._pending), pending=0)

    async def flush(self) -> bool:
        """Send what is settled but not yet in Redis."""
        async with self._flushing:
            left = len(self._pending)  # what comes meanwhile has its own 20 ms
            while left > 0 and not self._store.is_open:
                size = units = 0
                for unit in self._pending:
                    if size and size + len(unit) > 500:
                        break
                    size += len(unit)
                    units += 1
                left -= units
                try:
                    await self._send([self._pending.popleft() for _ in range(units)])
                except StoreUnavailable:
                    left = 1  # for later
                    break
        if left > 0:
            self._later(RETRY_SECONDS)
        return left <= 0

    async def _send(self, units: Sequence[tuple[_Change, ...]]) -> None:
        """In one call. Raises StoreUnavailable; what can be sent again is then pending again."""
        try:
            await self._settle([change for unit in units for change in unit])
        except StatementError as error:
            # One of them can't be done, and it is unknown which were: each by itself.
            if len(units) == 1:
                keys = [change.key for change in units[0]]
                log.error("ledger_refused", message=str(error), keys=keys)  # noqa: TRY400 - it says it all
                self._lose(units[0])
                return
            for i, unit in enumerate(units):
                repeated = tuple(change for change in unit if change.kind in _REPEATABLE)
                try:
                    if repeated:
                        await self._send([repeated])
                except BaseException:
                    self._keep(units[i + 1 :])
                    raise
        except BaseException:
            self._keep(units)
            raise
        else:
            for unit in units:
                self._forget_freed(unit)

    def _now(self) -> int:
        return int(self._clock() * 1e6) if self._clock is not None else 0

    def _put(self, unit: tuple[_Change, ...]) -> None:
        if len(self._pending) >= PENDING_LIMIT:
            self._lose(unit)
            return
        self._pending.append(unit)
        self._later(SETTLE_SECONDS)

    def _lose(self, unit: tuple[_Change, ...]) -> None:
        self.lost += 1
        self._dropped_rows += sum(change.kind == "w" for change in unit)
        self._forget_freed(unit)
        if worth_a_line(self.lost):
            log.error("ledger_settlements_lost", settlements=self.lost, pending=len(self._pending))

    def _later(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._due)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self._tasks.spawn(self.flush(), "ledger: settle")

    def _keep(self, units: Sequence[tuple[_Change, ...]]) -> None:
        """For the store's return. What moves a bucket is not repeated: Redis may have done it, and twice is wrong."""
        for unit in reversed(units):
            kept = tuple(change for change in unit if change.kind in _REPEATABLE)
            if kept and len(self._pending) < PENDING_LIMIT:
                self._pending.appendleft(kept)
            else:
                self._lose(unit)

    def _forget_freed(self, unit: tuple[_Change, ...]) -> None:
        for change in unit:
            ops = self._freed.get(change.key) if change.kind == "s" else None
            if ops is not None and change.op in ops:
                ops.remove(change.op)
                if not ops:
                    del self._freed[change.key]

    async def _settle(self, changes: Sequence[_Change]) -> None:
        arguments: list[Any] = [self._now(), int(LEASE_SECONDS * 1e6)]
        for change in changes:
            arguments += change[1:]
        await self._store.script(_SETTLE, [change.key for change in changes], arguments)

    async def _on_return(self) -> None:
        """Leases may have ended meanwhile, though their requests go on."""
        await self.renew()
        self._returned = time.monotonic()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            with contextlib.suppress(StoreUnavailable, StatementError):
                await self.renew()
                if time.monotonic() - self._returned > LEASE_SECONDS:  # else: others have not renewed yet, perhaps
                    while await self.reap() == 100:
                        pass
