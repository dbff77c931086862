"""Which hooks one request goes through, in which order, for every endpoint and every way it can end (P10)."""

import asyncio

import aiohttp
import pytest

from gateway import hookimpl
from gateway.dialects import DIALECTS
from gateway.exchange import Outcome
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Answer, Error, Hang, ScriptedUpstream, Stream, chat_events
from gateway.tasks import Tasks
from tests.contract.jobs import Keeper, Taker
from tests.contract.recorder import Hits, Recorder, Refuser, TwoTargets, trace
from tests.contract.requests import STREAMS, request, stopping, streamed
from tests.contract.sequences import ACCEPTED, ASKED, ATTEMPT, ERROR, HEAD, RUNS, SEQUENCES

P10 = pytest.mark.promise("P10.sequence")
LATE = pytest.mark.promise("P10.late")

CASES = [
    *((endpoint, "stream", fate) for kind, fate in SEQUENCES if kind == "stream" for endpoint in STREAMS),
    *(
        (endpoint, "binary" if dialect.reply == "binary" else "whole", fate)
        for endpoint, dialect in DIALECTS.items()
        for kind, fate in SEQUENCES
        if kind == ("binary" if dialect.reply == "binary" else "whole")
    ),
]
OUTCOMES = {
    "success": Outcome.OK,
    "upstream error": Outcome.UPSTREAM_ERROR,
    "refused": Outcome.REFUSED,
    "hit": Outcome.OK,
    "disconnect": Outcome.CLIENT_DISCONNECT,
    "cut": Outcome.UPSTREAM_TRUNCATED,
}


def _answers(endpoint, kind, fate):
    match fate:
        case "success":
            return [streamed(endpoint)] if kind == "stream" else []
        case "upstream error":
            return [Error(503)]
        case "disconnect":
            return [Hang() if kind == "whole" else stopping(endpoint, "hang")]
        case "cut":
            return [stopping(endpoint, "cut")]
    return []


async def _leave(gw, endpoint, kind):
    """Send the request and go: before an answer, or after the first bytes of one that streams."""
    url = f"{gw.url}/v1/{endpoint}"
    if kind != "whole":
        async with gw.session.post(url, **request(endpoint, stream=kind == "stream")) as reply:
            assert await reply.content.readany()
            reply.close()
        return
    sending = asyncio.get_running_loop().create_task(gw.session.post(url, **request(endpoint)))
    await gw.upstream.wait_seen(1)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending


def test_the_table_of_sequences_covers_every_endpoint_and_fate():
    """No proxied endpoint and no way to end is left out of this proof."""
    assert {endpoint for endpoint, _, _ in CASES} == set(DIALECTS)
    assert {endpoint for endpoint, kind, _ in CASES if kind == "stream"} == {
        endpoint for endpoint, dialect in DIALECTS.items() if dialect.grammar is not None
    }
    for endpoint, kind in {case[:2] for case in CASES}:
        assert {fate for e, k, fate in CASES if (e, k) == (endpoint, kind)} >= set(OUTCOMES) - {"cut"}


@P10
@pytest.mark.parametrize(("endpoint", "kind", "fate"), CASES)
async def test_each_hook_runs_once_and_in_the_documented_order(endpoint, kind, fate):
    """A plugin sees the same documented sequence of hooks whatever the endpoint is, each exactly once."""
    extra = {"refused": [Refuser], "hit": [Hits]}.get(fate, [])
    async with Gateway.test(
        plugins=[Recorder, *extra], upstream=ScriptedUpstream(*_answers(endpoint, kind, fate))
    ) as gw:
        if fate == "disconnect":
            await _leave(gw, endpoint, kind)
        else:
            await gw.request("POST", f"/v1/{endpoint}", **request(endpoint, stream=kind == "stream"))
        [exchange] = await gw.finished()
        assert trace(exchange) == SEQUENCES[kind, fate]
        assert exchange.outcome is OUTCOMES[fate]
        assert all(record.finished is not None for record in exchange.attempts)


KINDS = sorted({case[:2] for case in CASES})
RUN_CASES = [case for case in CASES if case[2] in {"success", "upstream error", "disconnect", "cut", "hit"}]


async def _accepted(gw, endpoint, kind):
    """The plugin that has taken the request."""
    sent = request(endpoint, stream=kind == "stream")
    sent["headers"] = {**sent.get("headers", {}), "Prefer": "respond-async"}
    reply = await gw.request("POST", f"/v1/{endpoint}", **sent)
    assert reply.status == 202
    return gw.plugin("Taker")


@LATE
@pytest.mark.parametrize(("endpoint", "kind"), KINDS)
async def test_a_job_is_taken_after_every_check_and_before_any_upstream(endpoint, kind):
    """Whoever is asked of a live request until `lookup_response` is asked of one that becomes a job."""
    async with Gateway.test(plugins=[Recorder, Taker]) as gw:
        await _accepted(gw, endpoint, kind)
        [exchange] = await gw.finished()
        assert trace(exchange) == ACCEPTED
        assert (exchange.phase, exchange.outcome) == ("accept", Outcome.ACCEPTED)


@LATE
@pytest.mark.parametrize(("endpoint", "kind", "fate"), RUN_CASES)
async def test_a_run_goes_through_the_same_hooks_but_for_authenticate(endpoint, kind, fate):
    """Jobs have no back door: what limits, guards and transforms live requests does so with them, each hook once."""
    upstream = ScriptedUpstream(*_answers(endpoint, kind, fate))
    async with Gateway.test(plugins=[Recorder, Taker, *([Hits] if fate == "hit" else [])], upstream=upstream) as gw:
        taker, answer, tasks = await _accepted(gw, endpoint, kind), Keeper(), Tasks()
        running = tasks.spawn(taker.services.run(taker.late(), answer), "run")
        if fate == "disconnect":
            await (gw.upstream.wait_seen(1) if kind == "whole" else answer.began.wait())
            running.cancel()
        await asyncio.wait([running])
        _, exchange = await gw.finished(2)
        assert trace(exchange) == RUNS[kind, fate]
        assert (exchange.phase, exchange.outcome) == ("run", OUTCOMES[fate])


PREAMBLE = chat_events(finish=None, done=False, usage=False)[:2]


@P10
@pytest.mark.parametrize(
    ("stream", "failure"),
    [(False, Error(503)), (True, Error(503)), (True, Stream(*PREAMBLE, end="cut"))],
    ids=["whole", "stream", "stream after its preamble"],
)
async def test_a_fallback_runs_the_attempt_hooks_once_per_attempt(stream, failure):
    """With a fallback each attempt has its own pair of hooks, and everything else still runs once."""
    upstream = ScriptedUpstream()
    upstream.on("a/one", failure)
    async with Gateway.test(plugins=[Recorder, TwoTargets, "fallback"], upstream=upstream) as gw:
        reply = await gw.chat(stream=stream)
        assert (reply.status, reply.headers["x-xenios-attempts"]) == (200, "2")
        [exchange] = await gw.finished()
        usual = SEQUENCES["stream" if stream else "whole", "success"]
        at = usual.index("attempt_started")
        assert trace(exchange) == [*usual[:at], *ATTEMPT, *usual[at:]]


@P10
async def test_exhausted_fallbacks_end_in_one_rendered_error():
    """When all targets failed, and one of them again, the client is told once."""
    async with Gateway.test(
        plugins=[Recorder, TwoTargets, "fallback"], upstream=ScriptedUpstream(default=Error(503))
    ) as gw:
        assert (await gw.chat()).status == 503
        [exchange] = await gw.finished()
        assert trace(exchange) == [*ASKED, *ATTEMPT * 3, *ERROR]


class After(Answer):
    """Any answer, once the test says so."""

    def __init__(self, answer):
        self.answer = answer
        self.event = asyncio.Event()

    async def send(self, wire, seen):
        await self.event.wait()
        return await self.answer.send(wire, seen)


@P10
@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        (streamed("chat/completions"), ["open_tap", "tap.end", "attempt_finished", "request_finished"]),
        (Error(503), ["attempt_finished", "request_finished"]),
    ],
    ids=["success", "upstream error"],
)
async def test_a_stream_that_is_committed_early_starts_its_response_once(answer, rest):
    """Headers that went out while the upstream was silent are not sent again, and no error is rendered after them."""
    after = After(answer)
    async with Gateway.test(
        plugins=[Recorder],
        upstream=ScriptedUpstream(after),
        settings={"server": {"stream_commit_after": 0.02}},
    ) as gw:
        url = gw.url + "/v1/chat/completions"
        async with gw.session.post(url, **request("chat/completions", stream=True)) as reply:
            assert await reply.content.readuntil(b"\n\n") == b": keep-alive\n\n"
            after.event.set()
            await reply.read()
        [exchange] = await gw.finished()
        assert trace(exchange) == [*ASKED, "attempt_started", "response_started", *rest]


@P10
async def test_a_plugin_s_own_route_passes_received_authenticate_handler_finished():
    """A route that a plugin adds is guarded and observed as every other, and never reaches an upstream by itself."""
    async with Gateway.test(plugins=[Recorder]) as gw:
        reply = await gw.post("/recorded/me", {})
        assert (reply.status, reply.data) == (200, {"name": "me"})
        [exchange] = await gw.finished()
        assert trace(exchange) == [*HEAD, "handler", "response_started", "request_finished"]
        assert gw.upstream.seen == []


@P10
async def test_an_unknown_path_passes_received_and_finished():
    """A 404 is seen by the plugins that log and count, and asks nobody for a key."""
    async with Gateway.test(plugins=[Recorder]) as gw:
        assert (await gw.post("/v1/nothing", {})).status == 404
        [exchange] = await gw.finished()
        assert trace(exchange) == ["request_received", *ERROR]


@P10
async def test_a_bad_body_is_refused_before_any_hook_that_needs_it():
    """Broken JSON never reaches `prepare_request`."""
    async with Gateway.test(plugins=[Recorder]) as gw:
        assert (
            await gw.request("POST", "/v1/chat/completions", data=b"{", headers={"Content-Type": "application/json"})
        ).status == 400
        [exchange] = await gw.finished()
        assert trace(exchange) == [*HEAD, *ERROR]


async def test_the_true_cost_of_a_stream_that_was_left_comes_to_usage_corrected_once():
    """A client leaves a stream; what it cost is asked for later and told to the plugins exactly once."""
    answer = stopping("chat/completions", "hang")
    answer.headers = {"X-Generation-Id": "gen-1"}
    async with Gateway.test(plugins=[Recorder], upstream=ScriptedUpstream(answer)) as gw:
        gw.worker.corrections._delays = (0.0,)
        await _leave(gw, "chat/completions", "stream")
        [exchange] = await gw.finished()
        seen = await gw.upstream.wait_seen(2)
        assert (seen.method, seen.endpoint, seen.query) == ("GET", "generation", "id=gen-1")
        told = gw.plugin("Recorder").corrections
        correction = await asyncio.wait_for(told.get(), 5)
        assert told.empty()
        assert (correction.exchange_id, correction.operation_id) == (exchange.id, f"{exchange.id}/1")
        assert correction.cost.pico_usd == 105_000_000


async def test_a_client_that_leaves_in_the_middle_of_its_own_body_is_finished_too():
    """A request whose body never ends is one finished exchange all the same."""

    class Arrived:
        def __init__(self, config, services):
            self.event = asyncio.Event()

        @hookimpl
        async def authenticate(self, exchange):
            self.event.set()

    async with Gateway.test(plugins=[Arrived, Recorder]) as gw:
        _, writer = await asyncio.open_connection("127.0.0.1", gw.worker.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        await asyncio.wait_for(gw.plugin("Arrived").event.wait(), 5)
        writer.close()
        await writer.wait_closed()
        [exchange] = await gw.finished()
        assert trace(exchange) == [*HEAD, "request_finished"]
        assert exchange.outcome is Outcome.CLIENT_DISCONNECT


async def test_every_exchange_ends_exactly_once():
    """Answered, refused, failed, left, unknown: as many terminal events as requests, one each, with an outcome."""
    upstream = ScriptedUpstream()
    upstream.on("bad/model", Error(500))
    upstream.on("cut/model", stopping("chat/completions", "cut"))
    upstream.on("slow/model", stopping("chat/completions", "hang"))
    async with Gateway.test(plugins=[Recorder], upstream=upstream) as gw:
        await gw.chat()
        await gw.chat(stream=True)
        await gw.chat(model="bad/model")
        await gw.chat(model="cut/model", stream=True)
        await gw.get("/nothing")
        await gw.get("/health")
        await gw.post("/v1/chat/completions", {"model": "x"})
        timeout = aiohttp.ClientTimeout(sock_read=0.1)
        with pytest.raises(aiohttp.SocketTimeoutError):
            await gw.post(
                "/v1/chat/completions",
                {"model": "slow/model", "messages": [], "stream": True},
                timeout=timeout,
            )
        exchanges = await gw.finished(8)
        await gw.chat()
        exchanges = await gw.finished(9)
        assert len({exchange.id for exchange in exchanges}) == len(gw._recorder.exchanges) == 9
        assert all(exchange.outcome is not None and exchange.finished is not None for exchange in exchanges)
        assert all(trace(exchange).count("request_finished") == 1 for exchange in exchanges)
