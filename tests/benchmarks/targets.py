"""What is measured: one `Target` per process under load, by the name that `--targets` knows it by."""

import contextlib
import dataclasses
import http.client
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from gateway.kit.keys import hash_key, new_key
from tests.benchmarks.processes import cores, last_lines, pause, pinned, stop
from tests.tools import free_port

HERE = Path(__file__).resolve().parent
START_LIMIT_S = 60
MODEL = "openai/mock"
PEPPER = "a-pepper-for-the-benchmark-only"


@dataclasses.dataclass
class Target:
    """One server under load."""

    slug: str
    label: str
    command: list[str]
    port: int
    key: str = "sk-bench"
    workers: int = 1
    logs: bool = False
    rows: Path | None = None  # the database with a row per request
    process: subprocess.Popen | None = None
    out: Path = Path()
    err: Path = Path()
    failed: str = ""
    answered: int = 0
    starts: list = dataclasses.field(default_factory=list)
    idle: dict = dataclasses.field(default_factory=dict)
    samples: dict = dataclasses.field(default_factory=dict)  # measure → one per round, None where it failed
    kept: dict = dataclasses.field(default_factory=dict)  # log lines, rows: how many there are

    def start(self, folder):
        """Starts the process and waits for the first 200 on a real request."""
        self.out, self.err = folder / f"{self.slug}.out", folder / f"{self.slug}.err"
        with pinned(cores(self.workers)[0]), self.out.open("ab") as out, self.err.open("ab") as err:
            begun = time.monotonic()
            self.process = subprocess.Popen(self.command, stdout=out, stderr=err, cwd=folder)
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
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_LIMIT_S)
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

    def count(self):
        """What it wrote, once it has ended: there must be one line and one row per request."""
        if self.logs and self.out.is_file():
            lines = 0
            with self.out.open("rb") as out:
                for line in out:
                    with contextlib.suppress(ValueError, AttributeError, KeyError):
                        entry = json.loads(line)
                        lines += entry.get("event") == "request" and entry["path"].endswith("/chat/completions")
            self.kept["log lines"] = lines
        if self.rows and self.rows.is_file():
            with contextlib.closing(sqlite3.connect(self.rows)) as database:
                self.kept["usage rows"] = database.execute("SELECT count(*) FROM usage_requests").fetchone()[0]


@dataclasses.dataclass
class Place:
    """Where targets live, and the upstream that they ask."""

    folder: Path
    mock_port: int
    tls_port: int
    authority: Path


# --- the yardstick and other anchors ----------------------------------------------------------------------------------


def python(script, *args):
    return [sys.executable, str(HERE / script), *map(str, args)]


def direct(label):
    return lambda slug, place: Target(slug, label, [], place.mock_port)


def proxy(label, *flags, tls=False):
    def make(slug, place):
        port = free_port()
        asked = (
            ("--upstream", place.tls_port, "--authority", place.authority) if tls else ("--upstream", place.mock_port)
        )
        return Target(slug, label, python("yardstick.py", "--port", port, *asked, *flags), port)

    return make


# --- Xenios -----------------------------------------------------------------------------------------------------------

ORDER = (
    "access_log", "metrics", "tracing", "api_keys", "jwt_auth", "routing", "rate_limit", "budgets", "usage", "jobs", "fallback",
)  # fmt: skip
DEFAULT = ("access_log", "metrics", "api_keys", "routing", "fallback")
PLENTY = 100_000_000
LIMITS = {
    "rate_limit": {
        "limits": [
            {"name": "per-key", "requests": PLENTY, "tokens": 1000 * PLENTY, "concurrent": 10_000},
            {"name": "everyone", "by": [], "requests": PLENTY},
        ]
    },
    "budgets": {
        "budgets": [
            {"name": "per-key", "usd": PLENTY // 10},
            {"name": "everyone", "by": [], "usd": PLENTY // 10, "per": "total"},
        ]
    },
}
ISSUER = {
    "issuer": "https://login.example.com",
    "audience": "xenios",
    "secret": "a-secret-of-32-bytes-or-more-for-this",
}
ALL = {**LIMITS, "jwt_auth": {"issuers": [ISSUER]}, "usage": {}, "jobs": {"worker": {"embedded": False}}}


def decoy(n):
    """A routing rule that no request of the benchmark meets, by one kind of condition after the other."""
    conditions = (
        {"match": f"vendor-{n}/*"},
        {"when": {"teams": f"team-{n}", "images": True}},
        {"when": {"tasks": f"task-{n}", "input_tokens": {"min": 50_000}}},
        {"when": {"headers": {"x-client": f"app-{n}-*"}}},
        {"when": {"claims": {"plan": f"plan-{n}"}, "time": {"days": ["sat", "sun"], "zone": "Europe/Berlin"}}},
    )
    return {"name": f"r{n}", **conditions[n % len(conditions)], "use": "a/b"}


def rules(number):
    """So many; the requests meet the last."""
    last = {"name": "last", "match": MODEL, "use": [MODEL, "a/b"]}
    return {"rules": [*map(decoy, range(number - 1)), last]}


def limits(number):
    """So many that every request counts towards: by several subjects, in turn."""
    subjects = ([], "key", "model", ["key", "model"])
    return {"limits": [{"name": f"l{n}", "by": subjects[n % 4], "requests": PLENTY} for n in range(number)]}


def xenios(
    label,
    on=DEFAULT,
    *,
    without="",
    config=None,
    redis="memory",
    tls=False,
    traced=None,
    bystanders=0,
    keys=1,
    workers=1,
    **upstream,
):
    """A maker: Xenios with these plugins, in the shipped order, and what `config` says of them.

    `traced`: the share of requests that `tracing` samples. `upstream`: more settings of the upstream.
    """  # fmt: skip

    def make(slug, place):
        home, port, key = place.folder / slug, free_port(), new_key()
        home.mkdir(exist_ok=True)
        told = {"api_keys": key_list(keys, key), **(config or {})}
        if traced is not None:
            told["tracing"] = {"sample_ratio": traced, "endpoint": f"http://127.0.0.1:{place.mock_port}/v1/traces"}
        used = {*on, *(config or {}), *(["tracing"] if traced is not None else [])} - {without}
        asked = f"https://localhost:{place.tls_port}" if tls else f"http://127.0.0.1:{place.mock_port}"
        authority = {"ca_file": str(place.authority)} if tls else {}
        plugins = [{"use": name, "config": told.get(name, {})} for name in ORDER if name in used]
        plugins[-1:-1] = [{"use": "./bystander.py:Plugin", "id": f"bystander-{n}"} for n in range(bystanders)]
        document = {
            "server": {
                "host": "127.0.0.1",
                "workers": workers,
                "data_dir": f"{home}/data",
                "pepper": PEPPER,
                "allow_anonymous": "api_keys" not in used,
            },
            "log": {"format": "json"},
            "services": {"redis": redis, "database": {"url": "sqlite", "migrate_on_start": True}},
            "upstreams": {
                "openrouter": {
                    "kind": "openrouter",
                    "base_url": f"{asked}/api/v1",
                    "api_key": "sk-or-bench",
                    **authority,
                    **upstream,
                }
            },
            # A price: budgets reserve and spend.
            "catalogue": {
                "overrides": {MODEL: {"input": 1, "output": 5, "context_length": 2_000_000, "max_output": 8000}}
            },
            "plugins": plugins,
        }
        shutil.copy(HERE / "bystander.py", home)
        path = home / "xenios.yaml"
        path.write_text(json.dumps(document, indent=1))  # JSON is YAML
        rows = home / "data" / "sqlite" if "usage" in used else None
        command = beside("serve", "--config", path, "--port", port)
        return Target(slug, label, command, port, key, workers, "access_log" in used, rows)

    return make


def beside(*args):
    """The command beside this interpreter."""
    return [str(Path(sys.executable).parent / "xenios"), *map(str, args)]


def key_list(number, key):
    """So many keys in the configuration; the last is the one that is used."""
    others = [{"id": f"key-{n}", "hash": hash_key(new_key(), PEPPER)} for n in range(number - 1)]
    return {"keys": [*others, {"id": "bench", "hash": hash_key(key, PEPPER)}]}


MAKERS = {
    "direct": direct("direct to the mock"),
    "canned": proxy("aiohttp, canned answer", "--canned"),
    "yardstick": proxy("yardstick: bare aiohttp proxy"),
    "tricks": proxy("yardstick + all tricks", "--tricks"),
    "yardstick-tls": proxy("yardstick, upstream by TLS", tls=True),
    "xenios-bare": xenios("xenios, no plugin", on=()),
    "xenios": xenios("xenios, default plugins"),
    "xenios-aiohttp": xenios("the same, `transport: aiohttp`", transport="aiohttp"),
    "xenios-all": xenios("xenios, all built-in plugins", config=ALL, redis="embedded", traced=1),
    "xenios-tls": xenios("xenios, upstream by TLS", tls=True),
    **{f"no-{name}": xenios(name, without=name) for name in DEFAULT},
    "unsampled": xenios("tracing, no request sampled", traced=0),
    "traced": xenios("tracing, every request", traced=1),
    "limits": xenios("rate_limit and budgets, in memory", config=LIMITS),
    "limits-redis": xenios("rate_limit and budgets, Valkey", config=LIMITS, redis="embedded"),
    "usage": xenios("usage, SQLite", config={"usage": {}}),
    "workers-1": xenios("xenios, 1 worker", config=LIMITS, redis="embedded"),
    "workers-2": xenios("xenios, 2 workers", config=LIMITS, redis="embedded", workers=2),
    "rules-10": xenios("10 routing rules", config={"routing": rules(10)}),
    "rules-100": xenios("100 routing rules", config={"routing": rules(100)}),
    "limits-10": xenios("10 limits", config={"rate_limit": limits(10)}),
    "plugins-5": xenios("5 more plugins", bystanders=5),
    "plugins-20": xenios("20 more plugins", bystanders=20),
    "keys-1000": xenios("1,000 keys", keys=1000),
}


def make(slug, place):
    """A target whose preparation failed still gets its row."""
    try:
        return MAKERS[slug](slug, place)
    except (OSError, ValueError) as error:
        return Target(slug, slug, [], 0, failed=f"{type(error).__name__}: {error}")
