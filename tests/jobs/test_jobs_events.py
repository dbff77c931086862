"""What happens to a job, told to whoever watches: over a real Valkey."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from gateway import Tasks
from gateway.stores.redis import RedisStore
from gateway_plugins.jobs.events import SPAN, Events, Splitter, base, events_of, numbered, run_of
from tests.jobs.support import until
from tests.stores.servers import valkey_server

A, B, C = b"data: a\n\n", b"event: b\ndata: b\n\n", b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def open_events(url):
    redis = RedisStore(url)
    events = Events(SimpleNamespace(redis=redis))
    try:
        yield events
    finally:
        await events.close()
        await redis.close()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_whole_however_they_come(end, size):
    """Each event leaves once, with its own line ends; comments are left out."""
    wanted = [event.replace(b"\n", end) for event in (A, B, C)]
    body = wanted[0] + b": keep-alive" + end * 2 + wanted[1] + wanted[2]
    splitter = Splitter()
    found = [e for start in range(0, len(body), size) for e in splitter.feed(body[start : start + size])]
    assert b"".join(found) == b"".join(wanted)
    assert events_of(body) == wanted


def test_numbers_tell_runs_apart():
    """An event's number says which run it is of."""
    assert [base(n) for n in (0, 1, 2)] == [0, 0, SPAN]
    assert [run_of(n) for n in (1, SPAN - 1, SPAN, SPAN + 1)] == [1, 1, 2, 2]
    assert numbered(7, A) == b"id: 7\ndata: a\n\n"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("own", [b"id: 9", b"id:9", b"id"])
@pytest.mark.parametrize("before", [b"", b"event: b\n"])
def test_an_upstreams_own_id_gives_way(end, own, before):
    """An event has one `id`, its number; what else begins or goes on like that field stays."""
    rest = b"data: id: 9\nidea: 9\n\n"
    event = (before + own + b"\n" + rest).replace(b"\n", end)
    assert numbered(7, event) == b"id: 7\n" + (before + rest).replace(b"\n", end)


async def test_who_watches_hears_it(url):
    """A bell rings in another process for events and for a change of state, and tells which."""
    async with open_events(url) as worker, open_events(url) as gateway, gateway.watch("job_1") as bell:
        while not await bell.wait(5):  # its subscription is confirmed
            pass
        await worker.publish("job_1", 1, 1, [A])
        assert await bell.wait(5) is False
        await worker.ring("job_1")
        assert await bell.wait(5) is True
        await worker.ring("job_2")
        assert await bell.wait(0.1) is True  # nothing, for so long: look yourself


async def test_events_are_read_from_anywhere(url):
    """Who comes late, or comes back, gets the events after the one that it had last, of the run that it asks for."""
    async with open_events(url) as events:
        await events.publish("job_1", 1, 1, [A, B])
        await events.publish("job_1", 1, 3, [C])
        for after, wanted in ((0, [(1, A), (2, B), (3, C)]), (1, [(2, B), (3, C)]), (2, [(3, C)]), (3, [])):
            assert await events.read("job_1", 1, after) == wanted
        assert await events.read("job_1", 2, 0) == []
        await events.forget("job_1", 1)
        assert await events.read("job_1", 1, 0) == []


async def test_a_gap_is_no_stream(url):
    """Where Redis lost the beginning, what is left is not given out as if it were all."""
    async with open_events(url) as events:
        await events.publish("job_1", 1, 3, [C])
        assert await events.read("job_1", 1, 0) is None
        assert await events.read("job_1", 1, 2) == [(3, C)]


async def all_heard(redis, channels):
    return all(count == 1 for _, count in await redis.pubsub_numsub(*channels))


async def test_watchers_share_a_connection(url):
    """A hundred watchers of fifty jobs hold one connection, and each hears its own."""
    async with open_events(url) as worker, open_events(url) as gateway, contextlib.AsyncExitStack() as stack:
        bells = []
        for n in range(100):  # some come while it connects
            bells.append(await stack.enter_async_context(gateway.watch(f"job_{n % 50}")))
            await asyncio.sleep(0)
        redis = worker._services.redis.client
        channels = [f"{{xenios}}:jobs:bell:job_{n}" for n in range(50)]
        await until(lambda: all_heard(redis, channels))
        assert len(await redis.client_list(_type="pubsub")) == 1
        last = await stack.enter_async_context(gateway.watch("job_last"))
        await until(last._rung.is_set)  # subscriptions ring, in their order: this is the last
        for bell in bells:
            bell._rung.clear()
        await worker.publish("job_7", 1, 1, [A])
        await until(bells[7]._rung.is_set)
        assert [n for n, bell in enumerate(bells) if bell._rung.is_set()] == [7, 57]
    async with open_events(url) as worker:
        assert await worker._services.redis.client.pubsub_numsub("{xenios}:jobs:bell:job_7") == [
            (b"{xenios}:jobs:bell:job_7", 0)
        ]


async def test_a_lost_connection_is_made_again(url, server):
    """After its Redis was away a watcher hears again."""
    async with open_events(url) as worker, open_events(url) as gateway, gateway.watch("job_1") as bell:
        await bell.wait(5)
        await worker._services.redis.client.client_kill_filter(_type="pubsub")
        assert await bell.wait(5)  # it is not told what it missed, but that it did
        while not await bell.wait(5):
            pass
        await worker.ring("job_1")
        assert await bell.wait(5)


async def watched(redis):
    """The jobs whose channels somebody is subscribed to."""
    prefix = b"{xenios}:jobs:bell:"
    return [name[len(prefix) :][:20] for name in await redis.pubsub_channels() if name.startswith(prefix)]


async def test_who_leaves_while_redis_does_not_read_leaves_at_once_and_for_good():
    """Whoever comes and goes while Redis hangs waits for nothing; once it is back nothing is subscribed to on their
    behalf, over the next connection neither.
    """
    with valkey_server() as valkey:
        async with open_events(valkey.url) as other, open_events(valkey.url) as gateway, gateway.watch("stays") as bell:
            redis, tasks, watching = other._services.redis.client, Tasks(), []

            async def only_who_stays():
                return await watched(redis) == [b"stays"]

            async def watch(n):
                async with gateway.watch(f"{n}".ljust(100_000, "x")):  # more than fits into a socket
                    await asyncio.Event().wait()

            await bell.wait(5)
            await until(only_who_stays)
            valkey.freeze()
            try:
                for n in range(20):
                    watching.append(tasks.spawn(watch(n), "watching"))
                    await asyncio.sleep(0)  # what is to be told is told, as far as it can
                for task in watching:
                    task.cancel()
                assert not (await asyncio.wait(watching, timeout=5))[1]
            finally:
                valkey.thaw()
            await until(only_who_stays)
            await redis.client_kill_filter(_type="pubsub")
            await until(only_who_stays)


async def test_who_leaves_while_it_connects_is_forgotten():
    """A watcher that is gone before Redis has answered has no subscription afterwards."""
    with valkey_server() as valkey:
        async with open_events(valkey.url) as other, open_events(valkey.url) as gateway:
            valkey.freeze()
            try:
                async with gateway.watch("gone"):
                    await asyncio.sleep(0)  # it begins to connect
            finally:
                valkey.thaw()
            async with gateway.watch("there") as bell:
                await bell.wait(5)
                assert await watched(other._services.redis.client) == [b"there"]
