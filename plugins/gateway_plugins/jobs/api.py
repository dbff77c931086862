"""What the routes of all parts are made of: whose things are asked for, and the list that OpenAI's SDKs read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway import Exchange


def now() -> int:
    """Milliseconds since 1970, as all tables have them."""
    return int(time.time() * 1000)


def tenant_of(exchange: Exchange) -> str:
    return exchange.principal.tenant if exchange.principal else ""


def is_admin(exchange: Exchange) -> bool:
    return exchange.principal is not None and exchange.principal.admin


def listed(data: Sequence[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """One page, whose entries have an `id`."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": more,
    }
