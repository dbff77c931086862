"""Background responses over real sockets: a gateway, a worker beside it, a scripted upstream."""

from __future__ import annotations

import asyncio
import contextlib
import json

import msgspec
import pytest

from gateway.kit.keys import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from gateway.kit.upstream import Error, Json, ScriptedUpstream, Stream, Until, response_events, response_object
from tests.jobs.support import running, until

ASKED = {"model": "test/model", "input": "Hello", "background": True}
PENDING = {"queued", "in_progress"}
OTHER = new_key()
KEYS = {
    "keys": [{"id": "other", "tenant": "other", "hash": hash_key(OTHER, PEPPER)}],
    "bootstrap": True,
}  # fmt: skip
QUEUES = {"default": {"attempts": 1}}


@contextlib.asynccontextmanager
async def serving(url, *answers, plugins=(), database=None, server=None, **config):
    """A gateway, without a worker."""
    plugins = [("api_keys", KEYS), *plugins, "usage", ("jobs", {"queues": QUEUES, **config})]
    services = {"redis": url, **({"database": {"url": database, "migrate_on_start": True}} if database else {})}
    settings = {"services": services, "server": server or {}}
    async with Gateway.test(plugins=plugins, upstream=ScriptedUpstream(*answers), settings=settings) as gw:
        gw.part = gw.plugin("jobs").takers[0]
        yield gw


@contextlib.asynccontextmanager
async def working(url, *answers, **config):
    """The same, with a worker."""
    async with serving(url, *answers, **config) as gw, running(url, gw.part.handlers):
        yield gw


async def created(gw, **fields):
    reply = await gw.post("/v1/responses", {**ASKED, **fields})
    assert reply.status == 200, reply.body
    return reply.data


async def ended(gw, response_id):
    async def terminal():
        reply = await gw.get(f"/v1/responses/{response_id}")
        return reply.data if reply.data["status"] not in PENDING else None

    return await until(terminal)


def parsed(events):
    return [json.loads(event.partition(b"data: ")[2]) for event in events if not event.startswith(b":")]


async def followed(gw, path, count=None):
    """Events of a stream, all or so many; then the client leaves."""
    out = []
    async with gw.session.get(gw.url + path, headers=gw.headers) as reply:
        assert reply.status == 200, await reply.read()
        rest = b""
        async for data in reply.content.iter_any():
            *events, rest = (rest + data).split(b"\n\n")
            out += parsed(events)
            if count is not None and len(out) >= count:
                break
    return out[:count]


def numbers(events):
    return [event["sequence_number"] for event in events]


async def test_one_is_taken_at_once_and_answered_by_a_worker(url):
    """The client has the object before anybody asks a model; the upstream sees an ordinary stateless call."""
    async with serving(url) as gw:
        taken = await gw.post("/v1/responses", {**ASKED, "metadata": {"a": "b"}})
        assert (taken.status, taken.data["status"], taken.data["background"]) == (200, "queued", True)
        assert taken.headers["x-request-id"]
        assert gw.upstream.seen == []
        async with running(url, gw.part.handlers):
            done = await ended(gw, taken.data["id"])
        assert (done["status"], done["id"], done["metadata"]) == ("completed", taken.data["id"], {"a": "b"})
        assert done["output"][0]["content"][0]["text"] == "Hello there"
        [seen] = gw.upstream.seen
        assert seen.json["store"] is False
        assert not {"background", "previous_response_id"} & seen.json.keys()
        database = gw.worker.snapshot.services.database
        [row] = await database.fetch("SELECT * FROM usage_requests WHERE cost_micro_usd > 0")
        job = await database.fetch_one("SELECT * FROM jobs_jobs")
        assert (row["outcome"], row["cost_micro_usd"]) == ("ok", job["cost_micro_usd"])
        assert done["usage"]["cost"] == row["cost_micro_usd"] / 1e6


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_of_the_upstream_makes_a_failed_response(url, stream):
    """After its last try it is failed, with the API's code, the gateway's beside it, and a sentence."""
    async with working(url, Error(503), Error(503)) as gw:
        if stream:
            reply = await gw.post("/v1/responses", {**ASKED, "stream": True})
            done = parsed(reply.events)[-1]
            assert done["type"] == "response.failed"
            done = done["response"]
        else:
            done = await ended(gw, (await created(gw))["id"])
        assert (done["status"], done["error"]["code"], done["error"]["type"]) == (
            "failed",
            "server_error",
            "upstream_error",
        )


async def test_a_stream_that_is_cut_makes_a_failed_response(url):
    """A truncated answer is never a completed one; what there was of it is kept."""
    cut = Stream(*response_events("Hello there")[:7], end="cut")
    async with working(url, cut) as gw:
        events = parsed((await gw.post("/v1/responses", {**ASKED, "stream": True})).events)
        assert events[-1]["type"] == "response.failed"
        done = events[-1]["response"]
        assert (done["error"]["type"], done["output"][0]["status"]) == ("upstream_truncated", "incomplete")
        assert (await ended(gw, done["id"])) == done


async def test_an_answer_at_its_limit_is_incomplete(url):
    """`incomplete` is told as such, not as completed."""
    async with working(url, Json(response_object("Hel", status="incomplete"))) as gw:
        done = await ended(gw, (await created(gw))["id"])
        assert (done["status"], done["incomplete_details"]["reason"]) == ("incomplete", "max_output_tokens")


async def test_a_failed_try_is_no_end(url):
    """A cut answer is asked for again: the stream goes on with the second one behind the first, and completes."""
    cut = Stream(*response_events("Half an answer")[:7], end="cut")
    again = {"default": {"attempts": 2, "backoff": "10ms"}}
    async with working(url, cut, Stream(*response_events("The whole answer")), queues=again) as gw:
        events = parsed((await gw.post("/v1/responses", {**ASKED, "stream": True})).events)
        assert numbers(events) == sorted(set(numbers(events)))
        assert events[-1]["type"] == "response.completed"
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "The whole answer"
        assert [e["item"]["status"] for e in events if e["type"] == "response.output_item.done"] == [
            "incomplete",
            "completed",
        ]
        assert {e["output_index"] for e in events if e["type"] == "response.output_text.delta"} == {0, 1}
        replayed = await followed(gw, f"/v1/responses/{events[-1]['response']['id']}?stream=true")
        assert replayed == events


async def test_a_dropped_stream_goes_on_where_it_was_also_at_another_gateway(url, tmp_path):
    """Live, by another process than the one that took it: exactly the events after the last one, each once."""
    going = asyncio.Event()
    steps = response_events("Hello there", pieces=8, comments=False)
    database = f"sqlite:///{tmp_path}/shared.sqlite"
    slow = Stream(*steps[:7], Until(going), *steps[7:])
    async with working(url, slow, database=database) as one, serving(url, database=database) as two:
        two.headers["Authorization"] = one.headers["Authorization"] = f"Bearer {OTHER}"
        async with one.session.post(
            f"{one.url}/v1/responses", json={**ASKED, "stream": True}, headers=one.headers
        ) as reply:
            first = parsed([await reply.content.readuntil(b"\n\n") for _ in range(5)])
        response_id = first[0]["response"]["id"]
        path = f"/v1/responses/{response_id}?stream=true&starting_after={first[-1]['sequence_number']}"
        live = await followed(two, path, 2)
        shown = await two.get(f"/v1/responses/{response_id}")
        assert (shown.status, shown.data.get("status")) == (200, "in_progress"), shown.body
        going.set()
        rest = await followed(two, path)
        assert rest[:2] == live
        assert numbers([*first, *rest]) == list(range(len(first) + len(rest)))
        assert rest[-1]["type"] == "response.completed"
        assert await followed(one, path) == rest
        assert await followed(one, f"/api{path}") == rest


async def test_a_cancelled_one_ends_its_call_and_keeps_what_it_said(url):
    """The upstream's connection is closed, the state is `cancelled`, however often one cancels; who follows is told."""
    steps = response_events("Hello there", comments=False)
    async with working(url, Stream(*steps[:6], end="hang")) as gw:
        taken = await created_stream(gw)
        await followed(gw, f"/v1/responses/{taken}?stream=true", 6)
        following = asyncio.get_running_loop().create_task(followed(gw, f"/v1/responses/{taken}?stream=true"))
        replies = [await gw.request("POST", f"/v1/responses/{taken}/cancel") for _ in range(2)]
        assert [reply.data["status"] for reply in replies] == ["cancelled", "cancelled"]
        assert replies[0].data["output"][0]["content"][0]["text"]
        [seen] = gw.upstream.seen
        async with asyncio.timeout(1):
            await seen.closed.wait()
        assert (await following)[-1]["type"] == "response.cancelled"
        assert (await ended(gw, taken)) == replies[1].data


async def created_stream(gw):
    """The id of one that was created with `stream`, and whose client left at once."""
    async with gw.session.post(f"{gw.url}/v1/responses", json={**ASKED, "stream": True}, headers=gw.headers) as reply:
        [event] = parsed([await reply.content.readuntil(b"\n\n")])
    return event["response"]["id"]


async def test_one_that_nobody_works_on_yet_is_cancelled_and_deleted(url):
    """Cancelled before its turn, no model is asked; what is deleted is gone for every route, and stays so."""
    async with serving(url) as gw:
        taken = await created_stream(gw)
        path = f"/v1/responses/{taken}"
        assert (await gw.request("POST", f"{path}/cancel")).data["status"] == "cancelled"
        assert [e["type"] for e in await followed(gw, f"{path}?stream=true")] == [
            "response.created", "response.queued", "response.cancelled",
        ]  # fmt: skip
        gone = await gw.request("DELETE", path)
        assert gone.data == {"id": taken, "object": "response", "deleted": True}
        async with running(url, gw.part.handlers):
            for method, rest in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
                assert (await gw.request(method, path + rest)).status == 404
        assert gw.upstream.seen == []


@pytest.mark.promise("P14.responses")
async def test_another_tenants_responses_are_not_there(url):
    """Whoever is not of the tenant gets 404 at every route, and can't continue the conversation."""
    async with working(url) as gw:
        taken = await created(gw)
        await ended(gw, taken["id"])
        path = f"/v1/responses/{taken['id']}"
        theirs = {"Authorization": f"Bearer {OTHER}"}
        for method, rest in (
            ("GET", ""),
            ("GET", "?stream=true"),
            ("GET", "/input_items"),
            ("POST", "/cancel"),
            ("DELETE", ""),
        ):
            assert (await gw.request(method, path + rest, headers=theirs)).status == 404
        follow = await gw.post("/v1/responses", {**ASKED, "previous_response_id": taken["id"]}, headers=theirs)
        assert (follow.status, follow.data["error"]["code"]) == (400, "previous_response_not_found")
        assert (await gw.get(path)).status == 200
        assert (await gw.get(f"{path}?tenant=other", headers=theirs)).status == 404
        tenant = (await gw.worker.snapshot.services.database.fetch_one("SELECT tenant FROM jobs_jobs"))["tenant"]
        assert (await gw.get(f"{path}?tenant={tenant}", headers=theirs)).status == 403


async def test_an_administrator_sees_a_tenants_responses(url):
    """By naming the tenant, as with jobs."""
    async with working(url) as gw:
        theirs = {"Authorization": f"Bearer {OTHER}"}
        taken = (await gw.post("/v1/responses", ASKED, headers=theirs)).data
        path = f"/v1/responses/{taken['id']}"
        assert (await gw.get(path)).status == 404
        assert (await gw.get(f"{path}?tenant=other")).data["id"] == taken["id"]


async def test_a_conversation_is_filled_in(url):
    """All that was said stands in the next call's `input`: of a background response, and of one that is answered now."""
    async with working(url) as gw:
        first = await ended(gw, (await created(gw, input="One"))["id"])
        second = await ended(gw, (await created(gw, input="Two", previous_response_id=first["id"]))["id"])
        assert second["previous_response_id"] == first["id"]
        live = await gw.post("/v1/responses", {"model": "m", "input": "Three", "previous_response_id": second["id"]})
        assert live.status == 200
        said = [[item["role"] for item in seen.json["input"]] for seen in gw.upstream.seen[1:]]
        assert said == [["user", "assistant", "user"], ["user", "assistant", "user", "assistant", "user"]]
        listed = (await gw.get(f"/v1/responses/{second['id']}/input_items?order=asc")).data
        assert [item["role"] for item in listed["data"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
async def test_what_of_openais_api_is_not_there_says_so(url, prefix):
    """OpenAI's calls that no upstream offers are 404 or 400, in its error's shape, with what to do instead."""
    async with serving(url) as gw:
        for name, instead in (("input_tokens", "count_tokens"), ("compact", "truncation")):
            reply = await gw.post(f"{prefix}/responses/{name}", {"model": "test/model", "input": "Hi"})
            error = reply.data["error"]
            assert (reply.status, error["type"], error["code"]) == (404, "invalid_request_error", "unknown_url")
            assert instead in error["message"]
        for background in (True, False):
            asked = {**ASKED, "background": background, "conversation": "conv_1"}
            reply = await gw.post(f"{prefix}/responses", asked)
            assert (reply.status, reply.data["error"]["param"]) == (400, "conversation")
            assert "previous_response_id" in reply.data["error"]["message"]
        assert gw.upstream.seen == []


@pytest.mark.parametrize("background", [True, False])
async def test_a_conversation_has_a_longest_length(url, background):
    """What was said before counts as part of the request: 413 says how long it became, and what to do."""
    limits = {"max_body": 4000} if background else {"server": {"max_body": 4000}}
    async with working(url, **limits) as gw:
        first = await ended(gw, (await created(gw, input="x" * 2500))["id"])
        asked = {**ASKED, "background": background, "input": "y" * 2500, "previous_response_id": first["id"]}
        reply = await gw.post("/v1/responses", asked)
        error = reply.data["error"]
        assert (reply.status, error["code"], error["param"]) == (413, "request_too_large", "previous_response_id")
        assert "4000" in error["message"]
        assert (await gw.post("/v1/responses", {**asked, "input": "Short"})).status == 200


async def test_a_job_of_a_response_takes_no_background(url):
    """Whoever makes a job of a background response is told that a job is one already; nothing is stored."""
    async with serving(url) as gw:
        reply = await gw.post("/v1/jobs", {"endpoint": "responses", "body": ASKED})
        assert (reply.status, reply.data["error"]["param"]) == (400, "background")
        assert "leave `background` out" in reply.data["error"]["message"]
        assert (await gw.get("/v1/jobs")).data["data"] == []


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "", {**ASKED, "store": False}, "store"),
        ("POST", "", {**ASKED, "background": "yes"}, "background"),
        ("POST", "", {**ASKED, "previous_response_id": "resp_0"}, "previous_response_id"),
        ("POST", "", {**ASKED, "previous_response_id": 3}, "previous_response_id"),
        ("GET", "/{id}?stream=true", None, "stream"),
        ("GET", "/{streamed}?stream=true&starting_after=-1", None, "starting_after"),
        ("GET", "/{streamed}?stream=true&starting_after=x", None, "starting_after"),
        ("GET", "/{id}/input_items?limit=0", None, "limit"),
        ("GET", "/{id}/input_items?limit=101", None, "limit"),
        ("GET", "/{id}/input_items?order=up", None, "order"),
        ("GET", "/{id}/input_items?after=nothing", None, "after"),
    ],
)
async def test_a_mistake_is_named(url, method, path, body, param):
    """400 says which parameter is wrong."""
    async with serving(url) as gw:
        ids = {"id": (await created(gw))["id"], "streamed": await created_stream(gw)}
        reply = await gw.request(method, "/v1/responses" + path.format(**ids), json=body)
        assert (reply.status, reply.data["error"]["param"]) == (400, param)


async def test_a_job_is_no_response(url):
    """Who takes a job's id for a response's is told where it can be cancelled."""
    async with serving(url) as gw:
        reply = await gw.request("POST", "/v1/responses/job_0123/cancel")
        assert (reply.status, "/v1/jobs" in reply.data["error"]["message"]) == (400, True)


async def test_it_is_limited_as_any_request(url):
    """The admission is that of any request: who has spent its minute's requests is refused before anything is kept."""
    limit = ("rate_limit", {"limits": [{"name": "one", "by": ["key"], "requests": 1, "per": "1m"}]})
    async with serving(url, plugins=[limit]) as gw:
        await created(gw)
        reply = await gw.post("/v1/responses", ASKED)
        assert (reply.status, reply.data["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_the_same_idempotency_key_is_the_same_response(url):
    """A client that asks twice because it lost the first answer gets one response."""
    async with serving(url) as gw:
        key = {"Idempotency-Key": "order-7"}
        first, second = [await gw.post("/v1/responses", ASKED, headers=key) for _ in range(2)]
        assert first.data["id"] == second.data["id"]
        assert second.headers["Idempotent-Replayed"] == "true"
        other = await gw.post("/v1/responses", {**ASKED, "input": "Other"}, headers=key)
        assert other.status == 409


async def test_it_is_forgotten_after_its_time(url):
    """An answer is kept for `result_ttl`, then it is 404."""
    async with working(url, result_ttl=60) as gw:
        taken = await ended(gw, (await created(gw))["id"])
        database = gw.worker.snapshot.services.database
        row = await database.fetch_one("SELECT expires_at - finished_at AS kept FROM jobs_jobs")
        assert row["kept"] == 60_000
        await database.execute("UPDATE jobs_jobs SET expires_at = 1")
        await gw.part.tidy()
        assert (await gw.get(f"/v1/responses/{taken['id']}")).status == 404


async def test_a_worker_that_stops_hands_its_response_on(url):
    """The next worker goes on behind what the first had told: numbers rise, the half answer is closed, the end is whole."""
    steps = response_events("Half an answer", comments=False)
    half, whole = Stream(*steps[:7], end="hang"), Stream(*response_events("The whole answer", comments=False))
    async with serving(url, half, whole) as gw:
        taken = await created_stream(gw)
        path = f"/v1/responses/{taken}?stream=true"
        following = asyncio.get_running_loop().create_task(followed(gw, path))
        async with running(url, gw.part.handlers, grace=0):
            before = await followed(gw, path, 8)
        async with running(url, gw.part.handlers):
            events = await following
        assert events[:8] == before
        assert numbers(events) == sorted(set(numbers(events)))
        by_place = {}
        for event in events:
            if event["type"] == "response.output_text.delta":
                by_place[event["output_index"]] = by_place.get(event["output_index"], "") + event["delta"]
        assert by_place[1] == "The whole answer"
        assert (events[-1]["type"], events[-1]["response"]["output"][0]["content"][0]["text"]) == (
            "response.completed", "The whole answer",
        )  # fmt: skip
        assert await followed(gw, path) == events


async def test_what_ended_is_told_to_who_asked_to_know(url):
    """An endpoint that listens gets `response.completed` with the id, as OpenAI's webhooks do."""
    hooks = {
        "endpoints": [{"url": "https://hooks.example/x", "events": ["response.*"], "secret": "whsec_" + "MDAw" * 8}]
    }
    async with working(
        url, Json(response_object("Hi")), Json(response_object("H", status="incomplete")), webhooks=hooks
    ) as gw:
        ids = [(await ended(gw, (await created(gw))["id"]))["id"] for _ in range(2)]
        rows = await gw.worker.snapshot.services.database.fetch("SELECT body FROM jobs_webhook_deliveries")
        told = [msgspec.json.decode(row["body"]) for row in rows]
        assert sorted((event["type"], event["data"]["id"]) for event in told) == sorted(
            [("response.completed", ids[0]), ("response.incomplete", ids[1])]
        )
