import contextlib
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_objects import exchange, services
from pydantic import ValidationError

from gateway import (
    Attempt,
    AttemptRecord,
    Cause,
    Cost,
    Decision,
    Limits,
    RateLimited,
    Source,
    StoreUnavailable,
    Target,
    UpstreamError,
)
from gateway.kit import BreakerPolicy, Breakers
from gateway.kit.breaker import MOST
from gateway.settings import load_text
from gateway_plugins import fallback
from gateway_plugins.fallback.plan import Entry, Plan, Policy
from gateway_plugins.fallback.shared import Shared

A, B, C, D = (Target(name, "openrouter") for name in "abcd")
T = 1000.0


class Clock:
    """Stands still but for those who sleep."""

    def __init__(self):
        self.now = T
        self.slept = []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class Upstream:
    """Answers or fails by model, a list in turn; remembers what was asked of it, and tells the plugin as the core would."""

    def __init__(self, **failures):
        self.failures = failures
        self.asked = []

    def of(self, plugin, exchange):
        async def call_next(attempt):
            model = attempt.target.model
            self.asked.append(model)
            failure = self.failures.get(model)
            if isinstance(failure, list):
                failure = failure.pop(0) if failure else None
            record = AttemptRecord(attempt, len(exchange.attempts) + 1, plugin._clock())
            exchange.attempts.append(record)
            if failure is None:
                plugin.attempt_finished(exchange, record)
                return f"answer of {model}"
            if not isinstance(failure, Exception):
                failure = UpstreamError(failure)
            if isinstance(failure, UpstreamError):
                record.cause, record.retry_after = failure.cause, failure.retry_after
                plugin.attempt_finished(exchange, record)
            raise failure

        return call_next


def made(dice=0.5, **config):
    clock = Clock()
    catalogue = SimpleNamespace(status=lambda: {"openrouter": {}})
    plugin = fallback.Plugin(
        fallback.Config(**config), replace(services(), catalogue=catalogue), clock=clock, sleep=clock.sleep, dice=lambda: dice
    )  # fmt: skip
    plugin.clock = clock
    return plugin


def asking(*targets, **decision):
    asked = exchange()
    asked.decision = Decision("asked", targets, **decision)
    return asked


async def ask(upstream, *targets, first=None, plugin=None, asked=None, **config):
    plugin = plugin or made(**config)
    asked = asked or asking(*targets)
    return await plugin.around_upstream(asked, asked.attempt(first or targets[0]), upstream.of(plugin, asked))


async def failed(upstream, *targets, **options):
    with pytest.raises(UpstreamError) as caught:
        await ask(upstream, *targets, **options)
    return caught.value


# --- the next target -------------------------------------------------------------------------------------------------


async def test_the_first_that_answers_is_the_answer():
    """While the first model answers, no other is asked."""
    upstream = Upstream()
    assert await ask(upstream, A, B) == "answer of a"
    assert upstream.asked == ["a"]


@pytest.mark.parametrize(
    "cause",
    [
        Cause.CONNECTION, Cause.TLS, Cause.TIMEOUT, Cause.RATE_LIMIT, Cause.SERVER_ERROR, Cause.BAD_REPLY,
        Cause.TRUNCATED, Cause.MODEL_NOT_FOUND,
    ],
)  # fmt: skip
async def test_what_another_model_can_mend_is_tried_there(cause):
    """When a model's upstream is away, slow, busy or broken, or has no such model, the next one answers, at once."""
    upstream, plugin = Upstream(a=cause, b=cause), made()
    assert await ask(upstream, A, B, C, plugin=plugin) == "answer of c"
    assert (upstream.asked, plugin.clock.slept) == (["a", "b", "c"], [])


@pytest.mark.parametrize(
    "cause",
    [
        Cause.CONTENT_POLICY, Cause.CONTEXT_LENGTH, Cause.INVALID_REQUEST, Cause.AUTH, Cause.PAYMENT,
        Cause.CLIENT_DISCONNECT, Cause.ABANDONED,
    ],
)  # fmt: skip
async def test_what_no_model_can_mend_is_told_at_once(cause):
    """A refused, too long or invalid request is not sent round all models; a client that left gets no further tries."""
    upstream = Upstream(a=cause)
    assert (await failed(upstream, A, B)).cause is cause
    assert upstream.asked == ["a"]


async def test_the_last_error_is_told():
    """When all fail, the client gets the last failure."""
    upstream = Upstream(a=Cause.TIMEOUT, b=Cause.MODEL_NOT_FOUND)
    assert (await failed(upstream, A, B)).cause is Cause.MODEL_NOT_FOUND


async def test_attempts_are_bounded():
    """`max_attempts` holds, the first included, however many targets there are."""
    upstream = Upstream(a=Cause.TIMEOUT, b=Cause.TIMEOUT, c=Cause.TIMEOUT)
    await failed(upstream, A, B, C, D)
    assert upstream.asked == ["a", "b", "c"]
    upstream.asked.clear()
    await failed(upstream, A, B, max_attempts=1)
    assert upstream.asked == ["a"]


async def test_on_says_which_causes():
    """`on` replaces the causes: a key refused by one upstream can be tried at another, a timeout not."""
    assert await ask(Upstream(a=Cause.AUTH), A, B, on=["auth"]) == "answer of b"
    await failed(Upstream(a=Cause.TIMEOUT), A, B, on=["auth"])


@pytest.mark.promise("P7.moderation")
@pytest.mark.parametrize("cause", [Cause.CONTENT_POLICY, Cause.CONTEXT_LENGTH])
async def test_a_rule_says_which_causes_for_its_requests(cause):
    """A refusal is tried at another model where the rule says so, and nowhere else."""
    plugin, upstream = made(), Upstream(a=cause)
    assert (
        await ask(upstream, plugin=plugin, asked=asking(A, B, fallback_on=frozenset({cause})), first=A) == "answer of b"
    )
    for on in (None, frozenset(), frozenset({Cause.TIMEOUT})):
        upstream.asked.clear()
        error = await failed(upstream, plugin=plugin, asked=asking(A, B, fallback_on=on), first=A)
        assert (error.cause, upstream.asked) == (cause, ["a"])


async def test_a_rule_can_forbid_any_fallback():
    """`on: []` of a rule: one attempt, whatever the plugin is set to."""
    upstream = Upstream(a=Cause.TIMEOUT)
    await failed(upstream, asked=asking(A, B, fallback_on=frozenset()), first=A)
    assert upstream.asked == ["a"]


async def test_a_refusal_of_the_gateway_is_no_failure_of_a_model():
    """A limit that refuses within an attempt (a plugin after this one) goes to the client as it is."""
    upstream = Upstream(a=RateLimited())
    with pytest.raises(RateLimited):
        await ask(upstream, A, B)
    assert upstream.asked == ["a"]


async def test_a_target_that_another_plugin_proposed_is_not_tried_twice():
    """A layer outside may begin with another target; then the others follow in their order."""
    upstream = Upstream(a=Cause.TIMEOUT, b=Cause.TIMEOUT)
    assert await ask(upstream, A, B, C, first=B) == "answer of c"
    assert upstream.asked == ["b", "a", "c"]


async def test_a_model_named_twice_is_tried_twice():
    """`[a, a, b]` is a retry without a wait."""
    upstream, plugin = Upstream(a=Cause.TIMEOUT), made()
    assert await ask(upstream, A, A, B, plugin=plugin) == "answer of b"
    assert (upstream.asked, plugin.clock.slept) == (["a", "a", "b"], [])


@pytest.mark.parametrize("cause", ["invalid_request", "abandoned", "client_disconnect", "circuit_open", "weather"])
def test_causes_that_no_other_attempt_can_mend_can_not_be_listed(cause):
    """What is wrong with a request itself, or was given up, never wanders to another model."""
    with pytest.raises(ValidationError):
        fallback.Config(on=[cause])


# --- the same target again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", [Cause.CONNECTION, Cause.RATE_LIMIT, Cause.SERVER_ERROR])
async def test_a_single_target_is_tried_again_after_a_wait(cause):
    """Where there is no other model, a short fault is waited out: half a second at most, drawn at random."""
    upstream, plugin = Upstream(a=[cause]), made(dice=0.4)
    assert await ask(upstream, A, plugin=plugin) == "answer of a"
    assert (upstream.asked, plugin.clock.slept) == (["a", "a"], [pytest.approx(0.2)])


async def test_it_is_tried_again_only_as_often_as_it_is_said():
    """`retries` holds for each target and cause; one that isn't listed is not tried again."""
    upstream = Upstream(a=Cause.SERVER_ERROR)
    await failed(upstream, A)
    assert upstream.asked == ["a", "a"]
    for config in ({"retries": {}}, {"retries": {"connection": 5}}, {"retries": {"server_error": 0}}):
        upstream.asked.clear()
        await failed(upstream, A, **config)
        assert upstream.asked == ["a"]
    upstream.asked.clear()
    await failed(upstream, A, retries={"server_error": 4}, max_attempts=10)
    assert upstream.asked == ["a"] * 5


async def test_waits_double_up_to_their_bound():
    """A target that goes on failing is asked ever more rarely."""
    plugin = made(dice=1.0, retries={"server_error": 6}, max_attempts=10, breaker=False)
    await failed(Upstream(a=Cause.SERVER_ERROR), A, plugin=plugin)
    assert plugin.clock.slept == pytest.approx([0.5, 1, 2, 4, 8, 10])


async def test_other_targets_come_first():
    """Another model is tried at once; only when all have failed, the one that is ready first is tried again."""
    upstream, plugin = Upstream(a=[Cause.SERVER_ERROR], b=Cause.MODEL_NOT_FOUND), made()
    assert await ask(upstream, A, B, plugin=plugin) == "answer of a"
    assert (upstream.asked, plugin.clock.slept) == (["a", "b", "a"], [0.25])


@pytest.mark.parametrize(
    ("asked", "slept"),
    [(2, [pytest.approx(2.1)]), (0, []), (10, [pytest.approx(10.5)]), (10.1, None), (86400, None)],
)
async def test_retry_after_is_obeyed(asked, slept):
    """The wait that the upstream asks for is kept, and a little more; too long a one is not waited for."""
    failure = UpstreamError(Cause.RATE_LIMIT, retry_after=asked)
    upstream, plugin = Upstream(a=[failure]), made()
    if slept is None:
        error = await failed(upstream, A, plugin=plugin)
        assert (error.retry_after, upstream.asked, plugin.clock.slept) == (asked, ["a"], [])
    else:
        assert await ask(upstream, A, plugin=plugin) == "answer of a"
        assert plugin.clock.slept == slept


@pytest.mark.parametrize(("left", "asked"), [(4.3, ["a", "a"]), (4.1, ["a"]), (0, ["a"]), (-1, ["a"])])
async def test_a_wait_leaves_half_of_the_time_for_the_attempt(left, asked):
    """A request isn't kept waiting for a try that has no time to succeed."""
    upstream, plugin = Upstream(a=UpstreamError(Cause.RATE_LIMIT, retry_after=2)), made()
    request = asking(A)
    request.deadline = plugin.clock.now + left
    await failed(upstream, asked=request, first=A, plugin=plugin)
    assert upstream.asked == asked


causes = st.sampled_from([Cause.CONNECTION, Cause.RATE_LIMIT, Cause.SERVER_ERROR, Cause.TIMEOUT, Cause.TRUNCATED])
failures = st.tuples(causes, st.none() | st.floats(0, 1e9), st.floats(0, 20))


@given(
    st.lists(failures, min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(1, 8),
    st.dictionaries(causes, st.integers(0, 4)),
    st.floats(0.001, 60),
    st.floats(0, 60),
    st.floats(0, 60),
    st.floats(0, 1),
)
def test_no_wait_passes_the_deadline_and_no_attempt_the_cap(fails, targets, cap, retries, backoff, most, left, dice):
    """Whatever fails how: attempts within the cap, waits within their bound and half of the time left, each target first."""
    policy = Policy(cap, retries, backoff, most, lambda: dice)
    entries = [Entry(Target(str(i), "u")) for i in range(targets)]
    plan = Plan(policy, entries, lambda *_: 0.0, lambda _: None)
    now, deadline, seen = T, T + left, []
    for cause, asked, took in fails:
        step = plan.next(now, deadline)
        if step is None:
            break
        assert 0 <= step.wait <= 1.1 * most
        assert step.wait == 0 or step.wait <= (deadline - now) / 2
        if len(set(seen)) < targets:
            assert (step.entry, step.wait) == (entries[len(seen)], 0)
        now += step.wait
        seen.append(step.entry.target.model)
        plan.failed(step.entry, UpstreamError(cause, retry_after=asked), cause, now)
        now += took
    assert len(seen) <= cap
    assert all(seen.count(name) <= 1 + max(retries.values(), default=0) for name in seen)


# --- what it may cost ------------------------------------------------------------------------------------------------


class Prices:
    def __init__(self, pico_usd):
        self.pico_usd = pico_usd

    def cost(self, upstream, model, usage):
        assert usage.source is Source.ESTIMATE
        return Cost(self.pico_usd)


@pytest.mark.parametrize(
    ("cause", "cost", "price", "asked"),
    [
        (Cause.TRUNCATED, 11 * 10**9, 0, ["a"]),  # known, 0.011 USD
        (Cause.TRUNCATED, 10 * 10**9, 0, ["a", "b"]),
        (Cause.TIMEOUT, None, 11 * 10**9, ["a"]),  # perhaps billed: estimated
        (Cause.TIMEOUT, None, 10**9, ["a", "b"]),
        (Cause.TIMEOUT, None, None, ["a"]),  # nobody knows
        (Cause.CONNECTION, None, 11 * 10**9, ["a", "b"]),  # not billed
    ],
)
async def test_failed_attempts_may_cost_only_so_much(cause, cost, price, asked):
    """Once failed attempts cost more than `max_extra_usd`, known or estimated, the client gets the failure."""
    plugin, upstream = made(max_extra_usd=0.01), Upstream()
    plugin._services = type("S", (), {"catalogue": Prices(price)})()
    request = asking(A, B)

    async def call_next(attempt):
        upstream.asked.append(attempt.target.model)
        if attempt.target is B:
            return "answer"
        request.attempts.append(AttemptRecord(attempt, 1, T, cause=cause, cost=Cost(cost)))
        raise UpstreamError(cause)

    request.snapshot.hooks = type("H", (), {"prepare_request": ()})()
    with contextlib.suppress(UpstreamError):
        assert await plugin.around_upstream(request, request.attempt(A), call_next) == "answer"
    assert upstream.asked == asked


# --- circuits --------------------------------------------------------------------------------------------------------

QUICK = {"requests": 4, "window": "10s", "open_for": "5s"}


async def opened(**config):
    """A plugin whose target a failed often just now."""
    plugin = made(breaker=QUICK, **config)
    for _ in range(4):
        await ask(Upstream(a=Cause.TIMEOUT), A, B, plugin=plugin)
    return plugin


async def test_a_target_that_keeps_failing_is_passed_over():
    """Its requests go to the next one at once; the exchange says so; after a while one request tries it again."""
    plugin, upstream = await opened(), Upstream()
    request = asking(A, B)
    assert await ask(upstream, asked=request, first=A, plugin=plugin) == "answer of b"
    assert (upstream.asked, request.skipped) == (["b"], [A])
    assert plugin.warnings() == ["openrouter/a: circuit open (timeout)"]
    plugin.clock.now += 5
    assert await ask(upstream, A, B, plugin=plugin) == "answer of a"
    assert plugin.warnings() == []
    assert await ask(upstream, A, B, plugin=plugin) == "answer of a"


async def test_a_probe_that_fails_still_falls_back():
    """Whoever's request is the probe gets an answer all the same, and others are not sent there."""
    plugin = await opened()
    plugin.clock.now += 5
    upstream = Upstream(a=Cause.TIMEOUT)
    assert await ask(upstream, A, B, plugin=plugin) == "answer of b"
    assert await ask(upstream, A, B, plugin=plugin) == "answer of b"
    assert upstream.asked == ["a", "b", "b"]


async def test_with_all_circuits_open_it_is_refused_at_once():
    """Where no target may be tried the client gets 503 and when to come back; nothing is sent upstream."""
    plugin, upstream = await opened(), Upstream()
    plugin.clock.now += 2
    error = await failed(upstream, A, plugin=plugin)
    assert (error.cause, error.status_code, error.error_code) == (Cause.CIRCUIT_OPEN, 503, "unavailable")
    assert (error.retry_after, upstream.asked) == (pytest.approx(3), [])


async def test_a_failure_that_opens_the_circuit_is_not_tried_again():
    """The attempt that opened it was the last: its own failure is told, not a wait for the probe."""
    plugin = made(breaker={**QUICK, "requests": 1}, retries={"server_error": 3}, max_wait="60s")
    upstream = Upstream(a=Cause.SERVER_ERROR)
    assert (await failed(upstream, A, plugin=plugin)).cause is Cause.SERVER_ERROR
    assert (upstream.asked, plugin.clock.slept) == (["a"], [])


async def test_a_429_with_retry_after_is_a_rest_for_all():
    """Others leave the target alone until then, a minute at most; 429 alone opens no circuit."""
    plugin = made(breaker=QUICK)
    for _ in range(8):
        await ask(Upstream(a=Cause.RATE_LIMIT), A, B, plugin=plugin)
    upstream = Upstream(a=[UpstreamError(Cause.RATE_LIMIT, retry_after=86400)])
    assert await ask(upstream, A, B, plugin=plugin) == "answer of b"
    assert await ask(upstream, A, B, plugin=plugin) == "answer of b"
    assert upstream.asked == ["a", "b", "b"]
    assert (await failed(upstream, A, plugin=plugin)).retry_after == 60
    plugin.clock.now += 60
    assert await ask(upstream, A, B, plugin=plugin) == "answer of a"


@pytest.mark.parametrize(
    ("cause", "counts"),
    [
        (None, (1, 0)), (Cause.INVALID_OUTPUT, (1, 0)), (Cause.CONNECTION, (0, 1)), (Cause.TLS, (0, 1)),
        (Cause.TIMEOUT, (0, 1)), (Cause.TRUNCATED, (0, 1)), (Cause.BAD_REPLY, (0, 1)), (Cause.SERVER_ERROR, (0, 1)),
        (Cause.AUTH, (0, 1)), (Cause.PAYMENT, (0, 1)), (Cause.RATE_LIMIT, (0, 0)), (Cause.MODEL_NOT_FOUND, (0, 0)),
        (Cause.INVALID_REQUEST, (0, 0)), (Cause.CONTENT_POLICY, (0, 0)), (Cause.CONTEXT_LENGTH, (0, 0)),
        (Cause.CLIENT_DISCONNECT, (0, 0)), (Cause.ABANDONED, (0, 0)),
    ],
)  # fmt: skip
def test_what_a_target_is_blamed_for(cause, counts):
    """Neither a wrong request, nor a moderated one, nor a client that leaves can open a circuit for others."""
    plugin = made()
    record = AttemptRecord(Attempt(A, b"", {}, Limits()), 1, T, cause=cause)
    plugin.attempt_finished(exchange(), record)
    assert plugin.breakers.find(A.name).counts(T) == counts


@pytest.mark.parametrize("body", [{"provider": {"only": ["busy"]}}, {"preset": "mine"}])
async def test_who_narrows_the_choice_closes_a_model_for_nobody(body):
    """What fails or is busy at the provider that one client insists on says nothing of the model: nobody else waits."""
    plugin, narrow = made(breaker=QUICK), asking(A, B)
    narrow.body.update(body)
    busy = UpstreamError(Cause.RATE_LIMIT, retry_after=60)
    for failure in (busy, *[Cause.SERVER_ERROR] * 8):
        upstream = Upstream(a=failure)
        assert await ask(upstream, first=A, plugin=plugin, asked=narrow) == "answer of b"
        assert upstream.asked == ["a", "b"]
    assert await ask(Upstream(), A, B, plugin=plugin) == "answer of a"


async def test_a_narrowed_probe_neither_fails_nor_holds_up_the_next():
    """A probe that a client sent to a provider of its own tells nothing: the next request may probe at once."""
    plugin, narrow = await opened(), asking(A, B)
    narrow.body["provider"] = {"only": ["busy"]}
    plugin.clock.now += 5
    assert await ask(Upstream(a=Cause.RATE_LIMIT), first=A, plugin=plugin, asked=narrow) == "answer of b"
    assert await ask(Upstream(), A, B, plugin=plugin) == "answer of a"


async def test_without_a_breaker_nothing_is_remembered():
    """`breaker: false`: each request begins with the first target."""
    plugin, upstream = made(breaker=False), Upstream(a=Cause.TIMEOUT)
    for _ in range(30):
        await ask(upstream, A, B, plugin=plugin)
    assert upstream.asked == ["a", "b"] * 30
    assert (plugin.warnings(), (await plugin.targets(exchange())).data["data"]) == ([], [])


async def test_targets_are_shown_to_administrators():
    """Each target's state, what was counted, since when it is open and when it is tried again."""
    plugin = await opened()
    shown = (await plugin.targets(exchange())).data["data"]
    assert [(t["target"], t["state"], t["failed"], t["last_cause"]) for t in shown] == [
        ("openrouter/a", "open", 4, "timeout"), ("openrouter/b", "closed", 0, None),
    ]  # fmt: skip
    assert (shown[0]["next_attempt_in"], shown[0]["opened"], shown[1]["succeeded"]) == (5, 1, 4)
    assert math.isclose(shown[0]["opened_at"], time.time(), abs_tol=5)


# --- metrics ---------------------------------------------------------------------------------------------------------


async def counted(plugin, name):
    """{label values: value}"""
    [family] = [family for family in await plugin._services.metrics.read() if family.name == name]
    return {series.labels: series.value for series in family.series}


async def test_metrics_tell_each_circuits_state_and_changes():
    """Open, half-open, closed again and resting, by upstream and model; each change is counted once."""
    plugin = await opened()
    metrics = plugin._services.metrics
    metrics.follow(lambda *_: None, ["openrouter/a", "openrouter/b"])
    plugin._changes._series.clear()  # nothing was named yet when the circuit opened
    async with plugin.lifespan():
        assert await counted(plugin, "xenios_breaker_state") == {("openrouter", "a"): 3, ("openrouter", "b"): 0}
        plugin.clock.now += 5
        assert (await counted(plugin, "xenios_breaker_state"))["openrouter", "a"] == 2
        await ask(Upstream(a=Cause.TIMEOUT), A, B, plugin=plugin)
        plugin.clock.now += 5
        assert await ask(Upstream(), A, B, plugin=plugin) == "answer of a"
        assert (await counted(plugin, "xenios_breaker_state"))["openrouter", "a"] == 0
        await ask(Upstream(b=UpstreamError(Cause.RATE_LIMIT, retry_after=9)), B, A, plugin=plugin)
        assert await counted(plugin, "xenios_breaker_state") == {("openrouter", "a"): 0, ("openrouter", "b"): 1}
        for _ in range(4):
            await ask(Upstream(a=Cause.TIMEOUT), A, B, C, plugin=plugin)
    assert await counted(plugin, "xenios_breaker_changes_total") == {
        ("openrouter", "a", "probed"): 2, ("openrouter", "a", "probe_failed"): 1, ("openrouter", "a", "closed"): 1,
        ("openrouter", "a", "opened"): 1, ("openrouter", "b", "rests"): 1,
    }  # fmt: skip
    assert await counted(plugin, "xenios_breaker_state") == {}


async def test_invented_models_have_no_state_of_their_own():
    """Models that clients made up, and targets that only other gateways know, are one `other`: the worst of them."""
    plugin = made(breaker=QUICK)
    invented = [Target(f"invented-{n}", "openrouter") for n in range(50)]
    for target in invented:
        await ask(Upstream(), target, plugin=plugin)
    plugin.breakers.of("elsewhere/a", T).open(T, T + 100)
    async with plugin.lifespan():
        assert await counted(plugin, "xenios_breaker_state") == {("other", "other"): 3}
        for _ in range(4):
            await ask(Upstream(**{"invented-7": Cause.TIMEOUT}), invented[7], A, plugin=plugin)
        plugin.clock.now += 5
        await ask(
            Upstream(**{"invented-9": [UpstreamError(Cause.RATE_LIMIT, retry_after=9)]}), invented[9], A, plugin=plugin
        )
        plugin.breakers.find("elsewhere/a").close()
        assert await counted(plugin, "xenios_breaker_state") == {("openrouter", "other"): 2}


async def test_names_are_not_kept_for_a_redis_that_is_away():
    """While Redis is away, what is to be told to it is bounded as circuits are, however many models clients make up."""

    class Away:
        async def script(self, *_):
            raise StoreUnavailable

    clock = Clock()
    breakers = Breakers(BreakerPolicy(), lambda breaker, _: told.note(breaker))
    told = Shared(replace(services(), redis=Away()), breakers, clock)
    for n in range(3 * MOST):
        clock.now += 1
        breakers.of(f"openrouter/invented-{n}", clock.now).rest(clock.now + 60, "rate_limit")
        if n % 100 == 99:
            with pytest.raises(StoreUnavailable):
                await told.sync()
    assert len(told._changed) <= MOST


# --- explain ---------------------------------------------------------------------------------------------------------


async def test_explain_names_the_order():
    """Which targets would be tried in which order, which is passed over and why, and after which causes."""
    plugin = await opened(on=["timeout", "tls"], max_attempts=2)
    *about, rest = await plugin.explain(asking(B, A, C, D))
    assert [(f.target, f.text, f.data["circuit"]) for f in about] == [
        (B, "attempt 1, circuit closed", "closed"),
        (A, "passed over, circuit open (timeout), again in 5 s", "open"),
        (C, "attempt 2, circuit closed", "closed"),
        (D, "not tried, attempts at most: 2", "closed"),
    ]
    assert (rest.text, rest.order) == ("another attempt on timeout, tls; 2 at most", [B, C])
    _, rest, refusal = await plugin.explain(asking(A))
    assert (rest.order, refusal.refuses.status_code, refusal.refuses.error_code) == ([], 503, "unavailable")
    assert (await plugin.explain(asking(B, fallback_on=frozenset())))[
        -1
    ].text == "another attempt on no cause; 1 at most"
    plugin.clock.now += 5
    assert (await plugin.explain(asking(A)))[0].text == "attempt 1, circuit half_open"
    assert await ask(Upstream(), A, plugin=plugin) == "answer of a"  # explaining took no probe


def test_a_mistake_within_a_circuit_breaker_is_one():
    """`breaker` may be false or a mapping: a mapping with a mistake is not also told that it is not false."""
    text = "upstreams: {openrouter: {api_key: x}}\nplugins: [{use: fallback, config: {breaker: {window: 0}}}]\n"
    _, found = load_text(text, env={}).source.validate(fallback.Config, ("plugins", 0, "config"))
    assert [(p.path, p.message) for p in found] == [
        ("plugins[0].config.breaker.window", "must be greater than 0, not 0")
    ]
