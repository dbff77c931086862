"""A gateway with jobs on a real Valkey, whose work is done when a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import msgspec

from gateway.kit import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from gateway.kit.upstream import MODEL
from gateway.tasks import Tasks
from gateway_plugins.jobs.parts import Again

ASYNC = {"Prefer": "respond-async"}
KEYS = {name: new_key() for name in ("app", "friend", "other")}
TENANTS = {"app": "app", "friend": "app", "other": "other"}


_tasks = Tasks()


def spawn(coro: Any) -> asyncio.Task[Any]:
    """Beside the test, which awaits it."""
    return _tasks.spawn(coro, "test")


def of(name: str) -> dict[str, str]:
    """Headers that show this key."""
    return {"Authorization": f"Bearer {KEYS[name]}"}


@contextlib.asynccontextmanager
async def gateway(
    url: str, *more: Any, upstream: Any = None, keys: Any = (), database: str | None = None, **config: Any
):
    """`config`: of the plugin jobs. Keys of two tenants beside the bootstrap key, an administrator's."""
    listed = [{"id": name, "hash": hash_key(key, PEPPER), "tenant": TENANTS[name]} for name, key in KEYS.items()]
    plugins = [
        {"use": "api_keys", "config": {"keys": [*listed, *keys], "database": True}},
        {"use": "usage"},
        *more,
        {"use": "jobs", "config": config},
    ]
    services: dict[str, Any] = {"redis": url}
    if database is not None:
        services["database"] = {"url": database, "migrate_on_start": True}
    async with Gateway.test(plugins=plugins, upstream=upstream, settings={"services": services}) as gw:
        yield gw


def body(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


async def taken(gw: Gateway, name: str = "app", **fields: Any) -> str:
    """The id of a new job."""
    reply = await gw.post("/v1/chat/completions", body(**fields), headers={**ASYNC, **of(name)})
    assert reply.status == 202, reply.body
    return str(reply.data["id"])


def jobs(gw: Gateway) -> Any:
    """The part."""
    return gw.plugin("jobs").takers[-1]


async def work(gw: Gateway, job_id: str) -> float | None:
    """One run, as a worker does it; seconds after which it is to be run again."""
    try:
        await jobs(gw).runner.run(job_id)
    except Again as again:
        return again.after
    return None


async def due(gw: Gateway, job_id: str) -> None:
    """Time passes: a job that waits for its next try may be run."""
    await gw.snapshot.services.database.execute("UPDATE jobs_jobs SET run_after = 1 WHERE id = $1", job_id)


async def shown(gw: Gateway, job_id: str, name: str = "app") -> dict[str, Any]:
    reply = await gw.get(f"/v1/jobs/{job_id}", headers=of(name))
    assert reply.status == 200, reply.body
    return dict(reply.data)


async def rows(gw: Gateway, count: int) -> list[dict[str, Any]]:
    """The usage rows, once there are so many."""
    async with asyncio.timeout(10):
        while True:
            found = await gw.snapshot.services.database.fetch("SELECT * FROM usage_requests ORDER BY at, id")
            if len(found) >= count:
                return found
            await asyncio.sleep(0.05)


def without_ids(stream: bytes) -> tuple[list[int], bytes]:
    """(the numbers of its events, the events without them, as an upstream sent them). Comments are left out."""
    plain = re.sub(rb"(?m)^:.*\n\n", b"", stream)
    return [int(n) for n in re.findall(rb"(?m)^id: (\d+)$", plain)], re.sub(rb"(?m)^id: \d+\n", b"", plain)


def events(stream: bytes) -> list[tuple[str, Any]]:
    """(name, data) of each."""
    out = []
    for event in re.sub(rb"(?m)^:.*\n\n", b"", stream).split(b"\n\n")[:-1]:
        fields = dict(line.split(b": ", 1) for line in event.split(b"\n"))
        out.append((fields.get(b"event", b"").decode(), msgspec.json.decode(fields[b"data"])))
    return out
