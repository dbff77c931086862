"""/v1/jobs: what became of one's jobs. Another tenant's are not there; an administrator names whose by `tenant`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway import BadRequest, Conflict, Forbidden, NotFound, Reply
from gateway.kit import limit_of, query_of
from gateway_plugins.jobs import api, shown
from gateway_plugins.jobs.jobs import Options, check_key, idempotency_key

if TYPE_CHECKING:
    from gateway import Exchange, Router
    from gateway_plugins.jobs.jobs import Jobs
    from gateway_plugins.jobs.parts import Shared
    from gateway_plugins.jobs.store import Job

MOST = 100
MOST_METADATA = 16
LATEST = 30 * 86400
STATUSES = ("queued", "running", "succeeded", "failed", "cancelled")
LONGEST_NUMBER = 15  # digits

Plain = Annotated[str, Field(min_length=1, max_length=64)]


class NewJob(BaseModel):
    """The body of POST /v1/jobs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str = Field(max_length=100)
    body: dict[str, Any]
    queue: str | None = Field(None, max_length=40)
    priority: Literal["high", "normal", "low"] | None = None
    webhook: str | None = Field(None, max_length=2000)
    metadata: dict[Plain, Annotated[str, Field(max_length=512)]] | None = Field(None, max_length=MOST_METADATA)
    delay: float | None = Field(None, ge=0, le=LATEST)  # seconds
    run_before: int | None = Field(None, gt=0, lt=1 << 40)  # seconds since 1970
    idempotency_key: str | None = None


class Routes:
    """The routes."""

    def __init__(self, jobs: Jobs, shared: Shared) -> None:
        self._jobs = jobs
        self._shared = shared

    def register(self, router: Router) -> None:
        most = self._shared.config.max_body + (64 << 10)
        about = "A request that is answered later: {endpoint, body, queue, priority, webhook, metadata, delay, …}."
        router.add("POST", "/v1/jobs", self.create, max_body=most, summary=about)
        router.add("GET", "/v1/jobs", self.page, summary="Your jobs. Query: status, queue, task, after, limit.")
        router.add("GET", "/v1/jobs/{id}", self.show, summary="One job.")
        router.add("GET", "/v1/jobs/{id}/result", self.result, summary="What its request was answered.")
        router.add(
            "GET",
            "/v1/jobs/{id}/stream",
            self.stream,
            summary="Its events, live and from the beginning, or `after` the one of this number.",
            produces="text/event-stream",
        )
        router.add("POST", "/v1/jobs/{id}/cancel", self.cancel, body="none", summary="Stop it. Once is enough.")
        router.add("DELETE", "/v1/jobs/{id}", self.delete, summary="Forget one that is not running, and its result.")

    async def create(self, exchange: Exchange) -> Reply:
        wanted = _parsed(exchange.body)
        exchange.set(self._jobs.options, self._options(exchange, wanted))
        if wanted.endpoint not in self._endpoints(exchange):
            known = ", ".join(self._endpoints(exchange))
            raise BadRequest(f"`endpoint` is one of {known}.", param="endpoint")
        return await self._shared.services.submit(exchange, wanted.endpoint, wanted.body, phase="accept")

    async def page(self, exchange: Exchange) -> Reply:
        given = query_of(exchange, ("status", "queue", "task", "after", "limit", "tenant"))
        tenant = whose(exchange, given)
        if given.get("status", "queued") not in STATUSES:
            raise BadRequest(f"`status` is one of {', '.join(STATUSES)}.", param="status")
        equal: dict[str, str] = {name: given[name] for name in ("status", "queue", "task") if name in given}
        try:
            jobs, more = await self._jobs.store.listed(
                tenant, equal, limit_of(given, default=20, most=MOST), given.get("after")
            )
        except KeyError:
            raise BadRequest("`after` names no job of yours.", param="after") from None
        data = [shown.job(job) for job in jobs]
        return Reply(200, data=api.listed(data, more=more))

    async def show(self, exchange: Exchange) -> Reply:
        job = await self._job(exchange)
        headers = {} if job.ended else {"Retry-After": "1"}
        return Reply(200, data=await self._jobs.seen(job), headers=headers)

    async def result(self, exchange: Exchange) -> Reply:
        job = await self._job(exchange)
        if not job.ended:
            raise Conflict(f"The job is {job.status}: it has no result yet.", code="job_not_finished", retry_after=1)
        result = await self._jobs.store.result(job.id) if job.status != "cancelled" else None
        if result is None:
            raise Conflict(
                f"The job has no result: {job.error_message or f'it was {job.status}'}",
                code=job.error_code or f"job_{job.status}",
                should_retry=False,
            )
        return Reply(result.status, result.body, {**result.headers, "x-xenios-job": job.id})

    async def stream(self, exchange: Exchange) -> Reply:
        given = query_of(exchange, ("after", "tenant"))
        job = await self._job(exchange, given)
        name = "after" if "after" in given else "Last-Event-ID"
        after = _number(given.get("after") or exchange.request.header("Last-Event-ID") or "0", name)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "x-xenios-job": job.id}
        return Reply(200, chunks=self._jobs.follow(job, after), headers=headers)

    async def cancel(self, exchange: Exchange) -> Reply:
        return Reply(200, data=shown.job(await self._jobs.cancel(await self._job(exchange))))

    async def delete(self, exchange: Exchange) -> Reply:
        job = await self._job(exchange)
        if not await self._jobs.delete(job):
            raise Conflict("The job is running: cancel it first.", code="job_running")
        return Reply(200, data={"id": job.id, "object": "job", "deleted": True})

    # --- what is asked ---------------------------------------------------------------------------------------------

    async def _job(self, exchange: Exchange, given: dict[str, str] | None = None) -> Job:
        """Raises NotFound: also of another tenant's."""
        job_id = exchange.request.path_params["id"]
        tenant = whose(exchange, query_of(exchange, ("tenant",)) if given is None else given)
        job = await self._jobs.store.get(job_id, tenant) if len(job_id) <= 100 else None
        if job is None:
            raise NotFound(f"There is no job {job_id[:100]!r}. One that has ended is forgotten after a while.")
        return job

    def _options(self, exchange: Exchange, wanted: NewJob) -> Options:
        queues = self._jobs.queues
        if wanted.queue is not None and wanted.queue not in queues:
            raise BadRequest(f"There is no queue {wanted.queue!r}; there are {', '.join(queues)}.", param="queue")
        if wanted.webhook is not None:
            self._shared.webhooks.check(wanted.webhook)
        at = api.now()
        run_after = None if wanted.delay is None else at + int(wanted.delay * 1000)
        run_before = None if wanted.run_before is None else wanted.run_before * 1000
        if run_before is not None and not (run_after or at) < run_before <= at + LATEST * 2000:
            message = (
                f"`run_before` is seconds since 1970, after now ({int(time.time())}) and `delay`, by 60 days at most."
            )
            raise BadRequest(message, param="run_before")
        given = idempotency_key(exchange)
        if wanted.idempotency_key is not None:
            check_key(wanted.idempotency_key, "idempotency_key")
        if given is not None and wanted.idempotency_key not in {None, given}:
            raise BadRequest("`idempotency_key` and the header differ.", param="idempotency_key")
        return Options(
            queue=wanted.queue,
            priority=wanted.priority,
            webhook=wanted.webhook,
            metadata=wanted.metadata,
            run_after=run_after,
            run_before=run_before,
            idempotency_key=wanted.idempotency_key or given,
        )

    @staticmethod
    def _endpoints(exchange: Exchange) -> list[str]:
        return sorted({route.endpoint for route in exchange.snapshot.routes.routes if route.proxied})


def _parsed(body: dict[str, Any]) -> NewJob:
    """Raises BadRequest that names the field."""
    try:
        return NewJob.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(step) for step in first["loc"])[:100]
        unknown = first["type"] == "extra_forbidden"
        message = f"There is no field {field!r} here." if unknown else f"{field}: {first['msg']}"
        raise BadRequest(message, param=field) from None


def whose(exchange: Exchange, given: dict[str, str]) -> str | None:
    """Whose jobs are meant; None: all tenants'. Raises Forbidden."""
    own, asked = api.tenant_of(exchange), given.get("tenant")
    if asked is None or asked == own:
        return own
    if not api.is_admin(exchange):
        raise Forbidden("Only an administrator may name another tenant.", param="tenant")
    return None if asked == "*" else asked


def _number(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > LONGEST_NUMBER:
        raise BadRequest(f"`{name}` is the `id` of an event, a whole number.", param=name)
    return int(text)
