"""PostgreSQL and Redis killed while jobs are taken, run and stored, by real processes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import aiohttp
import pytest

from gateway.kit.ledger_redis import RedisLedger
from gateway.kit.upstream import COST, Json, ScriptedUpstream, chat_completion
from gateway.stores.redis import RedisStore
from gateway.tasks import Tasks
from tests.integration.process import serving_beside
from tests.jobs.asking import Asker, over, sent
from tests.jobs.processes import configured, workers
from tests.stores.postgres import postgres_server
from tests.stores.servers import valkey_server

JOBS, SENDERS, KILLS = 160, 8, 5
BUDGET = {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": 10, "per": "total"}]}}


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", ["postgres", "redis", "both and the worker"])
async def test_nothing_is_lost_or_paid_twice_when_the_stores_are_killed(tmp_path, killed):
    """kill -9 of PostgreSQL, of Redis, or of both and the worker, again and again in the middle of commits: what had
    ended stays as it was, each job that was taken ends well and is there once, each call that the upstream saw has one
    row, and in the end nothing is reserved and what was spent is the sum of the rows.
    """
    answer = chat_completion("Hello")
    with postgres_server(own=True) as postgres, valkey_server() as valkey:
        async with ScriptedUpstream(default=lambda _: Json(answer, delay=random.uniform(0.2, 2.5))) as upstream:
            config = configured(
                tmp_path, upstream.url, valkey.url,
                plugins=(BUDGET,), database=await postgres.new(), worker={"lease": "5s"},
                queues={"default": {"concurrency": 20, "attempts": 20}},
            )  # fmt: skip
            async with (
                serving_beside(tmp_path, "--config", config) as gateway,
                aiohttp.ClientSession() as session,
            ):
                asker = Asker(gateway.url, gateway.key, session)
                with workers(config) as start:
                    worker = start()
                    taken: dict[str, str] = {}

                    async def send(numbers):
                        for n in numbers:
                            taken[f"k{n}"] = await asker.take(f"k{n}")
                            await asyncio.sleep(random.uniform(0, 1.5))

                    tasks = Tasks()
                    senders = [tasks.spawn(send(range(i, JOBS, SENDERS)), "sender") for i in range(SENDERS)]
                    ended: dict[str, dict] = {}
                    for kill in range(1, KILLS + 1):
                        while len(now := over(await asker.jobs())) < kill * 25:
                            await asyncio.sleep(0.1)
                        ended |= now
                        if killed != "redis":
                            await asyncio.to_thread(postgres.kill)
                        if killed != "postgres":
                            await asyncio.to_thread(valkey.kill)
                        if killed == "both and the worker":
                            await asyncio.to_thread(worker.kill)
                        await asyncio.sleep(random.uniform(0.5, 2))
                        if killed != "redis":
                            await asyncio.to_thread(postgres.start)
                        if killed != "postgres":
                            await asyncio.to_thread(valkey.start)
                        if killed == "both and the worker":
                            worker = start()
                    await asyncio.gather(*senders)
                    async with asyncio.timeout(120):
                        while len(over(found := await asker.jobs())) < len(found):
                            await asyncio.sleep(0.5)
                    store = RedisStore(valkey.url)
                    try:
                        async with asyncio.timeout(60):  # the leases of what was cut off end first
                            while True:
                                rows = await asker.rows("job_")
                                [(spent, reserved)] = await RedisLedger(store).budgets(["budgets:all:total:"])
                                if not reserved and len(sent(rows)) >= len(upstream.seen):
                                    break
                                await asyncio.sleep(0.5)
                    finally:
                        await store.close()
    outcomes = Counter(row["outcome"] for row in rows.values())
    print(f"{killed}: {asker.told}; {len(upstream.seen)} calls, rows {outcomes}")
    assert set(found) == set(taken.values())
    assert len(found) == JOBS
    assert {job["status"] for job in found.values()} == {"succeeded"}
    assert {n: found[n] for n in ended} == ended
    assert outcomes["ok"] == JOBS
    assert len(upstream.seen) == len(sent(rows)) == outcomes["ok"] + outcomes["abandoned"]
    paid = [row for row in sent(rows) if row["tenant"] != "operator"]
    assert len(paid) == JOBS
    assert sum(row["cost_usd"] for row in paid) == pytest.approx(COST * JOBS)
    assert spent == round(COST * JOBS * 1e6)
