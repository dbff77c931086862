"""What `tracing` adds to a request with one attempt, in microseconds: python -m tests.benchmarks.tracing"""

import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from plugin_objects import exchange, services

from gateway import AttemptRecord, Cost, Decision, Outcome, Principal, Source, Target, Usage
from gateway_plugins import tracing
from gateway_plugins.tracing import export, otlp

ROUNDS, LOOPS = 25, 2000
TARGET = Target("openai/gpt-5-mini", "openrouter")
SENT = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}


def requests(headers):
    """Requests that have had their answer, whose hooks are still to be called."""
    settings = SimpleNamespace(base_url="https://openrouter.ai/api/v1")
    upstreams = {"openrouter": SimpleNamespace(kind="openrouter", settings=settings, simulated=False)}
    made = []
    for _ in range(LOOPS):
        asked = exchange({"model": TARGET.model, "messages": [], "temperature": 0.5}, headers=headers)
        asked.snapshot.upstreams = upstreams
        asked.principal, asked.decision = Principal("app", tenant="acme"), Decision("smart", (TARGET,), rule="r")
        record = AttemptRecord(asked.attempt(TARGET), 1, asked.started, asked.started + 0.1, asked.started + 0.2, 200)
        record.usage, record.cost = Usage(10, 5, source=Source.UPSTREAM), Cost(10**8, Source.UPSTREAM)
        asked.attempts.append(record)
        asked.usage, asked.cost = record.usage, record.cost
        asked.status, asked.outcome, asked.finished = 200, Outcome.OK, asked.started + 0.3
        made.append(asked)
    return made


async def measured(headers, **config):
    """(the hooks of one request, what sending its spans takes later), both at the quietest moment."""
    config = tracing.Config(**config)
    plugin = tracing.Plugin(config, services())
    plugin._exporter = exporter = export.Exporter(config, None, services().metrics.dropped("spans"))
    about, hooks, sending = export.resource(config), float("inf"), float("inf")
    for _ in range(ROUNDS):
        asked = requests(headers)
        begun = time.perf_counter()
        for one in asked:
            await plugin.request_received(one)
            await plugin.request_finished(one)
        hooks, begun = min(hooks, time.perf_counter() - begun), time.perf_counter()
        export._gzip(otlp.request(about, "1", exporter._waiting))
        sending = min(sending, time.perf_counter() - begun)
        exporter._waiting.clear()
        exporter._bytes = 0
    return hooks / LOOPS * 1e6, sending / LOOPS * 1e6


async def main():
    for what, headers, config in (
        ("unsampled, new trace", {}, {"sample_ratio": 0}),
        ("unsampled, client's trace", {"traceparent": SENT["traceparent"][:-1] + "0"}, {}),
        ("sampled, new trace", {}, {}),
        ("sampled, client's trace", SENT, {}),
    ):
        hooks, sending = await measured(headers, **config)
        print(f"{what}: {hooks:.1f} µs, and {sending:.1f} µs to send it")


if __name__ == "__main__":
    asyncio.run(main())
