"""Requests of every kind, and what must come of each."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

DONE, ERROR = b"data: [DONE]\n\n", b"}}\n\n"
ASYNC = {"Prefer": "respond-async"}
MOST_TRIES = 60
PATIENCE = aiohttp.ClientTimeout(total=60)


@dataclass(frozen=True)
class Kind:
    """`model` steers the simulated upstream. `leaves`: after its first bytes, or after so many seconds without any."""

    name: str
    status: int = 200
    model: str = "xenios/sim-t0-n3"
    ends: bytes = b"}"
    stream: bool = False
    leaves: float | None = None
    path: str = "/v1/chat/completions"
    method: str = "POST"
    raw: bytes | None = None
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


WHOLE = Kind("whole")
STREAM = Kind("stream", model="xenios/sim-t0-d0-n6", ends=DONE, stream=True)
MESSAGES = {"max_tokens": 20}


def failing(word: str, status: int) -> Kind:
    return Kind(word, status, f"xenios/sim-t0-{word}")


def broken(word: str) -> Kind:
    """A stream that goes wrong after its first content."""
    return Kind(word, 200, f"xenios/sim-t0-d0-n6-{word}", ERROR, stream=True)


def refused(name: str, status: int, raw: bytes, **more: Any) -> Kind:
    return Kind(name, status, raw=raw, **more)


KINDS = (
    *[WHOLE] * 8,
    *[STREAM] * 5,
    Kind("long answer", model="xenios/sim-t0-n200"),
    Kind("long stream", model="xenios/sim-t0-d0-n200", ends=DONE, stream=True),
    Kind("alias", model="fast"),
    Kind("task", model="task/chat"),
    Kind("embeddings", path="/v1/embeddings", body={"input": "Hello"}),
    Kind("messages", path="/v1/messages", body=MESSAGES),
    Kind("messages stream", path="/v1/messages", stream=True, ends=b"\n\n", body=MESSAGES),
    Kind("responses stream", path="/v1/responses", stream=True, ends=b"\n\n", body={"input": "Hello"}),
    Kind("job", 202, headers=ASYNC),
    Kind("job stream", 202, STREAM.model, stream=True, headers=ASYNC),
    Kind("token", headers={"Authorization": "token"}),
    # clients that leave: in mid-stream, before its first byte, before a whole answer
    Kind("leaves a stream", model="xenios/sim-t0-d20-n500", stream=True, leaves=5.0),
    Kind("leaves early", model="xenios/sim-t2000-n3", stream=True, leaves=0.05),
    Kind("leaves a call", model="xenios/sim-t2000-n3", leaves=0.05),
    # upstreams that fail
    failing("fail-400", 400),
    failing("fail-429", 429),
    failing("fail-503", 503),
    failing("badjson", 502),
    failing("reset", 502),
    failing("err200", 502),
    broken("errmid"),
    broken("cutmid"),
    # bad clients
    refused("half a JSON", 400, b'{"model": "xen'),
    refused("no JSON", 400, b"\xff\xfe"),
    refused("deep", 400, b'{"model":' + b"[" * 5000),
    refused("no model", 400, b'{"messages": []}'),
    Kind("wrong types", 400, body={"model": 5}),
    Kind("nobody's key", 401, headers={"Authorization": "Bearer sk-nobodys"}),
    Kind("nobody's token", 401, headers={"Authorization": "Bearer e30.e30.e30"}),
    Kind("no path", 404, path="/v1/invented/{name}", method="GET"),
    Kind("no model of this name", 404, "invented/model-{name}"),
    # those who look
    Kind("models", path="/v1/models", method="GET"),
    Kind("dry run", headers={"X-Xenios-Explain": "1"}),
    Kind("alive", path="/health/live", method="GET"),
    Kind("metrics", path="/metrics", method="GET", ends=b"\n"),
    Kind("usage", path="/v1/usage?limit=3", method="GET"),
)


@dataclass
class Traffic:
    """Asks `session`'s gateway, by turns one of each kind; counts them, and keeps what was not as it must be.

    `names`: how many users, models and paths are invented. Whoever has no time to fill the caches invents few.
    """

    session: aiohttp.ClientSession
    tokens: list[str]
    names: int
    kinds: tuple[Kind, ...] = KINDS
    put_off: int = 0  # a store was busy: asked again, as clients do
    sent: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    number: int = 0

    async def round(self, count: int, clients: int) -> None:
        """So many requests by so many clients, each of which asks again once it was answered."""
        numbers = iter(range(self.number, self.number + count))
        self.number += count

        async def client() -> None:
            for number in numbers:  # shared: each takes the next
                await self._one(self.kinds[number % len(self.kinds)], number)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())

    async def _one(self, kind: Kind, number: int) -> None:
        self.sent[kind.name] += 1
        try:
            status, body = await self._ask(kind, number)
            for _ in range(MOST_TRIES):
                if status != 503 or kind.status == 503:
                    break
                self.put_off += 1
                await asyncio.sleep(0.5)
                status, body = await self._ask(kind, number)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.wrong[f"{kind.name}: {error!r}"[:200]] += 1
            return
        if status != kind.status or (status == 200 and body and not body.endswith(kind.ends)):
            self.wrong[f"{kind.name}: {status} {body[-300:]!r}"] += 1

    async def _ask(self, kind: Kind, number: int) -> tuple[int, bytes]:
        """(status, body); of a reply that was left there is none."""
        headers = {"X-Request-Id": f"soak-{number}", **kind.headers}
        if headers.get("Authorization") == "token":
            headers["Authorization"] = f"Bearer {self.tokens[number % min(self.names, len(self.tokens))]}"
        data = kind.raw if kind.raw is not None or kind.method == "GET" else self._body(kind, number)
        if data is not None:
            headers["Content-Type"] = "application/json"
        path = kind.path.format(name=number % self.names)
        try:
            async with (
                asyncio.timeout(kind.leaves),
                self.session.request(kind.method, path, data=data, headers=headers, timeout=PATIENCE) as reply,
            ):
                if kind.leaves is None or reply.status != kind.status:
                    return reply.status, await reply.read()
                await reply.content.readany()
                reply.close()
        except TimeoutError:
            if kind.leaves is None:
                raise
        return kind.status, b""

    def _body(self, kind: Kind, number: int) -> bytes:
        body: dict[str, Any] = {
            "model": kind.model.format(name=number % self.names),
            "user": f"user-{number % self.names}",
        }
        if kind.path in {"/v1/chat/completions", "/v1/messages"}:
            body["messages"] = [{"role": "user", "content": f"Question {number}"}]
        if kind.stream:
            body["stream"] = True
        return json.dumps({**body, **kind.body}).encode()
