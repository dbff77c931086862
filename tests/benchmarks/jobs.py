"""Jobs a second and memory of `xenios worker`'s process beside RQ's own workers: `make bench ARGS='--only jobs'`

Each worker does its jobs in a process of its own, on a Valkey on a unix socket, until nothing waits.
"""

import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import redis
import rq
from rq.serializers import JSONSerializer

# Ours is imported where it is used: RQ's own workers don't have it in their memory.

NAME = "xenios:default"
SECONDS = 3.0  # that a waiting job waits, as one for a model does
KINDS = {  # jobs that do nothing; jobs that wait at the same time
    "xenios worker": (1000, 300),
    "rq SimpleWorker": (1000, 1),
    "rq Worker": (150, 1),
}


def nothing():
    """A job of RQ's own workers."""


def waits():
    time.sleep(SECONDS)  # noqa: TID251 - there is no event loop here


async def handle_nothing(_):
    """The same for ours."""


async def handle_waits(_):
    await asyncio.sleep(SECONDS)


# --- in the worker's process ------------------------------------------------------------------------------------------


def work(kind, url):
    connection = redis.Redis.from_url(url)
    if kind == "xenios worker":
        from gateway_plugins.jobs import settings
        from gateway_plugins.jobs.worker import AsyncWorker

        handlers = {"nothing": handle_nothing, "waits": handle_waits}
        worker = AsyncWorker(connection, {"default": settings.Queue(concurrency=1000)}, handlers)
        asyncio.run(worker.run(asyncio.Event(), burst=True))
    else:
        queue = rq.Queue(NAME, connection=connection, serializer=JSONSerializer)
        cls = rq.SimpleWorker if kind == "rq SimpleWorker" else rq.Worker
        worker = cls([queue], connection=connection, serializer=JSONSerializer)
        worker.work(burst=True, logging_level="CRITICAL")


def child(kind, url):
    if kind == "xenios worker":
        import gateway_plugins.jobs.worker  # noqa: F401
    print("ready", flush=True)
    sys.stdin.readline()
    begun, spent = time.perf_counter(), cpu()
    work(kind, url)
    print(json.dumps({"seconds": time.perf_counter() - begun, "cpu": cpu() - spent}), flush=True)


def cpu():
    """Of this process and of those that it forked."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# --- in the one that measures -----------------------------------------------------------------------------------------


def put(kind, url, what, jobs):
    with redis.Redis.from_url(url) as connection:
        connection.flushall()
        queue = rq.Queue(NAME, connection=connection, serializer=JSONSerializer)
        for i in range(jobs):
            if kind == "xenios worker":
                from gateway_plugins.jobs.queue import _put

                _put(connection, what, str(i), NAME, 600, front=False, after=0)
            else:
                queue.enqueue(f"tests.benchmarks.jobs.{what}", result_ttl=0)


def tree_mb(pid):
    """Memory of a process and its children, shared pages in shares."""
    pids = [pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    found = 0
    for one in pids:
        with contextlib.suppress(OSError):  # it has just ended
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            found += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found / 1024


def run(kind, url, what, jobs):
    """What the worker said of itself, its memory before it began, and while all jobs ran."""
    put(kind, url, what, jobs)
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.jobs", kind, url]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        redis.Redis.from_url(url) as connection,
    ):
        process.stdout.readline()
        idle = busy = tree_mb(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        if what == "waits":
            while connection.zcard(f"rq:wip:{NAME}") < jobs:
                time.sleep(0.05)  # noqa: TID251 - there is no event loop here
            time.sleep(0.5)  # noqa: TID251 - there is no event loop here
            busy = tree_mb(process.pid)
        lines = process.stdout.read().splitlines()
        return json.loads(lines[-1]), idle, busy


def measured():
    """Kind of worker → jobs a second, CPU milliseconds of one, memory: at rest, with so many calls at once, of one more."""
    from tests.stores.servers import valkey_server

    os.environ.setdefault("PYTHONPATH", str(Path.cwd()))  # RQ imports its functions by name
    found = {}
    with valkey_server("--appendonly", "no") as server:
        for kind, (jobs, at_once) in KINDS.items():
            said, idle, _ = run(kind, server.url, "nothing", jobs)
            _, _, busy = run(kind, server.url, "waits", at_once)
            # where a worker does one call at a time, another call is another worker
            each = (busy - idle) / at_once if at_once > 1 else busy
            found[kind] = {
                "rate": jobs / said["seconds"],
                "cpu": said["cpu"] / jobs * 1000,
                "idle_mb": idle,
                "at_once": at_once,
                "peak_mb": busy,
                "call_mb": each,
            }
    for one in found.values():
        one["cpu_ratio"] = one["cpu"] / found["rq SimpleWorker"]["cpu"]
    return found


if __name__ == "__main__":
    child(*sys.argv[1:])
