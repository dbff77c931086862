"""Measures the gateway against a bare aiohttp proxy (the yardstick) and prints one table. Linux; needs the project's venv only.

    .venv/bin/python tests/benchmarks/bench.py             about six minutes
    .venv/bin/python tests/benchmarks/bench.py --quick     about one minute, coarse
    … --only direct,yardstick,xenios --rounds 9 --json out.json --markdown

All targets run at once, each pinned to the first core, and are loaded one after the other in each round, so that a slow
drift of the machine hits all alike; the mock upstream and the load client run on the second core. Ratios are taken round
by round and the median is shown. README.md beside this file says what each figure means.
"""

import argparse
import contextlib
import dataclasses
import http.client
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
START_LIMIT_S, STOP_LIMIT_S = 30, 15
NOISY = 0.15  # cores that strangers use
UPSTREAM_KEY = "sk-or-bench"
MODEL = "openai/mock"
PEPPER = "a-pepper-for-the-benchmark-only"
pause = threading.Event().wait  # seconds


# ---- processes ------------------------------------------------------------------------------------------------------


def cores():
    """The core of the target, and that of the mock and the client: the same one on a machine that has only one."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[min(1, len(usable) - 1)]


@contextlib.contextmanager
def pinned(core):
    """What is started within inherits the core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def tree(root):
    """/proc/PID/stat of a process and of all that it started: they share the session that it leads."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):
            stat = Path(f"/proc/{name}/stat").read_text()
            fields = stat[stat.rindex(")") + 2 :].split()
            if int(name) == root or int(fields[3]) == root:
                found[int(name)] = fields
    return found


def cpu_s(root):
    """CPU seconds, user and system, of the tree; of its dead children too."""
    return sum(sum(map(int, fields[11:15])) for fields in tree(root).values()) / TICK


def rss_mb(root):
    return sum(int(fields[21]) for fields in tree(root).values()) * PAGE / 2**20


def pss_mb(root):
    """Like RSS, but what processes share is counted once. None where the kernel doesn't tell."""
    total = 0
    for pid in tree(root):
        with contextlib.suppress(OSError):
            total += int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[1])
    return total / 1024 if total else None


def machine_s():
    """CPU seconds that the machine spent on anything at all."""
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, stat.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / TICK


def own_s():
    """CPU seconds of this process and of the load clients that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop(process):
    pids = [process.pid]
    for sent, limit in ((signal.SIGTERM, STOP_LIMIT_S), (signal.SIGKILL, 5)):
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, sent)
        until = time.monotonic() + limit
        while time.monotonic() < until:
            process.poll()
            pids = list(tree(process.pid))
            if not pids:
                return
            pause(0.02)


def last_lines(path, size=300):
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-2:])[-size:]
    return ""


# ---- targets --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Target:
    """One server under load. The samples are kept per round, None where a round failed."""

    slug: str
    label: str
    command: list[str]
    port: int
    key: str = "sk-bench"
    streams: bool = True
    logs: bool = False
    core: int = 0
    process: subprocess.Popen | None = None
    out: Path = Path()
    err: Path = Path()
    failed: str = ""
    answered: int = 0
    starts: list = dataclasses.field(default_factory=list)
    sat: list = dataclasses.field(default_factory=list)
    lat: list = dataclasses.field(default_factory=list)
    chunk: list = dataclasses.field(default_factory=list)
    memory: dict = dataclasses.field(default_factory=dict)
    log_lines: int | None = None

    def start(self, folder):
        """Starts the process and waits for the first 200 on a real request."""
        self.out, self.err = folder / f"{self.slug}.out", folder / f"{self.slug}.err"
        with pinned(self.core), self.out.open("ab") as out, self.err.open("ab") as err:
            begun = time.monotonic()
            self.process = subprocess.Popen(self.command, stdout=out, stderr=err, cwd=folder, start_new_session=True)
        last = "no answer"
        while time.monotonic() - begun < START_LIMIT_S:
            status, body = self.ask()
            self.answered += status != 0
            if status == 200:
                self.starts.append(time.monotonic() - begun)
                return
            last = f"{status} {body[:200]!r}" if status else last
            if self.process.poll() is not None:
                raise RuntimeError(f"exit {self.process.returncode}: {last_lines(self.err) or last_lines(self.out)}")
            pause(0.005)
        raise RuntimeError(f"no 200 within {START_LIMIT_S} s, last: {last} {last_lines(self.err)}")

    def ask(self):
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def stop(self):
        if self.process:
            stop(self.process)
            self.process = None

    def count_log_lines(self):
        """JSON lines on stdout that are about a chat completion: there must be one per request."""
        lines = 0
        with self.out.open("rb") as out:
            for line in out:
                with contextlib.suppress(ValueError, AttributeError, KeyError):
                    entry = json.loads(line)
                    lines += entry.get("event") == "request" and entry["path"].endswith("/chat/completions")
        self.log_lines = lines


def python(script, *args):
    return [sys.executable, str(HERE / script), *map(str, args)]


def xenios(*args):
    """The command beside this interpreter."""
    return [str(Path(sys.executable).parent / "xenios"), *map(str, args)]


LIMITS = [
    "  - use: rate_limit",
    "    config:",
    "      limits:",
    "        - {name: per-key, requests: 100000000, tokens: 100000000000, concurrent: 10000}",
    "        - {name: everyone, by: [], requests: 100000000}",
    "  - use: budgets",
    "    config:",
    "      budgets:",
    "        - {name: per-key, usd: 10000000}",
    "        - {name: everyone, by: [], usd: 10000000, per: total}",
]
# A price: budgets reserve and spend.
PRICES = [
    "catalogue:",
    "  overrides:",
    f"    {MODEL}: {{input: 1, output: 5, context_length: 128000, max_output: 8000}}",
]


# A hundred routing rules of each kind of condition; the benchmark's requests meet the last.
CONDITIONS = [
    'match: "vendor-{n}/*"',
    "when: {{teams: team-{n}, images: true}}",
    "when: {{tasks: task-{n}, input_tokens: {{min: 50000}}}}",
    'when: {{headers: {{x-client: "app-{n}-*"}}}}',
    "when: {{claims: {{plan: plan-{n}}}, time: {{days: [sat, sun], zone: Europe/Berlin}}}}",
]
RULES = [
    "    config:",
    "      rules:",
    *(f"        - {{name: r{n}, {CONDITIONS[n % 5].format(n=n)}, use: a/b}}" for n in range(99)),
    f"        - {{name: last, match: {MODEL}, use: [{MODEL}, a/b]}}",
]


def tracing(ratio, port):
    """So many requests are traced. The mock takes what it is sent and answers 404: all is done but to be glad of it."""
    return ["  - use: tracing", f"    config: {{sample_ratio: {ratio}, endpoint: 'http://127.0.0.1:{port}/v1/traces'}}"]


def xenios_config(home, upstream_port, key_hash, redis=None, rules=(), observers=(), without=""):
    """The YAML of a Xenios target: with the default plugins where a key's hash is given, else with none; with rate
    limits and budgets too, where it is said what counts them; with these routing rules; without one of the observers.
    """
    lines = [
        "server:",
        "  host: 127.0.0.1",
        f"  data_dir: {home}/data",
        f"  pepper: {PEPPER}",
        f"  allow_anonymous: {'false' if key_hash else 'true'}",
        "log:",
        "  format: json",
        "upstreams:",
        "  openrouter:",
        "    kind: openrouter",
        f"    base_url: http://127.0.0.1:{upstream_port}/api/v1",
        f"    api_key: {UPSTREAM_KEY}",
    ]
    if not key_hash:
        return "\n".join([*lines, "plugins: []", ""])
    plugins = [
        "plugins:",
        *(f"  - use: {name}" for name in ("access_log", "metrics") if name != without),
        *observers,
        "  - use: api_keys",
        "    config:",
        "      keys:",
        "        - id: bench",
        f'          hash: "{key_hash}"',
        *(LIMITS if redis else []),
        "  - use: routing",
        *rules,
        "  - use: fallback",
        "",
    ]
    return "\n".join([*lines, *PRICES, "services:", f"  redis: {redis or 'memory'}", *plugins])


def xenios_key(config):
    """A new key and its hash under the configuration's pepper."""
    command = xenios("keys", "hash", "--new", "--config", config)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=config.parent)
    found = re.search(r"^key:\s+(\S+).*^hash:\s+(\S+)", done.stdout, re.MULTILINE | re.DOTALL)
    if not found:
        raise RuntimeError(f"xenios keys hash: exit {done.returncode}: {(done.stderr or done.stdout).strip()[-200:]}")
    return found[1], found[2]


def xenios_target(slug, label, folder, upstream_port, plugins, redis=None, rules=(), observers=(), without=""):
    """A target whose preparation failed still gets its row."""
    home, port = folder / slug, free_port()
    home.mkdir(exist_ok=True)
    config = home / "xenios.yaml"
    target = Target(slug, label, xenios("serve", "--config", config, "--port", port), port)
    target.logs = plugins and without != "access_log"
    key_hash = None
    try:
        if plugins:
            config.write_text(xenios_config(home, upstream_port, None))
            target.key, key_hash = xenios_key(config)
        config.write_text(xenios_config(home, upstream_port, key_hash, redis, rules, observers, without))
    except (OSError, RuntimeError, IndexError, subprocess.SubprocessError) as error:
        target.failed = f"{type(error).__name__}: {error}"
    return target


def make_targets(only, folder, mock_port):
    def proxy(slug, *flags, **more):
        port = free_port()
        return Target(slug, slug, python("yardstick.py", "--port", port, "--upstream", mock_port, *flags), port, **more)

    makers = {
        "direct": lambda: Target("direct", "direct to the mock", [], mock_port),
        "canned": lambda: dataclasses.replace(
            proxy("canned", "--canned", streams=False), label="aiohttp, canned answer"
        ),
        "yardstick": lambda: dataclasses.replace(proxy("yardstick"), label="yardstick: bare aiohttp proxy"),
        "tricks": lambda: dataclasses.replace(proxy("tricks", "--tricks"), label="yardstick + all tricks"),
        "xenios-bare": lambda: xenios_target("xenios-bare", "xenios, no plugin", folder, mock_port, plugins=False),
        "xenios": lambda: xenios_target("xenios", "xenios, default plugins", folder, mock_port, plugins=True),
        "no-log": lambda: xenios_target(
            "no-log", "without access_log", folder, mock_port, plugins=True, without="access_log"
        ),
        "no-metrics": lambda: xenios_target(
            "no-metrics", "without metrics", folder, mock_port, plugins=True, without="metrics"
        ),
        "xenios-rules": lambda: xenios_target(
            "xenios-rules", "+ 100 routing rules", folder, mock_port, plugins=True, rules=RULES
        ),
        "unsampled": lambda: xenios_target(
            "unsampled", "+ tracing, unsampled", folder, mock_port, plugins=True, observers=tracing(0, mock_port)
        ),
        "traced": lambda: xenios_target(
            "traced", "+ tracing, every request", folder, mock_port, plugins=True, observers=tracing(1, mock_port)
        ),
        "limits": lambda: xenios_target("limits", "+ limits, memory", folder, mock_port, plugins=True, redis="memory"),
        "limits-redis": lambda: xenios_target(
            "limits-redis", "+ limits, embedded Valkey", folder, mock_port, plugins=True, redis="embedded"
        ),
    }
    unknown = set(only) - set(makers)
    if unknown:
        raise SystemExit(f"--only: unknown {', '.join(sorted(unknown))}; known are {', '.join(makers)}")
    return [maker() for slug, maker in makers.items() if not only or slug in only]


# ---- load -----------------------------------------------------------------------------------------------------------


class Rig:
    def __init__(self, args, folder):
        self.args, self.folder, self.mock_port = args, folder, free_port()
        self.target_core, self.rig_core = cores()
        with pinned(self.rig_core):
            command = python("mock_upstream.py", "--port", self.mock_port)
            self.mock = subprocess.Popen(command, start_new_session=True)

    def load(self, target, *args, watch_memory=False):
        """Runs the client against a target; its report, with the CPU that everybody used meanwhile."""
        command = python("load.py", "--port", target.port, "--key", target.key, "--model", MODEL, *args)
        root = target.process.pid if target.process else self.mock.pid
        before = [cpu_s(root), cpu_s(self.mock.pid), machine_s(), own_s(), time.monotonic()]
        peak = 0.0
        with pinned(self.rig_core):
            client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while True:
            try:
                out, err = client.communicate(timeout=0.5 if watch_memory else None)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, rss_mb(root))
        after = [cpu_s(root), cpu_s(self.mock.pid), machine_s(), own_s(), time.monotonic()]
        if client.returncode != 0:
            raise RuntimeError(f"load client: {err.strip()[-300:]}")
        report = json.loads(out)
        cpu, mock, machine, own, wall = (b - a for a, b in zip(before, after, strict=True))
        used = mock + own + (cpu if target.process else 0)
        target.answered += report["asked"]
        rates = {"cpu_s": round(cpu, 3), "busy": round(cpu / report["wall_s"], 3), "peak_mb": round(peak, 1)}
        rates["rig"] = round((report["client_cpu_s"] + mock) / report["wall_s"], 3)
        rates["foreign"] = round(max(0.0, machine - used) / wall, 3)
        return {**report, **rates}

    def saturate(self, target, seconds):
        report = self.load(target, "--connections", self.args.connections, "--seconds", seconds)
        report["cpu_us"] = report["cpu_s"] / max(report["requests"], 1) * 1e6
        return report

    def latency(self, target, seconds):
        return self.load(target, "--connections", 1, "--seconds", seconds)

    def stream(self, target, seconds):
        args = self.args
        chunks = max(1, round(seconds * args.chunk_rate))
        load = ("--streams", args.streams, "--chunks", chunks, "--delay", round(1000 / args.chunk_rate))
        before = rss_mb(target.process.pid) if target.process else 0.0
        report = self.load(target, *load, watch_memory=True)
        report["cpu_us"] = report["cpu_s"] / max(report["chunks"], 1) * 1e6
        if "loaded_mb" not in target.memory and target.process and report["peak_mb"]:
            target.memory |= {
                "loaded_mb": report["peak_mb"],
                "stream_kb": (report["peak_mb"] - before) * 1024 / args.streams,
            }
        return report


def attempt(target, kind, run, *args):
    """One sample, or a target that has failed for good: one broken target must not end the run."""
    if target.failed:
        return None
    try:
        return run(target, *args)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        target.failed = f"{kind}: {error}"
        return None


def calm_sample(target, run, seconds, retakes):
    """A sample; taken again while strangers disturb it, and the least disturbed one is kept."""
    samples = [run(target, seconds)]
    while samples[-1]["foreign"] > NOISY and len(samples) <= retakes:
        samples.append(run(target, seconds))
    best = min(samples, key=lambda sample: sample["foreign"])
    return {**best, "wrong": sum(sum(sample["errors"].values()) for sample in samples)}


def start_target(rig, target):
    """Starts it as often as its start-up is to be timed; the last start stays."""
    if not target.command:
        return
    target.core = rig.target_core
    (rig.folder / f"{target.slug}.out").unlink(missing_ok=True)
    for i in range(rig.args.starts):
        if i:
            target.stop()
        target.start(rig.folder)
    pause(1.0)
    target.memory["idle_mb"], target.memory["idle_pss_mb"] = (
        rss_mb(target.process.pid),
        pss_mb(target.process.pid),
    )


def measure(rig, targets):
    args = rig.args
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if not args.silent else (lambda _text: None)
    for target in targets:
        attempt(target, "start", lambda t: start_target(rig, t))
        attempt(target, "warm-up", rig.saturate, args.warm)
        say(f"started {target.slug} {target.failed}")
    phases = [
        ("request", "sat", rig.saturate, args.rounds, args.seconds),
        ("latency", "lat", rig.latency, args.rounds, args.seconds),
        ("stream", "chunk", rig.stream, args.stream_rounds, args.stream_seconds),
    ]
    for kind, name, run, rounds, seconds in phases:
        for i in range(rounds):
            for target in targets if i % 2 == 0 else targets[::-1]:
                skip = name == "chunk" and not target.streams
                sample = None if skip else attempt(target, kind, calm_sample, run, seconds, args.retakes)
                getattr(target, name).append(sample)
            say(f"{kind}: round {i + 1} of {rounds}")


# ---- figures --------------------------------------------------------------------------------------------------------


def dig(sample, *path):
    for name in path:
        sample = sample.get(name) if isinstance(sample, dict) else None
    return sample


def middle(values):
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratios(values, base):
    return [a / b for a, b in zip(values, base, strict=False) if a is not None and b]


def ratio(values, base):
    """The median of the ratios of each round."""
    return middle(ratios(values, base))


def minus(values, base):
    """Round by round; an empty list where there is nothing to take away."""
    return [a - b if a is not None and b is not None else None for a, b in zip(values, base, strict=False)]


def figures(target, by_slug):
    def column(of, samples, *path):
        return [dig(sample, *path) for sample in getattr(of, samples)] if of else []

    yard, direct = by_slug.get("yardstick"), by_slug.get("direct")
    row = {
        "cpu_us": middle(column(target, "sat", "cpu_us")),
        "cpu_ratio": ratio(column(target, "sat", "cpu_us"), column(yard, "sat", "cpu_us")),
        "cpu_ratios": ratios(column(target, "sat", "cpu_us"), column(yard, "sat", "cpu_us")),
        "rps": middle(column(target, "sat", "rps")),
        "busy": middle(column(target, "sat", "busy")),
        "chunk_us": middle(column(target, "chunk", "cpu_us")),
        "chunk_ratio": ratio(column(target, "chunk", "cpu_us"), column(yard, "chunk", "cpu_us")),
        "chunk_busy": middle(column(target, "chunk", "busy")),
        "chunks_per_s": middle(column(target, "chunk", "chunks_per_s")),
        "late_p99_ms": middle([v / 1000 if v is not None else None for v in column(target, "chunk", "late", "p99")]),
        "start_s": middle(target.starts),
        **target.memory,
    }
    for q in ("p50", "p99"):
        mine, base = column(target, "lat", "latency", q), column(direct, "lat", "latency", q)
        row[q] = middle(mine)
        if target is not direct:
            added = minus(mine, base)
            row[f"added_{q}"] = middle(added)
            row[f"added_{q}_ratio"] = ratio(added, minus(column(yard, "lat", "latency", q), base))
    samples = [sample for sample in [*target.sat, *target.lat, *target.chunk] if sample]
    row["errors"] = sum(sample["wrong"] for sample in samples)
    row["foreign"] = max((sample["foreign"] for sample in samples), default=None)
    row["rig"] = max((sample["rig"] for sample in samples), default=None)
    row["answered"], row["log_lines"] = target.answered, target.log_lines
    detail = next((sample["detail"] for sample in samples if sample["detail"]), "")
    return {"slug": target.slug, "label": target.label, **row, "failed": target.failed, "detail": detail}


def digits(places):
    return lambda value: f"{value:,.{places}f}"


COLUMNS = [  # heading, key, format
    ("CPU µs/req", "cpu_us", digits(0)),
    ("×yard", "cpu_ratio", digits(2)),
    ("req/s", "rps", digits(0)),
    ("busy", "busy", digits(2)),
    ("p50 µs", "p50", digits(0)),
    ("p99 µs", "p99", digits(0)),
    ("added p50", "added_p50", digits(0)),
    ("×yard", "added_p50_ratio", digits(2)),
    ("added p99", "added_p99", digits(0)),
    ("×yard", "added_p99_ratio", digits(2)),
    ("CPU µs/chunk", "chunk_us", digits(1)),
    ("×yard", "chunk_ratio", digits(2)),
    ("busy", "chunk_busy", digits(2)),
    ("start s", "start_s", digits(2)),
    ("MB idle", "idle_mb", digits(0)),
    ("MB streams", "loaded_mb", digits(0)),
    ("kB/stream", "stream_kb", digits(0)),
    ("errors", "errors", digits(0)),
]


def cells(row):
    if row["failed"] and row["cpu_us"] is None:
        return [row["label"], "failed"] + ["-"] * (len(COLUMNS) - 1)
    return [row["label"]] + ["-" if row.get(key) is None else show(row[key]) for _, key, show in COLUMNS]


def table(rows, markdown):
    lines = [["", *(heading for heading, _, _ in COLUMNS)], *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))] for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def remarks(rows, args):
    """What a reader must know before believing the table."""
    yield from (f"FAILED {row['label']}: {row['failed']}" for row in rows.values() if row["failed"])
    for row in rows.values():
        if row["errors"]:
            yield f"WRONG {row['label']}: {row['errors']} replies were wrong; the first: {row['detail']}"
        if row["slug"] not in {"direct", "yardstick"} and row["cpu_ratios"]:
            low, high = min(row["cpu_ratios"]), max(row["cpu_ratios"])
            yield f"range {row['label']}: CPU/req ×yard {low:.2f} to {high:.2f} over the rounds, median {row['cpu_ratio']:.2f}"
        if row["log_lines"] is not None:
            word = "as many as requests" if row["log_lines"] == row["answered"] else "WRONG: not as many as requests"
            yield f"log   {row['label']}: {row['log_lines']} lines for {row['answered']} requests: {word}"
        if (row["chunk_busy"] or 0) > 0.95:
            yield f"note  {row['label']}: its core was full while streaming; late chunks travel together, so the figure is too good"
    if rows.get("direct", {}).get("rps") and rows.get("yardstick", {}).get("rps"):
        headroom = rows["direct"]["rps"] / rows["yardstick"]["rps"]
        yield f"rig   the client reaches {headroom:.1f} times the yardstick's rate when it asks the mock directly"
    foreign = max((row["foreign"] or 0 for row in rows.values()), default=0)
    if foreign > NOISY:
        yield f"noise other processes used up to {foreign:.2f} cores in a sample: trust ratios and CPU, not rates and latencies"


def machine():
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    versions = {name: importlib.metadata.version(name) for name in ("aiohttp", "uvloop")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "optimised_python": "--enable-optimizations" in shlex.join(configure_args()),
        **versions,
    }


def configure_args():
    import sysconfig

    return shlex.split(sysconfig.get_config_var("CONFIG_ARGS") or "")


def head(args, where):
    versions = f"CPython {where['python']}{' (PGO)' if where['optimised_python'] else ''}, aiohttp {where['aiohttp']}, uvloop {where['uvloop']}"
    return (
        f"{where['date']}, {where['cpu']}, {where['cores']} cores, {versions}; {args.connections} connections, {args.rounds} rounds of "
        f"{args.seconds:g} s; {args.streams} streams of {args.chunk_rate} chunks/s, {args.stream_rounds} rounds of {args.stream_seconds:g} s"
    )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 short rounds, one of streams")
    parser.add_argument("--only", default="", help="targets by name, as the README beside this file lists them")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="of each round of requests, and of latency")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--stream-rounds", type=int)
    parser.add_argument("--stream-seconds", type=float)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--chunk-rate", type=int, default=50, help="chunks per second of each stream")
    parser.add_argument("--starts", type=int, help="how often the start-up is timed")
    parser.add_argument("--warm", type=float, help="seconds of warm-up")
    parser.add_argument("--retakes", type=int, help="how often a sample is taken again that other processes disturb")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples there")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--silent", action="store_true", help="no progress on stderr")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep configuration and output of the targets there")
    args = parser.parse_args()
    full = {
        "rounds": 5,
        "seconds": 2.0,
        "stream_rounds": 3,
        "stream_seconds": 8.0,
        "starts": 3,
        "warm": 1.5,
        "retakes": 2,
    }
    quick = {
        "rounds": 3,
        "seconds": 1.0,
        "stream_rounds": 1,
        "stream_seconds": 3.0,
        "starts": 1,
        "warm": 0.7,
        "retakes": 0,
    }
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.only = [slug for slug in args.only.split(",") if slug]
    return args


@contextlib.contextmanager
def workplace(keep):
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="xenios-bench-") as name:
            yield Path(name)


def run(args, folder):
    rig, targets = Rig(args, folder), []
    try:
        targets = make_targets(args.only, folder, rig.mock_port)
        measure(rig, targets)
    finally:
        for target in targets:
            target.stop()
        stop(rig.mock)
    for target in targets:
        if target.logs and target.answered and target.out.is_file():
            target.count_log_lines()
    return targets


def main():
    args = arguments()
    if not hasattr(os, "sched_setaffinity") or not Path("/proc/stat").exists():
        raise SystemExit("The benchmark reads CPU times from /proc and pins processes: it needs Linux.")
    with workplace(args.keep) as folder:
        targets = run(args, folder)
    by_slug = {target.slug: target for target in targets}
    rows = {slug: figures(target, by_slug) for slug, target in by_slug.items()}
    where = machine()
    print(head(args, where), table(list(rows.values()), args.markdown), sep="\n\n")
    notes = list(remarks(rows, args))
    print("", *(f"- {note}" if args.markdown else note for note in notes), sep="\n")
    if args.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        for slug, target in by_slug.items():
            rows[slug]["samples"] = {
                "request": target.sat,
                "latency": target.lat,
                "stream": target.chunk,
                "starts": target.starts,
            }
        args.json.write_text(
            json.dumps({"machine": where, "settings": settings, "rows": rows, "remarks": notes}, indent=1)
        )
    return 1 if any(note.startswith(("FAILED", "WRONG")) or "WRONG" in note for note in notes) else 0


if __name__ == "__main__":
    sys.exit(main())
