"""Which metrics and labels exist, and what values those labels may have that deploy/ asks for by name."""

from __future__ import annotations

import asyncio
import functools

from gateway import Outcome
from gateway.errors import Cause
from gateway.kit.testing import Gateway
from tests.deploy.promql import Known

SCRAPED = frozenset({"job", "instance"})  # Prometheus's own


@functools.cache
def metrics() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name to kind and labels of each instrument of a gateway that runs all plugins which count."""
    return asyncio.run(_metrics())


async def _metrics() -> dict[str, tuple[str, tuple[str, ...]]]:
    plugins = ["metrics", "routing", "rate_limit", "budgets", "usage", "fallback", "jobs"]
    async with Gateway.test(plugins=plugins, settings={"services": {"redis": "embedded"}}) as gateway:
        return {family.name: (family.kind, family.labels) for family in await gateway.worker.metrics.read()}


def known() -> Known:
    """Each series that may be asked for, with its labels."""
    found: dict[str, frozenset[str]] = {
        "up": SCRAPED,
        "ALERTS": SCRAPED
        | {
            "alertname",
            "alertstate",
            "severity",
            "model",
            "store",
            "plugin",
            "budget",
            "limit",
            "hook",
            "buffer",
            "queue",
        },
    }
    for name, (kind, labels) in metrics().items():
        own = SCRAPED | set(labels)
        if kind == "histogram":
            found |= {f"{name}_bucket": own | {"le"}, f"{name}_sum": own, f"{name}_count": own}
        else:
            found[name] = own
    return found


VALUES = {
    "outcome": {*Outcome, "delivered", "failed", "dead"},  # of webhooks, too
    "cause": {"ok", *Cause},
    "kind": {"input", "output", "cache_read", "cache_write", "reasoning", "requests", "tokens", "concurrent"},
    "stream": {"true", "false"},
    "result": {"done", "refused"},
}
