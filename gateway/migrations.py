"""Alembic, one line of revisions per plugin that owns tables. Imported by `xenios db` and `migrate_on_start` alone.

All that one call does happens in one transaction, under a lock: one that was cut off left nothing behind, and of two
at once the second finds nothing to do. No `env.py`, no `alembic.ini`: what they would say is the same for every plugin.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import sys
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from gateway.stores import database_address

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sqlalchemy import Connection, MetaData

    from gateway.kit.schema import Schema
    from gateway.settings import Settings

T = TypeVar("T")

LOCK = 0x78656E696F73  # "xenios", of pg_advisory_xact_lock
CONNECT_SECONDS = 10.0


class MigrationError(Exception):
    """The migration can't run; the message says why. Nothing was changed."""


def upgrade(settings: Settings, data_dir: Path | None, schemas: Sequence[Schema]) -> list[str]:
    """To the newest revision; returns the names of those that were older. Raises MigrationError."""

    def run(connection: Connection) -> list[str]:
        behind = [s for s in schemas if s.is_older(_version(connection, s))]
        for schema in behind:
            _migrate(connection, schema, schema.head, down=False)
        return [s.name for s in behind]

    return _in_transaction(settings, data_dir, run)


def downgrade(settings: Settings, data_dir: Path | None, schema: Schema, revision: str) -> None:
    """To an older revision; `base` removes the tables. Raises MigrationError."""
    if revision != "base" and revision not in schema.revisions:
        raise MigrationError(f"{schema.name} has no revision {revision!r}: {', '.join(schema.revisions)} or base.")
    _in_transaction(settings, data_dir, lambda connection: _migrate(connection, schema, revision, down=True))


def versions(settings: Settings, data_dir: Path | None, schemas: Sequence[Schema]) -> list[str | None]:
    """Each one's revision in the database; None: no tables. Raises MigrationError."""
    return _in_transaction(settings, data_dir, lambda connection: [_version(connection, s) for s in schemas])


def differences(settings: Settings, data_dir: Path | None, schema: Schema) -> list[Any]:
    """What Alembic would change so that the tables are as `tables.py` says: nothing, if the migrations are complete."""

    def compare(connection: Connection) -> list[Any]:
        metadata = tables(schema)
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True, "include_name": _own(schema)}
        )
        return list(compare_metadata(context, metadata))

    return _in_transaction(settings, data_dir, compare)


def sql(dialect: str, schemas: Sequence[Schema], start: Sequence[str | None]) -> str:
    """The statements that bring tables from `start` (None: nothing) to the newest revision, for a person to run."""
    out = io.StringIO()
    for schema, version in zip(schemas, start, strict=True):
        if not schema.is_older(version):
            continue
        out.write(f"-- {schema.name}: {version or 'nothing'} to {schema.head}\n")
        script = _script(schema)

        def steps(revision: Any, _: Any, script: ScriptDirectory = script, schema: Schema = schema) -> Any:
            return script._upgrade_revs(schema.head, revision)  # noqa: SLF001 - what alembic.command does

        with EnvironmentContext(Config(), script, fn=steps, as_sql=True, starting_rev=version) as environment:
            environment.configure(
                dialect_name=dialect,
                output_buffer=out,
                version_table=schema.version_table,
                transactional_ddl=True,
                literal_binds=True,
            )
            with environment.begin_transaction():
                environment.run_migrations()
    return out.getvalue()


def tables(schema: Schema) -> MetaData:
    """What `tables.py` says. Raises MigrationError."""
    file = schema.folder / "tables.py"
    name = f"xenios_tables_{schema.name}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise MigrationError(f"{schema.name}: there is no {file}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    metadata: MetaData = module.metadata
    foreign = [t for t in metadata.tables if not t.startswith(f"{schema.name}_")]
    if foreign:
        raise MigrationError(f"{file}: tables of {schema.name} must begin with {schema.name}_: {', '.join(foreign)}.")
    return metadata


def _own(schema: Schema) -> Callable[[str | None, str, Any], bool]:
    def is_own(name: str | None, kind: str, _: Any) -> bool:
        return kind != "table" or (name or "").startswith(f"{schema.name}_")

    return is_own


def _script(schema: Schema) -> ScriptDirectory:
    return ScriptDirectory(str(schema.folder), version_locations=[str(schema.migrations)])


def _version(connection: Connection, schema: Schema) -> str | None:
    context = MigrationContext.configure(connection, opts={"version_table": schema.version_table})
    return context.get_current_revision()


def _migrate(connection: Connection, schema: Schema, target: str, *, down: bool) -> None:
    script = _script(schema)

    def steps(revision: Any, _: Any) -> Any:
        find = script._downgrade_revs if down else script._upgrade_revs  # noqa: SLF001 - what alembic.command does
        return find(target, revision)

    with EnvironmentContext(Config(), script, fn=steps, destination_rev=target) as environment:
        environment.configure(
            connection=connection,
            version_table=schema.version_table,
            transactional_ddl=True,
            render_as_batch=connection.dialect.name == "sqlite",
        )
        with environment.begin_transaction():
            environment.run_migrations()


def _in_transaction(settings: Settings, data_dir: Path | None, run: Callable[[Connection], T]) -> T:
    dialect, address = database_address(settings, data_dir, migrate=True)
    try:
        if dialect == "sqlite":
            return _on_sqlite(str(address), run)
        return asyncio.run(_on_postgres(str(address), run))
    except MigrationError:
        raise
    except sqlalchemy.exc.DBAPIError as error:
        raise MigrationError(f"The database refused: {error.orig}") from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise MigrationError(f"The database can't be reached: {str(error) or type(error).__name__}") from error


def _on_sqlite(path: str, run: Callable[[Connection], T]) -> T:
    engine = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30.0}, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def no_autobegin(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        with engine.begin() as connection:
            return run(connection)
    finally:
        engine.dispose()


async def _on_postgres(url: str, run: Callable[[Connection], T]) -> T:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        poolclass=NullPool,
        connect_args={
            "dsn": url,
            "timeout": CONNECT_SECONDS,
            "statement_cache_size": 0,
            # through a pooler too: names that no one else has given
            "prepared_statement_name_func": lambda: f"__xenios_{uuid.uuid4().hex}__",
        },
    )
    try:
        async with engine.begin() as connection:
            await connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
            return await connection.run_sync(run)
    finally:
        await engine.dispose()
