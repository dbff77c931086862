"""What several workers share: Redis and a database.

`services.redis: memory` and plugins without tables need none of it, and import none of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from gateway.errors import StartError
from gateway.logs import hide
from gateway.stores.database import Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gateway.kit.schema import Schema
    from gateway.metrics import Metrics
    from gateway.settings import Settings
    from gateway.stores.database import Dialect, Driver
    from gateway.stores.redis import RedisStore


@contextlib.asynccontextmanager
async def open_redis(
    settings: Settings, data_dir: Path | None, metrics: Metrics | None = None, *, beside: bool = False
) -> AsyncIterator[RedisStore | None]:
    """The Redis that the settings name; None for `memory`. Connects at the first call, not here.

    `beside` a gateway: `embedded` is the Valkey that it runs. Raises EmbeddedError if a Valkey of our own doesn't
    start, or beside a gateway does not run.
    """
    url = settings.services.redis.get_secret_value()
    if url == "memory":
        yield None
        return
    from gateway.stores.redis import RedisStore  # noqa: PLC0415 - takes a tenth of a second, which `memory` need not pay

    async with contextlib.AsyncExitStack() as stack:
        if url == "embedded":
            from gateway.stores.embedded import EmbeddedError, valkey  # noqa: PLC0415 - as above

            if data_dir is None:
                raise EmbeddedError("services.redis: embedded needs server.data_dir.")
            url = await (_running(data_dir) if beside else stack.enter_async_context(valkey(data_dir / "valkey")))
        store = RedisStore(url, metrics)
        stack.push_async_callback(store.close)
        yield store


async def _running(data_dir: Path) -> str:
    """The URL of the Valkey that a gateway runs. Raises EmbeddedError."""
    from gateway.stores.embedded import EmbeddedError, answers, url_of_running  # noqa: PLC0415 - as above

    url = url_of_running(data_dir / "valkey")
    if url is None or not await answers(url):
        raise EmbeddedError(
            f"No gateway runs with the data directory {data_dir}, and services.redis is embedded: the Valkey that it "
            "starts. Start `xenios serve` first, or set services.redis to an address such as redis://host:6379/0."
        )
    return url


@contextlib.asynccontextmanager
async def embedded_redis(settings: Settings, data_dir: Path) -> AsyncIterator[str | None]:
    """For a parent of several workers: the URL of the Valkey that they share; None where there is none to start."""
    if settings.services.redis.get_secret_value() != "embedded":
        yield None
        return
    from gateway.stores.embedded import valkey  # noqa: PLC0415 - as above

    async with valkey(data_dir / "valkey") as url:
        yield url


@contextlib.asynccontextmanager
async def open_database(
    settings: Settings,
    data_dir: Path | None,
    schemas: Sequence[Schema],
    *,
    needed: bool,
    metrics: Metrics | None = None,
) -> AsyncIterator[Database]:
    """The database that the settings name, whose tables must be as new as `schemas`. `needed`: connect now.

    Raises OldSchema. One that is away is no error.
    """
    dialect, address = database_address(settings, data_dir)

    def make() -> Driver:
        if isinstance(address, Path):
            from gateway.stores.sqlite import Sqlite  # noqa: PLC0415 - only where it is wanted

            return Sqlite(address)
        from gateway.stores.postgres import Postgres  # noqa: PLC0415 - as above

        return Postgres(address, settings.services.database.max_connections)

    async def migrate(wanted: Sequence[Schema]) -> None:
        from gateway import migrations  # noqa: PLC0415 - Alembic takes half a second

        await asyncio.to_thread(migrations.upgrade, settings, data_dir, wanted)

    migrates = migrate if settings.services.database.migrate_on_start else None
    database = Database(dialect, make, schemas, migrates, metrics)
    try:
        if needed:
            await database.start()
        yield database
    finally:
        await database.close()


def database_address(settings: Settings, data_dir: Path | None, *, migrate: bool = False) -> tuple[Dialect, str | Path]:
    """(dialect, URL or file); `migrate`: where migrations go. Raises StartError."""
    given = settings.services.database
    url = given.url.get_secret_value()
    if url == "sqlite":
        if data_dir is None:
            raise StartError("services.database: sqlite needs server.data_dir.")
        return "sqlite", data_dir / "sqlite"
    if url.startswith("sqlite:///"):
        return "sqlite", Path(url.removeprefix("sqlite:///"))
    if migrate and given.migrate_url is not None:
        url = given.migrate_url.get_secret_value()
    hide([unquote(urlsplit(url).password or ""), urlsplit(url).password or ""], everywhere=True)
    return "postgresql", url
