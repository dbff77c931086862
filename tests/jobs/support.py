"""A queue as the parts of the plugin see it, and RQ beside it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

from gateway.metrics import Metrics
from gateway_plugins.jobs import settings
from gateway_plugins.jobs.functions import AllowedJob, job_id
from gateway_plugins.jobs.queue import JSONSerializer, Queue, connect


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
