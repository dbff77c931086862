"""Rows as people see them: JSON, CSV, and what they may ask for."""

from __future__ import annotations

import csv
import io
import json
import time
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from gateway import BadRequest
from gateway.kit import moment
from gateway_plugins.usage.rows import TOKENS
from gateway_plugins.usage.store import GROUPS, Query

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gateway.kit import Row

MOST_ROWS = 1_000
MOST_GROUPS = 10_000
DEFAULT_ROWS = 100
DEFAULT_DAYS = 30
FILTERS = ("tenant", "key", "team", "model", "task")
WORDS = ("from", "to", "group_by", "format", "limit", "after")


def query(given: Mapping[str, str]) -> Query:
    """From texts such as `from=2026-11-01`. Raises BadRequest."""
    now = time.time()
    start = _seconds(given["from"], "from", end=False) if given.get("from") else now - DEFAULT_DAYS * 86400
    end = _seconds(given["to"], "to", end=True) if given.get("to") else now + 86400
    if start >= end:
        raise BadRequest("`from` must be before `to`.", param="from")
    return Query(int(start * 1000), int(end * 1000), **{name: given[name] for name in FILTERS if given.get(name)})


def _seconds(text: str, name: str, *, end: bool) -> float:
    """Since 1970. Raises BadRequest."""
    # a `+` that nobody quoted arrives as a blank
    text = text.replace(" ", "+") if text.count(" ") == 1 and "T" in text else text
    try:
        return moment(text, end=end).timestamp()
    except (ValueError, OverflowError) as error:
        raise BadRequest(f"`{name}`: {error}", param=name) from None


def groups(text: str, allowed: Sequence[str] = GROUPS) -> list[str]:
    """Raises BadRequest."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in allowed:
            raise BadRequest(
                f"`group_by` knows no {name[:50]!r}: {', '.join(allowed)}, or several with commas.", param="group_by"
            )
    return names


def cursor(text: str) -> tuple[int, str]:
    """Raises BadRequest."""
    at, dot, row_id = text.partition(".")
    if not dot or not at.isascii() or not at.isdigit() or len(at) > 15 or not row_id:
        raise BadRequest("`after` must be the `last_id` of the page before.", param="after")
    return int(at), row_id


def request(row: Row) -> dict[str, Any]:
    """One request."""
    return {
        "id": row["id"],
        "object": "usage",
        "request_id": row["request_id"],
        "at": iso(row["at"]),
        "tenant": row["tenant"],
        "key": row["principal"],
        "team": row["team"],
        "user": row["end_user"],
        "endpoint": row["endpoint"],
        "stream": bool(row["stream"]),
        "task": row["task"],
        "rule": row["rule"],
        "model_asked": row["model_asked"],
        "model": row["model_served"],
        "upstream": row["upstream"],
        "attempts": row["attempts"],
        "tries": None if row["tries"] is None else [_try(t) for t in json.loads(row["tries"])],
        **{name: row[name] for name in TOKENS},
        "usage_source": row["usage_source"],
        "cost_usd": usd(row["cost_micro_usd"]),
        "cost_source": row["cost_source"],
        "status": row["status"],
        "outcome": row["outcome"],
        "error_code": row["error_code"],
        "duration_ms": row["duration_ms"],
        "first_content_ms": row["first_content_ms"],
        "upstream_ms": row["upstream_ms"],
        "corrected_at": None if row["corrected_at"] is None else iso(row["corrected_at"]),
    }


def _try(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": found["model"],
        "upstream": found["upstream"],
        "cause": found["cause"],
        "status": found["status"],
        "ms": found["ms"],
        "input_tokens": found["input_tokens"],
        "output_tokens": found["output_tokens"],
        "cost_usd": usd(found["cost_micro_usd"]),
        "cost_source": found["cost_source"],
    }


def sums(row: Row) -> dict[str, Any]:
    """One group, or all."""
    out = {name: row[name] for name in GROUPS if name in row}
    if "day" in out:
        out["day"] = (date(1970, 1, 1) + timedelta(days=out["day"])).isoformat()
    return {
        **out,
        "requests": row["requests"],
        "attempts": row["attempts"],
        **{name: row[name] for name in TOKENS},
        "cost_usd": usd(row["cost_micro_usd"]),
        "cost_unknown": row["cost_unknown"],
    }


def usd(micro: int | None) -> float | None:
    return None if micro is None else micro / 1e6


def iso(milliseconds: int) -> str:
    whole, rest = divmod(milliseconds, 1000)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03d}Z"


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, head: bool = True) -> str:
    """CSV. What callers chose can't be a formula for a spreadsheet; dollars are plain decimals."""
    out = io.StringIO()
    writer = csv.writer(out)
    if head:
        writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return json.dumps(value)
    if isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"}:
        return "'" + value
    return value


SUM_COLUMNS = ("requests", "attempts", *TOKENS, "cost_usd", "cost_unknown")
REQUEST_COLUMNS = (
    "id", "request_id", "at", "tenant", "key", "team", "user", "endpoint", "stream", "task", "rule", "model_asked",
    "model", "upstream", "attempts", *TOKENS, "usage_source", "cost_usd", "cost_source", "status", "outcome",
    "error_code", "duration_ms", "first_content_ms", "upstream_ms", "corrected_at", "tries",
)  # fmt: skip
