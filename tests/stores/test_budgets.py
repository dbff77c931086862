"""The plugin budgets in a real gateway, counting in memory and on a real Valkey."""

import asyncio
import gc
import time
from collections import Counter
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from gateway import Source
from gateway.kit.testing import Gateway
from gateway.kit.upstream import (
    MODEL,
    Cut,
    Error,
    Hang,
    Json,
    ScriptedUpstream,
    Slow,
    Stream,
    chat_completion,
    chat_events,
)
from gateway.limits import Plan, RuleSet
from gateway.tasks import Tasks
from gateway_plugins import budgets
from tests.scraped import closed, scraped
from tests.stores.prices import PRICES
from tests.stores.servers import emptied


@pytest.fixture(params=["memory", "redis"])
async def services(request):
    if request.param == "memory":
        return {"redis": "memory"}
    return {"redis": await emptied(request.getfixturevalue("server"))}


def limited(services, *budgets, upstream=None, prices=PRICES, fallback=False, **config):
    plugins = ["api_keys", {"use": "budgets", "config": {"budgets": list(budgets), **config}}]
    if fallback:
        plugins += [
            {"use": "routing", "config": {"aliases": {"alias": [MODEL, "test/other"]}}},
            {"use": "fallback", "config": {}},
        ]
    return Gateway.test(
        plugins=plugins, upstream=upstream, settings={"services": services, "catalogue": {"overrides": prices}}
    )


def costs(usd):
    return Json(chat_completion(cost=usd))


def cents(usd, **more):
    """A budget for everybody, for ever."""
    return {"name": "all", "by": [], "usd": usd, "per": "total", **more}


async def spent(gw):
    """(spent, reserved) of the first budget for all, in micro-USD, once nothing is under way."""
    [sums] = await gw.snapshot.services.ledger.budgets(["budgets:all:total:"])
    return sums


async def settled(gw, expected):
    async with asyncio.timeout(5):
        while await spent(gw) != expected:
            await asyncio.sleep(0.005)


async def test_what_is_spent_is_gone(services):
    """Ten requests of a tenth each, and the eleventh is refused for good: 429, `insufficient_quota`, no retry."""
    upstream = ScriptedUpstream(default=costs(0.0001))
    async with limited(services, cents("0.001"), upstream=upstream) as gw:
        for _ in range(10):
            assert (await gw.chat(model=MODEL, max_tokens=100)).status == 200
        refused = await gw.chat(model=MODEL, max_tokens=100)
        assert (refused.status, refused.data["error"]["code"]) == (429, "insufficient_quota")
        assert refused.data["error"]["type"] == "insufficient_quota"
        assert refused.headers["x-should-retry"] == "false"
        assert "retry-after" not in refused.headers
        await settled(gw, (1000, 0))
        assert len(upstream.seen) == 10


async def test_a_thousand_at_once_cannot_spend_more(services):
    """Of many requests at the same time exactly as many go out as the budget pays for."""
    upstream = ScriptedUpstream(default=costs(0.0001))
    async with limited(services, cents("0.001"), upstream=upstream) as gw:
        replies = await asyncio.gather(*(gw.chat(model=MODEL, max_tokens=100) for _ in range(300)))
        assert sorted({r.status for r in replies}) == [200, 429]
        assert len(upstream.seen) == sum(r.status == 200 for r in replies) == 10
        await settled(gw, (1000, 0))


async def test_what_is_only_reserved_may_be_asked_for_again(services):
    """While a request under way holds all of it: 429 with `retry-after`, for clients and jobs that wait."""
    upstream = ScriptedUpstream(Slow(costs(0.00002), 1.0), default=costs(0.00002))
    async with limited(services, cents("0.0001"), upstream=upstream) as gw:
        running = Tasks().spawn(gw.chat(model=MODEL, max_tokens=100), "running")
        async with asyncio.timeout(5):
            while not upstream.seen:
                await asyncio.sleep(0.005)
        refused = await gw.chat(model=MODEL, max_tokens=100)
        assert (refused.status, refused.data["error"]["code"]) == (429, "insufficient_quota")
        assert (refused.headers["retry-after"], refused.headers.get("x-should-retry")) == ("1", None)
        assert "reserved by requests under way" in refused.data["error"]["message"]
        assert (await running).status == 200


async def test_what_was_not_spent_comes_back(services):
    """Replies that cost a fifth of what was reserved: at least 45 of 50 are served, one after the other."""
    upstream = ScriptedUpstream(default=costs(0.00002))
    async with limited(services, cents("0.001"), upstream=upstream) as gw:
        served = 0
        while (await gw.chat(model=MODEL, max_tokens=100)).status == 200:
            served += 1
        assert 45 <= served <= 50


async def test_a_request_that_failed_costs_nothing(services):
    """An upstream's error gives the reservation back."""
    upstream = ScriptedUpstream(default=Error(503))
    async with limited(services, cents("0.001"), upstream=upstream) as gw:
        for _ in range(20):
            assert (await gw.chat(model=MODEL, max_tokens=900)).status == 503
        await settled(gw, (0, 0))


async def test_unknown_cost_is_charged_as_reserved(services):
    """A reply that broke off before its usage is charged what was reserved, and its record says so."""
    upstream = ScriptedUpstream(Cut(Json(chat_completion()), at=40))
    async with limited(services, cents("0.001"), upstream=upstream) as gw:
        assert (await gw.chat(model=MODEL, max_tokens=100)).status == 502
        await settled(gw, (100, 0))
        [exchange] = await gw.finished()
        assert (exchange.cost.micro_usd, exchange.cost.source) == (100, Source.RESERVED)


async def test_a_client_that_left_frees_what_it_reserved(services):
    """Leaving before an answer: the reservation ends with the request."""
    async with limited(services, cents("0.001"), upstream=ScriptedUpstream(Hang())) as gw:
        asked = Tasks().spawn(gw.chat(model=MODEL, max_tokens=100), "asked")
        await gw.upstream.wait_seen(1)
        assert await spent(gw) == (0, 100)
        asked.cancel()
        await settled(gw, (100, 0))  # it may have been billed


async def test_no_output_limit_is_clamped_to_what_is_left(services):
    """A request that sets no limit gets the model's, or what the budget pays for, and the reply says so."""
    upstream = ScriptedUpstream(default=costs(0.0003))
    async with limited(services, cents("0.001"), upstream=upstream) as gw:
        first = await gw.chat(model=MODEL)
        assert "x-xenios-clamped" not in first.headers
        assert "max_tokens" not in upstream.seen[0].json
        await settled(gw, (300, 0))
        await gw.chat(model=MODEL)
        await settled(gw, (600, 0))
        third = await gw.chat(model=MODEL)
        assert third.headers["x-xenios-clamped"] == "max_tokens=400"
        assert upstream.seen[2].json["max_tokens"] == 400
        await settled(gw, (900, 0))
        refused = await gw.chat(model=MODEL)  # less than least_tokens could be paid
        assert refused.status == 429


async def test_a_limit_that_is_set_is_one_that_every_model_takes(services):
    """A successor that could answer at more length than the first model raises no limit above what the first takes."""
    prices = {**PRICES, "test/other": {**PRICES[MODEL], "context_length": 100_000, "max_output": 50_000}}
    upstream = ScriptedUpstream(default=costs(0.0003))
    async with limited(services, cents("0.001"), upstream=upstream, prices=prices, fallback=True) as gw:
        reply = await gw.chat(model="alias")
        assert reply.headers["x-xenios-clamped"] == "max_tokens=500"
        assert upstream.seen[0].json["max_tokens"] == 500


async def test_no_output_limit_may_be_assumed(services):
    """With `assume: N` so much is reserved, and nothing is set."""
    upstream = ScriptedUpstream(Hang())
    async with limited(services, cents("0.001"), upstream=upstream, no_max_tokens={"assume": 40}) as gw:
        asked = Tasks().spawn(gw.chat(model=MODEL), "asked")
        seen = await gw.upstream.wait_seen(1)
        assert "max_tokens" not in seen.json
        assert await spent(gw) == (0, 40)
        asked.cancel()


async def test_the_dearest_target_counts(services):
    """With a fallback to a dearer model, the dearer one's price is reserved; `n` and the dearer tiers count too."""
    prices = {**PRICES, "test/other": {"input": 0, "output": 3, "context_length": 8000}}
    upstream = ScriptedUpstream(Hang())
    async with limited(services, cents("0.001"), upstream=upstream, prices=prices, fallback=True) as gw:
        asked = Tasks().spawn(gw.chat(model="alias", max_tokens=100, n=2), "asked")
        await gw.upstream.wait_seen(1)
        assert await spent(gw) == (0, 600)
        asked.cancel()


async def test_a_further_attempt_is_reserved_for_too(services):
    """After an attempt that may have been billed the next one needs room of its own."""
    prices = {**PRICES, "test/other": PRICES[MODEL]}
    broken = Cut(Json(chat_completion()), at=40)
    for usd, status, sums in (("0.00015", 429, (100, 0)), ("0.001", 200, (110, 0))):
        upstream = ScriptedUpstream(broken, costs(0.00001))
        budget = cents(usd) | {"name": f"b{status}"}
        async with limited(services, budget, upstream=upstream, prices=prices, fallback=True) as gw:
            assert (await gw.chat(model="alias", max_tokens=100)).status == status
            async with asyncio.timeout(5):
                while await gw.snapshot.services.ledger.budgets([f"budgets:b{status}:total:"]) != [sums]:
                    await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "body",
    [
        {"model": "nobody/knows"},
        {"model": MODEL, "models": ["nobody/knows"]},
        {"model": MODEL, "fallbacks": [{"model": "nobody/knows"}]},
        {"model": MODEL, "plugins": [{"id": "web"}]},
        {"model": MODEL, "web_search_options": {"search_context_size": "high"}},
        {"model": MODEL, "service_tier": "priority"},
        {"model": MODEL, "tools": [{"type": "openrouter:web_search"}]},
        {"model": MODEL + ":online"},
        {"model": "openrouter/auto"},
    ],
)
async def test_nothing_without_a_price_slips_through(body):
    """What could cost more than the list says is refused, with the reason, unless the operator allows it."""
    may = {"upstream": {"client_may": ["models", "fallbacks", "plugins", "service_tier", "auto_routers"]}}
    for policy, status in (("deny", 403), ("allow", 200)):
        plugin = {"use": "budgets", "config": {"budgets": [cents(1)], "unknown_price": policy}}
        settings = {"catalogue": {"overrides": PRICES}, **may}
        async with Gateway.test(plugins=["api_keys", plugin], settings=settings) as gw:
            reply = await gw.chat(**{"max_tokens": 5, **body})
            assert reply.status == status, reply.body
            if status == 403:
                assert reply.data["error"]["code"] == "unknown_price"
                assert not gw.upstream.seen


async def test_streams_are_settled_at_their_end(services):
    """A stream's cost is known with its last chunk; until then it is reserved."""
    events = chat_events("Hi", cost=0.00007)
    async with limited(services, cents("0.001"), upstream=ScriptedUpstream(Stream(*events))) as gw:
        reply = await gw.chat(model=MODEL, max_tokens=100, stream=True)
        assert reply.events[-1] == b"data: [DONE]\n\n"
        await settled(gw, (70, 0))


async def test_near_the_limit_replies_say_so(services):
    """From `warn_at` on replies carry a warning; a soft budget refuses nothing."""
    upstream = ScriptedUpstream(default=costs(0.0009))
    async with limited(services, cents("0.001", hard=False), upstream=upstream) as gw:
        assert "x-xenios-budget-warning" not in (await gw.chat(model=MODEL, max_tokens=900)).headers
        await settled(gw, (900, 0))
        warned = await gw.chat(model=MODEL, max_tokens=900)
        assert warned.status == 200
        assert warned.headers["x-xenios-budget-warning"].startswith("all; spent 0.000900 of 0.001000 USD")
        await settled(gw, (1800, 0))
        assert (await gw.chat(model=MODEL, max_tokens=900)).status == 200


async def test_several_budgets_hold_together(services):
    """What the narrowest of a request's budgets refuses takes nothing from the others."""
    tight = {"name": "user", "by": "user", "usd": "0.0001", "per": "day"}
    upstream = ScriptedUpstream(default=costs(0.0001))
    async with limited(services, cents("0.001"), tight, upstream=upstream) as gw:
        statuses = [(await gw.chat(model=MODEL, max_tokens=100, user=u)).status for u in "aaabbc"]
        assert statuses == [200, 429, 429, 200, 429, 200]
        await settled(gw, (300, 0))


def test_periods_follow_the_time_zone():
    """Months begin at midnight where the budget says; a day of 25 hours has 25."""
    berlin = ZoneInfo("Europe/Berlin")
    name, end = budgets._period(datetime(2026, 10, 31, 23, 30, tzinfo=UTC).astimezone(berlin), "month")
    assert (name, end) == ("2026-11", datetime(2026, 11, 30, 23, tzinfo=UTC).timestamp())
    name, end = budgets._period(datetime(2026, 10, 24, 22, 0, tzinfo=UTC).astimezone(berlin), "day")
    assert (name, end) == ("2026-10-25", datetime(2026, 10, 25, 23, tzinfo=UTC).timestamp())
    name, end = budgets._period(datetime(2026, 11, 22, 12, 0, tzinfo=UTC), "week")
    assert (name, end) == ("week-2026-11-16", datetime(2026, 11, 23, tzinfo=UTC).timestamp())
    name, end = budgets._period(datetime(2026, 12, 31, 23, 59, tzinfo=UTC), "hour")
    assert (name, end) == ("2026-12-31T23Z", datetime(2027, 1, 1, tzinfo=UTC).timestamp())


@pytest.mark.parametrize("by", ["key", "user"])
async def test_an_hour_that_is_over_leaves_no_rules_behind(monkeypatch, by):
    """A budget begins anew each hour, for each caller or end user: a gateway that runs for months holds those of now."""

    class Clock:
        now = time.time()

        def time(self):
            return self.now

    def held():
        gc.collect()
        return Counter(type(each) for each in gc.get_objects() if type(each) in {Plan, RuleSet})

    async def hour():
        clock.now += 3600
        for user in ("a", "b", "c"):
            assert (await gw.chat(user=user)).status == 200
        gw._recorder.exchanges.clear()

    clock = Clock()
    monkeypatch.setattr(budgets, "time", clock)
    each = {"name": "each", "by": [by], "usd": 5, "per": "hour"}
    plugins = [
        "api_keys",
        {"use": "rate_limit", "config": {"limits": [{"name": "each", "requests": 1000}]}},
        {"use": "budgets", "config": {"unknown_price": "allow", "budgets": [each]}},
    ]
    async with Gateway.test(plugins=plugins) as gw:
        await hour()
        first = held()
        for _ in range(5):
            await hour()
        assert held() == first


def test_mistakes_in_the_settings_are_named():
    """An unknown time zone, a name twice and more digits than a micro-USD are mistakes."""
    for changes, what in (
        ({"time_zone": "Mars/Olympus"}, "no time zone"),
        ({"usd": "0.0000001"}, "decimal places"),
        ({"usd": 0}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=what):
            budgets.Config(budgets=[{"name": "x", "usd": 1, **changes}])
    with pytest.raises(ValidationError, match="several budgets are named x"):
        budgets.Config(budgets=[{"name": "x", "usd": 1}, {"name": "x", "usd": 2}])


# --- metrics ----------------------------------------------------------------------------------------------------------


async def test_metrics_tell_how_full_budgets_are_and_whom_they_refused(services):
    """Of a budget the fullest subject's share; a refusal counts for the budget that the client is told of. A dry run
    counts for none, and a reload's new instance goes on.
    """
    plugin = {
        "use": "budgets",
        "config": {
            "budgets": [
                {"name": "user", "by": "user", "usd": "0.001", "per": "day"},
                cents("0.01"),
                {"name": "soft", "by": [], "usd": "0.0001", "per": "total", "hard": False},
                {"name": "unused", "by": [], "usd": 1, "when": {"models": "none/such"}},
            ]
        },
    }
    plugins = ["api_keys", plugin, "metrics"]
    settings = {"services": services, "catalogue": {"overrides": PRICES}}
    upstream = ScriptedUpstream(default=costs(0.0005))

    async def told():
        ratios = await scraped(gw, "xenios_budget_used_ratio")
        refusals = await scraped(gw, "xenios_budget_refusals_total")
        return {name: round(share, 6) for (name,), share in ratios.items()}, {
            n: count for (n,), count in refusals.items()
        }

    async with Gateway.test(plugins=plugins, upstream=upstream, settings=settings) as gw:
        none = dict.fromkeys(("user", "all", "soft", "unused"), 0)
        assert await told() == ({}, none)
        for number, user in enumerate("aab", 1):
            assert (await gw.chat(model=MODEL, max_tokens=100, user=user)).status == 200
            await settled(gw, (500 * number, 0))
        # what was spent when the last of each user's requests came
        assert await told() == ({"user": 0.5, "all": 0.1, "soft": 10}, none)
        refused = await gw.chat(model=MODEL, max_tokens=100, user="a")
        assert (refused.status, refused.data["error"]["code"]) == (429, "insufficient_quota")
        body = {"model": MODEL, "max_tokens": 100, "user": "a", "messages": [{"role": "user", "content": "Hi"}]}
        assert (await gw.post("/admin/explain", {"body": body})).data["refused"]["status"] == 429
        assert await told() == ({"user": 1, "all": 0.15, "soft": 15}, {**none, "user": 1})

        old = gw.snapshot
        plugin["config"]["budgets"][0]["warn_at"] = 0.7
        await gw.reload(plugins=plugins, settings=settings)
        await closed(gw, old)
        assert (await gw.chat(model=MODEL, max_tokens=100, user="a")).status == 429
        assert await told() == ({"user": 1, "all": 0.15, "soft": 15}, {**none, "user": 2})


def test_what_requests_saw_is_told_for_five_minutes(monkeypatch):
    """A budget that nobody falls under any more, or whose month is over, is told no longer; and it takes no memory."""
    now = [0.0]
    monkeypatch.setattr(budgets.time, "monotonic", lambda: now[0])
    seen = budgets._Seen(None)
    assert seen.fullest() is None
    for minute in range(100):
        now[0] = minute * 60.0
        seen.note(0.9 if minute == 90 else 0.5, now[0])
        seen.note(0.1, now[0])
        assert seen.fullest() == (0.9 if 90 <= minute < 95 else 0.5)
    assert len(seen._fullest) <= 5
    now[0] += 299
    assert seen.fullest() == 0.5
    now[0] += 60
    assert seen.fullest() is None
