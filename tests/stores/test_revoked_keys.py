"""A revoked key, on real workers and in races: refused within two seconds, and never back."""

import asyncio
import concurrent.futures
import contextlib
import json
import time
from urllib.parse import urlsplit, urlunsplit

import pytest

from gateway.kit.testing import Gateway
from gateway.kit.upstream import ScriptedUpstream, Stream, Until, chat_events
from gateway.tasks import Tasks
from tests.integration.process import serving, xenios
from tests.stores.servers import valkey_server
from tests.stores.test_stored_keys import bearer, chat, create, gateway, until

BOUND = 2.0  # seconds: what is promised
ASKED = "anthropic/claude-haiku-4.5"
CONFIG = """
server: {{data_dir: ./data, workers: 3}}
upstreams: {{openrouter: {{without_key: simulate}}}}
services: {{redis: "{redis}", database: {{url: "{database}", migrate_on_start: true}}}}
plugins:
  - use: api_keys
    config: {{database: true}}
  - use: rate_limit
    config: {{limits: [{{name: all, by: [], requests: 100000, per: 1h}}]}}
"""


def config(folder, database, redis):
    path = folder / "x.yaml"
    path.write_text(CONFIG.format(database=database, redis=redis))
    return path


def asked(running, key, count=24):
    """(when, status) of as many connections, eight at the same time, so that every worker answers some."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: (time.monotonic(), running.chat(ASKED, key=key).status), range(count)))


def accepted(running, key):
    return {status for _, status in asked(running, key)} == {200}


def made(running, **fields):
    reply = running.request("POST", "/admin/keys", fields)
    assert reply.status == 201, reply.body
    return reply.data["key"]


def refused_in_time(running, key, revoked):
    """Nobody accepts a request that came later than two seconds after the revocation."""
    last = revoked
    while last < revoked + 2 * BOUND:
        for last, status in asked(running, key):
            assert status == 401 or (status == 200 and last < revoked + BOUND)


async def stays_refused(gw, headers):
    """For as long as an answer from before could be believed."""
    end = time.monotonic() + BOUND
    while time.monotonic() < end:
        assert (await chat(gw, headers)).status == 401


@pytest.mark.parametrize("url", [pytest.param("sqlite", marks=pytest.mark.full), "postgresql"], indirect=True)
@pytest.mark.promise("P15.refused")
def test_a_revoked_key_is_refused_by_every_worker(tmp_path, url):
    """In use at three workers and revoked at one, or from the command line: each refuses it within two seconds."""
    path = config(tmp_path, url, "embedded")
    with serving(tmp_path, "--config", path) as running:
        for revoke in ("route", "command"):
            key = made(running, id=revoke)
            for _ in range(3):
                assert accepted(running, key)
            if revoke == "route":
                assert running.request("POST", f"/admin/keys/{revoke}/revoke", {}).status == 200
            else:
                done = xenios("keys", "revoke", revoke, "--config", path, cwd=tmp_path)
                assert done.returncode == 0, done.stderr
            revoked = time.monotonic()
            refused_in_time(running, key, revoked)


@pytest.mark.parametrize("url", [pytest.param("sqlite", marks=pytest.mark.full), "postgresql"], indirect=True)
@pytest.mark.promise("P15.pubsub_cut")
def test_a_revoked_key_is_refused_with_redis_gone(tmp_path, url):
    """Workers tell each other nothing of a revocation, so nothing can be cut: with Redis killed the bound is the same."""
    with valkey_server() as redis, serving(tmp_path, "--config", config(tmp_path, url, redis.url)) as running:
        key = made(running)
        assert accepted(running, key)
        redis.kill()
        for _ in range(3):
            assert accepted(running, key)
        [found] = running.request("GET", "/admin/keys").data["data"]
        assert running.request("POST", f"/admin/keys/{found['id']}/revoke", {}).status == 200
        refused_in_time(running, key, time.monotonic())


@pytest.mark.promise("P15.pubsub_cut")
async def test_a_revoked_key_is_refused_by_gateways_that_share_the_database_alone(url):
    """Two gateways that count in memory: what one revokes, the other refuses in time, and goes on refusing."""
    async with gateway(url) as one, gateway(url, bootstrap=False) as other:
        _, headers = await create(one, id="app")
        for _ in range(20):
            assert (await chat(other, headers)).status == 200
        await one.post("/admin/keys/app/revoke", {})
        refused, _ = await until(lambda: chat(other, headers), 401, BOUND)
        assert refused.data["error"]["code"] == "revoked_api_key"
        for _ in range(20):
            assert (await chat(other, headers)).status == 401


# --- in flight --------------------------------------------------------------------------------------------------------


class SlowWire:
    """What a database answers about a key can be held on its way to a gateway."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._held: bytes | None = None
        self._released = asyncio.Event()
        self.holding = asyncio.Event()
        self.url = ""

    def hold(self, text: str) -> None:
        """The next answer with this text waits, with whatever its connection brings after it."""
        self._held = text.encode()
        self._released.clear()
        self.holding.clear()

    def release(self) -> None:
        self._released.set()

    @contextlib.asynccontextmanager
    async def running(self):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host = f"{self._parts.username}@127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.url = urlunsplit(self._parts._replace(netloc=host))
        try:
            yield self
        finally:
            self.release()
            server.close()

    async def _serve(self, reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", self._parts.port)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer, answers=True))

    async def _pass(self, reader, writer, *, answers=False):
        try:
            while data := await reader.read(1 << 16):
                if answers and self._held is not None and self._held in data:
                    self._held = None
                    self.holding.set()
                    await self._released.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@pytest.fixture
async def wire(postgres):
    async with SlowWire(await postgres.new()).running() as running:
        running.direct = urlunsplit(running._parts)
        yield running


@pytest.mark.promise("P15.in_flight")
async def test_an_answer_from_before_the_revocation_does_not_bring_a_key_back(wire):
    """A look-up that began before the revocation, and ends after a later one said no: the no stays."""
    async with gateway(wire.direct) as one, gateway(wire.url, bootstrap=False) as other:
        _, headers = await create(one, id="app")
        for _ in range(3):
            assert (await chat(other, headers)).status == 200
        wire.hold("app")  # the next refresh of the keys in use
        async with asyncio.timeout(5):
            while not wire.holding.is_set():
                assert (await chat(other, headers)).status == 200
        await one.post("/admin/keys/app/revoke", {})
        await until(lambda: chat(other, headers), 401, BOUND)
        wire.release()
        await stays_refused(other, headers)


@pytest.mark.promise("P15.in_flight")
async def test_a_request_that_waits_longer_than_an_answer_holds_is_asked_for_again(wire):
    """Looked up before the revocation, answered more than two seconds after it: the request is refused."""
    async with gateway(wire.direct) as one, gateway(wire.url, bootstrap=False) as other:
        _, headers = await create(one, id="app")
        wire.hold("app")
        asked = Tasks().spawn(chat(other, headers), "asked")
        await asyncio.wait_for(wire.holding.wait(), 5)
        await one.post("/admin/keys/app/revoke", {})
        await asyncio.sleep(BOUND)  # not to wait for anything: the promise's own two seconds
        wire.release()
        reply = await asyncio.wait_for(asked, 10)
        assert (reply.status, reply.data["error"]["code"]) == (401, "revoked_api_key")


@pytest.mark.promise("P15.in_flight")
async def test_a_request_under_way_ends_without_bringing_its_key_back(url):
    """What was admitted before the revocation is answered to its end; the key stays refused meanwhile and after it."""
    go_on = asyncio.Event()
    upstream = ScriptedUpstream()
    first, *rest = chat_events("Hi there", pieces=2)
    upstream.on("slow/model", Stream(first, Until(go_on), *rest))
    plugin = {"use": "api_keys", "config": {"database": True}}
    settings = {"services": {"database": {"url": url, "migrate_on_start": True}}}
    async with Gateway.test(plugins=[plugin], settings=settings, upstream=upstream) as gw:
        _, headers = await create(gw, id="app")
        body = {"model": "slow/model", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        under_way = Tasks().spawn(gw.post("/v1/chat/completions", body, headers=headers), "under way")
        await gw.upstream.wait_seen(1)
        await gw.post("/admin/keys/app/revoke", {})
        await until(lambda: chat(gw, headers), 401, BOUND)
        go_on.set()
        reply = await asyncio.wait_for(under_way, 10)
        assert (reply.status, reply.events[-1]) == (200, b"data: [DONE]\n\n")
        await stays_refused(gw, headers)


@pytest.mark.promise("P15.in_flight")
async def test_both_secrets_of_a_rotated_key_end_with_it(wire):
    """Rotated with an overlap and revoked: neither the new secret nor the old one, nor a job's reference, is any good."""
    async with gateway(wire.direct) as one, gateway(wire.url, bootstrap=False) as other:
        _, first = await create(one, id="app")
        assert (await chat(other, first)).status == 200
        second = bearer((await one.post("/admin/keys/app/rotate", {"overlap": "1h"})).data["key"])
        for headers in (first, second, first):
            assert (await chat(other, headers)).status == 200
        keys = other.plugin("api_keys")
        assert (await keys.restore_principal("key:app", None)).id == "app"
        await one.post("/admin/keys/app/revoke", {})
        assert await keys.restore_principal("key:app", None) is None
        for headers in (first, second):
            await until(lambda headers=headers: chat(other, headers), 401, BOUND)
        assert json.loads((await one.get("/admin/keys/app")).body)["state"] == "revoked"
