"""What the core gives to plugins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import structlog

from gateway.kit.ledger import MemoryLedger
from gateway.metrics import Metrics

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Coroutine
    from pathlib import Path

    from gateway.catalogue import Catalogue
    from gateway.exchange import Exchange, JsonObject, Principal, Reply
    from gateway.kit.ledger import Ledger
    from gateway.settings import Settings
    from gateway.stores.database import Database
    from gateway.stores.redis import RedisStore
    from gateway.tasks import Tasks


@dataclass(frozen=True, slots=True)
class Services:
    """Shared by all plugins of one process; `log` and `plugin_id` are the plugin's own."""

    settings: Settings
    catalogue: Catalogue
    tasks: Tasks
    data_dir: Path | None
    pepper: str = field(repr=False)
    bootstrap_key_hash: str | None = field(default=None, repr=False)
    # What requests count for and hold: Redis's if `services.redis` names one, else this process's own.
    ledger: Ledger = field(default_factory=MemoryLedger, repr=False)
    metrics: Metrics = field(default_factory=Metrics, repr=False)
    redis: RedisStore | None = field(default=None, repr=False)
    opened_database: Database | None = field(default=None, repr=False)
    submitter: Callable[..., Awaitable[Reply]] | None = field(default=None, repr=False)
    serves: bool = True  # False: a process beside the gateway, such as a worker of jobs; a plugin opens no port there
    plugin_id: str = "core"
    log: Any = None

    def of(self, plugin_id: str) -> Services:
        """The same services, with a log that names the plugin."""
        # not bound now: the level that is set when it is used counts
        return replace(self, plugin_id=plugin_id, log=structlog.get_logger("gateway.plugin", plugin=plugin_id))

    @property
    def database(self) -> Database:
        """Connected if a plugin needs it: one that has tables, or `requires_services = ("database",)`."""
        if self.opened_database is None:
            raise RuntimeError("This process has no database.")
        return self.opened_database

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run in the background; kept, logged if it fails, awaited by the drain."""
        return self.tasks.spawn(coro, f"{self.plugin_id}: {name}")

    async def submit(
        self,
        parent: Exchange,
        endpoint: str,
        body: JsonObject,
        *,
        principal: Principal | None = None,
    ) -> Reply:
        """A model call by a plugin's route: the whole pipeline, as `principal` (default: the parent's).

        `endpoint` is a proxied one (`chat/completions`). Streams are not supported here: `stream` is refused.
        Returns whatever a client would get, errors too.
        """
        if self.submitter is None:
            raise RuntimeError("This process serves no requests.")
        return await self.submitter(parent, endpoint, body, principal or parent.principal)
