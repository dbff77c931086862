"""The lean transport: HTTP/1.1 on asyncio's protocols and llhttp, with no task and no timer of its own per request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yarl import URL

from gateway.transport.dial import Dialer
from gateway.transport.pool import Pool
from gateway.transport.tls import Tls

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gateway.transport.connection import Connection
    from gateway.transport.reply import Reply

_OURS = frozenset(
    ("connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization", "te", "trailer",
     "transfer-encoding", "upgrade")
)  # fmt: skip
_MOST_REMEMBERED = 256


class HttpTransport:
    """Connections to one upstream: no redirects, no cookies, no proxy from the environment."""

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout: float,
        max_connections: int = 0,
        max_reply: int,
        ca_file: Path | None = None,
        proxy: str | None = None,
    ) -> None:
        """`connect_timeout` in seconds; `max_connections` 0 = any number; `max_reply`: bytes of a decompressed reply;
        `proxy`: http://[user:password@]host:port. Raises OSError for `ca_file`, ValueError for a bad URL.
        """
        self._base = base_url.rstrip("/")
        url = URL(self._base)
        # Loading the certificates takes a tenth of a second: not while requests wait. Raises OSError.
        tls = Tls(ca_file) if url.scheme == "https" else None
        self._dialer = Dialer(url, timeout=connect_timeout, tls=tls, proxy=proxy)
        self._whole_url = proxy is not None and tls is None
        self._pool = Pool(self._dialer, max_connections, max_reply)
        self._starts: dict[tuple[str, str], str] = {}
        self._names: dict[str, str] = {}

    async def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> Reply:
        head = self._head(method, path, headers, body)
        pool = self._pool
        reply = await _ask(pool.take() or await pool.open(), head, body)
        if reply.stale:  # closed as idle while the request was on its way (RFC 9112 §9.3.1): nobody has seen it
            reply = await _ask(await pool.open(fresh=True), head, body)
        if reply.error is not None and not reply.status:
            raise reply.error
        return reply

    async def close(self) -> None:
        await self._pool.close()

    def _head(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        names = self._names
        lines = [self._starts.get((method, path)) or self._start(method, path)]
        for name, value in headers.items():
            begin = names.get(name)
            if begin is None:
                begin = self._begin(name)
            if begin:
                lines.append(f"{begin}{value}\r\n")
        lines.append("\r\n" if body is None else f"Content-Length: {len(body)}\r\n\r\n")
        text = "".join(lines)
        # Each entry is one line, whatever is in it.
        ends = len(lines) + lines[0].count("\n") - (body is None)
        if text.count("\n") != ends or text.count("\r") != ends or "\0" in text:
            raise ValueError("A header of a request to the upstream holds a line break or a NUL.")
        return text.encode()

    def _start(self, method: str, path: str) -> str:
        """The request line and what follows from the address."""
        url = URL(self._base + path)
        host = url.host_port_subcomponent or ""
        target = f"http://{host}{url.raw_path_qs}" if self._whole_url else url.raw_path_qs
        start = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n"
        if self._whole_url and self._dialer.proxy_credentials:
            start += f"Proxy-Authorization: {self._dialer.proxy_credentials}\r\n"
        if len(self._starts) < _MOST_REMEMBERED:
            self._starts[method, path] = start
        return start

    def _begin(self, name: str) -> str:
        """What a header's line begins with; "" for those that are the connection's."""
        begin = "" if name.lower() in _OURS else f"{name}: "
        if len(self._names) < _MOST_REMEMBERED:
            self._names[name] = begin
        return begin


async def _ask(connection: Connection, head: bytes, body: bytes | None) -> Reply:
    """Returns when the head is there or can't come any more."""
    reply = connection.ask(head, body)
    try:
        if not reply.status and reply.error is None:
            await reply.more()
    except BaseException:
        reply.close()
        raise
    return reply
