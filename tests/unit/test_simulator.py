"""The simulated OpenRouter over real sockets, read by the packages that read the real one."""

import asyncio
import base64
import contextlib
import email.utils
import json
import struct

import aiohttp
import anthropic
import jsonschema
import openai
import openrouter
import pydantic
import pytest

from gateway.simulator import Simulator
from gateway.simulator.schemas import instance

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
PATHS = ("chat/completions", "completions", "responses", "messages")
TOOL = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 3, "maximum": 7},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}


class Person(pydantic.BaseModel):
    name: str
    age: int
    tags: list[str]
    boss: "Person | None"


@pytest.fixture
async def sim():
    async with Simulator(latency=0, chunk_delay=0) as simulator:
        yield simulator


@pytest.fixture
async def http(sim):
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def client(sim):
    async with openai.AsyncOpenAI(base_url=sim.url, api_key="k", max_retries=0) as made:
        yield made


@pytest.fixture
async def claude(sim):
    async with anthropic.AsyncAnthropic(base_url=sim.url.removesuffix("/v1"), api_key="k", max_retries=0) as made:
        yield made


def body_for(path, model, **more):
    given = {"prompt": "Say something"} if path == "completions" else {"messages": MESSAGES}
    if path == "responses":
        given = {"input": "Say something"}
    return {"model": model, "max_tokens": 10_000, **given, **more}


async def post(http, sim, path, model, **more):
    async with http.post(f"{sim.url}/{path}", json=body_for(path, model, **more)) as reply:
        return reply.status, reply.headers, await reply.read()


async def stream(http, sim, path, model, **more):
    """All that arrives of a stream, and the error that ended it."""
    got = b""
    async with http.post(f"{sim.url}/{path}", json=body_for(path, model, stream=True, **more)) as reply:
        assert reply.status == 200, await reply.text()
        try:
            async for part in reply.content.iter_any():
                got += part
        except aiohttp.ClientError as error:
            return got, error
    return got, None


def events(raw):
    lines = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def deltas(raw):
    return "".join(choice["delta"].get("content") or "" for item in events(raw) for choice in item["choices"])


async def test_chat_whole(sim, client, http):
    """An OpenAI client gets a plausible answer with OpenRouter's usage, cost and generation id."""
    raw = await client.chat.completions.with_raw_response.create(model="openai/gpt-4o", messages=MESSAGES)
    answer = raw.parse()
    assert "capital of France" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("gen-")
    assert raw.headers["x-generation-id"] == answer.id
    usage = answer.usage.model_dump()
    expected = usage["prompt_tokens"] * 2.5e-6 + usage["completion_tokens"] * 1e-5
    assert usage["cost"] == pytest.approx(expected)
    async with http.get(f"{sim.url}/generation", params={"id": answer.id}) as reply:
        row = (await reply.json())["data"]
    assert row["total_cost"] == usage["cost"]
    assert row["cancelled"] is False


async def test_openrouter_sdk_reads_all(sim):
    """OpenRouter's own SDK accepts chat, streams, models, rerank, images, embeddings and transcriptions."""
    sdk = openrouter.OpenRouter(api_key="k", server_url=sim.url)
    async with sdk:
        chat = await sdk.chat.send_async(model="anthropic/claude-opus-4.5", messages=MESSAGES, max_tokens=50)
        assert chat.choices[0].finish_reason == "stop"
        chunks = [item async for item in await sdk.chat.send_async(model="xenios/sim", messages=MESSAGES, stream=True)]
        assert chunks[-1].usage.cost > 0
        found = await sdk.models.list_async()
        assert any(item.id == "anthropic/claude-opus-4.5" for item in found.result.data)
        ranked = await sdk.rerank.rerank_async(
            model="cohere/rerank-v3.5", query="red fox", documents=["a cat", "a red fox"]
        )
        assert [item.index for item in ranked.results] == [1, 0]
        assert ranked.usage.cost == pytest.approx(0.002)
        image = await sdk.images.generate_async(model="openai/gpt-image-1", prompt="a fox", n=2)
        assert len(image.data) == 2
        parts = [
            item async for item in await sdk.images.generate_async(model="openai/gpt-image-1", prompt="a", stream=True)
        ]
        assert [item.TYPE if hasattr(item, "TYPE") else item.type for item in parts][-1] == "image_generation.completed"
        made = await sdk.embeddings.generate_async(model="openai/text-embedding-3-small", input="x", dimensions=8)
        assert len(made.data[0].embedding) == 8
        heard = await sdk.stt.create_transcription_async(
            model="openai/whisper-1",
            input_audio={"data": base64.b64encode(bytes(32_000)).decode(), "format_": "wav"},
        )
        assert heard.usage.seconds == pytest.approx(1.0, abs=0.01)
        answer = await sdk.responses.send_async(model="openai/gpt-4o", input="Hello")
        assert answer.status == "completed"


async def test_answers_repeat(http, sim):
    """The same request gets the same text."""
    texts = []
    for _ in range(2):
        _, _, raw = await post(http, sim, "chat/completions", "openai/gpt-4o")
        texts.append(json.loads(raw)["choices"])
    assert texts[0] == texts[1]


async def test_chat_stream(sim, client, http):
    """A stream is comments, an empty role chunk, deltas, a finish chunk, one usage chunk and [DONE]."""
    raw, error = await stream(http, sim, "chat/completions", "xenios/sim-n5-b3")
    assert error is None
    assert raw.startswith(b": OPENROUTER PROCESSING\n\n")
    assert raw.endswith(b"data: [DONE]\n\n")
    found = events(raw)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(found) == 1 + 5 + 1 + 1
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 4
    assert len(deltas(raw)) == 15
    async with client.chat.completions.stream(model="xenios/sim-n5-b3", messages=MESSAGES) as chat:
        completion = await chat.get_final_completion()
    assert completion.choices[0].message.content == deltas(raw)


@pytest.mark.parametrize("streamed", [False, True])
async def test_chat_tools(sim, client, streamed):
    """A question about the weather calls the tool with arguments that its schema allows; then it answers."""
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": TOOL}}]
    asked = [{"role": "user", "content": "How is the weather?"}]
    if streamed:
        async with client.chat.completions.stream(model="xenios/sim", messages=asked, tools=tools) as chat:
            answer = await chat.get_final_completion()
    else:
        answer = await client.chat.completions.create(model="xenios/sim", messages=asked, tools=tools)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    jsonschema.validate(json.loads(call.function.arguments), TOOL)
    asked += [
        choice.message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": call.id, "content": "12"},
    ]
    after = await client.chat.completions.create(model="xenios/sim", messages=asked, tools=tools)
    assert after.choices[0].finish_reason == "stop"
    forced = await client.chat.completions.create(
        model="xenios/sim",
        messages=MESSAGES,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )
    assert forced.choices[0].message.tool_calls[0].function.name == "get_weather"


async def test_chat_parse(sim, client):
    """Structured output parses into the model that was asked for, recursion included."""
    answer = await client.chat.completions.parse(model="openai/gpt-4o", messages=MESSAGES, response_format=Person)
    assert isinstance(answer.choices[0].message.parsed, Person)
    loose = await client.chat.completions.create(
        model="openai/gpt-4o", messages=MESSAGES, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(loose.choices[0].message.content), dict)


async def test_chat_options(sim, client):
    """Token limits, several choices, stop words and reasoning do what they say."""
    short = await client.chat.completions.create(model="xenios/sim", messages=MESSAGES, max_tokens=3, n=2)
    assert [choice.finish_reason for choice in short.choices] == ["length", "length"]
    assert short.usage.completion_tokens == 6
    stopped = await client.chat.completions.create(model="xenios/sim", messages=MESSAGES, stop="simulated")
    assert stopped.choices[0].message.content == "This is a "
    thought = await client.chat.completions.create(
        model="xenios/sim", messages=MESSAGES, extra_body={"reasoning": {"effort": "low"}}
    )
    assert thought.choices[0].message.reasoning
    assert thought.usage.completion_tokens_details.reasoning_tokens > 0


async def test_completions(sim, client):
    """The legacy endpoint answers whole and streamed alike."""
    whole = await client.completions.create(model="xenios/sim", prompt="Once upon")
    parts = [
        part async for part in await client.completions.create(model="xenios/sim", prompt="Once upon", stream=True)
    ]
    assert "".join(choice.text for part in parts for choice in part.choices) == whole.choices[0].text


async def test_embeddings(sim, client):
    """Vectors come as floats and as base64, of the size asked, and depend on the text."""
    got = await client.embeddings.create(model="openai/text-embedding-3-small", input=["a", "b"], dimensions=64)
    assert [len(item.embedding) for item in got.data] == [64, 64]
    assert got.data[0].embedding != got.data[1].embedding
    floats = await client.embeddings.create(
        model="openai/text-embedding-3-small", input="a", dimensions=64, encoding_format="float"
    )
    assert floats.data[0].embedding == pytest.approx(got.data[0].embedding, abs=1e-6)


async def test_responses(sim, client):
    """The Responses stream numbers its events without a gap and ends in the object that the whole call returns."""
    whole = await client.responses.create(model="openai/gpt-4o", input="Hello", reasoning={"effort": "low"})
    seen = []
    async with client.responses.stream(model="openai/gpt-4o", input="Hello", reasoning={"effort": "low"}) as got:
        async for item in got:
            seen.append(item)  # noqa: PERF401
        final = await got.get_final_response()
    assert [item.sequence_number for item in seen] == list(range(len(seen)))
    assert seen[0].type == "response.created"
    assert seen[-1].type == "response.completed"
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens > 0


async def test_responses_tools_and_parse(sim, client):
    """The Responses dialect calls tools, parses structured output and refuses to store."""
    tools = [{"type": "function", "name": "get_weather", "parameters": TOOL, "strict": True}]
    async with client.responses.stream(model="openai/gpt-4o", input="weather?", tools=tools) as got:
        final = await got.get_final_response()
    jsonschema.validate(json.loads(final.output[0].arguments), TOOL)
    parsed = await client.responses.parse(model="openai/gpt-4o", input="x", text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
    with pytest.raises(openai.BadRequestError):
        await client.responses.create(model="openai/gpt-4o", input="x", store=True)
    short = await client.responses.create(model="openai/gpt-4o", input="x", max_output_tokens=2)
    assert short.incomplete_details.reason == "max_output_tokens"


async def test_messages(sim, claude):
    """Anthropic's client reads whole and streamed messages, thinking and tool calls."""
    asked = {"model": "anthropic/claude-opus-4.5", "max_tokens": 500, "messages": MESSAGES}
    whole = await claude.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in whole.content] == ["thinking", "text"]
    async with claude.messages.stream(**asked, thinking={"type": "enabled", "budget_tokens": 1024}) as got:
        final = await got.get_final_message()
    assert final.content[1].text == whole.content[1].text
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens
    tools = [{"name": "get_weather", "input_schema": TOOL}]
    async with claude.messages.stream(**asked, tools=tools, tool_choice={"type": "any"}) as got:
        called = await got.get_final_message()
    assert called.stop_reason == "tool_use"
    jsonschema.validate(called.content[0].input, TOOL)
    short = await claude.messages.create(**{**asked, "max_tokens": 2})
    assert short.stop_reason == "max_tokens"
    with pytest.raises(anthropic.RateLimitError) as caught:
        await claude.messages.create(**{**asked, "model": "xenios/sim-fail-429"})
    assert caught.value.body["error"]["type"] == "rate_limit_error"


async def test_messages_structured(http, sim):
    """`output_config` and the older `output_format` give JSON for the schema sent."""
    form = {"type": "json_schema", "schema": TOOL}
    for more in ({"output_config": {"format": form}}, {"output_format": form}):
        _, _, raw = await post(http, sim, "messages", "anthropic/claude-opus-4.5", **more)
        jsonschema.validate(json.loads(json.loads(raw)["content"][0]["text"]), TOOL)


async def test_audio(sim, client):
    """Speech is playable bytes in the format asked; a transcription takes a multipart file."""
    async with client.audio.speech.with_streaming_response.create(
        model="openai/gpt-4o-mini-tts", voice="alloy", input="Hello there", response_format="wav"
    ) as reply:
        sound = await reply.read()
    assert sound.startswith(b"RIFF")
    heard = await client.audio.transcriptions.create(model="openai/whisper-1", file=("hello.wav", sound))
    assert "hello.wav" in heard.text
    assert sim.requests[-1].body["file"]["size"] == len(sound)
    for wanted, kind in (("mp3", "audio/mpeg"), ("pcm", "audio/pcm")):
        async with client.audio.speech.with_streaming_response.create(
            model="openai/gpt-4o-mini-tts", voice="alloy", input="Hi", response_format=wanted
        ) as reply:
            assert reply.headers["content-type"] == kind
            assert await reply.read()


async def test_images_of_openai_client(sim, client):
    """OpenAI's path for images answers a PNG."""
    got = await client.images.generate(model="openai/gpt-image-1", prompt="a fox")
    assert base64.b64decode(got.data[0].b64_json).startswith(b"\x89PNG")


async def test_discovery(http, sim):
    """The model list pages, counts and answers single models; key and credits show what was spent."""

    async def get(path):
        async with http.get(f"{sim.url}/{path}") as reply:
            return reply.status, await reply.json()

    _, everything = await get("models")
    _, page = await get("models?offset=1&limit=2")
    assert page["data"] == everything["data"][1:3]
    assert page["total_count"] == len(everything["data"])
    assert page["links"]["next"]
    _, count = await get("models/count")
    assert count["data"]["count"] == len(everything["data"])
    _, one = await get("model/anthropic/claude-opus-4.5")
    assert one["data"]["expiration_date"] == "2026-11-24"
    assert (await get("models/anthropic/claude-opus-4.5/endpoints"))[0] == 200
    assert (await get("models/no/such"))[0] == 404
    await post(http, sim, "chat/completions", "openai/gpt-4o")
    _, credit = await get("credits")
    assert credit["data"]["total_usage"] > 0
    _, key = await get("key")
    assert key["data"]["usage"] == credit["data"]["total_usage"]


async def test_every_price_is_text():
    """Prices are decimal strings in USD per token, as OpenRouter writes them."""
    for item in (await _models())["data"]:
        for name, price in item["pricing"].items():
            if name != "overrides":
                assert isinstance(price, str)
                float(price)


async def _models():
    async with (
        Simulator() as simulator,
        aiohttp.ClientSession() as session,
        session.get(f"{simulator.url}/models") as reply,
    ):
        return await reply.json()


async def test_long_prompts_cost_their_tier(http, sim):
    """Above 200k prompt tokens Sonnet 4 costs its second price."""
    async with http.post(
        f"{sim.url}/chat/completions",
        json={
            "model": "anthropic/claude-sonnet-4",
            "messages": [{"role": "user", "content": "x" * 1_000_000}],
        },
    ) as reply:
        usage = (await reply.json())["usage"]
    assert usage["cost"] == pytest.approx(250_000 * 6e-6 + usage["completion_tokens"] * 22.5e-6)


async def test_key():
    """With a key set, every other key is refused in OpenRouter's words; both auth headers count."""
    async with Simulator(latency=0, api_key="right") as simulator, aiohttp.ClientSession() as session:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer right"}, 200),
            ({"x-api-key": "right"}, 200),
        ):
            async with session.post(
                f"{simulator.url}/chat/completions",
                json={"model": "xenios/sim", "messages": MESSAGES},
                headers=headers,
            ) as reply:
                assert reply.status == status
                if status == 401:
                    assert (await reply.json())["error"]["code"] == 401


async def test_bad_requests(http, sim):
    """An unknown model and a broken body get OpenRouter's 400."""
    status, _, raw = await post(http, sim, "chat/completions", "no/such-model")
    assert status == 400
    assert json.loads(raw)["error"]["message"] == "no/such-model is not a valid model ID"
    async with http.post(f"{sim.url}/chat/completions", data=b"{") as reply:
        assert reply.status == 400


async def test_models_list_falls_over(http, sim):
    """When `model` fails, the next of `models` answers; /messages has `fallbacks`."""
    _, _, raw = await post(
        http, sim, "chat/completions", "xenios/sim-fail-503", models=["xenios/sim-ctx", "openai/gpt-4o"]
    )
    assert json.loads(raw)["model"] == "openai/gpt-4o"
    _, _, raw = await post(http, sim, "messages", "xenios/sim-fail-503", fallbacks=[{"model": "xenios/sim-b"}])
    assert json.loads(raw)["model"] == "xenios/sim-b"


@pytest.mark.parametrize("path", [*PATHS, "embeddings", "rerank", "images", "audio/speech", "audio/transcriptions"])
async def test_fail(http, sim, path):
    """`fail-N` answers N in the dialect's error shape on each endpoint."""
    status, headers, raw = await post(http, sim, path, "xenios/sim-fail-429")
    assert status == 429
    assert headers["Retry-After"] == "1"
    assert headers["X-RateLimit-Remaining"] == "0"
    assert json.loads(raw)["error"]["message"]
    status, headers, raw = await post(http, sim, path, "xenios/sim-fail-500")
    assert (status, headers.get("Retry-After")) == (500, None)


async def test_refusals(http, sim):
    """Moderation, credit and context errors carry OpenRouter's metadata."""
    _, _, raw = await post(http, sim, "chat/completions", "xenios/sim-fail-403")
    assert json.loads(raw)["error"]["metadata"]["flagged_input"]
    status, _, raw = await post(http, sim, "chat/completions", "xenios/sim-ctx")
    assert (status, json.loads(raw)["error"]["metadata"]["error_type"]) == (400, "context_length_exceeded")
    status, _, raw = await post(http, sim, "chat/completions", "xenios/sim-fail-402")
    assert json.loads(raw)["error"]["code"] == status == 402


@pytest.mark.parametrize("word, expected", [("7", "7"), ("huge", "99999999999"), ("negative", "-30"), ("none", None)])
async def test_retry_after(http, sim, word, expected):
    """`retry-V` chooses the Retry-After header."""
    _, headers, _ = await post(http, sim, "chat/completions", f"xenios/sim-fail-429-retry-{word}")
    assert headers.get("Retry-After") == expected


async def test_retry_after_date(http, sim):
    """`retry-date` sends an HTTP date."""
    _, headers, _ = await post(http, sim, "chat/completions", "xenios/sim-fail-503-retry-date")
    assert email.utils.parsedate_to_datetime(headers["Retry-After"])


async def test_flaky(http, sim):
    """`flaky-25` fails exactly each fourth request."""
    found = [(await post(http, sim, "chat/completions", "xenios/sim-flaky-25"))[0] for _ in range(8)]
    assert found == [200, 200, 200, 503] * 2


@pytest.mark.parametrize("word", ["reset", "close"])
async def test_no_headers(http, sim, word):
    """`reset` and `close` end the connection before any header."""
    with pytest.raises(aiohttp.ClientConnectionError) as caught:
        await post(http, sim, "chat/completions", f"xenios/sim-{word}")
    reset = isinstance(caught.value, ConnectionResetError) or isinstance(caught.value.__cause__, ConnectionResetError)
    assert reset == (word == "reset")


async def test_hang(http, sim):
    """`hang` never answers, and ends when its client leaves."""
    task = asyncio.create_task(post(http, sim, "chat/completions", "xenios/sim-hang"))  # noqa: TID251
    await sim.until(lambda: sim.running == 1)
    task.cancel()
    await sim.until(lambda: sim.running == 0)


async def test_unreadable(http, sim):
    """Half a JSON, HTML, an error with 200, a redirect and a gzip bomb are what they say."""
    status, _, raw = await post(http, sim, "chat/completions", "xenios/sim-badjson")
    assert status == 200
    with pytest.raises(json.JSONDecodeError):
        json.loads(raw)
    _, headers, raw = await post(http, sim, "chat/completions", "xenios/sim-html")
    assert headers["Content-Type"].startswith("text/html")
    status, _, raw = await post(http, sim, "chat/completions", "xenios/sim-err200")
    assert (status, next(iter(json.loads(raw)))) == (200, "error")
    async with http.post(
        f"{sim.url}/chat/completions",
        json=body_for("chat/completions", "xenios/sim-redirect"),
        allow_redirects=False,
    ) as reply:
        assert (reply.status, reply.headers["Location"]) == (307, "/redirected")
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        _, headers, raw = await post(session, sim, "chat/completions", "xenios/sim-gzipbomb")
    assert headers["Content-Encoding"] == "gzip"
    assert len(raw) < 200_000


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("word", ["cutmid", "rstmid"])
async def test_lost_mid_stream(http, sim, path, word):
    """`cutmid` and `rstmid` break a stream after half of its content, and a whole answer in its middle."""
    raw, error = await stream(http, sim, path, f"xenios/sim-n10-{word}")
    assert error is not None
    assert b"[DONE]" not in raw
    assert b"message_stop" not in raw
    assert b"response.completed" not in raw
    assert events(raw)
    with pytest.raises(aiohttp.ClientError):
        await post(http, sim, path, f"xenios/sim-n10-{word}")


@pytest.mark.parametrize("path", PATHS)
async def test_stall(http, sim, path):
    """`stallmid` falls silent after half of the content until its client leaves, who is billed for what was sent."""
    async with http.post(f"{sim.url}/{path}", json=body_for(path, "xenios/sim-n10-b4-stallmid", stream=True)) as reply:
        generation = sim.generations[reply.headers["X-Generation-Id"]]
        await sim.until(lambda: generation.sent == 5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                async for _ in reply.content.iter_any():
                    pass
        reply.close()
    await sim.until(lambda: generation.ended is not None)
    assert generation.cancelled
    assert generation.row()["tokens_completion"] == 5


@pytest.mark.parametrize("path", PATHS)
async def test_error_mid_stream(http, sim, path):
    """`errmid` and `errpre` end in the dialect's error event and no end marker; whole answers hold the error."""
    marks = {"responses": "response.failed", "messages": '"type":"error"'}
    for word, text in (("errmid", True), ("errpre", False)):
        raw, error = await stream(http, sim, path, f"xenios/sim-n4-{word}")
        assert error is None
        assert marks.get(path, '"error":{"code":502').encode() in raw
        assert b"[DONE]" not in raw
        assert (b"This is" in raw) is text
        if path == "responses":
            assert [item["sequence_number"] for item in events(raw)] == list(range(len(events(raw))))
    _, _, whole = await post(http, sim, "chat/completions", "xenios/sim-errmid")
    assert json.loads(whole)["choices"][0]["error"]["code"] == 502


async def test_finish_error(http, sim):
    """`finerr` is a 200 with half of the text, finish reason error, and no charge."""
    _, _, raw = await post(http, sim, "chat/completions", "xenios/sim-finerr")
    whole = json.loads(raw)
    assert whole["choices"][0]["finish_reason"] == "error"
    assert whole["usage"]["cost"] == 0
    raw, _ = await stream(http, sim, "chat/completions", "xenios/sim-finerr")
    assert events(raw)[-2]["choices"][0]["finish_reason"] == "error"
    assert raw.endswith(b"data: [DONE]\n\n")
    assert deltas(raw) == whole["choices"][0]["message"]["content"]
    raw, _ = await stream(http, sim, "responses", "xenios/sim-finerr")
    assert events(raw)[-1]["type"] == "response.failed"
    assert [item["sequence_number"] for item in events(raw)] == list(range(len(events(raw))))


@pytest.mark.parametrize(
    "path, mark",
    [
        *((path, b"data: [DONE]") for path in PATHS[:2]),
        ("responses", b"response.completed"),
        ("messages", b"message_stop"),
    ],
)
async def test_no_end(http, sim, path, mark):
    """`nodone` leaves out the end marker, `nofinish` the finish reason, `afterdone` goes on behind the end."""
    raw, _ = await stream(http, sim, path, "xenios/sim")
    assert mark in raw
    raw, _ = await stream(http, sim, path, "xenios/sim-nodone")
    assert mark not in raw
    raw, _ = await stream(http, sim, path, "xenios/sim-nofinish")
    assert b'"stop"' not in raw
    assert b"end_turn" not in raw
    assert b"response.completed" not in raw
    raw, _ = await stream(http, sim, path, "xenios/sim-afterdone")
    assert not raw.endswith((b"data: [DONE]\n\n", b'"message_stop"}\n\n'))


async def test_usage_words(http, sim):
    """`nousage`, `negusage`, `absusage` and `empty` mar the usage, streamed and not."""
    for word, tokens in (("nousage", None), ("negusage", -7), ("absusage", 10**15), ("empty", 0)):
        _, _, raw = await post(http, sim, "chat/completions", f"xenios/sim-{word}")
        assert json.loads(raw).get("usage", {}).get("completion_tokens") == tokens
        raw, _ = await stream(http, sim, "chat/completions", f"xenios/sim-{word}")
        assert next((item["usage"]["completion_tokens"] for item in events(raw) if "usage" in item), None) == tokens
    assert deltas(raw) == ""
    for path in ("responses", "messages"):
        raw, _ = await stream(http, sim, path, "xenios/sim-empty")
        assert not [item for item in events(raw) if "delta" in item and "text" in str(item.get("delta"))]


async def test_framing_words(http, sim):
    """`split`, `cr` and `bigline` vary the bytes of a stream, not its meaning."""
    raw, _ = await stream(http, sim, "chat/completions", "xenios/sim-split")
    assert deltas(raw).startswith("Größe 日本語")
    raw, _ = await stream(http, sim, "chat/completions", "xenios/sim-cr")
    assert b"\n" not in raw
    assert b"data: [DONE]\r\r" in raw
    raw, _ = await stream(http, sim, "chat/completions", "xenios/sim-bigline", max_tokens=10**9)
    assert len(raw) > 10 * 1024 * 1024


async def test_times(http, sim):
    """`tN`, `dN` and `slowpre-N` are milliseconds."""
    loop = asyncio.get_running_loop()

    async def first_and_last(model):
        began, seen = loop.time(), []
        body = body_for("chat/completions", model, stream=True)
        async with http.post(f"{sim.url}/chat/completions", json=body) as reply:
            async for line in reply.content:
                seen += [loop.time() - began] if b'"content":"T' in line or not seen else []
        return seen[0], seen[-1], loop.time() - began

    first, _, _ = await first_and_last("xenios/sim-t100")
    assert first >= 0.1
    _, _, total = await first_and_last("xenios/sim-n5-d20")
    assert total >= 0.08
    first, content, _ = await first_and_last("xenios/sim-slowpre-120")
    assert first < 0.1 <= 0.12 <= content


async def test_leaving_cancels(http, sim):
    """A client that leaves a stream ends its generation at once and is billed for what was sent."""
    body = body_for("chat/completions", "xenios/sim-n1000-d5", stream=True)
    async with http.post(f"{sim.url}/chat/completions", json=body) as reply:
        generation = sim.generations[reply.headers["X-Generation-Id"]]
        await sim.until(lambda: generation.sent >= 3)
        reply.close()
    await sim.until(lambda: sim.running == 0, within=1)
    assert generation.cancelled
    async with http.get(f"{sim.url}/generation", params={"id": generation.id}) as reply:
        row = (await reply.json())["data"]
    assert row["cancelled"] is True
    assert 0 < row["total_cost"] < generation.usage.cost


async def test_speech_faults(http, sim):
    """Binary answers break in their middle as streams do."""
    for word in ("cutmid", "rstmid"):
        with pytest.raises(aiohttp.ClientError):
            await post(http, sim, "audio/speech", f"xenios/sim-{word}", input="Hello there")


async def test_requests_are_remembered(http, sim):
    """The simulator keeps what it saw: method, path, headers, body; not more than a thousand."""
    await post(http, sim, "chat/completions", "xenios/sim")
    seen = sim.requests[-1]
    assert (seen.method, seen.path) == ("POST", "/api/v1/chat/completions")
    assert seen.body["model"] == "xenios/sim"
    assert json.loads(seen.raw) == seen.body
    assert sim.requests.maxlen == 1000


async def test_close_with_open_streams():
    """Closing the simulator doesn't wait for streams that hang."""
    simulator = Simulator(latency=0)
    await simulator.start()
    async with aiohttp.ClientSession() as session:
        task = asyncio.create_task(post(session, simulator, "chat/completions", "xenios/sim-hang"))  # noqa: TID251
        await simulator.until(lambda: simulator.running == 1)
        async with asyncio.timeout(3):
            await simulator.close()
        with contextlib.suppress(aiohttp.ClientError):
            await task


@pytest.mark.parametrize(
    "schema",
    [
        TOOL,
        Person.model_json_schema(),
        {"type": "string", "pattern": "^[A-Z]{3}-\\d{4}$"},
        {"type": "string", "pattern": "^(foo|bar)[0-9]+\\.txt$"},
        {"type": "string", "format": "uuid"},
        {"type": "string", "maxLength": 2},
        {"type": ["null", "integer"], "exclusiveMinimum": 5, "multipleOf": 4},
        {"type": "number", "maximum": -1.5},
        {"type": "array", "items": {"type": "string"}, "minItems": 3, "uniqueItems": True},
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
        {
            "allOf": [
                {"properties": {"a": {"const": 1}}, "required": ["a"]},
                {"properties": {"b": {"type": "null"}}, "required": ["b"]},
            ]
        },
        {"anyOf": [{"$ref": "#/$defs/x"}, {"type": "null"}], "$defs": {"x": {"type": "boolean"}}},
        {
            "type": "object",
            "required": ["loop"],
            "properties": {"loop": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        },
        {},
    ],
)
def test_instances_satisfy_their_schema(schema):
    """What stands for a model's structured output validates against the schema that was sent."""
    jsonschema.validate(instance(schema), schema)


def test_speech_is_sound():
    """PCM is 16-bit samples that aren't silence."""
    from gateway.simulator.answers import Answer, Ask, Usage
    from gateway.simulator.media import speech_whole
    from gateway.simulator.shapes import Reply

    raw, _ = speech_whole(Reply("gen-1", 0, "m", Ask({}, "Hello", 5), Answer(Usage())))
    samples = struct.unpack(f"<{len(raw) // 2}h", raw)
    assert max(samples) > 5000


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": {}},
        {"type": "array", "minItems": "x"},
        {"$ref": "#/no"},
        {"properties": []},
        {"minLength": 10**12},
    ],
)
def test_odd_schemas_are_survived(schema):
    """A schema that makes no sense, or asks for terabytes, still gets an answer."""
    assert len(json.dumps(instance(schema))) < 20_000


async def test_odd_requests(http, sim):
    """Fields of the wrong type don't break the simulator."""
    odd = {
        "tools": [1, {"function": 2}],
        "tool_choice": [],
        "n": "x",
        "stop": 3,
        "response_format": [],
        "reasoning": 1,
    }
    for path in PATHS:
        status, _, _ = await post(http, sim, path, "xenios/sim", **odd, text=[], output_config=1, thinking=[])
        assert status == 200
    status, _, _ = await post(http, sim, "rerank", "xenios/sim", query=1, documents="x", top_n="y")
    assert status == 200
