"""What a hundred routing rules add to a request, in microseconds of `choose_targets` alone: python -m tests.benchmarks.rules"""

import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from plugin_objects import exchange, services

from gateway import Principal
from gateway_plugins import routing

ROUNDS, LOOPS = 15, 500
WHO = Principal("key-1", team="team-42", roles=frozenset({"user"}), claims={"plan": "pro"})
# (what its hundred rules ask, the n-th rule's conditions, a model that meets none of them but the last)
KINDS = {
    "names, as globs": lambda n: {"models": f"vendor-{n}/*"},
    "teams": lambda n: {"teams": f"team-{n + 100}"},
    "teams and names": lambda n: {"teams": [f"team-{n + 100}", "x-*"], "models": "*"},
    "headers": lambda n: {"headers": {"x-tier": f"tier-{n}"}},
    "claims": lambda n: {"claims": {"plan": f"plan-{n}"}},
    "input size": lambda n: {"input_tokens": {"min": 100_000 + n}},
    "tools, images, schema": lambda n: {"tools": True} if n % 3 == 0 else {"images": True} if n % 3 == 1 else {"json_schema": True},
    "hours": lambda n: {"time": {"from": "00:00", "to": "00:01", "days": "mon", "zone": "Europe/Berlin"}},
    "mixed": lambda n: [
        {"models": f"vendor-{n}/*", "time": {"from": "22:00", "to": "06:00"}},
        {"teams": f"team-{n + 100}", "images": True},
        {"tasks": f"task-{n}", "input_tokens": {"min": 50_000}},
        {"headers": {"x-client": f"app-{n}-*"}},
        {"endpoint": "responses", "tools": True},
    ][n % 5],
}  # fmt: skip


def plugin(rules):
    return routing.Plugin(routing.Config.model_validate({"rules": rules}), services())


async def cost(plugin, *, known=True):
    """Microseconds of one call, at the quietest moment. `known`: such a request was there before."""
    asked = exchange(
        {"model": "some/model", "messages": [{"role": "user", "content": "Hello " * 20}]},
        principal=WHO,
        headers={"x-tier": "none", "user-agent": "bench"},
    )
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(LOOPS):
            if not known:
                plugin._table._kept.clear()
            await plugin.choose_targets(asked)
        best = min(best, time.perf_counter() - begun)
    return best / LOOPS * 1e6


async def measured():
    """Kind of rules → microseconds that a hundred of them add: to a request, and to the first of its kind."""
    nothing, nothing_new = await cost(plugin([])), await cost(plugin([]), known=False)
    last = {"name": "last", "match": "some/model", "use": "another/model"}
    found = {}
    for kind, make in KINDS.items():
        routes = plugin([{"name": f"r{n}", "when": make(n), "use": "a/b"} for n in range(99)] + [last])
        found[kind] = await cost(routes) - nothing, await cost(routes, known=False) - nothing_new
    return found


if __name__ == "__main__":
    print(f"{'100 rules by':24} {'adds':>9} {'the first':>9}")
    for kind, (known, new) in asyncio.run(measured()).items():
        print(f"{kind:24} {known:6.1f} µs {new:6.1f} µs")
