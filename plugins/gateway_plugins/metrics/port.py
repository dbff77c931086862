"""A port of its own for the metrics: a small server that knows one path."""

from __future__ import annotations

import hmac
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


class Port:
    """Each worker listens on it; the kernel hands a scrape to one of them, which tells of all."""

    def __init__(
        self, host: str, port: int, path: str, token: str | None, shown: Callable[[str], Awaitable[tuple[bytes, str]]]
    ) -> None:
        """`shown`: what the client accepts → (text, content type)."""
        self._host, self._port, self._path = host, port, path
        self._wanted = f"Bearer {token}".encode() if token else None
        self._shown = shown

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Listen while the context lasts. Raises OSError."""
        server = web.Server(self._answer, access_log=None)
        runner = web.ServerRunner(server)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port, reuse_port=True).start()
            yield
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if request.path != self._path:
            return web.Response(status=404, text=f"The metrics are at {self._path}.\n")
        if request.method not in {"GET", "HEAD"}:
            return web.Response(status=405, text="GET it.\n", headers={"Allow": "GET, HEAD"})
        sent = request.headers.get("Authorization", "").encode(errors="replace")
        if self._wanted is not None and not hmac.compare_digest(self._wanted, sent):
            return web.Response(status=401, text="Send the token as `Authorization: Bearer <token>`.\n")
        text, content_type = await self._shown(request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
