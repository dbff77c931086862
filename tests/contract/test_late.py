"""Late work: what is accepted as a job, kept, and run later through the same pipeline (`LateRequest`, `services.run`)."""

import asyncio
import json

import pytest

from gateway import (
    Decision,
    LateRequest,
    Principal,
    PrincipalGone,
    Reply,
    Scopes,
    StoreUnavailable,
    Target,
    hookimpl,
)
from gateway.exchange import Outcome
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Hang, ScriptedUpstream, Stream, chat_events
from gateway.tasks import Tasks

PATIENT = 10.0
ADA = Principal(
    "ada",
    tenant="acme",
    team="blue",
    roles=frozenset({"bot"}),
    scopes=Scopes(models=("test/*",)),
    limits={"requests": 5},
    claims={"iss": "x"},
)


class Jobs:
    """Takes what asks for it by a header, and keeps it."""

    reads_settings = ()
    takes_jobs = True

    def __init__(self, config, services):
        self.services = services
        self.kept = []
        self.gone = False
        self.phases = []

    @hookimpl
    async def authenticate(self, exchange):
        return ADA

    @hookimpl
    async def restore_principal(self, reference, kept):
        if isinstance(self.gone, Exception):
            raise self.gone
        return None if self.gone else kept

    @hookimpl
    async def prepare_request(self, exchange):
        if exchange.request.header("prefer") == "respond-async":
            exchange.phase = "accept"

    @hookimpl
    async def choose_targets(self, exchange):
        if exchange.request.header("x-offload"):
            target = Target("test/model", "openrouter")
            return Decision("test/model", (target,), offload=True, reasons=("large",))
        return None

    @hookimpl
    async def lookup_response(self, exchange):
        self.phases.append(exchange.phase)
        if exchange.phase != "accept":
            return None
        self.kept.append(LateRequest.of(exchange).to_json())
        return Reply(202, data={"job": len(self.kept)}, headers={"Location": "/v1/jobs/1"})

    def late(self):
        return LateRequest.from_json(self.kept[-1])


class NoJobs:
    """Offloads, though nobody takes jobs."""

    reads_settings = ()
    takes_jobs = False

    def __init__(self, config, services): ...

    choose_targets = Jobs.choose_targets


class Answer:
    """A client of `services.run`."""

    def __init__(self):
        self.status = None
        self.body = b""
        self.ended = False
        self.began = asyncio.Event()

    async def send(self, status, headers, body, progress):
        self.status, self.headers, self.body, self.ended = status, headers, body, True

    async def start(self, status, headers):
        self.status, self.headers = status, headers

    async def write(self, data):
        self.body += data
        self.began.set()

    async def end(self):
        self.ended = True

    def abort(self):
        self.ended = False


class Commits:
    def __init__(self):
        self.rows = []

    async def __call__(self, exchange, row):
        assert exchange.outcome is not None
        self.rows.append(row)


async def taken(gw, **fields):
    reply = await gw.post(
        "/v1/chat/completions",
        {"model": "test/model", "messages": [{"role": "user", "content": "Hello"}], **fields},
        headers={"Prefer": "respond-async", "X-Request-Id": "mine-1", "X-Title": "An app"},
    )
    assert reply.status == 202
    return gw.plugin("Jobs")


async def test_an_accepted_request_asks_no_upstream_and_runs_later_as_it_came():
    """Its body, its headers that pass, its request id and its caller are those of the request that was taken."""
    async with Gateway.test(plugins=[Jobs]) as gw:
        jobs = await taken(gw)
        [accepted] = await gw.finished()
        assert (accepted.phase, accepted.attempts, accepted.outcome) == ("accept", [], Outcome.OK)
        assert gw.upstream.seen == []
        answer, commits = Answer(), Commits()
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


async def test_a_decision_may_offload(monkeypatch):
    async with Gateway.test(plugins=[Jobs]) as gw:
        reply = await gw.chat(headers={})
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


async def test_a_stream_runs_into_whoever_keeps_it():
    """Byte by byte what a connection would have got, without keep-alives: no proxy stands in between."""
    upstream = ScriptedUpstream(Stream(*chat_events()))
    async with Gateway.test(plugins=[Jobs], upstream=upstream) as gw:
        jobs = await taken(gw, stream=True)
        answer = Answer()
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
            await jobs.services.run(jobs.late(), Answer(), commit=commits)
        jobs.gone = StoreUnavailable()
        with pytest.raises(StoreUnavailable):
            await jobs.services.run(jobs.late(), Answer(), commit=commits)
        assert (gw.upstream.seen, commits.rows) == ([], [])


async def test_cancelling_closes_the_upstreams_call_and_commits_what_came():
    upstream = ScriptedUpstream(Stream(*chat_events(finish=None, done=False, usage=False), end="hang"))
    async with Gateway.test(plugins=[Jobs], upstream=upstream) as gw:
        jobs = await taken(gw, stream=True)
        answer, commits, tasks = Answer(), Commits(), Tasks()
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
    from dataclasses import replace

    async with Gateway.test(plugins=[Jobs], upstream=ScriptedUpstream(Hang())) as gw:
        jobs = await taken(gw)
        answer = Answer()
        exchange = await jobs.services.run(replace(jobs.late(), deadline=0.2), answer)
        assert (exchange.outcome, answer.status) == (Outcome.TIMEOUT, 504)
