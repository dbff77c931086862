"""Every field of a request that could choose another model, a dearer price or a tool: no way out of a scope or budget."""

import json
from itertools import product

import pytest
import yaml

from gateway import Principal, Scopes, hookimpl
from gateway.dialects import DIALECTS
from gateway.incoming import CHOOSING_FIELDS, VARIANTS
from gateway.kit.testing import Gateway
from gateway.kit.upstream import MODEL, Error, Hang, Json, ScriptedUpstream, chat_completion
from gateway.tasks import Tasks
from tests.contract.requests import BODIES, request
from tests.integration.process import CONFIG

SCOPE = pytest.mark.promise("P5.scope")
# What clients may choose where everything is allowed, and where others use the gateway.
MAY = {
    name: yaml.safe_load((CONFIG / f"{name}.yaml").read_text())["upstream"]["client_may"]
    for name in ("xenios", "production")
}
JSON_ENDPOINTS = [name for name, dialect in DIALECTS.items() if dialect.request == "json"]


def body_of(endpoint, **fields):
    """An ordinary request of the endpoint, with these fields; None takes one out."""
    body = {"model": MODEL, **BODIES[endpoint], **fields}
    return {name: value for name, value in body.items() if value is not None}


# --- scopes -----------------------------------------------------------------------------------------------------------


class Scoped:
    """Whoever calls may use `ok/*` and the task `work`."""

    def __init__(self, config, services): ...

    @hookimpl
    async def authenticate(self, exchange):
        return Principal(id="p", tenant="t", scopes=Scopes(models=("ok/*",), tasks=("work",)))


def scoped(may, **settings):
    routing = {"use": "routing", "config": {"tasks": {"work": {"use": "served/task"}}}}
    return Gateway.test(
        plugins=[Scoped, routing, "fallback"], settings={"upstream": {"client_may": MAY[may]}, **settings}
    )


TASK = {"X-Xenios-Task": "work"}
# Whoever reads `dear` upstream could answer with another model than `ok/*`.
LEAVING = [
    {"model": "dear/a"},
    {"model": "~dear/a-latest"},
    {"model": "ok/a@preset/dear"},
    {"model": "@preset/dear"},
    {"models": ["dear/a"]},
    {"models": ["ok/b", "dear/a"]},
    {"model": None, "models": ["dear/a"]},
    {"model": None, "models": ["ok/a", "dear/a"]},
    {"model": None, "models": ["ok/a", "ok/b@preset/dear"]},
    {"fallbacks": [{"model": "dear/a"}]},
    {"fallbacks": ["dear/a"]},
    {"fallbacks": [{"model": "ok/b", "models": ["dear/a"]}]},
    {"fallbacks": [{"model": "ok/b", "fallbacks": [{"model": "dear/a"}]}]},
    {"fallbacks": {"model": "dear/a"}},
    {"preset": "dear"},
    {"preset": {"slug": "dear"}},
    {"plugins": [{"id": "fusion", "models": ["dear/a"]}]},
    {"plugins": [{"id": "dear-router"}]},
    {"plugins": [{"id": "auto-router", "allowed_models": ["dear/*"]}]},
    {"plugins": [{"id": "web", "model": "dear/a"}]},
    {"plugins": [{"id": "file-parser", "options": {"default_model": "dear/a"}}]},
    {"plugins": "dear"},
    {"plugins": {"id": "fusion", "model": "dear/a"}},
    {"tools": [{"type": "image_generation", "model": "dear/a"}]},
    {"tools": [{"type": "advisor_20260301", "name": "advisor", "model": "dear/a"}]},
    {"tools": [{"type": "openrouter:dear"}]},
    {"tools": [{"type": "web_search", "models": ["dear/a"]}]},
    {"tools": {"type": "openrouter:dear"}},
    {"deferred_tools": [{"type": "openrouter:dear"}]},
]


@SCOPE
@pytest.mark.parametrize("may", MAY)
@pytest.mark.parametrize("endpoint", JSON_ENDPOINTS)
async def test_no_field_leaves_the_scope_of_a_key(endpoint, may):
    """Whatever names another model, or somebody who would choose one, is refused or taken out: it never goes upstream."""
    async with scoped(may) as gw:
        for fields in LEAVING:
            reply = await gw.post(f"/v1/{endpoint}", body_of(endpoint, **{"model": "ok/a", **fields}))
            assert reply.status in {200, 400, 403, 404}, (fields, reply.body)
        assert b"dear" not in b"".join(seen.body for seen in gw.upstream.seen)
        assert {seen.json["model"] for seen in gw.upstream.seen} <= {"ok/a"}


@SCOPE
@pytest.mark.parametrize("fields", [{"models": ["dear/a"]}, {"model": None, "models": ["dear/a"]}])
async def test_a_task_grants_its_own_models_alone(fields):
    """A key's task isn't a pass for whatever else the body lists, not even for the first of a list without `model`."""
    async with scoped("xenios") as gw:
        gw.upstream.on("served/task", Error(503))  # whatever else may answer is tried
        body = body_of("chat/completions", **fields)
        reply = await gw.post("/v1/chat/completions", {"model": "task/work", **body}, headers=TASK)
        assert reply.status in {200, 404}
        assert b"dear" not in b"".join(seen.body for seen in gw.upstream.seen)
        gw.upstream.on("served/task", Json(chat_completion()))
        assert (await gw.post("/v1/chat/completions", body_of("chat/completions"), headers=TASK)).status == 200
        assert gw.upstream.seen[-1].json["model"] == "served/task"


@SCOPE
@pytest.mark.parametrize("twice", ['"model":"dear/a","model":"ok/a"', '"model":"ok/a","model":"dear/a"'])
async def test_a_field_that_stands_twice_is_read_once(twice):
    """Of two `model` fields one is checked and sent; the upstream can't read the other."""
    async with scoped("xenios") as gw:
        data = "{" + twice + ',"messages":[{"role":"user","content":"Hi"}]}'
        reply = await gw.request(
            "POST", "/v1/chat/completions", data=data, headers={"Content-Type": "application/json"}
        )
        assert reply.status in {200, 404}
        assert b"dear" not in b"".join(seen.body for seen in gw.upstream.seen)


async def test_what_a_scoped_key_may_use_works():
    """Functions of the client's own, whatever they are called, and searches go through."""
    fields = [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"model": "dear/a"}}}]},
        {"tools": [{"type": "openrouter:web_search"}], "plugins": [{"id": "web"}]},
    ]
    async with scoped("xenios") as gw:
        for more in fields:
            reply = await gw.post("/v1/chat/completions", body_of("chat/completions", model="ok/a", **more))
            assert reply.status == 200
            assert more.items() <= gw.upstream.seen[-1].json.items()


@pytest.mark.parametrize("owner", ["off", "openrouter"])
async def test_what_a_scoped_key_may_list_is_tried_by_one_owner(owner):
    """The models that a request lists answer when its first fails: asked by the gateway or by OpenRouter, not by both."""
    routing = {"use": "routing", "config": {"native_fallback": owner}}
    settings = {"upstream": {"client_may": MAY["xenios"]}}
    fields = {"models": ["ok/b"], "fallbacks": [{"model": "ok/c", "max_tokens": 7, "stream": True, "store": True}]}
    async with Gateway.test(plugins=[Scoped, routing, "fallback"], settings=settings) as gw:
        gw.upstream.on("ok/a", Error(503))
        gw.upstream.on("ok/b", Error(503))
        reply = await gw.post("/v1/chat/completions", body_of("chat/completions", model="ok/a", **fields))
        sent = [seen.json for seen in gw.upstream.seen]
        assert all("fallbacks" not in body and "stream" not in body for body in sent)
        asked = [(body["model"], *body.get("models", ())) for body in sent]
        assert asked == ([("ok/a",), ("ok/b",), ("ok/c",)] if owner == "off" else [("ok/a", "ok/b"), ("ok/c",)])
        assert (reply.status, sent[-1]["max_tokens"]) == (200, 7)


@SCOPE
async def test_targets_that_openrouter_would_try_are_in_the_scope():
    """A key without the alias may use it if all its models are granted: also those that are sent as `models`."""
    aliases = {"fine": ["ok/a", "ok/b"], "dear": ["ok/a", "dear/a"]}
    routing = {"use": "routing", "config": {"native_fallback": "openrouter", "aliases": aliases}}
    async with Gateway.test(plugins=[Scoped, routing]) as gw:
        assert (await gw.chat(model="fine")).status == 200
        assert gw.upstream.seen[0].json["models"] == ["ok/b"]
        assert (await gw.chat(model="dear")).status == 404
        assert len(gw.upstream.seen) == 1


@SCOPE
async def test_a_rule_that_keeps_names_opens_no_model():
    """`use: {set: …}` changes how a model is asked, not who may ask for it; a task is no way to a model of one's own."""
    rules = [{"name": "all", "use": {"set": {"seed": 1}}}]
    tasks = {"work": {}}
    routing = {"use": "routing", "config": {"rules": rules, "tasks": tasks}}
    async with Gateway.test(plugins=[Scoped, routing]) as gw:
        assert (await gw.chat(model="ok/a")).status == 200
        assert (await gw.chat(model="dear/a")).status == 404
        body = body_of("chat/completions", model="dear/a")
        reply = await gw.post("/v1/chat/completions", body, headers=TASK)
        assert (reply.status, reply.data["error"]["code"]) == (400, "no_route")
        assert [seen.model for seen in gw.upstream.seen] == ["ok/a"]


# --- budgets ----------------------------------------------------------------------------------------------------------

# USD per million tokens, so micro-USD per token.
PRICES = {
    MODEL: {"input": 1, "cache_write": 1, "output": 10, "context_length": 100_000, "max_output": 5000},
    "test/dear": {"input": 7, "cache_write": 7, "output": 70, "context_length": 100_000, "max_output": 5000},
    "test/endless": {"input": 1, "cache_write": 1, "output": 10},
}


def budgeted(may, *, upstream=None, usd=10_000, hard=True, **config):
    budget = {"name": "all", "by": [], "usd": usd, "per": "total", "hard": hard}
    settings = {"catalogue": {"overrides": PRICES}, "upstream": {"client_may": MAY[may]}}
    plugins = ["api_keys", {"use": "budgets", "config": {"budgets": [budget], **config}}]
    return Gateway.test(plugins=plugins, upstream=upstream, settings=settings)


COSTS_MORE = [
    {"model": "nobody/knows"},
    {"model": "~nobody/knows-latest"},
    {"model": MODEL + "@preset/x"},
    {"model": MODEL + ":x@preset/x"},
    {"model": "@preset/x"},
    {"model": "openrouter/auto"},
    {"model": MODEL + ":online"},
    {"model": MODEL + ":Online"},
    {"model": MODEL + ":online:floor"},
    {"model": MODEL + ":floor:online"},
    {"model": MODEL + ":online:free"},
    {"model": MODEL + ":nitro"},
    {"model": MODEL + ":free:nitro"},
    {"model": MODEL + ":whatever"},
    {"model": "nobody/knows:free"},
    {"models": ["nobody/knows"]},
    {"models": [MODEL, MODEL + ":nitro"]},
    {"model": None, "models": [MODEL, "nobody/knows"]},
    {"fallbacks": [{"model": "nobody/knows"}]},
    {"fallbacks": ["nobody/knows"]},
    {"fallbacks": [{"model": MODEL, "service_tier": "priority"}]},
    {"plugins": [{"id": "web"}]},
    {"plugins": "web"},
    {"preset": "x"},
    {"web_search_options": {"search_context_size": "high"}},
    {"service_tier": "priority"},
    {"service_tier": "fast"},
    {"service_tier": ["priority"]},
    {"service_tier": {"x": 1}},
    {"speed": "fast"},
    {"inference_geo": "us"},
    {"tools": [{"type": "openrouter:web_search"}]},
    {"tools": [{"type": "web_search_20260209", "name": "web_search"}]},
    {"tools": [{"type": "image_generation"}]},
    {"tools": [{"type": ["function"]}]},
    {"tools": {"type": "openrouter:web_search"}},
    {"deferred_tools": [{"type": "openrouter:web_search"}]},
    {"mcp_servers": [{"type": "url", "url": "https://x.test"}]},
    {"container": {"skills": [{"type": "anthropic", "skill_id": "pptx"}]}},
    {"context_management": {"edits": [{"type": "compact_20260112"}]}},
    {"modalities": ["image", "text"]},
    {"modalities": ["text", "audio"], "audio": {"voice": "alloy"}},
    {"modalities": "image"},
    {"provider": {"options": {"anthropic": {"speed": "fast"}}}},
]
GENERATING = ["chat/completions", "completions", "responses", "messages"]


@SCOPE
@pytest.mark.parametrize("may", MAY)
@pytest.mark.parametrize("endpoint", GENERATING)
async def test_nothing_without_a_known_price_passes_a_hard_budget(endpoint, may):
    """What could cost more than the list says is refused with the reason, or taken out: it never goes upstream."""
    async with budgeted(may) as gw:
        for fields in COSTS_MORE:
            body = body_of(endpoint, **{"model": MODEL, "max_tokens": 5, "max_output_tokens": 5, **fields})
            reply = await gw.post(f"/v1/{endpoint}", body)
            if reply.status == 200:
                removed = set(reply.headers["x-xenios-removed"].split(", "))
                assert removed & fields.keys(), fields
                assert gw.upstream.seen[-1].json.keys().isdisjoint(removed)
                assert gw.upstream.seen[-1].json["model"] == MODEL
            else:
                assert reply.status in {400, 403}, (fields, reply.body)
                if endpoint != "messages":
                    code = reply.data["error"]["code"]
                    assert code in {
                        "unknown_price",
                        "model_not_allowed",
                        "invalid_request",
                        "missing_required_parameter",
                    }


TEXT = "word " * 2000
IMAGE = {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}
INLINE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 50_000}}
ANTHROPIC = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 50_000}}


def said(*parts):
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, *parts]}]}


# (endpoint, fields, the least that must be reserved in micro-USD, the most)
PRICED = [
    ("chat/completions", {"max_tokens": 100}, 1000, 1500),
    ("chat/completions", {"max_tokens": 100, "n": 300}, 300_000, None),
    ("chat/completions", {"max_tokens": 100, "n": 3.0}, 3000, None),
    ("chat/completions", {"max_tokens": 100, "n": "3"}, 3000, None),
    ("chat/completions", {"max_tokens": 1, "max_completion_tokens": 900}, 9000, None),
    ("chat/completions", {"max_tokens": 900, "max_completion_tokens": 1}, 9000, None),
    ("chat/completions", {"max_output_tokens": 1}, 50_000, None),
    ("chat/completions", {"max_tokens": -1}, 50_000, None),
    ("chat/completions", {"max_tokens": 0}, 50_000, None),
    ("chat/completions", {"max_tokens": "1"}, 50_000, None),
    ("chat/completions", {"max_tokens": 1.0}, 50_000, None),
    ("chat/completions", {"max_tokens": True}, 50_000, None),
    ("chat/completions", {"max_tokens": 10, "reasoning": {"max_tokens": 3000}}, 30_100, None),
    ("chat/completions", {"max_tokens": 100, "prediction": {"type": "content", "content": "x" * 400}}, 5000, None),
    ("chat/completions", {"max_tokens": 1, "models": ["test/dear"]}, 70, None),
    ("chat/completions", {"max_tokens": 100, "fallbacks": [{"model": "test/dear"}]}, 7000, None),
    ("chat/completions", {"max_tokens": 1, "fallbacks": [{"model": MODEL, "max_tokens": 4000}]}, 40_000, None),
    ("completions", {"max_tokens": 100, "n": 2, "best_of": 7}, 7000, None),
    ("completions", {"max_tokens": 100, "prompt": ["a", "b", "c"], "n": 2}, 6000, None),
    ("completions", {"max_tokens": 100, "prompt": [[1, 2], [3, 4]]}, 2000, None),
    ("completions", {"max_tokens": 100, "prompt": [1] * 50}, 1000, 2000),
    ("responses", {"max_output_tokens": 100}, 1000, 1500),
    ("responses", {"max_tokens": 1}, 50_000, None),
    ("responses", {"max_completion_tokens": 1}, 50_000, None),
    ("messages", {"max_tokens": 10, "thinking": {"type": "enabled", "budget_tokens": 3000}}, 30_100, None),
    ("messages", {"max_tokens": 4000, "thinking": {"type": "enabled", "budget_tokens": 3000}}, 40_000, 42_000),
    # input
    ("chat/completions", {"max_tokens": 1, **said(IMAGE)}, 5000, 6000),
    ("chat/completions", {"max_tokens": 1, **said(INLINE)}, 5000, 6000),
    ("messages", {"max_tokens": 1, **said(ANTHROPIC)}, 5000, 6000),
    ("chat/completions", {"max_tokens": 1, **said(IMAGE, IMAGE, IMAGE)}, 15_000, None),
    ("chat/completions", {"max_tokens": 1, **said(IMAGE, {"type": "text", "text": "data:" + TEXT})}, 15_000, None),
    ("chat/completions", {"max_tokens": 1, **said({**IMAGE, "text": TEXT})}, 15_000, None),
    ("chat/completions", {"max_tokens": 1, **said(IMAGE), "response_format": {"x": TEXT}}, 15_000, None),
    ("chat/completions", {"max_tokens": 1, **said(IMAGE), "functions": [{"data": TEXT}]}, 15_000, None),
    ("chat/completions", {"max_tokens": 1, "tools": [{"type": "function"}]}, 1000, 1500),
    ("chat/completions", {"max_tokens": 1, **said({"type": "input_audio", "input_audio": {}})}, 100_000, None),
    ("chat/completions", {"max_tokens": 1, **said({"type": "video_url", "video_url": {}})}, 100_000, None),
    ("chat/completions", {"max_tokens": 1, **said({"type": "file", "file": {"file_id": "x"}})}, 100_000, None),
    ("messages", {"max_tokens": 1, **said({"type": "document", "source": {"type": "url"}})}, 100_000, None),
    ("responses", {"max_output_tokens": 1, "previous_response_id": "resp_1"}, 100_000, None),
    ("responses", {"max_output_tokens": 1, "prompt": {"id": "pmpt_1"}}, 100_000, None),
    ("responses", {"max_output_tokens": 1, "input": [{"type": "item_reference", "id": "msg_1"}]}, 100_000, None),
    ("messages", {"max_tokens": 1, "system": [{"type": "text", "text": TEXT, "cache_control": {"type": "ephemeral"}}]},
     10_000, 12_000),
    ("messages", {"max_tokens": 1, "system": [{"type": "text", "text": TEXT, "cache_control": {"ttl": "1h"}}]},
     20_000, 24_000),
    # tiers above 200,000 tokens, at the price of what is written to the cache
    ("messages", {"model": "anthropic/claude-sonnet-4.5", "max_tokens": 1, "system": "word " * 50_000}, 1_875_000, None),
]  # fmt: skip


@SCOPE
@pytest.mark.parametrize(("endpoint", "fields", "least", "most"), PRICED)
async def test_a_request_is_reserved_for_at_its_most(endpoint, fields, least, most):
    """Whatever makes a request cost more, more is reserved for it; and for an ordinary one not much more than it may cost."""
    async with budgeted("xenios", upstream=ScriptedUpstream(Hang())) as gw:
        asked = Tasks().spawn(
            gw.post(f"/v1/{endpoint}", body_of(endpoint, **{"model": MODEL, "max_tokens": None, **fields})), "asked"
        )
        await gw.upstream.wait_seen(1)
        [(spent, reserved)] = await gw.snapshot.services.ledger.budgets(["budgets:all:total:"])
        assert spent == 0
        assert reserved >= least
        assert most is None or reserved <= most
        asked.cancel()


@SCOPE
async def test_escapes_hide_nothing_from_the_price():
    r"""An image whose `type` is written as `\u0074ype`, and a time to live so written, are seen."""
    image = json.dumps(said(IMAGE)["messages"]).replace('"type"', r'"\u0074ype"')
    cached = json.dumps([{"role": "user", "content": TEXT, "cache_control": {"ttl": "1h"}}])
    for messages, least in ((image, 5000), (cached.replace('"ttl"', r'"\u0074tl"'), 20_000)):
        async with budgeted("xenios", upstream=ScriptedUpstream(Hang())) as gw:
            data = f'{{"model":"{MODEL}","max_tokens":1,"messages":{messages}}}'
            how = {"data": data, "headers": {"Content-Type": "application/json"}}
            asked = Tasks().spawn(gw.request("POST", "/v1/chat/completions", **how), "asked")
            await gw.upstream.wait_seen(1)
            [(_, reserved)] = await gw.snapshot.services.ledger.budgets(["budgets:all:total:"])
            assert reserved >= least
            asked.cancel()


@SCOPE
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 5, **said({"type": "file", "file": {"file_data": "data:application/pdf;base64,AA"}})},
        {"max_tokens": 5, **said({"type": "input_audio", "input_audio": {"data": "AA"}})},
        {},
    ],
)
async def test_what_no_context_bounds_has_no_price(fields):
    """Media, and output without a limit, of a model whose context and output nobody knows."""
    async with budgeted("xenios") as gw:
        reply = await gw.post("/v1/chat/completions", body_of("chat/completions", model="test/endless", **fields))
        assert (reply.status, reply.data["error"]["code"]) == (403, "unknown_price")
        assert gw.upstream.seen == []


@SCOPE
async def test_endpoints_whose_output_nothing_bounds_need_a_price_per_request():
    """Speech, images and transcriptions are refused by a hard budget until the operator says what one costs at most."""
    endpoints = ["images/generations", "audio/speech", "audio/transcriptions"]
    async with budgeted("xenios") as gw:
        for endpoint in endpoints:
            reply = await gw.request("POST", f"/v1/{endpoint}", **request(endpoint, model=MODEL))
            assert reply.status == 403, endpoint
        assert gw.upstream.seen == []
    async with budgeted("xenios", cost_per_request=dict.fromkeys(endpoints, 0.01)) as gw:
        for endpoint in endpoints:
            assert (await gw.request("POST", f"/v1/{endpoint}", **request(endpoint))).status == 200, endpoint


@SCOPE
@pytest.mark.parametrize(("documents", "searches"), [(["x"] * 5, 1), (["x"] * 250, 3), (["x" * 200_000], 4)])
async def test_many_documents_are_several_searches(documents, searches):
    """Rerank has a price per hundred documents, and a long one counts as several."""
    async with budgeted("xenios", upstream=ScriptedUpstream(Hang())) as gw:
        body = {"model": "cohere/rerank-v3.5", "query": "x", "documents": documents}
        asked = Tasks().spawn(gw.post("/v1/rerank", body), "asked")
        await gw.upstream.wait_seen(1)
        [(_, reserved)] = await gw.snapshot.services.ledger.budgets(["budgets:all:total:"])
        assert searches * 2000 <= reserved <= 2 * searches * 2000
        asked.cancel()


@SCOPE
@pytest.mark.parametrize(
    ("provider", "sent"),
    [
        ({"order": ["dear"]}, {"order": ["dear"], "max_price": {"prompt": 1.0, "completion": 10.0}}),
        ({"max_price": {"prompt": 90, "completion": "0.5", "image": 3}},
         {"max_price": {"prompt": 1.0, "completion": 0.5, "image": 3}}),
        ({"max_price": "none"}, {"max_price": {"prompt": 1.0, "completion": 10.0}}),
        ("dear", {"max_price": {"prompt": 1.0, "completion": 10.0}}),
        ([], {"max_price": {"prompt": 1.0, "completion": 10.0}}),
    ],
)  # fmt: skip
async def test_a_provider_that_the_client_prefers_is_held_to_the_list_price(provider, sent):
    """Who chooses a provider under a hard budget gets it for the price that was reserved, or another."""
    async with budgeted("production") as gw:
        reply = await gw.post("/v1/chat/completions", body_of("chat/completions", model=MODEL, provider=provider))
        assert reply.status == 200
        assert gw.upstream.seen[0].json["provider"] == sent


async def test_who_chooses_no_provider_is_sent_where_openrouter_likes():
    """Without `provider`, and with a budget that only warns, nothing is added."""
    for hard, fields in ((True, {}), (False, {"provider": {"order": ["x"]}})):
        async with budgeted("production", hard=hard) as gw:
            await gw.post("/v1/chat/completions", body_of("chat/completions", model=MODEL, **fields))
            assert gw.upstream.seen[0].json.get("provider") == fields.get("provider")


@SCOPE
@pytest.mark.parametrize("name", [MODEL + ":floor", MODEL + ":exacto", MODEL + ":thinking"])
async def test_variants_are_held_to_the_list_price(name):
    """A variant that isn't in the list is served for the price of its model."""
    async with budgeted("xenios") as gw:
        assert (await gw.post("/v1/chat/completions", body_of("chat/completions", model=name))).status == 200
        assert gw.upstream.seen[0].json["provider"] == {"max_price": {"prompt": 1.0, "completion": 10.0}}


@SCOPE
@pytest.mark.parametrize("wrong", [-1, 0, "5000", 5000.0, None])
async def test_a_limit_that_is_none_does_not_stand_beside_the_one_that_is_set(wrong):
    """A request that is clamped keeps no other output limit that the upstream might read as larger."""
    async with budgeted("xenios", usd="0.02") as gw:
        fields = {"max_tokens": wrong, "max_completion_tokens": wrong}
        reply = await gw.post("/v1/chat/completions", body_of("chat/completions", model=MODEL, **fields))
        assert reply.status == 200
        sent = gw.upstream.seen[0].json
        assert {n: v for n, v in sent.items() if n in fields} == {
            "max_tokens": int(reply.headers["x-xenios-clamped"][11:])
        }


@pytest.mark.parametrize(("target", "least"), [
    ({"model": MODEL, "strip": ["max_tokens"]}, 50_000),
    ({"model": MODEL, "set": {"max_tokens": 4000}}, 40_000),
    ({"model": MODEL, "set": {"n": 3, "max_tokens": 1000}}, 30_000),
    ({"model": MODEL, "set": {"max_tokens": None}}, 50_000),
    ({"model": MODEL, "set": {"max_completion_tokens": 1}}, 50_000),
])  # fmt: skip
async def test_what_the_operator_sets_and_strips_is_reserved_for(target, least):
    """A target's own fields count, for what the body lists besides too."""
    budget = {"budgets": [{"name": "all", "by": [], "usd": 100, "per": "total"}]}
    plugins = [
        "api_keys",
        {"use": "budgets", "config": budget},
        {"use": "routing", "config": {"aliases": {"alias": [target]}}},
    ]
    settings = {"catalogue": {"overrides": PRICES}, "upstream": {"client_may": MAY["xenios"]}}
    # what the client lists besides is asked with the client's own fields
    for more, most in (({}, least), ({"models": ["test/dear"], "max_tokens": 1000}, 70_000)):
        async with Gateway.test(plugins=plugins, settings=settings, upstream=ScriptedUpstream(Hang())) as gw:
            body = body_of("chat/completions", **{"model": "alias", "max_tokens": 1, **more})
            asked = Tasks().spawn(gw.post("/v1/chat/completions", body), "asked")
            await gw.upstream.wait_seen(1)
            [(_, reserved)] = await gw.snapshot.services.ledger.budgets(["budgets:all:total:"])
            assert reserved >= most
            asked.cancel()


async def test_what_openrouter_may_try_is_reserved_for():
    """Targets that go upstream as one attempt's `models` are each priced: the dearest counts."""
    budget = {"budgets": [{"name": "all", "by": [], "usd": 100, "per": "total"}]}
    aliases = {"alias": [MODEL, "test/dear"]}
    plugins = [
        "api_keys",
        {"use": "budgets", "config": budget},
        {"use": "routing", "config": {"native_fallback": "openrouter", "aliases": aliases}},
    ]
    async with Gateway.test(
        plugins=plugins, settings={"catalogue": {"overrides": PRICES}}, upstream=ScriptedUpstream(Hang())
    ) as gw:
        asked = Tasks().spawn(gw.chat(model="alias", max_tokens=1000), "asked")
        seen = await gw.upstream.wait_seen(1)
        assert (seen.model, seen.json["models"]) == (MODEL, ["test/dear"])
        [(_, reserved)] = await gw.snapshot.services.ledger.budgets(["budgets:all:total:"])
        assert reserved >= 70_000
        asked.cancel()


@SCOPE
async def test_a_limit_that_a_target_strips_is_no_limit():
    """Where no limit can be set for it, a request is admitted for the most that its model may answer, or not at all."""
    aliases = {"alias": [{"model": MODEL, "strip": ["max_tokens"]}]}
    for usd, status in (("0.02", 429), ("0.06", 200)):
        budget = {"budgets": [{"name": "all", "by": [], "usd": usd, "per": "total"}]}
        plugins = ["api_keys", {"use": "budgets", "config": budget}, {"use": "routing", "config": {"aliases": aliases}}]
        async with Gateway.test(plugins=plugins, settings={"catalogue": {"overrides": PRICES}}) as gw:
            assert (await gw.chat(model="alias")).status == status


@SCOPE
@pytest.mark.parametrize("wrong", [None, -1, 0, "9", 9.5])
async def test_a_further_models_own_limit_is_no_way_around_a_budget(wrong):
    """A limit that is none, beside a further model, would stand where ours is set: there is room for all of it, or none."""
    for cap, usd, status in ((wrong, "0.02", 429), (wrong, "100", 200), (1, "0.02", 200)):
        async with budgeted("xenios", usd=usd) as gw:
            fields = {"fallbacks": [{"model": MODEL, "max_tokens": cap}], "max_tokens": 1}
            reply = await gw.post("/v1/chat/completions", body_of("chat/completions", model=MODEL, **fields))
            assert reply.status == status


@SCOPE
@pytest.mark.parametrize("models", [{"models": ["test/dear"]}, {"fallbacks": [{"model": "test/dear"}]}])
async def test_a_budget_for_a_model_holds_for_whoever_names_it_further_on(models):
    """A budget `when: {models: …}` is held whichever place of a request names the model."""
    budget = {"name": "all", "by": [], "usd": "0.000001", "per": "total", "when": {"models": ["test/dear"]}}
    plugins = ["api_keys", {"use": "budgets", "config": {"budgets": [budget]}}, "routing", "fallback"]
    settings = {"catalogue": {"overrides": PRICES}, "upstream": {"client_may": MAY["xenios"]}}
    async with Gateway.test(plugins=plugins, settings=settings) as gw:
        assert (await gw.chat(model=MODEL, max_tokens=1)).status == 200
        assert (await gw.chat(model=MODEL, max_tokens=1, **models)).status == 429


@SCOPE
@pytest.mark.parametrize("field", ["messages", "prompt", "input", "system", "instructions", "tools"])
async def test_a_fallback_says_nothing_of_its_own(field):
    """What is said to a model stands where limits, rules and plugins look at it; a fallback has parameters alone."""
    async with budgeted("xenios") as gw:
        fields = {"fallbacks": [{"model": MODEL, field: "x" * 1000}], "max_tokens": 1}
        reply = await gw.post("/v1/chat/completions", body_of("chat/completions", model=MODEL, **fields))
        assert (reply.status, reply.data["error"]["param"], gw.upstream.seen) == (400, "fallbacks", [])


@pytest.mark.parametrize(
    "fields",
    [{"model": "m" * 501}, {"models": ["m" * 501]}, {"models": ["a/b"] * 32}, {"fallbacks": [{"model": "m" * 501}]}],
)
async def test_names_of_models_are_few_and_short(fields):
    """What a client may make us remember, price and look up is bounded."""
    async with budgeted("xenios") as gw:
        reply = await gw.post("/v1/chat/completions", body_of("chat/completions", **{"model": MODEL, **fields}))
        assert (reply.status, gw.upstream.seen) == (400, [])
        assert " at most." in reply.data["error"]["message"]


def test_every_field_that_clients_may_be_allowed_is_tried():
    """A new entry of `client_may` can't be forgotten here."""
    tried = {name for fields in (*LEAVING, *COSTS_MORE) for name in fields}
    names = {name for names in CHOOSING_FIELDS.values() for name in names}
    assert names - tried == {"route"}  # it says only that `models` are tried in order
    assert {v for v, fields in product(VARIANTS, COSTS_MORE) if f":{v}" in str(fields.get("model"))} >= {
        "online",
        "nitro",
    }
