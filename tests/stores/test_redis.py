"""A Redis that answers, but not as it should: full, read-only, locked, untrusted; and a crowd that asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from pathlib import Path

import pytest
import redis.asyncio
import structlog

from gateway.errors import StatementError, StoreUnavailable
from gateway.kit.testing import Gateway
from gateway.logs import scrub
from gateway.metrics import Metrics
from gateway.settings import load_text
from gateway.stores import open_redis
from gateway.stores.redis import MAX_CONNECTIONS, TIMEOUT, RedisStore
from tests.integration.process import serving_beside
from tests.stores.certificates import certificate_for
from tests.stores.servers import emptied, valkey_server
from tests.tools import free_port

CERTIFICATE = Path(__file__).parents[1] / "faults" / "untrusted.pem"
ECHO = "return ARGV[1]"
LIMIT = {"name": "all", "by": [], "requests": 1000, "per": "1h"}
BUDGET = {"name": "all", "by": [], "usd": 100, "per": "total"}


@contextlib.asynccontextmanager
async def opened(url):
    store = RedisStore(url)
    try:
        yield store
    finally:
        await store.close()


async def back(store):
    async with asyncio.timeout(10):
        while store.is_open:
            await asyncio.sleep(0.02)


async def test_scripts_that_run_at_once_get_their_own_answers(server):
    """Hundreds at once, some of them given up: each of the others gets what it asked for."""
    async with opened(server.url) as store:

        async def ask(number):
            async with asyncio.timeout(0 if number % 7 == 0 else None):
                return int(await store.script(ECHO, [f"k{number}"], [number]))

        answers = await asyncio.gather(*map(ask, range(500)), return_exceptions=True)
        assert [a for i, a in enumerate(answers) if i % 7] == [i for i in range(500) if i % 7]
        assert not store.is_open


async def test_a_server_that_forgot_its_scripts_is_told_them_again(server):
    """After SCRIPT FLUSH, as after a restart, the next call works as the one before."""
    async with opened(server.url) as store:
        assert await store.script(ECHO, ["k"], ["a"]) == b"a"
        await store.client.script_flush()
        answers = await asyncio.gather(*(store.script(ECHO, ["k"], [i]) for i in range(50)))
        assert answers == [b"%d" % i for i in range(50)]
        assert store.failures == 0


async def test_a_wrong_script_is_no_outage(server):
    """Whoever sends nonsense is told so, and nobody else is kept from the server."""
    async with opened(server.url) as store:
        with pytest.raises(StatementError):
            await store.script("return redis.call('NOSUCH')", ["k"], [])
        with pytest.raises(StatementError):
            await store.call(lambda: store.client.execute_command("NOSUCH"))
        assert await store.script(ECHO, ["k"], ["a"]) == b"a"


async def test_a_connection_that_idles_may_be_closed(server):
    """A server that closes idle connections, or was restarted while nobody asked, costs no request its answer."""
    async with opened(server.url) as store:
        await store.script(ECHO, ["k"], ["a"])
        async with redis.asyncio.Redis.from_url(server.url) as other:
            await other.client_kill_filter(skipme=True)
        async with asyncio.timeout(5):
            while not store._line.closed:
                await asyncio.sleep(0.01)
        assert await store.script(ECHO, ["k"], ["a"]) == b"a"
        assert store.failures == 0


async def test_a_frozen_server_costs_one_time_out(server):
    """Of hundreds that ask at once none waits longer than one time-out; later ones do not wait at all."""
    async with opened(server.url) as store:
        loop = asyncio.get_running_loop()
        await store.script(ECHO, ["k"], ["a"])
        server.freeze()
        try:
            begun = loop.time()
            answers = await asyncio.gather(
                *(store.script(ECHO, ["k"], [i]) for i in range(300)), return_exceptions=True
            )
            took = loop.time() - begun
            assert {type(a) for a in answers} == {StoreUnavailable}
            assert took < 3 * TIMEOUT
            begun = loop.time()
            for _ in range(1000):
                with pytest.raises(StoreUnavailable):
                    await store.script(ECHO, ["k"], ["a"])
            assert loop.time() - begun < TIMEOUT
        finally:
            server.thaw()
        await back(store)
        assert await store.script(ECHO, ["k"], ["a"]) == b"a"


async def test_a_store_is_told_of(server):
    """In the metrics: how long each call takes, how many failed, and 0 while it is away."""
    metrics = Metrics()
    store = RedisStore(server.url, metrics)

    async def told():
        store.tell()
        return {family.name: family.series[0] for family in await metrics.read()}

    try:
        await store.script(ECHO, ["k"], [1])
        await store.ping()
        found = await told()
        assert sum(found["xenios_store_seconds"].counts) == 2
        assert 0 < found["xenios_store_seconds"].value < 1
        assert (found["xenios_store_up"].value, found["xenios_store_errors_total"].value) == (1, 0)
        server.freeze()
        try:
            with pytest.raises(StoreUnavailable):
                await store.script(ECHO, ["k"], [1])
            found = await told()
            assert (found["xenios_store_up"].value, found["xenios_store_errors_total"].value) == (0, 1)
            assert found["xenios_store_up"].labels == ("redis",)
        finally:
            server.thaw()
        await back(store)
        assert (await told())["xenios_store_up"].value == 1
    finally:
        await store.close()


async def test_more_questions_than_connections_are_no_outage(server):
    """Too many at once are refused by themselves; the others, and who comes next, are answered."""
    async with opened(server.url) as store, contextlib.AsyncExitStack() as held:
        for _ in range(MAX_CONNECTIONS):
            connection = await store.client.connection_pool.get_connection()
            held.push_async_callback(store.client.connection_pool.release, connection)
        answers = await asyncio.gather(*(store.ping() for _ in range(20)), return_exceptions=True)
        assert {type(a) for a in answers} == {StoreUnavailable}
        assert not store.is_open
        assert await store.script(ECHO, ["k"], ["a"]) == b"a"


# --- a server that can't -----------------------------------------------------------------------------------------------

UNABLE = {
    "no memory left": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
    "read-only replica": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    "too few replicas": (
        ("CONFIG", "SET", "min-replicas-to-write", "1"),
        ("CONFIG", "SET", "min-replicas-to-write", "0"),
    ),
    "no rights": (("ACL", "SETUSER", "default", "-@scripting"), ("ACL", "SETUSER", "default", "+@all")),
}


@pytest.mark.parametrize("fault", UNABLE)
@pytest.mark.parametrize(("policy", "status", "ready"), [("allow", 200, "degraded"), ("deny", 503, "failed")])
async def test_a_server_that_can_not_write_is_away(fault, policy, status, ready):
    """Its errors are an outage as any other: by the policy, never 500; readiness says so; it is found back."""
    spoil, mend = UNABLE[fault]
    with valkey_server() as server:
        plugins = [
            "api_keys",
            {"use": "rate_limit", "config": {"limits": [LIMIT], "on_store_error": policy}},
            {"use": "budgets", "config": {"budgets": [BUDGET], "unknown_price": "allow", "on_store_error": policy}},
        ]
        async with (
            redis.asyncio.Redis.from_url(server.url) as admin,
            Gateway.test(plugins=plugins, settings={"services": {"redis": server.url}}) as gw,
        ):
            assert (await gw.chat()).status == 200
            await admin.execute_command(*spoil)
            replies = [await gw.chat() for _ in range(5)]
            assert {r.status for r in replies} == {status}
            if status == 503:
                assert {r.data["error"]["code"] for r in replies} == {"store_unavailable"}
            if fault != "no rights":
                assert (await gw.get("/health/ready")).data["status"] == ready
            await admin.execute_command(*mend)
            async with asyncio.timeout(10):
                while "x-ratelimit-remaining-requests" not in (await gw.chat()).headers:
                    await asyncio.sleep(0.05)
            assert (await gw.get("/health/ready")).data["status"] == "ok"


# --- who may not come in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("password", ["", ":wr0ng-secret@"])
async def test_a_password_that_is_missing_or_wrong_is_said(password):
    """The log says what to set, and holds no password."""
    port = free_port()
    options = ("--requirepass", "r1ght-secret", "--port", str(port))
    with valkey_server(*options), structlog.testing.capture_logs() as logs:
        url = f"redis://{password}127.0.0.1:{port}/0"
        settings = load_text(
            f"upstreams: {{openrouter: {{without_key: simulate}}}}\nservices: {{redis: '{url}'}}"
        ).settings
        async with open_redis(settings, None) as store:
            with pytest.raises(StoreUnavailable):
                await store.ping()
            with pytest.raises(StoreUnavailable):
                await store.script(ECHO, ["k"], ["a"])
        [said] = [entry for entry in logs if entry["event"] == "redis_away"]
        assert "user and password" in said["hint"]
        assert "secret" not in str(logs)
        assert not password or "wr0ng" not in scrub("the server says wr0ng-secret")


async def test_a_certificate_that_nobody_signed_is_said():
    """rediss:// to a server whose certificate isn't trusted: away, and the log says what to name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    listening = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    port = listening.sockets[0].getsockname()[1]
    with structlog.testing.capture_logs() as logs:
        async with listening, opened(f"rediss://127.0.0.1:{port}/0") as store:
            with pytest.raises(StoreUnavailable):
                await store.script(ECHO, ["k"], ["a"])
    [said] = [entry for entry in logs if entry["event"] == "redis_away"]
    assert "ssl_ca_certs" in said["hint"]


@pytest.mark.parametrize("tls", [False, True])
async def test_what_is_posted_is_done_and_nothing_answered(server, tmp_path, tls):
    """Scripts whose answer nobody hears run in their order; a server that goes away is noticed, and found again."""
    certificate, authority = certificate_for("localhost", tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    answered, writers = [], []

    async def pipe(reader, writer, seen):
        writers.append(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                seen.append(data)
                writer.write(data)
        writer.close()

    async def front(reader, writer):
        behind = await asyncio.open_unix_connection(server.socket)
        await asyncio.gather(pipe(reader, behind[1], []), pipe(behind[0], writer, answered))

    listening = await asyncio.start_server(front, "localhost", 0, ssl=context if tls else None)
    port = listening.sockets[0].getsockname()[1]
    url = f"rediss://localhost:{port}/0?ssl_ca_certs={authority}" if tls else f"redis://localhost:{port}/0"
    add = "return redis.call('APPEND', KEYS[1], ARGV[1])"
    await emptied(server)
    async with listening, opened(url) as store, redis.asyncio.Redis.from_url(server.url) as valkey:
        for said in ("abc", "def"):
            assert not store.post(add, ["k"], ["lost"])
            async with asyncio.timeout(10):
                while not await store.post_opened(add):
                    store._post_not_before = 0.0  # a machine that is busy
            answered.clear()
            before = await valkey.get("k") or b""
            assert all(store.post(add, ["k"], [letter]) for letter in said)
            async with asyncio.timeout(5):
                while await valkey.get("k") != before + said.encode():
                    await asyncio.sleep(0.01)
            assert not answered
            while writers:
                writers.pop().transport.abort()
            async with asyncio.timeout(5):
                while store.post(add, ["other"], ["x"]):
                    await asyncio.sleep(0.01)


async def test_limits_hold_over_tls(server, tmp_path):
    """rediss:// from the real process: counted as without TLS; cut off and back, its policy holds and then it counts."""
    certificate, authority = certificate_for("localhost", tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    writers = set()

    async def pipe(reader, writer):
        writers.add(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def front(reader, writer):
        behind = await asyncio.open_unix_connection(server.socket)
        await asyncio.gather(pipe(reader, behind[1]), pipe(behind[0], writer))

    port = free_port()
    await emptied(server)
    limits = {"limits": [{**LIMIT, "requests": 3}], "on_store_error": "deny"}
    text = {
        "server": {"port": 0, "data_dir": str(tmp_path / "data"), "drain_timeout": 1},
        "services": {"redis": f"rediss://localhost:{port}/0?ssl_ca_certs={authority}"},
        "upstreams": {"openrouter": {"without_key": "simulate"}},
        "log": {"format": "json"},
        "plugins": [{"use": "api_keys"}, {"use": "rate_limit", "config": limits}],
    }
    (tmp_path / "tls.yaml").write_text(json.dumps(text))
    listening = await asyncio.start_server(front, "localhost", port, ssl=context)
    async with serving_beside(tmp_path, "--config", tmp_path / "tls.yaml") as gateway:

        async def status():
            return (await asyncio.to_thread(gateway.chat, "anthropic/claude-haiku-4.5")).status

        assert [await status() for _ in range(2)] == [200, 200]
        listening.close()
        for writer in writers:
            writer.transport.abort()
        assert await status() == 503
        listening = await asyncio.start_server(front, "localhost", port, ssl=context)
        async with asyncio.timeout(10):
            while (found := await status()) == 503:
                await asyncio.sleep(0.1)
        assert [found, await status()] == [200, 429]
    listening.close()
    await emptied(server)  # others count under that name too


async def test_readiness_is_no_lever(server):
    """Hundreds who ask for readiness at once, without a key, keep no request from the limits."""
    plugins = ["api_keys", {"use": "rate_limit", "config": {"limits": [LIMIT], "on_store_error": "deny"}}]
    async with Gateway.test(plugins=plugins, settings={"services": {"redis": server.url}}) as gw:
        assert (await gw.chat()).status == 200
        replies = await asyncio.gather(*(gw.get("/health/ready", headers={"Authorization": ""}) for _ in range(100)))
        assert {r.status for r in replies} == {200}
        assert (await gw.chat()).status == 200
        assert gw.snapshot.services.redis.failures == 0
