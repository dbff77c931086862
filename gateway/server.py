"""The aiohttp server: sockets, limits, time-outs; adapts its requests to the pipeline's `Client` and `Inbound`.

aiohttp has no time limit for headers or bodies, and logs and echoes malformed input: that is added or replaced here.
The low-level server is used, and its writer directly: the pipeline knows the whole head before it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
from email.utils import formatdate
from http import HTTPStatus
from socket import AF_UNIX
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import hdrs, web
from aiohttp.client_exceptions import ClientConnectionError
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError
from aiohttp.web_protocol import RequestHandler
from multidict import istr

from gateway.client import ClientGone, DirectClient
from gateway.dialects import PLAIN_DIALECT
from gateway.errors import BadRequest, GatewayError, RequestTimeout, TooLarge, UnsupportedMedia
from gateway.exchange import Credentials, Exchange, RequestView, new_id
from gateway.listening import BACKLOG
from gateway.logs import looks_like_key
from gateway.pipeline import Run
from gateway.routes import Route
from gateway.watch import SHUTDOWN

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from multidict import CIMultiDict

    from gateway.exchange import Reply
    from gateway.finisher import Finisher
    from gateway.pipeline import Corrector
    from gateway.settings import ServerSettings
    from gateway.snapshot import Snapshot
    from gateway.tasks import Tasks

log = structlog.get_logger("gateway.server")

SERVER_NAME = "xenios"
_X_REQUEST_ID, _X_API_KEY, _API_KEY = istr("X-Request-Id"), istr("X-Api-Key"), istr("Api-Key")
_ONCE = (hdrs.AUTHORIZATION, _X_API_KEY, _API_KEY, hdrs.HOST)
LINGER_SECONDS = 3.0
PIECE = 256 * 1024
JOINED = 64 * 1024  # smaller bodies are cheaper copied behind their head than written beside it
PROGRESS = 64 * 1024  # bytes of a streamed body that must come within each `body_timeout`
_OURS = (hdrs.DATE, hdrs.SERVER)
_OURS_OF_WHOLE = (*_OURS, hdrs.CONTENT_LENGTH)
_ENCODINGS = frozenset({"gzip", "deflate", "identity"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def _bare(status: HTTPStatus, extra: str = "") -> bytes:
    """A reply to a connection on which no request could be read."""
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\nX-Request-Id: {new_id()}\r\n{extra}"
    return f"{head}Content-Length: 0\r\n\r\n".encode()


class _Sent:
    """What aiohttp's protocol wants back from a handler: the reply is out already, only keep-alive is left to say."""

    __slots__ = ("keep_alive",)

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None: ...

    async def write_eof(self) -> None: ...


class _Connection(RequestHandler):
    """One client connection, with a time limit for each request's head, and quiet about malformed input."""

    __slots__ = ("_head_timer", "_limits", "on_room", "peer")

    def __init__(
        self,
        manager: _Listener,
        *,
        loop: asyncio.AbstractEventLoop,
        limits: Callable[[], ServerSettings],
        **kwargs: Any,
    ) -> None:
        # those of aiohttp's own are for the connection's life, ours are asked for anew
        super().__init__(manager, loop=loop, keepalive_timeout=limits().keepalive_timeout, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self.peer: tuple[Any, ...] | str | None = None
        self.on_room: Callable[[], None] | None = None

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Only what is paused: aiohttp's own goes through parser and transport twice for each request's body."""
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_room is not None:
            self.on_room()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.peer = transport.get_extra_info("peername")
        manager = self._manager
        if manager is not None and len(manager.connections) > self._limits().max_connections:
            transport.write(_bare(HTTPStatus.SERVICE_UNAVAILABLE, "Retry-After: 1\r\n"))  # type: ignore[attr-defined]  # a stream transport
            self.force_close()
            return
        self._head_timer = self._loop.call_later(self._limits().header_timeout, self._head_late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages or self._current_request is not None or self._payload_parser is not None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None and self._waiter is not None:
            # a head has begun on an idle connection, and is not complete
            self._head_timer = self._loop.call_later(self._limits().header_timeout, self._head_late)

    def _head_late(self) -> None:
        self._head_timer = None
        if self.transport is not None and self._current_request is None and not self._messages:
            self.transport.write(_bare(HTTPStatus.REQUEST_TIMEOUT))
            self.force_close()

    def close(self) -> None:
        """No further request. An idle connection is closed now: aiohttp's own leaves it open until the process ends."""
        idle = self._waiter is not None
        super().close()
        if idle and self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """A request that is not HTTP. aiohttp's own page and log line hold the input, secrets included."""
        del message
        request_id = new_id()
        unknown_coding = isinstance(exc, ContentEncodingError)
        if unknown_coding:
            status = 415
        if status >= 500:
            log.error("request_crashed", exc_info=exc, request_id=request_id)
        else:
            error_type = type(exc).__name__
            log.warning(
                "bad_http_request", status=status, error=error_type, remote=request.remote, request_id=request_id
            )
        if request.writer.output_size > 0:
            raise ConnectionError
        if status >= 500:
            error = GatewayError()
        elif unknown_coding:
            error = UnsupportedMedia("Send the body as it is, or compressed with gzip.")
        else:
            error = BadRequest("The request is not valid HTTP.", status=status)
        response = web.Response(
            status=status,
            body=PLAIN_DIALECT.error_body(error, ""),
            content_type="application/json",
            headers={"Server": SERVER_NAME, "X-Request-Id": request_id},
        )
        response.force_close()
        return response

    def log_exception(self, *_: Any, **kw: Any) -> None:
        error = kw.get("exc_info")
        if isinstance(error, web.RequestPayloadError):
            return  # the client was told; aiohttp meets it again when it drains the body
        log.error("connection_failed", error=type(error).__name__ if error else None, exc_info=error or None)

    def log_debug(self, *args: Any, **kw: Any) -> None: ...


class _Listener(web.Server):
    def __init__(
        self, handler: Callable[[web.BaseRequest], Awaitable[Any]], limits: Callable[[], ServerSettings]
    ) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,
            access_log=None,
            lingering_time=LINGER_SECONDS,
            max_line_size=16 * 1024,
            max_field_size=32 * 1024,
        )
        self._limits = limits

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, limits=self._limits, **self._kwargs)


class _Inbound:
    """The request's body, not read yet."""

    __slots__ = ("_request", "_seconds", "content_type")

    def __init__(self, request: web.BaseRequest, seconds: float) -> None:
        self._request = request
        self._seconds = seconds
        self.content_type = request.headers.get(hdrs.CONTENT_TYPE, "")

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises TooLarge, RequestTimeout, BadRequest or ClientGone."""
        self._check(limit)
        content = self._request.content
        if content.is_eof() and content.exception() is None and hdrs.EXPECT not in self._request.headers:
            return _within(content.read_nowait(), limit)  # it came with its head
        with _body_errors():
            await self._continue()
            async with asyncio.timeout(self._seconds):
                return await self._read(limit)

    async def pieces(self, limit: int) -> AsyncIterator[bytes]:
        """The body as it comes, which may take as long as enough comes of it. Raises as `read`, also in the middle."""
        self._check(limit)
        content, loop = self._request.content, asyncio.get_running_loop()
        size, enough, left = 0, PROGRESS, self._seconds
        with _body_errors():
            await self._continue()
        while True:
            began = loop.time()
            with _body_errors():
                async with asyncio.timeout(left):
                    piece = await content.readany()
            if not piece:
                return
            size += len(piece)
            left -= loop.time() - began  # what the handler takes is not the client's time
            if size >= enough:
                enough, left = size + PROGRESS, self._seconds
            yield _within(piece, limit, size)

    def _check(self, limit: int) -> None:
        """What the head says of the body."""
        length = self._request.content_length
        if length is not None and length > limit:
            raise TooLarge(f"The body has {length} bytes; this gateway takes {limit}.")
        encoding = self._request.headers.get("Content-Encoding")
        if encoding is not None and encoding.strip().lower() not in _ENCODINGS:
            raise UnsupportedMedia(f"Send the body as it is, or compressed with gzip; not {encoding[:100]!r}.")

    async def _read(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while chunk := await self._request.content.readany():
            size += len(chunk)
            parts.append(_within(chunk, limit, size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _continue(self) -> None:
        """Clients with large bodies ask before they send (curl above 1 MiB)."""
        expect = self._request.headers.get(hdrs.EXPECT)
        if expect is None:
            return
        if expect.lower() != "100-continue":
            raise BadRequest("Expect: only 100-continue is known.", status=417)
        await self._request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._request.writer.output_size = 0  # aiohttp takes any output for a begun reply


@contextlib.contextmanager
def _body_errors() -> Iterator[None]:
    """Aiohttp's errors become ours."""
    try:
        yield
    except TimeoutError:
        raise RequestTimeout("The request's body did not arrive in time.") from None
    except ConnectionError:
        raise ClientGone from None
    except (HttpProcessingError, ValueError, web.RequestPayloadError) as error:
        raise BadRequest(f"The request's body can't be read: {type(error).__name__}.") from None


def _within(chunk: bytes, limit: int, size: int | None = None) -> bytes:
    if (len(chunk) if size is None else size) > limit:
        raise TooLarge(f"The body is larger than the {limit} bytes that this gateway takes.")
    return chunk


class _Client(DirectClient):
    """The pipeline's `Client` on the connection: each call is one write to its transport."""

    __slots__ = ("_chunked", "_connection", "_head", "_request", "keep_alive")

    def __init__(self, request: web.BaseRequest, connection: _Connection, *, closing: bool) -> None:
        self._request = request
        self._connection = connection
        self._chunked = False
        self._head = b""  # not sent yet
        self.keep_alive = request.keep_alive and not closing

    async def send(self, status: int, headers: CIMultiDict[str], body: bytes, progress: Callable[[], None]) -> None:
        head = self._made(status, headers, len(body))
        connection = self._connection
        if self._request.method == "HEAD":
            body = b""
        if len(body) <= JOINED:
            self._write(head + body)
        else:
            self._write(head)
            view = memoryview(body)
            for start in range(0, len(body), PIECE):
                if start:
                    progress()
                self._write(view[start : start + PIECE])
                if connection.writing_paused:
                    await self._room()
        if connection.writing_paused:
            await self._room()

    async def start(self, status: int, headers: CIMultiDict[str]) -> None:
        self.open(status, headers)
        self.put(b"")

    def open(self, status: int, headers: CIMultiDict[str]) -> None:
        if hdrs.CONTENT_LENGTH not in headers:
            headers[hdrs.CACHE_CONTROL] = "no-cache"
            headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
            if self._request.method == "HEAD":
                pass  # no body, so that nothing need tell its end
            elif self._request.version >= (1, 1):
                self._chunked = True
                headers[hdrs.TRANSFER_ENCODING] = "chunked"
            else:
                self.keep_alive = False  # HTTP/1.0: the end of the body is the end of the connection
        self._head = self._made(status, headers)

    def _made(self, status: int, headers: CIMultiDict[str], length: int | None = None) -> bytes:
        """The head, of headers that were found sound."""
        request = self._request
        if hdrs.CONNECTION in headers or not request.content.is_eof():
            # refused for its framing, or before its body came: what follows on this connection is no request
            self.keep_alive = False
        if not self.keep_alive:
            headers[hdrs.CONNECTION] = "close"
        elif request.version < (1, 1):
            headers[hdrs.CONNECTION] = "keep-alive"
        for name in _OURS if length is None else _OURS_OF_WHOLE:
            if name in headers:
                del headers[name]
        lines = [_status_line(request.version, status), _now()]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        lines.append("\r\n" if length is None else f"Content-Length: {length}\r\n\r\n")
        return "".join(lines).encode()

    def _write(self, data: bytes | memoryview) -> None:
        transport = self._connection.transport
        if transport is None or transport.is_closing():
            raise ClientGone
        self._request.writer.output_size = 1  # for aiohttp, and `handle_error`: the reply has begun
        transport.write(data)

    def put(self, data: bytes) -> bool:
        if self._chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data, self._head = self._head + data, b""
            self._request.writer.output_size = 1  # for aiohttp, and `handle_error`: the reply has begun
        connection = self._connection
        transport = connection.transport
        if transport is None or transport.is_closing():
            raise ClientGone
        if data:
            transport.write(data)
        return not connection.writing_paused

    def when_room(self, call: Callable[[], None] | None) -> None:
        self._connection.on_room = call

    async def write(self, data: bytes) -> None:
        if not self.put(data):
            await self._room()

    async def end(self) -> None:
        if self._chunked:
            self._chunked = False
            self.put(b"0\r\n\r\n")
        elif self._head:
            self.put(b"")
        if self._connection.writing_paused:
            await self._room()

    async def _room(self) -> None:
        try:
            await self._connection._drain_helper()  # noqa: SLF001 - aiohttp's own writer waits by it
        except (ConnectionError, ClientConnectionError) as error:
            raise ClientGone from error

    def abort(self) -> None:
        self.keep_alive = False
        if self._connection.transport is not None:
            self._connection.transport.abort()


@functools.lru_cache(maxsize=256)
def _status_line(version: tuple[int, int], status: int) -> str:
    return f"HTTP/{version[0]}.{version[1]} {status} {_PHRASES.get(status, 'Status')}\r\n"


_clock: list[Any] = [0, ""]


def _now() -> str:
    """The lines that every head has, made once a second."""
    second = int(time.time())
    if _clock[0] != second:
        _clock[0] = second
        _clock[1] = f"Date: {formatdate(second, usegmt=True)}\r\nServer: {SERVER_NAME}\r\n"
    return str(_clock[1])


class Server:
    """Listens, hands each request to the pipeline with the snapshot in force, and drains."""

    def __init__(
        self, current: Callable[[], Snapshot], tasks: Tasks, finisher: Finisher, correct: Corrector | None = None
    ) -> None:
        self._current = current
        self._tasks = tasks
        self._finisher = finisher
        self._correct = correct
        self._listener: _Listener | None = None
        self._sockets: list[asyncio.Server] = []
        self._runs: set[Run] = set()
        self._idle = asyncio.Event()
        self.draining = False

    @property
    def live(self) -> int:
        return len(self._runs)

    async def start(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None = None) -> None:
        """Accept connections from sockets that listen."""
        self._listener = _Listener(self._handle, lambda: self._current().settings.server)
        loop = asyncio.get_running_loop()
        seconds = self._current().settings.server.header_timeout if tls else None
        for sock in sockets:
            create = loop.create_unix_server if sock.family == AF_UNIX else loop.create_server
            listening = await create(self._listener, sock=sock, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=seconds)
            self._sockets.append(listening)

    async def drain(self, delay: float, timeout: float) -> int:  # noqa: ASYNC109 - a phase's length, not a limit on it
        """Not ready but accepting for `delay`, then closed; requests get `timeout` to end. Returns the number cut."""
        self.draining = True
        await asyncio.sleep(delay)
        for listening in self._sockets:
            listening.close()
        if self._listener is not None:
            self._listener.pre_shutdown()
        if self._runs:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout)
        cut = len(self._runs)
        for run in list(self._runs):
            run.watch.expire(SHUTDOWN)
        if self._listener is not None:
            await self._listener.shutdown(5.0)
        return cut

    async def _handle(self, request: web.BaseRequest) -> _Sent:
        snapshot = self._current()
        method, raw_path, fault = request.method, request.raw_path, None
        path = raw_path
        params: dict[str, str] = {}
        route = snapshot.routes.exact(method, raw_path) if _is_sound(request) else None
        if route is None:
            path = request.path
            route, params, fault = _route(snapshot, request)
        view = RequestView(
            method,
            path,
            request.headers,
            query_string=raw_path.partition("?")[2] if "?" in raw_path else "",
            remote=getattr(request.protocol, "peer", None),
            http_version=request.version,
        )
        view.path_params = params
        exchange = Exchange(new_id(), view, snapshot, route)
        asked_id = request.headers.get(_X_REQUEST_ID)
        if asked_id is not None and _REQUEST_ID.fullmatch(asked_id) and not looks_like_key(asked_id):
            exchange.request_id = asked_id
        if fault is None:
            exchange.credentials = _credentials(request)
        connection = request.protocol
        if not isinstance(connection, _Connection):  # pragma: no cover - the listener makes no others
            raise TypeError(type(connection).__name__)
        client = _Client(request, connection, closing=self.draining)
        run = Run(
            exchange,
            client,
            _Inbound(request, snapshot.settings.server.body_timeout),
            tasks=self._tasks,
            finisher=self._finisher,
            correct=self._correct,
        )
        snapshot.users.enter()
        self._runs.add(run)
        try:
            await run.run()
        finally:
            snapshot.users.leave()
            self._runs.discard(run)
            if not self._runs:
                self._idle.set()
        return _Sent(keep_alive=client.keep_alive)


def _route(snapshot: Snapshot, request: web.BaseRequest) -> tuple[Route, dict[str, str], GatewayError | None]:
    """The matched route; for a request that can't be served one that says why, through the pipeline all the same."""
    fault: GatewayError | None = None
    try:
        _check_head(request)
        route, params = snapshot.routes.match(request.method, request.path)
    except GatewayError as error:
        fault = error
    else:
        return route, params, None

    async def refuse(_: Exchange) -> Reply:
        raise fault

    path = "unmatched"
    return Route("ANY", path, path, PLAIN_DIALECT, refuse, access="public", body="none"), {}, fault


def _is_sound(request: web.BaseRequest) -> bool:
    """Nothing in the head that `_check_head` would refuse."""
    getall = request.headers.getall
    for name in _ONCE:
        if len(getall(name, ())) > 1:
            return False
    return hdrs.TRANSFER_ENCODING not in request.headers


def _check_head(request: web.BaseRequest) -> None:
    headers = request.headers
    for name in _ONCE:
        if len(headers.getall(name, ())) > 1:
            raise BadRequest(f"The header {name} stands twice.")
    coding = headers.get(hdrs.TRANSFER_ENCODING)
    if coding is not None and coding.lower() != "chunked":
        close = {"Connection": "close"}
        raise BadRequest("Transfer-Encoding: only chunked is known.", status=501, headers=close)


def _credentials(request: web.BaseRequest) -> Credentials:
    authorization = request.headers.get(hdrs.AUTHORIZATION, "")
    scheme, _, token = authorization.partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    api_key = (request.headers.get(_X_API_KEY) or request.headers.get(_API_KEY) or "").strip()
    return Credentials(bearer=_usable(bearer), api_key=_usable(api_key))


def _usable(token: str) -> str | None:
    """Bytes that are not ASCII can't be a key, and would break whoever encodes them."""
    return token if token and token.isascii() and len(token) <= 16 * 1024 else None
