"""The transport on aiohttp's client."""

from __future__ import annotations

import io
import ssl
import zlib
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.payload import BytesPayload
from yarl import URL

from gateway.errors import Cause, UpstreamError
from gateway.upstream import read_chunks, too_large

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from multidict import CIMultiDictProxy

LARGE = 1 << 20  # aiohttp warns of larger bodies given as bytes


class AiohttpResponse:
    """One reply of aiohttp's client behind `UpstreamResponse`."""

    __slots__ = ("_content", "_inflate", "_inflating", "_limit", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse, inflate_limit: int) -> None:
        self._response = response
        self._content = response.content
        self.status = response.status
        self.headers: CIMultiDictProxy[str] = response.headers
        self._limit = inflate_limit
        self._inflate = _inflater(response.headers.get("Content-Encoding"))
        self._inflating = False

    async def chunk(self) -> bytes:
        try:
            data = await self._content.readany()
        except aiohttp.ClientPayloadError as error:
            raise UpstreamError(Cause.TRUNCATED, "The upstream's reply was cut off.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(Cause.TRUNCATED, "The connection to the upstream was lost during its reply.") from error
        if self._inflate is None:
            return data
        if not data:
            if self._inflating and not self._inflate.eof:
                raise UpstreamError(Cause.TRUNCATED, "The upstream's compressed reply was cut off.")
            return data
        self._inflating = True
        return await self._inflated(data)

    async def read(self, limit: int) -> bytes:
        content = self._content
        if self._inflate is None and content.is_eof():  # a small reply has arrived with its head
            data = content.read_nowait()
            if len(data) <= limit:
                return data
            raise too_large(limit)
        return await read_chunks(self, limit)

    async def _inflated(self, data: bytes) -> bytes:
        """A reply compressed though we didn't ask for it; a bomb ends at the limit."""
        assert_inflate = self._inflate
        if assert_inflate is None:
            return data
        try:
            out = assert_inflate.decompress(data, self._limit)
        except zlib.error as error:
            raise UpstreamError(Cause.BAD_REPLY, "The upstream's compressed reply is broken.") from error
        self._limit -= len(out)
        if assert_inflate.unconsumed_tail or self._limit <= 0:
            raise UpstreamError(Cause.BAD_REPLY, "The upstream's compressed reply is too large.")
        return out or await self.chunk()

    @property
    def complete(self) -> bool:
        return self._content.at_eof()

    def close(self) -> None:
        # aiohttp gives a complete reply's connection back by itself; whatever is not complete is dropped.
        if self._content.is_eof():
            self._response.release()
        else:
            self._response.close()


def _inflater(encoding: str | None) -> zlib._Decompress | None:
    match (encoding or "identity").strip().lower():
        case "identity":
            return None
        case "gzip" | "deflate":
            return zlib.decompressobj(wbits=47)
        case _:
            raise UpstreamError(
                Cause.BAD_REPLY, "The upstream compressed its reply in a way that it was not asked for."
            )


class AiohttpTransport:
    """Connections to one upstream: no redirects, no cookies, no proxy from the environment."""

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout: float,
        max_connections: int = 0,
        max_reply: int,
        ca_file: Path | None = None,
    ) -> None:
        self._base = base_url.rstrip("/")
        self._connect_timeout = connect_timeout
        self._max_connections = max_connections
        self._max_reply = max_reply
        # Loading the certificates takes a tenth of a second: not while requests wait. Raises OSError.
        self._tls = ssl.create_default_context(cafile=ca_file) if base_url.startswith("https:") else None
        self._urls: dict[str, URL] = {}
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections, ttl_dns_cache=300, ssl=self._tls or True),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
            # A header line of an upstream may be long (rate-limit policies, tracing); 16 KiB is not.
            max_line_size=16384,
            max_field_size=16384,
        )
        return self._session

    async def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> AiohttpResponse:
        session = self._session or self._open()
        url = self._urls.get(path)
        if url is None:
            url = URL(self._base + path)
            if len(self._urls) < 64:
                self._urls[path] = url
        # As a payload at once: aiohttp would look for the right kind in its registry.
        data = body if body is None else BytesPayload(body) if len(body) <= LARGE else io.BytesIO(body)
        try:
            response = await session.request(method, url, data=data, headers=headers, allow_redirects=False)
        except aiohttp.ClientConnectorDNSError as error:
            raise UpstreamError(Cause.CONNECTION, "The upstream's name can't be resolved.") from error
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError) as error:
            raise UpstreamError(Cause.TLS, "The upstream's TLS certificate or handshake is not acceptable.") from error
        except TimeoutError as error:
            raise UpstreamError(Cause.TIMEOUT, "Connecting to the upstream took too long.") from error
        except aiohttp.ClientResponseError as error:
            raise UpstreamError(Cause.BAD_REPLY, "The upstream's reply is not valid HTTP.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(Cause.CONNECTION, "The upstream can't be reached.") from error
        try:
            return AiohttpResponse(response, self._max_reply)
        except UpstreamError:
            response.close()
            raise

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
