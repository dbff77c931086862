"""The ledger in Redis: exact over all workers and gateways that share it.

What is admitted together is one call of a script (`ledger_lua.py`). What a worker holds of a limit ahead (`leases.py`)
it admits by itself, and notes. What ended within 20 ms is settled in one call; it waits here while Redis is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from gateway.errors import StatementError, StoreUnavailable
from gateway.kit import ledger_lua as lua
from gateway.kit.leases import SWEEP_SECONDS, Lease
from gateway.kit.ledger import ENDLESS, MOVER_SECONDS, PENDING_LIMIT, Row
from gateway.limits import Admission, Held, Level, Plan, Rule, Verdict, weighed
from gateway.logs import get_logger, worth_a_line
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

    from gateway.stores.redis import RedisStore

log = get_logger("gateway.ledger")

LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
SETTLE_SECONDS = 0.02
NOTE_SECONDS = 0.2  # so long a note may be on its way
AT_ONCE = 2  # times that is asked again without waiting for it
RETRY_SECONDS = 0.5

_REPEATABLE = frozenset("sbw")  # settling these twice does no harm


class _Change(NamedTuple):
    key: str
    kind: str
    op: str
    value: str | bytes = ""
    more: str = ""


def _charged(rule: Rule) -> str:
    """`more` of a change that is spent also without a reservation. The count may begin with it, so it says the end."""
    return "charge" if rule.until is None else str(int(rule.until * 1000))


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
        self._heard = lua.HEARD + self._name
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
                self._leases[rule.key] = Lease(rule, lua.PREFIX + rule.key, self._micros())
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
        if any(one.kind == "budget" for one in wished.values()) and not await self._store.post_opened(lua.NOTE):
            wished = {key: lease for key, lease in wished.items() if lease.kind != "budget"}
        arguments = [self._now(), int(LEASE_SECONDS * 1e6), op, row, "1" if give_back else "", self._name]
        kept = {key: lease.kept for key, lease in wished.items()}
        sent = self._micros()
        for rule in rules:
            key = lua.PREFIX + rule.key
            keys.append(key)
            if rule.kind == "slots":
                arguments += ("s", rule.limit, " ".join(self._freed.get(key, ())), "")
                taken.append((key, "l", op))
            elif rule.kind == "budget":
                least = rule.amount if rule.least is None else rule.least
                until = "" if rule.until is None else int(rule.until * 1000)
                arguments += ("b", rule.limit, f"{least} {rule.amount}", until)
                taken.append((lua.LEASES, "k", op))
            else:
                arguments += ("r", rule.size * rule.unit, rule.amount * rule.unit, "")
            arguments.append(kept.get(rule.key, ""))
        keys += (lua.OPERATION + op, lua.LEASES)
        try:
            known = (lua.LEASES, "k", op) in self._held  # it takes more
            answer = await self._answer(keys, arguments, after_notes=bool(wished) or known)
        except BaseException as error:
            # Whether Redis took it is unknown: give it back, which harms nothing if it didn't. What was taken for
            # an earlier attempt stays: its settlement ends both.
            undo = [_Change(lua.PREFIX + r.key, "s", op) for r in rules if r.kind == "slots"]
            if (lua.LEASES, "k", op) not in self._held:
                undo += [_Change(lua.PREFIX + r.key, "b", op, "0") for r in rules if r.kind == "budget"]
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
            answer = await self._store.script(lua.JUDGE, (*keys, heard), (*arguments, noted))
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
            self._held[lua.LEASES, "k", op] = None
        levels = [lease.take(r, granted if r.kind == "budget" else amount, op, now) for lease, r, amount in found]
        return Admission(op, held, levels, granted if plan.budgets else 0, plan, noted=not plan.budgets)

    async def noted(self, op: str) -> None:
        await asyncio.sleep(0)  # `_say` has been called before
        note = self._unsure.get(op)
        if note is not None:
            await self._store.script(lua.NOTE, *self._said([note], ""))

    def give(self, admission: Admission, plan: Plan, used: Sequence[int | None], row: bytes = b"") -> None:
        op, changes = admission.op, []
        for number, rule in plan.rules:
            lease, told = self._leases.get(rule.key), plan.told(rule)
            actual = None if told is None else used[told]
            if rule.kind == "budget":
                spent = admission.granted if actual is None else actual
                changes.append(_Change(lua.PREFIX + rule.key, "b", op, str(spent)))
                if lease is not None:
                    lease.reserved -= admission.granted
                    lease.spent += spent
            elif rule.kind == "slots":
                if lease is not None and lease.leave(op, self._micros()):
                    self._surplus.add(lease)
                    self._later(SETTLE_SECONDS)
            elif actual is not None and actual != admission.held[number].amount:
                moved = (actual - admission.held[number].amount) * rule.unit
                self._moves[lua.PREFIX + rule.key] = self._moves.get(lua.PREFIX + rule.key, 0.0) + moved
                if lease is not None:
                    lease.ahead += moved
                self._later(SETTLE_SECONDS)
        if plan.budgets:
            self._held.pop((lua.LEASES, "k", op), None)
        if row:
            changes.append(_Change(lua.ROWS, "w", op, row))
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
        if notes and not self._store.post(lua.NOTE, *self._said(notes, notes[0].number)):
            self._unsure.update((note.op, note) for note in notes)

    def _said(self, notes: Sequence[_Note], number: int | str) -> tuple[Sequence[str], Sequence[Any]]:
        """`number`: of the first."""
        keys = [self._heard, lua.LEASES]
        arguments: list[Any] = [self._now(), int(LEASE_SECONDS * 1e6), self._name, number]
        for note in notes:
            keys.append(lua.OPERATION + note.op)
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
            self._know(int(await self._store.script(lua.HOW_MANY_HEARD, (self._heard,), ())))
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
        self._noted, self._heard = 0, lua.HEARD + secrets.token_hex(8)
        await self._note_again()

    async def _note_again(self) -> None:
        for note in list(self._unsure.values()):
            with contextlib.suppress(StatementError):
                await self._store.script(lua.NOTE, *self._said([note], ""))

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
        self._store.send(lua.SETTLE, *self._settling(changes, 0))

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
        answer = await self._store.script(lua.PEEK, [lua.PREFIX + rule.key for rule in rules], arguments)
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
            key = lua.PREFIX + rule.key
            if rule.kind == "slots":
                if not admitted:
                    continue
                self._held.pop((key, "l", op), None)
                changes.append(_Change(key, "s", op))
                self._freed.setdefault(key, []).append(op)
            elif rule.kind == "budget":
                self._held.pop((lua.LEASES, "k", op), None)
                if admitted:
                    changes.append(_Change(key, "b", op, "" if used is None else str(used)))
                else:
                    changes.append(_Change(key, "b", op, str(rule.amount if used is None else used), _charged(rule)))
            elif admitted and used is not None and used != rule.amount:
                changes.append(_Change(key, "r", op, repr((used - rule.amount) * rule.unit)))
        if row:
            changes.append(_Change(lua.ROWS, "w", op, row))
        if changes:
            self._put(tuple(changes))

    def adjust(self, op: str, rule: Rule, delta: int) -> None:
        # An operation of its own: the settled one's reservation is gone, or was spent as reserved and stays so.
        self._put((_Change(lua.PREFIX + rule.key, "b", op + "/corrected", str(delta), _charged(rule)),))

    async def rows(self, most: int) -> list[Row]:
        arguments = (self._name, int(MOVER_SECONDS * 1000), most)
        dropped, self._in_stream, found = await self._store.script(
            lua.TAKE_ROWS, (lua.MOVER, lua.ROWS, lua.DROPPED), arguments
        )
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
            await self._store.call(lambda: self._store.client.xdel(lua.ROWS, *ids))
            self._in_stream = max(0, self._in_stream - len(ids))

    async def leave_rows(self) -> None:
        await self._store.script(lua.LEAVE_ROWS, (lua.MOVER,), (self._name,))
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
                pipe.hmget(lua.PREFIX + key, "spent", "reserved")
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
        return int(await self._store.script(lua.REAP, [lua.LEASES], [self._now(), 0]))

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
            answer = await self._store.script(lua.SETTLE, *self._settling(changes, noted))
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
            await self._settle([_Change(lua.LEASES, "x", self._name), *self._seats()])
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
