"""What `metrics` adds to a request, in microseconds: python -m tests.benchmarks.metrics"""

import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from plugin_objects import exchange, services

from gateway import AttemptRecord, Cost, Decision, Outcome, Source, Target, Usage
from gateway_plugins import metrics

ROUNDS, LOOPS = 25, 5000


def ended(*, stream: bool):
    """A request as most are: one attempt, answered."""
    asked = exchange()
    asked.decision = Decision("smart", (Target("a/one", "openrouter"), Target("b/two", "openrouter")))
    now = asked.started
    record = AttemptRecord(asked.attempt(asked.decision.targets[0]), 1, now + 0.001)
    record.first_content, record.finished = now + 0.4, now + 0.9
    asked.attempts.append(record)
    asked.first_content, asked.finished = record.first_content, now + 0.91
    asked.outcome, asked.status, asked.stream = Outcome.OK, 200, stream
    asked.usage = Usage(1200, 300, 800, None, 20, Source.UPSTREAM)
    asked.cost = Cost(123_456_789, Source.UPSTREAM)
    return asked


async def measured(asked) -> float:
    """Its hook, at the quietest moment."""
    plugin = metrics.Plugin(metrics.Config(), services())
    least = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(LOOPS):
            await plugin.request_finished(asked)
        least = min(least, time.perf_counter() - begun)
    return least / LOOPS * 1e6


if __name__ == "__main__":
    whole, streamed = (asyncio.run(measured(ended(stream=stream))) for stream in (False, True))
    print(f"metrics adds {whole:.1f} µs to a whole reply, {streamed:.1f} µs to a stream, nothing to its events")
