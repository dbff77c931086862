import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import COMMON_HEADERS, DIALECTS, DONE, PLAIN_DIALECT, Mark, _mark_typed, read_cost, read_usage
from gateway.errors import BadRequest, GatewayError, NotFound, RateLimited, Unauthenticated
from gateway.exchange import Event, Source, Usage
from gateway.kit.upstream import (
    chat_error,
    chat_events,
    completion_events,
    encode_step,
    event,
    message_error,
    message_events,
    response_events,
    response_failed,
    tool_call_events,
)

CHAT, COMPLETIONS, RESPONSES, MESSAGES, IMAGES, TRANSCRIPTS = (
    DIALECTS[name]
    for name in (
        "chat/completions", "completions", "responses", "messages", "images/generations", "audio/transcriptions",
    )
)  # fmt: skip
STREAMED = [CHAT, COMPLETIONS, RESPONSES, MESSAGES, IMAGES, TRANSCRIPTS]


def marked(dialect, step):
    return dialect.grammar.mark(Event(encode_step(step)))


def typed(kind, **fields):
    return event(kind, {"type": kind, **fields})


def choice(dialect=CHAT, finish=None, **said):
    said = said if dialect is COMPLETIONS else {"delta": said}
    return {"choices": [{"index": 0, "finish_reason": finish, **said}]}


STREAMS = {
    "chat/completions": chat_events(comments=False),
    "completions": completion_events(comments=False),
    "responses": response_events(comments=False),
    "messages": message_events(comments=False),
    "images/generations": [
        typed("image_generation.partial_image", b64_json="aa"),
        typed("image_generation.completed", b64_json="aa", usage={"input_tokens": 1, "output_tokens": 5}),
    ],
    "audio/transcriptions": [
        typed("transcript.text.delta", delta="Hi"),
        typed("transcript.text.done", text="Hi", usage={"input_tokens": 1, "output_tokens": 5}),
    ],
}
# How many events come before the first content.
PREAMBLES = {"chat/completions": 1, "completions": 1, "responses": 4, "messages": 3, "images/generations": 0, "audio/transcriptions": 0}  # fmt: skip


@pytest.mark.parametrize("endpoint", STREAMS)
def test_a_stream_is_understood(endpoint):
    """First content, finish and usage of each endpoint's stream are found, and nothing else is taken for them."""
    dialect = DIALECTS[endpoint]
    marks = [marked(dialect, step) for step in STREAMS[endpoint]]
    assert [m.content for m in marks].index(True) == PREAMBLES[endpoint]
    assert sum(m.finish for m in marks) == 1
    assert not any(m.malformed or m.error for m in marks)
    usage = {}
    for mark in marks:
        usage |= mark.usage or {}
    assert dialect.usage(usage).output_tokens == 5
    if dialect.grammar.needs_done:
        assert [m.done for m in marks] == [False] * (len(marks) - 1) + [True]
    else:
        assert marks[-1].finish


@pytest.mark.parametrize("dialect", STREAMED, ids=lambda d: d.endpoint)
def test_what_matters_is_notable(dialect):
    """No event that ends, fails or is billed passes unparsed; plain content does, for that is what costs least."""
    errors = [chat_error(), response_failed(3), message_error(), {"error": {"message": "x"}}, {"error": "x"}]
    steps = [*STREAMS[dialect.endpoint], *errors, "[DONE]", choice(dialect, "length")]
    plain = 0
    for step in steps:
        mark = marked(dialect, step)
        notable = bool(dialect.grammar.notable(encode_step(step)))
        if mark.finish or mark.done or mark.error is not None or mark.usage_only:
            assert notable, step
        if mark.content and not mark.finish:
            assert not notable, step
            plain += 1
    assert plain > 0


@pytest.mark.parametrize("notable, event", [
    (True, b'{"choices":[{"finish_reason":null},{"finish_reason":"stop"}]}'),
    (True, b'{"choices":[{"finish_reason" :\t"stop"}]}'),
    (True, b'{"choices":[{"finish_reason":\n"stop"},{"finish_reason":null}]}'),
    (True, b'{"choices":[],"usage" : {"completion_tokens":1}}'),
    (True, b"data:[DONE]"),
    (False, b'{"choices":[{"finish_reason" : null},{"finish_reason":null}],"usage":null}'),
    (False, b'{"choices":[{"delta":{"content":"\\"usage\\" of finish_reason"}}]}'),
])  # fmt: skip
def test_an_end_is_notable_however_it_is_written(notable, event):
    """Blanks in the JSON, several choices of which one has ended, null where others say nothing: all are told apart."""
    assert bool(CHAT.grammar.notable(event)) is notable


@pytest.mark.parametrize("said", [
    {"content": "x"}, {"reasoning": "x"}, {"reasoning_content": "x"}, {"reasoning_details": [{}]},
    {"tool_calls": [{}]}, {"function_call": {"name": "f"}}, {"refusal": "no"}, {"audio": {"id": "a"}}, {"images": [{}]},
])  # fmt: skip
def test_every_kind_of_chat_content_is_content(said):
    """A word, a thought, a tool call, a refusal, a sound, an image: after it no other model may answer."""
    assert marked(CHAT, choice(**said)).content
    assert not marked(CHAT, choice(role="assistant", **dict.fromkeys(said))).content


def test_a_chat_chunk_says_no_more_than_it_holds():
    """Roles, empty words and usage are no content; a finish reason is, since the answer may be empty."""
    assert not marked(CHAT, choice(role="assistant", content="")).content
    assert not marked(CHAT, {"choices": [{"delta": "x"}, "y"]}).content
    finish = marked(CHAT, choice(finish="stop"))
    assert (finish.content, finish.finish, finish.done, finish.usage) == (True, True, False, None)
    both = marked(CHAT, choice(content="x") | {"usage": {"prompt_tokens": 1}})
    assert (both.content, both.usage, both.usage_only) == (True, {"prompt_tokens": 1}, False)
    alone = marked(CHAT, {"choices": [], "usage": {"prompt_tokens": 1}})
    assert (alone.content, alone.usage_only) == (False, True)
    assert not marked(CHAT, {"choices": [], "usage": None}).usage_only
    assert marked(CHAT, {"usage": 7}).usage is None
    assert marked(COMPLETIONS, choice(COMPLETIONS, text="x")).content
    assert not marked(COMPLETIONS, choice(COMPLETIONS, text="")).content
    assert not marked(COMPLETIONS, choice(COMPLETIONS, delta={"content": "x"})).content
    assert any(marked(CHAT, s).content for s in tool_call_events(finish=None))


@pytest.mark.parametrize("dialect", STREAMED, ids=lambda d: d.endpoint)
@pytest.mark.parametrize("raw", [b"data: {half\n\n", b"data: [1]\n\n", b'data: "x"\n\n', b"data: 7\n\n"])
def test_what_is_no_json_object_is_malformed(dialect, raw):
    """An event that can't be read is told from one that holds nothing."""
    assert marked(dialect, raw).malformed
    for empty in (b": comment\n\n", b"event: ping\n\n", b"data:\n\n"):
        assert marked(dialect, empty) == Mark()


@pytest.mark.parametrize("dialect", STREAMED, ids=lambda d: d.endpoint)
def test_done_ends_all_streams_but_anthropics(dialect):
    """[DONE] is OpenAI's end; Anthropic's API doesn't know it."""
    mark = marked(dialect, "[DONE]")
    assert (mark.done, mark.malformed, mark.content) == (dialect is not MESSAGES, False, False)


@pytest.mark.parametrize("step, dialect, message", [
    (chat_error(502, "It broke"), CHAT, "It broke"),
    ({"error": "It broke"}, CHAT, "It broke"),
    ({"error": {"message": "It broke"}}, COMPLETIONS, "It broke"),
    ({"choices": [{"error": {"message": "It broke"}}]}, CHAT, "It broke"),
    ({"choices": ["x", {"error": "It broke"}]}, CHAT, "It broke"),
    (choice(finish="error"), CHAT, "The model's provider ended the answer with an error."),
    (response_failed(3, "server_error", "It broke"), RESPONSES, "It broke"),
    (typed("error", message="It broke", code="x"), RESPONSES, "It broke"),
    (typed("error", error={"message": "It broke"}), IMAGES, "It broke"),
    (typed("anything", error="It broke"), TRANSCRIPTS, "It broke"),
    (typed("response.failed", response={"error": "It broke"}), RESPONSES, "It broke"),
    (message_error(529, "It broke"), MESSAGES, "It broke"),
    (typed("error"), MESSAGES, "The upstream failed."),
    (typed("ping", error={"message": "It broke"}), MESSAGES, "It broke"),
])  # fmt: skip
def test_an_error_in_any_shape_is_one(step, dialect, message):
    """Upstreams write errors into streams in many shapes: none is passed on as content."""
    mark = marked(dialect, step)
    assert mark.error["message"] == message
    for harmless in (None, "", {}, []):
        assert marked(dialect, {"error": harmless, "type": "x"}).error is None


def test_anthropics_finish_is_a_stop_reason():
    """Only the event that names the stop reason finishes a message."""
    assert marked(MESSAGES, {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}).finish
    assert not marked(MESSAGES, {"type": "message_delta", "delta": {"stop_reason": None}}).finish
    assert not marked(MESSAGES, {"type": "content_block_delta", "delta": {"stop_reason": "x"}}).finish
    assert marked(MESSAGES, {"type": "message_delta", "usage": "many"}).usage is None


def test_a_failed_responses_kind_is_kept():
    """`error_type`, by which a failure is classed, is found beside the error too."""
    assert marked(RESPONSES, response_failed(3)).error["error_type"] == "server"
    assert (
        marked(RESPONSES, typed("error", error={"error_type": "own"}, error_type="other")).error["error_type"] == "own"
    )


@pytest.mark.parametrize("dialect, body, message", [
    (CHAT, {"error": {"message": "x"}}, "x"),
    (CHAT, {"choices": [{"finish_reason": "error"}]}, "The model's provider ended the answer with an error."),
    (RESPONSES, {"status": "failed", "error": {"message": "x"}}, "x"),
    (RESPONSES, {"status": "failed", "error": None}, "The upstream failed."),
    (RESPONSES, {"status": "completed", "error": {"message": "x"}}, "x"),
    (CHAT, {"status": "failed", "choices": []}, None),
    (RESPONSES, {"status": "completed", "error": None}, None),
    (CHAT, {"choices": [{"finish_reason": "stop", "error": None}, 7]}, None),
    (CHAT, {"choices": {"error": "x"}}, None),
    (CHAT, [{"error": "x"}], None),
    (RESPONSES, None, None),
])  # fmt: skip
def test_a_200_that_holds_an_error_is_found(dialect, body, message):
    """An error in a body whose status says 200 is an error."""
    found = dialect.reply_error(body)
    assert (found["message"] if found else None) == message
    if body == {"status": "failed", "error": {"message": "x"}}:
        assert found == {"message": "x", "error_type": None}
        assert dialect.reply_error({**body, "error_type": "server"})["error_type"] == "server"


# --- requests


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda d: d.endpoint)
def test_a_stream_is_wanted_where_there_is_one(dialect):
    """`stream: true`, in a form as text, asks for a stream; endpoints without one ignore it."""
    streams = dialect in STREAMED
    for value, wanted in (
        (True, streams),
        ("true", streams),
        (False, False),
        ("false", False),
        (None, False),
        (1, streams),
    ):
        assert dialect.wants_stream({"stream": value}) is wanted
    assert not dialect.wants_stream({})


@pytest.mark.parametrize("body, wanted", [
    ({}, False),
    ({"stream_options": {"include_usage": True}}, True),
    ({"stream_options": {"include_usage": False}}, False),
    ({"stream_options": None, "usage": {"include": True}}, True),
    ({"usage": {"include": False}}, False),
    ({"stream_options": "include_usage", "usage": ["include"]}, False),
])  # fmt: skip
def test_usage_is_passed_on_to_who_asked(body, wanted):
    """Either API's way to ask for the usage chunk is understood."""
    assert CHAT.wants_usage(body) is wanted


def test_the_output_cap_is_found():
    """The newer name wins; what is no number says nothing."""
    assert CHAT.output_cap({"max_tokens": 5}) == 5
    assert CHAT.output_cap({"max_tokens": 5, "max_completion_tokens": 7}) == 7
    assert RESPONSES.output_cap({"max_output_tokens": 3, "max_tokens": 5}) == 3
    for value in (True, "5", 5.0, None):
        assert CHAT.output_cap({"max_completion_tokens": value}) is None
    assert DIALECTS["embeddings"].output_cap({"max_tokens": 5}) is None


def nested(depth, kind=list):
    if depth == 0:
        return "x"
    return [nested(depth - 1)] if kind is list else {"a": nested(depth - 1, dict)}


@pytest.mark.parametrize("endpoint, body, count", [
    ("chat/completions", {"messages": [{"role": "user", "content": "four"}], "model": "not counted"}, 8),
    ("chat/completions", {"messages": [{"content": [{"type": "text", "text": "four"}]}], "tools": ["abc"]}, 4 + 4 + 3),
    ("chat/completions", {"messages": [{"url": "data:image/png;base64,AAAA"}, {"data": "AAAA"}, {"file_data": "A"}, {"b64_json": "A"}]}, 0),
    ("completions", {"prompt": ["ab", "c"], "suffix": "d", "other": "e"}, 4),
    ("embeddings", {"input": [1, 2, None, True, "ab"]}, 2),
    ("embeddings", {}, 0),
    ("embeddings", {"input": nested(32)}, 1),
    ("embeddings", {"input": nested(34)}, 0),
    ("embeddings", {"input": nested(32, dict)}, 1),
    ("embeddings", {"input": nested(34, dict)}, 0),
])  # fmt: skip
def test_characters_of_the_input_are_counted(endpoint, body, count):
    """Text that a model reads is counted, wherever it is nested; files, numbers and endless nests are not."""
    assert DIALECTS[endpoint].input_characters(body) == count


# --- usage


@pytest.mark.parametrize("raw, expected", [
    (None, Usage()),
    ({}, Usage()),
    ("text", Usage()),
    ({"prompt_tokens": 7, "completion_tokens": 0}, Usage(7, 0, source=Source.UPSTREAM)),
    ({"input_tokens": 7, "output_tokens": 3}, Usage(7, 3, source=Source.UPSTREAM)),
    ({"prompt_tokens": 7}, Usage(7, None, source=Source.UPSTREAM)),
    ({"output_tokens": 7}, Usage(None, 7, source=Source.UPSTREAM)),
    ({"total_tokens": 9}, Usage(9, None, source=Source.UPSTREAM)),
    ({"total_tokens": 9, "completion_tokens": 4}, Usage(None, 4, source=Source.UPSTREAM)),
    ({"prompt_tokens": -1, "completion_tokens": 10**9}, Usage()),
    ({"prompt_tokens": 10**9 - 1}, Usage(10**9 - 1, source=Source.UPSTREAM)),
    ({"prompt_tokens": True, "completion_tokens": 1.5}, Usage()),
    ({"prompt_tokens": "7", "completion_tokens": None}, Usage()),
    (
        {"prompt_tokens": 7, "completion_tokens": 5,
         "prompt_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 1},
         "completion_tokens_details": {"reasoning_tokens": 4}},
        Usage(7, 5, 2, 1, 4, Source.UPSTREAM),
    ),
    (
        {"input_tokens": 7, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 2},
         "output_tokens_details": {"reasoning_tokens": 0}},
        Usage(7, 5, 2, None, 0, Source.UPSTREAM),
    ),
    ({"prompt_tokens": 7, "prompt_tokens_details": "x", "completion_tokens_details": []}, Usage(7, source=Source.UPSTREAM)),
])  # fmt: skip
def test_usage_in_any_spelling(raw, expected):
    """Tokens are read in each API's spelling; what is missing, negative or absurd is unknown, never 0."""
    assert read_usage(raw) == expected
    assert CHAT.usage(raw) == expected


def test_anthropic_counts_cached_tokens_apart():
    """Anthropic's `input_tokens` leave out what the cache read and wrote; ours don't, so that prices fit."""
    raw = {"input_tokens": 7, "output_tokens": 5, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 30}
    assert MESSAGES.usage(raw) == Usage(137, 5, 100, 30, None, Source.UPSTREAM)
    assert CHAT.usage(raw).input_tokens == 7
    assert MESSAGES.usage({"output_tokens": 5, "cache_read_input_tokens": 100}).input_tokens is None
    assert MESSAGES.usage({"input_tokens": 7}).input_tokens == 7


@given(st.integers(0, 10**6 - 1) | st.floats(0, 1e6, exclude_max=True))
def test_a_cost_is_exact(cost):
    """Money is kept in whole pico-USD."""
    assert read_cost({"cost": cost}) == round(cost * 10**12)


@pytest.mark.parametrize("raw", [
    None, {}, "x", {"cost": None}, {"cost": "1"}, {"cost": True}, {"cost": -0.1}, {"cost": 1e6}, {"cost": float("nan")},
])  # fmt: skip
def test_what_is_no_cost_is_unknown(raw):
    """A cost that is missing, negative or absurd is unknown, never 0."""
    assert read_cost(raw) is None
    assert read_cost({"cost": 0}) == 0


# --- errors

LATE = RateLimited("Slow down", param="p")


def told(dialect, error=LATE, last=b""):
    """The stream error: (event name, data)."""
    raw = Event(dialect.grammar.error(error, last, "req_1"))
    assert raw.endswith(b"\n\n")
    assert raw.count(b"\n\n") == 1
    name = re.match(rb"event: (.+)\n", raw)
    return (name[1].decode() if name else None), raw.data


OPENAI = {"error": {"message": "Slow down", "type": LATE.error_type, "param": "p", "code": LATE.error_code}}
ANTHROPIC = {"type": "error", "error": {"type": "rate_limit_error", "message": "Slow down"}, "request_id": "req_1"}


def test_a_stream_error_is_written_in_the_clients_language():
    """A stream that breaks off says so as its API does, so that the client's SDK raises."""
    assert told(CHAT) == told(COMPLETIONS) == (None, OPENAI)
    assert told(MESSAGES) == ("error", ANTHROPIC)
    assert told(IMAGES) == told(TRANSCRIPTS) == ("error", {"type": "error", **OPENAI})
    own = {"type": "error", "code": LATE.error_code, "message": "Slow down", "param": "p"}
    assert told(RESPONSES) == ("error", {**own, "sequence_number": 0})
    assert told(RESPONSES, last=b'data: {"sequence_number" : 41}\n\n') == ("error", {**own, "sequence_number": 42})


def test_an_error_body_is_written_in_the_clients_language():
    """OpenAI's four keys are always there; Anthropic's envelope names the request."""
    for dialect in (*DIALECTS.values(), PLAIN_DIALECT):
        assert json.loads(dialect.error_body(LATE, "req_1")) == (ANTHROPIC if dialect is MESSAGES else OPENAI)
    assert json.loads(CHAT.error_body(GatewayError(), "r"))["error"] == {
        "message": "The gateway could not answer this request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


@pytest.mark.parametrize("error, kind", [
    (BadRequest(), "invalid_request_error"),
    (Unauthenticated(), "authentication_error"),
    (GatewayError(status=402), "billing_error"),
    (GatewayError(status=403), "permission_error"),
    (NotFound(), "not_found_error"),
    (GatewayError(status=413), "request_too_large"),
    (LATE, "rate_limit_error"),
    (GatewayError(status=503), "overloaded_error"),
    (GatewayError(status=504), "timeout_error"),
    (GatewayError(status=529), "overloaded_error"),
    (GatewayError(status=499), "invalid_request_error"),
    (GatewayError(status=500), "api_error"),
    (GatewayError(status=502), "api_error"),
])  # fmt: skip
def test_anthropics_kinds_of_errors(error, kind):
    """Anthropic's SDK and its users go by the error's type."""
    assert json.loads(MESSAGES.error_body(error, "r"))["error"]["type"] == kind


# --- the table

TABLE = {
    # endpoint: operation, openrouter's path, openai's, required, text, caps
    "chat/completions": ("chat", "/chat/completions", None, "model messages", "messages tools", "max_completion_tokens max_tokens"),
    "completions": ("text_completion", "/completions", None, "model prompt", "prompt suffix", "max_tokens"),
    "embeddings": ("embeddings", "/embeddings", None, "model input", "input", ""),
    "responses": ("chat", "/responses", None, "model", "input instructions tools", "max_output_tokens"),
    "messages": ("chat", "/messages", None, "model messages", "messages system tools", "max_tokens"),
    "rerank": ("rerank", "/rerank", None, "model query documents", "query documents", ""),
    "images/generations": ("image_generation", "/images", "/images/generations", "model prompt", "prompt", ""),
    "audio/speech": ("text_to_speech", "/audio/speech", None, "model input", "input instructions", ""),
    "audio/transcriptions": ("speech_to_text", "/audio/transcriptions", None, "model", "prompt", ""),
}  # fmt: skip


def test_the_table_of_endpoints():
    """The nine proxied endpoints: where they go, what they need, where their text and limits stand."""
    assert {
        name: (
            d.operation, d.paths["openrouter"], d.paths["openai"] if d.paths["openai"] != d.paths["openrouter"] else None,
            " ".join(d.required), " ".join(d.text_fields), " ".join(d.output_caps),
        )
        for name, d in DIALECTS.items()
    } == TABLE  # fmt: skip
    assert [d.endpoint for d in DIALECTS.values() if d.grammar] == [d.endpoint for d in STREAMED]
    assert [d.endpoint for d in DIALECTS.values() if d.reply == "binary"] == ["audio/speech"]
    assert [d.endpoint for d in DIALECTS.values() if d.request == "multipart"] == ["audio/transcriptions"]
    assert [d.endpoint for d in DIALECTS.values() if d.usage_on_request] == ["chat/completions", "completions"]
    assert (CHAT.reply_content_type, DIALECTS["audio/speech"].reply_content_type) == ("application/json", "application/octet-stream")  # fmt: skip
    assert RESPONSES.forced == {"store": False}
    assert set(RESPONSES.refused) == {"background", "conversation"}
    assert MESSAGES.grammar.keep_alive == b'event: ping\ndata: {"type": "ping"}\n\n'
    assert {d.grammar.keep_alive for d in STREAMED if d is not MESSAGES} == {b": keep-alive\n\n"}
    assert {n: d.headers for n, d in DIALECTS.items() if d.headers} == {
        "chat/completions": ("openai-beta",),
        "completions": ("openai-beta",),
        "responses": ("openai-beta",),
        "messages": ("anthropic-version", "anthropic-beta"),
    }
    assert "authorization" not in COMMON_HEADERS
    assert not any(h.startswith("x-openrouter-cache") for h in COMMON_HEADERS)


@pytest.mark.parametrize("dialect", [CHAT, RESPONSES, MESSAGES])
def test_a_schema_is_written_where_the_endpoint_reads_it(dialect):
    """A JSON schema that the gateway adds is found as the client's own would be, and leaves what stands beside it."""
    schema = {"type": "object"}
    field = dialect.schema_at[0]
    body = {field: {"verbosity": "low"}} if len(dialect.schema_at) > 1 else {}
    assert dialect.answer_form(body) is None
    made = dialect.with_schema(body, "label", schema, strict=True)
    form = dialect.answer_form({**body, **made})
    assert form["type"] == "json_schema"
    assert form.get("schema", form.get("json_schema", {}).get("schema")) == schema
    assert made.keys() == {field}
    assert body.get(field, {}).items() <= made[field].items()


SCHEMA = {"type": "object"}


@pytest.mark.parametrize("dialect, body, made", [
    (CHAT, {}, {"response_format": {
        "type": "json_schema", "json_schema": {"name": "label", "strict": True, "schema": SCHEMA}}}),
    (RESPONSES, {"text": {"verbosity": "low"}}, {"text": {
        "verbosity": "low", "format": {"type": "json_schema", "name": "label", "strict": True, "schema": SCHEMA}}}),
    (RESPONSES, {"text": "nonsense"}, {"text": {
        "format": {"type": "json_schema", "name": "label", "strict": True, "schema": SCHEMA}}}),
    (MESSAGES, {}, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
])  # fmt: skip
def test_a_schema_is_written_as_each_api_has_it(dialect, body, made):
    """OpenAI's APIs name a schema and hold to it strictly, each in its own nesting; Anthropic's has the schema alone."""
    assert dialect.with_schema(body, "label", SCHEMA, strict=True) == made


@pytest.mark.parametrize("raw, mark", [
    (b"event: ping", Mark()),
    (b"data: [DONE]", DONE),
    (b"data: [DONE] and more", DONE),
    (b"data: [1]", Mark(malformed=True)),
    (b"data: {half", Mark(malformed=True)),
    (b"data: {}", Mark()),
    (b'data: {"type": null}', Mark()),
    (b'data: {"type": "song.begins"}', Mark()),
    (b'data: {"type": "song.line"}', Mark(content=True)),
    (b'data: {"type": "a.song.line"}', Mark()),
    (b'data: {"type": "song.line.more"}', Mark()),
    (b'data: {"type": "song.done"}', Mark(content=True, finish=True)),
    (b'data: {"type": "song.done", "usage": {"n": 1}}', Mark(content=True, finish=True, usage={"n": 1})),
    (b'data: {"type": "song.done", "response": {"usage": {"n": 2}}, "usage": {"n": 1}}',
     Mark(content=True, finish=True, usage={"n": 2})),
    (b'data: {"type": "song.line", "usage": "many"}', Mark(content=True)),
    (b'data: {"type": "error", "message": "m"}', Mark(error={"type": "error", "message": "m", "error_type": None})),
    (b'data: {"type": "response.failed", "response": {"error": {"message": "m"}}, "error_type": "t"}',
     Mark(error={"message": "m", "error_type": "t"})),
    (b'data: {"type": "song.line", "error": "m"}', Mark(error={"message": "m", "error_type": None})),
    (b'data: {"type": "error", "error": {"message": "m", "error_type": "own"}, "response": {"error": "x"}}',
     Mark(error={"message": "m", "error_type": "own"})),
])  # fmt: skip
def test_events_that_name_their_type_are_known_by_it(raw, mark):
    """Content, end, usage and failure of a stream are told by its events' types, whichever types it has."""
    sung = _mark_typed(re.compile(r"song\.line"), frozenset({"song.done"}))
    assert sung(Event(raw + b"\n\n")) == mark


def test_an_endpoint_without_schemas_gets_none():
    assert COMPLETIONS.with_schema({}, "label", {}, strict=True) == {}
    assert COMPLETIONS.answer_form({"response_format": {"type": "json_schema"}}) is None
