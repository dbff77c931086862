"""What is counted and held for requests, admitted all or none: rate limits, concurrent requests, and plugins' own.

A plugin's `check_request` names its rules by `exchange.hold(rule, …)`. After all plugins have spoken the core admits
them together: in Redis by ONE Lua call, whatever their number, else in this process. A rule that has no room refuses
the request, and then nothing was taken for any rule. When the request is over, what it really used is settled.

Rates are counted as GCRA: a bucket of `burst` units that refills by `limit` in `per` seconds. So in any span of t
seconds at most burst + limit · t / per units are admitted. What a request uses beyond its estimate is a debt: the
bucket goes below empty, and later requests wait. Slots are leases: one that its worker no longer renews ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec
import structlog

from gateway.errors import Unavailable
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from gateway.errors import GatewayError
    from gateway.exchange import Exchange
    from gateway.stores.redis import RedisStore

log = structlog.get_logger("gateway.ledger")

LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
SETTLE_SECONDS = 0.02
PENDING_LIMIT = 100_000
SWEEP_EVERY = 10_000


class StoreUnavailable(Unavailable):
    """The gateway can't reach the store that it needs for this request. Try again soon."""

    code = "store_unavailable"


class State(msgspec.Struct, frozen=True):
    """One rule after the request was judged. Seconds; `retry_after` is None if waiting does not help."""

    allowed: bool
    remaining: int
    reset: float
    retry_after: float | None


class Rule(msgspec.Struct, eq=False):
    """One limit that one request falls under."""

    key: str  # what is counted together: the rule and its subject, such as `rate_limit:per-key:alice:requests`
    kind: Literal["rate", "slots"]
    limit: int  # rate: units per `per`; slots: how many at once
    refuse: Callable[[Rule, State], GatewayError]  # what the client is told
    per: float = 60.0  # seconds
    burst: int = 0  # the bucket; 0: as large as `limit`
    amount: int = 1  # what the request takes, by estimate where it isn't known yet
    actual: Callable[[Exchange], int | None] | None = None  # what it took, when it is over; None: as estimated
    on_store_error: Literal["allow", "deny"] = "deny"

    @property
    def size(self) -> int:
        return self.burst or self.limit

    @property
    def unit(self) -> float:
        """Rate: microseconds until one unit has come back."""
        return self.per * 1e6 / self.limit


class Admission(msgspec.Struct, eq=False):
    """The rules of one admitted request and what they said; `states` is empty while the store is away."""

    op: str
    rules: Sequence[Rule]
    states: Sequence[State]


class Ledger(Protocol):
    """In memory and on Redis: the same answers."""

    async def judge(self, op: str, rules: Sequence[Rule]) -> list[State]:
        """Take for all rules, or for none if one has no room. Raises StoreUnavailable."""

    def settle(self, op: str, rule: Rule, actual: int | None) -> None:
        """The request is over: free its slot, or put right what it took. Does not wait."""

    async def ping(self) -> None:
        """Raises StoreUnavailable."""

    def lifespan(self) -> contextlib.AbstractAsyncContextManager[None]: ...


async def admit(ledger: Ledger, op: str, rules: Sequence[Rule]) -> Admission:
    """Raises what the rule without room says, or StoreUnavailable if a rule wants that."""
    try:
        states = await ledger.judge(op, rules)
    except StoreUnavailable:
        if any(rule.on_store_error == "deny" for rule in rules):
            raise
        return Admission(op, rules, ())
    refused = [(rule, state) for rule, state in zip(rules, states, strict=True) if not state.allowed]
    if refused:
        # The one that takes longest to have room again; waiting for less would be in vain.
        rule, state = max(refused, key=lambda r: float("inf") if r[1].retry_after is None else r[1].retry_after)
        raise rule.refuse(rule, state)
    return Admission(op, rules, states)


def settle(ledger: Ledger, admission: Admission, exchange: Exchange) -> None:
    """When a request is over; also if it was admitted without the store, which may be back by now."""
    for rule in admission.rules:
        try:
            actual = rule.actual(exchange) if rule.actual is not None else None
        except Exception:
            log.exception("ledger_actual_failed", key=rule.key, request_id=exchange.request_id)
            actual = None
        ledger.settle(admission.op, rule, actual)


def _states(rules: Sequence[Rule], levels: Sequence[float]) -> list[State]:
    """From what each rule held before: microseconds of its bucket, or slots."""
    allowed = [_has_room(rule, level) for rule, level in zip(rules, levels, strict=True)]
    taken = all(allowed)
    return [
        _state(rule, level, has_room=has_room, taken=taken)
        for rule, level, has_room in zip(rules, levels, allowed, strict=True)
    ]


def _has_room(rule: Rule, level: float) -> bool:
    if rule.kind == "slots":
        return level < rule.limit
    # half a microsecond: what floats lose must not refuse the bucket's last unit
    return level + rule.amount * rule.unit <= rule.size * rule.unit + 0.5


def _state(rule: Rule, level: float, *, has_room: bool, taken: bool) -> State:
    if rule.kind == "slots":
        held = level + (1 if taken else 0)
        return State(has_room, max(0, int(rule.limit - held)), 0.0, None if has_room else 1.0)
    unit = rule.unit
    after = level + (rule.amount * unit if taken else 0.0)
    remaining = max(0, int((rule.size * unit - after + 0.5) / unit))
    wait: float | None = None
    if not has_room and rule.amount <= rule.size:
        wait = max(0.0, level + rule.amount * unit - rule.size * unit) / 1e6
    return State(has_room, remaining, max(0.0, after) / 1e6, wait)


class MemoryLedger:
    """For one process: counts end with it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}  # rate: when the bucket will be full, in µs (GCRA's TAT)
        self._slots: dict[str, set[str]] = {}
        self._calls = 0

    async def judge(self, op: str, rules: Sequence[Rule]) -> list[State]:
        now = self._clock() * 1e6
        self._calls += 1
        if self._calls % SWEEP_EVERY == 0:
            self._full_at = {key: at for key, at in self._full_at.items() if at > now}
        levels = [
            float(len(self._slots.get(rule.key, ())))
            if rule.kind == "slots"
            else max(0.0, self._full_at.get(rule.key, 0.0) - now)
            for rule in rules
        ]
        states = _states(rules, levels)
        if all(state.allowed for state in states):
            for rule, level in zip(rules, levels, strict=True):
                if rule.kind == "slots":
                    self._slots.setdefault(rule.key, set()).add(op)
                else:
                    self._full_at[rule.key] = now + level + rule.amount * rule.unit
        return states

    def settle(self, op: str, rule: Rule, actual: int | None) -> None:
        if rule.kind == "slots":
            held = self._slots.get(rule.key)
            if held is not None:
                held.discard(op)
                if not held:
                    del self._slots[rule.key]
        elif actual is not None and actual != rule.amount:
            now = self._clock() * 1e6
            at = max(now, self._full_at.get(rule.key, 0.0)) + (actual - rule.amount) * rule.unit
            if at > now:
                self._full_at[rule.key] = at
            else:
                self._full_at.pop(rule.key, None)

    async def ping(self) -> None: ...

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        yield


# All keys of the ledger carry one hash tag: a Cluster keeps them on one node, as one call on several keys needs.
PREFIX = "{xenios}:ledger:"

# KEYS: one per rule. ARGV: the time in µs (0: Redis's own), the operation, the lease in µs, then per rule
#   'r', the bucket's size in µs, what the request takes in µs;
#   's', the number of slots, operations that are over but whose slots may not have been freed yet.
# Returns 1 or 0, then each rule's level before, as text.
_JUDGE = """
local now = tonumber(ARGV[1])
if now == 0 then local t = redis.call('TIME'); now = t[1] * 1000000 + t[2] end
local lease = tonumber(ARGV[3])
local out, ok = {1}, true
for i, key in ipairs(KEYS) do
  local p = 3 * i
  local room, level = tonumber(ARGV[p + 2])
  if ARGV[p + 1] == 's' then
    for over in string.gmatch(ARGV[p + 3], '%S+') do redis.call('ZREM', key, over) end
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    level = redis.call('ZCARD', key)
    if level >= room then ok = false end
  else
    level = math.max(0, tonumber(redis.call('GET', key) or 0) - now)
    if level + tonumber(ARGV[p + 3]) > room + 0.5 then ok = false end
  end
  out[i + 1] = string.format('%.3f', level)
end
if not ok then out[1] = 0; return out end
for i, key in ipairs(KEYS) do
  local p = 3 * i
  if ARGV[p + 1] == 's' then
    redis.call('ZADD', key, now + lease, ARGV[2])
    redis.call('PEXPIRE', key, math.ceil(lease / 1000) * 2)
  else
    local ahead = tonumber(out[i + 1]) + tonumber(ARGV[p + 3])
    redis.call('SET', key, string.format('%.3f', now + ahead), 'PX', math.ceil(ahead / 1000) + 1)
  end
end
return out
"""

# KEYS: one per change. ARGV: the time, the lease, then per change its kind and value: `r` moves a bucket by µs, `s`
# frees an operation's slot, `l` renews its lease.
_SETTLE = """
local now = tonumber(ARGV[1])
if now == 0 then local t = redis.call('TIME'); now = t[1] * 1000000 + t[2] end
local lease = tonumber(ARGV[2])
for i, key in ipairs(KEYS) do
  local kind, value = ARGV[2 * i + 1], ARGV[2 * i + 2]
  if kind == 'r' then
    local ahead = math.max(0, tonumber(redis.call('GET', key) or 0) - now) + tonumber(value)
    if ahead > 0 then
      redis.call('SET', key, string.format('%.3f', now + ahead), 'PX', math.ceil(ahead / 1000) + 1)
    else
      redis.call('DEL', key)
    end
  elseif kind == 's' then
    redis.call('ZREM', key, value)
  elseif redis.call('ZADD', key, 'XX', 'CH', now + lease, value) == 1 then
    redis.call('PEXPIRE', key, math.ceil(lease / 1000) * 2)
  end
end
return 1
"""


class RedisLedger:
    """Exact over all workers and gateways that share the Redis."""

    def __init__(self, store: RedisStore, clock: Callable[[], float] | None = None) -> None:
        """`clock` (seconds) replaces Redis's own time, for tests."""
        self._store = store
        self._clock = clock
        self._pending: list[tuple[str, str, str]] = []  # (key, kind, value)
        self._held: dict[tuple[str, str], None] = {}  # (key, operation), renewed until settled
        # Slots freed here, but perhaps not yet in Redis: a client that sends one request after the other must not
        # meet its own last one.
        self._freed: dict[str, list[str]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = Tasks()
        self.lost = 0  # settlements that never reached Redis

    async def judge(self, op: str, rules: Sequence[Rule]) -> list[State]:
        arguments: list[Any] = [self._now(), op, int(LEASE_SECONDS * 1e6)]
        for rule in rules:
            if rule.kind == "slots":
                arguments += ("s", rule.limit, " ".join(self._freed.get(PREFIX + rule.key, ())))
            else:
                arguments += ("r", rule.size * rule.unit, rule.amount * rule.unit)
        taken = [(PREFIX + rule.key, op) for rule in rules if rule.kind == "slots"]
        try:
            answer = await self._store.script(_JUDGE, [PREFIX + rule.key for rule in rules], arguments)
        except BaseException:
            # Whether Redis took the slots is unknown: free them, which harms nothing if it didn't.
            for key, _ in taken:
                self._put(key, "s", op)
            raise
        if answer[0] == 1:
            self._held.update(dict.fromkeys(taken))
        return _states(rules, [float(level) for level in answer[1:]])

    def settle(self, op: str, rule: Rule, actual: int | None) -> None:
        key = PREFIX + rule.key
        if rule.kind == "slots":
            self._held.pop((key, op), None)
            self._put(key, "s", op)
        elif actual is not None and actual != rule.amount:
            self._put(key, "r", repr((actual - rule.amount) * rule.unit))

    async def ping(self) -> None:
        await self._store.ping()

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        renewing = self._tasks.spawn(self._renew(), "ledger: renew")
        try:
            yield
        finally:
            renewing.cancel()
            if self._timer is not None:
                self._timer.cancel()
            await self._tasks.drain(1.0)
            await self._flush()

    def _now(self) -> int:
        return int(self._clock() * 1e6) if self._clock is not None else 0

    def _put(self, key: str, kind: str, value: str) -> None:
        if len(self._pending) >= PENDING_LIMIT:
            self.lost += 1
            return
        self._pending.append((key, kind, value))
        if kind == "s":
            self._freed.setdefault(key, []).append(value)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SETTLE_SECONDS, self._due)

    def _due(self) -> None:
        self._timer = None
        self._tasks.spawn(self._flush(), "ledger: settle")

    async def _flush(self) -> None:
        changes, self._pending = self._pending, []
        freed, self._freed = self._freed, {}
        del freed  # the call that is sent now comes before any later admission of this worker
        for start in range(0, len(changes), 500):
            part = changes[start : start + 500]
            try:
                await self._settle(part)
            except StoreUnavailable:
                # Not tried again: Redis may have done it, and twice would be wrong. Slots end with their lease.
                self.lost += len(part)
                log.warning("ledger_settlements_lost", count=len(part), lost=self.lost)

    async def _settle(self, changes: Sequence[tuple[str, str, str]]) -> None:
        arguments: list[Any] = [self._now(), int(LEASE_SECONDS * 1e6)]
        for _, kind, value in changes:
            arguments += (kind, value)
        await self._store.script(_SETTLE, [key for key, _, _ in changes], arguments)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            held = list(self._held)
            for start in range(0, len(held), 500):
                with contextlib.suppress(StoreUnavailable):
                    await self._settle([(key, "l", op) for key, op in held[start : start + 500]])
