import pytest
from plugin_objects import exchange, services
from pydantic import ValidationError

from gateway import Cause, Decision, RateLimited, Target, UpstreamError
from gateway_plugins import fallback

A, B, C, D = (Target(name, "openrouter") for name in "abcd")


class Upstream:
    """Answers or fails by model; remembers what was asked of it."""

    def __init__(self, **failures):
        self.failures = failures
        self.asked = []

    async def __call__(self, attempt):
        self.asked.append(attempt.target.model)
        failure = self.failures.get(attempt.target.model)
        if failure is not None:
            raise failure if isinstance(failure, Exception) else UpstreamError(failure)
        return f"answer of {attempt.target.model}"


async def ask(upstream, *targets, first=None, **config):
    plugin = fallback.Plugin(fallback.Config(**config), services())
    asked = exchange()
    asked.decision = Decision("asked", targets)
    return await plugin.around_upstream(asked, asked.attempt(first or targets[0]), upstream)


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
    """When a model's upstream is away, slow, busy or broken, or has no such model, the next one answers."""
    upstream = Upstream(a=cause, b=cause)
    assert await ask(upstream, A, B, C) == "answer of c"
    assert upstream.asked == ["a", "b", "c"]


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
    with pytest.raises(UpstreamError) as caught:
        await ask(upstream, A, B)
    assert caught.value.cause is cause
    assert upstream.asked == ["a"]


async def test_the_last_error_is_told():
    """When all fail, the client gets the last failure."""
    upstream = Upstream(a=Cause.TIMEOUT, b=Cause.RATE_LIMIT)
    with pytest.raises(UpstreamError) as caught:
        await ask(upstream, A, B)
    assert caught.value.cause is Cause.RATE_LIMIT


async def test_attempts_are_bounded():
    """`max_attempts` holds, the first included, however many targets there are."""
    upstream = Upstream(a=Cause.TIMEOUT, b=Cause.TIMEOUT, c=Cause.TIMEOUT)
    with pytest.raises(UpstreamError):
        await ask(upstream, A, B, C, D)
    assert upstream.asked == ["a", "b", "c"]
    upstream.asked.clear()
    with pytest.raises(UpstreamError):
        await ask(upstream, A, B, max_attempts=1)
    assert upstream.asked == ["a"]


async def test_on_says_which_causes():
    """`on` replaces the causes: a key refused by one upstream can be tried at another, a timeout not."""
    assert await ask(Upstream(a=Cause.AUTH), A, B, on=["auth"]) == "answer of b"
    with pytest.raises(UpstreamError):
        await ask(Upstream(a=Cause.TIMEOUT), A, B, on=["auth"])


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
    """`[a, a, b]` is a retry."""
    upstream = Upstream(a=Cause.TIMEOUT)
    assert await ask(upstream, A, A, B) == "answer of b"
    assert upstream.asked == ["a", "a", "b"]


@pytest.mark.parametrize("cause", ["content_policy", "context_length", "invalid_request", "abandoned", "weather"])
def test_refusals_can_not_be_listed(cause):
    """A moderation refusal never wanders to another model by this plugin's settings."""
    with pytest.raises(ValidationError):
        fallback.Config(on=[cause])


async def test_explain_names_the_order():
    plugin = fallback.Plugin(fallback.Config(on=["timeout", "tls"], max_attempts=2), services())
    asked = exchange()
    [alone] = await plugin.explain(asked)
    assert (alone.text, alone.order) == ("no fallback: there is one target, or one attempt is allowed", ())
    asked.decision = Decision("x", (A, B, C))
    [told] = await plugin.explain(asked)
    assert (told.text, told.order) == ("a, then b; on timeout, tls", (A, B))
