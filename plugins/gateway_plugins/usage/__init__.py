"""Usage: one row per request in the database: who asked, which models answered or failed, tokens, cost, times, outcome.

A row is recorded with the request's settlement in the ledger, both or neither, so that what budgets spent is what the
rows add up to. From there one worker at a time brings rows into the database, within about a second; while that is
away they wait: in Redis, or with `services.redis: memory` in this process, which loses up to half a second of rows if
it is killed. Requests without a valid key leave none. Never a prompt, an answer or a secret.

`GET /v1/usage` shows callers their own tenant's; `/admin/usage` and `xenios usage` all of it. Rows older than `keep`
become sums per day, and these go when they are older than `keep_sums`.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway import Duration, StoreUnavailable, Tasks, hookimpl
from gateway.kit import Schema
from gateway_plugins.usage.rows import correction_row, request_row

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gateway import Correction, Exchange, Router, Services

MOVE_SECONDS = 0.5
BATCH = 500
RETRY_SECONDS = 1.0
PRUNE_SECONDS = 600.0
LAST_MOVE_SECONDS = 5.0


class Config(BaseModel):
    """How long rows are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Duration = Field(
        90 * 86400.0, ge=86400, le=3650 * 86400, description="How old a request's row may become. Default 90d."
    )
    roll_up: bool = Field(
        True, description="Keep of older rows their sums by day, key, model, task and endpoint. Default true."
    )
    keep_sums: Duration | None = Field(
        None,
        ge=86400,
        le=3650 * 86400,
        description="How old such sums may become; longer than `keep`. They are a row a day for each key or user, "
        "model and so on, of 200 bytes. Default: for ever.",
    )

    @model_validator(mode="after")
    def _sums_outlive_rows(self) -> Config:
        if self.keep_sums is not None and self.keep_sums <= self.keep:
            raise ValueError("keep_sums must be longer than keep; roll_up: false keeps no sums at all")
        return self


class Plugin:
    """Keeps a row of each request."""

    Config: TypeAlias = Config
    reads_settings = ()
    schema = Schema("usage", Path(__file__).parent)
    commands = "`xenios usage` comes with the plugin usage."
    # Requests go on while rows can't be stored: they wait.
    on_store_error: Literal["allow"] = "allow"

    def __init__(self, config: Config, services: Services) -> None:
        self._config = config
        self._services = services
        self._tasks = Tasks()
        self._waiting = services.metrics.gauge(
            "xenios_usage_rows_waiting",
            "Rows of requests that are not in the database yet, about: it is a second behind.",
        )
        self._dropped = services.metrics.dropped("usage")

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        from gateway_plugins.usage.store import write  # noqa: PLC0415 - the command line does without

        moving = self._tasks.spawn(self._keep_moving(), "usage: rows")
        pruning = self._tasks.spawn(self._keep_pruning(), "usage: old rows")
        no_longer_shown = self._waiting.read_from(self._shown_waiting)
        no_longer_written = self._services.rows.written_by(write)
        try:
            yield
        finally:
            moving.cancel()
            pruning.cancel()
            no_longer_written()
            await self._tasks.drain(0)
            await self._move_the_last()
            no_longer_shown()

    def _shown_waiting(self) -> dict[tuple[str, ...], float]:
        return {(): self._services.ledger.waiting_rows}

    async def ping(self) -> None:
        await self._services.database.ping()

    @hookimpl
    def register_routes(self, router: Router) -> None:
        from gateway_plugins.usage.routes import Routes  # noqa: PLC0415 - a server's business

        Routes(self._services.database).register(router)

    @hookimpl
    def register_commands(self, cli: Any) -> None:
        from gateway_plugins.usage.commands import add_commands  # noqa: PLC0415 - a command's business

        add_commands(self, cli)

    @hookimpl
    async def request_received(self, exchange: Exchange) -> None:
        if exchange.route.proxied:
            exchange.record = request_row

    @hookimpl
    async def usage_corrected(self, correction: Correction) -> None:
        self._services.ledger.settle(correction.operation_id, (), correction_row(correction))

    @hookimpl
    async def explain(self, exchange: Exchange) -> Sequence[str] | None:
        who = exchange.principal
        return None if who is None else [f"usage: a row for tenant {who.tenant}"]

    # --- from the ledger to the database ---------------------------------------------------------------------------

    async def _keep_moving(self) -> None:
        while True:
            await asyncio.sleep(MOVE_SECONDS)
            try:
                while await self._move() == BATCH:
                    pass
            except StoreUnavailable:
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                self._services.log.exception("usage_rows_not_moved")
                await asyncio.sleep(RETRY_SECONDS)

    async def _move(self) -> int:
        """How many rows were moved. Raises StoreUnavailable."""
        from gateway_plugins.usage import store  # noqa: PLC0415 - the command line does without

        ledger = self._services.ledger
        rows = await ledger.rows(BATCH)
        if dropped := ledger.take_dropped_rows():
            self._services.log.error("usage_rows_dropped", rows=dropped)
            self._dropped.value += dropped
        if rows:
            for op, reason in await store.store(self._services.database, rows):
                self._services.log.error("usage_row_unusable", operation=op, error=reason[:300])
                self._dropped.value += 1
            await ledger.drop_rows([row.id for row in rows])
        return len(rows)

    async def _move_the_last(self) -> None:
        ledger = self._services.ledger
        try:
            async with asyncio.timeout(LAST_MOVE_SECONDS):
                await ledger.flush()
                while await self._move():
                    pass
                await ledger.leave_rows()
        except (StoreUnavailable, TimeoutError):
            left = await _count(ledger)
            if left:
                self._services.log.warning("usage_rows_left", rows=left)

    async def _keep_pruning(self) -> None:
        from gateway_plugins.usage import store  # noqa: PLC0415 - as above

        while True:
            before = int((time.time() - self._config.keep) * 1000)
            # whole days: the sums of a day are complete
            before -= before % store.DAY
            try:
                pruned = await store.prune(self._services.database, before, roll_up=self._config.roll_up)
                if self._config.keep_sums is not None:
                    await store.prune_sums(self._services.database, int((time.time() - self._config.keep_sums) / 86400))
            except StoreUnavailable:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except Exception:
                self._services.log.exception("usage_rows_not_pruned")
                pruned = 0
            if pruned:
                self._services.log.info("usage_rows_pruned", rows=pruned)
            await asyncio.sleep(PRUNE_SECONDS)


async def _count(ledger: Any) -> int:
    try:
        return len(await ledger.rows(BATCH))
    except StoreUnavailable:
        return 0
