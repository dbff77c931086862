"""Clients that leave: before the first token, in the middle, on whole calls, while they send, between two attempts."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

import gateway.corrections
from gateway import Cause, Outcome, Source, hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import (
    COST,
    MODEL,
    Error,
    Hang,
    Json,
    ScriptedUpstream,
    Slow,
    Stream,
    Until,
    chat_events,
    completion_events,
    generation,
    message_events,
    response_events,
)
from tests.faults.raw import CHAT, Raw, connect, head, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway import AttemptRecord, Correction, Exchange
    from gateway.kit.upstream import Answer, Seen

DIALECTS: dict[str, tuple[dict[str, Any], Callable[..., list[Any]]]] = {
    "/v1/chat/completions": (CHAT, chat_events),
    "/v1/completions": ({"model": "test/model", "prompt": "Hello"}, completion_events),
    "/v1/responses": ({"model": "test/model", "input": "Hello"}, response_events),
    "/v1/messages": ({**CHAT, "max_tokens": 10}, message_events),
}
WHOLE: dict[str, dict[str, Any]] = {
    **{path: body for path, (body, _) in DIALECTS.items()},
    "/v1/embeddings": {"model": "test/model", "input": "Hello"},
    "/v1/rerank": {"model": "test/model", "query": "a", "documents": ["a"]},
    "/v1/images/generations": {"model": "test/model", "prompt": "a"},
    "/v1/audio/speech": {"model": "test/model", "input": "a", "voice": "b"},
}


class Watcher:
    """Notes what the hooks of one request hear."""

    def __init__(self, config: Any, services: Any) -> None:
        del config, services
        self.heard: list[tuple[str, Any]] = []
        self.corrections: asyncio.Queue[Correction] = asyncio.Queue()
        self.closed_at: float | None = None

    @hookimpl
    def attempt_started(self, exchange: Exchange, attempt: AttemptRecord) -> None:
        self.heard.append(("started", attempt.number))

    @hookimpl
    def attempt_finished(self, exchange: Exchange, attempt: AttemptRecord) -> None:
        self.heard.append(("finished", attempt.cause))

    @hookimpl
    async def request_finished(self, exchange: Exchange) -> None:
        self.heard.append(("request", exchange.outcome))

    @hookimpl
    async def usage_corrected(self, correction: Correction) -> None:
        await self.corrections.put(correction)


@asynccontextmanager
async def watched(*answers: Answer, plugins: tuple[Any, ...] = ()) -> AsyncIterator[tuple[Gateway, Watcher]]:
    async with Gateway.test(plugins=[Watcher, *plugins], upstream=ScriptedUpstream(*answers)) as gw:
        yield gw, gw.plugin("Watcher")


async def closes(gw: Gateway, seen: Seen, left: float) -> None:
    """The upstream saw its connection closed within a second of the client's leaving."""
    await gw.upstream.wait_closed(seen, 2)
    assert seen.closed_at is not None
    assert seen.closed_at - left < 1


LEFT = [("started", 1), ("finished", Cause.CLIENT_DISCONNECT), ("request", Outcome.CLIENT_DISCONNECT)]
WAYS = [Raw.abort, Raw.close]


@pytest.mark.promise("P2.upstream_closed")
@pytest.mark.parametrize("leave", WAYS, ids=["reset", "fin"])
@pytest.mark.parametrize("path", DIALECTS)
async def test_leaving_before_the_first_token(path, leave):
    """A client that leaves while the model still thinks stops it within a second; its one end is heard once."""
    body, _ = DIALECTS[path]
    async with watched(Hang()) as (gw, watcher), connect(gw) as raw:
        await raw.send(request(gw, {**body, "stream": True}, path=path))
        seen = await gw.upstream.wait_seen(1)
        leave(raw)
        await closes(gw, seen, time.monotonic())
        [done] = await gw.finished()
        assert watcher.heard == LEFT
        assert done.usage.source is Source.UNKNOWN
        assert done.status is None


@pytest.mark.promise("P2.upstream_closed")
@pytest.mark.parametrize("leave", WAYS, ids=["reset", "fin"])
@pytest.mark.parametrize("path", DIALECTS)
async def test_leaving_in_mid_stream(path, leave):
    """A client that leaves in the middle of an answer stops it within a second; what was seen is estimated."""
    body, events = DIALECTS[path]
    steps = events("Hello there, how are you", pieces=4)
    begun = next(n for n, step in enumerate(steps) if b"Hello" in _bytes(step)) + 2
    answer = Stream(*steps[:begun], end="hang")
    async with watched(answer) as (gw, watcher), connect(gw) as raw:
        await raw.send(request(gw, {**body, "stream": True}, path=path))
        await raw.reader.readuntil(b"Hello")
        leave(raw)
        await closes(gw, gw.upstream.seen[0], time.monotonic())
        [done] = await gw.finished()
        assert watcher.heard == LEFT
        assert done.status == 200
        assert done.usage.source is Source.ESTIMATE
        assert done.usage.input_tokens
        assert done.usage.output_tokens


def _bytes(step: Any) -> bytes:
    return step if isinstance(step, bytes) else repr(step).encode()


@pytest.mark.promise("P2.upstream_closed")
async def test_leaving_a_stream_that_flows():
    """It makes no difference that events keep coming."""
    begun = chat_events("begin", finish=None, done=False, pieces=1)
    steps = [*begun, *chat_events("x " * 20_000, pieces=20_000, preamble=False)]
    async with watched(Stream(*steps, end="hang")) as (gw, watcher), connect(gw, receive_buffer=4096) as raw:
        await raw.send(request(gw, {**CHAT, "stream": True}))
        await raw.reader.readuntil(b"begin")
        raw.abort()
        await closes(gw, gw.upstream.seen[0], time.monotonic())
        await gw.finished()
        assert watcher.heard == LEFT


@pytest.mark.promise("P2.upstream_closed")
@pytest.mark.parametrize("leave", WAYS, ids=["reset", "fin"])
@pytest.mark.parametrize("path", WHOLE)
async def test_leaving_a_whole_call(path, leave):
    """Without a stream a client is missed as soon."""
    async with watched(Hang()) as (gw, watcher), connect(gw) as raw:
        await raw.send(request(gw, WHOLE[path], path=path))
        seen = await gw.upstream.wait_seen(1)
        leave(raw)
        await closes(gw, seen, time.monotonic())
        await gw.finished()
        assert watcher.heard == LEFT


@pytest.mark.promise("P2.upstream_closed")
async def test_leaving_while_the_upstream_sends_a_whole_reply():
    """The head has come, the body has not."""
    gate = asyncio.Event()
    answer = Stream(b'{"id":"gen-1",', Until(gate), b"}", content_type="application/json")
    async with watched(answer) as (gw, watcher), connect(gw) as raw:
        await raw.send(request(gw))
        seen = await gw.upstream.wait_seen(1)
        raw.abort()
        await closes(gw, seen, time.monotonic())
        await gw.finished()
        assert watcher.heard == LEFT


async def test_leaving_during_the_upload():
    """A client that leaves while it sends its body reaches no upstream, and is one finished request."""
    async with watched() as (gw, watcher), connect(gw) as raw:
        await raw.send(head(gw, "Content-Length: 1000") + b'{"model"')
        await _running(gw, 1)
        raw.abort()
        [done] = await gw.finished()
        assert watcher.heard == [("request", Outcome.CLIENT_DISCONNECT)]
        assert done.attempts == []
        assert gw.upstream.seen == []


async def _running(gw: Gateway, count: int) -> None:
    async with asyncio.timeout(2):
        while gw.worker.server.live != count:
            await asyncio.sleep(0.005)


@pytest.mark.promise("P2.upstream_closed")
async def test_leaving_while_a_fallback_runs():
    """After a first attempt that failed the second one is stopped, and there is no third."""
    routing = {"use": "routing", "config": {"aliases": {"both": ["a/one", "b/two", "c/three"]}}}
    async with watched(Error(503), Hang(), plugins=(routing, "fallback")) as (gw, watcher), connect(gw) as raw:
        await raw.send(request(gw, {**CHAT, "model": "both", "stream": True}))
        second = await gw.upstream.wait_seen(2)
        raw.abort()
        await closes(gw, second, time.monotonic())
        [done] = await gw.finished()
        assert watcher.heard == [
            ("started", 1),
            ("finished", Cause.SERVER_ERROR),
            ("started", 2),
            ("finished", Cause.CLIENT_DISCONNECT),
            ("request", Outcome.CLIENT_DISCONNECT),
        ]
        assert [a.target.model for a in done.attempts] == ["a/one", "b/two"]
        assert len(gw.upstream.seen) == 2


class Between:
    """Waits before each attempt after the first, as a fallback with a pause would."""

    def __init__(self, config: Any, services: Any) -> None:
        del config, services
        self.waiting = asyncio.Event()

    @hookimpl
    async def around_upstream(self, exchange: Exchange, attempt: Any, call_next: Any) -> Any:
        if exchange.attempts:
            self.waiting.set()
            await asyncio.Event().wait()
        return await call_next(attempt)


async def test_leaving_between_two_attempts():
    """Who leaves while nothing is under way gets no further attempt."""
    routing = {"use": "routing", "config": {"aliases": {"both": ["a/one", "b/two"]}}}
    plugins = (routing, "fallback", Between)
    async with watched(Error(503), plugins=plugins) as (gw, watcher), connect(gw) as raw:
        await raw.send(request(gw, {**CHAT, "model": "both"}))
        await asyncio.wait_for(gw.plugin("Between").waiting.wait(), 2)
        raw.abort()
        await gw.finished()
        assert watcher.heard == [
            ("started", 1),
            ("finished", Cause.SERVER_ERROR),
            ("request", Outcome.CLIENT_DISCONNECT),
        ]
        assert len(gw.upstream.seen) == 1


async def test_leaving_after_the_commit():
    """A stream whose head went out early, before any content, is stopped as soon."""
    async with (
        Gateway.test(
            plugins=[Watcher], upstream=ScriptedUpstream(Hang()), settings={"server": {"stream_commit_after": 0.05}}
        ) as gw,
        connect(gw) as raw,
    ):
        await raw.send(request(gw, {**CHAT, "stream": True}))
        await raw.reader.readuntil(b": keep-alive")
        seen = await gw.upstream.wait_seen(1)
        raw.abort()
        await closes(gw, seen, time.monotonic())
        [done] = await gw.finished()
        assert gw.plugin("Watcher").heard == LEFT
        assert done.status == 200


async def test_leaving_in_a_pipeline():
    """Of two requests sent at once the first is stopped; the second, whose answer nobody waits for, never starts."""
    async with watched(Hang()) as (gw, watcher), connect(gw) as raw:
        await raw.send(request(gw) + request(gw))
        seen = await gw.upstream.wait_seen(1)
        raw.abort()
        await closes(gw, seen, time.monotonic())
        await gw.finished()
        await _running(gw, 0)
        assert watcher.heard == LEFT
        assert len(gw.upstream.seen) == 1


async def test_leaving_after_the_answer_is_no_fault():
    """Who closes the connection once it has its answer was served."""
    async with watched() as (gw, watcher), connect(gw) as raw:
        await raw.send(request(gw))
        assert (await raw.reply()).status == 200
        raw.close()
        await gw.finished()
        assert watcher.heard == [("started", 1), ("finished", None), ("request", Outcome.OK)]


async def test_a_crowd_leaves():
    """Of fifty clients that leave at once nothing stays behind: no run, no connection to the upstream."""
    async with Gateway.test(plugins=[Watcher], upstream=ScriptedUpstream(default=Hang())) as gw:
        crowd = []
        for _ in range(50):
            reader, writer = await asyncio.open_connection("127.0.0.1", gw.worker.port)
            writer.write(request(gw, {**CHAT, "stream": True}))
            crowd.append(Raw(reader, writer))
        await gw.upstream.wait_seen(50)
        for raw in crowd:
            raw.abort()
        await gw.upstream.wait_connections(0, 2)
        finished = await gw.finished(50)
        assert {e.outcome for e in finished} == {Outcome.CLIENT_DISCONNECT}
        assert gw.plugin("Watcher").heard.count(LEFT[1]) == 50
        assert gw.worker.server.live == 0


@pytest.fixture
def soon(monkeypatch):
    """The upstream is asked for the true cost after milliseconds."""
    monkeypatch.setattr(gateway.corrections.Corrections.__init__, "__defaults__", ((0.01, 0.05, 0.1),))


def cut_stream() -> Stream:
    steps = chat_events("Hello", finish=None, done=False, usage=False, pieces=1, id="gen-77")
    return Stream(*steps, end="hang", headers={"X-Generation-Id": "gen-77"})


async def _leave_mid_stream(gw: Gateway) -> Exchange:
    async with connect(gw) as raw:
        await raw.send(request(gw, {**CHAT, "model": MODEL, "stream": True}))
        await raw.reader.readuntil(b"Hello")
        raw.abort()
        [done] = await gw.finished()
        return done


async def test_the_true_cost_of_a_left_stream_is_learnt_once(soon):
    """What a stream cost that its client left is asked for later, by its id, and told to plugins exactly once."""
    async with watched(cut_stream(), Json(generation("gen-77", cost=0.0123))) as (gw, watcher):
        done = await _leave_mid_stream(gw)
        assert done.usage.source is done.cost.source is Source.ESTIMATE
        correction = await asyncio.wait_for(watcher.corrections.get(), 2)
        assert correction.operation_id == f"{done.id}/1"
        assert correction.exchange_id == done.id
        assert correction.cost.pico_usd == round(0.0123 * 10**12)
        assert (correction.usage.input_tokens, correction.usage.output_tokens) == (10, 5)
        assert correction.usage.source is correction.cost.source is Source.UPSTREAM
        assert (await gw.chat()).status == 200  # a whole exchange later it has not come again
        assert watcher.corrections.empty()
        asked = [seen for seen in gw.upstream.seen if seen.endpoint == "generation"]
        assert [seen.query for seen in asked] == ["id=gen-77"]
        assert asked[0].headers["authorization"] == "Bearer sk-or-v1-test"


async def test_the_true_cost_is_asked_for_again_until_it_is_there(soon):
    """The row appears late at OpenRouter: 404 and a failure before it change nothing."""
    async with watched(cut_stream(), Error(404), Error(500), Json(generation("gen-77", cost=COST))) as (gw, watcher):
        await _leave_mid_stream(gw)
        correction = await asyncio.wait_for(watcher.corrections.get(), 2)
        assert correction.cost.pico_usd == round(COST * 10**12)
        assert gw.worker.corrections.given_up == 0


async def test_a_true_cost_that_never_comes_is_given_up_and_counted(soon):
    """After the last try the estimate stands."""
    answers = (cut_stream(), Error(404), Error(404), Error(404))
    async with watched(*answers) as (gw, watcher):
        await _leave_mid_stream(gw)
        await gw.upstream.wait_seen(4)
        async with asyncio.timeout(2):
            while gw.worker.corrections.given_up == 0:
                await asyncio.sleep(0.01)
        assert watcher.corrections.empty()


async def test_one_slow_look_up_does_not_delay_the_next_for_long(soon):
    """Two left streams are both corrected."""
    answers = (cut_stream(), Slow(Json(generation("gen-77")), 0.2))
    async with watched(*answers) as (gw, watcher):
        await _leave_mid_stream(gw)
        await gw.upstream.wait_seen(2)
        gw.upstream.script(cut_stream(), Json(generation("gen-77")))
        async with connect(gw) as raw:
            await raw.send(request(gw, {**CHAT, "stream": True}))
            await raw.reader.readuntil(b"Hello")
            raw.abort()
            await gw.finished(2)
        got = [await asyncio.wait_for(watcher.corrections.get(), 2) for _ in range(2)]
        assert len({c.operation_id for c in got}) == 2
