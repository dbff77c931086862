import asyncio
import time

import pytest
from rq.job import Job

from gateway import StoreUnavailable
from gateway_plugins.jobs.settings import Queue as QueueSettings
from tests.jobs.support import client, open_queue
from tests.stores.servers import valkey_server


async def test_enqueued_once_however_often_it_is_asked_for(url):
    """What is put twice, by two processes at once, waits once."""
    async with open_queue(url) as one, open_queue(url) as other:
        await asyncio.gather(*(queue.put("job", "a") for queue in (one, other) * 5))
        (state,) = await one.states()
        assert (state.waiting, state.by_priority) == (1, {"high": 0, "normal": 1, "low": 0})


async def test_redis_is_told_a_kind_and_an_id_and_nothing_else(url):
    """All that RQ's hash of a job says of the work is its kind and its id."""
    async with open_queue(url) as queue:
        await queue.put("job", "job_1")
    with client(url) as connection:
        job = Job.fetch("job-job_1", connection, serializer="rq.serializers.JSONSerializer")
        assert (job.func_name, job.args, job.kwargs) == (
            "gateway_plugins.jobs.functions.run",
            ["job", "job_1"],
            {},
        )
        assert job.description == "job-job_1"
        assert not job.meta


async def test_high_goes_before_normal_before_low(url):
    """A position counts those of higher priority that wait, and those that came before."""
    async with open_queue(url, queues={"audio": QueueSettings(priority="low")}) as queue:
        await queue.put("job", "low", queue="audio")
        await queue.put("job", "normal", queue="audio", priority="normal")
        await queue.put("job", "second", queue="audio", priority="normal")
        await queue.put("job", "high", queue="audio", priority="high")
        await queue.put("job", "first", queue="audio", priority="normal", front=True)
        places = {
            work: await queue.position("job", work, "audio") for work in ("high", "first", "normal", "second", "low")
        }
        assert list(places.values()) == [0, 1, 2, 3, 4]
        assert await queue.position("job", "other", "audio") is None


async def test_a_queue_that_is_no_more_is_the_default_one(url):
    """Work for a queue that the configuration has lost waits in `default`."""
    async with open_queue(url) as queue:
        await queue.put("job", "a", queue="lost")
        assert await queue.position("job", "a", "lost") == 0
        assert [(s.name, s.waiting) for s in await queue.states()] == [("default", 1)]


async def test_what_waits_or_is_due_later_can_be_taken_out(url):
    """Dropped work waits no more, and RQ does not know it any longer."""
    async with open_queue(url) as queue:
        await queue.put("job", "now")
        await queue.put("job", "later", after=60)
        (state,) = await queue.states()
        assert (state.waiting, state.scheduled) == (1, 1)
        assert await queue.unknown("job", ["now", "later", "never"]) == {"never"}
        for work in ("now", "later", "never"):
            await queue.drop("job", work)
        (state,) = await queue.states()
        assert (state.waiting, state.scheduled) == (0, 0)
        assert await queue.unknown("job", ["now", "later"]) == {"now", "later"}


async def test_one_whose_worker_died_can_be_taken_out(url):
    """Work that waits again after its worker's death can be dropped, though RQ still remembers half of that try."""
    async with open_queue(url) as queue:
        await queue.put("job", "a")
        with client(url) as connection:
            connection.zadd("rq:executions:job-a", {"dead": 1e12})
            await queue.drop("job", "a")
            assert not connection.exists("rq:job:job-a", "rq:executions:job-a")
        assert await queue.position("job", "a") is None


async def test_what_has_failed_can_be_put_again(url):
    """RQ's memory of a failure does not keep work from being done anew."""
    async with open_queue(url) as queue:
        await queue.put("job", "a")
        with client(url) as connection:
            job = Job.fetch("job-a", connection, serializer="rq.serializers.JSONSerializer")
            connection.delete("rq:queue:xenios:default")
            job.set_status("failed")
            job.failed_job_registry.add(job, 60)
            assert await queue.unknown("job", ["a"]) == {"a"}
            await queue.put("job", "a")
        (state,) = await queue.states()
        assert (state.waiting, state.failed) == (1, 0)


async def test_the_age_of_the_oldest(url):
    """An empty queue has no oldest job; one with jobs says how long the first has waited."""
    async with open_queue(url) as queue:
        (state,) = await queue.states()
        assert state.oldest_seconds is None
        await queue.put("job", "a")
        with client(url) as connection:
            connection.hset("rq:job:job-a", "enqueued_at", "2020-01-01T00:00:00.000000Z")
        (state,) = await queue.states()
        assert state.oldest_seconds > 86400


@pytest.mark.parametrize("harm", ["freeze", "kill"])
async def test_a_redis_that_is_away_costs_a_moment_and_is_found_again(harm):
    """The first call fails within a second, 200 others at once; work can be put again soon after Redis is back."""
    with valkey_server() as server:
        async with open_queue(server.url) as queue:
            await queue.put("job", "before")
            getattr(server, harm)()
            began = time.monotonic()
            answers = await asyncio.gather(*(queue.put("job", str(i)) for i in range(200)), return_exceptions=True)
            assert {type(answer) for answer in answers} == {StoreUnavailable}
            assert time.monotonic() - began < 1
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await queue.states()
            assert time.monotonic() - began < 0.1
            server.thaw() if harm == "freeze" else server.start()
            async with asyncio.timeout(10):
                while True:
                    try:
                        await queue.put("job", "after")
                        break
                    except StoreUnavailable:
                        await asyncio.sleep(0.05)
            assert await queue.unknown("job", ["before", "after"]) == set()


async def test_a_restart_between_two_calls_is_not_even_noticed():
    """A connection from before Redis' restart is no outage."""
    with valkey_server() as server:
        async with open_queue(server.url) as queue:
            await queue.put("job", "before")
            while not queue._seen:  # what it asks by itself is done
                await asyncio.sleep(0.01)
            server.kill()
            server.start()
            await queue.put("job", "after")


async def test_one_process_of_a_gateway_tells_the_gauges(url, tmp_path):
    """Of two processes that share a data directory one tells how many wait; the other takes over when it ends."""
    async with open_queue(url, tmp_path) as one:
        await one.put("job", "a")
        async with asyncio.timeout(10), open_queue(url, tmp_path) as other:
            while not (one._seen or other._seen):
                await asyncio.sleep(0.01)
            assert bool(one._seen) != bool(other._seen)
            families = {family.name: family for family in await one._services.metrics.read()}
            waiting = {series.labels: series.value for series in families["xenios_jobs_waiting"].series}
            assert waiting[("default", "normal")] == 1


async def test_now_counts_more_than_later(url):
    """What is to be run tomorrow and is asked for now waits now, once; what is asked for later stays as it was."""
    async with open_queue(url) as queue:
        await queue.put("delivery", "a", after=86400)
        await queue.put("delivery", "b", after=3)
        assert await queue.unknown("delivery", ["a", "b"]) == set()
        assert await queue.unknown("delivery", ["a", "b", "c"], within=5) == {"a", "c"}
        await queue.put("delivery", "a", after=60)
        assert await queue.unknown("delivery", ["a"], within=3600) == {"a"}
        await queue.put("delivery", "a")
        await queue.put("delivery", "a")
        (state,) = await queue.states()
        assert (state.waiting, state.scheduled) == (1, 1)
        assert await queue.unknown("delivery", ["a"], within=5) == set()
