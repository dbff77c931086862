"""One target's circuit, and the breakers of all. Time is passed in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.kit import BreakerPolicy, Breakers
from gateway.kit.breaker import MOST, Breaker

POLICY = BreakerPolicy(window=10, failures=0.5, requests=4, open_for=5)
T = 1000.0  # when tests begin


def seconds(most):
    """Eighths, so that sums are exact and a difference is what it should be to the last bit."""
    return st.integers(0, 8 * most).map(lambda eighths: eighths / 8)


@pytest.fixture
def changes():
    return []


@pytest.fixture
def circuit(changes):
    return Breaker("openrouter/a", POLICY, lambda _, change: changes.append(change))


def fail(circuit, times, at=T):
    for _ in range(times):
        circuit.failed(at, at, "timeout")


def test_it_opens_once_the_share_is_reached(circuit, changes):
    """Half of at least four attempts failed: nothing passes any more."""
    circuit.succeeded(T, T)
    circuit.succeeded(T, T)
    fail(circuit, 1)
    assert (circuit.state(T), circuit.allow(T)) == ("closed", True)
    fail(circuit, 1)
    assert (circuit.state(T), circuit.allow(T), circuit.wait(T)) == ("open", False, 5)
    assert (changes, circuit.cause, circuit.opened) == (["opened"], "timeout", 1)


def test_a_few_failures_open_nothing(circuit):
    """Fewer attempts than `requests` say nothing, and a good majority keeps it closed."""
    fail(circuit, 3)
    assert circuit.allow(T)
    for _ in range(10):
        circuit.succeeded(T, T)
    fail(circuit, 6)
    assert circuit.state(T) == "closed"
    assert circuit.counts(T) == (10, 9)


def test_what_is_older_than_the_window_is_forgotten(circuit):
    """Failures of long ago don't add up with those of now."""
    fail(circuit, 3, T)
    fail(circuit, 3, T + 10.1)
    assert circuit.state(T + 10.1) == "closed"
    fail(circuit, 1, T + 19)
    assert circuit.state(T + 19) == "open"


def test_one_probe_at_a_time(circuit, changes):
    """When `open_for` is over one attempt passes; the next one only after as long again."""
    fail(circuit, 4)
    assert not circuit.allow(T + 4.9)
    assert circuit.state(T + 5) == "half_open"
    assert circuit.allow(T + 5)
    assert not circuit.allow(T + 5)
    assert not circuit.allow(T + 9.9)
    assert circuit.allow(T + 10)  # the first probe is still under way: a long answer, or lost
    assert changes == ["opened", "probed", "probed"]


def test_a_good_probe_closes_it(circuit, changes):
    """After it all is as at first: what failed before counts no more."""
    fail(circuit, 4)
    assert circuit.allow(T + 5)
    circuit.succeeded(T + 6, T + 5)
    assert (circuit.state(T + 6), circuit.allow(T + 6), circuit.counts(T + 6)) == ("closed", True, (0, 0))
    assert changes == ["opened", "probed", "closed"]


def test_a_bad_probe_keeps_it_open(circuit, changes):
    """The next probe is due as long after it."""
    fail(circuit, 4)
    assert circuit.allow(T + 5)
    circuit.failed(T + 7, T + 5, "server_error")
    assert (circuit.allow(T + 11.9), circuit.allow(T + 12)) == (False, True)
    assert (changes[-2], circuit.cause) == ("probe_failed", "server_error")


def test_a_probe_that_tells_nothing_is_made_again_at_once(circuit):
    """The client left, or its request was wrong: the next request may probe."""
    fail(circuit, 4)
    assert circuit.allow(T + 5)
    circuit.told_nothing(T + 6, T + 5)
    assert circuit.allow(T + 6)


@pytest.mark.parametrize("meanwhile", [None, "bad", "nothing"])
def test_a_probe_closes_it_however_long_its_answer_takes(circuit, meanwhile):
    """Probes that were let through while it was under way, and what became of them, take nothing from its word."""
    fail(circuit, 4)
    assert circuit.allow(T + 5)
    assert circuit.allow(T + 10)
    if meanwhile == "bad":
        circuit.failed(T + 11, T + 10, "timeout")
    elif meanwhile == "nothing":
        circuit.told_nothing(T + 11, T + 10)
    circuit.succeeded(T + 12, T + 5)
    assert circuit.state(T + 12) == "closed"


def test_a_probe_of_an_earlier_opening_says_nothing_of_this_one(circuit):
    """It was closed and opened again since: only what is let through from now on counts."""
    fail(circuit, 4)
    assert circuit.allow(T + 5)
    assert circuit.allow(T + 10)
    circuit.succeeded(T + 11, T + 10)
    fail(circuit, 4, T + 12)
    circuit.succeeded(T + 13, T + 5)
    assert circuit.state(T + 13) == "open"
    assert circuit.allow(T + 17)
    circuit.succeeded(T + 18, T + 5)
    assert circuit.state(T + 18) == "half_open"


def test_attempts_from_before_it_opened_are_no_probes(circuit):
    """What was under way when it opened neither closes it nor puts the probe off."""
    fail(circuit, 4)
    circuit.succeeded(T + 1, T - 1)
    circuit.failed(T + 2, T - 1, "timeout")
    assert circuit.wait(T + 2) == 3
    assert circuit.allow(T + 5)
    circuit.succeeded(T + 6, T - 1)
    circuit.failed(T + 6, T - 1, "timeout")
    circuit.told_nothing(T + 6, T - 1)
    assert (circuit.state(T + 6), circuit.allow(T + 6)) == ("half_open", False)


def test_a_rest_ends_by_itself(circuit, changes):
    """A target that says when to come back is left alone until then, and needs no probe."""
    circuit.rest(T + 3, "rate_limit")
    circuit.rest(T + 2, "rate_limit")  # a shorter one changes nothing
    assert (circuit.state(T), circuit.allow(T), circuit.wait(T)) == ("resting", False, 3)
    assert (circuit.state(T + 3), circuit.allow(T + 3), circuit.allow(T + 3)) == ("closed", True, True)
    assert changes == ["rests"]


events = st.lists(
    st.tuples(seconds(4), st.sampled_from(["ask", "good", "bad", "nothing", "rest"]), st.integers(0, 3)),
    max_size=80,
)


@given(events)
def test_whatever_happens_probes_are_bounded_and_it_recovers(events):
    """In any order of answers: no attempt while it rests or is open, but one per `open_for`; a good probe closes it."""
    circuit = Breaker("a", POLICY, lambda *_: None)
    now, running, last_probe = T, [], None
    for passed, what, which in events:
        now += passed
        if what == "ask":
            waiting, was_open = circuit.wait(now), circuit.opened_at is not None
            assert circuit.allow(now) == (waiting == 0)
            if waiting == 0:
                running.append(now)
                if was_open:
                    assert last_probe is None or now - last_probe >= POLICY.open_for
                    last_probe = now
        elif what == "rest":
            circuit.rest(now + 1, "rate_limit")
            assert not circuit.allow(now)
        elif running:
            began = running.pop(which % len(running))
            is_probe = circuit.first_probe_at is not None and began >= circuit.first_probe_at
            if what == "good":
                circuit.succeeded(now, began)
            elif what == "bad":
                circuit.failed(now, began, "timeout")
            else:
                circuit.told_nothing(now, began)
            if is_probe and what == "good":
                assert circuit.opened_at is None
            if is_probe and what == "nothing":
                last_probe = None
        if circuit.opened_at is None:
            last_probe = None
        assert circuit.wait(now) <= POLICY.open_for
    later = now + 2 * POLICY.open_for
    assert circuit.allow(later)
    circuit.succeeded(later, later)
    assert circuit.state(later) == "closed"


@given(st.lists(st.tuples(seconds(3), st.booleans()), max_size=60))
def test_it_is_open_exactly_if_the_window_said_so(attempts):
    """Against a model that keeps every attempt: the rolling window is right to a tenth of its length."""
    circuit = Breaker("a", POLICY, lambda *_: None)
    now, kept = T, []
    for passed, good in attempts:
        now += passed
        current = int(now)  # slices of a second
        kept = [(s, g) for s, g in kept if s > current - 10]
        kept.append((current, good))
        circuit.succeeded(now, now) if good else circuit.failed(now, now, "timeout")
        bad = sum(not g for _, g in kept)
        if not good and len(kept) >= 4 and bad >= 0.5 * len(kept):
            assert circuit.state(now) == "open"
            return
        assert circuit.counts(now) == (len(kept) - bad, bad)
        assert circuit.state(now) == "closed"


def test_the_number_of_breakers_is_bounded():
    """A million invented models don't fill the memory: those with nothing to tell make room, else none is added."""
    breakers = Breakers(POLICY)
    for i in range(MOST):
        breakers.of(str(i), T).succeeded(T, T)
    assert breakers.of("one more", T) is not None
    assert breakers.find("0") is None
    for i in range(MOST):
        made = breakers.of(f"bad-{i}", T)
        if made is not None:
            made.failed(T, T, "timeout")
    assert breakers.of("too many", T) is None
    assert len(list(breakers)) == MOST
    assert breakers.of("bad-1", T) is breakers.find("bad-1")
    assert breakers.of("later", T + 100) is not None
    assert len(list(breakers)) == 1
