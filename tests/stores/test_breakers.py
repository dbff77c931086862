"""Circuits of several gateways that share a Valkey: what one finds out, all know."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from gateway import Decision, Target, hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Error, ScriptedUpstream, answer_by_path
from gateway_plugins.fallback import shared
from tests.stores.servers import emptied, valkey_server

BREAKER = {"requests": 4, "window": "60s", "open_for": "60s"}
A, B = Target("a/one", "openrouter"), Target("b/two", "openrouter")


class Both:
    def __init__(self, config, services): ...

    @hookimpl
    async def choose_targets(self, exchange):
        return Decision("asked", (A, B))


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """No waiting for the next round longer than needed."""
    monkeypatch.setattr(shared, "SYNC_SECONDS", 0.02)


def gateway(url, upstream, **breaker):
    plugin = {"use": "fallback", "config": {"breaker": {**BREAKER, **breaker}}}
    return Gateway.test(plugins=["api_keys", Both, plugin], upstream=upstream, settings={"services": {"redis": url}})


async def state(gw, target=A):
    shown = (await gw.get("/admin/targets")).data
    return next((t["state"] for t in shown["data"] if t["target"] == target.name), "closed")


async def becomes(gw, wanted, target=A):
    async with asyncio.timeout(5):
        while await state(gw, target) != wanted:
            await asyncio.sleep(0.01)


async def opened(gw):
    gw.upstream.on("a/one", Error(503))
    for _ in range(4):
        assert (await gw.chat()).status == 200
    assert await state(gw) == "open"


async def two(stack, url, **breaker):
    upstream = await stack.enter_async_context(ScriptedUpstream())
    return [await stack.enter_async_context(gateway(url, upstream, **breaker)) for _ in range(2)]


async def test_an_open_circuit_is_open_everywhere(server):
    """What one gateway has found out costs no other a request; a third that starts later knows it too."""
    url = await emptied(server)
    async with AsyncExitStack() as stack:
        first, second = await two(stack, url)
        await opened(first)
        await becomes(second, "open")
        asked = len(first.upstream.seen)
        reply = await second.chat()
        assert (reply.headers["x-xenios-model"], reply.headers["x-xenios-attempts"]) == ("b/two", "1")
        assert len(first.upstream.seen) == asked + 1
        async with gateway(url, first.upstream) as third:
            await becomes(third, "open")


async def test_one_good_probe_closes_it_everywhere(server):
    """Who tries the target again and finds it well tells the others, without a probe of their own."""
    async with AsyncExitStack() as stack:
        first, second = await two(stack, await emptied(server), open_for="300ms")
        await opened(first)
        await becomes(second, "half_open")
        first.upstream.on("a/one", answer_by_path)
        async with asyncio.timeout(5):
            while (await first.chat()).headers["x-xenios-model"] != "a/one":
                await asyncio.sleep(0.01)
        await becomes(first, "closed")
        await becomes(second, "closed")
        assert (await second.chat()).headers["x-xenios-model"] == "a/one"


async def test_a_rest_is_kept_everywhere(server):
    """A 429 with Retry-After that one gateway got is obeyed by all, and ends by itself."""
    async with AsyncExitStack() as stack:
        first, second = await two(stack, await emptied(server), max_rest="300ms")
        first.upstream.on("a/one", Error(429, headers={"Retry-After": "50"}))
        await first.chat()
        await becomes(second, "resting")
        await becomes(second, "closed")
        await becomes(first, "closed")


async def test_without_redis_each_goes_on_by_itself():
    """While it is frozen circuits open and close as ever, and no request waits; when it is back, all is shared again."""
    with valkey_server() as server:
        async with AsyncExitStack() as stack:
            first, second = await two(stack, server.url)
            server.freeze()
            await opened(first)
            assert (await first.chat()).headers["x-xenios-attempts"] == "1"
            assert await state(second) == "closed"
            server.thaw()
            await becomes(second, "open")


async def test_a_redis_that_comes_back_empty_is_told_again():
    """An open circuit outlives the loss of everything in Redis, for all gateways that share it."""
    with valkey_server("--appendonly", "no") as server:
        async with AsyncExitStack() as stack:
            first, second = await two(stack, server.url)
            await opened(first)
            await becomes(second, "open")
            server.kill()
            async with asyncio.timeout(5):
                while not all(gw.snapshot.services.redis.is_open for gw in (first, second)):
                    await asyncio.sleep(0.01)
            server.start()
            async with gateway(server.url, first.upstream) as third:
                await becomes(third, "open")
            assert [await state(first), await state(second)] == ["open", "open"]
