"""What one worker does from time to time for jobs of one kind, so that none is forgotten, and none kept for ever.

The database says what there is to do. What Redis lost is enqueued again; what a worker did not live to do is done.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from gateway import StoreUnavailable
from gateway_plugins.jobs.store import AT_ONCE, End

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway_plugins.jobs.parts import Shared
    from gateway_plugins.jobs.store import Job, Store

    Close = Callable[[Job, End], Awaitable[Job | None]]

WAITING_SECONDS = 10.0  # after which one that is due should be in the queue
UNSETTLED_SECONDS = 30.0
STOPPING_SECONDS = 5.0
MOST_PAGES = 40
TIMEOUT_MARGIN = 30.0


class Tidier:
    """One kind's."""

    def __init__(self, shared: Shared, store: Store, kind: str, close: Close) -> None:
        """`close` ends a job that nobody runs, and tells of it."""
        self._shared = shared
        self._store = store
        self._kind = kind
        self._close = close

    async def tidy(self) -> None:
        """Raises StoreUnavailable."""
        store, lease = self._store, self._shared.config.worker.lease
        while await store.prune() == AT_ONCE:
            pass
        async for page in _pages(lambda after: store.waiting(older=WAITING_SECONDS, after=after)):
            await self._put_again(page, front=False)
        async for page in _pages(lambda after: store.forsaken(older=lease, after=after)):
            await self._put_again(page, front=True)
        async for page in _pages(lambda after: store.unsettled(older=UNSETTLED_SECONDS, after=after)):
            await self._settle(page)
        async for page in _pages(lambda after: store.stopping(older=STOPPING_SECONDS, after=after)):
            for job in page:
                if job.status == "queued":
                    await self._close(job, End(status="cancelled"))
                await self._shared.queue.drop(self._kind, job.id)

    async def _put_again(self, jobs: list[Job], *, front: bool) -> None:
        queue = self._shared.queue
        unknown = await queue.unknown(self._kind, [job.id for job in jobs])
        for job in jobs:
            if job.id in unknown:
                await put(self._shared, self._kind, job, front=front)
        if unknown:
            self._shared.services.log.warning("jobs_enqueued_again", kind=self._kind, jobs=len(unknown))

    async def _settle(self, jobs: list[Job]) -> None:
        services = self._shared.services
        for job in jobs:
            services.settle_late(msgspec.json.decode(job.settlement or "null"))
        if not await services.ledger.flush():
            raise StoreUnavailable
        for job in jobs:
            await self._store.settled(job.id, job.operation)


async def put(shared: Shared, kind: str, job: Job, *, front: bool = False, after: float = 0.0) -> None:
    """Into the queue. One whose Redis is away is put there later, by `tidy`."""
    # the pipeline's own deadline comes first, and says more
    timeout = shared.queue.settings_of(job.queue).timeout + TIMEOUT_MARGIN
    with contextlib.suppress(StoreUnavailable):
        await shared.queue.put(
            kind, job.id, queue=job.queue, priority=job.priority, front=front, after=after, timeout=timeout
        )


async def _pages(read: Callable[[str], Awaitable[list[Job]]]) -> AsyncIterator[list[Job]]:
    """All there is, by id."""
    after = ""
    for _ in range(MOST_PAGES):
        page = await read(after)
        if page:
            yield page
        if len(page) < AT_ONCE:
            return
        after = page[-1].id
