"""PostgreSQL by asyncpg, also behind a pooler in transaction mode, such as pgbouncer's or Supabase's.

Such a pooler gives each transaction whichever server connection is free: no statement is prepared by name, nothing is
kept in the session. A statement outside a transaction is one by itself: asyncpg asks for its parse with Flush, not
Sync, so that the pooler does not take it for over before it was executed.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import asyncpg
from asyncpg import exceptions as e

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.stores.database import Row, Verdict

MIN_CONNECTIONS = 5
IDLE_SECONDS = 300.0
COMMAND_SECONDS = 5.0
CONNECT_SECONDS = 2.0
ACQUIRE_SECONDS = 0.5

_AWAY = (
    OSError,  # TimeoutError too, while connecting
    e.PostgresConnectionError,
    e.OperatorInterventionError,  # shutting down, starting up, the administrator ended it
    e.InvalidAuthorizationSpecificationError,
    e.InvalidCatalogNameError,
    e.ReadOnlySQLTransactionError,  # a standby: the primary is elsewhere
    e.ProtocolViolationError,  # what pgbouncer says when its server is away
)
_BUSY = (
    e.InsufficientResourcesError,  # disk, memory, connections
    e.TransactionRollbackError,  # deadlock, serialization
    e.QueryCanceledError,
    e.LockNotAvailableError,
)


class Postgres:
    """A pool."""

    def __init__(self, url: str, max_connections: int) -> None:
        self._url = url
        self._max = max_connections
        self._pool: Any = None

    async def open(self) -> None:
        self._pool = asyncpg.create_pool(
            self._url,
            min_size=min(MIN_CONNECTIONS, self._max),
            max_size=self._max,
            max_inactive_connection_lifetime=IDLE_SECONDS,
            command_timeout=COMMAND_SECONDS,
            timeout=CONNECT_SECONDS,
            statement_cache_size=0,
            reset=_nothing_to_reset,
        )
        await self._pool

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()

    def abort(self) -> None:
        if self._pool is not None:
            self._pool.terminate()

    async def begin(self, *, write: bool, atomic: bool) -> PostgresSession:
        del write  # all connections are alike
        try:
            connection = await self._pool.acquire(timeout=ACQUIRE_SECONDS)
        except TimeoutError:
            raise PoolExhausted from None
        session = PostgresSession(self._pool, connection)
        if atomic:
            try:
                await session.begin()
            except BaseException:
                await session.end(commit=False)
                raise
        return session

    async def probe(self) -> None:
        connection = await asyncpg.connect(self._url, timeout=CONNECT_SECONDS, statement_cache_size=0)
        try:
            await connection.execute("SELECT 1")
        finally:
            connection.terminate()

    async def version(self, table: str) -> str | None:
        session = await self.begin(write=False, atomic=False)
        try:
            if not (await session.fetch("SELECT to_regclass($1) IS NOT NULL AS there", [table]))[0]["there"]:
                return None
            rows = await session.fetch(f'SELECT version_num FROM "{table}"', [])  # noqa: S608 - checked by Schema
            return str(rows[0]["version_num"]) if rows else None
        finally:
            await session.end(commit=False)

    def verdict(self, error: BaseException) -> Verdict | None:
        if isinstance(error, (PoolExhausted, TimeoutError, *_BUSY)):
            return "busy"
        if isinstance(error, _AWAY):
            return "away"
        if isinstance(error, e.IntegrityConstraintViolationError):
            return "conflict"
        if isinstance(error, e.InterfaceError | e.InternalClientError):
            # of a closed connection or pool, or of a call that was wrong
            return "away" if "clos" in str(error) and not isinstance(error, e.DataError) else "wrong"
        return "wrong" if isinstance(error, asyncpg.PostgresError | ValueError | TypeError) else None

    def words(self, error: BaseException) -> str:
        if isinstance(error, asyncpg.PostgresError):
            return f"{error.as_dict().get('message', '')} ({error.sqlstate})"
        if isinstance(error, e.DataError) or (
            isinstance(error, ValueError | TypeError) and not isinstance(error, e.InterfaceError)
        ):
            return "a value is not of its parameter's type"
        return str(error) or type(error).__name__


class PoolExhausted(Exception):
    """All connections are in use."""


class PostgresSession:
    """One connection of the pool, in a transaction if that was begun."""

    def __init__(self, pool: Any, connection: Any) -> None:
        self._pool = pool
        self._connection = connection
        self._transaction: Any = None
        self._sound = True

    async def begin(self) -> None:
        self._transaction = self._connection.transaction()
        await self._guarded(self._transaction.start())

    async def fetch(self, sql: str, values: Sequence[Any]) -> list[Row]:
        return [dict(record) for record in await self._guarded(self._connection.fetch(sql, *values))]

    async def execute(self, sql: str, values: Sequence[Any]) -> int:
        status: str = await self._guarded(self._connection.execute(sql, *values))
        count = status.rpartition(" ")[2]
        return int(count) if count.isdigit() else 0

    async def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        await self._guarded(self._connection.executemany(sql, rows))

    async def end(self, *, commit: bool) -> None:
        try:
            if self._transaction is not None and self._sound:
                await self._guarded(self._transaction.commit() if commit else self._transaction.rollback())
        finally:
            if not self._sound:
                # What was sent may still run there; to wait for its end would take as long as the server likes.
                with contextlib.suppress(e.InterfaceError):  # it is closed already
                    self._connection.terminate()
            await self._pool.release(self._connection)

    async def _guarded(self, work: Any) -> Any:
        try:
            return await work
        except asyncpg.PostgresError as error:
            self._sound = not isinstance(error, _AWAY)
            raise
        except (e.DataError, ValueError, TypeError):
            raise  # never sent
        except BaseException:
            self._sound = False
            raise


async def _nothing_to_reset(_: Any) -> None:
    """No session state is ever set: the usual reset would cost one more round trip."""
    await asyncio.sleep(0)
