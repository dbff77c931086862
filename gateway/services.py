"""What the core gives to plugins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gateway.kit.ledger import MemoryLedger
from gateway.late import settle
from gateway.logs import get_logger
from gateway.metrics import Metrics

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from pathlib import Path

    from gateway.catalogue import Catalogue
    from gateway.client import Client
    from gateway.exchange import Abandoned, Exchange, JsonObject, Principal, Reply
    from gateway.inner import InnerCalls
    from gateway.kit.ledger import Ledger
    from gateway.late import LateRequest
    from gateway.settings import Settings
    from gateway.stores.database import Database, Statements
    from gateway.stores.redis import RedisStore
    from gateway.tasks import Tasks

Commit: TypeAlias = "Callable[[Exchange, bytes], Awaitable[None]]"
RowWriter: TypeAlias = "Callable[[Statements, bytes], Awaitable[None]]"


class Rows:
    """Rows of requests, within somebody else's transaction: what `exchange.record` made is stored there or nowhere."""

    def __init__(self) -> None:
        self._writers: list[RowWriter] = []

    def written_by(self, writer: RowWriter) -> Callable[[], None]:
        """For the plugin that keeps rows: `writer` stores each once, however often it is given. Returns its end."""
        self._writers.append(writer)
        return lambda: self._writers.remove(writer)

    async def write(self, statements: Statements, row: bytes) -> None:
        """Store it; nothing if nobody keeps rows. Raises StoreUnavailable or StatementError."""
        if row and self._writers:
            await self._writers[-1](statements, row)


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
    inner: InnerCalls | None = field(default=None, repr=False)
    rows: Rows = field(default_factory=Rows, repr=False)
    serves: bool = True  # False: a process beside the gateway, such as a worker of jobs; a plugin opens no port there
    plugin_id: str = "core"
    log: Any = None

    def of(self, plugin_id: str) -> Services:
        """The same services, with a log that names the plugin."""
        # not bound now: the level that is set when it is used counts
        return replace(self, plugin_id=plugin_id, log=get_logger("gateway.plugin", plugin=plugin_id))

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
        phase: Literal["live", "accept"] = "live",
    ) -> Reply:
        """A model call by a plugin's route: the whole pipeline, as `principal` (default: the parent's).

        `endpoint` is a proxied one (`chat/completions`). `phase="accept"`: no model is asked; `lookup_response` answers
        for whoever takes it as a job. Else `stream` is refused. Returns whatever a client would get, errors too.
        """
        if self.inner is None:
            raise RuntimeError("This process handles no requests.")
        return await self.inner.submit(parent, endpoint, body, principal or parent.principal, phase)

    async def run(
        self,
        late: LateRequest,
        client: Client,
        *,
        operation_id: str | None = None,
        commit: Commit | None = None,
        charge_abandoned: Abandoned = "operator",
    ) -> Exchange:
        """A request that was kept, now: the whole pipeline in phase `run`, as the principal that is restored.

        `client` gets the answer as a connection would, errors too. `operation_id`: a new one for each try; row and
        sums hang on it. `commit(exchange, row)` is awaited once, when the request is over: it stores result and usage
        row (`rows.write`) in one transaction; what it raises is raised here, and the row then goes with the sums.
        Afterwards what was reserved is settled. `exchange.settlement`, stored with the result, is for `settle_late`.
        `charge_abandoned`: who pays for what was reserved if this worker dies.

        Cancelling it closes the call of the upstream, and what came until then is committed all the same. Raises
        PrincipalGone: who asked may not any more; StoreUnavailable or PluginError: nobody could tell, try again.
        """
        if self.inner is None:
            raise RuntimeError("This process handles no requests.")
        return await self.inner.run(
            late, client, operation_id=operation_id, commit=commit, charge_abandoned=charge_abandoned
        )

    def settle_late(self, settlement: Sequence[Any] | None) -> None:
        """Settle what a worker committed and did not live to settle; doing it twice changes nothing. Does not wait."""
        settle(self.ledger, settlement)
