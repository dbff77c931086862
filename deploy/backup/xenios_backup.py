"""Keeps and brings back what a gateway can't be made again from: its database, what Redis counts, its secrets.

    xenios_backup.py create /var/backups/xenios --keep 14 --with /etc/xenios
    xenios_backup.py restore /var/backups/xenios/xenios-20300101T030000Z.tar

Runs on the Python that Xenios is installed in, with PostgreSQL's pg_dump, pg_restore and psql on PATH. Addresses are
those that the gateway uses: XENIOS_DATABASE_URL and XENIOS_REDIS_URL, or files of those names with _FILE. An archive
holds secrets: it is readable for its owner alone, and whoever takes it elsewhere encrypts it first.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import redis

OURS = ("{xenios}:*", "rq:*")  # Redis may hold more, which is nobody's business here
# The user's tables with all that hangs on them; extensions' stay.
NOTHING = """
DO $$
DECLARE name text;
BEGIN
  FOR name IN
    SELECT c.oid::regclass FROM pg_class c WHERE relkind IN ('r', 'p') AND relowner = current_user::regrole
      AND relpersistence <> 't' AND relnamespace::regnamespace::text NOT IN ('pg_catalog', 'information_schema')
      AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = c.oid AND deptype = 'e')
  LOOP
    EXECUTE 'DROP TABLE IF EXISTS ' || name || ' CASCADE';
  END LOOP;
END $$;
"""
AT_ONCE = 500  # keys; Redis answers others in between


def create(folder: Path, keep: int, paths: Sequence[Path]) -> Path:
    """Write an archive, look whether it can be read, and delete all but the newest `keep`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    done = folder / f"xenios-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.tar"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as place:
        side = Path(place)
        if database := _address("XENIOS_DATABASE_URL"):
            _postgres("pg_dump", database, "--format=custom", f"--file={side / 'database.dump'}")
            _run(["pg_restore", "--list", str(side / "database.dump")])
        if store := _address("XENIOS_REDIS_URL"):
            (side / "redis.jsonl").write_text("".join(f"{json.dumps(key)}\n" for key in _keys(_redis(store))))
        if not any(side.iterdir()):
            raise SystemExit("Nothing to keep: XENIOS_DATABASE_URL names no PostgreSQL, XENIOS_REDIS_URL no Redis.")
        with tarfile.open(side / "archive", "w") as archive:
            for part in ("database.dump", "redis.jsonl"):
                if (side / part).exists():
                    archive.add(side / part, part)
            for path in paths:
                path.lstat()  # what is named must be there
                _add(archive, path.absolute())
        (side / "archive").rename(done)
    for old in sorted(folder.glob("xenios-*.tar"))[:-keep]:
        old.unlink()
    return done


def restore(file: Path) -> list[str]:
    """Put an archive's database and counts in the place of those that are there; returns what it did."""
    did = []
    with tempfile.TemporaryDirectory() as place, tarfile.open(file) as archive:
        parts = set(archive.getnames())
        if "database.dump" in parts:
            if not (database := _address("XENIOS_DATABASE_URL")):
                raise SystemExit("The archive has a database, and XENIOS_DATABASE_URL does not say where it belongs.")
            dump = Path(place) / "database.dump"
            with dump.open("wb") as out, _member(archive, dump.name) as bytes_of:
                shutil.copyfileobj(bytes_of, out)
            # Not by pg_restore alone: it leaves tables that are newer than the archive, which would be made again.
            nothing, all_of_it = Path(place) / "nothing.sql", Path(place) / "all.sql"
            nothing.write_text(NOTHING)
            options = ("--clean", "--if-exists", "--no-owner", "--no-privileges")
            _run(["pg_restore", *options, f"--file={all_of_it}", str(dump)])
            options = ("--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--single-transaction")
            _postgres("psql", database, *options, f"--file={nothing}", f"--file={all_of_it}")
            did.append("The database is as it was.")
        if "redis.jsonl" in parts:
            if not (store := _address("XENIOS_REDIS_URL")):
                raise SystemExit("The archive has Redis's counts, and XENIOS_REDIS_URL does not say where it belongs.")
            with _member(archive, "redis.jsonl") as lines:
                did.append(f"Redis has {_bring_back(_redis(store), lines)} keys again.")
        others = sorted({name for name in parts if name.startswith("files/")})
        if others:
            did.append(f"Not touched: the {len(others)} files and folders in it; `tar --extract` has them.")
    return did


def _add(archive: tarfile.TarFile, path: Path) -> None:
    """Gateways serve on: a file that is there no more when its turn comes is none."""
    with contextlib.suppress(FileNotFoundError):
        archive.add(path, f"files{path}", recursive=False)
        if path.is_dir() and not path.is_symlink():
            for inner in sorted(path.iterdir()):
                _add(archive, inner)


def _keys(store: redis.Redis) -> Iterator[list[str | int]]:
    """Name, contents, end in Unix milliseconds (0: none) of each key; as they are within a second or so."""
    names = [name for pattern in OURS for name in store.scan_iter(pattern, count=AT_ONCE)]
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        pipe = store.pipeline(transaction=True)
        for name in some:
            pipe.dump(name)
            pipe.pttl(name)
        told = pipe.execute()
        now = int(time.time() * 1000)
        for name, value, left in zip(some, told[::2], told[1::2], strict=True):
            if value is not None:  # its time may just be over
                yield [_text(name), _text(value), now + left if left >= 0 else 0]


def _bring_back(store: redis.Redis, lines: Iterable[bytes]) -> int:
    for pattern in OURS:
        for name in store.scan_iter(pattern, count=AT_ONCE):
            store.unlink(name)
    now, count = int(time.time() * 1000), 0
    for line in lines:
        name, value, end = json.loads(line)
        if not end or end > now:
            store.restore(base64.b64decode(name), end, base64.b64decode(value), replace=True, absttl=bool(end))
            count += 1
    return count


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    found = archive.extractfile(name)
    if found is None:
        raise SystemExit(f"{name} in the archive is no file.")
    return found


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _redis(url: str) -> redis.Redis:
    import redis  # noqa: PLC0415 - `--help` works on any Python

    return redis.Redis.from_url(url, socket_timeout=60)


def _address(variable: str) -> str | None:
    """What is set to `sqlite`, `embedded` or `memory` lies in data_dir."""
    value = os.environ.get(variable)
    if value is None and (file := os.environ.get(f"{variable}_FILE")):
        value = Path(file).read_text(encoding="utf-8").strip()
    return value if value and ":" in value and not value.startswith("sqlite") else None


def _postgres(program: str, url: str, *arguments: str) -> None:
    """The password is not on the command line, which everybody on the machine may read."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    address = urlunsplit(parts._replace(netloc=f"{name}@{host}" if name else host))
    _run([program, f"--dbname={address}", *arguments], {"PGPASSWORD": unquote(password)} if password else {})


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is not on the PATH: install PostgreSQL's client programs.") from None
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("create", help="write an archive")
    making.add_argument("folder", type=Path)
    making.add_argument("--keep", type=int, default=14, help="archives that stay (14)")
    making.add_argument("--with", type=Path, action="append", default=[], dest="paths", help="a file or folder more")
    bringing = commands.add_parser("restore", help="bring an archive back; stop the gateways first")
    bringing.add_argument("archive", type=Path)
    given = parser.parse_args()
    os.umask(0o077)
    if given.command == "create":
        said = [str(create(given.folder, max(1, given.keep), given.paths))]
    else:
        said = restore(given.archive)
    sys.stdout.write("".join(f"{line}\n" for line in said))


if __name__ == "__main__":
    main()
