"""The database behind a breaker: PostgreSQL or SQLite, with one small interface for both.

Nothing is imported or connected before somebody asks. A database that is away costs the calls of one moment a short
wait; from then on calls fail at once, until a probe has found it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from gateway.errors import StartError, StatementError, StoreUnavailable
from gateway.logs import get_logger, scrub
from gateway.stores.counts import StoreCounts
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from gateway.kit.schema import Schema
    from gateway.metrics import Metrics

log = get_logger("gateway.database")
T = TypeVar("T")

Row = dict[str, Any]
Dialect = Literal["postgresql", "sqlite"]
# What became of a statement: the database is away; it is there and has no room or time; the statement is wrong; a
# constraint forbids it.
Verdict = Literal["away", "busy", "wrong", "conflict"]

STATEMENT_SECONDS = 5.0
SUSPECT_SECONDS = 0.5  # a statement that takes longer: somebody looks whether the database is there
PROBE_SECONDS = 1.0  # how long it may take to say so
RETRY_SECONDS = 0.5
SLOW_RETRY_SECONDS = 5.0  # while its tables are older than this program

BUSY = "The database has no room for this request now. Try again soon."


class OldSchema(StartError):
    """Tables are older than this program; the message says what to run."""


class Statements(Protocol):
    """SQL with `$1`, `$2` … for values: text, whole numbers, floats, bytes or None, of the columns' own types."""

    async def fetch(self, sql: str, *values: Any) -> list[Row]:
        """All rows. Raises StoreUnavailable, StatementError."""

    async def fetch_one(self, sql: str, *values: Any) -> Row | None:
        """The first row. Raises StoreUnavailable, StatementError."""

    async def execute(self, sql: str, *values: Any) -> int:
        """How many rows it changed. Raises StoreUnavailable, StatementError."""

    async def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Once for each of `rows`, all or none. Raises StoreUnavailable, StatementError."""


class Session(Protocol):
    """A connection, until `end`. Raises what its library raises."""

    async def fetch(self, sql: str, values: Sequence[Any]) -> list[Row]: ...
    async def execute(self, sql: str, values: Sequence[Any]) -> int: ...
    async def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None: ...
    async def end(self, *, commit: bool) -> None: ...


class Driver(Protocol):
    """One database system. Raises what its library raises; `verdict` says what that means."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    def abort(self) -> None:
        """Close without waiting for anything: what runs fails."""

    async def begin(self, *, write: bool, atomic: bool) -> Session:
        """`atomic`: in a transaction of its own, that `end` ends."""

    async def probe(self) -> None:
        """Is it there? Asks without waiting for what runs."""

    async def version(self, table: str) -> str | None:
        """What stands in Alembic's table of this name."""

    def verdict(self, error: BaseException) -> Verdict | None: ...
    def words(self, error: BaseException) -> str:
        """What went wrong, without any value of a statement."""


class Database:
    """One database, for all plugins of a process."""

    def __init__(
        self,
        dialect: Dialect,
        make: Callable[[], Driver],
        schemas: Sequence[Schema] = (),
        migrate: Callable[[Sequence[Schema]], Awaitable[None]] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """`schemas`: what the tables must be. `migrate` brings older ones up to date; without, they are refused."""
        self.dialect = dialect
        self._make = make
        self.schemas = schemas
        self._migrate = migrate
        self._driver: Driver | None = None
        self._opening = asyncio.Lock()
        self._tasks = Tasks()
        self._probe: asyncio.Task[None] | None = None
        self._check: asyncio.Task[None] | None = None
        self._closed = False
        self._counts = StoreCounts("database", metrics)
        self.failures = 0

    @property
    def is_open(self) -> bool:
        """The breaker is open: calls fail at once, a probe looks for the database's return."""
        return self._probe is not None

    async def start(self) -> None:
        """Connect now. One that is away is looked for from now on. Raises OldSchema."""
        with contextlib.suppress(StoreUnavailable):
            await self._opened()

    async def admit(self, schemas: Sequence[Schema]) -> None:
        """The tables of plugins that are to come are there and new enough. Raises OldSchema, StoreUnavailable."""
        known = {(schema, schema.head) for schema in self.schemas}
        new = [schema for schema in schemas if (schema, schema.head) not in known]
        if new:
            driver = self._driver or await self._opened()
            await self.mapped(driver, self._verify(driver, new))

    async def close(self) -> None:
        self._closed = True
        await self._tasks.drain(0)
        if self._driver is not None:
            driver, self._driver = self._driver, None
            try:
                async with asyncio.timeout(STATEMENT_SECONDS):
                    await driver.close()
            except Exception:  # noqa: BLE001 - it is gone either way
                driver.abort()

    # --- statements ------------------------------------------------------------------------------------------------

    async def fetch(self, sql: str, *values: Any, timeout: float = STATEMENT_SECONDS) -> list[Row]:  # noqa: ASYNC109
        """All rows, within `timeout` seconds. Raises StoreUnavailable, StatementError."""
        async with self._session(timeout, write=False) as statements:
            return await statements.fetch(sql, *values)

    async def fetch_one(self, sql: str, *values: Any, timeout: float = STATEMENT_SECONDS) -> Row | None:  # noqa: ASYNC109
        """The first row, within `timeout` seconds. Raises StoreUnavailable, StatementError."""
        async with self._session(timeout, write=False) as statements:
            return await statements.fetch_one(sql, *values)

    async def execute(self, sql: str, *values: Any, timeout: float = STATEMENT_SECONDS) -> int:  # noqa: ASYNC109
        """How many rows it changed. Raises StoreUnavailable, StatementError."""
        async with self._session(timeout, write=True) as statements:
            return await statements.execute(sql, *values)

    async def execute_many(
        self,
        sql: str,
        rows: Iterable[Sequence[Any]],
        timeout: float = STATEMENT_SECONDS,  # noqa: ASYNC109 - one deadline of its own, told as StoreUnavailable
    ) -> None:
        """Once for each of `rows`, all or none. Raises StoreUnavailable, StatementError."""
        async with self._session(timeout, write=True, atomic=True) as statements:
            await statements.execute_many(sql, rows)

    def transaction(self, timeout: float = STATEMENT_SECONDS) -> contextlib.AbstractAsyncContextManager[Statements]:
        """Several statements, all or none: what the context raises rolls back. Raises StoreUnavailable at its end too.

        SQLite: one writes at a time. PostgreSQL: READ COMMITTED. Keep it short, and ask nobody else meanwhile.
        """
        return self._session(timeout, write=True, atomic=True)

    async def ping(self) -> None:
        """By a connection of its own: however much runs now. Raises StoreUnavailable."""
        if self._probe is not None or self._closed:
            raise StoreUnavailable
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                driver = self._driver or await self._opened()
                await self.mapped(driver, driver.probe())
        except TimeoutError as error:
            raise StoreUnavailable from error

    @contextlib.asynccontextmanager
    async def _session(self, seconds: float, *, write: bool, atomic: bool = False) -> AsyncIterator[Statements]:
        if self._probe is not None or self._closed:
            raise StoreUnavailable
        suspect = asyncio.get_running_loop().call_later(SUSPECT_SECONDS, self._suspect)
        deadline = asyncio.timeout(seconds)
        began = time.monotonic()
        try:
            async with deadline:
                driver = self._driver or await self._opened()
                session = await self.mapped(driver, driver.begin(write=write, atomic=atomic))
                try:
                    yield _Told(self, driver, session)
                except BaseException:
                    with contextlib.suppress(Exception):
                        await session.end(commit=False)
                    raise
                await self.mapped(driver, session.end(commit=True))
        except TimeoutError as error:
            if deadline.expired():
                self._counts.errors.value += 1
                raise StoreUnavailable(BUSY) from error
            raise
        finally:
            suspect.cancel()
            self._counts.seconds.observe(time.monotonic() - began)

    async def mapped(self, driver: Driver, work: Awaitable[T]) -> T:
        """The driver's errors as ours."""
        try:
            return await work
        except Exception as error:
            verdict = driver.verdict(error)
            if verdict is None:
                raise
            if verdict in {"wrong", "conflict"}:
                # not `from error`: its text may hold values
                raise StatementError(driver.words(error), conflict=verdict == "conflict") from None
            if verdict == "away":
                self._fail(driver, error)
                raise StoreUnavailable from None
            self._counts.errors.value += 1
            raise StoreUnavailable(BUSY) from None

    def tell(self) -> None:
        """To the metrics: is it there? Nothing of one that nobody uses."""
        if self._driver is not None or self._probe is not None:
            self._counts.tell(up=self._probe is None)

    # --- there or not ----------------------------------------------------------------------------------------------

    async def _opened(self) -> Driver:
        """Connected, and the tables are as they must be. Raises StoreUnavailable, OldSchema."""
        async with self._opening:
            if self._driver is not None:
                return self._driver
            if self._probe is not None or self._closed:
                raise StoreUnavailable
            driver = self._make()
            try:
                await self._connect(driver)
            except OldSchema:
                await driver.close()
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the database is away
                driver.abort()
                self._fail(driver, error)
                raise StoreUnavailable from None
            return driver

    async def _connect(self, driver: Driver) -> None:
        await driver.open()
        await self._verify(driver, self.schemas)
        self._driver = driver

    async def _verify(self, driver: Driver, schemas: Sequence[Schema]) -> None:
        versions = [(s, await driver.version(s.version_table)) for s in schemas]
        old = [s for s, version in versions if s.is_older(version)]
        if old and self._migrate is not None:
            await self._migrate(schemas)
            changed = [s.name for s, version in versions if s in old and version is not None]
            if changed:  # a new installation's first tables are no news
                log.warning("database_migrated", tables=changed)
            old = [s for s in schemas if s.is_older(await driver.version(s.version_table))]
        if old:
            raise OldSchema(
                f"The database's tables of {', '.join(s.name for s in old)} are missing or older than this program: "
                "run `xenios db upgrade` (with the same --config), or set services.database.migrate_on_start: true."
            )

    def _suspect(self) -> None:
        if self._check is None and self._probe is None and self._driver is not None:
            self._check = self._tasks.spawn(self._look(self._driver), "database: check")

    async def _look(self, driver: Driver) -> None:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await driver.probe()
        except Exception as error:  # noqa: BLE001 - the verdict says which
            if isinstance(error, TimeoutError) or driver.verdict(error) == "away":
                self._fail(driver, error)
        finally:
            self._check = None

    def _fail(self, driver: Driver, error: BaseException) -> None:
        self.failures += 1
        self._counts.errors.value += 1
        if self._driver is driver:
            self._driver = None
            driver.abort()
        elif self._driver is not None:
            return  # of a driver that was given up before
        if self._probe is None and not self._closed:
            log.error("database_away", error=type(error).__name__, message=scrub(driver.words(error)))
            self._probe = self._tasks.spawn(self._wait_for_it(), "database: probe")

    async def _wait_for_it(self) -> None:
        told = False
        while True:
            await asyncio.sleep(SLOW_RETRY_SECONDS if told else RETRY_SECONDS)
            driver = self._make()
            try:
                await self._connect(driver)
            except OldSchema as error:
                driver.abort()
                if not told:
                    log.error("database_schema_old", message=str(error))  # noqa: TRY400 - the message says it all
                told = True
                continue
            except Exception:  # noqa: BLE001 - whatever it is, it is not there
                driver.abort()
                continue
            except BaseException:
                driver.abort()
                raise
            self._probe = None
            log.warning("database_back")
            return


class _Told:
    """The statements of one transaction."""

    def __init__(self, database: Database, driver: Driver, session: Session) -> None:
        self._database = database
        self._driver = driver
        self._session = session

    async def fetch(self, sql: str, *values: Any) -> list[Row]:
        return await self._database.mapped(self._driver, self._session.fetch(sql, _storable(values)))

    async def fetch_one(self, sql: str, *values: Any) -> Row | None:
        rows = await self.fetch(sql, *values)
        return rows[0] if rows else None

    async def execute(self, sql: str, *values: Any) -> int:
        return await self._database.mapped(self._driver, self._session.execute(sql, _storable(values)))

    async def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        cleaned = [_storable(row) for row in rows]
        await self._database.mapped(self._driver, self._session.execute_many(sql, cleaned))


def _storable(values: Sequence[Any]) -> list[Any]:
    """PostgreSQL's text can hold no NUL, and none holds half a surrogate pair: clients send both."""
    return [_text(value) if isinstance(value, str) else value for value in values]


def _text(value: str) -> str:
    if "\x00" in value:
        value = value.replace("\x00", "\ufffd")
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode(errors="replace").decode()
    return value
