"""How long plugins take, as plain values."""

from types import SimpleNamespace

import structlog

from gateway.metrics import Metrics
from gateway.timing import QUIET_SECONDS, PluginCounts, SlowCalls, summed


def test_pieces_of_one_hook_are_added_up():
    """A hook that has several pieces in a request counts once, with all its time."""
    timings = [("a", "x", 1.0, 2.0), ("b", "x", 2.0, 2.5), ("a", "x", 5.0, 5.25)]
    assert summed(timings) == {("a", "x"): 1.25, ("b", "x"): 0.5}


def test_many_slow_calls_are_few_lines():
    """A thousand requests that hang in one plugin make a line in ten seconds, which says how many they are."""
    counts = PluginCounts(Metrics())
    calls, exchange = SlowCalls(), SimpleNamespace(request_id="req_1", snapshot=SimpleNamespace(plugin_counts=counts))
    with structlog.testing.capture_logs() as lines:
        assert not calls.seen(exchange, ("a", "x"), 0.0, 0.5)
        for _ in range(1000):
            assert calls.seen(exchange, ("a", "x"), 0.0, 1.0)
        assert calls.seen(exchange, ("b", "x"), 0.0, 1.0)
        assert calls.seen(exchange, ("a", "x"), 0.0, 1.0 + QUIET_SECONDS)
    assert [(line["plugin"], line["calls"]) for line in lines] == [("a", 1), ("b", 1), ("a", 1000)]
    assert counts.slow.of("a", "x").value == 1001
