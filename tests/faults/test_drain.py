"""What becomes of connections on which nothing was asked yet, or not all of it, when the gateway ends."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

from gateway import server
from gateway.kit.testing import Gateway
from gateway.tasks import Tasks
from tests.faults.raw import connect, head, request
from tests.stores.certificates import certificate_for

PATIENT = 20.0


async def test_who_was_let_in_is_heard(monkeypatch):
    """A connection that was accepted is answered, however little of its request had come; another can't know of it."""
    monkeypatch.setattr(server, "NEWCOMER_SECONDS", PATIENT)
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
            assert reply.status == 200
            assert await raw.ended()
        assert await draining == 0


async def test_who_says_nothing_holds_up_nobody(monkeypatch):
    """A connection that was opened for later, as browsers and load balancers do, is closed after a moment."""
    monkeypatch.setattr(server, "NEWCOMER_SECONDS", 0.1)
    async with Gateway.test() as gw, connect(gw) as silent, connect(gw) as other:
        await other.send(head(gw, method="GET", path="/health"))
        assert (await other.reply()).status == 200  # so the first was accepted too
        async with asyncio.timeout(5):
            assert await gw.worker.server.drain(0, PATIENT) == 0
        assert await silent.ended()


async def test_a_handshake_that_has_begun_is_waited_for(tmp_path, monkeypatch):
    """With TLS nobody knows of a connection before its handshake is over; it is answered all the same."""
    monkeypatch.setattr(server, "NEWCOMER_SECONDS", PATIENT)
    both, authority = certificate_for("localhost", tmp_path)
    settings = {"server": {"tls": {"cert_file": str(both), "key_file": str(both)}}}
    trust = ssl.create_default_context(cafile=str(authority))
    async with Gateway.test(settings=settings) as gw:
        async with connect(gw, tls=trust) as known, connect(gw) as begun:
            await known.send(head(gw, method="GET", path="/health"))
            assert (await known.reply()).status == 200
            draining = Tasks().spawn(gw.worker.server.drain(0, PATIENT), "drain")
            assert await known.ended()
            reader = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(reader)
            loop = asyncio.get_running_loop()
            transport = await loop.start_tls(begun.writer.transport, protocol, trust, server_hostname="localhost")
            transport.write(request(gw))
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            with contextlib.suppress(ConnectionError):
                await reader.read()
        assert await draining == 0
