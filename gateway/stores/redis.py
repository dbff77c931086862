"""Redis (or Valkey) behind a breaker: a call costs one short time-out at worst, then nothing until it is back.

redis-py's own retries make one call to a frozen server last for seconds: they are off. A burst of scripts shares a few
connections as pipelines: a connection for each would be slower, and a pool that ran dry would look like a dead server.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from gateway.errors import StoreUnavailable
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = structlog.get_logger("gateway.redis")

TIMEOUT = 0.2
# Where it was this process that was late, the answer is there already and only wants to be read.
GRACE = 0.05
PROBE_SECONDS = 0.5
MAX_CONNECTIONS = 50
SCRIPTS_AT_ONCE = 4
PIPELINE = 128


class _Waiting(NamedTuple):
    text: str
    command: tuple[Any, ...]  # after EVALSHA and the hash
    answer: asyncio.Future[Any]


class RedisStore:
    """One Redis. Opened at the first call."""

    def __init__(self, url: str) -> None:
        """`redis://`, `rediss://` or `unix://`. Raises ValueError if it is none of them."""
        self._pool = redis.asyncio.ConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            # beyond our own time-out, which knows when it is this process that is late
            socket_timeout=5,
            socket_connect_timeout=5,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
            client_name="xenios",
        )
        self.client = redis.asyncio.Redis(connection_pool=self._pool)
        self._execute: Callable[..., Awaitable[Any]] = self.client.execute_command  # not typed there
        self._hashes: dict[str, str] = {}
        self._running = 0
        self._waiting: deque[_Waiting] = deque()
        self._tasks = Tasks()
        self._probe: asyncio.Task[None] | None = None
        self.failures = 0

    @property
    def is_open(self) -> bool:
        """The breaker is open: calls fail at once, a probe looks for the server's return."""
        return self._probe is not None

    async def script(self, text: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a Lua script. Raises StoreUnavailable."""
        command = (len(keys), *keys, *arguments)
        if self._running < SCRIPTS_AT_ONCE:
            self._running += 1
            try:
                return await self.call(lambda: self._run(text, command))
            finally:
                self._next()
        waiting = _Waiting(text, command, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        return await waiting.answer

    async def call(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Any use of `client`, through the breaker. Raises StoreUnavailable."""
        if self._probe is not None:
            raise StoreUnavailable
        try:
            return await _in_time(command)
        except ResponseError:
            raise  # the server is there; the command is wrong
        except (RedisError, OSError, TimeoutError) as error:
            self._fail(error)
            raise StoreUnavailable from error

    async def _run(self, text: str, command: Sequence[Any]) -> Any:
        try:
            return await self._execute("EVALSHA", self._hash(text), *command)
        except NoScriptError:
            return await self._execute("EVAL", text, *command)

    def _hash(self, text: str) -> str:
        sha = self._hashes.get(text)
        if sha is None:
            sha = self._hashes[text] = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        return sha

    def _next(self) -> None:
        """A place is free: for those that wait, together."""
        if not self._waiting:
            self._running -= 1
            return
        batch = [self._waiting.popleft() for _ in range(min(PIPELINE, len(self._waiting)))]
        self._tasks.spawn(self._run_batch(batch), "redis: scripts")

    async def _run_batch(self, batch: Sequence[_Waiting]) -> None:
        async def run() -> list[Any]:
            pipe = self.client.pipeline(transaction=False)
            for waiting in batch:
                pipe.execute_command("EVALSHA", self._hash(waiting.text), *waiting.command)
            answers: list[Any] = await pipe.execute(raise_on_error=False)
            for i, waiting in enumerate(batch):
                if isinstance(answers[i], NoScriptError):
                    answers[i] = await self._execute("EVAL", waiting.text, *waiting.command)
            return answers

        try:
            answers = await self.call(run)
        except BaseException as error:
            answers = [StoreUnavailable() if isinstance(error, asyncio.CancelledError) else error] * len(batch)
            if not isinstance(error, Exception):
                raise
        finally:
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(answer, BaseException):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)
            self._next()

    async def ping(self) -> None:
        """Raises StoreUnavailable."""
        await self.call(lambda: self._execute("PING"))

    async def close(self) -> None:
        await self._tasks.drain(0)
        await self.client.aclose()
        await self._pool.disconnect()

    def _fail(self, error: BaseException) -> None:
        self.failures += 1
        if self._probe is None:
            log.error("redis_away", error=type(error).__name__)
            self._probe = self._tasks.spawn(self._wait_for_it(), "redis: probe")

    async def _wait_for_it(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                await _in_time(lambda: self._execute("PING"))
            except (RedisError, OSError, TimeoutError):
                continue
            self._probe = None
            log.warning("redis_back")
            return


async def _in_time(command: Callable[[], Awaitable[Any]]) -> Any:
    """Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(TIMEOUT, lambda: limit.reschedule(loop.time() + GRACE))
        try:
            return await command()
        finally:
            timer.cancel()
