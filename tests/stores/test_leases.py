"""Limits that workers hold some of ahead (kit/leases.py): exact as without, and back when nobody needs it."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
import signal
import sys
import time

import pytest
import redis.asyncio
import uvloop

from gateway.errors import RateLimited, StoreUnavailable
from gateway.kit import ledger_lua as lua
from gateway.kit.leases import USE_SECONDS
from gateway.kit.ledger_redis import LEASE_SECONDS, RedisLedger
from gateway.kit.testing import Gateway
from gateway.kit.upstream import MODEL
from gateway.limits import Held, Rule, RuleSet
from gateway.stores.redis import RedisStore
from tests.stores.prices import PRICES
from tests.stores.servers import emptied
from tests.stores.test_ledger import Clock
from tests.stores.test_races import settled, watched

_numbers = itertools.count()


def refuse(rule, state):
    del state
    return RateLimited(rule.key)


def rate(limit, **more):
    return Rule("rate", "rate", limit, refuse, lease=True, **more)


def slots(limit):
    return Rule("slots", "slots", limit, refuse, lease=True)


def used(exchange):
    raise AssertionError(f"the tests say what was used: {exchange}")


def budget(limit, key="budget"):
    return Rule(key, "budget", limit, refuse, lease=True, varies=True, actual=used)


class Worker:
    """One process' ledger, asked as requests ask it."""

    def __init__(self, store, clock=None):
        self.store = store
        self.ledger = RedisLedger(store, clock)
        self.alone = self.asked = 0  # how many it admitted by itself, and how many it asked Valkey for

    async def ask(self, rules, amount=1, row=b""):
        """What settles it; None if it was refused."""
        held = [Held(rules, amount)]
        plan, op = rules.plan(held), f"lease{next(_numbers)}"
        admission = self.ledger.take(op, plan, held, row)
        if admission is not None:
            self.alone += 1
            if not admission.noted:
                await self.ledger.noted(op)
            return lambda actual=None: self.ledger.give(admission, plan, [actual for _ in plan.actual])
        self.asked += 1
        verdict = await self.ledger.judge(op, held[0].rules(), row)
        if not verdict.allowed:
            return None
        told = [rule for rule in held[0].rules() if rule.kind != "rate"]
        return lambda actual=None: self.ledger.settle(
            op, [(rule, None if rule.kind == "slots" else actual) for rule in told]
        )


@contextlib.asynccontextmanager
async def workers(server, count=1, clock=None):
    """So many on one Valkey, which is empty."""
    await emptied(server)
    async with survivors(server, clock, count) as made:
        yield made


@contextlib.asynccontextmanager
async def survivors(server, clock, count=1):
    """So many on a Valkey that others have used."""
    made = [Worker(RedisStore(server.url), clock) for _ in range(count)]
    try:
        yield made
    finally:
        for worker in made:
            for timer in (worker.ledger._timer, worker.ledger._sweep):
                if timer is not None:
                    timer.cancel()
            await worker.ledger._tasks.drain(5)
            await worker.store.close()


async def leased(worker, key="{xenios}:ledger:budget"):
    return int(await worker.store.client.hget(key, "leased") or 0)


async def test_nothing_is_held_that_could_admit_nobody(server):
    """40 an hour over three workers: a lease is worth less than one request, so that none of the 40 is kept from whoever
    asks last.
    """
    rules = RuleSet([rate(40, per=3600.0)])
    async with workers(server, 3, Clock()) as group:
        for worker in group:
            for _ in range(3):
                assert await worker.ask(rules)
        last = group[-1]
        assert [await last.ask(rules) is not None for _ in range(35)] == [True] * 31 + [False] * 4
        assert sum(worker.alone for worker in group) == 0


@pytest.mark.promise("P4.leased")
async def test_four_workers_never_pass_a_limit(server):
    """Whatever they lease, use, keep and give back: in no span more than the rate allows, never more at once than there
    are places, never more spent and reserved than the budget; and most of it without asking.
    """
    clock, chance = Clock(), random.Random(5)
    size, per, places, money = 60, 60.0, 25, 12_000
    rules = RuleSet([rate(size, per=per), slots(places), budget(money)])
    came, under_way, spent = [], [], 0
    async with workers(server, 4, clock) as group:
        refused = 0
        for _ in range(4000):
            worker = chance.choice(group[: 1 + int(clock.now // 40) % 4])
            amount = chance.randint(1, 20)
            over = await worker.ask(rules, amount)
            if over is None:
                refused += 1
            else:
                came.append(clock.now)
                under_way.append((over, amount))
                assert len(under_way) <= places
            while under_way and (len(under_way) > 20 or chance.random() < 0.4):
                end, amount = under_way.pop(chance.randrange(len(under_way)))
                cost = chance.randint(0, amount)
                end(cost)
                spent += cost
            assert spent + sum(amount for _, amount in under_way) <= money
            if chance.random() < 0.1:
                chance.choice(group).ledger._sweep_leases()
            if chance.random() < 0.05:
                await asyncio.gather(*(one.ledger.flush() for one in group))
            clock.now += chance.choice([0, 0, 0, 0, 0, 0.1, 0.3, 1, 2, 15])
        for end, amount in under_way:
            end(amount)
            spent += amount
        for i, first in enumerate(came):
            for n, last in enumerate(came[i : i + 3 * size], 1):
                assert n <= size + (last - first) * size / per + 1e-6
        clock.now += USE_SECONDS
        for worker in group:
            worker.ledger._sweep_leases()
            await worker.ledger.flush()
        assert await group[0].ledger.budgets(["budget"]) == [(spent, 0)]
        assert await leased(group[0]) == 0
        assert await group[0].store.client.exists("{xenios}:ledger:slots:leased") == 0
        assert refused > 100
        assert sum(worker.alone for worker in group) > 400


async def test_all_of_a_limit_is_there_for_who_asks(server):
    """One worker, one request after the other: exactly as many are admitted as the limit says, all kinds alike."""
    for rules, most in (
        (RuleSet([rate(100, per=10**6)]), 100),
        (RuleSet([slots(100)]), 100),
        (RuleSet([budget(100)]), 100),
    ):
        async with workers(server, 1, Clock()) as [worker]:
            assert sum([await worker.ask(rules) is not None for _ in range(130)]) == most
            # what is leased must melt within seconds, or come back otherwise
            assert worker.alone > 50 or rules.rules[0].kind == "rate"


async def test_of_the_last_tenth_nothing_is_held_ahead(server):
    """What two workers leave each other at the end is exact to the last."""
    cap = RuleSet([budget(1000)])
    async with workers(server, 2, Clock()) as (one, other):
        for _ in range(3):
            await one.ask(cap, 10)
        assert await leased(one) > 0
        while await one.ask(cap, 10) is not None:
            pass
        assert await other.ask(cap, 10) is None
        await one.ledger.flush()
        assert await leased(one) == 0
        assert await one.ledger.budgets(["budget"]) == [(0, 1000)]


@pytest.mark.promise("P4.leased")
async def test_what_a_killed_worker_held_comes_back(server):
    """After 15 seconds: what it only held ahead is there again, what it had admitted is spent, with the rows it left."""
    clock = Clock()
    rules = RuleSet([rate(100), slots(100), budget(1000)])
    async with workers(server, 2, clock) as (dead, alive):
        for _ in range(4):
            assert await dead.ask(rules, 10, b"who it was")
        assert dead.alone == 2
        await asyncio.sleep(0)  # the pass of the loop is over
        await dead.ledger.flush()
        assert await leased(dead) > 200
        clock.now += LEASE_SECONDS + 0.1
        while await alive.ledger.reap():
            pass
        assert await leased(alive) == 0
        assert await alive.ledger.budgets(["budget"]) == [(40, 0)]
        rows = await alive.ledger.rows(10)
        assert [(row.payload, row.abandoned) for row in rows] == [(b"who it was", 10)] * 4
        states = await alive.ledger.peek([rule.copy() for rule in rules.rules])
        assert [state.remaining for state in states[1:]] == [99, 959]
        assert states[0].remaining >= 95


class Killed(Worker):
    """A process whose last act is to admit five requests."""

    @classmethod
    def main(cls, loop, url):
        with asyncio.Runner(loop_factory={"asyncio": None, "uvloop": uvloop.new_event_loop}[loop]) as runner:
            now = time.time()
            runner.run(cls(RedisStore(url), lambda: now).live())  # its lease lasts

    async def live(self):
        rules = RuleSet([budget(10_000)])
        for _ in range(3):
            await self.ask(rules, 10, b"before")
        await asyncio.sleep(0.1)  # what is under way has come
        print("ready", flush=True)
        sys.stdin.readline()  # whatever Valkey does until the end, this process does not hear of it
        for _ in range(10):  # Valkey reads these in parts, and finds nobody to answer after the first
            self.ledger._tasks.spawn(self.ledger.peek([budget(1, f"other{i}") for i in range(100)]), "asks")
        await asyncio.sleep(0)
        for _ in range(5):
            await self.ask(rules, 10, b"last")
        if self.alone == 6:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.promise("P4.leased")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_what_is_admitted_in_the_moment_of_a_kill_is_spent(server, loop):
    """A process admits requests within its lease and is killed by SIGKILL before it does anything else: Valkey hears of
    each, though it finds nobody to give an answer that it owes; so that they are spent as reserved and leave their
    rows, as those of any process that was killed.
    """
    await emptied(server)
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"from tests.stores.test_leases import Killed; Killed.main({loop!r}, {server.url!r})"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert await child.stdout.readline() == b"ready\n"
        server.freeze()
        child.stdin.write(b"go\n")
        assert await child.wait() == -signal.SIGKILL
    finally:
        server.thaw()
        if child.returncode is None:
            child.kill()
            await child.wait()
    clock = Clock()
    clock.now = time.time() + LEASE_SECONDS + 1
    async with survivors(server, clock) as [alive]:
        assert await alive.ledger.budgets(["budget"]) == [(0, 80)]
        while await alive.ledger.reap():
            pass
        assert await alive.ledger.budgets(["budget"]) == [(80, 0)]
        assert await leased(alive) == 0
        rows = [(row.payload, row.abandoned) for row in await alive.ledger.rows(10)]
        assert sorted(rows) == [(b"before", 10)] * 3 + [(b"last", 10)] * 5


async def test_what_was_only_slow_is_put_right(server):
    """A worker that was given up for dead with requests within its lease: they are settled at what they cost."""
    clock = Clock()
    rules = RuleSet([slots(100), budget(1000)])
    async with workers(server, 2, clock) as (slow, other):
        ends = [await slow.ask(rules, 10) for _ in range(6)]
        assert slow.alone == 4
        await slow.ledger.flush()
        clock.now += LEASE_SECONDS + 0.1
        while await other.ledger.reap():
            pass
        await slow.ledger.renew()  # its places are taken again
        assert await slow.store.client.get("{xenios}:ledger:slots:leased") is not None
        for end in ends:
            end(3)
        slow.ledger._sweep_leases()
        await slow.ledger.flush()
        assert await other.ledger.budgets(["budget"]) == [(18, 0)]
        assert (await other.ledger.peek([slots(100)]))[0].remaining == 99


async def test_a_window_that_ends_takes_its_lease_along(server):
    """What was held of May is May's: June begins with all of its money, and May's comes back."""
    clock = Clock()
    may, june = RuleSet([budget(1000, "may")]), RuleSet([budget(1000, "june")])
    async with workers(server, 1, clock) as [worker]:
        for _ in range(4):
            await worker.ask(may, 10)
        assert await leased(worker, "{xenios}:ledger:may") > 0
        clock.now += USE_SECONDS
        assert await worker.ask(june, 1000)
        worker.ledger._sweep_leases()
        await worker.ledger.flush()
        assert await leased(worker, "{xenios}:ledger:may") == 0
        assert await worker.ledger.budgets(["may", "june"]) == [(0, 40), (0, 1000)]


@pytest.mark.parametrize("kind", [budget, slots, rate])
async def test_a_limit_that_is_lowered_holds_at_once(server, kind):
    """A reload: what was leased of the larger limit admits nobody beyond the smaller one."""
    before, after = RuleSet([kind(1000)]), RuleSet([kind(20)])
    async with workers(server, 2, Clock()) as (one, other):
        for worker in (one, other):
            for _ in range(4):
                assert await worker.ask(before)
        assert one.alone
        admitted = 0 if kind is rate else 8
        for _ in range(30):
            for worker in (one, other):
                admitted += await worker.ask(after) is not None
        assert admitted <= 20


async def test_a_store_that_goes_away_during_a_lease(server):
    """Until that is known the lease serves, then the plugin's policy decides; at its return all is settled, once."""
    cap = RuleSet([budget(1000), slots(100)])
    async with workers(server) as [worker]:
        ends = [await worker.ask(cap, 10) for _ in range(3)]
        alone = worker.alone
        server.freeze()
        try:
            ends.append(await worker.ask(cap, 10))
            assert worker.alone == alone + 1
            async with asyncio.timeout(5):
                while not worker.store.is_open:
                    await asyncio.sleep(0.01)
            with pytest.raises(StoreUnavailable):
                await worker.ask(cap, 10)
            ends.pop()(7)
            ends.pop()(7)
        finally:
            server.thaw()
        async with asyncio.timeout(10):
            while worker.store.is_open:
                await asyncio.sleep(0.02)
        await worker.ledger.flush()
        assert await worker.ledger.budgets(["budget"]) == [(14, 20)]
        assert await leased(worker) == 0
        assert await worker.ask(cap, 10)
        for end in ends:
            end(3)
        await worker.ledger.flush()
        assert (await worker.ledger.budgets(["budget"]))[0] == (20, 10)


@contextlib.contextmanager
def unposted(worker):
    """What a worker notes meanwhile, and nobody hears."""
    post, unheard = worker.store.post, []
    worker.store.post = lambda *note: unheard.append(note) or True
    try:
        yield unheard
    finally:
        worker.store.post = post


@pytest.mark.promise("P4.leased")
@pytest.mark.parametrize("arrives", [False, True], ids=["never", "late"])
async def test_a_note_that_does_not_arrive_is_told_again(server, arrives):
    """The connection on which a worker notes what it admits breaks, or is slow by seconds: nothing more is admitted on
    it, what was is reserved and spent as any, once, whenever the note still comes.
    """
    cap = RuleSet([budget(1000)])
    async with workers(server, 2) as (worker, other):
        for _ in range(3):
            (await worker.ask(cap, 10))(10)
        with unposted(worker) as unheard:
            long, short = await worker.ask(cap, 10), await worker.ask(cap, 20)
        assert len(unheard) == 2
        short(7)
        await worker.ledger.flush()
        assert await other.ledger.budgets(["budget"]) == [(37, 10)]
        assert await worker.ask(cap, 954) is None
        worker.ledger._sweep_leases()
        await worker.ledger.flush()
        assert await leased(worker) == 0
        if arrives:
            for note in unheard:
                await other.store.script(*note)
        long(8)
        await worker.ledger.flush()
        assert not worker.ledger._unsure
        if arrives:
            for note in unheard:
                await other.store.script(*note)
        assert await other.ledger.budgets(["budget"]) == [(45, 0)]
        for _ in range(3):
            (await worker.ask(cap, 10))(10)
        assert worker.alone > 3
        await worker.ledger.flush()
        assert await other.ledger.budgets(["budget"]) == [(75, 0)]


async def test_a_settlement_waits_for_its_note(server):
    """What is over before Valkey has read that it was admitted is spent once it has."""
    cap = RuleSet([budget(1000)])
    async with workers(server, 2) as (worker, other):
        for _ in range(3):
            (await worker.ask(cap, 10))(10)
        with unposted(worker) as later:
            (await worker.ask(cap, 10))(7)
        script, put_off = worker.store.script, asyncio.Event()

        async def heeded(*call):
            answer = await script(*call)
            if isinstance(answer, list):  # a settlement that was told to wait
                put_off.set()
            return answer

        worker.store.script = heeded
        over = worker.ledger._tasks.spawn(worker.ledger.flush(), "settles")
        async with asyncio.timeout(10):
            await put_off.wait()
        assert not over.done()
        assert worker.store.post(*later[0])
        assert await over
        assert not worker.ledger._unsure
        assert await other.ledger.budgets(["budget"]) == [(37, 0)]


@pytest.mark.promise("P4.leased")
async def test_a_request_goes_on_when_its_note_has_left(server):
    """Where notes can't leave any more, a request that was just admitted tells Valkey itself before it goes on."""
    rules = RuleSet([budget(1000)])
    async with workers(server, 2) as (worker, other):
        for _ in range(3):
            (await worker.ask(rules, 10))(10)
        await worker.ledger.flush()
        held = [Held(rules, 15)]
        admission = worker.ledger.take("op", rules.plan(held), held)
        worker.store.close_post()
        await worker.ledger.noted("op")
        assert not admission.noted
        assert await other.ledger.budgets(["budget"]) == [(30, 15)]


async def test_where_nothing_can_be_noted_each_request_asks(server):
    """A server that knows no CLIENT REPLY: budgets work as without leases."""
    cap = RuleSet([budget(100)])
    async with workers(server) as [worker]:
        worker.store._post_not_before = float("inf")
        assert sum([await worker.ask(cap) is not None for _ in range(110)]) == 100
        assert not worker.alone
        assert await leased(worker) == 0


async def test_the_end_of_a_process_gives_back(server):
    """Whoever comes next has all that was not used."""
    async with workers(server, 2) as (worker, _):
        async with worker.ledger.lifespan():
            for _ in range(4):
                end = await worker.ask(RuleSet([budget(1000), slots(100)]), 10)
                end(10)
        assert await leased(worker) == 0
        assert not await worker.store.client.exists("{xenios}:ledger:slots:leased")
        assert await worker.ledger.budgets(["budget"]) == [(40, 0)]


async def test_a_typical_request_asks_nobody(server):
    """With requests, tokens, places and two budgets in force, of 100 requests in a row a handful wait for Valkey."""
    plugins = [
        "api_keys",
        {
            "use": "rate_limit",
            "config": {"limits": [{"name": "key", "requests": 10**4, "tokens": 10**9, "concurrent": 99}]},
        },
        {
            "use": "budgets",
            "config": {"budgets": [{"name": "key", "usd": 1000}, {"name": "all", "by": [], "usd": 1000}]},
        },
    ]
    await emptied(server)
    settings = {"services": {"redis": server.url}, "catalogue": {"overrides": PRICES}}
    async with (
        redis.asyncio.Redis.from_url(server.url) as valkey,
        Gateway.test(plugins=plugins, settings=settings) as gw,
    ):
        async with watched(valkey) as commands:
            for number in range(100):
                reply = await gw.chat(model=MODEL, max_tokens=10)
                assert reply.status == 200
                assert reply.headers["x-ratelimit-remaining-requests"] in {str(10**4 - n) for n in range(1, number + 2)}
            await settled(gw, gw.snapshot.services.ledger, 100)
        judge = hashlib.sha1(lua.JUDGE.encode()).hexdigest()
        assert sum(words[:2] == ["EVALSHA", judge] for words in commands) <= 20
