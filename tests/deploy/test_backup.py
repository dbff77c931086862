"""deploy/backup: what it keeps, and that a gateway goes on with it after everything else is lost."""

import asyncio
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import asyncpg
import pytest

from gateway.kit.testing import Gateway
from gateway.kit.upstream import MODEL, Json, ScriptedUpstream, chat_completion
from tests.stores.postgres import postgres_server
from tests.stores.prices import PRICES
from tests.stores.servers import emptied, valkey_server

PROGRAM = Path(__file__).resolve().parents[2] / "deploy" / "backup" / "xenios_backup.py"


@pytest.fixture(scope="module")
def postgres():
    with postgres_server() as running:
        yield running


@pytest.fixture(scope="module")
def valkey():
    with valkey_server() as running:
        yield running


def backup(postgres, *args, **addresses):
    """As an operator runs it; `addresses` by variable."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("XENIOS_")}
    env["PATH"] = f"{postgres.programs}:{env['PATH']}"
    command = [sys.executable, PROGRAM, *args]
    return subprocess.run(command, env={**env, **addresses}, capture_output=True, text=True, timeout=60, check=False)


def gateway(database, redis):
    return Gateway.test(
        upstream=ScriptedUpstream(default=Json(chat_completion(cost=0.6))),
        plugins=[
            {"use": "api_keys", "config": {"database": True}},
            {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": 1, "per": "total"}]}},
            "usage",
        ],
        settings={
            "services": {"redis": redis, "database": {"url": database, "migrate_on_start": True}},
            "catalogue": {"overrides": PRICES},
        },
    )


async def chat(gw, key):
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    return (await gw.post("/v1/chat/completions", body, headers={"Authorization": f"Bearer {key}"})).status


async def used(gw):
    return (await gw.get("/admin/usage?group_by=key")).data["data"]


async def used_twice(gw):
    async with asyncio.timeout(10):
        while not (rows := await used(gw)) or rows[0]["requests"] != 2:
            await asyncio.sleep(0.05)
    return rows


async def test_after_all_is_lost_keys_usage_and_budgets_are_as_they_were(postgres, valkey, tmp_path):
    """Database dropped, Redis emptied: once restored the same key works, the same usage is told, what is spent stays spent."""
    database, redis = await postgres.new(), await emptied(valkey)
    addresses = {"XENIOS_DATABASE_URL": database, "XENIOS_REDIS_URL": redis}
    async with gateway(database, redis) as gw:
        key = (await gw.post("/admin/keys", {"id": "app"})).data["key"]
        assert [await chat(gw, key) for _ in range(2)] == [200, 200]
        before = await used_twice(gw)
        made = backup(postgres, "create", tmp_path, **addresses)
        assert made.returncode == 0, made.stderr

    name = database.rpartition("/")[2]
    connection = await asyncpg.connect(postgres.url("postgres"))
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    await emptied(valkey)
    async with gateway(database, redis) as gw:
        assert await chat(gw, key) == 401
        assert await used(gw) == []

    done = backup(postgres, "restore", made.stdout.strip(), **addresses)
    assert done.returncode == 0, done.stderr
    async with gateway(database, redis) as gw:
        assert await used(gw) == before
        assert (await gw.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status == 200
        assert await chat(gw, key) == 429  # twice 60 cents are more than a dollar


async def test_an_archive_is_its_owners_alone_and_old_ones_go(postgres, valkey, tmp_path):
    """Archives hold secrets, so nobody else may read them; of many the newest stay."""
    address = tmp_path / "address"
    address.write_text(f"{await emptied(valkey)}\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "pepper").write_text("a secret")
    folder = tmp_path / "archives"
    folder.mkdir()
    old = [folder / f"xenios-2020010{day}T000000Z.tar" for day in (1, 2, 3)]
    for file in old:
        file.touch()
    arguments = ("create", folder, "--keep", "2", "--with", tmp_path / "etc")
    made = backup(postgres, *arguments, XENIOS_REDIS_URL_FILE=str(address))
    assert made.returncode == 0, made.stderr
    new = Path(made.stdout.strip())
    assert sorted(folder.iterdir()) == [old[2], new]
    assert new.stat().st_mode & 0o777 == 0o600
    with tarfile.open(new) as archive:
        assert f"files{tmp_path}/etc/pepper" in archive.getnames()


async def test_tables_that_are_newer_than_the_archive_are_gone(postgres, tmp_path):
    """After a restore nothing is left of a newer release, so that its migrations can run once more, or never."""
    database = await postgres.new()
    connection = await asyncpg.connect(database)
    await connection.execute("CREATE TABLE old (id int PRIMARY KEY); INSERT INTO old VALUES (1)")
    made = backup(postgres, "create", tmp_path, XENIOS_DATABASE_URL=database)
    assert made.returncode == 0, made.stderr
    await connection.execute('DELETE FROM old; CREATE TABLE "New" (id int REFERENCES old)')
    done = backup(postgres, "restore", made.stdout.strip(), XENIOS_DATABASE_URL=database)
    assert done.returncode == 0, done.stderr
    tables = await connection.fetch("SELECT relname FROM pg_class WHERE relkind = 'r' AND relowner = current_user::regrole "
                                    "AND relnamespace = 'public'::regnamespace")  # fmt: skip
    assert [row["relname"] for row in tables] == ["old"]
    assert await connection.fetchval("SELECT id FROM old") == 1
    await connection.close()


def test_a_file_that_goes_meanwhile_does_not_spoil_the_archive(tmp_path, monkeypatch):
    """Files of batches are deleted at any time: one that was listed and is not there any more is left out."""
    program = runpy.run_path(str(PROGRAM))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "kept").write_text("x")
    monkeypatch.setattr(Path, "iterdir", lambda folder: [folder / "gone", folder / "kept"])
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        program["_add"](archive, tmp_path / "files")
        assert archive.getnames() == [f"files{tmp_path}/files", f"files{tmp_path}/files/kept"]


@pytest.mark.parametrize("command", [("create", "x"), ("restore", "x.tar")])
def test_what_can_not_be_done_says_why(postgres, command, tmp_path, monkeypatch):
    """Without a database, or where it does not answer, it fails with the reason, and leaves nothing that looks like an archive."""
    monkeypatch.chdir(tmp_path)
    if command[0] == "create":
        nothing = backup(postgres, *command)
        assert nothing.returncode == 1
        assert "XENIOS_DATABASE_URL" in nothing.stderr
    else:
        with tarfile.open("x.tar", "w") as archive:
            Path("database.dump").write_bytes(b"no dump")
            archive.add("database.dump")
    away = backup(postgres, *command, XENIOS_DATABASE_URL="postgresql://x:secret@127.0.0.1:1/x")
    assert away.returncode == 1
    assert away.stderr.startswith("pg_")
    assert "secret" not in away.stderr
    assert not list(Path("x").glob("*"))
