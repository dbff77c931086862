"""What both transports make of connections that fail or are given up, stage by stage."""

from __future__ import annotations

import asyncio
import ssl
from datetime import timedelta

import pytest

from gateway.errors import Cause
from tests.stores.certificates import certificate_for
from tests.transport.client import ask, both, connected
from tests.transport.corpus import Whole, sized
from tests.transport.server import SECONDS, serving, turns

OK = sized(b"hello")


def tls_server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def answer_all(peer):
    while await peer.request() is not None:
        await peer.write(OK)


def is_ok(meaning):
    return isinstance(meaning, Whole) and (meaning.status, meaning.body) == (200, b"hello")


@both
@pytest.mark.parametrize("fault", ["none", "expired", "another name", "another authority"])
async def test_a_certificate_that_does_not_hold_is_refused(make, fault, tmp_path):
    """Expired, for another name or by an unknown authority: the cause is `tls`, and no request is sent."""
    name = "elsewhere.test" if fault == "another name" else "localhost"
    certificate, authority = certificate_for(name, tmp_path, age=timedelta(days=9 if fault == "expired" else 0))
    trusted = None if fault == "another authority" else authority
    async with serving(answer_all, tls=tls_server(certificate)) as server:
        async with connected(f"https://localhost:{server.port}", make, ca_file=trusted) as made:
            meaning = await ask(made, "/")
        assert is_ok(meaning) if fault == "none" else meaning == Cause.TLS
        assert len(server.requests) == (fault == "none")


@both
@pytest.mark.parametrize("fault", ["closes", "resets", "speaks HTTP"])
async def test_a_handshake_that_breaks_off_is_a_failure(make, fault):
    """A server that leaves during the handshake, or speaks no TLS, is not waited for."""

    async def play(peer):
        await peer.reader.read(1 << 16)
        match fault:
            case "closes":
                peer.writer.close()
            case "resets":
                peer.reset()
            case _:
                await peer.write(OK)

    async with (
        serving(play) as server,
        connected(server.url.replace("http", "https"), make) as made,
        asyncio.timeout(SECONDS),
    ):
        assert await ask(made, "/") in {Cause.TLS, Cause.CONNECTION}


@both
@pytest.mark.parametrize("fault", ["closed", "reset", "half a head", "reset in the body"])
async def test_what_fails_on_a_new_connection_is_not_sent_again(make, fault):
    """The upstream may have done it: it has seen one request."""

    async def play(peer):
        await peer.request()
        match fault:
            case "half a head":
                await peer.write(OK[:20])
            case "reset in the body":
                await peer.write(OK[:-2])
        if fault in {"reset", "reset in the body"}:
            peer.reset()
        else:
            peer.writer.close()

    async with serving(play) as server:
        async with connected(server.url, make) as made:
            assert await ask(made, "/") == (Cause.TRUNCATED if fault == "reset in the body" else Cause.CONNECTION)
        assert len(server.requests) == 1


async def test_an_answer_before_the_question_is_no_later_ones():
    """A server that speaks first is refused or taken at its word; what it says then is nobody's answer."""

    async def play(peer):
        await peer.write(sized(b"early"))
        while (request := await peer.request()) is not None:
            await peer.write(sized(request.path.encode()))

    async with serving(play) as server, connected(server.url) as made:
        for number in range(5):
            meaning = await ask(made, f"/{number}")
            assert meaning == Cause.CONNECTION or meaning.body in {b"early", f"/{number}".encode()}
            await turns(20)


@both
@pytest.mark.parametrize("stage", ["handshake", "body sent", "head awaited", "head begun", "body awaited"])
async def test_who_gives_up_leaves_no_connection_and_its_place(make, stage, tmp_path):
    """A request that is cancelled closes its connection, whatever was under way; with a limit of one the next is served."""
    certificate, authority = certificate_for("localhost", tmp_path)
    reached, given_up, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
    body = bytes(8 << 20) if stage == "body sent" else b"{}"

    async def stuck(peer):
        if stage == "handshake":
            reached.set()
            await peer.gone()
        else:
            await peer.writer.start_tls(tls_server(certificate))
            await peer.head()
            match stage:
                case "head begun":
                    await peer.write(OK[:20])
                case "body awaited":
                    await peer.write(OK[:-2])
            reached.set()
            await given_up.wait()  # what it sends until then is not read
            await peer.gone()
        gone.set()

    async def play(peer):
        if not reached.is_set():
            await stuck(peer)
            return
        await peer.writer.start_tls(tls_server(certificate))
        await answer_all(peer)

    async def request(made):
        reply = await made.send("POST", "/", {}, body)
        try:
            await reply.read(1 << 20)
        finally:
            reply.close()

    async with (
        serving(play) as server,
        connected(f"https://localhost:{server.port}", make, ca_file=authority, max_connections=1) as made,
        asyncio.timeout(SECONDS),
    ):
        task = asyncio.create_task(request(made))  # noqa: TID251
        await reached.wait()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        given_up.set()
        await gone.wait()
        assert is_ok(await ask(made, "/"))
        assert server.open == 1
