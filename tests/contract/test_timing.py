"""How long plugins take: which requests are measured, what is noted of each hook, and what is noticed without that."""

import asyncio
import itertools
import time

import pytest
import structlog

from gateway import Reply, UpstreamError, hookimpl, timing
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Error, Pause, ScriptedUpstream, Stream, chat_events
from tests.contract.recorder import Recorder, trace


@pytest.fixture
def logs():
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def unsampled(monkeypatch):
    """The next requests are none of those that are measured."""
    monkeypatch.setattr(timing, "_requests", itertools.count(1))


@pytest.fixture
def sampled(monkeypatch):
    """The next request is one that is measured."""
    monkeypatch.setattr(timing, "_requests", itertools.count())


def of(exchange, plugin):
    """Hooks of one plugin in the order in which they were noted."""
    return [hook for who, hook, _, _ in exchange.timings if who == plugin]


async def test_one_request_of_many_is_measured(sampled):
    """The first request and every 31st after it have timings, the others none."""
    async with Gateway.test() as gw:
        for _ in range(timing.ONE_OF + 1):
            await gw.chat()
        measured = [e.timings is not None for e in await gw.finished(timing.ONE_OF + 1)]
    assert measured == [True, *[False] * (timing.ONE_OF - 1), True]


@pytest.mark.parametrize("stream", [False, True])
async def test_every_hook_that_ran_is_noted(stream, sampled):
    """A measured request knows when each hook of each plugin began and ended, the last ones included."""
    async with Gateway.test(plugins=[Recorder]) as gw:
        assert (await gw.chat(stream=stream)).status == 200
        [exchange] = await gw.finished()
    ran = [hook for hook in trace(exchange) if not hook.startswith("tap.")]
    noted = of(exchange, "Recorder")
    assert sorted(set(noted)) == sorted(set(ran))
    assert noted.count("around_upstream") == 2  # before and after the upstream
    assert noted.count("open_tap") == int(stream)
    assert all(exchange.started <= began <= ended for _, _, began, ended in exchange.timings)


async def test_what_fails_is_noted_too(sampled):
    """A hook that refuses, and what runs after it, are measured as any other."""

    class Refuses:
        def __init__(self, config, services): ...

        @hookimpl
        async def check_request(self, exchange):
            raise RuntimeError("broken")

        @hookimpl
        def response_started(self, exchange): ...

    async with Gateway.test(plugins=[Refuses]) as gw:
        assert (await gw.chat()).status == 503
        [exchange] = await gw.finished()
    assert of(exchange, "Refuses") == ["check_request", "response_started"]


class Layer:
    """Waits a little before and after it calls the upstream, and between two tries."""

    def __init__(self, config, services): ...

    @hookimpl
    async def around_upstream(self, exchange, attempt, call_next):
        await asyncio.sleep(0.02)
        try:
            reply = await call_next(attempt)
        except UpstreamError:
            await asyncio.sleep(0.02)
            reply = await call_next(attempt)
        await asyncio.sleep(0.02)
        return reply


async def test_a_layer_is_measured_without_the_upstream(sampled):
    """Of `around_upstream` the plugin's own stretches count, not what the upstream and the layers inside it took."""
    upstream = ScriptedUpstream(Error(500), Stream(Pause(0.3), *chat_events()))
    async with Gateway.test(plugins=[Layer, Recorder], upstream=upstream) as gw:
        assert (await gw.chat(stream=True)).status == 200
        [exchange] = await gw.finished()
    pieces = [ended - began for who, _, began, ended in exchange.timings if who == "Layer"]
    assert len(pieces) == 3
    assert all(0.015 < seconds < 0.2 for seconds in pieces)
    assert timing.summed(exchange.timings)["Recorder", "around_upstream"] < 0.2


class SlowTap:
    """Takes ten milliseconds for each event."""

    def __init__(self, config, services):
        self.seconds = 0.0

    @hookimpl
    def open_tap(self, exchange):
        return self

    def event(self, event):
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 0.01:
            pass
        self.seconds += asyncio.get_running_loop().time() - began
        return event

    def end(self, outcome):
        return ()


async def test_a_tap_is_one_piece(sampled):
    """A tap's time is the sum of its calls over the stream, not the time that the stream took."""
    upstream = ScriptedUpstream(Stream(*chat_events("one two three", done=False), Pause(0.2), "[DONE]"))
    async with Gateway.test(plugins=[SlowTap], upstream=upstream) as gw:
        await gw.chat(stream=True)
        [exchange] = await gw.finished()
        spent = gw.plugin("SlowTap").seconds
    [(_, hook, began, ended)] = [t for t in exchange.timings if t[0] == "SlowTap"]
    assert hook == "open_tap"
    assert spent <= ended - began < spent + 0.01


async def test_a_plugin_can_have_any_request_measured(unsampled):
    """A list that `request_received` sets has the request measured from the next plugin on."""

    class Wants:
        def __init__(self, config, services): ...

        @hookimpl
        async def request_received(self, exchange):
            if exchange.request.header("x-measure"):
                exchange.timings = []

    async with Gateway.test(plugins=[Wants, Recorder]) as gw:
        await gw.chat()
        await gw.post("/v1/chat/completions", {"model": "m", "messages": []}, headers={"x-measure": "1"})
        left, measured = await gw.finished(2)
    assert left.timings is None
    assert of(measured, "Recorder")[0] == "request_received"


def slow(logs):
    return [line for line in logs if line["event"] == "plugin_slow"]


def waiting(hook, logs):
    """A plugin whose hook waits until somebody complains."""

    async def wait(where):
        async with asyncio.timeout(5):
            while where == hook and not slow(logs):
                await asyncio.sleep(0.01)

    class Waiting:
        def __init__(self, config, services): ...

        @hookimpl
        async def authenticate(self, exchange):
            await wait("authenticate")

        @hookimpl
        async def around_upstream(self, exchange, attempt, call_next):
            reply = await call_next(attempt)
            await wait("around_upstream")
            return reply

        @hookimpl
        async def request_finished(self, exchange):
            await wait("request_finished")

    return Waiting


@pytest.mark.parametrize("hook", ["authenticate", "around_upstream", "request_finished"])
async def test_a_slow_hook_is_noticed_in_any_request(hook, logs, unsampled):
    """A hook that runs for a second is named in the log while it runs, with the request, though nobody measures it."""
    async with Gateway.test(plugins=[waiting(hook, logs), "api_keys"]) as gw:
        assert (await gw.chat()).status == 200
        [exchange] = await gw.finished()
    [line] = slow(logs)
    assert (line["plugin"], line["hook"], line["request_id"]) == ("Waiting", hook, exchange.request_id)
    assert 0.8 <= line["seconds"] < 3
    assert exchange.timings is None


async def test_a_slow_upstream_is_no_slow_plugin(logs):
    """While the upstream is waited for, and while a route of a plugin works, no hook is slow."""

    class Calls:
        def __init__(self, config, services): ...

        @hookimpl
        def register_routes(self, router):
            router.add("GET", "/slow", self.handle)

        async def handle(self, exchange):
            await asyncio.sleep(1.3)
            return Reply(200)

    upstream = ScriptedUpstream(Stream(Pause(1.3), *chat_events()))
    async with Gateway.test(plugins=[Calls, Layer, Recorder], upstream=upstream) as gw:
        replies = await asyncio.gather(gw.chat(stream=True), gw.get("/slow"))
    assert [reply.status for reply in replies] == [200, 200]
    assert slow(logs) == []


# --- what the metrics say of it --------------------------------------------------------------------------------------


async def told(gw, name):
    """{(plugin, hook): series} of a metric."""
    [family] = [family for family in await gw.worker.metrics.read() if family.name == name]
    return {series.labels: series for series in family.series}


async def test_measured_requests_count_in_the_metrics(sampled):
    """A hook counts once in each measured request, with all its time; what nobody measures does not count."""
    async with Gateway.test(plugins=[Layer, Recorder], upstream=ScriptedUpstream(Error(500))) as gw:
        for _ in range(3):
            await gw.chat()
        await gw.finished(3)
        seconds = await told(gw, "xenios_plugin_seconds")
    assert sum(seconds["Layer", "around_upstream"].counts) == 1
    assert 0.05 < seconds["Layer", "around_upstream"].value < 0.3
    assert sum(seconds["Recorder", "request_finished"].counts) == 1


async def test_routes_are_no_hooks(monkeypatch):
    """Handlers are measured, and leave no series of their own: nor do methods and paths that clients think of."""
    monkeypatch.setattr(timing, "is_sampled", lambda: True)
    async with Gateway.test(plugins=[Recorder]) as gw:
        for method in ("PUT", "PATCH", "PROPFIND"):
            await gw.request(method, f"/{method}")
        await gw.get("/v1/models")
        exchanges = await gw.finished(4)
        seconds = await told(gw, "xenios_plugin_seconds")
        failures = await told(gw, "xenios_plugin_failures_total")
    assert [of(exchange, "core") for exchange in exchanges] == [["ANY unmatched"]] * 3 + [["GET /v1/models"]]
    assert "core" not in {plugin for plugin, _ in seconds}
    assert {hook for plugin, hook in failures if plugin == "core"} == {"ANY unmatched", "GET /v1/models"}


@pytest.mark.parametrize("hook", ["authenticate", "request_finished"])
async def test_slow_calls_are_counted(hook, logs, unsampled):
    """A call that takes a second counts in the metrics, once, whether it is measured or not."""
    async with Gateway.test(plugins=[waiting(hook, logs), "api_keys"]) as gw:
        assert (await gw.chat()).status == 200
        await gw.finished()
        slow_calls = await told(gw, "xenios_plugin_slow_total")
    assert slow_calls["Waiting", hook].value == 1
    assert sum(series.value for series in slow_calls.values()) == 1


@pytest.mark.parametrize("hook", ["check_request", "response_started"])
async def test_hooks_that_block_are_counted(hook, unsampled):
    """A hook that holds the loop up for more than a second counts, sync or not; the loop's lag says how long it was."""

    class Blocks:
        def __init__(self, config, services): ...

        @hookimpl
        async def check_request(self, exchange):
            self.block("check_request")

        @hookimpl
        def response_started(self, exchange):
            self.block("response_started")

        def block(self, where):
            if where == hook:
                time.sleep(1.3)  # noqa: TID251 - to block the loop is what this is for

    async with Gateway.test(plugins=[Blocks]) as gw:
        assert (await gw.chat()).status == 200
        slow_calls = await told(gw, "xenios_plugin_slow_total")
        [lag] = (await told(gw, "xenios_event_loop_lag_seconds")).values()
    assert {where: s.value for where, s in slow_calls.items() if s.value} == {("Blocks", hook): 1}
    assert 1 < lag.value < 3


async def test_failures_are_counted_and_begin_with_zero():
    """Each hook of each plugin has a series from the start, so that its first failure is seen to be one."""

    class Breaks:
        def __init__(self, config, services): ...

        @hookimpl
        def response_started(self, exchange):
            raise RuntimeError("broken")

        @hookimpl
        async def request_finished(self, exchange): ...

    async with Gateway.test(plugins=[Breaks]) as gw:
        before = await told(gw, "xenios_plugin_failures_total")
        await gw.chat()
        after = await told(gw, "xenios_plugin_failures_total")
    assert before["Breaks", "response_started"].value == before["Breaks", "request_finished"].value == 0
    assert after["Breaks", "response_started"].value == 1
    assert after["Breaks", "request_finished"].value == 0
