"""The `anthropic` package on /v1/messages: its base URL is the gateway's, without `/v1`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.clients.process import Served

MODEL = "anthropic/claude-haiku-4.5"
HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    },
}
ASK_FOR_WEATHER: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture
def client(gateway: Served) -> Iterator[Anthropic]:
    with Anthropic(base_url=gateway.url, api_key=gateway.key, max_retries=0, timeout=20) as made:
        yield made


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# --- who calls --------------------------------------------------------------------------------------------------


def test_every_way_to_give_a_key(gateway: Served) -> None:
    """`api_key=`, `auth_token=`, and each header alone (older SDKs send `x-api-key`) are let in."""
    ways: list[dict[str, Any]] = [
        {"api_key": gateway.key},
        {"auth_token": gateway.key},
        {"auth_token": "unused", "default_headers": {"Authorization": f"Bearer {gateway.key}"}},
        {"auth_token": "unused", "default_headers": {"x-api-key": gateway.key, "Authorization": anthropic.Omit()}},
    ]
    for way in ways:
        with Anthropic(base_url=gateway.url, max_retries=0, **way) as client:
            assert text_of(client.messages.create(model=MODEL, max_tokens=50, messages=HELLO))


def test_each_header_is_what_arrives(gateway: Served) -> None:
    """The test above is worth something: the requests it makes carry the one header and not the other."""
    seen: list[set[str]] = []
    ways: list[dict[str, Any]] = [
        {"auth_token": gateway.key},
        {"auth_token": "unused", "default_headers": {"x-api-key": gateway.key, "Authorization": anthropic.Omit()}},
    ]
    for way in ways:
        with Anthropic(base_url=gateway.url, max_retries=0, **way) as client:
            raw = client.messages.with_raw_response.create(model=MODEL, max_tokens=50, messages=HELLO)
            seen.append({"authorization", "x-api-key"} & set(raw.http_request.headers))
    assert seen == [{"authorization"}, {"x-api-key"}]


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_a_wrong_key_is_an_authentication_error(gateway: Served, header: str) -> None:
    """A key that nobody issued is refused in Anthropic's shape, in either header."""
    value = "Bearer sk-somebody-else" if header == "Authorization" else "sk-somebody-else"
    headers: Any = {"Authorization": anthropic.Omit(), header: value}
    with (
        Anthropic(base_url=gateway.url, auth_token="unused", default_headers=headers, max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        client.messages.create(model=MODEL, max_tokens=50, messages=HELLO)
    body: Any = caught.value.body
    assert body["error"]["type"] == "authentication_error"
    assert caught.value.request_id == body["request_id"]
    assert "somebody" not in str(caught.value)


# --- answers ----------------------------------------------------------------------------------------------------


def test_a_message_is_answered_whole(client: Anthropic) -> None:
    """A message comes back with text, stop reason, usage and the request id that the SDK shows."""
    message = client.messages.create(model=MODEL, max_tokens=200, messages=HELLO, system="Be short.")
    assert "Hello" in text_of(message)
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    assert message._request_id


def test_a_message_is_streamed(client: Anthropic) -> None:
    """The stream helper's text and final message equal the whole answer."""
    whole = text_of(client.messages.create(model=MODEL, max_tokens=200, messages=HELLO))
    with client.messages.stream(model=MODEL, max_tokens=200, messages=HELLO) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 3
    assert "".join(pieces) == text_of(final) == whole
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 0


def test_raw_events_come_in_anthropics_order(client: Anthropic) -> None:
    """message_start first, message_stop last, one message_delta before it, and nothing of OpenAI's."""
    kinds = [e.type for e in client.messages.create(model=MODEL, max_tokens=200, messages=HELLO, stream=True)]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("message_start") == kinds.count("message_stop") == 1


def test_a_tool_is_used(client: Anthropic) -> None:
    """A tool_use block arrives with an input that the schema allows."""
    message = client.messages.create(model=MODEL, max_tokens=200, messages=ASK_FOR_WEATHER, tools=[WEATHER])
    assert message.stop_reason == "tool_use"
    [call] = [block for block in message.content if block.type == "tool_use"]
    assert call.name == "get_weather"
    assert call.input.keys() == {"city", "days"}


def test_a_tool_is_used_in_a_stream(client: Anthropic) -> None:
    """The same, put together from its deltas by the SDK."""
    with client.messages.stream(model=MODEL, max_tokens=200, messages=ASK_FOR_WEATHER, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert final.stop_reason == "tool_use"
    [call] = [block for block in final.content if block.type == "tool_use"]
    assert call.input.keys() == {"city", "days"}


def test_tokens_are_counted(client: Anthropic) -> None:
    """count_tokens answers an estimate, says that it is one, and longer text counts more."""
    short = client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    long_text: Any = [{"role": "user", "content": "Hello " * 500}]
    raw = client.messages.with_raw_response.count_tokens(model=MODEL, messages=long_text, system="Be short.")
    assert 0 < short < 10
    assert 500 <= raw.parse().input_tokens <= 1500
    assert raw.headers["x-xenios-estimate"] == "1"


def test_headers_of_a_reply(client: Anthropic) -> None:
    """`request-id`, which Anthropic's SDK reads, equals `x-request-id`; the model served is named."""
    raw = client.messages.with_raw_response.create(model="task/chat", max_tokens=50, messages=HELLO)
    assert raw.headers["request-id"] == raw.headers["x-request-id"] == raw.parse()._request_id
    assert raw.headers["x-xenios-model"] == "anthropic/claude-opus-4.5"


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, expected, kind",
    [
        ("nobody/nothing", anthropic.NotFoundError, "not_found_error"),
        ("xenios/sim-fail-429", anthropic.RateLimitError, "rate_limit_error"),
        ("xenios/sim-ctx", anthropic.BadRequestError, "invalid_request_error"),
        ("xenios/sim-fail-402", anthropic.APIStatusError, "billing_error"),
        ("xenios/sim-fail-500", anthropic.InternalServerError, "api_error"),
        ("xenios/sim-fail-529", anthropic.InternalServerError, "overloaded_error"),
        ("xenios/sim-reset", anthropic.InternalServerError, "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_anthropics(
    client: Anthropic, model: str, expected: type[Exception], kind: str, *, stream: bool
) -> None:
    """Each failure raises the SDK's exception for it, with Anthropic's error type in the body."""
    if stream and "/sim-" in model:
        model += "-n1"  # of its own: one that answered 429 is left alone for as long as it asked
    with pytest.raises(expected) as caught:
        client.messages.create(model=model, max_tokens=50, messages=HELLO, stream=stream)
    assert isinstance(caught.value, anthropic.APIStatusError)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert caught.value.request_id


@pytest.mark.parametrize("fault", ["errmid", "cutmid", "rstmid", "nodone"])
def test_a_stream_that_breaks_raises(client: Anthropic, fault: str) -> None:
    """A stream that an error or a cut ends raises; the SDK never takes it for a short answer."""
    model = f"xenios/sim-n10-d1-{fault}"
    kinds: list[str] = []
    with pytest.raises(anthropic.APIError) as caught:
        for event in client.messages.create(model=model, max_tokens=500, messages=HELLO, stream=True):
            kinds.append(event.type)  # noqa: PERF401 - what came before the exception counts
    assert "message_stop" not in kinds
    assert "content_block_delta" in kinds
    assert caught.value.body["type"] == "error"  # type: ignore[index]


def test_a_plain_mistake_is_a_bad_request(client: Anthropic) -> None:
    """A request without messages is refused in Anthropic's shape, also by count_tokens."""
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.post(path, body={"model": MODEL, "max_tokens": 50}, cast_to=object)
        assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


# --- async ------------------------------------------------------------------------------------------------------


def test_the_async_client(script: Callable[[str], dict[str, Any]]) -> None:
    """AsyncAnthropic: whole, streamed, ten at once, and a stream that breaks."""
    seen = script("anthropic_async.py")
    assert "Hello" in seen["whole"]
    assert seen["streamed"] == seen["whole"]
    assert seen["at_once"] == [True] * 10
    assert seen["broken_stream"]
