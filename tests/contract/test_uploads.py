"""A route whose body is a stream: read piece by piece, bounded in size and by the client's pace, never whole in memory."""

import asyncio
import gzip
import hashlib
import io
import json

import pytest

from gateway import ClientGone, Reply, TooLarge, hookimpl
from gateway.errors import RequestTimeout
from gateway.exchange import Outcome
from gateway.kit.testing import Gateway
from gateway.tasks import Tasks

PATIENT = 10.0
SERVER = {"body_timeout": 1, "request_timeout": 2, "max_body": "1KiB"}
SMALL, LARGE = 2**20, 32 * 2**20


class Uploads:
    """Says what came, and how; `gate` holds the reading up."""

    reads_settings = ()

    def __init__(self, config, services):
        self.gate = asyncio.Event()
        self.gate.set()
        self.first = asyncio.Event()
        self.failed = []

    @hookimpl
    def register_routes(self, router):
        router.add("POST", "/upload", self.take, body="stream", max_body=LARGE)
        router.add("POST", "/unread", self.leave, body="stream")
        router.add("POST", "/twice", self.twice, body="stream")

    async def take(self, exchange):
        digest, size, largest = hashlib.sha256(), 0, 0
        try:
            async for piece in exchange.upload():
                self.first.set()
                await self.gate.wait()
                digest.update(piece)
                size, largest = size + len(piece), max(largest, len(piece))
        except (TooLarge, RequestTimeout, ClientGone) as error:
            self.failed.append(type(error))
            raise
        return Reply(200, data={"size": size, "largest": largest, "sha256": digest.hexdigest()})

    async def leave(self, exchange):
        return Reply(200, data={"raw": exchange.raw_body.decode()})

    async def twice(self, exchange):
        async for _ in exchange.upload():
            pass
        exchange.upload()


@pytest.fixture
async def gw():
    async with Gateway.test(plugins=[Uploads], settings={"server": SERVER}) as gateway:
        yield gateway


async def opened(gw, head="", path="/upload"):
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.worker.port)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gw.key}\r\n{head}\r\n".encode())
    return reader, writer


async def test_a_large_body_comes_in_pieces_and_whole(gw):
    """Each byte arrives; no piece is a thirtieth of it."""
    body = bytes(range(256)) * (30 * 4096)
    reply = await gw.request("POST", "/upload", data=io.BytesIO(body))
    assert reply.data["sha256"] == hashlib.sha256(body).hexdigest()
    assert reply.data["largest"] <= SMALL


async def test_a_compressed_body_is_unpacked_and_counted_as_it_is_then(gw):
    body = b"x" * (LARGE // 2)
    packed = gzip.compress(body)
    reply = await gw.request("POST", "/upload", data=packed, headers={"Content-Encoding": "gzip"})
    assert reply.data["size"] == len(body)
    bomb = gzip.compress(b"x" * (LARGE + 1))
    reply = await gw.request("POST", "/upload", data=bomb, headers={"Content-Encoding": "gzip"})
    assert (reply.status, reply.data["error"]["code"]) == (413, "request_too_large")


async def test_what_is_too_large_is_refused_unread_if_it_says_so_and_in_the_middle_if_not(gw):
    reader, writer = await opened(gw, f"Content-Length: {LARGE + 1}\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()

    async def endless():
        while True:
            yield bytes(SMALL)

    reply = await gw.request("POST", "/upload", data=endless())
    assert reply.status == 413


async def test_a_slow_body_may_take_longer_than_body_timeout_as_long_as_enough_comes(gw):
    """Five times 64 KiB, each within a second of the one before: longer than `request_timeout` too."""
    reader, writer = await opened(gw, f"Content-Length: {5 * 65536}\r\n")
    for _ in range(5):
        writer.write(bytes(65536))
        await asyncio.sleep(0.5)  # the pace is what is tested
    head = await asyncio.wait_for(reader.readline(), PATIENT)
    assert head.startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_drip_is_408(gw):
    """A byte now and then does not keep a connection for ever."""
    reader, writer = await opened(gw, f"Content-Length: {SMALL}\r\n")
    began = asyncio.get_running_loop().time()
    answer = Tasks().spawn(reader.readline(), "answer")
    while not answer.done():
        writer.write(b"x")
        await asyncio.wait([answer], timeout=0.2)
    assert (await answer).startswith(b"HTTP/1.1 408")
    assert asyncio.get_running_loop().time() - began < 3
    assert gw.plugin("Uploads").failed == [RequestTimeout]
    writer.close()


async def test_a_slow_handler_is_not_the_clients_fault(gw):
    """The store takes two seconds where the client may take one: nobody is told 408, and the client is held up."""
    uploads = gw.plugin("Uploads")
    uploads.gate.clear()
    reader, writer = await opened(gw, f"Content-Length: {8 * SMALL}\r\n")
    writer.write(bytes(8 * SMALL))
    await uploads.first.wait()
    await asyncio.sleep(1.5)  # longer than `body_timeout`
    assert uploads.failed == []
    assert writer.transport.get_write_buffer_size() > 0
    uploads.gate.set()
    assert (await asyncio.wait_for(reader.readline(), PATIENT)).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_client_that_leaves_ends_the_upload(gw):
    _, writer = await opened(gw, f"Content-Length: {SMALL}\r\n")
    writer.write(b"x")
    await gw.plugin("Uploads").first.wait()
    writer.transport.abort()
    [exchange] = await gw.finished()
    assert exchange.outcome is Outcome.CLIENT_DISCONNECT


async def test_expect_100_continue_is_answered_when_the_handler_reads(gw):
    reader, writer = await opened(gw, "Content-Length: 3\r\nExpect: 100-continue\r\n")
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENT) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"abc")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENT)
    assert head.startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_body_that_the_handler_leaves_unread_is_no_next_request(gw):
    """The connection is closed: what follows on it might be taken for a request."""
    reader, writer = await opened(gw, f"Content-Length: {SMALL}\r\n", path="/unread")
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENT)
    assert b"connection: close" in head.lower()
    writer.close()


async def test_it_is_read_once(gw):
    """A second reader gets an error of the plugin's, never an empty body."""
    reply = await gw.request("POST", "/twice", data=b"x")
    assert reply.status == 500
    [exchange] = await gw.finished()
    assert exchange.error_by == "Uploads.POST /twice"


async def test_other_routes_bodies_are_parsed_as_ever(gw):
    """The limit of 200 MB is the route's alone."""
    reply = await gw.post("/v1/chat/completions", {"model": "m", "messages": ["x" * 2048]})
    assert reply.status == 413
    assert json.loads(reply.body)["error"]["code"] == "request_too_large"
