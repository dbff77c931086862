"""Redis (or Valkey) behind a breaker: a call costs one short time-out at worst, then nothing until it is back.

redis-py's own retries make one call to a frozen server last for seconds: they are off. Scripts, which requests wait
for, go over one connection as they come, without waiting for each other's answers: a tenth of what redis-py's own way
from a pool costs, and the server runs them one after the other anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import hiredis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    MaxConnectionsError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from gateway.errors import StatementError, StoreUnavailable
from gateway.logs import get_logger, hide, scrub
from gateway.stores.counts import StoreCounts
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gateway.metrics import Metrics

log = get_logger("gateway.redis")

TIMEOUT = 0.2
# Where it was this process that was late, the answer is there already and only wants to be read.
GRACE = 0.05
PROBE_SECONDS = 0.5
MAX_CONNECTIONS = 50
PROBE_KEY = "{xenios}:probe"
POST_RETRY_SECONDS = 5.0

# The server answers, but can't do what it is asked, whoever asks: no memory, no disk, a replica, loading, no rights.
_UNABLE = frozenset(
    {
        "OOM", "READONLY", "MISCONF", "LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "NOREPLICAS", "NOAUTH", "NOPERM",
        "WRONGPASS", "UNKILLABLE",
    }
)  # fmt: skip
_HINTS = {
    "OOM": "Its memory is full: raise maxmemory.",
    "READONLY": "It is a replica: services.redis must name the primary.",
    "MISCONF": "It can't write to its disk, and takes no changes until it can.",
    "NOPERM": "The user of services.redis needs the commands of its rules: +@all on the keys ~{xenios}:*.",
}
_NO_LINGER = struct.pack("ii", 1, 0)


class RedisStore:
    """One Redis. Opened at the first call."""

    def __init__(self, url: str, metrics: Metrics | None = None) -> None:
        """`redis://`, `rediss://` or `unix://`. Raises ValueError if it is none of them."""
        self.url = url  # for clients of other kinds, such as a library's own; it may hold a password
        self._counts = StoreCounts("redis", metrics)
        self._pool = redis.asyncio.ConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            # Our own time-out knows when it is this process that is late; redis-py's costs a task for each write.
            socket_timeout=None,
            socket_connect_timeout=5,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
            protocol=2,
            client_name="xenios",
        )
        passwords = (str(self._pool.connection_kwargs.get(name) or "") for name in ("password", "ssl_password"))
        hide(passwords, everywhere=True)
        self.client = redis.asyncio.Redis(connection_pool=self._pool)
        self._execute: Callable[..., Awaitable[Any]] = self.client.execute_command  # not typed there
        self._hashes: dict[str, str] = {}
        self._sent: set[str] = set()  # scripts that the server knows by their hash
        self._line: _Line | None = None
        self._post: _Post | None = None
        self._post_not_before = 0.0
        self._connecting = asyncio.Lock()
        self._tasks = Tasks()
        self._probe: asyncio.Task[None] | None = None
        # Called when it is back, before others may use it again.
        self.on_return: list[Callable[[], Awaitable[None]]] = []
        self.failures = 0

    @property
    def is_open(self) -> bool:
        """The breaker is open: calls fail at once, a probe looks for the server's return."""
        return self._probe is not None and asyncio.current_task() is not self._probe

    async def script(self, text: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a Lua script. Raises StoreUnavailable; StatementError if it is wrong, or a key's value is."""
        if self.is_open:
            raise StoreUnavailable
        line = self._line
        if line is None or line.closed:
            line = await self._connected()
        command = (len(keys), *keys, *arguments)
        began = time.monotonic()
        try:
            answer = await line.ask("EVALSHA", self._hash(text), *command)
            if isinstance(answer, ResponseError) and _code(answer) == "NOSCRIPT":
                answer = await line.ask("EVAL", text, *command)
        except (OSError, RedisError) as error:
            self._fail(error)
            raise StoreUnavailable from error
        self._counts.seconds.observe(time.monotonic() - began)
        if isinstance(answer, ResponseError):
            raise self._refused(answer)
        return answer

    def send(self, text: str, keys: Sequence[str], arguments: Sequence[Any]) -> None:
        """Run a script without waiting, before any that is run later; not if that can't be done at once."""
        line = self._line
        if self.is_open or line is None or line.closed:
            return
        known = ("EVALSHA", self._hash(text)) if text in self._sent else ("EVAL", text)
        answer = line.send(*known, len(keys), *keys, *arguments)

        def answered(answer: asyncio.Future[Any]) -> None:
            error = answer.exception()
            if error is not None:
                self._fail(error)
            elif isinstance(answer.result(), ResponseError):
                self._sent.discard(text)
                self._refused(answer.result())
            else:
                self._sent.add(text)

        answer.add_done_callback(answered)

    async def post_opened(self, text: str) -> bool:
        """Connects, so that this script can be posted."""
        if self._post is None or self._post.closed:
            async with self._connecting:
                if time.monotonic() < self._post_not_before:
                    return False
                if self._post is None or self._post.closed:
                    try:
                        self._post = await _in_time(lambda: self._connect_post(text))
                    except (RedisError, OSError, TimeoutError) as error:
                        said_no = isinstance(error, ResponseError)
                        self._post_not_before = time.monotonic() + POST_RETRY_SECONDS * (60 if said_no else 1)
                        log.warning("redis_no_post", error=type(error).__name__, message=scrub(str(error)))
                        return False
        return True

    @property
    def posts(self) -> bool:
        """Can a script be posted now?"""
        return self._post is not None and self._post.free

    def post(self, text: str, keys: Sequence[str], arguments: Sequence[Any]) -> bool:
        """Run a script whose answer nobody hears. False: it was not sent.

        It has left this process when this returns, and the server reads it even if this process is killed then: having
        nothing to answer, it can't find the connection gone before it has read all.
        """
        if self.is_open or self._post is None:
            return False
        return self._post.write("EVALSHA", self._hash(text), len(keys), *keys, *arguments)

    def close_post(self) -> None:
        if self._post is not None:
            self._post.close()

    async def call(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Any use of `client`, through the breaker. Raises StoreUnavailable; StatementError if the command is wrong."""
        if self.is_open:
            raise StoreUnavailable
        began = time.monotonic()
        try:
            return await _in_time(command)
        except MaxConnectionsError as error:
            self._counts.errors.value += 1
            raise StoreUnavailable from error  # we ask too much at once; the server is there
        except ResponseError as error:
            raise self._refused(error) from error
        except (RedisError, OSError, TimeoutError) as error:
            self._fail(error)
            raise StoreUnavailable from error
        finally:
            self._counts.seconds.observe(time.monotonic() - began)

    def tell(self) -> None:
        """To the metrics: is it there?"""
        self._counts.tell(up=self._probe is None)

    async def ping(self) -> None:
        """Can it be written to? Raises StoreUnavailable."""
        await self.call(self._look)

    async def close(self) -> None:
        await self._tasks.drain(0)
        if self._line is not None:
            self._line.close()
        self.close_post()
        await self.client.aclose()
        await self._pool.disconnect()

    def _hash(self, text: str) -> str:
        sha = self._hashes.get(text)
        if sha is None:
            sha = self._hashes[text] = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        return sha

    async def _connected(self) -> _Line:
        async with self._connecting:
            if self.is_open:
                raise StoreUnavailable
            if self._line is None or self._line.closed:
                try:
                    self._line = await _in_time(self._connect)
                except ResponseError as error:
                    raise self._refused(error) from error
                except (RedisError, OSError, TimeoutError) as error:
                    self._fail(error)
                    raise StoreUnavailable from error
            return self._line

    async def _connect(self) -> _Line:
        """redis-py opens it (TLS, password, database); what comes then is ours."""
        connection: Any = self._pool.make_connection()  # type: ignore[no-untyped-call]
        await connection.connect()
        return _Line(connection)

    async def _connect_post(self, text: str) -> _Post:
        connection: Any = self._pool.make_connection()  # type: ignore[no-untyped-call]
        await connection.connect()
        try:
            for command in (("SCRIPT", "LOAD", text), ("CLIENT", "REPLY", "ON")):  # does it know the command?
                await connection.send_command(*command)
                await connection.read_response()
            await connection.send_command("CLIENT", "REPLY", "OFF")
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return _Post(connection)

    async def _look(self) -> None:
        """A PING would succeed where nothing can be written."""
        await self._execute("SET", PROBE_KEY, "1", "EX", 60)

    def _refused(self, error: ResponseError) -> Exception:
        if _code(error) not in _UNABLE:
            return StatementError(str(error))
        self._fail(error)
        return StoreUnavailable()

    def _fail(self, error: BaseException) -> None:
        self.failures += 1
        self._counts.errors.value += 1
        if self._probe is None:
            log.error("redis_away", error=type(error).__name__, message=scrub(str(error)), hint=_hint(error))
            self._probe = self._tasks.spawn(self._wait_for_it(), "redis: probe")

    async def _wait_for_it(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                await _in_time(self._look)
                for returned in self.on_return:
                    await returned()
            except (RedisError, OSError, TimeoutError, StoreUnavailable):
                continue
            self._probe = None
            log.warning("redis_back")
            return


class _Asked(NamedTuple):
    at: float
    answer: asyncio.Future[Any]


class _Line(asyncio.Protocol):
    """A connection on which many ask at once. Answers come in the order of the questions."""

    def __init__(self, connection: Any) -> None:
        """Takes over what redis-py has connected, which has no way of its own to do so."""
        self._connection = connection  # whose end would be the transport's
        self._transport: asyncio.Transport = connection._writer.transport  # noqa: SLF001 - as said
        self._transport.set_protocol(self)
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=ResponseError)
        self._asked: deque[_Asked] = deque()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # when the last look at the clock should have been
        self.closed = False

    async def ask(self, *command: Any) -> Any:
        """The answer, which may be a ResponseError. Raises TimeoutError, OSError."""
        if self.closed:
            raise ConnectionError("The connection was lost.")
        return await self.send(*command)

    def send(self, *command: Any) -> asyncio.Future[Any]:
        answer = self._loop.create_future()
        self._asked.append(_Asked(self._loop.time(), answer))
        if self._timer is None:
            self._timer = self._loop.call_later(TIMEOUT, self._check)
        self._transport.write(hiredis.pack_command(command))
        return answer

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not False:
                asked = self._asked.popleft().answer
                if not asked.done():  # its request was given up
                    asked.set_result(answer)
        except (RedisError, IndexError) as error:
            self._lose(ConnectionError(f"What the server says makes no sense: {type(error).__name__}."))

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(error if isinstance(error, OSError) else ConnectionError("The connection was closed."))

    def close(self) -> None:
        self._lose(ConnectionError("The connection was closed."))

    def _check(self, late: bool = False) -> None:
        self._timer = None
        if not self._asked:
            return
        rest = self._asked[0].at + TIMEOUT - self._loop.time()
        if rest > 0:
            self._timer = self._loop.call_later(rest, self._check)
        elif not late or self._loop.time() - self._due > GRACE:  # late again: this process is busy
            self._due = self._loop.time() + GRACE
            self._timer = self._loop.call_later(GRACE, self._check, True)
        else:
            self._lose(TimeoutError(f"No answer within {TIMEOUT:g} s."))

    def _lose(self, error: OSError) -> None:
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(OSError, AttributeError):
            # What was not sent must not arrive later, when a request has long been told that the store is away.
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._transport.abort()
        self._connection._reader = self._connection._writer = None  # noqa: SLF001 - or it would say that it was left open
        if self._timer is not None:
            self._timer.cancel()
        while self._asked:
            answer = self._asked.popleft().answer
            if not answer.done():
                answer.set_exception(error)


class _Post(asyncio.Protocol):
    """A connection on which the server was told to answer nothing."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._transport: asyncio.Transport = connection._writer.transport  # noqa: SLF001 - as for _Line
        self._transport.set_protocol(self)
        self.closed = False

    @property
    def free(self) -> bool:
        """Not if it is gone, or something waits in this process for room in the kernel; else both loops write now."""
        return not self.closed and self._transport.get_write_buffer_size() == 0

    def write(self, *command: Any) -> bool:
        if not self.free:
            return False
        self._transport.write(hiredis.pack_command(command))
        return True

    def data_received(self, data: bytes) -> None:
        del data
        self.close()  # it was to say nothing

    def connection_lost(self, error: Exception | None) -> None:
        del error
        self.close()

    def close(self) -> None:
        """What was written still goes out."""
        if not self.closed:
            self.closed = True
            self._transport.close()
            self._connection._reader = self._connection._writer = None  # noqa: SLF001 - as for _Line


def _code(error: Exception) -> str:
    """What the server's error begins with, such as `OOM`; older servers name it within a script's error."""
    code = getattr(error, "status_code", None)
    if isinstance(code, str):
        return code
    words = str(error).split(" ")
    if words[0] == "ERR":
        return next((word[1:] for word in words if word.startswith("-") and word[1:] in _UNABLE), "ERR")
    return words[0]


def _hint(error: BaseException) -> str | None:
    """What to look at, for whoever reads the log."""
    text = str(error)
    if isinstance(error, AuthenticationError) or _code_of(error) in {"NOAUTH", "WRONGPASS"}:
        return "services.redis needs the right user and password: redis://user:password@host:port/0."
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "Its certificate isn't trusted: rediss://…?ssl_ca_certs=/path/of/the/ca.pem names who signs it."
    if isinstance(error, NoPermissionError):
        return _HINTS["NOPERM"]
    return _HINTS.get(_code_of(error))


def _code_of(error: BaseException) -> str:
    return _code(error) if isinstance(error, ResponseError) else ""


async def _in_time(command: Callable[[], Awaitable[Any]]) -> Any:
    """Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(TIMEOUT, lambda: limit.reschedule(loop.time() + GRACE))
        try:
            return await command()
        finally:
            timer.cancel()
