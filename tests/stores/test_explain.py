"""Explaining beside a real Valkey: what the gateways share is read, by whichever way one asks, and never changed."""

import asyncio
import json
import re

import redis.asyncio

from gateway.kit.keys import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from tests.integration.process import xenios
from tests.stores.servers import emptied

ADA = new_key()
BODY = {"model": "anthropic/claude-haiku-4.5", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}


def plugins():
    """Nothing is held ahead: that would count as taken for whoever asks beside the gateway, and soon come back."""
    key = {"id": "ada", "hash": hash_key(ADA, PEPPER), "limits": {"requests": 3, "per": "1h", "usd": 1}}
    return [
        {"use": "api_keys", "config": {"keys": [key]}},
        {"use": "rate_limit", "config": {"lease": False, "limits": [{"name": "at-once", "by": [], "concurrent": 5}]}},
        {"use": "budgets", "config": {"lease": False, "budgets": [{"name": "all", "by": [], "usd": 2}]}},
        "fallback",
    ]


async def everything(url):
    """Each key of the server with what it holds; not how long it lives."""
    async with redis.asyncio.Redis.from_url(url) as client:
        return {key: await client.dump(key) for key in await client.keys()}


async def test_what_gateways_share_is_told_and_left_alone(server, tmp_path):
    """By the gateway itself and by `xenios explain` beside it: what was taken of the key's limits and of everybody's."""
    url = await emptied(server)
    async with Gateway.test(plugins=plugins(), settings={"services": {"redis": url}}) as gw:
        headers = {"Authorization": f"Bearer {ADA}"}
        for number in (1, 2):
            assert (await gw.post("/v1/chat/completions", BODY, headers=headers)).status == 200
            await gw.finished(number)
        await gw.snapshot.services.ledger.flush()
        before = await everything(url)
        assert len(before) >= 3
        asked = (await gw.post("/admin/explain", {"body": BODY, "as": "ada"})).data
        told = {limit["key"]: limit for limit in asked["limits"]}
        assert told["rate_limit:own limits:key:ada:requests"]["left"] == 0
        assert told["rate_limit:at-once::concurrent"]["left"] == 4
        budgets = [limit for limit in asked["limits"] if limit["kind"] == "budget"]
        assert all(0 < limit["takes_usd"] < limit["left_usd"] for limit in budgets)

        (tmp_path / "request.json").write_text(json.dumps(BODY))
        (tmp_path / "own.yaml").write_text(
            json.dumps(
                {
                    "upstreams": {"openrouter": {"without_key": "simulate"}},
                    "services": {"redis": url},
                    "plugins": [entry if isinstance(entry, dict) else {"use": entry} for entry in plugins()],
                }
            )
        )
        args = ("explain", "request.json", "-c", "own.yaml", "--as", "ada")
        alone = await asyncio.to_thread(xenios, *args, "--json", cwd=tmp_path)
        assert alone.returncode == 0, alone.stderr
        data = json.loads(alone.stdout)
        assert "limits" not in data["note"]
        assert [(limit["key"], limit.get("left"), limit.get("left_usd")) for limit in data["limits"]] == [
            (limit["key"], limit.get("left"), limit.get("left_usd")) for limit in asked["limits"]
        ]
        words = (await asyncio.to_thread(xenios, *args, cwd=tmp_path)).stdout
        assert "own limits: 3 requests per 1h; takes 1, 0 left then" in words
        assert re.search(r"all: 2 USD per month; takes 0\.0\d+ USD, 1\.9\d+ USD left then", words)
        assert await everything(url) == before

        assert (await gw.post("/v1/chat/completions", BODY, headers=headers)).status == 200
        refused = (await gw.post("/admin/explain", {"body": BODY, "as": "ada"})).data["refused"]
        reply = await gw.post("/v1/chat/completions", BODY, headers=headers)
        assert (refused["status"], refused["code"]) == (reply.status, reply.data["error"]["code"])
        words = (await asyncio.to_thread(xenios, *args, cwd=tmp_path)).stdout
        assert "\nRefused by rate_limit: 429 rate_limit_exceeded\n" in words
        assert "3 requests per 1h; refuses, 429 rate_limit_exceeded: takes 1, 0 left" in words


async def test_a_redis_that_is_away_is_told_by_the_command(tmp_path):
    """Without the Redis of the configuration what is left is unknown, and a budget says 503 as it then would."""
    (tmp_path / "request.json").write_text(json.dumps(BODY))
    (tmp_path / "own.yaml").write_text(
        """
upstreams: {openrouter: {without_key: simulate}}
services: {redis: "redis://127.0.0.1:1"}
plugins: [{use: budgets, config: {budgets: [{name: all, usd: 2}]}}]
"""
    )
    done = await asyncio.to_thread(xenios, "explain", "request.json", "-c", "own.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\nRefused by budgets: 503 store_unavailable\n" in done.stdout
    assert re.search(r"all: 2 USD per month; takes 0\.0\d+ USD\n", done.stdout)
