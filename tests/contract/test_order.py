"""The order of the YAML list is the order of the calls."""

import time

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from gateway import AttemptRecord, Cause, ContextKey, Decision, Target, UpstreamError, UpstreamReply, hookimpl
from gateway.dispatch import CompiledHooks
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Error, ScriptedUpstream
from gateway.plugins import HOOKS
from tests.contract.recorder import Recorder, TwoTargets, callers

P10 = pytest.mark.promise("P10.sequence")

# Every plugin is asked; of the other hooks only until one answers.
ALL = [
    "request_received",
    "prepare_request",
    "choose_targets",
    "check_request",
    "lookup_response",
    "around_upstream",
    "attempt_started",
    "attempt_finished",
    "response_started",
]


def recorders(*ids):
    return [{"use": Recorder, "id": name} for name in ids]


@P10
@pytest.mark.parametrize("ids", [("a", "b", "c"), ("c", "a", "b")])
async def test_plugins_are_called_in_the_order_of_the_list(ids):
    """Whoever stands first is called first in every hook, and last in `request_finished`."""
    async with Gateway.test(plugins=recorders(*ids)) as gw:
        await gw.chat()
        await gw.chat(stream=True)
        whole, stream = await gw.finished(2)
        for hook in ALL:
            assert callers(whole, hook) == callers(stream, hook) == list(ids), hook
        assert callers(whole, "transform_response") == list(ids)
        assert callers(stream, "open_tap") == callers(stream, "tap.end") == list(ids)
        assert callers(whole, "authenticate") == [ids[0]]
        assert callers(whole, "request_finished") == list(reversed(ids))


@P10
async def test_the_compiled_order_is_the_list_s():
    """What `xenios plugins` prints is what runs: each hook in list order, `request_finished` reversed."""
    ids = ["c", "a", "b"]
    async with Gateway.test(plugins=recorders(*ids)) as gw:
        order = gw.snapshot.hooks.order()
        kit = order["request_finished"].pop()
        assert order == {hook: ids if hook != "request_finished" else ids[::-1] for hook in HOOKS}
        assert kit == "_Recorder"
        assert set(order) == set(CompiledHooks.__dataclass_fields__)


async def test_the_first_answer_counts_and_later_plugins_are_not_asked():
    """Of the hooks that want one answer, the first plugin that has one is the last that is asked."""

    class Second(Recorder):
        def saw(self, hook, exchange):
            super().saw(hook, exchange)
            return Decision("m", (Target("from/second", "openrouter"),)) if hook == "choose_targets" else None

    plugins = [*recorders("first"), Second, *recorders("third")]
    async with Gateway.test(plugins=plugins) as gw:
        reply = await gw.chat()
        assert reply.headers["x-xenios-model"] == "from/second"
        [exchange] = await gw.finished()
        assert callers(exchange, "choose_targets") == ["first", "Second"]
        assert callers(exchange, "check_request") == ["first", "Second", "third"]


async def test_a_plugin_that_is_listed_twice_keeps_two_states():
    """Two entries of one plugin are two instances; what each notes in a request is its own."""

    class Counts:
        def __init__(self, config, services):
            self.id = services.plugin_id
            self.key = ContextKey("count")

        @hookimpl
        async def prepare_request(self, exchange):
            exchange.set(self.key, self.id)

        @hookimpl
        def response_started(self, exchange):
            exchange.reply_headers[f"x-{self.id}"] = exchange.get(self.key)

    async with Gateway.test(plugins=[{"use": Counts, "id": "one"}, {"use": Counts, "id": "two"}]) as gw:
        reply = await gw.chat()
        assert (reply.headers["x-one"], reply.headers["x-two"]) == ("one", "two")


async def test_the_same_plugin_twice_with_different_configs_and_scopes():
    """One limit for one endpoint, another for the rest: each entry goes by its own `when`."""
    chat = {"use": Recorder, "id": "chat", "when": {"endpoint": "chat/completions"}}
    rest = {"use": Recorder, "id": "rest", "when": {"endpoint": "embeddings"}}
    async with Gateway.test(plugins=[Recorder, chat, rest]) as gw:
        await gw.chat()
        await gw.post("/v1/embeddings", {"model": "m", "input": "Hello"})
        first, second = await gw.finished(2)
        assert callers(first, "check_request") == ["Recorder", "chat"]
        assert callers(second, "check_request") == ["Recorder", "rest"]


class Layer:
    """Notes when it is entered and left."""

    log: list[str]

    def __init__(self, config, services):
        self.id = services.plugin_id

    @hookimpl
    async def around_upstream(self, exchange, attempt, call_next):
        self.log.append(f"{self.id} in {attempt.target.model}")
        try:
            return await call_next(attempt)
        finally:
            self.log.append(f"{self.id} out")


async def test_the_onion_is_entered_outermost_first_and_fallback_divides_it():
    """Layers before `fallback` run once a request, those after it once an attempt, and leave in reverse."""

    class Logged(Layer):
        log = []

    upstream = ScriptedUpstream()
    upstream.on("a/one", Error(503))
    plugins = [TwoTargets, *({"use": Logged, "id": n} for n in "ab"), "fallback", {"use": Logged, "id": "c"}]
    async with Gateway.test(plugins=plugins, upstream=upstream) as gw:
        assert (await gw.chat()).headers["x-xenios-attempts"] == "2"
    assert Logged.log == [
        "a in a/one",
        "b in a/one",
        "c in a/one",
        "c out",
        "c in b/two",
        "c out",
        "b out",
        "a out",
    ]


async def test_a_layer_may_call_again_or_not_at_all():
    """A layer decides how often the inside is asked; the client gets what the layer returns."""

    class Twice:
        def __init__(self, config, services): ...

        @hookimpl
        async def around_upstream(self, exchange, attempt, call_next):
            await call_next(attempt)
            return await call_next(attempt)

    async with Gateway.test(plugins=[Twice, Recorder]) as gw:
        for stream in (False, True):
            reply = await gw.chat(stream=stream)
            assert (reply.status, reply.headers["x-xenios-attempts"]) == (200, "2")
        for exchange in await gw.finished(2):
            assert callers(exchange, "attempt_finished") == ["Recorder", "Recorder"]
            assert all(record.finished for record in exchange.attempts)
        assert len(gw.upstream.seen) == 4


async def test_a_layer_that_gives_up_without_calling_is_a_failed_attempt_for_the_layers_outside():
    """A breaker inside `fallback` skips one target without a request to it; the next target answers."""

    class Breaker:
        def __init__(self, config, services): ...

        @hookimpl
        async def around_upstream(self, exchange, attempt, call_next):
            if attempt.target.model == "a/one":
                raise UpstreamError(Cause.CONNECTION, "Open.")
            return await call_next(attempt)

    async with Gateway.test(plugins=[Recorder, TwoTargets, "fallback", Breaker]) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.headers["x-xenios-model"], reply.headers["x-xenios-attempts"]) == (
            200,
            "b/two",
            "1",
        )
        assert [seen.model for seen in gw.upstream.seen] == ["b/two"]
        [exchange] = await gw.finished()
        assert callers(exchange, "attempt_started") == ["Recorder"]


async def test_a_layer_may_answer_by_itself():
    """A reply that a layer makes is the client's, without an attempt and through `transform_response`."""

    class Answers:
        def __init__(self, config, services): ...

        @hookimpl
        async def around_upstream(self, exchange, attempt, call_next):
            headers = CIMultiDictProxy(CIMultiDict({"Content-Type": "application/json"}))
            return UpstreamReply(200, headers, AttemptRecord(attempt, 1, time.monotonic()), b'{"own": true}')

    async with Gateway.test(plugins=[Recorder, Answers]) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data, reply.headers["x-xenios-attempts"]) == (200, {"own": True}, "0")
        [exchange] = await gw.finished()
        assert callers(exchange, "transform_response") == ["Recorder"]
        assert (exchange.attempts, gw.upstream.seen) == ([], [])
