"""Messages about what has ended: kept with it in one transaction, then sent until somebody takes them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from yarl import URL

from gateway import BadRequest, NotFound, StoreUnavailable
from gateway.kit import clean
from gateway_plugins.jobs import api
from gateway_plugins.jobs.parts import Again
from gateway_plugins.jobs.settings import Queue as QueueSettings
from gateway_plugins.jobs.webhooks import messages, store
from gateway_plugins.jobs.webhooks.client import Client
from gateway_plugins.jobs.webhooks.directory import Directory
from gateway_plugins.jobs.webhooks.routes import Routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from gateway import Router, Services
    from gateway.kit import Row, Statements
    from gateway_plugins.jobs import settings
    from gateway_plugins.jobs.parts import Handler
    from gateway_plugins.jobs.queue import Queue
    from gateway_plugins.jobs.webhooks.client import Answer

KIND = "delivery"
QUEUE = "webhooks"
LATE_SECONDS = 5.0  # a message that nobody sent by then may have been forgotten
STALE_SECONDS = 60.0
MARGIN_SECONDS = 15.0  # for the database, around a receiver's time
LONGEST_WAIT = 86400.0  # that a receiver may ask for
BUSY_SECONDS = 1.0
# From one process, to one host and of one tenant: receivers that hang, or their name servers, are not to keep all
# others waiting, whatever number of names they have.
MOST_AT_ONCE, MOST_OF_TENANT = 20, 50
PAGE = 500
PRUNE_SECONDS = 10.0  # the rest goes with the next round


class Webhooks:
    """The part."""

    def __init__(self, config: settings.Webhooks, services: Services, queue: Queue) -> None:
        self.config = config
        self.services = services
        self.rules = config.rules()
        self.directory = Directory(config, services.pepper)
        self.handlers: Mapping[str, Handler] = {KIND: self.deliver}
        self._queue = queue
        queue.serve(QUEUE, QueueSettings(timeout=config.timeout + MARGIN_SECONDS))
        self._client: Client | None = None
        # by task: what another has not committed yet would be found missing
        self._sent: WeakKeyDictionary[asyncio.Task[Any], list[str]] = WeakKeyDictionary()
        self._busy: Counter[tuple[str, str]] = Counter()
        self._waiting: tuple[float, int] = (float("-inf"), 0)
        metrics = services.metrics
        self._outcomes = metrics.counter(
            "xenios_webhook_deliveries_total",
            "Tries to deliver a webhook: delivered, failed (to be tried again), dead (given up).",
            ("outcome",),
        )
        self._seconds = metrics.histogram("xenios_webhook_seconds", "Time that a webhook's receiver took.").of()
        self._gauge = metrics.gauge("xenios_webhook_waiting", "Webhooks that are yet to be delivered.", merge="max")

    # --- for the other parts -----------------------------------------------------------------------------------------

    def check(self, url: str, param: str = "webhook") -> None:
        """Raises BadRequest if it never could be called."""
        if not self.config.enabled:
            raise BadRequest("This gateway calls no webhooks.", param=param)
        try:
            self.rules.check(url)
        except ValueError as error:
            raise BadRequest(f"{param} {error}.", param=param) from None

    async def send(
        self,
        statements: Statements,
        tenant: str,
        event_type: str,
        data: Mapping[str, Any],
        *,
        target: str | None = None,
    ) -> None:
        """Within the transaction in which something ended: tell `target` and whoever listens.

        The same task calls `wake` after the commit. Raises StoreUnavailable.
        """
        if not self.config.enabled:
            return
        receivers: list[tuple[str | None, str | None]] = [(None, target)] if target else []
        receivers += [(key, None) for key in await self.directory.listening(statements, tenant, event_type)]
        task = asyncio.current_task()
        if receivers and task is not None:
            ids = await store.add(statements, tenant, event_type, messages.event(event_type, data), receivers)
            self._sent.setdefault(task, []).extend(ids)

    async def wake(self) -> None:
        """Deliver what this task has sent. Never raises: `tidy` makes good what is lost here."""
        task = asyncio.current_task()
        for key in self._sent.pop(task, ()) if task is not None else ():
            try:
                await self._queue.put(KIND, key, queue=QUEUE)
            except StoreUnavailable:
                return

    # --- the work ----------------------------------------------------------------------------------------------------

    async def deliver(self, delivery_id: str) -> None:
        """One try. Raises Again."""
        try:
            wait = await self._try(delivery_id)
        except StoreUnavailable:
            raise Again(LATE_SECONDS) from None
        if wait is not None:
            raise Again(wait)

    async def _try(self, delivery_id: str) -> float | None:
        """Seconds until the next one, if there is to be one."""
        try:
            row = await store.delivery(self.services.database, delivery_id)
        except NotFound:
            return None
        early = row["next_at"] / 1000 - time.time()
        if row["status"] != "waiting" or early > 0.5:
            return early if row["status"] == "waiting" else None
        receiver = await self.directory.receiver(self.services.database, row)
        if receiver is None:
            await self._record(row, "", status=None, error="no_endpoint", dead=True)
            return None
        host = clean(URL(receiver.url).host or "")
        places = (("host", host), ("tenant", row["tenant"]))
        if any(self._busy[p] >= most for p, most in zip(places, (MOST_AT_ONCE, MOST_OF_TENANT), strict=True)):
            return random.uniform(BUSY_SECONDS, 2 * BUSY_SECONDS)  # noqa: S311 - no secret
        self._busy.update(places)
        try:
            answer = await messages.post(self.client, receiver, row["id"], row["body"])
            self._seconds.observe(answer.seconds)
        finally:
            self._busy.subtract(places)
            self._busy = +self._busy
        return await self._judge(row, host, answer)

    async def _judge(self, row: Row, host: str, answer: Answer) -> float | None:
        if answer.failure is None:
            await self._record(row, host, status=answer.status, error=None)
            return None
        if answer.status == 410 and row["endpoint"]:
            await store.set_disabled(self.services.database, row["endpoint"], disabled=True)
            self.services.log.warning("webhook_endpoint_gone", endpoint=row["endpoint"], host=host)
        retries = self.config.retries
        dead = answer.status == 410 or answer.failure == "not_allowed" or row["attempts"] >= len(retries)
        wait = 0.0
        if not dead:
            wait = retries[row["attempts"]] * random.uniform(1.0, 1.1)  # noqa: S311 - no secret
            wait = max(wait, min(answer.retry_after or 0.0, LONGEST_WAIT))
        await self._record(row, host, status=answer.status, error=answer.failure, dead=dead, wait=wait)
        return None if dead else wait

    async def _record(
        self, row: Row, host: str, *, status: int | None, error: str | None, dead: bool = False, wait: float = 0.0
    ) -> None:
        outcome = "dead" if dead else "failed" if error else "delivered"
        await store.record(
            self.services.database,
            row,
            status="waiting" if outcome == "failed" else outcome,
            wait=wait,
            keep=self.config.keep,
            last_status=status,
            error=error,
        )
        self._outcomes.add(1, outcome)
        if error:
            # the host alone: what follows it may be the receiver's secret
            self.services.log.warning(
                "webhook_dead" if dead else "webhook_failed",
                delivery=row["id"], endpoint=row["endpoint"], host=host, attempt=row["attempts"] + 1, error=error,
                status=status, again_in=None if dead else round(wait, 1),
            )  # fmt: skip

    # --- around it ---------------------------------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        if self._client is None:
            raise RuntimeError("The plugin is not open.")
        return self._client

    def register_routes(self, router: Router) -> None:
        if self.config.enabled:
            Routes(self).register(router)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        # loading certificates takes a tenth of a second
        self._client = await asyncio.to_thread(
            Client, self.rules, timeout=self.config.timeout, ca_file=self.config.ca_file
        )
        end = self._gauge.read_from(self._told)
        try:
            yield
        finally:
            end()
            await self.client.close()

    def _told(self) -> Mapping[tuple[str, ...], float]:
        """Only by whom tidies now."""
        at, many = self._waiting
        return {(): many} if time.monotonic() - at < STALE_SECONDS else {}

    async def tidy(self) -> None:
        if not self.config.enabled:
            return
        database = self.services.database
        before, after = api.now() - int(LATE_SECONDS * 1000), (0, "")
        while rows := await store.due(database, before, limit=PAGE, after=after):
            # also those that somebody wants to be sent again, sooner than their next try
            for key in await self._queue.unknown(KIND, [row["id"] for row in rows], within=LATE_SECONDS):
                await self._queue.put(KIND, key, queue=QUEUE)
            after = (rows[-1]["next_at"], rows[-1]["id"])
        self._waiting = (time.monotonic(), await store.count_waiting(database))
        end = time.monotonic() + PRUNE_SECONDS
        while await store.prune(database) == store.PRUNED_AT_ONCE and time.monotonic() < end:
            pass
