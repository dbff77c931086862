"""One RQ worker process that holds hundreds of jobs at once. What its jobs do is wait: for a model, most of all.

A thread takes jobs from RQ's queues while there are places; the work itself runs on the event loop; a few threads tell
RQ of each end. To RQ each is a job that an execution of this worker runs: `started`, in the registry, on a lease that
this process renews. What that stands on, and what it can't do: README.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import socket
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

import redis
import structlog
from rq.command import handle_command, parse_payload
from rq.exceptions import NoSuchJobError
from rq.executions import ExecutionRegistry
from rq.job import JobStatus
from rq.registry import clean_registries
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.timeouts import BaseDeathPenalty
from rq.utils import as_text
from rq.worker import BaseWorker, WorkerStatus
from rq.worker_registration import clean_worker_registry, register

from gateway import StoreUnavailable, Tasks
from gateway_plugins.jobs import functions
from gateway_plugins.jobs.functions import AllowedJob, Why
from gateway_plugins.jobs.parts import Again
from gateway_plugins.jobs.queue import FAILED_SECONDS, PRIORITIES, WAKE, lock_key, queue_name, rq_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rq.executions import Execution
    from rq.queue import Queue as RQQueue

    from gateway_plugins.jobs.parts import Handler
    from gateway_plugins.jobs.settings import Queue as QueueSettings

log = structlog.get_logger("gateway.plugin", plugin="jobs")

# What became of one try, as RQ and the metrics are told.
Outcome = Literal["done", "again", "failed", "timeout", "stopped", "requeued", "lost"]
_ENDED: Final[Mapping[Why, Outcome]] = {
    "stop": "stopped",
    "timeout": "timeout",
    "requeue": "requeued",
    "lost": "lost",
}

IDLE_SECONDS = 0.5  # between two looks at empty queues, where nobody says that something was put there
TELL_SECONDS = 1.0
SCHEDULE_SECONDS = 1.0
BETWEEN_SECONDS = 5.0  # between two looks at what was taken but not begun
SETTLE_SECONDS = 0.5  # between two tries to record an end
STORE_SECONDS = 5.0  # work that missed a store is done again then
STUBBORN_SECONDS = 10.0  # for handlers that are cancelled at the end
LISTEN_SECONDS = 1.0  # after which a subscription looks whether it is to end
SETTLERS = 2

# What was taken, and whose worker never learnt so, waits again. One that begins it after all is first or second: who
# comes second finds it started.
_PUT_BACK = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
if redis.call('HGET', KEYS[3], 'status') == 'queued' then redis.call('LPUSH', KEYS[2], ARGV[1]) end
return 1
"""

_RQ_3 = "execution" in inspect.signature(BaseWorker.cleanup_execution).parameters


class _NoDeathPenalty(BaseDeathPenalty):
    """RQ's time limits need SIGALRM and the main thread; here each run has a timer of the event loop."""

    def setup_death_penalty(self) -> None: ...

    def cancel_death_penalty(self) -> None: ...


@dataclass(eq=False)
class Lane:
    """A queue with its priorities, and how many of its jobs may run here at once."""

    name: str
    queues: Sequence[RQQueue]
    places: threading.Semaphore


@dataclass(eq=False)
class Run:
    """One try of one job, in this process."""

    job: AllowedJob
    queue: RQQueue
    lane: Lane
    execution: Execution
    began: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None  # once it has begun: one that is cancelled before does nothing at all
    ending: Why = ""  # why it is cancelled
    settling: bool = False
    told: list[str] = field(default_factory=list)  # by the handler


class AsyncWorker(BaseWorker):
    """Runs `handlers` by kind, until it is asked to stop."""

    job_class = AllowedJob
    death_penalty_class = _NoDeathPenalty

    def __init__(
        self,
        connection: redis.Redis,
        queues: Mapping[str, QueueSettings],
        handlers: Mapping[str, Handler],
        *,
        concurrency: int | None = None,
        lease: float = 60.0,
        grace: float = 30.0,
        ended: Callable[[str, str, float], None] = lambda *_: None,
    ) -> None:
        """`concurrency`: of all queues together, beside each one's own. `lease`: seconds without a sign of life after
        which others take its jobs. `grace`: seconds that a stop waits for them. `ended`: queue, outcome, seconds.
        """
        self._local = threading.local()
        self._lanes = [
            Lane(
                name,
                [rq_queue(queue_name(name, priority), connection) for priority in PRIORITIES],
                threading.Semaphore(settings.concurrency),
            )
            for name, settings in queues.items()
        ]
        all_queues = [queue for lane in self._lanes for queue in lane.queues]
        # prepare_for_work would ask Redis, which may be away
        super().__init__(all_queues, connection=connection, serializer=JSONSerializer, prepare_for_work=False)
        self.hostname, self.pid = socket.gethostname(), os.getpid()
        self._handlers = handlers
        self._places = threading.Semaphore(concurrency) if concurrency else None
        self._lease = max(1, round(lease))
        self._grace = grace
        self._ended = ended
        self._runs: dict[str, Run] = {}  # by execution
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._suspended = False
        self._idle = asyncio.Event()
        self._beat_due = 0.0
        self._between: set[tuple[str, bytes]] = set()  # as last seen: job, when it was enqueued
        self._troubled = -float("inf")  # when Redis last failed
        self._away = False
        self._scheduler: Any = RQScheduler(all_queues, connection, logging_level="WARNING", serializer=self.serializer)
        self._tasks = Tasks()
        self._chores = ThreadPoolExecutor(4, "jobs: chores")
        self._settlers = ThreadPoolExecutor(SETTLERS, "jobs: ends")

    # --- RQ's ways that are made for one job at a time ---------------------------------------------------------------

    if not _RQ_3:  # the field of a worker in RQ 2; here each thread has its own

        @property
        def execution(self) -> Execution | None:
            return getattr(self._local, "execution", None)

        @execution.setter
        def execution(self, execution: Execution | None) -> None:
            self._local.execution = execution

    @property
    def connection_timeout(self) -> int:
        return 1  # the connection's own is longer

    def get_heartbeat_ttl(self, *_: Any, **__: Any) -> int:
        return self._lease

    def procline(self, message: str) -> None: ...

    def subscribe(self) -> None:
        """To what this worker is told, and to what is put into any queue."""
        self.pubsub = _untyped(self.connection).pubsub()
        self.pubsub.subscribe(**{self.pubsub_channel_name: self.handle_payload, WAKE: lambda _: self._woken.set()})
        self.pubsub_thread: Any = self.pubsub.run_in_thread(
            sleep_time=LISTEN_SECONDS, daemon=True, exception_handler=self._pubsub_failed
        )

    def unsubscribe(self) -> None:
        """RQ's waits for one second, then closes what the thread may be about to close."""
        if self.pubsub is not None:
            _untyped(self.pubsub).unsubscribe()
            self.pubsub_thread.stop()
            self.pubsub_thread.join(2 * LISTEN_SECONDS)  # it closes the subscription itself

    def _pubsub_failed(self, error: BaseException, *_: Any) -> None:
        """The next try connects and subscribes anew."""
        if not isinstance(error, (redis.RedisError, OSError)):
            log.error("job_command_failed", error=type(error).__name__)
        self._stopping.wait(1)

    def handle_payload(self, message: Any) -> None:
        """In the thread of the subscription."""
        payload = parse_payload(message)
        if payload["command"] not in {"stop-job", "stop-execution"}:
            handle_command(self, payload)
            return
        wanted = payload.get("execution_id")
        runs = [r for r in list(self._runs.values()) if r.job.id == payload["job_id"]]
        self._on_loop(self._cancel, [run for run in runs if wanted in {None, run.execution.id}], "stop")

    # --- from start to end -------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event, *, burst: bool = False) -> None:
        """Until `stop` is set; `burst`: or until nothing waits and nothing runs any more."""
        for name in ("rq.worker", "rq.job", "rq.queue", "rq.registry", "rq.scheduler"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._loop = asyncio.get_running_loop()
        chores: list[tuple[float, Callable[[], None]]] = [
            (TELL_SECONDS, self._tell),
            (SCHEDULE_SECONDS, self._schedule),
            (self._lease / 4, self._maintain),
            (BETWEEN_SECONDS, self._look_between),
        ]
        try:
            if not await self._begin(stop):
                return
            pump = self._loop.run_in_executor(self._chores, self._pump, burst)
            for chore in chores:
                self._tasks.spawn(self._every(*chore), f"jobs: {chore[1].__name__}")
            log.info("jobs_worker_started", name=self.name, queues=[lane.name for lane in self._lanes])
            await self._until(stop, pump)
            await self._drain(stop)
        finally:
            await self._end()

    async def _begin(self, stop: asyncio.Event) -> bool:
        while not stop.is_set():
            try:
                await self._in_thread(self.register_birth)
                await self._in_thread(self.subscribe)
            except (redis.RedisError, OSError) as error:
                self._trouble(error)
                await _wait(stop, 1.0)
            else:
                return True
        return False

    async def _until(self, stop: asyncio.Event, pump: asyncio.Future[None]) -> None:
        stopped = self._tasks.spawn(stop.wait(), "jobs: stop")
        await asyncio.wait([stopped, pump], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        self._stopping.set()
        self._woken.set()
        await pump

    async def _drain(self, stop: asyncio.Event) -> None:
        """What runs may end in its time; the rest goes back to the front of its queue."""
        await self._emptied(self._grace if stop.is_set() else None)
        left = list(self._runs.values())
        if left:
            log.warning("jobs_put_back", jobs=len(left))
            self._cancel(left, "requeue")
            await self._emptied(STUBBORN_SECONDS)

    async def _emptied(self, seconds: float | None) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        while self._runs and (end is None or time.monotonic() < end):
            self._idle.clear()
            await _wait(self._idle, 0.2 if end is None else min(0.2, max(0.0, end - time.monotonic())))

    async def _end(self) -> None:
        self._stopping.set()
        await self._tasks.drain(0)
        try:
            await self._in_thread(self.register_death)
            await self._in_thread(self.unsubscribe)
        except (redis.RedisError, OSError) as error:
            self._trouble(error)
        self._chores.shutdown(wait=False, cancel_futures=True)
        self._settlers.shutdown(wait=False, cancel_futures=True)
        log.info("jobs_worker_ended", name=self.name, left=len(self._runs))

    async def _in_thread(self, call: Callable[[], None]) -> None:
        await self._loop.run_in_executor(self._chores, call)

    def _on_loop(self, call: Callable[..., object], *arguments: Any) -> None:
        """From a thread; of no use once the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)

    # --- taking jobs: in a thread of its own -------------------------------------------------------------------------

    def _pump(self, burst: bool) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                took = not self._suspended and self._take_what_waits()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next look may succeed
                if _is_away(error):
                    self._trouble(error)
                else:
                    tell_of(error, "jobs_not_taken")
                self._stopping.wait(IDLE_SECONDS)
                continue
            if burst and not took and not self._runs:
                return
            self._woken.wait(IDLE_SECONDS)

    def _take_what_waits(self) -> bool:
        """One of each queue in turn, until there is nothing more or no more place."""
        took = False
        going = self._any(queue.key for queue in self.queues)
        while going and not self._stopping.is_set():
            going = False
            for lane in self._lanes:
                if self._places is not None and not self._places.acquire(blocking=False):
                    return took
                if lane.places.acquire(blocking=False):
                    if self._take_in(lane):
                        took = going = True
                        continue
                    lane.places.release()
                if self._places is not None:
                    self._places.release()
        return took

    def _take_in(self, lane: Lane) -> bool:
        """False: nothing waits. Gives the places back if it fails. Raises RedisError."""
        try:
            return any(self._take(lane, queue) for queue in lane.queues)
        except BaseException:
            lane.places.release()
            if self._places is not None:
                self._places.release()
            raise

    def _take(self, lane: Lane, queue: RQQueue) -> bool:
        while True:
            found = None
            try:
                found = self.queue_class.dequeue_any(
                    [queue], None, self.connection, AllowedJob, self.serializer, _NoDeathPenalty
                )
                if found is None:
                    return False
                job: Any = found[0]
                if job.get_status(refresh=False) != JobStatus.QUEUED:  # it was in the queue twice
                    self.connection.lrem(queue.intermediate_queue_key, 1, job.id)
                    continue
                _ = job.work
            except Exception as error:
                unread = getattr(error, "job_id", None) or (found[0].id if found else None)
                if unread is None or _is_away(error):
                    raise
                self._discard(queue, unread, error)
                continue
            self._start(Run(job, queue, lane, self.prepare_execution(job)))
            return True

    def _start(self, run: Run) -> None:
        self._runs[run.execution.id] = run  # before others see that it is here: a stop may follow at once
        try:
            self.prepare_job_execution(run.job, remove_from_intermediate_queue=True)
        except BaseException:
            del self._runs[run.execution.id]
            raise
        self._on_loop(self._spawn, run)

    # --- running them: on the event loop -----------------------------------------------------------------------------

    def _spawn(self, run: Run) -> None:
        self._tasks.spawn(self._work(run), f"jobs: {run.job.id}")

    def _cancel(self, runs: Iterable[Run], why: Why) -> None:
        for run in runs:
            if not run.ending and not run.settling:
                run.ending = why
                if run.task is not None:
                    run.task.cancel()

    async def _work(self, run: Run) -> None:
        run.task = asyncio.current_task()
        kind, work = run.job.work
        functions.handlers.set(self._handlers)
        functions.reason.set(lambda: run.ending)
        functions.told.set(run.told)
        limit = run.job.timeout
        timer = self._loop.call_later(limit, self._cancel, [run], "timeout") if limit and limit > 0 else None
        after, failure = 0.0, ""
        outcome: Outcome = "done"
        try:
            if run.ending:
                raise asyncio.CancelledError  # noqa: TRY301 - as if it had come a moment later
            await functions.run(kind, work)
        except Again as again:
            outcome, after = "again", again.after
        except asyncio.CancelledError:
            if not run.ending:  # the process is torn down: its lease will end
                raise
            outcome = _ENDED[run.ending]
        except Exception as error:  # noqa: BLE001 - a handler's own, of any kind
            if run.ending:
                outcome = _ENDED[run.ending]
            elif isinstance(error, StoreUnavailable):
                outcome, after = "again", STORE_SECONDS
            else:
                outcome, failure = "failed", type(error).__name__
                tell_of(error, "job_failed", kind=kind, id=work)
        finally:
            run.settling = True
            if timer is not None:
                timer.cancel()
        await self._settle(run, outcome, after, failure)

    async def _settle(self, run: Run, outcome: Outcome, after: float, failure: str) -> None:
        """RQ is told, however long Redis is away, unless this process ends first: then its lease does."""
        if (task := asyncio.current_task()) is not None:
            while task.uncancel():
                pass
        try:
            while outcome != "lost":
                try:
                    await self._loop.run_in_executor(self._settlers, self._record, run, outcome, after, failure)
                    break
                except (redis.RedisError, OSError) as error:
                    self._trouble(error)
                    await asyncio.sleep(SETTLE_SECONDS)
        finally:
            del self._runs[run.execution.id]
            if _RQ_3:
                self.executions.pop(run.execution.id, None)
            run.lane.places.release()
            if self._places is not None:
                self._places.release()
            self._woken.set()
            self._idle.set()
            self._ended(run.lane.name, run.told[-1] if run.told else outcome, time.monotonic() - run.began)

    def _record(self, run: Run, outcome: Outcome, after: float, failure: str) -> None:
        """In a thread. It may be tried again: what is not this execution's any more is left alone."""
        job, queue = run.job, run.queue
        if self.connection.zscore(job.started_job_registry.key, run.execution.composite_key) is None:
            log.warning("job_end_dropped", job=job.id, outcome=outcome)  # recorded before, or another worker has it
            return
        if not _RQ_3:
            self.execution = run.execution
        job.ended_at = datetime.now(UTC)
        with self.connection.pipeline() as pipeline:
            if outcome == "done":
                pipeline.delete(job.key, job.execution_registry.key)
            elif outcome == "requeued":
                queue.enqueue_job(job, pipeline=pipeline, at_front=True)
            elif outcome == "again" and after <= 0:
                queue.enqueue_job(job, pipeline=pipeline)
            elif outcome == "again":
                queue.schedule_job(job, datetime.now(UTC) + timedelta(seconds=after), pipeline=pipeline)
            else:
                job.set_status(JobStatus.STOPPED if outcome == "stopped" else JobStatus.FAILED, pipeline=pipeline)
                queue.failed_job_registry.add(job, FAILED_SECONDS, failure or outcome, pipeline=pipeline)
            self.cleanup_execution(job, pipeline, **({"execution": run.execution} if _RQ_3 else {}))
            self._count(pipeline, outcome, time.monotonic() - run.began)
            pipeline.execute()

    def _count(self, pipeline: Any, outcome: Outcome, seconds: float) -> None:
        """As `rq info` shows it."""
        if outcome == "done":
            self.increment_successful_job_count(pipeline)
        elif outcome in {"failed", "timeout", "stopped"}:
            self.increment_failed_job_count(pipeline)
        self.increment_total_working_time(timedelta(seconds=seconds), pipeline)

    # --- chores: each in a thread, again and again -------------------------------------------------------------------

    async def _every(self, seconds: float, chore: Callable[[], None]) -> None:
        while True:
            try:
                await self._in_thread(chore)
            except Exception as error:  # noqa: BLE001 - one job that can't be read, of thousands
                if _is_away(error):
                    self._trouble(error)
                else:
                    tell_of(error, "jobs_chore_failed", chore=chore.__name__)
                    await self._try_to_clear()
            else:
                self._well(chore)
            await asyncio.sleep(seconds)

    async def _try_to_clear(self) -> None:
        try:
            await self._in_thread(self._discard_unreadable)
        except (redis.RedisError, OSError) as error:
            self._trouble(error)

    def _trouble(self, error: BaseException) -> None:
        self._troubled = time.monotonic()
        if not self._away:
            self._away = True
            log.error("jobs_redis_away", error=type(error).__name__)

    def _well(self, chore: Callable[[], None]) -> None:
        if self._away and chore == self._tell:
            self._away = False
            log.warning("jobs_redis_back")

    def _tell(self) -> None:
        """That this worker lives and what it does; on time, that its jobs do."""
        self._suspended = bool(is_suspended(self.connection))
        self.last_heartbeat = datetime.now(UTC)
        state = WorkerStatus.BUSY if self._runs else WorkerStatus.IDLE
        state = WorkerStatus.SUSPENDED if self._suspended else state
        mapping = {**self.serialize(), "state": state.value, "current_jobs": len(self._runs)}
        with self.connection.pipeline() as pipeline:
            pipeline.exists(self.key)
            pipeline.hset(self.key, mapping=mapping)
            pipeline.expire(self.key, self._lease)
            known = pipeline.execute()[0]
        if not known:  # Redis was emptied, or this process stood still for longer than its lease
            with self.connection.pipeline() as pipeline:
                register(self, pipeline)
                pipeline.execute()
        if not known or time.monotonic() >= self._beat_due:
            self._beat()
            self._beat_due = time.monotonic() + self._lease / 4

    def _beat(self) -> None:
        """Renew the lease of all that runs here. What another worker has been given is cancelled."""
        runs = [run for run in list(self._runs.values()) if run.ending != "lost"]
        with self.connection.pipeline(transaction=False) as pipeline:
            for run in runs:
                run.execution.heartbeat(run.job.started_job_registry, self._lease, pipeline)
            pipeline.execute()
            for run in runs:
                pipeline.zscore(run.job.started_job_registry.key, run.execution.composite_key)
            scores = pipeline.execute()
        gone = [run for run, score in zip(runs, scores, strict=True) if score is None and not run.settling]
        lost = [run for run in gone if run.execution.id in self._runs and not self._reclaim(run)]
        if lost:
            self._on_loop(self._cancel, lost, "lost")

    def _reclaim(self, run: Run) -> bool:
        """Redis has forgotten it, since it was emptied: tell it again. False: it knows it, and gave it to another."""
        job, pipeline = run.job, _untyped(self.connection.pipeline())
        with pipeline:
            try:
                pipeline.watch(job.key)
                if pipeline.exists(job.key):
                    return False
                pipeline.multi()
                job.save(pipeline=pipeline)
                run.execution.save(self._lease, pipeline=pipeline)
                ExecutionRegistry(job.id, self.connection).add(run.execution, self._lease, pipeline=pipeline)
                job.started_job_registry.add_execution(run.execution, pipeline=pipeline, ttl=self._lease)
                pipeline.sadd(run.queue.redis_queues_keys, run.queue.key)
                pipeline.execute()
            except redis.WatchError:
                return False
        return True

    def _schedule(self) -> None:
        """Put into their queues what is due. One worker at a time, as long as it lives."""
        if self._mine("schedule", 5) and self._any(queue.scheduled_job_registry.key for queue in self.queues):
            self._scheduler.prepare_registries(self.queue_names())
            self._scheduler.enqueue_scheduled_jobs()
            self._woken.set()

    def _maintain(self) -> None:
        """Jobs of workers that died go back into their queues."""
        if time.monotonic() - self._troubled < self._lease / 2 or not self._mine("maintain", self._lease):
            return  # those that live have to say so first
        for queue in self.queues:
            clean_registries(queue)
            clean_worker_registry(queue)
        self._woken.set()

    def _look_between(self) -> None:
        """Jobs that a worker took, but did not begin: the answer was lost with Redis, or the worker died just then.

        Not by RQ's way, which waits for a minute, and takes a job for the one of that name that it saw a day ago.
        """
        if not (self._mine("between", 15) and self._any(queue.intermediate_queue_key for queue in self.queues)):
            self._between = set()
            return
        found = [(queue, job) for queue in self.queues for job in queue.intermediate_queue.get_job_ids()]
        seen = set()
        for queue, job in found:
            key = AllowedJob.key_for(job)
            this = (job, _untyped(self.connection).hget(key, "enqueued_at") or b"")
            if this in self._between:
                self.connection.eval(_PUT_BACK, 3, queue.intermediate_queue_key, queue.key, key, job)
                log.warning("job_put_back", job=job, queue=queue.name)
                self._woken.set()
            else:
                seen.add(this)
        self._between = seen

    def _any(self, keys: Iterable[str]) -> bool:
        """Is any of these there: one question, where most often all answers are no."""
        return bool(_untyped(self.connection).exists(*keys))

    def _mine(self, name: str, seconds: int) -> bool:
        """A lock for a chore that one worker does, until it stops doing it."""
        key = lock_key(name)
        if self.connection.set(key, self.name, nx=True, ex=seconds):
            return True
        if as_text(self.connection.get(key) or b"") != self.name:
            return False
        self.connection.expire(key, seconds)
        return True

    # --- what can't be read ------------------------------------------------------------------------------------------

    def _discard_unreadable(self) -> None:
        """One of them would keep RQ from looking after all others."""
        for queue in self.queues:
            registries = (queue.started_job_registry, queue.scheduled_job_registry)
            found = Counter(queue.intermediate_queue.get_job_ids())
            for registry in registries:
                found.update(registry.get_job_ids(cleanup=False))
            for job_id in found:
                try:
                    _ = _untyped(AllowedJob.fetch(job_id, self.connection, self.serializer)).work
                except NoSuchJobError:
                    continue
                except Exception as error:
                    if _is_away(error):
                        raise
                    self._discard(queue, job_id, error)

    def _discard(self, queue: RQQueue, job_id: str, error: Exception) -> None:
        log.error("job_unreadable", job=job_id, queue=queue.name, error=type(error).__name__)
        started = queue.started_job_registry.key
        entries = [
            key for key in map(as_text, _untyped(self.connection).zrange(started, 0, -1)) if _job_of(key) == job_id
        ]
        with self.connection.pipeline() as pipeline:
            pipeline.lrem(queue.intermediate_queue_key, 0, job_id)
            pipeline.zrem(queue.scheduled_job_registry.key, job_id)
            if entries:
                pipeline.zrem(started, *entries)
            pipeline.delete(AllowedJob.key_for(job_id))
            pipeline.execute()


def tell_of(error: BaseException, event: str, **about: str) -> None:
    """Its kind and its last frames. What it says may be somebody's prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    log.error(event, error=type(error).__name__, where=where, **about)


def _is_away(error: Exception) -> bool:
    """Redis, or what it can do now; not one key that somebody else made what it is."""
    return isinstance(error, (redis.RedisError, ConnectionError, TimeoutError)) and "WRONGTYPE" not in str(error)


def _job_of(composite_key: str) -> str:
    return composite_key.partition(":")[0]


def _untyped(thing: Any) -> Any:
    """What its library has no types for."""
    return thing


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
