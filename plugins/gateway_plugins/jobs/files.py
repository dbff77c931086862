"""The Files API: /v1/files. The database says which files there are, the storage has their bytes.

A row stands before the first byte is stored and until the last one is gone: what a killed process leaves is known, and
goes after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gateway import BadRequest, NotFound, Reply, StoreUnavailable, TooLarge
from gateway.kit import limit_of, query_of
from gateway_plugins.jobs import api
from gateway_plugins.jobs.storage import PIECE, MissingError, Storage
from gateway_plugins.jobs.upload import OVERHEAD, Form

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from gateway import Exchange, Router, Services
    from gateway.kit import Row, Statements
    from gateway_plugins.jobs.parts import Handler
    from gateway_plugins.jobs.settings import Files as Settings

MOST_LISTED = 10_000
SHORTEST, LONGEST = 3600, 2_592_000  # of `expires_after`, as OpenAI has it
UPLOAD_SECONDS = 6 * 3600.0  # an upload that has not ended by then never will
SMALLEST = 4096  # what a file counts for at least: a block of the disk, and a row
TIDIED_AT_ONCE = 100
TIDY_SECONDS = 10.0  # the rest comes with the next round
DELETED_AT_ONCE = 10  # requests to S3
_LIVE = "state = 'stored' AND (expires_at IS NULL OR expires_at > $1)"


class Files:
    """The routes, and what batches need."""

    handlers: Mapping[str, Handler] = {}

    def __init__(self, settings: Settings, services: Services) -> None:
        self._settings = settings
        self._services = services
        self.storage = Storage(settings, services)

    def register_routes(self, router: Router) -> None:
        for method, path, handler, summary in (
            ("GET", "/v1/files", self._list, "Your files. Query: purpose, limit, order, after."),
            ("GET", "/v1/files/{id}", self._show, "One file."),
            ("DELETE", "/v1/files/{id}", self._delete, "Delete a file."),
        ):
            router.add(method, path, handler, summary=summary)
        router.add(
            "POST",
            "/v1/files",
            self._create,
            body="stream",
            max_body=self._settings.max_bytes + OVERHEAD,
            summary="Upload a file (multipart: file, purpose, expires_after[anchor], expires_after[seconds]).",
        )
        router.add(
            "GET",
            "/v1/files/{id}/content",
            self._content,
            produces="application/octet-stream",
            summary="What a file holds.",
        )

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        yield

    # --- routes ------------------------------------------------------------------------------------------------------

    async def _create(self, exchange: Exchange) -> Reply:
        form = Form(exchange.upload(), exchange.request.header("content-type") or "", self._settings.max_bytes)
        file_id = new_id()
        await self._reserve(file_id, exchange)
        try:
            row = await self._receive(file_id, form)
        except BaseException:
            # in a task of its own: whoever uploads may have left
            self._services.spawn(self.forget(file_id), "a broken upload")
            raise
        return Reply(200, data=shown(row))

    async def _receive(self, file_id: str, form: Form) -> Row:
        await form.begin()
        _check(form.fields, whole=False)
        await self.storage.put(file_id, form.content())
        await form.end()
        after = _check(form.fields, whole=True)
        if form.size == 0:
            raise BadRequest("The file is empty.", param="file", code="empty_file")
        now = api.now()
        async with self._services.database.transaction() as statements:
            row = await statements.fetch_one(
                "UPDATE jobs_files SET state = 'stored', bytes = $2, filename = $3, expires_at = $4, created_at = $5 "
                "WHERE id = $1 AND state = 'uploading' RETURNING *",
                file_id,
                form.size,
                form.filename,
                now + int((after or self._settings.keep) * 1000),
                now,
            )
        if row is None:
            raise BadRequest("The upload took too long.", code="upload_too_slow")
        return row

    async def _reserve(self, file_id: str, exchange: Exchange) -> None:
        """Room for the upload within the tenant's, before anything is read. Raises TooLarge."""
        settings = self._settings
        length = exchange.request.header("content-length") or ""
        packed = exchange.request.header("content-encoding") is not None
        known = length.isascii() and length.isdigit() and len(length) < 16 and not packed
        size = int(length) if known else settings.max_bytes
        if size > settings.max_bytes + OVERHEAD:
            raise TooLarge(
                f"The file is larger than {settings.max_bytes:,} bytes.", param="file", code="file_too_large"
            )
        try:
            await self._take_room(file_id, min(size, settings.max_bytes), exchange)
        except BaseException:
            # in a task of its own: whoever uploads may have left meanwhile
            await asyncio.shield(self._services.spawn(self._give_back(file_id), "an upload without room"))
            raise

    async def _take_room(self, file_id: str, size: int, exchange: Exchange) -> None:
        settings, tenant = self._settings, api.tenant_of(exchange)
        now = api.now()
        principal = exchange.principal.reference if exchange.principal else ""
        await self._services.database.execute(
            "INSERT INTO jobs_files (id, tenant, principal, purpose, filename, state, bytes, created_at, expires_at) "
            "VALUES ($1, $2, $3, 'batch', '', 'uploading', $4, $5, $6)",
            file_id,
            tenant,
            principal,
            size,
            now,
            now + int(UPLOAD_SECONDS * 1000),
        )
        # with what others reserved meanwhile: two who come together see each other
        taken = await self._services.database.fetch_one(
            "SELECT CAST(coalesce(sum(CASE WHEN bytes < $2 THEN $2 ELSE bytes END), 0) AS BIGINT) AS bytes "
            "FROM jobs_files WHERE tenant = $1",
            tenant,
            SMALLEST,
        )
        if taken is not None and taken["bytes"] > settings.max_total:
            raise TooLarge(
                f"Your files may take {settings.max_total:,} bytes together, and with this one they would take "
                f"{taken['bytes']:,} (each counts for {SMALLEST:,} at least). Delete some.",
                code="storage_limit_exceeded",
            )

    async def _give_back(self, file_id: str) -> None:
        with contextlib.suppress(StoreUnavailable):  # its row, if there is one, is tidied later
            await self._services.database.execute("DELETE FROM jobs_files WHERE id = $1", file_id)

    async def _list(self, exchange: Exchange) -> Reply:
        given = query_of(exchange, ("purpose", "limit", "order", "after", *admins(exchange)))
        most = limit_of(given, default=MOST_LISTED, most=MOST_LISTED)
        order = given.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise BadRequest("`order` must be asc or desc.", param="order")
        values: list[Any] = [api.now(), whose(exchange, given)]
        where = f"{_LIVE} AND tenant = $2"
        if "purpose" in given:
            values.append(given["purpose"])
            where += f" AND purpose = ${len(values)}"
        if "after" in given:
            last = await self.find(given["after"], whose(exchange, given), param="after")
            values += [last["created_at"], last["id"]]
            sign = ">" if order == "asc" else "<"
            where += f" AND (created_at, id) {sign} (${len(values) - 1}, ${len(values)})"
        rows = await self._services.database.fetch(
            f"SELECT * FROM jobs_files WHERE {where} ORDER BY created_at {order}, id {order} LIMIT {most + 1}",  # noqa: S608
            *values,
        )
        return Reply(200, data=api.listed([shown(row) for row in rows[:most]], more=len(rows) > most))

    async def _show(self, exchange: Exchange) -> Reply:
        return Reply(200, data=shown(await self._asked(exchange)))

    async def _content(self, exchange: Exchange) -> Reply:
        row = await self._asked(exchange)
        with self._there(row):  # before anything is sent: the status can still say that they are not
            first = await self.storage.range(row["id"], 0, min(row["bytes"], PIECE)) if row["bytes"] else b""
        return Reply(
            200,
            chunks=self._bytes(row, first),
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Length": str(row["bytes"]),
                "Content-Disposition": f"attachment; filename*=UTF-8''{quote(row['filename'], safe='')}",
                "X-Content-Type-Options": "nosniff",
            },
        )

    async def _bytes(self, row: Row, first: bytes) -> AsyncIterator[bytes]:
        yield first
        with self._there(row):
            async for piece in self.storage.read(row["id"], row["bytes"], len(first)):
                yield piece

    @contextlib.contextmanager
    def _there(self, row: Row) -> Iterator[None]:
        try:
            yield
        except MissingError:
            self._services.log.error("file_bytes_missing", file=row["id"])  # noqa: TRY400 - the storage's, not ours
            raise NotFound("The file's bytes are not in the storage any more.", code="file_lost") from None

    async def _delete(self, exchange: Exchange) -> Reply:
        row = await self._asked(exchange)
        await self._services.database.execute("UPDATE jobs_files SET state = 'deleted' WHERE id = $1", row["id"])
        self._services.spawn(self.forget(row["id"]), "a deleted file")
        return Reply(200, data={"id": row["id"], "object": "file", "deleted": True})

    async def _asked(self, exchange: Exchange) -> Row:
        given = query_of(exchange, admins(exchange))
        return await self.find(exchange.request.path_params["id"], whose(exchange, given))

    # --- for batches -------------------------------------------------------------------------------------------------

    async def find(self, file_id: str, tenant: str, *, param: str | None = None) -> Row:
        """Raises NotFound, for another tenant's too."""
        row = await self._services.database.fetch_one(
            f"SELECT * FROM jobs_files WHERE {_LIVE} AND id = $2 AND tenant = $3",  # noqa: S608 - our own words
            api.now(),
            file_id,
            tenant,
        )
        if row is None:
            raise NotFound(f"There is no file {file_id[:100]!r}.", param=param)
        return row

    async def size(self, file_id: str) -> int:
        """Of a batch's input, though its owner has deleted it meanwhile. Raises MissingError."""
        row = await self._services.database.fetch_one("SELECT bytes FROM jobs_files WHERE id = $1", file_id)
        if row is None:
            raise MissingError(file_id)
        return int(row["bytes"])

    async def write(self, file_id: str, batch: Row, pieces: AsyncIterator[bytes]) -> int:
        """A batch's result, not shown before `publish`; how many bytes. The same id again replaces it."""
        now = api.now()
        await self._services.database.execute(
            "INSERT INTO jobs_files (id, tenant, principal, purpose, filename, state, bytes, created_at, expires_at) "
            "VALUES ($1, $2, $3, 'batch_output', '', 'uploading', 0, $4, $5) "
            "ON CONFLICT (id) DO UPDATE SET state = 'uploading', expires_at = $5 WHERE jobs_files.state <> 'stored'",
            file_id,
            batch["tenant"],
            batch["principal"],
            now,
            now + int(UPLOAD_SECONDS * 1000),
        )
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for piece in pieces:
                size += len(piece)
                yield piece

        await self.storage.put(file_id, counted())
        return size

    async def publish(self, statements: Statements, file_id: str, filename: str, size: int, keep: float | None) -> bool:
        """In the transaction that ends the batch. False: it was tidied meanwhile."""
        now = api.now()
        changed = await statements.execute(
            "UPDATE jobs_files SET state = 'stored', bytes = $2, filename = $3, created_at = $4, expires_at = $5 "
            "WHERE id = $1 AND state = 'uploading'",
            file_id,
            size,
            filename,
            now,
            now + int((keep or self._settings.keep) * 1000),
        )
        return bool(changed)

    # --- what is over ------------------------------------------------------------------------------------------------

    async def tidy(self) -> None:
        end = time.monotonic() + TIDY_SECONDS
        found = TIDIED_AT_ONCE
        while found == TIDIED_AT_ONCE and time.monotonic() < end:
            rows = await self._services.database.fetch(
                # what batches read is left out: as many of those would keep all others waiting
                "SELECT id FROM jobs_files WHERE (state = 'deleted' OR expires_at <= $1) AND NOT EXISTS (SELECT 1 FROM "
                "jobs_batches WHERE input_file_id = jobs_files.id AND ended_at IS NULL) ORDER BY expires_at LIMIT $2",
                api.now(),
                TIDIED_AT_ONCE,
            )
            found = len(rows)
            await self.forget(*(row["id"] for row in rows))

    async def forget(self, *file_ids: str) -> None:
        """Their bytes and then their rows; what a batch still reads keeps both, hidden."""
        if not file_ids:
            return
        database, these = self._services.database, _listed(file_ids)
        await database.execute(f"UPDATE jobs_files SET state = 'deleted' WHERE id IN {these}", *file_ids)  # noqa: S608
        used = await database.fetch(
            f"SELECT input_file_id FROM jobs_batches WHERE input_file_id IN {these} AND ended_at IS NULL",  # noqa: S608
            *file_ids,
        )
        free = [*{*file_ids}.difference(row["input_file_id"] for row in used)]
        for start in range(0, len(free), DELETED_AT_ONCE):
            some = free[start : start + DELETED_AT_ONCE]
            await asyncio.gather(*map(self.storage.delete, some))
            await database.execute(
                f"DELETE FROM jobs_files WHERE id IN {_listed(some)} AND state = 'deleted'",  # noqa: S608
                *some,
            )


def _listed(values: Sequence[str]) -> str:
    """The place of each of them in a statement that has no others."""
    return f"({', '.join(f'${place}' for place in range(1, len(values) + 1))})"


def _check(fields: Mapping[str, str], *, whole: bool) -> float | None:
    """What is known of the form so far; for how many seconds the file is to be kept. Raises BadRequest."""
    known = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
    for name in fields:
        if name not in known:
            raise BadRequest(f"There is no field {name[:100]!r} here.", param=name[:100])
    purpose, anchor, seconds = (fields.get(name) for name in known)
    if purpose != "batch" and (whole or purpose is not None):
        raise BadRequest("`purpose` must be batch: this gateway has no other use for files.", param="purpose")
    if not whole or (anchor is None and seconds is None):
        return None
    if anchor != "created_at":
        raise BadRequest("`expires_after[anchor]` must be created_at.", param="expires_after[anchor]")
    return expiry(seconds)


def expiry(seconds: Any, *, param: str = "expires_after[seconds]") -> float:
    """Raises BadRequest."""
    text = str(seconds)
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not SHORTEST <= int(text) <= LONGEST:
        raise BadRequest(f"`{param}` must be a number from {SHORTEST} to {LONGEST}.", param=param)
    return float(text)


def shown(row: Row) -> dict[str, Any]:
    """As OpenAI shows a file."""
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"] // 1000,
        "expires_at": None if row["expires_at"] is None else row["expires_at"] // 1000,
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }


def new_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def admins(exchange: Exchange) -> tuple[str, ...]:
    return ("tenant",) if api.is_admin(exchange) else ()


def whose(exchange: Exchange, given: Mapping[str, str]) -> str:
    """The tenant whose things are asked for: administrators may name another."""
    return given.get("tenant", api.tenant_of(exchange))
