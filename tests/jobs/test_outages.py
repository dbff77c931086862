"""Redis is frozen, killed, emptied while a worker holds jobs: it goes on, and nothing runs twice without need."""

import asyncio

import pytest

from tests.jobs.support import Waits, client, open_queue, running, started, until
from tests.stores.servers import valkey_server


@pytest.fixture
def server():
    with valkey_server() as running_server:
        yield running_server


async def put_soon(queue, *arguments, **options):
    """As the reconciler does: again until Redis takes it."""
    from gateway import StoreUnavailable

    async with asyncio.timeout(10):
        while True:
            try:
                return await queue.put(*arguments, **options)
            except StoreUnavailable:
                await asyncio.sleep(0.05)


@pytest.mark.promise("P9.jobs")
@pytest.mark.parametrize("harm", ["freeze", "kill"])
async def test_jobs_go_on_while_redis_is_away(server, harm):
    """Redis is frozen, or killed and started again: what ran runs on and ends once, what ended meanwhile is recorded, a
    job that is put afterwards runs, and a stop arrives.
    """
    async with open_queue(server.url) as queue:
        waits, ends = Waits(queue), Waits(queue)
        for work in "abc":
            await queue.put("job", work)
        await queue.put("ends", "d")
        async with running(server.url, {"job": waits, "ends": ends}, lease=5) as worker:
            await until(lambda: len(waits.begun) == 3 and ends.begun)
            getattr(server, harm)()
            ends.going.set()  # its end can't be recorded now
            await until(lambda: worker._away)
            server.thaw() if harm == "freeze" else server.start()
            await put_soon(queue, "job", "later")
            await until(lambda: "later" in waits.begun)
            with client(server.url) as connection:
                await until(lambda: not connection.exists("rq:job:ends-d"))
                assert sorted(started(connection)) == ["job-a", "job-b", "job-c", "job-later"]
            await until(lambda: worker.pubsub.subscribed)
            for _ in range(20):  # the subscription comes back by itself, in its time
                await queue.drop("job", "b")
                await asyncio.sleep(0.25)
                if waits.ended:
                    break
            assert waits.ended == {"b": "stop"}
            waits.going.set()
            await until(lambda: len(waits.ended) == 4)
        assert (waits.begun, ends.begun) == (["a", "b", "c", "later"], ["d"])


@pytest.mark.full
async def test_an_outage_longer_than_the_lease_runs_nothing_twice(server):
    """Redis is away for longer than any lease: as long as the worker lives its jobs are its own when Redis is back, and
    another worker does not take them for abandoned.
    """
    async with open_queue(server.url) as queue:
        waits = Waits(queue)
        for work in "abc":
            await queue.put("job", work)
        handlers = {"job": waits}
        async with running(server.url, handlers, lease=5), running(server.url, handlers, lease=5):
            await until(lambda: len(waits.begun) == 3)
            server.freeze()
            await asyncio.sleep(8)
            server.thaw()
            await asyncio.sleep(8)
            assert sorted(waits.begun) == ["a", "b", "c"]
            waits.going.set()
            with client(server.url) as connection:
                await until(lambda: not started(connection))
        assert waits.ended == dict.fromkeys("abc", "done")


@pytest.mark.promise("P9.jobs")
@pytest.mark.parametrize("how", ["flushed", "restarted"])
async def test_a_redis_that_comes_back_empty_is_told_what_runs(server, how):
    """Redis comes back empty: what runs is registered again and ends as if nothing had been; what waited is known to
    be unknown, and can be put again.
    """
    async with open_queue(server.url) as queue:
        waits = Waits(queue)
        for work in "abc":
            await queue.put("job", work)
        async with running(server.url, {"job": waits}, concurrency=2) as worker:
            await until(lambda: len(waits.begun) == 2)
            with client(server.url) as connection:
                if how == "restarted":
                    connection.config_set("appendonly", "no")
                    server.kill()
                    for file in server._directory.glob("appendonlydir/*"):
                        file.unlink()
                    server.start()
                connection.flushall()
                await until(lambda: sorted(started(connection)) == ["job-a", "job-b"])
                await until(lambda: connection.smembers("rq:workers"))
                assert connection.hget("rq:job:job-a", "status") == b"started"
            assert await until(lambda: queue.unknown("job", "abc")) == {"c"}
            await queue.put("job", "a")  # by a reconciler that came too early
            await queue.put("job", "c")
            waits.going.set()
            await until(lambda: len(waits.ended) == 3)
            assert worker is not None
        assert sorted(waits.begun) == ["a", "b", "c"]
        assert set(waits.ended.values()) == {"done"}


async def test_what_another_worker_has_been_given_is_lost_here(server):
    """A job that RQ has given to another worker is cancelled here, is told so, and its end is not recorded."""
    async with open_queue(server.url) as queue:
        waits = Waits(queue)
        await queue.put("job", "a")
        async with running(server.url, {"job": waits}, lease=5):
            await until(lambda: waits.begun)
            with client(server.url) as connection:
                connection.delete("rq:wip:xenios:default")
                await until(lambda: waits.ended)
                assert waits.ended == {"a": "lost"}
                assert connection.exists("rq:job:job-a")


async def test_a_worker_waits_for_a_redis_that_is_away_at_its_start(server):
    """A worker that starts while Redis is away begins when it comes; one that is stopped meanwhile ends."""
    server.kill()
    waits = Waits()
    async with running(server.url, {"job": waits}):
        await asyncio.sleep(0.1)
    async with running(server.url, {"job": waits}):
        server.start()
        async with open_queue(server.url) as queue:
            await queue.put("job", "a")
            await until(lambda: waits.begun)
            waits.going.set()
