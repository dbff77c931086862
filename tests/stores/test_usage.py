"""The plugin usage in a real gateway: in memory with SQLite, and on a real Valkey with a real PostgreSQL."""

import asyncio
import csv
import io
import json
import time
from datetime import UTC, datetime

import pytest
import structlog
from pydantic import ValidationError

from gateway import StoreUnavailable
from gateway.kit import ledger
from gateway.kit import ledger_lua as lua
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
    generation,
)
from gateway.tasks import Tasks
from gateway_plugins import usage
from gateway_plugins.usage import rows as usage_rows
from gateway_plugins.usage import store
from tests.integration.process import xenios
from tests.scraped import closed, scraped
from tests.stores.postgres import postgres_server
from tests.stores.prices import PRICES
from tests.stores.servers import emptied, valkey_server


@pytest.fixture(params=["memory, sqlite", "redis, postgresql"])
async def services(request, tmp_path):
    if request.param == "memory, sqlite":
        return {"redis": "memory", "database": {"url": f"sqlite:///{tmp_path}/usage.db", "migrate_on_start": True}}
    url = await request.getfixturevalue("postgres").new()
    return {
        "redis": await emptied(request.getfixturevalue("server")),
        "database": {"url": url, "migrate_on_start": True},
    }


def gateway(services, *more, upstream=None, keys=(), config=None, **settings):
    return Gateway.test(upstream=upstream, **as_gateway(services, *more, keys=keys, config=config, **settings))


def as_gateway(services, *more, keys=(), config=None, **settings):
    plugins = [
        {"use": "api_keys", "config": {"keys": list(keys)}},
        *more,
        {"use": "usage", "config": config or {"keep": "3650d"}},  # the tests' old rows stay
    ]
    return {
        "plugins": plugins,
        "settings": {"services": services, "catalogue": {"overrides": PRICES}, **settings},
    }


def key_of(name, monkeypatch, **more):
    """(headers, entry in the YAML) of a key of its own."""
    secret = f"{name}-0123456789abcdef0123456789"
    monkeypatch.setenv(f"KEY_{name.upper()}", secret)
    return {"Authorization": f"Bearer {secret}"}, {"id": name, "env": f"KEY_{name.upper()}", **more}


async def stored(gw, count=1, path="/admin/usage"):
    """The newest `count` rows, newest first, once they are in the database."""
    async with asyncio.timeout(10):
        while True:
            data = (await gw.get(path)).data["data"]
            if len(data) >= count:
                return data
            await asyncio.sleep(0.02)


async def spent(gw):
    [sums] = await gw.snapshot.services.ledger.budgets(["budgets:all:total:"])
    return sums


BUDGET = {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": "0.01", "per": "total"}]}}


def cut_stream():
    """A stream that stands still after its first word."""
    steps = chat_events("Hello", finish=None, done=False, usage=False, pieces=1, id="gen-77")
    return Stream(*steps, end="hang", headers={"X-Generation-Id": "gen-77"})


# --- what a row says -------------------------------------------------------------------------------------------------


@pytest.mark.promise("P8.row")
async def test_a_row_says_who_asked_what_answered_and_what_it_cost(services, monkeypatch):
    """Key, tenant, team, task, model, attempts and why, tokens, cost, times and outcome of a request that fell back."""
    headers, entry = key_of("app", monkeypatch, tenant="acme", team="research")
    routing = {"use": "routing", "config": {"tasks": {"sum": {"use": ["test/bad", MODEL]}}}}
    upstream = ScriptedUpstream(Error(503), Json(chat_completion(cost=0.00007)))
    async with gateway(services, routing, "fallback", upstream=upstream, keys=[entry]) as gw:
        body = {"model": "task/sum", "user": "ann", "messages": [{"role": "user", "content": "Hi"}]}
        reply = await gw.post("/v1/chat/completions", body, headers=headers)
        assert reply.status == 200
        [row] = await stored(gw)
        assert row["id"] == row["request_id"] == reply.headers["x-request-id"]
        said = {name: row[name] for name in ("tenant", "key", "team", "user", "endpoint", "task", "model", "upstream")}
        assert said == {
            "tenant": "acme", "key": "key:app", "team": "research", "user": "ann", "endpoint": "chat/completions",
            "task": "sum", "model": MODEL, "upstream": "openrouter",
        }  # fmt: skip
        assert (row["attempts"], row["outcome"], row["status"], row["error_code"]) == (2, "ok", 200, None)
        first, second = row["tries"]
        assert (first["model"], first["cause"], first["status"]) == ("test/bad", "server_error", 503)
        assert (second["model"], second["cause"], second["cost_usd"]) == (MODEL, None, 0.00007)
        assert (row["cost_usd"], row["cost_source"], row["usage_source"]) == (0.00007, "upstream", "upstream")
        assert row["input_tokens"] > 0 < row["output_tokens"]
        assert row["cache_write_tokens"] is None  # unknown is not 0
        assert 0 <= row["first_content_ms"] <= row["duration_ms"]
        assert abs(datetime.fromisoformat(row["at"]).timestamp() - time.time()) < 60


@pytest.mark.promise("P8.row")
async def test_a_row_says_which_target_was_passed_over(services):
    """A request that skipped a target with an open circuit says so, though its only attempt was good."""
    routing = {"use": "routing", "config": {"aliases": {"careful": ["test/bad", MODEL]}}}
    breaker = {"use": "fallback", "config": {"breaker": {"requests": 1, "open_for": "60s"}}}
    upstream = ScriptedUpstream()
    upstream.on("test/bad", Error(503))
    async with gateway(services, routing, breaker, upstream=upstream) as gw:
        await gw.chat(model="careful")
        await gw.chat(model="careful")
        last = max(await stored(gw, 2), key=lambda row: row["at"])
    assert (last["attempts"], last["model"], last["outcome"]) == (1, MODEL, "ok")
    assert [(t["model"], t["cause"], t["ms"] is None) for t in last["tries"]] == [
        ("test/bad", "circuit_open", True), (MODEL, None, False),
    ]  # fmt: skip
    assert last["cost_usd"] == last["tries"][1]["cost_usd"]


async def test_refusals_are_rows_but_for_callers_whom_nobody_knows(services):
    """A request over its limit leaves a row `refused`; one without a good key leaves nothing, however many there are."""
    limit = {"use": "rate_limit", "config": {"limits": [{"name": "one", "requests": 1, "per": "1h"}]}}
    async with gateway(services, limit) as gw:
        for _ in range(5):
            bad = await gw.post("/v1/chat/completions", {}, headers={"Authorization": "Bearer sk-xenios-no"})
            assert bad.status == 401
        assert (await gw.chat(model=MODEL)).status == 200
        assert (await gw.chat(model=MODEL)).status == 429
        refused, served = await stored(gw, 2)
        assert (served["outcome"], served["attempts"]) == ("ok", 1)
        assert (refused["outcome"], refused["status"], refused["attempts"]) == ("refused", 429, 0)
        assert refused["error_code"] == "rate_limit_exceeded"
        assert (refused["cost_usd"], refused["model"]) == (None, None)
        total = (await gw.get("/admin/usage?group_by=")).data["total"]
        assert (total["requests"], total["cost_unknown"]) == (2, 0)


@pytest.mark.promise("P2.row")
@pytest.mark.parametrize("when", ["before the first token", "mid-stream", "whole"])
async def test_a_client_that_leaves_leaves_one_row(services, when):
    """One row `client_disconnect`, with the tokens that were seen."""
    script = cut_stream() if when == "mid-stream" else Hang()
    async with gateway(services, upstream=ScriptedUpstream(script)) as gw:
        body = {"model": MODEL, "max_tokens": 50, "stream": when != "whole"}
        body["messages"] = [{"role": "user", "content": "Hi"}]

        async def ask():
            async with gw.session.post(gw.url + "/v1/chat/completions", json=body, headers=gw.headers) as reply:
                async for _ in reply.content:
                    seen.set()

        seen = asyncio.Event()
        asked = Tasks().spawn(ask(), "asked")
        await gw.upstream.wait_seen(1)
        if when == "mid-stream":
            await seen.wait()
        asked.cancel()
        [row] = await stored(gw)
        assert (row["outcome"], row["attempts"], row["model"]) == (
            "client_disconnect", 1, MODEL if when == "mid-stream" else None,
        )  # fmt: skip
        assert row["tries"][0]["cause"] == "client_disconnect"
        if when == "mid-stream":
            assert row["output_tokens"] >= 1
            assert row["usage_source"] == "estimate"
        else:
            assert (row["output_tokens"], row["cost_usd"]) == (None, None)


@pytest.mark.promise("P2.leases")
@pytest.mark.parametrize("when", ["before the first token", "mid-stream", "whole"])
async def test_a_client_that_leaves_frees_what_it_held(services, when):
    """Its place among the concurrent requests and its reservation are free again at once."""
    one = {"use": "rate_limit", "config": {"limits": [{"name": "one", "concurrent": 1}]}}
    script = cut_stream() if when == "mid-stream" else Hang()
    async with gateway(services, one, BUDGET, upstream=ScriptedUpstream(script)) as gw:
        asked = Tasks().spawn(gw.chat(model=MODEL, max_tokens=50, stream=when != "whole"), "asked")
        await gw.upstream.wait_seen(1)
        assert (await gw.chat(model=MODEL, max_tokens=50)).status == 429
        assert (await spent(gw))[1] == 50
        asked.cancel()
        async with asyncio.timeout(2):
            while (await spent(gw))[1] or (await gw.chat(model=MODEL, max_tokens=50)).status == 429:
                await asyncio.sleep(0.01)


@pytest.mark.promise("P3.row")
@pytest.mark.parametrize("stream", [True, False])
async def test_a_truncated_answer_is_told_as_one(services, stream):
    """An upstream that ended too early: the row says `upstream_truncated`."""
    script = Stream(*chat_events("one two three")[:3]) if stream else Cut(Json(chat_completion()), at=40)
    async with gateway(services, upstream=ScriptedUpstream(script)) as gw:
        await gw.chat(model=MODEL, stream=stream)
        [row] = await stored(gw)
        assert (row["outcome"], row["tries"][0]["cause"]) == ("upstream_truncated", "truncated")


@pytest.mark.parametrize("known", [True, False])
async def test_budgets_and_rows_add_up(services, known):
    """What was spent is the sum of the rows, also where nobody told the cost: then it is what was reserved."""
    script = Json(chat_completion(cost=0.0001)) if known else Cut(Json(chat_completion()), at=40)
    async with gateway(services, BUDGET, upstream=ScriptedUpstream(default=script)) as gw:
        for _ in range(5):
            await gw.chat(model=MODEL, max_tokens=300)
        rows = await stored(gw, 5)
        assert {row["cost_source"] for row in rows} == {"upstream" if known else "reserved"}
        assert await spent(gw) == (round(sum(row["cost_usd"] for row in rows) * 1e6), 0)
        assert await spent(gw) == (500 if known else 1500, 0)


async def test_the_true_cost_puts_budget_and_row_right(services):
    """A stream that its client left is charged as reserved until OpenRouter says what it cost; sum and row follow."""
    truth = generation("gen-77", cost=0.000012, native_tokens_prompt=5, native_tokens_completion=7)
    async with gateway(services, BUDGET, upstream=ScriptedUpstream(cut_stream(), default=Error(404))) as gw:
        gw.worker.corrections._delays = (0.05,) * 200
        body = {"model": MODEL, "max_tokens": 50, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        async with gw.session.post(gw.url + "/v1/chat/completions", json=body, headers=gw.headers) as reply:
            await reply.content.readuntil(b"Hello")
        [row] = await stored(gw)
        assert (row["cost_usd"], row["cost_source"]) == (0.00005, "reserved")
        assert await spent(gw) == (50, 0)
        gw.upstream.script(Json(truth))
        async with asyncio.timeout(10):
            while (row := (await stored(gw))[0])["corrected_at"] is None:
                await asyncio.sleep(0.02)
        assert (row["cost_usd"], row["cost_source"]) == (0.000012, "upstream")
        assert (row["input_tokens"], row["output_tokens"], row["usage_source"]) == (5, 7, "upstream")
        assert await spent(gw) == (12, 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("price", ["deny", "allow"])
async def test_what_a_failed_attempt_cost_reaches_budget_and_row_alike(services, stream, price):
    """A 200 that was an error, and then another model's answer: once the first's cost is told, both have it."""
    error = {"error": {"code": 502, "message": "Provider returned error"}}
    headers = {"X-Generation-Id": "gen-77"}
    failed = Stream(error, headers=headers) if stream else Json(error, headers=headers)
    answer = Stream(*chat_events(cost=0.0001)) if stream else Json(chat_completion(cost=0.0001))
    routing = {"use": "routing", "config": {"aliases": {"two": ["test/bad", MODEL]}}}
    budget = {"use": "budgets", "config": {**BUDGET["config"], "unknown_price": price}}
    prices = PRICES if price == "allow" else {**PRICES, "test/bad": PRICES[MODEL]}
    upstream = ScriptedUpstream(failed, answer, default=Error(404))
    catalogue = {"catalogue": {"overrides": prices}}
    async with gateway(services, routing, budget, "fallback", upstream=upstream, **catalogue) as gw:
        gw.worker.corrections._delays = (0.05,) * 200
        assert (await gw.chat(model="two", max_tokens=300, stream=stream)).status == 200
        [row] = await stored(gw)
        assert (row["attempts"], row["cost_usd"]) == (2, 0.0001)
        gw.upstream.script(Json(generation("gen-77", cost=0.00005)))
        async with asyncio.timeout(10):
            while (row := (await stored(gw))[0])["corrected_at"] is None:
                await asyncio.sleep(0.02)
        assert row["cost_usd"] == 0.00015
        assert await spent(gw) == (150, 0)


async def test_many_streams_that_were_left_are_put_right_soon(services):
    """Look-ups of the true cost wait for each other no more than an upstream would mind."""
    steps = chat_events("Hello", finish=None, done=False, usage=False, pieces=1)

    def answer(seen):
        if seen.endpoint == "generation":
            return Slow(Json(generation("gen", cost=0.000012)), 0.2)
        return Stream(*steps, end="hang", headers={"X-Generation-Id": f"gen-{seen.connection}"})

    async with gateway(services, BUDGET, upstream=ScriptedUpstream(default=answer)) as gw:
        gw.worker.corrections._delays = (0.05,)
        body = {"model": MODEL, "max_tokens": 50, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}

        async def leave():
            async with gw.session.post(gw.url + "/v1/chat/completions", json=body, headers=gw.headers) as reply:
                await reply.content.readuntil(b"Hello")

        await asyncio.gather(*(leave() for _ in range(60)))
        async with asyncio.timeout(5):
            while await spent(gw) != (60 * 12, 0):
                await asyncio.sleep(0.02)


async def test_an_orderly_end_asks_for_true_costs_once_more(services):
    """A gateway that is stopped does not leave left streams charged at their most."""
    async with gateway(services, BUDGET, upstream=ScriptedUpstream(cut_stream(), default=Json(generation("gen-77", cost=0.000012)))) as gw:  # fmt: skip
        gw.worker.corrections._delays = (600.0,)
        body = {"model": MODEL, "max_tokens": 50, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        async with gw.session.post(gw.url + "/v1/chat/completions", json=body, headers=gw.headers) as reply:
            await reply.content.readuntil(b"Hello")
        await gw.finished()
    async with gateway(services, BUDGET) as gw:
        [row] = (await gw.get("/admin/usage")).data["data"]
        assert (row["cost_usd"], row["cost_source"]) == (0.000012, "upstream")


async def test_what_an_orderly_end_could_not_learn_is_counted(tmp_path, monkeypatch):
    """Streams whose true cost nobody tells in time stay charged at their most, and one line says how many they are."""
    monkeypatch.setattr("gateway.corrections.LAST_SECONDS", 0.2)
    services = {"database": {"url": f"sqlite:///{tmp_path}/usage.db"}}
    with structlog.testing.capture_logs() as logs:
        async with gateway(services, BUDGET, upstream=ScriptedUpstream(cut_stream(), cut_stream(), Hang(), default=Error(404))) as gw:  # fmt: skip
            gw.worker.corrections._delays = (600.0,)
            body = {"model": MODEL, "max_tokens": 50, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
            for _ in range(2):
                async with gw.session.post(gw.url + "/v1/chat/completions", json=body, headers=gw.headers) as reply:
                    await reply.content.readuntil(b"Hello")
            await gw.finished(2)
    assert [entry["requests"] for entry in logs if entry["event"] == "corrections_left"] == [2]


# --- stored once, whatever happens -----------------------------------------------------------------------------------


def pending(number, op, found, abandoned=None):
    from gateway.kit import PendingRow

    return PendingRow(str(number), op, usage_rows.encode(found), abandoned)


def a_request(name, **changes):
    """A row as a worker writes it."""
    fields = dict.fromkeys(usage_rows.Request.__struct_fields__)
    fields |= {
        "id": name, "request_id": name, "at": int(time.time() * 1000), "tenant": "acme", "principal": "key:app",
        "endpoint": "chat/completions", "stream": False, "attempts": 1, "usage_source": "upstream", "cost_micro_usd": 10,
        "cost_source": "upstream", "outcome": "ok", "status": 200, "model_served": MODEL, "input_tokens": 3,
    }  # fmt: skip
    return usage_rows.Request(**{**fields, **changes})


async def test_a_row_that_comes_twice_is_there_once(services):
    """Moved again after a crash it changes nothing; a real row takes the place of an abandoned one, never the reverse."""
    async with gateway(services) as gw:
        database = gw.snapshot.services.database
        whole = pending(1, "a", a_request("a"))
        gone = pending(2, "b", a_request("b", outcome="ok", cost_micro_usd=1), abandoned=60)
        late = pending(3, "b", a_request("b", cost_micro_usd=7))
        assert await store.store(database, [whole, whole, gone]) == []
        by_id = {row["id"]: row for row in await stored(gw, 2)}
        assert (by_id["b"]["outcome"], by_id["b"]["cost_usd"], by_id["b"]["cost_source"]) == (
            "abandoned", 0.00006, "reserved",
        )  # fmt: skip
        await store.store(database, [late])
        await store.store(database, [gone, whole])
        by_id = {row["id"]: row for row in await stored(gw, 2)}
        assert len(by_id) == 2
        assert (by_id["b"]["outcome"], by_id["b"]["cost_usd"]) == ("ok", 0.000007)


async def test_a_row_that_can_not_be_stored_holds_up_no_other(services):
    """One that the database refuses is reported and left out, the others are stored."""
    async with gateway(services) as gw:
        rows = [
            pending(1, "good", a_request("good")),
            pending(2, "bad", a_request("bad", input_tokens=2**70)),
            pending(3, "worse", a_request("worse"))._replace(payload=b"[no JSON"),
            pending(4, "fine", a_request("fine")),
        ]
        bad = await store.store(gw.snapshot.services.database, rows)
        assert sorted(op for op, _ in bad) == ["bad", "worse"]
        assert {row["id"] for row in await stored(gw, 2)} == {"good", "fine"}


async def test_rows_of_a_newer_gateway_are_understood():
    """During an update two versions share a Redis: what the newer one adds at a row's end is left out."""
    row = a_request("a")
    newer = json.loads(usage_rows.encode(row))
    assert usage_rows.decode(json.dumps([*newer, "something new"]).encode()) == row


async def test_rows_wait_while_the_database_is_away(tmp_path):
    """PostgreSQL killed under load: requests go on, and each row is stored once when it is back."""
    with valkey_server() as valkey, postgres_server() as server:
        database = {"url": await server.new(), "migrate_on_start": True}
        async with gateway({"redis": valkey.url, "database": database}) as gw:
            ids = []
            for number in range(60):
                if number == 20:
                    server.kill()
                if number == 40:
                    server.start()
                reply = await gw.chat(model=MODEL)
                assert reply.status == 200
                ids.append(reply.headers["x-request-id"])

            async def found():
                reply = await gw.get("/admin/usage?limit=1000")
                return [row["id"] for row in reply.data["data"]] if reply.status == 200 else []

            async with asyncio.timeout(15):
                while sorted(rows := await found()) != sorted(ids):
                    assert len(rows) <= len(ids)
                    await asyncio.sleep(0.05)


async def test_what_is_not_stored_yet_is_stored_when_the_gateway_stops(services):
    """The rows of the last moment are there after an orderly end."""
    async with gateway(services) as gw:
        for _ in range(5):
            await gw.chat(model=MODEL)
    async with gateway(services) as gw:
        assert len((await gw.get("/admin/usage")).data["data"]) == 5


# --- who may see what ------------------------------------------------------------------------------------------------


@pytest.mark.promise("P14.usage")
async def test_a_tenant_sees_its_own_alone(services, monkeypatch):
    """Neither lists, sums, filters nor ids show one tenant what another used; /admin/usage is for administrators."""
    ann, ann_entry = key_of("ann", monkeypatch, tenant="a")
    bob, bob_entry = key_of("bob", monkeypatch, tenant="b")
    async with gateway(services, keys=[ann_entry, bob_entry]) as gw:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
        asked = [await gw.post("/v1/chat/completions", body, headers=who) for who in (ann, ann, bob)]
        of_ann, of_bob = asked[0].headers["x-request-id"], asked[2].headers["x-request-id"]
        await stored(gw, 3)

        async def get(who, path):
            return await gw.get(path, headers=who)

        assert {row["key"] for row in (await get(ann, "/v1/usage")).data["data"]} == {"key:ann"}
        assert [row["id"] for row in (await get(bob, "/v1/usage")).data["data"]] == [of_bob]
        sums = (await get(bob, "/v1/usage?group_by=tenant,key")).data
        assert [(g["tenant"], g["requests"]) for g in sums["data"]] == [("b", 1)]
        assert sums["total"]["requests"] == 1
        assert (await get(bob, "/v1/usage?key=key:ann")).data["data"] == []
        assert (await get(bob, "/v1/usage?tenant=a")).status == 400
        assert (await get(bob, f"/v1/usage/{of_ann}")).status == 404
        assert (await get(bob, f"/v1/usage/{of_bob}")).data["tenant"] == "b"
        for path in ("/admin/usage", f"/admin/usage/{of_bob}"):
            assert (await get(bob, path)).status == 403
        assert (await gw.get(f"/admin/usage/{of_ann}")).data["tenant"] == "a"
        both = (await gw.get("/admin/usage?group_by=tenant")).data["data"]
        assert {g["tenant"]: g["requests"] for g in both} == {"a": 2, "b": 1}


async def test_pages_follow_each_other(services):
    """Every request once, newest first, whatever the size of a page."""
    async with gateway(services) as gw:
        now = int(time.time() * 1000)
        rows = [pending(i, f"r{i}", a_request(f"r{i}", at=now - i // 3)) for i in range(20)]
        await store.store(gw.snapshot.services.database, rows)
        seen, after = [], ""
        while True:
            page = (await gw.get(f"/admin/usage?limit=7{after}")).data
            seen += page["data"]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert sorted(row["id"] for row in seen) == sorted(f"r{i}" for i in range(20))
        assert [row["at"] for row in seen] == sorted((row["at"] for row in seen), reverse=True)


async def test_sums_by_whatever_is_asked(services):
    """By model, team, task and day, dearest first; what is unknown is counted apart."""
    async with gateway(services) as gw:
        day = datetime(2026, 3, 5, 12, tzinfo=UTC).timestamp() * 1000
        requests = [
            a_request("a", at=int(day), team="x", task="t", cost_micro_usd=5),
            a_request("b", at=int(day), team="x", model_served="other", cost_micro_usd=100),
            a_request("c", at=int(day + 86_400_000), team=None, cost_micro_usd=None, cost_source="unknown"),
        ]
        rows = [pending(i, r.id, r) for i, r in enumerate(requests)]
        await store.store(gw.snapshot.services.database, rows)

        async def sums(by, more=""):
            reply = await gw.get(f"/admin/usage?group_by={by}&from=2026-03-01&to=2026-03-31{more}")
            assert reply.status == 200, reply.body
            return [tuple(g[n] for n in (*by.split(","), "requests", "cost_usd", "cost_unknown")) for g in reply.data["data"]]  # fmt: skip

        assert await sums("model") == [("other", 1, 0.0001, 0), (MODEL, 2, 0.000005, 1)]
        assert await sums("team") == [("x", 2, 0.000105, 0), (None, 1, None, 1)]
        assert await sums("day,task") == [
            ("2026-03-05", None, 1, 0.0001, 0),
            ("2026-03-05", "t", 1, 0.000005, 0),
            ("2026-03-06", None, 1, None, 1),
        ]
        assert await sums("model", "&team=x&model=other") == [("other", 1, 0.0001, 0)]
        total = (await gw.get("/admin/usage?group_by=&from=2026-03-05&to=2026-03-05")).data
        assert (total["data"], total["total"]["requests"], total["total"]["cost_usd"]) == ([], 2, 0.000105)
        empty = (await gw.get("/admin/usage?group_by=model&from=2020-01-01&to=2020-01-02")).data
        assert (empty["data"], empty["total"]["requests"], empty["total"]["cost_usd"]) == ([], 0, None)


async def test_csv_is_for_spreadsheets(services):
    """Rows and sums as CSV; a caller can't smuggle a formula into it."""
    async with gateway(services) as gw:
        body = {"model": MODEL, "user": '=HYPERLINK("x")', "messages": [{"role": "user", "content": "Hi"}]}
        await gw.post("/v1/chat/completions", body)
        await stored(gw)
        reply = await gw.get("/admin/usage?format=csv")
        assert reply.headers["content-type"].startswith("text/csv")
        [row] = csv.DictReader(io.StringIO(reply.body.decode()))
        assert (row["user"], row["model"], row["outcome"]) == ('\'=HYPERLINK("x")', MODEL, "ok")
        short = await gw.get("/admin/usage?format=csv&group_by=model,day&limit=1")
        assert short.status == 200
        await gw.chat(model="test/other")
        await stored(gw, 2)
        short = await gw.get("/admin/usage?format=csv&group_by=model&limit=1")
        assert (short.status, short.data["error"]["param"]) == (400, "limit")  # a table that ends early looks whole
        sums, _ = csv.DictReader(io.StringIO((await gw.get("/admin/usage?format=csv&group_by=model")).body.decode()))
        assert (sums["model"], sums["requests"]) == (MODEL, "1")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("group_by=colour", "group_by"),
        ("from=yesterday", "from"),
        ("from=2026-03-02&to=2026-03-01", "from"),
        ("to=9999-12-31T23:59:59%2B99:00", "to"),
        ("limit=0", "limit"),
        ("limit=9999999", "limit"),
        ("after=nonsense", "after"),
        ("format=xml", "format"),
        ("colour=red", "colour"),
        ("team=%00", "team"),
        ("group_by=model&after=1.x", "after"),
        ("group_by=model&limit=10001", "limit"),
        ("limit=" + "9" * 5000, "limit"),
    ],
)
async def test_a_wrong_question_is_told_what_is_wrong(query, param, tmp_path):
    """400 that names the parameter."""
    database = {"url": f"sqlite:///{tmp_path}/usage.db", "migrate_on_start": True}
    async with gateway({"database": database}) as gw:
        for path in ("/admin/usage", "/v1/usage"):
            reply = await gw.get(f"{path}?{query}")
            assert (reply.status, reply.data["error"]["param"]) == (400, param), reply.body


# --- old rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roll_up", [True, False])
async def test_old_rows_become_sums(services, roll_up):
    """Rows older than `keep` are gone; sums over them stay the same, or are gone too if that is wanted."""
    async with gateway(services) as gw:
        database = gw.snapshot.services.database
        begin = int(datetime(2026, 3, 5, tzinfo=UTC).timestamp() * 1000)
        requests = [
            a_request(
                f"r{i}", at=begin + i * 3_600_000, team="x" if i % 2 else None, cost_micro_usd=None if i == 7 else i
            )
            for i in range(48)
        ]
        await store.store(database, [pending(i, r.id, r) for i, r in enumerate(requests)])
        question = "/admin/usage?group_by=day,team,model&from=2026-03-01&to=2026-03-31"
        before = (await gw.get(question)).data
        assert before["total"]["requests"] == 48
        counts = await asyncio.gather(
            *(store.prune(database, begin + 86_400_000, roll_up=roll_up) for _ in range(2)), return_exceptions=True
        )
        assert sum(c for c in counts if isinstance(c, int)) == 24
        after = (await gw.get(question)).data
        assert after == before if roll_up else after["total"]["requests"] == 24
        assert len((await gw.get("/admin/usage?from=2026-03-01&limit=1000")).data["data"]) == 24
        # the next day's come on top
        assert await store.prune(database, begin + 2 * 86_400_000, roll_up=roll_up) == 24
        assert (await gw.get(question)).data == before if roll_up else True


async def test_old_sums_go_too_if_that_is_wanted(services):
    """`keep_sums`: sums of older days are gone, from its first day on they stay."""
    today = int(time.time() // 86400)
    days = [today - age for age in (50, 41, 39, 35)]
    async with gateway(services) as gw:
        database = gw.snapshot.services.database
        requests = [a_request(f"r{day}", at=day * store.DAY) for day in days]
        await store.store(database, [pending(i, r.id, r) for i, r in enumerate(requests)])
        await gw.reload(**as_gateway(services, config={"keep": "30d", "keep_sums": "40d"}))
        start = datetime.fromtimestamp(days[0] * 86400, UTC).strftime("%Y-%m-%d")
        async with asyncio.timeout(10):
            while len(sums := (await gw.get(f"/admin/usage?group_by=day&from={start}")).data["data"]) > 2:
                await asyncio.sleep(0.02)
        assert (await gw.get(f"/admin/usage?from={start}")).data["data"] == []
        assert [row["day"] for row in sums] == [
            datetime.fromtimestamp(day * 86400, UTC).strftime("%Y-%m-%d") for day in days[2:]
        ]


def test_sums_are_kept_longer_than_rows():
    """Else they would go as soon as they are made: the mistake is named, with what to do."""
    with pytest.raises(ValidationError, match="keep_sums must be longer than keep; roll_up: false"):
        usage.Config(keep="90d", keep_sums="30d")
    assert usage.Config(keep="90d", keep_sums="400d").keep_sums == 400 * 86400


async def test_the_command_line_shows_the_same(tmp_path):
    """`xenios usage`: a table of sums, one sum, every request, JSON and CSV; what is wrong is said, with exit code 2."""
    database = f"sqlite:///{tmp_path}/usage.db"
    async with gateway({"database": {"url": database, "migrate_on_start": True}}) as gw:
        day = int(datetime(2026, 3, 5, 12, tzinfo=UTC).timestamp() * 1000)
        requests = [
            a_request(f"r{i}", at=day + i, team="x" if i % 2 else None, cost_micro_usd=1_000_000 * i) for i in range(5)
        ]
        refused = a_request("no", at=day, model_served=None, outcome="refused", cost_micro_usd=None, input_tokens=None)
        await store.store(
            gw.snapshot.services.database, [pending(i, r.id, r) for i, r in enumerate([*requests, refused])]
        )
    text = {
        "server": {"data_dir": str(tmp_path / "data")},
        "upstreams": {"openrouter": {"without_key": "simulate"}},
        "services": {"database": database},
        "plugins": [{"use": "usage"}],
    }
    (tmp_path / "u.yaml").write_text(json.dumps(text))

    async def usage(*more):
        period = ("--from", "2026-03-01", "--to", "2026-03-31")
        done = await asyncio.to_thread(xenios, "usage", "--config", tmp_path / "u.yaml", *period, *more, cwd=tmp_path)
        assert done.returncode == (2 if "nonsense" in more else 0), done.stderr
        return done.stderr if "nonsense" in more else done.stdout

    lines = (await usage("--by", "team,model")).splitlines()
    assert lines[0].split() == [
        "team",
        "model",
        "requests",
        "input_tokens",
        "output_tokens",
        "cost_usd",
        "cost_unknown",
    ]
    assert lines[1].split() == ["-", MODEL, "3", "9", "-", "6.000000", "0"]
    assert lines[-1].split() == ["total", "6", "15", "-", "10.000000", "0"]
    [_, one] = (await usage("--by", "total", "--team", "x")).splitlines()
    assert one.split() == ["2", "6", "-", "4.000000", "0"]
    sums = json.loads(await usage("--json"))
    assert (sums["total"]["requests"], len(sums["data"])) == (6, 2)
    assert [line.split()[-1] for line in (await usage("--rows")).splitlines()] == ["ok"] * 5 + ["refused"]
    table = list(csv.DictReader(io.StringIO(await usage("--rows", "--csv"))))
    assert [row["id"] for row in table] == ["r4", "r3", "r2", "r1", "r0", "no"]
    assert json.loads((await usage("--rows", "--json")).splitlines()[0])["cost_usd"] == 4.0
    assert "--by" in await usage("--by", "nonsense")
    assert "--from" in await usage("--from", "nonsense")


# --- metrics ----------------------------------------------------------------------------------------------------------


async def test_metrics_tell_how_many_rows_wait_and_how_many_were_lost(services, monkeypatch):
    """While the database is away rows wait, and are told; beyond the bound they are dropped and counted, once each."""
    monkeypatch.setattr(ledger, "ROWS_LIMIT", 3)
    monkeypatch.setattr(lua, "SETTLE", lua.SETTLE.replace(">= 100000", ">= 3"))
    monkeypatch.setattr(usage, "RETRY_SECONDS", 0.05)
    away = asyncio.Event()

    async def no_store(*_):
        away.set()
        raise StoreUnavailable

    async with gateway(services, "metrics") as gw:

        async def told():
            await gw.snapshot.services.ledger.flush()
            [waiting] = (await scraped(gw, "xenios_usage_rows_waiting")).values()
            return waiting, (await scraped(gw, "xenios_dropped_total"))["usage",]

        async def becomes(wanted):
            async with asyncio.timeout(10):
                while (found := await told()) != wanted:
                    assert found[1] <= wanted[1]
                    await asyncio.sleep(0.02)

        await becomes((0, 0))
        monkeypatch.setattr(store, "store", no_store)
        await gw.chat(model=MODEL)
        await gw.finished()
        await becomes((1, 0))
        await away.wait()
        for _ in range(5):
            await gw.chat(model=MODEL)
        await becomes((3, 3))
        old = gw.snapshot
        await gw.reload(**as_gateway(services, "metrics", config={"keep": "3649d"}))
        await closed(gw, old)
        assert (await told())[1] == 3
        monkeypatch.undo()
        await becomes((0, 3))
        assert len((await gw.get("/admin/usage")).data["data"]) == 3


async def test_rows_that_can_not_be_stored_count_as_dropped(services):
    """A row that the database refuses is lost, and seen to be."""
    async with gateway(services, "metrics") as gw:
        book = gw.snapshot.services.ledger
        book.settle("broken", [], b"no row")
        await book.flush()
        async with asyncio.timeout(10):
            while (await scraped(gw, "xenios_dropped_total"))["usage",] != 1:
                await asyncio.sleep(0.02)
