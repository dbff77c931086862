"""Another configuration while the gateway serves: what goes on, what begins anew, what a failure leaves behind."""

import asyncio
import contextlib
import inspect
import re
import weakref
from pathlib import Path

import pytest
import structlog
from pydantic import BaseModel, SecretStr

from gateway import Cost, Decision, Reply, Source, Target, hookimpl, logs
from gateway.errors import StartError
from gateway.exchange import Outcome
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Json, ScriptedUpstream, Stream, Until, chat_events, generation
from gateway.plugins import SECTIONS, PluginStartError, installed, load

SWAP = pytest.mark.promise("P11.swap")
BAD = pytest.mark.promise("P11.bad_file")


class Config(BaseModel):
    name: str = "one"


class Counter:
    """Counts requests, says who it is on each, and notes when its lifespan opens and closes."""

    Config = Config
    reads_settings = ()
    log: list[str] = []

    def __init__(self, config, services):
        self.name = config.name
        self.services = services
        self.count = 0

    @contextlib.asynccontextmanager
    async def lifespan(self):
        self.log.append(f"{self.name} opened")
        yield
        self.log.append(f"{self.name} closed")

    @hookimpl
    async def check_request(self, exchange):
        self.count += 1

    @hookimpl
    def response_started(self, exchange):
        exchange.reply_headers["x-counter"] = f"{self.name} {self.count}"


class Second(Counter):
    """Another of its kind."""


class Failing:
    """Its lifespan does not open."""

    @contextlib.asynccontextmanager
    async def lifespan(self):
        raise ConnectionError("there is nobody at redis://user:hunter2hunter2@host")
        yield

    def __init__(self, config, services): ...


class Hanging:
    """Its lifespan never opens."""

    ended: list[str] = []

    def __init__(self, config, services): ...

    @contextlib.asynccontextmanager
    async def lifespan(self):
        try:
            await asyncio.Event().wait()
            yield
        finally:
            self.ended.append("given up")


@pytest.fixture(autouse=True)
def log():
    Counter.log, Hanging.ended = [], []
    return Counter.log


async def until(what, seconds=5):
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.005)


def held_stream(**fields):
    """An answer that waits in its middle, and what lets it go on."""
    go = asyncio.Event()
    steps = chat_events("Hello there", pieces=2, comments=False, **fields)
    return Stream(*steps[:2], Until(go), *steps[2:]), go


@contextlib.asynccontextmanager
async def open_stream(gw):
    """A stream whose first event has come."""
    body = {"model": "test/model", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    async with gw.session.post(gw.url + "/v1/chat/completions", json=body, headers=gw.headers) as reply:
        await reply.content.readuntil(b"\n\n")
        yield reply


# --- plugins -----------------------------------------------------------------------------------------------------


async def test_an_unchanged_plugin_keeps_its_state_and_a_changed_one_begins_anew(log):
    """The same use, id and config: the same instance, wherever it stands; another config: a new one, opened first."""
    async with Gateway.test(plugins=[Counter, (Second, {"name": "two"})]) as gw:
        await gw.chat()
        kept = gw.plugin("Counter")
        await gw.reload(plugins=[(Second, {"name": "three"}), Counter], settings={"server": {"max_body": "1MiB"}})
        assert gw.plugin("Counter") is kept
        assert (await gw.chat()).headers.getall("x-counter") == ["one 2"]
        assert gw.plugin("Second").count == 1
        await until(lambda: "two closed" in log)
        assert log == ["one opened", "two opened", "three opened", "two closed"]
    assert log[4:] == ["one closed", "three closed"]


@pytest.mark.parametrize(
    "other",
    [{"when": {"stream": True}}, {"on_error": "ignore"}, {"id": "other"}],
    ids=["scope", "policy", "id"],
)
async def test_another_scope_policy_or_id_is_another_instance(other):
    """Whatever the YAML says of a plugin belongs to it."""
    async with Gateway.test(plugins=[Counter]) as gw:
        before = gw.plugin("Counter")
        await gw.reload(plugins=[{"use": Counter, **other}])
        assert gw.plugin(other.get("id", "Counter")) is not before


async def test_a_plugin_begins_anew_if_settings_that_it_may_read_are_others():
    """Without `reads_settings` any section counts; with it, those alone."""

    class Undeclared:
        def __init__(self, config, services):
            self.max_body = services.settings.server.max_body

    async with Gateway.test(plugins=[Undeclared]) as gw:
        first = gw.plugin("Undeclared")
        await gw.reload(plugins=[Undeclared])
        assert gw.plugin("Undeclared") is first
        await gw.reload(plugins=[Undeclared], settings={"server": {"max_body": 4711}})
        assert gw.plugin("Undeclared").max_body == 4711

    class Declared(Counter):
        reads_settings = ("upstream",)

    async with Gateway.test(plugins=[Declared]) as gw:
        first = gw.plugin("Declared")
        await gw.reload(plugins=[Declared], settings={"server": {"max_body": 4711}})
        assert gw.plugin("Declared") is first
        await gw.reload(plugins=[Declared], settings={"upstream": {"stall_timeout": 5}})
        assert gw.plugin("Declared") is not first


OURS = sorted(name for name, point in installed().items() if point.value.startswith("gateway_plugins."))


@pytest.mark.parametrize("name", OURS)
def test_built_in_plugins_say_what_they_read(name):
    """Whichever names the sections that it reads names them all: or it would go on with old settings."""
    cls, _ = load(name, Path())
    file = Path(inspect.getfile(cls))
    files = file.parent.glob("*.py") if file.stem == "__init__" else [file]
    text = "\n".join(file.read_text() for file in files)
    sections = set(re.findall(r"\bsettings\.(\w+)", text)) & set(SECTIONS)
    assert sections <= set(getattr(cls, "reads_settings", SECTIONS))


async def test_routes_and_models_are_those_of_the_new_configuration():
    """A plugin's routes and names come and go with it."""

    class Greeter:
        listed_models = ("greeting",)

        def __init__(self, config, services): ...

        @hookimpl
        def register_routes(self, router):
            router.add("GET", "/v1/greeting", self.greet, access="public")

        async def greet(self, exchange):
            return Reply(200, data={"hello": "you"})

    async with Gateway.test() as gw:
        assert (await gw.get("/v1/greeting")).status == 404
        await gw.reload(plugins=[Greeter])
        assert (await gw.get("/v1/greeting")).data == {"hello": "you"}
        assert (await gw.get("/v1/models/greeting")).status == 200
        await gw.reload()
        assert (await gw.get("/v1/greeting")).status == 404
        assert (await gw.get("/v1/models/greeting")).status == 404


async def test_a_changed_plugin_file_is_taken_up(tmp_path):
    """A plugin in a single file is its newest text; an unchanged file is the same plugin, state and all."""
    file = tmp_path / "mine.py"
    text = """
from gateway import hookimpl


class Plugin:
    def __init__(self, config, services): ...

    @hookimpl
    def response_started(self, exchange):
        exchange.reply_headers["x-mine"] = "{}"
"""
    entry = {"use": f"{file}:Plugin", "id": "mine"}
    file.write_text(text.format("one"))
    async with Gateway.test(plugins=[entry]) as gw:
        first, config = gw.plugin("mine"), gw.snapshot.hash
        await gw.reload(plugins=[entry])
        assert (gw.plugin("mine"), gw.snapshot.hash) == (first, config)
        file.write_text(text.format("two"))
        await gw.reload(plugins=[entry])
        assert (await gw.chat()).headers["x-mine"] == "two"
        assert gw.snapshot.hash != config
        file.write_text(text.format("one"))
        await gw.reload(plugins=[entry])
        assert (await gw.chat()).headers["x-mine"] == "one"
        assert gw.snapshot.hash == config


async def test_rates_are_counted_on():
    """A limit of the same name goes on where it was, though the plugin has other settings."""

    def limited(requests, **fields):
        return {
            "use": "rate_limit",
            "config": {"limits": [{"name": "all", "by": [], "requests": requests, "per": "1h"}], **fields},
        }

    async with Gateway.test(plugins=[limited(3)]) as gw:
        assert [(await gw.chat()).status for _ in range(2)] == [200, 200]
        await gw.reload(plugins=[limited(3, own_limits=False)])
        assert [(await gw.chat()).status for _ in range(3)] == [200, 429, 429]


async def test_nothing_keeps_an_old_configuration():
    """Once its last request is over, its plugins are freed: no collector has to find them."""
    async with Gateway.test(plugins=[Counter]) as gw:
        await gw.chat()
        await gw.finished()
        old = weakref.ref(gw.plugin("Counter")), weakref.ref(gw.snapshot.hooks.check_request[0].call.__self__)
        gw._recorder.exchanges.clear()
        for number in range(3):
            await gw.reload(plugins=[(Counter, {"name": str(number)})])
        await until(lambda: len(gw.worker._open) == 1)
        await until(lambda: [ref() for ref in old] == [None, None])


# --- requests that run ---------------------------------------------------------------------------------------------


@SWAP
async def test_a_stream_ends_as_it_began(log):
    """A stream goes on with the plugins and the upstream of its beginning; these close after its last byte."""
    answer, go = held_stream()
    async with ScriptedUpstream() as other, Gateway.test(plugins=[Counter], upstream=ScriptedUpstream(answer)) as gw:
        old = gw.plugin("Counter")
        async with open_stream(gw) as reply:
            await gw.reload(
                plugins=[(Counter, {"name": "new"})],
                settings={"upstreams": {"openrouter": {"base_url": other.url}}},
            )
            assert (await gw.chat()).headers["x-counter"] == "new 1"
            assert len(other.seen) == 1
            assert log == ["one opened", "new opened"]
            assert len(gw.worker._open) == 2
            go.set()
            rest = await reply.content.read()
            assert rest.endswith(b"data: [DONE]\n\n")
            assert reply.headers["x-counter"] == "one 1"
        await until(lambda: log[2:] == ["one closed"])
        await gw.upstream.wait_connections(0, 2)
        assert gw.plugin("Counter") is not old
        exchanges = await gw.finished(2)
        assert {exchange.outcome for exchange in exchanges} == {Outcome.OK}


async def test_what_runs_after_a_reply_is_awaited(log):
    """`request_finished` still runs in an open plugin, however long it takes."""

    class Slow(Counter):
        go = asyncio.Event()
        begun = asyncio.Event()

        @hookimpl
        async def request_finished(self, exchange):
            self.begun.set()
            await self.go.wait()
            self.log.append(f"{self.name} finished")

    async with Gateway.test(plugins=[Slow]) as gw:
        assert (await gw.chat()).status == 200
        await Slow.begun.wait()
        await gw.reload(plugins=[])
        assert (await gw.chat()).status == 200
        assert log == ["one opened"]
        Slow.go.set()
        await until(lambda: len(log) == 3)
        assert log[1:] == ["one finished", "one closed"]


async def test_a_true_cost_is_told_to_those_who_know_the_request(log, monkeypatch):
    """It comes after the reload: the plugin of before is told, and the upstream asked with the key of now."""
    monkeypatch.setattr("gateway.corrections.Corrections.__init__.__defaults__", ((1.0, 1.0),))
    heard = asyncio.Queue()

    class Accountant(Counter):
        @hookimpl
        async def usage_corrected(self, correction):
            heard.put_nowait((self.name, correction.cost))

    cut = Stream(
        *chat_events("Hi", finish=None, done=False, usage=False, id="gen-7"),
        end="cut",
        headers={"X-Generation-Id": "gen-7"},
    )
    async with Gateway.test(
        plugins=[Accountant], upstream=ScriptedUpstream(cut, default=Json(generation("gen-7", cost=0.5)))
    ) as gw:
        assert (await gw.chat(stream=True)).status == 200
        await gw.reload(
            plugins=[(Accountant, {"name": "new"})],
            settings={"upstreams": {"openrouter": {"api_key": "sk-or-v1-rotated"}}},
        )
        assert await asyncio.wait_for(heard.get(), 5) == ("one", Cost(5 * 10**11, Source.UPSTREAM))
        assert [seen.headers["authorization"] for seen in gw.upstream.seen][1:] == ["Bearer sk-or-v1-rotated"]
        await until(lambda: "one closed" in log)


async def test_an_unchanged_upstream_keeps_its_connections():
    """Another key, other headers, other limits: the connections to it stay."""
    async with Gateway.test() as gw:
        await gw.chat()
        rotated = {"api_key": "sk-or-v1-rotated", "headers": {"x-team": "blue"}}
        await gw.reload(settings={"upstreams": {"openrouter": rotated}, "upstream": {"stall_timeout": 7}})
        await gw.chat()
        first, second = gw.upstream.seen
        assert first.connection == second.connection
        assert (second.headers["authorization"], second.headers["x-team"]) == ("Bearer sk-or-v1-rotated", "blue")


async def test_an_upstream_that_is_gone_is_billed_for_what_still_runs():
    """A stream at an upstream that the new configuration does not have ends well, and its cost is known."""
    answer, go = held_stream(cost=None)
    prices = {"catalogue": {"overrides": {"test/model": {"input": 1, "output": 2, "upstream": "away"}}}}

    class Away:
        def __init__(self, config, services): ...

        @hookimpl
        async def choose_targets(self, exchange):
            return Decision("test/model", (Target("test/model", "away"),))

    async with ScriptedUpstream(answer) as away:
        upstreams = {"away": {"kind": "openai", "base_url": away.url, "without_key": "allow"}}
        async with Gateway.test(plugins=[Away], settings={"upstreams": upstreams, **prices}) as gw:
            async with open_stream(gw) as reply:
                await gw.reload()
                go.set()
                assert (await reply.content.read()).endswith(b"data: [DONE]\n\n")
            [exchange] = await gw.finished()
            assert exchange.cost == Cost(10 * 10**6 + 5 * 2 * 10**6, Source.CATALOGUE)
            assert list(gw.snapshot.services.catalogue.status()) == ["openrouter"]


async def test_an_upstream_that_is_gone_is_forgotten_when_nobody_uses_it():
    """Its list of models is kept for streams that go on, however many reloads later, and no longer; if it comes back,
    its models are known as at a start."""
    answer, go = held_stream()
    prices = {"catalogue": {"overrides": {"mine/model": {"input": 1, "upstream": "away"}}}}
    away = {"upstreams": {"away": {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "without_key": "allow"}}}
    async with Gateway.test(settings={**away, **prices}) as gw:
        gw.upstream.script(answer)
        catalogue = gw.snapshot.services.catalogue
        async with open_stream(gw) as reply:
            for number in range(3):
                await gw.reload(settings={"server": {"max_body": 1000 + number}})
            await until(lambda: len(gw.worker._open) == 2)
            assert catalogue.model("away", "mine/model").price.input == 10**6
            go.set()
            await reply.content.read()
        await until(lambda: catalogue.model("away", "mine/model") is None)
        await gw.reload(settings={**away, **prices})
        assert catalogue.model("away", "mine/model").price.input == 10**6


# --- settings take effect ------------------------------------------------------------------------------------------


async def test_limits_of_the_server_are_those_in_force():
    """Sizes and times of requests follow each reload, on connections that are open already too."""
    async with Gateway.test() as gw:
        assert (await gw.chat("word " * 100)).status == 200
        await gw.reload(settings={"server": {"max_body": 200, "header_timeout": "50ms"}})
        assert (await gw.chat("word " * 100)).status == 413
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.worker.port)
        writer.write(b"GET /health")
        assert (await asyncio.wait_for(reader.read(), 3)).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_prices_and_upstreams_of_the_catalogue_follow():
    """Overrides and new upstreams are known at once; what was known of the others stays."""
    model = "anthropic/claude-haiku-4.5"
    async with ScriptedUpstream() as local, Gateway.test() as gw:
        catalogue = gw.snapshot.services.catalogue
        listed = catalogue.model("openrouter", model)
        await gw.reload(
            settings={
                "catalogue": {"overrides": {model: {"input": 7}, "mine/model": {"input": 1, "upstream": "local"}}},
                "upstreams": {"local": {"kind": "openai", "base_url": local.url, "without_key": "allow"}},
            }
        )
        assert gw.snapshot.services.catalogue is catalogue
        assert catalogue.model("openrouter", model).price.input == 7 * 10**6
        assert (await gw.get("/v1/models/mine/model")).status == 200
        await gw.reload()
        assert catalogue.model("openrouter", model) == listed
        assert (await gw.get("/v1/models/mine/model")).status == 404
        assert list(catalogue.status()) == ["openrouter"]


async def test_the_log_of_a_plugin_follows():
    """A plugin's log has the level that is set when it is used: one that was carried over hears of changes too."""

    class Talker(Counter):
        def __init__(self, config, services):
            super().__init__(config, services)
            self.log_ = services.log

        @hookimpl
        async def request_received(self, exchange):
            self.log_.info("hello")

    lines = []
    async with Gateway.test(plugins=[Talker]) as gw:
        structlog.configure(processors=[lambda _, __, event: lines.append(event["event"]) or ""])
        try:
            await gw.chat()
            structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
            await gw.chat()
        finally:
            structlog.reset_defaults()
    assert lines.count("hello") == 1


async def test_the_log_follows(monkeypatch):
    """Its level and form are set again if they are others."""
    seen = []
    monkeypatch.setattr("gateway.logs.setup", lambda settings: seen.append(settings.level))
    async with Gateway.test() as gw:
        await gw.reload(settings={"server": {"max_body": 5}})
        await gw.reload(settings={"log": {"level": "error"}})
        await gw.reload(settings={"log": {"level": "error"}, "server": {"max_body": 5}})
    assert seen == ["error"]


async def test_a_simulation_can_be_added_later():
    """An upstream without a key that simulates needs no restart."""
    async with Gateway.test() as gw:
        await gw.reload(
            settings={"upstreams": {"openrouter": {"api_key": None, "without_key": "simulate"}}},
        )
        reply = await gw.chat(model="anthropic/claude-haiku-4.5")
        assert (reply.status, reply.headers["x-xenios-simulated"]) == (200, "1")


# --- what fails leaves nothing -------------------------------------------------------------------------------------


@BAD
async def test_a_plugin_that_does_not_start_changes_nothing(log):
    """The old configuration serves on with its plugins; those of the new one that were open are closed."""
    async with Gateway.test(plugins=[Counter]) as gw:
        before = gw.snapshot
        with pytest.raises(PluginStartError, match="Failing"):
            await gw.reload(
                plugins=[Counter, (Second, {"name": "two"}), Failing],
                settings={"upstreams": {"openrouter": {"base_url": "http://127.0.0.1:1"}}},
            )
        assert gw.snapshot is before
        assert log == ["one opened", "two opened", "two closed"]
        assert (await gw.chat()).headers["x-counter"] == "one 1"
        assert len(gw.worker._open) == len(gw.worker._transports) == 1
        await gw.reload(plugins=[Counter])
        assert (await gw.chat()).headers["x-counter"] == "one 2"


async def test_a_plugin_that_hangs_is_given_up(log):
    """After `server.reload_timeout` the plugin is named and cancelled, and nothing has changed."""
    async with Gateway.test(plugins=[Counter], settings={"server": {"reload_timeout": "100ms"}}) as gw:
        with pytest.raises(PluginStartError, match=r"plugin Hanging: lifespan failed: TimeoutError: .* 0\.1 s"):
            await gw.reload(plugins=[(Second, {"name": "two"}), Hanging])
        assert Hanging.ended == ["given up"]
        assert log == ["one opened", "two opened", "two closed"]
        assert (await gw.chat()).status == 200


async def test_an_abort_closes_what_was_prepared(log):
    """What another worker could not prepare is forgotten here; a second preparation replaces the first."""
    async with Gateway.test(plugins=[Counter]) as gw:
        for name in ("two", "three"):
            loaded, blueprints = gw._read([(Second, {"name": name})], None)
            await gw.worker.prepare(loaded, blueprints)
        assert log == ["one opened", "two opened", "two closed", "three opened"]
        await gw.worker.abort()
        assert log[4:] == ["three closed"]
        with pytest.raises(RuntimeError, match="Nothing is prepared"):
            gw.worker.commit()
        assert (await gw.chat()).headers["x-counter"] == "one 1"
    assert log[5:] == ["one closed"]


async def test_missing_tables_are_refused_with_the_command():
    """A plugin whose tables are not there doesn't come, and who adds it is told what to run; `migrate_on_start` runs it."""
    database = {"services": {"database": {"migrate_on_start": False}}}
    async with Gateway.test(settings=database) as gw:
        with pytest.raises(StartError, match=r"tables of usage are missing .* run `xenios db upgrade`"):
            await gw.reload(plugins=["usage"], settings=database)
        assert (await gw.chat()).status == 200
    async with Gateway.test() as gw:
        await gw.reload(plugins=["api_keys", "usage"])
        assert (await gw.get("/v1/usage")).status == 200


async def test_a_door_is_not_opened_by_a_reload():
    """A configuration that would serve the world without a key is refused as at a start."""
    async with Gateway.test(plugins=["api_keys"]) as gw:
        loaded, blueprints = gw._read([], {"server": {"host": "0.0.0.0"}})
        with pytest.raises(StartError, match="No plugin authenticates"):
            await gw.worker.prepare(loaded, blueprints)
        assert (await gw.post("/v1/chat/completions", {}, headers={"Authorization": ""})).status == 401


async def test_a_gateway_without_a_file_says_so():
    """`POST /admin/reload` where a program gave the configuration."""
    async with Gateway.test(plugins=["api_keys"]) as gw:
        reply = await gw.post("/admin/reload")
        assert (reply.status, reply.data["error"]["code"]) == (409, "conflict")
        about = (await gw.get("/admin/config")).data
        assert (about["config"], about["last_reload"]) == (gw.snapshot.hash, None)


# --- plugins that close badly ------------------------------------------------------------------------------------------


class Cancels(Counter):
    """Ends its own task as people write it, and lets the cancellation out."""

    @contextlib.asynccontextmanager
    async def lifespan(self):
        own = asyncio.get_running_loop().create_task(asyncio.sleep(3600))
        try:
            yield
        finally:
            own.cancel()
            await own


class Exits(Counter):
    """Wants to end the process."""

    @contextlib.asynccontextmanager
    async def lifespan(self):
        yield
        raise SystemExit(3)


class Stays(Counter):
    """Never closes."""

    @contextlib.asynccontextmanager
    async def lifespan(self):
        yield
        await asyncio.sleep(3600)


BADLY = [(Cancels, "RuntimeError"), (Exits, "RuntimeError"), (Stays, "TimeoutError")]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("gateway.plugins.CLOSE_SECONDS", 0.2)


@SWAP
@pytest.mark.parametrize(("badly", "error"), BADLY)
async def test_a_plugin_that_closes_badly_keeps_no_other_open(badly, error, impatient):
    """However one ends, it is named, in time, and the others close: at a reload, and when the gateway stops."""
    Counter.log.clear()
    with structlog.testing.capture_logs() as lines:
        async with Gateway.test(plugins=[(Counter, {"name": "first"}), badly]) as gw:
            await gw.reload(plugins=[(Counter, {"name": "first"})])
            async with asyncio.timeout(5):
                while not [line for line in lines if line["event"] == "plugin_close_failed"]:
                    await asyncio.sleep(0.01)
            assert "first closed" not in Counter.log
            await gw.reload(plugins=[(Counter, {"name": "first"}), badly])
    said = [
        (line["plugin"], type(line["exc_info"]).__name__) for line in lines if line["event"] == "plugin_close_failed"
    ]
    assert said == [(badly.__name__, error)] * 2
    assert Counter.log.count("first closed") == 1


@BAD
async def test_a_reload_that_fails_beside_a_plugin_that_does_not_close_is_over_soon(impatient):
    """What was opened for it is given up; the next reload is served."""
    async with Gateway.test(plugins=[Counter]) as gw:
        async with asyncio.timeout(5):
            with pytest.raises(PluginStartError, match="Failing"):
                await gw.reload(plugins=[Counter, Stays, Failing])
            await gw.reload(plugins=[(Counter, {"name": "two"})])
        assert (await gw.chat()).headers["x-counter"] == "two 1"


async def test_what_a_configuration_hides_is_in_no_error():
    """A plugin that quotes its secrets in an error or a warning tells them nobody: not the log, not who asks for health."""

    class Secret(BaseModel):
        token: SecretStr

    class Leaks(Counter):
        Config = Secret

        def __init__(self, config, services):
            self.token = config.token.get_secret_value()

        @contextlib.asynccontextmanager
        async def lifespan(self):
            yield

        def warnings(self):
            return [f"{self.token} ends soon"]

    async with Gateway.test(plugins=[(Leaks, {"token": "hunter2-hunter2"})]) as gw:
        ready = await gw.get("/health/ready")
        assert ready.data["warnings"] == {"Leaks": ["*** ends soon"]}
        assert logs.scrub("refused: hunter2-hunter2") == "refused: ***"  # as each traceback is
