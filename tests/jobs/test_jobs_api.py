"""Single jobs from outside: taken, shown, answered, followed, cancelled, forgotten. The work is done in the test."""

import asyncio
import io
import re
import time

import pytest

from gateway.kit import hash_key, new_key
from gateway.kit.testing import PEPPER
from gateway.kit.upstream import (
    MODEL,
    Error,
    Json,
    ScriptedUpstream,
    Stream,
    Until,
    chat_completion,
    chat_events,
    encode_step,
)
from gateway_plugins.jobs import functions
from gateway_plugins.jobs.runner import MOST_LOSSES
from tests.jobs.gateways import (
    ASYNC,
    body,
    due,
    events,
    gateway,
    jobs,
    of,
    rows,
    shown,
    spawn,
    taken,
    without_ids,
    work,
)

# --- taken ------------------------------------------------------------------------------------------------------------


async def test_a_request_becomes_a_job_by_a_header(url):
    """`Prefer: respond-async`: 202 at once, where the job is, and what it is; no model is asked before a worker runs it."""
    async with gateway(url) as gw:
        reply = await gw.post("/v1/chat/completions", body(), headers={**ASYNC, **of("app")})
        job = reply.data
        assert (reply.status, reply.headers["location"]) == (202, f"/v1/jobs/{job['id']}")
        assert reply.headers["preference-applied"] == "respond-async"
        assert (job["object"], job["status"], job["endpoint"], job["model"]) == (
            "job",
            "queued",
            "chat/completions",
            MODEL,
        )
        assert (job["queue"], job["priority"], job["attempts"], job["position"]) == ("default", "normal", 0, 0)
        assert job["request_id"] == reply.headers["x-request-id"]
        assert gw.upstream.seen == []
        assert await work(gw, job["id"]) is None
        done = await shown(gw, job["id"])
        assert (done["status"], done["attempts"], done["result_status"]) == ("succeeded", 1, 200)
        assert done["timings"]["waited"] >= 0
        assert done["cost_usd"] > 0
        assert len(gw.upstream.seen) == 1


async def test_the_result_is_what_a_client_would_have_got(url):
    """Status, content type, bytes and the served model of a live answer, also of one that an upstream refuses."""
    upstream = ScriptedUpstream(
        *[Json(chat_completion("Hi", identity="gen-1"))] * 2, *[Error(400, "No such thing")] * 2
    )
    async with gateway(url, upstream=upstream) as gw:
        for status in (200, 400):
            live = await gw.post("/v1/chat/completions", body(), headers=of("app"))
            job_id = await taken(gw)
            early = await gw.get(f"/v1/jobs/{job_id}/result", headers=of("app"))
            assert (early.status, early.data["error"]["code"]) == (409, "job_not_finished")
            assert early.headers["retry-after"] == "1"
            await work(gw, job_id)
            late = await gw.get(f"/v1/jobs/{job_id}/result", headers=of("app"))
            assert late.status == live.status == status
            assert late.headers["content-type"] == live.headers["content-type"]
            assert late.headers["x-xenios-model"] == live.headers["x-xenios-model"]
            if status == 200:
                assert late.body == live.body
            else:
                assert late.data["error"]["message"] == live.data["error"]["message"]


async def test_every_endpoint_takes_jobs(url):
    """Each proxied endpoint: a form, binary replies and streams too."""
    requests = {
        "completions": lambda: {"json": {"model": MODEL, "prompt": "Hi"}},
        "embeddings": lambda: {"json": {"model": MODEL, "input": "Hi"}},
        "responses": lambda: {"json": {"model": MODEL, "input": "Hi", "stream": True}},
        "messages": lambda: {"json": {**body(), "max_tokens": 5}},
        "rerank": lambda: {"json": {"model": MODEL, "query": "a", "documents": ["a", "b"]}},
        "images/generations": lambda: {"json": {"model": MODEL, "prompt": "A cat"}},
        "audio/speech": lambda: {"json": {"model": MODEL, "input": "Hi", "voice": "alloy"}},
        "audio/transcriptions": lambda: {"data": {"model": MODEL, "file": io.BytesIO(b"RIFF")}},
    }
    async with gateway(url, queues={"voices": {"endpoints": ["audio/transcriptions"]}}) as gw:
        for endpoint, request in requests.items():
            reply = await gw.request("POST", f"/v1/{endpoint}", headers={**ASYNC, **of("app")}, **request())
            assert (reply.status, reply.data["endpoint"]) == (202, endpoint)
            assert reply.data["queue"] == ("voices" if "transcriptions" in endpoint else "default")
            await work(gw, reply.data["id"])
            result = await gw.get(f"/v1/jobs/{reply.data['id']}/result", headers=of("app"))
            assert result.status == 200, (endpoint, result.body)
            live = await gw.request("POST", f"/v1/{endpoint}", headers=of("app"), **request())
            assert result.headers["content-type"] == live.headers["content-type"]


async def test_a_client_may_wait(url):
    """`wait=N`: the answer itself if the job is done by then, the job if it isn't."""
    upstream = ScriptedUpstream(Json(chat_completion("Hi")))
    async with gateway(url, upstream=upstream) as gw:
        waiting = {"Prefer": 'respond-async, wait=30; foo="x", return=minimal', **of("app")}
        asked = spawn(gw.post("/v1/chat/completions", body(), headers=waiting))
        async with asyncio.timeout(5):
            while not (known := (await gw.get("/v1/jobs", headers=of("app"))).data["data"]):
                await asyncio.sleep(0.02)
        await work(gw, known[0]["id"])
        reply = await asked
        assert (reply.status, reply.data["choices"][0]["message"]["content"]) == (200, "Hi")
        assert reply.headers["preference-applied"] == "wait=30"
        assert reply.headers["x-xenios-job"] == known[0]["id"]
        late = await gw.post("/v1/chat/completions", body(), headers={"Prefer": "respond-async,wait=0", **of("app")})
        assert (late.status, late.headers["preference-applied"]) == (202, "respond-async")


async def test_a_job_is_made_with_all_that_it_takes(url):
    """POST /v1/jobs: queue, priority, metadata, a delay and an end, for any endpoint."""
    async with gateway(url, queues={"night": {"attempts": 7}}) as gw:
        wanted = {
            "endpoint": "chat/completions", "body": body(stream=True), "queue": "night", "priority": "high",
            "metadata": {"order": "17"}, "delay": 60, "run_before": int(time.time()) + 3600,
        }  # fmt: skip
        reply = await gw.post("/v1/jobs", wanted, headers=of("app"))
        job = reply.data
        assert reply.status == 202
        assert (job["queue"], job["priority"], job["metadata"]) == ("night", "high", {"order": "17"})
        assert (job["max_attempts"], job["stream"], job["run_before"]) == (7, True, wanted["run_before"])
        assert 58 <= job["run_after"] - job["created_at"] <= 61
        assert 55 < await work(gw, job["id"]) <= 60
        assert gw.upstream.seen == []


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"queue": "nowhere"}, "queue"),
        ({"queue": "webhooks"}, "queue"),
        ({"endpoint": "models"}, "endpoint"),
        ({"priority": "urgent"}, "priority"),
        ({"webhook": "http://127.0.0.1/x"}, "webhook"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"delay": -1}, "delay"),
        ({"run_before": 5}, "run_before"),
        ({"when": "now"}, "when"),
        ({"idempotency_key": ""}, "idempotency_key"),
    ],
)
async def test_what_is_wrong_with_a_new_job_is_named(url, wrong, param):
    """400 that names the field, before anything is stored."""
    async with gateway(url) as gw:
        reply = await gw.post("/v1/jobs", {"endpoint": "chat/completions", "body": body(), **wrong}, headers=of("app"))
        assert (reply.status, reply.data["error"]["param"]) == (400, param)
        assert (await gw.get("/v1/jobs", headers=of("app"))).data["data"] == []


async def test_a_job_passes_the_whole_admission(url):
    """What a live request would be refused for, a job is refused for when it is taken: scope, limit, budget, form."""
    narrow = {"id": "narrow", "models": ["openai/*"]}
    key = new_key()
    narrow["hash"] = hash_key(key, PEPPER)
    limit = {"use": "rate_limit", "config": {"limits": [{"name": "all", "requests": 2, "per": "1h"}]}}
    async with gateway(url, limit, keys=[narrow]) as gw:
        new = {"endpoint": "chat/completions", "body": body()}
        for path, request, headers in (("/v1/chat/completions", body(), ASYNC), ("/v1/jobs", new, {})):
            refused = await gw.post(path, request, headers={"Authorization": f"Bearer {key}", **headers})
            assert (refused.status, refused.data["error"]["code"]) == (404, "model_not_found")
        bad = await gw.post("/v1/jobs", {**new, "body": {"model": MODEL}}, headers=of("app"))
        assert (bad.status, bad.data["error"]["param"]) == (400, "messages")
        assert [(await gw.post("/v1/jobs", new, headers=of("app"))).status for _ in range(3)] == [202, 202, 429]
        assert len((await gw.get("/v1/jobs", headers=of("app"))).data["data"]) == 2


async def test_the_same_key_is_the_same_job(url):
    """An idempotency key: the same request is the same job, marked so; another one is refused; another tenant's is its own."""
    async with gateway(url) as gw:
        once = {"Idempotency-Key": "once", **ASYNC, **of("app")}
        first = await gw.post("/v1/chat/completions", body(), headers=once)
        again = await gw.post("/v1/chat/completions", body(), headers={**once, **of("friend")})
        assert (again.status, again.data["id"]) == (202, first.data["id"])
        assert again.headers["idempotent-replayed"] == "true"
        assert "idempotent-replayed" not in first.headers
        other = await gw.post("/v1/chat/completions", body("Other"), headers=once)
        assert (other.status, other.data["error"]["code"]) == (409, "idempotency_key_reused")
        theirs = await gw.post("/v1/chat/completions", body(), headers={**once, **of("other")})
        assert theirs.data["id"] != first.data["id"]
        await work(gw, first.data["id"])
        assert (await gw.post("/v1/chat/completions", body(), headers=once)).status == 200
        same = {"endpoint": "chat/completions", "body": body(), "idempotency_key": "two"}
        made = [(await gw.post("/v1/jobs", same, headers=of("app"))).data["id"] for _ in range(2)]
        assert made[0] == made[1]


async def test_a_rule_may_make_a_job(url):
    """By `offload: true`, or for its size: the client did not ask for it, and is told where its answer will be."""
    rule = {"name": "nightly", "when": {"tasks": "report"}, "offload": True}
    routing = {"use": "routing", "config": {"rules": [rule], "tasks": {"report": {"use": "a/model"}}}}
    queues = {"reports": {"tasks": ["report"]}}
    async with gateway(url, routing, queues=queues, offload={"above_input_tokens": 1000}) as gw:
        assert (await gw.post("/v1/chat/completions", body(), headers=of("app"))).status == 200
        large = await gw.post("/v1/chat/completions", body("word " * 2000), headers=of("app"))
        assert (large.status, large.data["queue"], "preference-applied" in large.headers) == (202, "default", False)
        by_task = await gw.post("/v1/chat/completions", body(), headers={"X-Xenios-Task": "report", **of("app")})
        assert (by_task.status, by_task.data["queue"], by_task.data["task"]) == (202, "reports", "report")
        await work(gw, by_task.data["id"])
        assert gw.upstream.seen[-1].model == "a/model"


async def test_a_tenants_queue_has_an_end(url):
    """More waiting jobs than a tenant may have are 429; a request that is too large for a job is 413."""
    async with gateway(url, max_waiting=2, max_body=2000) as gw:
        await taken(gw)
        await taken(gw, "friend")
        full = await gw.post("/v1/chat/completions", body(), headers={**ASYNC, **of("app")})
        assert (full.status, full.data["error"]["code"]) == (429, "too_many_jobs")
        await taken(gw, "other")
        large = await gw.post("/v1/chat/completions", body("x" * 3000), headers={**ASYNC, **of("other")})
        assert large.status == 413


# --- shown ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("P14.jobs")
async def test_jobs_are_their_tenants(url):
    """Another tenant's job is 404 at every route; a key of the same tenant sees it; an administrator if it names whose."""
    async with gateway(url) as gw:
        job_id = await taken(gw)
        paths = [("GET", ""), ("GET", "/result"), ("GET", "/stream"), ("POST", "/cancel"), ("DELETE", "")]
        for method, path in paths:
            for headers in (of("other"), {}):
                reply = await gw.request(method, f"/v1/jobs/{job_id}{path}", headers=headers)
                assert (reply.status, reply.data["error"]["code"]) == (404, "not_found"), (method, path)
        assert (await gw.get("/v1/jobs", headers=of("other"))).data["data"] == []
        assert (await shown(gw, job_id, "friend"))["status"] == "queued"
        assert (await gw.get(f"/v1/jobs/{job_id}?tenant=app")).data["id"] == job_id
        assert [j["id"] for j in (await gw.get("/v1/jobs?tenant=*")).data["data"]] == [job_id]
        assert (await gw.get("/v1/jobs?tenant=app", headers=of("other"))).status == 403


@pytest.mark.promise("P14.cache")
@pytest.mark.parametrize("late", [False, True], ids=["live", "job"])
async def test_nobody_gets_what_another_was_answered(url, late):
    """The same bytes from two tenants, as a job under the same `Idempotency-Key`: each has an answer made for it alone."""
    answers = {name: Json(chat_completion(f"An answer for {name}")) for name in ("app", "other")}
    async with gateway(url, upstream=ScriptedUpstream(*answers.values())) as gw:
        for name in answers:
            headers = of(name) | ({**ASYNC, "Idempotency-Key": "once"} if late else {})
            reply = await gw.post("/v1/chat/completions", body(), headers=headers)
            assert "idempotent-replayed" not in reply.headers
            if late:
                assert reply.status == 202
                await work(gw, reply.data["id"])
                reply = await gw.get(f"/v1/jobs/{reply.data['id']}/result", headers=of(name))
            assert reply.status == 200
            assert reply.data["choices"][0]["message"]["content"] == f"An answer for {name}"
        assert len(gw.upstream.seen) == len(answers)


async def test_a_list_is_paged_as_openais_are(url):
    """Newest first, `has_more` and `last_id`, filters; a page after a job that is not there is 400."""
    async with gateway(url) as gw:
        made = [await taken(gw) for _ in range(5)]
        await work(gw, made[0])
        first = (await gw.get("/v1/jobs?limit=3", headers=of("app"))).data
        assert (first["object"], first["has_more"], first["last_id"]) == ("list", True, first["data"][-1]["id"])
        rest = (await gw.get(f"/v1/jobs?limit=3&after={first['last_id']}", headers=of("app"))).data
        assert {j["id"] for j in first["data"] + rest["data"]} == set(made)
        assert not rest["has_more"]
        done = (await gw.get("/v1/jobs?status=succeeded&queue=default", headers=of("app"))).data["data"]
        assert [j["id"] for j in done] == [made[0]]
        assert (await gw.get("/v1/jobs?task=x", headers=of("app"))).data["data"] == []
        for query in ("status=done", "after=job_x", "limit=0", "what=1"):
            assert (await gw.get(f"/v1/jobs?{query}", headers=of("app"))).status == 400, query


async def test_a_job_is_deleted_unless_it_runs(url):
    """What waits or has ended is forgotten with its result, and a worker finds nothing; what runs is 409."""
    go = asyncio.Event()
    upstream = ScriptedUpstream(Stream(*chat_events("Hi")[:1], Until(go), *chat_events("Hi")[1:]))
    async with gateway(url, upstream=upstream) as gw:
        waiting, running = await taken(gw), await taken(gw, stream=True)
        deleted = await gw.request("DELETE", f"/v1/jobs/{waiting}", headers=of("app"))
        assert deleted.data == {"id": waiting, "object": "job", "deleted": True}
        assert await work(gw, waiting) is None
        task = spawn(work(gw, running))
        await gw.upstream.wait_seen(1)
        assert (await gw.request("DELETE", f"/v1/jobs/{running}", headers=of("app"))).status == 409
        go.set()
        await task
        assert (await gw.request("DELETE", f"/v1/jobs/{running}", headers=of("app"))).status == 200
        assert (await gw.get(f"/v1/jobs/{running}/result", headers=of("app"))).status == 404


# --- followed ---------------------------------------------------------------------------------------------------------


async def test_an_upstreams_own_ids_do_not_lead_astray(url):
    """An upstream numbers its events in its own way, in an `id` of each: whoever goes on behind the last id that it heard
    misses nothing and gets nothing twice; the result has the bytes as they came.
    """
    plain = [encode_step(step) for step in chat_events("Hello there")]
    said = [b"%bid: %d\n\n" % (event[:-1], 9_000_000 + n) for n, event in enumerate(plain)]
    async with gateway(url, upstream=ScriptedUpstream(Stream(*said))) as gw:
        job_id = await taken(gw, stream=True)
        await work(gw, job_id)
        path = f"/v1/jobs/{job_id}"
        whole = (await gw.get(f"{path}/stream", headers=of("app"))).body
        heard = [int(n) for n in re.findall(rb"(?m)^id: (.*)$", whole)]
        assert heard == [*range(1, whole.count(b"\n\n") + 1)]
        rest = await gw.get(f"{path}/stream", headers={"Last-Event-ID": "2", **of("app")})
        assert rest.body == whole[whole.index(b"id: 3\n") :]
        assert (await gw.get(f"{path}/result", headers=of("app"))).body.count(b"id: 900000") == len(heard)


async def test_a_stream_is_followed_live(url):
    """A watcher who came before the job ran sees each event while it is made, and exactly those of a live client."""
    go = asyncio.Event()
    said = chat_events("Hello there, how are you?", pieces=4)
    upstream = ScriptedUpstream(Stream(*said), Stream(*said[:4], Until(go), *said[4:]))
    async with gateway(url, upstream=upstream) as gw:
        live = await gw.chat(stream=True)
        job_id = await taken(gw, stream=True)
        async with gw.session.get(f"{gw.url}/v1/jobs/{job_id}/stream", headers=of("app")) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            task = spawn(work(gw, job_id))
            seen = b""
            async with asyncio.timeout(5):
                while b"id: 3\n" not in seen:
                    seen += await reply.content.readany()
            assert b"[DONE]" not in seen
            go.set()
            async for more in reply.content.iter_any():
                seen += more
        await task
        numbers, events_ = without_ids(seen)
        assert numbers == list(range(1, len(numbers) + 1))
        assert events_ == live.body
        replayed = await gw.get(f"/v1/jobs/{job_id}/stream", headers=of("app"))
        assert without_ids(replayed.body) == (numbers, live.body)


@pytest.mark.parametrize("way", ["query", "header"])
@pytest.mark.parametrize("when", ["running", "ended"])
async def test_who_lost_the_connection_goes_on(url, way, when):
    """`after=N`, or Last-Event-ID: the events after that one, from Redis while it runs, from the database afterwards."""
    go = asyncio.Event()
    said = chat_events("Hello there, how are you?", pieces=4)
    upstream = ScriptedUpstream(Stream(*said[:3], Until(go), *said[3:]))
    async with gateway(url, upstream=upstream) as gw:
        job_id = await taken(gw, stream=True)
        whole = spawn(gw.get(f"/v1/jobs/{job_id}/stream", headers=of("app")))
        task = spawn(work(gw, job_id))
        if when == "ended":
            go.set()
            await task
            all_events = (await whole).events
        more = {"Last-Event-ID": "2"} if way == "header" else {}
        path = f"/v1/jobs/{job_id}/stream" + ("?after=2" if way == "query" else "")
        rest = spawn(gw.get(path, headers={**of("app"), **more}))
        if when == "running":
            await gw.upstream.wait_seen(1)
            go.set()
            await task
            all_events = (await whole).events
        assert [e for e in (await rest).events if e.startswith(b"id")] == [
            e for e in all_events if e.startswith(b"id")
        ][2:]
        assert (await gw.get(f"/v1/jobs/{job_id}/stream?after=x", headers=of("app"))).status == 400


async def test_a_whole_answer_is_followed_by_its_states(url):
    """A job without a stream tells that it waits, runs and has ended, and then its result."""
    async with gateway(url, upstream=ScriptedUpstream(Json(chat_completion("Hi")))) as gw:
        job_id = await taken(gw)
        watching = spawn(gw.get(f"/v1/jobs/{job_id}/stream", headers=of("app")))
        await work(gw, job_id)
        told = events((await watching).body)
        assert [name for name, _ in told][-2:] == ["job.running", "job.succeeded"]
        assert told[-1][1]["result"]["choices"][0]["message"]["content"] == "Hi"
        assert told[-1][1]["job"]["status"] == "succeeded"
        later = await gw.get(f"/v1/jobs/{job_id}/stream?after=2", headers=of("app"))
        assert [name for name, _ in events(later.body)] == ["job.succeeded"]


async def test_a_second_run_begins_anew_and_says_so(url):
    """Who had events of a run that failed is told that the job was restarted, then gets all of the next one."""
    said = chat_events("Hello there", pieces=3)
    upstream = ScriptedUpstream(Stream(*said[:3], end="cut"), Stream(*said))
    async with gateway(url, upstream=upstream) as gw:
        job_id = await taken(gw, stream=True)
        watching = spawn(gw.get(f"/v1/jobs/{job_id}/stream", headers=of("app")))
        await asyncio.sleep(0)
        assert await work(gw, job_id)
        await due(gw, job_id)
        resumed = spawn(gw.get(f"/v1/jobs/{job_id}/stream?after=2", headers=of("app")))
        await work(gw, job_id)
        for stream in (await watching, await resumed):
            numbers, _ = without_ids(stream.body)
            second = [n for n in numbers if n > 1_000_000]
            assert second == list(range(1_000_001, 1_000_001 + len(second)))
            if numbers[0] < 1_000_000 or stream is await resumed:
                assert b"event: job.restarted" in stream.body
        replayed = await gw.get(f"/v1/jobs/{job_id}/stream", headers=of("app"))
        assert b"restarted" not in replayed.body
        assert b"[DONE]" in replayed.body


# --- how it ends ------------------------------------------------------------------------------------------------------


async def test_what_a_later_try_may_mend_is_tried_again(url):
    """A 503, then a 429 that names its time: tried again after a while, as often as the queue says; all is in the rows."""
    upstream = ScriptedUpstream(Error(503), Error(429, headers={"Retry-After": "30"}), Json(chat_completion("Hi")))
    async with gateway(url, upstream=upstream, queues={"default": {"attempts": 3, "backoff": "2s"}}) as gw:
        job_id = await taken(gw)
        assert await work(gw, job_id) == 2
        waiting = await shown(gw, job_id)
        assert (waiting["status"], waiting["attempts"], waiting["error"]["code"]) == ("queued", 1, "upstream_error")
        assert 0 < await work(gw, job_id) <= 2  # not due yet
        await due(gw, job_id)
        assert await work(gw, job_id) == 30
        await due(gw, job_id)
        assert await work(gw, job_id) is None
        done = await shown(gw, job_id)
        assert (done["status"], done["attempts"], done["error"]) == ("succeeded", 3, None)
        found = await rows(gw, 3)
        assert [row["id"] for row in found] == [f"{job_id}-{n}" for n in (1, 2, 3)]
        assert [row["outcome"] for row in found] == ["upstream_error", "upstream_error", "ok"]


async def test_a_job_that_keeps_failing_is_kept_as_failed(url):
    """After its last try it has failed, with the answer that a client would have got, and can be retried by hand."""
    upstream = ScriptedUpstream(Error(503), Error(503), Json(chat_completion("Hi")))
    async with gateway(url, upstream=upstream, queues={"default": {"attempts": 2}}) as gw:
        job_id = await taken(gw)
        assert await work(gw, job_id)
        await due(gw, job_id)
        assert await work(gw, job_id) is None
        failed = await shown(gw, job_id)
        assert (failed["status"], failed["attempts"], failed["error"]["code"]) == ("failed", 2, "upstream_error")
        assert (await gw.get(f"/v1/jobs/{job_id}/result", headers=of("app"))).status == 503
        assert await jobs(gw).store.retry(job_id, attempts=2, run_within=60)
        await work(gw, job_id)
        assert (await shown(gw, job_id))["status"] == "succeeded"


async def test_what_no_try_mends_fails_at_once(url):
    """A request that its upstream refuses is not repeated."""
    async with gateway(url, upstream=ScriptedUpstream(Error(400, "Bad"))) as gw:
        job_id = await taken(gw)
        assert await work(gw, job_id) is None
        assert (await shown(gw, job_id))["status"] == "failed"


async def test_a_limit_of_ours_makes_it_wait(url):
    """A run that a limit refuses before anything was sent waits for as long as the limit says, and loses no attempt."""
    limit = {"use": "rate_limit", "config": {"limits": [{"name": "all", "tokens": 100, "per": "1m"}]}}
    usage = {"prompt_tokens": 30, "completion_tokens": 60, "total_tokens": 90}
    upstream = ScriptedUpstream(default=Json(chat_completion(usage=usage)))
    async with gateway(url, limit, upstream=upstream) as gw:
        jobs_ = [await taken(gw, max_tokens=60) for _ in range(2)]
        assert await work(gw, jobs_[0]) is None
        assert await work(gw, jobs_[1])
        waiting = await shown(gw, jobs_[1])
        assert (waiting["status"], waiting["attempts"], waiting["max_attempts"]) == ("queued", 1, 4)
        assert waiting["error"]["code"] == "rate_limit_exceeded"
        assert len(gw.upstream.seen) == 1


async def test_who_asked_must_still_be_allowed_to(url):
    """A key that was revoked when its job runs: failed `principal_gone`, and no model is asked."""
    async with gateway(url) as gw:
        made = (await gw.post("/admin/keys", {"id": "brief", "tenant": "app"})).data
        reply = await gw.post(
            "/v1/chat/completions", body(), headers={**ASYNC, "Authorization": f"Bearer {made['key']}"}
        )
        assert (await gw.request("POST", "/admin/keys/brief/revoke")).status == 200
        await work(gw, reply.data["id"])
        failed = await shown(gw, reply.data["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "principal_gone")
        assert gw.upstream.seen == []


async def test_what_comes_too_late_is_not_run(url):
    """A job that could not be run before its `run_before` has failed; its result says so."""
    async with gateway(url) as gw:
        job_id = await taken(gw)
        await gw.snapshot.services.database.execute("UPDATE jobs_jobs SET run_before = 1")
        await work(gw, job_id)
        failed = await shown(gw, job_id)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "run_before_passed")
        gone = await gw.get(f"/v1/jobs/{job_id}/result", headers=of("app"))
        assert (gone.status, gone.data["error"]["code"]) == (409, "run_before_passed")
        assert gw.upstream.seen == []


async def test_what_waits_is_cancelled_at_once(url):
    """Taken out of its queue: no worker runs it; twice is the same; its result is 409."""
    async with gateway(url) as gw:
        job_id = await taken(gw)
        for _ in range(2):
            reply = await gw.request("POST", f"/v1/jobs/{job_id}/cancel", headers=of("app"))
            assert (reply.status, reply.data["status"]) == (200, "cancelled")
        assert await gw.plugin("jobs").queue.unknown("job", [job_id]) == {job_id}
        assert await work(gw, job_id) is None
        assert gw.upstream.seen == []
        result = await gw.get(f"/v1/jobs/{job_id}/result", headers=of("app"))
        assert (result.status, result.data["error"]["code"]) == (409, "job_cancelled")


@pytest.mark.parametrize("moment", ["begin", "ring", "request"])
async def test_what_is_stopped_as_it_begins_is_cancelled(url, monkeypatch, moment):
    """Whoever sees that a job runs and cancels it at once sees it end: not one that runs on and on without a worker."""
    async with gateway(url) as gw:
        job_id, runner = await taken(gw), jobs(gw).runner
        there = runner._events if moment == "ring" else runner._store
        does, reached = getattr(there, moment), asyncio.Event()

        async def lasts(*given):
            await does(*given)
            reached.set()
            await asyncio.Event().wait()

        async def run():
            functions.reason.set(lambda: "stop")
            await runner.run(job_id)

        with monkeypatch.context() as patched:
            patched.setattr(there, moment, lasts)
            running = spawn(run())
            await reached.wait()
        assert (await shown(gw, job_id))["status"] == "running"
        running.cancel()
        await asyncio.wait([running])
        assert (await shown(gw, job_id))["status"] == "cancelled"
        assert gw.upstream.seen == []


# --- looked after -----------------------------------------------------------------------------------------------------


async def test_what_redis_forgot_is_enqueued_again(url):
    """After a Redis that lost everything, what waits and what nobody runs any more is in the queue again."""
    async with gateway(url, worker={"lease": "5s"}) as gw:
        waiting, running = await taken(gw), await taken(gw)
        database, queue = gw.snapshot.services.database, gw.plugin("jobs").queue
        await database.execute("UPDATE jobs_jobs SET created_at = 1")
        await database.execute("UPDATE jobs_jobs SET status = 'running', seen_at = 1 WHERE id = $1", running)
        await gw.snapshot.services.redis.client.flushall()
        assert await queue.unknown("job", [waiting, running]) == {waiting, running}
        await jobs(gw).tidy()
        assert await queue.unknown("job", [waiting, running]) == set()


async def test_a_worker_that_keeps_dying_with_a_job_ends_it(url):
    """A job with which ten workers died has failed: it is not run for ever, and waits longer each time for the next."""
    async with gateway(url, queues={"default": {"attempts": 2, "backoff": "1s"}}) as gw:
        job_id = await taken(gw)
        await lost(gw, job_id)
        waits = []
        for _ in range(MOST_LOSSES - 1):
            await killed(gw, job_id)
            waits.append(await work(gw, job_id))
            await due(gw, job_id)
        assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, None]
        failed = await shown(gw, job_id)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "worker_lost")
        assert "10 worker processes died" in failed["error"]["message"]


async def test_workers_that_are_killed_take_no_attempts(url):
    """Workers are killed more often than a job may be tried: it is still answered, and an upstream's failure still has
    all its tries.
    """
    upstream = ScriptedUpstream(Error(500), default=Json(chat_completion("Hi")))
    async with gateway(url, upstream=upstream, queues={"default": {"attempts": 2}}) as gw:
        job_id = await taken(gw)
        for _ in range(3):
            await lost(gw, job_id)
        assert await work(gw, job_id) is not None
        await due(gw, job_id)
        await killed(gw, job_id)
        assert await work(gw, job_id) == 8.0
        await due(gw, job_id)
        assert await work(gw, job_id) is None
        job = await shown(gw, job_id)
        assert (job["status"], job["attempts"]) == ("succeeded", 6)


async def lost(gw, job_id):
    """That has been noticed."""
    await killed(gw, job_id)
    store = jobs(gw).store
    await store.lose(await store.get(job_id), code="worker_lost", message="", after=0)


async def killed(gw, job_id):
    """A worker began it, and died."""
    store = jobs(gw).store
    job = await store.get(job_id)
    await store.begin(job, f"{job_id}-{job.attempts + 1}")


async def test_what_was_cancelled_by_the_database_alone_ends(url):
    """`xenios jobs cancel` only notes it: the next tidying cancels what waits, and tells its watchers."""
    async with gateway(url) as gw:
        job_id = await taken(gw)
        await jobs(gw).store.ask_cancel(job_id)
        await gw.snapshot.services.database.execute("UPDATE jobs_jobs SET cancel_asked = 1")
        await jobs(gw).tidy()
        assert (await shown(gw, job_id))["status"] == "cancelled"
