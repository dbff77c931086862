"""A queue as the parts of the plugin see it, and RQ beside it."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

from gateway.metrics import Metrics
from gateway_plugins.jobs import settings
from gateway_plugins.jobs.functions import AllowedJob, job_id
from gateway_plugins.jobs.queue import JSONSerializer, Queue, connect, queue_name, rq_queue
from gateway_plugins.jobs.worker import AsyncWorker


@contextlib.asynccontextmanager
async def open_queue(url, data_dir=None, **config):
    services = SimpleNamespace(redis=SimpleNamespace(url=url), metrics=Metrics(), data_dir=data_dir)
    queue = Queue(settings.Config(**config), services)
    async with queue.lifespan():
        yield queue


def client(url, timeout=5.0):
    return connect(url, timeout)


def status(connection, kind, work):
    job = AllowedJob(job_id(kind, work), connection=connection, serializer=JSONSerializer)
    return (job._fetch_status() if hasattr(job, "_fetch_status") else job.get_status()) or None


@contextlib.asynccontextmanager
async def running(url, handlers, queues=None, **options):
    """A worker in this process; what it gives also sets it to stop."""
    stop = asyncio.Event()
    lease = options.setdefault("lease", 60)
    connection = connect(url, min(5.0, lease / 4))
    worker = AsyncWorker(connection, queues or {"default": settings.Queue()}, handlers, **options)
    worker.stop = stop
    task = asyncio.get_running_loop().create_task(worker.run(stop))
    worker.ended = task
    try:
        yield worker
    finally:
        stop.set()
        await task
        connection.close()


async def until(condition, seconds=10.0):
    """The first answer that is true."""
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.02)


class Waits:
    """A handler that waits until it is let go, as one that waits for a model does."""

    def __init__(self, queue=None):
        self.going = asyncio.Event()
        self.begun = []
        self.ended = {}
        self._why = queue.why if queue else lambda: ""

    async def __call__(self, work):
        self.begun.append(work)
        try:
            await self.going.wait()
        except asyncio.CancelledError:
            self.ended[work] = self._why()
            raise
        self.ended[work] = "done"


def started(connection, name="default"):
    """Ids of the jobs that RQ says are running."""
    queue = rq_queue(queue_name(name, "normal"), connection)
    return queue.started_job_registry.get_job_ids(cleanup=False)
