"""A hard budget over several real processes, with a real Valkey and a real PostgreSQL: the promise P4."""

import asyncio
import contextlib
import json
import os
import signal

import aiohttp
import pytest
import redis.asyncio

from gateway.kit.ledger_redis import RedisLedger
from gateway.kit.upstream import MODEL, Json, ScriptedUpstream, Slow, chat_completion
from gateway.stores.redis import RedisStore
from gateway.tasks import Tasks
from tests.integration.process import serving_beside
from tests.integration.test_workers import workers, xenios_pid
from tests.jobs.processes import workers as job_workers

RESERVED = 100  # micro-USD for one request of 100 tokens


@contextlib.asynccontextmanager
async def four_workers(folder, upstream, valkey, postgres, usd, *more, processes=4):
    """A gateway with one hard budget for all; (what is running, a client, (spent, reserved))."""
    text = {
        "server": {"port": 0, "workers": processes, "data_dir": str(folder / "data"), "drain_timeout": 1},
        "services": {"redis": valkey.url, "database": {"url": await postgres.new(), "migrate_on_start": True}},
        "upstreams": {"openrouter": {"base_url": upstream.url, "api_key": "sk-or-v1-test"}},
        "catalogue": {
            "refresh": 0,
            "overrides": {MODEL: {"input": 0, "cache_write": 0, "output": 1, "context_length": 8000}},
        },
        "plugins": [
            {"use": "api_keys"},
            {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": usd, "per": "total"}]}},
            {"use": "usage"},
            *more,
        ],
    }
    file = folder / "money.yaml"
    file.write_text(json.dumps(text))
    store = RedisStore(valkey.url)
    await store.client.flushall()
    ledger = RedisLedger(store)

    async def sums():
        [found] = await ledger.budgets(["budgets:all:total:"])
        return found

    # each request on a connection of its own: whichever worker accepts it
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with (
        serving_beside(folder, "--config", file) as running,
        aiohttp.ClientSession(connector=connector) as client,
    ):
        yield running, client, sums
    await store.close()


async def ask(running, client, **headers):
    """The status; None if the connection was lost."""
    body = {"model": MODEL, "max_tokens": RESERVED, "messages": [{"role": "user", "content": "Hi"}]}
    try:
        async with client.post(
            running.url + "/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {running.key}", **headers},
        ) as reply:
            await reply.read()
            return reply.status
    except aiohttp.ClientError:
        return None


async def rows(running, client):
    """(how many, their cost in micro-USD, outcomes), as /admin/usage adds them up."""
    async with client.get(
        running.url + "/admin/usage?group_by=outcome", headers={"Authorization": f"Bearer {running.key}"}
    ) as reply:
        found = await reply.json()
    assert reply.status == 200, found
    outcomes = {group["outcome"]: group["requests"] for group in found["data"]}
    return found["total"]["requests"], round((found["total"]["cost_usd"] or 0) * 1e6), outcomes


@pytest.mark.promise("P4.exact")
async def test_a_thousand_at_once_get_what_the_budget_pays_for(tmp_path, server, postgres):
    """A budget for ten requests, a thousand at once over four processes: exactly ten reach the upstream."""
    upstream = ScriptedUpstream(default=Json(chat_completion(cost=RESERVED / 1e6)))
    async with upstream, four_workers(tmp_path, upstream, server, postgres, "0.001") as (running, client, sums):
        statuses = await asyncio.gather(*(ask(running, client) for _ in range(1000)))
        assert (statuses.count(200), statuses.count(429)) == (10, 990)
        assert len(upstream.seen) == 10
        async with asyncio.timeout(10):
            while (found := await rows(running, client))[0] < 1000:
                await asyncio.sleep(0.1)
        assert found == (1000, 1000, {"ok": 10, "refused": 990})
        assert await sums() == (1000, 0)


@pytest.mark.full
@pytest.mark.promise("P4.settled")
async def test_what_was_not_spent_is_there_for_others(tmp_path, server, postgres):
    """Replies that cost a fifth of what was reserved, one by one, whichever process serves them: at least 45 of 50."""
    upstream = ScriptedUpstream(default=Json(chat_completion(cost=RESERVED / 5 / 1e6)))
    async with upstream, four_workers(tmp_path, upstream, server, postgres, "0.001") as (running, client, sums):
        served = 0
        while (status := await ask(running, client)) == 200:
            served += 1
        assert status == 429
        assert 45 <= served <= 50
        async with asyncio.timeout(10):
            while (await sums())[1]:
                await asyncio.sleep(0.05)
        assert await sums() == (served * RESERVED // 5, 0)


@pytest.mark.full
@pytest.mark.promise("P4.killed")
async def test_killed_workers_leave_no_money_behind(tmp_path, server, postgres):
    """Workers killed by SIGKILL under load: at rest nothing is reserved, and what was spent is the sum of the rows."""
    upstream = ScriptedUpstream(default=Slow(Json(chat_completion(cost=RESERVED / 2 / 1e6)), 0.15))
    async with upstream, four_workers(tmp_path, upstream, server, postgres, "1") as (running, client, sums):
        stop = asyncio.Event()
        statuses = []

        async def load():
            while not stop.is_set():
                statuses.append(await ask(running, client))

        tasks = Tasks()
        clients = [tasks.spawn(load(), "client") for _ in range(24)]
        for served in (60, 200):
            async with asyncio.timeout(20):
                while statuses.count(200) < served:
                    await asyncio.sleep(0.01)
            os.kill(workers(xenios_pid(tmp_path))[0], signal.SIGKILL)
        async with asyncio.timeout(20):
            while statuses.count(200) < 400:
                await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*clients)
        assert set(statuses) <= {200, None}
        lost = statuses.count(None)
        assert lost >= 2
        # a dead worker's leases end after 15 seconds
        async with asyncio.timeout(40):
            while (await sums())[1] or (await rows(running, client))[1] != (await sums())[0]:
                await asyncio.sleep(0.2)
        count, cost, outcomes = await rows(running, client)
        spent, reserved = await sums()
        assert (spent, reserved) == (cost, 0)
        assert outcomes["ok"] >= statuses.count(200) - lost
        assert 1 <= outcomes["abandoned"] <= lost
        assert cost == outcomes["ok"] * RESERVED // 2 + outcomes["abandoned"] * RESERVED
        assert count >= statuses.count(200)


async def held_ahead(valkey):
    """What each worker holds of the budget, in micro-USD."""
    found = []
    async for worker in valkey.scan_iter("{xenios}:ledger:leased:*"):
        found += [int(amount) for amount in await valkey.hvals(worker)]
    return found


async def kill_one_that_holds_some(valkey, processes):
    """Were there any that do not? Then none is killed."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)  # what they hold stays theirs
    try:
        if sum(amount > 0 for amount in await held_ahead(valkey)) < 4:
            return False
        os.kill(processes[0], signal.SIGKILL)
        return True
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


@pytest.mark.full
@pytest.mark.promise("P4.leased")
async def test_money_that_killed_workers_held_ahead_is_spent_once(tmp_path, server, postgres):
    """Workers that hold some of a budget ahead are killed by SIGKILL under load: others spend what those had not used,
    all of it, and no upstream has seen a request more than the budget pays for.
    """
    pays_for = 600
    upstream = ScriptedUpstream(default=Slow(Json(chat_completion(cost=RESERVED / 1e6)), 0.15))
    usd = str(pays_for * RESERVED / 1e6)
    async with (
        upstream,
        four_workers(tmp_path, upstream, server, postgres, usd) as (running, client, sums),
        redis.asyncio.Redis.from_url(server.url) as valkey,
    ):
        served = 0

        async def load():
            nonlocal served
            while (status := await ask(running, client)) != 429:
                served += status == 200

        tasks = Tasks()
        clients = [tasks.spawn(load(), "client") for _ in range(24)]
        for wanted in (60, 160):
            async with asyncio.timeout(40):
                while served < wanted or not await kill_one_that_holds_some(valkey, workers(xenios_pid(tmp_path))):
                    await asyncio.sleep(0.005)
        await asyncio.gather(*clients)
        # what they held, and had admitted, is put right after 15 seconds
        async with asyncio.timeout(60):
            while (await sums())[1] or any(await held_ahead(valkey)):
                await asyncio.sleep(0.2)
            while (await sums())[0] < pays_for * RESERVED:
                await ask(running, client)
        assert await ask(running, client) == 429
        async with asyncio.timeout(20):
            while (await rows(running, client))[1] < pays_for * RESERVED:
                await asyncio.sleep(0.2)
        outcomes = (await rows(running, client))[2]
        assert outcomes["ok"] + outcomes["abandoned"] == pays_for
        assert await sums() == (pays_for * RESERVED, 0)
        assert outcomes["ok"] <= len(upstream.seen) <= pays_for


async def patiently(running, client, **headers):
    """As a client does that is told to come again: on a busy machine the database may be a second late."""
    while (status := await ask(running, client, **headers)) == 503:
        pass
    return status


async def jobs(running, client, status):
    """How many there are in this state."""
    asked = running.url + f"/v1/jobs?limit=100&status={status}"
    async with client.get(asked, headers={"Authorization": f"Bearer {running.key}"}) as reply:
        assert reply.status == 200
        return len((await reply.json())["data"])


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.promise("P4.jobs")
async def test_jobs_and_live_requests_share_one_budget(tmp_path, server, postgres):
    """Two processes and their workers, one of which is killed with jobs under way: never more is out than the budget, and
    at rest nothing is reserved, and what was spent is the sum of the rows.
    """
    late = {"use": "jobs", "config": {"charge_abandoned": "tenant", "worker": {"lease": "5s"}}}
    upstream = ScriptedUpstream(default=Slow(Json(chat_completion(cost=RESERVED / 2 / 1e6)), 1))
    budget, taken, live = 60 * RESERVED, 24, 8
    async with (
        upstream,
        four_workers(tmp_path, upstream, server, postgres, str(budget / 1e6), late, processes=2) as (
            running, client, sums,
        ),
    ):  # fmt: skip
        with job_workers(tmp_path / "money.yaml") as start:

            async def ended(wanted):
                while True:
                    spent, reserved = await sums()
                    assert spent + reserved <= budget
                    if await jobs(running, client, "succeeded") + await jobs(running, client, "failed") >= wanted:
                        return
                    await asyncio.sleep(0.2)

            first = start()
            accepted = await asyncio.gather(*(patiently(running, client, Prefer="respond-async") for _ in range(taken)))
            assert set(accepted) == {202}
            await upstream.wait_seen(taken // 2, 40)
            asking = asyncio.gather(*(patiently(running, client) for _ in range(live)))
            await asyncio.to_thread(first.kill)
            start()
            start()
            async with asyncio.timeout(90):
                await ended(taken)
            assert (await jobs(running, client, "succeeded"), await asking) == (taken, [200] * live)
            # more than what is left pays for, from everywhere
            both = [{"Prefer": "respond-async"}, {}] * 10
            for _ in range(7):
                statuses = await asyncio.gather(*(patiently(running, client, **headers) for headers in both))
                assert set(statuses) <= {200, 202, 429}
            async with asyncio.timeout(90):
                while True:
                    spent, reserved = await sums()
                    assert spent + reserved <= budget
                    over = budget - spent < RESERVED or not (
                        await jobs(running, client, "queued") or await jobs(running, client, "running")
                    )
                    if over and not reserved and (await rows(running, client))[1] == spent:
                        break
                    await asyncio.sleep(0.2)
        _, cost, outcomes = await rows(running, client)
        assert await sums() == (cost, 0)
        assert outcomes["abandoned"] >= taken // 2
        assert cost == outcomes["ok"] * RESERVED // 2 + outcomes["abandoned"] * RESERVED <= budget
        # one that was killed between its reservation and its first byte is charged all the same
        assert outcomes["ok"] + taken // 2 <= len(upstream.seen) <= outcomes["ok"] + outcomes["abandoned"]
