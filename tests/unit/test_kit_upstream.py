"""The scripted upstream shows on the wire exactly what its script says."""

import asyncio
import gzip
import json
import zlib
from contextlib import asynccontextmanager

import aiohttp
import anthropic
import openai
import openrouter
import pytest

from gateway.kit.upstream import (
    COMMENT,
    MODEL,
    SPEECH,
    Answer,
    BadGzip,
    Body,
    Close,
    Cut,
    Error,
    Gzip,
    Hang,
    Json,
    Pause,
    Raw,
    Redirect,
    Reset,
    ScriptedUpstream,
    Slow,
    Split,
    Stream,
    Until,
    chat_completion,
    chat_error,
    chat_events,
    chat_usage,
    completion_events,
    encode_step,
    generation,
    message_error,
    message_events,
    models,
    response_events,
    response_failed,
    tool_call,
    tool_call_events,
)

CHAT = {"model": "a/model", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
async def upstream():
    async with ScriptedUpstream() as started:
        yield started


@pytest.fixture
async def http():
    async with aiohttp.ClientSession() as session:
        yield session


def request(path="/v1/chat/completions", body=b"{}", headers=()):
    lines = [f"POST {path} HTTP/1.1", "Host: upstream", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@asynccontextmanager
async def raw(upstream):
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def reply(upstream, sent=None):
    """All bytes until the upstream closes."""
    async with raw(upstream) as (reader, writer):
        writer.write(sent or request())
        return await asyncio.wait_for(reader.read(), 5)


def closing(body=b"{}"):
    return request(body=body, headers=["Connection: close"])


def openai_client(upstream):
    return openai.AsyncOpenAI(base_url=upstream.url, api_key="sk-test", max_retries=0)


def anthropic_client(upstream):
    url = upstream.url.removesuffix("/v1")
    return anthropic.AsyncAnthropic(base_url=url, api_key="sk-test", max_retries=0)


class TestScript:
    async def test_order(self, upstream, http):
        """Answers come in order, then the default."""
        upstream.script(Json({"n": 1}), lambda seen: Json({"asked": seen.model}, 201))
        got = []
        for _ in range(3):
            async with http.post(f"{upstream.url}/chat/completions", json=CHAT) as response:
                got.append((response.status, await response.json()))
        assert got[:2] == [(200, {"n": 1}), (201, {"asked": "a/model"})]
        assert got[2][1]["choices"][0]["message"]["content"] == "Hello there"

    async def test_by_model(self, upstream, http):
        """Answers for a model come first, in JSON bodies and forms; the last repeats; setting replaces."""
        upstream.script(Json("queue"))
        upstream.on("a/model", Json(1), Json(2))
        got = []

        async def ask(**kwargs):
            async with http.post(f"{upstream.url}/audio/transcriptions", **kwargs) as response:
                got.append(await response.json())

        form = aiohttp.FormData()
        form.add_field("model", "a/model")
        form.add_field("file", b"RIFF", filename="a.wav")
        await ask(json=CHAT)
        await ask(data=form)
        await ask(json=CHAT)
        await ask(json={"model": "other"})
        upstream.on("a/model", Json(3))
        await ask(json=CHAT)
        assert got == [1, 2, 2, "queue", 3]
        assert [seen.model for seen in upstream.seen] == ["a/model", "a/model", "a/model", "other", "a/model"]

    async def test_broken_script_fails_the_test(self, http):
        """A script that raises gives 500 and fails the test that wrote it."""
        with pytest.raises(ExceptionGroup) as failed:
            async with (
                ScriptedUpstream(lambda seen: seen.nonsense) as upstream,
                http.post(upstream.url) as response,
            ):
                assert response.status == 500
        assert isinstance(failed.value.exceptions[0], AttributeError)

    async def test_function_without_an_answer(self, http):
        """A function that returns no answer is named."""
        with pytest.raises(ExceptionGroup) as failed:
            async with ScriptedUpstream(lambda seen: {}) as upstream, http.post(upstream.url) as response:
                assert "which is no Answer" in await response.text()
        assert isinstance(failed.value.exceptions[0], TypeError)

    async def test_wrong_answers_are_refused(self, upstream):
        """What is no answer is refused where the script is written."""
        with pytest.raises(TypeError, match=r"Json\({'a': 1}\)"):
            upstream.script({"a": 1})
        with pytest.raises(ValueError, match="no answers"):
            upstream.on("a/model")

    async def test_own_answer(self, upstream):
        """A plugin author can write an answer of their own."""

        class Teapot(Answer):
            async def send(self, wire, seen):
                await wire.write(b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 0\r\n\r\n")
                return await wire.end("cut")

        upstream.script(Teapot())
        assert (await reply(upstream)).startswith(b"HTTP/1.1 418")


class TestSeen:
    async def test_request_as_sent(self, upstream):
        """The request is seen as it was sent: path, query, headers in order and case, body."""
        sent = request("/api/v1/chat/completions?a=b", b'{"model":"m","stream":true}', ["X-A: 1", "x-a: 2"])
        async with raw(upstream) as (_, writer):
            writer.write(sent)
            seen = await upstream.wait_seen(1)
        assert (seen.method, seen.path, seen.query) == ("POST", "/api/v1/chat/completions", "a=b")
        assert seen.endpoint == "chat/completions"
        assert tuple(name for name, _ in seen.headers.raw if name != "Content-Length") == (
            "Host",
            "X-A",
            "x-a",
        )
        assert (
            seen.headers.getall("X-a"),
            seen.headers["X-A"],
            "HOST" in seen.headers,
            "cookie" in seen.headers,
        ) == (["1", "2"], "1", True, False)
        assert {"host", "content-length", "x-a"} == set(seen.headers)
        assert (len(seen.headers), seen.headers.get("cookie")) == (3, None)
        assert (seen.json, seen.model, seen.stream) == ({"model": "m", "stream": True}, "m", True)

    async def test_chunked_body(self, upstream, http):
        """A chunked request body is put together."""

        async def body():
            yield b'{"model":'
            yield b'"m"}'

        async with http.post(f"{upstream.url}/chat/completions", data=body()):
            assert upstream.seen[0].json == {"model": "m"}

    async def test_trailers(self, upstream):
        """Trailers behind a chunked body are read over, so that the next request is found."""
        head = b"POST /v1/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        await reply(upstream, head + b"3;a=b\r\nabc\r\n0\r\nX-A: 1\r\n\r\n" + closing())
        assert [seen.body for seen in upstream.seen] == [b"abc", b"{}"]

    async def test_half_a_request(self, upstream):
        """A client that leaves within its request was never seen."""
        async with raw(upstream) as (_, writer):
            await upstream.wait_connections(1)
            writer.write(b"POST / HTTP/1.1\r\nHo")
        await upstream.wait_connections(0)
        assert (upstream.seen, upstream.malformed) == ([], [])

    async def test_not_json(self, upstream, http):
        """A body that isn't JSON has no JSON and no model."""
        async with http.post(f"{upstream.url}/x", data=b"\xff{") as response:
            assert response.status == 404
        assert (upstream.seen[0].json, upstream.seen[0].model, upstream.seen[0].stream) == (None, None, False)

    async def test_keep_alive(self, upstream, http):
        """One connection serves requests one after the other; parallel ones get their own."""
        for _ in range(20):
            async with http.post(f"{upstream.url}/chat/completions", json=CHAT) as response:
                await response.read()
        assert ({1}, 1, 1) == (
            {seen.connection for seen in upstream.seen},
            upstream.connections,
            upstream.total_connections,
        )

        async def ask():
            async with http.post(f"{upstream.url}/chat/completions", json={**CHAT, "stream": True}) as response:
                assert (await response.read()).endswith(b"data: [DONE]\n\n")

        await asyncio.gather(*(ask() for _ in range(50)))
        assert len(upstream.seen) == 70
        assert upstream.total_connections <= 51
        assert all(seen.finished.is_set() and not seen.closed.is_set() for seen in upstream.seen)

    async def test_pipelined(self, upstream):
        """Two requests in one packet are answered one after the other."""
        upstream.script(Json(1), Json(2))
        got = await reply(upstream, request() + closing())
        assert [part[:1] for part in got.split(b"\r\n\r\n")[1:]] == [b"1", b"2"]

    async def test_expect_continue(self, upstream, http):
        """A client that waits for 100 Continue gets it."""
        async with http.post(f"{upstream.url}/chat/completions", json=CHAT, expect100=True) as response:
            assert response.status == 200

    @pytest.mark.parametrize(
        "sent",
        [
            b"nonsense\r\n\r\n",
            request(headers=["Content-Length: 3"]),
            request(headers=["Transfer-Encoding: chunked"]),
            b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
            b"POST / HTTP/1.1\r\nA : b\r\n\r\n",
            b"POST / HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
            b"POST / HTTP/1.1\r\nA: b\nB: c\r\n\r\n",
            b"POST / HTTP/1.1\r\nA: " + b"a" * 300_000 + b"\r\n\r\n",
        ],
    )
    async def test_malformed(self, upstream, sent):
        """What no correct client sends is refused and noted, never guessed at."""
        assert b" 400 " in await reply(upstream, sent)
        assert (len(upstream.malformed), upstream.seen) == (1, [])

    async def test_waits_say_what_they_missed(self, upstream):
        """A wait that fails says what it waited for and what there was."""
        with pytest.raises(TimeoutError, match=r"request 1 did not come within 0.01 s \(0 requests"):
            await upstream.wait_seen(1, timeout=0.01)


class TestLeaving:
    @pytest.mark.parametrize(
        "script",
        [
            Hang(),
            Slow(Json(1), 60),
            Json(1, delay=60),
            Stream("one", end="hang"),
            Stream("one", Pause(60)),
            Stream("one", Until(asyncio.Event())),
            Raw(b"HTTP/1.1 200", Pause(60)),
            Cut(Json([1, 2]), 1, "hang"),
        ],
        ids=lambda script: type(script).__name__,
    )
    async def test_client_leaves(self, upstream, script):
        """A client that leaves in the middle of any answer is noticed at once, and when."""
        upstream.script(script)
        async with raw(upstream) as (_, writer):
            writer.write(request())
            seen = await upstream.wait_seen(1)
            assert not seen.closed.is_set()
        await upstream.wait_closed(seen, 1)
        assert seen.started <= seen.closed_at < seen.started + 5
        assert not seen.finished.is_set()
        await upstream.wait_connections(0, 1)

    async def test_reset_by_client(self, upstream):
        """A client that resets the connection has left too."""
        upstream.script(Hang())
        async with raw(upstream) as (_, writer):
            writer.write(request())
            seen = await upstream.wait_seen(1)
            writer.transport.abort()
        await upstream.wait_closed(seen, 1)

    async def test_client_that_stopped_reading_leaves(self, upstream):
        """A stream stands still when its reader does, and is closed, not finished, when that one goes."""
        upstream.script(Stream(*[b"x" * 1_000_000] * 64))
        async with raw(upstream) as (_, writer):
            writer.transport.pause_reading()
            writer.write(request())
            seen = await upstream.wait_seen(1)
        await upstream.wait_closed(seen, 2)
        assert not seen.finished.is_set()

    async def test_left_before_the_answer(self, upstream):
        """A client that only ends its sending side counts as gone, as soon as its request is read."""
        upstream.script(Hang())
        async with raw(upstream) as (_, writer):
            writer.write(request())
            writer.write_eof()
            seen = await upstream.wait_seen(1)
            await upstream.wait_closed(seen)

    async def test_leaving_later_is_no_close(self, upstream):
        """A client that leaves after its answer has closed nothing."""
        async with raw(upstream) as (reader, writer):
            writer.write(request(path="/v1/chat/completions"))
            await reader.readuntil(b"\r\n\r\n")
            seen = await upstream.wait_seen(1)
            await upstream.wait_finished(seen)
        await upstream.wait_connections(0)
        assert not seen.closed.is_set()

    async def test_close_is_quick(self):
        """The upstream closes at once with answers in progress, which their client did not leave."""
        upstream = ScriptedUpstream(default=Hang())
        await upstream.start()
        async with raw(upstream) as (reader, writer):
            writer.write(request())
            seen = await upstream.wait_seen(1)
            async with asyncio.timeout(1):
                await upstream.close()
                assert await reader.read() == b""
        assert (seen.closed.is_set(), upstream.connections) == (False, 0)
        await upstream.close()

    async def test_port_refuses_and_opens_again(self, upstream, http):
        """A closed upstream refuses connections; started again it has the same address."""
        url = upstream.url
        await upstream.close()
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.post(url)
        await upstream.start()
        async with http.get(f"{url}/models") as response:
            assert response.status == 200
        with pytest.raises(RuntimeError, match="already"):
            await upstream.start()


class TestAnswers:
    async def test_json(self, upstream):
        """A JSON answer is head and body, exactly."""
        upstream.script(Json({"a": "é"}, 201, {"X-A": "1"}))
        head = b"HTTP/1.1 201 Created\r\nContent-Length: 10\r\nContent-Type: application/json\r\nX-A: 1\r\n"
        assert head + b"Connection: close\r\n\r\n" + '{"a":"é"}'.encode() == await reply(upstream, closing())

    async def test_headers_twice_and_overridden(self, upstream):
        """A header may be sent twice, and what would be set by itself may be overridden, even to lie."""
        own = [("Set-Cookie", "a"), ("Set-Cookie", "b"), ("content-length", "1"), ("content-type", "text/x")]
        upstream.script(Json(12, headers=own))
        got = await reply(upstream, closing())
        head = b"Set-Cookie: a\r\nSet-Cookie: b\r\ncontent-length: 1\r\ncontent-type: text/x\r\n"
        assert b"HTTP/1.1 200 OK\r\n" + head + b"Connection: close\r\n\r\n12" == got

    async def test_body(self, upstream, http):
        """Any body with any type, such as HTML with status 200."""
        upstream.script(Body(b"<html>", "text/html", delay=0.01))
        async with http.post(upstream.url) as response:
            assert (
                response.status,
                response.content_type,
                await response.read(),
            ) == (200, "text/html", b"<html>")

    async def test_errors(self, upstream, http):
        """Errors have OpenRouter's shape, Anthropic's on /messages, or the test's own body."""
        reasons = {"reasons": ["violence"], "error_type": "content_policy_violation"}
        upstream.script(
            Error(429, headers={"Retry-After": "3"}),
            Error(403, message="Flagged", metadata=reasons),
            Error(529),
            Error(502, "<h1>Bad gateway</h1>"),
            Error(500, {"detail": "x"}, delay=0.01),
        )
        got = []
        for path in ("chat/completions", "chat/completions", "messages", "embeddings", "embeddings"):
            async with http.post(f"{upstream.url}/{path}") as response:
                got.append((response.status, response.headers.get("Retry-After"), await response.text()))
        rate = {
            "code": 429,
            "message": "Scripted error 429",
            "metadata": {"error_type": "rate_limit_exceeded"},
        }
        overloaded = {
            "type": "overloaded_error",
            "message": "Scripted error 529",
            "error_type": "provider_overloaded",
        }
        assert (429, "3", {"error": rate}) == (*got[0][:2], json.loads(got[0][2]))
        assert {"error": {"code": 403, "message": "Flagged", "metadata": reasons}} == json.loads(got[1][2])
        assert {"type": "error", "error": overloaded, "request_id": None} == json.loads(got[2][2])
        assert got[3] == (502, None, "<h1>Bad gateway</h1>")
        assert got[4] == (500, None, '{"detail":"x"}')

    async def test_redirect(self, upstream, http):
        upstream.script(Redirect("http://127.0.0.1:1/"))
        async with http.post(upstream.url, allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (307, "http://127.0.0.1:1/")

    async def test_gzip(self, upstream, http):
        """A whole answer and a stream can be compressed; the stream's events still come one by one."""
        more = asyncio.Event()
        upstream.script(Gzip(Json({"a": 1})), Gzip(Stream("one", Until(more), "two")), BadGzip())
        async with http.post(upstream.url) as response:
            assert (response.headers["Content-Encoding"], await response.json()) == ("gzip", {"a": 1})
        async with http.post(upstream.url) as response:
            assert await response.content.readany() == b"data: one\n\n"
            more.set()
            assert await response.read() == b"data: two\n\n"
        async with http.post(upstream.url) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()

    async def test_gzip_bytes(self, upstream):
        """What is sent as gzip is whole gzip."""
        upstream.script(Gzip(Json({"a": 1})), Gzip(Stream("one", "two", chunked=False)))
        _, _, body = (await reply(upstream, closing())).partition(b"\r\n\r\n")
        assert gzip.decompress(body) == b'{"a":1}'
        _, _, body = (await reply(upstream)).partition(b"\r\n\r\n")
        assert zlib.decompress(body, wbits=31) == b"data: one\n\ndata: two\n\n"

    async def test_cut(self, upstream):
        """A whole answer can lose the end of its body."""
        upstream.script(Cut(Json([1, 2, 3]), 3), Cut(Json([1, 2, 3]), 3, "reset"))
        got = await reply(upstream)
        assert b"Content-Length: 7\r\n" in got
        assert got.endswith(b"\r\n\r\n[1,")
        assert upstream.seen[0].finished.is_set()
        with pytest.raises(ConnectionResetError):
            await reply(upstream)

    async def test_before_the_head(self, upstream):
        """A connection can be closed or reset instead of an answer."""
        upstream.script(Close(), Reset())
        assert await reply(upstream) == b""
        with pytest.raises(ConnectionResetError):
            await reply(upstream)
        assert all(seen.finished.is_set() and not seen.closed.is_set() for seen in upstream.seen)

    async def test_slow(self, upstream, http):
        upstream.script(Slow(Json(1), 0.05), Json(2, delay=0.05))
        loop = asyncio.get_running_loop()
        for _ in range(2):
            begun = loop.time()
            async with http.post(upstream.url):
                assert loop.time() - begun >= 0.05

    async def test_raw(self, upstream):
        """Raw answers are sent byte by byte as written, and may keep the connection for another."""
        one = b"HTTP/1.1 200 OK\r\ncontent-length:1\r\n\r\na"
        upstream.script(Raw(one, end="clean"), Raw(one[:20], Pause(0.01), one[20:]))
        assert one + one == await reply(upstream, request() + request())


class TestStream:
    async def test_bytes_on_the_wire(self, upstream):
        """Each step is one chunk: bytes as they are, text and JSON as events."""
        upstream.script(Stream(COMMENT, "a\nb", {"é": 1}, "[DONE]", headers={"X-A": "1"}))
        head, _, body = (await reply(upstream, closing())).partition(b"\r\n\r\n")
        assert head.split(b"\r\n") == [
            b"HTTP/1.1 200 OK",
            b"Content-Type: text/event-stream",
            b"Cache-Control: no-cache",
            b"Transfer-Encoding: chunked",
            b"X-A: 1",
            b"Connection: close",
        ]
        chunks = [COMMENT, b"data: a\ndata: b\n\n", 'data: {"é":1}\n\n'.encode(), b"data: [DONE]\n\n"]
        assert b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n" == body

    async def test_step_by_step(self, upstream, http):
        """A test decides when the next event comes."""
        more = asyncio.Event()
        upstream.script(Stream("one", Until(more), "two"))
        async with http.post(upstream.url) as response:
            assert await response.content.readany() == b"data: one\n\n"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(response.content.readany(), 0.02)
            more.set()
            assert await response.content.readany() == b"data: two\n\n"
        await upstream.wait_finished(upstream.seen[0])

    async def test_split(self, upstream):
        """One event comes in several reads, cut where the test says, inside a character too."""
        data = {"c": "é"}
        at = encode_step(data).index("é".encode()) + 1
        upstream.script(Stream(Split(data, at=[at, -1]), Split(b"abcd", every=2), chunked=False, end="eof"))
        got = []
        async with raw(upstream) as (reader, writer):
            writer.write(request())
            await reader.readuntil(b"\r\n\r\n")
            while piece := await reader.read(1000):
                got.append(piece)
        whole = encode_step(data)
        assert [whole[:at], whole[at:-1], whole[-1:], b"ab", b"cd"] == got

    @pytest.mark.parametrize("end", ["clean", "cut", "reset"])
    async def test_ends(self, upstream, end):
        """A stream ends by its framing, by FIN without it, or by RST."""
        upstream.script(Stream("one", end=end))
        got = b""
        async with raw(upstream) as (reader, writer):
            writer.write(closing() if end == "clean" else request())
            try:
                while piece := await reader.read(1000):
                    got += piece
            except ConnectionResetError:
                assert end == "reset"
            else:
                assert end != "reset"
        assert got.endswith(b"b\r\ndata: one\n\n\r\n0\r\n\r\n" if end == "clean" else b"b\r\ndata: one\n\n\r\n")
        assert upstream.seen[0].finished.is_set()

    @pytest.mark.parametrize("end", ["cut", "reset"])
    async def test_client_sees_truncation(self, upstream, http, end):
        """An HTTP client takes neither a cut nor a reset for an end."""
        upstream.script(Stream("one", end=end))
        async with http.post(upstream.url) as response:
            with pytest.raises((aiohttp.ClientPayloadError, ConnectionResetError)):
                while await response.content.readany():
                    pass

    async def test_hang(self, upstream):
        """A stream that hangs stays open and silent."""
        upstream.script(Stream("one", end="hang"))
        async with raw(upstream) as (reader, writer):
            writer.write(request())
            await reader.readuntil(b"data: one\n\n\r\n")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.05)
            assert not upstream.seen[0].finished.is_set()

    async def test_close_delimited(self, upstream):
        """Without chunks the close of the connection ends the body; an HTTP/1.0 client always gets that."""
        upstream.script(Stream("one", chunked=False, end="eof"), Stream("one"))
        for sent in (request(), b"POST / HTTP/1.0\r\n\r\n"):
            head, _, body = (await reply(upstream, sent)).partition(b"\r\n\r\n")
            assert (body, b"chunked" in head) == (b"data: one\n\n", False)
            assert b"Connection: close" in head

    async def test_cut_body_of_known_length(self, upstream, http):
        """A download that announced its length can be cut."""
        head = {"Content-Length": "100"}
        upstream.script(Stream(b"abc", chunked=False, headers=head, content_type="audio/mpeg", end="cut"))
        async with http.post(upstream.url) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()


class TestOpenAI:
    async def test_chat(self, upstream):
        """OpenAI's SDK reads the default chat completion and its stream."""
        async with openai_client(upstream) as client:
            whole = await client.chat.completions.create(**CHAT)
            assert (
                whole.choices[0].message.content,
                whole.choices[0].finish_reason,
            ) == ("Hello there", "stop")
            assert (whole.model, whole.usage.total_tokens) == ("a/model", 15)
            stream = await client.chat.completions.create(**CHAT, stream=True)
            chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == "Hello there"
        assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 15)
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert len({chunk.id for chunk in chunks}) == 1

    async def test_tool_calls(self, upstream):
        """OpenAI's SDK reads a tool call whole, in pieces, and in one delta."""
        upstream.script(
            Json(chat_completion(None, finish="tool_calls", tool_calls=[tool_call()])),
            Stream(*tool_call_events()),
            Stream(*tool_call_events(pieces=1)),
        )
        async with openai_client(upstream) as client:
            whole = await client.chat.completions.create(**CHAT)
            assert whole.choices[0].message.tool_calls[0].function.arguments == '{"city":"Paris"}'
            for _ in range(2):
                async with client.chat.completions.stream(**CHAT) as stream:
                    final = await stream.get_final_completion()
                call = final.choices[0].message.tool_calls[0]
                assert (call.function.name, call.function.arguments) == ("get_weather", '{"city":"Paris"}')
                assert final.choices[0].finish_reason == "tool_calls"

    async def test_completions(self, upstream):
        """OpenAI's SDK reads text completions."""
        ask = {"model": "m", "prompt": "Hi"}
        async with openai_client(upstream) as client:
            whole = await client.completions.create(**ask)
            assert (whole.choices[0].text, whole.usage.total_tokens) == ("Hello there", 15)
            chunks = [chunk async for chunk in await client.completions.create(**ask, stream=True)]
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "Hello there"

    async def test_responses(self, upstream):
        """OpenAI's SDK reads a response, and puts one together from its events."""
        ask = {"model": "m", "input": "Hi", "store": False}
        async with openai_client(upstream) as client:
            whole = await client.responses.create(**ask)
            assert (
                whole.output_text,
                whole.usage.total_tokens,
                whole.status,
            ) == ("Hello there", 15, "completed")
            async with client.responses.stream(**ask) as stream:
                events = [event async for event in stream]
                final = await stream.get_final_response()
            with pytest.raises(openai.BadRequestError, match="stateless"):
                await client.responses.create(**{**ask, "store": True})
        assert (final.output_text, final.usage.total_tokens) == ("Hello there", 15)
        assert list(range(len(events))) == [event.sequence_number for event in events]
        assert (events[0].type, events[-1].type) == ("response.created", "response.completed")

    async def test_the_rest(self, upstream):
        """OpenAI's SDK reads embeddings, images, speech and transcriptions."""
        async with openai_client(upstream) as client:
            embedded = await client.embeddings.create(model="m", input=["a", "b"])
            floats = await client.embeddings.create(model="m", input="a", encoding_format="float", dimensions=2)
            image = await client.images.generate(model="m", prompt="a dot", n=2)
            speech = await client.audio.speech.create(model="m", voice="alloy", input="Hi")
            text = await client.audio.transcriptions.create(model="m", file=("a.wav", b"RIFF"))
        assert [item.embedding for item in embedded.data] == [
            [1.0, 0.25, 0.25, 0.25],
            [0.25, 1.0, 0.25, 0.25],
        ]
        assert (floats.data[0].embedding, floats.usage.total_tokens) == ([1.0, 0.25], 5)
        assert len(image.data) == 2
        assert speech.content == SPEECH
        assert (text.text, upstream.seen[-1].model) == ("Hello there", "m")

    async def test_errors_in_streams(self, upstream):
        """A stream's error reaches OpenAI's SDK in both dialects."""
        upstream.script(
            Stream(*chat_events(finish=None, usage=False, done=False), chat_error()),
            Stream(*response_events(finish=None), response_failed(10)),
        )
        async with openai_client(upstream) as client:
            with pytest.raises(openai.APIError, match="Provider disconnected"):
                [chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)]
            stream = await client.responses.create(model="m", input="Hi", stream=True)
            events = [event async for event in stream]
        assert (events[-1].type, events[-1].response.error.code) == ("response.failed", "server_error")

    async def test_http_errors(self, upstream):
        """An HTTP error is the SDK's error of that status."""
        upstream.script(Error(429), Error(503))
        async with openai_client(upstream) as client:
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(**CHAT)
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(**CHAT)


class TestAnthropic:
    async def test_messages(self, upstream):
        """Anthropic's SDK reads a message, and puts one together from its events."""
        ask = {**CHAT, "max_tokens": 10}
        async with anthropic_client(upstream) as client:
            whole = await client.messages.create(**ask)
            assert (whole.content[0].text, whole.stop_reason) == ("Hello there", "end_turn")
            async with client.messages.stream(**ask) as stream:
                final = await stream.get_final_message()
        assert (
            final.content[0].text,
            final.stop_reason,
            final.model,
        ) == ("Hello there", "end_turn", "a/model")
        assert (final.usage.input_tokens, final.usage.output_tokens) == (10, 5)
        assert upstream.seen[0].path == "/v1/messages"

    async def test_error_in_stream(self, upstream):
        """A stream's error event reaches Anthropic's SDK."""
        upstream.script(Stream(*message_events(finish=None, done=False), message_error()))
        async with anthropic_client(upstream) as client:
            with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
                async with client.messages.stream(**CHAT, max_tokens=10) as stream:
                    await stream.get_final_message()

    async def test_http_error(self, upstream):
        upstream.script(Error(429))
        async with anthropic_client(upstream) as client:
            with pytest.raises(anthropic.RateLimitError):
                await client.messages.create(**CHAT, max_tokens=10)


class TestOpenRouter:
    async def test_sdk(self, upstream):
        """OpenRouter's own SDK, which validates every field, reads what the default answers."""
        async with openrouter.OpenRouter(api_key="sk-test", server_url=upstream.url) as client:
            messages = CHAT["messages"]
            whole = await client.chat.send_async(model="m", messages=messages)
            stream = await client.chat.send_async(model="m", messages=messages, stream=True)
            chunks = [chunk async for chunk in stream]
            response = await client.responses.send_async(model="m", input="Hi")
        assert (whole.choices[0].message.content, whole.usage.cost) == ("Hello there", 0.000105)
        assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == "Hello there"
        assert response.status == "completed"

    async def test_shapes(self):
        """The bodies that no SDK call reads here satisfy OpenRouter's own models."""
        from openrouter.components import GenerationResponse, ModelsListResponse
        from openrouter.operations import CreateRerankResponseBody

        from gateway.kit.upstream import rerank

        assert GenerationResponse.model_validate(generation("gen-1")).data.total_cost == 0.000105
        assert ModelsListResponse.model_validate(models()).data[0].id == MODEL
        ranked = CreateRerankResponseBody.model_validate(rerank(["a", {"text": "b"}], top_n=1))
        assert [result.index for result in ranked.results] == [0]

    async def test_gets(self, upstream, http):
        """Models, later costs and an honest 404 are answered too."""
        got = []
        async with http.post(f"{upstream.url}/rerank", json={"model": "m", "documents": ["x"]}) as response:
            assert (await response.json())["results"][0]["document"] == {"text": "x"}
        for path in ("models", "generation?id=gen-7", "nonsense"):
            async with http.get(f"{upstream.url}/{path}") as response:
                got.append((response.status, await response.json()))
        assert [status for status, _ in got] == [200, 200, 404]
        assert (
            got[0][1]["links"],
            got[1][1]["data"]["id"],
            got[2][1]["error"]["code"],
        ) == ({"next": None}, "gen-7", 404)


class TestBuilders:
    @pytest.mark.parametrize("build", [chat_events, completion_events, tool_call_events])
    async def test_parts_can_be_left_out(self, build):
        """What a fault test wants missing can be left out: comment, preamble, finish reason, usage, [DONE]."""
        whole = build()
        bare = build(comments=False, preamble=False, finish=None, usage=False, done=False, pieces=1)
        assert (whole[0], whole[-1]) == (COMMENT, "[DONE]")
        assert (len(bare), bare[0]["choices"][0]["finish_reason"]) == (1, None)
        assert "usage" not in bare[0]

    async def test_event_streams_can_be_left_unended(self):
        """The streams of /responses and /messages can do without their clean end."""
        assert b"response.completed" in response_events()[-1]
        assert b"response.incomplete" in response_events(finish="incomplete")[-1]
        assert b"response.output_item.done" in response_events(finish=None)[-1]
        assert b"message_stop" in message_events()[-1]
        assert b"message_delta" in message_events(done=False)[-1]
        assert b"content_block_stop" in message_events(finish=None, done=False)[-1]

    async def test_whole_tool_call_in_one_delta(self):
        """A tool call comes in one delta or in several, as some models do the one and some the other."""
        assert [sum("tool_calls" in str(step) for step in tool_call_events(finish=None, pieces=n)) for n in (1, 3)] == [
            1,
            4,
        ]

    async def test_usage(self):
        """Usage is the default at a cost, the test's own, or missing; cost can be missing by itself."""
        assert chat_completion(cost=0.5)["usage"]["cost"] == 0.5
        assert "cost" not in chat_completion(cost=None)["usage"]
        assert chat_completion(usage={"prompt_tokens": -1})["usage"] == {"prompt_tokens": -1}
        assert "usage" not in chat_completion(usage=False)
        assert (chat_usage(4, 3)["total_tokens"], chat_usage(4, 3)["completion_tokens"]) == (7, 3)
