"""A job is run: its request goes through the whole pipeline, and what comes of it is stored once.

The result and the request's usage row are committed together, before the ledger settles: whatever dies when, a job that
has a result never runs again, and one that has none does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from gateway import (
    Cause,
    GatewayError,
    LateRequest,
    Outcome,
    PrincipalGone,
    RateLimited,
    StoreUnavailable,
    Tasks,
    UpstreamError,
)
from gateway_plugins.jobs import api
from gateway_plugins.jobs.events import Splitter
from gateway_plugins.jobs.parts import Again
from gateway_plugins.jobs.store import End, Lost, Result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping

    from multidict import CIMultiDict

    from gateway import Exchange
    from gateway.kit import Statements
    from gateway_plugins.jobs.events import Events
    from gateway_plugins.jobs.parts import Shared
    from gateway_plugins.jobs.store import Job, Store

# A later try may mend these.
PASSING = frozenset(
    {
        Cause.CONNECTION, Cause.TIMEOUT, Cause.TRUNCATED, Cause.BAD_REPLY, Cause.RATE_LIMIT, Cause.SERVER_ERROR,
        Cause.CIRCUIT_OPEN, Cause.ABANDONED, Cause.INVALID_OUTPUT,
    }
)  # fmt: skip
KEPT_HEADERS = (
    "content-type", "content-disposition", "x-request-id", "x-xenios-model", "x-xenios-attempts", "x-xenios-rule",
    "x-xenios-simulated", "x-xenios-tries", "x-xenios-removed", "x-generation-id",
)  # fmt: skip
LONGEST_BACKOFF = 3600.0
LONGEST_WAIT = 30.0  # for a place that a limit of ours has not, unless it says when there is one
FLUSH_SECONDS = 0.03
RETRY_SECONDS = 1.0
COMMIT_SECONDS = 60.0
WORKER_LOST = "worker_lost"
LONGEST_LOSS = 60.0  # seconds before another worker is risked
MOST_LOSSES = 10  # workers that die with a job: by then it is the job that kills them


class Ended(NamedTuple):
    """A run that has ended: the job as it stands now, and how."""

    job: Job
    end: End


class Sink:
    """The client that a job's request has: it keeps the reply, and tells the events of a stream as they come."""

    def __init__(self, events: Events, job: Job, *, offset: int = 0) -> None:
        """`offset`: how many events of this run are known without being told here."""
        self._events = events
        self._job = job
        self._offset = offset
        self._tasks = Tasks()
        self._splitter: Splitter | None = None
        self._parts: list[bytes] = []
        self._told = 0  # how many of them
        self._telling = False
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.cut = False

    # --- the pipeline's Client ---

    async def send(self, status: int, headers: CIMultiDict[str], body: bytes, progress: Callable[[], None]) -> None:
        del progress
        self._head(status, headers)
        self._parts = [body]

    async def start(self, status: int, headers: CIMultiDict[str]) -> None:
        self._head(status, headers)
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            self._splitter = Splitter()

    async def write(self, data: bytes) -> None:
        if self._splitter is None:
            self._parts.append(data)
            return
        self.add(changed for event in self._splitter.feed(data) if (changed := self.changed(event)) is not None)

    def add(self, events: Iterable[bytes]) -> None:
        """They are kept, and told."""
        self._parts += events
        if not self._telling and self._told < len(self._parts):
            self._telling = True
            self._tasks.spawn(self._tell(), "jobs: events")

    async def end(self) -> None: ...

    def abort(self) -> None:
        self.cut = True

    # --- for the runner ---

    def changed(self, event: bytes) -> bytes | None:
        """What is kept and told of a stream's event. None: nothing."""
        return event

    def result(self) -> Result | None:
        """What a client would have got so far; None: nothing."""
        return None if self.status is None else Result(self.status, self.headers, b"".join(self._parts))

    async def close(self) -> None:
        await self._tasks.drain(1.0)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = {name: headers[name] for name in KEPT_HEADERS if name in headers}

    async def _tell(self) -> None:
        """What has come, together, and what comes meanwhile. A Redis that is away is told later, or never."""
        try:
            while self._told < len(self._parts):
                events = self._parts[self._told :]
                await self._events.publish(self._job.id, self._job.attempts, self._offset + self._told + 1, events)
                self._told += len(events)
                await asyncio.sleep(FLUSH_SECONDS)
        except StoreUnavailable:
            pass  # the next event tries again
        finally:
            self._telling = False


class Runner:
    """Runs jobs of one kind. Subclasses say what else is made of a stream's events, and what is told at the end."""

    kind = "job"

    def __init__(self, shared: Shared, store: Store) -> None:
        self._config = shared.config
        self._services = shared.services
        self._store = store
        self._events = shared.events
        self._queue = shared.queue
        self._webhooks = shared.webhooks
        self._tasks = Tasks()
        self._running: dict[str, str] = {}

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        beating = self._tasks.spawn(self._keep_saying(), "jobs: running")
        try:
            yield
        finally:
            beating.cancel()
            await self._tasks.drain(0)

    # --- what subclasses change ------------------------------------------------------------------------------------

    async def sink(self, job: Job) -> Sink:
        return Sink(self._events, job)

    async def tell(self, statements: Statements, job: Job) -> None:
        """The job has ended: within the same transaction, messages to whoever wants to know."""
        data = {"id": job.id, "status": job.status, "metadata": msgspec.json.decode(job.metadata or "{}")}
        await self._webhooks.send(statements, job.tenant, f"job.{job.status}", data, target=job.webhook)

    # --- one job ---------------------------------------------------------------------------------------------------

    async def run(self, job_id: str) -> None:
        """The handler. Raises Again."""
        job = await self._store.get(job_id)
        if job is None or job.ended:
            return
        if (early := self._early(job)) is not None:
            await self.close(job, early)
            return
        await self.settle(job)
        try:
            if job.status == "running":
                job = await self._lost(job)
            job, late, sink = await self._begin(job)
        except Lost:
            return
        self._running[job.id] = job.operation or ""
        try:
            await self._through(job, late, sink)
        finally:
            self._running.pop(job.id, None)

    async def _begin(self, job: Job) -> tuple[Job, LateRequest, Sink]:
        """It is running, by us, and who watches it knows. Raises Lost."""
        operation = f"{job.id}-{job.attempts + 1}"
        try:
            begun = await self._store.begin(job, operation)
            await self._events.ring(job.id)
            late = LateRequest.from_json(await self._store.request(job.id))
            return begun, late, await self.sink(begun)
        except asyncio.CancelledError:
            # Others may see it running already, who have it stopped: they are to see how that ended.
            with contextlib.suppress(StoreUnavailable):
                await asyncio.shield(self._end_at_once(job.id, operation))
            raise

    async def _end_at_once(self, job_id: str, operation: str) -> None:
        job = await self._store.get(job_id)
        if job is not None and job.status == "running" and job.operation == operation:
            await self._after(await self._end(job, self._interrupted(job)))

    async def close(self, job: Job, end: End) -> Job | None:
        """A job that is not being run ends. None: it is not as it was read any more."""
        async with self._services.database.transaction() as statements:
            closed = await self._store.close(statements, job, end, ttl=self._ttl(end))
            if closed is not None:
                await self.tell(statements, closed)
        if closed is not None:
            self._queue.tell(closed.status)
            await self._webhooks.wake()
            await self._events.ring(job.id)
        return closed

    def _early(self, job: Job) -> End | None:
        """Why it ends without being run. Raises Again if it is not due yet."""
        now = api.now()
        if job.run_after is not None and job.run_after > now:
            raise Again((job.run_after - now) / 1000)
        if job.cancel_asked is not None:
            return End(status="cancelled")
        if job.run_before is not None and job.run_before < now:
            return End(status="failed", code="run_before_passed", message="It could not be run in time.")
        if job.status == "running" and job.losses + 1 >= MOST_LOSSES:
            message = f"{MOST_LOSSES} worker processes died while they ran it. Look into their logs before a retry."
            return End(status="failed", code=WORKER_LOST, message=message)
        return None

    async def _lost(self, job: Job) -> Job:
        """Whoever ran it died. Once is chance: it runs again now; then after a while, so that others come first whose
        worker it may have killed. Raises Again, Lost.
        """
        backoff = self._queue.settings_of(job.queue).backoff
        after = min(backoff * 2 ** (job.losses - 1), LONGEST_LOSS) if job.losses else 0.0
        message = f"The worker process that ran it died; that makes {job.losses + 1} of {MOST_LOSSES} that it may lose."
        job = await self._store.lose(job, code=WORKER_LOST, message=message, after=after)
        if after:
            raise Again(after)
        return job

    async def _through(self, job: Job, late: LateRequest, sink: Sink) -> None:
        """The pipeline, and what comes of it."""
        ended: list[Ended] = []
        over = False

        async def commit(exchange: Exchange, row: bytes) -> None:
            nonlocal over
            over = True
            ended.extend(await self._end(job, self._judged(job, sink, exchange), row))

        try:
            await self._services.run(
                late,
                sink,
                operation_id=job.operation,
                commit=commit,
                charge_abandoned=self._config.charge_abandoned,
            )
        except PrincipalGone as error:
            ended.extend(await self._end(job, End(status="failed", code=error.error_code, message=error.message)))
        except asyncio.CancelledError:
            if not over and (end := self._interrupted(job)) is not None:
                ended.extend(await asyncio.shield(self._end(job, end)))
            raise
        except GatewayError as error:
            if over:  # nothing could be stored: it runs again
                raise Again(RETRY_SECONDS) from error
            ended.extend(await self._end(job, self._later(job, error, counts=False)))
        finally:
            await asyncio.shield(self._after(ended, sink))
        for _, end in ended:
            if end.status == "queued":
                raise Again(end.after)

    async def _end(self, job: Job, end: End | None, row: bytes = b"") -> list[Ended]:
        """Result, usage row and message in one transaction; none of it but the row if somebody else has the job."""
        deadline = time.monotonic() + COMMIT_SECONDS
        while True:
            try:
                async with self._services.database.transaction() as statements:
                    await self._services.rows.write(statements, row)
                    if end is None:
                        return []
                    ended = await self._store.end(statements, job, end, ttl=self._ttl(end))
                    if ended.ended:
                        await self.tell(statements, ended)
            except Lost:
                end = None
            except StoreUnavailable:
                # what the upstream answered has been paid for
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
            else:
                if ended.ended:
                    self._queue.tell(ended.status)
                await self._webhooks.wake()  # by the task that told
                return [Ended(ended, end)]

    async def _after(self, ended: list[Ended], sink: Sink | None = None) -> None:
        if sink is not None:
            await sink.close()
        for job, _ in ended:
            if job.ended and job.stream:
                await self._events.forget(job.id, job.attempts)
            await self._events.ring(job.id)
            if job.settlement is None or await self._services.ledger.flush():  # else it is needed yet
                with contextlib.suppress(StoreUnavailable):
                    await self._store.settled(job.id, job.operation)

    # --- how it ended ----------------------------------------------------------------------------------------------

    def _judged(self, job: Job, sink: Sink, exchange: Exchange) -> End | None:
        """None: the job is somebody else's."""
        error, outcome = exchange.error, exchange.outcome
        settlement = msgspec.json.encode(exchange.settlement).decode() if exchange.settlement else None
        found: End | None
        if outcome is Outcome.OK:
            found = End(status="succeeded", result=sink.result())
        elif outcome in {Outcome.CLIENT_DISCONNECT, Outcome.SHUTDOWN} and error is None:
            found = self._interrupted(job)
        elif error is not None and _is_passing(error):
            found = self._later(job, error, counts=bool(exchange.attempts), result=sink.result())
        else:
            found = _failed(error, sink.result())
        if found is None:
            return None
        return msgspec.structs.replace(found, micro_usd=exchange.cost.micro_usd, settlement=settlement)

    def _interrupted(self, job: Job) -> End | None:
        match self._queue.why():
            case "stop":
                return End(status="cancelled")
            case "lost":
                return None
            case "timeout":
                error = GatewayError("The job took longer than its queue allows.", code="deadline_exceeded")
                return self._later(job, error, counts=True)
            case _:
                return End(status="queued", counts=False)

    def _later(self, job: Job, error: GatewayError, *, counts: bool, result: Result | None = None) -> End:
        """Once more after a while; or it has failed, if that was the last time."""
        if counts and job.attempts >= job.max_attempts:
            return _failed(error, result)
        queue = self._queue.settings_of(job.queue)
        tries = max(1, queue.attempts - (job.max_attempts - job.attempts))  # those that counted
        longest = LONGEST_BACKOFF if counts else LONGEST_WAIT
        backoff = min(queue.backoff * 2 ** min((tries if counts else job.attempts) - 1, 20), longest)
        after = min(max(backoff, error.retry_after or 0.0), LONGEST_BACKOFF)
        return End(status="queued", code=error.error_code, message=error.message, after=after, counts=counts)

    def _ttl(self, end: End) -> float:
        return self._config.failure_ttl if end.status == "failed" else self._config.result_ttl

    # --- beside them -----------------------------------------------------------------------------------------------

    async def settle(self, job: Job) -> None:
        """A run before this one ended, and its worker died before the ledger knew. Raises StoreUnavailable."""
        if job.settlement is not None:
            self._services.settle_late(msgspec.json.decode(job.settlement))
            if not await self._services.ledger.flush():
                raise StoreUnavailable

    async def _keep_saying(self) -> None:
        """Which jobs are running here: nobody else takes those for lost."""
        while True:
            await asyncio.sleep(self._config.worker.lease / 4)
            if self._running:
                with contextlib.suppress(StoreUnavailable):
                    await self._store.seen(dict(self._running))


def _is_passing(error: GatewayError) -> bool:
    """A later try may mend it."""
    if error.should_retry is False:
        return False
    if isinstance(error, UpstreamError):
        return error.cause in PASSING
    # refused by a limit of ours before anything was sent; or a part of the gateway is away
    return isinstance(error, RateLimited) or error.status_code >= 500


def _failed(error: GatewayError | None, result: Result | None) -> End:
    return End(
        status="failed",
        result=result,
        code=error.error_code if error else "internal_error",
        message=error.message if error else "It ended without an answer.",
    )
