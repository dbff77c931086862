"""Five hundred streams at once through a real process, and a hundred that outlive its SIGTERM."""

import asyncio
import os
import re
import signal
import time

import aiohttp
import pytest

from gateway.kit.upstream import ScriptedUpstream, Stream, Until, chat_events
from tests.faults.process import config, started
from tests.full.load import PATIENCE, client, many_files, resident
from tests.integration.process import serving_beside
from tests.integration.test_workers import alive, eventually, refused

STREAMS = 500
LEAVING = 100
PIECES = 40
TEXT = "".join(f"<{n:03d}>" for n in range(PIECES))
# Sockets, parsers, tasks and buffers on both sides of one stream (measured: 36 KiB); not its content.
PER_STREAM = 100 * 1024
BODY = {"model": "test/model", "messages": [{"role": "user", "content": "Hi"}], "stream": True}

pytestmark = [pytest.mark.full, pytest.mark.timeout(240)]


class Streams:
    """Each stream stands after half of its text until all have come so far."""

    def __init__(self):
        events = chat_events(TEXT, pieces=PIECES, comments=False, usage=False)
        self.go_on = asyncio.Event()
        half = len(events) // 2
        self.first = TEXT[: (half - 1) * 5]  # the first event names the role
        self.answer = Stream(*events[:half], Until(self.go_on), *events[half:])
        self.halfway, self._arrived = asyncio.Event(), 0

    def arrived(self):
        self._arrived += 1
        if self._arrived == STREAMS:
            self.halfway.set()


def said(body):
    return b"".join(re.findall(rb'"content":"([^"]*)"', body)).decode()


async def read(session, streams, leave=None):
    """The body of one stream, None if it was left half-way."""
    async with session.post("/v1/chat/completions", json=BODY) as reply:
        assert reply.status == 200
        body = b""
        told = False
        while piece := await reply.content.readany():
            body += piece
            if not told and said(body) == streams.first:
                told = True
                streams.arrived()
                if leave is not None:
                    await leave.wait()
                    reply.close()
                    return None
        return body


async def run(gateway, upstream, session, leaving):
    """Start all, see them stand half-way at once, let some leave, see the others through. (bodies, memory then)"""
    streams = Streams()
    upstream.script(*[streams.answer] * STREAMS)
    begun = len(upstream.seen)
    leave = asyncio.Event()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(session, streams, leave if n < leaving else None)) for n in range(STREAMS)]
        await streams.halfway.wait()
        seen = upstream.seen[begun:]
        assert len(seen) == STREAMS
        assert upstream.connections == STREAMS
        memory = resident(gateway.process.pid)
        if leaving:
            leave.set()
            await upstream.wait_connections(STREAMS - leaving)
            assert sum(s.closed.is_set() for s in seen) == leaving
        streams.go_on.set()
    return [task.result() for task in tasks], memory


async def test_five_hundred_streams_at_once(tmp_path):
    """500 streams at once all arrive whole, each in bounded memory; when 100 of their clients leave half-way, their
    upstream connections are closed and the other 400 don't notice.
    """
    with many_files():
        async with ScriptedUpstream() as upstream:
            file = config(tmp_path, upstream, server={"drain_timeout": 1})
            async with started(file) as gateway, client(gateway) as session:
                before = resident(gateway.process.pid)

                bodies, memory = await run(gateway, upstream, session, 0)
                assert {said(body) for body in bodies} == {TEXT}
                assert all(body.endswith(b"data: [DONE]\n\n") for body in bodies)
                assert (memory - before) / STREAMS < PER_STREAM

                bodies, again = await run(gateway, upstream, session, LEAVING)
                whole = [body for body in bodies if body is not None]
                assert len(whole) == STREAMS - LEAVING
                assert {said(body) for body in whole} == {TEXT}
                assert all(body.endswith(b"data: [DONE]\n\n") for body in whole)
                # what the first 500 took is used again
                assert again < memory * 1.1

                async with session.get("/health/ready") as reply:
                    assert (reply.status, (await reply.json())["status"]) == (200, "ok")
                gateway.signal()
                assert await gateway.exit_code() == 0
                assert b"drain_cut_requests" not in gateway.err
                await upstream.wait_connections(0)


LIVE = 100
DRAIN = 20.0


async def test_a_hundred_streams_outlive_sigterm(tmp_path):
    """SIGTERM with a hundred live streams on two workers: each ends whole within the drain time, none is cut, and new
    connections are refused meanwhile.
    """
    gates = [asyncio.Event() for _ in range(LIVE)]
    events = chat_events(TEXT, pieces=PIECES, comments=False, usage=False)
    half = len(events) // 2
    streams = [Stream(*events[:half], Until(gate), *events[half:]) for gate in gates]
    with many_files():
        async with ScriptedUpstream(*streams) as upstream:
            server = {"workers": 2, "drain_timeout": DRAIN, "drain_delay": 0}
            file = config(tmp_path, upstream, server=server, services={"redis": "embedded"})
            async with serving_beside(tmp_path, "--config", file) as running, asyncio.timeout(PATIENCE):
                headers = {"Authorization": f"Bearer {running.key}"}
                async with aiohttp.ClientSession(
                    running.url, headers=headers, connector=aiohttp.TCPConnector(limit=0)
                ) as session:
                    replies = [await session.post("/v1/chat/completions", json=BODY) for _ in range(LIVE)]
                    assert {reply.status for reply in replies} == {200}
                    begun = time.monotonic()
                    os.kill(running.pid, signal.SIGTERM)
                    await asyncio.to_thread(eventually, lambda: refused(running))
                    assert upstream.connections == LIVE
                    for gate in gates:  # one after the other: the last ones have waited for all others
                        gate.set()
                        await asyncio.sleep(0.01)
                    bodies = await asyncio.gather(*(reply.read() for reply in replies))
                await asyncio.to_thread(eventually, lambda: not alive(running.pid))
                assert time.monotonic() - begun < DRAIN
    assert {said(body) for body in bodies} == {TEXT}
    assert all(body.endswith(b"data: [DONE]\n\n") for body in bodies)
    assert "drain_cut_requests" not in "".join(running.said)
