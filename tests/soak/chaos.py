"""Chaos: parts of a gateway are killed at random while it is asked, and afterwards the books must balance.

    .venv/bin/python -m tests.soak.chaos --minutes 2 --seed 7

Four workers of the gateway and two of jobs, a Valkey and a PostgreSQL, each killed by SIGKILL now and then and started
again; whole requests, streams and jobs meanwhile, by keys with a budget and a rate limit that they use up. `test_chaos.py`
says what must hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from gateway.kit import hash_key, new_key
from gateway.kit.ledger_redis import RedisLedger
from gateway.kit.upstream import MODEL, Json, Pause, ScriptedUpstream, Slow, Stream, chat_completion, chat_events
from gateway.stores.redis import RedisStore
from tests.integration.process import Running, serving_beside
from tests.integration.test_metrics import not_gone_down, samples
from tests.integration.test_workers import alive, eventually, workers
from tests.jobs.processes import WorkerProcess
from tests.jobs.processes import workers as job_workers
from tests.soak.run import until_told
from tests.stores.postgres import PostgresServer, postgres_server
from tests.stores.servers import ValkeyServer, valkey_server
from tests.stores.test_money import held_ahead

COST, RESERVED = 50, 100  # micro-USD of a request: what it costs, what its 100 tokens might
PEPPER = "a-pepper-for-chaos-only"
TIGHT = 400 * COST  # the budget of the key `tight`
LIMITED = 150  # requests in an hour of the key `limited`
PROCESSES = 4
KINDS = ("gateway worker", "job worker", "Valkey", "PostgreSQL")
REST = 120.0
STOP = 90.0
LEASES = 20.0  # seconds after which nothing is held for a dead worker
DONE = b"data: [DONE]\n\n\r\n0\r\n\r\n"


@dataclass
class Asked:
    """One request as its client saw it. `status` None: the connection was lost, from this local `port`."""

    id: str
    key: str
    kind: str
    begun: float
    port: int = 0
    status: int | None = None
    code: str = ""
    ended: float = 0.0
    job: str = ""


@dataclass(frozen=True)
class Strike:
    """What was killed, from when to when it was away, and which clients' ports were connected to it."""

    what: str
    begun: float
    over: float
    ports: frozenset[int] = frozenset()


@dataclass
class Chaos:
    seconds: float
    seed: int
    asked: list[Asked] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    scrapes: int = 0
    # at rest:
    rows: list[dict[str, Any]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)  # by the upstream: request id → how often
    seen_by: Counter[str] = field(default_factory=Counter)  # of live requests: key → how many
    books: tuple[int, int] = (0, 0)  # spent, reserved
    tight_books: tuple[int, int] = (0, 0)
    jobs: dict[str, str] = field(default_factory=dict)  # id → status
    lines: list[dict[str, Any]] = field(default_factory=list)  # of the access log
    told: dict[Any, float] = field(default_factory=dict)  # metrics
    rested: float = 0.0
    stopped: float = 0.0  # seconds from SIGTERM to its end
    said: list[str] = field(default_factory=list)

    async def run(self, folder: Path) -> None:
        chance = random.Random(self.seed)
        events = chat_events("Hello, this is a stream", pieces=10, cost=COST / 1e6)
        streamed = Stream(*[step for event in events for step in (event, Pause(0.03))])
        whole = Slow(Json(chat_completion(cost=COST / 1e6)), 0.1)
        async with ScriptedUpstream(default=lambda seen: streamed if seen.stream else whole) as upstream:
            with valkey_server() as valkey, postgres_server(own=True) as postgres:
                database = await postgres.new()
                keys = {name: new_key() for name in ("main", "tight", "limited")}
                file = _configured(folder, upstream.url, valkey.url, database, keys)
                async with serving_beside(folder, "--config", file) as running:
                    with job_workers(file) as start:
                        parts = _Parts(running, [start(), start()], start, valkey, postgres, self.strikes, chance)
                        await self._load(_Clients(_port(running), keys, self.asked), parts, running)
                        await self._at_rest(running, valkey, database)
                    await self._stop(running)
                for seen in upstream.seen:
                    request = seen.headers.get("x-request-id", "")
                    self.seen[request] += 1
                    if not request.startswith("job"):
                        self.seen_by[request.partition("-")[0]] += 1
        for line in (folder / "access.log").read_text().splitlines():
            with contextlib.suppress(ValueError):  # half a line of one that was killed
                self.lines.append(json.loads(line))

    async def _load(self, clients: _Clients, parts: _Parts, running: Running) -> None:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for key, kind, number in (("main", "whole", 10), ("main", "stream", 10), ("tight", "whole", 3),
                                      ("limited", "stream", 2), ("main", "job", 3)):  # fmt: skip
                for _ in range(number):
                    group.create_task(clients.ask_on(key, kind, stop))
            group.create_task(self._scrape(running, stop))
            await parts.strike_until(time.time() + self.seconds)
            stop.set()

    async def _scrape(self, running: Running, stop: asyncio.Event) -> None:
        """No counter goes down, whoever is killed."""
        before: dict[Any, float] = {}
        while not stop.is_set():
            with contextlib.suppress(OSError, ValueError):
                reply = await asyncio.to_thread(running.request, "GET", "/metrics", key=None)
                now = samples(reply.body.decode())
                not_gone_down(before, now)
                before, self.scrapes = now, self.scrapes + 1
            await asyncio.sleep(0.5)

    async def _at_rest(self, running: Running, valkey: ValkeyServer, database: str) -> None:
        """Once all jobs have ended, dead workers' leases too, and every row is there."""
        begun = time.time()
        after = max(strike.over for strike in self.strikes) + LEASES
        store = RedisStore(valkey.url)
        ledger = RedisLedger(store)
        connection = await asyncpg.connect(database)
        try:
            async with asyncio.timeout(REST):
                while True:
                    self.books, self.tight_books = await ledger.budgets(["budgets:all:total:", "budgets:tight:total:"])
                    self.rows = [dict(row) for row in await connection.fetch("SELECT * FROM usage_requests")]
                    found = await connection.fetch("SELECT id, status FROM jobs_jobs")
                    self.jobs = {row["id"]: row["status"] for row in found}
                    over = not set(self.jobs.values()) & {"queued", "running"} and time.time() > after
                    if over and self._balanced() and not any(await held_ahead(store.client)):
                        break
                    await asyncio.sleep(0.3)
        finally:
            await connection.close()
            await store.close()
        await asyncio.sleep(1.5)  # each process tells its counts once a second
        self.told = samples((await asyncio.to_thread(running.request, "GET", "/metrics", key=None)).body.decode())
        self.rested = time.time() - begun

    async def _stop(self, running: Running) -> None:
        begun = time.time()
        os.kill(running.pid, signal.SIGTERM)
        await asyncio.to_thread(eventually, lambda: not alive(running.pid), STOP)
        self.stopped = time.time() - begun
        self.said = running.said

    def _balanced(self) -> bool:
        return not self.books[1] and not self.tight_books[1] and self.cost == self.books[0]

    # --- sums ----------------------------------------------------------------------------------------------------------

    @property
    def cost(self) -> int:
        return sum(row["cost_micro_usd"] or 0 for row in self.rows)

    def lost(self) -> list[Asked]:
        return [each for each in self.asked if each.status is None]

    def answered(self, *kinds: str) -> set[str]:
        return {each.id for each in self.asked if each.status == 200 and each.kind in kinds}

    def doomed(self) -> set[tuple[int, int]]:
        return {(n, port) for n, strike in enumerate(self.strikes) for port in strike.ports}

    def was_killed(self, asked: Asked) -> bool:
        """It was in a worker when that was killed."""
        return any(
            asked.port in strike.ports and asked.begun <= strike.over and strike.begun <= asked.ended + 1
            for strike in self.strikes
        )

    def just_before_a_kill(self, seconds: float) -> set[str]:
        """Answered so shortly before a worker of the gateway was killed that it may not have told of them."""
        at = [strike.over for strike in self.strikes if strike.what == "gateway worker"]
        return {each.id for each in self.asked if any(-0.5 <= kill - each.ended <= seconds for kill in at)}

    def while_a_store_was_away(self, asked: Asked, after: float) -> bool:
        """It was killed, or the gateway itself says so: on a busy machine a store may be too late without any strike."""
        killed = [(s.begun, s.over) for s in self.strikes if s.what in {"Valkey", "PostgreSQL"}]
        return any(begun - 1 <= asked.ended <= over + after for begun, over in killed + self._said_to_be_away())

    def _said_to_be_away(self) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        open_since: dict[tuple[str, int], float] = {}
        for line in self.said:
            with contextlib.suppress(ValueError, KeyError):
                entry = json.loads(line)
                store, _, what = entry["event"].partition("_")
                at = datetime.fromisoformat(entry["timestamp"]).timestamp()
                if store in {"redis", "database"} and what == "away":
                    open_since[store, entry.get("worker", 0)] = at
                elif store in {"redis", "database"}:
                    found.append((open_since.pop((store, entry.get("worker", 0)), at), at))
        return found + [(since, math.inf) for since in open_since.values()]


@dataclass
class _Clients:
    port: int
    keys: dict[str, str]
    asked: list[Asked]
    number: int = 0

    async def ask_on(self, key: str, kind: str, stop: asyncio.Event) -> None:
        """One after the other. A job that was not taken is sent again, under its `Idempotency-Key`, until it is."""
        while not stop.is_set():
            self.number += 1
            name = f"job-{self.number}" if kind == "job" else f"{key}-{kind}-{self.number}"
            asked = await self._ask(name, key, kind)
            while kind == "job" and asked.status not in {200, 202}:
                await asyncio.sleep(0.3)
                asked = await self._ask(name, key, kind)
            if asked.status != 200:
                await asyncio.sleep(0.2)

    async def _ask(self, name: str, key: str, kind: str) -> Asked:
        asked = Asked(name, key, kind, time.time())
        self.asked.append(asked)
        body = {"model": MODEL, "max_tokens": RESERVED, "messages": [{"role": "user", "content": "Hi"}]}
        data = json.dumps(body | ({"stream": True} if kind == "stream" else {})).encode()
        head = [
            "POST /v1/chat/completions HTTP/1.1", "Host: chaos", f"Authorization: Bearer {self.keys[key]}",
            "Content-Type: application/json", f"Content-Length: {len(data)}", f"X-Request-Id: {name}", "Connection: close",
        ]  # fmt: skip
        if kind == "job":
            head += ["Prefer: respond-async", f"Idempotency-Key: {name}"]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        asked.port = writer.get_extra_info("sockname")[1]
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        try:
            reply = await asyncio.wait_for(reader.read(), 60)
        except ConnectionError:
            reply = b""
        finally:
            writer.transport.abort()
            asked.ended = time.time()
        self._judge(asked, reply)
        return asked

    def _judge(self, asked: Asked, reply: bytes) -> None:
        """Half a reply is none; a stream that ends with an error is not answered."""
        top, _, body = reply.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", top)
        if not top.startswith(b"HTTP/1.1 ") or (length and len(body) < int(length[1])):
            return
        if not length and not body.endswith(b"0\r\n\r\n"):
            return
        asked.status = int(top[9:12])
        if asked.status == 200 and asked.kind == "stream" and not body.endswith(DONE):
            asked.status, asked.code = 0, body[-300:].decode()
        elif asked.status in {200, 202} and asked.kind == "job":
            asked.job = json.loads(body)["id"]
        elif asked.status >= 400:
            asked.code = json.loads(body)["error"]["code"]


@dataclass
class _Parts:
    """What can be killed."""

    running: Running
    jobs: list[WorkerProcess]
    start_job_worker: Any
    valkey: ValkeyServer
    postgres: PostgresServer
    strikes: list[Strike]
    chance: random.Random

    async def strike_until(self, end: float) -> None:
        """Each part once at least, in any order; then whichever, every few seconds."""
        ahead = list(KINDS)
        self.chance.shuffle(ahead)
        while True:
            await asyncio.sleep(self.chance.uniform(2, 6))
            if time.time() > end:
                return
            what = ahead.pop() if ahead else self.chance.choices(KINDS, (4, 3, 2, 2))[0]
            begun, ports = time.time(), frozenset[int]()
            if what == "gateway worker":
                ports = self._kill_worker()
            elif what == "job worker":
                self.jobs.pop(0).kill()
                self.jobs.append(self.start_job_worker())
            else:
                store = self.valkey if what == "Valkey" else self.postgres
                store.kill()
                await asyncio.sleep(self.chance.uniform(0, 1.5))
                await asyncio.to_thread(store.start)
            self.strikes.append(Strike(what, begun, time.time(), ports))

    def _kill_worker(self) -> frozenset[int]:
        """Its clients' ports at that moment: it is stopped while they are read."""
        pid = self.chance.choice(sorted(workers(self.running.pid)))
        os.kill(pid, signal.SIGSTOP)
        ports = frozenset(_connected(pid, _port(self.running)))
        os.kill(pid, signal.SIGKILL)
        return ports


def _port(running: Running) -> int:
    return urlsplit(running.url).port or 0


def _connected(pid: int, port: int) -> Iterator[int]:
    """The far ports of a process's connections to `port` of its own."""
    own = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] in own and int(fields[1].partition(":")[2], 16) == port:
            yield int(fields[2].partition(":")[2], 16)


def _configured(folder: Path, upstream: str, redis: str, database: str, keys: dict[str, str]) -> Path:
    listed = [{"id": name, "hash": hash_key(key, PEPPER), "tenant": name} for name, key in keys.items()]
    tight = {"name": "tight", "by": [], "usd": TIGHT / 1e6, "per": "total", "when": {"keys": "tight"}}
    few = {"name": "few", "requests": LIMITED, "per": "1h", "when": {"keys": "limited"}}
    settings = {
        "server": {"host": "127.0.0.1", "port": 0, "workers": PROCESSES, "data_dir": str(folder / "data"),
                   "pepper": PEPPER, "drain_timeout": 5},
        "log": {"format": "json"},
        "services": {"redis": redis, "database": {"url": database, "migrate_on_start": True}},
        "upstreams": {"openrouter": {"base_url": upstream, "api_key": "sk-or-v1-chaos"}},
        "catalogue": {
            "refresh": 0,
            "overrides": {MODEL: {"input": 0, "cache_write": 0, "output": 1, "context_length": 8000}},
        },
        "plugins": [
            {"use": "access_log"},
            {"use": "metrics", "config": {"public": True}},
            {"use": "api_keys", "config": {"keys": listed, "database": True}},
            {"use": "rate_limit", "config": {"limits": [few], "on_store_error": "deny"}},
            {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": 1000, "per": "total"}, tight]}},
            {"use": "usage"},
            {"use": "jobs", "config": {"charge_abandoned": "tenant", "worker": {"lease": "5s"}}},
        ],
    }  # fmt: skip
    file = folder / "xenios.yaml"
    file.write_text(json.dumps(settings))
    return file


def report(chaos: Chaos) -> str:
    outcomes = Counter(row["outcome"] for row in chaos.rows)
    killed = ", ".join(f"{n} × {what}" for what, n in Counter(strike.what for strike in chaos.strikes).items())
    statuses = Counter(str(each.status or "lost") for each in chaos.asked)
    return (
        f"seed {chaos.seed}, {chaos.seconds:.0f} s; killed: {killed}\n"
        f"{len(chaos.asked)} requests: {dict(statuses)}; {len(chaos.jobs)} jobs: {dict(Counter(chaos.jobs.values()))}\n"
        f"lost: {len(chaos.lost())}, all of them in a worker that was killed: {all(map(chaos.was_killed, chaos.lost()))}\n"
        f"upstream saw {chaos.seen.total()}; rows: {len(chaos.rows)} {dict(outcomes)}\n"
        f"spent {chaos.books[0]} µ$ = rows {chaos.cost} µ$; reserved {chaos.books[1]}; "
        f"`tight`: {chaos.tight_books[0]} of {TIGHT} µ$; `limited`: {chaos.seen_by['limited']} of {LIMITED} an hour\n"
        f"{chaos.scrapes} scrapes, no counter went down; at rest after {chaos.rested:.0f} s, stopped in {chaos.stopped:.1f} s"
    )


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    """asyncio tells of each connection that was lost in mid-answer."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda loop, context: (
            isinstance(context.get("exception"), asyncio.CancelledError) or loop.default_exception_handler(context)
        )
    )
    await work


def main() -> None:
    from tests.soak.test_chaos import must_hold

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    options = parser.parse_args()
    chaos = Chaos(options.minutes * 60, options.seed)
    with tempfile.TemporaryDirectory(prefix="xenios-chaos-") as folder:
        try:
            asyncio.run(until_told(_quietly(chaos.run(Path(folder)))))
        finally:
            print(report(chaos))
    must_hold(chaos)
    print("All of it holds.")


if __name__ == "__main__":
    main()
