"""The `openai` package, unmodified: base URL and key are all that it is told."""

from __future__ import annotations

import base64
import io
import json
import struct
import wave
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from tests.clients.process import Served

MODEL = "anthropic/claude-haiku-4.5"
HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture
def client(gateway: Served) -> Iterator[OpenAI]:
    # max_retries: errors are looked at, not waited out
    with OpenAI(base_url=gateway.base_url, api_key=gateway.key, max_retries=0, timeout=20) as made:
        yield made


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def wav() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(32_000))
    return file.getvalue()


# --- answers ----------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_whole(client: OpenAI) -> None:
    """A chat completion comes back with text, finish reason and usage."""
    reply = client.chat.completions.create(model=MODEL, messages=HELLO)
    [choice] = reply.choices
    assert "Hello" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 0


def test_a_chat_is_streamed(client: OpenAI) -> None:
    """A streamed answer is the whole one in pieces, and every chunk has a choice: code that reads `choices[0]` works."""
    whole = client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    assert text_of(chunks) == whole
    assert all(chunk.choices for chunk in chunks)
    assert len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_usage_chunk_comes_if_it_was_asked_for(client: OpenAI) -> None:
    """With `include_usage` the last chunk holds the usage and no choices, once, as at OpenAI."""
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options=options))
    with_usage = [chunk for chunk in chunks if chunk.usage is not None]
    assert with_usage == [chunks[-1]]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    assert text_of(chunks)


def test_a_tool_is_called(client: OpenAI) -> None:
    """The model's tool call arrives with arguments that the tool's schema allows; its result is answered with text."""
    messages: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    message = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0].message
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments).keys() == {"city", "days"}
    messages += [message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    after = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0]
    assert after.finish_reason == "stop"
    assert after.message.content


def test_a_tool_is_called_in_a_stream(client: OpenAI) -> None:
    """The SDK's own stream helper puts the call together from its deltas."""
    messages: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    [choice] = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert json.loads(choice.message.tool_calls[0].function.arguments).keys() == {"city", "days"}


class Place(BaseModel):
    name: str
    country: str


class Trip(BaseModel):
    title: str
    days: int
    places: list[Place]


def test_an_answer_is_parsed_into_a_model(client: OpenAI) -> None:
    """`.parse` with a pydantic model returns an instance of it."""
    reply = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Trip)
    assert isinstance(reply.choices[0].message.parsed, Trip)


def test_a_streamed_answer_is_parsed_into_a_model(client: OpenAI) -> None:
    """The same from a stream."""
    with client.chat.completions.stream(model=MODEL, messages=HELLO, response_format=Trip) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Trip)


def test_a_prompt_is_completed(client: OpenAI) -> None:
    """The old completions endpoint works whole and streamed."""
    whole = client.completions.create(model=MODEL, prompt="Hello")
    chunks = list(client.completions.create(model=MODEL, prompt="Hello", stream=True))
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_texts_are_embedded(client: OpenAI, encoding: Any) -> None:
    """One vector per text, as floats and as base64, and the SDK's default decodes to the same numbers."""
    extra: Any = {"encoding_format": encoding} if encoding else {}
    reply = client.embeddings.create(
        model="openai/text-embedding-3-small", input=["one", "two"], dimensions=64, **extra
    )
    vectors: list[Any] = [item.embedding for item in reply.data]
    if encoding == "base64":
        vectors = [list(struct.unpack("<64f", base64.b64decode(v))) for v in vectors]
    assert [len(v) for v in vectors] == [64, 64]
    assert all(isinstance(value, float) for v in vectors for value in v)
    assert reply.usage.total_tokens > 0


def test_the_responses_api_answers_whole(client: OpenAI) -> None:
    """A response has text, usage and the status `completed`."""
    reply = client.responses.create(model=MODEL, input="Hello")
    assert "Hello" in reply.output_text
    assert reply.status == "completed"
    assert reply.usage is not None
    assert reply.usage.output_tokens > 0


def test_the_responses_api_streams(client: OpenAI) -> None:
    """Its events come in sequence and end with `response.completed`."""
    whole = client.responses.create(model=MODEL, input="Hello").output_text
    events: list[Any] = list(client.responses.create(model=MODEL, input="Hello", stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))


def test_the_responses_api_parses_and_calls_tools(client: OpenAI) -> None:
    """`responses.parse` and function calls work there too."""
    assert isinstance(client.responses.parse(model=MODEL, input="Hello", text_format=Trip).output_parsed, Trip)
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    reply = client.responses.create(model=MODEL, input="The weather in Oslo?", tools=[tool], tool_choice="required")
    [call] = [item for item in reply.output if item.type == "function_call"]
    assert json.loads(call.arguments).keys() == {"city", "days"}


def test_an_image_is_made(client: OpenAI) -> None:
    """The picture arrives as base64 of a PNG."""
    reply = client.images.generate(model="openai/gpt-image-1", prompt="A red square")
    assert reply.data is not None
    assert base64.b64decode(reply.data[0].b64_json or "").startswith(b"\x89PNG")


def test_a_text_is_spoken(client: OpenAI) -> None:
    """Speech arrives byte for byte, whole and in pieces."""
    whole = client.audio.speech.create(
        model="openai/gpt-4o-mini-tts", voice="alloy", input="Hello", response_format="wav"
    ).read()
    with client.audio.speech.with_streaming_response.create(
        model="openai/gpt-4o-mini-tts", voice="alloy", input="Hello", response_format="wav"
    ) as reply:
        pieces = b"".join(reply.iter_bytes(1024))
    assert whole.startswith(b"RIFF")
    assert pieces == whole


def test_speech_is_transcribed(client: OpenAI) -> None:
    """A multipart upload goes through; the transcription names the file that arrived."""
    reply = client.audio.transcriptions.create(model="openai/whisper-1", file=("hello.wav", wav(), "audio/wav"))
    assert "hello.wav" in reply.text


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    """The list holds models and the operator's names; one whose id holds a slash can be retrieved."""
    listed = {model.id: model for model in client.models.list()}
    assert {MODEL, "task/chat", "smart"} <= listed.keys()
    for name in (MODEL, "task/chat"):
        one = client.models.retrieve(name)
        assert (one.id, one.object, one.owned_by) == (name, "model", listed[name].owned_by)


def test_headers_of_a_reply(client: OpenAI) -> None:
    """The raw reply tells request id, model served, attempts, and that it was simulated."""
    raw = client.chat.completions.with_raw_response.create(model="task/chat", messages=HELLO)
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.headers["x-xenios-model"] == "anthropic/claude-opus-4.5"
    assert raw.headers["x-xenios-attempts"] == "1"
    assert raw.headers["x-xenios-simulated"] == "1"
    assert raw.parse()._request_id == raw.headers["x-request-id"]


def test_a_client_chooses_the_request_id(client: OpenAI) -> None:
    """`X-Request-Id` of a request comes back on its reply."""
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, extra_headers={"X-Request-Id": "mine-42"}
    )
    assert raw.headers["x-request-id"] == "mine-42"


# --- errors -----------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_an_authentication_error(gateway: Served) -> None:
    """A key that nobody issued gets OpenAI's 401, and its text is not repeated."""
    with (
        OpenAI(base_url=gateway.base_url, api_key="sk-somebody-else", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id
    assert "somebody" not in str(caught.value)


def test_an_unknown_model_is_a_not_found_error(client: OpenAI) -> None:
    """A model that does not exist is OpenAI's 404 `model_not_found`, whole, streamed and in the list."""
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="nobody/nothing", messages=HELLO, stream=stream)
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/nothing")


def test_a_rate_limit_is_a_rate_limit_error(client: OpenAI) -> None:
    """The upstream's 429 reaches the SDK with its Retry-After."""
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="xenios/sim-fail-429-n2", messages=HELLO)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "model, expected",
    [
        ("xenios/sim-ctx", openai.BadRequestError),
        ("xenios/sim-fail-403", openai.PermissionDeniedError),
        ("xenios/sim-fail-402", openai.APIStatusError),
        ("xenios/sim-fail-500", openai.InternalServerError),
        ("xenios/sim-fail-401", openai.InternalServerError),
        ("xenios/sim-reset", openai.InternalServerError),
        ("xenios/sim-err200", openai.InternalServerError),
        ("xenios/sim-finerr", openai.InternalServerError),
        ("xenios/sim-badjson", openai.InternalServerError),
        ("xenios/sim-html", openai.InternalServerError),
    ],
)
def test_a_failed_upstream_is_an_exception(client: OpenAI, model: str, expected: type[Exception]) -> None:
    """What other gateways pass on as a success without an answer raises here, with a message and a code."""
    with pytest.raises(expected) as caught:
        client.chat.completions.create(model=model, messages=HELLO)
    assert isinstance(caught.value, openai.APIStatusError)
    assert caught.value.code
    assert caught.value.message


@pytest.mark.parametrize("fault", ["errmid", "finerr", "cutmid", "rstmid", "nodone", "nofinish"])
def test_a_stream_that_breaks_raises(client: OpenAI, fault: str) -> None:
    """A stream that an error or a cut ends raises after the text that came; it never just stops."""
    seen: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError) as caught:
        seen.extend(client.chat.completions.create(model=f"xenios/sim-n10-d1-{fault}", messages=HELLO, stream=True))
    assert not isinstance(caught.value, openai.APIStatusError)
    assert caught.value.message


@pytest.mark.parametrize("fault", ["errmid", "cutmid"])
def test_what_came_before_a_break_is_kept(client: OpenAI, fault: str) -> None:
    """The text before the break reaches the caller, piece by piece."""
    seen: list[ChatCompletionChunk] = []
    stream = client.chat.completions.create(model=f"xenios/sim-n10-d1-{fault}", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError):
        for chunk in stream:
            seen.append(chunk)  # noqa: PERF402 - what came before the exception counts
    assert text_of(seen)


@pytest.mark.parametrize("fault", ["errmid", "cutmid"])
def test_a_broken_response_stream_ends_with_an_error(client: OpenAI, fault: str) -> None:
    """The Responses API tells it as an `error` event in sequence, or the SDK raises; never `completed`."""
    events: list[Any] = []
    raised = False
    try:
        for event in client.responses.create(model=f"xenios/sim-n10-d1-{fault}", input="Hello", stream=True):
            events.append(event)  # noqa: PERF402 - what came before the exception counts
    except openai.APIError:
        raised = True
    assert raised or events[-1].type == "error"
    if not raised:
        assert events[-1].sequence_number == events[-2].sequence_number + 1
    assert "response.completed" not in {event.type for event in events}


def test_a_plain_mistake_is_a_bad_request(client: OpenAI) -> None:
    """A request without messages is refused with the field's name."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": MODEL}, cast_to=object)
    assert caught.value.param == "messages"


# --- async ------------------------------------------------------------------------------------------------------


def test_the_async_client(script: Callable[[str], dict[str, Any]]) -> None:
    """AsyncOpenAI: whole, streamed, twenty at once, parsed, left in the middle, and its errors."""
    seen = script("openai_async.py")
    assert "Hello" in seen["whole"]
    assert seen["streamed"] == seen["whole"]
    assert seen["at_once"] == [f"text {n}" for n in range(20)]
    assert seen["parsed"] == "Trip"
    assert seen["responses"] == "response.completed"
    assert seen["after_leaving"]
    assert seen["errors"] == {
        "AuthenticationError": "invalid_api_key",
        "NotFoundError": "model_not_found",
        "RateLimitError": "rate_limit_exceeded",
    }
    assert seen["broken_stream"] == "APIError"
