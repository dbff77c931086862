"""What `make bench` measures, section by section: which targets under which load, and which columns its table has."""

import dataclasses

from tests.benchmarks.report import Column


@dataclasses.dataclass(frozen=True)
class Measure:
    """One kind of load: so many rounds of so many seconds; of `--quick` the second pair."""

    name: str
    rounds: int
    seconds: float
    quick: tuple[int, float]
    connections: int = 64
    request_bytes: int = 0
    reply_bytes: int = 0
    streams: int = 0
    chunk_rate: int = 50  # per second, of each stream
    ramp: float = 0.5  # seconds over which streams are opened
    label: str = ""

    @property
    def files(self):
        """What a process has open at most: a stream is two sockets of the target's."""
        return 2 * (self.streams or self.connections) + 200


@dataclasses.dataclass(frozen=True)
class Section:
    """`base`: what ratios are against. `beside`: what a row's cost is the difference to, where that is what counts.
    `apart`: each load is a row of its own. `commands`: name → arguments of `xenios`, timed.
    """

    name: str
    title: str
    targets: tuple[str, ...]
    measures: tuple[Measure, ...]
    columns: tuple[Column, ...]
    base: str = "yardstick"
    beside: str = ""
    apart: bool = False
    starts: int = 1
    commands: tuple[tuple[str, ...], ...] = ()
    skip: tuple[tuple[str, str], ...] = ()  # (target, measure) pairs that tell nothing


REQUEST = Measure("request", 5, 1.5, (3, 0.6))
LATENCY = Measure("latency", 4, 1.0, (2, 0.4), connections=1)
STREAMS_50 = Measure("streams50", 3, 3.0, (1, 2.0), streams=50)
STREAMS_500 = Measure("streams500", 3, 4.0, (1, 2.5), streams=500, ramp=1.0)


def digits(places):
    return f",.{places}f"


def paired(heading, key, places):
    """A figure, and its ratio to the base: the one that is compared with what was recorded."""
    return Column(heading, key, digits(places)), Column("×yard", f"{key}_ratio", digits(2), compared=True)


ERRORS = Column("errors", "errors", digits(0))
BUSY = Column("busy", "busy", digits(2))

CORE = Section(
    "core",
    "What a request and a streamed chunk cost",
    ("direct", "canned", "yardstick", "tricks", "xenios-bare", "xenios", "xenios-aiohttp", "xenios-all"),
    (REQUEST, LATENCY, STREAMS_50, STREAMS_500),
    (
        *paired("CPU µs/req", "request.cpu", 0),
        Column("req/s", "request.rate", digits(0)),
        Column("busy", "request.busy", digits(2)),
        Column("p50 µs", "latency.p50", digits(0)),
        Column("p99 µs", "latency.p99", digits(0)),
        *paired("added p50", "latency.added_p50", 0),
        *paired("added p99", "latency.added_p99", 0),
        *paired("µs/chunk, 50", "streams50.cpu", 1),
        *paired("µs/chunk, 500", "streams500.cpu", 1),
        Column("busy", "streams500.busy", digits(2)),
        ERRORS,
    ),
    skip=tuple((slug, measure) for slug in ("direct", "canned", "tricks") for measure in ("streams50", "streams500")),
)
PLUGINS = Section(
    "plugins",
    "What each plugin adds to a request",
    (
        "yardstick", "xenios", "no-access_log", "no-metrics", "no-api_keys", "no-routing", "no-fallback",
        "unsampled", "traced", "limits", "limits-redis", "usage",
    ),
    (dataclasses.replace(REQUEST, rounds=7, seconds=1.0),),
    (
        Column("CPU µs/req", "request.cpu", digits(0)),
        Column("adds µs", "request.cost", "+,.0f", spread=True),
        Column("of yard", "request.cost_ratio", "+.2f", compared=True),
        Column("store µs", "request.store", digits(0)),
        ERRORS,
    ),
    beside="xenios",
)  # fmt: skip
SIZES = Section(
    "sizes",
    "Large requests and replies",
    ("yardstick", "xenios"),
    tuple(
        Measure(f"{name}-{size}", 3, 1.0, (1, 0.5), connections, label=label, **{f"{name}_bytes": size})
        for size, connections, words in ((1000, 64, "1 kB"), (100_000, 32, "100 kB"), (1_000_000, 8, "1 MB"))
        for name, label in (("request", f"request of {words}"), ("reply", f"reply of {words}"))
    ),
    (
        *paired("CPU µs/req", "cpu", 0),
        Column("req/s", "rate", digits(0)),
        BUSY,
        Column("rig", "rig", digits(2)),
        ERRORS,
    ),
    apart=True,
)
TLS = Section(
    "tls",
    "An upstream by TLS, with an authority of its own",
    ("yardstick-tls", "xenios-tls"),
    (dataclasses.replace(REQUEST, rounds=3), dataclasses.replace(STREAMS_50, rounds=2)),
    (
        *paired("CPU µs/req", "request.cpu", 0),
        Column("req/s", "request.rate", digits(0)),
        *paired("µs/chunk, 50", "streams50.cpu", 1),
        ERRORS,
    ),
    base="yardstick-tls",
)
WORKERS = Section(
    "workers",
    "One worker and two, with limits and budgets on one Valkey",
    ("yardstick", "workers-1", "workers-2"),
    (dataclasses.replace(REQUEST, rounds=3),),
    (
        *paired("CPU µs/req", "request.cpu", 0),
        Column("req/s", "request.rate", digits(0)),
        Column("busy", "request.busy", digits(2)),
        Column("store µs", "request.store", digits(0)),
        Column("MB idle", "idle_mb", digits(0), compared=True),
        ERRORS,
    ),
)
GROWTH = Section(
    "growth",
    "What grows with the configuration",
    ("yardstick", "xenios", "rules-10", "rules-100", "limits-10", "plugins-5", "plugins-20", "keys-1000"),
    (dataclasses.replace(REQUEST, seconds=1.0),),
    (*PLUGINS.columns[:3], Column("MB idle", "idle_mb", digits(0)), ERRORS),
    beside="xenios",
)
OPEN = Section(
    "open",
    "Open streams, a chunk a second each, on one worker",
    ("yardstick", "xenios"),
    tuple(
        Measure(
            f"open-{n}",
            1,
            7.0,
            (1, 3.0),
            streams=n,
            chunk_rate=1,
            ramp=max(1.0, n / 1000),
            label=f"{n:,} streams",
        )
        for n in (100, 1000, 5000)
    ),
    (
        Column("at once", "most_open", digits(0)),
        *paired("CPU µs/chunk", "cpu", 0),
        BUSY,
        Column("late p99 ms", "late_ms", digits(0)),
        Column("MB", "peak_mb", digits(0)),
        Column("kB/stream", "stream_kb", digits(0), compared=True),
        ERRORS,
    ),
    apart=True,
)
STARTUP = Section(
    "startup",
    "Start and rest",
    ("yardstick", "xenios-bare", "xenios", "xenios-all"),
    (),
    (
        *paired("start s", "start", 2),
        Column("MB idle", "idle_mb", digits(0), compared=True),
        Column("PSS", "idle_pss_mb", digits(0)),
    ),
    starts=3,
    commands=(("--help",),),
)
JOBS = Section(
    "jobs",
    "Jobs: ours beside RQ's own workers",
    (),
    (),
    (
        Column("jobs/s", "rate", digits(0)),
        Column("CPU ms/job", "cpu", digits(1)),
        Column("× SimpleWorker", "cpu_ratio", digits(2), compared=True),
        Column("MB idle", "idle_mb", digits(0), compared=True),
        Column("at once", "at_once", digits(0)),
        Column("MB then", "peak_mb", digits(0)),
        Column("MB per further call", "call_mb", digits(2)),
    ),
)
SECTIONS = {section.name: section for section in (CORE, PLUGINS, SIZES, TLS, WORKERS, GROWTH, OPEN, STARTUP, JOBS)}
QUICK = ("core", "startup")

# What is aimed at: (section, row, column) → (at most, in words).
BARS = {
    ("core", "xenios", "request.cpu_ratio"): (0.55, "CPU per request, ×yard"),
    ("core", "xenios", "streams500.cpu_ratio"): (0.50, "CPU per chunk of 500 streams, ×yard"),
    ("core", "xenios", "latency.added_p50_ratio"): (0.6, "added p50, ×yard"),
    ("core", "xenios", "latency.added_p99_ratio"): (0.6, "added p99, ×yard"),
    ("plugins", "limits", "request.cost"): (25, "limits and budgets in memory, µs"),
    ("plugins", "limits-redis", "request.cost"): (40, "limits and budgets on Valkey, µs"),
    ("growth", "rules-100", "request.cost"): (40, "100 routing rules, µs"),
    ("growth", "limits-10", "request.cost"): (40, "10 limits, µs"),
    ("growth", "plugins-20", "request.cost"): (40, "20 plugins, µs"),
    ("open", "xenios open-5000", "stream_kb"): (25, "memory of each of 5,000 streams, kB"),
    ("open", "xenios open-5000", "errors"): (0, "errors with 5,000 streams"),
    ("startup", "xenios", "start"): (1.0, "start to the first 200, s"),
    ("startup", "xenios", "idle_mb"): (60, "memory at rest, MB"),
    ("startup", "xenios --help", "start"): (0.3, "`xenios --help`, s"),
}
