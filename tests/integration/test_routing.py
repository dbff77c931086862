"""Routing over real sockets: what the upstream is asked, and what the reply says of it."""

from __future__ import annotations

from typing import Any

import pytest

from gateway import Principal, hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import (
    Error,
    Json,
    ScriptedUpstream,
    Stream,
    chat_completion,
    chat_events,
    message_events,
    response_events,
)


def routing(**config: Any) -> dict[str, Any]:
    return {"use": "routing", "config": config}


async def test_a_rule_is_named_and_its_models_are_asked_in_order() -> None:
    """The reply says which rule and model it was; the first that answers is the one."""
    rules = [
        {"name": "pictures", "match": "any", "when": {"images": True}, "use": ["see/one", "see/two"]},
        {"name": "rest", "match": "any", "use": {"model": "read/one", "strip": ["temperature"], "set": {"seed": 7}}},
    ]
    image = [{"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}]
    async with Gateway.test(plugins=[routing(rules=rules), "fallback"]) as gw:
        gw.upstream.on("see/one", Error(503))
        reply = await gw.post(
            "/v1/chat/completions", {"model": "any", "messages": [{"role": "user", "content": image}]}
        )
        assert (reply.headers["x-xenios-rule"], reply.headers["x-xenios-model"]) == ("pictures", "see/two")
        assert reply.headers["x-xenios-attempts"] == "2"
        plain = await gw.chat(model="any", temperature=1)
        assert (plain.headers["x-xenios-rule"], plain.headers["x-xenios-model"]) == ("rest", "read/one")
        sent = gw.upstream.seen[-1].json
        assert sent["seed"] == 7
        assert "temperature" not in sent


async def test_a_model_is_served_where_the_settings_place_it() -> None:
    """`catalogue.overrides.X.upstream` holds for X by its own name, with the plugin and without it; a key stays there."""
    async with ScriptedUpstream() as own:
        settings = {
            "upstreams": {"own": {"kind": "openai", "base_url": own.url, "api_key": "own"}},
            "catalogue": {"overrides": {"my/llm": {"upstream": "own", "input": 1, "output": 1}}},
        }
        for plugins in ([], [routing(aliases={"short": "my/llm"})]):
            async with Gateway.test(plugins=plugins, settings=settings) as gw:
                for model in ("my/llm", "other/llm"):
                    assert (await gw.chat(model=model)).status == 200
                assert [s.json["model"] for s in own.seen if s.method == "POST"] == ["my/llm"]
                assert [s.json["model"] for s in gw.upstream.seen if s.method == "POST"] == ["other/llm"]
                own.seen.clear()


class Callers:
    """Whoever says who it is, is it."""

    def __init__(self, config: Any, services: Any) -> None: ...

    @hookimpl
    async def authenticate(self, exchange: Any) -> Principal:
        token = exchange.credentials.token
        return Principal(id=token, tenant="t", claims={"plan": token}, roles=frozenset({token}))


async def test_callers_are_told_apart() -> None:
    """Two callers that ask for one name are served as their claims and roles say, however often."""
    rules = [
        {"name": "free", "match": "smart", "when": {"claims": {"plan": "free"}}, "use": "small/one"},
        {"name": "staff", "match": "smart", "when": {"roles": "staff"}, "use": "large/one"},
    ]
    aliases = {"smart": "usual/one"}
    async with Gateway.test(plugins=[Callers, routing(rules=rules, aliases=aliases)]) as gw:
        for _ in range(3):
            for who, model in (("free", "small/one"), ("staff", "large/one"), ("other", "usual/one")):
                body = {"model": "smart", "messages": []}
                reply = await gw.post("/v1/chat/completions", body, headers={"Authorization": f"Bearer {who}"})
                assert reply.headers["x-xenios-model"] == model


async def test_a_refusal_of_a_rule_reaches_the_client_and_no_upstream() -> None:
    """It says the rule's words and names the rule."""
    rules = [{"name": "closed", "match": "dear/*", "refuse": "Not before the first of the month."}]
    async with Gateway.test(plugins=[routing(rules=rules)]) as gw:
        reply = await gw.chat(model="dear/one")
        assert (reply.status, reply.data["error"]["code"]) == (403, "refused_by_rule")
        assert reply.data["error"]["message"] == "Not before the first of the month."
        assert reply.headers["x-xenios-rule"] == "closed"
        assert gw.upstream.seen == []


async def test_too_dear_a_request_is_refused() -> None:
    """A request that may cost more than its rule allows, whichever model answers, is told so and goes nowhere."""
    rules = [{"name": "small", "match": "m", "max_usd": 0.001, "use": ["anthropic/claude-opus-4.6"]}]
    async with Gateway.test(plugins=[routing(rules=rules)]) as gw:
        reply = await gw.chat(model="m", max_tokens=1000)
        assert (reply.status, reply.data["error"]["code"]) == (400, "cost_ceiling")
        assert "up to $0.0251, allowed are $0.001" in reply.data["error"]["message"]
        assert reply.headers["x-xenios-rule"] == "small"
        assert gw.upstream.seen == []
        assert (await gw.chat(model="m", max_tokens=10)).status == 200


async def test_providers_are_preferred_by_target_then_upstream_then_client() -> None:
    """Of each provider preference the nearest one counts; what only the client says stays."""
    aliases = {"eu": {"model": "a/one", "provider": {"only": ["eu"], "sort": "price"}}, "any": "a/one"}
    settings = {"upstreams": {"openrouter": {"provider": {"sort": "latency", "data_collection": "deny"}}}}
    asked = {"only": ["us"], "data_collection": "allow", "quantizations": ["fp8"]}
    async with Gateway.test(plugins=[routing(aliases=aliases)], settings=settings) as gw:
        await gw.chat(model="eu", provider=asked)
        await gw.chat(model="any", provider=asked)
        eu, plain = (seen.json["provider"] for seen in gw.upstream.seen)
    assert eu == {"only": ["eu"], "sort": "price", "data_collection": "deny", "quantizations": ["fp8"]}
    assert plain == {"only": ["us"], "sort": "latency", "data_collection": "deny", "quantizations": ["fp8"]}


ANSWERS = {
    "chat/completions": lambda stream: Stream(*chat_events("Hi", model="b/two")) if stream else Json(chat_completion(model="b/two")),
    "responses": lambda stream: Stream(*response_events("Hi", model="b/two")),
    "messages": lambda stream: Stream(*message_events("Hi", model="b/two")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "stream"),
    [("chat/completions", False), ("chat/completions", True), ("responses", True), ("messages", True)],
)
async def test_the_model_that_openrouter_chose_is_named(endpoint: str, stream: bool) -> None:
    """Where OpenRouter tries the next model itself, the reply and the log name the one that answered; it was one attempt."""
    plugins = [routing(native_fallback="openrouter", aliases={"x": ["a/one", "b/two"]}), "fallback"]
    upstream = ScriptedUpstream(default=ANSWERS[endpoint](stream))
    async with Gateway.test(plugins=plugins, upstream=upstream) as gw:
        body = {"model": "x", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "max_tokens": 9}
        reply = await gw.post(f"/v1/{endpoint}", {**body, "stream": stream})
        assert reply.status == 200
        assert (reply.headers["x-xenios-model"], reply.headers["x-xenios-attempts"]) == ("b/two", "1")
        [seen] = upstream.seen
        assert (seen.json["model"], seen.json["models"]) == ("a/one", ["b/two"])
        [exchange] = await gw.finished()
        assert exchange.served.model == "b/two"


@pytest.mark.parametrize("asked", ["@preset/house", "a/one@preset/house", "~anthropic/claude-opus-latest"])
async def test_the_model_behind_a_preset_is_named(asked: str) -> None:
    """A preset or `latest` is sent as it is; the reply says which model it was."""
    upstream = ScriptedUpstream(default=Json(chat_completion(model="anthropic/claude-4.5-opus-20251124")))
    async with Gateway.test(plugins=[routing(aliases={"x": asked})], upstream=upstream) as gw:
        reply = await gw.chat(model="x")
        assert upstream.seen[0].model == asked
        assert reply.headers["x-xenios-model"] == "anthropic/claude-opus-4.5"


async def test_presets_and_dearer_variants_need_a_price_under_a_budget() -> None:
    """Also the operator's own presets and variants don't slip through a hard budget: their price is not known."""
    aliases = {"preset": "anthropic/claude-haiku-4.5@preset/x", "nitro": "anthropic/claude-haiku-4.5:nitro"}
    budget = {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": 100}]}}
    async with Gateway.test(plugins=["api_keys", routing(aliases=aliases), budget]) as gw:
        for name in aliases:
            reply = await gw.chat(model=name, max_tokens=5)
            assert (reply.status, reply.data["error"]["code"]) == (403, "unknown_price")
        assert gw.upstream.seen == []


async def test_a_split_reaches_both_sides_and_a_user_stays() -> None:
    """Requests are shared out; one user's all go to one side."""
    rules = [
        {
            "name": "half",
            "match": "m",
            "sticky": "user",
            "split": [{"weight": 1, "use": "a"}, {"weight": 1, "use": "b"}],
        }
    ]
    async with Gateway.test(plugins=[routing(rules=rules)]) as gw:
        for _ in range(30):
            await gw.chat(model="m")
        assert {seen.model for seen in gw.upstream.seen} == {"a", "b"}
        before = len(gw.upstream.seen)
        for _ in range(10):
            await gw.chat(model="m", user="ann")
        assert len({seen.model for seen in gw.upstream.seen[before:]}) == 1
