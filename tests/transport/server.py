"""An upstream that writes bytes, not replies, and tells what became of each connection."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

SECONDS = 10.0  # nothing here takes so long, however busy the machine is


@dataclass(frozen=True)
class Request:
    line: str
    headers: dict[str, str]
    body: bytes
    raw: bytes = field(repr=False, default=b"")

    @property
    def path(self) -> str:
        return self.line.split(" ")[1]


class Peer:
    """One connection, as the server sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.requests: list[Request] = []
        self.closed = asyncio.Event()

    async def request(self) -> Request | None:
        """The next one, whole; None if the client has closed the connection."""
        try:
            head = await self.head()
            body = await self.reader.readexactly(int(head.headers.get("content-length", 0)))
        except (asyncio.IncompleteReadError, OSError):
            return None
        request = Request(head.line, head.headers, body, head.raw + body)
        self.requests.append(request)
        return request

    async def head(self) -> Request:
        """The next one's head. Raises EOFError or OSError."""
        raw = await self.reader.readuntil(b"\r\n\r\n")
        line, *rest = raw.decode("latin-1").split("\r\n")[:-2]
        return Request(line, {n.lower(): v.strip() for n, _, v in (r.partition(":") for r in rest)}, b"", raw)

    async def write(self, *pieces: bytes) -> None:
        """Each piece is there, and seen by a client in this loop, before the next is sent."""
        for piece in pieces:
            try:
                self.writer.write(piece)
                await self.writer.drain()
            except OSError:
                return  # the client has seen enough
            await turns()

    def eof(self) -> None:
        """FIN: nothing more will be written."""
        with contextlib.suppress(OSError):  # the client was faster
            if not self.writer.is_closing():
                self.writer.write_eof()

    def reset(self) -> None:
        """RST."""
        sock = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):  # the client was faster: uvloop has no socket any more
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Waits until the client has closed the connection."""
        try:
            while await self.reader.read(1 << 16):
                pass
        except OSError:
            pass


class Server:
    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.came = asyncio.Condition()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        return sum(not peer.closed.is_set() for peer in self.peers)

    @property
    def requests(self) -> list[Request]:
        return [request for peer in self.peers for request in peer.requests]

    async def connections(self, count: int) -> list[Peer]:
        """Waits for so many, closed ones counted."""
        async with asyncio.timeout(SECONDS), self.came:
            await self.came.wait_for(lambda: len(self.peers) >= count)
        return self.peers

    async def all_closed(self) -> None:
        """The client holds no connection any more. Raises TimeoutError."""
        async with asyncio.timeout(SECONDS):
            for peer in self.peers:
                await peer.closed.wait()


@contextlib.asynccontextmanager
async def serving(
    play: Callable[[Peer], Awaitable[None]],
    *,
    tls: ssl.SSLContext | None = None,
    buffer: int | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[Server]:
    """Plays `play` on each connection, then waits for the client to close it. `buffer`: bytes that a socket sends ahead."""
    server = Server()
    running: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        peer = Peer(reader, writer)
        async with server.came:
            server.peers.append(peer)
            server.came.notify_all()
        try:
            await play(peer)
            await peer.gone()
        except asyncio.CancelledError:
            pass  # streams would tell the loop
        finally:
            writer.transport.abort()
            peer.closed.set()
            running.discard(task)

    sock = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    sock.setblocking(False)
    started = await asyncio.start_server(handle, sock=sock, ssl=tls, limit=1 << 20)
    server.port = sock.getsockname()[1]
    try:
        yield server
    finally:
        started.close()
        for task in list(running):
            task.cancel()
        if running:
            await asyncio.wait(running)


async def turns(count: int = 3) -> None:
    """Lets the other end of a socket in this loop see what was written."""
    for _ in range(count):
        await asyncio.sleep(0)


def split(data: bytes, at: Iterable[int]) -> list[bytes]:
    """`data` in pieces, cut at these offsets."""
    edges = [0, *sorted({a for a in at if 0 < a < len(data)}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]
