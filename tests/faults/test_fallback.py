"""Fallback, retries, time limits and circuits over real sockets: what the client gets, and what it is told."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter

import pytest

from gateway import Cause, Decision, Forbidden, Limits, RateLimited, Target, hookimpl
from gateway.kit.keys import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from gateway.kit.upstream import (
    Cut,
    Error,
    Hang,
    Json,
    Pause,
    Reset,
    ScriptedUpstream,
    Stream,
    chat_completion,
    chat_events,
)
from gateway.tasks import Tasks
from gateway_plugins.fallback import Plugin as Fallback
from tests.scraped import closed, scraped

SOON = 0.3  # seconds, where the answer is that they pass
A, B = Target("a/one", "openrouter"), Target("b/two", "openrouter")
GOOD = Json(chat_completion("Hello there"))
WORDS = chat_events("Hello there", comments=False)


class Decides:
    """The decision that the test made."""

    decision: Decision

    def __init__(self, config, services): ...

    @hookimpl
    async def choose_targets(self, exchange):
        return self.decision


def of(*targets, **decision):
    return type("Decides", (Decides,), {"decision": Decision("asked", targets, **decision)})


def gateway(*plugins, first=None, settings=None, **decision):
    """Two targets, of which the first answers so and the second well."""
    upstream = ScriptedUpstream()
    if first is not None:
        upstream.on("a/one", first)
    return Gateway.test(plugins=[of(A, B, **decision), *plugins], upstream=upstream, settings=settings)


def limited(**limits):
    return Target("a/one", "openrouter", limits=Limits(**limits))


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "answer", "stream"),
    [
        ({"first_event": SOON}, Hang(), False),
        ({"first_event": SOON}, Stream(WORDS[0], end="hang"), True),
        ({"stall": SOON}, Cut(GOOD, 30, "hang"), False),
        ({"total": SOON}, Hang(), False),
        ({"total": SOON}, Cut(GOOD, 30, "hang"), False),
        ({"total": SOON}, Stream(WORDS[0], end="hang"), True),
    ],
)
async def test_a_targets_own_time_limits_end_its_attempt(limits, answer, stream):
    """Each target may have less time than the settings give: to begin, between two pieces, for all of it."""
    upstream = ScriptedUpstream()
    upstream.on("a/one", answer)
    async with Gateway.test(plugins=[of(limited(**limits), B), "fallback"], upstream=upstream) as gw:
        reply = await gw.chat(stream=stream)
        [exchange] = await gw.finished()
        await gw.upstream.wait_closed(gw.upstream.seen[0])
    assert (reply.status, reply.headers["x-xenios-model"]) == (200, "b/two")
    assert [attempt.cause for attempt in exchange.attempts] == [Cause.TIMEOUT, None]
    assert SOON <= exchange.attempts[0].duration < 5


@pytest.mark.parametrize("limits", [{"stall": SOON}, {"total": SOON}])
async def test_a_stream_that_has_begun_ends_in_an_error_when_its_time_is_over(limits):
    """A stall, or too long a whole: the error event, no clean end, no other model."""
    upstream = ScriptedUpstream()
    upstream.on("a/one", Stream(*WORDS[:2], end="hang"))
    async with Gateway.test(plugins=[of(limited(**limits), B), "fallback"], upstream=upstream) as gw:
        reply = await gw.chat(stream=True)
        [exchange] = await gw.finished()
    assert b"upstream_timeout" in reply.events[-1]
    assert b"[DONE]" not in reply.body
    assert (exchange.outcome, len(exchange.attempts), exchange.attempts[0].cause) == ("timeout", 1, Cause.TIMEOUT)


async def test_an_attempt_within_its_total_time_is_left_alone():
    """A limit on all of an attempt neither ends a later attempt nor a request that is done."""
    upstream = ScriptedUpstream()
    upstream.on("a/one", Error(503))
    upstream.on("b/two", Stream(*WORDS[:2], Pause(3 * SOON), *WORDS[2:]))
    async with Gateway.test(plugins=[of(limited(total=SOON), B), "fallback"], upstream=upstream) as gw:
        reply = await gw.chat(stream=True)
        [exchange] = await gw.finished()
    assert (exchange.outcome, reply.body.endswith(b"data: [DONE]\n\n")) == ("ok", True)


async def test_blanks_before_a_whole_reply_are_no_beginning():
    """An upstream that sends blanks while it thinks has the time to begin, not the time of a pause."""
    slow = Stream(b"  \n", Pause(2 * SOON), json.dumps(chat_completion()).encode(), content_type="application/json")
    upstream = ScriptedUpstream()
    upstream.on("a/one", slow)
    async with Gateway.test(plugins=[of(limited(stall=SOON)), "fallback"], upstream=upstream) as gw:
        reply = await gw.chat()
    assert (reply.status, reply.headers["x-xenios-attempts"]) == (200, "1")


async def test_the_settings_limit_the_whole_of_an_attempt():
    """`upstream.attempt_timeout` holds for every target that has no limit of its own."""
    settings = {"upstream": {"attempt_timeout": SOON}}
    async with gateway("fallback", first=Hang(), settings=settings) as gw:
        reply = await gw.chat()
    assert (reply.status, reply.headers["x-xenios-model"]) == (200, "b/two")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_decision_may_bring_the_deadline_nearer(stream):
    """A rule's timeout ends the whole request: 504; the target that had not begun by then is to blame."""
    upstream = ScriptedUpstream()
    upstream.on("a/one", Hang())
    async with Gateway.test(plugins=[of(A, B, timeout=SOON), "fallback"], upstream=upstream) as gw:
        reply = await gw.chat(stream=stream)
        [exchange] = await gw.finished()
    assert (reply.status, reply.data["error"]["code"]) == (504, "deadline_exceeded")
    assert [attempt.cause for attempt in exchange.attempts] == [Cause.TIMEOUT]


async def test_who_got_only_the_rest_of_the_time_is_not_to_blame():
    """A later target that the deadline ends had what the first one left over: its circuit stays closed."""
    plugin = (Fallback, {"breaker": {"requests": 1}})
    upstream = ScriptedUpstream()
    upstream.on("a/one", Error(503, delay=SOON))
    upstream.on("b/two", Hang())
    async with Gateway.test(plugins=[of(A, B, timeout=2 * SOON), plugin], upstream=upstream) as gw:
        reply = await gw.chat()
        [exchange] = await gw.finished()
        states = [gw.plugin("Plugin").breakers.find(target.name).opened for target in (A, B)]
    assert reply.status == 504
    assert [attempt.cause for attempt in exchange.attempts] == [Cause.SERVER_ERROR, Cause.ABANDONED]
    assert states == [1, 0]


async def test_a_decision_can_not_put_the_deadline_off():
    """`server.request_timeout` is the upper end."""
    upstream = ScriptedUpstream(default=Hang())
    settings = {"server": {"request_timeout": SOON}}
    async with Gateway.test(plugins=[of(A, timeout=600), "fallback"], upstream=upstream, settings=settings) as gw:
        assert (await gw.chat()).status == 504


async def test_no_wait_passes_the_deadline():
    """A retry that the upstream wants later than the request may last is not waited for."""
    upstream = ScriptedUpstream(default=Error(429, headers={"Retry-After": "5"}))
    async with Gateway.test(plugins=[of(A, timeout=8), "fallback"], upstream=upstream) as gw:
        reply = await gw.chat()
        [exchange] = await gw.finished()
    assert (reply.status, reply.headers["retry-after"], len(exchange.attempts)) == (429, "5", 1)
    assert exchange.finished - exchange.started < 4


@pytest.mark.parametrize(
    ("headers", "slept"),
    [
        ({"Retry-After": "2"}, 2), ({"retry-after-ms": "1500", "Retry-After": "60"}, 1.5), ({"Retry-After": "-1"}, 0.5),
        ({"Retry-After": "soon"}, 0.5), ({"Retry-After": "nan"}, 0.5),
        ({"retry-after-ms": "x", "Retry-After": "3"}, 3),
    ],
)  # fmt: skip
async def test_a_busy_upstream_is_asked_again_when_it_says(headers, slept):
    """Seconds, or milliseconds, which win; what makes no sense is as if it weren't there."""
    waits, now = [], time.monotonic()

    async def sleep(seconds):
        waits.append(seconds)

    class Patient(Fallback):
        def __init__(self, config, services):
            super().__init__(config, services, clock=lambda: now, sleep=sleep, dice=lambda: 1.0)

    upstream = ScriptedUpstream(Error(429, headers=headers))
    async with Gateway.test(plugins=[of(A), (Patient, {"breaker": False})], upstream=upstream) as gw:
        reply = await gw.chat()
    assert (reply.status, reply.headers["x-xenios-attempts"]) == (200, "2")
    assert waits == [pytest.approx(slept if slept == 0.5 else slept * 1.1)]


@pytest.mark.parametrize("header", ["1e12", "99999999999", "1" + "0" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_an_upstream_that_asks_for_ever_is_not_asked_again(header):
    """Too long a wait is not waited for, however long it is; the client hears of a year at most."""
    upstream = ScriptedUpstream(default=Error(429, headers={"Retry-After": header}))
    async with Gateway.test(plugins=[of(A), (Fallback, {"breaker": False})], upstream=upstream) as gw:
        reply = await gw.chat()
    assert (reply.status, reply.headers["x-xenios-attempts"]) == (429, "1")
    assert reply.headers["retry-after"] == str(365 * 86400)


@pytest.mark.parametrize(
    ("wait", "told"),
    [(10**400, str(365 * 86400)), (-(10**400), None), ([], None), ("x", None)],
    ids=["huge", "negative", "list", "word"],
)
async def test_a_wait_in_the_body_may_be_anything(wait, told):
    """A number beyond all numbers is a long wait; what is none is as if it weren't there. The failure stays a 429."""
    upstream = ScriptedUpstream(default=Error(429, metadata={"retry_after": wait}))
    async with Gateway.test(plugins=[of(A), (Fallback, {"breaker": False, "retries": {}})], upstream=upstream) as gw:
        reply = await gw.chat()
    assert (reply.status, reply.headers.get("retry-after")) == (429, told)


# --- answers that are not what was asked for ---------------------------------------------------------------------------

JSON_ASKED = {"response_format": {"type": "json_object"}}


async def test_an_answer_that_is_no_json_is_asked_of_another_model():
    """With `invalid_output` the next model answers; both attempts are paid, and the first says why it didn't count."""
    upstream = ScriptedUpstream()
    upstream.on("a/one", Json(chat_completion("Sure!", cost=0.001)))
    upstream.on("b/two", Json(chat_completion('{"a": 1}', cost=0.002)))
    plugin = (Fallback, {"on": ["invalid_output"]})
    async with Gateway.test(plugins=[of(A, B), plugin], upstream=upstream) as gw:
        reply = await gw.chat(**JSON_ASKED)
        [exchange] = await gw.finished()
    assert reply.data["choices"][0]["message"]["content"] == '{"a": 1}'
    assert reply.headers["x-xenios-model"] == "b/two"
    assert [attempt.cause for attempt in exchange.attempts] == [Cause.INVALID_OUTPUT, None]
    assert exchange.cost.usd == pytest.approx(0.003)


async def test_where_nobody_does_better_the_answer_is_passed_as_it_is():
    """An answer that was paid for is not turned into an error."""
    async with gateway((Fallback, {"on": ["invalid_output"], "retries": {}}), first=GOOD) as gw:
        gw.upstream.on("b/two", Json(chat_completion("Sure!")))
        reply = await gw.chat(**JSON_ASKED)
        [exchange] = await gw.finished()
    assert (reply.status, reply.data["choices"][0]["message"]["content"]) == (200, "Sure!")
    assert [attempt.cause for attempt in exchange.attempts] == [Cause.INVALID_OUTPUT] * 2
    assert exchange.outcome == "ok"


@pytest.mark.parametrize("status", [401, 503])
async def test_what_is_paid_for_is_passed_though_a_later_attempt_fails(status):
    """Neither a failure that is acted on nor one that isn't takes an answer away, whose model the reply names."""
    plugin = (Fallback, {"on": ["invalid_output", "server_error"], "retries": {}})
    async with gateway("api_keys", plugin, first=Json(chat_completion("Sure!"))) as gw:
        gw.upstream.on("b/two", Error(status))
        reply = await gw.chat(**JSON_ASKED)
        [exchange] = await gw.finished()
    assert (reply.status, reply.data["choices"][0]["message"]["content"]) == (200, "Sure!")
    assert (reply.headers["x-xenios-model"], reply.headers["x-xenios-attempts"]) == ("a/one", "2")
    assert (exchange.outcome, exchange.error, exchange.served) == ("ok", None, A)
    assert "invalid_output" in reply.headers["x-xenios-tries"].split(", ")[0]


class RefusesTheSecond:
    """As a budget does that holds one attempt, not two."""

    def __init__(self, config, services): ...

    @hookimpl
    async def around_upstream(self, exchange, attempt, call_next):
        if exchange.attempts:
            raise RateLimited
        return await call_next(attempt)


async def test_what_is_paid_for_is_passed_though_a_budget_holds_no_other_attempt():
    """A limit that refuses the further attempt refuses that alone: no error is told or logged."""
    first, plugin = Json(chat_completion("Sure!")), (Fallback, {"on": ["invalid_output"]})
    async with gateway(plugin, RefusesTheSecond, first=first) as gw:
        reply = await gw.chat(**JSON_ASKED)
        [exchange] = await gw.finished()
    assert (reply.status, reply.headers["x-xenios-model"]) == (200, "a/one")
    assert (exchange.outcome, exchange.error_by, len(exchange.attempts)) == ("ok", None, 1)


@pytest.mark.parametrize(("on", "stream"), [(["timeout"], False), (["invalid_output"], True)])
async def test_an_answer_is_looked_at_only_where_that_is_wanted(on, stream):
    """By default, and in a stream, whatever the model says is the answer."""
    first = Stream(*WORDS) if stream else GOOD
    async with gateway((Fallback, {"on": on}), first=first) as gw:
        reply = await gw.chat(stream=stream, **JSON_ASKED)
    assert (reply.status, reply.headers["x-xenios-model"]) == (200, "a/one")


# --- refusals ----------------------------------------------------------------------------------------------------------

MODERATED = Error(403, metadata={"reasons": ["violence"], "flagged_input": "..."})


@pytest.mark.promise("P7.moderation")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("on", "config", "falls_back"),
    [
        (None, {}, False),
        (frozenset(Cause) - {Cause.CONTENT_POLICY}, {}, False),
        (frozenset({Cause.CONTENT_POLICY}), {}, True),
        (None, {"on": ["content_policy"]}, True),
        (frozenset({Cause.TIMEOUT}), {"on": ["content_policy"]}, False),
    ],
)
async def test_a_moderated_request_wanders_only_where_that_is_said(stream, on, config, falls_back):
    """A refusal by moderation reaches the client, unless `content_policy` is listed by its rule, or for all."""
    async with gateway((Fallback, config), first=MODERATED, fallback_on=on) as gw:
        reply = await gw.chat(stream=stream)
        asked = [seen.model for seen in gw.upstream.seen]
    if falls_back:
        assert (reply.status, asked) == (200, ["a/one", "b/two"])
    else:
        assert (reply.status, reply.data["error"]["code"], asked) == (403, "content_policy_violation", ["a/one"])


# --- said --------------------------------------------------------------------------------------------------------------

APP = new_key()
KEYS = {"use": "api_keys", "config": {"keys": [{"id": "app", "hash": hash_key(APP, PEPPER)}]}}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_administrator_is_told_of_each_attempt(stream):
    """Target, cause and milliseconds, of errors too; others are told only with `server.debug_headers`."""
    app = {"Authorization": f"Bearer {APP}"}
    body = {"model": "x", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    for debug in (False, True):
        settings = {"server": {"debug_headers": debug}}
        async with gateway(KEYS, "fallback", first=Error(503), settings=settings) as gw:
            admin = await gw.post("/v1/chat/completions", body)
            plain = await gw.post("/v1/chat/completions", body, headers=app)
        first, second = admin.headers["x-xenios-tries"].split(", ")
        assert first.split(";")[:2] == ["openrouter/a/one", "server_error"]
        assert second.split(";")[:2] == ["openrouter/b/two", "ok"]
        assert second.endswith("ms")
        assert ("x-xenios-tries" in plain.headers) is debug


class RefusingRule:
    """As a rule does that refuses."""

    def __init__(self, config, services): ...

    @hookimpl
    async def choose_targets(self, exchange):
        raise Forbidden("No.", headers={"x-xenios-rule": "r\u00e4tsel"})


async def test_an_error_names_the_rule_that_refused():
    """In the same header, and as plain ASCII, as where a rule decided."""
    async with Gateway.test(plugins=[RefusingRule]) as gw:
        reply = await gw.chat()
    assert (reply.status, reply.headers["x-xenios-rule"]) == (403, "r%C3%A4tsel")


async def test_a_stream_that_begins_early_says_only_what_is_known():
    """Headers that go out before an upstream answered name no model as the one that did: another may."""
    settings = {"server": {"debug_headers": True, "stream_commit_after": "50ms"}}
    async with gateway("fallback", first=Error(503, delay=SOON), settings=settings) as gw:
        reply = await gw.chat(stream=True)
        [exchange] = await gw.finished()
    assert (reply.status, exchange.outcome, exchange.served) == (200, "ok", B)
    assert "x-xenios-model" not in reply.headers
    assert reply.headers["x-xenios-tries"].startswith("openrouter/a/one;pending;")


async def test_the_header_is_bounded_and_printable():
    """A long list of strange names makes no long or broken header."""
    targets = tuple(Target("bad\r\nmodel-" + "x" * 1000, "openrouter") for _ in range(20))
    plugin = (Fallback, {"max_attempts": 20, "breaker": False})
    upstream = ScriptedUpstream(default=Error(503))
    async with Gateway.test(plugins=["api_keys", of(*targets), plugin], upstream=upstream) as gw:
        said = (await gw.chat()).headers["x-xenios-tries"]
    assert said.endswith(", ...")
    assert len(said) < 4000
    assert said.isascii()
    assert said.isprintable()


# --- circuits ----------------------------------------------------------------------------------------------------------

QUICK = {"requests": 4, "window": "60s", "open_for": "60s"}


async def test_metrics_of_circuits_outlive_a_reload():
    """`/metrics` has each circuit's state, also once a reload's new instance stands beside the old one, and alone."""
    names = {"upstream": {"default": "openrouter"}, "catalogue": {"overrides": {"a/one": {}, "b/two": {}}}}
    plugins = ["api_keys", of(A, B), {"use": "fallback", "config": {"breaker": QUICK}}, "metrics"]
    upstream = ScriptedUpstream()
    upstream.on("a/one", Error(503))

    async def circuits():
        return await scraped(gw, "xenios_breaker_state")

    async with Gateway.test(plugins=plugins, upstream=upstream, settings=names) as gw:
        for _ in range(4):
            await gw.chat()
        one, two = ("a/one", "openrouter"), ("b/two", "openrouter")  # labels by name: model, upstream
        assert await circuits() == {one: 3, two: 0}
        upstream.on("b/two", Hang())
        waiting, old = Tasks().spawn(gw.chat(), "asked"), gw.snapshot
        await upstream.wait_seen(9)
        plugins[2] = {"use": "fallback", "config": {"breaker": {**QUICK, "open_for": "61s"}}}
        await gw.reload(plugins=plugins, settings=names)
        assert await circuits() == {one: 3, two: 0}  # the old one's, whose request goes on
        upstream.on("b/two", GOOD)
        for _ in range(4):
            await gw.chat()
        assert await circuits() == {one: 3, two: 0}
        waiting.cancel()
        await closed(gw, old)
        assert await circuits() == {one: 3, two: 0}
        assert await scraped(gw, "xenios_breaker_changes_total") == {("opened", *one): 2}


async def test_an_open_circuit_is_said_everywhere():
    """Header, exchange, `/admin/targets` and readiness, which stays 200."""
    plugin = {"use": "fallback", "config": {"breaker": QUICK}}
    async with gateway("api_keys", plugin, first=Error(503)) as gw:
        for _ in range(4):
            await gw.chat()
        reply = await gw.chat()
        exchange = (await gw.finished(5))[-1]
        targets = (await gw.get("/admin/targets")).data
        ready = await gw.get("/health/ready")
        asked = Counter(seen.model for seen in gw.upstream.seen)
    assert (reply.status, reply.headers["x-xenios-attempts"]) == (200, "1")
    assert reply.headers["x-xenios-tries"].startswith("openrouter/a/one;circuit_open, openrouter/b/two;ok;")
    assert exchange.skipped == [A]
    assert asked == {"a/one": 4, "b/two": 5}
    assert [(t["target"], t["state"]) for t in targets["data"]] == [
        ("openrouter/a/one", "open"), ("openrouter/b/two", "closed"),
    ]  # fmt: skip
    assert (ready.status, ready.data["status"]) == (200, "ok")
    assert ready.data["warnings"] == {"fallback": ["openrouter/a/one: circuit open (server_error)"]}


@pytest.mark.parametrize("stream", [False, True])
async def test_with_every_circuit_open_the_client_is_told_when_to_come_back(stream):
    """503 `unavailable` with Retry-After, and nothing is sent upstream."""
    upstream = ScriptedUpstream(default=Error(503))
    plugin = (Fallback, {"breaker": QUICK, "retries": {}})
    async with Gateway.test(plugins=[of(A), plugin], upstream=upstream) as gw:
        for _ in range(4):
            await gw.chat(stream=stream)
        reply = await gw.chat(stream=stream)
        exchange = (await gw.finished(5))[-1]
        asked = len(gw.upstream.seen)
    assert (reply.status, reply.data["error"]["code"], asked) == (503, "unavailable", 4)
    assert 50 < int(reply.headers["retry-after"]) <= 60
    assert (reply.headers["x-xenios-attempts"], exchange.outcome) == ("0", "upstream_error")


@pytest.mark.parametrize("end", ["hang", "cut"])
async def test_streams_that_break_off_open_the_circuit(end):
    """An upstream that begins well and then stalls or hangs up is no healthy one."""
    settings = {"upstream": {"stall_timeout": SOON}}
    async with gateway((Fallback, {"breaker": QUICK}), first=Stream(*WORDS[:2], end=end), settings=settings) as gw:
        await asyncio.gather(*(gw.chat(stream=True) for _ in range(4)))
        await gw.finished(4)
        reply = await gw.chat(stream=True)
    assert reply.headers["x-xenios-model"] == "b/two"


async def test_clients_can_open_no_circuit():
    """Wrong requests, and clients that leave, are no fault of the target's."""
    async with gateway((Fallback, {"breaker": QUICK}), first=Error(400)) as gw:
        for _ in range(10):
            assert (await gw.chat()).status == 400
        gw.upstream.on("a/one", Stream(*WORDS[:2], end="hang"))
        for _ in range(10):
            body = {"model": "x", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
            async with gw.session.post(f"{gw.url}/v1/chat/completions", json=body, headers=gw.headers) as reply:
                await reply.content.readany()
                reply.close()
        await gw.finished(20)
        gw.upstream.on("a/one", GOOD)
        reply = await gw.chat()
    assert reply.headers["x-xenios-model"] == "a/one"


# --- under load --------------------------------------------------------------------------------------------------------


def faulty(share, dice):
    """Fails in one of many ways, so often; else answers well."""
    faults = [Error(500), Error(503), Error(429), Reset(), Cut(GOOD, 30), Error(502, "<h1>Bad Gateway</h1>")]

    def answer(seen):
        return dice.choice(faults) if dice.random() < share else GOOD

    return answer


async def test_a_healthy_target_hides_a_faulty_one():
    """30 % faults of the first target under load: all requests succeed, attempts stay within the cap, its circuit opens,
    and closes once the target is well again.
    """
    dice, count, each = random.Random(4), 600, 20
    breaker = {"failures": 0.25, "requests": 20, "window": "5s", "open_for": "200ms"}
    async with gateway((Fallback, {"breaker": breaker, "max_attempts": 3}), first=faulty(0.3, dice)) as gw:

        async def client(requests):
            return [await gw.chat() for _ in range(requests)]

        replies = [r for each in await asyncio.gather(*(client(count // each) for _ in range(each))) for r in each]
        circuit = gw.plugin("Plugin").breakers.find(A.name)
        opened, served = circuit.opened, Counter(r.headers["x-xenios-model"] for r in replies)
        gw.upstream.on("a/one", GOOD)
        async with asyncio.timeout(10):
            while circuit.opened_at is not None:
                assert (await gw.chat()).status == 200
    attempts = Counter(int(reply.headers["x-xenios-attempts"]) for reply in replies)
    good = sum(reply.status == 200 for reply in replies)
    print(
        f"{good} of {len(replies)} served, by {dict(served)}; attempts {dict(attempts)}; circuit opened {opened} times"
    )
    assert good >= 0.999 * len(replies)
    assert max(attempts) <= 3
    assert opened >= 1
    assert served["a/one"] > 0 < served["b/two"]
    assert circuit.opened_at is None  # closed again
