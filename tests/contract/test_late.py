"""Late work: what is accepted as a job, kept, and run later through the same pipeline (`LateRequest`, `services.run`)."""

import asyncio
import json
from dataclasses import replace

import pytest

from gateway import LateRequest, PrincipalGone, Reply, StoreUnavailable, hookimpl
from gateway.exchange import ANONYMOUS, Outcome
from gateway.explain_command import in_words
from gateway.kit.testing import PEPPER, Gateway
from gateway.kit.upstream import Hang, ScriptedUpstream, Stream, chat_events
from gateway.supervisor import Identity
from gateway.tasks import Tasks
from gateway.worker import Worker
from tests.contract.jobs import ADA, Commits, Jobs, Keeper, Taker, taken

PATIENT = 10.0


class Offloads:
    """Takes jobs, and asks for it by its decision."""

    reads_settings = ()
    takes_jobs = True

    def __init__(self, config, services): ...

    choose_targets = Jobs.choose_targets


class NoJobs:
    """Offloads, though nobody takes jobs."""

    reads_settings = ()
    takes_jobs = False

    def __init__(self, config, services): ...

    choose_targets = Jobs.choose_targets


async def test_an_accepted_request_asks_no_upstream_and_runs_later_as_it_came():
    """Its body, its headers that pass, its request id and its caller are those of the request that was taken."""
    async with Gateway.test(plugins=[Jobs]) as gw:
        jobs = await taken(gw)
        [accepted] = await gw.finished()
        assert (accepted.phase, accepted.attempts, accepted.outcome) == ("accept", [], Outcome.ACCEPTED)
        assert gw.upstream.seen == []
        answer, commits = Keeper(), Commits()
        exchange = await jobs.services.run(jobs.late(), answer, operation_id="job_1/1", commit=commits)
        assert (exchange.phase, exchange.outcome, exchange.id) == ("run", Outcome.OK, "job_1/1")
        assert (exchange.request_id, exchange.principal) == ("mine-1", ADA)
        assert (answer.status, answer.ended) == (200, True)
        assert json.loads(answer.body)["object"] == "chat.completion"
        [asked] = gw.upstream.seen
        assert asked.headers["X-Title"] == "An app"
        assert commits.rows == [b""]  # nobody keeps rows here
        _, finished = await gw.finished(2)
        assert finished is exchange


async def test_a_decision_may_offload():
    async with Gateway.test(plugins=[Jobs]) as gw:
        reply = await gw.post(
            "/v1/chat/completions", {"model": "test/model", "messages": []}, headers={"x-offload": "1"}
        )
        assert (reply.status, reply.headers["Location"]) == (202, "/v1/jobs/1")


async def test_offload_is_ignored_where_nobody_takes_jobs_and_explain_says_so():
    async with Gateway.test(plugins=[NoJobs, "api_keys"]) as gw:
        body = {"model": "test/model", "messages": []}
        reply = await gw.post("/v1/chat/completions", body, headers={"x-offload": "1"})
        assert reply.status == 200
        explained = await gw.post("/admin/explain", {"body": body, "headers": {"x-offload": "1"}})
        assert explained.data["phase"] == "live"
        assert explained.data["reasons"] == [
            "large",
            "No plugin takes jobs: `offload` is ignored, and the request is answered at once.",
        ]


async def test_explain_says_that_it_would_become_a_job():
    """By the decision; nothing is taken."""
    async with Gateway.test(plugins=[Offloads, "api_keys"]) as gw:
        body = {"model": "test/model", "messages": []}
        explained = await gw.post("/admin/explain", {"body": body, "headers": {"x-offload": "1"}})
        assert explained.data["phase"] == "accept"
        assert "\nBecomes a job, which goes to test/model at openrouter.\n  large\n" in in_words(explained.data)


async def test_a_stream_runs_into_whoever_keeps_it():
    """Byte by byte what a connection would have got, without keep-alives: no proxy stands in between."""
    upstream = ScriptedUpstream(Stream(*chat_events()))
    async with Gateway.test(plugins=[Jobs], upstream=upstream) as gw:
        jobs = await taken(gw, stream=True)
        answer = Keeper()
        await jobs.services.run(jobs.late(), answer)
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert answer.ended


async def test_nobody_restores_the_principal():
    """The run fails before any hook: no upstream is asked, nothing is left."""
    async with Gateway.test(plugins=[Jobs]) as gw:
        jobs = await taken(gw)
        jobs.gone = True
        commits = Commits()
        with pytest.raises(PrincipalGone):
            await jobs.services.run(jobs.late(), Keeper(), commit=commits)
        jobs.gone = StoreUnavailable()
        with pytest.raises(StoreUnavailable):
            await jobs.services.run(jobs.late(), Keeper(), commit=commits)
        assert (gw.upstream.seen, commits.rows) == ([], [])


async def test_cancelling_closes_the_upstreams_call_and_commits_what_came():
    upstream = ScriptedUpstream(Stream(*chat_events(finish=None, done=False, usage=False), end="hang"))
    async with Gateway.test(plugins=[Jobs], upstream=upstream) as gw:
        jobs = await taken(gw, stream=True)
        answer, commits, tasks = Keeper(), Commits(), Tasks()
        running = tasks.spawn(jobs.services.run(jobs.late(), answer, commit=commits), "run")
        await asyncio.wait_for(answer.began.wait(), PATIENT)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert commits.rows == [b""]
        _, exchange = await gw.finished(2)
        assert exchange.outcome is Outcome.CLIENT_DISCONNECT
        await asyncio.wait_for(upstream.seen[0].closed.wait(), PATIENT)


async def test_a_run_has_its_own_deadline():
    async with Gateway.test(plugins=[Jobs], upstream=ScriptedUpstream(Hang())) as gw:
        jobs = await taken(gw)
        answer = Keeper()
        exchange = await jobs.services.run(replace(jobs.late(), deadline=0.2), answer)
        assert (exchange.outcome, answer.status) == (Outcome.TIMEOUT, 504)


class Nobody:
    """Sends everything away as a job, and takes none."""

    reads_settings = ()

    def __init__(self, config, services): ...

    @hookimpl
    async def request_received(self, exchange):
        exchange.phase = "accept"


async def test_a_job_that_nobody_takes_is_503_and_never_a_call():
    """The client asked for an answer later: to ask a model now would be another thing."""
    async with Gateway.test(plugins=[Nobody, "fallback"]) as gw:
        for stream in (False, True):
            reply = await gw.chat(stream=stream)
            assert (reply.status, reply.data["error"]["code"]) == (503, "no_job_taken")
        assert gw.upstream.seen == []


class Submits(Jobs):
    """Takes what its own route is given."""

    @hookimpl
    def register_routes(self, router):
        router.add("POST", "/v1/jobs", self.create)

    async def create(self, exchange):
        asked = exchange.body
        return await self.services.submit(exchange, asked["endpoint"], asked["body"], phase="accept")


async def test_a_plugins_route_submits_a_job_through_the_whole_admission():
    """Scopes, body and model are judged as of any other request; what is accepted may stream, later."""
    async with Gateway.test(plugins=[Submits]) as gw:
        jobs = gw.plugin("Submits")
        body = {"model": "test/model", "messages": [], "stream": True}
        reply = await gw.post("/v1/jobs", {"endpoint": "chat/completions", "body": body})
        assert (reply.status, reply.headers["Location"]) == (202, "/v1/jobs/1")
        assert jobs.late().body == json.dumps(body, separators=(",", ":")).encode()
        refused = await gw.post("/v1/jobs", {"endpoint": "chat/completions", "body": {**body, "model": "other/model"}})
        assert (refused.status, refused.data["error"]["code"]) == (404, "model_not_found")
        assert len(jobs.kept) == 1
        assert gw.upstream.seen == []


async def test_a_multipart_request_runs_with_its_file():
    """The bytes and their boundary are kept, and parsed again."""
    async with Gateway.test(plugins=[Jobs]) as gw:
        boundary = "----b0undary"
        body = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\ntest/model\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
            f"Content-Type: audio/wav\r\n\r\nRIFF\x00\x01\r\n--{boundary}--\r\n"
        ).encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Prefer": "respond-async"}
        reply = await gw.request("POST", "/v1/audio/transcriptions", data=body, headers=headers)
        assert reply.status == 202
        answer, jobs = Keeper(), gw.plugin("Jobs")
        exchange = await jobs.services.run(jobs.late(), answer)
        assert answer.status == 200
        assert exchange.form.files[0].content == b"RIFF\x00\x01"
        [asked] = gw.upstream.seen
        assert asked.body == body
        assert asked.headers["Content-Type"] == headers["Content-Type"]


class ByHeader(Jobs):
    """Reads a header of its own."""

    reads_headers = ("X-Acme-Shard",)


async def test_no_credential_is_kept_and_what_the_configuration_asks_for_is():
    """Headers that may pass upstream, that a `when:` asks for, or that a plugin says it reads; no others."""
    rule = {"name": "gold", "match": "test/*", "when": {"headers": {"x-tier": ["gold"]}}, "use": ["test/gold"]}
    settings = {"upstream": {"forward_headers": ["x-trace-me"]}}
    async with Gateway.test(
        plugins=[ByHeader, {"use": "routing", "config": {"rules": [rule]}}], settings=settings
    ) as gw:
        sent = {
            "Prefer": "respond-async", "Authorization": "Bearer secret-1", "X-Api-Key": "secret-2", "Cookie": "secret-3",
            "X-Other": "secret-4", "X-Tier": "gold", "X-Acme-Shard": "7", "X-Trace-Me": "yes", "X-Title": "An app",
        }  # fmt: skip
        body = {"model": "test/model", "messages": [{"role": "user", "content": "Hi"}]}
        assert (await gw.post("/v1/chat/completions", body, headers=sent)).status == 202
        jobs = gw.plugin("ByHeader")
        assert b"secret" not in jobs.kept[0]
        kept = {name.lower(): value for name, value in jobs.late().headers.items()}
        assert kept == {"x-tier": "gold", "x-acme-shard": "7", "x-trace-me": "yes", "x-title": "An app"}
        await jobs.services.run(jobs.late(), Keeper())
        assert gw.upstream.seen[0].json["model"] == "test/gold"  # as it would have been then


def test_what_is_kept_is_read_as_it_was_written():
    """Also by another version: fields that it doesn't know are passed over, those that it misses have a default."""
    late = LateRequest(
        "chat/completions",
        b'\x00{"model": "m"}',
        "application/json",
        {"X-Title": "é"},
        "r-1",
        ADA.reference,
        ADA,
        "00-1",
        7.5,
    )
    assert LateRequest.from_json(late.to_json()) == late
    assert '"m"' not in repr(late)  # a log line of it has no prompt
    newer = json.loads(late.to_json()) | {"more": 1}
    newer["principal"] |= {"more": 1}
    del newer["deadline"], newer["principal"]["team"]
    read = LateRequest.from_json(json.dumps(newer).encode())
    assert read == replace(late, deadline=None, principal=replace(ADA, team=None))


async def test_nobody_who_authenticates_is_restored_as_nobody():
    """Where callers have no keys, their jobs run; once a plugin asks for keys, they don't."""
    async with Gateway.test(plugins=[Taker]) as gw:
        jobs = await taken(gw, plugin="Taker")
        exchange = await jobs.services.run(jobs.late(), Keeper())
        assert exchange.principal is ANONYMOUS
        kept = jobs.late()
        await gw.reload(plugins=[Taker, "api_keys"])
        with pytest.raises(PrincipalGone):
            await gw.plugin("Taker").services.run(kept, Keeper())


class Rewrites:
    """Signs each answer."""

    reads_settings = ()

    def __init__(self, config, services): ...

    @hookimpl
    async def transform_response(self, exchange):
        exchange.reply = Reply(exchange.reply.status, data={**exchange.reply.data, "signed": True})


async def test_an_answer_is_transformed_where_it_is_one():
    """What is said of an accepted job is no model's answer; the job's is."""
    async with Gateway.test(plugins=[Jobs, Rewrites]) as gw:
        jobs = await taken(gw)
        answer = Keeper()
        await jobs.services.run(jobs.late(), answer)
        assert json.loads(answer.body)["signed"] is True


async def test_a_job_that_is_offloaded_again_is_run():
    """The rule that sent it away still holds when it is run."""
    async with Gateway.test(plugins=[Jobs]) as gw:
        jobs = await taken(gw)
        late = replace(jobs.late(), headers={"x-offload": "1"})
        exchange = await jobs.services.run(late, Keeper())
        assert (exchange.phase, len(exchange.attempts)) == ("run", 1)


async def test_cancelling_during_the_commit_waits_for_it():
    """Whoever cancels knows afterwards what is stored."""
    async with Gateway.test(plugins=[Jobs]) as gw:
        jobs = await taken(gw)
        begun, go_on, done, tasks = asyncio.Event(), asyncio.Event(), [], Tasks()

        async def commit(exchange, row):
            begun.set()
            await go_on.wait()
            done.append(exchange)

        running = tasks.spawn(jobs.services.run(jobs.late(), Keeper(), commit=commit), "run")
        await begun.wait()
        running.cancel()
        running.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert [exchange.outcome for exchange in done] == [Outcome.OK]


async def test_what_a_commit_raises_is_raised():
    async with Gateway.test(plugins=[Jobs]) as gw:
        jobs = await taken(gw)

        async def commit(exchange, row):
            raise StoreUnavailable

        with pytest.raises(StoreUnavailable):
            await jobs.services.run(jobs.late(), Keeper(), commit=commit)


async def test_a_slow_keeper_is_no_client_that_does_not_read():
    """`write_timeout` is for connections: a paid answer is not thrown away since a store takes its time."""
    async with Gateway.test(plugins=[Jobs], settings={"server": {"write_timeout": 0.2}}) as gw:
        jobs = await taken(gw)

        class Slow(Keeper):
            async def send(self, *arguments):
                await asyncio.sleep(0.6)  # longer than `write_timeout`, and than the watch's turn
                await super().send(*arguments)

        exchange = await jobs.services.run(jobs.late(), Slow())
        assert exchange.outcome is Outcome.OK


async def test_a_process_without_a_server_runs_it():
    """What a gateway accepted runs wherever the same plugins are open: a worker of jobs needs no port."""
    async with Gateway.test(plugins=[Jobs]) as gw:
        kept = (await taken(gw)).kept[0]
        loaded, blueprints = gw._read([Jobs], None)
        worker = Worker(loaded, Identity(PEPPER, None), gw.worker._data_dir, blueprints, number=9, serves=False)
        async with worker.running():
            [jobs] = [i.plugin for i in worker.snapshot.instances if isinstance(i.plugin, Jobs)]
            keeper, commits = Keeper(), Commits()
            exchange = await jobs.services.run(LateRequest.from_json(kept), keeper, commit=commits)
        assert (exchange.outcome, keeper.status, exchange.request_id) == (Outcome.OK, 200, "mine-1")
        assert (len(commits.rows), len(gw.upstream.seen), worker.port) == (1, 1, 0)
