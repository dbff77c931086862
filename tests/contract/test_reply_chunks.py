"""`Reply(chunks=…)`: a body that a plugin makes while it is sent, from a route or instead of an upstream's answer."""

import asyncio
import json

import pytest

from gateway import Reply, Unavailable, hookimpl
from gateway.exchange import Outcome
from gateway.kit.testing import Gateway
from gateway.tasks import Tasks

EVENTS = {"Content-Type": "text/event-stream"}
BIG = 8 * 2**20
PATIENT = 10.0


class Streams:
    """Answers by what `make` is set to; tells when a stream was asked for more, and when it was closed."""

    reads_settings = ()

    def __init__(self, config, services):
        self.make = None
        self.headers = EVENTS
        self.asked = 0
        self.goes_on = asyncio.Event()
        self.closed = asyncio.Event()

    @hookimpl
    def register_routes(self, router):
        router.add("GET", "/stream", self.answer)
        router.add("GET", "/messages-stream", self.answer, dialect="messages")
        router.add("GET", "/responses-stream", self.answer, dialect="responses")

    async def answer(self, exchange):
        return Reply(200, chunks=self.chunks(), headers=self.headers)

    async def chunks(self):
        try:
            async for chunk in self.make():
                self.asked += 1
                yield chunk
        finally:
            self.closed.set()


class Lookup(Streams):
    @hookimpl
    async def lookup_response(self, exchange):
        return Reply(202, chunks=self.chunks(), headers=self.headers)


@pytest.fixture
async def gw():
    server = {"request_timeout": 1, "keepalive_interval": "1s", "write_timeout": 1, "drain_timeout": 1}
    async with Gateway.test(plugins=[Streams], settings={"server": server}) as gateway:
        yield gateway


async def test_events_go_out_as_they_are_made_and_end_cleanly(gw):
    """The client has the first event before the second is made."""
    streams = gw.plugin("Streams")

    async def make():
        yield b"data: 1\n\n"
        await streams.goes_on.wait()
        yield b"data: 2\n\n"

    streams.make = make
    async with asyncio.timeout(PATIENT), gw.session.get(gw.url + "/stream", headers=gw.headers) as reply:
        assert await reply.content.readuntil(b"\n\n") == b"data: 1\n\n"
        streams.goes_on.set()
        assert await reply.content.read() == b"data: 2\n\n"
    assert reply.headers["Content-Type"] == "text/event-stream"
    assert streams.closed.is_set()
    [exchange] = await gw.finished()
    assert (exchange.outcome, exchange.streamed) == (Outcome.OK, True)


async def test_a_silent_stream_outlives_request_timeout_and_gets_keep_alives(gw):
    """`request_timeout` is 1 s: three keep-alives come at 1 s each, in the dialect's own words, and then the end."""
    streams = gw.plugin("Streams")

    async def make():
        await streams.goes_on.wait()
        yield b"data: 2\n\n"

    streams.make = make
    async with asyncio.timeout(PATIENT), gw.session.get(gw.url + "/messages-stream", headers=gw.headers) as reply:
        for _ in range(3):
            assert await reply.content.readuntil(b"\n\n") == b'event: ping\ndata: {"type": "ping"}\n\n'
        streams.goes_on.set()
        assert (await reply.content.read()).endswith(b"data: 2\n\n")


async def test_the_iterator_is_closed_when_the_client_leaves_while_nothing_is_sent(gw):
    """Within a second."""
    streams = gw.plugin("Streams")

    async def make():
        yield b"data: 1\n\n"
        await asyncio.Event().wait()

    streams.make = make
    async with gw.session.get(gw.url + "/stream", headers=gw.headers) as reply:
        await reply.content.readuntil(b"\n\n")
        reply.close()
        await asyncio.wait_for(streams.closed.wait(), 1.0)
    [exchange] = await gw.finished()
    assert exchange.outcome is Outcome.CLIENT_DISCONNECT


async def test_a_client_that_does_not_read_holds_the_maker_up_and_is_cut(gw):
    """Of an endless body only what buffers hold is made; after `write_timeout` the client counts as gone."""
    streams = gw.plugin("Streams")
    streams.headers = {}

    async def make():
        while True:
            yield bytes(2**20)

    streams.make = make
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.worker.port, limit=1024)
    writer.write(f"GET /stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gw.key}\r\n\r\n".encode())
    await asyncio.wait_for(streams.closed.wait(), PATIENT)
    [exchange] = await gw.finished()
    assert exchange.outcome is Outcome.CLIENT_DISCONNECT
    assert streams.asked < 64
    writer.close()
    del reader


@pytest.mark.parametrize("path", ["/stream", "/messages-stream", "/responses-stream"])
async def test_the_end_of_a_drain_is_told_as_the_dialects_error_event(path):
    async with Gateway.test(plugins=[Streams], settings={"server": {"drain_timeout": 0}}) as gw:
        streams = gw.plugin("Streams")

        async def make():
            yield b'event: x\ndata: {"sequence_number": 3}\n\nevent: y\ndata: {"sequence_number": 4}\n\n'
            await asyncio.Event().wait()

        streams.make = make
        async with asyncio.timeout(PATIENT), gw.session.get(gw.url + path, headers=gw.headers) as reply:
            await reply.content.readuntil(b"\n\n")
            draining = Tasks().spawn(gw.worker.server.drain(0, 0.1), "drain")
            rest = await reply.content.read()
            await draining
    *_, last, _ = rest.split(b"\n\n")
    name, data = last.split(b"\n")
    told = json.loads(data.removeprefix(b"data: "))
    assert name == b"event: error"
    if path == "/responses-stream":
        assert (told["code"], told["sequence_number"]) == ("shutting_down", 5)
    elif path == "/messages-stream":
        assert (told["type"], told["error"]["type"]) == ("error", "overloaded_error")
    else:
        assert told["error"]["code"] == "shutting_down"
    assert streams.closed.is_set()


async def test_a_refusal_within_a_stream_is_an_error_event(gw):
    streams = gw.plugin("Streams")

    async def make():
        yield b"data: 1\n\n"
        raise Unavailable("The store is away.")

    streams.make = make
    reply = await gw.get("/stream")
    assert reply.status == 200
    assert b"The store is away." in reply.events[1]
    [exchange] = await gw.finished()
    assert exchange.outcome is Outcome.ERROR


async def test_a_failure_within_a_stream_names_the_plugin_and_tells_the_client_nothing_of_it(gw):
    streams = gw.plugin("Streams")

    async def make():
        yield b"data: 1\n\n"
        raise RuntimeError("what nobody should read")

    streams.make = make
    reply = await gw.get("/stream")
    assert b"internal_error" in reply.events[1]
    assert b"nobody should read" not in reply.body
    [exchange] = await gw.finished()
    assert exchange.error_by == "Streams.GET /stream"


async def test_a_file_has_its_length_and_comes_whole(gw):
    """Neither chunked nor held back; and the connection serves the next request."""
    streams = gw.plugin("Streams")
    streams.headers = {"Content-Length": str(BIG), "Content-Type": "application/jsonl"}

    async def make():
        for _ in range(8):
            yield b"x" * 2**20

    streams.make = make
    for _ in range(2):
        reply = await gw.get("/stream")
        assert reply.headers["Content-Length"] == str(BIG)
        assert "Transfer-Encoding" not in reply.headers
        assert reply.body == b"x" * BIG
    head = await gw.request("HEAD", "/stream")
    assert (head.status, head.headers["Content-Length"], head.body) == (200, str(BIG), b"")


@pytest.mark.parametrize("count", [7, 9])
async def test_a_length_that_is_not_kept_is_a_cut_and_never_a_short_file(gw, count):
    streams = gw.plugin("Streams")
    streams.headers = {"Content-Length": "8"}

    async def make():
        for _ in range(count):
            yield b"x"

    streams.make = make
    reply = await gw.get("/stream")
    assert reply.cut or len(reply.body) == 8
    [exchange] = await gw.finished()
    assert exchange.outcome is Outcome.ERROR


async def test_a_stream_can_be_the_answer_of_lookup_response():
    """No upstream is asked, no limit of the request's time holds, and the client's dialect is spoken."""
    async with Gateway.test(plugins=[Lookup], settings={"server": {"request_timeout": 1}}) as gw:
        plugin = gw.plugin("Lookup")

        async def make():
            yield b"data: 1\n\n"
            yield b"data: [DONE]\n\n"

        plugin.make = make
        reply = await gw.chat(stream=True)
        assert (reply.status, reply.events) == (202, [b"data: 1\n\n", b"data: [DONE]\n\n"])
        [exchange] = await gw.finished()
        assert (exchange.attempts, exchange.outcome) == ([], Outcome.OK)


@pytest.mark.parametrize(
    "given", [{"chunks": [b"x"]}, {"chunks": iter([]), "data": {}}, {"chunks": b"x", "body": b"x"}]
)
def test_what_is_no_stream_is_refused_where_the_reply_is_made(given):
    with pytest.raises(TypeError, match="asynchronous iterator"):
        Reply(200, **given)
