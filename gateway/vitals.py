"""What a worker tells of itself: which build and configuration it is, and what it takes of the machine."""

from __future__ import annotations

import platform
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gateway._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.metrics import Metrics

_PAGE = resource.getpagesize()


class Lag:
    """How late the event loop was at worst in the last seconds: what everybody asks about, not what somebody asked."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._since = self._worst = self._before = 0.0

    def note(self, now: float, late: float) -> None:
        if now - self._since > self.SECONDS:
            self._since, self._before, self._worst = now, self._worst, 0.0
        self._worst = max(self._worst, late)

    @property
    def worst(self) -> float:
        return max(self._worst, self._before)


def count(metrics: Metrics, config: Callable[[], str], live: Callable[[], int], lag: Lag) -> None:
    """`config`: the hash in force; `live`: requests that are being answered."""
    about = metrics.gauge("xenios_build_info", "1; which Xenios on which Python.", ("version", "python"), merge="max")
    about.set(1, __version__, platform.python_version())
    started = metrics.gauge("xenios_worker_started_timestamp_seconds", "When it started, in Unix time.", merge="worker")
    started.set(time.time())
    in_force = metrics.gauge("xenios_config_info", "1; the hash of the configuration in force.", ("hash",), merge="max")
    workers = metrics.gauge("xenios_workers", "Workers that serve.")
    in_flight = metrics.gauge("xenios_requests_in_flight", "Requests that are being answered.")
    memory = metrics.gauge("xenios_worker_resident_memory_bytes", "Memory that it holds.", merge="worker")
    files = metrics.gauge("xenios_worker_open_fds", "Open files and sockets.", merge="worker")
    late = metrics.gauge(
        "xenios_event_loop_lag_seconds", "How late its event loop was at worst in the last seconds.", merge="worker"
    )
    cpu = metrics.counter("xenios_worker_cpu_seconds_total", "Processor time that it took.", ("worker",))
    taken = [0.0]

    def look() -> None:
        in_force.replace({(config(),): 1})
        workers.set(1)
        in_flight.set(live())
        memory.set(_resident())
        files.set(_open_files())
        late.set(lag.worst)
        now = time.process_time()
        cpu.add(now - taken[0], metrics.worker)
        taken[0] = now

    metrics.before_export(look)


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):  # not Linux: its highest, in kilobytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _open_files() -> int:
    try:
        return sum(1 for _ in Path("/dev/fd").iterdir())
    except OSError:
        return 0
