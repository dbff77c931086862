"""An S3-compatible server: moto, which needs other versions than we lock, in an environment of its own."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http.client
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.tasks import Tasks
from tests.tools import CACHE, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

PACKAGES = ("moto[s3]==5.2.5", "flask", "flask-cors")  # its extra `server` is for all of AWS
BUCKET = "files"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Its address; it has a bucket `files` and believes every key."""
    port = free_port()
    process = subprocess.Popen(
        [_installed() / "bin/moto_server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _make_bucket(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _installed() -> Path:
    """Once per version; test runs side by side wait for each other."""
    CACHE.mkdir(exist_ok=True)
    folder = CACHE / "moto"
    stamp = folder / ".installed"
    with (CACHE / "moto.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != " ".join(PACKAGES):
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=60)
            pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
            done = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-1000:]
            stamp.write_text(" ".join(PACKAGES))
    return folder


def _make_bucket(port: int, process: subprocess.Popen[bytes]) -> None:
    """As soon as it listens."""
    deadline = time.monotonic() + 30
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"moto_server ended with {process.wait(0.05)}") from None
        finally:
            connection.close()


class Way:
    """The way to a server, which can be closed: then nobody answers at `url`."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._to = port
        self._tasks = Tasks()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", int(self.url.rpartition(":")[2]))

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._open:
            writer.transport.abort()
        await self._tasks.drain(1)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            behind, forward = await asyncio.open_connection("127.0.0.1", self._to)
            self._open |= {writer, forward}
            back = self._tasks.spawn(_copy(behind, writer), "back")
            await _copy(reader, forward)
            await back
            self._open -= {writer, forward}


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def way_to(endpoint: str) -> AsyncIterator[Way]:
    way = Way(int(endpoint.rpartition(":")[2]))
    await way.open()
    try:
        yield way
    finally:
        await way.close()
