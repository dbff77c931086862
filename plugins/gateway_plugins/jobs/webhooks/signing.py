"""Secrets that are stored nowhere, and signatures by them: https://www.standardwebhooks.com."""

from __future__ import annotations

import base64
import hmac
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from standardwebhooks import Webhook

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX = "whsec_"


def secret(pepper: str, owner: str, version: int) -> str:
    """Of an endpoint or a tenant. Whoever has the database alone can't know it."""
    key = hmac.digest(pepper.encode(), f"webhook secret\0{owner}\0{version}".encode(), "sha256")
    return PREFIX + base64.b64encode(key).decode()


def hint(text: str) -> str:
    return f"{text[: len(PREFIX) + 3]}…{text[-3:]}"


def headers(message: str, body: str, secrets: Sequence[str], now: float) -> dict[str, str]:
    """Those of Standard Webhooks; a signature by each secret."""
    at = datetime.fromtimestamp(int(now), UTC)
    return {
        "webhook-id": message,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": " ".join(Webhook(key).sign(message, at, body) for key in secrets),
    }
