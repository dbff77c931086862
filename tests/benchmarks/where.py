"""Where a request's (or a streamed chunk's) microseconds go, by part: a sampled profile of a target under load.

    pip install py-spy
    python -m tests.benchmarks.where              # 64 connections, default plugins
    python -m tests.benchmarks.where --streams    # 500 streams, per chunk
    python -m tests.benchmarks.where --target limits-redis --lines 40

py-spy looks at the process a thousand times a second, without stopping it, and sees which function runs: what a function
calls in C (a system call, msgspec, aiohttp's parser) counts as its own. Shares of the CPU time per request that /proc
tells of the same seconds. Needs the right to trace processes (root, or kernel.yama.ptrace_scope = 0).
"""

import argparse
import collections
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.processes import pause, pinned
from tests.benchmarks.rounds import Rig
from tests.benchmarks.sections import REQUEST, STREAMS_500
from tests.benchmarks.targets import MAKERS, make

# (part, pattern of `function (file)`): the first that is found
PARTS = (
    ("event loop: epoll, recv", r"asyncio/runners"),
    ("send to the client", r"^_Asker\.(_write|put) "),
    ("send to the upstream", r"^Connection\.(ask|_pump) "),
    ("notes and settlements to Redis", r"^(_Post|_Line)\."),
    ("`access_log`, its thread too", r"access_log|^Condition|queue"),
    ("`metrics`", r"gateway_plugins/metrics"),
    ("`api_keys`", r"gateway_plugins/api_keys"),
    ("`routing`", r"gateway_plugins/routing"),
    ("`fallback`", r"gateway_plugins/fallback"),
    ("`tracing`", r"gateway_plugins/tracing"),
    ("`usage`", r"gateway_plugins/usage"),
    ("`rate_limit`, `budgets` and the ledger", r"rate_limit|budgets|ledger|leases|passes|subjects|limits\.py|stores/redis"),
    ("HTTP client: head, parser, pool", r"gateway/transport/"),
    ("HTTP server: parser, head, connection", r"gateway/server\.py|aiohttp/|asyncio/|_weakrefset"),
    ("streams: events, relay", r"gateway/(streaming|relay|taps)\.py|_notable|_mark"),
    ("after the reply: finisher, what is freed", r"gateway/finisher\.py|^run_finished"),
    ("bodies: read, written for the upstream", r"gateway/(incoming|outgoing|dialects)\.py|^Run\.(_whole_body|_read_body)"),
    ("pipeline: hooks, onion, exchange, watch", r"gateway/"),
)  # fmt: skip
FRAME = re.compile(r"(.*) \((.*?)(?::\d+)?\)")


def sampled(pid, seconds, rig_core, out):
    spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if spy is None:
        raise SystemExit("py-spy is not here: pip install py-spy")
    command = (spy, "record", "--nonblocking", "-r", "1000", "-d", str(seconds), "-f", "raw", "-o", out, "-p", str(pid))
    with pinned({rig_core}):
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def shares(path):
    """(share by part, share by function) of the samples in which something ran."""
    parts, functions = collections.Counter(), collections.Counter()
    for line in path.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        found = FRAME.fullmatch(stack.split(";")[-1])
        function = f"{found[1]} {'/'.join(found[2].split('/')[-3:])}" if found else stack.split(";")[-1]
        if not count.isdigit() or "idle" in function:
            continue
        functions[function] += int(count)
        part = next((name for name, pattern in PARTS if re.search(pattern, function)), "other")
        parts[part] += int(count)
    total = sum(parts.values()) or 1
    return [{name: n / total for name, n in counted.most_common()} for counted in (parts, functions)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="xenios", choices=sorted(MAKERS), metavar="SLUG")
    parser.add_argument("--streams", action="store_true", help="500 streams, per chunk")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--lines", type=int, default=0, help="so many functions too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder), 0, print)
        target = make(asked.target, rig.place)
        try:
            target.start(Path(folder))
            measure = dataclasses.replace(STREAMS_500 if asked.streams else REQUEST, seconds=asked.seconds)
            if not asked.streams:
                rig.sample(target, dataclasses.replace(measure, seconds=1))  # warm
            out = Path(folder, "samples")
            spy = sampled(target.process.pid, int(asked.seconds) - 1, rig.core, out)
            pause(0.5)
            report = rig.sample(target, measure)
            if spy.wait() or not out.exists():
                raise SystemExit(f"py-spy: {spy.stderr.read().strip()[-300:]}")
        finally:
            target.stop()
            rig.close()
        parts, functions = shares(out)
    each = report["cpu_s"] * 1e6 / (report["chunks"] if asked.streams else report["asked"])
    print(f"{target.label}: {each:.0f} µs of CPU a {'chunk' if asked.streams else 'request'}")
    print("| part | µs | share |\n|---|---:|---:|")
    for name, share in parts.items():
        print(f"| {name} | {share * each:.1f} | {share:.0%} |")
    for name, share in list(functions.items())[: asked.lines]:
        print(f"{share * each:6.1f}  {name}")


if __name__ == "__main__":
    main()
