"""The true cost of streams that were cut before their usage came: asked for later at the upstream's `/generation`."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import dispatch
from gateway.errors import GatewayError
from gateway.exchange import Correction, Cost, Source, Usage
from gateway.logs import get_logger, worth_a_line
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.exchange import AttemptRecord, Exchange
    from gateway.snapshot import Snapshot

log = get_logger("gateway.corrections")

WAITING = 10_000  # look-ups that are wanted at the same time
AT_ONCE = 20
LAST_SECONDS = 5.0
# The row appears at OpenRouter after a delay; seconds before each try.
DELAYS = (1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class _Wanted:
    operation_id: str
    exchange_id: str
    snapshot: Snapshot  # whose plugins know of the request
    upstream: str
    generation_id: str


class Corrections:
    """A bounded number of look-ups. What is dropped or given up is counted and logged: `dropped`, `given_up`."""

    def __init__(self, current: Callable[[], Snapshot], delays: tuple[float, ...] = DELAYS) -> None:
        self._current = current
        self._delays = delays
        self._tasks = Tasks()
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self._closing = asyncio.Event()
        self.dropped = 0
        self.given_up = 0
        self.corrected = 0

    def __call__(self, exchange: Exchange, record: AttemptRecord) -> None:
        upstream = exchange.snapshot.upstreams[record.target.upstream]
        if upstream.kind != "openrouter" or record.generation_id is None or not exchange.snapshot.hooks.usage_corrected:
            return
        if len(self._tasks) >= WAITING or self._closing.is_set():
            self.dropped += 1
            exchange.snapshot.services.metrics.dropped("corrections").value += 1
            if worth_a_line(self.dropped):
                log.warning("corrections_dropped", so_far=self.dropped)
            return
        operation = f"{exchange.id}/{record.number}"
        wanted = _Wanted(operation, exchange.id, exchange.snapshot, upstream.name, record.generation_id)
        exchange.snapshot.users.enter()
        self._tasks.spawn(self._correct(wanted), "correction")

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """At its end what is still wanted is asked for once more, for a few seconds."""
        try:
            yield
        finally:
            self._closing.set()
            before = self.given_up
            left = await self._tasks.drain(LAST_SECONDS + 1) + self.given_up - before
            if left:
                log.warning("corrections_left", requests=left)

    async def _correct(self, wanted: _Wanted) -> None:
        try:
            if not await self._told(wanted):
                self.given_up += 1
                if not self._closing.is_set():  # else one line for all
                    log.warning("correction_given_up", operation=wanted.operation_id)
        except Exception:
            self.given_up += 1
            log.exception("correction_failed", operation=wanted.operation_id)
        finally:
            wanted.snapshot.users.leave()

    async def _told(self, wanted: _Wanted) -> bool:
        """Ask after each delay; once the process ends, without delay and then for `LAST_SECONDS`."""
        for delay in self._delays:
            ending = await self._pause(delay)
            if await self._ask(wanted):
                return True
            if ending:
                break
        else:
            return False
        for _ in range(5):
            await asyncio.sleep(LAST_SECONDS / 5)
            if await self._ask(wanted):
                return True
        return False

    async def _pause(self, delay: float) -> bool:
        """True if the process ends meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._closing.wait()
        return self._closing.is_set()

    async def _ask(self, wanted: _Wanted) -> bool:
        async with self._at_once:
            data = await self._generation(wanted)
        if data is None:
            return False
        self.corrected += 1
        await dispatch.run_corrected(wanted.snapshot.hooks.usage_corrected, _correction(wanted, data))
        return True

    async def _generation(self, wanted: _Wanted) -> dict[str, Any] | None:
        upstream = wanted.snapshot.upstreams[wanted.upstream]
        newest = self._current().upstreams.get(wanted.upstream)
        if newest is not None and newest.settings.base_url == upstream.settings.base_url:
            upstream = newest  # its key may have been changed since
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
