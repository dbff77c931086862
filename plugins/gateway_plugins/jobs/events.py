"""What happens to jobs, told while it happens: over Redis, to whoever watches in any process.

The database knows how every job stands and, once one has ended, all that it answered. Here is what comes before: the
events of a streamed answer as they arrive, kept until it has ended, for an hour at most; and a bell for each job that
rings when there is more. A bell may be lost with Redis: who watches looks at the database from time to time.

An event's number is its place in its stream, from 1. A job that is run again begins anew: each further run's numbers
begin a million higher, so that whoever had some of the run before can tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any

import structlog
from redis.asyncio.client import PubSub

from gateway import StoreUnavailable, Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gateway import Services

log = structlog.get_logger("gateway.plugin", plugin="jobs")

SPAN = 1_000_000
KEPT_SECONDS = 3600
MOST_FORGOTTEN = 100  # runs; what is older goes by itself
RECONNECT_SECONDS = 1.0
LISTEN_SECONDS = 60.0
_EVERYBODY = "{xenios}:jobs:bell"  # keeps the subscription alive that others join and leave
_EVENT_END = re.compile(rb"\r\n\r\n|\n\r?\n|\r\r")
# The field alone sets it too, to nothing. A line ends with any of three, and an event in two of them.
_ID_LINE = re.compile(rb"(?<![^\r\n])id(?::[^\r\n]*)?(?:\r\n|\r|\n)")
_PIECES = 100

# One entry for what came at once: its number is that of its last event.
_PUBLISH = """
redis.call('XADD', KEYS[1], ARGV[1], 'first', ARGV[2], 'data', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return redis.call('PUBLISH', KEYS[2], 'events')
"""
_RING = "return redis.call('PUBLISH', KEYS[1], 'state')"
_READ = f"return redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', {_PIECES})"
_FORGET = "return redis.call('UNLINK', unpack(KEYS))"


class Splitter:
    """Whole events out of bytes as they come. Comments are left out: they only break a silence."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are complete now, each with its blank line."""
        buffer, start = self._rest + data, 0
        out: list[bytes] = []
        for end in _EVENT_END.finditer(buffer):
            event = buffer[start : end.end()]
            start = end.end()
            if not event.startswith(b":"):
                out.append(event)
        self._rest = buffer[start:]
        return out


def events_of(body: bytes) -> list[bytes]:
    """The events of a whole stream."""
    return Splitter().feed(body)


def base(attempts: int) -> int:
    """The number before the first event of this run (its place among a job's runs, from 1)."""
    return (max(1, attempts) - 1) * SPAN


def run_of(number: int) -> int:
    """The run that an event's number belongs to."""
    return number // SPAN + 1


def numbered(number: int, event: bytes) -> bytes:
    """The event with its number as its `id`, in place of an upstream's own: of two the last one counts."""
    return b"id: %d\n%b" % (number, _ID_LINE.sub(b"", event) if b"id" in event else event)


class Bell:
    """Rings when something happened to one job."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._state = False

    def ring(self, *, state: bool) -> None:
        """`state`: not only that there are more events."""
        self._state = self._state or state
        self._rung.set()

    async def wait(self, seconds: float) -> bool:
        """Until it rings, or so long. True: look how the job stands."""
        try:
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        except TimeoutError:
            return True
        state, self._state = self._state, False
        self._rung.clear()
        return state


class _Channels(PubSub):
    """Two tasks use its connection. One that is lost is not made again under their hands: each would make one."""

    async def _reconnect(self, *_: Any, **__: Any) -> None:
        """`_listen` does."""


class Events:
    """One per process. Watchers share one connection."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._tasks = Tasks()
        self._bells: dict[str, set[Bell]] = {}
        self._listening: asyncio.Task[None] | None = None
        self._told: set[str] = set()  # the channels that Redis was asked for, over the connection that there is
        self._changed: set[str] = set()  # those of which it is to be told that somebody came, or the last one left
        self._change = asyncio.Event()

    async def close(self) -> None:
        await self._tasks.drain(0)

    # --- telling ---------------------------------------------------------------------------------------------------

    async def publish(self, job_id: str, attempts: int, first: int, events: list[bytes]) -> None:
        """More events of this run; `first` is the place of the first of them, from 1. Raises StoreUnavailable."""
        last = first + len(events) - 1
        await self._script(
            _PUBLISH, [_stream(job_id, attempts), _channel(job_id)],
            [f"{last}-1", str(first), b"".join(events), str(KEPT_SECONDS)],
        )  # fmt: skip

    async def ring(self, job_id: str) -> None:
        """Its state changed. Whoever is not told now looks by itself later."""
        self._ring(_channel(job_id), state=True)
        with contextlib.suppress(StoreUnavailable):
            await self._script(_RING, [_channel(job_id)], [])

    async def forget(self, job_id: str, attempts: int) -> None:
        """All that was told of its runs: once it has ended the database has it."""
        runs = range(max(1, attempts - MOST_FORGOTTEN), attempts + 1)
        if runs:
            with contextlib.suppress(StoreUnavailable):
                await self._script(_FORGET, [_stream(job_id, run) for run in runs], [])

    # --- hearing ---------------------------------------------------------------------------------------------------

    async def read(self, job_id: str, attempts: int, after: int) -> list[tuple[int, bytes]] | None:
        """Events of this run after the given place in it; None if some of them are lost. Raises StoreUnavailable."""
        out: list[tuple[int, bytes]] = []
        for entry_id, fields in await self._script(_READ, [_stream(job_id, attempts)], [f"({after}-1"]):
            del entry_id
            first, data = int(fields[1]), fields[3]
            if first > after + 1 + len(out):
                return out or None
            events = events_of(data)
            out += [(first + i, event) for i, event in enumerate(events) if first + i > after + len(out)]
        return out

    @contextlib.asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[Bell]:
        """A bell that rings at what happens to this job from now on."""
        channel, bell = _channel(job_id), Bell()
        bells = self._bells.setdefault(channel, set())
        bells.add(bell)
        # The listener tells Redis: who waited for that, and left meanwhile, would leave a bell and a subscription.
        if len(bells) == 1:
            self._heed(channel)
        if self._listening is None:
            self._listening = self._tasks.spawn(self._keep_listening(), "jobs: events")
        try:
            yield bell
        finally:
            bells.discard(bell)
            if not bells:
                del self._bells[channel]
                self._heed(channel)

    def _heed(self, channel: str) -> None:
        if channel in self._bells or channel in self._told:
            self._changed.add(channel)
            self._change.set()
        else:
            self._changed.discard(channel)

    async def _keep_listening(self) -> None:
        while True:
            try:
                await self._listen()
            except* Exception as lost:  # noqa: BLE001 - redis-py's own too: one task may end what the other uses
                log.debug("jobs_events_lost", errors=[type(error).__name__ for error in lost.exceptions])
            for channel in self._bells:
                self._ring(channel, state=True)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _listen(self) -> None:
        redis = self._services.redis
        if redis is None:
            raise ConnectionError
        async with _Channels(redis.client.connection_pool) as pubsub:
            await pubsub.subscribe(_EVERYBODY)
            self._told, self._changed = set(), {*self._bells}
            self._change.set()
            async with asyncio.TaskGroup() as group:  # if one of them fails, the connection is of no use to the other
                group.create_task(self._keep_telling(pubsub))
                group.create_task(self._hear(pubsub))

    async def _keep_telling(self, pubsub: Any) -> None:
        """Redis, of who came and left, however long it does not read."""
        while True:
            await self._change.wait()
            self._change.clear()
            changed, self._changed = self._changed, set()
            come = [channel for channel in changed if channel in self._bells]
            gone = changed.difference(come)
            self._told.difference_update(gone)
            self._told.update(come)
            if gone:
                await pubsub.unsubscribe(*gone)
            if come:
                await pubsub.subscribe(*come)

    async def _hear(self, pubsub: Any) -> None:
        while True:
            message = await pubsub.get_message(timeout=LISTEN_SECONDS)
            # also when its subscription is confirmed: something may have happened just before
            if message is not None and message["type"] in {"message", "subscribe"}:
                self._ring(message["channel"].decode(), state=message["data"] != b"events")

    def _ring(self, channel: str, *, state: bool) -> None:
        for bell in self._bells.get(channel, ()):
            bell.ring(state=state)

    async def _script(self, text: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        if self._services.redis is None:
            raise StoreUnavailable
        return await self._services.redis.script(text, keys, arguments)


def _stream(job_id: str, attempts: int) -> str:
    return f"{{xenios}}:jobs:events:{job_id}:{attempts}"


def _channel(job_id: str) -> str:
    return f"{{xenios}}:jobs:bell:{job_id}"
