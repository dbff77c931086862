"""From finished spans to a collector; whatever becomes of that reaches no request.

Spans wait as bytes, so many at most. A task sends them each second, or as soon as a batch is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import sys
import time
import uuid
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any

import aiohttp
from multidict import CIMultiDict

from gateway import Tasks, __version__
from gateway_plugins.tracing import otlp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from gateway import Cell
    from gateway_plugins.tracing.otlp import Span
    from gateway_plugins.tracing.settings import Config

    Send = Callable[[Sequence[bytes]], Awaitable[None]]

MOST_WAITING = 16 * 1024 * 1024  # bytes
BATCH = 512 * 1024  # bytes; collectors take a few MiB at once
DELAY = 1.0
CLOSE_SECONDS = 2.0
TRIES = 3
QUIET_SECONDS = 60.0  # between two lines about a collector that comes and goes
_LATER = frozenset({429, 502, 503, 504})  # OTLP: what may be sent again
_LONGEST_REPLY = 4096
_GZIP = 16 + zlib.MAX_WBITS


class NotExportedError(Exception):
    """A batch was not taken, or only in part. `again`: it may be later; `spans`: so many of it, None: all."""

    def __init__(self, message: str, *, again: bool, spans: int | None = None) -> None:
        super().__init__(message)
        self.again = again
        self.spans = spans


class Exporter:
    """The way out of one plugin's spans: bounded, and what does not get through is counted in `dropped`."""

    def __init__(self, config: Config, log: Any, dropped: Cell) -> None:
        self._config = config
        self._log = log
        self._encode = _line if config.exporter == "console" else otlp.encoded
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._full = asyncio.Event()
        self._failing = False
        self._told_at = float("-inf")
        self.dropped = dropped

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = Tasks()
        async with _sender(self._config) as send:
            sending = tasks.spawn(self._keep_sending(send), "tracing: export")
            try:
                yield
            finally:
                sending.cancel()
                await tasks.drain(0)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await self._send_all(send, tries=1)
                if self._waiting:
                    self.dropped.value += len(self._waiting)
                    self._log.error("traces_incomplete", spans_lost=len(self._waiting))

    def put(self, spans: Sequence[Span]) -> None:
        """The spans of one request: all, or none while too much waits."""
        if self._bytes >= MOST_WAITING:
            self.dropped.value += len(spans)
            return
        for span in spans:
            data = self._encode(span)
            self._waiting.append(data)
            self._bytes += len(data)
        if self._bytes >= BATCH:
            self._full.set()

    async def _keep_sending(self, send: Send) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), DELAY)
            self._full.clear()
            await self._send_all(send, TRIES)

    async def _send_all(self, send: Send, tries: int) -> None:
        while self._waiting:
            batch: list[bytes] = []
            size = 0
            for data in self._waiting:
                size += len(data)
                if batch and size > BATCH:
                    break
                batch.append(data)
            lost = await self._send(send, batch, tries)
            self.dropped.value += lost
            for data in batch:  # they counted as waiting until now
                self._bytes -= len(data)
                self._waiting.popleft()

    async def _send(self, send: Send, batch: Sequence[bytes], tries: int) -> int:
        """How many of them did not get through."""
        for number in range(1, tries + 1):
            try:
                await send(batch)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next batch has its chance
                self._failed(str(error) if isinstance(error, NotExportedError) else type(error).__name__)
                if number == tries or not (isinstance(error, NotExportedError) and error.again):
                    refused = error.spans if isinstance(error, NotExportedError) else None
                    return len(batch) if refused is None else min(refused, len(batch))
                await asyncio.sleep(2.0 ** (number - 1))
            else:
                if self._failing:
                    self._failing = False
                    self._log.info("traces_exported_again", endpoint=self._config.endpoint)
                return 0
        return len(batch)

    def _failed(self, error: str) -> None:
        """Say it once, not for each batch."""
        if self._failing or time.monotonic() - self._told_at < QUIET_SECONDS:
            return
        self._failing, self._told_at = True, time.monotonic()
        self._log.error(
            "traces_not_exported",
            endpoint=self._config.endpoint,
            error=error,
            hint="Is a collector listening there? Until it is, spans are dropped and counted in xenios_dropped_total.",
        )


@contextlib.asynccontextmanager
async def _sender(config: Config) -> AsyncIterator[Send]:
    if config.exporter == "console":
        yield _print
        return
    about = resource(config)
    headers = CIMultiDict({"User-Agent": f"xenios/{__version__}"})
    headers.update({name: value.get_secret_value() for name, value in config.headers.items()})
    headers["Content-Type"] = "application/x-protobuf"
    if config.compression == "gzip":
        headers["Content-Encoding"] = "gzip"
    connector = aiohttp.TCPConnector(limit=1, ssl=_trusted(config))
    timeout = aiohttp.ClientTimeout(total=config.timeout)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers, cookie_jar=jar) as session:

        async def post(batch: Sequence[bytes]) -> None:
            body = otlp.request(about, __version__, batch)
            if config.compression == "gzip":
                body = await asyncio.to_thread(_gzip, body)
            try:
                async with session.post(config.endpoint, data=body, allow_redirects=False) as reply:
                    if not 200 <= reply.status < 300:
                        raise NotExportedError(f"HTTP {reply.status}", again=reply.status in _LATER)
                    refused = otlp.refused(await reply.content.read(_LONGEST_REPLY))
                    if refused:
                        raise NotExportedError(f"{refused} spans were refused", again=False, spans=refused)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise NotExportedError(type(error).__name__, again=True) from error

        yield post


def resource(config: Config) -> dict[str, Any]:
    """Who sends: one instance per worker and configuration."""
    return {
        "service.name": config.service_name,
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
        "process.pid": os.getpid(),
        "telemetry.sdk.name": "xenios",
        "telemetry.sdk.language": "python",
        "telemetry.sdk.version": __version__,
        **config.resource,
    }


def _trusted(config: Config) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=config.ca_file) if config.ca_file else True


def _gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(level=1, wbits=_GZIP)
    return packer.compress(data) + packer.flush()


def _line(span: Span) -> bytes:
    """In ASCII: content may hold what steers a terminal, or makes a line look like two."""
    return json.dumps(otlp.readable(span)).replace("\x7f", "\\u007f").encode() + b"\n"


async def _print(batch: Sequence[bytes]) -> None:
    """On standard error: standard output belongs to the access log."""

    def write() -> None:
        sys.stderr.write(b"".join(batch).decode())
        sys.stderr.flush()

    try:
        await asyncio.to_thread(write)
    except (OSError, ValueError) as error:
        raise NotExportedError(type(error).__name__, again=False) from error
