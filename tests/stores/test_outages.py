"""Redis and PostgreSQL frozen and killed under load, before the real process: what clients see, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass, field

import aiohttp
import pytest

from gateway.kit import new_key
from gateway.tasks import Tasks
from tests.faults.process import config, started
from tests.stores.postgres import postgres_server
from tests.stores.servers import valkey_server

OPEN, STRICT, PAID, CREDIT = (f"xenios/sim-{name}" for name in ("open", "strict", "paid", "credit"))
# What each plugin does without Redis, as the configuration below declares it.
WITHOUT_REDIS = {OPEN: 200, STRICT: 503, PAID: 503, CREDIT: 200}
PRICE = {"input": 1, "output": 1, "context_length": 8000, "max_output": 100}
REDIS_WAIT, POSTGRES_WAIT = 0.25, 1.5  # seconds: what one call may cost when its store has just frozen
PROMISED = 10.0  # seconds from a store's return until all is as before


def chaos(*values):
    """More of the same: in make test-full only."""
    return pytest.param(*values, marks=pytest.mark.full)


def limited(name, model, policy):
    limit = {"name": name, "by": [], "requests": 10**6, "when": {"models": [model]}}
    return {"use": "rate_limit", "id": name, "config": {"limits": [limit], "own_limits": False,
                                                        "on_store_error": policy}}  # fmt: skip


def budgeted(name, model, policy):
    budget = {"name": name, "by": [], "usd": 10**6, "when": {"models": [model]}}
    return {"use": "budgets", "id": name, "config": {"budgets": [budget], "own_limits": False,
                                                     "on_store_error": policy}}  # fmt: skip


def strict_and_open():
    return [
        limited("open", OPEN, "allow"),
        limited("strict", STRICT, "deny"),
        budgeted("paid", PAID, "deny"),
        budgeted("credit", CREDIT, "allow"),
    ]


@contextlib.asynccontextmanager
async def gateway(folder, valkey, postgres, plugins, *, keys="allow", workers=1):
    """(its process, a key that is in the database)."""
    file = config(
        folder,
        server={"workers": workers},
        upstreams={"openrouter": {"without_key": "simulate"}},
        services={"redis": valkey.url, "database": {"url": await postgres.new(), "migrate_on_start": True}},
        catalogue={"overrides": dict.fromkeys((PAID, CREDIT), PRICE)},
        plugins=[{"use": "api_keys", "config": {"database": True, "on_store_error": keys}}, *plugins],
    )
    async with started(file) as running, client(running) as session:
        async with session.post("/admin/keys", json={"id": "app"}, headers=bearer(running.key)) as reply:
            key = (await reply.json())["key"]
        yield running, key
        running.signal()
        assert await running.exit_code(15) == 0


def client(running):
    """Each request on a connection of its own: all workers are asked."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=20)
    return aiohttp.ClientSession(f"http://127.0.0.1:{running.port}", connector=connector, timeout=timeout)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@dataclass
class Answer:
    began: float
    took: float
    status: int
    code: str | None = None
    limited: bool = False  # it says what is left: the limit was asked


@dataclass
class Load:
    """Requests of several kinds, each kind one after the other, until the context ends."""

    session: aiohttp.ClientSession
    answers: dict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))

    async def ask(self, key, model):
        body = {"model": model, "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
        began = time.monotonic()
        async with self.session.post("/v1/chat/completions", json=body, headers=bearer(key)) as reply:
            data = await reply.json()
            return Answer(
                began,
                time.monotonic() - began,
                reply.status,
                data["error"]["code"] if reply.status != 200 else None,
                "x-ratelimit-remaining-requests" in reply.headers,
            )

    async def get(self, path):
        began = time.monotonic()
        async with self.session.get(path) as reply:
            data = await reply.json()
            return Answer(began, time.monotonic() - began, reply.status), data

    @contextlib.asynccontextmanager
    async def running(self, kinds):
        """`kinds`: name → what asks once."""
        tasks = Tasks()
        self.lanes = []

        async def lane(name, ask):
            while True:
                self.answers[name].append(await ask())

        for name, ask in kinds.items():
            self.lanes.append(tasks.spawn(lane(name, ask), f"lane {name}"))
        try:
            await self.further(kinds, 5)
            yield
        finally:
            await tasks.drain(0)

    async def further(self, kinds, count):
        """Until each kind has so many more answers."""
        target = {name: len(self.answers[name]) + count for name in kinds}
        async with asyncio.timeout(20):
            while any(len(self.answers[name]) < n for name, n in target.items()):
                await asyncio.sleep(0.01)
                for lane in self.lanes:
                    if lane.done():
                        lane.result()  # raises what ended it

    def between(self, name, start, end):
        """Answers to what was asked then."""
        return [a for a in self.answers[name] if start <= a.began <= end]


async def lasting(seconds, since):
    """The outage itself takes this long."""
    await asyncio.sleep(max(0.0, since + seconds - time.monotonic()))


def away(store, fault):
    store.freeze() if fault == "frozen" else store.kill()
    return time.monotonic()


def returned(store, fault):
    store.thaw() if fault == "frozen" else store.start()
    return time.monotonic()


async def recovered(load, ask, good, since):
    """Thirty answers in a row are as they should be, within the promised time."""
    row = 0
    while row < 30:
        row = row + 1 if good(await ask()) else 0
        assert time.monotonic() - since < PROMISED


def check_waits(answers, since, one_wait):
    """Nobody waits for much longer than the one time-out, and who comes after it does not wait."""
    assert max(a.took for a in answers) < one_wait + 1.5
    later = sorted(a.took for a in answers if a.began > since + one_wait + 0.5)
    assert len(later) >= 20
    assert later[len(later) // 2] < one_wait / 4
    assert later[len(later) * 9 // 10] < one_wait


@pytest.mark.promise("P9.policy")
@pytest.mark.promise("P9.wait")
@pytest.mark.promise("P9.recovery")
@pytest.mark.parametrize(("fault", "workers"), [("frozen", 1), chaos("killed", 2)])
async def test_redis_is_away_under_load(tmp_path, postgres, fault, workers):
    """Each plugin's policy holds, 503 where it denies; one short wait, then none; all back within 10 s."""
    with valkey_server() as valkey:
        async with (
            gateway(tmp_path, valkey, postgres, strict_and_open(), workers=workers) as (running, key),
            client(running) as session,
        ):
            load = Load(session)
            kinds = {model: lambda model=model: load.ask(key, model) for model in WITHOUT_REDIS}
            async with load.running(kinds):
                gone = away(valkey, fault)
                await lasting(2.0, gone)
                await load.further(kinds, 30)
                back = returned(valkey, fault)
                await recovered(load, kinds[OPEN], lambda a: a.status == 200 and a.limited, back)
                for model in (STRICT, PAID, CREDIT):
                    await recovered(load, kinds[model], lambda a: a.status == 200, back)
                while (await load.get("/health/ready"))[1]["status"] != "ok":
                    assert time.monotonic() - back < PROMISED
        for model, status in WITHOUT_REDIS.items():
            assert {a.status for a in load.answers[model]} <= {200, status}
            assert {a.code for a in load.answers[model]} <= {None, "store_unavailable"}
            during = load.between(model, gone, back)
            known = [a for a in during if gone + REDIS_WAIT + 0.5 < a.began < back - 0.5]
            assert {a.status for a in known} == {status}
            check_waits(during, gone, REDIS_WAIT)


@pytest.mark.promise("P9.policy")
@pytest.mark.promise("P9.wait")
@pytest.mark.promise("P9.recovery")
@pytest.mark.parametrize(("fault", "policy", "workers"), [chaos("frozen", "allow", 2), chaos("killed", "deny", 1)])
async def test_postgres_is_away_under_load(tmp_path, server, fault, policy, workers):
    """Keys in use go on or get 503, as declared; unknown ones get 503, never 401; one wait; back within 10 s."""
    with postgres_server(own=True) as postgres:
        async with (
            gateway(tmp_path, server, postgres, [], keys=policy, workers=workers) as (running, key),
            client(running) as session,
        ):
            load = Load(session)
            kinds = {
                "known": lambda: load.ask(key, OPEN),
                "unknown": lambda: load.ask(new_key(), OPEN),
                "of the file": lambda: load.ask(running.key, OPEN),
            }
            async with load.running(kinds):
                gone = away(postgres, fault)
                # a key that was looked at just before may be believed for a moment more
                await lasting(POSTGRES_WAIT + 4.0, gone)
                await load.further(kinds, 30)
                back = await asyncio.to_thread(returned, postgres, fault)
                await recovered(load, kinds["known"], lambda a: a.status == 200, back)
                await recovered(load, kinds["unknown"], lambda a: a.status == 401, back)
                while (await load.get("/health/ready"))[1]["status"] != "ok":
                    assert time.monotonic() - back < PROMISED
        settled = gone + POSTGRES_WAIT + 2.0
        for name, status in (("known", 200 if policy == "allow" else 503), ("unknown", 503), ("of the file", 200)):
            usual = 401 if name == "unknown" else 200
            assert {a.status for a in load.answers[name]} <= {usual, status}
            during = load.between(name, gone, back)
            assert {a.status for a in during if settled < a.began < back - 0.5} == {status}
            assert {a.code for a in during if a.status == 503} <= {"store_unavailable"}
            check_waits(during, gone, POSTGRES_WAIT)
            if name == "of the file":
                assert max(a.took for a in during) < POSTGRES_WAIT


@pytest.mark.full
@pytest.mark.promise("P9.health")
@pytest.mark.parametrize(
    ("plugins", "keys", "status", "says"),
    [
        (strict_and_open(), "allow", 503, "failed"),
        chaos([limited("open", OPEN, "allow"), budgeted("credit", CREDIT, "allow")], "allow", 200, "degraded"),
        chaos([limited("open", OPEN, "allow")], "deny", 503, "failed"),
    ],
    ids=["limits deny", "all allow", "keys deny"],
)
async def test_health_while_both_are_frozen(tmp_path, plugins, keys, status, says):
    """Alive at once, whatever is away; ready names each part with its policy, 503 only if one without which nothing goes."""
    with valkey_server() as valkey, postgres_server(own=True) as postgres:
        async with gateway(tmp_path, valkey, postgres, plugins, keys=keys) as (running, _), client(running) as session:
            load = Load(session)

            async def alive():
                answer, data = await load.get("/health/live")
                assert data == {"status": "ok"}
                return answer

            async def ready():
                answer, load.ready = await load.get("/health/ready")
                return answer

            async with load.running({"alive": alive, "ready": ready}):
                assert load.ready["status"] == "ok"
                gone = away(valkey, "frozen")
                away(postgres, "frozen")
                try:
                    await lasting(1.0, gone)
                    await load.further({"alive": alive}, 50)
                    await load.further({"ready": ready}, 5)
                    said, answered = load.ready, load.answers["ready"][-1]
                    frozen = time.monotonic()
                finally:
                    postgres.thaw()
                    back = returned(valkey, "frozen")
                await recovered(load, ready, lambda a: a.status == 200 and load.ready["status"] == "ok", back)
        asked = load.between("alive", gone, frozen)
        assert {a.status for a in asked} == {200}
        took = sorted(a.took for a in asked)
        assert took[len(took) * 95 // 100] < REDIS_WAIT / 2
        assert (answered.status, said["status"]) == (status, says)
        policies = {"open": "ignore", "credit": "ignore", "strict": "fail", "paid": "fail"}
        for plugin in plugins:
            assert said["plugins"][plugin["id"]] == {
                "status": "failed",
                "policy": policies[plugin["id"]],
                "error": "StoreUnavailable",
            }
        database_part = said["plugins"]["api_keys"]
        assert (database_part["status"], database_part["policy"]) == ("failed", "ignore" if keys == "allow" else "fail")
