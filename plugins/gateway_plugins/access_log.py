"""Access log: one JSON line per request, on standard output or in a file.

A line says who asked for what, which model answered after how many attempts, what it used, cost and took: never a
prompt, an answer or a secret. What is unknown is null; `tries` is there when an attempt failed or a target was passed
over, `trace_id` when the request is traced. Lines are written by a thread, at most 50 ms late, so that a reader who
stops reading holds up no request; then up to 10,000 lines wait, the next ones are dropped, and a line `lines_dropped`
counts them.
"""

from __future__ import annotations

import asyncio
import os
import queue
import select
import stat
import threading
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field, field_validator

from gateway import Cause, Outcome, Source, hookimpl
from gateway.kit import clean, cleaned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gateway import AttemptRecord, Exchange, Services, Target

STDOUT = 1
DELAY = 0.05
WAITING_LINES = 10_000
CLOSE_SECONDS = 2.0
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_LEVEL_OF = {
    Outcome.OK: "info",
    Outcome.ACCEPTED: "info",
    Outcome.CLIENT_DISCONNECT: "info",
    Outcome.PLUGIN_ERROR: "error",
    Outcome.ERROR: "error",
}


class Config(BaseModel):
    """Where the lines go."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path | None = Field(
        None,
        description="File that lines are appended to; its directory must exist. Default: standard output. "
        "Rotate it by copy and truncate: it stays open.",
    )

    @field_validator("path")
    @classmethod
    def _check_path(cls, value: Path | None) -> Path | None:
        if value is not None and not value.absolute().parent.is_dir():
            raise ValueError(f"there is no directory {value.absolute().parent}")
        return value


class Plugin:
    """Writes one JSON line per request."""

    Config: TypeAlias = Config

    def __init__(self, config: Config, services: Services) -> None:
        self._path = config.path
        self._log = services.log
        self._least = _LEVELS[services.settings.log.level]
        self._encode = msgspec.json.Encoder().encode
        self._lines: list[bytes] = []
        self._dropped = 0
        self._all_lost = services.metrics.dropped("access_log")
        self._counted = 0  # of what the writer lost
        self._metrics = services.metrics
        self._told = False
        self._writer: _Writer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._second = (0, "")

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        self._writer = writer = _Writer(_open(self._path))
        no_longer_counted = self._metrics.before_export(lambda: self._count(writer.lines_lost))
        try:
            yield
        finally:
            no_longer_counted()
            self._flush()
            self._writer = None
            await asyncio.get_running_loop().run_in_executor(None, writer.close, CLOSE_SECONDS)
            lost = writer.lines_lost + writer.waiting
            self._count(lost)
            if lost:
                self._log.error("access_log_incomplete", lines_lost=lost, error=str(writer.failure or ""))

    @hookimpl
    async def request_finished(self, exchange: Exchange) -> None:
        outcome = exchange.outcome or Outcome.ERROR
        level = _LEVEL_OF.get(outcome, "warning")
        if _LEVELS[level] < self._least:
            return
        if len(self._lines) + (self._writer.waiting if self._writer else 0) >= WAITING_LINES:
            self._dropped += 1
            self._all_lost.value += 1
            return
        self._lines.append(self._encode(self._line(exchange, outcome, level)) + b"\n")
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DELAY, self._flush)

    def _count(self, lost: int) -> None:
        """`lost`: by the writer, so far."""
        self._all_lost.value += lost - self._counted
        self._counted = lost

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writer is None:
            return
        if self._writer.failure is not None and not self._told:
            self._told = True
            self._log.error("access_log_not_written", error=str(self._writer.failure))
        if self._dropped:
            note = {"ts": self._time(datetime.now(UTC).timestamp()), "level": "error", "event": "lines_dropped"}
            self._lines.append(self._encode({**note, "count": self._dropped}) + b"\n")
            self._dropped = 0
        if self._lines:
            self._writer.put(self._lines)
            self._lines = []

    def _line(self, exchange: Exchange, outcome: Outcome, level: str) -> _Line:
        started, decision, principal = exchange.started, exchange.decision, exchange.principal
        finished = exchange.finished or started
        served, usage, cost, tries = exchange.served, exchange.usage, exchange.cost, exchange.attempts
        route, method, error = exchange.route, exchange.request.method, exchange.error
        upstream = 0.0
        for one in tries:
            if one.finished is not None:
                upstream += one.finished - one.started
        line = _Line(
            ts=self._time(exchange.started_at + finished - started),
            level=level,
            event="request",
            request_id=exchange.id if exchange.request_id == exchange.id else cleaned(exchange.request_id),
            id=exchange.id,
            method=method if method == route.method else clean(method),
            endpoint=route.endpoint,
            path=route.path,
            status=exchange.status,
            outcome=outcome,
            error_code=clean(error.error_code) if error is not None else None,
            error_by=exchange.error_by,
            model_asked=clean(exchange.asked_model) or None,
            model_served=clean(served.model) if served is not None else None,
            upstream=served.upstream if served is not None else None,
            rule=decision.rule if decision is not None else None,
            task=decision.task if decision is not None else None,
            attempts=len(tries),
            stream=exchange.stream,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            usage_source=usage.source,
            cost_usd=cost.usd,
            cost_source=cost.source,
            duration_ms=round((finished - started) * 1000, 1),
            first_content_ms=_ms(started, exchange.first_content),
            upstream_ms=round(upstream * 1000, 1) if tries else None,
            principal=clean(principal.id) if principal is not None else None,
            tenant=clean(principal.tenant) if principal is not None else None,
            team=clean(principal.team) if principal is not None and principal.team else None,
            remote=clean(exchange.request.remote or "") or None,
        )
        if exchange.phase != "live":
            line.phase = exchange.phase
        if exchange.trace_id is not None:
            line.trace_id = exchange.trace_id
        if exchange.skipped or len(tries) > 1 or (tries and tries[0].cause is not None):
            line.tries = [*map(_skipped, exchange.skipped), *map(_try, tries)]
        return line

    def _time(self, seconds: float) -> str:
        """ISO 8601 in UTC with milliseconds. The date is formatted once a second."""
        whole, thousandths = divmod(round(seconds * 1000), 1000)
        if self._second[0] != whole:
            self._second = (whole, datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S"))
        return f"{self._second[1]}.{thousandths:03d}Z"


class _Line(msgspec.Struct, gc=False):
    """What is logged of a request, in this order; UNSET is left out."""

    ts: str
    level: str
    event: str
    request_id: str
    id: str
    method: str
    endpoint: str
    path: str
    status: int | None
    outcome: Outcome
    error_code: str | None
    error_by: str | None
    model_asked: str | None
    model_served: str | None
    upstream: str | None
    rule: str | None
    task: str | None
    attempts: int
    stream: bool
    input_tokens: int | None
    output_tokens: int | None
    cache_read_tokens: int | None
    reasoning_tokens: int | None
    usage_source: Source
    cost_usd: float | None
    cost_source: Source
    duration_ms: float
    first_content_ms: float | None
    upstream_ms: float | None
    principal: str | None
    tenant: str | None
    team: str | None
    remote: str | None
    phase: str | UnsetType = UNSET
    trace_id: str | UnsetType = UNSET
    tries: list[dict[str, Any]] | UnsetType = UNSET


def _skipped(target: Target) -> dict[str, Any]:
    return {"model": clean(target.model), "upstream": target.upstream, "cause": Cause.CIRCUIT_OPEN, "ms": None}


def _try(record: AttemptRecord) -> dict[str, Any]:
    return {
        "model": clean(record.target.model),
        "upstream": record.target.upstream,
        "cause": record.cause,
        "ms": _ms(record.started, record.finished),
    }


def _ms(start: float, end: float | None) -> float | None:
    return None if end is None else round((end - start) * 1000, 1)


def _open(path: Path | None) -> int | None:
    """A descriptor of our own; None where standard output is closed. Raises OSError if the file can't be opened."""
    if path is not None:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        return os.dup(STDOUT)
    except OSError:
        return None


class _Writer:
    """A thread that writes batches of lines; nothing that happens to the descriptor reaches a request."""

    def __init__(self, descriptor: int | None) -> None:
        self._fd = descriptor
        self._is_pipe = descriptor is not None and stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        self._batches: queue.SimpleQueue[Sequence[bytes] | None] = queue.SimpleQueue()
        # Each counter has one writing thread.
        self._put = 0
        self._done = 0
        self.lines_lost = 0
        self.failure: OSError | None = None
        # A daemon: a reader who doesn't read must not hold up the process's end.
        self._thread = threading.Thread(target=self._run, name="access_log", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._put - self._done

    def put(self, lines: Sequence[bytes]) -> None:
        self._put += len(lines)
        self._batches.put(lines)

    def close(self, seconds: float) -> None:
        """Write what is left, for so long."""
        self._batches.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (lines := self._batches.get()) is not None:
            for piece, count in _pieces(lines) if self._is_pipe else [(b"".join(lines), len(lines))]:
                if not self._write(piece):
                    self.lines_lost += count
                self._done += count
        if self._fd is not None:
            os.close(self._fd)

    def _write(self, piece: bytes) -> bool:
        try:
            while piece and self._fd is not None:
                try:
                    piece = piece[os.write(self._fd, piece) :]
                except BlockingIOError:
                    poll = select.poll()
                    poll.register(self._fd, select.POLLOUT)
                    poll.poll()
        except OSError as error:
            self.failure = error
            return False
        return self._fd is not None


def _pieces(lines: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """Whole lines in pieces that a pipe takes at once: several processes may share it. (bytes, number of lines)"""
    pieces: list[tuple[bytes, int]] = []
    size = count = first = 0
    for index, line in enumerate(lines):
        if count and size + len(line) > select.PIPE_BUF:
            pieces.append((b"".join(lines[first:index]), count))
            size, count, first = 0, 0, index
        size, count = size + len(line), count + 1
    if count:
        pieces.append((b"".join(lines[first:]), count))
    return pieces
