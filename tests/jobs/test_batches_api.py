"""/v1/batches from outside: every line has one result, whatever happens meanwhile, and what a batch says is true."""

import asyncio
import json

import pytest

from gateway import StatementError, StoreUnavailable
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Error, Hang, Json, ScriptedUpstream, chat_completion
from tests.jobs.inline import Inline
from tests.jobs.test_files_api import KEYS, other_tenant, upload
from tests.stores.postgres import postgres_server

CHAT = "/v1/chat/completions"
SETTINGS = {"chunk_lines": 10, "lanes": 5, "backoff": "1ms"}


def batches(upstream=None, *more, database=None, **settings):
    config = {"batches": {**SETTINGS, **settings}}
    services = {"services": {"database": {"url": database}}} if database else None
    return Gateway.test(plugins=[KEYS, "usage", (Inline, config), *more], upstream=upstream, settings=services)


def line(custom_id, text="Hello", url=CHAT, model="test/model", **fields):
    body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


async def create(gw, *lines, headers=None, endpoint=CHAT, **fields):
    file = await upload(gw, "\n".join(lines).encode(), headers=headers)
    assert file.status == 200, file.body
    body = {"input_file_id": file.data["id"], "endpoint": endpoint, "completion_window": "24h", **fields}
    reply = await gw.post("/v1/batches", body, headers=headers)
    assert reply.status == 200, reply.body
    return reply.data


async def ended(gw, batch, headers=None, seconds=10):
    async with asyncio.timeout(seconds):
        while True:
            found = (await gw.get(f"/v1/batches/{batch['id']}", headers=headers)).data
            if found["status"] in {"completed", "failed", "expired", "cancelled"}:
                return found
            await asyncio.sleep(0.02)


async def lines_of(gw, file_id, headers=None):
    if file_id is None:
        return []
    reply = await gw.get(f"/v1/files/{file_id}/content", headers=headers)
    assert reply.status == 200
    return [json.loads(found) for found in reply.body.splitlines()]


def inline(gw):
    return gw.plugin("Inline").inline


async def usage(gw):
    async with asyncio.timeout(5):
        await gw.snapshot.services.ledger.flush()
        return await gw.snapshot.services.database.fetch("SELECT * FROM usage_requests")


async def until(condition, seconds=5):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_every_line_has_one_result():
    """Over several chunks; the answers are the upstream's, and counts, tokens, times and files agree."""
    async with ScriptedUpstream() as upstream, batches(upstream) as gw:
        batch = await create(gw, *(line(f"id-{i}") for i in range(35)), metadata={"a": "b"})
        done = await ended(gw, batch)
        results = await lines_of(gw, done["output_file_id"])
        file = (await gw.get(f"/v1/files/{done['output_file_id']}")).data
        rows = await usage(gw)
        await until(lambda: not inline(gw).running)
        left = await gw.snapshot.services.database.fetch(
            "SELECT batch FROM jobs_lines UNION SELECT batch FROM jobs_chunks"
        )
    assert (batch["status"], batch["object"], batch["metadata"]) == ("validating", "batch", {"a": "b"})
    assert (done["status"], done["error_file_id"], done["errors"]) == ("completed", None, None)
    assert done["request_counts"] == {"total": 35, "completed": 35, "failed": 0}
    assert sorted(found["custom_id"] for found in results) == sorted(f"id-{i}" for i in range(35))
    assert len({found["id"] for found in results}) == 35
    for found in results:
        assert set(found) == {"id", "custom_id", "response", "error"}
        assert found["error"] is None
        assert found["response"]["status_code"] == 200
        assert found["response"]["body"]["object"] == "chat.completion"
    assert len(upstream.seen) == len(rows) == 35
    assert {row["request_id"] for row in rows} == {found["response"]["request_id"] for found in results}
    assert done["usage"]["total_tokens"] == sum(r["response"]["body"]["usage"]["total_tokens"] for r in results)
    assert done["model"] == "test/model"
    assert done["created_at"] <= done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"]
    assert done["expires_at"] - done["created_at"] == 86400
    assert (file["purpose"], file["filename"]) == ("batch_output", f"{batch['id']}_output.jsonl")
    assert left == []


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "Hello"}),
        ("/v1/responses", {"model": "m", "input": "Hello"}),
        ("/v1/embeddings", {"model": "m", "input": "Hello"}),
    ],
)
async def test_the_other_endpoints_run_too(endpoint, body):
    made = json.dumps({"custom_id": "a", "method": "POST", "url": endpoint, "body": body})
    async with batches() as gw:
        done = await ended(gw, await create(gw, made, endpoint=endpoint))
        [result] = await lines_of(gw, done["output_file_id"])
    assert done["status"] == "completed"
    assert result["response"]["status_code"] == 200


async def test_what_an_upstream_refuses_goes_to_the_error_file():
    """With its status and its body; the rest is delivered."""

    def answer(seen):
        return Error(400, message="no such thing") if "bad" in seen.body.decode() else Json(chat_completion("Hi"))

    async with ScriptedUpstream(default=answer) as upstream, batches(upstream) as gw:
        done = await ended(gw, await create(gw, line("good"), line("bad", "bad")))
        [good] = await lines_of(gw, done["output_file_id"])
        [bad] = await lines_of(gw, done["error_file_id"])
    assert done["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert (good["custom_id"], bad["custom_id"]) == ("good", "bad")
    assert bad["response"]["status_code"] == 400
    assert "no such thing" in bad["response"]["body"]["error"]["message"]
    assert bad["error"] is None


async def test_a_busy_upstream_is_asked_again_a_bounded_number_of_times():
    """Then its status and body stand in the error file."""
    async with ScriptedUpstream(default=Error(503, "busy")) as upstream, batches(upstream, attempts=3) as gw:
        done = await ended(gw, await create(gw, line("a")))
        [bad] = await lines_of(gw, done["error_file_id"])
        rows = await usage(gw)
    assert len(upstream.seen) == len(rows) == 3
    assert bad["response"]["status_code"] == 503


async def test_an_upstream_that_recovers_leaves_no_error():
    async with ScriptedUpstream(Error(429), Error(500)) as upstream, batches(upstream) as gw:
        done = await ended(gw, await create(gw, line("a")))
    assert len(upstream.seen) == 3
    assert done["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


async def test_a_bad_file_fails_with_each_mistake_and_its_line():
    """And nothing of it runs."""
    async with ScriptedUpstream() as upstream, batches(upstream) as gw:
        done = await ended(gw, await create(gw, line("a"), "{", line("a"), line("b", url="/v1/embeddings")))
    assert upstream.seen == []
    assert (done["status"], done["output_file_id"], done["error_file_id"]) == ("failed", None, None)
    assert done["failed_at"] is not None
    assert [(e["line"], e["code"]) for e in done["errors"]["data"]] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "invalid_url"),
    ]


@pytest.mark.parametrize(
    ("changed", "status", "param"),
    [
        ({"endpoint": "/v1/audio/speech"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"input_file_id": "file-none"}, 404, "input_file_id"),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
        ({"what": 1}, 400, "what"),
    ],
)
async def test_what_is_wrong_with_a_batch_is_said(changed, status, param):
    async with batches() as gw:
        file = await upload(gw, line("a").encode())
        body = {"input_file_id": file.data["id"], "endpoint": CHAT, "completion_window": "24h", **changed}
        reply = await gw.post("/v1/batches", body)
    assert (reply.status, reply.data["error"]["param"]) == (status, param)


@pytest.mark.promise("P14.batches")
async def test_a_tenant_sees_its_own_batches_alone():
    """Every route answers another tenant's batch, and its files, as ones that aren't there."""
    async with batches() as gw:
        mine = await ended(gw, await create(gw, line("a")))
        them = await other_tenant(gw)
        asked = [
            await gw.get(f"/v1/batches/{mine['id']}", headers=them),
            await gw.post(f"/v1/batches/{mine['id']}/cancel", headers=them),
            await gw.get(f"/v1/batches?after={mine['id']}", headers=them),
            await gw.get(f"/v1/files/{mine['output_file_id']}/content", headers=them),
            await gw.post(
                "/v1/batches",
                {"input_file_id": mine["input_file_id"], "endpoint": CHAT, "completion_window": "24h"},
                headers=them,
            ),
        ]
        theirs = (await gw.get("/v1/batches", headers=them)).data
        other = await create(gw, line("a"), headers=them)
        admins = await gw.get(f"/v1/batches/{other['id']}?tenant=other")
    assert [reply.status for reply in asked] == [404] * 5
    assert theirs["data"] == []
    assert admins.status == 200


async def test_batches_are_listed_newest_first_in_pages():
    async with batches() as gw:
        inline(gw).held = []
        made = [(await create(gw, line("a")))["id"] for _ in range(3)]
        first = (await gw.get("/v1/batches?limit=2")).data
        rest = (await gw.get(f"/v1/batches?limit=2&after={first['last_id']}")).data
    assert [b["id"] for b in first["data"]] == [made[2], made[1]]
    assert first["has_more"] is True
    assert [b["id"] for b in rest["data"]] == [made[0]]
    assert rest["has_more"] is False


async def test_a_cancelled_batch_delivers_what_was_done():
    """Lines under way are cut off, their upstream's calls closed; the rest never runs."""

    def answer(seen):
        return Json(chat_completion("Hi")) if "first" in seen.body.decode() else Hang()

    async with ScriptedUpstream(default=answer) as upstream, batches(upstream) as gw:
        batch = await create(gw, *(line(f"f{i}", "first") for i in range(3)), *(line(f"s{i}") for i in range(40)))
        await until(lambda: len(upstream.seen) >= 13)  # three, and five lanes in each of two chunks
        async with asyncio.timeout(5):
            while (await gw.get(f"/v1/batches/{batch['id']}")).data["request_counts"]["completed"] < 3:
                await asyncio.sleep(0.01)
        told = (await gw.post(f"/v1/batches/{batch['id']}/cancel")).data
        done = await ended(gw, batch)
        results = await lines_of(gw, done["output_file_id"])
        again = await gw.post(f"/v1/batches/{batch['id']}/cancel")
        rows = await usage(gw)
        count = len(upstream.seen)
    assert told["status"] == "cancelling"
    assert told["cancelling_at"] is not None
    assert (done["status"], done["error_file_id"]) == ("cancelled", None)
    assert done["cancelled_at"] is not None
    assert sorted(found["custom_id"] for found in results) == ["f0", "f1", "f2"]
    assert done["request_counts"] == {"total": 43, "completed": 3, "failed": 0}
    assert again.status == 409
    assert len(rows) == count == 13


async def test_an_expired_batch_says_which_lines_did_not_run():
    """`batch_expired` in the error file for each; what was done is delivered."""

    def answer(seen):
        return Json(chat_completion("Hi")) if "first" in seen.body.decode() else Hang()

    async with ScriptedUpstream(default=answer) as upstream, batches(upstream, window="2s") as gw:
        batch = await create(gw, line("f", "first"), *(line(f"s{i}") for i in range(25)))
        done = await ended(gw, batch)
        [result] = await lines_of(gw, done["output_file_id"])
        late = await lines_of(gw, done["error_file_id"])
    assert (done["status"], result["custom_id"]) == ("expired", "f")
    assert done["expired_at"] is not None
    assert sorted(found["custom_id"] for found in late) == sorted(f"s{i}" for i in range(25))
    assert {(found["response"], found["error"]["code"]) for found in late} == {(None, "batch_expired")}


async def test_the_rest_of_a_batch_whose_key_is_revoked_says_so():
    """`principal_gone` for each line that did not run; no model is asked for it."""
    async with ScriptedUpstream() as upstream, batches(upstream, chunks=1) as gw:
        them = await other_tenant(gw)
        inline(gw).held = []
        batch = await create(gw, *(line(f"id-{i}") for i in range(25)), headers=them)
        await gw.post("/admin/keys/other/revoke")
        await inline(gw).go()
        done = await ended(gw, {"id": f"{batch['id']}?tenant=other"})
        reply = await gw.get(f"/v1/files/{done['error_file_id']}/content?tenant=other")
    found = [json.loads(x) for x in reply.body.splitlines()]
    assert upstream.seen == []
    assert done["request_counts"] == {"total": 25, "completed": 0, "failed": 25}
    assert {(f["response"], f["error"]["code"]) for f in found} == {(None, "principal_gone")}


async def test_a_worker_that_stops_puts_its_lines_back_and_none_that_is_done_runs_again():
    """What was under way is cut off and runs again; each custom_id has one result, each call its usage row."""

    def answer(seen):
        return Hang() if len(upstream.seen) > 7 and not goes_on else Json(chat_completion("Hi"))

    goes_on = []
    async with ScriptedUpstream(default=answer) as upstream, batches(upstream, chunks=1, chunk_lines=50) as gw:
        batch = await create(gw, *(line(f"id-{i}") for i in range(20)))
        chunk = ("chunk", f"{batch['id']}-0")
        await until(lambda: len(upstream.seen) >= 12)
        inline(gw).cancel(chunk, "requeue")
        await until(lambda: chunk not in inline(gw).running)
        between = (await gw.get(f"/v1/batches/{batch['id']}")).data["request_counts"]
        goes_on.append(True)
        await gw.plugin("Inline").part("Batches").tidy()
        done = await ended(gw, batch)
        results = await lines_of(gw, done["output_file_id"])
        rows = await usage(gw)
    assert between == {"total": 20, "completed": 7, "failed": 0}
    assert sorted(found["custom_id"] for found in results) == sorted(f"id-{i}" for i in range(20))
    assert done["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    assert len(upstream.seen) == len(rows) == 25


async def test_lines_wait_for_their_own_rate_limit():
    """They are not failed by it, and what was refused leaves no row."""
    limits = {"use": "rate_limit", "config": {"limits": [{"name": "few", "concurrent": 2}]}}
    async with (
        ScriptedUpstream(default=Json(chat_completion("Hi"), delay=0.02)) as upstream,
        Gateway.test(plugins=[KEYS, "usage", limits, (Inline, {"batches": SETTINGS})], upstream=upstream) as gw,
    ):
        done = await ended(gw, await create(gw, *(line(f"id-{i}") for i in range(8))), seconds=30)
        rows = await usage(gw)
    assert done["request_counts"] == {"total": 8, "completed": 8, "failed": 0}
    assert len(rows) == len(upstream.seen) == 8


async def test_an_exhausted_budget_ends_lines_instead_of_keeping_them():
    """Once it is spent waiting would not help: the error file says `insufficient_quota`."""
    budget = {
        "use": "budgets",
        "config": {"budgets": [{"name": "all", "usd": 0.0001, "per": "total"}], "unknown_price": "allow"},
    }
    async with ScriptedUpstream(default=Json(chat_completion(cost=0.0002))) as upstream:
        plugins = [KEYS, "usage", budget, (Inline, {"batches": SETTINGS})]
        async with Gateway.test(plugins=plugins, upstream=upstream) as gw:
            done = await ended(gw, await create(gw, *(line(f"id-{i}") for i in range(12))))
            found = await lines_of(gw, done["error_file_id"])
    assert done["request_counts"]["failed"] >= 1
    assert {f["response"]["body"]["error"]["code"] for f in found} == {"insufficient_quota"}


async def test_a_file_deleted_while_its_batch_runs_is_kept_until_the_end():
    """It is gone for its owner at once; every line still runs; then the bytes go."""
    async with batches() as gw:
        inline(gw).held = []
        batch = await create(gw, *(line(f"id-{i}") for i in range(15)))
        deleted = await gw.request("DELETE", f"/v1/files/{batch['input_file_id']}")
        gone = await gw.get(f"/v1/files/{batch['input_file_id']}")
        await inline(gw).go()
        done = await ended(gw, batch)
        await gw.plugin("Inline").part("Files").tidy()
        folder = gw.plugin("Inline").part("Files").storage._folder
        left = [p.name for p in folder.iterdir()]
    assert (deleted.status, gone.status) == (200, 404)
    assert done["request_counts"] == {"total": 15, "completed": 15, "failed": 0}
    assert left == [done["output_file_id"]]


async def test_a_file_that_loses_its_bytes_while_its_batch_runs_fails_the_rest():
    """Each line that can't be read any more says so under its custom_id; none is lost, none runs twice."""

    def answer(seen):
        return Json(chat_completion("Hi"))

    async with ScriptedUpstream(default=answer) as upstream, batches(upstream, chunks=1) as gw:
        inline(gw).held = []
        batch = await create(gw, *(line(f"id-{i}") for i in range(30)))
        path = gw.plugin("Inline").part("Files").storage._folder / batch["input_file_id"]
        [(kind, work)] = inline(gw).held
        await inline(gw).handlers[kind](work)  # it is checked
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        await inline(gw).go()
        await gw.plugin("Inline").part("Batches").tidy()
        done = await ended(gw, batch)
        good = await lines_of(gw, done["output_file_id"])
        bad = await lines_of(gw, done["error_file_id"])
    assert sorted(f["custom_id"] for f in (*good, *bad)) == sorted(f"id-{i}" for i in range(30))
    assert {f["error"]["code"] for f in bad} == {"input_file_lost"}
    assert len(upstream.seen) == len(good) == 10  # the first chunk is whole


async def test_a_line_of_ten_megabytes_runs():
    """It makes a chunk of its own."""
    async with ScriptedUpstream() as upstream, batches(upstream) as gw:
        done = await ended(gw, await create(gw, line("a"), line("big", "x" * 10_000_000), line("c")))
    assert done["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    assert max(len(seen.body) for seen in upstream.seen) > 10_000_000


async def test_what_redis_forgot_goes_on():
    """Whatever was enqueued when Redis came back empty: the tidying enqueues it again, at every step."""
    async with batches(chunks=1) as gw:
        part = gw.plugin("Inline").part("Batches")
        queue = inline(gw)
        queue.held = []
        batch = await create(gw, *(line(f"id-{i}") for i in range(15)))
        steps = []
        while (await gw.get(f"/v1/batches/{batch['id']}")).data["completed_at"] is None:
            queue.held.clear()
            await part.tidy()
            steps += [kind for kind, _ in queue.held]
            for kind, work in [*queue.held]:
                await queue.handlers[kind](work)
            assert len(steps) < 10
        done = (await gw.get(f"/v1/batches/{batch['id']}")).data
    assert steps == ["batch", "chunk", "chunk", "batch"]
    assert done["request_counts"] == {"total": 15, "completed": 15, "failed": 0}


async def test_only_so_many_calls_of_a_batch_are_under_way():
    """`lanes` times `chunks`, however long the file is."""
    async with ScriptedUpstream(default=Json(chat_completion("Hi"), delay=0.03)) as upstream:
        most = 0

        def watched(seen):
            nonlocal most
            under_way = sum(not s.finished.is_set() and not s.closed.is_set() for s in upstream.seen)
            most = max(most, under_way)
            return Json(chat_completion("Hi"), delay=0.03)

        upstream._default = watched
        async with batches(upstream, lanes=3, chunks=2) as gw:
            done = await ended(gw, await create(gw, *(line(f"id-{i}") for i in range(60))))
    assert done["request_counts"]["completed"] == 60
    assert most == 6


async def test_results_of_a_chunk_that_two_workers_run_count_once():
    """A worker that was taken for dead goes on: each line has one result, each call its row."""

    def answer(seen):
        return Json(chat_completion("Hi"), delay=0.1)

    async with ScriptedUpstream(default=answer) as upstream, batches(upstream) as gw:
        inline(gw).held = []
        batch = await create(gw, *(line(f"id-{i}") for i in range(10)))
        queue = inline(gw)
        [(kind, work)] = queue.held
        await queue.handlers[kind](work)
        chunk = f"{batch['id']}-0"
        await asyncio.gather(queue.handlers["chunk"](chunk), queue.handlers["chunk"](chunk))
        await queue.go()
        done = await ended(gw, batch)
        results = await lines_of(gw, done["output_file_id"])
        rows = await usage(gw)
    assert sorted(f["custom_id"] for f in results) == sorted(f"id-{i}" for i in range(10))
    assert done["request_counts"] == {"total": 10, "completed": 10, "failed": 0}
    assert len(rows) == len(upstream.seen) == 20


async def test_a_database_that_is_away_when_an_answer_comes_costs_no_second_call():
    """What was paid for is kept until it can be stored."""
    async with ScriptedUpstream() as upstream, batches(upstream) as gw:
        database = gw.snapshot.services.database
        transaction, failed = database.transaction, []

        def broken(*args, **kwargs):
            if upstream.seen and len(failed) < 3:
                failed.append(True)
                raise StoreUnavailable
            return transaction(*args, **kwargs)

        database.transaction = broken
        done = await ended(gw, await create(gw, *(line(f"id-{i}") for i in range(4))))
    assert len(failed) == 3
    assert len(upstream.seen) == 4
    assert done["request_counts"] == {"total": 4, "completed": 4, "failed": 0}


@pytest.mark.full
async def test_a_row_that_cannot_be_stored_spoils_no_other():
    """Lines that end together are committed together; one bad statement is its line's own."""
    async with ScriptedUpstream() as upstream, batches(upstream) as gw:
        write, spoilt = gw.snapshot.services.rows.write, []

        async def broken(statements, row):
            if f"{7:08x}".encode() in row:
                spoilt.append(row)
                raise StatementError("no such value")
            await write(statements, row)

        gw.snapshot.services.rows.write = broken
        done = await ended(gw, await create(gw, *(line(f"id-{i}") for i in range(10))), seconds=30)
        [bad] = await lines_of(gw, done["error_file_id"])
    assert len(spoilt) >= 5
    assert done["request_counts"] == {"total": 10, "completed": 9, "failed": 1}
    assert (bad["custom_id"], bad["error"]["code"]) == ("id-7", "internal_error")
    assert len(upstream.seen) == 14


async def test_what_became_of_lines_and_batches_is_counted():
    async with batches(None, "metrics") as gw:
        await ended(gw, await create(gw, line("a"), line("b")))
        inline(gw).held = []
        await create(gw, line("a"))
        await gw.plugin("Inline").part("Batches").tidy()
        told = (await gw.get("/metrics")).body.decode()
    assert 'xenios_batch_lines_total{outcome="succeeded"} 2.0' in told
    assert 'xenios_batches{status="validating"} 1.0' in told


async def test_old_batches_go():
    async with batches() as gw:
        done = await ended(gw, await create(gw, line("a")))
        await until(lambda: not inline(gw).running)
        await gw.snapshot.services.database.execute("UPDATE jobs_batches SET ended_at = 1")
        await gw.plugin("Inline").part("Batches").tidy()
        reply = await gw.get(f"/v1/batches/{done['id']}")
    assert reply.status == 404


@pytest.fixture
async def postgres():
    with postgres_server() as server:
        yield await server.new()


async def test_postgresql_keeps_them_as_well(postgres):
    """The same on PostgreSQL: good lines, bad ones, a chunk that runs twice, cancelled, expired, listed, tidied."""

    def answer(seen):
        body = seen.body.decode()
        return Error(400) if "bad" in body else Hang() if "never" in body else Json(chat_completion("Hi"), delay=0.05)

    async with ScriptedUpstream(default=answer) as upstream:
        async with batches(upstream, database=postgres) as gw:
            inline(gw).held = []
            batch = await create(gw, *(line(f"id-{i}") for i in range(25)), line("bad", "bad"))
            [(kind, work)] = inline(gw).held
            await inline(gw).handlers[kind](work)
            chunk = f"{batch['id']}-0"
            await asyncio.gather(*(inline(gw).handlers["chunk"](chunk) for _ in range(2)))
            await inline(gw).go()
            done = await ended(gw, batch)
            good, bad = await lines_of(gw, done["output_file_id"]), await lines_of(gw, done["error_file_id"])
            rows = await usage(gw)
            other = await create(gw, line("a"), line("b", "never"))
            await until(lambda: len(upstream.seen) == 38)
            async with asyncio.timeout(5):
                while (await gw.get(f"/v1/batches/{other['id']}")).data["request_counts"]["completed"] < 1:
                    await asyncio.sleep(0.01)
            await gw.post(f"/v1/batches/{other['id']}/cancel")
            cancelled = await ended(gw, other)
            listed = (await gw.get("/v1/batches?limit=1")).data
            rest = (await gw.get(f"/v1/batches?after={listed['last_id']}")).data
            files = (await gw.get("/v1/files?limit=1&order=asc")).data
            more = (await gw.get(f"/v1/files?after={files['last_id']}&order=asc")).data
            for name in ("Batches", "Files"):
                await gw.plugin("Inline").part(name).tidy()
        async with batches(upstream, database=postgres, window="1s") as gw:
            expired = await ended(gw, await create(gw, line("b", "never")))
    assert sorted(found["custom_id"] for found in good) == sorted(f"id-{i}" for i in range(25))
    assert [found["custom_id"] for found in bad] == ["bad"]
    assert done["request_counts"] == {"total": 26, "completed": 25, "failed": 1}
    assert len(rows) == 36
    assert (cancelled["status"], cancelled["request_counts"]["completed"]) == ("cancelled", 1)
    assert [b["id"] for b in (*listed["data"], *rest["data"])] == [other["id"], batch["id"]]
    assert len(more["data"]) == 4
    assert (expired["status"], expired["output_file_id"]) == ("expired", None)
