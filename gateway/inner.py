"""Requests that no connection brought: a plugin's own (`services.submit`), and late work (`services.run`)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from gateway import late as late_work
from gateway.access import restore_principal
from gateway.client import Collected
from gateway.dialects import DIALECTS
from gateway.errors import BadRequest
from gateway.exchange import Exchange, Reply, RequestView, new_id
from gateway.kit import ledger
from gateway.logs import get_logger
from gateway.pipeline import Run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from gateway.client import Client
    from gateway.exchange import Abandoned, JsonObject, Phase, Principal
    from gateway.finisher import Finisher
    from gateway.late import LateRequest
    from gateway.pipeline import Corrector
    from gateway.services import Commit
    from gateway.snapshot import Snapshot
    from gateway.tasks import Tasks

log = get_logger("gateway.inner")


class InnerCalls:
    """Makes them; needs no server."""

    def __init__(
        self, current: Callable[[], Snapshot], tasks: Tasks, finisher: Finisher, correct: Corrector | None = None
    ) -> None:
        self._current = current
        self._tasks = tasks
        self._finisher = finisher
        self._correct = correct

    async def submit(
        self, parent: Exchange, endpoint: str, body: JsonObject, principal: Principal | None, phase: Phase
    ) -> Reply:
        """A plugin's own model call, through the pipeline as a client's would be."""
        if body.get("stream") and phase != "accept":
            raise BadRequest("A submitted call can't stream.", param="stream")
        exchange = _exchange(parent.snapshot, endpoint, {}, remote=parent.request.remote)
        exchange.request_id = parent.request_id
        exchange.principal = principal
        exchange.parent = parent
        exchange.phase = phase
        client = Collected()
        parent.snapshot.users.enter()  # the parent's own task may outlive its request
        try:
            await self._run(exchange, client, _Given(msgspec.json.encode(body), "application/json")).run()
        finally:
            parent.snapshot.users.leave()
        return Reply(client.status, client.body, client.headers)

    async def run(
        self,
        late: LateRequest,
        client: Client,
        *,
        operation_id: str | None,
        commit: Commit | None,
        charge_abandoned: Abandoned,
    ) -> Exchange:
        """The whole pipeline in phase `run`. Raises PrincipalGone, what `commit` raises, or CancelledError."""
        snapshot = self._current()
        snapshot.users.enter()
        try:
            principal = await restore_principal(snapshot, late.reference, late.principal)
            headers = {**late.headers, "Content-Type": late.content_type}
            exchange = _exchange(snapshot, late.endpoint, headers, operation_id)
            exchange.request_id = late.request_id
            exchange.principal = principal
            exchange.phase = "run"
            exchange.late = late
            exchange.charge_abandoned = charge_abandoned
            exchange.traceparent = late.traceparent
            run = self._run(exchange, client, _Given(late.body, late.content_type), late.deadline)
            try:
                await run.run()
            finally:
                await self._settled(exchange, commit)
        finally:
            snapshot.users.leave()
        return exchange

    def _run(self, exchange: Exchange, client: Client, inbound: _Given, seconds: float | None = None) -> Run:
        return Run(
            exchange,
            client,
            inbound,
            tasks=self._tasks,
            finisher=self._finisher,
            correct=self._correct,
            seconds=seconds,
        )

    async def _settled(self, exchange: Exchange, commit: Commit | None) -> None:
        """Once begun it goes to its end, whoever is cancelled meanwhile."""
        task = self._tasks.spawn(_settle(exchange, commit), "commit")
        cancelled = False
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        task.result()


async def _settle(exchange: Exchange, commit: Commit | None) -> None:
    """The result and the row by `commit`, then the sums. A row that was not committed goes with the sums."""
    store, actual, row = exchange.snapshot.services.ledger, ledger.used(exchange), ledger.recorded(exchange)
    admitted = exchange.admission is None or exchange.admission.levels is not None
    exchange.settlement = late_work.settlement_of(exchange, actual)
    try:
        if commit is not None:
            await commit(exchange, row)
            row = b""
    finally:
        if actual or row:
            store.settle(exchange.id, actual, row, admitted=admitted)


def _exchange(
    snapshot: Snapshot,
    endpoint: str,
    headers: Mapping[str, str],
    operation_id: str | None = None,
    *,
    remote: str | None = None,
) -> Exchange:
    if endpoint not in DIALECTS:
        raise ValueError(f"There is no proxied endpoint {endpoint!r}.")
    route, _ = snapshot.routes.match("POST", f"/v1/{endpoint}")
    sent: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict(headers))
    view = RequestView("POST", route.path, sent, remote=remote)
    return Exchange(operation_id or new_id(), view, snapshot, route)


class _Given:
    """A body that is here already: it was within its limits when it came."""

    def __init__(self, raw: bytes, content_type: str) -> None:
        self._raw = raw
        self.content_type = content_type

    async def read(self, limit: int) -> bytes:
        del limit
        return self._raw

    async def pieces(self, limit: int) -> AsyncIterator[bytes]:
        yield await self.read(limit)
