"""Thousands of jobs through one worker leave what they should, and nothing else."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
import redis.asyncio

from gateway.kit.upstream import Error, Json, ScriptedUpstream, Stream, chat_completion, chat_events
from tests.integration.process import serving_beside
from tests.jobs.asking import Asker, over
from tests.jobs.processes import configured, memory, workers
from tests.stores.servers import valkey_server

FIRST, JOBS, SENDERS = 300, 2000, 16
REFUSED = len(range(0, JOBS, 7))
MEMORY, HANDLES = 24 << 20, 10  # more than after the first ones
BUDGET = {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": 1000, "per": "total"}]}}


class Left(NamedTuple):
    """How many keys of which kind are in Redis; open files and bytes of the gateway and the worker."""

    keys: Counter[str]
    handles: list[int]
    memory: list[int]


def handles(pid: int) -> int:
    return len([*Path(f"/proc/{pid}/fd").iterdir()])


def answer(seen):
    """Every seventh is refused."""
    number = int(seen.json["messages"][0]["content"])
    if number % 7 == 0:
        return Error(400)
    text = "Hello there, how are you? " * 20
    return Stream(*chat_events(text, pieces=20)) if seen.stream else Json(chat_completion(text))


async def keys(url: str) -> Counter[str]:
    """How many there are of each kind in Redis; what is an id in a name is a star."""
    async with redis.asyncio.Redis.from_url(url) as client:
        found = [key.decode() async for key in client.scan_iter(count=1000)]
    return Counter(re.sub(r"[0-9a-f]{12,}|\d+", "*", key) for key in found)


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_two_thousand_jobs_leave_only_their_rows(tmp_path):
    """Whole, streamed and refused ones, one worker: its memory and the gateway's do not grow with their number, nor do
    their open files or the keys in Redis; each job has its end and its one row.
    """
    async with ScriptedUpstream(default=answer) as upstream:
        with valkey_server() as valkey:
            config = configured(tmp_path, upstream.url, valkey.url, plugins=(BUDGET,))
            async with (
                serving_beside(tmp_path, "--config", config) as gateway,
                aiohttp.ClientSession() as session,
            ):
                asker = Asker(gateway.url, gateway.key, session)
                with workers(config) as start:
                    pids = (gateway.pid, start().process.pid)

                    async def send(numbers):
                        for n in numbers:
                            said = {"stream": n % 2 == 0, "messages": [{"role": "user", "content": str(n)}]}
                            await asker.take(f"k{n}", **said)

                    async def at_rest(first, count):
                        """What there is once all have ended."""
                        await asyncio.gather(*(send(range(first + i, count, SENDERS)) for i in range(SENDERS)))
                        for status in ("queued", "running", "queued"):
                            while (await asker.get(f"/v1/jobs?limit=1&status={status}"))["data"]:
                                await asyncio.sleep(0.5)
                        async with asyncio.timeout(20):
                            while (left := await keys(valkey.url)).keys() & {"rq:job:job-job_*", "rq:execution:*"}:
                                await asyncio.sleep(0.5)
                        return Left(left, [handles(pid) for pid in pids], [memory(pid)[0] for pid in pids])

                    first = await at_rest(0, FIRST)
                    last = await at_rest(FIRST, JOBS)
                    found, rows = await asker.jobs(), await asker.rows("job_")
    print(f"\nafter {FIRST}: {first}\nafter {JOBS}: {last}")
    assert len(found) == len(over(found)) == JOBS
    assert Counter(job["status"] for job in found.values()) == {"failed": REFUSED, "succeeded": JOBS - REFUSED}
    assert {row.rpartition("-")[0] for row in rows} == {*found}
    assert len(rows) == len(upstream.seen) == JOBS
    # the marks of what was settled go after a while
    assert {name: n for name, n in last.keys.items() if n > first.keys[name]} == {}
    assert [now - was for was, now in zip(first.handles, last.handles, strict=True) if now - was > HANDLES] == []
    assert [(now - was) >> 20 for was, now in zip(first.memory, last.memory, strict=True) if now - was > MEMORY] == []
