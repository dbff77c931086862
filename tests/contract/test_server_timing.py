"""`Server-Timing`: how long each phase and each plugin's hook took, for whom it may be."""

import asyncio
import re

import pytest

from gateway import Reply, hookimpl, timing
from gateway.kit.keys import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from gateway.kit.upstream import Error, Pause, ScriptedUpstream, Stream, chat_events
from tests.contract.recorder import Recorder

PHASES = ["total", "gateway", "upstream", "receive", "authenticate", "body", "prepare", "route", "check", "answer"]
# https://www.w3.org/TR/server-timing/#the-server-timing-header-field with RFC 9110's token and quoted-string
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
QUOTED = r'"(?:[\t !#-\[\]-~]|\\[\t -~])*"'
METRIC = re.compile(rf"({TOKEN});dur=([0-9]+(?:\.[0-9]+)?)(?:;desc=({QUOTED}))?")
APP = new_key()
KEYS = {"use": "api_keys", "config": {"keys": [{"id": "app", "hash": hash_key(APP, PEPPER)}]}}
ON = {"server": {"server_timing": "everyone"}}


def timings(reply):
    """{name: milliseconds}; every entry must be one that the standard knows."""
    found = {}
    for entry in reply.headers["Server-Timing"].split(", "):
        match = METRIC.fullmatch(entry)
        assert match is not None, entry
        found[match[1]] = float(match[2])
    return found


class Slow:
    """Takes its time for one hook."""

    def __init__(self, config, services): ...

    @hookimpl
    async def check_request(self, exchange):
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True])
async def test_each_phase_and_hook_is_told(stream):
    """Phases and hooks have an entry each; the upstream's time is its own, to the first content, and no plugin's."""
    upstream = ScriptedUpstream(Stream(Pause(0.2), *chat_events())) if stream else None
    async with Gateway.test(plugins=["api_keys", Slow], upstream=upstream, settings=ON) as gw:
        reply = await gw.chat(stream=stream)
    found = timings(reply)
    assert list(found)[: len(PHASES)] == PHASES
    assert {"api_keys.authenticate", "Slow.check_request"} < set(found)
    assert 50 <= found["Slow.check_request"] <= found["check"] <= found["gateway"] < 300
    assert found["gateway"] + found["upstream"] == pytest.approx(found["total"], abs=0.01)
    assert sum(found[phase] for phase in PHASES[3:]) <= found["total"]
    if stream:
        assert found["upstream"] >= 200
        assert found["Slow.check_request"] < 200


@pytest.mark.parametrize(
    ("setting", "admin", "told"),
    [
        ("off", True, False),
        ("admins", True, True),
        ("admins", False, False),
        ("everyone", False, True),
    ],
)
async def test_who_is_told(setting, admin, told):
    """Nobody, administrators or everybody, as the configuration says; it says nobody."""
    settings = {"server": {"server_timing": setting}} if setting != "off" else {}
    async with Gateway.test(plugins=[KEYS], settings=settings) as gw:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        headers = {} if admin else {"Authorization": f"Bearer {APP}"}
        reply = await gw.post("/v1/chat/completions", body, headers=headers)
    assert reply.status == 200
    assert ("Server-Timing" in reply.headers) is told


async def test_refusals_and_failures_are_told_too():
    """A reply that is an error says how far it came, and who took how long."""
    async with Gateway.test(plugins=["api_keys", Slow], upstream=ScriptedUpstream(Error(500)), settings=ON) as gw:
        failed = timings(await gw.chat())
        refused = timings(await gw.post("/v1/chat/completions", {}, headers={"Authorization": "Bearer none"}))
        unknown = timings(await gw.get("/nowhere"))
    assert {"upstream", "Slow.check_request"} < set(failed)
    assert "answer" not in failed
    assert list(refused) == ["total", "gateway", "receive", "authenticate", "api_keys.authenticate"]
    assert "handle" in unknown


async def test_a_plugin_s_route_is_told_whatever_its_path(monkeypatch):
    """A route's path is quoted so that the header stays sound; of very many hooks the longest are told."""

    class Routes:
        def __init__(self, config, services): ...

        @hookimpl
        def register_routes(self, router):
            router.add("GET", '/odd/{name:[^"]+}/ü', self.handle)

        async def handle(self, exchange):
            return Reply(200)

    async with Gateway.test(plugins=[Routes, Recorder], settings=ON) as gw:
        value = (await gw.get("/odd/x/%C3%BC")).headers["Server-Timing"]
        assert "Routes.handler;dur=" in value
        assert 'desc="Routes GET /odd/{name:[^_]+}/_"' in value
        monkeypatch.setattr(timing, "MOST_HOOKS", 1)
        value = (await gw.get("/odd/x/%C3%BC")).headers["Server-Timing"]
    assert value.count("desc=") == 1
