"""Types of settings of a key, in the YAML and in the database."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

from gateway.kit import moment


def _end_of_life(value: object) -> object:
    """An aware datetime. A date alone is good until its end, a time without zone is UTC."""
    if isinstance(value, str):
        return moment(value, end=True)
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime.combine(value + timedelta(days=1), time_of_day(), UTC)
    raise ValueError("must be an ISO date or time, such as 2027-01-31")


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


Expiry = Annotated[
    datetime, BeforeValidator(_end_of_life), WithJsonSchema({"type": "string", "examples": ["2027-01-31"]})
]
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one_or_many)]
# Text that ends up in logs and tables: no control characters.
Plain = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
