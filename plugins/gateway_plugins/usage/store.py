"""Rows into the database, old ones out of it, and what it can be asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import StatementError
from gateway_plugins.usage.rows import ABANDONED, Corrected, Request, Used, abandoned, corrected, decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway.kit import Database, PendingRow, Row, Statements

DAY = 86_400_000
PRUNED_AT_ONCE = 5_000

_COLUMNS = Request.__struct_fields__
_INSERT = (
    f"INSERT INTO usage_requests ({', '.join(_COLUMNS)}) "  # noqa: S608 - our own names
    f"VALUES ({', '.join(f'${i}' for i in range(1, len(_COLUMNS) + 1))}) "
    f"ON CONFLICT (id) DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in _COLUMNS if c != 'id')} "
    f"WHERE usage_requests.outcome = '{ABANDONED}' AND excluded.outcome <> '{ABANDONED}'"
)
_SUMS = Used.__struct_fields__
_COUNTS = ("requests", "attempts", "cost_unknown")

# What a request's row says, named as what it can be grouped by.
_LIVE = f"""
    SELECT at / {DAY} AS day, tenant, principal AS key, team, model_served AS model, task, endpoint, outcome,
      1 AS requests, coalesce(attempts, 0) AS attempts, {", ".join(_SUMS)},
      CASE WHEN model_served IS NOT NULL AND cost_micro_usd IS NULL THEN 1 ELSE 0 END AS cost_unknown
    FROM usage_requests
"""  # noqa: S608 - our own names
_OLD = f"""
    SELECT day, tenant, principal AS key, nullif(team, '') AS team, nullif(model, '') AS model,
      nullif(task, '') AS task, endpoint, outcome, requests, attempts, {", ".join(_SUMS)}, cost_unknown
    FROM usage_days
"""  # noqa: S608 - our own names


# --- in --------------------------------------------------------------------------------------------------------------


async def store(database: Database, rows: Sequence[PendingRow]) -> list[tuple[str, str]]:
    """Each row once, however often it comes. Raises StoreUnavailable.

    Returns (operation, reason) of those that can't be stored, now or ever.
    """
    requests: list[tuple[PendingRow, Request]] = []
    corrections: list[tuple[PendingRow, Corrected]] = []
    bad: list[tuple[str, str]] = []
    for row in rows:
        try:
            found = decode(row.payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            bad.append((row.op, str(error)))
            continue
        if isinstance(found, Corrected):
            corrections.append((row, found))
        else:
            requests.append((row, found if row.abandoned is None else abandoned(found, row.abandoned)))
    try:
        await _write(database, [r for _, r in requests], [c for _, c in corrections])
    except StatementError:
        # one of them spoils it for all
        for row, request in requests:
            try:
                await _write(database, [request], [])
            except StatementError as error:
                bad.append((row.op, str(error)))
        for row, correction in corrections:
            try:
                await _write(database, [], [correction])
            except StatementError as error:
                bad.append((row.op, str(error)))
    return bad


async def write(statements: Statements, payload: bytes) -> None:
    """One row within somebody else's transaction; the same again changes nothing. Raises StoreUnavailable."""
    found = decode(payload)
    if isinstance(found, Corrected):
        await _correct(statements, found)
    else:
        await statements.execute(_INSERT, *_values(found))


async def _write(database: Database, requests: Sequence[Request], corrections: Sequence[Corrected]) -> None:
    async with database.transaction() as statements:
        if requests:
            await statements.execute_many(_INSERT, [_values(request) for request in requests])
        for correction in corrections:
            await _correct(statements, correction)


def _values(request: Request) -> list[Any]:
    values: dict[str, Any] = {name: getattr(request, name) for name in _COLUMNS}
    values["stream"] = int(request.stream)
    values["tries"] = None if request.tries is None else json.dumps([msgspec.structs.asdict(t) for t in request.tries])
    return list(values.values())


async def _correct(statements: Statements, truth: Corrected) -> None:
    row = await statements.fetch_one(
        f"SELECT {', '.join(_SUMS)}, usage_source, cost_source, tries FROM usage_requests WHERE id = $1",  # noqa: S608
        truth.id,
    )
    if row is None or row["tries"] is None:
        return
    changes = corrected(row, json.loads(row["tries"]), truth)
    if changes is None:
        return
    changes["tries"] = json.dumps(changes["tries"])
    places = ", ".join(f"{name} = ${i}" for i, name in enumerate(changes, 2))
    await statements.execute(f"UPDATE usage_requests SET {places} WHERE id = $1", truth.id, *changes.values())  # noqa: S608


async def prune(database: Database, before: int, *, roll_up: bool) -> int:
    """Rows older than `before` (ms) become sums per day, or nothing; how many those were. Raises StoreUnavailable.

    A bounded number at a time, all or none. Several gateways may do so at once.
    """
    total = 0
    while True:
        async with database.transaction() as statements:
            lock = " FOR UPDATE SKIP LOCKED" if database.dialect == "postgresql" else ""
            old = await statements.fetch(
                f"SELECT id, at FROM usage_requests WHERE at < $1 ORDER BY at LIMIT {PRUNED_AT_ONCE}{lock}",  # noqa: S608
                before,
            )
            if not old:
                return total
            ids = [row["id"] for row in old]
            if roll_up:
                await _roll_up(statements, ids)
            await statements.execute_many("DELETE FROM usage_requests WHERE id = $1", [(i,) for i in ids])
        total += len(old)
        if len(old) < PRUNED_AT_ONCE:
            return total


async def prune_sums(database: Database, before: int) -> None:
    """Sums of days before this one (since 1970, UTC), a day at a time. Raises StoreUnavailable."""
    while True:
        async with database.transaction() as statements:
            oldest = await statements.fetch_one("SELECT min(day) AS day FROM usage_days WHERE day < $1", before)
            if oldest is None or oldest["day"] is None:
                return
            await statements.execute("DELETE FROM usage_days WHERE day = $1", oldest["day"])


_DAY_KEYS = ("day", "tenant", "principal", "team", "model", "task", "endpoint", "outcome")
_DAY_VALUES = (*_COUNTS, *_SUMS)
_ADD_DAYS = (
    f"INSERT INTO usage_days ({', '.join((*_DAY_KEYS, *_DAY_VALUES))}) "  # noqa: S608 - our own names
    f"VALUES ({', '.join(f'${i}' for i in range(1, len(_DAY_KEYS) + len(_DAY_VALUES) + 1))}) "
    f"ON CONFLICT ({', '.join(_DAY_KEYS)}) DO UPDATE SET "
    + ", ".join(
        f"{c} = usage_days.{c} + excluded.{c}"
        if c in _COUNTS
        # unknown and known make known
        else f"{c} = coalesce(usage_days.{c} + excluded.{c}, usage_days.{c}, excluded.{c})"
        for c in _DAY_VALUES
    )
)


async def _roll_up(statements: Statements, ids: Sequence[str]) -> None:
    sums: dict[tuple[Any, ...], list[int | None]] = {}
    for start in range(0, len(ids), 500):
        part = ids[start : start + 500]
        places = ", ".join(f"${i}" for i in range(1, len(part) + 1))
        for row in await statements.fetch(f"{_LIVE} WHERE id IN ({places})", *part):
            key = (row["day"], row["tenant"], row["key"], *(row[n] or "" for n in ("team", "model", "task")))
            key += (row["endpoint"], row["outcome"])
            before = sums.setdefault(key, [None] * len(_DAY_VALUES))
            for i, name in enumerate(_DAY_VALUES):
                if row[name] is not None:
                    before[i] = (before[i] or 0) + row[name]
    await statements.execute_many(_ADD_DAYS, [(*key, *values) for key, values in sums.items()])


# --- out -------------------------------------------------------------------------------------------------------------

GROUPS = ("day", "tenant", "key", "team", "model", "task", "endpoint", "outcome")


@dataclass(frozen=True)
class Query:
    """Which requests: from `start` to before `end` (ms since 1970); what else is given must be so."""

    start: int
    end: int
    tenant: str | None = None
    key: str | None = None
    team: str | None = None
    model: str | None = None
    task: str | None = None

    def conditions(self, time: str, start: int, end: int, names: dict[str, str]) -> tuple[str, list[Any]]:
        values: list[Any] = [start, end]
        where = [f"{time} >= $1", f"{time} < $2"]
        for name in ("tenant", "key", "team", "model", "task"):
            value = getattr(self, name)
            if value is not None:
                values.append(value)
                where.append(f"{names.get(name, name)} = ${len(values)}")
        return " WHERE " + " AND ".join(where), values


_LIVE_NAMES = {"key": "principal", "model": "model_served"}
_OLD_NAMES = {"key": "principal"}


async def grouped(database: Database, query: Query, by: Sequence[str], limit: int) -> tuple[list[Row], bool]:
    """(sums per group, are there more): by day, dearest first. Days that were rolled up count whole."""
    live, values = query.conditions("at", query.start, query.end, _LIVE_NAMES)
    old, _ = query.conditions("day", 0, 0, _OLD_NAMES)
    # the same values, but for the days
    places = {1: len(values) + 1, 2: len(values) + 2}
    old = old.replace("day >= $1", f"day >= ${places[1]}").replace("day < $2", f"day < ${places[2]}")
    values += [query.start // DAY, -(-query.end // DAY)]
    sums = ", ".join(f"CAST(sum({name}) AS BIGINT) AS {name}" for name in (*_COUNTS, *_SUMS))
    names = ", ".join(by)
    order = ", ".join([*(["day"] if "day" in by else []), "coalesce(sum(cost_micro_usd), 0) DESC", *by])
    rows = await database.fetch(
        f"SELECT {names}{', ' if by else ''}{sums} FROM ({_LIVE}{live} UNION ALL {_OLD}{old}) AS used "  # noqa: S608
        + (f"GROUP BY {names} ORDER BY {order} LIMIT {limit + 1}" if by else ""),
        *values,
    )
    return rows[:limit], len(rows) > limit


async def listed(
    database: Database, query: Query, limit: int, after: tuple[int, str] | None
) -> tuple[list[Row], tuple[int, str] | None]:
    """(rows, newest first; where the next page begins). `after`: where the page before ended."""
    where, values = query.conditions("at", query.start, query.end, _LIVE_NAMES)
    if after is not None:
        values += after
        where += f" AND (at, id) < (${len(values) - 1}, ${len(values)})"
    rows = await database.fetch(
        f"SELECT {', '.join(_COLUMNS)}, corrected_at FROM usage_requests{where} "  # noqa: S608 - our own names
        f"ORDER BY at DESC, id DESC LIMIT {limit + 1}",
        *values,
    )
    shown = rows[:limit]
    return shown, (shown[-1]["at"], shown[-1]["id"]) if len(rows) > limit else None


async def one(database: Database, request_id: str, tenant: str | None) -> Row | None:
    """By our id, else by the client's, then the newest; of this tenant alone."""
    own = "" if tenant is None else " AND tenant = $2"
    values = [request_id] if tenant is None else [request_id, tenant]
    for column in ("id", "request_id"):
        row = await database.fetch_one(
            f"SELECT {', '.join(_COLUMNS)}, corrected_at FROM usage_requests "  # noqa: S608 - our own names
            f"WHERE {column} = $1{own} ORDER BY at DESC LIMIT 1",
            *values,
        )
        if row is not None:
            return row
    return None


def total(rows: Iterable[Row]) -> Row:
    """One row without a group, in which counts may be NULL where there was none."""
    row = next(iter(rows))
    return {**row, **{name: row[name] or 0 for name in _COUNTS}}
