"""`when:` of a plugin entry: for which requests a plugin is there."""

import pytest

from gateway import Decision, Target, hookimpl
from gateway.errors import StartError
from gateway.kit.testing import Gateway
from tests.contract.jobs import Jobs, Keeper, taken
from tests.contract.recorder import Recorder, trace


class Scoped:
    """Says in a header that it was there."""

    def __init__(self, config, services): ...

    @hookimpl
    async def check_request(self, exchange):
        exchange.reply_headers["x-scoped"] = "1"


class Tasks:
    def __init__(self, config, services): ...

    @hookimpl
    async def choose_targets(self, exchange):
        task = exchange.request.header("x-task")
        return Decision("m", (Target("m", "openrouter"),), task=task)


CHAT = ("/v1/chat/completions", {"model": "test/model", "messages": []}, {})
EMBED = ("/v1/embeddings", {"model": "other/model", "input": "Hello"}, {})


@pytest.mark.parametrize(
    ("when", "inside", "outside"),
    [
        ({"endpoint": "chat/*"}, CHAT, EMBED),
        ({"endpoint": ["embeddings", "rerank"]}, EMBED, CHAT),
        ({"stream": True}, (CHAT[0], {**CHAT[1], "stream": True}, {}), CHAT),
        ({"stream": False}, CHAT, (CHAT[0], {**CHAT[1], "stream": True}, {})),
        ({"models": ["test/*"]}, CHAT, EMBED),
        ({"tasks": ["code"]}, (CHAT[0], CHAT[1], {"x-task": "code"}), CHAT),
        ({"roles": ["tester"], "models": ["test/*"]}, CHAT, EMBED),
        ({"teams": ["blue"], "endpoint": "chat/completions"}, CHAT, EMBED),
        ({"keys": ["call*"], "phase": ["live"], "models": "test/*"}, CHAT, EMBED),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
async def test_a_plugin_is_there_for_the_requests_that_match_and_no_others(when, inside, outside):
    """Every field that is given must match; a plugin out of scope is not called."""
    async with Gateway.test(plugins=[Recorder, Tasks, {"use": Scoped, "when": when}]) as gw:
        for (path, body, headers), there in ((inside, True), (outside, False)):
            reply = await gw.post(path, body, headers=headers)
            assert reply.status == 200
            assert ("x-scoped" in reply.headers) is there


@pytest.mark.parametrize("when", [{"roles": ["admin"]}, {"teams": ["red"]}, {"keys": ["nobody"]}, {"phase": ["run"]}])
async def test_a_plugin_is_not_there_for_other_callers(when):
    """Roles, teams and keys are the principal's, never what a request says of itself."""
    async with Gateway.test(plugins=[Recorder, {"use": Scoped, "when": when}]) as gw:
        assert "x-scoped" not in (await gw.chat()).headers


class Renames:
    """Asks for another model than the client did."""

    def __init__(self, config, services): ...

    @hookimpl
    async def prepare_request(self, exchange):
        exchange.body["model"] = exchange.request.header("x-model")


@pytest.mark.parametrize(("before", "after", "there"), [("test/a", "other/b", True), ("other/b", "test/a", False)])
async def test_when_is_decided_once_and_kept(before, after, there):
    """A plugin that was there at its first hook is there at its last, whatever others change in between."""

    class Halves(Recorder):
        """Has hooks only from `prepare_request` on, as `models` demands."""

        request_received = authenticate = None

    scoped = {"use": Halves, "id": "Halves", "when": {"models": ["test/*"]}}
    async with Gateway.test(plugins=[Recorder, scoped, Renames]) as gw:
        reply = await gw.post("/v1/chat/completions", {"model": before, "messages": []}, headers={"x-model": after})
        assert reply.status == 200
        assert (await gw.upstream.wait_seen(1)).model == after
        [exchange] = await gw.finished()
        everything = [hook for hook in trace(exchange) if hook not in {"request_received", "authenticate"}]
        assert trace(exchange, "Halves") == (everything if there else [])


async def test_an_authentication_out_of_scope_still_demands_a_key():
    """Scoping the only authentication to one endpoint doesn't open the others: they are answered with 401."""
    entry = {"use": "api_keys", "when": {"endpoint": "embeddings"}}
    async with Gateway.test(plugins=[entry]) as gw:
        assert (await gw.chat()).status == 401
        assert (await gw.post("/v1/embeddings", {"model": "m", "input": "Hello"})).status == 200
        assert [seen.endpoint for seen in gw.upstream.seen] == ["embeddings"]


async def test_a_refusal_before_the_caller_is_known_is_out_of_scope_for_roles():
    """`when: roles` can't match a request that never showed who it is; the plugin's last hooks don't run for it."""

    class Watches:
        def __init__(self, config, services): ...

        @hookimpl
        def response_started(self, exchange):
            exchange.reply_headers["x-scoped"] = "1"

    entry = {"use": Watches, "when": {"roles": ["*"]}}
    async with Gateway.test(plugins=["api_keys", entry]) as gw:
        reply = await gw.post("/v1/chat/completions", {}, headers={"Authorization": ""})
        assert (reply.status, "x-scoped" in reply.headers) == (401, False)


async def test_nobody_serves_the_world_without_a_key_by_mistake():
    """No plugin that authenticates and an address that others can reach: the start is refused, and says what to do."""
    with pytest.raises(StartError, match=r"allow_anonymous"):
        async with Gateway.test(settings={"server": {"host": "0.0.0.0"}}):
            pass  # pragma: no cover


async def test_anonymous_service_can_be_asked_for():
    """`server.allow_anonymous: true` says in so many words that everybody may call."""
    async with Gateway.test(settings={"server": {"host": "0.0.0.0", "allow_anonymous": True}}) as gw:
        reply = await gw.post(CHAT[0], CHAT[1], headers={"Authorization": ""})
        assert reply.status == 200


async def test_on_loopback_no_key_is_needed():
    """Who starts the gateway on a laptop without any plugin can use it at once."""
    async with Gateway.test() as gw:
        reply = await gw.post(CHAT[0], CHAT[1], headers={"Authorization": ""})
        assert reply.status == 200


async def test_phases_are_known_with_the_decision():
    """A plugin for jobs at work is not there when they are taken, nor for what is answered at once."""
    scoped = {"use": Scoped, "when": {"phase": ["run"]}}
    async with Gateway.test(plugins=[Jobs, scoped]) as gw:
        assert "x-scoped" not in (await gw.chat()).headers
        jobs, keeper = await taken(gw), Keeper()
        await jobs.services.run(jobs.late(), keeper)
        assert "x-scoped" in keeper.headers
        _, accepted, _ = await gw.finished(3)
        assert "x-scoped" not in accepted.reply_headers
