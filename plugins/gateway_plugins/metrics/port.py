"""A port of its own for the metrics: a small server that knows one path."""

from __future__ import annotations

import hmac
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiohttp import web

from gateway import GatewayError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


CLOSE_SECONDS = 1.0  # whoever reads slowly does not hold up a stop


class _Listener:
    """At an address, for the plugin as it is and as it was: after a reload that one lives until its last request ends.

    So nobody is cut off by a change, and who asks is answered by the newest: another token counts at once.
    """

    def __init__(self) -> None:
        self.ports: list[Port] = []
        self.runner = web.ServerRunner(web.Server(self._answer, access_log=None), shutdown_timeout=CLOSE_SECONDS)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if not self.ports:
            return web.Response(status=503, text="Closing.\n")
        return await self.ports[-1].answer(request)


_listeners: dict[tuple[str, int], _Listener] = {}


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
        address = self._host, self._port
        listener = _listeners.get(address)
        if listener is None:
            listener = _Listener()
            await listener.runner.setup()
            try:
                await web.TCPSite(listener.runner, *address, reuse_port=True).start()
            except BaseException:
                await listener.runner.cleanup()
                raise
            _listeners[address] = listener
        listener.ports.append(self)
        try:
            yield
        finally:
            listener.ports.remove(self)
            if not listener.ports:
                del _listeners[address]
                await listener.runner.cleanup()

    async def answer(self, request: web.BaseRequest) -> web.Response:
        if request.path != self._path:
            return web.Response(status=404, text=f"The metrics are at {self._path}.\n")
        if request.method not in {"GET", "HEAD"}:
            return web.Response(status=405, text="GET it.\n", headers={"Allow": "GET, HEAD"})
        sent = request.headers.get("Authorization", "").encode(errors="replace")
        if self._wanted is not None and not hmac.compare_digest(self._wanted, sent):
            return web.Response(status=401, text="Send the token as `Authorization: Bearer <token>`.\n")
        try:
            text, content_type = await self._shown(request.headers.get("Accept", ""))
        except GatewayError as error:
            return web.Response(status=error.status_code, text=f"{error.message}\n")
        return web.Response(body=text, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
