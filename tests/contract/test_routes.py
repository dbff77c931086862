"""No back door: every route of a gateway with everything on is walked, and models are reached by the pipeline alone."""

import asyncio
import re

import pytest

from gateway import Forbidden, Principal, Reply, Scopes, hookimpl
from gateway.dialects import DIALECTS
from gateway.exchange import Outcome
from gateway.kit.keys import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from gateway.kit.upstream import SPEECH, Error, Hang, ScriptedUpstream
from gateway.plugins import installed
from tests.contract.recorder import CALLER, Recorder, Refuser, callers, trace
from tests.contract.requests import request
from tests.contract.sequences import CHECKED, HEAD, SEQUENCES

PROXIED = pytest.mark.promise("P5.proxied")

PUBLIC = {
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/openapi.json"),
}

PLAIN_KEY = new_key()
# In the shipped order; what a plugin needs to start at all. An installed plugin that isn't here fails a test.
BUILT_IN = {
    "access_log": {},
    "metrics": {},
    "tracing": {"sample_ratio": 0},
    "api_keys": {"keys": [{"id": "plain", "hash": hash_key(PLAIN_KEY, PEPPER)}]},
    "jwt_auth": {"issuers": [{"issuer": "https://login.example.com", "audience": "x", "secret": "s" * 32}]},
    "routing": {},
    "rate_limit": {"limits": [{"name": "all", "requests": 1000}]},
    "budgets": {"budgets": [{"name": "all", "usd": 1000}], "unknown_price": "allow"},
    "usage": {},
    "jobs": {},
    "fallback": {},
}
EVERYTHING = [{"use": name, "config": config} for name, config in BUILT_IN.items()]
STORES = {"services": {"redis": "embedded"}}  # jobs need one


class AdminRoutes:
    """A third party's: an admin route, one for any caller, and one more door to the upstream."""

    def __init__(self, config, services): ...

    @hookimpl
    def register_routes(self, router):
        async def answer(exchange):
            return Reply(200, data={})

        router.add("POST", "/admin/things/{id}", answer, access="admin")
        router.add("DELETE", "/admin/things/{id:.+}", answer, access="admin")
        router.add("GET", "/mine", answer)
        router.add("POST", "/other/chat", None, dialect="chat/completions", endpoint="chat/completions")


def url(route):
    return re.sub(r"\{[^}]*\}", "x", route.path)


def assert_error_of(reply, dialect, code):
    """The reply is an error as this dialect's clients read it."""
    if dialect.anthropic:
        assert reply.data["type"] == "error"
        assert set(reply.data["error"]) == {"type", "message"}
        assert reply.headers["request-id"]
    else:
        assert set(reply.data["error"]) == {"message", "type", "param", "code"}
        assert reply.data["error"]["code"] == code


def test_all_built_in_plugins_are_walked():
    """A new plugin's routes can't be forgotten here."""
    ours = {name for name, point in installed().items() if point.value.startswith("gateway_plugins.")}
    assert ours == set(BUILT_IN)


@PROXIED
@pytest.mark.promise("P5.plugin_routes")
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer sk-xenios-nonsense"}, {"x-api-key": "nonsense"}])
async def test_every_route_but_the_public_ones_refuses_a_caller_without_a_key(headers):
    """Without a good key each route answers 401 in its own dialect, before anything of the request is looked at."""
    async with Gateway.test(plugins=[*EVERYTHING, AdminRoutes], settings=STORES) as gw:
        routes = gw.snapshot.routes.routes
        assert {(r.method, r.path) for r in routes if r.access == "public"} == PUBLIC
        assert {r.endpoint for r in routes if r.proxied} == set(DIALECTS)
        for route in routes:
            if (route.method, route.path) in PUBLIC:
                continue
            reply = await gw.request(route.method, url(route), headers={"Authorization": "", **headers})
            assert reply.status == 401, route
            assert_error_of(reply, route.dialect, "invalid_api_key")
        assert gw.upstream.seen == []


async def test_every_admin_route_refuses_a_caller_who_is_none():
    """A good key that isn't an administrator's gets 403 from each admin route; an administrator's gets in."""
    async with Gateway.test(plugins=[*EVERYTHING, AdminRoutes], settings=STORES) as gw:
        admin = [r for r in gw.snapshot.routes.routes if r.access == "admin"]
        assert len(admin) >= 2
        for route in admin:
            reply = await gw.request(route.method, url(route), headers={"Authorization": f"Bearer {PLAIN_KEY}"})
            assert reply.status == 403, route
            assert_error_of(reply, route.dialect, "insufficient_permissions")
        assert (await gw.get("/mine", headers={"Authorization": f"Bearer {PLAIN_KEY}"})).status == 200
        assert (await gw.post("/admin/things/1", {})).status == 200


async def test_without_authentication_nobody_is_an_administrator():
    """A gateway that lets everybody in lets nobody into its admin routes."""
    async with Gateway.test(plugins=[AdminRoutes]) as gw:
        for route in gw.snapshot.routes.routes:
            if route.access == "admin":
                assert (await gw.request(route.method, url(route))).status == 403
        assert (await gw.get("/mine")).status == 200


@PROXIED
async def test_every_proxied_route_passes_the_same_gates():
    """Each way to an upstream, a plugin's own included, goes through admission before a byte is sent."""

    class Closed(Recorder):
        def saw(self, hook, exchange):
            super().saw(hook, exchange)
            if hook == "check_request":
                raise Forbidden("Closed.")

    async with Gateway.test(plugins=[Recorder, AdminRoutes, Closed]) as gw:
        proxied = [r for r in gw.snapshot.routes.routes if r.proxied]
        assert len(proxied) == 2 * (len(DIALECTS) + 1) + 1
        for number, route in enumerate(proxied, 1):
            reply = await gw.request("POST", route.path, **request(route.dialect.endpoint))
            assert reply.status == 403, route
            assert_error_of(reply, route.dialect, "insufficient_permissions")
            exchange = (await gw.finished(number))[-1]
            assert trace(exchange)[: len(CHECKED)] == CHECKED
        assert gw.upstream.seen == []


async def test_every_method_and_spelling_that_is_not_a_route_reaches_nothing():
    """A path that is nearly a route is no way around its guard."""
    async with Gateway.test(plugins=EVERYTHING, settings=STORES) as gw:
        for method, path in [
            ("PUT", "/v1/chat/completions"),
            ("GET", "/v1/chat/completions"),
            ("POST", "/v1/chat/completions/"),
            ("POST", "//v1/chat/completions"),
            ("POST", "/V1/chat/completions"),
            ("POST", "/v1/chat/completions;x"),
            ("POST", "/v1/credits"),
        ]:
            reply = await gw.request(method, path)
            assert reply.status in {404, 405}, (method, path)
        assert gw.upstream.seen == []


# --- services.submit --------------------------------------------------------------------------------------------------


class Asks:
    """A route that asks a model, as the caller or as somebody else."""

    def __init__(self, config, services):
        self._services = services

    @hookimpl
    def register_routes(self, router):
        router.add("POST", "/ask/{endpoint:.+}", self._ask)
        router.add("POST", "/open/{endpoint:.+}", self._ask, access="public")

    async def _ask(self, exchange):
        scoped = exchange.request.header("x-models")
        principal = Principal("other", tenant="other", scopes=Scopes(models=(scoped,))) if scoped else None
        endpoint = exchange.request.path_params["endpoint"]
        reply = await self._services.submit(exchange, endpoint, exchange.body, principal=principal)
        assert isinstance(reply, Reply)
        return reply


CHAT = {"model": "test/model", "messages": [{"role": "user", "content": "Hello"}]}


@PROXIED
async def test_a_submitted_call_passes_the_whole_pipeline():
    """A plugin's own model call is an exchange of its own, with every hook but the key check, as the caller."""
    async with Gateway.test(plugins=[Recorder, Asks]) as gw:
        reply = await gw.post("/ask/chat/completions", CHAT, headers={"x-request-id": "mine", "cookie": "a=b"})
        assert (reply.status, reply.data["choices"][0]["message"]["content"]) == (200, "Hello there")
        child, parent = await gw.finished(2)
        usual = [hook for hook in SEQUENCES["whole", "success"] if hook != "authenticate"]
        assert trace(child) == usual
        assert trace(parent) == [*HEAD, "response_started", "request_finished"]
        assert child.principal is parent.principal is CALLER
        assert (child.endpoint, child.request_id) == ("chat/completions", parent.request_id)
        assert child.id != parent.id
        assert child.usage.input_tokens == 10
        assert parent.usage.input_tokens is None
        assert "cookie" not in (await gw.upstream.wait_seen(1)).headers


@PROXIED
async def test_a_submitted_call_is_refused_like_any_other():
    """What the gates refuse a client, they refuse a plugin that asks for it; the plugin gets the reply."""

    async with Gateway.test(plugins=[Recorder, Asks, Refuser]) as gw:
        reply = await gw.post("/ask/chat/completions", CHAT)
        assert (reply.status, reply.data["error"]["message"]) == (403, "Not today.")
        assert gw.upstream.seen == []
        child, parent = await gw.finished(2)
        assert (child.outcome, parent.outcome) == (Outcome.REFUSED, Outcome.OK)


@PROXIED
async def test_a_submitted_call_keeps_to_its_principal_s_scopes():
    """As another principal means: with that one's rights, not with the route's."""
    async with Gateway.test(plugins=[Recorder, Asks]) as gw:
        assert (await gw.post("/ask/chat/completions", CHAT, headers={"x-models": "test/*"})).status == 200
        assert (await gw.post("/ask/chat/completions", CHAT, headers={"x-models": "else/*"})).status == 404
        assert len(gw.upstream.seen) == 1
        assert (await gw.finished(1))[0].principal.id == "other"


async def test_a_public_route_can_not_submit_as_nobody():
    """A route without a caller has no rights to hand on: the call is answered with 401."""
    async with Gateway.test(plugins=["api_keys", Asks]) as gw:
        assert (await gw.post("/open/chat/completions", CHAT)).status == 401
        assert gw.upstream.seen == []


async def test_a_submitted_call_gets_errors_as_a_client_would():
    """The upstream's failure comes back as a reply in the dialect; Anthropic's endpoint has Anthropic's shape."""
    async with Gateway.test(plugins=[Recorder, Asks], upstream=ScriptedUpstream(default=Error(429))) as gw:
        reply = await gw.post("/ask/messages", {**CHAT, "max_tokens": 16})
        assert (reply.status, reply.data["error"]["type"]) == (429, "rate_limit_error")
        assert (await gw.post("/ask/chat/completions", {"model": "m"})).status == 400


@pytest.mark.parametrize("stream", [True, "true", 1])
async def test_a_submitted_call_can_not_stream(stream):
    """`submit` returns whole replies; asking for a stream is refused instead of swallowed."""
    async with Gateway.test(plugins=[Recorder, Asks]) as gw:
        reply = await gw.post("/ask/chat/completions", {**CHAT, "stream": stream})
        assert (reply.status, reply.data["error"]["param"]) == (400, "stream")
        assert gw.upstream.seen == []


async def test_a_submitted_call_can_have_bytes_for_an_answer():
    """Speech comes back as bytes."""
    async with Gateway.test(plugins=[Recorder, Asks]) as gw:
        reply = await gw.post("/ask/audio/speech", {"model": "m", "input": "Hello"})
        assert (reply.status, reply.body, reply.headers["content-type"]) == (200, SPEECH, "audio/mpeg")


async def test_only_proxied_endpoints_can_be_submitted():
    """A name that is no endpoint is the plugin's mistake: 500, and nothing is sent."""
    async with Gateway.test(plugins=[Recorder, Asks]) as gw:
        assert (await gw.post("/ask/admin/things", CHAT)).status == 500
        assert gw.upstream.seen == []


async def test_a_client_that_leaves_ends_what_was_submitted_for_it():
    """The upstream isn't kept busy for an answer that nobody waits for; both exchanges are finished."""
    async with Gateway.test(plugins=[Recorder, Asks], upstream=ScriptedUpstream(default=Hang())) as gw:
        sending = asyncio.get_running_loop().create_task(gw.post("/ask/chat/completions", CHAT))
        seen = await gw.upstream.wait_seen(1)
        sending.cancel()
        await gw.upstream.wait_closed(seen)
        for exchange in await gw.finished(2):
            assert exchange.outcome is Outcome.CLIENT_DISCONNECT
            assert len(callers(exchange, "request_finished")) == 1
        with pytest.raises(asyncio.CancelledError):
            await sending


async def test_a_deadline_that_passes_while_a_submitted_call_waits_ends_both():
    """The route's deadline holds for what it submits: the client is told 504 and both exchanges are finished."""
    async with Gateway.test(
        plugins=[Recorder, Asks],
        upstream=ScriptedUpstream(default=Hang()),
        settings={"server": {"request_timeout": 0.2}},
    ) as gw:
        assert (await gw.post("/ask/chat/completions", CHAT)).status == 504
        exchanges = await gw.finished(2)
        assert {e.endpoint for e in exchanges} == {"chat/completions", "/ask/{endpoint:.+}"}
        assert Outcome.TIMEOUT in {e.outcome for e in exchanges}
