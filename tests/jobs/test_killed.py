"""Workers as processes: killed, stopped, stopped twice."""

import asyncio
import contextlib
import os
import signal
import sys

import pytest

from tests.jobs.support import client, open_queue, started, until


class Worker:
    """What it said is in `said`."""

    def __init__(self, process):
        self.process = process
        self.said = []
        self._reading = asyncio.get_running_loop().create_task(self._read())

    async def _read(self):
        async for line in self.process.stdout:
            self.said.append(line.decode().strip())

    def of(self, word):
        return [line.partition(" ")[2] for line in self.said if line.startswith(f"{word} ")]


@contextlib.asynccontextmanager
async def process(url, lease=5, grace=30):
    worker = Worker(
        await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.jobs.held", url, str(lease), str(grace)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    )
    try:
        yield worker
    finally:
        with contextlib.suppress(ProcessLookupError):
            worker.process.kill()
        await worker.process.wait()
        await worker._reading


async def test_jobs_of_a_killed_worker_run_again(url):
    """A worker is killed while it holds 200 jobs: another has them all once the lease is over, at the front."""
    async with open_queue(url) as queue:
        works = [f"w{i}" for i in range(200)]
        for work in works:
            await queue.put("job", work)
        async with process(url) as one:
            await until(lambda: len(one.of("began")) == 200, 30)
            one.process.kill()
            await one.process.wait()
        async with process(url) as other:
            await queue.put("job", "new")
            await until(lambda: len(other.of("began")) == 201, 30)
            assert sorted(other.of("began")) == sorted([*works, "new"])
            with client(url) as connection:
                assert len(started(connection)) == 201
                # its name goes when a maintenance finds that it has expired, before or after its jobs
                await until(lambda: len(connection.smembers("rq:workers")) == 1, 30)


@pytest.mark.full
async def test_term_waits_for_what_ends_in_time_and_puts_back_the_rest(url):
    """SIGTERM: nothing new is taken, what ends within the grace ends, the rest waits again; the process ends with 0."""
    async with open_queue(url) as queue, process(url, grace=1) as worker:
        await queue.put("job", "long")
        await until(lambda: worker.of("began") == ["long"], 30)
        await queue.put("job", "quick")
        await until(lambda: "quick" in worker.of("began"))
        worker.process.send_signal(signal.SIGTERM)
        await queue.put("job", "late")
        assert await asyncio.wait_for(worker.process.wait(), 10) == 0
        await worker._reading
        assert worker.of("ended") == ["quick"]
        assert worker.of("requeue") == ["long"]
        with client(url) as connection:
            waiting = connection.lrange("rq:queue:xenios:default", 0, -1)
            assert waiting[0] == b"job-long"
            assert not started(connection)


@pytest.mark.full
async def test_a_second_term_does_not_wait(url):
    """A second signal ends the process at once; its job runs again when the lease is over."""
    async with open_queue(url) as queue:
        async with process(url, grace=3600) as worker:
            await queue.put("job", "long")
            await until(lambda: worker.of("began"), 30)
            worker.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            worker.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(worker.process.wait(), 5) == 1
        async with process(url) as other:
            await until(lambda: other.of("began") == ["long"], 30)


@pytest.mark.full
async def test_a_worker_that_stood_still_learns_what_it_has_lost(url):
    """A process that was stopped for longer than its lease goes on, but not with jobs that another has begun since."""
    async with open_queue(url) as queue, process(url) as one:
        await queue.put("job", "a")
        await until(lambda: one.of("began"), 30)
        one.process.send_signal(signal.SIGSTOP)
        async with process(url) as other:
            await until(lambda: other.of("began") == ["a"], 30)
            one.process.send_signal(signal.SIGCONT)
            await until(lambda: one.of("lost") == ["a"])
            await queue.put("job", "quick")
            await until(lambda: "quick" in one.of("ended") + other.of("ended"))
            with client(url) as connection:
                await until(lambda: started(connection) == ["job-a"])  # quick's end is noted after it ended
