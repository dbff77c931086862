"""The proxies of deploy/proxies before a real gateway: what they must not do to streams, uploads and those who leave."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Body, Json, ScriptedUpstream, Stream, Until, chat_completion, chat_events
from gateway.settings import ServerSettings
from gateway.units import parse_duration
from tests.deploy.proxies import NAMES, SHIPPED, command, proxied
from tests.faults.raw import CHAT, Raw, connect, head, request
from tests.integration.process import REPOSITORY
from tests.integration.test_listening import chat, instance
from tests.stores.certificates import certificate_for

STREAM = {**CHAT, "stream": True}
each_proxy = pytest.mark.parametrize("name", NAMES)


class Watching:
    """Notes of each request what a proxy told of its client, and on which connection it came."""

    reads_settings = ()

    def __init__(self, config: Any, services: Any) -> None:
        del config, services
        self.told: list[list[str]] = []
        self.connections: set[Any] = set()

    @hookimpl
    async def request_received(self, exchange: Any) -> None:
        self.told.append([*exchange.request.getall("x-forwarded-for"), *exchange.request.getall("x-forwarded-proto")])
        self.connections.add(exchange.request._peer)  # its port tells connections apart


@dataclass(frozen=True)
class Behind:
    gateway: Gateway
    port: int
    context: ssl.SSLContext

    @property
    def watching(self) -> Watching:
        found: Watching = self.gateway.plugin("Watching")
        return found

    @property
    def upstream(self) -> ScriptedUpstream:
        return self.gateway.upstream

    def connect(self, source: str = "127.0.0.1") -> contextlib.AbstractAsyncContextManager[Raw]:
        return connect(self.port, tls=self.context, source=source)

    def request(self, *args: Any, **how: Any) -> bytes:
        return request(self.gateway, *args, host="localhost", **how)


@contextlib.asynccontextmanager
async def behind(name: str, folder: Path, *answers: Any, **settings: Any) -> AsyncIterator[Behind]:
    async with (
        Gateway.test(
            plugins=["api_keys", Watching], upstream=ScriptedUpstream(*answers), settings={"server": settings}
        ) as gateway,
        proxied(name, folder, gateway.worker.port) as proxy,
    ):
        yield Behind(gateway, proxy.port, proxy.context)


def begun(text: str) -> tuple[list[Any], list[Any]]:
    """A stream up to its first content, and the rest of it."""
    events = chat_events(f"{text} two", pieces=2)
    at = next(n for n, event in enumerate(events) if text in str(event))
    return events[: at + 1], events[at + 1 :]


@each_proxy
def test_its_own_tool_takes_the_file(name: str, tmp_path: Path) -> None:
    """`nginx -t`, `caddy validate`, `haproxy -c`: the shipped file is valid, and nothing in it gives a warning."""
    both, _ = certificate_for("localhost", tmp_path)
    done = command(name, tmp_path, "127.0.0.1:8080", 8443, both).checked()
    said = [line for line in (done.stdout + done.stderr).splitlines() if "warn" in line.lower()]
    assert done.returncode == 0, done.stderr
    # about the lines that the tests put around it
    assert [line for line in said if "not formatted" not in line and "redirects are disabled" not in line] == []


def test_they_wait_longer_than_the_gateway() -> None:
    """No proxy gives a request up before the gateway does, nor keeps an idle connection until the gateway closes it."""
    server = ServerSettings()
    production = yaml.safe_load((REPOSITORY / "config" / "production.yaml").read_text())["server"]
    waits = {
        "nginx.conf": [r"proxy_read_timeout (\d+)s;"],
        "Caddyfile": [r"response_header_timeout (\d+)s"],
        "haproxy.cfg": [r"timeout client (\d+)s", r"timeout server (\d+)s"],
    }
    keeps = {
        "nginx.conf": r"^ +keepalive_timeout (\d+)s;",
        "Caddyfile": r"keepalive (\d+)s",
        "haproxy.cfg": r"pool-purge-delay (\d+)s",
    }
    for file, patterns in waits.items():
        text = (SHIPPED / file).read_text()
        for pattern in patterns:
            [seconds] = re.findall(pattern, text, re.MULTILINE)
            assert int(seconds) > server.request_timeout, (file, pattern)
        [kept] = re.findall(keeps[file], text, re.MULTILINE)
        assert int(kept) < min(server.keepalive_timeout, parse_duration(production["drain_delay"])), file


@each_proxy
async def test_an_event_comes_when_it_is_made(name: str, tmp_path: Path) -> None:
    """The first event of a stream arrives while the model still works on the rest, uncompressed; so do audio's bytes."""
    go_on = asyncio.Event()
    first, rest = begun("One")
    audio = Stream(b"a" * 100, Until(go_on), b"b", content_type="audio/mpeg")
    async with behind(name, tmp_path, Stream(*first, Until(go_on), *rest), audio) as it:
        for path, body in (
            ("/v1/chat/completions", STREAM),
            ("/v1/audio/speech", {"model": "m", "input": "x", "voice": "v"}),
        ):
            go_on.clear()
            async with it.connect() as client:
                await client.send(it.request(body, "Accept-Encoding: gzip, br, zstd", path=path))
                async with asyncio.timeout(5):
                    told = await client.reader.readuntil(b"\r\n\r\n")
                    await client.reader.readuntil(b"One" if body is STREAM else b"aaa")
                assert b"content-encoding" not in told.lower()
                assert not go_on.is_set()
                go_on.set()
                async with asyncio.timeout(5):
                    await client.reader.readuntil(b"0\r\n\r\n")


@each_proxy
@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_ends_the_call(name: str, tmp_path: Path, stream: bool) -> None:
    """A client that goes away, in a stream or before a whole answer, ends the call to the model."""
    first, _ = begun("One")
    answer = Stream(*first, end="hang") if stream else Json(chat_completion("late"), delay=60)
    async with behind(name, tmp_path, answer) as it:
        async with it.connect() as client:
            await client.send(it.request(STREAM if stream else CHAT))
            seen = await it.upstream.wait_seen(1)
            if stream:
                async with asyncio.timeout(5):
                    await client.reader.readuntil(b"One")
        await it.upstream.wait_closed(seen, 3)
        [done] = await it.gateway.finished()
        assert done.outcome == "client_disconnect"


@each_proxy
async def test_large_bodies_pass(name: str, tmp_path: Path) -> None:
    """10 MB go through, whole or in chunks; what the gateway takes no more is refused by the gateway, in its words."""
    text = "x" * 10_000_000
    big = {**CHAT, "messages": [{"role": "user", "content": text}]}
    async with behind(name, tmp_path, max_body=11_000_000) as it:
        async with it.connect() as client:
            await client.send(it.request(big))
            assert (await client.reply()).status == 200
            assert it.upstream.seen[0].json["messages"][0]["content"] == text
            whole = it.request(big).partition(b"\r\n\r\n")[2]
            await client.send(
                head(it.gateway, "Transfer-Encoding: chunked", host="localhost")
                + b"%x\r\n%b\r\n0\r\n\r\n" % (len(whole), whole)
            )
            assert (await client.reply()).status == 200
            assert it.upstream.seen[1].json["messages"][0]["content"] == text
        async with it.connect() as client:
            # all of it, as most clients do before they read
            await client.send(it.request({**CHAT, "messages": [{"role": "user", "content": "x" * 12_000_000}]}))
            reply = await client.reply()
            assert (reply.status, reply.data["error"]["code"]) == (413, "request_too_large")


@each_proxy
async def test_connections_to_the_gateway_are_kept(name: str, tmp_path: Path) -> None:
    """Requests of many clients, one after the other, need few connections to the gateway."""
    async with behind(name, tmp_path) as it:
        for _ in range(10):
            async with it.connect() as client:
                for _ in range(2):
                    await client.send(it.request())
                    assert (await client.reply()).status == 200
        assert len(it.watching.told) == 20
        # HAProxy's `http-reuse safe`: a client's first request has a connection that is new to it
        assert len(it.watching.connections) <= (10 if name == "haproxy" else 4)


@each_proxy
async def test_a_client_can_not_say_who_it_is(name: str, tmp_path: Path) -> None:
    """The gateway is told the address that connected and that it spoke TLS, whatever the client said of itself; with the
    proxy among the `trusted_proxies` that is the client's address.
    """
    lines = ("X-Forwarded-For: 6.6.6.6", "X-Forwarded-For: 7.7.7.7, 8.8.8.8", "X-Forwarded-Proto: gopher")
    hop = ("Connection: X-Forwarded-For", "X-Forwarded-For: 6.6.6.6")
    async with behind(name, tmp_path, trusted_proxies=["127.0.0.1"]) as it, it.connect("127.0.0.9") as client:
        for said in (lines, hop, ()):
            await client.send(it.request(None, *said))
            assert (await client.reply()).status == 200
        assert it.watching.told == [["127.0.0.9", "https"]] * 3
        assert [done.request.remote for done in await it.gateway.finished(3)] == ["127.0.0.9"] * 3


@each_proxy
async def test_what_is_not_for_the_world(name: str, tmp_path: Path) -> None:
    """`/metrics` is nobody's, `/admin/` this machine's."""
    async with behind(name, tmp_path) as it:
        for source, path, statuses in (
            ("127.0.0.9", "/metrics", {404}),
            ("127.0.0.9", "/admin/config", {403}),
            ("127.0.0.9", "/%61dmin/config", {403}),
            ("127.0.0.9", "http://localhost/admin/config", {403}),
            ("127.0.0.9", "/%6detrics", {404}),
            ("127.0.0.9", "//admin/config", {403, 404}),
            ("127.0.0.9", "/x/../admin/config", {403, 404}),
            ("127.0.0.1", "/admin/config", {200}),
            ("127.0.0.9", "/health/live", {200}),
        ):
            async with it.connect(source) as client:
                await client.send(it.request(b"", method="GET", path=path))
                assert (await client.reply()).status in statuses, (source, path)


@each_proxy
async def test_the_time_that_it_waits_is_the_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that takes long is waited for by the time that the file says, and by no other: it is 504 when that is up."""
    short = tmp_path / "short"
    short.mkdir()
    for file in SHIPPED.iterdir():
        if file.suffix != ".md":
            (short / file.name).write_text(file.read_text().replace("620s", "1s"))
    monkeypatch.setattr("tests.deploy.proxies.SHIPPED", short)
    async with behind(name, tmp_path, Body(b"late", delay=60)) as it, it.connect() as client:
        await client.send(it.request())
        assert (await client.reply()).status == 504


@pytest.mark.deploy
@each_proxy
async def test_an_upgrade_behind_a_proxy_fails_no_request(name: str, tmp_path: Path) -> None:
    """Another gateway takes over on systemd's socket: each request of clients before the proxy is answered with 200."""
    config = tmp_path / "own.yaml"
    config.write_text(
        "server: {allow_anonymous: true, drain_delay: 5s}\nupstreams: {openrouter: {without_key: simulate}}\n"
    )
    statuses: list[int] = []
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        async with proxied(name, tmp_path, listening.getsockname()[1]) as proxy:

            def go_on() -> None:
                while not over.is_set():
                    client = http.client.HTTPSConnection("localhost", proxy.port, timeout=20, context=proxy.context)
                    with contextlib.closing(client):
                        statuses.extend(chat(client, None) for _ in range(5))

            def upgrade() -> None:
                with ThreadPoolExecutor(4) as asking, contextlib.ExitStack() as old:
                    old.enter_context(instance(tmp_path / "old", config, listening))
                    clients = [asking.submit(go_on) for _ in range(4)]
                    try:
                        with instance(tmp_path / "new", config, listening):
                            old.close()
                            enough = len(statuses) + 100
                            while len(statuses) < enough and not any(client.done() for client in clients):
                                over.wait(0.01)
                            over.set()
                            for client in clients:
                                client.result()
                    finally:
                        over.set()

            await asyncio.to_thread(upgrade)
    assert set(statuses) == {200}
