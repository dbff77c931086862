"""What /v1/jobs/{id}/stream sends: what has happened since, and what happens, until the job has ended."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from gateway import StoreUnavailable
from gateway_plugins.jobs import shown
from gateway_plugins.jobs.events import base, events_of, numbered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway_plugins.jobs.events import Events
    from gateway_plugins.jobs.store import Job, Store

LOOK_SECONDS = 5.0  # without a bell: its Redis may be away
_RESTARTED = "job.restarted"

Numbered = list[tuple[int, bytes]]


class Follower:
    """Follows jobs for their watchers."""

    def __init__(self, store: Store, events: Events) -> None:
        self._store = store
        self._events = events

    async def follow(self, job_id: str, after: int) -> AsyncIterator[bytes]:
        """The events after the one of this number, each with its own as `id`."""
        async with self._events.watch(job_id) as bell:
            known: Job | None = None
            while True:
                if known is None:
                    known = await self._store.get(job_id)
                if known is None:
                    return  # deleted meanwhile
                while found := await self._since(known, after):
                    after = found[-1][0]
                    yield self.written(found)
                    if known.ended:
                        break
                if known.ended:
                    return
                if await bell.wait(LOOK_SECONDS):
                    known = None

    def written(self, found: Numbered) -> bytes:
        """As they are sent."""
        return b"".join(numbered(number, event) for number, event in found)

    async def _since(self, job: Job, after: int) -> Numbered:
        found = await (self._of_stream(job, after) if job.stream else self._of_whole(job))
        return [(number, event) for number, event in found if number > after]

    async def _of_whole(self, job: Job) -> Numbered:
        """How it stands."""
        begun = base(job.attempts)
        out = [(1, shown.event("job.queued", job))]
        if job.attempts:
            out.append((begun + 2, shown.event("job.running", job)))
        if job.ended:
            result = await self._store.result(job.id)
            out.append((begun + 3, shown.event(f"job.{job.status}", job, result)))
        return out

    async def _of_stream(self, job: Job, after: int) -> Numbered:
        """What the upstream said. Who had some of a run before this one is told that it begins anew."""
        begun = base(job.attempts)
        out = [(begun, shown.event(_RESTARTED, job))] if 0 < after < begun and job.status != "queued" else []
        place = max(0, after - begun)
        if job.ended:
            return out + [(begun + number, event) for number, event in await self._told(job)]
        if job.status == "running":
            with contextlib.suppress(StoreUnavailable):
                live = await self._events.read(job.id, job.attempts, place)
                # what Redis has lost comes from the database, at the end
                out += [(begun + number, event) for number, event in live or ()]
        return out

    async def _told(self, job: Job) -> Numbered:
        """All events of a stream that has ended."""
        result = await self._store.result(job.id)
        events = events_of(result.body) if result is not None and result.is_stream else []
        if job.status != "succeeded" and (job.status == "cancelled" or not events):
            events.append(shown.error_event(job))
        return list(enumerate(events, 1))
