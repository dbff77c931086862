"""DESIGN §5, sentence by sentence: what the core changes between an upstream and the client, and what it lets through."""

from __future__ import annotations

import json

import pytest

from gateway import Principal, Scopes, hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import (
    Body,
    Error,
    Json,
    Redirect,
    ScriptedUpstream,
    Stream,
    anthropic_error,
    chat_completion,
    chat_error,
    chat_events,
    completion_events,
    encode_step,
    event,
    message_error,
    message_events,
    openrouter_error,
    response_events,
    response_failed,
)
from gateway_plugins.fallback import Plugin as Fallback
from tests.faults.endpoints import BODIES, Two, ask
from tests.faults.raw import CHAT, connect

ALL_FIELDS = ["models", "fallbacks", "route", "provider", "plugins", "service_tier", "presets", "auto_routers"]
FOUR_KEYS = {"message", "type", "param", "code"}
EVENTS = {
    "chat/completions": chat_events,
    "completions": completion_events,
    "responses": response_events,
    "messages": message_events,
}
IMAGE_EVENTS = [
    event(f"image_generation.{kind}", {"type": f"image_generation.{kind}", "b64_json": "aa"})
    for kind in ("partial_image", "completed")
]
SPOKEN = [
    event("transcript.text.delta", {"type": "transcript.text.delta", "delta": "Hi"}),
    event("transcript.text.done", {"type": "transcript.text.done", "text": "Hi"}),
]


def last_event(body: bytes) -> tuple[str | None, dict]:
    """Name and data of the last event."""
    name, data = None, b""
    for line in body.split(b"\n\n")[-2].split(b"\n"):
        if line.startswith(b"event: "):
            name = line[7:].decode()
        elif line.startswith(b"data: "):
            data = line[6:]
    return name, json.loads(data)


async def sent(gw: Gateway, n: int = 1):
    return await gw.upstream.wait_seen(n)


# --- an error is an HTTP error -----------------------------------------------------------------------------------------

ERROR_BODIES = {
    "OpenRouter's": ({"error": openrouter_error(502, "Bad", error_type="provider_unavailable")}, 502, "upstream_error"),
    "with user_id": ({"error": {"code": 429, "message": "Slow"}, "user_id": "u"}, 429, "rate_limit_exceeded"),
    "code as text": ({"error": {"code": "server_error", "message": "x"}}, 502, "upstream_error"),
    "error is a string": ({"error": "boom"}, 502, "upstream_error"),
    "choices[0].error": (
        {
            "choices": [
                {"error": {"code": 429, "message": "x"}, "finish_reason": "error", "message": {"content": "Hal"}}
            ]
        },
        429,
        "rate_limit_exceeded",
    ),
    "finish_reason error": (chat_completion("Hal", finish="error"), 502, "upstream_error"),
    "second choice": (
        {"choices": [{"finish_reason": "stop"}, {"finish_reason": "error", "message": {"content": "x"}}]},
        502,
        "upstream_error",
    ),
}


@pytest.mark.parametrize("body,status,code", ERROR_BODIES.values(), ids=ERROR_BODIES)
async def test_a_200_that_is_an_error_becomes_one(body, status, code):
    """Clients take a 200 with an error body for a broken answer: they get the HTTP error that it is."""
    async with Gateway.test(upstream=ScriptedUpstream(Json(body))) as gw:
        reply = await gw.chat()
    assert (reply.status, reply.data["error"]["code"]) == (status, code)
    assert set(reply.data["error"]) == FOUR_KEYS
    assert set(reply.data) == {"error"}


async def test_an_error_of_null_is_none():
    """`"error": null` stands in good replies."""
    good = {**chat_completion(), "error": None}
    async with Gateway.test(upstream=ScriptedUpstream(Json(good))) as gw:
        assert (await gw.chat()).status == 200


@pytest.mark.parametrize(
    "endpoint,body",
    [
        ("responses", {"status": "failed", "error": {"code": "server_error", "message": "x"}, "error_type": "server"}),
        ("responses", {"error": {"code": 502, "message": "x"}}),
        ("messages", anthropic_error(529, "Overloaded")),
        ("embeddings", {"error": {"code": 502, "message": "x"}}),
        ("rerank", {"error": {"code": 502, "message": "x"}}),
        ("images/generations", {"error": {"code": 502, "message": "x"}}),
        ("audio/speech", {"error": {"code": 502, "message": "x"}}),
        ("audio/transcriptions", {"error": {"code": 502, "message": "x"}}),
    ],
)
async def test_a_200_that_is_an_error_becomes_one_at_every_endpoint(endpoint, body):
    """The same holds at every endpoint, in each one's error shape."""
    async with Gateway.test(upstream=ScriptedUpstream(Json(body))) as gw:
        reply = await ask(gw, endpoint)
        [exchange] = await gw.finished()
    assert (reply.status, exchange.outcome) == (502, "upstream_error")
    if endpoint == "messages":
        assert (reply.data["type"], reply.data["error"]["type"]) == ("error", "api_error")
    else:
        assert set(reply.data["error"]) == FOUR_KEYS


@pytest.mark.parametrize(
    "finish",
    [
        {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]},
        chat_error(502),
        chat_error("server_error"),
        {"error": {"code": 502, "message": "Provider disconnected"}},
        {"choices": [{"index": 0, "delta": {}, "error": {"code": 502, "message": "x"}}]},
    ],
)
async def test_an_error_in_a_stream_is_seen_by_every_client(finish):
    """SDKs overlook errors beside `choices` and `finish_reason: error`: they get `data: {"error": …}` alone, no [DONE]."""
    answer = Stream(*chat_events()[:3], finish, "[DONE]")
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await gw.chat(stream=True)
        [exchange] = await gw.finished()
    name, data = last_event(reply.body)
    assert (reply.status, name, exchange.outcome) == (200, None, "upstream_error")
    assert set(data) == {"error"}
    assert set(data["error"]) == FOUR_KEYS
    assert data["error"]["code"] == "upstream_error"
    assert b"[DONE]" not in reply.body
    assert b'"finish_reason":"error"' not in reply.body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "status,error,seen,kind,code",
    [
        (400, {"code": 400, "message": "x"}, 400, "invalid_request_error", "invalid_request"),
        (400, {"code": 400, "message": "maximum context length is 8192 tokens"}, 400, "invalid_request_error",
         "context_length_exceeded"),
        (413, {"code": 413, "message": "x"}, 413, "invalid_request_error", "invalid_request"),
        (402, {"code": 402, "message": "x"}, 402, "insufficient_quota", "upstream_payment_required"),
        (403, {"code": 403, "message": "guardrail"}, 403, "invalid_request_error", "invalid_request"),
        (404, {"code": 404, "message": "x", "availability": {"code": "no_endpoints", "retryable": False}}, 404,
         "invalid_request_error", "model_not_found"),
        (404, {"error_type": "not_found", "http_status": 404, "message": "x",
               "availability": {"code": "model_deprecated"}}, 404, "invalid_request_error", "model_not_found"),
        (429, {"message": "x", "http_status": 429, "availability": {"code": "capacity_exhausted", "retry_after": 9}},
         429, "requests", "rate_limit_exceeded"),
        (503, {"code": 503, "message": "x", "availability": {"code": "temporarily_unavailable"}}, 503, "server_error",
         "upstream_error"),
        (524, {"code": 524, "message": "x"}, 524, "server_error", "upstream_error"),
        (529, {"code": 529, "message": "x"}, 529, "server_error", "upstream_error"),
    ],
)  # fmt: skip
async def test_openrouters_errors_become_openais(status, error, seen, kind, code, stream):
    """OpenRouter's errors carry an integer code and no type: clients get all four keys, with codes they know."""
    async with Gateway.test(upstream=ScriptedUpstream(Json({"error": error}, status))) as gw:
        reply = await gw.chat(stream=stream)
    told = reply.data["error"]
    assert (reply.status, told["type"], told["code"], told["param"]) == (seen, kind, code, None)
    assert set(told) == FOUR_KEYS
    if code == "rate_limit_exceeded":
        assert reply.headers["retry-after"] == "9"


@pytest.mark.parametrize(
    "status,kind",
    [
        (400, "invalid_request_error"), (402, "billing_error"), (404, "not_found_error"), (429, "rate_limit_error"),
        (503, "overloaded_error"), (504, "timeout_error"), (529, "overloaded_error"), (500, "api_error"),
    ],
)  # fmt: skip
async def test_errors_of_messages_are_anthropics(status, kind):
    """`/messages` answers in Anthropic's envelope, its request id in body and header."""
    async with Gateway.test(upstream=ScriptedUpstream(Error(status))) as gw:
        reply = await ask(gw, "messages")
    assert reply.status == status
    assert (reply.data["type"], reply.data["error"]["type"]) == ("error", kind)
    assert reply.data["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("answer", [Error(401, message="bad key sk-or-v1-test"), Error(400, message="sk-or-v1-test?")])
async def test_the_upstreams_key_is_ours_alone(answer):
    """An upstream's 401 is about the gateway's key: it isn't the client's 401, and the key stands in no reply."""
    for stream in (False, True):
        async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
            reply = await gw.chat(stream=stream)
        assert reply.status == (502 if answer.status == 401 else 400)
        assert b"sk-or-v1-test" not in reply.body
    async with Gateway.test(
        upstream=ScriptedUpstream(Stream(*chat_events()[:3], {"error": {"code": 400, "message": "key sk-or-v1-test"}}))
    ) as gw:
        assert b"sk-or-v1-test" not in (await gw.chat(stream=True)).body


# --- truncation -------------------------------------------------------------------------------------------------------


def cut_after(endpoint: str, n: int, end: str) -> Stream:
    """`early`: the dialect's last event comes, though the answer was not finished."""
    steps = STREAMS[endpoint]
    if end == "early":
        return Stream(*steps[:n], steps[-1] if endpoint == "messages" else "[DONE]")
    return Stream(*steps[:n], end=end)


STREAMS = {
    "chat/completions": chat_events(comments=False, usage=False),
    "completions": completion_events(comments=False, usage=False),
    "responses": response_events(comments=False),
    "messages": message_events(comments=False),
    "images/generations": IMAGE_EVENTS,
    "audio/transcriptions": SPOKEN,
}
FIRST_CONTENT = {
    "chat/completions": 2, "completions": 2, "responses": 5, "messages": 4, "images/generations": 1,
    "audio/transcriptions": 1,
}  # fmt: skip
# Where a cut is none: the client has the whole answer by then.
WHOLE_WITHOUT_ITS_END = {"responses", "images/generations", "audio/transcriptions"}
CUTS = [
    pytest.param(endpoint, n, end, id=f"{endpoint}-{n}-{end}")
    for endpoint, steps in STREAMS.items()
    for n in range(FIRST_CONTENT[endpoint], len(steps))
    for end in ("clean", "cut", "reset", "early")
    if not (end == "early" and n == len(steps) - 1 and endpoint not in WHOLE_WITHOUT_ITS_END)  # that is its clean end
]


@pytest.mark.promise("P3.client")
@pytest.mark.parametrize("endpoint,n,end", CUTS)
async def test_a_truncated_stream_never_ends_cleanly(endpoint, n, end):
    """Cut after any event, by the connection or by an early end: the dialect's error comes, never a clean end."""
    async with Gateway.test(upstream=ScriptedUpstream(cut_after(endpoint, n, end))) as gw:
        reply = await ask(gw, endpoint, stream=True)
        [exchange] = await gw.finished()
    assert (reply.status, exchange.outcome) == (200, "upstream_truncated")
    assert reply.body.startswith(b"".join(encode_step(step) for step in STREAMS[endpoint][:n]))
    for mark in (b"[DONE]", b"message_stop", b"response.completed", b"transcript.text.done", b"generation.completed"):
        assert mark not in reply.body
    name, data = last_event(reply.body)
    match endpoint:
        case "chat/completions" | "completions":
            assert (name, set(data), set(data["error"])) == (None, {"error"}, FOUR_KEYS)
        case "responses":
            assert (name, data["type"], data["code"]) == ("error", "error", "upstream_truncated")
            assert data["sequence_number"] == n
            assert set(data) == {"type", "code", "message", "param", "sequence_number"}
        case "messages":
            assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")
            assert data["request_id"] == reply.headers["request-id"]
        case _:
            assert (name, data["type"], set(data["error"])) == ("error", "error", FOUR_KEYS)


@pytest.mark.promise("P3.client")
@pytest.mark.parametrize("end", ["cut", "reset", "hang"])
async def test_a_truncated_speech_ends_uncleanly(end):
    """Sound has no error event: a truncated one ends without its last chunk, so that no player takes it for whole."""
    answer = Stream(b"ID3", b"more", content_type="audio/mpeg", end=end)
    async with Gateway.test(upstream=ScriptedUpstream(answer), settings={"upstream": {"stall_timeout": 0.2}}) as gw:
        reply = await ask(gw, "audio/speech")
        [exchange] = await gw.finished()
    assert (reply.status, reply.cut) == (200, True)
    assert exchange.outcome == ("timeout" if end == "hang" else "upstream_truncated")


@pytest.mark.parametrize("endpoint", sorted(WHOLE_WITHOUT_ITS_END))
@pytest.mark.parametrize("end", ["clean", "cut", "reset", "hang"])
async def test_what_comes_after_the_whole_answer_is_no_truncation(endpoint, end):
    """Where the last event is the clean end, a connection that is lost or stays silent after it is no error."""
    answer = Stream(*STREAMS[endpoint], end=end)
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await ask(gw, endpoint, stream=True)
        [exchange] = await gw.finished()
    assert (reply.body, exchange.outcome) == (b"".join(map(encode_step, STREAMS[endpoint])), "ok")


@pytest.mark.parametrize("last", ["data: [DONE]", "data: [DONE]\n", "data: [DONE]  \n\n", "data:[DONE]\r\n\r\n"])
async def test_an_untidy_end_is_an_end(last):
    """Blanks after `[DONE]`, or a missing blank line, make no truncation of a whole answer."""
    steps = chat_events(comments=False, usage=False)
    async with Gateway.test(upstream=ScriptedUpstream(Stream(*steps[:-1], last.encode()))) as gw:
        reply = await gw.chat(stream=True)
        [exchange] = await gw.finished()
    assert (exchange.outcome, b"error" in reply.body, reply.body.count(b"[DONE]")) == ("ok", False, 1)
    assert reply.body.endswith((b"\n\n", b"\r\n\r\n"))


@pytest.mark.promise("P3.client")
@pytest.mark.parametrize("last", ["data: [DONE]", "data: [DONE]  \n\n"])
async def test_an_untidy_end_before_the_answers_is_a_truncation(last):
    """However it is written: an end before the answer's is not passed on as one."""
    steps = chat_events(comments=False, usage=False)
    async with Gateway.test(upstream=ScriptedUpstream(Stream(*steps[:3], last.encode()))) as gw:
        reply = await gw.chat(stream=True)
        [exchange] = await gw.finished()
    assert (exchange.outcome, b"[DONE]" in reply.body) == ("upstream_truncated", False)


@pytest.mark.parametrize("endpoint", ["chat/completions", "completions", "responses", "messages"])
async def test_a_whole_answer_to_a_stream_is_no_answer(endpoint):
    """An upstream that answers a stream with one body is a bad upstream: a client that reads events would see none."""
    async with Gateway.test(upstream=ScriptedUpstream(Json({"id": "x", "status": "completed", "usage": {}}))) as gw:
        reply = await ask(gw, endpoint, stream=True)
    assert reply.status == 502
    assert b"answered a stream with a whole body" in reply.body


@pytest.mark.parametrize("form", ["text", "srt", "vtt"])
async def test_a_transcript_may_be_text(form):
    """A transcript that was asked for as text or subtitles passes as it is; a page of HTML is still no answer."""
    answers = (Body(b"1\n00:00 --> 00:01\nHello\n", content_type="text/plain"), Body(b"<p>", content_type="text/html"))
    async with Gateway.test(upstream=ScriptedUpstream(*answers)) as gw:
        reply = await ask(gw, "audio/transcriptions", response_format=form)
        assert (reply.status, reply.body) == (200, b"1\n00:00 --> 00:01\nHello\n")
        assert reply.headers["content-type"] == "text/plain"
        assert (await ask(gw, "audio/transcriptions", response_format=form)).status == 502


@pytest.mark.parametrize(
    "endpoint,failure",
    [("responses", response_failed(5)), ("responses", event("error", {"type": "error", "code": "x", "message": "y"})),
     ("messages", message_error(529)), ("images/generations", {"error": {"code": 502, "message": "x"}}),
     ("audio/transcriptions", {"type": "error", "error": {"code": 502, "message": "x"}})],
)  # fmt: skip
async def test_a_reported_failure_is_the_dialects_error(endpoint, failure):
    """What the upstream itself reports in the middle of a stream reaches the client as the dialect's error event."""
    answer = Stream(*STREAMS[endpoint][: FIRST_CONTENT[endpoint]], failure)
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await ask(gw, endpoint, stream=True)
        [exchange] = await gw.finished()
    name, data = last_event(reply.body)
    assert (name, data["type"], exchange.outcome) == ("error", "error", "upstream_error")
    assert b"response.failed" not in reply.body


# --- headers to the client --------------------------------------------------------------------------------------------

HEADERS_OF_UPSTREAMS = [
    ("Set-Cookie", "a=b"), ("Set-Cookie", "__cf_bm=x"), ("Server", "cloudflare"), ("Via", "1.1 x"), ("CF-Ray", "1"),
    ("Keep-Alive", "timeout=5"), ("X-Hop", "secret"), ("Connection", "X-Hop"), ("Proxy-Authenticate", "Basic"),
    ("Upgrade", "h2c"), ("Alt-Svc", "h3"), ("X-Powered-By", "Express"), ("x-xenios-model", "forged"),
    ("x-xenios-attempts", "77"), ("X-Request-Id", "theirs"), ("X-RateLimit-Remaining", "3"), ("x-should-retry", "true"),
    ("Server-Timing", "theirs;dur=1"),
    ("Access-Control-Allow-Origin", "*"), ("Strict-Transport-Security", "max-age=1"), ("X-Generation-Id", "gen-7"),
    ("X-Good", "yes"), ("Trailer", "x"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_that_are_not_the_clients_business_are_dropped(stream):
    """Cookies, hop-by-hop headers, those named by Connection, and marks of the upstream's servers stay here."""
    kind = {"headers": HEADERS_OF_UPSTREAMS}
    answer = Stream(*chat_events(), **kind) if stream else Json(chat_completion(), **kind)
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await gw.chat(stream=stream)
    names = {name.lower() for name in reply.headers}
    assert names <= {
        "content-type", "content-length", "transfer-encoding", "cache-control", "x-accel-buffering", "date", "server",
        "x-request-id", "x-xenios-model", "x-xenios-attempts", "x-generation-id", "x-good",
    }  # fmt: skip
    assert (reply.headers["x-generation-id"], reply.headers["x-good"]) == ("gen-7", "yes")
    assert (reply.headers["server"], reply.headers["x-xenios-attempts"]) == ("xenios", "1")
    assert (reply.headers["x-request-id"] != "theirs", reply.headers["x-xenios-model"]) == (True, "test/model")


@pytest.mark.promise("P8.header")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "answer,status,model,attempts",
    [(None, 200, "test/model", "1"), (Error(503), 200, "healthy/model", "2"), (Error(400), 400, "test/model", "1")],
    ids=["answered", "fallback", "failed"],
)
async def test_every_reply_says_who_answered(answer, status, model, attempts, stream):
    """Request id, the model that served (or was tried last) and the number of attempts stand on every reply."""
    async with Gateway.test(plugins=[Two, Fallback]) as gw:
        if answer is not None:
            gw.upstream.script(answer)
        reply = await gw.chat(stream=stream, headers=None)
        [exchange] = await gw.finished()
    assert reply.status == status
    assert (reply.headers["x-xenios-model"], reply.headers["x-xenios-attempts"]) == (model, attempts)
    assert reply.headers["x-request-id"] == exchange.request_id


@pytest.mark.promise("P8.header")
@pytest.mark.parametrize("endpoint", BODIES)
async def test_every_endpoint_says_who_answered(endpoint):
    """So at every proxied endpoint, refusals included; `/messages` says `request-id` too."""
    async with Gateway.test() as gw:
        good = await ask(gw, endpoint)
        bad = await gw.post(f"/v1/{endpoint}", {"nothing": 1})
    assert (good.status, good.headers["x-xenios-model"], good.headers["x-xenios-attempts"]) == (200, "test/model", "1")
    assert (bad.status, bad.headers["x-xenios-attempts"]) == (400, "0")
    for reply in (good, bad):
        assert reply.headers["x-request-id"].startswith("req_")
        assert reply.headers.get("request-id") == (reply.headers["x-request-id"] if endpoint == "messages" else None)


async def test_a_clients_request_id_is_kept_if_it_is_one():
    """A client's own X-Request-Id is used, at the upstream too; one that could break a log line isn't, nor is a key."""
    async with Gateway.test() as gw:
        key = await gw.post("/v1/chat/completions", {}, headers={"X-Request-Id": gw.key})
        body = {"model": "m", "messages": []}
        good = await gw.post("/v1/chat/completions", body, headers={"X-Request-Id": "abc-1:2"})
        bad = await gw.post("/v1/chat/completions", body, headers={"X-Request-Id": 'a"b c'})
        assert (await sent(gw)).headers["x-request-id"] == "abc-1:2"
    assert good.headers["x-request-id"] == "abc-1:2"
    assert bad.headers["x-request-id"].startswith("req_")
    assert key.headers["x-request-id"].startswith("req_")


async def test_x_should_retry_is_said_only_after_own_fallbacks():
    """After exhausted fallbacks SDKs must not retry; after one plain attempt they may decide themselves."""
    async with Gateway.test(plugins=[Two, Fallback]) as gw:
        gw.upstream.script(Error(503), Error(503), Error(503), Error(400))
        exhausted, single = await gw.chat(), await gw.chat()
    assert (exhausted.status, exhausted.headers["x-should-retry"]) == (503, "false")
    assert (single.status, single.headers.get("x-should-retry")) == (400, None)


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("events", [chat_events, completion_events])
@pytest.mark.parametrize(
    "asked,forwarded",
    [
        ({}, False), ({"stream_options": {"include_usage": True}}, True), ({"usage": {"include": True}}, True),
        ({"stream_options": {"include_usage": False}}, False), ({"stream_options": None, "usage": None}, False),
        ({"usage": {"include": False}}, False),
    ],
)  # fmt: skip
async def test_the_usage_chunk_is_metered_always_and_forwarded_if_asked_for(events, asked, forwarded):
    """Clients that read `choices[0]` crash on it: it comes only to those who asked, in OpenAI's or OpenRouter's way."""
    endpoint = "chat/completions" if events is chat_events else "completions"
    async with Gateway.test(upstream=ScriptedUpstream(Stream(*events()))) as gw:
        reply = await ask(gw, endpoint, stream=True, **asked)
        [exchange] = await gw.finished()
    assert (b'"usage"' in reply.body, reply.body.count(b'"choices":[]')) == (forwarded, int(forwarded))
    assert reply.body.endswith(b"data: [DONE]\n\n")
    usage = exchange.usage
    assert (usage.input_tokens, usage.output_tokens, usage.source) == (10, 5, "upstream")
    assert (exchange.cost.pico_usd, exchange.cost.source) == (105_000_000, "upstream")


async def test_usage_beside_content_passes():
    """Only a chunk that is nothing but usage is held back: one with a choice is content."""
    steps = chat_events(usage=False, comments=False)
    last = {**steps[-2], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    answer = Stream(*steps[:-2], last, "[DONE]")
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await gw.chat(stream=True)
        [exchange] = await gw.finished()
    assert b'"completion_tokens":4' in reply.body
    assert exchange.usage.output_tokens == 4


def openai_upstream(**settings):
    return {"upstreams": {"openrouter": {"kind": "openai"}}, **settings}


@pytest.mark.parametrize("asked", [False, True])
async def test_an_openai_upstream_is_asked_for_usage(asked):
    """A compatible server tells usage only if asked: the gateway asks, and passes it on only if the client did."""
    fields = {"stream_options": {"include_usage": True, "include_obfuscation": False}} if asked else {}
    async with Gateway.test(settings=openai_upstream()) as gw:
        reply = await gw.chat(stream=True, **fields)
        whole = await gw.chat()
        streamed, plain = (await sent(gw)).json, (await sent(gw, 2)).json
        exchanges = await gw.finished(2)
    assert streamed["stream_options"]["include_usage"] is True
    assert streamed["stream_options"].get("include_obfuscation") is (False if asked else None)
    assert ("stream_options" in plain, whole.status) == (False, 200)
    assert (b'"usage"' in reply.body) is asked
    assert [e.usage.output_tokens for e in exchanges] == [5, 5]


async def test_an_openai_upstream_gets_no_field_of_openrouters_own():
    """Servers other than OpenRouter refuse its fields as unknown."""
    fields = {"provider": {"order": ["a"]}, "usage": {"include": True}, "transforms": [], "models": ["a/b"]}
    async with Gateway.test(settings=openai_upstream(upstream={"client_may": ALL_FIELDS})) as gw:
        await gw.chat(**fields)
        body = (await sent(gw)).json
    assert set(body) == {"model", "messages"}


async def test_openrouter_is_not_asked_for_what_it_always_sends():
    """A request to OpenRouter keeps its `stream_options` as the client wrote them."""
    async with Gateway.test() as gw:
        await gw.chat(stream=True)
        assert "stream_options" not in (await sent(gw)).json


@pytest.mark.parametrize("store", [None, True, False])
async def test_responses_are_never_stored_upstream(store):
    """OpenRouter answers 400 to `store: true`, OpenAI's default: `store: false` goes up, whatever the client says."""
    async with Gateway.test() as gw:
        for stream in (False, True):
            reply = await ask(gw, "responses", stream=stream, **({} if store is None else {"store": store}))
            assert reply.status == 200
        assert [seen.json["store"] for seen in gw.upstream.seen] == [False, False]


# --- headers to the upstream --------------------------------------------------------------------------------------------

NEVER_UPSTREAM = {
    "x-api-key": "client-secret", "api-key": "client-secret", "Cookie": "a=client-secret",
    "Proxy-Authorization": "Basic client-secret", "X-Forwarded-For": "203.0.113.9", "X-Forwarded-Host": "evil.test",
    "X-Forwarded-Proto": "https", "Forwarded": "for=203.0.113.9", "X-Real-IP": "203.0.113.9", "Via": "1.1 evil.test",
    "X-OpenRouter-Cache": "true", "X-OpenRouter-Cache-TTL": "86400", "X-OpenRouter-Cache-Clear": "true",
    "X-Stainless-Lang": "python", "Origin": "https://evil.test", "Referer": "https://evil.test", "OpenAI-Organization": "o",
    "X-Xenios-Task": "chat", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "User-Agent": "evil/1", "Accept-Encoding": "br", "Accept-Language": "de", "Idempotency-Key": "k", "TE": "trailers",
    "X-Anything": "1", "anthropic-dangerous-direct-browser-access": "true",
}  # fmt: skip
PASS = {
    "HTTP-Referer": "https://app.test", "X-OpenRouter-Title": "App", "X-Title": "App", "x-session-id": "s",
    "X-OpenRouter-Metadata": "enabled",
}  # fmt: skip
OF_MESSAGES = {"anthropic-version": "2023-06-01", "anthropic-beta": "tools-2024"}


@pytest.mark.promise("P14.upstream_cache")
@pytest.mark.parametrize("endpoint", BODIES)
async def test_headers_go_up_by_an_allow_list(endpoint):
    """Credentials, cookies, forwarding headers, cache switches and whatever isn't listed never reach the upstream."""
    given = {**NEVER_UPSTREAM, **PASS, **OF_MESSAGES, "OpenAI-Beta": "b=1"}
    async with Gateway.test() as gw:
        reply = await ask(gw, endpoint, headers=given)
        seen = await sent(gw)
        key = gw.key
    assert reply.status == 200
    names = set(seen.headers) - {"accept-encoding"}
    assert seen.headers.get("accept-encoding", "identity") == "identity"
    wanted = {name.lower() for name in PASS}
    if endpoint == "messages":
        wanted |= set(OF_MESSAGES)
    if endpoint in {"chat/completions", "completions", "responses"}:
        wanted.add("openai-beta")
    ours = {"host", "authorization", "content-type", "content-length", "accept", "user-agent", "x-request-id"}
    assert names == wanted | ours
    assert {seen.headers[name] for name in PASS} == set(PASS.values())
    assert (seen.headers["authorization"], seen.headers["user-agent"]) == ("Bearer sk-or-v1-test", "xenios")
    everything = repr(seen.headers.raw).encode() + seen.body
    for secret in (b"client-secret", key.encode(), b"203.0.113.9", b"evil"):
        assert secret not in everything


@pytest.mark.promise("P14.upstream_cache")
async def test_more_headers_pass_by_config():
    """`upstream.forward_headers` lets others through; a credential or a cache's switch can't be listed."""
    async with Gateway.test(settings={"upstream": {"forward_headers": ["X-Anything", "traceparent"]}}) as gw:
        await gw.post("/v1/chat/completions", CHAT, headers=NEVER_UPSTREAM)
        seen = await sent(gw)
    assert (seen.headers["x-anything"], seen.headers["traceparent"][:2]) == ("1", "00")
    for name in ("Authorization", "X-Api-Key", "cookie", "x-forwarded-for", "X-OpenRouter-Cache", "host", "forwarded"):
        with pytest.raises(Exception, match="forward_headers"):
            async with Gateway.test(settings={"upstream": {"forward_headers": [name]}}):
                pass


# --- the body to the upstream --------------------------------------------------------------------------------------------

CHOOSING = {
    "models": ["a/b", "c/d"], "fallbacks": [{"model": "a/b"}], "route": "fallback", "provider": {"order": ["x"]},
    "plugins": [{"id": "web"}], "service_tier": "priority", "preset": "mine",
}  # fmt: skip


@pytest.mark.parametrize("endpoint", [e for e in BODIES if e != "audio/transcriptions"])
async def test_fields_that_would_lead_elsewhere_are_removed(endpoint):
    """`api_base`, `base_url` and `api_key` never reach an upstream, whatever the config allows."""
    async with Gateway.test(settings={"upstream": {"client_may": ALL_FIELDS}}) as gw:
        reply = await ask(gw, endpoint, api_base="http://evil.test", base_url="http://evil.test", api_key="stolen")
        seen = await sent(gw)
    assert reply.status == 200
    assert {"api_base", "base_url", "api_key"}.isdisjoint(seen.json)
    assert b"evil" not in seen.body


async def test_fields_that_would_lead_elsewhere_are_removed_from_forms():
    """So in a multipart form."""
    async with Gateway.test() as gw:
        reply = await ask(gw, "audio/transcriptions", api_base="http://evil.test", api_key="stolen", language="de")
        body = (await sent(gw)).body
    assert reply.status == 200
    assert b"evil" not in body
    assert b"stolen" not in body
    assert b'name="language"' in body
    assert b"RIFF" in body


@pytest.mark.parametrize("field", CHOOSING)
async def test_fields_that_choose_model_or_price_need_permission(field):
    """Without `client_may` such a field is taken out and the reply says so; with it, it passes as it is."""
    permission = "presets" if field == "preset" else field
    async with Gateway.test(settings={"upstream": {"client_may": []}}) as gw:
        reply = await gw.chat(**{field: CHOOSING[field]})
        denied = (await sent(gw)).json
    assert (reply.status, reply.headers["x-xenios-removed"], field in denied) == (200, field, False)
    async with Gateway.test(settings={"upstream": {"client_may": [permission]}}) as gw:
        reply = await gw.chat(**CHOOSING)
        allowed = (await sent(gw)).json
    assert {name: allowed[name] for name in CHOOSING if name in allowed} == {field: CHOOSING[field]}
    assert set(reply.headers["x-xenios-removed"].split(", ")) == set(CHOOSING) - {field}


@pytest.mark.parametrize(
    "fields,permission",
    [
        ({"model": "openrouter/auto"}, "auto_routers"),
        ({"model": "openrouter/auto:nitro"}, "auto_routers"),
        ({"model": "openrouter/pareto-code"}, "auto_routers"),
        ({"models": ["a/b", "openrouter/auto"]}, "auto_routers"),
        ({"fallbacks": [{"model": "openrouter/auto"}]}, "auto_routers"),
        ({"fallbacks": ["openrouter/auto"]}, "auto_routers"),
        ({"model": "@preset/mine"}, "presets"),
        ({"model": "a/b@preset/mine"}, "presets"),
        ({"models": ["@preset/mine"]}, "presets"),
        ({"fallbacks": [{"model": "@preset/mine"}]}, "presets"),
    ],
)
async def test_presets_and_auto_routers_need_permission(fields, permission):
    """A model name behind which somebody else chooses the model is refused unless the config allows it, listed or not."""
    others = [name for name in ALL_FIELDS if name != permission]
    async with Gateway.test(settings={"upstream": {"client_may": others}}) as gw:
        reply = await gw.chat(**fields)
        assert (reply.status, reply.data["error"]["code"], gw.upstream.seen) == (400, "model_not_allowed", [])
    async with Gateway.test(settings={"upstream": {"client_may": ALL_FIELDS}}) as gw:
        assert (await gw.chat(**fields)).status == 200


async def test_what_the_operator_set_in_provider_wins():
    """The client's preferences stay where the operator said nothing."""
    settings = {"upstreams": {"openrouter": {"provider": {"data_collection": "deny", "sort": "price"}}}}
    async with Gateway.test(settings=settings) as gw:
        await gw.chat(provider={"data_collection": "allow", "order": ["x"]})
        await gw.chat()
        await gw.chat(provider="anything")
        bodies = [seen.json["provider"] for seen in gw.upstream.seen]
    theirs = {"data_collection": "deny", "sort": "price"}
    assert bodies == [{"order": ["x"], **theirs}, theirs, theirs]


class Scoped:
    """Whoever calls may use `ok/*` alone."""

    def __init__(self, config, services):
        del config, services

    @hookimpl
    async def authenticate(self, exchange):
        return Principal(id="p", tenant="t", scopes=Scopes(models=("ok/*",)))


@pytest.mark.promise("P5.scope")
@pytest.mark.parametrize(
    "fields,refused",
    [
        ({"model": "ok/a"}, None),
        ({"model": "ok/a", "models": ["ok/b"], "fallbacks": [{"model": "ok/c"}]}, None),
        ({"model": "dear/a"}, "dear/a"),
        ({"model": "ok/a", "models": ["ok/b", "dear/a"]}, "dear/a"),
        ({"model": None, "models": ["dear/a"]}, "dear/a"),
        ({"model": None, "models": ["ok/a", "dear/a"]}, "dear/a"),
        ({"model": "ok/a", "fallbacks": [{"model": "dear/a"}]}, "dear/a"),
        ({"model": "ok/a", "fallbacks": ["dear/a"]}, "dear/a"),
        ({"model": "ok/a", "models": ["openrouter/auto"]}, "openrouter/auto"),
    ],
)
async def test_scopes_hold_for_every_model_that_a_body_names(fields, refused):
    """A key's scope can't be left by `models[]` or `fallbacks[]`: OpenRouter would answer from any of them."""
    settings = {"upstream": {"client_may": ALL_FIELDS}}
    async with Gateway.test(plugins=[Scoped], settings=settings) as gw:
        reply = await gw.chat(**fields)
        if refused is None:
            assert reply.status == 200
        else:
            assert (reply.status, reply.data["error"]["code"], gw.upstream.seen) == (404, "model_not_found", [])
            assert refused in reply.data["error"]["message"]


@pytest.mark.promise("P5.scope")
@pytest.mark.parametrize(
    "extra",
    [
        b'Content-Disposition: form-data; name="model"; filename="m"\r\n\r\ndear/a',
        b'Content-Disposition: form-data; name="models[]"\r\n\r\ndear/a',
        b'Content-Disposition: form-data; name="model[]"\r\n\r\ndear/a',
        b'Content-Disposition: form-data; name="models"\r\n\r\ndear/a',
    ],
)
async def test_a_form_can_not_name_a_second_model(extra):
    """Which of two `model` parts an upstream takes is anybody's guess: neither a file nor a list can be the second."""
    parts = [
        b'Content-Disposition: form-data; name="model"\r\n\r\nok/a',
        b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF',
        extra,
    ]
    data = b"".join(b"--B\r\n" + part + b"\r\n" for part in parts) + b"--B--\r\n"
    async with Gateway.test(plugins=[Scoped], settings={"upstream": {"client_may": ALL_FIELDS}}) as gw:
        reply = await gw.request(
            "POST", "/v1/audio/transcriptions", data=data, headers={"Content-Type": "multipart/form-data; boundary=B"}
        )
        bodies = b"".join(seen.body for seen in gw.upstream.seen)
    assert reply.status in {400, 404} or b"dear" not in bodies
    assert b"dear" not in bodies


# --- origin -----------------------------------------------------------------------------------------------------------

EVIL = "http://127.0.0.1:{port}/v1"
FIELDS = [
    "api_base",
    "base_url",
    "api_key",
    "api-key",
    "apiBase",
    "baseURL",
    "baseUrl",
    "apiKey",
    "host",
    "url",
    "endpoint",
    "api_version",
    "organization",
    "openai_api_base",
    "custom_llm_provider",
    "litellm_params",
    "extra_headers",
    "extra_body",
    "headers",
    "proxy",
    "upstream",
    "target",
    "deployment_id",
    "azure_endpoint",
    "vertex_project",
    "aws_bedrock_runtime_endpoint",
    "callback_url",
    "webhook_url",
]
HEADERS = {
    "Host": "evil.test", "X-Forwarded-Host": "evil.test", "X-Forwarded-Proto": "http", "X-Forwarded-Port": "1",
    "Forwarded": "host=evil.test", "X-Host": "evil.test", "X-Original-URL": "/v1/evil", "X-Rewrite-URL": "/v1/evil",
    "X-Upstream": "evil", "X-Api-Base": "http://evil.test", "Api-Base": "http://evil.test", "X-Base-URL": "http://evil.test",
    "X-HTTP-Method-Override": "GET", "OpenAI-Organization": "evil", "Proxy-Connection": "keep-alive",
    "X-Api-Key": "evil-key", "Api-Key": "evil-key", "x-portkey-custom-host": "http://evil.test",
    "Helicone-Target-Url": "http://evil.test", "x-goog-api-key": "evil-key", "Destination": "http://evil.test",
}  # fmt: skip


def _evil(field: str, url: str):
    nested = {"api_base": url, "base_url": url, "api_key": "evil-key", "Host": "evil.test", "Authorization": "evil-key"}
    return nested if field in {"litellm_params", "extra_headers", "extra_body", "headers"} else url


@pytest.mark.promise("P13.origin")
@pytest.mark.parametrize("stream", [False, True])
async def test_no_body_field_moves_the_upstream(stream):
    """Whatever a body holds, one by one and all together, the request goes to the configured host with our key."""
    async with ScriptedUpstream() as evil, Gateway.test(settings={"upstream": {"client_may": ALL_FIELDS}}) as gw:
        url = EVIL.format(port=evil.port)
        for fields in [*([f] for f in FIELDS), FIELDS]:
            reply = await gw.chat(stream=stream, **{field: _evil(field, url) for field in fields})
            assert reply.status == 200
        for name in (
            "http://127.0.0.1:1/x",
            "//evil.test/x",
            "../../evil",
            "a/b?x=http://evil.test",
            "openai/x@evil.test",
        ):
            assert (await gw.chat(model=name, stream=stream)).status == 200
        assert (evil.seen, evil.total_connections) == ([], 0)
        _all_ours(gw)


@pytest.mark.promise("P13.origin")
async def test_no_header_moves_the_upstream():
    """So for headers, `Host` and the credential headers included."""
    async with Gateway.test() as gw:
        for given in [*({n: v} for n, v in HEADERS.items()), HEADERS]:
            reply = await gw.post("/v1/chat/completions", CHAT, headers=given)
            assert reply.status == 200, given
        _all_ours(gw)
        assert all("evil" not in repr(seen.headers.raw) for seen in gw.upstream.seen)


@pytest.mark.promise("P13.origin")
@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/v1/chat/completions", "http://evil.test/v1/chat/completions"]
)
async def test_an_absolute_request_line_moves_nothing(target):
    """A request in a proxy's form (`POST http://other/…`) is served from the configured upstream, or refused."""
    async with ScriptedUpstream() as evil, Gateway.test() as gw:
        body = json.dumps(CHAT).encode()
        head = (
            f"POST {target.format(port=evil.port)} HTTP/1.1\r\nHost: evil.test\r\nAuthorization: Bearer {gw.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        async with connect(gw) as raw:
            await raw.send(head.encode() + body)
            reply = await raw.reply()
        assert reply.status in {200, 400, 404}
        assert evil.total_connections == 0
        _all_ours(gw)


@pytest.mark.promise("P13.origin")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status):
    """An upstream that redirects can't make the gateway send prompt and key elsewhere: 502."""
    async with ScriptedUpstream() as evil, Gateway.test() as gw:
        gw.upstream.script(*[Redirect(f"{evil.url}/chat/completions", status)] * 2)
        for stream in (False, True):
            reply = await gw.chat(stream=stream)
            assert (reply.status, reply.data["error"]["code"]) == (502, "upstream_bad_reply")
            assert "location" not in reply.headers
        assert evil.total_connections == 0


def _all_ours(gw: Gateway) -> None:
    for seen in gw.upstream.seen:
        assert seen.path == "/v1/chat/completions"
        assert seen.query == ""
        assert seen.headers["host"] == f"127.0.0.1:{gw.upstream.port}"
        assert seen.headers.getall("authorization") == ["Bearer sk-or-v1-test"]
