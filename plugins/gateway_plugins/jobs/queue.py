"""Who works on what, and what waits: RQ, which is asked in one thread of its own.

RQ's client is synchronous. While Redis is away a call costs one short time-out, then nothing until a probe has found it
again: the database knows every job, and what was not enqueued is enqueued later.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry as NoRetry
from rq import Retry
from rq.command import send_command
from rq.exceptions import DuplicateJobError
from rq.executions import ExecutionRegistry
from rq.job import JobStatus
from rq.queue import Queue as RQQueue
from rq.serializers import JSONSerializer
from rq.utils import as_text
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from gateway import StoreUnavailable, Tasks
from gateway_plugins.jobs import functions, settings
from gateway_plugins.jobs.functions import FUNCTION, AllowedJob, Why, job_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

    from gateway import Services

log = structlog.get_logger("gateway.plugin", plugin="jobs")

T = TypeVar("T")

PRIORITIES: Final = ("high", "normal", "low")
DEFAULT: Final = "default"
TIMEOUT = 0.25
PROBE_SECONDS = 0.5
READ_SECONDS = 5.0  # between two looks at all queues, for the metrics
FAILED_SECONDS = 3600  # how long RQ remembers what failed; the database does longer
KILLS = 100  # workers that may die with a job before RQ gives it up
WAKE: Final = "{xenios}:jobs:wake"  # workers listen here for what was enqueued

_ABOUT = ("status", "origin", "worker_name")
_KNOWN = {JobStatus.QUEUED, JobStatus.STARTED, JobStatus.SCHEDULED}

# Two of one gateway may ask for this at once: who has the lock keeps it.
_LOCK = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 2 end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
_UNLOCK = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
# What is over, but not what somebody enqueued meanwhile.
_FORGET = """
local status = redis.call('HGET', KEYS[1], 'status')
if status == 'queued' or status == 'started' then return 0 end
if status == 'scheduled' and (ARGV[2] == '' or redis.call('ZREM', KEYS[2], ARGV[1]) == 0) then return 0 end
redis.call('DEL', KEYS[1])
for i = 2, #KEYS do redis.call('ZREM', KEYS[i], ARGV[1]) end
return 1
"""


@dataclass(frozen=True)
class QueueState:
    """One queue now."""

    name: str
    waiting: int = 0
    running: int = 0
    scheduled: int = 0  # to be run later
    failed: int = 0  # of the last hour, in RQ's registry
    oldest_seconds: float | None = None  # how long the first has waited; None: nothing waits
    workers: int = 0
    by_priority: Mapping[str, int] = field(default_factory=dict)  # of those that wait


class Queue:
    """What the parts of this plugin see of RQ. Every call raises StoreUnavailable, within a quarter of a second."""

    def __init__(self, config: settings.Config, services: Services) -> None:
        self.queues: dict[str, settings.Queue] = {DEFAULT: settings.Queue(), **config.queues}
        self._services = services
        self._redis: redis.Redis | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._tasks = Tasks()
        self._away = False
        self._probe: asyncio.Task[None] | None = None
        self._seen: Sequence[QueueState] = ()
        metrics = services.metrics
        about = "Time from the start of a try to its end."
        self._seconds = metrics.histogram("xenios_jobs_seconds", about, ("queue", "outcome"))
        self._retries = metrics.counter("xenios_jobs_retries_total", "Jobs that were put back to be tried again.").of()
        self._dead = metrics.counter("xenios_jobs_dead_total", "Jobs that failed after their last try.").of()

    def serve(self, name: str, queue: settings.Queue) -> None:
        """A queue of a part's own, in its constructor; what the YAML says of that name counts more."""
        self.queues.setdefault(name, queue)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        store = self._services.redis
        if store is None:
            raise RuntimeError("jobs needs services.redis.")  # refused at the start
        self._redis = connect(store.url, TIMEOUT)
        self._thread = ThreadPoolExecutor(1, "jobs")
        ends = self._read_gauges()
        reader = self._tasks.spawn(self._keep_reading(), "jobs: metrics")
        try:
            yield
        finally:
            for end in ends:
                end()
            reader.cancel()
            await self._tasks.drain(0)
            self._thread.shutdown(wait=True)
            self._redis.close()

    def settings_of(self, queue: str) -> settings.Queue:
        """`default`'s for one that is configured no more."""
        return self.queues[self._name(queue)]

    # --- for the parts -----------------------------------------------------------------------------------------------

    async def put(
        self,
        kind: str,
        work: str,
        *,
        queue: str = DEFAULT,
        priority: str | None = None,
        front: bool = False,
        after: float = 0.0,
        timeout: float | None = None,  # noqa: ASYNC109 - the work's, not this call's
    ) -> None:
        """To be done by a worker, `after` so many seconds. Once, however often it is asked for.

        What is to be done later and is asked for now is done now. Without `priority` and `timeout` (seconds of one try)
        the queue's own hold. `default` takes what queues had that are no more.
        """
        name = self._name(queue)
        own = self.settings_of(queue)
        rq_name = queue_name(name, priority or own.priority)
        seconds = max(1, round(own.timeout if timeout is None else timeout))
        await self._ask(lambda connection: _put(connection, kind, work, rq_name, seconds, front=front, after=after))

    async def drop(self, kind: str, work: str) -> None:
        """What waits is taken out; what runs is stopped, wherever it does."""
        await self._ask(lambda connection: _drop(connection, job_id(kind, work)))

    async def position(self, kind: str, work: str, queue: str = DEFAULT) -> int | None:
        """How many wait before it; None if it doesn't wait."""
        return await self._ask(lambda connection: _position(connection, job_id(kind, work), self._name(queue)))

    async def states(self) -> list[QueueState]:
        return await self._ask(self._states)

    async def unknown(self, kind: str, works: Iterable[str], *, within: float = math.inf) -> set[str]:
        """Those that RQ knows nothing of: they neither wait, nor run, nor will (`within` so many seconds)."""
        wanted = list(works)
        return await self._ask(lambda connection: _unknown(connection, kind, wanted, within)) if wanted else set()

    async def lock(self, name: str, holder: str, seconds: float) -> int:
        """0: somebody else has it. Else `holder` has it for so long; 2: it had it not before."""
        arguments = (lock_key(name), holder, round(seconds * 1000))
        return int(await self._ask(lambda connection: connection.eval(_LOCK, 1, *arguments)))

    async def unlock(self, name: str, holder: str) -> None:
        arguments = (lock_key(name), holder)
        await self._ask(lambda connection: connection.eval(_UNLOCK, 1, *arguments))

    def ended(self, queue: str, outcome: str, seconds: float) -> None:
        """A worker says what became of a try."""
        self._seconds.observe(seconds, queue, outcome)
        if outcome == "again":
            self._retries.value += 1

    def tell(self, outcome: str) -> None:
        """A part says how its work ended for good: `succeeded`, `failed`, `cancelled`."""
        functions.told.get([]).append(outcome)
        if outcome == "failed":
            self._dead.value += 1

    @staticmethod
    def why() -> Why:
        """Asked by a handler that is cancelled."""
        return functions.reason.get()()

    # --- in the thread -----------------------------------------------------------------------------------------------

    async def _ask(self, call: Callable[[redis.Redis], T]) -> T:
        """Raises StoreUnavailable."""
        if self._thread is None:
            raise RuntimeError("The queue is not open.")
        if self._away:
            raise StoreUnavailable
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._call, call)
        except redis.RedisError as error:
            if not isinstance(error, redis.ResponseError):  # the server is there, and says so at once
                self._fail(error)
            raise StoreUnavailable from error

    def _call(self, call: Callable[[redis.Redis], T]) -> T:
        if self._away or self._redis is None:  # since this waited for its turn
            raise StoreUnavailable
        try:
            return call(self._redis)
        except redis.ConnectionError:
            # A connection from before its restart: all that is asked here may be asked twice.
            return self._again(call, self._redis)
        except redis.TimeoutError:
            self._away = True
            raise

    def _again(self, call: Callable[[redis.Redis], T], connection: redis.Redis) -> T:
        try:
            return call(connection)
        except (redis.ConnectionError, redis.TimeoutError):
            self._away = True
            raise

    def _fail(self, error: Exception) -> None:
        if self._probe is None or self._probe.done():
            log.error("queue_away", error=type(error).__name__)
            self._probe = self._tasks.spawn(self._wait_for_it(), "jobs: probe")

    async def _wait_for_it(self) -> None:
        """Until it answers again."""
        if self._thread is None or self._redis is None:
            return
        while self._away:
            await asyncio.sleep(PROBE_SECONDS)
            with contextlib.suppress(redis.RedisError):
                await asyncio.get_running_loop().run_in_executor(self._thread, self._redis.ping)
                self._away = False
        log.warning("queue_back")

    def _name(self, queue: str) -> str:
        return queue if queue in self.queues else DEFAULT

    def _states(self, connection: redis.Redis) -> list[QueueState]:
        return [_state(connection, name) for name in self.queues]

    # --- metrics: of each gateway one process looks -------------------------------------------------------------------

    def _read_gauges(self) -> list[Callable[[], None]]:
        metrics = self._services.metrics
        waiting = metrics.gauge("xenios_jobs_waiting", "Jobs that wait.", ("queue", "priority"), merge="max")
        running = metrics.gauge("xenios_jobs_running", "Jobs that run.", ("queue",), merge="max")
        about = "How long the first of those that wait has waited."
        oldest = metrics.gauge("xenios_jobs_oldest_seconds", about, ("queue",), merge="max")
        workers = metrics.gauge("xenios_job_workers", "Worker processes.", ("queue",), merge="max")
        return [
            waiting.read_from(
                lambda: {(s.name, p): float(n) for s in self._seen for p, n in s.by_priority.items()},
            ),
            running.read_from(lambda: {(s.name,): float(s.running) for s in self._seen}),
            oldest.read_from(lambda: {(s.name,): s.oldest_seconds or 0.0 for s in self._seen}),
            workers.read_from(lambda: {(s.name,): float(s.workers) for s in self._seen}),
        ]

    async def _keep_reading(self) -> None:
        folder = self._services.data_dir
        place = f"{socket.gethostname()}:{folder.resolve() if folder else os.getpid()}"
        name = "metrics:" + hashlib.sha256(place.encode()).hexdigest()[:16]
        holder = f"{os.getpid()}:{id(self)}"
        try:
            while True:
                try:
                    mine = await self.lock(name, holder, READ_SECONDS * 3)
                    self._seen = await self.states() if mine else ()
                except StoreUnavailable:
                    self._seen = ()  # unknown, not none
                await asyncio.sleep(READ_SECONDS)
        finally:
            with contextlib.suppress(StoreUnavailable):
                await self.unlock(name, holder)


def connect(url: str, timeout: float) -> redis.Redis:
    """A client that fails when it has to: redis-py's own retries turn one call into seconds."""
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=NoRetry(NoBackoff(), 0),
        health_check_interval=0,
        protocol=2,
        client_name="xenios-jobs",
    )


def lock_key(name: str) -> str:
    return f"{{xenios}}:jobs:lock:{name}"


def queue_name(queue: str, priority: str) -> str:
    """Its name in RQ."""
    return f"xenios:{queue}" if priority == "normal" else f"xenios:{queue}:{priority}"


def parts_of(name: str) -> tuple[str, str]:
    """Queue and priority of a name in RQ."""
    _, queue, *rest = name.split(":")
    return queue, rest[0] if rest else "normal"


def rq_queue(name: str, connection: redis.Redis) -> RQQueue:
    return RQQueue(name, connection, job_class=AllowedJob, serializer=JSONSerializer)


def _put(connection: redis.Redis, kind: str, work: str, name: str, timeout: int, *, front: bool, after: float) -> None:
    queue = rq_queue(name, connection)
    for _ in range(3):  # unless others put and end it at the same time
        job = queue.create_job(
            FUNCTION,
            (kind, work),
            job_id=job_id(kind, work),
            description=job_id(kind, work),
            timeout=timeout,
            result_ttl=0,
            failure_ttl=FAILED_SECONDS,
            retry=Retry(max=KILLS, enqueue_at_front=True),
        )
        try:
            if after > 0:
                queue.schedule_job(job, datetime.now(UTC) + timedelta(seconds=after), unique=True)
            else:
                queue.enqueue_job(job, at_front=front, unique=True)
                connection.publish(WAKE, "")
        except DuplicateJobError:
            if not _forget(connection, job.id, scheduled=after <= 0):
                return
        else:
            return


def _forget(connection: redis.Redis, job: str, *, scheduled: bool) -> bool:
    """Make place for another of this id; False: it waits, or runs. `scheduled`: though it is to be run later."""
    origin = connection.hget(AllowedJob.key_for(job), "origin")
    keys = [AllowedJob.key_for(job)]
    if isinstance(origin, bytes):
        queue = rq_queue(origin.decode(), connection)
        registries = (queue.failed_job_registry, queue.canceled_job_registry, queue.finished_job_registry)
        keys += [queue.scheduled_job_registry.key, *(registry.key for registry in registries)]
    return bool(connection.eval(_FORGET, len(keys), *keys, job, "1" if scheduled and len(keys) > 1 else ""))


def _drop(connection: redis.Redis, job: str) -> None:
    """Not `Job.delete`, which fails while one of its executions has ended but half."""
    for _ in range(2):  # a worker may take it between
        key = AllowedJob.key_for(job)
        status, origin, worker = (as_text(value or b"") for value in connection.hmget(key, _ABOUT))
        if not origin:
            return
        if status == JobStatus.STARTED:
            send_command(connection, worker, "stop-job", job_id=job)
            return
        queue = rq_queue(origin, connection)
        with connection.pipeline() as pipeline:
            pipeline.lrem(queue.key, 0, job)
            pipeline.zrem(queue.scheduled_job_registry.key, job)
            pipeline.zrem(queue.failed_job_registry.key, job)
            pipeline.delete(key, ExecutionRegistry(job, connection).key)
            pipeline.execute()


def _position(connection: redis.Redis, job: str, name: str) -> int | None:
    lists = [rq_queue(queue_name(name, priority), connection).key for priority in PRIORITIES]
    with connection.pipeline(transaction=False) as pipeline:
        for key in lists:
            pipeline.llen(key)
            pipeline.lpos(key, job)
        found = pipeline.execute()
    before = 0
    for length, place in zip(found[::2], found[1::2], strict=True):
        if place is not None:
            return before + int(place)
        before += int(length)
    return None


def _unknown(connection: redis.Redis, kind: str, works: Sequence[str], within: float) -> set[str]:
    with connection.pipeline(transaction=False) as pipeline:
        for work in works:
            pipeline.hmget(AllowedJob.key_for(job_id(kind, work)), "status", "origin")
        found = [[as_text(value or b"") for value in values] for values in pipeline.execute()]
        unknown = {work for work, (status, _) in zip(works, found, strict=True) if status not in _KNOWN}
        if within == math.inf:
            return unknown
        later = [(w, origin) for w, (status, origin) in zip(works, found, strict=True) if status == JobStatus.SCHEDULED]
        for work, origin in later:
            pipeline.zscore(rq_queue(origin, connection).scheduled_job_registry.key, job_id(kind, work))
        latest = time.time() + within
        return unknown | {
            work for (work, _), at in zip(later, pipeline.execute(), strict=True) if at is not None and at > latest
        }


def _state(connection: redis.Redis, name: str) -> QueueState:
    queues = [rq_queue(queue_name(name, priority), connection) for priority in PRIORITIES]
    registries = ("started_job_registry", "scheduled_job_registry", "failed_job_registry")
    keys = [queue.key for queue in queues] + [getattr(queue, r).key for r in registries for queue in queues]
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.exists(*keys)
        pipeline.smembers(WORKERS_BY_QUEUE_KEY % queue_name(name, "normal"))  # all priorities have the same
        anything, workers = pipeline.execute()
        for queue in queues if anything else ():  # most are empty most of the time
            pipeline.llen(queue.key)
            pipeline.lrange(queue.key, 0, 0)
            for registry in registries:
                pipeline.zcard(getattr(queue, registry).key)
        found: list[Any] = pipeline.execute() if anything else [0, [], 0, 0, 0] * len(queues)
        waiting, first, running, scheduled, failed = (found[i::5] for i in range(5))
        alive = sorted(workers)
        heads = [job for jobs in first for job in jobs]
        for job in heads:
            pipeline.hget(AllowedJob.key_for(job.decode()), "enqueued_at")
        for worker in alive:
            pipeline.exists(worker)
        then = pipeline.execute()
    ages = [age for at in then[: len(heads)] if (age := _age(at)) is not None]
    return QueueState(
        name=name,
        waiting=sum(waiting),
        running=sum(running),
        scheduled=sum(scheduled),
        failed=sum(failed),
        oldest_seconds=max(ages, default=None),
        workers=sum(then[len(heads) :]),
        by_priority=dict(zip(PRIORITIES, waiting, strict=True)),
    )


def _age(enqueued_at: Any) -> float | None:
    if not enqueued_at:
        return None
    at = datetime.fromisoformat(enqueued_at.decode())
    return max(0.0, (datetime.now(UTC) - at.astimezone(UTC)).total_seconds())
