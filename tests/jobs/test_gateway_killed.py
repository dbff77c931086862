"""The gateway itself is killed while it takes jobs and its own worker runs them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections import Counter

import aiohttp
import pytest

from gateway.kit.ledger_redis import RedisLedger
from gateway.kit.upstream import COST, Json, ScriptedUpstream, chat_completion
from gateway.stores.embedded import url_of_running
from gateway.stores.redis import RedisStore
from gateway.tasks import Tasks
from tests.integration.process import serving_beside
from tests.integration.test_workers import alive, children
from tests.jobs.asking import Asker, over, sent
from tests.tools import free_port

JOBS, SENDERS, KILLS = 80, 6, 3
BUDGET = {"name": "all", "by": [], "usd": 10, "per": "total"}


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", ["the parent", "all of it"])
async def test_what_was_promised_by_202_is_kept_by_the_next_gateway(tmp_path, killed):
    """`xenios serve` with its own Valkey, SQLite file and worker is killed again and again, by its parent process or as
    a whole: each 202 that a client got is one job that ends well, one that had ended stays as it was, no call is without
    its row, and what was spent is the sum of the rows.
    """
    port = str(free_port())
    config = tmp_path / "xenios.yaml"
    answer = chat_completion("Hello")
    async with ScriptedUpstream(default=lambda _: Json(answer, delay=random.uniform(0.2, 2))) as upstream:
        settings = {
            "server": {"workers": 2, "data_dir": "data", "drain_delay": 0},
            "services": {"redis": "embedded", "database": {"url": "sqlite", "migrate_on_start": True}},
            "upstreams": {"openrouter": {"base_url": upstream.url, "api_key": "sk-or-v1-test"}},
            "catalogue": {"refresh": 0},
            "plugins": [
                {"use": "api_keys"},
                {"use": "budgets", "config": {"budgets": [BUDGET]}},
                {"use": "usage"},
                {"use": "jobs", "config": {
                    "worker": {"embedded": True, "lease": "5s", "grace": 2},
                    "queues": {"default": {"concurrency": 10, "attempts": 20}},
                }},
            ],
        }  # fmt: skip
        config.write_text(json.dumps(settings))

        def serve():
            return serving_beside(tmp_path, "--config", config, port=port)

        taken: dict[str, str] = {}
        ended: dict[str, dict] = {}
        tasks, senders = Tasks(), []
        async with aiohttp.ClientSession() as session:

            async def send(asker, numbers):
                for n in numbers:
                    taken[f"k{n}"] = await asker.take(f"k{n}")
                    await asyncio.sleep(random.uniform(0, 1.5))

            for kill in range(1, KILLS + 1):
                with contextlib.suppress(AssertionError):  # it does not end as it should
                    async with serve() as gateway:
                        asker = Asker(gateway.url, gateway.key, session)
                        if not senders:
                            senders = [
                                tasks.spawn(send(asker, range(i, JOBS, SENDERS)), "sender") for i in range(SENDERS)
                            ]
                        while len(now := over(await asker.jobs())) < kill * 18:
                            await asyncio.sleep(0.1)
                        ended |= now
                        family = [gateway.pid, *children(gateway.pid)]
                        for pid in family if killed == "all of it" else family[:1]:
                            os.kill(pid, signal.SIGKILL)
                async with asyncio.timeout(40):  # the data directory is one gateway's at a time
                    while any(map(alive, family)):
                        await asyncio.sleep(0.1)
            async with serve() as gateway:
                asker = Asker(gateway.url, gateway.key, session)
                await asyncio.gather(*senders)
                async with asyncio.timeout(90):
                    while len(over(found := await asker.jobs())) < len(found):
                        await asyncio.sleep(0.2)
                store = RedisStore(url_of_running(tmp_path / "data/valkey"))
                try:
                    async with asyncio.timeout(90):  # what nobody has settled for half a minute is settled then
                        while True:
                            rows = sent(await asker.rows("job_"))
                            paid = sum(row["cost_usd"] for row in rows if row["tenant"] != "operator")
                            [sums] = await RedisLedger(store).budgets(["budgets:all:total:"])
                            if len(rows) >= len(upstream.seen) and sums == (round(paid * 1e6), 0):
                                break
                            await asyncio.sleep(0.5)
                finally:
                    await store.close()
    outcomes = Counter(row["outcome"] for row in rows)
    print(f"{killed}: {len(ended)} had ended before; {len(upstream.seen)} calls, rows {outcomes}")
    assert {*taken.values()} == {*found}
    assert len(found) == JOBS
    assert {job["status"] for job in found.values()} == {"succeeded"}
    assert {n: found[n] for n in ended} == ended
    assert len(upstream.seen) == len(rows)
    assert outcomes["ok"] == JOBS
    assert sums == (round(COST * JOBS * 1e6), 0)
