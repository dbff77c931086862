"""The database service: one contract on PostgreSQL, on PostgreSQL behind pgbouncer, and on SQLite; and its failures."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from pathlib import Path

import aiosqlite
import pytest

from gateway.errors import StatementError, StoreUnavailable
from gateway.settings import load_text
from gateway.stores import open_database
from tests.stores.certificates import certificate_for
from tests.stores.postgres import pgbouncer, postgres_server

SOMEBODY_ELSES = Path(__file__).parents[1] / "faults" / "untrusted.pem"
MODEL = "upstreams: {openrouter: {without_key: simulate}}\n"


@pytest.fixture(scope="module")
def server():
    with postgres_server() as running:
        yield running


def settings(url, **more):
    return load_text(MODEL + f"services: {{database: {{url: '{url}', max_connections: 4}}}}").settings


@contextlib.asynccontextmanager
async def opened(url, tmp_path):
    async with open_database(settings(url), tmp_path, [], needed=True) as database:
        yield database


@pytest.fixture(params=["sqlite", "postgresql", "pgbouncer"])
async def database(request, server, tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        url = "sqlite" if request.param == "sqlite" else await server.new()
        if request.param == "pgbouncer":
            url = stack.enter_context(pgbouncer(url))
        database = await stack.enter_async_context(opened(url, tmp_path))
        await database.execute("CREATE TABLE things (id BIGINT PRIMARY KEY, name TEXT, size DOUBLE PRECISION)")
        yield database


async def test_rows_come_back_as_they_were_stored(database):
    """Whole numbers, text, fractions and None go in and come out the same, on every database."""
    assert await database.execute("INSERT INTO things (id, name, size) VALUES ($1, $2, $3)", 2**62, "Ä", 0.5) == 1
    await database.execute_many("INSERT INTO things (id, name) VALUES ($1, $2)", [(1, "a"), (2, None)])
    assert await database.fetch("SELECT * FROM things ORDER BY id") == [
        {"id": 1, "name": "a", "size": None},
        {"id": 2, "name": None, "size": None},
        {"id": 2**62, "name": "Ä", "size": 0.5},
    ]
    assert await database.fetch_one("SELECT name FROM things WHERE id = $1", 1) == {"name": "a"}
    assert await database.fetch_one("SELECT name FROM things WHERE id = $1", 99) is None
    assert await database.execute("UPDATE things SET size = $1 WHERE id < $2", 1.0, 3) == 2
    assert await database.fetch("DELETE FROM things WHERE id = $1 RETURNING id", 1) == [{"id": 1}]
    assert (await database.fetch_one("SELECT count(*) AS n FROM things"))["n"] == 2


async def test_a_nul_or_half_a_character_is_stored_as_a_replacement(database):
    """What clients may send and PostgreSQL can't hold breaks no statement."""
    await database.execute("INSERT INTO things (id, name) VALUES ($1, $2)", 1, "a\x00b\ud800c")
    assert await database.fetch("SELECT name FROM things") == [{"name": "a\ufffdb?c"}]


async def test_a_transaction_is_all_or_nothing(database):
    """What is raised within it undoes it; what it wrote is seen together."""
    with pytest.raises(KeyError):
        async with database.transaction() as statements:
            await statements.execute("INSERT INTO things (id) VALUES ($1)", 1)
            raise KeyError
    assert await database.fetch("SELECT * FROM things") == []
    async with database.transaction() as statements:
        await statements.execute("INSERT INTO things (id) VALUES ($1)", 1)
        assert await statements.fetch_one("SELECT id FROM things") == {"id": 1}
        await statements.execute("INSERT INTO things (id) VALUES ($1)", 2)
    assert len(await database.fetch("SELECT * FROM things")) == 2
    with pytest.raises(StatementError):
        await database.execute_many("INSERT INTO things (id) VALUES ($1)", [(3,), (1,)])
    assert len(await database.fetch("SELECT * FROM things")) == 2


async def test_a_wrong_statement_is_not_an_outage(database):
    """A mistake in SQL and a broken constraint say what they are, hold no value, and the next statement works."""
    await database.execute("INSERT INTO things (id, name) VALUES ($1, $2)", 1, "a")
    with pytest.raises(StatementError) as conflict:
        await database.execute("INSERT INTO things (id, name) VALUES ($1, $2)", 1, "secret")
    assert conflict.value.conflict
    for sql, values in [
        ("SELECT nothing FROM nowhere", ()),
        ("SELEKT", ()),
        ("INSERT INTO things (id) VALUES ($1)", (2**70,)),
        ("SELECT id FROM things WHERE id = $1 AND name = $2", (1,)),
    ]:
        with pytest.raises(StatementError) as wrong:
            await database.fetch(sql, *values)
        assert not wrong.value.conflict
        assert str(2**70) not in str(wrong.value)
    assert not database.is_open
    assert await database.fetch("SELECT id FROM things") == [{"id": 1}]


async def test_many_at_once_mix_nothing_up(database):
    """More callers than connections, behind a pooler too: each gets its own answer."""

    async def ask(number):
        for turn in range(10):
            row = await database.fetch_one(f"SELECT id + $1 AS a, {number} AS b FROM things", turn)
            assert row == {"a": 1 + turn, "b": number}

    await database.execute("INSERT INTO things (id) VALUES ($1)", 1)
    await asyncio.gather(*map(ask, range(12)))


async def test_writers_wait_for_each_other(database):
    """Counting in transactions loses no count."""
    await database.execute("INSERT INTO things (id, size) VALUES (1, 0)")

    async def count():
        async with database.transaction() as statements:
            await statements.execute("UPDATE things SET size = size + 1 WHERE id = 1")

    await asyncio.gather(*[count() for _ in range(10)])
    assert await database.fetch_one("SELECT size FROM things") == {"size": 10.0}


async def test_what_takes_too_long_is_given_up(database):
    """A statement's time is over: it ends, and the database serves on."""
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) AS c FROM n"
    with pytest.raises(StoreUnavailable):
        await database.fetch(slow, timeout=0.3)
    assert await database.fetch_one("SELECT 1 AS one") == {"one": 1}
    assert not database.is_open


async def test_two_processes_may_write_to_one_sqlite_file(tmp_path):
    """While another process writes, ours waits, then refuses with StoreUnavailable, and goes on when it is done."""
    async with opened("sqlite", tmp_path) as database:
        await database.execute("CREATE TABLE things (id INTEGER)")
        other = sqlite3.connect(tmp_path / "sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert await database.fetch("SELECT * FROM things") == []
        with pytest.raises(StoreUnavailable):
            await database.execute("INSERT INTO things VALUES (1)", timeout=0.3)
        other.execute("COMMIT")
        other.close()
        await database.execute("INSERT INTO things VALUES (1)")
        assert len(await database.fetch("SELECT * FROM things")) == 1
    assert (tmp_path / "sqlite").stat().st_mode & 0o777 == 0o600


async def test_tls_as_sslmode_says(server, tmp_path):
    """A server that takes TLS alone: `require` connects, `verify-full` asks who signed, `disable` is no way in."""
    certificate, authority = certificate_for("localhost", tmp_path)
    with pgbouncer(await server.new(), certificate=certificate) as plain:
        url = plain.replace("127.0.0.1", "localhost")
        for query, there in (
            ("sslmode=require", True),
            (f"sslmode=verify-full&sslrootcert={authority}", True),
            (f"sslmode=verify-full&sslrootcert={SOMEBODY_ELSES}", False),
            ("sslmode=disable", False),
        ):
            async with opened(f"{url}?{query}", tmp_path) as database:
                if there:
                    assert await database.fetch("SELECT 1 AS one") == [{"one": 1}], query
                else:
                    with pytest.raises(StoreUnavailable):
                        await database.fetch("SELECT 1 AS one")
        async with opened(f"{plain}?sslmode=verify-full&sslrootcert={authority}", tmp_path) as database:
            with pytest.raises(StoreUnavailable):  # its certificate is for another name
                await database.fetch("SELECT 1 AS one")


async def test_no_free_connection_is_told_fast(server, tmp_path):
    """All connections in use: 503 within a second, not a queue; and readiness is not lost by it."""
    async with opened(await server.new(), tmp_path) as database, contextlib.AsyncExitStack() as held:
        for _ in range(4):
            statements = await held.enter_async_context(database.transaction())
            await statements.fetch("SELECT 1")
        begin = time.monotonic()
        with pytest.raises(StoreUnavailable) as refused:
            await database.fetch("SELECT 1")
        assert time.monotonic() - begin < 1
        assert refused.value.status_code == 503
        await database.ping()
        assert not database.is_open


async def _comes_back(database, seconds=10.0):
    async with asyncio.timeout(seconds):
        while database.is_open:
            await asyncio.sleep(0.05)
        await database.fetch("SELECT 1")


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pgbouncer"])
async def test_a_frozen_postgres_costs_one_wait(tmp_path, pooled):
    """Frozen: the calls of that moment fail within 2 s, later ones at once; thawed, it serves within 10 s."""
    with postgres_server(own=True) as server, contextlib.ExitStack() as stack:
        url = await server.new()
        if pooled:
            url = stack.enter_context(pgbouncer(url))
        async with opened(url, tmp_path) as database:
            await database.fetch("SELECT 1")
            server.freeze()
            try:
                begin = time.monotonic()
                results = await asyncio.gather(*[database.fetch("SELECT 1") for _ in range(8)], return_exceptions=True)
                assert {type(r) for r in results} == {StoreUnavailable}
                assert time.monotonic() - begin < 2.5
                async with asyncio.timeout(5):
                    while not database.is_open:
                        await asyncio.sleep(0.05)
                begin = time.monotonic()
                for _ in range(100):
                    with pytest.raises(StoreUnavailable):
                        await database.fetch("SELECT 1")
                assert time.monotonic() - begin < 0.2
            finally:
                server.thaw()
            await _comes_back(database)


async def test_a_killed_postgres_is_found_again(tmp_path):
    """Killed in the middle of a transaction: that fails, the next at once, and a new start is found within 10 s."""
    with postgres_server(own=True) as server:
        url = await server.new()
        async with opened(url, tmp_path) as database:
            with pytest.raises(StoreUnavailable):
                async with database.transaction() as statements:
                    await statements.execute("CREATE TABLE things (id BIGINT)")
                    server.kill()
            begin = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await database.ping()
            assert time.monotonic() - begin < 1.5
            server.start()
            await _comes_back(database)
            with pytest.raises(StatementError):
                await database.fetch("SELECT * FROM things")


async def test_a_database_that_is_away_does_not_hold_the_start_up(server, tmp_path):
    """Nobody listens: the start goes on, calls say 503."""
    begin = time.monotonic()
    async with opened("postgresql://nobody@127.0.0.1:1/x", tmp_path) as database:
        assert time.monotonic() - begin < 3
        with pytest.raises(StoreUnavailable):
            await database.fetch("SELECT 1")


async def test_a_read_that_is_given_up_as_its_rows_come_spoils_no_other(tmp_path, monkeypatch):
    """SQLite: whoever leaves in the very moment in which the database answers takes nobody else's answer with him."""
    tasks = []

    def set_result(future, result):
        aiosqlite_sets(future, result)
        if tasks and isinstance(result, sqlite3.Cursor):
            tasks.pop().cancel()

    async def gone():
        try:
            await database.fetch("SELECT * FROM things")
        except asyncio.CancelledError as cancelled:  # alive, as it is while a request is cleaned up after it
            left.append(cancelled)
            await database.fetch("SELECT * FROM things")
            raise

    left = []
    aiosqlite_sets = aiosqlite.core.set_result
    async with opened("sqlite", tmp_path) as database:
        await database.execute("CREATE TABLE things (id BIGINT PRIMARY KEY)")
        await database.execute_many("INSERT INTO things VALUES ($1)", [(n,) for n in range(10)])
        monkeypatch.setattr("aiosqlite.core.set_result", set_result)
        tasks.append(task := asyncio.get_running_loop().create_task(gone()))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left
        assert len(await database.fetch("SELECT * FROM things")) == 10
