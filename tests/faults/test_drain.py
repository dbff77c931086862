"""What becomes of connections on which nothing was asked yet, or not all of it, when the gateway ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

import pytest
import uvloop

from gateway import server
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Json, ScriptedUpstream, chat_completion
from gateway.tasks import Tasks
from tests.faults.raw import connect, head, request
from tests.stores.certificates import certificate_for

PATIENT = 20.0


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine on a loop of either kind."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else None

    def on_loop(coroutine):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(coroutine)

    return on_loop


async def test_who_was_let_in_is_heard(monkeypatch):
    """A connection that was accepted is answered, however little of its request had come; another can't know of it."""
    monkeypatch.setattr(server, "LAST_SECONDS", PATIENT)
    async with (
        Gateway.test() as gw,
        connect(gw) as nothing,
        connect(gw) as half_a_head,
        connect(gw) as half_a_body,
        connect(gw) as idle,
    ):
        whole = request(gw)
        at = whole.index(b"\r\n\r\n")
        await half_a_head.send(whole[: at - 10])
        await half_a_body.send(head(gw, f"Content-Length: {len(whole) - at - 4}", "Expect: 100-continue"))
        assert (await half_a_body.reply()).status == 100
        await half_a_body.send(whole[at + 4 : at + 10])
        await idle.send(head(gw, method="GET", path="/health"))
        assert (await idle.reply()).status == 200

        draining = Tasks().spawn(gw.worker.server.drain(0, PATIENT), "drain")
        assert await idle.ended()
        for raw, rest in ((nothing, whole), (half_a_head, whole[at - 10 :]), (half_a_body, whole[at + 10 :])):
            await raw.send(rest)
            reply = await raw.reply()
            assert (reply.status, reply.headers["connection"]) == (200, "close")
            assert await raw.ended()
        assert await draining == 0


@pytest.mark.parametrize("turns", range(5))
def test_who_comes_at_the_last_moment_is_heard(run, turns):
    """In whichever turn of the loop a connection comes, it is answered or left to another instance on that socket."""

    async def last():
        async with Gateway.test() as gw:
            with gw.worker._sockets[0].dup() as another, socket.socket() as late:
                another.setblocking(False)
                draining = Tasks().spawn(gw.worker.server.drain(0, PATIENT), "drain")
                for _ in range(turns):
                    await asyncio.sleep(0)
                late.connect(("127.0.0.1", gw.worker.port))
                late.sendall(request(gw))
                late.setblocking(False)
                async with asyncio.timeout(5):
                    assert await draining == 0
                with contextlib.suppress(BlockingIOError):
                    another.accept()[0].close()
                    return
                assert late.recv(65536).startswith(b"HTTP/1.1 200")

    run(last())


async def test_who_says_nothing_holds_up_nobody(monkeypatch):
    """A connection that was opened for later, as browsers and load balancers do, is closed after a moment."""
    monkeypatch.setattr(server, "LAST_SECONDS", 0.1)
    async with Gateway.test() as gw, connect(gw) as silent, connect(gw) as other:
        await other.send(head(gw, method="GET", path="/health"))
        assert (await other.reply()).status == 200  # so the first was accepted too
        async with asyncio.timeout(5):
            assert await gw.worker.server.drain(0, PATIENT) == 0
        assert await silent.ended()


async def test_who_was_just_answered_may_have_asked_again(monkeypatch):
    """A client that keeps its connection asks again at once: the request that crosses the end is its last one there."""
    monkeypatch.setattr(server, "MOMENT", PATIENT)
    monkeypatch.setattr(server, "TURN", 0)
    monkeypatch.setattr(server, "LAST_SECONDS", PATIENT)
    async with Gateway.test() as gw, connect(gw) as kept:
        await kept.send(request(gw))
        assert (await kept.reply()).headers.get("connection") != "close"
        draining = Tasks().spawn(gw.worker.server.drain(0, PATIENT), "drain")
        while gw.worker.server._sockets[0].is_serving():
            await asyncio.sleep(0)
        for _ in range(10):  # looks at who is idle
            await asyncio.sleep(0)
        await kept.send(request(gw))
        reply = await kept.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await kept.ended()
        assert await draining == 0


def test_a_slow_reader_gets_all_of_its_reply(run):
    """The process does not end before what it wrote has left it."""

    async def read_slowly():
        answer = Json(chat_completion("x" * 60_000))
        async with (
            Gateway.test(upstream=ScriptedUpstream(default=answer)) as gw,
            connect(gw, receive_buffer=4096) as slow,
        ):
            await slow.send(head(gw, method="GET", path="/health"))
            assert (await slow.reply()).status == 200
            [connection] = gw.worker.server._listener.connections
            connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            slow.writer.transport.pause_reading()
            await slow.send(request(gw))
            await gw.finished(2)
            assert connection.transport.get_write_buffer_size() > 0
            draining = Tasks().spawn(gw.worker.server.drain(0, PATIENT), "drain")
            done, _ = await asyncio.wait({draining}, timeout=0.5)
            assert not done
            slow.writer.transport.resume_reading()
            assert len((await slow.reply()).data["choices"][0]["message"]["content"]) == 60_000
            assert await draining == 0

    run(read_slowly())


def tls(folder):
    """Settings, and what a client trusts."""
    both, authority = certificate_for("localhost", folder)
    settings = {"server": {"tls": {"cert_file": str(both), "key_file": str(both)}}}
    return settings, ssl.create_default_context(cafile=str(authority))


async def shake_hands(raw, trust):
    """A reader and a transport of a connection that was open without TLS."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    return reader, await loop.start_tls(raw.writer.transport, protocol, trust, server_hostname="localhost")


async def test_a_handshake_that_has_begun_is_waited_for(tmp_path, monkeypatch):
    """With TLS nobody knows of a connection before its handshake is over; it is answered all the same."""
    monkeypatch.setattr(server, "LAST_SECONDS", PATIENT)
    settings, trust = tls(tmp_path)
    async with Gateway.test(settings=settings) as gw:
        async with connect(gw, tls=trust) as known, connect(gw) as begun:
            await known.send(head(gw, method="GET", path="/health"))
            assert (await known.reply()).status == 200
            draining = Tasks().spawn(gw.worker.server.drain(0, PATIENT), "drain")
            assert await known.ended()
            reader, transport = await shake_hands(begun, trust)
            transport.write(request(gw))
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            with contextlib.suppress(ConnectionError):
                await reader.read()
        assert await draining == 0


async def test_a_handshake_that_takes_too_long_is_heard_no_more(tmp_path, monkeypatch):
    """Nothing begins when plugins and upstreams are being closed: nobody would count it."""
    monkeypatch.setattr(server, "LAST_SECONDS", 0.1)
    settings, trust = tls(tmp_path)
    async with Gateway.test(settings=settings) as gw, connect(gw, tls=trust) as known, connect(gw) as late:
        await known.send(head(gw, method="GET", path="/health"))
        assert (await known.reply()).status == 200
        assert await gw.worker.server.drain(0, PATIENT) == 0
        with contextlib.suppress(ConnectionError):
            reader, transport = await shake_hands(late, trust)
            transport.write(request(gw))
            assert await reader.read() == b""
        assert not gw.upstream.seen


async def test_handshakes_that_broke_hold_up_nobody(tmp_path, monkeypatch):
    """A load balancer's health check that only connects, or a scanner, is not waited for."""
    monkeypatch.setattr(server, "LAST_SECONDS", PATIENT)
    settings, trust = tls(tmp_path)
    async with Gateway.test(settings=settings) as gw:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"):
            async with connect(gw) as broken:
                await broken.send(said)
        async with connect(gw, tls=trust) as known:
            await known.send(head(gw, method="GET", path="/health"))
            assert (await known.reply()).status == 200
        async with asyncio.timeout(5):
            assert await gw.worker.server.drain(0, PATIENT) == 0
