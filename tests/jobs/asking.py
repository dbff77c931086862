"""A client that comes again when it is told to, and what it finds of its jobs and their rows."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import aiohttp

from gateway.kit.upstream import MODEL

CHAT = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}


class Asker:
    """Its requests carry an idempotency key each, the same each time. `told`: how often it heard which status."""

    def __init__(self, url: str, key: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}
        self._session = session
        self.told: Counter[int] = Counter()

    async def take(self, name: str, **more: Any) -> str:
        """The id of the job. `more`: of the request."""
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                headers = {**self._headers, "Prefer": "respond-async", "Idempotency-Key": name}
                url = f"{self._url}/v1/chat/completions"
                async with self._session.post(url, json={**CHAT, **more}, headers=headers) as reply:
                    self.told[reply.status] += 1
                    if reply.status in {200, 202}:
                        return reply.headers["x-xenios-job"]
                    assert reply.status == 503, await reply.text()
            await asyncio.sleep(0.1)

    async def get(self, path: str) -> dict:
        """Once it is answered."""
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with self._session.get(f"{self._url}{path}", headers=self._headers) as reply:
                    if reply.status == 200:
                        return await reply.json()
                    assert reply.status == 503, await reply.text()
            await asyncio.sleep(0.1)

    async def jobs(self) -> dict[str, dict]:
        return await self._all("/v1/jobs?limit=100")

    async def rows(self, prefix: str = "") -> dict[str, dict]:
        """Those of usage whose ids begin so: `job_` for the runs of jobs."""
        return {n: row for n, row in (await self._all("/admin/usage?limit=1000")).items() if n.startswith(prefix)}

    async def _all(self, path: str) -> dict[str, dict]:
        """By id; each stands there once."""
        found: list[dict] = []
        after = ""
        while True:
            page = await self.get(path + after)
            found += page["data"]
            if not page["has_more"]:
                assert len({one["id"] for one in found}) == len(found)
                return {one["id"]: one for one in found}
            after = f"&after={page['last_id']}"


def over(jobs: dict[str, dict]) -> dict[str, dict]:
    return {n: job for n, job in jobs.items() if job["finished_at"]}


def sent(rows: dict[str, dict]) -> list[dict]:
    """Not those of tries that a store which was away refused before anything was sent."""
    return [row for row in rows.values() if row["attempts"] != 0]
