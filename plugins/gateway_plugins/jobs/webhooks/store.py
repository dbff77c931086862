"""Endpoints and messages in the database."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any

from gateway import BadRequest, NotFound
from gateway_plugins.jobs import api

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.kit import Database, Row, Statements

MOST_ENDPOINTS = 50  # of one tenant: each event makes a message for each
PRUNED_AT_ONCE = 1000  # within one transaction
_ENDPOINT = "id, tenant, name, url, event_types, version, created_at, updated_at, old_until, disabled_at"
_DELIVERY = (
    "id, tenant, event_type, body, status, endpoint, url, created_at, attempts, next_at, finished_at, last_status, "
    "last_error"
)


# --- endpoints -------------------------------------------------------------------------------------------------------


async def create_endpoint(database: Database, tenant: str, name: str, url: str, event_types: Sequence[str]) -> Row:
    """Raises BadRequest, StoreUnavailable."""
    made = api.now()
    row = {
        "id": "we_" + secrets.token_hex(8), "tenant": tenant, "name": name, "url": url,
        "event_types": json.dumps(list(event_types)), "version": 1, "created_at": made, "updated_at": made,
        "old_until": None, "disabled_at": None,
    }  # fmt: skip
    async with database.transaction() as statements:
        there = await statements.fetch_one(
            "SELECT count(*) AS many FROM jobs_webhook_endpoints WHERE tenant = $1 AND url IS NOT NULL", tenant
        )
        if there and there["many"] >= MOST_ENDPOINTS:
            raise BadRequest(f"There are {MOST_ENDPOINTS} webhook endpoints already; delete one first.")
        await statements.execute(
            f"INSERT INTO jobs_webhook_endpoints ({_ENDPOINT}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",  # noqa: S608
            *row.values(),
        )
    return row


async def endpoint(statements: Database | Statements, endpoint_id: str, tenant: str | None = None) -> Row:
    """One that was registered; `tenant`: only if it is theirs. Raises NotFound, StoreUnavailable."""
    row = await statements.fetch_one(
        f"SELECT {_ENDPOINT} FROM jobs_webhook_endpoints WHERE id = $1 AND url IS NOT NULL",  # noqa: S608
        endpoint_id,
    )
    if row is None or tenant not in {None, row["tenant"]}:
        raise NotFound(f"There is no webhook endpoint {endpoint_id[:100]!r}.")
    return row


async def endpoints(
    database: Database, tenant: str | None, *, limit: int, after: str | None = None
) -> tuple[list[Row], bool]:
    """(The newest first, whether there are more). Raises NotFound if there is no `after`, StoreUnavailable."""
    where, values = ["url IS NOT NULL"], []
    if tenant is not None:
        values.append(tenant)
        where.append("tenant = $1")
    if after is not None:
        last = await endpoint(database, after, tenant)
        values += [last["created_at"], after]
        at, key = f"${len(values) - 1}", f"${len(values)}"
        where.append(f"(created_at < {at} OR (created_at = {at} AND id < {key}))")
    rows = await database.fetch(
        f"SELECT {_ENDPOINT} FROM jobs_webhook_endpoints WHERE {' AND '.join(where)} "  # noqa: S608
        f"ORDER BY created_at DESC, id DESC LIMIT {limit + 1}",
        *values,
    )
    return rows[:limit], len(rows) > limit


async def change_endpoint(database: Database, endpoint_id: str, tenant: str | None, changes: Mapping[str, Any]) -> Row:
    """Whoever changes it means it to be called: one that was disabled is called again. Raises as `endpoint`."""
    async with database.transaction() as statements:
        row = await endpoint(statements, endpoint_id, tenant)
        row |= {name: value for name, value in changes.items() if name in {"name", "url"}}
        if "event_types" in changes:
            row["event_types"] = json.dumps(list(changes["event_types"]))
        row |= {"updated_at": api.now(), "disabled_at": None}
        await statements.execute(
            "UPDATE jobs_webhook_endpoints SET name = $1, url = $2, event_types = $3, updated_at = $4, "
            "disabled_at = NULL WHERE id = $5",
            row["name"], row["url"], row["event_types"], row["updated_at"], endpoint_id,
        )  # fmt: skip
    return row


async def delete_endpoint(database: Database, endpoint_id: str, tenant: str | None) -> None:
    """Raises NotFound, StoreUnavailable."""
    await endpoint(database, endpoint_id, tenant)
    await database.execute("DELETE FROM jobs_webhook_endpoints WHERE id = $1", endpoint_id)


async def rotate(database: Database, endpoint_id: str, tenant: str | None, keep: float) -> Row:
    """The next secret; messages are signed by the one before too for `keep` seconds. Raises as `endpoint`."""
    await endpoint(database, endpoint_id, tenant)
    changed = api.now()
    await database.execute(
        "UPDATE jobs_webhook_endpoints SET version = version + 1, old_until = $1, updated_at = $2 WHERE id = $3",
        changed + int(keep * 1000), changed, endpoint_id,
    )  # fmt: skip
    return await endpoint(database, endpoint_id, tenant)


async def own(statements: Database | Statements, owner: str) -> Row | None:
    """The row of one that is not registered: a tenant's, or of the configuration."""
    return await statements.fetch_one(
        f"SELECT {_ENDPOINT} FROM jobs_webhook_endpoints WHERE id = $1",  # noqa: S608
        owner,
    )


async def rotate_own(database: Database, owner: str, keep: float) -> Row | None:
    """As `rotate`, for a tenant's secret, which is there without a row."""
    changed = api.now()
    await database.execute(
        "INSERT INTO jobs_webhook_endpoints (id, version, created_at, updated_at, old_until) "
        "VALUES ($1, 2, $2, $2, $3) ON CONFLICT (id) DO UPDATE "
        "SET version = jobs_webhook_endpoints.version + 1, updated_at = $2, old_until = $3",
        owner, changed, changed + int(keep * 1000),
    )  # fmt: skip
    return await own(database, owner)


async def set_disabled(database: Database, endpoint_id: str, *, disabled: bool) -> None:
    """Registered or of the configuration."""
    changed = api.now()
    await database.execute(
        "INSERT INTO jobs_webhook_endpoints (id, version, created_at, updated_at, disabled_at) "
        "VALUES ($1, 1, $2, $2, $3) ON CONFLICT (id) DO UPDATE SET disabled_at = $3",
        endpoint_id, changed, changed if disabled else None,
    )  # fmt: skip


async def listening(statements: Statements, tenant: str) -> list[Row]:
    """Those that the tenant registered, and (without URL) what is known of the configuration's."""
    return await statements.fetch(
        "SELECT id, url, event_types, disabled_at FROM jobs_webhook_endpoints WHERE tenant = $1 "
        "UNION ALL SELECT id, url, event_types, disabled_at FROM jobs_webhook_endpoints WHERE tenant IS NULL "
        "AND disabled_at IS NOT NULL",
        tenant,
    )


# --- messages --------------------------------------------------------------------------------------------------------


async def add(
    statements: Statements, tenant: str, event_type: str, body: str, receivers: Sequence[tuple[str | None, str | None]]
) -> list[str]:
    """A message for each (endpoint, URL), of which one is None. Returns their ids."""
    made = api.now()
    ids = ["msg_" + secrets.token_hex(12) for _ in receivers]
    await statements.execute_many(
        "INSERT INTO jobs_webhook_deliveries (id, tenant, event_type, body, status, endpoint, url, created_at, "
        "attempts, next_at) VALUES ($1, $2, $3, $4, 'waiting', $5, $6, $7, 0, $7)",
        [(key, tenant, event_type, body, *where, made) for key, where in zip(ids, receivers, strict=True)],
    )
    return ids


async def delivery(database: Database, delivery_id: str) -> Row:
    """Raises NotFound, StoreUnavailable."""
    row = await database.fetch_one(f"SELECT {_DELIVERY} FROM jobs_webhook_deliveries WHERE id = $1", delivery_id)  # noqa: S608
    if row is None:
        raise NotFound(f"There is no message {delivery_id[:100]!r}.")
    return row


async def deliveries(
    database: Database, *, limit: int, status: str | None = None, tenant: str | None = None, endpoint: str | None = None
) -> list[Row]:
    """The newest first."""
    where, values = ["1 = 1"], []
    for name, value in (("status", status), ("tenant", tenant), ("endpoint", endpoint)):
        if value is not None:
            values.append(value)
            where.append(f"{name} = ${len(values)}")
    return await database.fetch(
        f"SELECT {_DELIVERY} FROM jobs_webhook_deliveries WHERE {' AND '.join(where)} "  # noqa: S608
        f"ORDER BY created_at DESC, id DESC LIMIT {limit}",
        *values,
    )


async def record(
    database: Database, row: Row, *, status: str, wait: float, keep: float, last_status: int | None, error: str | None
) -> None:
    """What became of a try; nothing, if somebody else was there meanwhile."""
    at = api.now()
    ended = status != "waiting"
    await database.execute(
        "UPDATE jobs_webhook_deliveries SET status = $1, attempts = attempts + 1, next_at = $2, finished_at = $3, "
        "expires_at = $4, last_status = $5, last_error = $6 WHERE id = $7 AND attempts = $8 AND status = 'waiting'",
        status, at + int(wait * 1000), at if ended else None, at + int(keep * 1000) if ended else None,
        last_status, error, row["id"], row["attempts"],
    )  # fmt: skip


async def resend(database: Database, delivery_id: str) -> Row:
    """As if it were new, under the same id. Raises NotFound, StoreUnavailable."""
    await delivery(database, delivery_id)
    await database.execute(
        "UPDATE jobs_webhook_deliveries SET status = 'waiting', attempts = 0, next_at = $1, finished_at = NULL, "
        "expires_at = NULL WHERE id = $2",
        api.now(), delivery_id,
    )  # fmt: skip
    return await delivery(database, delivery_id)


async def due(database: Database, before: int, *, limit: int, after: tuple[int, str] = (0, "")) -> list[Row]:
    """Messages that should have been tried before then: those that wait longest first."""
    return await database.fetch(
        "SELECT id, next_at FROM jobs_webhook_deliveries WHERE status = 'waiting' AND next_at <= $1 "  # noqa: S608
        f"AND (next_at > $2 OR (next_at = $2 AND id > $3)) ORDER BY next_at, id LIMIT {limit}",
        before, *after,
    )  # fmt: skip


async def count_waiting(database: Database) -> int:
    row = await database.fetch_one("SELECT count(*) AS many FROM jobs_webhook_deliveries WHERE status = 'waiting'")
    return row["many"] if row else 0


async def prune(database: Database) -> int:
    """How many were too old to keep, PRUNED_AT_ONCE at most."""
    return await database.execute(
        "DELETE FROM jobs_webhook_deliveries WHERE id IN "
        "(SELECT id FROM jobs_webhook_deliveries WHERE expires_at < $1 LIMIT $2)",
        api.now(),
        PRUNED_AT_ONCE,
    )
