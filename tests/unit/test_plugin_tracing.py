import json
import random
import string
import time
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from plugin_objects import exchange, services
from pydantic import SecretStr, ValidationError

from gateway import AttemptRecord, Cause, Outcome, Target, logs
from gateway.exchange import Reply
from gateway.kit import new_key
from gateway_plugins import tracing
from gateway_plugins.tracing import export, otlp
from gateway_plugins.tracing.content import Content, Listener
from gateway_plugins.tracing.context import new_trace, trace_of
from gateway_plugins.tracing.spans import Spans

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def trace(parent, *states, **headers):
    view = [("traceparent", parent), *(("tracestate", state) for state in states)]
    return trace_of(exchange(headers=view))


# --- what clients send ---------------------------------------------------------------------------------------------


def test_a_sound_parent_is_taken():
    """Its trace, its span as the parent, its flag; a later version's additions are ignored."""
    for sent in (PARENT, "cc" + PARENT[2:] + "-what-comes-later"):
        found = trace(sent, "a=1", "b@x=2,,c=3")
        assert f"{found.trace_id:032x}" == PARENT[3:35]
        assert f"{found.parent_id:016x}" == PARENT[36:52]
        assert found.sampled
        assert found.state == "a=1,b@x=2,,c=3"
    assert not trace(PARENT[:-2] + "02").sampled
    assert trace(PARENT[:-2] + "03").sampled


@pytest.mark.parametrize(
    "sent",
    [
        "", "x", PARENT.upper(), "ff" + PARENT[2:], PARENT + "-", PARENT + "-x", PARENT[:-1], PARENT + "0",
        "00-" + "0" * 32 + PARENT[35:], PARENT[:36] + "0" * 16 + "-01", PARENT.replace("-", "_"), " " + PARENT,
        PARENT + "\n", PARENT[:3] + "g" + PARENT[4:], "0" * 100_000, "\udcff" + PARENT[1:], "٠" + PARENT[1:],
    ],
)  # fmt: skip
def test_a_parent_that_is_not_sound_is_ignored(sent):
    """Whatever a client sends, there is a trace of our own instead."""
    assert trace(sent) is None


def test_two_parents_are_none():
    """A proxy that adds its own to the client's: nobody knows which one is right."""
    assert trace_of(exchange(headers=[("traceparent", PARENT), ("traceparent", PARENT)])) is None


@given(st.text())
def test_any_text_is_a_parent_or_none(text):
    """Nothing that can stand in a header raises."""
    trace(text, text)


@pytest.mark.parametrize(
    "state",
    ["a", "=1", "A=1", "a=\x7f", "a=1,a=2", "a=" + "x" * 257, ",".join(f"k{n}=1" for n in range(33)), "a=1\r\nx: y",
     "a=ä", ",".join(f"key{n}={'x' * 40}" for n in range(20))],
)  # fmt: skip
def test_a_state_that_is_not_sound_is_dropped_whole(state):
    """The trace goes on without it."""
    assert trace(PARENT, state).state == ""


def test_a_share_is_sampled():
    """By the trace's id, so that two gateways with the same share agree."""
    random.seed(7)
    assert sum(new_trace(0.25).sampled for _ in range(4000)) == pytest.approx(1000, rel=0.1)
    assert all(new_trace(1.0).sampled for _ in range(100))
    assert not any(new_trace(0.0).sampled for _ in range(100))
    assert new_trace(1.0, (1 << 128) - 1).sampled


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, complaint",
    [
        ({"endpoint": "collector:4318"}, "no URL of a collector"),
        ({"endpoint": "ftp://collector"}, "no URL of a collector"),
        ({"endpoint": "http://user:secret@collector"}, "put what is secret into headers"),
        ({"endpoint": "http://collector/v1/traces?key=secret"}, "put what is secret into headers"),
        ({"headers": {"x-key": "a\nb"}}, "can't be sent as a header"),
        ({"headers": {"x key": "a"}}, "should match pattern"),
        ({"redact": ["("]}, "is no regular expression"),
        ({"redact": ["x*"]}, "meets the empty text"),
        ({"sample_ratio": 1.5}, "less than or equal to 1"),
        ({"ca_file": "/nowhere.pem"}, "can't be used"),
    ],
)
def test_mistakes_are_told(config, complaint):
    """Each names what to write instead; no secret is in it."""
    with pytest.raises(ValidationError, match=complaint) as caught:
        tracing.Config(**config)
    assert "secret@" not in str(caught.value)


def test_an_endpoint_may_be_the_collectors_address_alone():
    """/v1/traces is where collectors listen; a path of one's own stays."""
    assert tracing.Config(endpoint="http://c:4318").endpoint == "http://c:4318/v1/traces"
    assert tracing.Config(endpoint="http://c:4318/").endpoint == "http://c:4318/v1/traces"
    assert tracing.Config(endpoint="https://c/otlp/v1/traces").endpoint == "https://c/otlp/v1/traces"
    assert tracing.Config(headers={"a": SecretStr("s")}).headers["a"].get_secret_value() == "s"


def test_every_setting_is_described():
    """With its default at the end."""
    for name, field in tracing.Config.model_fields.items():
        assert "efault" in field.description, name


# --- bytes -----------------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.text(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.lists(st.text(), max_size=4),
)
NUMBERS = st.integers(1, 2**63)


def plain(value):
    kind = value.WhichOneof("value")
    return [plain(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@given(
    st.text(min_size=1), NUMBERS, NUMBERS,
    st.dictionaries(st.text(string.ascii_lowercase + "._", min_size=1), VALUES, max_size=8), st.booleans(),
)  # fmt: skip
def test_our_bytes_are_what_opentelemetry_reads(name, one, two, attributes, failed):
    """Every field, decoded by its own protobuf classes, is what the span held."""
    events = [otlp.Event("first", two, attributes)]
    own = {key: value for key, value in attributes.items() if key > "m"}
    shared = (otlp.Shared({key: value for key, value in attributes.items() if key <= "m"}),)
    span = otlp.Span(name, otlp.CLIENT, one, one, two, one, two, own, shared, failed, events, "a=1", remote=True)
    for _ in range(2):  # the second time from what was kept
        read = SpanMessage.FromString(otlp.encoded(span))
        assert (read.name, read.kind, read.trace_state) == (name, SpanMessage.SPAN_KIND_CLIENT, "a=1")
        assert read.trace_id == one.to_bytes(16, "big")
        assert (read.span_id, read.parent_span_id) == (one.to_bytes(8, "big"), two.to_bytes(8, "big"))
        assert (read.start_time_unix_nano, read.end_time_unix_nano) == (one, two)
        assert {pair.key: plain(pair.value) for pair in read.attributes} == attributes
        assert {pair.key: plain(pair.value) for pair in read.events[0].attributes} == attributes
        assert (read.events[0].name, read.events[0].time_unix_nano) == ("first", two)
        assert read.status.code == (2 if failed else 0)
        assert read.flags == 0x301
        assert len(read.SerializeToString()) == len(otlp.encoded(span))  # there is nothing that it does not know


@pytest.mark.parametrize(
    "text", ["", "x" * 100, "x" * 101, "é" * 62, "é" * 63, "é" * 100, "\U0001f600" * 100, "\udcff"]
)
def test_a_text_of_any_length_is_what_opentelemetry_reads(text):
    """Around the lengths where its encoding needs another byte; what is no Unicode becomes a question mark."""
    read = SpanMessage.FromString(otlp.encoded(otlp.Span("s", otlp.SERVER, 1, 2, 0, 3, 4, {"a.key": text})))
    assert [pair.value.string_value for pair in read.attributes] == [text.encode(errors="replace").decode()]


def test_a_batch_is_what_opentelemetry_reads():
    """One resource, one scope, and the spans in it."""
    span = otlp.encoded(otlp.Span("s", otlp.SERVER, 1, 2, 0, 3, 4, {}))
    read = ExportTraceServiceRequest.FromString(
        otlp.request({"service.name": "x", "process.pid": 9}, "1.2", [span] * 3)
    )
    [of_resource] = read.resource_spans
    assert {pair.key: plain(pair.value) for pair in of_resource.resource.attributes} == {
        "service.name": "x", "process.pid": 9,
    }  # fmt: skip
    [scope] = of_resource.scope_spans
    assert (scope.scope.name, scope.scope.version, len(scope.spans)) == ("xenios", "1.2", 3)
    assert scope.spans[0].parent_span_id == b""


# --- attributes ------------------------------------------------------------------------------------------------------


class Upstream:
    kind = "openai"
    simulated = False

    class settings:
        base_url = "https://models.example.com/v1"


def spans(made, timings=(), content=None):
    made.snapshot.upstreams = {"openrouter": Upstream}
    made.finished = made.finished or made.started + 1
    return Spans(made, new_trace(1.0)).all(content or {}, timings)


def tried(made, cause=None, model="m/one"):
    record = AttemptRecord(made.attempt(Target(model, "openrouter")), len(made.attempts) + 1, made.started)
    record.finished, record.cause = made.started + 0.5, cause
    made.attempts.append(record)
    return record


def test_what_clients_choose_is_no_secret_and_no_megabyte():
    """Model names and ids are cut, printable, and without keys; odd parameters are left out."""
    key = "sk-xenios-canarycanarycanary"
    made = exchange({"model": f"{key}\n\x1b\x00" + "x" * 10**6, "temperature": "hot", "top_p": True, "seed": 2**70,
                     "n": 10**30, "max_tokens": 2**80, "stop": ["canary"], "messages": []})  # fmt: skip
    made.request_id = key
    tried(made, model=made.body["model"])
    shown = msgspec.json.encode([otlp.readable(span) for span in spans(made)]).decode()
    assert "canary" not in shown
    assert len(shown) < 3000
    assert "temperature" not in shown
    assert "seed" not in shown
    for span in spans(made):
        SpanMessage.FromString(otlp.encoded(span))


def test_a_word_of_the_environment_is_a_word(monkeypatch):
    """A model that the configuration takes from a variable is named; what is secret everywhere is not."""
    monkeypatch.setattr(logs, "_hidden", set())
    monkeypatch.setattr(logs, "_secret", set())
    logs.hide(["author/model-of-mine"])
    logs.hide(["author/secret-canary"], everywhere=True)
    made = exchange({"model": "author/model-of-mine"})
    tried(made, model="author/model-of-mine")
    tried(made, model="author/secret-canary")
    server, one, two = spans(made)
    assert (
        otlp.all_attributes(server)["xenios.model_asked"]
        == otlp.all_attributes(one)["gen_ai.request.model"]
        == "author/model-of-mine"
    )
    assert one.name == "chat author/model-of-mine"
    assert two.name == "chat ***"


def test_a_state_with_a_key_is_dropped():
    """It would stand in spans as it came, and go to upstreams."""
    assert trace(PARENT, f"vendor={new_key()}").state == ""


def test_an_unknown_method_has_no_name():
    """Nobody makes a span name of theirs by sending it."""
    made = exchange()
    made.request.method = "canary"
    [server] = spans(made)
    assert server.name == "HTTP /v1/chat/completions"
    assert otlp.all_attributes(server)["http.request.method"] == "_OTHER"


@pytest.mark.parametrize(
    "outcome, status, failed",
    [
        (Outcome.OK, 200, False),
        (Outcome.REFUSED, 401, False),
        (Outcome.REFUSED, 503, True),
        (Outcome.UPSTREAM_ERROR, 429, False),
        (Outcome.UPSTREAM_ERROR, 502, True),
        (Outcome.UPSTREAM_ERROR, 200, True),
        (Outcome.TIMEOUT, 504, True),
        (Outcome.SHUTDOWN, 200, True),
        (Outcome.CLIENT_DISCONNECT, None, False),
        (Outcome.CLIENT_DISCONNECT, 200, False),
        (Outcome.ERROR, None, True),
    ],
)
def test_when_a_server_span_is_an_error(outcome, status, failed):
    """5xx, and what failed after its 200; never what the client did."""
    made = exchange()
    made.outcome, made.status = outcome, status
    [server] = spans(made)
    assert server.failed is failed
    assert ("error.type" in otlp.all_attributes(server)) is failed


@pytest.mark.parametrize("cause, failed", [(None, False), (Cause.CLIENT_DISCONNECT, False), (Cause.ABANDONED, False),
                                           (Cause.RATE_LIMIT, True), (Cause.INVALID_OUTPUT, True)])  # fmt: skip
def test_when_an_attempts_span_is_an_error(cause, failed):
    """Not when somebody gave it up; the cause is named in any case."""
    made = exchange()
    tried(made, cause)
    _, client = spans(made)
    assert client.failed is failed
    assert otlp.all_attributes(client).get("error.type") == cause
    assert (otlp.all_attributes(client)["server.address"], otlp.all_attributes(client)["server.port"]) == (
        "models.example.com",
        443,
    )
    assert otlp.all_attributes(client)["gen_ai.provider.name"] == "openai"


def test_each_timed_hook_is_a_span():
    """Within the server's, at its own time."""
    made = exchange()
    at = made.started
    server, hook = spans(made, [("routing", "choose_targets", at + 0.25, at + 0.5)])
    assert (hook.name, hook.kind, hook.parent_id) == ("routing.choose_targets", otlp.INTERNAL, server.span_id)
    assert hook.started - server.started == pytest.approx(0.25e9, rel=0.01)
    assert hook.ended - hook.started == pytest.approx(0.25e9, rel=0.01)


async def test_without_a_collector_nothing_is_kept():
    """Before the lifespan, and for what is not sampled, no span is made."""
    plugin = tracing.Plugin(tracing.Config(sample_ratio=0), services())
    made = exchange()
    await plugin.request_received(made)
    await plugin.request_finished(made)
    assert made.trace_id is None


@given(st.binary())
def test_any_reply_of_a_collector_is_read(reply):
    """Also what is no protobuf."""
    assert otlp.refused(reply) >= 0


def test_a_span_on_a_terminal_steers_nothing():
    """Whatever is in it, it is one line of ASCII."""
    content = {"gen_ai.input.messages": "\x9b2J\x7f\u2028\udcff\n\x1b", "count": 1}
    line = export._line(otlp.Span("a\x9b", otlp.SERVER, 1, 2, 0, 0, 0, content)).decode()
    assert line[:-1].isascii()
    assert line[:-1].isprintable()
    assert json.loads(line)["attributes"]["gen_ai.input.messages"].startswith("\x9b2J\x7f\u2028")


# --- content ---------------------------------------------------------------------------------------------------------


def shown(value, longest=10_000, patterns=()):
    return json.loads(Content(longest, patterns).shown(value))


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30), st.integers(1, 50))  # fmt: skip
def test_any_json_is_shown_within_its_bound(value, longest):
    """Whatever shape it has: it is JSON, and no longer than was asked for, but for its punctuation."""
    text = Content(longest, ()).shown(value)
    json.loads(text)

    def characters(value):
        if isinstance(value, str):
            return len(value)
        if isinstance(value, dict):
            return sum(characters(k) + characters(v) for k, v in value.items())
        return sum(map(characters, value)) if isinstance(value, list) else 0

    assert characters(json.loads(text)) <= longest + 60


@pytest.mark.parametrize("at", [0, 5, 80, 95, 99, 100, 4090, 4195, 4200])
def test_a_key_is_not_shown_wherever_the_text_is_cut(at):
    """Nor the half of one."""
    text = "." * at + " sk-xenios-" + "canary" * 40 + "." * 10_000
    assert "canary" not in Content(100, ()).shown(text)
    assert "canary" not in Content(5000, ()).shown(text)


MANY = {
    "numbers": ("embeddings", {"input": [1] * 2_000_000}),
    "empty texts": ("chat/completions", {"messages": [{"role": "user", "content": [""] * 2_000_000}]}),
    "nothing at all": ("chat/completions", {"messages": [{"role": "user", "content": [None] * 2_000_000}]}),
    "empty lists": ("chat/completions", {"messages": [], "tools": [[]] * 2_000_000}),
    "empty objects": ("chat/completions", {"messages": [], "tools": [{"": {}}] * 2_000_000}),
    "messages": ("chat/completions", {"messages": [{"role": "user", "content": ""}] * 2_000_000}),
}


@pytest.mark.parametrize("what", MANY)
def test_of_a_million_items_few_are_looked_at(what):
    """Whatever a client sends very many of, spans are short, and making them takes neither memory nor time."""
    endpoint, body = MANY[what]
    made = exchange(body, endpoint=endpoint)
    tracemalloc.start()
    began = time.process_time()
    try:
        found = Content(1000, ()).attributes(made, None)
        taken = time.process_time() - began
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(map(len, found.values())) < 20_000
    assert most < 2_000_000
    assert taken < 0.2


def test_files_are_not_kept():
    """Pictures and sound are told by their size."""
    assert shown({"url": "data:image/png;base64,AAAA", "data": "A" * 50, "b64_json": "A"}) == {
        "url": "[26]", "data": "[50]", "b64_json": "[1]",
    }  # fmt: skip


BODIES = {
    "chat/completions": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]},
                      {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
                      {"role": "tool", "tool_call_id": "c", "content": "42"}]},
        [{"role": "user", "parts": [{"type": "text", "content": "hi"}]},
         {"role": "assistant", "parts": [{"type": "tool_call", "id": "c", "name": "f", "arguments": "{}"}]},
         {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c", "response": "42"}]}],
    ),
    "completions": ({"prompt": "hi"}, [{"role": "user", "parts": [{"type": "text", "content": "hi"}]}]),
    "responses": (
        {"input": [{"role": "user", "content": "hi"}], "instructions": "be"},
        [{"role": "user", "parts": [{"type": "text", "content": "hi"}]}],
    ),
    "messages": (
        {"system": "be", "messages": [{"role": "user", "content": "hi"}]},
        [{"role": "user", "parts": [{"type": "text", "content": "hi"}]}],
    ),
    "embeddings": ({"input": ["a", "b"]}, [{"role": "user", "parts": [{"type": "text", "content": t}]} for t in "ab"]),
}  # fmt: skip


@pytest.mark.parametrize("endpoint", BODIES)
def test_requests_of_all_endpoints_are_messages(endpoint):
    """In the form of the conventions: roles and parts; instructions apart."""
    body, expected = BODIES[endpoint]
    made = exchange(body, endpoint=endpoint)
    attributes = Content(1000, ()).attributes(made, None)
    assert json.loads(attributes["gen_ai.input.messages"]) == expected
    if "be" in body.values():
        assert json.loads(attributes["gen_ai.system_instructions"]) == [{"type": "text", "content": "be"}]


REPLIES = [
    {"choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]},
    {"choices": [{"text": "hi", "finish_reason": "stop"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "hi"}], "stop_reason": "stop"},
    {"output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]}]},
    {"text": "hi"},
]


@pytest.mark.parametrize("data", REPLIES, ids=["chat", "completions", "messages", "responses", "transcriptions"])
def test_answers_of_all_endpoints_are_messages(data):
    """Whole replies."""
    made = exchange()
    made.reply = Reply(200, data=data)
    [message] = json.loads(Content(1000, ()).attributes(made, None)["gen_ai.output.messages"])
    assert message["role"] == "assistant"
    assert message["parts"] == [{"type": "text", "content": "hi"}]


@pytest.mark.parametrize(
    "body", [b"no json", b"[]", b'{"choices": 3}', b'{"data": [{"embedding": [1, 2]}]}', b'{"choices": [1, null]}']
)
def test_other_replies_have_no_messages(body):
    """Vectors, and what is not understood."""
    made = exchange()
    made.reply = Reply(200, body, {"Content-Type": "application/json"})
    assert "gen_ai.output.messages" not in Content(1000, ()).attributes(made, None)


@pytest.mark.parametrize(
    "events",
    [
        [
            {"choices": [{"index": 0, "delta": {"content": "h"}}]},
            {"choices": [{"index": 0, "delta": {"content": "i"}}]},
        ],
        [{"choices": [{"index": 0, "text": "hi"}]}],
        [{"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hi"}}],
        [{"type": "response.output_text.delta", "delta": "hi"}],
        [{"delta": "h"}, {"type": "response.completed", "response": REPLIES[3]}],
    ],
    ids=["chat", "completions", "messages", "responses", "completed"],
)
def test_streams_of_all_endpoints_are_messages(events):
    """Put together from what was heard."""
    from gateway import Event

    heard = Listener(1000)
    for data in [*events, "[DONE]", 3, {"choices": [None]}]:
        event = Event(b"data: " + msgspec.json.encode(data) + b"\n\n")
        assert heard.event(event) is event
    assert list(heard.end(Outcome.OK)) == []
    [message] = json.loads(Content(1000, ()).attributes(exchange(), heard)["gen_ai.output.messages"])
    assert message["parts"] == [{"type": "text", "content": "hi"}]


def test_a_listener_remembers_no_more_than_may_be_needed():
    """A stream without end."""
    from gateway import Event

    heard = Listener(10)
    for _ in range(1000):
        heard.event(Event(b"data: " + b"x" * 100))
    assert sum(map(len, heard.events)) < 300
