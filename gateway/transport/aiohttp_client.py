"""The transport on aiohttp's client.

A POST goes by aiohttp's connector, request and response, but past `ClientSession.request` and the request's own
constructor: what those prepare anew each time (URL, cookies, credentials, redirects, a task that writes the body) is
the same for all requests of a transport, or not wanted. That is a third of the client's time.
"""

from __future__ import annotations

import asyncio
import io
import ssl
import weakref
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import hdrs
from aiohttp.helpers import TimerNoop
from aiohttp.http import HttpVersion11, StreamWriter
from multidict import CIMultiDict
from yarl import URL

from gateway.errors import Cause, UpstreamError
from gateway.transport.inflate import inflater
from gateway.upstream import read_chunks, too_large

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace
    from multidict import CIMultiDictProxy

LARGE = 1 << 20  # larger bodies are written piece by piece, at the upstream's pace
LONGEST_LINE = 16384  # a header line of an upstream may be long (rate-limit policies, tracing)
_NO_TIMER = TimerNoop()


class AiohttpResponse:
    """One reply of aiohttp's client behind `UpstreamResponse`."""

    __slots__ = ("_content", "_inflate", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse, inflate_limit: int) -> None:
        self._response = response
        self._content = response.content
        self.status = response.status
        self.headers: CIMultiDictProxy[str] = response.headers
        self._inflate = inflater(response.headers.get("Content-Encoding"), inflate_limit)

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
            if (cut := self._inflate.cut_off()) is not None:
                raise cut
            return data
        return self._inflate.feed(data) or await self.chunk()

    async def read(self, limit: int, heard: Callable[[bytes], None] | None = None) -> bytes:
        content = self._content
        if self._inflate is None and content.is_eof():  # a small reply has arrived with its head
            data = content.read_nowait()
            if len(data) <= limit:
                return data
            raise too_large(limit)
        return await read_chunks(self, limit, heard)

    @property
    def complete(self) -> bool:
        return self._content.at_eof()

    def push(self, receive: Callable[[bytes], None], ended: Callable[[UpstreamError | None], None]) -> bool:
        del receive, ended
        return False

    def pause(self) -> None:
        """Its flow control is its own."""

    resume = pause

    def close(self) -> None:
        # aiohttp gives a complete reply's connection back by itself; whatever is not complete is dropped.
        if self._content.is_eof():
            self._response.release()
        else:
            self._response.close()


class _Connector(aiohttp.TCPConnector):
    """Aiohttp's own takes what an upstream said on an idle connection for the beginning of the next reply."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._used: weakref.WeakSet[Any] = weakref.WeakSet()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - its signature
    ) -> Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            # What is said on a new one is nobody else's; and who always speaks first is not to be asked for ever.
            if protocol is None or protocol not in self._used or not protocol.should_close:
                if protocol is not None:
                    self._used.add(protocol)
                return connection
            connection.close()


class _Post(aiohttp.ClientRequest):
    """A POST whose head and body are complete, written at once."""

    version = HttpVersion11
    proxy = proxy_auth = proxy_headers = None
    chunked = compress = length = server_hostname = None
    method = hdrs.METH_POST
    response_class = aiohttp.ClientResponse

    def __init__(
        self, url: URL, headers: CIMultiDict[str], body: bytes, session: aiohttp.ClientSession, key: ConnectionKey
    ) -> None:
        self.url = self.original_url = url
        self.headers = headers
        self.loop = asyncio.get_running_loop()
        self._session = session
        self._timer = _NO_TIMER
        self._traces = []
        self._ssl = True  # the connector's own context
        self._key = key
        self._bytes = body

    @property
    def connection_key(self) -> ConnectionKey:
        return self._key

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        protocol = conn.protocol
        if protocol is None:
            raise aiohttp.ClientConnectionError("The connection is closed.")
        writer = StreamWriter(protocol, self.loop)
        await writer.write_headers(f"POST {self.url.raw_path_qs} HTTP/1.1", self.headers)
        await writer.write_eof(self._bytes)
        return aiohttp.ClientResponse(
            self.method,
            self.url,
            writer=None,
            continue100=None,
            timer=_NO_TIMER,
            request_info=self.request_info,
            traces=self._traces,
            loop=self.loop,
            session=self._session,
            stream_writer=writer,
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
        self._max_connections = max_connections
        self._max_reply = max_reply
        # Loading the certificates takes a tenth of a second: not while requests wait. Raises OSError.
        self._tls = ssl.create_default_context(cafile=ca_file) if base_url.startswith("https:") else None
        self._urls: dict[str, URL] = {}
        self._session: aiohttp.ClientSession | None = None
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout)
        self._key: ConnectionKey | None = None
        self._host = ""

    def _open(self) -> aiohttp.ClientSession:
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=self._max_connections, ttl_dns_cache=300, ssl=self._tls or True),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=self._timeout,
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_LINE,
        )
        return self._session

    async def _post(
        self, session: aiohttp.ClientSession, url: URL, headers: Mapping[str, str], body: bytes
    ) -> aiohttp.ClientResponse:
        connector = session.connector
        if connector is None:
            raise aiohttp.ClientConnectionError("The session is closed.")
        if self._key is None:
            model = aiohttp.ClientRequest("POST", url, session=session)
            self._key, self._host = model.connection_key, model.headers[hdrs.HOST]
        head = CIMultiDict(headers)
        head[hdrs.HOST] = self._host
        head[hdrs.CONTENT_LENGTH] = str(len(body))
        request = _Post(url, head, body, session, self._key)
        connection = await connector.connect(request, traces=[], timeout=self._timeout)
        try:
            if connection.protocol is not None:
                connection.protocol.set_response_params(
                    timer=_NO_TIMER,
                    read_until_eof=True,
                    auto_decompress=False,
                    max_line_size=LONGEST_LINE,
                    max_field_size=LONGEST_LINE,
                )
            response = await request.send(connection)
            try:
                await response.start(connection)
            except BaseException:
                response.close()
                raise
        except BaseException:
            connection.close()
            raise
        return response

    async def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> AiohttpResponse:
        session = self._session or self._open()
        url = self._urls.get(path)
        if url is None:
            url = URL(self._base + path)
            if len(self._urls) < 64:
                self._urls[path] = url
        try:
            if method == "POST" and body is not None and len(body) <= LARGE:
                response = await self._post(session, url, headers, body)
            else:
                data = None if body is None else io.BytesIO(body)
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
