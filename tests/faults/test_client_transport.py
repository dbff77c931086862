"""Clients that send badly, slowly, too much or too little, and those that don't read."""

from __future__ import annotations

import asyncio
import contextvars
import gzip
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from gateway import hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Answer, Json, ScriptedUpstream, Stream, chat_completion, chat_events
from tests.faults.raw import CHAT, connect, exchange, head, request
from tests.faults.smuggling import BODY, SIZE, Forms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.kit.upstream import Seen, Wire

LIMIT = 2_000_000
SERVER = {"max_body": LIMIT, "header_timeout": 0.4, "body_timeout": 0.4}


@pytest.fixture
async def gw() -> AsyncIterator[Gateway]:
    async with Gateway.test(plugins=["api_keys"], settings={"server": SERVER}) as gateway:
        yield gateway


# --- slow senders -------------------------------------------------------------------------------------------


async def test_header_drip_is_408(gw):
    """A client that sends its headers byte by byte is told 408 and cut, however busily it drips."""
    async with connect(gw) as raw:
        begun = time.monotonic()
        for byte in request(gw)[:8]:
            await raw.send(bytes([byte]))
            await asyncio.sleep(0.03)
        reply = await raw.reply()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert reply.headers["x-request-id"].startswith("req_")
        assert await raw.ended()
        assert 0.3 < time.monotonic() - begun < 2


async def test_header_drip_on_a_kept_connection_is_408(gw):
    """The limit holds for the second request of a connection too."""
    async with connect(gw) as raw:
        await raw.send(request(gw))
        assert (await raw.reply()).status == 200
        await raw.send(b"POST /v1/chat/comp")
        assert (await raw.reply()).status == 408
        assert await raw.ended()


async def test_idle_connection_is_closed(gw):
    """Who connects and says nothing does not hold a connection."""
    async with connect(gw) as raw:
        await raw.rest(seconds=2)
    assert gw.upstream.seen == []


async def test_idle_after_a_request_is_closed():
    """A kept connection is closed after `keepalive_timeout`."""
    async with Gateway.test(settings={"server": {"keepalive_timeout": 0.3}}) as gateway, connect(gateway) as raw:
        await raw.send(request(gateway))
        assert (await raw.reply()).status == 200
        assert await raw.ended(seconds=3)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_body_drip_is_408(gw, path):
    """A body that does not arrive in time is answered 408 in the dialect, and the connection is not used again."""
    async with connect(gw) as raw:
        await raw.send(head(gw, "Content-Length: 1000", path=path))
        for _ in range(5):
            await raw.send(b" ")
            await asyncio.sleep(0.05)
        reply = await raw.reply()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert isinstance(reply.data["error"]["message"], str)
        assert ("request_id" in reply.data) == (path == "/v1/messages")
    assert gw.upstream.seen == []


# --- too much -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
async def test_a_gigabyte_is_refused_before_it_is_sent(gw, expect):
    """1 GB announced by Content-Length is 413 at once, without reading it; the connection closes."""
    async with connect(gw) as raw:
        begun = time.monotonic()
        await raw.send(head(gw, f"Content-Length: {10**9}", *expect))
        reply = await raw.reply()
        assert (reply.status, reply.headers["connection"]) == (413, "close")
        assert reply.data["error"]["code"] == "request_too_large"
        assert time.monotonic() - begun < 0.3


async def test_a_gigabyte_gets_no_more_attention_than_seconds(gw):
    """Who sends on after the 413 is not read for ever."""
    async with connect(gw) as raw:
        await raw.send(head(gw, f"Content-Length: {10**9}"))
        assert (await raw.reply()).status == 413
        assert await raw.ended(seconds=5)


async def test_chunked_body_over_the_limit_is_413(gw):
    """Without a Content-Length the limit counts what arrives."""
    async with connect(gw) as raw:
        await raw.send(head(gw, "Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(LIMIT // 65536 + 2):
            await raw.send(chunk)
        reply = await raw.reply()
        assert (reply.status, reply.headers["connection"]) == (413, "close")
    assert gw.upstream.seen == []


async def test_gzip_bomb_is_413(gw):
    """200 MB of zeros in 200 KB are refused at the limit, and hold nobody else up."""
    bomb = await asyncio.to_thread(gzip.compress, b"0" * 200_000_000, 1)
    async with connect(gw) as raw:
        await raw.send(request(gw, bomb, "Content-Encoding: gzip"))
        begun = time.monotonic()
        assert (await gw.get("/health")).status == 200
        assert time.monotonic() - begun < 1
        assert (await raw.reply()).status == 413
    assert gw.upstream.seen == []


async def test_gzip_body_is_understood(gw):
    """A compressed body that is fine is served."""
    body = gzip.compress(json.dumps(CHAT).encode())
    assert (await exchange(gw, request(gw, body, "Content-Encoding: gzip"))).status == 200
    assert gw.upstream.seen[0].json["messages"] == CHAT["messages"]
    assert "content-encoding" not in gw.upstream.seen[0].headers


GOOD = gzip.compress(json.dumps(CHAT).encode())


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"hello", "gzip"),
        (b"hello", "deflate"),
        (GOOD[:-12], "gzip"),
        (GOOD + b"xxxx", "gzip"),
        (GOOD[:12] + b"\xff" * 20, "gzip"),
        (b"", "gzip"),
    ],
    ids=["no-gzip", "no-deflate", "cut", "trailing", "broken", "empty"],
)
async def test_bad_compression_is_400(gw, body, encoding, capfd):
    """A body that does not decompress is the client's mistake, and no traceback in our log."""
    reply = await exchange(gw, request(gw, body, f"Content-Encoding: {encoding}"))
    assert reply.status == 400
    assert reply.data["error"]["type"] == "invalid_request_error"
    assert (await gw.get("/health")).status == 200
    assert gw.upstream.seen == []
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("encoding", ["foo", "gzip, gzip", "compress", "br", "zstd"])
async def test_unknown_compression_is_415(gw, encoding):
    """A compression that we can't undo is named as the mistake."""
    reply = await exchange(gw, request(gw, None, f"Content-Encoding: {encoding}"))
    assert (reply.status, "gzip" in reply.data["error"]["message"]) == (415, True)
    assert reply.headers["x-request-id"]
    assert gw.upstream.seen == []


# --- JSON -------------------------------------------------------------------------------------------------------

BAD_JSON: dict[str, bytes] = {
    "depth": b'{"model":"m","messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "depth-objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "nan": b'{"model":"m","messages":[],"temperature":NaN}',
    "infinity": b'{"model":"m","messages":[],"temperature":Infinity}',
    "1e999": b'{"model":"m","messages":[],"temperature":1e999}',
    "-1e999": b'{"model":"m","messages":[],"temperature":-1e999}',
    "integer": b'{"model":"m","messages":[],"seed":' + b"9" * 5000 + b"}",
    "surrogate": b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
    "surrogate-low": b'{"model":"m","messages":[{"role":"user","content":"\\udc00\\ud800"}]}',
    "surrogate-key": b'{"model":"m","messages":[],"\\ud800":1}',
    "surrogate-raw": b'{"model":"m","messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    "bom": b'\xef\xbb\xbf{"model":"m","messages":[]}',
    "utf-16": '{"model":"m","messages":[]}'.encode("utf-16"),
    "utf-8": b'{"model":"m","messages":[{"role":"user","content":"\xff\xfe"}]}',
    "overlong": b'{"model":"m","messages":[{"role":"user","content":"\xc0\xaf"}]}',
    "control": b'{"model":"m","messages":[{"role":"user","content":"a\x00b"}]}',
    "empty": b"",
    "blank": b" \r\n",
    "list": b"[]",
    "string": b'"model"',
    "null": b"null",
    "half": b'{"model":"m","mess',
    "two": b'{"model":"m","messages":[]}{}',
    "comment": b'{"model":"m","messages":[] /* */}',
    "single": b"{'model':'m'}",
    "number-key": b'{1:2,"model":"m"}',
    "octal": b'{"model":"m","messages":[],"seed":012}',
    "plus": b'{"model":"m","messages":[],"seed":+1}',
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_bad_json_is_400_in_the_dialect(gw, path):
    """Whatever a body holds that strict JSON does not allow: 400 in the shape that the client's SDK reads."""
    async with connect(gw) as raw:
        for name, body in BAD_JSON.items():
            await raw.send(request(gw, body, path=path))
            reply = await raw.reply()
            assert reply.status == 400, name
            data = reply.data
            if path == "/v1/messages":
                assert (data["type"], data["error"]["type"]) == ("error", "invalid_request_error"), name
                assert data["request_id"] == reply.headers["request-id"], name
            else:
                assert set(data["error"]) >= {"message", "type", "param", "code"}, name
            assert len(reply.body) < 1000, name
    assert gw.upstream.seen == []


async def test_duplicate_keys_mean_the_last(gw):
    """Of two equal keys the last counts, and it alone reaches the upstream: no parser there can see the other."""
    body = b'{"model":"first","messages":[],"model":"last","messages":[{"role":"user","content":"x"}]}'
    assert (await exchange(gw, request(gw, body))).status == 200
    seen = gw.upstream.seen[0]
    assert seen.model == "last"
    assert seen.body.count(b'"model"') == seen.body.count(b'"messages"') == 1
    assert b"first" not in seen.body


async def test_nul_and_odd_characters_pass(gw):
    """A NUL in metadata, emoji in pairs of escapes and U+2028 arrive at the upstream as they were meant."""
    metadata = {"a": "x\u0000y", "b": "😀", "c": "\u2028\u2029\u007f", "\u0000": "key"}
    reply = await gw.post("/v1/chat/completions", {**CHAT, "metadata": metadata, "user": "\u0000"})
    assert reply.status == 200
    assert gw.upstream.seen[0].json["metadata"] == metadata


@pytest.mark.parametrize(
    "model", ["a\nX-Evil: 1", "a\r\n\r\nHTTP/1.1 200 OK", "a\x00b", "\x1b[31m", "é模型", "m" * 500]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_hostile_model_name_splits_no_reply(gw, model, stream):
    """A model name with line ends, escapes or 500 characters is answered; the reply's header holds it encoded and cut."""
    reply = await exchange(gw, request(gw, {**CHAT, "model": model, "stream": stream}))
    assert reply.status == 200
    assert gw.upstream.seen[0].model == model
    assert "x-evil" not in reply.headers
    shown = reply.headers["x-xenios-model"]
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) < 2000


# --- HTTP -------------------------------------------------------------------------------------------------------


async def test_smuggling_reaches_nobody(gw):
    """Of every request whose framing is in doubt nothing reaches the upstream: not it, not what stands behind it."""
    for name, data in Forms(gw).refused().items():
        async with connect(gw) as raw:
            await raw.send(data)
            reply = await raw.reply()
            assert reply.status in {400, 501, 505}, name
            assert await raw.ended(), name
        assert gw.upstream.seen == [], name
    assert gw.upstream.malformed == []


async def test_what_is_hidden_in_a_body_stays_there(gw):
    """A request that only a sloppy reader sees behind another one's end is never served."""

    async def play(data: bytes) -> None:
        async with connect(gw) as raw:
            await raw.send(data)
            await raw.rest_within(0.2)

    await asyncio.gather(*map(play, Forms(gw).hidden().values()))
    assert gw.upstream.seen == []


async def test_what_stands_in_a_body_is_no_request(gw):
    """A request inside the body of another one is a body, on a route that reads bodies and on one that doesn't."""
    inner = request(gw, {**CHAT, "model": "inner"})
    for method, path, status in (
        ("GET", "/v1/models", 200),
        ("GET", "/health", 200),
        ("POST", "/nowhere", 404),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/v1/chat/completions", 400),
    ):
        async with connect(gw) as raw:
            await raw.send(head(gw, f"Content-Length: {len(inner)}", method=method, path=path))
            await raw.send(inner)
            assert (await raw.reply()).status == status
            assert await raw.rest_within(0.2) == b""
    assert gw.upstream.seen == []


async def test_trailers_are_dropped(gw):
    """A chunked body's trailers become no headers."""
    body = head(gw, "Transfer-Encoding: chunked", key="none").replace(b"Authorization: Bearer none\r\n", b"")
    tail = b"%x\r\n%b\r\n0\r\nAuthorization: Bearer %b\r\n\r\n" % (len(BODY), BODY, gw.key.encode())
    assert (await exchange(gw, body + tail)).status == 401


async def test_credentials_and_host_stand_once(gw):
    """Which of two keys counts is nobody's guess: 400."""
    for line in ("Authorization: Bearer x", "authorization: Basic x"):
        reply = await exchange(gw, request(gw, None, line))
        assert (reply.status, "twice" in reply.data["error"]["message"]) == (400, True)
    for name in ("x-api-key", "api-key"):
        reply = await exchange(gw, request(gw, None, f"{name}: a", f"{name}: b"))
        assert (reply.status, "twice" in reply.data["error"]["message"]) == (400, True)
    assert gw.upstream.seen == []


@pytest.mark.parametrize("host", ["x/#@y", "x/v1/chat/completions?", "[", "a b", "", "gateway:99999", "\xe9"])
async def test_host_does_not_shape_the_route(gw, host):
    """`Host: x/#@y` neither reaches another path nor passes without a key."""
    start = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n".encode("latin-1")
    without = await exchange(gw, start + b"\r\n")
    assert without.status in {400, 401}
    reply = await exchange(gw, start + f"Authorization: Bearer {gw.key}\r\n\r\n".encode())
    assert reply.status in {200, 400}
    if reply.status == 200:
        assert reply.data["object"] == "list"
    nowhere = await exchange(gw, f"GET / HTTP/1.1\r\nHost: {host}/health\r\n\r\n".encode("latin-1"))
    assert nowhere.status in {400, 404}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/files/..%2f..%2fhealth", 404),
        ("/v1/files/%2e%2e/%2e%2e/health", 404),
        ("//v1/models", 404),
        ("/v1//models", 404),
        ("/v1/models/", 404),
        ("/v1/../v1/models", 404),
        ("/V1/models", 404),
        ("/v1/models;a=b", 404),
        ("/v1/models%00", 404),
        ("/v1%2Fmodels", 200),
        ("/v1/models/a%00b%0a", 404),
        ("/v1/models/%ff%fe", 404),
        ("/v1/models/anthropic/claude-sonnet-4.6", 200),
        ("/v1/models/anthropic%2Fclaude-sonnet-4.6", 200),
        ("/v1/models/anthropic%252Fclaude-sonnet-4.6", 404),
        ("/v1/models/..%2f..%2fhealth", 404),
        ("http://elsewhere/v1/models", 200),
    ],
)
async def test_paths_mean_what_they_say(gw, path, status):
    """A path is matched once, decoded once; no spelling reaches another route, and a model's slash may be encoded."""
    how: dict[str, Any] = {"method": "GET", "path": path, "json_type": False}
    reply = await exchange(gw, head(gw, **how))
    assert reply.status == status
    assert json.loads(reply.body)
    without = await exchange(gw, head(None, **how))
    assert without.status in {401, 404}


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET", "PUT", "DELETE", "TRACE", "PROPFIND", "PATCH"])
async def test_wrong_methods_are_405_with_allow(gw, method):
    """A method that the path does not take is answered in JSON, says which it takes, and the connection goes on."""
    async with connect(gw) as raw:
        await raw.send(head(gw, method=method, json_type=False))
        reply = await raw.reply(method=method)
        assert (reply.status, reply.headers["allow"]) == (405, "POST")
        if method != "HEAD":
            assert reply.data["error"]["code"] == "method_not_allowed"
        await raw.send(head(gw, method=method, path="/nowhere", json_type=False))
        assert (await raw.reply(method=method)).status == 404
        await raw.send(request(gw))
        assert (await raw.reply()).status == 200


@pytest.mark.parametrize("method", ["BREW", "connect", "G ET", "CONNECT"])
async def test_methods_that_are_none_reach_nothing(gw, method):
    """An invented method, or a tunnel, is refused in JSON."""
    async with connect(gw) as raw:
        path = "evil:80" if method == "CONNECT" else "/v1/chat/completions"
        await raw.send(request(gw, method=method, path=path))
        reply = await raw.reply()
        assert reply.status in {400, 404}
        assert reply.data["error"]["message"]
    assert gw.upstream.seen == []


async def test_expect_100_continue_is_served(gw):
    """A client that asks before it sends is asked to go on, and served; one that shan't send is told at once."""
    async with connect(gw) as raw:
        await raw.send(head(gw, SIZE, "Expect: 100-continue"))
        assert (await raw.reply()).status == 100
        await raw.send(BODY)
        assert (await raw.reply()).status == 200
        await raw.send(request(gw))
        assert (await raw.reply()).status == 200
    async with connect(gw) as raw:
        await raw.send(head(gw, SIZE, "Expect: 100-continue", key="wrong"))
        reply = await raw.reply()
        assert (reply.status, reply.headers["connection"]) == (401, "close")


async def test_unknown_expectation_is_417(gw):
    """Any other expectation can't be met."""
    assert (await exchange(gw, request(gw, None, "Expect: the-unexpected"))).status == 417
    assert gw.upstream.seen == []


async def test_bytes_that_are_no_ascii_break_nothing(gw):
    """Bytes above 127 in any header: an answer, never a 5xx, and never a key."""
    for line in (b"X-A: \xff\xfe", b"X-Session-Id: \xff", b"X-Request-Id: \xe9\xff", b"HTTP-Referer: \xc3\xa9",
                 b"User-Agent: \xf0\x9f\x98\x80", b"Cookie: \xff", b"OpenAI-Beta: \xed\xa0\x80"):  # fmt: skip
        reply = await exchange(gw, request(gw, None, line))
        assert reply.status == 200, line
        assert b"\xff" not in reply.head
    for line in (b"Authorization: Bearer \xff\xfe", "Authorization: Bearer sk-xenios-é".encode(), b"X-Api-Key: \xff",
                 b"Authorization: \xff \xfe", b"Authorization: Bearer", b"Authorization:", b"api-key: \xc3\xa9",
                 b"Authorization: Bearer " + b"a" * 20_000):  # fmt: skip
        reply = await exchange(gw, request(None, None, line))
        assert reply.status == 401, line
    assert (await exchange(gw, request(gw, None, b"Content-Encoding: \xff"))).status == 415
    assert (await exchange(gw, request(gw, None, b"Expect: \xff"))).status == 417
    no_type = head(gw, b"Content-Type: \xff", SIZE, json_type=False)
    assert (await exchange(gw, no_type + BODY)).status == 415


@pytest.mark.parametrize(
    "lines",
    [["X-A: " + "a" * 40_000], [f"X-{n}: 1" for n in range(500)], ["X-" + "a" * 40_000 + ": 1"]],
    ids=["long", "many", "long-name"],
)
async def test_huge_heads_are_400(gw, lines):
    """A head is bounded, in its lines and in their number."""
    async with connect(gw) as raw:
        await raw.send(head(gw, *lines))
        assert (await raw.reply()).status == 400
        assert await raw.ended()


async def test_huge_url_is_400(gw):
    """So is the URL."""
    async with connect(gw) as raw:
        await raw.send(head(gw, method="GET", path="/v1/models?" + "a" * 20_000))
        assert (await raw.reply()).status == 400
        assert await raw.ended()


CANARY = "canary-4f1d0c"


@pytest.mark.parametrize(
    "data",
    [
        f"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {CANARY}\x00\r\n\r\n",
        f"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization Bearer {CANARY}\r\n\r\n",
        f"{CANARY} /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
        f"GET /v1/{CANARY}\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        f"GET /v1/models HTTP/1.1\r\nHost: a\r\nContent-Length: {CANARY}\r\n\r\n",
        f"GET /v1/models HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: {CANARY}\r\n\r\n",
    ],
)
async def test_a_malformed_request_is_not_echoed(gw, data, capfd):
    """What was malformed, maybe a key, stands neither in the answer nor in the log."""
    async with connect(gw) as raw:
        await raw.send(data.encode("latin-1"))
        answer = await raw.rest()
    logged = "".join(capfd.readouterr())
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert b"aiohttp" not in answer.lower()
    assert "bad_http_request" in logged
    assert CANARY not in logged + answer.decode("latin-1")


async def test_pipelined_requests_are_answered_in_order(gw):
    """Requests sent without waiting are answered one by one, in order."""
    names = ["one", "two", "three", "four"]
    async with connect(gw) as raw:
        await raw.send(b"".join(request(gw, {**CHAT, "model": name}) for name in names))
        assert [(await raw.reply()).headers["x-xenios-model"] for _ in names] == names
    assert [seen.model for seen in gw.upstream.seen] == names


class Marks:
    """Leaves a mark in each request's context, and notes the mark that it finds there."""

    reads_settings = ()

    def __init__(self, config, services):
        self.found = []
        self.mark = contextvars.ContextVar("mark", default=None)

    @hookimpl
    async def request_received(self, exchange):
        self.found.append(self.mark.get())
        self.mark.set(exchange.id)


async def test_requests_of_a_connection_share_no_context():
    """What a plugin sets in a context variable is gone with its request, on a kept connection and in a pipeline."""
    async with Gateway.test(plugins=[Marks]) as gateway, connect(gateway) as raw:
        for _ in range(2):
            await raw.send(request(gateway) * 2)
            assert [(await raw.reply()).status for _ in range(2)] == [200, 200]
        assert gateway.plugin("Marks").found == [None] * 4


async def test_a_mistake_of_ours_is_a_500_and_an_end(gw, monkeypatch):
    """A request that breaks the server itself is answered in JSON, logged with its id, and the next client is served."""
    with monkeypatch.context() as broken, capture_logs() as logged:
        broken.setattr("gateway.server.RequestView", None)
        async with connect(gw) as raw:
            await raw.send(request(gw))
            reply = await raw.reply()
            assert (reply.status, reply.headers["connection"]) == (500, "close")
            assert reply.data["error"]["type"] == "server_error"
            assert await raw.ended()
    [line] = [entry for entry in logged if entry["event"] == "request_crashed"]
    assert line["request_id"] == reply.headers["x-request-id"]
    assert (await exchange(gw, request(gw))).status == 200


async def test_errors_leave_the_connection_usable(gw):
    """A refused request that came complete costs the client no new connection."""
    async with connect(gw) as raw:
        for data, status in (
            (request(gw, b"{"), 400),
            (request(gw, {"model": "m"}), 400),
            (request(gw, key="wrong"), 401),
            (request(gw, path="/nowhere"), 404),
            (request(gw, path="/health"), 405),
            (request(gw, json_type=False) + b"", 200),
            (request(gw, None, "Content-Type: text/plain", json_type=False), 415),
            (request(gw), 200),
        ):
            await raw.send(data)
            reply = await raw.reply()
            assert (reply.status, reply.headers.get("connection")) == (status, None)


async def test_upgrades_are_ignored(gw):
    """A client that offers HTTP/2 or a WebSocket is answered in HTTP/1.1, on a connection that goes on."""
    h2 = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
    for lines in (h2, ("Connection: Upgrade", "Upgrade: websocket")):
        async with connect(gw) as raw:
            await raw.send(request(gw, None, *lines))
            assert (await raw.reply()).status == 200
            await raw.send(request(gw))
            assert (await raw.reply()).status == 200


async def test_http_1_0_stream_ends_with_the_connection(gw):
    """An HTTP/1.0 client gets a stream without chunks, ended by the end of the connection."""
    for lines in ((), ("Connection: keep-alive",)):
        async with connect(gw) as raw:
            await raw.send(request(gw, {**CHAT, "stream": True}, *lines, version="1.0"))
            answer = await raw.rest()
        start, _, body = answer.partition(b"\r\n\r\n")
        assert start.startswith(b"HTTP/1.0 200 ")
        assert b"transfer-encoding" not in start.lower()
        assert b"connection: close" in start.lower()
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")


async def test_http_1_0_keep_alive(gw):
    """An HTTP/1.0 client may keep its connection between whole replies."""
    async with connect(gw) as raw:
        for _ in range(2):
            await raw.send(request(gw, None, "Connection: keep-alive", version="1.0"))
            reply = await raw.reply()
            assert (reply.status, reply.headers["connection"]) == (200, "keep-alive")


# --- content types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml", "x"],
)
async def test_unknown_content_type_is_415(gw, kind):
    """A body of a type that the endpoint does not take."""
    reply = await exchange(gw, request(gw, None, f"Content-Type: {kind}", json_type=False))
    assert reply.status == 415
    assert gw.upstream.seen == []


def form(*parts: tuple[str, str], end: bytes = b"--X--\r\n") -> bytes:
    lines = [
        f'--X\r\nContent-Disposition: form-data; name="{name}"{"; filename=a.mp3" if name == "file" else ""}\r\n\r\n{v}\r\n'
        for name, v in parts
    ]
    return "".join(lines).encode() + end


FILE = ("file", "sound")
MODEL = ("model", "openai/whisper-1")


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("multipart/form-data; boundary=X", form(FILE, MODEL), 200),
        ("multipart/form-data", form(FILE, MODEL), 400),
        ("multipart/form-data; boundary=", form(FILE, MODEL), 400),
        ("multipart/form-data; boundary=Y", form(FILE, MODEL), 400),
        ("multipart/form-data; boundary=X", form(FILE, MODEL, end=b""), 400),
        ("multipart/form-data; boundary=X", b"", 400),
        ("multipart/form-data; boundary=X", form(FILE, MODEL, ("model", "other/model")), 400),
        ("multipart/form-data; boundary=X", form(*[(f"n{n}", "x") for n in range(10_000)], FILE, MODEL), 413),
        ("multipart/form-data; boundary=" + "X" * 300, form(FILE, MODEL), 400),
        ("multipart/form-data; boundary=X", form(FILE, MODEL).replace(b'name="model"', b""), 400),
        ("multipart/form-data; boundary=X", form(FILE, ("model", "a\x00b")), 200),
        ("text/plain", form(FILE, MODEL), 415),
    ],
    ids=[
        "fine", "no-boundary", "empty-boundary", "other-boundary", "no-end", "empty", "two-models", "10k-parts",
        "long-boundary", "no-name", "nul", "no-multipart",
    ],
)  # fmt: skip
async def test_multipart(gw, kind, body, status):
    """A form is read strictly: no boundary, no end, two models or thousands of parts are refused."""
    line = f"Content-Type: {kind}"
    reply = await exchange(gw, request(gw, body, line, path="/v1/audio/transcriptions", json_type=False))
    assert reply.status == status
    assert len(gw.upstream.seen) == (status == 200)


# --- readers that don't read ------------------------------------------------------------------------------------


class Flood(Answer):
    """A stream without end; `sent` counts the bytes that were taken off our hands."""

    def __init__(self) -> None:
        self.sent = 0

    async def send(self, wire: Wire, seen: Seen) -> bool:
        await Stream(*chat_events("begin", finish=None, done=False), end="clean").send(_NoEnd(wire), seen)
        event = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % (b"x" * 8000)
        while True:
            await wire.write(b"%x\r\n%b\r\n" % (len(event), event))
            self.sent += len(event)


class _NoEnd:
    """The wire of a stream whose end is somebody else's."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.keep_alive = False
        self.head = wire.head

    async def write(self, data: bytes) -> None:
        if data != b"0\r\n\r\n":
            await self._wire.write(data)

    async def end(self, _: str) -> bool:
        return False


async def test_a_reader_that_stops_is_cut_and_costs_no_memory():
    """A client that stops reading a stream stops the upstream too, is cut after `write_timeout`, and its attempt ends."""
    flood = Flood()
    settings = {"server": {"write_timeout": 0.6}}
    async with (
        Gateway.test(upstream=ScriptedUpstream(flood), settings=settings) as gw,
        connect(gw, receive_buffer=4096) as raw,
    ):
        await raw.send(request(gw, {**CHAT, "stream": True}))
        seen = await gw.upstream.wait_seen(1)
        await gw.upstream.wait_closed(seen, 5)
        [done] = await gw.finished()
        assert done.outcome == "client_disconnect"
        assert [a.cause for a in done.attempts] == ["client_disconnect"]
        # what lies in the kernel's buffers of two loopback connections, and next to nothing in ours
        assert flood.sent < 32 * 2**20
        assert (await gw.chat()).status == 200


async def test_a_slow_reader_that_gets_on_is_not_cut():
    """A large whole reply may take longer than `write_timeout`, as long as the client goes on taking it."""
    text = "x" * 12_000_000
    settings = {"server": {"write_timeout": 1.0}}
    upstream = ScriptedUpstream(Json(chat_completion(text)))
    async with Gateway.test(upstream=upstream, settings=settings) as gw, connect(gw, receive_buffer=65536) as raw:
        await raw.send(request(gw))
        begun = time.monotonic()
        await raw.reader.readuntil(b"\r\n\r\n")
        got = 0
        while got < len(text):
            piece = await raw.reader.readexactly(min(200_000, len(text) - got))
            got += len(piece)
            await asyncio.sleep(0.03)
        assert time.monotonic() - begun > 1.2
        [done] = await gw.finished()
        assert done.outcome == "ok"


async def test_connections_beyond_the_limit_get_503():
    """One connection too many is told to come back; the others are served on, and a place that gets free is used."""
    async with Gateway.test(settings={"server": {"max_connections": 2}}) as gw:
        async with connect(gw) as first, connect(gw) as second:
            for raw in (first, second):
                await raw.send(request(gw))
                assert (await raw.reply()).status == 200
            async with connect(gw) as third:
                reply = await third.reply()
                assert (reply.status, reply.headers["connection"]) == (503, "close")
                assert {"retry-after", "x-request-id"} <= reply.headers.keys()
                assert await third.ended()
            await first.send(request(gw))
            assert (await first.reply()).status == 200
        for _ in range(50):
            reply = await exchange(gw, request(gw))
            if reply.status == 200:
                break
        assert reply.status == 200


async def test_head_is_answered_as_get_without_a_body(gw):
    """Load balancers probe /health with HEAD: the status and length of GET, no body, and the connection goes on."""
    async with connect(gw) as raw:
        await raw.send(head(gw, method="HEAD", path="/health", json_type=False))
        reply = await raw.reply(method="HEAD")
        assert (reply.status, reply.body) == (200, b"")
        assert int(reply.headers["content-length"]) > 0
        await raw.send(request(gw))
        assert (await raw.reply()).status == 200
