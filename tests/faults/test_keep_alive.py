"""When a stream is committed before its first content, and what breaks its silence."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from gateway import hookimpl, logs
from gateway.kit.testing import Gateway
from gateway.kit.upstream import (
    Error,
    Hang,
    Json,
    Pause,
    ScriptedUpstream,
    Stream,
    Until,
    chat_completion,
    chat_events,
    encode_step,
    message_events,
    response_events,
)
from gateway.pipeline import Run
from gateway_plugins.fallback import Plugin as Fallback
from tests.faults.endpoints import BODIES, Two

SOON = {"stream_commit_after": 0.05}
OFTEN = {"keepalive_interval": 0.05}
EVENTS = {
    "chat/completions": (chat_events, b": keep-alive\n\n"),
    "responses": (response_events, b": keep-alive\n\n"),
    "messages": (message_events, b'event: ping\ndata: {"type": "ping"}\n\n'),
}


class Reading:
    """A streamed reply that the test reads piece by piece."""

    def __init__(self, reply):
        self.reply = reply
        self.body = b""

    async def until(self, mark: bytes, count: int = 1) -> None:
        """Reads until `mark` came so often. Raises TimeoutError, or AssertionError at the end of the body."""
        async with asyncio.timeout(5):
            while self.body.count(mark) < count:
                piece = await self.reply.content.readany()
                assert piece, self.body
                self.body += piece

    async def rest(self) -> bytes:
        async with asyncio.timeout(5):
            while piece := await self.reply.content.readany():
                self.body += piece
        return self.body


@asynccontextmanager
async def streamed(gw: Gateway, endpoint: str = "chat/completions"):
    body = {"model": "test/model", **BODIES[endpoint], "stream": True}
    async with gw.session.post(f"{gw.url}/v1/{endpoint}", json=body, headers=gw.headers) as reply:
        yield Reading(reply)


@pytest.mark.parametrize("endpoint", EVENTS)
async def test_a_slow_stream_is_committed_and_kept_alive(endpoint):
    """A model that thinks long: headers and a sign of life go out after `stream_commit_after`, then at each silence."""
    events, sign = EVENTS[endpoint]
    gate = asyncio.Event()
    steps = events(comments=False)
    upstream = ScriptedUpstream(Stream(Until(gate), *steps))
    async with Gateway.test(upstream=upstream, settings={"server": {**SOON, **OFTEN}}) as gw:
        async with streamed(gw, endpoint) as reading:
            assert reading.reply.status == 200
            assert reading.reply.headers["Content-Type"] == "text/event-stream"
            await reading.until(sign, 3)
            assert reading.body.replace(sign, b"") == b""
            gate.set()
            body = await reading.rest()
        [exchange] = await gw.finished()
    sent = b"".join(map(encode_step, steps))
    if endpoint == "chat/completions":
        sent = b"".join(encode_step(s) for s in steps if not (isinstance(s, dict) and s["choices"] == []))
    assert body.replace(sign, b"") == sent
    assert (exchange.outcome, exchange.status) == ("ok", 200)


@pytest.mark.parametrize("endpoint", EVENTS)
async def test_silence_between_events_is_broken(endpoint):
    """In a silence in the middle of an answer the client gets signs of life, between events, never within one."""
    events, sign = EVENTS[endpoint]
    gate = asyncio.Event()
    steps = [encode_step(s) for s in events(comments=False, usage=False)]
    n = 4 if endpoint == "chat/completions" else 5
    half = steps[n][:20]
    answer = Stream(*steps[:n], half, Until(gate), steps[n][20:], *steps[n + 1 :])
    async with (
        Gateway.test(upstream=ScriptedUpstream(answer), settings={"server": OFTEN}) as gw,
        streamed(gw, endpoint) as reading,
    ):
        await reading.until(sign, 2)
        assert reading.body.replace(sign, b"") == b"".join(steps[:n])
        gate.set()
        body = await reading.rest()
    assert body.replace(sign, b"") == b"".join(steps)


async def test_no_sign_of_life_while_events_flow():
    """A stream that flows gets nothing added: each event restarts the silence."""
    gates = [asyncio.Event() for _ in range(8)]
    words = [encode_step({"choices": [{"delta": {"content": f"w{n}"}}]}) for n in range(9)]
    steps = [words[0]]
    for gate, word in zip(gates, words[1:], strict=True):
        steps += [Until(gate), word]
    last = chat_events(usage=False)[-2:]
    # one event a tenth of the interval: eight of them last less than one silence, the keep-alives would need two
    async with (
        Gateway.test(
            upstream=ScriptedUpstream(Stream(*steps, *last)), settings={"server": {"keepalive_interval": 5}}
        ) as gw,
        streamed(gw) as reading,
    ):
        for n, gate in enumerate(gates):
            await reading.until(f"w{n}".encode())
            gate.set()
        body = await reading.rest()
    assert body == b"".join(words) + b"".join(map(encode_step, last))


async def test_events_restart_the_silence():
    """The next sign of life is due one interval after the last event, not after the last sign."""
    gates = [asyncio.Event() for _ in range(4)]
    words = [encode_step({"choices": [{"delta": {"content": f"w{n}"}}]}) for n in range(5)]
    steps = [words[0]]
    for gate, word in zip(gates, words[1:], strict=True):
        steps += [Until(gate), word]
    interval = 0.4
    loop = asyncio.get_running_loop()
    async with (
        Gateway.test(
            upstream=ScriptedUpstream(Stream(*steps, end="hang")), settings={"server": {"keepalive_interval": interval}}
        ) as gw,
        streamed(gw) as reading,
    ):
        for n, gate in enumerate(gates):
            await reading.until(f"w{n}".encode())
            loop.call_later(interval / 4, gate.set)
        await reading.until(b"w4")
        last = loop.time()
        assert b": keep-alive" not in reading.body
        await reading.until(b": keep-alive")
        assert loop.time() - last >= interval * 0.7


@pytest.mark.parametrize("endpoint", EVENTS)
async def test_a_failure_after_the_commit_is_the_dialects_error_event(endpoint):
    """The status line is out: what fails then is told by the error event of the dialect, and the stream ends."""
    _, sign = EVENTS[endpoint]
    gate = asyncio.Event()

    class Late(Error):
        async def send(self, wire, seen):
            await gate.wait()
            return await super().send(wire, seen)

    async with Gateway.test(upstream=ScriptedUpstream(Late(503)), settings={"server": SOON}) as gw:
        async with streamed(gw, endpoint) as reading:
            await reading.until(sign)
            gate.set()
            body = await reading.rest()
        [exchange] = await gw.finished()
    told = body.replace(sign, b"").split(b"data: ")[1]
    assert exchange.outcome == "upstream_error"
    data = json.loads(told)
    if endpoint == "messages":
        assert (data["type"], data["error"]["type"]) == ("error", "overloaded_error")
    elif endpoint == "responses":
        assert (data["type"], data["code"], data["sequence_number"]) == ("error", "upstream_error", 0)
    else:
        assert set(data["error"]) == {"message", "type", "param", "code"}
    assert b"[DONE]" not in body
    assert b"message_stop" not in body


async def test_a_fallback_after_the_commit_is_silent():
    """Signs of life don't end the fallback window: the next model's answer comes, only the headers can't say so."""
    upstream = ScriptedUpstream(Hang())
    settings = {"server": SOON, "upstream": {"first_event_timeout": 0.3}}
    async with Gateway.test(plugins=[Two, Fallback], upstream=upstream, settings=settings) as gw:
        async with streamed(gw) as reading:
            await reading.until(b": keep-alive")
            body = await reading.rest()
            assert reading.reply.headers["x-xenios-attempts"] == "1"
        [exchange] = await gw.finished()
    assert body.endswith(b"data: [DONE]\n\n")
    assert b"error" not in body
    assert [a.target.model for a in exchange.attempts] == ["test/model", "healthy/model"]
    assert exchange.outcome == "ok"


async def test_a_stream_that_has_shown_content_never_falls_back():
    """After content a second model's answer would be glued to the first one's half."""
    upstream = ScriptedUpstream(Stream(*chat_events()[:3], end="cut"))
    async with Gateway.test(plugins=[Two, Fallback], upstream=upstream) as gw:
        reply = await gw.chat(stream=True)
        [exchange] = await gw.finished()
    assert b'"upstream_truncated"' in reply.body
    assert (len(exchange.attempts), len(gw.upstream.seen)) == (1, 1)


async def test_a_stream_in_time_is_not_committed_early():
    """An error before `stream_commit_after` still has its HTTP status."""
    async with Gateway.test(upstream=ScriptedUpstream(Error(503))) as gw:
        assert (await gw.chat(stream=True)).status == 503


async def test_a_whole_reply_is_not_kept_alive():
    """Who didn't ask for a stream gets no comments: they would break its JSON."""
    gate = asyncio.Event()
    started = asyncio.Event()

    class Late(Json):
        async def send(self, wire, seen):
            started.set()
            await gate.wait()
            return await super().send(wire, seen)

    answer = Late(chat_completion())
    async with Gateway.test(upstream=ScriptedUpstream(answer), settings={"server": {**SOON, **OFTEN}}) as gw:
        asking = asyncio.gather(gw.chat())
        await started.wait()
        asyncio.get_running_loop().call_later(0.2, gate.set)  # several silences
        [reply] = await asking
    assert reply.data["object"] == "chat.completion"


async def test_a_commit_runs_response_started_once():
    """Plugins see the head of each reply exactly once, committed early or not."""
    seen = []

    class Heads:
        def __init__(self, config, services):
            del config, services

        @hookimpl
        def response_started(self, exchange):
            seen.append(exchange.status)

    gate = asyncio.Event()
    upstream = ScriptedUpstream(Stream(Until(gate), *chat_events()))
    async with Gateway.test(plugins=[Heads], upstream=upstream, settings={"server": SOON}) as gw:
        async with streamed(gw) as reading:
            await reading.until(b": keep-alive")
            gate.set()
            await reading.rest()
        await gw.finished()
    assert seen == [200]


async def test_a_keep_alive_that_comes_too_late_is_not_sent():
    """A keep-alive that was due just when the stream ended does not get into the next reply on the connection."""
    async with Gateway.test() as gw:
        runs = []

        class Watched(Run):
            async def _end_stream(self):
                runs.append(self)
                await super()._end_stream()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gateway.server.Run", Watched)
            first = await gw.chat(stream=True)
            await runs[0]._keep_alive()
            second = await gw.chat()
        assert first.body.endswith(b"data: [DONE]\n\n")
        assert (second.status, second.data["object"]) == (200, "chat.completion")


async def test_lines_about_a_stream_that_was_committed_early_are_its_own():
    """Who logs while the headers go out before an upstream answered, logs for this request, as always."""

    heard = []

    class Speaker:
        reads_settings = ()

        def __init__(self, config, services): ...

        @hookimpl
        def response_started(self, exchange):
            watch = logs.handling.get()
            heard.append(watch is not None and watch.exchange is exchange)

    answer = Stream(Pause(0.3), *chat_events("Hello"))
    async with Gateway.test(plugins=[Speaker], upstream=ScriptedUpstream(answer), settings={"server": SOON}) as gw:
        await gw.chat(stream=True)
    assert heard == [True]
