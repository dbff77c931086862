"""Limits under a race: two worker processes on one Valkey, many connections at once; and what a request asks of Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time

import aiohttp
import pytest
import redis.asyncio

from gateway.kit import ledger_lua as lua
from gateway.kit.ledger_redis import RENEW_SECONDS, SETTLE_SECONDS
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Hang, Json, ScriptedUpstream, chat_completion, chat_usage
from gateway.tasks import Tasks
from tests.faults.process import config, started

OFFERED = 300
TIMER = SETTLE_SECONDS - 0.001  # the event loop counts whole milliseconds
FOR_EVER = "30d"  # what refills while the test runs is no whole unit
BODY = {"model": "test/model", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}


@contextlib.asynccontextmanager
async def two_workers(folder, server, upstream, **limit):
    """(a session whose every request may meet either worker, a client of the Valkey)."""
    limits = [{"name": "all", "by": [], "per": FOR_EVER} | limit]
    file = config(
        folder,
        upstream,
        server={"workers": 2},
        services={"redis": server.url},
        plugins=[{"use": "api_keys"}, {"use": "rate_limit", "config": {"limits": limits}}],
    )
    async with redis.asyncio.Redis.from_url(server.url) as valkey, started(file) as running:
        await valkey.flushall()
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{running.port}",
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            headers={"Authorization": f"Bearer {running.key}"},
        ) as session:
            yield session, valkey
        running.signal()
        assert await running.exit_code(15) == 0


class Crowd:
    """Asks at once, as often as is offered."""

    def __init__(self, session):
        self._session = session
        self._tasks = Tasks()
        self.statuses = []

    async def ask(self):
        async with self._session.post("/v1/chat/completions", json=BODY) as reply:
            await reply.read()
            self.statuses.append(reply.status)

    @contextlib.asynccontextmanager
    async def asking(self, upstream):
        """Until each was refused or has reached the upstream; how many were refused. At the end all leave."""
        before = len(upstream.seen)
        for _ in range(OFFERED):
            self._tasks.spawn(self.ask(), "asks")
        try:
            async with asyncio.timeout(30):
                while len(self.statuses) + len(upstream.seen) - before < OFFERED:
                    await asyncio.sleep(0.01)
            assert set(self.statuses) == {429}
            yield len(self.statuses)
        finally:
            await self._tasks.drain(0)


async def asked_by(valkey):
    """How many scripts each worker has sent."""
    return sorted(int(c["tot-cmds"]) for c in await valkey.client_list() if c["cmd"] in {"evalsha", "eval"})


@pytest.mark.parametrize(("per", "refill"), [(FOR_EVER, math.inf), pytest.param("10m", 6, marks=pytest.mark.full)])
async def test_requests_race_over_two_workers(tmp_path, server, per, refill):
    """Of 300 at once as many are admitted as the limit says: never one more, at most two in a hundred less; the same
    where workers hold some of it ahead, as they do of what refills within minutes.
    """
    async with (
        ScriptedUpstream() as upstream,
        two_workers(tmp_path, server, upstream, requests=100, per=per) as (session, valkey),
    ):
        crowd, begun = Crowd(session), time.monotonic()
        await asyncio.gather(*(crowd.ask() for _ in range(OFFERED)))
        assert sorted(set(crowd.statuses)) == [200, 429]
        assert 98 <= crowd.statuses.count(200) <= 100 + (time.monotonic() - begun) / refill
        assert await valkey.exists("{xenios}:ledger:workers")
        assert len(upstream.seen) == crowd.statuses.count(200)
        first, second = await asked_by(valkey)
        assert first > OFFERED / 10, second


@pytest.mark.full
async def test_tokens_race_over_two_workers(tmp_path, server):
    """The estimates of those that are admitted at once never exceed the limit, and use it up to two in a hundred."""
    async with (
        ScriptedUpstream(Json(chat_completion(usage=chat_usage(0, 0))), default=Hang()) as upstream,
        two_workers(tmp_path, server, upstream, tokens=10_000) as (session, valkey),
    ):
        async with session.post("/v1/chat/completions", json=BODY) as reply:
            estimate = 10_000 - int(reply.headers["x-ratelimit-remaining-tokens"])
        assert 50 < estimate < 100
        async with asyncio.timeout(5):
            while await valkey.exists("{xenios}:ledger:rate_limit:all::tokens"):  # given back: it used none
                await asyncio.sleep(0.01)
        async with Crowd(session).asking(upstream) as refused:
            assert 9_800 <= (OFFERED - refused) * estimate <= 10_000
            assert (await asked_by(valkey))[0] > OFFERED / 10


async def taken(valkey, places):
    """By requests, or held ahead by their workers."""
    return await valkey.zcard(places) + int(await valkey.get(places + ":leased") or 0)


@pytest.mark.full
async def test_places_race_over_two_workers(tmp_path, server):
    """Exactly as many at once as there are places; when they leave, all places are free again."""
    async with (
        ScriptedUpstream(default=Hang()) as upstream,
        two_workers(tmp_path, server, upstream, concurrent=60) as (session, valkey),
    ):
        places = "{xenios}:ledger:rate_limit:all::concurrent"
        for _ in range(2):
            async with Crowd(session).asking(upstream) as refused:
                assert OFFERED - refused == 60
                assert await taken(valkey, places) == 60
            async with asyncio.timeout(5):
                while await taken(valkey, places):
                    await asyncio.sleep(0.01)
        assert (await asked_by(valkey))[0] > OFFERED / 10


async def test_one_call_whatever_the_number_of_rules(server):
    """With 34 rules in two plugins, and nothing held ahead, a request waits for one call to Valkey; settlements go
    together, one in 20 ms.
    """
    limits = [{"name": f"l{i}", "requests": 10**6, "tokens": 10**9, "concurrent": 1000} for i in range(10)]
    budgets = [{"name": f"b{i}", "usd": 1000} for i in range(4)]
    plugins = [
        "api_keys",
        {"use": "rate_limit", "config": {"limits": limits, "lease": False}},
        {"use": "budgets", "config": {"budgets": budgets, "unknown_price": "allow", "lease": False}},
    ]
    judge, settle = (hashlib.sha1(text.encode()).hexdigest() for text in (lua.JUDGE, lua.SETTLE))
    async with (
        redis.asyncio.Redis.from_url(server.url) as valkey,
        Gateway.test(plugins=plugins, settings={"services": {"redis": server.url}}) as gw,
    ):
        await valkey.flushall()
        for _ in range(5):
            assert (await gw.chat()).status == 200
        ledger = gw.snapshot.services.ledger
        await settled(gw, ledger, 5)
        async with watched(valkey) as commands:
            begun = time.monotonic()
            for _ in range(40):
                assert (await gw.chat()).status == 200
            await settled(gw, ledger, 45)
            took = time.monotonic() - begun
        sent = [words[:2] for words in commands]
        assert sent.count(["EVALSHA", judge]) == 40
        assert 1 <= sent.count(["EVALSHA", settle]) <= took / TIMER + 1 + took / RENEW_SECONDS + 1
        # the rest are greetings, of the test's own client too
        assert {words[0] for words in sent} <= {"EVALSHA", "HELLO", "CLIENT"}


async def settled(gw, ledger, count):
    """So many requests are over, and Valkey knows."""
    await gw.finished(count)
    async with asyncio.timeout(5):
        while ledger._pending or ledger._freed:
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def watched(valkey):
    """What clients, not scripts, ask of the Valkey."""
    commands, tasks = [], Tasks()
    async with valkey.monitor() as monitor:

        async def listen():
            async for told in monitor.listen():
                if told["command"] == "ECHO the end":
                    return
                if told["client_type"] != "lua":
                    commands.append(told["command"].split(" "))

        listening = tasks.spawn(listen(), "monitor")
        yield commands
        await valkey.echo("the end")
        async with asyncio.timeout(5):
            await listening
