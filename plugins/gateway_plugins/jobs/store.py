"""Jobs in the database: what is known of each, and how it comes from one state into the next.

Whoever runs a job holds it by the name of its run (`operation`): what ends it is written only while that stands there,
so that a worker which was given up for dead can't overwrite what another one made of it.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from gateway_plugins.jobs import api

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.kit import Database, Row, Statements

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ENDED = frozenset({"succeeded", "failed", "cancelled"})
AT_ONCE = 500


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a job, but for its request and its result. Times are milliseconds since 1970."""

    id: str
    kind: str
    tenant: str
    principal: str
    endpoint: str
    queue: str
    priority: str
    status: Status
    stream: int
    created_at: int
    attempts: int
    max_attempts: int
    losses: int = 0  # runs whose worker was lost; they count as no attempts
    task: str | None = None
    model: str | None = None
    metadata: str | None = None  # JSON
    webhook: str | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    run_after: int | None = None
    run_before: int | None = None
    started_at: int | None = None
    finished_at: int | None = None
    expires_at: int | None = None
    seen_at: int | None = None
    operation: str | None = None
    request_id: str | None = None
    result_status: int | None = None
    result_headers: str | None = None  # JSON
    error_code: str | None = None
    error_message: str | None = None
    cost_micro_usd: int | None = None
    cancel_asked: int | None = None
    settlement: str | None = None  # JSON

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class Result(msgspec.Struct, frozen=True):
    """The reply that a client would have got."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "application/json")

    @property
    def is_stream(self) -> bool:
        return self.content_type.startswith("text/event-stream")


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended: with a last state, or back in the queue."""

    status: Status
    result: Result | None = None
    code: str | None = None
    message: str | None = None
    micro_usd: int | None = None  # of this run
    settlement: str | None = None
    after: float = 0.0  # queued: in so many seconds
    counts: bool = True  # queued: as one of its attempts


class TooManyWaiting(Exception):
    """The tenant has as many jobs waiting as it may."""


class Lost(Exception):
    """Somebody else has this job now, or it has ended: nothing was written."""


_COLUMNS = ", ".join(Job.__struct_fields__)
_SELECT = f"SELECT {_COLUMNS} FROM jobs_jobs"  # noqa: S608 - our own names
_INSERT = (
    f"INSERT INTO jobs_jobs ({_COLUMNS}, request) "  # noqa: S608 - our own names
    f"VALUES ({', '.join(f'${i}' for i in range(1, len(Job.__struct_fields__) + 2))})"
)


def new_id(prefix: str = "job_", size: int = 12) -> str:
    return prefix + secrets.token_hex(size)


class Holder(Protocol):
    """Has a database, perhaps not yet."""

    @property
    def database(self) -> Database: ...


class Store:
    """The table. `kind` tells jobs and background responses apart. All raise StoreUnavailable."""

    def __init__(self, services: Holder, kind: str = "job") -> None:
        self._services = services
        self._kind = kind

    @property
    def _database(self) -> Database:
        return self._services.database

    # --- asking ----------------------------------------------------------------------------------------------------

    async def get(self, job_id: str, tenant: str | None = None) -> Job | None:
        """`tenant`: only if it is theirs."""
        row = await self._database.fetch_one(
            f"{_SELECT} WHERE id = $1 AND kind = $2{'' if tenant is None else ' AND tenant = $3'}",
            *([job_id, self._kind] if tenant is None else [job_id, self._kind, tenant]),
        )
        return None if row is None else _job(row)

    async def by_key(self, tenant: str, idempotency_key: str) -> Job | None:
        row = await self._database.fetch_one(
            f"{_SELECT} WHERE tenant = $1 AND idempotency_key = $2", tenant, idempotency_key
        )
        return None if row is None else _job(row)

    async def request(self, job_id: str) -> bytes:
        """The LateRequest, as JSON; b"" if there is no such job."""
        row = await self._database.fetch_one("SELECT request FROM jobs_jobs WHERE id = $1", job_id)
        return b"" if row is None else bytes(row["request"])

    async def result(self, job_id: str) -> Result | None:
        row = await self._database.fetch_one(
            "SELECT result_status, result_headers, result FROM jobs_jobs WHERE id = $1", job_id
        )
        if row is None or row["result_status"] is None:
            return None
        return Result(row["result_status"], msgspec.json.decode(row["result_headers"] or "{}"), bytes(row["result"]))

    async def listed(
        self, tenant: str | None, equal: Mapping[str, str], limit: int, after: str | None = None
    ) -> tuple[list[Job], bool]:
        """(jobs, newest first; are there more). `equal`: status, queue, task. `after`: the last job of the page before.

        Raises KeyError if there is no such job (any more).
        """
        where = ["kind = $1"]
        values: list[str | int] = [self._kind]
        for name, value in {**({} if tenant is None else {"tenant": tenant}), **equal}.items():
            values.append(value)
            where.append(f"{name} = ${len(values)}")
        if after is not None:
            last = await self.get(after, tenant)
            if last is None:
                raise KeyError(after)
            values += [last.created_at, last.id]
            where.append(f"(created_at, id) < (${len(values) - 1}, ${len(values)})")
        rows = await self._database.fetch(
            f"{_SELECT} WHERE {' AND '.join(where)} ORDER BY created_at DESC, id DESC LIMIT {limit + 1}", *values
        )
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    # --- taken -----------------------------------------------------------------------------------------------------

    async def add(self, job: Job, request: bytes, *, most_waiting: int) -> None:
        """Raises TooManyWaiting; StatementError with `conflict` if the tenant used the idempotency key before."""
        async with self._database.transaction() as statements:
            row = await statements.fetch_one(
                "SELECT count(*) AS waiting FROM jobs_jobs WHERE tenant = $1 AND status = 'queued'", job.tenant
            )
            if row is not None and row["waiting"] >= most_waiting:
                raise TooManyWaiting
            await statements.execute(_INSERT, *msgspec.structs.astuple(job), request)

    # --- run -------------------------------------------------------------------------------------------------------

    async def begin(self, job: Job, operation: str) -> Job:
        """It is running, by us. `job` is as it was read. Raises Lost."""
        async with self._database.transaction() as statements:
            row = await statements.fetch_one(
                "UPDATE jobs_jobs SET status = 'running', attempts = attempts + 1, operation = $2, "  # noqa: S608
                "started_at = $3, seen_at = $3, settlement = NULL "
                f"WHERE id = $1 AND status IN ('queued', 'running') AND attempts = $4 RETURNING {_COLUMNS}",
                job.id, operation, api.now(), job.attempts,
            )  # fmt: skip
        if row is None:
            raise Lost
        return _job(row)

    async def lose(self, job: Job, *, code: str, message: str, after: float) -> Job:
        """The worker that ran it is gone: it waits again, for so many seconds. `job` is as it was read. Raises Lost."""
        async with self._database.transaction() as statements:
            row = await statements.fetch_one(
                "UPDATE jobs_jobs SET status = 'queued', losses = losses + 1, max_attempts = max_attempts + 1, "  # noqa: S608
                "error_code = $3, error_message = $4, run_after = $5 "
                f"WHERE id = $1 AND status = 'running' AND attempts = $2 RETURNING {_COLUMNS}",
                job.id, job.attempts, code, message, api.now() + int(after * 1000),
            )  # fmt: skip
        if row is None:
            raise Lost
        return _job(row)

    async def end(self, statements: Statements, job: Job, end: End, *, ttl: float) -> Job:
        """Within a transaction: what became of the run. `ttl` seconds from now it may be forgotten. Raises Lost."""
        done, at = end.status != "queued", api.now()
        row = await statements.fetch_one(
            "UPDATE jobs_jobs SET status = $3, finished_at = $4, expires_at = $5, run_after = $6, "  # noqa: S608
            "max_attempts = $7, result_status = $8, result_headers = $9, result = $10, error_code = $11, "
            "error_message = $12, settlement = $13, cost_micro_usd = CASE WHEN CAST($14 AS BIGINT) IS NULL "
            "THEN cost_micro_usd ELSE coalesce(cost_micro_usd, 0) + $14 END "
            f"WHERE id = $1 AND operation = $2 AND status = 'running' RETURNING {_COLUMNS}",
            job.id, job.operation, end.status,
            at if done else None, at + int(ttl * 1000) if done else None,
            job.run_after if done else at + int(end.after * 1000),
            job.max_attempts if done or end.counts else job.max_attempts + 1,
            *_stored(end.result),
            end.code, end.message, end.settlement, end.micro_usd,
        )  # fmt: skip
        if row is None:
            raise Lost
        return _job(row)

    async def settled(self, job_id: str, operation: str | None) -> None:
        """The ledger has what the run cost."""
        await self._database.execute(
            "UPDATE jobs_jobs SET settlement = NULL WHERE id = $1 AND operation = $2", job_id, operation
        )

    async def seen(self, running: Mapping[str, str]) -> None:
        """These (id: operation) are being run now."""
        at = api.now()
        await self._database.execute_many(
            "UPDATE jobs_jobs SET seen_at = $3 WHERE id = $1 AND operation = $2 AND status = 'running'",
            [(job_id, operation, at) for job_id, operation in running.items()],
        )

    # --- from outside ----------------------------------------------------------------------------------------------

    async def close(self, statements: Statements, job: Job, end: End, *, ttl: float) -> Job | None:
        """Within a transaction: one that nobody runs ends. None: it is not as `job` says any more."""
        at = api.now()
        row = await statements.fetch_one(
            "UPDATE jobs_jobs SET status = $2, finished_at = $3, expires_at = $4, error_code = $5, "  # noqa: S608
            "error_message = $6, result_status = $9, result_headers = $10, result = $11 "
            f"WHERE id = $1 AND status = $7 AND attempts = $8 RETURNING {_COLUMNS}",
            job.id, end.status, at, at + int(ttl * 1000), end.code, end.message, job.status, job.attempts,
            *_stored(end.result),
        )  # fmt: skip
        return None if row is None else _job(row)

    async def ask_cancel(self, job_id: str) -> None:
        """Whoever runs it, or next looks at it, ends it."""
        await self._database.execute(
            "UPDATE jobs_jobs SET cancel_asked = coalesce(cancel_asked, $2) "
            "WHERE id = $1 AND status IN ('queued', 'running')",
            job_id, api.now(),
        )  # fmt: skip

    async def retry(self, job_id: str, *, attempts: int, run_within: float) -> bool:
        """One that failed or was cancelled waits again, with so many attempts more."""
        at = api.now()
        changed = await self._database.execute(
            "UPDATE jobs_jobs SET status = 'queued', max_attempts = attempts + $2, losses = 0, run_after = $3, "
            "run_before = $4, "
            "finished_at = NULL, expires_at = NULL, cancel_asked = NULL, error_code = NULL, error_message = NULL, "
            "result_status = NULL, result_headers = NULL, result = NULL "
            "WHERE id = $1 AND kind = $5 AND status IN ('failed', 'cancelled')",
            job_id, attempts, at, at + int(run_within * 1000), self._kind,
        )  # fmt: skip
        return changed > 0

    async def delete(self, job_id: str) -> bool:
        """False: it is running, or is not there."""
        return bool(await self._database.execute("DELETE FROM jobs_jobs WHERE id = $1 AND status <> 'running'", job_id))

    # --- tidying ---------------------------------------------------------------------------------------------------

    async def prune(self) -> int:
        """How many were forgotten, AT_ONCE at most."""
        return await self._database.execute(
            "DELETE FROM jobs_jobs WHERE id IN (SELECT id FROM jobs_jobs "
            "WHERE kind = $1 AND expires_at < $2 AND settlement IS NULL LIMIT $3)",
            self._kind, api.now(), AT_ONCE,
        )  # fmt: skip

    async def waiting(self, *, older: float, after: str = "") -> list[Job]:
        """Those that have been due for so many seconds, AT_ONCE at most, by id."""
        return await self._some("status = 'queued' AND coalesce(run_after, created_at) < $3", older, after)

    async def forsaken(self, *, older: float, after: str = "") -> list[Job]:
        """Those that nobody has said to be running for so many seconds."""
        return await self._some("status = 'running' AND coalesce(seen_at, started_at) < $3", older, after)

    async def unsettled(self, *, older: float, after: str = "") -> list[Job]:
        """Those whose run has ended, and of which nobody noted that the ledger has it."""
        return await self._some("settlement IS NOT NULL AND coalesce(finished_at, run_after) < $3", older, after)

    async def stopping(self, *, older: float, after: str = "") -> list[Job]:
        """Those that wait or run though they were cancelled so many seconds ago."""
        return await self._some("status IN ('queued', 'running') AND cancel_asked < $3", older, after)

    async def _some(self, where: str, older: float, after: str) -> list[Job]:
        rows = await self._database.fetch(
            f"{_SELECT} WHERE kind = $1 AND id > $2 AND {where} ORDER BY id LIMIT {AT_ONCE}",
            self._kind, after, api.now() - int(older * 1000),
        )  # fmt: skip
        return [_job(row) for row in rows]


def _stored(result: Result | None) -> tuple[int | None, str | None, bytes | None]:
    if result is None:
        return None, None, None
    return result.status, msgspec.json.encode(result.headers).decode(), result.body


def _job(row: Row) -> Job:
    return Job(**row)
