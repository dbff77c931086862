"""Several workers: a parent that holds the socket and what they share, and starts again what dies.

    xenios serve ── parent: listening sockets, locked data_dir, embedded Valkey
                     ├─ python -m gateway.processes   worker 1: gateway/worker.py
                     └─ python -m gateway.processes   worker 2 …

A worker is a fresh interpreter: no thread, lock or event loop of the parent's is copied half-way. It gets the
configuration's text and the sockets from the parent, says on a pipe when it accepts, and stops when its standard input
ends, which it does with the parent, however that ended. All accept from the same sockets: a connection that waits for
a worker that died is taken by another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import SecretStr

from gateway.errors import StartError
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.settings import Loaded, Settings

log = structlog.get_logger("gateway.processes")

QUICK = 5.0  # a worker that lived shorter makes the next wait
WAITS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
BACKLOG = 4096


@dataclass(frozen=True)
class Ready:
    """What a worker says once it accepts."""

    simulated: bool
    has_chat_task: bool


class _Worker:
    """One child."""

    def __init__(self, number: int, process: asyncio.subprocess.Process, ready: asyncio.Future[Ready | None]) -> None:
        self.number = number
        self.process = process
        self.ready = ready  # None: it ended before
        self.started = time.monotonic()


class Group:
    """The workers of one gateway."""

    def __init__(self, loaded: Loaded, folder: Path, redis_url: str | None) -> None:
        """`redis_url`: of the embedded Valkey, where there is one."""
        self._loaded = loaded
        self._folder = folder
        self._redis_url = redis_url
        self._sockets: list[socket.socket] = []
        self._workers: dict[int, _Worker] = {}
        self._tasks = Tasks()
        self._stopping = asyncio.Event()
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Ready]:
        """All workers accept while the context lasts; then they drain. Raises StartError, OSError."""
        settings = self._loaded.settings
        self._sockets = listen(settings.server.host, settings.server.port)
        self.port = self._sockets[0].getsockname()[1]
        _wipe(self._folder / "metrics")
        try:
            first = [await self._start(number) for number in range(1, settings.server.workers + 1)]
            said = [await worker.ready for worker in first]
            failed = [w for w, ready in zip(first, said, strict=True) if ready is None]
            if failed or said[0] is None:
                # it has said on standard error why
                raise StartError(f"worker {failed[0].number} did not start.")
            keepers = [self._tasks.spawn(self._keep(worker), f"keeper {worker.number}") for worker in first]
            try:
                yield said[0]
            finally:
                self._stopping.set()
                self._close_sockets()
                self._signal(signal.SIGTERM)
                await asyncio.gather(*keepers)
        finally:
            self._close_sockets()
            await self._end()

    def kill(self) -> None:
        """At once; for the second signal."""
        self._signal(signal.SIGKILL)

    async def _start(self, number: int) -> _Worker:
        read, write = os.pipe()
        fds = [s.fileno() for s in self._sockets]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway.processes",
            stdin=asyncio.subprocess.PIPE,
            pass_fds=[*fds, write],
            start_new_session=True,  # Ctrl-C is for the parent, which passes it on once
        )
        os.close(write)
        source = self._loaded.source
        server = self._loaded.settings.server
        order = {
            "number": number,
            "text": source.text,
            "file": source.file,
            "base": str(source.base),
            "host": server.host,
            "port": self.port,
            "workers": server.workers,
            "data_dir": str(self._folder),
            "sockets": fds,
            "ready": write,
            "redis": self._redis_url,
        }
        if process.stdin is None:
            raise RuntimeError("a child without standard input")
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(order).encode() + b"\n")
            await process.stdin.drain()
        worker = _Worker(number, process, asyncio.get_running_loop().create_future())
        self._workers[number] = worker
        _when_said(read, worker.ready)
        return worker

    async def _keep(self, worker: _Worker) -> None:
        """Start it again whenever it ends, until the group stops."""
        quick = 0
        while True:
            code = await worker.process.wait()
            if self._stopping.is_set():
                return
            lived = time.monotonic() - worker.started
            quick = quick + 1 if lived < QUICK else 0
            wait = WAITS[min(quick, len(WAITS) - 1)]
            log.error("worker_ended", worker=worker.number, pid=worker.process.pid, code=code, again_in_seconds=wait)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._stopping.wait()
                    return
            worker = await self._start(worker.number)

    def _signal(self, number: int) -> None:
        for worker in self._workers.values():
            if worker.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.send_signal(number)

    def _close_sockets(self) -> None:
        for listening in self._sockets:
            listening.close()

    async def _end(self) -> None:
        self._signal(signal.SIGTERM)
        for worker in self._workers.values():
            await worker.process.wait()


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on all addresses of `host`, with one port. Raises OSError."""
    out: list[socket.socket] = []
    try:
        for family, _, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            made = socket.socket(family, socket.SOCK_STREAM)
            out.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound = out[0].getsockname()[1] if len(out) > 1 else address[1]
            made.bind((address[0], bound, *address[2:]))
            made.listen(BACKLOG)
            made.setblocking(False)
            made.set_inheritable(True)
    except OSError:
        for made in out:
            made.close()
        raise
    return out


def _wipe(folder: Path) -> None:
    """Counters of workers that are no more."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)


def _when_said(read: int, ready: asyncio.Future[Ready | None]) -> None:
    """Resolve `ready` by the worker's one line, or by the end of its pipe."""
    loop = asyncio.get_running_loop()
    said = bytearray()

    def on_readable() -> None:
        part = os.read(read, 4096)
        said.extend(part)
        if part and b"\n" not in said:
            return
        loop.remove_reader(read)
        os.close(read)
        if not ready.done():
            ready.set_result(Ready(**json.loads(said)) if b"\n" in said else None)

    loop.add_reader(read, on_readable)


# --- in the worker ---------------------------------------------------------------------------------------------------


def main() -> int:
    """A worker: told on standard input what to do."""
    order: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    from gateway import logs  # noqa: PLC0415 - only a worker needs it
    from gateway.settings import load_text  # noqa: PLC0415 - as above

    loaded = load_text(order["text"], order["file"], base=Path(order["base"]))
    loaded = replace(loaded, settings=_as_told(loaded.settings, order))
    logs.setup(loaded.settings.log)
    structlog.contextvars.bind_contextvars(worker=order["number"])
    from gateway.cli import run_loop  # noqa: PLC0415 - as above

    try:
        run_loop(_work(loaded, order))
    except StartError as error:
        sys.stderr.write(f"xenios: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"xenios: worker {order['number']}: {error}\n")
        return 1
    return 0


def _as_told(settings: Settings, order: dict[str, Any]) -> Settings:
    """The settings as the parent has them, which the command line may have changed."""
    told = {name: order[name] for name in ("host", "port", "workers")}
    server = settings.server.model_copy(update=told)
    services = settings.services
    if order["redis"]:
        services = services.model_copy(update={"redis": SecretStr(order["redis"])})
    return settings.model_copy(update={"server": server, "services": services})


async def _work(loaded: Loaded, order: dict[str, Any]) -> None:
    from gateway.cli import stop_signals  # noqa: PLC0415 - only a worker needs it
    from gateway.supervisor import identity  # noqa: PLC0415 - as above
    from gateway.worker import Worker  # noqa: PLC0415 - as above

    folder = Path(order["data_dir"])
    stop = stop_signals()
    _when_ended(stop.set)
    sockets = [socket.socket(fileno=fd) for fd in order["sockets"]]
    worker = Worker(loaded, identity(folder, loaded.settings), folder, sockets=sockets)
    async with worker.running():
        ready = {"simulated": worker.simulated, "has_chat_task": "task/chat" in worker.snapshot.names()}
        os.write(order["ready"], json.dumps(ready).encode() + b"\n")
        os.close(order["ready"])
        await stop.wait()


def _when_ended(call: Callable[[], None]) -> None:
    """When standard input ends, the parent has."""
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno()

    def on_readable() -> None:
        if not os.read(fd, 4096):
            loop.remove_reader(fd)
            call()

    loop.add_reader(fd, on_readable)


if __name__ == "__main__":
    sys.exit(main())
