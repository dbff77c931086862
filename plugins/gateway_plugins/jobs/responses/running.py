"""A background response is run as any job is; what is kept and told of it are OpenAI's object and its events."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import msgspec

from gateway import Event, StoreUnavailable
from gateway_plugins.jobs.events import base, events_of, run_of
from gateway_plugins.jobs.follow import Follower
from gateway_plugins.jobs.responses import objects
from gateway_plugins.jobs.responses.stream import Transcript, encode
from gateway_plugins.jobs.runner import Runner, Sink
from gateway_plugins.jobs.store import ENDED, Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from multidict import CIMultiDict

    from gateway import Exchange
    from gateway.kit import Statements
    from gateway_plugins.jobs.events import Events
    from gateway_plugins.jobs.follow import Numbered
    from gateway_plugins.jobs.responses.objects import JsonObject
    from gateway_plugins.jobs.runner import Ended
    from gateway_plugins.jobs.store import End, Job, Store

EVENT_STREAM = "text/event-stream"
INCOMPLETE = "incomplete"  # the code of one that succeeded so far as it could


class _Number(msgspec.Struct):
    sequence_number: int


def asked(job: Job) -> JsonObject:
    """The response as it was taken: queued."""
    response: JsonObject = msgspec.json.decode(job.metadata or "{}")
    return response


async def shown(store: Store, job: Job) -> JsonObject:
    """The response as it stands."""
    if not job.ended:
        return asked(job) if job.started_at is None else objects.in_progress(asked(job))
    result = await store.result(job.id)
    if result is None:
        return _ended(Transcript(asked(job)), job.status, job.error_code, job.error_message)["response"]  # type: ignore[no-any-return]  # ours
    kept = Event(events_of(result.body)[-1]).data["response"] if result.is_stream else msgspec.json.decode(result.body)
    response: JsonObject = kept
    return response


def _ended(script: Transcript, status: str, code: str | None, message: str | None) -> JsonObject:
    """The last event of one that has no answer."""
    if status == "cancelled":
        return script.cancel()
    return script.fail(code or "server_error", message or "It ended without an answer.")


class ResponseSink(Sink):
    """The client of its request: makes of what the upstream says what our clients are told."""

    def __init__(self, events: Events, job: Job, script: Transcript, before: list[bytes]) -> None:
        """`before`: what was told by the runs before this one, and at the creation."""
        super().__init__(events, job, offset=script.number - base(job.attempts))
        self._script = script
        self._before = before
        if job.stream:
            self.add([encode(event) for event in script.start()])
        else:
            script.start()

    async def send(self, status: int, headers: CIMultiDict[str], body: bytes, progress: Callable[[], None]) -> None:
        del progress
        self._head(status, headers)
        if status == 200:
            self._script.answer = msgspec.json.decode(body)

    def changed(self, event: bytes) -> bytes | None:
        ours = self._script.pass_on(Event(event))
        return None if ours is None else encode(ours)

    @property
    def response(self) -> JsonObject:
        return self._script.response

    def finished(self, end: End) -> Result:
        """What is kept, which the last event is part of: it is told from there."""
        answer = self._script.answer
        if end.status == "succeeded" and answer is not None:
            last = self._script.complete(answer, int(time.time()))
        else:
            last = _ended(self._script, end.status, end.code, end.message)
        return kept(self._job, [*self._before, *self._parts], last, self.headers)


def kept(job: Job, events: list[bytes], last: JsonObject, headers: dict[str, str]) -> Result:
    if job.stream:
        return Result(200, {**headers, "content-type": EVENT_STREAM}, b"".join([*events, encode(last)]))
    return Result(200, {**headers, "content-type": "application/json"}, msgspec.json.encode(last["response"]))


class ResponseRunner(Runner):
    """Runs background responses."""

    async def sink(self, job: Job) -> ResponseSink:
        script, before = await self._so_far(job, job.attempts - 1)
        script.number = max(script.number, base(job.attempts))
        return ResponseSink(self._events, job, script, before)

    async def tell(self, statements: Statements, job: Job) -> None:
        status = "completed" if job.status == "succeeded" else job.status
        event = f"response.{INCOMPLETE if job.status == 'succeeded' and job.error_code == INCOMPLETE else status}"
        await self._webhooks.send(statements, job.tenant, event, {"id": job.id}, target=job.webhook)

    def _judged(self, job: Job, sink: Sink, exchange: Exchange) -> End | None:
        end = super()._judged(job, sink, exchange)
        if end is None or end.status not in ENDED or not isinstance(sink, ResponseSink):
            return end
        result = sink.finished(end)
        if end.status == "succeeded" and sink.response["status"] == "incomplete":
            end = msgspec.structs.replace(end, code=INCOMPLETE)
        return msgspec.structs.replace(end, result=result)

    async def _end(self, job: Job, end: End | None, row: bytes = b"") -> list[Ended]:
        if end is not None and end.status in ENDED and end.result is None:
            end = await self._without_answer(job, end)
        return await super()._end(job, end, row)

    async def close(self, job: Job, end: End) -> Job | None:
        return await super().close(job, await self._without_answer(job, end))

    async def _without_answer(self, job: Job, end: End) -> End:
        script, events = await self._so_far(job, job.attempts)
        last = _ended(script, end.status, end.code, end.message)
        return msgspec.structs.replace(end, result=kept(job, events, last, {}))

    async def _so_far(self, job: Job, runs: int) -> tuple[Transcript, list[bytes]]:
        """What clients were told by so many runs, as far as Redis knows."""
        script = Transcript(asked(job))
        out = [encode(event) for event in script.begin()]
        if job.stream:
            with contextlib.suppress(StoreUnavailable):
                while found := await live(self._events, job.id, script.number - 1, runs):
                    for _, event in found:
                        script.told(Event(event).data)
                        out.append(event)
        return script, out


async def live(events: Events, job_id: str, after: int, runs: int) -> Numbered:
    """What was told after the event of this number, of so many runs. Raises StoreUnavailable."""
    for run in range(run_of(after), runs + 1):
        told = await events.read(job_id, run, max(0, after + 1 - base(run)))
        if told:
            return [(base(run) + place - 1, event) for place, event in told]
    return []


class ResponseFollower(Follower):
    """Numbers are the API's `sequence_number`, from 0."""

    def written(self, found: Numbered) -> bytes:
        return b"".join(event for _, event in found)

    async def _since(self, job: Job, after: int) -> Numbered:
        if job.ended:
            result = await self._store.result(job.id)
            told = [(_number(event), event) for event in events_of(result.body)] if result else []
            return [(number, event) for number, event in told if number > after]
        begun = [(event["sequence_number"], encode(event)) for event in Transcript(asked(job)).begin()]
        if found := [(number, event) for number, event in begun if number > after]:
            return found
        with contextlib.suppress(StoreUnavailable):
            # what Redis has lost comes from the database, at the end
            return await live(self._events, job.id, after, job.attempts)
        return []


def _number(event: bytes) -> int:
    return msgspec.json.decode(Event(event).payload, type=_Number).sequence_number
