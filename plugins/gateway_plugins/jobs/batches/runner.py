"""Some hundred lines of a batch are run: several at once, each through the whole pipeline as its batch's principal.

A line's result and its usage row are committed together, before the ledger settles. A line that has a result never runs
again; one that was under way when its worker was killed does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from gateway import (
    Collected,
    GatewayError,
    LateRequest,
    Outcome,
    PrincipalGone,
    RateLimited,
    StatementError,
    StoreUnavailable,
    UpstreamError,
)
from gateway_plugins.jobs.batches import store
from gateway_plugins.jobs.batches.checks import clean, line_of
from gateway_plugins.jobs.batches.store import Chunk, Owed, Result
from gateway_plugins.jobs.runner import PASSING
from gateway_plugins.jobs.storage import MissingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gateway import Counter, Exchange, Services
    from gateway.kit import Row
    from gateway_plugins.jobs.parts import Shared
    from gateway_plugins.jobs.storage import Storage

GROUP_SECONDS = 0.05  # results of lines that end within it are committed together
GROUP = 100
RETRY_SECONDS = 1.0
COMMIT_SECONDS = 60.0  # a database that is away for longer: the line runs again
LONGEST_WAIT = 60.0
SLICE_SECONDS = 120.0  # then others get the place, and what is left of the chunk waits behind them
CUT_OFF = frozenset({Outcome.CLIENT_DISCONNECT, Outcome.SHUTDOWN})  # by us: it runs again
BREAKDOWNS = 5  # failures of our own, of one line


class Line(msgspec.Struct, frozen=True):
    """One that is to be run. `body` None: it isn't in the file any more."""

    number: int
    custom_id: str
    body: bytes | None


class Entry(NamedTuple):
    """What is committed together."""

    result: Result | None
    row: bytes
    owed: Owed | None
    done: asyncio.Future[None]


class Ledgers:
    """Results and usage rows of a chunk, committed in groups."""

    def __init__(self, shared: Shared, batch_id: str, counts: Counter) -> None:
        self._services: Services = shared.services
        self._batch_id = batch_id
        self._counts = counts
        self._waiting: list[Entry] = []
        self._writing: asyncio.Task[None] | None = None

    async def add(self, result: Result | None, row: bytes, owed: Owed | None = None) -> None:
        """Returns once all is committed. `owed`: for a row without a result. Raises StoreUnavailable."""
        if result is None and not row:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(Entry(result, row, owed, done))
        if self._writing is None:
            self._writing = self._services.spawn(self._write_all(), "results of a batch")
        await asyncio.shield(done)

    async def close(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                if len(self._waiting) < GROUP:
                    await asyncio.sleep(GROUP_SECONDS)
                group, self._waiting = self._waiting[:GROUP], self._waiting[GROUP:]
                failure = await self._write(group)
                if isinstance(failure, StatementError) and len(group) > 1:
                    for one in group:  # one of them spoils it for all
                        _tell([one], await self._write([one]))
                else:
                    _tell(group, failure)
        finally:
            self._writing = None

    async def _write(self, group: Sequence[Entry]) -> Exception | None:
        """What an upstream answered has been paid for: a database that is away is waited for."""
        deadline = time.monotonic() + COMMIT_SECONDS
        results = [entry.result for entry in group if entry.result is not None]
        owed = [entry.owed for entry in group if entry.owed is not None]
        while True:
            try:
                async with self._services.database.transaction() as statements:
                    new = await store.write_results(statements, self._batch_id, results)
                    await store.write_owed(statements, self._batch_id, owed)
                    for entry in group:
                        await self._services.rows.write(statements, entry.row)
            except StoreUnavailable as error:
                if time.monotonic() > deadline:
                    return error
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as error:
                self._services.log.exception("batch_results_not_written", batch=self._batch_id)
                return error
            else:
                for result in new:
                    self._counts.add(1, "succeeded" if result.ok else "failed")
                return None


def _tell(group: Sequence[Entry], failure: Exception | None) -> None:
    for entry in group:
        if entry.done.done():
            continue
        if failure is None:
            entry.done.set_result(None)
        else:
            entry.done.set_exception(failure)


class ChunkRun:
    """One chunk, from its first line without a result to its last."""

    def __init__(self, shared: Shared, storage: Storage, batch: Row, chunk: Chunk, counts: Counter) -> None:
        self._services: Services = shared.services
        self._charge = shared.config.charge_abandoned
        self._settings = shared.config.batches
        self._storage = storage
        self._batch = batch
        self._chunk = chunk
        self._late = LateRequest.from_json(batch["late"])
        self._ledgers = Ledgers(shared, batch["id"], counts)
        self._until = time.monotonic() + SLICE_SECONDS
        self._complete = True

    async def run(self) -> bool:
        """Until each line has a result, or its time is over: False. Raises Unavailable, StoreUnavailable: later."""
        await self._settle_owed()
        done = await self._done()
        lines = iter([line for line in await self._lines() if line.number not in done])
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._settings.lanes, len(self._chunk.custom_ids) - len(done))):
                    group.create_task(self._lane(lines))
        finally:
            await self._ledgers.close()
        complete = self._complete and len(await self._done()) == len(self._chunk.custom_ids)
        if complete and not await self._services.ledger.flush():
            raise StoreUnavailable  # nobody looks at its settlements again
        return complete

    async def _settle_owed(self) -> None:
        """Tries that came to nothing, of a worker that died maybe, before the ledger knew what they cost."""
        for settlement in await store.owed_of(self._services.database, self._batch["id"], self._chunk):
            self._services.settle_late(json.loads(settlement))

    async def _done(self) -> set[int]:
        """Lines that have their result: of a worker that died maybe, before the ledger knew."""
        rows = await store.results_of(self._services.database, self._batch["id"], self._chunk)
        for row in rows:
            if row["settlement"]:
                self._services.settle_late(json.loads(row["settlement"]))
        return {row["number"] for row in rows}

    async def _lines(self) -> list[Line]:
        chunk = self._chunk
        try:
            data = await self._storage.range(self._batch["input_file_id"], chunk.start, chunk.length)
        except MissingError:
            data = b""
        found = [line for part in data.split(b"\n") if (line := clean(part, first=chunk.start == 0))]
        bodies: list[bytes | None] = [None] * len(chunk.custom_ids)
        for i, line in enumerate(found[: len(bodies)]):
            try:
                read = line_of(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            if read.custom_id == chunk.custom_ids[i]:
                bodies[i] = bytes(read.body)
        return [
            Line(chunk.first + i, custom_id, body)
            for i, (custom_id, body) in enumerate(zip(chunk.custom_ids, bodies, strict=True))
        ]

    async def _lane(self, lines: Iterator[Line]) -> None:
        """One line after the other, as long as there are any: all lanes take from the same."""
        for line in lines:
            if self._is_late():
                return
            if line.body is None:
                await self._ledgers.add(_lost(line), b"")
            else:
                await self._until_result(line, line.body)

    def _is_late(self) -> bool:
        if time.monotonic() < self._until:
            return False
        self._complete = False
        return True

    async def _until_result(self, line: Line, body: bytes) -> None:
        tries = breakdowns = 0
        while True:
            try:
                wait, counted = await self._try(line, body, last=tries + 1 >= self._settings.attempts)
            except PrincipalGone as error:
                gone = _without_reply(line, error.error_code, error.message)
                await self._ledgers.add(gone, b"")
                return
            except GatewayError as error:  # a part of ours is away
                await self._until_stored()
                wait, counted = error.retry_after or RETRY_SECONDS, False
            except Exception:
                self._services.log.exception("batch_line_failed", batch=self._batch["id"], line=line.number)
                breakdowns += 1
                if breakdowns >= BREAKDOWNS:
                    broken = _without_reply(line, "internal_error", "The gateway failed to run this line.")
                    await self._ledgers.add(broken, b"")
                    return
                wait, counted = RETRY_SECONDS, False
            if wait is None:
                return
            tries += counted
            backoff = self._settings.backoff * 2 ** min(tries - 1, 10) if counted else 0.0
            seconds = min(max(wait, backoff), LONGEST_WAIT)
            if not counted and self._is_late():
                return
            await asyncio.sleep(seconds * (1 + random.random() / 4))  # noqa: S311 - not all at the same moment

    async def _until_stored(self) -> None:
        """No call is paid for whose result could not be kept."""
        while True:
            try:
                await self._services.database.ping()
            except StoreUnavailable:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    async def _try(self, line: Line, body: bytes, *, last: bool) -> tuple[float | None, bool]:
        """Once. When it is to be tried again, None: it has its result; and whether the upstream had its chance."""
        client = Collected()
        verdict: list[tuple[float | None, bool]] = []

        async def commit(exchange: Exchange, row: bytes) -> None:
            wait, counted = judge(exchange, last=last)
            if wait is None:
                await self._ledgers.add(_result(line, client, exchange), row)
            else:
                # who was refused by a limit of ours before anything was sent has used nothing
                await self._ledgers.add(None, *((row, _owed(line, exchange)) if exchange.attempts else (b"",)))
            verdict.append((wait, counted))

        late = dataclasses.replace(
            self._late,
            body=body,
            content_type="application/json",
            request_id=line_id(self._batch["id"], line.number),
            deadline=self._settings.line_timeout,
        )
        await self._services.run(late, client, commit=commit, charge_abandoned=self._charge)
        if not verdict:
            raise StoreUnavailable  # what came of it could not be stored
        return verdict[0]


def judge(exchange: Exchange, *, last: bool) -> tuple[float | None, bool]:
    """After how many seconds once more; None: this is its result. And whether an upstream was asked."""
    error = exchange.error
    asked = bool(exchange.attempts)
    if exchange.outcome in CUT_OFF:
        return RETRY_SECONDS, False
    if exchange.outcome is Outcome.OK or error is None or error.should_retry is False:
        return None, asked
    if isinstance(error, UpstreamError):
        passing = error.cause in PASSING and not last
    elif asked:
        passing = error.status_code >= 500 and not last
    else:
        passing = isinstance(error, RateLimited) or error.status_code >= 500
    if not passing:
        return None, asked
    return error.retry_after or (0.0 if asked else RETRY_SECONDS), asked


def line_id(batch_id: str, number: int) -> str:
    """The same each time the line runs."""
    return f"batch_req_{batch_id.removeprefix('batch_')[:16]}{number:08x}"


def _owed(line: Line, exchange: Exchange) -> Owed | None:
    kept = exchange.settlement
    return Owed(exchange.id, line.number, json.dumps(kept)) if kept else None


def _result(line: Line, client: Collected, exchange: Exchange) -> Result:
    usage = exchange.usage
    kept = exchange.settlement
    return Result(
        line.number,
        line.custom_id,
        ok=200 <= client.status < 300 and exchange.outcome is Outcome.OK,
        status=client.status,
        body=one_line(client.body),
        settlement=json.dumps(kept) if kept else None,
        tokens=(
            usage.input_tokens or 0,
            usage.cache_read_tokens or 0,
            usage.output_tokens or 0,
            usage.reasoning_tokens or 0,
        ),
    )


def one_line(body: bytes) -> bytes:
    """JSON without line breaks; what isn't JSON, as its text."""
    try:
        return msgspec.json.format(body, indent=-1)
    except (msgspec.DecodeError, RecursionError):
        return msgspec.json.encode(body.decode(errors="replace"))


def _without_reply(line: Line, code: str, message: str) -> Result:
    return Result(line.number, line.custom_id, ok=False, error_code=code, error_message=message)


def _lost(line: Line) -> Result:
    return _without_reply(line, "input_file_lost", "This line is not in the input file any more.")
