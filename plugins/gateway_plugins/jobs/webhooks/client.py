"""Calls URLs that others chose: the address that was checked is the one that is connected to."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from gateway import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from gateway_plugins.jobs.webhooks.addresses import Rules

    AddrInfo: TypeAlias = tuple[Any, ...]  # as `socket.getaddrinfo` gives it
    Lookup: TypeAlias = Callable[..., list[Any]]

# A word for each: what else an error says may hold what the receiver sent.
Failure = Literal["status", "not_allowed", "dns", "tls", "timeout", "connection", "bad_reply"]

MOST_OF_REPLY = 4096
REPLY_SECONDS = 1.0  # for the rest of a reply whose status is known
# A name server that hangs holds up no other work of the process; nor, as there are more of them than one tenant has
# messages under way, those of another tenant.
RESOLVERS = 64


class NotAllowedError(OSError):
    """The address may not be called."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one try. `status` None: there was no reply."""

    status: int | None
    failure: Failure | None
    retry_after: float | None  # seconds
    seconds: float


class Client:
    """No redirects, no cookies, no proxy from the environment, no connection used twice."""

    def __init__(
        self,
        rules: Rules,
        *,
        timeout: float,
        ca_file: Path | None = None,
        lookup: Lookup = socket.getaddrinfo,
    ) -> None:
        """`ca_file` is trusted beside the system's authorities. Raises OSError."""
        self._rules = rules
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._tls = ssl.create_default_context()
        if ca_file is not None:
            self._tls.load_verify_locations(ca_file)
        self._lookup = lookup
        self._session: aiohttp.ClientSession | None = None

    async def post(self, text: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send once. Raises nothing but what cancels."""
        began = time.monotonic()
        status, failure, retry_after = await self._post(text, headers, body)
        return Answer(status, failure, retry_after, time.monotonic() - began)

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def _post(
        self, text: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int | None, Failure | None, float | None]:
        try:
            url = self._rules.check(text)  # again: the rules may be stricter by now
        except ValueError:
            return None, "not_allowed", None
        try:
            reply = await self._open().post(url, data=body, headers=headers, allow_redirects=False)
        except TimeoutError:
            return None, "timeout", None
        except aiohttp.ClientConnectorError as error:
            return None, _failure(error), None
        except (aiohttp.ClientResponseError, aiohttp.ClientPayloadError, ValueError):
            return None, "bad_reply", None
        except (aiohttp.ClientError, OSError):
            return None, "connection", None
        try:
            # whoever is cut off in the midst of writing would take that for our failure
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError, asyncio.IncompleteReadError):
                async with asyncio.timeout(REPLY_SECONDS):
                    await reply.content.readexactly(MOST_OF_REPLY)
        finally:
            reply.close()
        wait = _seconds(reply.headers.get("Retry-After"))
        return reply.status, None if 200 <= reply.status < 300 else "status", wait

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0,
                ssl=self._tls,
                resolver=_Resolver(self._lookup),
                use_dns_cache=False,
                force_close=True,
                socket_factory=self._socket,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                timeout=self._timeout,
                headers={"User-Agent": f"Xenios/{__version__}"},
            )
        return self._session

    def _socket(self, address: AddrInfo) -> socket.socket:
        """Called for each address right before it is connected to, whether it stood in the URL or a name led to it."""
        family, kind, protocol, _, where = address
        if not self._rules.admits(where[0]):
            raise NotAllowedError
        return socket.socket(family, kind, protocol)


class _Resolver(AbstractResolver):
    """The system's, in threads of its own."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._threads = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="webhooks-dns")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, self._ask, host, port, family)
        return [
            ResolveResult(hostname=host, host=where[0], port=where[1], family=kind, proto=protocol, flags=_NUMERIC)
            for kind, _, protocol, _, where in found
        ]

    def _ask(self, host: str, port: int, family: int) -> list[AddrInfo]:
        return self._lookup(host, port, family=family, type=socket.SOCK_STREAM)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


def _failure(error: aiohttp.ClientConnectorError) -> Failure:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "dns"
    if isinstance(error, aiohttp.ClientSSLError):
        return "tls"
    return "not_allowed" if isinstance(error.os_error, NotAllowedError) else "connection"


def _seconds(text: str | None) -> float | None:
    """`Retry-After`: seconds or a date."""
    if not text:
        return None
    with contextlib.suppress(ValueError):
        number = float(text)
        return number if math.isfinite(number) and number >= 0 else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None
