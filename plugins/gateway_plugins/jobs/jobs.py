"""Single jobs: a request that is taken now and answered later.

It is taken by a header (`Prefer: respond-async`), by POST /v1/jobs, by a rule (`offload: true`) or for its size. Before
that it passes the whole admission, as any request does; then a worker runs it as whoever asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import (
    BadRequest,
    Conflict,
    ContextKey,
    LateRequest,
    NotFound,
    RateLimited,
    Reply,
    StatementError,
    StoreUnavailable,
    TooLarge,
)
from gateway.kit import input_estimate
from gateway_plugins.jobs import api, shown, store
from gateway_plugins.jobs.follow import Follower
from gateway_plugins.jobs.queue import DEFAULT
from gateway_plugins.jobs.runner import Runner
from gateway_plugins.jobs.store import ENDED, End, Job, Store
from gateway_plugins.jobs.tidying import Tidier, put

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from gateway import Exchange, Router
    from gateway_plugins.jobs.parts import Handler, Shared
    from gateway_plugins.jobs.settings import Queue

LONGEST_KEY = 255
LONGEST_WAIT = 300.0
LOOK_SECONDS = 2.0
CANCEL_SECONDS = 2.0
# No blanks before the name: tried from each of thousands of them, they take a second.
_PREFERENCE = re.compile(r'([!#$%&\'*+.^_`|~0-9A-Za-z-]+)\s*(?:=\s*("[^"]*"|[^\s;,"]*))?[^,]*')


@dataclass(frozen=True)
class Options:
    """What POST /v1/jobs says of a job beside its request. Times are milliseconds since 1970."""

    queue: str | None = None
    priority: str | None = None
    webhook: str | None = None
    metadata: Mapping[str, Any] | None = None
    run_after: int | None = None
    run_before: int | None = None
    idempotency_key: str | None = None


class Jobs:
    """The part. Its subclass makes something else of the same: what is taken, run, and told to whoever follows."""

    kind = "job"
    id_prefix, id_bytes = "job_", 12
    runs: type[Runner] = Runner
    follows: type[Follower] = Follower

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._config = shared.config
        # not those that other parts have for themselves
        self.queues: Mapping[str, Queue] = {DEFAULT: shared.queue.queues[DEFAULT], **shared.config.queues}
        self.store = Store(shared.services, self.kind)
        self.runner = self.runs(shared, self.store)
        self.follower = self.follows(self.store, shared.events)
        self._tidier = Tidier(shared, self.store, self.kind, self.runner.close)
        self.options: ContextKey[Options] = ContextKey("jobs.options")
        self.handlers: Mapping[str, Handler] = {self.kind: self.runner.run}

    def lifespan(self) -> contextlib.AbstractAsyncContextManager[None]:
        return self.runner.lifespan()

    def register_routes(self, router: Router) -> None:
        from gateway_plugins.jobs.routes import Routes  # noqa: PLC0415 - a server's business

        Routes(self, self._shared).register(router)

    async def tidy(self) -> None:
        await self._tidier.tidy()

    # --- taken -----------------------------------------------------------------------------------------------------

    async def prepare(self, exchange: Exchange) -> None:
        """Whether the request becomes a job."""
        if exchange.phase != "live":
            return
        most = self._config.offload.above_input_tokens
        if "respond-async" in preferences(exchange) or (most is not None and input_estimate(exchange) > most):
            exchange.phase = "accept"

    async def accept(self, exchange: Exchange) -> Reply | None:
        """Admitted: it becomes a job. The client is told so, or within the time that it said it would wait, the end."""
        asked = preferences(exchange)
        parent = exchange.parent
        options = (parent.get(self.options) if parent else None) or Options(idempotency_key=idempotency_key(exchange))
        job, is_new = await self._take(exchange, options)
        if (seconds := _wait(asked)) is not None:
            job = await self.until_ended(job, seconds) or job
            result = await self.store.result(job.id) if job.ended else None
            if result is not None:
                headers = {**result.headers, "Preference-Applied": f"wait={seconds:g}", "x-xenios-job": job.id}
                return Reply(result.status, result.body, headers)
        headers = {"Location": f"/v1/jobs/{job.id}", "x-xenios-job": job.id}
        if "respond-async" in asked:
            headers["Preference-Applied"] = "respond-async"
        if not is_new:
            headers["Idempotent-Replayed"] = "true"
        return Reply(200 if job.ended else 202, data=await self.seen(job), headers=headers)

    async def _take(self, exchange: Exchange, options: Options) -> tuple[Job, bool]:
        """(the job, is it a new one). Raises TooLarge, RateLimited, Conflict, StoreUnavailable."""
        if len(exchange.raw_body) > self._config.max_body:
            raise TooLarge(f"A request that becomes a job may have {self._config.max_body} bytes.")
        job, late = self._made(exchange, options)
        try:
            await self.store.add(job, late.to_json(), most_waiting=self._config.max_waiting)
        except store.TooManyWaiting:
            if job.idempotency_key is not None and await self.store.by_key(job.tenant, job.idempotency_key):
                return await self._same(job), False
            most = self._config.max_waiting
            message = f"{most} of your jobs are waiting; there may not be more."
            raise RateLimited(message, code="too_many_jobs", retry_after=10) from None
        except StatementError as error:
            if not error.conflict or job.idempotency_key is None:
                raise
            return await self._same(job), False
        after = 0.0 if job.run_after is None else max(0.0, job.run_after / 1000 - time.time())
        await put(self._shared, self.kind, job, after=after)
        return job, True

    def _made(self, exchange: Exchange, options: Options) -> tuple[Job, LateRequest]:
        principal, decision = exchange.principal, exchange.decision
        if principal is None:
            raise RuntimeError("A request was admitted that is nobody's.")
        task = decision.task if decision else None
        name = options.queue or self.queue_for(task, exchange.endpoint)
        queue = self.queues[name]
        at = api.now()
        late = replace(LateRequest.of(exchange), deadline=queue.timeout)
        job = Job(
            id=store.new_id(self.id_prefix, self.id_bytes),
            kind=self.kind,
            tenant=principal.tenant,
            principal=principal.reference,
            endpoint=exchange.endpoint,
            queue=name,
            priority=options.priority or queue.priority,
            status="queued",
            task=task,
            model=exchange.asked_model or None,
            stream=int(exchange.stream),
            metadata=None if options.metadata is None else msgspec.json.encode(options.metadata).decode(),
            webhook=options.webhook,
            idempotency_key=options.idempotency_key,
            fingerprint=_fingerprint(self.kind, exchange, options) if options.idempotency_key is not None else None,
            created_at=at,
            attempts=0,
            max_attempts=queue.attempts,
            run_after=options.run_after,
            run_before=options.run_before or (options.run_after or at) + int(self._config.run_within * 1000),
            request_id=exchange.request_id,
        )
        return job, late

    async def _same(self, job: Job) -> Job:
        """The job that was taken with this idempotency key before. Raises Conflict if that was another request."""
        before = await self.store.by_key(job.tenant, job.idempotency_key or "")
        if before is None:
            raise StoreUnavailable  # deleted just now: the client may try again
        if before.fingerprint != job.fingerprint:
            raise Conflict(
                f"This idempotency key was used for another request, which is job {before.id}. Use a new one.",
                code="idempotency_key_reused",
                should_retry=False,
            )
        return before

    def queue_for(self, task: str | None, endpoint: str) -> str:
        """Where a job goes that names no queue: by its task, else by its endpoint."""
        queues = self.queues
        by_task = next((name for name, queue in queues.items() if task in queue.tasks), None)
        return by_task or next((name for name, queue in queues.items() if endpoint in queue.endpoints), DEFAULT)

    # --- what becomes of it ------------------------------------------------------------------------------------------

    async def seen(self, job: Job) -> dict[str, Any]:
        """The job object, with its place in the queue."""
        position = None
        if job.status == "queued":
            with contextlib.suppress(StoreUnavailable):
                position = await self._shared.queue.position(self.kind, job.id, job.queue)
        return shown.job(job, position)

    async def until_ended(self, job: Job, seconds: float) -> Job | None:
        """As it stands when it has ended, or after so long."""
        end = time.monotonic() + seconds
        known: Job | None = job
        async with self._shared.events.watch(job.id) as bell:
            while known is not None and (left := end - time.monotonic()) > 0:
                known = await self.store.get(job.id)
                if known is None or known.ended:
                    break
                await bell.wait(min(left, LOOK_SECONDS))
        return known

    async def cancel(self, job: Job) -> Job:
        """Taken out of the queue, or stopped where it runs. Raises StoreUnavailable, NotFound."""
        while not job.ended:
            if job.status == "queued":
                closed = await self.runner.close(job, End(status="cancelled"))
                if closed is not None:
                    await self._drop(closed)
                    return closed
            else:
                await self.store.ask_cancel(job.id)
                await self._drop(job)
                return await self.until_ended(job, CANCEL_SECONDS) or job
            found = await self.store.get(job.id)
            if found is None:
                raise NotFound("It was deleted just now.")
            job = found
        return job

    async def delete(self, job: Job) -> bool:
        """False: it is running. Raises StoreUnavailable."""
        await self.runner.settle(job)
        if not await self.store.delete(job.id):
            return False
        if job.status not in ENDED:
            await self._drop(job)
        await self._shared.events.forget(job.id, job.attempts)
        return True

    async def _drop(self, job: Job) -> None:
        with contextlib.suppress(StoreUnavailable):  # `tidy` does it later
            await self._shared.queue.drop(self.kind, job.id)

    def follow(self, job: Job, after: int) -> AsyncIterator[bytes]:
        return self.follower.follow(job.id, after)


def preferences(exchange: Exchange) -> dict[str, str]:
    """What the client prefers, by RFC 7240: the first of each name counts."""
    out: dict[str, str] = {}
    for header in exchange.request.getall("Prefer"):
        for found in _PREFERENCE.finditer(header):
            out.setdefault(found[1].lower(), (found[2] or "").strip('"'))
    return out


def _wait(asked: Mapping[str, str]) -> float | None:
    seconds = asked.get("wait", "")
    if not seconds.isascii() or not seconds.isdigit() or len(seconds) > 6:
        return None
    return min(float(seconds), LONGEST_WAIT)


def idempotency_key(exchange: Exchange) -> str | None:
    """The header's. Raises BadRequest."""
    key = exchange.request.header("Idempotency-Key")
    if key is not None:
        check_key(key, "Idempotency-Key")
    return key


def check_key(key: str, param: str) -> None:
    """Raises BadRequest. What the database can't tell apart, such as bytes that are no UTF-8, is no key."""
    if not 1 <= len(key) <= LONGEST_KEY or not key.isprintable():
        raise BadRequest(f"{param} has 1 to {LONGEST_KEY} printable characters.", param=param)


def _fingerprint(kind: str, exchange: Exchange, options: Options) -> str:
    """The same for the same request: however its JSON is written, whatever a form's boundary is."""
    form = exchange.form
    files = [] if form is None else [(f.name, f.filename, hashlib.sha256(f.content).hexdigest()) for f in form.files]
    wanted = (options.queue, options.priority, options.webhook, options.metadata)
    said = (kind, exchange.endpoint, exchange.body, files, wanted)
    return hashlib.sha256(msgspec.json.encode(said, order="sorted")).hexdigest()
