"""A real Valkey for the time of a context, that can be frozen and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis.asyncio

from gateway.stores.embedded import binary


class ValkeyServer:
    """`url` is a `unix://` address."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._options = options
        self.socket = directory / "s"
        self.url = f"unix://{self.socket}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                binary(), "--port", "0", "--unixsocket", self.socket, "--dir", self._directory, "--save", "",
                "--appendonly", "yes", "--appendfsync", "always", *self._options,
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)
                probe.connect(str(self.socket))
                probe.sendall(b"PING\r\n")
                if probe.recv(16).startswith((b"+PONG", b"-NOAUTH")):
                    return
        raise TimeoutError("Valkey did not answer within 10 s")

    def freeze(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


async def emptied(server: ValkeyServer) -> str:
    """Its address; nothing that other tests counted is left there."""
    async with redis.asyncio.Redis.from_url(server.url) as client:
        await client.flushall()
    return server.url


@contextlib.contextmanager
def valkey_server(*options: str) -> Iterator[ValkeyServer]:
    """`options` as on its command line."""
    with tempfile.TemporaryDirectory(prefix="xenios-test-") as place:
        server = ValkeyServer(Path(place), *options)
        server.start()
        try:
            yield server
        finally:
            server.kill()
