"""P6: what the client gets for each way in which an upstream fails: one outcome per cell, with and without a fallback.

The table below is the documented one. A cell says what a client without fallbacks gets (HTTP status, error code; for a
stream that had begun, status 200 and the code of the error event), the exchange's outcome, and whether the `fallback`
plugin turns the failure into the next model's answer.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import zlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway import Cause, Cost, Decision, Source, Target, hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import (
    COMMENT,
    COST,
    BadGzip,
    Body,
    Close,
    Cut,
    Error,
    Gzip,
    Hang,
    Json,
    Raw,
    Redirect,
    Reset,
    ScriptedUpstream,
    Stream,
    Until,
    chat_completion,
    chat_error,
    chat_events,
    chat_usage,
    encode_step,
)
from gateway_plugins.fallback import Plugin as Fallback
from tests.faults.endpoints import ask

PATIENCE = 0.4  # seconds, where the answer is that it runs out; elsewhere a busy machine shall not matter
WORDS = chat_events("Hello there", comments=False)
BEGUN = WORDS[:2]  # the role alone, then "Hell"
SHOWN = b"".join(encode_step(step) for step in BEGUN)
PREAMBLE = [COMMENT, WORDS[0], COMMENT]
ERROR_200 = Json({"error": {"code": 502, "message": "Provider returned error", "metadata": {"provider_name": "X"}}})
MODERATED = Error(
    403, message="Flagged", metadata={"reasons": ["violence"], "flagged_input": "...", "error_type": "unmapped"}
)
TOO_LONG = Error(400, message="Too long", metadata={"error_type": "context_length_exceeded"})


@dataclass(frozen=True)
class Cell:
    """`answer`: what the upstream does; None: it can't be reached."""

    answer: object
    status: int
    code: str | None
    outcome: str
    falls_back: bool
    shown: bytes = b""  # content that stands before the error

    @property
    def begun(self) -> bool:
        return self.status == 200

    @property
    def patience(self):
        if self.outcome != "timeout":
            return {}
        return {"stall_timeout": PATIENCE, "first_event_timeout": PATIENCE}


def unreachable(answer) -> Cell:
    return Cell(answer, 502, "upstream_unreachable", "upstream_error", falls_back=True)


def late(answer) -> Cell:
    return Cell(answer, 504, "upstream_timeout", "timeout", falls_back=True)


def bad_reply(answer) -> Cell:
    return Cell(answer, 502, "upstream_bad_reply", "upstream_error", falls_back=True)


def reported(answer, status=502, code="upstream_error", *, falls_back=True) -> Cell:
    return Cell(answer, status, code, "upstream_error", falls_back)


def truncated(answer) -> Cell:
    return Cell(answer, 502, "upstream_truncated", "upstream_truncated", falls_back=True)


def broken_off(answer, code, outcome) -> Cell:
    return Cell(answer, 200, code, outcome, falls_back=False, shown=SHOWN)


WHOLE = Json(chat_completion())
REFUSED, NO_NAME = "refused", "no such name"  # not answers: the upstream's address is wrong
# fault: (whole, stream)
TABLE: dict[str, tuple[Cell, Cell]] = {
    "refused": (unreachable(REFUSED), unreachable(REFUSED)),
    "DNS failure": (unreachable(NO_NAME), unreachable(NO_NAME)),
    "reset before the head": (unreachable(Reset()), unreachable(Reset())),
    "closed before the head": (unreachable(Close()), unreachable(Close())),
    "429": (
        reported(Error(429), 429, "rate_limit_exceeded"),
        reported(Error(429), 429, "rate_limit_exceeded"),
    ),
    "429 as text": (
        reported(Error(429, "slow down"), 429, "rate_limit_exceeded"),
        reported(Error(429, "slow down"), 429, "rate_limit_exceeded"),
    ),
    "500": (reported(Error(500), 500), reported(Error(500), 500)),
    "503": (reported(Error(503), 503), reported(Error(503), 503)),
    "529": (reported(Error(529), 529), reported(Error(529), 529)),
    "500 as HTML": (reported(Error(500, "<h1>Oops</h1>"), 500), reported(Error(500, "<h1>Oops</h1>"), 500)),
    "200 with an error body": (reported(ERROR_200), reported(ERROR_200)),
    "200 with HTML": (
        bad_reply(Body(b"<html>Welcome</html>", "text/html")),
        bad_reply(Body(b"<html>Welcome</html>", "text/html")),
    ),
    "200 of the other kind": (bad_reply(Stream(*WORDS)), bad_reply(WHOLE)),
    "204": (bad_reply(Body(b"", status=204)), bad_reply(Body(b"", status=204))),
    "empty body": (bad_reply(Body(b"", "application/json")), truncated(Stream())),
    "redirect": (bad_reply(Redirect("http://127.0.0.1:1/")), bad_reply(Redirect("http://127.0.0.1:1/"))),
    "hang before the first byte": (late(Hang()), late(Hang())),
    "head, then hang": (late(Cut(WHOLE, 0, "hang")), late(Stream(end="hang"))),
    "preamble, then an error": (
        reported(Stream(b"  \n", b'{"error":{"code":502,"message":"x"}}', content_type="application/json")),
        reported(Stream(*PREAMBLE, chat_error(502))),
    ),
    "preamble, then hang": (
        late(Stream(b"  \n", content_type="application/json", end="hang")),
        late(Stream(*PREAMBLE, end="hang")),
    ),
    "preamble, then cut": (
        truncated(Stream(b"  \n", content_type="application/json", end="cut")),
        truncated(Stream(*PREAMBLE, end="cut")),
    ),
    "preamble, then the end": (
        bad_reply(Stream(b"  \n", content_type="application/json")),
        truncated(Stream(*PREAMBLE, "[DONE]")),
    ),
    "hang mid-stream": (
        late(Cut(WHOLE, 30, "hang")),
        broken_off(Stream(*BEGUN, end="hang"), "upstream_timeout", "timeout"),
    ),
    "cut mid-stream": (
        truncated(Cut(WHOLE, 30)),
        broken_off(Stream(*BEGUN, end="cut"), "upstream_truncated", "upstream_truncated"),
    ),
    "reset mid-stream": (
        truncated(Cut(WHOLE, 30, "reset")),
        broken_off(Stream(*BEGUN, end="reset"), "upstream_truncated", "upstream_truncated"),
    ),
    "ended without finishing": (
        bad_reply(Body(b'{"choices":[{"mess', "application/json")),
        broken_off(Stream(*BEGUN, "[DONE]"), "upstream_truncated", "upstream_truncated"),
    ),
    "error mid-stream": (
        reported(Json({"choices": [{"error": {"code": 502, "message": "x"}, "finish_reason": "error"}]})),
        broken_off(Stream(*BEGUN, chat_error(502)), "upstream_error", "upstream_error"),
    ),
    "malformed chunk": (
        bad_reply(Body(b"{choices", "application/json")),
        bad_reply(Stream(COMMENT, b"data: {half\n\n", *WORDS)),
    ),
    "malformed finish": (
        bad_reply(Body(b'{"choices":[]', "application/json")),
        Cell(
            Stream(*BEGUN, b'data: {"choices":[{"finish_reason":"stop"\n\n', "[DONE]"),
            200, "upstream_truncated", "upstream_truncated", falls_back=False,
            shown=SHOWN + b'data: {"choices":[{"finish_reason":"stop"\n\n',
        ),
    ),
    "broken chunked framing": (
        bad_reply(Raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")),
        bad_reply(Raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")),
    ),
    "not HTTP": (bad_reply(Raw(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")), bad_reply(Raw(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"))),
    "bad gzip": (bad_reply(BadGzip()), bad_reply(BadGzip())),
    "no such model": (
        reported(Error(404, message="No endpoints found"), 404, "model_not_found"),
        reported(Error(404, message="No endpoints found"), 404, "model_not_found"),
    ),
    "our key refused": (
        reported(Error(401), 502, "upstream_auth", falls_back=False),
        reported(Error(401), 502, "upstream_auth", falls_back=False),
    ),
    "out of credit": (
        reported(Error(402), 402, "upstream_payment_required", falls_back=False),
        reported(Error(402), 402, "upstream_payment_required", falls_back=False),
    ),
    "moderation 403": (
        reported(MODERATED, 403, "content_policy_violation", falls_back=False),
        reported(MODERATED, 403, "content_policy_violation", falls_back=False),
    ),
    "context length": (
        reported(TOO_LONG, 400, "context_length_exceeded", falls_back=False),
        reported(TOO_LONG, 400, "context_length_exceeded", falls_back=False),
    ),
    "invalid request": (
        reported(Error(400, message="temperature"), 400, "invalid_request", falls_back=False),
        reported(Error(400, message="temperature"), 400, "invalid_request", falls_back=False),
    ),
}  # fmt: skip
CELLS = [
    pytest.param(cell, stream, id=f"{fault}-{'stream' if stream else 'whole'}")
    for fault, cells in TABLE.items()
    for stream, cell in zip((False, True), cells, strict=True)
]


@pytest.fixture(params=["httptools", "aiohttp"], autouse=True)
def transport(request, monkeypatch):
    """Upstreams that name none have this one."""
    monkeypatch.setenv("XENIOS_TEST_TRANSPORT", request.param)


class BrokenFirst:
    """Decides for the asked model at the broken upstream first, then for a healthy one."""

    def __init__(self, config, services):
        del config, services

    @hookimpl
    async def choose_targets(self, exchange):
        asked = exchange.body["model"]
        return Decision(asked, (Target(asked, "broken"), Target("healthy/model", "openrouter")))


@asynccontextmanager
async def gateway(answer, *plugins, catalogue=None, **upstream_settings):
    """A gateway whose first target fails as `answer` says, with a healthy upstream beside it."""
    broken = ScriptedUpstream(default=None if isinstance(answer, str) else answer)
    await broken.start()
    try:
        url = "http://no-such-host.invalid/v1" if answer == NO_NAME else broken.url
        if answer == REFUSED:
            await broken.close()
        settings = {
            "upstreams": {"broken": {"base_url": url, "api_key": "sk-or-v1-broken"}},
            "upstream": upstream_settings,
            "catalogue": catalogue or {},
        }
        async with Gateway.test(plugins=[BrokenFirst, *plugins], settings=settings) as gw:
            yield gw
    finally:
        await broken.close()


def error_event(body: bytes):
    """The error that the body's last event is; None if it is none."""
    last = body.split(b"\n\n")[-2]
    return json.loads(last.removeprefix(b"data: ")).get("error") if last != b"data: [DONE]" else None


@pytest.mark.promise("P6.plain")
@pytest.mark.promise("P6.matrix")
@pytest.mark.parametrize("cell,stream", CELLS)
async def test_without_a_fallback_the_client_is_told(cell, stream):
    """Each failure is told to the client in its dialect by one documented status and code."""
    async with gateway(cell.answer, **cell.patience) as gw:
        reply = await gw.chat(stream=stream)
        [exchange] = await gw.finished()
    error = error_event(reply.body) if cell.begun else reply.data["error"]
    assert (reply.status, error["code"], exchange.outcome) == (cell.status, cell.code, cell.outcome)
    assert set(error) == {"message", "type", "param", "code"}
    assert reply.headers["x-xenios-attempts"] == "1"
    if cell.begun:
        assert reply.body.startswith(cell.shown + b'data: {"error"')
        assert b"[DONE]" not in reply.body
    assert not reply.cut


@pytest.mark.promise("P6.plain")
@pytest.mark.promise("P6.matrix")
@pytest.mark.parametrize("cell,stream", CELLS)
async def test_with_a_fallback_the_next_model_answers_where_it_can(cell, stream):
    """With a healthy second target the client gets a clean answer, unless the request is at fault or had been shown."""
    async with gateway(cell.answer, Fallback, **cell.patience) as gw:
        reply = await gw.chat(stream=stream)
        [exchange] = await gw.finished()
        asked = [seen.model for seen in gw.upstream.seen]
    if not cell.falls_back:
        error = error_event(reply.body) if cell.begun else reply.data["error"]
        assert (reply.status, error["code"], exchange.outcome) == (cell.status, cell.code, cell.outcome)
        assert (asked, len(exchange.attempts)) == ([], 1)
        return
    assert (reply.status, exchange.outcome, asked) == (200, "ok", ["healthy/model"])
    assert (reply.headers["x-xenios-attempts"], reply.headers["x-xenios-model"]) == ("2", "healthy/model")
    assert [attempt.cause is None for attempt in exchange.attempts] == [False, True]
    told = [attempt.cost for attempt in exchange.attempts if attempt.cost.source is Source.UPSTREAM]
    assert told[-1] == Cost(10**12 * COST, Source.UPSTREAM)
    assert exchange.cost.pico_usd == sum(cost.pico_usd for cost in told)
    if stream:
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert b"error" not in reply.body
        assert (
            reply.body.count(b'"role":"assistant","content":""},"finish_reason":null') == 1
        )  # one preamble: the winner's
    else:
        assert reply.data["choices"][0]["message"]["content"] == "Hello there"


PRICE = {"input": 0, "cache_write": 0, "output": 1, "context_length": 8000, "max_output": 500}
PRICES = {"overrides": {"test/model": {**PRICE, "upstream": "broken"}, "healthy/model": PRICE}}
RESERVED = 100  # micro-USD: what an answer may cost at most by its price
TOLD = round(10**6 * COST)  # what it costs if the upstream tells
BUDGET = {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": "0.01", "per": "total"}]}}
UNSURE = {Cause.TIMEOUT, Cause.TRUNCATED, Cause.BAD_REPLY}


@pytest.mark.promise("P6.matrix")
@pytest.mark.parametrize("cell,stream", CELLS)
async def test_nothing_is_charged_twice(cell, stream):
    """The budget holds what the answer cost, once; besides, what was reserved for an attempt that may have been billed
    without saying so. Nothing stays reserved.
    """
    async with gateway(cell.answer, BUDGET, Fallback, catalogue=PRICES, **cell.patience) as gw:
        await gw.chat(stream=stream, max_tokens=RESERVED)
        [exchange] = await gw.finished()
        async with asyncio.timeout(5):
            while (sums := (await gw.snapshot.services.ledger.budgets(["budgets:all:total:"]))[0])[1]:
                await asyncio.sleep(0.005)
    assert len(exchange.attempts) == 1 + cell.falls_back
    first = exchange.attempts[0]
    charged = TOLD * (exchange.outcome == "ok")
    if first.cost.source is Source.UPSTREAM:  # a whole answer where a stream was due, with its cost
        charged += TOLD
    elif first.cause in UNSURE or cell.begun:
        charged += RESERVED
    assert sums == (charged, 0)
    assert (exchange.cost.micro_usd or 0) == charged


@pytest.mark.parametrize("stream", [False, True])
async def test_when_all_fail_the_last_failure_is_told(stream):
    """Own fallbacks exhausted: the client gets the last error and `x-should-retry: false`."""
    async with gateway(Error(503), (Fallback, {"retries": {}})) as gw:
        gw.upstream.script(Error(429, headers={"Retry-After": "7"}))
        reply = await gw.chat(stream=stream)
    assert (reply.status, reply.data["error"]["code"]) == (429, "rate_limit_exceeded")
    assert (reply.headers["x-should-retry"], reply.headers["retry-after"]) == ("false", "7")
    assert reply.headers["x-xenios-attempts"] == "2"


async def test_a_bad_certificate_is_not_accepted():
    """An upstream whose certificate nobody vouches for gets neither key nor request: 502."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(__file__).with_name("untrusted.pem"))
    heard = []

    async def serve(reader, writer):
        heard.append(await reader.read(100))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with server:
        settings = {"upstreams": {"openrouter": {"base_url": url}}}
        async with Gateway.test(settings=settings) as gw:
            reply = await gw.chat()
            [exchange] = await gw.finished()
        settings["upstreams"]["openrouter"]["ca_file"] = str(Path(__file__).with_name("untrusted.pem"))
        async with Gateway.test(settings=settings) as gw:
            trusted = await gw.chat()
    assert (reply.status, reply.data["error"]["code"]) == (502, "upstream_unreachable")
    assert exchange.attempts[0].cause == "tls"
    assert "certificate" in reply.data["error"]["message"]
    assert len(heard) == 1  # by the one who trusts it
    assert trusted.data["error"]["code"] == "upstream_unreachable"  # it hung up, but after the handshake


YEAR = str(365 * 86400)


@pytest.mark.parametrize(
    "given,told",
    [
        ("7", "7"), ("0", "1"), ("1.4", "1"), ("-5", None), ("1e12", YEAR), ("nan", None), ("inf", YEAR),
        ("soon", None), ("Sun, 06 Nov 1994 08:49:37 GMT", None), ("86400", "86400"),
    ],
)  # fmt: skip
async def test_retry_after_is_passed_if_it_makes_sense(given, told):
    """A wait that is negative, past or no number is not passed on; one that is endless is a year."""
    async with Gateway.test(upstream=ScriptedUpstream(Error(429, headers={"Retry-After": given}))) as gw:
        reply = await gw.chat()
    assert (reply.status, reply.headers.get("retry-after")) == (429, told)


async def test_retry_after_as_a_date_becomes_seconds():
    """An HTTP date is told as seconds from now."""
    answer = Error(503, headers={"Retry-After": "Fri, 31 Dec 2049 23:59:59 GMT"})
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await gw.chat()
    assert int(reply.headers["retry-after"]) > 0
    assert int(reply.headers["retry-after-ms"]) == pytest.approx(int(reply.headers["retry-after"]) * 1000, abs=1000)


async def test_an_event_without_end_is_bounded():
    """An event larger than `max_event` ends the stream in an error; the gateway doesn't gather it."""
    begun = asyncio.Event()

    class Begun:
        def __init__(self, config, services):
            del config, services

        @hookimpl
        def response_started(self, exchange):
            begun.set()

    big = b"data: " + b"x" * 70_000
    answer = Stream(*BEGUN, Until(begun), big, end="hang")
    settings = {"upstream": {"max_event": 50_000}}
    async with Gateway.test(plugins=[Begun], upstream=ScriptedUpstream(answer), settings=settings) as gw:
        reply = await gw.chat(stream=True)
        await gw.upstream.wait_closed(gw.upstream.seen[0])
    assert error_event(reply.body)["code"] == "upstream_bad_reply"
    assert len(reply.body) < 5000


async def test_a_preamble_without_end_is_bounded():
    """More than 64 KiB without content is no answer: 502, and a fallback may take over."""
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "padding": "x" * 8000}]}
    async with gateway(Stream(*[role] * 9, end="hang")) as gw:
        reply = await gw.chat(stream=True)
    assert (reply.status, reply.data["error"]["code"]) == (502, "upstream_bad_reply")


async def test_a_preamble_up_to_the_bound_is_passed():
    """What came before the first content reaches the client too, up to 64 KiB of it."""
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "padding": "x" * 8000}]}
    async with Gateway.test(upstream=ScriptedUpstream(Stream(*[role] * 7, *WORDS))) as gw:
        reply = await gw.chat(stream=True)
    assert reply.body.count(b"padding") == 7
    assert reply.body.endswith(b"[DONE]\n\n")


async def test_what_comes_after_done_is_ignored():
    """Nothing that follows the clean end reaches the client, nor delays it."""
    answer = Stream(*WORDS, chat_error(502), {"choices": [{"delta": {"content": "ghost"}}]}, end="hang")
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await gw.chat(stream=True)
        [exchange] = await gw.finished()
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert b"ghost" not in reply.body
    assert exchange.outcome == "ok"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_compressed_reply_is_unpacked(stream):
    """An upstream that compresses though nobody asked it to: the client gets plain bytes, event by event."""
    inner = Stream(*WORDS) if stream else WHOLE
    async with Gateway.test(upstream=ScriptedUpstream(Gzip(inner))) as gw:
        reply = await gw.chat(stream=stream)
        [exchange] = await gw.finished()
    assert "Content-Encoding" not in reply.headers
    assert b"Hell" in reply.body
    assert (reply.status, exchange.usage.output_tokens) == (200, 5)


@pytest.mark.parametrize("endpoint", ["chat/completions", "audio/speech"])
async def test_a_compressed_reply_that_ends_early_is_truncated(endpoint):
    """HTTP says complete, gzip says not: that is a truncation, not an answer."""
    packer = zlib.compressobj(wbits=31)
    half = packer.compress(b'{"choices":[]}') + packer.flush(zlib.Z_SYNC_FLUSH)
    kind = "audio/mpeg" if endpoint == "audio/speech" else "application/json"
    answer = Body(half, kind, headers={"Content-Type": kind, "Content-Encoding": "gzip"})
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        if endpoint == "audio/speech":
            reply = await ask(gw, endpoint)
            assert reply.cut
        else:
            reply = await ask(gw, endpoint)
            assert (reply.status, reply.data["error"]["code"]) == (502, "upstream_truncated")
        [exchange] = await gw.finished()
    assert exchange.outcome == "upstream_truncated"


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_a_gzip_bomb_is_bounded(kind):
    """A compressed reply is unpacked up to `max_reply`, not beyond."""
    bomb = zlib.compressobj(level=9, wbits=31)
    data = bomb.compress(bytes(20 * 2**20)) + bomb.flush()
    answer = Body(data, kind, headers={"Content-Encoding": "gzip", "Content-Type": kind})
    async with Gateway.test(upstream=ScriptedUpstream(answer), settings={"upstream": {"max_reply": 2**20}}) as gw:
        reply = await gw.chat(stream=kind == "text/event-stream")
    assert (reply.status, reply.data["error"]["code"]) == (502, "upstream_bad_reply")


async def test_a_whole_reply_is_bounded():
    """A reply larger than `max_reply` is 502, and the upstream's connection is closed."""
    answer = Stream(b'{"choices":["', *[b"x" * 60_000] * 20, content_type="application/json", end="hang")
    async with Gateway.test(upstream=ScriptedUpstream(answer), settings={"upstream": {"max_reply": 100_000}}) as gw:
        reply = await gw.chat()
        await gw.upstream.wait_closed(await gw.upstream.wait_seen(1))
    assert (reply.status, reply.data["error"]["code"]) == (502, "upstream_bad_reply")


@pytest.mark.parametrize(
    "usage",
    [
        False, chat_usage(-1, -5, cost=-1.0), chat_usage(10**12, 10**12, cost=1e9),
        {"prompt_tokens": "10", "completion_tokens": 1.5, "cost": "free"}, {"prompt_tokens": True}, {},
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_usage_that_can_not_be_is_unknown(usage, stream):
    """Missing, negative, absurd or non-numeric usage is unknown, never 0; the answer passes all the same."""
    answer = Stream(*chat_events(usage=usage)) if stream else Json(chat_completion(usage=usage))
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await gw.chat(stream=stream)
        [exchange] = await gw.finished()
    assert reply.status == 200
    assert (exchange.usage.input_tokens, exchange.usage.output_tokens) == (None, None)
    assert (exchange.usage.source, exchange.cost.pico_usd, exchange.cost.source) == ("unknown", None, "unknown")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
async def test_a_stream_cut_before_its_usage_is_estimated(line_end):
    """Tokens seen before a cut are counted, marked as an estimate, whatever line ends the upstream writes."""
    pieces = [s.replace(b"\n", line_end) for s in map(encode_step, chat_events("a b c d e f", pieces=11)[1:8])]
    async with Gateway.test(upstream=ScriptedUpstream(Stream(*pieces, end="cut"))) as gw:
        await gw.chat("x" * 400, stream=True)
        [exchange] = await gw.finished()
    assert (exchange.usage.source, exchange.usage.output_tokens) == ("estimate", 7)
    assert exchange.usage.input_tokens > 90
