"""Both transports, asked in every way that the gateway asks them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import pytest
import uvloop

from gateway.errors import Cause, UpstreamError
from gateway.transport.aiohttp_client import AiohttpTransport
from gateway.transport.http import HttpTransport
from tests.transport.corpus import LIMIT, Whole
from tests.transport.server import SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from gateway.upstream import Transport, UpstreamResponse

TRANSPORTS: dict[str, Callable[..., Transport]] = {"httptools": HttpTransport, "aiohttp": AiohttpTransport}
both = pytest.mark.parametrize("make", TRANSPORTS.values(), ids=TRANSPORTS)
LONGEST = 1 << 22  # of a body


def transport(url: str, make: Callable[..., Transport] = HttpTransport, **how: Any) -> Transport:
    return make(url, **{"connect_timeout": SECONDS, "max_reply": LIMIT, **how})


@asynccontextmanager
async def connected(url: str, make: Callable[..., Transport] = HttpTransport, **how: Any) -> AsyncIterator[Transport]:
    made = transport(url, make, **how)
    try:
        yield made
    finally:
        await made.close()


async def by_read(reply: UpstreamResponse) -> bytes:
    return await reply.read(LONGEST)


async def by_chunk(reply: UpstreamResponse) -> bytes:
    body = b""
    while piece := await reply.chunk():
        body += piece
    return body


async def by_push(reply: UpstreamResponse) -> bytes:
    """By `push` where the transport can, else as the gateway goes on."""
    body: list[bytes] = []
    ended: asyncio.Future[UpstreamError | None] = asyncio.get_running_loop().create_future()
    if not reply.push(body.append, ended.set_result):
        return await by_chunk(reply)
    if (error := await ended) is not None:
        raise error
    return b"".join(body)


WAYS = {"read": by_read, "chunk": by_chunk, "push": by_push}


async def ask(
    made: Transport, path: str, way: Callable[[UpstreamResponse], Coroutine[Any, Any, bytes]] = by_read
) -> Whole | Cause:
    """One POST, to its end."""
    try:
        reply = await made.send("POST", path, {"Content-Type": "application/json"}, b"{}")
    except UpstreamError as error:
        return error.cause
    try:
        body = await way(reply)
        assert reply.complete
        return Whole(reply.status, body, reply.headers)
    except UpstreamError as error:
        return error.cause
    finally:
        reply.close()


class Loop:
    """Keeps one event loop of a kind, so that a test can run there many times."""

    def __init__(self, kind: str) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if kind == "uvloop" else None)
        self.broken: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._runner.__enter__()
        self._runner.get_loop().set_exception_handler(lambda _, context: self.broken.append(context))
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner.__exit__(*exc)  # type: ignore[arg-type]

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = SECONDS) -> Any:
        """Raises what the loop was told of as well."""

        async def bounded() -> Any:
            async with asyncio.timeout(seconds):
                return await work

        self.broken.clear()
        result = self._runner.run(bounded())
        assert self.broken == []
        return result
