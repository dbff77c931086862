"""What is told of a store: how long it takes, how often it fails, whether it is there."""

from __future__ import annotations

from gateway.metrics import Metrics
from gateway.timing import BOUNDS


class StoreCounts:
    """Of one store in this process. Who has no metrics to count in counts for nobody."""

    def __init__(self, store: str, metrics: Metrics | None = None) -> None:
        metrics = metrics or Metrics()
        self._store = store
        seconds = metrics.histogram("xenios_store_seconds", "Time of a call or transaction.", ("store",), BOUNDS)
        errors = metrics.counter("xenios_store_errors_total", "Calls that it failed or left waiting.", ("store",))
        self._up = metrics.gauge("xenios_store_up", "1: it is there; 0: its breaker is open.", ("store",), merge="min")
        self.seconds = seconds.of(store)
        self.errors = errors.of(store)

    def tell(self, *, up: bool) -> None:
        self._up.set(int(up), self._store)
