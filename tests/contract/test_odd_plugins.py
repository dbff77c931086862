"""Plugins that leave nonsense behind, or fail in ways that no `except Exception` sees."""

import asyncio
import sys

import pytest
import structlog

from gateway import RateLimited, Reply, hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Error, ScriptedUpstream
from gateway.limits import Rule


@pytest.fixture
def logs():
    with structlog.testing.capture_logs() as captured:
        yield captured


def said(logs, event):
    return [line for line in logs if line["event"] == event]


def plugin(hook, function):
    """A plugin class `Odd` with this one hook."""
    return type("Odd", (), {"__init__": lambda self, config, services: None, hook: hookimpl(function)})


def fails_with(hook, error):
    """The hook raises; sync where it is declared so."""

    async def later(self, exchange):
        raise error

    def now(self, exchange):
        raise error

    def attempt_started(self, exchange, attempt):
        raise error

    def render_error(self, exchange, error):
        raise self.error

    made = {"attempt_started": attempt_started, "render_error": render_error}
    made |= dict.fromkeys(("response_started", "open_tap"), now)
    cls = plugin(hook, made.get(hook, later))
    cls.error = error
    return cls


FAILURES = [asyncio.CancelledError(), SystemExit(3)]


@pytest.mark.parametrize("error", FAILURES, ids=["cancelled", "exit"])
@pytest.mark.parametrize(
    "hook", ["request_received", "authenticate", "prepare_request", "choose_targets", "check_request"]
)
async def test_a_gate_that_raises_anything_is_a_503(hook, error, logs):
    """A plugin that lets a cancellation of its own out, or calls sys.exit, has failed: 503, named, nobody "left"."""
    async with Gateway.test(plugins=[fails_with(hook, error)]) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data["error"]["code"]) == (503, "plugin_error")
        assert [(line["plugin"], line["hook"]) for line in said(logs, "plugin_failed")] == [("Odd", hook)]


@pytest.mark.parametrize("error", FAILURES, ids=["cancelled", "exit"])
@pytest.mark.parametrize("hook", ["attempt_started", "response_started", "open_tap"])
async def test_an_observer_that_raises_anything_changes_nothing(hook, error, logs):
    """Who only watches can't take an answer away, whatever it raises."""
    async with Gateway.test(plugins=[fails_with(hook, error)]) as gw:
        reply = await gw.chat(stream=True)
        assert (reply.status, reply.events[-1]) == (200, b"data: [DONE]\n\n")
        assert [line["hook"] for line in said(logs, "plugin_failed")] == [hook]


@pytest.mark.parametrize("error", FAILURES, ids=["cancelled", "exit"])
async def test_a_broken_renderer_leaves_the_dialects_error(error):
    """A plugin that can't write an error leaves it to the dialect."""
    upstream = ScriptedUpstream(default=Error(500))
    async with Gateway.test(plugins=[fails_with("render_error", error)], upstream=upstream) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data["error"]["code"]) == (500, "upstream_error")


@pytest.mark.parametrize("error", FAILURES, ids=["cancelled", "exit"])
async def test_the_end_of_a_request_is_told_to_all(error, logs):
    """One plugin's failing `request_finished` takes no other's away: no usage row, no log line is lost."""
    async with Gateway.test(plugins=[fails_with("request_finished", error)]) as gw:
        assert (await gw.chat()).status == 200
        assert len(await gw.finished()) == 1  # the recorder's own hook runs after it
        assert [line["hook"] for line in said(logs, "plugin_failed")] == ["request_finished"]


@pytest.mark.parametrize("value", [5, None, "a\r\nx-evil: 1", "a\nb", "\ud800"], ids=ascii)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_header_that_can_not_be_sent_is_left_out(value, stream, logs):
    """A plugin's impossible header costs the header, not the answer, and the log says which and whose it may be."""

    def response_started(self, exchange):
        exchange.reply_headers["x-odd"] = value
        exchange.reply_headers["x-fine"] = "yes"

    async with Gateway.test(plugins=[plugin("response_started", response_started)]) as gw:
        reply = await gw.chat(stream=stream)
        assert (reply.status, reply.headers.get("x-fine")) == (200, "yes")
        assert "x-odd" not in reply.headers
        assert "x-evil" not in reply.headers
        [line] = said(logs, "bad_reply_header")
        assert (line["header"], line["plugins"]) == ("x-odd", ["Odd"])


@pytest.mark.parametrize("name", ["a b", "a\r\nx-evil", "é", ""])
async def test_a_header_name_that_is_none_is_left_out(name, logs):
    """So does a name that can't be one."""

    async def lookup_response(self, exchange):
        return Reply(200, b"{}", {name: "1"})

    async with Gateway.test(plugins=[plugin("lookup_response", lookup_response)]) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.body) == (200, b"{}")
        assert "x-evil" not in reply.headers
        assert len(said(logs, "bad_reply_header")) == 1


@pytest.mark.parametrize(
    "make", [lambda: Reply(9999, b"x"), lambda: Reply(200, "text"), lambda: Reply(101)], ids=["9999", "text", "101"]
)
async def test_a_reply_that_is_none_is_the_plugins_failure(make, logs):
    """A status or a body that no reply can have is the plugin's failure, named where it was made."""

    async def lookup_response(self, exchange):
        return make()

    async with Gateway.test(plugins=[plugin("lookup_response", lookup_response)]) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data["error"]["code"]) == (503, "plugin_error")
        assert [line["hook"] for line in said(logs, "plugin_failed")] == ["lookup_response"]


async def test_text_for_a_body_is_the_plugins_failure(logs):
    """So is text where bytes are due, in an edit of a reply."""

    async def transform_response(self, exchange):
        exchange.reply.body = "text"

    async with Gateway.test(plugins=[plugin("transform_response", transform_response)]) as gw:
        assert (await gw.chat()).status == 503
        assert [line["hook"] for line in said(logs, "plugin_failed")] == ["transform_response"]


def left(exchange, what):
    match what:
        case "nothing":
            exchange.body = None
        case "no model":
            del exchange.body["model"]
        case "an object":
            exchange.body["messages"] = object()
        case "half a pair":
            exchange.body["messages"] = [{"role": "user", "content": "\ud800"}]


@pytest.mark.parametrize("what", ["nothing", "no model", "an object", "half a pair"])
async def test_a_body_that_can_not_be_sent_is_the_plugins_failure(what, logs):
    """A plugin that spoils the request gets the blame: 503 and its name, not an internal error."""

    async def prepare_request(self, exchange):
        left(exchange, what)

    async with Gateway.test(plugins=[plugin("prepare_request", prepare_request)]) as gw:
        reply = await gw.chat()
        assert (reply.status, reply.data["error"]["code"]) == (503, "plugin_error")
        [line] = said(logs, "plugin_left_bad_body")
        assert line["plugins"] == ["Odd"]
        [exchange] = await gw.finished()
        assert exchange.error_by == "Odd.prepare_request"
        assert gw.upstream.seen == []


@pytest.mark.parametrize("wrong", [{"access": "Admin"}, {"access": ""}, {"body": "Json"}])
async def test_a_misspelt_rule_of_a_route_ends_the_start(wrong):
    """A route that says `Admin` where `admin` is due opens no door: the gateway doesn't start, and says why."""

    async def handler(exchange):
        return Reply(200, b"secret")

    def register_routes(self, router):
        router.add("GET", "/odd", handler, **wrong)

    with pytest.raises(Exception, match=r"Odd: GET /odd: \w+ is '\w*'; it is one of "):
        async with Gateway.test(plugins=[plugin("register_routes", register_routes)]):
            pass


def test_a_file_that_exits_is_a_plugin_that_can_not_be_imported(tmp_path):
    """A plugin's file that calls sys.exit decides no exit code of ours: it is named as what can't be imported."""
    from gateway.plugins import load

    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(4)\n")
    with pytest.raises(LookupError, match=r"leaves\.py can't be imported: SystemExit: 4"):
        load("./leaves.py", tmp_path)
    assert not [name for name in sys.modules if name.startswith("xenios_file_plugin") and name.endswith("_leaves")]


class Trips:
    """Stumbles over the first request that its limit has room for."""

    def __init__(self, config, services):
        self.stumbled = False

    @hookimpl
    async def check_request(self, exchange):
        exchange.hold(Rule("trips:one", "slots", 1, self.refuse, admitted=self.admitted))

    def admitted(self, exchange, rules, levels, granted):
        if not self.stumbled:
            self.stumbled = True
            raise ZeroDivisionError

    def refuse(self, rule, state):
        return RateLimited("One at a time.")


async def test_what_was_taken_for_a_request_that_then_failed_is_given_back():
    """A plugin that raises once its limit had room leaves no place taken for good."""
    async with Gateway.test(plugins=[Trips]) as gw:
        assert (await gw.chat()).status == 500
        assert (await gw.chat()).status == 200
