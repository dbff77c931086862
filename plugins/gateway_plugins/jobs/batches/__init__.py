"""The Batch API: /v1/batches. A batch is checked, run chunk by chunk, and finished by workers. The database knows it.

A chunk is some hundred lines that one worker takes at a time. Only so many of a batch are enqueued as may run at once:
a large batch leaves room for others.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

from gateway import BadRequest, Conflict, Forbidden, GatewayError, LateRequest, NotFound, RateLimited, Reply, may_see
from gateway.kit import limit_of, query_of
from gateway_plugins.jobs import api
from gateway_plugins.jobs.batches import results, store
from gateway_plugins.jobs.batches.checks import ENDPOINTS, Checked
from gateway_plugins.jobs.batches.runner import ChunkRun
from gateway_plugins.jobs.files import admins, expiry, whose
from gateway_plugins.jobs.parts import Again
from gateway_plugins.jobs.settings import Queue
from gateway_plugins.jobs.storage import MissingError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from gateway import Exchange, Router, Services
    from gateway.kit import Row
    from gateway_plugins.jobs.files import Files
    from gateway_plugins.jobs.parts import Handler, Shared

CHUNKS, STEPS = "batches", "batch-steps"  # queues: lines, and what stands before and after them
WINDOWS = ("24h",)
MOST_LISTED = 100
MOST_METADATA, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512  # as OpenAI has it
CUT_SECONDS = 30.0  # how long the end of a batch waits for lines that are being cut off
LOOK_SECONDS = 0.5
STATES_SECONDS = 30.0
TIDIED_AT_ONCE = 100
_CHECKED, _FINISHED = "", "-finish"  # after a batch's id: which work of kind "batch"
_EXPIRED = ("batch_expired", "This request could not be executed before the completion window expired.")
_TIMES = (
    "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
    "cancelling_at", "cancelled_at",
)  # fmt: skip


class _EndedError(Exception):
    """Another worker was faster."""


class Batches:
    """The routes, what workers do, and the tidying."""

    def __init__(self, shared: Shared, files: Files) -> None:
        self._shared = shared
        self._settings = shared.config.batches
        self._services: Services = shared.services
        self._queue = shared.queue
        self._webhooks = shared.webhooks
        self._files = files
        self.handlers: Mapping[str, Handler] = {"batch": self._work, "chunk": self._run_chunk}
        shared.queue.serve(CHUNKS, Queue(concurrency=4, timeout=86400.0))
        shared.queue.serve(STEPS, Queue(concurrency=2, timeout=3600.0))
        metrics = self._services.metrics
        self._lines = metrics.counter(
            "xenios_batch_lines_total", "Lines of batches that have their result.", ("outcome",)
        )
        self._gauge = metrics.gauge("xenios_batches", "Batches that have not ended.", ("status",), merge="max")
        self._states: dict[tuple[str, ...], float] = {}
        self._states_until = 0.0

    def register_routes(self, router: Router) -> None:
        for method, path, handler, summary in (
            ("POST", "/v1/batches", self._create, "Run the lines of a file. Its answers become files."),
            ("GET", "/v1/batches", self._list, "Your batches, newest first. Query: limit, after."),
            ("GET", "/v1/batches/{id}", self._show, "One batch."),
            ("POST", "/v1/batches/{id}/cancel", self._cancel, "Stop it; what is done is delivered."),
        ):
            # OpenAI's clients cancel without a body
            body: Literal["stream"] | None = "stream" if path.endswith("/cancel") else None
            router.add(method, path, handler, body=body, summary=summary)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        end = self._gauge.read_from(lambda: self._states if time.monotonic() < self._states_until else {})
        try:
            yield
        finally:
            end()

    # --- routes ------------------------------------------------------------------------------------------------------

    async def _create(self, exchange: Exchange) -> Reply:
        wanted = exchange.body
        _refuse_unknown(wanted)
        endpoint, window, file_id = (_text(wanted, n) for n in ("endpoint", "completion_window", "input_file_id"))
        if endpoint not in ENDPOINTS:
            raise BadRequest(f"`endpoint` must be one of {', '.join(ENDPOINTS)}.", param="endpoint")
        if window not in WINDOWS:
            raise BadRequest(f"`completion_window` must be {' or '.join(WINDOWS)}.", param="completion_window")
        principal = exchange.principal
        if principal is None:
            raise Forbidden
        if not principal.scopes.allows("endpoints", endpoint.removeprefix("/v1/")):
            raise Forbidden(f"This key may not use {endpoint}.", param="endpoint")
        metadata = _metadata(wanted.get("metadata"))
        seconds = _output_seconds(wanted.get("output_expires_after"))
        tenant = api.tenant_of(exchange)
        found = await self._files.find(file_id, tenant, param="input_file_id")
        if found["purpose"] != "batch":
            raise BadRequest("The file's purpose must be batch.", param="input_file_id")
        late = LateRequest(
            endpoint=endpoint.removeprefix("/v1/"),
            body=b"",
            content_type="application/json",
            headers={},
            request_id=exchange.request_id,
            reference=principal.reference,
            principal=principal,
            traceparent=exchange.traceparent,
        )
        now = api.now()
        row = await store.insert(
            self._services.database,
            {
                "id": f"batch_{secrets.token_hex(12)}",
                "tenant": tenant,
                "principal": principal.reference,
                "endpoint": endpoint,
                "input_file_id": file_id,
                "status": "validating",
                "completion_window": window,
                "late": late.to_json(),
                "metadata": None if metadata is None else json.dumps(metadata),
                "created_at": now,
                "expires_at": now + int(self._settings.window * 1000),
                "output_seconds": seconds,
                **dict.fromkeys(("total", "completed", "failed", "has_lines"), 0),
                **dict.fromkeys(("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens"), 0),
            },
            most_open=self._settings.max_open,
        )
        if row is None:
            message = f"{self._settings.max_open} of your batches have not ended; there may not be more."
            raise RateLimited(message, code="too_many_batches", retry_after=60)
        await self._put(row["id"] + _CHECKED)
        return Reply(200, data=shown(row))

    async def _list(self, exchange: Exchange) -> Reply:
        given = query_of(exchange, ("limit", "after", *admins(exchange)))
        most = limit_of(given, default=20, most=MOST_LISTED)
        tenant = whose(exchange, given)
        after = None
        if "after" in given:
            after = await self._find(given["after"], tenant)
        rows = await store.listed(self._services.database, tenant, most, after)
        return Reply(200, data=api.listed([shown(row) for row in rows[:most]], more=len(rows) > most))

    async def _show(self, exchange: Exchange) -> Reply:
        return Reply(200, data=shown(await self._asked(exchange)))

    async def _cancel(self, exchange: Exchange) -> Reply:
        row = await self._asked(exchange)
        changed = await self._services.database.execute(
            "UPDATE jobs_batches SET status = 'cancelling', cancelling_at = $2 "
            "WHERE id = $1 AND status IN ('validating', 'in_progress') AND ending IS NULL",
            row["id"],
            api.now(),
        )
        row = await self._find(row["id"], row["tenant"])
        if changed:
            self._services.spawn(self._stop(row["id"]), "a cancelled batch")
        elif row["status"] != "cancelling":
            raise Conflict(f"A batch that is {row['status']} can't be cancelled.", code="batch_not_cancellable")
        return Reply(200, data=shown(row))

    async def _stop(self, batch_id: str) -> None:
        rows = await self._services.database.fetch(
            "SELECT number FROM jobs_chunks WHERE batch = $1 AND state IN ('queued', 'running')", batch_id
        )
        for row in rows:
            await self._queue.drop("chunk", f"{batch_id}-{row['number']}")
        await self._put(batch_id + _FINISHED)

    async def _asked(self, exchange: Exchange) -> Row:
        given = query_of(exchange, admins(exchange))
        return await self._find(exchange.request.path_params["id"], whose(exchange, given))

    async def _find(self, batch_id: str, tenant: str) -> Row:
        """Raises NotFound, for another tenant's too."""
        row = await store.find(self._services.database, batch_id, tenant)
        if row is None:
            raise NotFound(f"There is no batch {batch_id[:100]!r}.")
        return row

    # --- what workers do ---------------------------------------------------------------------------------------------

    async def _work(self, work: str) -> None:
        """The file is checked, or the batch finished."""
        batch = await store.find(self._services.database, work.removesuffix(_FINISHED))
        if batch is None or batch["ended_at"] is not None:
            return
        try:
            if work.endswith(_FINISHED):
                await self._finish(batch)
            elif batch["status"] == "validating":
                await self._check(batch)
        except GatewayError as error:  # storage or database are away
            raise Again(error.retry_after or 1.0) from error

    async def _check(self, batch: Row) -> None:
        services, database = self._services, self._services.database
        scopes = LateRequest.from_json(batch["late"]).principal.scopes

        def may_use(model: str) -> bool:
            # of a name that isn't a model of an upstream, an alias, only the run knows
            known = any(services.catalogue.model(name, model) for name in services.settings.upstreams)
            return not known or may_see(scopes, model)

        checked = Checked(batch["endpoint"], self._settings, may_use)
        file_id = batch["input_file_id"]
        try:
            size = await self._files.size(file_id)
            async with aclosing(self._files.storage.read(file_id, size)) as pieces:
                await checked.read(pieces, services.settings.server.max_body)
        except MissingError:
            message = "The input file is not there any more."
            checked.errors[:] = [
                {"code": "input_file_lost", "message": message, "param": "input_file_id", "line": None}
            ]
        if checked.errors:
            await self._end(batch, "failed", errors=json.dumps(checked.errors))
        elif await store.begin(database, batch["id"], checked.chunks, checked.model):
            await self._feed(batch["id"])
        else:
            await self._put(batch["id"] + _FINISHED)

    async def _run_chunk(self, work: str) -> None:
        batch_id, _, number = work.rpartition("-")
        database = self._services.database
        batch = await store.find(database, batch_id)
        found = await database.fetch_one(
            "SELECT * FROM jobs_chunks WHERE batch = $1 AND number = $2 AND state <> 'done'", batch_id, int(number)
        )
        if batch is None or found is None or batch["status"] != "in_progress":
            return
        chunk = store.Chunk.of(found)
        await store.mark_chunk(database, batch_id, chunk.number, "running")
        run = ChunkRun(self._shared, self._files.storage, batch, chunk, self._lines)
        try:
            async with asyncio.timeout(max(0.0, batch["expires_at"] / 1000 - time.time())):
                complete = await run.run()
        except TimeoutError:
            await store.mark_chunk(database, batch_id, chunk.number, "queued")
            await self._put(batch_id + _FINISHED)
        except asyncio.CancelledError:
            if self._queue.why() != "lost":
                await asyncio.shield(store.mark_chunk(database, batch_id, chunk.number, "queued"))
            raise
        except (GatewayError, ExceptionGroup) as error:
            self._services.log.warning("batch_chunk_put_back", batch=batch_id, chunk=chunk.number, error=repr(error))
            raise Again(1.0) from error
        else:
            if not complete:
                await store.mark_chunk(database, batch_id, chunk.number, "queued")
                raise Again(LOOK_SECONDS)
            if await store.end_chunk(database, batch_id, chunk.number):
                await self._put(batch_id + _FINISHED)
            else:
                await self._feed(batch_id)

    async def _finish(self, batch: Row) -> None:
        """The files are written, then the batch has ended. Raises Again while lines of it are being cut off."""
        database, batch_id = self._services.database, batch["id"]
        if batch["ending"] is None:
            ending = self._ending(batch)
            if ending is None:
                return
            await self._wait_for_lines(batch)
            await store.close(database, batch_id, ending)
            batch = await self._find(batch_id, batch["tenant"])
        unrun = _EXPIRED if batch["ending"] == "expired" else None
        written: dict[str, tuple[str, int]] = {}
        for name, lines in (
            ("output", results.good_lines(database, batch_id)),
            ("error", results.bad_lines(database, batch_id, unrun)),
        ):
            file_id = f"file-{batch_id.removeprefix('batch_')[:23]}{'01'[name == 'error']}"
            try:
                size = await self._files.write(file_id, batch, self._while_open(batch_id, lines))
            except _EndedError:
                return
            written[name] = (file_id, size)
        await self._end(batch, batch["ending"], written)
        if unrun is not None:
            self._lines.add(batch["total"] - batch["completed"] - batch["failed"], "expired")

    async def _while_open(self, batch_id: str, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """All of them. Whose batch another worker has ended meanwhile finds none, and must not replace its file."""
        async for line in lines:
            yield line
        batch = await store.find(self._services.database, batch_id)
        if batch is None or batch["ended_at"] is not None:
            raise _EndedError

    @staticmethod
    def _ending(batch: Row) -> str | None:
        if batch["status"] == "cancelling":
            return "cancelled"
        return "expired" if batch["expires_at"] <= api.now() else None

    async def _wait_for_lines(self, batch: Row) -> None:
        """Those under way may end yet, or tell what they have used. Raises Again."""
        since = batch["cancelling_at"] or batch["expires_at"]
        if api.now() - since > CUT_SECONDS * 1000:
            return
        running = await self._services.database.fetch_one(
            "SELECT 1 AS running FROM jobs_chunks WHERE batch = $1 AND state = 'running' LIMIT 1", batch["id"]
        )
        if running is not None:
            raise Again(LOOK_SECONDS)

    async def _end(
        self,
        batch: Row,
        status: str,
        written: Mapping[str, tuple[str, int]] | None = None,
        errors: str | None = None,
    ) -> None:
        """With its files and its webhook's message in one transaction."""
        now = api.now()
        batch_id = batch["id"]
        async with self._services.database.transaction() as statements:
            files = {name: (file_id, size) for name, (file_id, size) in (written or {}).items() if size}
            changed = await statements.execute(
                f"UPDATE jobs_batches SET status = $2, {status}_at = $3, ended_at = $3, errors = $4, "  # noqa: S608
                "output_file_id = $5, error_file_id = $6 WHERE id = $1 AND ended_at IS NULL",
                *(batch_id, status, now, errors),
                *(files[name][0] if name in files else None for name in ("output", "error")),
            )
            if changed:
                for name, (file_id, size) in files.items():
                    filename = f"{batch_id}_{name}.jsonl"
                    if not await self._files.publish(statements, file_id, filename, size, batch["output_seconds"]):
                        raise Again(LOOK_SECONDS)
                await self._webhooks.send(statements, batch["tenant"], f"batch.{status}", {"id": batch_id}, target=None)
        if not changed:
            return
        await self._webhooks.wake()
        for file_id, size in (written or {}).values():
            if not size:
                await self._files.forget(file_id)
        await store.delete_lines(self._services.database, batch_id)

    # --- the queue ---------------------------------------------------------------------------------------------------

    async def _put(self, work: str) -> None:
        """What can't be enqueued now is by the tidying."""
        try:
            await self._queue.put("batch", work, queue=STEPS)
        except GatewayError:
            self._services.log.warning("batch_not_enqueued", batch=work)

    async def _feed(self, batch_id: str) -> None:
        """Enqueue as many chunks as may run now."""
        for number in await store.take_chunks(self._services.database, batch_id, self._settings.chunks):
            await self._put_chunk(f"{batch_id}-{number}")

    async def _put_chunk(self, work: str) -> None:
        try:
            await self._queue.put("chunk", work, queue=CHUNKS)
        except GatewayError:
            self._services.log.warning("batch_not_enqueued", batch=work)

    # --- what is left ------------------------------------------------------------------------------------------------

    async def tidy(self) -> None:
        database = self._services.database
        open_batches = await database.fetch(
            "SELECT id, status, ending, expires_at FROM jobs_batches WHERE ended_at IS NULL ORDER BY created_at"
        )
        self._count(open_batches)
        now = api.now()
        works = []
        for row in open_batches:
            if row["ending"] is not None or row["status"] == "cancelling" or row["expires_at"] <= now:
                works.append(row["id"] + _FINISHED)
            elif row["status"] == "validating":
                works.append(row["id"] + _CHECKED)
            else:
                await self._feed(row["id"])
        for work in await self._queue.unknown("batch", works):
            await self._put(work)
        chunks = await database.fetch(
            "SELECT batch, number FROM jobs_chunks WHERE state IN ('queued', 'running') AND batch IN "
            "(SELECT id FROM jobs_batches WHERE status = 'in_progress')"
        )
        for work in await self._queue.unknown("chunk", [f"{row['batch']}-{row['number']}" for row in chunks]):
            await self._put_chunk(work)
        await self._delete_old(now)

    async def _delete_old(self, now: int) -> None:
        database = self._services.database
        for row in await database.fetch(
            f"SELECT id FROM jobs_batches WHERE ended_at IS NOT NULL AND has_lines = 1 LIMIT {TIDIED_AT_ONCE}"  # noqa: S608
        ):
            await store.delete_lines(database, row["id"])
        await database.execute(
            "DELETE FROM jobs_batches WHERE ended_at < $1 AND has_lines = 0", now - int(self._settings.keep * 1000)
        )

    def _count(self, rows: list[Row]) -> None:
        self._states = dict.fromkeys([("validating",), ("in_progress",), ("finalizing",), ("cancelling",)], 0.0)
        for row in rows:
            self._states[row["status"],] += 1
        self._states_until = time.monotonic() + STATES_SECONDS


# --- as OpenAI has it ------------------------------------------------------------------------------------------------


def shown(row: Row) -> dict[str, Any]:
    """A batch."""
    errors = row["errors"]
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "model": row["model"],
        "errors": None if errors is None else {"object": "list", "data": json.loads(errors)},
        "input_file_id": row["input_file_id"],
        "completion_window": row["completion_window"],
        "status": row["status"],
        "output_file_id": row["output_file_id"],
        "error_file_id": row["error_file_id"],
        **{name: None if row[name] is None else row[name] // 1000 for name in _TIMES},
        "request_counts": {"total": row["total"], "completed": row["completed"], "failed": row["failed"]},
        "usage": {
            "input_tokens": row["input_tokens"],
            "input_tokens_details": {"cached_tokens": row["cached_tokens"]},
            "output_tokens": row["output_tokens"],
            "output_tokens_details": {"reasoning_tokens": row["reasoning_tokens"]},
            "total_tokens": row["input_tokens"] + row["output_tokens"],
        },
        "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
    }


def _refuse_unknown(wanted: Mapping[str, Any]) -> None:
    known = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after")
    for name in wanted:
        if name not in known:
            raise BadRequest(f"There is no field {name[:100]!r} here.", param=name[:100])


def _text(wanted: Mapping[str, Any], name: str) -> str:
    value = wanted.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"The field `{name}` is missing.", param=name, code="missing_required_parameter")
    return value


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MOST_METADATA:
        raise BadRequest(f"`metadata` must be an object of {MOST_METADATA} texts at most.", param="metadata")
    for name, text in value.items():
        if not isinstance(text, str) or len(name) > LONGEST_KEY or len(text) > LONGEST_VALUE:
            raise BadRequest(
                f"`metadata` has names of {LONGEST_KEY} characters and texts of {LONGEST_VALUE} at most.",
                param="metadata",
            )
    return value


def _output_seconds(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("anchor") != "created_at" or type(value.get("seconds")) is not int:
        raise BadRequest(
            "`output_expires_after` must have `anchor`: created_at, and `seconds`.", param="output_expires_after"
        )
    return int(expiry(value["seconds"], param="output_expires_after.seconds"))
