"""New connections to one upstream: its name's addresses, a race between them, a proxy in between, TLS."""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
import socket
import ssl
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import unquote

from yarl import URL

from gateway.errors import Cause, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.transport.connection import Connection
    from gateway.transport.tls import Tls

DNS_SECONDS = 60.0  # getaddrinfo tells no TTL
HEAD_START = 0.25  # seconds until the next address is tried beside the last (RFC 8305: 250 ms)
Address: TypeAlias = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]
_LONGEST_ANSWER = 16384
_ANSWER = re.compile(rb"HTTP/1\.[01] (\d{3})(?: |\r)")


class Dialer:
    """Opens connections to the host of `url`, through `proxy` if there is one."""

    def __init__(self, url: URL, *, timeout: float, tls: Tls | None, proxy: str | None = None) -> None:
        """`timeout`: seconds for all of it. Raises ValueError."""
        self._tls = tls
        self._timeout = timeout
        self._name = (url.raw_host or "").rstrip(".")
        via = URL(proxy) if proxy else None
        self.proxy_credentials = _credentials(via) if via is not None else ""
        self._tunnel = b""
        if via is not None and tls is not None:
            self._tunnel = _connect_request(url, self.proxy_credentials)
        self._host, self._port = _place(via or url)
        self._who = "proxy" if via is not None else "upstream"
        self._addresses: list[Address] = []
        self._expires = 0.0
        self._resolving: asyncio.Lock | None = None

    async def dial(self, make: Callable[[], Connection]) -> Connection:
        """Raises UpstreamError: CONNECTION, TLS or TIMEOUT."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._dial(make)
        except socket.gaierror as error:
            raise UpstreamError(Cause.CONNECTION, f"The {self._who}'s name can't be resolved.") from error
        except ssl.SSLError as error:
            raise UpstreamError(Cause.TLS, "The upstream's TLS certificate or handshake is not acceptable.") from error
        except TimeoutError as error:
            raise UpstreamError(Cause.TIMEOUT, "Connecting to the upstream took too long.") from error
        except (OSError, asyncio.IncompleteReadError) as error:
            raise UpstreamError(Cause.CONNECTION, f"The {self._who} can't be reached.") from error

    def remember(self, connection: Connection) -> None:
        """`connection` has been of use: so will be its TLS session."""
        if self._tls is not None and (made := connection.tls) is not None:
            self._tls.remember(made)

    async def _dial(self, make: Callable[[], Connection]) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = await self._resolve(loop)
        try:
            sock = await _race(loop, addresses)
        except OSError:
            self._expires = 0.0  # it may have moved
            raise
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tunnel:
                await _open_tunnel(loop, sock, self._tunnel)
            if self._tls is None:
                _, connection = await loop.create_connection(make, sock=sock)
            else:
                _, connection = await loop.create_connection(
                    make, sock=sock, ssl=self._tls.context, server_hostname=self._name
                )
        except BaseException:
            sock.close()
            raise
        return connection

    async def _resolve(self, loop: asyncio.AbstractEventLoop) -> list[Address]:
        """The name's addresses, asked for once for all who wait."""
        if loop.time() < self._expires:
            return self._addresses
        self._resolving = self._resolving or asyncio.Lock()
        async with self._resolving:
            if loop.time() >= self._expires:
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                self._addresses = _in_turn([(family, address) for family, _, _, _, address in found])
                self._expires = loop.time() + DNS_SECONDS
            return self._addresses


def _place(url: URL) -> tuple[str, int]:
    if not url.raw_host or url.port is None:
        raise ValueError(f"no host in {url.with_user(None)}")
    return url.raw_host, url.port


def _credentials(proxy: URL) -> str:
    """The value of Proxy-Authorization, "" if the URL names no user."""
    if proxy.raw_user is None:
        return ""
    pair = f"{unquote(proxy.raw_user)}:{unquote(proxy.raw_password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _connect_request(url: URL, credentials: str) -> bytes:
    host, port = _place(url)
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if credentials:
        lines.append(f"Proxy-Authorization: {credentials}")
    return "\r\n".join([*lines, "", ""]).encode()


def _in_turn(addresses: list[Address]) -> list[Address]:
    """The families in turn, beginning with the system's choice (RFC 8305)."""
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, "no address")
    first = [a for a in addresses if a[0] == addresses[0][0]]
    other = [a for a in addresses if a[0] != addresses[0][0]]
    return [a for pair in itertools.zip_longest(first, other) for a in pair if a is not None]


async def _race(loop: asyncio.AbstractEventLoop, addresses: list[Address]) -> socket.socket:
    """The first connection that stands; each address has a head start before the next (happy eyeballs)."""
    if len(addresses) == 1:
        return await _connect(loop, addresses[0])
    running: set[asyncio.Task[socket.socket]] = set()
    won: socket.socket | None = None
    failure: BaseException | None = None
    try:
        for address in [*addresses, None]:
            if address is not None:
                running.add(loop.create_task(_connect(loop, address)))
            while running and won is None:
                done, running = await asyncio.wait(
                    running, timeout=None if address is None else HEAD_START, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    if (error := task.exception()) is not None:
                        failure = failure or error
                    elif won is None:
                        won = task.result()
                    else:
                        task.result().close()
                if address is not None:
                    break
            if won is not None:
                return won
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(_close_loser)
    raise failure or OSError("no address")


def _close_loser(task: asyncio.Task[socket.socket]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def _connect(loop: asyncio.AbstractEventLoop, address: Address) -> socket.socket:
    sock = socket.socket(address[0], socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, address[1])
    except BaseException:
        sock.close()
        raise
    return sock


async def _open_tunnel(loop: asyncio.AbstractEventLoop, sock: socket.socket, request: bytes) -> None:
    """Ask the proxy for a way to the upstream. Raises UpstreamError."""
    await loop.sock_sendall(sock, request)
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < _LONGEST_ANSWER:
        data = await loop.sock_recv(sock, _LONGEST_ANSWER)
        if not data:
            break
        answer += data
    status = _ANSWER.match(answer)
    # Nothing stands behind its head: an upstream with TLS says nothing before we do.
    if status is None or not answer.endswith(b"\r\n\r\n"):
        raise UpstreamError(Cause.CONNECTION, "The proxy's answer to CONNECT is not valid.")
    if not status[1].startswith(b"2"):
        raise UpstreamError(Cause.CONNECTION, f"The proxy answered CONNECT with HTTP {status[1].decode()}.")
