"""The lean transport over real sockets: connections kept, lost and shared, names, TLS, proxies, backpressure."""

from __future__ import annotations

import asyncio
import base64
import functools
import socket
import ssl
import zlib
from contextlib import asynccontextmanager

import pytest

from gateway import Cause
from gateway.errors import UpstreamError
from gateway.transport import dial, pool
from gateway.transport.aiohttp_client import AiohttpTransport
from gateway.transport.connection import LARGE
from gateway.transport.http import HttpTransport
from tests.stores.certificates import certificate_for

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SMALL = 1 << 20


def zip_(data):
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


class Upstream:
    """Answers by a script: one entry per request, the last again and again.

    An entry is bytes to write, or a function of (reader, writer) that is run after the request was read. After
    `close` (b"" as an entry) the connection ends.
    """

    def __init__(self, *script):
        self.script = list(script) or [OK]
        self.heads, self.bodies, self.connections, self.writers = [], [], [], []
        self.count = 0

    async def serve(self, reader, writer):
        self.count += 1
        number = self.count
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(x[15:]) for x in head.split(b"\r\n") if x.startswith(b"Content-Length:")), 0)
                entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                self.heads.append(head)
                self.connections.append(number)
                if callable(entry):
                    await entry(reader, writer)
                    continue
                self.bodies.append(await reader.readexactly(length))
                if not entry:
                    break
                writer.write(entry)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def running(
    upstream, *, scheme="http", host="127.0.0.1", base="/v1", certificate=None, by=HttpTransport, **options
):
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0, ssl=context)
    upstream.server, upstream.port = server, server.sockets[0].getsockname()[1]
    options = {"connect_timeout": 5, "max_reply": SMALL, **options}
    transport = by(f"{scheme}://{host}:{upstream.port}{base}", **options)
    try:
        yield transport
    finally:
        await transport.close()
        server.close()
        for writer in upstream.writers:
            writer.close()
        await asyncio.sleep(0.01)


async def post(transport, body=b"{}", **headers):
    reply = await transport.send("POST", "/chat/completions", headers, body)
    try:
        return reply.status, await reply.read(SMALL)
    finally:
        reply.close()


async def refused(transport, *cause, body=b"{}"):
    with pytest.raises(UpstreamError) as caught:
        await post(transport, body)
    assert caught.value.cause in cause
    return caught.value


# --- one request -----------------------------------------------------------------------------------------------


async def test_a_request_is_what_was_asked_and_nothing_more():
    """The head holds the headers given, the address's own and the body's length, and nothing of the client's making."""
    upstream = Upstream()
    async with running(upstream) as transport:
        headers = {"Authorization": "Bearer k", "Host": "evil", "Transfer-Encoding": "chunked", "X-Name": "é"}
        reply = await transport.send("POST", "/chat?a=b c", headers, b"{}")
        assert (reply.status, reply.headers["content-length"], await reply.read(9)) == (200, "2", b"ok")
        await post(transport, b"")
        (await transport.send("GET", "/models", {}, None)).close()
    assert upstream.heads[0].decode() == (
        f"POST /v1/chat?a=b+c HTTP/1.1\r\nHost: 127.0.0.1:{upstream.port}\r\nAuthorization: Bearer k\r\n"
        "X-Name: é\r\nContent-Length: 2\r\n\r\n"
    )
    assert b"Content-Length: 0\r\n" in upstream.heads[1]
    assert upstream.heads[2] == b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % upstream.port


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\rb", "a\0b"])
async def test_a_header_can_not_begin_another(value):
    """A line break or NUL in a header's value or name is refused before anything is sent."""
    upstream = Upstream()
    async with running(upstream) as transport:
        for headers in ({"X-A": value}, {value: "a"}):
            with pytest.raises(ValueError, match="line break"):
                await transport.send("POST", "/x", headers, b"")
    assert upstream.heads == []


@pytest.mark.parametrize(
    "wire,body",
    [
        (OK, b"ok"),
        (CHUNKED + b"1\r\na\r\n2;x=y\r\nbc\r\n0\r\nTrailer: x\r\n\r\n", b"abc"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
         % (len(zip_(b"ok")), zip_(b"ok")), b"ok"),
    ],
)  # fmt: skip
async def test_a_body_is_whole_however_it_is_framed_and_split(wire, body):
    """Length, chunks, HTTP/1.0, interim replies and gzip give the same body at once and byte by byte."""

    async def drip(reader, writer):
        for byte in wire:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        await reader.read(1)

    for script in (wire, drip):
        async with running(Upstream(script)) as transport:
            assert await post(transport) == (200, body)


async def test_a_body_may_end_with_the_connection():
    """Without a length the end of the connection is the body's, a reset is not."""

    async def end(reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        writer.close()

    async def reset(reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    async with running(Upstream(end)) as transport:
        assert await post(transport) == (200, b"all of it")
    async with running(Upstream(reset)) as transport:
        await refused(transport, Cause.TRUNCATED)


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nok",
        b"HTTP/1.1 150 X\r\nContent-Length: 5\r\n\r\nevil!" + OK,
        b"HTTP/1.1 150 X\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nevil!\r\n0\r\n\r\n" + OK,
        b"HTTP/1.1 099 X\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"RTSP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: %b\r\n\r\n" % (b"x" * 17000),
        b"HTTP/1.1 200 OK\r\n" + b"X: %b\r\n" % (b"x" * 9000) * 8 + b"\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 129 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 4000,
        CHUNKED + b"2\r\nabc\r\n0\r\n\r\n",
        CHUNKED + b"0\r\nX: " + b"x" * 70000,
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + zip_(b"0" * 2 * SMALL),
    ],
)
async def test_what_could_be_read_in_two_ways_or_has_no_bound_is_refused(wire):
    """It is a broken reply, and its connection is closed."""
    gone = asyncio.Event()

    async def answer(reader, writer):
        writer.write(wire)
        while await reader.read(100):
            pass
        gone.set()

    async with running(Upstream(answer)) as transport:
        await refused(transport, Cause.BAD_REPLY)
        await asyncio.wait_for(gone.wait(), 5)


async def test_a_large_body_waits_for_the_upstream_to_take_it():
    """A body larger than the buffers arrives whole, at the pace of who reads it."""
    body = bytes(range(256)) * (LARGE // 64)
    upstream = Upstream()
    async with running(upstream) as transport:
        assert await post(transport, body) == (200, b"ok")
        assert await post(transport, body[:LARGE]) == (200, b"ok")
    assert upstream.bodies == [body, body[:LARGE]]
    assert upstream.connections == [1, 1]


async def test_a_reply_before_the_end_of_a_large_body_ends_the_sending():
    """A 413 that does not wait for the body is the reply; the half request's connection is not used again."""
    done = asyncio.Event()

    async def early(reader, writer):
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await done.wait()

    upstream = Upstream(early, OK)
    async with running(upstream) as transport:
        assert await post(transport, b"x" * 40 * LARGE) == (413, b"")
        assert await post(transport) == (200, b"ok")
        done.set()
    assert upstream.connections == [1, 2]


async def test_a_reply_that_begins_early_does_not_end_the_sending():
    """An upstream that answers while it reads gets the rest of the body too."""
    got = []

    async def echo(reader, writer):
        writer.write(CHUNKED)
        got.append(await reader.readexactly(20 * LARGE))
        writer.write(b"2\r\nok\r\n0\r\n\r\n")

    upstream = Upstream(echo, OK)
    async with running(upstream) as transport:
        assert await post(transport, b"x" * 20 * LARGE) == (200, b"ok")
        assert await post(transport) == (200, b"ok")
    assert upstream.connections == [1, 1]


# --- connections kept, lost and shared -----------------------------------------------------------------------


async def test_a_connection_is_kept_unless_there_is_a_reason_against():
    """One after another goes on one connection; what was not read to its end, or came beside a reply, ends it."""
    upstream = Upstream(
        OK, OK,
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=1\r\nContent-Length: 2\r\n\r\nok",
        OK,
    )  # fmt: skip
    async with running(upstream) as transport:
        for _ in range(7):
            assert await post(transport) == (200, b"ok")
    assert upstream.connections == [1, 1, 1, 2, 3, 4, 5]


async def test_what_comes_unasked_ends_the_connection():
    """A second reply after the first, when nobody asked, is never the next request's."""
    poisoned = asyncio.Event()

    async def answer(reader, writer):
        await reader.readexactly(2)
        writer.write(OK)
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
        await reader.read(1)
        poisoned.set()

    async with running(Upstream(answer, OK)) as transport:
        assert await post(transport) == (200, b"ok")
        await asyncio.wait_for(poisoned.wait(), 5)
        assert await post(transport) == (200, b"ok")


async def test_who_speaks_first_is_not_connected_to_again_and_again():
    """An upstream that refuses each connection in words, before it was asked anything, is asked once."""
    upstream = Upstream()

    async def refuse(reader, writer):
        upstream.count += 1
        upstream.writers.append(writer)
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy")
        await reader.read()

    upstream.serve = refuse
    async with running(upstream, by=AiohttpTransport) as transport:
        connector = transport._open().connector
        create = connector._create_connection

        async def told_at_once(*args):
            protocol = await create(*args)
            async with asyncio.timeout(5):
                while not protocol.should_close:
                    await asyncio.sleep(0)
            return protocol

        connector._create_connection = told_at_once
        async with asyncio.timeout(5):
            assert await post(transport) == (503, b"busy")
    assert upstream.count == 1


async def test_nor_is_it_by_aiohttps_client():
    """What an upstream says unasked is never the next request's reply, whatever the transport."""

    async def answer(reader, writer):
        await reader.readexactly(2)
        writer.write(OK)
        await asked.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")

    asked = asyncio.Event()
    async with running(Upstream(answer, OK), by=AiohttpTransport) as transport:
        assert await post(transport) == (200, b"ok")
        (idle,) = (protocol for kept in transport._session.connector._conns.values() for protocol, _ in kept)
        asked.set()
        async with asyncio.timeout(5):
            while not idle.should_close:  # it has arrived
                await asyncio.sleep(0)
        assert await post(transport) == (200, b"ok")


async def test_an_idle_connection_that_ends_as_it_is_used_is_replaced_once():
    """The request is sent again on a new connection, and only once."""
    upstream = Upstream(OK, b"", OK, b"")
    async with running(upstream) as transport:
        assert await post(transport) == (200, b"ok")
        assert await post(transport) == (200, b"ok")
        assert upstream.connections == [1, 1, 2]
        await refused(transport, Cause.CONNECTION)
    assert upstream.connections == [1, 1, 2, 2, 3]


async def test_a_new_connection_or_a_begun_reply_is_never_asked_again():
    """What failed on a new connection, or after the reply's first byte, may have been done: it fails."""

    async def begin(reader, writer):
        writer.write(b"HTTP/1.1 2")
        writer.close()

    upstream = Upstream(b"", OK, begin)
    async with running(upstream) as transport:
        await refused(transport, Cause.CONNECTION)
        assert await post(transport) == (200, b"ok")
        await refused(transport, Cause.CONNECTION)
    assert upstream.connections == [1, 2, 2]


async def test_a_connection_lost_after_a_while_may_have_been_billed(monkeypatch):
    """An upstream that thought about it before it hung up is not asked again."""
    monkeypatch.setattr("gateway.transport.connection.CROSSING", 0.0)
    upstream = Upstream(OK, b"", OK)
    async with running(upstream) as transport:
        await post(transport)
        await refused(transport, Cause.CONNECTION)
    assert len(upstream.heads) == 2


async def test_idle_connections_expire(monkeypatch):
    """One that nobody needs is closed after its time."""
    monkeypatch.setattr(pool, "IDLE_SECONDS", 0.05)
    gone = asyncio.Event()

    async def answer(reader, writer):
        await reader.readexactly(2)
        writer.write(OK)
        assert not await reader.read(1)
        gone.set()

    async with running(Upstream(answer)) as transport:
        await post(transport)
        await asyncio.wait_for(gone.wait(), 5)


async def test_at_the_limit_requests_wait_in_order():
    """No more connections than the limit; who came first is served first; who gives up loses nobody's turn."""
    upstream = Upstream()
    async with running(upstream, max_connections=1) as transport:
        first = await transport.send("POST", "/0", {}, b"")
        if not first.complete:
            await first.chunk()
        upstream.script = [CHUNKED]  # a reply that does not end
        held = await transport.send("POST", "/1", {}, b"")
        order = []

        async def ask(n):
            await post(transport, b"", n=str(n))
            order.append(n)

        waiting = [asyncio.get_running_loop().create_task(ask(n)) for n in range(5)]
        await asyncio.sleep(0.02)
        waiting.pop(1).cancel()
        upstream.script = [OK]
        held.close()
        await asyncio.gather(*waiting)
    assert order == [0, 2, 3, 4]
    assert upstream.connections == [1, 1, 2, 2, 2, 2]


async def test_a_turn_that_is_given_up_as_it_comes_is_the_next_ones():
    """A request cancelled in the very moment in which it got its connection leaves it to the next."""
    async with running(Upstream(CHUNKED), max_connections=1) as transport:
        held = await transport.send("POST", "/1", {}, b"")
        one, two = (asyncio.get_running_loop().create_task(transport.send("POST", "/2", {}, b"")) for _ in range(2))
        turns = transport._pool._turns
        while len(turns) < 2:
            await asyncio.sleep(0)
        first = turns[0]
        held.close()
        while not first.done():
            await asyncio.sleep(0)
        one.cancel()
        (await asyncio.wait_for(two, 5)).close()


async def test_a_request_that_is_cancelled_closes_its_connection():
    """Whoever waits for a head and gives up leaves no connection behind, nor its slot."""
    gone = asyncio.Event()

    async def silent(reader, writer):
        await reader.readexactly(2)
        assert not await reader.read(1)
        gone.set()

    async with running(Upstream(silent, OK), max_connections=1) as transport:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post(transport), 0.05)
        await asyncio.wait_for(gone.wait(), 5)
        assert await asyncio.wait_for(post(transport), 5) == (200, b"ok")


async def test_closing_ends_what_is_under_way():
    """A reply being read is truncated; nothing can be asked any more."""
    async with running(Upstream(CHUNKED)) as transport:
        reply = await transport.send("POST", "/1", {}, b"")
        reading = asyncio.get_running_loop().create_task(reply.chunk())
        await asyncio.sleep(0)
        await transport.close()
        with pytest.raises(UpstreamError) as caught:
            await reading
        assert caught.value.cause is Cause.TRUNCATED
        await refused(transport, Cause.CONNECTION)


# --- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["chunk", "push"])
async def test_a_slow_reader_slows_the_upstream(how):
    """What is not taken stays with the upstream: memory for a stream is bounded; what was paused goes on."""
    written, piece = [0], b"x" * 65536

    async def flood(reader, writer):
        writer.write(CHUNKED)
        while written[0] < 64 << 20:
            writer.write(b"10000\r\n%b\r\n" % piece)
            await writer.drain()
            written[0] += len(piece)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async with running(Upstream(flood)) as transport:
        reply = await transport.send("POST", "/1", {}, b"")
        got, ended = [0], asyncio.get_running_loop().create_future()

        def receive(data):
            got[0] += len(data)

        if how == "push":
            assert reply.push(receive, ended.set_result)
            reply.pause()
        before = -1
        while before != written[0]:
            before = written[0]
            await asyncio.sleep(0.05)
        assert written[0] < 32 << 20  # the kernel's buffers
        assert reply.size < 1 << 20
        if how == "push":
            reply.resume()
            assert await asyncio.wait_for(ended, 20) is None
        else:
            while data := await reply.chunk():
                receive(data)
        assert got[0] == 64 << 20
        assert reply.complete


async def test_what_arrives_together_is_pushed_together_and_its_end_told_once():
    """What was there before, then each read as one piece, then the end; an error instead of it if it is cut."""
    go = asyncio.Event()

    async def stream(end, reader, writer):
        writer.write(CHUNKED + b"1\r\na\r\n")
        await go.wait()
        writer.write(b"1\r\nb\r\n1\r\nc\r\n" + end)
        writer.close()

    for end, cause in ((b"0\r\n\r\n", None), (b"", Cause.TRUNCATED), (b"zz\r\n", Cause.BAD_REPLY)):
        go.clear()
        async with running(Upstream(functools.partial(stream, end))) as transport:
            reply = await transport.send("POST", "/1", {}, b"")
            while not reply.parts:
                await asyncio.sleep(0)
            got, ended = [], asyncio.get_running_loop().create_future()
            reply.push(got.append, ended.set_result)
            assert got == [b"a"]
            go.set()
            error = await asyncio.wait_for(ended, 5)
            assert (error.cause if error else None) == cause
            assert got == [b"a", b"bc"]
            reply.close()


async def test_after_close_nothing_is_pushed():
    """Neither a piece nor the end."""

    async def stream(reader, writer):
        writer.write(CHUNKED + b"1\r\na\r\n")
        writer.write(b"1\r\nb\r\n0\r\n\r\n" if await reader.read(1) else b"")

    async with running(Upstream(stream)) as transport:
        reply = await transport.send("POST", "/1", {}, b"")
        got = []

        def receive(data):
            got.append(data)
            reply.close()

        reply.push(receive, got.append)
        while not got:
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert got == [b"a"]


# --- names, TLS, proxies -----------------------------------------------------------------------------------


async def test_a_name_is_asked_for_once_in_a_while_and_again_if_nobody_is_there(monkeypatch):
    """Its addresses are kept for their time; a connection that fails has them asked for anew."""
    asked = []

    async def getaddrinfo(host, port, **_):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    upstream = Upstream(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    async with running(upstream, host="up.example") as transport:
        _replace(monkeypatch, transport, getaddrinfo)
        await asyncio.gather(*(post(transport) for _ in range(5)))
        assert asked == ["up.example"]
        upstream.server.close()
        await refused(transport, Cause.CONNECTION)
        await refused(transport, Cause.CONNECTION)
        assert len(asked) == 2


def _replace(monkeypatch, transport, getaddrinfo):
    """uvloop's own can't be replaced: the loop that is handed to `_resolve` is."""
    real = transport._dialer._resolve

    class Loop:
        def __init__(self, loop):
            self.time, self.getaddrinfo = loop.time, getaddrinfo

    monkeypatch.setattr(dial.Dialer, "_resolve", lambda self, loop: real.__func__(self, Loop(loop)))


async def test_a_dead_address_costs_a_head_start_and_no_more(monkeypatch):
    """Where the first address does not answer, the next is tried beside it (happy eyeballs)."""
    monkeypatch.setattr(dial, "HEAD_START", 0.01)
    connect = dial._connect
    cancelled = asyncio.Event()

    async def slow(loop, address):
        if address[1][0] == "127.0.0.9":
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return await connect(loop, address)

    async def getaddrinfo(host, port, **_):
        return [(socket.AF_INET, 1, 6, "", (ip, port)) for ip in ("127.0.0.9", "127.0.0.8", "127.0.0.1")]

    monkeypatch.setattr(dial, "_connect", slow)
    async with running(Upstream(), host="up.example") as transport:
        _replace(monkeypatch, transport, getaddrinfo)
        assert await post(transport) == (200, b"ok")  # 127.0.0.8 refuses
        await asyncio.wait_for(cancelled.wait(), 5)


async def test_connecting_has_a_limit(monkeypatch):
    """A host that does not answer is a timeout, and holds no slot."""

    async def never(loop, address):
        await asyncio.Event().wait()

    async with running(Upstream(), max_connections=1, connect_timeout=0.05) as transport:
        real, dial._connect = dial._connect, never
        try:
            await refused(transport, Cause.TIMEOUT)
        finally:
            dial._connect = real
        assert await post(transport) == (200, b"ok")


async def test_tls_is_verified_names_its_host_and_is_resumed(tmp_path):
    """An unknown authority and another name are refused; the second connection resumes the first one's session."""
    both, authority = certificate_for("localhost", tmp_path)
    close = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    resumed, names = [], []

    async def answer(reader, writer):
        await reader.readexactly(2)
        resumed.append(writer.get_extra_info("ssl_object").session_reused)
        writer.write(close)
        writer.close()

    upstream = Upstream(answer)
    async with running(upstream, scheme="https", host="localhost", certificate=both, ca_file=authority) as transport:
        transport._dialer._tls.context.sslobject_class.do_handshake = _noting(transport, names)
        for _ in range(3):
            assert await post(transport) == (200, b"ok")
        assert resumed == [False, True, True]
        port = upstream.port
        options = {"connect_timeout": 5, "max_reply": SMALL}
        for url, file in ((f"https://localhost:{port}", None), (f"https://127.0.0.1:{port}", authority)):
            other = HttpTransport(url, ca_file=file, **options)
            await refused(other, Cause.TLS)
            await other.close()
    assert set(names) == {"localhost"}


def _noting(transport, names):
    real = transport._dialer._tls.context.sslobject_class.do_handshake

    def do_handshake(self):
        names.append(self.server_hostname)
        return real(self)

    return do_handshake


@pytest.mark.parametrize("told", [True, False])
async def test_over_tls_only_its_own_end_ends_a_body_without_length(told, tmp_path):
    """The end that TLS tells is the body's; a connection that is cut below it is a body cut off."""
    both, authority = certificate_for("localhost", tmp_path)

    async def answer(reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        await writer.drain()
        await asyncio.sleep(0.05)
        if told:
            writer.close()
        else:
            with socket.fromfd(writer.get_extra_info("socket").fileno(), socket.AF_INET, socket.SOCK_STREAM) as below:
                below.shutdown(socket.SHUT_RDWR)

    upstream = Upstream(answer)
    async with running(upstream, scheme="https", host="localhost", certificate=both, ca_file=authority) as transport:
        if told:
            assert await post(transport) == (200, b"all of it")
        else:
            await refused(transport, Cause.TRUNCATED)


class Proxy:
    """CONNECT, then bytes both ways; or one canned refusal."""

    def __init__(self, answer=b"HTTP/1.1 200 Connection established\r\n\r\n"):
        self.answer, self.heads, self.writers = answer, [], []

    async def serve(self, reader, writer):
        self.writers.append(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        writer.write(self.answer)
        if not self.answer.startswith(b"HTTP/1.1 200 C"):
            return
        host, port = head.split(b" ")[1].rsplit(b":", 1)
        there, back = await asyncio.open_connection(host.decode(), int(port))
        self.writers.append(back)

        async def copy(source, target):
            while data := await source.read(65536):
                target.write(data)
            target.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))


@asynccontextmanager
async def proxied(proxy, url, *, user="user:p%40ss@", **options):
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    via = f"http://{user}127.0.0.1:{server.sockets[0].getsockname()[1]}"
    transport = HttpTransport(url, connect_timeout=5, max_reply=SMALL, proxy=via, **options)
    try:
        yield transport
    finally:
        await transport.close()
        for writer in proxy.writers:
            writer.close()
        server.close()
        await asyncio.sleep(0.02)


CREDENTIALS = base64.b64encode(b"user:p@ss")


async def test_a_proxy_gives_a_tunnel_to_an_https_upstream(tmp_path):
    """It is asked for a tunnel with its password, and sees nothing of what goes through; TLS is the upstream's."""
    both, authority = certificate_for("localhost", tmp_path)
    upstream, proxy = Upstream(), Proxy()
    async with running(upstream, scheme="https", host="localhost", certificate=both, ca_file=authority):
        url = f"https://localhost:{upstream.port}/v1"
        async with proxied(proxy, url, ca_file=authority) as transport:
            assert await post(transport) == (200, b"ok")
            assert await post(transport) == (200, b"ok")
    place = b"localhost:%d" % upstream.port
    assert proxy.heads == [
        b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nProxy-Authorization: Basic %b\r\n\r\n" % (place, place, CREDENTIALS)
    ]
    assert b"proxy" not in upstream.heads[0].lower()


async def test_a_proxy_is_asked_for_the_whole_url_of_an_http_upstream():
    """Plain HTTP goes by the absolute form, with the proxy's password and the upstream's host."""
    proxy = Proxy(b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok")
    async with proxied(proxy, "http://up.example/v1") as transport:
        assert await post(transport) == (201, b"ok")
    assert proxy.heads == [
        b"POST http://up.example/v1/chat/completions HTTP/1.1\r\nHost: up.example\r\n"
        b"Proxy-Authorization: Basic %b\r\nContent-Length: 2\r\n\r\n" % CREDENTIALS
    ]


@pytest.mark.parametrize(
    "answer,told",
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "HTTP 407"),
        (b"HTTP/1.1 200 OK\r\n\r\nmore", "not valid"),
        (b"SSH-2.0\r\n\r\n", "not valid"),
    ],
)
async def test_a_proxy_that_refuses_is_named_without_its_password(answer, told):
    """The failure says what the proxy answered, and holds neither address nor password."""
    async with proxied(Proxy(answer), "https://up.example/v1") as transport:
        error = await refused(transport, Cause.CONNECTION)
    assert told in error.message
    assert "p@ss" not in error.message
    assert "p%40ss" not in repr(error)
