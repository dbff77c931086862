"""DESIGN §4's table, cell by cell, over sockets: first content, clean end, stream error; and usage, per endpoint."""

from __future__ import annotations

import json

import pytest

from gateway.kit.testing import Gateway
from gateway.kit.upstream import (
    SPEECH,
    Body,
    Error,
    Hang,
    Json,
    ScriptedUpstream,
    Stream,
    chat_completion,
    chat_events,
    chat_usage,
    completion,
    completion_events,
    embedding,
    encode_step,
    event,
    image,
    message,
    message_events,
    response_events,
    response_object,
    response_usage,
    transcription,
)
from tests.faults.endpoints import BODIES, ask


def delta(**fields):
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def text(value, finish=None):
    return {"choices": [{"index": 0, "text": value, "finish_reason": finish}]}


def typed(kind, **fields):
    return event(kind, {"type": kind, **fields})


FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
CONTENT = [
    ("chat/completions", delta(content="a")),
    ("chat/completions", delta(content=" ")),
    ("chat/completions", delta(reasoning="hm")),
    ("chat/completions", delta(reasoning_content="hm")),
    ("chat/completions", delta(reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}])),
    ("chat/completions", delta(tool_calls=[CALL])),
    ("chat/completions", delta(function_call={"name": "f", "arguments": ""})),
    ("chat/completions", delta(refusal="No.")),
    ("chat/completions", delta(audio={"data": "aa"})),
    ("chat/completions", delta(images=[{"image_url": {"url": "data:,"}}])),
    ("chat/completions", FINISH),
    ("completions", text("a")),
    ("completions", text("", "length")),
    ("responses", typed("response.output_text.delta", delta="a")),
    ("responses", typed("response.reasoning_summary_text.delta", delta="a")),
    ("responses", typed("response.function_call_arguments.delta", delta="{")),
    ("responses", typed("response.refusal.delta", delta="No")),
    ("messages", typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"})),
    ("messages", typed("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "a"})),
    ("messages", typed("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": ""})),
    ("messages", typed("message_delta", delta={"stop_reason": "end_turn"})),
    ("images/generations", typed("image_generation.partial_image", b64_json="aa")),
    ("audio/transcriptions", typed("transcript.text.delta", delta="a")),
]
NO_CONTENT = [
    ("chat/completions", b": OPENROUTER PROCESSING\n\n"),
    ("chat/completions", delta(role="assistant", content="")),
    ("chat/completions", delta(role="assistant", content=None, tool_calls=[], refusal=None)),
    ("chat/completions", {"choices": [], "usage": {"prompt_tokens": 1}}),
    ("chat/completions", {"choices": [], "prompt_filter_results": []}),
    ("completions", text("")),
    ("responses", typed("response.created", response={"status": "in_progress"})),
    ("responses", typed("response.output_item.added", item={"type": "message"})),
    ("responses", typed("response.content_part.added", part={"type": "output_text", "text": ""})),
    ("messages", typed("message_start", message={"usage": {"input_tokens": 3}, "stop_reason": None})),
    ("messages", typed("content_block_start", index=0, content_block={"type": "text", "text": ""})),
    ("messages", typed("ping")),
    ("images/generations", typed("something.else")),
    ("audio/transcriptions", typed("something.else")),
]
FAILURES = {"messages": typed("error", error={"type": "overloaded_error", "message": "x"})}
FAILURE = {"error": {"code": 503, "message": "x"}}


def ids(cases):
    return [f"{endpoint}-{encode_step(step)[:70].decode().split(chr(10))[0]}" for endpoint, step in cases]


@pytest.mark.parametrize("endpoint,step", CONTENT, ids=ids(CONTENT))
async def test_first_content(endpoint, step):
    """The first delta, of whatever kind, or the finish reason, commits the stream: what fails later is an event in it."""
    answer = Stream(step, FAILURES.get(endpoint, FAILURE))
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await ask(gw, endpoint, stream=True)
        [exchange] = await gw.finished()
    assert reply.status == 200
    assert reply.body.startswith(encode_step(step))
    assert b'"error"' in reply.body.removeprefix(encode_step(step))
    assert exchange.attempts[0].first_content is not None


@pytest.mark.parametrize("endpoint,step", NO_CONTENT, ids=ids(NO_CONTENT))
async def test_what_is_no_content(endpoint, step):
    """Before content nothing is committed: a failure after a preamble still has its HTTP status."""
    answer = Stream(step, FAILURES.get(endpoint, FAILURE))
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await ask(gw, endpoint, stream=True)
        [exchange] = await gw.finished()
    status = 502 if endpoint == "messages" else 503  # Anthropic's errors in a stream carry no status
    assert (reply.status, reply.headers["Content-Type"]) == (status, "application/json")
    assert exchange.attempts[0].first_content is None


async def test_first_content_of_speech():
    """The first byte commits speech; an empty body is 502, a hang is 504."""
    settings = {"upstream": {"first_event_timeout": 0.4}}
    upstream = ScriptedUpstream(Body(b"", "audio/mpeg"), Hang(), Body(SPEECH, "audio/mpeg"))
    async with Gateway.test(upstream=upstream, settings=settings) as gw:
        replies = [await ask(gw, "audio/speech") for _ in range(3)]
    assert [reply.status for reply in replies] == [502, 504, 200]
    assert replies[2].body == SPEECH


IMAGES = [typed("image_generation.partial_image", b64_json="a"), typed("image_generation.completed", b64_json="b")]
SPOKEN = [typed("transcript.text.delta", delta="a"), typed("transcript.text.done", text="a")]
CLEAN = [
    ("chat/completions", chat_events(comments=False, usage=False)),
    ("chat/completions", chat_events(comments=False, usage=False, finish="length")),
    ("completions", completion_events(comments=False, usage=False)),
    ("responses", response_events(comments=False)),
    ("responses", response_events(comments=False, finish="incomplete")),
    ("responses", response_events(comments=False, done=True)),
    ("messages", message_events(comments=False)),
    ("messages", message_events(comments=False, finish="max_tokens")),
    ("images/generations", IMAGES),
    ("images/generations", [*IMAGES, "[DONE]"]),
    ("audio/transcriptions", SPOKEN),
]


@pytest.mark.parametrize("endpoint,steps", CLEAN)
async def test_clean_end(endpoint, steps):
    """A stream that ends as its dialect says arrives whole and counts as answered."""
    async with Gateway.test(upstream=ScriptedUpstream(Stream(*steps))) as gw:
        reply = await ask(gw, endpoint, stream=True)
        [exchange] = await gw.finished()
    assert reply.body == b"".join(map(encode_step, steps))
    assert (reply.status, reply.cut, exchange.outcome) == (200, False, "ok")


TRUNCATED = "The upstream ended the stream without finishing the answer."
DATA_ERROR = (
    b'data: {"error":{"message":"%b","type":"server_error","param":null,"code":"upstream_truncated"}}\n\n'
    % TRUNCATED.encode()
)
TYPED_ERROR = b'event: error\ndata: {"type":"error",' + DATA_ERROR.removeprefix(b"data: {")
ERRORS = {
    "chat/completions": (chat_events(comments=False)[:2], DATA_ERROR),
    "completions": (completion_events(comments=False)[:2], DATA_ERROR),
    "responses": (
        response_events(comments=False)[:5],
        b'event: error\ndata: {"type":"error","code":"upstream_truncated","message":"%b","param":null,'
        b'"sequence_number":5}\n\n' % TRUNCATED.encode(),
    ),
    "messages": (
        message_events(comments=False)[:4],
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"%b"},"request_id":"req-7"}\n\n'
        % TRUNCATED.encode(),
    ),
    "images/generations": (IMAGES[:1], TYPED_ERROR),
    "audio/transcriptions": (SPOKEN[:1], TYPED_ERROR),
}


@pytest.mark.parametrize("endpoint", ERRORS)
async def test_stream_error(endpoint):
    """Our error event, to the byte, in each dialect; nothing comes after it."""
    steps, error = ERRORS[endpoint]
    async with Gateway.test(upstream=ScriptedUpstream(Stream(*steps))) as gw:
        reply = await ask(gw, endpoint, stream=True, headers={"X-Request-Id": "req-7"})
    assert reply.body == b"".join(map(encode_step, steps)) + error


async def test_stream_error_of_speech():
    """Speech can't hold an error: its connection is closed uncleanly."""
    async with Gateway.test(upstream=ScriptedUpstream(Stream(SPEECH, content_type="audio/mpeg", end="cut"))) as gw:
        reply = await ask(gw, "audio/speech")
    assert reply.cut


# --- usage --------------------------------------------------------------------------------------------------------------

CHAT = chat_usage(100, 50, cached=40, reasoning=30, cost=0.25)
RESPONSE = response_usage(100, 50, cached=40, reasoning=30, cost=0.25)
MESSAGE = {
    "input_tokens": 50, "output_tokens": 50, "cache_read_input_tokens": 40, "cache_creation_input_tokens": 10,
    "cost": 0.25,
}  # fmt: skip
SOUND = {"seconds": 1.5, "input_tokens": 100, "output_tokens": 50, "total_tokens": 150, "cost": 0.25}
# endpoint: (whole, stream or None, (input, output, cache read, cache write, reasoning))
USAGE = {
    "chat/completions": (chat_completion(usage=CHAT), chat_events(usage=CHAT), (100, 50, 40, None, 30)),
    "completions": (completion(usage=CHAT), completion_events(usage=CHAT), (100, 50, 40, None, 30)),
    "responses": (response_object(usage=RESPONSE), response_events(usage=RESPONSE), (100, 50, 40, 0, 30)),
    "messages": (message(usage=MESSAGE), message_events(usage=MESSAGE), (100, 50, 40, 10, None)),
    "embeddings": (
        embedding(usage={"prompt_tokens": 100, "total_tokens": 100, "cost": 0.25}), None, (100, None, None, None, None)
    ),
    "rerank": (
        {"results": [], "usage": {"search_units": 1, "total_tokens": 100, "cost": 0.25}},
        None,
        (100, None, None, None, None),
    ),
    "images/generations": (
        {**image(), "usage": CHAT},
        [IMAGES[0], typed("image_generation.completed", b64_json="b", usage=CHAT)],
        (100, 50, 40, None, 30),
    ),
    "audio/transcriptions": (
        {**transcription(), "usage": SOUND},
        [SPOKEN[0], typed("transcript.text.done", text="a", usage=SOUND)],
        (100, 50, None, None, None),
    ),
}  # fmt: skip
METERED = [(endpoint, stream) for endpoint, row in USAGE.items() for stream in (False, True) if not stream or row[1]]


@pytest.mark.parametrize("endpoint,stream", METERED)
async def test_usage_is_read_in_every_dialect(endpoint, stream):
    """Tokens (Anthropic's cached ones added to its input) and the upstream's own cost are read from every reply."""
    whole, events, wanted = USAGE[endpoint]
    answer = Stream(*events) if stream else Json(whole)
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await ask(gw, endpoint, stream=stream)
        [exchange] = await gw.finished()
    usage = exchange.usage
    assert reply.status == 200
    assert wanted == (
        usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens,
        usage.reasoning_tokens,
    )  # fmt: skip
    assert (usage.source, exchange.cost.pico_usd, exchange.cost.source) == ("upstream", 250_000_000_000, "upstream")


async def test_usage_of_speech_is_unknown():
    """Sound carries no usage: it is unknown, not 0."""
    async with Gateway.test() as gw:
        await ask(gw, "audio/speech")
        [exchange] = await gw.finished()
    assert (exchange.usage.source, exchange.usage.input_tokens, exchange.cost.pico_usd) == ("unknown", None, None)


async def test_anthropics_usage_is_spread_over_two_events():
    """Input tokens come with the first event, output tokens with the last: both count, the later word wins."""
    steps = [
        typed(
            "message_start", message={"usage": {"input_tokens": 7, "cache_read_input_tokens": 3, "output_tokens": 1}}
        ),
        typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"}),
        typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 9}),
        typed("message_stop"),
    ]
    async with Gateway.test(upstream=ScriptedUpstream(Stream(*steps))) as gw:
        await ask(gw, "messages", stream=True)
        [exchange] = await gw.finished()
    assert (exchange.usage.input_tokens, exchange.usage.output_tokens) == (10, 9)


async def test_usage_without_a_cost_is_priced_by_the_catalogue():
    """An upstream that tells tokens but no cost: the catalogue's prices make one, and the source says so."""
    settings = {"catalogue": {"overrides": {"test/model": {"input": 3, "output": 15}}}}
    async with Gateway.test(upstream=ScriptedUpstream(Json(chat_completion(cost=None))), settings=settings) as gw:
        await gw.chat()
        [exchange] = await gw.finished()
    assert (exchange.cost.pico_usd, exchange.cost.source) == (105_000_000, "catalogue")


# --- paths and errors -------------------------------------------------------------------------------------------------------

PATHS = {
    "chat/completions": "chat/completions", "completions": "completions", "embeddings": "embeddings",
    "responses": "responses", "messages": "messages", "rerank": "rerank", "images/generations": "images",
    "audio/speech": "audio/speech", "audio/transcriptions": "audio/transcriptions",
}  # fmt: skip


@pytest.mark.parametrize("endpoint", PATHS)
async def test_every_endpoint_has_its_path_upstream(endpoint):
    """OpenRouter's path, or OpenAI's where the upstream is of that kind, under `/v1` and `/api/v1` alike."""
    async with Gateway.test() as gw:
        assert (await ask(gw, endpoint)).status == 200
        if endpoint != "audio/transcriptions":
            body = {"model": "test/model", **BODIES[endpoint]}
            assert (await gw.post(f"/api/v1/{endpoint}", body)).status == 200
        assert {seen.path for seen in gw.upstream.seen} == {f"/v1/{PATHS[endpoint]}"}
    async with Gateway.test(settings={"upstreams": {"openrouter": {"kind": "openai"}}}) as gw:
        assert (await ask(gw, endpoint)).status == 200
        assert gw.upstream.seen[0].path == f"/v1/{endpoint}"


@pytest.mark.parametrize("endpoint", PATHS)
async def test_every_endpoint_tells_errors_in_its_shape(endpoint):
    """An error has OpenAI's four keys, at `/messages` Anthropic's envelope."""
    async with Gateway.test(upstream=ScriptedUpstream(Error(429))) as gw:
        reply = await ask(gw, endpoint)
    assert (reply.status, reply.headers["Content-Type"]) == (429, "application/json")
    data = json.loads(reply.body)
    if endpoint == "messages":
        assert (set(data), data["error"]["type"]) == ({"type", "error", "request_id"}, "rate_limit_error")
    else:
        assert (set(data), set(data["error"])) == ({"error"}, {"message", "type", "param", "code"})
