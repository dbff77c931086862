import asyncio
import logging
import time

import pytest
from rq.command import send_stop_job_command
from rq.job import Job

from gateway import StoreUnavailable
from gateway_plugins.jobs import worker as worker_module
from gateway_plugins.jobs.parts import Again
from gateway_plugins.jobs.queue import JSONSerializer, rq_queue
from gateway_plugins.jobs.settings import Queue as QueueSettings
from tests.jobs.support import Waits, client, open_queue, running, started, status, until

JSON = JSONSerializer


async def test_250_jobs_wait_at_once_each_by_itself(url):
    """One process runs 250 separate jobs of RQ: each is `started` in RQ's registry, each can be stopped and timed out
    alone, and none is given to another worker while it waits for longer than its lease.
    """
    async with open_queue(url) as queue:
        waits = Waits(queue)
        for i in range(250):
            await queue.put("job", str(i), timeout=3 if i == 249 else 600)
        with client(url) as connection:
            async with running(url, {"job": waits}, lease=5, queues={"default": QueueSettings(concurrency=300)}):
                await until(lambda: len(waits.begun) == 250, 30)
                begun = time.monotonic()
                assert sorted(started(connection)) == sorted(f"job-{i}" for i in range(250))
                assert status(connection, "job", "100") == "started"
                send_stop_job_command(connection, "job-3", serializer=JSON)
                await queue.drop("job", "5")
                await until(lambda: {"3", "5", "249"} <= set(waits.ended))
                assert waits.ended == {"3": "stop", "5": "stop", "249": "timeout"}
                await until(lambda: len(started(connection)) == 247)
                assert [status(connection, "job", work) for work in ("3", "5", "249")] == [
                    "stopped",
                    "stopped",
                    "failed",
                ]
                async with running(url, {"job": waits}, lease=5):  # another, that looks for abandoned ones
                    await until(lambda: time.monotonic() > begun + 8, 30)
                assert len(waits.begun) == 250
                assert len(started(connection)) == 247
                waits.going.set()
                await until(lambda: len(waits.ended) == 250)
                await until(lambda: not started(connection))
            assert not connection.exists("rq:job:job-100")
            (state,) = await queue.states()
            assert (state.waiting, state.running, state.failed) == (0, 0, 3)


async def test_no_more_at_once_than_a_queue_and_a_process_allow(url):
    """`concurrency` of a queue and of the process bound what runs; the next begins when one ends."""
    queues = {"default": QueueSettings(concurrency=3), "audio": QueueSettings(concurrency=10)}
    async with open_queue(url, queues=queues) as queue:
        waits = Waits(queue)
        for i in range(6):
            await queue.put("job", f"d{i}")
            await queue.put("job", f"a{i}", queue="audio")
        async with running(url, {"job": waits}, queues=queue.queues, concurrency=7):
            await until(lambda: len(waits.begun) == 7)
            states = {state.name: state for state in await queue.states()}
            assert (states["default"].running, states["audio"].running) == (3, 4)
            assert (states["default"].waiting, states["audio"].waiting) == (3, 2)
            await queue.drop("job", "d0")
            await until(lambda: len(waits.begun) == 8)
            assert waits.begun[-1] in {"d3", "a4"}
            waits.going.set()
            await until(lambda: len(waits.ended) == 12)


async def test_of_what_waits_high_runs_before_normal_before_low(url):
    """When one place is free, what has the higher priority is taken, whenever it came."""
    async with open_queue(url) as queue:
        for work, priority in (("c", "low"), ("b", "normal"), ("a", "high")):
            await queue.put("job", work, priority=priority)
        done = []

        async def handler(work):
            done.append(work)

        async with running(url, {"job": handler}, concurrency=1):
            await until(lambda: len(done) == 3)
        assert done == ["a", "b", "c"]


async def test_what_is_stopped_before_it_begins_keeps_no_place(url):
    """A stop that comes right when a job was taken ends it; whatever is put next has its place."""
    async with open_queue(url) as queue:
        waits = Waits(queue)
        async with running(url, {"job": waits}, concurrency=1) as worker:
            spawn = worker._spawn

            def stopped_at_once(run):
                worker._spawn = spawn
                spawn(run)
                worker._cancel([run], "stop")

            worker._spawn = stopped_at_once
            await queue.put("job", "stopped")
            await until(lambda: worker._spawn == spawn and not worker._runs)
            with client(url) as connection:
                assert status(connection, "job", "stopped") == "stopped"
            await queue.put("job", "next")
            await until(lambda: waits.begun == ["next"])
            waits.going.set()


async def test_what_is_put_begins_within_milliseconds(url):
    """An idle worker is told when something is put, and does not find it at its next look only."""
    async with open_queue(url) as queue:
        begun = asyncio.Event()

        async def handler(work):
            begun.set()

        async with running(url, {"job": handler}) as worker:
            await until(lambda: worker.pubsub is not None and worker.pubsub.subscribed)
            took = []
            for i in range(5):
                begun.clear()
                at = time.monotonic()
                await queue.put("job", str(i))
                await begun.wait()
                took.append(time.monotonic() - at)
            assert sorted(took)[2] < 0.2


async def test_again_means_later(url):
    """Work that says Again is run again after that time, and RQ does not count it as a failure."""
    async with open_queue(url) as queue:
        at = []

        async def handler(work):
            at.append(time.monotonic())
            if len(at) == 1:
                raise Again(1.0)
            if len(at) == 2:
                raise Again(0)

        async with running(url, {"job": handler}):
            await queue.put("job", "a")
            await until(lambda: len(at) == 3)
            await until(lambda: not queue_has(url, "a"))
        assert 0.9 < at[1] - at[0] < 4
        (state,) = await queue.states()
        assert state.failed == 0


def everything(connection):
    """All that Redis has, as text."""
    read = {
        b"hash": connection.hgetall,
        b"set": connection.smembers,
        b"zset": lambda key: connection.zrange(key, 0, -1),
        b"list": lambda key: connection.lrange(key, 0, -1),
        b"string": connection.get,
        b"stream": connection.xrange,
    }
    return str([(key, read[connection.type(key)](key)) for key in connection.keys("*")])


def queue_has(url, work):
    with client(url) as connection:
        return connection.exists(f"rq:job:job-{work}")


async def test_a_store_that_is_away_is_no_failure(url, monkeypatch):
    """Work that meets a store that is away is done again some seconds later."""
    monkeypatch.setattr("gateway_plugins.jobs.worker.STORE_SECONDS", 0.1)
    async with open_queue(url) as queue:
        tries = []

        async def handler(work):
            tries.append(work)
            if len(tries) == 1:
                raise StoreUnavailable

        async with running(url, {"job": handler}):
            await queue.put("job", "a")
            await until(lambda: len(tries) == 2)


async def test_what_a_handler_says_reaches_neither_redis_nor_the_log(url, caplog, capsys):
    """A handler that fails is named by the kind of its exception: its words may be a prompt's."""
    async with open_queue(url) as queue:

        async def handler(work):
            raise ValueError("the prompt")

        with caplog.at_level(logging.DEBUG):
            async with running(url, {"job": handler}):
                await queue.put("job", "a")
                with client(url) as connection:
                    await until(lambda: status(connection, "job", "a") == "failed")
                    assert "the prompt" not in everything(connection)
                    assert "job-a" in everything(connection)
        assert "the prompt" not in f"{caplog.text}{capsys.readouterr()}"


async def test_what_others_put_into_a_queue_is_thrown_out_and_stops_nothing(url):
    """Foreign functions, unreadable arguments and keys of another type are discarded; the next job runs."""
    async with open_queue(url) as queue:
        done = []

        async def handler(work):
            done.append(work)

        with client(url) as connection:
            theirs = rq_queue("xenios:default", connection)
            theirs.enqueue("os.system", "touch /tmp/xenios-was-here", job_id="theirs")
            theirs.enqueue("gateway_plugins.jobs.functions.run", "job", "a", job_id="job-b")
            for name, harm in (
                ("garbage", {"data": b"\x00"}),
                ("status", {"status": "weird"}),
                ("date", {"created_at": "x"}),
            ):
                theirs.enqueue("gateway_plugins.jobs.functions.run", "job", name, job_id=f"job-{name}")
                connection.hset(f"rq:job:job-{name}", mapping=harm)
            connection.rpush(theirs.key, "job-text", "job-gone")
            connection.set("rq:job:job-text", "text")
            async with running(url, {"job": handler}):
                await queue.put("job", "good")
                await until(lambda: done == ["good"])
                await until(lambda: not connection.exists("rq:job:job-good"))
            for name in ("theirs", "job-b", "job-garbage", "job-status", "job-date", "job-text"):
                assert not connection.exists(f"rq:job:{name}"), name
            assert connection.lrange(theirs.intermediate_queue_key, 0, -1) in ([], [b"job-gone"])


@pytest.mark.full
async def test_one_that_nobody_can_read_does_not_keep_others_from_being_run_again(url):
    """Unreadable jobs among those of a dead worker, and among those that are due, are discarded; the others run."""
    async with open_queue(url) as queue:
        done = []

        async def handler(work):
            done.append(work)

        with client(url) as connection:
            for work in ("bad", "good"):
                await queue.put("job", work)
                await queue.put("job", f"{work}-later", after=1)
                connection.lrem("rq:queue:xenios:default", 0, f"job-{work}")
                connection.hset(f"rq:job:job-{work}", "status", "started")
                connection.zadd("rq:wip:xenios:default", {f"job-{work}:dead": time.time() - 10})
            connection.hset("rq:job:job-bad", "created_at", "nonsense")
            connection.hset("rq:job:job-bad-later", "status", "nonsense")
            async with running(url, {"job": handler}, lease=5):
                await until(lambda: sorted(done) == ["good", "good-later"], 20)
            assert not connection.exists("rq:job:job-bad", "rq:job:job-bad-later")


async def test_one_that_is_in_the_queue_twice_runs_once(url):
    """An id that stands in the list twice, after an outage at a bad moment, is run once at a time."""
    async with open_queue(url) as queue:
        waits = Waits(queue)
        await queue.put("job", "a")
        with client(url) as connection:
            connection.rpush("rq:queue:xenios:default", "job-a")
            async with running(url, {"job": waits}):
                await until(lambda: not connection.llen("rq:queue:xenios:default"))
                await until(lambda: not connection.llen("rq:queue:xenios:default:intermediate"))
                assert waits.begun == ["a"]
                waits.going.set()


async def test_a_stop_waits_and_puts_the_rest_back_at_the_front(url):
    """What ends within the grace is recorded; what does not is told to requeue, and is the first to run again."""
    async with open_queue(url) as queue:
        waits, quick = Waits(queue), Waits(queue)
        await queue.put("job", "slow")
        await queue.put("quick", "quick")
        async with running(url, {"job": waits, "quick": quick}, grace=1.0) as worker:
            await until(lambda: waits.begun and quick.begun)
            worker.stop.set()
            await queue.put("job", "next")
            quick.going.set()
            await until(lambda: "quick" in quick.ended)
            await asyncio.wait_for(asyncio.shield(worker.ended), 5)
        assert waits.ended == {"slow": "requeue"}
        with client(url) as connection:
            assert connection.lrange("rq:queue:xenios:default", 0, -1) == [b"job-slow", b"job-next"]
            assert not connection.exists("rq:job:quick-quick")
            assert not started(connection)
            job = Job.fetch("job-slow", connection, serializer=JSON)
            assert job.retries_left == 100
            assert not connection.smembers("rq:workers")
        async with running(url, {"job": waits}):
            waits.going.set()
            await until(lambda: waits.begun[1:] == ["slow", "next"])


async def test_burst_ends_when_nothing_is_left(url):
    """With `burst` a worker does what waits, what that brings, and ends."""
    async with open_queue(url) as queue:
        done = []

        async def handler(work):
            done.append(work)
            if work == "a":
                await queue.put("job", "b")

        await queue.put("job", "a")
        async with running(url, {"job": handler}) as worker:
            pass
        done.clear()
        from gateway_plugins.jobs.queue import connect
        from gateway_plugins.jobs.worker import AsyncWorker

        await queue.put("job", "a")
        with connect(url, 5) as connection:
            worker = AsyncWorker(connection, queue.queues, {"job": handler})
            await asyncio.wait_for(worker.run(asyncio.Event(), burst=True), 10)
        assert done == ["a", "b"]


async def test_one_that_was_taken_but_not_begun_runs_within_seconds(url, monkeypatch):
    """A job between queue and worker, of which its worker never learnt, since Redis was frozen or it died just then,
    waits again after two looks; one that was begun is only taken out.
    """
    monkeypatch.setattr(worker_module, "BETWEEN_SECONDS", 0.3)
    async with open_queue(url) as queue:
        waits = Waits(queue)
        await queue.put("job", "a")
        await queue.put("job", "taken")
        with client(url) as connection:
            waiting = rq_queue("xenios:default", connection)
            between = waiting.intermediate_queue
            for _ in "ab":
                connection.lmove(waiting.key, between.key)
            connection.hset("rq:job:job-taken", "status", "started")
            async with running(url, {"job": waits}):
                await until(lambda: waits.begun == ["a"], 5)
                await until(lambda: not connection.llen(between.key))
                assert not connection.llen(waiting.key)
                waits.going.set()
                await until(lambda: not connection.exists("rq:job:job-a"))


async def test_an_idle_worker_asks_redis_little(url):
    """One that has nothing to do asks with one question whether anything waits in any of its queues, not one for each."""
    queues = {f"q{n}": QueueSettings() for n in range(7)}
    with client(url) as connection:
        connection.config_resetstat()

        def asked(of=None):
            calls = {name: found["calls"] for name, found in connection.info("commandstats").items()}
            return calls.get(f"cmdstat_{of}", 0) if of else sum(calls.values())

        async with running(url, {}, queues):
            await until(lambda: asked("hset") >= 5)  # it has begun; once a second it says that it lives
            connection.config_resetstat()
            await until(lambda: asked("hset") >= 3)
            own = asked("info") + asked("config|resetstat")
            assert (asked() - own) / asked("hset") < 30
