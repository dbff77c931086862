"""Redis (or Valkey) behind a breaker: a call costs one short time-out at worst, then nothing until it is back.

redis-py's own retries make one call to a frozen server last for seconds: they are off.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from gateway.kit.ledger import StoreUnavailable
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = structlog.get_logger("gateway.redis")

TIMEOUT = 0.2
PROBE_SECONDS = 0.5
MAX_CONNECTIONS = 50


class RedisStore:
    """One Redis. Opened at the first call."""

    def __init__(self, url: str) -> None:
        """`redis://`, `rediss://` or `unix://`. Raises ValueError if it is none of them."""
        self._pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=TIMEOUT,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
            client_name="xenios",
        )
        self.client = redis.asyncio.Redis(connection_pool=self._pool)
        self._execute: Callable[..., Awaitable[Any]] = self.client.execute_command  # not typed there
        self._hashes: dict[str, str] = {}
        self._tasks = Tasks()
        self._probe: asyncio.Task[None] | None = None
        self.failures = 0

    @property
    def is_open(self) -> bool:
        """The breaker is open: calls fail at once, a probe looks for the server's return."""
        return self._probe is not None

    async def script(self, text: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a Lua script. Raises StoreUnavailable."""
        sha = self._hashes.get(text)
        if sha is None:
            sha = self._hashes[text] = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

        async def run() -> Any:
            try:
                return await self._execute("EVALSHA", sha, len(keys), *keys, *arguments)
            except NoScriptError:
                return await self._execute("EVAL", text, len(keys), *keys, *arguments)

        return await self.call(run)

    async def call(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Any use of `client`, through the breaker. Raises StoreUnavailable."""
        if self._probe is not None:
            raise StoreUnavailable
        try:
            return await command()
        except ResponseError:
            raise  # the server is there; the command is wrong
        except (RedisError, OSError, TimeoutError) as error:
            self._fail(error)
            raise StoreUnavailable from error

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
                await self._execute("PING")
            except (RedisError, OSError, TimeoutError):
                continue
            self._probe = None
            log.warning("redis_back")
            return
