"""Explaining a request: the same answer that it would get, and nothing is sent, counted or stored."""

from __future__ import annotations

import json

import pytest

from gateway import Decision, Finding, Forbidden, Principal, RateLimited, Target, Unavailable, hookimpl
from gateway.dialects import DIALECTS
from gateway.exchange import Outcome
from gateway.kit import Rule
from gateway.kit.keys import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from tests.contract.recorder import TRACE, Broken, Recorder, Refuser, trace
from tests.contract.requests import BODIES, request

EXPLAIN = {"X-Xenios-Explain": "1"}
ADA = new_key()
HELLO = [{"role": "user", "content": "Hello"}]
ASKED = {"model": "test/model", "messages": HELLO}
KEYS = ("api_keys", "keys")
ROUTES = {
    "aliases": {"smart": ["a/one", {"model": "b/two", "strip": ["temperature"], "set": {"top_p": 0.5}}]},
    "rules": [{"name": "old", "match": "gpt-*", "use": "a/one"}],
    "tasks": {"chat": {"use": ["a/one", "b/two"]}},
}
SETTINGS = {
    "upstream": {"client_may": ["models", "provider", "plugins", "service_tier"]},
    "catalogue": {"overrides": {
        "a/one": {"input": 2, "output": 10, "context_length": 1000, "max_output": 100},
        "b/two": {"input": 1, "output": 4, "context_length": 2000},
    }},
}  # fmt: skip


def keys(**ada):
    entry = {"id": "ada", "hash": hash_key(ADA, PEPPER), "team": "blue", "roles": ["intern"], **ada}
    return {"use": "api_keys", "config": {"keys": [entry]}}


def gateway(*plugins, settings=None, **ada):
    routing = {"use": "routing", "config": ROUTES}
    return Gateway.test(plugins=[keys(**ada), routing, *plugins], settings={**SETTINGS, **(settings or {})})


async def explained(gw, model="test/model", *, status=200, who=None, headers=None, endpoint=None, **fields):
    body = {"body": {"model": model, "messages": HELLO, **fields}}
    body |= {name: value for name, value in (("as", who), ("headers", headers), ("endpoint", endpoint)) if value}
    reply = await gw.post("/admin/explain", body)
    assert reply.status == status, reply.body
    return reply.data


class Keeps(Recorder):
    """Keeps the exchanges that it explained."""

    def __init__(self, config, services):
        super().__init__(config, services)
        self.explained = []

    @hookimpl
    async def authenticate(self, exchange):
        self.saw("authenticate", exchange)

    @hookimpl
    async def explain(self, exchange):
        self.saw("explain", exchange)
        self.explained.append(exchange)


class Says:
    """A third party's plugin that says what the test wants."""

    said = ()

    def __init__(self, config, services): ...

    @hookimpl
    async def explain(self, exchange):
        if isinstance(self.said, Exception):
            raise self.said
        return self.said(exchange) if callable(self.said) else self.said


def saying(what, name="Says"):
    return type(name, (Says,), {"said": staticmethod(what) if callable(what) else what})


# --- in place of an answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", sorted(DIALECTS))
@pytest.mark.parametrize("stream", [False, True])
async def test_an_administrator_s_header_replaces_the_answer(endpoint, stream):
    """On every endpoint, streamed or not: JSON that explains, and the upstream sees nothing."""
    async with Gateway.test(plugins=["api_keys"]) as gw:
        sent = request(endpoint, stream=stream)
        reply = await gw.request(
            "POST", f"/v1/{endpoint}", **{**sent, "headers": {**sent.get("headers", {}), **EXPLAIN}}
        )
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        assert reply.data["endpoint"] == endpoint
        assert reply.data["stream"] is (stream and DIALECTS[endpoint].grammar is not None)
        assert [(t["upstream"], t["model"]) for t in reply.data["targets"]] == [("openrouter", "test/model")]
        [exchange] = await gw.finished()
        assert (exchange.outcome, exchange.status, exchange.attempts) == (Outcome.OK, 200, [])
        assert reply.headers["x-xenios-attempts"] == "0"
        assert gw.upstream.seen == []


@pytest.mark.parametrize("value", ["1", "true", "yes", "2"])
@pytest.mark.parametrize("endpoint", ["chat/completions", "messages"])
async def test_without_an_admin_key_the_header_is_refused(endpoint, value):
    """403, and never an answer that costs something in place of the explanation."""
    async with gateway() as gw:
        headers = {"Authorization": f"Bearer {ADA}", "X-Xenios-Explain": value}
        for stream in (False, True):
            body = {**ASKED, **BODIES[endpoint], "stream": stream}
            reply = await gw.post(f"/v1/{endpoint}", body, headers=headers)
            assert reply.status == 403
            assert "X-Xenios-Explain needs an admin key" in reply.data["error"]["message"]
        assert gw.upstream.seen == []


async def test_where_everybody_is_let_in_nobody_is_told():
    """A gateway without keys has no administrators, so that it explains nothing."""
    async with Gateway.test() as gw:
        assert (await gw.post("/v1/chat/completions", ASKED, headers=EXPLAIN)).status == 403
        assert (await gw.post("/admin/explain", {"body": ASKED})).status == 403
        assert gw.upstream.seen == []


async def test_the_header_can_say_no():
    """`X-Xenios-Explain: 0` asks for an ordinary answer, whoever sends it."""
    async with gateway() as gw:
        for key in (gw.key, ADA):
            headers = {"Authorization": f"Bearer {key}", "X-Xenios-Explain": "0"}
            reply = await gw.post("/v1/chat/completions", ASKED, headers=headers)
            assert (reply.status, reply.headers["x-xenios-attempts"]) == (200, "1")
        assert len(gw.upstream.seen) == 2


async def test_only_what_is_asked_of_models_is_explained():
    """A route of a plugin might ask a model by itself: with the header it isn't called at all."""

    async with Gateway.test(plugins=["api_keys", Recorder]) as gw:
        reply = await gw.post("/recorded/x", {}, headers=EXPLAIN)
        assert (reply.status, reply.data["error"]["param"]) == (400, "X-Xenios-Explain")
        [exchange] = await gw.finished()
        assert "handler" not in trace(exchange)


async def test_which_hooks_run():
    """Of a real request those of any HTTP request, and up to the decision; of one that nobody sent only the latter."""
    async with Gateway.test(plugins=["api_keys", Keeps]) as gw:
        assert (await gw.post("/v1/chat/completions", ASKED, headers=EXPLAIN)).status == 200
        [exchange] = await gw.finished()
        assert exchange.get(TRACE) == [
            ("Keeps", hook)
            for hook in (
                "request_received", "prepare_request", "choose_targets", "explain", "response_started",
                "request_finished",
            )
        ]  # fmt: skip
        await explained(gw)
        _, dry = gw.plugin("Keeps").explained
        assert dry.get(TRACE) == [("Keeps", hook) for hook in ("prepare_request", "choose_targets", "explain")]
        assert gw.upstream.seen == []


async def test_nothing_is_counted():
    """Limits, budgets and usage are as if nobody had asked; the next real request counts as the first."""
    limits = {"limits": [{"name": "few", "requests": 2, "concurrent": 1, "per": "1h"}]}
    plugins = (
        {"use": "rate_limit", "config": limits},
        {"use": "budgets", "config": {"budgets": [{"name": "all", "usd": 1}]}},
        "usage",
    )
    settings = {"services": {"database": {"url": "sqlite", "migrate_on_start": True}}}
    async with gateway(*plugins, settings=settings) as gw:
        ledger = gw.snapshot.services.ledger
        for _ in range(5):
            assert (await gw.post("/v1/chat/completions", {**ASKED, "model": "smart"}, headers=EXPLAIN)).status == 200
            await explained(gw, "smart", who="bootstrap")
        await gw.finished(10)
        assert (ledger._full_at, ledger._slots, ledger._budgets, ledger._numbers) == ({}, {}, {}, 0)
        reply = await gw.chat(model="smart")
        assert (reply.status, reply.headers["x-ratelimit-remaining-requests"]) == (200, "1")
        await gw.finished(11)
        assert ledger._numbers == 1


# --- asked by an administrator --------------------------------------------------------------------------------------


async def test_what_an_explanation_says():
    """Who asks, what for, which rule, which models in order with price and context, and what it can cost at most."""
    async with gateway("fallback") as gw:
        data = await explained(gw, "smart", who="ada", max_tokens=50, temperature=1)
        assert gw.upstream.seen == []
    assert data["principal"] == {
        "id": "ada", "kind": "key", "tenant": "ada", "team": "blue", "roles": ["intern"], "admin": False,
    }  # fmt: skip
    assert (data["asked"], data["alias"], data["task"], data["rule"]) == ("smart", "smart", None, None)
    assert (data["reasons"], data["refused"]) == (["alias smart"], None)
    one, two = data["targets"]
    size = len(
        json.dumps({"model": "smart", "messages": HELLO, "max_tokens": 50, "temperature": 1}, separators=(",", ":"))
    )
    [circuit] = one.pop("findings")
    assert (circuit["plugin"], circuit["text"]) == ("fallback", "attempt 1, circuit closed")
    assert one == {
        "upstream": "openrouter", "model": "a/one", "price": {"input": 2.0, "output": 10.0}, "context_length": 1000,
        "worst_case_usd": (2 * size + 10 * 50) / 1e6, "set": {}, "strip": [], "tried": True,
    }  # fmt: skip
    assert (two["model"], two["set"], two["strip"]) == ("b/two", {"top_p": 0.5}, ["temperature"])
    assert data["worst_case_usd"] == one["worst_case_usd"]
    assert data["plugins"]["choose_targets"] == ["routing"]
    assert data["plugins"]["around_upstream"] == ["fallback"]
    assert list(dict.fromkeys(f["plugin"] for f in data["findings"])) == ["api_keys", "routing", "fallback"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"model": "smart"}, (None, "smart", None)),
        ({"model": "gpt-4"}, (None, "gpt-4", "old")),
        ({"model": "task/chat"}, ("chat", None, None)),
        ({"model": "any", "headers": {"x-xenios-task": "chat"}}, ("chat", None, None)),
        ({"model": "other"}, (None, None, None)),
    ],
)
async def test_what_decided(asked, found):
    """A task, an alias, a rule, or nothing: as the reply to a real request would say."""
    async with gateway() as gw:
        data = await explained(gw, **asked)
        assert (data["task"], data["alias"], data["rule"]) == found


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"model": "nobody/knows"}, "it has no price"),
        ({"web_search_options": {}}, "a search costs extra"),
        ({"service_tier": "priority"}, "a dearer tier"),
        ({"tools": [{"type": "web_search"}]}, "a tool that runs at the upstream costs extra"),
        ({"model": "smart", "provider": {"order": ["x"]}}, "a provider has prices of its own"),
    ],
)
async def test_a_cost_without_a_bound_is_not_told(fields, why):
    """What nobody knows is null, never a number that looks like a bound."""
    async with gateway() as gw:
        data = await explained(gw, **{"model": "a/one", "max_tokens": 10, **fields})
        assert data["worst_case_usd"] is None, why


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_request"),
        ({"body": []}, 400, "invalid_request"),
        ({"body": ASKED, "key": "x"}, 400, "invalid_request"),
        ({"body": ASKED, "endpoint": "models"}, 400, "invalid_request"),
        ({"body": ASKED, "headers": {"a": 1}}, 400, "invalid_request"),
        ({"body": ASKED, "as": "grace"}, 404, "principal_gone"),
        ({"body": ASKED, "as": "jwt.login:ada"}, 404, "principal_gone"),
    ],
)
async def test_what_can_not_be_explained(body, status, code):
    """A question that makes no sense, or about somebody whom nobody knows, is told so."""
    async with gateway() as gw:
        reply = await gw.post("/admin/explain", body)
        assert (reply.status, reply.data["error"]["code"]) == (status, code)


async def test_no_secret_is_told():
    """Neither a key nor what stands in a token, nor a header that carried one."""
    async with gateway() as gw:
        sent = {"Authorization": "Bearer canary-canary", "X-Xenios-Task": "chat"}
        reply = await gw.post("/admin/explain", {"body": ASKED, "as": "key:ada", "headers": sent})
        for secret in (b"canary", ADA.encode(), gw.key.encode(), hash_key(ADA, PEPPER).encode(), b"sk-or-v1"):
            assert secret not in reply.body


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "status", "code", "by"),
    [
        ({"headers": {"X-Xenios-Task": "nothing"}}, 400, "unknown_task", "routing.choose_targets"),
        ({"model": "task/nothing"}, 400, "unknown_task", "routing.choose_targets"),
        ({"model": "gpt-4"}, 404, "model_not_found", "core"),
        ({"model": "smart", "models": ["gpt-4"]}, 404, "model_not_found", "core"),
        ({"model": "smart", "endpoint": "embeddings", "input": "x"}, 403, "insufficient_permissions", "core"),
        ({"model": ""}, 400, "missing_required_parameter", "core"),
        ({"model": 7}, 400, "invalid_type", "core"),
    ],
)
async def test_what_would_be_refused_is_refused_alike(how, status, code, by):
    """The explanation names the status and the code that the request itself then gets."""
    async with gateway(aliases=["smart"], endpoints=["chat/*"]) as gw:
        data = await explained(gw, who="ada", **how)
        refused = data["refused"]
        assert (refused["status"], refused["code"], refused["by"]) == (status, code, by)
        body = {
            "model": "test/model",
            "messages": HELLO,
            **{k: v for k, v in how.items() if k not in {"headers", "endpoint"}},
        }
        headers = {"Authorization": f"Bearer {ADA}", **how.get("headers", {})}
        reply = await gw.post(f"/v1/{how.get('endpoint', 'chat/completions')}", body, headers=headers)
        assert (reply.status, reply.data["error"]["code"], reply.data["error"]["message"]) == (
            status, code, refused["message"],
        )  # fmt: skip
        assert gw.upstream.seen == []


@pytest.mark.parametrize(
    ("how", "status", "code"), [("refuse", 429, "rate_limit_exceeded"), ("raise", 503, "plugin_error")]
)
@pytest.mark.parametrize("hook", ["prepare_request", "choose_targets"])
async def test_a_plugin_on_the_way_to_the_decision(hook, how, status, code):
    """A refusal, or a failure, of a plugin is what the request would get, and who it was; the dry run did not fail."""
    broken = (Broken, {"hook": hook, "how": how})
    async with Gateway.test(plugins=["api_keys", broken]) as gw:
        reply = await gw.post("/v1/chat/completions", ASKED, headers=EXPLAIN)
        assert reply.status == 200
        refused = reply.data["refused"]
        assert (refused["status"], refused["code"], refused["by"]) == (status, code, f"Broken.{hook}")
        # without a body to go by nobody is asked what he would do with it
        assert bool(reply.data["findings"]) is (hook == "choose_targets")
        [exchange] = await gw.finished()
        assert (exchange.outcome, exchange.error_by) == (Outcome.OK, None)


@pytest.mark.parametrize(
    "said", [Forbidden("Not on Sundays."), [Finding("It is Sunday", refuses=Forbidden("Not on Sundays."))]]
)
async def test_a_plugin_says_that_it_would_refuse(said):
    """By raising the refusal, or by naming it; the first of several counts, as it does in a real request."""
    later = {"use": saying([Finding("later", refuses=Forbidden("Later."))], "Later"), "id": "later"}
    async with gateway({"use": saying(said), "id": "sundays"}, later) as gw:
        data = await explained(gw)
        refused = data["refused"]
        assert (refused["status"], refused["message"], refused["by"]) == (403, "Not on Sundays.", "sundays")
        assert [f["refuses"]["message"] for f in data["findings"] if f["refuses"]] == ["Not on Sundays.", "Later."]


async def test_a_plugin_that_says_nothing_is_named():
    """Who may refuse and doesn't say so is told, since the explanation can't speak for it."""
    async with gateway(Refuser, "fallback") as gw:
        data = await explained(gw)
        assert (data["refused"], data["silent"]) == (None, ["Refuser"])


async def test_a_plugin_that_is_scoped_out_is_left_out():
    """A plugin whose `when:` doesn't match is not asked, and is named as left out."""
    sunday = {"use": saying(["there"]), "id": "interns", "when": {"roles": ["intern"]}}
    async with gateway(sunday) as gw:
        mine, adas = await explained(gw), await explained(gw, who="ada")
        assert (mine["left_out"], "interns" in mine["plugins"]["explain"]) == (["interns"], False)
        assert (adas["left_out"], "interns" in adas["plugins"]["explain"]) == ([], True)


# --- limits ---------------------------------------------------------------------------------------------------------


def limited(**more):
    """Two requests an hour for each key, one at the same time, and a budget of a hundredth of a dollar for all."""
    limits = [{"name": "few", "requests": 2, "per": "1h"}, {"name": "at-once", "by": [], "concurrent": 1}]
    budget = {"budgets": [{"name": "all", "by": [], "usd": "0.01", "per": "day"}]}
    return gateway({"use": "rate_limit", "config": {"limits": limits, **more}}, {"use": "budgets", "config": budget})


async def test_what_limits_have_left():
    """Each limit that the request falls under, in words: what it takes of it, and what is left then."""
    async with limited() as gw:
        await gw.chat(model="a/one", max_tokens=50)
        await gw.finished()
        data = await explained(gw, "a/one", who="bootstrap", max_tokens=100)
        requests, at_once, money = data["limits"]
        assert requests == {
            "plugin": "rate_limit", "limit": "few: 2 requests per 1h", "key": "rate_limit:few:key:bootstrap:requests",
            "kind": "rate", "takes": 1, "left": 0, "full_in": pytest.approx(3600, abs=5), "refuses": None,
        }  # fmt: skip
        assert (at_once["limit"], at_once["left"], at_once["refuses"]) == ("at-once: 1 at the same time", 0, None)
        assert (money["plugin"], money["limit"]) == ("budgets", "all: 0.01 USD per day")
        assert money["takes_usd"] == data["worst_case_usd"]
        [(spent, _)] = await gw.snapshot.services.ledger.budgets([money["key"]])
        assert spent > 0
        assert money["left_usd"] == pytest.approx(0.01 - spent / 1e6 - money["takes_usd"])
        assert data["refused"] is None


async def test_an_output_limit_that_a_budget_sets_is_told():
    """Without one of its own a request gets what is left: the explanation names the limit that the real reply has."""
    budget = {"budgets": [{"name": "all", "by": [], "usd": "0.004"}]}
    async with gateway({"use": "budgets", "config": budget}) as gw:
        data = await explained(gw, "b/two", who="bootstrap")
        reply = await gw.chat(model="b/two")
        name, _, tokens = reply.headers["x-xenios-clamped"].partition("=")
        [money] = data["limits"]
        assert (money["takes_usd"], money["left_usd"], data["worst_case_usd"]) == (0.004, 0, 0.004)
        [found] = [f["text"] for f in data["findings"] if f["plugin"] == "budgets"]
        said, _, why = found.removeprefix(f"clamps {name} to ").partition(": ")
        assert int(said) == pytest.approx(int(tokens), abs=20)  # the client's blanks count as input
        assert why == "the budgets have 0.004000 USD left for it"


async def test_a_limit_without_room_is_what_refuses():
    """The explanation says 429, which limit, and when to come again; another caller has all of it left."""
    async with limited() as gw:
        for number in (1, 2):
            await gw.chat(model="a/one", max_tokens=50)
            await gw.finished(number)
        mine, adas = await explained(gw, "a/one", who="bootstrap"), await explained(gw, "a/one", who="ada")
        refused = mine["refused"]
        assert (refused["status"], refused["code"], refused["by"]) == (429, "rate_limit_exceeded", "rate_limit")
        assert refused["retry_after"] == pytest.approx(1800, abs=5)
        assert mine["limits"][0]["refuses"]["code"] == "rate_limit_exceeded"
        assert [limit["refuses"] for limit in mine["limits"][1:]] == [None, None]
        assert (adas["refused"], adas["limits"][0]["left"]) == (None, 1)
        reply = await gw.chat(model="a/one")
        assert (reply.status, reply.data["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_a_budget_that_only_warns_has_no_end():
    """What refuses nobody has nothing left that could run out."""
    budget = {"budgets": [{"name": "soft", "usd": 1, "hard": False}]}
    async with gateway({"use": "budgets", "config": budget}) as gw:
        [money] = (await explained(gw, "a/one", max_tokens=10))["limits"]
        assert (money["limit"], money["left_usd"], money["reserved_usd"]) == (
            "soft: 1 USD per month, only warns", None, 0,
        )  # fmt: skip


@pytest.mark.parametrize(("policy", "refused"), [("allow", None), ("deny", (503, "store_unavailable", "rate_limit"))])
async def test_limits_that_nobody_can_read(policy, refused):
    """While Redis is away what is left is unknown, and the request gets what `on_store_error` says."""
    limits = {"limits": [{"name": "few", "requests": 2}], "on_store_error": policy}
    away = {"services": {"redis": "redis://127.0.0.1:1"}}
    async with gateway({"use": "rate_limit", "config": limits}, settings=away) as gw:
        data = await explained(gw)
        [limit] = data["limits"]
        assert (limit["takes"], limit["left"], limit["full_in"], limit["refuses"]) == (1, None, None, None)
        found = data["refused"]
        assert (found and (found["status"], found["code"], found["by"])) == refused
        reply = await gw.chat()
        assert reply.status == (refused[0] if refused else 200)


class Translations:
    """A third party's limit, as plugins/README.md shows one; and it explains itself."""

    def __init__(self, config, services):
        self.key = f"{services.plugin_id}:translations"

    @hookimpl
    async def check_request(self, exchange):
        exchange.hold(Rule(key=self.key, kind="slots", limit=3, refuse=self.refuse))

    @hookimpl
    async def explain(self, exchange):
        await self.check_request(exchange)
        return ["one more translation"]

    def refuse(self, rule, state):
        return RateLimited("Three translations are under way.")


class Late(Says):
    """Refuses when an upstream is about to be asked."""

    @hookimpl
    async def around_upstream(self, exchange, attempt, call_next):
        raise Unavailable("No model is there.")

    @hookimpl
    async def explain(self, exchange):
        return [Finding("nobody is there", refuses=Unavailable("No model is there."))]


async def test_limits_of_third_parties():
    """Whoever holds limits in `explain` as in `check_request` has them looked at like all others."""
    async with gateway(Translations) as gw:
        data = await explained(gw)
        assert [(limit["plugin"], limit["left"]) for limit in data["limits"]] == [("Translations", 2)]
        gw.snapshot.services.ledger._slots["Translations:translations"] = {"a", "b", "c"}
        refused = (await explained(gw))["refused"]
        assert (refused["message"], refused["by"]) == ("Three translations are under way.", "Translations")


async def test_who_refuses_first():
    """A plugin that refuses after the limits were admitted is told only if these have room."""
    async with gateway(Late, Translations) as gw:
        assert (await explained(gw))["refused"]["by"] == "Late"
        assert (await gw.chat()).data["error"]["code"] == "unavailable"
        await gw.finished(2)
        gw.snapshot.services.ledger._slots["Translations:translations"] = {"a", "b", "c"}
        assert (await explained(gw))["refused"]["by"] == "Translations"
        assert (await gw.chat()).data["error"]["message"] == "Three translations are under way."


# --- what plugins say -----------------------------------------------------------------------------------------------


class Breaks(Says):
    @hookimpl
    async def explain(self, exchange):
        raise ValueError("It broke.")


@pytest.mark.parametrize(
    ("plugin", "error"), [(Breaks, "ValueError"), (saying([7]), "TypeError"), (saying(7), "TypeError")]
)
async def test_a_plugin_whose_explain_fails_is_a_finding(plugin, error):
    """All the others are asked all the same."""
    async with gateway({"use": plugin, "id": "broken"}, "fallback") as gw:
        data = await explained(gw)
        said = {f["plugin"]: f["text"] for f in data["findings"]}
        assert said["broken"] == f"explain failed: {error}"
        assert "fallback" in said


async def test_findings_about_targets_stand_beside_them():
    """A plugin may reorder or skip targets, and say something of each: shown in the order in which they'd be tried."""

    def said(exchange):
        first, second = exchange.decision.targets
        return [
            "in general",
            Finding("broken since noon", target=first, data={"breaker": "open"}),
            Finding("skips what is broken", order=[second]),
        ]

    async with gateway({"use": saying(said), "id": "breakers"}) as gw:
        data = await explained(gw, "task/chat")
        assert [(t["model"], t["tried"]) for t in data["targets"]] == [("b/two", True), ("a/one", False)]
        assert data["targets"][1]["findings"] == [
            {"plugin": "breakers", "text": "broken since noon", "refuses": None, "data": {"breaker": "open"}}
        ]
        assert [f["text"] for f in data["findings"] if f["plugin"] == "breakers"] == [
            "in general",
            "skips what is broken",
        ]


class Elsewhere:
    def __init__(self, config, services): ...

    @hookimpl
    async def restore_principal(self, reference, kept):
        return Principal("x", kind="third") if reference == "third:x" else None

    @hookimpl
    async def choose_targets(self, exchange):
        return Decision("m", (Target("m", "openrouter"),), rule="theirs", reasons=("since it is theirs",))


async def test_third_parties_principals_and_decisions_are_explained_too():
    """Whoever restores principals can be asked for, whoever decides is told."""
    async with Gateway.test(plugins=["api_keys", Elsewhere]) as gw:
        data = await explained(gw, who="third:x")
        assert (data["principal"]["kind"], data["rule"], data["reasons"]) == ("third", "theirs", ["since it is theirs"])
