"""What a worker tells of itself."""

from gateway.vitals import Lag


def test_the_lag_is_the_worst_of_the_last_seconds():
    """A short stall is told for five to ten seconds, to whoever asks, however often; then it is over."""
    lag = Lag()
    lag.note(100.0, 0.001)
    lag.note(101.0, 0.8)
    lag.note(102.0, 0.002)
    assert lag.worst == lag.worst == 0.8
    lag.note(105.5, 0.003)
    assert lag.worst == 0.8
    lag.note(111.0, 0.004)
    assert lag.worst == 0.004
