"""`xenios db` and the start with older tables, with a third party's plugin, on PostgreSQL and on SQLite."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.metadata
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest
from typer.testing import CliRunner

from gateway import migrations
from gateway.cli import app
from gateway.kit import Schema
from gateway.kit.testing import Gateway
from gateway.settings import load_text
from gateway_plugins import api_keys, jobs, usage
from tests.integration.process import serving, xenios
from tests.stores import notes
from tests.stores.postgres import pgbouncer, postgres_server

SCHEMA = notes.Plugin.schema


@pytest.fixture(scope="module")
def server():
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request, server, tmp_path):
    return f"sqlite:///{tmp_path}/data/there.db" if request.param == "sqlite" else await server.new()


def configuration(folder, url, **database):
    data = {
        "server": {"port": 0, "data_dir": str(folder / "data")},
        "upstreams": {"openrouter": {"without_key": "simulate"}},
        "services": {"database": {"url": url, **database}},
        "plugins": [{"use": "api_keys"}, {"use": f"{Path(notes.__file__)}:Plugin", "id": "notes"}],
    }
    (folder / "xenios.yaml").write_text(json.dumps(data))
    return load_text(json.dumps(data)).settings


def db(folder, *arguments):
    """In this process: a second less than `xenios`."""
    return CliRunner().invoke(app, ["db", *arguments, "--config", str(folder / "xenios.yaml")])


def test_the_commands_bring_tables_up_and_down(url, tmp_path):
    """Upgrade, status, one step back, all the way back; each says what there is, and exit codes are right."""
    configuration(tmp_path, url)
    status = db(tmp_path, "status")
    assert (status.exit_code, "has nothing" in status.stdout) == (1, True)
    upgraded = db(tmp_path, "upgrade")
    assert (upgraded.exit_code, upgraded.stdout.split()) == (0, ["notes", "0002"]), upgraded.stderr
    assert "(was there)" in db(tmp_path, "upgrade").stdout
    assert db(tmp_path, "status").exit_code == 0
    back = db(tmp_path, "downgrade", "notes", "0001")
    assert back.exit_code == 0, back.stderr
    status = db(tmp_path, "status")
    assert (status.exit_code, "has 0001" in status.stdout) == (1, True)
    assert db(tmp_path, "downgrade", "notes", "base").exit_code == 0
    assert "has nothing" in db(tmp_path, "status").stdout
    wrong = db(tmp_path, "downgrade", "notes", "9999")
    assert (wrong.exit_code, "0001, 0002 or base" in wrong.stderr) == (1, True)
    assert db(tmp_path, "upgrade", "--plugin", "nobody").exit_code == 2


def test_the_migrations_make_what_the_tables_say(url, tmp_path):
    """Alembic finds no difference between the migrated database and `tables.py` (its `check`)."""
    settings = configuration(tmp_path, url)
    (tmp_path / "data").mkdir()
    assert migrations.upgrade(settings, tmp_path / "data", [SCHEMA]) == ["notes"]
    assert migrations.differences(settings, tmp_path / "data", SCHEMA) == []
    migrations.downgrade(settings, tmp_path / "data", SCHEMA, "0001")
    assert migrations.differences(settings, tmp_path / "data", SCHEMA) != []


BUILT_IN = [api_keys.Plugin.schema, jobs.Plugin.schema, usage.Plugin.schema]


@pytest.mark.parametrize("schema", BUILT_IN, ids=lambda schema: schema.name)
def test_our_own_tables_are_what_is_said_of_them(url, tmp_path, schema):
    """Of each built-in plugin: no difference to its `tables.py`; all the way back removes them, and up again works."""
    settings = configuration(tmp_path, url)
    folder = tmp_path / "data"
    folder.mkdir()
    for _ in range(2):
        assert migrations.upgrade(settings, folder, [schema]) == [schema.name]
        assert migrations.differences(settings, folder, schema) == []
        migrations.downgrade(settings, folder, schema, "base")
        assert migrations.versions(settings, folder, [schema]) == [None]


def test_all_built_in_tables_are_looked_at():
    """A built-in plugin that gets tables is in the test above."""
    own = [p for p in importlib.metadata.entry_points(group="xenios.plugins") if p.dist.name == "xenios"]
    assert [s for p in own if (s := getattr(p.load(), "schema", None)) is not None] == BUILT_IN


def test_the_printed_sql_makes_the_same_tables(url, tmp_path):
    """What `xenios db sql` prints can be run by somebody else; afterwards nothing is left to do."""
    settings = configuration(tmp_path, url)
    (tmp_path / "data").mkdir()
    sql = db(tmp_path, "sql")
    assert sql.exit_code == 0, sql.stderr
    if url.startswith("sqlite"):
        sqlite3.connect(url.removeprefix("sqlite:///")).executescript(sql.stdout).close()
    else:
        asyncio.run(_execute(url, sql.stdout))
    assert migrations.versions(settings, tmp_path / "data", [SCHEMA]) == ["0002"]
    assert db(tmp_path, "sql", "--pending").stdout == ""


async def _execute(url, sql):
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


def test_two_migrators_at_once_do_it_once(url, tmp_path):
    """Replicas that start together: one migrates, the others find it done."""
    settings = configuration(tmp_path, url)
    (tmp_path / "data").mkdir()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: xenios("db", "upgrade", "--config", "xenios.yaml", cwd=tmp_path), range(3)))
    assert [run.returncode for run in runs] == [0] * 3, [run.stderr for run in runs]
    assert sum("(was there)" not in run.stdout for run in runs) == 1
    assert migrations.versions(settings, tmp_path / "data", [SCHEMA]) == ["0002"]


def test_a_migration_that_breaks_off_leaves_nothing_behind(url, tmp_path):
    """The second revision fails: the first is undone too, and when it is mended the upgrade runs through."""
    broken = tmp_path / "broken"
    (broken / "migrations").mkdir(parents=True)
    source = SCHEMA.folder
    (broken / "tables.py").write_text((source / "tables.py").read_text())
    for file in (source / "migrations").glob("*.py"):
        (broken / "migrations" / file.name).write_text(file.read_text())
    second = broken / "migrations" / "0002_when.py"
    second.write_text(second.read_text().replace('["at"]', '["nowhere"]'))
    settings = configuration(tmp_path, url)
    (tmp_path / "data").mkdir()
    with pytest.raises(migrations.MigrationError, match="nowhere"):
        migrations.upgrade(settings, tmp_path / "data", [Schema("notes", broken)])
    assert migrations.versions(settings, tmp_path / "data", [SCHEMA]) == [None]
    migrations.upgrade(settings, tmp_path / "data", [SCHEMA])
    assert migrations.differences(settings, tmp_path / "data", SCHEMA) == []


def test_migrations_go_to_their_own_address(server, tmp_path):
    """`migrate_url`: the gateway uses the pooler, the migration the server; through the pooler it works as well."""
    url = asyncio.run(server.new())
    with pgbouncer(url) as pooled:
        settings = configuration(tmp_path, "postgresql://nobody@127.0.0.1:1/x", migrate_url=url)
        (tmp_path / "data").mkdir()
        assert migrations.versions(settings, None, [SCHEMA]) == [None]
        through_pooler = configuration(tmp_path, pooled)
        assert migrations.upgrade(through_pooler, None, [SCHEMA]) == ["notes"]
        assert migrations.versions(through_pooler, None, [SCHEMA]) == ["0002"]
        assert migrations.versions(settings, None, [SCHEMA]) == ["0002"]


def test_older_tables_end_the_start_with_the_command(url, tmp_path):
    """Exit code 2, and the command that helps; `migrate_on_start: true` does it itself."""
    configuration(tmp_path, url)
    (tmp_path / "data").mkdir()
    refused = xenios("serve", "--config", "xenios.yaml", cwd=tmp_path)
    assert refused.returncode == 2
    assert "notes" in refused.stderr
    assert "xenios db upgrade" in refused.stderr
    configuration(tmp_path, url, migrate_on_start=True)
    with serving(tmp_path, "--config", "xenios.yaml") as gateway:
        assert gateway.request("POST", "/v1/notes", {"text": "Hello\0"}).status == 201
        assert gateway.request("GET", "/v1/notes").data == [{"text": "Hello\ufffd"}]
        assert gateway.request("GET", "/health/ready").status == 200


async def test_a_database_that_is_away_at_the_start_is_checked_when_it_comes(tmp_path):
    """It starts, is not ready, answers 503; once the database is there and migrated it serves, without a restart."""
    with postgres_server(own=True) as server:
        url = await server.new()
        server.kill()
        given = {"services": {"database": {"url": url, "migrate_on_start": False}}}
        async with Gateway.test(plugins=["api_keys", notes.Plugin], settings=given) as gw:
            refused = await gw.post("/v1/notes", {"text": "a"})
            assert (refused.status, refused.data["error"]["code"]) == (503, "store_unavailable")
            assert (await gw.get("/health/ready")).status == 503
            assert (await gw.get("/health/live")).status == 200
            assert (await gw.chat()).status == 200
            server.start()
            database = gw.snapshot.services.database
            with pytest.raises(TimeoutError):
                await _served(gw, 2)  # the tables are missing
            settings = configuration(tmp_path, url)
            await asyncio.to_thread(migrations.upgrade, settings, None, [SCHEMA])
            await _served(gw, 10)
            assert not database.is_open
            assert (await gw.get("/health/ready")).status == 200


async def _served(gw, seconds):
    async with asyncio.timeout(seconds):
        while (await gw.post("/v1/notes", {"text": "a"})).status != 201:
            await asyncio.sleep(0.1)


def test_a_program_older_than_the_tables_still_starts(url, tmp_path):
    """Tables are upgraded first, then the replicas, one by one: the older ones go on, also through a restart."""
    settings = configuration(tmp_path, url)
    (tmp_path / "data").mkdir()
    migrations.upgrade(settings, tmp_path / "data", [SCHEMA])
    with_next = tmp_path / "next"
    (with_next / "migrations").mkdir(parents=True)
    (with_next / "tables.py").write_text((SCHEMA.folder / "tables.py").read_text())
    for file in (SCHEMA.folder / "migrations").glob("*.py"):
        (with_next / "migrations" / file.name).write_text(file.read_text())
    (with_next / "migrations" / "0003.py").write_text(
        'revision = "0003"\ndown_revision = "0002"\ndef upgrade(): pass\ndef downgrade(): pass\n'
    )
    migrations.upgrade(settings, tmp_path / "data", [Schema("notes", with_next)])
    assert "newer" in db(tmp_path, "status").stdout
    assert db(tmp_path, "upgrade").exit_code == 0
    with serving(tmp_path, "--config", "xenios.yaml") as gateway:
        assert gateway.request("POST", "/v1/notes", {"text": "a"}).status == 201


async def test_who_needs_no_database_has_none(tmp_path):
    """Without a plugin that needs it nothing is connected, made or imported."""
    async with Gateway.test(plugins=["api_keys"]) as gw:
        assert not (gw.worker.snapshot.services.data_dir / "sqlite").exists()
    code = "import gateway.worker, sys; print([m for m in ('asyncpg', 'aiosqlite', 'sqlalchemy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_missing_service_is_said_with_what_to_set(tmp_path):
    """A plugin that needs a Redis, with `services.redis: memory`: check and start say which line and what to set."""
    (tmp_path / "needs.py").write_text("class Plugin:\n    requires_services = ('redis', 'fax')\n")
    (tmp_path / "xenios.yaml").write_text(
        "upstreams: {openrouter: {without_key: simulate}}\nplugins:\n  - use: ./needs.py:Plugin\n"
    )
    found = xenios("check", "--config", "xenios.yaml", cwd=tmp_path)
    assert found.returncode == 2
    assert "xenios.yaml:3:" in found.stderr
    assert "set services.redis to embedded or to an address" in found.stderr
    assert "there is no service 'fax'" in found.stderr


@pytest.mark.parametrize(
    ("files", "said"),
    [({}, "one line of revisions"), ({"a": ("1", None), "b": ("2", None)}, "both follow None")],
    ids=["none", "two firsts"],
)
def test_migrations_that_are_no_line_are_refused(tmp_path, files, said):
    """A plugin without migrations, or with two that begin, is told so by `xenios check`."""
    (tmp_path / "migrations").mkdir()
    for name, (revision, before) in files.items():
        (tmp_path / "migrations" / f"{name}.py").write_text(f"revision = {revision!r}\ndown_revision = {before!r}\n")
    with pytest.raises(ValueError, match=said):
        _ = Schema("notes", tmp_path).head
