"""Single jobs and background responses in the hands of the clumsy and the hostile."""

import asyncio
import time
from urllib.parse import urlsplit

import msgspec
import pytest

from gateway import RateLimited, Unavailable
from gateway.kit.upstream import MODEL, ScriptedUpstream, Stream, chat_events
from gateway_plugins.jobs.store import End
from tests.jobs.gateways import ASYNC, body, due, gateway, jobs, of, shown, taken, work


async def test_a_header_full_of_blanks_stops_nobody(url):
    """What a client writes into `Prefer` is read in no time, whatever it is: others wait for the same event loop."""
    async with gateway(url) as gw:
        for nonsense in ("a," + " " * 7000 + ",", "a" + ";" * 7000, 'a="' * 2000, " ," * 3000, "a= " * 2000):
            began = time.monotonic()
            reply = await gw.post("/v1/chat/completions", body(), headers={"Prefer": nonsense, **of("app")})
            assert (reply.status, time.monotonic() - began < 0.5) == (200, True), nonsense[:10]


async def sent(gw, headers, name="app"):
    """(status, JSON) of a request to chat with these bytes among its headers, which no client library would send."""
    data, url = msgspec.json.encode(body()), urlsplit(gw.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nPrefer: respond-async\r\nConnection: close\r\n"
    token = f"Authorization: {of(name)['Authorization']}\r\nContent-Length: {len(data)}\r\n".encode()
    writer.write(head + token + headers + b"\r\n" + data)
    reply = await reader.read()
    writer.close()
    return int(reply.split(b" ", 2)[1]), msgspec.json.decode(reply.partition(b"\r\n\r\n")[2])


async def test_headers_need_not_be_utf8(url):
    """Headers that are no UTF-8 make no difference to a job: it is taken, and runs."""
    async with gateway(url) as gw:
        odd = b"X-Title: caf\xe9\r\nUser-Agent: \xff\r\nContent-Type: application/json; x=\xff\r\n"
        status, job = await sent(gw, odd)
        assert status == 202, job
        await work(gw, job["id"])
        assert (await shown(gw, job["id"]))["status"] == "succeeded"


async def test_an_idempotency_key_is_text(url):
    """A key that a database would take for another one is refused, in the body and in the header."""
    async with gateway(url) as gw:
        for key in ("", "x" * 256, "a\x00b", "a\nb"):
            made = {"endpoint": "chat/completions", "body": body(), "idempotency_key": key}
            assert (await gw.post("/v1/jobs", made, headers=of("app"))).data["error"]["param"] == "idempotency_key"
        for header in (b"", b"x" * 256, b"a\xff", b"a\tb"):
            status, refused = await sent(gw, b"Content-Type: application/json\r\nIdempotency-Key: %b\r\n" % header)
            assert (status, refused["error"]["param"]) == (400, "Idempotency-Key")


async def test_the_same_key_is_the_same_job_also_when_no_more_may_wait(url):
    """Who repeats a request is told of its job, though there is no place for another one."""
    async with gateway(url, max_waiting=1) as gw:
        headers = {**ASYNC, **of("app"), "Idempotency-Key": "once"}
        first = await gw.post("/v1/chat/completions", body(), headers=headers)
        second = await gw.post("/v1/chat/completions", body(), headers=headers)
        assert (second.status, second.data["id"]) == (202, first.data["id"])
        assert second.headers["idempotent-replayed"] == "true"


async def test_a_job_that_is_cancelled_and_deleted_at_once_is_gone(url):
    """Whoever cancels a job that somebody deletes meanwhile is told that it is gone, and keeps nobody waiting."""
    async with gateway(url) as gw:
        job_id = await taken(gw)
        job = await jobs(gw).store.get(job_id)
        assert (await gw.request("DELETE", f"/v1/jobs/{job_id}", headers=of("app"))).status == 200
        async with asyncio.timeout(5):
            with pytest.raises(Exception, match="deleted"):
                await jobs(gw).cancel(job)


async def test_a_conversation_goes_on_in_a_job(url):
    """`previous_response_id` is filled in for a request that becomes a job as for one that is answered now."""
    async with gateway(url) as gw:
        asked = {"model": MODEL, "input": "One", "background": True}
        first = (await gw.post("/v1/responses", asked, headers=of("app"))).data["id"]
        await gw.plugin("jobs").takers[0].runner.run(first)
        asked = {"model": MODEL, "input": "Two", "previous_response_id": first}
        by_header = await gw.post("/v1/responses", asked, headers={**ASYNC, **of("app")})
        by_route = await gw.post("/v1/jobs", {"endpoint": "responses", "body": asked}, headers=of("app"))
        for reply in (by_header, by_route):
            assert reply.status == 202, reply.body
            await work(gw, reply.data["id"])
            sent = gw.upstream.seen[-1].json
            assert [item["role"] for item in sent["input"]] == ["user", "assistant", "user"]
            assert "previous_response_id" not in sent


async def test_waiting_for_a_place_costs_a_job_neither_tries_nor_hours(url):
    """A job that a limit keeps refusing is tried every half minute; its first failure upstream is its first."""
    limit = {"use": "rate_limit", "config": {"limits": [{"name": "one", "concurrent": 1}]}}
    upstream = ScriptedUpstream()
    async with gateway(url, limit, upstream=upstream, queues={"default": {"backoff": "2s"}}) as gw:
        job_id = await taken(gw)
        store = jobs(gw).store
        for _ in range(8):
            job = await store.begin(await store.get(job_id), "refused")
            async with gw.snapshot.services.database.transaction() as statements:
                await store.end(statements, job, End(status="queued", counts=False), ttl=60)
        job = await store.begin(await store.get(job_id), "refused")
        waits = jobs(gw).runner._later(job, RateLimited("Too many"), counts=False)
        fails = jobs(gw).runner._later(job, Unavailable("Away"), counts=True)
        assert (waits.after, fails.after) == (30, 2)


async def test_what_a_cancelled_jobs_last_run_cost_is_settled_and_it_can_be_forgotten(url):
    """A job that is cancelled while it waits for its next try is settled once, and pruned in its time."""
    async with gateway(url) as gw:
        job_id = await taken(gw)
        store = jobs(gw).store
        job = await store.begin(await store.get(job_id), "run-1")
        async with gw.snapshot.services.database.transaction() as statements:
            await store.end(statements, job, End(status="queued", settlement="[]", after=60), ttl=60)
        await gw.request("POST", f"/v1/jobs/{job_id}/cancel", headers=of("app"))
        await gw.snapshot.services.database.execute(
            "UPDATE jobs_jobs SET finished_at = 1, run_after = 1, expires_at = 1"
        )
        await jobs(gw).tidy()
        await jobs(gw).tidy()
        assert await store.get(job_id) is None


async def test_redis_keeps_nothing_of_an_answer_that_is_stored(url):
    """The events of a stream are in Redis while it runs; its end takes them out, those of its earlier tries too."""
    upstream = ScriptedUpstream(Stream(*chat_events("Hel")[:2], end="cut"), Stream(*chat_events("Hello")))
    async with gateway(url, upstream=upstream) as gw:
        job_id = await taken(gw, stream=True)
        redis = gw.snapshot.services.redis.client
        await work(gw, job_id)
        await due(gw, job_id)
        await work(gw, job_id)
        assert (await shown(gw, job_id))["status"] == "succeeded"
        assert [key async for key in redis.scan_iter(match="*jobs:events*")] == []
