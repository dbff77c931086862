"""A soak: rounds of mixed traffic through a real gateway with all its plugins, and what its processes hold after each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import jwt
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.simulator import Simulator
from tests.benchmarks.targets import LIMITS, PLENTY
from tests.full.load import resident
from tests.integration.process import CONFIG, Running, serving_beside
from tests.integration.test_workers import children
from tests.soak.judge import WARM, Growth, growth, left_behind
from tests.soak.traffic import Traffic
from tests.stores.postgres import postgres_server
from tests.stores.servers import valkey_server

HERE = Path(__file__).parent
ISSUER = {
    "issuer": "https://login.example.com",
    "audience": "xenios",
    "secret": "a-secret-of-32-bytes-or-more-for-this",
}
REST = 120.0


@dataclass
class Soak:
    """How long: so many requests, or so many seconds if they are over before. What came of it."""

    requests: int
    seconds: float = 1e9
    each: int = 2000
    clients: int = 32
    names: int = 100_000
    told: Callable[[str], None] = lambda _: None
    rounds: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (requests so far, what was held)
    kinds: list[dict[str, int]] = field(default_factory=list)  # of objects, round by round
    sent: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)
    put_off: int = 0
    reloads: int = 0
    complaints: list[str] = field(default_factory=list)  # lines of the log about what nobody expected
    took: float = 0.0

    @property
    def asked(self) -> int:
        return self.rounds[-1][0]

    def since(self, warm: int) -> dict[str, list[tuple[int, float]]]:
        """What was held of each measure, once so many requests had been served."""
        late = [(asked, held) for asked, held in self.rounds if asked >= warm]
        names = late[-1][1] if late else self.rounds[-1][1]
        return {name: [(asked, held[name]) for asked, held in late if name in held] for name in names}

    @property
    def warmed(self) -> dict[str, list[tuple[int, float]]]:
        return self.since(min(WARM, self.asked // 3))

    @property
    def leaks(self) -> dict[str, float]:
        """Measures of which each request leaves something behind, and how much."""
        found = {name: left_behind(name.split()[-1], points) for name, points in self.warmed.items()}
        return {name: much for name, much in found.items() if much is not None}

    @property
    def memory(self) -> dict[str, Growth]:
        """Of each process. Caches fill for tens of thousands of requests: from what was before nothing is reckoned."""
        return {name: growth(points) for name, points in self.since(WARM).items() if name.endswith("memory")}

    @property
    def more_of(self) -> dict[str, int]:
        """The kinds of objects of which there were more at the end than after the warm-up: most first."""
        first, last = self.kinds[len(self.kinds) // 3], self.kinds[-1]
        more = {kind: last[kind] - first.get(kind, 0) for kind in last if last[kind] > first.get(kind, 0)}
        return dict(sorted(more.items(), key=lambda each: -each[1])[:10])

    async def run(self, folder: Path) -> None:
        begun = time.monotonic()
        with valkey_server("--appendfsync", "everysec") as valkey, postgres_server() as postgres:
            async with Simulator(latency=0, chunk_delay=0) as simulator, _collector() as collector:
                file = folder / "xenios.yaml"
                shutil.copy(HERE / "probe.py", folder)
                write = _Config(file, simulator.url, collector, valkey.url, await postgres.new())
                write(0)
                async with (
                    serving_beside(folder, "--config", file) as running,
                    aiohttp.ClientSession(
                        running.url,
                        headers={"Authorization": f"Bearer {running.key}"},
                        connector=aiohttp.TCPConnector(limit=0),
                    ) as session,
                ):
                    traffic = Traffic(session, _tokens(), self.names)
                    while traffic.number < self.requests and time.monotonic() - begun < self.seconds:
                        await traffic.round(min(self.each, self.requests - traffic.number), self.clients)
                        await self._reload(session, write)
                        await self._rest(session, simulator)
                        await self._look(running, session, traffic.number)
                        os.truncate(folder / "access.log", 0)
                    self.sent, self.wrong, self.put_off = dict(traffic.sent), dict(traffic.wrong), traffic.put_off
                self.complaints = [line for line in running.said if "Traceback" in line or "unhandled" in line]
        self.took = time.monotonic() - begun

    async def _reload(self, session: aiohttp.ClientSession, write: _Config) -> None:
        """To another configuration, and from time to time to one that is refused."""
        self.reloads += 1
        write(self.reloads, bad=self.reloads % 5 == 0)
        async with session.post("/admin/reload") as reply:
            expected = 409 if self.reloads % 5 == 0 else 200
            assert reply.status == expected, await reply.text()

    async def _rest(self, session: aiohttp.ClientSession, simulator: Simulator) -> None:
        """Until nothing runs any more: no request upstream, no job, and as many tasks as a moment ago."""
        async with asyncio.timeout(REST):
            while simulator.running:
                await asyncio.sleep(0.05)
            for status in ("queued", "running"):
                while await _jobs(session, status):
                    await asyncio.sleep(0.1)
            before = None
            while before != (before := (await _held(session))["tasks"]):
                await asyncio.sleep(0.3)

    async def _look(self, running: Running, session: aiohttp.ClientSession, asked: int) -> None:
        held = await _held(session)
        self.kinds.append(held.pop("kinds"))
        found = {f"gateway {name}": value for name, value in held.items()}
        for pid, command in children(running.pid).items():
            if "gateway.companions" in command:
                found |= {"jobs memory": resident(pid), "jobs files": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())}
        self.rounds.append((asked, found))
        self.told(f"{asked:>9,} requests  " + "  ".join(f"{name} {shown(name, held)}" for name, held in found.items()))


async def until_told(work: Coroutine[Any, Any, None]) -> None:
    """Whoever ends it by TERM or Ctrl-C ends what it started too, also where a shell has put it into the background."""
    task = asyncio.current_task()
    assert task is not None
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, task.cancel)
    await work


def shown(name: str, value: float) -> str:
    return f"{value / 2**20:.1f} MiB" if name.endswith("memory") else f"{value:,.0f}"


class _Config:
    """Writes the shipped configuration, with everything on, in variants of which none needs a restart."""

    def __init__(self, file: Path, upstream: str, collector: str, redis: str, database: str) -> None:
        shipped = _yaml(CONFIG / "xenios.yaml")
        config = {plugin["use"]: plugin.get("config", {}) for plugin in shipped["plugins"]}
        config |= LIMITS
        config["budgets"] = {**LIMITS["budgets"], "unknown_price": "allow"}
        config["fallback"] = {"breaker": False}  # each kind of failure is a model of its own here
        config["jwt_auth"] = {"issuers": [ISSUER]}
        config["tracing"] = {"endpoint": f"{collector}/v1/traces", "sample_ratio": 0.2}
        order = [*("access_log", "metrics", "tracing", "api_keys", "jwt_auth", "routing"),
                 *("rate_limit", "budgets", "usage", "jobs", "fallback")]  # fmt: skip
        self._file, self._config, self._order = file, config, order
        self._rest = {
            "server": {"host": "127.0.0.1", "port": 0, "data_dir": str(file.parent / "data"), "drain_timeout": 5},
            "services": {"redis": redis, "database": {"url": database, "migrate_on_start": True}},
            "upstreams": {"openrouter": {"base_url": upstream, "api_key": "sk-or-v1-soak"}},
            "log": {"format": "json"},
        }

    def __call__(self, number: int, *, bad: bool = False) -> None:
        config = {**self._config, "rate_limit": {"limits": [*LIMITS["rate_limit"]["limits"],
                                                            {"name": f"n{number % 2}", "requests": PLENTY}]}}  # fmt: skip
        plugins = [{"use": name, "config": config[name]} for name in self._order] + [{"use": "./probe.py:Plugin"}]
        document = {**self._rest, "plugins": plugins} | ({"nonsense": 1} if bad else {})
        self._file.write_text(json.dumps(document))


def _yaml(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


def _tokens() -> list[str]:
    claims = {"iss": ISSUER["issuer"], "aud": ISSUER["audience"], "exp": int(time.time()) + 7 * 86400}
    return [jwt.encode({**claims, "sub": f"user-{n}"}, ISSUER["secret"], "HS256") for n in range(50)]


async def _held(session: aiohttp.ClientSession) -> dict[str, Any]:
    async with session.get("/soak") as reply:
        return dict(await reply.json())


async def _jobs(session: aiohttp.ClientSession, status: str) -> bool:
    """Whether there are any, or nobody can tell just now."""
    async with session.get(f"/v1/jobs?limit=1&status={status}&tenant=*") as reply:
        return reply.status != 200 or bool((await reply.json())["data"])


@contextlib.asynccontextmanager
async def _collector() -> AsyncIterator[str]:
    """Takes traces, and throws them away."""

    async def taken(request: web.Request) -> web.Response:
        await request.read()
        return web.Response()

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/traces", taken)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")
