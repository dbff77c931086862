"""What a worker tells of itself: which build and configuration it is, and what it takes of the machine."""

from __future__ import annotations

import platform
import resource
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gateway._version import __version__

if TYPE_CHECKING:
    from gateway.metrics import Metrics
    from gateway.reload import Reloading
    from gateway.server import Server
    from gateway.snapshot import Snapshot

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


class Counted(Protocol):
    """A worker, as far as it is told of."""

    @property
    def snapshot(self) -> Snapshot: ...
    @property
    def server(self) -> Server: ...
    @property
    def serves(self) -> bool: ...
    @property
    def simulated(self) -> bool: ...
    @property
    def reloader(self) -> Reloading | None: ...


def count(metrics: Metrics, worker: Counted, lag: Lag) -> None:
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
    loaded = metrics.gauge(
        "xenios_config_loaded_timestamp_seconds", "When the configuration was put in force, in Unix time.", merge="max"
    )
    updated = metrics.gauge(
        "xenios_catalogue_updated_timestamp_seconds",
        "How old the list of models is that is oldest: when it was fetched, in Unix time.",
        merge="max",
    )
    simulated = metrics.gauge("xenios_simulated", "1: an upstream is simulated, since it has no key.", merge="max")
    reloads = metrics.counter("xenios_reloads_total", "Reloads of the configuration.", ("result",))
    done, refused = reloads.of("done"), reloads.of("refused")
    # Who drops counts; none yet is told too, so that the first is seen.
    metrics.dropped("corrections")  # counts from zero on: of a first one without a zero before it nobody would see
    taken = [0.0]

    def look() -> None:
        snapshot, reloader = worker.snapshot, worker.reloader
        if worker.serves:
            in_force.replace({(snapshot.hash,): 1})
            loaded.set(_unix(snapshot.since))
        if (listed := _oldest_list(snapshot)) is not None:
            updated.set(listed)
        simulated.set(int(worker.simulated))
        if reloader is not None and metrics.worker == "1":  # all workers know of all reloads: the first one tells
            done.value, refused.value = reloader.done, reloader.refused
        if snapshot.services.redis is not None:
            snapshot.services.redis.tell()
        snapshot.services.database.tell()
        if worker.serves:
            workers.set(1)
            in_flight.set(worker.server.live)
        memory.set(_resident())
        files.set(_open_files())
        late.set(lag.worst)
        now = time.process_time()
        cpu.add(now - taken[0], metrics.worker)
        taken[0] = now

    metrics.before_export(look)


def _oldest_list(snapshot: Snapshot) -> float | None:
    told = [status["as_of"] for status in snapshot.services.catalogue.status().values()]
    return min((_unix(as_of) for as_of in told if as_of), default=None)


def _unix(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # of a list that somebody else left in the cache
        return 0.0


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
