"""Does this tree's gateway still answer ordinary requests? Exits 1 and says why if not.

A break has to break its clause, not the gateway: code that crashes would fail any test, and so prove none.
"""

from __future__ import annotations

import asyncio
import sys

import structlog

from gateway.kit.testing import Gateway
from gateway.kit.upstream import Error, ScriptedUpstream

PLUGINS = ["access_log", "api_keys", "routing", "fallback"]


async def main() -> list[str]:
    upstream = ScriptedUpstream()
    upstream.on("bad/model", Error(400))
    with structlog.testing.capture_logs() as logs:
        async with Gateway.test(plugins=PLUGINS, upstream=upstream) as gw:
            found = [
                ("a chat", 200, (await gw.chat()).status),
                ("a stream", 200, (await gw.chat(stream=True)).status),
                ("a refused chat", 400, (await gw.chat(model="bad/model")).status),
                ("a caller without key", 401, (await gw.get("/v1/models", headers={"Authorization": ""})).status),
            ]
    wrong = [f"{what} is answered with {got}, not {due}" for what, due, got in found if got != due]
    return wrong + [
        f"{log['event']}: {log['exc_info']!r}" for log in logs if isinstance(log.get("exc_info"), Exception)
    ]


if __name__ == "__main__":
    sys.exit("; ".join(asyncio.run(main())) or 0)
