"""A scripted upstream: a real server on loopback that answers as a test wants, broken answers included.

    async with ScriptedUpstream(Error(503), Stream(*chat_events("Hi"))) as upstream:
        ...                                   # point a gateway, or any client, at upstream.url
        seen = await upstream.wait_seen(2)    # what the second request looked like on the wire

It speaks HTTP/1.1 by hand, since no HTTP library will cut a chunk in half, reset a connection or leave out
the end of a body. From top to bottom: what was seen, the steps of a stream, the answers, the server, and
builders of success bodies in the shapes of OpenRouter, OpenAI and Anthropic.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import gzip
import itertools
import re
import socket
import struct
import time
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import parse_qs

import msgspec

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

JsonObject: TypeAlias = dict[str, Any]
HeadersLike: TypeAlias = Mapping[str, str] | Sequence[tuple[str, str]]
Head: TypeAlias = tuple[int, list[tuple[str, str]]]
End: TypeAlias = Literal["clean", "cut", "reset", "hang", "eof"]

MODEL = "anthropic/claude-sonnet-4.6"
COST = 0.000105  # USD: 10 tokens in and 5 out at 3 and 15 dollars a million
COMMENT = b": OPENROUTER PROCESSING\n\n"
_MAX_HEAD = 256 * 1024


# What was seen --------------------------------------------------------------------------------------------


class Headers(Mapping[str, str]):
    """Request headers: names in any case, the first value of a repeated name; `raw` is as they were sent."""

    def __init__(self, raw: Sequence[tuple[str, str]]) -> None:
        self.raw = tuple(raw)

    def getall(self, name: str) -> list[str]:
        return [value for key, value in self.raw if key.lower() == name.lower()]

    def __getitem__(self, name: str) -> str:
        if not (values := self.getall(name)):
            raise KeyError(name)
        return values[0]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.getall(name))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key.lower() for key, _ in self.raw))

    def __len__(self) -> int:
        return len({key.lower() for key, _ in self.raw})

    def __repr__(self) -> str:
        return f"Headers({list(self.raw)})"


@dataclass(eq=False)
class Seen:
    """One request that reached the upstream, and what became of its answer.

    `finished` is set once the script of the answer was played to its end, a scripted cut or reset included;
    `closed` (with `closed_at`) once the client left before that: it closed, reset or half-closed its
    connection. At most one of them is ever set; an answer that hangs can only be `closed`. Times are
    `time.monotonic()` seconds.
    """

    method: str
    path: str
    query: str
    version: str
    headers: Headers
    body: bytes
    connection: int
    """Number of the connection it came on, from 1: equal numbers mean that a connection was reused."""
    started: float = field(default_factory=time.monotonic)
    closed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    finished: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    closed_at: float | None = None

    @property
    def endpoint(self) -> str:
        """The path behind `/v1/` or `/api/v1/`: `chat/completions`."""
        return (self.path.partition("/v1/")[2] or self.path).strip("/")

    @cached_property
    def json(self) -> Any:
        """The decoded body; None if it isn't JSON."""
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError:
            return None

    @property
    def model(self) -> str | None:
        """`model` of a JSON body or a multipart form."""
        if isinstance(self.json, dict):
            name = self.json.get("model")
            return name if isinstance(name, str) else None
        found = re.search(rb'name="?model"?[^\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]+)', self.body)
        return found[1].decode(errors="replace") if found else None

    @property
    def stream(self) -> bool:
        return isinstance(self.json, dict) and self.json.get("stream") is True


# The steps of a stream ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pause:
    """Waits so many seconds before the next step."""

    seconds: float


@dataclass(frozen=True)
class Until:
    """Waits until the test sets the event: lets a test walk through a stream step by step."""

    event: asyncio.Event


@dataclass(frozen=True)
class Split:
    """One step sent in several writes, cut at the byte offsets `at` and, if given, after each `every` bytes.

    `gap` seconds lie between the writes, so that a reader on loopback really gets them one by one.
    """

    data: bytes | str | JsonObject
    at: Sequence[int] = ()
    every: int | None = None
    gap: float = 0.001

    def pieces(self) -> list[bytes]:
        data = encode_step(self.data)
        cuts = {at if at >= 0 else len(data) + at for at in self.at}
        cuts |= set(range(0, len(data), self.every)) if self.every else set()
        edges = [0, *sorted(cut for cut in cuts if 0 < cut < len(data)), len(data)]
        return [data[start:end] for start, end in itertools.pairwise(edges)]


Step: TypeAlias = bytes | str | JsonObject | Pause | Until | Split


def event(name: str, data: JsonObject) -> bytes:
    """One SSE event with an `event:` line."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))


def encode_step(step: bytes | str | JsonObject) -> bytes:
    """The bytes of a step: bytes as they are, text and JSON as an SSE event without a name."""
    if isinstance(step, bytes):
        return step
    if isinstance(step, dict):
        return b"data: %b\n\n" % msgspec.json.encode(step)
    return b"data: %b\n\n" % step.replace("\n", "\ndata: ").encode()


# The answers ----------------------------------------------------------------------------------------------


class Wire:
    """The connection that an answer is written to."""

    def __init__(self, writer: asyncio.StreamWriter, *, keep_alive: bool) -> None:
        self._writer = writer
        self.keep_alive = keep_alive

    async def write(self, data: bytes) -> None:
        """One write; returns when the kernel has taken all of it."""
        self._writer.write(data)
        await self._writer.drain()

    async def head(self, head: Head, body: bytes = b"") -> None:
        status, headers = head
        if not self.keep_alive and not any(name.lower() == "connection" for name, _ in headers):
            headers = [*headers, ("Connection", "close")]
        reason = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unknown"
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
        await self.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    async def end(self, end: End) -> bool:
        """Ends an answer; returns whether the connection can carry another."""
        match end:
            case "clean":
                return self.keep_alive
            case "reset":
                self.reset()
            case "hang":
                await self.hang()
            case "cut" | "eof":
                self.close()
        return False

    async def hang(self) -> None:
        """Silence until the client leaves, which cancels the answer, or the upstream is closed."""
        await asyncio.Event().wait()

    def close(self) -> None:
        """Sends FIN after what was written."""
        self._writer.close()

    def reset(self) -> None:
        """Sends RST. What the client's kernel already holds stays readable."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class Answer(ABC):
    """What the upstream does with one request. A subclass may write whatever it likes."""

    @abstractmethod
    async def send(self, wire: Wire, seen: Seen) -> bool:
        """Plays the answer. True: it is complete and the connection may carry the next request.

        It is cancelled when the client leaves.
        """


Script: TypeAlias = Answer | Callable[[Seen], Answer]


def _headers(defaults: Mapping[str, str], given: HeadersLike) -> list[tuple[str, str]]:
    own = list(given.items()) if isinstance(given, Mapping) else list(given)
    named = {name.lower() for name, _ in own}
    return [*((name, value) for name, value in defaults.items() if name.lower() not in named), *own]


class Whole(Answer):
    """An answer that isn't streamed: head and body in one write."""

    @abstractmethod
    def render(self, seen: Seen) -> tuple[Head, bytes]:
        """Status and headers, `Content-Length` left out unless it shall lie; and the body."""

    def wait(self) -> float:
        """Seconds before the head is sent."""
        return 0.0

    async def send(self, wire: Wire, seen: Seen) -> bool:
        if self.wait():
            await asyncio.sleep(self.wait())
        head, body = self.render(seen)
        await wire.head(_with_length(head, len(body)), body)
        return await wire.end("clean")


def _with_length(head: Head, length: int) -> Head:
    status, headers = head
    return status, _headers({"Content-Length": str(length)}, headers)


@dataclass(frozen=True)
class Body(Whole):
    """A body of any type: HTML with status 200, half a JSON document, sound."""

    data: bytes
    content_type: str = "application/octet-stream"
    status: int = 200
    headers: HeadersLike = ()
    delay: float = 0.0

    def render(self, seen: Seen) -> tuple[Head, bytes]:  # noqa: ARG002 - the interface
        return (self.status, _headers({"Content-Type": self.content_type}, self.headers)), self.data

    def wait(self) -> float:
        return self.delay


@dataclass(frozen=True)
class Json(Whole):
    """`data` as a JSON body, `delay` seconds after the request."""

    data: Any
    status: int = 200
    headers: HeadersLike = ()
    delay: float = 0.0

    def render(self, seen: Seen) -> tuple[Head, bytes]:  # noqa: ARG002 - the interface
        headers = _headers({"Content-Type": "application/json"}, self.headers)
        return (self.status, headers), msgspec.json.encode(self.data)

    def wait(self) -> float:
        return self.delay


_ERROR_TYPES = {
    400: "invalid_request",
    401: "authentication",
    402: "payment_required",
    403: "permission_denied",
    404: "not_found",
    408: "timeout",
    412: "precondition_failed",
    413: "payload_too_large",
    422: "unprocessable",
    429: "rate_limit_exceeded",
    500: "server",
    502: "provider_unavailable",
    503: "provider_overloaded",
    504: "timeout",
    529: "provider_overloaded",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


@dataclass(frozen=True)
class Error(Whole):
    """An HTTP error: `body` (text and bytes go out as HTML), else OpenRouter's shape for the endpoint.

    `metadata` goes into that shape: `{"error_type": "context_length_exceeded"}`, a moderation's `reasons`.
    """

    status: int
    body: Any = None
    headers: HeadersLike = ()
    message: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    delay: float = 0.0

    def render(self, seen: Seen) -> tuple[Head, bytes]:
        if isinstance(self.body, str | bytes):
            body = self.body.encode() if isinstance(self.body, str) else self.body
            return (self.status, _headers({"Content-Type": "text/html"}, self.headers)), body
        data = self._shape(seen) if self.body is None else self.body
        return Json(data, self.status, self.headers).render(seen)

    def wait(self) -> float:
        return self.delay

    def _shape(self, seen: Seen) -> JsonObject:
        message = self.message or f"Scripted error {self.status}"
        kind = self.metadata.get("error_type", _ERROR_TYPES.get(self.status, "unmapped"))
        if seen.endpoint == "messages":
            return anthropic_error(self.status, message, error_type=kind)
        return {"error": openrouter_error(self.status, message, **{**self.metadata, "error_type": kind})}


@dataclass(frozen=True)
class Redirect(Whole):
    url: str
    status: int = 307

    def render(self, seen: Seen) -> tuple[Head, bytes]:  # noqa: ARG002 - the interface
        return (self.status, [("Location", self.url)]), b""


@dataclass(frozen=True)
class BadGzip(Whole):
    """Says `Content-Encoding: gzip`, begins as gzip, and is rubbish behind that."""

    def render(self, seen: Seen) -> tuple[Head, bytes]:  # noqa: ARG002 - the interface
        headers = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]
        return (200, headers), gzip.compress(b"", mtime=0)[:10] + b"\xff" * 64


@dataclass(frozen=True)
class Cut(Answer):
    """A whole answer that announces all of its body and sends the first `at` bytes of it."""

    answer: Whole
    at: int
    end: Literal["cut", "reset", "hang"] = "cut"

    async def send(self, wire: Wire, seen: Seen) -> bool:
        await asyncio.sleep(self.answer.wait())
        head, body = self.answer.render(seen)
        await wire.head(_with_length(head, len(body)), body[: self.at])
        return await wire.end(self.end)


async def _play(steps: Sequence[Step], write: Callable[[bytes], Any]) -> None:
    for step in steps:
        match step:
            case Pause():
                await asyncio.sleep(step.seconds)
            case Until():
                await step.event.wait()
            case Split():
                for piece in step.pieces():
                    await write(piece)
                    await asyncio.sleep(step.gap)
            case _:
                await write(encode_step(step))


class Stream(Answer):
    """A streamed answer: each step is one write, and with `chunked` one chunk.

    `end`: `clean` sends what ends the body by its framing and keeps the connection; `cut` closes it (FIN)
    without that; `reset` sends RST; `hang` leaves it open and silent until the client goes. Without
    `chunked` a body is delimited by the close of the connection (`clean` and `eof` are the same then),
    unless `headers` carries a `Content-Length`.
    """

    def __init__(
        self,
        *steps: Step,
        status: int = 200,
        headers: HeadersLike = (),
        end: End = "clean",
        content_type: str = "text/event-stream",
        chunked: bool = True,
    ) -> None:
        self.steps = steps
        self.status = status
        self.headers = headers
        self.end = end
        self.content_type = content_type
        self.chunked = chunked
        self.compressed = False

    async def send(self, wire: Wire, seen: Seen) -> bool:
        chunked = self.chunked and seen.version == "HTTP/1.1"
        packer = zlib.compressobj(wbits=31) if self.compressed else None

        async def write(data: bytes) -> None:
            if packer:
                data = packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)
            if data:
                await wire.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)

        head = self._head(chunked=chunked)
        wire.keep_alive = wire.keep_alive and (chunked or _has(head[1], "content-length"))
        await wire.head(head)
        await _play(self.steps, write)
        if self.end == "clean":
            tail = packer.flush() if packer else b""
            if chunked:
                tail = (b"%x\r\n%b\r\n" % (len(tail), tail) if tail else b"") + b"0\r\n\r\n"
            await wire.write(tail)
        return await wire.end(self.end)

    def _head(self, *, chunked: bool) -> Head:
        defaults = {"Content-Type": self.content_type, "Cache-Control": "no-cache"}
        if self.compressed:
            defaults["Content-Encoding"] = "gzip"
        if chunked:
            defaults["Transfer-Encoding"] = "chunked"
        return self.status, _headers(defaults, self.headers)


def _has(headers: Sequence[tuple[str, str]], name: str) -> bool:
    return any(key.lower() == name for key, _ in headers)


class Raw(Answer):
    """Bytes as they are, head included; pauses and splits may lie between them.

    `clean` keeps the connection for a next request. The default closes it, since only the writer of these
    bytes knows whether a client can tell where they end.
    """

    def __init__(self, *steps: bytes | Pause | Until | Split, end: End = "cut") -> None:
        self.steps = steps
        self.end = end

    async def send(self, wire: Wire, seen: Seen) -> bool:  # noqa: ARG002 - the interface
        await _play(self.steps, wire.write)
        return await wire.end(self.end)


class Hang(Raw):
    """Takes the request and never answers."""

    def __init__(self) -> None:
        super().__init__(end="hang")


class Reset(Raw):
    """RST before the head."""

    def __init__(self) -> None:
        super().__init__(end="reset")


class Close(Raw):
    """FIN before the head."""

    def __init__(self) -> None:
        super().__init__(end="cut")


@dataclass(frozen=True)
class Slow(Answer):
    """Any answer, so many seconds later."""

    answer: Answer
    seconds: float

    async def send(self, wire: Wire, seen: Seen) -> bool:
        await asyncio.sleep(self.seconds)
        return await self.answer.send(wire, seen)


class Gzip(Answer):
    """The answer with its body compressed; a stream is flushed after each step."""

    def __init__(self, answer: Whole | Stream) -> None:
        self.answer = answer

    async def send(self, wire: Wire, seen: Seen) -> bool:
        inner = self.answer
        if isinstance(inner, Stream):
            stream = copy.copy(inner)
            stream.compressed = True
            return await stream.send(wire, seen)
        await asyncio.sleep(inner.wait())
        (status, headers), body = inner.render(seen)
        packed = gzip.compress(body, mtime=0)
        await wire.head(_with_length((status, [*headers, ("Content-Encoding", "gzip")]), len(packed)), packed)
        return await wire.end("clean")


# The server -----------------------------------------------------------------------------------------------


class MalformedRequestError(Exception):
    """The client's bytes are no HTTP request, or one whose length is in doubt."""


class ScriptedUpstream:
    """A server that answers each request with the next scripted answer, or by a function of the request.

    Answers are used in order, one a request; those of `on(model, …)` come first. When they are spent,
    `default` answers, which is a success for any endpoint (`answer_by_path`).

    A script that raises is answered with 500 and kept in `errors`; leaving `async with` then raises them.
    A request that isn't HTTP is answered with 400 and kept in `malformed`. After `close()` the port refuses
    connections; `start()` opens the same port again.
    """

    def __init__(self, *answers: Script, default: Script | None = None) -> None:
        self._answers: deque[Script] = deque()
        self._by_model: dict[str, deque[Script]] = {}
        self._default: Script = answer_by_path if default is None else _checked(default)
        self._server: asyncio.Server | None = None
        self._open: set[_Connection] = set()
        self._changed = asyncio.Event()
        self.port = 0
        self.seen: list[Seen] = []
        self.errors: list[Exception] = []
        self.malformed: list[str] = []
        self.total_connections = 0
        self.script(*answers)

    def script(self, *answers: Script) -> None:
        """Appends answers."""
        self._answers.extend(map(_checked, answers))

    def on(self, model: str, *answers: Script) -> None:
        """Answers for requests that name this model, instead of those set before; the last one repeats."""
        if not answers:
            raise ValueError(f"no answers for model {model!r}")
        self._by_model[model] = deque(map(_checked, answers))

    @property
    def url(self) -> str:
        """The base URL: `http://127.0.0.1:PORT/v1`."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._open)

    @property
    def running(self) -> bool:
        return self._server is not None

    async def start(self) -> None:
        if self._server is not None:
            raise RuntimeError("the upstream is already started")
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stops listening and drops every connection, answers in progress included."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        tasks = [task for connection in self._open if (task := connection.drop())]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.wait_connections(0)
        await server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
        if self.errors and error is None:
            raise ExceptionGroup("the upstream's script failed", self.errors)

    async def wait_seen(self, n: int, timeout: float = 5.0) -> Seen:  # noqa: ASYNC109 - asyncio.timeout inside
        """The n-th request (from 1), as soon as it was read. Raises TimeoutError after `timeout` seconds."""
        await self._wait(lambda: len(self.seen) >= n, timeout, f"request {n} did not come")
        return self.seen[n - 1]

    async def wait_connections(self, n: int, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - as above
        """Waits until exactly n connections are open."""
        await self._wait(lambda: len(self._open) == n, timeout, f"never {n} open connections")

    async def wait_closed(self, seen: Seen, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - as above
        """Waits until the client left this request before its answer was complete."""
        await self._wait(seen.closed.is_set, timeout, f"{seen.method} {seen.path} was not closed by its client")

    async def wait_finished(self, seen: Seen, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - as above
        """Waits until the answer to this request was sent as its script says."""
        await self._wait(seen.finished.is_set, timeout, f"{seen.method} {seen.path} was not answered fully")

    async def _wait(self, reached: Callable[[], bool], seconds: float, complaint: str) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not reached():
                    await self._changed.wait()
        except TimeoutError:
            state = f"{len(self.seen)} requests, {self.connections} connections open"
            raise TimeoutError(f"{complaint} within {seconds} s ({state})") from None

    def _notify(self) -> None:
        # Whoever waits now is woken by this event; whoever waits later waits for the next one.
        self._changed.set()
        self._changed = asyncio.Event()

    def _opened(self, connection: _Connection) -> int:
        self._open.add(connection)
        self.total_connections += 1
        self._notify()
        return self.total_connections

    def _lost(self, connection: _Connection) -> None:
        self._open.discard(connection)
        self._notify()

    def _record(self, seen: Seen) -> None:
        self.seen.append(seen)
        self._notify()

    def _answer(self, seen: Seen) -> Answer:
        script = self._choose(seen)
        if isinstance(script, Answer):
            return script
        answer = script(seen)
        if not isinstance(answer, Answer):
            raise TypeError(f"{script!r} returned {answer!r}, which is no Answer")
        return answer

    def _choose(self, seen: Seen) -> Script:
        if answers := self._by_model.get(seen.model or ""):
            return answers.popleft() if len(answers) > 1 else answers[0]
        return self._answers.popleft() if self._answers else self._default


def _checked(script: Script) -> Script:
    if not isinstance(script, Answer) and not callable(script):
        raise TypeError(f"{script!r} is neither an Answer nor a function of the request; Json({script!r})?")
    return script


class _Connection(asyncio.StreamReaderProtocol):
    """One connection. Streams alone would notice a client that leaves only at the next read."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        super().__init__(asyncio.StreamReader(limit=_MAX_HEAD), self._serve)
        self._upstream = upstream
        self._transport: asyncio.BaseTransport | None = None
        self._task: asyncio.Task[None] | None = None
        self._answering: Seen | None = None
        self._left = False
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._number = self._upstream._opened(self)  # noqa: SLF001 - two halves of one server
        super().connection_made(transport)

    def eof_received(self) -> bool:
        keep = super().eof_received()
        self._gone()
        return bool(keep)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._gone()
        self._upstream._lost(self)  # noqa: SLF001

    def drop(self) -> asyncio.Task[None] | None:
        self._answering = None
        if isinstance(self._transport, asyncio.Transport):
            self._transport.abort()
        if self._task:
            self._task.cancel()
        return self._task

    def _gone(self) -> None:
        self._left = True
        if seen := self._answering:
            self._answering = None
            seen.closed_at = time.monotonic()
            seen.closed.set()
            self._upstream._notify()  # noqa: SLF001
            if self._task:
                self._task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._task = asyncio.current_task()
        # drain() waits for an empty buffer then: "finished" means that the kernel has every byte.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            while seen := await _read_request(reader, writer, self._number):
                if not await self._answer(seen, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left; _gone() has noted it if there was an answer to leave
        except (MalformedRequestError, asyncio.LimitOverrunError) as error:
            self._upstream.malformed.append(str(error))
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await _take_the_rest(reader, writer)
        finally:
            writer.close()

    async def _answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        upstream = self._upstream
        self._answering = seen
        upstream._record(seen)  # noqa: SLF001
        if self._left:
            self._gone()
            return False
        asked_close = "close" in seen.headers.get("connection", "").lower()
        wire = Wire(writer, keep_alive=seen.version == "HTTP/1.1" and not asked_close)
        try:
            keep = await upstream._answer(seen).send(wire, seen)  # noqa: SLF001
        except ConnectionError:
            self._gone()
            return False
        except Exception as error:  # noqa: BLE001 - a broken script must fail its test, not vanish in a task
            upstream.errors.append(error)
            keep = await Error(500, message=f"the upstream's script failed: {error!r}").send(wire, seen)
        self._answering = None
        seen.finished.set()
        upstream._notify()  # noqa: SLF001
        return keep and wire.keep_alive


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> Seen | None:
    """The next request, or None when the client closed the connection between two of them."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial.strip():
            raise
        return None
    request_line, *lines = head[:-4].decode("latin-1").split("\r\n")
    parts = request_line.split(" ")
    if len(parts) != 3 or parts[2] not in {"HTTP/1.1", "HTTP/1.0"}:
        raise MalformedRequestError(f"request line {request_line!r}")
    headers = Headers([_header(line) for line in lines])
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await _read_body(reader, headers)
    path, _, query = parts[1].partition("?")
    return Seen(parts[0], path, query, parts[2], headers, body, connection)


async def _take_the_rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A close with unread data resets the connection, and the client may never see the answer."""
    with contextlib.suppress(OSError, TimeoutError):
        writer.write_eof()
        async with asyncio.timeout(0.5):
            while await reader.read(65536):
                pass


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or not _TOKEN.fullmatch(name) or "\n" in value or "\r" in value or "\0" in value:
        raise MalformedRequestError(f"header line {line!r}")
    return name, value.strip(" \t")


async def _read_body(reader: asyncio.StreamReader, headers: Headers) -> bytes:
    lengths, encodings = headers.getall("content-length"), headers.getall("transfer-encoding")
    if len(lengths) + len(encodings) > 1:
        raise MalformedRequestError(f"length in doubt: {lengths} and {encodings}")
    if encodings:
        if encodings[0].lower() != "chunked":
            raise MalformedRequestError(f"transfer-encoding {encodings[0]!r}")
        return await _read_chunks(reader)
    if not lengths:
        return b""
    if not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
        raise MalformedRequestError(f"content-length {lengths[0]!r}")
    return await reader.readexactly(int(lengths[0]))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        line = await reader.readuntil(b"\r\n")
        digits = line[:-2].partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", digits):
            raise MalformedRequestError(f"chunk size {line!r}")
        if not (size := int(digits, 16)):
            break
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise MalformedRequestError("a chunk is longer than its size")
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass  # trailers
    return bytes(body)


# Builders: errors and usage -------------------------------------------------------------------------------


def openrouter_error(code: int | str, message: str, **metadata: Any) -> JsonObject:
    """What stands under `error` in an OpenRouter error: an integer code, no type, no param."""
    error: JsonObject = {"code": code, "message": message}
    return {**error, "metadata": metadata} if metadata else error


def anthropic_error(status: int, message: str, *, error_type: str | None = None) -> JsonObject:
    """OpenRouter's error in its Anthropic skin, for `/messages`."""
    kind = _ANTHROPIC_TYPES.get(status, "api_error")
    error = {
        "type": kind,
        "message": message,
        "error_type": error_type or _ERROR_TYPES.get(status, "unmapped"),
    }
    return {"type": "error", "error": error, "request_id": None}


def chat_usage(
    prompt: int = 10, completion: int = 5, *, cached: int = 0, reasoning: int = 0, cost: float | None = COST
) -> JsonObject:
    """OpenRouter's `usage` of chat and text completions; `cost` in USD, None leaves it out as OpenAI does."""
    usage: JsonObject = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    return usage if cost is None else {**usage, "cost": cost, "is_byok": False}


def response_usage(
    prompt: int = 10, completion: int = 5, *, cached: int = 0, reasoning: int = 0, cost: float | None = COST
) -> JsonObject:
    """`usage` of `/responses`."""
    usage: JsonObject = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
    }
    return usage if cost is None else {**usage, "cost": cost, "is_byok": False}


def message_usage(prompt: int = 10, completion: int = 5, *, cached: int = 0, cost: float | None = COST) -> JsonObject:
    """`usage` of `/messages`; `prompt` excludes the cached tokens there."""
    usage: JsonObject = {
        "input_tokens": prompt,
        "output_tokens": completion,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }
    return usage if cost is None else {**usage, "cost": cost}


def _usage(given: JsonObject | bool, cost: float | None, default: Callable[..., JsonObject]) -> JsonObject:
    if given is False:
        return {}
    return {"usage": given if isinstance(given, dict) else default(cost=cost)}


_ids = itertools.count(1)


def _id(prefix: str) -> str:
    return f"{prefix}-{int(time.time())}-{next(_ids):06d}"


def _pieces(text: str, n: int) -> list[str]:
    """`text` in at most n pieces, none of them empty."""
    size = max(1, -(-len(text) // max(1, n)))
    return [text[start : start + size] for start in range(0, len(text), size)]


# Builders: chat and text completions ----------------------------------------------------------------------


def chat_completion(
    text: str | None = "Hello there",
    model: str = MODEL,
    *,
    usage: JsonObject | bool = True,
    cost: float | None = COST,
    finish: str = "stop",
    tool_calls: Sequence[JsonObject] = (),
    id: str | None = None,  # noqa: A002 - the field's name
    **message: Any,
) -> JsonObject:
    """A chat completion; further keywords go into the message (`reasoning=`, `refusal=`).

    `usage`: True for 10 and 5 tokens at `cost` USD, False for none, or the object itself.
    """
    said: JsonObject = {"role": "assistant", "content": text, "refusal": None, "reasoning": None, **message}
    if tool_calls:
        said["tool_calls"] = list(tool_calls)
    choice = {
        "index": 0,
        "message": said,
        "finish_reason": finish,
        "native_finish_reason": finish,
        "logprobs": None,
    }
    return {
        "id": id or _id("gen"),
        "provider": "Anthropic",
        "model": model,
        "object": "chat.completion",
        "created": int(time.time()),
        "choices": [choice],
        "system_fingerprint": None,
        **_usage(usage, cost, chat_usage),
    }


def tool_call(name: str = "get_weather", arguments: Any = None, call_id: str = "call_1") -> JsonObject:
    """A tool call as it stands in a whole chat completion."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": _arguments(arguments)}}


def _arguments(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    return msgspec.json.encode({"city": "Paris"} if arguments is None else arguments).decode()


def chat_events(
    text: str = "Hello there",
    model: str = MODEL,
    *,
    usage: JsonObject | bool = True,
    cost: float | None = COST,
    finish: str | None = "stop",
    done: bool = True,
    comments: bool = True,
    preamble: bool = True,
    pieces: int = 3,
    id: str | None = None,  # noqa: A002 - the field's name
) -> list[Step]:
    """The events of a streamed chat completion, in OpenRouter's order.

    A comment, a chunk with the role alone (`preamble`), the text in `pieces`, the finish reason (None: left
    out), the usage chunk without choices, `[DONE]`.
    """
    deltas: list[JsonObject] = [{"role": "assistant", "content": ""}] if preamble else []
    deltas += [{"role": "assistant", "content": piece} for piece in _pieces(text, pieces)]
    return _chat_stream(
        deltas, _chunk_base(id, model), finish, _usage(usage, cost, chat_usage), comments=comments, done=done
    )


def tool_call_events(
    name: str = "get_weather",
    arguments: Any = None,
    model: str = MODEL,
    *,
    call_id: str = "call_1",
    usage: JsonObject | bool = True,
    cost: float | None = COST,
    finish: str | None = "tool_calls",
    done: bool = True,
    comments: bool = True,
    preamble: bool = True,
    pieces: int = 3,
    id: str | None = None,  # noqa: A002 - the field's name
) -> list[Step]:
    """A streamed chat completion that calls one tool; `pieces=1` sends the whole call in one delta."""
    called = _arguments(arguments)
    parts = [called] if pieces == 1 else ["", *_pieces(called, pieces)]
    first = {
        "index": 0,
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": parts[0]},
    }
    rest = [{"index": 0, "function": {"arguments": part}} for part in parts[1:]]
    deltas: list[JsonObject] = [{"role": "assistant", "content": ""}] if preamble else []
    deltas += [{"role": "assistant", "content": None, "tool_calls": [call]} for call in (first, *rest)]
    return _chat_stream(
        deltas, _chunk_base(id, model), finish, _usage(usage, cost, chat_usage), comments=comments, done=done
    )


def chat_error(code: int | str = 502, message: str = "Provider disconnected", **base: Any) -> JsonObject:
    """OpenRouter's error in the middle of a chat stream: it carries choices, and the stream ends with it."""
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error", "native_finish_reason": None}
    kind = _ERROR_TYPES.get(code, "unmapped") if isinstance(code, int) else "server"
    error = openrouter_error(code, message, error_type=kind)
    return {**_chunk_base(None, MODEL), "error": error, "choices": [choice], **base}


def _chunk_base(identity: str | None, model: str) -> JsonObject:
    # No system_fingerprint: OpenRouter's own SDK refuses a null in chunks.
    return {
        "id": identity or _id("gen"),
        "provider": "Anthropic",
        "model": model,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
    }


def _chat_stream(
    deltas: Sequence[JsonObject],
    base: JsonObject,
    finish: str | None,
    usage: JsonObject,
    *,
    comments: bool,
    done: bool,
) -> list[Step]:
    def chunk(delta: JsonObject, reason: str | None = None) -> JsonObject:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "native_finish_reason": reason}
        return {**base, "choices": [{**choice, "logprobs": None}]}

    steps: list[Step] = [COMMENT] if comments else []
    steps += [chunk(delta) for delta in deltas]
    if finish is not None:
        steps.append(chunk({"role": "assistant", "content": ""}, finish))
    if usage:
        steps.append({**base, "choices": [], **usage})
    return [*steps, "[DONE]"] if done else steps


def completion(
    text: str = "Hello there",
    model: str = MODEL,
    *,
    usage: JsonObject | bool = True,
    cost: float | None = COST,
    finish: str = "stop",
    id: str | None = None,  # noqa: A002 - the field's name
) -> JsonObject:
    """A text completion (the legacy endpoint)."""
    return {
        **_chunk_base(id, model),
        "object": "text_completion",
        "choices": [_text_choice(text, finish)],
        **_usage(usage, cost, chat_usage),
    }


def completion_events(
    text: str = "Hello there",
    model: str = MODEL,
    *,
    usage: JsonObject | bool = True,
    cost: float | None = COST,
    finish: str | None = "stop",
    done: bool = True,
    comments: bool = True,
    preamble: bool = True,
    pieces: int = 3,
    id: str | None = None,  # noqa: A002 - the field's name
) -> list[Step]:
    """The events of a streamed text completion; the preamble is a chunk with empty text."""
    base = {**_chunk_base(id, model), "object": "text_completion"}
    texts = [""] if preamble else []
    steps: list[Step] = [COMMENT] if comments else []
    steps += [{**base, "choices": [_text_choice(piece, None)]} for piece in (*texts, *_pieces(text, pieces))]
    if finish is not None:
        steps.append({**base, "choices": [_text_choice("", finish)]})
    if usage is not False:
        steps.append({**base, "choices": [], **_usage(usage, cost, chat_usage)})
    return [*steps, "[DONE]"] if done else steps


def _text_choice(text: str, finish: str | None) -> JsonObject:
    return {
        "index": 0,
        "text": text,
        "finish_reason": finish,
        "native_finish_reason": finish,
        "logprobs": None,
    }


# Builders: responses --------------------------------------------------------------------------------------


def response_object(
    text: str | None = "Hello there",
    model: str = MODEL,
    *,
    usage: JsonObject | bool = True,
    cost: float | None = COST,
    status: str = "completed",
    id: str | None = None,  # noqa: A002 - the field's name
    **fields: Any,
) -> JsonObject:
    """A response of `/responses`; `text=None` has no output yet. `fields` add to it or replace."""
    now = int(time.time())
    return {
        "id": id or _id("gen"),
        "object": "response",
        "created_at": now,
        "completed_at": now if status == "completed" else None,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": [] if text is None else [_output_item(text, "msg_1", status)],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "tool_choice": "auto",
        "tools": [],
        "max_output_tokens": None,
        "previous_response_id": None,
        "store": False,
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "background": False,
        "service_tier": "default",
        **_usage(usage, cost, response_usage),
        **fields,
    }


def _output_text(text: str) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _output_item(text: str | None, identity: str, status: str) -> JsonObject:
    content = [] if text is None else [_output_text(text)]
    return {"id": identity, "type": "message", "role": "assistant", "status": status, "content": content}


def response_events(
    text: str = "Hello there",
    model: str = MODEL,
    *,
    usage: JsonObject | bool = True,
    cost: float | None = COST,
    finish: Literal["completed", "incomplete"] | None = "completed",
    done: bool = False,
    comments: bool = True,
    preamble: bool = True,
    pieces: int = 3,
    id: str | None = None,  # noqa: A002 - the field's name
) -> list[Step]:
    """The event sequence of a streamed response, numbered from 0; `finish=None` leaves out its last event.

    `preamble` is what comes before the first text delta. `done` adds a `[DONE]`, which OpenAI never sends.
    """
    base = response_object(None, model, usage=False, status="in_progress", id=id)
    item, part = {"item_id": "msg_1", "output_index": 0}, {"content_index": 0}
    where = {**item, **part}
    last = finish or "completed"
    opening: list[tuple[str, JsonObject]] = [
        ("response.created", {"response": base}),
        ("response.in_progress", {"response": base}),
        (
            "response.output_item.added",
            {"output_index": 0, "item": _output_item(None, "msg_1", "in_progress")},
        ),
        ("response.content_part.added", {**where, "part": _output_text("")}),
    ]
    deltas = [
        ("response.output_text.delta", {**where, "delta": piece, "logprobs": []}) for piece in _pieces(text, pieces)
    ]
    whole = response_object(text, model, usage=usage, cost=cost, status=last, id=base["id"])
    closing: list[tuple[str, JsonObject]] = [
        ("response.output_text.done", {**where, "text": text, "logprobs": []}),
        ("response.content_part.done", {**where, "part": _output_text(text)}),
        ("response.output_item.done", {"output_index": 0, "item": _output_item(text, "msg_1", last)}),
        (f"response.{last}", {"response": {**whole, "created_at": base["created_at"]}}),
    ]
    events = [*(opening if preamble else []), *deltas, *(closing if finish else closing[:-1])]
    steps: list[Step] = [COMMENT] if comments else []
    steps += [
        event(name, {"type": name, **data, "sequence_number": number}) for number, (name, data) in enumerate(events)
    ]
    return [*steps, "[DONE]"] if done else steps


def response_failed(sequence_number: int, code: str = "server_error", message: str = "Provider disconnected") -> bytes:
    """The event with which OpenRouter ends a response that failed in the middle."""
    failed = response_object(None, usage=False, status="failed", error={"code": code, "message": message})
    data = {"type": "response.failed", "response": failed, "error_type": "server"}
    return event("response.failed", {**data, "sequence_number": sequence_number})


# Builders: messages (Anthropic) ---------------------------------------------------------------------------


def message(
    text: str | None = "Hello there",
    model: str = MODEL,
    *,
    usage: JsonObject | bool = True,
    cost: float | None = COST,
    stop_reason: str | None = "end_turn",
    id: str | None = None,  # noqa: A002 - the field's name
) -> JsonObject:
    """A reply of `/messages`; `text=None` has no content block."""
    return {
        "id": id or _id("gen"),
        "type": "message",
        "role": "assistant",
        "provider": "Anthropic",
        "model": model,
        "content": [] if text is None else [{"type": "text", "text": text, "citations": None}],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        **_usage(usage, cost, message_usage),
    }


def message_events(
    text: str = "Hello there",
    model: str = MODEL,
    *,
    usage: JsonObject | bool = True,
    cost: float | None = COST,
    finish: str | None = "end_turn",
    done: bool = True,
    comments: bool = True,
    preamble: bool = True,
    pieces: int = 3,
    id: str | None = None,  # noqa: A002 - the field's name
) -> list[Step]:
    """The event sequence of a streamed message, in Anthropic's order, a ping included.

    `finish=None` leaves out `message_delta` (stop reason, final usage), `done=False` leaves out
    `message_stop`.
    """
    final = _usage(usage, cost, message_usage)
    begun = {key: value for key, value in final.get("usage", {}).items() if key != "cost"}
    start = message(None, model, usage={**begun, "output_tokens": 0} if begun else False, stop_reason=None, id=id)
    opening: list[JsonObject] = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
    ]
    deltas: list[JsonObject] = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
        for piece in _pieces(text, pieces)
    ]
    closing: list[JsonObject] = [{"type": "content_block_stop", "index": 0}]
    if finish is not None:
        stop = {"stop_reason": finish, "stop_sequence": None}
        closing.append({"type": "message_delta", "delta": stop, **final})
    if done:
        closing.append({"type": "message_stop"})
    events = [*(opening if preamble else []), *deltas, *closing]
    steps: list[Step] = [COMMENT] if comments else []
    return [*steps, *(event(data["type"], data) for data in events)]


def message_error(status: int = 529, message: str = "Overloaded") -> bytes:
    """The event with which a stream of `/messages` ends when it fails in the middle."""
    return event("error", anthropic_error(status, message))


# Builders: all that doesn't stream ------------------------------------------------------------------------


def embedding(
    inputs: int = 1,
    model: str = MODEL,
    *,
    dimensions: int = 4,
    encoding: Literal["float", "base64"] = "float",
    usage: JsonObject | bool = True,
    cost: float | None = COST,
) -> JsonObject:
    """So many embeddings, each of another direction; base64 (little-endian float32) is what SDKs ask for."""
    used: JsonObject = {"prompt_tokens": 5 * inputs, "total_tokens": 5 * inputs}
    if cost is not None:
        used["cost"] = cost
    if isinstance(usage, dict):
        used = usage
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(index, dimensions, encoding)}
        for index in range(inputs)
    ]
    body: JsonObject = {
        "id": _id("gen"),
        "object": "list",
        "model": model,
        "provider": "OpenAI",
        "data": data,
    }
    return body if usage is False else {**body, "usage": used}


def _vector(index: int, dimensions: int, encoding: str) -> list[float] | str:
    vector = [1.0 if place == index % dimensions else 0.25 for place in range(dimensions)]
    if encoding != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode()


def rerank(documents: Sequence[str | JsonObject] = ("a", "b"), model: str = MODEL, *, top_n: int = 0) -> JsonObject:
    """A reranking that keeps the given order."""
    results = [
        {
            "index": index,
            "relevance_score": round(1 / (index + 1), 4),
            "document": {"text": document} if isinstance(document, str) else document,
        }
        for index, document in enumerate(documents)
    ]
    usage = {"search_units": 1, "total_tokens": 5 * len(documents), "cost": COST}
    return {
        "id": _id("gen"),
        "model": model,
        "provider": "Cohere",
        "results": results[: top_n or None],
        "usage": usage,
    }


PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")
SPEECH = b"ID3\x04\x00\x00\x00\x00\x00\x00" + b"\xff\xfb\x90\x00" + bytes(range(256)) * 4


def image(n: int = 1) -> JsonObject:
    """So many generated images of one pixel."""
    data = {"b64_json": base64.b64encode(PIXEL).decode(), "media_type": "image/png"}
    return {"created": int(time.time()), "data": [data] * n, "usage": chat_usage(10, 1000, cost=0.04)}


def transcription(text: str = "Hello there") -> JsonObject:
    usage = {"seconds": 1.5, "input_tokens": 10, "output_tokens": 5, "total_tokens": 15, "cost": COST}
    return {"text": text, "usage": usage}


def generation(id: str, model: str = MODEL, *, cost: float = COST, **fields: Any) -> JsonObject:  # noqa: A002
    """What GET `/generation?id=…` says later about a request: its true tokens and cost."""
    known: JsonObject = {
        "id": id,
        "model": model,
        "provider_name": "Anthropic",
        "api_type": "completions",
        "created_at": "2026-11-22T12:00:00.000Z",
        "origin": "",
        "data_region": "global",
        "total_cost": cost,
        "usage": cost,
        "upstream_inference_cost": None,
        "is_byok": False,
        "streamed": True,
        "cancelled": False,
        "finish_reason": "stop",
        "native_finish_reason": "stop",
        "tokens_prompt": 10,
        "tokens_completion": 5,
        "native_tokens_prompt": 10,
        "native_tokens_completion": 5,
        "native_tokens_reasoning": 0,
        "native_tokens_cached": 0,
        "latency": 100,
        "generation_time": 200,
    }
    nulls = (
        "app_id cache_discount external_user http_referer moderation_latency native_tokens_completion_images "
        "num_fetches num_input_audio_prompt num_media_completion num_media_prompt num_search_results "
        "preset_id provider_responses "
        "router service_tier upstream_id user_agent web_search_engine workspace_id"
    )
    return {"data": {**known, **dict.fromkeys(nulls.split()), **fields}}


def models(*ids: str) -> JsonObject:
    """OpenRouter's GET `/models` with these models, or with the default one."""
    return {
        "data": [_model(id_) for id_ in ids or (MODEL,)],
        "total_count": len(ids or (MODEL,)),
        "links": {"next": None},
    }


def _model(identity: str) -> JsonObject:
    return {
        "id": identity,
        "canonical_slug": identity,
        "name": identity,
        "created": 1_700_000_000,
        "description": "A scripted model.",
        "context_length": 200_000,
        "architecture": {
            "modality": "text->text",
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "tokenizer": "Claude",
            "instruct_type": None,
        },
        "pricing": {"prompt": "0.000003", "completion": "0.000015", "request": "0", "image": "0"},
        "top_provider": {"context_length": 200_000, "max_completion_tokens": 64_000, "is_moderated": False},
        "per_request_limits": None,
        "default_parameters": None,
        "supported_voices": None,
        "supported_parameters": ["max_tokens", "temperature", "tools"],
        "links": {"details": f"/api/v1/models/{identity}/endpoints"},
    }


# The default answer ---------------------------------------------------------------------------------------


def answer_by_path(seen: Seen) -> Answer:
    """A success for every endpoint of OpenRouter that the gateway uses, streamed where the request says so.

    As there, `/responses` refuses `store` and `previous_response_id`, and an unknown path is 404.
    """
    if seen.method == "GET":
        return _answer_get(seen)
    body = seen.json if isinstance(seen.json, dict) else {}
    model = seen.model or MODEL
    identity = _id("gen")
    headers = {"X-Generation-Id": identity}

    def either(whole: Callable[..., JsonObject], events: Callable[..., list[Step]]) -> Answer:
        if seen.stream:
            return Stream(*events(model=model, id=identity), headers=headers)
        return Json(whole(model=model, id=identity), headers=headers)

    match seen.endpoint:
        case "chat/completions":
            return either(chat_completion, chat_events)
        case "completions":
            return either(completion, completion_events)
        case "responses" if body.get("store") or body.get("previous_response_id") is not None:
            return Error(400, message="This API is stateless: store and previous_response_id are not supported")
        case "responses":
            return either(response_object, response_events)
        case "messages":
            return either(message, message_events)
        case "embeddings":
            inputs = len(given) if isinstance(given := body.get("input"), list) else 1
            encoding: Literal["float", "base64"] = "base64" if body.get("encoding_format") == "base64" else "float"
            return Json(embedding(inputs, model, encoding=encoding, dimensions=body.get("dimensions") or 4))
        case "rerank":
            return Json(rerank(body.get("documents") or (), model, top_n=body.get("top_n") or 0))
        case "images" | "images/generations":
            return Json(image(body.get("n") or 1))
        case "audio/speech":
            return Stream(SPEECH[:512], SPEECH[512:], content_type="audio/mpeg", headers=headers)
        case "audio/transcriptions":
            return Json(transcription())
    return Error(404, message=f"No such endpoint: {seen.endpoint}")


def _answer_get(seen: Seen) -> Answer:
    match seen.endpoint:
        case "models":
            return Json(models())
        case "generation":
            return Json(generation(parse_qs(seen.query).get("id", [""])[0]))
    return Error(404, message=f"No such endpoint: {seen.endpoint}")
