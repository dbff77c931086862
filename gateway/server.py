"""The aiohttp server: sockets, limits, time-outs; adapts its requests to the pipeline's `Client` and `Inbound`.

aiohttp has no time limit for headers or bodies, and logs and echoes malformed input: that is added or replaced here.
Its protocol and parser are used, and nothing of what it makes of a request: the pipeline needs neither its request
nor its response, and knows the whole head before it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import re
import time
import weakref
from email.utils import formatdate
from http import HTTPStatus
from socket import AF_UNIX
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web
from aiohttp.client_exceptions import ClientConnectionError
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError
from aiohttp.web_protocol import RequestHandler
from multidict import istr

from gateway.client import ClientGone, DirectClient
from gateway.dialects import PLAIN_DIALECT
from gateway.errors import BadRequest, GatewayError, RequestTimeout, TooLarge, UnsupportedMedia
from gateway.exchange import Credentials, Exchange, RequestView, new_id
from gateway.listening import BACKLOG
from gateway.logs import get_logger, looks_like_key
from gateway.pipeline import Run
from gateway.routes import Route
from gateway.watch import SHUTDOWN

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from aiohttp.streams import StreamReader
    from multidict import CIMultiDict

    from gateway.exchange import Reply
    from gateway.finisher import Finisher
    from gateway.pipeline import Corrector
    from gateway.settings import ServerSettings
    from gateway.snapshot import Snapshot
    from gateway.tasks import Tasks

    Serve = Callable[["_Connection", RawRequestMessage, StreamReader], Coroutine[Any, Any, None]]

log = get_logger("gateway.server")

SERVER_NAME = "xenios"
_X_REQUEST_ID, _X_API_KEY, _API_KEY = istr("X-Request-Id"), istr("X-Api-Key"), istr("Api-Key")
_ONCE = (hdrs.AUTHORIZATION, _X_API_KEY, _API_KEY)
LINGER_SECONDS = 3.0
LAST_SECONDS = 1.0  # at the end: for a request that is on its way, and for what was written last
MOMENT = 0.1  # since its last reply, in which a client that was not told otherwise is about to ask again
TURN = 0.02
PIECE = 256 * 1024
JOINED = 64 * 1024  # smaller bodies are cheaper copied behind their head than written beside it
PROGRESS = 64 * 1024  # bytes of a streamed body that must come within each `body_timeout`
_OURS = (hdrs.DATE, hdrs.SERVER)
_OURS_OF_WHOLE = (*_OURS, hdrs.CONTENT_LENGTH)
_ENCODINGS = frozenset({"gzip", "deflate", "identity"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def _bare(status: int, extra: str = "", body: bytes = b"", request_id: str = "") -> bytes:
    """A reply to a connection on which no request could be read."""
    head = f"{_status_line((1, 1), status)}{_now()}Connection: close\r\nX-Request-Id: {request_id or new_id()}\r\n"
    return f"{head}{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Connection(RequestHandler):
    """One client connection: a task for each request, one after the other.

    It has a time limit for each request's head, and is quiet about malformed input.
    """

    __slots__ = (
        "__weakref__", "_head_timer", "full", "listener", "lost", "on_room", "peer", "serving",
    )  # fmt: skip

    def __init__(self, manager: _Listener, *, loop: asyncio.AbstractEventLoop, **kwargs: Any) -> None:
        # those of aiohttp's own are for the connection's life, ours are asked for anew
        super().__init__(manager, loop=loop, keepalive_timeout=manager.limits().keepalive_timeout, **kwargs)
        self.listener = manager
        self.serving = False
        self.lost = False  # closed, and all that was written has gone out
        self._head_timer: asyncio.TimerHandle | None = None
        self.peer: tuple[Any, ...] | str | None = None
        self.full = False  # `writing_paused`, which is a call
        self.on_room: Callable[[], None] | None = None

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Only what is paused: aiohttp's own goes through parser and transport twice for each request's body."""
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.full = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self.full = False
        if self.on_room is not None:
            self.on_room()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.listener.unmade.discard(self)
        if self.listener.over:  # its handshake took too long
            self.force_close()
            return
        self.peer = transport.get_extra_info("peername")
        if len(self.listener.connections) > self.listener.limits().max_connections:
            transport.write(_bare(503, "Retry-After: 1\r\n"))  # type: ignore[attr-defined]  # a stream transport
            self.force_close()
            return
        self._head_timer = self._loop.call_later(self.listener.limits().header_timeout, self._head_late)

    async def start(self) -> None:
        """Aiohttp's own waits here for the connection's requests; ours begin as they come."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # parses
        if self.serving:
            return
        if self._messages:
            self._next()
        elif data and self._head_timer is None and self.transport is not None:
            # a head has begun on an idle connection, and is not complete
            self._head_timer = self._loop.call_later(self.listener.limits().header_timeout, self._head_late)

    def _next(self) -> None:
        """Begin with the next request."""
        self.serving = True
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        message, payload = self._messages.popleft()
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        if isinstance(message, RawRequestMessage):
            serve = self.listener.serve(self, message, payload)
            self._task_handler = self._loop.create_task(serve, context=self.listener.context.copy())
        else:
            self.refuse(message.status, message.exc)

    def served(self, *, keep_alive: bool) -> None:
        """A request has been answered, and no byte of it is left."""
        if not keep_alive or self.listener.over or self._force_close:
            self.serving = False
            self.close()
            return
        if self._upgraded and not self._messages:
            self._go_on_in_http()
        if self._messages:
            self._next()
            return
        self.serving = False
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._wait_for_more()

    def _wait_for_more(self) -> None:
        self._keepalive_handle = self._loop.call_at(
            self._next_keepalive_close_time, self._process_keepalive, context=self.listener.context
        )

    def _go_on_in_http(self) -> None:
        """An upgrade was offered, and declined: what has come behind that request was not parsed yet."""
        tail, self._message_tail = self._message_tail, b""
        self._upgraded = False
        if self._parser is not None:
            self._parser.set_upgraded(False)
        super().data_received(tail)
        if self._buffer_paused:
            self._resume_reading_if_drained()

    def _process_keepalive(self) -> None:
        self._keepalive_handle = None
        if self._loop.time() < self._next_keepalive_close_time:
            self._wait_for_more()
        elif not self.serving:
            self.force_close()

    def _head_late(self) -> None:
        self._head_timer = None
        if self.transport is not None and not self.serving:
            self.transport.write(_bare(408))
            self.force_close()

    @property
    def awaited(self) -> bool:
        """A request may be on its way: the connection is new, a head has begun, or its client was just answered."""
        if self.serving or self._close or self.transport is None:
            return False
        idle_since = self._next_keepalive_close_time - self._keepalive_timeout
        return self._head_timer is not None or self._loop.time() < idle_since + MOMENT

    def close(self) -> None:
        """Of a connection that is not served: at once. Aiohttp's own leaves it open until the process ends."""
        super().close()
        if self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = True
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().connection_lost(exc)

    def refuse(self, status: int, error: BaseException, *, begun: bool = False) -> None:
        """The end of a request that is not HTTP, or that we failed at; `begun`: its reply.

        aiohttp's own page and log line hold the input, secrets included.
        """
        request_id = new_id()
        told: GatewayError = GatewayError()
        if isinstance(error, ContentEncodingError):
            told = UnsupportedMedia("Send the body as it is, or compressed with gzip.")
        elif status < 500:
            told = BadRequest("The request is not valid HTTP.", status=status)
        if self.transport is not None and not begun:
            body = PLAIN_DIALECT.error_body(told, "")
            self.transport.write(_bare(told.status_code, "Content-Type: application/json\r\n", body, request_id))
        if told.status_code >= 500:
            log.error("request_crashed", exc_info=error, request_id=request_id)
        else:
            log.warning(
                "bad_http_request",
                status=told.status_code,
                error=type(error).__name__,
                remote=self.peer[0] if isinstance(self.peer, tuple) else self.peer,
                request_id=request_id,
            )
        self.served(keep_alive=False)


class _Listener(web.Server):
    def __init__(self, serve: Serve, limits: Callable[[], ServerSettings], *, tls: bool) -> None:
        super().__init__(
            serve,  # type: ignore[arg-type]  # by `_Connection` alone
            handler_cancellation=True,
            access_log=None,
            max_line_size=16 * 1024,
            max_field_size=32 * 1024,
        )
        self.serve = serve
        self.limits = limits
        self._tls = tls
        self.unmade: weakref.WeakSet[_Connection] = weakref.WeakSet()  # accepted; with TLS, shaking hands
        self.draining = False  # each reply says that it is its connection's last
        self.over = False  # nobody is heard any more
        self.context = contextvars.copy_context()  # what one request's task leaves in its own is not the next one's

    def __call__(self) -> RequestHandler:
        connection = _Connection(self, loop=self._loop, **self._kwargs)
        self.unmade.add(connection)
        return connection

    def close_idle(self) -> list[_Connection]:
        """Those that are left and may still ask."""
        awaited = []
        for connection, _ in self._open():
            if connection.awaited:
                awaited.append(connection)
            elif not connection.serving:
                connection.close()
        return awaited

    async def end(self, until: float) -> None:
        """Close all, and wait for what was written to them to go out, to the loop's time `until` or a second at least.

        Up to 64 KiB of a reply lie here while its reader is slow, and would end with the process. TLS does not tell of
        them: there it is a second at most.
        """
        connections = self._open()
        await self.shutdown(5.0)
        second = self._loop.time() + LAST_SECONDS
        until = second if self._tls else max(until, second)
        while self._loop.time() < until and any(  # noqa: ASYNC110 - nobody is told of it
            not connection.lost and (self._tls or transport.get_write_buffer_size())
            for connection, transport in connections
        ):
            await asyncio.sleep(TURN)

    def _open(self) -> list[tuple[_Connection, asyncio.Transport]]:
        return [(c, transport) for c, transport in self._connections.items() if isinstance(c, _Connection)]


class _Asker(DirectClient):
    """One request's two ends on its connection: the pipeline's `Inbound`, and its `Client`, each call of which is one
    write to the transport.
    """

    __slots__ = (
        "_chunked", "_connection", "_head", "_message", "_payload", "_seconds", "begun", "content_type", "keep_alive",
    )  # fmt: skip

    def __init__(
        self, connection: _Connection, message: RawRequestMessage, payload: StreamReader, seconds: float
    ) -> None:
        """`seconds`: for the body."""
        self._connection = connection
        self._message = message
        self._payload = payload
        self._seconds = seconds
        self._chunked = False
        self._head = b""  # not sent yet
        self.begun = False  # the reply
        self.keep_alive = not message.should_close
        self.content_type = message.headers.get(hdrs.CONTENT_TYPE, "")

    # --- what it says --------------------------------------------------------------------------------------------

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises TooLarge, RequestTimeout, BadRequest or ClientGone."""
        headers, payload = self._message.headers, self._payload
        if payload.is_eof() and hdrs.EXPECT not in headers and hdrs.CONTENT_ENCODING not in headers:
            return _within(payload.read_nowait(), limit)  # it came with its head
        self._check(limit)
        with _body_errors():
            self._continue()
            async with asyncio.timeout(self._seconds):
                return await self._read(limit)

    async def pieces(self, limit: int) -> AsyncIterator[bytes]:
        """The body as it comes, which may take as long as enough comes of it. Raises as `read`, also in the middle."""
        self._check(limit)
        payload, loop = self._payload, asyncio.get_running_loop()
        size, enough, left = 0, PROGRESS, self._seconds
        with _body_errors():
            self._continue()
        while True:
            began = loop.time()
            with _body_errors():
                async with asyncio.timeout(left):
                    piece = await payload.readany()
            if not piece:
                return
            size += len(piece)
            left -= loop.time() - began  # what the handler takes is not the client's time
            if size >= enough:
                enough, left = size + PROGRESS, self._seconds
            yield _within(piece, limit, size)

    def _check(self, limit: int) -> None:
        """What the head says of the body."""
        headers = self._message.headers
        length = headers.get(hdrs.CONTENT_LENGTH)
        if length is not None and int(length) > limit:
            raise TooLarge(f"The body has {length} bytes; this gateway takes {limit}.")
        encoding = headers.get(hdrs.CONTENT_ENCODING)
        if encoding is not None and encoding.strip().lower() not in _ENCODINGS:
            raise UnsupportedMedia(f"Send the body as it is, or compressed with gzip; not {encoding[:100]!r}.")

    async def _read(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while chunk := await self._payload.readany():
            size += len(chunk)
            parts.append(_within(chunk, limit, size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _continue(self) -> None:
        """Clients with large bodies ask before they send (curl above 1 MiB)."""
        expect = self._message.headers.get(hdrs.EXPECT)
        if expect is None:
            return
        if expect.lower() != "100-continue":
            raise BadRequest("Expect: only 100-continue is known.", status=417)
        transport = self._connection.transport
        if transport is None:
            raise ClientGone
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def end_of_body(self) -> None:
        """What of the body nobody read is thrown away, for some seconds: a client that still sends would not get to
        read its reply if the connection was closed.
        """
        payload = self._payload
        with contextlib.suppress(TimeoutError, web.RequestPayloadError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not payload.is_eof() and self._connection.transport is not None:
                    await payload.readany()

    # --- what it is told -----------------------------------------------------------------------------------------

    async def send(self, status: int, headers: CIMultiDict[str], body: bytes, progress: Callable[[], None]) -> None:
        head = self._made(status, headers, len(body))
        connection = self._connection
        if self._message.method == "HEAD":
            body = b""
        if len(body) <= JOINED:
            self._write(head + body)
        else:
            self._write(head)
            view = memoryview(body)
            for start in range(0, len(body), PIECE):
                self._write(view[start : start + PIECE])
                if connection.writing_paused:
                    progress()
                    await self._room()
        if connection.writing_paused:
            progress()
            await self._room()

    async def start(self, status: int, headers: CIMultiDict[str]) -> None:
        self.open(status, headers)
        self.put(b"")

    def open(self, status: int, headers: CIMultiDict[str]) -> None:
        if hdrs.CONTENT_LENGTH not in headers:
            headers[hdrs.CACHE_CONTROL] = "no-cache"
            headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
            if self._message.method == "HEAD":
                pass  # no body, so that nothing need tell its end
            elif self._message.version >= (1, 1):
                self._chunked = True
                headers[hdrs.TRANSFER_ENCODING] = "chunked"
            else:
                self.keep_alive = False  # HTTP/1.0: the end of the body is the end of the connection
        self._head = self._made(status, headers)

    def _made(self, status: int, headers: CIMultiDict[str], length: int | None = None) -> bytes:
        """The head, of headers that were found sound."""
        version = self._message.version
        if hdrs.CONNECTION in headers or not self._payload.is_eof() or self._connection.listener.draining:
            # the end; or refused for its framing, or before its body came: what follows here is no request
            self.keep_alive = False
        if not self.keep_alive:
            headers[hdrs.CONNECTION] = "close"
        elif version < (1, 1):
            headers[hdrs.CONNECTION] = "keep-alive"
        for name in _OURS if length is None else _OURS_OF_WHOLE:
            if name in headers:
                del headers[name]
        lines = [_status_line(version, status), _now()]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        lines.append("\r\n" if length is None else f"Content-Length: {length}\r\n\r\n")
        return "".join(lines).encode()

    def _write(self, data: bytes | memoryview) -> None:
        transport = self._connection.transport
        if transport is None or transport.is_closing():
            raise ClientGone
        self.begun = True
        transport.write(data)

    def put(self, data: bytes) -> bool:
        if self._chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data, self._head = self._head + data, b""
            self.begun = True
        connection = self._connection
        transport = connection.transport
        if transport is None or transport.is_closing():
            raise ClientGone
        if data:
            transport.write(data)
        return not connection.full

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

    @property
    def draining(self) -> bool:
        return self._listener is not None and self._listener.draining

    @property
    def live(self) -> int:
        return len(self._runs)

    async def start(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None = None) -> None:
        """Accept connections from sockets that listen."""
        self._listener = _Listener(self._serve, lambda: self._current().settings.server, tls=tls is not None)
        loop = asyncio.get_running_loop()
        seconds = self._current().settings.server.header_timeout if tls else None
        for sock in sockets:
            create = loop.create_unix_server if sock.family == AF_UNIX else loop.create_server
            listening = await create(self._listener, sock=sock, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=seconds)
            self._sockets.append(listening)

    async def drain(self, delay: float, timeout: float) -> int:  # noqa: ASYNC109 - a phase's length, not a limit on it
        """Not ready but accepting for `delay`, then closed; requests get `timeout` to end. Returns the number cut."""
        listener = self._listener
        if listener is None:
            return 0
        listener.draining = True
        await asyncio.sleep(delay)
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        await self._accept_no_more()
        await _hear_the_last(listener, min(timeout, LAST_SECONDS))
        if self._runs:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), end - loop.time())
        cut = len(self._runs)
        for run in list(self._runs):
            run.watch.expire(SHUTDOWN)
        await listener.end(end)
        return cut

    async def _accept_no_more(self) -> None:
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            for sock in listening.sockets:
                loop.remove_reader(sock.fileno())
        await asyncio.sleep(0)  # asyncio's loop forgets whom it has accepted in the turn in which it closes
        for listening in self._sockets:
            listening.close()

    async def _serve(self, connection: _Connection, message: RawRequestMessage, payload: StreamReader) -> None:
        """One request, from its head to the end of its reply."""
        snapshot = self._current()
        asker = _Asker(connection, message, payload, snapshot.settings.server.body_timeout)
        snapshot.users.enter()
        try:
            run = Run(
                _exchange(snapshot, connection, message),
                asker,
                asker,
                tasks=self._tasks,
                finisher=self._finisher,
                correct=self._correct,
            )
            self._runs.add(run)
            try:
                await run.run()
            finally:
                self._runs.discard(run)
                if self.draining and not self._runs:
                    self._idle.set()
            if not payload.is_eof():
                await asker.end_of_body()
        except asyncio.CancelledError:
            connection.force_close()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told, and it is logged
            connection.refuse(500, error, begun=asker.begun)
        else:
            connection.served(keep_alive=asker.keep_alive)
        finally:
            snapshot.users.leave()


async def _hear_the_last(listener: _Listener, seconds: float) -> None:
    """Who was let in and is about to ask may do so: another instance on the same socket doesn't know of them."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    collected = False
    while True:
        await asyncio.sleep(TURN)  # the loop may have accepted some that it has not told us of
        if listener.unmade and not collected:
            gc.collect()  # nobody is told of handshakes that broke
            collected = True
        awaited = listener.close_idle()
        if loop.time() >= end or not (awaited or listener.unmade):
            break
    listener.over = True
    for connection in awaited:
        connection.force_close()


def _exchange(snapshot: Snapshot, connection: _Connection, message: RawRequestMessage) -> Exchange:
    """Of a request's head. One that can't be served gets a route that says why, through the pipeline all the same."""
    method, path = message.method, message.path
    params: dict[str, str] = {}
    credentials: Credentials | None = None
    try:
        credentials = _credentials(message)
        route = snapshot.routes.exact(method, path)
        if route is None:
            path = message.url.path
            route, params = snapshot.routes.match(method, path)
    except GatewayError as error:
        path, route, credentials = message.url.path, _refusing(error), None
    view = RequestView(
        method,
        path,
        message.headers,
        query_string=message.path.partition("?")[2],
        remote=connection.peer,
        http_version=message.version,
        proxies=snapshot.derived.proxies,
    )
    view.path_params = params
    exchange = Exchange(new_id(), view, snapshot, route)
    exchange.credentials = credentials
    asked_id = message.headers.get(_X_REQUEST_ID)
    if asked_id is not None and _REQUEST_ID.fullmatch(asked_id) and not looks_like_key(asked_id):
        exchange.request_id = asked_id
    return exchange


def _refusing(error: GatewayError) -> Route:
    async def refuse(_: Exchange) -> Reply:
        raise error

    path = "unmatched"
    return Route("ANY", path, path, PLAIN_DIALECT, refuse, access="public", body="none")


def _credentials(message: RawRequestMessage) -> Credentials:
    """What the client shows. Raises BadRequest for a head that two servers could read in two ways."""
    headers = message.headers
    for name in _ONCE:
        if name in headers and len(headers.getall(name)) > 1:
            raise BadRequest(f"The header {name} stands twice.")
    if hdrs.TRANSFER_ENCODING in headers:
        close = {"Connection": "close"}
        if headers[hdrs.TRANSFER_ENCODING].lower() != "chunked":
            raise BadRequest("Transfer-Encoding: only chunked is known.", status=501, headers=close)
        if message.version < (1, 1):  # proxies of that time know no chunks (RFC 9112, 6.1)
            raise BadRequest("Transfer-Encoding: HTTP/1.0 has none.", headers=close)
    scheme, _, token = headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    api_key = (headers.get(_X_API_KEY) or headers.get(_API_KEY) or "").strip()
    return Credentials(_usable(bearer), _usable(api_key))


def _usable(token: str) -> str | None:
    """Bytes that are not ASCII can't be a key, and would break whoever encodes them."""
    return token if token and token.isascii() and len(token) <= 16 * 1024 else None
