"""A large batch while its workers are killed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter

import openai
import pytest

from gateway.kit.ledger_redis import RedisLedger
from gateway.kit.upstream import COST, MODEL, Json, ScriptedUpstream, chat_completion
from gateway.stores.redis import RedisStore
from tests.integration.process import serving_beside
from tests.jobs.processes import configured, workers
from tests.stores.servers import emptied, valkey_server

ENDPOINT = "/v1/chat/completions"
LINES = 5000
SECONDS = 2.5  # that each answer takes
QUIET = 0.3  # without a new call: whoever is admitted has been sent too
KILLS = 6
COST_OF_A_TOKEN = 15e-6  # of output
BUDGET = {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": 1000, "per": "total"}]}}


def line(n: int) -> bytes:
    body = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": f"Line {n:05}"}]}
    return json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": ENDPOINT, "body": body}).encode()


def quiet(upstream: ScriptedUpstream) -> bool:
    return bool(upstream.seen) and time.monotonic() - upstream.seen[-1].started > QUIET


def waiting(upstream: ScriptedUpstream) -> int:
    return sum(not seen.finished.is_set() and not seen.closed.is_set() for seen in upstream.seen[-2000:])


async def everything(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict]:
    return [json.loads(found) for found in (await client.files.content(file_id or "")).text.splitlines()]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pays", ["tenant", "operator"])
async def test_a_batch_of_5000_lines_survives_its_workers(tmp_path, pays):
    """Two workers are killed again and again with 50 calls or more under way: each custom_id has one result, the counts
    are right, each call that the upstream saw is a line's or abandoned, and the cost is the sum of both: an abandoned
    one costs what was reserved for it, and whoever `charge_abandoned` names has it in its rows and its budget.
    """
    answer = Json(chat_completion("Hi"), delay=SECONDS)
    settings = {"lanes": 50, "chunks": 4, "chunk_lines": 250}
    killed_with = []
    with valkey_server() as server:
        url = await emptied(server)
        async with ScriptedUpstream(default=answer) as upstream:
            config = configured(
                tmp_path, upstream.url, url,
                plugins=(BUDGET,), batches=settings, worker={"lease": "5s"}, charge_abandoned=pays,
            )  # fmt: skip
            async with serving_beside(tmp_path, "--config", config) as gateway:
                with workers(config) as start:
                    alive = [start(), start()]
                    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key) as client:
                        file = await client.files.create(
                            file=("in.jsonl", b"\n".join(map(line, range(LINES)))), purpose="batch"
                        )
                        batch = await client.batches.create(
                            input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
                        )
                        due, counts = time.monotonic() + 3, []
                        while (done := await client.batches.retrieve(batch.id)).status != "completed":
                            counts.append(done.request_counts.completed)
                            under_way = waiting(upstream)
                            if (
                                len(killed_with) < KILLS
                                and under_way >= 50
                                and quiet(upstream)
                                and time.monotonic() > due
                            ):
                                killed_with.append(under_way)
                                at = random.randrange(2)
                                await asyncio.to_thread(alive[at].kill)
                                alive[at] = start()
                                due = time.monotonic() + random.uniform(2, 6)
                            await asyncio.sleep(0.05)
                        results = await everything(client, done.output_file_id)
                    said = "".join(worker.log.read_text()[-3000:] for worker in alive)
                rows = await usage(gateway)
                deadline = time.monotonic() + 40  # what was abandoned is known once its lease has ended
                sums = await money(url)
                while (len(rows) < len(upstream.seen) or sums[1]) and time.monotonic() < deadline:
                    await asyncio.sleep(1)
                    rows, sums = await usage(gateway), await money(url)
        assert done.error_file_id is None, said
    print(f"killed with {killed_with} under way; {len(upstream.seen)} calls; {Counter(r['outcome'] for r in rows)}")
    assert len(killed_with) == KILLS
    assert sorted(found["custom_id"] for found in results) == sorted(f"id-{n}" for n in range(LINES))
    assert done.request_counts.to_dict() == {"total": LINES, "completed": LINES, "failed": 0}
    assert counts == sorted(counts)  # visible while it runs, and never less than before
    outcomes = Counter(row["outcome"] for row in rows)
    assert outcomes["ok"] == LINES
    assert len(upstream.seen) == LINES + outcomes["abandoned"]
    lost = [row for row in rows if row["outcome"] == "abandoned"]
    assert {row["tenant"] for row in lost} == {"operator" if pays == "operator" else "default"}
    [reserved] = {row["cost_usd"] for row in lost}  # the lines are alike
    assert reserved >= 20 * COST_OF_A_TOKEN
    assert sum(row["cost_usd"] for row in rows) == pytest.approx(COST * LINES + reserved * len(lost))
    charged = COST * LINES + (reserved * len(lost) if pays == "tenant" else 0)
    assert sums == (round(charged * 1e6), 0)


async def money(url: str) -> tuple[int, int]:
    """(spent, reserved) of the budget."""
    store = RedisStore(url)
    try:
        [sums] = await RedisLedger(store).budgets(["budgets:all:total:"])
    finally:
        await store.close()
    return sums


async def usage(gateway) -> list[dict]:
    """All rows."""
    rows, after = [], ""
    while True:
        answer = await asyncio.to_thread(gateway.request, "GET", f"/admin/usage?limit=1000{after}")
        rows += answer.data["data"]
        if not answer.data["has_more"]:
            return rows
        after = f"&after={answer.data['last_id']}"
