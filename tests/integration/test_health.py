"""Health, the list of models and token counts: what the gateway answers itself."""

from __future__ import annotations

import asyncio
import http.client
from typing import Any

import pytest

from gateway import hookimpl
from gateway.kit import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway, TestReply
from gateway.kit.upstream import ScriptedUpstream
from gateway.simulator import Simulator

ROUTING = {
    "use": "routing",
    "config": {
        "aliases": {"smart": "anthropic/claude-opus-4.5", "cheap": "openai/gpt-5-mini"},
        "tasks": {"chat": {"use": "anthropic/claude-opus-4.5"}, "labels": {"use": "openai/gpt-5-mini"}},
    },
}


class Part:
    """Depends on something whose state the test sets."""

    def __init__(self, config: Any, services: Any) -> None:
        self.away: Exception | None = None
        self.hangs = False
        self.pings = 0

    async def ping(self) -> None:
        self.pings += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.away is not None:
            raise self.away


class Cache(Part):
    on_error = "ignore"


class Limits(Part):
    on_store_error = "allow"


class Watcher:
    """Sees what a plugin sees of requests."""

    def __init__(self, config: Any, services: Any) -> None:
        self.seen: list[str] = []

    @hookimpl
    async def request_finished(self, exchange: Any) -> None:
        self.seen.append(exchange.request.path)


# --- health -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/health/live"])
async def test_live_touches_nothing(path: str) -> None:
    """200 while the process runs, for anybody, whatever is broken behind it."""
    upstream = ScriptedUpstream()
    async with Gateway.test(plugins=["api_keys", Part], upstream=upstream) as gw:
        gw.plugin("Part").away = ConnectionError("away")
        await upstream.close()
        reply = await gw.get(path, headers={"Authorization": ""})
        assert (reply.status, reply.data) == (200, {"status": "ok"})
        assert reply.headers["Content-Type"] == "application/json"
        assert gw.plugin("Part").pings == 0
        assert upstream.total_connections == 0


async def test_ready_names_its_parts() -> None:
    """Ready says for the configuration in force which parts answered and what their absence would mean."""
    async with Gateway.test(plugins=["api_keys", Part, Cache, ROUTING]) as gw:
        reply = await gw.get("/health/ready", headers={"Authorization": ""})
        assert reply.status == 200
        data = reply.data
        catalogue = data.pop("catalogue")
        assert data == {
            "status": "ok",
            "config": gw.snapshot.hash,
            "plugins": {
                "Part": {"status": "ok", "policy": "fail"},
                "Cache": {"status": "ok", "policy": "ignore"},
            },
            "warnings": data["warnings"],
        }
        assert catalogue["openrouter"]["origin"] == "bundled"
        assert catalogue["openrouter"]["models"] > 20
        assert catalogue["openrouter"]["error"] is None


@pytest.mark.parametrize(
    ("plugin", "entry", "status", "says"),
    [
        (Part, {}, 503, "failed"),
        (Part, {"on_error": "ignore"}, 200, "degraded"),
        (Cache, {}, 200, "degraded"),
        (Cache, {"on_error": "fail"}, 503, "failed"),
        (Limits, {}, 200, "degraded"),
    ],
    ids=["default", "entry ignores", "class ignores", "entry needs", "store allows"],
)
async def test_a_part_is_away(plugin: type, entry: dict[str, Any], status: int, says: str) -> None:
    """503 only where requests would be refused without the part; else it is named, and traffic may come."""
    async with Gateway.test(plugins=[{"use": plugin, "id": "part", **entry}]) as gw:
        gw.plugin("part").away = ConnectionError("redis://:secret@host is away")
        reply = await gw.get("/health/ready")
        assert (reply.status, reply.data["status"]) == (status, says)
        part = reply.data["plugins"]["part"]
        assert (part["status"], part["error"]) == ("failed", "ConnectionError")
        assert b"secret" not in reply.body
        gw.plugin("part").away = None
        assert (await gw.get("/health/ready")).status == 200


async def test_what_plugins_warn_of_is_named() -> None:
    """Warnings stand in the readiness and change nothing in it; a plugin that fails at warning is named itself."""

    class Warns:
        def __init__(self, config: Any, services: Any) -> None: ...

        def warnings(self) -> list[str]:
            return ["the end is near"]

    class Breaks(Warns):
        def warnings(self) -> list[str]:
            raise LookupError

    async with Gateway.test(plugins=[Warns, Breaks]) as gw:
        reply = await gw.get("/health/ready")
    assert (reply.status, reply.data["status"]) == (200, "ok")
    assert reply.data["warnings"] == {"Warns": ["the end is near"], "Breaks": ["warnings failed: LookupError"]}


async def test_one_needed_part_is_enough() -> None:
    """A part that may be away doesn't hide one that may not."""
    async with Gateway.test(plugins=[Cache, Part]) as gw:
        gw.plugin("Cache").away = gw.plugin("Part").away = OSError()
        reply = await gw.get("/health/ready")
        assert (reply.status, reply.data["status"]) == (503, "failed")
        assert {name: part["policy"] for name, part in reply.data["plugins"].items()} == {
            "Cache": "ignore",
            "Part": "fail",
        }


async def test_a_part_that_hangs() -> None:
    """Readiness answers within seconds even if a part never does."""
    async with Gateway.test(plugins=[Part]) as gw, asyncio.timeout(5):
        gw.plugin("Part").hangs = True
        reply = await gw.get("/health/ready")
        assert (reply.status, reply.data["plugins"]["Part"]["error"]) == (503, "TimeoutError")


async def test_an_upstream_that_is_away_is_no_reason() -> None:
    """Readiness doesn't ask upstreams: theirs is each request's business, and their outage takes no gateway out."""
    upstream = ScriptedUpstream()
    async with Gateway.test(upstream=upstream) as gw:
        await upstream.close()
        assert (await gw.get("/health/ready")).status == 200
        assert (await gw.chat()).status == 502


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
async def test_health_takes_get_only(path: str) -> None:
    """POST is told what the path takes."""
    async with Gateway.test() as gw:
        reply = await gw.post(path, {})
        assert reply.status == 405
        assert reply.headers["Allow"] == "GET"


class Warns:
    """Knows of something that somebody should look at."""

    def __init__(self, config: Any, services: Any) -> None:
        self.broken = False

    def warnings(self) -> list[str]:
        if self.broken:
            raise ValueError
        return ["the lease ends on Friday"]


async def test_ready_names_warnings_and_stays_ready() -> None:
    """What plugins warn of is shown, and is no reason to send traffic elsewhere; nor is a plugin that fails to say it."""
    retiring = {"use": "routing", "config": {"aliases": {"x": "xenios/sim-expiring"}, "tasks": {"t": {}}}}
    async with Gateway.test(plugins=[Warns, retiring]) as gw:
        reply = await gw.get("/health/ready")
        assert (reply.status, reply.data["status"]) == (200, "ok")
        assert reply.data["warnings"] == {
            "Warns": ["the lease ends on Friday"],
            "routing": ["task 't': it names no models, and no rule takes it"],
        }
        gw.plugin("Warns").broken = True
        reply = await gw.get("/health/ready")
        assert (reply.status, reply.data["warnings"]["Warns"]) == (200, ["warnings failed: ValueError"])


async def test_a_model_that_retires_is_a_warning_once_the_list_was_fetched() -> None:
    """Readiness learns of retirements, and of models that are gone, when the catalogue does: no restart is needed."""
    async with Simulator() as simulator:
        settings = {"upstreams": {"openrouter": {"base_url": simulator.url}}}
        aliases = {"x": ["xenios/sim-expiring", "some/gone"]}
        async with Gateway.test(plugins=[{"use": "routing", "config": {"aliases": aliases}}], settings=settings) as gw:
            assert (await gw.get("/health/ready")).data["warnings"] == {}
            await gw.snapshot.services.catalogue.refresh("openrouter")
            reply = await gw.get("/health/ready")
            assert reply.status == 200
            retires, gone = reply.data["warnings"]["routing"]
            assert retires.startswith("xenios/sim-expiring: retires on ")
            assert retires.endswith(", in 30 days (alias 'x')")
            assert gone == "some/gone: openrouter lists no such model (alias 'x')"


# --- models -----------------------------------------------------------------------------------------------


def ids(reply: TestReply) -> list[str]:
    return [item["id"] for item in reply.data["data"]]


async def test_the_list_serves_both_sdks() -> None:
    """Each item has what OpenAI's and what OpenRouter's SDK demand; aliases and tasks stand among them."""
    async with Gateway.test(plugins=["api_keys", ROUTING]) as gw:
        reply = await gw.get("/v1/models")
        assert reply.status == 200
        assert reply.data["object"] == "list"
        assert reply.data["total_count"] == len(reply.data["data"])
        assert reply.data["links"] == {"next": None}
        for item in reply.data["data"]:
            assert item["object"] == "model"
            assert isinstance(item["id"], str)
            assert isinstance(item["created"], int)
            assert isinstance(item["owned_by"], str)
            assert {
                "canonical_slug", "name", "context_length", "architecture", "pricing", "top_provider",
                "per_request_limits", "supported_parameters", "default_parameters", "links",
            } <= item.keys()  # fmt: skip
            assert {"prompt", "completion"} <= item["pricing"].keys()
        listed = ids(reply)
        assert {"smart", "cheap", "task/chat", "task/labels", "anthropic/claude-opus-4.5"} <= set(listed)
        assert len(listed) == len(set(listed))
        assert (await gw.get("/api/v1/models")).data == reply.data


@pytest.mark.parametrize(
    "path", ["anthropic/claude-opus-4.5", "anthropic%2Fclaude-opus-4.5", "anthropic%2fclaude-opus-4.5"]
)
@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
async def test_one_model(prefix: str, path: str) -> None:
    """A model's id may come with its slash plain or encoded: the same item as in the list."""
    async with Gateway.test(plugins=["api_keys", ROUTING]) as gw:
        reply = await _raw(gw, f"{prefix}/models/{path}")
        assert reply.status == 200
        item = next(i for i in (await gw.get("/v1/models")).data["data"] if i["id"] == "anthropic/claude-opus-4.5")
        assert reply.data == item


@pytest.mark.parametrize("name", ["smart", "task/chat", "task%2Fchat"])
async def test_one_alias(name: str) -> None:
    """Aliases and tasks can be looked up as they can be asked for."""
    async with Gateway.test(plugins=["api_keys", ROUTING]) as gw:
        reply = await _raw(gw, f"/v1/models/{name}")
        assert (reply.status, reply.data["id"]) == (200, name.replace("%2F", "/"))
        assert reply.data["owned_by"] == "xenios"


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "%2F", "..%2F..%2Fetc", "anthropic%2F"])
async def test_a_model_that_is_not_there(name: str) -> None:
    """404 in OpenAI's shape, all keys present."""
    async with Gateway.test(plugins=["api_keys", ROUTING]) as gw:
        reply = await _raw(gw, f"/v1/models/{name}")
        assert reply.status == 404
        error = reply.data["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")


async def test_scopes_hide_models() -> None:
    """A key sees what it may use; the rest is neither listed nor found."""
    every, bot, team = new_key(), new_key(), new_key()
    keys = [
        {"id": "every", "hash": hash_key(every, PEPPER)},
        {"id": "bot", "hash": hash_key(bot, PEPPER), "tasks": ["chat"]},
        {"id": "team", "hash": hash_key(team, PEPPER), "models": ["anthropic/*"], "aliases": ["cheap"]},
    ]
    async with Gateway.test(plugins=[{"use": "api_keys", "config": {"keys": keys}}, ROUTING]) as gw:

        async def get(path: str, key: str) -> TestReply:
            return await gw.get(path, headers={"Authorization": f"Bearer {key}"})

        assert len(ids(await get("/v1/models", every))) > 20
        assert ids(await get("/v1/models", bot)) == ["task/chat"]
        seen = ids(await get("/v1/models", team))
        assert "cheap" in seen
        assert "smart" not in seen
        assert not [name for name in seen if name != "cheap" and not name.startswith("anthropic/")]
        for name, key, status in [
            ("task/chat", bot, 200),
            ("task/labels", bot, 404),
            ("anthropic/claude-opus-4.5", bot, 404),
            ("anthropic/claude-opus-4.5", team, 200),
            ("openai/gpt-5-mini", team, 404),
            ("cheap", team, 200),
            ("smart", team, 404),
            ("openai/gpt-5-mini", every, 200),
        ]:
            assert (await get(f"/v1/models/{name}", key)).status == status, (name, status)
        hidden, missing = await get("/v1/models/openai/gpt-5-mini", team), await get("/v1/models/no/such", team)
        assert (
            hidden.data["error"]["message"].replace("openai/gpt-5-mini", "no/such") == missing.data["error"]["message"]
        )


async def test_models_ask_for_a_key() -> None:
    """The list is no public page where keys are asked for."""
    async with Gateway.test(plugins=["api_keys"]) as gw:
        for path in ("/v1/models", "/v1/models/openai/gpt-5-mini"):
            assert (await gw.get(path, headers={"Authorization": ""})).status == 401


async def test_paging() -> None:
    """`offset` and `limit` walk the whole list once, by the link that each page gives; the last gives none."""
    async with Gateway.test(plugins=[ROUTING]) as gw:
        every = ids(await gw.get("/v1/models"))
        walked: list[str] = []
        path: str | None = "/api/v1/models?limit=15"
        while path is not None:
            page = await gw.get(path)
            assert page.data["total_count"] == len(every)
            walked += ids(page)
            path = page.data["links"]["next"]
        assert walked == every
        beyond = await gw.get(f"/v1/models?offset={len(every)}&limit=5")
        assert (beyond.status, beyond.data["data"]) == (200, [])


@pytest.mark.parametrize(
    "query", ["limit=-1", "limit=x", "offset=1.5", "limit=", "offset=99999999999999999999", "limit=%D9%A3"]
)
async def test_bad_paging(query: str) -> None:
    """What is no whole number is refused by name."""
    async with Gateway.test() as gw:
        reply = await gw.get(f"/v1/models?{query}")
        assert (reply.status, reply.data["error"]["param"]) == (400, query.partition("=")[0])


async def test_models_never_ask_the_upstream() -> None:
    """The list is answered from what is known: an upstream that is away delays nothing."""
    upstream = ScriptedUpstream()
    async with Gateway.test(upstream=upstream) as gw:
        await upstream.close()
        assert len(ids(await gw.get("/v1/models"))) > 20


# --- count_tokens -----------------------------------------------------------------------------------------


async def test_count_tokens_is_an_estimate() -> None:
    """Anthropic's shape, marked as our estimate, about a token for four characters; nothing is sent upstream."""
    async with Gateway.test(plugins=["api_keys"]) as gw:

        async def count(text: str, **fields: Any) -> int:
            body = {"model": "anthropic/claude-opus-4.5", "messages": [{"role": "user", "content": text}], **fields}
            reply = await gw.post("/v1/messages/count_tokens", body)
            assert reply.status == 200
            assert reply.headers["x-xenios-estimate"] == "1"
            assert reply.data.keys() == {"input_tokens"}
            return reply.data["input_tokens"]

        short, long = await count("word " * 10), await count("word " * 1000)
        assert 8 <= short <= 20
        assert 1000 <= long <= 1500
        assert await count("Hi", system="word " * 1000) >= 1000
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 40_000}}
        body = {"model": "m", "messages": [{"role": "user", "content": [image]}]}
        reply = await gw.post("/v1/messages/count_tokens", body)
        assert 1500 <= reply.data["input_tokens"] <= 3000
        assert gw.upstream.seen == []


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
async def test_count_tokens_asks_for_a_key(header: str) -> None:
    """Both of Anthropic's headers open it; without a key the error is in Anthropic's shape."""
    async with Gateway.test(plugins=["api_keys"]) as gw:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        key = f"Bearer {gw.key}" if header == "Authorization" else gw.key
        sent = {"Authorization": "", header: key}
        assert (await gw.post("/v1/messages/count_tokens", body, headers=sent)).status == 200
        refused = await gw.post("/v1/messages/count_tokens", body, headers={"Authorization": ""})
        assert refused.status == 401
        assert (refused.data["type"], refused.data["error"]["type"]) == ("error", "authentication_error")


@pytest.mark.parametrize("body", [{}, {"messages": "Hi"}, {"messages": None}, []])
async def test_count_tokens_refuses(body: Any) -> None:
    """A body without messages is refused in Anthropic's shape."""
    async with Gateway.test() as gw:
        reply = await gw.post("/v1/messages/count_tokens", body)
        assert reply.status == 400
        assert (reply.data["type"], reply.data["error"]["type"]) == ("error", "invalid_request_error")


async def test_own_routes_are_exchanges() -> None:
    """What the gateway answers itself is seen by plugins too, the access log among them."""
    async with Gateway.test(plugins=[Watcher]) as gw:
        await gw.get("/v1/models/openai%2Fgpt-5-mini")
        await gw.get("/health/live")
        await gw.finished(2)
        assert gw.plugin("Watcher").seen == ["/v1/models/openai/gpt-5-mini", "/health/live"]


async def _raw(gw: Gateway, path: str) -> TestReply:
    """The path goes out as it is written: aiohttp's client would normalise it."""

    def send() -> TestReply:
        connection = http.client.HTTPConnection("127.0.0.1", gw.worker.port, timeout=10)
        try:
            connection.request("GET", path, headers=gw.headers)
            reply = connection.getresponse()
            return TestReply(reply.status, dict(reply.getheaders()), reply.read())
        finally:
            connection.close()

    return await asyncio.to_thread(send)
