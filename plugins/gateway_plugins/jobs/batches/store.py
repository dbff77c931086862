"""Batches, their chunks and their lines' results in the database. Every function raises StoreUnavailable."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

from gateway_plugins.jobs import api

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.kit import Database, Row, Statements

ENDED = ("failed", "completed", "expired", "cancelled")
DELETED_AT_ONCE = 2000

# Whoever has this row's lock writes of this batch; the number of rows says whether results are still taken.
_LOCK_OPEN = "UPDATE jobs_batches SET has_lines = 1 WHERE id = $1 AND ending IS NULL AND ended_at IS NULL"


class Chunk(msgspec.Struct, frozen=True):
    """Some lines of a batch that lie together."""

    number: int
    first: int  # of the batch's requests, from 0
    start: int  # bytes of the file
    length: int
    custom_ids: list[str]

    @classmethod
    def of(cls, row: Row) -> Chunk:
        return cls(row["number"], row["first"], row["start"], row["length"], json.loads(row["custom_ids"]))


class Result(msgspec.Struct, frozen=True):
    """What became of one line. `body` is JSON."""

    number: int
    custom_id: str
    ok: bool
    status: int | None = None
    body: bytes | None = None
    error_code: str | None = None
    error_message: str | None = None
    settlement: str | None = None
    tokens: tuple[int, int, int, int] = (0, 0, 0, 0)  # input, of them cached, output, of them reasoning


class Owed(msgspec.Struct, frozen=True):
    """What one try of a line cost that will be tried again, until the ledger is known to have it."""

    operation: str
    line: int
    settlement: str  # JSON


async def find(database: Database, batch_id: str, tenant: str | None = None) -> Row | None:
    """`tenant`: of this one alone."""
    if tenant is None:
        return await database.fetch_one("SELECT * FROM jobs_batches WHERE id = $1", batch_id)
    return await database.fetch_one("SELECT * FROM jobs_batches WHERE id = $1 AND tenant = $2", batch_id, tenant)


async def insert(database: Database, values: dict[str, Any], *, most_open: int) -> Row | None:
    """None: the tenant has as many open as it may have."""
    names = ", ".join(values)
    places = ", ".join(f"${i}" for i in range(1, len(values) + 1))
    sql = f"INSERT INTO jobs_batches ({names}) VALUES ({places}) RETURNING *"  # noqa: S608 - our own names
    async with database.transaction() as statements:
        row = await statements.fetch_one(
            "SELECT count(*) AS open FROM jobs_batches WHERE tenant = $1 AND ended_at IS NULL", values["tenant"]
        )
        if row is not None and row["open"] >= most_open:
            return None
        row = await statements.fetch_one(sql, *values.values())
    if row is None:
        raise RuntimeError("An insert returned nothing.")
    return row


async def listed(database: Database, tenant: str, most: int, after: Row | None) -> list[Row]:
    """Newest first, one more than asked for if there are more."""
    values: list[Any] = [tenant]
    where = "tenant = $1"
    if after is not None:
        values += [after["created_at"], after["id"]]
        where += " AND (created_at, id) < ($2, $3)"
    return await database.fetch(
        f"SELECT * FROM jobs_batches WHERE {where} ORDER BY created_at DESC, id DESC LIMIT {most + 1}",  # noqa: S608
        *values,
    )


async def begin(database: Database, batch_id: str, chunks: Sequence[Chunk], model: str | None) -> bool:
    """The file is good: its lines may run. False if it was cancelled meanwhile."""
    async with database.transaction(timeout=30) as statements:
        changed = await statements.execute(
            "UPDATE jobs_batches SET status = 'in_progress', in_progress_at = $2, total = $3, model = $4, "
            "has_lines = 1 WHERE id = $1 AND status = 'validating'",
            batch_id,
            api.now(),
            sum(len(chunk.custom_ids) for chunk in chunks),
            model,
        )
        if not changed:
            return False
        await statements.execute_many(
            "INSERT INTO jobs_chunks (batch, number, first, lines, start, length, custom_ids, state) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, 'waiting')",
            [
                (batch_id, c.number, c.first, len(c.custom_ids), c.start, c.length, json.dumps(c.custom_ids))
                for c in chunks
            ],
        )
    return True


async def take_chunks(database: Database, batch_id: str, most: int) -> list[int]:
    """Those that are to be enqueued next, so that `most` are under way; none of a batch that is ending."""
    async with database.transaction() as statements:
        if not await statements.execute(f"{_LOCK_OPEN} AND status = 'in_progress'", batch_id):
            return []
        row = await statements.fetch_one(
            "SELECT count(*) AS busy FROM jobs_chunks WHERE batch = $1 AND state IN ('queued', 'running')", batch_id
        )
        room = most - (row["busy"] if row else 0)
        if room <= 0:
            return []
        rows = await statements.fetch(
            f"SELECT number FROM jobs_chunks WHERE batch = $1 AND state = 'waiting' ORDER BY number LIMIT {room}",  # noqa: S608
            batch_id,
        )
        await statements.execute_many(
            "UPDATE jobs_chunks SET state = 'queued' WHERE batch = $1 AND number = $2",
            [(batch_id, row["number"]) for row in rows],
        )
    return [row["number"] for row in rows]


async def mark_chunk(database: Database, batch_id: str, number: int, state: str) -> None:
    """One that is done stays done."""
    await database.execute(
        "UPDATE jobs_chunks SET state = $3 WHERE batch = $1 AND number = $2 AND state <> 'done'",
        batch_id,
        number,
        state,
    )


async def end_chunk(database: Database, batch_id: str, number: int) -> bool:
    """All its lines have results. True if it was the last, and the batch is to be finished."""
    async with database.transaction() as statements:
        if not await statements.execute(_LOCK_OPEN, batch_id):
            return False
        await statements.execute(
            "UPDATE jobs_chunks SET state = 'done' WHERE batch = $1 AND number = $2", batch_id, number
        )
        left = await statements.fetch_one(
            "SELECT 1 AS left_over FROM jobs_chunks WHERE batch = $1 AND state <> 'done' LIMIT 1", batch_id
        )
        if left is not None:
            return False
        return bool(
            await statements.execute(
                "UPDATE jobs_batches SET status = 'finalizing', finalizing_at = $2, ending = 'completed' "
                "WHERE id = $1 AND status = 'in_progress'",
                batch_id,
                api.now(),
            )
        )


async def close(database: Database, batch_id: str, ending: str) -> bool:
    """From now on no result is taken. True if it was open."""
    async with database.transaction() as statements:
        if not await statements.execute(_LOCK_OPEN, batch_id):
            return False
        await statements.execute("UPDATE jobs_batches SET ending = $2 WHERE id = $1", batch_id, ending)
        if ending == "expired":
            await statements.execute(
                "UPDATE jobs_batches SET status = 'finalizing', finalizing_at = $2 WHERE id = $1", batch_id, api.now()
            )
    return True


async def results_of(database: Database, batch_id: str, chunk: Chunk) -> list[Row]:
    """Which lines have their result, and what the ledger may not have yet."""
    return await database.fetch(
        "SELECT number, settlement FROM jobs_lines WHERE batch = $1 AND number >= $2 AND number < $3",
        batch_id,
        chunk.first,
        chunk.first + len(chunk.custom_ids),
    )


async def write_results(statements: Statements, batch_id: str, results: Sequence[Result]) -> list[Result]:
    """Those that are new: a line has one result, and a batch that has ended takes none."""
    if not results or not await statements.execute(_LOCK_OPEN, batch_id):
        return []
    places = ", ".join(f"${i}" for i in range(2, len(results) + 2))
    rows = await statements.fetch(
        f"SELECT number FROM jobs_lines WHERE batch = $1 AND number IN ({places})",  # noqa: S608 - places
        batch_id,
        *(result.number for result in results),
    )
    there = {row["number"] for row in rows}
    new = list({r.number: r for r in results if r.number not in there}.values())
    if new:
        await statements.execute_many(
            "INSERT INTO jobs_lines (batch, number, ok, custom_id, status, body, error_code, error_message, "
            "settlement) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            [
                (
                    *(batch_id, r.number, int(r.ok), r.custom_id, r.status),
                    *(r.body, r.error_code, r.error_message, r.settlement),
                )
                for r in new
            ],
        )
        good = sum(r.ok for r in new)
        tokens = [sum(column) for column in zip(*(r.tokens for r in new), strict=True)]
        await statements.execute(
            "UPDATE jobs_batches SET completed = completed + $2, failed = failed + $3, "
            "input_tokens = input_tokens + $4, cached_tokens = cached_tokens + $5, "
            "output_tokens = output_tokens + $6, reasoning_tokens = reasoning_tokens + $7 WHERE id = $1",
            batch_id,
            good,
            len(new) - good,
            *tokens,
        )
    return new


async def write_owed(statements: Statements, batch_id: str, owed: Sequence[Owed]) -> None:
    if owed:
        await statements.execute_many(
            "INSERT INTO jobs_owed (operation, batch, line, settlement) VALUES ($1, $2, $3, $4)",
            [(o.operation, batch_id, o.line, o.settlement) for o in owed],
        )


async def owed_of(database: Database, batch_id: str, chunk: Chunk) -> list[str]:
    rows = await database.fetch(
        "SELECT settlement FROM jobs_owed WHERE batch = $1 AND line >= $2 AND line < $3",
        batch_id,
        chunk.first,
        chunk.first + len(chunk.custom_ids),
    )
    return [row["settlement"] for row in rows]


async def delete_lines(database: Database, batch_id: str) -> None:
    """After its end, a bounded number at a time."""
    while True:
        async with database.transaction() as statements:
            rows = await statements.fetch(
                f"SELECT number FROM jobs_lines WHERE batch = $1 ORDER BY number LIMIT {DELETED_AT_ONCE}",  # noqa: S608
                batch_id,
            )
            if rows:
                await statements.execute(
                    "DELETE FROM jobs_lines WHERE batch = $1 AND number <= $2", batch_id, rows[-1]["number"]
                )
                continue
            await statements.execute("DELETE FROM jobs_owed WHERE batch = $1", batch_id)
            await statements.execute("DELETE FROM jobs_chunks WHERE batch = $1", batch_id)
            await statements.execute("UPDATE jobs_batches SET has_lines = 0 WHERE id = $1", batch_id)
            return
