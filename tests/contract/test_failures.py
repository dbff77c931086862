"""A plugin that refuses, breaks, hangs or answers nonsense: what the client gets, and what the log says."""

import asyncio
import time

import pytest
import structlog

from gateway import Correction, Cost, PluginError, Reply, Usage, dispatch, hookimpl
from gateway.exchange import Outcome
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Error, Hang, ScriptedUpstream
from tests.contract.recorder import CALLER, Broken, Recorder, callers, trace


@pytest.fixture
def logs():
    with structlog.testing.capture_logs() as captured:
        yield captured


def failures(logs):
    """(plugin, hook) of each failure that the log names."""
    return [(line["plugin"], line["hook"]) for line in logs if line["event"] == "plugin_failed"]


def broken(hook, how="raise", **entry):
    return {"use": Broken, "config": {"hook": hook, "how": how}, **entry}


def gateway(*plugins, failing=False, **settings):
    upstream = ScriptedUpstream(default=Error(500)) if failing else None
    return Gateway.test(plugins=plugins, upstream=upstream, settings=settings)


GATES = [
    "request_received",
    "authenticate",
    "prepare_request",
    "choose_targets",
    "check_request",
    "lookup_response",
    "around_upstream",
    "transform_response",
]
IGNORABLE = ["check_request", "lookup_response"]
OBSERVERS = ["attempt_started", "attempt_finished", "response_started"]


@pytest.mark.parametrize("on_error", [None, "fail", "ignore"])
@pytest.mark.parametrize("hook", GATES)
async def test_a_refusal_always_reaches_the_client(hook, on_error, logs):
    """What a plugin refuses is refused, with its own status, whatever `on_error` says; the log knows who it was."""
    entry = {"on_error": on_error} if on_error else {}
    async with gateway(broken(hook, "refuse", **entry), Recorder) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data["error"]["message"]) == (429, "One is enough.")
        [exchange] = await gw.finished()
        assert exchange.outcome is Outcome.REFUSED
        assert exchange.error_by == f"Broken.{hook}"
        assert failures(logs) == []


@pytest.mark.parametrize("on_error", [None, "fail", "ignore"])
@pytest.mark.parametrize("hook", GATES)
async def test_a_failing_gate_closes_unless_it_may_be_ignored(hook, on_error, logs):
    """A broken gate is a 503 `plugin_error`; only `check_request` and `lookup_response` may be passed over."""
    entry = {"on_error": on_error} if on_error else {}
    async with gateway(broken(hook, **entry), Recorder) as gw:
        reply = await gw.chat()
        [exchange] = await gw.finished()
        assert failures(logs) == [("Broken", hook)]
        if on_error == "ignore" and hook in IGNORABLE:
            assert reply.status == 200
            assert callers(exchange, hook) == ["Broken", "Recorder"]
            return
        assert (reply.status, reply.data["error"]["code"]) == (503, "plugin_error")
        assert "It broke" not in reply.body.decode()
        assert exchange.outcome is Outcome.PLUGIN_ERROR
        assert exchange.error_by == f"Broken.{hook}"
        if hook != "transform_response":
            assert gw.upstream.seen == []


@pytest.mark.parametrize("hook", OBSERVERS)
async def test_a_failing_observer_changes_nothing(hook, logs):
    """Whoever only watches can't break a request, nor keep the plugins after it from watching."""
    async with gateway(broken(hook), Recorder) as gw:
        reply = await gw.chat()
        assert reply.status == 200
        [exchange] = await gw.finished()
        assert failures(logs) == [("Broken", hook)]
        assert callers(exchange, hook) == ["Broken", "Recorder"]
        assert exchange.outcome is Outcome.OK


async def test_a_failing_request_finished_does_not_keep_the_others_from_theirs(logs):
    """The last hook runs for every plugin, whatever one of them does."""
    async with gateway(Recorder, broken("request_finished")) as gw:
        assert (await gw.chat()).status == 200
        [exchange] = await gw.finished()
        assert failures(logs) == [("Broken", "request_finished")]
        assert callers(exchange, "request_finished") == ["Broken", "Recorder"]


@pytest.mark.parametrize("hook", ["authenticate", "choose_targets", "lookup_response", "around_upstream"])
async def test_an_answer_of_the_wrong_type_is_the_plugin_s_failure(hook, logs):
    """A hook that returns nonsense is named in the log and answered with 503; nonsense goes no further."""
    async with gateway(broken(hook, "return"), Recorder) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data["error"]["code"]) == (503, "plugin_error")
        [exchange] = await gw.finished()
        assert failures(logs) == [("Broken", hook)]
        assert exchange.error_by == f"Broken.{hook}"


async def test_nonsense_from_a_cache_that_may_be_ignored_is_a_miss(logs):
    """With `on_error: ignore` a look-up of the wrong type counts as a failure and the upstream answers."""
    async with gateway(broken("lookup_response", "return", on_error="ignore"), Recorder) as gw:
        assert (await gw.chat()).status == 200
        assert failures(logs) == [("Broken", "lookup_response")]
        await gw.finished()


@pytest.mark.parametrize("how", ["raise", "return", "refuse"])
async def test_a_failing_error_page_is_replaced_by_the_dialect_s_own(how, logs):
    """Whatever happens to the plugin that words errors, the client is told the error it really had."""
    async with gateway(broken("render_error", how), Recorder, failing=True) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data["error"]["code"]) == (500, "upstream_error")
        assert failures(logs) == [("Broken", "render_error")]
        [exchange] = await gw.finished()
        assert callers(exchange, "render_error") == ["Broken", "Recorder"]


async def test_the_first_plugin_that_words_an_error_is_heard():
    """`render_error` can replace the reply to a refusal; status and body are its own."""

    class Polite:
        def __init__(self, config, services): ...

        @hookimpl
        def render_error(self, exchange, error):
            return Reply(418, data={"sorry": error.message})

    async with gateway(broken("check_request", "refuse"), Polite, Recorder) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data) == (418, {"sorry": "One is enough."})
        [exchange] = await gw.finished()
        assert callers(exchange, "render_error") == ["Broken"]


@pytest.mark.parametrize("how", ["raise", "return"])
async def test_a_tap_that_can_not_be_opened_leaves_the_stream_alone(how, logs):
    """A plugin that fails to look at a stream doesn't break it."""
    async with gateway(broken("open_tap", how), Recorder) as gw:
        reply = await gw.chat(stream=True)
        assert (reply.status, reply.events[-1]) == (200, b"data: [DONE]\n\n")
        assert "Broken" in {plugin for plugin, _ in failures(logs)}
        [exchange] = await gw.finished()
        assert trace(exchange).count("tap.end") == 1


async def test_a_guarding_tap_that_can_not_be_opened_refuses_the_stream(logs):
    """With `on_error: fail` nothing of a stream goes out unguarded; taps that were open already hear of the end."""
    async with gateway(Recorder, broken("open_tap", on_error="fail")) as gw:
        reply = await gw.chat(stream=True)
        assert (reply.status, reply.data["error"]["code"]) == (503, "plugin_error")
        assert failures(logs) == [("Broken", "open_tap")]
        [exchange] = await gw.finished()
        assert exchange.error_by == "Broken.open_tap"
        assert trace(exchange).count("tap.end") == 1


class Hangs:
    """Waits for ever in the hook that its id names."""

    def __init__(self, config, services):
        self.hook = services.plugin_id

    async def _wait(self, hook):
        if self.hook == hook:
            await asyncio.Event().wait()

    @hookimpl
    async def check_request(self, exchange):
        await self._wait("check_request")

    @hookimpl
    async def lookup_response(self, exchange):
        await self._wait("lookup_response")

    @hookimpl
    async def around_upstream(self, exchange, attempt, call_next):
        await self._wait("around_upstream")
        reply = await call_next(attempt)
        await self._wait("after_upstream")
        return reply

    @hookimpl
    async def transform_response(self, exchange):
        await self._wait("transform_response")

    @hookimpl
    async def request_finished(self, exchange):
        await self._wait("request_finished")

    @hookimpl
    def register_routes(self, router):
        async def answer(exchange):
            await asyncio.Event().wait()

        router.add("GET", "/hangs", answer)


@pytest.mark.parametrize(
    ("where", "hook"),
    [
        ("check_request", "check_request"),
        ("lookup_response", "lookup_response"),
        ("around_upstream", "around_upstream"),
        ("after_upstream", "around_upstream"),
        ("transform_response", "transform_response"),
    ],
)
async def test_a_deadline_names_the_plugin_that_used_it_up(where, hook, logs):
    """A plugin that hangs ends in 504 at the request's deadline, and the log says which plugin and hook it was."""
    async with gateway({"use": Hangs, "id": where}, server={"request_timeout": 0.2}) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data["error"]["code"]) == (504, "deadline_exceeded")
        [exchange] = await gw.finished()
        assert exchange.outcome is Outcome.TIMEOUT
        assert exchange.error_by == f"{where}.{hook}"
        assert [(e["plugin"], e["hook"]) for e in logs if e["event"] == "deadline_in_plugin"] == [(where, hook)]


async def test_a_deadline_names_the_plugin_whose_route_hangs(logs):
    """The handler of a plugin's own route is named as a hook would be."""
    async with gateway({"use": Hangs, "id": "route"}, server={"request_timeout": 0.2}) as gw:
        assert (await gw.get("/hangs")).status == 504
        assert [(e["plugin"], e["hook"]) for e in logs if e["event"] == "deadline_in_plugin"] == [
            ("route", "GET /hangs")
        ]


async def test_a_deadline_in_the_upstream_blames_no_plugin(logs):
    """The upstream's slowness is not put down to a plugin that ran before it."""

    upstream = ScriptedUpstream(default=Hang())
    async with Gateway.test(plugins=[Recorder], upstream=upstream, settings={"server": {"request_timeout": 0.2}}) as gw:
        assert (await gw.chat()).status == 504
        [exchange] = await gw.finished()
        assert exchange.error_by is None
        assert [e for e in logs if e["event"] == "deadline_in_plugin"] == []


async def test_a_handler_that_fails_is_named_in_the_log(logs):
    """A route's handler that breaks is a 500 without its reasons, and the log names the plugin and the route."""

    class Faulty:
        def __init__(self, config, services): ...

        @hookimpl
        def register_routes(self, router):
            async def answer(exchange):
                raise ValueError("It broke.")

            async def nonsense(exchange):
                return "nonsense"

            router.add("GET", "/faulty", answer)
            router.add("GET", "/nonsense", nonsense)

    async with gateway(Faulty) as gw:
        for path in ("/faulty", "/nonsense"):
            reply = await gw.get(path)
            assert reply.status == 500
            assert "It broke" not in reply.body.decode()
        assert failures(logs) == [("Faulty", "GET /faulty"), ("Faulty", "GET /nonsense")]


async def test_request_finished_has_a_deadline_of_its_own(logs, monkeypatch):
    """A plugin that hangs after the reply holds nobody up: its time is limited, the others have theirs."""
    monkeypatch.setattr(dispatch, "FINISH_SECONDS", 0.05)
    async with gateway(Recorder, {"use": Hangs, "id": "request_finished"}) as gw:
        assert (await gw.chat()).status == 200
        [exchange] = await gw.finished()
        assert failures(logs) == [("request_finished", "request_finished")]
        assert trace(exchange)[-1] == "request_finished"


async def test_request_finished_runs_for_plugins_that_a_refusal_kept_from_running():
    """Whoever counts requests counts those too that a plugin before it refused at once."""
    async with gateway(broken("request_received", "refuse"), Recorder) as gw:
        assert (await gw.chat()).status == 429
        [exchange] = await gw.finished()
        assert trace(exchange) == ["render_error", "response_started", "request_finished"]


@pytest.mark.parametrize("hook", ["response_started", "open_tap", "tap.event"])
async def test_a_hook_that_blocks_the_loop_is_named_while_it_does(hook, logs):
    """A synchronous hook that stands still is reported with plugin and hook, while it still stands."""
    async with gateway(blocking(hook, logs)) as gw:
        assert (await gw.chat(stream=True)).status == 200
    [stall] = stalls(logs)
    assert (stall["plugin"], stall["hook"]) == ("Blocking", "open_tap" if hook == "tap.event" else hook)


async def test_an_async_hook_that_blocks_the_loop_is_named_and_found_by_its_place(logs):
    """What blocks the loop from inside a coroutine is named too, and shown by the line of code that it stands in."""
    async with gateway(blocking("check_request", logs)) as gw:
        assert (await gw.chat(stream=True)).status == 200
    [stall] = stalls(logs)
    assert (stall["plugin"], stall["hook"]) == ("Blocking", "check_request")
    assert "in check_request" in "".join(stall["frames"])


def stalls(logs):
    return [line for line in logs if line["event"] == "event_loop_stalled"]


def blocking(hook, logs):
    """A plugin that holds the event loop up in one place until somebody complains."""

    def block(where):
        end = time.monotonic() + 5
        while where == hook and not stalls(logs) and time.monotonic() < end:
            time.sleep(0.01)  # noqa: TID251 - to block the loop is what this is for

    class Blocking:
        def __init__(self, config, services): ...

        @hookimpl
        async def check_request(self, exchange):
            block("check_request")

        @hookimpl
        def response_started(self, exchange):
            block("response_started")

        @hookimpl
        def open_tap(self, exchange):
            block("open_tap")
            return self

        def event(self, event):
            block("tap.event")

        def end(self, outcome):
            return ()

    return Blocking


class Later:
    """Has the hooks that run outside a client's request; the broken one fails in them."""

    def __init__(self, config, services):
        self.broken = services.plugin_id == "broken"
        self.corrections = []

    def _break(self):
        if self.broken:
            raise ValueError("It broke.")

    @hookimpl
    async def restore_principal(self, reference, kept):
        self._break()
        return CALLER

    @hookimpl
    async def usage_corrected(self, correction):
        self._break()
        self.corrections.append(correction)

    @hookimpl
    async def explain(self, exchange):
        self._break()
        return ["nothing", "special"]


async def test_a_failing_usage_corrected_does_not_keep_it_from_the_others(logs):
    """The true cost reaches every plugin, whatever one of them does with it."""
    async with gateway({"use": Later, "id": "broken"}, {"use": Later, "id": "sound"}) as gw:
        correction = Correction("operation", "exchange", Usage(), Cost())
        await dispatch.run_corrected(gw.snapshot.hooks.usage_corrected, correction)
        assert gw.plugin("sound").corrections == [correction]
        assert failures(logs) == [("broken", "usage_corrected")]


async def test_a_principal_is_restored_by_the_first_plugin_that_knows_it():
    """A job runs as whoever the first answer says; nobody knows it: None."""
    async with gateway(Recorder, {"use": Later, "id": "sound"}) as gw:
        hooks = gw.snapshot.hooks.restore_principal
        assert await dispatch.restore_principal(hooks, CALLER.reference, None) is CALLER
        assert await dispatch.restore_principal(hooks[:1], "key:unknown", None) is None


async def test_a_failing_restore_principal_is_told_to_whoever_runs_the_job(logs):
    """A store that is away must not look like a principal that is gone: the failure goes up, the job is retried."""
    async with gateway({"use": Later, "id": "broken"}, {"use": Later, "id": "sound"}) as gw:
        with pytest.raises(PluginError):
            await dispatch.restore_principal(gw.snapshot.hooks.restore_principal, "key:caller", None)
        assert failures(logs) == [("broken", "restore_principal")]


async def test_a_failing_explain_is_a_finding(logs):
    """A dry run tells of a plugin that can't say what it would do, and of all the others."""
    async with gateway(Recorder, {"use": Later, "id": "broken"}, {"use": Later, "id": "sound"}) as gw:
        await gw.chat()
        [exchange] = await gw.finished()
        found = await dispatch.run_explain(exchange, gw.snapshot.hooks.explain)
        assert [(plugin, finding.text) for plugin, finding in found] == [
            ("Recorder", "Recorder would record this"),
            ("broken", "explain failed: ValueError"),
            ("sound", "nothing"),
            ("sound", "special"),
        ]
        assert failures(logs) == [("broken", "explain")]
