"""What `fallback` adds to a request whose first attempt is good, in microseconds: python -m tests.benchmarks.fallback"""

import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from plugin_objects import exchange, services

from gateway import AttemptRecord, Decision, Target
from gateway_plugins import fallback

ROUNDS, LOOPS = 25, 5000


async def measured():
    """(its layer around the attempt, telling its circuit of the attempt's end), at the quietest moment."""
    plugin, asked = fallback.Plugin(fallback.Config(), services()), exchange()
    asked.decision = Decision("smart", (Target("a/one", "openrouter"), Target("b/two", "openrouter")))
    attempt, reply = asked.attempt(asked.decision.targets[0]), SimpleNamespace(stream=None, body=b"{}")
    record = AttemptRecord(attempt, 1, time.monotonic())

    async def call_next(attempt):
        return reply

    alone = layer = told = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(LOOPS):
            await call_next(attempt)
        alone, begun = min(alone, time.perf_counter() - begun), time.perf_counter()
        for _ in range(LOOPS):
            await plugin.around_upstream(asked, attempt, call_next)
        layer, begun = min(layer, time.perf_counter() - begun), time.perf_counter()
        for _ in range(LOOPS):
            plugin.attempt_finished(asked, record)
        told = min(told, time.perf_counter() - begun)
    return (layer - alone) / LOOPS * 1e6, told / LOOPS * 1e6


if __name__ == "__main__":
    layer, told = asyncio.run(measured())
    print(f"fallback adds {layer + told:.1f} µs: {layer:.1f} around the attempt, {told:.1f} at its end")
