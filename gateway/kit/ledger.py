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
from gateway.kit.leases import SWEEP_SECONDS, Lease
from gateway.kit.passes import passes
from gateway.limits import Admission, Held, Level, Plan, Rule, State, Verdict, weighed
from gateway.logs import get_logger, worth_a_line
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

    from gateway.errors import GatewayError
    from gateway.exchange import Exchange
    from gateway.stores.redis import RedisStore

log = get_logger("gateway.ledger")

ENDLESS = 10**15  # micro-USD: the limit of a budget that refuses nobody
LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
SETTLE_SECONDS = 0.02
NOTE_SECONDS = 0.2  # so long a note may be on its way
AT_ONCE = 2  # times that is asked again without waiting for it
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
WORKERS = PREFIX + "workers"  # sorted set: worker → when what it leased is given back
HEARD = PREFIX + "heard:"  # of one worker: how many of its notes
LEASED = PREFIX + "leased:"  # hash of one worker: `b` or `s` and the rule's key → micro-USD, or places

_TIME = """
local now = tonumber(ARGV[1])
if now == 0 then local t = redis.call('TIME'); now = t[1] * 1000000 + t[2] end
local lease = tonumber(ARGV[2])
local function text(n) return string.format('%.0f', n) end
"""

# What a worker admits within leases it only notes (_NOTE), on another connection. So that nothing overtakes a note, the
# last of KEYS is how many Redis has heard of, and the last of ARGV how many there must be. Returns -1 and how many, or
# goes on.
_AFTER_NOTES = """
if ARGV[#ARGV] ~= '0' then
  local heard = tonumber(redis.call('GET', KEYS[#KEYS]) or 0)
  if heard < tonumber(ARGV[#ARGV]) then return {-1, heard} end
end
"""

# KEYS: one per rule, then the operation's and the leases. ARGV: the time in µs (0: Redis's own), the lease in µs, the
# operation, its row, '1' if it is to be given back, the worker, then five per rule:
#   'r', the bucket's size in µs, what the request takes in µs, '';
#   's', the number of slots, operations that are over but whose slots may not have been freed yet, '';
#   'b', the limit, the least and the most to reserve as 'least most', when the count may be forgotten in ms or '';
#   and '', or what the worker gives back of what it leased (a rate's end in µs; a number of places that stay in use) if
#   it wants to lease anew.
# Returns 1 or 0, then each rule's level before, as text, each rule's lease likewise, and the time.
_JUDGE = (
    _TIME
    + _AFTER_NOTES
    + f"""
local op, n, mine = ARGV[3], #KEYS - 3, '{LEASED}' .. ARGV[6]
local out, ok, grant, budgets, wishes = {{1}}, true, nil, false, false
local function own(kind, key) return tonumber(redis.call('HGET', mine, kind .. key) or 0) end
for i = 1, n do
  local key, p = KEYS[i], 5 * i + 2
  local kind, room, level, wish = ARGV[p], tonumber(ARGV[p + 1]), nil, tonumber(ARGV[p + 4])
  wishes = wishes or wish
  if kind == 's' then
    for over in string.gmatch(ARGV[p + 2], '%S+') do redis.call('ZREM', key, over) end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    level = redis.call('ZCARD', key) + tonumber(redis.call('GET', key .. ':leased') or 0)
    if wish then level = level - own('s', key) + wish end
    if level >= room then ok = false end
  elseif kind == 'b' then
    local held = redis.call('HMGET', key, 'spent', 'reserved', 'leased')
    local spent, reserved = tonumber(held[1] or 0), tonumber(held[2] or 0) + tonumber(held[3] or 0)
    if wish then reserved = reserved - own('b', key) end
    local least, most = string.match(ARGV[p + 2], '(%d+) (%d+)')
    local left = room - spent - reserved
    if left < tonumber(least) then ok = false end
    if most ~= '0' then grant = math.min(grant or left, left, tonumber(most)) end
    budgets = true
    level = text(spent) .. ' ' .. text(reserved)
  else
    level = math.max(0, tonumber(redis.call('GET', key) or 0) - now)
    if wish then level = math.max(0, level - math.max(0, wish - now)) end
    if level + tonumber(ARGV[p + 2]) > room + 0.5 then ok = false end
    level = string.format('%.3f', level)
  end
  out[i + 1] = tostring(level)
end
if not ok then out[1] = 0; return out end
local gone = budgets and redis.call('HEXISTS', KEYS[n + 1], '~gone')
local workers = 1
if wishes then
  redis.call('ZADD', '{WORKERS}', now + lease, ARGV[6])
  workers = redis.call('ZCOUNT', '{WORKERS}', now, '+inf')
end
-- of what is left when the request has taken its own: nothing that is not good for two more such requests
local function share(left, room, taken)
  local part = left / (4 * workers)
  if left * 10 < room or part < 2 * taken then return 0 end
  return part
end
for i = 1, n do
  local key, p = KEYS[i], 5 * i + 2
  local kind, room, wish = ARGV[p], tonumber(ARGV[p + 1]), tonumber(ARGV[p + 4])
  out[n + 1 + i] = ''
  if kind == 's' then
    redis.call('ZADD', key, now + lease, op)
    redis.call('PEXPIRE', key, math.ceil(lease / 1000) * 2)
    if wish then
      local spare = math.floor(share(room - tonumber(out[i + 1]) - 1, room, 1))
      local more = wish + spare - own('s', key)
      if more ~= 0 then redis.call('INCRBY', key .. ':leased', more) end
      redis.call('HSET', mine, 's' .. key, text(wish + spare))
      out[n + 1 + i] = text(spare)
    end
  elseif kind == 'b' then
    -- an operation whose lease ended was charged what it had reserved: what it takes on top is charged too
    local taken = string.sub(ARGV[p + 2], -2) == ' 0' and 0 or grant
    redis.call('HINCRBY', key, gone == 1 and 'spent' or 'reserved', text(taken))
    if ARGV[p + 3] ~= '' then redis.call('PEXPIREAT', key, ARGV[p + 3]) end
    redis.call('HINCRBY', KEYS[n + 1], key, text(taken))
    if wish then
      local spent, reserved = string.match(out[i + 1], '(%S+) (%S+)')
      local part = math.floor(share(room - tonumber(spent) - tonumber(reserved) - taken, room, taken))
      redis.call('HINCRBY', key, 'leased', text(part - own('b', key)))
      redis.call('HSET', mine, 'b' .. key, text(part))
      out[n + 1 + i] = text(part)
    end
  else
    local taken = tonumber(ARGV[p + 2])
    local ahead = tonumber(out[i + 1]) + taken
    if wish then
      local part = math.min(share(room - ahead, room, taken), lease)
      ahead = ahead + part
      out[n + 1 + i] = string.format('%.3f', now + part)
    end
    redis.call('SET', key, string.format('%.3f', now + ahead), 'PX', math.ceil(ahead / 1000) + 1)
  end
end
if budgets then
  if ARGV[4] ~= '' then redis.call('HSET', KEYS[n + 1], '~row', ARGV[4]) end
  if ARGV[5] ~= '' then redis.call('HSET', KEYS[n + 1], '~back', '1') end
  if gone == 0 then redis.call('ZADD', KEYS[n + 2], now + lease, op) end
end
out[2 * n + 2] = text(now)
return out
"""
)

# KEYS: one per rule. ARGV: the time, the lease, the worker, then two per rule: its kind, and what the worker would give
# back of its lease as for _JUDGE, or ''. Returns each rule's level, as text.
_PEEK = (
    _TIME
    + f"""
local out, mine = {{}}, '{LEASED}' .. ARGV[3]
local function own(kind, key) return tonumber(redis.call('HGET', mine, kind .. key) or 0) end
for i, key in ipairs(KEYS) do
  local kind, kept = ARGV[2 * i + 2], tonumber(ARGV[2 * i + 3])
  if kind == 'slots' then
    local level = redis.call('ZCOUNT', key, '(' .. text(now), '+inf') + (redis.call('GET', key .. ':leased') or 0)
    out[i] = text(level + (kept and kept - own('s', key) or 0))
  elseif kind == 'budget' then
    local held = redis.call('HMGET', key, 'spent', 'reserved', 'leased')
    local reserved = tonumber(held[2] or 0) + tonumber(held[3] or 0) - (kept and own('b', key) or 0)
    out[i] = text(tonumber(held[1] or 0)) .. ' ' .. text(reserved)
  else
    local level = math.max(0, tonumber(redis.call('GET', key) or 0) - now)
    out[i] = string.format('%.3f', math.max(0, level - math.max(0, (kept or 0) - now)))
  end
end
return out
"""
)

_GIVE_BACK = f"""
local function give_back(worker)
  local fields = redis.call('HGETALL', '{LEASED}' .. worker)
  for i = 1, #fields, 2 do
    local kind, key = string.sub(fields[i], 1, 1), string.sub(fields[i], 2)
    if kind == 'b' then
      redis.call('HINCRBY', key, 'leased', text(0 - fields[i + 1]))
    elseif redis.call('DECRBY', key .. ':leased', fields[i + 1]) <= 0 then
      redis.call('DEL', key .. ':leased')
    end
  end
  redis.call('DEL', '{LEASED}' .. worker)
end
"""

# KEYS: one per change. ARGV: the time, the lease, then four per change: its kind, operation, value, and more.
#   'r' moves a bucket by µs; 's' frees a slot; 'l' renews a slot's lease; 'k' a reservation's.
#   'b' spends the value of what an operation reserved ('' all). More is 'charge' if it is to be spent also without a
#   reservation, once: that is remembered for a day.
#   'w' records the value as a row.
#   'm' gives back a rate's lease that would have melted at the value, 'e' what a worker (the operation) leased of a
#   budget, 'p' what it leased of slots but for the value, 'x' all that it leased but of rates.
_SETTLE = (
    _TIME
    + _AFTER_NOTES
    + _GIVE_BACK
    + f"""
local leases, operation, adjusted, rows, dropped, leased =
  '{LEASES}', '{OPERATION}', '{ADJUSTED}', '{ROWS}', '{DROPPED}', '{LEASED}'
"""
    + f"""
for i = 1, #KEYS - 1 do
  local key, p = KEYS[i], 4 * i - 1
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
  elseif kind == 'm' then
    local at = tonumber(redis.call('GET', key) or 0) - math.max(0, tonumber(value) - now)
    if at > now then
      redis.call('SET', key, string.format('%.3f', at), 'PX', math.ceil((at - now) / 1000) + 1)
    else
      redis.call('DEL', key)
    end
  elseif kind == 'e' then
    local before = tonumber(redis.call('HGET', leased .. op, 'b' .. key) or 0)
    if before > 0 then redis.call('HINCRBY', key, 'leased', text(0 - before)) end
    redis.call('HDEL', leased .. op, 'b' .. key)
  elseif kind == 'x' then
    give_back(op)
  elseif kind == 'p' then
    local more = tonumber(value) - tonumber(redis.call('HGET', leased .. op, 's' .. key) or 0)
    if redis.call('INCRBY', key .. ':leased', text(more)) <= 0 then redis.call('DEL', key .. ':leased') end
    if value == '0' then
      redis.call('HDEL', leased .. op, 's' .. key)
    else
      redis.call('HSET', leased .. op, 's' .. key, value)
      redis.call('ZADD', '{WORKERS}', now + lease, op)
    end
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
    elseif more == 'charge' and redis.call('EXISTS', adjusted .. op .. ':' .. key) == 0 then
      redis.call('HINCRBY', key, 'spent', text(tonumber(value)))
    end
    if more == 'charge' then redis.call('SET', adjusted .. op .. ':' .. key, '1', 'EX', 86400) end
  end
end
return 1
"""
)

# What a worker admitted within its leases, in the order of their numbers: one that follows on a lost one is lost too.
# KEYS: how many it has noted, the leases, then of each note the operation's and the budgets. ARGV: the time, the lease,
# the worker, the first note's number ('' if it is told again), then of each the operation, what it reserves, its row,
# how many budgets.
_NOTE = (
    _TIME
    + f"""
local number, mine, at = tonumber(ARGV[4]), '{LEASED}' .. ARGV[3], 3
if number and tonumber(redis.call('GET', KEYS[1]) or 0) ~= number - 1 then return 0 end
for i = 5, #ARGV, 4 do
  local op, value, row, last = ARGV[i], ARGV[i + 1], ARGV[i + 2], at + tonumber(ARGV[i + 3])
  local held = KEYS[at]
  for k = at + 1, last do
    local key = KEYS[k]
    -- not if it is heard so late that its settlement has been charged
    if redis.call('EXISTS', '{ADJUSTED}' .. op .. ':' .. key) == 0 and redis.call('HSETNX', held, key, value) == 1 then
      local part = math.min(tonumber(redis.call('HGET', mine, 'b' .. key) or 0), tonumber(value))
      if part > 0 then
        redis.call('HINCRBY', mine, 'b' .. key, text(0 - part))
        redis.call('HINCRBY', key, 'leased', text(0 - part))
      end
      redis.call('HINCRBY', key, 'reserved', value)
      redis.call('ZADD', KEYS[2], now + lease, op)
      if row ~= '' then redis.call('HSET', held, '~row', row) end
    end
  end
  at = last + 1
end
if number then redis.call('SET', KEYS[1], text(number + (#ARGV - 4) / 4 - 1), 'EX', 86400) end
return 1
"""
)

# KEYS: how many of its notes a worker was heard. Returns that.
_HEARD = "return tonumber(redis.call('GET', KEYS[1]) or 0)"

# KEYS: the leases. Gives back what dead workers had leased; spends what they had reserved, or gives it back, and
# records it. Returns how many operations it found.
_REAP = (
    _TIME
    + _GIVE_BACK
    + f"""
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', '{WORKERS}', '-inf', now)) do
  give_back(worker)
  redis.call('ZREM', '{WORKERS}', worker)
end
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


class _Note(NamedTuple):
    """Of an admission within leases."""

    number: int
    op: str
    budgets: Sequence[str]  # their keys
    reserved: int
    row: bytes


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
        self._leases: dict[str, Lease] = {}  # by the rule's key
        # What was admitted within leases: all that Redis is not known to have heard of, oldest first; what it perhaps
        # never hears of, by operation, until it is settled.
        self._notes: deque[_Note] = deque()
        self._noted = 0
        self._unsaid: list[_Note] = []  # in this turn of the loop
        self._heard = HEARD + self._name
        self._unsure: dict[str, _Note] = {}
        self._ending: set[str] = set()  # the keys of budgets whose lease is to be given back
        self._moves: dict[str, float] = {}  # what buckets are to be moved by, in µs
        self._surplus: set[Lease] = set()  # slots with more free places than are to be kept here
        self._sweep: asyncio.TimerHandle | None = None
        store.on_return.append(self._on_return)

    async def judge(self, op: str, rules: Sequence[Rule], row: bytes = b"", *, give_back: bool = False) -> Verdict:
        wished = self._wishes(rules) if not give_back and all(rule.lease for rule in rules) else {}
        verdict = await self._judge(op, rules, row, give_back, wished)
        own = [lease for r in rules if (lease := self._leases.get(r.key)) is not None and r.key not in wished]
        if not verdict.allowed and any(lease.asking or lease.spare(self._micros()) for lease in own):
            # What this worker holds itself must not stand in the way.
            for lease in own:
                if lease.asking is not None:
                    await asyncio.wait([lease.asking])
            self._end(own)
            await self.flush()
            verdict = await self._judge(op, rules, row, give_back, {})
        if not verdict.allowed and any(
            not s.allowed and (r.kind == "slots" or s.reserved) for r, s in zip(rules, verdict, strict=True)
        ):
            # What stands in the way may be over already, and its settlement under way here or in another worker.
            await asyncio.sleep(SETTLE_SECONDS * 1.5)
            verdict = await self._judge(op, rules, row, give_back, {})
        return verdict

    def _wishes(self, rules: Sequence[Rule]) -> dict[str, Lease]:
        """The leases that a request may bring anew: of rules that were asked for lately."""
        wished = {}
        for rule in rules:
            lease = self._leases.get(rule.key)
            if lease is None:
                self._leases[rule.key] = Lease(rule, PREFIX + rule.key, self._micros())
                self._sweep_later()
            elif lease.asking is None and lease.key not in self._ending:
                wished[rule.key] = lease
        return wished

    async def _judge(
        self, op: str, rules: Sequence[Rule], row: bytes, give_back: bool, wished: Mapping[str, Lease]
    ) -> Verdict:
        if self._store.is_open:
            raise StoreUnavailable
        asking = asyncio.get_running_loop().create_future()
        until = {lease: lease.until for lease in wished.values()}
        for lease in until:
            lease.asking, lease.until, lease.given = asking, 0.0, True  # what is left of it goes back
        try:
            verdict = await self._asked(op, rules, row, give_back, wished)
            if not verdict.allowed:  # then it does not
                for lease, before in until.items():
                    lease.until = before
            return verdict
        finally:
            for lease in until:
                lease.asking = None
            asking.set_result(None)

    async def _asked(
        self, op: str, rules: Sequence[Rule], row: bytes, give_back: bool, wished: Mapping[str, Lease]
    ) -> Verdict:
        keys, taken = [], []
        if any(one.kind == "budget" for one in wished.values()) and not await self._store.post_opened(_NOTE):
            wished = {key: lease for key, lease in wished.items() if lease.kind != "budget"}
        arguments = [self._now(), int(LEASE_SECONDS * 1e6), op, row, "1" if give_back else "", self._name]
        kept = {key: lease.kept for key, lease in wished.items()}
        sent = self._micros()
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
            arguments.append(kept.get(rule.key, ""))
        keys += (OPERATION + op, LEASES)
        try:
            known = (LEASES, "k", op) in self._held  # it takes more
            answer = await self._answer(keys, arguments, after_notes=bool(wished) or known)
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
        for rule, text in zip(rules, answer[1 : len(rules) + 1], strict=True):
            if rule.kind != "budget":
                levels.append(float(text))
                continue
            spent, _, reserved = text.partition(b" ")
            levels.append((int(spent), int(reserved)))
            if rule.amount:
                grants.append(min(rule.amount, rule.limit - int(spent) - int(reserved)))
        if allowed and wished:
            for rule, level, text in zip(rules, levels, answer[len(rules) + 1 : -1], strict=True):
                if text and rule.key in wished:
                    lease, now = wished[rule.key], float(answer[-1])
                    lease.granted(rule, level, kept[rule.key], text, sent=sent, redis_now=now)
        return Verdict(rules, levels, allowed=allowed, granted=min(grants, default=0))

    async def _answer(self, keys: Sequence[str], arguments: Sequence[Any], *, after_notes: bool) -> Any:
        tries = 0
        while True:
            heard, noted = self._heard, self._noted if after_notes and self._notes else 0
            answer = await self._store.script(_JUDGE, (*keys, heard), (*arguments, noted))
            if answer[0] >= 0:
                return answer
            tries += 1
            if tries > AT_ONCE:  # nearly always it had only to read what had left before
                async with self._flushing:
                    await self._hear()

    def take(self, op: str, plan: Plan, held: Sequence[Held], row: bytes = b"") -> Admission | None:
        if not plan.leases or not self._leases or (plan.budgets and not self._store.posts) or self._store.is_open:
            return None
        now, leases, found, granted = self._micros(), self._leases, [], ENDLESS
        for number, rule in plan.rules:
            lease = leases.get(rule.key)
            amount = held[number].amount if rule.varies else rule.amount
            if lease is None or not lease.fits(rule, amount, now):
                return None
            if rule.kind == "budget" and amount < granted:
                granted = amount
            found.append((lease, rule, amount))
        if plan.budgets:
            budgets = [lease.key for lease, rule, _ in found if rule.kind == "budget"]
            self._note(_Note(self._noted + 1, op, budgets, granted, row))
            self._held[LEASES, "k", op] = None
        levels = [lease.take(r, granted if r.kind == "budget" else amount, op, now) for lease, r, amount in found]
        return Admission(op, held, levels, granted if plan.budgets else 0, plan, noted=not plan.budgets)

    async def noted(self, op: str) -> None:
        await asyncio.sleep(0)  # `_say` has been called before
        note = self._unsure.get(op)
        if note is not None:
            await self._store.script(_NOTE, *self._said([note], ""))

    def give(self, admission: Admission, plan: Plan, used: Sequence[int | None], row: bytes = b"") -> None:
        op, changes = admission.op, []
        for number, rule in plan.rules:
            lease, told = self._leases.get(rule.key), plan.told(rule)
            actual = None if told is None else used[told]
            if rule.kind == "budget":
                spent = admission.granted if actual is None else actual
                changes.append(_Change(PREFIX + rule.key, "b", op, str(spent)))
                if lease is not None:
                    lease.reserved -= admission.granted
                    lease.spent += spent
            elif rule.kind == "slots":
                if lease is not None and lease.leave(op, self._micros()):
                    self._surplus.add(lease)
                    self._later(SETTLE_SECONDS)
            elif actual is not None and actual != admission.held[number].amount:
                moved = (actual - admission.held[number].amount) * rule.unit
                self._moves[PREFIX + rule.key] = self._moves.get(PREFIX + rule.key, 0.0) + moved
                if lease is not None:
                    lease.ahead += moved
                self._later(SETTLE_SECONDS)
        if plan.budgets:
            self._held.pop((LEASES, "k", op), None)
        if row:
            changes.append(_Change(ROWS, "w", op, row))
        if changes:
            self._put(tuple(changes))

    # --- leases ------------------------------------------------------------------------------------------------------

    def _note(self, note: _Note) -> None:
        """Redis is told once in a turn of the loop of all that came in it; `noted` is how a request waits for that."""
        self._noted = note.number
        self._notes.append(note)
        if not self._unsaid:
            asyncio.get_running_loop().call_soon(self._say)
        self._unsaid.append(note)

    def _say(self) -> None:
        notes, self._unsaid = self._unsaid, []
        if notes and not self._store.post(_NOTE, *self._said(notes, notes[0].number)):
            self._unsure.update((note.op, note) for note in notes)

    def _said(self, notes: Sequence[_Note], number: int | str) -> tuple[Sequence[str], Sequence[Any]]:
        """`number`: of the first."""
        keys = [self._heard, LEASES]
        arguments: list[Any] = [self._now(), int(LEASE_SECONDS * 1e6), self._name, number]
        for note in notes:
            keys.append(OPERATION + note.op)
            keys += note.budgets
            arguments += (note.op, note.reserved, note.row, len(note.budgets))
        return keys, arguments

    def _know(self, heard: int) -> None:
        while self._notes and self._notes[0].number <= heard:
            self._notes.popleft()

    async def _hear(self) -> None:
        """Until Redis has heard of all notes, or they were given up. While nothing is being settled."""
        wanted, until = self._noted, time.monotonic() + NOTE_SECONDS
        while self._notes and self._notes[0].number <= wanted:
            self._know(int(await self._store.script(_HEARD, (self._heard,), ())))
            if time.monotonic() > until:
                await self._give_up_notes()
            elif self._notes:
                await asyncio.sleep(0.002)

    async def _give_up_notes(self) -> None:
        """Redis may hear of these yet, or never: it is told again, and their settlement is charged in any case."""
        self._store.close_post()
        self._unsaid = []
        for lease in self._leases.values():
            if lease.kind == "budget":
                lease.until, lease.left = 0.0, 0
        for note in self._notes:
            self._unsure[note.op] = note
        # before anything is awaited: what is noted meanwhile is numbered anew
        self._notes.clear()
        self._noted, self._heard = 0, HEARD + secrets.token_hex(8)
        await self._note_again()

    async def _note_again(self) -> None:
        for note in list(self._unsure.values()):
            with contextlib.suppress(StatementError):
                await self._store.script(_NOTE, *self._said([note], ""))

    def _end(self, leases: Iterable[Lease]) -> None:
        """Given back, but for places that are taken. Not those that are just being asked for."""
        changes = []
        now = self._micros()
        for lease in leases:
            if lease.asking is not None or not lease.given:
                continue
            if lease.kind == "budget":
                self._ending.add(lease.key)
                self._later(SETTLE_SECONDS)
            elif lease.kind == "slots":
                changes.append(_Change(lease.key, "p", self._name, lease.kept))
            elif lease.spare(now):
                changes.append(_Change(lease.key, "m", self._name, lease.kept))
            lease.ended()
        for start in range(0, len(changes), 500):
            self._send_now(changes[start : start + 500])

    def _send_now(self, changes: Sequence[_Change]) -> None:
        self._store.send(_SETTLE, *self._settling(changes, 0))

    def _thin_out(self) -> None:
        """Places that are free again and not to be kept here."""
        thinner = [lease for lease in self._surplus if lease.asking is None]
        self._surplus.difference_update(thinner)
        for lease in thinner:
            lease.owned = min(lease.owned, len(lease.ops) + (lease.most if self._micros() < lease.until else 0))
        if thinner:
            self._send_now([_Change(lease.key, "p", self._name, str(lease.owned)) for lease in thinner])

    def _sweep_later(self) -> None:
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep_leases)

    def _sweep_leases(self) -> None:
        """Those that have ended are given back, and forgotten if nobody sits in them."""
        self._sweep = None
        now = self._micros()
        over = {key: lease for key, lease in self._leases.items() if lease.asking is None and lease.until <= now}
        self._end([lease for lease in over.values() if not lease.ops or lease.owned != len(lease.ops)])
        for key, lease in over.items():
            if not lease.ops:
                del self._leases[key]
        if self._leases:
            self._sweep_later()

    def _seats(self) -> list[_Change]:
        """The places that are taken or leased here."""
        seats = [one for one in self._leases.values() if one.kind == "slots" and one.owned and one.asking is None]
        return [_Change(one.key, "p", self._name, str(one.owned)) for one in seats]

    def _micros(self) -> float:
        """As this process counts."""
        return (time.monotonic() if self._clock is None else self._clock()) * 1e6

    async def peek(self, rules: Sequence[Rule]) -> Verdict:
        await self.flush()  # what is over here must not stand in the way
        arguments: list[Any] = [self._now(), 0, self._name]
        for rule in rules:
            lease = self._leases.get(rule.key)
            arguments += (rule.kind, lease.kept if lease is not None and lease.given else "")
        answer = await self._store.script(_PEEK, [PREFIX + rule.key for rule in rules], arguments)
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
            if seats := self._seats():
                await self._settle(seats)
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
            if self._sweep is not None:
                self._sweep.cancel()
            self._end(self._leases.values())
            await self._tasks.drain(1.0)
            await self.flush()
            self._cancel_timer()
            if self._pending:
                log.error("ledger_settlements_lost", settlements=len(self._pending), pending=0)

    async def flush(self) -> bool:
        """Send what is settled but not yet in Redis."""
        async with self._flushing:
            self._thin_out()
            if self._moves:
                moves, self._moves = self._moves, {}
                self._put(tuple(_Change(key, "r", "", repr(moved)) for key, moved in moves.items()))
            left = len(self._pending)  # what comes meanwhile has its own 20 ms
            given_back = not self._ending or await self._give_back()
            while left > 0 and given_back and not self._store.is_open:
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
        if left > 0 or not given_back:
            self._later(RETRY_SECONDS)
            return False
        return True

    async def _give_back(self) -> bool:
        ending = list(self._ending)[:500]
        try:
            await self._settle([_Change(key, "e", self._name) for key in ending])
        except StoreUnavailable:
            return False  # all that is leased is, once it is back
        except StatementError as error:
            log.error("ledger_refused", message=str(error), keys=ending)  # noqa: TRY400 - it says it all
        self._ending.difference_update(ending)
        return True

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
        """When Redis has heard of all that is noted here. One at a time."""
        while True:
            noted = self._noted if self._notes else 0
            answer = await self._store.script(_SETTLE, *self._settling(changes, noted))
            if answer == 1:
                break
            await self._hear()
        self._know(noted)
        if self._unsure:
            for change in changes:
                if change.kind == "b":
                    self._unsure.pop(change.op, None)

    def _settling(self, changes: Sequence[_Change], noted: int) -> tuple[Sequence[str], Sequence[Any]]:
        arguments: list[Any] = [self._now(), int(LEASE_SECONDS * 1e6)]
        for change in changes:
            arguments += change[1:]
            if self._unsure and change.kind == "b" and change.op in self._unsure:
                arguments[-1] = "charge"
        arguments.append(noted)
        return [*(change.key for change in changes), self._heard], arguments

    async def _on_return(self) -> None:
        """Leases may have ended meanwhile, though their requests go on. What was leased ahead is over."""
        async with self._flushing:
            await self._hear()
            for lease in self._leases.values():
                lease.ended()
            self._ending.clear()
            await self._note_again()
            await self._settle([_Change(LEASES, "x", self._name), *self._seats()])
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
