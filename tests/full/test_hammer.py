"""Twenty thousand requests of every kind through a real process with the plugins that ship switched on."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass

import pytest
import yaml

from gateway.simulator import Simulator
from tests.faults.process import config, started
from tests.full.load import PATIENCE, client, many_files, resident
from tests.integration.process import CONFIG

FIRST, ALL = 5_000, 20_000
CLIENTS = 48
HEALTH = ("/health/live", "/health/ready")

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]


@dataclass(frozen=True)
class Kind:
    """What is asked, and what must come: the client's status, and the outcome in the log."""

    model: str
    status: int
    outcome: str
    ends: bytes = b"}"
    stream: bool = False
    leaves: bool = False
    key: str | None = None


DONE, ERROR = b"data: [DONE]\n\n", b"}}\n\n"
WHOLE = Kind("sim-t0-n3", 200, "ok")
STREAM = Kind("sim-t0-d0-n6", 200, "ok", DONE, stream=True)
LEAVES = Kind("sim-t0-d20-n500", 200, "client_disconnect", stream=True, leaves=True)
KINDS = [
    *[WHOLE] * 9,
    *[STREAM] * 4,
    LEAVES,
    Kind("sim-t0-fail-400", 400, "upstream_error"),
    Kind("sim-t0-fail-429", 429, "upstream_error"),
    Kind("sim-t0-fail-503", 503, "upstream_error"),
    Kind("sim-t0-badjson", 502, "upstream_error"),
    Kind("sim-t0-reset", 502, "upstream_error"),
    Kind("sim-t0-d0-n6-errmid", 200, "upstream_error", ERROR, stream=True),
    Kind("sim-t0-d0-n6-cutmid", 200, "upstream_truncated", ERROR, stream=True),
    Kind("sim-t0", 401, "refused", key="sk-nobodys"),
]
SERVER_ERRORS = {kind.model for kind in KINDS if kind.status >= 500}


async def ask(session, number):
    """One request; its kind, after the client saw what that kind must show."""
    kind = KINDS[number % len(KINDS)]
    body = {
        "model": f"xenios/{kind.model}",
        "messages": [{"role": "user", "content": f"Question {number}"}],
        "stream": kind.stream,
    }
    headers = {"X-Request-Id": f"hammer-{number}"} | ({"Authorization": f"Bearer {kind.key}"} if kind.key else {})
    async with session.post("/v1/chat/completions", json=body, headers=headers) as reply:
        assert reply.headers["x-request-id"] == f"hammer-{number}"
        if kind.leaves:
            await reply.content.readany()
            reply.close()
        else:
            answer = await reply.read()
            assert answer.endswith(kind.ends), (kind, answer[-300:])
        assert reply.status == kind.status, (kind, await reply.text())


async def hammer(session, numbers):
    async def worker():
        for number in numbers:  # shared: each takes the next
            await ask(session, number)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(worker())


async def settled(gateway, simulator, session, count):
    """Everything that was asked has ended on both sides and stands in the log; the process's memory then."""
    async with asyncio.timeout(PATIENCE):
        while simulator.running or gateway.out.count(b'"hammer-') < count:
            await asyncio.sleep(0.05)
    for path in HEALTH:
        async with session.get(path) as reply:
            assert (reply.status, (await reply.json())["status"]) == (200, "ok")
    return resident(gateway.process.pid)


async def test_twenty_thousand_requests(tmp_path):
    """20,000 requests, whole and streamed, failing upstream or left half-way by their clients, are each answered as
    they must be and logged once; nothing is left over, and memory doesn't grow.
    """
    shipped = yaml.safe_load((CONFIG / "xenios.yaml").read_text())
    [fallback] = (plugin for plugin in shipped["plugins"] if plugin["use"] == "fallback")
    # each kind of failure is a model of its own here, which would be left alone soon: that is not what is asked for
    fallback["config"] = fallback.get("config", {}) | {"breaker": False}
    with many_files():
        async with Simulator(latency=0, chunk_delay=0) as simulator:
            upstreams = {"openrouter": {"base_url": simulator.url, "api_key": "sk-or-v1-hammer"}}
            file = config(tmp_path, plugins=shipped["plugins"], services=shipped["services"], upstreams=upstreams)
            async with started(file) as gateway, client(gateway, CLIENTS) as session:
                await hammer(session, iter(range(FIRST)))
                early = await settled(gateway, simulator, session, FIRST)
                await hammer(session, iter(range(FIRST, ALL)))
                late = await settled(gateway, simulator, session, ALL)
                gateway.signal()
                assert await gateway.exit_code() == 0
                assert b"drain_cut_requests" not in gateway.err
                assert b"Traceback" not in gateway.err
                assert late < early * 1.1, (early, late)
    lines = [json.loads(line) for line in bytes(gateway.out).splitlines()]
    asked = [line for line in lines if line["endpoint"] == "chat/completions"]
    assert Counter(line["request_id"] for line in asked) == Counter(f"hammer-{n}" for n in range(ALL))
    for line in asked:
        kind = KINDS[int(line["request_id"].removeprefix("hammer-")) % len(KINDS)]
        assert (line["status"], line["outcome"]) == (kind.status, kind.outcome), line
    assert len(lines) - len(asked) == 2 * len(HEALTH)
