"""Limits of one exchange. Times that the wheel is told are passed in; where it turns by itself, tests wait for events."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from gateway.metrics import Metrics
from gateway.timing import PluginCounts
from gateway.watch import DEADLINE, FIRST_EVENT, SHUTDOWN, STALL, TICK, TOTAL, WRITE, Watch, _Wheel, _wheels, running

SOON = TICK / 10


def started(coro):
    return asyncio.get_running_loop().create_task(coro)


async def forever():
    await asyncio.Event().wait()


async def ended_by(prepare, seconds=1000.0):
    """Why a task that waits for ever was ended."""

    async def run():
        watch = Watch(seconds)
        try:
            prepare(watch)
            await forever()
        except asyncio.CancelledError:
            return watch.take()
        finally:
            watch.close()

    async with asyncio.timeout(5):
        return await started(run())


async def test_a_deadline_ends_the_exchange():
    """An exchange over its deadline ends, whatever it waits for."""
    assert await ended_by(lambda _: None, SOON) == DEADLINE
    assert await ended_by(lambda w: w.wait(STALL, None), SOON) == DEADLINE
    assert await ended_by(lambda w: w.wait(STALL, 100), SOON) == DEADLINE


async def test_what_is_waited_for_too_long_ends_the_exchange():
    """The reason is what the exchange waited for last."""

    def prepare(watch):
        watch.wait(FIRST_EVENT, SOON)
        assert watch.waiting_for == FIRST_EVENT
        watch.wait(STALL, SOON)

    assert await ended_by(prepare) == STALL


async def test_an_attempt_has_its_time_whatever_is_waited_for():
    """The time of all of an attempt goes on while it begins, pauses or rests; not while its client is slow."""
    assert await ended_by(lambda w: w.attempt(SOON)) == TOTAL

    def prepare(watch):
        watch.attempt(SOON)
        watch.wait(STALL, 100)

    assert await ended_by(prepare) == TOTAL
    watch = Watch(1000)
    now = asyncio.get_running_loop().time()
    watch.attempt(5)
    watch.wait(WRITE, 100)
    watch.fire(now + 6)
    assert watch.expired is None
    watch.attempt(None)
    watch.wait(STALL, None)
    assert not watch.is_due(now + 999)
    watch.close()


async def test_a_deadline_is_only_brought_nearer():
    """A decision may give a request less time, never more."""
    assert await ended_by(lambda w: w.shorten(SOON)) == DEADLINE
    watch = Watch(5)
    watch.shorten(100)
    assert watch.is_due(asyncio.get_running_loop().time() + 5)
    watch.close()


async def test_a_limit_holds_only_while_it_is_waited_for():
    """What came in time, and what has no limit, ends nothing."""
    watch = Watch(1000)
    now = asyncio.get_running_loop().time()
    watch.wait(STALL, 5)
    assert not watch.is_due(now + 4)
    assert watch.is_due(now + 6)
    watch.rest()
    assert (watch.waiting_for, watch.is_due(now + 6)) == (None, False)
    watch.wait(STALL, 5)
    watch.wait(FIRST_EVENT, None)
    assert (watch.waiting_for, watch.is_due(now + 6)) == (FIRST_EVENT, False)
    assert watch.is_due(now + 1001)
    watch.close()


@pytest.mark.parametrize("prepare, reason", [
    (lambda w: w.wait(STALL, 5), STALL),
    (lambda w: w.attempt(5), TOTAL),
    (lambda w: w.shorten(5), DEADLINE),
])  # fmt: skip
async def test_a_limit_is_over_at_its_very_moment(prepare, reason):
    """A limit of five seconds ends the exchange after five seconds, not before, and once."""

    async def run():
        watch = Watch()
        watch._loop = SimpleNamespace(time=lambda: 100.0)
        prepare(watch)
        assert not watch.is_due(104.9)
        watch.fire(104.9)
        assert watch.expired is None
        assert watch.is_due(105.0)
        watch.fire(105.0)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            told = watch.take()
            watch.fire(106.0)
            return told, watch.expired
        finally:
            watch.close()

    assert await started(run()) == (reason, None)


async def test_a_keep_alive_is_due_at_its_very_moment():
    """A client that closes after five silent seconds hears something after five seconds."""
    watch, beats = Watch(), []
    watch._loop = SimpleNamespace(time=lambda: 100.0)
    watch.beat(5, 3, lambda: beats.append(1))
    for now, count in ((104.9, 0), (105.0, 1), (107.9, 1), (108.0, 2)):
        watch.fire(now)
        assert len(beats) == count, now
    watch.close()


async def test_a_stream_that_flows_is_neither_late_nor_silent():
    """Each piece starts stall and silence anew when the wheel comes by; not once the client is waited for."""
    watch, beats = Watch(), []
    watch._loop = SimpleNamespace(time=lambda: 100.0)
    watch.beat(3, 3, lambda: beats.append(1))
    watch.flows(5, sent=True)
    watch.flowing = True
    assert not watch.is_due(104.0)
    assert not watch.is_due(106.9)
    assert watch.is_due(107.0)
    watch.fire(107.0)
    assert (beats, watch.expired) == ([1], None)
    watch.flowing = True
    watch.wait(WRITE, 1)
    assert watch.is_due(101.0)
    watch.flows(None, sent=False)
    watch.flowing = True
    assert not watch.is_due(200.0)
    watch.close()


async def test_what_is_sent_without_keep_alives_starts_none():
    """Where nobody wants keep-alives, there are none after something was sent."""
    watch = Watch(1000)
    watch.touch()
    watch.fire(asyncio.get_running_loop().time() + 1)
    assert (watch.expired, watch.waiting_for) == (None, None)
    watch.close()


async def test_without_a_deadline_nothing_is_due():
    """A watch that was given no limit never fires."""
    watch = Watch()
    assert not watch.is_due(asyncio.get_running_loop().time() + 1e9)
    watch.close()


async def test_silence_is_broken_at_intervals():
    """Keep-alives come after the first silence and then at each interval; what was sent starts it anew."""
    watch, beats = Watch(1000), []
    now = asyncio.get_running_loop().time()
    watch.beat(10, 3, lambda: beats.append(1))
    assert not watch.is_due(now + 9)
    assert watch.is_due(now + 11)
    watch.fire(now + 11)
    assert len(beats) == 1
    assert not watch.is_due(now + 13.9)
    assert watch.is_due(now + 14)
    watch.touch()
    assert not watch.is_due(now + 2.9)
    assert watch.is_due(now + 3.1)
    watch.fire(now + 2.9)
    assert len(beats) == 1
    watch.fire(now + 14)
    assert len(beats) == 2
    watch.close()
    watch.fire(now + 20)
    assert len(beats) == 2
    assert watch.expired is None


async def test_the_wheel_beats_by_itself():
    """Nobody has to turn the wheel."""
    watch, beaten = Watch(1000), asyncio.Event()
    watch.beat(SOON, SOON, beaten.set)
    async with asyncio.timeout(5):
        await beaten.wait()
        beaten.clear()
        await beaten.wait()
    watch.close()


async def test_a_limit_is_told_once():
    """A deadline that fired does not cancel the exchange's clean-up again."""

    async def run():
        watch = Watch(10)
        now = asyncio.get_running_loop().time()
        watch.wait(STALL, 5)
        told = []
        for later in (6, 6, 11, 11):
            watch.fire(now + later)
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                told.append(watch.take())
        watch.close()
        return told

    assert await started(run()) == [STALL, DEADLINE]


@pytest.mark.parametrize("first", ["the client", "the limit"])
async def test_a_client_that_leaves_is_no_limit(first):
    """A cancellation from outside is told apart from one of ours, also when both come at once."""
    watches = []

    async def run():
        watches.append(Watch(1000))
        try:
            await forever()
        except asyncio.CancelledError:
            return watches[0].take()
        finally:
            watches[0].close()

    for both in (False, True):
        watches.clear()
        task = started(run())
        await asyncio.sleep(0)
        acts = [task.cancel, *([lambda: watches[0].expire(SHUTDOWN)] if both else [])]
        for act in acts if first == "the client" else reversed(acts):
            act()
        # what is left of the cancellation is whoever's who waits for the task
        assert await task is None
        assert task.cancelling() == 1


async def test_a_reason_can_be_left_for_the_caller_outside():
    """`take(only)` takes its own reason and no other."""

    async def run():
        watch = Watch(1000)
        watch.expire(SHUTDOWN)
        watch.expire(STALL)  # the first reason stays
        try:
            await forever()
        except asyncio.CancelledError:
            inner = watch.take(STALL), watch.take(FIRST_EVENT)
            return inner, watch.take(SHUTDOWN), watch.take(), asyncio.current_task().cancelling()
        finally:
            watch.close()

    assert await started(run()) == ((None, None), SHUTDOWN, None, 0)


@pytest.mark.parametrize("count", [1, 3])
async def test_the_wheel_stands_still_without_watches(count):
    """An idle gateway has no timer that wakes it, and keeps no exchange that has ended."""
    watches = [Watch(1000) for _ in range(count)]
    wheel = _wheels[asyncio.get_running_loop()]
    assert wheel._turning
    assert len(wheel._watches) == count
    for watch in watches:
        watch.close()
        watch.close()  # twice does no harm
    assert not wheel._watches
    async with asyncio.timeout(5):
        while wheel._turning:
            await asyncio.sleep(0.01)
    assert await ended_by(lambda _: None, SOON) == DEADLINE  # and turns again


async def test_a_closed_watch_ends_nothing():
    """An exchange that ended in time is not cancelled afterwards."""

    async def run():
        Watch(0).close()
        other, turned = Watch(1000), asyncio.Event()
        other.beat(0, 1000, turned.set)
        await turned.wait()
        other.close()
        return "whole"

    async with asyncio.timeout(5):
        assert await started(run()) == "whole"


class Turns:
    """A loop of which the test is the clock: `at(seconds)` is the wheel's next turn."""

    def __init__(self):
        self.now, self._next = 0.0, None

    def time(self):
        return self.now

    def call_later(self, _, call):
        self._next = call

    def at(self, now):
        self.now = now
        self._next()


def watched(running=None):
    """An exchange whose plugins are counted."""
    counts = PluginCounts(Metrics())
    return SimpleNamespace(request_id="r", running=running, snapshot=SimpleNamespace(plugin_counts=counts)), counts.slow


async def test_a_hook_that_runs_for_a_second_is_seen_once():
    """A plugin that hangs is counted while it hangs, once for each call, though nobody measures the request."""
    exchange, slow = watched()
    loop, watch, idle = Turns(), Watch(exchange=exchange), Watch()
    wheel = _Wheel(loop)
    wheel.add(watch)
    wheel.add(idle)  # no exchange runs in it
    for now in (0.0, 50.0):
        loop.at(now)
    exchange.running = ("a", "x")
    for now, seen in ((50.1, 0), (50.6, 0), (51.1, 1), (55.0, 1)):
        loop.at(now)
        assert slow.of("a", "x").value == seen, now
    exchange.running = (exchange.running[0], "x")  # another call of the same hook
    for now, seen in ((56.0, 1), (56.5, 1), (57.0, 2)):
        loop.at(now)
        assert slow.of("a", "x").value == seen, now
    exchange.running = None
    for now in (58.0, 60.0):
        loop.at(now)
    assert slow.of("a", "x").value == 2
    watch.close()
    idle.close()


async def test_who_holds_the_loop_is_known():
    """A loop that stands still can be asked from another thread which plugin's hook it stands in."""
    loop = asyncio.get_running_loop()
    assert running(loop) is None
    exchange, _ = watched(("a", "x"))
    other, _ = watched(("b", "y"))
    resting, go_on = asyncio.Event(), asyncio.Event()

    async def rests():
        watch = Watch(exchange=other)
        resting.set()
        await go_on.wait()
        watch.close()

    task = started(rests())
    await resting.wait()
    assert running(loop) is None  # its hook waits; who runs is this test
    idle, watch = Watch(), Watch(exchange=exchange)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(running, loop).result() == ("a", "x")  # this test stands still meanwhile
    exchange.running = None
    assert running(loop) is None
    go_on.set()
    await task
    watch.close()
    idle.close()


def test_a_loop_without_requests_is_held_by_nobody():
    """Before its first request a loop has no watches."""
    loop = asyncio.new_event_loop()
    assert running(loop) is None
    loop.close()
