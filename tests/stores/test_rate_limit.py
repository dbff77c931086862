"""The plugin rate_limit in a real gateway, counting in memory and on a real Valkey."""

import asyncio

import pytest
from pydantic import ValidationError

from gateway.kit.testing import Gateway
from gateway.kit.upstream import MODEL, Hang, Json, ScriptedUpstream, Stream, chat_completion, chat_events, chat_usage
from gateway.tasks import Tasks
from gateway_plugins import rate_limit
from tests.scraped import scraped
from tests.stores.servers import emptied


@pytest.fixture(params=["memory", "redis"])
async def services(request):
    if request.param == "memory":
        return {"redis": "memory"}
    return {"redis": await emptied(request.getfixturevalue("server"))}


def limited(services, *limits, upstream=None, **config):
    plugin = {"use": "rate_limit", "config": {"limits": list(limits), **config}}
    return Gateway.test(plugins=["api_keys", plugin], upstream=upstream, settings={"services": services})


async def test_a_request_over_the_limit_is_told_when_to_come_again(services):
    """The third of two a minute: 429 with OpenAI's code and headers, and how long to wait."""
    async with limited(services, {"name": "two", "requests": 2}) as gw:
        first = await gw.chat()
        assert first.status == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] in {"30s", "29.999s", "29.998s", "29.997s"}
        assert (await gw.chat()).status == 200
        third = await gw.chat()
        assert (third.status, third.data["error"]["code"]) == (429, "rate_limit_exceeded")
        assert third.data["error"]["type"] == "requests"
        assert "two" in third.data["error"]["message"]
        assert 28 <= float(third.headers["retry-after"]) <= 30
        assert 28_000 <= float(third.headers["retry-after-ms"]) <= 30_000
        assert third.headers["x-ratelimit-remaining-requests"] == "0"
        assert len(gw.upstream.seen) == 2


async def test_anthropics_clients_get_their_own_headers(services):
    """On /v1/messages the headers and the error are Anthropic's."""
    async with limited(services, {"name": "one", "requests": 1}) as gw:
        body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
        first = await gw.post("/v1/messages", body)
        assert first.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert first.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
        second = await gw.post("/v1/messages", body)
        assert (second.status, second.data["error"]["type"]) == (429, "rate_limit_error")


async def test_tokens_count_what_was_used_in_the_end(services):
    """An answer longer than was estimated is a debt: the next request waits although it is small."""
    long = Json(chat_completion(usage=chat_usage(100, 5000)))
    async with limited(services, {"name": "t", "tokens": 1000}, upstream=ScriptedUpstream(long)) as gw:
        assert (await gw.chat(max_tokens=10)).status == 200
        await gw.finished()
        # until the debt is settled small ones are admitted, which may use up what there is
        async with asyncio.timeout(5):
            while float((refused := await gw.chat(max_tokens=10)).headers.get("retry-after", 0)) <= 200:
                pass
        assert (refused.status, refused.data["error"]["type"]) == (429, "tokens")


async def test_tokens_that_were_not_used_come_back(services):
    """A request that allowed itself all tokens and used few leaves the rest to others."""
    short = Json(chat_completion(usage=chat_usage(5, 5)))
    async with limited(services, {"name": "t", "tokens": 1000}, upstream=ScriptedUpstream(default=short)) as gw:
        for _ in range(5):
            reply = await until(lambda: gw.chat(max_tokens=900), 200)
            assert int(reply.headers["x-ratelimit-remaining-tokens"]) < 100


async def test_a_request_larger_than_the_bucket_is_told_so(services):
    """Waiting would be in vain: no retry-after, and an SDK is told not to try again."""
    async with limited(services, {"name": "t", "tokens": 1000}) as gw:
        refused = await gw.chat(max_tokens=2000)
        assert refused.status == 429
        assert "retry-after" not in refused.headers
        assert refused.headers["x-should-retry"] == "false"
        assert "too large" in refused.data["error"]["message"]


async def until(ask, status):
    """Settlement comes within milliseconds of a reply, not with it."""
    async with asyncio.timeout(5):
        while (reply := await ask()).status != status:
            pass
    return reply


async def test_requests_at_the_same_time(services):
    """While two are under way a third is refused; one that ended, or whose client left, makes room at once."""
    upstream = ScriptedUpstream(Hang(), Hang())
    async with limited(services, {"name": "c", "concurrent": 2}, upstream=upstream) as gw:
        running = [Tasks().spawn(gw.chat(), "asked") for _ in range(2)]
        await gw.upstream.wait_seen(2)
        refused = await gw.chat()
        assert refused.status == 429
        assert "same time" in refused.data["error"]["message"]
        running[0].cancel()
        await gw.finished(2)  # the refused one and that which left
        for _ in range(20):
            assert (await gw.chat()).status == 200  # one after the other, each in the place of the last
        running[1].cancel()


async def test_streams_hold_their_place_to_the_end(services):
    """A stream counts until its last event, not until its first."""
    hanging = Stream(*chat_events("Hi")[:-1], end="hang")
    async with limited(services, {"name": "c", "concurrent": 1}, upstream=ScriptedUpstream(hanging)) as gw:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        async with gw.session.post(gw.url + "/v1/chat/completions", json=body, headers=gw.headers) as reply:
            await reply.content.readany()
            assert (await gw.chat()).status == 429
        await gw.finished(2)
        assert (await gw.chat()).status == 200


@pytest.mark.parametrize(
    ("by", "one", "other"),
    [
        ("user", {"user": "ann"}, {"user": "bob"}),
        ("model", {"model": "test/a"}, {"model": "test/b"}),
        (["key", "user"], {"user": "ann"}, {"user": "bob"}),
        ("user", {"user": "a" * 5000}, {"user": "a" * 4999 + "b"}),
        (["user", "model"], {"user": "x|y", "model": "z"}, {"user": "x", "model": "y|z"}),
    ],
)
async def test_each_has_a_bucket_of_its_own(services, by, one, other):
    """What is counted apart does not meet; what is the same does."""
    async with limited(services, {"name": "l", "by": by, "requests": 1}) as gw:
        assert (await gw.chat(**one)).status == 200
        assert (await gw.chat(**other)).status == 200
        assert (await gw.chat(**one)).status == 429
        assert (await gw.chat(**other)).status == 429


async def test_when_says_for_whom_it_is(services):
    """A limit with `when:` leaves other requests alone."""
    async with limited(services, {"name": "l", "requests": 1, "when": {"models": ["dear/*"]}}) as gw:
        assert [(await gw.chat(model="dear/x")).status for _ in range(2)] == [200, 429]
        assert [(await gw.chat(model="cheap/x")).status for _ in range(2)] == [200, 200]


async def test_a_refused_request_counts_nowhere(services):
    """What one limit refuses uses up none of the others."""
    async with limited(
        services,
        {"name": "wide", "by": "key", "requests": 3},
        {"name": "tight", "by": "model", "requests": 1},
    ) as gw:
        assert [(await gw.chat(model="test/a")).status for _ in range(5)] == [200, 429, 429, 429, 429]
        assert [(await gw.chat(model=f"test/{m}")).status for m in "bcd"] == [200, 200, 429]


async def test_two_gateways_count_together(server):
    """Two gateways on one Redis admit as many as one would."""
    await emptied(server)
    shared = {"redis": server.url}
    # the same caller at both: everybody counts in one bucket
    limit = {"name": "all", "by": [], "requests": 20, "per": "1h"}
    async with limited(shared, limit) as one, limited(shared, limit) as other:
        replies = await asyncio.gather(*((one, other)[i % 2].chat() for i in range(60)))
        assert sorted(reply.status for reply in replies) == [200] * 20 + [429] * 40


@pytest.mark.parametrize(("policy", "status"), [("allow", 200), ("deny", 503)])
async def test_while_redis_is_away_the_policy_holds(server, policy, status):
    """Frozen: the first request waits one short time-out, then none does; never a 401; back without a restart."""
    await emptied(server)
    limit = {"name": "all", "by": [], "requests": 3, "per": "1h"}
    async with limited({"redis": server.url}, limit, on_store_error=policy) as gw:
        loop = asyncio.get_running_loop()
        assert (await gw.chat()).status == 200
        server.freeze()
        try:
            begun = loop.time()
            replies = [await gw.chat() for _ in range(10)]
            took = loop.time() - begun
        finally:
            server.thaw()
        assert {reply.status for reply in replies} == {status}
        assert took < 3
        if status == 503:
            assert replies[0].data["error"]["code"] == "store_unavailable"
        async with asyncio.timeout(10):
            while (await gw.get("/health/ready")).data["status"] != "ok":
                pass
        refused = await until(gw.chat, 429)
        assert refused.data["error"]["code"] == "rate_limit_exceeded"


def test_mistakes_in_the_settings_are_named():
    """A limit that limits nothing, a burst without its limit and a name twice are mistakes."""
    for limits, what in (
        ([{"name": "x"}], "limits nothing"),
        ([{"name": "x", "requests": 1, "burst_tokens": 5}], "burst_tokens stands without tokens"),
        ([{"name": "x", "requests": 1}, {"name": "x", "tokens": 1}], "several limits are named x"),
    ):
        with pytest.raises(ValidationError, match=what):
            rate_limit.Config(limits=limits)


def test_durations_are_written_as_openai_writes_them():
    """As Go does, rounded up."""
    written = {
        0.0: "0ms",
        0.0121: "13ms",
        1.5: "1.5s",
        59.9999: "60s",
        360.0: "6m0s",
        3600.0: "1h0m0s",
        86401: "24h0m1s",
    }
    assert {seconds: rate_limit.go_duration(seconds) for seconds in written} == written


async def test_refusals_are_counted_by_limit_and_kind(services, monkeypatch):
    """`/metrics` says which limit refused, and what there was too much of; only what was told to a client counts."""
    secret = "ada-0123456789abcdef0123456789"
    monkeypatch.setenv("KEY_ADA", secret)
    ada = {"Authorization": f"Bearer {secret}"}
    keys = [{"id": "ada", "env": "KEY_ADA", "limits": {"requests": 1}}]
    limits = [
        {"name": "few", "by": "model", "requests": 2, "when": {"models": "few"}},
        {"name": "words", "requests": 100, "tokens": 50, "when": {"models": "long"}},
        {"name": "one", "concurrent": 1, "when": {"models": "slow"}},
    ]
    plugins = [{"use": "api_keys", "config": {"keys": keys}}, {"use": "rate_limit", "config": {"limits": limits}}]
    upstream = ScriptedUpstream()
    upstream.on("slow", Hang())
    named = {"services": services}

    async def refusals():
        found = await scraped(gw, "xenios_limit_refusals_total")
        return {(limit, kind): count for (kind, limit), count in found.items()}

    async with Gateway.test(plugins=[*plugins, "metrics"], upstream=upstream, settings=named) as gw:
        nothing = {("few", "requests"): 0, ("one", "concurrent"): 0, ("words", "requests"): 0, ("words", "tokens"): 0}
        assert await refusals() == nothing
        assert [(await gw.chat(model="few")).status for _ in range(4)] == [200, 200, 429, 429]
        assert (await gw.chat(model="long", max_tokens=51)).status == 429
        body = {"model": "any", "messages": [{"role": "user", "content": "Hi"}]}
        statuses = [(await gw.post("/v1/chat/completions", body, headers=ada)).status for _ in range(2)]
        assert statuses == [200, 429]
        waiting = Tasks().spawn(gw.chat(model="slow"), "asked")
        await upstream.wait_seen(4)
        assert (await gw.chat(model="slow")).status == 429
        waiting.cancel()
        asked = {"body": {**body, "model": "few"}}
        assert (await gw.post("/admin/explain", asked)).data["refused"]["status"] == 429
        expected = {
            ("few", "requests"): 2, ("words", "requests"): 0, ("words", "tokens"): 1, ("one", "concurrent"): 1,
            ("own", "requests"): 1,
        }  # fmt: skip
        assert await refusals() == expected
        plugins[1]["config"]["output_estimate"] = 999
        await gw.reload(plugins=[*plugins, "metrics"], settings=named)
        assert (await gw.chat(model="few")).status == 429
        assert await refusals() == {**expected, ("few", "requests"): 3}
