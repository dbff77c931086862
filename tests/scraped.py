"""What `/metrics` tells, read as Prometheus reads it; and when a reload is over, after which it must still be right."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from gateway.kit.testing import Gateway
    from gateway.snapshot import Snapshot


async def scraped(gateway: Gateway, name: str) -> dict[tuple[str, ...], float]:
    """{label values, in the order of the labels' names: value} of one metric; the gateway has the plugin `metrics`."""
    reply = await gateway.get("/metrics")
    assert (reply.status, reply.headers["Content-Type"].partition(";")[0]) == (200, "text/plain"), reply.body
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
        if sample.name == name
    }


async def closed(gateway: Gateway, old: Snapshot) -> None:
    """The plugins of a configuration that is no longer in force have closed."""
    worker = gateway.worker
    async with asyncio.timeout(10):
        while old in worker._open or worker._closing:
            await asyncio.sleep(0.01)
