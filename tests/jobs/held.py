"""A worker as a process of its own: `python -m tests.jobs.held URL LEASE GRACE`. Says on standard output what begins and
ends; its jobs wait for ever, but those whose id begins with `quick`.
"""

import asyncio
import os
import signal
import sys

from gateway_plugins.jobs import settings
from gateway_plugins.jobs.queue import Queue, connect
from gateway_plugins.jobs.worker import AsyncWorker


def say(*words):
    print(*words, flush=True)


async def handler(work):
    say("began", work)
    try:
        await asyncio.sleep(0.1 if work.startswith("quick") else 3600)
    except asyncio.CancelledError:
        say(Queue.why(), work)
        raise
    say("ended", work)


async def main(url, lease, grace):
    stop = asyncio.Event()

    def on_signal():
        if stop.is_set():
            os._exit(1)
        stop.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, on_signal)
    queues = {"default": settings.Queue(concurrency=1000)}
    worker = AsyncWorker(connect(url, 1.0), queues, {"job": handler}, lease=float(lease), grace=float(grace))
    await worker.run(stop)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
