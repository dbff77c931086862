"""What plugins' own routes are asked in a query."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from typing import TYPE_CHECKING

from gateway.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.exchange import Exchange

LONGEST = 500


def query_of(exchange: Exchange, known: Sequence[str]) -> dict[str, str]:
    """The parameters, of which each must be known. Raises BadRequest that names the wrong one."""
    given = exchange.request.query
    for name, value in given.items():
        if name not in known:
            raise BadRequest(
                f"There is no query parameter {name[:100]!r} here; there are {', '.join(known)}.", param=name[:100]
            )
        if "\0" in value:
            raise BadRequest(f"`{name}` holds a NUL.", param=name)
        if len(value) > LONGEST:
            raise BadRequest(f"`{name}` is longer than {LONGEST} characters.", param=name)
    return given


def limit_of(given: Mapping[str, str], *, default: int, most: int) -> int:
    """The parameter `limit`. Raises BadRequest."""
    text = given.get("limit")
    if text is None:
        return default
    # Python itself refuses numbers of thousands of digits
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise BadRequest(f"`limit` must be a number from 1 to {most}.", param="limit")
    return int(text)


def moment(text: str, *, end: bool) -> datetime:
    """An ISO date or time; UTC without an offset. A date alone is its beginning, or with `end` its end.

    Raises ValueError.
    """
    try:
        if len(text) == 10:
            return datetime.combine(date.fromisoformat(text) + timedelta(days=end), time_of_day(), UTC)
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ValueError("is not an ISO date or time, such as 2027-01-31 or 2027-01-31T12:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
