"""Counts and times: plain numbers while requests run, read once a second and whenever somebody asks.

Instruments come from `services.metrics`, by name: who asks twice gets the same one, also after a reload. Nothing here
knows Prometheus; a plugin shows the numbers. With several workers each keeps its own in a file, and whoever is asked
adds them up. A worker writes before it tells, so what was told once never goes down; one that starts anew goes on from
the numbers of the one that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, cast

import msgspec

from gateway.errors import StoreUnavailable
from gateway.logs import get_logger
from gateway.metric_files import BEFORE
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from pathlib import Path

log = get_logger("gateway.metrics")

Kind = Literal["counter", "gauge", "histogram"]
Merge = Literal["sum", "max", "min", "worker"]
Labels = tuple[str, ...]

# GenAI's conventions double from 10 ms; a call may take ten minutes.
SECONDS = (*(0.01 * 2**n for n in range(16)), 600.0)
OTHER = "other"
MOST_SERIES = 2000  # of one metric in one process: what is new then counts as `other`
MOST_MODELS = 100  # that no configuration names and somebody asked for
WRITE_SECONDS = 1.0
STALE = 5.0  # seconds: of a process that has not written for so long only what it counted is told


class Cell:
    """One series of a counter or gauge. `value` is there to be added to."""

    __slots__ = ("value",)

    def __init__(self, value: float = 0) -> None:
        self.value = value


class Spread:
    """One series of a histogram: how many were at most as large as each bound, the rest, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float], counts: Sequence[int] = (), total: float = 0.0) -> None:
        self.bounds = bounds
        self.counts = list(counts) or [0] * (len(bounds) + 1)
        self.total = total

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Series(msgspec.Struct, array_like=True):
    """As it is told: label values, the value or sum, and of a histogram the number in each bucket."""

    labels: Labels
    value: float
    counts: list[int] = []

    def under(self, labels: Labels) -> Series:
        return Series(labels, self.value, self.counts)

    def minus(self, before: Series | None) -> Series:
        """What came since; all of it if it did not go on from there."""
        if before is None or before.value > self.value or len(before.counts) != len(self.counts):
            return self
        counts = [a - b for a, b in zip(self.counts, before.counts, strict=True)]
        return Series(self.labels, self.value - before.value, counts)

    def plus(self, other: Series) -> Series:
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Series(self.labels, self.value + other.value, counts)


class Family(msgspec.Struct):
    """A metric with its series, as it is told."""

    name: str
    kind: Kind
    help: str
    labels: Labels
    merge: Merge
    bounds: list[float]
    series: list[Series]


class _Dump(msgspec.Struct):
    """What a worker's file holds."""

    worker: str
    at: float
    families: list[Family]


_Made = TypeVar("_Made", Cell, Spread)


class _Metric(ABC, Generic[_Made]):
    kind: Kind

    def __init__(self, name: str, about: str, labels: Labels, merge: Merge, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = about
        self.labels = labels
        self.merge = merge
        self.bounds = tuple(bounds)
        self._series: dict[Labels, _Made] = {}

    @abstractmethod
    def _new(self, series: Series | None = None) -> _Made:
        """One series, empty or as it was told."""

    def of(self, *values: str) -> _Made:
        """The series with these label values, to be kept by whoever needs it often."""
        found = self._series.get(values)
        if found is None:
            if len(values) != len(self.labels):
                raise ValueError(f"{self.name} has the labels {self.labels}, not {len(values)}.")
            if len(self._series) >= MOST_SERIES:
                values = (OTHER,) * len(values)
                found = self._series.get(values)
            if found is None:
                found = self._series[values] = self._new()
        return found

    def family(self) -> Family:
        series = [self._told(labels, made) for labels, made in self._series.items()]
        return Family(self.name, self.kind, self.help, self.labels, self.merge, list(self.bounds), series)

    @abstractmethod
    def _told(self, labels: Labels, made: _Made) -> Series:
        """One series, as it is now."""

    def go_on_from(self, family: Family) -> None:
        """From what a process counted that is no more."""
        if (family.kind, family.labels, tuple(family.bounds)) == (self.kind, self.labels, self.bounds):
            self._series = {series.labels: self._new(series) for series in family.series}


class _Single(_Metric[Cell]):
    def _new(self, series: Series | None = None) -> Cell:
        return Cell(series.value if series else 0)

    def _told(self, labels: Labels, made: Cell) -> Series:
        return Series(labels, made.value)


class Counter(_Single):
    """Only grows."""

    kind = "counter"

    def add(self, amount: float, *labels: str) -> None:
        self.of(*labels).value += amount


class Gauge(_Single):
    """Goes up and down. `merge`: what one number for all workers is; `worker`: one each, under that label."""

    kind = "gauge"

    def __init__(self, name: str, about: str, labels: Labels, merge: Merge, bounds: Sequence[float]) -> None:
        super().__init__(name, about, labels, merge, bounds)
        self._sources: dict[object, Callable[[], Mapping[Labels, float]]] = {}

    def read_from(self, source: Callable[[], Mapping[Labels, float]]) -> Callable[[], None]:
        """Before numbers are told its series are what `source()` says, or what several say together, by `merge`: two
        instances of a plugin, or the old and the new one of a reload, don't know of each other.

        Returns what ends that.
        """
        key = object()
        self._sources[key] = source

        def end() -> None:
            if self._sources.pop(key, None) is not None and not self._sources:
                self._series.clear()

        return end

    def read(self) -> None:
        """Ask the sources, if there are any."""
        if not self._sources:
            return
        found: dict[Labels, float] = {}
        for source in list(self._sources.values()):
            try:
                for labels, value in source().items():
                    found[labels] = _joined(found[labels], value, self.merge) if labels in found else value
            except Exception:
                log.exception("metrics_reading_failed", metric=self.name)
        self.replace(found)

    def close(self) -> None:
        """It has no series any more, and asks nobody."""
        self._sources.clear()
        self._series.clear()

    def set(self, value: float, *labels: str) -> None:
        self.of(*labels).value = value

    def replace(self, values: Mapping[Labels, float]) -> None:
        """All series of this process."""
        self._series.clear()
        for labels, value in values.items():
            self.of(*labels).value = value


class Histogram(_Metric[Spread]):
    """How often something took how long, or was how large."""

    kind = "histogram"

    def observe(self, value: float, *labels: str) -> None:
        self.of(*labels).observe(value)

    def _new(self, series: Series | None = None) -> Spread:
        return Spread(self.bounds, series.counts, series.value) if series else Spread(self.bounds)

    def _told(self, labels: Labels, made: Spread) -> Series:
        return Series(labels, made.total, list(made.counts))


_AnyMetric = TypeVar("_AnyMetric", Counter, Gauge, Histogram)


class Metrics:
    """The instruments of one process, and with a `folder` those of its siblings, to be read."""

    def __init__(self, folder: Path | None = None, number: int = 1, *, alone: bool = False) -> None:
        """`folder`: where processes keep their numbers; `number`: of this one. `alone`: nobody else tells of this one's
        numbers, so that they need not be written.
        """
        self.worker = str(number)
        self._folder = folder
        self._alone = alone or folder is None
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._before: dict[object, Callable[[], None]] = {}
        self._left = {family.name: family for family in self._of_the_dead()}
        self._before_us: dict[str, _Dump] | None = None
        self._tasks = Tasks()
        self._writing = asyncio.Lock()
        self._known: Callable[[str, str], str | None] = lambda _upstream, _model: None
        self._named: frozenset[str] = frozenset()
        self._models: dict[tuple[str, str], str] = {}
        self._others: set[str] = set()

    # --- for whoever counts ------------------------------------------------------------------------------------------

    def counter(self, name: str, about: str, labels: Labels = ()) -> Counter:
        """Get or create. `name` ends in `_total`. Raises ValueError where another one has that name."""
        return self._get(Counter(name, about, labels, "sum", ()))

    def gauge(self, name: str, about: str, labels: Labels = (), *, merge: Merge = "sum") -> Gauge:
        """Get or create. Raises ValueError where another one has that name."""
        return self._get(Gauge(name, about, labels, merge, ()))

    def histogram(self, name: str, about: str, labels: Labels = (), bounds: Sequence[float] = SECONDS) -> Histogram:
        """Get or create. `bounds`: upper ends of the buckets, ascending. Raises ValueError as above."""
        return self._get(Histogram(name, about, labels, "sum", bounds))

    def dropped(self, buffer: str) -> Cell:
        """What this buffer had to drop; one metric for all buffers."""
        about = "What was dropped since a buffer was full, or could not be written."
        return self.counter("xenios_dropped_total", about, ("buffer",)).of(buffer)

    def before_export(self, call: Callable[[], None]) -> Callable[[], None]:
        """Before numbers are told (each second, or when asked) `call` sets what is cheaper to look up than to keep.

        Returns what ends that.
        """
        key = object()
        self._before[key] = call

        def end() -> None:
            self._before.pop(key, None)

        return end

    def model(self, upstream: str, model: str) -> str:
        """A model as a label: `other`, unless the configuration names it or the catalogue knows it."""
        found = self._models.get((upstream, model))
        if found is None:
            if len(self._models) >= MOST_SERIES:  # invented ones
                self._models.clear()
            found = self._models[upstream, model] = self._label(upstream, model)
        return found

    # --- for whoever shows -------------------------------------------------------------------------------------------

    async def read(self) -> list[Family]:
        """All metrics, of all workers, by name.

        Raises StoreUnavailable where workers can't exchange them: told by halves, counters would go down.
        """
        if self._folder is None:
            return _merged([self._dump()])
        try:
            own = self._dump() if self._alone else await self._write()
            return await asyncio.to_thread(lambda: _merged([own, *self._others_dumps()]))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StoreUnavailable(f"The workers can't exchange their numbers in data_dir: {reason}.") from error

    # --- for the process ---------------------------------------------------------------------------------------------

    def follow(self, known: Callable[[str, str], str | None], named: Iterable[str]) -> None:
        """`known`: the catalogue's name of an upstream's model; `named`: models that the configuration names."""
        self._known, self._named = known, frozenset(named)
        self._models.clear()

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Write each second while the context lasts, and once more."""
        if self._alone:
            yield
            return
        self._tasks.spawn(self._keep_writing(), "metrics")
        try:
            yield
        finally:
            await self._tasks.drain(0)
            for metric in self._metrics.values():
                if isinstance(metric, Gauge):
                    metric.close()
            self._before.clear()
            with contextlib.suppress(OSError):
                await self._write()

    def _get(self, made: _AnyMetric) -> _AnyMetric:
        there = self._metrics.get(made.name)
        if there is None:
            left = self._left.pop(made.name, None)
            if left is not None:
                made.go_on_from(left)
            self._metrics[made.name] = made
            return made
        if (there.kind, there.labels, there.bounds) != (made.kind, made.labels, made.bounds):
            raise ValueError(f"The metric {made.name} is a {there.kind} with the labels {there.labels} already.")
        return cast("_AnyMetric", there)

    def _label(self, upstream: str, model: str) -> str:
        if f"{upstream}/{model}" in self._named:
            return model
        known = self._known(upstream, model)
        if known is None:
            return OTHER
        if f"{upstream}/{known}" not in self._named and known not in self._others:
            if len(self._others) >= MOST_MODELS:
                return OTHER
            self._others.add(known)
        return known

    def _families(self) -> list[Family]:
        for call in list(self._before.values()):
            try:
                call()
            except Exception:
                log.exception("metrics_reading_failed")
        for metric in self._metrics.values():
            if isinstance(metric, Gauge):
                metric.read()
        return [*self._left.values(), *(metric.family() for metric in self._metrics.values())]

    @property
    def _file(self) -> Path:
        if self._folder is None or self._alone:
            raise RuntimeError("Only one of several workers keeps its numbers in a file.")
        return self._folder / self.worker

    def _dump(self) -> _Dump:
        return _Dump(self.worker, time.time(), self._families())

    async def _write(self) -> _Dump:
        """Raises OSError."""
        async with self._writing:  # an older one never replaces a newer one
            dump = self._dump()
            await asyncio.to_thread(_put, self._file, msgspec.msgpack.encode(dump))
            return dump

    async def _keep_writing(self) -> None:
        failed = False
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            try:
                await self._write()
            except OSError as error:
                if not failed:
                    log.warning("metrics_not_written", file=str(self._file), error=str(error))
                failed = True
            else:
                failed = False

    def _of_the_dead(self) -> list[Family]:
        dump = None
        if not self._alone:
            with contextlib.suppress(OSError):
                dump = _get_dump(self._file)
        return [family for family in dump.families if family.kind != "gauge"] if dump else []

    def _others_dumps(self) -> list[_Dump]:
        if self._folder is None:
            return []
        if self._before_us is None:
            self._before_us = _dumps(self._folder / BEFORE)
        found = _dumps(self._folder)
        found.pop(self.worker, None)
        return [_since(self._before_us.get(number), dump) for number, dump in found.items()]


def _put(file: Path, data: bytes) -> None:
    """All of it or nothing: others read at any time. Raises OSError."""
    side = file.with_name(f"{file.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        side.write_bytes(data)
        side.replace(file)
    except OSError:
        side.unlink(missing_ok=True)
        raise


def _get_dump(file: Path) -> _Dump | None:
    """None if there is none. Raises OSError: a worker whose numbers can't be read just now is not one that has none."""
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=_Dump)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _dumps(folder: Path) -> dict[str, _Dump]:
    """By number. Raises OSError."""
    try:
        files = sorted(file for file in folder.iterdir() if file.name.isdigit())
    except FileNotFoundError:
        return {}
    return {file.name: dump for file in files if (dump := _get_dump(file)) is not None}


def _since(before: _Dump | None, now: _Dump) -> _Dump:
    """What was counted since then."""
    if before is None:
        return now
    known = {
        (family.name, series.labels): series
        for family in before.families
        if family.kind != "gauge"
        for series in family.series
    }
    for family in now.families:
        family.series = [s.minus(known.get((family.name, s.labels))) for s in family.series]
    return now


def _merged(dumps: Sequence[_Dump]) -> list[Family]:
    """One family of each name, as the first worker that has it says what it is.

    In the same order whoever asks: fractions that are added up in another one may give a sum that is smaller by a hair,
    which Prometheus takes for a start from zero.
    """
    now = time.time()
    families: dict[str, Family] = {}
    sums: dict[str, dict[Labels, Series]] = {}
    for dump in sorted(dumps, key=lambda dump: int(dump.worker)):
        for family in dump.families:
            first = families.setdefault(family.name, family)
            if (first.kind, first.labels, first.bounds) != (family.kind, family.labels, family.bounds):
                continue  # it changed with a reload, which that worker has yet to see
            into = sums.setdefault(family.name, {})
            if family.kind == "gauge" and now - dump.at > STALE:
                continue
            for series in family.series:
                labels = (*series.labels, dump.worker) if family.merge == "worker" else series.labels
                there = into.get(labels)
                into[labels] = series.under(labels) if there is None else _both(there, series, family.merge)
    return [
        msgspec.structs.replace(
            family,
            labels=(*family.labels, "worker") if family.merge == "worker" else family.labels,
            series=sorted(sums[name].values(), key=lambda series: series.labels),
        )
        for name, family in sorted(families.items())
    ]


def _both(one: Series, other: Series, merge: Merge) -> Series:
    return one.plus(other) if merge == "sum" else Series(one.labels, _joined(one.value, other.value, merge))


def _joined(one: float, other: float, merge: Merge) -> float:
    """`worker`: of two in one process the last."""
    if merge == "sum":
        return one + other
    return max(one, other) if merge == "max" else min(one, other) if merge == "min" else other
