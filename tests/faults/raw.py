"""A client that writes bytes, not requests: broken, slow and half-finished ones."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    from gateway.kit.testing import Gateway

CHAT = {"model": "test/model", "messages": [{"role": "user", "content": "Hello"}]}


@dataclass
class RawReply:
    """One reply as it stood on the wire, its chunks joined."""

    status: int
    headers: dict[str, str]
    body: bytes
    head: bytes = field(repr=False, default=b"")

    @property
    def data(self) -> Any:
        return json.loads(self.body)


class Raw:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, *, seconds: float = 5.0, method: str = "GET") -> RawReply:
        """The next reply. Raises EOFError (IncompleteReadError) if the connection ends before it does."""
        async with asyncio.timeout(seconds):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            status = int(lines[0].split(" ")[1])
            headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines[1:] if line)}
            return RawReply(status, headers, await self._body(status, headers, method), head)

    async def _body(self, status: int, headers: dict[str, str], method: str) -> bytes:
        if method == "HEAD" or status in {100, 204, 304}:
            return b""
        if headers.get("transfer-encoding") == "chunked":
            out = b""
            while size := int((await self.reader.readuntil(b"\r\n")).strip(), 16):
                out += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
            return out
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        return await self.reader.read()

    async def rest(self, *, seconds: float = 5.0) -> bytes:
        """Everything up to the end of the connection; a reset counts as the end."""
        out = b""
        async with asyncio.timeout(seconds):
            try:
                while piece := await self.reader.read(1 << 16):
                    out += piece
            except ConnectionError:
                pass
        return out

    async def ended(self, *, seconds: float = 5.0) -> bool:
        """Waits for the end; whether nothing came before it."""
        return await self.rest(seconds=seconds) == b""

    async def rest_within(self, seconds: float) -> bytes:
        """What comes in that time, whether or not the connection ends."""
        out = b""
        try:
            async with asyncio.timeout(seconds):
                while piece := await self.reader.read(1 << 16):
                    out += piece
        except (TimeoutError, ConnectionError):
            pass
        return out

    def abort(self) -> None:
        """RST."""
        self.writer.transport.abort()

    def close(self) -> None:
        """FIN."""
        self.writer.close()


@asynccontextmanager
async def connect(
    gw: Gateway | int,
    *,
    receive_buffer: int | None = None,
    tls: ssl.SSLContext | None = None,
    source: str = "127.0.0.1",
) -> AsyncIterator[Raw]:
    """A connection to a gateway or a port. `receive_buffer` in bytes makes a client that can't take much; `source`: from
    which of this machine's addresses.
    """
    port = gw if isinstance(gw, int) else gw.worker.port
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    sock.bind((source, 0))
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(
        sock=sock, limit=1 << 16, ssl=tls, server_hostname="localhost" if tls else None
    )
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()


def head(
    gw: Gateway | None,
    *lines: str | bytes,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    version: str = "1.1",
    key: str | None = None,
    host: str = "gateway",
    json_type: bool = True,
) -> bytes:
    """A request's head with the gateway's key (or `key`); `lines` are added as they are."""
    out = [f"{method} {path} HTTP/{version}".encode(), f"Host: {host}".encode()]
    bearer = key or (gw.key if gw else None)
    if bearer:
        out.append(f"Authorization: Bearer {bearer}".encode())
    if json_type:
        out.append(b"Content-Type: application/json")
    out += [line.encode("latin-1") if isinstance(line, str) else line for line in lines]
    return b"\r\n".join([*out, b"", b""])


def request(gw: Gateway | None, body: Any = None, *lines: str | bytes, **how: Any) -> bytes:
    """A whole request; `body` is bytes, JSON, or None for the default chat."""
    raw = body if isinstance(body, bytes) else json.dumps(CHAT if body is None else body).encode()
    return head(gw, f"Content-Length: {len(raw)}", *lines, **how) + raw


async def exchange(gw: Gateway | int, data: bytes, **how: Any) -> RawReply:
    """One request on a connection of its own."""
    async with connect(gw) as raw:
        await raw.send(data)
        return await raw.reply(**how)
