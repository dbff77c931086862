"""Is it running, and should traffic come here?"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gateway.exchange import Reply
from gateway.logs import scrub
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.exchange import Exchange
    from gateway.plugins import Instance

PING_SECONDS = 2.0
MOST_WARNINGS = 100


class Health:
    """Handlers of `/health`, `/health/live` and `/health/ready`."""

    def __init__(self, draining: Callable[[], bool]) -> None:
        self._draining = draining
        self._tasks = Tasks()
        # One question at a time to each part: anybody may ask here, as often as he likes.
        self._asked: dict[int, asyncio.Task[dict[str, Any]]] = {}

    async def live(self, _: Exchange) -> Reply:
        """Touches no dependency: 200 while the event loop turns."""
        return Reply(200, data={"status": "ok"})

    async def ready(self, exchange: Exchange) -> Reply:
        """503 only when a part fails without which requests are refused; others are named `degraded` with 200."""
        snapshot = exchange.snapshot
        instances = [i for i in snapshot.instances if hasattr(i.plugin, "ping")]
        parts = dict(zip((i.id for i in instances), await asyncio.gather(*map(self._ping, instances)), strict=True))
        failed = [i for i in instances if parts[i.id]["status"] != "ok"]
        needed = [i.id for i in failed if _policy(i) == "fail"]
        status = "draining" if self._draining() else "failed" if needed else "degraded" if failed else "ok"
        body = {
            "status": status,
            "config": snapshot.hash,
            "plugins": parts,
            "catalogue": snapshot.services.catalogue.status(),
            "warnings": _warnings(snapshot.instances),
        }
        return Reply(503 if status in {"draining", "failed"} else 200, data=body)

    async def _ping(self, instance: Instance) -> dict[str, Any]:
        key = id(instance.plugin)
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = self._tasks.spawn(_ping(instance), f"ping: {instance.id}")
            asked.add_done_callback(lambda _: self._asked.pop(key))
        return await asyncio.shield(asked)


def _warnings(instances: Sequence[Instance]) -> dict[str, list[str]]:
    """What plugins say that somebody should look at soon (`warnings`). It never changes the status."""
    found: dict[str, list[str]] = {}
    for instance in instances:
        told = getattr(instance.plugin, "warnings", None)
        if told is not None:
            try:
                texts = [scrub(str(text)) for text in told()][:MOST_WARNINGS]
            except Exception as error:  # noqa: BLE001 - a plugin's own code
                texts = [f"warnings failed: {type(error).__name__}"]
            if texts:
                found[instance.id] = texts
    return found


def _policy(instance: Instance) -> str:
    """What happens to requests while the part is away: its `on_error`, or what the plugin says for itself."""
    own = getattr(instance.plugin, "on_store_error", None)
    if own is not None:
        return "ignore" if own == "allow" else "fail"
    return instance.blueprint.entry.on_error or str(getattr(instance.plugin, "on_error", "fail"))


async def _ping(instance: Instance) -> dict[str, Any]:
    policy = _policy(instance)
    try:
        async with asyncio.timeout(PING_SECONDS):
            await instance.plugin.ping()
    except Exception as error:  # noqa: BLE001 - whatever it is, the part does not answer
        return {"status": "failed", "policy": policy, "error": type(error).__name__}
    return {"status": "ok", "policy": policy}
