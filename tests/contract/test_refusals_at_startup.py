"""What is wrong with a plugin is said when the gateway starts, not when a request comes."""

import sys
from contextlib import asynccontextmanager
from typing import Any

import pluggy
import pytest
from pydantic import BaseModel

from gateway import Reply, hookimpl
from gateway.errors import StartError
from gateway.kit.testing import Gateway
from gateway.plugins import PluginStartError
from gateway.settings import ConfigError

wrapper = pluggy.HookimplMarker("xenios")


async def refusal(*plugins: Any, **settings: Any) -> str:
    """What the operator is told when the gateway is started with these plugins."""
    with pytest.raises((ConfigError, PluginStartError, StartError)) as caught:
        async with Gateway.test(plugins=plugins, settings=settings):
            pass  # pragma: no cover
    return str(caught.value)


class Base:
    def __init__(self, config, services): ...


class UnknownHook(Base):
    @hookimpl
    async def check_requests(self, exchange): ...


class Unmarked(Base):
    async def check_request(self, exchange): ...


class SyncWhereAsync(Base):
    @hookimpl
    def check_request(self, exchange): ...


class AsyncWhereSync(Base):
    @hookimpl
    async def response_started(self, exchange): ...


class TooFewArguments(Base):
    @hookimpl
    def attempt_started(self, exchange): ...


class OtherNames(Base):
    @hookimpl
    async def check_request(self, request): ...


class Wrapper(Base):
    @wrapper(wrapper=True)
    def check_request(self, exchange):
        return (yield)


class OldWrapper(Base):
    @wrapper(hookwrapper=True)
    def check_request(self, exchange):
        yield


class First(Base):
    @wrapper(tryfirst=True)
    async def check_request(self, exchange): ...


class Last(Base):
    @wrapper(trylast=True)
    async def check_request(self, exchange): ...


class OddConfig(Base):
    Config = dict


@pytest.mark.parametrize(
    ("plugin", "told"),
    [
        (UnknownHook, ["UnknownHook.check_requests", "no hook", "Did you mean 'check_request'"]),
        (Unmarked, ["Unmarked.check_request", "@hookimpl"]),
        (SyncWhereAsync, ["SyncWhereAsync.check_request", "async def"]),
        (AsyncWhereSync, ["AsyncWhereSync.response_started", "def (not async)"]),
        (TooFewArguments, ["TooFewArguments.attempt_started", "(exchange)", "(exchange, attempt)"]),
        (OtherNames, ["OtherNames.check_request", "(request)", "(exchange)"]),
        (Wrapper, ["Wrapper.check_request", "wrappers", "around_upstream"]),
        (OldWrapper, ["OldWrapper.check_request", "wrappers", "around_upstream"]),
        (First, ["First.check_request", "tryfirst", "order"]),
        (Last, ["Last.check_request", "trylast", "order"]),
        (OddConfig, ["Config", "pydantic"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
async def test_a_malformed_plugin_is_refused_by_name(plugin, told):
    """A plugin that can't work as written is refused at start-up, and its author is told where and why."""
    text = await refusal(plugin)
    for words in told:
        assert words in text


async def test_all_mistakes_are_told_at_once_with_their_place():
    """Two wrong plugins and a wrong config are one message, each with its place in the list."""

    class Limited(Base):
        class Config(BaseModel):
            per_minute: int

    text = await refusal(UnknownHook, SyncWhereAsync, (Limited, {"per_minute": "many"}))
    assert "plugins[1].use" in text
    assert "plugins[2].use" in text
    assert "plugins[3].config.per_minute" in text


class Needy(Base):
    requires_before = ("api_keys",)


async def test_what_a_plugin_requires_before_it_must_stand_before_it():
    """A plugin that relies on another's work is refused where that comes later, and told to move it."""
    assert "stands after it; move it up" in await refusal(Needy, "api_keys")


async def test_what_a_plugin_requires_must_be_in_the_list():
    """A plugin that relies on another's work is refused without it."""
    text = await refusal(Needy)
    assert "Needy needs api_keys before it" in text
    assert "not in the list" in text


async def test_what_a_plugin_requires_may_stand_before_it():
    """In the right order it starts."""
    async with Gateway.test(plugins=["api_keys", Needy]) as gw:
        assert gw.snapshot.hooks.order()["authenticate"] == ["api_keys"]


class Early(Base):
    @hookimpl
    async def request_received(self, exchange): ...


class Middle(Base):
    @hookimpl
    async def prepare_request(self, exchange): ...


class Late(Base):
    @hookimpl
    async def check_request(self, exchange): ...


@pytest.mark.parametrize(
    ("plugin", "when"),
    [
        (Early, {"roles": ["free"]}),
        (Early, {"stream": True}),
        (Early, {"models": ["a/*"]}),
        (Early, {"keys": ["me"]}),
        (Early, {"teams": ["us"]}),
        (Middle, {"tasks": ["code"]}),
    ],
)
async def test_a_when_whose_field_is_not_known_yet_is_refused(plugin, when):
    """`when` may only name what is known when the plugin's first hook runs; else it would never match."""
    text = await refusal({"use": plugin, "when": when})
    assert f"`{next(iter(when))}` is not known yet when this plugin's" in text


@pytest.mark.parametrize(
    ("plugin", "when"),
    [
        (Early, {"endpoint": "chat/completions"}),
        (Middle, {"roles": ["free"], "stream": True, "models": ["a/*"]}),
        (Late, {"tasks": ["code"]}),
    ],
)
async def test_a_when_whose_fields_are_known_starts(plugin, when):
    """The same fields are fine for a plugin whose hooks come later."""
    async with Gateway.test(plugins=[{"use": plugin, "when": when}]) as gw:
        assert (await gw.chat()).status == 200


async def test_two_plugins_with_one_id_are_refused():
    """An id names one instance: in logs, in metrics and in state."""
    text = await refusal(Late, Late)
    assert "plugins[2]" in text
    assert "a plugin with this id stands" in text


async def test_an_unknown_plugin_is_refused_with_a_suggestion():
    """A typo in `use` is answered with the name that was meant."""
    text = await refusal("api_key")
    assert "no plugin named 'api_key' is installed" in text
    assert "Did you mean 'api_keys'?" in text


async def test_only_plugins_that_the_file_lists_are_imported(tmp_path, monkeypatch):
    """A package that merely is installed runs no code: what is not listed is not even imported."""
    (tmp_path / "canary_plugin.py").write_text("class Plugin:\n    def __init__(self, config, services): ...\n")
    info = tmp_path / "canary-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: canary\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[xenios.plugins]\ncanary = canary_plugin:Plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    async with Gateway.test(plugins=["fallback"]) as gw:
        assert (await gw.chat()).status == 200
        assert "canary_plugin" not in sys.modules
    async with Gateway.test(plugins=["canary"]) as gw:
        assert gw.plugin("canary").__class__.__module__ == "canary_plugin"
        assert gw.snapshot.instances[-1].blueprint.version == "1.0"
    del sys.modules["canary_plugin"]


# --- failing while starting -------------------------------------------------------------------------------------------

events: list[str] = []


@pytest.fixture(autouse=True)
def _no_events():
    events.clear()


class Opens:
    def __init__(self, config, services):
        self.id = services.plugin_id

    @asynccontextmanager
    async def lifespan(self):
        events.append(f"open {self.id}")
        yield
        events.append(f"close {self.id}")


class FailsToConstruct:
    def __init__(self, config, services):
        raise ValueError("no constructor today")


class FailsToOpen(Base):
    @asynccontextmanager
    async def lifespan(self):
        raise ValueError("no lifespan today")
        yield


class FailsToRoute(Base):
    @hookimpl
    def register_routes(self, router):
        raise ValueError("no routes today")


class TakesOurRoute(Base):
    @hookimpl
    def register_routes(self, router):
        async def answer(exchange):
            return Reply(200)

        router.add("POST", "/v1/chat/completions", answer)


class FailsToRegister(Base):
    @hookimpl
    def register_upstreams(self, register):
        register("openrouter", None)


@pytest.mark.parametrize(
    ("plugin", "told"),
    [
        (FailsToConstruct, "plugin FailsToConstruct: __init__ failed: ValueError: no constructor today"),
        (FailsToOpen, "plugin FailsToOpen: lifespan failed: ValueError: no lifespan today"),
        (FailsToRoute, "plugin FailsToRoute: register_routes failed: ValueError: no routes today"),
        (TakesOurRoute, "plugin TakesOurRoute: register_routes failed"),
        (FailsToRegister, "plugin FailsToRegister: register_upstreams failed"),
    ],
)
async def test_a_plugin_that_fails_while_starting_ends_the_start_and_is_named(plugin, told):
    """The gateway doesn't start without a plugin that was asked for; the message names it and the place."""
    assert told in await refusal({"use": Opens, "id": "a"}, plugin, {"use": Opens, "id": "b"})
    assert events in ([], ["open a", "close a"])


async def test_plugins_that_are_open_are_closed_in_reverse_when_a_later_one_fails():
    """A start that fails half-way leaves nothing open, and closes in the reverse order of opening."""
    await refusal({"use": Opens, "id": "a"}, {"use": Opens, "id": "b"}, FailsToOpen, {"use": Opens, "id": "c"})
    assert events == ["open a", "open b", "close b", "close a"]


async def test_plugins_close_in_reverse_at_the_end():
    """What was opened last is closed first."""
    async with Gateway.test(plugins=[{"use": Opens, "id": "a"}, {"use": Opens, "id": "b"}]):
        assert events == ["open a", "open b"]
    assert events == ["open a", "open b", "close b", "close a"]


async def test_a_plugin_that_fails_to_close_does_not_keep_the_others_open():
    """Each plugin is closed, whatever the others do."""

    class FailsToClose(Base):
        @asynccontextmanager
        async def lifespan(self):
            yield
            raise ValueError("no closing today")

    async with Gateway.test(plugins=[{"use": Opens, "id": "a"}, FailsToClose]):
        pass
    assert events == ["open a", "close a"]
