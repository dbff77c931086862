"""SQLite by aiosqlite: one connection that writes, one that reads meanwhile. Processes of one host may share it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING, Any, NamedTuple

import aiosqlite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from gateway.stores.database import Row, Verdict

BUSY_SECONDS = 4.0  # for the other processes that use the file
LOCK_SECONDS = BUSY_SECONDS  # for this one's: whoever has the connection may be waiting for another process

_WRONG = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE, sqlite3.SQLITE_TOOBIG})
# A full disk too: it can still be read.
_BUSY = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_READONLY,
    }
)


class Sqlite:
    """A file, made if it is missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: _Shared | None = None
        self._reader: _Shared | None = None

    async def open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._writer = _Shared(await self._connect(), asyncio.Lock())
        self._reader = _Shared(await self._connect(), asyncio.Lock())

    async def _connect(self) -> aiosqlite.Connection:
        connection = await aiosqlite.connect(self._path, isolation_level=None, timeout=BUSY_SECONDS)
        try:
            for setting in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
                await connection.execute_fetchall(f"PRAGMA {setting}")
        except BaseException:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        for shared in (self._reader, self._writer):
            if shared is not None:
                await shared.connection.close()
        self._writer = self._reader = None

    def abort(self) -> None:
        for shared in (self._reader, self._writer):
            if shared is not None:
                shared.connection.stop()
        self._writer = self._reader = None

    async def begin(self, *, write: bool, atomic: bool) -> SqliteSession:
        shared = self._writer if write else self._reader
        if shared is None:
            raise ClosedError
        try:
            async with asyncio.timeout(LOCK_SECONDS):
                await shared.lock.acquire()
        except TimeoutError:
            raise sqlite3.OperationalError("others are using the connection") from None
        session = SqliteSession(shared)
        if atomic:
            try:
                await session.fetch("BEGIN IMMEDIATE", ())
            except BaseException:
                await session.end(commit=False)
                raise
        return session

    async def probe(self) -> None:
        def look() -> None:
            if not self._path.is_file():
                raise FileNotFoundError(f"{self._path} is gone")
            with contextlib.closing(sqlite3.connect(self._path, timeout=0.1)) as connection:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()

        await asyncio.to_thread(look)

    async def version(self, table: str) -> str | None:
        session = await self.begin(write=False, atomic=False)
        try:
            if not await session.fetch("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = $1", (table,)):
                return None
            rows = await session.fetch(f'SELECT version_num FROM "{table}"', ())  # noqa: S608 - checked by Schema
            return str(rows[0]["version_num"]) if rows else None
        finally:
            await session.end(commit=True)

    def verdict(self, error: BaseException) -> Verdict | None:
        if isinstance(error, sqlite3.Error):
            code = getattr(error, "sqlite_errorcode", None)
            if code is None:
                return "busy" if isinstance(error, sqlite3.OperationalError) else "wrong"
            kind = code & 0xFF
            if kind == sqlite3.SQLITE_CONSTRAINT:
                return "conflict"
            return "wrong" if kind in _WRONG else "busy" if kind in _BUSY else "away"
        if isinstance(error, ClosedError | OSError):
            return "away"
        return "wrong" if isinstance(error, ValueError | TypeError | OverflowError) else None

    def words(self, error: BaseException) -> str:
        return str(error) or type(error).__name__


class ClosedError(Exception):
    """The connection was given up."""


class _Shared(NamedTuple):
    """A connection runs one statement at a time; who gives one up must not interrupt another's."""

    connection: aiosqlite.Connection
    lock: asyncio.Lock


class SqliteSession:
    """Who holds the connection: in a transaction, or reading, each statement for itself."""

    def __init__(self, shared: _Shared) -> None:
        self._connection = shared.connection
        self._lock = shared.lock

    async def fetch(self, sql: str, values: Sequence[Any]) -> list[Row]:
        _, names, rows = await self._run(sql, values)
        return [dict(zip(names, row, strict=True)) for row in rows]

    async def execute(self, sql: str, values: Sequence[Any]) -> int:
        return max(0, (await self._run(sql, values))[0])

    async def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        cursor = await self._interruptible(self._connection.executemany(sql, [_named(row) for row in rows]))
        await cursor.close()

    async def end(self, *, commit: bool) -> None:
        """Both do nothing where no transaction is open."""
        try:
            if commit:
                try:
                    await self._interruptible(self._connection.commit())
                except sqlite3.Error:
                    await self._connection.rollback()
                    raise
            else:
                with contextlib.suppress(ValueError):  # closed
                    await self._connection.rollback()
        finally:
            self._lock.release()

    async def _run(self, sql: str, values: Sequence[Any]) -> tuple[int, list[str], list[Any]]:
        cursor = await self._interruptible(self._connection.execute(sql, _named(values)))
        try:
            rows: Iterable[Any] = await self._interruptible(cursor.fetchall())
            names = [column[0] for column in cursor.description or ()]
            return cursor.rowcount, names, list(rows)
        finally:
            await cursor.close()

    async def _interruptible(self, work: Any) -> Any:
        """A call that is given up ends in its thread too, or the next one would wait for it."""
        try:
            return await work
        except asyncio.CancelledError:
            pass
        except ValueError as error:
            if "clos" in str(error) or "no active connection" in str(error):
                raise ClosedError from None
            raise
        # Raised anew: the first one's traceback may hold a cursor that has rows left, and as long as that lives, SQLite
        # interrupts whatever is asked next, too.
        await self._connection.interrupt()
        raise asyncio.CancelledError


def _named(values: Sequence[Any]) -> dict[str, Any]:
    """`$1` is a name to SQLite."""
    return {str(number): value for number, value in enumerate(values, 1)}
