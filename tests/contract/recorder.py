"""Plugins that write down which hooks ran: the instruments of the contract tests.

Each call is noted in the exchange itself, so that the order across plugins can be seen.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import BaseModel, ConfigDict

from gateway import ContextKey, Decision, Exchange, Forbidden, Principal, RateLimited, Reply, Target, hookimpl
from tests.contract.requests import recorded

TRACE: ContextKey[list[tuple[str, str]]] = ContextKey("trace")
CALLER = Principal(id="caller", tenant="caller", roles=frozenset({"tester"}), team="blue")


def trace(exchange: Exchange, plugin: str = "Recorder") -> list[str]:
    """The hooks of one plugin that this exchange went through, in order."""
    return [hook for who, hook in exchange.get(TRACE) or () if who == plugin]


def callers(exchange: Exchange, hook: str) -> list[str]:
    """The plugins whose `hook` ran, in order."""
    return [who for who, what in exchange.get(TRACE) or () if what == hook]


class RecordingTap:
    """Passes everything on."""

    def __init__(self, recorder: Recorder, exchange: Exchange) -> None:
        self._recorder = recorder
        self._exchange = exchange

    def event(self, event):
        return event

    def end(self, outcome):
        self._recorder.saw("tap.end", self._exchange)
        return ()


class Recorder:
    """Implements every hook there is; lets everybody in and changes nothing."""

    def __init__(self, config: Any, services: Any) -> None:
        self.config = config
        self.id = services.plugin_id
        self.corrections: asyncio.Queue[Any] = asyncio.Queue()
        self.started: list[str] = []

    def saw(self, hook: str, exchange: Exchange) -> Any:
        """Notes the call. What it returns that is not None, the hook returns."""
        seen = exchange.get(TRACE)
        if seen is None:
            seen = exchange.set(TRACE, [])
        seen.append((self.id, hook))

    @hookimpl
    def register_routes(self, router):
        self.started.append("register_routes")
        if self.id == "Recorder":
            router.add("POST", "/recorded/{name}", self._answer)

    async def _answer(self, exchange):
        self.saw("handler", exchange)
        return Reply(200, data={"name": exchange.request.path_params["name"]})

    @hookimpl
    def register_commands(self, cli):
        self.started.append("register_commands")

    @hookimpl
    def register_upstreams(self, register):
        self.started.append("register_upstreams")

    @hookimpl
    async def request_received(self, exchange):
        self.saw("request_received", exchange)

    @hookimpl
    async def authenticate(self, exchange):
        answer = self.saw("authenticate", exchange)
        return CALLER if answer is None else answer

    @hookimpl
    async def restore_principal(self, reference, kept):
        return CALLER if reference == CALLER.reference else None

    @hookimpl
    async def prepare_request(self, exchange):
        self.saw("prepare_request", exchange)

    @hookimpl
    async def choose_targets(self, exchange):
        return self.saw("choose_targets", exchange)

    @hookimpl
    async def check_request(self, exchange):
        self.saw("check_request", exchange)

    @hookimpl
    async def lookup_response(self, exchange):
        return self.saw("lookup_response", exchange)

    @hookimpl
    async def around_upstream(self, exchange, attempt, call_next):
        answer = self.saw("around_upstream", exchange)
        return await call_next(attempt) if answer is None else answer

    @hookimpl
    def attempt_started(self, exchange, attempt):
        self.saw("attempt_started", exchange)

    @hookimpl
    def attempt_finished(self, exchange, attempt):
        self.saw("attempt_finished", exchange)

    @hookimpl
    def open_tap(self, exchange):
        answer = self.saw("open_tap", exchange)
        return RecordingTap(self, exchange) if answer is None else answer

    @hookimpl
    async def transform_response(self, exchange):
        self.saw("transform_response", exchange)

    @hookimpl
    def render_error(self, exchange, error):
        return self.saw("render_error", exchange)

    @hookimpl
    def response_started(self, exchange):
        self.saw("response_started", exchange)

    @hookimpl
    async def request_finished(self, exchange):
        self.saw("request_finished", exchange)

    @hookimpl
    async def usage_corrected(self, correction):
        self.corrections.put_nowait(correction)

    @hookimpl
    async def explain(self, exchange):
        self.saw("explain", exchange)
        return [f"{self.id} would record this"]


class BrokenConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    hook: str
    how: str = "raise"  # or "refuse", or "return": something that the hook may not return


class Broken(Recorder):
    """A recorder that goes wrong in one hook."""

    Config = BrokenConfig

    def saw(self, hook: str, exchange: Exchange) -> Any:
        super().saw(hook, exchange)
        if hook != self.config.hook:
            return None
        match self.config.how:
            case "refuse":
                raise RateLimited("One is enough.")
            case "return":
                return {"of": "the wrong type"}
        raise ValueError("It broke.")


class Refuser:
    def __init__(self, config, services): ...

    @hookimpl
    async def check_request(self, exchange):
        raise Forbidden("Not today.")


class Hits:
    """A cache that has everything."""

    def __init__(self, config, services): ...

    @hookimpl
    async def lookup_response(self, exchange):
        if exchange.stream:
            return Reply(200, recorded(exchange.endpoint), {"Content-Type": "text/event-stream"})
        return Reply(200, data={"from": "the cache"})


class TwoTargets:
    def __init__(self, config, services): ...

    @hookimpl
    async def choose_targets(self, exchange):
        return Decision("two", (Target("a/one", "openrouter"), Target("b/two", "openrouter")))
