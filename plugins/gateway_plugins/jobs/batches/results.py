"""What a batch's end is made of: output and error file, line by line, in OpenAI's format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from gateway_plugins.jobs.batches.runner import line_id
from gateway_plugins.jobs.batches.store import Chunk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.kit import Database, Row

PAGE_BYTES = 4 << 20  # of results that are in memory at once, but for one that is larger


async def good_lines(database: Database, batch_id: str) -> AsyncIterator[bytes]:
    """The output file."""
    async for chunk in _chunks(database, batch_id):
        async for row in _results(database, batch_id, chunk, ok=1):
            yield _shown(batch_id, row)


async def bad_lines(database: Database, batch_id: str, unrun: tuple[str, str] | None) -> AsyncIterator[bytes]:
    """The error file. `unrun`: code and message for the lines without a result; None leaves them out."""
    async for chunk in _chunks(database, batch_id):
        async for row in _results(database, batch_id, chunk, ok=0):
            yield _shown(batch_id, row)
        if unrun is not None:
            last = chunk.first + len(chunk.custom_ids)
            rows = await database.fetch(
                "SELECT number FROM jobs_lines WHERE batch = $1 AND number >= $2 AND number < $3",
                batch_id,
                chunk.first,
                last,
            )
            done = {row["number"] for row in rows}
            for number, custom_id in enumerate(chunk.custom_ids, chunk.first):
                if number not in done:
                    error = {"code": unrun[0], "message": unrun[1]}
                    yield _line(line_id(batch_id, number), custom_id, None, error)


async def _chunks(database: Database, batch_id: str) -> AsyncIterator[Chunk]:
    number = -1
    while True:
        row = await database.fetch_one(
            "SELECT * FROM jobs_chunks WHERE batch = $1 AND number > $2 ORDER BY number LIMIT 1", batch_id, number
        )
        if row is None:
            return
        number = row["number"]
        yield Chunk.of(row)


async def _results(database: Database, batch_id: str, chunk: Chunk, *, ok: int) -> AsyncIterator[Row]:
    """Of one chunk, so many at a time as fit."""
    sizes = await database.fetch(
        "SELECT number, coalesce(length(body), 0) AS size FROM jobs_lines "
        "WHERE batch = $1 AND number >= $2 AND number < $3 AND ok = $4 ORDER BY number",
        batch_id,
        chunk.first,
        chunk.first + len(chunk.custom_ids),
        ok,
    )
    while sizes:
        room, count = PAGE_BYTES, 0
        while count < len(sizes) and (count == 0 or sizes[count]["size"] <= room):
            room -= sizes[count]["size"]
            count += 1
        for row in await database.fetch(
            "SELECT * FROM jobs_lines WHERE batch = $1 AND number >= $2 AND number <= $3 AND ok = $4 ORDER BY number",
            batch_id,
            sizes[0]["number"],
            sizes[count - 1]["number"],
            ok,
        ):
            yield row
        sizes = sizes[count:]


def _shown(batch_id: str, row: Row) -> bytes:
    request_id = line_id(batch_id, row["number"])
    if row["error_code"] is not None:
        error = {"code": row["error_code"], "message": row["error_message"]}
        return _line(request_id, row["custom_id"], None, error)
    body = msgspec.Raw(row["body"] or b"null")
    return _line(
        request_id, row["custom_id"], {"status_code": row["status"], "request_id": request_id, "body": body}, None
    )


def _line(line: str, custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    shown = {"id": line, "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(shown) + b"\n"
