"""The true cost of streams that were cut before their usage came: asked for later at the upstream's `/generation`."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from gateway import dispatch
from gateway.errors import GatewayError
from gateway.exchange import Correction, Cost, Source, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.exchange import AttemptRecord, Exchange
    from gateway.snapshot import Snapshot

log = structlog.get_logger("gateway.corrections")

QUEUE = 1000
# The row appears at OpenRouter after a delay; seconds before each try.
DELAYS = (1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class _Wanted:
    operation_id: str
    exchange_id: str
    upstream: str
    generation_id: str


class Corrections:
    """A bounded queue and one task. What is dropped or given up is counted: `dropped`, `given_up`."""

    def __init__(self, current: Callable[[], Snapshot], delays: tuple[float, ...] = DELAYS) -> None:
        self._current = current
        self._delays = delays
        self._queue: deque[_Wanted] = deque()
        self._wake = asyncio.Event()
        self.dropped = 0
        self.given_up = 0
        self.corrected = 0

    def __call__(self, exchange: Exchange, record: AttemptRecord) -> None:
        upstream = exchange.snapshot.upstreams[record.target.upstream]
        if upstream.kind != "openrouter" or record.generation_id is None or not exchange.snapshot.hooks.usage_corrected:
            return
        if len(self._queue) >= QUEUE:
            self.dropped += 1
            return
        operation = f"{exchange.id}/{record.number}"
        self._queue.append(_Wanted(operation, exchange.id, upstream.name, record.generation_id))
        self._wake.set()

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        task = asyncio.get_running_loop().create_task(self._work(), name="corrections")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                wanted = self._queue.popleft()
                try:
                    await self._correct(wanted)
                except Exception:
                    self.given_up += 1
                    log.exception("correction_failed", operation=wanted.operation_id)

    async def _correct(self, wanted: _Wanted) -> None:
        for delay in self._delays:
            await asyncio.sleep(delay)
            data = await self._generation(wanted)
            if data is not None:
                correction = _correction(wanted, data)
                self.corrected += 1
                await dispatch.run_corrected(self._current().hooks.usage_corrected, correction)
                return
        self.given_up += 1
        log.warning("correction_given_up", operation=wanted.operation_id, tries=len(self._delays))

    async def _generation(self, wanted: _Wanted) -> dict[str, Any] | None:
        upstream = self._current().upstreams.get(wanted.upstream)
        if upstream is None:
            return None
        try:
            async with asyncio.timeout(10):
                response = await upstream.transport.send(
                    "GET", f"/generation?id={wanted.generation_id}", dict(upstream.headers), None
                )
                try:
                    body = await response.read(1 << 20)
                finally:
                    response.close()
            data = msgspec.json.decode(body).get("data") if response.status == 200 else None
        except (GatewayError, TimeoutError, msgspec.DecodeError, AttributeError):
            return None
        return data if isinstance(data, dict) else None


def _correction(wanted: _Wanted, data: dict[str, Any]) -> Correction:
    def count(*names: str) -> int | None:
        return next((v for n in names if isinstance(v := data.get(n), int)), None)

    usage = Usage(
        input_tokens=count("native_tokens_prompt", "tokens_prompt"),
        output_tokens=count("native_tokens_completion", "tokens_completion"),
        cache_read_tokens=count("native_tokens_cached"),
        reasoning_tokens=count("native_tokens_reasoning"),
        source=Source.UPSTREAM,
    )
    total = data.get("total_cost")
    known = isinstance(total, int | float) and not isinstance(total, bool) and 0 <= total < 1e6
    cost = Cost(round(total * 10**12), Source.UPSTREAM) if known and total is not None else Cost()
    return Correction(wanted.operation_id, wanted.exchange_id, usage, cost)
