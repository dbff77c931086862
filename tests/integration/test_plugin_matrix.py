"""Each plugin that comes with Xenios can be switched off alone, and the rest still works."""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from gateway.kit.testing import Gateway
from gateway.kit.upstream import MODEL
from tests.integration.process import CONFIG

OURS = sorted(
    point.name
    for point in importlib.metadata.entry_points(group="xenios.plugins")
    if point.dist is not None and point.dist.name == "xenios"
)
# The order of the calls is the YAML's; one that the shipped file doesn't name comes last.
SHIPPED = [
    line.split()[-1] for line in (CONFIG / "xenios.yaml").read_text().splitlines() if line.startswith("  - use: ")
]
ALL = sorted(OURS, key=lambda name: (SHIPPED.index(name) if name in SHIPPED else len(SHIPPED), name))
# What a plugin can't start without.
NEEDED: dict[str, dict[str, Any]] = {
    "jwt_auth": {"issuers": [{"issuer": "https://login.example.com", "audience": "x", "secret": "s" * 32}]},
    "metrics": {},
    "rate_limit": {"limits": [{"name": "all", "requests": 1000}]},
    "budgets": {"budgets": [{"name": "all", "usd": 1000}], "unknown_price": "allow"},
}
SETS = {
    "none": [],
    "all": ALL,
    **{f"{name} alone": [name] for name in ALL},
    **{f"all but {name}": [other for other in ALL if other != name] for name in ALL},
}


def stores(plugins: list[str]) -> dict[str, Any]:
    """Settings with a Redis where one is needed."""
    return {"services": {"redis": "embedded"}} if "jobs" in plugins else {}


def test_the_list_is_not_empty() -> None:
    """The entry points are there: an installation without them would make every test here pass for nothing."""
    assert {"access_log", "api_keys", "routing", "fallback"} <= set(OURS)


@pytest.mark.parametrize("plugins", SETS.values(), ids=SETS.keys())
async def test_any_set_of_plugins_works(plugins: list[str], tmp_path: Path) -> None:
    """Started with this set: a whole and a streamed chat, another dialect, an error, the models and health."""
    log = tmp_path / "access.log"
    config = {**NEEDED, "access_log": {"path": str(log)}}
    entries = [{"use": name, "config": config.get(name, {})} for name in plugins]
    async with Gateway.test(plugins=entries, settings=stores(plugins)) as gw:
        assert [i.id for i in gw.snapshot.instances][1:] == plugins
        if "jwt_auth" in plugins and "api_keys" not in plugins:
            claims = {"iss": "https://login.example.com", "aud": "x", "sub": "ann", "exp": time.time() + 60}
            gw.headers["Authorization"] = "Bearer " + jwt.encode(claims, "s" * 32, algorithm="HS256")
        whole = await gw.chat(model=MODEL)
        assert whole.status == 200
        assert whole.data["choices"][0]["message"]["content"]
        assert whole.headers["x-xenios-model"] == MODEL
        streamed = await gw.chat(model=MODEL, stream=True)
        assert streamed.events[-1] == b"data: [DONE]\n\n"
        body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
        assert (await gw.post("/v1/messages", body)).data["type"] == "message"
        wrong = await gw.post("/v1/chat/completions", {"messages": "nothing"})
        assert (wrong.status, wrong.data["error"]["type"]) == (400, "invalid_request_error")
        assert MODEL in {item["id"] for item in (await gw.get("/v1/models")).data["data"]}
        assert (await gw.get("/health/ready")).data["status"] == "ok"
        await gw.finished(6)
    if "access_log" in plugins:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["endpoint"] for line in lines][:3] == ["chat/completions", "chat/completions", "messages"]


@pytest.mark.parametrize("plugins", SETS.values(), ids=SETS.keys())
async def test_who_may_call(plugins: list[str]) -> None:
    """A caller without a key is refused exactly where a plugin that authenticates is on."""
    entries = [{"use": name, "config": NEEDED.get(name, {})} for name in plugins]
    async with Gateway.test(plugins=entries, settings=stores(plugins)) as gw:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
        reply = await gw.post("/v1/chat/completions", body, headers={"Authorization": ""})
        assert reply.status == (401 if {"api_keys", "jwt_auth"} & set(plugins) else 200)
